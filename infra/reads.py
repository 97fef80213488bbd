"""
What a method reads, counted while it runs: in entries, per token, KV head and layer.

    StepReads     by a token of the answer: `watch` of model.decode
    PromptReads   by a token of the prompt: `watch` of model.prefill
    was_read      whether the last step read a position: H1
    places_of     the positions of the prompt that a text is copied from, token by token: H1

A method that is silently off would score like dense attention. So each count is asserted against
the method's budget, and one that is above it ends the run. What is counted is what a method says
that it has read: one of your own must tell the truth.

Methods are handed in; all that is known of them here is that some have a `budget` and a
`block_size`. Checked by hand in tests/test_report_tables.py. eval_niah.py and sample.py count.
"""
from itertools import accumulate
from typing import NamedTuple

import torch


def within_budget(method, entries, did, where):
    """ValueError if a method did more than its budget. One without such a field is held to none."""
    if entries > getattr(method, "budget", entries):
        raise ValueError(f"{method} {did} {entries} entries {where}, more than its budget")


class StepReads:
    """How many entries each decoding step reads: to be called with the cache after each step."""

    def __init__(
        self,
        phases,   # sparse.phases of the method
        since=0,  # (B,)  tokens that were fed after the method dropped entries: a question
    ):
        self.phases, self.since = phases, since
        self.mean, self.most = [], []  # over layers and KV heads: (B,) per step
        self.held = []                 # entries there are: (B,) per step

    def __call__(self, cache):
        # a layer without a selection has read all that is there
        everything = cache.used[:, None].expand(-1, cache.config.n_kv_head)  # (B, KV)
        shapes = {None if selected is None else selected.shape for selected in cache.selected}
        if shapes == {None}:
            read = everything[None]  # one layer tells for all
        elif len(shapes) == 1:       # a launch for all layers
            read = (torch.stack(cache.selected) >= 0).sum(-1)
        else:
            read = torch.stack([everything if selected is None else (selected >= 0).sum(-1)
                                for selected in cache.selected])  # (layers, B, KV)
        self.mean.append(read.float().mean((0, 2)))
        self.most.append(read.amax((0, 2)))
        self.held.append(cache.used.clone())

    def of_rows(self, cache, steps):
        """
        -> mean of each row's own first `steps` (B,), later ones being others'; None where it took
        none
        """
        if not self.mean:
            return [None] * len(steps)
        phases = self.phases
        decode_by, compress_by, evict_by = phases.decode_by, phases.compress_by, phases.evict_by
        within_budget(decode_by, int(torch.stack(self.most).max()), "read", "in a step")
        if hasattr(evict_by, "budget"):  # it holds for the answer's entries, too
            within_budget(evict_by, int(torch.stack(self.held).max()), "held", "in a step")
        elif hasattr(compress_by, "budget"):
            # the budget is for the prompt: tokens that were fed since come on top
            kept = int((self.held[0] - 1 - self.since).max())
            within_budget(compress_by, kept, "kept", "of the prompt")
        mean = torch.stack(self.mean).cpu()  # (steps, B)
        return [float(mean[:n, b].mean()) if n else None for b, n in enumerate(steps)]


class PromptReads:
    """
    How many entries a token of the prompt reads: to be called for each layer and part of the batch.
    """

    def __init__(self, prefill_by, dense):
        self.method, self.dense = prefill_by, dense  # dense: whether every token reads all
        self.mean, self.most = {}, []  # {layer: a mean (rows,) for each part of the batch}

    def __call__(
        self,
        layer,   # its number
        blocks,  # (rows, KV, T, S)  the blocks that each token reads, -1 for none; None: not known
        real,    # (rows, T)  False for padding; None: there is none
    ):
        if blocks is None or not hasattr(self.method, "block_size"):
            return
        size = self.method.block_size
        t = torch.arange(blocks.shape[2], device=blocks.device)  # (T,)
        # of its own block a token reads the entries up to itself
        read = (blocks >= 0).sum(-1) * size - (size - 1 - t % size)  # (rows, KV, T)
        if real is None:
            real = torch.ones_like(read[:, 0], dtype=torch.bool)
        of_part = (read.float().mean(1) * real).sum(1) / real.sum(1)  # (rows,)
        self.mean.setdefault(layer, []).append(of_part)
        self.most.append(read.max())

    def of_rows(self, lengths):
        """-> mean of a row's tokens, KV heads and layers; None where the method does not tell"""
        if self.dense:
            return ((lengths + 1) / 2).tolist()  # each token all before it, and itself
        if not self.mean:
            return [None] * len(lengths)
        within_budget(self.method, int(torch.stack(self.most).max()), "read", "for a token")
        return torch.stack([torch.cat(parts) for parts in self.mean.values()]).mean(0).tolist()


# ---------------------------------------------------------------- H1: one position

def was_read(cache, layer, low, high):
    """Whether the last step read any of the positions low to high - 1, both (B,). -> (B, KV)"""
    positions = cache.selected[layer]  # (B, KV, S)
    if positions is None:
        # all that the cache holds, in slots of which some hold nothing; SnapKV has moved the rest
        slot = torch.arange(cache.slots, device=low.device)
        if cache.positions[layer] is None:
            positions = slot.expand(len(low), cache.config.n_kv_head, -1)
        else:
            positions = cache.positions[layer].transpose(1, 2)
        empty = slot >= cache.used[:, None, None]
        positions = positions.masked_fill(empty, -1)
    inside = (positions >= low[:, None, None]) & (positions < high[:, None, None])
    return inside.any(-1)


class Source(NamedTuple):
    """Where a token of an answer comes from."""
    answer: int  # which answer
    low: int     # positions low to high - 1 of the prompt hold its bytes: nearly always one
    high: int


def places_of(
    written,  # the bytes of each token of a text that holds the answers, in their order
    prompt,   # the bytes of each token of the prompt
    answers,  # texts
    spans,    # [start, end) of each answer: the positions of the prompt that hold it
):            # -> the Source of each token of the text; None if it is no answer's: a comma, a space
    # Bytes, as a token may end inside a character; and as needle and text may be cut unlike.
    text, ends = b"".join(written), [0, *accumulate(map(len, written))]
    found, at = [None] * len(written), 0
    for number, (answer, (start, end)) in enumerate(zip(answers, spans)):
        answer = answer.encode(errors="replace")
        needle = prompt[start:end]
        needle_ends = [0, *accumulate(map(len, needle))]
        at = text.index(answer, at)
        shift = b"".join(needle).index(answer) - at  # from the text's bytes to the needle's
        for j in range(len(written)):
            # the bytes of the answer that are token j's
            low, high = max(ends[j], at), min(ends[j + 1], at + len(answer))
            if low < high:
                places = [i for i in range(len(needle)) if needle_ends[i] < high + shift
                          and needle_ends[i + 1] > low + shift]
                found[j] = Source(number, start + places[0], start + places[-1] + 1)
        at += len(answer)
    return found
