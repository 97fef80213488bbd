"""
cache.py and engine.py: what the plain path gives, in less time and space; rows, settings and turns
that know nothing of each other; and a failure that leaves nothing behind.

test_backend.py asks the same of the kernels, method by method.
"""
import itertools
import math
from contextlib import contextmanager, nullcontext

import pytest
import torch
from hypothesis import example, given, strategies as st
from torch import nn

import engine
from conftest import (DEVICE, FORMS, assert_close, draw_tokens, in_pieces, refused, times, tiny)
from drawn import (ROOM, configs, decisive, dtypes, exact, junk, law, methods, seeds, talks, told)
from sparse import (Dense, Dilated, MoBA, Quest, SnapKV, attend_to_slots, compose, drops, name,
                    phases, window_of)
from test_sparse import cells, listed, reads
from triton_ops import backend

GQA, HEADS_OF_16 = FORMS["gqa memory"], dict(width=64, n_head=4)
LENGTHS = [45, 31, 7, 40, 1]
ALL = [Dense(), Quest(16, 8), MoBA(24, 8), SnapKV(20, 6),
       compose(MoBA(24, 8), SnapKV(20, 6), Quest(16, 8))]
each_method = pytest.mark.parametrize("method", ALL, ids=name)
gpu = pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
one_for_all = st.sampled_from([1, 20, 10**6])  # engine.tokens_together


def same(a, b):
    """Equal lists of tensors and anything else."""
    pairs = list(zip(a, b, strict=True))
    return all(torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in pairs)


def state_of(cache):
    """All that a cache holds of its tokens. What lies behind a row's last entry is none of it."""
    held = [None if x is None else x[torch.arange(x.shape[1]) < cache.used[:, None]]
            for x in (*cache.k, *cache.v, *cache.positions)]
    rest = [None if x is None else x.clone() for x in (
        cache.lengths, cache.used, cache.token_hash, *cache.state, *cache.recent_q)]
    return [*held, *rest, cache.filled, cache.decoding, cache.slots, cache.kept_by, cache.spoiled]


def assert_same_memory(states, expected):
    for i, (state, ref) in enumerate(zip(states, expected)):
        if ref is not None:
            assert_close(state, ref, what=f"memory state of layer {i}")


def next_tokens(rows, fed, n):
    """(B, n) of rows (B, T), each from its own place on."""
    return torch.stack([row[begin:begin + n] for row, begin in zip(rows, fed)])


# ---------------------------------------------------------------- laws of one batch

COMBINED = compose(MoBA(6, 2), SnapKV(7, 3), Quest(6, 2))


@law(60)
@given(configs(), methods, talks(), dtypes, seeds)
@example(dict(n_kv_head=2, seed=0), COMBINED, [[20, 5], [0, 7], None, None], torch.float32, 0)
def test_no_query_reads_more_than_its_budget(config, method, turns, dtype, seed):
    """
    Forced blocks, the window and the query's own entry on top of it; an entry read twice, or of the
    future; slots reported as positions; a prompt cut between chunks; a method off in a phase.
    """
    model, B = tiny(**config).to(dtype), len(turns[0])
    rows, seen, by = draw_tokens(B, ROOM, seed), [], phases(method)
    KV, n_layer = model.config.n_kv_head, model.config.n_layer
    cache, fed = model.new_cache(B, ROOM, window_of(method)), torch.zeros(B, dtype=torch.long)
    held = fed  # entries of each row
    for turn in turns:
        before, new = held, torch.ones_like(fed) if turn is None else torch.tensor(turn)
        tokens = next_tokens(rows, fed, int(new.max()))
        dropping = turn is None and drops(method) and not cache.decoding
        if turn is None:
            model.step(tokens[:, 0], cache, method)
        else:
            model.prefill(tokens, new, cache, method, watch=lambda i, selected, real:
                          seen.append((before, turn, selected, real)))
        if dropping:
            assert_kept(cache, by.compress_by, fed)
            held = fed.clamp_max(by.compress_by.budget)
        fed, held = fed + new, held + new
        assert torch.equal(cache.lengths, fed) and torch.equal(cache.used, held)
        if turn is None:
            assert_read(cache, by.decode_by, KV)

    assert len(seen) == n_layer * sum(turn is not None for turn in turns)
    for before, turn, selected, real in seen:
        assert (selected is None) == (not isinstance(by.prefill_by, MoBA))
        for b, n in enumerate(turn) if selected is not None else ():
            if real is not None:
                assert real[b].tolist() == [t < n for t in range(max(turn))]
            assert_blocks(selected[b, :, :n], before[b] + torch.arange(n), by.prefill_by)


def assert_kept(cache, method, prompt):
    """At the first step: the window and others of the prompt, in order, and the new token."""
    for i, b, h in cells(len(cache.k), len(prompt), cache.config.n_kv_head):
        n = prompt[b].item()
        held = cache.positions[i][b, :cache.used[b], h].tolist()
        assert held == sorted(set(held)) and held[-1] == n
        assert set(range(max(0, n - method.window), n)) <= set(held)
        room = min(method.budget, prompt.max()) + ROOM - prompt.max()
        assert len(cache.k[i][b]) == room, "room that was not given back"


def assert_read(cache, method, KV):
    """What the last step of a method reports: entries of the cache, within its budget."""
    for i, selected in enumerate(cache.selected):
        assert (selected is None) == (not isinstance(method, (Quest, Dilated)))
        for b, h in cells(cache.B, KV) if selected is not None else ():
            now, read = cache.lengths[b].item() - 1, listed(selected[b, h])
            held = list(range(now + 1))
            if cache.positions[i] is not None:
                held = cache.positions[i][b, :cache.used[b], h].tolist()
            assert 0 < len(read) == len(set(read)) and set(read) <= set(held)
            if isinstance(method, Quest):
                assert len(read) <= method.budget and (not method.keep_current or now in read)
            else:
                assert read == [j for j in held if reads(method, now, j)]


def assert_blocks(selected, slot, method):
    """Blocks (KV, n, S) of the queries in these slots: each its own, and others as budgeted."""
    S, current = method.budget // method.block_size, slot // method.block_size
    blocks = selected.sort(dim=-1).values
    assert blocks.shape[-1] <= S
    assert torch.equal(blocks[..., -1], current.expand(len(blocks), -1)), "not its own, or later"
    assert ((blocks[..., 1:] > blocks[..., :-1]) | (blocks[..., :-1] < 0)).all(), "one twice"
    assert (blocks >= 0).sum(-1).eq((current + 1).clamp_max(S)).all(), "budget left"


@law(80)
@given(configs(), methods, talks(), exact, junk.filter(math.isfinite), one_for_all, seeds)
def test_a_row_among_others_gives_what_it_gives_alone(config, method, turns, dtype, behind,
                                                      together, seed):
    """Padding, or junk behind a row's entries, in a block mean, bounds, a window or the dice."""
    model = tiny(**config).to(dtype)
    rows = draw_tokens(len(turns[0]), ROOM, seed)
    with decisive():
        logits, cache = told(model, rows, turns, method, padding=seed, behind=behind,
                             together=together)
    for b in range(len(rows)):
        mine = [t for t, turn in enumerate(turns) if turn is None or turn[b]]
        script = [turns[t] and [turns[t][b]] for t in mine]
        alone, single = told(model, rows[b:b + 1], script, method)
        assert_close(logits[mine, b], alone[:, 0], what=f"logits of row {b}")
        for x, ref in zip((cache.lengths, cache.used, cache.token_hash),
                          (single.lengths, single.used, single.token_hash)):
            assert x[b] == ref[0]
        assert_same_memory([s if s is None else s[:, b:b + 1] for s in cache.state], single.state)


def cut(turns, cuts):
    """Turns in pieces, each row's after `cuts` ninths of it. -> pieces, each turn's last of them"""
    pieces, ends = [], []
    for turn in turns:
        done, first = [0] * len(turn or ()), not pieces
        for part in (*sorted(cuts), 9) if turn is not None else ():
            upto = [max(n * part // 9, first) for n in turn]
            piece = [have - had for have, had in zip(upto, done)]
            if any(piece):
                pieces.append(piece)
            done = upto
        if turn is None:
            pieces.append(None)
        ends.append(len(pieces) - 1)
    return pieces, ends


@law(80)
@given(configs(), methods, talks(), exact, st.lists(st.integers(1, 8), max_size=4, unique=True),
       one_for_all, seeds)
def test_a_prompt_in_pieces_is_the_prompt(config, method, turns, dtype, cuts, together, seed):
    """A last piece of one token taken for a step, blocks counted from a piece's start."""
    model, rows = tiny(**config).to(dtype), draw_tokens(len(turns[0]), ROOM, seed)
    pieces, ends = cut(turns, cuts)
    with decisive():
        logits, cache = told(model, rows, turns, method)
    parts, other = told(model, rows, pieces, method, padding=seed % 5, together=together)
    assert_close(parts[ends], logits)
    assert torch.equal(other.used, cache.used)
    if turns[1:2] in ([], [None]):
        parts, _ = told(model, rows, turns, method, whole=True, together=together)
        assert_close(parts, logits, what="compressed at once: logits")


# ---------------------------------------------------------------- laws of one cache, many settings

scripts = st.lists(
    st.tuples(st.just("feed"), st.lists(st.integers(1, 9), min_size=3, max_size=3))
    | st.tuples(st.sampled_from(["turn", "fork"]), methods, st.integers(0, 4))
    | st.tuples(st.just("clear"), st.none()), min_size=2, max_size=6)


@law(50)
@given(configs(), st.integers(1, 3), st.lists(st.integers(1, 15), min_size=3, max_size=3), scripts,
       exact, seeds)
@example(dict(n_kv_head=2, seed=0), 2, [15, 9, 5],
         [("turn", compose(SnapKV(12, 3), Quest(6, 2, random=1)), 0)], torch.float32, 0)
def test_one_cache_serves_as_fresh_ones(config, B, prompt, script, dtype, seed):
    """A setting, or its question, that leaks into the next one; a text that reads a cleared one."""
    model, W = tiny(**config).to(dtype), 8
    cache, turns, rows = model.new_cache(B, 90, W), [], draw_tokens(B, 90, seed)

    def feed(cache, turns):
        for turn in turns:
            tokens = next_tokens(rows, cache.lengths.tolist(), max(turn))
            model.prefill(tokens, torch.tensor(turn[:B]), cache)

    def answer(cache, method, asked):
        out = [model.prefill(rows[:, 80:80 + n], None, cache, method) for n in [asked] if n]
        return torch.stack([*out, *(model.step(rows[:, 85 + t], cache, method) for t in range(3))])

    for what, value, *asked in [("feed", prompt), *script]:
        if what == "clear":
            cache.clear()
            turns, rows = [], rows.flip(1)
        if what in ("clear", "feed"):
            turns.append(value or prompt)
            feed(cache, turns[-1:])
            continue
        before, fresh = state_of(cache), model.new_cache(B, 90, W)
        with decisive():
            feed(fresh, turns)
            if what == "turn":  # is of what was there before the question
                fresh.compress(value)
            expected = answer(fresh, value, *asked)
        with cache.turn(value) if what == "turn" else nullcontext(cache.fork()) as own:
            assert (own is cache) == (what == "turn" and not drops(value))
            assert what == "turn" or same(state_of(own), before)
            given = answer(own, value, *asked)
        assert_close(given, expected, what=f"logits in a {what} of {name(value)}")
        assert same(state_of(cache), before), f"a {what} of {name(value)} left a trace"


# ---------------------------------------------------------------- generate

@law(40)
@given(configs(), methods, st.lists(st.integers(1, 30), min_size=1, max_size=3), st.integers(1, 8),
       st.integers(0, 99), seeds)
def test_generate_takes_the_likeliest_token_each_time(config, method, lengths, n_new, pick, seed):
    """A cache that is one token off, text after the end, or an end too soon."""
    model, B, n = tiny(**config), len(lengths), torch.tensor(lengths)
    tokens = draw_tokens(B, max(lengths), seed)
    with decisive():
        new = model.generate(tokens, n_new, n, sparse=method)
    assert new.shape == (B, n_new)
    rows = torch.stack([torch.cat([tokens[b, :n[b]], new[b], tokens.new_zeros(ROOM)])[:ROOM]
                        for b in range(B)])
    logits, _ = told(model, rows, [lengths, *[None] * (n_new - 1)], method)
    logits = logits.transpose(0, 1)  # (B, n_new, V)
    assert_close(logits.gather(2, new[..., None]).squeeze(2), logits.amax(2), what="the highest")

    eos = new.flatten()[pick % new.numel()].item()
    ended, is_end = model.generate(tokens, n_new, n, sparse=method, eos_id=eos), new == eos
    after = is_end.cumsum(1) - is_end.long() > 0
    assert torch.equal(ended, new.masked_fill(after, eos)[:, :ended.shape[1]])
    last = int(is_end.long().argmax(1).max()) + 1
    assert ended.shape[1] == (last if is_end.any(1).all() else n_new)


def test_sampling_follows_its_settings():
    """A seed that does not fix the draw, a temperature or top_k that is ignored."""
    model, tokens = tiny(), draw_tokens(2, 20)
    draw = lambda **settings: model.generate(tokens, 20, **settings).tolist()
    one = draw(temperature=1, seed=1)
    assert draw(temperature=1, seed=1) == one != draw(temperature=1, seed=2)
    assert draw(temperature=1) != draw(temperature=1), "without a seed each is new"
    assert draw(temperature=0.5, seed=1) != draw(temperature=2, seed=1)
    small = [dict(temperature=t) for t in (1e-3, 1e-40, 1e-300, 5e-324)]  # fp32 rounds to 0 too
    for nearly_greedy in dict(temperature=1, top_k=1), *small:
        assert draw(**nearly_greedy, seed=1) == draw()


def test_samples_have_the_softmax_frequencies_of_the_top_k():
    """A temperature that multiplies, or a top_k that keeps one too many."""
    logits, source = torch.tensor([2.0, -1.0, 1.0, 0.0, 1.5]), torch.Generator().manual_seed(0)
    drawn = engine.draw(logits.expand(20000, 5), temperature=2, top_k=3, source=source)
    frequencies = torch.bincount(drawn, minlength=5) / 20000
    expected = torch.softmax(torch.tensor([1.0, -math.inf, 0.5, -math.inf, 0.75]), 0)
    assert_close(frequencies, expected, atol=0.015)
    assert frequencies[1] == frequencies[3] == 0
    ties = torch.tensor([[1.0, 1, 1, 0]]).expand(100, 4)  # at the k-th logit all may be drawn,
    for top_k, most in (1, 2), (9, 3):                    # and k may be more than there are
        assert engine.draw(ties, 1, top_k, source).max() == most


KINDS = [COMBINED, Dense(), Quest(6, 2), Quest(6, 2, random=3), MoBA(6, 2), SnapKV(7, 3),
         SnapKV(7, 3, random=2), Dilated(4, 3, 1)]
SOME = [(COMBINED, "gqa memory", 3), (KINDS[3], "olmo2", 1), (KINDS[-1], "ratplus", 3)]
EVERY = itertools.product(KINDS, FORMS, (1, 3))


@pytest.mark.parametrize("method, form, B", EVERY if DEVICE == "cuda" else times(SOME, EVERY))
def test_generate_gives_the_tokens_of_the_plain_path(method, form, B, both, monkeypatch):
    """A fused step, a graph, or a part of a batch, that is not what it replaces."""
    pytest.importorskip("triton")
    # the interpreter takes a second a step
    n_new, n_layer = (40, 2) if DEVICE == "cuda" else times((3, 1), (4, 2))
    model = tiny(**HEADS_OF_16 | FORMS[form] | dict(n_layer=n_layer)).to(DEVICE)
    tokens = draw_tokens(B, 9, seed=B).to(DEVICE)
    lengths = torch.tensor([9, 6, 1], device=DEVICE) if B > 1 else None
    monkeypatch.setattr(engine, "tokens_together", lambda *_: 18)  # two rows at a time
    assert torch.equal(*both(lambda: model.generate(tokens, n_new, lengths, sparse=method)))


# ---------------------------------------------------------------- what the cache holds

class ReadOnly(Dense):
    """Layer by layer reads the given positions of 40 and what follows: SnapKV by a mask."""

    def __init__(self, kept):
        self.kept = itertools.cycle(kept)

    def decode(self, q, cache):
        new = torch.arange(40, cache.k.shape[1]).expand(2, 2, -1)
        return attend_to_slots(q, cache.k, cache.v, torch.cat([next(self.kept), new], dim=2)), None


def test_snapkv_decodes_as_if_the_dropped_entries_were_masked():
    """Positions lost with dropped entries, a gap left open, a memory state of another token."""
    model, tokens, steps = tiny(**GQA), draw_tokens(2, 50), range(40, 50)
    logits, cache = in_pieces(model, tokens, steps, SnapKV(14, 6, 3), room=3)
    assert cache.used.tolist() == [24, 24] and cache.lengths.tolist() == [50, 50]
    positions = [x[:, :24].long().transpose(1, 2) for x in cache.positions]  # (B, KV, 24)
    masked, full = in_pieces(model, tokens, steps, ReadOnly([x[..., :14] for x in positions]))
    assert_close(logits, masked)
    for i, held in enumerate(positions):
        assert torch.equal(held[..., 14:], torch.tensor(steps).expand(2, 2, 10))
        index = held.transpose(1, 2)[..., None].expand(-1, -1, -1, 8)
        # keys of the prompt bit by bit; later ones follow from what was read
        assert torch.equal(cache.k[i][:, :14], full.k[i].gather(1, index)[:, :14])
        assert_close(cache.v[i][:, :24], full.v[i].gather(1, index))
    assert_same_memory(cache.state, full.state)


def test_random_methods_draw_for_each_layer_head_and_step():
    """H2 with one draw for all layers, or for the whole text. Compression is outside of layers."""
    model, tokens, draws = tiny(n_layer=3), draw_tokens(1, 48), []
    cache = model.new_cache(1, 48)
    model.prefill(tokens[:, :40], cache=cache)
    for t in range(40, 44):  # inside one block of 4: what may be drawn is the same,
        model(tokens[:, 40:41], cache=cache, sparse=Quest(24, 4, random=1))  # and so is the token
        draws += [frozenset(listed(x[0, h])) - {40, 41, 42, 43}
                  for x in cache.selected for h in range(4)]
    # 4 of 9 blocks, drawn 48 times: shared by steps there would be 12 at most, by layers 16
    assert len(set(draws)) > 25, f"{len(set(draws))} different ones of {len(draws)} draws"
    _, cache = in_pieces(model, tokens, (47,), SnapKV(14, 6, 3, random=1))
    assert len({tuple(x[0, :14, h].tolist()) for x in cache.positions for h in range(4)}) == 12


def entries(cache):
    return [len(x[0]) for x in (*cache.k, *cache.v) if x is not None]


def test_snapkv_never_holds_a_whole_prompt(monkeypatch):
    """Storage that is small in the end only."""
    model, asked = tiny(), []
    cache = model.new_cache(2, 60)
    room = cache.room
    monkeypatch.setattr(cache, "room", lambda i, slots: asked.append(slots) or room(i, slots))
    model.prefill(draw_tokens(2, 50), None, cache, SnapKV(20, 6), whole=True)
    assert asked == [20 + 10] * 2 and entries(cache) == [30] * 4


def test_what_is_compressed_serves_again():
    """New tensors, so a new graph, for a batch or a seed; a prompt lost to its first setting."""
    model, places = tiny(**GQA), set()
    cache = model.new_cache(2, 60)
    for seed in 1, 2:
        model.prefill(draw_tokens(2, 40, seed), None, cache)
        for random in None, 0, 1:
            with cache.turn(SnapKV(20, 6, random=random)) as own:
                places.add(own.k[0].data_ptr())
                assert entries(cache) == [60] * 4 and entries(own) == [40] * 4
                assert cache.filled == 40 and own.filled == 20
        cache.clear()
    assert len(places) == len(cache.compressed_by) == 1


@pytest.mark.parametrize("whole", [True, False])
@each_method
def test_padding_takes_no_room(method, whole):
    """A cache that is full because of columns in which no row has a token."""
    model, tokens, lengths = tiny(**GQA), draw_tokens(2, 45), torch.tensor([30, 20])
    cache = model.new_cache(2, 40)
    logits = model.prefill(tokens, lengths, cache, method, whole=whole)
    new = model.decode(logits, cache, 11, method)
    assert torch.equal(new, model.generate(tokens, 11, lengths, sparse=method))


def test_a_second_chunk_whose_padding_reaches_past_all_entries(both, monkeypatch):
    """A part of fewer entries than the chunk has columns; kernels want a slot for each query."""
    pytest.importorskip("triton")
    model, method = tiny(**HEADS_OF_16 | GQA, n_layer=1).to(DEVICE), MoBA(24, 8)
    tokens, lengths = draw_tokens(2, 23).to(DEVICE), lambda *n: torch.tensor(n, device=DEVICE)
    monkeypatch.setattr(engine, "tokens_together", lambda *_: 20)  # a row at a time

    def second():
        cache = model.new_cache(2, 60)
        model.prefill(tokens[:, :3], lengths(3, 2), cache, method)
        return model.prefill(tokens[:, 3:], lengths(5, 20), cache, method)
    assert_close(*both(second), 1e-4)


@torch.no_grad()
def test_ragged_chunks_run_under_autocast_and_the_shared_pattern():
    """Padding that stands past the last slot, and k in another dtype than the cache's."""
    model, tokens = tiny(**GQA), draw_tokens(2, 8)
    for method in None, Dilated(dilation=4, local=0, initial=1):
        cache = model.new_cache(2, 7)
        with torch.autocast("cpu", torch.bfloat16):
            logits = [model(tokens, torch.tensor(n), cache, method) for n in ([6, 4], [1, 2])]
        assert torch.stack(logits).isfinite().all()


# ---------------------------------------------------------------- turns of a batch

@pytest.mark.parametrize("who", ["torch", *(["triton"] if DEVICE == "cuda" else [])])
@each_method
def test_the_next_turn_of_a_row_is_the_one_it_would_have_alone(method, who, monkeypatch):
    """A row that has ended, and is fed its end token again and again while others go on."""
    monkeypatch.setattr(backend, "choice", who)
    model = tiny(**HEADS_OF_16 | GQA).to(DEVICE)
    asked = [[row[:n] for row, n in zip(draw_tokens(3, 25, seed).tolist(), sizes)]
             for seed, sizes in ((3, (9, 25, 14)), (4, (4, 7, 3)))]
    first = torch.tensor(asked[0][:1], device=DEVICE)
    end = model.generate(first, 12)[0, 2].item()  # what the first row writes third
    # entries are dropped once, before the first answer: there is no second prompt to drop of
    second = Quest(32, 8) if drops(method) else method

    def answers(rows):
        """Two of each row. The second is to its question after the first one's last token."""
        cache, told, fed = model.new_cache(len(rows), 100), [[[]] for _ in rows], [0] * len(rows)
        for questions, by in zip(asked, (Quest(24, 8), second)):
            prompts = [torch.tensor(own[-1][-1:] + questions[b]) for b, own in zip(rows, told)]
            lengths = torch.tensor([len(prompt) for prompt in prompts], device=DEVICE)
            padded = nn.utils.rnn.pad_sequence(prompts, batch_first=True).to(DEVICE)
            new = model.decode(model.prefill(padded, lengths, cache), cache, 12, by, eos_id=end)
            for own, row in zip(told, new.tolist()):
                own.append(row[:[*row, end].index(end) + 1])
            fed = [n + len(p) + len(own[-1]) - 1 for n, p, own in zip(fed, prompts, told)]
            assert cache.lengths.tolist() == fed
        return told

    together = answers([0, 1, 2])
    assert len({len(own[1]) for own in together}) > 1, "all end at once: nothing is tested"
    assert [answers([b])[0] for b in range(3)] == together


def test_a_row_that_ends_at_once_is_compressed_with_the_others():
    """A row that has ended before the others' first step drops entries, its own too."""
    model, tokens, lengths = tiny(**GQA), draw_tokens(2, 30), torch.tensor([30, 12])
    method, question = SnapKV(10, 6), draw_tokens(2, 4, seed=5)
    both, alone = model.new_cache(2, 60), model.new_cache(1, 60)
    logits = model.prefill(tokens, lengths, both, method)
    other, end = logits.argmax(1).tolist()
    assert end != other
    model.decode(logits, both, 6, method, eos_id=end)
    logits = model.prefill(tokens[1:, :12], None, alone, method)
    model.decode(logits, alone, 6, method, eos_id=end)  # which takes no step
    assert both.used[1] == alone.used[0] == 10 and both.filled == both.used.max()
    with torch.no_grad():
        assert_close(model(question, cache=both)[1], model(question[1:], cache=alone)[0])


# ---------------------------------------------------------------- wrong uses

TOKENS = draw_tokens(2, 30)


class Talk:
    """A model and its cache, fed 30 tokens of 2 rows, and some steps."""

    def __init__(self, method=None, steps=0, room=60, window=64, whole=False, empty=False):
        self.model = tiny(**GQA)
        self.cache = self.model.new_cache(2, room, window)
        self.logits = None if empty else self.prefill(method=method, whole=whole)
        for _ in range(steps):
            self.step()

    def prefill(self, tokens=TOKENS, lengths=None, method=None, **settings):
        lengths = None if lengths is None else torch.tensor(lengths)
        return self.model.prefill(tokens, lengths, self.cache, method, **settings)

    def step(self, method=None):
        return self.model.step(TOKENS[:, 0], self.cache, method)

    def decode(self, n, method=None, **settings):
        return self.model.decode(self.logits, self.cache, n, method, **settings)

    def rewinding(self, method):
        with self.cache.rewinding():
            self.decode(3, method)


SNAPKV, THREE = SnapKV(20, 6), draw_tokens(3, 30)
EMPTY, FULL, DROPPED = dict(empty=True), dict(room=30), dict(method=SNAPKV, whole=True)
LATE = "snapkv", "first decoding step"
WRONG = [  # what is said, of which talk, and what is done
    (["whole"], {}, lambda t: t.prefill(whole=True)),
    ([3, 2, "new_cache"], {}, lambda t: t.prefill(THREE)),
    ([3, 2, "new_cache"], {}, lambda t: t.prefill(THREE, [30, 20, 10])),
    (["compressed"], {}, lambda t: t.rewinding(SNAPKV)),
    (["compressed"], {}, lambda t: t.rewinding(SnapKV(40, 6))),  # which keeps all
    (LATE, dict(steps=2), lambda t: t.step(SNAPKV)),
    (LATE, dict(steps=2), lambda t: t.cache.compressed(SNAPKV)),
    (["snapkv", "whole prompt", "none"], EMPTY, lambda t: t.cache.compressed(SNAPKV)),
    (["snapkv", "whole prompt", "dropped"], DROPPED, lambda t: t.cache.compressed(SNAPKV)),
    (["budget=10", "budget=20"], DROPPED, lambda t: t.decode(3, SnapKV(10, 6))),
    (["dilated", "snapkv", "every position"], DROPPED, lambda t: t.prefill(method=Dilated())),
    (["window=8", "4", "new_cache"], dict(window=4), lambda t: t.decode(3, SnapKV(12, 8))),
    (["need a cache"], {}, lambda t: t.model.prefill(TOKENS, whole=True)),
    (["need a cache"], {}, lambda t: t.model.prefill(TOKENS, watch=print)),
    (["no tokens"], EMPTY, lambda t: t.prefill(TOKENS[:, :0])),
    (["no tokens"], EMPTY, lambda t: t.model(TOKENS[:, :0], None, t.cache)),
    (["no tokens"], {}, lambda t: t.model.loss(TOKENS[:, :1], torch.ones(2, 1))),
    *(([f"lengths={n}"], EMPTY, lambda t, n=n: t.model(TOKENS, torch.tensor(n), t.cache))
      for n in ([31, 8], [-1, 8], [3])),
    *((["30", "31", "larger max_len"], FULL, use) for use in (
        lambda t: t.step(), lambda t: t.prefill(TOKENS[:, :1]), lambda t: t.decode(2),
        lambda t: t.model(TOKENS[:, :1], torch.tensor([1, 1]), t.cache))),
    *((["34", "35", "max_len"], dict(room=34), lambda t, by=by: t.decode(6, by))
      for by in (None, SNAPKV)),
    *((["30", "35", "larger max_len"], FULL | EMPTY,
       lambda t, n=n: t.prefill(draw_tokens(2, 35), n)) for n in (None, [10, 35])),
    *(([f"lengths={n}"], EMPTY, lambda t, n=n: t.prefill(lengths=n))
      for n in ([0, 8], [31, 8], [-1, 8], [0, 0], [3, 3, 3])),
    (["lengths=[0, 8]"], EMPTY, lambda t: t.model.prefill(TOKENS, torch.tensor([0, 8]))),
    *(([f"temperature={x}"], {}, lambda t, x=x: t.decode(2, temperature=x))
      for x in (-1, math.nan, math.inf)),
    (["top_k=0"], {}, lambda t: t.decode(2, top_k=0)),
    (["max_new_tokens=0"], {}, lambda t: t.decode(0)),
]


@pytest.mark.parametrize("words, of, use", WRONG, ids=range(len(WRONG)))
def test_a_wrong_use_is_refused_before_anything_happens(words, of, use, monkeypatch):
    """Entries dropped in the middle of an answer, tokens written over others, half a batch fed."""
    talk = Talk(**of)
    monkeypatch.setattr(engine, "tokens_together", lambda *_: 40)  # a row at a time
    before = state_of(talk.cache)
    refused(lambda: use(talk), *words)
    assert same(state_of(talk.cache), before)


def test_as_many_tokens_go_together_as_a_gpu_has_room_for():
    """A few rows of a narrow model at a time; as many of a wide one; widths of C alone."""
    assert engine.tokens_together(4096) == 32768 and engine.tokens_together(512) == 2**18
    assert engine.widest(tiny(width=32, n_head=4, n_kv_head=4, head_dim=16).config) == 64
    assert engine.widest(tiny(width=64, n_head=4, n_kv_head=4).config) == 64


# ---------------------------------------------------------------- what fails

class Stop(BaseException):
    """As ctrl-C: no Exception."""


@contextmanager
def failing(model, path, error=MemoryError, after=0):
    """Within, a function of the model's, or of a module in it, fails after so many calls."""
    owner, _, function = path.rpartition(".")
    owner, left = model.get_submodule(owner), iter(range(after))
    works = getattr(owner, function)

    def fail(*args):
        if next(left, None) is None:
            raise error("say")
        return works(*args)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(error):
        patch.setattr(owner, function, fail)
        yield


IN_LAYERS = [("layers.0.mlp.forward", MemoryError), ("layers.1.mlp.forward", Stop)]
BEHIND = [("norm.forward", MemoryError), ("head", MemoryError)]  # no memory for the largest tensor


@pytest.mark.parametrize("path, error", IN_LAYERS + BEHIND)
@pytest.mark.parametrize("together", [10**6, 100], ids=["at once", "in parts"])
@each_method
def test_a_prompt_that_fails_leaves_the_cache_as_it_was(method, together, path, error, monkeypatch):
    """Tokens that only some layers have seen, and a second try that stands behind them."""
    monkeypatch.setattr(engine, "tokens_together", lambda *_: together)
    model, tokens, lengths = tiny(**GQA), draw_tokens(5, 45), torch.tensor(LENGTHS)
    for start, whole in (0, True), (0, False), (20, False):
        caches = failed, _ = [model.new_cache(5, 60) for _ in "ab"]
        feed = lambda cache: model.prefill(
            tokens[:, start:], (lengths - start).clamp(min=0), cache, method, whole)
        for cache in caches if start else ():
            model.prefill(tokens[:, :start], lengths.clamp(max=start), cache, method)
        before = state_of(failed)
        for _ in "ab":  # twice, as the first may leave the cache off its guard
            with failing(model, path, error, after=together == 100):  # the second part
                feed(failed)
            assert same(state_of(failed), before)
        logits = [feed(cache) for cache in caches]
        assert torch.equal(*logits)
        assert torch.equal(*(model.decode(logits[0], cache, 6, method) for cache in caches))


@pytest.mark.parametrize("path, error", IN_LAYERS + BEHIND)
def test_a_step_that_fails_spoils_the_cache_until_it_is_cleared(path, error):
    """A memory that one layer has moved on and another has not, and answers from it."""
    talk, quest = Talk(), Quest(16, 8)
    cache = talk.cache
    with cache.turn(None):
        expected = talk.decode(6, quest)
    with failing(talk.model, path, error, after=1), cache.turn(quest):
        talk.decode(6, quest)
    with cache.turn(quest):  # what began as a turn is forgotten whole
        assert torch.equal(talk.decode(6, quest), expected)

    with failing(talk.model, path, error, after=1):
        talk.decode(6, quest)
    uses = [talk.step, talk.prefill, lambda: talk.prefill(TOKENS[:, :1]),
            lambda: talk.model.step(TOKENS[:, 0], cache.fork()),
            *(cache.turn(method).__enter__ for method in (quest, SNAPKV))]
    for use in uses:
        refused(use, "half-way", "clear it")
    cache.clear()
    talk.prefill()
    assert torch.equal(talk.decode(6, quest), expected)


# ---------------------------------------------------------------- on a GPU

@gpu
@each_method
def test_a_steady_loop_captures_nothing(method, monkeypatch):
    """A graph for each prompt, or for each step; a first step that could have been a replay."""
    captured, init = [], engine.Graph.__init__
    monkeypatch.setattr(engine.Graph, "__init__",
                        lambda self, *args: captured.append(1) or init(self, *args))
    ran, fused = [], engine.fused
    monkeypatch.setattr(engine, "fused", lambda model, tokens, cache: (
        ran.append(tokens.shape[1]) or fused(model, tokens, cache)))
    model = tiny(**HEADS_OF_16 | GQA).to(DEVICE)
    cache, lengths = model.new_cache(5, 80), torch.tensor(LENGTHS, device=DEVICE)
    for seed in range(4):
        logits = model.prefill(draw_tokens(5, 45, seed).to(DEVICE), lengths, cache)
        with cache.turn(method) as own:
            model.decode(logits, own, 12, method)
        cache.clear()
        assert len(captured) == 1 and ran.count(1) == 2  # a step as it is, one to be recorded


@gpu
def test_a_later_prompt_finds_what_has_changed():
    """A hook that the graph of an earlier prompt leaves out; weights that it does not read."""
    model, method, called = tiny(**HEADS_OF_16 | GQA).to(DEVICE), Quest(32, 8), []
    cache, tokens = model.new_cache(2, 120), draw_tokens(2, 80).to(DEVICE)

    def decoded():
        logits = model.prefill(tokens, None, cache)
        new = model.decode(logits, cache, 20, method)
        cache.clear()
        return new
    before = decoded()
    handle = model.layers[0].register_forward_hook(lambda *_: called.append(1))
    assert torch.equal(decoded(), before) and len(called) == 20
    handle.remove()
    assert torch.equal(decoded(), before) and len(called) == 20
    head = model.lm_head if model.lm_head is not None else model.embed_tokens
    head.weight = nn.Parameter(head.weight.detach().flip(0))
    assert torch.equal(decoded(), model.generate(tokens, 20, sparse=method))
    assert not torch.equal(decoded(), before)


@gpu
def test_a_method_of_your_own_sees_each_prompt():
    """A look at the prompt, in the first step, that a graph of an earlier one has left behind."""
    asked = []

    class Own(Dense):
        in_graph = True

        def decode(self, q, cache):
            asked.append(1)
            return super().decode(q, cache)
    model, tokens = tiny(**HEADS_OF_16 | GQA).to(DEVICE), draw_tokens(2, 40).to(DEVICE)
    cache = model.new_cache(2, 60)
    for steps in 2, 1, 1:  # the second of the first prompt is recorded
        model.decode(model.prefill(tokens, None, cache), cache, 6, Own())
        assert len(asked) == steps * model.config.n_layer
        asked.clear()
        cache.clear()


@gpu
def test_graphs_of_several_methods_share_a_cache():
    """A graph that replays into what another has moved, or tells what another one read."""
    model = tiny(**HEADS_OF_16 | GQA).to(DEVICE)
    cache = model.new_cache(2, 120)
    for seed in range(3):
        tokens = draw_tokens(2, 80, seed).to(DEVICE)
        logits = model.prefill(tokens, None, cache)
        for method in Dense(), Quest(32, 8), Quest(48, 16), Quest(32, 8):
            seen = []
            with cache.turn(method) as own:
                new = model.decode(logits, own, 20, method,
                                   watch=lambda cache: seen.append(list(cache.selected)))
            assert torch.equal(new, model.generate(tokens, 20, sparse=method))
            assert len(seen) == 19
            for x in itertools.chain(*seen):
                assert (x is None) == (method == Dense())
                assert x is None or 0 < (x >= 0).sum(-1).max() <= method.budget
        cache.clear()


@gpu
def test_a_full_cache_stops_a_graph():
    """A replay that writes past the cache's end."""
    model, tokens = tiny(**HEADS_OF_16).to(DEVICE), draw_tokens(1, 45).to(DEVICE)
    cache = model.new_cache(1, 45)
    model.prefill(tokens[:, :40], None, cache)
    for t in range(40, 45):
        model.step(tokens[:, t], cache)
    refused(lambda: model.step(tokens[:, 0], cache), "max_len")


@gpu
@torch.no_grad()
def test_methods_may_alternate_without_turns():
    """Block bounds that another method's graph did not keep up to date, taken for current."""
    model = tiny(**HEADS_OF_16 | GQA).to(DEVICE)
    dense, quest, other = Dense(), Quest(16, 8), Quest(12, 4)
    order = [dense] * 3 + [quest] * 3 + [dense] * 9 + [quest] * 3 + [other] * 3 + [quest] * 3
    tokens, new = (draw_tokens(1, n, seed=n).to(DEVICE) for n in (60, len(order)))
    eager, graphs = (model.new_cache(1, 120) for _ in "ab")
    for cache in eager, graphs:
        model.prefill(tokens, None, cache)
    for token, method in zip(new.split(1, dim=1), order):
        expected = model(token, cache=eager, sparse=method)[:, -1]
        assert_close(model.step(token[:, 0], graphs, method), expected, atol=1e-4)
