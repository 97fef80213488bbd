"""
experiments/oracle.py: a draw that is kept, and a selector that knows where the needle is. And what
both rest on, LayerCache.prompt.
"""
import math
from dataclasses import dataclass, field, replace

import pytest
import torch
from conftest import DEVICE, draw_tokens, refused, tiny
from test_niah import Bytes, Pairs

import eval_niah
import niah
import sparse
from experiments import ways
from experiments.oracle import Frozen, Needles, left_out, needles_of, oracle
from sparse import Dense, MoBA, Quest, SnapKV, compose, phases, randomized
from triton_ops import backend

QUEST, MOBA, SNAPKV = Quest(64, 16), MoBA(96, 16), SnapKV(200, 16, 5)
FROZEN = Frozen(40, 8, random=0)


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    monkeypatch.setattr(backend, "choice", "torch")


def make(n=3, task="niah_multikey_1", tokenizer=Bytes(), context_len=1024):
    """Examples whose prompts differ in length."""
    return [niah.make_example(task, context_len - 40 * i, tokenizer, 0, i, "sft",
                              max_new_tokens=48) for i in range(n)]


def short_example(prompt):
    return replace(make(1)[0], prompt=prompt, answers=["77"], ids=Bytes().encode(prompt))


def a_model(**changes):
    return tiny(**dict(vocab_size=280, n_kv_head=2, n_layer=2) | changes).to(DEVICE)


# ---------------------------------------------------------------- what a step knows of its prompt

@dataclass(frozen=True)
class Noting(Dense):
    """Dense, and notes what compress and each step are told of the prompt."""
    told: list = field(default_factory=list, compare=False)

    def compress(self, q, k, v, lengths, dice):
        self.told.append((lengths.tolist(), dice.tolist()))

    def decode(self, q, cache):
        lengths, dice = cache.prompt()
        self.told.append((lengths.tolist(), dice.tolist()))
        return super().decode(q, cache)


def noted(model, tokens, lengths, cut=None):
    """What each layer is told: by compress, and in three steps. With cut: the prompt in two."""
    method, cache, L = Noting(), model.new_cache(len(tokens), tokens.shape[1] + 4), 2
    if cut:
        model.prefill(tokens[:, :cut], None, cache)
        tokens, lengths = tokens[:, cut:], lengths - cut
    logits = model.prefill(tokens, lengths, cache)
    with cache.turn(method) as own:
        model.decode(logits, own, 4, method)
    return [method.told[i:i + L] for i in range(0, 4 * L, L)]


def test_a_step_knows_the_prompt_as_compress_does():
    """A hash that moves on with the answer, of padding, of the last chunk alone, of another row."""
    model, tokens, lengths = a_model(), draw_tokens(3, 20).to(DEVICE), [20, 13, 17]
    of_compress, *of_steps = noted(model, tokens, torch.tensor(lengths, device=DEVICE))
    assert of_steps == [of_compress] * 3
    assert noted(model, tokens, torch.tensor(lengths, device=DEVICE), cut=9)[1] == of_compress
    for row, n in enumerate(lengths):
        alone = noted(model, tokens[row:row + 1, :n], None)[1]
        assert alone == [([of_batch[row]], [dice[row]]) for of_batch, dice in of_compress]


def test_a_cache_knows_its_newest_prompt():
    """One that is forgotten, or cleared, and still known; a fork that shares it."""
    model, cache = a_model(), a_model().new_cache(1, 40)
    known = lambda cache: (cache.prompt_lengths.tolist(), cache.prompt_hash.tolist())
    nothing = known(cache)
    model.prefill(draw_tokens(1, 9).to(DEVICE), None, cache)
    one, fork = known(cache), cache.fork()
    with cache.rewinding():
        model.prefill(draw_tokens(1, 5, seed=1).to(DEVICE), None, cache)
        assert known(cache)[0] == [14] and known(cache) != one == known(fork)
    assert known(cache) == one
    cache.clear()
    assert known(cache) == nothing


# ---------------------------------------------------------------- Frozen

def blocks_read(model, tokens, method, n_new, lengths=None):
    """The set of blocks that each step reads: [steps][layers][rows][KV heads]"""
    read, cache = [], model.new_cache(len(tokens), tokens.shape[1] + n_new)
    logits = model.prefill(tokens, lengths, cache)

    def watch(cache):
        read.append([[[{j // method.block_size for j in head if j >= 0} for head in row]
                      for row in layer.tolist()] for layer in cache.selected])
    model.decode(logits, cache, n_new, method, watch=watch)
    return read


def test_a_frozen_draw_is_kept_over_the_answer():
    """
    A draw anew at each step; a block of the answer that takes a place once it is no longer the
    current one; a budget or forced blocks other than Quest's.
    """
    model, T, size = a_model(), 100, FROZEN.block_size
    drawn = set()
    for step, layers in enumerate(blocks_read(model, draw_tokens(2, T).to(DEVICE), FROZEN, 30)):
        current = (T + step) // size
        found = [head - {0, current} for rows in layers for heads in rows for head in heads]
        assert all({0, current} <= head for rows in layers for heads in rows for head in heads)
        assert all(len(of_head) == 3 and max(of_head) < T // size for of_head in found)
        drawn.add(tuple(map(frozenset, found)))
    assert len(drawn) == 1
    anew = blocks_read(model, draw_tokens(2, T).to(DEVICE), randomized(QUEST, 0), 4)
    assert anew[0] != anew[1], "random Quest keeps its draw: there is nothing to compare"


def test_rows_layers_heads_and_seeds_draw_for_themselves():
    """One draw for all, of which a mean over rows would say nothing."""
    model, tokens = a_model(n_layer=3), draw_tokens(3, 400).to(DEVICE)
    method = Frozen(80, 8, random=0)
    draws = {frozenset(head) for seed in (0, 1) for layer in
             blocks_read(model, tokens, replace(method, random=seed), 2)[0]
             for row in layer for head in row}
    assert len(draws) == 2 * 3 * 3 * 2


def test_a_frozen_row_draws_the_same_alone_and_in_a_batch():
    """A draw that depends on padding, on the row's number or on its neighbours."""
    model, tokens, lengths = a_model(), draw_tokens(3, 100).to(DEVICE), [100, 61, 80]
    batch = blocks_read(model, tokens, FROZEN, 5, torch.tensor(lengths, device=DEVICE))
    for row, n in enumerate(lengths):
        alone = blocks_read(model, tokens[row:row + 1, :n], FROZEN, 5)
        assert [[layer[row] for layer in step] for step in batch] == \
            [[layer[0] for layer in step] for step in alone]


def test_frozen_reads_the_answer_where_the_prompt_is_short():
    """Blocks that are left unread though the budget has room; a whole budget that is not dense."""
    model, tokens = a_model(), draw_tokens(2, 21).to(DEVICE)
    all_of_them = Frozen(64, 8, random=0)
    assert model.generate(tokens, 40, sparse=all_of_them).tolist() == \
        model.generate(tokens, 40).tolist()
    refused(lambda: model.generate(tokens, 3, sparse=Frozen(64, 8)), "seed")
    refused(lambda: model.generate(tokens, 3, sparse=compose(SnapKV(16, 4), all_of_them)), "SnapKV")


def test_a_frozen_draw_is_the_same_in_triton(both):
    """A choice that the kernel reads otherwise, or a graph that keeps another prompt's draw."""
    model, tokens = a_model(width=64, memory=True), draw_tokens(2, 50).to(DEVICE)
    plain, ours = both(lambda: blocks_read(model, tokens, FROZEN, 4))
    assert plain == ours


# ---------------------------------------------------------------- where the needles are

@pytest.mark.parametrize("task", ["niah_single_3", "niah_multivalue", "niah_multiquery",
                                  "niah_multikey_3"])
@pytest.mark.parametrize("tokenizer", [Bytes(), Pairs()], ids=["bytes", "pairs"])
def test_needles_are_whole_sentences(task, tokenizer):
    """A needle's key left out, the sentence before it, another answer's needle."""
    e, = make(1, task, tokenizer, 1400)
    for answer, (_, end), (start, stop) in zip(e.answers, e.spans, needles_of(e, tokenizer)):
        text = tokenizer.decode(e.ids[start:stop])
        assert stop == end and text.count("One of the special magic") == 1 and answer in text
        assert text.index("One of the") < 12  # a token may begin before it


def test_an_answer_that_is_worded_otherwise_is_a_needle_too():
    """A file of somebody's own; a sentence of ours before it, which is of something else."""
    assert needles_of(short_example("The code is 77, they say. What is it?"), Bytes()) == [(12, 14)]
    before = "One of the special magic numbers for it is: 5. "
    own = short_example(before + "The code is: 77. What is it?")
    assert needles_of(own, Bytes()) == [(60, 62)]


# ---------------------------------------------------------------- the oracle

def asked(model, examples, method, watch=None, n_new=20):
    """Some rows' cache after prefill and decoding under the method; watch as in model.decode."""
    window = sparse.window_of(method)
    prefill_by = phases(method).prefill_by
    seen = []
    note = lambda layer, blocks, real: seen.append(blocks)
    cache, logits, _ = eval_niah.prefill(model, examples, prefill_by, n_new, window, watch=note)
    with cache.turn(method) as own:
        model.decode(logits, own, n_new, method, watch=watch)
    return own, seen


def of_needles(example, size):
    """The blocks of its needles."""
    return {i // size for start, end in needles_of(example, Bytes()) for i in range(start, end)}


def test_quest_always_reads_the_needle():
    """Another row's needle, blocks off by one, a budget that grows, forced blocks that are lost."""
    model, examples = a_model(), make()
    method, steps = oracle(QUEST, Needles(examples, Bytes())), []

    def watch(cache):
        used = cache.used.tolist()
        steps.append(0)
        for layer in cache.selected:
            for row, heads in enumerate(layer.tolist()):
                wanted = of_needles(examples[row], 16) | {0, (used[row] - 1) // 16}
                for head in heads:
                    read = {j // 16 for j in head if j >= 0}
                    # of 4 blocks two are forced; a needle of 70 bytes takes 5 or 6
                    assert len(read) == 4 and read <= wanted
    asked(model, examples, method, watch)
    assert len(steps) == 19
    big = oracle(Quest(256, 16), Needles(examples, Bytes()))

    def all_of_it(cache):
        for layer in cache.selected:
            for row, heads in enumerate(layer.tolist()):
                for head in heads:
                    read = {j // 16 for j in head if j >= 0}
                    assert read > of_needles(examples[row], 16) and len(read) == 16
    asked(model, examples, big, all_of_it)


def test_moba_reads_the_needle_from_every_query_behind_it():
    """A query that reads ahead, one that misses the needle, a budget that grows."""
    model, examples = a_model(), make()
    method = oracle(MoBA(160, 16), Needles(examples, Bytes()))
    _, layers = asked(model, examples, method)
    assert len(layers) == model.config.n_layer
    for chosen in layers:  # (B, KV, T, S)
        for row, e in enumerate(examples):
            needle = of_needles(e, 16)
            for t in range(len(e.ids)):
                for head in chosen[row, :, t].tolist():
                    read = {n for n in head if n >= 0}
                    must = {0, t // 16} | {n for n in needle if n <= t // 16}
                    assert must <= read and max(read) <= t // 16
                    assert len(read) == min(10, t // 16 + 1)


def test_snapkv_keeps_the_needle():
    """Entries that the pool blurs, another row's needle, a window that is lost, a larger budget."""
    model, examples = a_model(), make()
    own, _ = asked(model, examples, oracle(SNAPKV, Needles(examples, Bytes())))
    plain, _ = asked(model, examples, SNAPKV)
    for kept, others in zip(own.positions, plain.positions):
        for row, e in enumerate(examples):
            T = len(e.ids)
            must = set(range(T - 16, T)).union(*(range(*span) for span in
                                                 needles_of(e, Bytes())))
            for head in range(2):
                found = set(kept[row, :200, head].tolist())
                assert must <= found and len(found) == 200
        assert kept[:, :200].tolist() != others[:, :200].tolist()


@pytest.mark.parametrize("method", [QUEST, MOBA, SNAPKV], ids=lambda m: type(m).__name__)
def test_the_rest_of_the_budget_is_the_methods_own_choice(method, monkeypatch):
    """A score that is lost where there is no needle: what is left would be drawn by position."""
    model, examples = a_model(), make()
    monkeypatch.setattr("experiments.oracle.needles_of", lambda *_: [])
    both = [oracle(method, Needles(examples, Bytes())), method]
    told = ways.evaluate(model, Bytes(), examples, both)
    blind, plain = told.values()
    assert blind.texts == plain.texts and blind.read == plain.read


def test_needles_beyond_the_budget_are_left_out_in_order():
    """The last needle instead of the first; a count that is not what is read."""
    model, examples = a_model(), make(2, "niah_multivalue", context_len=1100)
    window, n = 16, 0
    for budget in 100, 160, 300, 400:
        method = SnapKV(budget, window, 5)
        own, _ = asked(model, examples, oracle(method, Needles(examples, Bytes())))
        lost = 0
        for row, e in enumerate(examples):
            order = [i for span in needles_of(e, Bytes()) for i in range(*span)]
            order = [i for i in order if i < len(e.ids) - window]
            kept = set(own.positions[0][row, :, 0].tolist()) | {*range(len(e.ids))[-window:]}
            assert kept.issuperset(order[:budget - window])
            lost += sum(not kept.issuperset(range(*span)) for span in needles_of(e, Bytes()))
        assert left_out(method, Needles(examples, Bytes())) == lost
        n += lost
    assert 8 < n < 32, "always, or never, too small: this counts nothing"


@pytest.mark.parametrize("budget, lost", [(48, 3), (128, 0), (96, None)])
def test_left_out_is_what_the_steps_do_not_read(budget, lost):
    """Room for a block that is forced, or none for one that is both forced and a needle's."""
    model, examples, method = a_model(), make(), Quest(budget, 16)
    missed, counted = set(), left_out(method, Needles(examples, Bytes()))

    def watch(cache):
        for row, e in enumerate(examples):
            read = {j // 16 for j in cache.selected[0][row, 0].tolist() if j >= 0}
            if not of_needles(e, 16) <= read:
                missed.add(row)
    asked(model, examples, oracle(method, Needles(examples, Bytes())), watch)
    assert len(missed) == counted and lost in (None, counted)


def test_an_oracle_is_asked_in_any_batch_and_order():
    """Needles that follow the batch's order: evaluate sorts by length, and fills up."""
    model, examples = a_model(memory=True), make(5)
    methods = [oracle(m, Needles(examples, Bytes())) for m in (QUEST, MOBA, SNAPKV)]
    whole = ways.evaluate(model, Bytes(), examples, methods, batch=2)
    for e, i in zip(examples[::-1], range(4, -1, -1)):
        alone = ways.evaluate(model, Bytes(), [e], methods, batch=1)
        for method in methods:
            assert alone[method].texts == [whole[method].texts[i]]


def test_all_that_tells_why_is_asked_at_once_as_each_alone(monkeypatch):
    """A cache, or on a GPU a graph, with another prompt's needles or another method's draw."""
    monkeypatch.setattr(backend, "choice", "auto" if DEVICE == "cuda" else "torch")
    model, examples = a_model(memory=True, width=64), make(5)
    methods = [Dense(), *(m for own in (QUEST, MOBA, SNAPKV) for m in (
        own, oracle(own, Needles(examples, Bytes())), randomized(own, 1))), FROZEN]
    at_once = ways.evaluate(model, Bytes(), examples, methods, batch=2)
    for method in methods:
        alone = ways.evaluate(model, Bytes(), examples, [method], batch=2)[method]
        assert at_once[method].texts == alone.texts, sparse.name(method)
    assert len({tuple(at_once[method].texts) for method in methods}) > 5


def test_an_oracle_shares_the_dense_prefill_and_tells_its_budget():
    """An evaluation that prefills anew for each, or counts what is read against no budget."""
    of = {m: phases(oracle(m, Needles(make(1), Bytes()))) for m in (QUEST, MOBA, SNAPKV)}
    assert of[QUEST].prefill_by == of[SNAPKV].prefill_by == Dense()
    assert of[QUEST].decode_by.budget == 64 and of[MOBA].prefill_by.block_size == 16
    assert sparse.window_of(oracle(SnapKV(200, 80), Needles(make(1), Bytes()))) == 80
    assert not hasattr(of[SNAPKV].decode_by, "budget") and not hasattr(of[QUEST].compress_by,
                                                                       "budget")


@pytest.mark.parametrize("method", [Quest(16, 4), MoBA(16, 4), SnapKV(16, 4)],
                         ids=lambda method: type(method).__name__)
def test_an_oracle_is_the_same_in_triton(method, both):
    """A score that the kernels go around."""
    model = a_model(width=64, n_layer=1)
    examples = [short_example(f"{some} it is: 77. So what is it?") for some in ("Here", "Say that")]
    told = oracle(method, Needles(examples, Bytes()))
    (plain, plainly), (own, ours) = both(lambda: asked(model, examples, told, n_new=3))
    sets = lambda x: None if x is None else x.sort(-1).values.tolist()
    assert [*map(sets, plainly)] == [*map(sets, ours)]
    assert [*map(sets, plain.selected)] == [*map(sets, own.selected)]
    assert [*map(sets, plain.positions)] == [*map(sets, own.positions)]


def test_what_an_oracle_cannot_do_is_said():
    """A prompt that nobody told it of, read without a needle as if there were none."""
    model, examples = a_model(), make()
    for method in QUEST, MOBA, SNAPKV:
        told = oracle(method, Needles(examples[:1], Bytes()))
        refused(lambda: asked(model, examples[1:], told), "oracle")
    refused(lambda: oracle(Dense(), Needles(examples, Bytes())), "dense", "quest")
    refused(lambda: oracle(compose(QUEST, SNAPKV), Needles(examples, Bytes())), "moba")
    refused(lambda: oracle(randomized(QUEST, 1), Needles(examples, Bytes())), "chance")
    assert math.isinf(oracle(QUEST, Needles(examples, Bytes())).decode_by.needles.ranks[0, 0])
