"""
Where should the gates of a memory start that a trained model is given? Conversions that differ in
nothing else.

    g = sigmoid(W x + b),  W = 0,  b = log(g0 / (1 - g0)):  every gate starts at g0

Near 0 the model computes what it did, and the memory is learned late, as the slope of the sigmoid,
g (1 - g), is near 0 too. At 1/2 keys and values are mixtures at first, and what the model knew must
be found again, now with a memory in it.

    python -m experiments.gate_start --init out/reproduce/attention-0-pretrained

runs recipe micro-convert for each g0. Of each it tells the loss of the dense pass and of ARL's, at
the first step and as the mean of the steps up to some others; and how long the memory is in the
end, as losses can agree where one model remembers and the other does not. All see the same samples.
Checked in tests/test_gate_start.py. Read experiments/ablations.py for the lengths.
"""
import json
import math
import statistics
from pathlib import Path

import torch

import train
from experiments import ablations, runs
from infra import files, runlog, weights
from infra.cli import command, command_line, flag_parser, gate, positive, seed
from model import Transformer

MEAN_OF = 20  # steps: the mean before the one that the table names


def run_of(g0, args):
    """The run's folder."""
    return Path(args.out) / f"gate-start-{g0:g}-{args.seed}"


def flags_of(g0, args, rest):
    run = run_of(g0, args)
    return ["--recipe=micro-convert", *runs.passed_on(rest), f"--init={args.init}",
            f"--gate_start={g0:g}", f"--seed={args.seed}", f"--out={run.parent}",
            f"--name={run.name}", "--resume"]


def losses(run):
    """
    {step: {"dense": nats, "arl": nats}} of a run, means of the MEAN_OF steps up to this one: the
    first alone, then later ones. ValueError if its log is not whole.
    """
    file = run / "log.jsonl"
    try:
        log = {entry["step"]: entry for entry in map(json.loads, file.read_text().splitlines())}
        until = sorted({1, *(math.ceil(max(log) * share) for share in (0.1, 0.25, 0.5, 1))})

        def mean(key, last):
            steps = range(max(1, last - MEAN_OF + 1), last + 1)
            return statistics.fmean(log[step][key] for step in steps)
        return {step: {"dense": mean("loss", step), "arl": mean("arl_loss", step)}
                for step in until}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} lacks steps, or is damaged ({type(error).__name__}: {error}): "
                         f"move {run} away") from None


def median_lengths(run, device):
    """Median effective length of each layer's channels, in tokens."""
    model = Transformer.from_pretrained(run, torch.float32, device)
    found = ablations.lengths(model, ablations.prompts(model, run))  # (layers, KV, D)
    return found.flatten(1).median(1).values.tolist()


def table(found, lengths):
    steps = list(next(iter(found.values())))
    lines = [f"{'':8}" + "".join(f"{f'step {step}':>17}" for step in steps) + "   lengths",
             f"{'g0':8}" + f"{'dense':>9}{'ARL':>8}" * len(steps) + "   layer by layer"]
    for g0, at in found.items():
        cells = "".join(f"{at[step]['dense']:9.3f}{at[step]['arl']:8.3f}" for step in steps)
        lines.append(f"{g0:<8g}{cells}   " + " ".join(f"{n:.1f}" for n in lengths[g0]))
    lines.append(f"nats per token; of the later steps the mean of {MEAN_OF}. Lengths: tokens that "
                 "a channel averages over, median")
    return "\n".join(lines)


def run_all(args, rest):
    """
    A run of train.py for each g0 that is not there yet, then the table and the JSON. ValueError as
    soon as one fails.
    """
    settings = train.parse(flags_of(args.g0[0], args, rest))  # a wrong flag is known now
    if settings.arl == 0:
        raise ValueError("--arl=0: without ARL there is no loss to compare")
    if weights.read(args.init)[0].get("memory"):
        raise ValueError(f"--init {args.init} has a memory already: there is nothing to start")
    if runlog.training_record(args.init) is None:
        raise ValueError(f"--init {args.init}: it has no train.json, by which a second call would "
                         "know it again")

    jobs, made = [], {g0: run_of(g0, args) for g0 in args.g0}
    for g0, run in made.items():
        flags = flags_of(g0, args, rest)
        if not runs.finished(run, flags):
            jobs.append(lambda call, flags=flags, log=Path(f"{run}.log"):
                        call(["train.py", *flags], log))
    runs.on_all_gpus(jobs, args.per_gpu)

    found = {g0: losses(run) for g0, run in made.items()}
    lengths = {g0: median_lengths(run, settings.device) for g0, run in made.items()}
    records = {g0: runlog.training_record(run) for g0, run in made.items()}
    files.save({"command": command_line(args.argv, "experiments/gate_start.py"), "losses": found,
                "lengths": lengths, "train": records}, args.json)
    print(f"\n{table(found, lengths)}\n\nresults in {args.json}")


def main(argv=None):
    parser = flag_parser("gate_start.py", "Conversions of a trained model whose gates start at "
                         "different values. Flags not named here go to train.py.")
    add = parser.add_argument
    add("--init", required=True, metavar="PATH", help="a model without a memory, pretrained")
    add("--g0", type=gate, nargs="+", default=[0.02, 0.1, 0.5, 0.9], metavar="G",
        help="gates to start from, above 0 and below 1")
    add("--seed", type=seed, default=0, help="of the samples")
    add("--per_gpu", type=positive, default=1, metavar="RUNS",
        help="conversions at a time on each GPU")
    add("--out", default="out/gate-start", metavar="DIR",
        help="folder of the runs; one that is there goes on")
    add("--json", default="results/gate-start.json", metavar="FILE", help="all losses and lengths")
    args, rest = parser.parse_known_args(argv)
    args.g0 = list(dict.fromkeys(args.g0))
    args.argv = argv
    command("gate_start.py", lambda: run_all(args, rest),
            interrupted="interrupted; the same command goes on")


if __name__ == "__main__":
    main()
