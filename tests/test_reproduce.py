"""
experiments/reproduce.py: what is done is not done again, and a failure is told. The summary's
figures are worked by hand in test_report_tables.py, refused flags are in test_refusals.py.
"""
import itertools
import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

import eval_niah
import niah
import sparse
import train
from experiments import reproduce, runs
from infra import cli, runlog
from infra.tokenizers import ByteTokenizer

# of a shorter context, as tests are
SIZED = [cli.sized(method, 1024, ByteTokenizer(), sparse.METHODS) for method in eval_niah.METHODS]
QUEST = SIZED[0]


def report(score, n_hit=0, brief=False, finished=True, **settings):
    """
    As eval_niah.py writes it, with the same score everywhere; n_hit of 24 heads hit always. brief:
    without draws and hits.
    """
    hits = [[1.0 if 6 * layer + head < n_hit else 0.0 for head in range(6)] for layer in range(4)]
    rows = []
    for method, task in itertools.product(["dense", *SIZED], niah.TASKS):
        selects = method.startswith(("quest", "snapkv")) and not brief
        for draw in [None, 0, 1] if "1/4" in method and not brief else [None]:
            rows.append({"method": method, "task": task, "random": draw, "n": 3,
                         "prompts": "p", "ruler": [score - (draw or 0), 0, 100],
                         "hits": hits if draw is None and selects else None})
    given = {"samples": 3, "seed": 0, "protocol": "sft", "context_len": 1024,
             "methods": ["dense", *SIZED]}
    return {"finished": finished, "results": rows, "command": "python eval_niah.py", "commit": "c",
            "device": "d", "torch": "t", "settings": given | settings}


def record(steps, recipe, made_from):
    return {"step": steps, "seconds": 120, "tokens_per_second": 5000, "mfu": 0.25,
            "device": "abacus", "commit": "c0ffee00+dirty", "settings": {"recipe": recipe},
            "from": made_from}


MADE = record(60, "micro-sft", record(40, "micro", None))


def write(folder, **content):
    """NAME.json, of which underscores are hyphens."""
    for name, of in content.items():
        (folder / f"{name.replace('_', '-')}.json").write_text(json.dumps(of))


@pytest.fixture
def folder(tmp_path):
    """Two seeds of attention at 40 and 50, of memory at 60 and 64; a third that is not done."""
    for name, score, n_hit in (("attention_0", 40, 0), ("attention_1", 50, 0),
                               ("memory_0", 60, 1), ("memory_1", 64, 24)):
        write(tmp_path, **{name: report(score, n_hit), f"{name}_train": MADE,
                           f"{name}_more": report(score, n_hit) | {"results": []}})
    half = report(99, finished=False)
    write(tmp_path, memory_2=half, memory_2_more=half)
    return tmp_path


def summary_of(folder):
    """-> the summary, and its text"""
    found = reproduce.read_results(folder)
    summary = reproduce.summarise(found)
    return summary, reproduce.markdown(summary, found)


# ---------------------------------------------------------------- the summary

def drawn(rng, n_cells):
    """A column of models that differ by their seed alone."""
    score = lambda: [[60 + rng.gauss(0, 5) for _ in range(3)] for _ in range(n_cells)]
    return reproduce.column(dict(enumerate(score())), dict(enumerate(score())),
                            ([0, 1, 2], [0, 1, 2]))


def test_nothing_is_bold_where_only_seeds_differ():
    """A rule that calls one of ten cells a gain where there is none: nearly every column of 14."""
    rng = random.Random(0)
    bold = [any("**" in reproduce.gap(cell) for cell in drawn(rng, 14).values())
            for _ in range(1000)]
    assert 0.01 < sum(bold) / 1000 < 0.07  # 0.05, and chance
    alone = [cell["p"] < 0.05 for _ in range(200) for cell in drawn(rng, 14).values()]
    assert 0.04 < sum(alone) / len(alone) < 0.06


def test_differences_are_of_the_seeds_that_both_have(folder):
    """Attention's seed 0 subtracted from memory's seed 1, as each is the first of its list."""
    (folder / "attention-0.json").unlink()
    write(folder, memory_2=report(66), memory_10=report(10), memory_2_train=MADE,
          memory_10_train=MADE)
    (folder / "memory-2-more.json").unlink()
    summary, text = summary_of(folder)
    against = summary["against_attention"]["scores"]["memory"]
    assert against[QUEST] == {"gain": 14, "interval": None, "p": None, "by_seed": [14],
                              "holm": None}
    assert f"| {QUEST} | 50.0 | 50.0 ± 26.8 | +14.0 |" in text
    (folder / "attention-1.json").unlink()
    write(folder, attention_7=report(1), attention_7_train=MADE)
    summary, text = summary_of(folder)
    assert summary["against_attention"]["scores"]["memory"] == {}
    assert f"| {QUEST} | 1.0 | 50.0 ± 26.8 |  |" in text


def test_the_summary_that_lies_here_is_of_the_results_beside_it():
    """A rule that changed, and a table made by the old one."""
    folder = Path(reproduce.__file__).parent.parent / "results" / "reproduce"
    summary, text = summary_of(folder)
    assert (folder / "summary.md").read_text() == text
    assert json.loads((folder / "summary.json").read_text())["scores"] == summary["scores"]


def test_results_of_other_prompts_do_not_mix(folder):
    """200 samples beside 100."""
    file = folder / "memory-1.json"
    file.write_text(file.read_text().replace('"p"', '"other"'))
    with pytest.raises(ValueError, match="memory-1.json"):
        reproduce.read_results(folder)


def test_results_are_those_of_finished_runs_that_were_asked_alike(folder):
    """A run that is not over in a mean; -more of one seed, or of other prompts; dense twice."""
    more = report(33)
    more["results"] = [row | {"method": method} for row in more["results"][:8]
                       for method in ("dense", "dilated")]
    scores = lambda: summary_of(folder)[0]["scores"]["memory"]
    write(folder, memory_0_more=more)
    assert "dilated" not in scores() and scores()[QUEST] == scores()["dense"] == [60, 64]
    write(folder, memory_1_more=more)
    assert scores()["dilated"] == [33, 33] and scores()["dense"] == [60, 64]
    assert reproduce.read_results(folder)["memory"][1]["train"]["step"] == 60
    for of in dict(samples=4), dict(seed=1):
        write(folder, memory_1_more=more | {"settings": more["settings"] | of})
        assert "dilated" not in scores()


def test_arms_that_are_asked_less_leave_cells_empty(folder):
    """A figure of another arm in the cell of one that was never asked."""
    write(folder, long_0=report(70, brief=True), long_0_train=MADE)
    found = reproduce.read_results(folder)
    summary = reproduce.summarise(found)
    for arm in "attention", "memory":
        summary["scores"][arm]["dilated"] = [1.0, 1.0]
    text = reproduce.markdown(summary, found)
    for line in (f"| {QUEST} | 45.0 ± 7.1 | 70.0 | 62.0 ± 2.8 | +17.0 (0.11) |",
                 "| dilated | 1.0 ± 0.0 |  | 1.0 ± 0.0 |",
                 f"| {QUEST} by chance | 44.5 ± 7.1 | 61.5 ± 2.8 | +17.0 (0.11) |",
                 f"| {QUEST} | 0.0 ± 0.0 | 100.0 ± 0.0 | +100.0 |"):  # H1
        assert line in text


def test_plots_are_of_the_arms_that_are_no_controls(folder):
    """A traceback where nobody was asked for hits; a control in a plot."""
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    accuracy, hits = folder / "accuracy.png", folder / "hits.png"
    for arm, plotted in ("long", False), ("converted", True):
        found = {arm: {0: report(70, brief=True) | {"train": MADE}}}
        text = reproduce.markdown(reproduce.summarise(found), found)
        assert "H1" not in text and "H2" not in text and f"| {QUEST} | 70.0 |\n" in text
        reproduce.plots(found, folder)
        assert accuracy.exists() == plotted and not hits.exists()
    reproduce.plots(reproduce.read_results(folder), folder)
    for plot in accuracy, hits:
        assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("foreign", ["{", "{}", "[]"])
def test_a_foreign_report_is_named(folder, foreign):
    for name in "memory-0-train.json", "memory-0-more.json", "memory-0.json":
        (folder / name).write_text(foreign)
        with pytest.raises(ValueError, match=f"{name} .* move it away"):
            reproduce.read_results(folder)


# ---------------------------------------------------------------- what is run

@pytest.fixture
def calls(monkeypatch, tmp_path):
    """
    Commands instead of processes. A train.py leaves a run with all its steps, in a folder of its
    own; one of three steps fails.
    """
    monkeypatch.chdir(tmp_path)
    made, asked_before, numbers = [], [], itertools.count()

    class Process:
        def __init__(self, words, **_):
            made.append([Path(words[1]).name, *words[2:]])
            if made[-1][0] == "train.py":
                settings = train.parse(words[2:])
                run = Path(settings.out, settings.name, "step_0000001")
                run.mkdir(parents=True, exist_ok=True)
                (run / "config.json").write_text("{}")
                write(run, train={
                    "step": settings.steps, "settings": vars(settings), "made": next(numbers),
                    "first_sample": "s", "from": runlog.begun(settings, None)["from"]})

        def wait(self):
            return 3 if "--steps=3" in made[-1] else 0
    monkeypatch.setattr(runs.subprocess, "Popen", Process)
    monkeypatch.setattr(runs, "prompts_of", lambda *_: dict.fromkeys(niah.TASKS, "p"))
    monkeypatch.setattr(runs, "refuse_other_prompts", lambda stay, _: asked_before.append(stay))
    return made, asked_before


@pytest.fixture
def do(folder, calls):
    """-> do_all of some arms, which gives the scripts that it ran"""
    def do_all(*arms, seeds=(0,), **more):
        given = dict(results=str(folder), random=5, samples=3, eval_seed=0, batch=200, train=[],
                     arms=arms, seeds=seeds, per_gpu=1)
        calls[0].clear()
        reproduce.do_all(SimpleNamespace(**given | more))
        return [words[0] for words in calls[0]]
    return do_all


TRAIN, ASK = ["train.py"], ["eval_niah.py"]


def test_what_is_there_is_not_made_again(folder, calls, do, monkeypatch):
    """Hours of training repeated; half a run taken for a whole one; a new model's old answers."""
    assert do("memory") == 2 * TRAIN + 2 * ASK  # the results there were of another model
    # not memory-0, nor -2, half done
    stay = [file.stem for file in calls[1][0]]
    assert stay == ["attention-0", "attention-1", "memory-1"]
    write(folder, memory_0=report(1, hits=True, random=5),
          memory_0_more=report(1, hits=False, random=0))
    assert do("memory") == []
    assert do("memory", random=6) == ASK  # -more has no draws
    with monkeypatch.context() as patch:
        patch.setattr(runs, "prompts_of", lambda *_: {"niah_single_1": "another"})
        assert do("memory") == 2 * ASK
    half = Path("out/reproduce/memory-0/step_0000001/train.json")
    half.write_text(half.read_text().replace('"step": 1280', '"step": 640'))
    assert do("memory") == TRAIN + 2 * ASK


def test_answers_of_another_model_that_came_back_are_asked_anew(folder, do):
    """git checkout, or a second --results: reports, whole, but not of the model in out/."""
    do("joint")
    write(folder, joint_0=report(1, hits=False, random=0))
    assert do("joint") == [] and (folder / "joint-0.json").exists()
    write(folder, joint_0_train=MADE)
    assert do("joint") == ASK and not (folder / "joint-0.json").exists()
    assert json.loads((folder / "joint-0-train.json").read_text())["step"] == 1280


def test_what_was_made_of_an_older_model_is_not_taken_for_new(calls, do):
    """Pretraining done again, and the answers of the model that was fine-tuned before it."""
    do("attention", "converted")
    shutil.rmtree("out/reproduce/attention-0-pretrained")
    with pytest.raises(ValueError, match="attention-0 did not start from out/reproduce/attention-0-"
                                         "pretrained as it is now"):
        do("attention")
    assert calls[0] == []  # known before anything is trained
    shutil.rmtree("out/reproduce/attention-0")
    assert do("attention") == 2 * TRAIN + 2 * ASK
    with pytest.raises(ValueError, match="converted-0-pretrained did not start from"):
        do("converted")


def test_a_damaged_result_is_known_before_the_training(folder, calls, do):
    for name in "memory-0-train", "memory-0-more", "memory-0", "attention-1":
        (folder / f"{name}.json").write_text("{")
        with pytest.raises(ValueError, match=f"{name}.json is damaged"):
            do("memory")
        assert calls[0] == []


def test_a_trial_is_not_taken_for_the_run_and_a_failure_is_named(do):
    """A table of two steps; a failure whose log has to be looked for."""
    do("memory", train=["--steps=2", "--batch=2", "--device_batch=2"])
    with pytest.raises(ValueError, match="steps=2"):
        do("memory")
    with pytest.raises(ValueError, match="long-0: train.py ended with code 3, .*long-0.log"):
        do("long", train=["--steps=3"])


def test_converted_models_come_after_those_they_start_from(calls, do):
    with pytest.raises(ValueError, match="attention-0"):
        do("converted", seeds=(0, 1))
    do("converted", "attention", seeds=(0, 1))
    flag = lambda name: [word for words in calls[0] if words[0] == "train.py" for word in words
                         if word.startswith(f"--{name}=")]
    assert flag("name") == [f"--name={arm}-{seed}{stage}" for arm in ("attention", "converted")
                            for seed in (0, 1) for stage in ("-pretrained", "")]
    assert flag("init")[-2:] == ["--init=out/reproduce/attention-1-pretrained",
                                 "--init=out/reproduce/converted-1-pretrained"]


def test_every_arm_is_two_commands_that_train_accepts():
    """A flag renamed in train.py alone; fine-tuning that has ARL, or differs between the arms."""
    tuning = set()
    stages = lambda arm, *flags: reproduce.stages_of(arm, 7, SimpleNamespace(train=[*flags]))
    for arm in reproduce.ARMS:
        first, last = map(train.parse, stages(arm, "--lr=0.5").values())
        assert bool(first.arl) == (arm in ("memory", "converted"))
        assert bool(first.joint) == (arm == "joint")
        assert (first.batch, first.context_len, first.protocol) == (64, 1024, "sft")
        assert (last.arl, last.joint, last.context_len) == (0, 0, 4096)
        assert last.init == f"out/reproduce/{arm}-7-pretrained"
        for settings, name in (first, f"{arm}-7-pretrained"), (last, f"{arm}-7"):
            assert (settings.name, settings.out) == (name, "out/reproduce")
            assert (settings.seed, settings.lr, settings.resume) == (7, 0.5, True)
        tuning.add(json.dumps(vars(last) | {"init": None, "name": None}))
    assert len(tuning) == 1
    for word in *runs.OURS, "--arl", "--joint":
        with pytest.raises(ValueError, match=word):
            stages("memory", "--lr=1e-3", f"{word}=x")
