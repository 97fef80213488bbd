"""
What bench.py times beside the kernels: the same results by other ways than ours.

    official_memory    Eq. 1 as official RAT+ has it, for torch.compile
    fla_memory         Eq. 1 by flash-linear-attention's chunk_hgrn (pip install fla-core)
    warp_scan          Eq. 1 by accelerated-scan, whose kernel is in CUDA (pip install
                       accelerated-scan)
    dense              dense attention by one of PyTorch's own kernels: cudnn, flash_2
    plain_quest        Quest's decoding step as its formula stands in PyTorch, for torch.compile
    flash_moba         MoBA's prefill and its gradients by FlashMoBA's CUDA
                       (github.com/mit-han-lab/flash-moba)
    infllm             attention to chosen blocks by InfLLM-v2's CUDA
                       (github.com/OpenBMB/infllmv2_cuda_impl)
    fla_moba           MoBA's prefill by flash-linear-attention, in two calls of FlashAttention-2
    plain_step         all between a step's projections and attention, likewise
    norm_and_rotate    QK-norm and RoPE, likewise

A package that is not installed is named in the table. tests/test_bench.py holds the ones in PyTorch
to our definitions, and bench.py compares the results of the others, without gradients, with ours
before it times them: a peer that computes something else is no peer. Only FlashMoBA and fla's MoBA
are not compared where heads share keys, as they choose blocks for each head by itself. Letters as
in sparse.py.
"""
import math

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from memory import memory_step

CUDNN, FLASH = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION


# ---------------------------------------------------------------- the memory

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


def hgrn_inputs(k, v, gate):
    """-> log g, (1 - g) k, (1 - g) v, each (B, T, W)"""
    gate = gate.flatten(2).float()
    rest = torch.sigmoid(-gate)
    return F.logsigmoid(gate), *((rest * x.flatten(2)).to(x.dtype) for x in (k, v))


def fla_memory(k, v, gate, inputs):
    """
    As official_memory; chunk_hgrn is h[t] = exp(g[t]) h[t-1] + x[t] of one tensor at a time.
    inputs: hgrn_inputs, compiled.
    """
    from fla.ops.hgrn import chunk_hgrn
    log_g, *tensors = inputs(k, v, gate)
    return [chunk_hgrn(x, log_g)[0].view(k.shape) for x in tensors]


def warp_inputs(k, v, gate):
    """What warp_scan takes, (B, W, T) in fp32: making it is not timed."""
    turned = lambda x: x.detach().flatten(2).transpose(1, 2).float().contiguous().requires_grad_()
    g = torch.sigmoid(gate.float())
    return turned(g), turned((1 - g) * k), turned((1 - g) * v)


def warp_scan(g, k, v):
    """
    As official_memory, in accelerated-scan's own layout (B, W, T) and in fp32: it takes bf16 too,
    but then the state is carried in bf16.
    """
    from accelerated_scan.warp import scan as kernel
    return [kernel(g, x) for x in (k, v)]


# ---------------------------------------------------------------- attention

def dense(
    q,     # (B, Tq, H, D)
    k, v,  # (B, Tk, KV, D)
    by,    # SDPBackend
    causal=True,
):         # -> y (B, Tq, H, D)
    gqa = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(by):
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=gqa)
    return y.transpose(1, 2)


def cudnn(q, k, v):
    return dense(q, k, v, CUDNN)


def flash_2(q, k, v):
    return dense(q, k, v, FLASH)


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


def packed(k):
    """Where the rows of a batch begin and end once they lie one behind the other: (B + 1,)"""
    B, T = k.shape[:2]
    return torch.arange(0, (B + 1) * T, T, dtype=torch.int32, device=k.device)


def flash_moba(q, k, v, block_size, S):
    """S counts the query's own block. Each query head chooses its own blocks, also with GQA."""
    from flash_moba import flash_moba_varlen_func
    T, ends = k.shape[1], packed(k)
    y = flash_moba_varlen_func(*(x.flatten(0, 1) for x in (q, k, v)), ends, ends, T, T, block_size,
                               S, causal=True)
    return y.view(q.shape)


def infllm(
    q, k, v,  # (1, T, H, D), (1, T, KV, D)  with H = 16 KV
    chosen,   # (1, KV, T, S)                blocks of 64, int32, the own among them
):
    """Its gradient makes a mask of all blocks and empties PyTorch's cache of memory twice."""
    from infllm_v2 import infllmv2_attn_varlen_func
    T, ends = k.shape[1], packed(k)
    y = infllmv2_attn_varlen_func(*(x[0] for x in (q, k, v)), ends, ends, T, T, causal=True,
                                  topk_idx=chosen[0])
    return y[None]


def fla_moba(q, k, v, block_size, S):
    """As flash_moba. Where flash-attn is not installed, with FlashAttention-2 as PyTorch has it."""
    from fla.ops.moba import parallel
    if parallel.flash_attn_varlen_func is None:
        parallel.flash_attn_varlen_func = True  # asked for, and used for single blocks alone
        parallel._flash_attn_varlen_forward = torchs_forward
        parallel._flash_attn_varlen_backward = torchs_backward
    T, G = k.shape[1], q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(G, dim=2) for x in (k, v))
    row = lambda x: x.flatten(0, 1)[None]
    return parallel.parallel_moba(row(q), row(k), row(v), packed(k), T, block_size, S).view(q.shape)


def torchs_forward(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal,
    dropout_p,
):
    """flash-attn's function of that name, by PyTorch's copy of FlashAttention-2."""
    y, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, causal, False,
        scale=softmax_scale)
    return y, lse, None, None


def torchs_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
    max_seqlen_k, softmax_scale, causal, dropout_p, **_,
):
    none = torch.zeros(2, dtype=torch.uint64, device=q.device)  # the state of dropout
    gradients = torch.ops.aten._flash_attention_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p, causal, none, none, scale=softmax_scale)
    for x, gradient in zip((dq, dk, dv), gradients):
        x.copy_(gradient)


# ---------------------------------------------------------------- the rest of a block

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
