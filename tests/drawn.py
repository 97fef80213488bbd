"""
What hypothesis draws for the laws: tiny models, methods, and what happens to a batch of texts.

A law holds for every model, method, length and cut. Nobody chooses the cases, and the one that
fails is the smallest that does. CI takes a fixed sample of them, pytest --slow ten times as many,
new ones each time.

Two runs that must agree add in another order, and a selection among scores that are closer than
rounding may then differ: `decisive` draws anew where one is.
"""
import math
from contextlib import contextmanager

import pytest
import torch
from hypothesis import HealthCheck, assume, settings, strategies as st

import engine
import sparse
from conftest import LLAMA_FORM, QWEN2_FORM, QWEN3_FORM, RATPLUS_FORM, STRETCH, times
from sparse import Dense, Dilated, MoBA, Quest, SnapKV, compose, drops, phases, top


def law(examples):
    return settings(max_examples=times(examples, 10 * examples), derandomize=times(True, False),
                    deadline=None, database=None, suppress_health_check=list(HealthCheck))


@contextmanager
def decisive():
    """
    Draws the example anew if a selection within is nearly a tie: the last one in and the first one
    out are 1e-5 of the scores apart.
    """
    clear = []

    def watched(scores, S):
        if S < scores.shape[-1]:
            ordered = scores.double().sort(dim=-1, descending=True).values
            gap = ordered[..., S - 1] - ordered[..., S]  # infinite or NaN: one of them is forced
            size = ordered.masked_fill(ordered.isinf(), 0).abs().amax(-1)
            clear.append(not bool((gap.isfinite() & (gap <= 1e-5 * size)).any()))
        return top(scores, S)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse, "top", watched)
        yield
    assume(all(clear))


# ---------------------------------------------------------------- numbers, methods, models

seeds = st.integers(0, 2**31 - 1)
dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])
exact = st.sampled_from([torch.float32, torch.float64])
junk = st.sampled_from([0, -77, 1e4, math.inf, math.nan])  # what may stand where nothing counts
heads = st.sampled_from([(1, 1), (2, 2), (2, 1), (4, 4), (4, 2), (4, 1), (6, 2), (7, 1)])  # H, KV

sizes, few = st.sampled_from([1, 2, 3, 4, 8]), st.integers(0, 3)
seed_or_none = st.none() | few
quests = st.builds(
    lambda size, more, first, current, seed:
        Quest((max(1, first + current) + more) * size, size, first, current, seed),
    sizes, few, st.booleans(), st.booleans(), seed_or_none)
mobas = st.builds(
    lambda size, more, first, seed: MoBA((1 + first + more) * size, size, first, seed),
    sizes, few, st.booleans(), seed_or_none)
snapkvs = st.builds(
    lambda window, more, kernel, seed: SnapKV(window + more, window, kernel, seed),
    st.integers(1, 8), st.integers(1, 12), st.sampled_from([1, 3, 5]), seed_or_none)
dilateds = st.builds(Dilated, st.sampled_from([None, 1, 2, 3, 4, 5, 7, 9]),
                     st.just(0) | st.integers(0, 9), st.integers(0, 4))
selectors = quests | mobas | snapkvs
combinations = (st.builds(compose, mobas, quests) | st.builds(compose, mobas, snapkvs)
                | st.builds(compose, snapkvs, quests) | st.builds(compose, mobas, snapkvs, quests))
kinds = [st.just(Dense()), quests, mobas, snapkvs, dilateds, combinations]
methods = st.sampled_from(kinds).flatmap(lambda kind: kind)  # each kind as often


@st.composite
def configs(draw):
    """Settings of a tiny model."""
    (H, KV), D = draw(heads), draw(st.sampled_from([8, 16]))
    families = [{}, RATPLUS_FORM, LLAMA_FORM | dict(rope_scaling=STRETCH), QWEN2_FORM, QWEN3_FORM]
    form = draw(st.sampled_from(families))
    form = form | dict(memory=form is RATPLUS_FORM or draw(st.booleans()))
    return form | dict(n_layer=draw(st.integers(1, 2)), n_head=H, n_kv_head=KV, width=H * D,
                       tied=draw(st.booleans()), seed=draw(seeds))


# ---------------------------------------------------------------- what happens to a batch

ROOM = 60  # tokens of a row, and room of a cache: 30 + 3 * 7 + 2 is the longest talk


@st.composite
def talks(draw):
    """
    Turns of a batch, a list: tokens per row of a prompt, or of a chunk of one; None: a decoding
    step. [[9, 4], [0, 3], None] is a prompt of 9 tokens beside one of 4, which has 3 more in a
    second chunk, and a step.
    """
    B = draw(st.integers(1, 3))
    rows = lambda low, high: st.lists(st.integers(low, high), min_size=B, max_size=B)
    chunk = rows(0, 7).map(lambda turn: turn if any(turn) else [1] * B)
    later = draw(st.lists(chunk | st.none(), max_size=3))
    return [draw(rows(1, 30)), *later, *[None] * draw(st.integers(0, 2))]


@torch.no_grad()
def told(
    model,
    rows,           # (B, ROOM)  tokens
    turns,          # as talks draws them
    method=None,
    whole=False,    # and
    together=10**6,  # tokens: how prefill goes about it
    behind=None,    # put, after each turn, into slots that hold no entry
    padding=0,      # seed of what pads the rows, and how much of it there is
):                  # -> logits (turns, B, V) after each, of a turn without tokens the last; cache
    window = getattr(phases(method).compress_by, "window", 5)
    cache, out = model.new_cache(len(rows), ROOM, window), []
    source, done = torch.Generator().manual_seed(padding), [0] * len(rows)
    for turn in turns:
        if turn is None:
            turn = [1] * len(rows)
            token = torch.stack([row[n] for row, n in zip(rows, done)])
            logits = model.step(token, cache, method)
        else:
            shape = len(rows), max(turn) + padding % 3
            tokens = torch.randint(61, shape, generator=source)
            for b, n in enumerate(turn):
                tokens[b, :n] = rows[b][done[b]:done[b] + n]
            full = min(turn) == shape[1] and padding % 2 == 0
            lengths = None if full else torch.tensor(turn)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(engine, "tokens_together", lambda *_: together)
                logits = model.prefill(tokens, lengths, cache, method, whole=whole and not out)
        out.append(torch.stack([logits[b] if n else out[-1][b] for b, n in enumerate(turn)]))
        done = [have + n for have, n in zip(done, turn)]
        assert cache.lengths.tolist() == done
        assert drops(method) or cache.filled == cache.used.max()
        for x in (*cache.k, *cache.v) if behind is not None else ():
            x[torch.arange(x.shape[1]) >= cache.used[:, None]] = behind
    return torch.stack(out), cache
