"""
parallel.py: two gloo processes compute what one does, however a batch is cut; and a process that is lost is told of.
"""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from infra import parallel
from conftest import draw_tokens, tiny

HERE = Path(__file__).parent
SETUP = f"import os, signal, sys, time; sys.path[:0] = {[str(HERE.parent), str(HERE)]}\nimport torch; torch.set_num_threads(1)\n"


def start(tmp_path, code, *args, **env):
    script = tmp_path / "script.py"
    script.write_text(SETUP + code)
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script), *args],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"} | env)


GRADIENTS = """
from infra import parallel, weights
from conftest import draw_tokens, tiny
from model import Transformer
from torch.profiler import ProfilerActivity, profile
ways, talks = {}, {}
with parallel.join("cpu") as us:
    whole = tiny(memory=True)
    tokens, weight = draw_tokens(8, 17), torch.rand(8, 17, generator=torch.Generator().manual_seed(1))
    for name, parts, stays, recompute in ("one part", 1, "nothing", 0), ("parts", 2, "nothing", 1), ("kept parts", 4, "all", 2), ("kept weights", 2, "weights", 0):
        with torch.device("meta"):
            model = Transformer(whole.config)
        parallel.spread(model, us, stays)
        weights.fill(model, {k: lambda v=v: v for k, v in whole.state_dict().items()}, "here", torch.float32, "cpu")
        parallel.recompute_and_compile(model, recompute)
        mine = slice(us.rank * 4, us.rank * 4 + 4)
        for step in range(2):
            with profile(activities=[ProfilerActivity.CPU], acc_events=True) as trace:
                for n, (t, w) in enumerate(zip(tokens[mine].chunk(parts), weight[mine].chunk(parts)), start=1):
                    parallel.before_part(model, last=n == parts, stays=stays)
                    (model.loss(t, w) * us.world).backward()
            names = [event.name for event in trace.events()]
            talks[f"{name}, step {step}"] = names.count("c10d::_allgather_base_"), names.count("c10d::_reduce_scatter_base_")
            ways[f"{name}, step {step}"] = {k: p.grad.full_tensor() for k, p in model.named_parameters()} | {"norm": parallel.gradient_norm(model)}
            with torch.no_grad():
                for p in model.parameters():
                    p -= 1e-4 * p.grad
            model.zero_grad()
            model.score(tokens, weight)  # as validation does, which leaves weights gathered
    if us.rank == 0:
        torch.save((ways, talks), "ways.pt")
"""


def test_two_processes_have_the_gradients_of_one_however_a_batch_is_cut(tmp_path):
    """Gradients averaged instead of summed; those of a part lost, or counted twice, or of rows that another keeps; stale weights; or what should stay travels all the same."""
    process = start(tmp_path, GRADIENTS)
    _, errors = process.communicate(timeout=600)
    assert (tmp_path / "ways.pt").exists(), errors[-3000:]
    model, tokens, weight, truth = tiny(memory=True), draw_tokens(8, 17), torch.rand(8, 17, generator=torch.Generator().manual_seed(1)), []
    for step in range(2):
        model.loss(tokens, weight).backward()
        truth.append({k: p.grad for k, p in model.named_parameters()} | {"norm": parallel.gradient_norm(model)})
        with torch.no_grad():
            for p in model.parameters():
                p -= 1e-4 * p.grad
        model.zero_grad()
    ways, talks = torch.load(tmp_path / "ways.pt", weights_only=True)
    assert len(ways) == 2 * len(("one part", "parts", "kept parts", "kept weights"))
    for way, gradients in ways.items():
        for name, gradient in truth[int(way[-1])].items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5, msg=f"{way} {name}")
    # gathered and summed: two layers and the root; layers for forward and backward
    assert talks["one part, step 0"] == (5, 3) and talks["parts, step 0"] == (2 * 5, 2 * 3)
    assert talks["kept parts, step 0"] == (3, 3) and talks["kept weights, step 0"] == (3, 2 * 3)


SUMS = """
import torch
from infra import parallel
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
class Watched(parallel.SumAtOwner):
    dtypes = set()
    def __call__(self, output_tensor, input_tensor, **more):
        self.dtypes.add((input_tensor.dtype, output_tensor.dtype))
        super().__call__(output_tensor, input_tensor, **more)
with parallel.join("cpu") as us:
    ways = []
    for ours in False, True:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(33, 17), torch.nn.Linear(17, 5, bias=False))  # rows that do not divide
        fully_shard(model, mesh=us.mesh, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
        if ours:
            model.set_custom_reduce_scatter(Watched())
        for part in range(3):
            x = torch.randn(8, 33, generator=torch.Generator().manual_seed(10 * part + us.rank))
            model(x).float().square().sum().backward()
        ways.append([p.grad.full_tensor() for p in model.parameters()])
    assert Watched.dtypes == {(torch.bfloat16, torch.float32)}, Watched.dtypes
    if us.rank == 0:
        torch.save(ways, "ways.pt")
"""


def test_gradients_summed_by_the_owner_are_those_of_reduce_scatter_in_fp32(tmp_path):
    """A sum where it should be the mean, of one process's rows twice, or in bf16: rounded once more. Or fp32 on the way after all."""
    process = start(tmp_path, SUMS)
    _, errors = process.communicate(timeout=600)
    assert (tmp_path / "ways.pt").exists(), errors[-3000:]
    theirs, ours = torch.load(tmp_path / "ways.pt", weights_only=True)
    for a, b in zip(theirs, ours, strict=True):
        assert b.dtype == torch.float32 and a.abs().max() > 0
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-6)


def test_recomputed_layers_have_the_gradients_of_kept_ones():
    """A layer that is recomputed with other inputs, or not at all."""
    gradients = []
    for recompute in 0, 1, 2:
        model = parallel.recompute_and_compile(tiny(memory=True), recompute)
        model.loss(draw_tokens(2, 17), torch.ones(2, 17)).backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b, c in zip(*gradients):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_recomputing_saves_the_memory_of_the_layer():
    """A checkpoint that keeps what it should drop."""
    sizes = []
    for recompute in 0, 2:
        model, kept = parallel.recompute_and_compile(tiny(memory=True), recompute), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.nbytes) or x, lambda x: x):
            model.loss(draw_tokens(2, 65), torch.ones(2, 65))
        sizes.append(sum(kept))
    assert sizes[1] < 0.4 * sizes[0]


def test_alive_knows_the_living_the_dead_and_the_undead():
    """A killed process that its parent has not asked after is still in the table, and would be waited for for ever."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    assert parallel.alive(process.pid) and parallel.alive(os.getpid())
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # until it is dead, and leaves it so
    assert not parallel.alive(process.pid)  # a zombie
    process.wait()
    assert not parallel.alive(process.pid)


FAILS = """
from infra import parallel
with parallel.join("cpu") as us:
    with parallel.Stop(us, __import__("pathlib").Path("run")):
        if us.rank == 1:
            raise OSError("the disk\\nis full")
        torch.distributed.all_reduce(torch.ones(1))  # waits for the other
        time.sleep(60)
"""


def test_one_that_fails_says_why_and_the_others_follow_in_silence(tmp_path):
    """A line of each process, or a traceback of the one that waited; or a wait for ever."""
    process = start(tmp_path, FAILS)
    _, errors = process.communicate(timeout=600)
    assert process.returncode and [line for line in errors.splitlines() if line.startswith("train.py:")] == ["train.py: the disk is full"]


TRAIN = """
import model, train, test_train
model.PRESETS["pico"] = test_train.TINY
victim, first, calls, forward = os.environ.get("VICTIM"), time.time(), [], train.parallel.Loss.forward
def newer():
    return any(folder.stat().st_mtime > first for folder in __import__("pathlib").Path("out/broken").glob("step_*"))
def killed(*args):  # once it has made ten passes and a checkpoint, whenever that is; a save waits for the one before
    calls.append(1)
    if victim == os.environ.get("RANK") and len(calls) > 10 and newer():
        os.kill(os.getpid(), signal.SIGKILL)
    return forward(*args)
train.parallel.Loss.forward = killed
train.main()
"""
FLAGS = ["--preset=pico", "--memory=on", "--arl=16", "--tasks", "niah_single_1", "--steps=60", "--batch=4", "--log_every=10", "--eval_every=0",
         "--save_every=3", "--device=cpu", "--out=out"]


def told(tmp_path, name):
    rows = [json.loads(line) for line in (tmp_path / "out" / name / "log.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["arl_loss"], row["grad_norm"], row["lr"]) for row in rows]


def test_kill_of_any_of_two_costs_the_steps_since_the_last_checkpoint_and_one_end_by_one_alone(tmp_path):
    """kill -9 of either process at some moment: one line, the last checkpoint whole, and the same curve from there, on one as on two."""
    assert start(tmp_path, TRAIN, *FLAGS, "--name=unbroken").wait(timeout=600) == 0
    for victim in 0, 1:
        process = start(tmp_path, TRAIN, *FLAGS, "--name=broken", "--resume", VICTIM=str(victim))
        _, errors = process.communicate(timeout=600)
        lines = [line for line in errors.splitlines() if line.startswith("train.py:")]
        assert len(lines) == 1 and f"process {victim} is gone" in lines[0] and "--resume" in lines[0], errors[-2000:]
    unbroken = told(tmp_path, "unbroken")
    assert told(tmp_path, "broken") == unbroken[:len(told(tmp_path, "broken"))]
    shutil.copytree(tmp_path / "out" / "broken", tmp_path / "alone" / "broken")
    assert start(tmp_path, TRAIN, *FLAGS, "--name=broken", "--resume").wait(timeout=600) == 0
    assert told(tmp_path, "broken") == unbroken and not list(tmp_path.glob("out/broken/.step*"))
    script = subprocess.run([sys.executable, str(tmp_path / "script.py"), *FLAGS[:-1], "--out=alone", "--name=broken", "--resume"], cwd=tmp_path,
                            capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert script.returncode == 0, script.stderr
    alone = [json.loads(line) for line in (tmp_path / "alone" / "broken" / "log.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in alone] == pytest.approx([row[1] for row in unbroken], rel=1e-4)


def test_nothing_of_stop_outlives_it(tmp_path):
    """
    A thread that is the last to hold a process group, and takes it apart while Python ends: "terminate called", and status 1
    of torchrun after a run that had finished.
    """
    class Slow(parallel.Stop):
        left = False

        def listen(self):
            super().listen()
            time.sleep(0.3)
            self.left = True
    with Slow(parallel.Processes(), tmp_path) as stop:
        assert not stop.left
    assert stop.left and not stop.thread.is_alive()
