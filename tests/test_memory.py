"""memory.py: the forms of Eq. 1 are one function, in values and gradients, and the official one."""
import math

import pytest
import torch
from hypothesis import given, strategies as st

from conftest import assert_close, draw_tokens, error, tiny
from drawn import dtypes, law, seeds
from memory import (arl_passes, effective_length, lengths_of, memory_loop, memory_scan, memory_step,
                    scan)
from sparse import Dilated


def draw(B, T, KV, D, seed, dtype=torch.float64, extreme=False):
    """k, v, gate, state. Gates of std 4 cover memories of 1 to 10,000 tokens."""
    source = torch.Generator().manual_seed(seed)
    random = lambda *shape: torch.randn(shape, generator=source, dtype=torch.float64)
    k, v, gate, state = *(random(B, T, KV, D) for _ in range(3)), random(2, B, KV, D)
    gate = 4 * gate
    if extreme:
        which = torch.randint(8, gate.shape, generator=source)
        for n, value in enumerate((math.inf, -math.inf, 40)):
            gate = gate.masked_fill(which == n, value)
    return k.to(dtype), v.to(dtype), gate.to(dtype), state.float()


shapes = st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(1, 3), st.integers(1, 4))


# ---------------------------------------------------------------- Eq. 1

def test_memory_loop_is_equation_1():
    """A definition that is itself wrong: k and v swapped, another row's state, g and 1 - g."""
    k, v, gate, state = draw(2, 6, 3, 4, seed=0)
    *out, last = memory_loop(k, v, gate, state)
    for x, x_mem, x_last, m in zip((k, v), out, last, state):
        for b, h, d in torch.cartesian_prod(*map(torch.arange, (2, 3, 4))).tolist():
            now = m[b, h, d].item()
            for t in range(6):  # in Python's own floats
                g = 1 / (1 + math.exp(-gate[b, t, h, d].item()))
                now = g * now + (1 - g) * x[b, t, h, d].item()
                assert x_mem[b, t, h, d].item() == pytest.approx(now, abs=1e-14)
            assert x_last[b, h, d].item() == pytest.approx(now, abs=1e-14)


forms = st.sampled_from([memory_loop, memory_scan, memory_step])


@law(60)
@given(shapes, dtypes, st.booleans(), st.booleans(),
       st.lists(st.tuples(st.integers(1, 70), forms), max_size=6), seeds)
def test_loop_scan_and_steps_are_one_memory(shape, dtype, extreme, with_state, pieces, seed):
    """A scan that is wrong off a power of two; a state lost between pieces; 0 * inf at a gate."""
    inputs = [x.requires_grad_() for x in draw(*shape, seed, dtype, extreme)]
    k, v, gate, state = inputs
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    carried, out, t = state if with_state else None, [], 0
    while t < shape[1]:
        length, form = pieces.pop() if pieces else (shape[1], memory_scan)
        now = slice(t, t + 1 if form is memory_step else t + length)
        k_mem, v_mem, carried = form(k[:, now], v[:, now], gate[:, now], carried)
        out.append(torch.stack([k_mem, v_mem]))
        t = now.stop
    out = torch.cat(out, dim=2)
    *expected, last = memory_loop(*doubles[:3], doubles[3] if with_state else None)
    expected = torch.stack(expected)
    assert out.dtype == dtype and carried.dtype == torch.promote_types(dtype, torch.float32)
    atol = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 3e-2}[dtype]
    assert_close(out.double(), expected, atol, what="k~, v~")
    assert_close(carried.double(), last, min(atol, 1e-5), what="state")

    # the last state has a gradient too: a chunk's training may depend on it
    source, wanted = torch.Generator().manual_seed(seed), 4 if with_state else 3
    w, w_last = (torch.randn(x.shape, generator=source, dtype=torch.float64) for x in (out, last))
    mine = (out.double() * w).sum() + (carried.double() * w_last).sum()
    ref = (expected * w).sum() + (last * w_last).sum()
    gradients = zip(("dk", "dv", "dgate", "dstate"), torch.autograd.grad(mine, inputs[:wanted]),
                    torch.autograd.grad(ref, doubles[:wanted]))
    for what, d, d_ref in gradients:
        allowed = atol * (5 + d_ref.abs().max().item())
        assert_close(d.double(), d_ref, max(allowed, 1e-5 * (what == "dstate")), what=what)


def test_memory_scan_matches_official_scan(ratplus):
    """A recurrence that is none of RAT+'s: gate inverted, or not shared by k and v."""
    k, v, gate = inputs = [ratplus[f"memory/{x}"].clone().requires_grad_()
                           for x in ("k", "v", "gate")]
    out = ratplus["memory/k_out"], ratplus["memory/v_out"]
    k_mem, v_mem, last = memory_scan(k, v, gate)
    assert_close(k_mem, out[0], what="k~")
    assert_close(v_mem, out[1], what="v~")
    assert_close(last, torch.stack(out)[:, :, -1], what="state")
    loss = (k_mem * ratplus["memory/k_weight"]).sum() + (v_mem * ratplus["memory/v_weight"]).sum()
    for name, gradient in zip(("k", "v", "gate"), torch.autograd.grad(loss, inputs)):
        assert error(gradient, ratplus[f"memory/{name}_grad"]) < 1e-5, name


@pytest.mark.parametrize("form", [memory_loop, memory_scan, memory_step])
def test_bf16_costs_only_the_rounding_of_the_output(form):
    """Decays multiplied in bf16, or a state that is rounded at each step, as the original's is."""
    k, v, gate, _ = draw(2, 200, 3, 4, seed=5, dtype=torch.bfloat16)
    gate = gate * 0.25 + 5  # memories of about 150 tokens
    exact = memory_loop(k.double(), v.double(), gate.double())
    length = 1 if form is memory_step else 200
    state, out = None, []
    for now in zip(*(x.split(length, dim=1) for x in (k, v, gate))):
        *some, state = form(*now, state)
        out.append(torch.stack(some))
    out = torch.cat(out, dim=2)
    assert out.dtype == torch.bfloat16 and state.dtype == torch.float32
    for x, ref in zip(out, exact):
        assert error(x, ref) <= 1.05 * error(ref.bfloat16(), ref)
    assert error(state, exact[2]) < 1e-5


def test_step_refuses_two_tokens():
    """Two tokens read as one step would silently lose the first."""
    with pytest.raises(AssertionError, match="one token"):
        memory_step(*draw(2, 2, 3, 4, seed=13))


@law(60)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(1, 40), st.booleans(),
       seeds)
def test_scan_is_its_recurrence(sizes, T, signed, seed):
    """A scan for gates and four dims alone, or one that writes over what goes in."""
    source = torch.Generator().manual_seed(seed)
    g, b = (torch.randn(sizes[0], T, *sizes[1:], generator=source, dtype=torch.float64)
            for _ in "gb")
    g = g if signed else torch.sigmoid(g)
    before, m, expected = (g.clone(), b.clone()), torch.zeros_like(b[:, 0]), []
    for t in range(T):
        m = g[:, t] * m + b[:, t]
        expected.append(m)
    expected = torch.stack(expected, dim=1)
    assert_close(scan(g, b), expected, atol=1e-12 * (1 + expected.abs().max().item()))
    assert torch.equal(g, before[0]) and torch.equal(b, before[1])


# ---------------------------------------------------------------- learning to remember

@law(30)
@given(shapes, seeds, st.sampled_from([0.1, 1, 4]), st.integers(-4, 4))
def test_effective_length_is_the_mean_age_of_what_is_remembered(shape, seed, spread, shift):
    """A mean that is right only for constant gates, or for one row."""
    B, T, KV, D = shape
    gate = (draw(*shape, seed)[2] * spread / 4 + shift).float()
    g, total = torch.sigmoid(gate.double()), torch.zeros(KV, D, dtype=torch.float64)
    for t in range(T // 2, T):
        # the weight of token s in m[t] is (1 - g[s]) g[s+1] ... g[t]
        weight = torch.stack([(1 - g[:, s]) * g[:, s + 1:t + 1].prod(1) for s in range(t + 1)])
        age = torch.arange(t, -1, -1, dtype=torch.float64).view(-1, 1, 1, 1)
        total += ((weight * age).sum(0) / weight.sum(0)).sum(0)
    assert_close(effective_length(gate).double(), 1 + total / (B * (T - T // 2)), atol=1e-4 * T)


@torch.no_grad()
def test_lengths_of_measures_the_gates_of_each_layer():
    """Another layer's gate, or one that the model does not use; a hook that stays."""
    model, tokens, gates = tiny(memory=True, n_kv_head=2), draw_tokens(2, 30), []
    hooks = [layer.self_attn.memory.proj.register_forward_hook(lambda *args: gates.append(args[2]))
             for layer in model.layers]
    before = model(tokens)
    for hook in hooks:
        hook.remove()
    with lengths_of(model) as found:
        assert torch.equal(model(tokens), before)
    model(tokens)
    assert len(found) == len(gates) == 2
    for length, gate in zip(found, gates):
        assert_close(length, effective_length(gate.unflatten(2, (-1, model.config.head_width))))


def test_arl_passes_are_sparse_then_dense():
    """ARL without its sparse pass, or with a local window that makes the memory needless."""
    assert arl_passes(64) == [Dilated(dilation=64, local=0, initial=0), None]
    assert arl_passes(0) == [None]
