"""
cost.py: the figures that a run tells before it starts, and what it refuses. Peaks that GPUs
measured are held fast here.
"""
import argparse
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import train
from conftest import one_line
from infra import cost
from model import PRESETS, Transformer

GB = 1e9
PLAIN_1B, RATPLUS_1B = PRESETS["olmo2-1b"], PRESETS["ratplus-1b"]
OLMO_1B, OLMO_7B = (replace(PRESETS[name], memory=True) for name in ("olmo2-1b", "olmo2-7b"))
TRAINING = Path(__file__).parent.parent / "docs/training.md"

# torch.cuda.max_memory_allocated after a few steps, GB; T = 4096. docs/speed.md names devices and
# commands.
MEASURED = [
    # config, GPUs, sequences at a time, parts, layers anew, what stays, peak
    (PLAIN_1B, 1, 4, 4, 0, "weights", 54.34),
    (OLMO_1B, 1, 4, 4, 0, "weights", 59.96),
    (OLMO_1B, 1, 8, 1, 8, "weights", 55.38),
    (RATPLUS_1B, 1, 4, 1, 0, "weights", 57.05),
    (OLMO_1B, 1, 8, 2, 0, "weights", 88.56),
    (OLMO_1B, 2, 8, 1, 0, "nothing", 71.30),
    (OLMO_1B, 2, 8, 2, 0, "nothing", 74.40),
    (OLMO_1B, 2, 16, 1, 0, "nothing", 127.61),
    (OLMO_7B, 2, 2, 4, 0, "nothing", 117.61),
    (OLMO_7B, 4, 2, 4, 0, "all", 123.36),
    (OLMO_7B, 4, 1, 8, 0, "nothing", 59.06),
    (OLMO_1B, 4, 16, 1, 0, "nothing", 122.96),
]


def needs(*given):
    return sum(cost.needs(*given).values()) / GB


@pytest.mark.parametrize("config, world, rows, parts, anew, stays, peak", MEASURED)
def test_prediction_is_within_3_percent_of_what_was_measured(config, world, rows, parts, anew,
                                                             stays, peak):
    """A formula changed for one shape that no longer fits the others."""
    predicted = needs(config, world, rows * 4096, anew, parts, stays)
    assert predicted == pytest.approx(peak, rel=0.03)


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_are_the_models(name):
    """A projection or a norm forgotten."""
    config = PRESETS[name]
    if config.n_layer >= 20:
        config = replace(config, n_layer=2)
    total, layer, ends = cost.parameters(config)
    with torch.device("meta"):
        model = Transformer(config)
    assert total == sum(p.numel() for p in model.parameters()) == config.n_layer * layer + ends


def test_plan_takes_as_many_sequences_as_fit_and_recomputes_only_if_it_must():
    """A GPU half empty; activations computed twice though there was room."""
    node = cost.plan(OLMO_7B, 96, 4096, world=8, room=76 * GB)
    assert (node.device_batch, node.recompute) == (2, 0) and node.total <= 76 * GB
    assert needs(OLMO_7B, 8, 3 * 4096, 0, 32) > 76  # the next divisor of 96
    two = cost.plan(OLMO_7B, 16, 4096, world=2, room=135 * GB)
    assert (two.device_batch, two.recompute) == (2, 0)
    tight = cost.plan(OLMO_7B, 1, 4096, world=2, room=70 * GB)
    assert tight.device_batch == 1 and 0 < tight.recompute < 32
    assert needs(OLMO_7B, 2, 4096, tight.recompute - 1) > 70 >= tight.total / GB


def test_plan_keeps_weights_and_gradients_where_there_is_room():
    """Gradients sent for each part though they could be summed at home."""
    def plan(config, share, T, world, room):
        found = cost.plan(config, share, T, world, room * GB)
        return found.device_batch, found.stays
    # parts of 8,192 tokens that need not talk, before larger ones that must
    assert plan(OLMO_7B, 8, 4096, 4, 135) == (2, "all")
    assert needs(OLMO_7B, 4, 4 * 4096, 0, 2) < 135
    assert plan(OLMO_7B, 8, 4096, 2, 135) == (2, "weights")
    assert plan(OLMO_7B, 8, 4096, 4, 76) == (1, "weights")
    assert plan(OLMO_7B, 8, 4096, 8, 76) == (2, "nothing")
    # but not for crumbs; and a batch that fits as one part has no gradients to keep
    assert plan(OLMO_7B, 64, 512, 4, 125) == (16, "all")
    assert plan(OLMO_7B, 64, 512, 4, 102) == (16, "weights")
    assert plan(OLMO_1B, 4, 4096, 4, 135) == (4, "weights")
    assert plan(OLMO_1B, 8, 4096, 1, 76) == (4, "weights")


def test_only_a_small_model_that_fits_whole_on_one_gpu_is_recorded():
    """Graphs of a batch that is cut, whose replays write over each other's gradients."""
    pico = PRESETS["pico"]
    args = dict(device="cuda", batch=8, context_len=512, device_batch=None, recompute=None,
                compile="on")

    def small(world=1, flops=1e9, room=GB, **changes):
        flags = argparse.Namespace(**args | changes)
        return cost.plan_of(flags, pico, {"arl": 1.0, "dense": flops}, world, room).small
    least = GB * min(needs(pico, 1, 8 * 512, anew, 1, "weights", 2, True) for anew in range(3))
    assert small() and small(device_batch=8) and small(room=least + 1)
    assert not any([small(device_batch=4), small(world=2), small(flops=cost.SMALL),
                    small(room=least - 1), small(compile="off"), small(device="cpu")])


def test_what_cannot_fit_is_refused_in_one_line():
    """Hours in a queue for an out-of-memory error."""
    plan = lambda world: cost.plan(PRESETS["olmo2-32b"], 96, 4096, world, room=76 * GB)
    with pytest.raises(ValueError) as raised:
        plan(2)
    one_line(raised, "cannot fit", "processes like this one could hold it", "weights and moments")
    n = int(re.search(r"(\d+) processes", str(raised.value))[1])
    assert plan(n)
    with pytest.raises(ValueError):
        plan(n - 1)


def test_a_model_too_large_for_this_machine_is_refused_before_it_is_made(monkeypatch, tmp_path):
    """A machine that swaps itself to death."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cost, "room", lambda device, processes_here: 1e6)
    with pytest.raises(ValueError, match="cannot fit"):
        train.train(train.parse(["--preset=pico", "--device=cpu", "--context_len=512", "--tasks",
                                 "niah_single_1", "--steps=1"]))


def test_lines_are_those_of_the_docs():
    """What docs/training.md says of the paper's recipe, which nobody has run."""
    args = argparse.Namespace(batch=768, context_len=4096, steps=3179, device="cuda", arl=64,
                              joint=0, adapt=None)
    of_pass = train.flops_of(args, OLMO_7B)
    plan = cost.plan(OLMO_7B, 96, 4096, 8, 76.5 * GB)
    lines = list(cost.lines(OLMO_7B, plan, args, of_pass, 989e12, 8))
    assert len(lines) == 4
    for line in lines:
        assert f"out/olmo2-continue: {line}\n" in TRAINING.read_text(), line


@pytest.mark.parametrize("name, peak", [
    ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H200", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12),
    ("cpu", None)])
def test_peak_of_a_device(name, peak):
    assert cost.peak_flops(name) == peak
