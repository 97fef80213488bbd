"""
What every kernel keeps, whatever it computes: the contract. kernel_cases.py has the kernels.

    as good as PyTorch     on a case of each setting, at lengths off the tile, with NaN behind what
                           may be read and in what was not written
    however it is cut      tiles, splits, chunks and buffers of other sizes give as good a result
    NaN stays in its row   rows of a batch do not meet, forward or backward
    an operator            torch.compile sees through the launcher, and its fakes do not lie
    a refusal              of what it does not cover

At the end is what is one kernel's own: ties, and NaN in places that no case above has. test_numbers
has the edges of the number format, test_backend the kernels one after the other, in models.
"""
import ast
from inspect import getsource, signature

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import KernelInterface

import kernel_cases
import kernels
from conftest import DEVICE, assert_close, error, refused, times
from kernel_cases import (BF16, FP32, KERNELS, PATTERNS, RATPLUS, Case, assert_routes, draw,
                          draw_prompt, inf, mask_of, nan, with_gradients)
from sparse import Dilated, attend, attend_to_slots
from triton_ops import block, common, dilated, moba, quest, snapkv, topk
from triton_ops.moba import moba_attend
from triton_ops.moba_route import moba_route

pytestmark = pytest.mark.usefixtures("poisoned", "plain_references")


def case_of(name, index, pinned=(), spoilt=None, seed=0):
    """-> run, check, and what was drawn"""
    _, settings, make = KERNELS[name]
    case = Case(seed, name, index, pinned, spoilt)
    return *make(case, *settings[index]), case.drawn


def check_case(name, index, pinned=(), seed=0):
    run, check, drawn = case_of(name, index, pinned, seed=seed)
    try:
        check(run())
    except AssertionError as error:
        raise AssertionError(f"{name} {index} {drawn}: {error}") from None


# ---------------------------------------------------------------- as good as PyTorch

SLOW = [("memory_scan", index) for index in (4, 5, 6, 7)]  # in the interpreter, 6 s and more


@pytest.mark.parametrize("name, index", [
    (name, index) for name, (_, settings, _) in KERNELS.items() for index in range(len(settings))
    if DEVICE == "cuda" or (name, index) not in times(SLOW, [])])
def test_a_kernel_is_as_good_as_pytorch(name, index):
    """
    A wrong mask, scale, head, block, tile or token; a row past the end that counts; an element that
    nobody wrote. With --slow of 20 draws each.
    """
    for seed in range(times(1, 20)):
        check_case(name, index, seed=seed)


length = lambda tile: tile["ROWS"] * tile["STRIPS"]
TILE, NARROW = length(kernels.TILE), length(kernels.NARROW_BOTH)
ONE_ROW = dict(whole=True, padding=0)
EDGES = [  # kernel, setting, what is pinned
    # a strip or tile that starts from the wrong state, at its ends and beyond
    *(("memory_scan", index, dict(T=T, state=True, gradients="drawn", shift=0, spread=4))
      for T in (1, 15, 16, 17, TILE - 1, TILE, TILE + 1, 150) for index in (0, 8)),
    ("memory_scan", 0, dict(T=TILE + 1, state=False)),  # a first tile that waits for nobody's state
    # a product of decays that drifts over many tiles
    ("memory_scan", 0, dict(T=4 * TILE + 7, state=True, gradients="drawn", shift=8, spread=0.1)),
    *(("memory_scan", index, dict(T=T, gradients="strided", state=True))
      for index, T in ((0, 70), (8, 70), (2, TILE + 3), (1, TILE + 3))),
    ("decode_step", 0, dict(B=3, slots=40, used=[17, 33, 40])),
    ("decode_step", 1, dict(B=2, slots=40, used=[1, 24])),
    # a K beyond one tile, without and with the tensor cores; a last row of x, one too many
    *(("products", index, dict(K=K, R=R)) for index, K, R in (
        (0, 5000, 1), (1, 2049, 1), (6, 4096, 1), (2, 300, 16), (3, 300, 4), (5, 16, 7),
        (10, 600, 64))),
    *(("swiglu_products", index, dict(K=3000, N=7)) for index in (0, 1, 2, 7)),
    ("add_norm", 3, dict(C=1000)), ("norm_rotate", 1, dict(B=2, T=7)),
    # full rows, blocks that are just full, and less than a block
    *(("block_bounds", index, dict(Tk=117, B=3, used=[117, 64, 3])) for index in range(7)),
    *(("quest_scores", index, dict(Tk=150, B=3, used=[150, 128, 9])) for index in range(7)),
    *(("quest_attend", index, dict(Tk=270, B=3, used=[270, 170, 5])) for index in range(7)),
    ("attend_slots", 0, dict(Tk=270, B=3, used=[270, 64, 1])),
    *(("select", index, dict(R=4, N=N, S=S, kind=kind)) for index, (N, S, kind) in enumerate((
        (1, 1, "special"), (64, 67, "special"), (1000, 501, "ties"), (5000, 5000, "wild")))),
    # counts that are as large as they can be
    *(("select", 2, dict(R=2, N=N, S=N // 2, kind="positive")) for N in (512, 513, 1024)),
    # a window that is the prompt, longer than it, one shorter
    *(("snapkv_scores", index, dict(Tk=205, B=4, lengths=[205, W + 1, W, 5]))
      for index, W in enumerate((16, 8, 20, 64, 32, 33))),
    # several blocks, and tiles of a block; one query; a chunk whose last query stands in the last
    # slot, and one that leaves the cache
    *(("moba_" + part, index, dict(Tq=T, B=1, start=[0], **ONE_ROW)) for part in ("route", "attend")
      for index, T in enumerate((51, 150, 140, 101, 51, 100, 200, 200, 330))),
    *(("moba_" + part, index, dict(Tq=1, B=3, start=[0, 0, 0], **ONE_ROW))
      for part in ("route", "attend") for index in (0, 5)),
    *(("moba_" + part, index, dict(Tq=30, Tk=67, B=2, start=start, whole=False, padding=0))
      for part in ("route", "attend") for index in (0, 1, 8) for start in ([37, 5], [67, 35])),
    # so many blocks that some scores are close: bf16 means that lose what tells them apart
    ("moba_route", 4, dict(Tq=400, B=1, start=[0], **ONE_ROW)),
    *(("dilated", 0, dict(B=1, T=T)) for T in (1, 15, 16, 17)),
    *(("dilated", 1, dict(B=1, T=T)) for T in (16, 200)),
    # a window that ends with a tile of keys, one key before and one behind
    *(("dilated", 10, dict(B=1, T=T)) for T in (64, 65, 129)),
    *(("dilated", index, dict(B=2, T=63, pattern=pattern, gradients=gradients))
      for pattern in PATTERNS.values() for index, gradients in ((0, "drawn"), (3, "strided"))),
    *(("dilated_step", 0, dict(B=2, Tk=100, pattern=PATTERNS[name], start=start, padding=0,
                               chunk=Tq > 1, Tq=Tq))
      for name in ("arl", "all three", "streaming", "initial beyond a chunk")
      for Tq, start in ((1, [99, 41]), (1, [0, 64]), (20, [80, 23]), (20, [88, 12]))),
    # a tile whose queries are all padding, so far behind the cache that no window reaches it
    ("dilated_step", 0, dict(B=2, Tk=100, pattern=(None, 6, 0), start=[40, 95], padding=0,
                             chunk=True, Tq=60)),
    # stretches without masks: where they begin and end, from slot 0 on and in a chunk; initial keys
    # that take a tile and a bit; every key shared
    *(("dilated", index, dict(B=1, T=T)) for index, T in ((13, 225), (14, 257), (14, 330))),
    ("dilated", 13, dict(B=1, T=150, pattern=(2, 70, 40))),
    ("dilated", 14, dict(B=1, T=260, pattern=(1, 0, 0))),
    *(("dilated_step", index, dict(B=2, Tk=400, start=start, chunk=True, Tq=60, padding=0))
      for index in (8, 9) for start in ([340, 201], [375, 13])),
    # splits of a long list and of none; a row that fills but one of them
    *(("dilated_step", index, dict(B=3, Tk=450, start=[449, 300, 9], chunk=False, pattern=pattern))
      for index in (8, 9) for pattern in ((2, 120, 3), (1, 0, 0), (None, 440, 2))),
]


@pytest.mark.parametrize("name, index, pinned", EDGES, ids=str)
def test_a_kernel_is_as_good_at_its_edges(name, index, pinned):
    """As above, where a tile, a block, a window or a cache just ends."""
    check_case(name, index, pinned)


PROMPT = dict(B=2, Tq=100, start=[0, 0], **ONE_ROW)
CUTS = [  # kernel, setting, what is pinned, the constants of a launcher
    # tiles of another length than their grid, or than the states between them are kept for
    *(("memory_scan", 8, dict(T=100), kernels, dict(FILLED=n)) for n in (0, 10**9)),
    # a row of several tiles: a count of one only, ranks that restart, ties counted per tile
    *(("select", 2, dict(R=4, N=150, S=S, kind=kind), topk.SELECT, dict(max_kept=128, max_scan=32))
      for S in (60, 170) for kind in ("normal", "ties", "special")),
    ("select", 2, dict(R=1, N=3000, S=1500, kind="positive"), topk.SELECT,
     dict(max_kept=128, max_scan=32)),
    # a split weighed wrongly; a split without a key
    *((name, index, dict(Tk=270, B=3, used=[270, 170, 5]), quest.ATTEND, dict(programs=n))
      for name in ("quest_attend", "attend_slots") for index in range(7) for n in (1, 264)),
    # more tiles of keys than are put together at once, of other weights
    ("snapkv_scores", 0, dict(Tk=1100, B=1, lengths=[1100]), snapkv.SNAPKV, dict(BLOCK_T=32)),
    # lists that go on in another tile of queries, or in another chunk of a block's queries
    *(("moba_attend", 0, PROMPT, moba.LISTS, dict(BLOCK_T=n)) for n in (16, 64)),
    *(("moba_attend", 1, PROMPT, moba.GATHER_FP32, dict(CHUNK=n)) for n in (1, 2)),
    *(("moba_attend", 1, PROMPT, moba.GRAD_FP32, dict(CHUNK=n)) for n in (1, 8)),
    # a head that reads what another left in the buffer, or writes to another's place
    *(("moba_attend", 3, dict(B=2, Tq=40, **ONE_ROW), moba, dict(PARTIAL_BYTES=n))
      for n in (1, 3 * 12288, 3 * 22528)),  # one head at a time; three, forward or backward
    # queries dropped or counted twice; shared gradients stored over the others' instead of added
    *(("dilated", index, dict(B=1, T=100), dilated, dict(SPLIT_UP_TO=n))
      for index in (0, 1, 12) for n in (1, 3, 50)),
    # a step's keys read by two of its splits or by none
    *(("dilated_step", index, dict(B=2, Tk=450, start=[449, 200], chunk=False), dilated,
       dict(SPLIT_UP_TO=n)) for index in (8, 9) for n in (1, 8, 12)),
    # the ends of narrow tiles, with gradients and without
    *(("memory_scan", index, dict(T=T, state=True, gradients="drawn"), kernels, dict(FEW=10**9))
      for index, T in ((0, NARROW - 1), (0, NARROW + 1), (8, 3 * NARROW))),
    *(("memory_scan", 8, dict(T=length(kernels.NARROW_TILE) + more, state=True), kernels,
       dict(FEW=10**9)) for more in (-1, 1)),
]


TWO_OF_THREE = [cut for n, cut in enumerate(CUTS) if n % 3]  # the interpreter takes seconds each


@pytest.mark.parametrize("name, index, pinned, where, values",
                         CUTS if DEVICE == "cuda" else times(TWO_OF_THREE, CUTS), ids=str)
def test_a_kernel_is_as_good_however_it_is_cut(name, index, pinned, where, values, monkeypatch):
    """A tile, split or chunk that the shapes above happen not to need."""
    put = monkeypatch.setitem if isinstance(where, dict) else monkeypatch.setattr
    for constant, value in values.items():
        put(where, constant, value)
    check_case(name, index, pinned)


EARLY = [function for module in (block, quest, topk) for function in vars(module).values()
         if isinstance(function, KernelInterface) and function is not common.await_inputs
         and "EARLY" in signature(function.fn).parameters]


@pytest.mark.parametrize("kernel", EARLY, ids=lambda kernel: kernel.fn.__name__)
def test_a_kernel_that_starts_early_waits_before_it_reads(kernel):
    """
    A load, a store or a call of either before await_inputs: of what the kernel before has still to
    write. Two on a GPU may well not show it.
    """
    code = ast.parse(getsource(kernel.fn)).body[0]
    name = lambda call: getattr(call.func, "id", getattr(call.func, "attr", ""))
    calls = sorted((call for call in ast.walk(code) if isinstance(call, ast.Call)),
                   key=lambda call: (call.lineno, call.col_offset))
    waits = "await_inputs", "times"  # times waits itself
    first = [name(call) for call in calls].index
    before = calls[:min(first(wait) for wait in waits if wait in map(name, calls))]
    touching = [ast.unparse(call) for call in before if name(call) in ("load", "store")
                or name(call).endswith("_halves") or "atomic" in name(call)]
    weights = ["tl.load(w_ptr, mask=mask_n & (offs_k < K), other=0)"]
    assert touching == (weights if kernel.fn.__name__ == "times" else [])


# ---------------------------------------------------------------- rows that do not meet

BATCHES = {  # kernel: setting, what is pinned. Three rows each, of which one is spoilt
    "memory_scan": (2, dict(T=TILE + 5, state=True, gradients="drawn")),
    "decode_step": (0, dict(B=3, slots=40)),
    "products": (3, dict(R=3, K=40)), "swiglu_products": (3, dict(R=3, K=40)),
    "add_norm": (1, dict(B=3)), "norm_rotate": (1, dict(B=3, T=7)), "swiglu": (1, dict(R=3)),
    "block_bounds": (1, dict(B=3)), "quest_scores": (1, dict(B=3)), "select": (1, dict(R=3)),
    "quest_attend": (1, dict(B=3)), "attend_slots": (1, dict(B=3)),
    "snapkv_scores": (0, dict(B=3, Tk=60, lengths=[60, 41, 60])),
    "moba_route": (0, dict(B=3, Tq=50, **ONE_ROW)), "moba_attend": (0, dict(B=3, Tq=50, **ONE_ROW)),
    "dilated": (0, dict(B=3, T=33, gradients="drawn")),
    "dilated_step": (0, dict(B=3, Tk=50, chunk=True, Tq=20)),
}


@pytest.mark.parametrize("name", KERNELS)
def test_nan_stays_in_its_row(name):
    """A row of NaNs, as a diverged sample makes, in another row: 0 * NaN is NaN."""
    index, pinned = BATCHES[name]
    (clean, *_), (spoilt, *_) = (case_of(name, index, pinned, row) for row in (None, 1))
    for i, (out, ref) in enumerate(zip(spoilt(), clean(), strict=True)):
        row = out.shape.index(3)  # the dimension of the batch
        others = torch.tensor([0, 2], device=DEVICE)
        assert torch.equal(out.index_select(row, others), ref.index_select(row, others)), f"out {i}"


# ---------------------------------------------------------------- operators

class Launches(TorchDispatchMode):
    """Records what is launched: {operator: its arguments}."""

    def __init__(self):
        super().__init__()
        self.found = {}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace == "nanorat":
            self.found.setdefault(operator, args)
        return operator(*args, **(kwargs or {}))


DIFFERENTIABLE = {"memory_scan": "memory_forward", "moba_attend": "moba_forward",
                  "dilated": "dilated"}
NO_OPERATORS = "products", "swiglu_products", "add_norm", "norm_rotate", "swiglu"


@pytest.mark.parametrize("name", [name for name in KERNELS if name not in NO_OPERATORS])
def test_launchers_are_operators_that_compile_can_trace(name, monkeypatch):
    """
    A fake that promises another shape, dtype or stride; an output that shares an input's memory; an
    input that is written to and not said to be; a gradient that is not registered, or that
    torch.compile loses; a launcher for which it has to leave the graph.
    """
    index, pinned = BATCHES[name]
    run, *_ = case_of(name, index, pinned | {"T": 9, "Tq": 9})
    with Launches() as launches:
        expected = run()
    assert launches.found
    for operator, args in launches.found.items():
        checks = ["test_schema", "test_faketensor"]
        if operator._opname in DIFFERENTIABLE.values():
            checks.append("test_autograd_registration")
            args = [x.detach().requires_grad_() if isinstance(x, torch.Tensor)
                    and x.is_floating_point() else x for x in args]
        torch.library.opcheck(operator, args, test_utils=checks)

    compiled = lambda f, backend: torch.compile(f, fullgraph=True, backend=backend)
    if name in DIFFERENTIABLE:
        monkeypatch.setattr(kernel_cases, "with_gradients", lambda f, *given: with_gradients(
            compiled(f, "aot_eager"), *given))
    else:
        run = compiled(run, "eager")
    for out, ref in zip(run(), expected, strict=True):
        assert torch.equal(out, ref)


def test_the_memory_without_gradients_is_the_operator_s():
    """A launcher called directly that does something else, or that torch.compile meets."""
    k, v, gate = draw(3, 2, TILE + 9, 2, 16, seed=10)
    with Launches() as launches:
        outs = kernels.memory_scan(k, v, gate)
    assert not launches.found
    compiled = torch.compile(kernels.memory_scan, fullgraph=True, backend="eager")
    for others in (kernels.memory_forward(k, v, gate, None, False)[:3], compiled(k, v, gate)):
        for out, other in zip(outs, others, strict=True):
            assert torch.equal(out, other)


def test_long_patterns_have_tiles_without_masks():
    """The edges above, which would show nothing if every tile were masked."""
    tiles = dilated.TILES["forward_long"], dilated.TILES["query_grad_band"], dilated.TILES["fp32"]
    for tile in tiles:
        for dilation, local, _ in (PATTERNS["whole tiles"], RATPLUS):
            assert dilated.has_whole(tile, local, 400 // dilation)
    assert not dilated.has_whole(dilated.TILES["forward"], 0, 4096 // 64)  # ARL's pass


# ---------------------------------------------------------------- what is refused

def x(*shape, dtype=torch.float32):
    return torch.zeros(*shape, dtype=dtype, device=DEVICE)


HALF = torch.float16
Q, K, USED = (1, 20, 2, 16), (1, 20, 1, 16), torch.tensor([20], device=DEVICE)
route = lambda q, k, block_size=8, S=2: moba_route(q, k, USED * 0, block_size, S, True)
shared = lambda q, k, v: dilated.dilated(q, k, v, USED * 0, 4, 0, 0)
REFUSED = [  # a call, a word of the message
    # a gate of another width read past its end
    (lambda: kernels.memory_scan(x(*K), x(*K), x(1, 20, 1, 8)), "must agree"),
    (lambda: kernels.memory_scan(*[x(1, 4, 1, 8)] * 3), "multiples of 16"),
    (lambda: kernels.memory_scan(*[x(1, 0, 1, 16)] * 3), "no tokens"),
    # a row too many, which would be left out; a transposed matrix; a sum with another shape; a
    # program of two matrices
    (lambda: block.products(x(65, 1, 16), [x(8, 16)]), "up to 64 rows"),
    (lambda: block.products(x(1, 1, 8), [x(8, 16).T]), "views"),
    (lambda: block.products(x(2, 1, 16), [x(8, 16)], onto=x(1, 2, 8)), "onto is"),
    (lambda: block.products(x(1, 1, 16), [x(6, 16), x(8, 16)]), "multiples of 16"),
    (lambda: block.swiglu_products(x(1, 1, 16), x(8, 16), x(4, 16)), "with"),
    (lambda: block.add_norm(x(1, 4, 8)[..., ::2], x(1, 4, 4), x(4), 1e-6), "contiguous"),
    # widths that are no power of two, other dtypes, or a last dim with gaps
    (lambda: quest.block_bounds(x(1, 20, 1, 24), USED, 8), "D=24"),
    (lambda: quest.block_bounds(x(*K, dtype=HALF), USED, 8), "float16"),
    (lambda: quest.block_bounds(x(1, 20, 1, 32)[..., ::2], USED, 8), "stride"),
    (lambda: snapkv.snapkv_scores(x(1, 8, 2, 16, dtype=BF16), x(*K), USED, 5), "beside"),
    (lambda: snapkv.snapkv_scores(x(1, 8, 2, 16), x(*K), USED, 4), "odd"),
    (lambda: topk.select(x(2, 5, dtype=BF16), 3), "float32"),
    (lambda: route(x(*Q)[..., :8], x(*K)[..., :8]), "head width D=8"),
    (lambda: route(x(*Q, dtype=HALF), x(*K, dtype=HALF)), "bf16 or fp32"),
    (lambda: route(x(1, 16, 2, 20).transpose(1, 3), x(*K)), "contiguous"),
    (lambda: route(x(*Q, dtype=BF16), x(*K)), "bf16 or fp32"),
    (lambda: route(x(*Q), x(1, 9, 1, 16)), "more queries than slots"),
    (lambda: route(x(1, 1, 2, 16), x(1, 1, 1, 16).expand(1, 3000, 1, 16), 1), "3000 blocks"),
    (lambda: route(x(*Q), x(*K), S=1), "room"),
    (lambda: moba_attend(x(*Q), x(*K), x(*K), x(1, 1, 20, 2).long(), USED * 0, 8), "chosen"),
    (lambda: shared(x(*Q)[..., :8], x(*K)[..., :8], x(*K)[..., :8]), "heads of 8"),
    (lambda: shared(x(*Q), x(*K, dtype=BF16), x(*K)), "bfloat16"),
    (lambda: shared(x(1, 20, 3, 16), x(*Q), x(*Q)), "3 query heads on 2"),
    # gradients of a chunk
    (lambda: shared(x(1, 2, 2, 16).requires_grad_(), x(*K), x(*K)).sum().backward(),
     "as many keys as queries"),
]


@pytest.mark.parametrize("call, word", REFUSED, ids=[word for _, word in REFUSED])
def test_what_is_not_covered_is_refused(call, word):
    """Silent garbage from a kernel that runs on shapes or dtypes it was not written for."""
    refused(call, word, error=AssertionError)


# ---------------------------------------------------------------- one kernel's own

def slots(*values):
    return torch.tensor(values, device=DEVICE)


def test_a_nan_is_not_an_unwritten_state():
    """A NaN taken for a state that nobody has written yet: then this test does not end."""
    k, v, gate = 3 * draw(3, 2, TILE + 9, 2, 16, seed=10)
    state = draw(2, 2, 2, 16)
    clean = kernels.memory_scan(k, v, gate, state)
    k[0, 3], gate[0, 5] = nan, nan
    state[:, 0] = torch.tensor(-1, dtype=torch.int32).view(torch.float32)  # all bits set
    for out, ref, row in zip(kernels.memory_scan(k, v, gate, state), clean, (0, 0, 1)):
        assert torch.equal(out.select(row, 1), ref.select(row, 1))


def test_quest_without_any_key_is_zero():
    """Minus infinity from minus infinity, or a division by an empty sum; in one split or in all."""
    q, (k, v), used = draw(2, 1, 2, 16), draw(2, 2, 40, 1, 16, seed=1), slots(40, 40)
    chosen = torch.full((2, 1, 4), -1, dtype=torch.int32, device=DEVICE)
    chosen[1, 0, 3] = 2  # one split of row 1 reads
    y, read = quest.quest_attend(q, k, v, chosen, used, 16)
    assert torch.equal(y[0], torch.zeros_like(y[0])) and (read[0] == -1).all()
    assert_close(y[1:], attend_to_slots(q, k, v, read)[1:])


def test_a_row_of_nan_keeps_its_window():
    """What is forced lost among scores of NaN."""
    q, k = draw(2, 16, 4, 16), draw(2, 100, 2, 16, seed=1)
    q[1], k[1] = nan, nan
    assert ((snapkv.snapkv_scores(q, k, slots(100, 77), 5) == inf).sum(-1) == 16).all()


def test_a_window_of_scores_far_below_zero():
    """A band's softmax that starts from a score of its own, beside which all others round to 0."""
    q, (k, v) = 30 + draw(1, 100, 2, 16), draw(2, 1, 100, 1, 16, seed=1)
    k, i = k - 30, torch.arange(100, device=DEVICE)[:, None]
    keep = Dilated(None, 7, 0).pattern(i, i.mT)
    y = dilated.dilated(q, k, v, slots(0), None, 7, 0)
    assert_close(y, attend(q, k, v, keep), atol=1e-3)


def test_a_split_step_gives_what_one_program_does(monkeypatch):
    """The splits' sum of exponentials, which no y shows, lost or without its empty splits."""
    q, (k, v) = draw(2, 1, 6, 16), draw(2, 2, 450, 2, 16, seed=1)
    outs = []
    for programs in 1, 264:
        monkeypatch.setattr(dilated, "SPLIT_UP_TO", programs)
        outs.append(dilated.dilated_forward(q, k, v, slots(449, 9), 2, 120, 3))
    for one, several in zip(*outs):
        assert_close(several, one)


@pytest.mark.parametrize("S", [1, 2, 5])
def test_equal_scores_give_the_lowest_blocks(S):
    """A bisection that never ends, takes more than S, or the wrong ones, when all scores tie."""
    q, k, _ = draw_prompt(2, 70, 2, 1, 16, 70, FP32, seed=0)
    q, k = q.round(), k.round()  # sums of products of small integers are exact in any order
    k[0] = k[0, :1]
    q[1, ::2] = 0
    chosen = moba_route(q, k, slots(0, 0), 8, S, False)
    own = torch.arange(70, device=DEVICE)[:, None] // 8
    lowest = torch.arange(S - 1, device=DEVICE).expand(70, -1)
    expected = torch.cat([lowest.where(lowest < own, 99), own], dim=1).sort(1).values
    expected = expected.where(expected < 99, -1).int()
    assert torch.equal(chosen[0, 0], expected)
    assert torch.equal(chosen[1, 0, ::2], expected[::2])


def test_close_scores_are_told_apart():
    """bf16 means that lose what tells blocks apart; a bisection that stops before its end."""
    q, k, _ = draw_prompt(1, 300, 1, 1, 16, 300, FP32, seed=5)
    k = (1 + k / 1000 * torch.arange(300, device=DEVICE)[:, None, None] ** -0.5).contiguous()
    assert_routes(moba_route(q, k, slots(0), 8, 9, True), q, k, slots(0), 8, 9, True)


@pytest.mark.parametrize("start, Tq", [((960, 1000), 70), ((1024,), 8)])
def test_wide_tiles_route_like_narrow_ones(start, Tq, monkeypatch):
    """
    A query left out between two widths of moba_route_kernel, or routed by both; or one in block 128
    by a tile of 128 blocks, which writes four words of its. Words that are not written are 8 here.
    """
    monkeypatch.setattr(torch, "empty", lambda *shape, **kwargs: torch.full(shape, 8, **kwargs))
    q, k, _ = draw_prompt(len(start), Tq, 2, 1, 16, 1080, FP32, seed=6)
    settings = slots(*start), 8, 6, True  # the second row's tile crosses from 128 to 129 blocks
    assert_routes(moba_route(q, k, *settings), q, k, *settings)


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU, whose shared memory is what may run out")
@pytest.mark.parametrize("T, block_size, S, dtype", [
    (131072, 64, 8, BF16), (16384, 32, 256, BF16), (65536, 32, 4, FP32)])
def test_many_blocks_fit_the_gpu(T, block_size, S, dtype):
    """A tile that grows with the number of blocks, or of blocks per query, beyond its memory."""
    q, k, v = draw_prompt(1, T, 1, 1, 128, T, dtype, seed=0)
    chosen = moba_route(q, k, slots(0), block_size, S, True)
    ours = lambda *x: moba_attend(*x, chosen, slots(0), block_size)
    y, *_ = with_gradients(ours, (q, k, v), [ours(q, k, v)])
    q, chosen, start = q[:, -8:], chosen[:, :, -8:], slots(T - 8)
    assert_routes(chosen, q, k, start, block_size, S, True)
    keep = mask_of(chosen, q, k, start, block_size)
    exact = attend(*(x.float() for x in (q, k, v)), keep)
    assert error(y[:, -8:], exact) <= {FP32: 1e-5, BF16: 1e-2}[dtype]


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_scores_of_nan_choose_blocks_that_exist(dtype):
    """A search for the cut that NaN has misled, and that writes outside its row."""
    q, k, _ = draw_prompt(1, 50, 2, 1, 16, 50, dtype, seed=11)
    q[0, 30], k[0, 7] = nan, nan
    chosen = moba_route(q, k, slots(0), 8, 3, True)
    own = torch.arange(50, device=DEVICE)[:, None] // 8
    assert ((chosen >= -1) & (chosen <= own)).all()


def test_lists_take_whole_tiles():
    """A tile of partial results that reaches into the next list's: a race, on a GPU alone."""
    q, k, _ = draw_prompt(2, 100, 2, 1, 16, 100, FP32, seed=3)
    chosen = moba_route(q, k, slots(0, 0), 8, 4, True)
    lists = moba.file_queries(chosen, slots(0, 0), 13, 100, 8, dict(BLOCK_M=16, CHUNK=1))
    begin, length = lists.begin.flatten(), lists.length.flatten()
    ends = begin + (length + 15) // 16 * 16
    assert (ends[:-1] <= begin[1:]).all() and ends[-1] <= len(lists.queries)
    for z in range(2):
        for n in range(13):
            query = lists.queries[lists.begin[z, n]:][:lists.length[z, n]]
            t, s = (chosen[z, 0] == n).nonzero(as_tuple=True)
            assert torch.equal(query, t.int())
            assert torch.equal(lists.queries[lists.place[z, s, t].long()], query)


def test_nan_of_one_query_leaves_the_gradients_of_others():
    """A gathered tile filled up with another query's NaN, which 0 * NaN would spread."""
    q, k, v = draw_prompt(1, 50, 2, 1, 16, 50, FP32, seed=18)
    chosen = moba_route(q, k, slots(0), 8, 3, True)
    f, dy = lambda *x: moba_attend(*x, chosen, slots(0), 8), [torch.ones(1, 50, 2, 16).to(DEVICE)]
    clean = with_gradients(f, (q, k, v), dy)
    q[0, 0] = nan  # a query that only the first block meets
    for x, ref in zip(with_gradients(f, (q, k, v), dy), clean):
        assert torch.equal(x[:, 8:], ref[:, 8:])
