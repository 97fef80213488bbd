"""experiments/snapkv_answer.py: the answer's queries choose among the prompt's entries, and nothing else differs."""
import json
from pathlib import Path

import pytest
import torch

from experiments import snapkv_answer, ways
from conftest import tiny
from test_niah import Bytes

from triton_ops import backend
import eval_niah
import niah
import sparse


METHOD = sparse.SnapKV(budget=40, window=8, kernel=3)


@pytest.fixture(autouse=True)
def kernels_stay_as_they_were(monkeypatch):
    monkeypatch.setattr(backend, "choice", "torch")


def make(n=3):
    return [niah.make_example("niah_single_3", 512, Bytes(), 0, i, "sft", max_new_tokens=48) for i in range(n)]


def test_scores_are_of_the_queries_that_write_the_answer():
    """Queries of the question alone, of the padding, or of another row's answer; scores of another layer."""
    model, examples = tiny(vocab_size=257, memory=True), make()
    found = snapkv_answer.answer_scores(model, Bytes(), examples, METHOD)
    assert len(found) == model.config.n_layer
    longest = max(len(niah.target_ids(e.prompt, e.target, Bytes())) for e in examples)
    for row, e in enumerate(examples):  # alone, without padding
        ids = torch.tensor([e.ids + niah.target_ids(e.prompt, e.target, Bytes())])
        cache = model.new_cache(1, ids.shape[1], METHOD.window + longest)
        model.feed(ids, None, cache)
        for i, scores in enumerate(found):
            alone = METHOD.score(cache.recent_q[i], cache.k[i], cache.lengths)[0]
            torch.testing.assert_close(scores[row, :, :alone.shape[1]], alone, atol=1e-5, rtol=1e-4)
        assert alone[:, len(e.ids):].count_nonzero() == 0  # no entry of the answer may be chosen


def test_what_the_scores_say_stays():
    """Foreseeing that chooses by the question after all, or takes one layer's scores for another's."""
    model, (example, *_) = tiny(vocab_size=257), make(1)
    T = len(example.ids)
    wanted = torch.randperm(T - METHOD.window - model.config.n_layer, generator=torch.Generator().manual_seed(0))[:METHOD.budget - METHOD.window]
    scores = [torch.zeros(1, model.config.n_kv_head, T + 9).index_fill(2, wanted + i, 1.0) for i in range(model.config.n_layer)]
    cache, logits, _ = eval_niah.prefill(model, [example], sparse.Dense(), 4)
    model.decode(logits, cache, 4, snapkv_answer.Foreseeing(METHOD.budget, METHOD.window, METHOD.kernel, scores=list(scores)))
    for i, positions in enumerate(cache.positions):
        kept = set(positions[0, :METHOD.budget - METHOD.window, 0].tolist())
        assert kept == set((wanted + i).tolist()), i


def test_command_compares_and_writes_json(tmp_path, monkeypatch, capsys):
    """Columns that are the same by construction, or a question column that is not SnapKV's."""
    monkeypatch.chdir(tmp_path)
    tiny(vocab_size=257, context_len=512, memory=True).save_pretrained("model")
    snapkv_answer.main(["--ckpt", "model", "--samples=2", "--device=cpu", "--json=a.json"])
    report = json.loads(Path("a.json").read_text())
    assert {"command", "commit", "device", "torch", "settings"} <= report.keys()
    assert all(of.keys() == {"dense", "question", "answer"} for of in report["scores"]["model"].values())
    assert "question" in capsys.readouterr().out
    for argv, words in (["--ckpt", "nowhere"], "nowhere"), (["--ckpt", "model", "--method=dense"], "--method"):
        with pytest.raises(SystemExit) as end:
            snapkv_answer.main([*argv, "--device=cpu"])
        line = capsys.readouterr().err
        assert end.value.code == 2 and words in line and line.count("\n") == 1, line


def test_question_column_is_snapkv_and_a_whole_budget_is_dense(monkeypatch):
    model, examples = tiny(vocab_size=257, memory=True), make()
    texts = []
    monkeypatch.setattr(eval_niah, "scores", lambda predictions, _: texts.append(predictions) or {"ruler": None})
    snapkv_answer.compare(model, Bytes(), examples, METHOD, batch=2)
    outcome = ways.evaluate(model, Bytes(), examples, [METHOD], batch=2)[METHOD]
    dense, question, answer = texts
    assert question == outcome.texts and len({*map(tuple, texts)}) == 3
    snapkv_answer.compare(model, Bytes(), examples, sparse.SnapKV(budget=512, window=8, kernel=3), batch=2)
    assert texts[3] == texts[4] == texts[5] == dense
