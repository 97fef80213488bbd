"""
How does a pretrained model come to have a memory? Conversions of one model, which differ in a few
flags of train.py each, on the same text in the same order.

    for each conversion of PLAN:
        train.py   ->  out/conversion/NAME         --init continued on --data
        measure    ->  results/conversion/NAME.json

Two numbers decide, and no needle is asked for: the loss on text held out, compared with the control
that took as many optimizer steps without a memory; and how many KV heads have a memory whose median
channel averages over 16 tokens or more (memory.effective_length), on the same text.

    python -m experiments.conversion --init SMOLLM2 --data SHARDS                all that is missing
    python -m experiments.conversion --init SMOLLM2 --data SHARDS --runs NAME    one of them, here

Checked in tests/test_conversion.py. docs/real-model.md tells what was found. Read real_model.py
next, which asks the models that are made so.
"""
import json
import statistics
from pathlib import Path

import torch

import train
from data import Shards
from experiments import memories  # noqa: F401  puts its classes into memory.MEMORIES
from experiments import runs
from infra import files, runlog
from infra.cli import command, flag_parser, made_by, positive, usable_device
from memory import lengths_of
from model import Transformer

LONG = 16  # tokens: a head counts as long from this median length of its channels on

# What all have in common: 25M tokens, 16 sequences of 4,096 a step.
COMMON = "--context_len=4096 --batch=16 --steps=381 --warmup=0.05 --weight_decay=0.1"

ARL = "--memory=on --arl=64"
PLAN = {
    "joint-5e-4": "--joint=64 --lr=5e-4",
    "half-5e-4-gates-5e-3": f"{ARL} --gate_start=0.5 --lr=5e-4 --memory_lr=5e-3",
    "spread64-5e-4": f"{ARL} --gate_start=0.02,0.984 --lr=5e-4 --memory_lr=5e-4",
    "spread256-5e-4": f"{ARL} --gate_start=0.02,0.996 --lr=5e-4 --memory_lr=5e-4",
    "spread4-64-5e-4": f"{ARL} --gate_start=0.75,0.984 --lr=5e-4 --memory_lr=5e-4",
    "all16-5e-4": f"{ARL} --gate_start=0.94 --lr=5e-4 --memory_lr=5e-4",
    "fixed-5e-4": "--memory=fixed-decay --arl=64 --lr=5e-4",
    "spread256-values-5e-4":
        "--memory=values --arl=64 --gate_start=0.02,0.996 --lr=5e-4 --memory_lr=5e-4",
    "joint-2e-3": "--joint=64 --lr=2e-3",
    "spread256-2e-3": f"{ARL} --gate_start=0.02,0.996 --lr=2e-3 --memory_lr=5e-4",
}


# ---------------------------------------------------------------- one conversion

@torch.no_grad()
def on_text(
    model,
    data,              # a folder of shards: the windows that train.py holds out
    context_len=4096,
    windows=128,
    batch=8,           # windows at a time
):
    """
    -> nats per token of the text; and the effective length in tokens of every channel of the
    memory, (layers, KV, D), None without one.
    """
    shards, device = Shards(data, context_len, seed=0, split="val"), model.embed_tokens.weight.device
    n = min(windows, len(shards))
    total, lengths = 0.0, []
    for start in range(0, n, batch):
        rows = [torch.from_numpy(shards.sample(i)) for i in range(start, min(start + batch, n))]
        tokens = torch.stack(rows).to(device)  # (batch, context_len + 1)
        weight = torch.ones(tokens.shape, device=device)
        with lengths_of(model) as found:
            loss, _ = model.score(tokens, weight)
        total += float(loss)
        if found:
            lengths.append(torch.stack(found))
    lengths = torch.stack(lengths).mean(0).cpu() if lengths else None
    return total / (n * context_len), lengths


def flags_of(name, args, rest):
    return [*COMMON.split(), f"--init={args.init}", f"--data={args.data}", f"--device={args.device}",
            *PLAN[name].split(), *rest, "--save_every=100000", "--eval_every=127",
            f"--out={args.out}", f"--name={name}", "--resume"]


def run_one(name, args, rest):
    """Train and measure, unless the result is there."""
    result = Path(args.results) / f"{name}.json"
    if result.exists():
        print(f"{name}: done already, {result}")
        return
    flags, run = flags_of(name, args, rest), Path(args.out) / name
    if not runs.finished(run, flags):
        train.train(train.parse(flags))
    model = Transformer.from_pretrained(run, torch.bfloat16, args.device)
    loss, lengths = on_text(model, args.data)
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    report = made_by(args.argv, "experiments/conversion.py", args.device)
    report |= {"name": name, "flags": PLAN[name], "train": runlog.training_record(run),
               "held_out": loss, "losses": thinned(log)}
    report["layers"] = {entry["step"]: entry["memory_lengths"] for entry in log
                        if "memory_lengths" in entry}
    if lengths is not None:
        report["median_lengths"] = rounded(lengths.median(-1).values)
        report["quartiles"] = [rounded(lengths.quantile(q, dim=-1)) for q in (0.25, 0.75)]
    files.save(report, result)
    print(line(report), flush=True)


def rounded(lengths):
    """(layers, KV) as lists"""
    return [[round(x, 2) for x in heads] for heads in lengths.tolist()]


def thinned(log, every=20):
    """{step: [dense loss, the extra pass's]}, means of the steps since the one before."""
    found = {}
    for end in range(every, len(log) + 1, every):
        some = log[end - every:end]
        mean = lambda key: round(statistics.fmean(entry[key] for entry in some), 4)
        found[end] = [mean(key) for key in ("loss", "arl_loss", "joint_loss") if key in some[0]]
    return found


def long_heads(report):
    """How many KV heads are long, of how many."""
    heads = [x for layer in report.get("median_lengths", []) for x in layer]
    return sum(x >= LONG for x in heads), len(heads)


def line(report):
    long, n = long_heads(report)
    heads = sorted(x for layer in report.get("median_lengths", []) for x in layer)
    of_heads = ""
    if heads:
        of_heads = f"{long:4} of {n}   median {heads[n // 2]:6.1f}  longest {heads[-1]:6.1f}"
    last = list(report["losses"].values())[-1] if report["losses"] else []
    words = " ".join(f"{x:.3f}" for x in last)
    return f"{report['name']:26} held out {report['held_out']:.4f}  passes {words:14} {of_heads}"


# ---------------------------------------------------------------- all of them

def run_all(args, rest):
    names = args.runs or list(PLAN)
    if len(names) == 1:
        run_one(names[0], args, rest)
        return

    def job(name):
        words = ["experiments/conversion.py", f"--init={args.init}", f"--data={args.data}",
                 f"--out={args.out}", f"--results={args.results}", f"--runs={name}", *rest]
        return lambda call: call(words, Path(args.out) / f"{name}.log")

    runs.on_all_gpus([job(name) for name in names], args.per_gpu)
    for name in names:
        print(line(files.load(Path(args.results) / f"{name}.json", "held_out")))


def flags():
    parser = flag_parser("conversion.py", "Conversions of a pretrained model; flags not named here "
                         "go to train.py.")
    add = parser.add_argument
    add("--init", required=True, metavar="PATH", help="the pretrained model")
    add("--data", required=True, metavar="DIR", help="token shards, as data.py writes them")
    add("--runs", nargs="+", choices=PLAN, metavar="NAME", help="None: all of the plan")
    add("--per_gpu", type=positive, default=1, metavar="RUNS", help="runs at a time on each GPU")
    add("--device", type=usable_device, default="cuda" if torch.cuda.is_available() else "cpu",
        help="cuda or cpu")
    add("--out", default="out/conversion", metavar="DIR", help="folder of the runs")
    add("--results", default="results/conversion", metavar="DIR", help="folder of the results")
    return parser


def main(argv=None):
    args, rest = flags().parse_known_args(argv)
    args.argv = argv
    command("conversion.py", lambda: run_all(args, rest),
            interrupted="interrupted; the same command goes on")


if __name__ == "__main__":
    main()
