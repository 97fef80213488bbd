"""infra/cli.py: flags of any script, its errors, and what a result says of its making."""
import argparse
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import eval_niah
import sparse
from infra import cli


@pytest.mark.parametrize("flag, good, bad", [
    (cli.natural, ["0", "7", "+7", str(2**31 - 1)], ["-1", str(2**31)]),
    (cli.positive, ["1", str(2**31 - 1)], ["0", "-1", str(2**31)]),
    (cli.few, ["1", "1000000"], ["0", "1000001"]),
    (cli.seed, ["0", str(-2**31), str(2**31 - 1)], [str(-2**31 - 1), str(2**31), "9" * 5000]),
    (cli.above_0, ["1e-18", "1e18", "0.1"], ["0", "-1", "1e-19", "1e19"]),
    (cli.at_least_0, ["0", "1e-18", "1e18"], ["-1", "1e-19", "1e999"]),
    (cli.share, ["0", "1", "0.5"], ["-0.1", "1.1"]),
    (cli.gate, ["0.001", "0.999"], ["0", "1"]),
    (cli.temperature, ["0", "1", "0.7"], ["-1"]),
])
def test_a_flags_number_is_within_its_range(flag, good, bad):
    """nan, or 2**62 sequences, taken; a bound excluded; a refusal that takes minutes."""
    for text in good:
        assert flag(text) == float(text)
    whole = flag in (cli.natural, cli.positive, cli.few, cli.seed)
    for text in [*bad, "nan", "inf", "", "x", "²", *(["1.5", "1e3", "1_000"] if whole else [])]:
        with pytest.raises(argparse.ArgumentTypeError) as refused:
            flag(text)
        assert len(str(refused.value)) < 160 and "\n" not in str(refused.value)


def test_each_rank_has_a_gpu_of_its_own(monkeypatch):
    """Eight models on the first."""
    taken = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    monkeypatch.setenv("LOCAL_RANK", "3")
    devices = ["cuda", "cpu", "cuda:1"]
    assert [cli.usable_device(text) for text in devices] == devices and taken == [3]


def test_blocks_and_windows_are_a_64th_of_the_context():
    """Selection in blocks of another size than the tables say."""
    sizes = [[cli.sized(f"{kind}:budget=9", context_len,
                        SimpleNamespace(name="other"), sparse.METHODS).rpartition("=")[2]
              for kind in ("quest", "moba", "snapkv")]
             for context_len in (256, 1024, 2048, 4096, 65536)]
    assert sizes == [["8"] * 3, ["16"] * 3, ["32"] * 3, ["64"] * 3, ["64"] * 3]


def test_block_sizes_suit_the_context_and_the_tokens():
    """A default that cannot run at 512 tokens; a given size changed; bytes' kernel for words."""
    words, in_bytes = SimpleNamespace(name="dolma2"), SimpleNamespace(name="bytes")
    methods = sparse.METHODS | {"own": sparse.Quest}
    for tokenizer, text, filled in [
        (words, "quest:budget=1/16", "quest:budget=1/16,block_size=64"),
        (words, "moba:block_size=8,budget=9+snapkv", "moba:block_size=8,budget=9+snapkv:window=64"),
        (in_bytes, "snapkv:budget=9", "snapkv:budget=9,window=64,kernel=15"),
        (in_bytes, "snapkv:kernel=5", "snapkv:kernel=5,window=64"),
        (in_bytes, "dense", "dense"),
        (words, "own:budget=1/16", "own:budget=1/16,block_size=64"),  # a class of one's own
        (words, "nobody:budget=9", "nobody:budget=9"),
    ]:
        assert cli.sized(text, 4096, tokenizer, methods) == filled
    for context_len in 256, 512, 1024, 2048, 4096, 32768:
        for text in eval_niah.METHODS:
            sparse.parse(cli.sized(text, context_len, in_bytes, sparse.METHODS), context_len)


@pytest.mark.parametrize("error, args, code, said", [
    (ValueError("two\nlines"), None, 2, "x.py: two lines\n"),
    (OSError("gone"), None, 2, "x.py: gone\n"),
    (ImportError("pip install it"), None, 2, "x.py: pip install it\n"),
    (FloatingPointError("not finite"), None, 2, "x.py: not finite\n"),
    (torch.OutOfMemoryError(), {"batch": 7}, 2, "x.py: the GPU has no room for --batch 7: "
     "lower it\n"),
    (torch.OutOfMemoryError(), {"seed": 7}, 2, "x.py: the GPU has no room for one prompt\n"),
    (KeyboardInterrupt(), {"out": "{a}"}, 130, "\nx.py: interrupted, {a} is kept\n"),
])
def test_what_a_user_can_mend_is_one_line(capsys, error, args, code, said):
    """A traceback; exit 0; a path with braces that breaks the message."""
    def fails():
        raise error
    with pytest.raises(SystemExit) as stop:
        cli.command("x.py", fails, args and argparse.Namespace(**args),
                    "interrupted, {out} is kept")
    assert stop.value.code == code and capsys.readouterr().err == said


def test_faults_of_ours_are_not_hidden(monkeypatch, capsys):
    """A bug told as a user's mistake. Eight lines for one ctrl-C."""
    def fails(error):
        raise error
    for error in TypeError, AssertionError, torch.OutOfMemoryError:
        with pytest.raises(error):
            cli.command("x.py", lambda: fails(error))
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as stop:
        cli.command("x.py", lambda: fails(KeyboardInterrupt), interrupted="interrupted")
    assert stop.value.code == 130 and capsys.readouterr().err == ""


def test_a_report_names_the_command_that_made_it(monkeypatch):
    """`python train.py --ckpt ...`, where train.py called eval_niah.py; a path of its machine."""
    root = Path(eval_niah.__file__).parent
    for path, seen in [(f"{root}/train.py", "train.py"), ("/elsewhere/keynorm.py", "keynorm.py"),
                       (f"{root}/experiments/ablations.py", "-m experiments.ablations")]:
        monkeypatch.setattr(sys, "argv", [path, "--methods", "a b"])
        assert cli.command_line(None, "eval_niah.py") == f"python {seen} --methods 'a b'"
        assert cli.command_line(["--ckpt", "x"], "eval_niah.py") == "python eval_niah.py --ckpt x"


def test_a_changed_tree_is_told(monkeypatch):
    """A commit named that did not make the numbers."""
    said = {"rev-parse": "c0ffee\n", "status": ""}
    monkeypatch.setattr(cli.subprocess, "run",
                        lambda command, **_: SimpleNamespace(stdout=said[command[3]]))
    assert cli.commit() == "c0ffee"
    said["status"] = " M model.py\n"
    assert cli.commit() == "c0ffee+dirty"


def test_time_left_is_of_what_is_made_now(monkeypatch, capsys):
    """Answers of an earlier run that make this one look fast."""
    clock = [0.0]
    monkeypatch.setattr(cli.time, "time", lambda: clock[0])
    progress = cli.Progress(100, there=60)
    clock[0] = 60.0
    progress(10)
    assert "70 of 100 answers, 3.0 min left" in capsys.readouterr().out
