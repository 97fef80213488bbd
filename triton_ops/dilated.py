"""
Dilated attention, forward and backward: a pattern that is a formula, so that no index is read.

    key j for query i:  j <= i and (i - j <= local or j < initial or (j + 1) % dilation == 0)

A query's keys come from two sources that share no key, so nothing counts twice:

    band    i - local <= j <= i               neighbouring queries read neighbouring keys: tiles of
                                              consecutive slots. With local = 0 the query's own key
                                              alone: a product of two rows
    shared  j < i - local and (j < initial or (j + 1) % dilation == 0)
                                              the same few slots for all later queries: tiles
                                              gathered with a stride

ARL's training pass (dilation=64, local=0, initial=0) reads 1/64 of the keys and its own: it costs
what it takes to read q, k, v and write y. RAT+'s inference has both. With dilation=None no chunk
ends: StreamingLLM, and with initial=0 the window that official RAT+ trains its baseline with.

    forward_kernel     y and lse              a program per tile of queries; in a decoding step
                                              several, each with its part of the keys
    query_grad_kernel  dq and delta           a program per tile of queries
    key_grad_kernel    dk, dv of the band,    a program per tile of keys; a second launch adds the
                       of the shared keys     shared keys' gradients to the band's

Each query head has tiles of its own, and the G heads of a KV head read its keys again from L2: a
tile of 64 queries of one head then reads 128 keys for a window of 64, where 16 queries of four
heads would read almost as many. Only in a decoding step, which has one query, are the heads of a
group rows of one tile. Row r is query t = r // GP, head r % GP of the group, with GP = G rounded up
to a power of two, at most 16:

    r   0     1     2     3     4     5     6     7
    t   0     0     0     0     1     1     1     1          G = 3, GP = 4
    g   0     1     2     -     0     1     2     -          rows of - are masked

The shared slots in order, entry m -> slot: the first `initial` tokens, then the ends of the chunks
after them.

    dilation 4, initial 2:   slot  0  1  2  3  4  5  6  7  8  9 10 11
                             m     0  1     2           3           4          first_end = 3

A program takes the keys of its queries as one list, tile by tile: shared ones, then the band. In a
long list most tiles are read whole by all of the queries. Those go first, in two loops that need no
masks and step evenly through the slots; what is left follows in a third. Of 64 queries in slots 960
to 1023, with dilation 16, local 256, initial 4 and tiles of 16 keys:

    shared   slots 0 .. 191, the initial ones among them     1 tile
                   207 .. 703, every 16th                    2 tiles, whole
                   719 .. 751, every 16th                    1 tile, not filled
    band           704 .. 767, in some windows               4 tiles
                   768 .. 959, in all windows               12 tiles, whole
                   960 .. 1023, some queries stand here      4 tiles

reference: sparse.Dilated; tests/test_kernels.py holds `dilated` to it, in values and in
gradients. The same inputs give the same bits: nothing is added atomically, and parts are summed in
their order. kernels.py explains how a kernel is written here.

Letters as in sparse.py: B batch, Tq queries, Tk slots (T where both are the same), H query heads,
KV key/value heads, G = H // KV, D head width. A slot is a place in k and v.
"""
from typing import Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_ops.common import LOG2E, ROOM, SHRUNK, early, log_sum
from triton_ops.quest import combine_kernel

# BLOCK_M rows and BLOCK_N keys of a tile. The passes are bound by memory, so tiles are small: two
# to four programs share an SM, and one's loads hide another's arithmetic. Hopper's tensor cores
# want 64 rows in what a product writes.
TILES = {
    # decoding: at most 16 rows
    "step": dict(BLOCK_M=16, BLOCK_N=64, num_warps=4, num_stages=3),
    # a single tile of shared keys; several, or a band
    "forward": dict(BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=1),
    "forward_long": dict(BLOCK_M=64, BLOCK_N=32, num_warps=4, num_stages=3),
    # own keys, which take registers; a band
    "query_grad": dict(BLOCK_M=64, BLOCK_N=32, num_warps=8, num_stages=2, maxnreg=128),
    "query_grad_band": dict(BLOCK_M=64, BLOCK_N=32, num_warps=4, num_stages=3),
    "key_grad": dict(BLOCK_M=32, BLOCK_N=64, num_warps=4, num_stages=3),
    # no tensor cores, so registers are short
    "fp32": dict(BLOCK_M=32, BLOCK_N=32, num_warps=8, num_stages=1),
}
# Two programs for each SM of an H100. In the backward pass fewer tiles of keys than that are split
# among the queries, in a decoding step fewer programs among the keys.
SPLIT_UP_TO = 264
LOWEST = tl.constexpr(-3.4e38)  # the maximum of no scores, but finite


# ---------------------------------------------------------------- the pattern

@triton.jit
def dot(a, b):
    """a @ b, accumulated in fp32; fp32 operands keep all their bits."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def shared_slot(m, initial, first_end, dilation):
    """The slot of shared entry m."""
    return tl.where(m < initial, m, first_end + (m - initial) * dilation)


@triton.jit
def shared_before(slot, initial, first_end, dilation):
    """How many shared entries lie before a slot."""
    return tl.minimum(slot, initial) + tl.maximum(slot - first_end + dilation - 1, 0) // dilation


# ---------------------------------------------------------------- a tile's list of keys

@triton.jit
def list_of(
    first, last, initial, first_end, dilation,
    LOCAL: tl.constexpr, OWN: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """
    What the queries in slots first .. last read, as one list: the shared keys before the last one's
    window, filled up to whole tiles, then the slots of all their windows; with OWN all but their
    own. -> how many entries; the first entry of the windows, and its slot
    """
    shared = shared_before(last - LOCAL, initial, first_end, dilation)
    window = tl.cdiv(tl.maximum(shared, 0), BLOCK_N) * BLOCK_N
    begin = tl.maximum(first - LOCAL, 0)
    if LOCAL > 0:
        return window + last + 1 - OWN - begin, window, begin
    else:
        return shared, window, begin


@triton.jit
def tile_of_list(
    e, i, window, begin, initial, first_end, dilation,
    LOCAL: tl.constexpr, OWN: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """A tile of entries from e on -> their slots, and which of them the queries in slots i read."""
    m = e + tl.arange(0, BLOCK_N)                                               # [BLOCK_N]
    if LOCAL == 0:
        j = shared_slot(m, initial, first_end, dilation)                        # [BLOCK_N]
        keep = j[None, :] < i[:, None]                                          # [BLOCK_M, BLOCK_N]
    else:
        # All of the tile is of one kind: what distinguishes them are scalars, which cost nothing.
        banded = e >= window
        slot = tl.where(banded, begin + e - window, first_end + (e - initial) * dilation)
        j = slot + tl.arange(0, BLOCK_N) * tl.where(banded, 1, dilation)
        j = tl.where(m < tl.where(banded, 0, initial), m, j)
        nearest, more = tl.where(banded, OWN, LOCAL + 1), tl.where(banded, LOCAL - OWN, 2**31 - 1)
        # one comparison for both ends: without its sign, what is negative is the largest
        keep = ((i - nearest)[:, None] - j[None, :]).to(tl.uint32) <= more.to(tl.uint32)
    return j, keep


@triton.jit
def whole_stretches(
    first, last, window, begin, initial, first_end, dilation,
    LOCAL: tl.constexpr, OWN: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """
    Two stretches of the list that each query reads whole, and that step evenly through the slots:
    shared keys behind the initial ones, and slots that lie in all windows.
    -> the first entry of one and its end, those of the other; all between tiles
    """
    far = tl.cdiv(initial, BLOCK_N) * BLOCK_N
    far_to = shared_before(first - LOCAL, initial, first_end, dilation) // BLOCK_N * BLOCK_N
    near, near_to = window, window
    if LOCAL > 0:
        near += tl.cdiv(tl.maximum(last - LOCAL - begin, 0), BLOCK_N) * BLOCK_N
        near_to += (first + 1 - OWN - begin) // BLOCK_N * BLOCK_N
    return far, tl.maximum(far, far_to), near, tl.maximum(near, near_to)


@triton.jit
def walk(
    k_ptr, v_ptr, k_t, v_t,
    j, step,               # [BLOCK_N]  slots of the first tile; from one slot to the next
    BLOCK_N: tl.constexpr,
):
    """Tiles of keys in a row -> where k and v of the first lie, and how far it is to the next."""
    row, tile_step = j.to(tl.int64)[:, None], tl.full((), BLOCK_N, tl.int64) * step
    return k_ptr + row * k_t, v_ptr + row * v_t, tile_step * k_t, tile_step * v_t


@triton.jit
def behind_stretches(e, far, far_to, near, near_to):
    """Number e of the entries outside of the two stretches -> its place in the list."""
    e += tl.where(e >= far, far_to - far, 0)
    return e + tl.where(e >= near, near_to - near, 0)


# ---------------------------------------------------------------- forward

@triton.jit
def online_softmax(
    q,                     # [BLOCK_M, D]
    k_ptr, v_ptr,          # [BLOCK_N, D]  pointers
    mask_j, keep,          # [BLOCK_N], [BLOCK_M, BLOCK_N]  with MASKED alone
    top, total,            # [BLOCK_M]     largest score so far, + ROOM; sum of exp2(score - top)
    y,                     # [BLOCK_M, D]  the same sum over values
    scale,                 # D ** -0.5 * log2(e)
    MASKED: tl.constexpr,
):
    """One more tile of keys."""
    if MASKED:
        k = tl.load(k_ptr, mask=mask_j[:, None], other=0.0)            # [BLOCK_N, D]
        v = tl.load(v_ptr, mask=mask_j[:, None], other=0.0)            # [BLOCK_N, D]
        x = tl.where(keep, dot(q, tl.trans(k)), float("-inf"))         # [BLOCK_M, BLOCK_N]
    else:
        k, v = tl.load(k_ptr), tl.load(v_ptr)
        x = dot(q, tl.trans(k))
    # scaled after the maximum, which a positive scale allows: one multiply-add for each score
    new_top = tl.maximum(top, tl.max(x, 1) * scale + ROOM)  # finite from the start
    p = tl.exp2(x * scale - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    return new_top, total * shrink + tl.sum(p, 1), y * shrink[:, None] + dot(p.to(v.dtype), v)


@triton.jit
def softmax_over_whole(
    q, k_ptr, v_ptr, k_t, v_t,
    j, step, tiles,        # as in walk; how many
    top, total, y, scale, BLOCK_N: tl.constexpr,
):
    """online_softmax over tiles that all queries read whole."""
    k_ptr, v_ptr, k_step, v_step = walk(k_ptr, v_ptr, k_t, v_t, j, step, BLOCK_N)
    for _ in range(tiles):
        top, total, y = online_softmax(q, k_ptr, v_ptr, None, None, top, total, y, scale, False)
        k_ptr += k_step
        v_ptr += v_step
    return top, total, y


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr,  # (B, Tq, H, D), (B, Tk, KV, D) with strides
    start_ptr,            # (B,)            slot of the first query
    y_ptr, lse_ptr,       # (B, splits, Tq, H, D), (B, splits, H, Tq) contiguous
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    Tq, Tk, splits, initial, first_end, dilation, scale,
    KV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr,
    LOCAL: tl.constexpr, OWN: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """
    The shared keys before each query's window, and the band, through one online softmax: first,
    with WHOLE, the stretches that all queries of the tile read, without masks; then what is left.
    With OWN it starts with the query's own key, which the band then leaves out: 1 without a band,
    and in a decoding step, whose window then far with a tile. The splits share out the list of a
    step's keys; quest.combine_kernel puts their results together.

        y = sum_j p_j v_j,  p = softmax(q k^T / sqrt(D)),  lse = log2 sum_j exp(q k_j / sqrt(D))
                                                               reference: sparse.Dilated.prefill
    grid   (cdiv(Tq * GP, BLOCK_M), KV * PARTS, B * splits), PARTS = cdiv(G, GP): neighbouring tiles
           read the same shared keys, which stay in L2
    tile   q [BLOCK_M, D] stays, shared and band keys stream past as [BLOCK_N, D]
    bytes  ARL, a window: q, k, v read, y written once. B8 T4096 H32 D128 bf16: 4 x 268 MB, 0.36 ms
           at 3 TB/s. From L2 a window of 64 reads k and v twice
    dtype  bf16 or fp32 in; scores, softmax and sums in fp32
    """
    H: tl.constexpr = KV * G
    BLOCK_T: tl.constexpr = BLOCK_M // GP
    tile, b_split = tl.program_id(0), tl.program_id(2).to(tl.int64)     # b * splits + split
    b, split = b_split // splits, tl.program_id(2) % splits
    h_kv, g0 = tl.program_id(1).to(tl.int64) // PARTS, tl.program_id(1) % PARTS * GP
    h = h_kv * G + g0                                              # the first of the tile's heads
    t0 = (tile * BLOCK_T).to(tl.int64)
    # [BLOCK_M]  query of each row, from t0 on; its head, from h on
    t, g = tl.arange(0, BLOCK_M) // GP, tl.arange(0, BLOCK_M) % GP
    mask_t = (t < Tq - t0) & (g < G - g0)
    offs_d, offs_n = tl.arange(0, D)[None, :], tl.arange(0, BLOCK_N)
    offs_t, offs_g = t[:, None], g[:, None]
    first = tl.load(start_ptr + b) + t0                                 # slot of the first query
    # [BLOCK_M]  of each query; padding behind the last slot reads what the last one does
    i = tl.minimum(first + t, Tk - 1).to(tl.int32)
    # The last slot that is read. What lies behind it may be anything, and 0 * NaN is NaN.
    last = tl.minimum(first + tl.minimum(BLOCK_T, Tq - t0), Tk).to(tl.int32) - 1
    first = tl.minimum(first.to(tl.int32), last)  # behind it only where all of the tile is padding
    q_ptr += b * q_b + t0 * q_t + h * q_h
    k_ptr += b * k_b + h_kv * k_h + offs_d
    v_ptr += b * v_b + h_kv * v_h + offs_d

    q_at = q_ptr + offs_t * q_t + offs_g * q_h + offs_d
    q = tl.load(q_at, mask=mask_t[:, None], other=0.0)                                # [BLOCK_M, D]
    if OWN:  # the softmax starts with the query's own key, in full fp32; it counts in one split
        own = i.to(tl.int64)[:, None]
        k_own = tl.load(k_ptr + own * k_t, mask=mask_t[:, None], other=0.0)           # [BLOCK_M, D]
        v_own = tl.load(v_ptr + own * v_t, mask=mask_t[:, None], other=0.0)
        top = tl.sum(q.to(tl.float32) * k_own.to(tl.float32), 1) * scale + ROOM       # [BLOCK_M]
        total = tl.zeros((BLOCK_M,), tl.float32) + tl.where(split == 0, SHRUNK, 0.0)
        y = v_own.to(tl.float32) * total[:, None]                                     # [BLOCK_M, D]
    else:
        top = tl.full((BLOCK_M,), LOWEST, tl.float32)
        total, y = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M, D), tl.float32)

    # The shared keys, and the band.
    entries, window, begin = list_of(
        first, last, initial, first_end, dilation, LOCAL, OWN, BLOCK_N)
    if WHOLE:
        far, far_to, near, near_to = whole_stretches(
            first, last, window, begin, initial, first_end, dilation, LOCAL, OWN, BLOCK_N)
        j = shared_slot(far + offs_n, initial, first_end, dilation)                  # [BLOCK_N]
        top, total, y = softmax_over_whole(
            q, k_ptr, v_ptr, k_t, v_t, j, dilation, (far_to - far) // BLOCK_N,
            top, total, y, scale, BLOCK_N)
        j = begin + near - window + offs_n
        top, total, y = softmax_over_whole(
            q, k_ptr, v_ptr, k_t, v_t, j, 1, (near_to - near) // BLOCK_N,
            top, total, y, scale, BLOCK_N)
        entries -= far_to - far + near_to - near
    per_split = tl.cdiv(tl.cdiv(entries, BLOCK_N), splits) * BLOCK_N
    for m in range(split * per_split, tl.minimum((split + 1) * per_split, entries), BLOCK_N):
        e = behind_stretches(m, far, far_to, near, near_to) if WHOLE else m
        j, keep = tile_of_list(
            e, i, window, begin, initial, first_end, dilation, LOCAL, OWN, BLOCK_N)
        row = j.to(tl.int64)[:, None]
        top, total, y = online_softmax(
            q, k_ptr + row * k_t, v_ptr + row * v_t, j <= last, keep, top, total, y, scale, True)

    # a split without a key gives 0, of weight 0
    none = total == 0
    y = y / tl.where(none, 1, total)[:, None]
    lse = tl.where(none, float("-inf"), log_sum(top, tl.where(none, 1, total)))
    y_ptr += ((b_split * Tq + t0) * H + h) * D
    tl.store(y_ptr + (offs_t * H + offs_g) * D + offs_d, y.to(y_ptr.dtype.element_ty),
             mask=mask_t[:, None])
    lse_ptr += (b_split * H + h) * Tq + t0
    tl.store(lse_ptr + g * Tq + t, lse, mask=mask_t)


# ---------------------------------------------------------------- backward

@triton.jit
def query_grad(
    q, dy,                 # [BLOCK_M, D]
    k_ptr, v_ptr,          # [BLOCK_N, D]  pointers
    mask_j, keep,          # [BLOCK_N], [BLOCK_M, BLOCK_N]  with MASKED alone
    lse, delta,            # [BLOCK_M]
    dq,                    # [BLOCK_M, D]  so far
    scale,                 # D ** -0.5
    MASKED: tl.constexpr,
):
    """One more tile of keys."""
    if MASKED:
        k = tl.load(k_ptr, mask=mask_j[:, None], other=0.0)                     # [BLOCK_N, D]
        v = tl.load(v_ptr, mask=mask_j[:, None], other=0.0)                     # [BLOCK_N, D]
    else:
        k, v = tl.load(k_ptr), tl.load(v_ptr)
    s = dot(q, tl.trans(k)) * (scale * LOG2E)                                   # [BLOCK_M, BLOCK_N]
    p = tl.exp2(s - lse[:, None])
    if MASKED:
        p = tl.where(keep, p, 0.0)
    ds = p * (dot(dy, tl.trans(v)) - delta[:, None])
    return dq + dot(ds.to(k.dtype), k)


@triton.jit
def query_grad_over_whole(
    q, dy, k_ptr, v_ptr, k_t, v_t,
    j, step, tiles,        # as in walk; how many
    lse, delta, dq, scale, BLOCK_N: tl.constexpr,
):
    """query_grad over tiles that all queries read whole."""
    k_ptr, v_ptr, k_step, v_step = walk(k_ptr, v_ptr, k_t, v_t, j, step, BLOCK_N)
    for _ in range(tiles):
        dq = query_grad(q, dy, k_ptr, v_ptr, None, None, lse, delta, dq, scale, False)
        k_ptr += k_step
        v_ptr += v_step
    return dq


@triton.jit
def query_grad_kernel(
    q_ptr, k_ptr, v_ptr,     # (B, T, H, D), (B, T, KV, D) with strides
    y_ptr, lse_ptr,          # (B, T, H, D), (B, H, T) contiguous
    dy_ptr,                  # (B, T, H, D) with strides
    dq_ptr, dk_ptr, dv_ptr,  # contiguous
    delta_ptr,               # (B, H, T) contiguous
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, dy_b, dy_t, dy_h,
    T, initial, first_end, dilation, scale,
    KV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, LOCAL: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """
    dq, and delta for key_grad_kernel. Without a band and with G = 1 each query's own key and value
    are in its tile already, so what they gain from it is written here: key_grad_kernel would read
    everything once more.

        delta = dy . y,   ds = p * (dy . v - delta),   dq = sum_j ds_j k_j / sqrt(D)
        dk_own = ds_own q / sqrt(D),   dv_own = p_own dy
                                                   reference: autograd of sparse.Dilated.prefill
    grid   (cdiv(T, BLOCK_M), H, B)
    tile   q, y, dy [BLOCK_M, D] stay; shared and band keys stream past as [BLOCK_N, D], with WHOLE
           as in forward_kernel
    bytes  ARL: q, k, v, y, dy read, dq, dk, dv written once. B8 T4096 H32 D128 bf16: 8 x 268 MB,
           0.71 ms at 3 TB/s. A window: all but dk, dv, 0.54 ms
    dtype  bf16 or fp32 in; p, ds and sums in fp32, ds in the input's dtype for its product with k
    """
    H: tl.constexpr = KV * G
    tile, h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    h_kv, b = h // G, tl.program_id(2).to(tl.int64)
    first = tile * BLOCK_M                                              # first query, and its slot
    t0 = first.to(tl.int64)
    t = tl.arange(0, BLOCK_M)                                           # [BLOCK_M]  from t0 on
    i, mask_t = first + t, t < T - first                                # [BLOCK_M]  slot of each
    last = tl.minimum(first + BLOCK_M, T) - 1
    offs_d, offs_n, offs_t = tl.arange(0, D)[None, :], tl.arange(0, BLOCK_N), t[:, None]
    q_ptr += b * q_b + t0 * q_t + h * q_h
    dy_ptr += b * dy_b + t0 * dy_t + h * dy_h
    k_ptr += b * k_b + h_kv * k_h + offs_d
    v_ptr += b * v_b + h_kv * v_h + offs_d
    first_y = ((b * T + t0) * H + h) * D
    offs_y = offs_t * H * D + offs_d
    first_lse = (b * H + h) * T + t0

    mask = mask_t[:, None]
    q = tl.load(q_ptr + offs_t * q_t + offs_d, mask=mask, other=0.0)                  # [BLOCK_M, D]
    dy = tl.load(dy_ptr + offs_t * dy_t + offs_d, mask=mask, other=0.0)
    if LOCAL == 0:
        k_own = tl.load(k_ptr + t0 * k_t + offs_t * k_t, mask=mask, other=0.0)        # [BLOCK_M, D]
        v_own = tl.load(v_ptr + t0 * v_t + offs_t * v_t, mask=mask, other=0.0)
    y = tl.load(y_ptr + first_y + offs_y, mask=mask, other=0.0)
    lse = tl.load(lse_ptr + first_lse + t, mask=mask_t, other=0.0)                    # [BLOCK_M]
    delta = tl.sum(dy.to(tl.float32) * y.to(tl.float32), 1)                           # [BLOCK_M]

    if LOCAL == 0:  # the query's own key, in full fp32 as in forward_kernel
        p = tl.exp2(tl.sum(q.to(tl.float32) * k_own.to(tl.float32), 1) * (scale * LOG2E) - lse)
        ds = p * (tl.sum(dy.to(tl.float32) * v_own.to(tl.float32), 1) - delta)        # [BLOCK_M]
        if G == 1:
            dv = p[:, None] * dy.to(tl.float32)
            dk = (ds * scale)[:, None] * q.to(tl.float32)
            tl.store(dv_ptr + first_y + offs_y, dv.to(dv_ptr.dtype.element_ty), mask=mask)
            tl.store(dk_ptr + first_y + offs_y, dk.to(dk_ptr.dtype.element_ty), mask=mask)
        dq = ds[:, None] * k_own.to(tl.float32)                                       # [BLOCK_M, D]
    else:
        dq = tl.zeros((BLOCK_M, D), tl.float32)
    tl.store(delta_ptr + first_lse + t, delta, mask=mask_t)

    # The shared keys, and the band.
    entries, window, begin = list_of(
        first, last, initial, first_end, dilation, LOCAL, 0, BLOCK_N)
    if WHOLE:
        far, far_to, near, near_to = whole_stretches(
            first, last, window, begin, initial, first_end, dilation, LOCAL, 0, BLOCK_N)
        j = shared_slot(far + offs_n, initial, first_end, dilation)                  # [BLOCK_N]
        dq = query_grad_over_whole(
            q, dy, k_ptr, v_ptr, k_t, v_t, j, dilation, (far_to - far) // BLOCK_N,
            lse, delta, dq, scale, BLOCK_N)
        j = begin + near - window + offs_n
        dq = query_grad_over_whole(
            q, dy, k_ptr, v_ptr, k_t, v_t, j, 1, (near_to - near) // BLOCK_N,
            lse, delta, dq, scale, BLOCK_N)
        entries -= far_to - far + near_to - near
    for m in range(0, entries, BLOCK_N):
        e = behind_stretches(m, far, far_to, near, near_to) if WHOLE else m
        j, keep = tile_of_list(
            e, i, window, begin, initial, first_end, dilation, LOCAL, 0, BLOCK_N)
        row = j.to(tl.int64)[:, None]
        dq = query_grad(q, dy, k_ptr + row * k_t, v_ptr + row * v_t, j <= last, keep, lse, delta,
                        dq, scale, True)
    tl.store(dq_ptr + first_y + offs_y, (dq * scale).to(dq_ptr.dtype.element_ty), mask=mask)


@triton.jit
def key_grad_kernel(
    q_ptr, k_ptr, v_ptr,  # (B, T, H, D), (B, T, KV, D) with strides
    lse_ptr, delta_ptr,   # (B, H, T) contiguous
    dy_ptr,               # (B, T, H, D) with strides
    dk_ptr, dv_ptr,       # (B, T, KV, D) contiguous; written by BAND, else added to
    part_ptr,             # (2, SPLITS, B, M, KV, D) fp32 contiguous, written instead if SPLITS > 1
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, dy_b, dy_t, dy_h,
    T, M, initial, first_end, dilation, scale, local,
    KV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BAND: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """
    dk and dv of a tile of keys from the queries that read them: the key's own and those within
    `local` (BAND, of any key), or those beyond (of the M shared keys), added to what the kernels
    before it, in stream order, left there.

        dk_j = sum_i ds_ij q_i / sqrt(D),   dv_j = sum_i p_ij dy_i
                                                   reference: autograd of sparse.Dilated.prefill
    grid   (cdiv(M, BLOCK_N) * SPLITS, KV, B); with few keys each program takes 1 / SPLITS of the
           queries, and writes its part
    tile   k, v and their gradients [BLOCK_N, D] stay, q and dy stream past as [BLOCK_M, D], one
           head of the group after the other. Scores are [BLOCK_N, BLOCK_M], so that p and ds need
           not be transposed for their products
    bytes  shared, ARL: q and dy read once. B8 T4096 H32 D128 bf16: 2 x 268 MB, 0.18 ms at 3 TB/s.
           A window: q, k, v, dy read, dk, dv written, 0.54 ms
    dtype  bf16 or fp32 in; sums in fp32, p and ds in the input's dtype for their products
    """
    H: tl.constexpr = KV * G
    split, h_kv = tl.program_id(0) % SPLITS, tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    n = tl.program_id(0) // SPLITS * BLOCK_N
    entry = n + tl.arange(0, BLOCK_N)                                                 # [BLOCK_N]
    # the tile's slots, and the queries that may read one of them
    if BAND:
        j = entry
        begin, end = n, tl.minimum(n + BLOCK_N + local, T)
    else:
        j = shared_slot(entry, initial, first_end, dilation)
        begin, end = shared_slot(n, initial, first_end, dilation) + local + 1, T
    mask_j = entry < M
    offs_d = tl.arange(0, D)[None, :]
    row = j.to(tl.int64)[:, None]
    k_ptr += b * k_b + h_kv * k_h + offs_d
    v_ptr += b * v_b + h_kv * v_h + offs_d
    k = tl.load(k_ptr + row * k_t, mask=mask_j[:, None], other=0.0)                   # [BLOCK_N, D]
    v = tl.load(v_ptr + row * v_t, mask=mask_j[:, None], other=0.0)                   # [BLOCK_N, D]
    dk = tl.zeros((BLOCK_N, D), tl.float32)
    dv = tl.zeros((BLOCK_N, D), tl.float32)

    t = tl.arange(0, BLOCK_M)                                           # [BLOCK_M]  from t0 on
    q_ptr += b * q_b + h_kv * G * q_h + t[:, None] * q_t + offs_d
    dy_ptr += b * dy_b + h_kv * G * dy_h + t[:, None] * dy_t + offs_d
    first_lse = (b * H + h_kv * G) * T
    tiles = tl.cdiv(tl.maximum(end - begin, 0), BLOCK_M) * G
    per_split = tl.cdiv(tiles, SPLITS)
    for tile in range(split * per_split, tl.minimum((split + 1) * per_split, tiles)):
        t0, g = begin + tile // G * BLOCK_M, tile % G
        mask_t = t < end - t0
        at_q, at_dy = t0.to(tl.int64) * q_t + g * q_h, t0.to(tl.int64) * dy_t + g * dy_h
        q = tl.load(q_ptr + at_q, mask=mask_t[:, None], other=0.0)                    # [BLOCK_M, D]
        dy = tl.load(dy_ptr + at_dy, mask=mask_t[:, None], other=0.0)
        at_lse = first_lse + g * T + t0 + t
        lse = tl.load(lse_ptr + at_lse, mask=mask_t, other=0.0)                       # [BLOCK_M]
        delta = tl.load(delta_ptr + at_lse, mask=mask_t, other=0.0)
        distance = (t0 + t)[None, :] - j[:, None]                           # [BLOCK_N, BLOCK_M]
        if BAND:
            keep = (distance >= 0) & (distance <= local) & mask_t[None, :]
        else:
            keep = (distance > local) & mask_t[None, :]
        s = dot(k, tl.trans(q)) * (scale * LOG2E)                           # [BLOCK_N, BLOCK_M]
        p = tl.where(keep, tl.exp2(s - lse[None, :]), 0.0)
        dv += dot(p.to(dy.dtype), dy)
        ds = p * (dot(v, tl.trans(dy)) - delta[None, :])
        dk += dot(ds.to(q.dtype), q)
    dk *= scale

    if SPLITS == 1:
        offs = ((b * T + j) * KV + h_kv)[:, None] * D + offs_d                        # [BLOCK_N, D]
        if not BAND:
            dk += tl.load(dk_ptr + offs, mask=mask_j[:, None], other=0.0).to(tl.float32)
            dv += tl.load(dv_ptr + offs, mask=mask_j[:, None], other=0.0).to(tl.float32)
        tl.store(dk_ptr + offs, dk.to(dk_ptr.dtype.element_ty), mask=mask_j[:, None])
        tl.store(dv_ptr + offs, dv.to(dv_ptr.dtype.element_ty), mask=mask_j[:, None])
    else:
        B = tl.num_programs(2)
        offs = (((split * B + b) * M + entry) * KV + h_kv)[:, None] * D + offs_d
        tl.store(part_ptr + offs, dk, mask=mask_j[:, None])
        tl.store(part_ptr + SPLITS * B * M * KV * D + offs, dv, mask=mask_j[:, None])


# ---------------------------------------------------------------- launchers

def shared_keys(T, dilation, initial):
    """
    (dilation, first_end, M) of T slots: the M shared ones are those < initial, then first_end,
    first_end + dilation, ...
    """
    dilation = min(dilation or T + 1, T + 1)  # none: no chunk is ever complete
    initial = min(initial, T)
    first_end = initial + (dilation - 1 - initial) % dilation
    return dilation, first_end, initial + len(range(first_end, T, dilation))


def heads(q, k):
    """KV, G, D; asserts what the kernels cover."""
    H, D = q.shape[2:]
    KV, G = k.shape[2], H // k.shape[2]
    assert D in (16, 32, 64, 128), f"dilated: heads of {D} channels, not 16, 32, 64 or 128"
    assert G * KV == H, f"dilated: {H} query heads on {KV} KV heads, not a multiple"
    return dict(KV=KV, G=G, D=D)


def tile_of(name, q):
    return TILES["fp32" if q.dtype == torch.float32 else name]


def has_whole(tile, local, ends):
    """
    Whether a tile's queries can all read a whole tile of keys: of their windows, or of the ends of
    chunks, of which the last has no query behind it.
    """
    return max(local - tile["BLOCK_M"], ends - 1) >= tile["BLOCK_N"]


def splits_of(M, local, tile, programs):
    """
    How many programs share the keys of a decoding step of one query: as many as fill the GPU, but
    none with less than two tiles, as putting the parts together costs a launch.
    """
    tiles = triton.cdiv(M, tile["BLOCK_N"]) + triton.cdiv(local, tile["BLOCK_N"])
    each = max(2, triton.cdiv(tiles, max(1, SPLIT_UP_TO // programs)))
    return max(1, triton.cdiv(tiles, each))


def rows(x):
    """
    x with channels side by side in memory, as kernels read them: expanded or transposed ones are
    copied.
    """
    return x if x.stride(-1) == 1 else x.contiguous()


@torch.library.custom_op("nanorat::dilated", mutates_args=())
def dilated_forward(
    q: Tensor,      # (B, Tq, H, D)
    k: Tensor,      # (B, Tk, KV, D)
    v: Tensor,      # (B, Tk, KV, D)
    start: Tensor,  # (B,) int64
    dilation: Optional[int], local: int, initial: int,
) -> tuple[Tensor, Tensor]:  # y (B, Tq, H, D), lse (B, H, Tq) in fp32, to base 2
    B, Tq, H, D = q.shape
    Tk = k.shape[1]
    assert k.shape == v.shape and k.shape[0] == B and start.shape == (B,), \
        f"{k.shape=} {v.shape=} {start.shape=} {B=}"
    assert q.dtype == k.dtype == v.dtype and q.dtype in (torch.bfloat16, torch.float32), \
        f"dilated: all bf16 or all fp32, not {q.dtype}, {k.dtype}, {v.dtype}"
    q, k, v, start = rows(q), rows(k), rows(v), start.contiguous()
    y = torch.empty(B, Tq, H, D, device=q.device, dtype=q.dtype)
    lse = torch.empty(B, H, Tq, device=q.device, dtype=torch.float32)
    dims = heads(q, k)
    dilation, first_end, M = shared_keys(Tk, dilation, initial)
    initial, local = min(initial, Tk), min(local, Tk)

    # In a decoding step the heads of a group are rows of a tile, else each has tiles of its own.
    most = TILES["step"]["BLOCK_M"]
    GP = min(triton.next_power_of_2(dims["G"]), most)
    if Tq * GP <= most:
        name, own = "step", 1
    else:
        few = local == 0 and M <= TILES["forward"]["BLOCK_N"]
        name, own, GP = "forward" if few else "forward_long", int(local == 0), 1
    tile, PARTS = tile_of(name, q), triton.cdiv(dims["G"], GP)
    splits = splits_of(M, local, tile, dims["KV"] * PARTS * B) if Tq == 1 else 1
    part, part_lse = y, lse  # a single split is the result
    if splits > 1:
        part = torch.empty(B, splits, H, D, device=q.device, dtype=torch.float32)
        part_lse = torch.empty(B, splits, H, device=q.device, dtype=torch.float32)
    grid = triton.cdiv(Tq * GP, tile["BLOCK_M"]), dims["KV"] * PARTS, B * splits
    forward_kernel[grid](
        q, k, v, start, part, part_lse, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        Tq, Tk, splits, initial, first_end, dilation, D ** -0.5 * LOG2E.value,
        **dims, GP=GP, PARTS=PARTS, LOCAL=local, OWN=own,
        WHOLE=name != "step" and has_whole(tile, local, M - initial), **tile)
    if splits > 1:
        combine_kernel[H, B](part, part_lse, y, lse, splits, D=D,
                             BLOCK_S=triton.next_power_of_2(splits), num_warps=4, **early(q))
    return y, lse


@dilated_forward.register_fake
def _(q, k, v, start, dilation, local, initial):
    B, Tq, H, D = q.shape
    return q.new_empty(B, Tq, H, D), q.new_empty(B, H, Tq, dtype=torch.float32)


@torch.library.custom_op("nanorat::dilated_backward", mutates_args=())
def dilated_backward(
    q: Tensor,    # (B, T, H, D)
    k: Tensor,    # (B, T, KV, D)
    v: Tensor,    # (B, T, KV, D)
    y: Tensor,    # (B, T, H, D)
    lse: Tensor,  # (B, H, T)
    dy: Tensor,   # (B, T, H, D)
    dilation: Optional[int], local: int, initial: int,
) -> tuple[Tensor, Tensor, Tensor]:  # dq, dk, dv
    B, T, H, D = q.shape
    # with a slot for each query and no more, every start is 0
    assert k.shape[1] == T, \
        f"dilated: gradients need as many keys as queries, not {k.shape[1]} and {T}"
    q, k, v, dy = rows(q), rows(k), rows(v), rows(dy)
    dq, dk, dv = (torch.empty(x.shape, device=x.device, dtype=x.dtype) for x in (q, k, v))
    delta = torch.empty_like(lse)
    dims = heads(q, k)
    strides = *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dy.stride()[:3]
    dilation, first_end, M = shared_keys(T, dilation, initial)
    initial, local = min(initial, T), min(local, T)
    pattern = initial, first_end, dilation, D ** -0.5

    # Without a band it is ARL's pass, whose shared keys are a tile or two: no loops of their own.
    tile = tile_of("query_grad_band" if local > 0 else "query_grad", q)
    grid = triton.cdiv(T, tile["BLOCK_M"]), H, B
    query_grad_kernel[grid](
        q, k, v, y, lse, dy, dq, dk, dv, delta, *strides, T, *pattern,
        **dims, LOCAL=local, WHOLE=local > 0 and has_whole(tile, local, M - initial), **tile)

    tile, no_parts = tile_of("key_grad", q), lse  # a pointer that is not used
    if local > 0 or dims["G"] > 1:  # else query_grad_kernel has written the own keys' gradients
        key_grad_kernel[triton.cdiv(T, tile["BLOCK_N"]), dims["KV"], B](
            q, k, v, lse, delta, dy, dk, dv, no_parts, *strides, T, T, *pattern, local,
            **dims, BAND=True, SPLITS=1, **tile)
    if M > 0:
        tiles = triton.cdiv(M, tile["BLOCK_N"])
        splits = SPLIT_UP_TO // (tiles * dims["KV"] * B)
        splits = max(1, min(splits, triton.cdiv(T, tile["BLOCK_M"]) * dims["G"]))
        part = torch.empty(2, splits, B, M, dims["KV"], D, device=q.device, dtype=torch.float32)
        key_grad_kernel[tiles * splits, dims["KV"], B](
            q, k, v, lse, delta, dy, dk, dv, part, *strides, T, M, *pattern, local,
            **dims, BAND=False, SPLITS=splits, **tile)
        if splits > 1:
            for dx, x in zip((dk, dv), part.sum(1)):  # (B, M, KV, D)
                dx[:, :initial] += x[:, :initial]
                dx[:, first_end::dilation] += x[:, initial:]
    return dq, dk, dv


@dilated_backward.register_fake
def _(q, k, v, y, lse, dy, dilation, local, initial):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def save_for_backward(ctx, inputs, output):
    q, k, v, _, *ctx.pattern = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.mark_non_differentiable(output[1])


def backward(ctx, dy, _):
    return *dilated_backward(*ctx.saved_tensors, dy, *ctx.pattern), None, None, None, None


dilated_forward.register_autograd(backward, setup_context=save_for_backward)


# ---------------------------------------------------------------- the function

def dilated(
    q,         # (B, Tq, H, D)   bf16 or fp32, D a power of two from 16 to 128
    k, v,      # (B, Tk, KV, D)
    start,     # (B,) int64      the slot of each row's first query; gradients need Tq = Tk, hence 0
    dilation,  # int or None     chunk length; None: no chunk ends
    local,     # int             tokens before the query
    initial,   # int             first tokens
):             # -> y (B, Tq, H, D)
    """
    sparse.Dilated(dilation, local, initial).prefill; also a decoding step, with Tq = 1 and
    start = used - 1.
    """
    return dilated_forward(q, k, v, start, dilation, local, initial)[0]
