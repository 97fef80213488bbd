"""
Every kernel on a thousand random shapes: is it as good as plain PyTorch on each, and the same bits each time?

    python tests/stress.py --jobs 16 --json results/stress-h100.json       1,000 cases of each kernel, a table, and the file
    python tests/stress.py --only moba_attend --index 417                  one case again, as a failure names it
    python tests/stress.py --sanitize --jobs 8 --json results/stress-h100.json    adds what compute-sanitizer finds

A case is a function of (seed, kernel, index). The index chooses one of the kernel's settings, which are what Triton compiles
for: widths, blocks, dtypes; sizes, lengths, strides and values are drawn. Each case is held to this:

    as good       the house rule, conftest.assert_as_good: at most twice as far from fp64 as PyTorch in the kernel's dtype, plus
                  a floor. "worst" is the largest error as a share of what was allowed. What selects must select what the
                  reference does, near-ties apart; what copies must be equal. Outputs start as NaN, caches end in NaN
    same bits     a second run with the first one's outputs still there, and a third beside other work, give the first's bits

A failure is one line, and the run goes on. Triton compiles for about a thousand combinations, which is most of the time: on a GPU
--jobs N shares the settings out to N processes on the one GPU.

With --sanitize two tools of compute-sanitizer watch small shapes (that is --checked: nothing is compared): memcheck, reads
and writes outside an allocation, where each tensor is one of its own; racecheck, hazards in shared memory. Without a GPU
everything but these runs under Triton's interpreter, at smaller sizes. Not collected by pytest; read the tests first.
"""
import argparse
import math
import os
import random
import re
import shlex
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

CHECKED = "--checked" in sys.argv
if CHECKED:
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # read when torch is imported
from conftest import DEVICE, LIMIT, error  # noqa: E402  before the kernels: it makes the interpreter ready

import torch  # noqa: E402
import triton  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from triton_ops import backend  # noqa: E402
import kernels  # noqa: E402
from triton_ops import block  # noqa: E402
from triton_ops import dilated as patterns  # noqa: E402
from triton_ops import moba  # noqa: E402
from triton_ops import moba_route as routing  # noqa: E402
from triton_ops import quest  # noqa: E402
from triton_ops import snapkv  # noqa: E402
from triton_ops import topk  # noqa: E402
import test_kernels  # noqa: E402
import test_kernels_dilated  # noqa: E402
import test_kernels_moba  # noqa: E402
from infra.files import load, save  # noqa: E402
from infra.cli import commit, device_name, natural, positive  # noqa: E402
from memory import memory_scan as plain_scan  # noqa: E402
from sparse import Dilated, Quest, SnapKV, attend, attend_to_slots, to_blocks  # noqa: E402
from test_kernels_dilated import PATTERNS, forward_and_gradients  # noqa: E402
from test_kernels_sparse import draw, draw_cache, draw_window, layer_cache  # noqa: E402

ON_GPU = DEVICE == "cuda"
SHRINK = 16 if not ON_GPU else 8 if CHECKED else 1  # of large sizes
BF16, FP32 = torch.bfloat16, torch.float32
NAMES = {BF16: "bf16", FP32: "fp32"}
FLOOR = {FP32: 1e-6, BF16: 2e-3}                    # conftest.assert_as_good's
inf, nan = math.inf, math.nan
KERNELS = {}                                        # name -> fields, settings, function


# ---------------------------------------------------------------- a case

class Case:
    """What is drawn for one case, by name, so that a failure can tell it."""

    def __init__(self, seed, kernel, index):
        self.rng, self.drawn = random.Random(f"{seed} {kernel} {index}"), {}
        # Triton compiles anew for a size that is a multiple of 16: in one case of four all are, in the others none
        self.aligned = self.rng.random() < 0.25

    def size(self, name, low, high):
        """From low to high, each octave as likely as another; shrunk where time is short."""
        if high > 64:
            low, high = max(1, low // SHRINK), high // SHRINK
        n = round(math.exp(self.rng.uniform(math.log(low), math.log(high))))
        if high >= 16 and self.aligned:
            n = -(-n // 16) * 16
        elif n % 16 == 0:
            n += 1 if n == low else -1
        self.drawn[name] = n
        return n

    def pick(self, name, *choices):
        self.drawn[name] = self.rng.choice(choices)
        return self.drawn[name]

    def lengths(self, name, B, high, low=1):
        """B ragged lengths; often one of them is the largest."""
        self.drawn[name] = [self.rng.choice((high, self.rng.randint(low, high))), *(self.rng.randint(low, high) for _ in range(B - 1))]
        return self.drawn[name]

    def seed(self):
        return self.rng.getrandbits(31)


def kernel(fields, *settings):
    """Registers a function (case, *setting) -> run, check.  run() -> outputs;  check(outputs) -> worst share of the allowed error"""
    def register(make):
        KERNELS[make.__name__] = fields.split(), settings, make
        return make
    return register


def bounded(what, found, allowed):
    assert found <= allowed, f"{what}: error {found:.2e}, allowed {allowed:.2e}"
    return found / allowed


def worst(names, outs, plain, exact, dtype):
    """
    The house rule for all of `outs`, which belong together. Of a few tokens one gradient may all but cancel: one of less than a
    tenth of the largest is measured by that tenth.
    """
    size, shares = lambda x: x.double().square().mean().sqrt().item(), []
    largest = max(map(size, exact))
    for what, out, simple, ref in zip(names, outs, plain, exact, strict=True):
        assert out.shape == ref.shape and out.dtype == simple.dtype, f"{what}: {out.dtype} {tuple(out.shape)} for {simple.dtype} {tuple(ref.shape)}"
        assert out.isfinite().all(), f"{what}: {(~out.isfinite()).sum()} elements are not finite"
        scale, few = max(size(ref), largest / 10, 1e-12), 2 if ref.numel() < 1000 else 1  # numbers: PyTorch's own error is luck then
        allowed = min(2 * size(simple.double() - ref) / scale + few * FLOOR[dtype], LIMIT[dtype])
        shares.append(bounded(what, size(out.double() - ref) / scale, allowed))
    return max(shares)


def doubled(tensors):
    return [None if x is None else x.double() for x in tensors]


def compare(out, f, *inputs, what="y"):
    """out as near to f in fp64 as f in the inputs' dtype is."""
    return worst([what], [out], [f(*inputs)], [f(*doubled(inputs))], inputs[0].dtype)


def as_tensor(lengths):
    return torch.tensor(lengths, device=DEVICE)


# ---------------------------------------------------------------- kernels.py

@kernel("B KV D T dtype packed",
        (1, 1, 16, (1, 200), FP32, False), (2, 1, 64, (1, 600), BF16, True), (3, 2, 16, (100, 2000), FP32, True),
        (2, 3, 32, (1, 100), BF16, False), (1, 2, 128, (500, 2000), BF16, True), (1, 1, 64, (8000, 12000), FP32, False),
        (2, 3, 16, (1, 2000), BF16, False), (5, 32, 128, (1, 60), BF16, True))
def memory_scan(case, B, KV, D, T, dtype, packed):
    """Forward and backward; and forward alone, which may have longer tiles."""
    T = case.size("T", *T)
    k, v, gate, state, *gradients = test_kernels.draw(B, T, KV, D, dtype, case.seed(), spread=case.pick("spread", 0.1, 1, 4))
    gate = gate + case.pick("shift", 0, 4, 8)
    if packed:
        k, v, gate = torch.stack([k, v, gate], dim=2).unbind(2)
    inputs = k, v, gate, state if case.pick("state", True, False) else None

    def run():
        with torch.no_grad():
            alone = kernels.memory_scan(*inputs)
        return [*test_kernels.run(kernels.memory_scan, *inputs, *gradients), *alone]

    def check(outs):
        plain, exact = (test_kernels.run(plain_scan, *x) for x in ((*inputs, *gradients), doubled((*inputs, *gradients))))
        names = ["k~", "v~", "state", "dk", "dv", "dgate", "dstate"][:len(plain)]
        return worst(names + names[:3], outs, plain + plain[:3], exact + exact[:3], dtype)
    return run, check


@kernel("H KV D block_size slots dtype memory norm bounds",
        (4, 4, 64, 8, (1, 500), FP32, True, True, True), (8, 2, 16, 16, (1, 2000), BF16, True, True, True),
        (8, 1, 128, 64, (1, 1000), BF16, False, True, True), (3, 3, 32, 1, (1, 500), FP32, True, False, True),
        (32, 32, 128, 64, (1, 64), BF16, True, True, True), (6, 2, 64, 16, (1, 500), BF16, True, True, False),
        (32, 8, 128, 64, (1, 64), BF16, False, True, False), (1, 1, 16, 12, (1, 2000), FP32, True, True, True))
def decode_step(case, H, KV, D, block_size, slots, dtype, memory, norm, bounds):
    B, slots = case.size("B", 1, 9), case.size("slots", *slots)
    inputs = test_kernels.step_inputs(B, H, KV, D, dtype, memory, norm, case.seed())
    if case.pick("one_angle", True, False):
        inputs |= {name: inputs[name][:1] for name in ("cos", "sin")}
    sizes = dict(k_cache=slots, v_cache=slots, low=-(-slots // block_size), high=-(-slots // block_size))
    inputs |= {name: draw(B, n, KV, D, dtype=dtype, seed=case.seed()) for name, n in sizes.items()}
    used = as_tensor(case.lengths("used", B, slots))
    updated = [name for name in ("state", *sizes) if inputs[name] is not None and (bounds or name not in ("low", "high"))]

    def run():
        step = {name: None for name in ("low", "high")} | {name: inputs[name].clone() for name in updated}
        q = block.decode_step(**inputs | step, eps=1e-6, block_size=block_size, used=used)
        return [q, *(step[name] for name in updated)]

    def check(outs):
        plain, exact = (test_kernels.step_in_parts(**x, block_size=block_size, used=used)
                        for x in (inputs, dict(zip(inputs, doubled(inputs.values())))))
        names = "q", "state", *sizes
        results = {name: (out, plain[names.index(name)], exact[names.index(name)]) for name, out in zip(("q", *updated), outs)}
        for name in set(sizes) & set(updated):  # one slot, or block, of a row is written, the others are as before
            at = (used - 1) if "cache" in name else (used - 1) // block_size
            here = torch.arange(sizes[name], device=DEVICE) == at[:, None]
            assert torch.equal(results[name][0][~here], inputs[name][~here]), f"{name}: written elsewhere"
            results[name] = [x[here] for x in results[name]]
        return worst(results, *zip(*results.values()), dtype)
    return run, check


# ---------------------------------------------------------------- kernels_block.py

def matrices(case, dtype, R, K, sizes):
    """x of R rows, each with an RMS of its own, and W of `sizes` rows."""
    x = draw(*case.pick("rows", (R, 1), (1, R)), K, dtype=dtype, seed=case.seed())
    x *= torch.arange(1, R + 1, device=DEVICE).view(*x.shape[:2], 1).to(dtype)
    return x, [draw(N, K, dtype=dtype, seed=case.seed()) / K**0.5 for N in sizes]


def compare_products(outs, f, inputs, K):
    """In fp32 K terms summed one after the other round more often than cuBLAS's tree, so what is allowed grows with K."""
    if inputs[0].dtype == FP32:
        return max(bounded(f"y{i}", error(y, ref) * min(1, ref.abs().max().item() / 0.1), max(1e-6, 2e-7 * K**0.5)) for i, (y, ref) in enumerate(zip(outs, f(*doubled(inputs)))))
    return worst([f"y{i}" for i in range(len(outs))], outs, f(*inputs), f(*doubled(inputs)), BF16)


@kernel("dtype R K unit n gate",  # n matrices, all but the last of multiples of `unit` rows
        (BF16, (1, 1), (2049, 5000), 16, 3, None), (FP32, (1, 1), (65, 128), 16, 2, "bias"), (BF16, (2, 16), (65, 3000), 64, 3, "rms"),
        (FP32, (2, 16), (130, 1000), 16, 4, "bias"), (BF16, (1, 1), (513, 1024), 32, 4, "rms"), (BF16, (2, 16), (17, 32), 16, 2, None),
        (FP32, (1, 1), (2049, 4096), 16, 1, "rms"), (BF16, (2, 16), (4097, 5000), 16, 1, None))
def products(case, dtype, R, K, unit, n, gate):
    R, K = case.size("R", *R), case.size("K", *K)
    sizes = [*(unit * case.rng.randint(1, 8) for _ in range(n - 1)), case.size("last", 1, 300)]
    case.drawn["sizes"] = sizes
    x, weights = matrices(case, dtype, R, K, sizes)
    bias, eps = draw(sizes[-1], dtype=dtype, seed=case.seed()) if gate else None, 1e-6 if gate == "rms" else None

    def plain(x, bias, *weights):
        last = F.rms_norm(x, (K,), eps=eps) if eps else x
        return [*(F.linear(x, w) for w in weights[:-1]), F.linear(last, weights[-1], bias)]

    return (lambda: list(block.products(x, weights, bias, eps)), lambda outs: compare_products(outs, plain, (x, bias, *weights), K))


@kernel("dtype R K", (BF16, (1, 1), (2049, 5000)), (FP32, (1, 1), (65, 128)), (BF16, (2, 16), (65, 3000)), (FP32, (2, 16), (65, 1000)),
        (BF16, (1, 1), (513, 1024)), (BF16, (2, 16), (17, 32)))
def swiglu_products(case, dtype, R, K):
    R, K, N = case.size("R", *R), case.size("K", *K), case.size("N", 1, 300)
    x, (gate, up) = matrices(case, dtype, R, K, [N, N])
    plain = lambda x, gate, up: [F.silu(F.linear(x, gate)) * F.linear(x, up)]
    return lambda: [block.swiglu_products(x, gate, up)], lambda outs: compare_products(outs, plain, (x, gate, up), K)


@kernel("dtype C", (BF16, (1, 16)), (FP32, (17, 64)), (BF16, (65, 256)), (FP32, (257, 1024)), (BF16, (1025, 2048)), (BF16, (2049, 4096)),
        (FP32, (4097, 8192)))
def add_norm(case, dtype, C):
    shape = case.size("B", 1, 4), case.size("T", 1, 60), case.size("C", *C)
    x, y, weight = *(draw(*shape, dtype=dtype, seed=case.seed()) for _ in "xy"), draw(shape[2], dtype=dtype, seed=case.seed())
    plain = lambda x, y, w: x + F.rms_norm(y, w.shape, w, 1e-6)
    return lambda: [block.add_norm(x, 3 * y, weight, 1e-6)], lambda outs: compare(outs[0], plain, x, 3 * y, weight)


@kernel("H D dtype normed one_angle", (1, 16, FP32, True, True), (3, 32, BF16, True, False), (4, 64, BF16, False, True),
        (8, 128, BF16, True, True), (32, 128, BF16, True, False), (5, 64, FP32, False, False))
def norm_rotate(case, H, D, dtype, normed, one_angle):
    B, T = case.size("B", 1, 4), case.size("T", 1, 2000 if H * D < 512 else 100)
    x = draw(B, T, H + 2, D, dtype=dtype, seed=case.seed())[:, :, 1:-1]
    weight = draw(H * D, dtype=dtype, seed=case.seed()) if normed else None
    angle = 3 * draw(1 if one_angle else B, T, 1, D // 2, seed=case.seed())

    def plain(x, weight, cos, sin):
        if normed:
            x = F.rms_norm(x.flatten(2), (H * D,), weight, 1e-6).view(x.shape)
        a, b = x.to(cos.dtype).chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)

    return (lambda: [block.norm_rotate(x, weight, 1e-6, angle.cos(), angle.sin())],
            lambda outs: compare(outs[0], plain, x, weight, angle.cos(), angle.sin()))


@kernel("dtype", (BF16,), (FP32,))
def swiglu(case, dtype):
    gate, up = draw(2, case.size("R", 1, 200), case.size("N", 1, 5000), dtype=dtype, seed=case.seed())
    gate = 4 * gate
    return (lambda: [block.swiglu(gate.clone(), up)],
            lambda outs: compare(outs[0], lambda gate, up: F.silu(gate) * up, gate, up))


# ---------------------------------------------------------------- kernels_sparse.py

CACHES = (  # H KV D block_size Tk dtype
    (2, 2, 16, 1, (1, 300), FP32), (4, 1, 64, 8, (1, 2000), FP32), (8, 1, 128, 16, (200, 2000), BF16), (12, 4, 32, 64, (1, 1000), BF16),
    (3, 1, 16, 12, (1, 2000), BF16), (4, 2, 64, 100, (100, 2000), FP32), (2, 2, 128, 64, (64, 600), FP32),
    (16, 1, 64, 32, (8000, 12000), BF16))


def cache_of(case, H, KV, D, Tk, dtype, low=1):
    """test_kernels_sparse.draw_cache for random rows: NaN in what may not be read."""
    Tk = case.size("Tk", *Tk)
    return draw_cache(case.lengths("used", case.size("B", 1, 4), Tk, low), Tk, H, KV, D, dtype, case.seed())


def bounds_of(k, used, block_size):
    """Of each block the channels' least and largest, 0 where nothing is filled."""
    filled = to_blocks(torch.arange(k.shape[1], device=DEVICE) < used[:, None], block_size)[..., None, None]
    k, empty = to_blocks(k, block_size), ~filled.any(2)
    return k.where(filled, inf).amin(2).masked_fill(empty, 0), k.where(filled, -inf).amax(2).masked_fill(empty, 0)


@kernel("H KV D block_size Tk dtype", *CACHES)
def block_bounds(case, H, KV, D, block_size, Tk, dtype):
    _, k, _, used = cache_of(case, H, KV, D, Tk, dtype, low=0)

    def check(outs):
        for what, out, ref in zip(("low", "high"), outs, bounds_of(k, used, block_size)):
            assert torch.equal(out, ref), f"{what}: not the least or largest"
    return lambda: list(quest.block_bounds(k, used, block_size)), check


@kernel("H KV D block_size Tk dtype", *CACHES)
def quest_scores(case, H, KV, D, block_size, Tk, dtype):
    q, k, v, used = cache_of(case, H, KV, D, Tk, dtype)
    low, high = bounds_of(k, used, block_size)
    keep = case.pick("keep", (True, True), (False, False))

    def check(outs):
        scores, cache = outs[0], layer_cache(k, v, used)
        method = Quest(2 * block_size, block_size, *keep)
        free = method.score(q, cache.k, cache.filled_slots())                                  # (B, KV, 1, N)
        ref = method.forced(free, used).squeeze(2)
        assert torch.equal(scores.where(scores.isinf(), 0), ref.where(ref.isinf(), 0)), "another block is forced"
        off = (scores - ref).where(ref.isfinite(), 0).abs().max().item()
        return bounded("scores, at most", off, 1e-5 * free.abs().max().item())
    return lambda: [quest.quest_scores(q, low, high, used, block_size, *keep)], check


@kernel("N", (1, 32), (33, 64), (65, 1000), (2049, 4096), (8193, 16384), (32769, 60000))
def select(case, *N):
    R, N = case.size("R", 1, 6), case.size("N", *N)
    S, kind = case.size("S", 1, N + 3), case.pick("kind", "normal", "ties", "wild", "special")
    source = torch.Generator().manual_seed(case.seed())
    scores = torch.randn(N, R, generator=source)
    if kind == "ties":
        scores = (2 * scores).round()
    if kind == "wild":
        scores *= 10.0 ** torch.randint(-38, 38, scores.shape, generator=source)
    if kind == "special":
        few = torch.tensor([-inf, inf, 0.0, -0.0, 1.0, -1.0, nan, 3.4e38, -3.4e38, 1e-45])
        scores = few[torch.randint(len(few), scores.shape, generator=source)]
    scores = scores.to(DEVICE).T
    if case.pick("contiguous", True, False):
        scores = scores.contiguous()

    def check(outs):
        rank = scores.double().where(~scores.isnan(), -1e300) + 0.0  # NaN is below all numbers; -0 becomes 0
        best = rank.sort(dim=-1, descending=True, stable=True).indices[:, :S]
        best = best.where(rank.gather(-1, best) > -inf, N).sort(-1).values
        best = F.pad(best.where(best < N, -1), (0, S - best.shape[1]), value=-1)
        assert torch.equal(outs[0], best.int()), f"{(outs[0] != best).sum()} of {best.numel()} are others"
    return lambda: [topk.select(scores, S)], check


@kernel("H KV D block_size Tk dtype", *CACHES)
def quest_attend(case, H, KV, D, block_size, Tk, dtype):
    q, k, v, used = cache_of(case, H, KV, D, Tk, dtype)
    N = -(-k.shape[1] // block_size)
    S = case.size("S", 1, N)
    chosen = torch.rand(len(q), KV, N, generator=torch.Generator().manual_seed(case.seed())).argsort(-1)[..., :S].int().to(DEVICE)
    chosen[..., S // 2] = -1
    chosen[..., 0] = 0  # something to read in every row

    def check(outs):
        y, slots = outs
        expected = chosen.long()[..., None] * block_size + torch.arange(block_size, device=DEVICE)
        unread = (chosen < 0)[..., None] | (expected >= used[:, None, None, None])
        assert torch.equal(slots, expected.masked_fill(unread, -1).flatten(2)), "reports other slots"
        cache = layer_cache(k, v, used)
        return compare(y, lambda q, k, v: attend_to_slots(q, k, v, slots), q, cache.k, cache.v)
    return lambda: list(quest.quest_attend(q, k, v, chosen, used, block_size)), check


@kernel("H KV D block_size Tk dtype", *CACHES)
def attend_slots(case, H, KV, D, _, Tk, dtype):
    q, k, v, used = cache_of(case, H, KV, D, Tk, dtype)

    def check(outs):
        cache = layer_cache(k, v, used)
        return compare(outs[0], lambda q, k, v: attend(q, k, v, cache.filled_slots()[:, None, None]), q, cache.k, cache.v)
    return lambda: [quest.attend_slots(q, k, v, used)], check


@kernel("H KV D W kernel Tk dtype",
        (2, 2, 16, 16, 5, (1, 500), FP32), (4, 1, 64, 8, 7, (1, 2000), FP32), (8, 1, 32, 20, 1, (1, 1000), BF16),
        (2, 2, 128, 64, 5, (64, 2000), BF16), (8, 2, 64, 32, 3, (32, 1000), BF16), (3, 1, 16, 33, 5, (1, 500), FP32),
        (1, 1, 64, 64, 5, (8000, 12000), BF16))
def snapkv_scores(case, H, KV, D, W, kernel, Tk, dtype):
    Tk = case.size("Tk", *Tk)
    q, k, v, lengths = draw_window(case.lengths("lengths", case.size("B", 1, 4), Tk), Tk, H, KV, D, W, dtype)

    def check(outs):
        scores, clean, method = outs[0], layer_cache(k, v, lengths).k, SnapKV(W + 1, W, kernel)
        plain, exact = (method.score(*x, lengths) for x in ((q, clean), doubled((q, clean))))
        ref = method.forced(exact, lengths)
        assert torch.equal(scores.where(scores.isinf(), 0), ref.where(ref.isinf(), 0)), "another slot is forced"
        free = ref.isfinite()
        return worst(["scores"], [scores[free]], [plain[free]], [exact[free]], dtype) if free.any() else 0
    return lambda: [snapkv.snapkv_scores(q, k, lengths, kernel)], check


# ---------------------------------------------------------------- kernels_moba.py

PROMPTS = (  # H KV D block_size S keep_first T dtype
    (2, 1, 64, 8, 4, True, (1, 256), FP32), (4, 1, 16, 16, 3, False, (100, 1000), FP32), (8, 1, 32, 64, 2, True, (1, 800), FP32),
    (2, 2, 16, 24, 3, True, (1, 700), FP32), (2, 2, 64, 8, 4, False, (1000, 2000), BF16), (8, 1, 128, 16, 5, True, (1, 500), BF16),
    (4, 1, 64, 64, 2, True, (64, 1000), BF16), (1, 1, 128, 128, 2, True, (1, 2000), BF16), (1, 1, 16, 160, 2, True, (1, 1500), BF16),
    (3, 1, 32, 32, 6, True, (1, 1000), BF16), (1, 1, 64, 64, 8, True, (4000, 6000), BF16))


def spoilt(k, v, end):
    """k and v with NaN in the slots from `end` on, which no query may read; and without."""
    behind = (torch.arange(k.shape[1], device=DEVICE) >= end[:, None])[..., None, None]
    return *(x.masked_fill(behind, nan) for x in (k, v)), *(x.masked_fill(behind, 0) for x in (k, v))


def prompt_of(case, H, KV, D, T, dtype):
    """q, k, v, start, and k and v for the references: whole prompts, or chunks of longer ones, some of which end in padding."""
    Tq = case.size("Tq", *T)
    B = case.size("B", 1, 3) if H * Tq**2 < 2**21 else 1  # references take fp64 of that size
    Tk = Tq if case.pick("whole", True, False) else case.size("Tk", Tq * (SHRINK if T[1] > 64 else 1), T[1])
    Tk = max(Tk, Tq)
    q, k, v = test_kernels_moba.draw(B, Tq, H, KV, D, Tk, dtype, case.seed())
    start = as_tensor(case.lengths("start", B, Tk - Tq + case.pick("padding", 0, 0, Tq // 2), low=0))
    k, v, k_clean, v_clean = spoilt(k, v, start + Tq)
    return q, k, v, start, k_clean, v_clean


@kernel("H KV D block_size S keep_first T dtype", *PROMPTS)
def moba_route(case, H, KV, D, block_size, S, keep_first, T, dtype):
    q, k, _, start, k_clean, _ = prompt_of(case, H, KV, D, T, dtype)
    settings = start, block_size, S, keep_first
    return (lambda: [routing.moba_route(q, k, *settings)],
            lambda outs: test_kernels_moba.assert_routes(outs[0], q, k_clean, *settings))


@kernel("H KV D block_size S keep_first T dtype", *PROMPTS)
def moba_attend(case, H, KV, D, block_size, S, keep_first, T, dtype):
    """Any choice in any order, forward and backward."""
    q, k, v, start, *clean = prompt_of(case, H, KV, D, T, dtype)
    dy = draw(*q.shape, dtype=BF16, seed=case.seed()).to(dtype)
    (B, Tq), N = q.shape[:2], -(-k.shape[1] // block_size)
    own = test_kernels_moba.own_blocks(q, k, start, block_size)[:, None, :, None].int().expand(B, KV, Tq, 1)
    others = torch.rand(B, KV, Tq, max(N, S), generator=torch.Generator().manual_seed(case.seed())).argsort(-1)[..., :S - 1].int().to(DEVICE)
    chosen = torch.cat([others.where((others != own) & (others < N), -1), own], dim=-1)
    if case.pick("own_first", True, False):
        chosen = chosen.flip(-1)

    def check(outs):
        keep = test_kernels_moba.mask_of(chosen, q, k, start, block_size)
        plain, exact = (forward_and_gradients(lambda *x: attend(*x, keep), *x) for x in ((q, *clean, dy), doubled((q, *clean, dy))))
        return worst(("y", "dq", "dk", "dv"), outs, plain, exact, dtype)
    return lambda: forward_and_gradients(lambda *x: moba.moba_attend(*x, chosen, start, block_size), q, k, v, dy), check


# ---------------------------------------------------------------- kernels_dilated.py

ARL, RATPLUS = (64, 0, 0), (16, 256, 4)


@kernel("H KV D pattern T dtype",  # the number of splits, and a window longer than T, are compiled for: T stays in narrow ranges
        (2, 1, 16, PATTERNS["all three"], (1, 100), FP32), (4, 1, 64, PATTERNS["arl"], (1, 250), BF16),
        (8, 8, 32, PATTERNS["sparse chunks"], (100, 500), FP32), (1, 1, 128, PATTERNS["streaming"], (1, 600), BF16),
        (6, 2, 16, PATTERNS["wide window"], (41, 200), BF16), (2, 2, 64, PATTERNS["initial beyond a chunk"], (17, 400), BF16),
        (1, 1, 32, PATTERNS["dense"], (1, 160), FP32), (3, 1, 64, PATTERNS["all three"], (300, 500), BF16),
        (4, 4, 128, ARL, (500, 1500), BF16), (1, 1, 64, RATPLUS, (4000, 5000), BF16))
def dilated(case, H, KV, D, pattern, T, dtype):
    """A whole prompt, forward and backward."""
    T = case.size("T", *T)
    B = case.size("B", 1, 3) if H * T**2 < 2**21 else 1
    q, k, v = draw(B, T, H + 2 * KV, D, dtype=dtype, seed=case.seed()).split([H, KV, KV], dim=2)
    tensors = q, k, v, draw(B, T, H, D, dtype=dtype, seed=case.seed())

    def check(outs):
        reference = test_kernels_dilated.reference(pattern)
        plain, exact = forward_and_gradients(reference, *tensors), forward_and_gradients(reference, *doubled(tensors))
        return worst(("y", "dq", "dk", "dv"), outs, plain, exact, dtype)
    return lambda: forward_and_gradients(test_kernels_dilated.kernel(pattern), *tensors), check


@kernel("H KV D pattern Tk dtype",
        (2, 1, 16, PATTERNS["all three"], (1, 500), FP32), (4, 1, 64, ARL, (1, 2000), BF16), (8, 2, 32, PATTERNS["sparse chunks"], (1, 1000), FP32),
        (1, 1, 128, PATTERNS["streaming"], (1, 600), BF16), (6, 2, 16, PATTERNS["wide window"], (41, 500), BF16),
        (16, 1, 64, RATPLUS, (300, 2000), BF16), (4, 1, 128, RATPLUS, (6000, 10000), BF16))
def dilated_step(case, H, KV, D, pattern, Tk, dtype):
    """One query, or a chunk of them, in a cache."""
    Tk = case.size("Tk", *Tk)
    B, Tq = case.size("B", 1, 4), min(Tk, case.size("Tq", 1, 60)) if case.pick("chunk", True, False) else 1
    q = draw(B, Tq, H + 2, D, dtype=dtype, seed=case.seed())[:, :, 1:-1]
    k, v = (draw(B, Tk + 5, KV, D, dtype=dtype, seed=case.seed())[:, :Tk] for _ in "kv")
    start, slot = as_tensor(case.lengths("start", B, Tk - Tq, low=0)), torch.arange(Tk, device=DEVICE)
    k, v, *clean = spoilt(k, v, start + Tq)
    method = Dilated(*pattern)

    def plain(q, k, v):
        if q.dtype != torch.float64:
            return method.prefill(q, k, v, start, None)[0]
        return attend(q, k, v, method.pattern((start[:, None] + slot[:Tq])[:, None, :, None], slot))
    return lambda: [patterns.dilated(q, k, v, start, *pattern)], lambda outs: compare(outs[0], plain, q, *clean)


# ---------------------------------------------------------------- running them

BUSY = torch.ones(2**24, device=DEVICE) if ON_GPU else None
SIDE = torch.cuda.Stream() if ON_GPU else None


def beside_other_work(run):
    """run() while the GPU has more to do: its programs then start and end in another order."""
    if ON_GPU and not CHECKED:
        with torch.cuda.stream(SIDE):
            for _ in range(4):
                BUSY.sin_()
    return run()


def same_bits(x, y):
    return x.shape == y.shape and torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))


def run_case(name, index, seed, row):
    """One case; what it gives is added to the kernel's row."""
    fields, settings, make = KERNELS[name]
    setting = settings[index % len(settings)]
    case, started = Case(seed, name, index), time.time()
    row["cases"] += 1
    try:
        run, check = make(case, *setting)
        outs = run()
        if CHECKED:
            torch.cuda.synchronize() if ON_GPU else None
        else:
            row["worst"] = max(row["worst"], check(outs) or 0)
            runs = run(), beside_other_work(run)  # outs are still there, so theirs lie elsewhere
            assert all(same_bits(x, y) for again in runs for x, y in zip(outs, again, strict=True)), "other bits in another run"
            row["same_bits"] += 1
    except Exception as error:  # whatever it is, the other cases are run
        row["failures"] += 1
        words = {field: NAMES.get(value, value) for field, value in zip(fields, setting)} | case.drawn  # ranges give way to what was drawn
        reason = (str(error).strip() or "?").splitlines()[0][:300]
        told = " ".join(f"{key}={value}" for key, value in words.items()).replace(", ", ",")
        print(f"FAILED {name} {index}: {told}: {type(error).__name__}: {reason}", flush=True)
        if ON_GPU:
            try:
                torch.cuda.synchronize()
            except RuntimeError:
                sys.exit(f"stress.py: after {name} {index} the GPU answers no more; what was left in this process is not run")
    row["seconds"] += time.time() - started


def new_row():
    return dict(cases=0, failures=0, worst=0.0, same_bits=0, seconds=0.0)


def run_here(args, rows):
    """This process's share (r, n) of all settings."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # outputs start as NaN
    warnings.filterwarnings("ignore", message=".*deterministic.*")
    backend.use("torch")                                      # references
    r, n = args.share
    number = 0  # of settings
    for name in args.only:
        rows[name], settings = new_row(), len(KERNELS[name][1])
        for index in range(args.shapes) if args.index is None else [args.index]:
            if (number + index % settings) % n == r:
                run_case(name, index, args.seed, rows[name])
        number += settings
        if args.json:
            save({"kernels": rows}, args.json)


def run_shares(args, under=()):
    """
    The same in --jobs processes at once, each `under` a tool, if given. Returns the rows added up, the tool's output and how it
    was started.
    """
    flags = ["--shapes", str(args.shapes), "--seed", str(args.seed), "--only", *args.only] + ["--checked"] * args.checked
    flags += [] if args.index is None else ["--index", str(args.index)]
    command, rows, output = [*under, sys.executable, __file__, *flags], {name: new_row() for name in args.only}, ""
    with tempfile.TemporaryDirectory() as folder:
        file = lambda r, ending: Path(folder, f"{r}.{ending}")
        processes = []
        for r in range(args.jobs):
            log = file(r, "log").open("w") if under else None
            share = ["--share", f"{r}/{args.jobs}", "--json", file(r, "json")]
            processes.append(subprocess.Popen(command + share, stdout=log, stderr=log and subprocess.STDOUT))
        for r, process in enumerate(processes):
            process.wait()
            output += file(r, "log").read_text() if under else ""
            there = load(file(r, "json"), "kernels")["kernels"] if file(r, "json").exists() else {}
            for name, row in there.items():
                rows[name] = {key: max(value, row[key]) if key == "worst" else value + row[key] for key, value in rows[name].items()}
    return rows, output


def sanitize(args):
    """What compute-sanitizer's tools find: a list for the report."""
    found = []
    for tool, flags in ("memcheck", ["--report-api-errors=no"]), ("racecheck", []):
        under = ["compute-sanitizer", "--tool", tool, *flags]
        started = time.time()
        rows, output = run_shares(args, under)
        # "ERROR SUMMARY: 0 errors", of racecheck "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"; one a process
        errors = [int(n) for n in re.findall(r"SUMMARY: (\d+) (?:error|hazard)", output)]
        cases, failures = (sum(row[key] for row in rows.values()) for key in ("cases", "failures"))
        if sum(errors) or failures or len(errors) != args.jobs:
            print("\n".join([line for line in output.splitlines() if line.startswith(("=====", "FAILED", "stress.py"))][:60]))
        found.append({"tool": tool, "kernels": list(rows), "cases": cases, "failures": failures, "seconds": time.time() - started,
                      "errors": sum(errors) if len(errors) == args.jobs else None,  # None: a process ended without a summary
                      "command": shlex.join([*under, "python", "tests/stress.py", "--shapes", str(args.shapes), "--checked"])})
        print("{tool}: {cases} cases of {0} kernels, {failures} failed; errors: {errors}; {seconds:.0f} s".format(len(rows), **found[-1]), flush=True)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0].strip(), allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"stress.py: {message}\n")
    add = parser.add_argument
    add("--shapes", type=positive, metavar="N", help="cases of each kernel (default: 1000; without a GPU 2; with --sanitize each setting once)")
    add("--only", nargs="+", default=list(KERNELS), choices=KERNELS, metavar="KERNEL", help=f"of {', '.join(KERNELS)} (default: all)")
    add("--index", type=natural, metavar="I", help="this one case alone")
    add("--seed", type=natural, default=0, metavar="N", help="of all draws (default: 0)")
    add("--jobs", type=positive, default=1, metavar="N", help="processes that share the GPU and the settings (default: 1)")
    add("--json", metavar="FILE", help="the report; what else the file holds stays (default: none)")
    add("--checked", action="store_true", help="small shapes, not compared, every tensor its own allocation: for compute-sanitizer")
    add("--sanitize", action="store_true", help="compute-sanitizer's memcheck and racecheck over --checked")
    add("--share", metavar="R/N", help="of the settings only each N-th; what --jobs starts")
    args = parser.parse_args()
    if args.sanitize and not ON_GPU:
        parser.error("--sanitize: compute-sanitizer needs a GPU")
    each_setting = max(len(settings) for _, settings, _ in KERNELS.values())
    args.shapes = args.shapes or (each_setting if args.sanitize else 1000 if ON_GPU else 2)
    if args.share:
        args.share = [int(n) for n in args.share.split("/")]
        return run_here(args, {})
    there = load(args.json) if args.json and Path(args.json).exists() else {}
    print(f"{device_name(DEVICE)}, torch {torch.__version__}, triton {triton.__version__}, commit {commit()[:12]}: {args.shapes} cases of "
          f"{len(args.only)} kernels, seed {args.seed}, {args.jobs} processes", flush=True)
    if args.sanitize:
        args.checked = True
        found = sanitize(args)
        if args.json:
            save(there | {"sanitizer": found, "sanitizer_commit": commit()}, args.json)
        sys.exit(any(run["errors"] != 0 or run["failures"] for run in found))

    started, rows, file = time.time(), {}, args.json
    if args.jobs > 1:
        rows, _ = run_shares(args)
    else:
        args.share, args.json = (0, 1), None
        run_here(args, rows)
    seconds, expected = time.time() - started, 1 if args.index is not None else args.shapes
    if file:
        save(there | {"command": shlex.join(["python", *sys.argv]), "device": device_name(DEVICE), "torch": torch.__version__,
                      "triton": triton.__version__, "commit": commit(), "seed": args.seed, "seconds": seconds, "kernels": rows}, file)
    print(f"\n{'kernel':16} {'cases':>6} {'failed':>7} {'worst':>7} {'same bits':>10} {'seconds':>8}")
    for name, row in rows.items():
        print(f"{name:16} {row['cases']:6} {row['failures']:7} {row['worst']:7.2f} {row['same_bits']:10} {row['seconds']:8.1f}")
    missing = sum(expected - row["cases"] for row in rows.values())
    print(f"{seconds:.0f} s" + (f"; {missing} cases were not run" if missing else ""))
    sys.exit(missing > 0 or any(row["failures"] for row in rows.values()))


if __name__ == "__main__":
    main()
