"""
experiments/snapkv_answer.py: the answer's queries choose among the prompt's entries, and nothing
else differs. Refused flags: test_refusals.py.
"""
import pytest
import torch
from conftest import tiny
from test_niah import Bytes

import eval_niah
import niah
import sparse
from experiments import snapkv_answer, ways
from infra import files
from triton_ops import backend

METHOD = sparse.SnapKV(budget=40, window=8, kernel=3)


@pytest.fixture(autouse=True)
def kernels_stay_as_they_were(monkeypatch):
    monkeypatch.setattr(backend, "choice", "torch")


def make(n=3):
    return [niah.make_example("niah_single_3", 512, Bytes(), 0, i, "sft", max_new_tokens=48)
            for i in range(n)]


def test_scores_are_of_the_queries_that_write_the_answer():
    """Queries of the question alone, of the padding, of another row's answer; another layer's."""
    model, examples = tiny(vocab_size=257, memory=True), make()
    found = snapkv_answer.answer_scores(model, Bytes(), examples, METHOD)
    assert len(found) == model.config.n_layer
    gold = [niah.target_ids(e.prompt, e.target, Bytes()) for e in examples]
    for row, (e, target) in enumerate(zip(examples, gold)):  # alone, without padding
        ids = torch.tensor([e.ids + target])
        cache = model.new_cache(1, ids.shape[1], METHOD.window + max(map(len, gold)))
        model.feed(ids, None, cache)
        for i, scores in enumerate(found):
            alone = METHOD.score(cache.recent_q[i], cache.k[i], cache.lengths)[0]
            torch.testing.assert_close(scores[row, :, :alone.shape[1]], alone, atol=1e-5,
                                       rtol=1e-4)
        assert alone[:, len(e.ids):].count_nonzero() == 0  # no entry of the answer may be chosen


def test_what_the_scores_say_stays():
    """Foreseeing that chooses by the question after all, or by another layer's scores."""
    model, (example,) = tiny(vocab_size=257), make(1)
    T, layers, chosen = len(example.ids), model.config.n_layer, METHOD.budget - METHOD.window
    drawn = torch.Generator().manual_seed(0)
    wanted = torch.randperm(T - METHOD.window - layers, generator=drawn)[:chosen]
    nothing = torch.zeros(1, model.config.n_kv_head, T + 9)
    scores = [nothing.index_fill(2, wanted + i, 1.0) for i in range(layers)]
    cache, logits, _ = eval_niah.prefill(model, [example], sparse.Dense(), 4, 64)
    method = snapkv_answer.Foreseeing(METHOD.budget, METHOD.window, METHOD.kernel, scores=scores)
    model.decode(logits, cache, 4, method)
    for i, positions in enumerate(cache.positions):
        assert set(positions[0, :chosen, 0].tolist()) == set((wanted + i).tolist()), i


def test_command_compares_and_writes_json(tmp_path, monkeypatch, capsys):
    """A JSON without what made it."""
    monkeypatch.chdir(tmp_path)
    tiny(vocab_size=257, context_len=512, memory=True).save_pretrained("model")
    snapkv_answer.main(["--ckpt", "model", "--samples=2", "--device=cpu", "--json=a.json"])
    report = files.load("a.json", "command", "commit", "device", "torch", "settings")
    for of_task in report["scores"]["model"].values():
        assert of_task.keys() == {"dense", "question", "answer"}
    assert "question" in capsys.readouterr().out


def test_question_column_is_snapkv_and_a_whole_budget_is_dense(monkeypatch):
    """Columns that are the same by construction, or a question column that is not SnapKV's."""
    model, examples, texts = tiny(vocab_size=257, memory=True), make(), []
    monkeypatch.setattr(eval_niah, "scores",
                        lambda of_all, _: texts.append(of_all) or {"ruler": None})
    snapkv_answer.compare(model, Bytes(), examples, METHOD, batch=2)
    outcome = ways.evaluate(model, Bytes(), examples, [METHOD], batch=2)[METHOD]
    dense, question, answer = texts
    assert question == outcome.texts and len({*map(tuple, texts)}) == 3
    whole = sparse.SnapKV(budget=512, window=8, kernel=3)
    snapkv_answer.compare(model, Bytes(), examples, whole, batch=2)
    assert texts[3] == texts[4] == texts[5] == dense
