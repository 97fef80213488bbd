"""
Whatever happens in the middle: kill -9, SIGTERM, a full disk, a folder that cannot be written, a
second run.

    training, evaluation, making of shards:   killed at random moments, given again, killed again,
                                              then left alone
        -> the same files as a run that nobody disturbed, and no others

CI kills a few times, `pytest --slow` 50 times. On Linux as root the disks are real: tmpfs, in a
mount namespace of their own.
"""
import functools
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import refused, times
from infra import files, shards
from judge import ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="judge.py reads /proc")
FLAGS = {
    "train": ["--preset=pico", "--memory=on", "--device=cpu", "--context_len=512", "--tasks",
              "niah_single_1", "--batch=1", "--steps=24", "--save_every=2", "--eval_every=12",
              "--log_every=8", "--name=it", "--resume"],
    "eval_niah": ["--ckpt=model", "--device=cpu", "--out=out/it", "--tasks", "niah_single_1",
                  "niah_single_2", "--samples=6", "--batch=1", "--max_new_tokens=24", "--methods",
                  "quest:budget=1/4,block_size=16"],
    "data": ["--input=texts", "--output=out/it", "--shard_tokens=20e3", "--workers=2"],
    "niah": ["--task=niah_single_1", "--output=out/x.jsonl"],
    "experiments.export": ["model", "out/x"],
}
THREE = "train", "eval_niah", "data"


@pytest.fixture(scope="module")
def place(judged, tmp_path_factory):
    """A folder with a model and with texts."""
    folder = tmp_path_factory.mktemp("place")
    code, said, _ = judged.run("train", *FLAGS["train"], "--steps=2", "--out=made", folder=folder)
    assert code == 0, said
    shutil.copytree(folder / "made" / "it" / "step_0000002", folder / "model")
    (folder / "texts").mkdir()
    for n in range(30):
        text = shards.builtin_text()[n * 5000:][:60_000]
        (folder / "texts" / f"{n:02d}.txt").write_text(f"{n} {text}")
    return folder


@pytest.fixture
def out(place):
    """Where all of them write; nothing is there yet."""
    shutil.rmtree(place / "out", ignore_errors=True)
    return place / "out" / "it"


@pytest.fixture(scope="module")
def go(judged, place):
    """
    Run one of the scripts -> its exit status and what it said, which is never a traceback.
    go.to_end(script) -> what made tells of it, which is taken away.
    go.undisturbed(script) -> the same of a run that nobody disturbed, and its seconds.
    """
    def run(script, **how):
        code, said, run.seconds = judged.run(script, *FLAGS[script], folder=place, **how)
        assert "Traceback" not in said, said
        return code, said

    def to_end(script):
        code, said = run(script)
        assert code == 0, said
        found = made(place / "out" / "it")
        shutil.rmtree(place / "out")
        return found

    @functools.cache
    def undisturbed(script):
        shutil.rmtree(place / "out", ignore_errors=True)
        return to_end(script), run.seconds
    run.to_end, run.undisturbed = to_end, undisturbed
    return run


NUMBERS = "step", "loss", "arl_loss", "grad_norm", "lr", "val_loss"
SCORES = "method", "task", "ruler", "paper", "by_depth", "read", "prompts"


def made(folder):
    """What a run has left, but for dates and speed: {name: content}."""
    found = {}
    for file in filter(Path.is_file, folder.rglob("*")):
        content = file.read_bytes()
        if file.suffix == ".jsonl":
            rows = [json.loads(line) for line in content.splitlines()]
        if file.name == "log.jsonl":
            content = [[row.get(key) for key in NUMBERS] for row in rows]
        elif file.name.startswith("answers-"):
            content = sorted([row["task"], row["method"], row["examples"], row["told"]["text"]]
                             for row in rows)
        elif file.name == "results.json":
            content = [[row[key] for key in SCORES] for row in json.loads(content)["results"]]
        elif file.name in ("train.json", "asked.json"):
            content = None  # dates, commands
        else:
            content = hashlib.sha256(content).hexdigest()
        found[str(file.relative_to(folder))] = content
    return found


def lasting(found):
    """Of it, what does not depend on where a run was stopped, which saves but does not validate."""
    kept = {name: content for name, content in found.items()
            if not name.startswith("step_") or "0000024" in name}
    kept["log.jsonl"] = [row[:5] for row in found.get("log.jsonl", [])]
    return kept


@pytest.mark.parametrize("script, kills", [
    ("train", times(2, 25)), ("eval_niah", times(2, 15)), ("data", times(2, 10))])
def test_killed_at_random_moments_it_ends_with_the_same_files(script, kills, go, out):
    """A file half written, an answer asked twice or lost, a step that counts twice."""
    undisturbed, seconds = go.undisturbed(script)
    chance, done = random.Random(script), 0
    while done < kills:
        code, said = go(script, kill_after=chance.uniform(0.01, seconds))
        assert code in (0, -signal.SIGKILL), said
        done += code != 0
        if code == 0 or done == kills:
            assert go.to_end(script) == undisturbed


@pytest.mark.parametrize("script, says", [
    ("train", "same command"), ("eval_niah", "--out out/it"), ("data", "same command")])
def test_sigterm_saves_and_says_how_to_go_on(script, says, go, out):
    """A traceback, work lost, or an end like success, where a scheduler is about to kill."""
    undisturbed, seconds = go.undisturbed(script)
    for part in times((0.6,), (0.1, 0.3, 0.5, 0.7, 0.9)):
        code, said = go(script, kill_after=part * seconds, signal=signal.SIGTERM)
        assert code in (0, 130), (part, code, said)
        begun = {"train": "step     1" in said, "data": "shards of" in said,
                 "eval_niah": bool(list(out.glob("answers-*.jsonl")))}
        if code == 130 and begun[script]:  # what it did by then says what it must leave
            assert says in said.splitlines()[-1], (part, said)
            assert script != "train" or list(out.glob("step_*/config.json"))
        assert lasting(go.to_end(script)) == lasting(undisturbed)


@pytest.mark.parametrize("script", THREE)
def test_a_second_run_in_the_same_folder_is_refused(script, go, out):
    """Two runs that write over each other's files, as a job that was started twice does."""
    out.mkdir(parents=True)
    with files.only_one(out):
        code, said = go(script)
    assert code == 2 and "being written to by another run" in said.splitlines()[-1], said
    assert not list(out.iterdir())


def test_the_lock_ends_with_whoever_holds_it(tmp_path):
    """A folder that stays locked for ever after a kill -9, or a lock that is no lock."""
    hold = ("import sys, time\nfrom infra import files\nwith files.only_one(sys.argv[1]):\n"
            "    print('in', flush=True)\n    time.sleep(99)")
    holder = subprocess.Popen([sys.executable, "-c", hold, str(tmp_path)], cwd=ROOT,
                              stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"in\n"
    enter = lambda: files.only_one(tmp_path).__enter__()
    refused(enter, tmp_path, "another run")
    holder.kill()
    holder.wait()
    with files.only_one(tmp_path):
        assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- disks

def may_mount():
    if sys.platform != "linux":
        return False
    return subprocess.run("unshare --mount true", shell=True, capture_output=True).returncode == 0


needs_mounts = pytest.mark.skipif(not may_mount(), reason="needs Linux and the right to mount")


def on_a_disk(place, script):
    """Lines of bash, in a mount namespace of its own, where nothing that they mount stays."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(["unshare", "--mount", "bash", "-c", script], cwd=place, env=env,
                          capture_output=True, text=True)


def command(script):
    return f"{sys.executable} -m {script} {' '.join(FLAGS[script])}"


@needs_mounts
@pytest.mark.parametrize("script, room", times(
    [("data", "400k")], [("train", "9m"), ("eval_niah", "8k"), ("data", "400k")]))
def test_a_full_disk_is_one_line_and_with_more_room_it_goes_on(script, room, go, place, out):
    """A traceback, a file cut short under its name, work before it that is lost."""
    undisturbed, _ = go.undisturbed(script)
    result = on_a_disk(place, f"""
        mkdir -p out; mount -t tmpfs -o size={room} none out
        {command(script)}; echo "status $?" >&2
        mount -o remount,size=100m out; {command(script)} || exit 1
        cp -r out/it kept""")
    first, _, _ = result.stderr.partition("status 2\n")
    assert result.returncode == 0 and "status 2\n" in result.stderr, result
    assert "Traceback" not in first and "space" in first.strip().splitlines()[-1], first
    assert made(place / "kept") == undisturbed
    shutil.rmtree(place / "kept")


@needs_mounts
@pytest.mark.parametrize("script", times(["data"], FLAGS))
def test_a_folder_that_cannot_be_written_is_one_line(script, place, out):
    """A traceback, or an hour of work before it is known."""
    result = on_a_disk(place, f"mkdir -p out; mount -t tmpfs none out; mount -o remount,ro out; "
                              f"{command(script)}")
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 2 and "Traceback" not in result.stderr, result
    assert "out" in last and "ead-only" in last, result
