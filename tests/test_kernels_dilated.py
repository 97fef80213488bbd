"""kernels_dilated.py: output and gradients against sparse.Dilated in fp64, at lengths off the tile."""
import pytest
import torch

from triton_ops import dilated as file
from conftest import DEVICE, assert_as_good, assert_close
from triton_ops.dilated import dilated, dilated_forward
from sparse import Dense, Dilated

pytestmark = pytest.mark.usefixtures("poisoned", "plain_references")

PATTERNS = {  # dilation, local, initial
    "arl": (8, 0, 0),
    "sparse chunks": (16, 0, 0),
    "all three": (8, 5, 3),
    "streaming": (None, 6, 2),
    "own only": (None, 0, 0),
    "dense": (1, 0, 0),
    "wide window": (4, 40, 0),
    "initial beyond a chunk": (64, 16, 70),
}


def draw(B, T, H, KV, D, dtype=torch.float32, seed=0):
    """q, k, v and the gradient of y."""
    source = torch.Generator().manual_seed(seed)
    return [torch.randn(B, T, heads, D, generator=source).to(DEVICE, dtype) for heads in (H, KV, KV, H)]


def starts(*slots):
    return torch.tensor(slots, device=DEVICE)


def forward_and_gradients(attention, q, k, v, dy):
    """y, dq, dk, dv of attention(q, k, v)."""
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    y = attention(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, dy)]


def kernel(pattern):
    return lambda q, k, v: dilated(q, k, v, torch.zeros(len(q), dtype=torch.long, device=DEVICE), *pattern)


def reference(pattern):
    """sparse.Dilated; written out for fp64, as attend_to_shared would round it to fp32."""
    def attention(q, k, v):
        if q.dtype != torch.float64:
            return Dilated(*pattern).prefill(q, k, v, 0, None)[0]
        slot, G = torch.arange(q.shape[1], device=DEVICE), q.shape[2] // k.shape[2]
        scores = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(G, dim=2)) * q.shape[3] ** -0.5
        p = scores.masked_fill(~Dilated(*pattern).pattern(slot[:, None], slot), -torch.inf).softmax(-1)
        return torch.einsum("bhij,bjhd->bihd", p, v.repeat_interleave(G, dim=2))
    return attention


def assert_all_as_good(outs, plain, refs):
    for what, out, simple, ref in zip(("y", "dq", "dk", "dv"), outs, plain, refs):
        assert_as_good(out, simple, ref, what)


def check(pattern, q, k, v, dy):
    refs = forward_and_gradients(reference(pattern), *(x.double() for x in (q, k, v, dy)))
    plain = forward_and_gradients(reference(pattern), q, k, v, dy)
    assert_all_as_good(forward_and_gradients(kernel(pattern), q, k, v, dy), plain, refs)


# ---------------------------------------------------------------- output and gradients

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PATTERNS)
def test_dilated_matches_reference(name, dtype):
    """A key counted in two sources or in none, a mask off by one, an unwritten gradient, a wrong scale."""
    check(PATTERNS[name], *draw(B=2, T=63, H=2, KV=1, D=16, dtype=dtype))


@pytest.mark.parametrize("T, name", [(1, "all three"), (15, "all three"), (16, "arl"), (17, "all three"), (200, "arl")])
def test_lengths_off_the_tile(T, name):
    """Rows past the end read or written, the last chunk's end missed, one shared entry too many."""
    check(PATTERNS[name], *draw(B=1, T=T, H=1, KV=1, D=16, seed=T))


@pytest.mark.parametrize("H, KV, D, dtype", [
    (4, 1, 64, torch.bfloat16), (8, 1, 32, torch.float32), (6, 2, 16, torch.float32), (1, 1, 128, torch.bfloat16)])
def test_heads_in_groups(H, KV, D, dtype):
    """Heads of another group read, a group's gradients not summed, the masked rows of a group of 3 counted."""
    check(PATTERNS["all three"], *draw(B=1, T=17, H=H, KV=KV, D=D, dtype=dtype))


def test_strided_views():
    """A stride of q used for k, channels assumed contiguous, a gradient that autograd expanded misread."""
    packed, turned = (x.to(DEVICE) for x in (torch.randn(2, 20, 3, 35), torch.randn(2, 1, 16, 20)))
    q, k, v = packed[:, :, :2, 3:19], packed[:, :, 2:, 19:], turned.permute(0, 3, 1, 2)
    assert v.stride(-1) != 1
    dy = torch.ones((), device=DEVICE).expand(2, 20, 2, 16)
    check(PATTERNS["all three"], q, k, v, dy)


@pytest.mark.parametrize("name", ["arl", "all three"])
def test_splitting_the_queries_changes_nothing(name, monkeypatch):
    """A part of the queries dropped or counted twice, or shared gradients stored over the others' instead of added."""
    tensors = draw(B=1, T=100, H=2, KV=1, D=16)
    results = []
    for programs in 1, 3, 50:
        monkeypatch.setattr(file, "SPLIT_UP_TO", programs)
        results.append(forward_and_gradients(kernel(PATTERNS[name]), *tensors))
    for result in results[1:]:
        for a, b in zip(result, results[0]):
            assert_close(a, b)


# ---------------------------------------------------------------- limits

def test_every_key_shared_is_dense_attention():
    """The three sources do not cover each other's gaps."""
    q, k, v, _ = draw(B=1, T=40, H=2, KV=1, D=16)
    dense, _ = Dense().prefill(q, k, v, 0, None)
    for pattern in (1, 0, 0), (1, 7, 0), (None, 40, 0), (None, 0, 40), (None, 2**40, 2**40), (2**40, 20, 30):
        assert_close(kernel(pattern)(q, k, v), dense, what=f"{pattern}")


@pytest.mark.parametrize("name", ["arl", "all three", "streaming", "initial beyond a chunk"])
def test_start_in_a_longer_cache(name):
    """A chunk of queries or one decoding step: `start` of another row, keys past the query read."""
    Tk, method = 100, Dilated(*PATTERNS[name])
    q, k, v, _ = draw(B=2, T=Tk, H=2, KV=1, D=16)
    cache = [torch.cat([x, torch.full_like(x[:, :30], 1e4)], 1)[:, :Tk] for x in (k, v)]
    for Tq, first in (1, [99, 41]), (1, [0, 64]), (20, [80, 23]):
        start = starts(*first)
        chunk = torch.stack([q[b, s:s + Tq] for b, s in enumerate(first)])
        y = dilated(chunk, *cache, start, *PATTERNS[name])
        assert_close(y, method.prefill(chunk, *cache, start, None)[0], what=f"{Tq} queries from {first}")


def test_padding_past_the_last_slot_is_finite():
    """A padded query, whose slot no key fills, reads past k and v, or spoils the real queries beside it."""
    q, k, v, _ = draw(B=1, T=20, H=1, KV=1, D=16)
    for name in "arl", "all three":
        y = dilated(q[:, :12], k, v, starts(12), *PATTERNS[name])  # slots 12 to 23, of which 8 exist
        real, _ = Dilated(*PATTERNS[name]).prefill(q[:, :8], k, v, starts(12), None)
        assert y.isfinite().all()
        assert_close(y[:, :8], real)


def test_nan_stays_in_its_row_of_the_batch():
    """Memory of another row read and masked after the product: 0 * NaN is NaN."""
    q, k, v, dy = draw(B=2, T=33, H=1, KV=1, D=16)
    clean = forward_and_gradients(kernel(PATTERNS["all three"]), q, k, v, dy)
    for x in q, k, v, dy:
        x[1] = torch.nan
    for a, b in zip(forward_and_gradients(kernel(PATTERNS["all three"]), q, k, v, dy), clean):
        assert torch.equal(a[0], b[0])


# ---------------------------------------------------------------- as an operator

def test_compiles_without_graph_break():
    """A fake output of another shape or dtype, or a launcher that torch.compile has to leave the graph for."""
    q, k, v, dy = draw(B=1, T=18, H=2, KV=1, D=16)
    eager = forward_and_gradients(kernel(PATTERNS["arl"]), q, k, v, dy)
    compiled = torch.compile(kernel(PATTERNS["arl"]), fullgraph=True, backend="aot_eager")
    for a, b in zip(forward_and_gradients(compiled, q, k, v, dy), eager):
        assert torch.equal(a, b)


def test_operator_keeps_pytorchs_rules():
    """Outputs that alias inputs, a fake that disagrees with the kernel, autograd not registered."""
    q, k, v, _ = draw(B=1, T=5, H=2, KV=1, D=16)
    tensors = [x.requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(dilated_forward, (*tensors, starts(0), 4, 2, 1),
                          test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


def test_refuses_what_it_does_not_cover():
    """Garbage instead of an error: other widths, mixed dtypes, gradients of a chunk."""
    q, k, v, _ = draw(B=1, T=5, H=2, KV=1, D=16)
    with pytest.raises(AssertionError, match="heads of 8"):
        kernel((4, 0, 0))(q[..., :8], k[..., :8], v[..., :8])
    with pytest.raises(AssertionError, match="bfloat16"):
        kernel((4, 0, 0))(q, k.bfloat16(), v)
    with pytest.raises(AssertionError, match="as many keys as queries"):
        dilated(q[:, 3:].requires_grad_(), k, v, starts(3), 4, 0, 0).sum().backward()
