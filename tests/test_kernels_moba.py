"""kernels_moba.py: routing, attention and gradients of MoBA's prefill against sparse.MoBA, at lengths off the block."""
import pytest
import torch

from triton_ops import moba
from conftest import DEVICE, assert_as_good, error
from triton_ops.moba import moba_attend
from triton_ops.moba_route import moba_route
from sparse import MoBA, attend, query_slots

pytestmark = pytest.mark.usefixtures("poisoned", "plain_references")
BF16, FP32 = torch.bfloat16, torch.float32


def draw(B, Tq, H, KV, D, Tk=None, dtype=FP32, seed=0):
    """q, k, v as strided views: q of a wider projection, k and v of a cache with more slots. Values fit bf16."""
    Tk, source = Tk or Tq, torch.Generator().manual_seed(seed)
    q = torch.randn(B, Tq, H + 2, D, generator=source).bfloat16().to(DEVICE, dtype)[:, :, 1:-1]
    k, v = (torch.randn(B, Tk + 3, KV, D, generator=source).bfloat16().to(DEVICE, dtype)[:, :Tk] for _ in "kv")
    return q, k, v


def slots(*start):
    return torch.tensor(start, device=DEVICE)


def own_blocks(q, k, start, block_size):
    """(B, Tq); padding past the last slot counts as standing in it."""
    return query_slots(q, start).clamp(max=k.shape[1] - 1) // block_size


def mask_of(chosen, q, k, start, block_size):
    """The keys that `chosen` lets each query read, the own block's among them: (B, H, Tq, Tk)."""
    slot = query_slots(q, start).clamp(max=k.shape[1] - 1)[:, None, :, None]                   # (B, 1, Tq, 1)
    key = torch.arange(k.shape[1], device=q.device)
    listed = (chosen.unsqueeze(-1) == key // block_size).any(3)                                # (B, KV, Tq, Tk)
    keep = (listed | (key // block_size == slot // block_size)) & (key <= slot)
    return keep.repeat_interleave(q.shape[2] // k.shape[2], dim=1)


def assert_attends(y, q, k, v, keep):
    """y is Eq. 4 over `keep`."""
    assert y.is_contiguous()
    assert_as_good(y, attend(q, k, v, keep), attend(q.float(), k.float(), v.float(), keep))


def assert_routes(chosen, q, k, start, block_size, S, keep_first):
    """`chosen` follows the rule of sparse.MoBA: own block, first if forced, best of the rest. Near-ties may swap."""
    B, KV, Tq, _ = chosen.shape
    N = -(-k.shape[1] // block_size)
    assert chosen.dtype == torch.int32 and chosen.shape[3] == S
    own = own_blocks(q, k, start, block_size)[:, None, :].expand(B, KV, Tq)
    n = chosen.long()
    number = (n >= 0).sum(-1)
    assert torch.equal(number, (own + 1).clamp(max=S)), "another number of blocks"
    assert torch.equal(n >= 0, torch.arange(S, device=n.device) < number[..., None]), "-1 not at the end"
    assert ((n[..., 1:] > n[..., :-1]) | (n[..., 1:] < 0)).all(), "not ascending, or one twice"
    assert torch.equal(n.gather(-1, (number - 1)[..., None]).squeeze(-1), own), "the last is not the own block"
    if keep_first:
        assert (n[..., 0] == 0).all(), "the first block is missing"
    scores = MoBA(2 * block_size, block_size, keep_first).score(q.double(), k.double()).float()
    block = torch.arange(N, device=n.device)
    forced = (block == own[..., None]) | ((block == 0) & keep_first)
    kept = torch.zeros(B, KV, Tq, N + 1, dtype=torch.bool, device=n.device)
    kept = kept.scatter(-1, n.where(n >= 0, N), True)[..., :N]
    worst_in = scores.where(kept & ~forced, torch.inf).amin(-1)
    best_out = scores.where(~kept & ~forced & (block < own[..., None]), -torch.inf).amax(-1)
    swapped = (best_out - worst_in).max().item()
    tolerance = 1e-5 if q.dtype == FP32 else 1e-4 * scores.abs().max().item()
    assert swapped <= tolerance, f"a block left out scores {swapped:.2e} more than one chosen"


CASES = [  # B, T, H, KV, D, block_size, S, keep_first, dtype
    (2, 51, 2, 1, 64, 8, 4, True, FP32),
    (1, 150, 4, 1, 16, 16, 3, False, FP32),
    (1, 140, 8, 1, 32, 64, 2, True, FP32),
    (1, 101, 2, 2, 16, 24, 3, True, FP32),
    (2, 51, 2, 2, 64, 8, 4, False, BF16),
    (1, 100, 8, 1, 128, 16, 5, True, BF16),
    (1, 200, 4, 1, 64, 64, 2, True, BF16),
    (1, 200, 1, 1, 128, 128, 2, True, BF16),
    (1, 330, 1, 1, 16, 160, 2, True, BF16),  # a block longer than a tile
    (3, 1, 2, 1, 16, 16, 1, True, FP32),     # one block, the first and the own
]


@pytest.mark.parametrize("B, T, H, KV, D, block_size, S, keep_first, dtype", CASES)
def test_prefill_matches_reference(B, T, H, KV, D, block_size, S, keep_first, dtype):
    """A wrong mean, head group or cut; a list entry lost or filed twice; a block's tail; a partial merged unscaled."""
    q, k, v = draw(B, T, H, KV, D, dtype=dtype, seed=T)
    start = slots(*[0] * B)
    chosen = moba_route(q, k, start, block_size, S, keep_first)
    assert_routes(chosen, q, k, start, block_size, S, keep_first)
    y = moba_attend(q, k, v, chosen, start, block_size)
    assert_attends(y, q, k, v, mask_of(chosen, q, k, start, block_size))
    if dtype == FP32:  # in bf16 a near-tie may give another block, and so another y
        expected, blocks = MoBA(max(2, S) * block_size, block_size, keep_first).prefill(q, k, v, 0, None)
        blocks = blocks.where(blocks >= 0, torch.inf).sort(-1).values
        assert torch.equal(chosen.where(chosen >= 0, torch.inf)[..., :blocks.shape[-1]], blocks)
        assert error(y, expected) <= 1e-5


def gradients(f, q, k, v, dy):
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    return torch.autograd.grad(f(*inputs), inputs, dy.to(q.dtype))


def assert_gradients(q, k, v, chosen, start, block_size, seed):
    """Those of moba_attend are those of Eq. 4 over what was chosen."""
    dy = torch.randn(q.shape, generator=torch.Generator().manual_seed(seed)).bfloat16().to(q.device)
    keep = mask_of(chosen, q, k, start, block_size)
    ours = gradients(lambda *x: moba_attend(*x, chosen, start, block_size), q, k, v, dy)
    plain = gradients(lambda *x: attend(*x, keep), q, k, v, dy)
    exact = gradients(lambda *x: attend(*x, keep), q.double(), k.double(), v.double(), dy)
    for x, y, z in zip(ours, plain, exact):
        assert x.is_contiguous() and x.dtype == q.dtype
        assert_as_good(x, y, z)


@pytest.mark.parametrize("B, T, H, KV, D, block_size, S, keep_first, dtype", CASES)
def test_gradients_match_reference(B, T, H, KV, D, block_size, S, keep_first, dtype):
    """A key's gradient that misses a chunk, a head of the group or its own block's queries; a query's that misses a block."""
    q, k, v = draw(B, T, H, KV, D, dtype=dtype, seed=T + 1)
    start = slots(*[0] * B)
    chosen = moba_route(q, k, start, block_size, S, keep_first)
    assert_gradients(q, k, v, chosen, start, block_size, seed=T + 2)


def test_gradients_of_a_chunk_and_of_any_choice(monkeypatch):
    """Keys that no query reads (zero), queries that start late, long lists cut into chunks."""
    start, block_size = slots(37, 5), 8
    q, k, v = draw(2, 30, 4, 2, 16, Tk=67, seed=15)
    own = own_blocks(q, k, start, block_size)[:, None, :, None].int()
    source = torch.Generator().manual_seed(16)
    chosen = torch.rand(2, 2, 30, 9, generator=source).argsort(-1)[..., :4].int().to(DEVICE)
    chosen = torch.cat([chosen.where((chosen != 1) & (chosen < own), -1), own.expand(2, 2, 30, 1)], dim=-1)
    for chunk in 1, 8:
        monkeypatch.setitem(moba.GRAD_FP32, "CHUNK", chunk)
        assert_gradients(q, k, v, chosen, start, block_size, seed=17)


def test_nan_of_one_row_leaves_the_gradients_of_others():
    """A gathered tile padded with another query's NaN, which 0 * NaN would spread."""
    q, k, v = draw(2, 50, 2, 1, 16, seed=18)
    chosen = moba_route(q, k, slots(0, 0), 8, 3, True)
    dy = torch.ones(q.shape, device=DEVICE)
    f = lambda *x: moba_attend(*x, chosen, slots(0, 0), 8)
    clean = gradients(f, q, k, v, dy)
    q[1, 0] = float("nan")  # a query that only the first block meets
    for x, y in zip(gradients(f, q, k, v, dy), clean):
        assert torch.equal(x[0], y[0]) and torch.equal(x[1, 8:], y[1, 8:])


@pytest.mark.parametrize("H, KV, block_size", [(2, 2, 8), (4, 1, 16)])
def test_chunk_of_a_prompt_starts_where_its_row_says(H, KV, block_size):
    """Rows that share one start, own blocks counted from the chunk, slots past the chunk, padding out of bounds."""
    start, Tq, Tk = slots(37, 5), 30, 67  # the last query of row 0 stands in the last slot
    q, k, v = draw(2, Tq, H, KV, 16, Tk=Tk)
    chosen = moba_route(q, k, start, block_size, 4, True)
    assert_routes(chosen, q, k, start, block_size, 4, True)
    y = moba_attend(q, k, v, chosen, start, block_size)
    assert_attends(y, q, k, v, mask_of(chosen, q, k, start, block_size))
    expected, _ = MoBA(4 * block_size, block_size).prefill(q, k, v, start, None)
    assert error(y, expected) <= 1e-5

    padded = moba_route(q, k, start + 30, block_size, 4, True)  # row 0 leaves the array
    assert_routes(padded, q, k, start + 30, block_size, 4, True)
    y = moba_attend(q, k, v, padded, start + 30, block_size)
    assert_attends(y, q, k, v, mask_of(padded, q, k, start + 30, block_size))


@pytest.mark.parametrize("block_size, KV", [(16, 2), (8, 1)])
def test_full_budget_is_dense_attention(block_size, KV):
    """S above the number of blocks: room that is filled with blocks of the future, or not marked as empty."""
    q, k, v = draw(1, 100, 2, KV, 32)
    chosen = moba_route(q, k, slots(0), block_size, 20, True)
    assert_routes(chosen, q, k, slots(0), block_size, 20, True)
    y = moba_attend(q, k, v, chosen, slots(0), block_size)
    assert error(y, attend(q, k, v, causal=True)) <= 1e-5


@pytest.mark.parametrize("S", [1, 2, 5])
def test_equal_scores_give_the_lowest_blocks(S):
    """A bisection that never ends, takes more than S, or the wrong ones, when all scores tie."""
    q, k, _ = draw(2, 70, 2, 1, 16)
    q, k = q.round(), k.round()  # sums of products of small integers are exact in any order
    k[0] = k[0, :1]
    q[1, ::2] = 0
    chosen = moba_route(q, k, slots(0, 0), 8, S, False)
    own = torch.arange(70, device=DEVICE) // 8
    lowest = torch.arange(S - 1, device=DEVICE).expand(70, -1)
    expected = torch.cat([lowest.where(lowest < own[:, None], 99), own[:, None]], dim=1).sort(1).values
    expected = expected.where(expected < 99, -1).int()
    assert torch.equal(chosen[0, 0], expected)
    assert torch.equal(chosen[1, 0, ::2], expected[::2])


def test_close_scores_are_told_apart():
    """bf16 means that lose what tells blocks apart, and a bisection that stops before it has the cut."""
    q, k, _ = draw(1, 300, 1, 1, 16, seed=5)
    k = (1 + k / 1000 * torch.arange(300, device=DEVICE)[:, None, None] ** -0.5).contiguous()
    assert_routes(moba_route(q, k, slots(0), 8, 9, True), q, k, slots(0), 8, 9, True)


def test_wide_tiles_route_like_narrow_ones():
    """A query left out between two widths of moba_route_kernel, or routed by both (here 128 and 256 blocks)."""
    start, block_size = slots(960, 1000), 8  # the tile of the second row crosses from 128 to 129 blocks
    q, k, _ = draw(2, 70, 2, 1, 16, Tk=1080, seed=6)
    assert_routes(moba_route(q, k, start, block_size, 6, True), q, k, start, block_size, 6, True)


def test_words_that_no_tile_wrote_are_not_read(monkeypatch):
    """A query in block 128: routed by a tile of 128 blocks, whose four words are all there is of it."""
    monkeypatch.setattr(torch, "empty", lambda *shape, **kwargs: torch.full(shape, 8, **kwargs))
    q, k, _ = draw(1, 8, 2, 1, 16, Tk=1080, seed=6)
    assert_routes(moba_route(q, k, slots(1024), 8, 6, True), q, k, slots(1024), 8, 6, True)


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU, whose shared memory is what may run out")
@pytest.mark.parametrize("T, block_size, S, dtype", [(131072, 64, 8, BF16), (16384, 32, 256, BF16), (65536, 32, 4, FP32)])
def test_many_blocks_fit_the_gpu(T, block_size, S, dtype):
    """A tile that grows with the number of blocks, or of blocks per query, beyond shared memory."""
    q, k, v = (x.requires_grad_() for x in draw(1, T, 1, 1, 128, dtype=dtype))
    chosen = moba_route(q, k, slots(0), block_size, S, True)
    y = moba_attend(q, k, v, chosen, slots(0), block_size)
    torch.autograd.grad(y, (q, k, v), y.detach())
    last = slice(T - 8, T)
    assert_routes(chosen[:, :, last], q[:, last], k, slots(T - 8), block_size, S, True)
    keep = mask_of(chosen[:, :, last], q[:, last], k, slots(T - 8), block_size)
    assert_attends(y[:, last].contiguous(), q[:, last], k, v, keep)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_any_choice_is_attended(dtype):
    """Lists that need sorted choices, their -1 at the end, or each block chosen by someone."""
    B, T, H, KV, block_size, S = 2, 120, 4, 2, 16, 5
    q, k, v = draw(B, T, H, KV, 16, dtype=dtype, seed=7)
    source = torch.Generator().manual_seed(8)
    chosen = torch.rand(B, KV, T, 9, generator=source).argsort(-1)[..., :S].int()  # 8 blocks: 8 becomes -1
    chosen = chosen.where(chosen < 8, -1).to(DEVICE)
    own = own_blocks(q, k, slots(0, 0), block_size)[:, None, :, None].int()
    chosen = chosen.where((chosen != 3) & (chosen != own), -1)                     # nobody chose 3
    chosen = torch.cat([chosen, own.expand(B, KV, T, 1)], dim=-1)
    y = moba_attend(q, k, v, chosen, slots(0, 0), block_size)
    assert_attends(y, q, k, v, mask_of(chosen, q, k, slots(0, 0), block_size))


def test_groups_of_heads_share_one_buffer(monkeypatch):
    """A head that reads what another left in the buffer, or writes to another's place."""
    inputs = draw(2, 40, 4, 2, 16, seed=9)
    q, k, v = (x.detach().requires_grad_() for x in inputs)
    chosen = moba_route(q, k, slots(0, 0), 8, 3, True)

    def outputs():
        y = moba_attend(q, k, v, chosen, slots(0, 0), 8)
        return y, *torch.autograd.grad(y, (q, k, v), y.detach())

    at_once = outputs()
    for heads in 2, 6:
        monkeypatch.setattr(moba, "PARTIAL_BYTES", heads * 40 * 3 * 16 * 4)
        assert all(torch.equal(x, other) for x, other in zip(outputs(), at_once))


def test_lists_go_on_from_tile_to_tile(monkeypatch):
    """A pair filed over another's place where a tile of queries ends, or counted into the wrong 16 or 32."""
    q, k, v = draw(2, 150, 2, 1, 16, seed=14)
    chosen = moba_route(q, k, slots(0, 0), 4, 6, True)  # 38 blocks
    at_once = moba_attend(q, k, v, chosen, slots(0, 0), 4)
    for BLOCK_T in 16, 64:
        monkeypatch.setitem(moba.LISTS, "BLOCK_T", BLOCK_T)
        assert torch.equal(moba_attend(q, k, v, chosen, slots(0, 0), 4), at_once)


def test_long_lists_are_cut_into_chunks(monkeypatch):
    """Rows lost or read twice where a list goes on in another program."""
    q, k, v = draw(1, 100, 4, 1, 16, seed=10)
    chosen = moba_route(q, k, slots(0), 16, 4, True)
    for chunk in 1, 2:
        monkeypatch.setitem(moba.GATHER_FP32, "CHUNK", chunk)
        assert_attends(moba_attend(q, k, v, chosen, slots(0), 16), q, k, v, mask_of(chosen, q, k, slots(0), 16))


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_nan_stays_in_its_row(dtype):
    """NaN that spoils the lists, the search for the cut or the buffer of another row of the batch."""
    q, k, v = draw(3, 50, 2, 1, 16, dtype=dtype, seed=11)
    start = slots(0, 0, 0)
    clean = moba_route(q, k, start, 8, 3, True)
    y = moba_attend(q, k, v, clean, start, 8)
    q[1, 30], k[1, 7], v[1, 20] = (float("nan"),) * 3
    chosen = moba_route(q, k, start, 8, 3, True)
    own = torch.arange(50, device=DEVICE) // 8
    assert ((chosen >= -1) & (chosen <= own[:, None])).all()
    spoilt = moba_attend(q, k, v, chosen, start, 8)
    for b in 0, 2:
        assert torch.equal(chosen[b], clean[b]) and torch.equal(spoilt[b], y[b])


def test_unused_slots_may_hold_anything_finite():
    """The largest numbers in slots that no query may read yet, whose sums overflow."""
    q, k, v = draw(2, 40, 2, 1, 16, Tk=90, dtype=BF16, seed=12)
    start = slots(0, 11)
    clean = moba_route(q, k, start, 8, 3, True)
    y = moba_attend(q, k, v, clean, start, 8)
    for b in 0, 1:
        k[b, 40 + 11 * b:], v[b, 40 + 11 * b:] = 3e38, -3e38
    assert torch.equal(moba_route(q, k, start, 8, 3, True), clean)
    assert torch.equal(moba_attend(q, k, v, clean, start, 8), y)


def test_launchers_are_operators_that_compile_can_trace():
    """A fake that promises another shape, dtype or stride than the launcher gives."""
    q, k, v = draw(2, 20, 2, 1, 16, seed=13)
    chosen = moba_route(q, k, slots(0, 3), 8, 2, True)
    checks = "test_schema", "test_faketensor", "test_autograd_registration"
    torch.library.opcheck(moba_route, (q, k, slots(0, 3), 8, 2, True), test_utils=checks)
    torch.library.opcheck(moba.moba_forward, (q, k, v, chosen, slots(0, 3), 8), test_utils=checks)
    y, lse = moba.moba_forward(q, k, v, chosen, slots(0, 3), 8)
    torch.library.opcheck(moba.moba_backward, (q, k, v, chosen, slots(0, 3), y, lse, y, 8), test_utils=checks)


def test_what_is_not_covered_is_refused():
    """A kernel that runs on shapes or dtypes it was not written for."""
    q, k, v = draw(1, 20, 2, 1, 16)
    chosen = moba_route(q, k, slots(0), 8, 2, True)
    for bad in ((q[..., :8], k[..., :8]), (q.half(), k.half()), (q.transpose(1, 3), k), (q.bfloat16(), k)):
        with pytest.raises(AssertionError):
            moba_route(*bad, slots(0), 8, 2, True)
    with pytest.raises(AssertionError, match="more queries than slots"):
        moba_route(q, k[:, :9], slots(0), 8, 2, True)
    with pytest.raises(AssertionError, match="3000 blocks"):
        moba_route(q[:, :1], k[:, :1].expand(1, 3000, 1, 16), slots(0), 1, 2, True)
    with pytest.raises(AssertionError, match="room"):
        moba_route(q, k, slots(0), 8, 1, True)
    with pytest.raises(AssertionError, match="chosen"):
        moba_attend(q, k, v, chosen.long(), slots(0), 8)
