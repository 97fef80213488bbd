"""
Quest's decoding step: score the blocks of the cache, then attend to the best of them alone.

    low[n, d], high[n, d] = min, max of k[t, d] over block n           block_bounds, once a prompt
    score[n] = sum_d max(q[d] low[n, d], q[d] high[n, d])              quest_scores
    chosen   = the S blocks of the largest scores                      topk.select
    y        = softmax(q K_chosen^T / sqrt(D)) V_chosen                quest_attend

selectors.quest_decode puts the four together. From step to step the fused block keeps the bounds up
to date (decode_step in triton_ops/block.py).

The score bounds q . k over the block from above, so for one head a block that scores low holds no
key of a large product; of G heads it is the mean of their bounds. A step reads the bounds and the
chosen blocks: of a cache of Tk slots in blocks of 64 with a budget of 1/16, Tk / 64 + Tk / 16
entries. `attend_slots` is quest_attend's kernel without a choice: the dense decoding step of all
methods but Quest and Dilated.

The references are in sparse.py, in the class Quest; tests/test_kernels.py holds each kernel
to its own. (Quest, arXiv 2406.10774, says page where we say block.) No launcher waits for the GPU
and each grid follows from shapes alone, so a step can be compiled and captured in a CUDA graph. The
list of entries that a query reads is split as the shapes say and its parts are added in their
order, so the same inputs give the same bits. kernels.py explains how a kernel is written here.

Letters as in sparse.py: B batch, Tk cache slots, H query heads, KV key/value heads, G = H // KV,
D head width, N blocks, S selected. E entries of the list that a query reads.
"""
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_ops.common import ROOM, await_inputs, check_heads, check_tensors, early, log_sum

# Tile sizes, looked up at each launch: a tuning script may change them. A program has 16 to 64 KB
# of loads in flight: memory should not wait for arithmetic.
BOUNDS = dict(slots=256, num_warps=4)                               # slots of k per program
# programs: how many are wanted, two for each of an H100's 132 SMs. early: a kernel of at most so
# many programs is short (common.early), attention only if each has few tiles. Of the scores'
# programs an SM holds 16 at once.
SCORES = dict(BLOCK_N=32, num_warps=4, early=16 * 132)
ATTEND = dict(BLOCK_E=64, num_warps=4, num_stages=3, programs=2 * 132, early=240, few_tiles=5)


# ---------------------------------------------------------------- the blocks' bounds

@triton.jit
def block_bounds_kernel(
    k_ptr,              # (B, Tk, KV, D)  with strides
    used_ptr,           # (B,)
    low_ptr, high_ptr,  # (B, N, KV, D)   contiguous
    Tk, N, stride_kb, stride_kt, stride_kh,
    block_size: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
):
    """
    rho of Quest: each channel's smallest and largest key of a block.

        low[n, d] = min k[t, d],  high[n, d] = max k[t, d]
                                        over n * block_size <= t < (n + 1) * block_size, t < used
    reference: sparse.Quest.score, first half. A block without entries is 0; there it is what its
           first slot holds, and `forced` lets neither be read
    grid   (KV, cdiv(N, BLOCK_N), B): neighbours read neighbouring heads, whose keys lie side by
           side
    tile   k [BLOCK_N, CHUNK, D]: whole blocks while they are small, a large one CHUNK slots at a
           time
    bytes  Tk * D elements per KV head, read once; 2 * N * D written
    dtype  min and max are exact in any
    """
    kv, b = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    KV = tl.num_programs(0)
    used = tl.minimum(tl.load(used_ptr + b), Tk)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, D)
    k_ptr += b * stride_kb + kv * stride_kh
    low = tl.full((BLOCK_N, D), float("inf"), tl.float32)
    high = tl.full((BLOCK_N, D), float("-inf"), tl.float32)
    for start in range(0, block_size, CHUNK):
        offs_s = start + tl.arange(0, CHUNK)
        slot = offs_n[:, None] * block_size + offs_s[None, :]                   # [BLOCK_N, CHUNK]
        # a slot that is not filled, or behind the block, repeats the block's first
        filled = (offs_s < block_size)[None, :] & (slot < used)
        slot = tl.minimum(tl.where(filled, slot, offs_n[:, None] * block_size), Tk - 1)
        at = k_ptr + slot.to(tl.int64)[:, :, None] * stride_kt + offs_d[None, None, :]
        k = tl.load(at).to(tl.float32)                                       # [BLOCK_N, CHUNK, D]
        low = tl.minimum(low, tl.min(k, axis=1))
        high = tl.maximum(high, tl.max(k, axis=1))

    empty = (offs_n * block_size >= used)[:, None]
    where = ((b * N + offs_n) * KV + kv)[:, None] * D + offs_d[None, :]         # [BLOCK_N, D]
    mask_n = (offs_n < N)[:, None]
    tl.store(low_ptr + where, tl.where(empty, 0, low), mask=mask_n)
    tl.store(high_ptr + where, tl.where(empty, 0, high), mask=mask_n)


@torch.library.custom_op("nanorat::block_bounds", mutates_args=())
def block_bounds(
    k: Tensor,     # (B, Tk, KV, D)  the cache, or a slice of it
    used: Tensor,  # (B,)            slots filled per row, int64
    block_size: int,
) -> tuple[Tensor, Tensor]:  # low, high (B, N, KV, D)
    B, Tk, KV, D = k.shape
    check_heads(KV, KV, D)
    check_tensors(k)
    N = triton.cdiv(Tk, block_size)
    low, high = k.new_empty(B, N, KV, D), k.new_empty(B, N, KV, D)
    chunk = min(triton.next_power_of_2(block_size), BOUNDS["slots"])
    BLOCK_N = BOUNDS["slots"] // chunk
    block_bounds_kernel[KV, triton.cdiv(N, BLOCK_N), B](
        k, used, low, high, Tk, N, *k.stride()[:3], block_size=block_size, D=D, BLOCK_N=BLOCK_N,
        CHUNK=chunk, num_warps=BOUNDS["num_warps"])
    return low, high


@block_bounds.register_fake
def _(k, used, block_size):
    B, Tk, KV, D = k.shape
    N = (Tk + block_size - 1) // block_size
    return k.new_empty(B, N, KV, D), k.new_empty(B, N, KV, D)


# ---------------------------------------------------------------- the blocks' scores

@triton.jit
def quest_scores_kernel(
    q_ptr,              # (B, 1, H, D)   with strides
    low_ptr, high_ptr,  # (B, N, KV, D)  with strides, the same in both
    used_ptr,           # (B,)
    scores_ptr,         # (B, KV, N)     fp32
    N, stride_qb, stride_qh, stride_lb, stride_ln, stride_lh,
    G: tl.constexpr, block_size: tl.constexpr, keep_first: tl.constexpr, keep_current: tl.constexpr,
    D: tl.constexpr, BLOCK_N: tl.constexpr, EARLY: tl.constexpr,
):
    """
    Quest's score: an upper bound on q . k over each block, averaged over a KV head's G query heads.

        score[n] = mean_g sum_d max(q[g, d] * low[n, d], q[g, d] * high[n, d])
                 = sum_d above[d] * high[n, d] + below[d] * low[n, d]
    with above = mean_g max(q[g], 0) and below = mean_g min(q[g], 0): the mean comes first, so G
    heads cost as much as one.
    reference: sparse.Quest.score, and the forced blocks of sparse.Quest.forced
    grid   (KV, cdiv(N, BLOCK_N), B): one program scores BLOCK_N blocks
    tile   above, below [D]; low, high [BLOCK_N, D], all loaded at once
    bytes  2 * N * D elements per KV head. Dense decoding reads 2 * Tk * D: block_size times as many
    dtype  fp32 products and scores: TopK sees the reference's order but for ties to rounding
    """
    kv, b = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    KV = tl.num_programs(0)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, D)
    mask_n = offs_n < N
    where = offs_n.to(tl.int64)[:, None] * stride_ln + offs_d[None, :]          # [BLOCK_N, D]
    where += b * stride_lb + kv * stride_lh
    await_inputs(EARLY)
    low = tl.load(low_ptr + where, mask=mask_n[:, None], other=0).to(tl.float32)
    high = tl.load(high_ptr + where, mask=mask_n[:, None], other=0).to(tl.float32)
    above, below = tl.zeros((D,), tl.float32), tl.zeros((D,), tl.float32)
    for g in tl.static_range(G):
        at = q_ptr + b * stride_qb + (kv * G + g) * stride_qh + offs_d
        q = tl.load(at).to(tl.float32)                                          # [D]
        above += tl.maximum(q, 0) / G
        below += tl.minimum(q, 0) / G
    scores = tl.sum(above[None, :] * high + below[None, :] * low, axis=1)       # [BLOCK_N]

    # No block behind the current one; then the forced ones, which may be the same.
    used = tl.load(used_ptr + b)
    current = tl.where(used > 0, (used - 1) // block_size, -1)
    scores = tl.where(offs_n > current, float("-inf"), scores)
    if keep_first:
        scores = tl.where(offs_n == 0, float("inf"), scores)
    if keep_current:
        scores = tl.where(offs_n == current, float("inf"), scores)
    tl.store(scores_ptr + (b * KV + kv) * N + offs_n, scores, mask=mask_n)


@torch.library.custom_op("nanorat::quest_scores", mutates_args=())
def quest_scores(
    q: Tensor,     # (B, 1, H, D)
    low: Tensor,   # (B, N, KV, D)  of block_bounds
    high: Tensor,
    used: Tensor,  # (B,)           int64
    block_size: int,
    keep_first: bool,
    keep_current: bool,
) -> Tensor:       # (B, KV, N)     fp32; +inf: must be selected, -inf: must not
    B, N, KV, D = low.shape
    H = q.shape[2]
    check_heads(H, KV, D)
    check_tensors(q, low, high)
    assert q.shape == (B, 1, H, D), f"q is {tuple(q.shape)}, not {(B, 1, H, D)}"
    assert low.stride() == high.stride(), \
        f"low and high differ in strides: {low.stride()}, {high.stride()}"
    scores = q.new_empty(B, KV, N, dtype=torch.float32)
    G, BLOCK_N = H // KV, SCORES["BLOCK_N"]
    grid = KV, triton.cdiv(N, BLOCK_N), B
    quest_scores_kernel[grid](
        q, low, high, used, scores, N, q.stride(0), q.stride(2), *low.stride()[:3],
        G=G, block_size=block_size, keep_first=keep_first, keep_current=keep_current,
        D=D, BLOCK_N=BLOCK_N, num_warps=SCORES["num_warps"],
        **early(q, math.prod(grid) <= SCORES["early"]))
    return scores


@quest_scores.register_fake
def _(q, low, high, used, block_size, keep_first, keep_current):
    B, N, KV, _ = low.shape
    return q.new_empty(B, KV, N, dtype=torch.float32)


# ---------------------------------------------------------------- attention: chosen blocks, or all

@triton.jit
def attend_kernel(
    q_ptr,         # (B, 1, H, D)       with strides
    k_ptr, v_ptr,  # (B, Tk, KV, D)     with strides
    chosen_ptr,    # (B, KV, S)         or None: all slots
    used_ptr,      # (B,)
    part_ptr,      # (B, splits, H, D)
    lse_ptr,       # (B, splits, H)     fp32
    slots_ptr,     # (B, KV, E)         int64; None where chosen is None
    E, scale,
    stride_qb, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    G: tl.constexpr, block_size: tl.constexpr, D: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_E: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
):
    """
    Eq. 4 for one query: softmax attention over the chosen blocks, split over programs
    (flash-decoding).

        entry e of the list, 0 <= e < E = S * block_size, is slot
                                chosen[e // block_size] * block_size + e % block_size
        part = softmax(q . k[slots] / sqrt(D)) . v[slots]               of one split
        lse  = log2 sum exp2(scale * q . k[slots])                      scale = log2(e) / sqrt(D)
    chosen None: entry e is slot e, and E what the row has filled, so that the size of the cache
    costs nothing. `slots` is what this kernel read, -1 where it read nothing: in a block of -1, or
    in a slot that is not filled.
    reference: sparse.attend_to_slots; sparse.attend
    grid   (KV, splits, B): a program reads an equal part of the entries, for the G query heads of a
           KV head together
    tile   q [BLOCK_G, D], G padded to the tensor core's 16; k, v [BLOCK_E, D] gathered STAGES tiles
           ahead
    bytes  2 * E * D elements per KV head: what is to be read, once. FLOPs do not matter
    dtype  bf16 or full fp32 products, fp32 softmax and sums
    """
    kv, split, b = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    KV, splits = tl.num_programs(0), tl.num_programs(1)
    await_inputs(EARLY)
    used = tl.load(used_ptr + b)
    offs_g, offs_d = tl.arange(0, BLOCK_G), tl.arange(0, D)
    mask_g = (offs_g < G)[:, None]
    heads = kv * G + offs_g
    at = q_ptr + b * stride_qb + heads[:, None] * stride_qh + offs_d[None, :]
    q = tl.load(at, mask=mask_g, other=0)                                       # [BLOCK_G, D]
    k_ptr += b * stride_kb + kv * stride_kh
    v_ptr += b * stride_vb + kv * stride_vh
    if chosen_ptr is None:
        E = tl.minimum(used, E).to(tl.int32)
    else:
        chosen_ptr += (b * KV + kv) * (E // block_size)
        slots_ptr += (b * KV + kv) * E

    peak = tl.full((BLOCK_G,), float("-inf"), tl.float32)  # running maximum of the logits, + ROOM
    total = tl.zeros((BLOCK_G,), tl.float32)               # and sum of exp2(logits - peak)
    y = tl.zeros((BLOCK_G, D), tl.float32)
    per_split = tl.cdiv(tl.cdiv(E, BLOCK_E), splits) * BLOCK_E
    first = split * per_split
    for start in tl.range(first, tl.minimum(first + per_split, E), BLOCK_E, num_stages=STAGES):
        # the slots of this tile's entries
        offs_e = start + tl.arange(0, BLOCK_E)
        mask_e = offs_e < E
        if chosen_ptr is None:
            slot = offs_e.to(tl.int64)
        elif block_size % BLOCK_E == 0:  # the tile lies in one block
            block = tl.load(chosen_ptr + start // block_size).to(tl.int64)
            slot = block * block_size + (start % block_size + tl.arange(0, BLOCK_E))
        else:
            block = tl.load(chosen_ptr + offs_e // block_size, mask=mask_e, other=-1).to(tl.int64)
            slot = block * block_size + offs_e % block_size
        keep = (slot >= 0) & (slot < used)  # a block of -1 lies before slot 0
        at_k = slot[:, None] * stride_kt + offs_d[None, :]                      # [BLOCK_E, D]
        at_v = slot[:, None] * stride_vt + offs_d[None, :]
        k = tl.load(k_ptr + at_k, mask=keep[:, None], other=0)
        v = tl.load(v_ptr + at_v, mask=keep[:, None], other=0)
        if chosen_ptr is not None:
            tl.store(slots_ptr + offs_e, tl.where(keep, slot, -1), mask=mask_e)

        # One more tile of an online softmax: the sums so far are of exp2(logit - old peak), and
        # are turned into those of the new peak.
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale         # [BLOCK_G, BLOCK_E]
        logits = tl.where(keep[None, :], logits, float("-inf"))
        highest = tl.maximum(peak, tl.max(logits, axis=1) + ROOM)
        base = tl.where(highest == float("-inf"), 0, highest)  # no key so far: not inf - inf
        p = tl.exp2(logits - base[:, None])
        shrink = tl.exp2(peak - base)
        total = total * shrink + tl.sum(p, axis=1)
        y = tl.dot(p.to(v.dtype), v, y * shrink[:, None], input_precision="ieee")
        peak = highest

    # a split without a key gives 0, of weight 0
    none = total == 0
    y = y / tl.where(none, 1, total)[:, None]
    lse = tl.where(none, float("-inf"), log_sum(peak, tl.where(none, 1, total)))
    where = (b * splits + split) * KV * G + heads
    tl.store(part_ptr + where[:, None] * D + offs_d[None, :], y.to(part_ptr.dtype.element_ty),
             mask=mask_g)
    tl.store(lse_ptr + where, lse, mask=offs_g < G)


@triton.jit
def combine_kernel(
    part_ptr,  # (B, splits, H, D)  fp32
    lse_ptr,   # (B, splits, H)     fp32
    y_ptr,     # (B, 1, H, D)
    all_ptr,   # (B, H, 1)          fp32: lse of all splits; or None
    splits, D: tl.constexpr, BLOCK_S: tl.constexpr, EARLY: tl.constexpr,
):
    """
    The splits of a step put together: each weighs as much as the softmax gave to its keys.

        y = sum_s w[s] * part[s] / sum_s w[s],  w[s] = exp2(lse[s] - max lse)
    grid   (H, B)
    tile   part [BLOCK_S, D], all splits of a head
    bytes  4 * splits * D per head: small, this is one launch's latency
    dtype  fp32
    """
    h, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    H = tl.num_programs(0)
    offs_s, offs_d = tl.arange(0, BLOCK_S), tl.arange(0, D)
    mask_s = offs_s < splits
    where = (b * splits + offs_s) * H + h
    await_inputs(EARLY)
    lse = tl.load(lse_ptr + where, mask=mask_s, other=float("-inf"))
    part_ptr += where[:, None] * D + offs_d[None, :]                            # [BLOCK_S, D]
    part = tl.load(part_ptr, mask=mask_s[:, None], other=0)
    highest = tl.max(lse, axis=0)
    peak = tl.where(highest == float("-inf"), 0, highest + ROOM)
    w = tl.exp2(lse - peak)                                                     # [BLOCK_S]
    total = tl.sum(w, axis=0)
    y = tl.sum(w[:, None] * part, axis=0) / tl.where(total == 0, 1, total)
    tl.store(y_ptr + (b * H + h) * D + offs_d, y.to(y_ptr.dtype.element_ty))
    if all_ptr is not None:
        tl.store(all_ptr + b * H + h, log_sum(peak, total))


def attend_entries(
    q,           # (B, 1, H, D)
    k, v,        # (B, Tk, KV, D)
    chosen,      # (B, KV, S)  int32, or None
    used,        # (B,)
    block_size,
    E,           # entries of the list
    slots,       # (B, KV, E)  int64, written; None where chosen is None
):               # -> y (B, 1, H, D)
    """attend_kernel and, where the entries are split, combine_kernel."""
    B, _, KV, D = k.shape
    H = q.shape[2]
    check_heads(H, KV, D)
    check_tensors(q, k, v)
    assert q.shape == (B, 1, H, D), f"q is {tuple(q.shape)}, not {(B, 1, H, D)}"
    assert k.shape == v.shape, f"k is {tuple(k.shape)}, v {tuple(v.shape)}"
    # Exact fp32 products (ieee) are not for tensor cores: half the tile and twice the threads, or
    # registers spill.
    wide = q.element_size() // 2  # 1 for bf16, 2 for fp32
    BLOCK_E = ATTEND["BLOCK_E"] // wide
    # A tile of neighbouring slots needs at most one index. Else the indices are a tile too, loaded
    # two stages before k and v.
    num_stages = ATTEND["num_stages"]
    if chosen is not None and block_size % BLOCK_E != 0:
        num_stages += 2
    # as many splits as fill the GPU, but none without a tile
    tiles = triton.cdiv(E, BLOCK_E)
    of_program = triton.cdiv(tiles, max(1, ATTEND["programs"] // (B * KV)))
    splits = triton.cdiv(tiles, of_program)
    short = B * KV * splits <= ATTEND["early"] and of_program <= ATTEND["few_tiles"]

    y = q.new_empty(B, 1, H, D)
    # a single split is the result
    part = y if splits == 1 else q.new_empty(B, splits, H, D, dtype=torch.float32)
    lse = q.new_empty(B, splits, H, dtype=torch.float32)
    attend_kernel[KV, splits, B](
        q, k, v, chosen, used, part, lse, slots, E, math.log2(math.e) / math.sqrt(D),
        q.stride(0), q.stride(2), *k.stride()[:3], *v.stride()[:3],
        G=H // KV, block_size=block_size, D=D, BLOCK_G=max(16, triton.next_power_of_2(H // KV)),
        BLOCK_E=BLOCK_E, STAGES=num_stages, num_warps=ATTEND["num_warps"] * wide,
        **early(q, short))
    if splits > 1:
        combine_kernel[H, B](
            part, lse, y, None, splits, D=D, BLOCK_S=triton.next_power_of_2(splits), num_warps=4,
            **early(q))
    return y


@torch.library.custom_op("nanorat::quest_attend", mutates_args=())
def quest_attend(
    q: Tensor,       # (B, 1, H, D)
    k: Tensor,       # (B, Tk, KV, D)
    v: Tensor,
    chosen: Tensor,  # (B, KV, S)      blocks, int32, -1 for none
    used: Tensor,    # (B,)            int64
    block_size: int,
) -> tuple[Tensor, Tensor]:  # y (B, 1, H, D), and slots (B, KV, S * block_size) int64, -1 for
                             # what was not read
    B, _, KV, _ = k.shape
    S = chosen.shape[2]
    assert chosen.shape == (B, KV, S) and chosen.dtype == torch.int32, \
        f"chosen is {chosen.dtype} {tuple(chosen.shape)}"
    E = S * block_size
    slots = chosen.new_empty(B, KV, E, dtype=torch.int64)
    return attend_entries(q, k, v, chosen.contiguous(), used, block_size, E, slots), slots


@quest_attend.register_fake
def _(q, k, v, chosen, used, block_size):
    B, KV, S = chosen.shape
    return q.new_empty(q.shape), chosen.new_empty(B, KV, S * block_size, dtype=torch.int64)


@torch.library.custom_op("nanorat::attend_slots", mutates_args=())
def attend_slots(
    q: Tensor,     # (B, 1, H, D)
    k: Tensor,     # (B, Tk, KV, D)
    v: Tensor,
    used: Tensor,  # (B,)            slots filled per row, int64: those are read
) -> Tensor:       # y (B, 1, H, D)
    return attend_entries(q, k, v, None, used, 1, k.shape[1], None)


@attend_slots.register_fake
def _(q, k, v, used):
    return q.new_empty(q.shape)
