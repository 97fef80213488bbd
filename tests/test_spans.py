"""
Where an answer stands, in tokens: under tokenizers that normalise, put a space in front, end tokens
inside characters, or have encode and decode alone. The truth is what a span's tokens decode to.
"""
import json
import unicodedata
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from tempfile import mkdtemp
from types import SimpleNamespace

import pytest
import tokenizers
from hypothesis import assume, given, settings, strategies as st
from tokenizers import decoders, normalizers, pre_tokenizers

import niah
from conftest import refused
from infra.tokenizers import ByteTokenizer, get_tokenizer, pieces
from test_niah import ASKED, Bytes, Pairs, cl100k, queries_of
from test_tokenizers import NASTY, TEXT, train_bpe, train_llama


def byte_ends(tokenizer, ids):
    """How many bytes of text come before each token, and in all."""
    return [0, *accumulate(map(len, pieces(tokenizer, ids)))]


def encode_and_decode(tokenizer, name="own"):
    """All that a user's own tokenizer may have."""
    return SimpleNamespace(name=name, n_vocab=tokenizer.n_vocab, eos_id=tokenizer.eos_id,
                           encode=tokenizer.encode, decode=tokenizer.decode)


def bpe(normalizer=None):
    return get_tokenizer(train_bpe(Path(mkdtemp()), "gpt2", normalizer))


def hugging_face(normalizer=None, add_prefix_space=False):
    """A tokenizer of Hugging Face as a user would wrap it."""
    inner = tokenizers.Tokenizer.from_file(str(train_bpe(Path(mkdtemp()), "gpt2", normalizer)))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    inner.decoder = decoders.ByteLevel()
    return SimpleNamespace(name="hf", n_vocab=inner.get_vocab_size(), eos_id=0,
                           encode=lambda text: inner.encode(text, add_special_tokens=False).ids,
                           decode=lambda ids: inner.decode(ids, skip_special_tokens=True))


def writes(tokenizer, text):
    """Whether no character loses a byte: SmolLM2 lacks some, of characters yet to be assigned."""
    return "\ufffd" in text or "\ufffd" not in tokenizer.decode(tokenizer.encode(text))


OURS = {
    "bytes": ByteTokenizer, "bpe": bpe, "bpe NFC": lambda: bpe(normalizers.NFC()),
    "smollm2": lambda: get_tokenizer(train_bpe(Path(mkdtemp()), "smollm2")),
    "llama": lambda: get_tokenizer(train_llama(Path(mkdtemp()))),
    "metaspace": lambda: get_tokenizer(train_llama(Path(mkdtemp()), metaspace=True))}
ALL = OURS | {
    "own bytes": Bytes, "own pairs": Pairs, "own cl100k": cl100k,
    "own bpe NFC": lambda: encode_and_decode(made("bpe NFC")),
    "own llama": lambda: encode_and_decode(made("llama")),
    "hf NFC": lambda: hugging_face(normalizers.NFC()),
    "hf space in front": lambda: hugging_face(add_prefix_space=True)}
made = lru_cache(lambda name: ALL[name]())
each = pytest.mark.parametrize("name", ALL)
any_text = TEXT | st.sampled_from(NASTY)
FRENCH = unicodedata.normalize(
    "NFD", "Le café était très célèbre à Genève, où l’été naît tôt. 🙂 ﬁn. " * 300)


@each
@pytest.mark.parametrize("haystack", [None, FRENCH], ids=["English", "French"])
def test_spans_hold_their_answers_whatever_the_tokenizer_does(name, haystack):
    """H1 looks there: off by one and every head misses; on a distractor and every one is blamed."""
    tokenizer = made(name)
    for n, task in enumerate(niah.TASKS):
        t, protocol = niah.TASKS[task], list(niah.PROTOCOLS)[n % 2]
        if haystack and t.haystack != "essay":
            continue
        e = niah.make_example(task, 2048, tokenizer, 1, n, protocol, haystack=haystack,
                              max_new_tokens=48)
        assert e.ids == tokenizer.encode(e.prompt)
        assert len(e.spans) == len(e.depth) == len(e.answers) == t.n_queries * t.n_values
        for (start, end), value in zip(e.spans, e.answers):
            assert 0 <= start < end <= len(e.ids)
            # the fewest tokens that hold the answer
            assert value in tokenizer.decode(e.ids[start:end])
            assert value not in tokenizer.decode(e.ids[start + 1:end])
            assert value not in tokenizer.decode(e.ids[start:end - 1])
            # in the needle of a key that is asked for
            needle = tokenizer.decode(e.ids[:end]).rsplit("One of the", 1)[1]
            assert any(f" for {key} is: {value}" in needle for key in queries_of(e))


@each
@settings(max_examples=60, deadline=None)
@given(before=any_text, after=any_text,
       answer=st.text("0123456789abcdef-", min_size=1, max_size=12))
def test_spans_hold_in_any_text(name, before, after, answer):
    """What the haystacks above forgot. A border that normalising moves is never another place."""
    tokenizer, before = made(name), f"{before} is: "
    text = before + answer + "." + after
    assume(writes(tokenizer, text))
    ids, place = tokenizer.encode(text), (len(before), len(before) + len(answer))
    (start, end), = niah.token_spans(text, ids, [place], tokenizer)
    assert answer in tokenizer.decode(ids[start:end])
    ends, raw = byte_ends(tokenizer, ids), b"".join(pieces(tokenizer, ids))
    stated = b"is: " + answer.encode() + b"."
    high = raw.index(stated, max(0, ends[start] - 4)) + len(stated) - 1
    assert ends[start] <= high - len(answer) < ends[start + 1]
    assert ends[end - 1] < high <= ends[end]


@each
@settings(max_examples=100, deadline=None)
@given(text=any_text)
def test_byte_ends_count_what_decode_gives(name, text):
    """A count of characters, or of half ones; one that goes back; an end token that counts."""
    tokenizer = made(name)
    assume(writes(tokenizer, text))
    ids = tokenizer.encode(text)
    ends, raw = byte_ends(tokenizer, ids), tokenizer.decode(ids).encode()
    assert len(ends) == len(ids) + 1 and ends[0] == 0 and ends == sorted(ends)
    assert ends[-1] == len(raw)
    for n, end in enumerate(ends):
        whole = raw[:end].decode(errors="ignore")
        if whole.encode() == raw[:end]:  # else the end is inside a character
            assert tokenizer.decode(ids[:n]).rstrip("\ufffd") == whole.rstrip("\ufffd")


@pytest.mark.parametrize("name", OURS)
@settings(max_examples=100, deadline=None)
@given(text=any_text.filter(lambda text: "\ufffd" not in text))
def test_encode_and_decode_alone_tell_the_bytes_of_each_token(name, text):
    """Without pieces() ends are the same, but inside characters, where they stay in the same."""
    tokenizer = made(name)
    assume(writes(tokenizer, text))
    ids = tokenizer.encode(text)
    found, known = (byte_ends(t, ids) for t in (encode_and_decode(tokenizer), tokenizer))
    borders = {0, *accumulate(len(c.encode()) for c in tokenizer.decode(ids))}
    of_character = lambda end: max(border for border in borders if border <= end)
    for one, other in zip(found, known, strict=True):
        inside = not {one, other} & borders and of_character(one) == of_character(other)
        assert one == other or inside
    assert all(low < high for low, high, i in zip(found, found[1:], ids) if tokenizer.decode([i]))


@pytest.mark.parametrize("name", OURS)
def test_end_tokens_and_unknown_ids_stand_for_no_bytes(name):
    """What a model generates: the end, ids that pad its vocabulary. They shift nothing."""
    tokenizer = made(name)
    alone, end = encode_and_decode(tokenizer), tokenizer.eos_id
    ids = tokenizer.encode("one two")
    ends = byte_ends(tokenizer, ids)
    for t in tokenizer, alone:
        odd = [end, *ids, tokenizer.n_vocab + 5, end]
        assert byte_ends(t, odd) == [0, *ends, ends[-1], ends[-1]]
    assert byte_ends(tokenizer, []) == [0]
    odd = [i for part in tokenizer.encode("one two 🙂 three") for i in (end, end, end, part)]
    known, found = byte_ends(tokenizer, odd), byte_ends(alone, odd)
    face = range(known[-1] - 9, known[-1] - 6)  # 🙂 has four bytes: three places inside it
    assert found == sorted(found)
    assert all(one == other or one in face and other in face for one, other in zip(known, found))


@pytest.mark.parametrize("decode", [
    lambda text: text.replace(" .", "."), lambda text: text[::-1],
    lambda text: f"{len(text)}: " + text, lambda text: text + "..." * (len(text) > 10)])
def test_a_tokenizer_whose_tokens_cannot_be_told_apart_is_refused(decode):
    """A decode that changes a token because of its neighbours: wrong places, and no remedy."""
    tokenizer = SimpleNamespace(name="mine", decode=lambda ids: decode(bytes(ids).decode()))
    refused(lambda: pieces(tokenizer, list(b"one . Two . three")), "tokenizer mine ",
            "give it pieces")


@pytest.mark.parametrize("name", ["bpe NFC", "hf NFC"])
def test_an_answer_that_the_tokenizer_cannot_write_is_said(tmp_path, name):
    """A model with this tokenizer can never give such an answer: its 0 says nothing of it."""
    file, nfd = tmp_path / "niah_single_1.jsonl", "cafe\u0301"
    row = {"index": 0, "input": f"{nfd} x for a is: {nfd}.{ASKED}", "outputs": [nfd]}
    file.write_text("\n" + json.dumps(row))
    refused(lambda: niah.read_jsonl(file, made(name)), "niah_single_1.jsonl line 2: tokenizer ",
            " cannot write")
    e, = niah.read_jsonl(file, ByteTokenizer())
    assert ByteTokenizer().decode(e.ids[slice(*e.spans[0])]) == nfd
    text = unicodedata.normalize("NFC", json.dumps(row, ensure_ascii=False))
    file.write_text(text, encoding="utf-8")
    e, = niah.read_jsonl(file, made(name))
    assert "café" in made(name).decode(e.ids[slice(*e.spans[0])])
