"""
What a training step sees: samples as functions of an index, and batches as functions of the step.

    stream         =  document, eos, document, eos, ...      whole documents, over all shards
    sample(index)  =  stream[w * context_len : (w + 1) * context_len + 1]
                      w = shuffled(index), anew in every epoch
    batch(step)    =  samples step * batch, ..., step * batch + batch - 1, of which each process
                      takes its share; steps from 0 here

A sample depends on (seed, index) alone, so a run goes on from its step without any other state, on
any number of GPUs, and everyone sees the same samples in the same order. Beside its tokens it has
weights, how much each counts as a target of the loss. Needles (niah.py) are made on the fly; text
comes from shards, which this file writes as a script: `python data.py`. The format and the workers
that encode are in infra/shards.py, the tokenizers in infra/tokenizers.py.

Checked in tests/test_data.py and tests/test_report.py. Read train.py next.
"""
import argparse
import hashlib
import math
import os
import zlib
from bisect import bisect_right
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from infra.files import only_one, short, told_to_end
from infra.shards import (SUFFIXES, builtin_text, documents, find_files, naming, open_parquet,
                          open_shard, write_shards)
from infra.tokenizers import get_tokenizer, tokenizer_of  # noqa: F401 (users know them from here)

# torch is imported where it is used. Workers import this file anew where they are not forked, one
# per core, and need none.

# ---------------------------------------------------------------- text


def shuffled(index, n, key):
    """Where a pseudo-random permutation of range(n) sends index; no table, however large n is."""
    # A Feistel network permutes range(a power of four >= n). Walking on until the value is below n
    # keeps it a permutation of range(n).
    half = ((n - 1).bit_length() + 1) // 2
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(4):
            mixed = hashlib.blake2b(f"{key} {turn} {right}".encode(), digest_size=8).digest()
            left, right = right, left ^ int.from_bytes(mixed, "little") & mask
        index = left << half | right
        if index < n:
            return index


class Shards:
    """The shards of a folder as one stream of tokens, cut into windows of context_len."""

    def __init__(self, path, context_len, seed, split="train"):
        assert context_len > 0 and split in ("train", "val"), f"{context_len=} {split=}"
        if Path(path).is_file():
            raise ValueError(f"{path} is a file, where a folder of shards is wanted: "
                             f"python data.py --input={path} makes one of text")
        self.shards = [open_shard(file) for file in sorted(Path(path).glob("*.bin"))]
        if not self.shards:
            raise FileNotFoundError(f"{path}: no .bin shards; make them with: python data.py "
                                    f"--output={path}")
        self.check_they_belong_together(Path(path))
        lengths = [len(shard.tokens) for shard in self.shards]
        self.starts = np.cumsum([0] + lengths).tolist()  # of each shard in the stream
        self.n_tokens = self.starts[-1]

        # The last target needs one more token.
        n_windows = (self.n_tokens - 1) // context_len
        if n_windows < 2:
            raise ValueError(f"{path}: {self.n_tokens:,} tokens give {max(n_windows, 0)} windows "
                             f"of context_len {context_len}, train and val need 2; add text or "
                             "shorten context_len")
        # The last 1 % of windows is validation. Windows share no token but the last one of each,
        # which is only a target there.
        n_val = max(1, n_windows // 100)
        n_train = n_windows - n_val
        self.first, self.len = (0, n_train) if split == "train" else (n_train, n_val)
        self.context_len, self.seed = context_len, seed

    def check_they_belong_together(self, folder):
        first = self.shards[0]
        self.n_vocab, self.tokenizer = first.n_vocab, first.tokenizer
        for n, shard in enumerate(self.shards):
            if shard.path.stem.isdigit() and int(shard.path.stem) != n:
                raise FileNotFoundError(
                    f"{folder / f'{n:05d}.bin'} is missing, though {shard.path.name} is there: "
                    "restore it from a copy, or move those after it away and run data.py again")
            if (shard.n_vocab, shard.tokenizer) != (self.n_vocab, self.tokenizer):
                raise ValueError(f"{shard.path}: tokenizer {shard.tokenizer} of {shard.n_vocab} "
                                 f"ids, but {first.path} has {self.tokenizer} of {self.n_vocab}; "
                                 "keep one tokenizer per folder")

    def __len__(self):
        # In windows: an epoch of this split.
        return self.len

    def sample(self, index):
        """-> (context_len + 1,) int64. An epoch, len() indices, visits each window once."""
        epoch, i = divmod(index, self.len)
        window = self.first + shuffled(i, self.len, key=f"{self.seed} {epoch}")
        start, end = window * self.context_len, (window + 1) * self.context_len + 1
        parts = []
        # A window may cross into the next shard, or several.
        while start < end:
            n = bisect_right(self.starts, start) - 1
            shard = self.shards[n]
            part = shard.read(start - self.starts[n], min(end - self.starts[n], len(shard.tokens)))
            # An id that the embedding has no row for would end in an error of CUDA's, or in none.
            if part.max() >= self.n_vocab:
                raise ValueError(f"{shard.path}: token {part.max()} is outside the vocabulary of "
                                 f"{self.n_vocab}; the file is damaged, move it away and run "
                                 "data.py again")
            parts.append(part)
            start += len(part)
        return np.concatenate(parts).astype(np.int64)


class Text:
    """The data set of shards: text[index] -> tokens, weights (context_len + 1,), all of them 1."""

    def __init__(self, args, tokenizer, split):
        self.shards = Shards(args.data, args.context_len, args.seed, split)
        if self.shards.tokenizer != tokenizer.name:
            raise ValueError(f"{args.data} was made with tokenizer {self.shards.tokenizer}, the "
                             f"model's is {tokenizer.name}: make shards with the model's "
                             "tokenizer, or name theirs with --tokenizer")

    def __getitem__(self, index):
        tokens = self.shards.sample(index)
        weights = np.ones(len(tokens), np.float32)
        # Nothing comes before the first token, so nothing predicts it.
        weights[0] = 0
        return tokens, weights


# ---------------------------------------------------------------- of a run

def make_data(args, tokenizer, Needles):
    """Training and validation samples of a run, both functions of an index."""
    # Needles is niah's class, which is handed in: this file needs to know nothing of them.
    if args.data != "niah":
        return Text(args, tokenizer, "train"), Text(args, tokenizer, "val")
    # Whole steps: --drills is the share of them, from the first one on, that sees nothing else.
    only_drills = int(args.drills * args.steps) * args.batch
    # In validation only answers count, however much the rest weighs in training.
    held_out = argparse.Namespace(**{**vars(args), "other_weight": 0.0})
    # A model that is continued sees samples that are new to it.
    seed = f"{args.recipe}-{args.seed}" if args.init else args.seed
    return (Needles(args, tokenizer, seed, only_drills),
            Needles(held_out, tokenizer, f"val-{seed}"))


class Indices:
    """The indices of this process's samples, once so many steps are done."""

    def __init__(self, args, done, processes):
        self.steps, self.batch, self.rank = range(done, args.steps), args.batch, processes.rank
        self.per_process = args.batch // processes.world

    def __len__(self):
        return len(self.steps) * self.per_process

    def __iter__(self):
        for step in self.steps:
            first = step * self.batch + self.rank * self.per_process
            yield from range(first, first + self.per_process)


def batches(dataset, args, done, processes):
    """This process's part of each batch after so many: tokens, weights (B, context_len + 1)."""
    from torch.utils.data import DataLoader
    # With the indices as its sampler the loader works ahead of training, in the order of steps.
    indices = Indices(args, done, processes)
    return DataLoader(dataset, batch_size=indices.per_process, sampler=indices,
                      num_workers=args.workers, pin_memory=args.device.startswith("cuda"))


@contextmanager
def workers_told():
    """Errors of the processes that make batches become our own, of one line."""
    try:
        yield
    except (ValueError, OSError) as error:
        # torch wraps the error into pages, of which the last line is what we said.
        if "Original Traceback" not in str(error):
            raise
        raise type(error)(str(error).strip().splitlines()[-1].partition(": ")[2]) from None
    except RuntimeError as error:
        # With this torch interrupts whatever runs.
        if "DataLoader worker" not in str(error):
            raise
        raise OSError(f"a process that makes batches is gone ({str(error).splitlines()[0]}): was a "
                      "shard cut short meanwhile, or is there no memory for --workers of them? The "
                      "last checkpoint is whole") from None


def hash_of(file):
    """Twelve hex digits of what a file holds; None if there is none."""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:12] if file else None


def fingerprint(dataset):
    """A hash of the first sample and of the shards' lengths."""
    # Where it has changed, the same flags mean other data by now: our code is another, or Python's
    # help pages, or a shard is missing.
    parts = [np.asarray(part).tobytes() for part in dataset[0]]
    if isinstance(dataset, Text):
        parts.append(repr(dataset.shards.starts).encode())
    return hashlib.sha256(b"".join(parts)).hexdigest()[:12]


# ---------------------------------------------------------------- python data.py

def count(most):
    """A flag's type: a whole number from 1 to this, of which 100e6 is one."""
    def of_flag(text):
        try:
            found = float(text)
        except ValueError:
            found = math.nan
        if not (1 <= found <= most and found == int(found)):
            raise argparse.ArgumentTypeError(f"{short(text)} is no whole number from 1 to "
                                             f"{most:,.0f}")
        return int(found)
    return of_flag


def flags():
    from infra.cli import flag_parser
    parser = flag_parser("data.py", "Turn text into token shards for train.py.")
    add = parser.add_argument
    add("--input", nargs="+", metavar="PATH", help=f"files ({', '.join(SUFFIXES)}) or folders, "
        "searched below; a .txt is one document, a line or row of the others is one; default: the "
        "text that comes with CPython")
    add("--output", metavar="DIR", help="folder for the shards; data/pydoc where there is no "
        "--input")
    add("--tokenizer", default="bytes", help="bytes, or a tokenizer.json, or a folder with one")
    add("--shard_tokens", type=count(1e12), default="100e6", help="a shard is closed by the "
        "document that reaches this many tokens; two shards are held in memory")
    add("--workers", type=count(1024), default=os.cpu_count(), help="processes that encode; the "
        "shards do not depend on it")
    add("--text_field", default="text", help="field (.jsonl) or column (.parquet) that holds the "
        "text")
    return parser


def run(args):
    if args.input and not args.output:
        raise ValueError("--input needs --output=DIR")
    if args.input:
        files = find_files(args.input)
        for path in files:
            if path.suffix == ".parquet":
                # A download that was cut off shows here, not hours into the work.
                with naming(path):
                    open_parquet(path, args.text_field)
        docs = documents(files, args.text_field)
        total = sum(file.stat().st_size for file in files)
        print(f"{len(files)} files, {total / 1e6:,.1f} MB", end="; ")
    else:
        files, text, total = [], builtin_text(), len(builtin_text())
        docs, args.output = [(text, total)], args.output or "data/pydoc"
        print(f"no --input: the text that comes with CPython (pydoc_data), {total / 1e6:.2f} M "
              "characters", end="; ")
    print(f"tokenizer {args.tokenizer}; {args.workers} workers; shards of {args.shard_tokens:,} "
          "tokens", flush=True)

    # By this a run knows its own shards, and goes on after them.
    asked = [(f.name, f.stat().st_size) for f in files], args.text_field, args.shard_tokens
    job = zlib.crc32(repr(asked).encode())
    Path(args.output).mkdir(parents=True, exist_ok=True)
    try:
        with only_one(args.output):
            write_shards(docs, total, args.output, args.tokenizer, args.shard_tokens, args.workers,
                         job)
    except BrokenProcessPool:
        raise OSError("a worker was killed, for want of memory perhaps (fewer --workers take "
                      "less); whole shards are kept and the same command goes on after "
                      "them") from None


def main(argv=None):
    from infra.cli import command
    args = flags().parse_args(argv)
    command("data.py", lambda: run(args), interrupted="interrupted; whole shards are kept and the "
            "same command goes on after them")


if __name__ == "__main__":
    told_to_end()
    main()
