"""infra/cli.py: flags of any script, its errors, and what a result says of its making."""
import argparse
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

import eval_niah
import sparse
from infra import cli


@pytest.mark.parametrize("flag, good, bad", [
    (cli.natural, "0 7 +7 2147483647", "-1 2147483648"),
    (cli.positive, "1 2147483647", "0 -1 2147483648"),
    (cli.few, "1 1000000", "0 1000001"),
    (cli.seed, "0 -2147483648 2147483647", "-2147483649 2147483648 " + "9" * 5000),
    (cli.above_0, "1e-18 1e18 0.1", "0 -1 1e-19 1e19"),
    (cli.at_least_0, "0 1e-18 1e18", "-1 1e-19 1e999"),
    (cli.share, "0 1 0.5", "-0.1 1.1"), (cli.gate, "0.001 0.999", "0 1"),
    (cli.temperature, "0 1 0.7", "-1")])
def test_a_flags_number_is_within_its_range(flag, good, bad):
    """nan, or 2**62 sequences, taken; a bound excluded; a refusal that takes minutes."""
    for text in good.split():
        assert flag(text) == float(text)
    whole = flag in (cli.natural, cli.positive, cli.few, cli.seed)
    for text in [*bad.split(), "nan", "inf", "", "x", "²", *whole * ["1.5", "1e3", "1_000"]]:
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


WORDS, IN_BYTES = SimpleNamespace(name="dolma2"), SimpleNamespace(name="bytes")


def test_blocks_and_windows_are_a_64th_of_the_context():
    """Selection in blocks of another size than the tables say, or one that cannot run."""
    for context_len, size in (256, 8), (512, 8), (1024, 16), (2048, 32), (4096, 64), (65536, 64):
        sized = lambda text: cli.sized(text, context_len, WORDS, sparse.METHODS)
        for kind in "quest:budget=9", "moba:budget=9", "snapkv:budget=9":
            assert sized(kind).rpartition("=")[2] == str(size)
        for text in eval_niah.METHODS:
            sparse.parse(cli.sized(text, context_len, IN_BYTES, sparse.METHODS), context_len)


@dataclass(frozen=True)
class Far(sparse.Quest):
    window: int = 512


@pytest.mark.parametrize("tokenizer, text, filled", [
    (WORDS, "quest:budget=1/16", "quest:budget=1/16,block_size=64"),
    (WORDS, "moba:block_size=8,budget=9+snapkv", "moba:block_size=8,budget=9+snapkv:window=64"),
    (IN_BYTES, "snapkv:budget=9", "snapkv:budget=9,window=64,kernel=15"),
    (IN_BYTES, "snapkv:kernel=5", "snapkv:kernel=5,window=64"),
    (IN_BYTES, "dense", "dense"),
    (WORDS, "own:budget=1/16", "own:budget=1/16,block_size=64"),  # a class of one's own, and
    (WORDS, "far", "far:block_size=64"),                           # a field
    (WORDS, "nobody:budget=9", "nobody:budget=9")])
def test_block_sizes_suit_the_context_and_the_tokens(tokenizer, text, filled):
    """A given size changed, or a user's own; the kernel for bytes in a model of words."""
    methods = sparse.METHODS | {"own": sparse.Quest, "far": Far}
    assert cli.sized(text, 4096, tokenizer, methods) == filled


@pytest.mark.parametrize("error, args, code, said", [
    (ValueError("two\nlines"), None, 2, "x.py: two lines\n"),
    (OSError("gone"), None, 2, "x.py: gone\n"),
    (ImportError("pip install it"), None, 2, "x.py: pip install it\n"),
    (FloatingPointError("not finite"), None, 2, "x.py: not finite\n"),
    (torch.OutOfMemoryError(), {"batch": 7}, 2,
     "x.py: the GPU has no room for --batch 7: lower it\n"),
    (torch.OutOfMemoryError(), {"seed": 7}, 2, "x.py: the GPU has no room for one prompt\n"),
    (KeyboardInterrupt(), {"out": "{a}"}, 130, "\nx.py: interrupted, {a} is kept\n"),
    # eight lines for one ctrl-C; a bug told as a user's mistake
    (KeyboardInterrupt(), {"out": "a", "RANK": "1"}, 130, ""),
    *((error, None, None, "") for error in (TypeError(), AssertionError(),
                                            torch.OutOfMemoryError()))])
def test_what_a_user_can_mend_is_one_line(monkeypatch, capsys, error, args, code, said):
    """A traceback; exit 0; a path with braces that breaks the message; faults of ours hidden."""
    monkeypatch.setenv("RANK", (args or {}).get("RANK", "0"))
    with pytest.raises(SystemExit if code else type(error)) as stop:
        cli.command("x.py", Mock(side_effect=error), args and argparse.Namespace(**args),
                    "interrupted, {out} is kept")
    assert getattr(stop.value, "code", None) == code and capsys.readouterr().err == said


@pytest.mark.parametrize("code, line", [
    ("a, b = 1, 2, 3", 1), ("\nimport torhc", 2), ("int('a')", 1), ("raise ValueError(\n'x')", 0)])
def test_an_error_of_python_in_a_users_file_says_where(code, line, tmp_path, capsys):
    """"Too many values to unpack", and nothing more."""
    (tmp_path / "mine.py").write_text(code)
    with pytest.raises(SystemExit):
        cli.command("x.py", lambda: runpy.run_path(str(tmp_path / "mine.py")))
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("x.py: ")
    assert (f"mine.py:{line}: " in said) if line else said == "x.py: x\n"


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
