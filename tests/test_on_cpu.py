"""
triton_ops/on_cpu.py: what two hooks give sooner on a CPU is what sparse.py defines, and what is
not the code of sparse.py is computed as it is written. All of it without Triton.
"""
import math
import sys
from dataclasses import astuple, dataclass

import pytest
import torch
from hypothesis import assume, given, strategies as st

import engine
import sparse
from cache import Cache, LayerCache
from conftest import FORMS, assert_as_good, assert_close, draw_tokens, tiny
from drawn import (ROOM, configs, decisive, exact, heads, junk, law, methods, mobas, quests,
                   seeds, talks, told)
from sparse import Dense, MoBA, Quest, SnapKV, compose, phases, window_of
from triton_ops import backend, on_cpu

QUEST, MOBA = Quest(16, 4), MoBA(12, 4)
LIKE, BLOCK_BOUNDS = torch.empty(0, 16), on_cpu.block_bounds
FINITE = junk.filter(math.isfinite)
single = st.sampled_from([torch.float32, torch.bfloat16])


@pytest.fixture(autouse=True)
def small_and_without_triton(monkeypatch):
    """Blocks instead of a mask for the shortest prompts too, in many parts and tiles."""
    for name, value in (("EXTRA", -10**6), ("ROWS", 50), ("TILE", 4)):
        monkeypatch.setattr(on_cpu, name, value)
    for name in "triton", "triton_ops.quest", "triton_ops.selectors":
        monkeypatch.setitem(sys.modules, name, None)  # then to import it is an error


def plainly(run, *args, **settings):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "choice", "torch")
        return run(*args, **settings)


def hook(method, phase):
    with torch.no_grad():
        return backend.hook(method, phase, LIKE)


def draw(*shapes, seed, dtype=torch.float32):
    source = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=source).to(dtype) for shape in shapes]


# ---------------------------------------------------------------- the forms

@law(150)
@given(heads, mobas, st.lists(st.integers(0, 20), min_size=1, max_size=3), st.booleans(),
       st.integers(1, 30), st.integers(0, 5), single, seeds)
@torch.no_grad()
def test_moba_by_blocks_is_moba_by_mask(heads, method, starts, ragged, Tq, past, dtype, seed):
    """
    A key of the future, of the padding behind a row or of the last block's; a query of another row,
    head or part; a NaN that spreads, from keys that nobody reads or from a query.
    """
    (H, KV), B, D = heads, len(starts), 16
    assume(B * Tq > 1)
    start, last = starts[0], torch.tensor(starts[:1] * B) + Tq - 1
    if ragged:
        start, last = torch.tensor(starts), torch.tensor(starts) + Tq - 1
    Tk = max(int(last.max()) + 1 - past * ragged, 1)  # queries of padding may stand past it
    shape = B, Tk + 3 * (not ragged), KV, D
    q, k, v = draw((B, Tq, H, D), shape, shape, seed=seed, dtype=dtype)
    for x in k, v:
        x[torch.arange(x.shape[1]) > last[:, None]] = math.nan
    q[0, 0] = math.nan
    others = lambda y: y.flatten(0, 1)[1:]
    dice = torch.arange(B * Tq).view(B, Tq) + seed
    y, chosen = hook(method, "prefill")(q, k, v, start, dice)
    plain, expected = method.prefill(q, k, v, start, dice)
    assert torch.equal(chosen, expected)
    k, v = sparse.up_to_queries(q, k, v, start)
    slot = sparse.query_slots(q, start)
    ref = method.attend_to_blocks(q.double(), k.double(), v.double(), chosen, slot)
    assert_as_good(*map(others, (y, plain, ref)))


@law(80)
@given(heads, quests, st.lists(st.integers(1, 40), min_size=1, max_size=3), FINITE, single, seeds,
     st.sampled_from([(0, 0), (2, 0), (0, 3)]))
@torch.no_grad()
def test_quest_by_bounds_is_quest_by_keys(heads, method, used, behind, dtype, seed, beside):
    """
    Junk behind a row's entries in a bound; a head that reads another's keys, also of a view of
    other heads or channels.
    """
    (H, KV), B, D, used = heads, len(used), 16, torch.tensor(used)
    Tk = int(used.max())
    shape = B, Tk + 9, KV + beside[0], D + beside[1]
    q, k, v = draw((B, 1, H, D), shape, shape, seed=seed, dtype=dtype)
    k, v = (x[:, :, beside[0]:, beside[1]:] for x in (k, v))
    for x in k, v:
        x[torch.arange(Tk + 9) >= used[:, None]] = behind
    dice = torch.arange(B)[:, None] + seed
    layer = LayerCache(k[:, :Tk], v[:, :Tk], used, True, dice, None,
                       lambda block_size: on_cpu.block_bounds(k, used, block_size))
    y, selected = hook(method, "decode")(q, layer)
    plain, expected = method.decode(q, layer)
    assert torch.equal(selected, expected)
    assert_close(y.float(), plain.float(), atol=2e-2 if dtype is torch.bfloat16 else 1e-6)


# ---------------------------------------------------------------- whole models

@law(80)
@given(configs(), methods, talks(), exact, FINITE, seeds)
def test_a_batch_reads_and_says_what_is_defined(config, method, turns, dtype, behind, seed):
    """Ragged rows, prompts in chunks, caches that dropped entries: bounds that are not theirs."""
    model, rows = tiny(**config).to(dtype), draw_tokens(len(turns[0]), ROOM, seed)
    with decisive():
        logits, cache = plainly(told, model, rows, turns, method)
    ours, other = told(model, rows, turns, method, padding=seed % 5, behind=behind)
    assert_close(ours, logits)
    for x, ref in zip(other.selected, cache.selected):
        assert x is ref is None or torch.equal(x.sort(-1).values, ref.sort(-1).values)


IN_TURN = [QUEST, Dense(), Quest(12, 4, keep_first=False), QUEST, Quest(16, 8), QUEST,
           compose(SnapKV(14, 6), QUEST), Quest(16, 4, random=1), compose(SnapKV(14, 6), QUEST)]


def answers(model):
    """Of each method in turn, to a ragged prompt in two chunks: 40 tokens, and what steps read."""
    tokens, lengths = draw_tokens(3, 45, seed=3), torch.tensor([45, 20, 31])
    cache, said, read = model.new_cache(3, 90, window_of(*IN_TURN)), [], []
    model.prefill(tokens[:, :17], None, cache, MOBA)
    logits = model.prefill(tokens[:, 17:], lengths - 17, cache, MOBA)
    for method in IN_TURN:
        with cache.turn(method) as own:
            said.append(model.decode(logits, own, 40, method,
                                     watch=lambda cache: read.append(list(cache.selected))))
            for i, size in enumerate(own.bounded):
                if size:
                    assert_kept(own, i, size)
    return said, [x if x is None else x.sort(-1).values for step in read for x in step]


def assert_kept(cache, i, size):
    """The bounds that steps have kept are those of the keys, in blocks with entries."""
    anew = BLOCK_BOUNDS(cache.k[i], cache.used, size)
    for x, ref in zip(cache.bounds[i][size], anew):
        filled = torch.arange(x.shape[1]) * size < cache.used[:, None]
        assert torch.equal(x[filled], ref[filled])


def test_methods_in_turn_say_and_read_what_is_defined(monkeypatch):
    """A bound that another turn's tokens have widened; blocks that are summed up at each step."""
    model, summed = tiny(**FORMS["gqa memory"]), []
    said, read = plainly(answers, model)
    monkeypatch.setattr(on_cpu, "block_bounds",
                        lambda *args: summed.append(args) or BLOCK_BOUNDS(*args))
    ours, ours_read = answers(model)
    assert len(summed) == model.config.n_layer * sum(
        phases(m).decode_by in (QUEST, IN_TURN[2], IN_TURN[4]) for m in IN_TURN)
    for method, x, ref in zip(IN_TURN, ours, said):
        assert torch.equal(x, ref), sparse.name(method)
    for x, ref in zip(ours_read, read, strict=True):
        assert x is ref is None or torch.equal(x, ref)


def test_a_cpu_takes_fewer_tokens_at_a_time(monkeypatch):
    """Layers whose outputs no cache of a CPU holds."""
    monkeypatch.setattr(engine, "TOGETHER_ON_CPU", 50)
    model, parts = tiny(), []
    watch = lambda layer, selected, real: parts.append(layer)
    model.prefill(draw_tokens(5, 20), None, model.new_cache(5, 20), watch=watch)
    assert parts == [0, 1] * 3


# ---------------------------------------------------------------- whose code it is

def flipped(stock):
    """A definition whose first argument, q or scores, comes in another order."""
    def changed(*args):
        at = 0 if isinstance(args[0], torch.Tensor) else 1  # behind self
        return stock(*args[:at], args[at].flip(-1), *args[at + 1:])
    return changed


def one_twice(chosen):
    return torch.cat([chosen[..., :1], chosen[..., :-1]], dim=-1)


OTHERS = {  # where a flip changes nothing, or not enough
    "block_bounds": lambda stock: lambda k, *args: stock(-k, *args),
    "up_to_queries": lambda stock: lambda q, k, v, start: stock(q, 2 * k, v, start),
    "query_slots": lambda stock: lambda q, start: stock(q, start) // 2,
    "chance": lambda stock: lambda *args: 1 - stock(*args),
    "top": lambda stock: lambda *args: one_twice(stock(*args)),
    "MoBA.choose": lambda stock: lambda *args: one_twice(stock(*args))}
NAMES = """Quest.decode Quest.choose Quest.score Quest.score_bounds Quest.forced attend_to_slots
attend block_bounds per_kv_head to_blocks top chance; MoBA.prefill MoBA.attend_to_blocks MoBA.choose
MoBA.score MoBA.forced attend query_slots up_to_queries per_kv_head to_blocks top chance"""


@torch.no_grad()
def told_by(method, phase):
    """What a hook gives for a prompt's last tokens, or for its very last one."""
    q, k, v = draw((2, 10, 4, 16), (2, 37, 2, 16), (2, 37, 2, 16), seed=1)
    used, dice = torch.tensor([37, 26]), torch.arange(20).view(2, 10)
    if phase == "prefill":
        return hook(method, phase)(q, k, v, used - 10, dice)
    layer = LayerCache(k, v, used, True, dice[:, -1:], None,
                       lambda block_size: on_cpu.block_bounds(k, used, block_size))
    return hook(method, phase)(q[:, -1:], layer)


@pytest.mark.parametrize("kind, phase, name", [
    (kind, phase, name) for kind, phase, names in zip(
        (Quest, MoBA), ("decode", "prefill"), NAMES.split(";")) for name in names.split()])
def test_a_changed_definition_decides(kind, phase, name, monkeypatch):
    """A selector of one's own, or a changed line of sparse.py, that a CPU goes past."""
    changed = OTHERS.get(name, flipped)
    random = 1 if name == "chance" else None
    method, function = kind(16, 4, random=random), name.rpartition(".")[2]
    stock = plainly(told_by, method, phase)
    if "." in name:
        own = type("Own", (kind,), {function: changed(getattr(kind, function))})
        method = dataclass(frozen=True)(own)(*astuple(method))
    else:
        monkeypatch.setattr(sparse, name, changed(getattr(sparse, name)))
    plain, ours = plainly(told_by, method, phase), told_by(method, phase)
    assert_close(ours[0], plain[0], atol=1e-5)
    assert torch.equal(ours[1], plain[1])
    assert not (torch.equal(plain[0], stock[0]) and torch.equal(plain[1], stock[1]))


@dataclass(frozen=True)
class Lowest(Quest):
    """One of one's own that wants the lowest scores."""

    def score(self, *args):
        return -super().score(*args)


def without_bounds(self, i, k, v):
    self.room(i, self.slots)
    self.put(self.k[i], 2 * k)
    self.put(self.v[i], v)


@pytest.mark.parametrize("name, changed", [
    ("store", without_bounds), ("put", lambda self, where, x, put=Cache.put: put(
        self, where, x.flip(-1) if x.dim() == 4 else x))])
def test_a_cache_of_ones_own_decides(name, changed, monkeypatch):
    """Bounds of other keys than those that a fork stores."""
    model, tokens = tiny(**FORMS["gqa memory"]), draw_tokens(2, 30)
    say = lambda: model.generate(tokens, 12, sparse=QUEST)
    stock = say()
    monkeypatch.setattr(Cache, name, changed)
    plain = plainly(say)
    assert torch.equal(say(), plain) and not torch.equal(plain, stock)


def test_forms_are_for_stock_code_without_gradients(monkeypatch, capsys):
    """A run that is slower without a word; training by another code than is written; torch."""
    backend.tell.cache_clear()
    for method in Lowest(16, 4), Lowest(16, 4), Quest(16, 4, random=1):
        assert hook(method, "decode").__func__ is on_cpu.quest_decode_chosen
    told, = capsys.readouterr().err.splitlines()
    assert "sparse.Quest.score" in told and "as it is written" in told and "Triton" not in told
    assert hook(QUEST, "decode").__func__ is on_cpu.quest_decode
    for method in MOBA, MoBA(12, 4, random=1), compose(SnapKV(14, 6), MOBA):
        assert hook(method, "prefill").__func__ is on_cpu.moba_prefill
        assert backend.hook(method, "prefill", LIKE).__func__ is MoBA.prefill, "with gradients"
        assert plainly(hook, method, "prefill").__func__ is MoBA.prefill
    assert plainly(hook, QUEST, "decode").__func__ is Quest.decode


@torch.no_grad()
def test_where_much_is_read_a_mask_hides_the_rest(monkeypatch):
    """Blocks by themselves where that takes longer."""
    monkeypatch.setattr(on_cpu, "EXTRA", 64)
    monkeypatch.setattr(on_cpu, "in_tiles", lambda *args: 1 / 0)
    q, = draw((1, 543, 2, 16), seed=1)
    hook(MoBA(32, 4), "prefill")(q, q, q, 0, None)  # 8 * (4 + 64) is 544
    q, = draw((1, 544, 2, 16), seed=1)
    with pytest.raises(ZeroDivisionError):
        hook(MoBA(32, 4), "prefill")(q, q, q, 0, None)
