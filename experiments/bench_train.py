"""
Where the time of a training step goes, on one GPU or many: train.py, watched.

    torchrun --nproc_per_node=8 -m experiments.bench_train --json FILE FLAGS-OF-TRAIN.PY

Trains as train.py would with these flags, by its own loop. Then it prints, and adds to FILE, what
the run's log says, and what a trace of the last step's passes shows on the first GPU:

    seconds       of each pass, the median of the steps from the third to the last but one, which
                  nothing traces; and its MFU
    speed         tokens a second by the clock, over the same steps, in all and per GPU; MFU; hours
                  for the paper's 10B tokens
    memory        at most, beside what cost.py predicted before
    computes      share of a pass in which kernels run, other than NCCL's
    talks         share in which NCCL's run, alone or beside others, waiting for another GPU
                  included
    only talks    share in which they run alone: what communication costs, but for what it slows
                  down
    waits         share in which nothing runs
    attention, products, the rest    what the computing kernels do, each as its share of the pass

The profiler makes the step that it traces longer, mostly before and after the kernels: that step's
own times count nowhere. Checked in tests/test_bench_train.py. Read train.py and parallel.py first.
"""
import json
import os
import re
import shlex
import statistics
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

import train
from infra import cost, parallel
from infra.cli import command, commit, device_name, flag_parser
from infra.files import load, save
from infra.runlog import field

PAPER_TOKENS = 10e9  # of continued pretraining


# ---------------------------------------------------------------- a run, watched

class Watch:
    """
    Stands in for cost.plan and parallel.one_pass: notes what the first decides, traces the last
    passes of the second.
    """

    def __init__(self, args):
        # Both are looked up in their modules at each call, so that train.py needs no hook for us.
        self.args, self.calls, self.traces = args, 0, []
        self.original_plan, self.original_pass = cost.plan, parallel.one_pass
        cost.plan, parallel.one_pass = self.plan, self.one_pass

    def plan(self, config, *more, **settings):
        self.config = config
        self.planned = self.original_plan(config, *more, **settings)
        return self.planned

    def one_pass(self, loss_of, model, optimizer, parts, weight_sum, processes, *more):
        call = lambda: self.original_pass(loss_of, model, optimizer, parts, weight_sum, processes,
                                          *more)
        # Tracing a step slows it down, so it is the last one, which counts nowhere.
        step = self.calls // len(train.passes_of(self.args)) + 1
        self.calls += 1
        if step < self.args.steps or not self.args.device.startswith("cuda"):
            return call()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as trace:
            # Tracing begins later in one process than in another, and the wait for it would be
            # taken for communication.
            if processes.world > 1:
                dist.barrier(processes.background)
            result = call()
            torch.cuda.synchronize()
        self.traces.append(trace)
        return result


# ---------------------------------------------------------------- what a trace shows

def covered(spans):
    """Length of the union of (start, end)."""
    # In the order of their starts, each adds what reaches beyond all that came before.
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


# How kernels of attention are called, PyTorch's and ours, and those of products of matrices.
ATTENTION = re.compile("sdpa|flash|fmha|moba|^(forward|query_grad|key_grad)_kernel")
PRODUCTS = re.compile("nvjet|gemm|cutlass|splitK")


def shares(kernels):
    """
    Of (name, start, end), in any unit of time -> the docstring's shares, and the twenty names that
    take most of the time; {} of none.
    """
    if not kernels:  # a machine that forbids tracing
        return {}
    # Of the time from the first kernel's start to the last one's end.
    whole = max(end for *_, end in kernels) - min(start for _, start, _ in kernels)
    talk = [(start, end) for name, start, end in kernels if "nccl" in name.lower()]
    compute = [(start, end) for name, start, end in kernels if "nccl" not in name.lower()]
    busy = covered(talk + compute)
    by_name, by_kind = {}, {"attention": 0, "products": 0, "the rest": 0}
    for name, start, end in kernels:
        by_name[name] = by_name.get(name, 0) + (end - start) / whole
        if "nccl" not in name.lower():
            kind = ("attention" if ATTENTION.search(name) else
                    "products" if PRODUCTS.search(name) else "the rest")
            by_kind[kind] += (end - start) / whole
    return {"computes": covered(compute) / whole, "talks": covered(talk) / whole,
            "only talks": (busy - covered(compute)) / whole, "waits": 1 - busy / whole, **by_kind,
            "kernels": dict(sorted(by_name.items(), key=lambda item: -item[1])[:20])}


def kernels_of(trace):
    """What ran on the GPU: (name, start, end) in microseconds."""
    return [(event.name, event.time_range.start, event.time_range.end) for event in trace.events()
            if event.device_type == torch.autograd.DeviceType.CUDA]


# ---------------------------------------------------------------- the report

def report(watch, log, world):
    """What FILE gets of this run. log: the entries of its log.jsonl."""
    args, plan, config = watch.args, watch.planned, watch.config
    flops, peak = train.flops_of(args, config), cost.peak_flops(device_name(args.device))
    mfu = lambda flops, seconds: flops / seconds / peak / world if peak else None

    # The first two steps compile, and the last is traced.
    seconds = {name: statistics.median(entry[field(name, "seconds")] for entry in log[2:-1])
               for name in flops}
    # By the clock a step has waiting for data in it, and checkpoints; a pass has neither.
    by_the_clock = (log[-2]["seconds"] - log[1]["seconds"]) / (len(log) - 3)
    speed = args.batch * args.context_len / by_the_clock
    return {
        "command": call_of(world), "commit": commit(), "device": device_name(args.device),
        "gpus": world, "torch": torch.__version__, "parameters": cost.parameters(config)[0],
        "sequences_at_a_time": plan.device_batch,
        "parts": args.batch // world // plan.device_batch,
        "recomputed_layers": plan.recompute, "stays": plan.stays,
        "seconds": seconds, "mfu": {name: mfu(flops[name], seconds[name]) for name in flops},
        "step_seconds": by_the_clock, "mfu_of_step": mfu(sum(flops.values()), by_the_clock),
        "tokens_per_second": speed, "tokens_per_second_per_gpu": speed / world,
        "hours_for_10B_tokens": PAPER_TOKENS / speed / 3600,
        "peak_gb": log[-1].get("memory_gb"), "predicted_gb": plan.total / 1e9,
        "shares": {name: shares(kernels_of(trace)) for name, trace in zip(flops, watch.traces)},
        "log": log}


def call_of(world):
    """This command, with what started it in as many processes."""
    # torchrun gives its processes the script's arguments alone; how many they are must be added.
    starter, here = ["python"], int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if world > 1:
        starter = ["torchrun", f"--nproc_per_node={here}"]
    if world > here:
        starter.append(f"--nnodes={world // here}")
    return shlex.join([*starter, "-m", "experiments.bench_train", *sys.argv[1:]])


def lines_of(run):
    """A run of FILE as it is printed."""
    # Of a device whose peak is unknown there is no MFU, of a CPU no peak of memory.
    percent = lambda x: "unknown" if x is None else f"{x:.1%}"
    size = lambda gb: "unknown" if gb is None else cost.size(1e9 * gb)
    yield (f"{run['gpus']} x {run['device']}, {run['parameters'] / 1e6:,.1f}M parameters, "
           f"{run['sequences_at_a_time']} sequences x {run['parts']} parts: "
           f"{run['tokens_per_second']:,.0f} tokens/s, {run['tokens_per_second_per_gpu']:,.0f} a "
           f"GPU, MFU {percent(run['mfu_of_step'])}, {run['hours_for_10B_tokens']:.1f} h for 10B "
           f"tokens; peak {size(run['peak_gb'])}, predicted {size(run['predicted_gb'])}")
    for name, seconds in run["seconds"].items():
        found = run["shares"].get(name, {})
        parts = [f"{what} {share:.1%}" for what, share in found.items() if what != "kernels"]
        of_pass = f"  {name:5} pass {seconds:.3f} s, MFU {percent(run['mfu'][name])}"
        yield ", ".join([of_pass, *parts])


def bench(args, file):
    """Train, and add what was seen to the file, which under torchrun the first process does."""
    watch, first = Watch(args), parallel.is_first()
    # A file that cannot be read or written is better known before ten minutes of training.
    if first:
        there = load(file, "runs") if Path(file).exists() else {"runs": []}
        if not isinstance(there["runs"], list):
            raise ValueError(f"{file}: runs is no list: it is not of ours, choose another file")
        save(there, file)
    train.train(args)
    if first:
        lines = (Path(args.out) / args.name / "log.jsonl").read_text().splitlines()
        log = [json.loads(line) for line in lines]
        there["runs"].append(report(watch, log, int(os.environ.get("WORLD_SIZE", 1))))
        save(there, file)
        print(*lines_of(there["runs"][-1]), sep="\n")


def main():
    parser = flag_parser("bench_train.py", "Trains with train.py's flags, and reports where the "
                         "time of a step goes.")
    parser.add_argument("--json", required=True, metavar="FILE",
                        help="where the report goes, beside those of earlier runs")
    own, flags = parser.parse_known_args()
    args = train.parse(flags)  # an unknown flag is told as train.py tells it
    if args.steps < 4:
        parser.error("--steps: at least 4, as the first two and the last are not timed")
    if args.resume:
        parser.error("--resume: only whole runs can be timed; choose another --name")
    command("bench_train.py", lambda: bench(args, own.json))


if __name__ == "__main__":
    main()
