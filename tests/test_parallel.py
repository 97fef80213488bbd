"""
parallel.py: two gloo processes compute what one does, however a batch is cut; and a process that is
lost is told of.
"""
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.profiler import ProfilerActivity, profile

import train
from conftest import draw_tokens, tiny
from infra import parallel
from model import PRESETS, Transformer
from ranks import by_torchrun, on_two
from test_train import TINY, before_each_loss, send, train_tiny

TOKENS = draw_tokens(8, 17)
WEIGHT = torch.rand(8, 17, generator=torch.Generator().manual_seed(1))
WAYS = {  # parts of a process's share of the batch, what stays between them, layers computed anew
    "one part": (1, "nothing", 0), "parts": (2, "nothing", 1), "kept parts": (4, "all", 2),
    "kept weights": (2, "weights", 0)}


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


def steps_of_two():
    """ways.pt: {way: [(gradients of a step, how often something was gathered, and summed)]}"""
    ways = {way: [] for way in WAYS}
    with parallel.join("cpu") as us:
        whole, args = tiny(memory=True), SimpleNamespace(device="cpu", init="here")
        tensors = {k: lambda v=v: v for k, v in whole.state_dict().items()}
        mine = slice(us.rank * 4, us.rank * 4 + 4)
        for way, (n, stays, recompute) in WAYS.items():
            model = parallel.make_model(Transformer, whole.config, tensors, args, us, stays)
            parallel.recompute_and_compile(model, recompute)
            parts = list(zip(TOKENS[mine].chunk(n), WEIGHT[mine].chunk(n)))
            for _ in range(2):
                with profile(activities=[ProfilerActivity.CPU], acc_events=True) as trace:
                    for number, part in enumerate(parts, start=1):
                        parallel.before_part(model, last=number == n, stays=stays)
                        (model.loss(*part) * us.world).backward()
                names = [event.name for event in trace.events()]
                ways[way].append((step_of(model), names.count("c10d::_allgather_base_"),
                                  names.count("c10d::_reduce_scatter_base_")))
                model.score(TOKENS, WEIGHT)  # as validation does, which leaves weights gathered
        if us.rank == 0:
            torch.save(ways, "ways.pt")


def test_two_processes_have_the_gradients_of_one_however_a_batch_is_cut(tmp_path):
    """A mean for a sum; a part lost, or counted twice; stale weights; what should stay travels."""
    done = on_two(steps_of_two, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    ways, model = torch.load(tmp_path / "ways.pt", weights_only=True), tiny(memory=True)
    for step in 0, 1:
        model.loss(TOKENS, WEIGHT).backward()
        for name, gradient in step_of(model).items():
            for way in WAYS:
                torch.testing.assert_close(ways[way][step][0][name], gradient, rtol=1e-4,
                                           atol=1e-5, msg=f"{way} {step} {name}")
    # gathered and summed: two layers and the root; layers for forward and backward
    assert {way: told[0][1:] for way, told in ways.items()} == {
        "one part": (5, 3), "parts": (2 * 5, 2 * 3), "kept parts": (3, 3),
        "kept weights": (3, 2 * 3)}


def sums_of_two():
    """ways.pt: gradients of bf16 summed by fully_shard itself, and by the owner."""
    ways, policy = [], MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    dtypes, send_all = set(), torch.distributed.all_to_all_single
    torch.distributed.all_to_all_single = lambda out, x, **more: (
        dtypes.update([out.dtype, x.dtype]) or send_all(out, x, **more))
    with parallel.join("cpu") as us:
        for ours in False, True:
            torch.manual_seed(0)  # rows that do not divide
            model = torch.nn.Sequential(torch.nn.Linear(33, 17), torch.nn.Linear(17, 5, bias=False))
            fully_shard(model, mesh=us.mesh, mp_policy=policy)
            if ours:
                model.set_custom_reduce_scatter(parallel.SumAtOwner())
            for part in range(3):
                drawn = torch.Generator().manual_seed(10 * part + us.rank)
                model(torch.randn(8, 33, generator=drawn)).float().square().sum().backward()
            ways.append([p.grad.full_tensor() for p in model.parameters()])
        assert dtypes == {torch.bfloat16}, dtypes
        if us.rank == 0:
            torch.save(ways, "ways.pt")


def test_gradients_summed_by_the_owner_are_those_of_reduce_scatter_in_fp32(tmp_path):
    """A sum for the mean, of one process's rows twice, or in bf16; or fp32 on the way after all."""
    done = on_two(sums_of_two, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs, ours = torch.load(tmp_path / "ways.pt", weights_only=True)
    for a, b in zip(theirs, ours, strict=True):
        assert b.dtype == torch.float32 and a.abs().max() > 0
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-6)


def test_recomputed_layers_keep_less():
    """A layer that is not recomputed, or that keeps what it drops. (WAYS are of the numbers.)"""
    sizes = []
    for recompute in 0, 1, 2:
        model, kept = parallel.recompute_and_compile(tiny(memory=True), recompute), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.nbytes) or x,
                                                      lambda x: x):
            model.loss(TOKENS, WEIGHT)
        sizes.append(sum(kept))
    assert sizes[2] < 0.4 * sizes[0] and sizes[2] < sizes[1] < sizes[0]


# ---------------------------------------------------------------- a process that is no more

def test_alive_knows_the_living_the_dead_and_the_undead():
    """A killed process that its parent has not asked after is in the table, and waited for."""
    process = subprocess.Popen(["sleep", "60"])
    assert parallel.alive(process.pid) and parallel.alive(os.getpid())
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # until it is dead; leaves it so
    assert not parallel.alive(process.pid)  # a zombie
    process.wait()
    assert not parallel.alive(process.pid)


def one_fails():
    """The other waits for it, and would go on waiting."""
    with parallel.join("cpu") as us, parallel.Stop(us, Path("run")):
        if us.rank == 1:
            raise OSError("the disk\nis full")
        torch.distributed.all_reduce(torch.ones(1))
        time.sleep(60)


def one_is_killed():
    """The other waits as in a call of NCCL's, which raises nothing."""
    with parallel.join("cpu") as us, parallel.Stop(us, Path("run")):
        if us.rank == 1:
            send(signal.SIGKILL)
        time.sleep(60)


def line_of(done):
    """The only one by which two processes say how they ended."""
    line, = [line for line in done.stderr.splitlines() if line.startswith("train.py:")]
    return line


@pytest.mark.parametrize("end, says", [
    (one_fails, "train.py: the disk is full"), (one_is_killed, "process 1 is gone")])
def test_one_that_fails_says_why_and_the_others_follow_in_silence(end, says, tmp_path):
    """A line of each process, or a traceback of the one that waited; or GPUs held for ever."""
    began, done = time.time(), on_two(end, folder=tmp_path)
    assert done.returncode and says in line_of(done)
    assert time.time() - began < 50


def broken():
    """train.py, of which VICTIM ends once it has made ten passes and a checkpoint."""
    began = time.time()

    def act(number):
        folders = Path("out/broken").glob("step_*")
        if (os.environ.get("VICTIM") == os.environ.get("RANK") and number > 10
                and any(folder.stat().st_mtime > began for folder in folders)):
            send(signal.SIGKILL)
    before_each_loss(pytest.MonkeyPatch(), act)
    train_tiny()


FLAGS = ["--preset=pico", "--memory=on", "--arl=16", "--tasks", "niah_single_1", "--steps=36",
         "--batch=4", "--log_every=10", "--eval_every=0", "--save_every=3", "--device=cpu",
         "--resume"]


def curve(run):
    """What a run has logged, for pytest.approx."""
    rows = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [row[key] for row in rows for key in ("step", "loss", "arl_loss", "grad_norm", "lr")]


def test_kill_of_any_of_two_costs_the_steps_since_the_last_checkpoint_and_one_end_by_one_alone(
        tmp_path, monkeypatch):
    """
    kill -9 of either process at some moment: one line, the last checkpoint whole, and the same
    curve from there, on one as on two. Ranks that see the same samples, or gradients that are an
    average over them: another curve.
    """
    flags, out = [*FLAGS, f"--out={tmp_path / 'out'}"], tmp_path / "out"
    done = by_torchrun(train_tiny, *flags, "--name=unbroken", folder=tmp_path)
    assert done.returncode == 0 and "done" in done.stdout, done.stderr[-2000:]
    unbroken = curve(out / "unbroken")
    for victim, start in ("0", by_torchrun), ("1", on_two):
        done = start(broken, *flags, "--name=broken", folder=tmp_path, VICTIM=victim)
        assert f"process {victim} is gone" in line_of(done) and "--resume" in line_of(done)
    until = curve(out / "broken")
    assert until == unbroken[:len(until)]

    shutil.copytree(out / "broken", out / "alone")
    done = on_two(train_tiny, *flags, "--name=broken", folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert curve(out / "broken") == unbroken and not list((out / "broken").glob(".step*"))

    monkeypatch.setitem(PRESETS, "pico", TINY)
    for name in "alone", "anew":
        train.train(train.parse([*flags, f"--name={name}", "--device_batch=1"]))
        assert curve(out / name) == pytest.approx(unbroken, rel=1e-4)


def test_of_two_threads_that_fail_the_first_says_why(monkeypatch, capsys):
    """
    A lost process that both threads of another hear of: the second ended it before the first had
    spoken, and nobody said a word.
    """
    added, ended = [], threading.Event()

    class Store:
        def add(self, *_):
            added.append(1)
            place = len(added)
            time.sleep(0.3 if place == 1 else 0)  # the answer is on its way
            return place
    monkeypatch.setattr(parallel, "ENDING", threading.Lock())
    monkeypatch.setattr(parallel.os, "_exit", lambda code: ended.set() or time.sleep(60))
    processes = parallel.Processes()
    processes.store = Store()
    for line in "why", "another":
        threading.Thread(target=processes.fail, args=(line, 1), daemon=True).start()
        time.sleep(0.1)
    assert ended.wait(10)
    assert capsys.readouterr().err == "train.py: why\n"


def test_nothing_of_stop_outlives_it(tmp_path, monkeypatch):
    """A thread that takes a process group apart while Python ends, which aborts a finished run."""
    listen, left = parallel.Stop.listen, []
    monkeypatch.setattr(parallel.Stop, "listen", lambda self: (
        listen(self), time.sleep(0.3), left.append(1)))
    with parallel.Stop(parallel.Processes(), tmp_path) as stop:
        assert not left
    assert left and not stop.thread.is_alive()
