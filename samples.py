"""
What a training step sees: batches of needles made on the fly, or of text from token shards.

    sample(index) -> tokens, weights (context_len + 1,)      a function of (seed, index)
    batch(step)   =  samples step * batch, ..., step * batch + batch - 1, of which each process takes its share; steps from 0 here

So a run goes on from its step alone, on any number of GPUs, and everyone sees the same samples in the same order. A weight
says how much a token counts as a target: 1, or less where it is no answer. Checked in tests/test_train.py. Read niah.py and
data.py for how samples are made, cost.py next.
"""
import argparse
import hashlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

import niah
from data import Shards


class Needles(torch.utils.data.Dataset):
    """
    Sample `index` of niah.training_sample: tokens and loss weights (context_len + 1,).

    The first `only_drills` samples are drills, which form retrieval; of the others 30 % are, lest it fade.
    """

    def __init__(self, args, tokenizer, seed, only_drills=0):
        self.only_drills, self.later_drills = only_drills, 0.3 if only_drills else 0.0
        self.haystack = niah.read_haystack(args.haystack) if args.haystack else None
        self.new_tokens = niah.default_new_tokens(args.context_len, tokenizer)
        fitting = niah.fitting_tasks(args.context_len, tokenizer, args.protocol, max_new_tokens=self.new_tokens)
        self.tasks = args.tasks or fitting
        if not self.tasks or set(self.tasks) - set(fitting):
            raise ValueError(f"--context_len {args.context_len} is too short for these tasks; it has room for "
                             f"{', '.join(fitting) or 'none (512 bytes hold the simplest)'}")
        self.args, self.tokenizer, self.seed = args, tokenizer, seed

    def __getitem__(self, index):
        args, drills = self.args, 1.0 if index < self.only_drills else self.later_drills
        return niah.training_sample(args.context_len, self.tokenizer, self.seed, index, self.tasks, args.many, self.haystack,
                                    args.other_weight, args.protocol, self.new_tokens, drills)


class Text(torch.utils.data.Dataset):
    """Window `index` of token shards, every token with weight 1."""

    def __init__(self, args, tokenizer, split):
        self.shards = Shards(args.data, args.context_len, args.seed, split)
        if self.shards.tokenizer != tokenizer.name:
            raise ValueError(f"{args.data} was made with tokenizer {self.shards.tokenizer}, the model's is {tokenizer.name}: "
                             "make shards with the model's tokenizer, or name theirs with --tokenizer")

    def __getitem__(self, index):
        tokens = self.shards.sample(index)
        one = torch.ones(len(tokens))
        one[0] = 0
        return tokens, one


# ---------------------------------------------------------------- of a run

def make_data(args, tokenizer):
    """Training and validation samples, both functions of an index."""
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
    indices = Indices(args, done, processes)
    return torch.utils.data.DataLoader(dataset, batch_size=indices.per_process, sampler=indices, num_workers=args.workers,
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
