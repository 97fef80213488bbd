"""kernels_sparse.py: every kernel against its reference in sparse.py, at lengths off the tile, in both dtypes."""
import math
from types import SimpleNamespace

import pytest
import torch

from triton_ops import quest, topk
from conftest import DEVICE, assert_as_good, assert_close
from triton_ops.quest import block_bounds, quest_attend, quest_scores
from triton_ops.snapkv import snapkv_scores
from triton_ops.topk import select
from sparse import Quest, SnapKV, attend_to_slots

pytestmark = pytest.mark.usefixtures("poisoned", "plain_references")
inf, nan = math.inf, math.nan


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def draw_cache(used, Tk, H, KV, D, dtype=torch.float32, seed=0):
    """
    q (B, 1, H, D), a view of a packed projection, and k, v (B, Tk, KV, D), slices of a larger cache, with NaN in all
    that may not be read; used (B,).
    """
    B = len(used)
    used = torch.tensor(used, device=DEVICE)
    q = draw(B, 1, H * D + 2 * KV * D, dtype=dtype, seed=seed)[..., :H * D].view(B, 1, H, D)
    k, v = (draw(B, Tk + 5, KV, D, dtype=dtype, seed=seed + i)[:, :Tk] for i in (1, 2))
    k += 0.5
    for x in k, v:
        x[torch.arange(Tk, device=DEVICE) >= used[:, None]] = nan
    return q, k, v, used


def layer_cache(k, v, used):
    """k, v as sparse.py expects them: fp32, and without garbage."""
    filled = torch.arange(k.shape[1], device=DEVICE) < used[:, None]
    k, v = (x.masked_fill(~filled[..., None, None], 0) for x in (k, v))
    return SimpleNamespace(k=k, v=v, used=used, filled_slots=lambda: filled, positions_of=lambda slots: slots)


def assert_selected(index, scores, S):
    """
    The rule of `select` in plain Python, for rows (R, S) of scores (R, N): NaN below all numbers, equals in order, -inf
    never.
    """
    for row, values in zip(index.tolist(), scores.tolist()):
        rank = lambda i: (values[i] == values[i], values[i] if values[i] == values[i] else 0)
        allowed = [i for i, value in enumerate(values) if value != -inf]
        best = sorted(sorted(allowed, key=rank, reverse=True)[:S])
        assert row == best + [-1] * (S - len(best)), f"{row} is not {best}"


# ---------------------------------------------------------------- select

@pytest.mark.parametrize("N", [1, 2, 31, 64, 1000, 5000])
def test_select_finds_what_topk_finds(N):
    """A lost carry of the running sums, a cut off by one bit, negative scores in reverse, padding taken for a score."""
    scores = draw(3, N, seed=N)
    scores[1] = -scores[1].abs() * 1e-30
    scores[2] *= 10.0 ** torch.randint(-38, 38, (N,), generator=torch.Generator().manual_seed(N)).to(DEVICE)
    for S in {1, N // 2 + 1, N}:
        index = select(scores, S)
        assert index.dtype == torch.int32
        assert torch.equal(index.long(), scores.topk(S).indices.sort().values), f"{N=}, {S=}"


@pytest.mark.parametrize("N", [1, 2, 31, 64, 1000])
def test_select_of_ties_infinities_and_nan(N):
    """Of equal scores the wrong ones or too many, -0 below 0, -inf or NaN before a number, -1 not at the end."""
    source = torch.Generator().manual_seed(N)
    few = torch.tensor([-inf, inf, 0.0, -0.0, 1.0, -1.0, nan, 3.4e38, -3.4e38, 1e-45])
    rows = [few[torch.randint(len(few), (N,), generator=source)], torch.full((N,), 0.25), torch.full((N,), -inf),
            torch.full((N,), nan), torch.full((N,), inf)]
    scores = torch.stack(rows).to(DEVICE)
    for S in {1, N // 3 + 1, N, N + 3}:
        assert_selected(select(scores, S), scores, S)


def test_select_beyond_its_registers(monkeypatch):
    """A row of several tiles: a count of one tile only, ranks that restart, ties that are counted per tile."""
    monkeypatch.setitem(topk.SELECT, "max_kept", 128)
    monkeypatch.setitem(topk.SELECT, "max_scan", 32)
    scores = torch.stack([draw(150), draw(150).round(), torch.full((150,), 2.0, device=DEVICE)])
    scores[0, 20:130] = -inf
    for S in 60, 170:
        assert_selected(select(scores, S), scores, S)


def test_select_takes_any_leading_dims_and_strides():
    """A view read as if it were contiguous."""
    scores = draw(2, 50, 3).transpose(1, 2)
    assert torch.equal(select(scores, 7).long(), scores.topk(7).indices.sort().values)


# ---------------------------------------------------------------- Quest

@pytest.mark.parametrize("block_size, D, dtype", [
    (1, 16, torch.float32), (8, 64, torch.bfloat16), (16, 128, torch.float32), (12, 32, torch.float32),
    (64, 128, torch.bfloat16), (100, 16, torch.bfloat16)])
def test_block_bounds_are_min_and_max(block_size, D, dtype):
    """An unfilled slot or a last block's padding in the bounds, a block of the wrong head, an empty block not 0."""
    Tk, used = 117, [117, 64, 3]
    _, k, _, used = draw_cache(used, Tk, 2, 2, D, dtype)
    low, high = block_bounds(k, used, block_size)
    assert low.dtype == high.dtype == dtype and low.shape == high.shape == (3, -(-Tk // block_size), 2, D)
    for b in range(3):
        for n in range(low.shape[1]):
            block = k[b, n * block_size:min((n + 1) * block_size, used[b])]
            empty = torch.zeros(2, D, device=DEVICE, dtype=dtype)
            assert torch.equal(low[b, n], block.amin(0) if len(block) else empty), f"low of {b}, {n}"
            assert torch.equal(high[b, n], block.amax(0) if len(block) else empty), f"high of {b}, {n}"


@pytest.mark.parametrize("H, KV, D, block_size, dtype", [
    (2, 2, 16, 1, torch.float32), (4, 1, 64, 8, torch.float32), (8, 1, 128, 16, torch.bfloat16),
    (12, 4, 32, 64, torch.bfloat16)])
@pytest.mark.parametrize("keep", [(True, True), (False, False), (True, False)])
def test_quest_scores_match_the_reference(H, KV, D, block_size, dtype, keep):
    """Heads grouped in the wrong order, a max for the mean, min and max swapped, the wrong block forced."""
    Tk = 150
    q, k, v, used = draw_cache([150, 128, 9], Tk, H, KV, D, dtype)
    low, high = block_bounds(k, used, block_size)
    N = low.shape[1]
    grown = [torch.full((3, N + 3, KV, D), nan, device=DEVICE, dtype=dtype) for _ in (low, high)]
    for larger, x in zip(grown, (low, high)):
        larger[:, :N] = x
    scores = quest_scores(q, grown[0][:, :N], grown[1][:, :N], used, block_size, *keep)

    cache = layer_cache(k, v, used)
    ref = Quest(block_size=block_size, budget=2 * block_size).score(q, cache.k, cache.filled_slots()).squeeze(2)
    block, current = torch.arange(N, device=DEVICE), ((used - 1) // block_size)[:, None, None]
    never, always = (block > current).expand_as(ref), torch.zeros_like(ref, dtype=torch.bool)
    if keep[0]:
        always = always | (block == 0)
    if keep[1]:
        always = always | (block == current)
    assert torch.equal(scores == inf, always) and torch.equal(scores == -inf, never & ~always)
    free = ~(always | never)
    if free.any():
        assert_close(scores[free], ref[free], atol=1e-5 * ref.abs().max().item())


@pytest.mark.parametrize("programs", [1, 264], ids=["one split", "many splits"])
@pytest.mark.parametrize("H, KV, D, block_size, dtype", [
    (2, 2, 64, 1, torch.float32), (4, 1, 32, 8, torch.float32), (8, 1, 64, 16, torch.bfloat16),
    (3, 1, 16, 12, torch.float32), (2, 2, 128, 64, torch.bfloat16), (4, 1, 128, 64, torch.float32),
    (2, 1, 16, 128, torch.bfloat16)])
def test_quest_attend_is_attention_over_the_slots_it_reports(H, KV, D, block_size, dtype, programs, monkeypatch):
    """A split weighed wrongly, a block of -1 or an unfilled slot read, a slot reported but not read, heads mixed up."""
    monkeypatch.setitem(quest.ATTEND, "programs", programs)
    Tk, used = 270, [270, 170, 5]
    q, k, v, used = draw_cache(used, Tk, H, KV, D, dtype)
    N = -(-Tk // block_size)
    S = min(N, max(3, 150 // block_size))
    order = torch.rand(3, KV, N, generator=torch.Generator().manual_seed(1)).argsort(-1).to(DEVICE)
    chosen = order[..., :S].int()
    chosen[..., 0] = 0                 # something to read in every row
    chosen[..., 1] = -1                # and nothing, in the middle
    y, slots = quest_attend(q, k, v, chosen, used, block_size)

    expected = chosen.long()[..., None] * block_size + torch.arange(block_size, device=DEVICE)
    unread = (chosen < 0)[..., None] | (expected >= used[:, None, None, None])
    assert torch.equal(slots, expected.masked_fill(unread, -1).flatten(2))
    assert y.dtype == dtype
    cache = layer_cache(k, v, used)
    ref = attend_to_slots(q.float(), cache.k.float(), cache.v.float(), slots)
    assert_as_good(y, attend_to_slots(q, cache.k, cache.v, slots), ref, "y")


@pytest.mark.parametrize("H, KV, dtype", [(2, 2, torch.float32), (8, 2, torch.bfloat16), (8, 1, torch.float32)])
@pytest.mark.parametrize("keep", [(True, True), (False, False)])
def test_quest_step_is_quest_decode(H, KV, dtype, keep):
    """The kernels right one by one, but not in one another's words: layouts, dtypes, -1s. A row is below the budget."""
    block_size, budget = 8, 40
    q, k, v, used = draw_cache([123, 96, 20], 123, H, KV, 32, dtype)
    low, high = block_bounds(k, used, block_size)
    chosen = select(quest_scores(q, low, high, used, block_size, *keep), budget // block_size)
    y, slots = quest_attend(q, k, v, chosen, used, block_size)
    cache = layer_cache(k, v, used)
    plain, selected = Quest(budget, block_size, *keep).decode(q, cache)
    assert torch.equal(slots.sort(-1).values, selected.sort(-1).values)
    assert_as_good(y, plain, attend_to_slots(q.float(), cache.k.float(), cache.v.float(), selected), "y")


def test_quest_without_any_key_is_zero():
    """Minus infinity from minus infinity, or a division by an empty sum; in one split and in all of them."""
    q, k, v, used = draw_cache([40, 40], 40, 2, 1, 16)
    chosen = torch.full((2, 1, 4), -1, dtype=torch.int32, device=DEVICE)
    chosen[1, 0, 3] = 2  # one split of row 1 reads
    y, slots = quest_attend(q, k, v, chosen, used, 16)
    assert torch.equal(y[0], torch.zeros_like(y[0])) and (slots[0] == -1).all()
    assert_close(y[1:], attend_to_slots(q, layer_cache(k, v, used).k, layer_cache(k, v, used).v, slots)[1:])


# ---------------------------------------------------------------- SnapKV

SNAPKV_CASES = [  # H, KV, D, W, kernel, dtype
    (2, 2, 16, 16, 5, torch.float32), (4, 1, 64, 8, 7, torch.float32), (8, 1, 32, 20, 1, torch.bfloat16),
    (2, 2, 128, 64, 5, torch.bfloat16), (8, 2, 64, 32, 3, torch.bfloat16), (3, 1, 16, 33, 5, torch.float32)]


def draw_window(lengths, Tk, H, KV, D, W, dtype):
    """As draw_cache, with the last W queries of each row."""
    _, k, v, lengths = draw_cache(lengths, Tk, H, KV, D, dtype)
    q = 3 * draw(len(lengths), W, H + 2 * KV, D, dtype=dtype, seed=9)[:, :, :H]
    return q, k, v, lengths


@pytest.mark.parametrize("H, KV, D, W, kernel, dtype", SNAPKV_CASES)
def test_snapkv_scores_match_the_reference(H, KV, D, W, kernel, dtype):
    """A query that sees past itself, a tile weighed wrongly, edges divided by fewer than `kernel`, heads mixed up."""
    Tk = 205
    q, k, v, lengths = draw_window([205, 150, W + 1, W, 5], Tk, H, KV, D, W, dtype)
    scores = snapkv_scores(q, k, lengths, kernel)
    clean = layer_cache(k, v, lengths).k
    method = SnapKV(budget=W + 1, window=W, kernel=kernel)
    ref, plain = method.score(q.float(), clean.float(), lengths), method.score(q, clean, lengths)
    slot, length = torch.arange(Tk, device=DEVICE), lengths[:, None, None]
    never = (slot >= length).expand_as(ref)
    always = (slot >= length - W).expand_as(ref) & ~never
    assert scores.dtype == torch.float32
    assert torch.equal(scores == inf, always) and torch.equal(scores == -inf, never)
    free = ~(always | never)
    assert_as_good(scores[free], plain[free], ref[free], "scores", dtype)


@pytest.mark.parametrize("budget", [40, 500])
@pytest.mark.parametrize("H, KV", [(2, 2), (8, 1)])
def test_snapkv_kept_is_snapkv_compress(H, KV, budget):
    """Positions out of order, -1 not at the end, a window that is not whole, or dropped with room left."""
    Tk, W = 135, 16
    q, k, v, lengths = draw_window([135, 30, 7], Tk, H, KV, 32, W, torch.float32)
    kept = select(snapkv_scores(q, k, lengths, 5), min(budget, Tk)).long()
    method = SnapKV(budget, W, 5)
    clean = layer_cache(k, v, lengths).k
    expected = method.compress(q, clean, None, lengths, None)
    if not torch.equal(kept, expected):  # near-ties may swap: then their scores are as good
        assert torch.equal(kept < 0, expected < 0)
        scores = method.score(q, clean, lengths)
        totals = [scores.gather(2, x.clamp_min(0)).where(x >= 0, 0).sum(2) for x in (kept, expected)]
        assert_close(*totals, atol=1e-6)
    for b, length in enumerate(lengths.tolist()):
        for row in kept[b].tolist():
            row = [position for position in row if position >= 0]
            assert row == sorted(set(row)) and len(row) == min(budget, length)
            assert row[-min(W, length):] == list(range(max(0, length - W), length))


# ---------------------------------------------------------------- all of them

def run_all(q, k, v, used, window):
    low, high = block_bounds(k, used, 8)
    scores = quest_scores(q, low, high, used, 8, True, True)
    chosen = select(scores, 4)
    y, slots = quest_attend(q, k, v, chosen, used, 8)
    return low, high, scores, chosen, y, slots, snapkv_scores(window, k, used, 5)


def test_nan_stays_in_its_row():
    """A row of NaNs, as a diverged sample makes, in another row's softmax or selection."""
    q, k, v, used = draw_cache([100, 77, 100], 100, 4, 2, 16)
    window = draw(3, 16, 4, 16, seed=5)
    clean = run_all(q, k, v, used, window)
    for x in q, k, v, window:
        x[1] = nan
    for before, after in zip(clean, run_all(q, k, v, used, window)):
        assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert ((after[1] == inf).sum(-1) == 16).all()  # the window of the row itself still stays


def test_equal_keys_select_the_first_blocks_and_average_the_values():
    """All scores alike: an arbitrary choice, or more than S."""
    q, k, v, used = draw_cache([96], 96, 2, 2, 16)
    k[:] = 1.0
    low, high = block_bounds(k, used, 8)
    chosen = select(quest_scores(q, low, high, used, 8, True, True), 4)
    assert torch.equal(chosen, torch.tensor([0, 1, 2, 11], dtype=torch.int32, device=DEVICE).expand(1, 2, 4))
    y, _ = quest_attend(q, k, v, chosen, used, 8)
    assert_close(y[0, 0], v[0, [*range(24), *range(88, 96)]].mean(0))


def test_ops_are_registered_whole():
    """A fake that promises another shape, dtype or stride; an output that shares an input's memory; a graph break."""
    q, k, v, used = draw_cache([50, 41], 50, 4, 2, 16)
    window = draw(2, 16, 4, 16)
    low, high, scores, chosen, *_ = run_all(q, k, v, used, window)
    checks = dict(test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(block_bounds, (k, used, 8), **checks)
    torch.library.opcheck(quest_scores, (q, low, high, used, 8, True, False), **checks)
    torch.library.opcheck(select, (scores, 4), **checks)
    torch.library.opcheck(quest_attend, (q, k, v, chosen, used, 8), **checks)
    torch.library.opcheck(snapkv_scores, (window, k, used, 5), **checks)
    compiled = torch.compile(run_all, backend="eager", fullgraph=True)
    for out, ref in zip(compiled(q, k, v, used, window), run_all(q, k, v, used, window)):
        assert torch.equal(out, ref)


def test_launchers_refuse_what_they_do_not_cover():
    """Silent garbage from a head width that is no power of two, another dtype, or a last dim with gaps."""
    q, k, v, used = draw_cache([20], 20, 2, 1, 16)
    with pytest.raises(AssertionError, match="D=24"):
        block_bounds(draw(1, 20, 1, 24), used, 8)
    with pytest.raises(AssertionError, match="float16"):
        block_bounds(k.half(), used, 8)
    with pytest.raises(AssertionError, match="stride"):
        block_bounds(draw(1, 20, 1, 32)[..., ::2], used, 8)
    with pytest.raises(AssertionError, match="beside"):
        snapkv_scores(draw(1, 8, 2, 16, dtype=torch.bfloat16), k, used, 5)
