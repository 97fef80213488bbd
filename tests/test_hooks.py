"""
Whose code decides: a definition that somebody changed is computed as it is written, with the
kernels on too.

Each definition that a kernel stands for (backend.CODE) is made perverse here, by a subclass or in
its module. Plain PyTorch and Triton must then tell the same, and something else than before.
"""
import sys
import types
from dataclasses import dataclass, field

import pytest
import torch
from conftest import DEVICE, assert_close, draw_tokens, times, tiny
from torch import nn

from triton_ops import backend
import cache as cache_file
import engine
import memory
import model as model_file
import sparse
from cache import LayerCache
from sparse import Compose, Dense, Dilated, MoBA, Quest, SnapKV, compose

pytest.importorskip("triton", reason="there is nothing beside plain PyTorch")
from triton_ops import selectors  # noqa: E402
from triton_ops.quest import block_bounds  # noqa: E402

SETTINGS = {
    "Dense": {},
    "Quest": dict(budget=16, block_size=4),
    "MoBA": dict(budget=16, block_size=4),
    "SnapKV": dict(budget=16, window=4),
    "Dilated": dict(dilation=8, local=5, initial=2),
}


SHAPE = dict(B=2, T=37, H=4, KV=2, D=16)


def draw(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@torch.no_grad()
def hooks_of(method):
    """
    What the three hooks make of a whole prompt, of its last tokens as a chunk, and of a step:
    floats and indices.
    """
    B, T, H, KV, D = SHAPE.values()
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


def assert_decides(method, both, stock=None, what=""):
    """
    Both backends tell the same of a method, and something else than `stock`, what plain PyTorch
    told before the change.
    """
    plain, ours = both(lambda: hooks_of(method))
    assert_close(ours[0], plain[0], atol=1e-4, what=f"{what}: Triton's y")
    assert ours[1] is plain[1] or torch.equal(ours[1], plain[1]), f"{what}: other entries kept"
    if stock is not None:
        same = plain[1] is None or torch.equal(plain[1], stock[1])
        same &= torch.equal(plain[0], stock[0])
        assert not same, f"{what}: this change changes nothing, so it tests nothing"


def plainly(method, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(backend, "choice", "torch")
        return hooks_of(method)


def a_model(**changes):
    form = dict(n_layer=1, n_kv_head=2, memory=True, width=64, n_head=4)
    return tiny(**form | changes).to(DEVICE)


@torch.no_grad()
def logits_of(model, method=None):
    """Of a short prompt, a chunk after it, and two steps."""
    tokens, cache = draw_tokens(1, 9, seed=1).to(DEVICE), model.new_cache(1, 12)
    logits = [model.prefill(chunk, None, cache, method) for chunk in tokens[:, :7].split(6, dim=1)]
    for token in tokens[:, 7:].split(1, dim=1):
        logits.append(model(token, cache=cache, sparse=method)[:, -1])
    return torch.stack(logits)


def assert_model_decides(make, both, stock=None):
    plain, ours = both(lambda: logits_of(make()))
    assert_close(ours, plain, atol=1e-4, what="Triton's logits")
    if stock is not None:
        assert (plain - stock).abs().max() > 1e-3, "it changes nothing, so it tests nothing"


@pytest.fixture(scope="module")
def stock_logits():
    """Of the model that nobody has changed, in plain PyTorch."""
    before, backend.choice = backend.choice, "torch"
    logits, backend.choice = logits_of(a_model()), before
    return logits


# ---------------------------------------------------------------- the record

def resolved(name):
    module, *parts = name.split(".")
    found = sys.modules[module]
    for part in parts:
        found = getattr(found, part)
    return found


def test_the_kernels_know_the_code_that_they_were_written_from():
    """
    A definition changed without its kernel: on a GPU nobody would compute by kernels any more, or
    by wrong ones.
    """
    now = {name: backend.code_of(resolved(name).__code__) for name in backend.CODE}
    changed = "".join(f'\n    "{name}": "{code}",' for name, code in now.items()
                      if code != backend.CODE[name])
    assert not changed, f"if the kernels were changed alike, put into backend.CODE:{changed}"


def test_comments_and_docstrings_are_no_code(tmp_path, monkeypatch):
    """
    A fork that explains a line loses its kernels; one that indents a line otherwise keeps them.
    """
    def code(text):
        (tmp_path / "some.py").write_text(text)
        space = {}
        exec(compile(text, str(tmp_path / "some.py"), "exec"), space)
        import linecache
        linecache.clearcache()
        return backend.code_of.__wrapped__(space["f"].__code__)

    plain = code("def f(x):\n    if x:\n        x = 1\n    return x\n")
    assert code('def f(x):\n    """Says what."""\n\n    if x:  # and why\n        x = 1\n'
                "    # more\n    return x\n") == plain
    assert code("def f(x):\n    if x:\n        x = 1\n        return x\n") != plain
    assert code("def f(x):\n    if x:\n        x = 2\n    return x\n") != plain


# ---------------------------------------------------------------- methods

def half_of(keep, chosen):
    """Every other slot of those that are read."""
    return keep & (torch.arange(keep.shape[-1], device=keep.device) % 2 == 0), chosen


# a definition -> what a subclass puts in its place; `stock` is the definition itself
OVERRIDES = {
    "Dense.decode": lambda stock: lambda self, q, cache: stock(self, 2 * q, cache),
    "Quest.decode": lambda stock: lambda self, q, cache: stock(self, 2 * q, cache),
    "Quest.choose": lambda stock: lambda self, q, cache: stock(self, -q, cache),
    "Quest.score": lambda stock: lambda self, q, k, filled: -stock(self, q, k, filled),
    "Quest.forced": lambda stock: lambda self, scores, used: stock(self, -scores, used),
    "MoBA.prefill": lambda stock: lambda self, q, *rest: stock(self, 2 * q, *rest),
    "MoBA.choose": lambda stock: lambda self, q, *rest: stock(self, -q, *rest),
    "MoBA.score": lambda stock: lambda self, q, k: -stock(self, q, k),
    "MoBA.forced": lambda stock: lambda self, scores, slot: stock(self, scores, slot).masked_fill(
        torch.arange(scores.shape[-1], device=scores.device) == 1, -torch.inf),
    "MoBA.attend_to_blocks": lambda stock: lambda self, q, *rest: stock(self, 2 * q, *rest),
    "SnapKV.compress": lambda stock: lambda self, q, *rest: stock(self, -q, *rest),
    "SnapKV.score": lambda stock: lambda self, q, k, lengths: -stock(self, q, k, lengths),
    "SnapKV.forced": lambda stock: lambda self, scores, lengths: stock(self, -scores, lengths),
    "Dilated.prefill": lambda stock: lambda self, q, *rest: stock(self, 2 * q, *rest),
    "Dilated.decode": lambda stock: lambda self, q, cache: stock(self, 2 * q, cache),
    "Dilated.pattern": lambda stock: lambda self, i, j: (
        stock(self, i, j) & ((i == j) | (j % 3 == 0))),
    "Dilated.reads": lambda stock: lambda self, q, cache: half_of(*stock(self, q, cache)),
    "Dilated.attend_to_shared": lambda stock: lambda self, q, *rest: stock(self, 2 * q, *rest),
}
# a function of sparse.py -> what a fork makes of it
EDITS = {
    "attend": lambda stock: lambda q, *rest, **more: stock(2 * q, *rest, **more),
    "attend_to_slots": lambda stock: lambda q, k, v, slots: stock(2 * q, k, v, slots),
    "query_slots": lambda stock: lambda q, start: stock(q, start).clamp_max(25),
    "up_to_queries": lambda stock: lambda q, k, v, start: stock(q, 1.5 * k, v, start),
    "per_kv_head": lambda stock: lambda scores, KV: scores.unflatten(1, (KV, -1)).amax(dim=2),
    "to_blocks": lambda stock: lambda x, block_size: stock(x.roll(2, 1), block_size),
    "top": lambda stock: lambda scores, S: stock(scores, max(1, S - 1)),
    "chance": lambda stock: lambda *args: 1 - stock(*args),
}


def test_each_definition_is_tried():
    """A new name in CODE that no test makes perverse."""
    tried = {f"sparse.{name}" for name in (*OVERRIDES, *EDITS)}
    tried |= {f"{module.__name__}.{name}" for module, edits in ALL_EDITS for name in edits}
    assert tried == set(backend.CODE)


def own_class(kind, name, function):
    """
    As somebody would write it: a frozen dataclass that overrides one method of a class of
    sparse.py.
    """
    return dataclass(frozen=True)(type(f"My{kind}", (getattr(sparse, kind),), {name: function}))


@pytest.mark.parametrize("name", OVERRIDES)
def test_an_overridden_method_decides(name, both, monkeypatch):
    """
    A selector of one's own that is ignored on a GPU: its table would be that of the stock method.
    """
    kind, attribute = name.split(".")
    settings = SETTINGS[kind]
    if attribute == "attend_to_shared":
        settings = settings | dict(local=0, initial=0)
    mine = own_class(kind, attribute, OVERRIDES[name](getattr(getattr(sparse, kind), attribute)))
    stock = plainly(getattr(sparse, kind)(**settings), monkeypatch)
    assert_decides(mine(**settings), both, stock, name)


ALL = (Dense(), Quest(16, 4), MoBA(16, 4), SnapKV(16, 4), Dilated(8, 5, 2), Dilated(8, 0, 0),
       Quest(16, 4, random=1), SnapKV(16, 4, random=2))
EDITED = {
    "attend": Quest(16, 4), "attend_to_slots": Quest(16, 4), "query_slots": MoBA(16, 4),
    "up_to_queries": Dilated(8, 5, 2), "per_kv_head": MoBA(16, 4), "to_blocks": Quest(16, 4),
    "top": SnapKV(16, 4), "chance": MoBA(16, 4, random=3),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_function_decides(name, both, monkeypatch):
    """A fork that changes a line of sparse.py, and whose GPU computes what stood there before."""
    stock = plainly(EDITED[name], monkeypatch)
    monkeypatch.setattr(sparse, name, EDITS[name](getattr(sparse, name)))
    assert_decides(EDITED[name], both, stock, name)
    for method in times([], ALL):
        assert_decides(method, both, what=name)


def test_a_method_of_ones_own_is_known_by_its_name(monkeypatch):
    """Answers on disk, or a budget, under a class's name that no command line takes."""
    mine = own_class("Quest", "score", OVERRIDES["Quest.score"](Quest.score))
    monkeypatch.setitem(sparse.METHODS, "mean-std", mine)
    method = sparse.parse("mean-std:budget=1/4,block_size=4", 64)
    assert type(method) is mine and sparse.name(method) == "mean-std:budget=16,block_size=4"
    assert sparse.parse(sparse.name(method), 64) == method


def test_a_changed_instance_decides(both, monkeypatch):
    """A definition put on the method itself, past its class."""
    method = Quest(16, 4)
    stock, score = plainly(method, monkeypatch), method.score
    object.__setattr__(method, "score", lambda *args: -score(*args))
    assert_decides(method, both, stock)


def test_two_classes_of_ones_own_compose(both, monkeypatch):
    """An own selector that is taken for its parent where several decide a phase each."""
    mine = own_class("Quest", "score", OVERRIDES["Quest.score"](Quest.score))(16, 4)
    too = own_class("SnapKV", "score", OVERRIDES["SnapKV.score"](SnapKV.score))(16, 4)
    stock = plainly(compose(MoBA(16, 4), SnapKV(16, 4), Quest(16, 4)), monkeypatch)
    assert_decides(compose(MoBA(16, 4), too, mine), both, stock)


def test_a_composition_of_ones_own_decides(both, monkeypatch):
    """A subclass of Compose that overrides a hook itself, and whose parts are asked past it."""
    class Louder(Compose):
        def decode(self, q, cache):
            return super().decode(2 * q, cache)
    stock = plainly(Compose(decode_by=Quest(16, 4)), monkeypatch)
    assert_decides(Louder(decode_by=Quest(16, 4)), both, stock)


def test_the_cache_asks_a_method_of_ones_own(both):
    """A hook that the model or its cache calls past the rule."""
    mine = own_class("Quest", "score", OVERRIDES["Quest.score"](Quest.score))(16, 4)
    too = own_class("SnapKV", "score", OVERRIDES["SnapKV.score"](SnapKV.score))(18, 4)
    moba = own_class("MoBA", "score", OVERRIDES["MoBA.score"](MoBA.score))(16, 4)
    model, tokens, method = a_model(), draw_tokens(1, 33).to(DEVICE), compose(moba, too, mine)

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
    x = torch.empty(0, 16, device=DEVICE)

    @dataclass(frozen=True)
    class Mine(Quest):
        budget: int = 16
        block_size: int = 4
        note: str = field(default="", compare=False)

    form = backend.hook(Mine(), "decode", x)
    assert form.__func__ is selectors.quest_decode and selectors.in_graph(Mine())
    other = own_class("Quest", "score", OVERRIDES["Quest.score"](Quest.score))
    # attention stays with the kernel
    assert backend.hook(other(16, 4), "decode", x).__func__ is selectors.quest_decode_chosen
    assert not selectors.in_graph(other(16, 4)), "Python code that a graph would run once"
    other.in_graph = True
    assert selectors.in_graph(other(16, 4))


def test_who_computes_is_told_once(both, capsys):
    """A run that is slower, or other than the kernels, without a word."""
    backend.tell.cache_clear()
    method = own_class("Quest", "score", OVERRIDES["Quest.score"](Quest.score))(16, 4)
    both(lambda: [hooks_of(method) for _ in range(2)])
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1, told
    assert "sparse.Quest.score" in told[0] and "as it is written" in told[0]


def test_a_method_whose_python_counts_is_not_recorded(monkeypatch):
    """
    A selector that changes its mind from step to step: a graph would repeat what it thought at the
    first.
    """
    monkeypatch.setattr(backend, "choice", "triton")
    steps = []

    @dataclass(frozen=True)
    class Moody(Quest):
        def score(self, q, k, filled):
            steps.append(1)
            return super().score(q, k, filled) * (-1) ** len(steps)

    model = a_model()
    n = 5 if DEVICE == "cuda" else 2
    model.generate(draw_tokens(1, 20).to(DEVICE), n + 1, sparse=Moody(16, 4))
    assert len(steps) == n * model.config.n_layer


# ---------------------------------------------------------------- the model and its memory

def rolled(stock):
    """The same, whose channels come in another order. A norm would undo a factor."""
    return lambda *args, **more: stock(*args, **more).roll(1, -1)


def other_places(stock):
    def described(self, *args):
        found = stock(self, *args)
        found.position = 2 * found.position  # RoPE would not see a shift
        return found
    return described


MODEL_EDITS = {
    "Transformer.forward": rolled,
    "Transformer.hidden": rolled,
    "Block.forward": rolled,
    "Attention.forward": rolled,
    "Attention.remember": lambda stock: lambda self, x, k, v, cache=None: (
        stock(self, x, k, v, cache)[0], v),
    "Attention.at_rms_1": rolled,
    "Attention.rotate": lambda stock: lambda self, x, rope: x,
    "MLP.forward": rolled,
}
ENGINE_EDITS = {
    "Inference.feed": rolled,
    "Inference.described": other_places,
    "Inference.head": rolled,
}
CACHE_EDITS = {
    "Cache.attend": lambda stock: lambda self, i, q, *rest: stock(self, i, 2 * q, *rest),
    "Cache.store": lambda stock: lambda self, i, k, v: stock(self, i, 2 * k, v),
    "Cache.put": lambda stock: lambda self, where, x: stock(
        self, where, x.flip(-1) if x.dim() == 4 else x),
    "Cache.read": lambda stock: lambda self, i, q, dice: stock(self, i, 2 * q, dice),
    "Cache.step": lambda stock: lambda self, attention, q, *rest: stock(
        self, attention, 2 * q, *rest),
    "Cache.remember": lambda stock: lambda self, i, memory, x, k, v: stock(
        self, i, memory, x, k, v.flip(-1)),
}
MEMORY_EDITS = {
    "Decay.forward": lambda stock: lambda self, x, k, v, *rest: stock(
        self, x, k, v.flip(-1), *rest),
    "Decay.gate": lambda stock: lambda self, x: stock(self, x) + 1,
    "Decay.average": lambda stock: lambda self, gate, *rest: stock(self, gate + 1, *rest),
    "remember": lambda stock: lambda k, v, gate, state=None: stock(k, v, gate + 1, state),
    "memory_loop": lambda stock: lambda k, v, gate, state=None: stock(k, v, gate + 1, state),
    "memory_step": lambda stock: lambda k, v, gate, state=None: stock(k, v, gate + 1, state),
    "memory_scan": lambda stock: lambda k, v, gate, state=None: stock(k, v, gate + 1, state),
    "scan": lambda stock: lambda g, b: stock(0.5 * g, b),
    "Recurrence.forward": lambda stock: lambda ctx, x, gate, start: stock(ctx, x, gate + 1, start),
    "Recurrence.backward": lambda stock: lambda ctx, dm: tuple(2 * d for d in stock(ctx, dm)),
}


def edit(module, name, make, monkeypatch):
    owner, _, attribute = name.rpartition(".")
    owner = getattr(module, owner) if owner else module
    changed = make(getattr(owner, attribute))
    if owner is memory.Recurrence:
        changed = staticmethod(changed)
    monkeypatch.setattr(owner, attribute, changed)


ALL_EDITS = ((model_file, MODEL_EDITS), (memory, MEMORY_EDITS), (cache_file, CACHE_EDITS),
             (engine, ENGINE_EDITS))


@pytest.mark.parametrize("module, name, make", [
    pytest.param(module, name, make, id=name)
    for module, edits in ALL_EDITS for name, make in edits.items()])
def test_an_edited_model_decides(module, name, make, both, stock_logits, monkeypatch):
    """Decoding that goes around a memory of one's own, into the fused kernel's."""
    edit(module, name, make, monkeypatch)
    # no logits hang on a gradient, nor on how the kernels would step
    stock = None if name in ("Recurrence.backward", "Cache.step") else stock_logits
    assert_model_decides(a_model, both, stock)


def test_an_edited_gradient_decides(both, monkeypatch):
    """A gradient of one's own for the memory that training on a GPU never sees."""
    edit(memory, "Recurrence.backward", MEMORY_EDITS["Recurrence.backward"], monkeypatch)
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


class Wrapped(nn.Module):
    """A linear layer with more beside it, as adapters are."""

    def __init__(self, linear):
        super().__init__()
        sizes = linear.in_features, linear.out_features
        self.base, self.more = linear, nn.Linear(*sizes, device=linear.weight.device)
        self.bias = linear.bias

    @property
    def weight(self):
        return self.base.weight

    def forward(self, x):
        return self.base(x) + self.more(x)


class Gate(nn.Module):
    """A gate of one's own in place of the projection."""

    def __init__(self, linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x):
        return torch.tanh(nn.functional.linear(x, self.weight, self.bias))


PARTS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
         "self_attn.memory.proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]


def replaced(model, path, make):
    parent, _, name = path.rpartition(".")
    parent = model.layers[0].get_submodule(parent)
    setattr(parent, name, make(getattr(parent, name)))
    return model


def turned(linear):
    found = Turned(linear.in_features, linear.out_features, bias=linear.bias is not None)
    found.load_state_dict(linear.state_dict())
    return found.to(DEVICE)


@pytest.mark.parametrize("path, make", [
    *((path, Wrapped) for path in PARTS),
    (PARTS[0], turned), (PARTS[4], turned), (PARTS[4], Gate)])
def test_a_module_of_ones_own_decides(path, make, both, stock_logits):
    """An adapter on a projection, of which the kernels take the weight alone."""
    def changed():
        torch.manual_seed(0)
        return replaced(a_model(), path, make)
    assert_model_decides(changed, both, stock_logits)


@pytest.mark.parametrize("path", ["self_attn.q_norm", "self_attn.k_norm",
                                  "post_attention_layernorm", "post_feedforward_layernorm"])
def test_a_norm_of_ones_own_decides(path, both, stock_logits):
    """A layer norm for an RMS norm, of which the kernels take the weight alone."""
    def make(norm):
        found = nn.LayerNorm(norm.weight.shape, device=DEVICE)
        found.weight = norm.weight
        return found
    assert_model_decides(lambda: replaced(a_model(), path, make), both, stock_logits)


def with_bias(model):
    linear = model.layers[0].self_attn.v_proj
    linear.bias = nn.Parameter(torch.ones(linear.out_features, device=DEVICE))


def with_own_forward(model):
    linear = model.layers[0].mlp.up_proj
    linear.forward = lambda x: nn.functional.linear(x, linear.weight).roll(1, -1)


def with_another_eps(model):
    model.layers[0].self_attn.q_norm.eps = 1.0


def with_a_norm_without_weight(model):
    model.layers[0].self_attn.k_norm = nn.RMSNorm(32, elementwise_affine=False)


def without_a_norm(model):
    model.layers[0].self_attn.q_norm = nn.Identity()


def with_a_norm_that_the_preset_has_not(model):
    model.layers[0].self_attn.q_norm = nn.RMSNorm(64).to(DEVICE)


@pytest.mark.parametrize("change, form", [
    (with_bias, {}), (with_own_forward, {}), (with_another_eps, {}),
    (with_a_norm_without_weight, {}), (without_a_norm, {}),
    (with_a_norm_that_the_preset_has_not, dict(qk_norm=False))])
def test_a_module_that_is_not_as_the_preset_has_it_decides(change, form, both, monkeypatch):
    """A bias, an eps, a norm of which the kernels know nothing."""
    monkeypatch.setattr(backend, "choice", "torch")
    stock = logits_of(a_model(**form))

    def changed():
        model = a_model(**form)
        change(model)
        return model
    assert_model_decides(changed, both, stock)


def test_a_block_of_ones_own_decides(both, stock_logits):
    """A layer of which the kernels ask what it is, and that does not answer."""
    class Doubled(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, x, *rest):
            return self.block(x, *rest).roll(1, -1)

    def changed():
        model = a_model()
        model.layers[0] = Doubled(model.layers[0])
        return model
    assert_model_decides(changed, both, stock_logits)


def test_nothing_with_a_hook_is_recorded(monkeypatch):
    """
    Activations that somebody records: a graph would call the hook once. A weight that was replaced:
    it would read the old one.
    """
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

    class Louder(Compose):
        def decode(self, q, cache):
            return super().decode(2 * q, cache)
    assert recordable(Louder()) is None
    model.norm.weight = nn.Parameter(model.norm.weight.detach().clone())
    assert recordable() not in (None, before)


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_hook_on_a_projection_is_called(register, both, stock_logits):
    """Activations patched, or recorded, at a module that the kernels go around."""
    def hooked():
        model = a_model()
        changes = {"register_forward_hook": lambda module, args, y: y.roll(1, -1),
                   "register_forward_pre_hook": lambda module, args: (args[0].roll(1, -1),)}
        getattr(model.layers[0].self_attn.v_proj, register)(changes[register])
        return model
    assert_model_decides(hooked, both, stock_logits)


def test_a_patched_instance_of_a_layer_decides(both, stock_logits):
    """A gate put on one layer of a model, past the class."""
    def patched():
        model = a_model()
        decay = model.layers[0].self_attn.memory
        decay.gate = types.MethodType(MEMORY_EDITS["Decay.gate"](type(decay).gate), decay)
        return model
    assert_model_decides(patched, both, stock_logits)


def test_attention_of_ones_own_decides(both):
    """
    A layer without the parts that the kernels look for: an error of theirs, not a word about it.
    """
    class Mean(nn.Module):
        """Each token gets the mean of those before it."""

        def forward(self, x, *rest):
            return x.cumsum(1) / torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]

    def make():
        model = a_model()
        model.layers[0].self_attn = Mean()
        return model
    plain, ours = both(lambda: make()(draw_tokens(2, 12).to(DEVICE), cache=None).detach())
    assert_close(ours, plain, atol=1e-4)
