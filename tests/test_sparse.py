"""sparse.py: every method against its original, against plain Python, and against its budget."""
import math
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st

from conftest import assert_close, one_line
import sparse
from cache import LayerCache
from sparse import Compose, Dense, Dilated, MoBA, Quest, SnapKV, attend, chance, compose, name, parse, randomized

HEADS = [(4, 4), (4, 2), (8, 1)]  # H, KV


def draw(B, T, H, KV, D=8, seed=0):
    """q, k, v, dice. Keys share a mean per 8 tokens, so that blocks differ."""
    source = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, T, heads, D, generator=source) for heads in (H, KV, KV))
    k = k + torch.randn(B, -(-T // 8), KV, D, generator=source).repeat_interleave(8, dim=1)[:, :T]
    return q, k, v, torch.randint(2**62, (B, T), generator=source)


def layer_cache(k, v, dice=None, used=None):
    """k, v as a decoding step finds them; used (B,): rows that are filled only so far, NaN-free zeros behind."""
    B, T = k.shape[:2]
    ragged = used is not None
    used = torch.full((B,), T) if used is None else torch.as_tensor(used)
    filled = torch.arange(T) < used[:, None]
    k, v = (x.masked_fill(~filled[..., None, None], 0) for x in (k, v))
    return LayerCache(k, v, used, ragged, None if dice is None else dice[:, -1:], None)


def attention_in_python(q, k, v, slots):
    """Eq. 4 for one query (D,) over the listed slots of k, v (T, D), in fp64."""
    q, k, v = q.double(), k.double(), v.double()
    p = torch.stack([torch.exp(q @ k[j] / math.sqrt(len(q))) for j in slots])
    return (sum(p[n] * v[j] for n, j in enumerate(slots)) / p.sum()).float()


def assert_top(chosen, scores, forced, S):
    """
    `chosen` are S of the candidates of `scores` ({candidate: score}), all forced ones among them, and the rest the
    best. Near-ties may swap.
    """
    expected = min(S, len(scores))
    assert len(chosen) == len(set(chosen)) == expected, f"chose {chosen}, not {expected} of {sorted(scores)}"
    assert forced <= set(chosen) <= set(scores), f"chose {chosen}, forced {forced}, of {sorted(scores)}"
    free = sorted((score for candidate, score in scores.items() if candidate not in forced), reverse=True)
    cut = free[expected - len(forced) - 1] if expected > len(forced) else math.inf
    for candidate in set(chosen) - forced:
        assert scores[candidate] >= cut - 1e-5, f"{candidate} scores {scores[candidate]}, the cut is at {cut}"


# ---------------------------------------------------------------- against the originals

def repeated(selectors, prefix):
    """The inputs of a case: those of fewer KV heads come repeated, as the originals do it."""
    k, v = selectors[prefix + "k"], selectors[prefix + "v"]
    return selectors["q"], *(x.repeat_interleave(4 // k.shape[2], dim=2) for x in (k, v))


@pytest.mark.parametrize("block_size, topk", [(16, 3), (32, 2)])
def test_moba_matches_original(selectors, block_size, topk):
    """Another score (scaled, per block sum), the own block not counted in topk, or a leak from the future."""
    method = MoBA(budget=topk * block_size, block_size=block_size, keep_first=False)
    y, _ = method.prefill(*repeated(selectors, ""), 0, None)
    assert_close(y, selectors[f"moba/out_{block_size}_{topk}"])


@pytest.mark.parametrize("case, budget", [("16_64", 64), ("32_64", 96), ("gqa_16_64", 64)])
def test_quest_matches_original(selectors, case, budget):
    """Pages misaligned, zeros of an unfilled page in its min and max, or a wrong bound. 32_64 reads 3 pages."""
    prefix, page = ("gqa_" if "gqa" in case else ""), int(case.split("_")[-2])
    method = Quest(budget, page, keep_first=False, keep_current=False)
    q, k, v = repeated(selectors, prefix)
    case = f"{prefix}{{}}_{page}_64"
    y, selected = method.decode(q[:, -1:], layer_cache(k, v))
    assert_close(y, selectors["quest/" + case.format("out")])
    N = math.ceil(150 / page)
    if not prefix:
        scores = method.score(q[:, -1:], k, torch.ones(2, 150, dtype=torch.bool))
        assert_close(scores[:, :, 0], selectors["quest/" + case.format("scores")], atol=1e-4)
        mask = torch.zeros(2, 4, 151, dtype=torch.bool).scatter(2, selected.where(selected >= 0, 150), True)[..., :150]
        assert torch.equal(mask, selectors["quest/" + case.format("mask")])
    pages = torch.zeros(2, 4, N + 1, dtype=torch.bool)
    pages = pages.scatter(2, (selected // page).where(selected >= 0, N), True)[..., :N]
    assert torch.equal(pages, selectors["quest/" + case.format("pages")])


@pytest.mark.parametrize("case", ["w8_c40_k5", "w16_c64_k7", "gqa_w8_c40_k5"])
def test_snapkv_matches_original(selectors, case):
    """A window that peeks at itself, pooling with another edge, a mean over the wrong queries, a budget without window."""
    prefix = "gqa_" if "gqa" in case else ""
    window, budget, kernel = (int(part[1:]) for part in case.removeprefix("gqa_").split("_"))
    q, k, v = repeated(selectors, prefix)
    kept = SnapKV(budget, window, kernel).compress(q[:, -window:], k, v, torch.tensor([150, 150]), None)
    assert torch.equal(kept, selectors[f"snapkv/{case}_positions"].sort(dim=-1).values)
    assert torch.equal(kept[..., -window:], torch.arange(150 - window, 150).expand(2, 4, -1))


# ---------------------------------------------------------------- against plain Python

@pytest.mark.parametrize("H, KV", HEADS)
@pytest.mark.parametrize("keep", [(True, True), (True, False), (False, True), (False, False)])
def test_quest_is_eq_3_and_4_written_out(H, KV, keep):
    """Heads grouped in the wrong order, padding in a page's bounds, the last page misjudged, the wrong page read."""
    B, T, block_size, used = 3, 45, 8, [45, 32, 13]
    q, k, v, _ = draw(B, T, H, KV, seed=H + KV)
    method = Quest(3 * block_size, block_size, *keep)
    cache = layer_cache(k, v, used=used)
    y, selected = method.decode(q[:, -1:], cache)
    for b in range(B):
        current = (used[b] - 1) // block_size
        forced = ({0} if keep[0] else set()) | ({current} if keep[1] else set())
        for h in range(KV):
            group = range(h * H // KV, (h + 1) * H // KV)
            scores = {}
            for n in range(current + 1):
                block = k[b, n * block_size:min((n + 1) * block_size, used[b]), h].double()
                low, high = block.amin(0), block.amax(0)
                bounds = [torch.maximum(q[b, -1, i].double() * low, q[b, -1, i].double() * high).sum() for i in group]
                scores[n] = sum(bounds).item() / len(group)
            slots = [s for s in selected[b, h].tolist() if s >= 0]
            blocks = sorted({s // block_size for s in slots})
            assert_top(blocks, scores, forced, S=3)
            whole = [s for n in blocks for s in range(n * block_size, min((n + 1) * block_size, used[b]))]
            assert sorted(slots) == whole
            for i in group:
                assert_close(y[b, 0, i], attention_in_python(q[b, -1, i], k[b, :, h], v[b, :, h], slots))


@pytest.mark.parametrize("H, KV", HEADS)
@pytest.mark.parametrize("keep_first", [True, False])
def test_moba_is_eq_3_and_4_written_out(H, KV, keep_first):
    """A future block scored, the first block not counted, heads of another group averaged, rows shifted by `start`."""
    T, block_size, starts = 45, 8, [20, 13]  # the chunk's first slot, per row
    q, k, v, _ = draw(2, T, H, KV, seed=10 + H + KV)
    Tq = T - max(starts)
    chunk = torch.stack([q[b, start:start + Tq] for b, start in enumerate(starts)])
    method = MoBA(3 * block_size, block_size, keep_first)
    y, selected = method.prefill(chunk, k, v, torch.tensor(starts), None)
    for b, t, h in torch.cartesian_prod(torch.arange(2), torch.arange(Tq), torch.arange(KV)).tolist():
        slot = starts[b] + t
        current, group = slot // block_size, range(h * H // KV, (h + 1) * H // KV)
        scores = {current: math.inf}
        for n in range(current):
            mean = k[b, n * block_size:(n + 1) * block_size, h].double().mean(0)
            scores[n] = sum(q[b, slot, i].double() @ mean for i in group).item() / len(group)
        blocks = [n for n in selected[b, h, t].tolist() if n >= 0]
        assert_top(blocks, scores, {0, current} if keep_first else {current}, S=3)
        slots = [s for n in blocks for s in range(n * block_size, (n + 1) * block_size) if s <= slot]
        for i in group:
            assert_close(y[b, t, i], attention_in_python(q[b, slot, i], k[b, :, h], v[b, :, h], slots))


@pytest.mark.parametrize("H, KV", HEADS)
def test_moba_prefill_of_a_long_prompt_is_that_of_its_pieces(H, KV):
    """Queries are taken in parts of 256: a part that starts a slot off, or that misses its last keys."""
    T, method = 601, MoBA(48, 16)
    q, k, v, _ = draw(2, T, H, KV, seed=15)
    pieces = [method.prefill(q[:, t:t + 100], k[:, :t + 100], v[:, :t + 100], t, None)[0] for t in range(0, T, 100)]
    for start in 0, torch.tensor([0, 0]):
        assert_close(method.prefill(q, k, v, start, None)[0], torch.cat(pieces, dim=1))


@pytest.mark.parametrize("H, KV", HEADS)
def test_snapkv_is_eq_3_written_out(H, KV):
    """Padding that enters the softmax or the window, a prompt shorter than the window, pooling across a row's end."""
    T, W, kernel, lengths = 40, 6, 3, [40, 27, 12, 4]
    B = len(lengths)
    q, k, v, _ = draw(B, T, H, KV, seed=20 + H + KV)
    k, v = (x * (torch.arange(T) < torch.tensor(lengths)[:, None])[..., None, None] for x in (k, v))
    # each row's last queries, the newest at the end; a short prompt's are preceded by garbage
    last = torch.stack([q[b, [max(0, n - W + w) for w in range(W)]] for b, n in enumerate(lengths)])
    kept = SnapKV(budget=14, window=W, kernel=kernel).compress(last, k, v, torch.tensor(lengths), None)
    for b, h in torch.cartesian_prod(torch.arange(B), torch.arange(KV)).tolist():
        n, group = lengths[b], range(h * H // KV, (h + 1) * H // KV)
        attention = torch.zeros(n + kernel, dtype=torch.float64)  # zeros at the edges: pooling divides by the kernel
        for i in group:
            for t in range(n - W, n) if n > W else ():
                p = torch.softmax(k[b, :t + 1, h].double() @ q[b, t, i].double() / math.sqrt(8), 0)
                attention[:n - W] += p[:n - W] / (W * len(group))
        pooled = {j: sum(attention[j + o].item() for o in (-1, 0, 1) if j + o >= 0) / kernel for j in range(n)}
        positions = [j for j in kept[b, h].tolist() if j >= 0]
        assert positions == sorted(positions) and kept[b, h, len(positions):].eq(-1).all()
        assert_top(positions, pooled, set(range(max(0, n - W), n)), S=14)


@pytest.mark.parametrize("method", [Dilated(8, 0, 0), Dilated(8, 5, 3), Dilated(None, 6, 2), Dilated(None, 0, 0), Dilated(1, 0, 0)])
def test_dilated_is_its_formula_written_out(method):
    """A window off by one, a chunk's first token instead of its last, or decoding that differs from prefill."""
    T, H, KV, starts = 30, 4, 2, [10, 7]
    q, k, v, _ = draw(2, T, H, KV, seed=30)
    Tq = T - max(starts)
    chunk = torch.stack([q[b, start:start + Tq] for b, start in enumerate(starts)])
    y, _ = method.prefill(chunk, k, v, torch.tensor(starts), None)
    for b in range(2):
        for t in range(Tq):
            i = starts[b] + t
            read = []
            for j in range(i + 1):
                last_of_chunk = method.dilation is not None and j % method.dilation == method.dilation - 1
                if j >= i - method.local or j < method.initial or last_of_chunk:
                    read.append(j)
            step, selected = method.decode(chunk[b:b + 1, t:t + 1], layer_cache(k[b:b + 1, :i + 1], v[b:b + 1, :i + 1]))
            for h in range(H):
                expected = attention_in_python(chunk[b, t, h], k[b, :, h // 2], v[b, :, h // 2], read)
                assert_close(y[b, t, h], expected)
                assert_close(step[0, 0, h], expected)
                assert [j for j in selected[0, h // 2].tolist() if j >= 0] == read


def test_streaming_llm_reads_sinks_and_window():
    """dilation=None that still reads chunk ends."""
    q, k, v, _ = draw(1, 20, 4, 2, seed=31)
    _, selected = Dilated(None, local=5, initial=3).decode(q[:, -1:], layer_cache(k, v))
    assert [j for j in selected[0, 0].tolist() if j >= 0] == [0, 1, 2, 14, 15, 16, 17, 18, 19]


def test_dense_decode_ignores_unfilled_slots():
    """A shorter row of a batch that attends to the zeros behind its end."""
    q, k, v, _ = draw(2, 20, 4, 2, seed=32)
    y, selected = Dense().decode(q[:, -1:], layer_cache(k, v, used=[20, 9]))
    assert selected is None
    for h in range(4):
        assert_close(y[1, 0, h], attention_in_python(q[1, -1, h], k[1, :, h // 2], v[1, :, h // 2], range(9)))


# ---------------------------------------------------------------- a full budget is dense

OFF_BLOCK = 1, 3, 16, 37, 64  # shorter than a block, on and off its multiples


@pytest.mark.parametrize("T", OFF_BLOCK)
@pytest.mark.parametrize("extra", [0, 32])
def test_full_budget_is_dense_attention(T, extra):
    """A key lost at the end of the last block, read twice, or out of order, when nothing needs to be dropped."""
    q, k, v, dice = draw(2, T, 4, 2, seed=T)
    whole = -(-T // 16) * 16 + extra
    budget = max(whole, 32)
    reference = attend(q, k, v, causal=True)
    for method in MoBA(budget, 16), MoBA(budget, 16, random=1), Dilated(16, T, 0), Dilated(1, 0, 0), Dilated(None, 0, T):
        assert_close(method.prefill(q, k, v, 0, dice)[0], reference, what=name(method))
    for method in Quest(budget, 16), Quest(budget, 16, random=1), Dilated(16, T, 0), Dilated(1, 0, 0), Dilated(None, 0, T):
        assert_close(method.decode(q[:, -1:], layer_cache(k, v, dice))[0], reference[:, -1:], what=name(method))
    for method in SnapKV(T + extra + 2, 2), SnapKV(T + extra + 2, T + 1), SnapKV(T + extra + 2, 2, random=1):
        window = torch.zeros(2, T + 1, 4, 8)
        window[:, -T:] = q
        kept = method.compress(window, k, v, torch.full((2,), T), dice[:, -1:])
        assert torch.equal(kept, torch.arange(T).expand(2, 2, T)), name(method)


def test_snapkv_with_budget_of_exactly_the_prompt_keeps_it_all():
    """The original permutes the entries of a prompt as long as its capacity."""
    q, k, v, _ = draw(2, 30, 4, 2, seed=33)
    kept = SnapKV(30, 4).compress(q[:, -4:], k, v, torch.tensor([30, 18]), None)
    assert torch.equal(kept[0], torch.arange(30).expand(2, 30))
    assert torch.equal(kept[1], torch.cat([torch.arange(18), torch.full((12,), -1)]).expand(2, 30))


def test_hooks_a_method_does_not_override_are_dense():
    """Quest that is sparse in prefill, MoBA in decoding, SnapKV in either: Table 1 says which phase is sparse."""
    q, k, v, dice = draw(2, 40, 4, 2, seed=34)
    dense = attend(q, k, v, causal=True)
    for method in Quest(32, 16), SnapKV(16, 4):
        y, selected = method.prefill(q, k, v, 0, dice)
        assert torch.equal(y, dense) and selected is None
    for method in MoBA(32, 16), SnapKV(16, 4):
        y, selected = method.decode(q[:, -1:], layer_cache(k, v))
        assert_close(y, dense[:, -1:])
        assert selected is None
    for method in Dense(), Quest(32, 16), MoBA(32, 16), Dilated():
        assert method.compress(q[:, -4:], k, v, torch.tensor([40, 40]), dice[:, -1:]) is None


# ---------------------------------------------------------------- what was read stays inside the budget

@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from([1, 4, 16]), st.integers(2, 6), st.booleans(), st.booleans(),
       st.sampled_from([None, 0, 5]), st.sampled_from(HEADS))
def test_quest_reads_within_its_budget(used, other, block_size, blocks, keep_first, keep_current, seed, heads):
    """A budget that is believed instead of measured: forced pages on top, slots of the future, one slot twice."""
    H, KV = heads
    T = max(used, other)
    q, k, v, dice = draw(2, T, H, KV, seed=used)
    method = Quest(blocks * block_size, block_size, keep_first, keep_current, seed)
    _, selected = method.decode(q[:, -1:], layer_cache(k, v, dice, used=[used, other]))
    for b, n in enumerate((used, other)):
        for h in range(KV):
            read = [s for s in selected[b, h].tolist() if s >= 0]
            assert 0 < len(read) <= method.budget and len(set(read)) == len(read) and max(read) < n
            if keep_first:
                assert set(range(min(block_size, n))) <= set(read)
            if keep_current:
                assert set(range((n - 1) // block_size * block_size, n)) <= set(read)
            if n <= method.budget:
                assert len(read) == n


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 70), st.integers(0, 40), st.sampled_from([1, 4, 16]), st.integers(2, 5), st.booleans(),
       st.sampled_from([None, 0, 5]), st.sampled_from(HEADS))
def test_moba_reads_within_its_budget(T, start, block_size, blocks, keep_first, seed, heads):
    """A forced block on top of the budget, one of the future, or the own one missing."""
    q, k, v, dice = draw(2, start + T, *heads, seed=T)
    method = MoBA(blocks * block_size, block_size, keep_first, seed)
    _, selected = method.prefill(q[:, start:], k, v, start, dice[:, start:])
    assert selected.shape[:3] == (2, heads[1], T) and selected.shape[3] * block_size <= method.budget
    for t in range(T):
        current = (start + t) // block_size
        for read in selected[:, :, t].flatten(0, 1).tolist():
            read = [n for n in read if n >= 0]
            assert len(read) == len(set(read)) == min(blocks, current + 1) and max(read) == current
            assert 0 in read or not keep_first


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 12), st.integers(1, 40), st.sampled_from([1, 3, 7]),
       st.sampled_from([None, 0, 5]), st.sampled_from(HEADS))
def test_snapkv_keeps_within_its_budget(length, other, window, more, kernel, seed, heads):
    """A window on top of the budget, padding kept as if it were text, rows out of order."""
    T = max(length, other)
    q, k, v, dice = draw(2, max(T, window), *heads, seed=length)
    method = SnapKV(window + more, window, kernel, seed)
    kept = method.compress(q[:, -window:], k[:, :T], v[:, :T], torch.tensor([length, other]), dice[:, -1:])
    for b, n in enumerate((length, other)):
        for positions in kept[b].tolist():
            read = [j for j in positions if j >= 0]
            assert len(read) == min(method.budget, n) and read == sorted(set(read))
            assert set(range(max(0, n - window), n)) <= set(read) <= set(range(n))
            assert positions[len(read):] == [-1] * (len(positions) - len(read))


# ---------------------------------------------------------------- selection by chance (H2)

def choices(method, dice, T=160, KV=2):
    """What a random method selects for each row of dice (B,), the other inputs the same: (B, KV, S), sorted."""
    B = len(dice)
    q, k, v, _ = (x.expand(B, *x.shape[1:]) for x in draw(1, T, 4, KV, D=2, seed=40))
    if isinstance(method, Quest):
        _, selected = method.decode(q[:, -1:], LayerCache(k, v, torch.full((B,), T), False, dice[:, None], None))
    elif isinstance(method, MoBA):
        selected = method.prefill(q[:, -1:], k, v, T - 1, dice[:, None])[1].squeeze(2)
    else:
        selected = method.compress(q[:, -method.window:], k, v, torch.full((B,), T), dice[:, None])
    return selected.sort(dim=-1).values


RANDOM = [Quest(40, 8, random=3), MoBA(40, 8, random=3), SnapKV(40, 8, random=3)]


@pytest.mark.parametrize("method", RANDOM, ids=name)
def test_random_choice_is_a_function_of_seed_and_dice(method):
    """A run that cannot be repeated, or heads, steps and seeds that share one draw, or a choice that batching changes."""
    dice = torch.randint(2**62, (8,), generator=torch.Generator().manual_seed(0))
    first = choices(method, dice)
    assert torch.equal(first, choices(method, dice))
    assert torch.equal(first.flip(0), choices(method, dice.flip(0)))
    assert torch.equal(first[3:4], choices(method, dice[3:4]))
    assert not torch.equal(first, choices(type(method)(40, 8, random=4), dice))
    assert not torch.equal(first[:, 0], first[:, 1])
    assert len(first.flatten(1).unique(dim=0)) == 8
    assert not torch.equal(first, choices(type(method)(40, 8), dice))


@pytest.mark.parametrize("method", RANDOM, ids=name)
@pytest.mark.parametrize("consecutive", [False, True])
def test_random_choice_covers_all_candidates_alike(method, consecutive):
    """A weak hash that prefers some blocks: H2's control would then be no control. Forced entries are always there."""
    B, N = 4000, 20
    dice = torch.arange(B) if consecutive else torch.randint(2**62, (B,), generator=torch.Generator().manual_seed(1))
    selected = choices(method, dice)
    if isinstance(method, SnapKV):    # candidates are the 152 positions before the window
        N, forced, drawn = 160, set(range(152, 160)), 32
    elif isinstance(method, Quest):
        selected, forced, drawn = selected[..., ::8] // 8, {0, 19}, 3
    else:
        forced, drawn = {0, 19}, 3
    counts = torch.nn.functional.one_hot(selected, N).sum(2).sum(0)  # (KV, N)
    for h in range(2):
        p = drawn / (N - len(forced))
        for candidate, count in enumerate(counts[h].tolist()):
            if candidate in forced:
                assert count == B
            else:
                assert abs(count - B * p) < 5 * math.sqrt(B * p * (1 - p)), f"head {h}, candidate {candidate}: {count}"


@pytest.mark.parametrize("consecutive", [False, True])
def test_chance_is_uniform_and_independent(consecutive):
    """Draws that repeat, at a shift, along dice, seeds, heads or candidates."""
    dice = torch.arange(64)[None] if consecutive else torch.randint(2**62, (1, 64), generator=torch.Generator().manual_seed(2))
    x = torch.stack([chance(dice, seed, KV=4, N=32)[0] for seed in range(6)])  # (seed, KV, Tq, N)
    assert x.shape == (6, 4, 64, 32) and 0 <= x.min() and x.max() < 1
    assert abs(x.mean() - 1 / 2) < 0.01 and abs(x.var() - 1 / 12) < 0.002
    assert len(x.unique()) > 0.99 * x.numel()
    for dim in range(4):
        for shift in 1, 2:
            a, b = x.narrow(dim, shift, x.shape[dim] - shift), x.narrow(dim, 0, x.shape[dim] - shift)
            correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
            assert abs(correlation) < 0.03, f"dim {dim}, shift {shift}: {correlation}"


def test_randomized_draws_instead_of_scoring():
    """H2 with another budget or other forced blocks than the method it is compared with."""
    assert randomized(Quest(128, 32, keep_first=False), 7) == Quest(128, 32, keep_first=False, random=7)
    for method in Dense(), Dilated(), parse("moba+snapkv", 4096):
        with pytest.raises(ValueError) as raised:
            randomized(method, 7)
        one_line(raised, name(method))


# ---------------------------------------------------------------- command lines

quests = st.builds(lambda blocks, size, first, current, seed: Quest(blocks * size, size, first, current, seed),
                   st.integers(2, 9), st.integers(1, 99), st.booleans(), st.booleans(), st.none() | st.integers(0, 9))
mobas = st.builds(lambda blocks, size, first, seed: MoBA(blocks * size, size, first, seed),
                  st.integers(2, 9), st.integers(1, 99), st.booleans(), st.none() | st.integers(0, 9))
snapkvs = st.builds(lambda window, more, kernel, seed: SnapKV(window + more, window, 2 * kernel + 1, seed),
                    st.integers(1, 99), st.integers(1, 99), st.integers(0, 9), st.none() | st.integers(0, 9))
dilateds = st.builds(Dilated, st.none() | st.integers(1, 99), st.integers(0, 99), st.integers(0, 99))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.one_of(st.just(Dense()), quests, mobas, snapkvs, dilateds))
def test_parse_reads_what_name_writes(method):
    """A label in a table of results that does not name the method that gave it."""
    assert parse(name(method), context_len=4096) == method


@settings(max_examples=50, deadline=None, derandomize=True)
@given(mobas, snapkvs, quests)
def test_parse_reads_what_name_writes_of_combinations(moba, snapkv, quest):
    """A combination that loses a part, or a part's settings."""
    for methods in (moba, snapkv), (snapkv, quest), (moba, quest), (moba, snapkv, quest):
        assert parse(name(compose(*methods)), context_len=4096) == compose(*methods)
    both = parse(f"{name(quest)} + {name(moba)}", context_len=4096)
    assert (both.prefill_by, both.compress_by, both.decode_by) == (moba, Dense(), quest)


def test_parse_takes_fractions_of_the_context():
    """1/16 of 4096 that is not the 256 of the paper's tables."""
    assert parse("quest:budget=1/16", 4096) == Quest(256)
    assert parse("quest:budget=1/16,block_size=16,keep_first=false", 512) == Quest(32, 16, keep_first=False)
    assert parse("dilated:dilation=none,local=1/4", 1000) == Dilated(None, 250)
    assert parse("moba:budget=1/8+snapkv:budget=1/4", 4096) == Compose(prefill_by=MoBA(512), compress_by=SnapKV(1024))
    assert parse("dense", 4096) == Dense() and name(Dense()) == "dense"


@pytest.mark.parametrize("text, words", {
    "qust": ["'qust'", "quest", "snapkv"],
    "": ["unknown method"],
    "quest+": ["unknown method"],
    "quest:page=16": ["quest", "'page'", "block_size"],
    "dense:budget=64": ["dense", "'budget'", "none"],
    "quest:budget=many": ["budget=many", "1/16"],
    "quest:budget=-64": ["budget=-64"],
    "quest:budget=1.5": ["budget=1.5"],
    "quest:budget=1/0": ["budget=1/0"],
    "quest:budget": ["budget"],
    "quest:budget=1/3": ["1/3", "4096"],
    "quest:budget=100": ["100", "64", "128"],
    "quest:budget=0": ["budget=0"],
    "quest:budget=64": ["budget=64", "2"],
    "moba:budget=64": ["budget=64", "2"],
    "quest:block_size=0": ["block_size=0"],
    "snapkv:budget=64": ["budget=64", "window=64"],
    "snapkv:window=0": ["window=0"],
    "snapkv:kernel=4": ["kernel=4", "odd"],
    "dilated:dilation=0": ["dilation=0"],
    "quest:budget=none": ["budget=none"],
    "quest:keep_first=3": ["keep_first=3"],
    "moba:block_size=true": ["block_size=true"],
    "snapkv:kernel=none": ["kernel=none"],
    "dilated:local=none": ["local=none"],
    "quest+quest": ["quest", "both", "decode"],
    "quest:budget=128+quest": ["budget=128", "budget=256", "decode"],
    "moba+dilated": ["moba", "dilated", "prefill"],
    "snapkv+dilated": ["dilated", "snapkv"],
    "dilated+snapkv": ["dilated", "snapkv"],
}.items(), ids=str)
def test_bad_settings_are_one_clear_line(text, words):
    """A typing error that becomes a traceback, or worse, another experiment."""
    with pytest.raises(ValueError) as raised:
        parse(text, context_len=4096)
    one_line(raised, *words)


def test_compose_takes_each_hook_from_its_method():
    """A combination in which one method silently switches another off."""
    q, k, v, dice = draw(2, 50, 4, 2, seed=50)
    moba, snapkv, quest = MoBA(16, 8), SnapKV(20, 4), Quest(16, 8)
    both, cache = compose(quest, snapkv, moba), layer_cache(k, v)
    assert torch.equal(both.prefill(q, k, v, 0, dice)[0], moba.prefill(q, k, v, 0, dice)[0])
    assert torch.equal(both.decode(q[:, -1:], cache)[1], quest.decode(q[:, -1:], cache)[1])
    end = q[:, -4:], k, v, torch.tensor([50, 50]), dice[:, -1:]
    assert torch.equal(both.compress(*end), snapkv.compress(*end))


# ---------------------------------------------------------------- README's selector

def test_the_selector_of_the_readme_reads_the_blocks_of_the_best_keys(monkeypatch):
    """A tutorial that no longer runs, or that selects as its parent does."""
    text = (Path(__file__).parent.parent / "README.md").read_text().partition("## A selector of your own")[2]
    space = {"__name__": "bestkey"}
    monkeypatch.setitem(sys.modules, "bestkey", types.ModuleType("bestkey"))  # where dataclasses look their class up
    monkeypatch.setattr(sparse, "METHODS", dict(sparse.METHODS))
    exec(text.partition("```python\n")[2].partition("```")[0], space)
    method = sparse.parse("bestkey:budget=16,block_size=8", 64)
    assert type(method) is space["BestKey"]
    q, k, v = (torch.randn(2, 40, heads, 16, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2, 2))
    scores = method.score(q, k)
    products = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(2, dim=2))  # (B, H, T, T)
    best = products.unflatten(-1, (5, 8)).amax(-1).unflatten(1, (2, 2)).mean(2)   # (B, KV, T, N)
    assert_close(scores, best)
    full = replace(method, budget=40)
    assert_close(full.prefill(q, k, v, 0, None)[0], Dense().prefill(q, k, v, 0, None)[0])
