"""sparse.py: each method against its original, and against Eq. 3 and 4 written out in Python."""
import math
import sys
import types
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, strategies as st

import sparse
from conftest import assert_close, layer_cache, refused
from drawn import (dilateds, dtypes, heads, junk, law, methods, mobas, quests, seeds, selectors,
                   snapkvs)
from sparse import (Compose, Dense, Dilated, MoBA, Quest, SnapKV, attend, chance, compose, drops,
                    name, parse, per_kv_head, phases, randomized, window_of)

ATOL = {torch.float32: 1e-5, torch.float64: 1e-5, torch.bfloat16: 2e-2}


def draw(B, T, H, KV, D=8, seed=0):
    """q, k, v, dice. Keys share a mean per 8 tokens, so that blocks differ."""
    source = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, T, heads, D, generator=source) for heads in (H, KV, KV))
    blocks = torch.randn(B, -(-T // 8), KV, D, generator=source)
    k = k + blocks.repeat_interleave(8, dim=1)[:, :T]
    return q, k, v, torch.randint(2**62, (B, T), generator=source)


def cells(*sizes):
    """All indices of a tensor of these sizes."""
    return torch.cartesian_prod(*map(torch.arange, (*sizes, 1)))[:, :-1].tolist()


def group(h, heads):
    """The query heads of KV head h."""
    H, KV = heads
    return range(h * H // KV, (h + 1) * H // KV)


def listed(row):
    """The indices in a row of a selection, without the -1 of none."""
    return sorted(j for j in row.tolist() if j >= 0)


# ---------------------------------------------------------------- against the originals

def repeated(selectors, prefix):
    """The inputs of a case: those of fewer KV heads come repeated, as the originals do it."""
    k, v = selectors[prefix + "k"], selectors[prefix + "v"]
    return selectors["q"], *(x.repeat_interleave(4 // k.shape[2], dim=2) for x in (k, v))


def marked(indices, N):
    """(..., S) -> (..., N), True at the indices, of which -1 is none."""
    mask = torch.zeros(*indices.shape[:-1], N + 1, dtype=torch.bool)
    return mask.scatter(-1, indices.where(indices >= 0, N), True)[..., :N]


@pytest.mark.parametrize("block_size, topk", [(16, 3), (32, 2)])
def test_moba_matches_original(selectors, block_size, topk):
    """Another score (scaled, per block sum), the own block not counted, a leak from the future."""
    method = MoBA(budget=topk * block_size, block_size=block_size, keep_first=False)
    y, _ = method.prefill(*repeated(selectors, ""), 0, None)
    assert_close(y, selectors[f"moba/out_{block_size}_{topk}"])


@pytest.mark.parametrize("case, budget", [("16_64", 64), ("32_64", 96), ("gqa_16_64", 64)])
def test_quest_matches_original(selectors, case, budget):
    """Pages misaligned, an unfilled page's zeros in its bounds. 32_64 reads 3 pages."""
    prefix, page = ("gqa_" if "gqa" in case else ""), int(case.split("_")[-2])
    method = Quest(budget, page, keep_first=False, keep_current=False)
    q, k, v = repeated(selectors, prefix)
    expected = lambda what: selectors[f"quest/{prefix}{what}_{page}_64"]
    y, selected = method.decode(q[:, -1:], layer_cache(k, v))
    assert_close(y, expected("out"))
    pages = (selected // page).where(selected >= 0, -1)
    assert torch.equal(marked(pages, math.ceil(150 / page)), expected("pages"))
    if not prefix:
        scores = method.score(q[:, -1:], k, torch.ones(2, 150, dtype=torch.bool))
        assert_close(scores[:, :, 0], expected("scores"), atol=1e-4)
        assert torch.equal(marked(selected, 150), expected("mask"))


@pytest.mark.parametrize("case", ["w8_c40_k5", "w16_c64_k7", "gqa_w8_c40_k5"])
def test_snapkv_matches_original(selectors, case):
    """A window that peeks at itself, pooling with another edge, a budget without the window."""
    prefix = "gqa_" if "gqa" in case else ""
    W, budget, kernel = (int(part[1:]) for part in case.removeprefix("gqa_").split("_"))
    q, k, v = repeated(selectors, prefix)
    lengths = torch.tensor([150, 150])
    kept = SnapKV(budget, W, kernel).compress(q[:, -W:], k, v, lengths, None)
    assert torch.equal(kept, selectors[f"snapkv/{case}_positions"].sort(dim=-1).values)


# ---------------------------------------------------------------- Eq. 4: what is read

D = 32  # of one_hot_inputs, and the most entries there


def one_hot_inputs(B, T, heads, seed, dtype):
    """
    q, k, v, dice. Entry j's value is 1 in channel j and else 0, so that attention's output is what
    a query reads of each entry.
    """
    q, k, _, dice = draw(B, T, *heads, D, seed)
    v = torch.eye(T, D, dtype=dtype)[None, :, None].expand(B, T, heads[1], D).contiguous()
    return q.to(dtype), k.to(dtype), v, dice


def reads(dilated, i, j):
    """Whether Dilated's query at i reads the key at j."""
    ends_chunk = dilated.dilation is not None and (j + 1) % dilated.dilation == 0
    return j <= i and (i - j <= dilated.local or j < dilated.initial or ends_chunk)


def assert_reads(y, q, k, entries, dtype):
    """y (D,) is Eq. 4 for q (D,) over these entries of k (T, D), and over no other."""
    weight = torch.zeros(D, dtype=torch.float64)
    weight[entries] = torch.softmax(k[entries].double() @ q.double() / math.sqrt(D), 0)
    assert y.nonzero()[:, 0].tolist() == entries
    assert_close(y.double(), weight, ATOL[dtype])


@law(60)
@given(methods, heads, st.integers(1, D), st.lists(st.integers(0, D), min_size=1, max_size=2),
       st.booleans(), dtypes, seeds)
def test_prefill_reads_what_it_reports_and_no_more(method, heads, T, starts, one, dtype, seed):
    """
    A budget that is believed instead of measured: an entry of the future, of another block or head,
    a window off by one, a chunk that counts from its own start.
    """
    (H, KV), B, by = heads, len(starts), phases(method).prefill_by
    q, k, v, dice = one_hot_inputs(B, T, heads, seed, dtype)
    starts = [starts[0] % T] * B if one else [start % T for start in starts]
    Tq = T - max(starts)
    chunk = torch.stack([q[b, start:start + Tq] for b, start in enumerate(starts)])
    start = starts[0] if one else torch.tensor(starts)
    y, selected = method.prefill(chunk, k, v, start, dice[:, :Tq])
    assert y.dtype == dtype and y.shape == chunk.shape
    assert (selected is None) == (not isinstance(by, MoBA))
    for b, t, h in cells(B, Tq, H):
        slot, of = starts[b] + t, h * KV // H
        entries = list(range(slot + 1))
        if isinstance(by, Dilated):
            entries = [j for j in entries if reads(by, slot, j)]
        elif isinstance(by, MoBA):
            entries = [j for j in entries if j // by.block_size in selected[b, of, t].tolist()]
            assert len(entries) <= by.budget and slot in entries
        assert_reads(y[b, t, h], chunk[b, t, h], k[b, :, of], entries, dtype)


@law(60)
@given(methods, heads, st.integers(1, D), st.lists(st.integers(1, D), min_size=1, max_size=2),
       dtypes, junk.filter(math.isfinite), seeds)
def test_decode_reads_what_it_reports_and_no_more(method, heads, T, used, dtype, junk, seed):
    """
    The same of a step. What lies in slots that no entry fills, if it is finite, as a cache sees to,
    and how many of them there are, is nothing to it.
    """
    (H, KV), B, by = heads, len(used), phases(method).decode_by
    used = [min(n, T) for n in used]
    q, k, v, dice = one_hot_inputs(B, T, heads, seed, dtype)
    empty, most = torch.arange(T) >= torch.tensor(used)[:, None], max(used)
    spoiled = [x.masked_fill(empty[..., None, None], junk) for x in (k, v)]
    results = [method.decode(q[:, -1:], layer_cache(*stored, used, dice[:, -1:]))
               for stored in ((k, v), spoiled, (k[:, :most], v[:, :most]))]
    for y, selected in results:
        assert_close(y, results[0][0], 1e-6 if dtype != torch.bfloat16 else ATOL[dtype])
        assert (selected is None) == (not isinstance(by, (Dilated, Quest)))
        for b, h in cells(B, H):
            of, entries = h * KV // H, list(range(used[b]))
            if isinstance(by, Dilated):
                entries = [j for j in entries if reads(by, used[b] - 1, j)]
            elif isinstance(by, Quest):
                entries = listed(selected[b, of])
                assert len(entries) <= by.budget
            assert selected is None or listed(selected[b, of]) == entries
            assert_reads(y[b, 0, h], q[b, -1, h], k[b, :, of], entries, dtype)


@pytest.mark.parametrize("start", [0, torch.tensor([0, 0])], ids=["one", "per row"])
def test_moba_prefill_of_a_long_prompt_is_that_of_its_pieces(start):
    """Queries are taken in parts of 256: one that starts a slot off, or misses its last keys."""
    T, method = 601, MoBA(48, 16)
    q, k, v, _ = draw(2, T, 4, 2, seed=15)
    pieces = [method.prefill(q[:, t:t + 100], k[:, :t + 100], v[:, :t + 100], t, None)[0]
              for t in range(0, T, 100)]
    assert_close(method.prefill(q, k, v, start, None)[0], torch.cat(pieces, dim=1))


# ---------------------------------------------------------------- Eq. 3: what is selected

def assert_top(chosen, scores, forced, S):
    """
    `chosen` are S of the candidates of `scores` ({candidate: score}), all forced ones among them,
    and the rest the best. Near-ties may swap.
    """
    expected = min(S, len(scores))
    assert len(chosen) == len(set(chosen)) == expected, f"{chosen}: not {expected} of {scores}"
    assert forced <= set(chosen) <= set(scores), f"{chosen}: forced {forced}, of {sorted(scores)}"
    free = sorted((scores[n] for n in scores if n not in forced), reverse=True)
    cut = free[expected - len(forced) - 1] if expected > len(forced) else math.inf
    for n in set(chosen) - forced:
        assert scores[n] >= cut - 1e-5, f"{n} scores {scores[n]}, the cut is at {cut}"


def by_chance(method, dice, h, KV, candidates):
    """The scores of KV head h that a seed draws, with one of the row's dice."""
    scores = chance(dice.view(1, 1), method.random, KV, max(candidates) + 1)[0, h, 0]
    return {n: scores[n].item() for n in candidates}


@law(60)
@given(quests, heads, st.integers(1, 40), st.integers(1, 40), seeds)
def test_quest_selects_by_equation_3(method, heads, T, used, seed):
    """
    A bound that a key of the block exceeds; an unfilled slot in it; heads grouped in another order,
    a forced block on top of the budget, half of a block read.
    """
    used, size = min(used, T), method.block_size
    q, k, v, dice = draw(1, T, *heads, seed=seed)
    cache = layer_cache(k, v, [used], dice[:, -1:])
    ours = method.score(q[:, -1:], k, cache.filled_slots())[0, :, 0]  # (KV, N)
    _, selected = method.decode(q[:, -1:], cache)
    last = (used - 1) // size
    for h in range(heads[1]):
        scores, asked = {}, [q[0, -1, i].tolist() for i in group(h, heads)]
        for n in range(last + 1):
            block = k[0, n * size:min((n + 1) * size, used), h].tolist()
            bounds = [sum(max(c * min(channel), c * max(channel))
                          for c, channel in zip(x, zip(*block))) for x in asked]
            scores[n] = sum(bounds) / len(bounds)
            assert ours[h, n].item() == pytest.approx(scores[n], abs=1e-4)
            for x, bound in zip(asked, bounds):
                assert all(bound >= sum(a * b for a, b in zip(x, key)) - 1e-6 for key in block)
        if method.random is not None:
            scores = by_chance(method, dice[0, -1], h, heads[1], scores)
        slots = listed(selected[0, h])
        blocks = sorted({j // size for j in slots})
        forced = ({0} if method.keep_first else set()) | ({last} if method.keep_current else set())
        assert_top(blocks, scores, forced, method.budget // size)
        assert slots == [j for j in range(used) if j // size in blocks]


@law(60)
@given(mobas, heads, st.integers(1, 24), st.integers(0, 20), seeds)
def test_moba_selects_by_equation_3(method, heads, Tq, start, seed):
    """A future block scored, another mean, heads of another group, the first block not counted."""
    size, T = method.block_size, start + Tq
    q, k, v, dice = draw(1, T, *heads, seed=seed)
    _, selected = method.prefill(q[:, start:], k, v, start, dice[:, start:])
    for t, h in cells(Tq, heads[1]):
        slot = start + t
        current, asked = slot // size, q[0, slot, group(h, heads)].double()
        products = (asked @ k[0, :, h].double().T).mean(0)
        scores = {n: products[n * size:(n + 1) * size].mean().item() for n in range(current)}
        if method.random is not None and current > 0:
            scores = by_chance(method, dice[0, slot], h, heads[1], scores)
        scores[current] = math.inf
        forced = {0, current} if method.keep_first else {current}
        assert_top(listed(selected[0, h, t]), scores, forced, method.budget // size)


@law(60)
@given(snapkvs, heads, st.lists(st.integers(1, 30), min_size=1, max_size=3), junk, seeds)
def test_snapkv_selects_by_equation_3(method, heads, lengths, junk, seed):
    """Padding in the softmax or window, a prompt shorter than it, pooling across a row's end."""
    B, T, W, half = len(lengths), max(lengths), method.window, method.kernel // 2
    q, k, v, dice = draw(B, T, *heads, seed=seed)
    # each row's last queries, the newest at the end; a short prompt's are preceded by garbage
    n = torch.tensor(lengths)
    asking = (n[:, None] - W + torch.arange(W)).clamp_min(0)
    last = q[torch.arange(B)[:, None], asking]
    stored = k.masked_fill((torch.arange(T) >= n[:, None])[..., None, None], junk)
    kept = method.compress(last, stored, v, n, dice[:, -1:])
    for b, h in cells(B, heads[1]):
        n = lengths[b]
        attention = torch.zeros(n, dtype=torch.float64)
        for t in range(n - W, n) if n > W else ():
            products = q[b, t, group(h, heads)].double() @ k[b, :t + 1, h].double().T
            p = (products / math.sqrt(8)).softmax(-1).mean(0)
            attention[:n - W] += p[:n - W] / W
        scores = {j: attention[max(0, j - half):j + half + 1].sum().item() / method.kernel
                  for j in range(n)}
        if method.random is not None:
            scores = by_chance(method, dice[b, -1], h, heads[1], scores)
        positions = listed(kept[b, h])
        assert kept[b, h].tolist() == positions + [-1] * (kept.shape[2] - len(positions))
        assert_top(positions, scores, set(range(max(0, n - W), n)), method.budget)


# ---------------------------------------------------------------- chance, for H2

def splitmix64(x):
    """As published, but for the last shift: who asks takes bits 31 to 54."""
    x = (x ^ x >> 30) * 0x3F58476D1CE4E5B9 % 2**64
    return (x ^ x >> 27) * 0x14D049BB133111EB % 2**64


@law(60)
@given(st.lists(st.integers(-2**63, 2**63 - 1), min_size=1, max_size=4), st.integers(0, 2**31),
       st.integers(1, 4), st.integers(1, 9))
def test_chance_is_its_hash(dice, seed, KV, N):
    """A draw that depends on who else is asked at the same time: it could not be repeated."""
    x = chance(torch.tensor([dice]), seed, KV, N)
    assert x.shape == (1, KV, len(dice), N) and x.dtype == torch.float32
    for h, t, n in cells(KV, len(dice), N):
        start = dice[t] + (seed * KV + h) * 0x632BE59BD9B4E019 + n * 0x1E3779B97F4A7C15
        assert x[0, h, t, n].item() == (splitmix64(start % 2**64) >> 31) % 2**24 / 2**24
    rows = chance(torch.tensor(dice)[:, None], seed, KV, N + 7)  # more candidates, one die a row
    assert torch.equal(rows[:, :, 0, :N], x[0].transpose(0, 1))


@pytest.mark.parametrize("consecutive", [False, True])
def test_chance_is_uniform_and_independent(consecutive):
    """A weak hash, and H2 no control: draws that repeat along dice, seeds, heads or candidates."""
    source = torch.Generator().manual_seed(2)
    dice = torch.arange(64) if consecutive else torch.randint(2**62, (64,), generator=source)
    x = torch.stack([chance(dice[None], seed, KV=4, N=32)[0] for seed in range(6)])
    assert abs(x.mean() - 1 / 2) < 0.01 and abs(x.var() - 1 / 12) < 0.002
    assert 0 <= x.min() and x.max() < 1 and len(x.unique()) > 0.99 * x.numel()
    for dim in range(4):  # seed, KV, Tq, N
        for shift in 1, 2:
            n = x.shape[dim] - shift
            pairs = torch.stack([x.narrow(dim, shift, n).flatten(), x.narrow(dim, 0, n).flatten()])
            assert abs(torch.corrcoef(pairs)[0, 1]) < 0.03, f"dim {dim}, shift {shift}"


# ---------------------------------------------------------------- methods of different phases

HOOKS = "prefill", "compress", "decode"
DECIDES = {Dense: "", Quest: "decode", MoBA: "prefill", SnapKV: "compress",
           Dilated: "prefill decode"}


@law(100)
@given(st.lists(st.just(Dense()) | selectors | dilateds, max_size=4))
def test_compose_gives_each_hook_to_who_decides_it(parts):
    """One method that silently switches another off; Dilated after some positions are gone."""
    deciders = {hook: [part for part in parts if hook in DECIDES[type(part)]] for hook in HOOKS}
    twice = any(len(some) > 1 for some in deciders.values())
    if twice or (deciders["compress"] and any(isinstance(part, Dilated) for part in parts)):
        with pytest.raises(ValueError):
            compose(*parts)
        return
    both = compose(*parts)
    assert both == compose(*parts[::-1]) == phases(both)
    for hook in HOOKS:
        assert getattr(both, f"{hook}_by") == (deciders[hook] or [Dense()])[0]
    windows = [part.window for part in parts if isinstance(part, SnapKV)]
    assert drops(both) == bool(windows) and window_of(both, None) == max([64, *windows])
    for part in parts:
        assert phases(part) == compose(part) and drops(part) == isinstance(part, SnapKV)
    assert phases(None) == Compose() and not drops(None)


class Saying(Dense):
    """A method whose hooks say who was asked for what."""

    def __init__(self, who):
        self.prefill, self.compress, self.decode = (
            lambda *args, hook=hook: (who, hook, args) for hook in HOOKS)


def test_a_composition_asks_its_parts():
    """A hook of Compose that asks another part, or loses an argument."""
    both = Compose(Saying("a"), Saying("b"), Saying("c"))
    assert both.prefill(1, 2, 3, 4, 5) == ("a", "prefill", (1, 2, 3, 4, 5))
    assert both.compress(1, 2, 3, 4, 5) == ("b", "compress", (1, 2, 3, 4, 5))
    assert both.decode(1, 2) == ("c", "decode", (1, 2))


# ---------------------------------------------------------------- methods as text

@law(100)
@given(methods | st.builds(compose, st.just(Dense()) | selectors | dilateds), st.integers(1, 9999),
       seeds)
def test_a_name_reads_back_as_what_it_names(method, context, seed):
    """A label in a table that does not name its method; H2 with another budget than the method."""
    assert phases(parse(name(method), context)) == phases(method)
    if isinstance(method, (Quest, MoBA, SnapKV)):
        drawn = randomized(method, seed)
        assert drawn.random == seed and replace(drawn, random=method.random) == method
        assert phases(parse(name(drawn), context)) == phases(drawn)
    else:
        refused(lambda: randomized(method, seed), name(method))


def test_parse_reads_what_the_readme_writes():
    """1/16 of 4096 that is not the 256 of the paper's tables; a setting that another loses."""
    assert parse("quest:budget=1/16", 4096) == Quest(256)
    first = parse("quest:budget=1/16,block_size=16,keep_first=false", 512)
    assert first == Quest(32, 16, keep_first=False)
    assert parse("dilated:dilation=none,local=1/4", 1000) == Dilated(None, 250)
    both = Compose(prefill_by=MoBA(512), compress_by=SnapKV(1024))
    assert parse("moba:budget=1/8 + snapkv:budget=1/4", 4096) == both
    assert parse("dense", 4096) == Dense() and name(Dense()) == "dense"


words = st.sampled_from([
    "dense", "quest", "moba", "snapkv", "dilated", ":", ",", "=", "+", " ", "²", "/", "-", "budget",
    "block_size", "window", "kernel", "local", "random", "keep_first", "dilation", "0", "1", "2",
    "16", "64", "256", "1/16", "true", "none"])
typed = st.text(st.characters(exclude_categories=["C", "Z"]), max_size=8)  # no line ends


@law(150)
@given(st.lists(words, max_size=12).map("".join) | typed | typed.map("quest:budget={}".format))
def test_parse_takes_or_refuses_any_text(text):
    """A traceback of int() instead of a line that says what is allowed."""
    try:
        method = parse(text, 4096)
    except ValueError as error:
        assert "\n" not in str(error) and "invalid literal" not in str(error)
    else:
        assert phases(parse(name(method), 4096)) == phases(method)


@pytest.mark.parametrize("text, words", {
    "qust": ["'qust'", "quest", "snapkv"],
    "": ["unknown method"],
    "quest:page=16": ["quest", "'page'", "block_size"],
    "dense:budget=64": ["dense", "'budget'", "none"],
    "quest:budget=many": ["budget=many", "1/16"],
    "quest:budget=-64": ["budget=-64"],
    "quest:budget=1.5": ["budget=1.5", "integer"],
    "quest:budget=²": ["budget=²", "integer"],
    "quest:budget=1/0": ["budget=1/0"],
    "quest:budget": ["budget"],
    "quest:budget=1/3": ["1/3", "4096"],
    "quest:budget=100": ["100", "64", "128"],
    "quest:budget=0": ["budget=0"],
    "quest:budget=3": ["use 128 or"],  # and not 64, which is too few
    "quest:budget=1/8,budget=1/4": ["budget is given twice"],
    "quest:budget=1/8 moba:budget=1/8": ["a space ends a method"],
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
    "dilated:local=none": ["local=none"],
    "quest:budget=128+quest": ["budget=128", "budget=256", "decode"],
    "moba+dilated": ["moba", "dilated", "prefill"],
    "snapkv+dilated": ["dilated", "snapkv"],
}.items(), ids=str)
def test_bad_settings_are_one_clear_line(text, words):
    """A typing error that becomes a traceback, or worse, another experiment."""
    refused(lambda: parse(text, context_len=4096), *words)


def test_a_file_may_put_off_its_annotations(monkeypatch):
    """A type that is its name, and no setting has it."""
    lines = ("from __future__ import annotations", "from dataclasses import dataclass",
             "from sparse import Quest", "@dataclass(frozen=True)", "class Late(Quest):",
             "    share: float = 0.5")
    module = types.ModuleType("late")
    monkeypatch.setitem(sys.modules, "late", module)
    exec("\n".join(lines), vars(module))
    monkeypatch.setitem(sparse.METHODS, "late", module.Late)
    assert parse("late:budget=1/8,share=1", 4096) == module.Late(512, share=1.0)
    refused(lambda: parse("late:share=true", 4096), "expected float")
    monkeypatch.setitem(module.Late.__annotations__, "share", "Unheard")
    refused(lambda: parse("late:budget=1/8", 4096), "late", "Unheard", "import it")


def test_a_setting_may_be_a_float(monkeypatch):
    """A selector of one's own with a width that no command line can set."""
    @dataclass(frozen=True)
    class Wide(Quest):
        width: float = 1.0

    monkeypatch.setitem(sparse.METHODS, "wide", Wide)
    for text, width in {"0.5": 0.5, "2": 2.0, "-1e-3": -0.001, "3e20": 3e20}.items():
        method = parse(f"wide:width={text}", 4096)
        assert method.width == width and type(method.width) is float
        assert parse(name(method), 4096) == method
    for wrong in "1/2", "true", "many", "1e999":
        refused(lambda: parse(f"wide:width={wrong}", 4096), "wide:width")


# ---------------------------------------------------------------- README's selector

def test_the_selector_of_the_readme_reads_the_blocks_of_the_best_keys(monkeypatch):
    """A tutorial that no longer runs, or that selects as its parent does."""
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    code = readme.partition("## A selector of your own")[2].partition("```python\n")[2]
    space = {"__name__": "bestkey"}
    # where dataclasses look their class up
    monkeypatch.setitem(sys.modules, "bestkey", types.ModuleType("bestkey"))
    monkeypatch.setattr(sparse, "METHODS", dict(sparse.METHODS))
    exec(code.partition("```")[0], space)
    method = sparse.parse("bestkey:budget=16,block_size=8", 64)
    assert type(method) is space["BestKey"]
    q, k, v, _ = draw(2, 40, 4, 2, D=16)
    products = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(2, dim=2))  # (B, H, T, T)
    best = per_kv_head(products.unflatten(-1, (5, 8)).amax(-1), 2)                # (B, KV, T, N)
    assert_close(method.score(q, k), best)
    y, _ = replace(method, budget=40).prefill(q, k, v, 0, None)
    assert_close(y, attend(q, k, v, causal=True))


def test_fields_of_a_class_that_is_no_dataclass_are_told(monkeypatch):
    """A setting that is there to read in the file, and unknown."""
    class Mine(Quest):
        beta: float = 3.0

    monkeypatch.setitem(sparse.METHODS, "mine", Mine)
    with pytest.raises(ValueError, match=r"mine: .* of Mine .* @dataclass\(frozen=True\)"):
        parse("mine:beta=2.0", 4096)
