"""
Laws that hold for every model, method, length and cut: hypothesis draws these, from the smallest on, and a failure is its smallest.

The other tests/test_*.py ask about chosen cases, each with the bug it would catch; here nobody chooses. Two runs that must agree
add in another order, and a selection among scores closer than rounding may then differ: `decisive` draws anew where one is.
CI takes a fixed sample, pytest --slow ten times as many, new ones each time.
"""
import math
import tempfile
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings, strategies as st
from torch.nn import functional as F

from infra import loss
import engine
import sparse
from cache import LayerCache
from conftest import RATPLUS_FORM, assert_close, draw_tokens, times, tiny
from memory import arl_passes, effective_length, lengths_of, memory_loop, memory_scan, memory_step, scan
from model import Transformer
from sparse import (Compose, Dense, Dilated, MoBA, Quest, SnapKV, attend, attend_to_slots, chance, compose, drops, name, parse, per_kv_head,
                    phases, randomized, top, window_of)
from test_sparse import assert_top, draw


def law(examples):
    return settings(max_examples=times(examples, 10 * examples), derandomize=times(True, False), deadline=None, database=None,
                    suppress_health_check=list(HealthCheck))


@contextmanager
def decisive():
    """Draws the example anew if a selection within is nearly a tie: the last one in and the first one out 1e-5 of the scores apart."""
    clear = []

    def watched(scores, S):
        if S < scores.shape[-1]:
            ordered = scores.double().sort(dim=-1, descending=True).values
            gap, size = ordered[..., S - 1] - ordered[..., S], ordered.masked_fill(ordered.isinf(), 0).abs().amax(-1)
            clear.append(not bool((gap.isfinite() & (gap <= 1e-5 * size)).any()))  # infinite or NaN: forced, or not to be had
        return top(scores, S)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse, "top", watched)
        yield
    assume(all(clear))


# ---------------------------------------------------------------- what is drawn

seeds = st.integers(0, 2**31 - 1)
dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])
exact = st.sampled_from([torch.float32, torch.float64])
heads = st.sampled_from([(1, 1), (2, 2), (2, 1), (4, 4), (4, 2), (4, 1), (6, 2)])  # H, KV
sizes = st.sampled_from([1, 2, 3, 4, 8])

scored_quests = st.builds(lambda size, more, first, current: Quest((max(1, first + current) + more) * size, size, first, current),
                          sizes, st.integers(0, 3), st.booleans(), st.booleans())
scored_mobas = st.builds(lambda size, more, first: MoBA((1 + first + more) * size, size, first), sizes, st.integers(0, 3), st.booleans())
scored_snapkvs = st.builds(lambda window, more, kernel: SnapKV(window + more, window, kernel),
                           st.integers(1, 8), st.integers(1, 12), st.sampled_from([1, 3, 5]))
scored = scored_quests | scored_mobas | scored_snapkvs
quests, mobas, snapkvs, selectors = (some | st.builds(randomized, some, st.integers(0, 3))
                                     for some in (scored_quests, scored_mobas, scored_snapkvs, scored))
dilateds = st.builds(Dilated, st.sampled_from([None, 1, 2, 3, 4, 5, 7, 9]), st.just(0) | st.integers(0, 9), st.integers(0, 4))
combinations = (st.builds(compose, mobas, quests) | st.builds(compose, mobas, snapkvs) | st.builds(compose, snapkvs, quests)
                | st.builds(compose, mobas, snapkvs, quests))
methods = st.sampled_from([st.just(Dense()), quests, mobas, snapkvs, dilateds, combinations]).flatmap(lambda kind: kind)  # alike often


@st.composite
def configs(draw):
    """Settings of a tiny model."""
    (H, KV), D = draw(heads), draw(st.sampled_from([8, 16]))
    form = draw(st.sampled_from([{}, dict(memory=True), RATPLUS_FORM]))
    return form | dict(n_layer=draw(st.integers(1, 2)), n_head=H, n_kv_head=KV, width=H * D, tied=draw(st.booleans()), seed=draw(seeds))


@st.composite
def talks(draw):
    """
    What happens to a batch, a list of turns: tokens per row of a prompt, or of a chunk of one; None: a decoding step.
    [[9, 4], [0, 3], None] is a prompt of 9 tokens beside one of 4, which has 3 more in a second chunk, and a step.
    """
    B = draw(st.integers(1, 3))
    turns = [draw(st.lists(st.integers(1, 30), min_size=B, max_size=B))]
    for _ in range(draw(st.integers(0, 3))):
        turns.append(draw(st.lists(st.integers(0, 7), min_size=B, max_size=B).map(lambda turn: turn if any(turn) else [1] * B) | st.none()))
    return turns + [None] * draw(st.integers(0, 2))


ROOM = 60  # of a cache: 30 + 3 * 7 + 2 is the longest talk
junk = st.sampled_from([0, -77, 1e4, math.inf, math.nan])  # what may stand where nothing counts


@torch.no_grad()
def told(model, rows, turns, method=None, whole=False, together=10**6, behind=None, padding=0):
    """
    Each row (60 tokens) of a batch fed by `turns`: logits (turns, B, V) after each, in a turn without tokens the last ones; the cache.
    whole, together: how prefill goes about it. behind: what is put, after each turn, into slots that hold no entry.
    """
    window = getattr(phases(method).compress_by, "window", 5)
    cache, source, done, out = model.new_cache(len(rows), ROOM, window), torch.Generator().manual_seed(padding), [0] * len(rows), []
    for turn in turns:
        if turn is None:
            turn = [1] * len(rows)
            logits = model.step(torch.stack([row[n] for row, n in zip(rows, done)]), cache, method)
        else:
            tokens = torch.randint(61, (len(rows), max(turn) + padding % 3), generator=source)
            for b, n in enumerate(turn):
                tokens[b, :n] = rows[b][done[b]:done[b] + n]
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(engine, "TOGETHER", together)
                logits = model.prefill(tokens, torch.tensor(turn), cache, method, whole=whole and not out)
        out.append(torch.stack([logits[b] if n else out[-1][b] for b, n in enumerate(turn)]))
        done = [have + n for have, n in zip(done, turn)]
        assert cache.lengths.tolist() == done
        for x in (*cache.k, *cache.v) if behind is not None else ():
            x[torch.arange(x.shape[1]) >= cache.used[:, None]] = behind
    return torch.stack(out), cache


def cut(turns, cuts):
    """Every prompt and chunk in pieces: of each row, up to `cuts` parts of 9 first. -> turns, and where each old one ends among them"""
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


# ---------------------------------------------------------------- a model

@law(100)
@given(configs(), methods, st.lists(st.integers(1, 40), min_size=1, max_size=3), st.integers(0, 40), st.integers(0, 40), dtypes, seeds)
def test_later_tokens_change_nothing_earlier(config, method, lengths, t, cut_at, dtype, seed):
    """Also in another row, at padding, or in the chunk that they share. Of a text that ends there, what stands there is the same."""
    model, T = tiny(**config).to(dtype), max(lengths)
    tokens, other, lengths = draw_tokens(len(lengths), T, seed), draw_tokens(len(lengths), T, seed + 1), torch.tensor(lengths)
    t, cut_at = t % T, cut_at % T
    kept = torch.arange(T) < lengths.clamp_max(t)[:, None]
    changed = tokens.where(kept, other)

    def by_chunks(tokens):
        cache, out = model.new_cache(len(tokens), T, 5), []
        for part in (slice(cut_at), slice(cut_at, T)) if cut_at else (slice(T),):
            n = (lengths - part.start).clamp(0, part.stop - part.start) if part.start else lengths.clamp_max(part.stop)
            out.append(model(tokens[:, part], n, cache, method))
        return torch.cat(out, dim=1)

    with torch.no_grad():
        for run in (lambda x: model(x, lengths, sparse=method)), by_chunks:
            assert torch.equal(run(tokens)[kept], run(changed)[kept])
        if t and dtype != torch.bfloat16:
            with decisive():
                whole, begun = model(tokens, sparse=method), model(tokens[:, :t], sparse=method)
            assert_close(begun, whole[:, :t])


@law(100)
@given(configs(), methods, talks(), dtypes, seeds)
def test_no_query_reads_more_than_its_budget(config, method, turns, dtype, seed):
    """Forced blocks, the window and the query's own entry on top of it; an entry read twice, of the future, or of no token."""
    model, rows, seen = tiny(**config).to(dtype), draw_tokens(len(turns[0]), ROOM, seed), []
    prefill_by, compress_by, decode_by = (getattr(phases(method), f"{hook}_by") for hook in ("prefill", "compress", "decode"))
    KV, lengths = model.config.n_kv_head, torch.zeros(len(rows), dtype=torch.long)
    cache = model.new_cache(len(rows), ROOM, window_of(method))
    for turn in turns:
        if turn is not None:
            before, tokens = cache.used.clone(), torch.stack([row[n:n + max(turn)] for row, n in zip(rows, lengths)])
            model.prefill(tokens, torch.tensor(turn), cache, method, watch=lambda *what: seen.append((before, turn, *what)))
            lengths += torch.tensor(turn)
            continue
        prompt = None if cache.decoding else lengths.clone()
        model.step(torch.stack([row[n] for row, n in zip(rows, lengths)]), cache, method)
        lengths += 1
        if drops(method) and prompt is not None:
            assert torch.equal(cache.used, prompt.clamp_max(compress_by.budget) + 1)
            for i, b, h in torch.cartesian_prod(*map(torch.arange, (model.config.n_layer, len(rows), KV))).tolist():
                held, window = cache.positions[i][b, :cache.used[b], h].tolist(), range(max(0, prompt[b] - compress_by.window), prompt[b])
                assert held == sorted(set(held)) and held[-1] == prompt[b] and set(window) <= set(held)
                assert len(cache.k[i][b]) == min(compress_by.budget, prompt.max()) + ROOM - prompt.max(), "room that was not given back"
        for i, selected in enumerate(cache.selected):
            assert (selected is None) == (type(decode_by) is Dense or isinstance(decode_by, (MoBA, SnapKV)))
            for b, h in torch.cartesian_prod(torch.arange(len(rows)), torch.arange(KV)).tolist() if selected is not None else ():
                read = [j for j in selected[b, h].tolist() if j >= 0]
                held = range(lengths[b]) if cache.positions[i] is None else cache.positions[i][b, :cache.used[b], h].tolist()
                assert 0 < len(read) == len(set(read)) and set(read) <= set(held)
                if isinstance(decode_by, Quest):
                    assert len(read) <= decode_by.budget and (not decode_by.keep_current or lengths[b] - 1 in read)
                else:
                    assert read == [j for j in held if reads(decode_by, lengths[b] - 1, j)]
    assert len(seen) == model.config.n_layer * sum(turn is not None for turn in turns)
    for before, turn, _, selected, real in seen:
        assert (selected is None) == (not isinstance(prefill_by, MoBA))
        for b, n in enumerate(turn) if selected is not None else ():
            assert (torch.ones(max(turn)) if real is None else real[b]).tolist() == [t < n for t in range(max(turn))]
            current = (before[b] + torch.arange(n)) // prefill_by.block_size                    # (n,)
            blocks = selected[b, :, :n].sort(dim=-1).values                                     # (KV, n, S)
            assert blocks.shape[-1] * prefill_by.block_size <= prefill_by.budget
            assert torch.equal(blocks[..., -1], current.expand(KV, -1)), "not its own block, or one of the future"
            assert ((blocks[..., 1:] > blocks[..., :-1]) | (blocks[..., :-1] < 0)).all(), "one twice"
            assert (blocks >= 0).sum(-1).eq((current + 1).clamp_max(prefill_by.budget // prefill_by.block_size)).all(), "budget left"


@law(70)
@given(configs(), methods, talks(), exact, st.permutations(range(3)), seeds)
def test_rows_in_another_order_give_the_same_in_that_order(config, method, turns, dtype, order, seed):
    """A row that looks at its neighbour, or at the first."""
    model, B = tiny(**config).to(dtype), len(turns[0])
    rows, order = draw_tokens(B, ROOM, seed), [b for b in order if b < B]
    with decisive():
        logits, cache = told(model, rows, turns, method, padding=1)
    moved, other = told(model, rows[order], [turn and [turn[b] for b in order] for turn in turns], method, padding=2)
    assert_close(moved, logits[:, order])
    assert torch.equal(other.used, cache.used[order]) and torch.equal(other.token_hash, cache.token_hash[order])
    for state, expected in zip(other.state, cache.state):
        assert state is None or assert_close(state, expected[:, order]) is None


@law(150)
@given(configs(), methods, talks(), exact, junk.filter(math.isfinite), st.sampled_from([1, 20, 10**6]), seeds)
def test_a_row_among_others_gives_what_it_gives_alone(config, method, turns, dtype, behind, together, seed):
    """Padding of whatever ids, junk behind a row's entries, or the part of a batch a row falls into: all of it unseen."""
    model = tiny(**config).to(dtype)
    rows = draw_tokens(len(turns[0]), ROOM, seed)
    with decisive():
        logits, cache = told(model, rows, turns, method, padding=seed, behind=behind, together=together)
    for b in range(len(rows)):
        mine = [t for t, turn in enumerate(turns) if turn is None or turn[b]]
        alone, single = told(model, rows[b:b + 1], [turns[t] and [turns[t][b]] for t in mine], method)
        assert_close(logits[mine, b], alone[:, 0], what=f"logits of row {b}")
        assert (cache.lengths[b], cache.used[b], cache.token_hash[b]) == (single.lengths[0], single.used[0], single.token_hash[0])
        for state, expected in zip(cache.state, single.state):
            assert state is None or assert_close(state[:, b:b + 1], expected, what=f"memory state of row {b}") is None


@law(150)
@given(configs(), methods, talks(), exact, st.lists(st.integers(1, 8), max_size=4, unique=True), st.sampled_from([1, 20, 10**6]), seeds)
def test_a_prompt_in_pieces_is_the_prompt(config, method, turns, dtype, cuts, together, seed):
    """And steps after it. A piece of one token is no decoding step; one may bring nothing to a row; a last one may be compressed at once."""
    model, rows = tiny(**config).to(dtype), draw_tokens(len(turns[0]), ROOM, seed)
    pieces, ends = cut(turns, cuts)
    with decisive():
        logits, cache = told(model, rows, turns, method)
    parts, other = told(model, rows, pieces, method, padding=1, together=together)
    assert_close(parts[ends], logits)
    assert torch.equal(other.used, cache.used)
    if turns[1:2] in ([], [None]):
        assert_close(told(model, rows, turns, method, whole=True, together=together)[0], logits, what="compressed at once: logits")


@law(70)
@given(configs(), st.just(Dense()) | dilateds, talks(), exact, seeds)
def test_steps_and_chunks_are_the_whole(config, method, turns, dtype, seed):
    """Of methods that read alike in prefill and in decoding: forward without a cache is the truth."""
    model, rows = tiny(**config).to(dtype), draw_tokens(len(turns[0]), ROOM, seed)
    logits, _ = told(model, rows, turns, method, padding=seed)
    with torch.no_grad():
        whole = model(rows, sparse=method)
    for b, row in enumerate(whole):
        last = torch.tensor([1 if turn is None else turn[b] for turn in turns]).cumsum(0) - 1
        assert_close(logits[:, b], row[last])


def enlarged(method, n):
    """The method with a budget of n tokens or more."""
    if isinstance(method, Compose):
        return compose(*(enlarged(part, n) for part in (method.prefill_by, method.compress_by, method.decode_by) if type(part) is not Dense))
    if isinstance(method, Dilated):
        return replace(method, local=n)
    if isinstance(method, SnapKV):
        return replace(method, budget=max(method.budget, n))
    return replace(method, budget=max(method.budget, -(-n // method.block_size) * method.block_size)) if hasattr(method, "budget") else method


@law(70)
@given(configs(), methods, talks(), exact, st.integers(0, 9), seeds)
def test_a_budget_of_the_whole_length_is_dense(config, method, turns, dtype, more, seed):
    """An entry lost or read twice where nothing has to be left out."""
    model, rows = tiny(**config).to(dtype), draw_tokens(len(turns[0]), ROOM, seed)
    method = enlarged(method, max(sum(1 if turn is None else turn[b] for turn in turns) for b in range(len(rows))) + more)
    assert_close(told(model, rows, turns, method)[0], told(model, rows, turns)[0])


@law(70)
@given(configs(), methods, talks(), dtypes, st.sampled_from([-math.inf, -1e4]), seeds)
def test_a_memory_that_forgets_at_once_is_none(config, method, turns, dtype, bias, seed):
    """g = 0, bit by bit: Eq. 1 is then k~ = k."""
    model = tiny(**config | dict(memory=True)).to(dtype)
    without = Transformer(replace(model.config, memory=False)).to(dtype)
    without.load_state_dict({path: tensor for path, tensor in model.state_dict().items() if ".memory." not in path})
    for layer in model.layers:
        torch.nn.init.constant_(layer.self_attn.memory.proj.bias, bias)
    rows = draw_tokens(len(turns[0]), ROOM, seed)
    assert torch.equal(told(model, rows, turns, method)[0], told(without, rows, turns, method)[0])


@law(50)
@given(configs(), methods, st.lists(st.integers(1, 30), min_size=1, max_size=3), st.integers(1, 8), st.integers(0, 60), seeds)
def test_generate_takes_the_likeliest_token_each_time(config, method, lengths, n_new, eos, seed):
    """By a cache fed the same, and for methods that read alike in both phases by forward; and stops at the end of the text, no sooner."""
    model, B = tiny(**config), len(lengths)
    tokens, n = draw_tokens(B, max(lengths), seed), torch.tensor(lengths)
    with decisive():
        new = model.generate(tokens, n_new, n, sparse=method)
    assert new.shape == (B, n_new)
    rows = torch.stack([torch.cat([tokens[b, :n[b]], new[b], tokens.new_zeros(ROOM)])[:ROOM] for b in range(B)])
    logits = told(model, rows, [lengths, *[None] * (n_new - 1)], method)[0].transpose(0, 1)   # (B, n_new, V)
    with torch.no_grad():
        whole = torch.stack([model(row[None], sparse=method)[0, n[b] - 1:n[b] - 1 + n_new] for b, row in enumerate(rows)])
    for z in (logits, whole) if phases(method) == Compose() or isinstance(method, Dilated) else (logits,):
        assert_close(z.gather(2, new[..., None]).squeeze(2), z.amax(2), what="a token's logit and the highest")
    ended = model.generate(tokens, n_new, n, sparse=method, eos_id=eos)
    after = (new == eos).cumsum(1) - (new == eos).long() > 0
    assert torch.equal(ended, new.masked_fill(after, eos)[:, :ended.shape[1]])
    assert ended.shape[1] == (n_new if not (new == eos).any(1).all() else int((new == eos).long().argmax(1).max()) + 1)


@law(50)
@given(configs(), st.just(None) | mobas | dilateds, st.integers(1, 3), st.integers(1, 20), st.integers(1, 2000), seeds)
def test_a_model_learns_from_the_cross_entropy_of_its_logits(config, method, B, T, most, seed):
    """Each parameter's gradient is autograd's, whose logits are all there at once; the head's too where it is the embedding."""
    model, tokens = tiny(**config), draw_tokens(B, T + 1, seed)
    weight = torch.rand(B, T + 1, generator=torch.Generator().manual_seed(seed))
    weight = weight.masked_fill(weight < 0.3, 0)
    head = model.lm_head or model.embed_tokens
    z = F.linear(model.hidden(tokens[:, :-1], sparse=method), head.weight).flatten(0, 1)
    expected = (F.cross_entropy(z, tokens[:, 1:].flatten(), reduction="none") * weight[:, 1:].flatten()).sum()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "CHUNK_LOGITS", most)
        ours, score = model.loss(tokens, weight, method), model.score(tokens, weight, method)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(score[0].float(), expected, rtol=1e-5, atol=1e-5)
    for (path, p), mine, ref in zip(model.named_parameters(), *(torch.autograd.grad(x, model.parameters()) for x in (ours, expected))):
        assert_close(mine, ref, atol=1e-4 * (1 + ref.abs().max().item()), what=path)


@law(20)
@given(configs(), dtypes, seeds)
def test_a_model_that_was_saved_is_the_model(config, dtype, seed):
    """A field or a tensor of some form that a file does not keep."""
    model, tokens = tiny(**config).to(dtype), draw_tokens(2, 20, seed)
    with tempfile.TemporaryDirectory() as path, torch.no_grad():
        model.save_pretrained(path)
        again = Transformer.from_pretrained(path)
        assert again.config == model.config and torch.equal(again(tokens), model(tokens))


@law(100)
@given(st.integers(1, 3), st.integers(1, 20), st.floats(0.1, 10), st.none() | st.integers(1, 25), st.integers(1, 4), seeds)
def test_a_draw_is_of_the_top_k(B, V, temperature, top_k, values, seed):
    """Ties at the k-th logit may all be drawn; anything below never."""
    source = torch.Generator().manual_seed(seed)
    logits = torch.randint(values, (B, V), generator=source).float() + 0.01 * torch.randn(B, V, generator=source) * (values % 2)
    for t in temperature, 0:
        token = engine.draw(logits, t, top_k, source)
        kth = logits.sort(descending=True).values[:, min(top_k or V, V) - 1] if t else logits.amax(1)
        assert token.shape == (B,) and (logits.gather(1, token[:, None])[:, 0] >= kth).all()


# ---------------------------------------------------------------- a cache

def state_of(cache):
    """All that a cache holds of its tokens. What lies behind a row's last entry is none of it."""
    entries = [x if x is None else x[torch.arange(x.shape[1]) < cache.used[:, None]] for x in (*cache.k, *cache.v, *cache.positions)]
    rest = [x if x is None else x.clone() for x in (cache.lengths, cache.used, cache.token_hash, *cache.state, *cache.recent_q)]
    return entries + rest + [cache.filled, cache.decoding, cache.slots]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(a, b))


scripts = st.lists(st.tuples(st.just("feed"), st.lists(st.integers(1, 9), min_size=3, max_size=3))
                   | st.tuples(st.sampled_from(["turn", "fork"]), methods, st.integers(0, 4)) | st.tuples(st.just("clear"), st.none()),
                   min_size=2, max_size=6)


@law(100)
@given(configs(), st.integers(1, 3), st.lists(st.integers(1, 15), min_size=3, max_size=3), scripts, exact, seeds)
def test_one_cache_serves_as_fresh_ones(config, B, prompt, script, dtype, seed):
    """A setting, or its question, that leaks into the next one, be it in its turn or in a fork; a text that follows a cleared one."""
    model, W = tiny(**config).to(dtype), 8
    cache, turns, rows = model.new_cache(B, 90, W), [], draw_tokens(B, 90, seed)

    def feed(cache, *turns):
        done = torch.zeros(B, dtype=torch.long) + cache.lengths
        for turn in turns:
            n = torch.tensor(turn[:B])
            tokens = torch.stack([row[start:start + max(turn)] for row, start in zip(rows, done)])
            logits, done = model.prefill(tokens, n, cache), done + n
        return logits

    def answer(cache, method, asked):
        out = [model.prefill(rows[:, 80:80 + asked], None, cache, method)] if asked else []
        return torch.stack(out + [model.step(rows[:, 85 + t], cache, method) for t in range(3)])

    for what, value, *asked in [("feed", prompt)] + script:
        if what == "feed":
            feed(cache, value)
            turns.append(value)
        elif what == "clear":
            cache.clear()
            turns, rows = [prompt], rows.flip(1)
            feed(cache, prompt)
        else:
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
                    given = answer(own, value, *asked)
                    assert (own is cache) != drops(value)
            assert_close(given, expected, what=f"logits in a {what} of {name(value)}")
            assert same(state_of(cache), before), f"a {what} of {name(value)} left a trace"


@law(70)
@given(configs(), methods, st.lists(st.integers(1, 20), min_size=1, max_size=4), st.lists(st.integers(0, 6), min_size=4, max_size=4),
       st.sets(st.integers(1, 3)), exact, seeds)
@torch.no_grad()
def test_views_of_its_rows_are_the_cache(config, method, lengths, more, cuts, dtype, seed):
    """Rows fed part by part, in a first and in a second chunk: a slot, a state or a hash of another part's."""
    model, B, T = tiny(**config).to(dtype), len(lengths), max(lengths)
    turns = [torch.tensor(lengths), torch.tensor(more[:B])]
    at = [0, *sorted(c for c in cuts if c < B), B]
    parts = [slice(start, end) for start, end in zip(at, at[1:])]
    one, split = (model.new_cache(B, 40, 8) for _ in "ab")
    with decisive():
        for turn in turns:
            tokens = draw_tokens(B, max(1, int(turn.max())), seed + T)
            expected = model(tokens, turn, one, method)
            views = [split.rows(part) for part in parts]
            logits = torch.cat([model(tokens[part], turn[part], view, method) for part, view in zip(parts, views)])
            split.joined(views)
            real = torch.arange(tokens.shape[1]) < turn[:, None]
            assert_close(logits[real], expected[real]) if real.any() else None
        token = draw_tokens(B, 3, seed)
        expected = [model.step(token[:, t], one, method) for t in range(3)]
    logits = [model.step(token[:, t], split, method) for t in range(3)]
    assert_close(torch.stack(logits), torch.stack(expected))
    assert torch.equal(one.used, split.used) and torch.equal(one.token_hash, split.token_hash) and one.filled == split.filled


# ---------------------------------------------------------------- the memory

def memory_inputs(B, T, KV, D, seed, dtype=torch.float64, extreme=False):
    source = torch.Generator().manual_seed(seed)
    k, v, gate = (torch.randn(B, T, KV, D, generator=source, dtype=torch.float64) for _ in range(3))
    gate = 4 * gate
    if extreme:
        which = torch.randint(8, gate.shape, generator=source)
        gate = gate.masked_fill(which == 0, math.inf).masked_fill(which == 1, -math.inf).masked_fill(which == 2, 40)
    return k.to(dtype), v.to(dtype), gate.to(dtype), torch.randn(2, B, KV, D, generator=source, dtype=torch.float64).float()


shapes = st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(1, 3), st.integers(1, 4))  # B, T, KV, D


@law(100)
@given(shapes, dtypes, st.booleans(), st.booleans(),
       st.lists(st.tuples(st.integers(1, 70), st.sampled_from([memory_loop, memory_scan, memory_step])), max_size=6), seeds)
def test_loop_scan_and_steps_are_one_memory(shape, dtype, extreme, with_state, pieces, seed):
    """In pieces of any form and length, the state carried from one to the next, with the gradients of all that goes in."""
    inputs = [x.requires_grad_() for x in memory_inputs(*shape, seed, dtype, extreme)]
    k, v, gate, state = inputs
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    carried, out, t = state if with_state else None, [], 0
    while t < shape[1]:
        length, form = pieces.pop() if pieces else (shape[1], memory_scan)
        now = slice(t, t + 1 if form is memory_step else t + length)
        k_mem, v_mem, carried = form(k[:, now], v[:, now], gate[:, now], carried)
        out.append(torch.stack([k_mem, v_mem]))
        t = now.stop
    out = torch.cat(out, dim=2)
    expected = memory_loop(*doubles[:3], doubles[3] if with_state else None)
    assert out.dtype == dtype and carried.dtype == torch.promote_types(dtype, torch.float32)
    atol = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 3e-2}[dtype]
    assert_close(out.double(), torch.stack(expected[:2]), atol, what="k~, v~")
    assert_close(carried.double(), expected[2], min(atol, 1e-5), what="state")
    weights = [torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for x in (out, expected[2])]
    mine = (out.double() * weights[0]).sum() + (carried.double() * weights[1]).sum()
    ref = (torch.stack(expected[:2]) * weights[0]).sum() + (expected[2] * weights[1]).sum()
    wanted = 4 if with_state else 3
    for what, d, d_ref in zip(("dk", "dv", "dgate", "dstate"), torch.autograd.grad(mine, inputs[:wanted]), torch.autograd.grad(ref, doubles[:wanted])):
        assert_close(d.double(), d_ref, atol * (5 + d_ref.abs().max().item()) if dtype != torch.float64 or what != "dstate" else 1e-5, what=what)


@law(100)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(1, 40), st.booleans(), seeds)
def test_scan_is_its_recurrence(sizes, T, sign, seed):
    """For any dims behind B, T, and factors beyond a gate's; and what goes in stays as it was."""
    source = torch.Generator().manual_seed(seed)
    g, b = (torch.randn(sizes[0], T, *sizes[1:], generator=source, dtype=torch.float64) for _ in "gb")
    g = g if sign else torch.sigmoid(g)
    before, m, expected = (g.clone(), b.clone()), torch.zeros_like(b[:, 0]), []
    for t in range(T):
        m = g[:, t] * m + b[:, t]
        expected.append(m)
    expected = torch.stack(expected, dim=1)
    assert_close(scan(g, b), expected, atol=1e-12 * (1 + expected.abs().max().item()))
    assert torch.equal(g, before[0]) and torch.equal(b, before[1])


@law(40)
@given(shapes, seeds, st.sampled_from([0.1, 1, 4]), st.integers(-4, 4))
def test_effective_length_is_the_mean_age_by_its_weights(shape, seed, spread, shift):
    """The weight of token s in m[t] is (1 - g[s]) g[s+1] ... g[t]: one product after the other."""
    B, T, KV, D = shape
    gate = (memory_inputs(*shape, seed)[2] * spread / 4 + shift).float()
    g, total = torch.sigmoid(gate.double()), torch.zeros(KV, D, dtype=torch.float64)
    for t in range(T // 2, T):
        weight = torch.stack([torch.sigmoid(-gate[:, s].double()) * g[:, s + 1:t + 1].prod(1) for s in range(t + 1)])
        age = torch.arange(t, -1, -1, dtype=torch.float64).view(-1, 1, 1, 1)
        total += ((weight * age).sum(0) / weight.sum(0)).sum(0)
    assert_close(effective_length(gate).double(), 1 + total / (B * (T - T // 2)), atol=1e-4 * T)


@law(10)
@given(configs(), st.integers(1, 3), st.integers(1, 30), seeds)
@torch.no_grad()
def test_lengths_of_measures_the_gates_of_each_layer(config, B, T, seed):
    """Another layer's gate, or one that the model does not use; a hook that stays."""
    model, tokens, logits = tiny(**config | dict(memory=True)), draw_tokens(B, T, seed), []
    D = model.config.head_width
    hooks = [layer.self_attn.memory.proj.register_forward_hook(lambda module, inputs, y: logits.append(y)) for layer in model.layers]
    before = model(tokens)
    for hook in hooks:
        hook.remove()
    with lengths_of(model) as found:
        assert torch.equal(model(tokens), before)
    model(tokens)
    assert len(found) == len(logits) == model.config.n_layer
    for length, gate in zip(found, logits):
        assert_close(length, effective_length(gate.unflatten(2, (-1, D))))


@law(60)
@given(st.integers(0, 12), st.integers(1, 32), heads, seeds)
def test_arl_passes_read_themselves_and_the_ends_of_chunks(length, T, heads, seed):
    """Then everything. Of length 0 nothing but that."""
    *sparse_passes, last = arl_passes(length)
    assert last is None and len(sparse_passes) == (length > 0)
    q, k, v, _ = one_hot_inputs(1, T, *heads, seed)
    for method in sparse_passes:
        y, _ = method.prefill(q, k, v, 0, None)
        for t, h in torch.cartesian_prod(torch.arange(T), torch.arange(heads[0])).tolist():
            ends = [j for j in range(t) if (j + 1) % length == 0]
            assert_close(y[0, t, h].double(), equation_4(q[0, t, h], k[0, :, h * heads[1] // heads[0]], ends + [t]), 1e-5)


# ---------------------------------------------------------------- the methods

D = 32  # of one_hot_inputs, and the most entries there


def one_hot_inputs(B, T, H, KV, seed, dtype=torch.float32):
    """q, k, v, dice. Entry j's value is 1 in channel j and else 0, so that attention's output is what a query reads of each entry."""
    q, k, _, dice = draw(B, T, H, KV, D, seed)
    return q.to(dtype), k.to(dtype), torch.eye(T, D, dtype=dtype)[None, :, None].expand(B, T, KV, D).contiguous(), dice


def reads(dilated, i, j):
    """Whether Dilated's query at i reads the key at j."""
    return j <= i and (i - j <= dilated.local or j < dilated.initial or (dilated.dilation is not None and (j + 1) % dilated.dilation == 0))


def equation_4(q, k, entries):
    """(D,), (T, D), a list -> the weight of each entry, (D,) as one_hot_inputs make it."""
    weight = torch.zeros(D, dtype=torch.float64)
    weight[entries] = torch.softmax(k[entries].double() @ q.double() / math.sqrt(D), 0)
    return weight


ATOL = {torch.float32: 1e-5, torch.float64: 1e-5, torch.bfloat16: 2e-2}


@law(120)
@given(methods, heads, st.integers(1, D), st.lists(st.integers(0, D), min_size=1, max_size=2), st.booleans(), dtypes, seeds)
def test_prefill_reads_what_it_reports_and_no_more(method, heads, T, starts, one_start, dtype, seed):
    """By Eq. 4, of the entries it selected, up to its own. Measured, not believed: a value that only one entry has."""
    (H, KV), B = heads, len(starts)
    q, k, v, dice = one_hot_inputs(B, T, H, KV, seed, dtype)
    starts = [starts[0] % T] * B if one_start else [start % T for start in starts]
    Tq, by = T - max(starts), phases(method).prefill_by
    chunk = torch.stack([q[b, start:start + Tq] for b, start in enumerate(starts)])
    y, selected = method.prefill(chunk, k, v, starts[0] if one_start else torch.tensor(starts), dice[:, :Tq])
    assert y.dtype == dtype and y.shape == chunk.shape
    for b, t, h in torch.cartesian_prod(*map(torch.arange, (B, Tq, H))).tolist():
        slot = starts[b] + t
        entries = list(range(slot + 1))
        if isinstance(by, Dilated):
            entries = [j for j in entries if reads(by, slot, j)]
        elif isinstance(by, MoBA):
            entries = [j for j in entries if j // by.block_size in selected[b, h * KV // H, t].tolist()]
            assert len(entries) <= by.budget and slot in entries
        else:
            assert selected is None
        assert y[b, t, h].nonzero()[:, 0].tolist() == entries
        assert_close(y[b, t, h].double(), equation_4(chunk[b, t, h], k[b, :, h * KV // H], entries), ATOL[dtype])


@law(120)
@given(methods, heads, st.integers(1, D), st.lists(st.integers(1, D), min_size=1, max_size=2), dtypes, junk.filter(math.isfinite), seeds)
def test_decode_reads_what_it_reports_and_no_more(method, heads, T, used, dtype, junk, seed):
    """The same of a step. What lies in slots that no entry fills, if it is finite, as a cache sees to it, and how many there are, is nothing to it."""
    (H, KV), B, by = heads, len(used), phases(method).decode_by
    used = [min(n, T) for n in used]
    q, k, v, dice = one_hot_inputs(B, T, H, KV, seed, dtype)
    empty, n = torch.arange(T) >= torch.tensor(used)[:, None], max(used)
    spoiled = [x.masked_fill(empty[..., None, None], junk) for x in (k, v)]
    results = [method.decode(q[:, -1:], LayerCache(x[:, :room], y[:, :room], torch.tensor(used), True, dice[:, -1:], None))
               for x, y, room in ((k, v, T), (*spoiled, T), (k, v, n))]
    for y, selected in results:
        assert_close(y, results[0][0], ATOL[dtype] if dtype == torch.bfloat16 else 1e-6)
        for b, h in torch.cartesian_prod(torch.arange(B), torch.arange(H)).tolist():
            entries = list(range(used[b]))
            if isinstance(by, (Dilated, Quest)):
                listed = sorted(j for j in selected[b, h * KV // H].tolist() if j >= 0)
                assert len(listed) <= by.budget if isinstance(by, Quest) else listed == [j for j in entries if reads(by, used[b] - 1, j)]
                entries = listed
            else:
                assert selected is None
            assert y[b, 0, h].nonzero()[:, 0].tolist() == entries
            assert_close(y[b, 0, h].double(), equation_4(q[b, -1, h], k[b, :, h * KV // H], entries), ATOL[dtype])


def group(h, heads):
    """The query heads of KV head h."""
    return range(h * heads[0] // heads[1], (h + 1) * heads[0] // heads[1])


@law(60)
@given(scored_quests, heads, st.integers(1, 40), st.integers(1, 40), seeds)
def test_quest_selects_by_equation_3(method, heads, T, used, seed):
    """s: the mean over a group's heads of a bound that no key of the block exceeds; the most are chosen, the forced ones among them."""
    used, size = min(used, T), method.block_size
    q, k, v, _ = draw(1, T, *heads, seed=seed)
    filled = torch.arange(T)[None] < used
    scores = method.score(q[:, -1:], k, filled)[0, :, 0]                                        # (KV, N)
    _, selected = method.decode(q[:, -1:], LayerCache(k, v, torch.tensor([used]), True, None, None))
    last = (used - 1) // size
    for h in range(heads[1]):
        bounds = {}
        for n in range(last + 1):
            block = k[0, n * size:min((n + 1) * size, used), h].tolist()
            bound = lambda x: sum(max(c * min(channel), c * max(channel)) for c, channel in zip(x, zip(*block)))
            asked = [q[0, -1, i].tolist() for i in group(h, heads)]
            bounds[n] = sum(map(bound, asked)) / len(asked)
            assert all(bound(x) >= sum(a * b for a, b in zip(x, key)) - 1e-6 for x in asked for key in block)
            assert scores[h, n].item() == pytest.approx(bounds[n], abs=1e-4)
        forced = ({0} if method.keep_first else set()) | ({last} if method.keep_current else set())
        assert_top(sorted({j // size for j in selected[0, h].tolist() if j >= 0}), bounds, forced, method.budget // size)


@law(60)
@given(scored_mobas, heads, st.integers(1, 24), st.integers(0, 20), seeds)
def test_moba_selects_by_equation_3(method, heads, Tq, start, seed):
    """s: a block's mean product of its keys with the group's queries."""
    size, T = method.block_size, start + Tq
    q, k, v, _ = draw(1, T, *heads, seed=seed)
    _, selected = method.prefill(q[:, start:], k, v, start, None)
    for t, h in torch.cartesian_prod(torch.arange(Tq), torch.arange(heads[1])).tolist():
        current, products = (start + t) // size, (q[0, start + t, group(h, heads)].double() @ k[0, :, h].double().T).mean(0)
        scores = {n: products[n * size:(n + 1) * size].mean().item() for n in range(current)} | {current: math.inf}
        assert_top([n for n in selected[0, h, t].tolist() if n >= 0], scores, {0, current} if method.keep_first else {current},
                   method.budget // size)


@law(60)
@given(scored_snapkvs, heads, st.lists(st.integers(1, 30), min_size=1, max_size=3), junk, seeds)
def test_snapkv_selects_by_equation_3(method, heads, lengths, junk, seed):
    """s: softmax attention of the last queries, averaged over them, the group, and neighbours. Junk behind a row's end is not seen."""
    B, T, W, half = len(lengths), max(lengths), method.window, method.kernel // 2
    q, k, v, _ = draw(B, T, *heads, seed=seed)
    last = torch.stack([q[b, [max(0, n - W + w) for w in range(W)]] for b, n in enumerate(lengths)])
    stored = k.masked_fill((torch.arange(T) >= torch.tensor(lengths)[:, None])[..., None, None], junk)
    kept = method.compress(last, stored, v, torch.tensor(lengths), None)
    for b, h in torch.cartesian_prod(torch.arange(B), torch.arange(heads[1])).tolist():
        n = lengths[b]
        attention = torch.zeros(n, dtype=torch.float64)
        for t in range(n - W, n) if n > W else ():
            products = q[b, t, group(h, heads)].double() @ k[b, :t + 1, h].double().T / math.sqrt(8)
            attention[:n - W] += products.softmax(-1).mean(0)[:n - W] / W
        pooled = {j: attention[max(0, j - half):j + half + 1].sum().item() / method.kernel for j in range(n)}
        positions = [j for j in kept[b, h].tolist() if j >= 0]
        assert positions == sorted(positions) and kept[b, h, len(positions):].eq(-1).all()
        assert_top(positions, pooled, set(range(max(0, n - W), n)), method.budget)


@law(60)
@given(st.builds(randomized, scored, st.integers(0, 9)), heads, st.integers(1, 40), st.integers(1, 40), seeds, seeds)
def test_chance_looks_at_no_key_and_no_query(method, heads, T, used, seed, other):
    """H2's selectors: what they choose follows from dice, seed and lengths."""
    used = min(used, T)
    n, chosen = torch.tensor([used, T]), []
    dice = draw(2, T, *heads, seed=seed)[3]
    for s in seed, other:
        q, k, v, _ = draw(2, T, *heads, seed=s)
        window = q[:, [max(0, T - 8 + w) for w in range(8)]]
        chosen.append([method.prefill(q, k, v, 0, dice)[1], method.compress(window, k, v, n, dice[:, -1:]),
                       method.decode(q[:, -1:], LayerCache(k, v, n, True, dice[:, -1:], None))[1]])
    assert same(*chosen) and sum(x is not None for x in chosen[0]) == 1


# ---------------------------------------------------------------- what they share

@law(80)
@given(heads, st.integers(1, 3), st.integers(1, 9), st.integers(1, 20), st.sampled_from([None, "causal", "per head", "for all heads"]), dtypes, seeds)
def test_attend_is_equation_4(heads, B, Tq, T, mask, dtype, seed):
    """With any mask that leaves something to read: of each head, for all, or none."""
    (H, KV), source = heads, torch.Generator().manual_seed(seed)
    Tq = T if mask == "causal" else Tq
    q, k, v = (torch.randn(B, t, h, 8, generator=source).to(dtype) for t, h in ((Tq, H), (T, KV), (T, KV)))
    shown = torch.ones(B, H, Tq, T, dtype=torch.bool)
    if mask == "causal":
        shown = shown.tril()
    elif mask is not None:
        shown = torch.rand(B, H if mask == "per head" else 1, Tq, T, generator=source) < 0.5
        shown[..., 0] |= ~shown.any(-1)
    y = attend(q, k, v, shown if mask and mask != "causal" else None, mask == "causal")
    k, v = (x.double().repeat_interleave(H // KV, dim=2) for x in (k, v))
    p = (torch.einsum("bthd,bshd->bhts", q.double(), k) / math.sqrt(8)).masked_fill(~shown, -math.inf).softmax(-1)
    assert y.dtype == dtype
    assert_close(y.double(), torch.einsum("bhts,bshd->bthd", p, v), {torch.float64: 1e-12}.get(dtype, 2 * ATOL[dtype]))


@law(60)
@given(heads, st.integers(1, 3), st.integers(1, 20), st.integers(1, 25), dtypes, seeds)
def test_attend_to_slots_is_attention_to_them(heads, B, T, S, dtype, seed):
    """Of each head its own, in any order, those of -1 not: the last one and the first are not read for them."""
    (H, KV), source = heads, torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, t, h, 8, generator=source).to(dtype) for t, h in ((1, H), (T, KV), (T, KV)))
    order = torch.rand(B, KV, T, generator=source).argsort(dim=-1)[..., :S]
    slots = order.where(torch.rand(order.shape, generator=source) < 0.6, -1)
    slots[..., -1] = order[..., -1]
    keep = torch.zeros(B, KV, T + 1, dtype=torch.bool).scatter(2, slots.where(slots >= 0, T), True)[..., :T]
    expected = attend(q, k, v, keep.repeat_interleave(H // KV, dim=1).unsqueeze(2))
    assert_close(attend_to_slots(q, k, v, slots), expected, 2 * ATOL[dtype])


@law(60)
@given(heads, st.lists(st.integers(1, 4), max_size=2), seeds)
def test_per_kv_head_is_the_mean_of_its_group(heads, rest, seed):
    """A group of every KV-th head instead of neighbours: SDPA's grouping is the other one."""
    scores = torch.randn(2, heads[0], *rest, generator=torch.Generator().manual_seed(seed))
    expected = torch.stack([scores[:, group(h, heads)].mean(1) for h in range(heads[1])], dim=1)
    assert_close(per_kv_head(scores, heads[1]), expected, 1e-6)


@law(200)
@given(st.lists(st.sampled_from([-math.inf, math.inf]) | st.integers(-3, 3), min_size=1, max_size=12), st.integers(1, 15))
def test_top_takes_the_best_that_may_be_had(scores, S):
    """Ties anyhow; -1 instead of what must never be selected, and instead of nothing else."""
    chosen = top(torch.tensor(scores, dtype=torch.float32)[None], S)[0].tolist()
    taken = [j for j in chosen if j >= 0]
    assert len(chosen) == min(S, len(scores)) and len(set(taken)) == len(taken)
    assert sorted(scores[j] for j in taken) == sorted(sorted((s for s in scores if s > -math.inf), reverse=True)[:S])


def splitmix64(x):
    """In Python's integers. As published, but that the last shift is left out: who asks takes bits 31 to 54."""
    x = (x ^ x >> 30) * 0x3F58476D1CE4E5B9 % 2**64
    return (x ^ x >> 27) * 0x14D049BB133111EB % 2**64


@law(100)
@given(st.lists(st.integers(-2**63, 2**63 - 1), min_size=1, max_size=4), st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 9))
def test_chance_is_its_hash(dice, seed, KV, N):
    """Of dice, seed, head and candidate alone: whoever else is asked at the same time, and however many candidates there are."""
    x = chance(torch.tensor([dice]), seed, KV, N)
    assert x.shape == (1, KV, len(dice), N) and x.dtype == torch.float32
    for h, t, n in torch.cartesian_prod(*map(torch.arange, (KV, len(dice), N))).tolist():
        start = (dice[t] + (seed * KV + h) * 0x632BE59BD9B4E019 + n * 0x1E3779B97F4A7C15) % 2**64
        assert x[0, h, t, n].item() == (splitmix64(start) >> 31) % 2**24 / 2**24
    one = torch.tensor(dice)[:, None]
    assert torch.equal(chance(one, seed, KV, N)[:, :, 0], x[0].transpose(0, 1))
    assert torch.equal(chance(one, seed, KV, N + 7)[..., :N], chance(one, seed, KV, N))


@law(40)
@given(st.integers(-2**62, 2**62), st.integers(-2**40, 2**40).filter(bool), st.integers(0, 2**31), st.integers(1, 4))
def test_chance_is_uniform(first, step, seed, KV):
    """By Kolmogorov and Smirnov, over dice any step apart: more than 3 / sqrt(n) off happens once in 30 million times."""
    x = chance(first + step * torch.arange(100)[None], seed, KV, 20).flatten().sort().values.double()
    n = len(x)
    off = torch.maximum((torch.arange(1, n + 1) / n - x).max(), (x - torch.arange(n) / n).max()).item()
    assert off < 3 / math.sqrt(n)


HOOKS = "prefill", "compress", "decode"
DECIDES = {Dense: "", Quest: "decode", MoBA: "prefill", SnapKV: "compress", Dilated: "prefill decode"}


@law(150)
@given(st.lists(st.just(Dense()) | selectors | dilateds, max_size=4))
def test_compose_gives_each_hook_to_who_decides_it(parts):
    """In any order; two that decide the same are refused, and a pattern of positions after some are gone."""
    deciders = {hook: [part for part in parts if hook in DECIDES[type(part)]] for hook in HOOKS}
    if any(len(some) > 1 for some in deciders.values()) or (deciders["compress"] and any(isinstance(part, Dilated) for part in parts)):
        with pytest.raises(ValueError):
            compose(*parts)
        return
    both = compose(*parts)
    assert both == compose(*parts[::-1]) == phases(both)
    for hook in HOOKS:
        assert getattr(both, f"{hook}_by") == (deciders[hook] or [Dense()])[0]
    windows = [part.window for part in parts if isinstance(part, SnapKV)]
    assert drops(both) == bool(windows) and window_of(both, None) == max([64, *windows])
    for part in parts:
        assert phases(part) == compose(part) and drops(part) == isinstance(part, SnapKV)
    assert phases(None) == Compose() and not drops(None)


@law(150)
@given(methods | st.builds(compose, st.just(Dense()) | selectors | dilateds), st.integers(1, 9999), seeds)
def test_a_name_reads_back_as_what_it_names(method, context, seed):
    """In all phases; and `randomized` changes the seed of a method that has scores, and nothing else."""
    assert phases(parse(name(method), context)) == phases(method)
    if isinstance(method, (Quest, MoBA, SnapKV)):
        drawn = randomized(method, seed)
        assert drawn.random == seed and replace(drawn, random=method.random) == method
        assert phases(parse(name(drawn), context)) == phases(drawn)
    else:
        with pytest.raises(ValueError):
            randomized(method, seed)


@law(100)
@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 9999))
def test_a_fraction_is_of_the_context(numerator, denominator, context):
    """Exactly, or refused."""
    text = f"dilated:local={numerator}/{denominator}"
    if numerator * context % denominator:
        with pytest.raises(ValueError):
            parse(text, context)
    else:
        assert parse(text, context) == Dilated(local=numerator * context // denominator)


pieces = st.sampled_from(["dense", "quest", "moba", "snapkv", "dilated", ":", ",", "=", "+", " ", "²", "/", "-", "budget", "block_size", "window", "kernel",
                          "local", "random", "keep_first", "dilation", "0", "1", "2", "16", "64", "256", "1/16", "true", "none"])
shown = st.text(st.characters(exclude_categories=["C", "Z"]), max_size=8)  # no line ends


@law(300)
@given(st.lists(pieces, max_size=12).map("".join) | shown | shown.map("quest:budget={}".format))
def test_parse_takes_or_refuses_any_text(text):
    """Refuses by a ValueError of one line of its own, never by another error."""
    try:
        method = parse(text, 4096)
    except ValueError as error:
        assert "\n" not in str(error) and "invalid literal" not in str(error)
    else:
        assert phases(parse(name(method), 4096)) == phases(method)


# ---------------------------------------------------------------- the loss

@law(100)
@given(st.integers(1, 50), st.integers(1, 16), st.integers(1, 40), st.integers(1, 2000), st.sampled_from(["fp32", "bf16", "autocast"]),
       st.floats(-4, 4), junk, seeds)
def test_weighted_loss_is_cross_entropy(N, C, V, most, how, scale, junk, seed):
    """With the gradients of x and the head, however many tokens go together; weighted_score is the same sum, and counts what is right."""
    source = torch.Generator().manual_seed(seed)
    dtype = torch.bfloat16 if how == "bf16" else torch.float32
    x, head = (torch.randn(n, C, generator=source).to(dtype) for n in (N, V))
    target, weight = torch.randint(V, (N,), generator=source), torch.rand(N, generator=source)
    weight = weight.masked_fill(torch.rand(N, generator=source) < 0.3, 0)
    uncounted = (weight == 0)[:, None]
    x64, head64, x, head = (t.requires_grad_() for t in (x.double().masked_fill(uncounted, 0), head.double(), x.masked_fill(uncounted, junk), head))
    ref = (F.cross_entropy(F.linear(x64, head64), target, reduction="none") * weight).sum()
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        patch.setattr(loss, "CHUNK_LOGITS", most)
        assert [t for part in loss.chunks(N, V) for t in range(N)[part]] == list(range(N))
        assert all((part.stop - part.start) * V <= max(most, V) for part in loss.chunks(N, V))
        ours, (score, right) = loss.weighted_loss(x, head, target, weight), loss.weighted_score(x, head, target, weight)
    rounding = 1e-5 if how == "fp32" else 3e-2
    size = weight.sum().item() + rounding
    assert ours.dtype == torch.float32 and abs(ours.item() - ref.item()) <= rounding * size * 3
    assert abs(score.item() - ref.item()) <= rounding * size * 3
    for what, mine, expected in zip(("dx", "dhead"), torch.autograd.grad(scale * ours, (x, head)), torch.autograd.grad(scale * ref, (x64, head64))):
        assert mine.dtype == dtype
        assert_close(mine.double(), expected, rounding * (0.1 + abs(scale) * 3 + expected.abs().max().item()), what=what)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):  # of a tie in bf16 too
        likeliest = F.linear(x, head).float().argmax(-1)
    assert right.item() == pytest.approx(weight[likeliest == target].double().sum().item())
