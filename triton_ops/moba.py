"""
MoBA's attention over the blocks that moba_route.py chose, for all queries of a prompt, and its
gradients.

    y = softmax(q K_chosen^T / sqrt(D)) V_chosen         count -> fill -> gather -> merge
    dq, dk, dv                                           count -> fill -> delta, gather_grad, merges

Neighbouring queries choose different blocks, so a tile of queries has no block in common. But one
block has many queries, up to all that follow it. So the attention is key-major:

    count, fill    turn `chosen` about: each block lists the queries that chose it. A list begins at
                   a row of the partial results, and the next one whole tiles of rows later
    gather         a program holds the block's K and V and lets its list stream past, a tile of
                   gathered queries at a time: tensor cores stay full, whatever was chosen
    merge          what a query got from each of its blocks is a partial output with its logsumexp;
                   this kernel, query-major again, adds them up

Gradients go the same way. Nothing is added atomically: the same inputs give the same bits.

reference: sparse.MoBA.attend_to_blocks; tests/test_kernels.py holds `moba_attend` to it, in
values and in gradients. kernels.py explains how a kernel is written here.

Letters as in sparse.py: B batch, Tq queries, Tk slots, H query heads, KV key/value heads,
G = H // KV, D head width, N blocks, S selected. z counts (b, kv); an entry is a pair of a query and
a block that it reads, or nothing, where a list is filled up to a whole tile. `start` (B,) is the
slot of each row's first query; own = slot // block_size. A query past the last slot (padding)
counts as standing in the last slot.
"""
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from triton_ops.common import LOG2E, ROOM, log_sum
from triton_ops.moba_route import check_inputs, popcount

# Tiles for an H100 and an H200. A block of up to 128 keys is one tile: K and V (64 KB at D = 128)
# stay in shared memory while CHUNK tiles of a list pass; two programs share an SM, one multiplies
# while the other takes exponentials. Smaller blocks or heads leave room for three or four programs,
# if they make do with fewer registers. A longer block streams past each tile.
GATHER = dict(BLOCK_M=64, BLOCK_N=128, CHUNK=64, num_warps=4, num_stages=2)
GATHER_SMALL = GATHER | dict(maxnreg=168)    # blocks of up to 64
GATHER_NARROW = GATHER | dict(maxnreg=128)   # heads of up to 64
GATHER_LONG = dict(BLOCK_M=128, BLOCK_N=64, CHUNK=16, num_warps=8, num_stages=3)
GATHER_LONG_NARROW = dict(BLOCK_M=64, BLOCK_N=64, CHUNK=16, num_warps=4, num_stages=2)
MERGE = dict(BLOCK_T=32, BLOCK_S=4, num_warps=4)
GRAD = dict(BLOCK_M=64, BLOCK_N=128, CHUNK=64, num_warps=8, num_stages=3)
GRAD_SMALL = dict(BLOCK_M=64, BLOCK_N=64, CHUNK=64, num_warps=4, num_stages=1)
# queries a program files. More: longer runs in the lists. Up to 2**15 fit the mask's words
LISTS = dict(BLOCK_T=128, num_warps=4)
# ieee products of fp32 run without tensor cores, from registers: small tiles
GATHER_FP32 = dict(BLOCK_M=32, BLOCK_N=32, CHUNK=8, num_warps=4, num_stages=1)
GRAD_FP32 = dict(BLOCK_M=16, BLOCK_N=32, CHUNK=16, num_warps=4, num_stages=1)

# The aim of the buffers of partial results. They are larger only if a single head, or group of
# heads, needs more.
PARTIAL_BYTES = 4 * 2**30


# ---------------------------------------------------------------- the blocks' lists of queries

@triton.jit
def load_chosen(
    chosen_ptr, start_ptr, z, KV, offs_t, offs_s, Tq, Tk, block_size: tl.constexpr, S: tl.constexpr,
):
    """
    A tile of `chosen`, [BLOCK_T, BLOCK_S], and which of it are blocks to read: none that is later
    than the own.
    """
    slot = tl.minimum(tl.load(start_ptr + z // KV) + offs_t, Tk - 1)
    inside = (offs_t < Tq)[:, None] & (offs_s < S)[None, :]
    at = chosen_ptr + (z.to(tl.int64) * Tq + offs_t)[:, None] * S + offs_s[None, :]
    n = tl.load(at, mask=inside, other=-1)
    return n, (n >= 0) & (n <= (slot // block_size)[:, None])


@triton.jit
def moba_count_kernel(
    chosen_ptr,  # (B, KV, Tq, S)  int32
    start_ptr,   # (B,)
    mask_ptr,    # (B * KV, tiles * BLOCK_T / 16, N)  int32
    count_ptr,   # (B * KV, N, tiles)                 int32, zero before
    Tq, Tk, N, KV, block_size: tl.constexpr,
    S: tl.constexpr, S_PAD: tl.constexpr, BLOCK_T: tl.constexpr,
):
    """
    Turns `chosen` about: per block the queries that chose it, as bits, and their number in this
    tile of queries.

        mask[t // 16, n]    bit t % 16: n is among chosen[t];  bits 16 and up: how many earlier t of
                            the tile
        count[n, tile]      how many t of the tile
    Two turns of 32 blocks at a time: a query's choices become one word, bit n % 32; then the word's
    bits become 32 columns, and 16 queries the bits of a column. No atomics: the lists come out
    ascending, the same in every run.
    grid   (cdiv(Tq, BLOCK_T), B * KV)
    tile   chosen [BLOCK_T, S] in registers, mask [BLOCK_T / 16, 32]
    bytes  chosen once, 4 N / 16 a query for the mask. Some 10 instructions a query and block up to
           its own
    dtype  int32
    """
    tile, z = tl.program_id(0), tl.program_id(1)
    offs_t, offs_s = tile * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, S_PAD)
    n, reads = load_chosen(chosen_ptr, start_ptr, z, KV, offs_t, offs_s, Tq, Tk, block_size, S)
    n = tl.where(reads, n, -1)                                                  # [BLOCK_T, S]
    bit = tl.full((BLOCK_T, S_PAD), 1, tl.uint32) << (n & 31).to(tl.uint32)
    ROWS: tl.constexpr = BLOCK_T // 16
    offs_r, offs_i, offs_n = tl.arange(0, ROWS), tl.arange(0, 16), tl.arange(0, 32)
    mask_ptr += (z.to(tl.int64) * tl.cdiv(Tq, BLOCK_T) + tile) * ROWS * N
    count_ptr += z.to(tl.int64) * N * tl.cdiv(Tq, BLOCK_T) + tile
    for first in range(0, tl.max(tl.max(n, axis=1), axis=0) + 1, 32):
        word = tl.sum(tl.where(n >> 5 == first >> 5, bit, 0), axis=1)  # [BLOCK_T], bits are blocks
        # queries of a row stand along axis 0, so that one thread holds all 16 and adds them
        word = tl.trans(tl.reshape(word, (ROWS, 16)))                           # [16, ROWS]
        asks = (word[:, :, None] >> offs_n[None, None, :].to(tl.uint32)) & 1    # [16, ROWS, 32]
        # [ROWS, 32], bits are queries
        row = tl.sum(asks << offs_i[:, None, None].to(tl.uint32), axis=0)
        number = popcount(row)
        upto = tl.cumsum(number, axis=0)
        inside = (first + offs_n < N)[None, :]
        tl.store(mask_ptr + offs_r[:, None] * N + first + offs_n[None, :],
                 row.to(tl.int32) | ((upto - number) << 16), mask=inside)
        tl.store(count_ptr + (first + offs_n).to(tl.int64) * tl.cdiv(Tq, BLOCK_T),
                 tl.sum(number, axis=0), mask=first + offs_n < N)


@triton.jit
def moba_fill_kernel(
    chosen_ptr,  # (B, KV, Tq, S)  int32
    start_ptr,   # (B,)
    mask_ptr,    # (B * KV, tiles * BLOCK_T / 16, N)  of moba_count_kernel
    begin_ptr,   # (B * KV, tiles, N)                 int32
    place_ptr,   # (B * KV, S, Tq)                    int32
    list_ptr,    # (B * KV * rows,)                   int32
    Tq, Tk, N, KV, block_size: tl.constexpr,
    S: tl.constexpr, S_PAD: tl.constexpr, BLOCK_T: tl.constexpr,
):
    """
    Files each (query, block) pair in its block's list, and notes where: list[place[s, t]] = t. With
    moba_count_kernel it is a stable sort of the pairs by block.

        place[s, t] = (begin of the list) + (pairs of the list before), -1 if not filed
    grid   (cdiv(Tq, BLOCK_T), B * KV)
    tile   as in moba_count_kernel; begin[tile, n] is where list n has come to before the tile
    bytes  chosen once, place and the lists once; two words a pair from the cache
    dtype  int32
    """
    tile, z = tl.program_id(0), tl.program_id(1)
    offs_t, offs_s = tile * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, S_PAD)
    n, reads = load_chosen(chosen_ptr, start_ptr, z, KV, offs_t, offs_s, Tq, Tk, block_size, S)
    tiles = tl.cdiv(Tq, BLOCK_T)
    row = tl.arange(0, BLOCK_T) // 16                                           # [BLOCK_T]
    mask_ptr += (z.to(tl.int64) * tiles + tile) * (BLOCK_T // 16) * N
    mask = tl.load(mask_ptr + row[:, None] * N + n, mask=reads, other=0)        # [BLOCK_T, S]
    before = mask & ((1 << offs_t % 16) - 1)[:, None]
    at = begin_ptr + (z.to(tl.int64) * tiles + tile) * N + n
    place = tl.load(at, mask=reads, other=0)
    place += (mask >> 16) + popcount(before.to(tl.uint32))
    tl.store(list_ptr + place, tl.broadcast_to(offs_t[:, None], (BLOCK_T, S_PAD)), mask=reads)
    at = place_ptr + (z.to(tl.int64) * S + offs_s)[None, :] * Tq + offs_t[:, None]
    inside = (offs_t < Tq)[:, None] & (offs_s < S)[None, :]
    tl.store(at, tl.where(reads, place, -1), mask=inside)


class Lists(NamedTuple):
    """
    The blocks' lists of queries, ascending. Those of one (b, kv) take `rows` entries: the lists of
    its blocks one behind the other, each filled up to whole tiles of BLOCK_M, so that a tile of
    partial results is written whole. A list is cut into chunks of up to CHUNK * BLOCK_M.
    """
    queries: Tensor     # (B * KV * rows,)  the entries
    place: Tensor       # (B * KV, S, Tq)   of query t's s-th block among the entries, -1 for none
    begin: Tensor       # (B * KV, N)       of each list among the entries
    length: Tensor      # (B * KV, N)
    chunk_ends: Tensor  # (B * KV, N)       number of chunks up to and with each list
    rows: int
    chunks: int         # at most so many, as a grid must not depend on what was chosen


def file_queries(chosen, start, N, Tk, block_size, tile):
    """chosen (B, KV, Tq, S) -> Lists, int32"""
    (B, KV, Tq, S), device = chosen.shape, chosen.device
    S_PAD, warps, BLOCK_M = triton.next_power_of_2(S), LISTS["num_warps"], tile["BLOCK_M"]
    BLOCK_T = max(16, min(LISTS["BLOCK_T"], 8192 // S_PAD))
    tiles, z = triton.cdiv(Tq, BLOCK_T), B * KV
    sizes = dict(block_size=block_size, S=S, S_PAD=S_PAD, BLOCK_T=BLOCK_T)
    rows = Tq * S + min(N, Tq * S) * (BLOCK_M - 1)
    rows = triton.cdiv(rows, BLOCK_M) * BLOCK_M
    assert z * rows < 2**31, f"{z * rows:,} partial results: their numbers do not fit int32"
    mask = torch.empty(z, tiles * BLOCK_T // 16, N, dtype=torch.int32, device=device)
    count = torch.zeros(z, N, tiles, dtype=torch.int32, device=device)
    moba_count_kernel[tiles, z](
        chosen, start, mask, count, Tq, Tk, N, KV, **sizes, num_warps=warps)

    counted = count.cumsum(2, dtype=torch.int32)
    length = counted[:, :, -1].contiguous()
    whole = (length + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    begin = whole.cumsum(1, dtype=torch.int32) - whole
    begin += rows * torch.arange(z, dtype=torch.int32, device=device)[:, None]
    begins = (begin[:, :, None] + counted - count).transpose(1, 2).contiguous()
    place = torch.empty(z, S, Tq, dtype=torch.int32, device=device)
    queries = torch.empty(z * rows, dtype=torch.int32, device=device)
    moba_fill_kernel[tiles, z](
        chosen, start, mask, begins, place, queries, Tq, Tk, N, KV, **sizes, num_warps=2 * warps)

    chunk_len = tile["CHUNK"] * BLOCK_M
    chunk_ends = ((length + chunk_len - 1) // chunk_len).cumsum(1, dtype=torch.int32)
    chunks = triton.cdiv(Tq * S, chunk_len) + N
    return Lists(queries, place, begin, length, chunk_ends, rows, chunks)


# ---------------------------------------------------------------- forward

@triton.jit
def chunk_of(
    chunk, z, begin_ptr, length_ptr, chunk_end_ptr, N, LENGTH: tl.constexpr, N_PAD: tl.constexpr,
):
    """
    Chunk number `chunk` of the lists of z, of up to LENGTH entries: block n, how far into its list
    the chunk begins, the chunk's first entry, the number of entries. n = N: there is none.
    """
    offs, at = tl.arange(0, N_PAD), z.to(tl.int64) * N
    ends = tl.load(chunk_end_ptr + at + offs, mask=offs < N, other=2**31 - 1)
    n = tl.sum((ends <= chunk).to(tl.int32), axis=0)
    into = (chunk - tl.max(tl.where(ends <= chunk, ends, 0), axis=0)) * LENGTH  # the block's list
    at += tl.minimum(n, N - 1)
    entries = tl.minimum(tl.load(length_ptr + at) - into, LENGTH)
    return n, into, tl.load(begin_ptr + at) + into, entries


@triton.jit
def moba_gather_kernel(
    q_ptr,          # (B, Tq, H, D)        with strides
    k_ptr, v_ptr,   # (B, Tk, KV, D)       with strides
    list_ptr, begin_ptr, length_ptr, chunk_end_ptr,  # of Lists
    start_ptr,      # (B,)
    part_tiles,     # (heads * rows, D)    of this launch, a descriptor by tiles
    lse_ptr,        # (heads * rows,)      fp32
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh,
    Tq, Tk, N, KV, h0, rows, scale_log2, block_size: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
    N_PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
):
    """
    Attention of the queries on a block's list to that block: a normalised partial output and its
    logsumexp each. With moba_merge_kernel it is sparse.attend over the chosen blocks.

        x = q K_n^T log2(e) / sqrt(D),  q = q[list[place]]
        lse[place] = log2 sum exp2(x),  part[place] = exp2(x - lse) V_n
    Partials stand in the order of the lists, so that a tile leaves in one piece, by the engine that
    copies tiles (TMA). The queries' order would make neither kernel's memory accesses better, as
    moba_merge_kernel takes whole rows of D in either.
    grid   (chunks, query heads of this launch): a chunk is up to CHUNK * BLOCK_M entries of a list
    tile   q [BLOCK_M, D] gathered row by row, a tile ahead; K, V [BLOCK_N, D] stay for the whole
           chunk if the block is one tile, else they stream past each q tile. The queries that stand
           in the block itself, which alone need the causal mask, come first in its list
    FLOPs  4 * block_size * D an entry. bytes: q read from L2, part written to HBM
    dtype  bf16 products, fp32 softmax; part in the input's dtype, lse in fp32
    """
    head = h0 + tl.program_id(1)
    b, h = (head // (KV * G)).to(tl.int64), head % (KV * G)
    n, into, first, entries = chunk_of(tl.program_id(0), head // G, begin_ptr, length_ptr,
                                       chunk_end_ptr, N, CHUNK * BLOCK_M, N_PAD)
    if n >= N:  # the grid is for the longest lists there may be
        return
    offs_m, offs_n, offs_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, D)
    begin = n * block_size
    start_in_block = (tl.load(start_ptr + b) - begin).to(tl.int32)
    # Keys of the block, up to the last query's own: what lies behind may be anything, and 0 * NaN
    # is NaN.
    inside = tl.minimum(block_size, tl.minimum(start_in_block + Tq, Tk - begin))
    # entries with a mask: those that stand in the block; all, if its last tile is not full
    n_masked = tl.where(inside % BLOCK_N == 0, block_size - into, entries)
    q_ptr += b * stride_qb + h * stride_qh
    key = (begin.to(tl.int64) + offs_n)[:, None]
    k_ptr += b * stride_kb + (h // G) * stride_kh + key * stride_kt + offs_d
    v_ptr += b * stride_vb + (h // G) * stride_vh + key * stride_vt + offs_d
    list_ptr += first
    row = first + (tl.program_id(1) - head // G) * rows  # of the partial results
    ONE_TILE: tl.constexpr = block_size <= BLOCK_N
    if ONE_TILE:
        k = tl.load(k_ptr, mask=(offs_n < inside)[:, None], other=0)            # [BLOCK_N, D]
        v = tl.load(v_ptr, mask=(offs_n < inside)[:, None], other=0)

    # a tile's list is fetched two tiles ahead, its q one tile; past the end stands the last query
    t = tl.load(list_ptr + tl.minimum(offs_m, entries - 1))                     # [BLOCK_M]
    q = tl.load(q_ptr + (t * stride_qt)[:, None] + offs_d)                      # [BLOCK_M, D]
    next_t = tl.load(list_ptr + tl.minimum(BLOCK_M + offs_m, entries - 1))
    for m in tl.range(0, entries, BLOCK_M, num_stages=1 if ONE_TILE else None):
        next_q = tl.load(q_ptr + (next_t * stride_qt)[:, None] + offs_d)
        newest = tl.minimum(start_in_block + t, inside - 1)                     # [BLOCK_M]  key
        t, following = next_t, m + 2 * BLOCK_M + offs_m
        next_t = tl.load(list_ptr + tl.minimum(following, entries - 1))
        if ONE_TILE:
            x = tl.dot(q, tl.trans(k), input_precision="ieee")                  # [BLOCK_M, BLOCK_N]
            if m < n_masked:
                x = tl.where(offs_n[None, :] <= newest[:, None], x, float("-inf"))
            top = tl.max(x, axis=1) * scale_log2 + ROOM                         # [BLOCK_M]
            p = tl.exp2(x * scale_log2 - top[:, None])
            total = tl.sum(p, axis=1)
            y = tl.dot(p.to(v.dtype), v, input_precision="ieee")                # [BLOCK_M, D]
        else:
            top = tl.full((BLOCK_M,), -1e30, tl.float32)
            total = tl.zeros((BLOCK_M,), tl.float32)
            y = tl.zeros((BLOCK_M, D), tl.float32)
            for j in range(0, inside, BLOCK_N):
                mask_n = (j + offs_n < inside)[:, None]
                k = tl.load(k_ptr + j * stride_kt, mask=mask_n, other=0)        # [BLOCK_N, D]
                v = tl.load(v_ptr + j * stride_vt, mask=mask_n, other=0)
                x = tl.dot(q, tl.trans(k), input_precision="ieee")              # [BLOCK_M, BLOCK_N]
                if m < n_masked:
                    x = tl.where(j + offs_n[None, :] <= newest[:, None], x, float("-inf"))
                higher = tl.maximum(top, tl.max(x, axis=1) * scale_log2 + ROOM)
                p = tl.exp2(x * scale_log2 - higher[:, None])
                shrink = tl.exp2(top - higher)
                total = total * shrink + tl.sum(p, axis=1)
                y = tl.dot(p.to(v.dtype), v, y * shrink[:, None], input_precision="ieee")
                top = higher
        y = y * (1 / total)[:, None]                                            # [BLOCK_M, D]
        part_tiles.store([row + m, 0], y.to(part_tiles.dtype))
        tl.store(lse_ptr + row + m + offs_m, log_sum(top, total))
        q = next_q


@triton.jit
def moba_merge_kernel(
    part_ptr,   # (heads, TILES, rows, D)  of this launch
    lse_ptr,    # (heads, rows)            fp32; or None: a plain sum
    place_ptr,  # (B * KV, S, Tq)          of Lists
    y_ptr,      # (B, Tq, H, D)
    y_lse_ptr,  # (B, H, Tq)               fp32, or None
    Tq, KV, h0, rows, G: tl.constexpr, D: tl.constexpr, S: tl.constexpr, S_PAD: tl.constexpr,
    TILES: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):
    """
    Collects what a query got from each of its blocks.

        y = sum_s w[s] part[place[s]],  w[s] = exp2(lse[place[s]] - y_lse)
        y_lse = log2 sum_s exp2(lse[place[s]])
    Without lse it is a plain sum (w = 1), of dq: then from each of the TILES that a block's keys
    are cut into.
    grid   (cdiv(Tq, BLOCK_T), query heads of this launch)
    tile   y [BLOCK_T, D]; part [BLOCK_S * BLOCK_T, D] streams past, once y_lse is known
    bytes  the parts once: S * D elements a query and head
    dtype  fp32 sums
    """
    head = h0 + tl.program_id(1)
    b, h, z = (head // (KV * G)).to(tl.int64), head % (KV * G), head // G
    offs_t, offs_d = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, D)
    mask_t = offs_t < Tq
    place_ptr += z.to(tl.int64) * S * Tq
    # places count from the first list of all (b, kv), partial results from this launch's first
    part_ptr += (tl.program_id(1).to(tl.int64) * TILES - z) * rows * D
    # BLOCK_S columns at a time, one below the other: a thread finds a query's rows among its own
    offs = tl.arange(0, BLOCK_S * BLOCK_T)
    row_t, row_s = tl.program_id(0) * BLOCK_T + offs % BLOCK_T, offs // BLOCK_T
    if lse_ptr is not None:
        lse_ptr += (tl.program_id(1).to(tl.int64) - z) * rows
        offs_s = tl.arange(0, S_PAD)
        place = tl.load(place_ptr + offs_s[:, None] * Tq + offs_t[None, :],
                        mask=(offs_s < S)[:, None] & mask_t[None, :], other=-1)  # [S, BLOCK_T]
        lse = tl.load(lse_ptr + place, mask=place >= 0, other=float("-inf"))
        top = tl.max(lse, axis=0)
        y_lse = top + tl.log2(tl.sum(tl.exp2(lse - top[None, :]), axis=0))      # [BLOCK_T]
        tl.store(y_lse_ptr + head.to(tl.int64) * Tq + offs_t, y_lse, mask=mask_t)
        row_lse = tl.broadcast_to(y_lse[None, :], (BLOCK_S, BLOCK_T))
        row_lse = tl.reshape(row_lse, (BLOCK_S * BLOCK_T,))

    y = tl.zeros((BLOCK_T, D), tl.float32)
    row_place = tl.load(place_ptr + row_s * Tq + row_t, mask=(row_s < S) & (row_t < Tq), other=-1)
    for s in tl.range(BLOCK_S, S + BLOCK_S, BLOCK_S, num_stages=1):
        there = row_place >= 0
        at = row_place.to(tl.int64)
        weight = there.to(tl.float32)                                   # [BLOCK_S * BLOCK_T]
        if lse_ptr is not None:
            part_lse = tl.load(lse_ptr + row_place, mask=there, other=float("-inf"))
            weight = tl.exp2(part_lse - row_lse)
        # the next columns' places come ahead
        following = (s + row_s < S) & (row_t < Tq)
        row_place = tl.load(place_ptr + (s + row_s) * Tq + row_t, mask=following, other=-1)
        for tile in range(TILES):
            part = tl.load(part_ptr + at[:, None] * D + offs_d, mask=there[:, None], other=0)
            weighted = weight[:, None] * part.to(tl.float32)
            y += tl.sum(tl.reshape(weighted, (BLOCK_S, BLOCK_T, D)), axis=0)
            at += rows
    at = y_ptr + ((b * Tq + offs_t) * (KV * G) + h)[:, None] * D + offs_d
    tl.store(at, y, mask=mask_t[:, None])


def tile_of(q, block_size):
    """The tiles of moba_gather_kernel and of moba_gather_grad_kernel."""
    tile, grad = GATHER, GRAD
    narrow = q.shape[3] <= 64
    if q.dtype == torch.float32:
        tile, grad = GATHER_FP32, GRAD_FP32
    elif block_size > GATHER["BLOCK_N"]:
        tile = GATHER_LONG_NARROW if narrow else GATHER_LONG
    elif block_size <= 64:
        tile, grad = GATHER_NARROW if narrow else GATHER_SMALL, GRAD_SMALL
    elif narrow:
        tile = GATHER_NARROW
    return fit(tile, q.shape[1], block_size), fit(grad, q.shape[1], block_size)


def fit(tile, Tq, block_size):
    """
    The tile with no more keys than a block and no more queries than there are, as each list is
    filled up to a whole tile of them; but no fewer than a product of tiles takes.
    """
    most = dict(BLOCK_M=triton.next_power_of_2(Tq), BLOCK_N=triton.next_power_of_2(block_size))
    return tile | {name: max(16, min(tile[name], n)) for name, n in most.items()}


def merge_tile(S):
    """Fewer queries a tile where each has many blocks: their places are all held at once."""
    BLOCK_T = min(MERGE["BLOCK_T"], 2048 // triton.next_power_of_2(S))
    return MERGE | dict(BLOCK_T=max(8, BLOCK_T))


def heads_at_once(n_bytes, group, heads):
    """
    Query heads per launch, in whole groups, whose partial results, n_bytes a head, fit
    PARTIAL_BYTES.
    """
    return min(heads, group * max(1, PARTIAL_BYTES // (n_bytes * group)))


@torch.library.custom_op("nanorat::moba_forward", mutates_args=())
def moba_forward(
    q: Tensor,           # (B, Tq, H, D)
    k: Tensor, v: Tensor,  # (B, Tk, KV, D)
    chosen: Tensor,      # (B, KV, Tq, S) int32
    start: Tensor,       # (B,) int64
    block_size: int,
) -> tuple[Tensor, Tensor]:  # y (B, Tq, H, D), logsumexp (B, H, Tq) in base 2
    check_inputs(q, k, start)
    assert v.shape == k.shape and v.dtype == q.dtype, \
        f"v {v.shape} {v.dtype}, k {k.shape} {k.dtype}"
    assert v.stride(3) == 1, f"channels must be contiguous: strides {v.stride()}"
    (B, Tq, H, D), (_, Tk, KV, _) = q.shape, k.shape
    G, S, N = H // KV, chosen.shape[3], triton.cdiv(Tk, block_size)
    assert chosen.shape == (B, KV, Tq, S) and chosen.dtype == torch.int32, \
        f"chosen: {chosen.shape}, {chosen.dtype}"
    assert Tq * max(q.stride(1), H * D) < 2**31, \
        f"q {q.shape}: offsets within a row do not fit int32"
    (tile, _), merge = tile_of(q, block_size), merge_tile(S)
    lists = file_queries(chosen.contiguous(), start, N, Tk, block_size, tile)

    y = torch.empty(B, Tq, H, D, dtype=q.dtype, device=q.device)
    y_lse = torch.empty(B, H, Tq, dtype=torch.float32, device=q.device)
    heads = heads_at_once(lists.rows * D * q.element_size(), 1, B * H)
    part = torch.empty(heads * lists.rows, D, dtype=q.dtype, device=q.device)
    lse = torch.empty(heads * lists.rows, dtype=torch.float32, device=q.device)
    part_tiles = TensorDescriptor.from_tensor(part, [tile["BLOCK_M"], D])
    for h0 in range(0, B * H, heads):
        here = min(heads, B * H - h0)
        moba_gather_kernel[lists.chunks, here](
            q, k, v, lists.queries, lists.begin, lists.length, lists.chunk_ends, start,
            part_tiles, lse, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            Tq, Tk, N, KV, h0, lists.rows, D ** -0.5 * LOG2E.value, block_size,
            G=G, D=D, N_PAD=triton.next_power_of_2(N), **tile)
        moba_merge_kernel[triton.cdiv(Tq, merge["BLOCK_T"]), here](
            part, lse, lists.place, y, y_lse, Tq, KV, h0, lists.rows,
            G=G, D=D, S=S, S_PAD=triton.next_power_of_2(S), TILES=1, **merge)
    return y, y_lse


@moba_forward.register_fake
def _(q, k, v, chosen, start, block_size):
    B, Tq, H, D = q.shape
    return q.new_empty(B, Tq, H, D), q.new_empty(B, H, Tq, dtype=torch.float32)


# ---------------------------------------------------------------- backward

@triton.jit
def moba_delta_kernel(y_ptr, dy_ptr, delta_ptr, rows, D: tl.constexpr, BLOCK_M: tl.constexpr):
    """
    delta = y . dy, in fp32: what a query's ds sum up to, weighted by p.

    y, dy (rows, D) contiguous -> delta (rows,)
    grid   (cdiv(rows, BLOCK_M),)
    tile   y, dy [BLOCK_M, D]
    bytes  y and dy once
    dtype  any in, fp32 out
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    at = row[:, None] * D + tl.arange(0, D)
    y = tl.load(y_ptr + at, mask=(row < rows)[:, None], other=0).to(tl.float32)
    dy = tl.load(dy_ptr + at, mask=(row < rows)[:, None], other=0).to(tl.float32)
    tl.store(delta_ptr + row, tl.sum(y * dy, axis=1), mask=row < rows)


@triton.jit
def moba_gather_grad_kernel(
    q_ptr,             # (B, Tq, H, D)     with strides
    k_ptr, v_ptr,      # (B, Tk, KV, D)    with strides
    dy_ptr,            # (B, Tq, H, D)     contiguous
    lse_ptr,           # (B, H, Tq)        fp32
    delta_ptr,         # (B, Tq, H)        fp32
    list_ptr, begin_ptr, length_ptr, chunk_end_ptr,  # of Lists
    start_ptr,         # (B,)
    dq_ptr,            # (heads, tiles, rows, D)              of this launch
    dk_ptr, dv_ptr,    # (heads, chunks, tiles, BLOCK_N, D)      fp32
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh,
    Tq, Tk, N, KV, h0, rows, scale, block_size: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
    N_PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
):
    """
    Gradients between the queries of a chunk and a tile of the block's keys.

        p = exp2(q k - lse),  ds = p (dy v - delta)
        dq[place] = ds k,  dk[chunk] = ds^T q,  dv[chunk] = p^T dy
                                                        reference: autograd of sparse.attend
    All are parts: a query has one per block (and tile), moba_merge_kernel adds them; a key has one
    per chunk and query head, moba_merge_keys_kernel adds them. No atomics: the same in every run.
    grid   (chunks, tiles of a block's keys, query heads of this launch), chunks as in
           moba_gather_kernel
    tile   K, V and their gradients [BLOCK_N, D] stay; q, dy [BLOCK_M, D] are gathered; scores as
           [BLOCK_N, BLOCK_M], so that p^T and ds^T are where the products want them
    FLOPs  10 * block_size * D an entry. bytes: q, dy from L2, dq to HBM
    dtype  bf16 products, fp32 sums; dq in the input's dtype, dk and dv in fp32
    """
    chunk, tile, head = tl.program_id(0), tl.program_id(1), h0 + tl.program_id(2)
    b, h = (head // (KV * G)).to(tl.int64), head % (KV * G)
    n, _, first, entries = chunk_of(
        chunk, head // G, begin_ptr, length_ptr, chunk_end_ptr, N, CHUNK * BLOCK_M, N_PAD)
    if n >= N:
        return
    offs_m, offs_n, offs_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, D)
    begin = n * block_size + tile * BLOCK_N
    start_in_tile = (tl.load(start_ptr + b) - begin).to(tl.int32)
    # keys of the tile, as in moba_gather_kernel
    inside = tl.minimum(block_size - tile * BLOCK_N, tl.minimum(start_in_tile + Tq, Tk - begin))
    q_ptr += b * stride_qb + h * stride_qh
    key = (begin.to(tl.int64) + offs_n)[:, None]
    k_ptr += b * stride_kb + (h // G) * stride_kh + key * stride_kt + offs_d
    v_ptr += b * stride_vb + (h // G) * stride_vh + key * stride_vt + offs_d
    dy_ptr += (b * Tq * KV * G + h) * D
    lse_ptr += head.to(tl.int64) * Tq
    delta_ptr += b * Tq * KV * G + h
    list_ptr += first
    key_tiles, local = tl.num_programs(1), tl.program_id(2).to(tl.int64)
    row = first + (local * key_tiles + tile - head // G) * rows
    key_at = ((local * tl.num_programs(0) + chunk) * key_tiles + tile) * BLOCK_N + offs_n
    key_at = key_at[:, None] * D + offs_d                                       # [BLOCK_N, D]
    k = tl.load(k_ptr, mask=(offs_n < inside)[:, None], other=0)                # [BLOCK_N, D]
    v = tl.load(v_ptr, mask=(offs_n < inside)[:, None], other=0)
    dk = tl.zeros((BLOCK_N, D), tl.float32)
    dv = tl.zeros((BLOCK_N, D), tl.float32)
    for m in range(0, entries, BLOCK_M):
        # past its end the list's last query, which reads nothing there
        t = tl.load(list_ptr + tl.minimum(m + offs_m, entries - 1))             # [BLOCK_M]
        q = tl.load(q_ptr + (t * stride_qt)[:, None] + offs_d)                  # [BLOCK_M, D]
        dy = tl.load(dy_ptr + (t * (KV * G * D))[:, None] + offs_d)
        lse = tl.load(lse_ptr + t)                                              # [BLOCK_M]
        delta = tl.load(delta_ptr + t * (KV * G))
        newest = tl.minimum(start_in_tile + t, inside - 1)
        newest = tl.where(m + offs_m < entries, newest, -1)
        x = tl.dot(k, tl.trans(q), input_precision="ieee") * (scale * LOG2E)    # [BLOCK_N, BLOCK_M]
        p = tl.where(offs_n[:, None] <= newest[None, :], tl.exp2(x - lse[None, :]), 0)
        dv = tl.dot(p.to(dy.dtype), dy, dv, input_precision="ieee")             # [BLOCK_N, D]
        dp = tl.dot(v, tl.trans(dy), input_precision="ieee")                    # [BLOCK_N, BLOCK_M]
        ds = (p * (dp - delta[None, :])).to(q.dtype)
        dk = tl.dot(ds, q, dk, input_precision="ieee")                          # [BLOCK_N, D]
        dq = tl.dot(tl.trans(ds), k, input_precision="ieee") * scale            # [BLOCK_M, D]
        at = dq_ptr + (row + m + offs_m)[:, None] * D + offs_d
        tl.store(at, dq.to(dq_ptr.dtype.element_ty))
    tl.store(dk_ptr + key_at, dk * scale)
    tl.store(dv_ptr + key_at, dv)


@triton.jit
def moba_merge_keys_kernel(
    part_ptr,       # (heads, chunks, tiles, BLOCK_N, D)  fp32, of this launch
    chunk_end_ptr,  # (B * KV, N)                         of Lists
    dx_ptr,         # (B, Tk, KV, D)
    Tk, N, KV, z0, chunks, block_size: tl.constexpr,
    G: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """
    dk or dv: the sum of a block's parts, over the chunks of its list and the query heads of the
    group.

    grid   (N, tiles of a block's keys, (b, kv) of this launch)
    tile   dx [BLOCK_N, D]
    bytes  the parts once. Few, beside those of dq: one per chunk
    dtype  fp32 sums
    """
    n, tile, key_tiles = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    z = z0 + tl.program_id(2)
    chunk_end_ptr += z.to(tl.int64) * N + n
    begin = tl.load(chunk_end_ptr - 1, mask=n > 0, other=0)
    end = tl.load(chunk_end_ptr)
    offs_n, offs_d = tl.arange(0, BLOCK_N), tl.arange(0, D)
    total = tl.zeros((BLOCK_N, D), tl.float32)
    for g in range(G):
        head = tl.program_id(2).to(tl.int64) * G + g
        for chunk in range(begin, end):
            row = ((head * chunks + chunk) * key_tiles + tile) * BLOCK_N + offs_n
            total += tl.load(part_ptr + row[:, None] * D + offs_d)              # [BLOCK_N, D]
    inside = tile * BLOCK_N + offs_n
    key = n.to(tl.int64) * block_size + inside
    at = (((z // KV).to(tl.int64) * Tk + key) * KV + z % KV)[:, None] * D + offs_d
    tl.store(dx_ptr + at, total, mask=((inside < block_size) & (key < Tk))[:, None])


@torch.library.custom_op("nanorat::moba_backward", mutates_args=())
def moba_backward(
    q: Tensor,             # (B, Tq, H, D)
    k: Tensor, v: Tensor,  # (B, Tk, KV, D)
    chosen: Tensor,        # (B, KV, Tq, S) int32
    start: Tensor,         # (B,) int64
    y: Tensor,             # (B, Tq, H, D)
    y_lse: Tensor,         # (B, H, Tq)
    dy: Tensor,            # (B, Tq, H, D)
    block_size: int,
) -> tuple[Tensor, Tensor, Tensor]:  # dq, dk, dv
    (B, Tq, H, D), (_, Tk, KV, _) = q.shape, k.shape
    G, S, N = H // KV, chosen.shape[3], triton.cdiv(Tk, block_size)
    (_, tile), merge = tile_of(q, block_size), merge_tile(S)
    key_tiles = triton.cdiv(block_size, tile["BLOCK_N"])
    # filed anew: chunks differ from forward's, and keeping the lists would take 8 bytes a pair
    lists = file_queries(chosen.contiguous(), start, N, Tk, block_size, tile)
    dy = dy.contiguous()
    delta = torch.empty(B, Tq, H, dtype=torch.float32, device=q.device)  # y_lse is (B, H, Tq)
    moba_delta_kernel[(triton.cdiv(delta.numel(), 64),)](
        y, dy, delta, delta.numel(), D=D, BLOCK_M=64)

    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    # bytes of a head's parts, and whole groups: a key's gradient is the sum over its group
    n_bytes = key_tiles * D * (lists.rows * q.element_size() + lists.chunks * tile["BLOCK_N"] * 8)
    heads = heads_at_once(n_bytes, G, B * H)
    part = torch.empty(heads, key_tiles, lists.rows, D, dtype=q.dtype, device=q.device)
    dk_part, dv_part = torch.empty(2, heads, lists.chunks, key_tiles, tile["BLOCK_N"], D,
                                   dtype=torch.float32, device=q.device)
    for h0 in range(0, B * H, heads):
        here = min(heads, B * H - h0)
        moba_gather_grad_kernel[lists.chunks, key_tiles, here](
            q, k, v, dy, y_lse, delta, lists.queries, lists.begin, lists.length, lists.chunk_ends,
            start, part, dk_part, dv_part,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            Tq, Tk, N, KV, h0, lists.rows, D ** -0.5, block_size,
            G=G, D=D, N_PAD=triton.next_power_of_2(N), **tile)
        moba_merge_kernel[triton.cdiv(Tq, merge["BLOCK_T"]), here](
            part, None, lists.place, dq, None, Tq, KV, h0, lists.rows,
            G=G, D=D, S=S, S_PAD=1, TILES=key_tiles, **merge)
        for x_part, dx in (dk_part, dk), (dv_part, dv):
            moba_merge_keys_kernel[N, key_tiles, here // G](
                x_part, lists.chunk_ends, dx, Tk, N, KV, h0 // G, lists.chunks, block_size,
                G=G, D=D, BLOCK_N=tile["BLOCK_N"])
    return dq, dk, dv


@moba_backward.register_fake
def _(q, k, v, chosen, start, y, y_lse, dy, block_size):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def save_for_backward(ctx, inputs, output):
    *tensors, ctx.block_size = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def backward(ctx, dy, _):
    return *moba_backward(*ctx.saved_tensors, dy, ctx.block_size), None, None, None


moba_forward.register_autograd(backward, setup_context=save_for_backward)


# ---------------------------------------------------------------- the function

def moba_attend(
    q,           # (B, Tq, H, D)  bf16 or fp32, D a power of two from 16 to 128
    k, v,        # (B, Tk, KV, D)
    chosen,      # (B, KV, Tq, S) int32: blocks per query, in any order, its own among them, none
                 #                twice, -1 for none
    start,       # (B,) int64     the slot of each row's first query
    block_size,  # int
):               # -> y (B, Tq, H, D). A block later than the own is not read even if chosen
    """Attention of each query to its chosen blocks, its own causally; with gradients."""
    return moba_forward(q, k, v, chosen, start, block_size)[0]
