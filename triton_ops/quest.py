"""
Quest's decoding step and SnapKV's compression in Triton: the maths of sparse.py, written for few bytes read.

    Quest   block_bounds once per prompt, then per step: quest_scores -> select -> quest_attend
    SnapKV  snapkv_scores -> select, once per prompt
    dense   attend_slots: quest_attend's kernel without a choice. Decoding of all but Quest and Dilated

`select` is Eq. 3's TopK for both, and takes any scores: the random variants of H2 draw theirs in torch and meet the
kernels there. A list is split as the shapes say and its parts are added in their order, so the same inputs give the same
bits. Each launcher below is a torch custom op, without a wait for the GPU, with a grid from shapes alone:
it can be compiled and captured in a CUDA graph. tests/test_kernels_sparse.py holds each to its reference in sparse.py.

Letters as there: B batch, Tk cache slots, H query heads, KV key/value heads, G = H // KV, D head width, N blocks,
S selected, W window. Tiles: BLOCK_N blocks, BLOCK_T slots, BLOCK_E entries of the list that a query reads.
Softmaxes are in base 2: log2(e) is folded into the logits' scale, exp2 is one instruction.
"""
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import ROOM, log_sum

# Tile sizes, looked up at each launch: a tuning script may change them. A program has 16 to 64 KB of loads in flight,
# and an SM has room for three or more: memory should not wait for arithmetic.
BOUNDS = dict(slots=64, num_warps=4)                                # slots of k per program
SCORES = dict(BLOCK_N=32, num_warps=4)
SELECT = dict(max_kept=32768, keys_per_thread=16, max_warps=32,     # a row of up to max_kept keys stays in registers
              max_scan=4096)                                        # keys per tile when the indices are written
ATTEND = dict(programs=264, BLOCK_E=64, num_warps=4, num_stages=3)  # programs: 2 on each of 132 SMs, by splitting
SNAPKV = dict(BLOCK_T=128, BLOCK_R=64, num_warps=4)


def check_heads(H, KV, D):
    assert H % KV == 0, f"{H=} query heads cannot share {KV=} heads"
    assert 16 <= D <= 128 and D & (D - 1) == 0, f"{D=} must be a power of two from 16 to 128"


def check_tensors(*tensors):
    """Layouts and dtypes that every kernel relies on. Leading dims may have any stride."""
    for x in tensors:
        assert x.dtype in (torch.bfloat16, torch.float32), f"{x.dtype} is neither bfloat16 nor float32"
        assert x.dtype == tensors[0].dtype, f"{x.dtype} beside {tensors[0].dtype}"
        assert x.stride(-1) == 1, f"the last dim of a {tuple(x.shape)} tensor has stride {x.stride(-1)}, not 1"


# ---------------------------------------------------------------- Quest: summaries of the blocks

@triton.jit
def block_bounds_kernel(
    k_ptr, used_ptr, low_ptr, high_ptr, Tk, N, stride_kb, stride_kt, stride_kh,
    block_size: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
):
    """
    rho of Quest: each channel's smallest and largest key of a block.

        low[n, d] = min k[t, d],  high[n, d] = max k[t, d]     over n * block_size <= t < (n + 1) * block_size, t < used
    reference: sparse.Quest.score, first half. A block without entries is 0, as there.
    grid   (KV, cdiv(N, BLOCK_N), B): neighbours read neighbouring heads, whose keys lie side by side
    tile   k [BLOCK_N, CHUNK, D]: whole blocks while they are small, a large one CHUNK slots at a time
    bytes  Tk * D elements per KV head, read once; 2 * N * D written
    dtype  min and max are exact in any
    """
    kv, b = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    KV = tl.num_programs(0)
    used = tl.minimum(tl.load(used_ptr + b), Tk)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, D)
    low = tl.full((BLOCK_N, D), float("inf"), tl.float32)
    high = tl.full((BLOCK_N, D), float("-inf"), tl.float32)
    for start in range(0, block_size, CHUNK):
        offs_s = start + tl.arange(0, CHUNK)
        slot = offs_n[:, None] * block_size + offs_s[None, :]                                 # [BLOCK_N, CHUNK]
        filled = ((offs_s < block_size)[None, :] & (slot < used))[:, :, None]
        where = slot.to(tl.int64)[:, :, None] * stride_kt + offs_d[None, None, :]             # [BLOCK_N, CHUNK, D]
        k = tl.load(k_ptr + b * stride_kb + kv * stride_kh + where, mask=filled, other=0).to(tl.float32)
        low = tl.minimum(low, tl.min(tl.where(filled, k, float("inf")), axis=1))
        high = tl.maximum(high, tl.max(tl.where(filled, k, float("-inf")), axis=1))
    empty = (offs_n * block_size >= used)[:, None]
    where = ((b * N + offs_n) * KV + kv)[:, None] * D + offs_d[None, :]                       # [BLOCK_N, D]
    mask_n = (offs_n < N)[:, None]
    tl.store(low_ptr + where, tl.where(empty, 0, low), mask=mask_n)
    tl.store(high_ptr + where, tl.where(empty, 0, high), mask=mask_n)


@torch.library.custom_op("nanorat::block_bounds", mutates_args=())
def block_bounds(
    k: Tensor,        # (B, Tk, KV, D)  the cache, or a slice of it
    used: Tensor,     # (B,)            slots filled per row, int64
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
        k, used, low, high, Tk, N, *k.stride()[:3],
        block_size=block_size, D=D, BLOCK_N=BLOCK_N, CHUNK=chunk, num_warps=BOUNDS["num_warps"])
    return low, high


@block_bounds.register_fake
def _(k, used, block_size):
    B, Tk, KV, D = k.shape
    N = (Tk + block_size - 1) // block_size
    return k.new_empty(B, N, KV, D), k.new_empty(B, N, KV, D)


# ---------------------------------------------------------------- Quest: scores of the blocks

@triton.jit
def quest_scores_kernel(
    q_ptr, low_ptr, high_ptr, used_ptr, scores_ptr, N, stride_qb, stride_qh, stride_lb, stride_ln, stride_lh,
    G: tl.constexpr, block_size: tl.constexpr, keep_first: tl.constexpr, keep_current: tl.constexpr,
    D: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """
    Quest's score: an upper bound on q . k over each block, averaged over the G query heads of a KV head.

        score[n] = mean_g sum_d max(q[g, d] * low[n, d], q[g, d] * high[n, d])
                 = sum_d above[d] * high[n, d] + below[d] * low[n, d]
    with above = mean_g max(q[g], 0) and below = mean_g min(q[g], 0): the mean comes first, G heads cost as much as one.
    reference: sparse.Quest.score, and the forced blocks of sparse.Quest.decode
    grid   (KV, cdiv(N, BLOCK_N), B): one program scores BLOCK_N blocks
    tile   above, below [D]; low, high [BLOCK_N, D], all loaded at once
    bytes  2 * N * D elements per KV head. Dense decoding reads 2 * Tk * D: block_size times as many
    dtype  fp32 products and scores, so that TopK sees the order that the reference sees
    """
    kv, b = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    KV = tl.num_programs(0)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, D)
    mask_n = offs_n < N
    where = offs_n.to(tl.int64)[:, None] * stride_ln + offs_d[None, :]                        # [BLOCK_N, D]
    where += b * stride_lb + kv * stride_lh
    low = tl.load(low_ptr + where, mask=mask_n[:, None], other=0).to(tl.float32)
    high = tl.load(high_ptr + where, mask=mask_n[:, None], other=0).to(tl.float32)
    above, below = tl.zeros((D,), tl.float32), tl.zeros((D,), tl.float32)
    for g in tl.static_range(G):
        q = tl.load(q_ptr + b * stride_qb + (kv * G + g) * stride_qh + offs_d).to(tl.float32)  # [D]
        above += tl.maximum(q, 0) / G
        below += tl.minimum(q, 0) / G
    scores = tl.sum(above[None, :] * high + below[None, :] * low, axis=1)                     # [BLOCK_N]

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
    q: Tensor,          # (B, 1, H, D)
    low: Tensor,        # (B, N, KV, D)  of block_bounds
    high: Tensor,
    used: Tensor,       # (B,)           int64
    block_size: int,
    keep_first: bool,
    keep_current: bool,
) -> Tensor:            # (B, KV, N)     fp32; +inf: must be selected, -inf: must not
    B, N, KV, D = low.shape
    H = q.shape[2]
    check_heads(H, KV, D)
    check_tensors(q, low, high)
    assert q.shape == (B, 1, H, D), f"q is {tuple(q.shape)}, not {(B, 1, H, D)}"
    assert low.stride() == high.stride(), f"low and high differ in strides: {low.stride()}, {high.stride()}"
    scores = q.new_empty(B, KV, N, dtype=torch.float32)
    G, BLOCK_N = H // KV, SCORES["BLOCK_N"]
    quest_scores_kernel[KV, triton.cdiv(N, BLOCK_N), B](
        q, low, high, used, scores, N, q.stride(0), q.stride(2), *low.stride()[:3],
        G=G, block_size=block_size, keep_first=keep_first, keep_current=keep_current,
        D=D, BLOCK_N=BLOCK_N, num_warps=SCORES["num_warps"])
    return scores


@quest_scores.register_fake
def _(q, low, high, used, block_size, keep_first, keep_current):
    B, N, KV, _ = low.shape
    return q.new_empty(B, KV, N, dtype=torch.float32)


# ---------------------------------------------------------------- Eq. 3's TopK

@triton.jit
def load_keys(scores_ptr, offs, N):
    """Scores as unsigned integers of the same order: 0 for -inf (and past the end), 1 for NaN, equal zeros."""
    x = tl.load(scores_ptr + offs, mask=offs < N, other=float("-inf"))
    bits = tl.where(x == 0, 0.0, x).to(tl.uint32, bitcast=True)
    # a positive float grows with its bits, a negative one falls
    keys = tl.where(bits >> 31 == 0, bits | 0x80000000, bits ^ 0xFFFFFFFF)
    return tl.where(x == float("-inf"), 0, tl.where(x != x, 1, keys)).to(tl.uint32)


@triton.jit
def select_kernel(
    scores_ptr, index_ptr, N, S, KEPT: tl.constexpr, BLOCK: tl.constexpr, SCAN: tl.constexpr,
):
    """
    TopK by the S-th largest score, found bit by bit; no sorting.

        cut   = the largest integer with count(key >= cut) >= S: 32 rounds of one count, fewer if a count is S exactly
        taken = key > cut, and of those equal to cut the first ones, until there are S
    The key of a score is an integer that orders as the score does (load_keys). An index is written at its rank, the
    number of taken ones before it, so the list comes out ascending.
    reference: sparse.top, sorted by index. There, torch leaves open which of equal scores it takes, and takes NaN first
    grid   (rows,)
    tile   KEPT: the row's keys [BLOCK], in registers for all rounds; else tile by tile, from L2 each round. Writing
           takes smaller tiles [SCAN]: a running sum needs more registers
    bytes  4 * N per row, twice if KEPT. What counts is the rounds' latency: a count is a sum over the whole program
    dtype  exact on fp32
    """
    row = tl.program_id(0).to(tl.int64)
    scores_ptr += row * N
    index_ptr += row * S
    offs = tl.arange(0, BLOCK)
    if KEPT:
        kept = load_keys(scores_ptr, offs, N)

    cut = tl.full((), 0, tl.uint32)
    bit = tl.full((), 0x80000000, tl.uint32)
    count = N + S  # those >= cut, once that is less than all
    while (bit > 0) & (count != S):
        if KEPT:
            more = tl.sum((kept >= cut | bit).to(tl.int32))
        else:
            hits = tl.zeros((BLOCK,), tl.int32)
            for start in range(0, N, BLOCK):
                hits += (load_keys(scores_ptr, start + offs, N) >= cut | bit).to(tl.int32)
            more = tl.sum(hits)
        enough = more >= S
        cut = tl.where(enough, cut | bit, cut)
        count = tl.where(enough, more, count)
        bit = bit >> 1
    cut = tl.maximum(cut, 1)  # 0 is not to be selected: fewer than S are

    if KEPT:
        above = tl.sum((kept > cut).to(tl.int32))
    else:
        hits = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, N, BLOCK):
            hits += (load_keys(scores_ptr, start + offs, N) > cut).to(tl.int32)
        above = tl.sum(hits)
    room = S - above  # for scores at the cut

    larger, equal = 0, 0  # in the tiles before
    offs = tl.arange(0, SCAN)
    for start in range(0, N, SCAN):
        keys = load_keys(scores_ptr, start + offs, N)
        # one running sum for two counts: the larger in the low 16 bits, the equal in the high ones
        both = (keys > cut).to(tl.uint32) + ((keys == cut).to(tl.uint32) << 16)
        upto = tl.cumsum(both, axis=0)                                                        # [SCAN], itself included
        larger_upto = larger + (upto & 0xFFFF).to(tl.int32)
        equal_upto = equal + (upto >> 16).to(tl.int32)
        taken = (keys > cut) | ((keys == cut) & (equal_upto <= room))
        tl.store(index_ptr + larger_upto + tl.minimum(equal_upto, room) - 1, start + offs, mask=taken)
        total = tl.sum(both)
        larger += (total & 0xFFFF).to(tl.int32)
        equal += (total >> 16).to(tl.int32)
    found = larger + tl.minimum(equal, room)
    for start in range(0, S, SCAN):
        rank = start + offs
        tl.store(index_ptr + rank, tl.full((SCAN,), -1, tl.int32), mask=(rank >= found) & (rank < S))


@torch.library.custom_op("nanorat::select", mutates_args=())
def select(
    scores: Tensor,  # (..., N)  fp32
    S: int,
) -> Tensor:         # (..., S)  int32: the S best, ascending, -1 at the end where fewer than S are above -inf
    """
    Of equal scores the first ones. NaN is below all numbers, but above -inf: a row of NaNs selects as many entries as
    any other row, and a NaN displaces no forced one.
    """
    N = scores.shape[-1]
    assert scores.dtype == torch.float32, f"scores are {scores.dtype}, not float32"
    assert N > 0 and S > 0, f"cannot select {S=} of {N=}"
    scores = scores.contiguous()
    index = scores.new_empty(*scores.shape[:-1], S, dtype=torch.int32)
    KEPT = N <= SELECT["max_kept"]
    BLOCK = max(32, triton.next_power_of_2(N)) if KEPT else SELECT["max_kept"] // 2
    num_warps = min(max(1, BLOCK // (32 * SELECT["keys_per_thread"])), SELECT["max_warps"])
    select_kernel[scores.numel() // N,](
        scores, index, N, S, KEPT=KEPT, BLOCK=BLOCK, SCAN=min(BLOCK, SELECT["max_scan"]), num_warps=num_warps)
    return index


@select.register_fake
def _(scores, S):
    return scores.new_empty(*scores.shape[:-1], S, dtype=torch.int32)


# ---------------------------------------------------------------- Quest: attention over the chosen blocks; or over all slots

@triton.jit
def attend_kernel(
    q_ptr, k_ptr, v_ptr, chosen_ptr, used_ptr, part_ptr, lse_ptr, slots_ptr, E, scale,
    stride_qb, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    G: tl.constexpr, block_size: tl.constexpr, D: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_E: tl.constexpr,
    STAGES: tl.constexpr,
):
    """
    Eq. 4 for one query: softmax attention over the chosen blocks, split over programs (flash-decoding).

        entry e of the list, 0 <= e < E = S * block_size, is slot chosen[e // block_size] * block_size + e % block_size
        part = softmax(scale * q . k[slots]) . v[slots],  lse = log2 sum exp2(scale * q . k[slots])     of one split
    chosen None: entry e is slot e, and E what the row has filled, so that the size of the cache costs nothing.
    reference: sparse.Quest.decode, last lines; sparse.attend. `slots` is what this kernel read, -1 where it read nothing:
    a block of -1, or a slot that is not filled.
    grid   (KV, splits, B): a program reads an equal part of the entries, for the G query heads of a KV head together
    tile   q [BLOCK_G, D], G padded to the tensor core's 16; k, v [BLOCK_E, D] gathered STAGES tiles ahead
    bytes  2 * E * D elements per KV head: what is to be read, once. FLOPs do not matter
    dtype  bf16 or full fp32 products, fp32 softmax and sums
    """
    kv, split, b = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    KV, splits = tl.num_programs(0), tl.num_programs(1)
    used = tl.load(used_ptr + b)
    offs_g, offs_d = tl.arange(0, BLOCK_G), tl.arange(0, D)
    mask_g = (offs_g < G)[:, None]
    heads = kv * G + offs_g
    q = tl.load(q_ptr + b * stride_qb + heads[:, None] * stride_qh + offs_d[None, :], mask=mask_g, other=0)
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
        k = tl.load(k_ptr + slot[:, None] * stride_kt + offs_d[None, :], mask=keep[:, None], other=0)  # [BLOCK_E, D]
        v = tl.load(v_ptr + slot[:, None] * stride_vt + offs_d[None, :], mask=keep[:, None], other=0)
        if chosen_ptr is not None:
            tl.store(slots_ptr + offs_e, tl.where(keep, slot, -1), mask=mask_e)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale                       # [BLOCK_G, BLOCK_E]
        logits = tl.where(keep[None, :], logits, float("-inf"))
        highest = tl.maximum(peak, tl.max(logits, axis=1) + ROOM)
        base = tl.where(highest == float("-inf"), 0, highest)  # no key so far: not inf - inf
        p = tl.exp2(logits - base[:, None])
        shrink = tl.exp2(peak - base)
        total = total * shrink + tl.sum(p, axis=1)
        y = tl.dot(p.to(v.dtype), v, y * shrink[:, None], input_precision="ieee")
        peak = highest

    none = total == 0
    y = y / tl.where(none, 1, total)[:, None]
    lse = tl.where(none, float("-inf"), log_sum(peak, tl.where(none, 1, total)))
    where = (b * splits + split) * KV * G + heads
    tl.store(part_ptr + where[:, None] * D + offs_d[None, :], y.to(part_ptr.dtype.element_ty), mask=mask_g)
    tl.store(lse_ptr + where, lse, mask=offs_g < G)


@triton.jit
def combine_kernel(
    part_ptr, lse_ptr, y_ptr, splits, D: tl.constexpr, BLOCK_S: tl.constexpr,
):
    """
    The splits of attend_kernel put together: each weighs as much as the softmax gave to its keys.

        y = sum_s w[s] * part[s] / sum_s w[s],  w[s] = exp2(lse[s] - max lse)
    grid   (H, B)
    tile   part [BLOCK_S, D], all splits of a head
    bytes  4 * splits * D per head: small, this is one launch's latency
    """
    h, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    H = tl.num_programs(0)
    offs_s, offs_d = tl.arange(0, BLOCK_S), tl.arange(0, D)
    mask_s = offs_s < splits
    where = (b * splits + offs_s) * H + h
    lse = tl.load(lse_ptr + where, mask=mask_s, other=float("-inf"))
    part = tl.load(part_ptr + where[:, None] * D + offs_d[None, :], mask=mask_s[:, None], other=0)
    highest = tl.max(lse, axis=0)
    w = tl.exp2(lse - tl.where(highest == float("-inf"), 0, highest + ROOM))                  # [BLOCK_S]
    total = tl.sum(w, axis=0)
    y = tl.sum(w[:, None] * part, axis=0) / tl.where(total == 0, 1, total)
    tl.store(y_ptr + (b * H + h) * D + offs_d, y.to(y_ptr.dtype.element_ty))


def attend_entries(q, k, v, chosen, used, block_size, E, slots):
    """attend_kernel and combine_kernel. chosen (B, KV, S) and slots (B, KV, E), or None and None. -> y (B, 1, H, D)"""
    B, _, KV, D = k.shape
    H = q.shape[2]
    check_heads(H, KV, D)
    check_tensors(q, k, v)
    assert q.shape == (B, 1, H, D), f"q is {tuple(q.shape)}, not {(B, 1, H, D)}"
    assert k.shape == v.shape, f"k is {tuple(k.shape)}, v {tuple(v.shape)}"
    shrink = q.element_size() // 2  # fp32 has no tensor cores: half the tile and twice the threads, or registers spill
    BLOCK_E = ATTEND["BLOCK_E"] // shrink
    # a tile of neighbouring slots needs at most one index. Else the indices are a tile too, loaded two stages before k and v
    num_stages = ATTEND["num_stages"] + (0 if chosen is None or block_size % BLOCK_E == 0 else 2)
    tiles = triton.cdiv(E, BLOCK_E)
    splits = triton.cdiv(tiles, triton.cdiv(tiles, max(1, ATTEND["programs"] // (B * KV))))
    y = q.new_empty(B, 1, H, D)
    part = y if splits == 1 else q.new_empty(B, splits, H, D, dtype=torch.float32)  # a single split is the result
    lse = q.new_empty(B, splits, H, dtype=torch.float32)
    attend_kernel[KV, splits, B](
        q, k, v, chosen, used, part, lse, slots, E, math.log2(math.e) / math.sqrt(D),
        q.stride(0), q.stride(2), *k.stride()[:3], *v.stride()[:3],
        G=H // KV, block_size=block_size, D=D, BLOCK_G=max(16, triton.next_power_of_2(H // KV)), BLOCK_E=BLOCK_E,
        STAGES=num_stages, num_warps=ATTEND["num_warps"] * shrink)
    if splits > 1:
        combine_kernel[H, B](part, lse, y, splits, D=D, BLOCK_S=triton.next_power_of_2(splits), num_warps=4)
    return y


@torch.library.custom_op("nanorat::quest_attend", mutates_args=())
def quest_attend(
    q: Tensor,        # (B, 1, H, D)
    k: Tensor,        # (B, Tk, KV, D)
    v: Tensor,
    chosen: Tensor,   # (B, KV, S)      blocks, int32, -1 for none
    used: Tensor,     # (B,)            int64
    block_size: int,
) -> tuple[Tensor, Tensor]:  # y (B, 1, H, D), slots (B, KV, S * block_size) int64, -1 for what was not read
    B, _, KV, _ = k.shape
    S = chosen.shape[2]
    assert chosen.shape == (B, KV, S) and chosen.dtype == torch.int32, f"chosen is {chosen.dtype} {tuple(chosen.shape)}"
    slots = chosen.new_empty(B, KV, S * block_size, dtype=torch.int64)
    return attend_entries(q, k, v, chosen.contiguous(), used, block_size, S * block_size, slots), slots


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


# ---------------------------------------------------------------- SnapKV

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
