"""model.py: the same function whole, in steps, in chunks and padded; OLMo 2 as transformers has it, RAT+ as released."""
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Olmo2Config, Olmo2ForCausalLM

from infra import cost
import model as model_file
from conftest import FORMS, RATPLUS_FORM, assert_close, draw_tokens, error, official_names, one_line, randomize, save_pth, tiny
from engine import draw
from model import PRESETS, Config, Transformer
from sparse import Dense, Dilated, MoBA, Quest, SnapKV, attend_to_slots, compose, name

METHODS = [
    Dense(), Quest(16, 4), Quest(12, 4, keep_first=False, keep_current=False), MoBA(16, 4), SnapKV(14, 6, 3), Dilated(8, 5, 2),
    Dilated(None, 7, 2), compose(MoBA(16, 4), SnapKV(14, 6, 3), Quest(12, 4)),
    Quest(16, 4, random=1), MoBA(16, 4, random=1), SnapKV(14, 6, 3, random=1),
]
methods = pytest.mark.parametrize("method", METHODS, ids=name)
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())


@torch.no_grad()
def in_pieces(model, tokens, cuts, sparse=None, room=0, window=64):
    """Logits (B, T, V) of tokens fed in pieces that end at `cuts`, and the cache after them."""
    cache = model.new_cache(len(tokens), tokens.shape[1] + room, window)
    cuts = (0, *cuts, tokens.shape[1])
    out = [model(tokens[:, start:end], cache=cache, sparse=sparse) for start, end in zip(cuts, cuts[1:])]
    return torch.cat(out, dim=1), cache


def assert_same_state(cache, other, atol=2e-5):
    for i, (state, expected) in enumerate(zip(cache.state, other.state)):
        assert (state is None) == (expected is None)
        if state is not None:
            assert state.dtype == torch.float32
            assert_close(state, expected, atol, what=f"memory state of layer {i}")


# ---------------------------------------------------------------- whole = prefill + steps = chunks

CUTS = {
    "prefill": (), "prefill and steps": tuple(range(20, 40)), "token by token": tuple(range(1, 40)),
    "chunks of 2": tuple(range(2, 40, 2)), "chunks": (7, 9, 25, 38), "step, chunk, step": (12, 13, 20, 21, 22),
}


@forms
@pytest.mark.parametrize("sparse", [None, Dilated(8, 5, 2), Dilated(8, 0, 0), Dilated(None, 6, 0)], ids=str)
@torch.no_grad()
def test_whole_is_prefill_and_steps_and_chunks(form, sparse):
    """A position, mask or memory state that restarts at a chunk, or a phase in which the method is silently off."""
    model, tokens = tiny(**form), draw_tokens(2, 40)
    whole = model(tokens, sparse=sparse)
    assert 0.3 < whole.std() < 3  # else an absolute bound means nothing
    _, reference = in_pieces(model, tokens, (), sparse)
    for what, cuts in CUTS.items():
        logits, cache = in_pieces(model, tokens, cuts, sparse)
        assert_close(logits, whole, what=f"logits, {what}")
        assert_same_state(cache, reference)
        assert cache.lengths.tolist() == cache.used.tolist() == [40, 40]


@forms
@pytest.mark.parametrize("sparse", [MoBA(12, 4), MoBA(8, 4, keep_first=False), MoBA(12, 4, random=5)], ids=name)
@torch.no_grad()
def test_moba_in_chunks_is_moba_in_one_prefill(form, sparse):
    """Blocks counted from the chunk's start instead of the text's, or a half-filled block's mean used too early."""
    model, tokens = tiny(**form), draw_tokens(2, 40)
    whole = model(tokens, sparse=sparse)
    assert error(whole, model(tokens)) > 1e-2, "the budget is so large that nothing is tested"
    for cuts in (7, 9, 25, 38), (2, 4, 8, 30), (16, 20):
        assert_close(in_pieces(model, tokens, cuts, sparse)[0], whole)


@forms
@torch.no_grad()
def test_bf16_steps_are_as_close_to_fp32_as_the_bf16_whole(form):
    """A memory state or a score rounded to bf16 at each step, which drifts: the original's does."""
    model, tokens = tiny(**form), draw_tokens(2, 60)
    for p in model.parameters():
        p.copy_(p.bfloat16())  # rounding the weights is not what is measured
    exact = model(tokens)
    model.to(torch.bfloat16)
    logits, cache = in_pieces(model, tokens, range(5, 60))
    assert logits.dtype == cache.k[0].dtype == torch.bfloat16
    assert all(state is None or state.dtype == torch.float32 for state in cache.state)
    assert error(logits, exact) <= 1.5 * error(model(tokens), exact) + 1e-3


@torch.no_grad()
def test_attention_is_causal():
    """A token that changes the logits before it, through attention or memory."""
    for form in FORMS.values():
        model, tokens = tiny(**form), draw_tokens(1, 30)
        changed = tokens.clone()
        changed[:, 20] = (changed[:, 20] + 1) % 61
        for method in Dense(), MoBA(12, 4), Dilated(8, 5, 2):
            a, b = model(tokens, sparse=method), model(changed, sparse=method)
            assert torch.equal(a[:, :20], b[:, :20]) and not torch.equal(a[:, 20], b[:, 20])


@methods
@torch.no_grad()
def test_two_turns_and_steps_between(method):
    """A second question after an answer: one that forgets the answer, or disagrees with feeding the same in other cuts."""
    model, tokens = tiny(**FORMS["gqa memory"]), draw_tokens(2, 60)
    steps = tuple(range(30, 38))  # a prompt, 8 steps, a second prompt, then steps
    logits, cache = in_pieces(model, tokens, (*steps, 50, *range(51, 60)), method)
    again, _ = in_pieces(model, tokens, (*steps, 41, 50, *range(51, 60)), method)
    assert cache.lengths.tolist() == [60, 60]
    assert_close(again, logits)
    if method == Dense() or isinstance(method, Dilated):
        assert_close(logits, model(tokens, sparse=method))
    else:
        assert error(logits[:, 31:], model(tokens)[:, 31:]) > 1e-3, "the method changed nothing: is it off?"


# ---------------------------------------------------------------- rows of a batch are independent

def feed(model, rows, turns, method):
    """
    Rows (tokens each) fed in turns [(lengths per row), ...], a turn None being one decoding step: the logits after each
    turn (turns, B, V), and the cache.
    """
    source = torch.Generator().manual_seed(99)
    done, out = [0] * len(rows), []
    cache = model.new_cache(len(rows), 64)
    for turn in turns:
        if turn is None:
            out.append(model.step(torch.stack([row[n] for row, n in zip(rows, done)]), cache, method))
        else:
            tokens = torch.randint(61, (len(rows), max(turn)), generator=source)  # padding may be any token
            for b, n in enumerate(turn):
                tokens[b, :n] = rows[b][done[b]:done[b] + n]
            out.append(model.prefill(tokens, torch.tensor(turn), cache, method))
        done = [n + (1 if turn is None else turn[b]) for b, n in enumerate(done)]
    return torch.stack(out), cache


@methods
@pytest.mark.parametrize("form", ["memory", "gqa memory", "gqa"])
def test_padded_rows_give_what_they_give_alone(method, form):
    """Padding in a block mean, a page summary, a window, the memory or the dice: the commonest wrong benchmark."""
    model = tiny(**FORMS[form])
    rows = list(draw_tokens(4, 60, seed=1))
    # a prompt, a further chunk of it, 5 steps, a second turn, 4 steps
    turns = [(33, 20, 7, 1), (1, 10, 6, 2), *[None] * 5, (2, 1, 4, 5), *[None] * 4]
    together, cache = feed(model, rows, turns, method)
    for b, row in enumerate(rows):
        alone, single = feed(model, [row], [turn and (turn[b],) for turn in turns], method)
        assert_close(together[:, b:b + 1], alone, what=f"logits of row {b}")
        for state, expected in zip(cache.state, single.state):
            if state is not None:
                assert_close(state[:, b:b + 1], expected, what=f"memory state of row {b}")
        assert (cache.lengths[b], cache.used[b]) == (single.lengths[0], single.used[0])


@methods
def test_padded_rows_generate_what_they_generate_alone(method):
    """The same, through generate; and rows in another order give the same."""
    model, tokens, lengths = tiny(**FORMS["gqa memory"], seed=2), draw_tokens(3, 40, seed=3), torch.tensor([40, 23, 8])
    together = model.generate(tokens, 12, lengths, sparse=method)
    for b in range(3):
        alone = model.generate(tokens[b:b + 1, :lengths[b]], 12, sparse=method)
        assert torch.equal(together[b:b + 1], alone), f"row {b}"
    order = torch.tensor([2, 0, 1])
    assert torch.equal(model.generate(tokens[order], 12, lengths[order], sparse=method), together[order])


@torch.no_grad()
def test_lengths_without_a_cache_ignore_padding():
    """The training path: padding that changes real tokens' logits."""
    model, tokens, lengths = tiny(memory=True), draw_tokens(3, 30), torch.tensor([30, 17, 5])
    for method in Dense(), MoBA(12, 4), Dilated(8, 2, 1):
        logits = model(tokens, lengths, sparse=method)
        for b, n in enumerate(lengths.tolist()):
            assert_close(logits[b, :n], model(tokens[b:b + 1, :n], sparse=method)[0])


@methods
def test_fork_is_independent_and_equals_a_fresh_run(method):
    """State that leaks from one setting of a comparison into the next."""
    model, tokens = tiny(**FORMS["gqa memory"]), draw_tokens(2, 40)
    cache = model.new_cache(2, 64)
    logits = model.prefill(tokens, cache=cache)
    before = cache.fork()
    first = model.decode(logits, cache.fork(), 10, sparse=method)
    other = model.decode(logits, cache.fork(), 10, sparse=Quest(8, 4))
    again = model.decode(logits, cache.fork(), 10, sparse=method)
    assert torch.equal(first, again)
    for field, value in vars(before).items():
        for a, b in zip(*(x if isinstance(x, list) else [x] for x in (value, vars(cache)[field]))):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, f"decoding forks changed {field}"
    fresh = model.new_cache(2, 64)
    model.prefill(tokens, cache=fresh)
    assert torch.equal(model.decode(logits, fresh, 10, sparse=method), first)
    forks = [cache.fork() for _ in range(3)]  # two side by side, and one that then goes the first one's way alone
    texts = [draw_tokens(2, 10, seed=seed) for seed in (8, 9)]
    side_by_side = []
    for t in range(10):
        side_by_side.append(model(texts[0][:, t:t + 1], cache=forks[0], sparse=method)[:, -1])
        model(texts[1][:, t:t + 1], cache=forks[1], sparse=method)
    for t in range(10):
        alone = model(texts[0][:, t:t + 1], cache=forks[2], sparse=method)[:, -1]
        assert torch.equal(side_by_side[t], alone), f"step {t}"
    if method != Quest(8, 4) and type(method) not in (Dense, MoBA):
        assert not torch.equal(first, other)


# ---------------------------------------------------------------- generate

@forms
@torch.no_grad()
def test_greedy_generation_is_recomputing_everything_from_scratch(form):
    """A cache that is one token off, or a memory state that is not carried."""
    model, tokens = tiny(**form, seed=2), draw_tokens(2, 20)
    expected = tokens
    for _ in range(20):
        expected = torch.cat([expected, model(expected)[:, -1:].argmax(-1)], dim=1)
    new = model.generate(tokens, 20)
    assert torch.equal(new, expected[:, 20:])
    assert len(new.unique()) > 5


@methods
def test_generation_with_a_method_is_its_own_steps_in_a_fresh_cache(method):
    """State that generate keeps between steps or calls and a fresh cache would not have."""
    model, tokens = tiny(**FORMS["memory"], seed=4), draw_tokens(2, 30)
    text = tokens
    for _ in range(8):
        logits, _ = in_pieces(model, text, range(30, text.shape[1]), method)
        text = torch.cat([text, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(model.generate(tokens, 8, sparse=method), text[:, 30:])


def test_sampling_follows_its_settings():
    """A seed that does not fix the draw, a temperature or top_k that is ignored."""
    model, tokens = tiny(), draw_tokens(2, 20)
    draw = lambda **settings: model.generate(tokens, 20, **settings)
    greedy = draw()
    assert torch.equal(draw(temperature=1, seed=1), draw(temperature=1, seed=1))
    assert not torch.equal(draw(temperature=1, seed=1), draw(temperature=1, seed=2))
    assert not torch.equal(draw(temperature=1), draw(temperature=1)), "without a seed each draw is new"
    assert torch.equal(draw(temperature=1, top_k=1, seed=1), greedy)
    for tiny_one in 1e-3, 1e-40, 1e-300, 5e-324:  # what fp32 rounds to 0 too
        assert torch.equal(draw(temperature=tiny_one, seed=1), greedy)
    assert not torch.equal(draw(temperature=0.5, seed=1), draw(temperature=2, seed=1))


def test_samples_have_the_softmax_frequencies_of_the_top_k():
    """A temperature that multiplies, or a top_k that keeps one too many."""
    logits, source = torch.tensor([2.0, -1.0, 1.0, 0.0, 1.5]), torch.Generator().manual_seed(0)
    drawn = draw(logits.expand(20000, 5), temperature=2, top_k=3, source=source)
    frequencies = torch.bincount(drawn, minlength=5) / 20000
    expected = torch.zeros(5)
    expected[[0, 2, 4]] = torch.softmax(torch.tensor([1.0, 0.5, 0.75]), 0)
    assert_close(frequencies, expected, atol=0.015)
    assert frequencies[1] == frequencies[3] == 0


def test_eos_stops_a_row_and_all_rows_stop_generation():
    """Text after the end, or a finished row that disturbs the others."""
    model, tokens = tiny(seed=5), draw_tokens(3, 20)
    free = model.generate(tokens, 20)
    eos = free[0, 4].item()
    first = [row.index(eos) if eos in row else None for row in free.tolist()]
    new = model.generate(tokens, 20, eos_id=eos)
    ends = [20 if n is None else n + 1 for n in first]
    assert new.shape[1] == max(ends) and min(ends) < max(ends)
    for b, end in enumerate(ends):
        assert torch.equal(new[b, :end], free[b, :end]) and new[b, end:].eq(eos).all()
    alone = model.generate(tokens[:1], 20, eos_id=eos)
    assert alone.shape[1] == ends[0] and alone[0, -1] == eos


@pytest.mark.parametrize("count", [1, 2])
def test_generate_gives_as_many_tokens_as_asked(count):
    """A last token computed in vain, or missing; and none at all is an error."""
    assert tiny().generate(draw_tokens(2, 5), count).shape == (2, count)
    with pytest.raises(ValueError) as raised:
        tiny().generate(draw_tokens(2, 5), 0)
    one_line(raised, "max_new_tokens=0")


# ---------------------------------------------------------------- what methods do to the cache

class ReadOnly(Dense):
    """A dense cache, of which each layer reads the given prompt positions and everything generated: SnapKV by mask."""

    def __init__(self, kept, prompt):
        self.kept, self.prompt, self.call = kept, prompt, 0

    def decode(self, q, cache):
        kept = self.kept[self.call % len(self.kept)]
        self.call += 1
        new = torch.arange(self.prompt, cache.k.shape[1]).expand(*kept.shape[:2], -1)
        return attend_to_slots(q, cache.k, cache.v, torch.cat([kept, new], dim=2)), None


@pytest.mark.parametrize("form", ["memory", "gqa"])
@torch.no_grad()
def test_snapkv_decodes_as_if_the_dropped_entries_were_masked(form):
    """Positions lost with the dropped entries, a gap left open, a memory state of the wrong token."""
    model, tokens, method = tiny(**FORMS[form]), draw_tokens(2, 50), SnapKV(14, 6, 3)
    KV = model.config.n_kv_head
    logits, cache = in_pieces(model, tokens, range(40, 50), method, room=3)
    assert cache.used.tolist() == [24, 24] and cache.lengths.tolist() == [50, 50]
    kept = []
    for i in range(2):
        positions = cache.positions[i][:, :24].long().transpose(1, 2)  # (B, KV, 24)
        assert torch.equal(positions[..., 14:], torch.arange(40, 50).expand(2, KV, 10))
        assert torch.equal(positions[..., 8:14], torch.arange(34, 40).expand(2, KV, 6))
        assert positions.diff(dim=-1).gt(0).all()
        kept.append(positions[..., :14])
        assert cache.k[i].shape[1] == cache.v[i].shape[1] == 14 + 53 - 40
    masked, full = in_pieces(model, tokens, range(40, 50), ReadOnly(kept, prompt=40))
    assert_close(logits, masked)
    assert error(logits[:, 40:], model(tokens)[:, 40:]) > 1e-2, "nothing of weight was dropped"
    for i in range(2):
        index = cache.positions[i][:, :24, :, None].long().expand(-1, -1, -1, 8)
        # keys of the prompt are bit by bit those that were there; later ones follow from what was read
        assert torch.equal(cache.k[i][:, :14], full.k[i].gather(1, index)[:, :14])
        assert_close(cache.v[i][:, :24], full.v[i].gather(1, index))
    assert_same_state(cache, full)


def test_snapkv_compresses_once_and_only_before_decoding():
    """Generated tokens dropped at a later step, or a prompt cut between its chunks."""
    model, tokens, method = tiny(), draw_tokens(2, 40), SnapKV(14, 6, 3)
    cache = model.new_cache(2, 64)
    for start, end in (0, 16), (16, 30):
        model.prefill(tokens[:, start:end], cache=cache, sparse=method)
    assert cache.used.tolist() == [30, 30] and cache.positions == [None, None]
    for t in range(30, 40):
        model(tokens[:, t:t + 1], cache=cache, sparse=method)
        assert cache.used.tolist() == [14 + t - 29] * 2


def test_quest_reports_true_positions_after_snapkv():
    """Slots reported as positions: H1 would look for an answer in the wrong place."""
    model, tokens = tiny(**FORMS["gqa"]), draw_tokens(2, 45)
    _, cache = in_pieces(model, tokens, range(40, 45), compose(SnapKV(20, 6, 3), Quest(12, 4)))
    for i in range(2):
        for b in range(2):
            for h in range(2):
                selected = [j for j in cache.selected[i][b, h].tolist() if j >= 0]
                held = cache.positions[i][b, :25, h].tolist()
                # blocks of slots: the first four entries, one more block, and the newest entry alone in the seventh
                assert selected[:4] == held[:4] or set(held[:4]) <= set(selected)
                assert held[24] == 44 and 44 in selected and set(selected) <= set(held) and len(selected) == 9


@pytest.mark.parametrize("method", [Quest(16, 4), Quest(12, 4, random=1), compose(MoBA(12, 4), Quest(8, 4))], ids=name)
def test_reads_in_the_model_stay_within_the_budget(method):
    """A method that is asked in one layer only, or reads more than a table of results claims."""
    model, tokens = tiny(**FORMS["gqa memory"]), draw_tokens(3, 40)
    cache = model.new_cache(3, 64)
    chosen = []
    model.prefill(tokens, torch.tensor([40, 31, 9]), cache, method, watch=lambda layer, selected, real: chosen.append(selected))
    assert len(chosen) == 2
    if not isinstance(method, Quest):
        for selected in chosen:
            assert selected.shape[-1] * 4 <= 12
    budget = method.budget if isinstance(method, Quest) else method.decode_by.budget
    seen = set()
    for _ in range(6):
        model(torch.ones(3, 1, dtype=torch.long), cache=cache, sparse=method)
        for selected in cache.selected:
            assert selected.shape[:2] == (3, 2)
            for positions in selected.flatten(0, 1).tolist():
                read = [j for j in positions if j >= 0]
                assert 0 < len(read) == len(set(read)) <= budget
                seen.add(tuple(sorted(read)))
    assert len(seen) > 6  # layers, heads and steps choose for themselves


@torch.no_grad()
def test_random_methods_redraw_per_layer_and_step():
    """H2 with one draw for all layers, or one for the whole text."""
    model, tokens, method = tiny(), draw_tokens(1, 48), Quest(24, 4, random=1)
    cache, draws = model.new_cache(1, 48), []
    model.prefill(tokens[:, :40], cache=cache, sparse=method)
    for t in range(40, 44):  # inside one block of 4: what may be drawn is the same
        model(tokens[:, 40:41], cache=cache, sparse=method)  # and so is the token
        draws += [frozenset(selected[0, h].tolist()) - {40, 41, 42, 43} for selected in cache.selected for h in range(4)]
    # 4 of 9 blocks, drawn 32 times: shared by steps there would be 8 at most, shared by layers 16
    assert len(set(draws)) > 20, f"{len(set(draws))} different ones of {len(draws)} draws"
    for seed, same in (1, True), (2, False):
        a, b = (model.generate(tokens, 12, sparse=Quest(12, 4, random=s)) for s in (1, seed))
        assert torch.equal(a, b) == same


@torch.no_grad()
def test_random_snapkv_draws_for_each_layer_and_head():
    """H2 with one draw for all layers: compression happens outside of them."""
    model = tiny(n_layer=3)
    _, cache = in_pieces(model, draw_tokens(2, 48), (47,), SnapKV(14, 6, 3, random=1))
    kept = [frozenset(x[b, :14, h].tolist()) for x in cache.positions for b in range(2) for h in range(4)]
    assert len(set(kept)) == len(kept) == 24


@torch.no_grad()
def test_the_gate_reads_the_input_at_rms_1():
    """A post-norm model's residual grows with depth, and its embeddings are small: an unscaled gate would follow both."""
    for form in dict(memory=True), RATPLUS_FORM:
        model, seen = tiny(**form, n_layer=4), []
        model.embed_tokens.weight.mul_(10)
        for layer in model.layers:
            layer.self_attn.memory.proj.register_forward_hook(lambda module, inputs, y: seen.append(inputs[0]))
            if model.config.pre_norm:
                layer.input_layernorm.weight.fill_(1)
        model(draw_tokens(2, 20))
        assert len(seen) == 4
        for x in seen:
            assert_close(x.square().mean(-1), torch.ones(2, 20), atol=1e-3)


# ---------------------------------------------------------------- errors

def test_full_cache_is_a_clear_error():
    """Writing over the oldest entries, or an index error deep inside."""
    model = tiny()
    for lengths in None, torch.tensor([11, 5]):
        cache = model.new_cache(2, 10)
        with pytest.raises(ValueError) as raised:
            model(draw_tokens(2, 11), lengths, cache)
        one_line(raised, "10", "11", "max_len")
    cache = model.new_cache(1, 10)
    model(draw_tokens(1, 10), cache=cache)
    with pytest.raises(ValueError, match="max_len"):
        model(draw_tokens(1, 1), cache=cache)


@pytest.mark.parametrize("token", [61, 1000, -1])
def test_token_beyond_the_vocabulary_is_a_clear_error(token):
    """The wrong tokenizer, found as an index error or not at all."""
    with pytest.raises(ValueError) as raised:
        tiny()(torch.tensor([[1, token, 2]]))
    one_line(raised, token, "61", "tokenizer")


@pytest.mark.parametrize("sizes", [dict(width=30), dict(n_kv_head=3), dict(n_layer=0), dict(width=36, n_head=12)], ids=str)
def test_sizes_that_do_not_fit_are_a_clear_error(sizes):
    """A head width rounded down."""
    with pytest.raises(ValueError) as raised:
        replace(tiny().config, **{"n_kv_head": sizes.get("n_head", 4)} | sizes)
    one_line(raised, "width", "n_head")


def test_snapkv_window_beyond_the_kept_queries_is_a_clear_error():
    """A window that is silently shorter than asked for."""
    model, tokens = tiny(), draw_tokens(1, 20)
    with pytest.raises(ValueError) as raised:
        in_pieces(model, tokens, (19,), SnapKV(12, 8), window=4)
    one_line(raised, "window=8", "4", "new_cache")


# ---------------------------------------------------------------- OLMo 2, as transformers has it

OLMO2 = {"MHA": dict(num_key_value_heads=4), "GQA": dict(num_key_value_heads=2), "tied": dict(tie_word_embeddings=True),
         "one kv head, long base": dict(num_key_value_heads=1, rope_parameters={"rope_type": "default", "rope_theta": 500000.0})}
olmo2s = pytest.mark.parametrize("settings", OLMO2.values(), ids=OLMO2.keys())


def transformers_olmo2(seed=0, **changes):
    settings = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
                    max_position_embeddings=64, rms_norm_eps=1e-5, pad_token_id=None, bos_token_id=None, eos_token_id=60,
                    rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    return randomize(Olmo2ForCausalLM(Olmo2Config(**settings | changes)), seed)


@torch.no_grad()
def first_difference(ours, theirs, tokens, atol=1e-4):
    """The name of the first module, in order of computation, whose output differs; None if all agree."""
    outputs = {}

    def record(side, module, where):
        def keep(module, inputs, y):  # returns nothing: what a hook returns would replace the output
            outputs[where, side] = y[0] if isinstance(y, tuple) else y
        return module.register_forward_hook(keep)

    order = ["embed_tokens"]
    for i in range(len(ours.layers)):
        parts = "self_attn.q_norm", "self_attn.k_norm", "self_attn.v_proj", "self_attn", "post_attention_layernorm", "mlp"
        order += [f"layers.{i}.{part}" for part in parts] + [f"layers.{i}"]
    order += ["norm"]
    hooks = [record(side, module.get_submodule(where), where)
             for where in order for side, module in (("ours", ours), ("theirs", theirs.model))]
    logits = ours(tokens), theirs(tokens).logits
    for hook in hooks:
        hook.remove()
    for where in order:
        if not torch.allclose(outputs[where, "ours"], outputs[where, "theirs"], atol=atol, rtol=0):
            return where
    return None if torch.allclose(*logits, atol=atol, rtol=0) else "lm_head"


@olmo2s
@pytest.mark.parametrize("shard", [None, "20KB"])
@torch.no_grad()
def test_olmo2_logits_are_those_of_transformers(settings, shard, tmp_path):
    """OLMo 2 converted wrongly although names and shapes match: RoPE pairs, norm place, eps, head order."""
    theirs = transformers_olmo2(**settings)
    theirs.save_pretrained(tmp_path, **({"max_shard_size": shard} if shard else {}))
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == bool(shard)
    ours, tokens = Transformer.from_pretrained(tmp_path), draw_tokens(2, 50)
    logits = theirs(tokens).logits
    assert 0.3 < logits.std() < 3
    worst = (ours(tokens) - logits).abs().max().item()
    assert worst < 1e-4, f"logits differ by {worst:.2e}; first difference: {first_difference(ours, theirs, tokens)}"
    assert first_difference(ours, theirs, tokens) is None
    assert ours.config.eos_id == 60 and ours.config.tied == bool(settings.get("tie_word_embeddings"))
    expected = theirs.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=10, do_sample=False,
                               eos_token_id=None, pad_token_id=0)
    assert torch.equal(ours.generate(tokens, 10), expected[:, 50:])


@pytest.mark.parametrize("where, parameter", {
    "embed_tokens": "embed_tokens.weight", "layers.1.self_attn.q_norm": "layers.1.self_attn.q_proj.weight",
    "layers.2.self_attn": "layers.2.self_attn.o_proj.weight", "layers.0.mlp": "layers.0.mlp.up_proj.weight",
    "layers.1": "layers.1.post_feedforward_layernorm.weight", "norm": "norm.weight", "lm_head": "lm_head.weight",
}.items())
def test_a_wrong_weight_is_named(where, parameter, tmp_path):
    """A parity failure that leaves one searching through 64 layers."""
    theirs = transformers_olmo2()
    theirs.save_pretrained(tmp_path)
    ours = Transformer.from_pretrained(tmp_path)
    with torch.no_grad():
        ours.get_parameter(parameter)[3] += 0.5
    assert first_difference(ours, theirs, draw_tokens(2, 30)) == where


@pytest.mark.parametrize("form", ["olmo2", "olmo2 tied", "gqa"])
@torch.no_grad()
def test_saved_olmo2_opens_in_transformers(form, tmp_path):
    """A checkpoint that only we can read, or that others read with some weights left random."""
    ours, tokens = tiny(**FORMS[form], rope_theta=5000.0, norm_eps=1e-5, eos_id=7), draw_tokens(2, 50)
    ours.save_pretrained(tmp_path)
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(theirs, Olmo2ForCausalLM) and theirs.config.eos_token_id == 7
    assert not any(report.values()), report
    assert_close(theirs(tokens).logits, ours(tokens), atol=1e-4)


# ---------------------------------------------------------------- RAT+, as released

def layout(state, kind):
    """The packed official state dict in the other forms that are found."""
    if kind == "packed":
        return dict(state)
    out = {}
    for key, tensor in state.items():
        out[key] = tensor[:256].clone() if "in_proj" in key else tensor
        if "in_proj" in key and kind == "separate":
            out[key.replace("in_proj", "fgate_proj")] = tensor[256:].clone()
    return out


PREFIXES = {
    "as it is": lambda key: key,
    "compiled whole": lambda key: "_orig_mod." + key,
    "compiled layers": lambda key: re.sub(r"layers\.(\d+)\.", r"layers.\1._orig_mod.", key),
    "compiled twice": lambda key: "_orig_mod._orig_mod." + key.replace("seq_layer.", "seq_layer._orig_mod."),
}


def dilated_of(key):
    """D16_W20_P4 -> Dilated(16, 20, 4); dense -> None"""
    if key == "dense":
        return None
    D, W, P = (part[1:] for part in key.split("_"))
    return Dilated(None if D == "none" else int(D), int(W), int(P))


@pytest.mark.parametrize("kind", ["packed", "separate", "attention"])
@pytest.mark.parametrize("compiled", PREFIXES)
@torch.no_grad()
def test_official_ratplus_logits(ratplus, kind, compiled, tmp_path, monkeypatch):
    """A packed projection split in the wrong order, the gate inverted, memory after RoPE, another pre-norm or GELU."""
    state = {PREFIXES[compiled](key): tensor for key, tensor in layout(official_names(ratplus), kind).items()}
    model = Transformer.from_pretrained(save_pth(tmp_path / "last.pth", state, monkeypatch, n_head=4))
    assert bool(model.config.memory) == (kind != "attention") and model.config.n_head == 4
    prefix = "attention/" if kind == "attention" else ""
    tokens = ratplus["tokens"]
    cases = [key for key in ratplus if key.startswith(prefix + "logits/")]
    assert len(cases) == (3 if kind == "attention" else 7)
    for key in cases:
        logits = model(tokens, sparse=dilated_of(key.split("/")[-1]))
        assert_close(logits, ratplus[key], atol=1e-4, what=key)
    steps = [key for key in ratplus if key.startswith(prefix + "decode/")]
    assert len(steps) == (1 if kind == "attention" else 4)
    for key in steps if compiled == "as it is" else ():
        logits, _ = in_pieces(model, tokens, range(40, 75), dilated_of(key.split("/")[-1]))
        assert_close(logits[:, 40:], ratplus[key], atol=1e-4, what=key)


@torch.no_grad()
def test_ratplus_file_of_weights_alone_has_heads_of_128(tmp_path, monkeypatch):
    """Released files without a config, read with the wrong number of heads: same shapes, other logits."""
    model = tiny(**RATPLUS_FORM, width=256, n_head=2, n_kv_head=2, mlp_width=64, eos_id=2, context_len=4096)
    for layer in model.layers:
        layer.self_attn.memory.proj.bias.zero_()
    ours = model.state_dict()
    state = {"embedding.wte.weight": ours["embed_tokens.weight"], "head.lm_head.weight": ours["embed_tokens.weight"],
             "backbone.ln.weight": ours["norm.weight"]}
    for i in range(2):
        part = lambda name: ours[f"layers.{i}.{name}.weight"]
        theirs = f"backbone.layers.{i}."
        packed = [part("self_attn." + name) for name in ("output_gate", "q_proj", "k_proj", "v_proj", "memory.proj")]
        state |= {theirs + "seq_layer.in_proj.weight": torch.cat(packed),
                  theirs + "seq_layer.input_norm.weight": part("input_layernorm"),
                  theirs + "seq_layer.out_proj.weight": part("self_attn.o_proj"),
                  theirs + "hidden_layer.ln.weight": part("pre_feedforward_layernorm"),
                  theirs + "hidden_layer.fc1.weight": part("mlp.up_proj"),
                  theirs + "hidden_layer.fc2.weight": part("mlp.down_proj")}
    loaded = Transformer.from_pretrained(save_pth(tmp_path / "weights.pth", state, monkeypatch))
    assert loaded.config == model.config
    tokens = draw_tokens(2, 20)
    assert torch.equal(loaded(tokens), model(tokens))


# ---------------------------------------------------------------- a memory added, sizes, FLOPs

@pytest.mark.parametrize("form", ["olmo2", "gqa"])
@torch.no_grad()
def test_added_memory_starts_at_its_gate_and_leaves_the_rest(form, tmp_path):
    """Weights that were trained lost on the way; a gate the wrong way round, so that training begins from noise."""
    model, tokens = tiny(**FORMS[form]), draw_tokens(2, 50)
    before = model(tokens)
    model.save_pretrained(tmp_path)
    loaded = Transformer.from_pretrained(tmp_path, memory=True)
    assert loaded.config == replace(model.config, memory=True)
    for wrong in 0, 1, float("nan"):
        with pytest.raises(ValueError, match="gate="):
            model.add_memory(wrong)
    assert not model.config.memory  # still as it was
    assert model.add_memory(0.1) is model and model.config.memory
    x = torch.randn(2, 50, model.config.width)
    for m, gate in (model, 0.1), (loaded, 0.5):
        for layer in m.layers:
            g = torch.sigmoid(layer.self_attn.memory.gate(x))
            assert_close(g, torch.full_like(g, gate))
        logits, _ = in_pieces(m, tokens, range(30, 50))
        assert_close(logits, m(tokens))
        assert error(m(tokens), before) > 0.01
        for layer in m.layers:
            layer.self_attn.memory.proj.bias.fill_(-30)  # g = 0
        assert_close(m(tokens), before)


def test_added_memory_can_learn():
    """A gate so closed that its gradient is gone, or one that gets none."""
    model, tokens = tiny().add_memory(), draw_tokens(2, 50)
    nn.functional.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    for layer in model.layers:
        for p in layer.self_attn.memory.proj.parameters():
            assert p.grad.norm() > 1e-5


def test_memory_cannot_be_added_twice(tmp_path):
    """A trained memory silently replaced by a fresh one."""
    model = tiny(memory=True)
    model.save_pretrained(tmp_path)
    for add in model.add_memory, lambda: Transformer.from_pretrained(tmp_path, memory=True):
        with pytest.raises(ValueError) as raised:
            add()
        one_line(raised, "memory")


def test_presets_have_the_parameters_their_comments_say():
    """A preset that is not the checkpoint it is named after."""
    comments = re.findall(r"# ([\d.]+)([MB])$", Path(model_file.__file__).read_text(), re.M)
    counts = {}
    for (preset, config), (number, unit) in zip(PRESETS.items(), comments, strict=True):
        with torch.device("meta"):
            counts[preset] = sum(p.numel() for p in Transformer(config).parameters())
        digits = len(number.partition(".")[2])
        assert f"{counts[preset] / {'M': 1e6, 'B': 1e9}[unit]:.{digits}f}" == number, f"{preset}: {counts[preset]:,}"
    assert counts["olmo2-1b"] == 1_484_916_736 and counts["olmo2-7b"] == 7_298_617_344  # the model cards'


@forms
def test_flops_per_token_agrees_with_a_count_of_the_products(form):
    """MFU computed with the embedding table, without the head, or with attention unhalved."""
    model, T = tiny(**form, width=64, mlp_width=96, vocab_size=300), 64
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(draw_tokens(1, T))
    counts = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    products = sum(n for op, n in counts.items() if "attention" not in op)
    attention = 4 * model.config.n_layer * T * T * 64  # QK^T and PV, forward, all pairs
    expected = 3 * (products + attention / 2) / T     # the backward costs twice the forward
    assert math.isclose(cost.flops_per_token(model.config, T / 2), expected, rel_tol=0.02)


def test_gradients_reach_every_parameter():
    """A part of the model that is cut off in training."""
    for form in FORMS.values():
        model = tiny(**form)
        for method in None, Dilated(8, 0, 0), MoBA(12, 4):
            model.zero_grad()
            model(draw_tokens(2, 30), sparse=method).logsumexp(-1).sum().backward()
            for parameter, p in model.named_parameters():
                assert p.grad is not None and p.grad.abs().sum() > 0, parameter


def test_compiled_layers_share_their_graphs():
    """Something of its own in each layer's forward (an index, say) would compile every layer anew, until torch gives up."""
    model = Transformer(Config(97, n_layer=12, width=16, n_head=2, n_kv_head=1, mlp_width=32, memory=True))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    tokens, arl = torch.randint(97, (2, 20)), Dilated(dilation=8, local=0, initial=0)
    eager = model(tokens), model(tokens, sparse=arl)
    for layer in model.layers:
        layer.compile(backend="eager")
    compiled = model(tokens), model(tokens, sparse=arl)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
    for a, b in zip(eager, compiled):
        assert_close(b, a)


def test_a_deep_model_throws_dice_in_every_layer():
    """A hash that outgrows 64 bits would end models of more than a few layers."""
    model = Transformer(Config(97, n_layer=80, width=4, n_head=1, n_kv_head=1, mlp_width=4))
    new = model.generate(torch.randint(97, (1, 20)), 2, sparse=Quest(budget=8, block_size=4, random=2**40))
    assert new.shape == (1, 2)


@pytest.mark.parametrize("method", [None, Quest(budget=8, block_size=4), MoBA(budget=8, block_size=4), SnapKV(budget=12, window=4),
                                    Dilated(dilation=4, local=0, initial=1)])
def test_a_last_chunk_of_one_token_is_still_prompt(method):
    """Chunks of 8 of a prompt of 33: the last would be taken for a decoding step, and read sparsely."""
    model, tokens = tiny(**FORMS["gqa memory"]), draw_tokens(2, 33)
    whole = model.prefill(tokens, cache=model.new_cache(2, 40), sparse=method)
    cache = model.new_cache(2, 40)
    for chunk in tokens.split(8, dim=1):
        logits = model.prefill(chunk, cache=cache, sparse=method)
    assert_close(logits, whole)


def test_ragged_chunks_run_under_autocast_and_the_shared_pattern():
    """Padding of a later chunk may stand past the last slot, and autocast computes k in another dtype than the cache's."""
    model = tiny(**FORMS["gqa memory"])
    for method in None, Dilated(dilation=4, local=0, initial=1):
        cache = model.new_cache(2, 40)
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            model(draw_tokens(2, 8), lengths=torch.tensor([8, 4]), cache=cache, sparse=method)
        with torch.no_grad():
            assert model(draw_tokens(2, 8), lengths=torch.tensor([1, 2]), cache=cache, sparse=method).isfinite().all()
