"""
Two other choosers between which a selector's own choice lies: one that knows where the needle is,
and one that draws once.

    oracle   the same forced entries, then the needle's, then the best by the method's own score:
             what the budget would allow a score that finds every needle
    Frozen   random Quest whose draw is kept for the whole answer. sparse.randomized(Quest) draws
             anew at each step and reads other blocks each time; random SnapKV draws once

All that a method reads beside its choice, its budget and the phase that it changes stay as they
are. Both are methods like any other, for eval_niah.answer and ways.evaluate:

    method, needles = sparse.parse("quest:budget=1/16", 4096), Needles(examples, tokenizer)
    asked = [method, oracle(method, needles), Frozen(method.budget, 64, random=0)]
    ways.evaluate(model, tokenizer, examples, asked)

An oracle knows a prompt by the hash of its tokens (sparse.dice_of), so the examples may come in any
batch and order. Checked in tests/test_oracle.py. Read swap.py next.

Letters: B batch, T tokens, KV key/value heads, N candidates, M examples, L layers.
"""
import copy
import math
from dataclasses import dataclass

import torch
from torch.nn import functional as F

import niah
import sparse
from infra.spelling import check
from sparse import Compose, Dense, MoBA, Quest, SnapKV, chance, dice_of, dice_of_layers, top
from triton_ops import backend


# ---------------------------------------------------------------- a draw that is kept

@dataclass(frozen=True)
class Frozen(Quest):
    """
    Quest whose blocks are drawn by chance once for each row, layer and KV head (random: the seed),
    among those that the prompt fills. Forced blocks stay: the first, and the current one, which
    moves on as the answer grows. A block that the answer has filled is read again only where the
    prompt has too few for the budget.

    ValueError, when it is asked, without a seed and behind SnapKV, which moves entries to other
    blocks.
    """
    in_graph = True

    def choose(self, q, cache):
        check(self.random is not None, "frozen: there is no draw without a seed: give random=0, or "
              "another")
        check(cache.positions is None, "frozen: entries were dropped, and blocks are no more those "
              "of the prompt: ask it without SnapKV")
        KV, N = cache.k.shape[2], math.ceil(cache.k.shape[1] / self.block_size)
        lengths, dice = cache.prompt()
        scores = chance(dice, self.random, KV, N)  # (B, KV, 1, N), from 0 to 1
        block = torch.arange(N, device=scores.device)
        later = block >= (lengths // self.block_size)[:, None, None, None]
        scores = self.forced(scores.masked_fill(later, -1), cache.used)
        return top(scores, self.budget // self.block_size).squeeze(2)


# ---------------------------------------------------------------- a method with another score

# Of the methods that select, the phase in which they do.
SELECTS = {Quest: "decode", MoBA: "prefill", SnapKV: "compress"}


def selects_in(method):
    """"decode" for a Quest, "prefill" for a MoBA, "compress" for a SnapKV; ValueError for others"""
    known = not sparse.evicts(method) and not isinstance(method, sparse.TopP)
    for kind, phase in SELECTS.items():
        if known and isinstance(method, kind):
            return phase
    raise ValueError(f"{sparse.name(method)} has no score to exchange: give a quest, a moba or a "
                     "snapkv")


def scored(method, score):
    """The method with this score(q, k, ...) in place of its own. Kernels see that, and ask it."""
    own = copy.copy(method)
    object.__setattr__(own, "score", score)  # past the class, as a frozen dataclass wants it
    return own


@dataclass(frozen=True)
class Around(Dense):
    """A method inside another one, which shows its budget to those who measure what is read."""
    method: Dense

    budget = property(lambda self: self.method.budget)
    block_size = property(lambda self: self.method.block_size)
    window = property(lambda self: self.method.window)


# ---------------------------------------------------------------- where the needles are

def needles_of(example, tokenizer):
    """
    [start, end) tokens of each answer's needle, in their order: its sentence up to the value, or
    the value alone in a text that is worded otherwise.
    """
    opening, places = niah.NEEDLE.partition("{")[0], []
    for answer in example.answers:
        start, end = niah.place_of(answer, example.prompt, example.task)
        sentence = example.prompt.rfind(opening, 0, start)
        if sentence >= 0 and "." not in example.prompt[sentence:start]:
            start = sentence
        places.append((start, end))
    return niah.token_spans(example.prompt, example.ids, places, tokenizer)


class Needles:
    """
    The needles of M examples, to be looked up by a prompt's dice. places: what needles_of says of
    each example; lengths: of the prompts, in tokens.
    """

    def __init__(self, examples, tokenizer):
        self.places = [needles_of(e, tokenizer) for e in examples]
        self.lengths = [len(e.ids) for e in examples]
        most_layers, ends = 128, []
        # of a token its place in the list of all that the needles take, inf outside
        self.ranks = torch.full((len(examples), max(self.lengths)), math.inf)
        for row, e, places in zip(self.ranks, examples, self.places):
            n = 0
            for start, end in places:
                row[start:end] = row[start:end].minimum(torch.arange(n, n + end - start).float())
                n += end - start
            ids = torch.tensor([e.ids])
            ends.append(dice_of(ids, torch.arange(len(e.ids))[None])[:, -1])
        self.dice = dice_of_layers(torch.stack(ends).T, most_layers)[:, 0]  # (L, M)

    def of(self, dice, n):
        """Ranks (B, n) of the tokens of rows whose prompts end with a layer's dice (B, 1)."""
        self.ranks, self.dice = self.ranks.to(dice.device), self.dice.to(dice.device)
        same = (self.dice == dice[:, :, None]).any(1)  # (B, M)
        if not (dice.is_cuda and torch.cuda.is_current_stream_capturing()):  # else asked before
            check(bool(same.any(1).all()), "oracle: a prompt is none of the examples that it was "
                  "told: make it of those that are asked, and feed each prompt whole")
        ranks = self.ranks[same.int().argmax(1)]       # (B, longest)
        return F.pad(ranks, (0, n - ranks.shape[1]), value=math.inf)

    def __str__(self):  # in a method's name
        return f"of {len(self.ranks)} examples"


def first(scores, ranks):
    """Scores (B, KV, ..., N) with those that have a rank (B, N) above all others, in its order."""
    ranks = ranks.view(len(ranks), *[1] * (scores.dim() - 2), -1)
    return (torch.finfo(torch.float32).max / (1 + ranks)).where(ranks < math.inf, scores)


# ---------------------------------------------------------------- the oracle

@dataclass(frozen=True)
class Oracle(Around):
    """The phase in which a method selects, by one that knows the needles. `oracle` makes it."""
    needles: Needles
    in_graph = True

    def told(self, dice, Tk):
        """The method of a prompt whose last token has these dice (B, 1), in a cache of Tk slots."""
        ranks, own = self.needles.of(dice, Tk), self.method
        if hasattr(own, "block_size"):  # a block comes when its first token does
            size = own.block_size
            ranks = F.pad(ranks, (0, -Tk % size), value=math.inf).unflatten(1, (-1, size)).amin(2)
        return scored(own, lambda *inputs: first(own.score(*inputs), ranks))

    def prefill(self, q, k, v, start, dice):
        told = self.told(dice[:, -1:], k.shape[1])
        return backend.hook(told, "prefill", v)(q, k, v, start, dice)

    def compress(self, q, k, v, lengths, dice):
        told = self.told(dice, k.shape[1])
        return backend.hook(told, "compress", k)(q, k, v, lengths, dice)

    def decode(self, q, cache):
        told = self.told(cache.prompt()[1], cache.k.shape[1])
        return backend.hook(told, "decode", q)(q, cache)


def oracle(method, needles):
    """
    A Quest, MoBA or SnapKV that knows these Needles: it reads, or keeps, first what it is forced
    to, then the needles, in the order of their answers, then what its own score prefers. Where the
    needles take more than the budget it is those that fit, and left_out counts the others. A token
    before the needle reads none of it.

    Each prompt must be one of the needles' examples, and be fed whole. ValueError for another
    method, and for one that draws by chance.
    """
    phase = selects_in(method)
    check(method.random is None, f"{sparse.name(method)} draws by chance and asks no score: give "
          "one without random=")
    return Compose(**{f"{phase}_by": Oracle(method, needles)})


def left_out(method, needles):
    """
    How many answers have a needle that the oracle of this method cannot read or keep whole, as the
    budget is too small for it behind those before it. The block in which the answer is written
    takes one of the budget's, too.
    """
    phase, size, n = selects_in(method), getattr(method, "block_size", 1), 0
    for places, length in zip(needles.places, needles.lengths):
        free, room = {0}, method.budget // size
        if phase == "compress":
            free = set(range(length - method.window, length))
            room -= method.window
        else:
            room -= method.keep_first + (phase == "prefill" or method.keep_current)
            free = free if method.keep_first else set()
        blocks = [range(start // size, (end - 1) // size + 1) for start, end in places]
        wanted = dict.fromkeys(i for needle in blocks for i in needle if i not in free)
        read = free.union(list(wanted)[:room])
        n += sum(not read.issuperset(needle) for needle in blocks)
    return n
