"""experiments/gate_start.py: the losses and lengths of conversions, made once."""
import json

import pytest

import train
from experiments import gate_start

TRIAL = ["--batch=2", "--device_batch=2", "--context_len=512", "--device=cpu", "--compile=off"]


def test_losses_are_the_logs(tmp_path):
    """A mean that reaches into other steps."""
    log = [{"step": n + 1, "loss": float(n + 1), "arl_loss": 2.0 * (n + 1)} for n in range(400)]
    write = lambda lines: (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    write(log)
    means = {1: 1.0, 40: 30.5, 100: 90.5, 200: 190.5, 400: 390.5}
    assert gate_start.losses(tmp_path) == {step: {"dense": mean, "arl": 2 * mean}
                                           for step, mean in means.items()}
    for lines in [], log[1:], ["no log"]:
        write(lines)
        with pytest.raises(ValueError, match=r"log\.jsonl lacks steps.* away"):
            gate_start.losses(tmp_path)


def test_all_are_made_once_and_told(tmp_path, monkeypatch, capsys):
    """A second call that trains again, or a table of half the runs."""
    monkeypatch.chdir(tmp_path)
    train.train(train.parse(["--preset=pico", "--memory=off", "--steps=1", "--name=source",
                             *TRIAL]))
    flags = ["--init=out/source", "--g0", "0.1", "0.5", "--steps=2", "--arl=16", *TRIAL]
    capsys.readouterr()
    gate_start.main(flags)
    first = capsys.readouterr().out
    gate_start.main(flags)
    again = capsys.readouterr().out
    assert "train.py took" in first and "took" not in again and again.strip() in first
    report = json.load(open("results/gate-start.json"))
    losses = report["losses"]
    assert set(losses) == {"0.1", "0.5"} and set(losses["0.5"]) == {"1", "2"}
    assert losses["0.1"]["1"] != losses["0.5"]["1"]
    for g0, lengths in report["lengths"].items():  # 1 / (1 - g): two steps move little
        assert lengths == pytest.approx([1 / (1 - float(g0))] * 2, rel=0.1)
