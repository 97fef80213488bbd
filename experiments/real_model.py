"""
Does a memory help a real language model? Arms that differ in how one pretrained model is continued,
each fine-tuned and asked alike.

    for each run ARM-SEED of the plan, on a GPU of its own:
        train.py   ARM's flags, on text             out/real-model/ARM-SEED-text    not of "released"
        train.py   needles, dense                   out/real-model/ARM-SEED
        train.py   needles, ARM's extra pass too    out/real-model/ARM-SEED-same    of arms with one
        ask        each of the two                  results/real-model/ARM-SEED[-same].json

    released      the model as it is
    continued     trained on text, one optimizer step per batch
    joint         and one more before it, through a window of 64 tokens
    dilated       and one more before it, through ARL's sparse pattern
    memory        with a memory, and ARL's step
    memory-joint  with a memory, and the window's step
    convolution   with a short causal convolution in the memory's place, and the window's step

Arms share the text, its order, rates and schedule: recipe `continue`. A seed decides the order of
the text and the samples of the fine-tuning; all start from one checkpoint, so that claims are of
that one. Models are deleted once they are asked: predictions, logs and results stay.

    python -m experiments.real_model --init SMOLLM2 --data SHARDS --stages primary    what is missing
    python -m experiments.real_model --init SMOLLM2 --data SHARDS --runs memory-3     one run, here
    python -m experiments.real_model --stages none                                    the tables

docs/real-model.md has the plan in words, and what was found. What is asked besides scores is in
swap.py and oracle.py. Checked in tests/test_real_model_plan.py. Read conversion.py first.
"""
import argparse
import gc
import json
import lzma
import shutil
import statistics
from pathlib import Path

import torch

import eval_niah
import train
from experiments import memories  # noqa: F401  puts its classes into memory.MEMORIES
from experiments import reproduce, runs, ways
from experiments.conversion import on_text, rounded
from infra import files, runlog
from infra.answers import read_lines
from infra.cli import command, flag_parser, made_by, positive, usable_device
from infra.report import best_heads, mean
from model import Transformer

# How the released model is continued: flags of train.py that follow --recipe=continue.
ARMS = {
    "released": None,
    "continued": "--memory=off",
    "joint": "--memory=off --joint=64",
    "dilated": "--memory=off --arl=64",
    "memory": "--memory=on --arl=64",
    "memory-joint": "--memory=on --arl=0 --joint=64",
    "convolution": "--memory=convolution --arl=0 --joint=64",
}
PASSES = "--joint", "--arl"  # of these the fine-tuning of a -same run has the arm's

# Fine-tuning: recipe niah-sft with steps of 16 sequences, at this rate, unless a run names another.
SFT = "--recipe=niah-sft --batch=16 --min_lr=0"
STEPS, RATE = 320, "3e-4"

# The plan. A run of the curve says how many steps of fine-tuning it has, at which rate.
STAGES = {
    "curve": [f"released-0-{steps}x{rate}" for rate in ("1e-4", "3e-4")
              for steps in (54, 160, 320, 640)],
    "develop": ["joint-100"],
    "primary": [f"{arm}-{seed}" for seed in range(8) for arm in ("joint", "memory", "dilated")],
    "others": [f"{arm}-{seed}" for seed in range(2)
               for arm in ("released", "continued", "memory-joint", "convolution")],
    "none": [],
}

# One setting of each method serves all arms. It was chosen on joint-100, by prompts of seed 100.
KINDS = {"quest": "", "moba": "", "snapkv": ",kernel=21,window=16"}
BUDGETS = eval_niah.BUDGETS
CELLS = {kind: [f"{kind}:budget={budget}{more}" for budget in BUDGETS]
         for kind, more in KINDS.items()}
EXTREME = "quest:budget=1/64,block_size={}"  # 16, or a quarter of the budget
GRID = [*(f"snapkv:budget=1/8,kernel={kernel},window={window}"
          for kernel in (5, 11, 21, 31) for window in (16, 32, 64)),
        *(f"moba:budget=1/8,block_size={size}" for size in (32, 64, 128))]
DEVELOP, EVAL = 100, 1000  # seeds of the prompts


# ---------------------------------------------------------------- one run

def named(text):
    """A flag's run, ARM-SEED or ARM-SEED-STEPSxRATE: the text, if it is one."""
    try:
        of_name(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def of_name(name):
    """-> arm, seed, steps and rate of the fine-tuning. ValueError if it names no run."""
    for arm in sorted(ARMS, key=len, reverse=True):
        rest = name.removeprefix(f"{arm}-")
        if rest == name:
            continue
        seed, _, sft = rest.partition("-")
        steps, _, rate = (sft or f"{STEPS}x{RATE}").partition("x")
        if seed.isdecimal() and steps.isdecimal() and rate:
            return arm, int(seed), int(steps), rate
    raise ValueError(f"{name} is no run: ARM-SEED, of {', '.join(ARMS)}; or ARM-SEED-STEPSxRATE")


def variants(name):
    """{suffix of a model's name: flags of its fine-tuning}"""
    arm, *_ = of_name(name)
    passes = [flag for flag in (ARMS[arm] or "").split() if flag.split("=")[0] in PASSES]
    extra = [flag for flag in passes if not flag.endswith("=0")]
    plain = ["--arl=0"]
    return {"": plain, "-same": extra} if extra else {"": plain}


def stages_of(name, args, rest):
    """
    -> flags of train.py that continue the model, None if nothing does; and {suffix: those of its
    fine-tunings}.
    """
    arm, seed, steps, rate = of_name(name)
    both = [f"--seed={seed}", f"--context_len={args.context_len}", f"--device={args.device}",
            "--eval_every=0", "--save_every=1000000", f"--out={args.out}", "--resume"]
    text, start = None, args.init
    if ARMS[arm] is not None:
        text = ["--recipe=continue", f"--init={args.init}", f"--data={args.data}",
                *ARMS[arm].split(), *both, f"--name={name}-text", *rest]
        start = Path(args.out) / f"{name}-text"
    tuned = {suffix: [*SFT.split(), f"--steps={steps}", f"--lr={rate}", f"--init={start}", *flags,
                      *both, f"--name={name}{suffix}", *rest]
             for suffix, flags in variants(name).items()}
    return text, tuned


def run_one(name, args, rest):
    """Train, fine-tune, ask and delete, unless the results are there."""
    text, tuned = stages_of(name, args, rest)
    missing = [suffix for suffix in tuned if not result_of(name + suffix, args).exists()]
    if not missing:
        print(f"{name}: done already, in {args.results}")
        return
    report = made_by(args.argv, "experiments/real_model.py", args.device)
    arm, seed, steps, rate = of_name(name)
    report |= {"arm": arm, "seed": seed, "init": Path(args.init).name}
    if text:
        folder = trained(text)
        report["text"] = record_of(folder) | on_held_out(folder, args)
    for suffix in missing:
        folder = trained(tuned[suffix])
        found = report | {"name": name + suffix, "sft": record_of(folder)}
        found |= on_held_out(folder, args)
        found |= ask(folder, name, args)
        files.save(found, result_of(name + suffix, args))
        print(line(found), flush=True)
    if not args.keep:
        for suffix in ["-text", *tuned]:
            shutil.rmtree(Path(args.out) / f"{name}{suffix}", ignore_errors=True)


def result_of(name, args):
    return Path(args.results) / f"{name}.json"


def trained(flags):
    """The folder of a run of train.py with these flags, which is there then."""
    settings = train.parse(flags)
    folder = Path(settings.out) / settings.name
    if not runs.finished(folder, flags):
        train.train(settings)
        gc.collect()  # its CUDA graphs, and their memory
    return folder


def record_of(folder):
    """How a model was trained: train.json of its newest checkpoint, and its losses."""
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    every = max(1, len(log) // 20)
    losses = {}
    for end in range(every, len(log) + 1, every):
        some = log[end - every:end]
        losses[end] = {key: round(statistics.fmean(entry[key] for entry in some), 4)
                       for key in ("loss", "arl_loss", "joint_loss") if key in some[0]}
    return {"train": runlog.training_record(folder), "losses": losses}


def on_held_out(folder, args):
    """Loss on held-out text, and the median and quartile lengths of each KV head's channels."""
    model = Transformer.from_pretrained(folder, torch.bfloat16, args.device)
    loss, lengths = on_text(model, args.data, args.context_len)
    found = {"held_out": loss}
    if lengths is not None:
        found["lengths"] = {str(q): rounded(lengths.quantile(q, dim=-1))
                            for q in (0.25, 0.5, 0.75)}
    return found


# ---------------------------------------------------------------- all that is asked

def ask(folder, name, args):
    """
    -> {"cells": {method: {task: RULER's score}}, and for fewer prompts "hits", "by_chance" ...}
    """
    arm, seed, *_ = of_name(name)
    if seed == DEVELOP:
        return {"grid": scores_in(evaluated(folder, "grid", args, DEVELOP, args.samples, GRID))}
    extreme = EXTREME.format(min(16, args.context_len // 256))
    nine = [method for of_kind in CELLS.values() for method in of_kind]
    report = evaluated(folder, "cells", args, EVAL, args.samples, [*nine, extreme])
    found = {"cells": scores_in(report), "prompts": reproduce.prompts_in(report),
             "samples": args.samples}
    keep_answers(folder / "cells", result_of(folder.name, args).with_suffix(".answers.xz"))
    if "x" in name.rpartition("-")[2]:  # of the curve
        return found

    # Why: with fewer prompts, as these are many questions.
    report = evaluated(folder, "why", args, EVAL, args.few, nine, "--hits", "--random=5")
    found["hits"] = {method: 100 * float(best_heads(rates))
                     for method, rates in reproduce.hit_rates(report).items()}
    found["by_chance"] = {method: score for method, score in reproduce.means(report).items()
                          if method.endswith(reproduce.BY_CHANCE)}
    return found | asked_besides(folder, args)


def evaluated(folder, what, args, seed, samples, methods, *more):
    """The report of eval_niah.py."""
    out = folder / what
    eval_niah.main(["--ckpt", str(folder), "--protocol=sft",
                    f"--context_len={args.context_len}",
                    f"--samples={samples}", f"--seed={seed}", f"--device={args.device}",
                    f"--batch={args.eval_batch}", f"--out={out}", "--methods", *methods, *more])
    return files.load(out / "results.json", "results")


def scores_in(report):
    """{method: {task: RULER's score in percent}}"""
    found = {}
    for row in report["results"]:
        if row["random"] is None:
            found.setdefault(row["method"], {})[row["task"]] = row["ruler"][0]
    return found


def asked_besides(folder, args):
    """Frozen draws, the oracle and the swap: methods that no command line names."""
    return {}


def keep_answers(folder, file):
    """What was written for each prompt, in a file of few bytes."""
    rows = [[task, method, example, line.told["text"]]
            for (_, task, method), of_method in read_lines(folder).items()
            for example, line in sorted(of_method.items()) if "text" in line.told]
    file.parent.mkdir(parents=True, exist_ok=True)
    with lzma.open(file, "wt") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)


# ---------------------------------------------------------------- all runs, and the tables

def line(found):
    cells = found.get("cells", found.get("grid"))
    words = " ".join(f"{mean(of.values()):5.1f}" for of in cells.values())
    return f"{found['name']:24} held out {found['held_out']:.4f}   {words}"


def run_all(args, rest):
    names = args.runs or [name for stage in args.stages for name in STAGES[stage]]
    if names and not (args.init and args.data):
        raise ValueError("--init and --data: a run needs the model and the text")
    if args.runs and len(names) == 1:
        run_one(names[0], args, rest)
        return

    def job(name):
        words = ["experiments/real_model.py", f"--init={args.init}", f"--data={args.data}",
                 f"--samples={args.samples}", f"--few={args.few}", f"--eval_batch={args.eval_batch}", f"--context_len={args.context_len}",
                 f"--out={args.out}", f"--results={args.results}", f"--runs={name}", *rest]
        return lambda call: call(words, Path(args.out) / f"{name}.log")

    runs.on_all_gpus([job(name) for name in names], args.per_gpu)
    for file in sorted(Path(args.results).glob("*.json")):
        print(line(files.load(file, "name", "held_out")))


def flags():
    parser = flag_parser("real_model.py", "A memory for a real language model, and its controls; "
                         "flags not named here go to train.py.")
    add = parser.add_argument
    add("--init", metavar="PATH", help="the pretrained model")
    add("--data", metavar="DIR", help="token shards, as data.py writes them")
    add("--stages", nargs="+", choices=STAGES, default=["none"], metavar="STAGE",
        help="of the plan: " + ", ".join(STAGES))
    add("--runs", nargs="+", type=named, metavar="RUN", help="these instead: ARM-SEED")
    add("--samples", type=positive, default=100, help="prompts of each task")
    add("--few", type=positive, default=25, help="prompts of each task for all that asks why")
    add("--eval_batch", type=positive, default=50, help="prompts at a time")
    add("--context_len", type=positive, default=4096, metavar="TOKENS",
        help="of the text, the fine-tuning and the prompts")
    add("--per_gpu", type=positive, default=1, metavar="RUNS", help="runs at a time on each GPU")
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
