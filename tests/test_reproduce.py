"""reproduce.py: what is done is not done again, a failure is told, and the summary's figures are those of the reports."""
import itertools
import json
import math
import random
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import eval_niah
import niah
import sparse
from experiments import reproduce
from experiments import runs
import train
from infra import cli, runlog
from infra.tokenizers import ByteTokenizer

SIZED = [cli.sized(method, 1024, ByteTokenizer(), sparse.METHODS)  # of a short context
         for method in eval_niah.METHODS]


def report(score, n_hit):
    """As eval_niah.py writes it, with the same score everywhere, and n_hit of 24 heads that hit always."""
    rows = []
    for method in ["dense", *SIZED]:
        for task in niah.TASKS:
            for random in [None, 0, 1] if "1/4" in method else [None]:
                hits = [[1.0 if 6 * layer + head < n_hit else 0.0 for head in range(6)] for layer in range(4)]
                rows.append({"method": method, "task": task, "random": random, "n": 3, "prompts": "p", "ruler": [score - (random or 0), 0, 100],
                             "hits": hits if random is None and method.startswith(("quest", "snapkv")) else None})
    return {"finished": True, "results": rows, "command": "python eval_niah.py", "commit": "c", "device": "d", "torch": "t",
            "settings": {"samples": 3, "seed": 0, "protocol": "sft", "context_len": 1024, "methods": ["dense", *SIZED]}}


def record(steps, recipe, made_from):
    return {"step": steps, "seconds": 120, "tokens_per_second": 5000, "mfu": 0.25, "device": "abacus", "commit": "c0ffee00+dirty",
            "settings": {"recipe": recipe}, "from": made_from}


@pytest.fixture
def folder(tmp_path):
    """Two seeds of attention at 40 and 50, of memory at 60 and 64."""
    for name, score, n_hit in ("attention-0", 40, 0), ("attention-1", 50, 0), ("memory-0", 60, 1), ("memory-1", 64, 24):
        (tmp_path / f"{name}.json").write_text(json.dumps(report(score, n_hit)))
        (tmp_path / f"{name}-more.json").write_text(json.dumps(report(score, n_hit) | {"results": []}))
        (tmp_path / f"{name}-train.json").write_text(json.dumps(
            record(60, "micro-sft", record(40, "micro", None))))
    for part in "", "-more":
        (tmp_path / f"memory-2{part}.json").write_text(json.dumps(report(99, 0) | {"finished": False}))
    return tmp_path


def rewrite(folder, name, score):
    (folder / f"{name}.json").write_text(json.dumps(report(score, 0)))


def summary_of(folder):
    found = reproduce.read_results(folder)
    return reproduce.summarise(found), found


def test_summary_gives_means_spread_and_paired_differences(folder):
    """A mean over runs that are unfinished; differences of seeds that do not belong together; draws by chance in the scores."""
    summary, found = summary_of(folder)
    quest = SIZED[0]
    assert summary["scores"]["attention"][quest] == [40, 50] and summary["scores"]["memory"][quest] == [60, 64]
    assert summary["by_chance"]["attention"][quest + " by chance"] == [39.5, 49.5]
    assert not any("chance" in method for method in summary["scores"]["memory"])
    against = summary["against_attention"]["scores"]["memory"][quest]
    assert against["gain"] == 17 and against["by_seed"] == [20, 14]
    assert against["p"] == pytest.approx(2 / math.pi * math.atan(3 / 17))  # df 1: t = 17 / 3
    assert summary["hits"]["memory"][quest] == [100, 100] and summary["hits"]["attention"][quest] == [0, 0]
    text = reproduce.markdown(summary, found)
    assert f"| {quest} | 45.0 ± 7.1 | 62.0 ± 2.8 | +17.0 (0.11) |" in text and "sample standard deviation" in text
    lines = [f"| memory 1 | {stage} | 2.0 | 5,000 | 0.25 | abacus | c0ffee0+dirty |\n" for stage in ("micro | 40", "micro-sft | 60")]
    assert "".join(lines) in text


def test_p_of_t_is_that_of_the_tables():
    """Figures of a printed table of Student's t, two-sided: a tail taken once for twice, or a degree of freedom off."""
    for df, t, p in ((1, 12.706, 0.05), (2, 4.303, 0.05), (3, 3.182, 0.05), (4, 2.776, 0.05), (5, 2.571, 0.05), (10, 2.228, 0.05),
                     (2, 9.925, 0.01), (3, 5.841, 0.01), (9, 3.250, 0.01), (30, 2.042, 0.05), (29, 2.756, 0.01)):
        assert reproduce.p_of_t(t, df) == reproduce.p_of_t(-t, df) == pytest.approx(p, rel=2e-3), (df, t)
    assert all(reproduce.p_of_t(0, df) == 1 for df in range(1, 9))


def test_holm_by_hand():
    """Bonferroni for all, a correction of the largest first, or an order that is not kept."""
    found = reproduce.holm({"a": 0.04, "b": 0.01, "c": 0.03, "d": 0.005})
    assert found == pytest.approx({"d": 0.02, "b": 0.03, "c": 0.06, "a": 0.06}) and reproduce.holm({"a": 0.9, "b": 0.8}) == {"a": 1, "b": 1}


def drawn(rng, n_cells):
    """A column of models that differ by their seed alone."""
    score = lambda: [[60 + rng.gauss(0, 5) for _ in range(3)] for _ in range(n_cells)]
    return reproduce.column(dict(enumerate(score())), dict(enumerate(score())), ([0, 1, 2], [0, 1, 2]))


def test_nothing_is_bold_where_only_seeds_differ():
    """A rule that calls one of ten cells a gain where there is none: with it, nearly every column of 14 had a bold one."""
    rng = random.Random(0)
    bold = [any("**" in reproduce.gap(cell) for cell in drawn(rng, 14).values()) for _ in range(1000)]
    assert 0.01 < sum(bold) / 1000 < 0.07  # 0.05, and chance
    alone = [cell["p"] < 0.05 for _ in range(200) for cell in drawn(rng, 14).values()]
    assert 0.04 < sum(alone) / len(alone) < 0.06


def test_a_gain_that_all_seeds_share_is_bold():
    """A correction that nothing passes; a column's size forgotten."""
    base = {method: [50.0, 60.0, 40.0] for method in "abc"}
    more = {"a": [60.0, 70.1, 50.1], "b": [52.0, 61.0, 44.0], "c": [50.0, 59.0, 45.0]}
    cells = reproduce.column(more, base, ([0, 1, 2], [0, 1, 2]))
    assert [("**" in reproduce.gap(cells[method])) for method in "abc"] == [True, False, False]
    assert reproduce.gap(cells["a"]) == "**+10.1** (1.1e-05)" and cells["a"]["holm"] == pytest.approx(3 * cells["a"]["p"])


def test_differences_are_of_the_seeds_that_both_have(folder):
    """Attention's seed 0 subtracted from memory's seed 1, as each is the first of its list; one seed alone with a p."""
    (folder / "attention-0.json").unlink()
    for name, score in ("memory-2", 66), ("memory-10", 10):
        rewrite(folder, name, score)
        for part in "more", "train":
            shutil.copy(folder / f"memory-0-{part}.json", folder / f"{name}-{part}.json")
    summary, found = summary_of(folder)
    assert summary["against_attention"]["scores"]["memory"][SIZED[0]] == {"gain": 14, "p": None, "by_seed": [14], "holm": None}
    assert f"| {SIZED[0]} | 50.0 | 50.0 ± 26.8 | +14.0 |" in reproduce.markdown(summary, found)
    (folder / "attention-1.json").unlink()
    (folder / "attention-7.json").write_text(json.dumps(report(1, 0)))
    shutil.copy(folder / "attention-0-train.json", folder / "attention-7-train.json")
    summary, found = summary_of(folder)
    assert summary["against_attention"]["scores"]["memory"] == {} and f"| {SIZED[0]} | 1.0 | 50.0 ± 26.8 |  |" in reproduce.markdown(summary, found)


def test_equal_differences_have_no_p(folder):
    """A division by 0; or three zeros, which say nothing, that are called certain."""
    for seed, score in (0, 45), (1, 55):
        rewrite(folder, f"memory-{seed}", score)
    summary, _ = summary_of(folder)
    cell = summary["against_attention"]["scores"]["memory"][SIZED[0]]
    assert cell == {"gain": 5, "p": None, "by_seed": [5, 5], "holm": None} and reproduce.gap(cell) == "+5.0"


def test_the_summary_that_lies_here_is_of_the_results_beside_it():
    """A rule that changed, and a table made by the old one."""
    folder = Path(reproduce.__file__).parent.parent / "results" / "reproduce"
    summary, found = summary_of(folder)
    assert (folder / "summary.md").read_text() == reproduce.markdown(summary, found)
    assert json.loads((folder / "summary.json").read_text())["scores"] == summary["scores"]


def test_results_of_other_prompts_do_not_mix(folder):
    """200 samples beside 100."""
    file = folder / "memory-1.json"
    file.write_text(file.read_text().replace('"p"', '"other"'))
    with pytest.raises(ValueError, match="memory-1.json"):
        reproduce.read_results(folder)


def test_what_only_some_seeds_were_asked_waits_and_what_is_stale_is_left_out(folder):
    """A traceback while the second seed is still at work; methods beside those of other samples."""
    more = report(33, 0)
    more["results"] = [row | {"method": "dilated"} for row in more["results"][:8]]
    (folder / "memory-0-more.json").write_text(json.dumps(more))
    score = lambda: reproduce.summarise(reproduce.read_results(folder))["scores"]["memory"]
    assert "dilated" not in score() and score()[SIZED[0]] == [60, 64]
    (folder / "memory-1-more.json").write_text(json.dumps(more))
    assert score()["dilated"] == [33, 33]
    more["settings"]["samples"] = 4
    (folder / "memory-1-more.json").write_text(json.dumps(more))
    assert "dilated" not in score()


def test_brief_arms_alone_make_a_summary_without_hypotheses(folder):
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    brief = report(70, 0)
    brief["results"] = [row | {"hits": None} for row in brief["results"] if row["random"] is None]
    for arm, drawn in ("converted", True), ("long", False):  # a control is in the table only
        found = {arm: {0: brief | {"train": record(40, "micro", None)}}}
        text = reproduce.markdown(reproduce.summarise(found), found)
        assert "H1" not in text and "H2" not in text and f"| {SIZED[0]} | 70.0 |\n" in text
        for plot in "hits.png", "accuracy.png":
            (folder / plot).unlink(missing_ok=True)
        reproduce.plots(found, folder)
        assert not (folder / "hits.png").exists() and (folder / "accuracy.png").exists() == drawn


@pytest.mark.parametrize("foreign", ["{", "{}", "[]"])
def test_a_foreign_report_is_named(folder, foreign):
    for name in "memory-0-train.json", "memory-0-more.json", "memory-0.json":
        (folder / name).write_text(foreign)
        with pytest.raises(ValueError, match=f"{name} .* move it away"):
            reproduce.read_results(folder)


def test_arms_that_are_asked_less_leave_cells_empty(folder):
    """A figure of another arm in the cell of one that was never asked."""
    brief = report(70, 0)
    brief["results"] = [row | {"hits": None} for row in brief["results"] if row["random"] is None]
    (folder / "long-0.json").write_text(json.dumps(brief))
    (folder / "long-0-train.json").write_text(json.dumps(record(60, "micro-sft", record(40, "micro", None))))
    found = reproduce.read_results(folder)
    summary = reproduce.summarise(found)
    more = reproduce.markdown(summary | {"scores": {arm: of if arm == "long" else of | {"dilated": [1.0, 1.0]} for arm, of in
                                                    summary["scores"].items()}}, found)
    assert f"| {SIZED[0]} | 45.0 ± 7.1 | 70.0 | 62.0 ± 2.8 | +17.0 (0.11) |" in more and "| dilated | 1.0 ± 0.0 |  | 1.0 ± 0.0 |" in more
    assert f"| {SIZED[0]} by chance | 44.5 ± 7.1 | 61.5 ± 2.8 | +17.0 (0.11) |" in more
    assert f"| {SIZED[0]} | 0.0 ± 0.0 | 100.0 ± 0.0 | +100.0 |" in more  # H1


def test_plots_are_written(folder):
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    (folder / "joint-0.json").write_text((folder / "attention-0.json").read_text())
    (folder / "joint-0-train.json").write_text((folder / "attention-0-train.json").read_text())
    reproduce.plots(reproduce.read_results(folder), folder)
    for name in "accuracy.png", "hits.png":
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """Commands instead of processes. A train.py leaves a run with all its steps, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    made, asked_before, numbers = [], [], itertools.count()

    class Process:
        def __init__(self, command, **_):
            made.append([Path(command[1]).name, *command[2:]])
            if made[-1][0] == "train.py":
                settings = train.parse(command[2:])
                run = Path(settings.out, settings.name, "step_0000001")
                run.mkdir(parents=True, exist_ok=True)
                (run / "config.json").write_text("{}")
                (run / "train.json").write_text(json.dumps({"step": settings.steps, "settings": vars(settings), "made": next(numbers),
                                                            "first_sample": "s", "from": runlog.begun(settings, None)["from"]}))

        def wait(self):
            return 3 if "--steps=3" in made[-1] else 0
    monkeypatch.setattr(runs.subprocess, "Popen", Process)
    monkeypatch.setattr(runs, "prompts_of", lambda *_: dict.fromkeys(niah.TASKS, "p"))
    monkeypatch.setattr(runs, "refuse_other_prompts", lambda stay, _: asked_before.append(stay))
    return made, asked_before


def arguments(folder, arms, seeds=(0, 1)):
    return SimpleNamespace(results=str(folder), random=5, samples=3, eval_seed=0, batch=200, train=[], arms=arms, seeds=seeds, per_gpu=1)


def scripts(made):
    names = [command[0] for command in made]
    made.clear()
    return names


def test_what_is_there_is_not_made_again(folder, calls, monkeypatch):
    """Hours of training repeated; a run that was stopped half-way taken for whole; old answers taken for a new model's."""
    made, asked_before = calls
    args = arguments(folder, ["memory"], [0])
    reproduce.do_all(args)
    assert scripts(made) == ["train.py", "train.py", "eval_niah.py", "eval_niah.py"]  # the results there were of another model
    assert [file.stem for file in asked_before[0]] == ["attention-0", "attention-1", "memory-1"]  # not memory-0, nor -2, half done
    for part, of in ("", {"hits": True, "random": 5}), ("-more", {"hits": False, "random": 0}):
        answered = report(1, 0)
        answered["settings"] |= of
        (folder / f"memory-0{part}.json").write_text(json.dumps(answered))
    reproduce.do_all(args)
    assert scripts(made) == []
    args.random = 6
    reproduce.do_all(args)
    assert scripts(made) == ["eval_niah.py"]  # -more has no draws
    args.random, prompts_of = 5, runs.prompts_of
    monkeypatch.setattr(runs, "prompts_of", lambda settings, samples, seed: {"niah_single_1": f"{samples} of seed {seed}"})
    reproduce.do_all(args)
    assert scripts(made) == ["eval_niah.py", "eval_niah.py"]
    monkeypatch.setattr(runs, "prompts_of", prompts_of)
    record = Path("out/reproduce/memory-0/step_0000001/train.json")
    record.write_text(record.read_text().replace('"step": 1280', '"step": 640'))
    reproduce.do_all(args)
    assert scripts(made) == ["train.py", "eval_niah.py", "eval_niah.py"]


def test_answers_of_another_model_that_came_back_are_asked_anew(folder, calls):
    """git checkout, or a second --results: reports that lie there, whole, but not of the model in out/."""
    made, _ = calls
    args = arguments(folder, ["joint"], [0])
    reproduce.do_all(args)
    brief = report(1, 0)
    brief["settings"] |= {"hits": False, "random": 0}
    (folder / "joint-0.json").write_text(json.dumps(brief))
    made.clear()
    reproduce.do_all(args)
    assert made == [] and (folder / "joint-0.json").exists()
    (folder / "joint-0-train.json").write_text(json.dumps(record(60, "micro-sft", None)))
    reproduce.do_all(args)
    assert scripts(made) == ["eval_niah.py"] and not (folder / "joint-0.json").exists()
    assert json.loads((folder / "joint-0-train.json").read_text())["step"] == 1280


def test_what_was_made_of_an_older_model_is_not_taken_for_new(folder, calls):
    """Pretraining done again, with code that has changed, and the answers of the model that was fine-tuned before it."""
    made, _ = calls
    reproduce.do_all(arguments(folder, ["attention", "converted"], [0]))
    shutil.rmtree("out/reproduce/attention-0-pretrained")
    made.clear()
    with pytest.raises(ValueError, match="attention-0 did not start from out/reproduce/attention-0-pretrained as it is now"):
        reproduce.do_all(arguments(folder, ["attention"], [0]))
    assert made == []  # known before anything is trained
    shutil.rmtree("out/reproduce/attention-0")
    reproduce.do_all(arguments(folder, ["attention"], [0]))
    assert scripts(made) == ["train.py", "train.py", "eval_niah.py", "eval_niah.py"]
    with pytest.raises(ValueError, match="converted-0-pretrained did not start from"):
        reproduce.do_all(arguments(folder, ["converted"], [0]))


def test_a_damaged_result_is_known_before_the_training(folder, calls):
    made, _ = calls
    for name in "memory-0-train", "memory-0-more", "memory-0", "attention-1":
        (folder / f"{name}.json").write_text("{")
        with pytest.raises(ValueError, match=f"{name}.json is damaged"):
            reproduce.do_all(arguments(folder, ["memory"], [0]))
        assert made == []


def test_a_trial_is_not_taken_for_the_run(folder, calls):
    args = arguments(folder, ["memory"], [0])
    args.train = ["--steps=2", "--batch=2", "--device_batch=2"]
    reproduce.do_all(args)
    args.train = []
    with pytest.raises(ValueError, match="steps=2"):
        reproduce.do_all(args)


def test_brief_arms_are_asked_the_nine_alone(tmp_path, calls):
    made, _ = calls
    reproduce.do_all(arguments(tmp_path / "new", ["joint", "long"], [0]))
    asked = [command for command in made if command[0] == "eval_niah.py"]
    assert len(asked) == 2 and all(command[command.index("--methods") + 1:] == reproduce.NINE for command in asked)


def test_converted_models_come_after_those_they_start_from(tmp_path, calls):
    made, _ = calls
    with pytest.raises(ValueError, match="attention-0"):
        reproduce.do_all(arguments(tmp_path / "new", ["converted"]))
    reproduce.do_all(arguments(tmp_path / "new", ["converted", "attention"]))
    names = [word for command in made for word in command if word.startswith("--name=")]
    assert names == [f"--name={arm}-{seed}{stage}" for arm in ("attention", "converted") for seed in (0, 1)
                     for stage in ("-pretrained", "")]
    starts = [[word for word in command if word.startswith("--init=")] for command in made if command[0] == "train.py"]
    assert starts[-1] == ["--init=out/reproduce/converted-1-pretrained"] and starts[-2] == ["--init=out/reproduce/attention-1-pretrained"]


@pytest.mark.parametrize("flags, words", [
    (["--train=--steps=3"], "memory-0: train.py ended with code 3"), (["--train=--seed=5"], "--seed=5"), (["--train=--memory=off"], "--memory"), (["--train=--joint=64"], "--joint"),
    (["--train=--name=x"], "--name"), (["--train=--lr '1"], "--train"), (["--train=--init x"], "--init"), (["--seeds", "-1"], "--seeds"), (["--results=plain"], "plain")])
def test_a_failure_is_one_line(calls, monkeypatch, capsys, flags, words):
    """A traceback; a flag that would make all seeds the same, or another arm; a run that no table would tell."""
    Path("plain").touch()
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "--arms", "memory", "--seeds", "0", *flags])
    with pytest.raises(SystemExit) as end:
        reproduce.main()
    line = capsys.readouterr().err
    assert end.value.code == 2 and words in line and line.count("\n") == 1, line
    assert ("memory-0.log" in line) == ("ended" in words)


def test_every_arm_is_two_commands_that_train_accepts():
    """A flag renamed in train.py alone; fine-tuning that has ARL after all, or differs between the arms."""
    tuning = set()
    for arm in reproduce.ARMS:
        first, last = map(train.parse, reproduce.stages_of(arm, 0, SimpleNamespace(train=[])).values())
        assert bool(first.arl) == (arm in ("memory", "converted")) and bool(first.joint) == (arm == "joint")
        assert (first.batch, first.context_len, first.protocol, first.name) == (64, 1024, "sft", f"{arm}-0-pretrained")
        assert (last.arl, last.joint, last.context_len, last.init) == (0, 0, 4096, f"out/reproduce/{arm}-0-pretrained")
        tuning.add(json.dumps(vars(last) | {"init": None, "name": None}))
    assert len(tuning) == 1
    for word in *runs.OURS, "--arl", "--joint":
        with pytest.raises(ValueError, match=word):
            reproduce.stages_of("memory", 0, SimpleNamespace(train=["--lr=1e-3", f"{word}=x"]))
