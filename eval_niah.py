"""
Needles found under each sparse method: the paper's tables, its figure, and its two hypotheses.

    for each checkpoint, task and method:   prompt -> prefill -> greedy answer -> two scores, and what was read

One prefill serves all methods that prefill alike (dense, Quest, SnapKV), through cache.fork(). What a method reads is
counted while it answers, in tokens per query, KV head and layer, and asserted against its budget: a method that is
silently off ends the run. Three results (arXiv 2605.28640):
    tables 3 and 4   accuracy by backbone, method and budget, as a table, JSON and a plot
    H1, --hits       does the method select the answer's place?   share of answers, for each head
    H2, --random     does it matter what is selected?             the same methods with scores drawn by chance

Two scores, both in percent (niah.py): "ruler", the share of answers that occur in what the model wrote, and "paper",
exact pieces between commas. Intervals are Wilson's at 95 %, of a proportion: for tasks of several answers, whose scores
vary less than a coin's, a little too wide. Checked in tests/test_eval_niah.py. Read sample.py for the whole in 60 lines.
"""
import argparse
import json
import math
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

import backend
import niah
import sparse
import weights
from data import tokenizer_of
from model import Transformer

BUDGETS = "1/4", "1/8", "1/16"
SHIPPED = [Path(__file__).parent / "checkpoints" / name for name in ("attention", "memory")]
METHODS = [f"{label}:budget={budget}" for label in ("quest", "moba", "snapkv") for budget in BUDGETS]


# ---------------------------------------------------------------- answers

@dataclass
class Outcome:
    """What one method made of the examples, in their order. Reads are entries per token, mean of KV heads and layers."""
    texts: list            # predictions
    read: list             # by a token of the answer, in decoding; None where the prefill gave the end at once
    prompt_read: list      # by a token of the prompt, in prefill; None if the method does not tell
    seconds: float = 0.0   # prefill and decoding; a prefill counts for each method that it serves


class Meter:
    """A method as it is, which notes how many entries each decoding step reads in each layer."""

    def __init__(self, method):
        self.prefill, self.compress, self.method = method.prefill, method.compress, method
        self.compress_by = phases(method).compress_by  # whose window the cache must hold
        self.mean, self.most = [], []  # over KV heads: (B,) per layer and step

    def decode(self, q, cache):
        y, selected = self.method.decode(q, cache)
        read = cache.used[:, None] if selected is None else (selected >= 0).sum(-1)  # (B, 1 or KV)
        self.mean.append(read.float().mean(1))
        self.most.append(read.amax(1))
        return y, selected


def phases(method):
    """The method as sparse.Compose: which part of it decides prefill, compress and decode."""
    return method if isinstance(method, sparse.Compose) else sparse.compose(method)


def padded(rows, device):
    """Lists of ids -> tokens (B, T), padded on the right, and lengths (B,)."""
    tokens = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    return tokens.to(device), torch.tensor([len(row) for row in rows], device=device)


def prefill(model, examples, method, max_new_tokens, window=64):
    """-> the examples' cache, logits (B, V) of the first new token, lengths (B,)"""
    tokens, lengths = padded([e.ids for e in examples], model.embed_tokens.weight.device)
    cache = model.new_cache(len(examples), tokens.shape[1] + max_new_tokens, window)
    return cache, model.prefill(tokens, lengths, cache, method), lengths


def by_length(examples, batch):
    """Indices of the examples in batches of similar length, so that there is little padding."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].ids))
    return [order[start:start + batch] for start in range(0, len(order), batch)]


def evaluate(model, tokenizer, examples, methods, batch=16, progress=None):
    """
    Greedy answers to the examples (of niah.py) under each method: {method: Outcome}.

    batch: examples at a time. progress: called with the number of answers just finished.
    """
    outcomes = {method: Outcome(*([None] * len(examples) for _ in range(3))) for method in methods}
    groups = {}  # by what decides the prefill
    for method in outcomes:
        groups.setdefault(phases(method).prefill_by, []).append(method)
    window = max([64] + [getattr(phases(method).compress_by, "window", 0) for method in methods])
    n_new, eos_id = examples[0].max_new_tokens, tokenizer.eos_id
    for rows in by_length(examples, batch):
        for prefill_by, group in groups.items():
            started = time.time()
            cache, logits, lengths = prefill(model, [examples[i] for i in rows], prefill_by, n_new, window)
            prompt_read = prompt_reads(cache, prefill_by, lengths)
            prefill_seconds = time.time() - started
            for method in group:
                started, outcome = time.time(), outcomes[method]
                meter, own = Meter(method), cache if method is group[-1] else cache.fork()
                new = model.decode(logits, own, n_new, meter, eos_id=eos_id).tolist()
                new = [row[:row.index(eos_id)] if eos_id in row else row for row in new]
                read = decode_reads(meter, own, [min(len(row), n_new - 1) for row in new])
                for b, i in enumerate(rows):
                    outcome.texts[i], outcome.read[i], outcome.prompt_read[i] = tokenizer.decode(new[b]), read[b], prompt_read[b]
                outcome.seconds += prefill_seconds + time.time() - started
                if progress:
                    progress(len(rows))
    return outcomes


def prompt_reads(cache, method, lengths):
    """Entries that a token of the prompt reads, mean of tokens, KV heads and layers: one per row, None: it does not tell."""
    if type(method) is sparse.Dense:
        return ((lengths + 1) / 2).tolist()  # each token all before it, and itself
    if cache.selected[0] is None:
        return [None] * len(lengths)
    total = 0
    for blocks in cache.selected:  # (B, KV, T, S)
        t = torch.arange(blocks.shape[2], device=blocks.device)
        # the own block is read up to the token itself
        read = (blocks >= 0).sum(-1) * method.block_size - (method.block_size - 1 - t % method.block_size)  # (B, KV, T)
        assert read.max() <= method.budget, f"{sparse.name(method)} read {read.max()} entries"
        total = total + (read.float().mean(1) * (t < lengths[:, None])).sum(1) / lengths
    return (total / len(cache.selected)).tolist()


def decode_reads(meter, cache, steps):
    """Entries read, mean of a row's own steps, KV heads and layers: one per row. steps: (B,), later ones wait for others."""
    taken = len(meter.mean) // len(cache.k)
    if taken == 0:
        return [None] * len(steps)
    parts, most = phases(meter.method), int(torch.stack(meter.most).max())
    if hasattr(parts.decode_by, "budget"):
        assert most <= parts.decode_by.budget, f"{sparse.name(meter.method)} read {most} entries in a step"
    if hasattr(parts.compress_by, "budget"):  # the tokens fed since come on top
        kept = int(cache.used.max()) - taken
        assert kept <= parts.compress_by.budget, f"{sparse.name(meter.method)} kept {kept} entries of the prompt"
    mean = torch.stack(meter.mean).view(taken, -1, len(steps)).mean(1)  # (taken, B)
    return [float(mean[:n, b].mean()) if n else None for b, n in enumerate(steps)]


# ---------------------------------------------------------------- scores

def interval(values):
    """Mean of values in 0..1 and Wilson's 95 % interval, in percent: never of width 0, unlike mean +- 1.96 std errors."""
    n, z = len(values), 1.96
    p = sum(values) / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [round(100 * x, 2) for x in (p, (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n))]


def scores(predictions, examples):
    """{"ruler": [mean, low, high], "paper": the same}, in percent."""
    kinds = {"ruler": niah.score_ruler, "paper": niah.score_paper}
    return {name: interval([score(text, e.answers) for text, e in zip(predictions, examples, strict=True)])
            for name, score in kinds.items()}


def mean(values):
    """Of those that are not None; None if there is none."""
    values = [x for x in values if x is not None]
    return statistics.fmean(values) if values else None


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
    low: int     # positions low to high - 1 of the prompt hold the token's characters: nearly always one position
    high: int


def sources(example, tokenizer):
    """The gold answer's tokens, and for each its Source; None if it is no answer's (a comma, a space)."""
    target = niah.target_ids(example.prompt, example.target, tokenizer)
    characters = lambda ids: [len(tokenizer.decode(ids[:n])) for n in range(len(ids) + 1)]  # before each token, and in all
    text, ends, at, found = tokenizer.decode(target), characters(target), 0, [None] * len(target)
    for number, (answer, (start, end)) in enumerate(zip(example.answers, example.spans)):
        at = text.index(answer, at)
        value = example.ids[start:end]  # in the needle, where it may be cut into other tokens, or share one with its neighbours
        shift, value_ends = tokenizer.decode(value).index(answer) - at, characters(value)
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
        slot = torch.arange(cache.max_len, device=low.device)
        positions = cache.positions[layer].transpose(1, 2).masked_fill(slot >= cache.used[:, None, None], -1)
    return ((positions >= low[:, None, None]) & (positions < high[:, None, None])).any(-1)


@torch.no_grad()
def hits(model, tokenizer, examples, method, batch=16, progress=None):
    """
    H1, teacher-forced: the share of answers, (layers, KV), that each head hits. A head hits an answer if at every step
    at which one of its tokens is written, what the head selected contains that token's position in the prompt.

    Feeding token j of the gold answer is the step that writes token j + 1. Token 0 follows from the prefill, which
    selects nothing (Quest, SnapKV), and does not count.
    """
    n_hits, n_answers = torch.zeros(model.config.n_layer, model.config.n_kv_head), 0
    for rows in by_length(examples, batch):
        gold = [sources(examples[i], tokenizer) for i in rows]
        target, _ = padded([ids for ids, _ in gold], model.embed_tokens.weight.device)  # (B, M)
        window = getattr(phases(method).compress_by, "window", 64)
        cache, _, _ = prefill(model, [examples[i] for i in rows], phases(method).prefill_by, target.shape[1], window)
        hit = {}  # (row, answer): (layers, KV)
        for j in range(1, target.shape[1]):
            model.hidden(target[:, j - 1:j], cache=cache, sparse=method)
            source = [found[j] if j < len(found) else None for _, found in gold]
            low, high = (torch.tensor([getattr(s, end) if s else -1 for s in source], device=target.device)
                         for end in ("low", "high"))
            read = torch.stack([was_read(cache, i, low, high) for i in range(len(cache.k))]).cpu()  # (layers, B, KV)
            for b, s in enumerate(source):
                if s:
                    hit[b, s.answer] = hit.get((b, s.answer), True) & read[:, b]
        n_hits, n_answers = n_hits + sum(x.float() for x in hit.values()), n_answers + len(hit)
        if progress:
            progress(len(rows))
    return n_hits / n_answers


def best_heads(rates):
    """Mean of the best 5 % of hit rates (layers, KV): the paper's top 50 of 1,024."""
    return float(rates.flatten().topk(max(1, round(0.05 * rates.numel()))).values.mean())


# ---------------------------------------------------------------- tables and plot

def mean_of_tasks(rows, score):
    """Mean over tasks of result rows, and half its 95 % interval."""
    halves = [(row[score][2] - row[score][1]) / 2 for row in rows]
    return sum(row[score][0] for row in rows) / len(rows), math.sqrt(sum(h * h for h in halves)) / len(rows)


def lookup(results):
    """{(checkpoint, method): its rows, one per task}, without the random ones."""
    found = {}
    for row in results:
        if row["random"] is None:
            found.setdefault((row["checkpoint"], row["method"]), []).append(row)
    return found


def table(results):
    """The paper's Table 3 as text, beside it entries read and H1's hits; below, how later checkpoints differ from the first."""
    found = lookup(results)
    left, right = max(len(c) for c, _ in found) + 3, max(len(m) for _, m in found)
    line = lambda checkpoint, method, cells, end: f"{checkpoint:{left}}{method:{right}}" + "".join(f"{c:>7}" for c in cells) + end
    number = lambda x: "-" if x is None else f"{x:.1f}"
    tasks = [niah.TASKS[row["task"]].short for row in next(iter(found.values()))]
    above = f"{'RULER score, %':>{7 * len(tasks) + 14}}{'paper':>7}{'read by a token of':>20}{'H1: best':>10}"
    lines = [" " * (left + right) + above,
             line("", "", tasks, f"{'mean':>14}{'mean':>7}{'prompt':>11}{'answer':>9}{'heads, %':>10}")]
    for (checkpoint, method), rows in found.items():
        (ruler, half), (paper, _) = mean_of_tasks(rows, "ruler"), mean_of_tasks(rows, "paper")
        best = 100 * best_heads(torch.tensor([row["hits"] for row in rows]).mean(0)) if rows[0]["hits"] else None
        prompt_read, read = mean(row["prompt_read"] for row in rows), mean(row["read"] for row in rows)
        lines.append(line(checkpoint, method, [f"{row['ruler'][0]:.1f}" for row in rows],
                          f"{ruler:8.1f} ±{half:4.1f}{paper:7.1f}{number(prompt_read):>11}{number(read):>9}{number(best):>10}"))
    first, *others = dict.fromkeys(checkpoint for checkpoint, _ in found)
    for other in others:
        lines.append(f"\n{other} - {first}")
        for method in (method for checkpoint, method in found if checkpoint == other):
            a, b = found[first, method], found[other, method]
            (mean_a, half_a), (mean_b, half_b) = mean_of_tasks(a, "ruler"), mean_of_tasks(b, "ruler")
            lines.append(line("", method, [f"{y['ruler'][0] - x['ruler'][0]:+.1f}" for x, y in zip(a, b)],
                              f"{mean_b - mean_a:+8.1f} ±{math.hypot(half_a, half_b):4.1f}"))
    return "\n".join(lines)


def table_random(results):
    lines = ["H2: scores drawn by chance, RULER's score, %: mean and standard deviation over seeds"]
    found = {}
    for row in results:
        if row["random"] is not None:
            found.setdefault((row["checkpoint"], row["method"]), {}).setdefault(row["task"], []).append(row["ruler"][0])
    for (checkpoint, method), by_task in found.items():
        cells = [f"{niah.TASKS[task].short} {statistics.mean(x):.1f} ±{statistics.pstdev(x):.1f}" for task, x in by_task.items()]
        lines.append(f"{checkpoint}   {method}   " + "  ".join(cells))
    return "\n".join(lines)


def plot(results, path):
    """The paper's Figure 1, accuracy by budget for each method; below, accuracy by needle depth at the least budget."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: pip install matplotlib")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    found = lookup(results)
    kinds = {}  # a method but for its budget: {budget: method}
    for (_, method), rows in found.items():
        if rows[0]["budget"]:
            kind = re.sub("budget=[^,]*,?", "", method).rstrip(",:")
            kinds.setdefault(kind, {})[rows[0]["budget"]] = method
    if not kinds:
        return
    figure, axes = plt.subplots(2, len(kinds), figsize=(4 * len(kinds), 6.5), sharey=True, squeeze=False)

    def depths(rows):  # -> percent found in each tenth of the prompt, over all tasks
        tenths = [[cell for cell in cells if cell[0]] for cells in zip(*(row["by_depth"] for row in rows))]
        return [sum(n * p for n, p in cells) / sum(n for n, _ in cells) if cells else math.nan for cells in tenths]

    for (kind, methods), (above, below) in zip(kinds.items(), axes.T):
        budgets = sorted(methods)
        for i, checkpoint in enumerate(dict.fromkeys(checkpoint for checkpoint, _ in found)):
            dense, least, color = found[checkpoint, "dense"], found[checkpoint, methods[budgets[0]]], f"C{i}"
            means, halves = zip(*(mean_of_tasks(found[checkpoint, methods[budget]], "ruler") for budget in budgets))
            above.errorbar(budgets, means, halves, marker="o", capsize=3, color=color, label=checkpoint)
            above.axhline(mean_of_tasks(dense, "ruler")[0], color=color, linestyle="--", linewidth=1)
            below.plot(range(5, 100, 10), depths(least), marker="o", color=color)
            below.plot(range(5, 100, 10), depths(dense), color=color, linestyle="--", linewidth=1)
        above.set(title=kind, xlabel="budget, tokens", xscale="log", ylim=(-3, 103))
        above.set_xticks(budgets, budgets)
        above.minorticks_off()
        below.set(title=methods[budgets[0]], xlabel="depth of the needle, %")
    axes[0, 0].set_ylabel("RULER's score, mean of tasks, %")
    axes[1, 0].set_ylabel("answers found, %")
    axes[0, 0].legend(title="dense: dashed")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    print(f"plot in {path}")


# ---------------------------------------------------------------- what to evaluate

def sized(text, context_len, tokenizer):
    """
    A method's text, with what suits the context and the tokens added where it has none of its own.

    block_size (Quest, MoBA) and window (SnapKV): 1/64 of the context but 8 to 64. The paper's 4096 gives its 64; from 512
    on a budget of 1/16 holds four blocks. SnapKV's kernel: the paper's 5, for a model of bytes 15, about as much text.
    """
    size, parts = min(64, max(8, context_len // 64)), []
    for part in text.split("+"):
        label, _, settings = part.partition(":")
        defaults = {"quest": {"block_size": size}, "moba": {"block_size": size}, "snapkv": {"window": size}}.get(label, {})
        if label == "snapkv" and tokenizer.name == "bytes":
            defaults["kernel"] = 15
        added = [f"{key}={value}" for key, value in defaults.items() if f"{key}=" not in settings]
        parts.append(f"{label}:" + ",".join(filter(None, [settings, *added])) if added else part)
    return "+".join(parts)


def training_record(path):
    """What train.py wrote beside the model of its making (train.record_of), None if there is no such file."""
    file = weights.resolve(path) / "train.json"
    return load(file, "settings") if file.exists() else None


def trained_with(path):
    """The flags of train.py that made the model, {} if it is not of ours."""
    record = training_record(path)
    return record["settings"] if record else {}


def known_models(folder="out"):
    """The two checkpoints that come with the code, and the newest run of train.py if it does the same task."""
    def task(path):
        settings, flags = weights.read(path)[0], trained_with(path)
        return settings["context_len"], settings["vocab_size"], flags.get("protocol"), flags.get("tokenizer")
    made = {run: weights.resolve(run) / "train.json" for run in Path(folder).glob("*") if any(run.glob("step_*/config.json"))}
    newest = sorted(made, key=lambda run: made[run].stat().st_mtime)[-1:]
    return [Path(os.path.relpath(path)) for path in SHIPPED] + [run for run in newest if task(run) == task(SHIPPED[0])]


def commit():
    """The commit of this code, "+dirty" if its files differ from it."""
    git = lambda *words: subprocess.run(["git", "-C", Path(__file__).parent, *words], capture_output=True, text=True,
                                        check=True).stdout.strip()
    try:
        return git("rev-parse", "HEAD") + ("+dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def command_line(argv, script):
    """What is running, as a command: argv are flags with which Python called our script, None: the shell called some script."""
    if argv is None:
        path, root = Path(sys.argv[0]).resolve(), Path(__file__).resolve().parent
        script, argv = path.relative_to(root) if path.is_relative_to(root) else path.name, sys.argv[1:]
    return shlex.join(["python", str(script), *argv])


def device_name(device):
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}), {torch.get_num_threads()} threads"


class Progress:
    """A line with the time left: the same one again on a terminal, elsewhere a new one every half minute."""

    def __init__(self, total):
        self.total, self.done, self.started, self.shown = total, 0, time.time(), time.time()

    def __call__(self, n):
        self.done += n
        now, again = time.time(), sys.stdout.isatty()
        if now - self.shown > (0.5 if again else 30):
            left = (now - self.started) / self.done * (self.total - self.done)
            print(f"{self.done} of {self.total} answers, {left / 60:.1f} min left", end="  \r" if again else "\n", flush=True)
            self.shown = now


def positive(text):
    """A flag's whole number, at least 1."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def natural(text):
    """A flag's whole number, at least 0."""
    if int(text) < 0:
        raise ValueError
    return int(text)


def usable_device(text):
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{text}: {str(error).splitlines()[0]}") from None
    return text


def flags():
    parser = argparse.ArgumentParser(description="Accuracy of sparse methods on RULER's needle tasks; with no flags, of the "
                                     "checkpoints that come with the code.", allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"eval_niah.py: {message}\n")
    add = parser.add_argument
    # what
    add("--ckpt", nargs="+", metavar="PATH", help="models that Transformer.from_pretrained loads, or runs of train.py; "
        "None: the two that come with the code, and beside them the newest run in out/ if it does the same task")
    add("--methods", nargs="+", default=METHODS, metavar="METHOD", help="for sparse.parse, e.g. moba:budget=1/8+snapkv:"
        "budget=1/4; budgets in tokens or of --context_len; block_size and window default to 1/64 of it, 8 to 64, and kernel to 5 or, for "
        "a model of bytes, 15; dense is always added")
    add("--tasks", nargs="+", choices=niah.TASKS, metavar="TASK", help=f"{', '.join(niah.TASKS)}; None: those the first model was trained on, or that fit")
    add("--samples", type=positive, help="examples per task; the paper has 500; None: 200 with a GPU, else 8192 tokens' worth")
    add("--context_len", type=positive, metavar="TOKENS", help="prompt and answer together; None: the first model's")
    add("--max_new_tokens", type=positive, metavar="TOKENS", help="room for the answer; None: 128 from 2048 on, 48 below and for bytes")
    add("--protocol", choices=niah.PROTOCOLS, metavar="PROTOCOL", help="base (RULER's answer prefix) or sft (the question alone, "
        "for fine-tuned models); None: what the first model was trained on, else base")
    add("--haystack", metavar="FILE", help="text of the essays; None: Python's help pages")
    add("--jsonl", nargs="+", metavar="FILE", help="data files of RULER's own, TASK.jsonl or TASK/validation.jsonl, instead of "
        "generated examples: --tasks, --seed and --haystack then mean nothing")
    add("--seed", type=int, default=0, help="of the examples")
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
    add("--out", metavar="DIR", help="folder of the predictions; None: a new one, out/niah-DATE-TIME")
    add("--json", metavar="FILE", help="all results; None: results.json in --out. The plot goes beside it")
    return parser


def prepare(args):
    """Fill in what was not given, from the models. -> {label: path}, {label: tokenizer}, {method: text}"""
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    args.ckpt = [str(path) for path in args.ckpt or known_models()]
    args.protocol = args.protocol or trained_with(args.ckpt[0]).get("protocol", "base")
    settings = {path: weights.read(path)[0] for path in args.ckpt}  # all, so that a wrong path is known now
    names = [Path(path).absolute().name for path in settings]
    labels = {path if names.count(name) > 1 else name: path for path, name in zip(settings, names)}
    tokenizers = {label: tokenizer_of(weights.resolve(path), settings[path]["vocab_size"], args.tokenizer) for label, path in labels.items()}
    tokenizer = next(iter(tokenizers.values()))
    args.context_len = args.context_len or settings[args.ckpt[0]]["context_len"]
    args.max_new_tokens = args.max_new_tokens or niah.default_new_tokens(args.context_len, tokenizer)
    args.samples = args.samples or (200 if args.device.startswith("cuda") else max(2, 8192 // args.context_len))
    args.out = args.out or time.strftime("out/niah-%Y%m%d-%H%M%S")
    args.json = args.json or str(Path(args.out) / "results.json")
    args.methods = list(dict.fromkeys(["dense", *(sized(text, args.context_len, tokenizer) for text in args.methods)]))
    methods = {sparse.parse(text, args.context_len): text for text in args.methods}
    return labels, tokenizers, methods


def choose_tasks(args, tokenizers):
    """--tasks, else those that train.py trained the first model on, else those that fit in the tokens of every model."""
    args.tasks = args.tasks or trained_with(args.ckpt[0]).get("tasks")
    fitting = [niah.fitting_tasks(args.context_len, tokenizer, args.protocol, args.max_new_tokens) for tokenizer in tokenizers]
    tasks = args.tasks or [task for task in niah.TASKS if all(task in those for those in fitting)]
    if not tasks:
        raise ValueError(f"no task fits into --context_len {args.context_len} with {args.max_new_tokens} new tokens: raise it")
    return tasks


def make_examples(args, tokenizer, tasks):
    """{task: examples}"""
    haystack = Path(args.haystack).read_text(encoding="utf-8") if args.haystack else None
    return {task: [niah.make_example(task, args.context_len, tokenizer, args.seed, index, args.protocol, haystack,
                                     max_new_tokens=args.max_new_tokens) for index in range(args.samples)] for task in tasks}


def read_examples(args, tokenizer):
    """{task: examples} of RULER's own files."""
    found = {}
    for file in args.jsonl:
        examples = niah.read_jsonl(file, tokenizer, args.protocol, max_new_tokens=args.max_new_tokens)[:args.samples]
        if not examples or examples[0].task not in niah.TASKS:
            raise ValueError(f"{file} has no examples of a task we know: call it TASK.jsonl or TASK/validation.jsonl")
        found[examples[0].task] = examples
    return found


# ---------------------------------------------------------------- python eval_niah.py

def run(args):
    backend.use(args.kernels)
    labels, tokenizers, methods = prepare(args)
    asked = [m for m in methods if getattr(m, "budget", 0) * 4 == args.context_len] if args.random else []
    if args.random and not asked:
        raise ValueError(f"--random: none of the methods has a budget of 1/4, {args.context_len / 4:g} tokens")
    by_chance = {sparse.randomized(m, seed): m for m in asked for seed in range(args.random)}
    dense = sparse.Dense()
    selecting = [m for m in methods if args.hits and (phases(m).compress_by, phases(m).decode_by) != (dense, dense)]
    if args.jsonl:
        examples = {label: read_examples(args, tokenizer) for label, tokenizer in tokenizers.items()}
    else:
        tasks = choose_tasks(args, tokenizers.values())
        examples = {label: make_examples(args, tokenizer, tasks) for label, tokenizer in tokenizers.items()}
    n_prompts = sum(len(of_task) for by_task in examples.values() for of_task in by_task.values())
    n_methods = len(methods) + len(by_chance) + len(selecting)
    device = device_name(args.device)
    print(f"{', '.join(labels)}: {n_prompts} prompts of up to {args.context_len} tokens x {n_methods} methods = "
          f"{n_prompts * n_methods:,} answers of up to {args.max_new_tokens}; protocol {args.protocol}; {device}, {args.dtype}")
    print(" ".join(methods.values()), flush=True)

    results, progress = [], Progress(n_prompts * n_methods)
    report = {"command": command_line(args.argv, "eval_niah.py"), "commit": commit(), "device": device,
              "torch": torch.__version__, "settings": vars(args), "finished": False, "results": results}
    for label, path in labels.items():
        model, tokenizer = Transformer.from_pretrained(path, getattr(torch, args.dtype), args.device), tokenizers[label]
        for task, of_task in examples[label].items():
            rates = {m: hits(model, tokenizer, of_task, m, args.batch, progress).tolist() for m in selecting}
            outcomes = evaluate(model, tokenizer, of_task, [*methods, *by_chance], args.batch, progress)
            for method, outcome in outcomes.items():
                folder = Path(args.out) / label.replace("/", "_") / sparse.name(method).replace(":", "-")
                niah.write_predictions(folder, of_task, outcome.texts)
                read, prompt_read = mean(outcome.read), mean(outcome.prompt_read)
                share = lambda read: None if read is None else read / args.context_len
                results.append({
                    "checkpoint": label, "path": str(weights.resolve(path)), "tokenizer": tokenizer.name,
                    "method": methods[by_chance.get(method, method)], "random": getattr(method, "random", None),
                    "budget": getattr(method, "budget", None), "task": task, "n": len(of_task),
                    **scores(outcome.texts, of_task), "by_depth": by_depth(outcome.texts, of_task),
                    "read": read, "read_share": share(read), "prompt_read": prompt_read, "prompt_read_share": share(prompt_read),
                    "hits": rates.get(method), "seconds": outcome.seconds, "prompts": niah.prompt_hash(of_task),
                    "keys_from": of_task[0].keys_from, "haystack_from": of_task[0].haystack_from,
                    "predictions": str(folder / f"{task}.jsonl")})
            save(report, args.json)  # a run that is stopped keeps what it has
        del model  # room for the next
    report["finished"] = True
    save(report, args.json)

    print("\n" + table(results))
    if args.random:
        print("\n" + table_random(results))
    print(f"\nresults in {args.json}, predictions in {args.out}")
    plot(results, Path(args.json).with_suffix(".png"))


def save(report, path):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    weights.whole_or_nothing(path, lambda file: file.write_text(json.dumps(report, indent=1)))


def load(path, *fields):
    """What save wrote. ValueError, which names the file, if it has not all these fields, or is no JSON."""
    try:
        report = json.loads(Path(path).read_text())
        for field in fields:
            report[field]
        return report
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged, or not of ours ({type(error).__name__}: {error}): delete it") from None


def command(parser, run, argv, interrupted):
    """run(args); what a user can mend is one line and exit 2. interrupted: what ctrl-C says, with fields of args."""
    args = parser.parse_args(argv)
    args.argv = argv
    try:
        run(args)
    except torch.OutOfMemoryError:
        parser.error(f"the GPU has no room for --batch {args.batch}: lower it" if "batch" in args else "the GPU has no room for one prompt")
    except (ValueError, OSError, ImportError) as error:
        parser.error(error)
    except KeyboardInterrupt:
        parser.exit(130, "\n" + interrupted.format(**vars(args)) + "\n")


def main(argv=None):
    command(flags(), run, argv, "eval_niah.py: interrupted; the tasks that were finished, if any, are in {json}")


if __name__ == "__main__":
    main()
