"""
The numbers that we publish, computed by hand: what a run costs and how fast it is, what it trains
on and is validated by, its log and record, answers on disk. tests/mutants.py plants a wrong one
after the other; these tests see them. test_report_tables.py is of what is made of them.
"""
import json
import math
import random
import re
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import tiny
from test_niah import Bytes

from infra import answers
from infra import cost
import data
import eval_niah
import mutants
import niah
from infra import files, parallel, runlog, shards, watch
from experiments import runs
import train
from memory import effective_length
from model import PRESETS, Config, Transformer
from infra.parallel import Processes


def test_every_planted_fault_still_applies():
    """A mutant whose line has been rewritten since: it is planted nowhere, and nothing says so."""
    for file, test, old, new in mutants.table():
        assert not mutants.stale(file, test, old), (file, old)
        assert old != new
        compile((mutants.ROOT / file).read_text(encoding="utf-8").replace(old, new), file, "exec")


# ---------------------------------------------------------------- cost.py: FLOPs, MFU, bytes

# embedding and head 10 x 8 each, and the last norm; q, k, v, o 8 x 8, two norms of 8 and QK-norm of
# 8 + 8; three of 8 x 12
HAND = Config(vocab_size=10, n_layer=2, width=8, n_head=2, n_kv_head=2, mlp_width=12,
              context_len=64)
OF_LAYER = 4 * 64 + 16 + 16 + 3 * 96


def test_flops_are_those_counted_by_hand():
    """
    Half an MFU, or twice: an embedding that is only looked up, backward forgotten, attention that
    reads the future too.
    """
    assert cost.parameters(HAND) == (2 * OF_LAYER + 168, OF_LAYER, 168)
    # 2 products and sums a parameter forward and 4 backward, but for the embedding; of each entry
    # read, q k and p v: 2 x 2 x 8 forward
    assert cost.flops_per_token(HAND, 16) == 6 * (2 * OF_LAYER + 88) + 3 * 2 * (2 * 2 * 8) * 16
    # one matrix, still multiplied once
    assert cost.flops_per_token(replace(HAND, tied=True), 16) == cost.flops_per_token(HAND, 16)


def test_bytes_are_those_counted_by_hand():
    """
    A prediction of memory off by less than the 3 percent that measured peaks allow, and by a lot at
    another shape.
    """
    # 5 tokens: of a layer 10 vectors of 8 (four of the block, three of q, three of k and v) and 3
    # of 12, two bytes each: 232 a token
    expected = {"weights and moments": 12 * 1320, "gradients": 4 * 1320 - 2320 - 600,
                "activations": 5 * 2 * 232,
                # logits and their gradient, 50 each; the head's gradient; three of x's size
                "loss": 2 * 2 * 50 + 2 * 80 + 3 * 2 * 5 * 8, "gathered": 2 * 1320}
    assert cost.needs(HAND, 1, 5, stays="weights") == expected
    assert cost.needs(HAND, 4, 5) == expected | {"weights and moments": 3 * 1320, "gradients": 0,
                                                 "gathered": 2 * (2 * OF_LAYER + 168)}
    assert cost.needs(HAND, 2, 5, parts=2, stays="all")["gradients"] == 4 * 1320
    assert cost.needs(HAND, 2, 5, parts=2)["gradients"] == 4 * 1320 / 2
    # one layer's all, the other's input
    assert cost.needs(HAND, 1, 5, recompute=1)["activations"] == 5 * (232 + 2 * 8)
    # the one that backward is at
    assert cost.needs(HAND, 1, 5, recompute=2)["activations"] == 5 * (232 + 2 * 2 * 8)
    assert cost.needs(HAND, 1, 5, small=True)["activations"] == 5 * 2 * (232 + 2 * 4 * 8)
    assert cost.needs(HAND, 1, 5, small=True)["gathered"] == 0
    # fp32 on a CPU: nothing is made of the weights
    assert cost.needs(HAND, 1, 5, width=4, stays="weights")["gathered"] == 0
    # two chunks of logits, and the head's gradient in fp32 beside one in bf16
    large, tokens = replace(HAND, vocab_size=2**20), 1024
    assert cost.needs(large, 1, tokens)["loss"] == 4 * 2**29 + 8 * 2**23 + 6 * tokens * 8
    per = lambda **changes: cost.per_width(replace(HAND, **changes))
    assert per() == 10 and per(qk_norm=False) == 8 and per(n_kv_head=1) == 7 + 3 / 2
    assert per(memory=True) == 5 + 3 + 6 and per(memory=True, pre_norm=True) == 4 + 3 + 6
    assert per(memory=True, pre_norm=True, qk_norm=False) == 4 + 2 + 5
    assert per(output_gate=True) == 12
    assert cost.needs(replace(HAND, swiglu=False), 1,
                      5)["activations"] == 5 * 2 * 2 * (10 * 8 + 2 * 12)


def test_room_is_nine_tenths_of_what_is_there(monkeypatch):
    """
    A run that is told to fit and does not; processes that each take all of a machine for theirs.
    """
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1, 80e9))
    monkeypatch.setattr(cost.os, "sysconf",
                        {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1_000_000}.__getitem__)
    assert cost.room("cuda", 8) == pytest.approx(72e9)
    assert cost.room("cpu", 4) == pytest.approx(0.9 * 4096e6 / 4)


def test_a_run_is_told_by_figures_worked_by_hand():
    """Hours, tokens and FLOPs that are off by the number of GPUs, of passes or of parts."""
    args = SimpleNamespace(batch=16, context_len=1000, steps=45, device="cuda", arl=64, joint=0,
                           adapt=None)
    plan = cost.Plan(2, 1, "all", {"weights": 3e9, "gradients": 1e9, "crumbs": 1e7}, 5e9)
    lines = list(cost.lines(replace(HAND, memory=True), plan, args, {"arl": 1e15, "dense": 3e15},
                            1e12, 4))
    assert "45 steps of 16 x 1000 = 16,000 tokens, 720K in all" in lines[1]
    assert "4 processes x 2 parts, whose gradients add up, x 2 sequences" in lines[1]
    assert lines[2] == ("250GFLOP a token, 4PFLOP a step, 1.80e+17 in all, "
                        "about 28 hours at an MFU of 45%")  # 1.8e17 / (0.45 x 4e12) s
    assert lines[3] == ("GPU memory per process: 4.0 GB of 5.0 GB (weights 3.0 GB, gradients "
                        "1.0 GB); 1 of 2 layers compute their activations anew; "
                        "weights and gradients travel once a batch")
    alone = list(cost.lines(HAND, replace(plan, recompute=0, device_batch=16),
                            SimpleNamespace(**vars(args) | {"arl": 0, "device": "cpu"}),
                            {"dense": 1e15}, None, 1))
    assert alone[1].endswith("A step: dense pass, each of 1 process x 16 sequences")
    assert alone[2].endswith("4.50e+16 in all")
    assert alone[3] == "RAM per process: 4.0 GB of 5.0 GB (weights 3.0 GB, gradients 1.0 GB)"


def test_passes_count_what_they_read():
    """ARL's FLOPs counted as dense ones, or a window's: an MFU too high."""
    settings = dict(batch=3, context_len=64, arl=0, joint=0, adapt=None)

    def passes(**changes):
        found = train.passes_of(SimpleNamespace(**settings | changes))
        return {name: reads for name, (_, reads) in found.items()}
    assert passes() == {"dense": 32}
    assert passes(arl=8) == {"arl": 4, "dense": 32}
    assert passes(joint=16) == {"joint": 16, "dense": 32}
    assert passes(joint=64) == {"joint": 32, "dense": 32}
    assert passes(adapt="dilated:dilation=8,local=4,initial=2") == {"dense": 4 + 4 + 2}
    assert passes(adapt="dilated:dilation=1,local=4,initial=2") == {"dense": 32}  # no more than all
    assert passes(adapt="dilated:dilation=none,local=4,initial=2") == {"dense": 0.5 + 4 + 2}
    # what the patterns' masks really hold, to within the query's own entry
    (arl, _), (dense, _) = train.passes_of(SimpleNamespace(**settings | {"arl": 8})).values()
    t = torch.arange(64)
    assert abs(arl.pattern(t[:, None], t).sum(-1).float().mean() - 4) < 1 and dense is None
    (window, _), _ = train.passes_of(SimpleNamespace(**settings | {"joint": 16})).values()
    # the first queries have less before them
    assert abs(window.pattern(t[:, None], t).sum(-1).float().mean() - 16) < 3
    of_pass = train.flops_of(SimpleNamespace(**settings | {"arl": 8}), HAND)
    per_token = 6 * (2 * OF_LAYER + 88)
    assert of_pass == {"arl": 3 * 64 * (per_token + 192 * 4),
                       "dense": 3 * 64 * (per_token + 192 * 32)}


# ---------------------------------------------------------------- data.py, niah.py: what a run
# trains on and is validated by

def arguments(*flags):
    return train.parse(["--preset=pico", "--memory=on", "--context_len=512", "--tasks",
                        "niah_single_1", "niah_single_2", "--steps=4",
                        "--batch=4", "--device=cpu", *flags])


def datasets(*flags):
    """-> what a run of these flags trains on, and is validated by"""
    return data.make_data(arguments(*flags), Bytes(), niah.Needles)


def kinds(monkeypatch, dataset, indices):
    """How each sample was made: "drill", "many" questions, or "one"."""
    made, drill, many, compose = [], niah.drill, niah.many_questions, niah.compose
    monkeypatch.setattr(niah, "drill", lambda *given: made.append("drill") or drill(*given))
    monkeypatch.setattr(niah, "many_questions", lambda *given: made.append("many") or many(*given))
    monkeypatch.setattr(niah, "compose",
                        lambda *given, **more: made.append("one") or compose(*given, **more))
    for index in indices:
        dataset[index]
    return made


def test_samples_are_of_the_kinds_that_the_flags_say(monkeypatch):
    """
    Drills that are gone, or never end; many questions where --many=0 says none: retrieval that
    forms later, and nobody knows why.
    """
    training, validation = datasets("--drills=0.5", "--many=0.25")
    made = kinds(monkeypatch, training, range(308))  # 2 of 4 steps of 4
    assert made[:8] == ["drill"] * 8 and len(made) == 308
    assert 90 - 32 < made[8:].count("drill") < 90 + 32
    assert 52 - 26 < made[8:].count("many") < 52 + 26  # 30 %, and 25 % of the rest: 4 sigma
    assert "drill" not in kinds(monkeypatch, validation, range(60))
    assert "drill" not in kinds(monkeypatch, datasets()[0], range(60))
    only = lambda *flags: set(kinds(monkeypatch, datasets(*flags)[0], range(12)))
    assert only("--many=0") == {"one"} and only("--many=1") == {"many"}


def numbers_in(dataset, indices):
    """All values of seven digits."""
    return {value for index in indices
            for value in re.findall(r"is: (\d{7})\.", Bytes().decode(dataset[index][0].tolist()))}


def test_training_validation_and_test_share_no_needle():
    """
    Validation by samples that were trained on, of this run or of the one that it continues; a test
    set that training has seen.
    """
    needles = lambda of: [numbers_in(dataset, range(40)) for dataset in of]
    continued = train.parse(["--recipe=micro-sft", "--init=x", "--context_len=512", "--tasks",
                             "niah_single_1", "niah_single_2", "--device=cpu"])
    sets = [*needles(datasets()), *needles(datasets("--seed=1")),
            *needles(data.make_data(continued, Bytes(), niah.Needles))]
    sets += [{answer for index in range(40)
              for answer in niah.make_example("niah_single_2", 512, Bytes(), seed, index,
                                              split=split, max_new_tokens=48).answers}
             for seed in (0, 1) for split in ("val", "test")]
    assert min(map(len, sets)) >= 39 and len(set.union(*sets)) == sum(map(len, sets))


def test_only_answers_count_in_validation_and_the_rest_as_told_in_training():
    """val_loss over whatever has a weight; other_weight that is dropped on its way."""
    for other in 0.0, 0.25, 1.0:
        training, validation = datasets(f"--other_weight={other}")
        for index in range(4):
            tokens, weight = training[index]
            filled = np.flatnonzero(tokens != Bytes.eos_id)[-1] + 1
            assert weight[0] == 0 and set(weight[1:filled].tolist()) == {other, 1.0}
            tokens, weight = validation[index]
            assert set(weight.tolist()) == {0.0, 1.0} and (weight == 1).mean() < 0.5
            ends = np.flatnonzero((tokens == Bytes.eos_id) & (weight == 1))
            assert len(ends)
            assert all(re.fullmatch(r"[0-9]{7}", Bytes().decode(tokens[end - 7:end].tolist()))
                       and (weight[end - 7:end] == 1).all() for end in ends)


def test_tasks_protocol_and_haystack_are_those_of_the_flags(tmp_path):
    """A recipe for eight tasks trained on those that fit, or in the other protocol."""
    (tmp_path / "words.txt").write_text("Zebras yawn. " * 200)
    dataset, _ = datasets("--protocol=sft", "--many=0", f"--haystack={tmp_path / 'words.txt'}")
    texts = [Bytes().decode(dataset[index][0].tolist()) for index in range(12)]
    assert {"Zebras yawn" in text for text in texts} == {True, False}  # of one of the two tasks
    assert all("grass is green" in text or "Zebras yawn" in text for text in texts)
    assert all(text.startswith("A special magic number is hidden")
               and re.search(r"provided text\?[0-9]{7}$", text) for text in texts)
    assert all(dataset[index][0][0] != Bytes.eos_id for index in range(12))


def test_training_essays_start_anywhere_and_asked_ones_at_the_first_word(monkeypatch):
    """Models that read one page of the haystack again and again."""
    starts = []

    class Haystack(niah.Haystack):
        def __init__(self, task, rng, avoid, words, start):
            starts.append(start)
            super().__init__(task, rng, avoid, words, start)

    class Words(list):
        def __getitem__(self, key):
            if isinstance(key, slice):
                starts.append(key.start)
            return super().__getitem__(key)
    monkeypatch.setattr(niah, "Haystack", Haystack)
    n_words = len(niah.essay_words()[0])
    for more in {"many": 0.0}, {"many": 1.0}:
        for index in range(40):
            niah.training_sample(512, Bytes(), 0, index, ["niah_single_2"], max_new_tokens=48,
                                 **more)
        assert len(set(starts)) > 35 and min(starts) < n_words / 4 and max(starts) > 3 * n_words / 4
        starts.clear()
    for index in range(40):
        niah.make_example("niah_single_2", 512, Bytes(), 0, index, split="train", max_new_tokens=48)
    assert len(set(starts)) > 35
    starts.clear()
    for split in "val", "test":
        niah.make_example("niah_single_2", 512, Bytes(), 0, 0, split=split, max_new_tokens=48)
    assert set(starts) == {0}
    starts.clear()
    words = Words(niah.essay_words()[0])
    for seed in range(40):
        niah.drill(512, Bytes(), random.Random(seed), words)
    assert len(set(starts)) > 100 and max(starts) > 3 * n_words / 4


def test_drills_ask_for_what_they_stated():
    """
    Drills whose first mention counts as an answer, that nobody could know; answers of another key;
    no text in between.
    """
    with_text = []
    for seed in range(40):
        pieces = niah.drill(512, Bytes(), random.Random(seed), ["zebra"] * 100)
        known = {}
        thirds = pieces[::3], pieces[1::3], pieces[2::3]
        for (template, _), (value, is_answer), (end, _) in zip(*thirds, strict=True):
            words, value = Bytes().decode(template), Bytes().decode(value)
            key, = re.findall(r"([a-z]+-[a-z]+)(?: is: | mentioned)", words)
            assert is_answer == (key in known)
            assert known.setdefault(key, value) == value
            assert re.fullmatch(r"\d|\d\d|\d{7}", value)
            assert Bytes().decode(end).startswith(".\n")
        assert 1 <= len(known) <= 4 and 512 <= sum(len(ids) for ids, _ in pieces) < 512 + 300
        with_text.append(any("zebra" in Bytes().decode(end) for end, _ in pieces[2::3]))
    assert 10 < sum(with_text) < 35  # three of five


def test_each_process_takes_its_part_of_each_batch():
    """
    Two GPUs that train on the same half; a resumed run that begins with the first samples again.
    """
    args = SimpleNamespace(steps=3, batch=4, workers=0, device="cpu")
    indices = lambda done, rank, world: list(data.Indices(args, done, Processes(rank, world)))
    assert indices(0, 0, 1) == list(range(12)) and indices(2, 0, 1) == [8, 9, 10, 11]
    assert indices(1, 0, 2) == [4, 5, 8, 9] and indices(1, 1, 2) == [6, 7, 10, 11]
    made = [(torch.tensor([n]), torch.tensor([0.5 * n])) for n in range(12)]
    got = list(data.batches(made, args, 1, Processes(1, 2)))
    assert [tokens.flatten().tolist() for tokens, _ in got] == [[6, 7], [10, 11]]
    assert got[1][1].flatten().tolist() == [5.0, 5.5]
    assert len(data.Indices(args, 1, Processes(0, 2))) == 4


def test_text_is_validated_on_windows_that_are_not_trained_on(tmp_path):
    """
    A validation loss of text that the model has seen; a first token that counts as a target though
    nothing comes before it.
    """
    # 400 windows
    tokens = np.arange(40_001, dtype=np.uint16).tobytes()
    shards.save_shard(tmp_path / "00000.bin", [tokens], 50_000, "bytes", 0)
    training, validation = datasets(f"--data={tmp_path}", "--context_len=100")
    first = lambda dataset, n: {dataset[index][0][0].item() for index in range(n)}
    trained, held_out = first(training, 396), first(validation, 4)
    assert len(trained) == 396
    assert len(held_out) == 4
    assert held_out == {100 * window for window in range(396, 400)}
    assert not trained & held_out
    assert training[0][1].tolist() == [0] + [1] * 100


def test_a_run_is_known_by_its_samples(tmp_path):
    """A resume on other data that nobody notices: another token, another weight, a shard less."""
    tokens, weights = np.arange(5), np.ones(5, np.float32)
    print_of = lambda *sample: data.fingerprint([sample, None])
    assert print_of(tokens, weights) == print_of(tokens.copy(), weights.copy())
    assert len({print_of(tokens, weights), print_of(tokens[::-1].copy(), weights),
                print_of(tokens, weights * 0.5)}) == 3
    prints = set()
    for n in 2, 3:
        for shard in range(n):
            shards.save_shard(tmp_path / f"{shard:05d}.bin",
                            [np.arange(1001, dtype=np.uint16).tobytes()], 50_000, "bytes", 0)
        dataset, _ = datasets(f"--data={tmp_path}", "--context_len=100")
        prints.add(data.fingerprint(dataset))
        dataset.shards.sample = lambda index: tokens  # the first window may be the same
        prints.add(data.fingerprint(dataset))
    assert len(prints) == 4


# ---------------------------------------------------------------- niah.py: scores

def test_scores_are_shares_of_the_answers():
    """One of four answers found that is all of them, or none."""
    answers = ["1111111", "2222222", "Abc-4", "3333333"]
    # substrings, in any case of letters
    assert niah.score_ruler("1111111 and 12222222, abc-4", answers) == 0.75
    # exact pieces
    assert niah.score_paper("1111111, 12222222,abc-4 , Abc-4,3333333.", answers) == 0.5
    assert niah.score_paper("1111111,1111111,1111111,1111111", answers) == 0.25
    assert niah.score_ruler("", answers) == niah.score_paper("", answers) == 0


def test_tasks_are_rulers():
    """
    An easier task under RULER's name: fewer keys, values or questions, needles in one half of the
    text.
    """
    counts = {name: (task.short, task.haystack, task.keys, task.values, task.n_keys, task.n_values,
                     task.n_queries) for name, task in niah.TASKS.items()}
    assert counts == {
        "niah_single_1": ("S-1", "noise", "words", "numbers", 1, 1, 1),
                      "niah_single_2": ("S-2", "essay", "words", "numbers", 1, 1, 1),
        "niah_single_3": ("S-3", "essay", "words", "uuids", 1, 1, 1),
                      "niah_multikey_1": ("MK-1", "essay", "words", "numbers", 4, 1, 1),
        "niah_multikey_2": ("MK-2", "needle", "words", "numbers", 1, 1, 1),
                      "niah_multikey_3": ("MK-3", "needle", "uuids", "uuids", 1, 1, 1),
        "niah_multivalue": ("MV", "essay", "words", "numbers", 1, 4, 1),
                      "niah_multiquery": ("MQ", "essay", "words", "numbers", 4, 1, 4)}
    # as RULER writes it
    assert niah.DEPTHS == np.linspace(0, 100, num=40, endpoint=True).round().astype(int).tolist()


def test_no_two_keys_or_values_of_a_sample_are_equal(monkeypatch):
    """A question with two right answers, of which a model may give either."""
    monkeypatch.setattr(niah, "draw_text", lambda kind, rng: rng.choice("abcde"))
    for seed in range(20):
        used = {"a", "e"}
        assert sorted(niah.draw_distinct("words", 3, random.Random(seed), used)) == ["b", "c", "d"]
        assert used == set("abcde")


def test_prompts_are_known_by_all_of_them():
    """
    100 samples beside 200 of the same seed; the same prompts in another order, whose answers would
    be another's.
    """
    a, b = examples_of(1, 2)
    assert len({niah.prompt_hash(some) for some in ([a], [b], [a, b], [b, a], [a, a])}) == 5
    assert niah.prompt_hash([a, b]) == niah.prompt_hash([a, b])


# ---------------------------------------------------------------- infra/runlog.py: log.jsonl, train.json

def a_log(folder, done=0, before=None, rank=0, **changes):
    given = dict(of_pass={"arl": 3e9, "dense": 6e9}, peak=1e10, tokens=120) | changes
    return runlog.Log(folder, rank, done, before=before or {"seconds": 0.0, "skipped": 0}, **given)


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_a_line_of_the_log_by_hand(tmp_path):
    """
    MFU doubled; a pass's loss, norm or seconds under the other's name; tokens a second of one pass
    alone.
    """
    log = a_log(tmp_path)
    log.add({"step": 3, "lr": 0.5}, numbers(7.0, 5.0, 0.25, 2.0, 0), [10.0, 12.0, 16.0])
    (entry, bad), = log.tell()[0]
    assert bad == 0 and 0 <= entry.pop("seconds") < 60
    assert entry == {"step": 3, "lr": 0.5, "tokens": 360, "arl_loss": 7.0, "loss": 5.0,
                     "arl_grad_norm": 0.25, "grad_norm": 2.0, "arl_seconds": 2.0,
                     # 120 / 6; 9e9 / 6 / 1e10
                     "dense_seconds": 4.0, "tokens_per_second": 20, "mfu": 0.15, "skipped": 0}
    log.write(entry)
    assert json.loads((tmp_path / "log.jsonl").read_text()) == entry == log.close()
    unknown = a_log(tmp_path, peak=None, of_pass={"joint": 1.0, "dense": 2.0})
    unknown.add({"step": 1}, numbers(7.0, 5.0, 0.25, 2.0, 0), [10.0, 12.0, 16.0])
    (entry, _), = unknown.tell()[0]
    assert "mfu" not in entry
    assert (entry["joint_loss"], entry["joint_grad_norm"], entry["joint_seconds"],
            entry["loss"]) == (7.0, 0.25, 2.0, 5.0)


def test_skipped_passes_are_counted_and_three_steps_in_a_row_end_the_run(tmp_path):
    """
    A count that starts anew after a resume, or counts steps; a run that goes on for days, or ends
    for three bad steps a week apart.
    """
    nan, log = math.nan, a_log(tmp_path, before={"seconds": 0.0, "skipped": 10})
    for step, (a, b) in enumerate([(1, nan), (nan, nan), (1, 1), (nan, 1), (math.inf, 1), (1, 1),
                                   (1, nan), (1, nan)], start=1):
        log.add({"step": step}, numbers(1.0, nan if b != b else 1.0, a, b, 0), [0.0, 1.0, 2.0])
    told, stops = log.tell(keep=1)
    assert len(told) == 7
    assert not stops
    assert [entry["skipped"] for entry, _ in told] == [11, 13, 13, 14, 15, 15, 16]
    assert [bad for _, bad in told] == [1, 2, 0, 1, 1, 0, 1] and log.hopeless is None
    first = told[0][0]
    assert first["loss"] is None and first["grad_norm"] is None and first["arl_loss"] == 1.0
    log.add({"step": 9}, numbers(1.0, 1.0, 1.0, nan, 1), [0.0, 1.0, 2.0])
    told, stops = log.tell()
    assert [entry["step"] for entry, _ in told] == [8, 9]
    assert stops
    assert log.hopeless == 9
    assert log.skipped == 18


def test_a_batch_that_counts_nothing_is_no_divergence(tmp_path):
    """
    0 / 0 told as passes skipped, or as a loss; a run that such batches end, or one that they keep
    from its end.
    """
    nan, log = math.nan, a_log(tmp_path)
    for step, (weight_sum, norm) in enumerate([(0.0, nan), (5.0, nan), (5.0, nan), (0.0, nan),
                                               (5.0, nan)], start=1):
        log.add({"step": step}, numbers(nan, nan, norm, norm, 0), [0.0, 1.0, 2.0], weight_sum)
    told = log.tell()[0]
    assert [bad for _, bad in told] == [None, 2, 2, None, 2]
    assert [entry["skipped"] for entry, _ in told] == [0, 2, 4, 4, 6]
    assert log.hopeless == 5
    assert all(entry["loss"] is entry["grad_norm"] is None for entry, _ in told)


def test_the_log_goes_on_behind_the_checkpoint(tmp_path, monkeypatch):
    """Lines of steps that were lost, or seconds that begin at nought again."""
    clock = [1000.0]
    monkeypatch.setattr(runlog.time, "time", lambda: clock[0])
    (tmp_path / "log.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in (1, 2, 3)))
    assert a_log(tmp_path, done=2, rank=1).close() == {}
    log = a_log(tmp_path, done=2, before={"seconds": 50.0, "skipped": 0})
    clock[0] += 7.5
    log.add({"step": 3}, numbers(1, 1, 1, 1, 0), [0.0, 1.0, 2.0])
    assert log.seconds() == 57.5 and log.tell()[0][0][0]["seconds"] == 57.5
    log.write({"step": 3, "again": True})
    log.close()
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert lines == ['{"step": 1}', '{"step": 2}', '{"step": 3, "again": true}']
    a_log(tmp_path).close()
    assert (tmp_path / "log.jsonl").read_text() == ""


def test_a_record_by_hand(monkeypatch):
    """
    A speed of the fastest step, or of the first, which compiles; an MFU of one pass or of one GPU's
    peak.
    """
    log = SimpleNamespace(tokens=120, of_pass={"arl": 3e9, "dense": 6e9}, peak=1e10, skipped=4,
                          seconds=lambda: 99.5)
    args = SimpleNamespace(device="cpu", lr=0.5)
    told = runlog.record_of(args, 30, log, [50.0, 3.0, 2.0, 2.5, 4.0], SimpleNamespace(world=8),
                            "c0ffee", "print", {"from": {"step": 1}})
    wanted = {"step": 30, "settings": {"device": "cpu", "lr": 0.5}, "commit": "c0ffee",
              "processes": 8, "torch": torch.__version__, "seconds": 99.5,
              "step_seconds": 3.0, "tokens_per_second": 40, "mfu": 0.3, "skipped": 4,
              "first_sample": "print", "from": {"step": 1}}
    assert {key: told[key] for key in wanted} == wanted
    log.peak = None
    assert runlog.record_of(args, 30, log, [1.0], SimpleNamespace(world=1), "", "",
                            {"from": None})["mfu"] is None


def test_a_gpus_milliseconds_are_seconds():
    """Tokens a second that are a thousand times too many."""
    event = SimpleNamespace(elapsed_time=lambda end: end)
    assert runlog.seconds_between(event, 2500.0) == 2.5 and runlog.seconds_between(1.5, 4.0) == 2.5


def made_run(folder, flags, step, **more):
    """A run of train.py as runs.py sees it: its newest checkpoint's train.json."""
    settings = train.parse(flags)
    (folder / "step_0000001").mkdir(parents=True)
    (folder / "step_0000001" / "config.json").write_text("{}")
    told = {"settings": vars(settings), "step": step, "first_sample": "s", "from": None} | more
    (folder / "step_0000001" / "train.json").write_text(json.dumps(told))
    return settings


@pytest.mark.parametrize("flag", ["--lr=0.5", "--seed=7", "--batch=8", "--steps=9", "--arl=8",
                                  "--drills=0.25", "--other_weight=0.5", "--protocol=sft",
                                  "--warmup=0.25", "--weight_decay=0.5", "--min_lr=1e-5",
                                  "--memory_lr=0.5", "--clip=2", "--many=0.25",
                                  "--context_len=1024",
                                  "--tasks=niah_single_1", "--memory=off"])
def test_a_run_does_not_go_on_with_other_flags(flag, tmp_path, monkeypatch):
    """The first half of a run at one rate, the second at another, in one row of a table."""
    monkeypatch.chdir(tmp_path)
    flags = ["--preset=pico", "--memory=on", "--batch=4", "--device=cpu"]
    settings = made_run(tmp_path / "run", flags, 5)
    assert runlog.step_of(tmp_path / "run" / "step_0000001", "run", settings) == 5
    with pytest.raises(ValueError, match=flag.split("=")[0]):
        runlog.step_of(tmp_path / "run" / "step_0000001", "run", train.parse([*flags, flag]))


# ---------------------------------------------------------------- runs.py

def test_a_run_is_finished_after_its_last_step(tmp_path, monkeypatch):
    """A half-trained model in a table; hours of training done again."""
    monkeypatch.chdir(tmp_path)
    flags = ["--preset=pico", "--memory=on", "--steps=20", "--device=cpu"]
    assert not runs.finished(tmp_path / "none", flags)
    for step, finished in (19, False), (20, True):
        made_run(tmp_path / f"at{step}", flags, step)
        assert runs.finished(tmp_path / f"at{step}", flags) == finished
    with pytest.raises(ValueError, match="--lr"):
        runs.finished(tmp_path / "at20", [*flags, "--lr=0.5"])


def test_a_run_is_finished_only_of_the_model_that_is_there_now(tmp_path, monkeypatch):
    """Fine-tuning of a pretraining that was done again since, in a table beside the new one's."""
    monkeypatch.chdir(tmp_path)
    flags = ["--init=first", "--steps=20", "--device=cpu"]
    made = {"settings": {}, "made": 1}
    monkeypatch.setattr(runlog, "training_record", lambda path: made)
    made_run(tmp_path / "same", flags, 20, **{"from": made})
    assert runs.finished(tmp_path / "same", flags)
    for name, source in ("older", {"settings": {}, "made": 0}), ("unknown", None):
        made_run(tmp_path / name, flags, 20, **{"from": source})
        with pytest.raises(ValueError, match="did not start from"):
            runs.finished(tmp_path / name, flags)
    made = None  # what it started from is gone, or tells nothing
    with pytest.raises(ValueError, match="did not start from"):
        runs.finished(tmp_path / "unknown", flags)


def test_results_of_other_prompts_are_refused():
    """100 samples beside 200 in one mean."""
    runs.refuse_other_prompts({"a.json": {"S": "1", "T": "2"}}, {"T": "2", "S": "1"})
    for theirs in {"S": "1"}, {"S": "1", "T": "3"}, {"S": "1", "T": "2", "U": "3"}:
        with pytest.raises(ValueError, match="b.json was asked other prompts"):
            runs.refuse_other_prompts({"a.json": {"S": "1", "T": "2"}, "b.json": theirs},
                               {"S": "1", "T": "2"})


def test_two_stages_by_hand():
    """Fine-tuning with ARL, from scratch, or with one seed for all."""
    found = runs.stages(Path("out/x-7"), ["--recipe=micro", "--memory=on"], 7, ["--lr=0.5"])
    assert found == {
        Path("out/x-7-pretrained"): ["--recipe=micro", "--memory=on", "--lr=0.5", "--seed=7",
                                     "--out=out", "--name=x-7-pretrained", "--resume"],
        Path("out/x-7"): ["--recipe=micro-sft", "--lr=0.5", "--seed=7", "--init=out/x-7-pretrained",
                          "--arl=0", "--joint=0", "--out=out", "--name=x-7",
                          "--resume"]}
    assert list(found) == [Path("out/x-7-pretrained"), Path("out/x-7")]  # in this order


def test_each_gpu_has_its_share_of_jobs(monkeypatch, tmp_path):
    """All runs on the first GPU, whose tokens a second then mean little."""
    seen = []

    class Process:
        def __init__(self, command, env, **_):
            seen.append(env["CUDA_VISIBLE_DEVICES"])

        def wait(self):
            return 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    monkeypatch.setattr(runs.subprocess, "Popen", Process)
    meet = runs.threading.Barrier(4)
    job = lambda call: (meet.wait(30), call(["train.py"], tmp_path / "log"))
    runs.on_all_gpus([job] * 4, per_gpu=2)
    assert sorted(seen) == ["2", "2", "5", "5"]


# ---------------------------------------------------------------- answers.py

def examples_of(*lengths):
    return [SimpleNamespace(ids=[0] * n, prompt=f"{n}", keys_from="words", haystack_from="text")
            for n in lengths]


def test_batches_are_of_similar_length():
    """Padding by half a batch; an example that is asked twice, or never."""
    examples = examples_of(50, 10, 40, 20, 30)
    assert answers.by_length(examples, 2) == [[1, 3], [4, 2], [0]]
    assert answers.by_length(examples, 9) == [[1, 3, 4, 2, 0]]
    assert answers.by_length(examples_of(5, 5, 5), 2) == [[0, 1], [2]]


def test_what_is_missing_is_asked_and_nothing_else():
    """
    An answer of another task or model taken for this one's; a method added later that is asked of
    half the examples.
    """
    examples = {"a": {"S": examples_of(3, 1, 2)}, "b": {"S": examples_of(1)}}
    there = {("a", "S", "dense"): {0: "", 1: ""}, ("a", "S", "quest"): {1: "", 2: "", 0: ""},
             ("b", "T", "dense"): {0: ""}}
    left = list(answers.unanswered(examples, ["dense", "quest"], 2, there))
    assert left == [("a", "S", [1, 2], {"dense": [2]}),
                    ("b", "S", [0], {"dense": [0], "quest": [0]})]
    assert list(answers.unanswered(examples, ["quest"], 2,
                                   there)) == [("b", "S", [0], {"quest": [0]})]


def test_lines_are_read_once_each(tmp_path):
    """
    Hits of a batch that two runs wrote, counted twice; a line cut off by a kill; one that a disk
    has changed.
    """
    told = lambda text: {"text": text, "read": 1.0, "prompt_read": None, "seconds": 0.5}
    line = lambda examples, text, method="dense": answers.Line("a", "S", method, examples,
                                                               told(text))
    of_0 = [line([0], "zero"), line([3, 4], "batch", "H1 dense"), line([0], "again")]
    of_1 = [line([0], "two runs at once"), line([4, 5], "overlaps", "H1 dense"), line([1], "one")]
    for rank, lines in (0, of_0), (1, of_1):
        (tmp_path / f"answers-{rank}.jsonl").write_bytes(b"".join(map(answers.written, lines))
                                                         + b'{"checkpoint": "a')
    found = answers.read_lines(tmp_path)
    assert found == {("a", "S", "dense"): {0: of_0[0], 1: of_1[2]},
                     ("a", "S", "H1 dense"): {3: of_0[1], 4: of_0[1]}}
    (tmp_path / "answers-0.jsonl").write_bytes(answers.written(of_0[0]).replace(b"zero", b"hero"))
    with pytest.raises(ValueError, match="line 1 is damaged"):
        answers.read_lines(tmp_path)


@pytest.fixture
def asked(tmp_path):
    """Arguments of refuse_other_questions for two models, of which a folder holds answers."""
    for name in "a", "b":
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(name)
        (tmp_path / name / "model.bin").write_text(name)
    args = SimpleNamespace(out=str(tmp_path / "out"), samples=2, seed=0, context_len=64,
                           max_new_tokens=8, protocol="base", haystack=None, jsonl=None,
                           dtype="float32", kernels="auto", words="built-in")
    (tmp_path / "out").mkdir()
    labels = {name: str(tmp_path / name) for name in ("a", "b")}
    of_both = lambda *prompts: {name: {task: examples_of(n) for task, n in zip("ST", prompts)}
                                for name in labels}
    names = lambda name="bytes": dict.fromkeys(labels, SimpleNamespace(name=name))
    answers.refuse_other_questions(args, labels, names(), of_both(1, 2), niah.prompt_hash,
                          {"command": "first"})
    (tmp_path / "out" / "answers-0.jsonl").write_text("some")
    return args, labels, names, of_both


def test_answers_of_other_questions_or_models_are_refused(asked, tmp_path):
    """One table of two evaluations; a model trained again under its old name."""
    args, labels, names, of_both = asked

    def again(args=args, labels=labels, names=names(), prompts=of_both(1, 2), call="second"):
        answers.refuse_other_questions(args, labels, names, prompts, niah.prompt_hash,
                              {"command": call})
    again(), again(), again(call="third")
    calls = files.load(tmp_path / "out" / "asked.json")["calls"]
    assert [call["command"] for call in calls] == ["first", "second", "third"]
    for key, value in dict(samples=3, seed=1, context_len=65, max_new_tokens=9, protocol="sft",
                           haystack="x", jsonl=["x"], dtype="bfloat16", kernels="torch").items():
        with pytest.raises(ValueError, match=f"--{key} was"):
            again(args=SimpleNamespace(**vars(args) | {key: value}))
    for more, words in (({"prompts": of_both(1, 3)}, "asked in T"),
                        ({"prompts": of_both(1)}, "--tasks"),
                        ({"names": names("other")}, "--tokenizer"),
                        ({"labels": {"b": labels["a"], "a": labels["b"]}}, "--ckpt"),
                        ({"labels": {"a": labels["a"]}}, "--ckpt")):
        with pytest.raises(ValueError, match=words):
            again(**more)
    for file, text in ("model.bin", "c"), ("config.json", "c"), ("model-2.bin", ""):
        before = (tmp_path / "b" / file).read_text() if (tmp_path / "b" / file).exists() else None
        (tmp_path / "b" / file).write_text(text)
        with pytest.raises(ValueError, match="--ckpt b .a hash"):
            again()
        (tmp_path / "b" / file).write_text(before or "")
        if before is None:
            (tmp_path / "b" / file).unlink()
    again()
    (tmp_path / "out" / "answers-0.jsonl").write_text("")  # nothing was answered: no one is bound
    again(args=SimpleNamespace(**vars(args) | {"seed": 1}))


# ---------------------------------------------------------------- train.py: the loop's bookkeeping

def test_learning_rate_by_hand():
    """Another schedule under the paper's name."""
    args = SimpleNamespace(steps=10, warmup=0.2, lr=2.0, min_lr=0.2)
    rate = [train.learning_rate(step, args) for step in range(10)]
    assert rate[:4] == pytest.approx([0.5, 1.0, 1.0, 0.1 + 0.45 * (1 + math.cos(math.pi / 8))])
    assert rate[6] == pytest.approx(0.55)
    assert rate[9] == pytest.approx(0.1 + 0.45 * (1 + math.cos(7 * math.pi / 8)))
    args = SimpleNamespace(steps=4, warmup=0.0, lr=1.0, min_lr=0.0)
    assert [train.learning_rate(step, args)
            for step in range(4)] == pytest.approx([1, 0.5 + 0.5 * math.sqrt(0.5), 0.5,
                                                    0.5 - 0.5 * math.sqrt(0.5)])


class Alone(Processes):
    """One of several processes, whose sums are its own."""

    def sum(self, tensor):
        return tensor


def held_out(n=9, T=16):
    """Samples of random tokens, whose weights are 0, 0.1 or 1."""
    drawn = torch.Generator().manual_seed(0)
    return [(torch.randint(61, (T + 1,), generator=drawn),
             torch.tensor([0, 0.1, 1.0])[torch.randint(3, (T + 1,), generator=drawn)])
            for _ in range(n)]


def by_hand(model, some):
    """Loss and share of right ones, of the tokens of weight 1, one by one."""
    losses, right = [], []
    with torch.no_grad():
        for tokens, weight in some:
            for t in range(1, len(tokens)):
                if weight[t] == 1:
                    logits = model(tokens[None, :t])[0, -1].double()
                    losses.append((logits.logsumexp(0) - logits[tokens[t]]).item())
                    right.append((logits.argmax() == tokens[t]).item())
    return {"val_loss": pytest.approx(sum(losses) / len(losses), rel=1e-5),
            "val_accuracy": pytest.approx(sum(right) / len(right))}


def test_validation_counts_the_answers_alone():
    """
    A validation loss of all tokens with a weight, of a sample twice, or of a batch's mean; accuracy
    of weights instead of tokens.
    """
    model, dataset, nothing = tiny(seed=2), held_out(), train.nullcontext()
    for tokens, weight in dataset[:3]:  # some that the model gets right
        weight[-1] = 1
        tokens[-1] = model(tokens[None, :-1])[0, -1].argmax()
    validate = lambda samples, rows, processes=Processes(): train.validate(
        model, dataset, SimpleNamespace(device="cpu",
                                        device_batch=rows), None, nothing, processes, samples)
    assert by_hand(model, dataset[:5])["val_accuracy"].expected > 0
    for rows in 2, 5, 16:
        assert validate(5, rows) == by_hand(model, dataset[:5])
    assert validate(5, 2, Alone(0, 2)) == by_hand(model, dataset[:3])
    assert validate(5, 2, Alone(1, 2)) == by_hand(model, dataset[3:5])


def test_memory_lengths_are_medians_of_each_layer():
    """A mean that a few endless channels decide, or one layer's number for all."""
    model, dataset = tiny(memory=True), held_out()
    found = train.validate(model, dataset, SimpleNamespace(device="cpu", device_batch=3), None,
                           train.nullcontext(), Processes(), 5)["memory_lengths"]
    gates = []

    def look(memory, inputs):
        gates.append(memory.gate(inputs[0]))
    for layer in model.layers:
        layer.self_attn.memory.register_forward_pre_hook(look)
    with torch.no_grad():
        model(torch.stack([tokens[:-1] for tokens, _ in dataset[:3]]))
    assert found == [round(effective_length(gate).median().item(), 2) for gate in gates]
    assert len(set(found)) == 2


def test_a_batchs_loss_is_that_of_its_weights(monkeypatch):
    """
    A loss of the last part alone, or a mean of parts that hold unlike many answers; a gradient that
    is an average over processes.
    """
    model, (a, b, c) = tiny(seed=1), held_out(3)
    parts = [(torch.stack([a[0], b[0]]), torch.stack([a[1], b[1]])), (c[0][None], c[1][None])]
    weight_sum = sum(weight[:, 1:].sum() for _, weight in parts)
    updates = []
    monkeypatch.setattr(parallel, "update",
                        lambda optimizer, norm, clip: updates.append((norm.item(), clip)))
    loss_of = parallel.Loss(model, None, train.nullcontext(), False)
    loss, norm = parallel.one_pass(loss_of, model, None, parts, weight_sum, Processes(), "nothing",
                                   0.5)
    expected = 0.0
    for tokens, weight in parts:
        logits = model(tokens[:, :-1]).double().log_softmax(-1)
        right = logits.gather(-1, tokens[:, 1:, None]).squeeze(-1)
        expected -= (right * weight[:, 1:]).sum() / weight_sum
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert updates == [(norm.item(), 0.5)]
    gradient = torch.autograd.grad(expected, list(model.parameters()))
    assert norm.item() == pytest.approx(math.sqrt(sum(g.square().sum().item() for g in gradient)),
                                        rel=1e-4)
    model.zero_grad()
    assert parallel.one_pass(loss_of, model, None, parts, weight_sum, Alone(0, 2), "nothing",
                             0.5)[1].item() == pytest.approx(2 * norm.item(), rel=1e-5)


@pytest.mark.parametrize("norm", [math.inf, math.nan])
def test_an_infinite_norm_is_skipped_too(norm):
    """A pass that is told as skipped, and has changed weights or moments."""
    model = tiny()
    optimizer = train.make_optimizer(model, arguments())
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    parallel.update(optimizer, torch.tensor(norm), 1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    assert all(state["step"] == 0 for state in optimizer.state.values())


@pytest.fixture
def told(tmp_path, monkeypatch):
    """
    train.train with these flags and a device whose peak is 1e9 FLOPs a second: (lines of the log,
    the record, what is printed).
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(PRESETS, "pico",
                        Config(257, n_layer=1, width=16, n_head=2, n_kv_head=2, mlp_width=16,
                               context_len=512, eos_id=256))
    monkeypatch.setattr(cost, "peak_flops", lambda name: 1e9)

    def run(*flags):
        path, _ = train.train(arguments("--batch=2", "--arl=16", "--log_every=1", "--eval_every=3",
                                        "--save_every=4", "--drills=0.5", "--other_weight=0.25",
                                        *flags))
        lines = Path("out/pico/log.jsonl").read_text().splitlines()
        return list(map(json.loads, lines)), path and json.loads((path / "train.json").read_text())
    return run


def test_a_run_by_hand(told, monkeypatch, capsys):
    """Every field of log.jsonl and train.json that a table quotes, of a run of four steps."""
    validate, update, sample = train.validate, parallel.update, niah.Needles.__getitem__
    validated, rates, seen = [], [], []
    monkeypatch.setattr(train, "validate",
                        lambda *given: validated.append(given) or validate(*given))
    monkeypatch.setattr(parallel, "update",
                        lambda optimizer,
                        *given: rates.append([group["lr"] for group in optimizer.param_groups])
                        or update(optimizer, *given))
    monkeypatch.setattr(niah.Needles, "__getitem__",
                        lambda self, index: seen.append((self.seed, index)) or sample(self, index))
    log, made = told("--lr=0.01", "--memory_lr=0.03", "--min_lr=0.001", "--warmup=0.5")
    config = replace(PRESETS["pico"], memory=True)
    flops = 2 * 512 * (cost.flops_per_token(config, 16) + cost.flops_per_token(config, 256))
    scales = [0.5, 1.0, 1.0, 0.1 + 0.45]
    # both passes
    assert rates == [pytest.approx([0.01 * scale, 0.03 * scale]) for scale in scales
                     for _ in range(2)]
    for row, scale in zip(log, scales, strict=True):
        seconds = row["arl_seconds"] + row["dense_seconds"]
        assert row["lr"] == pytest.approx(0.01 * scale)
        assert row["memory_lr"] == pytest.approx(0.03 * scale)
        assert row["tokens"] == row["step"] * 1024
        assert row["tokens_per_second"] == pytest.approx(1024 / seconds, rel=0.02)
        assert row["mfu"] == pytest.approx(flops / seconds / 1e9, rel=0.02)
        assert ("val_loss" in row) == (row["step"] in (3, 4)) and row["skipped"] == 0
    assert [row["step"] for row in log] == [1, 2, 3, 4]
    assert [row["seconds"] for row in log] == sorted(row["seconds"] for row in log)
    assert made["tokens_per_second"] == pytest.approx(1024 / made["step_seconds"], rel=0.02)
    assert made["step"] == 4
    assert made["mfu"] == pytest.approx(flops / made["step_seconds"] / 1e9, rel=0.02)
    # trained on two samples a step; validated twice, by 64 that are held out, of which answers
    # alone count, through dense attention
    assert {index for seed, index in seen if seed == 0} == set(range(8))
    assert Counter(index for seed, index in seen if seed == "val-0") == Counter([*range(64)] * 2)
    _, dataset, _, method, *_ = validated[0]
    assert method is None and dataset.args.other_weight == 0.0
    said = capsys.readouterr().out
    last, second = log[3], log[1]
    assert f"validation {last['val_loss']:.3f}, {last['val_accuracy']:.1%} of answer tokens" in said
    assert (f"step     2  loss {second['loss']:.3f}  arl {second['arl_loss']:.3f}  "
            f"lr {second['lr']:.1e}  norm {second['grad_norm']:.2f}") in said
    assert f"{made['tokens_per_second']:,} tokens/s, MFU {made['mfu']:.1%}" in said


@pytest.mark.parametrize("flags, name", [([], "arl_loss"), (["--arl=0"], "loss"),
                                         (["--arl=0", "--device_batch=1"], "loss")])
def test_the_first_loss_is_that_of_a_new_model(flags, name, told):
    """A loss per sample instead of per token's weight; ARL's under the dense pass's name."""
    args = arguments("--batch=2", "--arl=16", "--drills=0.5", "--other_weight=0.25", *flags)
    log, _ = told("--save_every=0", "--eval_every=0", "--steps=2", *flags)
    model, dataset = parallel.make_model(Transformer, *train.what_to_train(args),
                                         args), data.make_data(args, Bytes(), niah.Needles)[0]
    tokens, weight = (torch.stack([torch.as_tensor(dataset[index][part]) for index in (0, 1)])
                      for part in (0, 1))
    with torch.no_grad():
        logits = model(tokens[:, :-1],
                       sparse=next(iter(train.passes_of(args).values()))[0]).double()
    each = -logits.log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    expected = (each * weight[:, 1:]).sum() / weight[:, 1:].sum()
    assert log[0][name] == pytest.approx(expected.item(), rel=1e-5)


def test_validation_is_told_of_its_step(told):
    """A validation in the line of an earlier step, whose numbers were waited for until then."""
    log, _ = told("--log_every=1000", "--save_every=0")
    assert [row["step"] for row in log if "val_loss" in row] == [3, 4]


def test_the_lesson_tells_the_numbers_of_its_log(monkeypatch, capsys, tmp_path):
    """The dense loss told as the memory's, or the first step's as the last ten's."""
    def write(args):
        run = Path(args.out) / args.name
        run.mkdir(parents=True)
        of_arl = [7.25, *range(2, 41)]
        lines = [json.dumps({"loss": 0.5, "arl_loss": float(loss)}) + "\n" for loss in of_arl]
        (run / "log.jsonl").write_text("".join(lines))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "train", write)
    monkeypatch.setattr(eval_niah, "main", lambda argv: None)
    train.lesson()
    said = capsys.readouterr().out
    assert ("one entry in 64 (ARL): 7.25 at the first step, 35.50 over the last ten. "
            "That took 163,840 tokens, of the 39,321,600 of the recipe") in said


def test_a_steps_seconds_are_its_own(told, monkeypatch):
    """A speed that counts validation and checkpoints, or does not count waiting for data."""
    later, validate, batches = [0.0], train.validate, train.batches
    save = train.checkpoint.Saver.save

    def takes(seconds, what):
        later[0] += seconds
        return what
    clock = SimpleNamespace(time=lambda: time.time() + later[0], perf_counter=time.perf_counter)
    monkeypatch.setattr(train, "time", clock)
    monkeypatch.setattr(runlog, "time", clock)
    waits = iter([500, 100, 200, 300])
    monkeypatch.setattr(train, "batches",
                        lambda *given: (takes(next(waits), batch) for batch in batches(*given)))
    monkeypatch.setattr(train, "validate", lambda *given: takes(1000, validate(*given)))
    monkeypatch.setattr(train.checkpoint.Saver, "save", lambda *given: takes(1000, save(*given)))
    log, made = told("--eval_every=1", "--save_every=1")
    assert 250 <= made["step_seconds"] < 270
    assert made["seconds"] > 1100 + 7 * 1000  # the last checkpoint does not count its own time
    assert [row["wait_seconds"] // 100 for row in log] == [5, 1, 2, 3]


def test_mfu_is_of_all_gpus(told, monkeypatch):
    """An MFU of eight GPUs by the peak of one."""
    class Two(Alone):
        def __init__(self):
            super().__init__(0, 2)

        def least(self, number):
            return number

    class Joined(Two):
        __enter__, __exit__ = lambda self: Two(), lambda *_: None
    monkeypatch.setattr(train.parallel, "join", lambda device: Joined())
    monkeypatch.setenv("WORLD_SIZE", "2")
    log, _ = told("--save_every=0", "--eval_every=0")
    config = replace(PRESETS["pico"], memory=True)
    flops = 2 * 512 * (cost.flops_per_token(config, 16) + cost.flops_per_token(config, 256))
    for row in log:
        seconds = row["arl_seconds"] + row["dense_seconds"]
        assert row["mfu"] == pytest.approx(flops / seconds / 2e9, rel=0.02)
        assert row["tokens_per_second"] == pytest.approx(1024 / seconds, rel=0.02)


def test_what_is_printed_of_a_step_by_hand():
    """
    Minutes left of the batch instead of the run; a speed of the steps before a change of speed, for
    ever.
    """
    args = SimpleNamespace(batch=4, context_len=250, steps=130)
    entry = {"step": 10, "loss": 1.2345, "arl_loss": None, "lr": 0.001, "grad_norm": 0.5,
             "mfu": 0.451, "val_loss": 0.5, "val_accuracy": 0.987}
    line = watch.line_of(entry, {"arl": None, "dense": None}, [9.0] * 150 + [2.0] * 100, args,
                         "tokens")
    assert line == ("step    10  loss 1.234  arl none  validation 0.500, 98.7% of tokens right  "
                    # 120 steps of 2 s
                    "lr 1.0e-03  norm 0.50  500 tokens/s  MFU 45.1%  4.0 min left")
    assert watch.line_of(entry, {"dense": None}, [100.0], args,
                         "tokens").endswith("10 tokens/s  MFU 45.1%  3.3 h left")
