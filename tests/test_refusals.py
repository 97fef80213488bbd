"""
What a user can mend is one line that names it, and exit 2: eval_niah.py, sample.py and the
experiments. A traceback tells a user nothing, and a long run that ends in one even less.
"""
import importlib
import json
from pathlib import Path

import pytest
from conftest import tiny
from test_niah import Bytes

import eval_niah
import niah
from experiments import runs
from infra import runlog
from triton_ops import backend

MODEL, TRIAL = "--ckpt=model", ["--steps=2", "--batch=2", "--device_batch=2", "--context_len=512",
                                "--device=cpu", "--compile=off", "--arl=16"]
BRIEF = ["--arms", "memory", "--seeds", "0", "--samples=1"]  # the last of two flags counts
CONVERT = ["--init=plain", *TRIAL]

# script: [(flags, what the line names)]
REFUSED = {
    "eval_niah": [
        (["--frobnicate"], "--frobnicate"),
        (["--samples=0"], "--samples"),
        (["--seed=-2147483649"], "--seed"),
        (["--seed=2147483648"], "--seed"),
        (["--words=none"], "--words"),
        (["--device=toaster"], "toaster"),
        (["--tasks", "niah_single_9"], "niah_single_9"),
        (["--ckpt", "nowhere"], "nowhere"),
        (["--methods", "quest:budget=1/999"], "1/999"),
        (["--methods", "qwest"], "qwest"),
        (["--random=2", "--methods", "quest:budget=1/8"], "--random"),
        (["--context_len=128", "--methods", "dense"], "--context_len"),
        (["--tokenizer=nowhere"], "nowhere"),
        (["--haystack=nowhere.txt"], "nowhere.txt"),
        (["--jsonl", "other.jsonl"], "other"),
        (["--jsonl", "niah_single_2.jsonl", "a/niah_single_2.jsonl"], "second file of niah_single"),
    ],
    "sample": [
        (["--frobnicate"], "--frobnicate"),
        (["--ckpt=nowhere"], "nowhere"),
        (["--method=qwest"], "qwest"),
        (["--prompt="], "--prompt"),
        (["--max_new_tokens=0"], "--max_new_tokens"),
        (["--temperature=nan"], "--temperature"),
        (["--seed=2147483648"], "--seed"),
        (["--words=none"], "--words"),
        (["--context_len=64"], "64"),
        ([f"--prompt={'a' * 600}", "--method=quest:budget=1/4"], "--context_len=768"),
    ],
    "experiments.reproduce": [
        ([*BRIEF, "--train=--seed=5"], "--seed=5"),
        ([*BRIEF, "--train=--memory=off"], "--memory"),
        ([*BRIEF, "--train=--joint=64"], "--joint"),
        ([*BRIEF, "--train=--name=x"], "--name"),
        ([*BRIEF, "--train=--lr '1"], "--train"),
        ([*BRIEF, "--train=--init x"], "--init"),
        ([*BRIEF, "--seeds", "-1"], "--seeds"),
        ([*BRIEF, "--results=plain/config.json"], "plain/config.json"),
        (["--arms", "--results=model"], "no finished run"),
    ],
    "experiments.gate_start": [
        ([*CONVERT, "--g0=1"], "--g0"),
        ([*CONVERT, "--init=nowhere"], "nowhere"),
        ([*CONVERT, "--steps=none"], "--steps"),
        ([*CONVERT, "--arl=0"], "--arl=0"),
        ([*CONVERT, "--name=other"], "--name"),
        ([*CONVERT], "train.json"),
        ([*CONVERT, "--init=model"], "memory already"),
    ],
    "experiments.moba_question": [
        (["--ckpt", "model", "nowhere"], "nowhere"),
        ([MODEL, "--method=dense"], "--method"),
        (["--ckpt=damaged"], "damaged/train.json is damaged"),
        ([MODEL, "--question=0"], "--question"),
    ],
    "experiments.snapkv_answer": [
        (["--ckpt=nowhere"], "nowhere"),
        ([MODEL, "--method=dense"], "--method"),
        ([MODEL, "--batch=0"], "--batch"),
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two models, of which one tells how it was made, and files of examples."""
    folder = tmp_path_factory.mktemp("refusals")
    for name, memory in ("plain", False), ("model", True):
        tiny(vocab_size=257, context_len=512, memory=memory).save_pretrained(folder / name)
    record = {"step": 1, "settings": {"protocol": "base", "tokenizer": None}}
    (folder / "model" / "train.json").write_text(json.dumps(record))
    for name in "damaged", "a":
        (folder / name).mkdir()
    (folder / "damaged" / "train.json").write_text('{"step": 3, "set')
    example = niah.make_example("niah_single_2", 512, Bytes(), 0, 0, max_new_tokens=48)
    for file in "other.jsonl", "niah_single_2.jsonl", "a/niah_single_2.jsonl":
        niah.write_jsonl(folder / file, [example])
    return folder


@pytest.mark.parametrize("script, flags, words", [
    (script, *case) for script, cases in REFUSED.items() for case in cases])
def test_a_refusal_is_one_line_and_exit_2(script, flags, words, folder, monkeypatch, capsys):
    """A traceback; a line that does not tell what to mend; hours of work before it."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(runlog, "SHIPPED", [Path("model")])
    monkeypatch.setattr(backend, "choice", backend.choice)  # which the experiments set
    monkeypatch.setattr(runs, "subprocess", None)  # nothing is started, and nobody asked
    monkeypatch.setattr(eval_niah, "prefill", lambda *_: pytest.fail("asked"))
    main = importlib.import_module(script).main
    with pytest.raises(SystemExit) as end:
        main(flags)
    line = capsys.readouterr().err
    assert end.value.code == 2 and line.count("\n") == 1 and len(line) < 700, line
    # gate_start's --steps are a flag of train.py, which refuses them itself
    assert line.startswith((f"{script.rpartition('.')[2]}.py: ", "train.py: ")), line
    assert words in line, line
