"""
eval_niah.py: numbers that a table may rest on. Scores of perfect and mute models, batches, what is
read, H1, files, runs that stop and go on. Flags that are refused: test_refusals.py; figures worked
by hand: test_report_tables.py.
"""
import copy
import importlib.util
import json
import math
import os
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
from infra import answers, cli, files, runlog, tokenizers, weights
from model import Transformer

CONTEXT = 512


def method(text):
    return sparse.parse(cli.sized(text, CONTEXT, Bytes(), sparse.METHODS), CONTEXT)


METHODS = [*map(method, ("dense", "quest:budget=1/4", "moba:budget=1/4", "snapkv:budget=1/4",
                         "moba:budget=1/4+snapkv:budget=1/4+quest:budget=1/8", "dilated:local=32"))]


def make(task="niah_single_2", n=3, protocol="base", tokenizer=Bytes(), context_len=CONTEXT,
         new=48):
    return [niah.make_example(task, context_len, tokenizer, 0, i, protocol, max_new_tokens=new)
            for i in range(n)]


def small(**changes):
    return tiny(vocab_size=257, **changes)


def writes(model, say, examples):
    """The model, but it answers each prompt with the ids that say(example) gives."""
    by_ids = {tuple(e.ids): e for e in examples}

    def prefill(tokens, lengths, cache, sparse, watch):
        return [by_ids[tuple(row[:n])] for row, n in zip(tokens.tolist(), lengths.tolist())]

    def decode(asked, cache, max_new_tokens, sparse, eos_id, watch):
        rows = [say(e)[:max_new_tokens] for e in asked]
        return torch.tensor([row + [eos_id] * (max_new_tokens - len(row)) for row in rows])

    model.prefill, model.decode = prefill, decode
    return model


# ---------------------------------------------------------------- answers

@pytest.mark.parametrize("protocol", niah.PROTOCOLS)
def test_a_gold_answer_scores_100_and_an_empty_one_0_in_every_task(protocol):
    """Answers that go to another prompt, or lose their ends, from the model to the scores."""
    for task in niah.TASKS:
        examples = make(task, 5, protocol, context_len=1024)
        for say, percent in ((lambda e: Bytes().encode(e.target) + [Bytes.eos_id], 100),
                             (lambda e: [Bytes.eos_id], 0)):
            model = writes(small(), say, examples)
            for outcome in ways.evaluate(model, Bytes(), examples, METHODS[:3], batch=2).values():
                found = eval_niah.scores(outcome.texts, examples)
                assert found["ruler"][0] == found["paper"][0] == percent, (task, outcome.texts)
                tenths = eval_niah.by_depth(outcome.texts, examples)
                assert sum(n for n, _ in tenths) == sum(len(e.answers) for e in examples)
                assert all(p == percent for n, p in tenths if n)


def texts(*args, **kwargs):
    return {method: outcome.texts for method, outcome in ways.evaluate(*args, **kwargs).items()}


@pytest.mark.parametrize("form", [dict(), dict(memory=True, n_kv_head=2)],
                         ids=["attention", "memory gqa"])
def test_answers_do_not_depend_on_order_or_batch(form):
    """Padding that leaks; a sample's or method's mark on the next; chance that is no seed's."""
    model, draws = small(**form), [sparse.randomized(METHODS[n], 0) for n in (1, 2, 3)]
    examples = make(n=3) + make("niah_single_1", 2) + make("niah_multikey_2", 2)
    alone = texts(model, Bytes(), examples, METHODS + draws, batch=1)
    assert len({*alone[METHODS[0]]}) > 4, "it says the same to all: the test would see nothing"
    assert texts(model, Bytes(), examples, METHODS, batch=4) == {m: alone[m] for m in METHODS}
    turned = texts(model, Bytes(), examples[::-1], draws + METHODS[::-1], batch=4)
    assert {method: of_all[::-1] for method, of_all in turned.items()} == alone
    for n in 1, 2, 3:  # two seeds may write the same
        others = [sparse.randomized(METHODS[n], seed) for seed in range(1, 4)]
        drawn = texts(model, Bytes(), examples[:2], others).values()
        assert len({tuple(alone[draws[n - 1]][:2]), *map(tuple, drawn)}) > 1


# ---------------------------------------------------------------- what was read

def test_reads_are_measured_and_within_the_budget():
    """A share read that is believed. Dense, SnapKV, MoBA and Quest are counted by hand."""
    model, (example,) = small(), make(n=1)
    found = ways.evaluate(model, Bytes(), [example], METHODS)
    dense, quest, moba, snapkv, combined, dilated = (found[method] for method in METHODS)
    # this model does not end by itself; the first of 48 tokens is the prefill's
    T, steps = len(example.ids), 47
    assert dense.read == [T + (steps + 1) / 2]  # T + 1 to T + steps
    assert dense.prompt_read == snapkv.prompt_read == [(T + 1) / 2]
    assert snapkv.read == [128 + (steps + 1) / 2]
    current = [(T + s) % 8 + 1 for s in range(steps)]  # entries of the block that is being filled
    assert quest.read[0] == pytest.approx(sum(120 + n for n in current) / steps)
    of_moba = sum(min(t + 1, 120 + t % 8 + 1) for t in range(T)) / T
    assert moba.prompt_read[0] == pytest.approx(of_moba)
    assert moba.read == dense.read and combined.prompt_read == moba.prompt_read
    assert combined.read[0] <= 64 and 32 < dilated.read[0] < T and dilated.prompt_read == [None]


def all_blocks(self, q, k, v, start, dice):
    blocks = torch.arange(math.ceil(k.shape[1] / self.block_size))
    blocks = blocks.expand(len(q), k.shape[2], q.shape[1], -1)
    return sparse.attend(q, k, v, causal=True), blocks


@pytest.mark.parametrize("kind, phase, without", [
    (sparse.Quest, "decode", lambda *given: sparse.Dense.decode(*given)),
    (sparse.MoBA, "prefill", all_blocks), (sparse.SnapKV, "compress", lambda *_: None)])
def test_a_method_that_is_silently_off_ends_the_run(kind, phase, without):
    """A fine score that was dense all along."""
    off = type(kind.__name__, (kind,), {phase: without})
    with pytest.raises(ValueError, match="(read|kept) .* entries .*, more than its budget"):
        ways.evaluate(small(), Bytes(), make(n=1), [off(128, 8)])


# ---------------------------------------------------------------- H1

@pytest.mark.parametrize("protocol", niah.PROTOCOLS)
@pytest.mark.parametrize("name", ["bytes", "pairs", "cl100k"])
def test_sources_point_at_the_tokens_that_are_copied(name, protocol):
    """H1 of the wrong place: shifted by the answer's opening, or in another answer's needle."""
    tokenizer, different = tokenizer_of(name), []
    for task in niah.TASKS:
        e, = make(task, 1, protocol, tokenizer, context_len=1024)
        target, found = eval_niah.sources(e, tokenizer)
        assert tokenizer.decode(target) == e.target
        assert {s.answer for s in found if s} == set(range(len(e.answers)))
        for token, s in zip(target, found):
            if s is None:
                text = set(tokenizer.decode([token]))
                assert not text & set("0123456789abcdef-"), "of an answer, and without source"
                continue
            start, end = e.spans[s.answer]
            assert start <= s.low < s.high <= end
            assert tokenizer.decode([token]).strip(", ") in tokenizer.decode(e.ids[s.low:s.high])
            assert name != "bytes" or s.high == s.low + 1
            if e.ids[s.low:s.high] != [token]:
                different.append(token)
    assert len(different) < 10, "needle and answer are cut alike, but for their ends"


class Half(Bytes):
    """A tokenizer with a prefix space, of three bytes a token: they end inside characters."""
    name = "half"

    def encode(self, text):
        raw = (" " + text).encode()
        return [int.from_bytes(raw[i:i + 3], "big") for i in range(0, len(raw), 3)]

    def pieces(self, ids):
        return [i.to_bytes(max(1, math.ceil(i.bit_length() / 8)), "big") for i in ids]

    def decode(self, ids):
        return b"".join(self.pieces(ids)).decode(errors="replace")


@pytest.mark.parametrize("tokenizer", [Bytes(), Half()], ids=lambda tokenizer: tokenizer.name)
@pytest.mark.parametrize("answer", ["naïve", "Ω☃Ω", "\U0001f600\U0001f600", "1234567"])
def test_sources_of_tokens_that_end_inside_a_character(tmp_path, answer, tokenizer):
    """Positions counted in characters of a text cut inside one: hits of other places."""
    file = tmp_path / "niah_single_1.jsonl"
    for filler in "é", "éé", "☃é":
        asked = f"{filler} The number for ☃ is: {answer}. {filler} What is it?"
        row = {"index": 0, "input": asked, "outputs": [answer]}
        file.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
        e, = niah.read_jsonl(file, tokenizer, "sft")
        target, found = eval_niah.sources(e, tokenizer)
        written, prompt = niah.pieces(tokenizer, target), niah.pieces(tokenizer, e.ids)
        # the answer's first byte in what is written, and in the prompt
        at = b"".join(written).index(answer.encode())
        before = b"".join(prompt).index(answer.encode())
        ends = [len(b"".join(prompt[:i])) for i in range(len(prompt) + 1)]
        for j, s in enumerate(found):
            low, high = len(b"".join(written[:j])), len(b"".join(written[:j + 1]))
            first, last = max(low, at), min(high, at + len(answer.encode())) - 1
            if last < first:
                assert s is None
                continue
            first, last = first - at + before, last - at + before  # the bytes in the prompt
            assert ends[s.low] <= first < ends[s.low + 1], (answer, filler, j)
            assert ends[s.high - 1] <= last < ends[s.high], (answer, filler, j)


@dataclass(frozen=True)
class Keeps(sparse.SnapKV):
    """Drops the positions first to last - 1 in KV head 1, and as many at the start in head 0."""
    first: int = 0
    last: int = 1

    def compress(self, q, k, v, lengths, dice):
        positions, n = torch.arange(k.shape[1]), self.last - self.first
        others = torch.cat([positions[:self.first], positions[self.last:]])
        return torch.stack([positions[n:], others])[None]


def rates(model, examples, method, batch):
    """The share of answers that each head hits, (layers, KV)."""
    hit = []
    for rows in answers.by_length(examples, batch):
        some = [examples[i] for i in rows]
        _, found, _ = eval_niah.answer(model, Bytes(), some, [], None, [method])
        hit += found[method]
    return torch.cat(hit).float().mean(0)


def test_a_head_hits_an_answer_if_it_reads_its_place_at_every_step(monkeypatch):
    """All selected is 1, nothing is 0, and one missing token of an answer is a miss."""
    model, fed = small(n_kv_head=2), []
    examples = make("niah_single_3", 3) + make("niah_single_2", 2)
    rate = lambda method, of=examples: rates(model, of, method, batch=2).tolist()
    all_of_it = sparse.SnapKV(CONTEXT, 8)
    for method in all_of_it, sparse.Quest(CONTEXT, 8), sparse.Compose(compress_by=all_of_it):
        assert rate(method) == [[1, 1], [1, 1]]
    assert rate(sparse.Dilated(None, local=2, initial=4)) == [[0, 0], [0, 0]]

    for protocol, missed in ("base", 0), ("sft", 1):  # "sft": the first token is the prefill's
        example, = make("niah_single_3", 1, protocol)
        start, end = example.spans[0]
        for first, last, of_head in ((start, end, 0), (start, start + 1, missed),
                                     (end - 1, end, 0), (end, end + 1, 1)):
            keeps = Keeps(CONTEXT, 8, 5, None, first, last)
            assert rate(keeps, [example]) == [[1, of_head], [1, of_head]]
    example, = make("niah_multivalue", 1, context_len=2 * CONTEXT)
    keeps = Keeps(2 * CONTEXT, 8, 5, None, *example.spans[1])  # of four answers
    step = model.step
    monkeypatch.setattr(model, "step",
                        lambda tokens, *rest: fed.extend(tokens.tolist()) or step(tokens, *rest))
    assert rate(keeps, [example]) == [[1, 0.75], [1, 0.75]]
    assert fed == Bytes().encode(example.target)[:-1]


def test_hits_do_not_depend_on_the_batch():
    """Answers of different lengths: a row that is done and still fed."""
    model = small(memory=True)
    examples = make("niah_single_3", 2) + make("niah_single_2", 2)
    for text in ("quest:budget=1/2", "snapkv:budget=1/2",
                 "moba:budget=1/2+snapkv:budget=1/2+quest:budget=192"):
        together, alone = (rates(model, examples, method(text), batch) for batch in (4, 1))
        assert torch.equal(together, alone) and 0 < together.mean() < 1


# ---------------------------------------------------------------- a batch of what is missing

def ask(model, examples, by_name, device="cpu", size=4, there=()):
    """eval_niah.ask of all that is missing, with --batch=size -> Lines"""
    args = SimpleNamespace(device=device, batch=size, blind=None)
    return [line for batch in answers.unanswered({"m": {"S": examples}}, by_name, size, dict(there))
            for line in eval_niah.ask(model, Bytes(), examples, batch, by_name, args, None)[0]]


def test_one_prefill_serves_all_that_prefill_alike(monkeypatch):
    """Under --hits a prefill for each method once more: at 7B most of the time."""
    model, examples, prefills = small(memory=True), make(n=3), []
    asked = METHODS + [sparse.randomized(METHODS[3], seed) for seed in range(2)]
    by_name = {f"H1 {sparse.name(m)}": m for m in (METHODS[1], *METHODS[3:])}
    by_name |= {sparse.name(m): m for m in asked}
    prefill = model.prefill
    monkeypatch.setattr(model, "prefill", lambda *given, **more: prefills.append(given[3])
                        or prefill(*given, **more))
    lines = ask(model, examples, by_name)
    # dense, MoBA, Dilated
    assert len(prefills) == len({sparse.phases(m).prefill_by for m in asked}) == 3
    assert {line.method for line in lines} == by_name.keys()
    for line in lines:  # as each alone
        if line.method.startswith("H1 "):
            found = torch.tensor(line.told["hits"]) / line.told["answers"]
            assert torch.equal(found, rates(model, examples, by_name[line.method], 1)), line.method


def test_hits_of_what_is_missing_alone_are_counted():
    """Answers counted twice: of rows that were told before, or that fill a batch up."""
    model, examples, quest = small(memory=True), make(n=3), METHODS[1]
    name = f"H1 {sparse.name(quest)}"
    alone = [rates(model, [e], quest, 1) for e in examples]
    for there, wanted in ({}, [0, 1, 2]), ({0: None}, [1, 2]), ({0: None, 2: None}, [1]):
        line, = ask(model, examples, {name: quest}, "cuda", there={("m", "S", name): there})
        assert line.examples == wanted and line.told["answers"] == len(wanted)
        assert line.told["hits"] == sum(alone[i] for i in wanted).tolist()


@pytest.mark.parametrize("batch, sizes", [(2, [2, 2, 2]), (4, [4, 4]), (16, [5])])
def test_on_a_gpu_all_batches_are_of_one_size(monkeypatch, batch, sizes):
    """A CUDA graph of another number of rows; the answer of a row that fills up, in a table."""
    examples, model, seen, answer = make(n=5), small(), [], eval_niah.answer
    by_name = {sparse.name(method): method for method in METHODS[:2]}
    monkeypatch.setattr(eval_niah, "answer", lambda model, tokenizer, some, *rest:
                        seen.append(len(some)) or answer(model, tokenizer, some, *rest))
    on_cpu, on_gpu = ([line._replace(told=line.told["text"])
                       for line in ask(model, examples, by_name, device, batch)]
                      for device in ("cpu", "cuda"))
    assert seen[len(sizes):] == sizes
    assert on_cpu == on_gpu and len(on_cpu) == 5 * 2


# ---------------------------------------------------------------- the command

def run(*flags, out="eval"):
    """eval_niah.py on a CPU. -> results.json"""
    eval_niah.main([*flags, "--device=cpu", f"--out={out}"])
    return files.load(Path(out) / "results.json")


def refused(capsys, *flags, out="eval"):
    """The line by which it ends."""
    with pytest.raises(SystemExit) as end:
        run(*flags, out=out)
    line = capsys.readouterr().err
    assert end.value.code == 2 and line.count("\n") == 1 and len(line) < 700, line
    return line


def outcome(out="eval"):
    """The report in a folder, but for the time it took; and what its predictions are."""
    report = files.load(Path(out) / "results.json")
    assert report.pop("speed")["seconds"] >= 0
    for row in report["results"]:
        del row["seconds"]
        row["predictions"] = Path(row["predictions"]).read_text()
    return report


FEW = ["--ckpt", "checkpoints/attention", "checkpoints/memory", "--tasks", "niah_single_1",
       "niah_single_2", "--samples=5", "--batch=2", "--max_new_tokens=12",
       "--methods", "quest:budget=1/4"]
ASKED = [*FEW, "moba:budget=1/8", "--hits", "--random=1"]
N_BATCHES = 2 * 2 * 3


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """
    checkpoints/ as they come with the code, out/ as train.py leaves it, with two runs, and whole/,
    of an evaluation that nothing stops -> the folder, and what that evaluation to eval/ tells
    """
    folder, settings = tmp_path_factory.mktemp("made"), {"protocol": "base", "tokenizer": None}
    names = ["checkpoints/attention", "checkpoints/memory",
             *(f"out/{run}/step_000000{step}" for run in ("old", "mine") for step in (1, 2))]
    for age, name in enumerate(names):
        small(memory=age > 0, context_len=CONTEXT).save_pretrained(folder / name)
        record = folder / name / "train.json"
        record.write_text(json.dumps({"step": 1, "settings": settings}))
        os.utime(record, (1e9 + age, 1e9 + age))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(eval_niah, "plot", lambda *_: None)  # takes a second
        run(*ASKED)
        report = outcome()
    (folder / "eval").rename(folder / "whole")
    return folder, report


@pytest.fixture
def runs(made, tmp_path, monkeypatch):
    """A folder of one's own with these models."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runlog, "SHIPPED", [tmp_path / "checkpoints" / name
                                            for name in ("attention", "memory")])
    shutil.copytree(made[0], tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture
def undisturbed(made, runs, monkeypatch):
    """Likewise; what the evaluation in whole/ told."""
    monkeypatch.setattr(eval_niah, "plot", lambda *_: None)
    return copy.deepcopy(made[1])


def test_with_no_checkpoint_it_compares_what_comes_with_the_code_and_the_newest_run(runs,
                                                                                   monkeypatch):
    """One's own run of another task, length or vocabulary, whose scores would mean nothing."""
    names = lambda: [path.name for path in runlog.known_models()]
    assert names() == ["attention", "memory", "mine"]
    for file, old, new in (("train.json", "base", "sft"),
                           ("config.json", f'"context_len": {CONTEXT}', '"context_len": 256')):
        file = runs / "out/mine/step_0000002" / file
        text = file.read_text()
        content = {name: value for name, value in json.loads(text).items() if name != "sha256"}
        file.write_text(json.dumps(content).replace(old, new))
        assert json.dumps(content) != file.read_text() and names() == ["attention", "memory"]
        file.write_text(text)
    read = weights.read  # a vocabulary that the shapes of the weights would not match
    monkeypatch.setattr(weights, "read", lambda path, **more: (
        read(path)[0] | ({"vocab_size": 1000} if "mine" in str(path) else {}), {}))
    assert names() == ["attention", "memory"]


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """A folder with two models of 4,096 bytes that come with the code, and another one."""
    monkeypatch.chdir(tmp_path)
    for name in "attention", "memory", "mine":
        small(context_len=4096).save_pretrained(name)
    monkeypatch.setattr(runlog, "SHIPPED", [tmp_path / "attention", tmp_path / "memory"])


def questions(*flags, device="cpu"):
    """What these flags ask: tokens, samples, tasks, how many methods, and whether H1."""
    args = eval_niah.flags().parse_args([*flags, "--device=cpu"])
    args.device = device
    labels, tokenizers, methods = eval_niah.prepare(args)
    tasks = args.jsonl or eval_niah.choose_tasks(args, tokenizers.values())
    return args.context_len, args.samples, len(tasks), len(methods), args.hits


LOOK, ALL = (2048, 16, 3, 5, True), (4096, 2, 8, 10, False)


@pytest.mark.parametrize("flags, asked", [
    ([], LOOK), (["--seed=7", "--hits", "--out=x"], LOOK),
    (["--samples=50"], (2048, 50, 3, 5, True)), (["--tasks", "S-1"], (2048, 16, 1, 5, True)),
    (["--context_len=4096"], (4096, 16, 3, 5, True)),
    (["--context_len=512"], (512, 16, 1, 5, True)),  # where MK-2 alone has room
    (["--methods", "quest:budget=1/4"], (2048, 16, 3, 2, True)),
    (["--ckpt", "mine"], ALL), (["--ckpt", "attention", "memory"], ALL), (["--random=2"], ALL),
    (["--ckpt", "mine", "--hits"], (*ALL[:-1], True)),
    (["--jsonl", "a.jsonl"], (4096, 2, 1, 10, False))], ids=lambda of: " ".join(map(str, of)))
def test_without_a_model_a_cpu_asks_a_first_look(shipped, flags, asked):
    """A first command of an hour; a flag that changes another one's meaning, or an experiment's."""
    assert questions(*flags) == asked


def test_without_a_model_a_gpu_asks_all(shipped):
    """A first look for a table; H1 left out, or asked of models that nobody wanted it of."""
    assert questions(device="cuda") == (4096, 200, 8, 10, True)
    assert questions("--ckpt", "mine", device="cuda") == (4096, 200, 8, 10, False)


def test_a_first_look_tells_how_long_it_takes(shipped, capsys, monkeypatch):
    """Minutes for what is there already, or of another number of samples."""
    monkeypatch.setattr(eval_niah, "TOKENS_A_MINUTE", 1000)
    monkeypatch.setattr(eval_niah, "plot", lambda *_: None)
    few = ["--context_len=512", "--tasks", "S-1", "S-2", "--max_new_tokens=12", "--samples=3",
           "--methods", "quest:budget=1/4"]
    for minutes in "6 minutes", "1 minute":  # twelve prompts of some 500 tokens; none is left
        run(*few)
        assert f"a first look: about {minutes} on two" in capsys.readouterr().out
    run("--ckpt", "mine", *few, out="other")
    assert "first look" not in capsys.readouterr().out


def test_the_checkpoints_that_come_with_the_code_find_a_needle():
    """A file missing from the repository, or not the model that its train.json tells of."""
    every_file = [file for folder in runlog.SHIPPED for file in folder.iterdir()]
    assert sum(file.stat().st_size for file in every_file) < 25e6
    examples = [niah.make_example("niah_single_2", 4096, Bytes(), seed=3, index=0, protocol="sft",
                                  max_new_tokens=12)]
    for folder, has_memory in zip(runlog.SHIPPED, (False, True), strict=True):
        model, made = Transformer.from_pretrained(folder), runlog.training_record(folder)
        assert bool(model.config.memory) == has_memory
        assert made["settings"]["recipe"] == "micro-sft"
        assert made["step"] == made["settings"]["steps"]
        assert made["from"]["settings"]["memory"] == ("on" if has_memory else "off")
        outcome, = ways.evaluate(model.float(), Bytes(), examples, [sparse.Dense()]).values()
        assert eval_niah.scores(outcome.texts, examples)["ruler"][0] == 100


def test_results_hold_what_a_reader_needs_to_repeat_them(runs, capsys):
    """A JSON without commit, prompts or dtype; predictions that do not give its scores."""
    report = run("--samples=2", "--tasks", "niah_single_1", "niah_single_2", "--hits",
                 "--random=2", "--methods", "quest:budget=1/4", "moba:budget=1/4")
    printed = capsys.readouterr().out
    assert {"command", "commit", "device", "torch", "settings", "results"} <= report.keys()
    settings = report["settings"]
    assert report["finished"] and settings.items() >= {
        "dtype": "float32", "context_len": CONTEXT, "max_new_tokens": 48}.items()
    assert settings.keys() >= {"seed", "protocol", "samples", "tokenizer", "haystack", "words",
                               "batch"}
    assert len(report["results"]) == 3 * 2 * (3 + 2 * 2)
    for row in report["results"]:
        examples = make(row["task"], 2)
        lines = (runs / row["predictions"]).read_text().splitlines()
        saved = [json.loads(line)["pred"] for line in lines]
        assert eval_niah.scores(saved, examples) == {"ruler": row["ruler"], "paper": row["paper"]}
        assert row["path"].endswith(("checkpoints/attention", "checkpoints/memory",
                                     "mine/step_0000002"))
        assert row["prompts"] == niah.prompt_hash(examples)
        selects = row["method"].startswith("quest") and row["random"] is None
        assert (row["hits"] is not None) == selects
    for text in ("dense", "quest:budget=1/4,block_size=8", "moba:budget=1/4,block_size=8",
                 "memory - attention", "S-2", "H2"):
        assert text in printed
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    assert (runs / "eval" / "results.png").read_bytes().startswith(b"\x89PNG")


def test_rulers_own_file_gives_what_the_generator_gives(runs):
    """Spans, answers or protocol lost in the file's form."""
    niah.write_jsonl("niah_single_2.jsonl", make(n=2))
    common = ["--ckpt", "out/mine", "--samples=2", "--methods", "snapkv:budget=1/4", "--hits"]
    a = run(*common, "--jsonl", "niah_single_2.jsonl", out="a")["results"]
    b = run(*common, "--tasks", "niah_single_2", out="b")["results"]
    for x, y in zip(a, b, strict=True):
        assert all(x[key] == y[key] for key in ("prompts", "ruler", "read", "hits"))


def test_budgets_are_fractions_of_what_is_asked(runs, capsys):
    """RULER's file of twice the model's length: budgets of half their fraction, 199 % read."""
    long = ["--jsonl", "niah_single_2.jsonl", "--samples=2", "--max_new_tokens=12",
            "--methods", "quest:budget=1/4"]
    examples = make(n=2, context_len=1024)
    niah.write_jsonl("niah_single_2.jsonl", examples)
    assert "--context_len=1024" in refused(capsys, *long) and not Path("eval/asked.json").exists()
    rows = run(*long, "--context_len=1024")["results"]
    out, err = capsys.readouterr()
    lengths = [len(e.ids) for e in examples]
    assert f" prompts each, of {min(lengths):,} to {max(lengths):,} tokens" in out
    notes = err.splitlines()  # once for each model, though it is asked in many batches
    assert [note.split()[1] for note in notes] == ["attention", "memory", "mine"]
    assert all("512 tokens" in note for note in notes), err
    assert {row["budget"] for row in rows} == {None, 256}
    assert all(0.1 < row["read_share"] <= 1 for row in rows)


def test_a_model_trained_on_less_is_named_and_no_other(runs, capsys):
    """Models of several lengths, all asked at the first one's."""
    small(memory=True, context_len=256).save_pretrained("shorter")
    few = ["--tasks", "S-1", "--samples=1", "--max_new_tokens=12", "--methods=dense"]
    run("--ckpt", "checkpoints/memory", "shorter", *few)
    note, = capsys.readouterr().err.splitlines()
    assert note.startswith("note: shorter was trained on contexts of 256 tokens")
    asked = "The number is: 1234567. What is it?" + " " * 200
    row = {"index": 0, "input": asked, "outputs": ["1234567"]}
    Path("niah_single_1.jsonl").write_text(json.dumps(row))
    run("--ckpt", "checkpoints/memory", *few, "--jsonl", "niah_single_1.jsonl", out="a")
    note, = capsys.readouterr().err.splitlines()
    assert "budgets are fractions of --context_len 512" in note and "--context_len=256 fits" in note


def test_a_name_means_the_same_in_every_spelling(runs):
    """MK-2 refused where tables say it; of two --method the first dropped; ./words.txt refused."""
    few = ["--ckpt", "out/mine", "--samples=1", "--max_new_tokens=12"]
    run(*few, "--tasks", "S-1", "niah_single_2", "--method", "quest:budget=1/4",
        "--method", "moba:budget=1/4")
    report = run(*few, "--tasks", "s-1", "S-2", "--methods", "quest:budget=1/4", "moba:budget=1/4")
    settings = report["settings"]
    assert settings["tasks"] == ["niah_single_1", "niah_single_2"]
    assert [text.split(":")[0] for text in settings["methods"]] == ["dense", "quest", "moba"]
    assert report["speed"]["answers"] == 0  # nothing was left to ask
    Path("words.txt").write_text("A text of one's own. " * 99)
    niah.write_jsonl("niah_single_2.jsonl", make("niah_single_2", 1, new=12))
    for flags, file in ((["--tasks", "S-2", "--haystack"], "words.txt"),
                        (["--jsonl"], "niah_single_2.jsonl")):
        for spelled in file, f"./{file}", str(Path(file).resolve()), f"out/../{file}":
            report = run(*few, "--methods=dense", *flags, spelled, out=file.partition(".")[0])
        assert len(report["calls"]) == 4


# ---------------------------------------------------------------- a run that was stopped goes on

def stopping(monkeypatch, after):
    """eval_niah.answer, which ctrl-C ends after so many batches. -> the methods of each batch"""
    answer, asked = eval_niah.answer, []

    def stopped(model, tokenizer, examples, methods, *rest):
        if len(asked) == after:
            raise KeyboardInterrupt
        asked.append([sparse.name(method) for method in methods])
        return answer(model, tokenizer, examples, methods, *rest)

    monkeypatch.setattr(eval_niah, "answer", stopped)
    return asked


def test_a_run_that_ctrl_c_stops_goes_on_to_the_same_results(undisturbed, capsys):
    """Answers asked again, or lost; hits counted twice; a report of the last part alone."""
    left = N_BATCHES
    for n in 1, 5, 5:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
            asked = stopping(patch, after=n)
            run(*ASKED)
        assert end.value.code == 130 and "--out eval" in capsys.readouterr().err
        assert len(asked) == n and not Path("eval/results.json").exists()
        left -= n
    with pytest.MonkeyPatch.context() as patch:
        asked = stopping(patch, after=N_BATCHES)
        run(*ASKED)
    assert len(asked) == left and outcome() == undisturbed
    with pytest.MonkeyPatch.context() as patch:  # nothing is left, and no model is loaded
        patch.setattr(Transformer, "from_pretrained", lambda *_: pytest.fail("loaded"))
        run(*ASKED)
    assert outcome() == undisturbed


def test_a_line_that_a_kill_cut_off_is_asked_again(undisturbed):
    """kill -9 in the middle of a write: a run that cannot go on, a line glued to the torn one."""
    def timeless(line):
        content = json.loads(line)
        told = {key: value for key, value in content["told"].items() if key != "seconds"}
        return str(content | {"sha256": 0, "told": told})

    lines = Path("whole/answers-0.jsonl").read_bytes().splitlines(keepends=True)
    last = len(lines) - 1
    for n, torn in (2, lines[2][:-1]), (30, lines[30][:5]), (last, lines[-1][:-9]), (0, b"{"):
        shutil.copytree("whole", "eval", dirs_exist_ok=True)
        Path("eval/answers-0.jsonl").write_bytes(b"".join(lines[:n]) + torn)
        run(*ASKED)
        assert outcome() == undisturbed
        now = Path("eval/answers-0.jsonl").read_bytes().splitlines()
        assert sorted(map(timeless, now)) == sorted(map(timeless, lines))


def test_another_damaged_line_is_named_and_a_blank_one_is_no_damage(undisturbed, capsys,
                                                                    monkeypatch):
    """A traceback; answers dropped that a disk, not a kill, has lost; an editor's mark refused."""
    file = Path("whole/answers-0.jsonl")
    lines = file.read_bytes().splitlines()
    with monkeypatch.context() as patch:
        file.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join([*lines[:4], b"", b"  ", *lines[4:]])
                         + b"\r\n\r\n")
        patch.setattr(eval_niah, "answer", lambda *_: pytest.fail("asked again"))
        run(*ASKED, out="whole")
    assert outcome("whole")["results"] == undisturbed["results"]
    for damaged in (lines[6][:40], b"\0" * 20, b"[]", lines[6].replace(b'"told"', b'"tald"'),
                    lines[6].replace(b'"examples": [', b'"examples": [1')):
        file.write_bytes(b"\n".join([*lines[:6], damaged, *lines[7:]]) + b"\n")
        line = refused(capsys, *ASKED, out="whole")
        assert "whole/answers-0.jsonl line 7 is damaged" in line and "delete that line" in line
    file.write_bytes(b"\n".join([*lines[:6], *lines[7:]]) + b"\n")
    run(*ASKED, out="whole")
    assert outcome("whole")["results"] == undisturbed["results"]


def test_a_run_that_was_stopped_before_its_first_answer_binds_no_one(runs, monkeypatch):
    """A folder to be deleted by hand, though it is empty. Predictions beside --out, of model .."""
    few = ["--tasks", "niah_single_1", "--max_new_tokens=12", "--methods", "quest:budget=1/4",
           "--ckpt", ".."]
    Path("checkpoints/memory/inner").mkdir()
    monkeypatch.chdir("checkpoints/memory/inner")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stopping(patch, after=0)
        run(*few, "--samples=1", out=runs / "eval")
    report = run(*few, "--samples=2", out=runs / "eval")
    assert (runs / "eval/memory/dense/niah_single_1.jsonl").exists()
    assert report["results"][0]["n"] == 2


def other(capsys, *flags):
    """The line by which the whole run's folder is refused to another one."""
    line = refused(capsys, *ASKED, *flags, out="whole")
    assert "another --out" in line
    return line


def test_a_folder_of_other_settings_is_refused(undisturbed, capsys, monkeypatch):
    """A table of two runs that were asked different things."""
    Path("words.txt").write_text("A text of one's own. " * 9)
    jsonl = ["niah_single_1.jsonl", "niah_single_2.jsonl"]
    for file in jsonl:
        niah.write_jsonl(file, make(Path(file).stem, n=2, new=12))
    before = Path("whole/answers-0.jsonl").read_bytes()
    for flags in (["--samples=4"], ["--seed=1"], ["--context_len=576"], ["--max_new_tokens=13"],
                  ["--protocol=sft"], ["--dtype=bfloat16"], ["--kernels=torch"],
                  ["--haystack=words.txt"], ["--tasks", "niah_single_1"],
                  ["--ckpt", "checkpoints/memory"],
                  ["--ckpt", "checkpoints/memory", "checkpoints/attention"],
                  ["--ckpt", "checkpoints/attention", "out/mine"]):
        assert f"{flags[0].split('=')[0]} was" in other(capsys, *flags)
    assert "--tasks was" in other(capsys, "--jsonl", jsonl[0])
    assert "--jsonl was" in other(capsys, "--jsonl", *jsonl)
    with monkeypatch.context() as patch:
        patch.setattr(tokenizers.ByteTokenizer, "name", "another")
        assert "--tokenizer was" in other(capsys)
    monkeypatch.setattr(niah, "NOISE", "The grass is blue.")
    assert "what is asked in niah_single_1" in other(capsys)
    assert Path("whole/answers-0.jsonl").read_bytes() == before


def test_what_is_no_folder_for_answers_is_refused(undisturbed, capsys):
    """Answers among a training's checkpoints; a number of an error, and no word of what to do."""
    Path("file").touch()
    assert "--out file is a file" in refused(capsys, *ASKED, out="file")
    Path("trained/step_0000003").mkdir(parents=True)
    assert "--out trained holds a training" in refused(capsys, *ASKED, out="trained")
    assert len(list(Path("trained").iterdir())) == 1


def test_other_prompts_are_refused_with_their_cause(undisturbed, capsys, monkeypatch):
    """Two hashes, and nothing about what made them differ."""
    noise, asked = niah.NOISE, files.load("whole/asked.json", "made_of")
    made_of = asked["made_of"]
    assert made_of["--words"] == "built-in" and made_of["words of keys"] == ["built-in words"]
    if importlib.util.find_spec("wonderwords"):
        line = other(capsys, "--words=wonderwords")
        assert "what is asked in niah_single_1" in line
        assert "--words was built-in, now wonderwords" in line
    monkeypatch.setattr(niah, "NOISE", "The grass is blue.")
    assert "so the code that makes them is not" in other(capsys)
    monkeypatch.setattr(answers.platform, "python_version", lambda: "3.99.1")
    line = other(capsys)
    assert "Python was 3." in line and "now 3.99.1" in line and "--words was" not in line
    del asked["made_of"]
    files.save(asked, "whole/asked.json")
    assert "--words=wonderwords" in other(capsys)  # what an older version has made says less
    monkeypatch.setattr(niah, "NOISE", noise)
    run(*ASKED, out="whole")  # and goes on where prompts are the same, whatever Python
    assert outcome("whole")["results"] == undisturbed["results"]


def test_a_model_that_was_trained_again_is_refused_and_a_copy_is_not(undisturbed, capsys):
    """Half a table of the old weights, as path and sizes are the same. Work lost for a date."""
    folder = Path("checkpoints/memory")
    for file in folder.iterdir():
        os.utime(file, (0, 0))
    run(*ASKED, out="whole")
    assert outcome("whole")["results"] == undisturbed["results"]
    (folder / "model-2.bin").touch()
    assert "--ckpt memory (" in other(capsys)
    (folder / "model-2.bin").unlink()
    small(seed=1, memory=True, context_len=CONTEXT).save_pretrained(folder)
    assert "--ckpt memory (" in other(capsys)


def test_hash_of_files_tells_models_apart(tmp_path):
    """Ours by the hash in their head, which the loader asks; others' by all of their bytes."""
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


def test_more_methods_are_more_work_and_fewer_are_none(undisturbed, monkeypatch):
    """Answers that are there, asked again for a new column; a column that was not asked for."""
    run(*FEW)
    asked = stopping(monkeypatch, after=99)
    run(*ASKED, "--batch=4")  # of batches that overlap with the old ones
    new = ["moba:budget=64,block_size=8", "quest:budget=128,block_size=8,random=0"]
    assert asked == [new] * 2 * 2 * 2
    report = outcome()
    for of in report, undisturbed:
        assert of["calls"][-1]["command"] == of["command"]
        del of["settings"], of["command"]
    assert len(report.pop("calls")) == 2 and len(undisturbed.pop("calls")) == 1
    assert report == undisturbed
    run(*FEW)
    fewer = [row | {"hits": None} for row in undisturbed["results"]
             if not row["method"].startswith("moba") and row["random"] is None]
    assert outcome()["results"] == fewer and len(asked) == 2 * 2 * 2


# ---------------------------------------------------------------- several processes

def two_processes(*flags, change=""):
    """eval_niah.py with these flags, after a change to it, in two processes."""
    root = os.path.dirname(eval_niah.__file__)
    Path("ranks.py").write_text(f"import glob, os, signal, sys; sys.path.insert(0, {root!r})\n"
                                "import torch; torch.set_num_threads(1)\nimport eval_niah\n"
                                f"{change}\neval_niah.main()\n")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                "--nproc_per_node=2", "ranks.py"]
    return subprocess.run([*torchrun, *ASKED, "--device=cpu", *flags], capture_output=True,
                          text=True, timeout=1200)


def test_two_processes_answer_like_one_and_go_on_where_one_was_stopped(undisturbed, monkeypatch):
    """Batches that no rank takes, or two do; a report before the other is done; two reports."""
    stopping(monkeypatch, after=3)
    with pytest.raises(SystemExit):
        run(*ASKED)
    before = Path("eval/answers-0.jsonl").read_bytes()
    result = two_processes("--out=eval")
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.count("results in") == result.stdout.count("answers of up to") == 1
    first, second = (Path(f"eval/answers-{rank}.jsonl").read_bytes() for rank in (0, 1))
    per_batch = before.count(b"\n") / 3
    assert first.startswith(before) and first.count(b"\n") > 6 * per_batch
    assert second.count(b"\n") > 3 * per_batch
    report = outcome()
    assert report["device"] == f"2 x {undisturbed['device']}"
    assert report["results"] == undisturbed["results"]


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
    """A rank that waits for a dead one, writes elsewhere, or whose answers are overlooked."""
    result = two_processes(change=KILL)
    assert result.returncode != 0 and "results in" not in result.stdout
    out, = Path("out").glob("niah-*")
    torn = (out / "answers-1.jsonl").read_bytes()
    assert torn.count(b"\n") > 8 and not torn.endswith(b"\n")
    run(*ASKED, out=out)
    assert outcome(out)["results"] == undisturbed["results"]
    assert (out / "answers-1.jsonl").read_bytes() == torn

@pytest.mark.parametrize("trained, asked", [(512, 512), (4096, 4096), (131072, 4096)])
def test_a_model_of_today_is_asked_at_the_papers_length(trained, asked, tmp_path):
    """Prompts of 131,072 tokens that nobody asked for: on a CPU they would take days."""
    small(context_len=trained).save_pretrained(tmp_path)
    args = eval_niah.flags().parse_args([f"--ckpt={tmp_path}", "--device=cpu"])
    _, _, methods = eval_niah.prepare(args)
    assert args.context_len == asked
    assert asked // 4 in [getattr(method, "budget", None) for method in methods]
