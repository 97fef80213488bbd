"""
The tables and plots that we publish, computed by hand: eval_niah.py's and reproduce.py's, from
answers to means, intervals, hits and reads. tests/mutants.py plants a wrong number after the other;
these tests see them.
"""
import json
import math
import random
from pathlib import Path
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
from infra.conclusion import conclusion
from infra.plots import plot, read_results
from infra.reads import PromptReads, StepReads, was_read
from infra.report import (difference, interval, mean, mean_of_tasks, notes, short_names, table,
                          table_random)

NAMES = eval_niah.names()
TWO = "niah_single_1", "niah_multivalue"


def drawn(monkeypatch):
    """-> a list that fills with the axes of each figure, which record instead of drawing."""
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

QUEST = "quest:budget=1/4,block_size=64"
HITS = [[[0.5, 0.0], [1.0, 0.25]], [[0.0, 0.5], [0.5, 0.75]]]  # two tasks, (layers, KV)
RECORD = {"step": 60, "seconds": 120.0, "tokens_per_second": 5000, "mfu": 0.25, "device": "abacus",
          "commit": "c0ffee0123", "settings": {"recipe": "micro-sft"},
          "from": {"step": 40, "seconds": 90.0, "tokens_per_second": 7000, "mfu": None,
                   "device": "abacus", "commit": "c0ffee0123+dirty",
                   "settings": {"recipe": "micro"}}}


def report(dense, quest, chance=(), hits=HITS):
    """
    As reproduce.py reads it, of TWO tasks: each method's score in both; chance: of each draw of
    Quest's entries.
    """
    rows = [{"method": method, "task": task, "random": draw, "ruler": [score, score - 1, score + 3],
             "paper": [1, 1, 1], "hits": of_task if (method, draw) == (QUEST, None) else None}
            for method, scores, draw in [("dense", dense, None), (QUEST, quest, None),
                                         *((QUEST, of, seed) for seed, of in enumerate(chance))]
            for task, score, of_task in zip(TWO, scores, hits)]
    return {"finished": True, "results": rows, "command": "python eval_niah.py", "commit": "c",
            "device": "d", "torch": "t", "train": RECORD,
            "settings": {"samples": 5, "protocol": "sft", "context_len": 4096}}


@pytest.fixture
def found():
    """Two seeds of two arms."""
    return {"attention": {0: report((90, 70), (50, 30), [(10, 0), (6, 4)]),
                          1: report((92, 80), (60, 34), [(12, 2), (8, 0)])},
            "memory": {0: report((98, 90), (80, 60), [(20, 0), (10, 6)],
                                 hits=[[[1.0, 1.0], [0.0, 0.0]]] * 2),
                       1: report((96, 96), (90, 74), [(30, 10), (20, 0)])}}


@pytest.mark.parametrize("df, t, p", [(1, 12.706, 0.05), (2, 4.303, 0.05), (2, 2.920, 0.10),
                                      (2, 9.925, 0.01), (3, 3.182, 0.05), (4, 2.776, 0.05),
                                      (5, 4.032, 0.01), (10, 2.228, 0.05), (29, 2.045, 0.05)])
def test_p_is_that_of_students_table(df, t, p):
    """A t test of one side, or of another number of seeds: significance that is not there."""
    assert reproduce.p_of_t(t, df) == pytest.approx(p, abs=1e-4) == reproduce.p_of_t(-t, df)
    assert reproduce.p_of_t(0, df) == 1


def test_holm_by_hand():
    """Ten cells of which one is below 0.05 by chance."""
    corrected = reproduce.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.5})
    assert corrected == pytest.approx({"a": 0.04, "c": 0.09, "b": 0.09, "d": 0.5})
    assert reproduce.holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0} and reproduce.holm({}) == {}


def test_an_interval_of_seeds_is_students():
    """Against tables of t: 12.706, 2.365 and 2.045 of 1, 7 and 29 degrees of freedom."""
    assert reproduce.t_interval([3.0]) is None
    for n, t in ((2, 12.706), (8, 2.365), (30, 2.045)):
        values = [5.0 + (-1) ** i for i in range(n)]
        half = t * (n / (n - 1)) ** 0.5 / n ** 0.5
        assert reproduce.t_interval(values) == pytest.approx([5 - half, 5 + half], rel=1e-3)


def test_differences_are_paired_by_seed():
    """The sign of a gain; seeds compared with others'; a spread of 0, significant anywhere."""
    p_of_2 = 1 - 2 / math.pi * math.atan(5)  # t = 2.5 / (0.5 ** 0.5 / 2 ** 0.5)
    for values, base, by_seed, gain, p in (
            ({0: 3.0, 1: 5.0, 2: 9.0}, {1: 2.0, 0: 1.0, 3: 50.0}, [2.0, 3.0], 2.5, p_of_2),
            # t = -2 x 3 ** 0.5, two degrees of freedom
            ({0: 1.0, 1: 2.0, 2: 3.0}, {0: 2.0, 1: 4.0, 2: 6.0}, [-1.0, -2.0, -3.0], -2, 0.0742),
            ({0: 3.0}, {0: 1.0}, [2.0], 2.0, None),
            ({0: 3.0, 1: 4.0}, {0: 1.0, 1: 2.0}, [2.0, 2.0], 2.0, None)):
        cell = reproduce.compare(values, base)
        assert (cell["by_seed"], cell["gain"]) == (by_seed, gain)
        assert cell["p"] == (p and pytest.approx(p, abs=1e-4))
    assert reproduce.compare({0: 1.0}, {1: 1.0}) is None
    cells = reproduce.column({"a": [1.0, 2.0], "b": [5.0, 9.0], "c": [1.0, 1.0]},
                             {"b": [8.0, 1.0], "a": [0.5, 0.75]}, ([3, 4], [4, 3]))
    assert {m: cell["by_seed"] for m, cell in cells.items()} == {"a": [0.25, 1.5], "b": [4.0, 1.0]}
    p, q = sorted(cell["p"] for cell in cells.values())
    assert sorted(cell["holm"] for cell in cells.values()) == [min(1, 2 * p), max(2 * p, q)]


def test_a_cell_is_mean_and_sample_standard_deviation():
    """A deviation of the population, smaller by a fifth for three seeds; or of the mean."""
    cells = [reproduce.cell(values) for values in ([40.0, 50.0, 63.0], [40.0], None)]
    assert cells == ["51.0 ± 11.5", "40.0", ""]
    gaps = [reproduce.gap(of and dict(zip(("gain", "p", "holm"), of))) for of in (
        (-1.25, 0.004, 0.04), (1.5, 0.04, 0.08), (1.5, None, None), None)]
    assert gaps == ["**-1.2** (0.004)", "+1.5 (0.04)", "+1.5", ""]


def test_the_summary_by_hand(found):
    """The wrong arm, kind or seed; draws by chance among the chosen; another stage's speed."""
    summary = reproduce.summarise(found)
    assert summary["scores"] == {"attention": {"dense": [80, 86], QUEST: [40, 47]},
                                 "memory": {"dense": [94, 96], QUEST: [70, 82]}}
    chance = f"{QUEST} by chance"
    assert summary["by_chance"] == {"attention": {chance: [5, 5.5]}, "memory": {chance: [9, 15]}}
    # 5 % of four heads: the best
    assert summary["hits"] == {"attention": {QUEST: [75, 75]}, "memory": {QUEST: [100, 75]}}
    against = summary["against_attention"]
    cells = against["scores"]["memory"]
    assert list(against["scores"]) == ["memory"] and cells.keys() == {"dense", QUEST}
    # t = 6 and 13, one degree of freedom
    for method, by_seed, gain, p in ("dense", [14, 10], 12, 0.11), (QUEST, [30, 35], 32.5, 0.049):
        cell = cells[method]
        assert (cell["by_seed"], cell["gain"], float(f"{cell['p']:.2g}")) == (by_seed, gain, p)
    assert against["by_chance"]["memory"][chance]["gain"] == 6.75
    assert against["hits"]["memory"][QUEST]["gain"] == 12.5
    made = summary["runs"]["memory"][1]
    assert made["train"]["mfu"] == 0.25 and made["eval"]["commit"] == "c"
    text = reproduce.markdown(summary, found)
    scores, _, rest = text.partition("H2, ")
    of_chance, _, hits = rest.partition("H1, ")
    for part, lines in ((scores, ("attention 2, memory 2",
                                  "5 samples a task, protocol sft, context 4096",
                                  "| | attention | memory | memory - attention |",
                                  "| dense | 83.0 ± 4.2 | 95.0 ± 1.4 | +12.0 (0.11) |",
                                  f"| {QUEST} | 43.5 ± 4.9 | 76.0 ± 8.5 | +32.5 (0.049) |")),
                        (of_chance, (f"| {chance} | 5.2 ± 0.4 | 12.0 ± 4.2 | +6.8",)),
                        (hits, (f"| {QUEST} | 75.0 ± 0.0 | 87.5 ± 17.7 | +12.5",))):
        assert all(line in part for line in lines)
    assert "by chance" not in scores
    assert ("| memory 1 | micro | 40 | 1.5 | 7,000 |  | abacus | c0ffee0+dirty |\n"
            "| memory 1 | micro-sft | 60 | 2.0 | 5,000 | 0.25 | abacus | c0ffee0 |\n") in text


def test_hits_of_many_heads_are_of_the_best_twentieth():
    """H1 of one lucky head of a thousand, or of all."""
    hits = (torch.arange(40).view(4, 10) / 40).tolist()
    summary = reproduce.summarise({"attention": {0: report((1, 1), (1, 1), hits=[hits] * 2)}})
    assert summary["hits"]["attention"][QUEST] == pytest.approx([100 * 38.5 / 40])  # two of 40


def test_each_arm_is_asked_what_the_table_tells(tmp_path, monkeypatch):
    """H1 or H2 that nobody asked; other examples, or fewer, than the flags say."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce.runs, "finished", lambda run, flags: True)
    monkeypatch.setattr(reproduce.runlog, "training_record", lambda run: {"step": 1})
    args, calls = SimpleNamespace(results="results", random=4, samples=7, eval_seed=3, batch=9,
                                  train=[]), []
    for arm in "memory", "long", "joint":
        reproduce.do(arm, 0, {}, args, lambda command, log: calls.append(command[1:]))
    nine, others = reproduce.NINE, reproduce.OTHERS
    asked = [vars(eval_niah.flags().parse_args(flags)) for flags in calls]
    of = lambda *keys: [tuple(call[key] for key in keys) for call in asked]
    assert of("methods", "hits", "random") == [(nine, True, 4), (others, False, 0),
                                               (nine, False, 0), (nine, False, 0)]
    assert of("samples", "seed", "batch") == [(7, 3, 9)] * 4
    assert of("json") == [(f"results/{name}.json",)
                          for name in ("memory-0", "memory-0-more", "long-0", "joint-0")]
    assert nine == [f"{kind}:budget=1/{n}" for kind in ("quest", "moba", "snapkv")
                    for n in (4, 8, 16)]


def test_plots_of_the_summary_show_its_numbers(found, tmp_path, monkeypatch):
    """One seed, one task for all, draws by chance, or another order of budgets, in a figure."""
    methods = ["dense", *reproduce.NINE]
    for a, reports in enumerate(found.values()):
        for seed, of in reports.items():
            of["settings"]["methods"] = methods
            of["results"] = [
                {"method": method, "task": task, "random": draw,
                 "ruler": [50 * a + 10 * seed + m + 2 * t + (100 if draw == 0 else 0), 0, 0],
                 "hits": None if method.startswith("moba") else [[0.5, 0.25 * seed]]}
                for m, method in enumerate(methods) for t, task in enumerate(TWO)
                for draw in (None, 0)]
    found["joint"] = found["attention"]  # a control, which is in no plot
    figures = drawn(monkeypatch)
    reproduce.plots(found, tmp_path)
    accuracy, hits = figures
    assert accuracy.shape == (3, 2) and hits.shape == (1, 6)
    for (k, t), axis in np.ndenumerate(accuracy):
        calls = axis.errorbar.call_args_list
        assert [call.kwargs["label"] for call in calls] == ["attention", "memory"]
        for a, call in enumerate(calls):
            means = [50 * a + 5 + 3 * k + m + 2 * t for m in (1, 2, 3)]
            assert numbers(call.args) == numbers([[0, 1, 2], means, [50 ** 0.5] * 3])
        assert axis.set.call_args.kwargs.items() >= {
            "title": f"{('quest', 'moba', 'snapkv')[k]} {('S-1', 'MV')[t]}",
            "xticklabels": ("1/4", "1/8", "1/16")}.items()
    for axis in hits[0]:
        assert [numbers(call.args) for call in axis.plot.call_args_list] == [[[1, 2],
                                                                              [50, 12.5]]] * 2


# ---------------------------------------------------------------- eval_niah.py: scores and
# intervals

@pytest.mark.parametrize("found, n, low, high",
                         [(81, 263, 25.53, 36.62), (15, 148, 6.24, 16.05), (0, 20, 0.00, 16.11),
                          (20, 20, 83.89, 100.00), (1, 29, 0.61, 17.18)])
def test_intervals_are_those_published(found, n, low, high):
    """Of another level or n: Newcombe, Statistics in Medicine 17 (1998), p. 857, I, method 3."""
    p, *ends = interval([1.0] * found + [0.0] * (n - found))
    assert p == pytest.approx(100 * found / n, abs=0.006)
    assert ends == pytest.approx([low, high], abs=0.011)


@pytest.mark.parametrize("a, b, paired, low, high", [
    ("1" * 36 + "0" * 12 + "11", "1" * 48 + "00", True, 5.69, 34.04),
    ("1" * 20 + "0" * 12 + "11" + "0" * 16, "1" * 32 + "0" * 18, True, 5.62, 32.92),
    ("1" * 48 + "0" * 32, "1" * 56 + "0" * 14, False, 5.24, 33.39)])
def test_intervals_of_differences_are_those_published(a, b, paired, low, high):
    """A sign, or a ± of 0: the same, p. 2635 (paired) and p. 873 (two groups), method 10."""
    found = difference([*map(float, a)], [*map(float, b)], paired)
    assert found == pytest.approx([20, low, high], abs=0.02)


def test_a_difference_by_hand():
    """Strangers that are paired; pairs as unlike as can be, which are wider than strangers."""
    a, b = [1.0, 0.0] * 20, [0.0, 1.0] * 20
    half = 100 * 0.5 - interval(a)[1]
    of_alike = (2 - 2 * 0.95) ** 0.5  # r = 1 - 2 / n, corrected
    for b, paired, times in (b, True, 2), (b, False, 2 ** 0.5), (a, True, of_alike):
        assert difference(a, b, paired) == pytest.approx([0, -times * half, times * half])


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


def test_what_nobody_told_is_in_no_mean():
    """None taken for 0: reads too low where a prefill gave the end at once."""
    assert [mean(values) for values in ([1, None, 4], [None], [0.0])] == [2.5, None, 0]


# ---------------------------------------------------------------- eval_niah.py: what was read

def a_cache(used, *selected, **more):
    return SimpleNamespace(used=torch.tensor(used), selected=list(selected),
                           config=SimpleNamespace(n_kv_head=2), **more)


def step_reads(*caches, method=sparse.Dense()):
    reads = StepReads(sparse.phases(method))
    for cache in caches:
        reads(cache)
    return reads


def test_reads_of_steps_by_hand():
    """Reads of the last step, of one head, the most, or of steps after a row's end."""
    # (B, KV, S): 2 and 1 entries, 3 and 3; two layers: (1.5, 3) and all, (5, 9)
    some = torch.tensor([[[0, 1, -1], [0, -1, -1]], [[2, 3, 4], [5, 6, 7]]])
    steps = a_cache([5, 9], some, None), a_cache([6, 10], some, some)
    reads = step_reads(*steps)
    assert reads.of_rows(None, [2, 2]) == [(3.25 + 1.5) / 2, (6 + 3) / 2]
    assert reads.of_rows(None, [1, 0]) == [3.25, None]
    assert step_reads(a_cache([5, 9], None, None)).of_rows(None, [1, 1]) == [5, 9]
    assert step_reads().of_rows(None, [0, 0]) == [None, None]
    with pytest.raises(ValueError, match="read 9 entries"):  # the most of any row and layer
        step_reads(*steps, method=sparse.Quest(8, 4)).of_rows(None, [2, 2])
    with pytest.raises(ValueError, match="kept 8 entries"):  # 10, less two that were fed since
        step_reads(*steps, method=sparse.SnapKV(7, 2)).of_rows(steps[1], [2, 2])
    kept = step_reads(*steps, method=sparse.SnapKV(8, 2)).of_rows(steps[1], [2, 2])
    assert kept == [2.375, 4.5]


def test_reads_of_the_prompt_by_hand():
    """Whole blocks where the query stands inside one; padding; a layer or a part left out."""
    moba = sparse.MoBA(budget=4, block_size=2)
    reads, one_by_one = PromptReads(moba, dense=False), PromptReads(moba, dense=False)
    # the blocks of tokens 0 to 3, which read 1, 2, 3, 4 entries; and 1, 2, 1, 2
    blocks, own = (torch.tensor(of).expand(2, 1, 4, 2) for of in (
        [[0, -1], [0, -1], [0, 1], [0, 1]], [[0, -1], [0, -1], [1, -1], [1, -1]]))
    real = torch.tensor([[True] * 4, [True, True, False, False]])
    reads(0, torch.cat([blocks, own], 1), real)  # two heads: 1, 2, 2, 3
    reads(1, torch.cat([own, own], 1), real)
    assert reads.of_rows(torch.tensor([4, 2])) == pytest.approx([(2 + 1.5) / 2, 1.5])
    for row in 0, 1:  # a batch in parts
        for layer in 0, 1:
            one_by_one(layer, own[row:row + 1], None)
    assert one_by_one.of_rows(torch.tensor([4, 4])) == [1.5, 1.5]
    for method, dense, found in ((sparse.Dense(), True, [2.5, 4]),
                                 (sparse.Dilated(), False, [None, None])):
        assert PromptReads(method, dense).of_rows(torch.tensor([4, 7])) == found
    few = PromptReads(sparse.MoBA(budget=2, block_size=1), dense=False)
    few(0, torch.tensor([[[[0, 1, 2]]]]), None)
    with pytest.raises(ValueError, match="read 3 entries"):
        few.of_rows(torch.tensor([4]))


def test_an_answer_its_reads_and_seconds_by_hand(monkeypatch):
    """Text or reads behind the end; a batch's seconds for each row, or one method's for all."""
    clock, model, rows = [0.0], tiny(vocab_size=257), [[*b"ab"], [], [*b"abcde"]]
    prefill, decode = model.prefill, model.decode

    def slow_prefill(*given, **more):
        clock[0] += 6
        return prefill(*given, **more)

    def scripted_decode(*given, eos_id, **more):
        clock[0] += 2
        decode(*given, **more)
        return torch.tensor([row + [eos_id] * (5 - len(row)) for row in rows])
    monkeypatch.setattr(eval_niah.time, "time", lambda: clock[0])
    monkeypatch.setattr(model, "prefill", slow_prefill)
    monkeypatch.setattr(model, "decode", scripted_decode)
    examples = [SimpleNamespace(ids=list(range(n)), max_new_tokens=5) for n in (3, 5, 7)]
    methods = sparse.Dense(), sparse.Quest(512, 8)
    told, *_ = eval_niah.answer(model, Bytes(), examples, methods)
    # row 0 takes two steps, whose second finds the end; row 1's prefill gave it; row 2 wrote four
    # of five tokens in steps
    assert [told[method] for method in methods] == [[
        ("ab", 4.5, 2.0, 8 / 3), ("", None, 3.0, 8 / 3), ("abcde", 9.5, 4.0, 8 / 3)]] * 2
    assert answers.Outcome.of(told[methods[1]]) == answers.Outcome(
        ["ab", "", "abcde"], [4.5, None, 9.5], [2, 3, 4], 8)


# ---------------------------------------------------------------- eval_niah.py: H1

def test_what_is_not_told_is_all_that_is_there():
    """H1 of a method that reads all and says None, as Dense does; of slots that are empty now."""
    cache = a_cache([3, 1], None, slots=4, positions=[None])
    low = torch.tensor([1, 1])
    assert was_read(cache, 0, low, low + 1).tolist() == [[True, True], [False, False]]
    # what SnapKV has left
    left = torch.tensor([[[7, 5], [8, 6], [9, 9]]])  # (B, slots, KV), of which two slots are used
    cache = a_cache([2], None, slots=3, positions=[left])
    for low, high, of_heads in ((7, 8, [True, False]), (5, 8, [True, True]),
                                (9, 10, [False, False]), (-1, -1, [False, False])):
        read = was_read(cache, 0, torch.tensor([low]), torch.tensor([high]))
        assert read.tolist() == [of_heads]


# ---------------------------------------------------------------- eval_niah.py: tables, plot,
# results.json

def row(checkpoint, method, task, ruler, half, paper, read=None, prompt_read=None, hits=None,
        random=None, budget=None, by_depth=None):
    scores = [1.0] * int(ruler / 5) + [0.0] * int(20 - ruler / 5)
    return {"checkpoint": checkpoint, "method": method, "task": task, "random": random,
            "budget": budget, "n": 20, "ruler": [ruler, ruler - half - 1, ruler + half + 1],
            "paper": [paper, 0, 100], "read": read, "prompt_read": prompt_read, "hits": hits,
            "by_depth": by_depth or [[2, ruler]] * 10, "prompts": "p", "scores": scores}


# the best head of the means: (1 / 4 + 1) / 2
MEMORY_HITS = [[0.5, 1.0], [0.0, 0.25]], [[0.5, 0.0], [0.75, 1.0]]
RESULTS = [row("attention", "dense", TWO[0], 90, 2, 80, 100, 50),
           row("attention", "dense", TWO[1], 70, 3, 40, 104, 52),
           row("attention", "quest", TWO[0], 60, 2, 50, 10, 50, MEMORY_HITS[0]),
           row("attention", "quest", TWO[1], 20, 3, 0, None, 52, MEMORY_HITS[1]),
           *(row("attention", "quest", TWO[task], score, 1, 5, random=draw)
             for task, draw, score in ((0, 0, 5), (0, 1, 9), (1, 0, 1), (1, 1, 1))),
           row("memory", "dense", TWO[0], 95, 2, 80, 100, 50),
           row("memory", "dense", TWO[1], 60, 3, 40, 104, 52),
           row("memory", "quest", TWO[0], 100, 2, 50, 10, 50),
           row("memory", "quest", TWO[1], 50, 3, 0, 12, 52)]


def half_of(method, paired):
    """Of the difference memory - attention: how its ± is printed."""
    scores = {(of["checkpoint"], of["task"]): of["scores"] for of in RESULTS
              if of["method"] == method and of["random"] is None}
    cells = [difference(scores["attention", task], scores["memory", task], paired) for task in TWO]
    half = math.hypot(*((high - low) / 2 for _, low, high in cells)) / 2
    assert half > 2
    return f"±{half:4.1f}".split()


def lines_of(results):
    """The words of each line of the table."""
    return [line.split() for line in table(results, NAMES).splitlines() if line]


def test_table_by_hand():
    """Means, ±, reads, H1 and differences: each in its column, of its method, with its sign."""
    lines = lines_of(RESULTS)
    assert lines[0] == "RULER score, % paper read by read by H1: best".split()
    assert lines[1] == "S-1 MV mean mean prompt answer heads, %".split()
    # halves 3 and 4, of two tasks: 5 / 2
    assert lines[2:6] == ["attention dense 90.0 70.0 80.0 ± 2.5 60.0 51.0 102.0 -".split(),
                          "attention quest 60.0 20.0 40.0 ± 2.5 25.0 51.0 10.0 62.5".split(),
                          "memory dense 95.0 60.0 77.5 ± 2.5 60.0 51.0 102.0 -".split(),
                          "memory quest 100.0 50.0 75.0 ± 2.5 25.0 51.0 11.0 -".split()]
    assert " ".join(lines[6]).startswith("memory - attention, each prompt asked of both")
    assert "paired" in lines[6] and lines[9][0] == "±:"
    assert lines[7:9] == [["dense", "+5.0", "-10.0", "-2.5", *half_of("dense", True)],
                          ["quest", "+40.0", "+30.0", "+35.0", *half_of("quest", True)]]
    lines = lines_of([of | {"prompts": "other"} if of["checkpoint"] == "memory" else of
                      for of in RESULTS])
    assert "of other prompts" in " ".join(lines[6]) and "paired" not in lines[6]
    assert lines[7][4:] == half_of("dense", False)


def test_results_without_scores_differ_as_strangers():
    """Nothing of an older version's file; or its prompts taken for pairs, whose ± is narrower."""
    old = [{key: value for key, value in of.items() if key != "scores"} for of in RESULTS]
    lines = lines_of(old)
    assert "an older version" in " ".join(lines[6])
    # of one task 3 and 3, of the other 4 and 4: the root of 9 + 9 + 16 + 16, of two tasks
    assert lines[8] == "quest +40.0 +30.0 +35.0 ± 3.5".split()


def test_a_column_that_tells_nothing_is_left_out():
    """Dashes alone, or the same mean twice; a column gone because its first row has no number."""
    def heads(**changes):
        return lines_of([of | changes for of in RESULTS])[1]
    all_of_them = lines_of(RESULTS)[1]
    assert heads(hits=None) == all_of_them[:-2]
    assert heads(read=None) == [head for head in all_of_them if head != "answer"]
    assert heads(prompt_read=None) == [head for head in all_of_them if head != "prompt"]
    same = [of | {"paper": of["ruler"]} for of in RESULTS]
    assert lines_of(same)[1].count("mean") == 1
    assert lines_of([*same[:-1], RESULTS[-1]])[1].count("mean") == 2


@pytest.mark.parametrize("methods, names, note", [
    ("dense quest:budget=1/8,block_size=32 quest:budget=1/16,block_size=32",
     ["dense", "quest 1/8", "quest 1/16"], "block_size=32 in quest"),
    ("quest:budget=1/8,block_size=32 quest:budget=1/8,block_size=16",
     ["quest 1/8 block_size=32", "quest 1/8 block_size=16"], ""),
    ("quest:budget=1/8,keep_first=false quest:budget=1/16",  # said of one, and not of all
     ["quest 1/8 keep_first=false", "quest 1/16"], ""),
    ("quest:budget=64,block_size=8 moba:budget=64,block_size=8+snapkv:budget=1/4,window=8",
     ["quest 64", "moba 64 + snapkv 1/4"], "block_size=8 in quest and moba window=8 in snapkv"),
    ("dilated:dilation=16,local=256", ["dilated"], "dilation=16, local=256 in dilated")])
def test_names_leave_out_what_all_have_alike(methods, names, note):
    """Two rows of one name; a setting of one method told of all, or of none."""
    methods = methods.split()
    assert list(short_names(methods).values()) == names
    found = dict.fromkeys(("m", method) for method in methods)
    assert " ".join(" ".join(notes(found, [])).split()[20:]) == note


@pytest.mark.parametrize("n_tasks, width", [(3, 100), (8, 150)])
def test_a_table_fits_on_a_screen(n_tasks, width):
    """Lines that a terminal breaks, so that no column stands below its head."""
    methods = ["dense", *(f"{kind}:budget=1/16,block_size=64" for kind in ("quest", "snapkv"))]
    found = [row(checkpoint, method, task, 100, 2, 50, 4000, 2000, MEMORY_HITS[0])
             for checkpoint in ("attention", "converted") for method in methods
             for task in list(NAMES)[:n_tasks]]
    assert max(map(len, table(found, NAMES).splitlines())) <= width
    assert max(map(len, conclusion(found, NAMES).splitlines())) <= 100


def test_table_of_draws_by_hand():
    """H2's spread of 0, or of a population; a mean of two tasks."""
    text = table_random(RESULTS, NAMES)
    assert all(words in text for words in ("S-1 7.0 ±2.8", "MV 1.0 ±0.0", "draws (2)"))
    assert "memory" not in text
    one = table_random([of for of in RESULTS if of["random"] == 0], NAMES)
    assert "S-1 5.0" in one and "±" not in one  # a single draw has no spread


# ---------------------------------------------------------------- conclusion.py

def asked(checkpoint, **scores):
    """Rows of some methods, {kind_budget: percent found in S-1 and in MV}, hits of one head."""
    found = []
    for name, of_tasks in scores.items():
        kind, _, parts = name.partition("_")
        text = f"{kind}:budget=1/{parts}" if parts else kind
        hits = [[of_tasks[0] / 200, 0.0]] if kind == "quest" else None
        found += [row(checkpoint, text, task, score, 0, 0, hits=hits,
                      budget=4096 // int(parts) if parts else None)
                  | {"ruler": interval([1.0] * (score // 5) + [0.0] * (20 - score // 5))}
                  for task, score in zip(TWO, of_tasks)]
    return found


FIRST = asked("attention", dense=(90, 90), quest_8=(50, 50), quest_16=(0, 100), moba_8=(50, 50),
              snapkv_8=(90, 90))
AHEAD = asked("memory", dense=(95, 90), quest_8=(100, 100), quest_16=(100, 50), moba_8=(55, 50),
              snapkv_8=(40, 40))
TOGETHER = ("Each is a single model: whether its recipe gains, only several seeds of it tell "
            "(experiments/reproduce.py).")


@pytest.mark.parametrize("results, said", [
    (FIRST + AHEAD,
     "On the mean of 2 tasks memory is ahead of attention under quest 1/8 and 1/16 (but not in MV),"
     " by 25.0 to 50.0 points; it is behind attention under snapkv 1/8, by 50.0 points; under "
     "dense attention and moba 1/8 the difference is within its ±. Under quest 1/16 its best heads "
     f"select the answer's place for 50 % of answers, those of attention for 0 % (H1). {TOGETHER}"),
    (asked("a", dense=(90, 90), moba_8=(80, 80)) + asked("b", dense=(90, 90), moba_8=(40, 40))
     + asked("c", dense=(95, 95), moba_8=(80, 80)),
     "On the mean of 2 tasks b is behind a under moba 1/8, by 40.0 points; under dense attention "
     "the difference is within its ±. On the mean of 2 tasks c differs from a by no more than the "
     f"± under dense attention and moba 1/8, so nothing is decided. {TOGETHER}"),
    (FIRST,
     "On the mean of 2 tasks attention scores 90.0 with dense attention. With the least budgets it "
     "loses under quest 1/16 and moba 1/8, by 40.0 points; under snapkv 1/8 the difference is "
     "within its ±."),
    ([of for of in FIRST if of["method"] in ("dense", "moba:budget=1/8") and of["task"] == TWO[0]],
     "In S-1 attention scores 90.0 with dense attention. With the least budgets it loses under "
     "moba 1/8, by 40.0 points."),
    ([of for of in FIRST if of["method"] == "dense"], "")],
    ids=["both ways", "three models", "one model", "one task", "dense alone"])
def test_the_conclusion_follows_from_the_numbers(results, said):
    """A gain that the prompts do not decide; a loss, or a task that the mean hides, kept quiet."""
    assert " ".join(conclusion(results, NAMES).split()) == said


# ---------------------------------------------------------------- plots.py

def test_a_mean_of_tasks_keeps_its_sides_apart():
    """An interval of Wilson's that is drawn beyond 100, or as wide on its short side."""
    assert mean_of_tasks([[50, 40, 80]]) == [50, 40, 80]
    middle, low, high = mean_of_tasks([[100, 70, 100], [90, 50, 95]])
    assert (middle, low, high) == pytest.approx((95, 95 - 50 / 2, 95 + 5 / 2))


def test_the_plot_shows_the_tables_numbers(monkeypatch, tmp_path):
    """Dense for the least budget; tenths weighted alike though their answers are not as many."""
    tenths = [[[10, 50], [30, 100], *[[20, 40]] * 7, [10, 25]],
              [[30, 100], [10, 0], *[[20, 60]] * 7, [10, 75]]]
    found = [row("m", method, task, score + 10 * t, 2 + t, 0, budget=budget, by_depth=tenths[t])
             for method, budget, score in (("dense", None, 80), ("quest:budget=1/4", 1024, 70),
                                           ("quest:budget=1/16", 256, 40), ("dilated", None, 10))
             for t, task in enumerate(TWO)]
    found[0]["by_depth"] = found[2]["by_depth"] = [[30, 0]] * 10  # dense, and the larger budget
    figures = drawn(monkeypatch)
    plot(found, NAMES, 4096, tmp_path / "plot.png")
    (above, other), (below, _) = figures[0]
    x, means, bars = above.errorbar.call_args.args
    assert numbers([x, means, *bars]) == [[0, 1], [45, 75], [2.5, 2.5], [2.5, 2.5]]
    assert above.axhline.call_args.args == (85,)
    assert above.set_xticks.call_args.args[1] == ["1/16\n256", "1/4\n1,024"]
    x, least, (down, up) = below.errorbar.call_args.args
    assert numbers([x, least]) == [list(range(5, 100, 10)), [87.5, 75, *[50] * 8]]
    assert numbers([down[-1:], up[-1:]]) == numbers([[50 - 29.93], [70.07 - 50]])  # 10 of 20
    x, dense = below.plot.call_args.args
    assert numbers([dense])[0][:3] == [50, round(100 * 0 / 40, 4), 24]
    titles = [axis.set_title.call_args.args[0] for axis in (above, below, other)]
    assert titles == ["quest", "quest 1/16", "dilated"]
    x, means, _ = other.errorbar.call_args.args
    assert (x, means) == ((0,), (15,)) and other.set_xticks.call_args.args[1] == [""]


@pytest.mark.parametrize("n, bins", [(15, 10), (14, 5), (8, 5), (7, None)])
def test_few_answers_make_wider_bins_of_depth_or_none(n, bins, monkeypatch, tmp_path):
    """A line that jumps with every answer."""
    half = n // 2
    found = [row("m", method, task, 50, 2, 0, budget=budget, by_depth=[[of_task, 50]] * 10)
             for method, budget in (("dense", None), ("quest:budget=1/4", 1024))
             for task, of_task in zip(TWO, (half, n - half))]
    figures = drawn(monkeypatch)
    plot(found, NAMES, 4096, tmp_path / "plot.png")
    assert len(figures[0]) == (2 if bins else 1)
    if bins:
        assert len(figures[0][1, 0].errorbar.call_args.args[0]) == bins


def test_a_picture_is_legible_in_print_and_in_grey(tmp_path):
    """Letters of 5 points; two models alike but for their colour; bars out of the picture."""
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="pip install matplotlib")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pyplot, "close", lambda figure: None)
        plot(FIRST + AHEAD, NAMES, 4096, tmp_path / "plot.png")
    figure = pyplot.gcf()
    assert figure.get_size_inches()[0] == 7
    texts = [text for text in figure.findobj(pyplot.matplotlib.text.Text) if text.get_text()]
    assert len(texts) > 20 and min(text.get_fontsize() for text in texts) >= 8
    first, second = ([line.get_marker(), line.get_linestyle(), line.get_color()]
                     for line in figure.legends[0].get_lines()[:2])
    assert all(x != y for x, y in zip(first, second))
    quest = figure.axes[0].containers
    assert [of.lines[0].get_color() for of in quest] == [first[-1], second[-1]]
    pyplot.close("all")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "plot.pdf").read_bytes().startswith(b"%PDF")


def saved(path, results, context_len=4096):
    files.save({"results": results, "settings": {"context_len": context_len}}, path)
    return str(path)


def test_results_that_are_there_are_drawn_again(tmp_path, capsys):
    """A file of today or of an older version; two files that make one table."""
    (tmp_path / "run").mkdir()
    saved(tmp_path / "run" / "results.json", FIRST + AHEAD)  # in a folder of eval_niah.py's
    parts = [saved(tmp_path / "a.json", FIRST),
             saved(tmp_path / "more.json", AHEAD[:2] + AHEAD[4:]),
             saved(tmp_path / "b.json", AHEAD[:4])]  # dense in both
    told = []
    for given in [str(tmp_path / "run")], parts:
        eval_niah.main(["--plot", *given])
        told.append(capsys.readouterr().out.partition("picture in")[0])
    assert told[0] == told[1] and "memory is ahead of attention" in told[0]
    assert "H2" not in told[0]
    old = [{key: value for key, value in of.items() if key != "scores"} for of in RESULTS]
    eval_niah.main(["--plot", saved(tmp_path / "old.json", old)])
    out = capsys.readouterr().out
    assert "an older version" in out and "H2" in out
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    for name in "run/results.png", "run/results.pdf", "a+more+b.png", "old.png":
        assert (tmp_path / name).exists()


def bad(**changes):
    return [*FIRST[:3], FIRST[3] | changes, *FIRST[4:]]


@pytest.mark.parametrize("content, words", [
    (None, "is missing"), ("{", "no JSON"), ([], "no object"), ({"settings": {}}, "'results'"),
    ({"results": FIRST, "settings": {}}, "context_len"),
    ({"results": {}, "settings": {"context_len": 4096}}, "no list"),
    (bad(ruler=[1, 2]), "row 4 of its results has no fitting ruler: [1, 2]"),
    (bad(task="niah_single_9"), "row 4"), (bad(scores=[1.0]), "row 4"),
    (bad(by_depth=[[1, "x"]] * 10), "fitting by_depth"), (bad(n=True), "fitting n"),
    (bad(hits=[[1.0], "x"]), "fitting hits"), (bad(hits=[[1.0], [1.0, 0]]), "row 4"),
    ([one | {"hits": [[1.0]] * (2 + (one is FIRST[3]))} for one in FIRST], "layer and head"),
    ([*FIRST[:3], 7], "row 4"),
    (FIRST[:-1], "the same tasks"), (FIRST[2:], "dense")])
def test_a_file_that_is_no_result_is_one_line(content, words, tmp_path, capsys):
    """A traceback, or half a picture, for a wrong path, another script's file, an edited one."""
    path = tmp_path / "results.json"
    if content and isinstance(content, list):
        saved(path, content)
    elif content is not None:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(SystemExit) as end:
        eval_niah.main(["--plot", str(path)])
    line = capsys.readouterr().err
    assert end.value.code == 2 and line.count("\n") == 1 and str(path) in line and words in line


@pytest.mark.parametrize("other, context_len, words", [
    (FIRST, 2048, "another --context_len"), (bad(ruler=[1, 0, 2]), 4096, "another result"),
    (bad(prompts="q"), 4096, "another result")])
def test_files_that_do_not_compare_are_refused(other, context_len, words, tmp_path, capsys):
    """Two models of one name in one line; budgets of 1/8 that are not the same."""
    given = [saved(tmp_path / "a.json", FIRST), saved(tmp_path / "b.json", other, context_len)]
    with pytest.raises(SystemExit):
        eval_niah.main(["--plot", *given])
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and given[1] in line and words in line


def test_results_that_are_published_can_be_drawn():
    """A field that only newer versions write, wanted of all."""
    folder = Path(eval_niah.__file__).parent / "results" / "reproduce"
    published = sorted(folder.glob("*-[0-9].json"))
    if not published:
        pytest.skip("results/ is not here")
    for file in published:
        rows, context_len = read_results([file], NAMES)
        assert context_len == 4096 and len(rows) >= 80
    with pytest.raises(ValueError, match="summary.json"):
        read_results([folder / "summary.json"], NAMES)


def test_results_by_hand(tmp_path, monkeypatch, capsys):
    """Every field of results.json that a table or a reader quotes, from answers on disk."""
    monkeypatch.setattr(eval_niah, "plot", lambda results, names, context_len, path: None)
    monkeypatch.setattr(eval_niah, "table", lambda results, names: "the table")
    monkeypatch.setattr(eval_niah, "table_random", lambda results, names: "of draws")
    monkeypatch.setattr(eval_niah, "conclusion", lambda results, names: "so it is")
    monkeypatch.setattr(eval_niah.weights, "resolve", lambda path: path)
    examples = [SimpleNamespace(answers=of_one, depth=depth, ids=[0] * 10, prompt=str(n),
                                task="niah_multivalue", index=n, answer_prefix="", max_new_tokens=8,
                                question=0,
                                keys_from="words", haystack_from="text")
                for n, (of_one, depth) in enumerate(((["11", "22"], [9, 100]), (["33"], [50]),
                                                     (["44"], [59])))]
    dense, quest = sparse.Dense(), sparse.Quest(16, 8)
    chance, task, text = sparse.randomized(quest, 3), "niah_multivalue", "quest:budget=1/4"
    told = {dense: [("11,22", 100.0, 50.0, 1.0), ("x33", None, 52.0, 2.0), ("", 104.0, None, 3.0)],
            quest: [("11", 8.0, None, 1.0)] * 3, chance: [("44", 16.0, None, 0.5)] * 3}
    lines = [("", method, [i], answers.Answer(*of_one)._asdict()) for method, of in told.items()
             for i, of_one in enumerate(of)]
    lines += [("H1 ", quest, [0, 2], {"hits": [[3, 0]], "answers": 3}),
              ("H1 ", quest, [1], {"hits": [[0, 1]], "answers": 1})]
    (tmp_path / "answers-0.jsonl").write_bytes(b"".join(
        answers.written(answers.Line("m", task, kind + sparse.name(method), of, content))
        for kind, method, of, content in lines))
    files.save({"calls": ["first", "second"]}, tmp_path / "asked.json")
    args = SimpleNamespace(out=str(tmp_path), json=str(tmp_path / "results.json"), hits=True,
                           random=1, context_len=64, blind=None)
    call = {"commit": "c", "speed": {"answers": 9, "seconds": 4.5, "seconds_of_loading": 2.0}}
    eval_niah.report(args, call, {"m": tmp_path}, {"m": Bytes()}, {"m": {task: examples}},
                     {dense: "dense", quest: text, chance: text})
    found = json.loads((tmp_path / "results.json").read_text())
    assert found.items() >= {"finished": True, "calls": ["first", "second"], "commit": "c"}.items()
    assert found["settings"]["context_len"] == 64
    common = {"checkpoint": "m", "path": str(tmp_path), "tokenizer": "bytes", "task": task, "n": 3,
              "prompts": niah.prompt_hash(examples), "keys_from": "words", "haystack_from": "text"}
    nothing = [[0, None]] * 4  # of a tenth without a needle
    of_quest = {"method": text, "budget": 16, "prompt_read": None, "prompt_read_share": None}
    for got, wanted in zip(found["results"], (
            {"method": "dense", "random": None, "budget": None, "ruler": interval([1, 1, 0]),
             "paper": interval([1, 0, 0]), "read": 102, "read_share": 102 / 64, "prompt_read": 51,
             "prompt_read_share": 51 / 64, "hits": None, "seconds": 6,
             "by_depth": [[1, 100], *nothing[:4], [2, 50], *nothing[:3], [1, 100]],
             "scores": [1, 1, 0]},
            # hits of four answers, not a mean of two batches
            of_quest | {"random": None, "ruler": interval([0.5, 0, 0]), "read": 8,
                        "read_share": 0.125, "hits": [[0.75, 0.25]], "seconds": 3,
                        "by_depth": [[1, 100], *nothing[:4], [2, 0], *nothing[:3], [1, 0]],
             "scores": [0.5, 0, 0]},
            of_quest | {"random": 3, "ruler": interval([0, 0, 1]), "read": 16, "hits": None,
                        "seconds": 1.5}), strict=True):
        assert got.items() >= (common | wanted).items()
    saved = [[json.loads(line)["pred"] for line in open(of["predictions"])]
             for of in found["results"]]
    assert saved == [[words for words, *_ in of] for of in told.values()]
    said = capsys.readouterr().out
    assert "9 answers in 4.5 s, 2 a second; loading took 2.0 s" in said
    places = [said.index(words) for words in ("the table", "of draws", "so it is", "9 answers")]
    assert places == sorted(places)


def test_answers_and_seconds_go_to_their_examples(monkeypatch):
    """A neighbour's answer in the batch; the seconds of rows that fill a batch up, lost."""
    monkeypatch.setattr(eval_niah, "answer", lambda model, tokenizer, some, methods, *rest: (
        {m: [answers.Answer(f"{e.name} {sparse.name(m)}", 1.0, 2.0, 0.5) for e in some]
         for m in methods}, {}, None))
    examples = [SimpleNamespace(ids=[0] * n, name=n) for n in (5, 3, 4)]
    by_name = {sparse.name(m): m for m in (sparse.Dense(), sparse.Quest(16, 8))}
    dense, quest = by_name
    batch = answers.Batch("m", "S", [1, 2], {dense: [2], quest: [1, 2]})
    # on a GPU three rows of half a second for two answers
    for device, seconds in ("cuda", 0.75), ("cpu", 0.5):
        lines, _ = eval_niah.ask(None, None, examples, batch, by_name,
                                 SimpleNamespace(device=device, batch=8, blind=None), None)
        assert [(*line[:4], line.told["text"], line.told["seconds"]) for line in lines] == [
            ("m", "S", dense, [2], "4 dense", seconds),
            ("m", "S", quest, [1], f"3 {quest}", seconds),
            ("m", "S", quest, [2], f"4 {quest}", seconds)]


def test_examples_are_those_of_the_flags(tmp_path):
    """--seed, --protocol or --haystack that are not heard: the same table under two names."""
    (tmp_path / "words.txt").write_text("Zebras yawn. " * 100)

    def make(**changes):
        given = dict(haystack=None, context_len=512, seed=0, samples=2, protocol="base",
                     max_new_tokens=48, words="built-in", questions=None) | changes
        found = eval_niah.make_examples(SimpleNamespace(**given), Bytes(), ["niah_single_2"])
        return found["niah_single_2"]
    first = make()
    assert first == [niah.make_example("niah_single_2", 512, Bytes(), 0, i, max_new_tokens=48)
                     for i in (0, 1)]
    assert make(seed=1)[0].answers != first[0].answers
    assert make(protocol="sft")[0].answer_prefix == "" != first[0].answer_prefix
    assert "Zebras yawn" in make(haystack=tmp_path / "words.txt")[0].prompt
    other, _, _ = make(samples=3, context_len=640, max_new_tokens=40)
    assert (other.context_len, other.max_new_tokens) == (640, 40)


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A tiny model that was trained with some flags of its own."""
    monkeypatch.chdir(tmp_path)
    tiny(vocab_size=257, context_len=512).save_pretrained("model")
    made = {"step": 1, "settings": {"protocol": "sft", "tasks": ["niah_single_2"]}}
    (tmp_path / "model" / "train.json").write_text(json.dumps(made))


def test_what_is_not_given_is_the_models(model):
    """A fine-tuned model asked in another form, length or task than it knows: a low score."""
    def asked(*flags):
        args = eval_niah.flags().parse_args(["--ckpt=model", "--device=cpu", *flags])
        _, tokenizers, methods = eval_niah.prepare(args)
        tasks = eval_niah.choose_tasks(args, tokenizers.values())
        return (args.protocol, args.context_len, tasks, args.max_new_tokens, args.samples,
                args.dtype), methods
    own, methods = asked()
    assert own == ("sft", 512, ["niah_single_2"], 48, 16, "float32")
    assert [(sparse.name(m).partition(":")[0], getattr(m, "budget", None)) for m in methods] == [
        ("dense", None), *((kind, budget) for kind in ("quest", "moba", "snapkv")
                           for budget in (128, 64, 32))]
    assert asked("--context_len=32768")[0][4] == 2  # a first look shall not take an hour
    given, _ = asked("--protocol=base", "--context_len=640", "--tasks", "niah_single_1",
                     "--samples=3", "--max_new_tokens=40")
    assert given == ("base", 640, ["niah_single_1"], 40, 3, "float32")


def test_speed_is_of_the_last_process_to_finish(model, tmp_path, monkeypatch):
    """The fastest GPU's answers a second; those that were there before; the loading of a model."""
    clock, reports = [0.0], []
    monkeypatch.setattr(eval_niah.time, "time", lambda: clock[0])
    for owner, name, seconds in ((eval_niah.Transformer, "from_pretrained", 50),
                                 (eval_niah, "answer", 7)):
        def slow(*given, function=getattr(owner, name), seconds=seconds):
            clock[0] += seconds
            return function(*given)
        monkeypatch.setattr(owner, name, slow)
    monkeypatch.setattr(eval_niah, "report", lambda args, call, *_: reports.append(call["speed"]))
    run = lambda: eval_niah.main(["--ckpt=model", "--device=cpu", "--out=out", "--batch=2",
                                  "--methods=dense", "--samples=3", "--max_new_tokens=12"])
    run()
    file = tmp_path / "out" / "answers-0.jsonl"
    file.write_bytes(file.read_bytes().splitlines(keepends=True)[0])
    meet = answers.Ranks.meet  # another process that took longer to answer
    monkeypatch.setattr(answers.Ranks, "meet", lambda self, place, word="": (
        meet(self, place, word) + ["[100, 3]"] * (place == "all have written")))
    run()
    assert reports == [{"answers": 3, "seconds": 14.0, "seconds_of_loading": 50.0},
                       {"answers": 2, "seconds": 100, "seconds_of_loading": 50}]


# ---------------------------------------------------------------- sample.py

def test_what_sample_prints_by_hand(tmp_path, capsys):
    """Tokens of the prompt told as the answer's; a dense answer that is said to read less."""
    tiny(vocab_size=257, context_len=64).save_pretrained(tmp_path / "model")  # it writes no end
    sample.main([f"--ckpt={tmp_path / 'model'}", "--prompt=Hello, you", "--method=dense",
                 "--max_new_tokens=8", "--device=cpu", "--tokenizer=bytes"])
    assert ("8 tokens after 10: each prompt token read all before it, each answer token read all "
            "before it") in capsys.readouterr().out
