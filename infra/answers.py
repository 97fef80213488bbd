"""
Answers that outlive what makes them: the files of an evaluation that can be stopped, continued and
shared by GPUs.

    OUT/answers-RANK.jsonl   a line for each answer, appended batch by batch: ctrl-C or kill -9
                             costs the batch in hand
    OUT/asked.json           what was asked of whom; a run of other questions or models is refused
    OUT/results.json         the report, made from all lines once none is missing (eval_niah.py)

Which examples share a batch follows from the examples and --batch alone. So a run that was stopped,
or that goes on with another number of GPUs, gives the same answers; on a GPU up to rounding, as
sums are split by the size of the cache, which an earlier batch may have chosen.

Checked in tests/test_eval_niah.py and tests/test_report.py. eval_niah.py fills these files.
"""
import hashlib
import json
import os
import platform
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from infra import weights
from infra.files import SEAL, load, make_folder, only_one, parse_json, save, seal_of, sealed


# ---------------------------------------------------------------- an answer, a line

class Answer(NamedTuple):
    """What one method made of one example. Reads are in entries, mean of KV heads and layers."""
    text: str
    read: float         # by a token of the answer; None where the prefill gave the end at once
    prompt_read: float  # by a token of the prompt; None if the method does not tell
    seconds: float      # of the batch, prefill and decoding, divided by its rows; a prefill counts
                        # for each method that it serves


@dataclass
class Outcome:
    """What one method made of all examples, in their order: lists as in Answer, seconds summed."""
    texts: list
    read: list
    prompt_read: list
    seconds: float = 0.0

    @classmethod
    def of(cls, answers):
        *lists, seconds = map(list, zip(*answers))
        return cls(*lists, sum(seconds))


class Line(NamedTuple):
    """A line of answers-RANK.jsonl: an answer, or H1 of a batch, whose method is "H1 METHOD"."""
    checkpoint: str  # its label
    task: str
    method: str      # sparse.name, which tells the seed of a draw by chance
    examples: list   # indices in the task; of an answer only one
    told: dict       # an Answer; of H1: hits (layers, KV), and of how many answers


def written(line):
    """A Line as the bytes of one of the file, with a hash of its own."""
    return (json.dumps(sealed(line._asdict())) + "\n").encode()


def line_of(text):
    """The Line of such bytes. ValueError, TypeError or AttributeError if they are no such line."""
    content = parse_json(text)
    seal = content.pop(SEAL, None)
    if seal is None:
        raise ValueError("it has no hash, so perhaps an older version wrote this file")
    if seal != seal_of(content):
        raise ValueError("it does not match its hash")
    return Line(**content)


def read_lines(folder):
    """
    {(checkpoint, task, method): {example: its Line}} of all answers-*.jsonl, whatever the number of
    ranks was. ValueError, which names the line, if one is damaged.
    """
    found = {}
    for file in sorted(Path(folder).glob("answers-*.jsonl")):
        # behind the last end of a line there is nothing, or what a kill has cut off
        for number, text in enumerate(file.read_bytes().split(b"\n")[:-1], 1):
            if not text.strip():
                continue
            try:
                line = line_of(text)
            except (ValueError, TypeError, AttributeError) as error:
                raise ValueError(f"{file} line {number} is damaged ({error}): delete that line, "
                                 "and what it told is asked again") from None
            there = found.setdefault(line[:3], {})
            if there.keys().isdisjoint(line.examples):  # else two runs at once wrote here
                there.update(dict.fromkeys(line.examples, line))
    return found


def hit_rates(lines):
    """
    H1 of a method's lines, {example: Line}: the share of answers that each head hits, (layers, KV)
    as lists; None without any. A line is a batch's and stands at each of its examples: it counts
    once.
    """
    batches = [line.told for example, line in lines.items() if example == line.examples[0]]
    if not batches:
        return None
    hit = sum(torch.tensor(batch["hits"]) for batch in batches)
    answers = sum(batch["answers"] for batch in batches)
    return (hit / answers).tolist() if answers else None  # none of them stands in one place


@contextmanager
def appending(folder, rank):
    """-> a function that appends Lines to this rank's file, whole batches of them"""
    with open(Path(folder) / f"answers-{rank}.jsonl", "ab") as file:
        # off with what a kill has left of a line: the next one would be glued to it
        file.truncate(Path(file.name).read_bytes().rfind(b"\n") + 1)

        def append(lines):
            file.write(b"".join(map(written, lines)))
            file.flush()
        yield append


# ---------------------------------------------------------------- what is left to ask

class Batch(NamedTuple):
    """Examples that are asked together."""
    checkpoint: str  # its label
    task: str
    rows: list       # indices of the examples
    missing: dict    # {method: those of the rows that have no answer yet}

    def count(self):
        """How many answers are missing."""
        return sum(map(len, self.missing.values()))

    def lines(
        self,
        answers,  # {method: an Answer for each row, and perhaps for more that filled the batch up}
        found,    # {"H1 METHOD": which heads hit which answers, (answers, layers, KV) for each row}
        size,     # how many rows were computed
    ):            # -> a Line for all that is missing
        lines = []
        for name, of_rows in found.items():
            missing = self.missing[name]
            hit = torch.cat([heads for i, heads in zip(self.rows, of_rows) if i in missing])
            told = {"hits": hit.sum(0).tolist(), "answers": len(hit)}
            lines.append(Line(self.checkpoint, self.task, name, missing, told))
        for name, of_rows in answers.items():
            by_row = dict(zip(self.rows, of_rows))
            for i in self.missing[name]:
                # the time of what filled the batch up is the real rows' too
                seconds = by_row[i].seconds * size / len(self.rows)
                told = by_row[i]._replace(seconds=seconds)._asdict()
                lines.append(Line(self.checkpoint, self.task, name, [i], told))
        return lines


def by_length(examples, batch):
    """Indices of the examples in batches of similar length, so that there is little padding."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].ids))
    return [order[start:start + batch] for start in range(0, len(order), batch)]


def unanswered(examples, methods, batch, there):
    """
    The Batches with something missing. Who shares one follows from the examples and --batch alone,
    not from where a run was stopped, nor from the ranks. there: read_lines's.
    """
    for label, by_task in examples.items():
        for task, of_task in by_task.items():
            for rows in by_length(of_task, batch):
                missing = {}
                for name in methods:
                    known = there.get((label, task, name), ())
                    if of_method := [i for i in rows if i not in known]:
                        missing[name] = of_method
                if missing:
                    yield Batch(label, task, rows, missing)


# ---------------------------------------------------------------- are they the same questions?

def hash_of_files(files):
    """
    Of names and bytes. Not of dates, which a copy changes. 14 GB take some 10 s, but no time if the
    files tell a hash of their own.
    """
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {file.stat().st_size} ".encode())
        own = weights.written_hash(weights.opened(file)) if file.suffix == ".safetensors" else None
        if own:  # whoever loads the file asks whether it is true
            digest.update(own.encode())
            continue
        with open(file, "rb") as whole:
            while chunk := whole.read(2**24):
                digest.update(chunk)
    return digest.hexdigest()[:12]


def made_of(args, examples):
    """
    What prompts follow from besides the flags, each in words: why two runs with the same flags may
    ask different ones.
    """
    each = [of_task[0] for by_task in examples.values() for of_task in by_task.values()]
    return {"--words": args.words, "words of keys": sorted({e.keys_from for e in each}),
            "haystacks": sorted({e.haystack_from for e in each}),
            "Python": platform.python_version()}


def cause(before, now):
    """
    In words: what differs between two of made_of, and what to do about it. before: None in the
    folders of older versions.
    """
    if before is None:
        return ("an older version asked them, which took the words of wonderwords wherever that "
                "was installed: try --words=wonderwords; or Python's help pages, the haystack, are "
                "of another Python")
    differ = [f"{name} was {before.get(name)}, now {value}"
              for name, value in now.items() if before.get(name) != value]
    return "; ".join(differ) or ("all that they are made of is the same, so the code that makes "
                                 "them is not: take the commit in asked.json")


# Flags that every answer in a folder depends on.
SETTINGS = ("samples", "seed", "context_len", "max_new_tokens", "protocol", "haystack", "jsonl",
            "dtype", "kernels", "blind", "questions", "yarn")


def refuse_other_questions(args, labels, tokenizers, examples, prompt_hash, call):
    """
    ValueError if --out holds answers to other questions, or of other models. More methods are no
    other question. prompt_hash: niah's. call: what is running, kept beside those that made the
    answers there.
    """
    asked = {"--ckpt": list(labels), "--tasks": list(next(iter(examples.values()))),
             "--tokenizer": [tokenizer.name for tokenizer in tokenizers.values()]}
    asked |= {f"--{name}": getattr(args, name) for name in SETTINGS}
    prompts = {}
    for label, path in labels.items():
        path = weights.resolve(path)
        files = sorted([path / "config.json", *path.glob("model*")]) if path.is_dir() else [path]
        asked[f"--ckpt {label} (a hash of its files)"] = hash_of_files(files)
        prompts |= {f"what is asked in {task} (a hash of {label}'s prompts)": prompt_hash(e)
                    for task, e in examples[label].items()}
    made, file = made_of(args, examples), Path(args.out) / "asked.json"

    # a folder without an answer binds no one
    bound = any(there.stat().st_size for there in file.parent.glob("answers-*.jsonl"))
    before = load(file, "calls") if bound else asked | prompts | {"calls": []}
    for name, value in (asked | prompts).items():
        was = before.get(name)
        if comparable(name, was) == comparable(name, value):
            continue
        why = f" ({cause(before.get('made_of'), made)})" if name in prompts else ""
        raise ValueError(f"{args.out} holds answers of another run: {name} was {was}, now {value}"
                         f"{why}. Choose another --out, or move that one away")
    calls = before["calls"] + [call] * (call not in before["calls"][-1:])
    save(asked | prompts | {"made_of": made, "calls": calls}, file)


def comparable(name, value):
    """A setting as it compares: files by where they are, however their paths are spelled."""
    if name == "--haystack" and value:
        return os.path.realpath(value)
    if name == "--jsonl" and value:
        return [os.path.realpath(path) for path in value]
    return value


# ---------------------------------------------------------------- several processes

class Ranks:
    """
    The processes that torchrun started, one for each GPU, which meet in its key-value store;
    without it, one.
    """

    def __init__(self):
        if os.environ.get("WORLD_SIZE", "1") == "1":
            self.store, self.rank, self.n = dist.HashStore(), 0, 1
        else:
            self.store, self.rank, self.n = next(dist.rendezvous("env://"))

    def meet(self, place, word=""):
        """-> the words of all, by rank, once all are there; if one fails, torchrun ends all"""
        self.store.set(f"{place} {self.rank}", word)
        while not self.store.check([f"{place} {rank}" for rank in range(self.n)]):
            time.sleep(0.1)  # not in the store, where ctrl-C is not heard
        return [self.store.get(f"{place} {rank}").decode() for rank in range(self.n)]

    @contextmanager
    def folder(self, out):
        """-> the first process's folder, made, and kept from other runs. ValueError if it is none
        for answers."""
        out = self.meet("prepared", out)[0]
        if (Path(out) / "log.jsonl").exists() or any(Path(out).glob("step_*")):
            raise ValueError(f"--out {out} holds a training: give a folder of its own")
        make_folder(out, "--out")
        if self.rank:
            yield out
            return
        with only_one(out):
            yield out
