"""
Text to tokens to training samples: three tokenizers, one shard file format, one reader.

    stream = document, eos, document, eos, ...                        whole documents, over as many shards as it takes
    sample(index) = stream[w * context_len : (w + 1) * context_len + 1]    w = shuffled(index), anew in every epoch

A sample depends on (seed, index) only, so a run resumes from its step alone and ranks slice the indices as they like.
As a script it turns .txt, .jsonl, .jsonl.gz and .parquet into shards; with no argument, the text that comes with CPython:

    this process    lists the work in the order of the input, puts the results back into that order, writes the shards
    a worker        reads a row group of a .parquet by itself, or is sent 32 texts of another file; encodes; sends token bytes

So the shards depend on the input only, not on the workers or on how often the run was killed. The whole shards say how many
documents are done, and row groups of done documents are skipped unread. In memory: two shards (one fills, one goes to disk)
and two pieces of work for each worker, a row group of at most GROUP_BYTES or 32 texts.
tests/test_data.py holds the tokenizers equal to Hugging Face's `tokenizers` and to sentencepiece. Read niah.py next.
"""
import argparse
import hashlib
import math
import os
import sys
import zlib
from bisect import bisect_right
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from infra.files import only_one, short, told_to_end
from infra.shards import SUFFIXES, builtin_text, documents, find_files, naming, open_parquet, open_shard, write_shards
from infra.tokenizers import get_tokenizer, tokenizer_of  # noqa: F401 (users import them from here)

def shuffled(index, n, key):
    """
    Where a pseudo-random permutation of range(n) sends index. A Feistel network permutes a power of four >= n, and
    walking on until the value is below n keeps it a permutation of range(n): no table, however many windows there are.
    """
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
    """
    The shards of a folder as one stream of tokens, cut into windows of context_len; the last 1 % of windows is "val".

    len() is the windows of one epoch of this split. n_tokens counts the whole stream, both splits.
    """

    def __init__(self, path, context_len, seed, split="train"):
        assert context_len > 0 and split in ("train", "val"), f"{context_len=} {split=}"
        self.shards = [open_shard(file) for file in sorted(Path(path).glob("*.bin"))]
        if not self.shards:
            raise FileNotFoundError(f"{path}: no .bin shards; make them with: python data.py --output={path}")
        first = self.shards[0]
        self.n_vocab, self.tokenizer = first.n_vocab, first.tokenizer
        for n, shard in enumerate(self.shards):
            if shard.path.stem.isdigit() and int(shard.path.stem) != n:
                raise FileNotFoundError(f"{Path(path) / f'{n:05d}.bin'} is missing, though {shard.path.name} is there: restore it from a copy, "
                                        "or move those after it away and run data.py again")
            if (shard.n_vocab, shard.tokenizer) != (self.n_vocab, self.tokenizer):
                raise ValueError(f"{shard.path}: tokenizer {shard.tokenizer} of {shard.n_vocab} ids, but {first.path} has "
                                 f"{self.tokenizer} of {self.n_vocab}; keep one tokenizer per folder")
        self.starts = np.cumsum([0] + [len(shard.tokens) for shard in self.shards]).tolist()  # of each shard in the stream
        self.n_tokens = self.starts[-1]
        n_windows = (self.n_tokens - 1) // context_len  # the last target needs one more token
        if n_windows < 2:
            raise ValueError(f"{path}: {self.n_tokens:,} tokens give {max(n_windows, 0)} windows of context_len {context_len}, "
                             "train and val need 2; add text or shorten context_len")
        n_val = max(1, n_windows // 100)
        self.first, self.len = (0, n_windows - n_val) if split == "train" else (n_windows - n_val, n_val)
        self.context_len, self.seed = context_len, seed

    def __len__(self):
        return self.len

    def sample(self, index):
        """-> (context_len + 1,) int64. Every len() indices in a row from a multiple of len() visit each window once."""
        epoch, i = divmod(index, self.len)
        window = self.first + shuffled(i, self.len, key=f"{self.seed} {epoch}")
        start, end = window * self.context_len, (window + 1) * self.context_len + 1
        pieces = []
        while start < end:  # a window may cross into the next shard, or several
            n = bisect_right(self.starts, start) - 1
            shard = self.shards[n]
            piece = shard.read(start - self.starts[n], min(end - self.starts[n], len(shard.tokens)))
            if piece.max() >= self.n_vocab:
                raise ValueError(f"{shard.path}: token {piece.max()} is outside the vocabulary of {self.n_vocab}; "
                                 "the file is damaged, move it away and run data.py again")
            pieces.append(piece)
            start += len(piece)
        return np.concatenate(pieces).astype(np.int64)


class Text:
    """Window `index` of token shards, every token with weight 1."""

    def __init__(self, args, tokenizer, split):
        self.shards = Shards(args.data, args.context_len, args.seed, split)
        if self.shards.tokenizer != tokenizer.name:
            raise ValueError(f"{args.data} was made with tokenizer {self.shards.tokenizer}, the model's is {tokenizer.name}: "
                             "make shards with the model's tokenizer, or name theirs with --tokenizer")

    def __getitem__(self, index):
        tokens = self.shards.sample(index)
        one = np.ones(len(tokens), np.float32)
        one[0] = 0
        return tokens, one


# ---------------------------------------------------------------- of a run

def make_data(args, tokenizer, Needles):
    """Training and validation samples, both functions of an index. Needles: niah's class of them."""
    if args.data != "niah":
        return Text(args, tokenizer, "train"), Text(args, tokenizer, "val")
    only_drills = int(args.drills * args.steps) * args.batch
    # in validation only answers count, however much the rest weighs in training
    held_out = argparse.Namespace(**{**vars(args), "other_weight": 0.0})
    seed = f"{args.recipe}-{args.seed}" if args.init else args.seed  # a model that is continued sees samples that are new to it
    return Needles(args, tokenizer, seed, only_drills), Needles(held_out, tokenizer, f"val-{seed}")


class Indices:
    """Of this process's samples, once so many steps are done."""

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
    """This process's part of each batch after so many: tokens, weights (batch / processes, context_len + 1)."""
    from torch.utils.data import DataLoader  # here: python data.py and its workers need no torch
    indices = Indices(args, done, processes)
    return DataLoader(dataset, batch_size=indices.per_process, sampler=indices, num_workers=args.workers,
                      pin_memory=args.device.startswith("cuda"))


@contextmanager
def workers_told():
    """Errors of the processes that make batches as our own: one line, without torch's pages around it."""
    try:
        yield
    except (ValueError, OSError) as error:
        if "Original Traceback" not in str(error):
            raise
        raise type(error)(str(error).strip().splitlines()[-1].partition(": ")[2]) from None
    except RuntimeError as error:  # by which torch interrupts whatever runs
        if "DataLoader worker" not in str(error):
            raise
        raise OSError(f"a process that makes batches is gone ({str(error).splitlines()[0]}): was a shard cut short meanwhile, or is there "
                      "no memory for --workers of them? The last checkpoint is whole") from None


def hash_of(file):
    """Of what a file holds; None if there is none."""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:12] if file else None


def fingerprint(dataset):
    """
    A hash of the first sample and of the shards' lengths. If it has changed, the same flags mean other data by now: our code,
    Python's help pages, a shard that is missing.
    """
    parts = [np.asarray(part).tobytes() for part in dataset[0]]
    if isinstance(dataset, Text):
        parts.append(repr(dataset.shards.starts).encode())
    return hashlib.sha256(b"".join(parts)).hexdigest()[:12]


# ---------------------------------------------------------------- python data.py

def count(most):
    """The type of a flag that takes a whole number from 1 to this; 100e6 will do."""
    def number(text):
        try:
            found = float(text)
        except ValueError:
            found = math.nan
        if not (1 <= found <= most and found == int(found)):
            raise argparse.ArgumentTypeError(f"{short(text)} is no whole number from 1 to {most:,.0f}")
        return int(found)
    return number


def main():
    parser = argparse.ArgumentParser(description="Turn text into token shards for train.py.", allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--input", nargs="+", metavar="PATH", help=f"files ({', '.join(SUFFIXES)}) or folders, searched below; "
                        "a .txt is one document, a line or row of the others is one. None: the text that comes with CPython")
    parser.add_argument("--output", metavar="DIR", help="folder for the shards; data/pydoc where there is no --input")
    parser.add_argument("--tokenizer", default="bytes", help="bytes, or a tokenizer.json, a tokenizer.model, or a folder with one")
    parser.add_argument("--shard_tokens", type=count(1e12), default="100e6", help="a shard is closed by the document that reaches this "
                        "many tokens; two shards are held in memory")
    parser.add_argument("--workers", type=count(1024), default=os.cpu_count(), help="processes that encode; the shards do not depend on it")
    parser.add_argument("--text_field", default="text", help="field (.jsonl) or column (.parquet) that holds the text")
    args = parser.parse_args()
    if args.input and not args.output:
        parser.error("--input needs --output=DIR")
    try:
        if args.input:
            files = find_files(args.input)
            for path in files:
                if path.suffix == ".parquet":  # a download that was cut off shows here, not hours into the work
                    with naming(path):
                        open_parquet(path, args.text_field)
            docs, total = documents(files, args.text_field), sum(f.stat().st_size for f in files)
            print(f"{len(files)} files, {total / 1e6:,.1f} MB", end="; ")
        else:
            files, text = [], builtin_text()
            docs, total = [(text, len(text))], len(text)
            args.output = args.output or "data/pydoc"
            print(f"no --input: the text that comes with CPython (pydoc_data), {total / 1e6:.2f} M characters", end="; ")
        print(f"tokenizer {args.tokenizer}; {args.workers} workers; shards of {args.shard_tokens:,} tokens", flush=True)
        job = zlib.crc32(repr(([(f.name, f.stat().st_size) for f in files], args.text_field, args.shard_tokens)).encode())
        Path(args.output).mkdir(parents=True, exist_ok=True)
        with only_one(args.output):
            write_shards(docs, total, args.output, args.tokenizer, args.shard_tokens, args.workers, job)
    except (ValueError, OSError, ImportError) as e:
        print(f"data.py: error: {e}", file=sys.stderr)
        sys.exit(2)
    except BrokenProcessPool:
        print("data.py: error: a worker was killed, for want of memory perhaps (fewer --workers take less); whole shards are kept and "
              "the same command goes on after them", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ndata.py: interrupted; whole shards are kept and the same command goes on after them", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    told_to_end()
    main()
