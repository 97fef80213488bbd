"""
MoBA's routing: for every query of a prompt, the S blocks that it reads.

    score[n] = q . mean of block n's keys, averaged over the group's query heads
    chosen   = the query's own block, the first if it is forced, and the best of those between

Three kernels: the means; the choice, which a program makes for a tile of queries among up to 4096
blocks, and writes as bits; and the bits as lists of blocks. The attention over these lists is in
moba.py.

The choice is the S-th largest of each query's scores, found by halving an interval of numbers until
exactly as many scores lie above its middle as are needed: all scores stay in registers, and nothing
is sorted. (topk.py searches two bits at a time, for few rows of many scores; here there are many
rows, whose scores are made on the way.)

reference: sparse.MoBA.choose (arXiv 2502.13189, which calls a block a chunk too);
tests/test_kernels.py holds `moba_route` to it. The same inputs give the same bits. kernels.py
explains how a kernel is written here.

Letters as in sparse.py: B batch, Tq queries, Tk slots, H query heads, KV key/value heads,
G = H // KV, D head width, N blocks, S selected. z counts (b, kv). `start` (B,) is the slot of each
row's first query; own = slot // block_size. A query past the last slot (padding) counts as standing
in the last slot.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
ROUTE_SCORES = 32768  # scores a program of moba_route_kernel holds in registers, up to 128 a thread
MOST_BLOCKS = {torch.bfloat16: 4096, torch.float32: 2048}  # beyond, they no longer fit


# ---------------------------------------------------------------- numbers as bits

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


# ---------------------------------------------------------------- the kernels

@triton.jit
def moba_mean_kernel(
    k_ptr,     # (B, Tk, KV, D)  with strides
    mean_ptr,  # (B, KV, N, PARTS, D)
    stride_b, stride_t, stride_h, Tk, N, KV, block_size: tl.constexpr,
    D: tl.constexpr, PARTS: tl.constexpr, BLOCK_T: tl.constexpr,
):
    """
    Mean key of each block.

        mean[n] = sum_i k[n * block_size + i] / block_size        reference: sparse.MoBA.score
    grid   (N, B * KV): one program per block
    tile   k [BLOCK_T, D] streams past, summed into [D]
    bytes  k once; the means are 1 / block_size of that
    dtype  sums in fp32. For bf16 keys the mean leaves as PARTS = 2 bf16 that add up to it, to 16
           bits: two products on tensor cores then score nearly as in fp32. The mean of an
           incomplete last block is wrong, and never used
    """
    n, z = tl.program_id(0), tl.program_id(1)
    b, kv = (z // KV).to(tl.int64), z % KV
    offs_d = tl.arange(0, D)
    total = tl.zeros((BLOCK_T, D), tl.float32)
    for i in range(0, block_size, BLOCK_T):
        inside = i + tl.arange(0, BLOCK_T)
        slot = (n * block_size + inside).to(tl.int64)
        mask_t = (inside < block_size) & (slot < Tk)
        at = k_ptr + b * stride_b + slot[:, None] * stride_t + kv * stride_h + offs_d
        k = tl.load(at, mask=mask_t[:, None], other=0)                              # [BLOCK_T, D]
        total += k.to(tl.float32) * (1 / block_size)  # before the sum, which might overflow
    mean = tl.sum(total, axis=0)                                                    # [D]
    mean_ptr += (z.to(tl.int64) * N + n) * PARTS * D + offs_d
    high = mean.to(mean_ptr.dtype.element_ty)
    tl.store(mean_ptr, high)
    if PARTS == 2:
        tl.store(mean_ptr + D, mean - high.to(tl.float32))


@triton.jit
def moba_route_kernel(
    q_ptr,      # (B, Tq, H, D)         with strides
    mean_ptr,   # (B, KV, N, PARTS, D)
    start_ptr,  # (B,)
    word_ptr,   # (B, KV, Tq, WORDS)    int32: bit n % 32 of word n // 32 is block n
    stride_b, stride_t, stride_h, Tq, Tk, N, KV, block_size: tl.constexpr,
    G: tl.constexpr, D: tl.constexpr, S: tl.constexpr, KEEP_FIRST: tl.constexpr,
    PARTS: tl.constexpr, WORDS: tl.constexpr, ABOVE: tl.constexpr, W: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """
    The best blocks of each query by q . mean, as bits: of those between its own and, if KEEP_FIRST,
    the first. These two are chosen anyway: S - 1 or S - 2 are to be found.

        score[n] = (mean of the group's q) . mean[n]              reference: sparse.MoBA.choose
    The mean over the group's scores is one score of the group's mean query. The cut, the smallest
    score still chosen, is found by bisection: halve an interval of numbers until exactly as many
    scores lie above as are needed.
    grid   (tiles, B * KV): BLOCK_M queries of one KV head. Launched once per width W, a power of
           two: a program goes on if its tile needs more than ABOVE and at most W blocks, so that
           early queries do not pay for the late
    tile   scores [BLOCK_M, W] stay in registers; q and means come in slices of BLOCK_D channels
    cost   about 15 rounds of 2.5 instructions a score (compare, count), and 15 a score for the rest
    dtype  bf16: products of bf16 parts, summed in fp32, good to 16 bits. fp32: products in fp32
    """
    m0, z = tl.program_id(0) * BLOCK_M, tl.program_id(1)
    b, kv = (z // KV).to(tl.int64), z % KV
    start = tl.load(start_ptr + b)
    # own block of the tile's last query
    newest = tl.minimum(start + tl.minimum(m0 + BLOCK_M, Tq) - 1, Tk - 1) // block_size
    if (newest <= ABOVE) | (newest > W):
        return
    offs_m, offs_n = m0 + tl.arange(0, BLOCK_M), tl.arange(0, W)
    mask_m = offs_m < Tq
    own = (tl.minimum(start + offs_m, Tk - 1) // block_size).to(tl.int32)       # [BLOCK_M]
    own = tl.where(mask_m, own, 0)  # past the end: nothing to search

    # The scores. bf16: high + low part of the mean, times q. The mean query of a group is split in
    # two as well, and its low part is multiplied with the high part only.
    slices: tl.constexpr = PARTS if PARTS == 1 or G == 1 else 3
    scores = tl.zeros((BLOCK_M, W), tl.float32)
    offs_d = tl.arange(0, BLOCK_D)
    q_ptr += b * stride_b + kv * G * stride_h
    mean_ptr += z.to(tl.int64) * N * PARTS * D
    for i in range(0, slices * D, BLOCK_D):
        q_d = tl.multiple_of(i % D, BLOCK_D) + offs_d
        mean_d = tl.multiple_of(i % (PARTS * D), BLOCK_D) + offs_d
        q_at = q_ptr + offs_m.to(tl.int64)[:, None] * stride_t + q_d
        mean_at = mean_ptr + offs_n[None, :] * (PARTS * D) + mean_d[:, None]
        mean = tl.load(mean_at, mask=(offs_n < N)[None, :], other=0)            # [BLOCK_D, W]
        q = tl.load(q_at, mask=mask_m[:, None], other=0)                        # [BLOCK_M, BLOCK_D]
        if G > 1:
            group = q.to(tl.float32)
            for g in range(1, G):
                other = tl.load(q_at + g * stride_h, mask=mask_m[:, None], other=0)
                group += other.to(tl.float32)
            q = (group / G).to(q.dtype)
            if i >= 2 * D:
                q = (group / G - q.to(tl.float32)).to(q.dtype)
        scores = tl.dot(q, mean, scores, input_precision="ieee")

    # candidates lie before the own block, and after the first if that is forced
    least: tl.constexpr = 1 if KEEP_FIRST else 0
    need = S - 1 - tl.minimum(own, least)                                       # [BLOCK_M]
    have = tl.maximum(own - least, 0)
    free = (offs_n >= least)[None, :] & (offs_n[None, :] < own[:, None])        # [BLOCK_M, W]
    low = tl.min(tl.where(free, scores, float("inf")), axis=1)
    scores = tl.where(free, scores, float("-inf"))
    high = tl.max(scores, axis=1) + 0.0  # -0.0 becomes 0.0: above it comes a number, not 0.0

    # The cut. Of the scores >= lo there are `above`, at least `need`; of those >= hi fewer. lo and
    # hi are ordered integers, so that halving ends; the first rounds halve the numbers themselves,
    # which is quicker unless scores tie.
    lo, hi = ordered(tl.maximum(low, LOWEST)), ordered(high) + 1  # -inf: what is not free
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
        reached = scores >= unordered(middle)[:, None]
        count = tl.sum(tl.where(reached, 1.0, 0.0), axis=1).to(tl.int32)
        up = open & (count >= need)
        lo = tl.where(up, middle, lo)
        above = tl.where(up, count, above)
        hi = tl.where(open & (count < need), middle, hi)
        open = (above > need) & (hi > lo + 1)
        rounds += 1
    cut = unordered(lo)[:, None]

    # Too many still: several equal the cut. Of those the first stay, left of a bound, which
    # bisection finds too.
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
        late = (scores == cut) & (offs_n[None, :] >= right[:, None])
        scores = tl.where(late, float("-inf"), scores)

    bit = tl.full((W,), 1, tl.uint32) << (offs_n % 32).to(tl.uint32)
    word = tl.reshape(tl.where(scores >= cut, bit[None, :], 0), (BLOCK_M, W // 32, 32))
    word = tl.sum(word, axis=2)                                                 # [BLOCK_M, W / 32]
    offs_w = tl.arange(0, W // 32)
    at = word_ptr + (z.to(tl.int64) * Tq + offs_m)[:, None] * WORDS + offs_w
    tl.store(at, word.to(tl.int32, bitcast=True), mask=mask_m[:, None])


@triton.jit
def moba_unpack_kernel(
    word_ptr,    # (B, KV, Tq, WORDS)  int32
    start_ptr,   # (B,)
    chosen_ptr,  # (B, KV, Tq, S)      int32
    Tq, Tk, KV, block_size: tl.constexpr,
    S: tl.constexpr, S_PAD: tl.constexpr, KEEP_FIRST: tl.constexpr, WORDS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """
    The bits that moba_route_kernel kept, as lists of blocks: ascending, the own block last, then
    -1.

    grid   (cdiv(Tq, BLOCK_T), B * KV)
    tile   chosen [BLOCK_T, S]: place s of a query looks for the word with the s-th set bit, and
           takes the bits before it off
    bytes  chosen once, the words are a few percent of it
    dtype  int32
    """
    z, offs_s = tl.program_id(1), tl.arange(0, S_PAD)[None, :]
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    own = (tl.minimum(tl.load(start_ptr + z // KV) + t, Tk - 1) // block_size).to(tl.int32)
    word_ptr += (z.to(tl.int64) * Tq + t) * WORDS
    one = tl.full((BLOCK_T,), 1, tl.uint32)
    kept = t * 0                                                    # blocks in the words so far
    mine = tl.zeros((BLOCK_T, S_PAD), tl.uint32)                    # the word, and of its bits and
    rank, n = mine.to(tl.int32), mine.to(tl.int32) - 1              # blocks those before
    for i in range(tl.max(own, axis=0) // 32 + 1):
        # words without a block before the own were not written
        word = tl.load(word_ptr + i, mask=(t < Tq) & (i * 32 < own), other=0)
        word = word.to(tl.uint32, bitcast=True)
        word |= tl.where(own // 32 == i, one << (own % 32).to(tl.uint32), 0)
        if KEEP_FIRST:
            word |= tl.where(kept == 0, one, 0)  # in the first word: from then on some are kept
        number = popcount(word)
        here = (offs_s >= kept[:, None]) & (offs_s < (kept + number)[:, None])
        mine = tl.where(here, word[:, None], mine)
        rank = tl.where(here, offs_s - kept[:, None], rank)
        n = tl.where(here, i * 32, n)
        kept += number
    for i in range(tl.max(tl.max(rank, axis=1), axis=0)):
        mine = tl.where(i < rank, mine & (mine - 1), mine)  # without its lowest bit
    n = tl.where(n >= 0, n + popcount((mine - 1) & ~mine), n)
    at = chosen_ptr + (z.to(tl.int64) * Tq + t)[:, None] * S + offs_s
    tl.store(at, n, mask=(offs_s < S) & (t < Tq)[:, None])


# ---------------------------------------------------------------- the launcher

def check_inputs(q, k, start):
    """What the launchers here and in moba.py cover."""
    (B, _, H, D), KV = q.shape, k.shape[2]
    assert k.shape[0] == B and k.shape[3] == D and H % KV == 0, \
        f"q {q.shape} and k {k.shape} do not go together"
    assert q.shape[1] <= k.shape[1], f"more queries than slots: q {q.shape}, k {k.shape}"
    assert D in (16, 32, 64, 128), f"head width {D=}: must be 16, 32, 64 or 128"
    assert q.dtype == k.dtype and q.dtype in (torch.bfloat16, torch.float32), \
        f"q {q.dtype}, k {k.dtype}: bf16 or fp32"
    assert q.stride(3) == k.stride(3) == 1, \
        f"channels must be contiguous: strides {q.stride()}, {k.stride()}"
    assert start.shape == (B,) and start.dtype == torch.int64, \
        f"start: {start.shape}, {start.dtype}, not ({B},) int64"


@torch.library.custom_op("nanorat::moba_route", mutates_args=())
def moba_route(
    q: Tensor,      # (B, Tq, H, D)
    k: Tensor,      # (B, Tk, KV, D)
    start: Tensor,  # (B,) int64: the slot of each row's first query
    block_size: int,
    S: int,         # blocks a query reads at most, the forced ones included
    keep_first: bool,
) -> Tensor:        # (B, KV, Tq, S) int32: blocks, ascending, -1 at the end where there are fewer
    check_inputs(q, k, start)
    B, Tq, H, D = q.shape
    Tk, KV = k.shape[1:3]
    N, parts = triton.cdiv(Tk, block_size), 2 if q.dtype == torch.bfloat16 else 1
    assert S >= min(1 + keep_first, N), f"{S=} leaves no room for the forced blocks ({keep_first=})"
    assert N <= MOST_BLOCKS[q.dtype], \
        f"{N} blocks; a program holds the scores of at most {MOST_BLOCKS[q.dtype]}"
    mean = q.new_empty(B, KV, N, parts, D)
    moba_mean_kernel[N, B * KV](
        k, mean, *k.stride()[:3], Tk, N, KV, block_size,
        D=D, PARTS=parts, BLOCK_T=min(64, triton.next_power_of_2(block_size)), num_warps=4)

    widest = max(32, triton.next_power_of_2(N))
    words = torch.empty(B, KV, Tq, widest // 32, dtype=torch.int32, device=q.device)
    W, above = min(128, widest), -1
    while W <= widest:
        # fp32 products need more registers: fewer queries a tile, and more threads for it
        BLOCK_M = max(16, min(64, ROUTE_SCORES // W) // (1 if parts == 2 else 2))
        num_warps = min(16, max(4, BLOCK_M * W // (4096 if parts == 2 else 2048)))
        # the own block of query t is at least t // block_size: later tiles are wider than W
        tiles = min(triton.cdiv(Tq, BLOCK_M), triton.cdiv((W + 1) * block_size, BLOCK_M))
        moba_route_kernel[tiles, B * KV](
            q, mean, start, words, *q.stride()[:3], Tq, Tk, N, KV, block_size,
            G=H // KV, D=D, S=S, KEEP_FIRST=keep_first, PARTS=parts, WORDS=widest // 32,
            ABOVE=above, W=W, BLOCK_M=BLOCK_M, BLOCK_D=min(64, D, ROUTE_SCORES * parts // W),
            # 64 scores a thread: with 128 registers four programs share an SM
            num_warps=num_warps, num_stages=2, maxnreg=128 if W <= 128 and parts == 2 else None)
        W, above = 2 * W, W

    chosen = torch.empty(B, KV, Tq, S, dtype=torch.int32, device=q.device)
    S_PAD = triton.next_power_of_2(S)
    BLOCK_T = max(1, 4096 // S_PAD)
    moba_unpack_kernel[triton.cdiv(Tq, BLOCK_T), B * KV](
        words, start, chosen, Tq, Tk, KV, block_size, S=S, S_PAD=S_PAD, KEEP_FIRST=keep_first,
        WORDS=widest // 32, BLOCK_T=BLOCK_T, num_warps=4)
    return chosen


@moba_route.register_fake
def _(q, k, start, block_size, S, keep_first):
    return q.new_empty(q.shape[0], k.shape[2], q.shape[1], S, dtype=torch.int32)
