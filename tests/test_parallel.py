"""
parallel.py: two gloo processes compute what one does, however a batch is cut; and a process that is
lost is told of.
"""
import json
import os
import shutil
import subprocess
import time

import pytest
import torch

import train
from conftest import draw_tokens, tiny
from infra import parallel
from model import PRESETS
from ranks import by_torchrun, on_two
from test_train import TINY

GRADIENTS = """
import torch
from infra import parallel
from conftest import draw_tokens, tiny
from model import Transformer
from test_parallel import step_of, weights_of
from torch.profiler import ProfilerActivity, profile
from types import SimpleNamespace

ways, talks = {}, {}
ARGS = SimpleNamespace(device="cpu", init="here")
with parallel.join("cpu") as us:
    whole = tiny(memory=True)
    tensors = {k: lambda v=v: v for k, v in whole.state_dict().items()}
    tokens, weight = draw_tokens(8, 17), weights_of(8, 17)
    mine = slice(us.rank * 4, us.rank * 4 + 4)
    for name, parts, stays, recompute in (
            ("one part", 1, "nothing", 0), ("parts", 2, "nothing", 1),
            ("kept parts", 4, "all", 2), ("kept weights", 2, "weights", 0)):
        model = parallel.make_model(Transformer, whole.config, tensors, ARGS, us, stays)
        parallel.recompute_and_compile(model, recompute)
        for step in range(2):
            with profile(activities=[ProfilerActivity.CPU], acc_events=True) as trace:
                some = zip(tokens[mine].chunk(parts), weight[mine].chunk(parts))
                for n, (t, w) in enumerate(some, start=1):
                    parallel.before_part(model, last=n == parts, stays=stays)
                    (model.loss(t, w) * us.world).backward()
            names = [event.name for event in trace.events()]
            talks[f"{name}, step {step}"] = (names.count("c10d::_allgather_base_"),
                                             names.count("c10d::_reduce_scatter_base_"))
            ways[f"{name}, step {step}"] = step_of(model)
            model.score(tokens, weight)  # as validation does, which leaves weights gathered
    if us.rank == 0:
        torch.save((ways, talks), "ways.pt")
"""


def weights_of(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def step_of(model):
    """-> {name: gradient} and their norm, by which the parameters have moved."""
    whole = lambda x: x.full_tensor() if hasattr(x, "full_tensor") else x.clone()
    found = {name: whole(p.grad) for name, p in model.named_parameters()}
    found["norm"] = parallel.gradient_norm(model)
    for p in model.parameters():
        p -= 1e-4 * p.grad
    model.zero_grad()
    return found


def test_two_processes_have_the_gradients_of_one_however_a_batch_is_cut(tmp_path):
    """
    Gradients averaged instead of summed; those of a part lost, or counted twice, or of rows that
    another keeps; stale weights; or what should stay travels all the same.
    """
    done = on_two(GRADIENTS, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    model, truth = tiny(memory=True), []
    for _ in range(2):
        model.loss(draw_tokens(8, 17), weights_of(8, 17)).backward()
        truth.append(step_of(model))
    ways, talks = torch.load(tmp_path / "ways.pt", weights_only=True)
    assert len(ways) == 2 * 4
    for way, gradients in ways.items():
        for name, gradient in truth[int(way[-1])].items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5,
                                       msg=f"{way} {name}")
    # gathered and summed: two layers and the root; layers for forward and backward
    assert talks["one part, step 0"] == (5, 3) and talks["parts, step 0"] == (2 * 5, 2 * 3)
    assert talks["kept parts, step 0"] == (3, 3)
    assert talks["kept weights, step 0"] == (3, 2 * 3)


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
        torch.manual_seed(0)  # rows that do not divide
        model = torch.nn.Sequential(torch.nn.Linear(33, 17), torch.nn.Linear(17, 5, bias=False))
        fully_shard(model, mesh=us.mesh,
                    mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
        if ours:
            model.set_custom_reduce_scatter(Watched())
        for part in range(3):
            drawn = torch.Generator().manual_seed(10 * part + us.rank)
            model(torch.randn(8, 33, generator=drawn)).float().square().sum().backward()
        ways.append([p.grad.full_tensor() for p in model.parameters()])
    assert Watched.dtypes == {(torch.bfloat16, torch.float32)}, Watched.dtypes
    if us.rank == 0:
        torch.save(ways, "ways.pt")
"""


def test_gradients_summed_by_the_owner_are_those_of_reduce_scatter_in_fp32(tmp_path):
    """
    A sum where it should be the mean, of one process's rows twice, or in bf16: rounded once more.
    Or fp32 on the way after all.
    """
    done = on_two(SUMS, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs, ours = torch.load(tmp_path / "ways.pt", weights_only=True)
    for a, b in zip(theirs, ours, strict=True):
        assert b.dtype == torch.float32 and a.abs().max() > 0
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-6)


def test_recomputed_layers_have_the_gradients_of_kept_ones_and_keep_less():
    """A layer that is recomputed with other inputs, or not at all; or that keeps what it drops."""
    gradients, sizes = [], []
    for recompute in 0, 1, 2:
        model, kept = parallel.recompute_and_compile(tiny(memory=True), recompute), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.nbytes) or x,
                                                      lambda x: x):
            loss = model.loss(draw_tokens(2, 65), torch.ones(2, 65))
        loss.backward()
        sizes.append(sum(kept))
        gradients.append([p.grad for p in model.parameters()])
    for a, b, c in zip(*gradients):
        assert torch.equal(a, b) and torch.equal(a, c)
    assert sizes[2] < 0.4 * sizes[0] and sizes[2] < sizes[1] < sizes[0]


# ---------------------------------------------------------------- a process that is no more

def test_alive_knows_the_living_the_dead_and_the_undead():
    """
    A killed process that its parent has not asked after is still in the table, and would be waited
    for for ever.
    """
    process = subprocess.Popen(["sleep", "60"])
    assert parallel.alive(process.pid) and parallel.alive(os.getpid())
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # until it is dead; leaves it so
    assert not parallel.alive(process.pid)  # a zombie
    process.wait()
    assert not parallel.alive(process.pid)


FAILS = """
import time, torch
from infra import parallel
from pathlib import Path
with parallel.join("cpu") as us:
    with parallel.Stop(us, Path("run")):
        if us.rank == 1:
            raise OSError("the disk\\nis full")
        torch.distributed.all_reduce(torch.ones(1))  # waits for the other
        time.sleep(60)
"""


def test_one_that_fails_says_why_and_the_others_follow_in_silence(tmp_path):
    """A line of each process, or a traceback of the one that waited; or a wait for ever."""
    done = on_two(FAILS, folder=tmp_path)
    assert done.returncode and lines_of(done) == ["train.py: the disk is full"]


LOST = """
import os, signal, time
from infra import parallel
from pathlib import Path
with parallel.join("cpu") as us:
    with parallel.Stop(us, Path("run")):
        if us.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)  # as in a call of NCCL's, which raises nothing
"""


def test_one_that_waits_for_a_lost_one_in_silence_hears_torchruns_signal(tmp_path):
    """GPUs that are held for ever by processes that nobody will answer."""
    began, done = time.time(), on_two(LOST, folder=tmp_path)
    assert len(lines_of(done)) == 1 and "process 1 is gone" in lines_of(done)[0], done.stderr
    assert time.time() - began < 50


TRAIN = """
import os, signal, time
import model, train, test_train
from pathlib import Path
model.PRESETS["pico"] = test_train.TINY
victim, first, calls = os.environ.get("VICTIM"), time.time(), []
forward = train.parallel.Loss.forward
def newer():
    return any(folder.stat().st_mtime > first for folder in Path("out/broken").glob("step_*"))
def killed(*args):  # once it has made ten passes and a checkpoint, whenever that is
    calls.append(1)
    if victim == os.environ.get("RANK") and len(calls) > 10 and newer():
        os.kill(os.getpid(), signal.SIGKILL)
    return forward(*args)
train.parallel.Loss.forward = killed
train.main()
"""
FLAGS = ["--preset=pico", "--memory=on", "--arl=16", "--tasks", "niah_single_1", "--steps=36",
         "--batch=4", "--log_every=10", "--eval_every=0", "--save_every=3", "--device=cpu"]


def lines_of(done):
    return [line for line in done.stderr.splitlines() if line.startswith("train.py:")]


def curve(run):
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [[row[key] for key in ("step", "loss", "arl_loss", "grad_norm", "lr")] for row in rows]


def test_kill_of_any_of_two_costs_the_steps_since_the_last_checkpoint_and_one_end_by_one_alone(
        tmp_path, monkeypatch):
    """
    kill -9 of either process at some moment: one line, the last checkpoint whole, and the same
    curve from there, on one as on two.
    """
    flags = [*FLAGS, f"--out={tmp_path / 'out'}"]
    assert on_two(TRAIN, *flags, "--name=unbroken", folder=tmp_path).returncode == 0
    unbroken, broken = curve(tmp_path / "out/unbroken"), tmp_path / "out/broken"
    for victim, run in ("0", by_torchrun), ("1", on_two):
        done = run(TRAIN, *flags, "--name=broken", "--resume", folder=tmp_path, VICTIM=victim)
        assert len(lines_of(done)) == 1 and "--resume" in lines_of(done)[0], done.stderr[-2000:]
        assert f"process {victim} is gone" in lines_of(done)[0]
    assert curve(broken) == unbroken[:len(curve(broken))]

    shutil.copytree(broken, tmp_path / "alone/broken")
    done = on_two(TRAIN, *flags, "--name=broken", "--resume", folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert curve(broken) == unbroken and not list(broken.glob(".step*"))

    monkeypatch.setitem(PRESETS, "pico", TINY)
    train.train(train.parse([*FLAGS, f"--out={tmp_path / 'alone'}", "--name=broken", "--resume"]))
    losses = [row[1] for row in curve(tmp_path / "alone/broken")]
    assert losses == pytest.approx([row[1] for row in unbroken], rel=1e-4)


def test_nothing_of_stop_outlives_it(tmp_path):
    """
    A thread that is the last to hold a process group, and takes it apart while Python ends:
    "terminate called", and status 1 of torchrun after a run that had finished.
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
