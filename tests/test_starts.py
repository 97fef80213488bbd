"""
experiments/starts.py: a model whose values are turned is the same model, and what a memory costs it
is measured as it is said.
"""
import itertools

import pytest
import torch
from conftest import LLAMA_FORM, QWEN2_FORM, draw_tokens, refused, tiny
from torch.nn import functional as F

from data import Shards
from experiments import starts
from experiments.starts import (REST, Start, cheapest, least_needed, set_gates, turn_values,
                                watch)
from infra import files
from model import Transformer
from triton_ops import backend

TINY = LLAMA_FORM | dict(vocab_size=257, n_head=4, n_kv_head=2, width=32, context_len=128)
ALL = torch.ones(2, 2, 8, dtype=torch.bool)  # layers, KV heads, channels of TINY


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    monkeypatch.setattr(backend, "choice", "torch")


# ---------------------------------------------------------------- which channels

def in_places(model, tokens, n):
    """q (B, T, H, D), k, v (B, T, KV, D) of layer n, before RoPE, from the layer's own input."""
    seen, layer = [], model.layers[n]
    hook = layer.self_attn.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.hidden(tokens)
    hook.remove()
    return [getattr(layer.self_attn, f"{name}_proj")(seen[0]).unflatten(2, (-1, 8))
            for name in "qkv"]


def averaged(x, length):
    """m of x (B, T, KV, D), token by token."""
    m, rows = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        m = (1 - 1 / length) * m + x[:, t] / length
        rows.append(m)
    return torch.stack(rows, dim=1)


@torch.no_grad()
def test_needs_and_errors_are_those_by_hand():
    """The queries of another KV head; RoPE's pairs d, d + 1; the most; attention over k~; an error
    that attention has not averaged; a length that is a decay; the last row alone."""
    model = tiny(**TINY | QWEN2_FORM | dict(n_head=6, width=48))
    tokens = draw_tokens(2, 30, vocab_size=257)
    found = watch(model, tokens, 5.0)
    long = least_needed(found, Start(pairs=0.5))
    assert long.shape == (2, 2, 8) and long.sum(-1).eq(4).all()
    assert least_needed(found, Start(pairs=0.53)).sum(-1).eq(6).all()  # 2.12 pairs: three
    rope = model.rope(torch.arange(30)[None])
    later = torch.ones(30, 30, dtype=torch.bool).triu(1)
    for n, head in itertools.product(range(2), range(2)):
        q, k, v = in_places(model, tokens, n)
        of_k, of_v = ((x - averaged(x, 5.0))[:, :, head].double() for x in (k, v))  # (B, T, D)
        turned_q, turned_k = (model.layers[n].self_attn.rotate(x, rope) for x in (q, k))
        needs, errors = torch.zeros(4, dtype=torch.double), torch.zeros(8, 8, dtype=torch.double)
        for of_q in range(3 * head, 3 * head + 3):
            scores = turned_q[:, :, of_q] @ turned_k[:, :, head].mT / 8 ** 0.5
            share = scores.masked_fill(later, -torch.inf).softmax(-1).double()  # (B, T, T)
            e = (share @ of_v).flatten(0, 1)
            errors += e.T @ e / 60
            for d in range(4):
                energy = q[:, :, of_q, [d, d + 4]].square().sum(-1)             # (B, T)
                error = of_k[:, :, [d, d + 4]].square().sum(-1, keepdim=True)   # (B, T, 1)
                needs[d] += (energy * (share @ error)[..., 0]).mean()
        torch.testing.assert_close(found[n]["k_need"][head].double(), needs, rtol=1e-4, atol=0)
        torch.testing.assert_close(found[n]["v_error"][head], errors, rtol=1e-4, atol=1e-9)
        least = sorted(range(4), key=needs.tolist().__getitem__)[:2]
        assert sorted(long[n, head].nonzero().flatten().tolist()) == sorted(
            [*least, *(d + 4 for d in least)])
    assert model.config.memory is None  # as it was


@torch.no_grad()
@pytest.mark.parametrize("form", [LLAMA_FORM, QWEN2_FORM, {}, dict(qk_norm="head")],
                         ids=["llama", "qwen2", "olmo2", "qk-norm"])
def test_turned_values_leave_the_model_as_it_was(form):
    """Rows turned and columns not; another head's columns; a bias that stays; one R for all."""
    model = tiny(**TINY | form)
    tokens, before = draw_tokens(2, 30, vocab_size=257), None
    with torch.no_grad():
        before = model(tokens)
    weights = [layer.self_attn.v_proj.weight.clone() for layer in model.layers]
    found = watch(model, tokens, 8.0)
    long = torch.rand(2, 2, 8, generator=torch.Generator().manual_seed(1)) < 0.5
    turn_values(model, found, long)
    torch.testing.assert_close(model(tokens), before, atol=2e-4, rtol=1e-3)
    for layer, old in zip(model.layers, weights):
        assert not torch.allclose(layer.self_attn.v_proj.weight, old, atol=1e-3)

    # Of all choices of as many directions, the long channels err least in sum (Ky Fan).
    for n, of_layer in enumerate(watch(model, tokens, 8.0)):
        for head in range(2):
            error, is_long = of_layer["v_error"][head], long[n, head]
            least = float(torch.linalg.eigvalsh(error)[:is_long.sum()].sum())
            assert float(error.diagonal()[is_long].sum()) == pytest.approx(least, rel=1e-3)


def test_an_output_gate_stands_between_values_and_output():
    """Values that are turned where another factor of each channel follows."""
    model = tiny(**TINY | dict(output_gate=True))
    found = watch(model, draw_tokens(1, 9, vocab_size=257), 8.0)
    refused(lambda: turn_values(model, found, ALL), "output gate")


# ---------------------------------------------------------------- which heads

def with_memory(kind="decay", **changes):
    return tiny(**TINY | changes).add_memory(0.5, kind)


def test_gates_start_long_in_these_channels_of_these_heads_alone():
    """Another head; channels of another layer's; g where 1 - g is meant; what stood there."""
    model, heads = with_memory(n_layer=3), [(1, 0), (2, 1)]
    long = torch.rand(3, 2, 8, generator=torch.Generator().manual_seed(0)) < 0.5
    set_gates(model, heads, long, 32.0)
    x = draw_tokens(1, 5).float()[..., None].expand(1, 5, 32)
    for number, layer in enumerate(model.layers):
        g = layer.self_attn.memory.gate(x).sigmoid()  # (1, 5, KV, D)
        expected = torch.full_like(g, REST)
        for of_layer, head in heads:
            if of_layer == number:
                expected[:, :, head, long[number, head]] = 1 - 1 / 32
        torch.testing.assert_close(g, expected)
    set_gates(model, [], long, 32.0)
    assert all(torch.allclose(layer.self_attn.memory.proj.bias.sigmoid(), torch.tensor(REST))
               for layer in model.layers)


def loss_by_hand(model, tokens, heads, long, length):
    set_gates(model, heads, long, length)
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).item()


@torch.no_grad()
def test_cheapest_heads_are_those_of_brute_force():
    """The dearest; each alone, not beside the others; too few; a loss per row or of a sum."""
    for seed in range(3):
        model, start = with_memory(), Start(heads=0.75, length=16.0)
        tokens = draw_tokens(3, 41, seed, vocab_size=257)
        every, expected = list(itertools.product(range(2), range(2))), []
        of = lambda *heads: loss_by_hand(model, tokens, heads, ALL, 16.0)
        while len(expected) < 3:
            expected.append(min(set(every) - set(expected), key=lambda head: of(*expected, head)))
        heads, before, alone, after = cheapest(model, tokens, start, ALL, at_a_time=1)
        assert heads == expected
        near = lambda *heads: pytest.approx(of(*heads), abs=1e-5)
        assert before == near() and after == near(*expected)
        assert alone == {head: near(head) for head in every} and len({*alone.values()}) == 4
        two, *_ = cheapest(model, tokens, Start(heads=0.3, length=16.0), ALL)
        assert two == sorted(every, key=alone.get)[:2]  # 1.2 heads: two, both by what each costs


def test_later_heads_are_weighed_beside_the_earlier(monkeypatch):
    """A choice that goes by each head's own cost: two that do the same are not both cheap."""
    cost = {(0, 0): 1, (0, 1): 2, (1, 0): 3, (1, 1): 9}
    now = []

    def score(tokens, weight):
        together = 5 if {(0, 0), (0, 1)} <= {*now} else 0
        return torch.tensor(40.0 * (sum(map(cost.get, now)) + together)), None
    model = with_memory()
    monkeypatch.setattr(model, "score", score)
    monkeypatch.setattr(starts, "set_gates", lambda model, heads, *_: now.__setitem__(
        slice(None), heads))
    choose = lambda n: cheapest(model, draw_tokens(1, 41), Start(heads=0.5), ALL, at_a_time=n)
    assert choose(1) == ([(0, 0), (1, 0)], 0, cost, 4)
    assert choose(2)[0] == [(0, 0), (0, 1)]


# ---------------------------------------------------------------- a model that starts so

@pytest.fixture
def here(beginnings):
    beginnings()


@torch.no_grad()
def test_a_start_is_made_once_and_is_what_its_file_says(here, capsys):
    """Heads or costs of other gates than were saved; another start taken for this one."""
    start = Start(kind="keys", heads=0.5, length=8.0)
    make = lambda start=start, init="model", context_len=64: starts.started(
        start, init, "shards", "start", "cpu", context_len)
    folder = make()
    told, model = files.load(folder / "start.json"), Transformer.from_pretrained(folder)
    assert model.config.memory == "keys" and "2 heads start at 8 tokens" in capsys.readouterr().out
    of_bias = torch.stack([layer.self_attn.memory.proj.bias for layer in model.layers])
    long = of_bias.view(2, 2, 8) > 0  # (layers, KV, D)
    heads = long.any(-1).nonzero().tolist()
    assert heads == sorted(told["heads"]) and len(heads) == 2 and long.sum() == 2 * 6

    tokens = torch.stack([torch.from_numpy(Shards("shards", 64, seed=0).sample(i))
                          for i in range(6)])
    plain = Transformer.from_pretrained("model")
    found = watch(plain, tokens[:, :-1], 8.0)
    where = least_needed(found, start)
    assert torch.equal(where & long.any(-1, keepdim=True), long)
    of = lambda *heads: pytest.approx(loss_by_hand(model, tokens, heads, where, 8.0), abs=1e-4)
    assert told["loss"] == of() and told["loss_with"] == of(*map(tuple, heads))
    for layer, head in itertools.product(range(2), range(2)):
        assert told["loss"] + told["cost_alone"][layer][head] == of((layer, head))
    of_v = [m.layers[0].self_attn.v_proj.weight for m in (model, plain)]
    assert not torch.allclose(*of_v, atol=1e-3)  # turned
    by_hand = F.cross_entropy(plain(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    assert told["loss"] == pytest.approx(by_hand.item(), rel=0.01)  # but for REST
    turn_values(plain, found, where)  # for this length
    torch.testing.assert_close(*of_v)

    written = (folder / "start.json").stat().st_mtime_ns
    assert make() == folder and (folder / "start.json").stat().st_mtime_ns == written
    refused(lambda: make(Start()), "start was started with start", "move it away")
    refused(lambda: make(init="another"), "init model, not another")
    refused(lambda: make(context_len=32), "context_len 64, not 32")
    (folder / "start.json").write_text('{"start')
    refused(make, "start.json", "damaged")
    (folder / "start.json").unlink()  # killed before it was written
    make()
    assert files.load(folder / "start.json") == told


@torch.no_grad()
def test_a_control_is_turned_alike_and_has_no_memory(here):
    """A control whose values are turned otherwise than those of the memory beside it, or not."""
    made = [Transformer.from_pretrained(starts.started(
        Start(kind=kind, heads=0.5), "model", "shards", str(kind), "cpu", 64))
        for kind in (None, "decay")]
    assert [model.config.memory for model in made] == [None, "decay"]
    tensors = [dict(model.named_parameters()) for model in made]
    for name, tensor in tensors[0].items():
        assert torch.equal(tensor, tensors[1][name]), name
    tokens, plain = draw_tokens(2, 30, vocab_size=257), Transformer.from_pretrained("model")
    torch.testing.assert_close(made[0](tokens), plain(tokens), atol=2e-4, rtol=1e-3)
    assert not torch.equal(made[0].layers[0].self_attn.v_proj.weight,
                           plain.layers[0].self_attn.v_proj.weight)


@torch.no_grad()
def test_a_start_may_follow_what_another_chose(here, monkeypatch):
    """Heads that a second machine chooses anew; channels of one start with heads of another."""
    def make(folder, kind="decay", like=None, init="model", length=32.0):
        if like:
            files.save(like, "chosen.json")
        return starts.started(Start(kind=kind, heads=0.5, length=length), init, "shards", folder,
                              "cpu", 64, like=like and "chosen.json")

    told = files.load(make("first") / "start.json")
    other = ["".join(reversed(word)) for word in told["long"][0]]  # as nobody would choose
    assert other != told["long"][0]
    like = told | {"long": [other, told["long"][1]], "heads": [[0, 1], [1, 0]]}
    monkeypatch.setattr(starts, "cheapest", lambda *_: pytest.fail("chosen anew"))
    memory, plain = make("memory", like=like), make("plain", None, like)
    assert files.load(memory / "start.json") == like
    of_plain = files.load(plain / "start.json")
    assert of_plain["long"] == like["long"] and "heads" not in of_plain
    models = [Transformer.from_pretrained(x) for x in (memory, plain, "first")]
    bias = torch.stack([layer.self_attn.memory.proj.bias for layer in models[0].layers])
    assert starts.to_words(bias.view(2, 2, 8) > 0) == [
        ["0" * 8, other[1]], [told["long"][1][0], "0" * 8]]
    for i, same in (0, False), (1, True):
        v = [model.layers[i].self_attn.v_proj.weight for model in models]
        assert torch.equal(v[0], v[1]) and torch.allclose(v[0], v[2]) == same

    assert make("memory", like=like) and make("memory", like=like | {"loss": 9.0})  # there already
    longer = files.load(make("longer", like=like | {"context_len": 32}) / "start.json")
    assert longer["heads"] == like["heads"] and longer["context_len"] == 64  # of another context
    refused(lambda: make("memory", like=told), "memory has other channels or heads")
    refused(lambda: make("new", like=told, length=9.0), "chosen.json was chosen with start",
            "choose another --results")
    refused(lambda: make("new", like=told | {"rest": 0.02}), "chosen with rest 0.02, not 0.005")
    other = Transformer.from_pretrained("model")
    other.layers[0].self_attn.k_proj.weight[0] += 1
    other.save_pretrained("other")
    refused(lambda: make("new", like=told, init="other"),
            "chosen.json was chosen for another model than other")
    lacking = {key: value for key, value in told.items() if key != "loss_with"}
    refused(lambda: make("new", like=lacking), "chosen.json", "no field 'loss_with'")
