"""memory.py: the three forms of Eq. 1 are one function, in values and gradients, and the official scan's."""
import pytest
import torch

from conftest import assert_close, error
from memory import arl_passes, effective_length, memory_loop, memory_scan, memory_step
from sparse import Dilated

LENGTHS = 1, 2, 3, 15, 16, 17, 63, 200  # on and off every power of two that the scan halves at


def draw(T, seed, dtype=torch.float64, B=2, KV=3, D=4):
    """k, v, gate, state. Gates of std 4 cover memories of 1 to 10,000 tokens."""
    source = torch.Generator().manual_seed(seed)
    k, v, gate = (torch.randn(B, T, KV, D, generator=source, dtype=torch.float64) for _ in range(3))
    state = torch.randn(2, B, KV, D, generator=source, dtype=torch.float64)
    return k.to(dtype), v.to(dtype), (4 * gate).to(dtype), state


def written_out(k, v, gate, state):
    """Eq. 1 on one channel after the other, in Python's own floats."""
    out = torch.empty(2, *k.shape, dtype=torch.float64)
    for which, x in enumerate((k, v)):
        for b, h, d in torch.cartesian_prod(*map(torch.arange, (k.shape[0], k.shape[2], k.shape[3]))).tolist():
            m = state[which, b, h, d].item()
            for t in range(k.shape[1]):
                g = torch.sigmoid(gate[b, t, h, d]).item()
                m = g * m + (1 - g) * x[b, t, h, d].item()
                out[which, b, t, h, d] = m
    return out


def test_memory_loop_is_equation_1():
    """A definition that is itself wrong: k and v swapped, the state of another row, g and 1 - g exchanged."""
    k, v, gate, state = draw(T=6, seed=0)
    k_mem, v_mem, last = memory_loop(k, v, gate, state)
    expected = written_out(k, v, gate, state)
    assert_close(torch.stack([k_mem, v_mem]), expected, atol=1e-14)
    assert_close(last, expected[:, :, -1], atol=1e-14, what="final state")


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("with_state", [False, True])
def test_memory_scan_matches_loop_in_values_and_gradients(T, with_state):
    """A scan that is wrong off its power of two, forgets the state, or has a wrong hand-written gradient."""
    results = []
    weights = draw(T, seed=100 + T)
    for form in memory_loop, memory_scan:
        inputs = [x.requires_grad_() for x in draw(T, seed=T)]
        k_mem, v_mem, last = form(*inputs[:3], inputs[3] if with_state else None)
        # the final state has a gradient too: a chunk's training may depend on it
        loss = sum((out * w).sum() for out, w in zip((k_mem, v_mem, last), (weights[0], weights[1], weights[3])))
        wanted = inputs if with_state else inputs[:3]
        results.append([k_mem, v_mem, last, *torch.autograd.grad(loss, wanted)])
    names = "k~", "v~", "state", "dk", "dv", "dgate", "dstate"
    for what, loop, scan in zip(names, *results):
        assert_close(scan, loop, atol=1e-12, what=what)


def test_memory_scan_passes_gradcheck():
    """A gradient that agrees with the loop's only because both are wrong."""
    k, v, gate, state = (x.requires_grad_() for x in draw(T=5, seed=3, B=1, KV=1, D=2))
    assert torch.autograd.gradcheck(memory_scan, (k, v, gate, state))


def test_memory_scan_matches_official_scan(ratplus):
    """A recurrence that is consistent in itself but is not RAT+'s: gate inverted, or not shared by k and v."""
    inputs = [ratplus[f"memory/{name}"].clone().requires_grad_() for name in ("k", "v", "gate")]
    k_mem, v_mem, last = memory_scan(*inputs)
    assert_close(k_mem, ratplus["memory/k_out"], what="k~")
    assert_close(v_mem, ratplus["memory/v_out"], what="v~")
    assert_close(last, torch.stack([ratplus["memory/k_out"], ratplus["memory/v_out"]])[:, :, -1], what="state")
    loss = (k_mem * ratplus["memory/k_weight"]).sum() + (v_mem * ratplus["memory/v_weight"]).sum()
    for name, gradient in zip(("k", "v", "gate"), torch.autograd.grad(loss, inputs)):
        assert error(gradient, ratplus[f"memory/{name}_grad"]) < 1e-5, name


# ---------------------------------------------------------------- precision and extremes

@pytest.mark.parametrize("T", LENGTHS)
def test_memory_scan_in_fp32_stays_close_to_fp64(T):
    """Decays multiplied in a way that loses precision with length."""
    k, v, gate, state = draw(T, seed=T + 1)
    exact = memory_loop(k, v, gate, state)
    rounded = [x.float() for x in (k, v, gate, state)]
    for what, out, loop, ref in zip(("k~", "v~", "state"), memory_scan(*rounded), memory_loop(*rounded), exact):
        assert out.dtype == torch.float32
        assert error(out, ref) <= 2 * error(loop, ref) + 1e-7, f"{what} at {T=}"


@pytest.mark.parametrize("form", [memory_loop, memory_scan])
def test_bf16_inputs_cost_only_the_rounding_of_the_output(form):
    """bf16 anywhere inside: 200 decays of 0.99 in bf16 are off by several percent."""
    k, v, gate, _ = draw(T=200, seed=5, dtype=torch.bfloat16)
    gate = gate * 0.25 + 5  # memories of about 150 tokens
    exact = memory_loop(k.double(), v.double(), gate.double())
    k_mem, v_mem, state = form(k, v, gate)
    assert (k_mem.dtype, v_mem.dtype, state.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    for out, ref in zip((k_mem, v_mem), exact):
        assert error(out, ref) <= 1.05 * error(ref.bfloat16(), ref)
    assert error(state, exact[2]) < 1e-5


def test_bf16_steps_do_not_drift():
    """A decoding state rounded to bf16 at each step, as in the original: up to 0.03 in the logits."""
    k, v, gate, _ = draw(T=200, seed=6, dtype=torch.bfloat16)
    gate = gate * 0.25 + 5
    exact = memory_loop(k.double(), v.double(), gate.double())
    state = None
    for t in range(200):
        now = slice(t, t + 1)
        k_mem, v_mem, state = memory_step(k[:, now], v[:, now], gate[:, now], state)
    assert state.dtype == torch.float32 and k_mem.dtype == torch.bfloat16
    assert error(state, exact[2]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", [memory_loop, memory_scan])
def test_extreme_gates_are_finite_and_exact(form, dtype):
    """Overflow from dividing by a product of decays, or 0 * inf at padding, in values or gradients."""
    k, v, _, state = draw(T=63, seed=7, dtype=dtype)
    source = torch.Generator().manual_seed(8)
    choices = torch.tensor([-torch.inf, -30, -5, 0, 5, 30, torch.inf], dtype=dtype)
    gate = choices[torch.randint(7, k.shape, generator=source)]
    exact = memory_loop(k.double(), v.double(), gate.double(), state)
    inputs = [x.requires_grad_() for x in (k, v, gate, state.float())]
    outputs = form(*inputs)
    for out, ref in zip(outputs, exact):
        assert_close(out.double(), ref, atol=1e-6 if out.dtype == torch.float32 else 2e-2)
    for gradient in torch.autograd.grad(sum(out.float().square().sum() for out in outputs), inputs):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("form", [memory_loop, memory_scan])
def test_gate_of_minus_30_leaves_k_and_v_untouched(form):
    """A memory that cannot be switched off."""
    k, v, gate, state = draw(T=17, seed=9, dtype=torch.float32)
    k_mem, v_mem, _ = form(k, v, torch.full_like(gate, -30), state.float())
    assert_close(k_mem, k, atol=1e-6)
    assert_close(v_mem, v, atol=1e-6)


@pytest.mark.parametrize("form", [memory_loop, memory_scan])
def test_gate_of_plus_30_still_lets_a_little_in(form):
    """1 - sigmoid(30) in fp32 is 0; sigmoid(-30) is 9e-14."""
    k, v, gate, _ = draw(T=4, seed=10, dtype=torch.float32)
    k_mem, _, _ = form(k, v, torch.full_like(gate, 30))
    tiny = torch.sigmoid(torch.tensor(-30.0, dtype=torch.float64))
    assert error(k_mem, tiny * k.double().cumsum(1)) < 1e-6


@pytest.mark.parametrize("form", [memory_loop, memory_scan])
def test_infinite_gate_passes_the_state_unchanged(form):
    """Padding (gate inf) that changes what is remembered: the state must come through bit by bit."""
    k, v, gate, state = draw(T=30, seed=11, dtype=torch.float32)
    gate[:, 13:] = torch.inf
    _, _, before = form(k[:, :13], v[:, :13], gate[:, :13], state.float())
    _, _, after = form(k, v, gate, state.float())
    assert_close(after, before, atol=1e-6)
    _, _, untouched = form(k[:, 13:], v[:, 13:], gate[:, 13:], before)
    assert torch.equal(untouched, before)


# ---------------------------------------------------------------- pieces make the whole

def test_steps_match_loop():
    """A step that loses its state, or carries it to the wrong token."""
    k, v, gate, state = draw(T=40, seed=12)
    whole, carried, out = memory_loop(k, v, gate, state), state, []
    for t in range(40):
        now = slice(t, t + 1)
        k_mem, v_mem, carried = memory_step(k[:, now], v[:, now], gate[:, now], carried)
        out.append(torch.stack([k_mem, v_mem]))
    assert_close(torch.cat(out, dim=2), torch.stack(whole[:2]), atol=1e-13)
    assert_close(carried, whole[2], atol=1e-13, what="state")


def test_step_refuses_two_tokens():
    """Two tokens read as one step would silently lose the first."""
    with pytest.raises(AssertionError, match="one token"):
        memory_step(*draw(T=2, seed=13))


@pytest.mark.parametrize("cuts", [(1,), (16,), (7, 8, 40), (1, 2, 3, 50)])
def test_chunks_with_state_carried_match_whole(cuts):
    """A chunk boundary that resets, repeats or skips a token of the memory."""
    k, v, gate, state = draw(T=63, seed=14)
    whole, carried, out = memory_scan(k, v, gate, state), state, []
    for start, end in zip((0, *cuts), (*cuts, 63)):
        k_mem, v_mem, carried = memory_scan(k[:, start:end], v[:, start:end], gate[:, start:end], carried)
        out.append(torch.stack([k_mem, v_mem]))
    assert_close(torch.cat(out, dim=2), torch.stack(whole[:2]), atol=1e-13)
    assert_close(carried, whole[2], atol=1e-13, what="state")


def test_scan_leaves_its_inputs_alone():
    """A scan that works in place on k, v, the gate or the state of the cache."""
    inputs = draw(T=17, seed=15)
    copies = [x.clone() for x in inputs]
    memory_scan(*inputs)
    assert all(torch.equal(x, copy) for x, copy in zip(inputs, copies))


# ---------------------------------------------------------------- learning to remember

@pytest.mark.parametrize("g", [0.5, 0.9, 0.984375])
def test_effective_length_of_a_constant_gate(g):
    """A length off by one, or one that counts the state before the text: 0.984375 is 64 tokens."""
    gate = torch.full((1, 4000, 2, 3), g).logit()
    assert torch.allclose(effective_length(gate), torch.tensor(1 / (1 - g)), rtol=1e-3)


def test_effective_length_of_a_closed_gate_is_one_token():
    """0 / 0, or a memory of none reported as more than the token itself."""
    assert torch.equal(effective_length(torch.full((2, 50, 2, 3), -30.0)), torch.ones(2, 3))


def test_effective_length_is_the_mean_age_of_what_is_remembered():
    """A mean that is right only for constant gates: here they vary by token, head, channel and row."""
    gate = draw(T=24, seed=16, dtype=torch.float32)[2]
    g = torch.sigmoid(gate.double())
    ages = torch.zeros(2, 12, 3, 4, dtype=torch.float64)
    for t in range(12, 24):
        weight = torch.stack([(1 - g[:, s]) * g[:, s + 1:t + 1].prod(1) for s in range(t + 1)])
        age = torch.arange(t, -1, -1, dtype=torch.float64).view(-1, 1, 1, 1)
        ages[:, t - 12] = (weight * age).sum(0) / weight.sum(0)
    assert_close(effective_length(gate).double(), 1 + ages.mean((0, 1)), atol=1e-3)


def test_arl_passes_are_sparse_then_dense():
    """ARL without its sparse pass, or with a local window that makes the memory needless."""
    assert arl_passes(64) == [Dilated(dilation=64, local=0, initial=0), None]
    assert arl_passes(0) == [None]
