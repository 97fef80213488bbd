"""
Budgets that adapt: TopP, which reads as few entries as its share of attention needs, and the hook
`evict`, by which a method drops entries while the answer is written.

What TopP reads is written out in Python here. SlidingSnapKV is held to kvpress, and the cache to a
reference that never drops anything: it keeps all entries, and a list of those that are left.
"""
import math
import re
import sys
from dataclasses import dataclass, replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
from hypothesis import given, strategies as st
from safetensors.torch import load_file

import sparse
from conftest import ORACLE, assert_close, draw_tokens, layer_cache, refused, tiny
from drawn import heads, law, seeds
from experiments import check
from infra import cli
from infra.reads import StepReads
from sparse import (Dense, Dilated, MoBA, Quest, SlidingSnapKV, SnapKV, TopP, attend_to_slots,
                    compose, drops, evicts, name, parse, phases, window_of)
from test_sparse import cells, draw, group, listed
from triton_ops import backend

SLIDING = SlidingSnapKV(budget=14, window=3, kernel=3, every=4)


# ---------------------------------------------------------------- top-p

@law(60)
@given(heads, st.integers(1, 40), st.sampled_from([0.1, 0.5, 0.85, 0.99]), seeds)
def test_top_p_reads_the_fewest_entries_that_come_to_p(heads, n, p, seed):
    """
    One entry too many or too few; a share of all attention and not of what Quest chose; heads of a
    group that choose apart; an entry of a block that was not chosen.
    """
    (H, KV), method = heads, TopP(budget=16, block_size=4, p=p)
    q, k, v, _ = draw(2, n, H, KV, seed=seed)
    q, used = 2 * q[:, -1:], [n, (n + 1) // 2]
    y, selected = method.decode(q, layer_cache(k, v, used))
    _, chosen = Quest(16, 4).decode(q, layer_cache(k, v, used))
    for b, h in cells(2, KV):
        candidates, share = listed(chosen[b, h]), {}
        for head in group(h, heads):
            weights = [math.exp(q[b, 0, head] @ k[b, j, h] / math.sqrt(8)) for j in candidates]
            for j, weight in zip(candidates, weights):
                share[j] = share.get(j, 0) + weight / sum(weights) / len(group(h, heads))
        kept, total = set(), 0.0
        for j in sorted(share, key=share.get, reverse=True):
            if total >= p - 1e-6:  # within rounding of p, one more is right too
                break
            kept.add(j)
            total += share[j]
        read = set(listed(selected[b, h]))
        assert kept <= read and len(read - kept) <= (abs(total - p) < 1e-5)
    assert_close(y, attend_to_slots(q, k, v, selected))


def test_top_p_of_everything_is_quest():
    q, k, v, _ = draw(2, 37, 4, 2, seed=1)
    cache = layer_cache(k, v, [37, 20])
    y, selected = TopP(16, 4, p=1.0).decode(q[:, -1:], cache)
    expected, chosen = Quest(16, 4).decode(q[:, -1:], cache)
    assert_close(y, expected, atol=1e-4)
    assert (selected >= 0).sum() > 0.9 * (chosen >= 0).sum()


def test_top_p_reads_one_entry_where_all_attention_is_there():
    """How many are read follows from the head and the query: 1 of 16, or nearly all of them."""
    q, k, v, _ = draw(1, 32, 2, 2, seed=2)
    k[:, 9, 0] = 20 * q[:, -1, 0]  # of the first head
    q[:, -1, 1] = 0                # the second one's attention is even
    _, selected = TopP(16, 4, p=0.85).decode(q[:, -1:], layer_cache(k, v))
    assert listed(selected[0, 0]) == [9]
    assert len(listed(selected[0, 1])) == math.ceil(0.85 * 16)


@pytest.mark.parametrize("text, words", [
    ("topp:budget=1/4,p=0", ["topp", "p=0", "above 0"]), ("topp:p=1.5", ["p=1.5", "at most 1"]),
    ("topp:budget=100,block_size=64", ["topp", "not a multiple"]),
    ("sliding:budget=64,window=16,every=48", ["sliding", "every=48", "window=16"]),
    ("sliding:budget=64,window=16,every=0", ["sliding", "every=0"]),
    ("sliding:budget=64,window=64", ["sliding", "must exceed"]),
    ("snapkv+sliding", ["snapkv", "sliding", "compress"]),
    ("sliding:budget=256+dilated", ["dilated cannot follow sliding"])])
def test_wrong_settings_are_refused(text, words):
    refused(lambda: parse(text, 1024), *words)


def test_texts_and_parts():
    """A method that nobody can name; a composition without its fourth part."""
    text = "quest:budget=128,block_size=32+sliding:budget=256,window=16,every=16"
    both = parse(text, 1024)
    assert parse(name(both), 1024) == both
    assert both.decode_by == Quest(128, 32) and both.compress_by == both.evict_by
    assert evicts(both) and drops(both) and not evicts(parse("snapkv", 1024))
    assert window_of(SlidingSnapKV(256, window=80)) == 80
    assert parse("topp:budget=1/4,block_size=16,p=0.5", 1024) == TopP(256, 16, p=0.5)
    assert phases(TopP()).decode_by == TopP() and not drops(TopP())


# ---------------------------------------------------------------- against kvpress

def states(case, method, prompt):
    """Positions that stay: of the prompt, then each time that some are dropped. All (KV, S)."""
    q, k = case["q"], case["k"]
    kept = method.compress(q[:, :prompt], k[:, :prompt], k, torch.tensor([prompt]), None)
    told, KV = [kept[0]], k.shape[2]
    for t in range(prompt, q.shape[1] + 1):
        held = k.gather(1, kept.transpose(1, 2).unsqueeze(-1).expand(-1, -1, -1, k.shape[3]))
        cache = layer_cache(held, held)
        slots = method.evict(q[:, :t], cache)
        if slots is not None:
            kept = kept.gather(2, slots)
            told.append(kept[0])
        kept = torch.cat([kept, torch.full((1, KV, 1), t)], dim=2)
    return torch.stack(told)


@pytest.mark.parametrize("case, method, prompt", [
    # kvpress keeps what it keeps in the order of scores, so neighbours are others: no pooling
    ("snapkv", SlidingSnapKV(32, window=6, kernel=1, every=8), 40),
    ("tova", SlidingSnapKV(21, window=1, kernel=1, every=1), 30)])
def test_what_stays_is_what_stays_in_kvpress(case, method, prompt):
    """Another window; a choice one step late; scores of the prompt in place of what is held."""
    found = load_file(ORACLE / "kvpress.safetensors")
    of_case = {what: found[f"{case}/{what}"] for what in ("q", "k", "kept")}
    assert torch.equal(states(of_case, method, prompt), of_case["kept"])


# ---------------------------------------------------------------- the cache

class Simulated(Dense):
    """
    Any method that drops entries, on a cache that keeps all: compress and evict are asked with what
    would be left, and a query reads that alone. Layers are told apart by the order of calls.
    """

    def __init__(self, method, n_layer, lengths):
        self.__dict__.update(method=method, n=n_layer, lengths=lengths, calls=0, layers=[
            SimpleNamespace(q=None, left=None) for _ in range(n_layer)])

    def layer(self):
        self.__dict__["calls"] += 1
        return self.layers[(self.calls - 1) % self.n]

    def prefill(self, q, k, v, start, dice):
        layer = self.layer()
        rows = [q[b, :n] for b, n in enumerate(self.lengths)]
        layer.q = rows if layer.q is None else [*map(torch.cat, zip(layer.q, rows))]
        return Dense.prefill(self, q, k, v, start, dice)

    def newest(self, layer, b):
        padded = torch.cat([torch.zeros(64, *layer.q[b].shape[1:]), layer.q[b]])
        return padded[None, -64:]

    def decode(self, q, cache):
        layer, by, (B, _, KV, D) = self.layer(), phases(self.method), cache.k.shape
        read = []
        for b in range(B):
            n, one = int(cache.used[b]) - 1, slice(b, b + 1)
            if layer.left is None or len(layer.left) == b:
                layer.left = [] if layer.left is None else layer.left
                kept = by.compress_by.compress(self.newest(layer, b), cache.k[one, :n],
                                               cache.v[one, :n], torch.tensor([n]), None)
                everything = torch.arange(n).expand(1, KV, -1)
                layer.left.append(everything if kept is None else kept)
            left = layer.left[b]
            index = left.transpose(1, 2).unsqueeze(-1).expand(-1, -1, -1, D)
            held = layer_cache(cache.k[one].gather(1, index), cache.v[one].gather(1, index))
            slots = by.evict_by.evict(self.newest(layer, b), held)
            left = left if slots is None else left.gather(2, slots)
            layer.left[b] = torch.cat([left, torch.full((1, KV, 1), n)], dim=2)
            layer.q[b] = torch.cat([layer.q[b], q[b]])
            read.append(attend_to_slots(q[one], cache.k[one], cache.v[one], layer.left[b]))
        return torch.cat(read), None


@torch.no_grad()
def steps_of(model, method, rows, lengths, n):
    """Logits of n steps after prompts of these lengths, and the cache."""
    cache = model.new_cache(len(rows), rows.shape[1], window_of(method))
    fed = torch.tensor(lengths)
    model.prefill(rows[:, :int(fed.max())], fed, cache, method)
    if not isinstance(method, Simulated):
        cache.compress(method)
    out = []
    for _ in range(n):
        token = rows[torch.arange(len(rows)), fed]
        out.append(model.step(token, cache, method).clone())
        fed += 1
    return torch.stack(out), cache


@pytest.mark.parametrize("form", [{}, dict(n_kv_head=2, memory=True)], ids=["plain", "gqa memory"])
@pytest.mark.parametrize("lengths", [[30], [30, 30], [11, 9]], ids=str)
def test_an_evicting_cache_holds_what_the_method_left(form, lengths):
    """
    Entries that move without their positions or values; queries that are not noted, or noted twice;
    one layer that sees what another has dropped; a step's own token dropped.
    """
    model, rows, n = tiny(**form), draw_tokens(len(lengths), 60, seed=3), 19
    out, cache = steps_of(model, SLIDING, rows, lengths, n)
    simulated = Simulated(SLIDING, model.config.n_layer, lengths)
    expected, _ = steps_of(model, simulated, rows, lengths, n)
    assert_close(out, expected, what="logits")
    assert cache.evictions >= 3
    for i, b, h in cells(model.config.n_layer, len(lengths), model.config.n_kv_head):
        held = cache.positions[i][b, :cache.used[b], h].tolist()
        assert held == simulated.layers[i].left[b][0, h].tolist() and len(held) <= SLIDING.budget


def test_prompts_of_different_lengths_evict_as_alone():
    """A row that is still below the budget when another one drops entries."""
    model, rows, lengths = tiny(n_kv_head=2), draw_tokens(3, 60, seed=4), [30, 12, 3]
    out, cache = steps_of(model, SLIDING, rows, lengths, 16)
    for b, length in enumerate(lengths):
        alone, _ = steps_of(model, SLIDING, rows[b:b + 1], [length], 16)
        assert_close(out[:, b:b + 1], alone, what=f"row {b}")
    assert cache.used.max() <= SLIDING.budget


@pytest.mark.parametrize("lengths", [[20, 20], [20, 3]], ids=str)
def test_a_method_that_only_evicts_is_streaming_llm(lengths, monkeypatch):
    """
    The hook alone, without compress, as docs/beyond.md prints a method: what a pattern never reads
    again may as well be dropped.
    """
    monkeypatch.setattr(sparse, "METHODS", dict(sparse.METHODS))
    page = (cli.ROOT / "docs/beyond.md").read_text(encoding="utf-8")
    code, = re.findall(r"```python\n(.*?class Streaming.*?)```", page, re.DOTALL)
    monkeypatch.setitem(sys.modules, "streaming", space := ModuleType("streaming"))
    exec(code, vars(space))
    method = parse("streaming:budget=8,initial=2", 64)
    assert check.check_method(method) == ["evict"]
    model, rows = tiny(n_kv_head=2, memory=True), draw_tokens(2, 50, seed=5)
    out, cache = steps_of(model, method, rows, lengths, 25)
    pattern = Dilated(dilation=None, local=5, initial=2)
    whole, fed = model.new_cache(2, 50), torch.tensor(lengths)
    model.prefill(rows[:, :20], fed, whole)  # densely, as the other
    with torch.no_grad():
        expected = torch.stack([model.step(rows[torch.arange(2), fed + t], whole, pattern).clone()
                                for t in range(25)])
    assert_close(out, expected)
    assert cache.filled == 8


@torch.no_grad()
def test_turns_generate_and_quest_agree(monkeypatch):
    """
    generate drops at once, a turn from a copy: the same tokens. The next turn finds the cache as it
    was. Quest reads what is left, with the bounds of what has moved.
    """
    model, tokens = tiny(n_kv_head=2, memory=True), draw_tokens(2, 40, seed=6)
    both, wide = compose(SLIDING, Quest(8, 2)), SlidingSnapKV(14, window=7, kernel=3, every=2)
    for method in SLIDING, wide, both, compose(MoBA(8, 2), SLIDING):
        at_once = model.generate(tokens, 20, sparse=method)
        with monkeypatch.context() as patch:  # as it is written, without bounds that are kept
            patch.setattr(backend, "choice", "torch")
            assert torch.equal(model.generate(tokens, 20, sparse=method), at_once)
        cache = model.new_cache(2, 60, window_of(method))
        logits = model.prefill(tokens, None, cache, method)
        for _ in range(2):
            with cache.turn(method) as own:
                assert torch.equal(model.decode(logits, own, 20, method), at_once)
        with cache.turn(None) as own:
            model.decode(logits, own, 20)
        assert cache.filled == 40 and cache.evictions == 0
    plain = replace(both, decode_by=Dense())
    assert not torch.equal(model.generate(tokens, 20, sparse=both),
                           model.generate(tokens, 20, sparse=plain))


@torch.no_grad()
def test_a_question_after_compression_is_among_the_queries():
    """What is fed after entries were dropped asks at the next eviction, and its entries count."""
    model, rows, caches = tiny(n_kv_head=2), draw_tokens(1, 60, seed=7), []
    method = SlidingSnapKV(budget=20, window=6, kernel=3, every=6)
    for chunk in 4, 1:  # 14 entries are kept: the question does not fill the cache
        cache = model.new_cache(1, 60, 64)
        model.prefill(rows[:, :30], None, cache, method)
        with cache.turn(method) as own:
            for part in rows[:, 30:34].split(chunk, dim=1):
                model.prefill(part, None, own, method) if chunk > 1 else (
                    model.step(part[:, 0], own, method))
            out = torch.stack([model.step(rows[:, t], own, method).clone() for t in range(34, 50)])
            caches.append((out, own.positions[0][:, :own.filled].clone(), own.filled))
    assert_close(*(out for out, *_ in caches))
    assert torch.equal(caches[0][1], caches[1][1]) and caches[0][2] <= method.budget


@torch.no_grad()
def test_what_cannot_be_undone_is_refused():
    model, tokens = tiny(), draw_tokens(2, 40, seed=8)
    cache = model.new_cache(2, 60)
    logits = model.prefill(tokens, None, cache)
    cache.compress(SLIDING)

    def rewound():
        with cache.rewinding():
            for _ in range(9):
                model.step(tokens[:, 0], cache, SLIDING)
    refused(rewound, "cannot be undone")
    # A row that has ended while another one goes on: what was evicted since is not there any more.
    first = int(logits[0].argmax())
    cache = model.new_cache(2, 60)
    model.prefill(tokens, None, cache, SLIDING)
    model.decode(logits, cache, 15, SLIDING, eos_id=first)
    refused(lambda: model.step(tokens[:, 0], cache, SLIDING), "evicted", "clear")


@torch.no_grad()
def test_a_row_that_ended_goes_on_as_if_alone():
    """
    Evictions before a row has ended, which spoil nothing; its queries of steps that are forgotten,
    which would ask at the next eviction.
    """
    model, rows = tiny(n_kv_head=2), draw_tokens(2, 60, seed=11)
    method = SlidingSnapKV(budget=14, window=6, kernel=3, every=4)
    out = []
    for B in 2, 1:
        cache = model.new_cache(B, 60, 64)
        model.prefill(rows[:B, :30], None, cache, method)
        with cache.turn(method) as own, own.ending() as end:
            for t in range(30, 37):  # of 10 entries: two evictions, then room for one more step
                model.step(rows[:B, t], own, method)
            if B == 2:
                end(torch.tensor([True, False]))
                model.step(rows[:, 37], own, method)
        assert own.evictions == 1 and not own.spoiled
        last = rows[:B, 38:39] if B == 1 else torch.cat([rows[:1, 38:39], rows[1:, 39:40]])
        for t in range(39, 50):
            out.append(model.step(last[:, 0], own, method)[0].clone())
            last = rows[:B, t:t + 1]
    assert_close(torch.stack(out[:11]), torch.stack(out[11:]))


class Uneven(SlidingSnapKV):
    """Another rule in each layer, in the order of calls."""
    calls = []

    def evict(self, q, cache):
        self.calls.append(None)
        return super().evict(q, cache) if len(self.calls) % 2 else None


@torch.no_grad()
def test_layers_that_keep_other_numbers_are_refused():
    """A cache whose layers hold entries of other counts, and says nothing."""
    model, tokens, Uneven.calls[:] = tiny(), draw_tokens(1, 40, seed=12), []
    cache, method = model.new_cache(1, 60), Uneven(14, 3, 3, None, 4)
    logits = model.prefill(tokens, None, cache, method)
    with cache.turn(method) as own:
        refused(lambda: model.decode(logits, own, 9, method), "keeps 10 entries in one layer",
                "None in another")
        refused(lambda: model.step(tokens[:, 0], own, method), "failed half-way")


@dataclass(frozen=True)
class Newest(Dense):
    """It evicts alone, so that SnapKV may go before."""

    def evict(self, q, cache):
        return None


@torch.no_grad()
def test_without_the_newest_queries_nothing_can_be_asked():
    model, tokens = tiny(), draw_tokens(1, 40, seed=13)
    cache = model.new_cache(1, 60)
    model.prefill(tokens, None, cache)
    model.step(tokens[:, 0], cache, SnapKV(10, 3))
    both = compose(SnapKV(10, 3), Newest())
    refused(lambda: model.step(tokens[:, 0], cache, both), "newest queries", "snapkv", "fork")


@dataclass(frozen=True)
class Greedy(SlidingSnapKV):
    """It says a budget and drops nothing while it writes."""

    def evict(self, q, cache):
        return None if cache.k.shape[1] < 30 else super().evict(q, cache)


@pytest.mark.parametrize("method, words", [(SLIDING, None), (Greedy(14, 3, 3, every=4), "held 21")])
def test_a_budget_holds_for_the_answer_too(method, words):
    model, tokens = tiny(), draw_tokens(2, 40, seed=9)
    cache, reads = model.new_cache(2, 70), StepReads(phases(method))
    logits = model.prefill(tokens, None, cache, method)
    with cache.turn(method) as own:
        model.decode(logits, own, 12, method, watch=reads)
        counted = lambda: reads.of_rows(own, [11, 11])
        if words:
            refused(counted, words, "more than its budget")
        else:
            assert all(10 < read <= 14 for read in counted())


def test_no_graph_is_recorded_of_steps_that_evict(monkeypatch):
    """A replay would never ask evict."""
    model, tokens = tiny(), draw_tokens(1, 20, seed=10)
    monkeypatch.setattr(backend, "in_graph", lambda method: True)
    monkeypatch.setattr(type(model), "by_kernels", lambda self: True)
    seen = []
    monkeypatch.setattr("engine.fused", lambda model, tokens, cache: (
        seen.append(cache.now.static), model.hidden(tokens, cache.now.sparse, cache))[1])
    for method in SLIDING, SnapKV(10, 3):
        cache = model.new_cache(1, 40)
        model.prefill(tokens, None, cache, method)
        with torch.no_grad():
            model(tokens[:, :1], cache=cache, sparse=method)
    assert seen == [False, False, False, True]
