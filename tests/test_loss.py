"""
loss.py against torch's cross_entropy over all logits at once: loss, gradients, count of right
answers.
"""
import pytest
import torch
from torch.nn import functional as F

from conftest import DEVICE, assert_as_good, assert_close, draw_tokens, tiny
from infra import loss


def drawn(N=37, C=16, V=61, dtype=torch.float64):
    source = torch.Generator().manual_seed(N)
    x, head = (torch.randn(n, C, generator=source).to(dtype).requires_grad_() for n in (N, V))
    weight = torch.rand(N, generator=source).masked_fill(torch.rand(N, generator=source) < 0.3, 0)
    return x, head, torch.randint(V, (N,), generator=source), weight


def whole(x, head, target, weight):
    return (F.cross_entropy(F.linear(x, head).float(), target, reduction="none") * weight).sum()


# a token at a time, uneven chunks, one
@pytest.mark.parametrize("most", [1, 61, 200, 61 * 36, 61 * 37, 10**9])
def test_chunks_give_the_loss_and_the_gradients_of_all_logits_at_once(most, monkeypatch):
    """A chunk left out or counted twice; a gradient without its weight or the upstream one."""
    monkeypatch.setattr(loss, "CHUNK_LOGITS", most)
    args = drawn(dtype=torch.float32)
    ours = loss.weighted_loss(*args)
    dx, dhead = torch.autograd.grad(3 * ours, args[:2])
    ref = whole(*args)
    ref_dx, ref_dhead = torch.autograd.grad(3 * ref, args[:2])
    torch.testing.assert_close(ours, ref)
    assert_close(dx, ref_dx, what="dx")
    assert_close(dhead, ref_dhead, atol=5e-5, what="dhead")


def test_bf16_is_as_good_as_torch_in_bf16(monkeypatch):
    """A sum of chunks' gradients in bf16 would drift."""
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 61 * 5)
    exact = drawn(N=400)
    rounded = *(part.detach().bfloat16().requires_grad_() for part in exact[:2]), *exact[2:]
    gradients = [torch.autograd.grad(function(*args), args[:2]) for function, args in (
        (loss.weighted_loss, rounded), (whole, rounded), (whole, exact))]
    for ours, plain, ref, what in zip(*gradients, ("dx", "dhead")):
        assert_as_good(ours, plain, ref, what)


def test_compiled_is_what_computes_where_it_is_asked_for(monkeypatch):
    """A flag that is lost on the way, and a loss that takes three times as long."""
    monkeypatch.setattr(loss, "compiled_chunk_loss",
                        lambda *chunk: [2 * part for part in loss.chunk_loss(*chunk)])
    args = drawn(dtype=torch.float32)
    twice = loss.weighted_loss(*args, compiled=True)
    torch.testing.assert_close(twice, 2 * loss.weighted_loss(*args))


@pytest.mark.skipif(DEVICE == "cpu", reason="torch.compile of the chunk wants a GPU here")
def test_compiled_chunk_is_the_plain_one():
    """A fused kernel that loses the target or the weight."""
    chunk = (torch.randn(300, 5000, device=DEVICE), torch.randint(5000, (300,), device=DEVICE),
             torch.rand(300, device=DEVICE))
    for ours, ref in zip(loss.compiled_chunk_loss(*chunk), loss.chunk_loss(*chunk)):
        torch.testing.assert_close(ours, ref, rtol=1e-5, atol=1e-6)


def test_large_scores_do_not_overflow():
    """exp of a logit instead of its distance to logsumexp."""
    x = torch.tensor([[1e4, 0.0], [0.0, 1e4]], requires_grad=True)
    head = torch.eye(2, requires_grad=True)
    value = loss.weighted_loss(x, head, torch.tensor([0, 0]), torch.ones(2))
    value.backward()
    assert value.item() == 1e4 and x.grad.isfinite().all()


def test_score_counts_by_weight_and_ignores_the_rest(monkeypatch):
    """Padding counted as right or wrong."""
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 100)
    x, head, target, weight = drawn(dtype=torch.float32)
    value, right = loss.weighted_score(x, head, target, weight)
    torch.testing.assert_close(value.float(), whole(x, head, target, weight))
    hit = F.linear(x, head).argmax(-1) == target
    assert right.item() == pytest.approx((weight * hit).sum().item())
    assert loss.weighted_score(x, head, target, 0 * weight) == (0, 0)


def test_model_loss_shifts_targets_and_never_counts_the_first_token():
    """Targets that are the inputs; a loss of what nobody predicts."""
    model = tiny(memory=True)
    tokens, weight = draw_tokens(2, 9), torch.rand(2, 9)
    logp = model(tokens[:, :-1]).log_softmax(-1)
    expected = -(logp.gather(-1, tokens[:, 1:, None]).squeeze(-1) * weight[:, 1:]).sum()
    torch.testing.assert_close(model.loss(tokens, weight), expected)
    torch.testing.assert_close(model.score(tokens, weight)[0].float(), expected.detach())
