"""experiments/swap.py: each cell against Eq. 1, 3 and 4 written out by hand, token by token."""
import math
from dataclasses import replace

import pytest
import torch
from conftest import (DEVICE, LLAMA_FORM, QWEN3_FORM, RATPLUS_FORM, assert_close, draw_tokens,
                      refused, tiny)
from test_niah import Bytes
from test_oracle import make

import eval_niah
import sparse
from experiments import ways
from experiments.oracle import Frozen
from experiments.swap import TRAINED, cells, swapped
from sparse import Compose, Dense, Dilated, MoBA, Quest, SnapKV, compose
from triton_ops import backend

QUEST, MOBA, SNAPKV = Quest(12, 4), MoBA(12, 4), SnapKV(12, 5, 3)
METHODS = pytest.mark.parametrize("method", [QUEST, MOBA, SNAPKV], ids=lambda m: type(m).__name__)
FORMS = {
    "llama": LLAMA_FORM | dict(n_head=6, n_kv_head=2, width=48),
    "olmo2": dict(n_kv_head=2),
    "olmo2 values": dict(n_kv_head=2, memory="values"),
    "qwen3": QWEN3_FORM | dict(n_kv_head=2),
    "ratplus": RATPLUS_FORM,
}
NAMES = ["k~: k~, v~", "k~: k~, v", "k~: k, v~", "k~: k, v",
         "k: k~, v~", "k: k~, v", "k: k, v~", "k: k, v"]


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    monkeypatch.setattr(backend, "choice", "torch")


def a_model(form, **changes):
    return tiny(**dict(memory="decay") | FORMS[form] | changes).to(DEVICE)


# ---------------------------------------------------------------- by hand

def best(scores, n):
    """The candidates {number: score} of the n highest scores."""
    return sorted(scores, key=lambda i: -scores[i])[:n]


def in_blocks(chosen, size, t):
    return [j for j in range(t + 1) if j // size in chosen]


def of_quest(method, q, k, t):
    """What the query at t (G, D) reads of one head's keys k (T, D)."""
    size, current = method.block_size, t // method.block_size
    scores = {}
    for n in range(1, current):
        block = k[n * size:(n + 1) * size]
        scores[n] = sum(torch.maximum(x * block.amin(0), x * block.amax(0)).sum() for x in q)
    chosen = {0, current, *best(scores, method.budget // size - len({0, current}))}
    return in_blocks(chosen, size, t)


def of_moba(method, q, k, t):
    size, current = method.block_size, t // method.block_size
    scores = {n: sum(x @ k[n * size:(n + 1) * size].mean(0) for x in q)
              for n in range(1, current)}
    chosen = {0, current, *best(scores, method.budget // size - len({0, current}))}
    return in_blocks(chosen, size, t)


def of_snapkv(method, q, k, T):
    """Which entries of a prompt of T tokens stay. q: (T, G, D)"""
    W, D, p = method.window, k.shape[1], torch.zeros(T)
    for t in range(T - W, T):
        for x in q[t]:
            p[:T - W] += torch.softmax(k[:t + 1] @ x / math.sqrt(D), 0)[:T - W]
    half = method.kernel // 2
    scores = {j: p[max(0, j - half):j + half + 1].sum() for j in range(T - W)}
    return sorted([*best(scores, method.budget - W), *range(T - W, T)])


def rms(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def normed(x, norm, all_heads):
    """x (T, heads, D)"""
    if not hasattr(norm, "weight"):
        return x
    flat = x.flatten(1) if all_heads else x
    return rms(flat, norm.weight.cpu(), norm.eps).view_as(x)


def rotated(x, theta):
    """x (T, heads, D)"""
    T, _, D = x.shape
    angle = torch.arange(T)[:, None] * theta ** -(torch.arange(0, D, 2) / D)
    turned = torch.complex(x[..., :D // 2], x[..., D // 2:]) * torch.polar(
        torch.ones_like(angle), angle)[:, None]
    return torch.cat([turned.real, turned.imag], -1)


def remembered(g, x):
    m, out = torch.zeros_like(x[0]), []
    for t in range(len(x)):
        m = g[t] * m + (1 - g[t]) * x[t]
        out.append(m)
    return torch.stack(out)


def read_by_hand(attention, x, T, method, cell):
    """Attention (n, C) of the input x (n, C): a prompt of T tokens, then steps of an answer."""
    config, (by, rest) = attention.config, cell.split(": ")
    D, KV, n = config.head_width, config.n_kv_head, len(x)
    keys, values = rest.split(", ")
    q, k, v = (linear(x).view(n, -1, D)
               for linear in (attention.q_proj, attention.k_proj, attention.v_proj))
    normal = x if config.pre_norm else rms(x, 1, config.norm_eps)
    g = torch.sigmoid(attention.memory.proj(normal)).view(n, KV, D)
    k_mem = k if config.memory == "values" else remembered(g, k)
    held = {"k": k, "k~": k_mem, "v": v, "v~": remembered(g, v)}
    for name, norm in ("k", attention.k_norm), ("k~", attention.k_norm):
        held[name] = rotated(normed(held[name], norm, config.qk_norm == "all"), config.rope_theta)
    q = rotated(normed(q, attention.q_norm, config.qk_norm == "all"), config.rope_theta)
    q = q.view(n, KV, -1, D)

    y = torch.zeros_like(q)
    for h in range(KV):
        if isinstance(method, SnapKV):
            kept = of_snapkv(method, q[:, h], held[by][:, h], T)
        for t in range(n):
            entries, read = [*range(t + 1)], ("k~", "v~")
            if isinstance(method, Quest) and t >= T:
                entries, read = of_quest(method, q[t, h], held[by][:, h], t), (keys, values)
            if isinstance(method, MoBA) and t < T:
                entries, read = of_moba(method, q[t, h], held[by][:, h], t), (keys, values)
            if isinstance(method, SnapKV) and t >= T:
                entries, read = kept + [*range(T, t + 1)], (keys, values)
            K, V = (held[name][entries, h] for name in read)
            y[t, h] = torch.softmax(q[t, h] @ K.T / math.sqrt(D), -1) @ V
    y = y.flatten(1)
    if attention.output_gate is not None:
        y = y * torch.sigmoid(attention.output_gate(x))
    return attention.o_proj(y)


@torch.no_grad()
def logits_by_hand(model, ids, T, method, cell):
    """Logits (len(ids) - T + 1, V) from the prompt's last token on."""
    x = model.embed_tokens(ids)
    for layer in model.layers:
        if layer.pre_norm:
            x = x + read_by_hand(layer.self_attn, layer.input_layernorm(x), T, method, cell)
            x = x + layer.mlp(layer.pre_feedforward_layernorm(x))
        else:
            y = read_by_hand(layer.self_attn, x, T, method, cell)
            x = x + layer.post_attention_layernorm(y)
            x = x + layer.post_feedforward_layernorm(layer.mlp(x))
    return model.norm(x)[T - 1:] @ model.head_weight.T


@torch.no_grad()
def logits_of(model, tokens, lengths, answer, method):
    """Likewise of rows: prompts (B, T) of these lengths, then the tokens (B, n) of an answer."""
    cache = model.new_cache(len(tokens), tokens.shape[1] + answer.shape[1] + 1)
    logits = [model.prefill(tokens, lengths, cache, sparse.phases(method).prefill_by)]
    with cache.turn(method) as own:
        logits += [model.step(token, own, method).clone() for token in answer.T]
    return torch.stack(logits, 1)  # (B, n + 1, V)


@METHODS
@pytest.mark.parametrize("form", FORMS)
def test_each_cell_is_what_it_says(form, method):
    """
    A cell that chooses by other keys or reads others, in any phase; keys before their norm or RoPE;
    another KV head's half; padding, or a neighbour's row, that is read; a state that is mixed up.
    """
    model, lengths, n = a_model(form), [30, 17, 24], 6
    tokens, answer = draw_tokens(3, 30), draw_tokens(3, n, seed=1)
    found, distinct = cells(method), set()
    assert [*found] == NAMES
    both = swapped(model)
    model = tiny(**vars(model.config))  # on the CPU
    for name in NAMES:
        logits = logits_of(both, tokens.to(DEVICE), torch.tensor(lengths, device=DEVICE),
                           answer.to(DEVICE), found[name]).cpu()
        for row, T in enumerate(lengths):
            ids = torch.cat([tokens[row, :T], answer[row]])
            expected = logits_by_hand(model, ids, T, method, name)
            assert_close(logits[row], expected, atol=2e-4, what=f"{name}, row {row}")
        distinct.add(round(float(logits.double().square().sum()), 3))
    assert len(distinct) == (2 if form == "olmo2 values" else 8)  # there k~ is k


@METHODS
@pytest.mark.parametrize("form", FORMS)
def test_with_memory_throughout_it_is_the_plain_method(form, method):
    """Another answer, by a bit, than the model's own under the method: no cell would compare."""
    model, examples = a_model(form, vocab_size=280), make(5)
    method = replace(method, budget=method.budget * 8)
    plain = ways.evaluate(model, Bytes(), examples, [method], batch=3)[method]
    cell = cells(method)["k~: k~, v~"]
    ours = ways.evaluate(swapped(model), Bytes(), examples, [cell], batch=3)[cell]
    assert ours.texts == plain.texts and ours.read == plain.read
    tokens, answer = draw_tokens(2, 30).to(DEVICE), draw_tokens(2, 5, seed=1).to(DEVICE)
    of = lambda asked, method: logits_of(asked, tokens, None, answer, method)
    exact = 0 if DEVICE == "cpu" else 1e-5  # a GPU may sum halves of a tensor in another order
    assert_close(of(swapped(model), cell), of(model, method), atol=exact)


def test_a_memory_that_forgets_at_once_makes_no_difference():
    """A cell that reads something else than keys and values: at g = 0 k~ is k, and v~ is v."""
    model, tokens = a_model("llama"), draw_tokens(2, 30).to(DEVICE)
    for layer in model.layers:
        layer.self_attn.memory.proj.weight.data.zero_()
        layer.self_attn.memory.proj.bias.data.fill_(-100)
    for method in QUEST, MOBA, SNAPKV:
        logits = [logits_of(swapped(model), tokens, None, tokens[:, :4], cell)
                  for cell in cells(method).values()]
        for of_cell in logits[1:]:
            assert_close(of_cell, logits[0], atol=1e-5)


# ---------------------------------------------------------------- as any method and model

def test_cells_share_the_dense_prefill(monkeypatch):
    """Two minutes that become six: a prefill for each cell of Quest and SnapKV."""
    model, examples, n = swapped(a_model("llama", vocab_size=280)), make(2), []
    stock = eval_niah.prefill
    monkeypatch.setattr(eval_niah, "prefill", lambda *args: n.append(args[2]) or stock(*args))
    asked = [cell for method in (Quest(96, 8), SnapKV(96, 8), MoBA(96, 8))
             for cell in cells(method).values()]
    answers, _, _ = eval_niah.answer(model, Bytes(), examples, asked)
    assert len(answers) == 24 and n.count(TRAINED) == 1 and len(n) == 1 + 8
    read = {a.read for cell in asked[:8] for a in answers[cell]}
    assert all(some is None or some <= 96 for some in read) and read != {None}


def test_snapkv_may_compress_as_the_prompt_comes():
    """model.generate, which never stores the whole prompt: entries of one half alone."""
    model, tokens = swapped(a_model("llama")), draw_tokens(2, 30).to(DEVICE)
    for cell in cells(SNAPKV).values():
        logits = model.prefill(tokens, None, cache := model.new_cache(2, 40), TRAINED)
        later = model.decode(logits, cache, 6, cell)
        assert torch.equal(model.generate(tokens, 6, sparse=cell), later)


def test_the_model_is_as_it_was():
    """A copy of the weights, which may differ later; a memory that stays exchanged in the model."""
    model, tokens = a_model("olmo2"), draw_tokens(1, 9).to(DEVICE)
    before, config = model(tokens), replace(model.config)
    both = swapped(model)
    assert torch.equal(model(tokens), before) and model.config == config
    assert {x.data_ptr() for x in both.parameters()} == {x.data_ptr() for x in model.parameters()}
    assert {*map(id, both.parameters())} == {*map(id, model.parameters())}


def test_a_frozen_quest_has_cells_too():
    """A step that no longer knows its prompt."""
    model, tokens = swapped(a_model("llama")), draw_tokens(2, 30).to(DEVICE)
    of_cell = [logits_of(model, tokens, None, tokens[:, :3], cell)
               for cell in cells(Frozen(12, 4, random=0)).values()]
    assert torch.equal(of_cell[0], of_cell[4]), "a draw that looks at keys"
    assert not torch.equal(of_cell[0], of_cell[1])


@METHODS
def test_cells_are_the_same_in_triton(method, both):
    """
    A kernel that is handed the wrong half, or that goes around a score; a step for a graph that
    stores a token elsewhere, or loses sight of a block's bounds.
    """
    model = tiny(width=64, n_kv_head=2, n_layer=1, memory=True).to(DEVICE)
    tokens, lengths = draw_tokens(2, 14).to(DEVICE), torch.tensor([14, 11], device=DEVICE)

    def ask(name):
        asked = swapped(model)
        assert asked.in_graph == (backend.choice == "triton")
        return logits_of(asked, tokens, lengths, draw_tokens(2, 4, seed=1).to(DEVICE),
                         cells(method)[name])
    for name in NAMES[0], NAMES[3], NAMES[6]:
        plain, ours = both(lambda: ask(name))
        assert_close(ours, plain, atol=1e-4, what=name)


@METHODS
@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
def test_steps_are_recorded_but_not_those_of_a_fork(method, monkeypatch):
    """Hundreds of launches that Python makes at each step; Python that is asked once."""
    class Own(type(method)):
        def decode(self, q, cache):
            return super().decode(q, cache)
    monkeypatch.setattr(backend, "choice", "auto")
    model, tokens = swapped(tiny(width=64, n_kv_head=2, memory=True).to(DEVICE)), draw_tokens(2, 30)
    for asked in method, Own(**vars(method)):
        cell = cells(asked)[NAMES[3]]
        cache = model.new_cache(2, 40)
        model.prefill(tokens.to(DEVICE), None, cache, sparse.phases(cell).prefill_by)
        with cache.turn(cell) as own:
            for token in tokens.T[:3].to(DEVICE):
                model.step(token, own, cell)
            by_own = isinstance(asked, Own) and isinstance(asked, Quest)  # others decode densely
            assert (cell in own.graphs) != by_own


def test_cells_share_a_cache_from_prompt_to_prompt(both):
    """Bounds of the prompt before, or that another cell's steps have left behind."""
    model = tiny(width=64, n_kv_head=2, n_layer=1, memory=True).to(DEVICE)
    found, answer = cells(QUEST), draw_tokens(2, 5, seed=3).to(DEVICE)

    def ask():
        asked, out = swapped(model), []
        cache = asked.new_cache(2, 24)
        for n in 0, 1:
            cache.clear()
            tokens, lengths = draw_tokens(2, 14, seed=n), torch.tensor([14, 11 - n])
            asked.prefill(tokens.to(DEVICE), lengths.to(DEVICE), cache, TRAINED)
            for cell in found[NAMES[3]], found[NAMES[6]]:
                with cache.turn(cell) as own:
                    out += [asked.step(token, own, cell).clone() for token in answer.T]
        return torch.stack(out)
    plain, ours = both(ask)
    assert_close(ours, plain, atol=1e-4)


@METHODS
def test_a_score_of_a_forks_own_is_asked(method):
    """Quest's own bounds, out of the cache, in place of what somebody wrote."""
    asked = []

    class Own(type(method)):
        def score(self, *inputs):
            asked.append(True)
            return super().score(*inputs)
    model, tokens = swapped(a_model("llama")), draw_tokens(2, 30).to(DEVICE)
    own = Own(**vars(method))
    for name in NAMES[0], NAMES[3]:
        asked.clear()
        ours, stock = (logits_of(model, tokens, None, tokens[:, :3], cells(m)[name])
                       for m in (own, method))
        assert asked
        assert_close(ours, stock, atol=1e-5, what=name)


def test_what_cannot_be_swapped_is_said():
    """A stock method, which would take 2 KV heads for heads; a memory that is no average."""
    model = a_model("olmo2", vocab_size=280)  # 4 query heads could share 2 x 2 KV heads
    tokens, both = draw_tokens(1, 30).to(DEVICE), swapped(model)
    for method in None, Dense(), QUEST, MOBA, Compose(prefill_by=TRAINED, decode_by=QUEST):
        refused(lambda: both.generate(tokens, 3, sparse=method), "cells", sparse.name(
            method or Dense()))
    refused(lambda: both(tokens), "cells")
    half = Compose(prefill_by=TRAINED, decode_by=TRAINED, compress_by=SNAPKV)
    refused(lambda: both.generate(tokens, 3, sparse=half), "cells")
    refused(lambda: swapped(tiny()), "no memory")
    refused(lambda: swapped(both), "decay")
    for method in Dense(), Dilated(), compose(QUEST, SNAPKV):
        refused(lambda: cells(method), "quest")
