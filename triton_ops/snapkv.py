"""
SnapKV's compression in Triton: the scores of a prompt's keys.
"""
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_ops.common import check_heads, check_tensors

SNAPKV = dict(BLOCK_T=128, BLOCK_R=64, num_warps=4)


@triton.jit
def load_queries(q_ptr, offs_r, stride_qw, stride_qh, G: tl.constexpr, W: tl.constexpr, D: tl.constexpr):
    """Rows [BLOCK_R, D] of the W * G queries that share a KV head: row r is query r // G of the window, head r % G."""
    where = (offs_r // G).to(tl.int64) * stride_qw + (offs_r % G).to(tl.int64) * stride_qh
    return tl.load(q_ptr + where[:, None] + tl.arange(0, D)[None, :], mask=(offs_r < W * G)[:, None], other=0)


@triton.jit
def snapkv_lse_kernel(
    q_ptr, k_ptr, lengths_ptr, lse_ptr, Tk, scale, stride_qb, stride_qw, stride_qh, stride_kb, stride_kt, stride_kh,
    G: tl.constexpr, W: tl.constexpr, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr,
):
    """
    First pass over the keys: what each query's softmax divides by, tile by tile.

        lse[r] = log2 sum_t exp2(scale * q[r] . k[t])    over the tile's t <= length - W + r // G, the query's own slot
    reference: sparse.SnapKV.score, the softmax's denominator
    grid   (KV, cdiv(Tk, BLOCK_T), B)
    tile   k [BLOCK_T, D] stays; the W * G queries of its KV head come by, q [BLOCK_R, D]; logits [BLOCK_R, BLOCK_T]
    bytes  Tk * D elements per KV head; FLOPs 2 * W * H * Tk * D, which is less work up to W * G of about 200
    dtype  bf16 or full fp32 products, fp32 softmax (the reference rounds bf16 logits before its softmax)
    """
    kv, tile, b = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    KV, tiles = tl.num_programs(0), tl.num_programs(1)
    length = tl.minimum(tl.load(lengths_ptr + b), Tk)
    offs_t, offs_d = tile * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, D)
    k = tl.load(k_ptr + b * stride_kb + kv * stride_kh + offs_t.to(tl.int64)[:, None] * stride_kt + offs_d[None, :],
                mask=(offs_t < length)[:, None], other=0)                                     # [BLOCK_T, D]
    for start in range(0, W * G, BLOCK_R):
        offs_r = start + tl.arange(0, BLOCK_R)
        q = load_queries(q_ptr + b * stride_qb + kv * G * stride_qh, offs_r, stride_qw, stride_qh, G, W, D)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale                       # [BLOCK_R, BLOCK_T]
        seen = offs_t[None, :] <= (length - W + offs_r // G)[:, None]
        logits = tl.where(seen, logits, float("-inf"))
        peak = tl.max(logits, axis=1)
        none = peak == float("-inf")
        peak = tl.where(none, 0, peak)
        total = tl.sum(tl.exp2(logits - peak[:, None]), axis=1)
        lse = tl.where(none, float("-inf"), peak + tl.log2(tl.where(none, 1, total)))
        tl.store(lse_ptr + ((b * KV + kv) * tiles + tile) * W * G + offs_r, lse, mask=offs_r < W * G)


@triton.jit
def snapkv_combine_kernel(
    part_ptr, lse_ptr, tiles, R: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK: tl.constexpr,
):
    """
    The tiles of snapkv_lse_kernel put together; +inf for a query without keys, so that it gives none any weight.

        lse[r] = log2 sum_tile exp2(part[tile, r])
    grid   (B * KV, cdiv(R, BLOCK_R)), R = W * G queries
    tile   part [BLOCK, BLOCK_R], BLOCK tiles at a time
    bytes  4 * R / BLOCK_T per key: a small part of what the keys are
    """
    pair = tl.program_id(0).to(tl.int64)
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    peak = tl.full((BLOCK, BLOCK_R), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK, BLOCK_R), tl.float32)
    for start in range(0, tiles, BLOCK):
        offs_n = start + tl.arange(0, BLOCK)
        part = tl.load(part_ptr + (pair * tiles + offs_n)[:, None] * R + offs_r[None, :],
                       mask=(offs_n < tiles)[:, None] & (offs_r < R)[None, :], other=float("-inf"))
        highest = tl.maximum(peak, part)
        base = tl.where(highest == float("-inf"), 0, highest)
        total = total * tl.exp2(peak - base) + tl.exp2(part - base)
        peak = highest
    highest = tl.max(peak, axis=0)                                                            # [BLOCK_R]
    none = highest == float("-inf")
    base = tl.where(none, 0, highest)
    total = tl.sum(total * tl.exp2(peak - base[None, :]), axis=0)
    lse = tl.where(none, float("inf"), base + tl.log2(tl.where(none, 1, total)))
    tl.store(lse_ptr + pair * R + offs_r, lse, mask=offs_r < R)


@triton.jit
def snapkv_mean_kernel(
    q_ptr, k_ptr, lengths_ptr, lse_ptr, mean_ptr, Tk, scale,
    stride_qb, stride_qw, stride_qh, stride_kb, stride_kt, stride_kh,
    G: tl.constexpr, W: tl.constexpr, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr,
):
    """
    Second pass over the keys: how much the window's queries attend to each key, on average.

        mean[t] = sum_r exp2(scale * q[r] . k[t] - lse[r]) / (W * G)     before the window, t < length - W; else 0
    reference: sparse.SnapKV.score, before the pooling
    grid, tile, bytes and dtype as in snapkv_lse_kernel, but logits [BLOCK_T, BLOCK_R]: here the sum is over queries.
    No mask is needed: all of the window's queries see what lies before it.
    """
    # backwards, as the first pass ended there and part of its keys is still in L2
    tile, b = tl.num_programs(1) - 1 - tl.program_id(1), (tl.num_programs(2) - 1 - tl.program_id(2)).to(tl.int64)
    kv, KV = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    before = tl.minimum(tl.load(lengths_ptr + b), Tk) - W
    offs_t, offs_d = tile * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, D)
    k = tl.load(k_ptr + b * stride_kb + kv * stride_kh + offs_t.to(tl.int64)[:, None] * stride_kt + offs_d[None, :],
                mask=(offs_t < before)[:, None], other=0)                                     # [BLOCK_T, D]
    total = tl.zeros((BLOCK_T,), tl.float32)
    for start in range(0, W * G, BLOCK_R):
        offs_r = start + tl.arange(0, BLOCK_R)
        q = load_queries(q_ptr + b * stride_qb + kv * G * stride_qh, offs_r, stride_qw, stride_qh, G, W, D)
        lse = tl.load(lse_ptr + (b * KV + kv) * W * G + offs_r, mask=offs_r < W * G, other=float("inf"))
        logits = tl.dot(k, tl.trans(q), input_precision="ieee") * scale                       # [BLOCK_T, BLOCK_R]
        total += tl.sum(tl.exp2(logits - lse[None, :]), axis=1)
    mean = tl.where(offs_t < before, total / (W * G), 0)
    tl.store(mean_ptr + (b * KV + kv) * Tk + offs_t, mean, mask=offs_t < Tk)


@triton.jit
def snapkv_pool_kernel(
    mean_ptr, lengths_ptr, scores_ptr, Tk, KV, W: tl.constexpr, kernel: tl.constexpr, BLOCK_T: tl.constexpr,
):
    """
    The mean over `kernel` neighbours, then the slots that are not up for choice.

        score[t] = sum_{|i| <= kernel // 2} mean[t + i] / kernel,  0 past the ends;  +inf in the window, -inf behind it
    reference: sparse.SnapKV.score, last line, and the forced slots of sparse.SnapKV.compress
    grid   (cdiv(Tk, BLOCK_T), B * KV)
    bytes  8 * Tk per KV head: the neighbours come from L1
    """
    pair = tl.program_id(1).to(tl.int64)
    length = tl.load(lengths_ptr + pair // KV)
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    total = tl.zeros((BLOCK_T,), tl.float32)
    for i in tl.static_range(kernel):
        slot = offs_t + (i - kernel // 2)
        total += tl.load(mean_ptr + pair * Tk + slot, mask=(slot >= 0) & (slot < Tk), other=0)
    scores = tl.where(offs_t >= length - W, float("inf"), total / kernel)
    scores = tl.where(offs_t >= length, float("-inf"), scores)
    tl.store(scores_ptr + pair * Tk + offs_t, scores, mask=offs_t < Tk)


@torch.library.custom_op("nanorat::snapkv_scores", mutates_args=())
def snapkv_scores(
    q: Tensor,        # (B, W, H, D)    the last W queries of each row's prompt, the very last at the end
    k: Tensor,        # (B, Tk, KV, D)
    lengths: Tensor,  # (B,)            tokens in each row's prompt, int64
    kernel: int,      # odd
) -> Tensor:          # (B, KV, Tk)     fp32; +inf in the window, -inf behind it: select(scores, budget) is compress
    B, Tk, KV, D = k.shape
    W, H = q.shape[1:3]
    check_heads(H, KV, D)
    check_tensors(q, k)
    assert kernel % 2 == 1, f"{kernel=} must be odd"
    G = H // KV
    R = W * G
    shrink = q.element_size() // 2  # fp32 has no tensor cores: half the tile and twice the threads, or registers spill
    BLOCK_T = SNAPKV["BLOCK_T"] // shrink
    BLOCK_R = max(16, min(triton.next_power_of_2(R), SNAPKV["BLOCK_R"] // shrink))
    tiles = triton.cdiv(Tk, BLOCK_T)
    fp32 = lambda *shape: q.new_empty(shape, dtype=torch.float32)
    part, lse, mean, scores = fp32(B, KV, tiles, R), fp32(B, KV, R), fp32(B, KV, Tk), fp32(B, KV, Tk)
    strides = *q.stride()[:3], *k.stride()[:3]
    sizes = dict(G=G, W=W, D=D, BLOCK_R=BLOCK_R, BLOCK_T=BLOCK_T, num_warps=SNAPKV["num_warps"] * shrink)
    scale = math.log2(math.e) / math.sqrt(D)
    snapkv_lse_kernel[KV, tiles, B](q, k, lengths, part, Tk, scale, *strides, **sizes)
    snapkv_combine_kernel[B * KV, triton.cdiv(R, 16)](part, lse, tiles, R=R, BLOCK_R=16, BLOCK=64, num_warps=4)
    snapkv_mean_kernel[KV, tiles, B](q, k, lengths, lse, mean, Tk, scale, *strides, **sizes)
    snapkv_pool_kernel[triton.cdiv(Tk, 1024), B * KV](
        mean, lengths, scores, Tk, KV, W=W, kernel=kernel, BLOCK_T=1024, num_warps=4)
    return scores


@snapkv_scores.register_fake
def _(q, k, lengths, kernel):
    B, Tk, KV, _ = k.shape
    return q.new_empty(B, KV, Tk, dtype=torch.float32)
