"""
How fast the kernels are: each beside its floor, what the hardware allows at best, and its peers.

    floor = max(fewest bytes / copy bandwidth, FLOPs / matmul rate)     both rates from the same run

A line is the median of several replays of a CUDA graph that calls the function many times, over
inputs that together are larger than the L2 cache, so that neither launches from Python nor what is
cached flatter it. Before it is timed, a kernel's result is compared with plain PyTorch's, for some
of the queries where all would be too many; a relative error above 1e-2 ends the run. (Of Quest's
rows with fewer KV heads only the bounds are compared. The tests hold the kernels to more, at small
shapes.)

The peers, in experiments/bench_peers.py, are timed in the same way; those that ask the GPU in
between, which no graph can hold, call by call. Everything is bf16. Most rows are the layer of a 7B
model, 32 heads of 128; others have fewer KV heads, or heads of 64. Selection is always included.

A line that takes at most 4/3 of its floor is marked "near". docs/speed.md has what came out.

    python bench.py                         everything; a table, and out/bench.json
    python bench.py --only memory quest     some of it
    python bench.py --table FILE.json       a file's rows as a table of Markdown
    python bench.py --end-to-end            whole models instead: experiments/bench_model.py

Without a GPU it times plain PyTorch at a small shape: that says nothing about the kernels.
"""
import argparse
import math
import statistics
import time
from typing import NamedTuple

import torch
from torch.nn import functional as F

from experiments import bench_model
from experiments.bench_peers import (
    CUDNN, cudnn, dense, entries, fla_memory, fla_moba, flash_2, flash_moba, hgrn_inputs, infllm,
    norm_and_rotate, official_memory, plain_quest, plain_step, warp_inputs, warp_scan)
from infra.cli import command, made_by
from infra.files import load, save
from memory import memory_scan
from sparse import Dilated, MoBA, SnapKV, attend


class Heads(NamedTuple):
    H: int   # query heads
    KV: int  # key/value heads
    D: int   # their width

    def __str__(self):
        return f"{self.H} on {self.KV}, {self.D}"


LARGE = Heads(32, 32, 128)                    # the layer of a 7B model
GQA = Heads(32, 8, 128), Heads(32, 2, 128)
NARROW = Heads(32, 32, 64), Heads(9, 3, 64)   # the second is SmolLM2-135M's
NEAR = 0.75                                   # of the floor
DTYPE = torch.bfloat16
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"


# ---------------------------------------------------------------- timing

class Ungraphed(list):
    """Calls that ask the GPU for a number in between, so that no graph can hold them."""


def milliseconds(functions):
    """Median time of one call. functions: the same work on different inputs, in turn."""
    def each():
        for f in functions:
            f()

    if not ON_GPU:
        started = time.time()
        each()
        return (time.time() - started) * 1e3 / len(functions)

    if isinstance(functions, Ungraphed):
        times = [elapsed(each) for _ in range(5)]
        return statistics.median(times[2:]) / len(functions)

    # Calls one by one: the first round compiles, tunes and allocates, the second says how many of
    # them make a replay of some 15 ms.
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        elapsed(each)
        rounds = max(1, round(15 / elapsed(each)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(rounds):
            each()
    times = [elapsed(graph.replay) for _ in range(8)]
    return statistics.median(times[1:]) / (rounds * len(functions))


def elapsed(run):
    """Milliseconds of run() on the GPU."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in "se")
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def ceilings():
    """GB/s of a large copy, TFLOP/s of a large product of matrices."""
    x = torch.randn(2**29, device=DEVICE, dtype=DTYPE)
    y, a = torch.empty_like(x), torch.randn(8192, 8192, device=DEVICE, dtype=DTYPE)
    return {"copy": 2 * x.nbytes / milliseconds([lambda: torch.neg(x, out=y)]) / 1e6,
            "matmul": 2 * len(a)**3 / milliseconds([lambda: a @ a]) / 1e9}


class Table:
    """Rows as they are measured."""

    def __init__(self, rates):
        self.rates, self.rows = rates, []

    def line(
        self, kernel, shape,  # text
        functions,            # our kernel's, on different inputs
        peers={},             # {name: functions, or what to say instead of a time}
        n_bytes=0, flops=0,   # the fewest possible
        goal=None,            # text
        error=None,           # relative, of our result; None: part of a line that is checked
    ):
        if error is not None and not error <= 1e-2:  # NaN too
            raise SystemExit(f"bench.py: {kernel} {shape}: relative error {error:.1e} against "
                             "plain PyTorch; not timed")
        ms = milliseconds(functions)
        by_bytes = n_bytes / self.rates["copy"] / 1e6
        floor = max(by_bytes, flops / self.rates["matmul"] / 1e9)
        row = {"kernel": kernel, "shape": shape, "ms": ms, "floor_ms": floor, "goal": goal,
               "error": error, "GB/s": n_bytes / ms / 1e6, "TFLOP/s": flops / ms / 1e9,
               "peers": {name: time_peer(peer) for name, peer in peers.items()}}
        self.rows.append(row)

        rate = f"{row['TFLOP/s']:7,.0f} TFLOP/s"
        if by_bytes == floor:
            rate = f"{row['GB/s']:7,.0f} GB/s   "
        notes = [f"{name} {beside(t, ms)}" for name, t in row["peers"].items()]
        notes += [f"goal {goal}"] if goal else []
        print(f"{kernel:28} {shape:32} {ms:8.4f} ms {rate} {of_floor(row):9} of floor   "
              + "   ".join(notes), flush=True)
        torch.cuda.empty_cache()

    def forward_and_backward(self, kernel, shape, sets, ours, plain, peers, n_bytes, goals,
                             turned={}, different={}):
        """
        Two lines: forward, and with gradients. sets: three inputs and as many gradients as there
        are outputs; n_bytes, goals: of either line; turned: {name: (peer, sets)} of peers in a
        layout of their own; different: {name: what to say instead of a time}, as `unlike` gives it.
        Checked in the first row of the batch.
        """
        inputs, gradients = sets[0][:3], sets[0][3:]
        forward = lambda f, sets: on_each(lambda *s: f(*(x.detach() for x in s[:3])), sets)
        both = lambda f, sets: on_each(lambda *s: forward_backward(f, s[:3], s[3:]), sets)
        peers = {name: (peer, sets) for name, peer in peers.items()} | turned
        for what, calls, size, goal, error in zip(
                ("forward", "fwd+bwd"), (forward, both), n_bytes, goals,
                errors(ours, plain, inputs, gradients)):
            self.line(f"{kernel} {what}", shape, calls(ours, sets),
                      {name: different.get(name) or calls(*peer) for name, peer in peers.items()},
                      size, 0, goal, error)


def time_peer(functions):
    """Milliseconds, or why there are none: nothing that a peer raises is a reason to stop."""
    if isinstance(functions, str):
        return functions
    try:
        return milliseconds(functions)
    except ModuleNotFoundError as error:
        return f"not installed: {error.name}"
    except Exception as error:  # code of others
        return "failed: " + f"{type(error).__name__}: {error}".splitlines()[0][:80]


def of_floor(row):
    share = row["floor_ms"] / row["ms"]
    return f"{share:4.0%}{' near' if share >= NEAR else ''}"


def beside(peer, ms):
    return f"{peer:.3f} ({peer / ms:.2f}x)" if isinstance(peer, (int, float)) else peer


# ---------------------------------------------------------------- inputs and errors

def randn(*shape, grad=False):
    return torch.randn(*shape, device=DEVICE, dtype=DTYPE, requires_grad=grad)


def n_bytes(*shape):
    return math.prod(shape) * DTYPE.itemsize


def input_sets(size, touched=None):
    """
    How many sets of inputs of `size` bytes, of which a call reads those `touched`: enough to leave
    L2 cold, within 8 GB.
    """
    wanted = 8 if touched is None else round(4e8 // touched)
    return max(1, min(wanted, int(8e9 // size)))


def on_each(f, sets):
    """A call of f for each set of inputs."""
    return [lambda s=s: f(*s) for s in sets]


def forward_backward(f, inputs, gradients):
    return torch.autograd.grad(f(*inputs), inputs, gradients)


def relative_error(ours, exact):
    """Root mean square of the difference over that of `exact`, the worst of several tensors."""
    return max(((x.float() - y.float()).norm() / y.float().norm()).item()
               for x, y in zip(ours, exact))


def errors(ours, plain, inputs, gradients):
    """
    Relative error of our outputs and of our gradients in the first row of the batch, against plain
    PyTorch in fp32.
    """
    x = [x.detach().requires_grad_() for x in inputs]
    x32 = [x[:1].detach().float().requires_grad_() for x in inputs]
    exact = forward_backward(plain, x32, [dy[:1].float() for dy in gradients])
    backward = relative_error([dx[:1] for dx in forward_backward(ours, x, gradients)], exact)
    with torch.no_grad():
        return relative_error([y[:1] for y in ours(*x)], plain(*x32)), backward


def some_queries(y, q, k, v, reads):
    """
    Relative error of y (B, T, H, D), in its first row, at 32 of the queries q. reads(t (32,), key
    (T,)) -> (32, T), or (H, 32, T): whether query t reads key.
    """
    key = torch.arange(k.shape[1], device=DEVICE)
    t = torch.randint(len(key), (32,), device=DEVICE)
    G = q.shape[2] // k.shape[2]
    k, v = (x[0].float().repeat_interleave(G, dim=1) for x in (k, v))
    scores = torch.einsum("thd,khd->htk", q[0, t].float(), k) / math.sqrt(q.shape[3])
    keep = reads(t, key) & (key <= t[:, None])
    p = scores.masked_fill(~keep, -math.inf).softmax(-1)
    return relative_error([y[0, t]], [torch.einsum("htk,khd->thd", p, v)])


# ---------------------------------------------------------------- the memory, and a step around it

def bench_memory(table):
    from kernels import memory_scan as kernel
    for heads, B, T, goals in (
            (LARGE, 8, 4096, ("80 %", "65 %")), (LARGE, 1, 4096, ("55 %", "48 %")),
            (LARGE, 1, 32768, ("75 %", "65 %")), (GQA[0], 8, 4096, (None, None)),
            (NARROW[1], 8, 4096, (None, None)), (NARROW[1], 1, 4096, (None, None))):
        torch.compiler.reset()  # or the next shapes are compiled as one that varies, and fail
        inputs = torch.compile(hgrn_inputs, dynamic=False)
        fla = lambda *x: fla_memory(*x, inputs)
        peers = {"official, compiled": torch.compile(official_memory), "fla": fla}
        size = B, T, heads.KV, heads.D
        n = n_bytes(*size)
        sets = [[randn(*size) for _ in range(5)] for _ in range(input_sets(12 * n, 5 * n))]
        for k, v, gate, *_ in sets:
            gate.mul_(2).add_(2)  # memories of a few to hundreds of tokens
            for x in k, v, gate:
                x.requires_grad_()
        turned = [[*warp_inputs(*s[:3]), *warp_inputs(*s[3:], s[2])[1:]] for s in sets]
        ours = lambda *x: kernel(*x)[:2]
        ys = [y.detach() for y in ours(*sets[0][:3])]
        as_theirs = [y.flatten(2).transpose(1, 2) for y in ys]
        different = {"fla": unlike(fla, sets[0][:3], ys, 0.02),
                     "accelerated-scan": unlike(warp_scan, turned[0][:3], as_theirs, 0.02)}
        table.forward_and_backward(
            "memory_scan", f"B{B} T{T}  {heads.KV} of {heads.D}", sets, ours,
            lambda *x: memory_scan(*x)[:2], peers, (5 * n, 13 * n), goals,
            {"accelerated-scan": (warp_scan, turned)}, different)


def bench_step(table):
    """Its inputs are in L2, as where they have just been computed."""
    from triton_ops.block import decode_step
    (H, _, D), slot, block_size = LARGE, 3999, 64
    for B in 1, 8:
        sets = [[*(randn(B, 1, H, D) for _ in range(4)), torch.randn(2, B, H, D, device=DEVICE),
                 *(randn(B, 4096, H, D) for _ in "kv")] for _ in range(8)]
        weight, angle = randn(H * D), torch.randn(1, 1, 1, D // 2, device=DEVICE)
        cos, sin, used = angle.cos(), angle.sin(), torch.full((B,), slot + 1, device=DEVICE)
        bounds = [randn(B, 4096 // block_size, H, D) for _ in ("low", "high")]
        ours = lambda q, k, v, gate, state, *cache: decode_step(
            q, k, v, gate, weight, weight, 1e-6, cos, sin, state, *cache, *bounds, block_size, used,
            None, None)
        plain = lambda *s: plain_step(*s, *bounds, weight, cos, sin, slot, block_size)

        # both update state, caches and bounds in place: they start from the same ones
        before, copy = [x.clone() for x in bounds], [x.clone() for x in sets[0]]
        expected = [plain(*copy), *copy[4:], *(x.clone() for x in bounds)]
        for x, old in zip(bounds, before):
            x.copy_(old)
        error = relative_error([ours(*sets[0]), *sets[0][4:], *bounds], expected)
        peers = {"compiled": on_each(torch.compile(plain), sets), "eager": on_each(plain, sets)}
        # q, k, v, gate in; the state in and out; q, k, v out; the bounds in and out
        table.line("decode_step", f"B{B}", on_each(ours, sets), peers, error=error,
                   n_bytes=B * H * D * (4 * 2 + 2 * 8 + 3 * 2 + 4 * 2))


# ---------------------------------------------------------------- the methods

def bench_quest(table):
    from triton_ops.quest import block_bounds, quest_attend, quest_scores
    from triton_ops.topk import select
    block_size, compiled = 64, torch.compile(plain_quest, dynamic=False)
    for heads, B, T, goal in (
            (LARGE, 8, 32768, "8.5x cuDNN, 2.1x compiled"), (LARGE, 1, 131072, "8x cuDNN"),
            (LARGE, 1, 32768, "5x cuDNN"), (LARGE, 16, 4096, None), (LARGE, 1, 4096, None),
            (GQA[0], 8, 32768, None), (GQA[0], 1, 32768, None), (NARROW[1], 8, 32768, None),
            (NARROW[1], 1, 4096, None)):
        H, KV, D = heads
        S, n, shape = T // block_size // 16, n_bytes(B, T, KV, D), f"B{B} T{T}  {heads}"
        used = torch.full((B,), T, device=DEVICE)
        sets = []
        n_read = 2 * n / 16 + 2 * n / block_size  # the chosen blocks and all bounds
        for _ in range(input_sets(2 * n, n_read)):
            q, k, v = randn(B, 1, H, D), randn(B, T, KV, D), randn(B, T, KV, D)
            sets.append([q, k, v, *block_bounds(k, used, block_size)])

        score = lambda q, k, v, low, high: quest_scores(q, low, high, used, block_size, True, True)
        read = lambda q, k, v, chosen: quest_attend(q, k, v, chosen, used, block_size)[0]
        ours = lambda q, k, v, low, high: read(q, k, v, select(score(q, k, v, low, high), S))
        full = lambda q, k, v, *_: dense(q, k, v, CUDNN, causal=False)
        peers = {"cuDNN": on_each(full, sets)}
        q, k, v, *bounds = sets[0]
        blocks = k.unflatten(1, (-1, block_size))
        error = relative_error(bounds, [blocks.amin(2), blocks.amax(2)])
        if H == KV:  # what the peer covers; tests/test_kernels.py checks the step of the others
            peers["compiled Quest"] = on_each(lambda *s: compiled(*s, S, block_size), sets)
            error = max(error, relative_error([ours(*sets[0])],
                                              [plain_quest(*sets[0], S, block_size)]))
        table.line("quest step 1/16", shape, on_each(ours, sets), peers,
                   n_bytes=n_read, goal=goal, error=error)
        if heads != LARGE:
            continue

        # its parts, each on what the one before it gives
        scores = [[score(*s)] for s in sets]
        chosen = [[*s[:3], select(x, S)] for s, (x,) in zip(sets, scores)]
        table.line("  quest_scores", shape, on_each(score, sets), n_bytes=2 * n / block_size)
        table.line("  select", shape, on_each(lambda x: select(x, S), scores),
                   n_bytes=scores[0][0].nbytes)
        table.line("  quest_attend", shape, on_each(read, chosen), n_bytes=2 * n / 16)
        if T > 4096:
            bounds = lambda q, k, *_: block_bounds(k, used, block_size)
            table.line("  block_bounds (once)", shape, on_each(bounds, sets), n_bytes=n)


def moba_error(q, k, v, chosen, y, method):
    """
    Relative error of y at some queries, given `chosen`; or, if larger, the share of queries that
    chose otherwise than plain MoBA.
    """
    (KV, T, S), G = chosen.shape[1:], q.shape[2] // k.shape[2]
    N = T // method.block_size
    t = torch.randint(T, (256,), device=DEVICE)
    best = method.forced(method.score(q[:1, t], k[:1]), t[None]).topk(S)          # (1, KV, 256, S)
    plain = best.indices.where(best.values > -math.inf, -1).sort(-1).values
    agree = (chosen[:1, :, t].sort(-1).values == plain).all(-1).float().mean().item()

    def reads(t, key):
        read = torch.zeros(KV, len(t), N + 1, dtype=torch.bool, device=DEVICE)  # one for the -1s
        read = read.scatter(-1, chosen[0, :, t].long() % (N + 1), True)
        return read[..., key // method.block_size].repeat_interleave(G, dim=0)

    return max(some_queries(y, q, k, v, reads), 1 - agree)  # near-ties may swap


def moba_entries(T, block_size, S):
    """Entries that all T queries read: their own block up to themselves, up to S - 1 others."""
    others = sum(min(S - 1, n) for n in range(T // block_size)) * block_size
    own = T // block_size * (block_size + 1) / 2
    return (others + own) * block_size


def unlike(peer, inputs, ys, most):
    """
    What to say of a peer whose results are not ours, None if they are. One that fails says so where
    it is timed.
    """
    try:
        error = relative_error(peer(*inputs), ys)
    except Exception:  # code of others
        return None
    return None if error <= most else f"computes something else: relative error {error:.1e}"


def moba_gradient_error(heads, block_size, ours):
    """
    Relative error of ours(q, k, v, S) and its gradients in 4,096 tokens of one group, or of four
    heads, against dense attention under a mask. ours -> y, chosen
    """
    H, KV, D = heads
    G, T, S = H // KV, 4096, max(2, 512 // block_size)
    KV = 4 if G == 1 else 1
    *inputs, dy = (randn(1, T, n, D) for n in (G * KV, KV, KV, G * KV))
    _, chosen = ours(*inputs, S)
    keep = (chosen.unsqueeze(-1) == torch.arange(T // block_size, device=DEVICE)).any(3)
    keep = keep.repeat_interleave(block_size, dim=-1)                             # (1, KV, T, T)
    keep = keep & torch.ones(T, T, dtype=torch.bool, device=DEVICE).tril()
    keep = keep.repeat_interleave(G, dim=1)
    return max(errors(lambda *x: [ours(*x, S)[0]], lambda *x: [attend(*x, keep)], inputs, [dy]))


MOBA = [  # heads, B, T, block_size, S, goal
    (LARGE, 1, 32768, 128, 32, "1.8x cuDNN"), (LARGE, 1, 65536, 128, 32, "2x cuDNN"),
    (LARGE, 1, 65536, 512, 8, "3.5x cuDNN"), (LARGE, 1, 65536, 128, 8, "5x cuDNN"),
    (LARGE, 8, 4096, 128, 8, None), (GQA[0], 1, 32768, 128, 32, None),
    (GQA[1], 1, 32768, 64, 64, None), (GQA[1], 1, 65536, 64, 64, None),  # InfLLM-v2's own
    *((heads, 1, 32768, 128, 32, None) for heads in NARROW), (NARROW[1], 8, 8192, 64, 16, None)]


def bench_moba(table):
    """Prefill, and with gradients; routing included, but for the peer that has none."""
    from triton_ops.moba import moba_attend
    from triton_ops.moba_route import moba_route
    for heads, B, T, block_size, S, goal in MOBA:
        H, KV, D = heads
        start = torch.zeros(B, dtype=torch.long, device=DEVICE)

        def route(q, k, S=S, keep_first=True):
            return moba_route(q.detach(), k.detach(), start[:len(q)], block_size, S, keep_first)

        def ours(q, k, v, S=S):
            chosen = route(q, k, S)
            return moba_attend(q, k, v, chosen, start[:len(q)], block_size), chosen

        inputs, dy = [randn(B, T, n, D, grad=True) for n in (H, KV, KV)], randn(B, T, H, D)
        q, k, v = plain = [x.detach() for x in inputs]
        y, chosen = ours(*plain)
        in_graph = {"cuDNN": cudnn, "flash 2": flash_2}
        others = {"FlashMoBA": lambda *x: flash_moba(*x, block_size, S),
                  "fla": lambda *x: fla_moba(*x, block_size, S)}
        different = {}
        if H == KV:  # with fewer KV heads ours choose for a group together; the first block is ours
            own = moba_attend(*plain, route(q, k, keep_first=False), start, block_size)
            # scores that nearly tie choose other blocks; another method's error is above 1
            different = {name: unlike(lambda *x: [f(*x)], plain, [own], 0.3)
                         for name, f in others.items()}
        if block_size == 64 and H == 16 * KV and B == 1:
            name = "InfLLM-v2, given the blocks"
            others[name] = lambda *x: infllm(*x, chosen)
            different[name] = unlike(lambda *x: [others[name](*x)], plain, [y], 0.01)

        def peers(call):
            return {name: [call(f)] for name, f in in_graph.items()} | {
                name: different.get(name) or Ungraphed([call(f)]) for name, f in others.items()}

        shape, entries = f"B{B} T{T}  {heads}  {block_size} x {S}", moba_entries(T, block_size, S)
        flops, method = 4 * B * entries * H * D, MoBA(S * block_size, block_size)
        table.line("moba prefill", shape, [lambda: ours(*plain)],
                   peers(lambda f: lambda: f(*plain)), flops=flops, goal=goal,
                   error=moba_error(*plain, chosen, y, method))
        table.line("  moba_route", shape, [lambda: route(q, k)],
                   flops=B * T * (T / block_size) * KV * D)
        table.line("  moba_attend", shape,
                   [lambda: moba_attend(*plain, chosen, start, block_size)], flops=flops)
        table.line("moba fwd+bwd", shape,
                   [lambda: forward_backward(lambda *x: ours(*x)[0], inputs, [dy])],
                   peers(lambda f: lambda: forward_backward(f, inputs, dy)),
                   flops=3.5 * flops,  # five products backward, where forward has two
                   error=moba_gradient_error(heads, block_size, ours))


def bench_snapkv(table):
    from triton_ops.snapkv import snapkv_scores
    from triton_ops.topk import select
    (H, _, D), T, W, budget = LARGE, 32768, 64, 2048
    sets = [[randn(1, W, H, D), randn(1, T, H, D), randn(1, T, H, D)] for _ in range(4)]
    q, length, method = randn(1, T, H, D), torch.full((1,), T, device=DEVICE), SnapKV(budget, W)
    score = lambda q, k, v: snapkv_scores(q, k, length, 5)
    keep = lambda q, k, v: select(score(q, k, v), budget).long()
    plain = lambda q, k, v: method.forced(method.score(q, k, length), length).topk(budget).indices
    compress = lambda keep: on_each(lambda q, k, v: entries(keep(q, k, v), k, v), sets)

    # scores of bf16 products nearly tie: a few entries differ
    kept, expected = keep(*sets[0])[0].tolist(), plain(*sets[0])[0].tolist()
    error = sum(len(set(x) ^ set(y)) for x, y in zip(kept, expected)) / (2 * H * budget)
    table.line("snapkv compress to 1/16", f"T{T}", compress(keep),
               {"cuDNN prefill": [lambda: cudnn(q, *sets[0][1:])], "eager": compress(plain)},
               n_bytes=n_bytes(T + 4 * budget, H, D), goal="3 % of cuDNN, 33x", error=error)
    table.line("  snapkv_scores", f"T{T}", on_each(score, sets), n_bytes=n_bytes(T, H, D))


def bench_dilated(table):
    from triton_ops.dilated import dilated
    start = torch.zeros(8, dtype=torch.long, device=DEVICE)
    for heads, B, goal in ((LARGE, 8, "20 % of cuDNN, 5x"), (LARGE, 1, "20 % of cuDNN, 5x"),
                           (NARROW[0], 8, None), (GQA[0], 8, None), (NARROW[1], 8, None)):
        H, KV, D = heads
        T, shape = 4096, f"B{B} T4096  {heads}"
        of_q, of_k = n_bytes(B, T, H, D), n_bytes(B, T, KV, D)
        size, slot = (2 * (of_q + of_k), 6 * (of_q + of_k)), torch.arange(T, device=DEVICE)[None]
        sets = [[*(randn(B, T, n, D, grad=True) for n in (H, KV, KV)), randn(B, T, H, D)]
                for _ in range(2)]
        peers = {"cuDNN": lambda *x: [cudnn(*x)]}
        table.forward_and_backward(
            "dilated 64 (ARL)", shape, sets,
            lambda q, k, v: [dilated(q, k, v, start[:B], 64, 0, 0)],
            lambda q, k, v: [Dilated(64, 0, 0).attend_to_shared(q, k, v, slot)],
            peers, size, (None, goal))
        keep = Dilated(None, 64, 0).pattern(slot.mT, slot)
        table.forward_and_backward(
            "dilated window of 64", shape, sets,
            lambda q, k, v: [dilated(q, k, v, start[:B], None, 64, 0)],
            lambda q, k, v: [attend(q, k, v, keep)], peers, size, (None, goal))

    T = 32768
    # of a query, about: each 16th entry before it, and of the local 256 the others
    n_entries = T / 2 / 16 + 256 - 256 / 16
    reads = lambda t, key: Dilated(16, 256, 4).pattern(t[:, None], key)
    for heads in LARGE, NARROW[0], GQA[0], NARROW[1]:
        H, KV, D = heads
        q, k, v = (randn(1, T, n, D) for n in (H, KV, KV))
        ratplus = lambda: dilated(q, k, v, start[:1], 16, 256, 4)
        table.line("dilated 16, 256, 4 (RAT+)", f"B1 T{T}  {heads}", [ratplus],
                   {"cuDNN": [lambda: cudnn(q, k, v)]}, 2 * n_bytes(T, H + KV, D),
                   4 * H * D * T * n_entries, error=some_queries(ratplus(), q, k, v, reads))

    # A decoding step. What it reads, of k and of v: the last entry of each chunk, the local ones.
    for heads, B, T in (LARGE, 1, 131072), (GQA[0], 1, 131072), (GQA[0], 8, 32768):
        H, KV, D = heads
        n_read = 2 * n_bytes(B, T // 16 + 256 - 256 // 16 + 4, KV, D)
        sets = [[randn(B, 1, H, D), randn(B, T, KV, D), randn(B, T, KV, D)]
                for _ in range(input_sets(n_bytes(2, B, T, KV, D), n_read))]
        last = torch.full((B,), T - 1, device=DEVICE)
        step = lambda q, k, v: dilated(q, k, v, last, 16, 256, 4)
        keep = Dilated(16, 256, 4).pattern(last[:1, None], torch.arange(T, device=DEVICE))
        error = relative_error([step(*sets[0])], [attend(*sets[0], keep)])
        table.line("dilated step (RAT+)", f"B{B} T{T}  {heads}", on_each(step, sets),
                   {"cuDNN": on_each(lambda *x: dense(*x, CUDNN, causal=False), sets)},
                   n_bytes=n_read, error=error)


# ---------------------------------------------------------------- the rest of a block

def bench_block(table):
    """A decoding step's products, in a 7B block and of its head; then a prompt's other kernels."""
    from triton_ops.block import add_norm, norm_rotate, products, swiglu, swiglu_products
    H, _, D = LARGE
    C, N, V, T = H * D, 11008, 100352, 4096
    weight, angle = randn(C), torch.randn(1, T, 1, D // 2, device=DEVICE)
    cos, sin = angle.cos(), angle.sin()
    for B in 1, 4:
        x, wide = randn(B, 1, C), randn(B, 1, N)
        few, many = lambda *w: products(x, w), lambda *w: [F.linear(x, p) for p in w]
        norm = lambda *weight: F.rms_norm(x, (C,), *weight, eps=1e-6)
        for name, shapes, ours, plain in (
                ("products q, k, v", [(C, C)] * 3, few, many),
                ("products q, k, v, gate", [(C, C)] * 4, lambda *w: products(x, w, [weight], 1e-6),
                 lambda *w: [*many(*w[:3]), F.linear(norm(), w[3], weight)]),
                ("norm, then q, k, v", [(C, C)] * 3, lambda *w: products(x, w, (), 1e-6, weight),
                 lambda *w: [F.linear(y, p) for y in [norm(weight)] for p in w]),
                ("products out", [(C, C)], few, many),
                ("out, then the sum", [(C, C)], lambda w: products(x, [w], onto=x),
                 lambda w: [x + F.linear(x, w)]),
                ("swiglu_products", [(N, C)] * 2, lambda *w: [swiglu_products(x, *w)],
                 lambda gate, up: [F.silu(F.linear(x, gate)) * F.linear(x, up)]),
                ("products down", [(C, N)], lambda w: products(wide, [w]),
                 lambda w: [F.linear(wide, w)]),
                ("products head", [(V, C)], few, many)):
            n = sum(n_bytes(*shape) for shape in shapes)
            sets = [[randn(*shape) / 64 for shape in shapes] for _ in range(input_sets(2 * n))]
            table.line(name, f"B{B}", on_each(ours, sets), {"cuBLAS": on_each(plain, sets)}, n,
                       error=relative_error(ours(*sets[0]), plain(*sets[0])))

    for name, shapes, ours, plain in (
            ("add_norm", [(C,)] * 2, lambda x, y: [add_norm(x, y, weight, 1e-6)],
             lambda x, y: [x + F.rms_norm(y, (C,), weight, 1e-6)]),
            ("norm_rotate", [(H, D)] * 2,
             lambda *qk: [*norm_rotate(*qk, weight, weight, 1e-6, cos, sin)],
             lambda *qk: [norm_and_rotate(x, weight, cos, sin) for x in qk]),
            ("swiglu", [(N,)] * 2, lambda *x: [swiglu(*x)],
             lambda gate, up: [F.silu(gate) * up])):
        sets = [[randn(1, T, *shape) for shape in shapes] for _ in range(8)]
        # clones: swiglu writes over one of them
        outs, exact = ours(*(x.clone() for x in sets[0])), plain(*sets[0])
        peers = {"compiled": on_each(torch.compile(plain), sets), "eager": on_each(plain, sets)}
        table.line(name, f"B1 T{T}", on_each(ours, sets), peers,
                   n_bytes=sum(x.nbytes for x in (*sets[0], *outs)),
                   error=relative_error(outs, exact))


def bench_dense(table):
    """What there is to beat."""
    for heads, B, T in ((LARGE, 1, 4096), (LARGE, 1, 32768), (LARGE, 8, 4096), (GQA[0], 1, 32768),
                        (NARROW[0], 1, 32768), (NARROW[1], 1, 32768)):
        H, KV, D = heads
        q, k, v = (randn(B, T, n, D) for n in (H, KV, KV))
        table.line("dense prefill (cuDNN)", f"B{B} T{T}  {heads}", [lambda: cudnn(q, k, v)],
                   {"flash 2": [lambda: flash_2(q, k, v)]}, flops=2 * B * T * T * H * D)


# ---------------------------------------------------------------- the command

SECTIONS = {"dense": bench_dense, "memory": bench_memory, "step": bench_step,
            "quest": bench_quest, "moba": bench_moba, "snapkv": bench_snapkv,
            "dilated": bench_dilated, "block": bench_block}


def with_gpu(parts, path):
    import triton
    torch.manual_seed(0)
    rates = ceilings()
    table = Table(rates)
    report = made_by(None, "bench.py", DEVICE) | {
        "triton": triton.__version__, "dtype": "bfloat16", "ceilings": rates, "rows": table.rows}
    print(f"{report['device']}, torch {torch.__version__}, triton {triton.__version__}, "
          f"commit {report['commit'][:12]}; bf16; shapes: query heads on KV heads, their width\n"
          f"ceilings: copy {rates['copy']:,.0f} GB/s, matmul {rates['matmul']:,.0f} TFLOP/s",
          flush=True)
    save(report, path)  # if it can't be written, that is better known now
    for part in parts:
        SECTIONS[part](table)
        save(report, path)
    print(f"\nresults in {path}")


def as_markdown(path):
    """A file's rows as a table: the peers' times with how many times ours that is."""
    remedy = "give a file that bench.py --json wrote"
    report = load(path, "device", "commit", "ceilings", "rows", remedy=remedy)
    try:
        copy, matmul = report["ceilings"]["copy"], report["ceilings"]["matmul"]
        lines = [f"{report['device']}, commit {report['commit'][:7]}: copy {copy:,.0f} GB/s, "
                 f"matmul {matmul:,.0f} TFLOP/s", "",
                 "| kernel | shape | ms | of the floor | peers, ms |", "|---|---|---|---|---|"]
        for row in report["rows"]:
            peers = (f"{name} {beside(t, row['ms'])}" for name, t in row["peers"].items())
            lines.append(f"| {row['kernel'].strip()} | {row['shape']} | {row['ms']:.3g} | "
                         f"{of_floor(row).strip()} | {', '.join(peers)} |")
    except (KeyError, TypeError, AttributeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(
            f"{path} is damaged, or not of bench.py ({error!r:.80}): {remedy}") from None
    print("\n".join(lines))


def without_gpu():
    """The plain forms at a small shape, so that the command does something everywhere."""
    B, T = 1, 1024
    q, k, v, gate = (torch.randn(B, T, 4, 64) for _ in range(4))
    forms = {"memory_scan": lambda: memory_scan(k, v, gate),
             "dense": lambda: attend(q, k, v, causal=True),
             "moba 1/8": lambda: MoBA(128, 16).prefill(q, k, v, 0, None),
             "dilated 64": lambda: Dilated(64, 0, 0).prefill(q, k, v, 0, None)}
    print(f"no GPU here: plain PyTorch, fp32, B{B} T{T}, 4 heads of 64, "
          f"{torch.get_num_threads()} threads")
    for name, f in forms.items():
        f()
        print(f"{name:16} {statistics.median(milliseconds([f]) for _ in range(5)):8.2f} ms")


def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0].strip(),
                                     allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"bench.py: {message}\n")
    parser.add_argument("--only", nargs="+", metavar="PART", help=(
        f"of {', '.join(SECTIONS)}; with --end-to-end of {', '.join(bench_model.PARTS)} "
        "(default: all; without a GPU single)"))
    parser.add_argument("--json", metavar="FILE", help=(
        "all numbers (default: out/bench.json, out/bench-model.json)"))
    parser.add_argument("--table", metavar="FILE", help="print the rows of such a file, and end")
    parser.add_argument("--end-to-end", action="store_true", help=(
        "whole models with random weights: prompts, decoding steps, memory"))
    of_models = bench_model.add_flags(parser)
    args = parser.parse_args()

    if args.table is not None and (args.only or args.json or args.end_to_end):
        parser.error("--table prints a file and times nothing: leave the other flags out")
    allowed, elsewhere = SECTIONS, "; the others with --end-to-end"
    if args.end_to_end:
        allowed, elsewhere = bench_model.PARTS, ""
    for name in of_models:
        if getattr(args, name) and not args.end_to_end:
            parser.error(f"--{name} is of whole models: add --end-to-end")
    for part in args.only or ():
        if part not in allowed:
            parser.error(f"--only {part}: one of {', '.join(allowed)}{elsewhere}")
    if not (ON_GPU or args.end_to_end) and (args.only or args.json):
        parser.error("--only and --json are of the kernels, which need a GPU; here is only "
                     "--end-to-end, or no flag")
    return args


def main():
    args = parse()
    if args.table is not None:
        as_markdown(args.table)
    elif args.end_to_end:
        bench_model.run(args, ceilings() if ON_GPU else None)
    elif ON_GPU:
        with_gpu(args.only or list(SECTIONS), args.json or "out/bench.json")
    else:
        without_gpu()


if __name__ == "__main__":
    command("bench.py", main)
