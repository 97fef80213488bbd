"""
experiments/moba_question.py: MoBA for a part of the prompt, dense attention for the rest, and
nothing else differs. Refused flags: test_refusals.py.
"""
import pytest
import torch
from conftest import tiny

from experiments import moba_question
from infra import files
from sparse import Dense, MoBA
from triton_ops import backend

METHOD = MoBA(budget=16, block_size=4)


@pytest.fixture(autouse=True)
def kernels_stay_as_they_were(monkeypatch):
    monkeypatch.setattr(backend, "choice", "torch")


@pytest.mark.parametrize("question", [1, 10, 64])
def test_each_part_is_the_method_s_or_dense(question):
    """The parts exchanged, or cut one token off."""
    q, k, v = (torch.randn(2, 64, 2, 8) for _ in range(3))
    sparse, dense = (kind.prefill(q, k, v, 0, None)[0] for kind in (METHOD, Dense()))
    assert not torch.allclose(sparse[:, 32:], dense[:, 32:], atol=1e-3)
    cut = 64 - question
    for of, first, last in ("context", sparse, dense), ("question", dense, sparse):
        part = moba_question.Part(**vars(METHOD), question=question, of=of)
        y, _ = part.prefill(q, k, v, 0, None)
        assert torch.equal(y, torch.cat([first[:, :cut], last[:, cut:]], dim=1))


def test_command_compares_and_writes_json(tmp_path, monkeypatch):
    """A column that is another's by construction."""
    monkeypatch.chdir(tmp_path)
    tiny(vocab_size=257, context_len=512, memory=True).save_pretrained("model")
    seen = []
    monkeypatch.setattr(moba_question.eval_niah, "scores",
                        lambda texts, _: seen.append(tuple(texts)) or {"ruler": [0.0, 0.0, 0.0]})
    moba_question.main(["--ckpt", "model", "--samples=2", "--device=cpu", "--json=a.json"])
    report = files.load("a.json", "command", "commit", "device", "torch", "settings")
    for of_task in report["scores"]["model"].values():
        assert of_task.keys() == {"dense", "moba", "context", "question"}
    assert len({*seen[:4]}) == 4
    assert report["methods"] == {"model": "moba:budget=64,block_size=8"}
