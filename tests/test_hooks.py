"""
Whose code decides: a definition that somebody changed is computed as it is written, with the
kernels on too.

Each definition that a kernel stands for (backend.CODE) is made perverse here, by a subclass or in
its module. Plain PyTorch and Triton must then tell the same, and something else than before.
"""
import functools
import linecache
import sys
from dataclasses import astuple, dataclass, field

import pytest
import torch
from conftest import DEVICE, assert_close, draw_tokens, times, tiny
from torch import nn

from triton_ops import backend
import memory
import sparse
from cache import LayerCache
from sparse import Compose, Dense, Dilated, MoBA, Quest, SnapKV, compose

pytest.importorskip("triton", reason="there is nothing beside plain PyTorch")
from triton_ops import selectors  # noqa: E402
from triton_ops.quest import block_bounds  # noqa: E402

QUEST, MOBA, SNAPKV, DILATED = Quest(16, 4), MoBA(16, 4), SnapKV(16, 4), Dilated(8, 5, 2)
ENDS = Dilated(8, 0, 0)
ALL = (Dense(), QUEST, MOBA, SNAPKV, DILATED, ENDS, Quest(16, 4, random=1),
       SnapKV(16, 4, random=2))


# ---------------------------------------------------------------- who decides

def draw(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@torch.no_grad()
def hooks_of(method):
    """Of the three hooks, on a prompt, on its last tokens as a chunk, and in a step: y, kept."""
    B, T, H, KV, D = 2, 37, 4, 2, 16
    q, k, v = draw(B, T, H, D, seed=1), draw(B, T, KV, D, seed=2), draw(B, T, KV, D, seed=3)
    used, dice = torch.tensor([T, 26], device=DEVICE), draw(B, T, seed=4).mul(1e6).long()
    chunk = torch.stack([q[b, n - 10:n] for b, n in enumerate(used.tolist())])
    bounds_of = lambda size: block_bounds(k, used, size)
    layer = LayerCache(k, v, used, True, dice[:, -1:], None, bounds_of)
    hook = lambda phase: backend.hook(method, phase, v)
    whole, _ = hook("prefill")(q, k, v, 0, dice)
    part, _ = hook("prefill")(chunk, k, v, used - 10, dice[:, -10:])
    kept = hook("compress")(chunk, k, v, used, dice[:, -1:])
    y, _ = hook("decode")(chunk[:, -1:], layer)
    return torch.cat([whole, part, y], dim=1), kept


def assert_decides(method, both, stock=None):
    """Both backends tell the same, and something else than `stock`, told before the change."""
    plain, ours = both(lambda: hooks_of(method))
    assert_close(ours[0], plain[0], atol=1e-4, what="Triton's y")
    assert ours[1] is plain[1] or torch.equal(ours[1], plain[1]), "other entries kept"
    if stock is not None:
        same = plain[1] is None or torch.equal(plain[1], stock[1])
        same &= torch.equal(plain[0], stock[0])
        assert not same, "this change changes nothing, so it tests nothing"


def plainly(run, *args, **settings):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "choice", "torch")
        return run(*args, **settings)


def a_model(**changes):
    form = dict(n_layer=1, n_kv_head=2, memory=True, width=64, n_head=4)
    return tiny(**form | changes).to(DEVICE)


@torch.no_grad()
def logits_of(model):
    """Of a short prompt, a chunk after it, and two steps."""
    tokens, cache = draw_tokens(1, 9, seed=1).to(DEVICE), model.new_cache(1, 12)
    logits = [model.prefill(chunk, None, cache) for chunk in tokens[:, :7].split(6, dim=1)]
    logits += [model(token, cache=cache)[:, -1] for token in tokens[:, 7:].split(1, dim=1)]
    return torch.stack(logits)


@functools.cache
def stock_logits(**form):
    """Of the model that nobody has changed, in plain PyTorch."""
    return plainly(logits_of, a_model(**form))


def assert_model_decides(both, stock=None, change=lambda model: None, **form):
    def changed():
        model = a_model(**form)
        change(model)
        return logits_of(model)
    plain, ours = both(changed)
    assert_close(ours, plain, atol=1e-4, what="Triton's logits")
    if stock is not None:
        assert (plain - stock).abs().max() > 1e-3, "it changes nothing, so it tests nothing"


# ---------------------------------------------------------------- what a fork makes of definitions

def of(place, change):
    """The same function, given another argument at this place."""
    return lambda stock: lambda *args, **more: stock(
        *args[:place], change(args[place]), *args[place + 1:], **more)


def then(change):
    """The same function, of which something else is returned."""
    return lambda stock: lambda *args, **more: change(stock(*args, **more))


double, minus, one_more = (lambda x: 2 * x), (lambda x: -x), (lambda x: x + 1)
rolled = lambda x: x.roll(1, -1)  # channels in another order: a norm would undo a factor
flipped = lambda x: x.flip(-1)


def without_block_1(scores):
    return scores.masked_fill(torch.arange(scores.shape[-1], device=DEVICE) == 1, -torch.inf)


def every_other_slot(read):
    keep, selected = read
    return keep & (torch.arange(keep.shape[-1], device=DEVICE) % 2 == 0), selected


def other_places(feed):
    feed.position = 2 * feed.position  # RoPE would not see a shift
    return feed


SPARSE_EDITS = {  # a change, and a method that shows it
    "Dense.decode": (of(1, double), Dense()),
    "Quest.decode": (of(1, double), QUEST),
    "Quest.slots_of": (then(lambda slots: slots.where(slots % 2 == 0, -1)), QUEST),
    "Quest.choose": (of(1, minus), QUEST),
    "Quest.score": (then(minus), QUEST),
    "Quest.score_bounds": (of(1, minus), QUEST),
    "Quest.forced": (of(1, minus), QUEST),
    "MoBA.prefill": (of(1, double), MOBA),
    "MoBA.choose": (of(1, minus), MOBA),
    "MoBA.score": (then(minus), MOBA),
    "MoBA.forced": (then(without_block_1), MOBA),
    "MoBA.attend_to_blocks": (of(1, double), MOBA),
    "SnapKV.compress": (of(1, minus), SNAPKV),
    "SnapKV.best": (of(2, minus), SNAPKV),
    "SnapKV.score": (then(minus), SNAPKV),
    "SnapKV.forced": (of(1, minus), SNAPKV),
    "Dilated.prefill": (of(1, double), DILATED),
    "Dilated.decode": (of(1, double), DILATED),
    "Dilated.pattern": (lambda stock: lambda self, i, j: (
        stock(self, i, j) & ((i == j) | (j % 3 == 0))), DILATED),
    "Dilated.reads": (then(every_other_slot), DILATED),
    "Dilated.attend_to_shared": (of(1, double), ENDS),
    "attend": (of(0, double), QUEST),
    "block_bounds": (of(0, minus), QUEST),
    "attend_to_slots": (of(0, double), QUEST),
    "query_slots": (then(lambda slot: slot.clamp_max(25)), MOBA),
    "up_to_queries": (of(1, lambda k: 1.5 * k), DILATED),
    "per_kv_head": (lambda stock: lambda scores, KV: scores.unflatten(1, (KV, -1)).amax(2), MOBA),
    "to_blocks": (of(0, lambda x: x.roll(2, 1)), QUEST),
    "top": (of(1, lambda S: max(1, S - 1)), SNAPKV),
    "chance": (then(lambda scores: 1 - scores), MoBA(16, 4, random=3)),
}
MODEL_EDITS = {
    "model.Transformer.forward": then(rolled),
    "model.Transformer.hidden": then(rolled),
    "model.Block.forward": then(rolled),
    "model.Attention.forward": then(rolled),
    "model.Attention.remember": lambda stock: lambda self, x, k, v, cache=None: (
        stock(self, x, k, v, cache)[0], v),
    "model.Attention.at_rms_1": then(rolled),
    "model.Attention.rotate": lambda stock: lambda self, x, rope: x,
    "model.MLP.forward": then(rolled),
    "memory.Decay.forward": of(3, flipped),
    "memory.Decay.gate": then(one_more),
    "memory.Decay.average": of(1, one_more),
    "memory.remember": of(2, one_more),
    "memory.memory_loop": of(2, one_more),
    "memory.memory_step": of(2, one_more),
    "memory.memory_scan": of(2, one_more),
    "memory.scan": of(0, lambda g: 0.5 * g),
    "memory.Recurrence.forward": of(2, one_more),
    "memory.Recurrence.backward": then(lambda gradients: tuple(2 * d for d in gradients)),
    "cache.Cache.attend": of(2, double),
    "cache.Cache.store": of(2, double),
    "cache.Cache.put": of(2, lambda x: x.flip(-1) if x.dim() == 4 else x),
    "cache.Cache.read": of(2, double),
    "cache.Cache.step": of(2, double),
    "cache.Cache.remember": of(5, flipped),
    "engine.Inference.feed": then(rolled),
    "engine.Inference.described": then(other_places),
    "engine.Inference.head": then(rolled),
}


def place_of(name):
    """module.Class.function -> the class, or the module, and the function's name in it"""
    module, *path, function = name.split(".")
    return functools.reduce(getattr, path, sys.modules[module]), function


def test_the_kernels_know_the_code_that_they_were_written_from():
    """A definition changed without its kernel; a new name in CODE that no test makes perverse."""
    now = {name: backend.code_of(getattr(*place_of(name)).__code__) for name in backend.CODE}
    changed = "".join(f'\n    "{name}": "{code}",' for name, code in now.items()
                      if code != backend.CODE[name])
    assert not changed, f"if the kernels were changed alike, put into backend.CODE:{changed}"
    assert {*(f"sparse.{name}" for name in SPARSE_EDITS), *MODEL_EDITS} == set(backend.CODE)


def test_comments_and_docstrings_are_no_code(tmp_path):
    """A fork that explains a line loses its kernels, one that indents it otherwise keeps them."""
    def code(text):
        (tmp_path / "some.py").write_text(text)
        space = {}
        exec(compile(text, str(tmp_path / "some.py"), "exec"), space)
        linecache.clearcache()
        return backend.code_of.__wrapped__(space["f"].__code__)

    plain = code("def f(x):\n    if x:\n        x = 1\n    return x\n")
    assert code('def f(x):\n    """Says what."""\n\n    if x:  # and why\n        x = 1\n'
                "    # more\n    return x\n") == plain
    assert code("def f(x):\n    if x:\n        x = 1\n        return x\n") != plain
    assert code("def f(x):\n    if x:\n        x = 2\n    return x\n") != plain


# ---------------------------------------------------------------- methods

def own(method, function, change):
    """A frozen dataclass that overrides one function of the method's, as anybody would write it."""
    kind = type(method)
    changed = {function: change(getattr(kind, function))}
    return dataclass(frozen=True)(type(f"My{kind.__name__}", (kind,), changed))(*astuple(method))


def upside_down(method):
    """One of one's own that wants the lowest scores."""
    return own(method, "score", then(minus))


@pytest.mark.parametrize("name", SPARSE_EDITS)
def test_a_changed_definition_decides(name, both, monkeypatch):
    """A selector of one's own, or a changed line of sparse.py: its table is the stock method's."""
    change, method = SPARSE_EDITS[name]
    stock, (kind, _, function) = plainly(hooks_of, method), name.rpartition(".")
    if kind:
        return assert_decides(own(method, function, change), both, stock)
    monkeypatch.setattr(sparse, name, change(getattr(sparse, name)))
    assert_decides(method, both, stock)
    for other in times([], ALL):
        assert_decides(other, both)


class Louder(Compose):
    """A composition that overrides a hook itself, and whose parts might be asked past it."""

    def decode(self, q, cache):
        return super().decode(2 * q, cache)


def patched():
    """A definition put on the method itself, past its class."""
    method = Quest(16, 4)
    object.__setattr__(method, "score", then(minus)(method.score))
    return method


@pytest.mark.parametrize("mine, instead_of", [
    (patched(), QUEST), (Louder(decode_by=QUEST), Compose(decode_by=QUEST)),
    (compose(MOBA, upside_down(SNAPKV), upside_down(QUEST)), compose(MOBA, SNAPKV, QUEST))],
    ids=["an instance", "a composition", "of ones that decide a phase each"])
def test_a_method_of_ones_own_decides(mine, instead_of, both):
    """One that is taken for its class, or its parent."""
    assert_decides(mine, both, plainly(hooks_of, instead_of))


def test_a_method_of_ones_own_is_known_by_its_name(monkeypatch):
    """Answers on disk, or a budget, under a class's name that no command line takes."""
    mine = upside_down(QUEST)
    monkeypatch.setitem(sparse.METHODS, "mean-std", type(mine))
    assert sparse.parse("mean-std:budget=1/4,block_size=4", 64) == mine
    assert sparse.name(mine) == "mean-std:budget=16,block_size=4"


def test_the_cache_asks_a_method_of_ones_own(both):
    """A hook that the model or its cache calls past the rule."""
    method = compose(*map(upside_down, (MOBA, SnapKV(18, 4), QUEST)))
    model, tokens = a_model(), draw_tokens(1, 33).to(DEVICE)

    @torch.no_grad()
    def run():
        selected, early, late = [], model.new_cache(1, 40), model.new_cache(1, 40)
        watch = lambda layer, blocks, real: selected.append(blocks.tolist())
        model.prefill(tokens, None, early, method, whole=True, watch=watch)
        model.prefill(tokens, None, late, method)
        for cache in early, late:
            model(tokens[:, :1], cache=cache, sparse=method)
            selected += [cache.positions[0].tolist(), cache.selected[0].sort(-1).values.tolist()]
        return selected
    plain, ours = both(run)
    assert ours == plain


def test_a_subclass_that_changes_no_definition_keeps_the_kernels(monkeypatch):
    """An own name or default that costs an experiment its speed."""
    monkeypatch.setattr(backend, "choice", "triton")
    x, other = torch.empty(0, 16, device=DEVICE), upside_down(QUEST)

    @dataclass(frozen=True)
    class Mine(Quest):
        budget: int = 16
        block_size: int = 4
        note: str = field(default="", compare=False)

    form = backend.hook(Mine(), "decode", x)
    assert form.__func__ is selectors.quest_decode and selectors.in_graph(Mine())
    # attention stays with the kernel
    assert backend.hook(other, "decode", x).__func__ is selectors.quest_decode_chosen
    assert not selectors.in_graph(other), "Python code that a graph would run once"
    type(other).in_graph = True
    assert selectors.in_graph(other)


def test_who_computes_is_told_once(both, capsys):
    """A run that is slower, or other than the kernels, without a word."""
    backend.tell.cache_clear()
    both(lambda: [hooks_of(upside_down(QUEST)) for _ in range(2)])
    told, = capsys.readouterr().err.splitlines()
    assert "sparse.Quest.score" in told and "as it is written" in told


def test_a_method_whose_python_counts_is_not_recorded(monkeypatch):
    """A selector that changes its mind at each step: a graph would repeat what it first thought."""
    monkeypatch.setattr(backend, "choice", "triton")
    steps, n = [], 5 if DEVICE == "cuda" else 2
    moody = own(QUEST, "score", then(lambda x: x * (-1) ** (steps.append(1) or len(steps))))
    a_model().generate(draw_tokens(1, 20).to(DEVICE), n + 1, sparse=moody)
    assert len(steps) == n


# ---------------------------------------------------------------- the model and its memory

def edit(name, monkeypatch):
    owner, function = place_of(name)
    changed = MODEL_EDITS[name](getattr(owner, function))
    if owner is memory.Recurrence:
        changed = staticmethod(changed)
    monkeypatch.setattr(owner, function, changed)


@pytest.mark.parametrize("name", MODEL_EDITS)
def test_an_edited_model_decides(name, both, monkeypatch):
    """Decoding that goes around a memory of one's own, into the fused kernel's."""
    # no logits hang on a gradient, nor on how the kernels would step
    unseen = name in ("memory.Recurrence.backward", "cache.Cache.step")
    stock = None if unseen else stock_logits()
    edit(name, monkeypatch)
    assert_model_decides(both, stock)


def test_an_edited_gradient_decides(both, monkeypatch):
    """A gradient of one's own for the memory that training on a GPU never sees."""
    edit("memory.Recurrence.backward", monkeypatch)
    model, tokens = a_model(), draw_tokens(2, 20).to(DEVICE)

    def gradient():
        model.zero_grad()
        model(tokens).square().mean().backward()
        return model.layers[0].self_attn.memory.proj.weight.grad.clone()
    plain, ours = both(gradient)
    assert_close(ours, plain, atol=1e-4)


class Turned(nn.Linear):
    """A linear layer whose channels come in another order."""

    def forward(self, x):
        return super().forward(x).roll(1, -1)


class Own(nn.Module):
    """Another module around one of the model's, as an adapter is. forward: of that and inputs."""

    def __init__(self, stock, forward=lambda stock, *args: stock(*args).roll(1, -1)):
        super().__init__()
        self.stock, self.own = stock, forward
        self.weight, self.bias = (getattr(stock, name, None) for name in ("weight", "bias"))

    def forward(self, *args):
        return self.own(self.stock, *args)


def turned(linear):
    linear.__class__ = Turned
    return linear


def layer_norm(norm):
    found = nn.LayerNorm(norm.weight.shape, norm.eps, device=DEVICE)
    found.weight = norm.weight
    return found


def mean_so_far(attention, x, *rest):
    return x.cumsum(1) / torch.arange(1, x.shape[1] + 1, device=DEVICE)[:, None]


def put(path, make):
    """A change: what `make` gives of that attribute of the first layer takes its place."""
    def change(model):
        owner, _, name = f"layers.0.{path}".strip(".").rpartition(".")
        owner = model.get_submodule(owner)
        setattr(owner, name, make(getattr(owner, name)))
    return change


def hooked(register, hook):
    return lambda model: getattr(model.layers[0].self_attn.v_proj, register)(hook)


ATTENTION, GATE = "self_attn.", "self_attn.memory.proj"
LINEARS = [*(f"{ATTENTION}{x}_proj" for x in "qkvo"), GATE,
           *(f"mlp.{x}_proj" for x in ("gate", "up", "down"))]
NORMS = [ATTENTION + "q_norm", ATTENTION + "k_norm", "post_attention_layernorm",
         "post_feedforward_layernorm"]
CHANGES = {
    **{f"{path} wrapped": put(path, Own) for path in LINEARS},
    "q_proj turned": put(LINEARS[0], turned),
    "gate turned": put(GATE, turned),
    "gate of tanh": put(GATE, lambda linear: Own(linear, lambda linear, x: linear(x).tanh())),
    **{f"{path} a layer norm": put(path, layer_norm) for path in NORMS},
    "a bias": put("self_attn.v_proj.bias", lambda _: nn.Parameter(torch.ones(32, device=DEVICE))),
    "a bias of o_proj": put(
        "self_attn.o_proj.bias", lambda _: nn.Parameter(torch.ones(64, device=DEVICE))),
    "a forward": put("mlp.up_proj.forward", then(rolled)),
    "an eps": put("self_attn.q_norm.eps", lambda _: 1.0),
    "a norm without weight": put(NORMS[1], lambda _: nn.RMSNorm(32, 1e-6, False)),
    "a norm less": put(NORMS[0], lambda _: nn.Identity()),
    "a block": put("", Own),
    "attention": put("self_attn", lambda attention: Own(attention, mean_so_far)),
    "a gate past its class": put("self_attn.memory.gate", then(one_more)),
    "a hook": hooked("register_forward_hook", lambda module, args, y: rolled(y)),
    "a hook before": hooked("register_forward_pre_hook", lambda module, args: (rolled(args[0]),)),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_module_of_ones_own_decides(what, both):
    """An adapter, a bias or a hook that the kernels go around; a layer without what they take."""
    assert_model_decides(both, stock_logits(), CHANGES[what])


def test_a_norm_that_the_preset_has_not_decides(both):
    """A weight that nobody asks for, as the config has no norm there."""
    add = put(NORMS[0], lambda _: nn.RMSNorm(64).to(DEVICE))
    assert_model_decides(both, stock_logits(qk_norm=False), add, qk_norm=False)


def test_nothing_with_a_hook_is_recorded(monkeypatch):
    """A hook that a graph would call once; a weight or a RoPE that was replaced: it has the old."""
    monkeypatch.setattr(backend, "choice", "triton")
    model, tokens = a_model(), draw_tokens(1, 6).to(DEVICE)

    def recordable(method=None):
        cache = model.new_cache(1, 12)
        model.prefill(tokens, None, cache, method)
        model.step(tokens[:, 0], cache, method)
        return cache.weights
    before = recordable()
    assert before and recordable() == before
    layer = model.layers[0]
    for module in model, model.norm, model.embed_tokens, layer, layer.self_attn, layer.mlp:
        handle = module.register_forward_hook(lambda *_: None)
        assert recordable() is None
        handle.remove()
    assert recordable(Louder()) is None
    model.norm.weight = nn.Parameter(model.norm.weight.detach().clone())
    after = recordable()
    assert after not in (None, before)
    model.stretch(4)
    assert recordable() not in (None, after)
