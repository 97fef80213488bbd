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
    # config, GPUs, sequences at a time, layers anew, parts, what stays; peak
    ((PLAIN_1B, 1, 4, 0, 4, "weights"), 54.34),
    ((OLMO_1B, 1, 4, 0, 4, "weights"), 59.96),
    ((OLMO_1B, 1, 8, 8, 1, "weights"), 55.38),
    ((RATPLUS_1B, 1, 4, 0, 1, "weights"), 57.05),
    ((OLMO_1B, 1, 8, 0, 2, "weights"), 88.56),
    ((OLMO_1B, 2, 8, 0, 1, "nothing"), 71.30),
    ((OLMO_1B, 2, 8, 0, 2, "nothing"), 74.40),
    ((OLMO_1B, 2, 16, 0, 1, "nothing"), 127.61),
    ((OLMO_7B, 2, 2, 0, 4, "nothing"), 117.61),
    ((OLMO_7B, 4, 2, 0, 4, "all"), 123.36),
    ((OLMO_7B, 4, 1, 0, 8, "nothing"), 59.06),
    ((OLMO_1B, 4, 16, 0, 1, "nothing"), 122.96),
]


def needs(config, world, rows, *more):
    """GB that so many sequences of 4,096 tokens need."""
    return sum(cost.needs(config, world, rows * 4096, *more).values()) / GB


@pytest.mark.parametrize("given, peak", MEASURED)
def test_prediction_is_within_3_percent_of_what_was_measured(given, peak):
    """A formula changed for one shape that no longer fits the others."""
    assert needs(*given) == pytest.approx(peak, rel=0.03)


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_are_the_models(name):
    """A projection or a norm forgotten."""
    config = replace(PRESETS[name], n_layer=2)
    total, layer, ends = cost.parameters(config)
    with torch.device("meta"):
        model = Transformer(config)
    assert total == sum(p.numel() for p in model.parameters()) == config.n_layer * layer + ends


PLANS = [
    # config, share of a batch, T, GPUs, GB; sequences at a time, what stays
    ((OLMO_7B, 96, 4096, 8, 76), (2, "nothing")),
    ((OLMO_7B, 16, 4096, 2, 135), (2, "weights")),
    # parts of 8,192 tokens that need not talk, before larger ones that must
    ((OLMO_7B, 8, 4096, 4, 135), (2, "all")),
    ((OLMO_7B, 8, 4096, 2, 135), (2, "weights")),
    ((OLMO_7B, 8, 4096, 4, 76), (1, "weights")),
    ((OLMO_7B, 8, 4096, 8, 76), (2, "nothing")),
    # but not for crumbs; and a batch that fits as one part has no gradients to keep
    ((OLMO_7B, 64, 512, 4, 125), (16, "all")),
    ((OLMO_7B, 64, 512, 4, 102), (16, "weights")),
    ((OLMO_1B, 4, 4096, 4, 135), (4, "weights")),
    ((OLMO_1B, 8, 4096, 1, 76), (4, "weights")),
]


@pytest.mark.parametrize("given, wanted", PLANS)
def test_plan_takes_as_many_sequences_as_fit_and_sends_no_more_than_it_must(given, wanted):
    """A GPU half empty; gradients sent for each part though they could be summed at home."""
    *shape, room = given
    plan = cost.plan(*shape, room * GB)
    assert (plan.device_batch, plan.stays, plan.recompute) == (*wanted, 0)
    assert plan.total <= room * GB


def test_plan_recomputes_only_what_it_must():
    """Activations computed twice though there was room."""
    assert needs(OLMO_7B, 8, 3, 0, 32) > 76  # the next divisor of the first plan's 96
    assert needs(OLMO_7B, 4, 4, 0, 2) < 135  # the third might have larger parts
    plan = cost.plan(OLMO_7B, 1, 4096, world=2, room=70 * GB)
    assert plan.device_batch == 1 and 0 < plan.recompute < 32
    assert needs(OLMO_7B, 2, 1, plan.recompute - 1) > 70 >= plan.total / GB


def test_only_a_small_model_that_fits_whole_on_one_gpu_is_recorded():
    """Graphs of a batch that is cut, whose replays write over each other's gradients."""
    pico = PRESETS["pico"]

    def small(world=1, flops=1e9, room=GB, **changes):
        args = argparse.Namespace(**{"device": "cuda", "batch": 8, "context_len": 512, "compile":
                                     "on", "device_batch": None, "recompute": None} | changes)
        return cost.plan_of(args, pico, {"arl": 1.0, "dense": flops}, world, room).small
    least = GB * min(needs(pico, 1, 1, anew, 1, "weights", 2, True) for anew in range(3))
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


def test_peak_of_a_device():
    names = "NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA A100-SXM4-80GB", "cpu"
    assert list(map(cost.peak_flops, names)) == [989e12, 989e12, 312e12, None]
