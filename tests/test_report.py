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

import data
import mutants
import niah
import train
from experiments import runs
from infra import answers, cost, parallel, runlog, shards, watch
from infra.parallel import Processes
from memory import effective_length
from model import PRESETS, Config, Transformer


def changed(args, **changes):
    return SimpleNamespace(**vars(args) | changes)


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
PER_TOKEN = 6 * (2 * OF_LAYER + 88)  # 2 a parameter forward and 4 backward, but for the embedding


def test_flops_are_those_counted_by_hand():
    """Backward forgotten, an embedding that is only looked up, attention that reads the future."""
    assert cost.parameters(HAND) == (2 * OF_LAYER + 168, OF_LAYER, 168)
    # of each entry read, q k and p v: 2 x 2 x 8 forward
    assert cost.flops_per_token(HAND, 16) == PER_TOKEN + 3 * 2 * (2 * 2 * 8) * 16
    # one matrix, still multiplied once
    assert cost.flops_per_token(replace(HAND, tied=True), 16) == cost.flops_per_token(HAND, 16)


def test_bytes_are_those_counted_by_hand():
    """A prediction of memory that is off, by less than the 3 % that measured peaks allow."""
    def needs(world=1, tokens=5, config=HAND, **more):
        return cost.needs(config, world, tokens, **more)
    # 5 tokens: of a layer 10 vectors of 8 (four of the block, three of q, three of k and v) and 3
    # of 12, two bytes each: 232 a token. Logits and their gradient, 50 each; the head's gradient;
    # three of x's size
    expected = {"weights and moments": 12 * 1320, "gradients": 4 * 1320 - 2320 - 600,
                "activations": 5 * 2 * 232, "loss": 2 * 2 * 50 + 2 * 80 + 3 * 2 * 5 * 8,
                "gathered": 2 * 1320}
    assert needs(stays="weights") == expected
    assert needs(world=4) == expected | {"weights and moments": 3 * 1320, "gradients": 0,
                                         "gathered": 2 * (2 * OF_LAYER + 168)}
    of_all = 5 * 2 * 2 * (10 * 8 + 2 * 12)  # without the third matrix of SwiGLU
    for changes, what, by_hand in (
            (dict(world=2, parts=2, stays="all"), "gradients", 4 * 1320),
            (dict(world=2, parts=2), "gradients", 4 * 1320 / 2),
            # one layer's all, the other's input; then also of the one that backward is at
            (dict(recompute=1), "activations", 5 * (232 + 2 * 8)),
            (dict(recompute=2), "activations", 5 * (232 + 2 * 2 * 8)),
            (dict(small=True), "activations", 5 * 2 * (232 + 2 * 4 * 8)),
            (dict(small=True), "gathered", 0),
            (dict(width=4, stays="weights"), "gathered", 0),  # fp32: nothing is made of the weights
            (dict(config=replace(HAND, swiglu=False)), "activations", of_all),
            # two chunks of logits, and the head's gradient in fp32 beside one in bf16
            (dict(config=replace(HAND, vocab_size=2**20), tokens=1024), "loss",
             4 * 2**29 + 8 * 2**23 + 6 * 1024 * 8)):
        assert needs(**changes)[what] == by_hand, changes
    memory = dict(memory=True)
    for changes, vectors in (({}, 10), (dict(qk_norm=False), 8), (dict(n_kv_head=1), 7 + 3 / 2),
                             (memory, 5 + 3 + 6), (memory | dict(pre_norm=True), 4 + 3 + 6),
                             (memory | dict(pre_norm=True, qk_norm=False), 4 + 2 + 5),
                             (dict(output_gate=True), 12)):
        assert cost.per_width(replace(HAND, **changes)) == vectors, changes


def test_room_is_nine_tenths_of_what_is_there(monkeypatch):
    """A run that is told to fit and does not; processes that each take all of a machine."""
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
    _, steps, flops, room = cost.lines(replace(HAND, memory=True), plan, args,
                                       {"arl": 1e15, "dense": 3e15}, 1e12, 4)
    assert "45 steps of 16 x 1000 = 16,000 tokens, 720K in all" in steps
    assert "4 processes x 2 parts, whose gradients add up, x 2 sequences" in steps
    assert flops == ("250GFLOP a token, 4PFLOP a step, 1.80e+17 in all, "
                     "about 28 hours at an MFU of 45%")  # 1.8e17 / (0.45 x 4e12) s
    of_memory = "4.0 GB of 5.0 GB (weights 3.0 GB, gradients 1.0 GB)"
    assert room == (f"GPU memory per process: {of_memory}; 1 of 2 layers compute their activations "
                    "anew; weights and gradients travel once a batch")
    _, steps, flops, room = cost.lines(HAND, replace(plan, recompute=0, device_batch=16),
                                       changed(args, arl=0, device="cpu"), {"dense": 1e15}, None, 1)
    assert steps.endswith("A step: dense pass, each of 1 process x 16 sequences")
    assert flops.endswith("4.50e+16 in all") and room == f"RAM per process: {of_memory}"


def test_passes_count_what_they_read():
    """ARL's FLOPs counted as dense ones, or a window's: an MFU too high."""
    settings = SimpleNamespace(batch=3, context_len=64, arl=0, joint=0, adapt=None)
    passes = lambda **changes: train.passes_of(changed(settings, **changes))
    adapted = lambda dilation: dict(adapt=f"dilated:dilation={dilation},local=4,initial=2")
    for changes, reads in (({}, {"dense": 32}), (dict(arl=8), {"arl": 4, "dense": 32}),
                           (dict(joint=16), {"joint": 16, "dense": 32}),
                           (dict(joint=64), {"joint": 32, "dense": 32}),
                           (adapted(8), {"dense": 4 + 4 + 2}), (adapted("none"), {"dense": 6.5}),
                           (adapted(1), {"dense": 32})):  # no more than all
        assert {name: n for name, (_, n) in passes(**changes).items()} == reads
    # what the patterns' masks really hold: to within the query's own entry; in a window the first
    # queries have less before them
    t = torch.arange(64)
    for changes, n, within in (dict(arl=8), 4, 1), (dict(joint=16), 16, 3):
        (method, _), (dense, _) = passes(**changes).values()
        assert abs(method.pattern(t[:, None], t).sum(-1).float().mean() - n) < within
        assert dense is None
    assert train.flops_of(changed(settings, arl=8), HAND) == {
        "arl": 3 * 64 * (PER_TOKEN + 192 * 4), "dense": 3 * 64 * (PER_TOKEN + 192 * 32)}


# ---------------------------------------------------------------- data.py, niah.py: what a run
# trains on and is validated by

TASKS = ["--context_len=512", "--tasks", "niah_single_1", "niah_single_2", "--device=cpu"]


def arguments(*flags):
    return train.parse(["--preset=pico", "--memory=on", *TASKS, "--steps=4", "--batch=4", *flags])


def datasets(*flags):
    """-> what a run of these flags trains on, and is validated by"""
    return data.make_data(arguments(*flags), Bytes(), niah.Needles)


def text_of(dataset, index):
    return Bytes().decode(dataset[index][0].tolist())


def test_samples_are_of_the_kinds_that_the_flags_say(monkeypatch):
    """Drills that are gone, or never end; many questions where --many=0 says none."""
    made = []
    for kind in "drill", "many_questions", "compose":
        make = getattr(niah, kind)
        monkeypatch.setattr(niah, kind, lambda *given, kind=kind, make=make, **more:
                            made.append(kind) or make(*given, **more))

    def kinds(dataset, n):
        made.clear()
        for index in range(n):
            dataset[index]
        return made
    training, validation = datasets("--drills=0.5", "--many=0.25")
    first, later = np.split(kinds(training, 308), [8])  # 2 of 4 steps of 4
    assert set(first) == {"drill"} and len(later) == 300
    assert abs((later == "drill").sum() - 90) < 32
    assert abs((later == "many_questions").sum() - 52) < 26  # 30 %, and 25 % of the rest: 4 sigma
    for dataset in validation, datasets()[0]:
        assert "drill" not in kinds(dataset, 60)
    for many, kind in (0, "compose"), (1, "many_questions"):
        assert set(kinds(datasets(f"--many={many}")[0], 12)) == {kind}


def test_training_validation_and_test_share_no_needle():
    """Validation by what was trained on, here or before --init; a test set that was."""
    continued = train.parse(["--recipe=micro-sft", "--init=x", *TASKS])
    runs = datasets(), datasets("--seed=1"), data.make_data(continued, Bytes(), niah.Needles)
    sets = [{value for index in range(40)  # all of seven digits
             for value in re.findall(r"is: (\d{7})\.", text_of(dataset, index))}
            for run in runs for dataset in run]
    sets += [{answer for index in range(40)
              for answer in niah.make_example(task, 1024, Bytes(), seed, index, split=split,
                                              max_new_tokens=48).answers}
             for task in ("niah_multivalue", "niah_multikey_3") for seed in (0, 1)
             for split in niah.SPLITS]
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
            for end in ends:
                answer = Bytes().decode(tokens[end - 7:end].tolist())
                assert re.fullmatch("[0-9]{7}", answer) and (weight[end - 7:end] == 1).all()


def test_tasks_protocol_and_haystack_are_those_of_the_flags(tmp_path):
    """A recipe for eight tasks trained on those that fit, or in the other protocol."""
    (tmp_path / "words.txt").write_text("Zebras yawn. " * 200)
    dataset, _ = datasets("--protocol=sft", "--many=0", f"--haystack={tmp_path / 'words.txt'}")
    texts = [text_of(dataset, index) for index in range(12)]
    essays = ["Zebras yawn" in text for text in texts]
    assert set(essays) == {True, False}  # of one of the two tasks
    for index, (text, essay) in enumerate(zip(texts, essays)):
        assert essay or "grass is green" in text
        assert re.search(r"^A special magic number is hidden[^?]*provided text\?[0-9]{7}$", text)
        assert dataset[index][0][0] != Bytes.eos_id


def test_training_essays_start_anywhere_and_asked_ones_at_the_first_word(monkeypatch):
    """Models that read one page of the haystack again and again."""
    starts, haystack, n_words = [], niah.Haystack, len(niah.essay_words()[0])
    monkeypatch.setattr(niah, "Haystack", lambda task, rng, avoid, words, start:
                        starts.append(start) or haystack(task, rng, avoid, words, start))

    class Words(list):
        def __getitem__(self, key):
            if isinstance(key, slice):
                starts.append(key.start)
            return super().__getitem__(key)
    words = Words(niah.essay_words()[0])

    def example(split):
        return lambda i: niah.make_example("niah_single_2", 512, Bytes(), 0, i, split=split,
                                           max_new_tokens=48)

    def training(many):
        return lambda i: niah.training_sample(512, Bytes(), 0, i, ["niah_single_2"],
                                              max_new_tokens=48, many=many)
    for make, least in ((training(0.0), 36), (training(1.0), 36), (example("train"), 36),
                        (lambda i: niah.drill(512, Bytes(), random.Random(i), words), 101)):
        starts.clear()
        for index in range(40):
            make(index)
        assert len(set(starts)) >= least
        assert min(starts) < n_words / 4 and max(starts) > 3 * n_words / 4
    starts.clear()
    example("val")(0), example("test")(0)
    assert starts == [0, 0]


def test_drills_ask_for_what_they_stated():
    """A first mention as an answer, which nobody could know; another key's; no text in between."""
    with_text, decode = [], Bytes().decode
    for seed in range(40):
        pieces = niah.drill(512, Bytes(), random.Random(seed), ["zebra"] * 100)
        known, ends = {}, [decode(ids) for ids, _ in pieces[2::3]]
        for (template, _), (value, is_answer) in zip(pieces[::3], pieces[1::3], strict=True):
            key, = re.findall(r"([a-z]+-[a-z]+)(?: is: | mentioned)", decode(template))
            assert is_answer == (key in known)
            assert known.setdefault(key, decode(value)) == decode(value)
            assert re.fullmatch(r"\d|\d\d|\d{7}", decode(value))
        assert all(end.startswith(".\n") for end in ends) and len(ends) == len(pieces) / 3
        assert 1 <= len(known) <= 4 and 512 <= sum(len(ids) for ids, _ in pieces) < 512 + 300
        with_text.append(any("zebra" in end for end in ends))
    assert 10 < sum(with_text) < 35  # three of five


def test_each_process_takes_its_part_of_each_batch():
    """Two GPUs that train on the same half; a resumed run that begins with the first samples."""
    args = SimpleNamespace(steps=3, batch=4, workers=0, device="cpu")
    for done, rank, world, mine in ((0, 0, 1, [*range(12)]), (2, 0, 1, [8, 9, 10, 11]),
                                    (1, 0, 2, [4, 5, 8, 9]), (1, 1, 2, [6, 7, 10, 11])):
        indices = data.Indices(args, done, Processes(rank, world))
        assert list(indices) == mine and len(indices) == len(mine)
    made = [(torch.tensor([n]), torch.tensor([0.5 * n])) for n in range(12)]
    got = [[part.flatten().tolist() for part in batch]
           for batch in data.batches(made, args, 1, Processes(1, 2))]
    assert got == [[[6, 7], [3.0, 3.5]], [[10, 11], [5.0, 5.5]]]


def save_shard(file, n):
    shards.save_shard(file, [np.arange(n, dtype=np.uint16).tobytes()], 50_000, "bytes", 0)


def test_text_is_validated_on_windows_that_are_not_trained_on(tmp_path):
    """A loss of text that the model has seen; a first token that counts with nothing before it."""
    save_shard(tmp_path / "00000.bin", 40_001)  # 400 windows
    training, validation = datasets(f"--data={tmp_path}", "--context_len=100")
    trained, held_out = ({dataset[index][0][0].item() for index in range(n)}
                         for dataset, n in ((training, 396), (validation, 4)))
    assert held_out == {100 * window for window in range(396, 400)}
    assert len(trained) == 396 and not trained & held_out
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
            save_shard(tmp_path / f"{shard:05d}.bin", 1001)
        dataset, _ = datasets(f"--data={tmp_path}", "--context_len=100")
        prints.add(data.fingerprint(dataset))
        dataset.shards.sample = lambda index: tokens  # the first window may be the same
        prints.add(data.fingerprint(dataset))
    assert len(prints) == 4


def test_no_two_keys_or_values_of_a_sample_are_equal(monkeypatch):
    """A question with two right answers, of which a model may give either."""
    monkeypatch.setattr(niah, "draw_text", lambda kind, rng: rng.choice("abcde"))
    for seed in range(20):
        used = {"a", "e"}
        assert sorted(niah.draw_distinct("words", 3, random.Random(seed), used)) == ["b", "c", "d"]
        assert used == set("abcde")


def test_prompts_are_known_by_all_of_them():
    """100 samples beside 200 of the same seed; the same prompts in another order."""
    a, b = examples_of(1, 2)
    assert len({niah.prompt_hash(some) for some in ([a], [b], [a, b], [b, a], [a, a])}) == 5
    assert niah.prompt_hash([a, b]) == niah.prompt_hash([a, b])


# ---------------------------------------------------------------- infra/runlog.py: log.jsonl,
# train.json

NAN = math.nan


def a_log(folder, done=0, rank=0, skipped=0, seconds=0.0, **changes):
    given = dict(of_pass={"arl": 3e9, "dense": 6e9}, peak=1e10, tokens=120) | changes
    return runlog.Log(folder, rank, done, before={"seconds": seconds, "skipped": skipped}, **given)


def add(log, step, *numbers, marks=(0.0, 1.0, 2.0), **more):
    log.add({"step": step}, torch.tensor(numbers, dtype=torch.float64), marks, **more)


def test_a_line_of_the_log_by_hand(tmp_path):
    """MFU doubled; a pass's loss, norm or seconds under the other's name; one pass's tokens."""
    log, numbers = a_log(tmp_path), (7.0, 5.0, 0.25, 2.0, 0)
    add(log, 3, *numbers, marks=[10.0, 12.0, 16.0])
    (entry, bad), = log.tell()[0]
    assert bad == 0 and 0 <= entry.pop("seconds") < 60
    assert entry == {"step": 3, "tokens": 360, "arl_loss": 7.0, "loss": 5.0,
                     "arl_grad_norm": 0.25, "grad_norm": 2.0, "arl_seconds": 2.0,
                     # 120 / 6; 9e9 / 6 / 1e10
                     "dense_seconds": 4.0, "tokens_per_second": 20, "mfu": 0.15, "skipped": 0}
    log.write(entry)
    assert json.loads((tmp_path / "log.jsonl").read_text()) == entry == log.close()
    unknown = a_log(tmp_path, peak=None, of_pass={"joint": 1.0, "dense": 2.0})
    add(unknown, 1, *numbers, marks=[10.0, 12.0, 16.0])
    (entry, _), = unknown.tell()[0]
    assert "mfu" not in entry and entry.items() >= {
        "joint_loss": 7.0, "joint_grad_norm": 0.25, "joint_seconds": 2.0, "loss": 5.0}.items()


def test_skipped_passes_are_counted_and_three_steps_in_a_row_end_the_run(tmp_path):
    """A count of steps, or from 0 after a resume; an end for three bad steps a week apart."""
    log = a_log(tmp_path, skipped=10)
    for step, (a, b) in enumerate([(1, NAN), (NAN, NAN), (1, 1), (NAN, 1), (math.inf, 1), (1, 1),
                                   (1, NAN), (1, NAN)], start=1):
        add(log, step, 1.0, NAN if b != b else 1.0, a, b, 0)
    told, stops = log.tell(keep=1)
    assert [(entry["skipped"], bad) for entry, bad in told] == [(11, 1), (13, 2), (13, 0), (14, 1),
                                                                (15, 1), (15, 0), (16, 1)]
    first = told[0][0]
    assert (first["loss"], first["grad_norm"], first["arl_loss"]) == (None, None, 1.0)
    assert not stops and log.hopeless is None
    add(log, 9, 1.0, 1.0, 1.0, NAN, 1)
    told, stops = log.tell()
    assert [entry["step"] for entry, _ in told] == [8, 9]
    assert stops and (log.hopeless, log.skipped) == (9, 18)


def test_a_batch_that_counts_nothing_is_no_divergence(tmp_path):
    """0 / 0 told as passes skipped, or as a loss; a run that such batches end, or keep alive."""
    log = a_log(tmp_path)
    for step, weight_sum in enumerate([0.0, 5.0, 5.0, 0.0, 5.0], start=1):
        add(log, step, NAN, NAN, NAN, NAN, 0, weight_sum=weight_sum)
    told = log.tell()[0]
    assert [(bad, entry["skipped"]) for entry, bad in told] == [(None, 0), (2, 2), (2, 4),
                                                                (None, 4), (2, 6)]
    assert log.hopeless == 5
    assert all(entry["loss"] is entry["grad_norm"] is None for entry, _ in told)


def test_the_log_goes_on_behind_the_checkpoint(tmp_path, monkeypatch):
    """Lines of steps that were lost, or seconds that begin at nought again."""
    clock, file = [1000.0], tmp_path / "log.jsonl"
    monkeypatch.setattr(runlog.time, "time", lambda: clock[0])
    file.write_text("".join(f'{{"step": {step}}}\n' for step in (1, 2, 3)))
    assert a_log(tmp_path, done=2, rank=1).close() == {}
    log = a_log(tmp_path, done=2, seconds=50.0)
    clock[0] += 7.5
    add(log, 3, 1, 1, 1, 1, 0)
    assert log.seconds() == log.tell()[0][0][0]["seconds"] == 57.5
    log.write({"step": 3, "again": True})
    log.close()
    assert file.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3, "again": true}\n'
    a_log(tmp_path).close()
    assert file.read_text() == ""


def test_a_record_by_hand():
    """A speed of the fastest step, or the first, which compiles; an MFU of one pass or one GPU."""
    log = SimpleNamespace(tokens=120, of_pass={"arl": 3e9, "dense": 6e9}, peak=1e10, skipped=4,
                          seconds=lambda: 99.5)
    record = lambda seconds: runlog.record_of(
        SimpleNamespace(device="cpu", lr=0.5), 30, log, seconds, SimpleNamespace(world=8), "c0ffee",
        "print", {"from": {"step": 1}})
    assert record([50.0, 3.0, 2.0, 2.5, 4.0]).items() >= {
        "step": 30, "settings": {"device": "cpu", "lr": 0.5}, "commit": "c0ffee", "processes": 8,
        "torch": torch.__version__, "seconds": 99.5, "step_seconds": 3.0, "tokens_per_second": 40,
        "mfu": 0.3, "skipped": 4, "first_sample": "print", "from": {"step": 1}}.items()
    log.peak = None
    assert record([1.0])["mfu"] is None


def test_a_gpus_milliseconds_are_seconds():
    """Tokens a second that are a thousand times too many."""
    event = SimpleNamespace(elapsed_time=lambda end: end)
    assert runlog.seconds_between(event, 2500.0) == 2.5 and runlog.seconds_between(1.5, 4.0) == 2.5


def test_a_run_does_not_go_on_with_other_flags(tmp_path):
    """The first half of a run at one rate, the second at another, in one row of a table."""
    flags = ["--preset=pico", "--memory=on", "--steps=20", "--batch=4", "--device=cpu"]
    told = {"settings": vars(train.parse(flags)), "step": 5, "first_sample": "s", "from": None}
    (tmp_path / "train.json").write_text(json.dumps(told))
    step_of = lambda *more: runlog.step_of(tmp_path, "run", train.parse([*flags, *more]))
    assert step_of() == 5
    for flag in ("--lr=0.5 --seed=7 --batch=8 --steps=9 --arl=8 --drills=0.25 --other_weight=0.5 "
                 "--protocol=sft --warmup=0.25 --weight_decay=0.5 --min_lr=1e-5 --memory_lr=0.5 "
                 "--clip=2 --many=0.25 --context_len=1024 --tasks=niah_single_1 "
                 "--memory=off").split():
        with pytest.raises(ValueError, match=flag.split("=")[0]):
            step_of(flag)


# ---------------------------------------------------------------- runs.py



def test_results_of_other_prompts_are_refused():
    """100 samples beside 200 in one mean."""
    good = {"S": "1", "T": "2"}
    runs.refuse_other_prompts({"a.json": good}, {"T": "2", "S": "1"})
    for theirs in {"S": "1"}, {"S": "1", "T": "3"}, {"S": "1", "T": "2", "U": "3"}:
        with pytest.raises(ValueError, match="b.json was asked other prompts"):
            runs.refuse_other_prompts({"a.json": good, "b.json": theirs}, good)



def test_each_gpu_has_its_share_of_jobs(monkeypatch, tmp_path):
    """All runs on the first GPU, whose tokens a second then mean little."""
    seen, meet = [], runs.threading.Barrier(4)

    class Process:
        def __init__(self, command, env, **_):
            seen.append(env["CUDA_VISIBLE_DEVICES"])

        def wait(self):
            return 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    monkeypatch.setattr(runs.subprocess, "Popen", Process)
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



def test_lines_are_read_once_each(tmp_path):
    """Hits of a batch that two runs wrote, counted twice; a line that a kill has cut off."""
    def line(examples, text, method="dense"):
        told = {"text": text, "read": 1.0, "prompt_read": None, "seconds": 0.5}
        return answers.Line("a", "S", method, examples, told)
    of_0 = [line([0], "zero"), line([3, 4], "batch", "H1 dense"), line([0], "again")]
    of_1 = [line([0], "two runs at once"), line([4, 5], "overlaps", "H1 dense"), line([1], "one")]
    for rank, lines in enumerate((of_0, of_1)):
        (tmp_path / f"answers-{rank}.jsonl").write_bytes(b"".join(map(answers.written, lines))
                                                         + b'{"checkpoint": "a')
    assert answers.read_lines(tmp_path) == {("a", "S", "dense"): {0: of_0[0], 1: of_1[2]},
                                            ("a", "S", "H1 dense"): {3: of_0[1], 4: of_0[1]}}



# ---------------------------------------------------------------- train.py: the loop's bookkeeping

def test_learning_rate_by_hand():
    """Another schedule under the paper's name."""
    rates = lambda steps, warmup, lr, min_lr: [train.learning_rate(step, SimpleNamespace(
        steps=steps, warmup=warmup, lr=lr, min_lr=min_lr)) for step in range(steps)]
    half_cosine = [0.1 + 0.45 * (1 + math.cos(math.pi * i / 8)) for i in range(8)]
    assert rates(10, 0.2, 2.0, 0.2) == pytest.approx([0.5, 1.0, *half_cosine])
    assert half_cosine[4] == pytest.approx(0.55)
    assert rates(4, 0.0, 1.0, 0.0) == pytest.approx([1, 0.5 + 0.5 * math.sqrt(0.5), 0.5,
                                                     0.5 - 0.5 * math.sqrt(0.5)])


class Alone(Processes):
    """One of several processes, whose sums and minima are its own."""

    def sum(self, tensor):
        return tensor

    def least(self, number):
        return number


def held_out(n=9, T=16):
    """Samples of random tokens, whose weights are 0, 0.1 or 1."""
    drawn = torch.Generator().manual_seed(0)
    return [(torch.randint(61, (T + 1,), generator=drawn),
             torch.tensor([0, 0.1, 1.0])[torch.randint(3, (T + 1,), generator=drawn)])
            for _ in range(n)]


def validate(model, dataset, rows, samples, processes=Processes()):
    return train.validate(model, dataset, SimpleNamespace(device="cpu", device_batch=rows), None,
                          train.nullcontext(), processes, samples)


@torch.no_grad()
def by_hand(model, some):
    """Loss and share of right ones, of the tokens of weight 1, one by one."""
    losses, right = [], []
    for tokens, weight in some:
        for t in range(1, len(tokens)):
            if weight[t] == 1:
                logits = model(tokens[None, :t])[0, -1].double()
                losses.append((logits.logsumexp(0) - logits[tokens[t]]).item())
                right.append((logits.argmax() == tokens[t]).item())
    assert any(right)
    return {"val_loss": pytest.approx(sum(losses) / len(losses), rel=1e-5),
            "val_accuracy": pytest.approx(sum(right) / len(right))}


def test_validation_counts_the_answers_alone():
    """A loss of all with a weight, of a sample twice, of a batch's mean; accuracy of weights."""
    model, dataset = tiny(seed=2), held_out()
    for tokens, weight in (*dataset[:3], dataset[4]):  # some that the model gets right
        weight[-1] = 1
        tokens[-1] = model(tokens[None, :-1])[0, -1].argmax()
    for rows in 2, 5, 16:
        assert validate(model, dataset, rows, 5) == by_hand(model, dataset[:5])
    for rank, mine in enumerate((dataset[:3], dataset[3:5])):
        assert validate(model, dataset, 2, 5, Alone(rank, 2)) == by_hand(model, mine)


def test_memory_lengths_are_medians_of_each_layer():
    """A mean that a few endless channels decide, or one layer's number for all."""
    model, dataset, gates = tiny(memory=True), held_out(), []
    found = validate(model, dataset, 3, 5)["memory_lengths"]
    for layer in model.layers:
        layer.self_attn.memory.register_forward_pre_hook(
            lambda memory, inputs: gates.append(memory.gate(inputs[0])))
    with torch.no_grad():
        model(torch.stack([tokens[:-1] for tokens, _ in dataset[:3]]))
    assert found == [round(effective_length(gate).median().item(), 2) for gate in gates]
    assert len(set(found)) == 2


def test_a_batchs_loss_is_that_of_its_weights(monkeypatch):
    """A loss of the last part, or a mean of parts; a gradient averaged over processes."""
    model, (a, b, c) = tiny(seed=1), held_out(3)
    parts = [(torch.stack([a[0], b[0]]), torch.stack([a[1], b[1]])), (c[0][None], c[1][None])]
    weight_sum, updates = sum(weight[:, 1:].sum() for _, weight in parts), []
    monkeypatch.setattr(parallel, "update",
                        lambda optimizer, norm, clip: updates.append((norm.item(), clip)))
    loss_of = parallel.Loss(model, None, train.nullcontext(), False)
    one_pass = lambda processes: parallel.one_pass(loss_of, model, None, parts, weight_sum,
                                                   processes, "nothing", 0.5)
    loss, norm = one_pass(Processes())
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
    assert one_pass(Alone(0, 2))[1].item() == pytest.approx(2 * norm.item(), rel=1e-5)


@pytest.mark.parametrize("norm", [math.inf, NAN])
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


RUN = ["--batch=2", "--arl=16", "--drills=0.5", "--other_weight=0.25"]
PICO = Config(257, n_layer=1, width=16, n_head=2, n_kv_head=2, mlp_width=16, context_len=512,
              eos_id=256)
OF_STEP = 2 * 512 * sum(cost.flops_per_token(replace(PICO, memory=True), n) for n in (16, 256))


def about(number):
    return pytest.approx(number, rel=0.02)


@pytest.fixture
def told(tmp_path, monkeypatch):
    """A run with these flags at a peak of 1e9 FLOPs a second: (lines of the log, the record)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(PRESETS, "pico", PICO)
    monkeypatch.setattr(cost, "peak_flops", lambda name: 1e9)

    def run(*flags):
        path, _ = train.train(arguments(*RUN, "--log_every=1", "--eval_every=3", "--save_every=4",
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
    monkeypatch.setattr(parallel, "update", lambda optimizer, *given: rates.append(
        [group["lr"] for group in optimizer.param_groups]) or update(optimizer, *given))
    monkeypatch.setattr(niah.Needles, "__getitem__",
                        lambda self, index: seen.append((self.seed, index)) or sample(self, index))
    log, made = told("--lr=0.01", "--memory_lr=0.03", "--min_lr=0.001", "--warmup=0.5")
    scales = [0.5, 1.0, 1.0, 0.1 + 0.45]
    assert rates == [pytest.approx([0.01 * scale, 0.03 * scale]) for scale in scales
                     for _ in range(2)]  # both passes
    for step, (row, scale) in enumerate(zip(log, scales, strict=True), start=1):
        seconds = row["arl_seconds"] + row["dense_seconds"]
        assert (row["step"], row["tokens"], row["skipped"]) == (step, step * 1024, 0)
        assert [row["lr"], row["memory_lr"]] == pytest.approx([0.01 * scale, 0.03 * scale])
        assert row["tokens_per_second"] == about(1024 / seconds)
        assert row["mfu"] == about(OF_STEP / seconds / 1e9)
        assert ("val_loss" in row) == (step in (3, 4))
    assert [row["seconds"] for row in log] == sorted(row["seconds"] for row in log)
    assert made["step"] == 4 and made["tokens_per_second"] == about(1024 / made["step_seconds"])
    assert made["mfu"] == about(OF_STEP / made["step_seconds"] / 1e9)
    # trained on two samples a step; validated twice, by 64 that are held out, of which answers
    # alone count, through dense attention
    assert {index for seed, index in seen if seed == 0} == set(range(8))
    assert Counter(index for seed, index in seen if seed == "val-0") == Counter([*range(64)] * 2)
    _, dataset, _, method, *_ = validated[0]
    assert method is None and dataset.args.other_weight == 0.0
    said, last, second = capsys.readouterr().out, log[3], log[1]
    for line in (
            f"validation {last['val_loss']:.3f}, {last['val_accuracy']:.1%} of answer tokens",
            f"step     2  loss {second['loss']:.3f}  arl {second['arl_loss']:.3f}  "
            f"lr {second['lr']:.1e}  norm {second['grad_norm']:.2f}",
            f"{made['tokens_per_second']:,} tokens/s, MFU {made['mfu']:.1%}"):
        assert line in said


@pytest.mark.parametrize("flags, name", [([], "arl_loss"), (["--arl=0"], "loss"),
                                         (["--arl=0", "--device_batch=1"], "loss")])
def test_the_first_loss_is_that_of_a_new_model(flags, name, told):
    """A loss per sample instead of per token's weight; ARL's under the dense pass's name."""
    args = arguments(*RUN, *flags)
    log, _ = told("--save_every=0", "--eval_every=0", "--steps=2", *flags)
    model = parallel.make_model(Transformer, *train.what_to_train(args), args)
    dataset, _ = data.make_data(args, Bytes(), niah.Needles)
    tokens, weight = (torch.stack([torch.as_tensor(dataset[index][part]) for index in (0, 1)])
                      for part in (0, 1))
    (method, _), *_ = train.passes_of(args).values()
    with torch.no_grad():
        logits = model(tokens[:, :-1], sparse=method).double()
    each = -logits.log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    expected = (each * weight[:, 1:]).sum() / weight[:, 1:].sum()
    assert log[0][name] == pytest.approx(expected.item(), rel=1e-5)


def test_a_steps_seconds_are_its_own(told, monkeypatch):
    """A speed that counts validation and checkpoints, or does not count waiting for data."""
    later, batches = [0.0], train.batches

    def takes(seconds, what):
        later[0] += seconds
        return what
    clock = SimpleNamespace(time=lambda: time.time() + later[0], perf_counter=time.perf_counter)
    for module in train, runlog:
        monkeypatch.setattr(module, "time", clock)
    waits = iter([500, 100, 200, 300])
    monkeypatch.setattr(train, "batches",
                        lambda *given: (takes(next(waits), batch) for batch in batches(*given)))
    for owner, name in (train, "validate"), (train.checkpoint.Saver, "save"):
        function = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given, function=function:
                            takes(1000, function(*given)))
    log, made = told("--eval_every=1", "--save_every=1")
    assert 250 <= made["step_seconds"] < 270
    assert made["seconds"] > 1100 + 7 * 1000  # the last checkpoint does not count its own time
    assert [row["wait_seconds"] // 100 for row in log] == [5, 1, 2, 3]


def test_a_run_of_two_gpus_by_hand(told, monkeypatch):
    """An MFU by the peak of one of them; a validation that waited, in an earlier step's line."""
    monkeypatch.setattr(train.parallel, "join", lambda device: train.nullcontext(Alone(0, 2)))
    monkeypatch.setenv("WORLD_SIZE", "2")
    log, _ = told("--save_every=0", "--log_every=1000")
    assert [row["step"] for row in log if "val_loss" in row] == [3, 4]
    for row in log:
        seconds = row["arl_seconds"] + row["dense_seconds"]
        assert row["mfu"] == about(OF_STEP / seconds / 2e9)
        assert row["tokens_per_second"] == about(1024 / seconds)


def test_what_is_printed_of_a_step_by_hand():
    """Minutes left of the batch, not the run; for ever a speed of before the speed changed."""
    args = SimpleNamespace(batch=4, context_len=250, steps=130)
    entry = {"step": 10, "loss": 1.2345, "arl_loss": None, "lr": 0.001, "grad_norm": 0.5,
             "mfu": 0.451, "val_loss": 0.5, "val_accuracy": 0.987}
    line = lambda passes, seconds: watch.line_of(entry, dict.fromkeys(passes), seconds, args,
                                                 "tokens")
    assert line(("arl", "dense"), [9.0] * 150 + [2.0] * 100) == (  # 120 steps of 2 s
        "step    10  loss 1.234  arl none  validation 0.500, 98.7% of tokens right  "
        "lr 1.0e-03  norm 0.50  500 tokens/s  MFU 45.1%  4.0 min left")
    assert line(["dense"], [100.0]).endswith("10 tokens/s  MFU 45.1%  3.3 h left")
