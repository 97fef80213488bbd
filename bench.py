"""
How fast the kernels are: each beside its floor, what the hardware allows at best, and beside its peers.

    floor = max(fewest bytes / copy bandwidth, FLOPs / matmul rate)         both rates are measured in the same run

A line is the median of several replays of a CUDA graph that calls the function many times, over inputs that together are
larger than the L2 cache, so that neither launches from Python nor what is cached flatter it. Before it is timed, a kernel's
result is compared with plain PyTorch's, for some of the queries where all would be too many; a relative error above 1e-2
ends the run. (The tests hold the kernels to more, at small shapes.)

Peers are timed in the same way: official RAT+'s scan and Quest as their formulas stand in PyTorch under torch.compile,
fla's chunk_hgrn where it is installed (pip install fla-core), its inputs made in eager PyTorch, dense attention by cuDNN and
by flash. Everything is bf16, 32 heads of 128, the layer of a 7B model. Selection is always included.

    python bench.py                         everything; a table, and out/bench.json
    python bench.py --only memory quest     some of it
    python bench.py --end-to-end            whole models instead, prompt to answer: bench_model.py

Without a GPU it times plain PyTorch at a small shape: that says nothing about the kernels.
"""
import argparse
import math
import statistics
import sys
import time

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from experiments import bench_model
from eval_niah import commit, positive, save
from memory import memory_scan, memory_step
from model import PRESETS
from sparse import Dilated, MoBA, SnapKV, attend

H, D = 32, 128
DTYPE = torch.bfloat16
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"


# ---------------------------------------------------------------- timing

def milliseconds(functions):
    """Median time of one call. functions: the same work on different inputs, in turn."""
    if not ON_GPU:
        started = time.time()
        for f in functions:
            f()
        return (time.time() - started) * 1e3 / len(functions)
    stream, events = torch.cuda.Stream(), lambda: torch.cuda.Event(enable_timing=True)
    with torch.cuda.stream(stream):
        for _ in range(2):  # compiles, tunes, allocates
            start, end = events(), events()
            start.record()
            for f in functions:
                f()
            end.record()
            torch.cuda.synchronize()
    once = start.elapsed_time(end) / len(functions)
    rounds = max(1, round(15 / (once * len(functions))))  # a replay takes some 15 ms
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(rounds):
            for f in functions:
                f()
    times = []
    for _ in range(8):
        start, end = events(), events()
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / (rounds * len(functions)))
    return statistics.median(times[1:])


def ceilings():
    """GB/s of a large copy, TFLOP/s of a large product of matrices."""
    x = torch.randn(2**29, device=DEVICE, dtype=DTYPE) if ON_GPU else torch.randn(2**24)
    y, a = torch.empty_like(x), torch.randn(8192 if ON_GPU else 512, 8192 if ON_GPU else 512, device=DEVICE, dtype=DTYPE)
    size = x.numel() * x.element_size()
    return {"copy": 2 * size / milliseconds([lambda: torch.neg(x, out=y)]) / 1e6,
            "matmul": 2 * len(a)**3 / milliseconds([lambda: a @ a]) / 1e9}


class Table:
    """Rows as they are measured."""

    def __init__(self, rates):
        self.rates, self.rows = rates, []

    def line(self, kernel, shape, functions, peers, n_bytes=0, flops=0, goal=None, error=None):
        """
        functions: our kernel's, on different inputs; peers: {name: functions}; n_bytes, flops: the fewest possible;
        goal: text; error: relative, of our result. None: part of a line that is checked.
        """
        if error is not None and not error <= 1e-2:  # NaN too
            raise SystemExit(f"bench.py: {kernel} {shape}: relative error {error:.1e} against plain PyTorch; not timed")
        ms = milliseconds(functions)
        floor = max(n_bytes / self.rates["copy"] / 1e6, flops / self.rates["matmul"] / 1e9)
        row = {"kernel": kernel, "shape": shape, "ms": ms, "floor_ms": floor, "goal": goal, "error": error,
               "GB/s": n_bytes / ms / 1e6, "TFLOP/s": flops / ms / 1e9, "peers": {}}
        for name, of_peer in peers.items():
            try:
                row["peers"][name] = milliseconds(of_peer)
            except (torch.OutOfMemoryError, RuntimeError, ImportError) as error:
                row["peers"][name] = f"failed: {str(error).splitlines()[0][:80]}"
        self.rows.append(row)
        rate = f"{row['GB/s']:7,.0f} GB/s   " if n_bytes / self.rates["copy"] / 1e6 == floor else f"{row['TFLOP/s']:7,.0f} TFLOP/s"
        against = "   ".join(f"{name} {t:.3f} ({t / ms:.2f}x)" if isinstance(t, float) else f"{name} {t}"
                             for name, t in row["peers"].items())
        print(f"{kernel:28} {shape:24} {ms:8.4f} ms {rate} {floor / ms:5.0%} of floor   {against}" + (f"   goal {goal}" if goal else ""), flush=True)
        torch.cuda.empty_cache()
        return ms


def randn(*shape, grad=False):
    return torch.randn(*shape, device=DEVICE, dtype=DTYPE, requires_grad=grad)


def relative_error(ours, exact):
    """Root mean square of the difference over that of `exact`, the worst of several tensors."""
    return max(((x.float() - y.float()).norm() / y.float().norm()).item() for x, y in zip(ours, exact))


def some_queries(y, q, k, v, reads):
    """
    Relative error of y (1, T, H, D) at 32 of the queries q. reads(t (32,), key (T,)) -> (32, T), or (H, 32, T): whether
    query t reads key.
    """
    T = k.shape[1]
    t = torch.randint(T, (32,), device=DEVICE)
    k, v = k[0].float(), v[0].float()
    scores = torch.einsum("thd,khd->htk", q[0, t].float(), k) / math.sqrt(D)
    keep = reads(t, torch.arange(T, device=DEVICE)) & (torch.arange(T, device=DEVICE) <= t[:, None])
    exact = torch.einsum("htk,khd->thd", scores.masked_fill(~keep, -math.inf).softmax(-1), v)
    return relative_error([y[0, t]], [exact])


def input_sets(n_bytes, touched=None):
    """How many sets of inputs of n_bytes, of which a call reads those `touched`: enough to leave L2 cold, within 8 GB."""
    return max(1, min(8 if touched is None else round(4e8 // touched), int(8e9 // n_bytes)))


# ---------------------------------------------------------------- peers

class OfficialScan(torch.autograd.Function):
    """The scan of official RAT+, which is torch's associative_scan of steps (g, b); for torch.compile."""

    @staticmethod
    def forward(ctx, g, b):
        from torch._higher_order_ops.associative_scan import associative_scan
        _, m = associative_scan(lambda one, two: (one[0] * two[0], two[0] * one[1] + two[1]), (g, b), dim=1)
        ctx.save_for_backward(g, m)
        return m

    @staticmethod
    def backward(ctx, dm):
        from torch._higher_order_ops.associative_scan import associative_scan
        g, m = ctx.saved_tensors
        later = torch.cat([g[:, 1:], torch.ones_like(g[:, :1])], dim=1)
        _, db = associative_scan(lambda one, two: (one[0] * two[0], two[0] * one[1] + two[1]), (later, dm), dim=1, reverse=True)
        before = torch.cat([torch.zeros_like(m[:, :1]), m[:, :-1]], dim=1)
        return db * before, db


def official_memory(k, v, gate):
    """Eq. 1 as official RAT+ has it: k and v side by side under one gate, in fp32."""
    g = torch.sigmoid(gate.flatten(2).float()).repeat(1, 1, 2)
    m = OfficialScan.apply(g, (1 - g) * torch.cat([k, v], dim=-1).flatten(2).float())
    return [x.unflatten(-1, k.shape[2:]) for x in m.to(k.dtype).chunk(2, dim=-1)]


def fla_memory(k, v, gate):
    """Eq. 1 by fla's chunk_hgrn, which computes h[t] = exp(g[t]) h[t-1] + x[t] in one tensor at a time."""
    from fla.ops.hgrn import chunk_hgrn
    log_g, rest = F.logsigmoid(gate.flatten(2).float()), torch.sigmoid(-gate.flatten(2).float())
    return [chunk_hgrn((rest * x.flatten(2)).to(x.dtype), log_g)[0].view(x.shape) for x in (k, v)]


def dense(q, k, v, by, causal=True):
    """y (B, H, Tq, D) of dense attention; q (B, Tq, H, D), k, v (B, Tk, H, D)."""
    with sdpa_kernel(by):
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal)


def plain_quest(q, k, v, low, high, S, block_size):
    """One decoding step of Quest on a full cache, its bounds given; for torch.compile."""
    B, T, KV, _ = k.shape
    q_ = q.float().view(B, KV, 1, D)
    scores = (q_.clamp_min(0) @ high.float().permute(0, 2, 3, 1) + q_.clamp_max(0) @ low.float().permute(0, 2, 3, 1)).squeeze(2)
    scores[:, :, 0] = scores[:, :, -1] = math.inf
    chosen = scores.topk(S, dim=-1).indices                                                    # (B, KV, S)
    slots = (chosen.unsqueeze(-1) * block_size + torch.arange(block_size, device=q.device)).flatten(2)
    index = slots.transpose(1, 2).unsqueeze(-1).expand(-1, -1, -1, D)                          # (B, S * block, KV, D)
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k.gather(1, index), v.gather(1, index))))


def norm_and_rotate(x, weight, cos, sin):
    """QK-norm and RoPE of x (B, T, H, D)."""
    a, b = F.rms_norm(x.flatten(2), weight.shape, weight, 1e-6).view(x.shape).float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def forward_backward(f, inputs, gradients):
    outputs = f(*inputs)
    return torch.autograd.grad(outputs, inputs, gradients)


CUDNN, FLASH = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION


# ---------------------------------------------------------------- the lines

def bench_memory(table):
    from kernels import memory_scan as ours
    official = torch.compile(official_memory)
    for B, T in (8, 4096), (1, 4096), (1, 32768):
        n = B * T * H * D * 2
        sets = [[randn(B, T, H, D) for _ in range(5)] for _ in range(input_sets(12 * n))]
        for k, v, gate, *_ in sets:
            gate.mul_(2).add_(2)  # memories of a few to hundreds of tokens
        calls = lambda f: [lambda s=s: f(*s[:3]) for s in sets]
        # the first row, forward and backward; plain in fp32
        exact = lambda *x: memory_scan(*x)[:2]
        *x, dk, dv = (x[:1].clone() for x in sets[0])
        x32 = [x.float().requires_grad_() for x in x]
        forward = relative_error([y[:1] for y in ours(*sets[0][:3])[:2]], exact(*x32))
        x = [x.requires_grad_() for x in x]
        backward = relative_error(forward_backward(lambda *x: ours(*x)[:2], x, (dk, dv)),
                                  forward_backward(exact, x32, (dk.float(), dv.float())))
        table.line("memory_scan forward", f"B{B} T{T}", calls(lambda *x: ours(*x)[:2]),
                   {"official, compiled": calls(official), "fla": calls(fla_memory)}, n_bytes=5 * n, error=forward,
                   goal="80 %" if B == 8 else "55 %" if T == 4096 else "75 %")
        for s in sets:
            for x in s[:3]:
                x.requires_grad_()
        both = lambda f: [lambda s=s: forward_backward(f, s[:3], s[3:]) for s in sets]
        table.line("memory_scan fwd+bwd", f"B{B} T{T}", both(lambda *x: ours(*x)[:2]),
                   {"official, compiled": both(official), "fla": both(fla_memory)}, n_bytes=13 * n, error=backward,
                   goal="65 %" if B == 8 or T > 4096 else "48 %")


def bench_step(table):
    """Its inputs are in L2, as where they have just been computed."""
    from triton_ops.block import decode_step
    for B in 1, 8:
        sets = []
        for _ in range(8):
            cache = [randn(B, 4096, H, D) for _ in "kv"]
            sets.append([*(randn(B, 1, H, D) for _ in range(4)), torch.randn(2, B, H, D, device=DEVICE), *cache])
        weight, angle = randn(H * D), torch.randn(1, 1, 1, D // 2, device=DEVICE)
        cos, sin, used = angle.cos(), angle.sin(), torch.full((B,), 4000, device=DEVICE)
        low, high = (randn(B, 64, H, D) for _ in "lh")
        ours = lambda q, k, v, gate, state, k_cache, v_cache: decode_step(
            q, k, v, gate, weight, weight, 1e-6, cos, sin, state, k_cache, v_cache, low, high, 64, used)

        def plain(q, k, v, gate, state, k_cache, v_cache):
            k, v, new = memory_step(k, v, gate, state)
            q, k = (norm_and_rotate(x, weight, cos, sin) for x in (q, k))
            state.copy_(new)
            k_cache[:, 3999], v_cache[:, 3999] = k[:, 0], v[:, 0]
            low[:, 62], high[:, 62] = torch.minimum(low[:, 62], k[:, 0]), torch.maximum(high[:, 62], k[:, 0])
            return q

        calls = lambda f: [lambda s=s: f(*s) for s in sets]
        copy = [x.clone() for x in sets[0]]
        bounds = low.clone(), high.clone()
        expected = [plain(*copy), *copy[4:], low.clone(), high.clone()]
        low.copy_(bounds[0]), high.copy_(bounds[1])
        error = relative_error([ours(*sets[0]), *sets[0][4:], low, high], expected)
        table.line("decode_step", f"B{B}", calls(ours), {"compiled": calls(torch.compile(plain)), "eager": calls(plain)},
                   error=error, n_bytes=B * H * D * (4 * 2 + 2 * 8 + 3 * 2 + 4 * 2))


def bench_quest(table):
    from triton_ops.quest import block_bounds, quest_attend, quest_scores
    from triton_ops.topk import select
    block_size = 64
    compiled = torch.compile(plain_quest, dynamic=False)
    for B, T, goal in (8, 32768, "8.5x cuDNN, 2.1x compiled"), (1, 131072, "8x cuDNN"), (1, 32768, "5x cuDNN"), (16, 4096, None), (1, 4096, None):
        S, n = T // block_size // 16, B * T * H * D * 2
        used = torch.full((B,), T, device=DEVICE)
        sets = []
        read = 2 * n / 16 + 2 * n / block_size  # the chosen pages and all bounds
        for _ in range(input_sets(2 * n, read)):
            q, k, v = randn(B, 1, H, D), randn(B, T, H, D), randn(B, T, H, D)
            sets.append([q, k, v, *block_bounds(k, used, block_size)])

        def ours(q, k, v, low, high):
            scores = quest_scores(q, low, high, used, block_size, True, True)
            return quest_attend(q, k, v, select(scores, S), used, block_size)

        calls = lambda f: [lambda s=s: f(*s) for s in sets]
        peers = {"cuDNN": calls(lambda q, k, v, *_: dense(q, k, v, CUDNN, causal=False)),
                 "compiled Quest": calls(lambda *s: compiled(*s, S, block_size))}
        error = relative_error([ours(*sets[0])[0]], [plain_quest(*sets[0], S, block_size).transpose(1, 2)])
        table.line("quest step 1/16", f"B{B} T{T}", calls(ours), peers, n_bytes=read, goal=goal, error=error)
        table.line("  quest_scores", f"B{B} T{T}", calls(lambda q, k, v, low, high: quest_scores(q, low, high, used, block_size, True, True)),
                   {}, n_bytes=2 * n / block_size)
        scores = [quest_scores(q, low, high, used, block_size, True, True) for q, _, _, low, high in sets]
        table.line("  select", f"B{B} T{T}", [lambda x=x: select(x, S) for x in scores], {}, n_bytes=scores[0].numel() * 4)
        chosen = [select(x, S) for x in scores]
        table.line("  quest_attend", f"B{B} T{T}", [lambda s=s, c=c: quest_attend(*s[:3], c, used, block_size) for s, c in zip(sets, chosen)],
                   {}, n_bytes=2 * n / 16)
        if T > 4096:
            table.line("  block_bounds (once)", f"B{B} T{T}", calls(lambda q, k, *_: block_bounds(k, used, block_size)), {}, n_bytes=n)


def moba_error(q, k, v, chosen, y, method):
    """Relative error of y at some queries, given `chosen`, or the share of queries that chose otherwise than plain MoBA."""
    T, size, S = k.shape[1], method.block_size, chosen.shape[3]
    t = torch.randint(T, (256,), device=DEVICE)
    best = method.forced(method.score(q[:, t], k), t[None]).topk(S)                            # (1, H, 256, S)
    plain = best.indices.where(best.values > -math.inf, -1).sort(-1).values
    agree = (chosen[:, :, t].sort(-1).values == plain).all(-1).float().mean().item()  # near-ties may swap

    def reads(t, key):
        read = torch.zeros(H, len(t), T // size + 1, dtype=torch.bool, device=DEVICE)          # one more for the -1s
        return read.scatter(-1, chosen[0, :, t].long() % (T // size + 1), True)[..., key // size]

    return max(some_queries(y, q, k, v, reads), 1 - agree)


def moba_entries(T, block_size, S):
    """Entries that all T queries read: of each its own block up to itself, and S - 1 others where there are so many."""
    return sum(min(S - 1, n) * block_size + (block_size + 1) / 2 for n in range(T // block_size)) * block_size


def bench_moba(table):
    from triton_ops.moba import moba_attend
    from triton_ops.moba_route import moba_route
    start = torch.zeros(1, dtype=torch.long, device=DEVICE)
    for T, block_size, S, goal in (32768, 128, 32, "1.8x"), (65536, 128, 32, "2x"), (65536, 512, 8, "3.5x"), (65536, 128, 8, "5x"):
        q, k, v = (randn(1, T, H, D) for _ in "qkv")
        shape, flops = f"T{T} block {block_size} x {S}", 4 * moba_entries(T, block_size, S) * H * D
        route = lambda: moba_route(q, k, start, block_size, S, True)
        chosen = route()
        listed = lambda: moba_attend(q, k, v, chosen, start, block_size)
        error = moba_error(q, k, v, chosen, listed(), MoBA(S * block_size, block_size))
        table.line("moba prefill", shape, [lambda: moba_attend(q, k, v, route(), start, block_size)],
                   {"cuDNN": [lambda: dense(q, k, v, CUDNN)]}, flops=flops, goal=f"{goal} cuDNN", error=error)
        table.line("  moba_route", shape, [route], {}, flops=2 * T * (T / block_size) / 2 * H * D)
        table.line("  moba_attend", shape, [listed], {}, flops=flops)

    # training, routing included
    T, block_size, S = 32768, 128, 32
    q, k, v, dy = *(randn(1, T, H, D, grad=True) for _ in "qkv"), randn(1, T, H, D)

    def ours(q, k, v, S=S):
        return moba_attend(q, k, v, moba_route(q.detach(), k.detach(), start, block_size, S, True), start, block_size)

    # checked on 4 heads of an eighth of the prompt, an eighth of the blocks, against dense attention under a mask
    some = [x[:, :T // 8, :4].detach().requires_grad_() for x in (q, k, v)]
    chosen = moba_route(*some[:2], start, block_size, S // 8, True)                            # (1, 4, T / 8, S / 8)
    block = torch.arange(T // 8 // block_size, device=DEVICE)
    keep = (chosen.unsqueeze(-1) == block).any(3).repeat_interleave(block_size, dim=-1)        # (1, 4, T / 8, T / 8)
    keep = keep & torch.ones(T // 8, T // 8, dtype=torch.bool, device=DEVICE).tril()
    some32, dy_some = [x.detach().float().requires_grad_() for x in some], dy[:, :T // 8, :4]
    error = relative_error(forward_backward(lambda *x: ours(*x, S=S // 8), some, dy_some),
                           forward_backward(lambda *x: attend(*x, keep), some32, dy_some.float()))
    cudnn = lambda q, k, v: dense(q, k, v, CUDNN).transpose(1, 2)
    table.line("moba fwd+bwd", f"T{T} block {block_size} x {S}", [lambda: forward_backward(ours, (q, k, v), dy)],
               {"cuDNN": [lambda: forward_backward(cudnn, (q, k, v), dy)]}, error=error,
               flops=(4 + 10) * moba_entries(T, block_size, S) * H * D)  # forward, backward


def bench_snapkv(table):
    from triton_ops.snapkv import snapkv_scores
    from triton_ops.topk import select
    T, W, budget = 32768, 64, 2048
    sets = [[randn(1, W, H, D), randn(1, T, H, D), randn(1, T, H, D)] for _ in range(4)]
    q, length = randn(1, T, H, D), torch.full((1,), T, device=DEVICE)

    def entries(kept, k, v):
        index = kept.transpose(1, 2).unsqueeze(-1).expand(-1, -1, -1, D)
        return k.gather(1, index), v.gather(1, index)

    method = SnapKV(budget, W)
    ours = lambda q, k, v: entries(select(snapkv_scores(q, k, length, 5), budget).long(), k, v)
    plain = lambda q, k, v: entries(method.forced(method.score(q, k, length), length).topk(budget).indices, k, v)
    calls = lambda f: [lambda s=s: f(*s) for s in sets]
    kept = select(snapkv_scores(*sets[0][:2], length, 5), budget)
    expected = method.forced(method.score(*sets[0][:2], length), length).topk(budget).indices
    other = [set(x) ^ set(y) for x, y in zip(kept[0].tolist(), expected[0].tolist())]
    error = sum(map(len, other)) / (2 * kept.numel())  # scores of bf16 products nearly tie: a few entries differ
    table.line("snapkv compress to 1/16", f"T{T}", calls(ours),
               {"cuDNN prefill": [lambda: dense(q, sets[0][1], sets[0][2], CUDNN)], "eager": calls(plain)},
               n_bytes=T * H * D * 2 + 4 * budget * H * D * 2, goal="3 % of cuDNN, 33x", error=error)
    table.line("  snapkv_scores", f"T{T}", calls(lambda q, k, v: snapkv_scores(q, k, length, 5)), {}, n_bytes=T * H * D * 2)


def bench_dilated(table):
    from triton_ops.dilated import dilated
    for B, T in (8, 4096), (1, 4096):
        n = B * T * H * D * 2
        sets = [[*(randn(B, T, H, D, grad=True) for _ in "qkv"), randn(B, T, H, D)] for _ in range(2)]
        start = torch.zeros(B, dtype=torch.long, device=DEVICE)
        arl = lambda q, k, v: dilated(q, k, v, start, 64, 0, 0)
        cudnn = lambda q, k, v: dense(q, k, v, CUDNN).transpose(1, 2)
        calls = lambda f: [lambda s=s: f(*(x.detach() for x in s[:3])) for s in sets]
        both = lambda f: [lambda s=s: forward_backward(f, s[:3], s[3]) for s in sets]
        one, x32 = [x[:1].detach().requires_grad_() for x in sets[0][:3]], [x[:1].detach().float().requires_grad_() for x in sets[0][:3]]
        exact = lambda q, k, v: Dilated(64, 0, 0).attend_to_shared(q, k, v, torch.arange(T, device=DEVICE)[None])
        ours = lambda q, k, v: dilated(q, k, v, start[:1], 64, 0, 0)
        forward = relative_error([ours(*one)], [exact(*x32)])
        backward = relative_error(forward_backward(ours, one, sets[0][3][:1]), forward_backward(exact, x32, sets[0][3][:1].float()))
        table.line("dilated 64 (ARL) forward", f"B{B} T{T}", calls(arl), {"cuDNN": calls(cudnn)}, n_bytes=4 * n, error=forward)
        table.line("dilated 64 (ARL) fwd+bwd", f"B{B} T{T}", both(arl), {"cuDNN": both(cudnn)}, n_bytes=12 * n,
                   goal="20 % of cuDNN, 5x", error=backward)
    T = 32768
    q, k, v, start = *(randn(1, T, H, D) for _ in "qkv"), torch.zeros(1, dtype=torch.long, device=DEVICE)
    reads = lambda t, key: Dilated(16, 256, 4).pattern(t[:, None], key)
    entries = T / 2 / 16 + 256 - 256 / 16  # of a query, about: each 16th before it, and of the local 256 the others
    error = some_queries(dilated(q, k, v, start, 16, 256, 4), q, k, v, reads)
    table.line("dilated 16, 256, 4 (RAT+)", f"B1 T{T}", [lambda: dilated(q, k, v, start, 16, 256, 4)],
               {"cuDNN": [lambda: dense(q, k, v, CUDNN)]}, flops=4 * H * D * T * entries, n_bytes=4 * T * H * D * 2, error=error)


def bench_block(table):
    """A decoding step's products, in a 7B block and of its head; and what lies between the products of a prompt."""
    from triton_ops.block import add_norm, norm_rotate, products, swiglu, swiglu_products
    C, N, V = H * D, 11008, 100352
    weight = randn(C)
    for B in 1, 4:
        x, wide = randn(B, 1, C), randn(B, 1, N)
        plain_gate = lambda *w: [*(F.linear(x, p) for p in w[:3]), F.linear(F.rms_norm(x, (C,), eps=1e-6), w[3], weight)]
        for name, shapes, ours, plain in (
                ("products q, k, v", [(C, C)] * 3, lambda *w: products(x, w), lambda *w: [F.linear(x, p) for p in w]),
                ("products q, k, v, gate", [(C, C)] * 4, lambda *w: products(x, w, weight, 1e-6), plain_gate),
                ("products out", [(C, C)], lambda w: products(x, [w]), lambda w: [F.linear(x, w)]),
                ("swiglu_products", [(N, C)] * 2, lambda *w: [swiglu_products(x, *w)],
                 lambda gate, up: [F.silu(F.linear(x, gate)) * F.linear(x, up)]),
                ("products down", [(C, N)], lambda w: products(wide, [w]), lambda w: [F.linear(wide, w)]),
                ("products head", [(V, C)], lambda w: products(x, [w]), lambda w: [F.linear(x, w)])):
            n = sum(a * b for a, b in shapes) * 2
            sets = [[randn(*shape) / 64 for shape in shapes] for _ in range(input_sets(2 * n))]
            calls = lambda f: [lambda s=s: f(*s) for s in sets]
            table.line(name, f"B{B}", calls(ours), {"cuBLAS": calls(plain)}, n_bytes=n, error=relative_error(ours(*sets[0]), plain(*sets[0])))

    T = 4096
    angle = torch.randn(1, T, 1, D // 2, device=DEVICE)
    cos, sin = angle.cos(), angle.sin()
    for name, shape, n_inputs, ours, plain in (
            ("add_norm", (C,), 2, lambda x, y: add_norm(x, y, weight, 1e-6), lambda x, y: x + F.rms_norm(y, (C,), weight, 1e-6)),
            ("norm_rotate", (H, D), 1, lambda x: norm_rotate(x, weight, 1e-6, cos, sin), lambda x: norm_and_rotate(x, weight, cos, sin)),
            ("swiglu", (N,), 2, swiglu, lambda gate, up: F.silu(gate) * up)):
        sets = [[randn(1, T, *shape) for _ in range(n_inputs)] for _ in range(8)]
        calls = lambda f: [lambda s=s: f(*s) for s in sets]
        error = relative_error([ours(*(x.clone() for x in sets[0]))], [plain(*sets[0])])  # clones: swiglu writes over one
        table.line(name, f"B1 T{T}", calls(ours), {"compiled": calls(torch.compile(plain)), "eager": calls(plain)},
                   n_bytes=(n_inputs + 1) * sets[0][0].numel() * 2, error=error)


def bench_dense(table):
    """What there is to beat."""
    for T in 4096, 32768:
        q, k, v = (randn(1, T, H, D) for _ in "qkv")
        flash = {"flash": [lambda: dense(q, k, v, FLASH)]}
        table.line("dense prefill (cuDNN)", f"B1 T{T}", [lambda: dense(q, k, v, CUDNN)], flash, flops=2 * T * T * H * D)


SECTIONS = {"dense": bench_dense, "memory": bench_memory, "step": bench_step, "quest": bench_quest, "moba": bench_moba,
            "snapkv": bench_snapkv, "dilated": bench_dilated, "block": bench_block}


def without_gpu():
    """The plain forms at a small shape, so that the command does something everywhere."""
    B, T = 1, 1024
    k, v, gate = (torch.randn(B, T, 4, 64) for _ in range(3))
    q = torch.randn(B, T, 4, 64)
    print(f"no GPU here: plain PyTorch, fp32, B{B} T{T}, 4 heads of 64, {torch.get_num_threads()} threads")
    for name, f in {"memory_scan": lambda: memory_scan(k, v, gate), "dense": lambda: F.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True),
                    "moba 1/8": lambda: MoBA(128, 16).prefill(q, k, v, 0, None),
                    "dilated 64": lambda: Dilated(64, 0, 0).prefill(q, k, v, 0, None)}.items():
        f()
        print(f"{name:16} {statistics.median(milliseconds([f]) for _ in range(5)):8.2f} ms")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0].strip(), allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"bench.py: {message}\n")
    add = parser.add_argument
    add("--only", nargs="+", metavar="PART", help=f"of {', '.join(SECTIONS)}; with --end-to-end of {', '.join(bench_model.PARTS)} "
        "(default: all; without a GPU single)")
    add("--json", metavar="FILE", help="all numbers (default: out/bench.json, out/bench-model.json)")
    add("--end-to-end", action="store_true", help="whole models with random weights: prompts, decoding steps, memory")
    add("--preset", choices=PRESETS, metavar="NAME", help="whole models: their shape (default: olmo2-7b; without a GPU micro)")
    add("--contexts", nargs="+", type=positive, metavar="TOKENS", help="whole models: lengths of prompts (default: 1024 to 65536; without a GPU 2048)")
    add("--tokenizer", metavar="SPEC", help="whole models, table3: as in data.py (default: bytes, whose answers are longer than in tokens)")
    args = parser.parse_args()
    for name in ("preset", "contexts", "tokenizer"):
        if getattr(args, name) and not args.end_to_end:
            parser.error(f"--{name} is of whole models: add --end-to-end")
    allowed = bench_model.PARTS if args.end_to_end else SECTIONS
    for part in args.only or ():
        if part not in allowed:
            parser.error(f"--only {part}: one of {', '.join(allowed)}" + ("" if args.end_to_end else "; the others with --end-to-end"))
    if args.end_to_end:
        parts = args.only or (bench_model.PARTS if ON_GPU else ["single"])
        if not ON_GPU and set(parts) != {"single"}:
            parser.error(f"--only {' '.join(parts)}: these parts need a GPU")
        try:
            return bench_model.run(args.json or "out/bench-model.json", args.preset or ("olmo2-7b" if ON_GPU else "micro"),
                                   sorted(args.contexts or ([1024 * 2**i for i in range(7)] if ON_GPU else [2048])), parts, args.tokenizer or "bytes",
                                   ceilings() if ON_GPU else None)
        except torch.OutOfMemoryError:
            parser.error("the GPU has no room for that: shorter --contexts, or a smaller --preset")
        except (ValueError, OSError, ImportError) as error:
            parser.error(error)
    if not ON_GPU:
        if args.only or args.json:
            parser.error("--only and --json are of the kernels, which need a GPU; here is only --end-to-end, or no flag")
        return without_gpu()
    args.only, args.json = args.only or list(SECTIONS), args.json or "out/bench.json"
    import triton
    torch.manual_seed(0)
    rates = ceilings()
    device = torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}, triton {triton.__version__}, commit {commit()[:12]}; bf16, {H} heads of {D}\n"
          f"ceilings: copy {rates['copy']:,.0f} GB/s, matmul {rates['matmul']:,.0f} TFLOP/s", flush=True)
    table = Table(rates)
    report = {"command": " ".join(["python", *sys.argv]), "device": device, "torch": torch.__version__, "triton": triton.__version__,
              "commit": commit(), "dtype": "bfloat16", "heads": H, "head_width": D, "ceilings": rates, "rows": table.rows}
    try:
        save(report, args.json)  # if it can't be written, that is better known now
        for part in args.only:
            SECTIONS[part](table)
            save(report, args.json)
    except OSError as error:
        parser.error(error)
    print(f"\nresults in {args.json}")


if __name__ == "__main__":
    main()
