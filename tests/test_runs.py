"""
experiments/runs.py: jobs over GPUs end together, and results that would not make one table are
known before the training.
"""
import json
import os
import signal
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
    """A script of ours: it says "up", lives for so many seconds and ends with a code."""
    # per_gpu jobs at a time, no more
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    file = tmp_path / "script.py"
    file.write_text("import sys, time\nprint('up', flush=True)\n"
                    "time.sleep(float(sys.argv[1]))\nsys.exit(int(sys.argv[2]))")
    return str(file)


def wait_for(condition):
    deadline = time.time() + 600
    while not condition():
        assert time.time() < deadline, "waited for ten minutes"
        time.sleep(0.02)


def is_up(log):
    return log.exists() and "up" in log.read_text()


def test_the_first_failure_ends_all(script, tmp_path):
    """Hours of training after the failure, if its script runs, is about to, or waits its turn."""
    ended, log = [], lambda name: tmp_path / f"{name}.log"

    def fails(call):
        wait_for(lambda: is_up(log("runs")))
        call([script, "0", "3"], log("fails"))

    def runs_on(call):
        try:
            call([script, "600", "0"], log("runs"))
        except ValueError as error:
            ended.append(str(error))
            raise

    def is_between(call):
        call([script, "0", "0"], log("between"))
        wait_for(lambda: ended)  # so all know of the failure
        call([script, "600", "0"], log("second"))

    def waits(call):
        call([script, "600", "0"], log("third"))
    last_words = "fails: .* ended with code 3, its last words: up.*/fails.log"
    with pytest.raises(ValueError, match=last_words):
        runs.on_all_gpus([fails, runs_on, is_between, waits], per_gpu=3)
    assert "ended with code -15" in ended[0] and log("between").exists()
    assert not log("second").exists() and not log("third").exists()


def test_kill_ends_all_as_ctrl_c_does(script, tmp_path):
    """A training that goes on alone after its parent, and is started again beside itself."""
    log, before, ended = tmp_path / "one.log", signal.getsignal(signal.SIGTERM), []

    def job(call):
        try:
            call([script, "600", "0"], log)
        except ValueError as error:
            ended.append(str(error))

    def kill():
        wait_for(lambda: is_up(log))
        os.kill(os.getpid(), signal.SIGTERM)
    threading.Thread(target=kill).start()
    with pytest.raises(KeyboardInterrupt):
        runs.on_all_gpus([job])
    assert "ended with code -15" in ended[0] and signal.getsignal(signal.SIGTERM) == before


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
    for name in ("memory-10", "memory-2", "memory-2-more", "memory-2-train", "no-arl-0", "memory",
                 "other-1"):
        (tmp_path / f"{name}.json").touch()
    found = [file[:2] for file in runs.result_files(tmp_path, ["no-arl", "memory"])]
    assert found == [("no-arl", 0), ("memory", 10), ("memory", 2)]
