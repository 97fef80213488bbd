"""experiments/ablations.py: each variant is made once, as what its name says, and told."""
import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny

import eval_niah
import niah
import train
from experiments import ablations, runs
from infra import files
from infra.tokenizers import ByteTokenizer
from model import PRESETS, Config, Transformer
from triton_ops import backend

TINY = Config(257, n_layer=1, width=32, n_head=2, n_kv_head=2, mlp_width=64, context_len=512,
              eos_id=256)
RUN = ["--context_len=512", "--tasks", "niah_single_1", "--arl=16", "--batch=2", "--device=cpu"]


@pytest.fixture(autouse=True)
def kernels_stay_as_they_were(monkeypatch):
    """A run's --kernels=torch would hold for the tests of other files."""
    monkeypatch.setattr(backend, "choice", backend.choice)


@pytest.fixture
def refusal(tmp_path, monkeypatch, capsys):
    """A function of flags, which end the command in an empty folder: the line that it says."""
    monkeypatch.chdir(tmp_path)

    def line(*argv):
        with pytest.raises(SystemExit) as end:
            ablations.main([*argv])
        told = capsys.readouterr().err
        assert end.value.code == 2 and told.count("\n") == 1, told
        return told
    return line


# ---------------------------------------------------------------- lengths, loss

def constant_gates(model, most=10):
    """Give each channel a gate that reads nothing. -> lengths 1 / (1 - g), (layers, KV, D)"""
    expected = []
    for i, layer in enumerate(model.layers):
        projection = layer.self_attn.memory.proj
        L = torch.linspace(1.5, most - i, len(projection.bias))
        with torch.no_grad():
            projection.weight.zero_()
            projection.bias.copy_((L - 1).log())
        expected.append(L.view(model.config.n_kv_head, -1))
    return torch.stack(expected)


def test_lm_loss_of_an_untrained_model_is_that_of_guessing():
    """Targets off by one place, a sum for a mean, logits in another unit: no log(vocabulary)."""
    torch.manual_seed(0)
    model = Transformer(replace(TINY, context_len=128, memory=True))
    loss = ablations.lm_loss(model, ByteTokenizer(), n_windows=4)
    assert loss == pytest.approx(math.log(257), abs=0.05)
    ids = torch.tensor(ByteTokenizer().encode(ablations.docstrings())[:4 * 129]).view(4, 129)
    # the last input token adds nothing to what comes before it
    logits = model(ids)[:, :-1].log_softmax(-1)
    assert loss == pytest.approx(-logits.gather(2, ids[:, 1:, None]).mean().item(), abs=1e-5)


def test_docstrings_are_text_that_training_never_saw():
    """A text of the essays, that changes from call to call, or too short for 64 windows of 1024."""
    text = ablations.docstrings()
    assert text == ablations.docstrings() and len(text) > 64 * 1025
    words, essays = text.split(), " ".join(niah.essay_words()[0])
    tens = [" ".join(words[start:start + 10]) for start in range(0, len(words), 10)]
    assert not [ten for ten in tens if ten in essays]


# ---------------------------------------------------------------- the command

def test_a_variant_is_trained_once_as_itself_and_evaluated(tmp_path, monkeypatch, capsys):
    """Training without the change, an evaluation of something else, a finished run made again."""
    monkeypatch.setitem(PRESETS, "micro", TINY)
    monkeypatch.setattr(eval_niah, "METHODS", ["quest:budget=1/4", "snapkv:budget=1/4"])
    monkeypatch.chdir(tmp_path)
    trial = ["--run=fixed-decay-0", "--samples=1", *RUN, "--steps=2", "--save_every=1"]
    again = lambda *flags: ablations.main([*trial, *flags])
    again()
    run = Path("out/ablations/ablation-fixed-decay-0")
    result = Path("results/ablations/fixed-decay-0.json")
    record = json.loads(result.read_text())
    assert record["command"] == "python -m experiments.ablations " + " ".join(trial)
    trained, asked = record["train"]["settings"], record["eval"]["settings"]
    assert trained["seed"] == 0 and trained["batch"] == 2
    assert {"command", "commit", "device", "torch"} <= record["train"].keys()
    assert asked["kernels"] == "torch" and asked["samples"] == 1
    assert list(record["scores"]) == ["dense", "quest:budget=1/4,block_size=8",
                                      "snapkv:budget=1/4,window=8,kernel=15"]
    tasks = record["scores"]["dense"]["tasks"]
    assert tasks.keys() == {"niah_single_1"} == record["prompts"].keys()
    assert record["median_length"] == pytest.approx(1)  # of lengths 1 and 16, the lower
    args = train.parse(["--memory=fixed-decay", "--recipe=micro", *RUN])
    new = train.parallel.make_model(Transformer, *train.what_to_train(args), args)
    trained, untrained = (model.layers[0].self_attn.k_proj.weight
                          for model in (Transformer.from_pretrained(run), new))
    assert not torch.equal(trained, untrained)

    for path in run, f"{run}-pretrained":  # as a checkpoint it is still what it was trained as
        assert Transformer.from_pretrained(path).config.memory == "fixed-decay"
    shutil.rmtree(run / "step_0000002")
    # its train.json differs in the time it took
    result.write_text(json.dumps(record | {"median_length": "of another model"}))
    again()  # goes on after step 1, though AdamW has no state of the gate, and is asked again
    assert json.loads(result.read_text())["median_length"] == pytest.approx(1)
    monkeypatch.setattr(train, "train", lambda args: pytest.fail("trained again"))
    again("--samples=2")
    assert json.loads(result.read_text())["eval"]["settings"]["samples"] == 2
    monkeypatch.setattr(eval_niah, "main", lambda argv: pytest.fail("evaluated again"))
    again("--samples=2")
    monkeypatch.setattr(runs, "prompts_of", lambda *_: {"niah_single_1": "of other words"})
    with pytest.raises(pytest.fail.Exception, match="evaluated again"):
        again("--samples=2")
    monkeypatch.setattr(runs, "prompts_of", lambda *_: json.loads(result.read_text())["prompts"])
    again("--samples=2")
    with pytest.raises(SystemExit) as end:  # a run of other flags is not this one
        again("--lr=1e-5")
    assert end.value.code == 2 and "--lr" in capsys.readouterr().err and result.exists()


def test_lengths_and_lm_loss_of_a_checkpoint(tmp_path, monkeypatch, capsys):
    """A table that mixes up heads and layers; a loss or a plot that the command does not give."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ablations, "MODULES", ["heapq"])
    model = tiny(vocab_size=257, memory=True, width=64, n_kv_head=2, context_len=512)
    expected = constant_gates(model).median(dim=2).values
    model.save_pretrained("model")
    ablations.main(["--lengths", "model"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = [[float(cell) for cell in row[1:]] for row in rows if row[0].isdigit()]
    assert rows == [pytest.approx(row, abs=0.06) for row in expected.tolist()]
    ablations.main(["--lm_loss", "model", "model"])
    losses = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()
              if line.startswith("model ")]
    assert losses == [pytest.approx(ablations.lm_loss(model, ByteTokenizer()), abs=1e-3)] * 2
    told = json.loads(Path("results/lm-loss.json").read_text())
    assert told["nats_per_token"]["model"] == pytest.approx(losses[0], abs=1e-3)
    assert "--lm_loss model model" in told["command"]
    report = json.loads(Path("results/lengths.json").read_text())
    found = torch.tensor(report["lengths"]).median(dim=2).values.tolist()
    assert report["checkpoint"] == "model"
    assert found == [pytest.approx(row, rel=1e-3, abs=1e-3) for row in expected.tolist()]
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    assert Path("results/lengths.png").read_bytes().startswith(b"\x89PNG")


def test_all_variants_stop_at_the_first_that_fails(refusal, monkeypatch):
    """A table of what is left, or a wait for the rest; a line that tells not which run, or why."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # one at a time
    line = refusal("--variants", "head-gate", "memory", "--steps=1", "--haystack=nowhere.txt", *RUN)
    assert line.startswith("ablations.py: ablation-head-gate-0: ") and "nowhere.txt" in line
    assert not Path("out/ablations/ablation-memory-0.log").exists()
    assert not Path("results").exists()


def written(variant, seed, score, prompts="a hash"):
    scores = {method: {"mean": score, "tasks": {}} for method in ["dense", *eval_niah.METHODS]}
    files.save({"scores": scores, "median_length": 7.0, "prompts": {"niah_single_1": prompts},
                "train": {}, "eval": {"settings": {"samples": 100}}},
               f"results/ablations/{variant}-{seed}.json")


def test_all_runs_make_one_table(refusal, monkeypatch, capsys):
    """A row of another variant, seeds left out or run twice, results that were there untold."""
    made, asked_before = [], []

    class Process:  # in place of a run
        def __init__(self, command, **_):
            made.append(command[2].removeprefix("--run="))
            written(*ablations.named(made[-1]), 10.0 * len(made))

        def wait(self):
            return 0
    monkeypatch.setattr(runs, "subprocess", SimpleNamespace(Popen=Process))
    written("values-only", 0, 90.0)
    # it was asked other prompts than these would be
    line = refusal("--variants", "no-arl", *RUN)
    assert "values-only-0.json was asked other prompts" in line and made == []
    damaged = Path("results/ablations/no-arl-1.json")
    damaged.write_text("{")  # of a wanted run, but who knows what it was
    line = refusal("--variants", "no-arl", "--seeds", "1", *RUN)
    assert "no-arl-1.json is damaged" in line and made == []
    damaged.unlink()

    monkeypatch.setattr(runs, "refuse_other_prompts", lambda stay, _: asked_before.append(stay))
    ablations.main(["--variants", "no-arl", "memory", "--seeds", "3", "1", "3", *RUN])
    rows = {row[0]: row[1:] for row in map(str.split, capsys.readouterr().out.splitlines()) if row}
    assert made == ["no-arl-3", "memory-3", "no-arl-1", "memory-1"]
    assert {variant: rows[variant] for variant in rows if variant in ablations.VARIANTS} == {
        "no-arl": ["2", *["20.0±14.1"] * 10, "7.0"], "memory": ["2", *["30.0±14.1"] * 10, "7.0"],
        "values-only": ["1", *["90.0"] * 10, "7.0"]}
    ablations.main(["--variants"])  # the table again, and nothing else
    assert "30.0" in capsys.readouterr().out and len(made) == 4
    ablations.main(["--variants", "no-arl", "--seeds", "3", *RUN])
    stay = [[file.stem for file in before] for before in asked_before]
    assert stay == [["values-only-0"], ["memory-1", "memory-3", "no-arl-1", "values-only-0"]]


def test_results_that_make_no_table_are_refused(refusal):
    """None at all, one of other prompts, a foreign file: which, and how to go on."""
    assert "--variants" in refusal("--variants")
    written("memory", 0, 1.0)
    written("no-arl", 0, 1.0, "other prompts")
    assert "no-arl-0.json" in refusal("--variants")
    for foreign in "{}", "[]", "{":
        Path("results/ablations/memory-0.json").write_text(foreign)
        assert "memory-0.json" in refusal("--variants")


@pytest.mark.parametrize("flags, word", [
    ("--frobnicate", "--frobnicate"),
    ("--variants valuesonly", "valuesonly"),
    ("--variants fixed-decay --steps=0", "--steps"),
    ("--run fixed-decay", "fixed-decay"),
    ("--run memory-0 --seed=3", "--seed=3"),
    ("--variants memory --memory=off", "--memory=off"),
    ("--variants --frobnicate", "--frobnicate"),
    ("--seeds -1", "-1"),
    ("--run decay-0", "decay-0"),
    (f"--run memory-0 --results={os.devnull}", "--results"),
    ("--samples=0", "--samples"),
    ("--lengths nowhere", "nowhere"),
    ("--lm_loss nowhere", "nowhere"),
    ("--lm_loss nowhere --steps=3", "--steps"),
])
def test_a_wrong_flag_is_one_line_and_exit_2(flags, word, refusal, monkeypatch):
    """A traceback, or six processes that each end in one."""
    monkeypatch.setattr(runs, "subprocess", None)  # no run may start
    assert word in refusal(*flags.split())
