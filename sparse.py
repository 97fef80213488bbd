"""
Query-aware KV sparsity: which few keys a query may read. Every method is the same two lines (arXiv
2605.28640):

    I = TopK_i s(q_sel, rho(K_i))         Eq. 3, selection: rho sums up candidate i, s scores it
    y = softmax(q K_I^T / sqrt(D)) V_I    Eq. 4, computation: attention to what was selected

They differ in what a candidate is, in rho, in who asks, and in which phase they are sparse:

    method   candidate  rho                      q_sel                  prefill  cache     decode
    Quest    block      min and max per channel  the query itself       dense    all       sparse
    MoBA     block      mean of the keys         the query itself       sparse   all       dense
    SnapKV   token      the key itself           prompt's last queries  dense    selected  the rest
    Dilated  token      none: a fixed pattern    none                   sparse   all       sparse

Two more show what else a method can change: TopP is Quest with a budget that adapts, SlidingSnapKV
is SnapKV that goes on choosing while the answer is written.

A method is four hooks; the class Dense has the dense form of each, a method overrides what it
changes:

    prefill(q, k, v, start, dice) -> y, selected     attention over a prompt, or a chunk of one
    compress(q, k, v, lengths, dice) -> positions    which of its entries stay; None: all
    decode(q, cache) -> y, selected                  one query against a cache.LayerCache
    evict(q, cache) -> slots                         what stays when a further step comes; None: all

`selected` says what was read: true positions (B, KV, S) in decode, blocks (B, KV, Tq, S) in
prefill, -1 for none, None where it is everything or is not told (Dilated.prefill). It is what H1
looks at, and what a budget is held to: a method of your own must tell the truth in it. k and v are
the remembered k~ and v~ (memory.py) where the model has a memory: a method need not know.

A budget is in tokens per query, KV head and layer. It holds in the phase that the method changes,
and includes all that it reads or keeps there: forced blocks, the window. A slot is a place in the
cache: a token's position, until SnapKV closes the gaps. `dice` (B, Tq) are integers that hash a
row's tokens so far and the layer: only the random selectors of H2 read them, as their source of
chance.

Selection is per KV head: scores are averaged over the G query heads of its group (per_kv_head).
The originals know no groups: they repeat k and v up to H heads and select for each. Checked against
them in tests/test_sparse.py.

What is written here is the definition, in plain PyTorch. On a GPU triton_ops/selectors.py computes
the same in Triton, as long as it is the same: whatever a fork changes here, or a subclass
overrides, is computed as it is written. Read niah.py next for what the methods are asked to find.

Letters: B batch, Tq queries, Tk cache slots, H query heads, KV key/value heads, G = H // KV,
D head width, N blocks, S selected.
"""
import math
from dataclasses import dataclass, fields, replace

import torch
from torch.nn import functional as F

from infra.spelling import check, check_blocks, check_settings, check_type, of_text, to_text

NEVER, ALWAYS = -math.inf, math.inf  # scores of what must not and what must be selected
HOOKS = "prefill", "compress", "decode", "evict"


# ---------------------------------------------------------------- what all methods share

def attend(q, k, v, keep=None, causal=False):
    """
    Eq. 4. q: (B, Tq, H, D), k, v: (B, Tk, KV, D) -> (B, Tq, H, D).

    keep: bool, broadcastable to (B, H, Tq, Tk), True where a query may read; causal: the last query
    reads all, the one before it all but one, and so on (Tq must be Tk).
    """
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
        attn_mask=keep, is_causal=causal, enable_gqa=q.shape[2] != k.shape[2])
    return y.transpose(1, 2)


def attend_to_slots(q, k, v, slots):
    """Eq. 4 for one query (B, 1, H, D) over the slots (B, KV, S) of each KV head, -1 for none."""
    B, _, H, D = q.shape
    KV, S = slots.shape[1:]
    index = slots.clamp_min(0).transpose(1, 2).unsqueeze(-1).expand(B, S, KV, D)  # (B, S, KV, D)
    keep = (slots >= 0).repeat_interleave(H // KV, dim=1).unsqueeze(2)            # (B, H, 1, S)
    return attend(q, k.gather(1, index), v.gather(1, index), keep)


def query_slots(q, start):
    """The slot of each query, (1 or B, Tq). start: that of the first, an int or one a row (B,)."""
    start = torch.as_tensor(start, device=q.device).view(-1, 1)
    return start + torch.arange(q.shape[1], device=q.device)


def up_to_queries(q, k, v, start):
    """
    k, v without what stands behind each row's last query: cut off, or zeros where rows differ. A
    NaN there would not go away with weight 0.
    """
    if isinstance(start, int):
        return k[:, :start + q.shape[1]], v[:, :start + q.shape[1]]
    slot = torch.arange(k.shape[1], device=q.device)
    behind = slot > query_slots(q, start)[:, -1:]  # (B, Tk)
    return tuple(x.masked_fill(behind[..., None, None], 0) for x in (k, v))


def per_kv_head(scores, KV):
    """Average (B, H, ...) over each KV head's query heads: (B, KV, ...). Or take a max here."""
    return scores.unflatten(1, (KV, -1)).mean(dim=2)


def top(scores, S):
    """Eq. 3's TopK: the S best of the last dim, as indices, -1 where fewer may be selected."""
    best, index = scores.topk(min(S, scores.shape[-1]), dim=-1)
    return torch.where(best == NEVER, -1, index)


def to_blocks(x, block_size):
    """(B, T, ...) -> (B, N, block_size, ...), padded with zeros."""
    pad = -x.shape[1] % block_size
    x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, pad))
    return x.unflatten(1, (-1, block_size))


def block_bounds(k, filled, block_size):
    """
    Each block's least and greatest key, per channel. k: (B, Tk, KV, D), filled: (B, Tk) ->
    low, high (B, N, KV, D); of a block without keys, anything.
    """
    filled = to_blocks(filled, block_size)[..., None, None]  # (B, N, block, 1, 1)
    k = to_blocks(k, block_size)                             # (B, N, block, KV, D)
    k = k.where(filled, k[:, :, :1])  # a slot not filled yet repeats the block's first
    return k.amin(2), k.amax(2)


# ---------------------------------------------------------------- the methods

@dataclass(frozen=True)
class Dense:
    """Every query reads every entry before it and its own."""

    # A seed, in methods that select: scores are drawn by chance instead (H2). Forced entries stay.
    random = None

    # True in a class of your own whose `decode` waits for no result and changes nothing in Python:
    # then a GPU replays its steps as a CUDA graph, as it does with the methods of this file. Two
    # objects that are equal share a graph: what `decode` depends on must be in the fields.
    in_graph = False

    def prefill(
        self,
        q,      # (B, Tq, H, D)   after RoPE
        k, v,   # (B, Tk, KV, D)  the cache so far, these tokens included
        start,  # int or (B,)     the slot of the first query
        dice,   # (B, Tq)
    ):          # -> y (B, Tq, H, D), selected (None: everything)
        if isinstance(start, int) and start == 0:
            return attend(q, k, v, causal=True), None
        k, v = up_to_queries(q, k, v, start)
        slot = torch.arange(k.shape[1], device=q.device)
        keep = slot <= query_slots(q, start)[:, None, :, None]  # (1 or B, 1, Tq, Tk)
        return attend(q, k, v, keep), None

    def compress(
        self,
        q,        # (B, W, H, D)    the last queries of the prompt, the very last at the end
        k, v,     # (B, Tk, KV, D)
        lengths,  # (B,)            tokens in each row's prompt
        dice,     # (B, 1)
    ):            # -> positions (B, KV, S) that stay, ascending, -1 at the end; None: all stay
        """What k and v hold from lengths on may be anything. S follows from Tk and the budget."""
        return None

    def decode(
        self,
        q,      # (B, 1, H, D)
        cache,  # cache.LayerCache: k, v (B, Tk, KV, D); used (B,) slots filled per row, the
                # query's own token included; filled_slots() (B, Tk); positions_of(slots), which
                # `selected` is told in, as slots are no positions once SnapKV has dropped entries
    ):          # -> y (B, 1, H, D), selected (B, KV, S) positions (None: everything)
        """
        What k and v hold from `used` on may be anything finite. With `in_graph` they are all slots
        of the cache, so that no shape changes from step to step.
        """
        if not cache.ragged:
            return attend(q, cache.k, cache.v), None
        return attend(q, cache.k, cache.v, cache.filled_slots()[:, None, None]), None

    def evict(
        self,
        q,      # (B, W, H, D)  each row's last queries, the very last at the end
        cache,  # cache.LayerCache, as in decode: what is there before the step's own token
    ):          # -> slots (B, KV, S) that stay, ascending, -1 at the end; None: all stay
        """Asked before each decoding step. S follows from `used` and the settings alone."""
        return None


@dataclass(frozen=True)
class Quest(Dense):
    """
    Reads the blocks whose keys could give the query the largest product (arXiv 2406.10774; it says
    page for block).

    score = sum_d max(q[d] * min_d, q[d] * max_d): no key of the block, whose channels lie between
    min_d and max_d, can exceed it. Blocks are fixed by slot, so the last one may be partly filled.
    """
    budget: int = 256          # tokens a query may read, a multiple of block_size
    block_size: int = 64
    keep_first: bool = True    # always read the first block, and
    keep_current: bool = True  # the query's own: the paper forces both, the released code neither
    random: int | None = None  # seed

    def __post_init__(self):
        check_blocks(label_of(self), self, forced=self.keep_first + self.keep_current)

    def score(self, q, k, filled):
        """q: (B, 1, H, D), k: (B, Tk, KV, D), filled: (B, Tk) -> (B, KV, 1, N)"""
        return self.score_bounds(q, *block_bounds(k, filled, self.block_size))

    def score_bounds(self, q, low, high):
        """q: (B, 1, H, D), each block's bounds: (B, N, KV, D) -> (B, KV, 1, N)"""
        (B, _, _, D), KV = q.shape, low.shape[2]
        low, high = (x.float().transpose(1, 2) for x in (low, high))  # (B, KV, N, D)
        q = q.float().view(B, KV, -1, D).transpose(2, 3)              # (B, KV, D, G)
        # max(q * low, q * high) is q * high where q > 0, q * low where q < 0: two matrix products
        bound = high @ q.clamp_min(0) + low @ q.clamp_max(0)          # (B, KV, N, G)
        return per_kv_head(bound.transpose(2, 3).flatten(1, 2), KV).unsqueeze(2)

    def forced(self, scores, used):
        """Scores (B, KV, 1, N) with what must and must not be read marked."""
        block = torch.arange(scores.shape[-1], device=scores.device)
        current = ((used - 1) // self.block_size)[:, None, None, None]  # (B, 1, 1, 1)
        scores = scores.masked_fill(block > current, NEVER)
        if self.keep_first:
            scores = scores.masked_fill(block == 0, ALWAYS)
        if self.keep_current:
            scores = scores.masked_fill(block == current, ALWAYS)
        return scores

    def choose(self, q, cache):
        """q: (B, 1, H, D) -> the blocks to read, (B, KV, S), -1 for none"""
        KV, N = cache.k.shape[2], math.ceil(cache.k.shape[1] / self.block_size)
        if self.random is None:
            scores = self.score(q, cache.k, cache.filled_slots())
        else:
            scores = chance(cache.dice, self.random, KV, N)
        return top(self.forced(scores, cache.used), self.budget // self.block_size).squeeze(2)

    def slots_of(self, chosen, used):
        """The entries of chosen blocks (B, KV, S): slots (B, KV, S * block), -1 for none"""
        within = torch.arange(self.block_size, device=chosen.device)
        slots = chosen.unsqueeze(-1) * self.block_size + within
        unread = (chosen < 0).unsqueeze(-1) | (slots >= used[:, None, None, None])
        return slots.masked_fill(unread, -1).flatten(2)

    def decode(self, q, cache):
        slots = self.slots_of(self.choose(q, cache), cache.used)
        return attend_to_slots(q, cache.k, cache.v, slots), cache.positions_of(slots)


@dataclass(frozen=True)
class TopP(Quest):
    """
    Quest with a budget that adapts to head and query: of what Quest chooses, the fewest entries
    whose attention comes to a share p of it (Twilight, arXiv 2502.02770).

    So budget is a cap, and how many are attended to is measured: one entry where that has all the
    attention, perhaps all that were chosen where it is spread. To choose, all keys under the cap
    are read. The original reads four bits of each, and chooses for each query head.
    """
    p: float = 0.85

    in_graph = True

    def __post_init__(self):
        super().__post_init__()
        check(0 < self.p <= 1, f"{label_of(self)}: p={self.p} must be above 0 and at most 1")

    def decode(self, q, cache):
        slots = self.slots_of(self.choose(q, cache), cache.used)
        slots = slots.where(self.enough(self.attention(q, cache.k, slots)), -1)
        return attend_to_slots(q, cache.k, cache.v, slots), cache.positions_of(slots)

    def attention(self, q, k, slots):
        """q: (B, 1, H, D), k: (B, Tk, KV, D), slots: (B, KV, S) or -1 -> shares (B, KV, S)"""
        (B, _, H, D), KV = q.shape, k.shape[2]
        index = slots.clamp_min(0).unsqueeze(-1).expand(-1, -1, -1, D)
        k = k.transpose(1, 2).gather(2, index).float()                        # (B, KV, S, D)
        logits = q.float().view(B, KV, H // KV, D) @ k.mT / math.sqrt(D)      # (B, KV, G, S)
        p = logits.masked_fill(slots.unsqueeze(2) < 0, NEVER).softmax(-1)
        return per_kv_head(p.flatten(1, 2), KV)

    def enough(self, share):
        """Shares (..., S) -> bool (..., S), True for the largest, until they come to p"""
        largest, order = share.sort(dim=-1, descending=True)
        before = largest.cumsum(-1) - largest  # the largest is always read
        return torch.empty_like(order, dtype=torch.bool).scatter(-1, order, before < self.p)


@dataclass(frozen=True)
class MoBA(Dense):
    """
    Reads the blocks whose mean key is closest to the query, in prefill and training (arXiv
    2502.13189).

    score = q . mean(keys of the block), over complete earlier blocks. The query's own block is
    always read, causally, and counts: budget 256 with block_size 64 is the own block and the three
    best others, the first among them if kept.
    """
    budget: int = 256
    block_size: int = 64
    keep_first: bool = True    # the paper's rule; the original forces the query's own block alone
    random: int | None = None  # seed

    def __post_init__(self):
        check_blocks(label_of(self), self, forced=1 + self.keep_first)

    def score(self, q, k):
        """q: (B, Tq, H, D), k: (B, Tk, KV, D) -> (B, KV, Tq, N)"""
        # The last block may be incomplete: its mean is wrong, and never used, as it can only be a
        # query's own. Keys are divided before they are summed: a sum of large ones might overflow.
        mean = to_blocks(k.float() / self.block_size, self.block_size).sum(2)  # (B, N, KV, D)
        mean = mean.repeat_interleave(q.shape[2] // k.shape[2], dim=2)         # (B, N, H, D)
        return per_kv_head(torch.einsum("bthd,bnhd->bhtn", q.float(), mean), k.shape[2])

    def forced(self, scores, slot):
        """Scores (B, KV, Tq, N) with what must and must not be read marked; slot (1 or B, Tq)."""
        block = torch.arange(scores.shape[-1], device=scores.device)
        current = (slot // self.block_size)[:, None, :, None]  # (1 or B, 1, Tq, 1)
        scores = scores.masked_fill(block > current, NEVER).masked_fill(block == current, ALWAYS)
        return scores.masked_fill(block == 0, ALWAYS) if self.keep_first else scores

    def choose(self, q, k, start, dice):
        """q: (B, Tq, H, D) -> the blocks that each query reads, (B, KV, Tq, S), -1 for none"""
        KV, N = k.shape[2], math.ceil(k.shape[1] / self.block_size)
        if self.random is None:
            scores = self.score(q, k)
        else:
            scores = chance(dice, self.random, KV, N)
        return top(self.forced(scores, query_slots(q, start)), self.budget // self.block_size)

    def prefill(self, q, k, v, start, dice):
        chosen = self.choose(q, k, start, dice)       # (B, KV, Tq, S)
        Tk, slot = k.shape[1], query_slots(q, start)  # (1 or B, Tq)
        k, v = up_to_queries(q, k, v, start)
        y = []
        # in parts: a mask of all queries by all keys would be huge
        for t in range(0, q.shape[1], 256):
            part, end = slice(t, t + 256), Tk
            if isinstance(start, int):
                end = min(start + t + 256, Tk)
            y.append(self.attend_to_blocks(q[:, part], k[:, :end], v[:, :end],
                                           chosen[:, :, part], slot[:, part]))
        return torch.cat(y, dim=1), chosen

    def attend_to_blocks(self, q, k, v, chosen, slot):
        """Eq. 4 with chosen blocks (B, KV, Tq, S) of the queries in slot (1 or B, Tq)."""
        Tk, KV = k.shape[1:3]
        N = math.ceil(Tk / self.block_size)
        # one more column takes the -1s, then goes
        keep = torch.zeros(*chosen.shape[:-1], N + 1, dtype=torch.bool, device=q.device)
        keep = keep.scatter(-1, chosen.where(chosen >= 0, N), True)[..., :N]  # (B, KV, Tq, N)
        keep = keep.repeat_interleave(self.block_size, dim=-1)[..., :Tk]      # (B, KV, Tq, Tk)
        keep = keep & (torch.arange(Tk, device=q.device) <= slot[:, None, :, None])
        return attend(q, k, v, keep.repeat_interleave(q.shape[2] // KV, dim=1))


@dataclass(frozen=True)
class SnapKV(Dense):
    """
    Keeps the prompt entries that the prompt's last queries attend to most, and drops the rest
    (arXiv 2404.14469).

    score = softmax attention of the last `window` queries to each earlier key, averaged over them,
    then averaged over `kernel` neighbouring keys, so that what stands beside a find stays with it.
    The window itself always stays. Generated tokens come on top of the budget. Kept entries stay in
    the order of the text (the original: of score).
    """
    budget: int = 256          # prompt entries kept, the window included
    window: int = 64
    kernel: int = 5            # odd; averages divide by it at the edges too, as in the original
    random: int | None = None  # seed

    def __post_init__(self):
        check_settings(label_of(self), self)
        label = label_of(self)
        check(self.kernel % 2 == 1, f"{label}: kernel={self.kernel} must be odd, else neighbours "
              "shift by half a token")
        check(self.budget > self.window > 0, f"{label}: budget={self.budget} must exceed "
              f"window={self.window}, which it includes; raise the budget or set window=")

    def score(self, q, k, lengths):
        """q: (B, W, H, D), k: (B, Tk, KV, D) -> (B, KV, Tk), of use before the window"""
        B, Tk, KV, D = k.shape
        W, G = q.shape[1], q.shape[2] // KV
        slot = torch.arange(Tk, device=q.device)
        asker = (lengths - W)[:, None] + torch.arange(W, device=q.device)  # (B, W) slots of q
        k = k.repeat_interleave(G, dim=2)                                  # (B, Tk, H, D)
        logits = torch.einsum("bwhd,bthd->bhwt", q, k).float() / math.sqrt(D)
        unseen = slot > asker[:, None, :, None]                            # (B, 1, W, Tk)
        p = logits.masked_fill(unseen, -torch.finfo(torch.float32).max).softmax(-1)
        # a prompt shorter than the window has fewer queries than W; but then nothing lies before
        # the window either
        before_window = slot < (lengths - W)[:, None, None]
        p = p.mean(2).masked_fill(~before_window, 0)                       # (B, H, Tk)
        return F.avg_pool1d(per_kv_head(p, KV), self.kernel, stride=1, padding=self.kernel // 2)

    def forced(self, scores, lengths):
        """Scores (B, KV, Tk): the window is to be kept, and what lies behind it is not."""
        slot = torch.arange(scores.shape[-1], device=scores.device)
        end = lengths[:, None, None]
        scores = scores.masked_fill(slot >= end - self.window, ALWAYS)
        return scores.masked_fill(slot >= end, NEVER)

    def best(self, S, q, k, lengths, dice):
        """
        q: (B, W, H, D), k: (B, Tk, KV, D) -> slots that stay, ascending, -1 at the end: of each row
        as many as S says, an int or (B,).
        """
        self.check_window(q)
        Tk, KV = k.shape[1:3]
        if self.random is None:
            scores = self.score(q[:, -self.window:], k, lengths)  # (B, KV, Tk)
        else:
            scores = chance(dice, self.random, KV, Tk).squeeze(2)
        if isinstance(S, int):
            chosen = top(self.forced(scores, lengths), S)
        else:
            chosen = top(self.forced(scores, lengths), int(S.max()))
            rank = torch.arange(chosen.shape[2], device=q.device)
            chosen = chosen.masked_fill(rank >= S[:, None, None], -1)
        ascending = chosen.where(chosen >= 0, Tk).sort(dim=-1).values
        return ascending.where(ascending < Tk, -1)

    def compress(self, q, k, v, lengths, dice):
        return self.best(self.budget, q, k, lengths, dice)

    def check_window(self, q):
        check(q.shape[1] >= self.window, f"{label_of(self)}: window={self.window} is more than the "
              f"{q.shape[1]} queries that the cache keeps; make it with new_cache(..., window=)")


@dataclass(frozen=True)
class SlidingSnapKV(SnapKV):
    """
    SnapKV that goes on while the answer is written: as soon as `budget` entries are there, those of
    the answer included, the newest queries choose which budget - every of them stay.

    So entries read or held never exceed the budget, however long the answer. kvpress's
    DecodingPress does the same, but lets `every` entries come on top, and takes the prompt as it is
    until then. With window = kernel = every = 1 the last query alone drops one entry a step, as in
    TOVA (arXiv 2401.06104).
    """
    every: int = 32  # steps from one choice to the next

    def __post_init__(self):
        super().__post_init__()
        check(self.budget - self.window > self.every > 0, f"{label_of(self)}: every={self.every} "
              f"must be positive and leave more of budget={self.budget} than window={self.window}: "
              "set every= or raise the budget")

    def compress(self, q, k, v, lengths, dice):
        return self.best(self.budget - self.every, q, k, lengths, dice)

    def evict(self, q, cache):
        if cache.k.shape[1] < self.budget:  # so many has the longest row
            return None
        S = cache.used.where(cache.used < self.budget, self.budget - self.every)
        return self.best(S, q, cache.k, cache.used, cache.dice)


@dataclass(frozen=True)
class Dilated(Dense):
    """
    A fixed pattern: the last token of every complete chunk of `dilation`, the last `local` before
    the query, the first `initial`, and the query's own. It is RAT+'s sparse inference (arXiv
    2602.18196); with dilation=None it is StreamingLLM (arXiv 2309.17453), with local = initial = 0
    the sparse pass of ARL (memory.arl_passes).

        key j for query i:  j <= i and (i - j <= local or j < initial or (j + 1) % dilation == 0)
    """
    dilation: int | None = 16
    local: int = 256
    initial: int = 4

    def __post_init__(self):
        check_settings(label_of(self), self)
        check(self.dilation is None or self.dilation > 0, f"dilated: dilation={self.dilation} must "
              "be positive, or none")
        check(min(self.local, self.initial) >= 0, f"dilated: local={self.local} and "
              f"initial={self.initial} must not be negative")

    def pattern(self, i, j):
        """Whether query position i reads key position j; i and j broadcast."""
        keep = (i - j <= self.local) | (j < self.initial)
        if self.dilation is not None:
            keep = keep | ((j + 1) % self.dilation == 0)
        return keep & (j <= i)

    def prefill(self, q, k, v, start, dice):
        slot = query_slots(q, start)  # (1 or B, Tq)
        k, v = up_to_queries(q, k, v, start)
        if self.local == 0:  # then all queries share their few keys, but for their own
            with torch.autocast(q.device.type, enabled=False):  # few products: fp32 is affordable
                y = self.attend_to_shared(q.float(), k.float(), v.float(), slot)
                return y.to(v.dtype), None
        keep = self.pattern(slot[:, None, :, None], torch.arange(k.shape[1], device=q.device))
        return attend(q, k, v, keep), None  # keep: (1 or B, 1, Tq, Tk)

    def attend_to_shared(self, q, k, v, slot):
        """The pattern with local=0: M shared keys, and each query's own. -> (B, Tq, H, D)"""
        B, Tk, KV, D = k.shape
        P, every = min(self.initial, Tk), self.dilation
        # the ends of the chunks after P
        ends = range(P + (every - 1 - P) % every, Tk, every) if every else ()
        shared = torch.tensor([*range(P), *ends], dtype=torch.long, device=q.device)  # (M,)
        own = slot.clamp(max=Tk - 1)  # padding may stand past the last slot
        own = own.expand(B, -1)[..., None, None].expand(-1, -1, KV, D)      # (B, Tq, KV, D)

        q = q.unflatten(2, (KV, -1)) / math.sqrt(D)                         # (B, Tq, KV, G, D)
        to_shared = torch.einsum("btkgd,bmkd->btkgm", q, k[:, shared])
        not_before = shared >= slot[:, :, None, None, None]  # its own comes by itself
        to_shared = to_shared.masked_fill(not_before, NEVER)
        to_own = (q * k.gather(1, own).unsqueeze(3)).sum(-1, keepdim=True)
        p = torch.cat([to_shared, to_own], dim=-1).softmax(-1)              # (B, Tq, KV, G, M + 1)
        y = torch.einsum("btkgm,bmkd->btkgd", p[..., :-1], v[:, shared])
        y = y + p[..., -1:] * v.gather(1, own).unsqueeze(3)
        return y.flatten(2, 3)

    def reads(self, q, cache):
        """-> which slots the query reads, bool (B, 1, Tk), and as positions (B, KV, Tk), or -1"""
        check(cache.positions is None, "dilated cannot read a compressed cache: its pattern needs "
              "every position")
        slot = torch.arange(cache.k.shape[1], device=q.device)
        keep = self.pattern((cache.used - 1)[:, None, None], slot)
        return keep, torch.where(keep, slot, -1).expand(-1, cache.k.shape[2], -1)

    def decode(self, q, cache):
        keep, selected = self.reads(q, cache)
        return attend(q, cache.k, cache.v, keep.unsqueeze(2)), selected


# ---------------------------------------------------------------- chance, for H2

def randomized(method, seed):
    """The same method with its scores drawn by chance. ValueError for one that selects nothing."""
    check(hasattr(method, "score"), f"{name(method)} has no scores to draw by chance")
    return replace(method, random=seed)


def unseeded(method):
    """The same method without seeds: equally seeded or not, it keeps equally many entries."""
    if type(method) is Compose:
        parts = {part.name: unseeded(getattr(method, part.name)) for part in fields(method)}
        return replace(method, **parts)
    return method if method.random is None else replace(method, random=None)


def dice_of(tokens, position, before=0, real=None):
    """
    A hash of each row's tokens so far: tokens and position (B, T) -> (B, T). before: the hash of
    what a cache holds; real: (B, T), False at padding.
    """
    mixed = (tokens + 1) * 0x1E3779B97F4A7C15 ^ (position + 1) * 0x632BE59BD9B4E019
    if real is not None:
        mixed = mixed * real
    return before + mixed.cumsum(1)


def dice_of_layers(dice, n_layer):
    """Each layer's own: (B, T) -> (L, B, T)"""
    # the factor is large and odd; times the number of layers it is below 2**63
    layer = torch.arange(n_layer, device=dice.device)[:, None, None]
    return dice + 0x9E3779B97F4A7D * layer


def chance(dice, seed, KV, N):
    """Uniform scores (B, KV, Tq, N): a hash (splitmix64) of dice (B, Tq), seed, head, candidate."""
    heads = (seed * KV + torch.arange(KV, device=dice.device))[:, None, None]
    candidates = torch.arange(N, device=dice.device)
    # x starts as a distinct integer per element; int64 products wrap around, as a hash wants it
    x = dice[:, None, :, None] + heads * 0x632BE59BD9B4E019 + candidates * 0x1E3779B97F4A7C15
    for shift, factor in (30, 0x3F58476D1CE4E5B9), (27, 0x14D049BB133111EB):
        x = (x ^ (x >> shift & (1 << 64 - shift) - 1)) * factor
    return (x >> 31 & 0xFFFFFF).float() / 2**24


# ---------------------------------------------------------------- methods of different phases

@dataclass(frozen=True)
class Compose(Dense):
    """One method per hook, e.g. MoBA prefill, SnapKV compression, Quest decoding."""
    prefill_by: Dense = Dense()
    compress_by: Dense = Dense()
    decode_by: Dense = Dense()
    evict_by: Dense = Dense()

    def prefill(self, q, k, v, start, dice):
        return self.prefill_by.prefill(q, k, v, start, dice)

    def compress(self, q, k, v, lengths, dice):
        return self.compress_by.compress(q, k, v, lengths, dice)

    def decode(self, q, cache):
        return self.decode_by.decode(q, cache)

    def evict(self, q, cache):
        return self.evict_by.evict(q, cache)


def compose(*methods):
    """The method whose hooks are those that `methods` override. ValueError if two want the same."""
    hooks = {}
    for method in methods:
        for hook in HOOKS:
            if getattr(type(method), hook) is not getattr(Dense, hook):
                if hook in hooks:
                    raise ValueError(f"{name(hooks[hook])} and {name(method)} both decide {hook}: "
                                     "combine methods of different phases only")
                hooks[hook] = method
    drop = hooks.get("compress") or hooks.get("evict")
    if drop and isinstance(hooks.get("decode"), Dilated):
        raise ValueError(f"dilated cannot follow {name(drop)}: its pattern needs every position")
    return Compose(**{f"{hook}_by": method for hook, method in hooks.items()})


def phases(method):
    """The method (None: dense) as Compose: which part decides each hook."""
    check_type(method or Dense(), Dense, "a method is what parse makes of a text")
    return method if type(method) is Compose else compose(method or Dense())


def drops(method):
    """Whether it drops entries: whether its compress or its evict is another than Dense's."""
    return type(phases(method).compress_by).compress is not Dense.compress or evicts(method)


def evicts(method):
    """Whether it drops entries between steps: whether its evict is another than Dense's."""
    return type(phases(method).evict_by).evict is not Dense.evict


def window_of(*methods):
    """How many of a prompt's last queries a cache must keep for these methods."""
    parts = [part for method in methods
             for part in (phases(method).compress_by, phases(method).evict_by)]
    return max([64] + [getattr(part, "window", 0) for part in parts])


# ---------------------------------------------------------------- methods as text

METHODS = {"dense": Dense, "quest": Quest, "moba": MoBA, "snapkv": SnapKV, "dilated": Dilated,
           "topp": TopP, "sliding": SlidingSnapKV}


def parse(text, context_len):
    """
    A method from a command line: "quest:budget=1/16,block_size=64", or several with "+"
    ("moba:budget=1/8+snapkv").

    A budget is in tokens, or a fraction of context_len (the nominal length of the evaluation, not
    of each prompt). Other values are numbers, true/false or none. ValueError names what is wrong
    and what is allowed.
    """
    check_type(text, str, "a method's text is parsed")
    check_type(context_len, int, "context_len is a number of tokens")
    methods = [of_text(part, context_len, METHODS) for part in text.split("+")]
    return methods[0] if len(methods) == 1 else compose(*methods)


def name(method):
    """The text that parse would turn into this method: "quest:budget=256,block_size=64"."""
    if not isinstance(method, Compose):
        return to_text(method, label_of(method))
    parts = [getattr(method, f"{hook}_by") for hook in HOOKS]
    parts = {id(part): part for part in parts if type(part) is not Dense}
    return "+".join(name(part) for part in parts.values()) or "dense"


def label_of(method):
    """The name in METHODS, or its class's."""
    of_class = {kind: label for label, kind in METHODS.items()}
    return of_class.get(type(method), type(method).__name__.lower())
