"""
SnapKV's compression: how much the prompt's last queries attend to each key, once per prompt.

    lse[r]  = log sum_t exp(q[r] . k[t] / sqrt(D))                   a query r of the window, over
                                                                     the keys that it sees
    mean[t] = mean_r exp(q[r] . k[t] / sqrt(D) - lse[r])             over window and group
    score[t] = mean of mean[t - kernel // 2 ... t + kernel // 2]     what is kept: topk.select

The softmax runs over keys and the mean over queries, so the keys are read twice: a first pass finds
the denominators, tile by tile of keys, and a second one the means. Between them there is a number
per query and tile and one per key, where plain PyTorch writes the logits, W * G numbers per key.

reference: sparse.SnapKV (arXiv 2404.14469); tests/test_kernels.py holds `snapkv_scores` to
it. Parts are added in their order, so the same inputs give the same bits. Softmaxes are in base 2:
log2(e) is folded into the logits' scale, as exp2 is one instruction. kernels.py explains how a
kernel is written here.

Letters as in sparse.py: B batch, Tk slots, H query heads, KV key/value heads, G = H // KV, D head
width, W window. R = W * G queries share a KV head; row r is query r // G of head r % G.
"""
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_ops.common import check_heads, check_tensors

SNAPKV = dict(BLOCK_T=128, BLOCK_R=64, num_warps=4)  # keys and queries of a tile


@triton.jit
def load_queries(
    q_ptr, offs_r, stride_qw, stride_qh, G: tl.constexpr, W: tl.constexpr, D: tl.constexpr,
):
    """Rows [BLOCK_R, D] of the W * G queries that share a KV head."""
    where = (offs_r // G).to(tl.int64) * stride_qw + (offs_r % G).to(tl.int64) * stride_qh
    at = q_ptr + where[:, None] + tl.arange(0, D)[None, :]
    return tl.load(at, mask=(offs_r < W * G)[:, None], other=0)


@triton.jit
def snapkv_lse_kernel(
    q_ptr,        # (B, W, H, D)          with strides
    k_ptr,        # (B, Tk, KV, D)        with strides
    lengths_ptr,  # (B,)
    lse_ptr,      # (B, KV, tiles, R)     fp32
    Tk, scale, stride_qb, stride_qw, stride_qh, stride_kb, stride_kt, stride_kh,
    G: tl.constexpr, W: tl.constexpr, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr,
):
    """
    First pass over the keys: what each query's softmax divides by, tile by tile.

        lse[r] = log2 sum_t exp2(scale * q[r] . k[t])
                                over the tile's t <= length - W + r // G, the query's own slot
    reference: sparse.SnapKV.score, the softmax's denominator
    grid   (KV, cdiv(Tk, BLOCK_T), B)
    tile   k [BLOCK_T, D] stays; the W * G queries of its KV head come by, q [BLOCK_R, D]; logits
           [BLOCK_R, BLOCK_T]
    bytes  Tk * D elements per KV head; FLOPs 2 * W * H * Tk * D, less work up to W * G of about 200
    dtype  bf16 or full fp32 products, fp32 softmax (the reference rounds bf16 logits before it)
    """
    kv, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    KV, tiles = tl.num_programs(0), tl.num_programs(1)
    length = tl.minimum(tl.load(lengths_ptr + b), Tk)
    offs_t, offs_d = tile * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, D)
    k_ptr += b * stride_kb + kv * stride_kh
    at_k = offs_t.to(tl.int64)[:, None] * stride_kt + offs_d[None, :]           # [BLOCK_T, D]
    k = tl.load(k_ptr + at_k, mask=(offs_t < length)[:, None], other=0)
    q_ptr += b * stride_qb + kv * G * stride_qh
    lse_ptr += ((b * KV + kv) * tiles + tile) * W * G
    for start in range(0, W * G, BLOCK_R):
        offs_r = start + tl.arange(0, BLOCK_R)
        q = load_queries(q_ptr, offs_r, stride_qw, stride_qh, G, W, D)          # [BLOCK_R, D]
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale         # [BLOCK_R, BLOCK_T]
        seen = offs_t[None, :] <= (length - W + offs_r // G)[:, None]
        logits = tl.where(seen, logits, float("-inf"))
        # a query that sees none of the tile's keys: not -inf - -inf
        peak = tl.max(logits, axis=1)
        none = peak == float("-inf")
        peak = tl.where(none, 0, peak)
        total = tl.sum(tl.exp2(logits - peak[:, None]), axis=1)
        lse = tl.where(none, float("-inf"), peak + tl.log2(tl.where(none, 1, total)))
        tl.store(lse_ptr + offs_r, lse, mask=offs_r < W * G)


@triton.jit
def snapkv_combine_kernel(
    part_ptr,  # (B, KV, tiles, R)  fp32
    lse_ptr,   # (B, KV, R)         fp32
    tiles, R: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK: tl.constexpr,
):
    """
    The tiles of snapkv_lse_kernel put together; +inf for a query without keys, so that it gives
    none of them any weight.

        lse[r] = log2 sum_tile exp2(part[tile, r])
    grid   (B * KV, cdiv(R, BLOCK_R))
    tile   part [BLOCK, BLOCK_R], BLOCK tiles at a time
    bytes  4 * R / BLOCK_T per key: a small part of what the keys are
    dtype  fp32
    """
    pair = tl.program_id(0).to(tl.int64)
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    peak = tl.full((BLOCK, BLOCK_R), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK, BLOCK_R), tl.float32)
    for start in range(0, tiles, BLOCK):
        offs_n = start + tl.arange(0, BLOCK)
        at = part_ptr + (pair * tiles + offs_n)[:, None] * R + offs_r[None, :]
        mask = (offs_n < tiles)[:, None] & (offs_r < R)[None, :]
        part = tl.load(at, mask=mask, other=float("-inf"))                      # [BLOCK, BLOCK_R]
        highest = tl.maximum(peak, part)
        base = tl.where(highest == float("-inf"), 0, highest)
        total = total * tl.exp2(peak - base) + tl.exp2(part - base)
        peak = highest
    highest = tl.max(peak, axis=0)                                              # [BLOCK_R]
    none = highest == float("-inf")
    base = tl.where(none, 0, highest)
    total = tl.sum(total * tl.exp2(peak - base[None, :]), axis=0)
    lse = tl.where(none, float("inf"), base + tl.log2(tl.where(none, 1, total)))
    tl.store(lse_ptr + pair * R + offs_r, lse, mask=offs_r < R)


@triton.jit
def snapkv_mean_kernel(
    q_ptr,        # (B, W, H, D)    with strides
    k_ptr,        # (B, Tk, KV, D)  with strides
    lengths_ptr,  # (B,)
    lse_ptr,      # (B, KV, R)      fp32
    mean_ptr,     # (B, KV, Tk)     fp32
    Tk, scale, stride_qb, stride_qw, stride_qh, stride_kb, stride_kt, stride_kh,
    G: tl.constexpr, W: tl.constexpr, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr,
):
    """
    Second pass over the keys: how much the window's queries attend to each key, on average.

        mean[t] = sum_r exp2(scale * q[r] . k[t] - lse[r]) / (W * G)
                                before the window, t < length - W; else 0
    reference: sparse.SnapKV.score, before the pooling
    grid, tile, bytes and dtype as in snapkv_lse_kernel, but logits [BLOCK_T, BLOCK_R]: here the sum
    is over queries. No mask is needed: all of the window's queries see what lies before it.
    """
    # backwards, as the first pass ended there and part of its keys is still in L2
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    b = (tl.num_programs(2) - 1 - tl.program_id(2)).to(tl.int64)
    kv, KV = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    before = tl.minimum(tl.load(lengths_ptr + b), Tk) - W
    offs_t, offs_d = tile * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, D)
    k_ptr += b * stride_kb + kv * stride_kh
    at_k = offs_t.to(tl.int64)[:, None] * stride_kt + offs_d[None, :]           # [BLOCK_T, D]
    k = tl.load(k_ptr + at_k, mask=(offs_t < before)[:, None], other=0)
    total = tl.zeros((BLOCK_T,), tl.float32)
    q_ptr += b * stride_qb + kv * G * stride_qh
    lse_ptr += (b * KV + kv) * W * G
    for start in range(0, W * G, BLOCK_R):
        offs_r = start + tl.arange(0, BLOCK_R)
        q = load_queries(q_ptr, offs_r, stride_qw, stride_qh, G, W, D)          # [BLOCK_R, D]
        lse = tl.load(lse_ptr + offs_r, mask=offs_r < W * G, other=float("inf"))
        logits = tl.dot(k, tl.trans(q), input_precision="ieee") * scale         # [BLOCK_T, BLOCK_R]
        total += tl.sum(tl.exp2(logits - lse[None, :]), axis=1)
    mean = tl.where(offs_t < before, total / (W * G), 0)
    tl.store(mean_ptr + (b * KV + kv) * Tk + offs_t, mean, mask=offs_t < Tk)


@triton.jit
def snapkv_pool_kernel(
    mean_ptr,     # (B, KV, Tk)  fp32
    lengths_ptr,  # (B,)
    scores_ptr,   # (B, KV, Tk)  fp32
    Tk, KV, W: tl.constexpr, kernel: tl.constexpr, BLOCK_T: tl.constexpr,
):
    """
    The mean over `kernel` neighbours, then the slots that are not up for choice.

        score[t] = sum_{|i| <= kernel // 2} mean[t + i] / kernel,  0 past the ends
                   +inf in the window, -inf behind it
    reference: sparse.SnapKV.score, last line, and sparse.SnapKV.forced
    grid   (cdiv(Tk, BLOCK_T), B * KV)
    tile   scores [BLOCK_T]
    bytes  8 * Tk per KV head: the neighbours come from L1
    dtype  fp32
    """
    pair = tl.program_id(1).to(tl.int64)
    length = tl.load(lengths_ptr + pair // KV)
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    total = tl.zeros((BLOCK_T,), tl.float32)
    for i in tl.static_range(kernel):
        slot = offs_t + (i - kernel // 2)
        inside = (slot >= 0) & (slot < Tk)
        total += tl.load(mean_ptr + pair * Tk + slot, mask=inside, other=0)
    scores = tl.where(offs_t >= length - W, float("inf"), total / kernel)
    scores = tl.where(offs_t >= length, float("-inf"), scores)
    tl.store(scores_ptr + pair * Tk + offs_t, scores, mask=offs_t < Tk)


@torch.library.custom_op("nanorat::snapkv_scores", mutates_args=())
def snapkv_scores(
    q: Tensor,        # (B, W, H, D)    the last W queries of each row's prompt, the last at the end
    k: Tensor,        # (B, Tk, KV, D)
    lengths: Tensor,  # (B,)            tokens in each row's prompt, int64
    kernel: int,      # odd
) -> Tensor:          # (B, KV, Tk)     fp32; +inf in the window, -inf behind it: select(scores,
                      #                 budget) is compress
    B, Tk, KV, D = k.shape
    W, H = q.shape[1:3]
    check_heads(H, KV, D)
    check_tensors(q, k)
    assert kernel % 2 == 1, f"{kernel=} must be odd"
    G = H // KV
    R = W * G
    # fp32 has no tensor cores: half the tile and twice the threads, or registers spill
    shrink = q.element_size() // 2
    BLOCK_T = SNAPKV["BLOCK_T"] // shrink
    BLOCK_R = max(16, min(triton.next_power_of_2(R), SNAPKV["BLOCK_R"] // shrink))
    tiles = triton.cdiv(Tk, BLOCK_T)

    fp32 = lambda *shape: q.new_empty(shape, dtype=torch.float32)
    part, lse = fp32(B, KV, tiles, R), fp32(B, KV, R)
    mean, scores = fp32(B, KV, Tk), fp32(B, KV, Tk)
    strides, scale = (*q.stride()[:3], *k.stride()[:3]), math.log2(math.e) / math.sqrt(D)
    sizes = dict(G=G, W=W, D=D, BLOCK_R=BLOCK_R, BLOCK_T=BLOCK_T,
                 num_warps=SNAPKV["num_warps"] * shrink)
    snapkv_lse_kernel[KV, tiles, B](q, k, lengths, part, Tk, scale, *strides, **sizes)
    snapkv_combine_kernel[B * KV, triton.cdiv(R, 16)](
        part, lse, tiles, R=R, BLOCK_R=16, BLOCK=64, num_warps=4)
    snapkv_mean_kernel[KV, tiles, B](q, k, lengths, lse, mean, Tk, scale, *strides, **sizes)
    snapkv_pool_kernel[triton.cdiv(Tk, 1024), B * KV](
        mean, lengths, scores, Tk, KV, W=W, kernel=kernel, BLOCK_T=1024, num_warps=4)
    return scores


@snapkv_scores.register_fake
def _(q, k, lengths, kernel):
    B, Tk, KV, _ = k.shape
    return q.new_empty(B, KV, Tk, dtype=torch.float32)
