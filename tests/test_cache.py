"""cache.py, and prefill, step and generate in model.py: an engine that gives what the plain path gives, in less time and space."""
import math

import pytest
import torch
from conftest import DEVICE, FORMS, assert_close, draw_tokens, one_line, tiny
from torch import nn

from triton_ops import backend
import engine
from sparse import Dense, Dilated, MoBA, Quest, SnapKV, compose, drops, name, parse

METHODS = ["dense", "quest:budget=6,block_size=2", "quest:budget=6,block_size=2,random=3", "moba:budget=6,block_size=2",
           "snapkv:budget=8,window=3", "snapkv:budget=8,window=3,random=2", "dilated:dilation=4,local=3,initial=1",
           "moba:budget=6,block_size=2+snapkv:budget=9,window=3+quest:budget=6,block_size=2"]
HEADS_OF_16 = dict(width=64, n_head=4)
LENGTHS = [45, 31, 7, 40, 1]
ALL = [Dense(), Quest(16, 8), MoBA(24, 8), SnapKV(20, 6), compose(MoBA(24, 8), SnapKV(20, 6), Quest(16, 8))]
methods = pytest.mark.parametrize("method", ALL, ids=name)
gpu = pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")


@torch.no_grad()
def by_the_book(model, tokens, n_new, lengths, method):
    """Greedy tokens from plain PyTorch: the prompt at once, then model() for each token; entries are dropped at the first."""
    cache = model.new_cache(len(tokens), tokens.shape[1] + n_new)
    x = model(tokens, lengths, cache, method)
    new = [(x[:, -1] if lengths is None else x[torch.arange(len(x)), lengths - 1]).argmax(-1)]
    while len(new) < n_new:
        new.append(model(new[-1][:, None], cache=cache, sparse=method)[:, -1].argmax(-1))
    return torch.stack(new, dim=1)


@pytest.mark.parametrize("B", [1, 5])
@pytest.mark.parametrize("form", ["olmo2", "gqa memory", *(["memory", "gqa", "ratplus"] if DEVICE == "cuda" else [])])
@pytest.mark.parametrize("text", METHODS)
def test_generate_gives_the_tokens_of_the_plain_path(text, form, B, monkeypatch):
    """A fused step, a graph, an early compression or a part of a batch that is not what it replaces."""
    n_new = 40 if DEVICE == "cuda" else 4  # the interpreter takes a second a step
    model, method = tiny(**HEADS_OF_16 | FORMS[form]).to(DEVICE), parse(text, 64)
    tokens = draw_tokens(B, 13, seed=B).to(DEVICE)
    lengths = torch.tensor([13, 9, 3, 12, 1], device=DEVICE) if B > 1 else None
    monkeypatch.setattr(backend, "choice", "torch")
    expected = by_the_book(model, tokens, n_new, lengths, method)
    monkeypatch.setattr(backend, "choice", "triton")
    monkeypatch.setattr(engine, "TOGETHER", 40)  # three rows at a time
    assert torch.equal(model.generate(tokens, n_new, lengths, sparse=method), expected)


@methods
@pytest.mark.parametrize("whole", [True, False])
def test_parts_of_a_batch_are_the_batch(method, whole, monkeypatch):
    """A row's state, queries or slots written to another row's."""
    model, tokens, lengths = tiny(**FORMS["gqa memory"]), draw_tokens(5, 45), torch.tensor(LENGTHS)
    caches, logits = [], []
    for together in 10**6, 100:
        monkeypatch.setattr(engine, "TOGETHER", together)
        caches.append(model.new_cache(5, 60))
        logits.append(model.prefill(tokens, lengths, caches[-1], method, whole=whole))
        logits.append(model.decode(logits[-1], caches[-1], 8, method))
    assert_close(logits[2], logits[0])
    assert torch.equal(logits[3], logits[1])
    one, parts = caches
    assert torch.equal(one.used, parts.used) and torch.equal(one.lengths, parts.lengths)
    assert (one.filled, one.slots) == (parts.filled, parts.slots)
    for i in range(2):
        for b, used in enumerate(one.used.tolist()):
            assert_close(parts.k[i][b, :used], one.k[i][b, :used], what="keys")
        assert_close(parts.state[i], one.state[i], what="memory state")


@pytest.mark.parametrize("method", [SnapKV(20, 6), SnapKV(20, 6, random=1), ALL[-1]], ids=name)
def test_a_whole_prompt_is_compressed_as_one_that_may_go_on(method):
    """Other entries kept because the layer was compressed early, or a place in the cache that is off by some."""
    model, tokens, lengths = tiny(**FORMS["gqa memory"]), draw_tokens(3, 45), torch.tensor([45, 30, 9])
    early, late = model.new_cache(3, 60), model.new_cache(3, 60)
    logits = model.prefill(tokens, lengths, early, method, whole=True)
    assert_close(model.prefill(tokens, lengths, late, method), logits)
    late.compress(method)
    assert torch.equal(early.used, late.used) and (early.filled, early.slots) == (late.filled, late.slots)
    for i in range(2):
        assert torch.equal(early.positions[i], late.positions[i]) and torch.equal(early.k[i], late.k[i]) and torch.equal(early.v[i], late.v[i])


@torch.no_grad()
def test_a_second_chunk_in_parts_has_the_room_of_its_own_rows(monkeypatch):
    """A part that claims slots from the fullest row of another part on."""
    model, tokens = tiny(**FORMS["memory"]), draw_tokens(2, 70)
    logits = []
    for together in 10**6, 20:
        monkeypatch.setattr(engine, "TOGETHER", together)
        cache = model.new_cache(2, 60)
        model.prefill(tokens[:, :50], torch.tensor([50, 10]), cache)
        logits.append(model.prefill(tokens[:, 50:], torch.tensor([5, 20]), cache))
        assert cache.filled == 55 and cache.used.tolist() == [55, 30]
    assert_close(logits[1], logits[0])


@pytest.mark.parametrize("who", ["torch", "triton"])
def test_a_second_chunk_whose_padding_reaches_past_all_entries(who, monkeypatch):
    """Rows of a part that hold fewer entries than the chunk has columns: kernels that want a slot for each query."""
    model, tokens, method = tiny(**HEADS_OF_16 | FORMS["gqa memory"]).to(DEVICE), draw_tokens(2, 23).to(DEVICE), MoBA(24, 8)
    monkeypatch.setattr(backend, "choice", who)
    monkeypatch.setattr(engine, "TOGETHER", 20)  # a row at a time
    cache, lengths = model.new_cache(2, 60), lambda *n: torch.tensor(n, device=DEVICE)
    model.prefill(tokens[:, :3], lengths(3, 2), cache, method)
    logits = model.prefill(tokens[:, 3:], lengths(5, 20), cache, method)
    monkeypatch.setattr(backend, "choice", "torch")
    assert_close(logits[:1], model.prefill(tokens[:1, :8], None, model.new_cache(1, 60), method), 1e-4)


def test_padding_takes_no_room():
    """A cache that is full because of columns in which no row has a token."""
    model, tokens, lengths = tiny(**FORMS["gqa memory"]), draw_tokens(2, 45), torch.tensor([30, 20])
    for method in ALL:
        for whole in True, False:
            cache = model.new_cache(2, 40)
            new = model.decode(model.prefill(tokens, lengths, cache, method, whole=whole), cache, 11, method)
            assert torch.equal(new, model.generate(tokens, 11, lengths, sparse=method))


def test_a_prompt_that_does_not_fit_changes_nothing(monkeypatch):
    """The first part of a batch fed, the second refused, and a cache that calls itself empty."""
    monkeypatch.setattr(engine, "TOGETHER", 40)  # a row at a time
    model, tokens = tiny(**FORMS["memory"]), draw_tokens(2, 40)
    for lengths in torch.tensor([10, 35]), None:
        cache = model.new_cache(2, 30)
        with pytest.raises(ValueError, match="larger max_len"):
            model.prefill(tokens, lengths, cache)
        assert cache.filled == 0 and not any(x.any() for x in (cache.lengths, cache.used, cache.token_hash, *cache.state))


def entries(cache):
    return [len(x[0]) for x in (*cache.k, *cache.v) if x is not None]


def test_snapkv_never_holds_a_whole_prompt(monkeypatch):
    """Storage that is small in the end only."""
    model, tokens, most = tiny(), draw_tokens(2, 50), []
    cache = model.new_cache(2, 60)
    monkeypatch.setattr(type(cache), "room", lambda self, i, slots, room=type(cache).room: most.append(slots) or room(self, i, slots))
    model.prefill(tokens, None, cache, SnapKV(20, 6), whole=True)
    assert set(most) == {20 + 10} and entries(cache) == [30] * 4
    late = model.new_cache(2, 60)
    model.prefill(tokens, None, late)
    assert entries(late) == [60] * 4
    late.compress(SnapKV(20, 6))
    assert entries(late) == [30] * 4, "not given back"


@methods
def test_a_turn_forgets_what_was_decoded(method):
    """One setting of a comparison that leaks into the next: another memory state, an entry too many, bounds of the other's blocks."""
    model, tokens, lengths = tiny(**FORMS["gqa memory"]), draw_tokens(3, 45), torch.tensor([45, 30, 9])
    cache, fresh = model.new_cache(3, 60), model.new_cache(3, 60)
    logits = model.prefill(tokens, lengths, cache)
    before = [x.clone() for x in (cache.lengths, cache.used, cache.token_hash, *cache.state)]
    answers = []
    for _ in range(2):
        for one in method, Quest(24, 4):
            with cache.turn(one) as own:
                answers.append(model.decode(logits, own, 8, one))
    assert torch.equal(answers[0], answers[2]) and torch.equal(answers[1], answers[3])
    for x, old in zip((cache.lengths, cache.used, cache.token_hash, *cache.state), before):
        assert torch.equal(x, old)
    model.prefill(tokens, lengths, fresh)
    assert torch.equal(model.decode(logits, fresh, 8, method), answers[0])


def test_a_turn_forgets_what_was_asked():
    """SnapKV that chooses by another turn's question."""
    model, document, question = tiny(**FORMS["gqa memory"]), draw_tokens(2, 40), draw_tokens(2, 9, seed=7)
    cache, fresh, method = model.new_cache(2, 60), model.new_cache(2, 60), SnapKV(20, 6)
    for one in cache, fresh:
        model.prefill(document, None, one)
    with cache.turn(Quest(24, 4)) as own:
        model.decode(model.prefill(question, None, own), own, 5, Quest(24, 4))
    for n in 0, 3:  # fewer tokens than the window
        for one in cache, fresh:
            n and model.prefill(question[:, -n:], None, one)
        chosen, expected = (one.compressed(method).positions for one in (cache, fresh))
        assert all(torch.equal(a, b) for a, b in zip(chosen, expected, strict=True))


def test_what_is_compressed_leaves_the_cache_and_serves_again():
    """A prompt that is lost to its first setting; new tensors, and so a new graph, for each batch."""
    model, method = tiny(**FORMS["gqa memory"]), SnapKV(20, 6)
    cache, places = model.new_cache(2, 60), set()
    for seed in 1, 2:
        tokens = draw_tokens(2, 40, seed)
        logits = model.prefill(tokens, None, cache)
        copy = cache.compressed(method)
        places.add(copy.k[0].data_ptr())
        assert entries(cache) == [60] * 4 and entries(copy) == [40] * 4 and cache.filled == 40 and copy.filled == 20
        assert torch.equal(model.decode(logits, copy, 6, method), model.generate(tokens, 6, sparse=method))
        cache.clear()
    assert len(places) == 1


@methods
def test_a_cleared_cache_is_a_new_one(method):
    """A prompt that reads its predecessor's entries, or inherits its memory."""
    model, cache = tiny(**FORMS["gqa memory"]), None
    for seed, lengths in (1, [45, 30]), (2, [20, 33]):
        tokens, lengths = draw_tokens(2, max(lengths), seed), torch.tensor(lengths)
        cache = cache or model.new_cache(2, 60)
        cache.clear()
        new = model.decode(model.prefill(tokens, lengths, cache, method), cache, 8, method)
        assert torch.equal(new, model.generate(tokens, 8, lengths, sparse=method))


def test_wrong_uses_are_clear_errors():
    """Entries dropped in the middle of an answer, silently kept, or dropped where they should come back."""
    model, tokens = tiny(), draw_tokens(2, 30)
    cache = model.new_cache(2, 60)
    logits = model.prefill(tokens, None, cache)
    with pytest.raises(ValueError) as raised:
        model.prefill(tokens, None, cache, whole=True)
    one_line(raised, "whole")
    for lengths in None, torch.tensor([30, 20, 10]):
        with pytest.raises(ValueError) as raised:
            model.prefill(draw_tokens(3, 30), lengths, cache)
        one_line(raised, 3, 2, "new_cache")
    with pytest.raises(ValueError) as raised, cache.fork().rewinding() as fork:
        model.decode(logits, fork, 3, SnapKV(20, 6))
    one_line(raised, "compressed")
    model.decode(logits, cache, 3)
    with pytest.raises(ValueError) as raised:
        model.decode(logits, cache, 3, SnapKV(20, 6))
    one_line(raised, "snapkv", "first decoding step")
    with pytest.raises(ValueError) as raised:
        cache.compressed(SnapKV(20, 6))
    one_line(raised, "snapkv", "first decoding step")
    for wrong in model.new_cache(2, 60), cache.fork():
        if wrong.filled:
            wrong.clear()
            model.prefill(tokens, None, wrong, SnapKV(20, 6), whole=True)
        with pytest.raises(ValueError) as raised:
            wrong.compressed(SnapKV(20, 6))
        one_line(raised, "snapkv", "whole prompt")
    for whole in True, False:
        with pytest.raises(ValueError, match="compressed"), model.new_cache(2, 60).rewinding() as large:  # a budget that keeps all
            model.decode(model.prefill(tokens, None, large, SnapKV(40, 6), whole=whole), large, 3, SnapKV(40, 6))
    for settings in dict(whole=True), dict(watch=print):
        with pytest.raises(ValueError, match="need a cache"):
            model.prefill(tokens, **settings)
    with pytest.raises(ValueError, match="no tokens"):
        model.prefill(tokens[:, :0], cache=model.new_cache(2, 60))
    for lengths in [0, 8], [31, 8], [-1, 8], [0, 0], [3, 3, 3]:
        for cache in None, model.new_cache(2, 60):
            with pytest.raises(ValueError) as raised:
                model.prefill(tokens, torch.tensor(lengths), cache)
            one_line(raised, f"lengths={lengths}")
    for wrong in dict(temperature=-1), dict(temperature=math.nan), dict(temperature=math.inf), dict(top_k=0), dict(max_new_tokens=0):
        with pytest.raises(ValueError) as raised:
            model.generate(tokens, **dict(max_new_tokens=2) | wrong)
        one_line(raised, *(f"{key}={value}" for key, value in wrong.items()))
    cache = model.new_cache(2, 60)
    logits = model.prefill(tokens, None, cache, SnapKV(20, 6), whole=True)
    with pytest.raises(ValueError) as raised:
        model.decode(logits, cache.fork(), 3, SnapKV(10, 6))
    one_line(raised, "budget=10", "budget=20")
    with pytest.raises(ValueError) as raised:
        model.prefill(tokens, None, cache, Dilated(4, 3, 1))
    one_line(raised, "dilated", "snapkv", "every position")
    model.decode(logits, cache, 3, compose(SnapKV(20, 6), Quest(16, 8)))


def test_a_row_may_have_no_tokens_in_a_later_chunk():
    """Entries of padding, or a memory that decays while a row waits."""
    model, tokens = tiny(**FORMS["gqa memory"]), draw_tokens(2, 30)
    cache = model.new_cache(2, 60)
    first = model.prefill(tokens[:, :20], None, cache)
    second = model.prefill(tokens[:, 20:], torch.tensor([10, 0]), cache)
    new = model.decode(torch.stack([second[0], first[1]]), cache, 8)
    assert torch.equal(new, model.generate(tokens, 8, torch.tensor([30, 20])))
    with cache.turn(None) as own:
        model.decode(second, own, 2)


def test_watch_sees_each_step_and_each_layer_of_the_prompt():
    """Reads counted for some of the steps."""
    model, seen, reads = tiny(), [], []
    cache = model.new_cache(2, 60)
    logits = model.prefill(draw_tokens(2, 30), None, cache, MoBA(24, 8), watch=lambda i, selected, real: seen.append((i, selected.shape[2])))
    assert seen == [(0, 30), (1, 30)]
    model.decode(logits, cache, 5, Quest(16, 8), watch=lambda cache: reads.append([(x >= 0).sum(-1).max().item() for x in cache.selected]))
    assert len(reads) == 4 and all(0 < n <= 16 for step in reads for n in step)


# ---------------------------------------------------------------- turns of a batch

@pytest.mark.parametrize("who", ["torch", *(["triton"] if DEVICE == "cuda" else [])])
@methods
def test_the_next_turn_of_a_row_is_the_one_it_would_have_alone(method, who, monkeypatch):
    """A row that has ended its answer and is fed its end token again and again, while it waits for the others."""
    monkeypatch.setattr(backend, "choice", who)
    model, source = tiny(**HEADS_OF_16 | FORMS["gqa memory"]).to(DEVICE), torch.Generator().manual_seed(3)
    first, second = ([torch.randint(0, 61, (n,), generator=source).to(DEVICE) for n in sizes] for sizes in ((9, 25, 14), (4, 7, 3)))

    def padded(rows):
        return nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor([len(row) for row in rows], device=DEVICE)

    def turns(rows, end):
        """Two answers of each row. The second is to all of the first but what its last token has not been fed."""
        cache, answers = model.new_cache(len(rows), 100), []
        for asked in zip(*rows):
            if answers:
                asked = [torch.cat([answer[-1:], question]) for answer, question in zip(answers[-1], asked)]
            logits = model.prefill(*padded(asked), cache)
            new = model.decode(logits, cache, 12, method if len(answers) else Quest(24, 8), eos_id=end)
            answers.append([row[:(row == end).nonzero()[0, 0] + 1] if (row == end).any() else row for row in new])
            fed = [sum(map(len, (*parts, *(answer[b] for answer in answers)))) - 1
                   for b, parts in enumerate(zip(*[[row[i] for row in rows] for i in range(len(answers))]))]
            assert cache.lengths.tolist() == fed
        return [[answer.tolist() for answer in row] for row in zip(*answers)]

    if drops(method):
        method = Quest(32, 8)  # entries are dropped once, before the first answer: there is no second prompt to drop of
    pairs = list(zip(first, second))
    end = model.generate(first[0][None], 12)[0, 2].item()  # what the first row writes third
    together = turns(pairs, end)
    assert len({len(row[0]) for row in together}) > 1, "all end at once: nothing is tested"
    for pair, answers in zip(pairs, together):
        assert turns([pair], end)[0] == answers


# ---------------------------------------------------------------- what fails

def everything(cache):
    """What a cache tells of the tokens that it holds."""
    held = [x[b, :n].clone() for x in (*cache.k, *cache.v) if x is not None for b, n in enumerate(cache.used.tolist())]
    queries = [x.clone() for x in cache.recent_q if x is not None]
    numbers = cache.filled, cache.ragged, cache.decoding, cache.slots, cache.kept_by, cache.spoiled
    return numbers, [cache.lengths.clone(), cache.used.clone(), cache.token_hash.clone(), *held, *queries, *(x.clone() for x in cache.state)]


class Stop(BaseException):
    """As ctrl-C: no Exception."""


@pytest.mark.parametrize("error", [MemoryError, Stop])
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("together", [10**6, 100], ids=["at once", "in parts"])
@methods
def test_a_prompt_that_fails_leaves_the_cache_as_it_was(method, together, layer, error, monkeypatch):
    """A cache that counts tokens which only some layers have seen, and a second try that stands behind them."""
    monkeypatch.setattr(engine, "TOGETHER", together)
    model, tokens, lengths = tiny(**FORMS["gqa memory"]), draw_tokens(5, 45), torch.tensor(LENGTHS)
    calls = []

    def fail(i, selected, real):
        calls.append(i)
        if i == layer and len(calls) > (2 if together == 100 else 0):  # in parts: not in the first one
            raise error("say")

    for start, whole in (0, True), (0, False), (20, False):
        cache, right = model.new_cache(5, 60), model.new_cache(5, 60)
        if start:
            for one in cache, right:
                model.prefill(tokens[:, :start], lengths.clamp(max=start), one, method)
        before = everything(cache)
        calls.clear()
        with pytest.raises(error):
            model.prefill(tokens[:, start:], (lengths - start).clamp(min=0), cache, method, whole=whole, watch=fail)
        after = everything(cache)
        assert after[0] == before[0] and all(map(torch.equal, after[1], before[1]))
        logits = [model.prefill(tokens[:, start:], (lengths - start).clamp(min=0), one, method, whole=whole) for one in (cache, right)]
        assert torch.equal(*logits)
        assert torch.equal(*(model.decode(logits[0], one, 6, method) for one in (cache, right)))


class Failing(Quest):
    """A method of one's own that fails in the second layer of a step."""
    calls = []

    def decode(self, q, cache):
        self.calls.append(1)
        if len(self.calls) == 4:
            raise MemoryError("say")
        return super().decode(q, cache)


def test_a_step_that_fails_spoils_the_cache_until_it_is_cleared():
    """A memory that one layer has moved on and another has not, and answers from it as if nothing had been."""
    model, tokens, method = tiny(**FORMS["gqa memory"]), draw_tokens(2, 30), Failing(16, 8)
    cache = model.new_cache(2, 60)
    logits = model.prefill(tokens, None, cache)
    with cache.turn(Quest(16, 8)) as own:
        expected = model.decode(logits, own, 6, Quest(16, 8))
    Failing.calls.clear()
    with pytest.raises(MemoryError), cache.turn(method) as own:
        model.decode(logits, own, 6, method)
    with cache.turn(Quest(16, 8)) as own:  # what began as a turn is forgotten whole
        assert torch.equal(model.decode(logits, own, 6, Quest(16, 8)), expected)

    Failing.calls.clear()
    with pytest.raises(MemoryError):
        model.decode(logits, cache, 6, method)
    uses = {"step": lambda: model.step(tokens[:, 0], cache), "prefill": lambda: model.prefill(tokens, None, cache),
            "parts": lambda: model.prefill(tokens[:, :1], None, cache), "turn": lambda: cache.turn(Quest(16, 8)).__enter__(),
            "turn of what is kept": lambda: cache.turn(SnapKV(20, 6)).__enter__(), "fork": lambda: model.step(tokens[:, 0], cache.fork())}
    for what, use in uses.items():
        with pytest.raises(ValueError) as raised:
            use()
        one_line(raised, "half-way", "clear it")
    cache.clear()
    assert torch.equal(model.decode(model.prefill(tokens, None, cache), cache, 6, Quest(16, 8)), expected)


@pytest.mark.parametrize("where", ["norm", "head"])
@pytest.mark.parametrize("together", [10**6, 20], ids=["at once", "in parts"])
def test_what_fails_behind_the_layers_counts_too(where, together, monkeypatch):
    """No memory for the logits, the largest tensor: a cache that holds tokens whose logits nobody has seen."""
    monkeypatch.setattr(engine, "TOGETHER", together)
    model, tokens = tiny(**FORMS["gqa memory"]), draw_tokens(2, 30)
    cache, right = model.new_cache(2, 60), model.new_cache(2, 60)
    part = model.norm if where == "norm" else model
    name = "forward" if where == "norm" else "head"

    def failing():
        patch = pytest.MonkeyPatch()
        patch.setattr(part, name, lambda x: (_ for _ in ()).throw(MemoryError("say")))
        return patch
    for start in 0, 15:
        patch = failing()
        with pytest.raises(MemoryError):
            model.prefill(tokens[:, start:start + 15], None, cache)
        patch.undo()
        logits = [model.prefill(tokens[:, start:start + 15], None, one) for one in (cache, right)]
        assert torch.equal(*logits)
    patch = failing()
    with pytest.raises(MemoryError):
        model.step(tokens[:, 0], cache)
    patch.undo()
    with pytest.raises(ValueError, match="half-way"):
        model.step(tokens[:, 0], cache)


def test_a_row_that_ends_at_once_is_compressed_with_the_others():
    """A row that has written its end token first, before the others' first step drops entries, its own too."""
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


def test_a_wrong_step_is_refused_before_anything_happens():
    """A cache spoiled by a mistake that could be seen before."""
    model, tokens = tiny(**FORMS["gqa memory"]), draw_tokens(2, 30)
    cache = model.new_cache(2, 31)
    logits = model.prefill(tokens, None, cache)
    model.step(tokens[:, 0], cache)
    before = everything(cache)
    for wrong in lambda: model.step(tokens[:, 0], cache), lambda: model.step(tokens[:, 0], cache, SnapKV(10, 6)):
        with pytest.raises(ValueError):
            wrong()
    with pytest.raises(ValueError) as raised:
        model.decode(logits, cache, 3)
    one_line(raised, "larger max_len")
    after = everything(cache)
    assert after[0] == before[0] and all(map(torch.equal, after[1], before[1]))


def test_decoding_without_room_begins_nothing():
    """Tokens that were written, and lost when the cache was full."""
    model, tokens, seen = tiny(**FORMS["memory"]), draw_tokens(1, 30), []
    for method in None, SnapKV(20, 6):
        cache = model.new_cache(1, 34)
        logits = model.prefill(tokens, None, cache)
        with pytest.raises(ValueError) as raised:
            model.decode(logits, cache, 6, method, watch=seen.append)
        one_line(raised, "34", "35", "max_len")
        assert not seen
        assert model.decode(logits, cache, 5, method).shape == (1, 5)


def test_seeds_of_one_budget_share_a_compressed_cache():
    """H2 with five seeds at 7B: a cache kept for each of them, and no memory left."""
    model, tokens = tiny(**FORMS["gqa memory"]), draw_tokens(2, 40)
    cache = model.new_cache(2, 60)
    logits = model.prefill(tokens, None, cache)
    methods = [SnapKV(20, 6), *(SnapKV(20, 6, random=seed) for seed in range(3)), SnapKV(30, 6)]
    for method in methods:
        with cache.turn(method) as own:
            assert torch.equal(model.decode(logits, own, 4, method), model.generate(tokens, 4, sparse=method))
    assert len(cache.compressed_by) == 2


# ---------------------------------------------------------------- on a GPU

@gpu
@methods
def test_a_steady_loop_captures_nothing(method, monkeypatch):
    """A graph for each prompt, or for each step."""
    captured = []
    init = engine.Graph.__init__
    monkeypatch.setattr(engine.Graph, "__init__", lambda self, *args: captured.append(1) or init(self, *args))
    model = tiny(**HEADS_OF_16 | FORMS["gqa memory"]).to(DEVICE)
    cache = model.new_cache(5, 80)
    for seed in range(4):
        tokens = draw_tokens(5, 45, seed).to(DEVICE)
        logits = model.prefill(tokens, torch.tensor(LENGTHS, device=DEVICE), cache)
        with cache.turn(method) as own:
            model.decode(logits, own, 12, method)
        cache.clear()
        assert len(captured) == 1


@gpu
def test_graphs_of_several_methods_share_a_cache():
    """A graph that replays into what another has moved, or with its bounds; a report of what another one read."""
    model = tiny(**HEADS_OF_16 | FORMS["gqa memory"]).to(DEVICE)
    cache = model.new_cache(2, 120)
    for seed in range(3):
        tokens = draw_tokens(2, 80, seed).to(DEVICE)
        logits = model.prefill(tokens, None, cache)
        for method in Dense(), Quest(32, 8), Quest(48, 16), Quest(32, 8):
            read = []
            watch = lambda cache: read.append([None if x is None else int((x >= 0).sum(-1).max()) for x in cache.selected])
            with cache.turn(method) as own:
                assert torch.equal(model.decode(logits, own, 20, method, watch=watch), model.generate(tokens, 20, sparse=method))
            assert len(read) == 19 and all(n is None if type(method) is Dense else 0 < n <= method.budget for step in read for n in step)
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
def test_methods_may_alternate_without_turns():
    """Block bounds that another method's graph did not keep up to date, taken for current."""
    model, tokens = tiny(**HEADS_OF_16 | FORMS["gqa memory"]).to(DEVICE), draw_tokens(1, 60).to(DEVICE)
    order = [Dense()] * 3 + [Quest(16, 8)] * 3 + [Dense()] * 9 + [Quest(16, 8)] * 3 + [Quest(12, 4)] * 3 + [Quest(16, 8)] * 3
    new = draw_tokens(1, len(order), seed=3).to(DEVICE)
    logits = []
    for eager in True, False:
        cache = model.new_cache(1, 120)
        model.prefill(tokens, None, cache)
        step = (lambda token, cache, method: model(token[:, None], cache=cache, sparse=method)[:, -1]) if eager else model.step
        with torch.no_grad():
            logits.append(torch.stack([step(new[:, i], cache, method).clone() for i, method in enumerate(order)]))
    assert_close(logits[1], logits[0], atol=1e-4)
