"""
Does a memory help a real language model? Arms that differ in how one pretrained model is continued
are fine-tuned and asked alike.

    for each run ARM-SEED of the plan, on a GPU of its own:
        train.py   ARM's flags, on text             out/real-model/ARM-SEED-text   not of "released"
        train.py   needles, dense                   out/real-model/ARM-SEED
        train.py   needles, ARM's extra pass too    out/real-model/ARM-SEED-same   of seeds 0 and 1
        ask        each of the last two             results/real-model/ARM-SEED[-same].json

    released      the model as it is
    continued     on text, one optimizer step per batch
    joint         and one more before it, through a window of 64 tokens
    dilated       and one more before it, through ARL's sparse pattern, that weighs little
    memory        with a memory, and that step of ARL's
    memory-joint  with a memory, and the window's step
    convolution   with a short causal convolution in the memory's place, and the window's step

Arms share the text, its order, rates and schedule: recipe `continue`. A seed decides the order of
the text and the samples of the fine-tuning. All runs start alike, by results/real-model/start, and
are asked the same prompts, so that what is found is true of these. Models are deleted once they are
asked: answers, losses and results stay.

    python -m experiments.real_model --init SMOLLM2 --data SHARDS --stages primary   what is missing
    python -m experiments.real_model --init SMOLLM2 --data SHARDS --runs memory-3    one run, here
    python -m experiments.real_model                                    tables, a figure

docs/real-model-plan.md has the plan in words, docs/real-model.md what came of it. Checked in
tests/test_real_model_plan.py. Read conversion.py before; what is asked besides scores is in
oracle.py and swap.py.
"""
import argparse
import gc
import json
import lzma
import re
import shutil
from dataclasses import replace
from itertools import chain, product
from pathlib import Path

import torch

import eval_niah
import niah
import sparse
import train
from data import Shards, tokenizer_of
from experiments import conversion, reproduce, runs, starts, swap, ways
from experiments.oracle import Frozen, Needles, left_out, oracle
from infra import files, runlog, weights
from infra.answers import read_lines
from infra.cli import command, flag_parser, made_by, positive, sized, usable_device
from infra.report import best_hits, mean, pyplot
from memory import Decay
from model import Transformer
from recipes import RECIPES

# The memory's start, ARL's weight and the gates' rate are those of the conversion that was chosen,
# steps and rate what the curve says: docs/real-model-plan.md. SETTING is the best of GRID at 1/8 in
# stage `develop`, and was set before `primary` had a score.

# How the released model is continued: flags of train.py that follow --recipe=continue.
ARMS = {
    "released": None,
    "continued": "--memory=off",
    "joint": "--memory=off --joint=64",
    "dilated": "--memory=off --arl=64 --arl_weight=0.1",
    "memory": "--memory=on --arl=64 --arl_weight=0.1",
    "memory-joint": "--memory=on --arl=0 --joint=64",
    "convolution": "--memory=convolution --arl=0 --joint=64 --memory_lr=5e-4",  # as the weights
}
OF_ARM = {"memory", "memory_lr", "arl", "arl_weight", "joint"}  # in which they may differ
START = conversion.PLAN["third-18-slowest-light"][0]  # of the gates, where --memory=on
PLAIN = replace(START, kind=None)                     # of the others: turned alike, without

# Fine-tuning: recipe niah-sft with so many steps of 16 sequences, at this rate, unless a run names
# others. Gates learn as in `continue`, filters as the weights do.
SFT = "--recipe=niah-sft --batch=16 --min_lr=0"
STEPS, RATE = 160, "3e-4"
RUN = re.compile(rf"({'|'.join(ARMS)})-(0|[1-9]\d*)(?:-([1-9]\d*)x([1-9]e-\d+))?", re.ASCII)

SEEDS = range(8)  # of the contrasts
STAGES = {
    # how many steps of fine-tuning are enough, at which rate
    "curve": [f"released-0-{steps}x{rate}" for rate in ("1e-4", "3e-4")
              for steps in (54, 160, 320, 640)],
    # the settings of the methods, on prompts of another seed
    "develop": ["joint-100"],
    "primary": [f"{arm}-{seed}" for seed in SEEDS for arm in ("joint", "memory", "dilated")],
    "others": [f"{arm}-{seed}" for seed in range(2)
               for arm in ("released", "continued", "memory-joint", "convolution")],
}

# One setting of each method serves all arms.
BUDGETS = eval_niah.BUDGETS
SETTING = {"quest": "", "moba": ",block_size=32", "snapkv": ",kernel=31,window=16"}
CELLS = {kind: [f"{kind}:budget={budget}{more}" for budget in BUDGETS]
         for kind, more in SETTING.items()}
EXTREME = "quest:budget=1/64,block_size={}"
GRID = [*(f"snapkv:budget=1/8,kernel={kernel},window={window}"
          for kernel in (5, 11, 21, 31) for window in (16, 32, 64)),
        # at 1/16, two blocks of 128 would be those that it always reads
        *(f"moba:budget=1/8,block_size={size}" for size in (32, 64))]
DEVELOP, EVAL = 100, 1000  # seeds of the prompts: of the curve and the grid; of the scores
DETAILED = 0, 1            # seeds whose runs are fine-tuned twice, and asked why
DRAWS = 5                  # of H2

# What the plan compares: the mean of a method's three budgets, paired by seed.
CONTRASTS = {"primary": ("memory", "joint"), "beside it": ("memory", "dilated")}
EXPLORED = {"exploratory": ("dilated", "joint")}  # looked at besides, and not tested
# What the paper's two models of 7B gain with a memory, in points, the mean of the eight tasks, at
# BUDGETS (its Tables 3 and 4). The first was trained from scratch, and attention beside it
# likewise; the second was continued for 10B tokens, and attention beside it was not.
PAPER = {"RAT+ 7B": {"quest": (6.2, 9.1, 7.4), "moba": (1.9, 10.5, 26.8),
                     "snapkv": (34.1, 40.0, 38.9)},
         "OLMo 2 7B": {"quest": (3.3, 10.2, 14.3), "moba": (0.0, 2.5, 12.2),
                       "snapkv": (21.2, 21.1, 31.9)}}


# ---------------------------------------------------------------- what a run is

def run_name(text):
    """A flag's run: ARM-SEED, or ARM-SEED-STEPSxRATE."""
    try:
        parts_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def parts_of(name):
    """-> arm, seed, steps and rate of the fine-tuning. ValueError if it names no run."""
    found = RUN.fullmatch(name)
    if found is None:
        raise ValueError(f"{name} is no run: ARM-SEED, of {', '.join(ARMS)}; or "
                         "ARM-SEED-STEPSxRATE, as released-0-54x1e-4")
    arm, seed, steps, rate = found.groups()
    return arm, int(seed), int(steps or STEPS), rate or RATE


def is_trial(name):
    """Whether it names its steps and rate: they are chosen by such runs."""
    return RUN.fullmatch(name)[3] is not None


def start_of(flags, args):
    """-> the Start of an arm with these flags, and its folder."""
    if "--memory=on" in flags:
        return START, Path(args.out) / "start"
    return PLAIN, Path(args.out) / "start-plain"


def stages_of(name, args, rest):
    """
    -> flags of train.py that continue the model, None if nothing does; {suffix of the result's
    name: flags of the fine-tuning}. ValueError if the user's `rest` has a flag of ours.
    """
    arm, seed, steps, rate = parts_of(name)
    if is_trial(name) and any(word.split("=")[0] == "--steps" for word in rest):
        raise ValueError(f"--steps: {name} has its own in its name")
    flags = (ARMS[arm] or "").split()
    both = [f"--seed={seed}", f"--context_len={args.context_len}", f"--device={args.device}",
            "--eval_every=0", "--save_every=1000000", f"--out={args.out}", "--resume",
            *runs.passed_on(rest, conversion.OURS)]
    start, text = args.init, None
    if ARMS[arm] is not None:
        start = start_of(flags, args)[1]
        text = ["--recipe=continue", f"--init={start}", f"--data={args.data}", *flags, *both,
                f"--name={name}-text"]
        start = Path(args.out) / f"{name}-text"

    passes = [flag for flag in flags if flag.startswith(("--joint", "--arl")) and flag != "--arl=0"]
    memory_lr = rate if arm == "convolution" else RECIPES["continue"]["memory_lr"]
    tuned = {suffix: [*SFT.split(), f"--steps={steps}", f"--lr={rate}", f"--memory_lr={memory_lr}",
                      f"--init={start}", *extra, *both, f"--name={name}{suffix}"]
             for suffix, extra in {"": [], "-same": passes}.items()
             if not suffix or (extra and seed in DETAILED)}
    return text, tuned


def result_of(name, args):
    return Path(args.results) / f"{name}.json"


def missing(name, args):
    """The suffixes of the run's results that are not there, whole. ValueError if one is damaged."""
    _, tuned = stages_of(name, args, [])
    return [suffix for suffix in tuned if not is_whole(name, suffix, args)]


def is_whole(name, suffix, args):
    """Whether the result is there, and if it is to tell why, was asked that too."""
    file = result_of(name + suffix, args)
    if not file.exists():
        return False
    report = files.load(file, "name", "arm", "seed", "tuning")
    return "oracle" in report or not is_detailed(name)


def is_detailed(name):
    """Whether a run's models are asked why."""
    return parts_of(name)[1] in DETAILED and not is_trial(name)


def reports_in(args):
    """(file, report) of all results that are there. ValueError if one is damaged."""
    for file in sorted(Path(args.results).glob("*.json")):
        yield file, files.load(file, "name", "arm", "seed", "tuning", "samples", "few")


# ---------------------------------------------------------------- one run: train, ask, delete

def run_one(name, args, rest):
    wanted, (text, tuned) = missing(name, args), stages_of(name, args, rest)
    if not wanted:
        print(f"{name}: done already, in {args.results}")
        return
    arm, seed, *_ = parts_of(name)
    about = made_by(args.argv, "experiments/real_model.py", args.device)
    about |= {"arm": arm, "seed": seed}
    get_ready([name], args, rest)
    if text:
        about["start"] = files.load(start_of(text, args)[1] / "start.json", "weights")
        about["weights"] = about["start"]["weights"]
        about["text"] = trained(text, args, last=True)
    else:
        model = Transformer.from_pretrained(args.init, torch.float32, "cpu")
        about["weights"] = starts.hash_of(model)
    for suffix in wanted:
        result = result_of(name + suffix, args)
        report = about | {"name": name + suffix, "tuning": trained(tuned[suffix], args)}
        there = files.load(result, "tuning") if result.exists() else {}
        if there.get("tuning", {}).get("train") == report["tuning"]["train"]:
            report |= there  # the scores are of this very model
        else:
            report |= ask(name, suffix, args)
            files.save(report, result)  # what tells why takes as long as all before
        if is_detailed(name):
            files.save(report | ask_why(name, suffix, args), result)
        print(f"{name}{suffix}: result in {result}", flush=True)
    if not args.keep:
        for folder in [f"{name}-text", *(name + suffix for suffix in tuned)]:
            shutil.rmtree(Path(args.out) / folder, ignore_errors=True)


def get_ready(names, args, rest):
    """What would end these runs after a training is known before; their common starts are made."""
    stages = [stages_of(name, args, rest) for name in names]
    for text, tuned in stages:
        for flags in filter(None, [text, *tuned.values()]):
            train.parse(flags)
    Shards(args.data, args.context_len, seed=0)
    if Path(args.results).exists() and not Path(args.results).is_dir():
        raise ValueError(f"--results {args.results} is no folder: choose another")
    config = weights.read(args.init, without_tensors=True)[0]
    tokenizer = tokenizer_of(weights.resolve(args.init), config["vocab_size"], None)
    grid = GRID if any(name in STAGES["develop"] for name in names) else []
    for text in [*nine(), extreme(args), *grid]:
        sparse.parse(sized(text, args.context_len, tokenizer, sparse.METHODS), args.context_len)
    refuse_misfits(names, stages, args)
    make_starts([text for text, _ in stages if text], args)
    if args.device.startswith("cuda"):
        torch.cuda.empty_cache()  # a run in another process counts on all of its GPU


def refuse_misfits(names, stages, args):
    """ValueError if these runs would be trained or asked otherwise than those that have results."""
    first = {}
    read_all(args, first)
    for _, report in reports_in(args):
        name = report["name"].removesuffix("-same")
        there = report["samples"], report["few"] if is_detailed(name) else args.few
        if there != (args.samples, args.few) and name in chain(*STAGES.values()):
            raise ValueError(f"{args.results} holds {report['name']}, asked with --samples="
                             f"{report['samples']} --few={report['few']}: give the same, or "
                             "another --results")
    planned = lambda flags: flags_in(vars(train.parse(flags)), of_arm=False)
    for name, (text, tuned) in zip(names, stages):
        if not is_trial(name):
            agree(name, {"text": planned(text)} if text else {}, first)
            agree(name, {"tuning": planned(tuned[""])}, first)
    asked_there, file = first.get("what is asked", ({"prompts": {}}, None))
    if (task := "niah_single_2") in asked_there["prompts"]:
        _, by_task, _ = examples_of(args.init, args, args.samples, [task])
        if niah.prompt_hash(by_task[task]) != asked_there["prompts"][task]:
            raise ValueError(f"{file} was asked other prompts than these runs would be (Python's "
                             "help pages): take the same version of Python, or another --results")


def make_starts(texts, args):
    """
    The models from which these continue, flags of train.py. The first start of all, a memory's,
    chooses channels and heads, which --results/start/start.json holds for runs on other machines.
    """
    chosen = Path(args.results) / "start" / "start.json"
    make = lambda start, folder, like: starts.started(
        start, args.init, args.data, folder, args.device, args.context_len, like=like)
    if texts and not chosen.exists():
        files.save(files.load(make(*start_of(["--memory=on"], args), None) / "start.json"), chosen)
    for start, folder in dict.fromkeys(start_of(text, args) for text in texts):
        make(start, folder, chosen)


def trained(flags, args, last=False):
    """
    Train, unless the model is there, while no other run trains on this GPU; with `last` others go
    first, whose models are then asked. -> how it was made, its losses, its memory's lengths
    """
    settings = train.parse(flags)
    folder = Path(settings.out) / settings.name
    if not runs.finished(folder, flags):
        with runs.turn(args.device, last):  # a training takes much of a GPU's memory
            train.train(settings)
            gc.collect()              # the training's CUDA graphs,
            torch.cuda.empty_cache()  # and their memory, for whoever comes next
    return {"train": runlog.training_record(folder), "losses": conversion.losses(folder),
            **conversion.measured(folder, args.data, args.context_len, args.device)}


# ---------------------------------------------------------------- all that is asked of a model

def nine():
    return [method for of_kind in CELLS.values() for method in of_kind]


def extreme(args):
    """The paper's block of 16 tokens; in a short context a quarter of the budget."""
    return EXTREME.format(max(1, min(16, args.context_len // 256)))


def ask(name, suffix, args):
    """-> {"cells": {method: {task: RULER's score in percent}}}, or of `develop` "grid" """
    folder = Path(args.out) / (name + suffix)
    what, methods = "cells", [*nine(), extreme(args)]
    if name in STAGES["develop"]:
        what, methods = "grid", GRID
    prompts = DEVELOP if is_trial(name) or what == "grid" else EVAL
    report = evaluated(folder, what, args, prompts, args.samples, methods)
    if what == "cells":
        file = result_of(name + suffix, args).with_suffix(".answers.xz")
        keep_answers(folder / what, file)
    return {"samples": args.samples, "few": args.few, "prompts": reproduce.prompts_in(report),
            what: scores_in(report)}


def asked(folder, args, seed, samples, methods):
    """Flags of eval_niah.py."""
    return ["--ckpt", str(folder), "--protocol=sft", f"--context_len={args.context_len}",
            f"--samples={samples}", f"--seed={seed}", f"--batch={args.eval_batch}",
            f"--device={args.device}", "--methods", *methods]


def evaluated(folder, what, args, seed, samples, methods):
    """The report of eval_niah.py."""
    out = folder / what
    eval_niah.main([*asked(folder, args, seed, samples, methods), f"--out={out}"])
    return files.load(out / "results.json", "results")


def scores_in(report):
    """{method: {task: RULER's score in percent}} of a report without draws by chance"""
    found = {}
    for row in report["results"]:
        found.setdefault(row["method"], {})[row["task"]] = row["ruler"][0]
    return found


def keep_answers(folder, file):
    """What was written for each prompt, as [task, method, index, text], in few bytes."""
    lines = [json.dumps([task, method, index, line.told["text"]]) + "\n"
             for (_, task, method), of_method in read_lines(folder).items()
             for index, line in sorted(of_method.items())]
    file.parent.mkdir(parents=True, exist_ok=True)
    packed = lzma.compress("".join(lines).encode())
    files.whole_or_nothing(file, lambda path: path.write_bytes(packed))


def examples_of(folder, args, samples, tasks=None):
    """-> the tokenizer, {task: examples} by which is scored, {text: method} of the nine cells"""
    chosen = eval_niah.flags().parse_args(asked(folder, args, EVAL, samples, nine()))
    _, tokenizers, texts = eval_niah.prepare(chosen)
    tokenizer = next(iter(tokenizers.values()))
    by_task = eval_niah.make_examples(chosen, tokenizer,
                                      tasks or eval_niah.choose_tasks(chosen, [tokenizer]))
    return tokenizer, by_task, {text: m for m, text in texts.items() if text != "dense"}


def ask_why(name, suffix, args):
    """What tells why, of fewer prompts of all tasks at once -> "hits" (H1), "few_cells",
    "by_chance" (H2), "frozen", "oracle", "swap" """
    folder = Path(args.out) / (name + suffix)
    tokenizer, by_task, methods = examples_of(folder, args, args.few)
    examples = [e for of_task in by_task.values() for e in of_task]
    model = Transformer.from_pretrained(folder, torch.bfloat16, args.device)

    def scores(model, parts):
        """{part: {name: mean of the tasks}} of {part: {name: method}}, all asked at once"""
        wanted = [method for of_part in parts.values() for method in of_part.values()]
        made = ways.evaluate(model, tokenizer, examples, wanted, args.eval_batch)
        return {part: {name: 100 * mean(eval_niah.ruler_scores(made[method].texts, examples))
                       for name, method in of_part.items()}
                for part, of_part in parts.items()}

    quarter = {text: method for text, method in methods.items() if "budget=1/4" in text}
    quest = next(method for method in quarter.values() if isinstance(method, sparse.Quest))
    needles = Needles(examples, tokenizer)
    made = scores(model, {
        # with which the others are compared, as they are asked of the same few prompts
        "few_cells": {"dense": sparse.Dense()} | methods,
        "by_chance": {(text, draw): sparse.randomized(method, draw)
                      for text, method in quarter.items() for draw in range(DRAWS)},
        "frozen": {draw: Frozen(quest.budget, quest.block_size, random=draw)
                   for draw in range(DRAWS)},
        "oracle": {text: oracle(method, needles) for text, method in methods.items()}})
    found = {"hits": hits_of(model, tokenizer, examples, methods, args.eval_batch),
             "few_cells": made["few_cells"],
             "by_chance": {text + reproduce.BY_CHANCE: mean(made["by_chance"][text, draw]
                                                            for draw in range(DRAWS))
                           for text in quarter},
             "frozen": [*made["frozen"].values()],
             "oracle": made["oracle"],
             "needles": sum(len(e.answers) for e in examples),
             "needles_left_out": {text: left_out(method, needles)
                                  for text, method in methods.items()}}
    if isinstance(model.layers[0].self_attn.memory, Decay):
        found["swap"] = scores(swap.swapped(model), {
            text: swap.cells(method) for text, method in methods.items() if "budget=1/8" in text})
    return found


def hits_of(model, tokenizer, examples, methods, batch):
    """H1 of {text: method} that select for an answer: of the share of answers that a head hits, the
    mean of the tasks, and of this the mean of the best heads, in percent."""
    selecting = {m: text for text, m in methods.items() if not isinstance(m, sparse.MoBA)}
    hits = {text: {} for text in selecting.values()}
    for rows, _, found in ways.by_batch(model, tokenizer, examples, [], batch, selecting):
        for method, text in selecting.items():
            for i, hit in zip(rows, found[method]):  # bool (answers, layers, KV)
                if len(hit):  # else no token of an answer counts
                    hits[text].setdefault(examples[i].task, []).append(hit)
    return {text: best_hits([{"hits": torch.cat(of_task).float().mean(0).tolist()}
                             for of_task in by_task.values()])
            for text, by_task in hits.items()}


# ---------------------------------------------------------------- tables of what is there

def read_all(args, first=None):
    """
    {arm, with "-same" where fine-tuned so: {seed: report}} of the results there, but for the
    development and those that name their steps and rate; `first` gets the facts in which they
    agree. ValueError if two do not, or were asked with other settings than SETTING's.
    """
    found, first = {}, {} if first is None else first
    for file, report in reports_in(args):
        suffix = report["name"].removeprefix(f"{report['arm']}-{report['seed']}")
        if "cells" not in report or suffix not in ("", "-same"):
            continue
        agree(file, facts(report, suffix), first)
        if any(not cells_of(report, kind) for kind in CELLS):
            raise ValueError(f"{file} was asked with other settings of the methods than are wanted "
                             "now: move it away")
        found.setdefault(report["arm"] + suffix, {})[report["seed"]] = report
    order = [arm + suffix for arm in ARMS for suffix in ("", "-same")]
    return {arm: found[arm] for arm in order if arm in found}


def facts(report, suffix):
    """{of what: value} in which all results agree that have it."""
    arm = report["arm"] + suffix
    found = {"what is asked": {key: report[key] for key in ("samples", "few", "prompts")}
             | {"methods": list(report["cells"])}}
    found |= {"weights": report["weights"]} if "weights" in report else {}
    found |= {f"{key} of the start": report["start"][key]
              for key in ("long", "heads") if key in report.get("start", {})}
    for stage in {"text", "tuning"} & report.keys():
        record = report[stage]["train"]
        found[stage] = flags_in(record["settings"], of_arm=False)
        found[f"{stage} of {arm}"] = flags_in(record["settings"], of_arm=True)
        found[f"order of {stage}, seed {report['seed']}"] = record["first_sample"]
    return found


def flags_in(settings, of_arm):
    """Those of train.py's in which arms differ, or all others that decide how it is trained, but
    for the seed and for files."""
    free = {"seed", *runlog.FILES, *runlog.MAY_CHANGE}
    return {key: value for key, value in settings.items()
            if key not in free and (key in OF_ARM) == of_arm}


def agree(name, found, first):
    """
    ValueError if a fact differs from the one that came first, of those {what: (value, whose)}; new
    ones are added. Of flags, those that both have are compared.
    """
    for what, value in found.items():
        there, other = first.setdefault(what, (value, name))
        differ = [what] if value != there else []
        if isinstance(value, dict):
            differ = sorted(f"{what}, {key}" for key in value.keys() & there.keys()
                            if value[key] != there[key])
        if differ:
            raise ValueError(f"{name} is made otherwise than {other} ({differ[0]}): give the same "
                             "flags, or move one of them away")


def cells_of(report, kind, any_setting=False):
    """[{task: score}] of a method's three budgets, with its SETTING or with any."""
    cells = [f"{kind}:budget={budget}" for budget in BUDGETS] if any_setting else CELLS[kind]
    return [of_tasks for method, of_tasks in report["cells"].items()
            if any(f"{method},".startswith(f"{cell},") for cell in cells)]


def score(report, kind, any_setting=False, at=None, task=None):
    """The mean of a method's three budgets, or at one of BUDGETS, each the mean of the tasks, or of
    one task."""
    of_budgets = [of_tasks[task] if task else mean(of_tasks.values())
                  for of_tasks in cells_of(report, kind, any_setting)]
    return mean(of_budgets) if at is None else of_budgets[BUDGETS.index(at)]


def compared(found, arm, base, kind, at=None, task=None):
    """Of `score`, {"gain", "interval" (95 %), "by_seed", "p"} of the plan's seeds that both arms
    have; None if there is none."""
    values, others = ({seed: score(report, kind, at=at, task=task)
                       for seed, report in reports.items() if seed in SEEDS}
                      for reports in (found.get(arm, {}), found.get(base, {})))
    return reproduce.compare(values, others)


def contrasts(found):
    """
    {contrast: {method: {"gain", "interval", "by_seed", and once all seeds are there "p", "holm"}}}
    of the plan, and without p what was looked at besides, where both arms are.
    """
    made = {}
    for title, (arm, base) in (CONTRASTS | EXPLORED).items():
        of_kind, ps = {}, {}
        for kind in CELLS:
            of = compared(found, arm, base, kind)
            if of is None:
                continue
            of_kind[kind] = {key: of[key] for key in ("gain", "interval", "by_seed")}
            if len(of["by_seed"]) == len(SEEDS) and title in CONTRASTS:
                # differences that do not differ tell nothing
                ps[kind] = 1.0 if of["p"] is None else of["p"]
        for kind, holm in reproduce.holm(ps).items():
            of_kind[kind] |= {"p": ps[kind], "holm": holm}
        made[f"{title}: {arm} - {base}"] = of_kind
    return made


def tables(found):
    """Lines of all arms' scores, and of the contrasts."""
    lines = [f"{'':20}{'seeds':>5}{'dense':>11}" + "".join(
        f"{f'{kind} {budget}':>12}" for kind in CELLS for budget in BUDGETS) + f"{'1/64':>11}"]
    for arm, reports in found.items():
        cells = reproduce.transpose([{method: mean(of.values())
                                      for method, of in report["cells"].items()}
                                     for report in reports.values()])
        dense, *middle, last = (reproduce.cell(values, "±") for values in cells.values())
        lines.append(f"{arm:20}{len(reports):5}{dense:>11}"
                     + "".join(f"{text:>12}" for text in middle) + f"{last:>11}")
    for title, of_kind in contrasts(found).items():
        for kind, of in of_kind.items():
            p = f"   p {of['p']:.3f}, Holm {of['holm']:.3f}" if "p" in of else ""
            ends = " [{:+.1f}, {:+.1f}]".format(*of["interval"]) if of["interval"] else ""
            lines.append(f"{title}, {kind}: {of['gain']:+.1f}{ends} of {len(of['by_seed'])} "
                         f"seeds{p}")
    return [*lines, "RULER's score, %: mean of tasks and of seeds; of differences 95 % intervals"]


def beside_paper(found):
    """What a memory gains at each budget, and what the paper's models gain."""
    cells = [*product(CELLS, BUDGETS)]
    lines = [f"{'':20}" + "".join(f"{f'{kind} {budget}':>12}" for kind, budget in cells)]
    for arm, base in CONTRASTS.values():
        of_cells = [compared(found, arm, base, kind, at) for kind, at in cells]
        if None not in of_cells:
            lines.append(f"{f'{arm} - {base}':20}" + "".join(
                f"{reproduce.cell(of['by_seed'], '±'):>12}" for of in of_cells))
    for model, gains in PAPER.items():
        lines.append(f"{f'paper, {model}':20}" + "".join(
            f"{gains[kind][BUDGETS.index(at)]:12.1f}" for kind, at in cells))
    return [*lines, "points of RULER's score gained with a memory, mean±deviation of seeds; the "
            "paper has one model each"]


def gains_by_task(found):
    """Where gains come from, task by task: a control's scores, and what an arm is above it."""
    report, *_ = chain(*(reports.values() for reports in found.values()))
    tasks, names, lines, told = list(report["cells"]["dense"]), eval_niah.names(), [], set()
    for (arm, base), kind in product((CONTRASTS | EXPLORED).values(), CELLS):
        of_tasks = [compared(found, arm, base, kind, task=task) for task in tasks]
        if None in of_tasks:
            continue
        if (base, kind) not in told:
            told.add((base, kind))
            of_seeds = [of for seed, of in found[base].items()
                        if seed in SEEDS and seed in found[arm]]
            scores = [mean([score(of, kind, task=task) for of in of_seeds]) for task in tasks]
            lines.append(f"{base:20}{kind:8}" + "".join(f"{x:13.1f}" for x in scores))
        lines.append(f"{f'{arm} - {base}':20}{kind:8}" + "".join(
            f"{gained(of):>13}" for of in of_tasks))
    head = f"{'':28}" + "".join(f"{names.get(task, task):>13}" for task in tasks)
    return [head, *lines, "by task, the mean of a method's three budgets: RULER's score of a "
            "control, %, and points above it ± half a 95 % interval"]


def gained(of):
    """What `compared` found, in few characters."""
    half = f"±{(of['interval'][1] - of['interval'][0]) / 2:.1f}" if of["interval"] else ""
    return f"{of['gain']:+.1f}{half}"


def plot_gains(found, file):
    """What a memory gains over each control: a panel for each method, a dot for each seed, 95 %
    intervals, and the paper's gains. -> the figure; None without matplotlib, or seeds."""
    pairs = [pair for pair in CONTRASTS.values()
             if all(compared(found, *pair, kind) for kind in CELLS)]
    if not (pairs and (plt := pyplot())):
        return None
    figure, panels = plt.subplots(1, len(CELLS), figsize=(10, 4), sharey=True, squeeze=False)
    marks = [*BUDGETS, None]  # the mean of all three last
    for kind, panel in zip(CELLS, panels[0]):
        panel.axhline(0, color="0.6", lw=0.8)
        for (arm, base), color, aside in zip(pairs, ("tab:blue", "tab:orange"), (-0.12, 0.12)):
            for x, at in enumerate(marks):
                ours = compared(found, arm, base, kind, at)
                gain, n = ours["gain"], len(ours["by_seed"])
                panel.plot([x + aside] * n, ours["by_seed"], ".", color=color, alpha=0.35)
                low, high = ours["interval"] or (gain, gain)
                panel.errorbar([x + aside], [gain], [[gain - low], [high - gain]], fmt="o",
                               color=color, capsize=3,
                               label=f"ours, {n} seeds: {arm} - {base}" if x == 0 else None)
        for (model, gains), mark in zip(PAPER.items(), "x+"):
            panel.plot(range(len(marks)), [*gains[kind], mean(gains[kind])], mark, color="0.3",
                       label=f"the paper's {model}, one training")
        panel.set(title=sparse.METHODS[kind].__name__, xticks=range(len(marks)),
                  xticklabels=[*BUDGETS, "mean"], xlabel="budget")
    panels[0, 0].set_ylabel("points of RULER's score\ngained with a memory")
    panels[0, 0].legend(fontsize=8, loc="upper left")
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    return figure


def memories(found):
    """Of each arm the losses, and of a memory how long it is and what its model loses without."""
    lines = [f"{'':20}{'':5}{'after continuing':>27}{'after fine-tuning':>27}",
             f"{'':20}{'seeds':>5}" + "".join(f"{x:>9}" for x in ("loss", "long", "shut") * 2)]
    for arm, reports in found.items():
        line = f"{arm:20}{len(reports):5}"
        for stage in "text", "tuning":
            there = [report[stage] for report in reports.values() if stage in report]
            columns = {".3f": [of["held_out"] for of in there],
                       ".1f": [conversion.of_a_third(of) for of in there if "lengths" in of],
                       "+.3f": [of["shut"] - of["held_out"] for of in there if "shut" in of]}
            for digits, values in columns.items():
                line += f"{format(mean(values), digits) if values else '':>9}"
        lines.append(line)
    return [*lines, "loss on held-out text, nats per token; long: tokens that a third of the KV "
            "heads' medians have or exceed; shut: how much the loss rises with the gates shut"]


# What `why` tells at each budget, and the key of a report that has it.
AT_BUDGETS = {"H1": "hits", "chosen": "few_cells", "oracle": "oracle"}


def why(found):
    """What tells why, of the arms that were asked: chance at a budget of 1/4, the swap at 1/8."""
    lines, swaps = [], []
    for arm, kind in product(found, CELLS):
        reports = [report for report in found[arm].values() if "oracle" in report]
        of = lambda key, budget: [value for report in reports
                                  for method, value in report.get(key, {}).items()
                                  if method.startswith(f"{kind}:budget={budget}")]
        frozen = [x for report in reports for x in report["frozen"] if kind == "quest"]
        cells = [of(key, budget) for key in AT_BUDGETS.values() for budget in BUDGETS]
        if reports:
            lines.append(f"{arm:20}{len(reports):5}{kind:>8}" + "".join(
                f"{mean(cell):12.1f}" if cell else " " * 12
                for cell in [*cells, of("by_chance", "1/4"), frozen]))
        if swapped := of("swap", "1/8"):
            swaps.append(f"{arm:20}{f'{kind} 1/8':12}" + ";  ".join(
                f"{name} {mean(x):.1f}" for name, x in reproduce.transpose(swapped).items()))
    if lines:
        heads = [f"{head} {budget}" for head in AT_BUDGETS for budget in BUDGETS]
        heads += ["chance 1/4", "frozen 1/4"]
        lines = [f"{'':20}seeds{'':8}" + "".join(f"{head:>12}" for head in heads), *lines,
                 "H1: the best heads select the answer's place, %. RULER's score, %, of fewer "
                 "prompts: as the method chooses, the needles first, by chance, by a frozen draw"]
    if swaps:
        lines += [*swaps, "the swap: what chooses, and what is then read: RULER's score, %"]
    return lines


def chosen_by(args):
    """What steps, rate and settings are chosen by, curve and grid, as far as they are there; the
    curve is drawn."""
    every = {report["name"]: report for _, report in reports_in(args)}
    there = {name: every[name] for name in [*STAGES["curve"], *STAGES["develop"]] if name in every}
    curve = {name: report for name, report in there.items() if is_trial(name)}
    lines = []
    if curve:
        plot_curve(curve, Path(args.results) / "curve.png")
        lines.append(" " * 22 + "".join(f"{head:>8}" for head in ("dense", *CELLS, "nine", "text")))
    for name, report in curve.items():
        lines.append(f"{name:22}" + "".join(f"{x:8.1f}" for x in curve_point(report))
                     + f"{report['tuning']['held_out']:8.3f}")
    for name in there.keys() - curve.keys():
        lines += [f"{name:22}{method:40}{mean(of_tasks.values()):6.1f}"
                  for method, of_tasks in there[name]["grid"].items()]
    return lines


def curve_point(report):
    """RULER's score in percent, the mean of the tasks: dense; each method's three budgets; the mean
    of all nine cells, whatever the settings were."""
    of_kinds = [score(report, kind, any_setting=True) for kind in CELLS]
    return [mean(report["cells"]["dense"].values()), *of_kinds, mean(of_kinds)]


def plot_curve(reports, file):
    """Scores by steps of fine-tuning, a panel for each rate. -> the figure; None without
    matplotlib."""
    if not (plt := pyplot()):
        return None
    of_rates = {}
    for name, report in reports.items():
        _, _, steps, rate = parts_of(name)
        of_rates.setdefault(rate, {})[steps] = curve_point(report)
    figure, panels = plt.subplots(1, len(of_rates), figsize=(9, 3.6), sharey=True, squeeze=False)
    for panel, (rate, of_steps) in zip(panels[0], of_rates.items()):
        for label, scores in zip(("dense", *CELLS, "nine cells"), zip(*of_steps.values())):
            panel.plot([*of_steps], scores, "o-", label=label)
        panel.set(xscale="log", xticks=[*of_steps], xticklabels=[*of_steps], title=f"rate {rate}",
                  xlabel="steps of fine-tuning", ylim=(0, 102))
        panel.minorticks_off()
    panels[0, 0].set_ylabel("RULER's score, %")
    panels[0, 0].legend()
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    return figure


# ---------------------------------------------------------------- python -m experiments.real_model

def run_all(args, rest):
    names = args.runs or [name for stage in args.stages or [] for name in STAGES[stage]]
    names = list(dict.fromkeys(names))
    if names and not (args.init and args.data):
        raise ValueError("--init and --data: a run needs a model and text")
    if rest and not names:
        raise ValueError(f"{rest[0]}: no flag of ours, and no run is named to pass it on to")
    left = [name for name in names if missing(name, args)]
    read_all(args)  # what does not fit together is known now, also when nothing is left to do
    if len(names) == 1:
        run_one(names[0], args, rest)
        return

    def job(name):
        words = ["experiments/real_model.py", f"--init={args.init}", f"--data={args.data}",
                 f"--samples={args.samples}", f"--few={args.few}", f"--device={args.device}",
                 f"--eval_batch={args.eval_batch}", f"--context_len={args.context_len}",
                 *["--keep"] * args.keep, f"--out={args.out}", f"--results={args.results}",
                 f"--runs={name}", *rest]
        return lambda call: call(words, Path(args.out) / f"{name}.log")

    if left:
        get_ready(left, args, rest)  # here, as two runs at once would both make the start
    runs.on_all_gpus([job(name) for name in left], args.per_gpu)
    found, choices = read_all(args), chosen_by(args)
    if not (found or choices):
        raise ValueError(f"{args.results} holds no result: name --stages or --runs to make some")
    lines = []
    if found:
        lines = [*tables(found), *gains_by_task(found), *beside_paper(found), *memories(found),
                 *why(found)]
        plot_gains(found, Path(args.results) / "gains.png")
    print("\n".join([*choices, *lines]))


def flags():
    parser = flag_parser("real_model.py", "A memory for a real language model, and its controls; "
                         "flags not named here go to train.py.")
    add = parser.add_argument
    add("--init", metavar="PATH", help="the pretrained model")
    add("--data", metavar="DIR", help="token shards, as data.py writes them")
    add("--stages", nargs="+", choices=STAGES, metavar="STAGE",
        help=f"of the plan: {', '.join(STAGES)}; None: only the tables")
    add("--runs", nargs="+", type=run_name, metavar="RUN", help="these instead: ARM-SEED")
    add("--samples", type=positive, default=100, help="prompts of each task")
    add("--few", type=positive, default=25, help="prompts of each task, for all that asks why")
    add("--eval_batch", type=positive, default=50, help="prompts at a time")
    add("--per_gpu", type=positive, default=1, metavar="RUNS",
        help="at a time on each GPU: one trains while others ask")
    add("--context_len", type=positive, default=4096, metavar="TOKENS",
        help="of the text, the fine-tuning and the prompts")
    add("--keep", action="store_true", help="keep the models")
    add("--device", type=usable_device, default="cuda" if torch.cuda.is_available() else "cpu",
        help="cuda or cpu")
    add("--out", default="out/real-model", metavar="DIR", help="folder of the models and logs")
    add("--results", default="results/real-model", metavar="DIR", help="folder of the results")
    return parser


def main(argv=None):
    args, rest = flags().parse_known_args(argv)
    args.argv = argv
    command("real_model.py", lambda: run_all(args, rest),
            interrupted="interrupted; the same command goes on")


if __name__ == "__main__":
    main()
