"""
The tables and plots that we publish, computed by hand: eval_niah.py's and reproduce.py's, from
answers to means, intervals, hits and reads. tests/mutants.py plants a wrong number after the other;
these tests see them.
"""
import json
import math
import random
from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from conftest import tiny
from test_niah import Bytes

import eval_niah
import niah
import sample
import sparse
from experiments import reproduce
from infra import answers, files
from infra.reads import PromptReads, Source, StepReads, was_read
from infra.report import best_heads, difference, interval, mean, plot, table, table_random

NAMES = {task: kind.short for task, kind in niah.TASKS.items()}


def drawn(monkeypatch):
    """
    -> a list that fills with the axes of each figure, which record what is drawn on them instead of
    drawing it.
    """
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


# ---------------------------------------------------------------- reproduce.py: means over tasks
# and seeds

QUEST, SNAPKV = "quest:budget=1/4,block_size=64", "snapkv:budget=1/8,window=64"


def report(dense, quest, chance=(), snapkv=None, hits=None, **settings):
    """
    As eval_niah.py writes it, of two tasks: each method's score in both; chance: of each draw of
    quest's entries.
    """
    rows = []
    for method, scores, random in [("dense", dense, None), (QUEST, quest, None),
                                   *((QUEST, of, seed) for seed, of in enumerate(chance)),
                                   *([(SNAPKV, snapkv, None)] if snapkv else [])]:
        for task, score, of_heads in zip(("niah_single_1", "niah_multivalue"), scores,
                                         hits or (None, None)):
            rows.append({"method": method, "task": task, "random": random, "n": 5,
                         "prompts": f"p-{task}", "ruler": [score, score - 1, score + 3],
                         "paper": [1, 1, 1],
                         "hits": of_heads if method == QUEST and random is None else None})
    return {"finished": True, "results": rows, "command": "python eval_niah.py", "commit": "c",
            "device": "d", "torch": "t",
            "settings": {"samples": 5, "seed": 0, "protocol": "sft", "context_len": 4096,
                         "methods": ["dense", QUEST, SNAPKV]} | settings}


HITS = [[[0.5, 0.0], [1.0, 0.25]], [[0.0, 0.5], [0.5, 0.75]]]  # two tasks, (layers, KV)
FOUND = {
    "attention": {0: report((90, 70), (50, 30), [(10, 0), (6, 4)], hits=HITS),
                  1: report((92, 80), (60, 34), [(12, 2), (8, 0)], hits=HITS)},
    "memory": {0: report((98, 90), (80, 60), [(20, 0), (10, 6)],
                         hits=[[[1.0, 1.0], [0.0, 0.0]]] * 2),
               1: report((96, 96), (90, 74), [(30, 10), (20, 0)], hits=HITS)},
}


@pytest.fixture
def found():
    """Two seeds of two arms, with the records of their training."""
    record = {"step": 60, "seconds": 120.0, "tokens_per_second": 5000, "mfu": 0.25,
              "device": "abacus", "commit": "c0ffee0123", "settings": {"recipe": "micro-sft"},
              "from": {"step": 40, "seconds": 90.0, "tokens_per_second": 7000, "mfu": None,
                       "device": "abacus", "commit": "c0ffee0123+dirty",
                       "settings": {"recipe": "micro"}}}
    return {arm: {seed: json.loads(json.dumps(of | {"train": record})) for seed,
                  of in reports.items()} for arm, reports in FOUND.items()}


def test_means_are_over_tasks_and_draws():
    """A task or a draw that counts twice; draws by chance among the chosen."""
    means = reproduce.means(FOUND["attention"][0])
    assert means == {"dense": 80, QUEST: 40, f"{QUEST} by chance": 5}


def test_hit_rates_are_means_over_tasks_of_each_head_best_first():
    """H1 of the best task, or a mean that takes each task's best head."""
    rates = reproduce.hit_rates(FOUND["attention"][0])
    assert list(rates) == [QUEST] and rates[QUEST].tolist() == [0.75, 0.5, 0.25, 0.25]


@pytest.mark.parametrize("df, t, p", [(1, 12.706, 0.05), (2, 4.303, 0.05), (2, 2.920, 0.10),
                                      (2, 9.925, 0.01), (3, 3.182, 0.05), (4, 2.776, 0.05),
                                      (5, 4.032, 0.01), (10, 2.228, 0.05), (29, 2.045, 0.05)])
def test_p_is_that_of_students_table(df, t, p):
    """A t test of one side, or of another number of seeds: significance that is not there."""
    assert reproduce.p_of_t(t, df) == pytest.approx(p, abs=1e-4) == reproduce.p_of_t(-t, df)
    assert reproduce.p_of_t(0, df) == 1


def test_holm_by_hand():
    """Ten cells of which one is below 0.05 by chance."""
    assert reproduce.holm({"a": 0.01, "b": 0.04, "c": 0.03,
                           "d": 0.5}) == pytest.approx({"a": 0.04, "c": 0.09, "b": 0.09, "d": 0.5})
    assert reproduce.holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0} and reproduce.holm({}) == {}


def test_differences_are_paired_by_seed():
    """
    The sign of a gain; seeds compared with others' data; a spread of nothing that makes anything
    significant.
    """
    both = reproduce.compare({0: 3.0, 1: 5.0, 2: 9.0}, {1: 2.0, 0: 1.0, 3: 50.0})
    assert both["by_seed"] == [2.0, 3.0]
    assert both["gain"] == 2.5
    # t = 2.5 / (0.5 ** 0.5 / 2 ** 0.5)
    assert both["p"] == pytest.approx(1 - 2 / math.pi * math.atan(5))
    three = reproduce.compare({0: 1.0, 1: 2.0, 2: 3.0}, {0: 2.0, 1: 4.0, 2: 6.0})
    assert three["gain"] == -2
    # t = -2 x 3 ** 0.5, two degrees of freedom
    assert three["p"] == pytest.approx(0.0742, abs=1e-4)
    assert reproduce.compare({0: 3.0}, {0: 1.0}) == {"gain": 2.0, "p": None, "by_seed": [2.0]}
    assert reproduce.compare({0: 3.0, 1: 4.0}, {0: 1.0, 1: 2.0})["p"] is None
    assert reproduce.compare({0: 1.0}, {1: 1.0}) is None
    cells = reproduce.column({"a": [1.0, 2.0], "b": [5.0, 9.0], "c": [1.0, 1.0]},
                             {"b": [8.0, 1.0], "a": [0.5, 0.75]}, ([3, 4], [4, 3]))
    assert list(cells) == ["a", "b"]
    assert cells["a"]["by_seed"] == [0.25, 1.5]
    assert cells["b"]["by_seed"] == [4.0, 1.0]
    p = sorted(cell["p"] for cell in cells.values())
    assert sorted(cell["holm"] for cell in cells.values()) == [min(1, 2 * p[0]),
                                                               max(2 * p[0], p[1])]


def test_a_cell_is_mean_and_sample_standard_deviation():
    """
    A deviation of the population, which is smaller by a fifth for three seeds; or of the mean.
    """
    assert reproduce.cell([40.0, 50.0, 63.0]) == "51.0 ± 11.5"
    assert reproduce.cell([40.0]) == "40.0"
    assert reproduce.cell(None) == ""
    assert reproduce.gap({"gain": -1.25, "p": 0.004, "holm": 0.04}) == "**-1.2** (0.004)"
    assert reproduce.gap({"gain": 1.5, "p": 0.04, "holm": 0.08}) == "+1.5 (0.04)"
    assert reproduce.gap({"gain": 1.5, "p": None, "holm": None}) == "+1.5"
    assert reproduce.gap(None) == ""


def test_the_summary_by_hand(found):
    """
    A table of the wrong arm, kind or seed; draws by chance among the chosen; the fine-tuning's
    speed told as the pretraining's.
    """
    summary = reproduce.summarise(found)
    assert summary["scores"] == {"attention": {"dense": [80, 86], QUEST: [40, 47]},
                                 "memory": {"dense": [94, 96], QUEST: [70, 82]}}
    assert summary["by_chance"] == {"attention": {f"{QUEST} by chance": [5, 5.5]},
                                    "memory": {f"{QUEST} by chance": [9, 15]}}
    # 5 % of four heads: the best
    assert summary["hits"] == {"attention": {QUEST: [75, 75]}, "memory": {QUEST: [100, 75]}}
    against = summary["against_attention"]["scores"]
    assert list(against) == ["memory"]
    assert {method: (cell["by_seed"], cell["gain"]) for method,
            cell in against["memory"].items()} == {
        "dense": ([14, 10], 12), QUEST: ([30, 35], 32.5)}
    assert summary["against_attention"]["by_chance"]["memory"][f"{QUEST} by chance"]["gain"] == 6.75
    assert summary["against_attention"]["hits"]["memory"][QUEST]["gain"] == 12.5
    assert summary["runs"]["memory"][1]["train"]["mfu"] == 0.25
    assert summary["runs"]["memory"][1]["eval"]["commit"] == "c"
    text = reproduce.markdown(summary, found)
    p = {method: f"{cell['p']:.2g}" for method, cell in against["memory"].items()}
    assert p == {"dense": "0.11", QUEST: "0.049"}  # t = 6 and 13 with one degree of freedom
    scores, _, rest = text.partition("H2, ")
    chance, _, hits = rest.partition("H1, ")
    assert "attention 2, memory 2" in scores
    assert "5 samples a task, protocol sft, context 4096" in scores
    assert "| | attention | memory | memory - attention |" in scores
    assert f"| dense | 83.0 ± 4.2 | 95.0 ± 1.4 | +12.0 ({p['dense']}) |" in scores
    assert f"| {QUEST} | 43.5 ± 4.9 | 76.0 ± 8.5 | +32.5 ({p[QUEST]}) |" in scores
    assert f"| {QUEST} by chance | 5.2 ± 0.4 | 12.0 ± 4.2 | +6.8" in chance
    assert f"| {QUEST} | 75.0 ± 0.0 | 87.5 ± 17.7 | +12.5" in hits
    assert "by chance" not in scores
    assert ("| memory 1 | micro | 40 | 1.5 | 7,000 |  | abacus | c0ffee0+dirty |\n"
            "| memory 1 | micro-sft | 60 | 2.0 | 5,000 | 0.25 | abacus | c0ffee0 |\n") in text


def test_hits_of_many_heads_are_of_the_best_twentieth():
    """H1 of one lucky head of a thousand."""
    hits = torch.arange(40).view(4, 10) / 40
    found = {"attention": {0: report((1, 1), (1, 1), hits=[hits.tolist()] * 2) | {"train": None}}}
    rates, = reproduce.summarise(found)["hits"]["attention"][QUEST]
    assert rates == pytest.approx(100 * 38.5 / 40)  # two of 40


def test_each_arm_is_asked_what_the_table_tells(tmp_path, monkeypatch):
    """
    H1 or H2 that nobody asked; another seed of the examples, or fewer samples, than the flags say.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce.runs, "finished", lambda run, flags: True)
    monkeypatch.setattr(reproduce.runlog, "training_record", lambda run: {"step": 1})
    args, calls = SimpleNamespace(results="results", random=4, samples=7, eval_seed=3, batch=9,
                                  train=[]), []
    for arm in "memory", "long":
        reproduce.do(arm, 0, {}, args, lambda command, log: calls.append(command[1:]))
    asked = [vars(eval_niah.flags().parse_args(flags)) for flags in calls]
    assert [(of["methods"], of["hits"], of["random"])
            for of in asked] == [(reproduce.NINE, True, 4), (reproduce.OTHERS, False, 0),
                                 (reproduce.NINE, False, 0)]
    assert all((of["samples"], of["seed"], of["batch"]) == (7, 3, 9) for of in asked)
    assert [of["json"] for of in asked] == ["results/memory-0.json", "results/memory-0-more.json",
                                            "results/long-0.json"]
    assert reproduce.NINE == [f"{kind}:budget=1/{n}" for kind in ("quest", "moba", "snapkv")
                              for n in (4, 8, 16)]


def test_bold_is_what_holds_for_a_column(found):
    """A lead told as one that is not, or that is one among the cells that chance would make."""
    for arm, reports in found.items():
        reports[2] = json.loads(json.dumps(reports[0]))
        for row in reports[2]["results"]:
            row["ruler"][0] += 2.5 if arm == "memory" and row["method"] == QUEST else 0.0
    summary = reproduce.summarise(found)
    text, against = reproduce.markdown(summary,
                                       found), summary["against_attention"]["scores"]["memory"]
    assert against[QUEST]["by_seed"] == [30, 35, 32.5]
    assert against[QUEST]["holm"] == pytest.approx(2 * against[QUEST]["p"])
    assert against["dense"]["by_seed"] == [14, 10, 14] and 0.01 < against["dense"]["holm"] < 0.05
    assert text.count("**+32.5** (0.002") == 1
    assert text.count("**+12.7** (0.011)") == 1
    assert text.count("**") == 4


def test_results_of_a_folder_are_those_of_finished_runs(tmp_path):
    """
    A run that is not over, or was asked others, in the mean; the rows of other methods lost, or
    dense counted twice.
    """
    record = {"step": 1, "seconds": 1, "device": "d", "commit": "c", "settings": {}}
    (tmp_path / "memory-1-train.json").write_text(json.dumps(record))
    (tmp_path / "memory-1.json").write_text(json.dumps(report((90, 70), (50, 30))))
    (tmp_path / "memory-2.json").write_text(json.dumps(report((9, 7), (5, 3))
                                                       | {"finished": False}))
    more = report((90, 70), (1, 1), snapkv=(20, 40))
    for settings, methods in ({}, {"dense", QUEST,
                                   SNAPKV}), ({"samples": 6},
                                              {"dense", QUEST}), ({"seed": 1}, {"dense", QUEST}):
        content = more | {"settings": more["settings"] | settings,
                          "results": [row for row in more["results"] if row["method"] != QUEST]}
        (tmp_path / "memory-1-more.json").write_text(json.dumps(content))
        found = reproduce.read_results(tmp_path)
        assert list(found) == ["memory"] and list(found["memory"]) == [1]
        rows = found["memory"][1]["results"]
        assert {row["method"] for row in rows} == methods
        assert sum(row["method"] == "dense" for row in rows) == 2
        assert found["memory"][1]["train"]["step"] == 1


def test_plots_of_the_summary_show_its_numbers(found, tmp_path, monkeypatch):
    """
    A figure of other numbers than the table: of one seed, one task for all, draws by chance, or in
    another order of budgets.
    """
    nine = [f"{kind}:budget=1/{n}" for kind in ("quest", "moba", "snapkv") for n in (4, 8, 16)]
    for a, (arm, reports) in enumerate(found.items()):
        for seed, of in reports.items():
            of["settings"]["methods"] = ["dense", *nine]
            of["results"] = [{"method": method, "task": task, "random": random,
                              "ruler": [50 * a + 10 * seed + m + 2 * t
                                        + (100 if random == 0 else 0), 0, 0],
                              "hits": None if method.startswith("moba") else [[0.5, 0.25 * seed]]}
                             for m, method in enumerate(["dense", *nine]) for t,
                             task in enumerate(("niah_single_1", "niah_multivalue"))
                             for random in (None, 0)]
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
            labels = accuracy[k, t].set.call_args.kwargs
            assert labels["title"] == f"{('quest', 'moba', 'snapkv')[k]} {('S-1', 'MV')[t]}"
            assert labels["xticklabels"] == ("1/4", "1/8", "1/16")
    for axis in hits[0]:
        for call in axis.plot.call_args_list:
            assert numbers(call.args) == numbers([[1, 2], [50, 12.5]])


# ---------------------------------------------------------------- eval_niah.py: scores and
# intervals

@pytest.mark.parametrize("found, n, low, high",
                         [(81, 263, 25.53, 36.62), (15, 148, 6.24, 16.05), (0, 20, 0.00, 16.11),
                          (20, 20, 83.89, 100.00), (1, 29, 0.61, 17.18)])
def test_intervals_are_those_published(found, n, low, high):
    """
    Newcombe, Statistics in Medicine 17 (1998), p. 857, table I, method 3. An interval of another
    level, or of another n.
    """
    p, *ends = interval([1.0] * found + [0.0] * (n - found))
    assert p == pytest.approx(100 * found / n, abs=0.006)
    assert ends == pytest.approx([low, high], abs=0.011)


@pytest.mark.parametrize("both, second, first, neither, paired, gain, low, high", [
    (36, 12, 2, 0, True, 20, 5.69, 34.04), (20, 12, 2, 16, True, 20, 5.62,
                                            32.92), (0, 56, 48, 46, False, 0, 0, 0)])
def test_intervals_of_differences_are_those_published(both, second, first, neither, paired, gain,
                                                      low, high):
    """
    The same, p. 2635 (paired) and p. 873 (two groups: 56 of 70 and 48 of 80), method 10. A sign, or
    a ± of 0.
    """
    if paired:
        a = [1.0] * both + [0.0] * second + [1.0] * first + [0.0] * neither
        b = [1.0] * both + [1.0] * second + [0.0] * first + [0.0] * neither
    else:
        a, b, gain, low, high = [1.0] * 48 + [0.0] * 32, [1.0] * 56 + [0.0] * 14, 20, 5.24, 33.39
    assert difference(a, b, paired) == pytest.approx([gain, low, high], abs=0.02)


def test_a_difference_by_hand():
    """Strangers that are paired; pairs as unlike as can be, which are wider than strangers."""
    a, b = [1.0, 0.0] * 20, [0.0, 1.0] * 20
    half = 100 * 0.5 - interval(a)[1]
    assert difference(a, b, True) == pytest.approx([0, -2 * half, 2 * half])
    assert difference(a, b, False) == pytest.approx([0, -2**0.5 * half, 2**0.5 * half])
    half *= (2 - 2 * 0.95) ** 0.5  # r = 1 - 2 / n, corrected
    assert difference(a, a, True) == pytest.approx([0, -half, half])


def coin(rng, p, q, r):
    """Two models' scores of a prompt, 1 with chance p and q: with r the same one decides both."""
    chance = rng.random()
    return float(chance < p), float((chance if rng.random() < r else rng.random()) < q)


@pytest.mark.parametrize("n, p, q, r", [(30, 0.5, 0.6, 0.8), (200, 0.8, 0.9, 0.5),
                                        (200, 0.5, 0.5, 0), (10, 0.9, 0.9, 0.9),
                                        (50, 0.02, 0.05, 1)])
def test_the_interval_of_a_difference_covers_it(n, p, q, r):
    """95 % of such tables hold the truth: no interval of one model's, nor of width 0."""
    rng, inside, widths = random.Random(0), 0, []
    for _ in range(600):
        a, b = zip(*(coin(rng, p, q, r) for _ in range(n)))
        gain, low, high = difference(a, b, paired=True)
        assert gain == pytest.approx(100 * (sum(b) - sum(a)) / n, abs=0.02) and low < high
        inside += low <= 100 * (q - p) <= high
        _, low_apart, high_apart = difference(a, b, paired=False)
        widths.append((high - low) / (high_apart - low_apart))
    assert inside / 600 > 0.93 and max(widths) < 1.6
    if r >= 0.5 and n >= 30 and p > 0.1:  # what is hard for both counts once
        assert sum(widths) / 600 < 0.85


def told_examples(*answers, depths=None):
    """Examples of several answers each."""
    depths = depths or [[0] * len(of_one) for of_one in answers]
    return [SimpleNamespace(answers=list(of_one), depth=depth, ids=[0] * 10, prompt=str(n),
                            task="niah_multivalue", index=n, answer_prefix="", max_new_tokens=8,
                            keys_from="words", haystack_from="text") for n,
            (of_one, depth) in enumerate(zip(answers, depths))]


def test_scores_are_means_over_examples():
    """
    RULER's score and the paper's under each other's names; a mean over answers where examples have
    unlike many.
    """
    examples, texts = told_examples(["11", "22"], ["33"], ["44"]), ["11, 22.", "x33", "55"]
    assert eval_niah.scores(texts, examples) == {"ruler": interval([1, 1, 0]),
                                                 "paper": interval([0.5, 0, 0])}
    assert eval_niah.scores(texts, examples)["ruler"][0] == 66.67
    assert eval_niah.scores(texts, examples)["paper"][0] == 16.67
    assert eval_niah.ruler_scores(texts, examples) == [1, 1, 0]
    assert eval_niah.ruler_scores(["11", "", ""], examples) == [0.5, 0, 0]


def test_answers_are_counted_in_the_tenth_where_their_needle_is():
    """Accuracy by depth shifted by a tenth, or of examples instead of answers."""
    examples = told_examples(["11", "22"], ["33", "44"], ["55"], depths=[[0, 9], [10, 99], [100]])
    assert eval_niah.by_depth(["11", "44", "55"],
                              examples) == [[2, 50], [1, 0], *[[0, None]] * 7, [2, 100]]


def test_what_nobody_told_is_in_no_mean():
    """None taken for 0: reads too low where a prefill gave the end at once."""
    assert mean([1, None, 4]) == 2.5
    assert mean([None]) is None
    assert mean([0.0]) == 0


# ---------------------------------------------------------------- eval_niah.py: what was read

def a_cache(used, *selected, **more):
    return SimpleNamespace(used=torch.tensor(used), selected=list(selected),
                           config=SimpleNamespace(n_kv_head=2), **more)


def test_reads_of_steps_by_hand():
    """
    Reads of the last step, of one head, of the most instead of the mean, or of steps in which a row
    had ended already.
    """
    reads = StepReads(sparse.phases(sparse.Dense()))
    # (B, KV, S): 2 and 1 entries, 3 and 3
    some = torch.tensor([[[0, 1, -1], [0, -1, -1]], [[2, 3, 4], [5, 6, 7]]])
    reads(a_cache([5, 9], some, None))      # layers: (1.5, 3) and all, (5, 9)
    reads(a_cache([6, 10], some, some))
    assert reads.of_rows(None, [2, 2]) == [(3.25 + 1.5) / 2, (6 + 3) / 2]
    assert reads.of_rows(None, [1, 0]) == [3.25, None]
    dense = StepReads(sparse.phases(sparse.Dense()))
    dense(a_cache([5, 9], None, None))
    assert dense.of_rows(None, [1, 1]) == [5, 9]
    assert StepReads(sparse.phases(sparse.Dense())).of_rows(None, [0, 0]) == [None, None]

    def under(method):
        reads.phases = sparse.phases(method)
        return reads
    with pytest.raises(AssertionError, match="read 9 entries"):
        under(sparse.Quest(8, 4)).of_rows(None, [2, 2])  # the most of any row and layer
    with pytest.raises(AssertionError, match="kept 8 entries"):
        # 10, less two that were fed since
        under(sparse.SnapKV(7, 2)).of_rows(a_cache([6, 10]), [2, 2])
    assert under(sparse.SnapKV(8, 2)).of_rows(a_cache([6, 10]), [2, 2]) == [2.375, 4.5]


def test_reads_of_the_prompt_by_hand():
    """
    Whole blocks counted where the query stands in the middle of one; padding among the tokens; a
    layer or a part that is left out.
    """
    moba = sparse.MoBA(budget=4, block_size=2)
    reads = PromptReads(moba, dense=False)
    # tokens 0 to 3 read 1, 2, 3, 4 entries
    blocks = torch.tensor([[0, -1], [0, -1], [0, 1], [0, 1]])[None, None].expand(2, 1, 4, 2)
    # 1, 2, 1, 2
    own = torch.tensor([[0, -1], [0, -1], [1, -1], [1, -1]])[None, None].expand(2, 1, 4, 2)
    real = torch.tensor([[True] * 4, [True, True, False, False]])
    reads(0, torch.cat([blocks, own], 1), real)  # two heads: 1, 2, 2, 3
    reads(1, torch.cat([own, own], 1), real)     # 1, 2, 1, 2
    assert reads.of_rows(torch.tensor([4, 2])) == pytest.approx([(2 + 1.5) / 2, 1.5])
    one_by_one = PromptReads(moba, dense=False)
    for row in 0, 1:  # a batch in parts
        for layer in 0, 1:
            one_by_one(layer, own[row:row + 1], None)
    assert one_by_one.of_rows(torch.tensor([4, 4])) == [1.5, 1.5]
    assert PromptReads(sparse.Dense(), dense=True).of_rows(torch.tensor([4, 7])) == [2.5, 4]
    assert PromptReads(sparse.Dilated(), dense=False).of_rows(torch.tensor([4, 7])) == [None, None]
    few = PromptReads(sparse.MoBA(budget=2, block_size=1), dense=False)
    few(0, torch.tensor([[0, 1, 2]])[None, None], None)
    with pytest.raises(AssertionError, match="read 3 entries"):
        few.of_rows(torch.tensor([4]))


class Stub:
    """
    A model that writes what it is told to; a step reads ten entries, the next twenty ... A prefill
    takes 6 s, an answer 2 s, by its clock.
    """
    def __init__(self, rows, clock):
        self.rows, self.clock = rows, clock
        self.embed_tokens = SimpleNamespace(weight=torch.zeros(1))

    def new_cache(self, B, max_len, window):
        cache = a_cache([0] * B, B=B, window=window, max_len=max_len, empty=lambda: None,
                        clear=lambda: None)
        cache.turn = lambda method: nullcontext(cache)
        return cache

    def prefill(self, tokens, lengths, cache, method, watch):
        self.clock[0] += 6

    def decode(self, logits, cache, n_new, method, eos_id, watch):
        self.clock[0] += 2
        for step in range(1, n_new):
            cache.used, cache.selected = torch.tensor([10 * step] * cache.B), [None]
            watch(cache)
        return torch.tensor([row + [eos_id] * (n_new - len(row)) for row in self.rows])


def test_an_answer_its_reads_and_seconds_by_hand(monkeypatch):
    """
    Text behind the end, reads of steps that write nothing, seconds of a batch for each of its rows,
    or of one method for all.
    """
    clock = [0.0]
    monkeypatch.setattr(eval_niah.time, "time", lambda: clock[0])
    examples = [SimpleNamespace(ids=list(range(n)), max_new_tokens=5) for n in (3, 5, 7)]
    model = Stub([[*b"ab"], [], [*b"abcde"]], clock)
    quest = sparse.Quest(512, 8)
    told, *_ = eval_niah.answer(model, Bytes(), examples, [sparse.Dense(), quest])
    # row 0 takes two steps, whose second finds the end; row 1's prefill gave it; row 2 wrote four
    # of five tokens in steps
    assert told[sparse.Dense()] == told[quest] == [("ab", 15.0, 2.0, 8 / 3), ("", None, 3.0, 8 / 3),
                                                   ("abcde", 25.0, 4.0, 8 / 3)]
    outcome = answers.Outcome.of(told[quest])
    assert (outcome.texts, outcome.read, outcome.prompt_read,
            outcome.seconds) == (["ab", "", "abcde"], [15, None, 25], [2, 3, 4], 8)


# ---------------------------------------------------------------- eval_niah.py: H1

def test_a_hit_is_a_place_read_at_every_step_of_an_answer():
    """
    H1 as any instead of all; one answer's tokens counted for another; positions off by one; padding
    that hits.
    """
    source = Source
    gold = [([1, 2, 3, 4], [source(0, 8, 9), source(0, 9, 10), None, source(1, 4, 6)]),
            ([1, 2], [source(0, 0, 1), source(0, 3, 4)])]
    # by step, layer, row, head: what is read. Step 1 writes token 1 (row 0: place 9; row 1: 3),
    # step 3 token 3 (row 0: 4 or 5)
    steps = [[[[[9, -1], [8, 10]], [[3, -1], [-1, 2]]], [[[1, 9], [9, 9]], [[4, 2], [3, 0]]]],
             [[[[-1, -1], [-1, -1]], [[-1, -1], [-1, -1]]],
              [[[-1, -1], [-1, -1]], [[-1, -1], [-1, -1]]]],
             [[[[5, -1], [3, 6]], [[-1, -1], [-1, -1]]],
              [[[4, 0], [-1, -1]], [[-1, -1], [-1, -1]]]]]
    cache, fed = SimpleNamespace(used=torch.tensor([20, 20]), k=[0, 0], selected=None), []

    def step(tokens, own, method):
        fed.append(tokens.tolist())
        own.selected = [torch.tensor(layer) for layer in steps[len(fed) - 1]]
    model = SimpleNamespace(step=step, config=SimpleNamespace(n_layer=2, n_kv_head=2))
    hit = eval_niah.hits(model, cache, gold, None)
    assert fed == [[1, 1], [2, 2], [3, 0]]
    assert [of_row.tolist() for of_row in hit] == [
        [[[True, False], [True, True]], [[True, False], [True, False]]],
        [[[True, False], [False, True]]]]
    # two steps of one answer: both must be read
    gold, fed[:] = [([1, 2, 3], [None, source(0, 9, 10), source(0, 3, 4)])] * 2, []
    steps[1] = [[[[3, -1], [3, -1]], [[9, -1], [3, -1]]], [[[3, -1], [-1, -1]], [[3, -1], [3, -1]]]]
    hit = eval_niah.hits(model, cache, gold, None)
    assert hit[0][0].tolist() == [[True, False], [True, False]]
    assert hit[1][0].tolist() == [[False, False], [False, False]]


def test_what_is_not_told_is_all_that_is_there():
    """H1 of a method that reads everything and says None, as Dense does: an error."""
    cache = SimpleNamespace(selected=[None], slots=4, used=torch.tensor([3, 1]), positions=[None],
                            config=SimpleNamespace(n_kv_head=2))
    low = torch.tensor([1, 1])
    assert was_read(cache, 0, low, low + 1).tolist() == [[True, True], [False, False]]


def test_what_snapkv_has_left_is_what_was_read():
    """H1 of slots that hold nothing any more."""
    left = torch.tensor([[[7, 5], [8, 6], [9, 9]]])  # (B, slots, KV), of which two slots are used
    cache = SimpleNamespace(selected=[None], slots=3, used=torch.tensor([2]), positions=[left])
    read = lambda low, high: was_read(cache, 0, torch.tensor([low]),
                                                torch.tensor([high])).tolist()
    assert read(7, 8) == [[True, False]]
    assert read(5, 8) == [[True, True]]
    assert read(9, 10) == [[False, False]]
    assert read(-1, -1) == [[False, False]]


def test_best_heads_are_the_mean_of_the_best_twentieth():
    """H1 of the best head, or of all."""
    assert best_heads(torch.arange(40.0).view(4, 10)) == 38.5  # two of 40
    assert best_heads(torch.arange(1024.0).view(32, 32)) == 1023 - 25  # the paper's fifty, 51
    assert best_heads(torch.tensor([[0.25, 0.5]])) == 0.5


# ---------------------------------------------------------------- eval_niah.py: tables, plot,
# results.json

def row(checkpoint, method, task, ruler, half, paper, read=None, prompt_read=None, hits=None,
        random=None, budget=None, by_depth=None, prompts="p"):
    return {"checkpoint": checkpoint, "method": method, "task": task, "random": random,
            "budget": budget, "ruler": [ruler, ruler - half - 1, ruler + half + 1],
            "paper": [paper, 0, 100], "read": read, "prompt_read": prompt_read, "hits": hits,
            "by_depth": by_depth, "prompts": prompts}


# the best head of the means: (1 / 4 + 1) / 2
MEMORY_HITS = [[0.5, 1.0], [0.0, 0.25]], [[0.5, 0.0], [0.75, 1.0]]
RESULTS = [row("attention", "dense", "niah_single_1", 90, 2, 80, 100, 50),
           row("attention", "dense", "niah_multivalue", 70, 3, 40, 104, 52),
           row("attention", "quest", "niah_single_1", 60, 2, 50, 10, 50, MEMORY_HITS[0]),
           row("attention", "quest", "niah_multivalue", 20, 3, 0, None, 52, MEMORY_HITS[1]),
           row("attention", "quest", "niah_single_1", 5, 1, 5, random=0),
           row("attention", "quest", "niah_single_1", 9, 1, 5, random=1),
           row("attention", "quest", "niah_multivalue", 1, 1, 5, random=0),
           row("attention", "quest", "niah_multivalue", 1, 1, 5, random=1),
           row("memory", "dense", "niah_single_1", 95, 2, 80, 100, 50),
           row("memory", "dense", "niah_multivalue", 60, 3, 40, 104, 52),
           row("memory", "quest", "niah_single_1", 100, 2, 50, 10, 50),
           row("memory", "quest", "niah_multivalue", 50, 3, 0, 12, 52)]
BY_PROMPT = {(of["checkpoint"], of["method"], of["task"]): [1.0] * int(of["ruler"][0] / 5)
             + [0.0] * int(20 - of["ruler"][0] / 5) for of in RESULTS if of["random"] is None}


def test_table_by_hand():
    """Means, ±, reads, H1 and differences: each in its column, of its method, with its sign."""
    lines = [line.split() for line in table(RESULTS, BY_PROMPT, NAMES).splitlines() if line]
    assert lines[1] == "S-1 MV mean mean prompt answer heads, %".split()
    # halves 3 and 4, of two tasks: 5 / 2
    assert lines[2:6] == ["attention dense 90.0 70.0 80.0 ± 2.5 60.0 51.0 102.0 -".split(),
                          "attention quest 60.0 20.0 40.0 ± 2.5 25.0 51.0 10.0 62.5".split(),
                          "memory dense 95.0 60.0 77.5 ± 2.5 60.0 51.0 102.0 -".split(),
                          "memory quest 100.0 50.0 75.0 ± 2.5 25.0 51.0 11.0 -".split()]
    assert " ".join(lines[6]).startswith("memory - attention, each prompt asked of both")
    assert "paired" in lines[6] and {"prompts", "alone.", "seed"} <= {*lines[-1]}
    cells = {method: [difference(BY_PROMPT["attention", method, task],
                                           BY_PROMPT["memory", method, task], True)
                      for task in ("niah_single_1", "niah_multivalue")]
             for method in ("dense", "quest")}
    half = {method: math.hypot(*((high - low) / 2 for _, low, high in of)) / 2 for method,
            of in cells.items()}
    said = lambda half: f"±{half:4.1f}".split()
    assert min(half.values()) > 2
    assert lines[7:9] == [["dense", "+5.0", "-10.0", "-2.5", *said(half["dense"])],
                          ["quest", "+40.0", "+30.0", "+35.0", *said(half["quest"])]]
    others = [of | {"prompts": "other"} if of["checkpoint"] == "memory" else of for of in RESULTS]
    lines = [line.split() for line in table(others, BY_PROMPT, NAMES).splitlines() if line]
    apart = [difference(BY_PROMPT["attention", "dense", task],
                                  BY_PROMPT["memory", "dense", task], False)
             for task in ("niah_single_1", "niah_multivalue")]
    assert "of other prompts" in " ".join(lines[6]) and "paired" not in lines[6]
    assert lines[7][4:] == said(math.hypot(*((high - low) / 2 for _, low, high in apart)) / 2)


def test_table_of_draws_by_hand():
    """H2's spread of 0, or of a population; a mean of two tasks."""
    text = table_random(RESULTS, NAMES)
    assert "S-1 7.0 ±2.8" in text
    assert "MV 1.0 ±0.0" in text
    assert "draws (2)" in text
    assert "memory" not in text
    one = table_random([of for of in RESULTS if of["random"] == 0], NAMES)
    assert "S-1 5.0" in one and "±" not in one  # a single draw has no spread


def test_the_plot_shows_the_tables_numbers(monkeypatch, tmp_path):
    """
    A figure of other numbers than the table: dense for the least budget, tenths weighted alike
    though their answers are not as many.
    """
    tenths = [[10, 50], [30, 100], *[[0, None]] * 7,
              [4, 25]], [[30, 100], [10, 0], *[[0, None]] * 7, [0, None]]
    found = [row("m", method, task, score + 10 * t, 2 + t, 0, budget=budget, by_depth=tenths[t])
             for method, budget, score in (("dense", None, 80), ("quest:budget=1/4", 1024, 70),
                                           ("quest:budget=1/16", 256, 40))
             for t, task in enumerate(("niah_single_1", "niah_multivalue"))]
    found[0]["by_depth"] = found[2]["by_depth"] = [[1, 0]] * 10  # dense, and the larger budget
    figures = drawn(monkeypatch)
    plot(found, tmp_path / "plot.png")
    (above,), (below,) = figures[0]
    assert numbers(above.errorbar.call_args.args) == [[256, 1024], [45, 75], [2.5, 2.5]]
    assert above.axhline.call_args.args == (85,)
    least, dense = (numbers(call.args) for call in below.plot.call_args_list)
    assert least[0] == list(range(5, 100, 10))
    assert least[1][:2] == [87.5, 75.0]
    assert least[1][9] == 25
    assert all(map(math.isnan, least[1][2:9]))
    assert dense[1][:2] == [round(3000 / 31, 4), 0]
    assert above.set.call_args.kwargs["title"] == "quest"
    assert below.set.call_args.kwargs["title"] == "quest:budget=1/16"


def test_results_by_hand(tmp_path, monkeypatch, capsys):
    """Every field of results.json that a table or a reader quotes, from answers on disk."""
    tables = []
    monkeypatch.setattr(eval_niah, "plot", lambda results, path: None)
    monkeypatch.setattr(eval_niah, "table",
                        lambda results, by_prompt, names: tables.append(by_prompt) or "the table")
    monkeypatch.setattr(eval_niah, "table_random", lambda results, names: "of draws")
    monkeypatch.setattr(eval_niah.weights, "resolve", lambda path: path)
    examples = told_examples(["11", "22"], ["33"], ["44"], depths=[[0, 95], [50], [55]])
    dense, quest = sparse.Dense(), sparse.Quest(16, 8)
    chance = sparse.randomized(quest, 3)
    told = {dense: [("11,22", 100.0, 50.0, 1.0), ("x33", None, 52.0, 2.0), ("", 104.0, None, 3.0)],
            quest: [("11", 8.0, None, 1.0)] * 3, chance: [("44", 16.0, None, 0.5)] * 3}
    line = lambda method, of, told: answers.written(answers.Line("m", "niah_multivalue", method,
                                                                     of, told))
    lines = [line(sparse.name(method), [i], answers.Answer(*of_one)._asdict()) for method,
             of in told.items() for i, of_one in enumerate(of)]
    lines += [line(f"H1 {sparse.name(quest)}", [0, 2], {"hits": [[3, 0]], "answers": 3}),
              line(f"H1 {sparse.name(quest)}", [1], {"hits": [[0, 1]], "answers": 1})]
    (tmp_path / "answers-0.jsonl").write_bytes(b"".join(lines))
    files.save({"calls": ["first", "second"]}, tmp_path / "asked.json")
    args = SimpleNamespace(out=str(tmp_path), json=str(tmp_path / "results.json"), hits=True,
                           random=1, context_len=64)
    call = {"commit": "c", "speed": {"answers": 9, "seconds": 4.5, "seconds_of_loading": 2.0}}
    eval_niah.report(args, call, {"m": tmp_path}, {"m": Bytes()},
                     {"m": {"niah_multivalue": examples}},
                     {dense: "dense", quest: "quest:budget=1/4", chance: "quest:budget=1/4"})
    report = json.loads((tmp_path / "results.json").read_text())
    assert report["finished"]
    assert report["calls"] == ["first", "second"]
    assert report["commit"] == "c"
    assert report["settings"]["context_len"] == 64
    first, second, third = report["results"]
    common = {"checkpoint": "m", "path": str(tmp_path), "tokenizer": "bytes",
              "task": "niah_multivalue", "n": 3, "prompts": niah.prompt_hash(examples),
              "keys_from": "words", "haystack_from": "text"}
    assert all(of[key] == value for of in report["results"] for key, value in common.items())
    wanted = {"method": "dense", "random": None, "budget": None,
              "ruler": interval([1, 1, 0]), "paper": interval([1, 0, 0]),
              "read": 102, "read_share": 102 / 64, "prompt_read": 51, "prompt_read_share": 51 / 64,
              "hits": None, "seconds": 6}
    assert {key: first[key] for key in wanted} == wanted
    assert first["by_depth"][0] == [1, 100]
    assert first["by_depth"][5] == [2, 50]
    assert first["by_depth"][9] == [1, 100]
    wanted = {"method": "quest:budget=1/4", "random": None, "budget": 16,
              "ruler": interval([0.5, 0, 0]), "read": 8, "read_share": 0.125,
              "prompt_read": None,
              # of four answers, not a mean of two batches
              "prompt_read_share": None, "hits": [[0.75, 0.25]], "seconds": 3}
    assert {key: second[key] for key in wanted} == wanted
    wanted = {"method": "quest:budget=1/4", "random": 3, "budget": 16,
              "ruler": interval([0, 0, 1]), "read": 16, "hits": None, "seconds": 1.5}
    assert {key: third[key] for key in wanted} == wanted
    assert tables == [{("m", "dense", "niah_multivalue"): [1, 1, 0],
                       ("m", "quest:budget=1/4", "niah_multivalue"): [0.5, 0, 0]}]
    saved = [[json.loads(line)["pred"] for line in open(of["predictions"])]
             for of in report["results"]]
    assert saved == [[text for text, *_ in of] for of in told.values()]
    said = capsys.readouterr().out
    assert "9 answers in 4.5 s, 2 a second; loading took 2.0 s" in said
    assert "the table" in said
    assert "of draws" in said


def test_answers_and_seconds_go_to_their_examples(monkeypatch):
    """
    An answer given to its neighbour in the batch; the seconds of rows that fill a batch up, lost.
    """
    examples = {"m": {"S": [SimpleNamespace(ids=[0] * n, name=n) for n in (5, 3, 4)]}}
    dense, quest = sparse.Dense(), sparse.Quest(16, 8)

    def answer(model, tokenizer, some, methods, cache, selecting=()):
        return {m: [answers.Answer(f"{e.name} {sparse.name(m)}", 1.0, 2.0, 0.5) for e in some]
                for m in methods}, {}, None
    monkeypatch.setattr(eval_niah, "answer", answer)
    by_name = {sparse.name(m): m for m in (dense, quest)}
    batch = answers.Batch("m", "S", [1, 2], {sparse.name(dense): [2], sparse.name(quest): [1, 2]})
    # on a GPU three rows of half a second for two answers
    for device, seconds in ("cuda", 0.75), ("cpu", 0.5):
        lines, _ = eval_niah.ask(SimpleNamespace(config=SimpleNamespace(n_layer=1, n_kv_head=1)),
                                 None, examples["m"]["S"], batch, by_name,
                                 SimpleNamespace(device=device, batch=8), None)
        assert [(line.checkpoint, line.task, line.method, line.examples, line.told["text"],
                 line.told["seconds"]) for line in lines] == [
            ("m", "S", sparse.name(dense), [2], "4 dense",
             seconds), ("m", "S", sparse.name(quest), [1], f"3 {sparse.name(quest)}", seconds),
            ("m", "S", sparse.name(quest), [2], f"4 {sparse.name(quest)}", seconds)]


def test_examples_are_those_of_the_flags(tmp_path):
    """--seed, --protocol or --haystack that are not heard: the same table under two names."""
    (tmp_path / "words.txt").write_text("Zebras yawn. " * 100)
    given = dict(haystack=None, context_len=512, seed=0, samples=2, protocol="base",
                 max_new_tokens=48, words="built-in")

    def make(**changes):
        found = eval_niah.make_examples(SimpleNamespace(**given | changes), Bytes(),
                                        ["niah_single_2"])
        return found["niah_single_2"]
    first = make()
    assert [e.index for e in first] == [0, 1]
    assert first == [niah.make_example("niah_single_2", 512, Bytes(), 0, i, max_new_tokens=48)
                     for i in (0, 1)]
    assert make(seed=1)[0].answers != first[0].answers
    assert make(protocol="sft")[0].answer_prefix == "" != first[0].answer_prefix
    assert "Zebras yawn" in make(haystack=tmp_path / "words.txt")[0].prompt
    assert len(make(samples=3)) == 3
    assert make(context_len=640)[0].context_len == 640
    assert make(max_new_tokens=40)[0].max_new_tokens == 40


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """
    eval_niah.prepare and choose_tasks, of flags, for a tiny model that was trained with some of its
    own.
    """
    monkeypatch.chdir(tmp_path)
    tiny(vocab_size=257, context_len=512).save_pretrained(tmp_path / "model")
    made = {"step": 1, "settings": {"protocol": "sft", "tasks": ["niah_single_2"]}}
    (tmp_path / "model" / "train.json").write_text(json.dumps(made))

    def run(*flags):
        args = eval_niah.flags().parse_args(["--ckpt=model", "--device=cpu", *flags])
        _, tokenizers, methods = eval_niah.prepare(args)
        return args, eval_niah.choose_tasks(args, tokenizers.values()), methods
    return run


def test_what_is_not_given_is_the_models(asked):
    """
    A fine-tuned model asked in another form, length or task than it knows: a score that is low for
    no fault of its own.
    """
    args, tasks, methods = asked()
    assert (args.protocol, args.context_len, tasks, args.max_new_tokens, args.samples,
            args.dtype) == ("sft", 512, ["niah_single_2"], 48, 16, "float32")
    assert [(sparse.name(m).partition(":")[0], getattr(m, "budget", None)) for m in methods] == [
        ("dense", None), *((kind, budget) for kind in ("quest", "moba", "snapkv")
                           for budget in (128, 64, 32))]
    args, tasks, _ = asked("--protocol=base", "--context_len=640", "--tasks", "niah_single_1",
                           "--samples=3", "--max_new_tokens=40")
    assert (args.protocol, args.context_len, tasks, args.max_new_tokens,
            args.samples) == ("base", 640, ["niah_single_1"], 40, 3)


def test_speed_is_of_the_last_process_to_finish(asked, tmp_path, monkeypatch):
    """
    Answers a second of the fastest GPU, with those that were there before, or with the loading of
    the model.
    """
    clock, reports, answer = [0.0], [], eval_niah.answer
    from_pretrained = eval_niah.Transformer.from_pretrained

    def later(seconds, function):
        def slow(*given, **more):
            clock[0] += seconds
            return function(*given, **more)
        return slow
    monkeypatch.setattr(eval_niah.time, "time", lambda: clock[0])
    monkeypatch.setattr(eval_niah.Transformer, "from_pretrained", later(50, from_pretrained))
    monkeypatch.setattr(eval_niah, "answer", later(7, answer))
    monkeypatch.setattr(eval_niah, "report", lambda args, call, *_: reports.append(call["speed"]))
    flags = ["--ckpt=model", "--device=cpu", "--out=out", "--batch=2", "--methods=dense"]
    eval_niah.main([*flags, "--samples=3", "--max_new_tokens=12"])
    assert reports == [{"answers": 3, "seconds": 14.0, "seconds_of_loading": 50.0}]
    lines = (tmp_path / "out" / "answers-0.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "out" / "answers-0.jsonl").write_bytes(lines[0])
    meet = answers.Ranks.meet  # another process that took longer to answer
    monkeypatch.setattr(answers.Ranks, "meet",
                        lambda self, place, word="": meet(self, place, word)
                        + ["[100, 3]"] * (place == "all have written"))
    eval_niah.main([*flags, "--samples=3", "--max_new_tokens=12"])
    assert reports[1]["answers"] == 2
    assert reports[1]["seconds"] == 100
    assert reports[1]["seconds_of_loading"] == 50


# ---------------------------------------------------------------- sample.py

def test_what_sample_prints_by_hand(tmp_path, capsys):
    """The most that a step read, or the prompt's tokens for the answer's."""
    tiny(vocab_size=257, context_len=64).save_pretrained(tmp_path / "model")  # it writes no end
    sample.main([f"--ckpt={tmp_path / 'model'}", "--prompt=Hello, you", "--method=dense",
                 "--max_new_tokens=8", "--device=cpu", "--tokenizer=bytes"])
    assert ("(8 tokens after 10; entries per head that a token of the prompt read: 5.5, "
            "a step: 14.0)") in capsys.readouterr().out  # 11 to 17
