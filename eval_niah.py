"""
Needles found under each sparse method: the paper's tables, its figure, and its two hypotheses.

    model x method x task -> prompts -> one prefill -> each method's turn -> answers -> scores

Three results (arXiv 2605.28640):
    tables 3 and 4   accuracy by backbone, method and budget, as a table, JSON and a plot
    H1, --hits       does the method select the answer's place? The share of answers, for each head
    H2, --random     does it matter what is selected? The same methods with scores drawn by chance

With --blind the question comes last: a method that drops entries chooses them from the context
alone, then the question is fed, and several questions of one document (--questions) share what was
kept. --tasks all asks RULER's other tasks too (experiments/tasks.py), beside the needle tasks'
mean.

Two protocols: "base" asks with RULER's answer prefix, "sft" with the question alone, for models
that were fine-tuned. Two scores, both in percent (niah.py): "ruler", the share of answers that
occur in what the model wrote, and "paper", exact pieces between commas. Intervals are Wilson's at
95 %, of a proportion: for tasks of several answers, whose scores vary less than a coin's, a little
too wide. They are of the prompts alone; what another training would give, only seeds tell
(experiments/reproduce.py).

A run that was stopped goes on with the same command and --out, also with more methods; --plot
draws again what results.json holds. Under torchrun each GPU takes its share of the batches. Checked
in tests/test_eval_niah.py and, by hand, tests/test_report_tables.py. Read niah.py first, data.py
next; sample.py asks a single prompt.
"""
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from itertools import chain, groupby, repeat
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

import niah
import sparse
from data import tokenizer_of
from experiments import tasks  # noqa: F401 (it fills niah.OTHERS)
from infra import weights
from infra.answers import (Answer, Outcome, Ranks, appending, hit_rates, read_lines,
                           refuse_other_questions, unanswered)
from infra.cli import (LONGEST, Progress, above_1, command, flag_parser, made_by, note_lengths,
                       positive, refuse_longer, seed, sized, usable_device)
from infra.conclusion import conclusion
from infra.files import load, save, told_to_end
from infra.parallel import is_first
from infra.reads import PromptReads, StepReads, places_of, was_read
from infra.plots import plot, read_results
from infra.report import by_tenth, interval, mean, table, table_random
from infra.runlog import known_models, trained_with
from model import Transformer
from triton_ops import backend

BUDGETS = "1/4", "1/8", "1/16"  # of --context_len, whatever the prompt's length
METHODS = [f"{kind}:budget={budget}" for kind in ("quest", "moba", "snapkv") for budget in BUDGETS]
# What a CPU asks if nobody says what: enough to tell the models in checkpoints/ apart, in about a
# minute each on two cores.
FIRST_LOOK = {
    "context_len": 2048, "tasks": ["niah_multikey_1", "niah_multikey_2", "niah_multivalue"],
    "samples": 16,
    "methods": ["quest:budget=1/8", "quest:budget=1/16", "moba:budget=1/8", "snapkv:budget=1/8"]}
TOKENS_A_MINUTE = 100_000  # of its prompts, under all of its methods


def names():
    """{task: its name in a table's head}, of all that are registered by now"""
    return {name: task.short for name, task in (niah.TASKS | niah.OTHERS).items()}


# ---------------------------------------------------------------- answers

def answer(model, tokenizer, examples, methods, cache=None, selecting=(), blind=False):
    """
    One batch of examples (of niah.py) under each method. Returns three:
    {method: an Answer for each example}; H1, {method: what `hits` says}, of the methods
    `selecting`; and the cache, to be passed on with the next batch.
    """
    n, answers, found = len(examples), {}, {}
    contexts, turns = rounds(examples) if blind else (examples, [(range(n), None)])
    gold = [sources(e, tokenizer) for e in examples] if selecting else []
    n_new, eos_id = examples[0].max_new_tokens, tokenizer.eos_id
    room = max([n_new, *(len(target) for target, _ in gold)])
    if blind:
        room += max(len(e.ids) - e.question_at for e in examples)
    window = sparse.window_of(*methods, *selecting)

    # What a method does in prefill decides with which others it can share one: dense, Quest and
    # SnapKV all read the prompt densely.
    alike = {}
    for method in dict.fromkeys([*methods, *selecting]):
        alike.setdefault(sparse.phases(method).prefill_by, []).append(method)

    for prefill_by, group in alike.items():
        started = time.time()
        reads = PromptReads(prefill_by, dense=prefill_by == sparse.Dense())
        cache, logits, lengths = prefill(model, contexts, prefill_by, room, window, cache, reads)
        prompt_read = reads.of_rows(lengths)
        prefill_seconds = time.time() - started

        for method in [m for m in group if m in methods]:
            started, answers[method] = time.time(), [None] * n
            for rows, questions in turns:
                with in_turn(model, cache, logits, questions, method) as (own, first, since):
                    reads = StepReads(sparse.phases(method), since)
                    new = model.decode(first, own, n_new, method, eos_id=eos_id, watch=reads)
                    new = [row[:row.index(eos_id)] if eos_id in row else row
                           for row in new.tolist()]
                    # The first token is the prefill's, each later one a step's, and so is the end.
                    # A method that reads more than its budget ends the run here.
                    read = reads.of_rows(own, [min(len(row), n_new - 1) for row in new])
                for i, row, *counts in zip(rows, new, read, prompt_read):
                    answers[method][i] = Answer(tokenizer.decode(row), *counts, seconds=0.0)
            seconds = (prefill_seconds + time.time() - started) / n
            answers[method] = [of_row._replace(seconds=seconds) for of_row in answers[method]]

        # H1 feeds the gold answer instead of the model's own.
        for method in [m for m in group if m in selecting]:
            found[method] = [None] * n
            for rows, questions in turns:
                with in_turn(model, cache, logits, questions, method) as (own, *_):
                    for i, hit in zip(rows, hits(model, own, [gold[i] for i in rows], method)):
                        found[method][i] = hit
    return answers, found, cache


def rounds(examples):
    """
    Examples that share a context, as --blind asks them: the contexts, an example of each without
    its question; and rounds, in each of which every context is asked one: which examples, and their
    questions' tokens.
    """
    rows = {}
    for i, e in enumerate(examples):
        if e.question_at is None:
            raise ValueError(f"--blind: nobody knows where the question of {e.task} {e.index} "
                             f"begins: it is not worded as RULER's is ({e.keys_from})")
        rows.setdefault(tuple(e.ids[:e.question_at]), []).append(i)
    contexts = [replace(examples[first], ids=[*ids]) for ids, (first, *_) in rows.items()]
    # A context with fewer questions than others is asked its last one again.
    turns = [[of_row[min(j, len(of_row) - 1)] for of_row in rows.values()]
             for j in range(max(map(len, rows.values())))]
    return contexts, [(turn, [examples[i].ids[examples[i].question_at:] for i in turn])
                      for turn in turns]


@contextmanager
def in_turn(model, cache, logits, questions, method):
    """
    A method's turn with a cache that holds prompts, or contexts and then the tokens of a question
    for each. -> the cache that it decodes from, logits (B, V) of the first new token, and how many
    tokens were fed since it dropped entries, an int or (B,)
    """
    # Each finds the cache as prefill left it: after its turn, what was fed is forgotten and what
    # was dropped is there again.
    with cache.turn(method) as own:
        if questions is None:
            yield own, logits, 0
        else:
            tokens, lengths = padded(questions, logits.device)
            yield own, model.prefill(tokens, lengths, own, method), lengths


def prefill(model, examples, method, max_new_tokens, window, cache=None, watch=None):
    """
    -> the examples' cache, logits (B, V) of the first new token, lengths (B,)

    cache: of an earlier batch, which serves again, and its graphs with it, if this one has as many
    rows and fits; else it is emptied. watch: as in model.prefill.
    """
    tokens, lengths = padded([e.ids for e in examples], model.embed_tokens.weight.device)
    # Sizes are whole 256s, so that batches of similar lengths share a cache, and on a GPU the
    # graphs that were recorded for it.
    room = tokens.shape[1] + max_new_tokens
    if (cache is not None and cache.B == len(examples) and cache.window == window
            and room <= cache.max_len < room + 512):
        cache.clear()
    else:
        if cache is not None:
            # there may not be memory for both
            cache.empty()
        cache = model.new_cache(len(examples), room + -room % 256, window)
    return cache, model.prefill(tokens, lengths, cache, method, watch=watch), lengths


def padded(rows, device):
    """Lists of ids -> tokens (B, T), padded on the right, and lengths (B,)."""
    tokens = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    return tokens.to(device), torch.tensor([len(row) for row in rows], device=device)


# ---------------------------------------------------------------- scores

def ruler_scores(texts, examples):
    """RULER's score of each, 0 to 1."""
    return [niah.score_ruler(text, e.answers, e.task)
            for text, e in zip(texts, examples, strict=True)]


def scores(texts, examples):
    """{"ruler": [mean, low, high], "paper": the same}, in percent."""
    paper = [niah.score_paper(text, e.answers) for text, e in zip(texts, examples, strict=True)]
    return {"ruler": interval(ruler_scores(texts, examples)), "paper": interval(paper)}


def by_depth(texts, examples):
    """[answers, percent found] of each tenth of the prompt, by the needle's depth."""
    return by_tenth([(depth, niah.score_ruler(text, [of_one]))
                     for text, e in zip(texts, examples, strict=True)
                     for of_one, depth in zip(e.answers, e.depth)])


# ---------------------------------------------------------------- H1: is the answer's place read?

def sources(example, tokenizer):
    """The gold answer's tokens, and for each the Source: which place of the prompt it copies."""
    target = niah.target_ids(example.prompt, example.target, tokenizer)
    written, prompt = (niah.pieces(tokenizer, ids) for ids in (target, example.ids))
    return target, places_of(written, prompt, example.answers, example.spans)


@torch.no_grad()
def hits(model, cache, gold, method):
    """
    H1, teacher-forced, of a batch whose prompts the cache holds; gold: `sources` of each.
    -> for each row, which heads hit which of its answers: bool (answers, layers, KV)

    A head hits an answer if at every step at which one of its tokens is written, what the head
    selected contains that token's position in the prompt.
    """
    target, _ = padded([ids for ids, _ in gold], cache.used.device)  # (B, M)
    layers, KV = model.config.n_layer, model.config.n_kv_head
    hit = [{} for _ in gold]  # {answer: (layers, KV)} of each row
    # Feeding token j - 1 is the step that writes token j. Token 0 does not count: it follows from
    # the prefill, which selects nothing (Quest, SnapKV).
    for j in range(1, target.shape[1]):
        model.step(target[:, j - 1], cache, method)
        # Rows that are done are fed on, and have no source; nor has a comma between two answers.
        # No position is -1, so there nothing is read.
        source = [found[j] if j < len(found) else None for _, found in gold]
        low = torch.tensor([s.low if s else -1 for s in source], device=target.device)
        high = torch.tensor([s.high if s else -1 for s in source], device=target.device)
        read = torch.stack([was_read(cache, i, low, high) for i in range(layers)]).cpu()
        for b, s in enumerate(source):
            if s:  # read is (layers, B, KV)
                hit[b][s.answer] = hit[b].get(s.answer, True) & read[:, b]
    nothing = torch.zeros(0, layers, KV, dtype=torch.bool)
    return [torch.stack([*of_row.values()]) if of_row else nothing for of_row in hit]


# ---------------------------------------------------------------- whom to ask what

def prepare(args):
    """Fill in what was not given. -> {label: path}, {label: tokenizer}, {method: text}"""
    on_gpu = args.device.startswith("cuda")
    # The folder first, as ctrl-C names it.
    args.out = args.out or datetime.now().strftime("out/niah-%Y%m%d-%H%M%S-%f")
    args.json = args.json or str(Path(args.out) / "results.json")
    args.dtype = args.dtype or ("bfloat16" if on_gpu else "float32")
    # No models or questions of one's own: what comes with the code, as the README shows it.
    shown = not (args.ckpt or args.jsonl or args.random)
    args.hits, args.first_look = args.hits or shown, shown and not on_gpu
    look = FIRST_LOOK if args.first_look else {}

    args.ckpt = [str(path) for path in args.ckpt or known_models()]
    args.protocol = args.protocol or trained_with(args.ckpt[0]).get("protocol", "base")
    # All models are looked at, so that a wrong path is known now and not after hours.
    settings = {path: weights.read(path, hashed=False)[0] for path in args.ckpt}
    for path, found in settings.items():
        if args.yarn and found.get("rope_scaling"):
            raise ValueError(f"--yarn: the RoPE of {path} is stretched already: leave it out")
    names = [Path(os.path.abspath(path)).name for path in settings]
    labels = {path if names.count(name) > 1 else name: path for path, name in zip(settings, names)}
    tokenizers = {label: tokenizer_of(weights.resolve(path), settings[path]["vocab_size"],
                                      args.tokenizer) for label, path in labels.items()}

    tokenizer = next(iter(tokenizers.values()))
    # The first model decides for all: differences are of the same prompts under the same budgets.
    args.context_len = args.context_len or min(look.get("context_len", LONGEST),
                                               settings[args.ckpt[0]]["context_len"])
    args.max_new_tokens = (args.max_new_tokens
                           or niah.default_new_tokens(args.context_len, tokenizer))
    few = 200 if on_gpu else max(2, 8192 // args.context_len)
    args.samples = args.samples or look.get("samples", few)
    filled = [sized(text, args.context_len, tokenizer, sparse.METHODS)
              for text in args.methods or look.get("methods", METHODS)]
    args.methods = list(dict.fromkeys(["dense", *filled]))
    methods = {sparse.parse(text, args.context_len): text for text in args.methods}
    return labels, tokenizers, methods


def choose_tasks(args, tokenizers):
    """
    --tasks, else those that train.py trained the first model on, else those, at a first look few,
    that fit in the tokens of every model.
    """
    args.tasks = args.tasks or trained_with(args.ckpt[0]).get("tasks")
    fitting = [niah.fitting_tasks(args.context_len, tokenizer, args.protocol, args.max_new_tokens,
                                  args.words) for tokenizer in tokenizers]
    fitting = [task for task in niah.TASKS if all(task in fit for fit in fitting)]
    few = [task for task in fitting if args.first_look and task in FIRST_LOOK["tasks"]]
    asked = args.tasks or few or fitting
    if "all" in asked:
        asked = fitting + [task for task in niah.generated() if task in niah.OTHERS
                           and all(has_room(task, args, tokenizer) for tokenizer in tokenizers)]
    if not asked:
        raise ValueError(f"no task fits into --context_len {args.context_len} with "
                         f"{args.max_new_tokens} new tokens: raise it")
    return asked


def has_room(task, args, tokenizer):
    """Whether a prompt of this other task fits; if not, a line says so."""
    haystack = niah.read_haystack(args.haystack) if args.haystack else None
    try:
        niah.make_example(task, args.context_len, tokenizer, args.seed, 0, args.protocol, haystack,
                          words=args.words)
        return True
    except ValueError as error:
        if is_first():
            print(f"note: --tasks all leaves out {task}: {error}", file=sys.stderr)
        return False


def new_tokens_of(task, args, tokenizer):
    """Room for an answer: --max_new_tokens for needles, and RULER's own number for another task."""
    if task not in niah.OTHERS:
        return args.max_new_tokens
    return niah.default_new_tokens(args.context_len, tokenizer, task)


def make_examples(args, tokenizer, asked):
    """{task: examples}, --questions of each document where it has as many"""
    haystack = niah.read_haystack(args.haystack) if args.haystack else None

    def made(task, index):
        return niah.make_document(
            task, args.context_len, tokenizer, args.seed, index, args.questions or 1,
            args.protocol, haystack, words=args.words,
            max_new_tokens=new_tokens_of(task, args, tokenizer))

    # Most of the time is a tokenizer's, whose compiled code lets other threads go on.
    with ThreadPoolExecutor(min(8, os.cpu_count())) as pool:
        return {task: [*chain(*pool.map(made, repeat(task), range(args.samples)))]
                for task in asked}


def read_examples(args, tokenizer):
    """{task: examples} of RULER's own files."""
    found = {}
    for file in args.jsonl:
        new_tokens = new_tokens_of(niah.task_of(file), args, tokenizer)
        examples = niah.read_jsonl(file, tokenizer, args.protocol,
                                   max_new_tokens=new_tokens)[:args.samples]
        if not examples or examples[0].task not in names():
            raise ValueError(f"{file} has no examples of a task we know: call it TASK.jsonl or "
                             "TASK/validation.jsonl")
        if examples[0].task in found:
            raise ValueError(f"--jsonl: {file} is a second file of {examples[0].task}; give one, "
                             "or join them")
        found[examples[0].task] = examples
    return found


def examples_of(args, labels, tokenizers):
    """{label: {task: examples}} of {label: path}, made once for models of the same tokenizer."""
    different = {tokenizer.name: tokenizer for tokenizer in tokenizers.values()}
    if args.jsonl:
        made = {name: read_examples(args, tokenizer) for name, tokenizer in different.items()}
    else:
        asked = choose_tasks(args, different.values())
        made = {name: make_examples(args, tokenizer, asked)
                for name, tokenizer in different.items()}
    return {label: made[tokenizer.name] for label, tokenizer in tokenizers.items()}


def draws_by_chance(args, methods):
    """
    H2: the methods of one phase and of budget 1/4 once for each seed, with the scores of what they
    select drawn by chance (sparse.randomized). All else stays: the budget, what is always kept, the
    prompts. So what their score says is all that such a draw lacks.
    """
    quarter = [m for m in methods if getattr(m, "budget", 0) * 4 == args.context_len]
    if not quarter:
        raise ValueError("--random: no method of one phase has a budget of 1/4, "
                         f"{args.context_len / 4:g} tokens")
    return {sparse.randomized(m, draw): methods[m] for m in quarter for draw in range(args.random)}


# ---------------------------------------------------------------- python eval_niah.py

def run(args, prompts=examples_of):
    """prompts: what is asked, a function like examples_of."""
    if args.plot:
        files = [Path(path, "results.json") if Path(path).is_dir() else path for path in args.plot]
        results, context_len = read_results(files, names())
        tell(results)
        plot(results, names(), context_len, picture_of(files))
        return
    backend.use(args.kernels)
    ranks = Ranks()
    prepared = prepare(args)
    with ranks.folder(args.out) as args.out:
        run_in(args, ranks, prompts, *prepared)


def run_in(args, ranks, prompts, labels, tokenizers, methods):
    """The evaluation as one of these processes, whose folder is ours alone."""
    # What is asked: methods, and under --random their draws; under --hits H1 of those that select
    # entries for an answer. MoBA selects for the prompt alone.
    texts = methods | (draws_by_chance(args, methods) if args.random else {})
    dense = sparse.Dense()
    selecting = [m for m in methods if args.hits and
                 (sparse.drops(m) or sparse.phases(m).decode_by != dense)]
    by_name = {f"H1 {sparse.name(m)}": m for m in selecting} | {sparse.name(m): m for m in texts}

    # The prompts: the same for all models of a tokenizer.
    examples = prompts(args, labels, tokenizers)
    lengths = [len(e.ids) for by_task in examples.values()
               for of_task in by_task.values() for e in of_task]
    most_new = max(of_task[0].max_new_tokens for by_task in examples.values()
                   for of_task in by_task.values())
    longest = max(len(e.ids) + e.max_new_tokens for by_task in examples.values()
                  for of_task in by_task.values() for e in of_task)
    refuse_longer(longest, args.context_len)

    # What is left: --out may hold answers, of this run or of another number of processes. If the
    # first process refuses, torchrun ends the others, which wait below.
    call = made_by(args.argv, "eval_niah.py", args.device, ranks.n)
    if ranks.rank == 0:
        refuse_other_questions(args, labels, tokenizers, examples, niah.prompt_hash, call)
        trained = {label: weights.read(path, without_tensors=True)[0]["context_len"]
                   for label, path in labels.items()}
        note_lengths(trained, max(lengths), args.max_new_tokens, args.context_len, args.yarn)
    left = list(unanswered(examples, by_name, args.batch, read_lines(args.out)))
    ranks.meet("all have read what is there")  # before anyone writes
    mine = left[ranks.rank::ranks.n]
    n_left, n_mine = (sum(batch.count() for batch in batches) for batches in (left, mine))
    total = len(lengths) * len(by_name)
    if ranks.rank == 0:
        asked = ", ".join(names()[task] for task in next(iter(examples.values())))
        there = f", {total - n_left:,} of them in {args.out} already" if total > n_left else ""
        print(f"{', '.join(labels)}: {len(lengths) // len(labels)} prompts each, of "
              f"{min(lengths):,} to {max(lengths):,} tokens ({asked}), x ({len(texts)} methods + "
              f"H1 of {len(selecting)}) = {total:,} answers of up to {most_new}{there}; "
              f"context {args.context_len:,}, protocol {args.protocol}"
              f"{', the question fed last' if args.blind else ''}; {call['device']}, "
              f"{args.dtype}")
        print(" ".join(methods.values()), flush=True)
        if args.first_look:
            n = max(1, round(sum(lengths) * n_left / total / TOKENS_A_MINUTE))
            print(f"a first look: about {n} minute{'s'[:n > 1]} on two CPU cores; --help tells of "
                  "more", flush=True)

    # Answers: each batch's are on disk before the next one is asked.
    progress, loading, answering = Progress(total, total - n_left), 0.0, 0.0  # seconds
    with appending(args.out, ranks.rank) as append:
        for label, batches in groupby(mine, lambda batch: batch.checkpoint):
            started, cache = time.time(), None
            dtype = getattr(torch, args.dtype)
            model = Transformer.from_pretrained(labels[label], dtype, args.device)
            if args.yarn:
                model.stretch(args.yarn)
            loaded = time.time()
            for batch in batches:
                some = examples[label][batch.task]
                lines, cache = ask(model, tokenizers[label], some, batch, by_name, args, cache)
                append(lines)
                if ranks.rank == 0:
                    progress(batch.count() * n_left / n_mine)  # others are taken to be as far
            del model, cache  # room for the next
            loading += loaded - started
            answering += time.time() - loaded

    # The report is read from disk, also where another process has written it.
    spent = ranks.meet("all have written", json.dumps([answering, loading]))
    if ranks.rank == 0:
        answering, loading = map(max, zip(*map(json.loads, spent)))  # the last to finish counts
        speed = {"answers": n_left, "seconds": round(answering, 2),
                 "seconds_of_loading": round(loading, 2)}
        if args.device.startswith("cuda"):  # of this process: the model, a batch's cache, its work
            speed["peak_bytes"] = torch.cuda.max_memory_allocated()
        report(args, call | {"speed": speed}, labels, tokenizers, examples, texts)


def ask(model, tokenizer, examples, batch, by_name, args, cache):
    """-> Lines with what a batch of `unanswered` misses; and the cache, for the next"""
    # On a GPU all batches are of one size, which CUDA graphs are recorded for: the last example
    # fills up a short one, and no one takes these answers.
    rows = batch.rows
    alike = args.device.startswith("cuda") and not args.blind
    size = min(args.batch, len(examples)) if alike else len(rows)
    some = [examples[i] for i in rows + rows[-1:] * (size - len(rows))]
    methods = [by_name[name] for name in batch.missing if not name.startswith("H1 ")]
    selecting = [by_name[name] for name in batch.missing if name.startswith("H1 ")]
    answers, found, cache = answer(model, tokenizer, some, methods, cache, selecting, args.blind)
    answers = {sparse.name(method): of_rows for method, of_rows in answers.items()}
    found = {f"H1 {sparse.name(method)}": of_rows for method, of_rows in found.items()}
    return batch.lines(answers, found, size), cache


def report(args, call, labels, tokenizers, examples, texts):
    """All answers -> predictions, results.json, tables and plot."""
    there, results = read_lines(args.out), []

    def share(read):
        return None if read is None else read / args.context_len

    for label, path in labels.items():
        for task, of_task in examples[label].items():
            for method, text in texts.items():
                name, drawn = sparse.name(method), getattr(method, "random", None)
                lines = there[label, task, name]
                outcome = Outcome.of([Answer(**lines[i].told) for i in range(len(of_task))])
                folder = Path(args.out) / label.replace("/", "_") / name.replace(":", "-")
                niah.write_predictions(folder, of_task, outcome.texts)
                of_h1 = there.get((label, task, f"H1 {name}"), {}) if args.hits else {}
                read, prompt_read = mean(outcome.read), mean(outcome.prompt_read)
                results.append({
                    "checkpoint": label, "path": str(weights.resolve(path)),
                    "tokenizer": tokenizers[label].name, "method": text, "random": drawn,
                    "budget": getattr(method, "budget", None), "task": task, "n": len(of_task),
                    "in_mean": task in niah.TASKS, "blind": bool(args.blind),
                    **scores(outcome.texts, of_task), "by_depth": by_depth(outcome.texts, of_task),
                    "read": read, "read_share": share(read),
                    "prompt_read": prompt_read, "prompt_read_share": share(prompt_read),
                    "hits": hit_rates(of_h1), "seconds": outcome.seconds,
                    "prompts": niah.prompt_hash(of_task), "keys_from": of_task[0].keys_from,
                    "haystack_from": of_task[0].haystack_from,
                    "predictions": str(folder / f"{task}.jsonl"),
                    "scores": ruler_scores(outcome.texts, of_task)})  # of each prompt

    # There is more than one call if the run was stopped, or methods were added.
    calls = load(Path(args.out) / "asked.json", "calls")["calls"]
    save({**call, "calls": calls, "settings": vars(args), "finished": True, "results": results},
         args.json)
    tell(results)
    speed, rate = call["speed"], ""
    if speed["seconds"]:
        rate = f", {speed['answers'] / speed['seconds']:.3g} a second"
    print(f"\n{speed['answers']:,} answers in {speed['seconds']:.1f} s{rate}; loading took "
          f"{speed['seconds_of_loading']:.1f} s")
    print(f"results in {args.json}, predictions in {args.out}")
    plot(results, names(), args.context_len, Path(args.json).with_suffix(".png"))


def tell(results):
    """Print the tables, and what follows from them."""
    print("\n" + table(results, names()))
    if any(row["random"] is not None for row in results):
        print("\n" + table_random(results, names()))
    if text := conclusion(results, names()):
        print("\n" + text)


def picture_of(files):
    """Beside the first file, of that name; of several files the names of all."""
    return Path(files[0]).with_name("+".join(Path(file).stem for file in files) + ".png")


def flags():
    look = FIRST_LOOK | {"tasks": [names()[task] for task in FIRST_LOOK["tasks"]]}
    look = " ".join(f"--{name} {value}" for name, value in look.items()).translate(
        str.maketrans("", "", "[],'"))
    parser = flag_parser("eval_niah.py", "Accuracy of sparse methods on RULER's needle tasks; with "
                         "no flags, of the checkpoints that come with the code. Without --ckpt, "
                         "--jsonl and --random, --hits is on, and on a CPU what is not given is "
                         f"that of a first look: {look}")
    add = parser.add_argument
    # what
    add("--ckpt", nargs="+", metavar="PATH", help="models that Transformer.from_pretrained loads, "
        "or runs of train.py; default: the two that come with the code, and beside them the newest "
        "run in out/ if it does the same task")
    add("--methods", "--method", nargs="+", action="extend", metavar="METHOD",
        help="for sparse.parse, e.g. moba:budget=1/8+snapkv:budget=1/4; budgets in tokens or of "
        "--context_len; block_size and window default to 1/64 of it, 8 to 64, and kernel to 5 or, "
        "for a model of bytes, 15; dense is always added; default: " + " ".join(METHODS))
    known = ", ".join(f"{name} or {names()[name]}" for name in niah.generated())
    add("--tasks", nargs="+", type=lambda text: text if text == "all" else niah.task_name(text),
        metavar="TASK", help=f"{known}; all: each that can be generated, the mean being that of "
        "the needle tasks; qa_1 and qa_2 come by --jsonl; default: those the first model was "
        "trained on, or that fit")
    add("--samples", type=positive, help="examples per task; the paper has 500; default: 200 with "
        "a GPU, else 8192 tokens' worth")
    add("--context_len", type=positive, metavar="TOKENS", help="prompt and answer together; "
        f"default: the first model's, at most the paper's {LONGEST}")
    add("--yarn", type=above_1, metavar="FACTOR", help="stretch each model's RoPE to a context so "
        "many times as long, for a --context_len beyond its own; default: as it is")
    add("--max_new_tokens", type=positive, metavar="TOKENS", help="room for a needle's answer; "
        "default: 128 from 2048 on, 48 below and for bytes. Other tasks have RULER's numbers")
    add("--protocol", choices=niah.PROTOCOLS, metavar="PROTOCOL", help="base (RULER's answer "
        "prefix) or sft (the question alone, for fine-tuned models); default: what the first model "
        "was trained on, else base")
    add("--haystack", metavar="FILE", help="text of the essays; default: Python's help pages")
    add("--jsonl", nargs="+", metavar="FILE", help="data files of RULER's own, TASK.jsonl or "
        "TASK/validation.jsonl, instead of generated examples: --tasks, --seed, --words, "
        "--questions and --haystack then mean nothing")
    add("--blind", action="store_true", default=None, help="what drops entries chooses from the "
        "context alone; then the question is fed")
    add("--questions", type=positive, metavar="N", help="to ask of each document, where a task has "
        "as many; with --blind they share what was kept of it. ± takes them for prompts that know "
        "nothing of each other; default: 1")
    add("--words", choices=niah.WORDS, default=niah.WORDS[0], help="of keys: built-in, or RULER's "
        "from the package wonderwords")
    add("--seed", type=seed, default=0, help="of the examples")
    add("--hits", action="store_true", help="H1: how often each head selects the answer's place")
    add("--random", type=positive, default=0, metavar="SEEDS", help="H2: how many times to draw "
        "the selection of methods of one phase and budget 1/4 by chance")
    # how
    add("--batch", type=positive, default=16, help="prompts at a time")
    add("--device", type=usable_device, default="cuda" if torch.cuda.is_available() else "cpu",
        help="cuda or cpu")
    add("--dtype", choices=["float32", "bfloat16"], help="of the model; default: bfloat16 on a "
        "GPU, else float32")
    backend.add_flag(parser)
    add("--tokenizer", metavar="SPEC", help="as in data.py; default: the one beside each model")
    # where to
    add("--out", metavar="DIR", help="folder of the answers, to go on with if it holds some; "
        "default: a new one, out/niah-DATE-TIME")
    add("--json", metavar="FILE", help="all results; default: results.json in --out. The plot goes "
        "beside it")
    add("--plot", nargs="+", metavar="JSON", help="no evaluation: tables and one picture of what "
        "these results.json, or folders with one, hold, beside the first of them; other flags then "
        "mean nothing")
    return parser


def main(argv=None):
    args = flags().parse_args(argv)
    args.argv = argv
    command("eval_niah.py", lambda: run(args), args, "interrupted; what is answered is kept, and "
            "the same command with --out {out} goes on")


if __name__ == "__main__":
    told_to_end()
    main()
