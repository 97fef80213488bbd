"""eval_niah.py: numbers that a table may rest on. Scores of perfect and mute models, batches, what is read, H1, files, runs that stop and go on."""
import importlib.util
import json
import math
import os
import random
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny
from test_niah import Bytes, tokenizer_of

import eval_niah
import niah
import sparse
from experiments import ways
from infra import answers, cli, files, runlog, weights, words
from infra.report import best_heads, difference, interval, table, table_random
from model import Transformer

CONTEXT = 512
NAMES = {task: kind.short for task, kind in niah.TASKS.items()}
METHODS = [sparse.parse(cli.sized(text, CONTEXT, Bytes(), sparse.METHODS), CONTEXT) for text in (
    "dense", "quest:budget=1/4", "moba:budget=1/4", "snapkv:budget=1/4", "moba:budget=1/4+snapkv:budget=1/4+quest:budget=1/8",
    "dilated:local=32")]


def make(task="niah_single_2", n=3, protocol="base", tokenizer=Bytes(), context_len=CONTEXT, new=48):
    return [niah.make_example(task, context_len, tokenizer, 0, i, protocol, max_new_tokens=new) for i in range(n)]


def small(**changes):
    return tiny(vocab_size=257, **changes)


def writes(model, say, examples):
    """The model, but it answers each prompt with the ids that say(example) gives, whatever the method."""
    by_ids = {tuple(e.ids): e for e in examples}

    def prefill(tokens, lengths, cache, sparse, watch):
        return [by_ids[tuple(row[:n])] for row, n in zip(tokens.tolist(), lengths.tolist())]

    def decode(told, cache, max_new_tokens, sparse, eos_id, watch):
        rows = [say(e)[:max_new_tokens] for e in told]
        return torch.tensor([row + [eos_id] * (max_new_tokens - len(row)) for row in rows])

    model.prefill, model.decode = prefill, decode
    return model


# ---------------------------------------------------------------- scores

@pytest.mark.parametrize("protocol", niah.PROTOCOLS)
def test_a_gold_answer_scores_100_and_an_empty_one_0_in_every_task(protocol):
    """Answers that go to another prompt, or lose their ends, on the way from the model through batches to the scores."""
    for task in niah.TASKS:
        examples = make(task, 5, protocol, context_len=1024)
        gold = writes(small(), lambda e: Bytes().encode(e.target) + [Bytes.eos_id], examples)
        mute = writes(small(), lambda e: [Bytes.eos_id], examples)
        for model, percent in (gold, 100), (mute, 0):
            for outcome in ways.evaluate(model, Bytes(), examples, METHODS[:3], batch=2).values():
                found = eval_niah.scores(outcome.texts, examples)
                assert found["ruler"][0] == found["paper"][0] == percent, (task, outcome.texts)
                tenths = eval_niah.by_depth(outcome.texts, examples)
                assert sum(n for n, _ in tenths) == sum(len(e.answers) for e in examples)
                assert all(p == percent for n, p in tenths if n)


def test_interval_is_wilsons():
    """A 100 +- 0 of few samples; figures from Wilson's formula worked by hand (R: prop.test without correction)."""
    assert interval([0.0] * 10) == [0.0, 0.0, 27.75]
    assert interval([1.0] * 10) == [100.0, 72.25, 100.0]
    assert interval([1.0] * 5 + [0.0] * 5) == [50.0, 23.66, 76.34]


def coin(rng, p, q, r):
    """Two models' scores of a prompt, 1 with probability p and q: with r the same chance decides both."""
    chance = rng.random()
    return float(chance < p), float((chance if rng.random() < r else rng.random()) < q)


@pytest.mark.parametrize("n, p, q, r", [(30, 0.5, 0.6, 0.8), (200, 0.8, 0.9, 0.5), (200, 0.5, 0.5, 0), (10, 0.9, 0.9, 0.9), (50, 0.02, 0.05, 1)])
def test_the_interval_of_a_difference_covers_it(n, p, q, r):
    """95 % of such tables hold the truth. An interval of one model's, of width 0 where few prompts agree, or half as wide."""
    rng, inside, widths = random.Random(0), 0, []
    for _ in range(600):
        a, b = zip(*(coin(rng, p, q, r) for _ in range(n)))
        gain, low, high = difference(a, b, paired=True)
        assert gain == pytest.approx(100 * (sum(b) - sum(a)) / n, abs=0.02) and low < high
        inside += low <= 100 * (q - p) <= high
        widths.append((high - low) / (difference(a, b, paired=False)[2] - difference(a, b, paired=False)[1]))
    assert inside / 600 > 0.93
    # paired, what is hard for both counts once: the more they share, the narrower
    assert max(widths) < 1.6 and (sum(widths) / 600 < 0.85 if r >= 0.5 and n >= 30 and p > 0.1 else True)


def test_a_difference_by_hand():
    """b - a, not a - b; both ends. Where the models' successes are as unlike as can be, pairs are wider than strangers."""
    assert difference([0.0] * 9 + [1.0], [1.0] * 10, True)[0] == pytest.approx(90)
    a, b = [1.0, 0.0] * 20, [0.0, 1.0] * 20
    paired, apart = difference(a, b, True), difference(a, b, False)
    half = 100 * 0.5 - interval(a)[1]
    assert paired == pytest.approx([0, -2 * half, 2 * half]) and apart == pytest.approx([0, -2**0.5 * half, 2**0.5 * half])
    same = difference(a, a, True)
    assert same == pytest.approx([0, -half * (2 - 2 * 0.95) ** 0.5, half * (2 - 2 * 0.95) ** 0.5])  # r = 1 - 2 / n, corrected


def rows_of(checkpoint, by_task, prompts="p", random=None):
    """Result rows of one method, and what table takes beside them; by_task: {task: scores}"""
    rows = [{"checkpoint": checkpoint, "method": "dense", "random": random, "task": task, "prompts": prompts, "hits": None, "read": None,
             "prompt_read": None, "ruler": interval(scores), "paper": interval(scores)} for task, scores in by_task.items()]
    return rows, {(checkpoint, "dense", task): scores for task, scores in by_task.items()}


def test_table_pairs_differences_and_says_what_its_intervals_cover():
    """Differences of the wrong sign, or with the ± of two strangers; a ± that seems to cover another training."""
    a, b = [1.0, 0.0] * 50, [1.0, 0.0] * 49 + [1.0, 1.0]
    tasks = {"niah_single_1": a, "niah_single_2": a}
    for prompts, paired, words in ("p", True, "each prompt asked of both"), ("other", False, "of other prompts"):
        (first, one), (second, two) = rows_of("first", tasks), rows_of("second", {"niah_single_1": b, "niah_single_2": b}, prompts)
        text = table(first + second, one | two, NAMES)
        cell = difference(a, b, paired)
        half = (cell[2] - cell[1]) / 2 / 2**0.5  # of two tasks
        assert f"second - first, {words}" in text and f"+1.0   +1.0    +1.0 ±{half:4.1f}" in text, text
        assert "prompts alone" in text and "seed" in text.splitlines()[-1]
    assert half > 9.5 and difference(a, b, True)[2] < 4


def test_h2_tells_the_spread_of_draws():
    """The deviation of the draws taken for all there are: a third too small for two."""
    rows = [row for score in (40, 50) for row in rows_of("m", {"niah_single_1": [score / 100]}, random=score)[0]]
    text = table_random(rows, NAMES)
    assert "S-1 45.0 ±7.1" in text and "sample standard deviation over draws (2)" in text
    assert "S-1 40.0" in table_random(rows[:1], NAMES) and "±" not in table_random(rows[:1], NAMES)


# ---------------------------------------------------------------- answers

def texts(*args, **kwargs):
    return {method: outcome.texts for method, outcome in ways.evaluate(*args, **kwargs).items()}


@pytest.mark.parametrize("form", [dict(), dict(memory=True, n_kv_head=2)], ids=["attention", "memory gqa"])
def test_answers_do_not_depend_on_order_or_batch(form):
    """Padding that leaks into a memory, page or window; a sample's state that reaches the next."""
    model, examples = small(**form), make(n=3) + make("niah_single_1", 2) + make("niah_multikey_2", 2)
    alone = texts(model, Bytes(), examples, METHODS, batch=1)
    assert len({*alone[METHODS[0]]}) > 4, "the model says the same to all: the test would see nothing"
    assert texts(model, Bytes(), examples, METHODS, batch=4) == alone
    turned = texts(model, Bytes(), examples[::-1], METHODS[::-1], batch=4)
    assert {method: answers[::-1] for method, answers in turned.items()} == alone


def test_a_shared_prefill_gives_what_an_own_one_gives():
    """A method that leaves its mark on the cache that the next one gets."""
    model, examples = small(memory=True), make(n=2)
    together = ways.evaluate(model, Bytes(), examples, METHODS)
    for method in METHODS:
        own = ways.evaluate(model, Bytes(), examples, [method])[method]
        assert (own.texts, own.read, own.prompt_read) == (
            together[method].texts, together[method].read, together[method].prompt_read), sparse.name(method)


def test_random_selection_is_a_function_of_the_seed():
    """H2's chance taken from a global generator: seeds that cannot be repeated, or that are all alike."""
    model, examples = small(), make(n=2)
    for method in METHODS[1:4]:
        drawn = [sparse.randomized(method, seed) for seed in range(4)]
        first = texts(model, Bytes(), examples, drawn)
        assert texts(model, Bytes(), examples[::-1], drawn[1:])[drawn[1]] == first[drawn[1]][::-1]
        assert len(set(map(tuple, first.values()))) > 1  # two seeds may write the same


# ---------------------------------------------------------------- what was read

def test_reads_are_measured_and_within_the_budget():
    """A share read that is believed. Dense, SnapKV, MoBA and Quest are counted by hand."""
    model, (example,) = small(), make(n=1)
    found = ways.evaluate(model, Bytes(), [example], METHODS)
    dense, quest, moba, snapkv, combined, dilated = (found[method] for method in METHODS)
    T, steps = len(example.ids), 47  # this model does not end by itself; the first of 48 tokens is the prefill's
    assert dense.read == [T + (steps + 1) / 2] and dense.prompt_read == [(T + 1) / 2]  # T + 1 to T + steps
    assert snapkv.read == [128 + (steps + 1) / 2] and snapkv.prompt_read == dense.prompt_read
    current = [(T + s) % 8 + 1 for s in range(steps)]  # entries of the block that is being filled
    assert quest.read[0] == pytest.approx(sum(120 + n for n in current) / steps)
    assert moba.prompt_read[0] == pytest.approx(sum(min(t + 1, 120 + t % 8 + 1) for t in range(T)) / T)
    assert moba.read == dense.read and combined.prompt_read == moba.prompt_read
    assert combined.read[0] <= 64 and 32 < dilated.read[0] < T and dilated.prompt_read == [None]


@dataclass(frozen=True)
class QuestThatReadsAll(sparse.Quest):
    def decode(self, q, cache):
        return sparse.Dense.decode(self, q, cache)


@dataclass(frozen=True)
class SnapKVThatKeepsAll(sparse.SnapKV):
    def compress(self, q, k, v, lengths, dice):
        return None


@dataclass(frozen=True)
class MoBAThatReadsAll(sparse.MoBA):
    def prefill(self, q, k, v, start, dice):
        blocks = torch.arange(math.ceil(k.shape[1] / self.block_size)).expand(len(q), k.shape[2], q.shape[1], -1)
        return sparse.attend(q, k, v, causal=True), blocks


@pytest.mark.parametrize("method", [QuestThatReadsAll(128, 8), MoBAThatReadsAll(128, 8), SnapKVThatKeepsAll(128, 8)],
                         ids=lambda method: type(method).__name__)
def test_a_method_that_is_silently_off_ends_the_run(method):
    """A fine score that was dense all along."""
    with pytest.raises(AssertionError, match="read|kept"):
        ways.evaluate(small(), Bytes(), make(n=1), [method])


# ---------------------------------------------------------------- H1

@pytest.mark.parametrize("protocol", niah.PROTOCOLS)
@pytest.mark.parametrize("name", ["bytes", "pairs", "cl100k"])
def test_sources_point_at_the_tokens_that_are_copied(name, protocol):
    """H1 that looks for the wrong place: shifted by the answer's opening, or in another answer's needle."""
    tokenizer, different = tokenizer_of(name), []
    for task in niah.TASKS:
        e, = make(task, 1, protocol, tokenizer, context_len=1024)
        target, found = eval_niah.sources(e, tokenizer)
        assert tokenizer.decode(target) == e.target and {s.answer for s in found if s} == set(range(len(e.answers)))
        for token, s in zip(target, found):
            if s is None:
                assert not set(tokenizer.decode([token])) & set("0123456789abcdef-"), "a token of an answer without source"
                continue
            start, end = e.spans[s.answer]
            assert start <= s.low < s.high <= end
            assert tokenizer.decode([token]).strip(", ") in tokenizer.decode(e.ids[s.low:s.high])
            assert name != "bytes" or s.high == s.low + 1
            if e.ids[s.low:s.high] != [token]:
                different.append(token)
    assert len(different) < 10, "needle and answer are cut alike, but for their ends"


@dataclass(frozen=True)
class Keeps(sparse.SnapKV):
    """Drops the positions first to last - 1 in KV head 1, and as many at the start in head 0."""
    first: int = 0
    last: int = 1

    def compress(self, q, k, v, lengths, dice):
        positions, n = torch.arange(k.shape[1]), self.last - self.first
        return torch.stack([positions[n:], torch.cat([positions[:self.first], positions[self.last:]])])[None]


def rates(model, examples, method, batch):
    """The share of answers that each head hits, (layers, KV)."""
    found = [eval_niah.answer(model, Bytes(), [examples[i] for i in rows], [], None, [method])[1] for rows in answers.by_length(examples, batch)]
    hit = torch.stack([heads for of_batch in found for of_row in of_batch[method] for heads in of_row])
    return hit.float().mean(0)


def test_a_head_hits_an_answer_if_it_reads_its_place_at_every_step():
    """Decision 9, by hand: everything selected is 1, nothing is 0, and one missing token of an answer is a miss."""
    model, examples = small(n_kv_head=2), make("niah_single_3", 3) + make("niah_single_2", 2)
    rate = lambda method, examples=examples: rates(model, examples, method, batch=2).tolist()
    for method in sparse.SnapKV(CONTEXT, 8), sparse.Quest(CONTEXT, 8), METHODS[4].__class__(compress_by=sparse.SnapKV(CONTEXT, 8)):
        assert rate(method) == [[1, 1], [1, 1]]
    assert rate(sparse.Dilated(None, local=2, initial=4)) == [[0, 0], [0, 0]]

    for protocol, missed in ("base", 0), ("sft", 1):  # after "sft" the answer's first token is the dense prefill's
        example, = make("niah_single_3", 1, protocol)
        start, end = example.spans[0]
        assert rate(Keeps(CONTEXT, 8, 5, None, start, end), [example]) == [[1, 0], [1, 0]]
        assert rate(Keeps(CONTEXT, 8, 5, None, start, start + 1), [example]) == [[1, missed], [1, missed]]
        assert rate(Keeps(CONTEXT, 8, 5, None, end - 1, end), [example]) == [[1, 0], [1, 0]]
        assert rate(Keeps(CONTEXT, 8, 5, None, end, end + 1), [example]) == [[1, 1], [1, 1]]


def test_hits_do_not_depend_on_the_batch():
    """Answers of different lengths: a row that is done and still fed."""
    model, examples, half = small(memory=True), make("niah_single_3", 2) + make("niah_single_2", 2), CONTEXT // 2
    for text in f"quest:budget={half}", f"snapkv:budget={half}", f"moba:budget={half}+snapkv:budget={half}+quest:budget={half // 4 * 3}":
        method = sparse.parse(cli.sized(text, CONTEXT, Bytes(), sparse.METHODS), CONTEXT)
        together, alone = (rates(model, examples, method, batch) for batch in (4, 1))
        assert torch.equal(together, alone) and 0 < together.mean() < 1


def test_one_prefill_serves_all_that_prefill_alike(monkeypatch):
    """Under --hits a prefill for each method once more: at 7B most of the time."""
    model, examples, prefills = small(memory=True), {"m": {"niah_single_2": make(n=3)}}, []
    asked = METHODS + [sparse.randomized(METHODS[3], seed) for seed in range(2)]
    selecting = [METHODS[1], *METHODS[3:]]
    by_name = {f"H1 {sparse.name(m)}": m for m in selecting} | {sparse.name(m): m for m in asked}
    prefill, args = model.prefill, SimpleNamespace(device="cpu", batch=3)
    monkeypatch.setattr(model, "prefill", lambda *given, **more: prefills.append(given[3]) or prefill(*given, **more))
    batch, = answers.unanswered(examples, by_name, 3, {})
    lines, _ = eval_niah.ask(model, Bytes(), examples[batch.checkpoint][batch.task], batch, by_name, args, None)
    assert len(prefills) == len({sparse.phases(method).prefill_by for method in asked}) == 3  # dense, MoBA, Dilated
    assert {line.method for line in lines} == by_name.keys()
    for line in lines:  # as each alone
        if line.method.startswith("H1 "):
            found = rates(model, examples["m"]["niah_single_2"], by_name[line.method], 1)
            assert torch.equal(torch.tensor(line.told["hits"]) / line.told["answers"], found), line.method


def test_hits_of_what_is_missing_alone_are_counted(monkeypatch):
    """Answers counted twice, of a batch of which a part was told before, or of a row that fills one up."""
    model, examples, (_, quest, *_) = small(memory=True), {"m": {"niah_single_2": make(n=3)}}, METHODS
    by_name, args = {f"H1 {sparse.name(quest)}": quest}, SimpleNamespace(device="cuda", batch=4)
    told = []
    for there in {}, {0: None}, {0: None, 2: None}:
        batch, = answers.unanswered(examples, by_name, 4, {("m", "niah_single_2", *by_name): there})
        (line,), _ = eval_niah.ask(model, Bytes(), examples[batch.checkpoint][batch.task], batch, by_name, args, None)
        assert line.examples == [i for i in range(3) if i not in there] and line.told["answers"] == len(line.examples)
        told.append(torch.tensor(line.told["hits"]))
    alone = [rates(model, [e], quest, 1) for e in examples["m"]["niah_single_2"]]
    assert [x.tolist() for x in told] == [sum(alone).tolist(), (alone[1] + alone[2]).tolist(), alone[1].tolist()]


class Half(Bytes):
    """A tokenizer with a prefix space whose tokens are three bytes each: they end inside characters."""
    name = "half"

    def encode(self, text):
        raw = (" " + text).encode()
        return [int.from_bytes(raw[i:i + 3], "big") for i in range(0, len(raw), 3)]

    def pieces(self, ids):
        return [i.to_bytes(3 if i >= 1 << 16 else 2 if i >= 1 << 8 else 1, "big") for i in ids]

    def decode(self, ids):
        return b"".join(self.pieces(ids)).decode(errors="replace")


@pytest.mark.parametrize("tokenizer", [Bytes(), Half()], ids=lambda tokenizer: tokenizer.name)
@pytest.mark.parametrize("answer", ["naïve", "Ω☃Ω", "\U0001f600\U0001f600", "1234567"])
def test_sources_of_tokens_that_end_inside_a_character(tmp_path, answer, tokenizer):
    """Positions counted in characters of a text cut inside one: hits told for other places, or an endless search."""
    for filler in "é", "éé", "☃é":
        file = tmp_path / "niah_single_1.jsonl"
        row = {"index": 0, "input": f"{filler} The number for ☃ is: {answer}. {filler} What is it?", "outputs": [answer]}
        file.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
        e, = niah.read_jsonl(file, tokenizer, "sft")
        target, found = eval_niah.sources(e, tokenizer)
        written, prompt = niah.pieces(tokenizer, target), niah.pieces(tokenizer, e.ids)
        before = len(" " if tokenizer.name == "half" else "") + len(row["input"].partition(answer)[0].encode())
        at = b"".join(written).index(answer.encode())
        for j, s in enumerate(found):
            low, high = len(b"".join(written[:j])), len(b"".join(written[:j + 1]))
            mine = range(max(low, at) - at + before, min(high, at + len(answer.encode())) - at + before)  # bytes of the prompt
            if not mine:
                assert s is None
                continue
            ends = [len(b"".join(prompt[:i])) for i in range(len(prompt) + 1)]
            assert ends[s.low] <= mine[0] < ends[s.low + 1] and ends[s.high - 1] <= mine[-1] < ends[s.high], (answer, filler, j)


def test_best_heads_are_the_papers_fifty_of_1024():
    """The mean of all heads, or of the worst."""
    rates = torch.zeros(32, 32)
    rates.view(-1)[torch.randperm(1024)[:51]] = torch.cat([torch.ones(50), torch.tensor([0.5])])
    assert best_heads(rates) == pytest.approx((50 + 0.5) / 51)  # 5 % of 1,024 is 51
    assert best_heads(torch.tensor([[0.25, 0.75]])) == 0.75


# ---------------------------------------------------------------- the command

@pytest.fixture
def runs(tmp_path, monkeypatch):
    """checkpoints/ as they come with the code, and out/ as train.py leaves it, with two runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runlog, "SHIPPED", [tmp_path / "checkpoints" / name for name in ("attention", "memory")])
    settings = {"protocol": "base", "tokenizer": None}
    made = [("checkpoints/attention", False), ("checkpoints/memory", True),
            *((f"out/{run}/step_000000{step}", True) for run in ("old", "mine") for step in (1, 2))]
    for age, (name, memory) in enumerate(made):
        small(memory=memory, context_len=CONTEXT).save_pretrained(tmp_path / name)
        record = tmp_path / name / "train.json"
        record.write_text(json.dumps({"step": 1, "settings": settings}))
        os.utime(record, (1e9 + age, 1e9 + age))
    return tmp_path


def test_with_no_checkpoint_it_compares_what_comes_with_the_code_and_the_newest_run(runs, monkeypatch):
    """An old experiment beside them, or one's own run of another task or length, whose scores would mean nothing there."""
    assert [path.name for path in runlog.known_models()] == ["attention", "memory", "mine"]
    for file, old, new in ("train.json", "base", "sft"), ("config.json", f'"context_len": {CONTEXT}', '"context_len": 256'):
        file = runs / "out/mine/step_0000002" / file
        text = file.read_text()
        others = json.dumps({name: value for name, value in json.loads(text).items() if name != "sha256"})
        file.write_text(others.replace(old, new))
        assert others != file.read_text() and [path.name for path in runlog.known_models()] == ["attention", "memory"]
        file.write_text(text)
    read = weights.read  # a vocabulary of other tokens, which the shapes of the weights would not match
    monkeypatch.setattr(weights, "read", lambda path, **more: (read(path)[0] | ({"vocab_size": 1000} if "mine" in str(path) else {}), {}))
    assert [path.name for path in runlog.known_models()] == ["attention", "memory"]


def test_the_checkpoints_that_come_with_the_code_find_a_needle():
    """A file that is missing from the repository, or not the model that its train.json tells of."""
    attention, memory = runlog.SHIPPED
    assert sum(file.stat().st_size for folder in runlog.SHIPPED for file in folder.iterdir()) < 25e6
    for folder, has_memory in (attention, False), (memory, True):
        model, made = Transformer.from_pretrained(folder), runlog.training_record(folder)
        assert bool(model.config.memory) == has_memory and made["settings"]["recipe"] == "micro-sft" and made["step"] == made["settings"]["steps"]
        assert made["from"]["settings"]["memory"] == ("on" if has_memory else "off")
        examples = [niah.make_example("niah_single_2", 4096, Bytes(), seed=3, index=0, protocol="sft", max_new_tokens=12)]
        outcome = ways.evaluate(model.float(), Bytes(), examples, [sparse.Dense()])[sparse.Dense()]
        assert eval_niah.scores(outcome.texts, examples)["ruler"][0] == 100


@pytest.mark.parametrize("context_len, samples", [(4096, 2), (1024, 8), (32768, 2)])
def test_on_a_cpu_it_takes_few_samples_of_long_prompts(runs, context_len, samples):
    """A first look that takes an hour."""
    args = eval_niah.flags().parse_args(["--device=cpu", f"--context_len={context_len}"])
    eval_niah.prepare(args)
    assert args.samples == samples


def test_results_hold_what_a_reader_needs_to_repeat_them(runs, capsys):
    """A JSON without commit, prompts or dtype; predictions that do not give its scores; a table that lacks a row."""
    eval_niah.main(["--samples=2", "--tasks", "niah_single_1", "niah_single_2", "--methods", "quest:budget=1/4", "moba:budget=1/4",
                    "--hits", "--random=2", "--out=eval", "--device=cpu"])
    printed = capsys.readouterr().out
    report = json.loads((runs / "eval" / "results.json").read_text())
    assert {"command", "commit", "device", "torch", "settings", "finished", "results"} <= report.keys() and report["finished"]
    settings = report["settings"]
    assert settings["dtype"] == "float32" and settings["context_len"] == CONTEXT and settings["max_new_tokens"] == 48
    assert {"seed", "protocol", "samples", "tokenizer", "haystack", "words", "batch"} <= settings.keys()
    assert len(report["results"]) == 3 * 2 * (3 + 2 * 2)
    for row in report["results"]:
        assert row.keys() == {"checkpoint", "path", "tokenizer", "method", "random", "budget", "task", "n", "ruler", "paper",
                              "by_depth", "read", "read_share", "prompt_read", "prompt_read_share", "hits", "seconds",
                              "prompts", "keys_from", "haystack_from", "predictions"}
        examples = make(row["task"], 2)
        saved = [json.loads(line)["pred"] for line in (runs / row["predictions"]).read_text().splitlines()]
        assert eval_niah.scores(saved, examples) == {"ruler": row["ruler"], "paper": row["paper"]}
        assert row["path"].endswith(("checkpoints/attention", "checkpoints/memory", "mine/step_0000002"))
        assert row["prompts"] == niah.prompt_hash(examples)
        assert (row["hits"] is not None) == (row["method"].startswith("quest") and row["random"] is None)
    for text in "dense", "quest:budget=1/4,block_size=8", "moba:budget=1/4,block_size=8", "memory - attention", "S-2", "H2":
        assert text in printed
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    assert (runs / "eval" / "results.png").read_bytes().startswith(b"\x89PNG")


def test_rulers_own_file_gives_what_the_generator_gives(runs):
    """Spans, answers or protocol lost in the file's form."""
    niah.write_jsonl("niah_single_2.jsonl", make(n=2))
    common = ["--ckpt", "out/mine", "--samples=2", "--methods", "snapkv:budget=1/4", "--hits", "--device=cpu"]
    eval_niah.main([*common, "--jsonl", "niah_single_2.jsonl", "--out=a"])
    eval_niah.main([*common, "--tasks", "niah_single_2", "--out=b"])
    a, b = (json.loads((runs / name / "results.json").read_text())["results"] for name in "ab")
    assert a and all(x[key] == y[key] for x, y in zip(a, b, strict=True) for key in ("prompts", "ruler", "read", "hits"))


LONG = ["--jsonl", "niah_single_2.jsonl", "--samples=2", "--device=cpu", "--out=a", "--max_new_tokens=12"]


def test_budgets_are_fractions_of_what_is_asked(runs, capsys):
    """RULER's file of twice the model's length: budgets of half their fraction, 199 % read, and "prompts of up to 512 tokens"."""
    niah.write_jsonl("niah_single_2.jsonl", make(n=2, context_len=1024))
    with pytest.raises(SystemExit) as end:
        eval_niah.main([*LONG, "--methods", "quest:budget=1/4"])
    line = capsys.readouterr().err
    assert end.value.code == 2 and line.count("\n") == 1 and "--context_len=1024" in line and not Path("a/asked.json").exists()
    eval_niah.main([*LONG, "--methods", "quest:budget=1/4", "--context_len=1024"])
    out, err = capsys.readouterr()
    lengths = [len(e.ids) for e in make(n=2, context_len=1024)]
    assert f"4 prompts of {min(lengths):,} to {max(lengths):,} tokens" in out or f"6 prompts of {min(lengths):,} to {max(lengths):,} tokens" in out
    notes = err.splitlines()  # once for each model, though it is asked in many batches
    assert [note.split()[1] for note in notes] == ["attention", "memory", "mine"] and all("512 tokens" in note for note in notes), err
    rows = files.load("a/results.json")["results"]
    assert {row["budget"] for row in rows} == {None, 256} and all(0.1 < row["read_share"] <= 1 for row in rows)


def test_a_model_trained_on_less_is_named_and_no_other(runs, capsys):
    """Models of several lengths, all asked at the first one's."""
    small(memory=True, context_len=256).save_pretrained("shorter")
    few = ["--tasks", "S-1", "--samples=1", "--max_new_tokens=12", "--methods=dense", "--device=cpu"]
    eval_niah.main(["--ckpt", "checkpoints/memory", "shorter", *few])
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("note: shorter was trained on contexts of 256 tokens")
    Path("niah_single_1.jsonl").write_text('{"index": 0, "input": "The number is: 1234567. What is it?' + " " * 200 + '", "outputs": ["1234567"]}')
    eval_niah.main(["--ckpt", "checkpoints/memory", *few, "--jsonl", "niah_single_1.jsonl"])
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "budgets are fractions of --context_len 512" in err and "--context_len=256 fits" in err


def test_a_name_means_the_same_in_every_spelling(runs, capsys):
    """MK-2 refused where tables say it; --method for --methods; of two --method the first dropped without a word."""
    few = ["--ckpt", "out/mine", "--samples=1", "--max_new_tokens=12", "--device=cpu", "--out=a"]
    eval_niah.main([*few, "--tasks", "S-1", "niah_single_2", "--method", "quest:budget=1/4", "--method", "moba:budget=1/4"])
    eval_niah.main([*few, "--tasks", "s-1", "S-2", "--methods", "quest:budget=1/4", "moba:budget=1/4"])  # nothing is left to ask
    report = files.load("a/results.json")
    assert report["settings"]["tasks"] == ["niah_single_1", "niah_single_2"] and report["speed"]["answers"] == 0
    assert [text.split(":")[0] for text in report["settings"]["methods"]] == ["dense", "quest", "moba"]


@pytest.mark.parametrize("argv, words", [
    (["--frobnicate"], "--frobnicate"),
    (["--samples=0"], "--samples"),
    (["--seed=-2147483649"], "seed"),
    (["--seed=2147483648"], "seed"),
    (["--words=none"], "--words"),
    (["--device=toaster"], "toaster"),
    (["--tasks", "niah_single_9"], "niah_single_9"),
    (["--ckpt", "nowhere"], "nowhere"),
    (["--methods", "quest:budget=1/999"], "1/999"),
    (["--methods", "qwest"], "qwest"),
    (["--random=2", "--methods", "quest:budget=1/8"], "--random"),
    (["--context_len=128", "--methods", "dense"], "--context_len"),
    (["--tokenizer=nowhere"], "nowhere"),
    (["--haystack=nowhere.txt"], "nowhere.txt"),
    (["--jsonl", "other.jsonl"], "other"),
    (["--jsonl", "niah_single_2.jsonl", "a/niah_single_2.jsonl"], "second file of niah_single_2"),
])
def test_a_wrong_flag_is_one_line_and_exit_2(runs, capsys, argv, words):
    """A traceback, or a long run that ends in one."""
    Path("a").mkdir()
    for file in "other.jsonl", "niah_single_2.jsonl", "a/niah_single_2.jsonl":
        niah.write_jsonl(file, make(n=1))
    with pytest.raises(SystemExit) as end:
        eval_niah.main(argv)
    line = capsys.readouterr().err
    assert end.value.code == 2 and words in line and line.startswith("eval_niah.py: ") and line.count("\n") == 1, line


# ---------------------------------------------------------------- a run that was stopped goes on

ASKED = ["--ckpt", "checkpoints/attention", "checkpoints/memory", "--tasks", "niah_single_1", "niah_single_2", "--samples=5", "--batch=2",
         "--max_new_tokens=12", "--device=cpu", "--hits", "--random=1", "--methods", "quest:budget=1/4", "moba:budget=1/8"]
N_BATCHES = 2 * 2 * 3


def told(out="eval"):
    """The report in a folder, but for the time it took; and what its predictions are."""
    report = files.load(Path(out) / "results.json")
    assert report.pop("speed")["seconds"] >= 0
    for row in report["results"]:
        del row["seconds"]
        row["predictions"] = Path(row["predictions"]).read_text()
    return report


@pytest.fixture
def undisturbed(runs, monkeypatch):
    """What a run to eval/ tells that nothing stops. Its folder is then whole/, and eval/ is free."""
    monkeypatch.setattr(eval_niah, "plot", lambda *_: None)  # takes a second
    eval_niah.main([*ASKED, "--out=eval"])
    report = told()
    Path("eval").rename("whole")
    return report


def stopping(monkeypatch, after):
    """eval_niah.answer, which ctrl-C ends in the batch after so many. -> the methods of each batch asked"""
    answer, asked = eval_niah.answer, []

    def stopped(model, tokenizer, examples, methods, *rest):
        if len(asked) == after:
            raise KeyboardInterrupt
        asked.append([sparse.name(method) for method in methods])
        return answer(model, tokenizer, examples, methods, *rest)

    monkeypatch.setattr(eval_niah, "answer", stopped)
    return asked


def test_a_run_that_ctrl_c_stops_goes_on_to_the_same_results(undisturbed, capsys):
    """Answers asked again, or lost; hits of a batch counted twice; a report of the last part alone."""
    for n in 1, 5, 5, N_BATCHES:
        with pytest.MonkeyPatch.context() as patch:
            asked = stopping(patch, after=n)
            if n < N_BATCHES:
                with pytest.raises(SystemExit) as end:
                    eval_niah.main([*ASKED, "--out=eval"])
                assert end.value.code == 130 and "--out eval" in capsys.readouterr().err and len(asked) == n
                assert not Path("eval/results.json").exists()
            else:
                eval_niah.main([*ASKED, "--out=eval"])
                assert len(asked) == N_BATCHES - 1 - 5 - 5
    assert told() == undisturbed
    with pytest.MonkeyPatch.context() as patch:  # once more: nothing is left, and no model is loaded
        patch.setattr(Transformer, "from_pretrained", lambda *_: pytest.fail("loaded"))
        eval_niah.main([*ASKED, "--out=eval"])
    assert told() == undisturbed


def test_a_line_that_a_kill_cut_off_is_asked_again(undisturbed):
    """kill -9 in the middle of a write: a run that cannot go on, or a line glued to the torn one."""
    lines = Path("whole/answers-0.jsonl").read_bytes().splitlines(keepends=True)
    for n, torn in (2, lines[2][:-1]), (30, lines[30][:5]), (len(lines) - 1, lines[-1][:-9]), (0, b"{"):
        shutil.copytree("whole", "eval", dirs_exist_ok=True)
        Path("eval/answers-0.jsonl").write_bytes(b"".join(lines[:n]) + torn)
        eval_niah.main([*ASKED, "--out=eval"])
        assert told() == undisturbed
        seconds = lambda line: json.loads(line) | {"sha256": 0, "told": {k: v for k, v in json.loads(line)["told"].items() if k != "seconds"}}
        now = Path("eval/answers-0.jsonl").read_bytes().splitlines()
        assert sorted(map(str, map(seconds, now))) == sorted(map(str, map(seconds, lines)))


def test_another_damaged_line_is_named(undisturbed, capsys):
    """A traceback; or answers dropped that a disk, not a kill, has lost."""
    Path("whole").rename("eval")
    file = Path("eval/answers-0.jsonl")
    lines = file.read_bytes().splitlines()
    for damaged in lines[6][:40], b"\0" * 20, b"[]", lines[6].replace(b'"told"', b'"tald"'):
        file.write_bytes(b"\n".join([*lines[:6], damaged, *lines[7:]]) + b"\n")
        with pytest.raises(SystemExit) as end:
            eval_niah.main([*ASKED, "--out=eval"])
        line = capsys.readouterr().err
        assert end.value.code == 2 and line.count("\n") == 1 and "eval/answers-0.jsonl line 7 is damaged" in line and "delete that line" in line
    file.write_bytes(b"\n".join([*lines[:6], *lines[7:]]) + b"\n")
    eval_niah.main([*ASKED, "--out=eval"])
    assert told() == undisturbed


def test_a_run_that_was_stopped_before_its_first_answer_binds_no_one(runs, monkeypatch):
    """A folder to be deleted by hand, though nothing is in it. Predictions beside --out, as a model is called .."""
    few = ["--tasks", "niah_single_1", "--max_new_tokens=12", "--device=cpu", "--methods", "quest:budget=1/4", f"--out={runs / 'eval'}"]
    Path("checkpoints/memory/inner").mkdir()
    monkeypatch.chdir("checkpoints/memory/inner")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stopping(patch, after=0)
        eval_niah.main([*few, "--samples=1", "--ckpt", ".."])
    eval_niah.main([*few, "--samples=2", "--ckpt", ".."])
    assert (runs / "eval/memory/dense/niah_single_1.jsonl").exists() and told(runs / "eval")["results"][0]["n"] == 2


def refused(capsys, *flags):
    with pytest.raises(SystemExit) as end:
        eval_niah.main([*ASKED, "--out=whole", *flags])
    line = capsys.readouterr().err
    assert end.value.code == 2 and line.count("\n") == 1 and len(line) < 700 and "another --out" in line, line
    return line


def test_a_folder_of_other_settings_is_refused(undisturbed, capsys, monkeypatch):
    """A table of two runs that were asked different things."""
    Path("words.txt").write_text("A text of one's own. " * 9)
    niah.write_jsonl("niah_single_1.jsonl", make("niah_single_1", n=2, new=12))
    before = Path("whole/answers-0.jsonl").read_bytes()
    for flags in (["--samples=4"], ["--seed=1"], ["--context_len=576"], ["--max_new_tokens=13"], ["--protocol=sft"], ["--dtype=bfloat16"],
                  ["--kernels=torch"], ["--haystack=words.txt"], ["--tasks", "niah_single_1"], ["--ckpt", "checkpoints/memory"],
                  ["--ckpt", "checkpoints/attention", "out/mine"]):
        assert f"{flags[0].split('=')[0]} was" in refused(capsys, *flags)
    assert "--tasks was" in refused(capsys, "--jsonl", "niah_single_1.jsonl")
    monkeypatch.setattr(niah, "NOISE", "The grass is blue.")
    assert "what is asked in niah_single_1" in refused(capsys)
    assert Path("whole/answers-0.jsonl").read_bytes() == before


def without(monkeypatch, package):
    """As if it were not installed."""
    monkeypatch.setattr(words.resources, "files", lambda name: (_ for _ in ()).throw(ModuleNotFoundError(package)))
    niah.word_lists.cache_clear()


def test_what_is_installed_meanwhile_changes_no_prompt(undisturbed, capsys, monkeypatch):
    """pip install wonderwords, which the tests' requirements bring, and no --out goes on."""
    with monkeypatch.context() as patch:
        without(patch, "wonderwords")
        eval_niah.main([*ASKED, "--out=whole"])
    niah.word_lists.cache_clear()
    eval_niah.main([*ASKED, "--out=whole"])
    assert files.load("whole/results.json")["speed"]["answers"] == 0
    without(monkeypatch, "wonderwords")
    with pytest.raises(SystemExit):
        eval_niah.main([*ASKED, "--words=wonderwords", "--out=eval"])
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "pip install wonderwords" in line
    niah.word_lists.cache_clear()


def test_other_prompts_are_refused_with_their_cause(undisturbed, capsys, monkeypatch):
    """Two hashes, and nothing about what made them differ."""
    asked = files.load("whole/asked.json", "made_of")
    assert asked["made_of"]["--words"] == "built-in" and asked["made_of"]["words of keys"] == ["built-in words"]
    if importlib.util.find_spec("wonderwords"):
        line = refused(capsys, "--words=wonderwords")
        assert "what is asked in niah_single_1" in line and "--words was built-in, now wonderwords" in line
    monkeypatch.setattr(niah, "NOISE", "The grass is blue.")
    assert "so the code that makes them is not" in refused(capsys)
    monkeypatch.setattr(answers.platform, "python_version", lambda: "3.99.1")
    assert "Python was 3." in (line := refused(capsys)) and "now 3.99.1" in line and "--words was" not in line
    files.save({name: value for name, value in asked.items() if name != "made_of"}, "whole/asked.json")
    assert "--words=wonderwords" in refused(capsys)  # what an older version has made says less
    monkeypatch.setattr(niah, "NOISE", "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.")
    eval_niah.main([*ASKED, "--out=whole"])  # and goes on where prompts are the same, whatever Python
    assert told("whole")["results"] == undisturbed["results"]


def test_a_file_is_the_same_however_its_path_is_spelled(runs):
    """A refusal of ./words.txt after words.txt."""
    Path("words.txt").write_text("A text of one's own. " * 99)
    few = ["--ckpt", "out/mine", "--samples=1", "--max_new_tokens=12", "--device=cpu", "--out=a", "--methods=dense"]
    niah.write_jsonl("niah_single_2.jsonl", make("niah_single_2", 1, new=12))
    for flag, file in ("--haystack", "words.txt"), ("--jsonl", "niah_single_2.jsonl"):
        for spelled in file, f"./{file}", str(Path(file).resolve()), f"out/../{file}":
            eval_niah.main([*few, f"--out=a{flag}", *(["--tasks", "S-2"] if flag == "--haystack" else []), flag, spelled])
        assert len(files.load(f"a{flag}/asked.json")["calls"]) == 4


def test_blank_lines_and_a_byte_order_mark_are_no_damage(undisturbed, monkeypatch):
    """An editor's mark, or its line ends, refused by one reader and taken by another."""
    file = Path("whole/answers-0.jsonl")
    lines = file.read_bytes().splitlines()
    file.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join([*lines[:4], b"", b"  ", *lines[4:]]) + b"\r\n\r\n")
    monkeypatch.setattr(eval_niah, "answer", lambda *_: pytest.fail("asked again"))
    eval_niah.main([*ASKED, "--out=whole"])
    assert told("whole")["results"] == undisturbed["results"]


def test_a_model_that_was_trained_again_is_refused_and_a_copy_is_not(undisturbed, capsys):
    """Half a table of the old weights: the path, and the files' sizes, are the same. All work lost for other dates."""
    for file in Path("checkpoints/memory").iterdir():
        os.utime(file, (0, 0))
    eval_niah.main([*ASKED, "--out=whole"])
    assert told("whole")["results"] == undisturbed["results"]
    small(seed=1, memory=True, context_len=CONTEXT).save_pretrained("checkpoints/memory")
    assert "--ckpt memory (" in refused(capsys)


def test_hash_of_files_tells_models_apart(tmp_path):
    """Ours by the hash in their head, whose truth is asked by who loads them; others' by all of their bytes."""
    from safetensors.torch import load_file, save_file
    found = []
    for seed in 0, 1:
        file = tmp_path / str(seed) / "model.safetensors"
        small(seed=seed, context_len=CONTEXT).save_pretrained(file.parent)
        found += [answers.hash_of_files([file]), answers.hash_of_files([file])]
        save_file(load_file(file), file)
        found += [answers.hash_of_files([file])]
        changed = bytearray(file.read_bytes())
        changed[-1] ^= 1
        file.write_bytes(changed)
        found += [answers.hash_of_files([file])]
    assert found[0] == found[1] and found[4] == found[5] and len(set(found)) == 6


def test_the_speed_told_is_of_the_answers_of_this_run(undisturbed, monkeypatch):
    """A rate that counts answers which were there before, or the loading."""
    again = lambda: (eval_niah.main([*ASKED, "--out=whole"]), files.load("whole/results.json")["speed"])[1]
    load, ask, clock = eval_niah.Transformer.from_pretrained, eval_niah.ask, [0.0]
    tick = lambda seconds: clock.__setitem__(0, clock[0] + seconds)
    monkeypatch.setattr(eval_niah.time, "time", lambda: clock[0])
    monkeypatch.setattr(eval_niah.Transformer, "from_pretrained", lambda *given: tick(5) or load(*given))
    monkeypatch.setattr(eval_niah, "ask", lambda *given: tick(3) or ask(*given))
    assert again()["answers"] == 0
    lines = Path("whole/answers-0.jsonl").read_bytes().splitlines(keepends=True)
    Path("whole/answers-0.jsonl").write_bytes(b"".join(lines[:-2]))
    speed = again()
    assert speed == {"answers": 2, "seconds": 3, "seconds_of_loading": 5}


def test_more_methods_are_more_work_and_fewer_are_none(undisturbed, monkeypatch):
    """Answers that are there, asked again for a new column; a column that was not asked for."""
    without = [flag for flag in ASKED[:-1] if flag not in ("--hits", "--random=1")]
    eval_niah.main([*without, "--out=eval"])
    asked = stopping(monkeypatch, after=99)
    eval_niah.main([*ASKED, "--out=eval", "--batch=4"])  # of batches that overlap with the old ones
    assert len(asked) == 2 * 2 * 2 and all(methods == ["moba:budget=64,block_size=8", "quest:budget=128,block_size=8,random=0"] for methods in asked)
    report = told()
    for of in report, undisturbed:
        assert of["calls"][-1]["command"] == of["command"]
        del of["settings"], of["command"]
    assert len(report.pop("calls")) == 2 and len(undisturbed.pop("calls")) == 1
    assert report == undisturbed
    eval_niah.main([*without, "--out=eval"])
    assert told()["results"] == [row | {"hits": None} for row in undisturbed["results"] if row["method"] != "moba:budget=1/8,block_size=8"
                                 and row["random"] is None] and len(asked) == 2 * 2 * 2


def two_processes(*flags, change=""):
    """eval_niah.py with these flags, after a change to it, in two processes."""
    Path("ranks.py").write_text(f"import glob, os, signal, sys; sys.path.insert(0, {os.path.dirname(eval_niah.__file__)!r})\n"
                                f"import torch; torch.set_num_threads(1)\nimport eval_niah\n{change}\neval_niah.main()\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "ranks.py"]
    return subprocess.run([*command, *ASKED, *flags], capture_output=True, text=True, timeout=1200)


def test_two_processes_answer_like_one_and_go_on_where_one_was_stopped(undisturbed, monkeypatch):
    """Batches that no rank takes, or two do; a report before the other is done; two reports."""
    stopping(monkeypatch, after=3)
    with pytest.raises(SystemExit):
        eval_niah.main([*ASKED, "--out=eval"])
    before = Path("eval/answers-0.jsonl").read_bytes()
    result = two_processes("--out=eval")
    assert result.returncode == 0 and result.stdout.count("results in") == result.stdout.count("answers of up to") == 1, result.stderr[-4000:]
    first, second = (Path(f"eval/answers-{rank}.jsonl").read_bytes() for rank in (0, 1))
    per_batch = before.count(b"\n") / 3
    assert first.startswith(before) and first.count(b"\n") > 6 * per_batch and second.count(b"\n") > 3 * per_batch
    report = told()
    assert report["device"] == f"2 x {undisturbed['device']}" and report["results"] == undisturbed["results"]


KILL = """
original, calls = eval_niah.answer, []
def killed(*args):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 3:
        with open(*glob.glob("out/niah-*/answers-1.jsonl"), "ab") as file:
            file.write(b'{"checkpoint": "att')
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args)
eval_niah.answer = killed
"""


def test_one_process_goes_on_where_two_were_killed(undisturbed):
    """A rank that waits for a dead one; ranks that write into folders of their own; what another rank left, overlooked."""
    result = two_processes(change=KILL)
    assert result.returncode != 0 and "results in" not in result.stdout
    out, = Path("out").glob("niah-*")
    torn = (out / "answers-1.jsonl").read_bytes()
    assert torn.count(b"\n") > 8 and not torn.endswith(b"\n")
    eval_niah.main([*ASKED, f"--out={out}"])
    assert told(out)["results"] == undisturbed["results"] and (out / "answers-1.jsonl").read_bytes() == torn


@pytest.mark.parametrize("batch, sizes", [(2, [2, 2, 2]), (4, [4, 4]), (16, [5])])
def test_on_a_gpu_all_batches_are_of_one_size(monkeypatch, batch, sizes):
    """A CUDA graph of another number of rows; the answer of a row that fills up, in a table."""
    examples, model, seen = {"m": {"niah_single_2": make(n=5)}}, small(), []
    by_name = {sparse.name(method): method for method in METHODS[:2]}
    answer = eval_niah.answer
    monkeypatch.setattr(eval_niah, "answer", lambda m, t, some, *rest: seen.append(len(some)) or answer(m, t, some, *rest))
    lines = {}
    for device in "cpu", "cuda":
        for todo in answers.unanswered(examples, by_name, batch, {}):
            args = SimpleNamespace(device=device, batch=batch)
            lines.setdefault(device, []).extend(line._replace(told=line.told["text"]) for line in
                                                eval_niah.ask(model, Bytes(), examples[todo.checkpoint][todo.task], todo, by_name, args, None)[0])
    assert seen[len(sizes):] == sizes and lines["cpu"] == lines["cuda"] and len(lines["cpu"]) == 5 * 2
