"""
loss.py against torch's cross_entropy over all logits at once: loss, gradients, count of right
answers.
"""
import pytest
import torch
from torch.nn import functional as F

from conftest import DEVICE, assert_as_good, assert_close
from infra import loss


def drawn(N=37, C=16, V=61):
    source = torch.Generator().manual_seed(N)
    x, head = (torch.randn(n, C, generator=source).requires_grad_() for n in (N, V))
    weight = torch.rand(N, generator=source).masked_fill(torch.rand(N, generator=source) < 0.3, 0)
    target = torch.randint(V, (N,), generator=source)
    target[::3] = F.linear(x, head).argmax(-1)[::3]  # some that are right
    return x, head, target, weight


def whole(x, head, target, weight):
    return (F.cross_entropy(F.linear(x, head).float(), target, reduction="none") * weight).sum()


# a token at a time, uneven chunks, one
@pytest.mark.parametrize("most", [1, 61, 200, 61 * 36, 61 * 37, 10**9])
def test_chunks_give_loss_gradients_and_right_ones_of_all_logits_at_once(most, monkeypatch):
    """A chunk lost or counted twice; a gradient without its weight; padding that counts."""
    monkeypatch.setattr(loss, "CHUNK_LOGITS", most)
    x, head, target, weight = args = drawn()
    ours, ref = loss.weighted_loss(*args), whole(*args)
    of_ours, of_ref = (torch.autograd.grad(3 * value, args[:2]) for value in (ours, ref))
    assert_close(of_ours[0], of_ref[0], what="dx")
    assert_close(of_ours[1], of_ref[1], atol=5e-5, what="dhead")
    score, right = loss.weighted_score(*args)
    for value in ours, score.float():
        torch.testing.assert_close(value, ref)
    hit = F.linear(x, head).argmax(-1) == target
    assert right.item() == pytest.approx((weight * hit).sum().item())
    assert loss.weighted_score(x, head, target, 0 * weight) == (0, 0)


def test_bf16_is_as_good_as_torch_in_bf16(monkeypatch):
    """A sum of chunks' gradients in bf16 would drift."""
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 61 * 5)
    x, head, *rest = drawn(N=400)
    exact, rounded = ([part.detach().to(dtype).requires_grad_() for part in (x, head)]
                      for dtype in (torch.float64, torch.bfloat16))
    gradients = [torch.autograd.grad(function(*inputs, *rest), inputs) for function, inputs in (
        (loss.weighted_loss, rounded), (whole, rounded), (whole, exact))]
    for ours, plain, ref, what in zip(*gradients, ("dx", "dhead")):
        assert_as_good(ours, plain, ref, what)


def test_compiled_is_what_computes_where_it_is_asked_for(monkeypatch):
    """A flag that is lost on the way, and a loss that takes three times as long."""
    monkeypatch.setattr(loss, "compiled_chunk_loss",
                        lambda *chunk: [2 * part for part in loss.chunk_loss(*chunk)])
    twice = loss.weighted_loss(*drawn(), compiled=True)
    torch.testing.assert_close(twice, 2 * loss.weighted_loss(*drawn()))


@pytest.mark.skipif(DEVICE == "cpu", reason="torch.compile of the chunk wants a GPU here")
def test_compiled_chunk_is_the_plain_one():
    """A fused kernel that loses the target or the weight."""
    chunk = (torch.randn(300, 5000, device=DEVICE), torch.randint(5000, (300,), device=DEVICE),
             torch.rand(300, device=DEVICE))
    for ours, ref in zip(loss.compiled_chunk_loss(*chunk), loss.chunk_loss(*chunk)):
        torch.testing.assert_close(ours, ref, rtol=1e-5, atol=1e-6)
