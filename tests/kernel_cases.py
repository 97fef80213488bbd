"""
The 17 kernels, each with the shapes it is tried at and what it is compared with.

A case is a function of (seed, kernel, index). The index chooses one of the kernel's settings, which
are what Triton compiles for: widths, blocks, dtypes. Sizes, lengths, strides and values are drawn,
or pinned by whoever asks for a case. `make(case, *setting)` gives two functions:

    run() -> outputs           the kernel, forward and, where it has one, backward
    check(outs) -> worst share of the allowed error, or an AssertionError

The rule is conftest's: at most twice as far from fp64 as plain PyTorch in the kernel's dtype, plus
a floor. What selects must select what the reference does, near-ties apart; what copies must be
equal. Outputs start as NaN where the caller sees to it (conftest.poisoned), and caches end in NaN
here, behind what is filled. tests/test_kernels.py asks a case of each setting, tests/stress.py a
thousand of each kernel.
"""
import math
import random

import torch
from torch.nn import functional as F

from conftest import DEVICE, FLOOR, LIMIT, error, layer_cache
import kernels
from memory import memory_scan as plain_scan
from memory import memory_step
from sparse import Dilated, MoBA, Quest, SnapKV, attend, attend_to_slots, query_slots, to_blocks
from triton_ops import block, moba_route as routing, quest, snapkv, topk
from triton_ops.dilated import dilated as dilated_attention
from triton_ops.moba import moba_attend as attend_to_chosen

BF16, FP32 = torch.bfloat16, torch.float32
inf, nan = math.inf, math.nan
shrink = 16 if DEVICE == "cpu" else 1  # of large sizes: the interpreter is slow
KERNELS = {}                           # name -> fields, settings, function


# ---------------------------------------------------------------- a case

class Case:
    """What is drawn for one case, by name, so that a failure can tell it."""

    def __init__(self, seed, kernel, index, pinned=(), spoilt=None):
        self.rng, self.drawn = random.Random(f"{seed} {kernel} {index}"), {}
        self.pinned, self.spoilt = dict(pinned), spoilt
        # Triton compiles anew for a size that is a multiple of 16: in one case of four all are, in
        # the others none
        self.aligned = self.rng.random() < 0.25

    def record(self, name, value):
        self.drawn[name] = self.pinned.get(name, value)
        return self.drawn[name]

    def size(self, name, low, high):
        """From low to high, each octave as likely as another; shrunk where time is short."""
        if high > 64:
            low, high = max(1, low // shrink), high // shrink
        n = round(math.exp(self.rng.uniform(math.log(low), math.log(high))))
        if high >= 16 and self.aligned:
            n = -(-n // 16) * 16
        elif n % 16 == 0:
            n += 1 if n == low else -1
        return self.record(name, n)

    def pick(self, name, *choices):
        return self.record(name, self.rng.choice(choices))

    def lengths(self, name, B, high, low=1):
        """B ragged lengths, int64; often one of them is the largest."""
        first = self.rng.choice((high, self.rng.randint(low, high)))
        others = [self.rng.randint(low, high) for _ in range(B - 1)]
        return torch.tensor(self.record(name, [first, *others]), device=DEVICE)

    def seed(self):
        return self.rng.getrandbits(31)

    def rows(self, *tensors, dim=0):
        """
        Inputs whose rows along `dim` must not meet. Where a row is to be spoilt it is NaN from
        here on.
        """
        for x in tensors:
            if self.spoilt is not None and x is not None:
                x.select(dim, self.spoilt).fill_(nan)
        return tensors


def kernel(fields, *settings):
    """Registers a function (case, *setting) -> run, check."""
    def register(make):
        KERNELS[make.__name__] = fields.split(), settings, make
        return make
    return register


def draw(*shape, dtype=FP32, seed=0):
    source = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=source).to(DEVICE, dtype)


def doubled(tensors):
    return [None if x is None else x.double() for x in tensors]


def with_gradients(f, inputs, gradients):
    """f's outputs, then the gradients of its inputs, of those that are not None."""
    inputs = [None if x is None else x.detach().requires_grad_() for x in inputs]
    outs = f(*inputs)
    outs = [outs] if isinstance(outs, torch.Tensor) else list(outs)
    gradients = [dy.to(y.dtype) for y, dy in zip(outs, gradients, strict=True)]
    given = [x for x in inputs if x is not None]
    return [*(y.detach() for y in outs), *torch.autograd.grad(outs, given, gradients)]


# ---------------------------------------------------------------- the rule

def bounded(what, found, allowed):
    assert found <= allowed, f"{what}: error {found:.2e}, allowed {allowed:.2e}"
    return found / allowed


def worst(names, outs, plain, exact, dtype):
    """
    The house rule for all of `outs`, which belong together. Of a few tokens one gradient may all
    but cancel: one of less than a tenth of the largest is measured by that tenth.
    """
    size, shares = lambda x: x.double().square().mean().sqrt().item(), []
    largest = max(map(size, exact))
    for what, out, simple, ref in zip(names, outs, plain, exact, strict=True):
        assert out.shape == ref.shape and out.dtype == simple.dtype, \
            f"{what}: {out.dtype} {tuple(out.shape)} for {simple.dtype} {tuple(ref.shape)}"
        assert out.isfinite().all(), f"{what}: {(~out.isfinite()).sum()} elements are not finite"
        scale = max(size(ref), largest / 10, 1e-12)
        theirs, found = (size(x.double() - ref) / scale for x in (simple, out))
        allowed, limit = 2 * theirs + FLOOR[dtype], LIMIT[dtype]
        if ref.numel() < 1000:  # PyTorch's own error is luck then, and may be above the limit
            allowed, limit = allowed + FLOOR[dtype], max(limit, theirs + FLOOR[dtype])
        shares.append(bounded(what, found, min(allowed, limit)))
    return max(shares)


def compare(out, f, *inputs, what="y"):
    """out as near to f in fp64 as f in the inputs' dtype is."""
    return worst([what], [out], [f(*inputs)], [f(*doubled(inputs))], inputs[0].dtype)


def same_forced(scores, ref):
    """What must be selected is +inf in both, what must not -inf."""
    forced = lambda x: x.where(x.isinf(), 0)
    assert torch.equal(forced(scores), forced(ref)), "others are forced"


# ---------------------------------------------------------------- the memory

@kernel("B KV D T dtype packed",
        (1, 1, 16, (1, 200), FP32, False), (2, 1, 64, (1, 600), BF16, True),
        (3, 2, 16, (100, 2000), FP32, True), (2, 3, 32, (1, 100), BF16, False),
        (1, 2, 128, (500, 2000), BF16, True), (1, 1, 64, (8000, 12000), FP32, False),
        (2, 3, 16, (1, 2000), BF16, False), (5, 32, 128, (1, 60), BF16, True),
        (2, 1, 16, (1, 300), BF16, True))
def memory_scan(case, B, KV, D, T, dtype, packed):
    """Forward and backward; and forward alone, which may have longer tiles."""
    T = case.size("T", *T)
    k, v, gate, dk, dv = draw(5, B, T, KV, D, dtype=dtype, seed=case.seed())
    # gates of std 4: memories of 1 to 10,000 tokens; shifted by 8 of 3,000 and more
    gate = gate * case.pick("spread", 0.1, 1, 4) + case.pick("shift", 0, 4, 8)
    if packed:
        k, v, gate = torch.stack([k, v, gate], dim=2).unbind(2)
    state, dstate = draw(2, 2, B, KV, D, seed=case.seed())
    case.rows(k, v, gate, dk, dv)
    case.rows(state, dstate, dim=1)
    # gradients as autograd gives them: of one number, or with channels apart
    if case.pick("gradients", "drawn", "strided") == "strided" and case.spoilt is None:
        dk = torch.ones((), device=DEVICE, dtype=dtype).expand_as(dk)
        dv, k = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (dv, k))
    inputs = k, v, gate, state if case.pick("state", True, False) else None

    def run():
        with torch.no_grad():
            alone = kernels.memory_scan(*inputs)
        return [*with_gradients(kernels.memory_scan, inputs, (dk, dv, dstate)), *alone]

    def check(outs):
        plain, exact = (with_gradients(plain_scan, x, (dk, dv, dstate))
                        for x in (inputs, doubled(inputs)))
        names = ["k~", "v~", "state", "dk", "dv", "dgate", "dstate"][:len(plain)]
        return worst(names + names[:3], outs, plain + plain[:3], exact + exact[:3], dtype)
    return run, check


# ---------------------------------------------------------------- the model's block

def rms_norm(x, weight):
    return F.rms_norm(x, (x.shape[-1],), weight, 1e-6)


def norm_and_rotate(x, weight, cos, sin):
    """As model.py: QK-norm over all heads or over each, if there is a weight, and RoPE."""
    if weight is not None:
        x = rms_norm(x.flatten(2).unflatten(2, (-1, len(weight))), weight).view(x.shape)
    a, b = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def step_in_parts(q, k, v, gate, q_weight, k_weight, cos, sin, state, k_cache, v_cache, low, high,
                  block_size, used):
    """block.decode_step by the model's pieces. -> q, and everything that the step updates"""
    if gate is not None:
        k, v, state = memory_step(k, v, gate, state)
    q, k = norm_and_rotate(q, q_weight, cos, sin), norm_and_rotate(k, k_weight, cos, sin)
    k_cache, v_cache, low, high = (x.clone() for x in (k_cache, v_cache, low, high))
    for b, slot in enumerate((used - 1).tolist()):
        k_cache[b, slot], v_cache[b, slot] = k[b, 0], v[b, 0]
        n, new = slot // block_size, slot % block_size == 0
        low[b, n] = k[b, 0] if new else torch.minimum(low[b, n], k[b, 0])
        high[b, n] = k[b, 0] if new else torch.maximum(high[b, n], k[b, 0])
    return q, state, k_cache, v_cache, low, high


def step_inputs(B, H, KV, D, slots, blocks, dtype, memory=True, norm=True, seed=0):
    """All tensors of block.decode_step but `used`, by name; projections are views of one tensor."""
    source = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=source).to(DEVICE)
    packed = rand(B, 1, (H + 3 * KV) * D).to(dtype).unflatten(-1, (-1, D))
    q, k, v, gate = packed.split([H, KV, KV, KV], dim=2)
    angle = 6 * rand(B, 1, 1, D // 2)
    widths = (D, D) if norm == "head" else (H * D, KV * D)
    weights = [rand(width).to(dtype) if norm else None for width in widths]
    k_cache, v_cache = rand(2, B, slots, KV, D).to(dtype).unbind()
    low, high = rand(2, B, blocks, KV, D).to(dtype).unbind()
    return dict(q=q, k=k, v=v, gate=gate if memory else None, q_weight=weights[0],
                k_weight=weights[1], cos=angle.cos(), sin=angle.sin(),
                state=rand(2, B, KV, D) if memory else None,
                k_cache=k_cache, v_cache=v_cache, low=low, high=high)


@kernel("H KV D block_size slots dtype memory norm bounds",
        (4, 4, 64, 8, (1, 500), FP32, True, True, True),
        (8, 2, 16, 16, (1, 2000), BF16, True, True, True),
        (8, 1, 128, 64, (1, 1000), BF16, False, True, True),
        (3, 3, 32, 1, (1, 500), FP32, True, False, True),
        (32, 32, 128, 64, (1, 64), BF16, True, True, True),
        (9, 3, 64, 16, (1, 500), BF16, True, "head", False),
        (32, 8, 128, 64, (1, 64), BF16, False, "head", True),
        (1, 1, 16, 12, (1, 2000), FP32, True, True, True))
def decode_step(case, H, KV, D, block_size, slots, dtype, memory, norm, bounds):
    B, slots = case.size("B", 1, 9), case.size("slots", *slots)
    blocks = -(-slots // block_size)
    sizes = dict(k_cache=slots, v_cache=slots, low=blocks, high=blocks)
    inputs = step_inputs(B, H, KV, D, slots, blocks, dtype, memory, norm, case.seed())
    if case.pick("one_angle", True, False):
        inputs |= {name: inputs[name][:1] for name in ("cos", "sin")}
    case.rows(*(inputs[name] for name in ("q", "k", "v", "gate", *sizes)))
    case.rows(inputs["state"], dim=1)
    used = case.lengths("used", B, slots)
    updated = ["state"] if memory else []
    updated += [name for name in sizes if bounds or "cache" in name]
    kept, position = case.pick("kept", True, False), used + 10**4  # entries were dropped
    positions = torch.arange(B * slots * KV, device=DEVICE, dtype=torch.int32).view(B, slots, KV)

    def run():
        copies = dict.fromkeys(("low", "high")) | {name: inputs[name].clone() for name in updated}
        noted = positions.clone()
        q = block.decode_step(**inputs | copies, eps=1e-6, block_size=block_size, used=used,
                              positions=noted if kept else None, position=position)
        return [q, *(copies[name] for name in updated), noted]

    def check(outs):
        *outs, noted = outs
        written = (torch.arange(slots, device=DEVICE) == used[:, None] - 1)[..., None] & kept
        assert torch.equal(noted, position.int()[:, None, None].where(written, positions)), \
            "positions"
        plain, exact = (step_in_parts(**x, block_size=block_size, used=used)
                        for x in (inputs, dict(zip(inputs, doubled(inputs.values())))))
        names = "q", "state", *sizes
        results = {name: (out, plain[names.index(name)], exact[names.index(name)])
                   for name, out in zip(("q", *updated), outs)}
        for name in set(sizes) & set(updated):
            # one slot, or block, of a row is written, the others are as before
            at = (used - 1) if "cache" in name else (used - 1) // block_size
            here = torch.arange(sizes[name], device=DEVICE) == at[:, None]
            assert torch.equal(results[name][0][~here], inputs[name][~here]), \
                f"{name}: written elsewhere"
            results[name] = [x[here] for x in results[name]]
        return worst(results, *zip(*results.values()), dtype)
    return run, check


def matrices(case, dtype, R, K, sizes):
    """x of R rows, each with an RMS of its own, and W of `sizes` rows."""
    shape = case.pick("rows", (R, 1), (1, R))
    x = draw(*shape, K, dtype=dtype, seed=case.seed())
    x *= torch.arange(1, R + 1, device=DEVICE).view(*shape, 1).to(dtype)
    case.rows(x, dim=shape.index(R))
    return x, [draw(N, K, dtype=dtype, seed=case.seed()) / K**0.5 for N in sizes]


def compare_products(outs, f, inputs, K, factor=1e-7):
    """In fp32 K terms summed one after the other round more often than cuBLAS's tree."""
    plain, exact, names = f(*inputs), f(*doubled(inputs)), [f"y{i}" for i in range(len(outs))]
    if inputs[0].dtype == BF16:
        return worst(names, outs, plain, exact, BF16)
    shares = []
    for what, y, simple, ref in zip(names, outs, plain, exact, strict=True):
        assert y.shape == ref.shape and y.dtype == simple.dtype, f"{what}: {tuple(y.shape)}"
        few = min(1, ref.abs().max().item() / 0.1)  # of an output that all but cancels
        shares.append(bounded(what, error(y, ref) * few, max(1e-6, factor * K**0.5)))
    return max(shares)


ROWS = (  # dtype R K
    (BF16, (1, 1), (2049, 5000)), (FP32, (1, 1), (65, 128)), (BF16, (2, 16), (65, 3000)),
    (FP32, (2, 16), (130, 1000)), (BF16, (1, 1), (513, 1024)), (BF16, (2, 16), (17, 32)),
    (FP32, (1, 1), (2049, 4096)), (BF16, (2, 16), (4097, 5000)), (BF16, (1, 1), (17, 3000)),
    (BF16, (1, 1), (300, 1000)), (BF16, (17, 64), (65, 1000)), (FP32, (17, 64), (65, 300)),
    (BF16, (17, 64), (33, 500)))
PARTS = (  # of products: n matrices, all but the last of multiples of `unit` rows; last have biases
    (16, 3, 0, None), (16, 2, 1, "norm"), (64, 3, 1, "rms"), (16, 4, 3, None), (32, 4, 1, "rms"),
    (16, 2, 2, "norm"), (16, 1, 1, "rms"), (16, 1, 0, "onto"), (16, 3, 3, "norm"),
    (16, 1, 0, "onto"), (32, 3, 1, "rms"), (16, 1, 0, "onto"), (16, 2, 1, "norm"))


@kernel("dtype R K unit n biased also",
        *(rows + parts for rows, parts in zip(ROWS, PARTS, strict=True)))
def products(case, dtype, R, K, unit, n, biased, also):
    """also: the last product is of x / "rms", or all are of x under a "norm", or the sum "onto"."""
    R, K = case.size("R", *R), case.size("K", *K)
    sizes = [*(unit * case.rng.randint(1, 8) for _ in range(n - 1)), case.size("last", 1, 300)]
    case.drawn["sizes"] = sizes
    x, weights = matrices(case, dtype, R, K, sizes)
    biases = [draw(N, dtype=dtype, seed=case.seed()) for N in sizes[n - biased:]]
    eps = 1e-6 if also in ("rms", "norm") else None
    norm = draw(K, dtype=dtype, seed=case.seed()) if also == "norm" else None
    onto = draw(*x.shape[:2], sizes[0], dtype=dtype, seed=case.seed()) if also == "onto" else None

    def plain(x, norm, onto, *rest):
        weights, biases = rest[:n], [None] * (n - biased) + [*rest[n:]]
        normed = F.rms_norm(x, (K,), norm, eps) if eps else x
        inputs = [x if norm is None else normed] * (n - 1) + [normed]
        ys = [F.linear(*of_one) for of_one in zip(inputs, weights, biases, strict=True)]
        return ys if onto is None else [onto + ys[0]]

    return (lambda: block.products(x, weights, biases, eps, norm, onto),
            lambda outs: compare_products(outs, plain, (x, norm, onto, *weights, *biases), K))


@kernel("dtype R K normed", *(row + (i in (2, 4, 6, 10),) for i, row in enumerate(ROWS)))
def swiglu_products(case, dtype, R, K, normed):
    R, K, N = case.size("R", *R), case.size("K", *K), case.size("N", 1, 300)
    x, (gate, up) = matrices(case, dtype, R, K, [N, N])
    norm = draw(K, dtype=dtype, seed=case.seed()) if normed else None

    def plain(x, norm, gate, up):
        x = x if norm is None else F.rms_norm(x, (K,), norm, 1e-6)
        return [F.silu(F.linear(x, gate)) * F.linear(x, up)]

    return (lambda: [block.swiglu_products(x, gate, up, 1e-6 if normed else None, norm)],
            lambda outs: compare_products(outs, plain, (x, norm, gate, up), K, factor=2e-7))


@kernel("dtype C", (BF16, (1, 16)), (FP32, (17, 64)), (BF16, (65, 256)), (FP32, (257, 1024)),
        (BF16, (1025, 2048)), (BF16, (2049, 4096)), (FP32, (4097, 8192)))
def add_norm(case, dtype, C):
    shape = case.size("B", 1, 4), case.size("T", 1, 60), case.size("C", *C)
    x, y = draw(2, *shape, dtype=dtype, seed=case.seed())
    y, weight = 3 * y, draw(shape[2], dtype=dtype, seed=case.seed())
    case.rows(x, y)
    plain = lambda x, y, w: x + rms_norm(y, w)
    return (lambda: [block.add_norm(x, y, weight, 1e-6)],
            lambda outs: compare(outs[0], plain, x, y, weight))


@kernel("H KV D dtype normed one_angle", (1, 1, 16, FP32, True, True),
        (3, 1, 32, BF16, True, False), (4, 2, 64, BF16, False, True),
        (8, 4, 128, BF16, "head", True), (32, 32, 128, BF16, True, False),
        (5, 5, 64, FP32, "head", False), (9, 3, 64, BF16, True, True))
def norm_rotate(case, H, KV, D, dtype, normed, one_angle):
    B, T = case.size("B", 1, 4), case.size("T", 1, 2000 if H * D < 512 else 100)
    both = draw(B, T, H + KV + 2, D, dtype=dtype, seed=case.seed())
    xs = both[:, :, 1:H + 1], both[:, :, H + 1:-1]  # as one product leaves q and k
    weights = [draw(D if normed == "head" else x.shape[2] * D, dtype=dtype, seed=case.seed())
               if normed else None for x in xs]
    angle = 3 * draw(1 if one_angle else B, T, 1, D // 2, seed=case.seed())
    case.rows(both)
    angles = angle.cos(), angle.sin()
    return (lambda: [*block.norm_rotate(*xs, *weights, 1e-6, *angles)],
            lambda outs: max(compare(out, norm_and_rotate, x, weight, *angles)
                             for out, x, weight in zip(outs, xs, weights, strict=True)))


@kernel("dtype", (BF16,), (FP32,))
def swiglu(case, dtype):
    shape = case.size("R", 1, 200), case.size("N", 1, 5000)
    gate, up = draw(2, *shape, dtype=dtype, seed=case.seed())
    gate = 4 * gate
    case.rows(gate, up)

    def run():
        there = gate.clone()
        y = block.swiglu(there, up)
        assert y.data_ptr() == there.data_ptr(), "a second large tensor where one is enough"
        return [y]

    return run, lambda outs: compare(outs[0], lambda gate, up: F.silu(gate) * up, gate, up)


# ---------------------------------------------------------------- Quest's step, TopK, SnapKV

CACHES = (  # H KV D block_size Tk dtype
    (2, 2, 16, 1, (1, 300), FP32), (4, 1, 64, 8, (1, 2000), FP32),
    (8, 1, 128, 16, (200, 2000), BF16), (12, 4, 32, 64, (1, 1000), BF16),
    (3, 1, 16, 12, (1, 2000), BF16), (4, 2, 64, 100, (100, 2000), FP32),
    (2, 2, 128, 64, (64, 600), FP32), (16, 1, 64, 32, (8000, 12000), BF16))


def draw_cache(case, H, KV, D, Tk, dtype, low=1, name="used", Tq=1):
    """
    q (B, Tq, H, D), a view of a packed projection, and k, v (B, Tk, KV, D), slices of a larger
    cache, with NaN in all that may not be read; used (B,).
    """
    Tk, B = case.size("Tk", *Tk), case.size("B", 1, 4)
    used = case.lengths(name, B, Tk, low)
    q = draw(B, Tq, H + 2 * KV, D, dtype=dtype, seed=case.seed())[:, :, :H]
    k, v = (draw(2, B, Tk + 5, KV, D, dtype=dtype, seed=case.seed()) + 0.5)[:, :, :Tk]
    for x in k, v:
        x[torch.arange(Tk, device=DEVICE) >= used[:, None]] = nan
    case.rows(q, k, v)
    return q, k, v, used


def behind(k, v, end, value):
    """
    k and v with this value in the slots from `end` on, which no query may read: slices of a larger
    cache, NaN beyond.
    """
    late = (torch.arange(k.shape[1], device=DEVICE) >= end[:, None])[..., None, None]
    return [F.pad(x.masked_fill(late, value), (0, 0, 0, 0, 0, 5), value=nan)[:, :x.shape[1]]
            for x in (k, v)]


def bounds_of(k, used, block_size):
    """Of each block the channels' least and largest, 0 where nothing is filled."""
    filled = torch.arange(k.shape[1], device=DEVICE) < used[:, None]
    filled = to_blocks(filled, block_size)[..., None, None]
    k, empty = to_blocks(k, block_size), ~filled.any(2)
    return (k.where(filled, inf).amin(2).masked_fill(empty, 0),
            k.where(filled, -inf).amax(2).masked_fill(empty, 0))


@kernel("H KV D block_size Tk dtype", *CACHES)
def block_bounds(case, H, KV, D, block_size, Tk, dtype):
    _, k, _, used = draw_cache(case, H, KV, D, Tk, dtype, low=0)

    def check(outs):
        for what, out, ref in zip(("low", "high"), outs, bounds_of(k, used, block_size)):
            assert out.dtype == dtype and torch.equal(out, ref), f"{what}: not the least or largest"
    return lambda: list(quest.block_bounds(k, used, block_size)), check


@kernel("H KV D block_size Tk dtype", *CACHES)
def quest_scores(case, H, KV, D, block_size, Tk, dtype):
    q, k, v, used = draw_cache(case, H, KV, D, Tk, dtype)
    # slices of larger bounds, which end in NaN
    low, high = (F.pad(x, (0, 0, 0, 0, 0, 3), value=nan)[:, :x.shape[1]]
                 for x in bounds_of(k, used, block_size))
    keep = case.pick("keep", (True, True), (False, False), (True, False), (False, True))

    def check(outs):
        scores, cache = outs[0], layer_cache(*behind(k, v, used, 0), used)
        method = Quest(2 * block_size, block_size, *keep)
        free = method.score(q, cache.k, cache.filled_slots())  # (B, KV, 1, N)
        ref = method.forced(free, used).squeeze(2)
        same_forced(scores, ref)
        off = (scores - ref).where(ref.isfinite(), 0).abs().max().item()
        return bounded("scores, at most", off, 1e-5 * free.abs().max().item())
    return lambda: [quest.quest_scores(q, low, high, used, block_size, *keep)], check


@kernel("N", (1, 32), (33, 64), (65, 1000), (2049, 4096), (8193, 16384), (32769, 60000))
def select(case, *N):
    """Of equal scores the first, NaN below all numbers, -inf never."""
    R, N = case.size("R", 1, 6), case.size("N", *N)
    S, kind = case.size("S", 1, N + 3), case.pick(
        "kind", "normal", "ties", "wild", "special", "positive")
    source = torch.Generator().manual_seed(case.seed())
    scores = torch.randn(N, R, generator=source)
    if kind == "ties":
        scores = (2 * scores).round()
    if kind == "positive":  # all reach what begins the search
        scores = scores.abs() + 2
    if kind == "wild":
        scores *= 10.0 ** torch.randint(-38, 38, scores.shape, generator=source)
    if kind == "special":
        few = torch.tensor([-inf, inf, 0.0, -0.0, 1.0, -1.0, nan, 3.4e38, -3.4e38, 1e-45])
        scores = few[torch.randint(len(few), scores.shape, generator=source)]
    scores = scores.to(DEVICE).T
    if case.pick("contiguous", True, False):
        scores = scores.contiguous()
    case.rows(scores)

    def check(outs):
        # -1e300 for NaN is below all numbers; -0 becomes 0
        rank = scores.double().where(~scores.isnan(), -1e300) + 0.0
        best = rank.sort(dim=-1, descending=True, stable=True).indices[:, :S]
        best = best.where(rank.gather(-1, best) > -inf, N).sort(-1).values
        best = F.pad(best.where(best < N, -1), (0, S - best.shape[1]), value=-1)
        others = (outs[0] != best).sum()
        assert outs[0].dtype == torch.int32
        assert others == 0, f"{others} of {best.numel()} are others"
    return lambda: [topk.select(scores, S)], check


@kernel("H KV D block_size Tk dtype", *CACHES)
def quest_attend(case, H, KV, D, block_size, Tk, dtype):
    q, k, v, used = draw_cache(case, H, KV, D, Tk, dtype)
    N = -(-k.shape[1] // block_size)
    S = case.size("S", 1, N)
    source = torch.Generator().manual_seed(case.seed())
    chosen = torch.rand(len(q), KV, N, generator=source).argsort(-1)[..., :S].int().to(DEVICE)
    chosen[..., S // 2] = -1  # nothing, in the middle
    chosen[..., 0] = 0        # something to read in every row

    def check(outs):
        y, slots = outs
        expected = chosen.long()[..., None] * block_size + torch.arange(block_size, device=DEVICE)
        unread = (chosen < 0)[..., None] | (expected >= used[:, None, None, None])
        assert torch.equal(slots, expected.masked_fill(unread, -1).flatten(2)), "reports others"
        return compare(y, lambda *x: attend_to_slots(*x, slots), q, *behind(k, v, used, 0))
    return lambda: list(quest.quest_attend(q, k, v, chosen, used, block_size)), check


@kernel("H KV D block_size Tk dtype", *CACHES)
def attend_slots(case, H, KV, D, _, Tk, dtype):
    q, k, v, used = draw_cache(case, H, KV, D, Tk, dtype)

    def check(outs):
        keep = (torch.arange(k.shape[1], device=DEVICE) < used[:, None])[:, None, None]
        return compare(outs[0], lambda *x: attend(*x, keep), q, *behind(k, v, used, 0))
    return lambda: [quest.attend_slots(q, k, v, used)], check


@kernel("H KV D W kernel Tk dtype",
        (2, 2, 16, 16, 5, (1, 500), FP32), (4, 1, 64, 8, 7, (1, 2000), FP32),
        (8, 1, 32, 20, 1, (1, 1000), BF16), (2, 2, 128, 64, 5, (64, 2000), BF16),
        (8, 2, 64, 32, 3, (32, 1000), BF16), (3, 1, 16, 33, 5, (1, 500), FP32),
        (1, 1, 64, 64, 5, (8000, 12000), BF16))
def snapkv_scores(case, H, KV, D, W, kernel, Tk, dtype):
    q, k, v, lengths = draw_cache(case, H, KV, D, Tk, dtype, name="lengths", Tq=W)
    q = 3 * q

    def check(outs):
        scores, (clean, _) = outs[0], behind(k, v, lengths, 0)
        method = SnapKV(W + 1, W, kernel)
        plain, exact = (method.score(*x, lengths) for x in ((q, clean), doubled((q, clean))))
        ref = method.forced(exact, lengths)
        same_forced(scores, ref)
        free = ref.isfinite()
        if not free.any():
            return 0
        return worst(["scores"], [scores[free]], [plain[free]], [exact[free]], dtype)
    return lambda: [snapkv.snapkv_scores(q, k, lengths, kernel)], check


# ---------------------------------------------------------------- MoBA's prompt

PROMPTS = (  # H KV D block_size S keep_first T dtype
    (2, 1, 64, 8, 4, True, (1, 256), FP32), (4, 1, 16, 16, 3, False, (100, 1000), FP32),
    (8, 1, 32, 64, 2, True, (1, 800), FP32), (2, 2, 16, 24, 3, True, (1, 700), FP32),
    (2, 2, 64, 8, 4, False, (1000, 2000), BF16), (8, 1, 128, 16, 5, True, (1, 500), BF16),
    (4, 1, 64, 64, 2, True, (64, 1000), BF16), (1, 1, 128, 128, 2, True, (1, 2000), BF16),
    (1, 1, 16, 160, 2, True, (1, 1500), BF16),  # a block longer than a tile
    (3, 1, 32, 32, 6, True, (1, 1000), BF16), (1, 1, 64, 64, 8, True, (4000, 6000), BF16))


def draw_prompt(B, Tq, H, KV, D, Tk, dtype, seed):
    """q, k, v as strided views: q of a wider projection, k, v of larger caches. Values fit bf16."""
    q = draw(B, Tq, H + 2, D, dtype=BF16, seed=seed).to(dtype)[:, :, 1:-1]
    k, v = draw(2, B, Tk + 3, KV, D, dtype=BF16, seed=seed + 1).to(dtype)[:, :, :Tk]
    return q, k, v


def prompt_of(case, H, KV, D, T, dtype):
    """
    q, k, v, start, and k and v without NaN for the references: whole prompts, or chunks of longer
    ones, some of which end in padding.
    """
    Tq = case.size("Tq", *T)
    B = case.size("B", 1, 3) if H * Tq**2 < 2**21 else 1  # references take fp64 of that size
    Tk = Tq
    if not case.pick("whole", True, False):
        Tk = max(Tq, case.size("Tk", Tq * (shrink if T[1] > 64 else 1), T[1]))
    q, k, v = draw_prompt(B, Tq, H, KV, D, Tk, dtype, case.seed())
    padding = case.pick("padding", 0, 0, Tq // 2)
    start = case.lengths("start", B, Tk - Tq + padding, low=0)
    case.rows(q, k, v)
    return q, *behind(k, v, start + Tq, nan), start, behind(k, v, start + Tq, 0)


def own_blocks(q, k, start, block_size):
    """(B, Tq); padding past the last slot counts as standing in it."""
    return query_slots(q, start).clamp(max=k.shape[1] - 1) // block_size


def mask_of(chosen, q, k, start, block_size):
    """The keys that `chosen` lets each query read, the own block's too: (B, H, Tq, Tk)."""
    slot = query_slots(q, start).clamp(max=k.shape[1] - 1)[:, None, :, None]  # (B, 1, Tq, 1)
    key = torch.arange(k.shape[1], device=q.device)
    listed = (chosen.unsqueeze(-1) == key // block_size).any(3)               # (B, KV, Tq, Tk)
    keep = (listed | (key // block_size == slot // block_size)) & (key <= slot)
    return keep.repeat_interleave(q.shape[2] // k.shape[2], dim=1)


def assert_routes(chosen, q, k, start, block_size, S, keep_first):
    """
    `chosen` follows the rule of sparse.MoBA: own block, first if forced, best of the rest.
    Near-ties may swap.
    """
    B, KV, Tq, _ = chosen.shape
    N = -(-k.shape[1] // block_size)
    assert chosen.dtype == torch.int32 and chosen.shape[3] == S
    own = own_blocks(q, k, start, block_size)[:, None, :].expand(B, KV, Tq)
    n = chosen.long()
    number = (n >= 0).sum(-1)
    place = torch.arange(S, device=n.device)
    assert torch.equal(number, (own + 1).clamp(max=S)), "another number of blocks"
    assert torch.equal(n >= 0, place < number[..., None]), "-1 not at the end"
    assert ((n[..., 1:] > n[..., :-1]) | (n[..., 1:] < 0)).all(), "not ascending, or one twice"
    last = n.gather(-1, (number - 1)[..., None]).squeeze(-1)
    assert torch.equal(last, own), "the last is not the own block"
    if keep_first:
        assert (n[..., 0] == 0).all(), "the first block is missing"

    scores = MoBA(2 * block_size, block_size, keep_first).score(q.double(), k.double()).float()
    block = torch.arange(N, device=n.device)
    forced = (block == own[..., None]) | ((block == 0) & keep_first)
    kept = torch.zeros(B, KV, Tq, N + 1, dtype=torch.bool, device=n.device)
    kept = kept.scatter(-1, n.where(n >= 0, N), True)[..., :N]
    worst_in = scores.where(kept & ~forced, inf).amin(-1)
    best_out = scores.where(~kept & ~forced & (block < own[..., None]), -inf).amax(-1)
    swapped = (best_out - worst_in).max().item()
    tolerance = 1e-5 if q.dtype == FP32 else 1e-4 * scores.abs().max().item()
    assert swapped <= tolerance, f"a block left out scores {swapped:.2e} more than one chosen"


@kernel("H KV D block_size S keep_first T dtype", *PROMPTS)
def moba_route(case, H, KV, D, block_size, S, keep_first, T, dtype):
    q, k, _, start, (k_clean, _) = prompt_of(case, H, KV, D, T, dtype)
    settings = start, block_size, S, keep_first
    return (lambda: [routing.moba_route(q, k, *settings)],
            lambda outs: assert_routes(outs[0], q, k_clean, *settings))


@kernel("H KV D block_size S keep_first T dtype", *PROMPTS)
def moba_attend(case, H, KV, D, block_size, S, keep_first, T, dtype):
    """Any choice in any order, forward and backward."""
    q, k, v, start, clean = prompt_of(case, H, KV, D, T, dtype)
    dy = draw(*q.shape, dtype=BF16, seed=case.seed()).to(dtype)
    case.rows(dy)
    (B, Tq), N = q.shape[:2], -(-k.shape[1] // block_size)
    own = own_blocks(q, k, start, block_size)[:, None, :, None].int().expand(B, KV, Tq, 1)
    source = torch.Generator().manual_seed(case.seed())
    others = torch.rand(B, KV, Tq, max(N, S), generator=source).argsort(-1)[..., :S - 1]
    others = others.int().to(DEVICE)
    # the second block is nobody's choice but its own queries'
    others = others.where((others != own) & (others < N) & (others != 1), -1)
    chosen = torch.cat([others, own], dim=-1)
    if case.pick("own_first", True, False):
        chosen = chosen.flip(-1)

    def check(outs):
        keep = mask_of(chosen, q, k, start, block_size)
        plain, exact = (with_gradients(lambda *x: attend(*x, keep), x, [dy])
                        for x in ((q, *clean), doubled((q, *clean))))
        assert all(x.is_contiguous() for x in outs)
        return worst(("y", "dq", "dk", "dv"), outs, plain, exact, dtype)
    ours = lambda *x: attend_to_chosen(*x, chosen, start, block_size)
    return lambda: with_gradients(ours, (q, k, v), [dy]), check


# ---------------------------------------------------------------- dilated attention

PATTERNS = {  # dilation, local, initial
    "arl": (8, 0, 0), "sparse chunks": (16, 0, 0), "all three": (8, 5, 3),
    "streaming": (None, 6, 2), "own only": (None, 0, 0), "dense": (1, 0, 0),
    "window": (None, 64, 0),
    "wide window": (4, 40, 0), "initial beyond a chunk": (64, 16, 70),
    "everything": (None, 2**40, 2**40), "far": (2**40, 20, 30), "whole tiles": (2, 120, 3),
}
ARL, RATPLUS = (64, 0, 0), (16, 256, 4)  # as the paper has them


def plainly_dilated(pattern, start):
    """sparse.Dilated; written out for fp64, which its own form rounds to fp32. Padding gives 0."""
    def attention(q, k, v):
        slot = query_slots(q, start)
        if q.dtype != torch.float64:
            y, _ = Dilated(*pattern).prefill(q, k, v, start, None)
        else:
            key = torch.arange(k.shape[1], device=DEVICE)
            y = attend(q, k, v, Dilated(*pattern).pattern(slot[:, None, :, None], key))
        return y.where((slot < k.shape[1])[..., None, None], 0)
    return attention


@kernel("H KV D pattern T dtype",
        # the number of splits, and a window longer than T, are compiled for: narrow ranges of T
        (2, 1, 16, PATTERNS["all three"], (1, 100), FP32),
        (4, 1, 64, PATTERNS["arl"], (1, 250), BF16),
        (8, 8, 32, PATTERNS["sparse chunks"], (100, 500), FP32),
        (1, 1, 128, PATTERNS["streaming"], (1, 600), BF16),
        (6, 2, 16, PATTERNS["wide window"], (41, 200), BF16),
        (2, 2, 64, PATTERNS["initial beyond a chunk"], (17, 400), BF16),
        (1, 1, 32, PATTERNS["dense"], (1, 160), FP32),
        (3, 1, 64, PATTERNS["all three"], (300, 500), BF16),
        (4, 4, 128, ARL, (500, 1500), BF16), (1, 1, 64, RATPLUS, (4000, 5000), BF16),
        # SmolLM2's heads; a group of more heads than a tile of a decoding step has rows
        (9, 3, 64, PATTERNS["window"], (100, 300), BF16),
        (20, 1, 16, PATTERNS["all three"], (20, 100), FP32),
        (20, 1, 32, PATTERNS["arl"], (20, 150), BF16),
        # tiles that all queries of a tile read whole: of shared keys, of their windows
        (3, 1, 16, PATTERNS["whole tiles"], (200, 400), FP32),
        (2, 1, 32, PATTERNS["whole tiles"], (200, 600), BF16))
def dilated(case, H, KV, D, pattern, T, dtype):
    """A whole prompt, forward and backward."""
    T, pattern = case.size("T", *T), case.record("pattern", pattern)
    B = case.size("B", 1, 3) if H * T**2 < 2**21 else 1
    packed = draw(B, T, H + 2 * KV, D, dtype=dtype, seed=case.seed())
    q, k, v = packed.split([H, KV, KV], dim=2)
    dy = draw(B, T, H, D, dtype=dtype, seed=case.seed())
    case.rows(q, k, v, dy)
    if case.pick("gradients", "drawn", "strided") == "strided" and case.spoilt is None:
        dy = torch.ones((), device=DEVICE, dtype=dtype).expand_as(dy)
        v = v.transpose(2, 3).contiguous().transpose(2, 3)  # channels apart
    start = torch.zeros(B, dtype=torch.long, device=DEVICE)

    def check(outs):
        plain, exact = (with_gradients(plainly_dilated(pattern, start), x, [dy])
                        for x in ((q, k, v), doubled((q, k, v))))
        return worst(("y", "dq", "dk", "dv"), outs, plain, exact, dtype)
    ours = lambda *x: dilated_attention(*x, start, *pattern)
    return lambda: with_gradients(ours, (q, k, v), [dy]), check


@kernel("H KV D pattern Tk dtype",
        (2, 1, 16, PATTERNS["all three"], (1, 500), FP32), (4, 1, 64, ARL, (1, 2000), BF16),
        (8, 2, 32, PATTERNS["sparse chunks"], (1, 1000), FP32),
        (1, 1, 128, PATTERNS["streaming"], (1, 600), BF16),
        (6, 2, 16, PATTERNS["wide window"], (41, 500), BF16),
        (16, 1, 64, RATPLUS, (300, 2000), BF16), (4, 1, 128, RATPLUS, (6000, 10000), BF16),
        (20, 1, 32, PATTERNS["all three"], (1, 300), BF16),
        # several splits
        (6, 2, 16, PATTERNS["whole tiles"], (200, 700), FP32),
        (3, 1, 32, PATTERNS["whole tiles"], (200, 3000), BF16))
def dilated_step(case, H, KV, D, pattern, Tk, dtype):
    """One query, or a chunk of them, in a cache; some of them are padding."""
    Tk, B, pattern = case.size("Tk", *Tk), case.size("B", 1, 4), case.record("pattern", pattern)
    Tq = min(Tk, case.size("Tq", 1, 60)) if case.pick("chunk", True, False) else 1
    q = draw(B, Tq, H + 2, D, dtype=dtype, seed=case.seed())[:, :, 1:-1]
    k, v = draw(2, B, Tk + 5, KV, D, dtype=dtype, seed=case.seed())[:, :, :Tk]
    start = case.lengths("start", B, Tk - Tq + case.pick("padding", 0, 0, Tq // 2), low=0)
    case.rows(q, k, v)
    clean = behind(k, v, start + Tq, 0)
    k, v = behind(k, v, start + Tq, nan)
    real = (query_slots(q, start) < Tk)[..., None, None]  # what padding gets is only finite

    def check(outs):
        assert outs[0].isfinite().all(), "padding is not finite"
        return compare(outs[0].where(real, 0), plainly_dilated(pattern, start), q, *clean)
    return lambda: [dilated_attention(q, k, v, start, *pattern)], check
