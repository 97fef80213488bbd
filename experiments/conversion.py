"""
How does a pretrained model come to have a memory? Conversions of one model, which differ in where
the gates start and in a few flags of train.py, on the same text in the same order.

    for each conversion of PLAN:
        start      ->  out/conversion/NAME-start   --init with a memory whose gates start so
        train.py   ->  out/conversion/NAME         that, continued on --data
        measure    ->  results/conversion/NAME.json

Two numbers decide, and no needle is asked for: the loss on text held out, compared with the
controls that took as many optimizer steps without a memory; and how many KV heads have a memory
whose median channel averages over 16 tokens or more (memory.effective_length), on the same text.

A start is cheap where the model needs its keys and values least: each KV head is given the memory
alone, the loss tells what that costs, and the cheapest heads get it together (cheapest).

    python -m experiments.conversion --init SMOLLM2 --data SHARDS                all that is missing
    python -m experiments.conversion --init SMOLLM2 --data SHARDS --runs NAME    one of them, here

Checked in tests/test_conversion.py. docs/real-model.md tells what was found. Read real_model.py
next, which asks the models that are made so.

Letters: B batch, T tokens, KV key/value heads, D head width.
"""
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import train
from data import Shards, tokenizer_of
from experiments import memories  # noqa: F401  puts its classes into memory.MEMORIES
from experiments import runs
from infra import files, runlog
from infra.cli import command, flag_parser, made_by, positive, usable_device
from infra.report import mean
from memory import lengths_of
from model import Transformer

LONG = 16    # tokens: a head is long if the median length of its channels is as much
REST = 0.02  # g of the gates that do not start long: k~ is k, but for 2 %


@dataclass(frozen=True)
class Start:
    """Where the gates of a fresh memory start long. Elsewhere they start at REST."""
    kind: str = "decay"   # of memory.MEMORIES
    heads: float = 0.4    # share of the model's KV heads, those that it costs least
    pairs: float = 0.53   # share of each head's pairs of channels, those that RoPE turns fastest
    length: float = 32.0  # tokens, 1 / (1 - g)


# What all have in common: 25M tokens, 16 sequences of 4,096 a step.
COMMON = ("--context_len=4096 --batch=16 --steps=381 --lr=5e-4 --memory_lr=5e-4 --warmup=0.05 "
          "--weight_decay=0.1")

# Flags of train.py that are no user's, as the conversions, or real_model's arms, differ in them.
OURS = (*runs.OURS, "--arl", "--joint", "--lr", "--memory_lr")

# Where the gates start (None: --init as it is, or as the flags say), and flags of train.py.
PLAN = {
    "joint": (None, "--memory=off --joint=64"),
    "dilated": (None, "--memory=off --arl=64"),
    "half": (None, "--memory=on --arl=64 --gate_start=0.5 --memory_lr=5e-3"),
    "third": (Start(), "--arl=64"),
    "third-slow": (Start(), "--arl=64 --memory_lr=1e-4"),
    "third-slow-joint": (Start(), "--arl=0 --joint=64 --memory_lr=1e-4"),
    "third-keys-slow": (Start(kind="keys"), "--arl=64 --memory_lr=1e-4"),
    "third-values-slow": (Start(kind="values"), "--arl=64 --memory_lr=1e-4"),
    "third-whole-slow": (Start(pairs=1.0), "--arl=64 --memory_lr=1e-4"),
    "all-keys-slow": (Start(kind="keys", heads=1.0), "--arl=64 --memory_lr=1e-4"),
    "joint-2e-3": (None, "--memory=off --joint=64 --lr=2e-3"),
    "third-slow-2e-3": (Start(), "--arl=64 --lr=2e-3 --memory_lr=1e-4"),
}


# ---------------------------------------------------------------- where the gates start

def set_gates(model, heads, start):
    """Every gate to REST, but those of `heads`, [(layer, KV head)], as `start` says."""
    D, rest = model.config.head_width, math.log(REST / (1 - REST))
    of_head = torch.full((D,), rest)
    # RoPE turns channels d and d + D/2 together, those of the smallest d fastest
    of_head[torch.arange(D) % (D // 2) < start.pairs * D / 2] = math.log(start.length - 1)
    for number, layer in enumerate(model.layers):
        proj = layer.self_attn.memory.proj
        proj.weight.data.zero_()
        proj.bias.data.fill_(rest)
        for of_layer, head in heads:
            if of_layer == number:
                proj.bias.data[head * D:(head + 1) * D] = of_head.to(proj.bias)


@torch.no_grad()
def cheapest(
    model,         # with a fresh memory, in any state
    tokens,        # (B, T + 1)  text to measure on
    start,
    at_a_time=6,   # heads that are added before all others are measured again
):                 # -> heads [(layer, KV head)], cheapest first; the loss in nats per token of
                   #    none, {(layer, KV head): of it alone}, of all of them
    """
    Greedy: those that cost least beside the ones that are there. Of many, half are measured. The
    model's gates then start so.
    """
    weight = torch.ones(tokens.shape, device=tokens.device)

    def loss(heads):
        set_gates(model, heads, start)
        total, _ = model.score(tokens, weight)
        return float(total) / (tokens.numel() - len(tokens))

    every = [(layer, head) for layer in range(model.config.n_layer)
             for head in range(model.config.n_kv_head)]
    before, alone = loss([]), {head: loss([head]) for head in every}
    left, chosen, wanted = sorted(every, key=alone.get), [], math.ceil(start.heads * len(every))
    while len(chosen) < wanted:
        if chosen:
            # a head that is dear alone does not become cheap
            candidates = left[:max(at_a_time, 2 * (wanted - len(chosen)))]
            beside = {head: loss([*chosen, head]) for head in candidates}
            left = sorted(candidates, key=beside.get) + left[len(candidates):]
        n = min(at_a_time, wanted - len(chosen))
        chosen, left = chosen + left[:n], left[n:]
    return chosen, before, alone, loss(chosen)


def started(start, init, data, folder, device, context_len=4096, windows=6):
    """
    The model --init with a memory that starts so, in `folder`; what that costs beside it.
    ValueError if the folder holds another start.
    """
    folder, file = Path(folder), Path(folder) / "start.json"
    made_of = {"start": asdict(start), "init": str(Path(init)), "data": str(Path(data)),
               "context_len": context_len}
    if file.exists():
        there = files.load(file, *made_of)
        if other := [key for key in made_of if there[key] != made_of[key]]:
            raise ValueError(f"{folder} was started with {other[0]} {there[other[0]]}, not "
                             f"{made_of[other[0]]}: move it away, or choose another --out")
        return folder
    model = Transformer.from_pretrained(init, device=device)
    config = model.config
    model.add_memory(REST, start.kind)
    shards = Shards(data, context_len, seed=0)
    tokens = torch.stack([torch.from_numpy(shards.sample(i)) for i in range(windows)]).to(device)
    heads, before, alone, after = cheapest(model, tokens, start)
    model.save_pretrained(folder, tokenizer_of(init, config.vocab_size, None))
    costs = [[round(alone[layer, head] - before, 4) for head in range(config.n_kv_head)]
             for layer in range(config.n_layer)]
    files.save(made_of | {"heads": heads, "loss": before, "loss_with": after,
                          "cost_alone": costs}, file)
    print(f"{folder}: {len(heads)} heads start at {start.length:g} tokens; loss {before:.4f} -> "
          f"{after:.4f}", flush=True)
    return folder


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


def quartiles(lengths):
    """{"0.25": [[of each KV head's channels] of each layer], "0.5": ..., "0.75": ...}"""
    return {str(q): [[round(x, 2) for x in heads] for heads in lengths.quantile(q, -1).tolist()]
            for q in (0.25, 0.5, 0.75)}


def losses(folder, points=20):
    """
    {step: {"loss": mean since the point before, "arl_loss" or "joint_loss": likewise}}, without the
    steps that were skipped.
    """
    log = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    found, every = {}, max(1, len(log) // points)
    for end in range(every, len(log) + 1, every):
        some = log[end - every:end]
        of_keys = {key: mean(entry.get(key) for entry in some)
                   for key in ("loss", "arl_loss", "joint_loss")}
        found[end] = {key: round(value, 4) for key, value in of_keys.items() if value is not None}
    return found


def flags_of(name, args, rest):
    """Of train.py. ValueError if the user's `rest` has a flag in which the conversions differ."""
    start, flags = PLAN[name]
    init = f"{args.out}/{name}-start" if start else args.init
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
    model = Transformer.from_pretrained(run, torch.bfloat16, args.device)
    loss, lengths = on_text(model, args.data, args.context_len)
    report |= {"name": name, "flags": PLAN[name][1], "train": runlog.training_record(run),
               "losses": losses(run), "held_out": loss}
    if lengths is not None:
        report["lengths"] = quartiles(lengths)
    files.save(report, result)
    print(line(report), flush=True)


# ---------------------------------------------------------------- all of them, and the table

def medians(report):
    """The median length of each KV head's channels, ascending."""
    return sorted(x for layer in report.get("lengths", {}).get("0.5", []) for x in layer)


def line(report):
    """A conversion as a line of the table."""
    heads, last = medians(report), list(report["losses"].values())[-1]
    words = f"{report['name']:20}{report['held_out']:9.4f}"
    words += "".join(f"{last.get(key, math.nan):8.3f}" for key in ("loss", "arl_loss"))
    if heads:
        long = sum(x >= LONG for x in heads)
        words += f"{long:6} of {len(heads)}{heads[len(heads) // 2]:8.1f}{heads[-1]:8.1f}"
    return words


def run_all(args, rest):
    names = list(dict.fromkeys(args.runs or PLAN))
    if len(names) == 1:
        run_one(names[0], args, rest)
        return

    def job(name):
        words = ["experiments/conversion.py", f"--init={args.init}", f"--data={args.data}",
                 f"--context_len={args.context_len}", f"--device={args.device}",
                 f"--out={args.out}", f"--results={args.results}", f"--runs={name}", *rest]
        return lambda call: call(words, Path(args.out) / f"{name}.log")

    runs.on_all_gpus([job(name) for name in names if not is_done(name, args)])
    print(f"{'':20}{'held out':>9}{'dense':>8}{'ARL':>8}{'long heads':>12}{'median':>8}{'most':>8}")
    for name in names:
        print(line(files.load(Path(args.results) / f"{name}.json")))
    print("nats per token; a head's length: the median of its channels, in tokens")


def flags():
    parser = flag_parser("conversion.py", "Conversions of a pretrained model; flags not named here "
                         "go to train.py.")
    add = parser.add_argument
    add("--init", required=True, metavar="PATH", help="the pretrained model")
    add("--data", required=True, metavar="DIR", help="token shards, as data.py writes them")
    add("--runs", nargs="+", choices=PLAN, metavar="NAME", help=f"of {', '.join(PLAN)}; None: all")
    add("--context_len", type=positive, default=4096, metavar="TOKENS", help="of a sequence")
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
