"""
The model's block in Triton, for inference: all but attention itself and a prompt's large products.

    a decoding step of few rows
        decode_step       memory, QK-norm, RoPE and the write into the cache, between the
                          projections and attention
        products          y_i = W_i x for a few rows x and several matrices: the projections, with
                          the sum behind them, and of one row the norm before
        swiglu_products   silu(W_gate x) * W_up x, likewise
    a prompt, and steps of more rows
        norm_rotate       QK-norm and RoPE of q and k
        swiglu            silu(gate) * up
    both
        add_norm          x + RMSNorm(y): OLMo 2's residual

A decoding step of few rows reads every weight once and computes next to nothing: 14 GB at 7B, which
take 4.6 ms at an H100's copy speed. So a product is one pass over W, several share a launch, which
costs 2 to 3 microseconds, and their neighbours' arithmetic is done on the way. Of a small model the
launches take most of a step nonetheless, so each kernel here is launched while the one before it
runs (common.early). With more rows the products go to cuBLAS, as a prompt's do. What lies between
the products is bound by memory: here it reads and writes each tensor once.

The references are the plain forms of model.py and memory.memory_step; tests/test_kernels.py holds
the kernels to them. Each output is one program's sum in a fixed order, so the same inputs give the
same bits. There are no gradients: training compiles the plain forms. kernels.py explains how a
kernel is written here.

Letters: B batch, T tokens, C width, R rows of x, K inputs and N outputs of a matrix, H query heads,
KV key/value heads, D head width, HALF = D // 2.
"""
import math
from typing import Optional

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from triton_ops.common import await_inputs, by_token, early, gates

# Rows of x up to which these products are faster than cuBLAS's, measured on an H200: with matrices
# as narrow as SmolLM2's because they are fewer launches.
MOST_ROWS, OF_WIDE, WIDE = 64, 16, 1536

# Tiles of W, chosen on an H100. One row is multiplied without tensor cores, and its tile is loaded
# at once; for several rows the tiles come in stages.
ONE = dict(BLOCK_N=4, BLOCK_K=2048, STAGES=1, num_warps=4)
FEW = dict(BLOCK_N=64, BLOCK_K=128, STAGES=6, num_warps=4)


# ---------------------------------------------------------------- a token's heads

@triton.jit
def load_halves(ptr, n, HALF: tl.constexpr, BLOCK_H: tl.constexpr):
    """
    A token's n heads (n, 2 * HALF), side by side at ptr, as two fp32 tiles (BLOCK_H, HALF), its
    left and its right half: RoPE rotates a channel of one with the same channel of the other.
    """
    head, d = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, HALF)[None]
    at = ptr + head * 2 * HALF + d
    left = tl.load(at, head < n, other=0).to(tl.float32)
    right = tl.load(at + HALF, head < n, other=0).to(tl.float32)
    return left, right


@triton.jit
def store_halves(ptr, left, right, n, HALF: tl.constexpr, BLOCK_H: tl.constexpr):
    head, d = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, HALF)[None]
    at = ptr + head * 2 * HALF + d
    tl.store(at, left, head < n)
    tl.store(at + HALF, right, head < n)


@triton.jit
def remember_halves(
    left, right, gate_ptr, state_ptr, n, HALF: tl.constexpr, BLOCK_H: tl.constexpr,
):
    """Eq. 1 for one token of k or v, whose state (n, 2 * HALF) is updated in place."""
    gate_left, gate_right = load_halves(gate_ptr, n, HALF, BLOCK_H)
    state_left, state_right = load_halves(state_ptr, n, HALF, BLOCK_H)
    g, rest = gates(gate_left)
    left = g * state_left + rest * left
    g, rest = gates(gate_right)
    right = g * state_right + rest * right
    store_halves(state_ptr, left, right, n, HALF, BLOCK_H)
    return left, right


@triton.jit
def norm_and_rotate(
    left, right, weight_ptr, cos_ptr, sin_ptr, n, eps,
    PER_HEAD: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr,
):
    """QK-norm over all n heads together or over each (weight_ptr None: without), then RoPE."""
    if weight_ptr is not None:
        if PER_HEAD:
            squares = (tl.sum(left * left, 1) + tl.sum(right * right, 1))[:, None]  # [BLOCK_H, 1]
            scale = tl.rsqrt(squares / (2 * HALF) + eps)
            weight_left, weight_right = load_halves(weight_ptr, 1, HALF, 1)         # [1, HALF]
        else:
            squares = tl.sum(left * left) + tl.sum(right * right)
            scale = tl.rsqrt(squares / (n * 2 * HALF) + eps)
            weight_left, weight_right = load_halves(weight_ptr, n, HALF, BLOCK_H)
        left, right = left * scale * weight_left, right * scale * weight_right
    d = tl.arange(0, HALF)[None]
    cos, sin = tl.load(cos_ptr + d), tl.load(sin_ptr + d)
    return left * cos - right * sin, right * cos + left * sin


# ---------------------------------------------------------------- the decoding step

@triton.jit
def decode_step_kernel(
    q_ptr,                        # (B, H, D)   projections of one token per row
    k_ptr, v_ptr, gate_ptr,       # (B, KV, D)  gate None: no memory
    q_weight_ptr, k_weight_ptr,   # (H * D), (KV * D)  of QK-norm; PER_HEAD: (D); or None
    cos_ptr, sin_ptr,             # (1 or B, D / 2)  fp32
    state_ptr,                    # (2, B, KV, D)  fp32, updated in place
    k_cache_ptr, v_cache_ptr,     # (B, slots, KV, D)  written at the token's slot
    low_ptr, high_ptr,            # (B, N, KV, D)  Quest's bounds, updated in place, or None
    used_ptr,                     # (B,)  slots filled per row, this token's included
    positions_ptr, position_ptr,  # (B, slots, KV) int32, and (B,), this token's; or None
    q_out_ptr,                    # (B, H, D)
    B, H, KV, eps,
    q_stride, k_stride, v_stride, gate_stride, cos_stride,  # from row to row
    k_cache_stride, v_cache_stride, bounds_stride, positions_stride, PER_HEAD: tl.constexpr,
    HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_SIZE: tl.constexpr, EARLY: tl.constexpr,
):
    """
    What surrounds attention in a decoding step.

        k, v -> memory;   q, k -> QK-norm -> RoPE;   k, v, position -> cache;   k -> its block's
        bounds
    reference: memory.memory_step, and the model's attention between its projections and attend
    grid   (B, 3): one program each for q, k and v of a row: QK-norm needs a token's heads together
    tile   the heads of q, k or v, in halves [BLOCK_H, HALF]
    bytes  some 100 KB a row at 32 heads of 128: the time is one launch and one trip to memory
    dtype  fp32 from the projections to the cache
    """
    b, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    D: tl.constexpr = 2 * HALF
    await_inputs(EARLY)
    slot = tl.load(used_ptr + b) - 1
    angle = b * cos_stride
    if part == 0:
        left, right = load_halves(q_ptr + b * q_stride, H, HALF, BLOCK_H)
        left, right = norm_and_rotate(
            left, right, q_weight_ptr, cos_ptr + angle, sin_ptr + angle, H, eps,
            PER_HEAD, HALF, BLOCK_H)
        store_halves(q_out_ptr + b * H * D, left, right, H, HALF, BLOCK_H)
    elif part == 1:
        left, right = load_halves(k_ptr + b * k_stride, KV, HALF, BLOCK_H)
        if gate_ptr is not None:
            left, right = remember_halves(
                left, right, gate_ptr + b * gate_stride, state_ptr + b * KV * D, KV, HALF, BLOCK_H)
        left, right = norm_and_rotate(
            left, right, k_weight_ptr, cos_ptr + angle, sin_ptr + angle, KV, eps,
            PER_HEAD, HALF, BLOCK_H)
        at = k_cache_ptr + b * k_cache_stride + slot * KV * D
        store_halves(at, left, right, KV, HALF, BLOCK_H)
        if positions_ptr is not None:
            head = tl.arange(0, BLOCK_H)
            noted = positions_ptr + b * positions_stride + slot * KV + head
            tl.store(noted, tl.load(position_ptr + b).to(tl.int32), head < KV)
        if low_ptr is not None:
            # The bounds are of the keys as the cache holds them, rounded. The first key of a block
            # is its bounds: what lies there may be of an older prompt.
            block = b * bounds_stride + slot // BLOCK_SIZE * KV * D
            new = slot % BLOCK_SIZE == 0
            dtype: tl.constexpr = k_cache_ptr.dtype.element_ty
            left, right = left.to(dtype).to(tl.float32), right.to(dtype).to(tl.float32)
            old_left, old_right = load_halves(low_ptr + block, KV, HALF, BLOCK_H)
            store_halves(low_ptr + block, tl.where(new, left, tl.minimum(old_left, left)),
                         tl.where(new, right, tl.minimum(old_right, right)), KV, HALF, BLOCK_H)
            old_left, old_right = load_halves(high_ptr + block, KV, HALF, BLOCK_H)
            store_halves(high_ptr + block, tl.where(new, left, tl.maximum(old_left, left)),
                         tl.where(new, right, tl.maximum(old_right, right)), KV, HALF, BLOCK_H)
    else:
        left, right = load_halves(v_ptr + b * v_stride, KV, HALF, BLOCK_H)
        if gate_ptr is not None:
            state_ptr += (B + b) * KV * D  # v's half of it lies behind k's
            left, right = remember_halves(
                left, right, gate_ptr + b * gate_stride, state_ptr, KV, HALF, BLOCK_H)
        at = v_cache_ptr + b * v_cache_stride + slot * KV * D
        store_halves(at, left, right, KV, HALF, BLOCK_H)


UPDATED = "state", "k_cache", "v_cache", "low", "high", "positions"


@torch.library.custom_op("nanorat::decode_step", mutates_args=UPDATED)
def decode_step(
    q: Tensor,                   # (B, 1, H, D)   projections of the new token
    k: Tensor, v: Tensor,        # (B, 1, KV, D)
    gate: Optional[Tensor],      # (B, 1, KV, D)  logits; None: a model without memory
    q_weight: Optional[Tensor],  # (H * D,)       of QK-norm, or (D,) of each head's; None: without
    k_weight: Optional[Tensor],  # (KV * D,)      or (D,)
    eps: float,                  #                of QK-norm
    cos: Tensor, sin: Tensor,    # (1 or B, 1, 1, D / 2)  fp32, of RoPE
    state: Optional[Tensor],     # (2, B, KV, D)  fp32, contiguous; updated in place
    k_cache: Tensor, v_cache: Tensor,  # (B, slots, KV, D)  written in place at slot used - 1
    low: Optional[Tensor],       # (B, N, KV, D)  Quest's bounds per block; updated in place
    high: Optional[Tensor],
    block_size: int,             #                of these blocks
    used: Tensor,                # (B,)  int64    slots filled per row, the new token's included
    positions: Optional[Tensor],  # (B, slots, KV)  int32, of each slot; updated in place
    position: Optional[Tensor],   # (B,)  int64   the new token's, with positions
) -> Tensor:                     # q (B, 1, H, D), ready for attention
    """All of a decoding step between the projections and attention, in one launch."""
    B, _, H, D = q.shape
    KV = k.shape[2]
    assert D % 2 == 0 and D & D - 1 == 0, f"head width {D} is not a power of two"
    q, k, v = (by_token(x) for x in (q, k, v))
    gate = None if gate is None else by_token(gate)
    for x in k_cache, v_cache, low, high:
        assert x is None or x.stride()[1:] == (KV * D, D, 1), \
            f"a cache's slots must lie side by side, not with strides {x.stride()}"
    assert positions is None or positions.stride()[1:] == (KV, 1), \
        f"a cache's positions must lie side by side, not with strides {positions.stride()}"
    position = None if positions is None else position.contiguous()

    q_out = q.new_empty(B, 1, H, D)
    decode_step_kernel[(B, 3)](
        q, k, v, gate, q_weight, k_weight, cos, sin, state, k_cache, v_cache, low, high, used,
        positions, position, q_out, B, H, KV, eps, q.stride(0), k.stride(0), v.stride(0),
        0 if gate is None else gate.stride(0), 0 if len(cos) == 1 else cos.stride(0),
        k_cache.stride(0), v_cache.stride(0), 0 if low is None else low.stride(0),
        0 if positions is None else positions.stride(0),
        PER_HEAD=is_per_head(q_weight, D),
        HALF=D // 2, BLOCK_H=triton.next_power_of_2(max(H, KV)), BLOCK_SIZE=block_size, num_warps=8,
        **early(q))
    return q_out


def is_per_head(weight, D):
    """Whether a QK-norm is over each head. Of a single head both kinds are the same."""
    return weight is not None and weight.numel() == D


@decode_step.register_fake
def _(q, k, v, gate, q_weight, k_weight, eps, cos, sin, state, k_cache, v_cache, low, high,
      block_size, used, positions, position):
    return q.new_empty(q.shape)


# ---------------------------------------------------------------- a few rows times matrices

def most_rows(K):
    """How many rows of K inputs go through `products`, not cuBLAS."""
    return OF_WIDE if K > WIDE else MOST_ROWS


@triton.jit
def times(
    x_ptr, norm_ptr, w_ptr, n, N, K, R, SQUARES: tl.constexpr, EARLY: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, STAGES: tl.constexpr,
):
    """
    x (R, K) times rows n to n + BLOCK_N - 1 of W (N, K): [BLOCK_N, BLOCK_R] in fp32. A single row
    is multiplied with norm (K,) on the way, if that is given. With SQUARES a single row's mean
    square comes along, [1, BLOCK_R]; else 0.
    """
    offs_n, offs_k = n + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    mask_n = (offs_n < N)[:, None]
    w_ptr += offs_n.to(tl.int64)[:, None] * K + offs_k[None, :]    # [BLOCK_N, BLOCK_K]
    if BLOCK_R == 1:
        offs_k = offs_k[None, :]
        partial = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        squares = tl.zeros((1, BLOCK_K), tl.float32)
        # the first tile of W, as weights do not change, comes while the kernel before still runs
        w = tl.load(w_ptr, mask=mask_n & (offs_k < K), other=0)
        await_inputs(EARLY)
        for k in range(0, K, BLOCK_K):
            mask_k = k + offs_k < K
            if k > 0:
                w = tl.load(w_ptr + k, mask=mask_n & mask_k, other=0)
            x = tl.load(x_ptr + k + offs_k, mask=mask_k, other=0).to(tl.float32)
            if SQUARES:
                squares += x * x
            if norm_ptr is not None:
                x *= tl.load(norm_ptr + k + offs_k, mask=mask_k, other=0).to(tl.float32)
            partial += w.to(tl.float32) * x
        return tl.sum(partial, axis=1)[:, None], tl.sum(squares, axis=1)[None, :] / K
    else:
        offs_r = tl.arange(0, BLOCK_R)
        mask_r = (offs_r < R)[None, :]
        x_ptr += offs_r[None, :] * K + offs_k[:, None]             # [BLOCK_K, BLOCK_R]
        total = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
        await_inputs(EARLY)
        for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
            mask_k = k + offs_k < K
            w = tl.load(w_ptr + k, mask=mask_n & mask_k[None, :], other=0)
            x = tl.load(x_ptr + k, mask=mask_k[:, None] & mask_r, other=0)
            total = tl.dot(w, x, total, input_precision="ieee")
        return total, tl.zeros((1, BLOCK_R), tl.float32)


@triton.jit
def mean_squares(x_ptr, K, R, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr):
    """Of each row of x (R, K): [1, BLOCK_R]"""
    offs_k, offs_r = tl.arange(0, BLOCK_K)[:, None], tl.arange(0, BLOCK_R)[None, :]
    total = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    for k in range(0, K, BLOCK_K):
        mask = (k + offs_k < K) & (offs_r < R)
        x = tl.load(x_ptr + offs_r * K + k + offs_k, mask=mask, other=0).to(tl.float32)
        total += x * x
    return tl.sum(total, axis=0)[None, :] / K


@triton.jit
def products_kernel(
    x_ptr,      # (R, K)
    norm_ptr,   # (K,)    RMSNorm's weight, or None
    w_ptrs,     # of the matrices (sizes[i], K)
    sizes,      # of these, in rows
    bias_ptrs,  # (sizes[i],) of the last matrices, or None
    onto_ptr,   # (R, sum(sizes)), or None
    y_ptr,      # (R, sum(sizes))
    K, R, eps, EARLY: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, STAGES: tl.constexpr,
):
    """
    y = onto + W_0 x, W_1 x, ... side by side, W_i of sizes[i] rows, the last ones with a bias.

    With eps and norm, x is norm * x / rms(x): a norm of the block's input. With eps alone, the very
    last product is W x / rms(x) + bias: the memory's gate, which reads that input at RMS 1. (The
    product of a scaled x is the scaled product.)

    reference: F.linear, nn.RMSNorm
    grid   a program for each BLOCK_N rows of all matrices
    tile   W [BLOCK_N, BLOCK_K], x [BLOCK_K, BLOCK_R] from L2
    bytes  the matrices, once
    dtype  any; sums in fp32
    """
    n = tl.program_id(0) * BLOCK_N
    # the program's matrix, its rows, those of all before it, and of those without a bias
    w_ptr, N, first, start, plain = w_ptrs[0], sizes[0], 0, 0, 0
    if bias_ptrs is not None:
        bias_ptr = bias_ptrs[0]
    for i in tl.static_range(len(w_ptrs)):
        if n >= start:
            w_ptr, N, first = w_ptrs[i], sizes[i], start
        if bias_ptrs is not None:
            if i < len(w_ptrs) - len(bias_ptrs):
                plain += sizes[i]
            elif n >= start:
                bias_ptr = bias_ptrs[i - len(w_ptrs) + len(bias_ptrs)]
        start += sizes[i]
    y, squares = times(x_ptr, norm_ptr, tl.multiple_of(w_ptr, 16), n - first, N, K, R,
                       eps is not None, EARLY, BLOCK_N, BLOCK_K, BLOCK_R, STAGES)
    offs_n, offs_r = n + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R)
    if eps is not None:
        if norm_ptr is not None or n >= start - sizes[len(w_ptrs) - 1]:
            if BLOCK_R > 1:  # in a large tile: small ones would each wait for L2
                squares = mean_squares(x_ptr, K, R, 8192 // BLOCK_R, BLOCK_R)
            y *= tl.rsqrt(squares + eps)
    if bias_ptrs is not None:
        mask_b = (offs_n >= plain) & (offs_n < start)
        bias = tl.load(bias_ptr + offs_n - first, mask=mask_b, other=0)
        y += bias.to(tl.float32)[:, None]
    where = offs_r.to(tl.int64)[None, :] * start + offs_n[:, None]  # [BLOCK_N, BLOCK_R]
    mask = (offs_n < start)[:, None] & (offs_r < R)[None, :]
    if onto_ptr is not None:
        y += tl.load(onto_ptr + where, mask=mask, other=0).to(tl.float32)
    tl.store(y_ptr + where, y.to(y_ptr.dtype.element_ty), mask=mask)


def tiles(x, R):
    """Constants for R rows of x."""
    tile, K = ONE if R == 1 else FEW, x.shape[-1]
    return tile | dict(BLOCK_K=max(16, min(tile["BLOCK_K"], triton.next_power_of_2(K))),
                       BLOCK_R=1 if R == 1 else max(16, triton.next_power_of_2(R)),
                       STAGES=max(1, tile["STAGES"] * 2 // x.element_size()))


def products(
    x,          # (B, T, K)  B * T at most MOST_ROWS, contiguous
    weights,    # matrices (N_i, K), N_i a multiple of 16 in all but the last
    biases=(),  # (N_i)      of the last matrices, of as many as there are biases
    eps=None,   #            RMSNorm's: with norm all products are of x normalised, without it the
                #            last one is of x / rms(x)
    norm=None,  # (K)        RMSNorm's weight
    onto=None,  # (B, T, N)  what the result is added to, of one matrix
):              # -> [y_i (B, T, N_i)], side by side in memory
    K, R, sizes = x.shape[-1], x.shape[0] * x.shape[1], [len(w) for w in weights]
    assert R <= MOST_ROWS and x.is_contiguous(), \
        f"products takes up to {MOST_ROWS} rows, contiguous, not {tuple(x.shape)}"
    assert all(w.shape[1] == K and w.is_contiguous() and w.dtype == x.dtype for w in weights), \
        "matrices do not fit x, or are views"
    assert onto is None or onto.shape == (*x.shape[:2], sum(sizes)) and onto.is_contiguous(), \
        f"onto is {tuple(onto.shape)}, not {(*x.shape[:2], sum(sizes))} and contiguous"
    if R > 1 and norm is not None:  # several rows go to the tensor cores as they are
        x, eps, norm = F.rms_norm(x, (K,), norm, eps), None, None
    constants = tiles(x, R)
    # a program has rows of one matrix only
    constants["BLOCK_N"] = math.gcd(constants["BLOCK_N"], *sizes[:-1])
    assert constants["BLOCK_N"] in (4, 16, 32, 64), \
        f"{sizes=}: all but the last must be multiples of 16"

    y = x.new_empty(*x.shape[:2], sum(sizes))
    products_kernel[(triton.cdiv(sum(sizes), constants["BLOCK_N"]),)](
        x, norm, tuple(weights), tuple(sizes), tuple(biases) or None, onto, y, K, R, eps,
        **constants, **early(x))
    return list(y.split(sizes, dim=-1))


@triton.jit
def silu(x):
    return x / (1 + tl.exp(-x))


@triton.jit
def swiglu_products_kernel(
    x_ptr,             # (R, K)
    norm_ptr,          # (K,)  RMSNorm's weight, or None
    gate_ptr, up_ptr,  # (N, K)
    y_ptr,             # (R, N)
    N, K, R, eps, EARLY: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, STAGES: tl.constexpr,
):
    """
    y = silu(W_gate x) * W_up x, with a norm of norm * x / rms(x).

    reference: F.silu(F.linear(x, W_gate)) * F.linear(x, W_up)
    As products_kernel; a program has the same rows of both matrices.
    """
    n = tl.program_id(0) * BLOCK_N
    gate, squares = times(x_ptr, norm_ptr, gate_ptr, n, N, K, R, norm_ptr is not None, EARLY,
                          BLOCK_N, BLOCK_K, BLOCK_R, STAGES)
    up, _ = times(x_ptr, norm_ptr, up_ptr, n, N, K, R, False, False,
                  BLOCK_N, BLOCK_K, BLOCK_R, STAGES)
    if norm_ptr is not None:
        scale = tl.rsqrt(squares + eps)
        gate, up = gate * scale, up * scale
    offs_n, offs_r = n + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R)
    where = offs_r.to(tl.int64)[None, :] * N + offs_n[:, None]      # [BLOCK_N, BLOCK_R]
    tl.store(y_ptr + where, (silu(gate) * up).to(y_ptr.dtype.element_ty),
             mask=(offs_n < N)[:, None] & (offs_r < R)[None, :])


def swiglu_products(
    x,             # (B, T, K)  as in products
    w_gate, w_up,  # (N, K)
    eps=None,      #            RMSNorm's, with norm
    norm=None,     # (K)        its weight: the products are of x normalised
):                 # -> (B, T, N)
    (N, K), R = w_gate.shape, x.shape[0] * x.shape[1]
    assert x.shape[2] == K and w_up.shape == (N, K), \
        f"{tuple(x.shape)} with {tuple(w_gate.shape)} and {tuple(w_up.shape)}"
    assert R <= MOST_ROWS and x.is_contiguous(), \
        f"swiglu_products takes up to {MOST_ROWS} rows, contiguous, not {tuple(x.shape)}"
    y, constants = x.new_empty(*x.shape[:2], N), tiles(x, R)
    if R > 1:  # two matrices' tiles come in stages
        constants["BLOCK_N"] //= 2
        if norm is not None:
            x, norm = F.rms_norm(x, (K,), norm, eps), None
    swiglu_products_kernel[(triton.cdiv(N, constants["BLOCK_N"]),)](
        x, norm, w_gate, w_up, y, N, K, R, eps, **constants, **early(x))
    return y


# ---------------------------------------------------------------- between the products

@triton.jit
def add_norm_kernel(
    x_ptr, y_ptr,  # (tokens, C)
    weight_ptr,    # (C,)
    out_ptr,       # (tokens, C)
    C, eps, BLOCK_C: tl.constexpr, EARLY: tl.constexpr,
):
    """
    out = x + weight * y / rms(y)                                  reference: x + nn.RMSNorm(y)

    grid   (tokens,): one token per program
    tile   the token's channels [BLOCK_C]
    bytes  x, y and out once: 3 * C elements a token
    dtype  any; in fp32 between reading and writing
    """
    token, offs_c = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_C)
    mask = offs_c < C
    await_inputs(EARLY)
    x = tl.load(x_ptr + token * C + offs_c, mask=mask, other=0).to(tl.float32)
    y = tl.load(y_ptr + token * C + offs_c, mask=mask, other=0).to(tl.float32)
    weight = tl.load(weight_ptr + offs_c, mask=mask, other=0).to(tl.float32)
    out = x + weight * y * tl.rsqrt(tl.sum(y * y) / C + eps)
    tl.store(out_ptr + token * C + offs_c, out.to(out_ptr.dtype.element_ty), mask=mask)


def add_norm(
    x, y,    # (B, T, C)  contiguous
    weight,  # (C)
    eps,
):           # -> (B, T, C)
    assert x.shape == y.shape and x.is_contiguous() and y.is_contiguous(), \
        f"{tuple(x.shape)} and {tuple(y.shape)}, contiguous"
    out, C = torch.empty_like(x), x.shape[-1]
    BLOCK_C, tokens = triton.next_power_of_2(C), x.numel() // C
    add_norm_kernel[(tokens,)](
        x, y, weight, out, C, eps, BLOCK_C=BLOCK_C, num_warps=min(8, max(1, BLOCK_C // 512)),
        **early(x, tokens <= MOST_ROWS))
    return out


@triton.jit
def norm_rotate_kernel(
    q_ptr, k_ptr,                # (B, T, H, D), (B, T, KV, D)  with strides for b and t
    q_weight_ptr, k_weight_ptr,  # (H * D), (KV * D); PER_HEAD: (D); or None
    cos_ptr, sin_ptr,            # (1 or B, T, D / 2)  fp32
    q_out_ptr, k_out_ptr,        # as q and k, contiguous
    T, H, KV, eps, q_stride_b, q_stride_t, k_stride_b, k_stride_t, cos_stride,
    PER_HEAD: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr,
):
    """
    q = RoPE(weight * q / rms(q)), the norm over all heads of a token, or over each; weight None:
    RoPE alone. The same of k.

    reference: model.rotate(q_norm(q)), model.rotate(k_norm(k))
    grid   (T, B, 2): a program has one token of q or of k
    tile   its heads' left and right halves [BLOCK_H, HALF], which RoPE pairs
    bytes  q and k in and out once: 2 * (H + KV) * D elements a token
    dtype  any; in fp32 between reading and writing
    """
    t, b, part = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    angle = b * cos_stride + t * HALF
    if part == 0:
        left, right = load_halves(q_ptr + b * q_stride_b + t * q_stride_t, H, HALF, BLOCK_H)
        left, right = norm_and_rotate(left, right, q_weight_ptr, cos_ptr + angle, sin_ptr + angle,
                                      H, eps, PER_HEAD, HALF, BLOCK_H)
        store_halves(q_out_ptr + (b * T + t) * H * 2 * HALF, left, right, H, HALF, BLOCK_H)
    else:
        left, right = load_halves(k_ptr + b * k_stride_b + t * k_stride_t, KV, HALF, BLOCK_H)
        left, right = norm_and_rotate(left, right, k_weight_ptr, cos_ptr + angle, sin_ptr + angle,
                                      KV, eps, PER_HEAD, HALF, BLOCK_H)
        store_halves(k_out_ptr + (b * T + t) * KV * 2 * HALF, left, right, KV, HALF, BLOCK_H)


def norm_rotate(
    q, k,                # (B, T, H, D), (B, T, KV, D)  a token's heads side by side
    q_weight, k_weight,  # (H * D), (KV * D) of QK-norm over all heads, (D) over each, or None
    eps,
    cos, sin,            # (1 or B, T, 1, D / 2)  fp32, contiguous
):                       # -> q, k
    (B, T, H, D), KV = q.shape, k.shape[2]
    assert q.stride()[2:] == k.stride()[2:] == (D, 1) and cos.is_contiguous() \
        and sin.is_contiguous(), f"norm_rotate: strides {q.stride()}, {k.stride()}, {cos.stride()}"
    q_out, k_out = q.new_empty(B, T, H, D), k.new_empty(B, T, KV, D)
    cos_stride = 0 if len(cos) == 1 else cos.stride(0)
    norm_rotate_kernel[(T, B, 2)](
        q, k, q_weight, k_weight, cos, sin, q_out, k_out, T, H, KV, eps, q.stride(0), q.stride(1),
        k.stride(0), k.stride(1), cos_stride, PER_HEAD=is_per_head(q_weight, D), HALF=D // 2,
        BLOCK_H=triton.next_power_of_2(max(H, KV)), num_warps=4)
    return q_out, k_out


@triton.jit
def swiglu_kernel(gate_ptr, up_ptr, out_ptr, size, BLOCK: tl.constexpr):
    """
    out = silu(gate) * up, elementwise                             reference: F.silu(gate) * up

    grid   (cdiv(size, BLOCK),)
    bytes  gate, up and out once
    dtype  any; in fp32 between reading and writing
    """
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    gate = tl.load(gate_ptr + offs, mask=mask, other=0).to(tl.float32)
    up = tl.load(up_ptr + offs, mask=mask, other=0).to(tl.float32)
    tl.store(out_ptr + offs, (silu(gate) * up).to(out_ptr.dtype.element_ty), mask=mask)


def swiglu(gate, up):
    """(..., N), (..., N) -> (..., N), written over gate: a prompt's is large."""
    assert gate.shape == up.shape and gate.is_contiguous() and up.is_contiguous(), \
        f"{tuple(gate.shape)}, {tuple(up.shape)}, contiguous"
    grid = (triton.cdiv(gate.numel(), 4096),)
    swiglu_kernel[grid](gate, up, gate, gate.numel(), BLOCK=4096, num_warps=8)
    return gate
