"""
The edges of the number format, for PyTorch's forms and for the kernels: saturated gates, 131,072 steps, the largest finite
numbers, ties, and NaN, which stays in its row. What is said of one form is said of all of them, and run in each.

What cannot be had, and is not asked for here: products q . k, RMSNorm's squares and sums of weighted rows overflow where their
value does; torch's scaled_dot_product_attention already where a sum of values does (see the test that says so).
"""
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from conftest import DEVICE, assert_close, draw_tokens, error, times, tiny

pytest.importorskip("triton", reason="half of this file is about the kernels")
from triton_ops import backend  # noqa: E402
import kernels  # noqa: E402
from triton_ops import block  # noqa: E402
from triton_ops import dilated  # noqa: E402
from triton_ops import moba  # noqa: E402
from triton_ops import moba_route  # noqa: E402
from triton_ops import quest  # noqa: E402
from infra.loss import chunk_loss, weighted_loss  # noqa: E402
from memory import Decay, effective_length, memory_loop, memory_scan, memory_step  # noqa: E402
from model import Transformer  # noqa: E402
from infra.init import fresh, memory_tensors  # noqa: E402
from sparse import NEVER, Dilated, MoBA, Quest, SnapKV, attend, parse  # noqa: E402

pytestmark = pytest.mark.usefixtures("poisoned")
FP32, BF16 = torch.float32, torch.bfloat16
inf, nan = torch.inf, torch.nan
LARGE = 3.38e38  # the largest bf16 number is 3.39e38, the largest fp32 number 3.40e38
TILE = kernels.TILE["ROWS"] * kernels.TILE["STRIPS"]


def step_by_step(k, v, gate, state):
    """memory_step over a whole sequence."""
    outs = []
    for now in zip(*(x.split(1, dim=1) for x in (k, v, gate))):
        *out, state = memory_step(*now, state)
        outs.append(torch.stack(out))
    return *torch.cat(outs, dim=2), state


def fused_steps(k, v, gate, state):
    """block.decode_step over a whole sequence, without QK-norm and with RoPE's angles at 0: the memory is left."""
    B, T, KV, D = k.shape
    state, cos, sin = state.clone(), *(f(1, 1, 1, D // 2, device=DEVICE) for f in (torch.ones, torch.zeros))
    caches = [x.new_zeros(B, T, KV, D) for x in (k, v)]
    for t, (k_now, v_now, gate_now) in enumerate(zip(*(x.split(1, dim=1) for x in (k, v, gate)))):
        used = torch.full((B,), t + 1, device=DEVICE)
        block.decode_step(k_now, k_now, v_now, gate_now, None, None, 1e-6, cos, sin, state, *caches, None, None, 1, used)
    return *caches, state


SCANS = {"loop": memory_loop, "scan": memory_scan, "kernel": kernels.memory_scan}
FORMS = SCANS | {"step": step_by_step, "fused step": fused_steps}  # the last has no gradients
NAMES = "k~", "v~", "state", "dk", "dv", "dgate", "dstate"


def draw(B, T, dtype=FP32, seed=0, KV=1, D=16):
    """k, v, gate, state, and the gradients of k~, v~ and the last state."""
    source = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=source).to(DEVICE)
    k, v, gate, dk, dv = (rand(B, T, KV, D).to(dtype) for _ in range(5))
    return k, v, 4 * gate, rand(2, B, KV, D), dk, dv, rand(2, B, KV, D)


def length_for(name):
    """Tokens: two tiles of the kernel."""
    return 6 if name == "fused step" else TILE + 5  # launch by launch the interpreter is slow


def large_for(name):
    """The definition's gate gradient is autograd's: a sum over k and v times g (1 - g), 0 * inf at a saturated gate."""
    return 1e37 if name in ("loop", "step") else LARGE


def run(form, k, v, gate, state, dk, dv, dstate):
    """k~, v~, last state, and unless the form is the fused step's the gradients of k, v, gate and state."""
    inputs = [x.detach().requires_grad_(form is not fused_steps) for x in (k, v, gate, state)]
    outputs = form(*inputs)
    return [*(x.detach() for x in outputs),
            *(torch.autograd.grad(outputs, inputs, [dk, dv, dstate.to(outputs[2].dtype)]) if inputs[0].requires_grad else ())]


def pick(values, like, seed):
    """A tensor like `like` of values drawn from a list."""
    values = torch.tensor(values, dtype=torch.float64)
    return values[torch.randint(len(values), like.shape, generator=torch.Generator().manual_seed(seed))].to(like)


# ---------------------------------------------------------------- saturated gates

@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("name", FORMS)
def test_saturated_gates_are_finite_and_right(name, dtype):
    """exp(88) next to the end of fp32, 0 * inf, 1 - g cancelled: in values and gradients of any mix of gates."""
    for seed in range(times(1, 30)):
        k, v, gate, state, *gradients = draw(1, length_for(name), dtype, seed)
        low, high = [-inf, -1e4, -88, -17], [17, 88, 1e4, inf]
        gate = torch.cat([pick(ends, gate[..., channels], seed) for ends, channels in (
            (low, slice(0, 4)), (high, slice(4, 8)), (low + [0] + high, slice(8, 16)))], dim=-1)
        exact = run(memory_loop, *(x.double() for x in (k, v, gate, state, *gradients)))
        for what, out, ref in zip(NAMES, run(FORMS[name], k, v, gate, state, *gradients), exact):
            assert out.isfinite().all(), f"{what}, {seed=}"
            # autograd's sigmoid has g * (1 - g) with a rounded 1 - g, so the plain forms' dgate is off by up to 3e-8 of the state
            assert_close(out.double(), ref, atol=(2e-6 if out.dtype == FP32 else 2e-2) * max(1, ref.abs().max().item()), what=what)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("name", FORMS)
def test_a_gate_of_one_keeps_the_state_bit_for_bit(name, dtype):
    """A state that is rounded, or gains 0 * x, on its way through; and a gradient that does."""
    k, v, gate, state, *gradients = draw(1, length_for(name), dtype, seed=1)
    gate[..., :5], gate[..., 5:10], gate[..., 10:] = 88, 1e4, inf
    large = large_for(name)
    state[..., ::4], state[..., 1::4] = large, -large
    k[:, ::3, :, 10:] = pick([-large, large], k[:, ::3, :, 10:], 1)
    state[..., 14] = 0  # where a gate of 88 would add 6e-39
    k_mem, v_mem, last, *grads = run(FORMS[name], k, v, gate, state, *gradients)
    assert torch.equal(last, state)
    for out, start in zip((k_mem, v_mem), state):
        assert torch.equal(out, start.to(dtype)[:, None].expand_as(out))
    for what, x in zip(NAMES[3:6], grads):
        assert x.isfinite().all() and (x[..., 10:] == 0).all(), what


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("name", FORMS)
def test_a_gate_of_zero_gives_x_bit_for_bit(name, dtype):
    """A g that stops short of 0: 2**-126 of a large state is 4. Or a 1 - g that is not quite 1."""
    k, v, gate, state, *gradients = draw(1, length_for(name), dtype, seed=2)
    gate[..., :5], gate[..., 5:10], gate[..., 10:] = -88, -1e4, -inf
    large = large_for(name)
    state[..., 5:] = pick([-large, large, 0], state[..., 5:], 0)  # at -88 g is 6e-39, which leaves 2 of the largest state
    k[:, ::3, :, 5:] = pick([-large, large], k[:, ::3, :, 5:], 1)
    k_mem, v_mem, last, *grads = run(FORMS[name], k, v, gate, state, *gradients)
    assert torch.equal(k_mem, k) and torch.equal(v_mem, v) and torch.equal(last, torch.stack([k, v])[:, :, -1].float())
    if grads:
        dk, dv, dgate, dstate = grads
        assert torch.equal(dk[:, :-1], gradients[0][:, :-1]) and torch.equal(dv[:, :-1], gradients[1][:, :-1])
        assert dgate.isfinite().all() and (dstate.abs() < 1e-37).all()
        assert (dgate[..., 10:] == 0).all() and (dstate[..., 10:] == 0).all()


@pytest.mark.parametrize("name", FORMS)
def test_padding_changes_nothing(name):
    """Rows of different lengths: a gate of +inf over whatever finite padding holds, in values and gradients."""
    T = length_for(name)
    lengths, large = (T, 4, 0), large_for(name)
    k, v, gate, state, *gradients = draw(3, T, seed=3)
    for b, length in enumerate(lengths):
        gate[b, length:] = inf
        for x in k, v:
            x[b, length:] = pick([-large, large, 0, 1], x[b, length:], b)
        for x in gradients[:2]:
            x[b, length:] = 0
    padded = run(FORMS[name], k, v, gate, state, *gradients)
    assert all(x.isfinite().all() for x in padded) and all((x[2] == 0).all() for x in padded[3:6])
    assert torch.equal(padded[2][:, 2], state[:, 2])
    row = slice(1, 2)  # alone, without padding
    alone = run(FORMS[name], *(x[row, :4] for x in (k, v, gate)), state[:, row], *(x[row, :4] for x in gradients[:2]), gradients[2][:, row])
    for what, out, ref in zip(NAMES, padded, alone):
        if "state" in what:
            assert_close(out[:, row], ref, atol=1e-6, what=what)
        else:
            assert_close(out[row, :4], ref, atol=1e-6, what=what)
            assert (out[row, 4:] == (0 if what[0] == "d" else out[row, 3:4])).all(), f"{what} at padding"


# ---------------------------------------------------------------- 131,072 steps

LONG = 131072
KINDS = "drawn", "g = 0.99", "g = 0.9999", "g = 1 - 1e-6"  # a head for each
PIECE = 128  # autograd writes all of a loop's gate gradient at each of its steps: backward in pieces


def draw_long(T):
    """k, v, gate, and the gradients of k~ and v~, of mean 0 and 1: a sum of many rounding errors of one sign shows."""
    k, v, gate, state, dk, dv, _ = draw(1, T, seed=T, KV=len(KINDS), D=4)
    k, v, dk = k + 1, v + 0.1, dk + 1
    for head, logit in enumerate((4.6, 9.21, 13.8), start=1):
        gate[:, :, head] = logit
    return k, v, gate, dk, dv


def whole(form, k, v, gate, dk, dv):
    state = torch.zeros(2, 1, *k.shape[2:], dtype=torch.promote_types(k.dtype, FP32), device=DEVICE)
    return run(form, k, v, gate, state, dk, dv, torch.zeros_like(state))[:6]


def in_pieces(k, v, gate, dk, dv):
    """`whole` of memory_loop, one piece after the other, and backwards from the last to the first."""
    pieces = list(zip(*(x.split(PIECE, dim=1) for x in (k, v, gate, dk, dv))))
    state = torch.zeros(2, 1, *k.shape[2:], dtype=torch.promote_types(k.dtype, FP32), device=DEVICE)
    dstate, starts, outs, grads = torch.zeros_like(state), [], [], []
    with torch.no_grad():
        for piece in pieces:
            starts.append(state)
            *out, state = memory_loop(*piece[:3], state)
            outs.append(torch.stack(out))
    for piece, start in zip(reversed(pieces), reversed(starts)):
        *some, dstate = run(memory_loop, *piece[:3], start, *piece[3:], dstate)[3:]
        grads.append(torch.stack(some))
    return *torch.cat(outs, dim=2), state, *torch.cat(grads[::-1], dim=2)


def errors(outs, refs):
    """{what: rms error of each kind of gate}"""
    return {what: torch.tensor([error(out.movedim(-2, 0)[head], ref.movedim(-2, 0)[head]) for head in range(len(KINDS))])
            for what, out, ref in zip(NAMES, outs, refs)}


def assert_no_worse(form, loop, T):
    for what in form:
        print(f"{T=:7,} {what:6}" + "".join(f"  {kind}: {mine:.1e} (loop {ref:.1e})" for kind, mine, ref in zip(KINDS, form[what], loop[what])))
        allowed = 2 * loop[what] + 1e-7
        assert (form[what] <= allowed).all(), f"{what} at {T=}: errors {form[what].tolist()}, the loop's {loop[what].tolist()}"


@pytest.mark.parametrize("T", [1024, 8192, LONG])
def test_errors_grow_with_length_no_faster_than_the_loops(T):
    """
    Decays multiplied, or terms summed, so that errors add up over 131,072 steps where the loop's, in fp32 too, do not.
    In CI the longest without the loop's gradients, and of the interpreter's the middle one.
    """
    inputs = draw_long(T)
    exact = whole(memory_scan, *(x.double() for x in inputs))  # test_memory.py holds it to the loop in fp64
    if T == LONG and times(True, False):
        with torch.no_grad():
            loop = errors(memory_loop(*inputs[:3]), exact)
    else:
        loop = errors(in_pieces(*inputs), exact)
        assert max(x.max() for x in errors(in_pieces(*(x.double() for x in inputs)), exact).values()) < 1e-10
    plain = errors(whole(memory_scan, *inputs), exact)
    assert_no_worse({what: plain[what] for what in loop}, loop, T)
    if T == 8192 or DEVICE == "cuda" or times(False, True):
        with pytest.MonkeyPatch.context() as patch:
            if DEVICE == "cpu":  # the interpreter's time goes by rows, one after the other
                patch.setitem(kernels.TILE, "STRIPS", 128)
                patch.setitem(kernels.TILE, "ROWS", max(4, T // 512))
            kernel = errors(whole(kernels.memory_scan, *inputs), exact)
        assert_no_worse({what: kernel[what] for what in loop}, loop, T)


# ---------------------------------------------------------------- the largest numbers

def assert_right(out, ref, dtype, what="y", terms=0.0):
    """Finite, and close to `ref` (fp64) for its size, or that of the terms that cancel in it."""
    assert out.isfinite().all(), f"{what}: {(~out.isfinite()).sum()} elements are not finite"
    assert_close(out.double(), ref, atol=(1e-5 if dtype == FP32 else 1e-2) * max(terms, ref.abs().max().item()), what=what)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("name", FORMS)
def test_memory_of_the_largest_numbers(name, dtype):
    """An average of numbers of either sign that overflows where no number does, or k - m in its gradient."""
    k, v, gate, state, *gradients = draw(1, length_for(name), dtype, seed=4)
    gate[..., ::3] = 9.21  # g = 0.9999
    k, v, state = pick([-LARGE, LARGE], k, 5), torch.full_like(v, LARGE), pick([-LARGE, LARGE], state, 6)
    gradients = [x * (1 if FORMS[name] is kernels.memory_scan else 1e-3) for x in gradients]  # see large_for
    exact = run(memory_loop, *(x.double() for x in (k, v, gate, state, *gradients)))
    for what, out, ref in zip(NAMES, run(FORMS[name], k, v, gate, state, *gradients), exact):
        if ref.abs().max() < (3.39e38 if out.dtype == BF16 else 3.4e38):
            assert_right(out, ref, dtype, what)
        else:
            assert what == "dgate"


def values(like, signs, seed=7):
    """The largest numbers: all alike, whose mean is no larger but whose sum is; or of either sign."""
    return torch.full_like(like, 3.3e38) if signs == "one sign" else pick([-3.3e38, 3.3e38], like, seed)


def draw_qkv(B, Tq, H, KV, D, dtype, Tk=None, seed=0, equal=False):
    """q, k, v. equal: q = 0 makes all scores equal."""
    source = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, T, heads, D, generator=source).to(DEVICE, dtype) for T, heads in ((Tq, H), (Tk or Tq, KV), (Tk or Tq, KV)))
    return q * (not equal), k, v


def softmax_over(q, k, v, keep):
    """Eq. 4 in fp64, normalised before it is summed. keep (B, KV, Tq, Tk)."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    G = q.shape[1] // k.shape[1]
    k, v, keep = (x.repeat_interleave(G, dim=1) for x in (k, v, keep))
    scores = (q @ k.transpose(2, 3) * q.shape[3] ** -0.5).masked_fill(~keep, -inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def gradients_of(f, q, k, v, dy):
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    y = f(*inputs)
    return y.detach(), *torch.autograd.grad(y, inputs, dy.to(y.dtype))


def assert_attention(f, q, k, v, keep, gradients=True):
    """f is softmax_over(keep), for values up to the largest numbers; and its gradients, for dy that keep dy . v finite."""
    dy = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE) * 1e-4
    if not gradients:
        return assert_right(f(q, k, v), softmax_over(q, k, v, keep), q.dtype)
    ours, exact = gradients_of(f, q, k, v, dy), gradients_of(lambda *x: softmax_over(*x, keep), q.double(), k.double(), v.double(), dy)
    terms = 0.0 if (v != v[:1, :1, :1, :1]).any() else 1e-4 * LARGE  # of equal values dq and dk are 0: all dy . v - dy . y cancel
    for what, out, ref in zip(("y", "dq", "dk", "dv"), ours, exact):
        assert_right(out, ref, q.dtype, what, terms if what in ("dq", "dk") else 0.0)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("signs, equal", times([("one sign", True), ("both signs", False)],
                                               [(signs, equal) for signs in ("one sign", "both signs") for equal in (True, False)]))
def test_attention_kernels_of_the_largest_values(signs, equal, dtype, monkeypatch):
    """p v summed before it is divided, with p up to 1: two values of 3.3e38 overflow, where their mean does not."""
    # a decoding step: all slots or blocks of them, in one split or several
    used = torch.tensor([150, 9], device=DEVICE)
    q, k, v = draw_qkv(2, 1, 4, 2, 16, dtype, Tk=150, seed=8, equal=equal)
    v = values(v, signs)
    slot = torch.arange(150, device=DEVICE)
    filled = (slot < used[:, None])[:, None, None].expand(2, 2, 1, 150)
    for programs in 1, 264:
        monkeypatch.setitem(quest.ATTEND, "programs", programs)
        assert_attention(lambda *x: quest.attend_slots(*x, used), q, k, v, filled, gradients=False)
        for block_size, blocks in (8, [0, 1, 5, 18]), (64, [0, 2]):  # indices as a tile, and one for a tile
            chosen = torch.tensor(blocks, dtype=torch.int32, device=DEVICE).expand(2, 2, -1).contiguous()
            read = filled & (slot // block_size == torch.tensor(blocks, device=DEVICE)[:, None]).any(0)
            assert_attention(lambda *x: quest.quest_attend(*x, chosen, used, block_size)[0], q, k, v, read, gradients=False)

    T, start = 70, torch.zeros(1, dtype=torch.long, device=DEVICE)
    q, k, v = draw_qkv(1, T, 2, 1, 16, dtype, seed=9, equal=equal)
    v, i, j = values(v, signs), *(torch.arange(T, device=DEVICE) for _ in "ij")
    i = i[:, None]
    for pattern in (8, 5, 3), (8, 0, 0):
        keep = Dilated(*pattern).pattern(i, j).expand(1, 1, T, T)
        assert_attention(lambda *x: dilated.dilated(*x, start, *pattern), q, k, v, keep)
    last = torch.tensor([T - 1], device=DEVICE)
    assert_attention(lambda *x: dilated.dilated(*x, last, 8, 5, 3), q[:, -1:], k, v, Dilated(8, 5, 3).pattern(T - 1, j).expand(1, 1, 1, T),
                     gradients=False)

    for block_size in 16, 48:  # a block in one tile of keys, and longer than it
        monkeypatch.setitem(moba.GATHER, "BLOCK_N", 32)
        monkeypatch.setitem(moba.GATHER_LONG, "BLOCK_N", 32)
        own = i // block_size
        chosen = torch.cat([own * 0, own.where(own > 0, -1)], dim=1).view(1, 1, T, 2).int()  # the first and its own
        keep = ((j // block_size == own) | (j // block_size == 0)) & (j <= i)
        assert_attention(lambda *x: moba.moba_attend(*x, chosen, start, block_size), q, k, v, keep.expand(1, 1, T, T))


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_plain_attention_of_large_values(dtype):
    """
    torch's scaled_dot_product_attention, which `attend` is, sums p v before it divides: on a CPU values above the largest
    number / keys overflow in it, below they are right. Dilated's shared keys divide first, and reach as far as the kernels.
    """
    q, k, v = draw_qkv(1, 40, 2, 1, 16, dtype, seed=10, equal=True)
    causal = torch.ones(40, 40, dtype=torch.bool, device=DEVICE).tril().expand(1, 1, 40, 40)
    for f in (lambda *x: attend(*x, causal=True)), (lambda *x: attend(*x, causal)):
        assert_right(f(q, k, torch.full_like(v, LARGE / 40)), softmax_over(q, k, torch.full_like(v, LARGE / 40), causal), dtype)
        if DEVICE == "cpu":
            assert f(q, k, torch.full_like(v, LARGE)).isinf().any(), "torch has become better: hold it to the kernels' test"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "choice", "torch")
        slot, v = torch.arange(40, device=DEVICE), values(v, "one sign")
        for q in q, q + 1:
            y, _ = Dilated(8, 0, 0).prefill(q, k, v, 0, None)
            assert_right(y, softmax_over(q, k, v, Dilated(8, 0, 0).pattern(slot[:, None], slot).expand(1, 1, 40, 40)), dtype)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("signs", ["one sign", "both signs"])
def test_blocks_of_the_largest_keys_are_selected_rightly(signs, dtype):
    """A sum of a block's keys that overflows before it is a mean; bounds off the numbers; NaN or inf among the scores."""
    for block_size, T in times([(8, 100)], [(8, 100), (24, 100), (512, 1100)]):
        q, k, v = draw_qkv(1, T, 2, 1, 16, dtype, seed=11)
        q, k = q * 1e-3, values(k, signs) * torch.linspace(0.5, 1, T, device=DEVICE).to(dtype)[:, None, None]
        N, used, start = -(-T // block_size), torch.tensor([T], device=DEVICE), torch.zeros(1, dtype=torch.long, device=DEVICE)
        S, block = min(N, 3), torch.arange(N, device=DEVICE)
        mean = F.pad(k.double(), (0, 0, 0, 0, 0, -T % block_size)).view(N, block_size, 16).mean(1)
        exact = q.double().mean(2)[0] @ mean.T                                               # (T, N)
        complete = block < torch.arange(T, device=DEVICE)[:, None] // block_size
        plain = MoBA(3 * block_size, block_size, keep_first=False)
        scores = plain.score(q, k)[0, 0]
        assert_right(scores[complete], exact[complete], FP32, "means' scores")
        best = exact.where(complete, NEVER).topk(S - 1).values
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(backend, "choice", "torch")
            _, chosen = plain.prefill(q, k, torch.zeros_like(v), 0, None)
        for what, chosen in ("plain", chosen), ("kernel", moba_route.moba_route(q, k, start, block_size, S, False)):
            n = chosen[0, 0].long()                                                          # (T, S)
            kept = exact.gather(1, n.clamp_min(0)).where((n >= 0) & (n < torch.arange(T, device=DEVICE)[:, None] // block_size), NEVER)
            kept = kept.sort(descending=True).values[:, :S - 1]
            assert torch.allclose(kept, best, rtol=0, atol=1e-4 * exact.abs().max().item()), f"{what}: {kept} for {best}"

        low, high = quest.block_bounds(k, used, block_size)
        keys = k[0, :T // block_size * block_size, 0].view(-1, block_size, 16)
        assert torch.equal(low[0, :len(keys), 0], keys.amin(1)) and torch.equal(high[0, :len(keys), 0], keys.amax(1))
        bounds = torch.maximum(q[:, -1, :, None].double() * low[0, :, 0], q[:, -1, :, None].double() * high[0, :, 0]).sum(-1).mean(1)[0]
        filled = torch.ones(1, T, dtype=torch.bool, device=DEVICE)
        assert_right(Quest(3 * block_size, block_size).score(q[:, -1:], k, filled)[0, 0, 0], bounds, FP32, "plain bounds")
        assert_right(quest.quest_scores(q[:, -1:], low, high, used, block_size, False, False)[0, 0], bounds, FP32, "bounds")


def test_scores_at_the_end_of_the_range_fill_the_budget():
    """A search for the cut that starts above the least of the scores."""
    k = torch.ones(1, 64, 1, 16, device=DEVICE)
    q, start = torch.zeros(1, 64, 1, 16, device=DEVICE), torch.zeros(1, dtype=torch.long, device=DEVICE)
    q[..., 0] = -3.3e38
    k[..., 1:] = 0
    chosen = moba_route.moba_route(q, k, start, 8, 3, False)[0, 0]
    own = torch.arange(64, device=DEVICE) // 8
    assert torch.equal((chosen >= 0).sum(1), (own + 1).clamp(max=3))


@pytest.mark.parametrize("size", [1.0, 1e4, 1e30, 1e38])
def test_loss_of_large_logits(size):
    """A softmax from a logsumexp that has lost log V to rounding: equal logits of 1e38 would each have a gradient of 1."""
    logits = size * torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [-1, -1, -1, -1], [0, 0, -1, -1]], device=DEVICE)
    target, weight = torch.tensor([0, 2, 3, 1], device=DEVICE), torch.tensor([1.0, 2, 0.5, 1], device=DEVICE)
    exact = logits.double().requires_grad_()
    ref = (F.cross_entropy(exact, target, reduction="none") * weight).sum()
    loss, dz = chunk_loss(logits, target, weight)
    assert_close(loss.double(), ref, atol=1e-5)
    assert_close(dz.double(), torch.autograd.grad(ref, exact)[0], atol=1e-6)


# ---------------------------------------------------------------- ties

@pytest.fixture(params=["torch", "triton"])
def who(request, monkeypatch):
    """Who computes what sparse.py's hooks and the models do."""
    monkeypatch.setattr(backend, "choice", request.param)
    return request.param


def layer(k, v, used):
    """A cache.LayerCache of k, v (B, Tk, KV, D) with `used` slots filled."""
    filled = torch.arange(k.shape[1], device=DEVICE) < used[:, None]
    return SimpleNamespace(k=k, v=v, used=used, ragged=True, positions=None, filled_slots=lambda: filled, positions_of=lambda slots: slots,
                           bounds_of=lambda block_size: quest.block_bounds(k, used, block_size))


def lists(x):
    """(B, KV, ..., S) -> the rows, without -1."""
    return [[n for n in row if n >= 0] for row in x.flatten(0, -2).tolist()]


TIES = {"q = 0": (0, 1), "equal keys": (1, 0)}  # what is left of q, and of the differences between keys


@pytest.mark.parametrize("dtype", times([BF16], [FP32, BF16]))
@pytest.mark.parametrize("tie", TIES)
def test_ties_in_a_decoding_step(tie, dtype, who):
    """Of equal scores too many, one twice, an unfilled slot, or others at the next call; and attention over something else."""
    q, k, v = draw_qkv(3, 1, 4, 2, 16, dtype, Tk=75, seed=12)
    q, k = q * TIES[tie][0], k[:, :1] + (k - k[:, :1]) * TIES[tie][1]
    used = torch.tensor([75, 64, 3], device=DEVICE)
    for method in Quest(24, 8), Quest(24, 8, keep_first=False, keep_current=False), Dilated(8, 5, 2):
        y, selected = backend.hook(method, "decode", v)(q, layer(k, v, used))
        again, same = backend.hook(method, "decode", v)(q, layer(k, v, used))
        assert torch.equal(y, again) and torch.equal(selected, same)
        read = torch.zeros(3, 2, 1, 76, dtype=torch.bool, device=DEVICE).scatter(3, selected[:, :, None].where(selected[:, :, None] >= 0, 75), True)
        assert_right(y, softmax_over(q, k, v, read[..., :75]), dtype)
        for i, row in enumerate(lists(selected)):
            n = used[i // 2].item()
            assert len(row) == len(set(row)) and max(row) < n
            if isinstance(method, Quest):
                assert 24 - 7 <= len(row) <= 24 or len(row) == n  # the last block may be partly filled
                if method.keep_first:
                    assert {0, n - 1} <= set(row)
            else:
                assert set(row) == {j for j in range(n) if n - 1 - j <= 5 or j < 2 or (j + 1) % 8 == 0}


@pytest.mark.parametrize("dtype", times([BF16], [FP32, BF16]))
@pytest.mark.parametrize("tie", TIES)
def test_ties_in_a_prompt(tie, dtype, who):
    """As in a decoding step: MoBA's blocks must also not be later than the query's own; SnapKV's come in order."""
    T = 37
    q, k, v = draw_qkv(2, T, 2, 1, 16, dtype, seed=13)
    q, k = q * TIES[tie][0], k[:, :1] + (k - k[:, :1]) * TIES[tie][1]
    slot = torch.arange(T, device=DEVICE)
    for method in MoBA(24, 8), MoBA(24, 8, keep_first=False):
        y, chosen = backend.hook(method, "prefill", v)(q, k, v, 0, None)
        again, same = backend.hook(method, "prefill", v)(q, k, v, 0, None)
        assert torch.equal(y, again) and torch.equal(chosen, same)
        for i, row in enumerate(lists(chosen)):
            own = i % T // 8
            assert len(row) == len(set(row)) == min(3, own + 1) and own in row and max(row) == own and (0 in row or not method.keep_first)
        keep = (chosen.unsqueeze(-1) == slot // 8).any(3) & (slot <= slot[:, None])                        # (B, KV, T, T)
        assert_right(y, softmax_over(q, k, v, keep), dtype)

    lengths = torch.tensor([T, 17], device=DEVICE)
    window = torch.stack([q[b, length - 6:length] for b, length in enumerate(lengths.tolist())])
    kept = backend.hook(SnapKV(20, 6), "compress", v)(window, k, v, lengths, None)
    assert torch.equal(kept, backend.hook(SnapKV(20, 6), "compress", v)(window, k, v, lengths, None))
    for i, row in enumerate(lists(kept)):
        n = lengths[i].item()
        assert row == sorted(set(row)) and len(row) == min(20, n) and row[-6:] == list(range(n - 6, n))


# ---------------------------------------------------------------- NaN

BAD = [nan, inf, -inf]


def spoil(x, row, axis=0, seed=0):
    """A copy in which every third number of one row of the batch is NaN or infinite."""
    x = x.clone()
    part = x.select(axis, row)
    part.copy_(part.where(torch.arange(part.numel(), device=DEVICE).view(part.shape) % 3 != seed % 3, pick(BAD, part, seed)))
    return x


def rows_of(x, rows, axis=0):
    return x.index_select(axis, torch.tensor(rows, device=DEVICE))


@pytest.mark.parametrize("dtype", times([FP32], [FP32, BF16]))
@pytest.mark.parametrize("name", FORMS)
def test_nan_in_memory_stays_in_its_row(name, dtype):
    """A tile, a strip or a state of another row in a sum; backward too."""
    inputs = draw(3, length_for(name), dtype, seed=14)
    axes = 0, 0, 0, 1, 0, 0, 1
    spoilt = [spoil(x, 1, axis, i) for i, (x, axis) in enumerate(zip(inputs, axes))]
    for what, out, ref in zip(NAMES, run(FORMS[name], *spoilt), run(FORMS[name], *inputs)):
        axis = 1 if "state" in what else 0
        assert torch.equal(rows_of(out, [0, 2], axis), rows_of(ref, [0, 2], axis)), what
        assert not out.select(axis, 1).isfinite().all() or what == "dgate"


METHODS = ["dense", "quest:budget=24,block_size=8", "moba:budget=24,block_size=8", "snapkv:budget=20,window=6",
           "dilated:dilation=8,local=5,initial=2", "dilated:dilation=8,local=0,initial=0"]


def after_a_prompt(method, q, k, v, used, cache=None):
    """The last chunk of a prompt, compression and a decoding step: all results, batch first. cache: the step's k, v; None: these."""
    start = used - 10
    chunk = torch.stack([q[b, s:s + 10] for b, s in enumerate(start.tolist())])
    y, blocks = backend.hook(method, "prefill", v)(chunk, k, v, start, None)
    kept = backend.hook(method, "compress", v)(chunk, k, v, used, None)
    step, selected = backend.hook(method, "decode", v)(chunk[:, -1:], layer(*(cache or (k, v)), used))
    return [x for x in (y, blocks, kept, step, selected) if x is not None]


def everything(method, q, k, v, used, dy):
    """The same behind a whole prompt with its gradients."""
    return [*gradients_of(lambda *x: backend.hook(method, "prefill", v)(*x, 0, None)[0], q, k, v, dy), *after_a_prompt(method, q, k, v, used)]


@pytest.mark.parametrize("dtype", times([FP32], [FP32, BF16]))
@pytest.mark.parametrize("text", METHODS)
def test_nan_in_attention_stays_in_its_row(text, dtype, who):
    """A NaN in another row's tile, softmax or selection, forward or backward; or left by it where the next row's results go."""
    q, k, v = draw_qkv(3, 36, 2, 1, 16, dtype, seed=15)
    dy, used, method = torch.ones_like(q), torch.tensor([36, 31, 17], device=DEVICE), parse(text, 64)
    clean = everything(method, q, k, v, used, dy)
    spoilt = everything(method, *(spoil(x, 1, seed=i) for i, x in enumerate((q, k, v))), used, dy)
    for i, (out, ref) in enumerate(zip(spoilt, clean, strict=True)):
        assert torch.equal(rows_of(out, [0, 2]), rows_of(ref, [0, 2])), i


@pytest.mark.parametrize("text", METHODS)
def test_nan_behind_the_last_query_reaches_none(text, who):
    """
    Slots that a row has not filled, in a tile or a mask with those it has: 0 * NaN is NaN. In PyTorch's steps, where to mask them
    would be to copy them all, the cache sees to it: it begins as zeros, is cleared to zeros, and takes real tokens only.
    """
    q, k, v = draw_qkv(3, 36, 2, 1, 16, FP32, seed=16)
    used, method = torch.tensor([36, 31, 17], device=DEVICE), parse(text, 64)
    behind = (torch.arange(36, device=DEVICE) >= used[:, None])[..., None, None]
    clean = after_a_prompt(method, q, k, v, used)
    for junk in times([nan], BAD):
        spoilt = after_a_prompt(method, q, *(x.masked_fill(behind, junk) for x in (k, v)), used, (k, v) if who == "torch" else None)
        for i, (out, ref) in enumerate(zip(spoilt, clean, strict=True)):
            assert torch.equal(out, ref), f"{junk}: {i}"


def test_nan_in_a_blocks_kernels_stays_in_its_row():
    """Rows of x stand side by side in a tile of the tensor cores."""
    source = torch.Generator().manual_seed(17)
    rand = lambda *shape: torch.randn(*shape, generator=source).to(DEVICE)
    x, y, weights, norm = rand(3, 1, 64), rand(3, 1, 64), [rand(48, 64), rand(32, 64)], rand(64)
    cos, sin = rand(3, 1, 1, 8), rand(3, 1, 1, 8)
    f = lambda x, y: [*block.products(x, weights, rand(32) * 0 + 1, 1e-6), block.swiglu_products(x, rand(48, 64) * 0 + 1, weights[0]),
                      block.add_norm(x, y, norm, 1e-6), block.norm_rotate(x.view(3, 1, 4, 16), norm, 1e-6, cos, sin),
                      block.swiglu(x.clone(), y)]
    for out, ref in zip(f(spoil(x, 1), spoil(y, 1)), f(x, y), strict=True):
        assert torch.equal(rows_of(out, [0, 2]), rows_of(ref, [0, 2]))


def test_what_does_not_count_does_not_reach_the_loss(monkeypatch):
    """A token of weight 0, a padded one say, whose NaN reaches the sum of losses or the head's gradient as 0 * NaN."""
    monkeypatch.setattr("infra.loss.CHUNK_LOGITS", 20 * 5)
    source = torch.Generator().manual_seed(18)
    x, head, weight = torch.randn(17, 8, generator=source), torch.randn(20, 8, generator=source), torch.rand(17, generator=source)
    weight[::4], target = 0, torch.randint(20, (17,), generator=source)
    results = []
    for junk in 0.0, *BAD:
        inputs = [x.where(weight[:, None] > 0, junk).to(DEVICE).requires_grad_(), head.to(DEVICE).requires_grad_()]
        loss = weighted_loss(*inputs, target.to(DEVICE), weight.to(DEVICE))
        results.append([loss.detach(), *torch.autograd.grad(loss, inputs)])
    for result in results[1:]:
        for what, out, ref in zip(("loss", "dx", "dhead"), result, results[0]):
            assert torch.equal(out, ref), what


POISON = 60  # a token whose embedding is NaN


def poisonous():
    model = tiny(n_kv_head=2, memory=True, width=64, n_layer=times(1, 2)).to(DEVICE)
    with torch.no_grad():
        model.embed_tokens.weight[POISON] = nan
    return model


def read_and_write(model, method, tokens, lengths):
    """Logits of all of a batch, then of a ragged prompt in two chunks and some steps."""
    cache, logits = model.new_cache(len(tokens), 60), []
    with torch.no_grad():
        at_once = model(tokens, sparse=method)
        model(tokens[:, :9], cache=cache, sparse=method)
        logits.append(model.prefill(tokens[:, 9:], lengths - 9, cache, method))
        for token in draw_tokens(len(tokens), times(2, 4), seed=2, vocab_size=POISON).to(DEVICE).split(1, dim=1):
            logits.append(model(token, cache=cache, sparse=method)[:, -1])
    return at_once, torch.stack(logits, dim=1)


@pytest.mark.parametrize("text", times(["moba:budget=24,block_size=8+snapkv:budget=20,window=6+quest:budget=16,block_size=8", METHODS[-2]], METHODS))
def test_nan_in_one_row_of_a_models_batch_stays_there(text, who):
    """Anything at all between two rows of a batch: rows are compared bit for bit with a batch that has no NaN."""
    model, lengths = poisonous(), torch.tensor([17, 20], device=DEVICE)
    clean = draw_tokens(2, 20, seed=1, vocab_size=POISON).to(DEVICE)
    spoilt = clean.clone()
    spoilt[1, 5] = POISON
    for out, ref in zip(*(read_and_write(model, parse(text, 64), tokens, lengths) for tokens in (spoilt, clean))):
        assert torch.equal(out[0], ref[0]) and ref.isfinite().all()
        assert out[1, -1].isnan().all()


@pytest.mark.parametrize("sparse", [None, MoBA(24, 8), Dilated(8, 0, 0)], ids=["dense", "moba", "arl"])
def test_nan_in_one_row_leaves_the_gradients_of_others(sparse, who):
    """A backward pass that mixes rows. What a row's own inputs gain is compared: weights are shared, and so is their NaN."""
    model, gradients = poisonous(), []
    tokens = draw_tokens(3, 17, seed=3, vocab_size=POISON).to(DEVICE)
    for poison in False, True:
        tokens[1, 4] = POISON if poison else 0
        taken = []
        hook = model.embed_tokens.register_forward_hook(lambda module, inputs, x: taken.append(x.retain_grad() or x))
        model(tokens, sparse=sparse).square().sum().backward()
        hook.remove()
        gradients.append(taken[0].grad)
    assert torch.equal(gradients[0][[0, 2]], gradients[1][[0, 2]]) and gradients[1][1].isnan().any()


# ---------------------------------------------------------------- torch.set_default_dtype

@pytest.mark.parametrize("other", [BF16, torch.float64])
def test_a_default_dtype_changes_no_number(other):
    """A tensor made without a dtype: inference scripts set bfloat16, and a memory's state, fp32 by all docs, rounds at every step."""
    model, tokens = tiny(memory=True, n_kv_head=2, width=64, n_head=4).to(DEVICE), draw_tokens(2, 60).to(DEVICE)
    with torch.no_grad():
        for layer in model.layers:
            layer.self_attn.memory.proj.bias.fill_(5.0)  # a long memory
    q, k, v = draw_qkv(2, 40, 4, 2, 16, FP32, seed=3)

    def numbers():
        found = []
        for method in None, Quest(24, 8), SnapKV(20, 6), MoBA(24, 8, random=1), Dilated(8, 0, 0):
            cache = model.new_cache(2, 80)
            found.append(model.prefill(tokens, torch.tensor([60, 31], device=DEVICE), cache, method).clone())
            with torch.no_grad():
                found += [model.step(tokens[:, t], cache, method).clone() for t in range(3)]
            found += [x for x in cache.state]
        model.zero_grad()
        loss = model.loss(tokens, torch.ones(tokens.shape, dtype=FP32, device=DEVICE))
        loss.backward()
        found += [loss.detach(), *(p.grad.clone() for p in model.parameters())]
        found += [f() for f in (fresh(Transformer, model.config, 3) | memory_tensors(Decay, model.config, 0.1)).values()]
        found += [effective_length(v), *memory_scan(k, v, v), *model.score(tokens, torch.ones(tokens.shape, dtype=FP32, device=DEVICE))]
        return [(x.dtype, x) for x in found]

    expected, before = numbers(), torch.get_default_dtype()
    torch.set_default_dtype(other)
    try:
        found = numbers()
    finally:
        torch.set_default_dtype(before)
    for (kind, x), (kind_too, y) in zip(found, expected, strict=True):
        assert kind == kind_too and torch.equal(x, y)
