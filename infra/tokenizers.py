"""
Text to tokens and back: the tokenizers, and which of them belongs to a model.

    encode(text)    ids, in which special tokens spelled in the text are plain text
    decode(ids)     text, which skips ids that stand for no text
    pieces(ids)     the bytes of each id, which join to the text: a token may end in a character
    n_vocab, eos_id, and name: at most 24 characters, which tell two tokenizers apart
    files           {name in a model's folder: the file that was read}: what a model's copy needs

A model of bytes needs no file. A Hugging Face tokenizer.json is run by tiktoken where that gives
the very same ids (OLMo 2, GPT-2, Llama 3, Qwen), and by Hugging Face's `tokenizers`, needed only
then, where it does not (SmolLM2, LLaMA). tests/test_tokenizers.py holds both to `tokenizers`.
data.py turns texts into shards of these tokens, niah.py asks where in them an answer stands.
"""
import hashlib
import json
import os
import re
import sys
import unicodedata
from os.path import commonprefix
from pathlib import Path

import tiktoken

from infra.files import read_json, short
from infra.spelling import check_type

# ---------------------------------------------------------------- bytes


class ByteTokenizer:
    """Ids 0..255 are bytes and 256 ends a document."""
    name, n_vocab, eos_id, files = "bytes", 257, 256, {}

    def encode(self, text):
        check_type(text, str, "a tokenizer encodes text")
        return list(text.encode("utf-8", errors="replace"))

    def decode(self, ids):
        return b"".join(self.pieces(ids)).decode("utf-8", errors="replace")

    def pieces(self, ids):
        return [bytes([i]) if i < 256 else b"" for i in ids]


# ---------------------------------------------------------------- tokenizer.json

AGAIN, MOST = "download it again", 2**31  # ids are below it
ENDS = "<|endoftext|>", "</s>", "<|end_of_text|>"  # of text, where no tokenizer_config.json tells


class JsonTokenizer:
    """A Hugging Face tokenizer.json, by Tiktoken or else by HuggingFace. ValueError if damaged."""

    def __init__(self, path):
        def check(ok, field, found, remedy=AGAIN):
            if not ok:
                raise ValueError(f"{path}: {field} is {short(found)}: {remedy}")

        path = Path(path)
        spec = read_json(path, AGAIN, most=64 << 20)  # OLMo 2's has 3 MB, Gemma's 33
        model = spec.get("model") if isinstance(spec, dict) else None
        check(isinstance(model, dict), "model", model)
        check(not model.get("dropout"), "model.dropout", model.get("dropout"),
              "set it to null, or a text would have other ids each time")
        if isinstance(model.get("merges"), list):
            # Older files write "a b", later ones ["a", "b"].
            model["merges"] = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
        vocab = model.get("vocab")
        if isinstance(vocab, list):  # a Unigram's, [token, score] in the order of ids
            vocab = {str(*entry[:1]): i for i, entry in enumerate(vocab) if type(entry) is list}
        numbers = vocab.values() if vocab and isinstance(vocab, dict) else [None]
        check(all(type(i) is int and 0 <= i < MOST for i in numbers), "model.vocab", vocab)
        tokens = spec.get("added_tokens") or []
        check(isinstance(tokens, list), "added_tokens", tokens)
        # `tokenizers` reads no ids there: tokens of the model keep theirs, others follow the model.
        following, added = iter(range(len(vocab), MOST)), {}
        for token in tokens:
            text = token.get("content") if isinstance(token, dict) else None
            check(text and isinstance(text, str), "one of added_tokens", token)
            expected = vocab[text] if text in vocab else next(following)
            check(token.get("id") == expected and text not in added,
                  f"what added_tokens has where the id should be {expected}", token)
            added[text] = expected
        ids = (vocab | added).values()
        check(len(set(ids)) == len(ids), "the number of ids, one of which comes twice,", len(ids))
        if token := in_front(spec.get("post_processor")):
            print(f"note: {path} puts {short(token)} in front of every text, and here none is put",
                  file=sys.stderr)
        self.files, eos = end_of_text(path, added)
        self.n_vocab, self.eos_id = 1 + max(ids), added[eos]
        try:
            self.engine = Tiktoken(spec, vocab, added)
        except NotReproducible as why:
            self.engine = HuggingFace(spec, path, why)
        # All that ids depend on, and the end of text: two files of one tokenizer have one name.
        identity = repr((*self.engine.identity, eos)).encode()
        self.name = f"{self.engine.kind}-{self.n_vocab}-{hashlib.sha256(identity).hexdigest()[:8]}"
        self.encode, spell = self.engine.encode, self.engine.spell
        self.bytes_of = {i: spell(token) for token, i in vocab.items()}
        self.bytes_of |= {token["id"]: b"" if token.get("special") else
                          token["content"].encode(errors="replace") for token in tokens}

    def decode(self, ids):
        return b"".join(self.pieces(ids)).decode("utf-8", errors="replace")

    def pieces(self, ids):
        found = [self.bytes_of.get(i, b"") for i in ids]
        first = next((n for n, piece in enumerate(found) if piece), None)
        if self.engine.strip and first is not None:
            found[first] = found[first].removeprefix(b" ")
        return found


def in_front(processor):
    """The token that a tokenizer.json's post_processor puts before each text; None: it does not."""
    match processor:
        case {"type": "Sequence", "processors": [*steps]}:
            return next(filter(None, map(in_front, steps)), None)
        case {"single": [{"SpecialToken": {"id": str(token)}}, *_]}:
            return token


def end_of_text(path, added):
    """-> the files read, and the token that a tokenizer_config.json names, or the first of ENDS"""
    files, config, eos = {"tokenizer.json": path}, path.with_name("tokenizer_config.json"), None
    # The config speaks of the folder's tokenizer.json. Of a file called otherwise it does so only
    # where there is none.
    alone = path.name == "tokenizer.json" or not path.with_name("tokenizer.json").exists()
    if alone and config.exists():
        files[config.name] = config
        found = read_json(config, AGAIN)
        eos = found.get("eos_token") if isinstance(found, dict) else found
        eos = eos.get("content") if isinstance(eos, dict) else eos  # both forms exist
    eos = eos or next((end for end in ENDS if end in added), ENDS[0])
    if not isinstance(eos, str) or eos not in added:
        where = config if alone else "tokenizer_config.json, in a folder of their own"
        raise ValueError(f"{path}: added_tokens has no {short(eos)}; name the end of text as "
                         f"eos_token in {where}")
    return files, eos


# GPT-2 spells each byte as one visible character ("Ġ" is the space): {character: byte}.
VISIBLE = [*range(0x21, 0x7f), *range(0xa1, 0xad), *range(0xae, 0x100)]
HIDDEN = [b for b in range(256) if b not in VISIBLE]
ALPHABET = {chr(b): b for b in VISIBLE} | {chr(256 + i): b for i, b in enumerate(HIDDEN)}


def of_byte_level(token):
    return bytes(map(ALPHABET.get, token)) if ALPHABET.keys() >= {*token} else token.encode()


def of_llama(token):
    of_byte = re.fullmatch("<0x([0-9A-Fa-f]{2})>", token)
    return bytes.fromhex(of_byte[1]) if of_byte else token.replace("▁", " ").encode()


# ---------------------------------------------------------------- by tiktoken

# The patterns that cut text, which tiktoken's regex engine and Hugging Face's match alike. What
# comes before SPACES looks ahead nowhere, so as one atomic group tiktoken matches it with a quicker
# engine. Nothing follows that group within a match, so it matches the same.
SPACES = r"|\s+(?!\S)|\s+"
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+" + SPACES
SPLIT_PATTERNS = [r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + digits
                  + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+" + SPACES
                  for digits in ("{1,3}", "")]  # of OLMo 2 and Llama 3; of Qwen


def spelled(pre_tokenizer):
    """Its JSON, without what changes no ids."""
    text = json.dumps(pre_tokenizer, sort_keys=True)
    return re.sub(r'"trim_offsets": (true|false), |, "use_regex": true', "", text)


# GPT-2's pattern is inside ByteLevel. A Split before it has two ways to say: keep the matches.
BYTE_LEVEL = dict(type="ByteLevel", add_prefix_space=False)
PATTERNS = {spelled(step): GPT2_PATTERN for step in (
    BYTE_LEVEL, dict(type="Sequence", pretokenizers=[BYTE_LEVEL]))} | {
    spelled(dict(type="Sequence", pretokenizers=[
        dict(type="Split", pattern={"Regex": pattern}, behavior=behavior, invert=invert),
        BYTE_LEVEL | {"use_regex": False}])): pattern
    for pattern in SPLIT_PATTERNS for behavior, invert in (("Removed", True), ("Isolated", False))}

# tiktoken's regex engine overflows its stack on about a million spaces in a row, so long texts go
# through in slices. A slice ends where these patterns always split, before a space or after a line,
# so the ids are the same. Only 400,000 characters without such a place are cut anywhere.
SLICE = re.compile(r"(?s).{1,400000}(?:\Z|(?<=\S)(?= )|(?<=\S\n)(?=\S))|.{1,400000}")


class NotReproducible(Exception):
    """Why tiktoken would give other ids than a tokenizer.json says."""


def require(ok, field, found):
    if not ok:
        raise NotReproducible(f"{field} is {short(found)}")


class Tiktoken:
    """The byte-level BPE of OLMo 2, GPT-2, Llama 3, Qwen. NotReproducible for all others."""
    kind, spell, strip = "bpe", staticmethod(of_byte_level), False

    def __init__(self, spec, vocab, added):
        model, normalizer = spec["model"], spec.get("normalizer")
        # Files from before there were other models name none.
        require(model.get("type", "BPE") == "BPE", "model.type", model.get("type"))
        for field in ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
            require(not model.get(field), f"model.{field}", model.get(field))
        require(normalizer in (None, {"type": "NFC"}), "normalizer", normalizer)
        pattern = PATTERNS.get(spelled(spec.get("pre_tokenizer")))
        require(pattern, "pre_tokenizer", spec.get("pre_tokenizer"))

        # Those that match in text, as OLMo 2's |||EMAIL_ADDRESS|||. Special ones do not, but hide
        # what overlaps with them. The longest comes first.
        self.nfc, tokens = bool(normalizer), spec.get("added_tokens") or []
        self.in_text = {t["content"]: added[t["content"]] for t in tokens if not t.get("special")}
        odd = [t for t in tokens if type(t.get("special")) is not bool or any(
            t.get(flag) is not False for flag in ("normalized", "lstrip", "rstrip", "single_word"))]
        require(not self.in_text or not odd, "added_tokens' list of other than plain ones", odd)
        among = sorted(added if self.in_text else (), key=len, reverse=True)
        self.marks = re.compile("|".join(map(re.escape, among)) or r"(?!)")

        # ignore_merges: a word that is in the vocabulary is that token, even a special one.
        require(not model.get("ignore_merges") or not added.keys() & vocab.keys(),
                "model.ignore_merges, with added_tokens in model.vocab,", True)
        vocab = {token: i for token, i in vocab.items() if token not in added}
        check_merges(model.get("merges"), vocab)
        ranks = {of_byte_level(token): i for token, i in vocab.items()}
        self.identity = (pattern, self.nfc, sorted(ranks.items()), sorted(added.items()),
                         sorted(self.in_text))
        self.bpe = tiktoken.Encoding(
            "tokenizer.json", pat_str=f"(?>{pattern.removesuffix(SPACES)}){SPACES}",
            mergeable_ranks=ranks, special_tokens={})

    def encode(self, text):
        ids, start = [], 0
        for match in self.marks.finditer(text):
            if match[0] in self.in_text:
                ids += self.plain(text[start:match.start()]) + [self.in_text[match[0]]]
                start = match.end()
        return ids + self.plain(text[start:])

    def plain(self, text):
        text = unicodedata.normalize("NFC", text) if self.nfc else text
        return [i for part in SLICE.findall(text) for i in self.bpe.encode_ordinary(part)]


def check_merges(merges, vocab):
    """
    The file joins the neighbours whose merge is first in its list; tiktoken those whose product has
    the lowest id, listed or not. They agree if the products' ids ascend along the list, and
    tiktoken, given the bytes of any token, comes to a pair that is listed: in a text it then comes
    to the same pair, as nothing has crossed the ends of what two neighbours hold.
    """
    foreign = next((token for token in vocab if not ALPHABET.keys() >= set(token)), None)
    require(foreign is None, "a token of model.vocab", foreign)
    missing = [b for c, b in ALPHABET.items() if c not in vocab]
    require(not missing, "model.vocab's list of missing bytes", missing)
    age = {token: i if len(token) > 1 else -1 for token, i in vocab.items()}
    split, before = dict.fromkeys(ALPHABET), 0  # the two parts of each token that is known to form
    for merge in merges if isinstance(merges, list) else ():
        left, right = merge if isinstance(merge, list) and len(merge) == 2 else (None, None)
        require(isinstance(left, str) and left in age and isinstance(right, str) and right in age,
                "one of model.merges", merge)
        product = age.get(left + right, -1)
        require(before <= product, "model.merges' order (it is not that of the ids) at", merge)
        if left in split and right in split and meet(left, right, age, split):
            split[left + right] = merge
        before = product
    lost = [i for token, i in vocab.items() if token not in split]
    require(not lost, "model.vocab's list of ids that no merge makes", lost[:5])


def meet(left, right, age, split):
    """Whether joining the lowest ids first makes left and right of their bytes, then both one."""
    # Back in time: of the two at the border the younger is taken apart; of equals the right one,
    # since the left one came first. While two are there nothing may join them.
    until_left = until_right = MOST
    while len(left) > 1 or len(right) > 1:
        if age[left] > age[right]:
            until_left, left = age[left], split[left][1]
        else:
            until_right, right = age[right], split[right][0]
        across = age.get(left + right, MOST)
        if across < until_left and across <= until_right:
            return False
    return True


# ---------------------------------------------------------------- by Hugging Face's tokenizers

# How LLaMA's tokens become text: "▁" is a space, <0x41> a byte, and the space in front is none.
LLAMA = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
         {"type": "ByteFallback"}, {"type": "Fuse"}]
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


class HuggingFace:
    """Any tokenizer.json, by the package `tokenizers`. why: tiktoken cannot be it."""

    def __init__(self, spec, path, why):
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise ValueError(f"{path} needs Hugging Face's tokenizers, since {why}, which tiktoken "
                             "cannot reproduce: pip install tokenizers") from None
        # data.py and train.py fork, and its threads would not be in the child.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        # Older files lack ignore_merges, which then is false.
        model = {"ignore_merges": False} | spec["model"]
        of_ids = [*map(spec.get, ("normalizer", "pre_tokenizer")), model, spec.get("added_tokens")]
        self.kind, self.identity = "hf", [json.dumps(of_ids, sort_keys=True)]
        self.path = path
        self.inner = self.run(Tokenizer.from_str, json.dumps(spec))
        # These make a model's input of a text: they cut it, pad it, put tokens around it.
        self.inner.no_truncation()
        self.inner.no_padding()
        self.inner.post_processor = None
        self.inner.encode_special_tokens = True
        decoder = spec.get("decoder") or {}
        steps = decoder.get("decoders", [decoder])
        self.strip, self.spell = steps[3:] == [STRIP], of_llama
        if [step.get("type") for step in steps] == ["ByteLevel"]:
            self.spell = of_byte_level
        elif steps not in (LLAMA, [*LLAMA, STRIP]):
            raise ValueError(f"{path}: decoder is {short(decoder)}, so the bytes of its tokens are "
                             "not known: take a tokenizer whose decoder is ByteLevel or LLaMA's")

    def __setstate__(self, state):  # a pickle loses this setting
        vars(self).update(state)
        self.inner.encode_special_tokens = True

    def run(self, function, *args, **flags):
        try:
            return function(*args, **flags)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # what its Rust raises may be no Exception
            raise ValueError(f"{self.path}: the package tokenizers fails ({short(str(error))}): "
                             f"{AGAIN}, or upgrade that package") from None

    def encode(self, text):
        # It refuses lone surrogates, which JSON can hold. In a batch it does not count where in the
        # text tokens are, and takes half the time.
        text = text.encode("utf-8", errors="replace").decode()
        return self.run(self.inner.encode_batch_fast, [text], add_special_tokens=False)[0].ids


# ---------------------------------------------------------------- a tokenizer of one's own

def pieces(tokenizer, ids):
    """
    The bytes that each token stands for, of any object with name, encode and decode. They join to
    the text as the tokenizer has it, which may be normalised.
    """
    if hasattr(tokenizer, "pieces"):
        return tokenizer.pieces(ids)

    def size(text):
        return len(text.encode(errors="replace"))

    # decode alone cannot tell where in a character a token ends. Each token with a part in it gets
    # a byte of it or more.
    text, ends = tokenizer.decode(ids), [0]  # bytes up to the end of each token
    done, n_bytes = 0, 0                     # characters of the text that are complete, their bytes
    # Some tokenizers drop a space in front. So a token is decoded together with the one before it,
    # of which the text is then cut off.
    before, start = 0, 0
    for n in range(1, len(ids) + 1):
        new = tokenizer.decode(ids[before:n])[len(tokenizer.decode(ids[before:start])):]
        same = len(commonprefix([new, text[done:done + len(new)]]))
        end, rest = n_bytes + size(text[done:done + same]), new[same:]
        character = text[done + same:done + same + 1]
        if rest.strip("\ufffd") or (rest and not character):
            raise ValueError(f"tokenizer {tokenizer.name} decodes token {n - 1} otherwise among "
                             "others: give it pieces(ids), as the tokenizers of data.py have")
        if not rest:
            done, n_bytes = done + same, end
            before, start = (start, n) if new else (before, start)
        else:
            # The token ends inside a character, which decode shows as U+FFFD until it is whole.
            end = min(max(end, ends[-1]) + 1, end + size(character) - 1)
        ends.append(max(end, ends[-1]))

    raw = text.encode(errors="replace")
    if ends[-1] != len(raw):
        raise ValueError(f"tokenizer {tokenizer.name} decodes more than its tokens: give it "
                         "pieces(ids), as the tokenizers of data.py have")
    return [raw[low:high] for low, high in zip(ends, ends[1:])]


# ---------------------------------------------------------------- which tokenizer

KINDS = "tokenizer.json", "tokenizer.model"  # the files that say that a folder has a tokenizer


def get_tokenizer(spec):
    """
    spec: "bytes", a tokenizer.json, of any name before the dot, or a folder with one. ValueError if
    that is damaged or needs a package, FileNotFoundError without one.
    """
    if spec == "bytes":
        return ByteTokenizer()
    check_type(spec, (str, os.PathLike), "a tokenizer is bytes or a path")
    path = Path(spec)
    if path.is_dir():
        path = next((path / name for name in KINDS if os.path.lexists(path / name)), path)
    # lexists: a link to nowhere is a broken tokenizer, not none.
    if path.suffix == ".json" and os.path.lexists(path):
        return JsonTokenizer(path)
    if path.suffix == ".model" and os.path.lexists(path):
        raise ValueError(f"{path}: put the same tokenizer's tokenizer.json there; every LLaMA "
                         "folder on the hub has one, or transformers writes it: "
                         "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)")
    raise FileNotFoundError(f"{spec}: no tokenizer here; give bytes, a tokenizer.json, or a folder "
                            "with one")


def folder_of(path):
    """The folder of a model, which may be a single file."""
    return Path(path) if Path(path).is_dir() else Path(path).parent


def tokenizer_of(model, vocab_size, spec=None):
    """
    The tokenizer of a model at the path `model` (None: there is none yet): the one that spec names,
    else the files beside the model, else bytes if the vocabulary is theirs. ValueError if there is
    none, if it makes ids that the model lacks, or if the model's config.json names another.
    """
    folder = model and folder_of(model)
    if spec:
        tokenizer = get_tokenizer(spec)
    elif model and any(os.path.lexists(folder / name) for name in KINDS):
        tokenizer = get_tokenizer(folder)
    elif vocab_size == ByteTokenizer.n_vocab:
        tokenizer = ByteTokenizer()
    else:
        raise ValueError(f"no tokenizer.json beside {model or 'a new model'}: name one with "
                         "--tokenizer")
    if tokenizer.n_vocab > vocab_size:
        raise ValueError(f"tokenizer {tokenizer.name} makes ids up to {tokenizer.n_vocab - 1}, the "
                         f"model's vocabulary is {vocab_size}: they do not belong together")

    # weights.write notes the tokenizer's name. Another with as many ids would load and be wrong.
    config = model and folder / "config.json"
    found = read_json(config) if config and config.exists() else {}
    made_with = found.get("tokenizer") if isinstance(found, dict) else None
    if str(made_with).startswith(f"sp-{tokenizer.n_vocab}-"):  # by sentencepiece, until it went
        made_with = None
    if made_with not in (None, tokenizer.name):
        raise ValueError(f"{config}: the model was made with tokenizer {short(made_with)}, and "
                         f"{spec or folder} gives {tokenizer.name}: name the one with --tokenizer")
    return tokenizer
