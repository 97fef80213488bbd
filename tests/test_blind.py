"""
eval_niah.py --blind: what drops entries chooses before the question is known. Several questions of
a document; --tasks all, whose mean is of the needle tasks.
"""
import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from conftest import refused
from test_eval_niah import CONTEXT, Keeps, method, small
from test_niah import Bytes

import eval_niah
import niah
import sparse
from infra import files, report
from model import Transformer
from sparse import SnapKV

METHODS = [*map(method, ("dense", "quest:budget=1/4", "moba:budget=1/4", "snapkv:budget=1/4",
                         "sliding:budget=1/4,every=16", "moba:budget=1/4+snapkv:budget=1/4"))]
DROPPING = METHODS[3:]


def documents(n=2, n_questions=3, context_len=CONTEXT, task="niah_multikey_2", new=24):
    """Examples of n contexts, several questions of each, in an order that mixes them."""
    found = [niah.make_document(task, context_len, Bytes(), 0, i, n_questions, max_new_tokens=new)
             for i in range(n)]
    return [e for of_question in zip(*found) for e in of_question]


def answers(model, examples, methods, **settings):
    """{method: texts}"""
    found, _, _ = eval_niah.answer(model, Bytes(), examples, methods, **settings)
    return {method: [one.text for one in of_method] for method, of_method in found.items()}


@pytest.mark.parametrize("form", [dict(), dict(memory=True, n_kv_head=2)],
                         ids=["attention", "memory gqa"])
def test_what_drops_nothing_answers_as_ever(form):
    """A question at other positions, or one that does not see the context; answers of others."""
    model, examples = small(**form), documents()
    keeping = [m for m in METHODS if not sparse.drops(m)]
    blind, aware = (answers(model, examples, keeping, blind=blind) for blind in (True, False))
    assert blind == aware and len({*blind[METHODS[0]]}) > 1


@torch.no_grad()
def test_entries_are_chosen_from_the_context_alone():
    """The question among the asking queries; a second question that finds less than the first."""
    model, examples = small(n_kv_head=2, memory=True), documents(n=1)
    told = answers(model, examples, DROPPING, blind=True)
    aware = answers(model, examples, DROPPING)
    for m in DROPPING:
        for e, text in zip(examples, told[m]):
            ids, at, window = torch.tensor([e.ids]), e.question_at, sparse.window_of(m)
            cache = model.new_cache(1, CONTEXT + 100, window)
            model.prefill(ids[:, :at], None, cache, m)
            cache.compress(m)
            logits = model.prefill(ids[:, at:], None, cache, m)
            new = model.decode(logits, cache, e.max_new_tokens, m, eos_id=Bytes.eos_id)
            assert text == Bytes().decode(new[0].tolist())
        assert told[m] != aware[m], "the question makes no difference: the test sees nothing"


def test_answers_do_not_depend_on_order_batch_or_other_questions():
    """A context that ends up with another one's question, or is asked a question too few."""
    model, examples = small(memory=True), documents(n=3, n_questions=2)
    single = documents(n=4, n_questions=1)[3:]  # a context with one question beside those with two
    mixed = [*examples, *single]
    together = answers(model, mixed, METHODS, blind=True)
    for i, e in enumerate(mixed):
        alone = answers(model, [e], METHODS, blind=True)
        assert {m: [texts[i]] for m, texts in together.items()} == alone
    contexts, rounds = eval_niah.rounds(mixed)
    turns = [turn for turn, _ in rounds]
    assert len(contexts) == 4 and [len(turn) for turn in turns] == [4, 4]
    assert {*sum(turns, [])} == {*range(7)} and turns[1][3] == turns[0][3]


@dataclass(frozen=True)
class TooMany(SnapKV):
    """It keeps more than it says."""

    def compress(self, q, k, v, lengths, dice):
        return replace(self, budget=self.budget + 2).best(self.budget + 2, q, k, lengths, dice)


def test_a_question_is_no_part_of_what_was_kept():
    """A budget that is held to the context and its question, or to nothing."""
    model, examples = small(), documents(n=2, n_questions=1)
    (found, _, _) = eval_niah.answer(model, Bytes(), examples, [METHODS[3]], blind=True)
    for e, one in zip(examples, found[METHODS[3]]):
        n = len(e.ids) - e.question_at
        assert one.read == 128 + n + (23 + 1) / 2 and one.prompt_read == (e.question_at + 1) / 2
    refused(lambda: answers(model, examples, [TooMany(128, 8)], blind=True), "kept 130 entries")


def test_hits_are_of_the_places_in_the_context():
    """H1 of a question that another one of the same context answers."""
    model, examples = small(n_kv_head=2), documents(4, 2, 2 * CONTEXT)
    everything, (low, high) = SnapKV(2 * CONTEXT, 8), examples[0].spans[0]
    without = Keeps(2 * CONTEXT, 8, 5, None, low, high)  # in head 1
    apart = [e.spans[0][1] <= low or e.spans[0][0] >= high for e in examples]
    assert any(apart[1:4]) and any(apart[4:]), "choose other contexts"
    _, found, _ = eval_niah.answer(model, Bytes(), examples, [], None, [everything, without], True)
    assert all(hit.all() for hit in found[everything]) and len(found[everything]) == 8
    assert [hit.tolist() for hit in found[without]] == [[[[True, there]] * 2] for there in apart]


# ---------------------------------------------------------------- the command

@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small(context_len=2048).save_pretrained("tiny")


def run(*flags, out="eval"):
    eval_niah.main(["--ckpt=tiny", "--device=cpu", f"--out={out}", "--context_len=512",
                    "--max_new_tokens=24", *flags])
    return files.load(Path(out) / "results.json")


def test_the_command_asks_several_questions_and_says_so(model, capsys):
    """A flag that does nothing; a folder that goes on with the other answers."""
    flags = ["--methods", "snapkv:budget=1/4", "--tasks", "MK-2", "S-2", "--samples=2"]
    found = run("--blind", "--questions=2", *flags)
    said = capsys.readouterr().out
    assert "the question fed last" in said and "before the question was known" in said
    assert {(row["task"], row["n"]) for row in found["results"]} == {
        ("niah_multikey_2", 4), ("niah_single_2", 2)}
    assert all(row["blind"] for row in found["results"])
    lines = Path(found["results"][0]["predictions"]).read_text().splitlines()
    assert len({json.loads(line)["index"] for line in lines}) == 4
    with pytest.raises(SystemExit):
        run("--questions=2", *flags)
    assert "--blind was True, now None" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("--blind", *flags)
    assert "--questions was 2, now None" in capsys.readouterr().err
    aware = run("--questions=2", *flags, out="aware")
    assert not any(row["blind"] for row in aware["results"])
    prompts = [{row["prompts"] for row in of["results"]} for of in (found, aware)]
    assert prompts[0] == prompts[1]


def test_a_file_of_another_task_has_its_own_length(model):
    """A needle's length for words that take longer, or a longer one that scores higher."""
    row = {"index": 0, "input": "x. Question: which?", "outputs": ["a"], "answer_prefix": ""}
    for task in "cwe", "niah_single_1":
        text = "a is: a. What is the special magic number for a?" if task != "cwe" else row["input"]
        Path(f"{task}.jsonl").write_text(json.dumps(row | {"input": text}))
    args = eval_niah.flags().parse_args(["--ckpt", "tiny", "--jsonl", "cwe.jsonl",
                                         "niah_single_1.jsonl"])
    args.samples, args.max_new_tokens, args.protocol, args.context_len = 1, 24, "sft", 512
    found = eval_niah.read_examples(args, Bytes())
    assert {task: e.max_new_tokens for task, (e,) in found.items()} == {
        "cwe": niah.OTHERS["cwe"].max_new_bytes, "niah_single_1": 24}


def test_hits_of_tasks_whose_answers_stand_in_many_places(model):
    """A crash when all answers are there."""
    found = run("--tasks", "vt", "json_kv", "--samples=1", "--hits", "--methods=snapkv:budget=1/2",
                "--context_len=2000")
    hits = {(row["task"], row["method"]): row["hits"] for row in found["results"]}
    assert len(hits["json_kv", "snapkv:budget=1/2,window=31,kernel=15"]) == 2
    assert hits["vt", "snapkv:budget=1/2,window=31,kernel=15"] is None


def test_blind_and_aware_results_are_not_one_picture(model, capsys):
    flags = ["--tasks", "S-1", "--samples=1", "--methods=snapkv:budget=1/4"]
    run(*flags, out="aware")
    run(*flags, "--blind", out="blind")
    with pytest.raises(SystemExit):
        eval_niah.main(["--plot", "aware", "blind"])
    assert "blind" in capsys.readouterr().err


def test_yarn_stretches_the_model_that_is_asked(model, capsys, monkeypatch):
    """A flag that is not heard, or heard once per batch; a note about a length that is reached."""
    stretch, factors = Transformer.stretch, []
    monkeypatch.setattr(Transformer, "stretch", lambda model, factor: (
        factors.append(factor), stretch(model, factor))[1])
    flags = ["--tasks", "S-1", "--methods=dense", "--samples=3", "--batch=2", "--context_len=3000"]
    run(*flags, "--yarn=1.5")
    assert factors == [1.5] and "was trained" not in capsys.readouterr().err
    run(*flags, out="plain")
    assert factors == [1.5] and "trained on contexts of 2,048" in capsys.readouterr().err
    run(*flags[:-1], "--context_len=1500", "--yarn=1.5", out="short")
    assert "--yarn=1.5 stretches tiny" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(*flags)
    assert "--yarn was 1.5, now None" in capsys.readouterr().err
    Transformer.from_pretrained("tiny").stretch(2).save_pretrained("tiny")
    with pytest.raises(SystemExit):
        run(*flags, "--yarn=1.5", out="other")
    assert "the RoPE of tiny is stretched already" in capsys.readouterr().err


def test_the_mean_is_of_the_needle_tasks(model, capsys):
    """Tasks that RULER's readers do not expect in a mean; a mean of nothing."""
    scores = {"niah_single_1": 100, "niah_multikey_1": 50, "json_kv": 0}
    rows = [{"checkpoint": "a", "method": "dense", "random": None, "task": task, "budget": None,
             "ruler": [score, score - 5, score + 5], "paper": [score] * 3, "read": score,
             "prompt_read": None, "hits": None, "n": 2, "prompts": "p", "scores": [1, 0],
             "in_mean": task in niah.TASKS, "by_depth": [[0, None]] * 10}
            for task, score in scores.items()]
    told = report.table(rows, eval_niah.names())
    line = next(line for line in told.splitlines() if "dense" in line).split()
    assert line[:6] == ["a", "dense", "100.0", "50.0", "0.0", "75.0"] and line[-1] == "75.0"
    assert "of S-1, MK-1" in told
    others = report.table(rows[2:], eval_niah.names())
    assert "mean, and what" not in others and " 0.0 ±" in others
    assert report.table(rows[:2], eval_niah.names()).count("S-1") == 1


def test_all_tasks_are_those_that_can_be_made(model, capsys):
    """qa, which needs files; a needle task without room is left out, as without --tasks."""
    flags = eval_niah.flags().parse_args(["--tasks", "all", "--ckpt", "tiny"])
    flags.context_len, flags.max_new_tokens, flags.protocol = 8192, 48, "base"
    flags.first_look, flags.seed = False, 0
    assert eval_niah.choose_tasks(flags, [Bytes()]) == niah.generated()
    assert "qa_1" not in niah.generated() and "vt" in niah.generated()
    flags.tasks, flags.context_len = ["all"], 1024
    few = eval_niah.choose_tasks(flags, [Bytes()])
    assert set(niah.TASKS) < set(few) < set(niah.generated())
    told = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1].split()[-1] for line in told] == [
        task for task in niah.generated() if task not in few]
