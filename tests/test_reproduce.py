"""reproduce.py: what is done is not done again, a failure is told, and the summary's figures are those of the reports."""
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import eval_niah
import niah
import reproduce

SIZED = [eval_niah.sized(method, 1024) for method in reproduce.NINE]


def report(score, n_hit):
    """As eval_niah.py writes it, with the same score everywhere, and n_hit of 24 heads that hit always."""
    rows = []
    for method in ["dense", *SIZED]:
        for task in niah.TASKS:
            for random in [None, 0, 1] if "1/4" in method else [None]:
                hits = [[1.0 if 6 * layer + head < n_hit else 0.0 for head in range(6)] for layer in range(4)]
                rows.append({"method": method, "task": task, "random": random, "ruler": [score - (random or 0), 0, 100],
                             "hits": hits if random is None and method.startswith(("quest", "snapkv")) else None})
    return {"finished": True, "results": rows, "command": "python eval_niah.py", "commit": "c", "device": "d", "torch": "t",
            "settings": {"samples": 3, "protocol": "sft", "context_len": 1024, "methods": ["dense", *SIZED]}}


@pytest.fixture
def folder(tmp_path):
    """Two seeds of attention at 40 and 50, of memory at 60 and 64."""
    for name, score, n_hit in ("attention-0", 40, 0), ("attention-1", 50, 0), ("memory-0", 60, 1), ("memory-1", 64, 24):
        (tmp_path / f"{name}.json").write_text(json.dumps(report(score, n_hit)))
        (tmp_path / f"{name}-more.json").write_text(json.dumps(report(score, n_hit) | {"results": []}))
    for part in "", "-more":
        (tmp_path / f"memory-2{part}.json").write_text(json.dumps(report(99, 0) | {"finished": False}))
    return tmp_path


def test_summary_gives_means_spread_and_who_is_ahead(folder):
    """A mean over runs that are unfinished; a lead smaller than the spread that is called one; draws by chance in the scores."""
    summary = reproduce.summarise(reproduce.read_results(folder))
    quest = SIZED[0]
    assert summary["scores"]["attention"][quest] == [40, 50] and summary["scores"]["memory"][quest] == [60, 64]
    assert summary["scores"]["attention"][quest + " by chance"] == [39.5, 49.5]
    against = summary["against_attention"]["memory"][quest]
    assert against["gain"] == 17 and against["noise"] == pytest.approx(50 ** 0.5) and against["ahead"]
    assert summary["hits"]["memory"][quest] == [100, 100] and summary["hits"]["attention"][quest] == [0, 0]
    text = reproduce.markdown(summary, reproduce.read_results(folder))
    assert f"| {quest} | 45.0 ± 7.1 | 62.0 ± 2.8 | **+17.0** |" in text


def test_a_lead_within_the_spread_is_not_one(folder):
    (folder / "memory-0.json").write_text(json.dumps(report(30, 0)))  # 30 and 64: the mean leads by 2
    summary = reproduce.summarise(reproduce.read_results(folder))
    assert not summary["against_attention"]["memory"][SIZED[0]]["ahead"]


def test_plots_are_written(folder):
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    reproduce.plots(reproduce.read_results(folder), folder)
    for name in "accuracy.png", "hits.png":
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def calls(monkeypatch, code=0):
    made = []
    monkeypatch.setattr(reproduce.subprocess, "run", lambda command, **_: made.append(command) or SimpleNamespace(returncode=code))
    return made


def arguments(folder):
    return SimpleNamespace(results=str(folder), random=5, samples=200, batch=200, train="", seeds=[0, 1], per_gpu=1)


def test_what_is_there_is_not_made_again(folder, monkeypatch, tmp_path):
    """Hours of training repeated, or a run that was stopped half-way taken for whole."""
    monkeypatch.chdir(tmp_path)
    made = calls(monkeypatch)
    run = Path("out/reproduce/memory-0/step_0000002")
    run.mkdir(parents=True)
    (run / "config.json").write_text("{}")
    (run / "train.json").write_text(json.dumps({"step": 2, "settings": {"steps": 2}}))
    reproduce.do("memory", 0, None, arguments(folder))
    assert made == []
    (run / "train.json").write_text(json.dumps({"step": 2, "settings": {"steps": 4}}))
    reproduce.do("memory", 0, None, arguments(folder))
    assert [command[1] for command in made] == ["train.py"] and "--resume" in made[0]


def test_converted_models_come_after_those_they_start_from(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    made = calls(monkeypatch)
    reproduce.do_all(["converted", "attention"], arguments(tmp_path / "new"))
    names = [word for command in made for word in command if word.startswith("--name=")]
    assert names == [f"--name={arm}-{seed}" for arm in ("attention", "converted") for seed in (0, 1)]
    assert any("--init=out/reproduce/attention-1" in command for command in made)


def test_a_failure_is_one_line_that_names_the_log(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    calls(monkeypatch, code=3)
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "--arms", "memory", "--seeds", "0"])
    with pytest.raises(SystemExit) as end:
        reproduce.main()
    line = capsys.readouterr().err
    assert end.value.code == 2 and "memory-0: train.py ended with code 3" in line and "memory-0.log" in line and line.count("\n") == 1


def test_every_arm_is_a_command_that_train_accepts(monkeypatch):
    """A flag renamed in train.py alone."""
    import train
    for arm, flags in reproduce.ARMS.items():
        args = train.parse(flags.format(seed=0).split())
        assert bool(args.arl) == (arm in ("memory", "converted")) and bool(args.joint) == (arm == "joint")
        assert (args.batch, args.context_len, args.protocol) == (128, 1024, "sft")
