"""kernels.py: the memory scan against the loop of Eq. 1, in values and gradients, and the fused decoding step against its parts."""
import pytest
import torch
from torch.nn import functional as F

import kernels
from conftest import DEVICE, assert_as_good, assert_close, error
from kernels import memory_scan
from memory import memory_loop, memory_step
from memory import memory_scan as plain_scan
from triton_ops.block import decode_step

pytestmark = pytest.mark.usefixtures("poisoned", "plain_references")

TILE = kernels.TILE["ROWS"] * kernels.TILE["STRIPS"]
BF16, FP32 = torch.bfloat16, torch.float32


def draw(B, T, KV, D, dtype=FP32, seed=0, spread=4.0):
    """k, v, gate, state, and the gradients of k~, v~ and the last state. Gates of std 4: memories of 1 to 10,000 tokens."""
    source = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=source)
    k, v, gate, dk, dv = (rand(B, T, KV, D).to(DEVICE, dtype) for _ in range(5))
    state, dstate = (rand(2, B, KV, D).to(DEVICE) for _ in range(2))
    return k, v, (spread * gate).to(dtype), state, dk, dv, dstate


def run(form, k, v, gate, state, dk, dv, dstate):
    """k~, v~, last state, then the gradients of k, v, gate and, if there is one, the state."""
    inputs = [x.detach().requires_grad_() for x in (k, v, gate, state) if x is not None]
    outputs = form(*inputs[:3], inputs[3] if state is not None else None)
    return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, inputs, [dk, dv, dstate.to(outputs[2].dtype)])]


def check(*inputs):
    refs = run(memory_loop, *(x if x is None else x.double() for x in inputs))
    outs, plain = run(memory_scan, *inputs), run(plain_scan, *inputs)
    for what, out, simple, ref in zip(("k~", "v~", "state", "dk", "dv", "dgate", "dstate"), outs, plain, refs, strict=False):
        assert_as_good(out, simple, ref, what, inputs[0].dtype)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("T", [1, 15, 16, 17, 63, 64, 65, 150])
def test_scan_matches_the_loop(T, dtype):
    """A strip or tile that starts from the wrong state, rows past the end that count, a gradient of the wrong token."""
    check(*draw(2, T, 1, 16, dtype, seed=T))


@pytest.mark.parametrize("KV, D", [(1, 64), (2, 128), (3, 32), (1, 16)])
def test_scan_covers_channels_off_the_tile(KV, D):
    """Channels beyond a tile's width left unwritten, or read from the next row."""
    check(*draw(1, TILE + 3, KV, D, seed=D))


@pytest.mark.parametrize("filled", [0, 10**9])
def test_long_tiles_give_what_short_ones_give(filled, monkeypatch):
    """A tile of another length than its grid, or than the states between tiles are kept for."""
    monkeypatch.setattr(kernels, "FILLED", filled)
    inputs = draw(2, 210, 1, 16, seed=2)
    with torch.no_grad():
        outs = memory_scan(*inputs[:4])
    for what, out, ref in zip(("k~", "v~", "state"), outs, memory_loop(*(x.double() for x in inputs[:4]))):
        assert error(out, ref) < 1e-6, what
    check(*inputs)


def test_scan_without_state_starts_from_zero():
    """A first tile that waits for a state nobody gives, or takes garbage for one."""
    k, v, gate, _, *gradients = draw(2, TILE + 1, 2, 16, seed=3)
    check(k, v, gate, None, *gradients)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_scan_reads_strided_projections(dtype):
    """k, v and gate as slices of one packed projection, gradients expanded or transposed: strides taken for granted."""
    B, T, KV, D = 2, 70, 2, 16
    packed = torch.randn(B, T, 5 * KV * D, generator=torch.Generator().manual_seed(4)).to(DEVICE, dtype)
    _, k, v, gate, _ = (x.unflatten(-1, (KV, D)) for x in packed.chunk(5, dim=-1))
    *_, state, _, dv, dstate = draw(B, T, KV, D, dtype, seed=5)
    dk = torch.ones((), device=DEVICE, dtype=dtype).expand(B, T, KV, D)
    check(k, v, gate, state, dk, dv.transpose(1, 2).contiguous().transpose(1, 2), dstate)
    channels_apart = lambda x: x.transpose(2, 3).contiguous().transpose(2, 3)
    check(channels_apart(k), v, channels_apart(gate), state, dk, channels_apart(dv), dstate)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_extreme_gates_are_exact_and_finite(dtype):
    """1 - g cancelled where g is near 1; an infinite gate (padding) that becomes NaN in values or gradients."""
    k, v, _, state, *gradients = draw(2, TILE + 20, 2, 16, dtype, seed=6)
    choices = torch.tensor([-torch.inf, -80, -30, -5, 0, 5, 30, 80, torch.inf])
    gate = choices[torch.randint(9, k.shape, generator=torch.Generator().manual_seed(7))].to(DEVICE, dtype)
    refs = run(memory_loop, *(x.double() for x in (k, v, gate.clamp(-200, 200), state, *gradients)))
    for what, out, ref in zip(("k~", "v~", "state", "dk", "dv", "dgate", "dstate"), run(memory_scan, k, v, gate, state, *gradients), refs):
        assert out.isfinite().all(), what
        assert error(out, ref) < (1e-5 if dtype == FP32 else 1e-2), f"{what}: {error(out, ref):.1e}"


def test_gates_near_one_remember_through_many_tiles():
    """A product of decays that underflows or drifts over many tiles."""
    k, v, gate, state, *gradients = draw(1, 5 * TILE + 7, 1, 16, seed=8)
    check(k, v, gate * 0.1 + 8, state, *gradients)


def test_infinite_gate_passes_the_state_bit_by_bit():
    """Padding that changes what is remembered."""
    k, v, gate, state, *_ = draw(2, 40, 2, 16, seed=9)
    _, _, last = memory_scan(k, v, torch.full_like(gate, torch.inf), state)
    assert torch.equal(last, state)


def test_nan_in_one_row_stays_there():
    """A NaN taken for a state that nobody has written (then this test does not end), or that reaches the next row."""
    k, v, gate, state, *gradients = draw(2, TILE + 9, 2, 16, seed=10)
    clean = run(memory_scan, k, v, gate, state, *gradients)
    k[0, 3], gate[0, 5] = torch.nan, torch.nan
    state[:, 0] = torch.tensor(-1, dtype=torch.int32).view(torch.float32)  # a negative NaN, with all bits set
    for what, out, expected in zip(("k~", "v~", "state", "dk", "dv", "dgate", "dstate"), run(memory_scan, k, v, gate, state, *gradients), clean):
        row = (slice(None), 1) if what in ("state", "dstate") else 1
        assert torch.equal(out[row], expected[row]), what


def test_chunks_with_the_state_carried_are_the_whole():
    """A chunk boundary that resets, repeats or skips a token."""
    k, v, gate, state, *_ = draw(2, TILE + 30, 2, 16, seed=11)
    whole, carried, parts = memory_scan(k, v, gate, state), state, []
    for piece in zip(*(x.split([5, TILE, 25], dim=1) for x in (k, v, gate))):
        *out, carried = memory_scan(*piece, carried)
        parts.append(torch.stack(out))
    assert_close(torch.cat(parts, dim=2), torch.stack(whole[:2]), atol=1e-6)
    assert_close(carried, whole[2], atol=1e-6)


def test_scan_refuses_shapes_that_do_not_agree():
    """A gate of another width read past its end."""
    k, v, gate, *_ = draw(1, 4, 2, 16)
    with pytest.raises(AssertionError, match="must agree"):
        memory_scan(k, v, gate[:, :, :1])


def test_scan_compiles_without_a_graph_break():
    """An operator that torch.compile cannot see through, or whose gradient it loses."""
    k, v, gate, state, *gradients = draw(2, 20, 2, 16, seed=12)
    compiled = torch.compile(lambda *x: memory_scan(*x), fullgraph=True, backend="aot_eager")
    for out, expected in zip(run(compiled, k, v, gate, state, *gradients), run(memory_scan, k, v, gate, state, *gradients)):
        assert torch.equal(out, expected)


# ---------------------------------------------------------------- the decoding step

def step_inputs(B, H, KV, D, dtype, memory=True, norm=True, seed=0):
    source = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=source).to(DEVICE, dtype)
    packed = rand(B, 1, (H + 3 * KV) * D)
    q, k, v, gate = (x.unflatten(-1, (-1, D)) for x in packed.split([H * D, KV * D, KV * D, KV * D], dim=-1))
    angle = torch.rand(B, 1, 1, D // 2, generator=source).to(DEVICE) * 6
    return dict(q=q, k=k, v=v, gate=gate if memory else None, q_weight=rand(H * D) if norm else None,
                k_weight=rand(KV * D) if norm else None, cos=angle.cos(), sin=angle.sin(),
                state=torch.randn(2, B, KV, D, generator=source).to(DEVICE) if memory else None,
                k_cache=rand(B, 40, KV, D), v_cache=rand(B, 40, KV, D), low=rand(B, 5, KV, D), high=rand(B, 5, KV, D))


def step_in_parts(q, k, v, gate, q_weight, k_weight, cos, sin, state, k_cache, v_cache, low, high, block_size, used):
    """The same by model.py's pieces. -> q, and everything that the step updates."""
    if gate is not None:
        k, v, state = memory_step(k, v, gate, state)

    def norm_and_rotate(x, weight):
        if weight is not None:
            x = F.rms_norm(x.flatten(2), (x.shape[2] * x.shape[3],), weight, 1e-6).view(x.shape)
        a, b = x.to(cos.dtype).chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)

    q, k = norm_and_rotate(q, q_weight), norm_and_rotate(k, k_weight)
    k_cache, v_cache, low, high = (x.clone() for x in (k_cache, v_cache, low, high))
    for b, slot in enumerate((used - 1).tolist()):
        k_cache[b, slot], v_cache[b, slot] = k[b, 0], v[b, 0]
        n, new = slot // block_size, slot % block_size == 0
        low[b, n] = k[b, 0] if new else torch.minimum(low[b, n], k[b, 0])
        high[b, n] = k[b, 0] if new else torch.maximum(high[b, n], k[b, 0])
    return q, state, k_cache, v_cache, low, high


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("H, KV, D", [(4, 4, 64), (8, 2, 16), (8, 1, 128), (3, 3, 32)])
@pytest.mark.parametrize("memory, norm", [(True, True), (False, True), (True, False)])
def test_decode_step_matches_its_parts(H, KV, D, memory, norm, dtype):
    """RoPE on the wrong pairs, a norm per head, the state of another row, a slot off by one, bounds of the wrong block."""
    used = torch.tensor([17, 33, 40], device=DEVICE)
    inputs = step_inputs(3, H, KV, D, dtype, memory, norm, seed=H + D)
    exact = {name: None if x is None else x.double() for name, x in inputs.items()}
    refs = step_in_parts(**exact, block_size=8, used=used)
    plain = step_in_parts(**inputs, block_size=8, used=used)
    state, k_cache, v_cache, low, high = (inputs[name] for name in ("state", "k_cache", "v_cache", "low", "high"))
    q = decode_step(**inputs, eps=1e-6, block_size=8, used=used)
    for what, out, simple, ref in zip(("q", "state", "k cache", "v cache", "low", "high"), (q, state, k_cache, v_cache, low, high), plain, refs):
        if out is not None:
            assert_as_good(out, simple, ref, what, dtype)


def test_decode_step_leaves_other_slots_and_blocks_alone():
    """A write to a neighbour's slot."""
    inputs, used = step_inputs(2, 4, 2, 16, FP32, seed=20), torch.tensor([1, 24], device=DEVICE)
    before = {name: inputs[name].clone() for name in ("k_cache", "v_cache", "low", "high")}
    decode_step(**inputs, eps=1e-6, block_size=8, used=used)
    for name, old in before.items():
        same = (inputs[name] == old).flatten(2).all(-1)  # (B, slots or blocks)
        where = (used - 1) if "cache" in name else (used - 1) // 8
        for b in range(2):
            assert same[b].tolist() == [i != where[b] for i in range(old.shape[1])], name


def test_decode_step_keeps_bounds_as_block_bounds_would_make_them():
    """A new block that inherits the bounds of what lay there before, or bounds of unrounded keys."""
    from triton_ops.quest import block_bounds
    k_cache, used = step_inputs(2, 4, 2, 16, BF16, seed=30)["k_cache"], torch.tensor([6, 13], device=DEVICE)
    low, high = block_bounds(k_cache, used, 8)
    for step in range(12):
        inputs, used = step_inputs(2, 4, 2, 16, BF16, seed=31 + step), used + 1
        decode_step(**inputs | dict(k_cache=k_cache, low=low, high=high), eps=1e-6, block_size=8, used=used)
    for kept, made in zip((low, high), block_bounds(k_cache, used, 8)):
        filled = torch.arange(5, device=DEVICE) <= ((used - 1) // 8)[:, None]
        assert torch.equal(kept[filled], made[filled])
