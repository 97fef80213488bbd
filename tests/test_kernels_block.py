"""kernels_block.py against the plain PyTorch of model.py: odd sizes, several matrices, a bias, rows of any stride, fp32 and bf16."""
from types import SimpleNamespace

import pytest
import torch
from conftest import DEVICE, assert_as_good, error, one_line
from torch.nn import functional as F

from triton_ops.block import add_norm, norm_rotate, products, swiglu_products, swiglu
from model import Attention

pytestmark = pytest.mark.usefixtures("poisoned")
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def as_good(f, ours, *inputs, what="values"):
    """ours as near to f in fp32 as f in the inputs' dtype is."""
    assert_as_good(ours, f(*inputs), f(*(x.float() for x in inputs)), what, inputs[0].dtype)


@dtypes
@pytest.mark.parametrize("R", [(1, 1), (3, 1), (4, 4), (1, 7)], ids=str)
@pytest.mark.parametrize("K, sizes", [(96, [96, 32, 32, 37]), (4096, [64]), (5000, [16, 4]), (16, [257])])
def test_products_are_linear_layers(K, sizes, R, dtype):
    """A matrix that starts at the wrong row, a last row or column left out, a K beyond one tile."""
    x = draw(*R, K, dtype=dtype)
    weights = [draw(N, K, dtype=dtype, seed=i + 1) / K**0.5 for i, N in enumerate(sizes)]
    ys = products(x, weights)
    assert [y.shape for y in ys] == [(*R, N) for N in sizes]
    for y, w in zip(ys, weights):
        if dtype == torch.float32:  # K terms summed one after the other round more often than cuBLAS's tree
            assert error(y, F.linear(x.double(), w.double())) < 1e-7 * K**0.5
        else:
            as_good(F.linear, y, x, w)


@dtypes
@pytest.mark.parametrize("R", [1, 5])
@pytest.mark.parametrize("eps", [None, 1e-6])
def test_the_last_of_products_is_the_gate(eps, R, dtype):
    """A bias on the wrong matrix; an RMS of the wrong numbers."""
    K, sizes = 96, [32, 16, 48]
    x = draw(R, 1, K, dtype=dtype) * torch.arange(1, R + 1, device=DEVICE)[:, None, None].to(dtype)  # each row has an RMS of its own
    bias = draw(48, dtype=dtype, seed=9)
    weights = [draw(N, K, dtype=dtype, seed=i + 1) / K**0.5 for i, N in enumerate(sizes)]
    *plain, gate = products(x, weights, bias, eps)
    for y, w in zip(plain, weights):
        as_good(F.linear, y, x, w)
    norm = lambda x: x if eps is None else F.rms_norm(x, (K,), eps=eps)
    as_good(lambda x, w, bias: F.linear(norm(x), w, bias), gate, x, weights[2], bias)


def test_products_refuse_what_they_do_not_cover():
    """A row too many, which would be left out; a transposed matrix read as if it were not; a program with rows of two matrices."""
    w = draw(8, 16)
    for x, weights in (draw(17, 1, 16), [w]), (draw(1, 1, 8), [w.T]), (draw(1, 1, 16), [draw(6, 16), w]):
        with pytest.raises(AssertionError) as raised:
            products(x, weights)
        one_line(raised)


@dtypes
@pytest.mark.parametrize("R", [1, 5])
@pytest.mark.parametrize("K, N", [(96, 50), (3000, 7)])
def test_swiglu_products_is_swiglu(K, N, R, dtype):
    """Gate and up mixed up."""
    x, gate, up = draw(R, 1, K, dtype=dtype), *(draw(N, K, dtype=dtype, seed=seed) / K**0.5 for seed in (1, 2))
    plain = lambda x, gate, up: F.silu(F.linear(x, gate)) * F.linear(x, up)
    y = swiglu_products(x, gate, up)
    if dtype == torch.float32:
        assert error(y, plain(x.double(), gate.double(), up.double())) < 2e-7 * K**0.5
    else:
        as_good(plain, y, x, gate, up)


@dtypes
@pytest.mark.parametrize("shape", [(1, 1, 48), (2, 5, 96), (1, 3, 1000)])
def test_add_norm_is_the_residual(shape, dtype):
    """x normalised instead of y, or padding of the tile in the mean."""
    x, y, weight = draw(*shape, dtype=dtype), 3 * draw(*shape, dtype=dtype, seed=1), draw(shape[-1], dtype=dtype, seed=2)
    as_good(lambda x, y, w: x + F.rms_norm(y, w.shape, w, 1e-6), add_norm(x, y, weight, 1e-6), x, y, weight)


@dtypes
@pytest.mark.parametrize("rows", [1, 2], ids=["one angle for all rows", "an angle for each"])
@pytest.mark.parametrize("H", [1, 3, 4])
@pytest.mark.parametrize("normed", [True, False])
def test_norm_rotate_is_qk_norm_and_rope(normed, H, rows, dtype):
    """A norm per head, halves that are no pairs, a row's angles for another's; heads that lie between others in memory."""
    B, T, D = 2, 7, 16
    x, weight = draw(B, T, 3 * H, D, dtype=dtype)[:, :, H:2 * H], draw(H * D, dtype=dtype, seed=1) if normed else None
    angle = draw(rows, T, 1, D // 2, seed=2)
    norm = lambda x: F.rms_norm(x.flatten(2), (H * D,), weight.to(x.dtype), 1e-6).view(x.shape) if normed else x
    rope = angle.cos(), angle.sin()
    as_good(lambda x: Attention.rotate(None, norm(x), rope), norm_rotate(x, weight, 1e-6, *rope), x)


@dtypes
def test_swiglu_writes_over_the_gate(dtype):
    """A second large tensor where one is enough."""
    gate, up = 4 * draw(3, 5001, dtype=dtype), draw(3, 5001, dtype=dtype, seed=1)
    before = gate.clone()
    y = swiglu(gate, up)
    assert y.data_ptr() == gate.data_ptr()
    as_good(lambda gate, up: F.silu(gate) * up, y, before, up)
