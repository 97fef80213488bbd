"""
What every kernel keeps, whatever it computes: the contract. kernel_cases.py has the kernels.

    as good as PyTorch     on a case of each setting, at lengths off the tile, with NaN behind what
                           may be read and in what was not written
    however it is cut      tiles, splits, chunks and buffers of other sizes give as good a result
    NaN stays in its row   rows of a batch do not meet, forward or backward
    an operator            torch.compile sees through the launcher, and its fakes do not lie
    a refusal              of what it does not cover

test_kernels_own.py has what is one kernel's own, test_numbers.py the edges of the number format.
"""
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from conftest import DEVICE, one_line, times
from kernel_cases import KERNELS, PATTERNS, Case, draw, with_gradients
from triton_ops import block, dilated, moba, moba_route, quest, snapkv, topk

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


TILE = kernels.TILE["ROWS"] * kernels.TILE["STRIPS"]
ONE_ROW = dict(whole=True, padding=0)
EDGES = [  # kernel, setting, what is pinned
    # a strip or tile that starts from the wrong state, at its ends and beyond
    *(("memory_scan", index, dict(T=T, state=True, gradients="drawn", shift=0, spread=4))
      for T in (1, 15, 16, 17, TILE - 1, TILE, TILE + 1, 150) for index in (0, 8)),
    ("memory_scan", 0, dict(T=TILE + 1, state=False)),  # a first tile that waits for nobody's state
    *(("memory_scan", index, dict(T=T, gradients="strided", state=True))
      for index, T in ((0, 70), (8, 70), (2, TILE + 3), (1, TILE + 3))),
    ("decode_step", 0, dict(B=3, slots=40, used=[17, 33, 40])),
    ("decode_step", 1, dict(B=2, slots=40, used=[1, 24])),
    # a K beyond one tile, without and with the tensor cores; a last row of x, one too many
    *(("products", index, dict(K=K, R=R)) for index, K, R in (
        (0, 5000, 1), (6, 4096, 1), (2, 300, 16), (3, 300, 4), (5, 16, 7))),
    *(("swiglu_products", index, dict(K=3000, N=7)) for index in (0, 1, 2)),
    ("add_norm", 3, dict(C=1000)), ("norm_rotate", 1, dict(B=2, T=7)),
    # full rows, blocks that are just full, and less than a block
    *(("block_bounds", index, dict(Tk=117, B=3, used=[117, 64, 3])) for index in range(7)),
    *(("quest_scores", index, dict(Tk=150, B=3, used=[150, 128, 9])) for index in range(7)),
    *(("quest_attend", index, dict(Tk=270, B=3, used=[270, 170, 5])) for index in range(7)),
    ("attend_slots", 0, dict(Tk=270, B=3, used=[270, 64, 1])),
    *(("select", index, dict(R=4, N=N, S=S, kind=kind)) for index, (N, S, kind) in enumerate((
        (1, 1, "special"), (64, 67, "special"), (1000, 501, "ties"), (5000, 5000, "wild")))),
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
    *(("dilated", index, dict(B=2, T=63, pattern=pattern, gradients=gradients))
      for pattern in PATTERNS.values() for index, gradients in ((0, "drawn"), (3, "strided"))),
    *(("dilated_step", 0, dict(B=2, Tk=100, pattern=PATTERNS[name], start=start, padding=0,
                               chunk=Tq > 1, Tq=Tq))
      for name in ("arl", "all three", "streaming", "initial beyond a chunk")
      for Tq, start in ((1, [99, 41]), (1, [0, 64]), (20, [80, 23]), (20, [88, 12]))),
]


@pytest.mark.parametrize("name, index, pinned", EDGES, ids=str)
def test_a_kernel_is_as_good_at_its_edges(name, index, pinned):
    """As above, where a tile, a block, a window or a cache just ends."""
    check_case(name, index, pinned)


@contextmanager
def constants(where, **values):
    """The entries of a dict, or the names of a module, while this lasts."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            put = patch.setitem if isinstance(where, dict) else patch.setattr
            put(where, name, value)
        yield


PROMPT = dict(B=2, Tq=100, start=[0, 0], **ONE_ROW)
CUTS = [  # kernel, setting, what is pinned, the constants of a launcher
    # tiles of another length than their grid, or than the states between them are kept for
    *(("memory_scan", 8, dict(T=100), kernels, dict(FILLED=n)) for n in (0, 10**9)),
    # a row of several tiles: a count of one only, ranks that restart, ties counted per tile
    *(("select", 2, dict(R=4, N=150, S=S, kind=kind), topk.SELECT, dict(max_kept=128, max_scan=32))
      for S in (60, 170) for kind in ("normal", "ties", "special")),
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
    *(("moba_attend", 3, dict(B=2, Tq=40, **ONE_ROW), moba, dict(PARTIAL_BYTES=n * 40 * 3 * 16 * 4))
      for n in (1, 3)),
    # queries dropped or counted twice; shared gradients stored over the others' instead of added
    *(("dilated", index, dict(B=1, T=100), dilated, dict(SPLIT_UP_TO=n))
      for index in (0, 1) for n in (1, 3, 50)),
]


@pytest.mark.parametrize("name, index, pinned, where, values", CUTS, ids=str)
def test_a_kernel_is_as_good_however_it_is_cut(name, index, pinned, where, values):
    """A tile, split or chunk that the shapes above happen not to need."""
    with constants(where, **values):
        check_case(name, index, pinned)


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


def test_every_kernel_has_a_batch():
    assert BATCHES.keys() == KERNELS.keys()


@pytest.mark.parametrize("name", BATCHES)
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


DIFFERENTIABLE = "memory_forward", "moba_forward", "dilated"


@pytest.mark.parametrize("name", [name for name in BATCHES if name not in (
    "products", "swiglu_products", "add_norm", "norm_rotate", "swiglu")])  # no operators: functions
def test_launchers_are_operators_that_compile_can_trace(name):
    """
    A fake that promises another shape, dtype or stride; an output that shares an input's memory; an
    input that is written to and not said to be; a gradient that is not registered.
    """
    index, pinned = BATCHES[name]
    run, *_ = case_of(name, index, pinned | {"T": 9, "Tq": 9})
    with Launches() as launches:
        run()
    assert launches.found
    for operator, args in launches.found.items():
        checks = ["test_schema", "test_faketensor"]
        if operator._opname in DIFFERENTIABLE:
            checks.append("test_autograd_registration")
            args = [x.detach().requires_grad_() if isinstance(x, torch.Tensor)
                    and x.is_floating_point() else x for x in args]
        torch.library.opcheck(operator, args, test_utils=checks)


def quest_and_snapkv(q, k, v, used, window):
    low, high = quest.block_bounds(k, used, 8)
    scores = quest.quest_scores(q, low, high, used, 8, True, True)
    y, slots = quest.quest_attend(q, k, v, topk.select(scores, 4), used, 8)
    return low, high, scores, y, slots, snapkv.snapkv_scores(window, k, used, 5)


def test_a_step_and_a_compression_compile_whole():
    """A launcher that torch.compile has to leave the graph for."""
    k, v = draw(2, 2, 50, 2, 16)
    inputs = draw(2, 1, 4, 16), k, v, torch.tensor([50, 41], device=DEVICE), draw(2, 16, 4, 16)
    compiled = torch.compile(quest_and_snapkv, backend="eager", fullgraph=True)
    for out, ref in zip(compiled(*inputs), quest_and_snapkv(*inputs), strict=True):
        assert torch.equal(out, ref)


def start_of(x):
    return torch.zeros(len(x), dtype=torch.long, device=DEVICE)


@pytest.mark.parametrize("f", [
    lambda *x: kernels.memory_scan(*x)[:2],
    lambda *x: [dilated.dilated(*x, start_of(x[0]), *PATTERNS["arl"])]], ids=["memory", "dilated"])
def test_a_training_pass_compiles_whole(f):
    """An operator whose gradient torch.compile loses."""
    inputs, gradients = draw(3, 2, 20, 2, 16, seed=12).unbind(), draw(2, 2, 20, 2, 16, seed=13)
    gradients = gradients[:len(f(*inputs))]
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for out, ref in zip(with_gradients(compiled, inputs, gradients),
                        with_gradients(f, inputs, gradients), strict=True):
        assert torch.equal(out, ref)


# ---------------------------------------------------------------- what is refused

def x(*shape, dtype=torch.float32):
    return torch.zeros(*shape, dtype=dtype, device=DEVICE)


HALF, BF16 = torch.float16, torch.bfloat16
Q, K, USED = (1, 20, 2, 16), (1, 20, 1, 16), torch.tensor([20], device=DEVICE)
route = lambda q, k, block_size=8, S=2: moba_route.moba_route(q, k, USED * 0, block_size, S, True)
attend = lambda q, k, v: dilated.dilated(q, k, v, USED * 0, 4, 0, 0)
REFUSED = [  # a call, a word of the message
    # a gate of another width read past its end
    (lambda: kernels.memory_scan(x(*K), x(*K), x(1, 20, 1, 8)), "must agree"),
    (lambda: kernels.memory_scan(*[x(1, 4, 1, 8)] * 3), "multiples of 16"),
    # a row too many, which would be left out; a transposed matrix; a program of two matrices
    (lambda: block.products(x(17, 1, 16), [x(8, 16)]), "up to 16 rows"),
    (lambda: block.products(x(1, 1, 8), [x(8, 16).T]), "views"),
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
    (lambda: moba.moba_attend(x(*Q), x(*K), x(*K), x(1, 1, 20, 2).long(), USED * 0, 8), "chosen"),
    (lambda: attend(x(*Q)[..., :8], x(*K)[..., :8], x(*K)[..., :8]), "heads of 8"),
    (lambda: attend(x(*Q), x(*K, dtype=BF16), x(*K)), "bfloat16"),
    # gradients of a chunk
    (lambda: attend(x(1, 2, 2, 16).requires_grad_(), x(*K), x(*K)).sum().backward(),
     "as many keys as queries"),
]


@pytest.mark.parametrize("call, word", REFUSED, ids=[word for _, word in REFUSED])
def test_what_is_not_covered_is_refused(call, word):
    """Silent garbage from a kernel that runs on shapes or dtypes it was not written for."""
    with pytest.raises(AssertionError) as raised:
        call()
    one_line(raised, word)
