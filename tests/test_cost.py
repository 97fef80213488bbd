"""
cost.py: the figures that a run tells before it starts, and what it refuses. Peaks that GPUs measured are held fast here.
"""
import argparse
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from infra import cost
import train
from conftest import one_line
from model import PRESETS, Transformer

GB = 1e9
WITH = {name: replace(PRESETS[name], memory=True) for name in ("olmo2-1b", "olmo2-7b")}

# torch.cuda.max_memory_allocated after a few steps, GB; T = 4096. docs/speed.md names devices and commands
MEASURED = [
    # config, GPUs, sequences at a time, parts, layers anew, what stays, peak
    (PRESETS["olmo2-1b"], 1, 4, 4, 0, "weights", 54.34),
    (WITH["olmo2-1b"], 1, 4, 4, 0, "weights", 59.96),
    (WITH["olmo2-1b"], 1, 8, 1, 8, "weights", 55.38),
    (PRESETS["ratplus-1b"], 1, 4, 1, 0, "weights", 57.05),
    (WITH["olmo2-1b"], 1, 8, 2, 0, "weights", 88.56),
    (WITH["olmo2-1b"], 2, 8, 1, 0, "nothing", 71.30),
    (WITH["olmo2-1b"], 2, 8, 2, 0, "nothing", 74.40),
    (WITH["olmo2-1b"], 2, 16, 1, 0, "nothing", 127.61),
    (WITH["olmo2-7b"], 2, 2, 4, 0, "nothing", 117.61),
    (WITH["olmo2-7b"], 4, 2, 4, 0, "all", 123.36),
    (WITH["olmo2-7b"], 4, 1, 8, 0, "nothing", 59.06),
    (WITH["olmo2-1b"], 4, 16, 1, 0, "nothing", 122.96),
]


@pytest.mark.parametrize("config, world, rows, parts, anew, stays, peak", MEASURED)
def test_prediction_is_within_3_percent_of_what_was_measured(config, world, rows, parts, anew, stays, peak):
    """A formula changed for one shape that no longer fits the others."""
    predicted = sum(cost.needs(config, world, rows * 4096, anew, parts, stays).values()) / GB
    assert predicted == pytest.approx(peak, rel=0.03)


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_are_the_models(name):
    """A projection or a norm forgotten."""
    config = PRESETS[name] if PRESETS[name].n_layer < 20 else replace(PRESETS[name], n_layer=2)
    total, layer, ends = cost.parameters(config)
    with torch.device("meta"):
        model = Transformer(config)
    assert total == sum(p.numel() for p in model.parameters()) == config.n_layer * layer + ends


def test_plan_takes_as_many_sequences_as_fit_and_recomputes_only_if_it_must():
    """A GPU half empty; activations computed twice though there was room."""
    config, share = WITH["olmo2-7b"], 96
    node = cost.plan(config, share, 4096, world=8, room=76 * GB)
    assert (node.device_batch, node.recompute) == (2, 0) and node.total <= 76 * GB
    assert sum(cost.needs(config, 8, 3 * 4096, 0, 32).values()) > 76 * GB  # the next divisor of 96
    two = cost.plan(config, 16, 4096, world=2, room=135 * GB)
    assert (two.device_batch, two.recompute) == (2, 0)
    tight = cost.plan(config, 1, 4096, world=2, room=70 * GB)
    assert tight.device_batch == 1 and 0 < tight.recompute < 32
    less = sum(cost.needs(config, 2, 4096, tight.recompute - 1).values())
    assert less > 70 * GB >= tight.total


def test_plan_keeps_weights_and_gradients_where_there_is_room():
    """Gradients sent for each part though they could be summed at home."""
    plan = lambda *given, **more: (lambda found: (found.device_batch, found.stays))(cost.plan(*given, **more))
    # parts of 8,192 tokens that need not talk, before larger ones that must
    assert plan(WITH["olmo2-7b"], 8, 4096, world=4, room=135 * GB) == (2, "all")
    assert sum(cost.needs(WITH["olmo2-7b"], 4, 4 * 4096, 0, 2).values()) < 135 * GB
    assert plan(WITH["olmo2-7b"], 8, 4096, world=2, room=135 * GB) == (2, "weights")
    assert plan(WITH["olmo2-7b"], 8, 4096, world=4, room=76 * GB) == (1, "weights")
    assert plan(WITH["olmo2-7b"], 8, 4096, world=8, room=76 * GB) == (2, "nothing")
    # but not for crumbs; and a batch that fits as one part has no gradients to keep
    assert [plan(WITH["olmo2-7b"], 64, 512, world=4, room=room * GB) for room in (125, 102)] == [(16, "all"), (16, "weights")]
    assert plan(WITH["olmo2-1b"], 4, 4096, world=4, room=135 * GB) == (4, "weights")
    assert plan(WITH["olmo2-1b"], 8, 4096, world=1, room=76 * GB) == (4, "weights")


def test_what_cannot_fit_is_refused_in_one_line():
    """Hours in a queue for an out-of-memory error."""
    with pytest.raises(ValueError) as raised:
        cost.plan(PRESETS["olmo2-32b"], 96, 4096, world=2, room=76 * GB)
    one_line(raised, "cannot fit", "processes like this one could hold it", "weights and moments")
    n = int(re.search(r"(\d+) processes", str(raised.value))[1])
    assert cost.plan(PRESETS["olmo2-32b"], 96, 4096, world=n, room=76 * GB)
    with pytest.raises(ValueError):
        cost.plan(PRESETS["olmo2-32b"], 96, 4096, world=n - 1, room=76 * GB)


def test_a_model_too_large_for_this_machine_is_refused_before_it_is_made(monkeypatch, tmp_path):
    """A machine that swaps itself to death."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cost, "room", lambda device, processes_here: 1e6)
    with pytest.raises(ValueError, match="cannot fit"):
        train.train(train.parse(["--preset=pico", "--device=cpu", "--context_len=512", "--tasks", "niah_single_1", "--steps=1"]))


def test_lines_are_those_of_the_readme():
    """What docs/training.md says of the paper's recipe, which nobody has run."""
    args = argparse.Namespace(batch=768, context_len=4096, steps=3179, device="cuda", arl=64, joint=0, adapt=None)
    config, readme = WITH["olmo2-7b"], (Path(__file__).parent.parent / "docs/training.md").read_text()
    of_pass = {name: 768 * 4096 * cost.flops_per_token(config, reads) for name, reads in (("arl", 4096 / 2 / 64), ("dense", 4096 / 2))}
    lines = list(cost.lines(config, cost.plan(config, 96, 4096, 8, 76.5 * GB), args, of_pass, 989e12, 8))
    assert len(lines) == 4
    for line in lines:
        assert f"out/olmo2-continue: {line}\n" in readme, line


@pytest.mark.parametrize("name, peak", [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H200", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("cpu", None)])
def test_peak_of_a_device(name, peak):
    assert cost.peak_flops(name) == peak
