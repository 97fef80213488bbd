"""
Does a memory help a selector to choose (Eq. 3), or does it help what is read (Eq. 4)? One trained
model, in which either may be taken away at the moment of asking.

    I = TopK_i s(q, rho(K_i))             K of "by": k~ as the memory made it, or k as it came
    y = softmax(q K_I^T / sqrt(D)) V_I    K of "keys": k~ or k; V of "values": v~ or v

Eight cells, "by: keys, values". All keys are behind QK-norm and RoPE, also those without memory.
Only the phase in which a method is sparse changes, all else stays as trained, over k~ and v~:

    Quest    prefill dense; each step chooses and attends as the cell says
    MoBA     the prompt chooses and attends as the cell says; decoding dense
    SnapKV   prefill dense; compress chooses by the cell's keys, steps attend as the cell says

Asked as any model and methods are:

    asked = swapped(model)
    ways.evaluate(asked, tokenizer, examples, [*cells(method).values()])

The cell "k~: k~, v~" gives the plain method's answers. That and the others, by hand, are checked in
tests/test_swap.py. Nothing is trained, and the weights are the model's own. Read oracle.py first.

How: a memory that gives 2 KV heads instead of KV, first those with memory, then those without. So
the rest of the model, and its cache, hold both side by side; methods take their halves (half).

Letters: B batch, T tokens, H query heads, KV key/value heads of the model, D head width, S kept.
"""
import copy
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import nn
from torch.nn import functional as F

import sparse
from experiments.oracle import Around, scored, selects_in
from infra.spelling import check
from memory import Decay
from model import Transformer
from sparse import Compose, Dense
from triton_ops import backend


# ---------------------------------------------------------------- a model that holds both

class Both(nn.Module):
    """A memory whose keys and values come twice: k~, then k, and likewise v."""

    def __init__(self, memory):
        super().__init__()
        self.memory = memory

    def forward(self, x, k, v, state=None, real=None):  # as Decay.forward
        KV = k.shape[2]
        if state is not None:  # of the cache, which has made it for 2 KV heads
            state = state[:, :, :KV]
        k_mem, v_mem, last = self.memory(x, k, v, state, real)
        last = F.pad(last, (0, 0, 0, KV))  # (2, B, 2 KV, D)
        return torch.cat([k_mem, k], 2), torch.cat([v_mem, v], 2), last  # (B, T, 2 KV, D)


class OfEachHalf(nn.Module):
    """A norm over all KV heads together, for twice as many."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):  # (B, T, 2 KV D)
        return self.norm(x.unflatten(-1, (2, -1))).flatten(-2)


class Swapped(Transformer):
    """A model that is asked by methods alone that take their half of the KV heads."""

    def hidden(self, tokens, method=None, cache=None):
        parts, method = sparse.phases(method), method or Dense()
        asked = [parts.prefill_by]
        if cache is not None:
            others = parts.compress_by, parts.evict_by  # where all is kept, these are asked nothing
            asked += [parts.decode_by, *(part for part in others if type(part) is not Dense)]
        check(all(getattr(part, "takes_half", False) for part in asked),
              f"a swapped model is asked by swap.cells of a method, not by {sparse.name(method)} "
              "itself: ask that of the model as it was")
        return super().hidden(tokens, method, cache)

    def by_kernels(self):
        return False  # the fused layers have no such memory; methods and recurrence stay in Triton


def swapped(model):
    """
    The model, to be asked by `cells`: it shares the weights, and may go on to be used itself. Its
    steps are recorded as graphs where the model's would be. ValueError for a model without memory,
    and for one whose memory is not of Eq. 1.
    """
    kind = model.config.memory
    check(kind is not None, "this model has no memory, so that there is nothing to swap: give one "
          "that has")
    memories = [layer.self_attn.memory for layer in model.layers]
    check(all(isinstance(memory, Decay) for memory in memories), f"a memory of {kind} may be no "
          "average of keys and values as they are: swap takes decay and values")

    shared = {id(x): x for x in (*model.parameters(), *model.buffers())}
    both = copy.deepcopy(model, shared)
    both.__class__ = Swapped
    with torch.no_grad():
        both.in_graph = model.by_kernels()
    both.config = copy.copy(model.config)  # of the cache: what it says is no model of its own,
    both.config.n_kv_head *= 2             # as 9 query heads have no 6 KV heads
    for layer in both.layers:
        attention = layer.self_attn
        attention.memory = Both(attention.memory)
        if model.config.qk_norm == "all":
            attention.k_norm = OfEachHalf(attention.k_norm)
    return both


# ---------------------------------------------------------------- the cells

def half(x, which):
    """Of x (B, T, 2 KV, D) the KV heads with memory ("k~", "v~") or those without ("k", "v")."""
    with_memory, without = x.chunk(2, dim=2)
    return with_memory if which.endswith("~") else without


@dataclass(frozen=True)
class Cell(Around):
    """The hooks of a method in a swapped model, which choose by some keys and read others."""
    takes_half = True  # of the KV heads, as `half` does: what a swapped model asks of a method
    in_graph = property(lambda self: backend.in_graph(self.method))

    by: str      # k~ or k
    keys: str    # k~ or k
    values: str  # v~ or v

    def chooser(self, score):
        """The method with this score(q, ...) of the keys that the cell chooses by."""
        if self.by == self.keys or not hasattr(self.method, "score"):
            return self.method
        return scored(self.method, score)

    def prefill(self, q, k, v, start, dice):
        chooser = self.chooser(lambda q, _: self.method.score(q, half(k, self.by)))
        hook = backend.hook(chooser, "prefill", v)
        return hook(q, half(k, self.keys), half(v, self.values), start, dice)

    def compress(self, q, k, v, lengths, dice):
        hook = backend.hook(self.method, "compress", k)
        kept = hook(q, half(k, self.by), half(v, self.values), lengths, dice)  # (B, KV, S)
        return None if kept is None else torch.cat([kept, kept], dim=1)

    def decode(self, q, cache):
        def bounds_of(block_size, which=self.keys):  # which the cache knows of all its heads
            return [half(x, which) for x in cache.bounds_of(block_size)]

        def score(q, _, filled):  # a Quest's
            own = self.method
            if backend.all_stock(own, "Quest.score block_bounds to_blocks"):
                return own.score_bounds(q, *bounds_of(own.block_size, self.by))
            return own.score(q, half(cache.k, self.by), filled)

        mine = replace(cache, k=half(cache.k, self.keys), v=half(cache.v, self.values),
                       bounds_of=bounds_of)
        return backend.hook(self.chooser(score), "decode", q)(q, mine)


TRAINED = Cell(Dense(), "k~", "k~", "v~")  # dense attention, as the model has learned it


def cells(method):
    """
    {"k~: k~, v~": the plain method, ... "k: k, v"}: what chooses, and the keys and values that are
    read. The methods are for `swapped` models. ValueError for none of Quest, MoBA and SnapKV.
    """
    phase, found = selects_in(method), {}
    for by, keys, values in product(("k~", "k"), ("k~", "k"), ("v~", "v")):
        parts = {"prefill_by": TRAINED, "decode_by": TRAINED}
        if phase == "compress":  # what it keeps, the answer reads
            parts["decode_by"] = Cell(Dense(), keys, keys, values)
        parts[f"{phase}_by"] = Cell(method, by, keys, values)
        found[f"{by}: {keys}, {values}"] = Compose(**parts)
    return found
