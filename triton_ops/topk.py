"""
Eq. 3's TopK: the S best of a row of scores, by counting instead of sorting.

    cut   = the largest number with count(score >= cut) >= S
    taken = score > cut, and the first of those equal to cut, until there are S

reference: sparse.top, sorted by index; tests/test_kernels.py holds `select` to it. Quest
selects blocks by it and SnapKV entries; the random methods of H2 draw their scores in PyTorch and
meet the kernels here. MoBA, which needs a choice for every query of a prompt, has a search of its
own: moba_route.py.

Letters: N scores of a row, S selected.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_ops.common import await_inputs, early

MOST_SCORES = 2**21 - 1  # of a row: three counts share 63 bits

# Looked up at each launch. A row of up to max_kept keys stays in registers; writing the indices
# takes smaller tiles, of at most max_scan keys, as a running sum needs more registers. As long as
# there are no more than four warps, one for each of an SM's schedulers, a thread has few_keys.
SELECT = dict(max_kept=32768, keys_per_thread=16, few_keys=4, max_warps=32, max_scan=4096)


@triton.jit
def load_keys(scores_ptr, offs, N):
    """
    Scores as unsigned integers of the same order: 0 for -inf (and past the end), 1 for NaN; -0 and
    0 are equal.
    """
    x = tl.load(scores_ptr + offs, mask=offs < N, other=float("-inf"))
    bits = tl.where(x == 0, 0.0, x).to(tl.uint32, bitcast=True)
    # a positive float grows with its bits, a negative one falls
    keys = tl.where(bits >> 31 == 0, bits | 0x80000000, bits ^ 0xFFFFFFFF)
    return tl.where(x == float("-inf"), 0, tl.where(x != x, 1, keys)).to(tl.uint32)


@triton.jit
def counts_of(keys, cut, unit, BITS: tl.constexpr):
    """1 for each of cut + unit, + 2 unit and + 3 unit that a key reaches, side by side in BITS."""
    dtype: tl.constexpr = tl.int32 if 3 * BITS < 32 else tl.int64
    return ((keys >= cut + unit).to(dtype) + ((keys >= cut + 2 * unit).to(dtype) << BITS)
            + ((keys >= cut + 3 * unit).to(dtype) << 2 * BITS))


@triton.jit
def select_kernel(
    scores_ptr,  # (rows, N)  fp32
    index_ptr,   # (rows, S)  int32
    N, S, KEPT: tl.constexpr, BLOCK: tl.constexpr, SCAN: tl.constexpr, EARLY: tl.constexpr,
):
    """
    TopK by the S-th largest score, found two bits at a time; no sorting.

        cut   = the largest integer with count(key >= cut) >= S: 16 rounds of three counts each,
                fewer if a count is S exactly
        taken = key > cut, and of those equal to cut the first ones, until there are S
    The key of a score is an integer that orders as the score does (load_keys). An index is written
    at its rank, the number of taken ones before it, so the list comes out ascending.
    reference: sparse.top, sorted by index. There, torch leaves open which of equal scores it takes,
    and takes NaN first
    grid   (rows,)
    tile   KEPT: the row's keys [BLOCK], in registers for all rounds; else tile by tile, from L2 in
           each round. The indices are written in tiles [SCAN]
    bytes  4 * N per row, twice if KEPT. What counts is the rounds' latency: a count is a sum over
           the whole program
    dtype  exact on fp32
    """
    row = tl.program_id(0).to(tl.int64)
    scores_ptr += row * N
    index_ptr += row * S
    offs = tl.arange(0, BLOCK)
    await_inputs(EARLY)
    if KEPT:
        kept = load_keys(scores_ptr, offs, N)

    # The cut, from its highest bits to its lowest: of 0 to 3 in two bits, the largest that enough
    # keys still reach. The three counts are one sum, as summing over the program takes longest.
    BITS: tl.constexpr = 10 if KEPT and BLOCK <= 512 else 21
    cut = tl.full((), 0, tl.uint32)
    unit = tl.full((), 0x40000000, tl.uint32)
    count = N + S  # those >= cut, once that is less than all
    while (unit > 0) & (count != S):
        if KEPT:
            counts = tl.sum(counts_of(kept, cut, unit, BITS))
        else:
            hits = counts_of(load_keys(scores_ptr, offs, N), cut, unit, BITS)
            for start in range(BLOCK, N, BLOCK):
                hits += counts_of(load_keys(scores_ptr, start + offs, N), cut, unit, BITS)
            counts = tl.sum(hits)
        before = cut
        for i in tl.static_range(3):
            more = (counts >> i * BITS & (1 << BITS) - 1).to(tl.int32)
            cut = tl.where(more >= S, before + (i + 1) * unit, cut)
            count = tl.where(more >= S, more, count)
        unit = unit >> 2
    cut = tl.maximum(cut, 1)  # 0 is not to be selected: fewer than S are

    # How many of the keys that equal the cut are taken: what the larger ones leave of S.
    if KEPT:
        above = tl.sum((kept > cut).to(tl.int32))
    else:
        hits = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, N, BLOCK):
            hits += (load_keys(scores_ptr, start + offs, N) > cut).to(tl.int32)
        above = tl.sum(hits)
    room = S - above

    # The indices, each at its rank.
    larger, equal = 0, 0  # in the tiles before
    offs = tl.arange(0, SCAN)
    for start in range(0, N, SCAN):
        keys = load_keys(scores_ptr, start + offs, N)
        # one running sum for two counts: the larger in the low 16 bits, the equal in the high ones
        both = (keys > cut).to(tl.uint32) + ((keys == cut).to(tl.uint32) << 16)
        upto = tl.cumsum(both, axis=0)                       # [SCAN], itself included
        larger_upto = larger + (upto & 0xFFFF).to(tl.int32)
        equal_upto = equal + (upto >> 16).to(tl.int32)
        taken = (keys > cut) | ((keys == cut) & (equal_upto <= room))
        at = index_ptr + larger_upto + tl.minimum(equal_upto, room) - 1
        tl.store(at, start + offs, mask=taken)
        total = tl.sum(both)
        larger += (total & 0xFFFF).to(tl.int32)
        equal += (total >> 16).to(tl.int32)

    # -1 behind them, if scores of -inf left fewer than S.
    found = larger + tl.minimum(equal, room)
    for start in range(0, S, SCAN):
        rank = start + offs
        none = tl.full((SCAN,), -1, tl.int32)
        tl.store(index_ptr + rank, none, mask=(rank >= found) & (rank < S))


@torch.library.custom_op("nanorat::select", mutates_args=())
def select(
    scores: Tensor,  # (..., N)  fp32
    S: int,
) -> Tensor:         # (..., S)  int32: the S best, ascending, -1 at the end where fewer than S
                     #           are above -inf
    """
    Of equal scores the first ones. NaN is below all numbers, but above -inf: a row of NaNs selects
    as many entries as any other row, and a NaN displaces no forced one.
    """
    N = scores.shape[-1]
    assert scores.dtype == torch.float32, f"scores are {scores.dtype}, not float32"
    assert N > 0 and S > 0, f"cannot select {S=} of {N=}"
    assert N <= MOST_SCORES, f"{N=} scores, of which a row has at most {MOST_SCORES:,}"
    scores = scores.contiguous()
    index = scores.new_empty(*scores.shape[:-1], S, dtype=torch.int32)

    KEPT = N <= SELECT["max_kept"]
    BLOCK = max(32, triton.next_power_of_2(N)) if KEPT else SELECT["max_kept"] // 2
    num_warps = max(min(4, BLOCK // (32 * SELECT["few_keys"])),
                    BLOCK // (32 * SELECT["keys_per_thread"]), 1)
    select_kernel[scores.numel() // N,](
        scores, index, N, S, KEPT=KEPT, BLOCK=BLOCK, SCAN=min(BLOCK, SELECT["max_scan"]),
        num_warps=min(num_warps, SELECT["max_warps"]), **early(scores))
    return index


@select.register_fake
def _(scores, S):
    return scores.new_empty(*scores.shape[:-1], S, dtype=torch.int32)
