"""
Whatever happens in the middle: kill -9, SIGTERM, a full disk, a folder that cannot be written, a second run.

    training, evaluation, making of shards:   killed at random moments, given again, killed again ...   then left alone
        -> the same files as a run that nobody disturbed, and no others

CI kills a few times, `pytest --slow` 50 times. On Linux as root the disks are real: tmpfs, in a mount namespace of their own.
"""
import json
import os
import random
import shutil
import signal
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from infra import shards
from infra import files
from conftest import one_line, times
from judge import ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="judge.py reads /proc")
TRAIN = ["--preset=pico", "--memory=on", "--device=cpu", "--context_len=512", "--tasks", "niah_single_1", "--batch=1", "--steps=24", "--save_every=2",
         "--eval_every=12", "--log_every=8", "--name=it", "--resume"]
EVAL = ["--ckpt=model", "--device=cpu", "--out=out/it", "--tasks", "niah_single_1", "niah_single_2", "--samples=6", "--batch=1",
        "--max_new_tokens=24", "--methods", "quest:budget=1/4,block_size=16"]
DATA = ["--input=texts", "--output=out/it", "--shard_tokens=20e3", "--workers=2"]


@pytest.fixture(scope="module")
def place(judged, tmp_path_factory):
    """A folder with a model and with texts."""
    folder = tmp_path_factory.mktemp("place")
    code, said, _ = judged.run("train", *TRAIN, "--steps=2", "--out=made", folder=folder)
    assert code == 0, said
    shutil.copytree(folder / "made" / "it" / "step_0000002", folder / "model")
    (folder / "texts").mkdir()
    for n in range(30):
        (folder / "texts" / f"{n:02d}.txt").write_text(f"{n} {shards.builtin_text()[n * 5000:][:60_000]}")
    return folder


@pytest.fixture
def out(place):
    """Where all of them write; nothing is there yet."""
    shutil.rmtree(place / "out", ignore_errors=True)
    return place / "out" / "it"


def made(folder):
    """What a run has left, but for dates and speed: {name: content}."""
    found = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(file.relative_to(folder))
        if file.suffix == ".safetensors":
            found[name] = {key: tensor.numpy().tobytes() for key, tensor in load_file(file).items()}
        elif file.name == "log.jsonl":
            found[name] = [[json.loads(line).get(key) for key in ("step", "loss", "arl_loss", "grad_norm", "val_loss", "lr")] for line in file.read_text().splitlines()]
        elif file.name == "results.json":
            found[name] = [{key: row[key] for key in ("method", "task", "ruler", "paper", "by_depth", "read", "prompts")} for row in json.loads(file.read_text())["results"]]
        elif file.name.startswith("answers-"):
            lines = map(json.loads, file.read_text().splitlines())
            found[name] = sorted([line["task"], line["method"], line["examples"], line["told"]["text"]] for line in lines)
        elif file.name in ("train.json", "asked.json"):
            found[name] = None  # dates, commands
        else:
            found[name] = file.read_bytes()
    return found


@pytest.mark.parametrize("script, flags, kills", [("train", TRAIN, times(2, 25)), ("eval_niah", EVAL, times(2, 15)), ("data", DATA, times(2, 10))])
def test_killed_at_random_moments_it_ends_with_the_same_files(script, flags, kills, judged, place, out, capsys):
    """A file half written, an answer asked twice or lost, a step that counts twice, a temporary file that nobody takes away."""
    code, said, seconds = judged.run(script, *flags, folder=place)
    assert code == 0, said
    chance, done, ended = random.Random(script), 0, 0
    undisturbed = made(out)
    shutil.rmtree(out)
    while done < kills:
        code, said, _ = judged.run(script, *flags, folder=place, kill_after=chance.uniform(0.01, seconds))
        done, ended = done + (code == -signal.SIGKILL), ended + (code == 0)
        assert code in (0, -signal.SIGKILL), said
        if code == 0 or done == kills:
            code, said, _ = judged.run(script, *flags, folder=place)
            assert code == 0 and "Traceback" not in said, said
            now = made(out)
            assert now.keys() == undisturbed.keys()
            for name in now:
                assert now[name] == undisturbed[name], name
            shutil.rmtree(out)
    with capsys.disabled():
        print(f"\n{script}: {done} times killed, {ended} times ended before", end=" ")


@pytest.mark.parametrize("script, flags, says", [("train", TRAIN, "same command"), ("eval_niah", EVAL, "--out out/it"), ("data", DATA, "same command")])
def test_sigterm_saves_and_says_how_to_go_on(script, flags, says, judged, place, out):
    """Schedulers send it some seconds before they kill. A traceback, work lost, or an end that looks like success."""
    code, said, seconds = judged.run(script, *flags, folder=place)
    assert code == 0, said
    undisturbed = lasting(made(out))
    for part in times((0.6,), (0.1, 0.3, 0.5, 0.7, 0.9)):
        shutil.rmtree(out)
        code, said, _ = judged.run(script, *flags, folder=place, kill_after=part * seconds, signal=signal.SIGTERM)
        assert "Traceback" not in said and code in (0, 130), (part, code, said)
        begun = {"train": "step     1" in said, "eval_niah": bool(list(out.glob("answers-*.jsonl"))), "data": "shards of" in said}
        if code == 130 and begun[script]:  # what it did by then, and not the clock, says what it must leave
            assert says in said.splitlines()[-1], (part, said)
            assert script != "train" or list(out.glob("step_*/config.json"))
        code, said, _ = judged.run(script, *flags, folder=place)
        assert code == 0 and lasting(made(out)) == undisturbed, said


def lasting(found):
    """Of what made tells, what does not depend on where a run was asked to stop, which it then saves without a validation."""
    kept = {name: content for name, content in found.items() if not name.startswith("step_") or "0000024" in name}
    if "log.jsonl" in kept:
        kept["log.jsonl"] = [[*step[:4], step[5]] for step in kept["log.jsonl"]]
    return kept


@pytest.mark.parametrize("script, flags", [("train", TRAIN), ("eval_niah", EVAL), ("data", DATA)])
def test_a_second_run_in_the_same_folder_is_refused(script, flags, judged, place, out):
    """Two runs that write over each other's files, as a job that was started twice does."""
    out.mkdir(parents=True)
    with files.only_one(out):
        code, said, _ = judged.run(script, *flags, folder=place)
    assert code == 2 and "being written to by another run" in said.splitlines()[-1] and "Traceback" not in said, said
    assert not list(out.iterdir())


def test_the_lock_ends_with_whoever_holds_it(tmp_path):
    """A folder that stays locked for ever after a kill -9, or a lock that is no lock."""
    holder = subprocess.Popen([sys.executable, "-c", "import sys, time\nfrom infra import files\nwith files.only_one(sys.argv[1]): print('in', flush=True); time.sleep(99)",
                               str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"in\n"
    with pytest.raises(ValueError) as refused:
        with files.only_one(tmp_path):
            pass
    one_line(refused, tmp_path, "another run")
    holder.kill()
    holder.wait()
    with files.only_one(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- disks

def on_a_disk(place, script):
    """Lines of bash, in a mount namespace of its own, where nothing that they mount stays."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(["unshare", "--mount", "bash", "-c", script], cwd=place, env=env, capture_output=True, text=True)


needs_mounts = pytest.mark.skipif(subprocess.run("unshare --mount true", shell=True, capture_output=True).returncode != 0 if sys.platform == "linux" else True,
                                  reason="needs Linux and the right to mount")


@needs_mounts
@pytest.mark.parametrize("script, flags, room", times([("data", DATA, "400k")], [("train", TRAIN, "9m"), ("eval_niah", EVAL, "8k"), ("data", DATA, "400k")]))
def test_a_full_disk_is_one_line_and_with_more_room_it_goes_on(script, flags, room, judged, place, out):
    """A traceback, a file cut short under its name, work before it that is lost."""
    code, said, _ = judged.run(script, *flags, folder=place)
    assert code == 0, said
    undisturbed = made(out)
    shutil.rmtree(out)
    command = f"{sys.executable} {ROOT}/{script}.py {' '.join(flags)}"
    result = on_a_disk(place, f"""
        mkdir -p out; mount -t tmpfs -o size={room} none out
        {command}; echo "status $?" >&2
        mount -o remount,size=100m out; {command} || exit 1
        cp -r out/it kept""")
    first, _, _ = result.stderr.partition("status 2\n")
    assert result.returncode == 0 and "status 2\n" in result.stderr, result
    assert "Traceback" not in first and "space" in first.strip().splitlines()[-1], first
    assert made(place / "kept") == undisturbed
    shutil.rmtree(place / "kept")


@needs_mounts
@pytest.mark.parametrize("script, flags", times([("data", DATA)], [("train", TRAIN), ("eval_niah", EVAL), ("data", DATA), ("checkpoint", ["model", "out/x"]),
                                                                    ("niah", ["--task=niah_single_1", "--output=out/x.jsonl"])]))
def test_a_folder_that_cannot_be_written_is_one_line(script, flags, place, out):
    """A traceback, or an hour of work before it is known."""
    result = on_a_disk(place, f"mkdir -p out; mount -t tmpfs none out; mount -o remount,ro out; {sys.executable} {ROOT}/{script}.py {' '.join(flags)}")
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 2 and "Traceback" not in result.stderr and "out" in last and "ead-only" in last, result
