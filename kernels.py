"""
How a kernel is written here, at the example of the memory: Eq. 1 over a whole sequence.

    m[t] = g[t] m[t-1] + (1 - g[t]) x[t]           x: k or v;  g = sigmoid(gate), one per channel

memory.memory_loop is the definition. tests/test_kernels.py holds `memory_scan` below to it, in
values and in gradients. Who knows PyTorch and Triton's tutorials can read this file from top to
bottom. The kernels listed at its end share the three parts and the rules below, not the chain of
tiles: attention is explained in triton_ops/quest.py, whose quest_scores_kernel is the shortest.

One observation makes the recurrence parallel in time. A stretch of tokens turns the state before it
into the state after it just as a single token does,

    after = decay * before + own                   decay: the product of the stretch's gates
                                                   own: what the stretch gives from a zero state

and two stretches in a row are again such a stretch (`two_steps`). So all stretches can start from
zero at once, and what came before a stretch is added when it is known. There are three levels:

    rows     one thread walks down ROWS tokens of its channels, in registers
    strips   STRIPS of them, each with its rows, make a tile, which is one program; a small scan
             inside the program tells each strip what came before it
    tiles    a program waits for the state before its tile, and passes on the state after it

    token      0  1  2   3  4  5     6  7  8   9 10 11    12 13 14  15 ..       ROWS = 3, STRIPS = 2
    strip     |---0---| |---1---|   |---0---| |---1---|   |---0---|
    tile      |--------0--------| > |--------1--------| > |----2--- ..          >: the state

The tiles of a sequence form a chain, but only handing over the state is serial: a program has read
its tokens and has scanned them before it waits. So everything is read once and written once, which
two passes over the tokens could not do. (A scan in one pass with chained tiles: Merrill and
Garland, "Decoupled look-back", 2016; here without the look-back.)

A kernel has three parts:

    the kernel    @triton.jit: what one program does. Its docstring names the grid (which program
                  has what), the tile (what it holds), the fewest bytes to move, and the dtypes
    the launcher  a torch custom op: it checks, allocates and launches. A `register_fake` beside it
                  tells torch.compile the outputs' shapes, `register_autograd` the gradient
    the function  what is called: the reference's arguments and results. memory_scan passes the
                  operator by where nobody needs it

In all of them constants in capitals are known when Triton compiles, masks keep a program within its
tensor, and an offset is int64 before it meets a stride, as tensors may have more than 2**31
elements. The same inputs give the same bits, here and in triton_ops/: each place has one writer,
and the order of a sum never depends on who comes first. tests/stress.py asks that of every kernel
on a GPU, a thousand times.

Letters: B batch, T tokens, KV key/value heads, D head width, W = KV * D channels.
"""
import math
from typing import Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_ops.common import by_token, gates

# A tile is ROWS * STRIPS tokens. A thread holds its rows in fp32, so registers are what is short:
# more rows leave too few programs on an SM to hide the latency of memory, fewer rows spend more
# instructions where strips meet. A chain of tiles is serial; where sequences and channels are too
# few to fill the GPU, longer tiles make the chain shorter: more strips, or fewer channels (WIDTH)
# and more rows. The backward pass has no registers for LONG_TILE and NARROW_TILE. maxnreg, the
# forward pass's registers a thread, lets four programs of TILE share an SM; one with narrow tiles
# fills it. Measured on an H100 and on an H200.
TILE = dict(ROWS=5, STRIPS=8, WIDTH=64, maxnreg=64)
LONG_TILE = dict(ROWS=6, STRIPS=16, WIDTH=64, maxnreg=64)
NARROW_TILE = dict(ROWS=12, STRIPS=32, WIDTH=32, maxnreg=64)
NARROW_BOTH = dict(ROWS=8, STRIPS=32, WIDTH=16, maxnreg=128)
FILLED = 264  # chains that fill a GPU: two programs on each of 132 SMs
FEW = 2048    # channels, of all sequences, up to which narrow tiles are faster

# The bits of a state that nobody has written yet. As a float they are a signalling NaN, which no
# arithmetic, no change of sign and no bf16 number gives.
EMPTY = tl.constexpr(0x7F800001)


# ---------------------------------------------------------------- stretches of tokens

@triton.jit
def two_steps(g1, k1, v1, g2, k2, v2):
    """m -> g1 m + k1, then m -> g2 m + k2, as one step; the same for v, under the same gates."""
    return g1 * g2, g2 * k1 + k2, g2 * v1 + v2


@triton.jit
def two_strips(
    g1, k1, v1, g1_before, k1_before, v1_before,
    g2, k2, v2, g2_before, k2_before, v2_before,
):
    """two_steps of whole strips; and beside it, all that came before the last of them."""
    g, k, v = two_steps(g1, k1, v1, g2, k2, v2)
    g_before, k_before, v_before = two_steps(g1, k1, v1, g2_before, k2_before, v2_before)
    return g, k, v, g_before, k_before, v_before


@triton.jit
def wait_for(k_ptr, v_ptr):
    """
    The states at k_ptr and v_ptr, tiles of pointers, as soon as another program has written all of
    them. One thread alone must hold an element: of two, one could see it written and go on with the
    other's older copy (see `layout`).
    """
    # volatile: each load asks the L2 cache, which all SMs share, and not the SM's own copy
    k, v = tl.load(k_ptr, volatile=True), tl.load(v_ptr, volatile=True)
    while tl.max(tl.max(((k == EMPTY) | (v == EMPTY)).to(tl.int32), axis=1), axis=0) == 1:
        k, v = tl.load(k_ptr, volatile=True), tl.load(v_ptr, volatile=True)
    return k.to(tl.float32, bitcast=True), v.to(tl.float32, bitcast=True)


@triton.jit
def pass_on(k, v, k_ptr, v_ptr, mask):
    """
    Writes what wait_for waits for. An exchange is seen by all SMs at once; it may be relaxed, as
    nothing else has to become visible along with it.
    """
    tl.atomic_xchg(k_ptr, k.to(tl.int32, bitcast=True), mask, sem="relaxed")
    tl.atomic_xchg(v_ptr, v.to(tl.int32, bitcast=True), mask, sem="relaxed")


# ---------------------------------------------------------------- forward

@triton.jit
def memory_forward_kernel(
    k_ptr, v_ptr, gate_ptr,  # (B, T, W)  with strides for b and t
    k_out_ptr, v_out_ptr,    # (B, T, W)  contiguous
    state_ptr,               # (2, B, W)  fp32: the state before the first token; None is zeros
    before_ptr,              # (n_tiles, 2, B, W)  the state before each tile but the first, fp32 as
                             #            int32, which starts as EMPTY
    last_ptr,                # (2, B, W)  fp32: the state after the last token
    B, T, n_tiles, k_stride_b, v_stride_b, gate_stride_b,
    # constants, so that a row's address is its strip's plus an immediate, without instructions
    W: tl.constexpr,
    k_stride_t: tl.constexpr, v_stride_t: tl.constexpr, gate_stride_t: tl.constexpr,
    ROWS: tl.constexpr, STRIPS: tl.constexpr, BLOCK_W: tl.constexpr,
):
    """
    Eq. 1 for one tile of STRIPS * ROWS tokens and BLOCK_W channels, of k and v at once.

        k~[t] = g[t] k~[t-1] + (1 - g[t]) k[t],  v~ alike         reference: memory.memory_loop
    grid   n_tiles * B * W / BLOCK_W, the tiles slowest: the GPU starts programs in this order, so
           whoever waits, waits for one that runs already
    tile   one warp per strip and two channels per lane, or in the narrow tiles one channel, or two
           strips to a warp; ROWS tokens one after the other in registers
    bytes  reads k, v, gate and writes k~, v~ once: 5 * B * T * W elements
    dtype  any in and out; gates and states in fp32, as products of many bf16 decays drift
    """
    n_w = W // BLOCK_W
    program = tl.program_id(0)
    tile = program // (n_w * B)
    b, w = (program // n_w % B).to(tl.int64), program % n_w
    strip = tl.arange(0, STRIPS)[:, None]
    channel = w * BLOCK_W + tl.arange(0, BLOCK_W)[None]
    first = (tile * STRIPS + strip) * ROWS               # (STRIPS, 1)  token of each strip
    t0 = first.to(tl.int64)
    k_ptr += b * k_stride_b + t0 * k_stride_t + channel  # (STRIPS, BLOCK_W)
    v_ptr += b * v_stride_b + t0 * v_stride_t + channel
    gate_ptr += b * gate_stride_b + t0 * gate_stride_t + channel

    # Rows. Each strip starts from a zero state. Its intermediate results stay in registers, which
    # is why the loop is unrolled: a tuple's element is then a register. Past the end of the
    # sequence an infinite gate, g = 1 and 1 - g = 0, lets the state through unchanged.
    zero = tl.zeros((STRIPS, BLOCK_W), tl.float32)
    decay, k_own, v_own = zero + 1, zero, zero
    decays, k_owns, v_owns = (), (), ()
    for r in tl.static_range(ROWS):
        mask = first + r < T
        logit = tl.load(gate_ptr + r * gate_stride_t, mask, other=float("inf"))
        g, rest = gates(logit.to(tl.float32))
        k = tl.load(k_ptr + r * k_stride_t, mask, other=0).to(tl.float32)
        v = tl.load(v_ptr + r * v_stride_t, mask, other=0).to(tl.float32)
        decay, k_own, v_own = two_steps(decay, k_own, v_own, g, rest * k, rest * v)
        decays, k_owns, v_owns = decays + (decay,), k_owns + (k_own,), v_owns + (v_own,)

    # Strips. The scan gives each strip all strips up to and with it; and, in the last three, all
    # strips before it.
    decay, k_own, v_own, decay_before, k_before, v_before = tl.associative_scan(
        (decay, k_own, v_own, zero + 1, zero, zero), 0, two_strips)

    # Tiles. What the scan gives the last strip is the whole tile: it turns the state before the
    # tile into the one after it, which goes to the next program.
    size = B * W                                               # of one state
    state = b * W + channel + tl.zeros((STRIPS, 1), tl.int32)  # its offsets, the same in all strips
    at = before_ptr + tile.to(tl.int64) * 2 * size + state
    k_start, v_start = zero, zero                              # before the tile
    if tile > 0:
        k_start, v_start = wait_for(at, at + size)
    elif state_ptr is not None:
        k_start, v_start = tl.load(state_ptr + state), tl.load(state_ptr + size + state)
    k_end, v_end = decay * k_start + k_own, decay * v_start + v_own
    last_strip = strip == STRIPS - 1
    if tile + 1 < n_tiles:
        pass_on(k_end, v_end, at + 2 * size, at + 3 * size, last_strip)
    else:
        tl.store(last_ptr + state, k_end, last_strip)
        tl.store(last_ptr + size + state, v_end, last_strip)

    # Back down: the state before the tile gives the one before each strip, and that each row's.
    k_start, v_start = decay_before * k_start + k_before, decay_before * v_start + v_before
    out = (b * T + t0) * W + channel                           # (STRIPS, BLOCK_W)
    for r in tl.static_range(ROWS):
        mask = first + r < T
        tl.store(k_out_ptr + out + r * W, decays[r] * k_start + k_owns[r], mask)
        tl.store(v_out_ptr + out + r * W, decays[r] * v_start + v_owns[r], mask)


def tile_of(B, W, saves):
    """
    The tile for B rows of W channels. With `saves` it is one that the backward pass has, too, as
    that starts from the states between the tiles.
    """
    if B * W <= FEW:
        return NARROW_BOTH if saves else NARROW_TILE
    return TILE if saves or B * W >= FILLED * TILE["WIDTH"] else LONG_TILE


def layout(B, W, saves):
    """
    The tile's constants. BLOCK_W are its channels, at most two for each of a warp's 32 lanes, and
    fewer where they do not divide W. Of so many warps no two threads hold the same element of a
    (STRIPS, BLOCK_W) tile.
    """
    tile = tile_of(B, W, saves)
    BLOCK_W = math.gcd(W, tile["WIDTH"])
    assert BLOCK_W >= 16, f"{W} channels of k: the kernels cover multiples of 16"
    return dict(ROWS=tile["ROWS"], STRIPS=tile["STRIPS"], BLOCK_W=BLOCK_W, maxnreg=tile["maxnreg"],
                num_warps=tile["STRIPS"] * min(BLOCK_W, 32) // 32)


def flat(state):
    """(2, B, KV, D), or None -> (2, B, W) fp32, contiguous, or None."""
    return None if state is None else state.float().flatten(2).contiguous()


def launch_forward(
    k: Tensor, v: Tensor,     # (B, T, KV, D)
    gate: Tensor,             # (B, T, KV, D)   logits
    state: Optional[Tensor],  # (2, B, KV, D)   fp32
    saves: bool,              #                 for a backward pass
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # k~, v~; the last state; the states before each tile
    B, T, KV, D = k.shape
    assert k.shape == v.shape == gate.shape, \
        f"k {tuple(k.shape)}, v {tuple(v.shape)}, gate {tuple(gate.shape)} must agree"
    assert T > 0, f"k {tuple(k.shape)} has no tokens"
    k_mem, v_mem, last, before = empty_forward(k, v, gate, state, saves)
    k, v, gate = by_token(k), by_token(v), by_token(gate)
    W, constants = KV * D, layout(B, KV * D, saves)
    grid = (len(before) * B * (W // constants["BLOCK_W"]),)
    memory_forward_kernel[grid](
        k, v, gate, k_mem, v_mem, flat(state), before, last, B, T, len(before),
        *(x.stride(0) for x in (k, v, gate)), W, *(x.stride(1) for x in (k, v, gate)), **constants)
    return k_mem, v_mem, last, before


memory_forward = torch.library.custom_op("nanorat::memory_forward", launch_forward, mutates_args=())


@memory_forward.register_fake
def empty_forward(k, v, gate, state, saves):
    B, T, KV, D = k.shape
    tile = tile_of(B, KV * D, saves)
    n_tiles = -(-T // (tile["ROWS"] * tile["STRIPS"]))
    return (k.new_empty(B, T, KV, D), v.new_empty(B, T, KV, D),
            k.new_empty(2, B, KV, D, dtype=torch.float32),
            k.new_full((n_tiles, 2, B, KV * D), EMPTY.value, dtype=torch.int32))


# ---------------------------------------------------------------- backward

@triton.jit
def memory_backward_kernel(
    k_ptr, v_ptr, gate_ptr,     # (B, T, W)  with strides
    dk_mem_ptr, dv_mem_ptr,     # (B, T, W)  gradients of k~ and v~, with strides
    state_ptr, before_ptr,      # states before the first tile and the others, of the forward pass
    dk_ptr, dv_ptr, dgate_ptr,  # (B, T, W)  contiguous
    dlast_ptr,                  # (2, B, W)  fp32: the gradient of the state after the last token
    dafter_ptr,                 # (n_tiles, 2, B, W)  fp32 as int32: of the state after each tile
                                #            but the last; starts as EMPTY
    dstate_ptr,                 # (2, B, W)  fp32: the gradient of the state before the first token
    B, T, n_tiles, k_stride_b, v_stride_b, gate_stride_b, dk_stride_b, dv_stride_b,
    W: tl.constexpr,
    k_stride_t: tl.constexpr, v_stride_t: tl.constexpr, gate_stride_t: tl.constexpr,
    dk_stride_t: tl.constexpr, dv_stride_t: tl.constexpr,
    ROWS: tl.constexpr, STRIPS: tl.constexpr, BLOCK_W: tl.constexpr,
):
    """
    The gradient of Eq. 1, which is the same recurrence backwards in time.

        G[t] = dk~[t] + g[t+1] G[t+1]            the gradient of the state after token t
        dk[t] = (1 - g[t]) G[t]
        dlogit[t] = g[t] (1 - g[t]) G[t] (k~[t-1] - k[t]),  summed over k and v
                                                 reference: autograd of memory.memory_loop
    k~[t-1] is computed again from the forward pass's states: saved in bf16 it would lose percents
    where g is near 1.
    grid   as forward, but the last tile first: a program waits for the tile after its own
    tile   as forward; five tensors' rows stay in registers, in the inputs' dtype
    bytes  reads k, v, gate, dk~, dv~ and writes dk, dv, dgate once: 8 * B * T * W elements
    dtype  as forward
    """
    n_w = W // BLOCK_W
    program = tl.program_id(0)
    tile = n_tiles - 1 - program // (n_w * B)
    b, w = (program // n_w % B).to(tl.int64), program % n_w
    strip = tl.arange(0, STRIPS)[:, None]
    channel = w * BLOCK_W + tl.arange(0, BLOCK_W)[None]
    first = (tile * STRIPS + strip) * ROWS               # (STRIPS, 1)  token of each strip
    t0 = first.to(tl.int64)
    k_ptr += b * k_stride_b + t0 * k_stride_t + channel  # (STRIPS, BLOCK_W)
    v_ptr += b * v_stride_b + t0 * v_stride_t + channel
    gate_ptr += b * gate_stride_b + t0 * gate_stride_t + channel
    dk_mem_ptr += b * dk_stride_b + t0 * dk_stride_t + channel
    dv_mem_ptr += b * dv_stride_b + t0 * dv_stride_t + channel

    # Rows. Each strip starts from zero in both directions: forwards as before (own), and backwards
    # with what it passes on to the strip before it, g[first] G[first] (back). The token `first + r`
    # reaches that through all gates up to and with its own, which is the decay so far.
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
        decay, k_own, v_own = two_steps(
            decay, k_own, v_own, g, rest * k.to(tl.float32), rest * v.to(tl.float32))
        k_back += decay * dk_mem.to(tl.float32)
        v_back += decay * dv_mem.to(tl.float32)
        logits, ks, vs = logits + (logit,), ks + (k,), vs + (v,)
        dk_mems, dv_mems = dk_mems + (dk_mem,), dv_mems + (dv_mem,)

    # Strips: what came before each of them, and, scanned from the end, what comes behind it.
    _, _, _, decay_before, k_before, v_before = tl.associative_scan(
        (decay, k_own, v_own, zero + 1, zero, zero), 0, two_strips)
    decay, k_back, v_back, decay_behind, k_behind, v_behind = tl.associative_scan(
        (decay, k_back, v_back, zero + 1, zero, zero), 0, two_strips, reverse=True)

    # Tiles: the states are known from the forward pass; only the gradients come down the chain.
    size = B * W                                               # of one state
    state = b * W + channel + tl.zeros((STRIPS, 1), tl.int32)  # its offsets, the same in all strips
    k_start, v_start = zero, zero
    if tile > 0:
        at = before_ptr + tile.to(tl.int64) * 2 * size + state
        k_start = tl.load(at).to(tl.float32, bitcast=True)
        v_start = tl.load(at + size).to(tl.float32, bitcast=True)
    elif state_ptr is not None:
        k_start, v_start = tl.load(state_ptr + state), tl.load(state_ptr + size + state)
    k_start, v_start = decay_before * k_start + k_before, decay_before * v_start + v_before

    at = dafter_ptr + tile.to(tl.int64) * 2 * size + state
    if tile + 1 < n_tiles:                                     # of the state after the tile
        k_grad, v_grad = wait_for(at, at + size)
    else:
        k_grad, v_grad = tl.load(dlast_ptr + state), tl.load(dlast_ptr + size + state)
    k_back, v_back = decay * k_grad + k_back, decay * v_grad + v_back
    first_strip = strip == 0
    if tile > 0:
        pass_on(k_back, v_back, at - 2 * size, at - size, first_strip)
    else:
        tl.store(dstate_ptr + state, k_back, first_strip)
        tl.store(dstate_ptr + size + state, v_back, first_strip)
    k_grad, v_grad = decay_behind * k_grad + k_behind, decay_behind * v_grad + v_behind

    # Back down. First forwards through the strip's rows for the state before each token, ...
    k_states, v_states = (), ()
    for r in tl.static_range(ROWS):
        k_states, v_states = k_states + (k_start,), v_states + (v_start,)
        g, rest = gates(logits[r].to(tl.float32))
        k_start = g * k_start + rest * ks[r].to(tl.float32)
        v_start = g * v_start + rest * vs[r].to(tl.float32)

    # ... then from the last token to the first, row ROWS - 1 - i, for the gradients.
    out = (b * T + t0) * W + channel                           # (STRIPS, BLOCK_W)
    for i in tl.static_range(ROWS):
        mask = first + ROWS - 1 - i < T
        g, rest = gates(logits[ROWS - 1 - i].to(tl.float32))
        k_grad += dk_mems[ROWS - 1 - i].to(tl.float32)         # G[t]
        v_grad += dv_mems[ROWS - 1 - i].to(tl.float32)
        dk, dv = rest * k_grad, rest * v_grad
        tl.store(dk_ptr + out + (ROWS - 1 - i) * W, dk, mask)
        tl.store(dv_ptr + out + (ROWS - 1 - i) * W, dv, mask)
        # weighted before they are subtracted: the difference of two large numbers may overflow,
        # and at a saturated gate 0 * inf would be NaN
        dk, dv = g * dk, g * dv
        pull = (dk * k_states[ROWS - 1 - i] - dk * ks[ROWS - 1 - i].to(tl.float32)
                + (dv * v_states[ROWS - 1 - i] - dv * vs[ROWS - 1 - i].to(tl.float32)))
        tl.store(dgate_ptr + out + (ROWS - 1 - i) * W, pull, mask)
        k_grad, v_grad = g * k_grad, g * v_grad


@torch.library.custom_op("nanorat::memory_backward", mutates_args=())
def memory_backward(
    k: Tensor, v: Tensor, gate: Tensor,  # (B, T, KV, D)
    state: Optional[Tensor],             # (2, B, KV, D)       fp32
    before: Tensor,                      # (n_tiles, 2, B, W)  of memory_forward
    dk_mem: Tensor, dv_mem: Tensor,      # (B, T, KV, D)
    dlast: Tensor,                       # (2, B, KV, D)  fp32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # dk, dv, dgate, dstate
    B, T, KV, D = k.shape
    dk, dv, dgate, dstate = empty_backward(k, v, gate, state, before, dk_mem, dv_mem, dlast)
    dafter = torch.full_like(before, EMPTY.value)

    tensors = [by_token(x) for x in (k, v, gate, dk_mem, dv_mem)]
    W, constants = KV * D, layout(B, KV * D, True)
    grid = (len(before) * B * (W // constants["BLOCK_W"]),)
    memory_backward_kernel[grid](
        *tensors, flat(state), before, dk, dv, dgate, flat(dlast), dafter, dstate, B, T,
        len(before), *(x.stride(0) for x in tensors), W, *(x.stride(1) for x in tensors),
        **constants | dict(maxnreg=None))
    return dk, dv, dgate, dstate


@memory_backward.register_fake
def empty_backward(k, v, gate, state, before, dk_mem, dv_mem, dlast):
    return k.new_empty(k.shape), v.new_empty(k.shape), gate.new_empty(k.shape), \
        torch.empty_like(dlast)


def save_for_backward(ctx, inputs, output):
    k, v, gate, state, _ = inputs
    _, _, _, before = output
    ctx.save_for_backward(k, v, gate, state, before)


def backward(ctx, dk_mem, dv_mem, dlast, _):
    state = ctx.saved_tensors[3]
    *gradients, dstate = memory_backward(*ctx.saved_tensors, dk_mem, dv_mem, dlast)
    return *gradients, None if state is None else dstate, None


memory_forward.register_autograd(backward, setup_context=save_for_backward)


# ---------------------------------------------------------------- the function

def memory_scan(
    k, v,        # (B, T, KV, D)  any strides; a copy is made unless channels lie side by side
    gate,        # (B, T, KV, D)  logits of g
    state=None,  # (2, B, KV, D)  fp32: k~ and v~ before the first token; None is zeros
):               # -> k~, v~ in the dtypes of k and v; the state after the last token, fp32
    """Eq. 1, as memory.memory_scan, with gradients for all four."""
    inputs = k, v, gate, state
    needed = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    # Calling the operator takes longer than a short prompt's kernel. It is needed for gradients,
    # for torch.compile, and for tensors that only stand for others.
    plain = not (needed or torch.compiler.is_compiling()) and all(
        x is None or type(x) in (Tensor, torch.nn.Parameter) for x in inputs)
    k_mem, v_mem, last, _ = (launch_forward if plain else memory_forward)(*inputs, needed)
    return k_mem, v_mem, last


# ---------------------------------------------------------------- the other kernels
#
# The first column is the file in triton_ops/, the last what bounds the time: the floor that
# bench.py shows beside it. selectors.py there puts the methods' kernels together.
#
# file        function         computes                          reference            bound by
# block       decode_step      between projections and attention Attention.forward,   one launch
#                              of one token, memory and cache    memory_step
#             products         W_i x of a few rows, several W_i  F.linear, RMSNorm    bytes of W_i
#             swiglu_products  silu(W_gate x) * W_up x, likewise MLP.forward          bytes of W
#             add_norm         x + RMSNorm(y)                    nn.RMSNorm           bytes
#             norm_rotate      RoPE(QK-norm) of a prompt's q, k  Attention.rotate     bytes
#             swiglu           silu(gate) * up, of a prompt      F.silu               bytes
# topk        select           Eq. 3's TopK                      sparse.top           latency
# quest       block_bounds     min and max key of each block     sparse.block_bounds  bytes of k
#             quest_scores     q against these bounds            Quest.score_bounds   their bytes
#             quest_attend     one query and its chosen blocks   attend_to_slots      bytes chosen
#             attend_slots     one query and a whole cache       sparse.attend        bytes of k, v
# snapkv      snapkv_scores    the window's attention, pooled    SnapKV.score         bytes of k
# moba_route  moba_route       the S best blocks of each query   MoBA.choose          instructions
# moba        moba_attend      attention over them, gradients    attend_to_blocks     FLOPs
# dilated     dilated          a pattern that needs no indices,  Dilated.prefill      bytes for ARL,
#                              gradients                                              else FLOPs
