"""
The tables and plots that we publish, computed by hand: eval_niah.py's and reproduce.py's, from answers to means, intervals, hits
and reads. tests/mutants.py plants a wrong number after the other; these tests see them.
"""
import json
import math
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

import eval_niah
import niah
import reproduce


def drawn(monkeypatch):
    """-> a list that fills with the axes of each figure, which record what is drawn on them instead of drawing it."""
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    from matplotlib import pyplot
    figures = []

    def subplots(rows, columns, **more):
        axes = np.empty((rows, columns), object)
        for place in np.ndindex(rows, columns):
            axes[place] = MagicMock()
        figures.append(axes)
        return MagicMock(), axes[0] if rows == 1 and more.get("squeeze", True) else axes
    monkeypatch.setattr(pyplot, "subplots", subplots)
    return figures


def numbers(values):
    """Of what was drawn: lists that compare."""
    return [[round(float(x), 4) for x in some] for some in values]


# ---------------------------------------------------------------- reproduce.py: means over tasks and seeds

QUEST, SNAPKV = "quest:budget=1/4,block_size=64", "snapkv:budget=1/8,window=64"


def report(dense, quest, chance=(), snapkv=None, hits=None, **settings):
    """As eval_niah.py writes it, of two tasks: each method's score in both; chance: of each draw of quest's entries."""
    rows = []
    for method, scores, random in [("dense", dense, None), (QUEST, quest, None), *((QUEST, of, seed) for seed, of in enumerate(chance)),
                                   *([(SNAPKV, snapkv, None)] if snapkv else [])]:
        for task, score, of_heads in zip(("niah_single_1", "niah_multivalue"), scores, hits or (None, None)):
            rows.append({"method": method, "task": task, "random": random, "n": 5, "prompts": f"p-{task}", "ruler": [score, score - 1, score + 3], "paper": [1, 1, 1],
                         "hits": of_heads if method == QUEST and random is None else None})
    return {"finished": True, "results": rows, "command": "python eval_niah.py", "commit": "c", "device": "d", "torch": "t",
            "settings": {"samples": 5, "seed": 0, "protocol": "sft", "context_len": 4096, "methods": ["dense", QUEST, SNAPKV]} | settings}


HITS = [[[0.5, 0.0], [1.0, 0.25]], [[0.0, 0.5], [0.5, 0.75]]]  # two tasks, (layers, KV)
FOUND = {
    "attention": {0: report((90, 70), (50, 30), [(10, 0), (6, 4)], hits=HITS), 1: report((92, 80), (60, 34), [(12, 2), (8, 0)], hits=HITS)},
    "memory": {0: report((98, 90), (80, 60), [(20, 0), (10, 6)], hits=[[[1.0, 1.0], [0.0, 0.0]]] * 2), 1: report((96, 96), (90, 74), [(30, 10), (20, 0)], hits=HITS)},
}


@pytest.fixture
def found():
    """Two seeds of two arms, with the records of their training."""
    record = {"step": 60, "seconds": 120.0, "tokens_per_second": 5000, "mfu": 0.25, "device": "abacus", "commit": "c0ffee0123", "settings": {"recipe": "micro-sft"},
              "from": {"step": 40, "seconds": 90.0, "tokens_per_second": 7000, "mfu": None, "device": "abacus", "commit": "c0ffee0123+dirty", "settings": {"recipe": "micro"}}}
    return {arm: {seed: json.loads(json.dumps(of | {"train": record})) for seed, of in reports.items()} for arm, reports in FOUND.items()}


def test_means_are_over_tasks_and_draws():
    """A task or a draw that counts twice; draws by chance among the chosen."""
    means = reproduce.means(FOUND["attention"][0])
    assert means == {"dense": 80, QUEST: 40, f"{QUEST} by chance": 5}


def test_hit_rates_are_means_over_tasks_of_each_head_best_first():
    """H1 of the best task, or a mean that takes each task's best head."""
    rates = reproduce.hit_rates(FOUND["attention"][0])
    assert list(rates) == [QUEST] and rates[QUEST].tolist() == [0.75, 0.5, 0.25, 0.25]


@pytest.mark.parametrize("df, t, p", [(1, 12.706, 0.05), (2, 4.303, 0.05), (2, 2.920, 0.10), (3, 3.182, 0.05), (4, 2.776, 0.05), (5, 4.032, 0.01),
                                      (10, 2.228, 0.05), (29, 2.045, 0.05)])
def test_p_is_that_of_students_table(df, t, p):
    """A t test of one side, or of another number of seeds: significance that is not there."""
    assert reproduce.p_of_t(t, df) == pytest.approx(p, abs=1e-4) == reproduce.p_of_t(-t, df)


def test_holm_by_hand():
    """Ten cells of which one is below 0.05 by chance."""
    assert reproduce.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.5}) == pytest.approx({"a": 0.04, "c": 0.09, "b": 0.09, "d": 0.5})
    assert reproduce.holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0} and reproduce.holm({}) == {}


def test_differences_are_paired_by_seed():
    """The sign of a gain; seeds compared with others' data; a spread of nothing that makes anything significant."""
    both = reproduce.compare({0: 3.0, 1: 5.0, 2: 9.0}, {1: 2.0, 0: 1.0, 3: 50.0})
    assert both["by_seed"] == [2.0, 3.0] and both["gain"] == 2.5 and both["p"] == pytest.approx(1 - 2 / math.pi * math.atan(5))  # t = 2.5 / (0.5 ** 0.5 / 2 ** 0.5)
    three = reproduce.compare({0: 1.0, 1: 2.0, 2: 3.0}, {0: 2.0, 1: 4.0, 2: 6.0})
    assert three["gain"] == -2 and three["p"] == pytest.approx(0.0742, abs=1e-4)  # t = -2 x 3 ** 0.5, two degrees of freedom
    assert reproduce.compare({0: 3.0}, {0: 1.0}) == {"gain": 2.0, "p": None, "by_seed": [2.0]}
    assert reproduce.compare({0: 3.0, 1: 4.0}, {0: 1.0, 1: 2.0})["p"] is None and reproduce.compare({0: 1.0}, {1: 1.0}) is None
    cells = reproduce.column({"a": [1.0, 2.0], "b": [5.0, 9.0], "c": [1.0, 1.0]}, {"b": [8.0, 1.0], "a": [0.5, 0.75]}, ([3, 4], [4, 3]))
    assert list(cells) == ["a", "b"] and cells["a"]["by_seed"] == [0.25, 1.5] and cells["b"]["by_seed"] == [4.0, 1.0]
    assert cells["a"]["holm"] == cells["b"]["holm"] == pytest.approx(2 * min(cells["a"]["p"], cells["b"]["p"]), rel=0.2)


def test_a_cell_is_mean_and_sample_standard_deviation():
    """A deviation of the population, which is smaller by a fifth for three seeds; or of the mean."""
    assert reproduce.cell([40.0, 50.0, 63.0]) == "51.0 ± 11.5" and reproduce.cell([40.0]) == "40.0" and reproduce.cell(None) == ""
    assert reproduce.gap({"gain": -1.25, "p": 0.004, "holm": 0.04}) == "**-1.2** (0.004)" and reproduce.gap({"gain": 1.5, "p": 0.04, "holm": 0.08}) == "+1.5 (0.04)"
    assert reproduce.gap({"gain": 1.5, "p": None, "holm": None}) == "+1.5" and reproduce.gap(None) == ""


def test_the_summary_by_hand(found):
    """A table of the wrong arm, kind or seed; draws by chance among the chosen; the fine-tuning's speed told as the pretraining's."""
    summary = reproduce.summarise(found)
    assert summary["scores"] == {"attention": {"dense": [80, 86], QUEST: [40, 47]}, "memory": {"dense": [94, 96], QUEST: [70, 82]}}
    assert summary["by_chance"] == {"attention": {f"{QUEST} by chance": [5, 5.5]}, "memory": {f"{QUEST} by chance": [9, 15]}}
    assert summary["hits"] == {"attention": {QUEST: [75, 75]}, "memory": {QUEST: [100, 75]}}  # 5 % of four heads: the best
    against = summary["against_attention"]["scores"]
    assert list(against) == ["memory"] and {method: (cell["by_seed"], cell["gain"]) for method, cell in against["memory"].items()} == {
        "dense": ([14, 10], 12), QUEST: ([30, 35], 32.5)}
    assert summary["against_attention"]["by_chance"]["memory"][f"{QUEST} by chance"]["gain"] == 6.75 and summary["against_attention"]["hits"]["memory"][QUEST]["gain"] == 12.5
    assert summary["runs"]["memory"][1]["train"]["mfu"] == 0.25 and summary["runs"]["memory"][1]["eval"]["commit"] == "c"
    text = reproduce.markdown(summary, found)
    p = {method: f"{cell['p']:.2g}" for method, cell in against["memory"].items()}
    assert p == {"dense": "0.11", QUEST: "0.049"}  # t = 6 and 13 with one degree of freedom
    scores, chance, hits = text.split("H2, ")[0], text.split("H2, ")[1].split("H1, ")[0], text.split("H1, ")[1]
    assert "attention 2, memory 2" in scores and "5 samples a task, protocol sft, context 4096" in scores
    assert "| | attention | memory | memory - attention |" in scores
    assert f"| dense | 83.0 ± 4.2 | 95.0 ± 1.4 | +12.0 ({p['dense']}) |" in scores and f"| {QUEST} | 43.5 ± 4.9 | 76.0 ± 8.5 | +32.5 ({p[QUEST]}) |" in scores
    assert f"| {QUEST} by chance | 5.2 ± 0.4 | 12.0 ± 4.2 | +6.8" in chance and f"| {QUEST} | 75.0 ± 0.0 | 87.5 ± 17.7 | +12.5" in hits
    assert "by chance" not in scores
    assert ("| memory 1 | micro | 40 | 1.5 | 7,000 |  | abacus | c0ffee0+dirty |\n"
            "| memory 1 | micro-sft | 60 | 2.0 | 5,000 | 0.25 | abacus | c0ffee0 |\n") in text


def test_hits_of_many_heads_are_of_the_best_twentieth():
    """H1 of one lucky head of a thousand."""
    hits = torch.arange(40).view(4, 10) / 40
    found = {"attention": {0: report((1, 1), (1, 1), hits=[hits.tolist()] * 2) | {"train": None}}}
    assert reproduce.summarise(found)["hits"] == {"attention": {QUEST: [pytest.approx(100 * 38.5 / 40)]}}  # two of 40


def test_each_arm_is_asked_what_the_table_tells(tmp_path, monkeypatch):
    """H1 or H2 that nobody asked; another seed of the examples, or fewer samples, than the flags say."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce.runs, "finished", lambda run, flags: True)
    monkeypatch.setattr(reproduce.eval_niah, "training_record", lambda run: {"step": 1})
    args, calls = SimpleNamespace(results="results", random=4, samples=7, eval_seed=3, batch=9, train=[]), []
    for arm in "memory", "long":
        reproduce.do(arm, 0, {}, args, lambda command, log: calls.append(command[1:]))
    asked = [vars(eval_niah.flags().parse_args(flags)) for flags in calls]
    assert [(of["methods"], of["hits"], of["random"]) for of in asked] == [(reproduce.NINE, True, 4), (reproduce.OTHERS, False, 0), (reproduce.NINE, False, 0)]
    assert all((of["samples"], of["seed"], of["batch"]) == (7, 3, 9) for of in asked)
    assert [of["json"] for of in asked] == ["results/memory-0.json", "results/memory-0-more.json", "results/long-0.json"]
    assert reproduce.NINE == [f"{kind}:budget=1/{n}" for kind in ("quest", "moba", "snapkv") for n in (4, 8, 16)]


def test_bold_is_what_holds_for_a_column(found):
    """A lead told as one that is not, or that is one among the cells that chance would make."""
    for arm, reports in found.items():
        reports[2] = json.loads(json.dumps(reports[0]))
        for row in reports[2]["results"]:
            row["ruler"][0] += 2.5 if arm == "memory" and row["method"] == QUEST else 0.0
    text, against = reproduce.markdown(reproduce.summarise(found), found), reproduce.summarise(found)["against_attention"]["scores"]["memory"]
    assert against[QUEST]["by_seed"] == [30, 35, 32.5] and against[QUEST]["holm"] == pytest.approx(2 * against[QUEST]["p"])
    assert against["dense"]["by_seed"] == [14, 10, 14] and 0.01 < against["dense"]["holm"] < 0.05
    assert text.count("**+32.5** (0.002") == 1 and text.count("**+12.7** (0.011)") == 1 and text.count("**") == 4


def test_results_of_a_folder_are_those_of_finished_runs(tmp_path):
    """A run that is not over, or was asked others, in the mean; the rows of other methods lost, or dense counted twice."""
    (tmp_path / "memory-1-train.json").write_text(json.dumps({"step": 1, "seconds": 1, "device": "d", "commit": "c", "settings": {}}))
    (tmp_path / "memory-1.json").write_text(json.dumps(report((90, 70), (50, 30))))
    (tmp_path / "memory-2.json").write_text(json.dumps(report((9, 7), (5, 3)) | {"finished": False}))
    more = report((90, 70), (1, 1), snapkv=(20, 40))
    for settings, methods in ({}, {"dense", QUEST, SNAPKV}), ({"samples": 6}, {"dense", QUEST}), ({"seed": 1}, {"dense", QUEST}):
        content = more | {"settings": more["settings"] | settings, "results": [row for row in more["results"] if row["method"] != QUEST]}
        (tmp_path / "memory-1-more.json").write_text(json.dumps(content))
        found = reproduce.read_results(tmp_path)
        assert list(found) == ["memory"] and list(found["memory"]) == [1]
        rows = found["memory"][1]["results"]
        assert {row["method"] for row in rows} == methods and sum(row["method"] == "dense" for row in rows) == 2 and found["memory"][1]["train"]["step"] == 1


def test_plots_of_the_summary_show_its_numbers(found, tmp_path, monkeypatch):
    """A figure of other numbers than the table: of one seed, one task for all, draws by chance, or in another order of budgets."""
    nine = [f"{kind}:budget=1/{n}" for kind in ("quest", "moba", "snapkv") for n in (4, 8, 16)]
    for a, (arm, reports) in enumerate(found.items()):
        for seed, of in reports.items():
            of["settings"]["methods"] = ["dense", *nine]
            of["results"] = [{"method": method, "task": task, "random": random, "ruler": [50 * a + 10 * seed + m + 2 * t + (100 if random == 0 else 0), 0, 0],
                              "hits": None if method.startswith("moba") else [[0.5, 0.25 * seed]]}
                             for m, method in enumerate(["dense", *nine]) for t, task in enumerate(("niah_single_1", "niah_multivalue")) for random in (None, 0)]
    found["joint"] = found["attention"]  # a control, which is in no plot
    figures = drawn(monkeypatch)
    reproduce.plots(found, tmp_path)
    accuracy, hits = figures
    assert accuracy.shape == (3, 2) and hits.shape == (1, 6)
    for k in range(3):
        for t in range(2):
            calls = accuracy[k, t].errorbar.call_args_list
            assert [call.kwargs["label"] for call in calls] == ["attention", "memory"]
            for a, call in enumerate(calls):
                means = [50 * a + 5 + 3 * k + m + 2 * t for m in (1, 2, 3)]
                assert numbers(call.args) == numbers([[0, 1, 2], means, [50 ** 0.5] * 3])
            assert accuracy[k, t].set.call_args.kwargs["title"] == f"{('quest', 'moba', 'snapkv')[k]} {('S-1', 'MV')[t]}"
            assert accuracy[k, t].set.call_args.kwargs["xticklabels"] == ("1/4", "1/8", "1/16")
    for axis in hits[0]:
        for call in axis.plot.call_args_list:
            assert numbers(call.args) == numbers([[1, 2], [50, 12.5]])
