"""
Two hooks of sparse.py sooner on a CPU, in PyTorch.

    Quest.decode   As it is written, each step sums up all blocks anew. Here their bounds are kept
                   from step to step (cache.Cache.bounds_of), so that a step reads them and what it
                   chose.
    MoBA.prefill   As it is written, a mask hides most keys, whose products are computed all the
                   same. Here the queries that chose a block come together, and meet that block
                   alone.

Of the blocks n that a query chose, the second makes one softmax:

    y = sum_n w_n y_n      y_n = softmax(q K_n^T / sqrt(D)) V_n      w = softmax_n(lse_n)
                           lse_n = log sum_t exp(q . k_t / sqrt(D)), t in block n

backend.hook asks for these forms with --kernels=auto, where no gradients are wanted, by the rule of
the kernels: they compute only where all that they stand for is the code of sparse.py. Triton is not
needed. tests/test_on_cpu.py holds each to its definition. The same in Triton: selectors.py.

Letters as in sparse.py: B batch, Tq queries, Tk slots, H query heads, KV key/value heads,
G = H // KV, D head width, N blocks, S selected. P pairs of a row and a KV head, M queries of a
tile.
"""
import math

import torch
from torch.nn import functional as F

import sparse
from triton_ops.backend import QUEST, Form

ROWS = 2**15  # query heads of all blocks at a time: what they make stays in a CPU's caches
TILE = 64     # query heads that meet a block at a time
EXTRA = 90    # keys: to bring queries and a block together costs as much as so many more of them,
              # as measured with heads of 64 channels and prompts of 1,000 to 4,000 tokens


# ---------------------------------------------------------------- Quest

def block_bounds(k, used, block_size):
    """sparse.block_bounds by the slots that each row has filled, used (B,)."""
    filled = torch.arange(k.shape[1], device=k.device) < used[:, None]
    return sparse.block_bounds(k, filled, block_size)


def quest_decode(method, q, cache):
    N = math.ceil(cache.k.shape[1] / method.block_size)  # the cache may have room for more
    low, high = (x[:, :N] for x in cache.bounds_of(method.block_size))
    scores = method.forced(method.score_bounds(q, low, high), cache.used)  # (B, KV, 1, N)
    chosen = sparse.top(scores, method.budget // method.block_size).squeeze(2)
    return quest_read(method, q, cache, chosen)


def quest_decode_chosen(method, q, cache):
    return quest_read(method, q, cache, method.choose(q, cache))


def quest_read(method, q, cache, chosen):
    """The rest of Quest.decode, with chosen blocks (B, KV, S)."""
    slots = method.slots_of(chosen, cache.used)
    return attend_to_slots(q, cache.k, cache.v, slots), cache.positions_of(slots)


def attend_to_slots(q, k, v, slots):
    """sparse.attend_to_slots: a whole key is copied at a time, where gather copies its channels."""
    H, KV = q.shape[2], k.shape[2]
    keep = (slots >= 0).repeat_interleave(H // KV, dim=1).unsqueeze(2)  # (B, H, 1, S)
    return sparse.attend(q, taken(k, slots), taken(v, slots), keep)


def taken(x, slots):
    """x (B, Tk, KV, D) at slots (B, KV, S), -1 for any: (B, S, KV, D)"""
    B, _, KV, D = x.shape
    if x.stride(3) != 1 or any(stride % D for stride in x.stride()[:3]):
        x = x.contiguous()
    rows, slot, head = (stride // D for stride in x.stride()[:3])  # in keys
    index = slots.clamp_min(0).transpose(1, 2) * slot + torch.arange(KV) * head
    index = index + torch.arange(B)[:, None, None] * rows
    keys = x.as_strided((int(index.max()) + 1, D), (D, 1))
    return keys.index_select(0, index.flatten()).view(*index.shape, D)


# ---------------------------------------------------------------- MoBA

def moba_prefill(method, q, k, v, start, dice):
    S = method.budget // method.block_size
    # Where a query reads a large part of the keys, a mask costs less: half as much in bf16, which
    # is fp32 here.
    if S * (method.block_size + EXTRA) > k.shape[1] * v.element_size() / 4:
        return method.prefill(q, k, v, start, dice)
    chosen = method.choose(q, k, start, dice)  # (B, KV, Tq, S)
    slot = sparse.query_slots(q, start)        # (1 or B, Tq)
    k, v = sparse.up_to_queries(q, k, v, start)
    with torch.autocast(q.device.type, enabled=False):
        y = attend_to_blocks(q, k, v, chosen, slot, method.block_size)
    return y.to(v.dtype), chosen


def attend_to_blocks(q, k, v, chosen, slot, block_size):
    """MoBA.attend_to_blocks, with as many queries at a time as ROWS allows."""
    (B, Tq, H, D), (Tk, KV), S = q.shape, k.shape[1:3], chosen.shape[-1]
    dtype, G = torch.promote_types(v.dtype, torch.float32), H // KV
    # a pair of a row and a KV head knows of no other
    q = (q.to(dtype) / math.sqrt(D)).unflatten(2, (KV, G)).transpose(1, 2)  # (B, KV, Tq, G, D)
    k, v = (sparse.to_blocks(x.to(dtype), block_size).permute(0, 3, 1, 2, 4) for x in (k, v))
    slot = slot.clamp_max(Tk - 1)  # padding may stand past the last slot, and what pads k is unread
    slot = slot[:, None].expand(B, KV, Tq)
    q, k, v, chosen, slot = (x.flatten(0, 1) for x in (q, k, v, chosen, slot))

    n_queries = max(1, ROWS // (S * G))
    n_pairs = max(1, n_queries // Tq)
    y = torch.empty(B * KV, Tq, G, D, dtype=v.dtype)
    for first in range(0, B * KV, n_pairs):
        pairs = slice(first, first + n_pairs)
        for t in range(0, Tq, n_queries):
            part = pairs, slice(t, t + n_queries)
            y[part] = in_tiles(q[part], k[pairs], v[pairs], chosen[part], slot[part])
    return y.view(B, KV, Tq, G, D).transpose(1, 2).flatten(2, 3)


def in_tiles(
    q,       # (P, Tq, G, D)      divided by sqrt(D)
    k, v,    # (P, N, block, D)
    chosen,  # (P, Tq, S)         blocks, -1 for none
    slot,    # (P, Tq)            ascending
):           # -> (P, Tq, G, D)
    (P, Tq, G, D), (N, block_size) = q.shape, k.shape[1:3]
    none, chosen = chosen < 0, chosen.clamp_min(0)  # of block 0 instead, the weight will be 0
    block, query, place = tiles_of(chosen, N, max(1, TILE // G))

    # Eq. 4 in each tile
    at = lambda x, index: x.flatten(0, 1).index_select(0, index)
    logits = at(q, query.flatten()).view(len(block), -1, D) @ at(k, block).mT  # (.., M * G, block)
    begin, slot = block % N * block_size, slot.flatten()[query]
    partly = (slot[:, 0] < begin + block_size - 1).nonzero().squeeze(1)  # a query reads not all
    unseen = begin[partly, None, None] + torch.arange(block_size) > slot[partly].unsqueeze(2)
    logits[partly] = logits[partly].masked_fill(unseen.repeat_interleave(G, dim=1), sparse.NEVER)
    p = logits.softmax(-1)
    lse = logits.amax(-1) - p.amax(-1).log()  # (tiles, M * G): p of the greatest is exp(it - lse)
    y = p @ at(v, block)                      # (tiles, M * G, D)

    # and the tiles of each query together
    place = place.unsqueeze(2) * G + torch.arange(G)[:, None]  # (P, Tq, G, S)
    weight = lse.flatten()[place].masked_fill(none.unsqueeze(2), sparse.NEVER).softmax(-1)
    y = F.embedding_bag(place.flatten(0, 2), y.flatten(0, 1), mode="sum",
                        per_sample_weights=weight.flatten(0, 2))
    return y.view(P, Tq, G, D)


def tiles_of(chosen, N, M):
    """
    The queries of a block, in the order of the text, fill tiles of M places. Of its last tile some
    may stay free: the first query of all stands there, and nobody takes what it finds.

    chosen (P, Tq, S) -> block (tiles,), one of P * N, and query (tiles, M), of P * Tq, in each
    tile; and where a query stands for each block that it chose, place (P, Tq, S), of tiles * M.
    """
    P, Tq, _ = chosen.shape
    asks = torch.zeros(P, N, Tq, dtype=torch.bool).scatter_(1, chosen.transpose(1, 2), True)
    asked = asks.flatten().nonzero().squeeze(1)        # (E,) = (p * N + n) * Tq + t
    n_queries = asks.sum(2).flatten()                  # (P * N,)
    n_tiles = (n_queries + M - 1) // M
    each = torch.arange(P * N)
    free = n_tiles.cumsum(0).sub(n_tiles) * M - n_queries.cumsum(0).sub(n_queries)  # before a block
    place = torch.arange(len(asked)) + free.repeat_interleave(n_queries)            # (E,)

    block = each.repeat_interleave(n_tiles)
    query = torch.zeros(len(block) * M, dtype=torch.long)
    query[place] = asked - ((each - each // N) * Tq).repeat_interleave(n_queries)   # p * Tq + t
    place_of = torch.zeros(P * N * Tq, dtype=torch.long).index_copy_(0, asked, place)
    place_of = place_of.view(P, N, Tq).gather(1, chosen.transpose(1, 2)).transpose(1, 2)
    return block, query.view(-1, M), place_of


# As in selectors.py. What the methods of a fork choose is read as soon; a score of its own, or by
# chance, is a part of its choice.
FORMS = {
    (sparse.Quest, "decode"): Form(quest_decode, *QUEST, quest_decode_chosen),
    (sparse.MoBA, "prefill"): Form(
        moba_prefill, "MoBA.prefill MoBA.attend_to_blocks attend query_slots up_to_queries "
        # in_tiles wants the own block among the chosen, and none twice
        "to_blocks MoBA.choose MoBA.forced top", chosen=moba_prefill),
}
