"""
How does a pretrained model come to have a memory? Conversions of one model, which differ in where
the gates start and in a few flags of train.py, on the same text in the same order.

    for each conversion of PLAN:
        starts.py  ->  out/conversion/start-...   --init with a memory whose gates start so
        train.py   ->  out/conversion/NAME        that, continued on --data
        measure    ->  results/conversion/NAME.json; out/conversion/NAME is deleted

Two numbers decide, and no needle is asked for: the loss on text held out, compared with the
controls that took as many optimizer steps without a memory; and how many KV heads have a memory
whose median channel averages over 16 tokens or more (memory.effective_length), on the same text.
A third tells whether a memory is of use: the loss when all gates are shut.

    python -m experiments.conversion --init SMOLLM2 --data SHARDS                all that is missing
    python -m experiments.conversion --init SMOLLM2 --data SHARDS --runs NAME    one of them, here
    python -m experiments.conversion                                             table and plot

Checked in tests/test_conversion.py. docs/real-model-plan.md has the plan. Read starts.py before,
and real_model.py next, which asks the models that are made so.

Letters: B batch, T tokens, KV key/value heads, D head width.
"""
import json
import math
import shutil
from dataclasses import astuple
from pathlib import Path

import torch

import train
from data import Shards
from experiments import runs
from experiments.starts import Start, started
from infra import files, runlog
from infra.cli import command, flag_parser, made_by, positive, usable_device
from infra.report import mean, pyplot
from memory import lengths_of
from model import Transformer

LONG = 16    # tokens: a head is long if the median length of its channels is as much

# What all have in common: 25M tokens, 16 sequences of 4,096 a step. Recipe `continue` becomes what
# is found here, and this stays.
COMMON = ("--context_len=4096 --batch=16 --steps=381 --lr=5e-4 --memory_lr=5e-4 --warmup=0.05 "
          "--weight_decay=0.1")

# Flags of train.py that are no user's, as the conversions, or real_model's arms, differ in them.
OURS = (*runs.OURS, "--arl", "--arl_weight", "--joint", "--lr", "--memory_lr")

PLAIN = Start(kind=None)  # of the controls: turned as for 32 tokens, and without a memory

# Where the gates start (None: --init as it is, and as the flags say), and flags of train.py.
PLAN = {
    # controls
    "joint": (PLAIN, "--memory=off --joint=64"),
    "dilated": (PLAIN, "--memory=off --arl=64"),
    "dilated-light": (PLAIN, "--memory=off --arl=64 --arl_weight=0.1"),
    # the paper's way, and RAT+'s first gates
    "half": (None, "--memory=on --arl=64 --gate_start=0.5 --memory_lr=5e-3"),
    # long from the start where that costs least
    "third": (Start(), "--arl=64"),
    "third-slow": (Start(), "--arl=64 --memory_lr=1e-4"),
    "third-slow-joint": (Start(), "--arl=0 --joint=64 --memory_lr=1e-4"),
    "third-slow-light": (Start(), "--arl=64 --arl_weight=0.1 --memory_lr=1e-4"),
    "third-20-slower-light": (Start(heads=0.35, length=20),
                              "--arl=64 --arl_weight=0.1 --memory_lr=3e-5"),
    "third-18-slowest-light": (Start(heads=0.34, length=18),
                               "--arl=64 --arl_weight=0.1 --memory_lr=1e-5"),
    "two-thirds-slow-light": (Start(heads=0.7), "--arl=64 --arl_weight=0.1 --memory_lr=1e-4"),
    # keys or values alone
    "third-keys-slow-light": (Start(kind="keys"), "--arl=64 --arl_weight=0.1 --memory_lr=1e-4"),
    "third-values-slow-light": (Start(kind="values"),
                                "--arl=64 --arl_weight=0.1 --memory_lr=1e-4"),
    # a rate nearer to pretraining's
    "joint-2e-3": (PLAIN, "--memory=off --joint=64 --lr=2e-3"),
    "third-slow-light-2e-3": (Start(), "--arl=64 --arl_weight=0.1 --lr=2e-3 --memory_lr=1e-4"),
}


# ---------------------------------------------------------------- one conversion

@torch.no_grad()
def on_text(
    model,
    data,              # a folder of shards, of which train.py holds out the last windows
    context_len=4096,
    windows=128,       # at most so many of them
    batch=8,           # windows at a time
):                     # -> nats per token; effective length in tokens of each channel of the
                       #    memory (layers, KV, D), None without one
    shards = Shards(data, context_len, seed=0, split="val")
    device, n = model.embed_tokens.weight.device, min(windows, len(shards))
    total, lengths = 0.0, []
    for first in range(0, n, batch):
        rows = [torch.from_numpy(shards.sample(i)) for i in range(first, min(first + batch, n))]
        tokens = torch.stack(rows).to(device)  # (B, T + 1)
        with lengths_of(model) as found:
            loss, _ = model.score(tokens, torch.ones(tokens.shape, device=device))
        total += float(loss)
        if found:
            lengths.append(torch.stack(found) * len(rows))  # the last batch may have fewer
    return total / (n * context_len), (sum(lengths) / n).cpu() if lengths else None


@torch.no_grad()
def shut(model):
    """The model with all gates of its memory at 0: k~ is k, and v~ is v."""
    for layer in model.layers:
        layer.self_attn.memory.proj.weight.zero_()
        layer.self_attn.memory.proj.bias.fill_(-30)
    return model


def measured(folder, data, context_len, device):
    """
    A model that was trained, on held-out text: {"held_out": nats per token}; and of a Decay
    "lengths", in tokens, and "shut", the loss without it.
    """
    model = Transformer.from_pretrained(folder, torch.bfloat16, device)
    loss, lengths = on_text(model, data, context_len)
    found = {"held_out": loss}
    if lengths is not None:
        found["lengths"] = quartiles(lengths)
    if lengths is not None and hasattr(model.layers[0].self_attn.memory, "proj"):
        found["shut"], _ = on_text(shut(model), data, context_len)  # a fixed decay has no gate
    return found


def quartiles(lengths):
    """{"0.25": [[of each KV head's channels] of each layer], "0.5": ..., "0.75": ...}"""
    return {str(q): [[round(x, 2) for x in heads] for heads in lengths.quantile(q, -1).tolist()]
            for q in (0.25, 0.5, 0.75)}


def losses(folder, points=20):
    """
    {step: {"loss": mean of the steps up to it, a twentieth of all, "arl_loss" or "joint_loss":
    likewise}}, without the steps that were skipped. The last two may overlap.
    """
    log = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    found, every = {}, max(1, len(log) // points)
    for end in [*range(every, len(log), every), len(log)]:
        some = log[max(0, end - every):end]
        of_keys = {key: mean(entry.get(key) for entry in some)
                   for key in ("loss", "arl_loss", "joint_loss")}
        found[end] = {key: round(value, 4) for key, value in of_keys.items() if value is not None}
    return found


def folder_of(start, args):
    kind, *numbers = astuple(start)
    return "-".join([f"{args.out}/start", kind or "plain", *(f"{x:g}" for x in numbers)])


def flags_of(name, args, rest):
    """Of train.py. ValueError if the user's `rest` has a flag in which the conversions differ."""
    start, flags = PLAN[name]
    init = folder_of(start, args) if start else args.init
    return [*COMMON.split(), f"--init={init}", f"--data={args.data}", f"--device={args.device}",
            *flags.split(), f"--context_len={args.context_len}", "--save_every=1000000",
            "--eval_every=0", f"--out={args.out}", f"--name={name}", "--resume",
            *runs.passed_on(rest, OURS)]


def is_done(name, args):
    """Whether the result is there. ValueError if it is damaged, or --results is no folder."""
    folder, file = Path(args.results), Path(args.results) / f"{name}.json"
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--results {folder} is no folder: choose another")
    return file.exists() and bool(files.load(file, "name", "held_out", "losses"))


def run_one(name, args, rest):
    """Train and measure, unless the result is there."""
    result, run = Path(args.results) / f"{name}.json", Path(args.out) / name
    if is_done(name, args):
        print(f"{name}: done already, {result}")
        return
    report = made_by(args.argv, "experiments/conversion.py", args.device)
    flags = flags_of(name, args, rest)
    settings = train.parse(flags)  # a wrong flag is known now, not after the start is found
    if start := PLAN[name][0]:
        started(start, args.init, args.data, settings.init, args.device, args.context_len)
        report["start"] = files.load(Path(settings.init) / "start.json")
    if not runs.finished(run, flags):
        train.train(settings)
    report |= {"name": name, "flags": PLAN[name][1], "train": runlog.training_record(run),
               "losses": losses(run), **measured(run, args.data, args.context_len, args.device)}
    files.save(report, result)
    print(f"{name}: {report['held_out']:.4f} nats per token of held-out text, in {result}",
          flush=True)
    if not args.keep:
        shutil.rmtree(run, ignore_errors=True)


# ---------------------------------------------------------------- table and plot

def medians(report):
    """The median length of each KV head's channels, ascending."""
    return sorted(x for layer in report.get("lengths", {}).get("0.5", []) for x in layer)


def of_a_third(report):
    """Tokens that a third of the KV heads' medians have or exceed."""
    heads = medians(report)
    return heads[-math.ceil(len(heads) / 3)]


def above(report, reports):
    """By how many percent the loss held out is above that of `joint` with as many steps of the same
    size and rate; nan if it is not among the reports."""
    alike = lambda of: [of["train"]["settings"][key] for key in ("steps", "batch", "context_len",
                                                                 "lr", "data")]
    for other in reports:
        if other["name"].startswith("joint") and alike(other) == alike(report):
            return 100 * (report["held_out"] / other["held_out"] - 1)
    return math.nan


def line(report, percent):
    """A conversion as a line of the table."""
    heads, last = medians(report), list(report["losses"].values())[-1]
    extra = last.get("arl_loss", last.get("joint_loss"))
    words = f"{report['name']:27}{report['held_out']:9.4f}"
    words += f"{'-':>9}" if math.isnan(percent) else f"{percent:+9.2f}"
    for loss in report.get("shut"), last["loss"], extra:
        words += f"{'-':>9}" if loss is None else f"{loss:9.4f}"
    if heads:
        long = sum(x >= LONG for x in heads)
        words += f"{long:6} of {len(heads):2}{of_a_third(report):9.1f}{heads[-1]:9.1f}"
    return words


def tell(args):
    """A table of the results that are there, and a plot."""
    there = sorted(file.stem for file in Path(args.results).glob("*.json"))
    names = [name for name in PLAN if name in there]
    names += [name for name in there if name not in PLAN]
    if not names:
        raise ValueError(f"{args.results} holds no result: give --init and --data to make some, or "
                         "--results")
    load = lambda name: files.load(Path(args.results) / f"{name}.json",
                                   "name", "held_out", "losses", "train")
    reports = [load(name) for name in names]
    print(f"{'':27}" + "".join(f"{head:>9}" for head in ("held out", "joint, %", "shut", "dense",
                                                         "first"))
          + f"{'long heads':>12}{'a third':>9}{'most':>9}")
    for report in reports:
        print(line(report, above(report, reports)))
    print("nats per token: of held-out text, and how much that is above `joint`; with the memory's "
          "gates shut; the last dense steps, and the first steps beside them. A head's length is "
          "the median of its channels, in tokens; a third of the heads have so many or more")
    plot(reports, Path(args.results) / "conversions.png")


def plot(reports, file):
    """
    Left what each conversion costs, right how long its memory is. -> the figure; None without
    matplotlib.
    """
    if not (plt := pyplot()):
        return None
    figure, (cost, length) = plt.subplots(1, 2, figsize=(11, 4.2))
    for i, report in enumerate(reports):
        color = plt.get_cmap("tab20")(i % 20)
        cost.barh([i], [above(report, reports)], color=color)
        if heads := medians(report)[::-1]:
            length.plot(range(1, len(heads) + 1), heads, color=color)
    cost.set(yticks=range(len(reports)), yticklabels=[report["name"] for report in reports],
             xlabel="held-out loss above joint, %")
    cost.invert_yaxis()
    length.set(yscale="log", xlabel="KV head, longest first", ylabel="median length, tokens")
    cost.axvline(1, color="grey", ls=":")      # what is wanted: within 1 %,
    length.axhline(LONG, color="grey", ls=":")  # and a third of the heads above
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    print(f"plot in {file}")
    return figure


# ---------------------------------------------------------------- python -m experiments.conversion

def run_all(args, rest):
    if not (args.init and args.data):
        if rest:
            raise ValueError(f"{rest[0]}: no flag of ours, and without --init and --data there is "
                             "no run to pass it on to")
        if args.init or args.data or args.runs:
            raise ValueError("--init and --data: a conversion needs a model and text")
        tell(args)
        return
    names = list(dict.fromkeys(args.runs or PLAN))
    if len(names) == 1:
        run_one(names[0], args, rest)
        return

    def job(name):
        words = ["experiments/conversion.py", f"--init={args.init}", f"--data={args.data}",
                 f"--context_len={args.context_len}", f"--device={args.device}",
                 *["--keep"] * args.keep, f"--out={args.out}", f"--results={args.results}",
                 f"--runs={name}", *rest]
        return lambda call: call(words, Path(args.out) / f"{name}.log")

    left = [name for name in names if not is_done(name, args)]
    for name in left:  # a wrong flag is known now
        train.parse(flags_of(name, args, rest))
    # before several runs want the same
    for start in filter(None, dict.fromkeys(PLAN[name][0] for name in left)):
        started(start, args.init, args.data, folder_of(start, args), args.device, args.context_len)
    if args.device.startswith("cuda"):
        torch.cuda.empty_cache()  # a run in another process counts on all of its GPU
    runs.on_all_gpus([job(name) for name in left])
    tell(args)


def flags():
    parser = flag_parser("conversion.py", "Conversions of a pretrained model; flags not named here "
                         "go to train.py.")
    add = parser.add_argument
    add("--init", metavar="PATH", help="the pretrained model")
    add("--data", metavar="DIR", help="token shards, as data.py writes them")
    add("--runs", nargs="+", choices=PLAN, metavar="NAME", help=f"of {', '.join(PLAN)}; None: all")
    add("--context_len", type=positive, default=4096, metavar="TOKENS", help="of a sequence")
    add("--keep", action="store_true", help="keep the models")
    add("--device", type=usable_device, default="cuda" if torch.cuda.is_available() else "cpu",
        help="cuda or cpu")
    add("--out", default="out/conversion", metavar="DIR", help="folder of the models and logs")
    add("--results", default="results/conversion", metavar="DIR", help="folder of the results")
    return parser


def main(argv=None):
    args, rest = flags().parse_known_args(argv)
    args.argv = argv
    command("conversion.py", lambda: run_all(args, rest),
            interrupted="interrupted; the same command goes on")


if __name__ == "__main__":
    main()
