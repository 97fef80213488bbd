"""
cache.py and engine.py: what the plain path gives, in less time and space; rows, settings and turns
that know nothing of each other; and a failure that leaves nothing behind.

test_backend.py asks the same of the kernels, method by method.
"""
import math

import pytest
import torch
from hypothesis import example, given, strategies as st
from torch import nn

import engine
from conftest import (DEVICE, FORMS, assert_close, draw_tokens, error, in_pieces, one_line, times,
                      tiny)
from drawn import (ROOM, configs, decisive, dtypes, exact, junk, law, methods, seeds, talks, told)
from sparse import (Compose, Dense, Dilated, MoBA, Quest, SnapKV, attend_to_slots, compose, drops,
                    name, phases, window_of)
from test_sparse import cells, listed, reads
from triton_ops import backend

HEADS_OF_16 = dict(width=64, n_head=4)
LENGTHS = [45, 31, 7, 40, 1]
ALL = [Dense(), Quest(16, 8), MoBA(24, 8), SnapKV(20, 6),
       compose(MoBA(24, 8), SnapKV(20, 6), Quest(16, 8))]
each_method = pytest.mark.parametrize("method", ALL, ids=name)
gpu = pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
one_for_all = st.sampled_from([1, 20, 10**6])  # engine.TOGETHER


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


# ---------------------------------------------------------------- laws of one batch

COMBINED = compose(MoBA(6, 2), SnapKV(7, 3), Quest(6, 2))


@law(60)
@given(configs(), methods, talks(), dtypes, seeds)
@example(dict(n_kv_head=2, seed=0), COMBINED, [[20, 5], [0, 7], None, None], torch.float32, 0)
def test_no_query_reads_more_than_its_budget(config, method, turns, dtype, seed):
    """
    Forced blocks, the window and the query's own entry on top of it; an entry read twice, of the
    future, or of no token; slots reported as positions; a prompt cut between its chunks.
    """
    model, B = tiny(**config).to(dtype), len(turns[0])
    rows, seen, by = draw_tokens(B, ROOM, seed), [], phases(method)
    KV, n_layer = model.config.n_kv_head, model.config.n_layer
    cache, fed = model.new_cache(B, ROOM, window_of(method)), torch.zeros(B, dtype=torch.long)
    held = fed  # entries of each row
    for turn in turns:
        if turn is not None:
            new, before = torch.tensor(turn), held
            tokens = torch.stack([row[n:n + max(turn)] for row, n in zip(rows, fed)])
            watch = lambda i, selected, real: seen.append((before, turn, selected, real))
            model.prefill(tokens, new, cache, method, watch=watch)
        else:
            new, prompt = torch.ones_like(fed), fed
            if drops(method) and not cache.decoding:
                held = prompt.clamp_max(by.compress_by.budget)
            model.step(torch.stack([row[n] for row, n in zip(rows, fed)]), cache, method)
        if turn is None and drops(method) and not torch.equal(before, held):
            assert_kept(cache, by.compress_by, prompt)
        fed, held = fed + new, held + new
        before = held
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
    """
    Padding in a block mean, a page's bounds, a window, the memory or the dice, the commonest wrong
    benchmark; junk behind a row's entries; the part of a batch that a row falls into.
    """
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
    """
    Every prompt and chunk in pieces: of each row, up to `cuts` parts of 9 first. -> turns, and
    where each old one ends among them.
    """
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
    """
    A last piece of one token taken for a decoding step, blocks counted from a piece's start, other
    entries kept because each layer was compressed at once.
    """
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


@pytest.mark.parametrize("method", [
    compose(MoBA(64, 8), SnapKV(40, 6), Quest(64, 8)), Quest(64, 8, random=1),
    MoBA(64, 8, random=1), SnapKV(60, 6, random=1), Dilated(8, 60, 0), Dilated(1, 0, 0),
    Dilated(None, 0, 60)], ids=name)
def test_a_budget_of_the_whole_length_is_dense(method):
    """An entry lost or read twice where nothing has to be left out."""
    model, tokens = tiny(**FORMS["gqa memory"]), draw_tokens(2, 60)
    logits, dense = (in_pieces(model, tokens, (19, *range(40, 60)), one)[0]
                     for one in (method, None))
    assert_close(logits, dense)


@each_method
def test_a_method_is_on(method):
    """A phase in which a method is silently off: its row of a table would be dense attention's."""
    model, tokens = tiny(**FORMS["gqa memory"]), draw_tokens(2, 60)
    logits, dense = (in_pieces(model, tokens, range(40, 60), one)[0] for one in (method, None))
    in_prompt, in_steps = (error(logits[:, part], dense[:, part]) > 1e-3
                           for part in (slice(0, 40), slice(40, 60)))
    assert in_prompt == isinstance(phases(method).prefill_by, MoBA)
    assert in_steps == (method != Dense())


# ---------------------------------------------------------------- laws of one cache, many settings

scripts = st.lists(
    st.tuples(st.just("feed"), st.lists(st.integers(1, 9), min_size=3, max_size=3))
    | st.tuples(st.sampled_from(["turn", "fork"]), methods, st.integers(0, 4))
    | st.tuples(st.just("clear"), st.none()), min_size=2, max_size=6)


@law(50)
@given(configs(), st.integers(1, 3), st.lists(st.integers(1, 15), min_size=3, max_size=3), scripts,
       exact, seeds)
def test_one_cache_serves_as_fresh_ones(config, B, prompt, script, dtype, seed):
    """
    A setting, or its question, that leaks into the next one, in its turn or in a fork; a text that
    reads the entries of a cleared one, or inherits its memory.
    """
    model, W = tiny(**config).to(dtype), 8
    cache, turns, rows = model.new_cache(B, 90, W), [], draw_tokens(B, 90, seed)

    def feed(cache, *turns):
        done = torch.zeros(B, dtype=torch.long) + cache.lengths
        for turn in turns:
            tokens = torch.stack([row[n:n + max(turn)] for row, n in zip(rows, done)])
            model.prefill(tokens, torch.tensor(turn[:B]), cache)
            done = done + torch.tensor(turn[:B])

    def answer(cache, method, asked):
        out = []
        if asked:
            out.append(model.prefill(rows[:, 80:80 + asked], None, cache, method))
        out += [model.step(rows[:, 85 + t], cache, method) for t in range(3)]
        return torch.stack(out)

    for what, value, *asked in [("feed", prompt), *script]:
        if what == "feed":
            feed(cache, value)
            turns.append(value)
            continue
        if what == "clear":
            cache.clear()
            turns, rows = [prompt], rows.flip(1)
            feed(cache, prompt)
            continue
        before, fresh = state_of(cache), model.new_cache(B, 90, W)
        with decisive():
            feed(fresh, *turns)
            if what == "turn":  # is of what was there before the question
                fresh.compress(value)
            expected = answer(fresh, value, *asked)
        if what == "fork":
            fork = cache.fork()
            assert same(state_of(fork), before)
            given = answer(fork, value, *asked)
        else:
            with cache.turn(value) as own:
                assert (own is cache) != drops(value)
                given = answer(own, value, *asked)
        assert_close(given, expected, what=f"logits in a {what} of {name(value)}")
        assert same(state_of(cache), before), f"a {what} of {name(value)} left a trace"


# ---------------------------------------------------------------- generate

@law(40)
@given(configs(), methods, st.lists(st.integers(1, 30), min_size=1, max_size=3), st.integers(1, 8),
       st.integers(0, 99), seeds)
def test_generate_takes_the_likeliest_token_each_time(config, method, lengths, n_new, pick, seed):
    """
    A cache that is one token off, a row that knows of another, a last token computed in vain; text
    after the end, or an end too soon.
    """
    model, B, n = tiny(**config), len(lengths), torch.tensor(lengths)
    tokens = draw_tokens(B, max(lengths), seed)
    with decisive():
        new = model.generate(tokens, n_new, n, sparse=method)
    assert new.shape == (B, n_new)
    rows = [torch.cat([tokens[b, :n[b]], new[b], tokens.new_zeros(ROOM)])[:ROOM] for b in range(B)]
    rows = torch.stack(rows)
    logits, _ = told(model, rows, [lengths, *[None] * (n_new - 1)], method)
    found = [logits.transpose(0, 1)]  # (B, n_new, V)
    if phases(method) == Compose() or isinstance(method, Dilated):  # forward without a cache too
        with torch.no_grad():
            found.append(torch.stack([model(row[None], sparse=method)[0, end - 1:][:n_new]
                                      for row, end in zip(rows, lengths)]))
    for z in found:
        assert_close(z.gather(2, new[..., None]).squeeze(2), z.amax(2), what="its logit, the most")

    eos = new.flatten()[pick % new.numel()].item()
    ended, is_end = model.generate(tokens, n_new, n, sparse=method, eos_id=eos), new == eos
    after = is_end.cumsum(1) - is_end.long() > 0
    assert torch.equal(ended, new.masked_fill(after, eos)[:, :ended.shape[1]])
    last = int(is_end.long().argmax(1).max()) + 1
    assert ended.shape[1] == (last if is_end.any(1).all() else n_new)


def test_sampling_follows_its_settings():
    """A seed that does not fix the draw, a temperature or top_k that is ignored."""
    model, tokens = tiny(), draw_tokens(2, 20)
    draw = lambda **settings: model.generate(tokens, 20, **settings)
    greedy, one = draw(), draw(temperature=1, seed=1)
    assert torch.equal(draw(temperature=1, seed=1), one)
    assert not torch.equal(draw(temperature=1, seed=2), one)
    assert not torch.equal(draw(temperature=1), draw(temperature=1)), "without a seed each is new"
    assert torch.equal(draw(temperature=1, top_k=1, seed=1), greedy)
    for small in 1e-3, 1e-40, 1e-300, 5e-324:  # what fp32 rounds to 0 too
        assert torch.equal(draw(temperature=small, seed=1), greedy)
    assert not torch.equal(draw(temperature=0.5, seed=1), draw(temperature=2, seed=1))


def test_samples_have_the_softmax_frequencies_of_the_top_k():
    """A temperature that multiplies, or a top_k that keeps one too many."""
    logits, source = torch.tensor([2.0, -1.0, 1.0, 0.0, 1.5]), torch.Generator().manual_seed(0)
    drawn = engine.draw(logits.expand(20000, 5), temperature=2, top_k=3, source=source)
    frequencies = torch.bincount(drawn, minlength=5) / 20000
    expected = torch.zeros(5)
    expected[[0, 2, 4]] = torch.softmax(torch.tensor([1.0, 0.5, 0.75]), 0)
    assert_close(frequencies, expected, atol=0.015)
    assert frequencies[1] == frequencies[3] == 0
    ties = torch.tensor([[1.0, 1, 1, 0]]).expand(100, 4)  # at the k-th logit all may be drawn,
    for top_k, most in (1, 2), (9, 3):                    # and k may be more than there are
        assert engine.draw(ties, 1, top_k, source).max() == most


# ---------------------------------------------------------------- the kernels' generate

KINDS = [COMBINED, Dense(), Quest(6, 2), Quest(6, 2, random=3), MoBA(6, 2), SnapKV(7, 3),
         SnapKV(7, 3, random=2), Dilated(4, 3, 1)]
SOME = [(COMBINED, "gqa memory", 3), (KINDS[3], "olmo2", 1), (KINDS[-1], "ratplus", 3)]
EVERY = [(method, form, B) for method in KINDS for form in FORMS for B in (1, 3)]


@pytest.mark.parametrize("method, form, B", EVERY if DEVICE == "cuda" else times(SOME, EVERY))
def test_generate_gives_the_tokens_of_the_plain_path(method, form, B, monkeypatch):
    """A fused step, a graph, or a part of a batch, that is not what it replaces."""
    pytest.importorskip("triton")
    # the interpreter takes a second a step
    n_new, n_layer = (40, 2) if DEVICE == "cuda" else times((3, 1), (4, 2))
    model = tiny(**HEADS_OF_16 | FORMS[form] | dict(n_layer=n_layer)).to(DEVICE)
    tokens = draw_tokens(B, 9, seed=B).to(DEVICE)
    lengths = torch.tensor([9, 6, 1], device=DEVICE) if B > 1 else None
    monkeypatch.setattr(engine, "TOGETHER", 18)  # two rows at a time
    new = []
    for choice in "torch", "triton":
        monkeypatch.setattr(backend, "choice", choice)
        new.append(model.generate(tokens, n_new, lengths, sparse=method))
    assert torch.equal(*new)


# ---------------------------------------------------------------- what the cache holds

class ReadOnly(Dense):
    """Each layer reads the given prompt positions and what follows: SnapKV by a mask."""

    def __init__(self, kept, prompt):
        self.kept, self.prompt, self.call = kept, prompt, 0

    def decode(self, q, cache):
        kept = self.kept[self.call % len(self.kept)]
        self.call += 1
        new = torch.arange(self.prompt, cache.k.shape[1]).expand(*kept.shape[:2], -1)
        return attend_to_slots(q, cache.k, cache.v, torch.cat([kept, new], dim=2)), None


def test_snapkv_decodes_as_if_the_dropped_entries_were_masked():
    """Positions lost with dropped entries, a gap left open, a memory state of another token."""
    model, tokens = tiny(**FORMS["gqa memory"]), draw_tokens(2, 50)
    steps = range(40, 50)
    logits, cache = in_pieces(model, tokens, steps, SnapKV(14, 6, 3), room=3)
    assert cache.used.tolist() == [24, 24] and cache.lengths.tolist() == [50, 50]
    positions = [x[:, :24].long().transpose(1, 2) for x in cache.positions]  # (B, KV, 24)
    masked, full = in_pieces(model, tokens, steps, ReadOnly([x[..., :14] for x in positions], 40))
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
    kept = [frozenset(x[0, :14, h].tolist()) for x in cache.positions for h in range(4)]
    assert len(set(kept)) == len(kept) == 12


def entries(cache):
    return [len(x[0]) for x in (*cache.k, *cache.v) if x is not None]


def test_snapkv_never_holds_a_whole_prompt(monkeypatch):
    """Storage that is small in the end only, or that is not given back."""
    model, tokens, asked = tiny(), draw_tokens(2, 50), []
    cache, late = model.new_cache(2, 60), model.new_cache(2, 60)
    room = type(cache).room
    monkeypatch.setattr(type(cache), "room",
                        lambda self, i, slots: asked.append(slots) or room(self, i, slots))
    model.prefill(tokens, None, cache, SnapKV(20, 6), whole=True)
    assert set(asked) == {20 + 10} and entries(cache) == [30] * 4
    model.prefill(tokens, None, late)
    assert entries(late) == [60] * 4
    late.compress(SnapKV(20, 6))
    assert entries(late) == [30] * 4


def test_what_is_compressed_leaves_the_cache_and_serves_again():
    """A prompt lost to its first setting; new tensors, and so a new graph, for a batch or seed."""
    model, methods = tiny(**FORMS["gqa memory"]), [SnapKV(20, 6, random=n) for n in (None, 0, 1)]
    cache, places = model.new_cache(2, 60), set()
    for seed in 1, 2:
        tokens = draw_tokens(2, 40, seed)
        logits = model.prefill(tokens, None, cache)
        for method in methods:
            with cache.turn(method) as own:
                places.add(own.k[0].data_ptr())
                assert entries(cache) == [60] * 4 and entries(own) == [40] * 4
                assert cache.filled == 40 and own.filled == 20
                new = model.decode(logits, own, 6, method)
            assert torch.equal(new, model.generate(tokens, 6, sparse=method))
        cache.clear()
    assert len(places) == len(cache.compressed_by) == 1


def test_padding_takes_no_room():
    """A cache that is full because of columns in which no row has a token."""
    model, tokens = tiny(**FORMS["gqa memory"]), draw_tokens(2, 45)
    lengths = torch.tensor([30, 20])
    for method in ALL:
        for whole in True, False:
            cache = model.new_cache(2, 40)
            logits = model.prefill(tokens, lengths, cache, method, whole=whole)
            new = model.decode(logits, cache, 11, method)
            assert torch.equal(new, model.generate(tokens, 11, lengths, sparse=method))


@pytest.mark.parametrize("who", ["torch", "triton"])
def test_a_second_chunk_whose_padding_reaches_past_all_entries(who, monkeypatch):
    """A part of fewer entries than the chunk has columns; kernels want a slot for each query."""
    if who == "triton":
        pytest.importorskip("triton")
    settings, method = HEADS_OF_16 | FORMS["gqa memory"] | dict(n_layer=1), MoBA(24, 8)
    model = tiny(**settings).to(DEVICE)
    tokens, lengths = draw_tokens(2, 23).to(DEVICE), lambda *n: torch.tensor(n, device=DEVICE)
    monkeypatch.setattr(backend, "choice", who)
    monkeypatch.setattr(engine, "TOGETHER", 20)  # a row at a time
    cache = model.new_cache(2, 60)
    model.prefill(tokens[:, :3], lengths(3, 2), cache, method)
    logits = model.prefill(tokens[:, 3:], lengths(5, 20), cache, method)
    monkeypatch.setattr(backend, "choice", "torch")
    alone = model.prefill(tokens[:1, :8], None, model.new_cache(1, 60), method)
    assert_close(logits[:1], alone, 1e-4)


@torch.no_grad()
def test_ragged_chunks_run_under_autocast_and_the_shared_pattern():
    """Padding that stands past the last slot, and k in another dtype than the cache's."""
    model, tokens = tiny(**FORMS["gqa memory"]), draw_tokens(2, 8)
    for method in None, Dilated(dilation=4, local=0, initial=1):
        cache = model.new_cache(2, 40)
        with torch.autocast("cpu", torch.bfloat16):
            model(tokens, torch.tensor([8, 4]), cache, method)
        assert model(tokens, torch.tensor([1, 2]), cache, method).isfinite().all()


def test_watch_sees_each_step():
    """Reads counted for some of the steps."""
    model, reads = tiny(), []
    cache = model.new_cache(2, 60)
    logits = model.prefill(draw_tokens(2, 30), None, cache)
    watch = lambda cache: reads.append([int((x >= 0).sum(-1).max()) for x in cache.selected])
    model.decode(logits, cache, 5, Quest(16, 8), watch=watch)
    assert len(reads) == 4 and all(0 < n <= 16 for step in reads for n in step)


# ---------------------------------------------------------------- turns of a batch

@pytest.mark.parametrize("who", ["torch", *(["triton"] if DEVICE == "cuda" else [])])
@each_method
def test_the_next_turn_of_a_row_is_the_one_it_would_have_alone(method, who, monkeypatch):
    """A row that has ended, and is fed its end token again and again while others go on."""
    monkeypatch.setattr(backend, "choice", who)
    model = tiny(**HEADS_OF_16 | FORMS["gqa memory"]).to(DEVICE)
    asked = [draw_tokens(3, 25, seed=3).to(DEVICE), draw_tokens(3, 7, seed=4).to(DEVICE)]
    sizes = [(9, 25, 14), (4, 7, 3)]
    end = model.generate(asked[0][:1, :9], 12)[0, 2].item()  # what the first row writes third

    def answers(rows):
        """Two of each row. The second is to its question after the first one's last token."""
        cache, told = model.new_cache(len(rows), 100), [[] for _ in rows]
        fed = [0 for _ in rows]
        for tokens, n, by in zip(asked, sizes, (Quest(24, 8), second)):
            prompts = [torch.tensor([*own[-1][-1:], *tokens[b, :n[b]]] if own else tokens[b, :n[b]])
                       for b, own in zip(rows, told)]
            lengths = torch.tensor([len(prompt) for prompt in prompts], device=DEVICE)
            padded = nn.utils.rnn.pad_sequence(prompts, batch_first=True).to(DEVICE)
            new = model.decode(model.prefill(padded, lengths, cache), cache, 12, by, eos_id=end)
            for own, row in zip(told, new.tolist()):
                own.append(row[:row.index(end) + 1] if end in row else row)
            fed = [n + len(p) + len(own[-1]) - 1 for n, p, own in zip(fed, prompts, told)]
            assert cache.lengths.tolist() == fed
        return told

    # entries are dropped once, before the first answer: there is no second prompt to drop of
    second = Quest(32, 8) if drops(method) else method
    together = answers([0, 1, 2])
    assert len({len(own[0]) for own in together}) > 1, "all end at once: nothing is tested"
    for b in range(3):
        assert answers([b]) == together[b:b + 1]


def test_a_row_that_ends_at_once_is_compressed_with_the_others():
    """A row that has ended before the others' first step drops entries, its own too."""
    model, tokens, lengths = tiny(**FORMS["gqa memory"]), draw_tokens(2, 30), torch.tensor([30, 12])
    method, question = SnapKV(10, 6), draw_tokens(2, 4, seed=5)
    both, alone = model.new_cache(2, 60), model.new_cache(1, 60)
    logits = model.prefill(tokens, lengths, both, method)
    end = logits[1].argmax().item()
    assert end != logits[0].argmax().item()
    model.decode(logits, both, 6, method, eos_id=end)
    model.prefill(tokens[1:, :12], None, alone, method)
    alone.compress(method)
    assert both.used[1] == alone.used[0] == 10 and both.filled == both.used.max()
    with torch.no_grad():
        assert_close(model(question, cache=both)[1], model(question[1:], cache=alone)[0])


# ---------------------------------------------------------------- wrong uses

TOKENS = draw_tokens(2, 30)


class Talk:
    """A model and its cache, fed 30 tokens of 2 rows, and some steps."""

    def __init__(self, method=None, steps=0, room=60, window=64, whole=False, empty=False):
        self.model = tiny(**FORMS["gqa memory"])
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

    def without(self, *args, **settings):
        return self.model.prefill(TOKENS, *args, **settings)


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
    (["need a cache"], {}, lambda t: t.without(whole=True)),
    (["need a cache"], {}, lambda t: t.without(watch=print)),
    (["no tokens"], EMPTY, lambda t: t.prefill(TOKENS[:, :0])),
    *((["30", "31", "larger max_len"], FULL, use) for use in (
        lambda t: t.step(), lambda t: t.prefill(TOKENS[:, :1]), lambda t: t.decode(2),
        lambda t: t.model(TOKENS[:, :1], torch.tensor([1, 1]), t.cache))),
    *((["34", "35", "max_len"], dict(room=34), lambda t, method=method: t.decode(6, method))
      for method in (None, SNAPKV)),
    *((["30", "35", "larger max_len"], FULL | EMPTY,
       lambda t, lengths=lengths: t.prefill(draw_tokens(2, 35), lengths))
      for lengths in (None, [10, 35])),
    *(([f"lengths={lengths}"], EMPTY, lambda t, lengths=lengths: t.prefill(lengths=lengths))
      for lengths in ([0, 8], [31, 8], [-1, 8], [0, 0], [3, 3, 3])),
    (["lengths=[0, 8]"], EMPTY, lambda t: t.without(torch.tensor([0, 8]))),
    *(([f"{key}={value}"], {}, lambda t, key=key, value=value: t.decode(**{"n": 2} | {key: value}))
      for key, value in [("temperature", -1), ("temperature", math.nan), ("temperature", math.inf),
                         ("top_k", 0)]),
    (["max_new_tokens=0"], {}, lambda t: t.decode(0)),
]


@pytest.mark.parametrize("words, of, use", WRONG, ids=range(len(WRONG)))
def test_a_wrong_use_is_refused_before_anything_happens(words, of, use, monkeypatch):
    """
    Entries dropped in the middle of an answer, or where they should come back; tokens written over
    others; a first part of a batch fed, and the second refused; tokens lost with a full cache.
    """
    talk = Talk(**of)
    monkeypatch.setattr(engine, "TOGETHER", 40)  # a row at a time
    before = state_of(talk.cache)
    with pytest.raises(ValueError) as raised:
        use(talk)
    one_line(raised, *words)
    assert same(state_of(talk.cache), before)


# ---------------------------------------------------------------- what fails

class Stop(BaseException):
    """As ctrl-C: no Exception."""


@pytest.mark.parametrize("layer, error", [(0, MemoryError), (1, Stop)])
@pytest.mark.parametrize("together", [10**6, 100], ids=["at once", "in parts"])
@each_method
def test_a_prompt_that_fails_leaves_the_cache_as_it_was(method, together, layer, error,
                                                        monkeypatch):
    """Tokens that only some layers have seen, and a second try that stands behind them."""
    monkeypatch.setattr(engine, "TOGETHER", together)
    model, tokens, lengths = tiny(**FORMS["gqa memory"]), draw_tokens(5, 45), torch.tensor(LENGTHS)
    calls, first_part = [], 2 if together == 100 else 0

    def fail(i, selected, real):
        calls.append(i)
        if i == layer and len(calls) > first_part:
            raise error("say")

    for start, whole in (0, True), (0, False), (20, False):
        caches = failed, right = [model.new_cache(5, 60) for _ in "ab"]
        feed = lambda cache, **watch: model.prefill(
            tokens[:, start:], (lengths - start).clamp(min=0), cache, method, whole, **watch)
        for cache in caches if start else ():
            model.prefill(tokens[:, :start], lengths.clamp(max=start), cache, method)
        before = state_of(failed)
        calls.clear()
        with pytest.raises(error):
            feed(failed, watch=fail)
        if start:
            assert same(state_of(failed), before)
        assert failed.lengths.tolist() == right.lengths.tolist() and failed.filled == right.filled
        logits = [feed(cache) for cache in caches]
        assert torch.equal(*logits)
        assert torch.equal(*(model.decode(logits[0], cache, 6, method) for cache in caches))


@pytest.mark.parametrize("where, of", [("forward", "norm"), ("head", "")])
@pytest.mark.parametrize("together", [10**6, 20], ids=["at once", "in parts"])
def test_what_fails_behind_the_layers_counts_too(where, of, together, monkeypatch):
    """No memory for the logits, the largest tensor: tokens whose logits nobody has seen."""
    monkeypatch.setattr(engine, "TOGETHER", together)
    model, tokens = tiny(**FORMS["gqa memory"]), draw_tokens(2, 30)
    caches = failed, right = [model.new_cache(2, 60) for _ in "ab"]

    def no_room(x):
        raise MemoryError("say")

    def fails(use):
        with monkeypatch.context() as patch, pytest.raises(MemoryError):
            patch.setattr(model.get_submodule(of), where, no_room)
            use()

    for part in tokens.split(15, dim=1):
        fails(lambda: model.prefill(part, None, failed))
        assert torch.equal(*(model.prefill(part, None, cache) for cache in caches))
    fails(lambda: model.step(tokens[:, 0], failed))
    with pytest.raises(ValueError, match="half-way"):
        model.step(tokens[:, 0], failed)


class Failing(Quest):
    """A method of one's own that fails in the second layer of the second step."""
    calls = []

    def decode(self, q, cache):
        self.calls.append(1)
        if len(self.calls) == 4:
            raise MemoryError("say")
        return super().decode(q, cache)


def test_a_step_that_fails_spoils_the_cache_until_it_is_cleared():
    """A memory that one layer has moved on and another has not, and answers from it."""
    talk, quest = Talk(), Quest(16, 8)
    model, cache, step = talk.model, talk.cache, lambda cache: talk.model.step(TOKENS[:, 0], cache)
    with cache.turn(None):
        expected = talk.decode(6, quest)
    Failing.calls.clear()
    with pytest.raises(MemoryError), cache.turn(Failing(16, 8)):
        talk.decode(6, Failing(16, 8))
    with cache.turn(quest):  # what began as a turn is forgotten whole
        assert torch.equal(talk.decode(6, quest), expected)

    Failing.calls.clear()
    with pytest.raises(MemoryError):
        talk.decode(6, Failing(16, 8))
    uses = [lambda: step(cache), talk.prefill, lambda: talk.prefill(TOKENS[:, :1]),
            lambda: cache.turn(quest).__enter__(), lambda: cache.turn(SNAPKV).__enter__(),
            lambda: step(cache.fork())]
    for use in uses:
        with pytest.raises(ValueError) as raised:
            use()
        one_line(raised, "half-way", "clear it")
    cache.clear()
    assert torch.equal(model.decode(talk.prefill(), cache, 6, quest), expected)


# ---------------------------------------------------------------- on a GPU

@gpu
@each_method
def test_a_steady_loop_captures_nothing(method, monkeypatch):
    """A graph for each prompt, or for each step."""
    captured, init = [], engine.Graph.__init__
    monkeypatch.setattr(engine.Graph, "__init__",
                        lambda self, *args: captured.append(1) or init(self, *args))
    model = tiny(**HEADS_OF_16 | FORMS["gqa memory"]).to(DEVICE)
    cache, lengths = model.new_cache(5, 80), torch.tensor(LENGTHS, device=DEVICE)
    for seed in range(4):
        logits = model.prefill(draw_tokens(5, 45, seed).to(DEVICE), lengths, cache)
        with cache.turn(method) as own:
            model.decode(logits, own, 12, method)
        cache.clear()
        assert len(captured) == 1


@gpu
def test_graphs_of_several_methods_share_a_cache():
    """A graph that replays into what another has moved, or tells what another one read."""
    model = tiny(**HEADS_OF_16 | FORMS["gqa memory"]).to(DEVICE)
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
            for x in [x for step in seen for x in step]:
                assert (x is None) == (method == Dense())
                assert x is None or 0 < (x >= 0).sum(-1).max() <= method.budget
        cache.clear()


@gpu
def test_a_full_cache_stops_a_graph():
    """A replay that writes past the cache's end."""
    model = tiny(**HEADS_OF_16).to(DEVICE)
    cache = model.new_cache(1, 45)
    model.prefill(draw_tokens(1, 40).to(DEVICE), None, cache)
    token = draw_tokens(1, 1).to(DEVICE)[0]
    for _ in range(5):
        model.step(token, cache)
    with pytest.raises(ValueError, match="max_len"):
        model.step(token, cache)


@gpu
@torch.no_grad()
def test_methods_may_alternate_without_turns():
    """Block bounds that another method's graph did not keep up to date, taken for current."""
    model = tiny(**HEADS_OF_16 | FORMS["gqa memory"]).to(DEVICE)
    dense, quest, other = Dense(), Quest(16, 8), Quest(12, 4)
    order = [dense] * 3 + [quest] * 3 + [dense] * 9 + [quest] * 3 + [other] * 3 + [quest] * 3
    tokens, new = (draw_tokens(1, n, seed=n).to(DEVICE) for n in (60, len(order)))
    logits = []
    for eager in True, False:
        cache = model.new_cache(1, 120)
        model.prefill(tokens, None, cache)
        for i, method in enumerate(order):
            if eager:
                logits.append(model(new[:, i:i + 1], cache=cache, sparse=method)[:, -1])
            else:
                assert_close(model.step(new[:, i], cache, method), logits[i], atol=1e-4)
