"""
Needles found under each sparse method: the paper's tables, its figure, and its two hypotheses.

    for each checkpoint, task and method:   prompt -> prefill -> greedy answer -> two scores, and what was read

One prefill serves all methods that prefill alike (dense, Quest, SnapKV), one after the other, and one cache all batches.
What a method reads is counted while it answers, in tokens per query, KV head and layer, and asserted against its budget: a
method that is silently off ends the run. Three results (arXiv 2605.28640):
    tables 3 and 4   accuracy by backbone, method and budget, as a table, JSON and a plot
    H1, --hits       does the method select the answer's place?   share of answers, for each head
    H2, --random     does it matter what is selected?             the same methods with scores drawn by chance

Each batch's answers are kept at once (answers.py), and the report is read from there: a run that was stopped goes on with
the same command and --out, also with more methods. Under torchrun each GPU takes its share of the batches.

Two scores, both in percent (niah.py): "ruler", the share of answers that occur in what the model wrote, and "paper",
exact pieces between commas. Intervals are Wilson's at 95 %, of a proportion: for tasks of several answers, whose scores
vary less than a coin's, a little too wide. Differences of two models are paired by prompt. Both are of the prompts alone:
what another training would give, only seeds tell (reproduce.py). Budgets as fractions are of --context_len, and no prompt
may be longer. Checked in tests/test_eval_niah.py. Read sample.py for the whole in 60 lines.
"""
import json
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime
from itertools import accumulate, groupby
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from triton_ops import backend
import niah
import sparse
from infra import weights
from infra.cli import Progress, command, command_line, commit, device_name, flag_parser, natural, positive, seed, sized, usable_device  # noqa: F401
from infra.answers import Line, Ranks, by_length, read_lines, refuse_others, unanswered, written
from data import tokenizer_of
from infra.files import load, only_one, save, told_to_end
from infra.report import best_heads, interval, mean, plot, table, table_random  # noqa: F401
from infra.runlog import SHIPPED, known_models, trained_with, training_record  # noqa: F401
from model import Transformer

BUDGETS = "1/4", "1/8", "1/16"
METHODS = [f"{label}:budget={budget}" for label in ("quest", "moba", "snapkv") for budget in BUDGETS]


# ---------------------------------------------------------------- answers

class Told(NamedTuple):
    """One answer. Reads are entries per token, mean of KV heads and layers."""
    text: str
    read: float         # by a token of the answer, in decoding; None where the prefill gave the end at once
    prompt_read: float  # by a token of the prompt, in prefill; None if the method does not tell
    seconds: float      # of the batch, prefill and decoding, divided by its rows; a prefill counts for each method that it serves


@dataclass
class Outcome:
    """What one method made of the examples, in their order: lists as in Told, and the sum of seconds."""
    texts: list
    read: list
    prompt_read: list
    seconds: float = 0.0

    @classmethod
    def of(cls, told):
        *lists, seconds = map(list, zip(*told))
        return cls(*lists, sum(seconds))


class Reads:
    """How many entries each decoding step reads: to be called after each, as `watch` of model.decode."""

    def __init__(self):
        self.mean, self.most = [], []  # over layers and KV heads: (B,) per step

    def __call__(self, cache):
        dense = cache.used[:, None].expand(-1, cache.config.n_kv_head)  # (B, KV)
        read = [dense if selected is None else (selected >= 0).sum(-1) for selected in cache.selected]  # per layer (B, KV)
        read = torch.stack(read if any(x is not dense for x in read) else read[:1])
        self.mean.append(read.float().mean((0, 2)))
        self.most.append(read.amax((0, 2)))

    def of_rows(self, method, cache, steps):
        """The mean of each row's own first `steps` (B,): later ones wait for other rows. None where it took none."""
        if not self.mean:
            return [None] * len(steps)
        parts, most = sparse.phases(method), int(torch.stack(self.most).max())
        if hasattr(parts.decode_by, "budget"):
            assert most <= parts.decode_by.budget, f"{sparse.name(method)} read {most} entries in a step"
        if hasattr(parts.compress_by, "budget"):  # the tokens fed since come on top
            kept = max(used - n for used, n in zip(cache.used.tolist(), steps))
            assert kept <= parts.compress_by.budget, f"{sparse.name(method)} kept {kept} entries of the prompt"
        mean = torch.stack(self.mean).cpu()  # (steps, B)
        return [float(mean[:n, b].mean()) if n else None for b, n in enumerate(steps)]


class PromptReads:
    """How many entries a token of the prompt reads: `watch` of model.prefill, called for each layer and part of the batch."""

    def __init__(self, method):
        self.method, self.mean, self.most = method, {}, []

    def __call__(self, layer, blocks, real):
        if blocks is None or not hasattr(self.method, "block_size"):
            return
        t, size = torch.arange(blocks.shape[2], device=blocks.device), self.method.block_size  # blocks (B, KV, T, S)
        read = (blocks >= 0).sum(-1) * size - (size - 1 - t % size)  # (B, KV, T): the own block is read up to the token itself
        real = torch.ones_like(read[:, 0], dtype=torch.bool) if real is None else real
        self.mean.setdefault(layer, []).append((read.float().mean(1) * real).sum(1) / real.sum(1))
        self.most.append(read.max())

    def of_rows(self, lengths):
        """Mean of tokens, KV heads and layers, one per row; None: the method does not tell."""
        if type(self.method) is sparse.Dense:
            return ((lengths + 1) / 2).tolist()  # each token all before it, and itself
        if not self.mean:
            return [None] * len(lengths)
        most = int(torch.stack(self.most).max())
        assert most <= self.method.budget, f"{sparse.name(self.method)} read {most} entries"
        return torch.stack([torch.cat(parts) for parts in self.mean.values()]).mean(0).tolist()


def padded(rows, device):
    """Lists of ids -> tokens (B, T), padded on the right, and lengths (B,)."""
    tokens = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    return tokens.to(device), torch.tensor([len(row) for row in rows], device=device)


def prefill(model, examples, method, max_new_tokens, window=64, cache=None, watch=None):
    """
    -> the examples' cache, logits (B, V) of the first new token, lengths (B,)

    cache: of an earlier batch, which serves again, and its graphs with it, if this one has as many rows and fits; else it is
    emptied. watch: as in model.prefill.
    """
    tokens, lengths = padded([e.ids for e in examples], model.embed_tokens.weight.device)
    room = tokens.shape[1] + max_new_tokens
    if cache is not None and cache.B == len(examples) and cache.window == window and room <= cache.max_len < room + 512:
        cache.clear()
    else:
        if cache is not None:
            cache.empty()  # there may not be memory for both
        cache = model.new_cache(len(examples), room + -room % 256, window)
    return cache, model.prefill(tokens, lengths, cache, method, watch=watch), lengths


def answer(model, tokenizer, examples, methods, cache=None, selecting=()):
    """
    Greedy answers to the examples (of niah.py), one batch, under each method: {method: a Told for each example}. H1 of the
    methods `selecting`: {method: what `hits` says}. And the cache, for the next batch. Whatever prefills alike shares a prefill.
    """
    told, found, groups = {}, {}, {}  # groups: by what decides the prefill
    for method in dict.fromkeys([*methods, *selecting]):
        groups.setdefault(sparse.phases(method).prefill_by, []).append(method)
    gold = [sources(e, tokenizer) for e in examples] if selecting else []
    n_new, eos_id, window = examples[0].max_new_tokens, tokenizer.eos_id, sparse.window_of(*methods, *selecting)
    room = max([n_new, *(len(target) for target, _ in gold)])
    for prefill_by, group in groups.items():
        started, reads = time.time(), PromptReads(prefill_by)
        cache, logits, lengths = prefill(model, examples, prefill_by, room, window, cache, reads)
        prompt_read = reads.of_rows(lengths)
        prefill_seconds = time.time() - started
        for method in (m for m in group if m in methods):
            started, reads = time.time(), Reads()
            with cache.turn(method) as own:
                new = model.decode(logits, own, n_new, method, eos_id=eos_id, watch=reads).tolist()
                new = [row[:row.index(eos_id)] if eos_id in row else row for row in new]
                read = reads.of_rows(method, own, [min(len(row), n_new - 1) for row in new])
            seconds = (prefill_seconds + time.time() - started) / len(examples)
            told[method] = [Told(tokenizer.decode(row), *counts, seconds) for row, *counts in zip(new, read, prompt_read)]
        for method in (m for m in group if m in selecting):
            with cache.turn(method) as own:
                found[method] = hits(model, own, gold, method)
    return told, found, cache


def evaluate(model, tokenizer, examples, methods, batch=16, progress=None):
    """The answers to all examples, `batch` at a time: {method: Outcome}. progress: called with the number just finished."""
    told, cache = {method: [None] * len(examples) for method in methods}, None
    for rows in by_length(examples, batch):
        of_batch, _, cache = answer(model, tokenizer, [examples[i] for i in rows], methods, cache)
        for method, of_rows in of_batch.items():
            for i, of_row in zip(rows, of_rows):
                told[method][i] = of_row
        if progress:
            progress(len(rows) * len(told))
    return {method: Outcome.of(of_all) for method, of_all in told.items()}


# ---------------------------------------------------------------- scores

def ruler_scores(predictions, examples):
    """RULER's score of each, 0 to 1."""
    return [niah.score_ruler(text, e.answers) for text, e in zip(predictions, examples, strict=True)]


def scores(predictions, examples):
    """{"ruler": [mean, low, high], "paper": the same}, in percent."""
    kinds = {"ruler": niah.score_ruler, "paper": niah.score_paper}
    return {name: interval([score(text, e.answers) for text, e in zip(predictions, examples, strict=True)])
            for name, score in kinds.items()}


def by_depth(predictions, examples):
    """[answers, percent found] of each tenth of the prompt, by the needle's depth; percent None where there is none."""
    found = [[] for _ in range(10)]
    for text, e in zip(predictions, examples, strict=True):
        for answer, depth in zip(e.answers, e.depth):
            found[min(depth // 10, 9)].append(niah.score_ruler(text, [answer]))
    return [[len(tenth), 100 * mean(tenth) if tenth else None] for tenth in found]


# ---------------------------------------------------------------- H1: is the answer's place among the selected?

class Source(NamedTuple):
    """Where a token of an answer comes from."""
    answer: int  # which answer
    low: int     # positions low to high - 1 of the prompt hold the token's bytes: nearly always one position
    high: int


def sources(example, tokenizer):
    """The gold answer's tokens, and for each its Source; None if it is no answer's (a comma, a space)."""
    target = niah.target_ids(example.prompt, example.target, tokenizer)
    written, prompt = (niah.pieces(tokenizer, ids) for ids in (target, example.ids))  # bytes: a token may end inside a character
    text, ends, at, found = b"".join(written), [0, *accumulate(map(len, written))], 0, [None] * len(target)
    for number, (answer, (start, end)) in enumerate(zip(example.answers, example.spans)):
        answer, value = answer.encode(errors="replace"), prompt[start:end]  # in the needle, where it may be cut otherwise
        at, value_ends = text.index(answer, at), [0, *accumulate(map(len, value))]
        shift = b"".join(value).index(answer) - at
        for j in range(len(target)):
            low, high = max(ends[j], at), min(ends[j + 1], at + len(answer))
            if low < high:
                places = [i for i in range(len(value)) if value_ends[i] < high + shift and value_ends[i + 1] > low + shift]
                found[j] = Source(number, start + places[0], start + places[-1] + 1)
        at += len(answer)
    return target, found


def was_read(cache, layer, low, high):
    """Whether the last decoding step read any of the positions low to high - 1, both (B,). -> (B, KV)"""
    positions = cache.selected[layer]                                                      # (B, KV, S)
    if positions is None:  # all that SnapKV has left
        slot = torch.arange(cache.slots, device=low.device)
        positions = cache.positions[layer].transpose(1, 2).masked_fill(slot >= cache.used[:, None, None], -1)
    return ((positions >= low[:, None, None]) & (positions < high[:, None, None])).any(-1)


@torch.no_grad()
def hits(model, cache, gold, method):
    """
    H1, teacher-forced, of a batch whose prompts the cache holds; gold: `sources` of each. -> {answer: which heads hit it, bool
    (layers, KV)} for each row. A head hits an answer if at every step at which one of its tokens is written, what the head
    selected contains that token's position in the prompt.

    Feeding token j of the gold answer is the step that writes token j + 1. Token 0 follows from the prefill, which
    selects nothing (Quest, SnapKV), and does not count.
    """
    target, _ = padded([ids for ids, _ in gold], cache.used.device)  # (B, M)
    hit = [{} for _ in gold]
    for j in range(1, target.shape[1]):
        model.step(target[:, j - 1], cache, method)
        source = [found[j] if j < len(found) else None for _, found in gold]
        low, high = (torch.tensor([getattr(s, end) if s else -1 for s in source], device=target.device) for end in ("low", "high"))
        read = torch.stack([was_read(cache, i, low, high) for i in range(len(cache.k))]).cpu()  # (layers, B, KV)
        for b, s in enumerate(source):
            if s:
                hit[b][s.answer] = hit[b].get(s.answer, True) & read[:, b]
    return hit


# ---------------------------------------------------------------- what to evaluate

def flags():
    parser = flag_parser("eval_niah.py", "Accuracy of sparse methods on RULER's needle tasks; with no flags, of the "
                         "checkpoints that come with the code.")
    add = parser.add_argument
    # what
    add("--ckpt", nargs="+", metavar="PATH", help="models that Transformer.from_pretrained loads, or runs of train.py; "
        "None: the two that come with the code, and beside them the newest run in out/ if it does the same task")
    add("--methods", "--method", nargs="+", action="extend", metavar="METHOD", help="for sparse.parse, e.g. moba:budget=1/8+snapkv:"
        "budget=1/4; budgets in tokens or of --context_len; block_size and window default to 1/64 of it, 8 to 64, and kernel to 5 or, for "
        f"a model of bytes, 15; dense is always added; None: {' '.join(METHODS)}")
    add("--tasks", nargs="+", type=niah.task_name, metavar="TASK", help=", ".join(f"{name} or {task.short}" for name, task in niah.TASKS.items()) +
        "; None: those the first model was trained on, or that fit")
    add("--samples", type=positive, help="examples per task; the paper has 500; None: 200 with a GPU, else 8192 tokens' worth")
    add("--context_len", type=positive, metavar="TOKENS", help="prompt and answer together; None: the first model's")
    add("--max_new_tokens", type=positive, metavar="TOKENS", help="room for the answer; None: 128 from 2048 on, 48 below and for bytes")
    add("--protocol", choices=niah.PROTOCOLS, metavar="PROTOCOL", help="base (RULER's answer prefix) or sft (the question alone, "
        "for fine-tuned models); None: what the first model was trained on, else base")
    add("--haystack", metavar="FILE", help="text of the essays; None: Python's help pages")
    add("--jsonl", nargs="+", metavar="FILE", help="data files of RULER's own, TASK.jsonl or TASK/validation.jsonl, instead of "
        "generated examples: --tasks, --seed, --words and --haystack then mean nothing")
    add("--words", choices=niah.WORDS, default=niah.WORDS[0], help="of keys: built-in, or RULER's from the package wonderwords")
    add("--seed", type=seed, default=0, help="of the examples")
    add("--hits", action="store_true", help="H1: how often each head selects the answer's place")
    add("--random", type=positive, default=0, metavar="SEEDS", help="H2: how many times to draw the selection of methods of budget "
        "1/4 by chance")
    # how
    add("--batch", type=positive, default=16, help="prompts at a time")
    add("--device", type=usable_device, default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    add("--dtype", choices=["float32", "bfloat16"], help="of the model; None: bfloat16 on a GPU, else float32")
    backend.add_flag(parser)
    add("--tokenizer", metavar="SPEC", help="as in data.py; None: the one beside each model")
    # where to
    add("--out", metavar="DIR", help="folder of the answers, to go on with if it holds some; None: a new one, out/niah-DATE-TIME")
    add("--json", metavar="FILE", help="all results; None: results.json in --out. The plot goes beside it")
    return parser


def prepare(args):
    """Fill in what was not given, from the models. -> {label: path}, {label: tokenizer}, {method: text}"""
    args.out = args.out or datetime.now().strftime("out/niah-%Y%m%d-%H%M%S-%f")  # first: ctrl-C tells it
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    args.ckpt = [str(path) for path in args.ckpt or known_models()]
    args.protocol = args.protocol or trained_with(args.ckpt[0]).get("protocol", "base")
    settings = {path: weights.read(path, hashed=False)[0] for path in args.ckpt}  # all, so that a wrong path is known now
    names = [Path(os.path.abspath(path)).name for path in settings]
    labels = {path if names.count(name) > 1 else name: path for path, name in zip(settings, names)}
    tokenizers = {label: tokenizer_of(weights.resolve(path), settings[path]["vocab_size"], args.tokenizer) for label, path in labels.items()}
    tokenizer = next(iter(tokenizers.values()))
    args.context_len = args.context_len or settings[args.ckpt[0]]["context_len"]
    args.max_new_tokens = args.max_new_tokens or niah.default_new_tokens(args.context_len, tokenizer)
    args.samples = args.samples or (200 if args.device.startswith("cuda") else max(2, 8192 // args.context_len))
    args.json = args.json or str(Path(args.out) / "results.json")
    args.methods = list(dict.fromkeys(["dense", *(sized(text, args.context_len, tokenizer) for text in args.methods or METHODS)]))
    methods = {sparse.parse(text, args.context_len): text for text in args.methods}
    return labels, tokenizers, methods


def note_if_beyond(name, trained, asked):
    """One line, if a model is asked about more tokens than it has learned to look back."""
    if asked > trained:
        print(f"note: {name} was trained on contexts of {trained:,} tokens, and is asked about up to {asked:,}: where it fails, it "
              "need not be a method's fault", file=sys.stderr)


def roomy(tokens):
    """The next --context_len of which 1/16 is whole blocks (`sized`)."""
    step = 1024 if tokens > 1024 else 128
    return tokens + -tokens % step


def check_lengths(args, examples):
    """
    -> tokens of the shortest and the longest prompt. ValueError if one and its answer are more than --context_len: budgets, and
    the shares that a table tells, are fractions of it.
    """
    lengths = [len(e.ids) for by_task in examples.values() for of_task in by_task.values() for e in of_task]
    longest = max(lengths) + args.max_new_tokens
    if longest > args.context_len:
        raise ValueError(f"the longest prompt and its answer take {longest:,} tokens, more than --context_len {args.context_len}, of which "
                         f"budgets are fractions: give --context_len={roomy(longest)}, or shorter prompts")
    return min(lengths), max(lengths)


def tell_lengths(args, labels, longest):
    """A line for each model that is asked about more than it was trained on, and one if prompts are far shorter than --context_len."""
    for label, path in labels.items():
        note_if_beyond(label, weights.read(path, without_tensors=True)[0]["context_len"], longest + args.max_new_tokens)
    if longest + args.max_new_tokens < 0.75 * args.context_len:
        print(f"note: the longest prompt has {longest:,} tokens, and budgets are fractions of --context_len {args.context_len}: "
              f"--context_len={roomy(longest + args.max_new_tokens)} fits", file=sys.stderr)


def choose_tasks(args, tokenizers):
    """--tasks, else those that train.py trained the first model on, else those that fit in the tokens of every model."""
    args.tasks = args.tasks or trained_with(args.ckpt[0]).get("tasks")
    fitting = [niah.fitting_tasks(args.context_len, tokenizer, args.protocol, args.max_new_tokens, args.words) for tokenizer in tokenizers]
    tasks = args.tasks or [task for task in niah.TASKS if all(task in those for those in fitting)]
    if not tasks:
        raise ValueError(f"no task fits into --context_len {args.context_len} with {args.max_new_tokens} new tokens: raise it")
    return tasks


def make_examples(args, tokenizer, tasks):
    """{task: examples}"""
    haystack = niah.read_haystack(args.haystack) if args.haystack else None
    return {task: [niah.make_example(task, args.context_len, tokenizer, args.seed, index, args.protocol, haystack,
                                     max_new_tokens=args.max_new_tokens, words=args.words) for index in range(args.samples)] for task in tasks}


def read_examples(args, tokenizer):
    """{task: examples} of RULER's own files."""
    found = {}
    for file in args.jsonl:
        examples = niah.read_jsonl(file, tokenizer, args.protocol, max_new_tokens=args.max_new_tokens)[:args.samples]
        if not examples or examples[0].task not in niah.TASKS:
            raise ValueError(f"{file} has no examples of a task we know: call it TASK.jsonl or TASK/validation.jsonl")
        if examples[0].task in found:
            raise ValueError(f"--jsonl: {file} is a second file of {examples[0].task}; give one, or join them")
        found[examples[0].task] = examples
    return found


# ---------------------------------------------------------------- python eval_niah.py

def run(args):
    backend.use(args.kernels)
    ranks = Ranks()
    prepared = prepare(args)
    args.out = ranks.meet("prepared", args.out)[0]
    Path(args.out).mkdir(parents=True, exist_ok=True)
    with nullcontext() if ranks.rank else only_one(args.out):
        run_in(args, ranks, *prepared)


def run_in(args, ranks, labels, tokenizers, methods):
    """The evaluation as one of these processes, whose folder is ours alone."""
    asked = [m for m in methods if getattr(m, "budget", 0) * 4 == args.context_len] if args.random else []
    if args.random and not asked:
        raise ValueError(f"--random: none of the methods has a budget of 1/4, {args.context_len / 4:g} tokens")
    texts = methods | {sparse.randomized(m, seed): methods[m] for m in asked for seed in range(args.random)}
    dense = sparse.Dense()
    selecting = [m for m in methods if args.hits and (sparse.phases(m).compress_by, sparse.phases(m).decode_by) != (dense, dense)]
    by_name = {f"H1 {sparse.name(m)}": m for m in selecting} | {sparse.name(m): m for m in texts}
    different = {tokenizer.name: tokenizer for tokenizer in tokenizers.values()}
    if args.jsonl:
        made = {name: read_examples(args, tokenizer) for name, tokenizer in different.items()}
    else:
        tasks = choose_tasks(args, different.values())
        made = {name: make_examples(args, tokenizer, tasks) for name, tokenizer in different.items()}
    examples = {label: made[tokenizer.name] for label, tokenizer in tokenizers.items()}
    shortest, longest = check_lengths(args, examples)

    device = (f"{ranks.n} x " if ranks.n > 1 else "") + device_name(args.device)
    call = {"command": command_line(args.argv, "eval_niah.py"), "commit": commit(), "device": device, "torch": torch.__version__}
    if ranks.rank == 0:  # if it refuses, torchrun ends the others, which wait below
        refuse_others(args, labels, tokenizers, examples, niah.prompt_hash, call)
        tell_lengths(args, labels, longest)
    left = list(unanswered(examples, by_name, args.batch, read_lines(args.out)))
    ranks.meet("all have read what is there")  # before any writes
    mine, count = left[ranks.rank::ranks.n], lambda batches: sum(len(rows) for *_, missing in batches for rows in missing.values())
    n_prompts = sum(len(of_task) for by_task in examples.values() for of_task in by_task.values())
    total = n_prompts * len(by_name)
    if ranks.rank == 0:
        print(f"{', '.join(labels)}: {n_prompts} prompts of {shortest:,} to {longest:,} tokens x {len(by_name)} methods = {total:,} answers "
              f"of up to {args.max_new_tokens}, {total - count(left):,} of them in {args.out} already; context {args.context_len:,}, protocol "
              f"{args.protocol}; {device}, {args.dtype}")
        print(" ".join(methods.values()), flush=True)

    progress, loading, answering = Progress(total, total - count(left)), 0.0, 0.0  # seconds
    with open(Path(args.out) / f"answers-{ranks.rank}.jsonl", "ab") as file:
        file.truncate(Path(file.name).read_bytes().rfind(b"\n") + 1)  # off with what a kill has left of a line
        for label, batches in groupby(mine, lambda batch: batch[0]):
            started = time.time()
            model, cache = Transformer.from_pretrained(labels[label], getattr(torch, args.dtype), args.device), None
            loaded = time.time()
            for batch in batches:
                lines, cache = ask(model, tokenizers[label], examples, batch, by_name, args, cache)
                file.write(b"".join(map(written, lines)))
                file.flush()
                if ranks.rank == 0:
                    progress(count([batch]) * count(left) / count(mine))  # the others are taken to be as far
            del model, cache  # room for the next
            loading, answering = loading + loaded - started, answering + time.time() - loaded
    spent = zip(*map(json.loads, ranks.meet("all have written", json.dumps([answering, loading]))))
    if ranks.rank == 0:
        answering, loading = map(max, spent)  # the last to finish counts
        speed = {"answers": count(left), "seconds": round(answering, 2), "seconds_of_loading": round(loading, 2)}
        report(args, call | {"speed": speed}, labels, tokenizers, examples, texts)


def ask(model, tokenizer, examples, batch, by_name, args, cache):
    """-> the Lines that are missing of one batch of `unanswered`; and the cache, for the next"""
    (label, task, rows, missing), lines = batch, []
    # on a GPU all batches are of one size: the last example fills up a short one, and no one takes these answers
    size = min(args.batch, len(examples[label][task])) if args.device.startswith("cuda") else len(rows)
    asked = [examples[label][task][i] for i in rows + rows[-1:] * (size - len(rows))]
    methods = [by_name[name] for name in missing if not name.startswith("H1 ")]
    told, found, cache = answer(model, tokenizer, asked, methods, cache, [by_name[name] for name in missing if name.startswith("H1 ")])
    for method, of_rows in found.items():
        some = missing[f"H1 {sparse.name(method)}"]
        hit = [heads for i, of_row in zip(rows, of_rows) if i in some for heads in of_row.values()]  # (layers, KV) of each answer
        nothing = torch.zeros(model.config.n_layer, model.config.n_kv_head, dtype=torch.long)
        lines.append(Line(label, task, f"H1 {sparse.name(method)}", some, {"hits": sum(hit, nothing).tolist(), "answers": len(hit)}))
    for method, of_rows in told.items():
        # the time is the real rows'
        name, of_row = sparse.name(method), {i: told._replace(seconds=told.seconds * size / len(rows)) for i, told in zip(rows, of_rows)}
        lines += [Line(label, task, name, [i], of_row[i]._asdict()) for i in missing[name]]
    return lines, cache


def report(args, call, labels, tokenizers, examples, texts):
    """All answers -> predictions, results.json, tables and plot."""
    there, results, by_prompt = read_lines(args.out), [], {}
    for label, path in labels.items():
        for task, of_task in examples[label].items():
            for method, text in texts.items():
                name = sparse.name(method)
                outcome = Outcome.of([Told(**there[label, task, name][i].told) for i in range(len(of_task))])
                folder = Path(args.out) / label.replace("/", "_") / name.replace(":", "-")
                niah.write_predictions(folder, of_task, outcome.texts)
                if getattr(method, "random", None) is None:
                    by_prompt[label, text, task] = ruler_scores(outcome.texts, of_task)
                batches = [line.told for i, line in there.get((label, task, f"H1 {name}"), {}).items() if i == line.examples[0]]
                rates = sum(torch.tensor(b["hits"]) for b in batches) / sum(b["answers"] for b in batches) if args.hits and batches else None
                read, prompt_read = mean(outcome.read), mean(outcome.prompt_read)
                share = lambda read: None if read is None else read / args.context_len
                results.append({
                    "checkpoint": label, "path": str(weights.resolve(path)), "tokenizer": tokenizers[label].name,
                    "method": text, "random": getattr(method, "random", None),
                    "budget": getattr(method, "budget", None), "task": task, "n": len(of_task),
                    **scores(outcome.texts, of_task), "by_depth": by_depth(outcome.texts, of_task),
                    "read": read, "read_share": share(read), "prompt_read": prompt_read, "prompt_read_share": share(prompt_read),
                    "hits": None if rates is None else rates.tolist(), "seconds": outcome.seconds, "prompts": niah.prompt_hash(of_task),
                    "keys_from": of_task[0].keys_from, "haystack_from": of_task[0].haystack_from,
                    "predictions": str(folder / f"{task}.jsonl")})
    calls = load(Path(args.out) / "asked.json", "calls")["calls"]  # more than one if it was stopped, or methods were added
    save({**call, "calls": calls, "settings": vars(args), "finished": True, "results": results}, args.json)

    names = {task: kind.short for task, kind in niah.TASKS.items()}
    print("\n" + table(results, by_prompt, names))
    if args.random:
        print("\n" + table_random(results, names))
    speed = call["speed"]
    rate = f", {speed['answers'] / speed['seconds']:.3g} a second" if speed["seconds"] else ""
    print(f"\n{speed['answers']:,} answers in {speed['seconds']:.1f} s{rate}; loading took {speed['seconds_of_loading']:.1f} s")
    print(f"results in {args.json}, predictions in {args.out}")
    plot(results, Path(args.json).with_suffix(".png"))


def main(argv=None):
    args = flags().parse_args(argv)
    args.argv = argv
    command("eval_niah.py", lambda: run(args), args, "interrupted; what is answered is kept, and the same command with --out {out} goes on")


if __name__ == "__main__":
    told_to_end()
    main()
