"""
What the memory needs, one line each: models made alike (reproduce.py's memory arm) but for one
thing, and asked alike.

    memory        Eq. 1, trained with ARL
    no-arl        the same, trained without ARL's pass
    keys-only     v~[t] = v[t]
    values-only   k~[t] = k[t]
    head-gate     one g[t] for all channels of a KV head
    fixed-decay   g = 1 - 1/L, whatever the input

    python -m experiments.ablations --seeds 0 1 2        train and compare all, --per_gpu at a time
                                                         on each visible GPU
    python -m experiments.ablations --run keys-only-0    one of them, here; flags that are not known
                                                         to this file go to train.py
    python -m experiments.ablations --variants           none: the table of results/ablations
    python -m experiments.ablations --lengths CKPT       how far back a trained memory reaches
    python -m experiments.ablations --lm_loss CKPT ...   loss on text that training never saw

Each is a memory of experiments/memories.py, or of memory.py, under another name in a result.
Results from before those were classes are of the same functions; what differs since is that a fixed
decay has no parameters, and that a checkpoint knows what it is.

Checked in tests/test_ablations.py. Read experiments/memories.py first.
"""
import argparse
import gc
import importlib
import inspect
import shutil
import statistics
import sys
from pathlib import Path

import torch
from torch.nn import functional as F

import eval_niah
import niah
import train
from data import tokenizer_of
from experiments import memories  # noqa: F401  puts its classes into memory.MEMORIES
from experiments import reproduce, runs
from infra import cli, files, runlog, weights
from infra.report import pyplot
from memory import lengths_of
from model import Transformer

EVAL_SEED = 0  # of the examples: the same for all

# Of each variant the name in memory.MEMORIES, and flags of train.py.
VARIANTS = {
    "memory": ("decay", []),
    "no-arl": ("decay", ["--arl=0"]),
    "keys-only": ("keys", []),
    "values-only": ("values", []),
    "head-gate": ("head-gate", []),
    "fixed-decay": ("fixed-decay", []),
}


# ---------------------------------------------------------------- one run: train, evaluate

def named(text):
    """A flag's run, VARIANT-SEED: (variant, seed)."""
    variant, _, seed = text.rpartition("-")
    if variant not in VARIANTS or not seed.isdecimal():
        known = ", ".join(VARIANTS)
        raise argparse.ArgumentTypeError(f"{text} is no run: VARIANT-SEED, of {known}")
    return variant, int(seed)


def folder_of(variant, seed, args):
    return Path(args.out) / f"ablation-{variant}-{seed}"


def result_of(variant, seed, args):
    return Path(args.results) / "ablations" / f"{variant}-{seed}.json"


def stages_of(variant, seed, args, rest):
    """{folder: flags of train.py}: reproduce.py's memory arm."""
    memory, more = VARIANTS[variant]
    pretraining = ["--recipe=micro", f"--memory={memory}"]
    return runs.stages(folder_of(variant, seed, args), pretraining, seed, [*rest, *more])


def check(variant, seed, args, rest):
    """ValueError for a flag that this run cannot have. -> the settings of its two stages"""
    if Path(args.results).exists() and not Path(args.results).is_dir():
        raise ValueError(f"--results {args.results} is no folder")
    return [train.parse(flags) for flags in stages_of(variant, seed, args, rest).values()]


def run_one(variant, seed, args, rest):
    """
    Train and evaluate, unless that is done: with checkpoints in --out, and a result that is theirs.
    It holds what the table tells, and how it was made.
    """
    run, result = folder_of(variant, seed, args), result_of(variant, seed, args)
    settings = check(variant, seed, args, rest)
    there = read(result) if result.exists() else None  # if damaged, that is known before training
    for (folder, flags), stage in zip(stages_of(variant, seed, args, rest).items(), settings):
        if not runs.finished(folder, flags):
            train.train(stage)

    checkpoint, made, device = weights.resolve(run), runlog.training_record(run), settings[1].device
    prompts_now = runs.prompts_of(settings[1], args.samples, EVAL_SEED)
    if there and there["train"] == made and there["prompts"] == prompts_now:
        print(f"{run}: done already, {result}")
        return
    if there:  # a result of another model, or of other prompts: so are the answers
        shutil.rmtree(run / "niah", ignore_errors=True)
    gc.collect()  # the training's CUDA graphs, and their memory
    # --kernels=torch, as for the results that are there
    eval_niah.main(["--ckpt", str(run), f"--samples={args.samples}", f"--seed={EVAL_SEED}",
                    f"--batch={args.eval_batch}", f"--device={device}", "--kernels=torch",
                    f"--out={run / 'niah'}", f"--json={run / 'niah.json'}"])
    model = Transformer.from_pretrained(checkpoint, torch.float32, device)
    median_length = lengths(model, prompts(model, checkpoint)).median().item()
    report = files.load(run / "niah.json")
    scores = {}
    for method, mean in reproduce.means(report).items():
        rows = [row for row in report["results"] if row["method"] == method]
        scores[method] = {"mean": mean, "tasks": {row["task"]: row["ruler"] for row in rows}}
    asked = {key: report[key] for key in ("commit", "device", "torch", "settings")}
    save(result, args.argv, {"variant": variant, "seed": seed, "scores": scores,
                             "median_length": median_length,
                             "prompts": reproduce.prompts_in(report),
                             "checkpoint": str(checkpoint), "train": made, "eval": asked})
    print(f"result in {result}")


# ---------------------------------------------------------------- all of them, and the table

def run_all(args, rest):
    """A process for each run, then the table of all results. ValueError as soon as one fails."""
    wanted = [(variant, seed) for seed in dict.fromkeys(args.seeds)
              for variant in dict.fromkeys(args.variants)]
    if rest and not wanted:
        raise ValueError(f"{rest[0]} means nothing to a table: name --variants to train")

    # A wrong flag, a damaged file, or results that could not be compared: all that is known now.
    for variant, seed in wanted:
        settings = check(variant, seed, args, rest)
    if wanted:
        there = {(variant, seed): (file, read(file)["prompts"])
                 for variant, seed, file in result_files(args)}
        others = dict(of for run, of in there.items() if run not in wanted)
        runs.refuse_other_prompts(others, runs.prompts_of(settings[1], args.samples, EVAL_SEED))

    flags = [f"--samples={args.samples}", f"--eval_batch={args.eval_batch}", f"--out={args.out}",
             f"--results={args.results}", *rest]

    def job(variant, seed):
        command = ["experiments/ablations.py", f"--run={variant}-{seed}", *flags]
        return lambda call: call(command, folder_of(variant, seed, args).with_suffix(".log"))

    runs.on_all_gpus([job(*run) for run in wanted], args.per_gpu)
    found = read_all(args)
    if not found:
        raise ValueError(f"{args.results}/ablations holds no result: name --variants to make some")
    print(f"\n{table(found)}\n\nof {args.results}/ablations")


def result_files(args):
    """(variant, seed, file) of each result that is there."""
    return runs.result_files(Path(args.results) / "ablations", VARIANTS)


def read(file):
    """The record that run_one saved."""
    return files.load(file, "scores", "prompts", "median_length", "train", "eval")


def read_all(args):
    """{variant: {seed: record}} of what is there. ValueError unless all were asked alike."""
    found, first = {}, None
    for variant, seed, file in result_files(args):
        record = read(file)
        asked = record["prompts"], list(record["scores"])
        first = first or (file, asked)
        if asked != first[1]:
            raise ValueError(f"{file} was asked otherwise than {first[0]}: move one of them away, "
                             "and run again")
        found.setdefault(variant, {})[seed] = record
    return found


def table(found):
    """A line per variant: mean over its seeds, and their standard deviation."""
    row = lambda words: "".join(f"{word:>10}" for word in words)
    kinds = row(["dense", "quest", "", "", "moba", "", "", "snapkv", "", ""])
    lines = [f"{'':12}{'seeds':>6}{kinds}{'length':>8}",
             f"{'':18}{row(['', *eval_niah.BUDGETS * 3])}"]
    for variant, records in found.items():
        means = [{method: of["mean"] for method, of in record["scores"].items()}
                 for record in records.values()]
        by_method = reproduce.transpose(means)
        length = statistics.fmean(record["median_length"] for record in records.values())
        cells = row(reproduce.cell(values, plus_minus="±") for values in by_method.values())
        lines.append(f"{variant:12}{len(records):6}{cells}{length:8.1f}")
    return "\n".join([*lines, "RULER's score, %: mean of tasks and of seeds, ± the seeds' standard "
                      "deviation", "length: tokens that a channel's memory averages over, median "
                      "of all channels"])


# ---------------------------------------------------------------- how far back a memory reaches

@torch.no_grad()
def lengths(model, tokens):
    """memory.effective_length of every channel as the model reads (B, T): (layers, KV, D)."""
    with lengths_of(model) as found:
        model.hidden(tokens)
    return torch.stack(found)


def prompts(model, path):
    """
    A prompt of each needle task that the model was trained on, or that fits: (tasks, T), cut to the
    shortest one's end.
    """
    settings, context_len = runlog.trained_with(path), model.config.context_len
    tokenizer, protocol = load_tokenizer(model, path), settings.get("protocol", "base")
    n_new = niah.default_new_tokens(context_len, tokenizer)
    tasks = settings.get("tasks") or niah.fitting_tasks(context_len, tokenizer, protocol, n_new)
    if not tasks:
        raise ValueError(f"no needle task fits into {path}'s context of {context_len} tokens")
    ids = [niah.make_example(task, context_len, tokenizer, seed=0, index=0, protocol=protocol,
                             max_new_tokens=n_new).ids for task in tasks]
    T = min(map(len, ids))
    return torch.tensor([row[:T] for row in ids], device=model.embed_tokens.weight.device)


def show_lengths(path, args):
    """A table, lengths.json and lengths.png."""
    model = loaded(path)
    if not model.config.memory:
        raise ValueError(f"{path} has no memory whose length could be measured")
    found = lengths(model, prompts(model, path)).cpu()
    rounded = [[[round(x, 3) for x in head] for head in layer] for layer in found.tolist()]
    save(Path(args.results) / "lengths.json", args.argv, {
        "checkpoint": path, "train": runlog.training_record(path), "lengths": rounded})
    print(f"{path}: tokens that a memory averages over, median of a KV head's {found.shape[2]} "
          "channels")
    print("layer     " + "".join(f"{f'head {h}':>9}" for h in range(found.shape[1])))
    for i, of_layer in enumerate(found.median(dim=2).values.tolist()):
        print(f"{i:5}     " + "".join(f"{length:9.1f}" for length in of_layer))
    if not (plt := pyplot()):
        return
    figure, axes = plt.subplots(1, len(found), figsize=(1 + 2.5 * len(found), 3.5), sharey=True,
                                squeeze=False)
    for i, (axis, of_layer) in enumerate(zip(axes[0], found)):
        # whiskers: least and greatest
        axis.boxplot(of_layer.T.numpy(), positions=range(found.shape[1]), whis=(0, 100))
        axis.set(title=f"layer {i}", xlabel="KV head", yscale="log")
    axes[0, 0].set_ylabel("effective length, tokens")
    figure.tight_layout()
    figure.savefig(Path(args.results) / "lengths.png", dpi=150)
    print(f"plot in {args.results}/lengths.png")


# ---------------------------------------------------------------- loss on other text

# Needles lie in essays of pydoc_data.topics, the reference manual inside Python: docstrings are
# other text of the same kind
MODULES = """argparse bisect calendar collections configparser contextlib copy csv dataclasses
    datetime decimal difflib enum fractions functools heapq inspect io ipaddress
    itertools json locale logging math operator os pathlib pickle queue random re
    secrets shelve shutil socket statistics string struct subprocess tempfile textwrap
    threading time timeit traceback types uuid weakref zipfile""".split()


def docstrings():
    """
    Those of MODULES and of their public classes and functions, in order of name: the same for the
    same Python version.
    """
    texts = []
    for module in map(importlib.import_module, MODULES):
        public = [thing for name, thing in sorted(vars(module).items())
                  if (inspect.isclass(thing) or inspect.isroutine(thing))
                  and not name.startswith("_") and thing.__module__ == module.__name__]
        texts += [inspect.getdoc(thing) for thing in [module, *public]]
    # once each, as a class without a docstring has its base's
    return "\n\n".join(text for text in dict.fromkeys(texts) if text)


@torch.no_grad()
def lm_loss(model, tokenizer, n_windows=64):
    """Nats per token of docstrings(): mean of its first n_windows windows of the context."""
    T = model.config.context_len
    ids = torch.tensor(tokenizer.encode(docstrings()), device=model.embed_tokens.weight.device)
    if len(ids) <= T:
        raise ValueError(f"the text has {len(ids)} tokens, too few for one window of {T}")
    windows = ids.unfold(0, T + 1, T + 1)[:n_windows]  # (N, T + 1)
    losses = [F.cross_entropy(model(row[None, :-1])[0].float(), row[1:]) for row in windows]
    return torch.stack(losses).mean().item()


def show_lm_loss(paths, args):
    """A line per model, and lm-loss.json."""
    losses = {}
    version = sys.version.split()[0]
    print(f"nats per token of docstrings of {len(MODULES)} modules, Python {version}; a token is "
          "what the model's tokenizer makes of them")
    for path in paths:
        model = loaded(path)
        losses[path] = lm_loss(model, load_tokenizer(model, path))
        T = model.config.context_len
        print(f"{path:40} {losses[path]:.4f}   windows of {T} tokens", flush=True)
    records = {path: runlog.training_record(path) for path in paths}
    save(Path(args.results) / "lm-loss.json", args.argv, {
        "python": version, "nats_per_token": losses, "train": records})


# ---------------------------------------------------------------- python -m experiments.ablations

def save(path, argv, results):
    """results, and how they were made."""
    command = cli.command_line(argv, "experiments/ablations.py")
    files.save({"command": command, "commit": cli.commit(), "torch": torch.__version__, **results},
               path)


def load_tokenizer(model, path):
    return tokenizer_of(weights.resolve(path), model.config.vocab_size)


def loaded(path):
    """A model, in fp32."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Transformer.from_pretrained(path, torch.float32, device)


def flags():
    parser = cli.flag_parser("ablations.py", "What the memory needs: variants of the small model, "
                             "trained and compared. Flags not named here go to train.py.")
    add = parser.add_argument
    # what to do; with none of these: train and compare --variants
    add("--run", type=named, metavar="VARIANT-SEED",
        help="this one alone, in this process, on its first GPU")
    add("--lengths", metavar="CKPT",
        help="effective length of each channel of this model, as a table, lengths.json and .png")
    add("--lm_loss", nargs="+", metavar="CKPT", help="these models' loss on Python's docstrings, "
        "in nats per token, also in lm-loss.json")
    # of what
    add("--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS), metavar="NAME",
        help=f"{', '.join(VARIANTS)}; none: only the table")
    add("--seeds", nargs="+", type=cli.natural, default=[0],
        help="of weights and training data; the evaluation's examples are always the same")
    add("--samples", type=cli.positive, default=100, help="examples per task")
    add("--eval_batch", type=cli.positive, default=64, help="prompts at a time in the evaluation")
    add("--per_gpu", type=cli.positive, default=1, metavar="RUNS",
        help="runs at a time on each GPU")
    # where to
    add("--out", default="out/ablations", metavar="DIR",
        help="folder of the runs, ablation-VARIANT-SEED; one that is there goes on")
    add("--results", default="results", metavar="DIR", help="where JSON and plot go, that of the "
        "runs in DIR/ablations; the table is made of all that are there")
    return parser


def main(argv=None):
    parser = flags()
    args, rest = parser.parse_known_args(argv)
    args.argv = argv
    if rest and (args.lengths or args.lm_loss):
        parser.error(f"--lengths and --lm_loss train nothing: {rest[0]} means nothing to them")
    try:
        if args.lengths:
            show_lengths(args.lengths, args)
        if args.lm_loss:
            show_lm_loss(args.lm_loss, args)
        if args.run:
            run_one(*args.run, args, rest)
        elif not (args.lengths or args.lm_loss):
            run_all(args, rest)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        parser.error(error)
    except KeyboardInterrupt:
        parser.exit(130, "\nablations.py: interrupted; the same command goes on\n")


if __name__ == "__main__":
    main()
