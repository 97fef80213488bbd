"""
What bench.py times beside the kernels: the same results by other ways than ours.

    official_memory    Eq. 1 as official RAT+ has it, for torch.compile
    fla_memory         Eq. 1 by flash-linear-attention's chunk_hgrn (pip install fla-core)
    dense, cudnn       dense attention by one of PyTorch's own kernels
    plain_quest        Quest's decoding step as its formula stands in PyTorch, for torch.compile
    plain_step         all between a step's projections and attention, likewise
    norm_and_rotate    QK-norm and RoPE, likewise

tests/test_bench.py holds the ones in PyTorch to our definitions: a peer that computes something
else is no peer. Letters as in sparse.py.
"""
import math

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from memory import memory_step

CUDNN, FLASH = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION


def scan(g, b, reverse=False):
    """m[t] = g[t] m[t-1] + b[t], by torch's associative_scan over such steps (g, b)."""
    from torch._higher_order_ops.associative_scan import associative_scan
    after = lambda one, two: (one[0] * two[0], two[0] * one[1] + two[1])
    return associative_scan(after, (g, b), dim=1, reverse=reverse)[1]


class OfficialScan(torch.autograd.Function):
    """Official RAT+'s scan, with its gradient."""

    @staticmethod
    def forward(ctx, g, b):
        m = scan(g, b)
        ctx.save_for_backward(g, m)
        return m

    @staticmethod
    def backward(ctx, dm):
        g, m = ctx.saved_tensors
        later = torch.cat([g[:, 1:], torch.ones_like(g[:, :1])], dim=1)
        db = scan(later, dm, reverse=True)
        before = torch.cat([torch.zeros_like(m[:, :1]), m[:, :-1]], dim=1)
        return db * before, db


def official_memory(
    k, v,  # (B, T, KV, D)
    gate,  # (B, T, KV, D)  logits
):         # -> k~, v~
    """k and v side by side under one gate, in fp32."""
    g = torch.sigmoid(gate.flatten(2).float()).repeat(1, 1, 2)
    m = OfficialScan.apply(g, (1 - g) * torch.cat([k.flatten(2), v.flatten(2)], dim=-1).float())
    return [x.unflatten(-1, k.shape[2:]) for x in m.to(k.dtype).chunk(2, dim=-1)]


def fla_memory(k, v, gate):
    """As official_memory; chunk_hgrn is h[t] = exp(g[t]) h[t-1] + x[t] of one tensor at a time."""
    from fla.ops.hgrn import chunk_hgrn
    gate = gate.flatten(2).float()
    log_g, rest = F.logsigmoid(gate), torch.sigmoid(-gate)
    return [chunk_hgrn((rest * x.flatten(2)).to(x.dtype), log_g)[0].view(x.shape) for x in (k, v)]


def dense(
    q,     # (B, Tq, H, D)
    k, v,  # (B, Tk, H, D)
    by,    # SDPBackend
    causal=True,
):         # -> y (B, Tq, H, D)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(by):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)


def cudnn(q, k, v):
    return dense(q, k, v, CUDNN)


def entries(slots, k, v):
    """k and v at slots (B, KV, n): (B, n, KV, D)"""
    index = slots.transpose(1, 2).unsqueeze(-1).expand(-1, -1, -1, k.shape[-1])
    return k.gather(1, index), v.gather(1, index)


def plain_quest(
    q,           # (B, 1, H, D)   as many query heads as KV heads
    k, v,        # (B, Tk, H, D)  a full cache, in whole blocks
    low, high,   # (B, N, H, D)   its bounds
    S,           # blocks to read
    block_size,
):               # -> y (B, 1, H, D)
    q_ = q.transpose(1, 2).float()                                          # (B, H, 1, D)
    above = q_.clamp_min(0) @ high.float().permute(0, 2, 3, 1)
    below = q_.clamp_max(0) @ low.float().permute(0, 2, 3, 1)
    scores = (above + below).squeeze(2)                                     # (B, H, N)
    scores[:, :, 0] = scores[:, :, -1] = math.inf
    chosen = scores.topk(S, dim=-1).indices                                 # (B, H, S)
    slots = chosen.unsqueeze(-1) * block_size + torch.arange(block_size, device=q.device)
    k, v = entries(slots.flatten(2), k, v)                                  # (B, S * block, H, D)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def norm_and_rotate(
    x,         # (B, T, H, D)
    weight,    # (H * D,)
    cos, sin,  # (1, T, 1, D / 2)  fp32
):             # -> (B, T, H, D)
    normed = F.rms_norm(x.flatten(2), weight.shape, weight, 1e-6).view(x.shape)
    a, b = normed.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def plain_step(
    q, k, v, gate,     # (B, 1, H, D)     projections of a token
    state,             # (2, B, H, D)     and all that follow: updated in place
    k_cache, v_cache,  # (B, slots, H, D)
    low, high,         # (B, N, H, D)     Quest's bounds
    weight, cos, sin,  # as in norm_and_rotate
    slot,              # of the token, not the first of its block
    block_size,
):                     # -> q (B, 1, H, D)
    k, v, new = memory_step(k, v, gate, state)
    q, k = (norm_and_rotate(x, weight, cos, sin) for x in (q, k))
    state.copy_(new)
    k_cache[:, slot], v_cache[:, slot] = k[:, 0], v[:, 0]
    n = slot // block_size
    low[:, n] = torch.minimum(low[:, n], k[:, 0])
    high[:, n] = torch.maximum(high[:, n], k[:, 0])
    return q
