"""
The edges of the number format, for PyTorch's forms and for the kernels: saturated gates, 131,072
steps, the largest finite numbers, ties, and NaN, which stays in its row. What is said of one form
is said of all of them, and run in each.

What cannot be had, and is not asked for here: products q . k, RMSNorm's squares and sums of
weighted rows overflow where their value does; torch's scaled_dot_product_attention already where a
sum of values does (test_plain_attention_of_large_values).
"""
from functools import partial

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from conftest import DEVICE, assert_close, draw_tokens, error, layer_cache, times, tiny

pytest.importorskip("triton", reason="half of this file is about the kernels")
import kernels  # noqa: E402
from infra.init import fresh, memory_tensors  # noqa: E402
from infra.loss import chunk_loss, weighted_loss  # noqa: E402
from kernel_cases import BF16, FP32, draw as normal, inf, nan, with_gradients  # noqa: E402
from memory import Decay, effective_length, memory_loop, memory_scan, memory_step  # noqa: E402
from model import Transformer  # noqa: E402
from sparse import NEVER, Dense, Dilated, MoBA, Quest, SnapKV, attend, compose, name  # noqa: E402
from triton_ops import backend, block, dilated, moba, moba_route, quest  # noqa: E402

pytestmark = pytest.mark.usefixtures("poisoned")
LARGE = 3.38e38  # the largest bf16 number is 3.39e38, the largest fp32 number 3.40e38
TILE = kernels.TILE["ROWS"] * kernels.TILE["STRIPS"]
dtypes = pytest.mark.parametrize("dtype", [FP32, BF16])
dtypes_if_slow = pytest.mark.parametrize("dtype", times([FP32], [FP32, BF16]))


def pick(values, like, seed):
    """A tensor like `like` of values drawn from a list."""
    values, source = torch.tensor(values).double(), torch.Generator().manual_seed(seed)
    return values[torch.randint(len(values), like.shape, generator=source)].to(like)


def assert_right(out, ref, dtype, what="y", terms=0.0):
    """Finite, and close to `ref` (fp64) for its size, or that of the terms that cancel in it."""
    assert out.isfinite().all(), f"{what}: {(~out.isfinite()).sum()} elements are not finite"
    size = max(terms, ref.abs().max().item())
    assert_close(out.double(), ref, atol=(1e-5 if dtype == FP32 else 1e-2) * size, what=what)


# ---------------------------------------------------------------- the forms of the memory

def in_pieces(form, length):
    """The form over one piece of a sequence after the other."""
    def whole(k, v, gate, state):
        outs = []
        for now in zip(*(x.split(length, dim=1) for x in (k, v, gate))):
            *out, state = form(*now, state)
            outs.append(torch.stack(out))
        return *torch.cat(outs, dim=2), state
    return whole


def fused_steps(k, v, gate, state):
    """block.decode_step over a whole sequence: without QK-norm or RoPE the memory is left."""
    B, T, KV, D = k.shape
    state, cos = state.clone(), torch.ones(1, 1, 1, D // 2, device=DEVICE)
    caches = [torch.zeros_like(x) for x in (k, v)]
    for t, now in enumerate(zip(*(x.split(1, dim=1) for x in (k, v, gate)))):
        used = torch.full((B,), t + 1, device=DEVICE)
        block.decode_step(now[0], *now, None, None, 1e-6, cos, 0 * cos, state, *caches, None, None,
                          1, used, None, None)
    return *caches, state


FORMS = {"loop": memory_loop, "scan": memory_scan, "kernel": kernels.memory_scan,
         "step": in_pieces(memory_step, 1), "fused step": fused_steps}  # the last has no gradients
forms = pytest.mark.parametrize("name", FORMS)
NAMES = "k~", "v~", "state", "dk", "dv", "dgate", "dstate"


def draw(name, B, dtype=FP32, seed=0, KV=1, D=16, T=None):
    """
    k, v, gate, state, and the gradients of k~, v~ and the last state: two tiles of the kernel, or a
    few tokens, as the interpreter is slow where it goes launch by launch.
    """
    T = T or (6 if name == "fused step" else TILE + 5)
    k, v, gate, dk, dv = normal(5, B, T, KV, D, seed=seed).to(dtype)
    state, dstate = normal(2, 2, B, KV, D, seed=seed + 1000)
    return k, v, 4 * gate, state, dk, dv, dstate


def large_for(name):
    """
    The definition's gate gradient is autograd's, a sum over k and v times g (1 - g): 0 * inf at a
    saturated gate.
    """
    return 1e37 if name in ("loop", "step") else LARGE


def run(form, k, v, gate, state, *gradients):
    """k~, v~, last state and, but for the fused step, the gradients of k, v, gate and state."""
    if form is fused_steps:
        return form(k, v, gate, state)
    return with_gradients(form, (k, v, gate, state), gradients)


def exactly(*inputs):
    return run(memory_loop, *(x.double() for x in inputs))


@dtypes
@forms
def test_saturated_gates_are_finite_and_right(name, dtype):
    """exp(88) next to the end of fp32, 0 * inf, 1 - g cancelled: in values and gradients."""
    low, high = [-inf, -1e4, -88, -17], [17, 88, 1e4, inf]
    for seed in range(times(1, 30)):
        inputs = draw(name, 1, dtype, seed)
        for ends, part in (low, slice(4)), (high, slice(4, 8)), ([*low, 0, *high], slice(8, 16)):
            gate = inputs[2][..., part]
            gate.copy_(pick(ends, gate, seed))
        for what, out, ref in zip(NAMES, run(FORMS[name], *inputs), exactly(*inputs)):
            assert out.isfinite().all(), f"{what}, {seed=}"
            # autograd's sigmoid has g * (1 - g) with a rounded 1 - g, so that the plain forms'
            # dgate is off by up to 3e-8 of the state
            rounding = 2e-6 if out.dtype == FP32 else 2e-2
            atol = rounding * max(1, ref.abs().max().item())
            assert_close(out.double(), ref, atol=atol, what=what)


@forms
def test_a_gate_near_one_still_lets_a_little_in(name):
    """1 - sigmoid(30) in fp32 is 0; sigmoid(-30) is 9e-14."""
    k, v, gate, state, *gradients = draw(name, 1)
    k_mem, *_ = run(FORMS[name], k, v, gate * 0 + 30, state * 0, *gradients)
    little = torch.sigmoid(torch.tensor(-30.0, dtype=torch.float64))
    # 1e-5: the kernels take exp2 of 43.28, which fp32 rounds
    assert error(k_mem, little * k.double().cumsum(1)) < 1e-5


@dtypes
@forms
def test_a_gate_of_one_keeps_the_state_bit_for_bit(name, dtype):
    """A state that is rounded, or gains 0 * x, on its way through; and a gradient that does."""
    k, v, gate, state, *gradients = draw(name, 1, dtype, seed=1)
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


@dtypes
@forms
def test_a_gate_of_zero_gives_x_bit_for_bit(name, dtype):
    """A g that stops short of 0: 2**-126 of a large state is 4. Or a 1 - g that is not quite 1."""
    k, v, gate, state, *gradients = draw(name, 1, dtype, seed=2)
    gate[..., :5], gate[..., 5:10], gate[..., 10:] = -88, -1e4, -inf
    large = large_for(name)
    # not at -88, where g is 6e-39, which leaves 2 of the largest state
    state[..., 5:] = pick([-large, large, 0], state[..., 5:], 0)
    k[:, ::3, :, 5:] = pick([-large, large], k[:, ::3, :, 5:], 1)
    k_mem, v_mem, last, *grads = run(FORMS[name], k, v, gate, state, *gradients)
    assert torch.equal(k_mem, k) and torch.equal(v_mem, v)
    assert torch.equal(last, torch.stack([k, v])[:, :, -1].float())
    if grads:
        *d, dgate, dstate = grads
        assert all(torch.equal(x[:, :-1], given[:, :-1]) for x, given in zip(d, gradients))
        assert dgate.isfinite().all() and (dstate.abs() < 1e-37).all()
        assert (dgate[..., 10:] == 0).all() and (dstate[..., 10:] == 0).all()


@dtypes
@forms
def test_memory_of_the_largest_numbers(name, dtype):
    """An average of either sign that overflows where no number does, or k - m in its gradient."""
    k, v, gate, state, *gradients = draw(name, 1, dtype, seed=4)
    gate[..., ::3] = 9.21  # g = 0.9999
    k, v = pick([-LARGE, LARGE], k, 5), torch.full_like(v, LARGE)
    state = pick([-LARGE, LARGE], state, 6)
    if name != "kernel":  # see large_for
        gradients = [1e-3 * x for x in gradients]
    inputs = k, v, gate, state, *gradients
    for what, out, ref in zip(NAMES, run(FORMS[name], *inputs), exactly(*inputs)):
        if ref.abs().max() < (3.39e38 if out.dtype == BF16 else 3.4e38):
            assert_right(out, ref, dtype, what)
        else:
            assert what == "dgate"


@dtypes_if_slow
@pytest.mark.parametrize("name", ["loop", "scan", "step"])  # of the kernels test_kernels.py has it
def test_nan_in_memory_stays_in_its_row(name, dtype):
    """A state of another row in a sum; backward too."""
    inputs, axes = draw(name, 3, dtype, seed=14), (0, 0, 0, 1, 0, 0, 1)
    spoilt = [spoil(x, 1, axis, i) for i, (x, axis) in enumerate(zip(inputs, axes))]
    for what, *pair in zip(NAMES, run(FORMS[name], *spoilt), run(FORMS[name], *inputs)):
        out, ref = (x.transpose(0, 1) if "state" in what else x for x in pair)
        assert torch.equal(out[::2], ref[::2]), what


# ---------------------------------------------------------------- 131,072 steps

KINDS = "drawn", "g = 0.99", "g = 0.9999", "g = 1 - 1e-6"  # a head for each
# autograd writes all of a loop's gate gradient at each of its steps, and keeps all that it needs
LOOP = in_pieces(partial(checkpoint, memory_loop, use_reentrant=False), 128)


def from_zero(form, k, v, gate, dk, dv):
    state = torch.zeros(2, 1, *k.shape[2:], dtype=torch.promote_types(k.dtype, FP32), device=DEVICE)
    return run(form, k, v, gate, state, dk, dv, torch.zeros_like(state))[:6]


def errors(outs, refs):
    """{what: rms error of each kind of gate}"""
    heads = lambda out, ref: zip(out.movedim(-2, 0), ref.movedim(-2, 0))
    return {what: torch.tensor([error(*pair) for pair in heads(out, ref)])
            for what, out, ref in zip(NAMES, outs, refs)}


@pytest.mark.parametrize("T", [1024, *times([], [8192, 131072])])
def test_errors_grow_with_length_no_faster_than_the_loops(T):
    """
    Decays multiplied, or terms summed, so that errors add up over 131,072 steps where the loop's,
    in fp32 too, do not.
    """
    k, v, gate, _, dk, dv, _ = draw("loop", 1, seed=T, KV=len(KINDS), D=4, T=T)
    for head, logit in enumerate((4.6, 9.21, 13.8), start=1):
        gate[:, :, head] = logit
    # of mean 0 and 1: a sum of many rounding errors of one sign shows
    inputs = k + 1, v + 0.1, gate, dk + 1, dv
    doubles = [x.double() for x in inputs]
    exact = from_zero(memory_scan, *doubles)  # test_memory.py holds it to the loop in fp64
    loop, right = (errors(from_zero(LOOP, *x), exact) for x in (inputs, doubles))
    assert max(x.max() for x in right.values()) < 1e-10
    for name in "scan", "kernel":
        with pytest.MonkeyPatch.context() as patch:
            if DEVICE == "cpu":  # the interpreter's time goes by rows, one after the other
                patch.setitem(kernels.TILE, "STRIPS", 128)
                patch.setitem(kernels.TILE, "ROWS", max(4, T // 512))
            form = errors(from_zero(FORMS[name], *inputs), exact)
        for what, ours in form.items():
            print(name, T, what, KINDS, ours.tolist(), "the loop's:", loop[what].tolist())
            assert (ours <= 2 * loop[what] + 1e-7).all(), f"{name}: {what}"


# ---------------------------------------------------------------- the largest numbers in attention

def values(like, signs, seed=7):
    """The largest numbers: all alike, whose mean is no larger but whose sum is; or either sign."""
    if signs == "one sign":
        return torch.full_like(like, 3.3e38)
    return pick([-3.3e38, 3.3e38], like, seed)


def draw_qkv(B, Tq, H, KV, dtype=FP32, Tk=None, seed=0):
    q, kv = normal(B, Tq, H, 16, seed=seed), normal(2, B, Tk or Tq, KV, 16, seed=seed + 1)
    return q.to(dtype), *kv.to(dtype)


def softmax_over(q, k, v, keep):
    """Eq. 4 in fp64, normalised before it is summed. keep broadcasts to (B, KV, Tq, Tk)."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    G = q.shape[1] // k.shape[1]
    keep = keep.expand(*k.shape[:2], q.shape[2], k.shape[2])
    k, v, keep = (x.repeat_interleave(G, dim=1) for x in (k, v, keep))
    scores = (q @ k.transpose(2, 3) * q.shape[3] ** -0.5).masked_fill(~keep, -inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def assert_attention(f, q, k, v, keep):
    """f is softmax_over(keep), with gradients for dy that keep dy . v finite."""
    dy = normal(*q.shape, seed=1) * 1e-4
    ours = with_gradients(f, (q, k, v), [dy])
    exact = with_gradients(lambda *x: softmax_over(*x, keep), (q.double(), k.double(), v.double()),
                           [dy])
    # of equal values dq and dk are 0: all dy . v - dy . y cancel
    terms = 0.0 if (v != v[:1, :1, :1, :1]).any() else 1e-4 * LARGE
    for what, out, ref in zip(("y", "dq", "dk", "dv"), ours, exact):
        assert_right(out, ref, q.dtype, what, terms if what in ("dq", "dk") else 0.0)


# q = 0 makes all scores equal
SIGNS = [("one sign", 0), ("both signs", 1), *times([], [("one sign", 1), ("both signs", 0)])]


@dtypes
@pytest.mark.parametrize("signs, q_size", SIGNS)
def test_a_step_s_kernels_of_the_largest_values(signs, q_size, dtype, monkeypatch):
    """p v summed before it is divided: two values of 3.3e38 overflow, where their mean does not."""
    used, slot = torch.tensor([150, 9], device=DEVICE), torch.arange(150, device=DEVICE)
    q, k, v = draw_qkv(2, 1, 4, 2, dtype, Tk=150, seed=8)
    q, v = q * q_size, values(v, signs)
    filled = (slot < used[:, None])[:, None, None]  # (B, 1, 1, Tk)
    for programs in 1, 264:  # one split, and several
        monkeypatch.setitem(quest.ATTEND, "programs", programs)
        assert_right(quest.attend_slots(q, k, v, used), softmax_over(q, k, v, filled), dtype)
        for size, blocks in (8, [0, 1, 5, 18]), (64, [0, 2]):  # indices as a tile, one for a tile
            chosen = torch.tensor(blocks, dtype=torch.int32, device=DEVICE)
            y, _ = quest.quest_attend(q, k, v, chosen.expand(2, 2, -1).contiguous(), used, size)
            read = filled & (slot // size == chosen[:, None]).any(0)
            assert_right(y, softmax_over(q, k, v, read), dtype)


@dtypes
@pytest.mark.parametrize("signs, q_size", SIGNS)
def test_a_prompt_s_kernels_of_the_largest_values(signs, q_size, dtype, monkeypatch):
    """The same in prefill, and in its gradients."""
    T, start = 70, torch.zeros(1, dtype=torch.long, device=DEVICE)
    q, k, v = draw_qkv(1, T, 2, 1, dtype, seed=9)
    q, v, j = q * q_size, values(v, signs), torch.arange(T, device=DEVICE)
    i = j[:, None]
    for pattern in (8, 5, 3), (8, 0, 0):
        keep = Dilated(*pattern).pattern(i, j)
        assert_attention(lambda *x: dilated.dilated(*x, start, *pattern), q, k, v, keep)
    for pattern in (8, 5, 3), (1, 40, 0):  # one split, and several
        y = dilated.dilated(q[:, -1:].contiguous(), k, v, start + T - 1, *pattern)
        keep = Dilated(*pattern).pattern(T - 1, j)
        assert_right(y, softmax_over(q[:, -1:], k, v, keep), dtype)
    for size in 16, 48:  # a block in one tile of keys, and longer than it
        for tiles in moba.GATHER, moba.GATHER_NARROW, moba.GATHER_LONG, moba.GATHER_LONG_NARROW:
            monkeypatch.setitem(tiles, "BLOCK_N", 32)
        own = i // size
        chosen = torch.cat([own * 0, own.where(own > 0, -1)], dim=1)  # the first, and its own
        chosen, keep = chosen.view(1, 1, T, 2).int(), ((j // size == own) | (j < size)) & (j <= i)
        assert_attention(lambda *x: moba.moba_attend(*x, chosen, start, size), q, k, v, keep)


@dtypes
def test_plain_attention_of_large_values(dtype, monkeypatch):
    """
    torch's scaled_dot_product_attention, which `attend` is, sums p v before it divides: on a CPU
    values above the largest number / keys overflow in it, below they are right. Dilated's shared
    keys divide first, and reach as far as the kernels.
    """
    q, k, v = draw_qkv(1, 40, 2, 1, dtype, seed=10)
    slot = torch.arange(40, device=DEVICE)
    causal, large, q = slot <= slot[:, None], torch.full_like(v, LARGE), 0 * q
    for f in (lambda v: attend(q, k, v, causal=True)), (lambda v: attend(q, k, v, causal)):
        assert_right(f(large / 40), softmax_over(q, k, large / 40, causal), dtype)
        if DEVICE == "cpu":
            assert f(large).isinf().any(), "torch has become better: hold it to the kernels' test"
    monkeypatch.setattr(backend, "choice", "torch")
    method, v = Dilated(8, 0, 0), values(v, "one sign")
    for q in q, q + 1:
        y, _ = method.prefill(q, k, v, 0, None)
        assert_right(y, softmax_over(q, k, v, method.pattern(slot[:, None], slot)), dtype)


@dtypes
@pytest.mark.parametrize("signs", ["one sign", "both signs"])
@pytest.mark.parametrize("size, T", [(8, 100), *times([], [(24, 100), (512, 1100)])])
def test_blocks_of_the_largest_keys_are_selected_rightly(signs, dtype, size, T, monkeypatch):
    """A sum of a block's keys that overflows before it is a mean; NaN or inf among the scores."""
    monkeypatch.setattr(backend, "choice", "torch")
    q, k, v = draw_qkv(1, T, 2, 1, dtype, seed=11)
    ramp = torch.linspace(0.5, 1, T, device=DEVICE).to(dtype)[:, None, None]
    q, k = q * 1e-3, values(k, signs) * ramp
    start, used = (torch.tensor([n], device=DEVICE) for n in (0, T))
    N, S, own = -(-T // size), 3, torch.arange(T, device=DEVICE)[:, None] // size
    mean = F.pad(k.double(), (0, 0, 0, 0, 0, -T % size)).view(N, size, 16).mean(1)
    exact = q.double().mean(2)[0] @ mean.T                              # (T, N)
    complete, plain = torch.arange(N, device=DEVICE) < own, MoBA(S * size, size, keep_first=False)
    assert_right(plain.score(q, k)[0, 0][complete], exact[complete], FP32, "means' scores")
    best = exact.where(complete, NEVER).topk(min(S, N) - 1).values
    for chosen in (plain.prefill(q, k, torch.zeros_like(v), 0, None)[1],
                   moba_route.moba_route(q, k, start, size, min(S, N), False)):
        n = chosen[0, 0].long()                                         # (T, S)
        kept = exact.gather(1, n.clamp_min(0)).where((n >= 0) & (n < own), NEVER)
        kept = kept.sort(descending=True).values[:, :min(S, N) - 1]
        assert torch.allclose(kept, best, rtol=0, atol=1e-4 * exact.abs().max().item())

    low, high = quest.block_bounds(k, used, size)
    keys = k[0, :T // size * size, 0].view(-1, size, 16)
    assert torch.equal(low[0, :len(keys), 0], keys.amin(1))
    assert torch.equal(high[0, :len(keys), 0], keys.amax(1))
    last, filled = q[:, -1, :, None].double(), torch.ones(1, T, dtype=torch.bool, device=DEVICE)
    bounds = torch.maximum(last * low[0, :, 0], last * high[0, :, 0]).sum(-1).mean(1)[0]
    ours = quest.quest_scores(q[:, -1:].contiguous(), low, high, used, size, False, False)
    assert_right(Quest(S * size, size).score(q[:, -1:], k, filled)[0, 0, 0], bounds, FP32, "plain")
    assert_right(ours[0, 0], bounds, FP32, "bounds")


def test_scores_at_the_end_of_the_range_fill_the_budget():
    """A search for the cut that starts above the least of the scores."""
    q, k = (torch.zeros(1, 64, 1, 16, device=DEVICE) for _ in "qk")
    q[..., 0], k[..., 0] = -3.3e38, 1
    start = torch.zeros(1, dtype=torch.long, device=DEVICE)
    chosen = moba_route.moba_route(q, k, start, 8, 3, False)[0, 0]
    own = torch.arange(64, device=DEVICE) // 8
    assert torch.equal((chosen >= 0).sum(1), (own + 1).clamp(max=3))


@pytest.mark.parametrize("size", [1.0, 1e4, 1e30, 1e38])
def test_loss_of_large_logits(size):
    """A logsumexp that has lost log V to rounding: equal logits would have gradients of 1."""
    signs = [[1.0, 1, 1, 1], [1, -1, 1, -1], [-1, -1, -1, -1], [0, 0, -1, -1]]
    logits, target = size * torch.tensor(signs), torch.tensor([0, 2, 3, 1])
    weight, exact = torch.tensor([1.0, 2, 0.5, 1]), logits.double().requires_grad_()
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


def lists(x):
    """(B, KV, ..., S) -> the rows, without -1."""
    return [[n for n in row if n >= 0] for row in x.flatten(0, -2).tolist()]


def repeats(method, phase, like, *args):
    """What the method's hook gives, twice the same bits."""
    results = [backend.hook(method, phase, like)(*args) for _ in "ab"]
    for x, again in zip(*([r] if torch.is_tensor(r) else r for r in results)):
        assert torch.equal(x, again)
    return results[0]


TIES = pytest.mark.parametrize("q_size, spread", [(0, 1), (1, 0)], ids=["q = 0", "equal keys"])
tie_dtypes = pytest.mark.parametrize("dtype", times([BF16], [FP32, BF16]))


@tie_dtypes
@TIES
def test_ties(q_size, spread, dtype, who):
    """
    Of equal scores too many, one twice, a slot that is not filled or a later block, entries out of
    order, or others at the next call.
    """
    T, used = 29, torch.tensor([75, 64, 3], device=DEVICE)
    q, k, v = draw_qkv(3, T, 4, 2, dtype, Tk=75, seed=13)
    q, k, slot = q * q_size, k[:, :1] + (k - k[:, :1]) * spread, torch.arange(75, device=DEVICE)
    for first in True, False:
        method = Quest(24, 8, first, first)
        y, selected = repeats(method, "decode", v, q[:, -1:], layer_cache(k, v, used))
        read = (selected.unsqueeze(-1) == slot).any(2)[:, :, None]                 # (B, KV, 1, Tk)
        assert_right(y, softmax_over(q[:, -1:], k, v, read), dtype)
        for i, row in enumerate(lists(selected)):
            n = used[i // 2].item()
            assert len(row) == len(set(row)) and max(row) < n
            assert 24 - 7 <= len(row) <= 24 or len(row) == n  # the last block may be partly filled
            assert {0, n - 1} <= set(row) or not first

    q, k, v, slot = q[:2, :, :2], k[:2, :T, :1], v[:2, :T, :1], slot[:T]
    for first in True, False:
        y, chosen = repeats(MoBA(24, 8, first), "prefill", v, q, k, v, 0, None)
        for i, row in enumerate(lists(chosen)):
            own = i % T // 8
            assert len(row) == len(set(row)) == min(3, own + 1) and max(row) == own
            assert 0 in row or not first
        keep = (chosen.unsqueeze(-1) == slot // 8).any(3) & (slot <= slot[:, None])  # (B, KV, T, T)
        assert_right(y, softmax_over(q, k, v, keep), dtype)
    lengths = torch.tensor([T, 17], device=DEVICE)
    window = torch.stack([q[b, n - 6:n] for b, n in enumerate(lengths.tolist())])
    kept = repeats(SnapKV(20, 6), "compress", v, window, k, v, lengths, None)
    for n, row in zip(lengths.tolist(), lists(kept)):
        assert row == sorted(set(row)) and len(row) == min(20, n)
        assert row[-6:] == list(range(n - 6, n))


# ---------------------------------------------------------------- NaN

BAD = [nan, inf, -inf]


def spoil(x, row, axis=0, seed=0):
    """A copy in which every third number of one row of the batch is NaN or infinite."""
    x = x.clone()
    part = x.select(axis, row)
    index = torch.arange(part.numel(), device=DEVICE).view(part.shape)
    part.copy_(part.where(index % 3 != seed % 3, pick(BAD, part, seed)))
    return x


EACH = [Dense(), Quest(24, 8), MoBA(24, 8), SnapKV(20, 6), Dilated(8, 5, 2), Dilated(8, 0, 0)]
each = pytest.mark.parametrize("method", EACH, ids=name)
PHASES = "prefill", "compress", "decode"


@dtypes_if_slow
@each
def test_nan_in_attention_stays_where_it_is(method, dtype, who):
    """
    A NaN in another row's tile, softmax or selection, or left where its results go; a slot that a
    row has not filled, in a tile or a mask with those it has: 0 * NaN is NaN. In PyTorch's steps,
    where to mask such slots would be to copy them all, the cache sees to it: it begins as zeros, is
    cleared to zeros, and takes real tokens only.
    """
    inputs, used = draw_qkv(3, 27, 2, 1, dtype, seed=15), torch.tensor([25, 27, 12], device=DEVICE)
    empty = (torch.arange(27, device=DEVICE) >= used[:, None])[..., None, None]
    junk = pick(BAD, inputs[2], 16)
    junk[0] = LARGE
    spoilt = [spoil(x, 1, seed=i) for i, x in enumerate(inputs)]

    def results(q, k, v, behind):
        prefill, compress, decode = (backend.hook(method, phase, v) for phase in PHASES)
        stored = [x.where(~empty, behind) for x in (k, v)]
        cache = layer_cache(*((k, v) if who == "torch" else stored), used)
        chunk = torch.stack([q[b, n - 10:n] for b, n in enumerate(used.tolist())])
        whole = lambda *x: prefill(*x, 0, None)[0]
        found = [*with_gradients(whole, (q, k, v), [torch.ones_like(q)]),
                 *prefill(chunk, *stored, used - 10, None),
                 compress(chunk, *stored, used, None), *decode(chunk[:, -1:], cache)]
        return [x[::2] for x in found if x is not None]

    for i, pair in enumerate(zip(results(*spoilt, junk), results(*inputs, 0 * inputs[2]))):
        assert torch.equal(*pair), i


def test_what_does_not_count_does_not_reach_the_loss(monkeypatch):
    """A token of weight 0 whose NaN reaches the sum, or the head's gradient, as 0 * NaN."""
    monkeypatch.setattr("infra.loss.CHUNK_LOGITS", 20 * 5)
    x, head, weight = normal(17, 8), normal(20, 8, seed=1), normal(17, seed=2).abs()
    target, results = torch.arange(17, device=DEVICE), []
    weight[::4] = 0
    for junk in 0.0, *BAD:
        inputs = [x.where(weight[:, None] > 0, junk).requires_grad_(), head.requires_grad_()]
        loss = weighted_loss(*inputs, target, weight)
        results.append([loss.detach(), *torch.autograd.grad(loss, inputs)])
    for result in results[1:]:
        for what, out, ref in zip(("loss", "dx", "dhead"), result, results[0]):
            assert torch.equal(out, ref), what


POISON = 60  # a token whose embedding is NaN


def poisonous():
    """A model, and tokens (2, 20) of which the second row, in a copy, has the poison."""
    model = tiny(n_kv_head=2, memory=True, width=64, n_layer=times(1, 2)).to(DEVICE)
    with torch.no_grad():
        model.embed_tokens.weight[POISON] = nan
    clean = draw_tokens(2, 20, seed=1, vocab_size=POISON).to(DEVICE)
    spoilt = clean.clone()
    spoilt[1, 5] = POISON
    return model, spoilt, clean


ALL_PHASES = compose(MoBA(24, 8), SnapKV(20, 6), Quest(16, 8))


@pytest.mark.parametrize("method", [ALL_PHASES, *times([], EACH)], ids=name)
@torch.no_grad()
def test_nan_in_one_row_of_a_model_s_batch_stays_there(method, who):
    """Anything at all between two rows, or of padding: bit for bit a batch that has no NaN."""
    model, *batches = poisonous()
    steps = draw_tokens(2, times(2, 4), seed=2, vocab_size=POISON).to(DEVICE)
    lengths, results = torch.tensor([17, 20], device=DEVICE), []
    for tokens in batches:
        cache, chunk = model.new_cache(2, 60), tokens[:, 9:].clone()
        chunk[0, 8:] = tokens[1, 5]  # the first row's padding: the poison too, if there is one
        results.append([model(tokens, sparse=method), model(tokens[:, :9], None, cache, method)])
        results[-1].append(model.prefill(chunk, lengths - 9, cache, method))
        results[-1] += [model(token, None, cache, method) for token in steps.split(1, dim=1)]
    for out, ref in zip(*results):
        assert torch.equal(out[0], ref[0]) and ref.isfinite().all()
        assert out[1, -1].isnan().all()


# ---------------------------------------------------------------- torch.set_default_dtype

@pytest.mark.parametrize("other", [BF16, torch.float64])
def test_a_default_dtype_changes_no_number(other):
    """
    A tensor made without a dtype: inference scripts set bfloat16, and a memory's state, fp32 by all
    docs, rounds at every step.
    """
    model = tiny(memory=True, n_kv_head=2, width=64).to(DEVICE)
    tokens = draw_tokens(2, 60).to(DEVICE)
    with torch.no_grad():
        for own in model.layers:
            own.self_attn.memory.proj.bias.fill_(5.0)  # a long memory
    q, k, v = draw_qkv(2, 40, 4, 2, seed=3)
    lengths, weight = torch.tensor([60, 31], device=DEVICE), normal(2, 60).abs()

    def numbers():
        found = []
        for method in Dense(), Quest(24, 8), SnapKV(20, 6), MoBA(24, 8, random=1), Dilated(8, 0, 0):
            cache = model.new_cache(2, 80)
            found.append(model.prefill(tokens, lengths, cache, method).clone())
            found += [model.step(tokens[:, t], cache, method).clone() for t in range(3)]
            found += list(cache.state)
        loss = model.loss(tokens, weight)
        found += [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]
        made = fresh(Transformer, model.config, 3) | memory_tensors(Decay, model.config, 0.1)
        found += [make() for make in made.values()]
        return [*found, effective_length(v), *memory_scan(k, v, v), *model.score(tokens, weight)]

    expected, before = numbers(), torch.get_default_dtype()
    torch.set_default_dtype(other)
    try:
        found = numbers()
    finally:
        torch.set_default_dtype(before)
    for x, ref in zip(found, expected, strict=True):
        assert x.dtype == ref.dtype and torch.equal(x, ref)
