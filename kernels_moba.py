"""
MoBA's prefill in Triton (reference: sparse.MoBA), forward only.

    chosen = TopK_n q . mean(K_n)                        moba_route:  means -> route
    y      = softmax(q K_chosen^T / sqrt(D)) V_chosen    moba_attend: count, fill -> gather -> finish

Neighbouring queries choose different blocks, so a tile of queries has no block in common. But one block has many
queries, up to all that follow it. So the attention is key-major: each block lists the queries that chose it, and a
program holds the block's K and V and lets its list stream past, a tile of gathered queries at a time: tensor cores
stay full, without a mask, whatever was chosen. What a query got from each of its blocks is a partial output with its
logsumexp. The last kernel is query-major again: it merges the partials and adds the own block, which alone needs the
causal mask.

Letters as in sparse.py. `start` (B,) is the slot of each row's first query; own = slot // block_size. A query past the
last slot (padding) counts as standing in the last slot. tests/test_kernels_moba.py holds all of it to sparse.py.
"""
import math

import torch
import triton
import triton.language as tl

LOG2E = math.log2(math.e)  # exp(x) = exp2(x * LOG2E); logsumexps are in base 2 too

# Tiles for an H100. A block of up to 128 keys is one tile: K and V (64 KB at D = 128) stay in shared memory while CHUNK
# tiles of a list pass; two programs share an SM, one multiplies while the other takes exponentials. A longer block
# streams past each tile, which then should be large.
GATHER = dict(BLOCK_M=64, BLOCK_N=128, CHUNK=64, num_warps=4, num_stages=2)
GATHER_LONG = dict(BLOCK_M=128, BLOCK_N=64, CHUNK=4, num_warps=8, num_stages=3)
# queries a program files. More: longer runs in the lists. Up to 2**15 fit the mask's words
LISTS = dict(BLOCK_T=128, num_warps=4)
FINISH = dict(BLOCK_M=64, BLOCK_N=64, PART_STAGES=3, num_warps=4, num_stages=2)
# ieee products of fp32 run without tensor cores, from registers: small tiles
GATHER_FP32 = dict(BLOCK_M=32, BLOCK_N=32, CHUNK=8, num_warps=4, num_stages=1)
FINISH_FP32 = dict(BLOCK_M=32, BLOCK_N=16, PART_STAGES=1, num_warps=8, num_stages=1)
ROUTE_SCORES = 32768       # scores a program of moba_route_kernel holds in registers: 128 a thread
PARTIAL_BYTES = 4 * 2**30  # bound on the buffer of partial outputs


# ---------------------------------------------------------------- routing: which blocks a query reads

@triton.jit
def ordered(x):
    """fp32 -> int32 in the same order: the bits, of negative numbers all but the sign flipped."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def unordered(key):
    """The fp32 number that `ordered` maps to key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def popcount(x):
    """How many bits of a uint32 are set. (The compiler knows this spelling as one instruction.)"""
    x -= (x >> 1) & 0x55555555
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def moba_mean_kernel(
    k_ptr, mean_ptr, stride_b, stride_t, stride_h, Tk, N, KV, block_size: tl.constexpr,
    D: tl.constexpr, PARTS: tl.constexpr, BLOCK_T: tl.constexpr,
):
    """
    Mean key of each block.

        mean[n] = sum_i k[n * block_size + i] / block_size        reference: sparse.MoBA.score
    grid   (N, B * KV): one program per block
    tile   k [BLOCK_T, D] streams past, summed into [D]
    bytes  k once; the means are 1 / block_size of that
    dtype  sums in fp32. For bf16 keys the mean leaves as PARTS = 2 bf16 that add up to it, to 16 bits: two products on
           tensor cores then score nearly as in fp32. The mean of an incomplete last block is wrong, and never used
    """
    n, z = tl.program_id(0), tl.program_id(1)
    b, kv = (z // KV).to(tl.int64), z % KV
    offs_d = tl.arange(0, D)
    total = tl.zeros((BLOCK_T, D), tl.float32)
    for i in range(0, block_size, BLOCK_T):
        inside = i + tl.arange(0, BLOCK_T)
        slot = (n * block_size + inside).to(tl.int64)
        mask_t = (inside < block_size) & (slot < Tk)
        k = tl.load(k_ptr + b * stride_b + slot[:, None] * stride_t + kv * stride_h + offs_d,
                    mask=mask_t[:, None], other=0)                                  # [BLOCK_T, D]
        total += k.to(tl.float32)
    mean = tl.sum(total, axis=0) / block_size                                       # [D]
    mean_ptr += (z.to(tl.int64) * N + n) * PARTS * D + offs_d
    high = mean.to(mean_ptr.dtype.element_ty)
    tl.store(mean_ptr, high)
    if PARTS == 2:
        tl.store(mean_ptr + D, mean - high.to(tl.float32))


@triton.jit
def moba_route_kernel(
    q_ptr, mean_ptr, start_ptr, chosen_ptr, stride_b, stride_t, stride_h, Tq, Tk, N, KV, block_size: tl.constexpr,
    G: tl.constexpr, D: tl.constexpr, S: tl.constexpr, S_PAD: tl.constexpr, KEEP_FIRST: tl.constexpr,
    PARTS: tl.constexpr, ABOVE: tl.constexpr, W: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """
    The S blocks of each query: its own, the first if KEEP_FIRST, and the best of those between by q . mean.

        score[n] = (mean of the group's q) . mean[n]              reference: sparse.MoBA.prefill, down to `chosen`
    The mean over the group's scores is one score of the group's mean query. The cut, the smallest score still chosen,
    is found by bisection: halve an interval of numbers until exactly as many scores lie above as are needed.
    A kept block's place among S is the number of kept ones before it; the own block, the newest, comes last.
    grid   (tiles, B * KV): BLOCK_M queries of one KV head. Launched once per width W, a power of two: a program goes on
           if its tile needs more than ABOVE and at most W blocks, so that early queries do not pay for the late
    tile   scores [BLOCK_M, W] stay in registers; q and means come in slices of BLOCK_D channels
    cost   about 15 rounds of 2.5 instructions a score (compare, count), and 20 a score for all the rest
    dtype  bf16: products of bf16 parts, summed in fp32, good to 16 bits. fp32: products in fp32
    """
    m0, z = tl.program_id(0) * BLOCK_M, tl.program_id(1)
    b, kv = (z // KV).to(tl.int64), z % KV
    start = tl.load(start_ptr + b)
    newest = tl.minimum(start + tl.minimum(m0 + BLOCK_M, Tq) - 1, Tk - 1) // block_size  # own block of the last query
    if (newest <= ABOVE) | (newest > W):
        return
    offs_m, offs_n = m0 + tl.arange(0, BLOCK_M), tl.arange(0, W)
    mask_m = offs_m < Tq
    own = (tl.minimum(start + offs_m, Tk - 1) // block_size).to(tl.int32)                # [BLOCK_M]
    own = tl.where(mask_m, own, 0)  # past the end: nothing to search

    # bf16: high + low of the mean times q; the mean q of a group is split in two as well, its low part times high only
    slices: tl.constexpr = PARTS if PARTS == 1 or G == 1 else 3
    scores = tl.zeros((BLOCK_M, W), tl.float32)
    offs_d = tl.arange(0, BLOCK_D)
    q_ptr += b * stride_b + kv * G * stride_h
    mean_ptr += z.to(tl.int64) * N * PARTS * D
    for i in range(0, slices * D, BLOCK_D):
        q_d, mean_d = tl.multiple_of(i % D, BLOCK_D) + offs_d, tl.multiple_of(i % (PARTS * D), BLOCK_D) + offs_d
        q_at = q_ptr + offs_m.to(tl.int64)[:, None] * stride_t + q_d
        mean_at = mean_ptr + offs_n[None, :] * (PARTS * D) + mean_d[:, None]
        mean = tl.load(mean_at, mask=(offs_n < N)[None, :], other=0)                     # [BLOCK_D, W]
        q = tl.load(q_at, mask=mask_m[:, None], other=0)                                 # [BLOCK_M, BLOCK_D]
        if G > 1:
            group = q.to(tl.float32)
            for g in range(1, G):
                group += tl.load(q_at + g * stride_h, mask=mask_m[:, None], other=0).to(tl.float32)
            q = (group / G).to(q.dtype)
            if i >= 2 * D:
                q = (group / G - q.to(tl.float32)).to(q.dtype)
        scores = tl.dot(q, mean, scores, input_precision="ieee")

    # candidates lie before the own block, and after the first if that is forced
    least: tl.constexpr = 1 if KEEP_FIRST else 0
    need = S - 1 - tl.minimum(own, least)                                                # [BLOCK_M]
    have = tl.maximum(own - least, 0)
    free = (offs_n >= least)[None, :] & (offs_n[None, :] < own[:, None])                 # [BLOCK_M, W]
    low = tl.min(tl.where(free, scores, float("inf")), axis=1)
    scores = tl.where(free, scores, float("-inf"))
    high = tl.max(scores, axis=1) + 0.0  # -0.0 becomes 0.0: above it comes a number, not 0.0

    # of the scores >= lo there are `above`, at least `need`; of those >= hi fewer. lo, hi: ordered integers, so that
    # halving ends; the first rounds halve the numbers themselves, which is quicker unless scores tie
    lo, hi = ordered(tl.maximum(low, -3e38)), ordered(high) + 1  # -inf: what is not free
    lo = tl.where(need == 0, hi, lo)
    above = tl.where(need == 0, 0, have)
    open = (above > need) & (hi > lo + 1)
    rounds = 0
    while tl.max(open.to(tl.int32), axis=0) > 0:
        if rounds < 16:
            middle = ordered((unordered(lo) + unordered(hi)) * 0.5)
        else:
            middle = (lo & hi) + ((lo ^ hi) >> 1)  # their mean; the sum might overflow
        middle = tl.minimum(tl.maximum(middle, lo + 1), hi - 1)
        count = tl.sum(tl.where(scores >= unordered(middle)[:, None], 1.0, 0.0), axis=1).to(tl.int32)
        up = open & (count >= need)
        lo = tl.where(up, middle, lo)
        above = tl.where(up, count, above)
        hi = tl.where(open & (count < need), middle, hi)
        open = (above > need) & (hi > lo + 1)
        rounds += 1
    cut = unordered(lo)[:, None]

    # too many still: several equal the cut. Of those the first stay, left of a bound, which bisection finds too
    open = above > need
    if tl.max(open.to(tl.int32), axis=0) > 0:
        left, right = own * 0, own * 0 + W
        while tl.max(open.to(tl.int32), axis=0) > 0:
            middle = (left + right) // 2
            stay = (scores > cut) | ((scores == cut) & (offs_n[None, :] < middle[:, None]))
            count = tl.sum(tl.where(stay, 1.0, 0.0), axis=1).to(tl.int32)
            left = tl.where(open & (count < need), middle, left)
            right = tl.where(open & (count >= need), middle, right)
            open = open & (count != need) & (right > left + 1)
        scores = tl.where((scores == cut) & (offs_n[None, :] >= right[:, None]), float("-inf"), scores)

    # 32 blocks in one word: the rest is small
    bit = tl.full((W,), 1, tl.uint32) << (offs_n % 32).to(tl.uint32)
    word = tl.reshape(tl.where(scores >= cut, bit[None, :], 0), (BLOCK_M, W // 32, 32))
    word = tl.sum(word, axis=2)                                                          # [BLOCK_M, W / 32]
    offs_w = tl.arange(0, W // 32)
    if KEEP_FIRST:
        word |= ((offs_w == 0)[None, :] & (own > 0)[:, None]).to(tl.uint32)
    count = popcount(word)
    place = tl.cumsum(count, axis=1) - count
    kept = tl.sum(count, axis=1)                                                         # [BLOCK_M]
    row = chosen_ptr + (z.to(tl.int64) * Tq + offs_m) * S
    while tl.max(tl.max(word, axis=1), axis=0) > 0:  # the lowest one of each word goes to its place
        one = word & (0 - word)
        # NaN scores may have misled the search: never write outside the row
        tl.store(row[:, None] + place, (offs_w * 32)[None, :] + popcount(one - 1),
                 mask=(one > 0) & (place < S) & mask_m[:, None])
        word ^= one
        place += 1
    offs_s = tl.arange(0, S_PAD)
    tl.store(row[:, None] + offs_s, tl.where(offs_s[None, :] == kept[:, None], own[:, None], -1),
             mask=(offs_s[None, :] >= kept[:, None]) & (offs_s < S)[None, :] & mask_m[:, None])


@torch.library.custom_op("nanorat::moba_route", mutates_args=())
def moba_route(
    q: torch.Tensor,      # (B, Tq, H, D)
    k: torch.Tensor,      # (B, Tk, KV, D)
    start: torch.Tensor,  # (B,) int64: the slot of each row's first query
    block_size: int,
    S: int,
    keep_first: bool,
) -> torch.Tensor:        # (B, KV, Tq, S) int32: blocks, ascending, -1 at the end where there are fewer
    check_inputs(q, k, start)
    B, Tq, H, D = q.shape
    Tk, KV = k.shape[1:3]
    N, parts = triton.cdiv(Tk, block_size), 2 if q.dtype == torch.bfloat16 else 1
    assert S >= min(1 + keep_first, N), f"{S=} leaves no room for the forced blocks ({keep_first=})"
    mean = q.new_empty(B, KV, N, parts, D)
    moba_mean_kernel[N, B * KV](
        k, mean, *k.stride()[:3], Tk, N, KV, block_size,
        D=D, PARTS=parts, BLOCK_T=min(64, triton.next_power_of_2(block_size)), num_warps=4)
    chosen = torch.empty(B, KV, Tq, S, dtype=torch.int32, device=q.device)
    widest = max(32, triton.next_power_of_2(N))
    W, above = min(128, widest), -1
    while W <= widest:
        BLOCK_M = max(16, min(64, ROUTE_SCORES // W) // (1 if parts == 2 else 2))
        # the own block of query t is at least t // block_size: later tiles are wider than W
        tiles = min(triton.cdiv(Tq, BLOCK_M), triton.cdiv((W + 1) * block_size, BLOCK_M))
        num_warps = min(16, max(4, BLOCK_M * W // (4096 if parts == 2 else 2048)))  # fp32 products need more registers
        moba_route_kernel[tiles, B * KV](
            q, mean, start, chosen, *q.stride()[:3], Tq, Tk, N, KV, block_size,
            G=H // KV, D=D, S=S, S_PAD=triton.next_power_of_2(S), KEEP_FIRST=keep_first, PARTS=parts,
            ABOVE=above, W=W, BLOCK_M=BLOCK_M, BLOCK_D=min(64, D), num_warps=num_warps, num_stages=2)
        W, above = 2 * W, W
    return chosen


@moba_route.register_fake
def _(q, k, start, block_size, S, keep_first):
    return q.new_empty(q.shape[0], k.shape[2], q.shape[1], S, dtype=torch.int32)


# ---------------------------------------------------------------- attention over the chosen blocks

@triton.jit
def load_chosen(chosen_ptr, start_ptr, z, KV, offs_t, offs_s, Tq, Tk, block_size: tl.constexpr, S: tl.constexpr):
    """A tile of `chosen`, [BLOCK_T, BLOCK_S], and which of it are earlier blocks, to be read through the lists."""
    slot = tl.minimum(tl.load(start_ptr + z // KV) + offs_t, Tk - 1)
    inside = (offs_t < Tq)[:, None] & (offs_s < S)[None, :]
    n = tl.load(chosen_ptr + (z.to(tl.int64) * Tq + offs_t)[:, None] * S + offs_s[None, :], mask=inside, other=-1)
    return n, (n >= 0) & (n < (slot // block_size)[:, None])


@triton.jit
def moba_count_kernel(
    chosen_ptr, start_ptr, mask_ptr, count_ptr, Tq, Tk, N, KV, block_size: tl.constexpr,
    S: tl.constexpr, S_PAD: tl.constexpr, BLOCK_T: tl.constexpr,
):
    """
    Turns `chosen` about: per block the queries that chose it, as bits, and their number in this tile of queries.

        mask[t // 16, n]    bit t % 16: n is among chosen[t], n < own[t];  bits 16 and up: how many earlier t of the tile
        count[n, tile]      how many t of the tile
    Two turns of 32 blocks at a time: a query's choices become one word, bit n % 32; then the word's bits become 32
    columns, and 16 queries the bits of a column. No atomics: the lists come out ascending, the same in every run.
    grid   (cdiv(Tq, BLOCK_T), B * KV)
    tile   chosen [BLOCK_T, S] in registers, mask [BLOCK_T / 16, 32]
    bytes  chosen once, 4 N / 16 a query for the mask. Some 10 instructions a query and block up to its own
    """
    tile, z = tl.program_id(0), tl.program_id(1)
    offs_t, offs_s = tile * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, S_PAD)
    n, earlier = load_chosen(chosen_ptr, start_ptr, z, KV, offs_t, offs_s, Tq, Tk, block_size, S)
    n = tl.where(earlier, n, -1)                                                     # [BLOCK_T, S]
    bit = tl.full((BLOCK_T, S_PAD), 1, tl.uint32) << (n & 31).to(tl.uint32)
    ROWS: tl.constexpr = BLOCK_T // 16
    offs_r, offs_i, offs_n = tl.arange(0, ROWS), tl.arange(0, 16), tl.arange(0, 32)
    mask_ptr += (z.to(tl.int64) * tl.cdiv(Tq, BLOCK_T) + tile) * ROWS * N
    count_ptr += z.to(tl.int64) * N * tl.cdiv(Tq, BLOCK_T) + tile
    for first in range(0, tl.max(tl.max(n, axis=1), axis=0) + 1, 32):
        word = tl.sum(tl.where(n >> 5 == first >> 5, bit, 0), axis=1)                # [BLOCK_T] bits are blocks
        # queries of a row stand along axis 0, so that one thread holds all 16 and adds them
        word = tl.trans(tl.reshape(word, (ROWS, 16)))                                # [16, ROWS]
        asks = (word[:, :, None] >> offs_n[None, None, :].to(tl.uint32)) & 1         # [16, ROWS, 32]
        row = tl.sum(asks << offs_i[:, None, None].to(tl.uint32), axis=0)            # [ROWS, 32] bits are queries
        number = popcount(row)
        upto = tl.cumsum(number, axis=0)
        inside = (first + offs_n < N)[None, :]
        tl.store(mask_ptr + offs_r[:, None] * N + first + offs_n[None, :],
                 row.to(tl.int32) | ((upto - number) << 16), mask=inside)
        tl.store(count_ptr + (first + offs_n).to(tl.int64) * tl.cdiv(Tq, BLOCK_T), tl.sum(number, axis=0),
                 mask=first + offs_n < N)


@triton.jit
def moba_fill_kernel(
    chosen_ptr, start_ptr, mask_ptr, end_ptr, place_ptr, list_ptr, Tq, Tk, N, KV, block_size: tl.constexpr,
    S: tl.constexpr, S_PAD: tl.constexpr, BLOCK_T: tl.constexpr,
):
    """
    Files each (query, block) pair in its block's list, and notes where: list[place[t, s]] = t.

        place[t, s] = (pairs of the lists and tiles before) + (pairs of the tile before), -1 if not filed
    grid   (cdiv(Tq, BLOCK_T), B * KV), tiles as in moba_count_kernel; end is the running sum of its counts
    bytes  chosen once, place and the lists once; two words a pair from the cache
    """
    tile, z = tl.program_id(0), tl.program_id(1)
    offs_t, offs_s = tile * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, S_PAD)
    n, earlier = load_chosen(chosen_ptr, start_ptr, z, KV, offs_t, offs_s, Tq, Tk, block_size, S)
    tiles = tl.cdiv(Tq, BLOCK_T)
    row = tl.arange(0, BLOCK_T) // 16                                                # [BLOCK_T]
    mask_ptr += (z.to(tl.int64) * tiles + tile) * (BLOCK_T // 16) * N
    mask = tl.load(mask_ptr + row[:, None] * N + n, mask=earlier, other=0)           # [BLOCK_T, S]
    before = mask & ((1 << offs_t % 16) - 1)[:, None]
    end_ptr += z.to(tl.int64) * N * tiles - 1
    at = n * tiles + tile
    place = tl.load(end_ptr + at, mask=earlier & (at + z > 0), other=0)      # the end of what comes before
    place += (mask >> 16) + popcount(before.to(tl.uint32))
    tl.store(list_ptr + place, tl.broadcast_to(offs_t[:, None], (BLOCK_T, S_PAD)), mask=earlier)
    tl.store(place_ptr + (z.to(tl.int64) * Tq + offs_t)[:, None] * S + offs_s[None, :], tl.where(earlier, place, -1),
             mask=(offs_t < Tq)[:, None] & (offs_s < S)[None, :])


@triton.jit
def moba_gather_kernel(
    q_ptr, k_ptr, v_ptr, list_ptr, end_ptr, chunk_end_ptr, part_ptr, lse_ptr,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    N, KV, z0, scale, block_size: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr, N_PAD: tl.constexpr,
):
    """
    Attention of the queries on a block's list to that block: a normalised partial output and its logsumexp each.

        part[place, g] = softmax(q K_n^T) V_n,  lse[place, g] = log2 sum exp2(q K_n^T)        for q = q[list[place], g]
    Partials stand in the order of the lists, so that a tile is written in one piece: the queries' order would make
    neither kernel's reads better, as moba_finish_kernel takes whole rows of D in either.
    grid   (chunks, (b, kv) pairs of this launch). A chunk is up to CHUNK * BLOCK_M rows of one list; a row is an entry
           with one of the G query heads. chunk_end counts the chunks up to each block: comparing finds the program's
    tile   q [BLOCK_M, D] gathered row by row; K, V [BLOCK_N, D] stay for the whole chunk if the block is one tile, else
           they stream past each q tile. The block is complete and earlier: no causal mask
    FLOPs  4 * block_size * D a row. bytes: q read from L2, part written to HBM
    dtype  bf16 products, fp32 softmax; part in the input's dtype, lse in fp32
    """
    chunk, z = tl.program_id(0), z0 + tl.program_id(1)
    chunk_end_ptr += z.to(tl.int64) * N
    offs_c = tl.arange(0, N_PAD)
    ends = tl.load(chunk_end_ptr + offs_c, mask=offs_c < N, other=2**31 - 1)                  # [N_PAD]
    n = tl.sum((ends <= chunk).to(tl.int32), axis=0)
    if n >= N:  # the grid is for the longest lists there may be
        return
    chunk -= tl.max(tl.where(ends <= chunk, ends, 0), axis=0)                                 # counted within the list
    block = z * N + n
    first = tl.load(end_ptr + block - 1, mask=block > 0, other=0)
    base = tl.load(end_ptr + z0 * N - 1, mask=z0 > 0, other=0)  # what is filed for earlier launches
    rows = (tl.load(end_ptr + block) - first) * G
    list_ptr += first
    part_ptr += (first - base).to(tl.int64) * G * D
    lse_ptr += (first - base).to(tl.int64) * G
    b, kv = (z // KV).to(tl.int64), z % KV
    offs_n, offs_d = tl.arange(0, BLOCK_N), tl.arange(0, D)
    k_ptr += b * stride_kb + kv * stride_kh + (n.to(tl.int64) * block_size + offs_n)[:, None] * stride_kt + offs_d
    v_ptr += b * stride_vb + kv * stride_vh + (n.to(tl.int64) * block_size + offs_n)[:, None] * stride_vt + offs_d
    ONE_TILE: tl.constexpr = block_size <= BLOCK_N
    if ONE_TILE:
        k = tl.load(k_ptr, mask=(offs_n < block_size)[:, None], other=0)                      # [BLOCK_N, D]
        v = tl.load(v_ptr, mask=(offs_n < block_size)[:, None], other=0)
    m0 = chunk * (CHUNK * BLOCK_M)
    offs_m = m0 + tl.arange(0, BLOCK_M)
    t = tl.load(list_ptr + offs_m // G, mask=offs_m < rows, other=0)                          # [BLOCK_M]
    for m in range(m0, tl.minimum(m0 + CHUNK * BLOCK_M, rows), BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < rows
        head, here = offs_m % G, t.to(tl.int64)
        # the next tile's entries come a tile ahead: then nothing stands between the pipeline and its loads of q
        t = tl.load(list_ptr + (offs_m + BLOCK_M) // G, mask=offs_m + BLOCK_M < rows, other=0)
        q = tl.load(q_ptr + b * stride_qb + (here * stride_qt + (kv * G + head) * stride_qh)[:, None] + offs_d,
                    mask=mask_m[:, None], other=0)                                            # [BLOCK_M, D]
        if ONE_TILE:
            x = tl.dot(q, tl.trans(k), input_precision="ieee")                                # [BLOCK_M, BLOCK_N]
            if block_size < BLOCK_N:
                x = tl.where((offs_n < block_size)[None, :], x, float("-inf"))
            top = tl.max(x, axis=1) * scale                                                   # [BLOCK_M]
            p = tl.exp2(x * scale - top[:, None])
            total = tl.sum(p, axis=1)
            y = tl.dot(p.to(v.dtype), v, input_precision="ieee")                              # [BLOCK_M, D]
        else:
            top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
            total = tl.zeros((BLOCK_M,), tl.float32)
            y = tl.zeros((BLOCK_M, D), tl.float32)
            for j in range(0, block_size, BLOCK_N):
                inside = j + offs_n < block_size
                if block_size % BLOCK_N == 0:
                    k = tl.load(k_ptr + j * stride_kt)
                    v = tl.load(v_ptr + j * stride_vt)
                else:
                    k = tl.load(k_ptr + j * stride_kt, mask=inside[:, None], other=0)
                    v = tl.load(v_ptr + j * stride_vt, mask=inside[:, None], other=0)
                x = tl.dot(q, tl.trans(k), input_precision="ieee")                            # [BLOCK_M, BLOCK_N]
                if block_size % BLOCK_N != 0:
                    x = tl.where(inside[None, :], x, float("-inf"))
                higher = tl.maximum(top, tl.max(x, axis=1) * scale)
                p = tl.exp2(x * scale - higher[:, None])
                shrink = tl.exp2(top - higher)
                total = total * shrink + tl.sum(p, axis=1)
                y = tl.dot(p.to(v.dtype), v, y * shrink[:, None], input_precision="ieee")     # [BLOCK_M, D]
                top = higher
        at = part_ptr + offs_m.to(tl.int64)[:, None] * D + offs_d
        tl.store(at, (y / total[:, None]).to(part_ptr.dtype.element_ty), mask=mask_m[:, None])
        tl.store(lse_ptr + offs_m, top + tl.log2(total), mask=mask_m)


@triton.jit
def moba_finish_kernel(
    q_ptr, k_ptr, v_ptr, place_ptr, end_ptr, start_ptr, part_ptr, lse_ptr, y_ptr,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    Tq, Tk, N, KV, z0, scale, block_size: tl.constexpr,
    G: tl.constexpr, D: tl.constexpr, S: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PART_STAGES: tl.constexpr,
):
    """
    Attention to the own block, causally, merged with the partial outputs of the others.

        y = (sum_{own j <= t} exp2(q k_j) v_j + sum_s exp2(lse[place[s]]) part[place[s]]) / (the same without v_j, part)
    grid   (cdiv(Tq, BLOCK_M), query heads of this launch): BLOCK_M neighbouring queries of one head
    tile   q [BLOCK_M, D]; K, V [BLOCK_N, D] from the first query's own block to the last query; part [BLOCK_M, D]
    bytes  the partial outputs once: S * D elements a query and head
    dtype  bf16 products, fp32 softmax and sums
    """
    z, head = z0 + tl.program_id(1) // G, tl.program_id(1) % G
    b, kv, m0 = (z // KV).to(tl.int64), z % KV, tl.program_id(0) * BLOCK_M
    offs_m, offs_n, offs_d = m0 + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, D)
    mask_m = offs_m < Tq
    start = tl.load(start_ptr + b)
    slot = tl.minimum(start + offs_m, Tk - 1)                                                 # [BLOCK_M]
    begin = slot // block_size * block_size                                                   # of the own block
    q = tl.load(q_ptr + b * stride_qb + offs_m.to(tl.int64)[:, None] * stride_qt + (kv * G + head) * stride_qh + offs_d,
                mask=mask_m[:, None], other=0)                                                # [BLOCK_M, D]
    k_ptr += b * stride_kb + kv * stride_kh
    v_ptr += b * stride_vb + kv * stride_vh

    # an online softmax, over the partials first. Columns, not a tile of places: that would dictate y a slow layout
    place_ptr += (z.to(tl.int64) * Tq + offs_m) * S                                           # [BLOCK_M]
    base = tl.load(end_ptr + z0 * N - 1, mask=z0 > 0, other=0)
    top = tl.full((BLOCK_M,), -1e30, tl.float32)  # finite: a query's own block may begin in a later tile of keys
    total = tl.zeros((BLOCK_M,), tl.float32)
    y = tl.zeros((BLOCK_M, D), tl.float32)
    for s in tl.range(0, S, num_stages=PART_STAGES):
        place = tl.load(place_ptr + s, mask=mask_m, other=-1)                                 # [BLOCK_M]
        row = (place - base) * G + head                                                       # fits: part does
        lse = tl.load(lse_ptr + row, mask=place >= 0, other=float("-inf"))
        part = tl.load(part_ptr + row.to(tl.int64)[:, None] * D + offs_d, mask=(place >= 0)[:, None], other=0)  # [BLOCK_M, D]
        higher = tl.maximum(top, lse)
        shrink, weight = tl.exp2(top - higher), tl.exp2(lse - higher)
        total = total * shrink + weight
        y = y * shrink[:, None] + weight[:, None] * part.to(tl.float32)
        top = higher

    oldest = tl.minimum(start + m0, Tk - 1) // block_size * block_size
    newest = tl.minimum(start + tl.minimum(m0 + BLOCK_M, Tq) - 1, Tk - 1)
    for j in range(oldest, newest + 1, BLOCK_N):
        key = j + offs_n                                                                      # [BLOCK_N] int64
        k = tl.load(k_ptr + key[:, None] * stride_kt + offs_d, mask=(key <= newest)[:, None], other=0)
        v = tl.load(v_ptr + key[:, None] * stride_vt + offs_d, mask=(key <= newest)[:, None], other=0)
        x = tl.dot(q, tl.trans(k), input_precision="ieee") * scale                            # [BLOCK_M, BLOCK_N]
        x = tl.where((key[None, :] <= slot[:, None]) & (key[None, :] >= begin[:, None]), x, float("-inf"))
        higher = tl.maximum(top, tl.max(x, axis=1))
        p = tl.exp2(x - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, axis=1)
        y = tl.dot(p.to(v.dtype), v, y * shrink[:, None], input_precision="ieee")             # [BLOCK_M, D]
        top = higher

    y_at = ((b * Tq + offs_m) * (KV * G) + kv * G + head)[:, None] * D + offs_d
    tl.store(y_ptr + y_at, y / total[:, None], mask=mask_m[:, None])


@torch.library.custom_op("nanorat::moba_attend", mutates_args=())
def moba_attend(
    q: torch.Tensor,       # (B, Tq, H, D)
    k: torch.Tensor,       # (B, Tk, KV, D)
    v: torch.Tensor,       # (B, Tk, KV, D)
    chosen: torch.Tensor,  # (B, KV, Tq, S) int32: distinct blocks per query, in any order, -1 for none
    start: torch.Tensor,   # (B,) int64: the slot of each row's first query
    block_size: int,
) -> torch.Tensor:         # (B, Tq, H, D). The own block is read even if not chosen, a later one not even if chosen
    check_inputs(q, k, start)
    assert v.shape == k.shape and v.dtype == q.dtype, f"v {v.shape} {v.dtype}, k {k.shape} {k.dtype}"
    assert v.stride(3) == 1, f"channels must be contiguous: strides {v.stride()}"
    B, Tq, H, D = q.shape
    Tk, KV = k.shape[1:3]
    G, S, N = H // KV, chosen.shape[3], triton.cdiv(Tk, block_size)
    assert chosen.shape == (B, KV, Tq, S) and chosen.dtype == torch.int32, f"chosen: {chosen.shape}, {chosen.dtype}"
    assert max(B * KV, G) * Tq * S < 2**31, f"{max(B * KV, G) * Tq * S} pairs or rows do not fit int32"
    chosen, S_PAD = chosen.contiguous(), triton.next_power_of_2(S)
    gather, finish = GATHER_FP32, FINISH_FP32
    if q.dtype == torch.bfloat16:
        gather, finish = GATHER if block_size <= GATHER["BLOCK_N"] else GATHER_LONG, FINISH
    gather = gather | dict(BLOCK_N=max(16, min(gather["BLOCK_N"], triton.next_power_of_2(block_size))))

    # one list a block, one behind the other over all (b, kv); in ascending order of queries
    BLOCK_T, warps = LISTS["BLOCK_T"], LISTS["num_warps"]
    tiles, z = triton.cdiv(Tq, BLOCK_T), B * KV
    sizes = dict(block_size=block_size, S=S, S_PAD=S_PAD, BLOCK_T=BLOCK_T)
    mask = torch.empty(z, tiles * BLOCK_T // 16, N, dtype=torch.int32, device=q.device)
    count = torch.zeros(z, N, tiles, dtype=torch.int32, device=q.device)
    moba_count_kernel[tiles, z](chosen, start, mask, count, Tq, Tk, N, KV, **sizes, num_warps=warps)
    tile_ends = count.view(-1).cumsum(0, dtype=torch.int32)
    place = torch.empty(z, Tq, S, dtype=torch.int32, device=q.device)
    lists = torch.empty(z * Tq * S, dtype=torch.int32, device=q.device)
    moba_fill_kernel[tiles, z](chosen, start, mask, tile_ends, place, lists, Tq, Tk, N, KV, **sizes,
                               num_warps=2 * warps)
    ends = tile_ends[tiles - 1::tiles].contiguous()                                  # (B * KV * N)
    length = torch.cat([ends[:1], ends.diff()]).view(z, N)
    rows = gather["BLOCK_M"] * gather["CHUNK"]
    chunk_ends = ((length * G + rows - 1) // rows).cumsum(1, dtype=torch.int32)
    chunks = triton.cdiv(Tq * S * G, rows) + N  # at most: the grid must not depend on what was chosen
    N_PAD = max(16, triton.next_power_of_2(N))

    y = torch.empty(B, Tq, H, D, dtype=q.dtype, device=q.device)
    pairs = max(1, min(B * KV, PARTIAL_BYTES // (G * Tq * S * D * q.element_size())))  # of (b, kv) at a time
    part = torch.empty(pairs * Tq * S, G, D, dtype=q.dtype, device=q.device)
    lse = torch.empty(pairs * Tq * S, G, dtype=torch.float32, device=q.device)
    strides, scale = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3]), LOG2E / math.sqrt(D)
    for z0 in range(0, B * KV, pairs):
        here = min(pairs, B * KV - z0)
        moba_gather_kernel[chunks, here](
            q, k, v, lists, ends, chunk_ends, part, lse, *strides, N, KV, z0, scale,
            block_size=block_size, G=G, D=D, N_PAD=N_PAD, **gather)
        moba_finish_kernel[triton.cdiv(Tq, finish["BLOCK_M"]), here * G](
            q, k, v, place, ends, start, part, lse, y, *strides, Tq, Tk, N, KV, z0, scale, block_size,
            G=G, D=D, S=S, **finish)
    return y


@moba_attend.register_fake
def _(q, k, v, chosen, start, block_size):
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def check_inputs(q, k, start):
    """What both launchers cover."""
    (B, _, H, D), KV = q.shape, k.shape[2]
    assert k.shape[0] == B and k.shape[3] == D and H % KV == 0, f"q {q.shape} and k {k.shape} do not go together"
    assert D in (16, 32, 64, 128), f"head width {D=}: must be 16, 32, 64 or 128"
    assert q.dtype == k.dtype and q.dtype in (torch.bfloat16, torch.float32), f"q {q.dtype}, k {k.dtype}: bf16 or fp32"
    assert q.stride(3) == k.stride(3) == 1, f"channels must be contiguous: strides {q.stride()}, {k.stride()}"
    assert start.shape == (B,) and start.dtype == torch.int64, f"start: {start.shape}, {start.dtype}, not ({B},) int64"
