"""
Cross entropy over a large vocabulary, without ever holding all logits: they come and go some
thousand tokens at a time.

    loss = sum_t weight[t] * (logsumexp(z[t]) - z[t, target[t]])          z = x W^T, (N, V)
    dz[t] = weight[t] * (softmax(z[t]) - onehot(target[t])),  dx = dz W,  dW = dz^T x

5,000 tokens of OLMo 2's vocabulary have 500M logits, with their gradient 2 GB in bf16; a batch of
32,768 would take 13. The loss needs nothing of another token, so each chunk's gradient is computed
at once, in the forward pass, and its logits are dropped: three products in all, as many as with all
logits, where computing them anew in backward would take four.

A term of a token's own logits, such as a z-loss, belongs into chunk_loss, its value and its dz. A
loss that needs more than that takes model(tokens) and autograd. train.py divides the sum by the
batch's weights.

Truth: torch's cross_entropy, in tests/test_loss.py. model.Transformer.loss calls this.
Letters: N tokens, C width, V vocabulary.
"""
import math

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# At most, 1.1 GB in bf16. Smaller chunks would keep a GPU as busy, but each adds up all of dW once
# more.
CHUNK_LOGITS = 2 ** 29


def chunks(N, V):
    """Slices of N tokens, as few and as even as CHUNK_LOGITS lets them be, of one at least."""
    most = max(1, CHUNK_LOGITS // V)
    parts = max(1, math.ceil(N / most))
    n = math.ceil(max(1, N) / parts)
    return [slice(first, first + n) for first in range(0, N, n)]


def chunk_loss(
    logits,  # (n, V)
    target,  # (n,)
    weight,  # (n,)
):           # -> sum of weight * cross entropy, fp32; its gradient to the logits, in their dtype
    """In fp32 inside; compiled, this is two passes over the logits."""
    z = logits.float()
    top = z.amax(-1, keepdim=True)
    # Here and below less top: beside large logits the sum's logarithm would be rounded away.
    lse = (z - top).exp().sum(-1, keepdim=True).log()
    picked = z.gather(-1, target[:, None])
    hit = torch.arange(z.shape[-1], device=z.device) == target[:, None]
    dz = ((z - top - lse).exp() - hit.float()) * weight[:, None]
    return ((lse + (top - picked)).squeeze(-1) * weight).sum(), dz.to(logits.dtype)


compiled_chunk_loss = torch.compile(chunk_loss, dynamic=False)


class ChunkedLoss(torch.autograd.Function):
    """weighted_loss, whose gradients are there when its value is. Once differentiable."""

    @staticmethod
    def forward(ctx, x, head, target, weight, compiled):
        of_chunk = compiled_chunk_loss if compiled else chunk_loss
        loss = torch.zeros((), device=x.device, dtype=torch.float32)
        parts = chunks(len(x), len(head))
        dx, dhead = torch.empty_like(x), None
        for part in parts:
            # What does not count may be anything, and 0 * NaN is NaN.
            here = x[part].masked_fill((weight[part] == 0)[:, None], 0)
            logits = F.linear(here, head)  # (n, V); under autocast in bf16
            some, dz = of_chunk(logits, target[part], weight[part])
            del logits
            loss += some
            dx[part] = dz @ head.to(dz.dtype)
            more = dz.T @ here.to(dz.dtype)  # (V, C)
            if len(parts) > 1:  # in fp32: a sum of many bf16 gradients drifts
                dhead = more.float() if dhead is None else dhead.add_(more)
            else:
                dhead = more
        ctx.save_for_backward(dx, torch.zeros_like(head) if dhead is None else dhead.to(head.dtype))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        dx, dhead = ctx.saved_tensors
        return dx * dloss, dhead * dloss, None, None, None


def weighted_loss(
    x,                # (N, C)  the model's last hidden vectors, normalised
    head,             # (V, C)
    target,           # (N,)    the token that follows
    weight,           # (N,)    fp32
    compiled=False,   # by torch.compile
):                    # -> sum of weight * cross entropy in nats, fp32; gradients for x and head
    return ChunkedLoss.apply(x, head, target, weight, compiled)


@torch.no_grad()
def weighted_score(x, head, target, weight):
    """
    weighted_loss's arguments -> the same sum, and the sum of weights whose target is the likeliest
    token. No gradients.
    """
    loss, right = torch.zeros(2, dtype=torch.float64, device=x.device)
    counts = weight > 0  # often few: answers alone
    x, target, weight = x[counts], target[counts], weight[counts]
    for part in chunks(len(x), len(head)):
        logits = F.linear(x[part], head).float()
        loss += (F.cross_entropy(logits, target[part], reduction="none") * weight[part]).sum()
        right += ((logits.argmax(-1) == target[part]) * weight[part]).sum()
    return loss, right
