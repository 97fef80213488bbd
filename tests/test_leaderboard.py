"""
experiments/leaderboard.py: the setting of kvpress, the prompts as it asks them, the files that it
writes.
"""
import ast
import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import ORACLE, refused, tiny
from safetensors.torch import load_file
from test_niah import Bytes

import eval_niah
import niah
import sparse
from data import tokenizer_of
from experiments import leaderboard
from experiments.leaderboard import Frame, SnapKVPress, StreamingPress
from infra import cli, files
from model import Transformer

TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
            "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


# ---------------------------------------------------------------- presses

def test_snapkv_drops_what_kvpress_drops():
    found = load_file(ORACLE / "kvpress.safetensors")
    q, k = found["snapkv/q"], found["snapkv/k"]
    press, lengths = SnapKVPress(ratio=0.4, window=6, kernel=1), torch.tensor([40])
    assert torch.equal(press.compress(q[:, :40], k[:, :40], k, lengths, None)[0],
                       found["snapkv/kept"][0])


@pytest.mark.parametrize("press", [SnapKVPress(0.5, window=4, kernel=3), StreamingPress(0.5),
                                   SnapKVPress(0.875, 2, 1), StreamingPress(0.875, 1)])
def test_a_share_is_of_each_context(press):
    """A batch's longest context that decides for all; a row that sees what pads another."""
    lengths, source = torch.tensor([61, 40, 17]), torch.Generator().manual_seed(0)
    q, k = (torch.randn(3, 61, 2, 8, generator=source) for _ in range(2))
    row, last = torch.arange(3)[:, None], lengths[:, None] + torch.arange(-8, 0)
    kept = press.compress(q[row, last], k, k, lengths, None)
    for b, n in enumerate(lengths.tolist()):
        alone = press.compress(q[row, last][b:b + 1], k[b:b + 1, :n], k, lengths[b:b + 1], None)
        S = int(n * (1 - press.ratio))
        assert alone.shape[2] == S and torch.equal(kept[b, :, :S], alone[0])
        assert (kept[b, :, S:] == -1).all() and (alone[..., -1] == n - 1).all()
    if isinstance(press, StreamingPress):  # the first ones, a gap, the last ones
        first = [*range(press.initial)]
        assert kept[0, 1].tolist() == first + [*range(61 - kept.shape[2] + len(first), 61)]


def test_presses_are_methods_like_others():
    text = cli.sized("press-snapkv:ratio=0.25", 4864, Bytes(), sparse.METHODS)
    for n in range(4000, 4200):  # as kvpress counts, in Python
        for ratio in 0.1, 0.3, 0.7, 0.9:
            assert leaderboard.kept_of(torch.tensor([n]), ratio).item() == int(n * (1 - ratio))
    assert sparse.parse(text, 4864) == SnapKVPress(0.25, window=64, kernel=5)
    assert sparse.parse(sparse.name(StreamingPress(0.75)), 4096) == StreamingPress(0.75)


# ---------------------------------------------------------------- prompts

@pytest.fixture
def folder(tmp_path):
    """A tokenizer's files with a chat template; encoded by bytes, special tokens apart."""
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": [
        {"id": 256, "content": "<|im_start|>", "special": True},
        {"id": 257, "content": "<|im_end|>", "special": True},
        {"id": 258, "content": "<plain>", "special": False}]}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({
        "bos_token": {"content": "<|im_start|>"}, "chat_template": TEMPLATE}))
    return tmp_path


def test_a_chat_model_is_asked_through_its_template(folder):
    """Special tokens as letters; a plain text's tokens as special ones; the question before it."""
    e = Frame(folder, Bytes()).example("vt", 3, "Facts.\n", "Which? ", "Answer:", ["A"], 30, "x")
    text = ("<|im_start|>user\nFacts.\n", "Which? <|im_end|>\n<|im_start|>assistant\nAnswer:")
    assert e.prompt == "".join(text)
    bytes_of = lambda text: [*text.encode()]
    assert e.ids[:e.question_at] == [256, *bytes_of("user\nFacts.\n")]
    assert e.ids[e.question_at:] == [*bytes_of("Which? "), 257, *bytes_of("\n"), 256,
                                     *bytes_of("assistant\nAnswer:")]
    assert (e.max_new_tokens, e.answers, e.index) == (30, ["A"], 3)


def test_a_model_that_thinks_is_asked_not_to(folder):
    """kvpress's answer prefix inside a thought; a token that is null as the text None."""
    thought = "{% if enable_thinking is false %}<think></think>{{ bos_token }}{% endif %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "bos_token": None, "chat_template": TEMPLATE + thought}))
    assert Frame(folder, Bytes()).after.endswith("assistant\n<think></think>")


def test_another_model_is_asked_as_it_is(folder):
    plain = Frame(folder, Bytes(), chat=False)
    assert (plain.before, plain.after) == ("<|im_start|>", "\n")
    (folder / "tokenizer_config.json").unlink()
    nothing = Frame(folder, Bytes())
    assert (nothing.before, nothing.after) == ("", "\n")
    assert nothing.encode("<plain>") == [*b"<plain>"]


@pytest.mark.parametrize("template, word", [("{% if %}", "fails"), ("{{ ''.__class__ }}", "#"),
                                            ("{{ raise_exception('only tools') }}", "only tools")])
def test_a_strange_template_is_refused_or_does_no_harm(folder, template, word):
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    if word == "#":  # nothing is there where the message should be
        refused(lambda: Frame(folder, Bytes()), "does not show", "--chat=off")
    else:
        refused(lambda: Frame(folder, Bytes()), str(folder), word, "--chat=off")


@pytest.mark.parametrize("task", ["niah_single_1", "niah_multikey_2", "vt"])
def test_prompts_are_cut_where_kvpress_cuts_them(task, monkeypatch, tmp_path):
    """kvpress's own patterns, on RULER's text: context, question and answer prefix."""
    monkeypatch.setattr(leaderboard, "CONTEXT", 2048)
    args = leaderboard.flags().parse_args(["--ckpt", "x", "--samples=2", "--words=built-in",
                                           "--device=cpu"])
    frame = Frame(tmp_path, Bytes())
    made = [*leaderboard.made_here(args, task, Bytes(), frame)]
    assert len(made) == 2
    of_vt = "Question: Find all variables that are assigned the value", "Answer:"
    of_needles = "What (?:is|are all) the special magic", "The special magic"
    question, answer = of_vt if task == "vt" else of_needles
    for i, e in enumerate(made):
        text = niah.make_example(task, 2048, Bytes(), 0, i).prompt
        at = [*re.finditer(question, text)][-1].start()
        begin = at + re.search(answer, text[at:]).start()
        assert bytes(e.ids[:e.question_at]).decode() == text[:at]
        assert bytes(e.ids[e.question_at:]).decode() == text[at:begin] + "\n" + text[begin:]


ROW = {"task": "qa_1", "context": "Documents.\n", "question": "Question: who? ",
       "answer_prefix": "Answer:", "answer": ["Ann", "Anna"], "max_new_tokens": 32}


def parquet(path, rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_kvpress_own_file_is_read(tmp_path):
    rows = [ROW | {"question": f"{i}? "} for i in range(3)]
    rows += [ROW | {"task": "niah_single_1", "answer": ["1"], "max_new_tokens": 128}]
    found = leaderboard.of_file(parquet(tmp_path / "f.parquet", rows), 2)
    assert list(found) == ["niah_single_1", "qa_1"] and len(found["qa_1"]) == 2
    assert found["qa_1"][1] == [1, "Documents.\n", "1? ", "Answer:", ["Ann", "Anna"], 32]
    without = [{key: value for key, value in ROW.items() if key != "context"}]
    for wrong, words in ((parquet(tmp_path / "g.parquet", without), ["g.parquet", "context"]),
                         (parquet(tmp_path / "h.parquet", [ROW | {"task": "odd"}]), ["odd"]),
                         (tmp_path / "none.parquet", ["none.parquet"])):
        refused(lambda: leaderboard.of_file(wrong, 2), *words)


# ---------------------------------------------------------------- the command

def kvpress_scores(file):
    """kvpress's calculate_metrics of RULER, written anew, on an exported predictions.csv."""
    by_task = {}
    for row in csv.DictReader(file.open(newline="", encoding="utf-8")):
        wrote = re.sub(r"[\x00-\x1f]", "", row["predicted_answer"].strip()).strip().lower()
        there = [answer.lower() in wrote for answer in ast.literal_eval(row["answer"])]
        part = row["task"].startswith("qa")
        by_task.setdefault(row["task"], []).append(max(there) if part else sum(there) / len(there))
    return {task: {"string_match": round(100 * sum(found) / len(found), 2)}
            for task, found in by_task.items()}


def test_the_command_writes_what_kvpress_writes(tmp_path, monkeypatch, capsys):
    """A setting in another's folder; scores of other answers than those that are told."""
    monkeypatch.chdir(tmp_path)
    tiny(vocab_size=257, context_len=4096).save_pretrained("small")
    rows = [ROW | {"task": task, "answer": [letter, "zzz"], "context": "Documents. " * 20}
            for task in ("qa_1", "vt") for letter in "\x00ae"]
    letters = [chr(i) for i in range(33, 127) if chr(i).isalnum()]
    rows += [ROW | {"task": "fwe", "answer": letters}]
    leaderboard.main(["--ckpt", "small", "--device=cpu", "--out=lb", "--ratios", "0.5", "0.75",
                      "--presses", "snapkv", "streaming_llm", "--samples=3",
                      f"--data={parquet('f.parquet', rows)}"])
    told = capsys.readouterr().out
    assert all(row["blind"] for row in files.load("lb/results.json")["results"])
    folders = sorted(Path("lb/kvpress").iterdir())
    assert [folder.name for folder in folders] == [
        f"ruler__4096__small__{press}__{ratio}__fraction0.006" for press, ratio in (
            ("no_press", "0.00"), ("snapkv", "0.50"), ("snapkv", "0.75"),
            ("streaming_llm", "0.50"), ("streaming_llm", "0.75"))]
    for folder in folders:
        metrics = files.load(folder / "metrics.json")
        assert kvpress_scores(folder / "predictions.csv") == metrics
        assert {*metrics} == {"qa_1", "vt", "fwe"} and str(folder) in told
        _, _, _, press, ratio, _ = folder.name.split("__")
        settings = dict(line.split(": ") for line in (folder / "config.yaml").read_text()
                        .splitlines())
        assert json.loads(settings["press_name"]) == press and settings["query_aware"] == "false"
        assert float(settings["compression_ratio"]) == float(ratio)
    assert any(of["string_match"] for folder in folders
               for of in files.load(folder / "metrics.json").values()), "all scores are 0"


# ---------------------------------------------------------------- kvpress itself

def test_answers_are_those_of_kvpress(smollm2, monkeypatch):
    """
    A real model through its chat template (oracle/kvpress.json): context and question encoded
    together, what is kept at other positions, a token that opens the answer in the wrong place.
    """
    told = json.loads((ORACLE / "kvpress.json").read_text(encoding="utf-8"))["answers"]
    monkeypatch.setattr(leaderboard, "CONTEXT", 1024)
    model = Transformer.from_pretrained(smollm2, torch.float32)
    tokenizer = tokenizer_of(smollm2, model.config.vocab_size, None)
    frame = Frame(smollm2, tokenizer)
    args = leaderboard.flags().parse_args(["--ckpt", "x", "--samples=3", "--words=built-in",
                                           "--device=cpu"])
    asked = [replace(e, max_new_tokens=40)
             for e in leaderboard.made_here(args, "niah_single_1", tokenizer, frame)]
    presses = {leaderboard.PRESSES[name](ratio): (name, ratio) for name, ratio, *_ in told}
    found, _, _ = eval_niah.answer(model, tokenizer, asked, [*presses], blind=True)
    written = [[*presses[press], e.index, one.text] for press, of_press in found.items()
               for e, one in zip(asked, of_press)]
    assert written == told
