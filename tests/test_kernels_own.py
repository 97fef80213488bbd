"""
What is one kernel's own, beyond the contract of test_kernels.py: limits in which the result is
known without a reference, ties, and kernels one after the other, as a method uses them.
"""
import pytest
import torch

import kernels
from conftest import DEVICE, assert_close, error
from kernel_cases import (BF16, FP32, assert_routes, draw, draw_prompt, inf, layer_cache, mask_of,
                          nan, step_inputs, with_gradients)
from memory import memory_loop
from sparse import Dense, MoBA, Quest, SnapKV, attend, attend_to_slots
from triton_ops.block import decode_step
from triton_ops.dilated import dilated
from triton_ops.moba import moba_attend
from triton_ops.moba_route import moba_route
from triton_ops.quest import block_bounds, quest_attend, quest_scores
from triton_ops.snapkv import snapkv_scores
from triton_ops.topk import select

pytestmark = pytest.mark.usefixtures("poisoned", "plain_references")
TILE = kernels.TILE["ROWS"] * kernels.TILE["STRIPS"]


def slots(*values):
    return torch.tensor(values, device=DEVICE)


# ---------------------------------------------------------------- the memory

def test_a_nan_is_not_an_unwritten_state():
    """A NaN taken for a state that nobody has written yet: then this test does not end."""
    k, v, gate = 3 * draw(3, 2, TILE + 9, 2, 16, seed=10)
    state = draw(2, 2, 2, 16)
    clean = kernels.memory_scan(k, v, gate, state)
    k[0, 3], gate[0, 5] = nan, nan
    state[:, 0] = torch.tensor(-1, dtype=torch.int32).view(torch.float32)  # all bits set
    for out, ref, row in zip(kernels.memory_scan(k, v, gate, state), clean, (0, 0, 1)):
        assert torch.equal(out.select(row, 1), ref.select(row, 1))


def test_gates_near_one_let_in_what_they_should():
    """A 1 - g that has lost its digits beside 1; decays whose product drifts over many tiles."""
    T = 4 * TILE + 7
    k, v, gate, *gradients = draw(5, 1, T, 1, 16, seed=8)
    inputs = k, v, 0.1 * gate + 8, draw(2, 1, 1, 16)
    gradients.append(draw(2, 1, 1, 16, seed=9))
    exact = with_gradients(memory_loop, [x.double() for x in inputs], gradients)
    for what, out, ref in zip(("k~", "v~", "state", "dk", "dv", "dgate", "dstate"),
                              with_gradients(kernels.memory_scan, inputs, gradients), exact):
        assert error(out, ref) < 2e-6, f"{what}: {error(out, ref):.1e}"


def test_chunks_with_the_state_carried_are_the_whole():
    """A chunk boundary that resets, repeats or skips a token."""
    k, v, gate = 3 * draw(3, 2, TILE + 30, 2, 16, seed=11)
    carried, parts = draw(2, 2, 2, 16), []
    *whole, last = kernels.memory_scan(k, v, gate, carried)
    for piece in zip(*(x.split([5, TILE, 25], dim=1) for x in (k, v, gate))):
        *out, carried = kernels.memory_scan(*piece, carried)
        parts.append(torch.stack(out))
    assert_close(torch.cat(parts, dim=2), torch.stack(whole), atol=1e-6)
    assert_close(carried, last, atol=1e-6)


def test_decode_step_keeps_bounds_as_block_bounds_would_make_them():
    """A new block that inherits what lay there before, or bounds of unrounded keys."""
    step = lambda seed: step_inputs(2, 4, 2, 16, 40, 5, BF16, seed=seed)
    k_cache, used = step(30)["k_cache"], slots(6, 13)
    low, high = block_bounds(k_cache, used, 8)
    for i in range(12):
        used = used + 1
        inputs = step(31 + i) | dict(k_cache=k_cache, low=low, high=high)
        decode_step(**inputs, eps=1e-6, block_size=8, used=used)
    filled = torch.arange(5, device=DEVICE) <= ((used - 1) // 8)[:, None]
    for kept, made in zip((low, high), block_bounds(k_cache, used, 8)):
        assert torch.equal(kept[filled], made[filled])


# ---------------------------------------------------------------- Quest and SnapKV

def draw_cache(used, H, KV, D, dtype=FP32, window=1):
    """q, k, v and used (B,), with NaN behind it."""
    q, *kv = (draw(len(used), n, heads, D, dtype=dtype, seed=i)
              for i, (n, heads) in enumerate(((window, H), (max(used), KV), (max(used), KV))))
    behind = torch.arange(max(used), device=DEVICE) >= slots(*used)[:, None]
    return q, *(x.masked_fill(behind[..., None, None], nan) for x in kv), slots(*used)


@pytest.mark.parametrize("H, KV, dtype", [(2, 2, FP32), (8, 2, BF16), (8, 1, FP32)])
@pytest.mark.parametrize("keep", [(True, True), (False, False)])
def test_a_quest_step_is_quest_decode(H, KV, dtype, keep):
    """
    The kernels right one by one, but not in one another's words: layouts, dtypes, -1s. A row is
    below the budget.
    """
    q, k, v, used = draw_cache([123, 96, 20], H, KV, 32, dtype)
    low, high = block_bounds(k, used, 8)
    chosen = select(quest_scores(q, low, high, used, 8, *keep), 5)
    y, read = quest_attend(q, k, v, chosen, used, 8)
    cache = layer_cache(k, v, used)
    plain, selected = Quest(40, 8, *keep).decode(q, cache)
    assert torch.equal(read.sort(-1).values, selected.sort(-1).values)
    exact = attend_to_slots(q.float(), cache.k.float(), cache.v.float(), selected)
    assert error(y, exact) <= 2 * error(plain, exact) + {FP32: 1e-6, BF16: 2e-3}[dtype]


def test_quest_without_any_key_is_zero():
    """Minus infinity from minus infinity, or a division by an empty sum; in one split or in all."""
    q, k, v, used = draw_cache([40, 40], 2, 1, 16)
    chosen = torch.full((2, 1, 4), -1, dtype=torch.int32, device=DEVICE)
    chosen[1, 0, 3] = 2  # one split of row 1 reads
    y, read = quest_attend(q, k, v, chosen, used, 16)
    assert torch.equal(y[0], torch.zeros_like(y[0])) and (read[0] == -1).all()
    assert_close(y[1:], attend_to_slots(q, k, v, read)[1:])


def test_equal_keys_select_the_first_blocks_and_average_the_values():
    """All scores alike: an arbitrary choice, or more than S."""
    q, k, v, used = draw_cache([96], 2, 2, 16)
    k[:] = 1.0
    low, high = block_bounds(k, used, 8)
    chosen = select(quest_scores(q, low, high, used, 8, True, True), 4)
    assert chosen.tolist() == [[[0, 1, 2, 11]] * 2]
    y, _ = quest_attend(q, k, v, chosen, used, 8)
    assert_close(y[0, 0], v[0, [*range(24), *range(88, 96)]].mean(0))


@pytest.mark.parametrize("budget", [40, 500])
@pytest.mark.parametrize("H, KV", [(2, 2), (8, 1)])
def test_what_snapkv_keeps_is_snapkv_compress(H, KV, budget):
    """Positions out of order, -1 not at the end, a window that is not whole, or dropped."""
    W = 16
    q, k, v, lengths = draw_cache([135, 30, 7], H, KV, 32, window=W)
    q = 3 * q
    kept = select(snapkv_scores(q, k, lengths, 5), min(budget, 135)).long()
    method, clean = SnapKV(budget, W, 5), layer_cache(k, v, lengths).k
    expected = method.compress(q, clean, None, lengths, None)
    if not torch.equal(kept, expected):  # near-ties may swap: then their scores are as good
        assert torch.equal(kept < 0, expected < 0)
        scores = method.score(q, clean, lengths)
        totals = [scores.gather(2, x.clamp_min(0)).where(x >= 0, 0).sum(2)
                  for x in (kept, expected)]
        assert_close(*totals, atol=1e-6)
    for rows, length in zip(kept.tolist(), lengths.tolist()):
        for row in rows:
            row = [position for position in row if position >= 0]
            assert row == sorted(set(row)) and len(row) == min(budget, length)
            assert row[-min(W, length):] == list(range(max(0, length - W), length))


def test_a_row_of_nan_keeps_its_window():
    """What is forced lost among scores of NaN."""
    q, k, _, lengths = draw_cache([100, 77], 4, 2, 16, window=16)
    q[1], k[1] = nan, nan
    assert ((snapkv_scores(q, k, lengths, 5) == inf).sum(-1) == 16).all()


# ---------------------------------------------------------------- MoBA

@pytest.mark.parametrize("H, KV, block_size, S, start", [
    (2, 1, 8, 4, (0, 0)), (4, 1, 16, 3, (37, 5)), (2, 2, 8, 4, (37, 5)), (8, 1, 24, 2, (0, 0))])
def test_moba_is_mobas_prefill(H, KV, block_size, S, start):
    """Routing and attention right one by one, but not together; rows that share one start."""
    q, k, v = draw_prompt(2, 30, H, KV, 16, 67, FP32, seed=H)
    k, v = (x[:, :30 + max(start)] for x in (k, v))
    chosen = moba_route(q, k, slots(*start), block_size, S, True)
    y = moba_attend(q, k, v, chosen, slots(*start), block_size)
    expected, blocks = MoBA(S * block_size, block_size).prefill(q, k, v, slots(*start), None)
    ascending = lambda x: x.where(x >= 0, 99).sort(-1).values
    assert torch.equal(ascending(chosen), ascending(blocks.int()))
    assert error(y, expected) <= 1e-5


@pytest.mark.parametrize("block_size, KV", [(16, 2), (8, 1)])
def test_a_full_budget_is_dense_attention(block_size, KV):
    """S above the number of blocks: room filled with blocks of the future, or not marked empty."""
    q, k, v = draw_prompt(1, 100, 2, KV, 32, 100, FP32, seed=0)
    chosen = moba_route(q, k, slots(0), block_size, 20, True)
    assert_routes(chosen, q, k, slots(0), block_size, 20, True)
    y = moba_attend(q, k, v, chosen, slots(0), block_size)
    assert error(y, attend(q, k, v, causal=True)) <= 1e-5


@pytest.mark.parametrize("S", [1, 2, 5])
def test_equal_scores_give_the_lowest_blocks(S):
    """A bisection that never ends, takes more than S, or the wrong ones, when all scores tie."""
    q, k, _ = draw_prompt(2, 70, 2, 1, 16, 70, FP32, seed=0)
    q, k = q.round(), k.round()  # sums of products of small integers are exact in any order
    k[0] = k[0, :1]
    q[1, ::2] = 0
    chosen = moba_route(q, k, slots(0, 0), 8, S, False)
    own = torch.arange(70, device=DEVICE)[:, None] // 8
    lowest = torch.arange(S - 1, device=DEVICE).expand(70, -1)
    expected = torch.cat([lowest.where(lowest < own, 99), own], dim=1).sort(1).values
    expected = expected.where(expected < 99, -1).int()
    assert torch.equal(chosen[0, 0], expected)
    assert torch.equal(chosen[1, 0, ::2], expected[::2])


def test_close_scores_are_told_apart():
    """bf16 means that lose what tells blocks apart; a bisection that stops before its end."""
    q, k, _ = draw_prompt(1, 300, 1, 1, 16, 300, FP32, seed=5)
    k = (1 + k / 1000 * torch.arange(300, device=DEVICE)[:, None, None] ** -0.5).contiguous()
    assert_routes(moba_route(q, k, slots(0), 8, 9, True), q, k, slots(0), 8, 9, True)


def test_wide_tiles_route_like_narrow_ones():
    """A query left out between two widths of moba_route_kernel, or routed by both."""
    start = slots(960, 1000)  # the tile of the second row crosses from 128 to 129 blocks
    q, k, _ = draw_prompt(2, 70, 2, 1, 16, 1080, FP32, seed=6)
    assert_routes(moba_route(q, k, start, 8, 6, True), q, k, start, 8, 6, True)


def test_words_that_no_tile_wrote_are_not_read(monkeypatch):
    """A query in block 128: routed by a tile of 128 blocks, which writes four words of its."""
    monkeypatch.setattr(torch, "empty", lambda *shape, **kwargs: torch.full(shape, 8, **kwargs))
    q, k, _ = draw_prompt(1, 8, 2, 1, 16, 1080, FP32, seed=6)
    assert_routes(moba_route(q, k, slots(1024), 8, 6, True), q, k, slots(1024), 8, 6, True)


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU, whose shared memory is what may run out")
@pytest.mark.parametrize("T, block_size, S, dtype", [
    (131072, 64, 8, BF16), (16384, 32, 256, BF16), (65536, 32, 4, FP32)])
def test_many_blocks_fit_the_gpu(T, block_size, S, dtype):
    """A tile that grows with the number of blocks, or of blocks per query, beyond its memory."""
    q, k, v = draw_prompt(1, T, 1, 1, 128, T, dtype, seed=0)
    chosen = moba_route(q, k, slots(0), block_size, S, True)
    ours = lambda *x: moba_attend(*x, chosen, slots(0), block_size)
    y, *_ = with_gradients(ours, (q, k, v), [ours(q, k, v)])
    q, chosen, start = q[:, -8:], chosen[:, :, -8:], slots(T - 8)
    assert_routes(chosen, q, k, start, block_size, S, True)
    keep = mask_of(chosen, q, k, start, block_size)
    exact = attend(*(x.float() for x in (q, k, v)), keep)
    assert error(y[:, -8:], exact) <= {FP32: 1e-5, BF16: 1e-2}[dtype]


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_scores_of_nan_choose_blocks_that_exist(dtype):
    """A search for the cut that NaN has misled, and that writes outside its row."""
    q, k, _ = draw_prompt(1, 50, 2, 1, 16, 50, dtype, seed=11)
    q[0, 30], k[0, 7] = nan, nan
    chosen = moba_route(q, k, slots(0), 8, 3, True)
    own = torch.arange(50, device=DEVICE)[:, None] // 8
    assert ((chosen >= -1) & (chosen <= own)).all()


def test_nan_of_one_query_leaves_the_gradients_of_others():
    """A gathered tile padded with another query's NaN, which 0 * NaN would spread."""
    q, k, v = draw_prompt(1, 50, 2, 1, 16, 50, FP32, seed=18)
    chosen = moba_route(q, k, slots(0), 8, 3, True)
    f, dy = lambda *x: moba_attend(*x, chosen, slots(0), 8), [torch.ones(1, 50, 2, 16).to(DEVICE)]
    clean = with_gradients(f, (q, k, v), dy)
    q[0, 0] = nan  # a query that only the first block meets
    for x, ref in zip(with_gradients(f, (q, k, v), dy), clean):
        assert torch.equal(x[:, 8:], ref[:, 8:])


def test_unused_slots_may_hold_anything_finite():
    """The largest numbers in slots that no query may read yet, whose sums overflow."""
    q, k, v = draw_prompt(2, 40, 2, 1, 16, 90, BF16, seed=12)
    clean = moba_route(q, k, slots(0, 11), 8, 3, True)
    y = moba_attend(q, k, v, clean, slots(0, 11), 8)
    for b in 0, 1:
        k[b, 40 + 11 * b:], v[b, 40 + 11 * b:] = 3e38, -3e38
    assert torch.equal(moba_route(q, k, slots(0, 11), 8, 3, True), clean)
    assert torch.equal(moba_attend(q, k, v, clean, slots(0, 11), 8), y)


# ---------------------------------------------------------------- dilated attention

def test_every_key_shared_is_dense_attention():
    """Three sources of keys that do not cover each other's gaps."""
    q, k, v = draw_prompt(1, 40, 2, 1, 16, 40, FP32, seed=0)
    dense, _ = Dense().prefill(q, k, v, 0, None)
    for pattern in ((1, 0, 0), (1, 7, 0), (None, 40, 0), (None, 0, 40), (None, 2**40, 2**40),
                    (2**40, 20, 30)):
        assert_close(dilated(q, k, v, slots(0), *pattern), dense, what=f"{pattern}")
