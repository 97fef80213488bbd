"""
experiments/runs.py: jobs over GPUs end together, and results that would not make one table are
known before the training.
"""
import json
import os
import signal
import tempfile
import threading
import time

import pytest
import torch
from conftest import tiny

import eval_niah
import train
from experiments import runs
from infra import files


@pytest.fixture
def script(tmp_path, monkeypatch):
    """-> a job's script of ours: it says "up", lives for so many seconds and ends with a code"""
    # per_gpu jobs at a time, no more
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    file = tmp_path / "script.py"
    file.write_text("import sys, time\nprint('up', flush=True)\n"
                    "time.sleep(float(sys.argv[1]))\nsys.exit(int(sys.argv[2]))")
    return lambda call, log, seconds=600, code=0: call([str(file), str(seconds), str(code)],
                                                       tmp_path / f"{log}.log")


def wait_for(condition):
    deadline = time.time() + 600
    while not condition():
        assert time.time() < deadline, "waited for ten minutes"
        time.sleep(0.02)


def is_up(log):
    return log.exists() and "up" in log.read_text()


def runs_on(script, ended):
    """A job that lives until it is ended, and tells how."""
    def job(call):
        try:
            script(call, "runs")
        except ValueError as error:
            ended.append(str(error))
            raise
    return job


def test_the_first_failure_ends_all(script, tmp_path):
    """Hours of training after the failure, if its script runs, is about to, or waits its turn."""
    ended = []

    def fails(call):
        wait_for(lambda: is_up(tmp_path / "runs.log"))
        script(call, "fails", 0, 3)

    def is_between(call):
        script(call, "between", 0)
        wait_for(lambda: ended)  # so all know of the failure
        script(call, "second")
    last_words = "fails: .* ended with code 3, its last words: up.*/fails.log"
    with pytest.raises(ValueError, match=last_words):
        runs.on_all_gpus([fails, runs_on(script, ended), is_between,
                          lambda call: script(call, "third")], per_gpu=3)
    assert "ended with code -15" in ended[0]
    assert {file.stem for file in tmp_path.glob("*.log")} == {"fails", "runs", "between"}


def test_kill_ends_all_as_ctrl_c_does(script, tmp_path):
    """A training that goes on alone after its parent, and is started again beside itself."""
    before, ended = signal.getsignal(signal.SIGTERM), []

    def kill():
        wait_for(lambda: is_up(tmp_path / "runs.log"))
        os.kill(os.getpid(), signal.SIGTERM)
    threading.Thread(target=kill).start()
    with pytest.raises(KeyboardInterrupt):
        runs.on_all_gpus([runs_on(script, ended)])
    assert "ended with code -15" in ended[0] and signal.getsignal(signal.SIGTERM) == before


def test_one_is_within_at_a_time(tmp_path, monkeypatch):
    """Two trainings for which a GPU has no room; a turn that is lost with whoever fails within."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    within, most = [], []

    def enter(i):
        with pytest.raises(ValueError), runs.turn("cuda"):
            within.append(i)
            time.sleep(0.05)
            most.append(len(within))
            within.remove(i)
            raise ValueError
    threads = [threading.Thread(target=enter, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert most == [1] * 4
    with runs.turn("cuda"), runs.turn("cpu"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
        with runs.turn("cuda"):
            pass  # nobody waits for another device


def test_who_is_last_lets_others_go_first(tmp_path, monkeypatch):
    """A long training that begins while models wait to be fine-tuned, and asked."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    went, waits = [], threading.Event()

    def enter(name, last):
        with runs.turn("cuda", last):
            went.append(name)
            waits.wait(10)
    threads = []
    for name, last in ("within", True), ("last", True), ("first", False), ("last", True), (
            "first", False):
        threads.append(threading.Thread(target=enter, args=(name, last)))
        threads[-1].start()
        time.sleep(0.05)  # to be within, or to wait
    waits.set()
    for thread in threads:
        thread.join(10)
    assert went == ["within", "first", "first", "last", "last"]


@pytest.mark.parametrize("flags", [
    ["--context_len=512", "--tasks", "niah_single_1", "niah_single_2"], ["--context_len=1024"]])
def test_prompts_of_a_model_not_yet_made_are_those_it_is_asked(tmp_path, monkeypatch, flags):
    """A refusal of what would agree, or hours of training whose result no table takes."""
    monkeypatch.chdir(tmp_path)
    settings = train.parse(["--recipe=micro-sft", "--init=x", *flags])
    tiny(vocab_size=257, context_len=settings.context_len).save_pretrained("model")
    (tmp_path / "model" / "train.json").write_text(json.dumps({"settings": vars(settings)}))
    for samples, seed in (2, 0), (2, 1), (1, 0):
        eval_niah.main(["--ckpt=model", f"--samples={samples}", f"--seed={seed}",
                        "--methods=dense", "--device=cpu", "--json=a.json"])
        asked = {row["task"]: row["prompts"] for row in files.load("a.json")["results"]}
        assert runs.prompts_of(settings, samples, seed) == asked


def test_only_results_are_results(tmp_path):
    """Another arm's, or another kind's, in a mean."""
    for name in ("memory-10", "memory-2", "memory-2-more", "memory-2-train", "no-arl-0", "memory",
                 "other-1"):
        (tmp_path / f"{name}.json").touch()
    found = [file[:2] for file in runs.result_files(tmp_path, ["no-arl", "memory"])]
    assert found == [("no-arl", 0), ("memory", 10), ("memory", 2)]
