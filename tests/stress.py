"""
Every kernel on a thousand random shapes: as good as PyTorch on each, and the same bits each time?

    python tests/stress.py --jobs 16 --json results/stress-h200.json
        1,000 cases of each kernel, a table, and the file
    python tests/stress.py --only moba_attend --index 417
        one case again, as a failure names it
    python tests/stress.py --sanitize --jobs 16 --json results/stress-h200.json
        adds what compute-sanitizer finds

The cases, and what holds for each, are in kernel_cases.py. "worst" in the table is a kernel's
largest error as a share of what was allowed. Beyond that:

    same bits     a second run with the first one's outputs still there, and a third beside other
                  work, give the first's bits

A failure is one line, and the run goes on. Triton compiles for about a thousand combinations, which
is most of the time: on a GPU --jobs N shares the settings out to N processes on the one GPU.

With --sanitize two tools of compute-sanitizer watch small shapes (that is --checked: nothing is
compared): memcheck, reads and writes outside an allocation, where each tensor is one of its own;
racecheck, hazards in shared memory. Without a GPU everything but these runs under Triton's
interpreter, at smaller sizes. Not collected by pytest; read tests/test_kernels.py first.
"""
import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

CHECKED = "--checked" in sys.argv
if CHECKED:
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # read when torch is imported
from conftest import DEVICE  # noqa: E402  before the kernels: it makes the interpreter ready

import torch  # noqa: E402
import triton  # noqa: E402

import kernel_cases  # noqa: E402
from infra.cli import made_by, natural, positive  # noqa: E402
from infra.files import load, save  # noqa: E402
from kernel_cases import KERNELS, Case  # noqa: E402
from triton_ops import backend  # noqa: E402

ON_GPU = DEVICE == "cuda"
if ON_GPU and CHECKED:
    kernel_cases.shrink = 8
BUSY = torch.ones(2**24, device=DEVICE) if ON_GPU else None
SIDE = torch.cuda.Stream() if ON_GPU else None


# ---------------------------------------------------------------- one case

def beside_other_work(run):
    """run() while the GPU has more to do: its programs then start and end in another order."""
    if ON_GPU and not CHECKED:
        with torch.cuda.stream(SIDE):
            for _ in range(4):
                BUSY.sin_()
    return run()


def same_bits(x, y):
    bits = lambda x: x.contiguous().view(torch.uint8)
    return x.shape == y.shape and torch.equal(bits(x), bits(y))


def try_case(run, check, row):
    outs = run()
    if CHECKED:
        if ON_GPU:
            torch.cuda.synchronize()
        return
    row["worst"] = max(row["worst"], check(outs) or 0)
    for again in run(), beside_other_work(run):  # outs are still there, so theirs lie elsewhere
        assert all(same_bits(x, y) for x, y in zip(outs, again, strict=True)), \
            "other bits in another run"
    row["same_bits"] += 1


def run_case(name, index, seed, row):
    """One case; what it gives is added to the kernel's row."""
    fields, settings, make = KERNELS[name]
    setting = settings[index % len(settings)]
    case, started = Case(seed, name, index), time.time()
    row["cases"] += 1
    try:
        try_case(*make(case, *setting), row)
    except Exception as error:  # whatever it is, the other cases are run
        row["failures"] += 1
        values = dict(zip(fields, setting)) | case.drawn  # ranges give way to what was drawn
        drawn = " ".join(f"{key}={value}" for key, value in values.items()).replace(", ", ",")
        reason = (str(error).strip() or "?").splitlines()[0][:300]
        print(f"FAILED {name} {index}: {drawn}: {type(error).__name__}: {reason}", flush=True)
        end_if_the_gpu_is_gone(name, index)
    row["seconds"] += time.time() - started


def end_if_the_gpu_is_gone(name, index):
    if ON_GPU:
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            sys.exit(f"stress.py: after {name} {index} the GPU answers no more; what was left in "
                     "this process is not run")


# ---------------------------------------------------------------- all of them

def new_row():
    return dict(cases=0, failures=0, worst=0.0, same_bits=0, seconds=0.0)


def run_here(args, rows):
    """This process's share (r, n) of all settings."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # outputs start as NaN
    warnings.filterwarnings("ignore", message=".*deterministic.*")
    backend.use("torch")                                      # references
    r, n = args.share
    number = 0  # of settings
    for name in args.only:
        rows[name], settings = new_row(), len(KERNELS[name][1])
        for index in range(args.shapes) if args.index is None else [args.index]:
            if (number + index % settings) % n == r:
                run_case(name, index, args.seed, rows[name])
        number += settings
        if args.json:
            save({"kernels": rows}, args.json)


def run_shares(args, under=()):
    """
    The same in --jobs processes at once, each `under` a tool, if given. -> the rows added up, the
    tool's output
    """
    command = [*under, sys.executable, __file__, "--shapes", str(args.shapes),
               "--seed", str(args.seed), "--only", *args.only]
    command += ["--checked"] * args.checked
    command += [] if args.index is None else ["--index", str(args.index)]
    rows, output = {name: new_row() for name in args.only}, ""
    with tempfile.TemporaryDirectory() as folder:
        file = lambda r, ending: Path(folder, f"{r}.{ending}")
        processes = []
        for r in range(args.jobs):
            log = file(r, "log").open("w") if under else None
            share = ["--share", f"{r}/{args.jobs}", "--json", file(r, "json")]
            processes.append(subprocess.Popen(
                command + share, stdout=log, stderr=subprocess.STDOUT if under else None))
        for r, process in enumerate(processes):
            process.wait()
            output += file(r, "log").read_text() if under else ""
            if file(r, "json").exists():
                for name, row in load(file(r, "json"), "kernels")["kernels"].items():
                    rows[name] = {key: max(value, row[key]) if key == "worst" else value + row[key]
                                  for key, value in rows[name].items()}
    return rows, output


def sanitize(args):
    """What compute-sanitizer's tools find: a list for the report."""
    found = []
    for tool, flags in ("memcheck", ["--report-api-errors=no"]), ("racecheck", []):
        under = ["compute-sanitizer", "--tool", tool, *flags]
        started = time.time()
        rows, output = run_shares(args, under)
        # One a process: "ERROR SUMMARY: 0 errors", of racecheck "RACECHECK SUMMARY: 0 hazards
        # displayed (0 errors, 0 warnings)". Without one it ended early, and nothing is known.
        errors = [int(n) for n in re.findall(r"SUMMARY: (\d+) (?:error|hazard)", output)]
        known = sum(errors) if len(errors) == args.jobs else None
        cases, failures = (sum(row[key] for row in rows.values()) for key in ("cases", "failures"))
        if known != 0 or failures:
            told = [line for line in output.splitlines()
                    if line.startswith(("=====", "FAILED", "stress.py"))]
            print("\n".join(told[:60]))
        command = [*under, "python", "tests/stress.py", "--shapes", str(args.shapes), "--checked"]
        found.append({"tool": tool, "kernels": list(rows), "cases": cases, "failures": failures,
                      "seconds": time.time() - started, "errors": known,
                      "command": shlex.join(command)})
        print(f"{tool}: {cases} cases of {len(rows)} kernels, {failures} failed; errors: {known}; "
              f"{found[-1]['seconds']:.0f} s", flush=True)
    return found


# ---------------------------------------------------------------- the command

def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0].strip(),
                                     allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"stress.py: {message}\n")
    add = parser.add_argument
    add("--shapes", type=positive, metavar="N", help=(
        "cases of each kernel (default: 1000; without a GPU 2; with --sanitize each setting once)"))
    add("--only", nargs="+", default=list(KERNELS), choices=KERNELS, metavar="KERNEL",
        help=f"of {', '.join(KERNELS)} (default: all)")
    add("--index", type=natural, metavar="I", help="this one case alone")
    add("--seed", type=natural, default=0, metavar="N", help="of all draws (default: 0)")
    add("--jobs", type=positive, default=1, metavar="N",
        help="processes that share the GPU and the settings (default: 1)")
    add("--json", metavar="FILE", help="the report; what else the file holds stays (default: none)")
    add("--checked", action="store_true", help=(
        "small shapes, not compared, every tensor its own allocation: for compute-sanitizer"))
    add("--sanitize", action="store_true",
        help="compute-sanitizer's memcheck and racecheck over --checked")
    add("--share", metavar="R/N", help="of the settings only each N-th; what --jobs starts")
    args = parser.parse_args()
    if args.sanitize and not ON_GPU:
        parser.error("--sanitize: compute-sanitizer needs a GPU")
    if not args.shapes:
        args.shapes = 1000 if ON_GPU else 2
        if args.sanitize:
            args.shapes = max(len(settings) for _, settings, _ in KERNELS.values())
    return args


def main():
    args = parse()
    if args.share:
        args.share = [int(n) for n in args.share.split("/")]
        return run_here(args, {})
    file, there = args.json, {}
    if file and Path(file).exists():
        there = load(file)
    made = made_by(None, "tests/stress.py", DEVICE) | {
        "command": shlex.join(["python", *sys.argv]), "triton": triton.__version__}
    print(f"{made['device']}, torch {made['torch']}, triton {made['triton']}, commit "
          f"{made['commit'][:12]}: {args.shapes} cases of {len(args.only)} kernels, "
          f"seed {args.seed}, {args.jobs} processes", flush=True)
    if args.sanitize:
        args.checked = True
        found = sanitize(args)
        if file:
            save(there | {"sanitizer": found, "sanitizer_commit": made["commit"]}, file)
        sys.exit(any(run["errors"] != 0 or run["failures"] for run in found))

    started, rows = time.time(), {}
    if args.jobs > 1:
        rows, _ = run_shares(args)
    else:
        args.share, args.json = (0, 1), None
        run_here(args, rows)
    seconds = time.time() - started
    if file:
        save(there | made | {"seed": args.seed, "seconds": seconds, "kernels": rows}, file)
    print(f"\n{'kernel':16} {'cases':>6} {'failed':>7} {'worst':>7} {'same bits':>10} "
          f"{'seconds':>8}")
    for name, row in rows.items():
        print(f"{name:16} {row['cases']:6} {row['failures']:7} {row['worst']:7.2f} "
              f"{row['same_bits']:10} {row['seconds']:8.1f}")
    expected = 1 if args.index is not None else args.shapes
    missing = sum(expected - row["cases"] for row in rows.values())
    print(f"{seconds:.0f} s" + (f"; {missing} cases were not run" if missing else ""))
    sys.exit(missing > 0 or any(row["failures"] for row in rows.values()))


if __name__ == "__main__":
    main()
