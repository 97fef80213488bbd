"""
Answers that outlive what makes them: the files of an evaluation that can be stopped, continued and shared by GPUs.

    OUT/answers-RANK.jsonl   a line for each answer, appended batch by batch: ctrl-C or kill -9 costs the batch in hand
    OUT/asked.json           what was asked of whom; a run of other questions or models is refused
    OUT/results.json         the report, made from all lines once none is missing (eval_niah.py)

Which examples share a batch follows from the examples and --batch alone, so a run that was stopped, or goes on with another
number of GPUs, gives the same answers; on a GPU up to rounding, as sums are split by the size of the cache, which an earlier
batch may have chosen. Checked in tests/test_eval_niah.py. eval_niah.py fills these files.
"""
import hashlib
import json
import os
import platform
import time
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from infra import weights
from infra.files import SEAL, load, parse_json, save, seal_of, sealed

# ---------------------------------------------------------------- what is answered, and what is left

class Line(NamedTuple):
    """A line of OUT/answers-RANK.jsonl: an answer, or the hits of a batch, whose method is "H1 METHOD"."""
    checkpoint: str  # its label
    task: str
    method: str      # sparse.name, which tells a random one's seed
    examples: list   # indices in the task, of an answer only one
    told: dict       # of an answer: Told; of H1: hits (layers, KV) and the number of answers


def read_lines(folder):
    """{(checkpoint, task, method): {example: its Line}} of all answers-*.jsonl, whatever the number of ranks was."""
    found = {}
    for file in sorted(Path(folder).glob("answers-*.jsonl")):
        for number, text in enumerate(file.read_bytes().split(b"\n")[:-1], 1):  # the last is empty, or cut off by a kill
            if not text.strip():
                continue
            try:
                content = parse_json(text)
                told = content.pop(SEAL, None)
                if told != seal_of(content):
                    raise ValueError("it does not match its hash" if told else "it has no hash, so perhaps an older version wrote this file")
                line = Line(**content)
            except (ValueError, TypeError, AttributeError) as error:
                raise ValueError(f"{file} line {number} is damaged ({error}): delete that line, and what it told is asked again") from None
            there = found.setdefault(line[:3], {})
            if there.keys().isdisjoint(line.examples):  # else two runs at once wrote here
                there.update(dict.fromkeys(line.examples, line))
    return found


def written(line):
    """A Line as the bytes of one of the file, with a hash of its own."""
    return (json.dumps(sealed(line._asdict())) + "\n").encode()


def by_length(examples, batch):
    """Indices of the examples in batches of similar length, so that there is little padding."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].ids))
    return [order[start:start + batch] for start in range(0, len(order), batch)]


def unanswered(examples, methods, batch, there):
    """
    Batches with something missing: (label, task, indices, {method: those that are not `there`}). Who shares a batch follows
    from the examples and --batch alone, not from where a run was stopped, nor from the ranks.
    """
    for label, by_task in examples.items():
        for task, of_task in by_task.items():
            for rows in by_length(of_task, batch):
                missing = {name: [i for i in rows if i not in there.get((label, task, name), ())] for name in methods}
                if any(missing.values()):
                    yield label, task, rows, {name: indices for name, indices in missing.items() if indices}


def hash_of(files):
    """Of names and bytes. Not of dates, which a copy changes; 14 GB take some 10 s, but no time if the files tell a hash of their own."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {file.stat().st_size} ".encode())
        told = weights.told_hash(weights.opened(file)) if file.suffix == ".safetensors" else None
        if told:  # whoever loads the file asks whether it is true
            digest.update(told.encode())
            continue
        with open(file, "rb") as whole:
            while chunk := whole.read(2**24):
                digest.update(chunk)
    return digest.hexdigest()[:12]


def made_of(args, examples):
    """What prompts follow from besides the flags, each in words: why two runs with the same flags may ask different ones."""
    each = [of_task[0] for by_task in examples.values() for of_task in by_task.values()]
    return {"--words": args.words, "words of keys": sorted({e.keys_from for e in each}), "haystacks": sorted({e.haystack_from for e in each}),
            "Python": platform.python_version()}


def cause(before, now):
    """In words: what differs between two of made_of, and what to do about it. before: None in the folders of older versions."""
    if before is None:
        return ("an older version asked them, which took the words of wonderwords wherever that was installed: try --words=wonderwords; or "
                "Python's help pages, the haystack, are of another Python")
    differ = [f"{name} was {before.get(name)}, now {value}" for name, value in now.items() if before.get(name) != value]
    return "; ".join(differ) or "all that they are made of is the same, so the code that makes them is not: take the commit in asked.json"


def refuse_others(args, labels, tokenizers, examples, prompt_hash, call):
    """
    ValueError if --out holds answers to other questions, or of other models. More methods are no other question. call: what is
    running, kept beside those that made the answers there. prompt_hash: niah's.
    """
    now = {"--ckpt": list(labels), "--tasks": list(next(iter(examples.values()))), "--tokenizer": [t.name for t in tokenizers.values()]}
    now |= {f"--{name}": getattr(args, name) for name in ("samples", "seed", "context_len", "max_new_tokens", "protocol", "haystack",
                                                         "jsonl", "dtype", "kernels")}
    prompts = {}
    for label, path in labels.items():
        path = weights.resolve(path)
        files = sorted([path / "config.json", *path.glob("model*")]) if path.is_dir() else [path]
        now[f"--ckpt {label} (a hash of its files)"] = hash_of(files)
        prompts |= {f"what is asked in {task} (a hash of {label}'s prompts)": prompt_hash(e) for task, e in examples[label].items()}
    made, file = made_of(args, examples), Path(args.out) / "asked.json"

    def refuse(name, was, value, why=""):
        raise ValueError(f"{args.out} holds answers of another run: {name} was {was}, now {value}{why}. Choose another --out, or move that one away")
    before = load(file, "calls") if any(there.stat().st_size for there in file.parent.glob("answers-*.jsonl")) else now | prompts | {"calls": []}
    for name, value in now.items():
        if real(name, before.get(name)) != real(name, value):
            refuse(name, before.get(name), value)
    for name, value in prompts.items():
        if before.get(name) != value:
            refuse(name, before.get(name), value, f" ({cause(before.get('made_of'), made)})")
    save(now | prompts | {"made_of": made, "calls": before["calls"] + [call] * (call not in before["calls"][-1:])}, file)


def real(name, value):
    """A setting that compares: files by where they are, however their paths are spelled."""
    if name == "--haystack" and value:
        return os.path.realpath(value)
    return [os.path.realpath(path) for path in value] if name == "--jsonl" and value else value


class Ranks:
    """The processes that torchrun started, one for each GPU, which meet in its key-value store; without it, one."""

    def __init__(self):
        alone = os.environ.get("WORLD_SIZE", "1") == "1"
        self.store, self.rank, self.n = (dist.HashStore(), 0, 1) if alone else next(dist.rendezvous("env://"))

    def meet(self, place, word=""):
        """Wait until all are there. -> the words of all, by rank. If one fails, torchrun ends the others."""
        self.store.set(f"{place} {self.rank}", word)
        while not self.store.check([f"{place} {rank}" for rank in range(self.n)]):
            time.sleep(0.1)  # not in the store, where ctrl-C is not heard
        return [self.store.get(f"{place} {rank}").decode() for rank in range(self.n)]
