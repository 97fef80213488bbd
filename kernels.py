"""
The memory in Triton: Eq. 1 for whole sequences, forward and backward, and one decoding step with all that surrounds it.

    memory_scan   k~[t] = g[t] k~[t-1] + (1 - g[t]) k[t], v~ alike: as memory.memory_scan, with gradients
    decode_step   for one new token: memory, QK-norm, RoPE, the write into the cache, Quest's block bounds; one launch

How a scan is made parallel in time. A stretch of tokens turns the state before it into the state after it as one step
would: after = decay * before + own, where decay is the product of its gates and own what it gives from a zero state.
Two stretches in a row are again such a stretch (`two_steps`). So three levels work at once, each from zero:

    rows     one thread walks down ROWS tokens of its channels, in registers
    strips   STRIPS warps, each with its rows, make a tile; a small scan tells each strip what came before it
    tiles    a program has one tile; it waits for the state before it, and passes on the state after it

The tiles of a sequence thus form a chain of programs, but only handing over the state is serial: tokens are loaded
before the wait. Everything is read once and written once, which two passes over the tokens could not do.
(Single-pass scan with chained tiles: Merrill and Garland, "Decoupled look-back", 2016; without the look-back here.)

The same inputs give the same bits, here and in the other files of kernels: every place has one writer, and sums are in an order
that does not depend on who comes first. tests/stress.py asks that on a GPU, a thousand times of each.

Checked against memory.memory_loop, and against the parts of model.py, in tests/test_kernels.py. The other kernels:
triton_ops/ has the others. triton_ops/backend.py decides who runs.

Letters: B batch, T tokens, KV key/value heads, H query heads, D head width, W = KV * D channels, N blocks.
"""
import math
from typing import Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_ops.common import by_token, gates

# A tile is ROWS * STRIPS tokens. A thread holds its rows in fp32, so registers are what is short: more rows leave too few
# programs on an SM to hide the latency of memory, fewer spend more instructions where strips meet. A chain of tiles is
# serial; where sequences and channels are too few to fill the GPU, longer tiles make it shorter. Measured on an H100.
TILE = dict(ROWS=5, STRIPS=8)
LONG_TILE = dict(ROWS=6, STRIPS=16)  # the backward pass has no registers for it
FILLED = 264                         # chains: two programs on each of 132 SMs

# the bits of a state nobody has written yet: as a float a signalling NaN, which no arithmetic, sign flip or bf16 gives
EMPTY = tl.constexpr(0x7F800001)

# ---------------------------------------------------------------- the memory scan

@triton.jit
def two_steps(g1, k1, v1, g2, k2, v2):
    """m -> g1 m + k1, then m -> g2 m + k2, as one step; the same for v."""
    return g1 * g2, g2 * k1 + k2, g2 * v1 + v2


@triton.jit
def two_strips(g1, k1, v1, g1_before, k1_before, v1_before, g2, k2, v2, g2_before, k2_before, v2_before):
    """two_steps of whole strips; and beside it, all that came before the last of them."""
    g, k, v = two_steps(g1, k1, v1, g2, k2, v2)
    g_before, k_before, v_before = two_steps(g1, k1, v1, g2_before, k2_before, v2_before)
    return g, k, v, g_before, k_before, v_before


@triton.jit
def wait_for(k_ptr, v_ptr):
    """
    The states at k_ptr and v_ptr, tiles of pointers, as soon as another program has written all of them. One thread alone
    must hold an element: of two, one could see it written and go on with the other's older copy (see `layout`).
    """
    k, v = tl.load(k_ptr, volatile=True), tl.load(v_ptr, volatile=True)
    while tl.max(tl.max(((k == EMPTY) | (v == EMPTY)).to(tl.int32), axis=1), axis=0) == 1:
        k, v = tl.load(k_ptr, volatile=True), tl.load(v_ptr, volatile=True)
    return k.to(tl.float32, bitcast=True), v.to(tl.float32, bitcast=True)


@triton.jit
def memory_forward_kernel(
    k_ptr, v_ptr, gate_ptr,    # (B, T, W)  with strides for b and t
    k_out_ptr, v_out_ptr,      # (B, T, W)  contiguous
    before_ptr,                # (n_tiles, 2, B, W)  the state before each tile, fp32 as int32; the first is given
    last_ptr,                  # (2, B, W)  fp32: the state after the last token
    B, T, n_tiles, k_stride_b, v_stride_b, gate_stride_b,
    # constants, so that a row's address is its strip's plus an immediate, without instructions of its own
    W: tl.constexpr, k_stride_t: tl.constexpr, v_stride_t: tl.constexpr, gate_stride_t: tl.constexpr,
    ROWS: tl.constexpr, STRIPS: tl.constexpr, BLOCK_W: tl.constexpr,
):
    """
    Eq. 1 for one tile of STRIPS * ROWS tokens and BLOCK_W channels.                  reference: memory.memory_loop

    grid   n_tiles * B * W / BLOCK_W, the tiles slowest: the GPU starts programs in this order, so whoever waits,
           waits for one that runs already
    tile   one warp per strip, two channels per lane, ROWS tokens one after the other in registers
    bytes  reads k, v, gate and writes k~, v~ once: 5 * B * T * W elements
    dtype  any in and out; gates and states in fp32
    """
    n_w = W // BLOCK_W
    program = tl.program_id(0)
    tile, b, w = program // (n_w * B), (program // n_w % B).to(tl.int64), program % n_w
    strip = tl.arange(0, STRIPS)[:, None]
    channel = w * BLOCK_W + tl.arange(0, BLOCK_W)[None]
    first = (tile * STRIPS + strip) * ROWS                        # (STRIPS, 1)  token
    t0 = first.to(tl.int64)
    k_ptr += b * k_stride_b + t0 * k_stride_t + channel           # (STRIPS, BLOCK_W)
    v_ptr += b * v_stride_b + t0 * v_stride_t + channel
    gate_ptr += b * gate_stride_b + t0 * gate_stride_t + channel

    # each strip from a zero state. Past the end g = 1 and 1 - g = 0 let the state through unchanged
    zero = tl.zeros((STRIPS, BLOCK_W), tl.float32)
    decay, k_own, v_own = zero + 1, zero, zero
    decays, k_owns, v_owns = (), (), ()
    for r in tl.static_range(ROWS):
        mask = first + r < T
        g, rest = gates(tl.load(gate_ptr + r * gate_stride_t, mask, other=float("inf")).to(tl.float32))
        k = tl.load(k_ptr + r * k_stride_t, mask, other=0).to(tl.float32)
        v = tl.load(v_ptr + r * v_stride_t, mask, other=0).to(tl.float32)
        decay, k_own, v_own = two_steps(decay, k_own, v_own, g, rest * k, rest * v)
        decays, k_owns, v_owns = decays + (decay,), k_owns + (k_own,), v_owns + (v_own,)

    # all strips up to and with each one; and without it
    decay, k_own, v_own, decay_before, k_before, v_before = tl.associative_scan(
        (decay, k_own, v_own, zero + 1, zero, zero), 0, two_strips)

    size = B * W                                                  # of one state
    state = b * W + channel + tl.zeros((STRIPS, 1), tl.int32)      # offset in (B, W), for all strips
    at = before_ptr + tile.to(tl.int64) * 2 * size + state
    k_start, v_start = wait_for(at, at + size)                    # before the tile
    k_end, v_end = decay * k_start + k_own, decay * v_start + v_own
    last_strip = strip == STRIPS - 1
    if tile + 1 < n_tiles:  # an exchange, as it is seen by other SMs at once
        tl.atomic_xchg(at + 2 * size, k_end.to(tl.int32, bitcast=True), last_strip, sem="relaxed")
        tl.atomic_xchg(at + 3 * size, v_end.to(tl.int32, bitcast=True), last_strip, sem="relaxed")
    else:
        tl.store(last_ptr + state, k_end, last_strip)
        tl.store(last_ptr + size + state, v_end, last_strip)

    k_start, v_start = decay_before * k_start + k_before, decay_before * v_start + v_before  # before the strip
    out = (b * T + t0) * W + channel                              # (STRIPS, BLOCK_W)
    for r in tl.static_range(ROWS):
        mask = first + r < T
        tl.store(k_out_ptr + out + r * W, decays[r] * k_start + k_owns[r], mask)
        tl.store(v_out_ptr + out + r * W, decays[r] * v_start + v_owns[r], mask)


@triton.jit
def memory_backward_kernel(
    k_ptr, v_ptr, gate_ptr,       # (B, T, W)  with strides
    dk_mem_ptr, dv_mem_ptr,       # (B, T, W)  gradients of k~ and v~, with strides
    before_ptr,                   # (n_tiles, 2, B, W)  states before each tile, from the forward pass
    dk_ptr, dv_ptr, dgate_ptr,    # (B, T, W)  contiguous
    dafter_ptr,                   # (n_tiles, 2, B, W)  fp32 as int32: gradient of the state after each tile; the last is given
    dstate_ptr,                   # (2, B, W)  fp32: gradient of the state before the first token
    B, T, n_tiles, k_stride_b, v_stride_b, gate_stride_b, dk_stride_b, dv_stride_b,
    W: tl.constexpr, k_stride_t: tl.constexpr, v_stride_t: tl.constexpr, gate_stride_t: tl.constexpr,
    dk_stride_t: tl.constexpr, dv_stride_t: tl.constexpr,
    ROWS: tl.constexpr, STRIPS: tl.constexpr, BLOCK_W: tl.constexpr,
):
    """
    The gradient of Eq. 1: the same recurrence backwards in time.               reference: autograd of memory.memory_loop

        G[t] = dk~[t] + g[t+1] G[t+1]        dk[t] = (1 - g[t]) G[t]        dlogit[t] = g (1 - g) G[t] (k~[t-1] - k[t])

    summed over k and v for the logit. k~[t-1] is computed again from the forward pass's states: saved in bf16 it would
    lose percents where g is near 1.

    grid   as forward, the last tile first, and waits for the tile after it
    bytes  reads k, v, gate, dk~, dv~ and writes dk, dv, dgate once: 8 * B * T * W elements
    """
    n_w = W // BLOCK_W
    program = tl.program_id(0)
    tile, b, w = n_tiles - 1 - program // (n_w * B), (program // n_w % B).to(tl.int64), program % n_w
    strip = tl.arange(0, STRIPS)[:, None]
    channel = w * BLOCK_W + tl.arange(0, BLOCK_W)[None]
    first = (tile * STRIPS + strip) * ROWS                        # (STRIPS, 1)  token
    t0 = first.to(tl.int64)
    k_ptr += b * k_stride_b + t0 * k_stride_t + channel           # (STRIPS, BLOCK_W)
    v_ptr += b * v_stride_b + t0 * v_stride_t + channel
    gate_ptr += b * gate_stride_b + t0 * gate_stride_t + channel
    dk_mem_ptr += b * dk_stride_b + t0 * dk_stride_t + channel
    dv_mem_ptr += b * dv_stride_b + t0 * dv_stride_t + channel

    # each strip from zero, forwards (own) and, as it passes on g[first] G[first], backwards (back)
    zero = tl.zeros((STRIPS, BLOCK_W), tl.float32)
    decay, k_own, v_own, k_back, v_back = zero + 1, zero, zero, zero, zero
    logits, ks, vs, dk_mems, dv_mems = (), (), (), (), ()
    for r in tl.static_range(ROWS):
        mask = first + r < T
        logit = tl.load(gate_ptr + r * gate_stride_t, mask, other=float("inf"))
        k = tl.load(k_ptr + r * k_stride_t, mask, other=0)
        v = tl.load(v_ptr + r * v_stride_t, mask, other=0)
        dk_mem = tl.load(dk_mem_ptr + r * dk_stride_t, mask, other=0)
        dv_mem = tl.load(dv_mem_ptr + r * dv_stride_t, mask, other=0)
        g, rest = gates(logit.to(tl.float32))
        decay, k_own, v_own = two_steps(decay, k_own, v_own, g, rest * k.to(tl.float32), rest * v.to(tl.float32))
        k_back += decay * dk_mem.to(tl.float32)
        v_back += decay * dv_mem.to(tl.float32)
        logits, ks, vs, dk_mems, dv_mems = logits + (logit,), ks + (k,), vs + (v,), dk_mems + (dk_mem,), dv_mems + (dv_mem,)

    _, _, _, decay_before, k_before, v_before = tl.associative_scan(
        (decay, k_own, v_own, zero + 1, zero, zero), 0, two_strips)
    decay, k_back, v_back, decay_behind, k_behind, v_behind = tl.associative_scan(
        (decay, k_back, v_back, zero + 1, zero, zero), 0, two_strips, reverse=True)

    size = B * W                                                  # of one state
    state = b * W + channel + tl.zeros((STRIPS, 1), tl.int32)      # offset in (B, W), for all strips
    at = before_ptr + tile.to(tl.int64) * 2 * size + state
    k_start = tl.load(at).to(tl.float32, bitcast=True)
    v_start = tl.load(at + size).to(tl.float32, bitcast=True)
    k_start, v_start = decay_before * k_start + k_before, decay_before * v_start + v_before  # before the strip

    at = dafter_ptr + tile.to(tl.int64) * 2 * size + state
    k_grad, v_grad = wait_for(at, at + size)                      # of the state after the tile
    k_back, v_back = decay * k_grad + k_back, decay * v_grad + v_back
    first_strip = strip == 0
    if tile > 0:
        tl.atomic_xchg(at - 2 * size, k_back.to(tl.int32, bitcast=True), first_strip, sem="relaxed")
        tl.atomic_xchg(at - size, v_back.to(tl.int32, bitcast=True), first_strip, sem="relaxed")
    else:
        tl.store(dstate_ptr + state, k_back, first_strip)
        tl.store(dstate_ptr + size + state, v_back, first_strip)
    k_grad, v_grad = decay_behind * k_grad + k_behind, decay_behind * v_grad + v_behind      # after the strip

    k_states, v_states = (), ()                                   # before each token
    for r in tl.static_range(ROWS):
        k_states, v_states = k_states + (k_start,), v_states + (v_start,)
        g, rest = gates(logits[r].to(tl.float32))
        k_start = g * k_start + rest * ks[r].to(tl.float32)
        v_start = g * v_start + rest * vs[r].to(tl.float32)
    out = (b * T + t0) * W + channel                              # (STRIPS, BLOCK_W)
    for i in tl.static_range(ROWS):                               # r = ROWS - 1 - i, from the last token to the first
        mask = first + ROWS - 1 - i < T
        g, rest = gates(logits[ROWS - 1 - i].to(tl.float32))
        k_grad += dk_mems[ROWS - 1 - i].to(tl.float32)            # G[t]
        v_grad += dv_mems[ROWS - 1 - i].to(tl.float32)
        dk, dv = rest * k_grad, rest * v_grad
        tl.store(dk_ptr + out + (ROWS - 1 - i) * W, dk, mask)
        tl.store(dv_ptr + out + (ROWS - 1 - i) * W, dv, mask)
        # weighted before they are subtracted: the difference of two large numbers may overflow, and at a saturated gate
        # 0 * inf would be NaN
        dk, dv = g * dk, g * dv
        pull = (dk * k_states[ROWS - 1 - i] - dk * ks[ROWS - 1 - i].to(tl.float32)
                + (dv * v_states[ROWS - 1 - i] - dv * vs[ROWS - 1 - i].to(tl.float32)))
        tl.store(dgate_ptr + out + (ROWS - 1 - i) * W, pull, mask)
        k_grad, v_grad = g * k_grad, g * v_grad


def block_of(W):
    """Channels of a tile: two for each of a warp's 32 lanes, fewer only where they do not divide W."""
    BLOCK_W = math.gcd(W, 64)
    assert BLOCK_W >= 16, f"{W} channels of k: the kernels cover multiples of 16"
    return BLOCK_W


def tile_of(B, W, saves):
    """saves: the backward pass will start from the states between the tiles, so they must be its own."""
    return TILE if saves or B * W // block_of(W) >= FILLED else LONG_TILE


def layout(tile, W):
    """The tile's constants, and as many warps as give each element of a (STRIPS, BLOCK_W) tile a thread of its own."""
    BLOCK_W = block_of(W)
    return tile | dict(BLOCK_W=BLOCK_W, num_warps=tile["STRIPS"] * min(BLOCK_W, 32) // 32)


def as_bits(state):
    """fp32 (2, B, KV, D), or None for zeros -> int32 (2, B, W), or 0."""
    return 0 if state is None else state.float().flatten(2).contiguous().view(torch.int32)


@torch.library.custom_op("nanorat::memory_forward", mutates_args=())
def memory_forward(k: Tensor, v: Tensor, gate: Tensor, state: Optional[Tensor],
                   saves: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> k~, v~, the last state, the states before each tile"""
    B, T, KV, D = k.shape
    assert k.shape == v.shape == gate.shape, f"k {tuple(k.shape)}, v {tuple(v.shape)}, gate {tuple(gate.shape)} must agree"
    k_mem, v_mem, last, before = empty_forward(k, v, gate, state, saves)
    before[1:], before[0] = EMPTY.value, as_bits(state)
    k, v, gate = by_token(k), by_token(v), by_token(gate)
    W, constants = KV * D, layout(tile_of(B, KV * D, saves), KV * D)
    grid = (len(before) * B * (W // constants["BLOCK_W"]),)
    memory_forward_kernel[grid](
        k, v, gate, k_mem, v_mem, before, last, B, T, len(before), *(x.stride(0) for x in (k, v, gate)),
        W, *(x.stride(1) for x in (k, v, gate)), maxnreg=64, **constants)
    return k_mem, v_mem, last, before


@memory_forward.register_fake
def empty_forward(k, v, gate, state, saves):
    B, T, KV, D = k.shape
    tile = tile_of(B, KV * D, saves)
    n_tiles = -(-T // (tile["ROWS"] * tile["STRIPS"]))
    return (k.new_empty(B, T, KV, D), v.new_empty(B, T, KV, D), k.new_empty(2, B, KV, D, dtype=torch.float32),
            k.new_empty(n_tiles, 2, B, KV * D, dtype=torch.int32))


@torch.library.custom_op("nanorat::memory_backward", mutates_args=())
def memory_backward(k: Tensor, v: Tensor, gate: Tensor, before: Tensor, dk_mem: Tensor, dv_mem: Tensor,
                    dlast: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> dk, dv, dgate, dstate"""
    B, T, KV, D = k.shape
    dk, dv, dgate, dstate = empty_backward(k, v, gate, before, dk_mem, dv_mem, dlast)
    dafter = torch.full_like(before, EMPTY.value)
    dafter[-1] = as_bits(dlast)
    k, v, gate, dk_mem, dv_mem = by_token(k), by_token(v), by_token(gate), by_token(dk_mem), by_token(dv_mem)
    W, constants = KV * D, layout(TILE, KV * D)
    grid = (len(before) * B * (W // constants["BLOCK_W"]),)
    memory_backward_kernel[grid](
        k, v, gate, dk_mem, dv_mem, before, dk, dv, dgate, dafter, dstate, B, T, len(before),
        *(x.stride(0) for x in (k, v, gate, dk_mem, dv_mem)), W, *(x.stride(1) for x in (k, v, gate, dk_mem, dv_mem)),
        **constants)
    return dk, dv, dgate, dstate


@memory_backward.register_fake
def empty_backward(k, v, gate, before, dk_mem, dv_mem, dlast):
    return k.new_empty(k.shape), v.new_empty(k.shape), gate.new_empty(k.shape), torch.empty_like(dlast)


def save_for_backward(ctx, inputs, output):
    k, v, gate, state, _ = inputs
    ctx.save_for_backward(k, v, gate, output[3])
    ctx.has_state = state is not None


def backward(ctx, dk_mem, dv_mem, dlast, _):
    *gradients, dstate = memory_backward(*ctx.saved_tensors, dk_mem, dv_mem, dlast)
    return *gradients, dstate if ctx.has_state else None, None


memory_forward.register_autograd(backward, setup_context=save_for_backward)


def memory_scan(
    k, v,        # (B, T, KV, D)  any strides; without a copy if a token's KV * D channels lie side by side
    gate,        # (B, T, KV, D)  logits of g
    state=None,  # (2, B, KV, D)  fp32: k~ and v~ before the first token; None is zeros
):               # -> k~, v~ in the dtypes of k and v; the state after the last token, fp32
    """Eq. 1, as memory.memory_scan, with gradients for all four. Bit for bit the same each time."""
    saves = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (k, v, gate, state))
    k_mem, v_mem, last, _ = memory_forward(k, v, gate, state, saves)
    return k_mem, v_mem, last
