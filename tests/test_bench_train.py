"""bench_train.py: what it makes of a trace is what running time says, and it changes nothing of a training."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments import bench_train
from infra import cost
from model import PRESETS

HERE = Path(__file__).parent.parent
FLAGS = ["--preset=pico", "--context_len=512", "--data=niah", "--tasks", "niah_single_1", "--protocol=sft", "--drills=1", "--steps=4", "--batch=4",
         "--device=cpu", "--eval_every=0", "--arl=0"]
SPANS = st.lists(st.tuples(st.booleans(), st.integers(0, 60), st.integers(1, 20)), min_size=1, max_size=8)


@given(SPANS)
def test_shares_are_those_of_a_clock(spans):
    """Kernels side by side counted twice; a wait within a pass not counted; communication under a product taken for its cost."""
    kernels = [("ncclDevKernel_AllGather" if talks else "gemm", start, start + length) for talks, start, length in spans]
    first, last = min(start for _, start, _ in kernels), max(end for *_, end in kernels)
    ticks = [{name for name, start, end in kernels if start <= t < end} for t in range(first, last)]
    share = lambda holds: sum(bool(holds(running)) for running in ticks) / len(ticks)
    found = bench_train.shares(kernels)
    assert found["computes"] == pytest.approx(share(lambda running: "gemm" in running))
    assert found["talks"] == pytest.approx(share(lambda running: len(running) > ("gemm" in running)))
    assert found["only talks"] == pytest.approx(share(lambda running: running and "gemm" not in running))
    assert found["waits"] == pytest.approx(share(lambda running: not running), abs=1e-9)
    assert sum(found["kernels"].values()) == pytest.approx(sum(length for *_, length in spans) / len(ticks))


def test_times_and_speeds_are_of_the_steps_between(monkeypatch):
    """Compilation, or the traced step, in a median; an MFU of one GPU given to two; a wait for data that no speed shows."""
    args = bench_train.train.parse(["--preset=pico", "--context_len=64", "--steps=6", "--batch=4", "--arl=0", "--device=cpu"])
    log = [{"step": n, "dense_seconds": dense, "seconds": clock, "memory_gb": 3.0}
           for n, dense, clock in ((1, 90, 100), (2, 9, 110), (3, 4, 115), (4, 6, 122), (5, 5, 128), (6, 50, 190))]
    monkeypatch.setattr(bench_train, "device_name", lambda device: "NVIDIA H100 80GB HBM3")
    watch = bench_train.Watch.__new__(bench_train.Watch)
    watch.args, watch.config, watch.traces = args, PRESETS["pico"], []
    watch.planned = cost.Plan(device_batch=1, recompute=0, stays="nothing", bytes={"all": 2.5e9}, room=1e10)
    run = bench_train.report(watch, log, world=2)
    flops = 4 * 64 * cost.flops_per_token(PRESETS["pico"], 32)
    assert run["seconds"] == {"dense": 5} and run["step_seconds"] == 6 and run["parts"] == 2
    assert run["mfu"]["dense"] == pytest.approx(flops / 5 / 2 / 989e12) and run["mfu_of_step"] == pytest.approx(flops / 6 / 2 / 989e12)
    assert run["tokens_per_second"] == pytest.approx(4 * 64 / 6) == 2 * run["tokens_per_second_per_gpu"]
    assert run["hours_for_10B_tokens"] == pytest.approx(1e10 / (4 * 64 / 6) / 3600)
    assert (run["peak_gb"], run["predicted_gb"]) == (3.0, 2.5) and "peak 3.0 GB, predicted 2.5 GB" in "\n".join(bench_train.lines_of(run))


def test_the_last_steps_passes_are_traced_in_their_order(monkeypatch):
    """Compilation in a trace; the dense pass under ARL's name; a pass whose result is lost."""
    args, running, traced = bench_train.train.parse(["--preset=pico", "--memory=on", "--context_len=64", "--arl=8", "--steps=5", "--device=cpu"]), [], []

    class Trace:
        def __init__(self, **_): pass
        def __enter__(self): running.append(self); return self
        def __exit__(self, *_): running.remove(self)

    monkeypatch.setattr(bench_train, "profile", Trace)
    monkeypatch.setattr(bench_train.torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(bench_train.parallel, "one_pass", lambda number, *_: traced.append((number, list(running))) or number)
    monkeypatch.setattr(cost, "plan", cost.plan)  # so that both are put back
    watch, args.device = bench_train.Watch(args), "cuda"
    calls = [bench_train.parallel.one_pass(number, None, None, None, None, bench_train.parallel.Processes(), "nothing", 1.0) for number in range(10)]
    assert calls == list(range(10)) and [number for number, by in traced if by] == [8, 9]
    assert watch.traces == [by[0] for number, by in traced if by]


def test_an_empty_trace_is_no_reason_to_lose_the_report():
    """A machine that forbids tracing."""
    assert bench_train.shares([]) == {}


def bench(tmp_path, *flags, processes=1):
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else [sys.executable]
    return subprocess.run([*start, "-m", "experiments.bench_train", *flags], capture_output=True, text=True, cwd=tmp_path, timeout=120,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)})


def test_a_run_is_train_py_s_and_is_added_to_the_file(tmp_path):
    """A loop of its own; the report of an earlier run lost."""
    alone = subprocess.run([sys.executable, str(HERE / "train.py"), *FLAGS, "--name=alone"], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert alone.returncode == 0, alone.stderr
    (tmp_path / "b.json").write_text(json.dumps({"what": "notes", "runs": []}))
    for processes in 1, 2:
        done = bench(tmp_path, "--json=b.json", *FLAGS, f"--name=by{processes}", processes=processes)
        assert done.returncode == 0 and f"{processes} x CPU" in done.stdout.splitlines()[-2], done.stderr
    losses = lambda name: [json.loads(line)["loss"] for line in (tmp_path / "out" / name / "log.jsonl").read_text().splitlines()]
    assert losses("by1") == losses("alone")
    report = json.loads((tmp_path / "b.json").read_text())
    first, second = report["runs"]
    assert report["what"] == "notes"
    assert (first["gpus"], second["gpus"]) == (1, 2) and [entry["loss"] for entry in first["log"]] == losses("by1")
    assert first["command"].startswith("python -m experiments.bench_train") and second["command"].startswith("torchrun --nproc_per_node=2 -m experiments.bench_train")


@pytest.mark.parametrize("flags, told", [
    (["--json=bad.json", *FLAGS], "bench_train.py: bad.json is damaged"), (["--json=list.json", *FLAGS], "bench_train.py: list.json: runs is no list"),
    (["--json=b.json", *FLAGS, "--steps=3"], "bench_train.py: --steps"),
    (["--json=b.json", *FLAGS, "--resume"], "bench_train.py: --resume"), (FLAGS, "bench_train.py: the following arguments are required: --json"), (["--json=b.json", "--nonsense"], "train.py: "),
    (["--json=none/b.json", *FLAGS, "--batch=0"], "train.py: ")])
def test_what_cannot_be_run_is_one_line_before_it_starts(flags, told, tmp_path):
    """Ten minutes of training whose report cannot be written."""
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "list.json").write_text('{"runs": 5}')
    refused = bench(tmp_path, *flags)
    assert refused.returncode == 2 and refused.stderr.startswith(told) and refused.stderr.count("\n") == 1 and not (tmp_path / "out").exists()
