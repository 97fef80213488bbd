"""
Where an answer stands, in tokens: under tokenizers that normalise, put a space in front, end tokens inside characters,
or have encode and decode alone. The truth is what the tokens of a span decode to.
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
from hypothesis import given, settings, strategies as st
from tokenizers import decoders, normalizers, pre_tokenizers

import data
import niah
from infra.tokenizers import ByteTokenizer, pieces
from test_data import NASTY, TEXT, train_bpe, train_sentencepiece
from test_niah import Bytes, Pairs, cl100k


def byte_ends(tokenizer, ids):
    """How many bytes of text come before each token, and in all."""
    return [0, *accumulate(map(len, pieces(tokenizer, ids)))]


def encode_and_decode(tokenizer, name):
    """All that a user's own tokenizer may have."""
    return SimpleNamespace(name=name, n_vocab=tokenizer.n_vocab, eos_id=tokenizer.eos_id,
                           encode=tokenizer.encode, decode=tokenizer.decode)


def hugging_face(normalizer=None, add_prefix_space=False):
    """A tokenizer of Hugging Face as a user would wrap it."""
    folder = Path(mkdtemp())
    inner = tokenizers.Tokenizer.from_file(str(train_bpe(folder, "gpt2", normalizer)))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    inner.decoder = decoders.ByteLevel()
    return SimpleNamespace(name="hf", n_vocab=inner.get_vocab_size(), eos_id=0,
                           encode=lambda text: inner.encode(text, add_special_tokens=False).ids,
                           decode=lambda ids: inner.decode(ids, skip_special_tokens=True))


@lru_cache
def made(name):
    bpe = lambda normalizer=None: data.get_tokenizer(train_bpe(Path(mkdtemp()), "gpt2", normalizer))
    make = {
        "bytes": ByteTokenizer, "bpe": bpe, "bpe NFC": lambda: bpe(normalizers.NFC()),
        "sentencepiece": lambda: data.get_tokenizer(train_sentencepiece(Path(mkdtemp()))),
        "own bytes": Bytes, "own pairs": Pairs, "own cl100k": cl100k,
        "own bpe NFC": lambda: encode_and_decode(made("bpe NFC"), "own"),
        "own sentencepiece": lambda: encode_and_decode(made("sentencepiece"), "own"),
        "hf NFC": lambda: hugging_face(normalizers.NFC()),
        "hf space in front": lambda: hugging_face(add_prefix_space=True),
    }
    return make[name]()


OURS = "bytes", "bpe", "bpe NFC", "sentencepiece"
OWN = "own bytes", "own pairs", "own cl100k", "own bpe NFC", "own sentencepiece", "hf NFC", "hf space in front"
FRENCH = unicodedata.normalize("NFD", "Le café était très célèbre à Genève, où l’été naît tôt. 🙂 ﬁn. " * 300)


def assert_fewest(tokenizer, ids, span, answer):
    """The tokens of the span hold the answer, and without the first or the last of them they do not."""
    start, end = span
    assert 0 <= start < end <= len(ids)
    assert answer in tokenizer.decode(ids[start:end])
    assert answer not in tokenizer.decode(ids[start + 1:end])
    assert answer not in tokenizer.decode(ids[start:end - 1])


@pytest.mark.parametrize("name", OURS + OWN)
@pytest.mark.parametrize("task", ["niah_single_2", "niah_multivalue", "niah_multiquery"])
def test_spans_hold_their_answers_whatever_the_tokenizer_does_to_the_text(name, task):
    """Character offsets of the text applied to the tokens of another: needles told for wrong places, a search without an end."""
    tokenizer = made(name)
    for index in range(2):
        e = niah.make_example(task, 2048, tokenizer, 0, index, haystack=FRENCH, max_new_tokens=48)
        assert e.ids == tokenizer.encode(e.prompt) and len(e.spans) == len(e.answers)
        for span, answer in zip(e.spans, e.answers):
            assert_fewest(tokenizer, e.ids, span, answer)


ANSWER = st.text("0123456789abcdef-", min_size=1, max_size=12)


@pytest.mark.parametrize("name", OURS + OWN)
@settings(max_examples=60, deadline=None)
@given(before=TEXT | st.sampled_from(NASTY), after=TEXT | st.sampled_from(NASTY), answer=ANSWER)
def test_spans_hold_in_any_text(name, before, after, answer):
    """What the haystack above forgot. A border that the tokenizer's normaliser moves is said, never told for another place."""
    tokenizer, before = made(name), f"{before} is: "
    text = before + answer + "." + after
    ids = tokenizer.encode(text)
    (start, end), = niah.token_spans(text, ids, [(len(before), len(before) + len(answer))], tokenizer)
    assert answer in tokenizer.decode(ids[start:end])
    ends = byte_ends(tokenizer, ids)
    raw = b"".join(pieces(tokenizer, ids))
    high = raw.index(b"is: " + answer.encode() + b".", max(0, ends[start] - 4)) + 4 + len(answer)
    assert ends[start] <= high - len(answer) < ends[start + 1] and ends[end - 1] < high <= ends[end]


@pytest.mark.parametrize("name", OURS + OWN)
@settings(max_examples=100, deadline=None)
@given(text=TEXT | st.sampled_from(NASTY))
def test_byte_ends_count_what_decode_gives(name, text):
    """A length that is a count of characters, or of half characters; one that goes back; an end token that counts."""
    tokenizer = made(name)
    ids = tokenizer.encode(text)
    ends = byte_ends(tokenizer, ids)
    assert len(ends) == len(ids) + 1 and ends[0] == 0 and ends == sorted(ends)
    assert ends[-1] == len(tokenizer.decode(ids).encode())
    for n, end in enumerate(ends):
        whole = tokenizer.decode(ids).encode()[:end]
        if not whole.decode(errors="ignore").encode() == whole:
            continue  # inside a character
        assert tokenizer.decode(ids[:n]).rstrip("\ufffd").encode() == whole.decode().rstrip("\ufffd").encode()


@pytest.mark.parametrize("name", ["bytes", "bpe", "bpe NFC", "sentencepiece"])
@settings(max_examples=100, deadline=None)
@given(text=(TEXT | st.sampled_from(NASTY)).filter(lambda text: "\ufffd" not in text))
def test_encode_and_decode_alone_tell_the_bytes_of_each_token(name, text):
    """Without pieces() ends are those with it, but inside characters, where they stay inside the same."""
    tokenizer = made(name)
    ids = tokenizer.encode(text)
    told, known = (byte_ends(t, ids) for t in (encode_and_decode(tokenizer, "own"), tokenizer))
    decoded = tokenizer.decode(ids)
    borders = {0, *accumulate(len(c.encode()) for c in decoded)}
    of_character = lambda end: max(border for border in borders if border <= end)
    for one, other in zip(told, known, strict=True):
        assert one == other or not ({one, other} & borders) and of_character(one) == of_character(other)
    assert all(low < high for low, high, i in zip(told, told[1:], ids) if tokenizer.decode([i]))


def test_end_tokens_and_unknown_ids_stand_for_no_bytes():
    """What a model generates: the end, and ids that pad its vocabulary. They must not shift what follows."""
    for name in OURS:
        tokenizer = made(name)
        ids = tokenizer.encode("one two")
        odd = [tokenizer.eos_id, *ids, tokenizer.n_vocab + 5, tokenizer.eos_id]
        ends = byte_ends(tokenizer, ids)
        assert byte_ends(tokenizer, odd) == [0, *ends, ends[-1], ends[-1]]
        assert byte_ends(encode_and_decode(tokenizer, "own"), odd) == [0, *ends, ends[-1], ends[-1]]
        assert byte_ends(tokenizer, []) == [0]
        # sentencepiece's decode gives up a character that an end token cuts
        ids = tokenizer.encode("one two 🙂 three" if name != "sentencepiece" else "one two three")
        odd = [id for pair in zip(ids, 2 * len(ids) * [tokenizer.eos_id]) for id in 3 * pair[1:] + pair[:1]]
        known, told = (byte_ends(t, odd) for t in (tokenizer, encode_and_decode(tokenizer, "own")))
        face = range(known[-1] - 9, known[-1] - 6)  # 🙂 has four bytes: three places inside it
        assert all(one == other or one in face and other in face for one, other in zip(known, told)) and told == sorted(told)


@pytest.mark.parametrize("decode", [
    lambda ids: bytes(ids).decode(errors="replace").replace(" .", "."),
    lambda ids: bytes(ids).decode(errors="replace")[::-1],
    lambda ids: f"{len(ids)}: " + bytes(ids).decode(errors="replace"),
    lambda ids: bytes(ids).decode(errors="replace") + "..." * (len(ids) > 10)])
def test_a_tokenizer_whose_tokens_cannot_be_told_apart_is_refused(decode):
    """A decode that changes a token because of its neighbours: wrong places, rather than one line and the remedy."""
    tokenizer = SimpleNamespace(name="mine", encode=lambda text: list(text.encode()), decode=decode)
    with pytest.raises(ValueError, match="tokenizer mine .*give it pieces"):
        byte_ends(tokenizer, list(b"one . Two . three"))


@pytest.mark.parametrize("name", ["bpe NFC", "hf NFC"])
def test_an_answer_that_the_tokenizer_cannot_write_is_said(tmp_path, name):
    """A model with this tokenizer can never give such an answer: a score of 0 that says nothing of the model."""
    file, nfd = tmp_path / "niah_single_1.jsonl", "cafe\u0301"
    row = {"index": 0, "input": f"{nfd} x for a is: {nfd}.", "outputs": [nfd]}
    file.write_text("\n" + json.dumps(row))
    with pytest.raises(ValueError, match=r"niah_single_1\.jsonl line 2: tokenizer .* cannot write"):
        niah.read_jsonl(file, made(name))
    e, = niah.read_jsonl(file, ByteTokenizer())
    assert ByteTokenizer().decode(e.ids[slice(*e.spans[0])]) == nfd
    file.write_text(unicodedata.normalize("NFC", json.dumps(row, ensure_ascii=False)), encoding="utf-8")
    e, = niah.read_jsonl(file, made(name))
    assert "café" in made(name).decode(e.ids[slice(*e.spans[0])])
