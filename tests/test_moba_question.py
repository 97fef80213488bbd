"""experiments/moba_question.py: MoBA for a part of the prompt, dense attention for the rest, and nothing else differs."""
import json
from pathlib import Path

import pytest
import torch
from conftest import tiny

from triton_ops import backend
from experiments import moba_question
from sparse import Dense, MoBA

METHOD = MoBA(budget=16, block_size=4)


@pytest.fixture(autouse=True)
def kernels_stay_as_they_were(monkeypatch):
    monkeypatch.setattr(backend, "choice", "torch")


@pytest.mark.parametrize("question", [1, 10, 64])
def test_each_part_is_the_method_s_or_dense(question):
    """The parts exchanged, or cut one token off."""
    q, k, v = (torch.randn(2, 64, 2, 8) for _ in range(3))
    sparse, dense = METHOD.prefill(q, k, v, 0, None)[0], Dense().prefill(q, k, v, 0, None)[0]
    assert not torch.allclose(sparse[:, 32:], dense[:, 32:], atol=1e-3)
    cut = 64 - question
    for of, first, last in ("context", sparse, dense), ("question", dense, sparse):
        y, _ = moba_question.Part(**vars(METHOD), question=question, of=of).prefill(q, k, v, 0, None)
        torch.testing.assert_close(y, torch.cat([first[:, :cut], last[:, cut:]], dim=1), atol=0, rtol=0)


def test_command_compares_and_writes_json(tmp_path, monkeypatch, capsys):
    """A column that is another's by construction; an error of many lines."""
    monkeypatch.chdir(tmp_path)
    tiny(vocab_size=257, context_len=512, memory=True).save_pretrained("model")
    seen = []
    monkeypatch.setattr(moba_question.eval_niah, "scores", lambda texts, _: seen.append(texts) or {"ruler": [0.0, 0.0, 0.0]})
    moba_question.main(["--ckpt", "model", "--samples=2", "--device=cpu", "--json=a.json"])
    report = json.loads(Path("a.json").read_text())
    assert {"command", "commit", "device", "torch", "settings"} <= report.keys()
    assert all(of.keys() == {"dense", "moba", "context", "question"} for of in report["scores"]["model"].values())
    assert len({*map(tuple, seen[:4])}) == 4 and report["methods"] == {"model": "moba:budget=64,block_size=8"}
    capsys.readouterr()
    monkeypatch.setattr(moba_question.eval_niah, "scores", lambda *_: pytest.fail("asked, though it must end in an error"))
    Path("damaged").mkdir()
    Path("damaged/train.json").write_text('{"step": 3, "set')
    for argv, words in ((["--ckpt", "model", "nowhere"], "nowhere"), (["--ckpt", "model", "--method=dense"], "--method"),
                        (["--ckpt", "damaged"], "damaged/train.json is damaged")):
        with pytest.raises(SystemExit) as end:
            moba_question.main([*argv, "--device=cpu"])
        line = capsys.readouterr().err
        assert end.value.code == 2 and words in line and line.count("\n") == 1, line
