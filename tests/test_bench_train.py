"""
bench_train.py: what it makes of a trace is what running time says, and it changes nothing of a
training.
"""
import json
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

import train
from experiments import bench_train
from infra import cost, parallel
from model import PRESETS
from ranks import on_two
from test_train import ending

FLAGS = ["--preset=pico", "--context_len=512", "--data=niah", "--tasks", "niah_single_1",
         "--protocol=sft", "--drills=1", "--steps=4", "--batch=4", "--device=cpu",
         "--eval_every=0", "--arl=0"]
SPANS = st.lists(st.tuples(st.booleans(), st.integers(0, 60), st.integers(1, 20)), min_size=1,
                 max_size=8)


@pytest.fixture(autouse=True)
def put_back(monkeypatch, tmp_path):
    """What Watch takes the place of."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cost, "plan", cost.plan)
    monkeypatch.setattr(parallel, "one_pass", parallel.one_pass)


@given(SPANS)
def test_shares_are_those_of_a_clock(spans):
    """Kernels side by side counted twice; communication under a product taken for its cost."""
    kernels = [("ncclDevKernel_AllGather" if talks else "gemm", start, start + length)
               for talks, start, length in spans]
    first, last = min(start for _, start, _ in kernels), max(end for *_, end in kernels)
    ticks = [{name for name, start, end in kernels if start <= t < end}
             for t in range(first, last)]
    share = lambda holds: pytest.approx(sum(map(holds, ticks)) / len(ticks), abs=1e-9)
    found = bench_train.shares(kernels)
    assert sum(found.pop("kernels").values()) == pytest.approx(
        sum(length for *_, length in spans) / len(ticks))
    assert found == {
        "computes": share(lambda running: "gemm" in running),
        "talks": share(lambda running: len(running - {"gemm"})),
        "only talks": share(lambda running: len(running) == 1 and "gemm" not in running),
        "waits": share(lambda running: not running),
        "attention": 0, "the rest": 0, "products": pytest.approx(
            sum(length for talks, _, length in spans if not talks) / len(ticks))}
    assert bench_train.shares([]) == {}  # of a machine that forbids tracing


@pytest.mark.parametrize("kind, names", [
    ("attention", ["cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26",
                   "void pytorch_flash::flash_fwd_kernel", "query_grad_kernel", "forward_kernel",
                   "moba_gather_kernel"]),
    ("products", ["nvjet_sm90_tst_192x192_64x3_1x2_h_bz_coopB_NNN", "sm80_xmma_gemm_f32f32",
                  "void cutlass::Kernel2", "splitKreduce_kernel"]),
    ("the rest", ["triton_poi_fused_mul_silu_2", "memory_forward_kernel"])])
def test_kernels_are_told_apart_by_their_names(kind, names):
    """The memory's forward pass taken for attention's."""
    found = bench_train.shares([(name, n, n + 1) for n, name in enumerate(names)])
    assert found[kind] == pytest.approx(1)


def test_times_and_speeds_are_of_the_steps_between(monkeypatch):
    """Compilation in a median; an MFU of one GPU given to two; a wait that no speed shows."""
    clock = [(1, 90, 100), (2, 9, 110), (3, 4, 115), (4, 6, 122), (5, 5, 128), (6, 50, 190)]
    log = [{"step": n, "dense_seconds": dense, "seconds": seconds, "memory_gb": 3.0}
           for n, dense, seconds in clock]
    monkeypatch.setattr(bench_train, "device_name", lambda device: "NVIDIA H100 80GB HBM3")
    watch = bench_train.Watch(train.parse(["--preset=pico", "--context_len=64", "--steps=6",
                                           "--batch=4", "--arl=0", "--device=cpu"]))
    watch.config = PRESETS["pico"]
    watch.planned = cost.Plan(1, 0, "nothing", bytes={"all": 2.5e9}, room=1e10)
    run = bench_train.report(watch, log, world=2)
    flops, tokens = 4 * 64 * cost.flops_per_token(PRESETS["pico"], 32), 4 * 64
    wanted = {
        "seconds": {"dense": 5}, "step_seconds": 6, "parts": 2, "peak_gb": 3.0, "predicted_gb": 2.5,
        "mfu": {"dense": flops / 5 / 2 / 989e12}, "mfu_of_step": flops / 6 / 2 / 989e12,
        "tokens_per_second": tokens / 6, "tokens_per_second_per_gpu": tokens / 6 / 2,
        "hours_for_10B_tokens": 1e10 / (tokens / 6) / 3600}
    for field, value in wanted.items():
        assert run[field] == pytest.approx(value), field
    assert "peak 3.0 GB, predicted 2.5 GB" in "\n".join(bench_train.lines_of(run))


def test_the_last_steps_passes_are_traced_in_their_order(monkeypatch):
    """Compilation in a trace; the dense pass under ARL's name; a pass whose result is lost."""
    args = train.parse(["--preset=pico", "--memory=on", "--context_len=64", "--arl=8", "--steps=5",
                        "--device=cpu"])
    running, traced = [], []

    @contextmanager
    def profile(**_):
        running.append(object())
        yield running[-1]
        running.clear()
    monkeypatch.setattr(bench_train, "profile", profile)
    monkeypatch.setattr(bench_train.torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(parallel, "one_pass",
                        lambda number, *_: traced.append((number, *running)) or number)
    watch, args.device = bench_train.Watch(args), "cuda"
    more = None, None, None, None, parallel.Processes(), "nothing", 1.0
    assert [parallel.one_pass(number, *more) for number in range(10)] == list(range(10))
    assert traced == [*((n,) for n in range(8)), *zip((8, 9), watch.traces, strict=True)]


def test_a_run_is_train_py_s_and_is_added_to_the_file(monkeypatch, capsys, tmp_path):
    """A loop of its own; the report of an earlier run lost."""
    train.train(train.parse([*FLAGS, "--name=alone"]))
    Path("b.json").write_text(json.dumps({"what": "notes", "runs": []}))
    monkeypatch.setattr(sys, "argv", ["bench_train.py", "--json=b.json", *FLAGS, "--name=by1"])
    bench_train.main()
    assert "1 x CPU" in capsys.readouterr().out.splitlines()[-2]
    two = on_two(bench_train.main, "--json=b.json", *FLAGS, "--name=by2", folder=tmp_path)
    assert two.returncode == 0 and "2 x CPU" in two.stdout.splitlines()[-2], two.stderr

    report = json.loads(Path("b.json").read_text())
    first, second = report["runs"]
    assert report["what"] == "notes" and (first["gpus"], second["gpus"]) == (1, 2)
    log_of = lambda name: map(json.loads, Path("out", name, "log.jsonl").read_text().splitlines())
    losses = [entry["loss"] for entry in log_of("alone")]
    assert losses == [entry["loss"] for entry in first["log"]]
    assert first["log"] == list(log_of("by1"))
    module = "-m experiments.bench_train --json=b.json"
    assert first["command"].startswith(f"python {module}")
    assert second["command"].startswith(f"torchrun --nproc_per_node=2 {module}")


@pytest.mark.parametrize("flags, says", [
    (["--json=bad.json", *FLAGS], "bench_train.py: bad.json is damaged"),
    (["--json=list.json", *FLAGS], "bench_train.py: list.json: runs is no list"),
    (["--json=list.json/b.json", *FLAGS], "bench_train.py: "),
    (["--json=b.json", *FLAGS, "--steps=3"], "bench_train.py: --steps"),
    (["--json=b.json", *FLAGS, "--resume"], "bench_train.py: --resume"),
    (FLAGS, "bench_train.py: the following arguments are required: --json"),
    (["--json=b.json", "--nonsense"], "train.py: "),
    (["--json=none/b.json", *FLAGS, "--batch=0"], "train.py: ")])
def test_what_cannot_be_run_is_one_line_before_it_starts(flags, says, capsys):
    """Ten minutes of training whose report cannot be written."""
    Path("bad.json").write_text("{")
    Path("list.json").write_text('{"runs": 5}')
    assert ending(bench_train.main, capsys, *flags).startswith(says)
    assert not Path("out").exists()
