"""
Text to tokens and back: three tokenizers, and which of them belongs to a model.

    encode(text)    ids, in which special tokens spelled in the text are plain text
    decode(ids)     text, which skips ids that stand for no text
    pieces(ids)     the bytes of each id, which join to the text: a token may end in a character
    n_vocab, eos_id, and name: at most 24 characters, which tell two tokenizers apart
    files           {name in a model's folder: the file that was read}: what a model's copy needs

A model of bytes needs no file. A Hugging Face tokenizer.json is run by tiktoken, and refused unless
tiktoken then gives the very same ids. A tokenizer.model is run by sentencepiece.
tests/test_tokenizers.py holds them equal to Hugging Face's `tokenizers` and to sentencepiece.
data.py turns texts into shards of these tokens, niah.py asks where in them an answer stands.
"""
import functools
import hashlib
import itertools
import os
import re
import sys
import unicodedata
from os.path import commonprefix
from pathlib import Path

import tiktoken

from infra.files import read_json, regular, short

# ---------------------------------------------------------------- bytes


class ByteTokenizer:
    """Ids 0..255 are bytes and 256 ends a document."""
    name, n_vocab, eos_id, files = "bytes", 257, 256, {}

    def encode(self, text):
        return list(text.encode("utf-8", errors="replace"))

    def decode(self, ids):
        return b"".join(self.pieces(ids)).decode("utf-8", errors="replace")

    def pieces(self, ids):
        return [bytes([i]) if i < 256 else b"" for i in ids]


# ---------------------------------------------------------------- tokenizer.json, by tiktoken

GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""

# How GPT-2's, cl100k's and o200k's patterns end. What comes before looks ahead nowhere, so as one
# atomic group tiktoken matches it with a quicker engine. Nothing follows that group within a match,
# so the matches are those of the pattern as written.
SPACES = r"|\s+(?!\S)|\s+"

# tiktoken's regex engine overflows its stack on about a million spaces in a row, so long texts go
# through in slices. A slice ends before a space that follows something else, where GPT-2's and
# cl100k's patterns always split: the ids are the same.
SLICE = re.compile(r"(?s).{1,400000}\Z|.{1,400000}(?<=\S)(?= )|.{1,400000}")

# What a pattern is tried on: scripts, digits, marks, long runs. tiktoken drops unmatched text.
PROBE = unicodedata.normalize("NFC", "".join(map(chr, range(0x300))) + "あ漢🙂 \r\n\n x"
                              + 3 * " some words again") + 99 * "a" + 99 * " "


def byte_alphabet():
    """GPT-2 spells each byte as one visible character ("Ġ" is the space): {character: byte}."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1),
               *range(ord("®"), ord("ÿ") + 1)]
    hidden = [b for b in range(256) if b not in visible]
    return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(hidden)}


class NotReproducible(ValueError):
    """A tokenizer.json that is whole, of a tokenizer that tiktoken cannot be."""


class TokenizerJson:
    """What a tokenizer.json says, checked to be a byte-level BPE that tiktoken reproduces."""

    def __init__(self, path):
        self.path = path
        spec = read_json(path, "download it again", most=64 << 20)  # OLMo 2's has 7 MB
        self.require(isinstance(spec, dict), "the whole file", spec)
        model = self.part(spec, "model", dict, {})
        self.require(model.get("type") == "BPE", "model.type", model.get("type"))
        for field in ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
            self.require(not model.get(field), f"model.{field}", model.get(field))
        normalizer = self.part(spec, "normalizer", dict, {}).get("type")
        self.require(normalizer in (None, "NFC"), "normalizer.type", normalizer)
        self.nfc = normalizer == "NFC"
        self.pattern = self.pattern_of(spec)

        tokens = self.part(spec, "added_tokens", list)
        self.check_added(tokens)
        self.added = {token["content"]: token["id"] for token in tokens}
        self.in_text = self.in_text_of(tokens)
        self.ranks = self.ranks_of(model, len(tokens))

    def require(self, ok, field, found):
        if not ok:
            raise NotReproducible(
                f"{self.path}: {field} is {short(found)}, which tiktoken cannot reproduce; use a "
                "byte-level BPE tokenizer.json (OLMo 2, GPT-2, Llama 3) or the checkpoint's "
                "tokenizer.model")

    def part(self, of, field, kind, default=None):
        """A field that is of this kind; the default where it is null or not there."""
        found = of.get(field)
        found = default if found is None else found
        self.require(isinstance(found, kind), field, found)
        return found

    def pattern_of(self, spec):
        """The regex that cuts text: GPT-2's own inside ByteLevel, or a Split before it."""
        steps = self.part(spec, "pre_tokenizer", dict, {})
        steps = self.part(steps, "pretokenizers", list, [steps])
        types = [step.get("type") if isinstance(step, dict) else step for step in steps]
        self.require(types in (["ByteLevel"], ["Split", "ByteLevel"]), "pre_tokenizer", types)
        split, byte_level, alone = steps[0], steps[-1], len(steps) == 1
        self.require(byte_level.get("use_regex", True) == alone,
                     "pre_tokenizer ByteLevel.use_regex", not alone)
        space = byte_level.get("add_prefix_space", True)
        self.require(space is False, "pre_tokenizer ByteLevel.add_prefix_space", space)
        if alone:
            return GPT2_PATTERN
        # Both ways of saying that each match is a piece.
        how = split.get("behavior"), split.get("invert")
        self.require(how in (("Removed", True), ("Isolated", False)),
                     "pre_tokenizer Split (behavior, invert)", how)
        pattern = self.part(split, "pattern", dict, {}).get("Regex")
        self.require(isinstance(pattern, str), "pre_tokenizer Split.pattern", split.get("pattern"))
        return pattern

    def check_added(self, tokens):
        for token in tokens:
            self.require(isinstance(token, dict), "one of added_tokens", token)
            content, number = token.get("content"), token.get("id")
            spelled = isinstance(content, str) and content.encode(errors="ignore").decode()
            self.require(content and spelled == content, "the content of one of added_tokens",
                         token)
            self.require(is_id(number), "the id of one of added_tokens", token)
            flags = "special", "lstrip", "rstrip", "single_word"
            self.require(all(type(token.get(flag)) is bool for flag in flags),
                         "a flag of one of added_tokens", token)

    def in_text_of(self, tokens):
        """{content: id} of the added tokens that match in text, as OLMo 2's |||EMAIL_ADDRESS|||."""
        found = [token for token in tokens if not token["special"]]
        loose = [t["content"] for t in found if t["lstrip"] or t["rstrip"] or t["single_word"]]
        self.require(not loose, "added_tokens' list of non-special ones with lstrip, rstrip or "
                     "single_word", loose)
        self.require(len(found) <= 1000, "the number of added_tokens that match in text",
                     len(found))
        found = {token["content"]: token["id"] for token in found}
        for pair in itertools.permutations(found, 2):
            self.require(not pair[0].startswith(pair[1]),
                         "a pair of added_tokens, one beginning with the other,", pair)
        return found

    def ranks_of(self, model, n_added):
        """{bytes: id} of the tokens that merges make."""
        vocab, merges = self.part(model, "vocab", dict), self.part(model, "merges", list)
        for i in vocab.values():
            self.require(is_id(i), "an id in model.vocab", i)
        # Older files write "a b", later ones ["a", "b"].
        merges = [m.split(" ") if isinstance(m, str) else m for m in merges]
        for merge in merges:
            pair = isinstance(merge, list) and len(merge) == 2
            self.require(pair and all(isinstance(side, str) for side in merge),
                         "one of model.merges", merge)

        spelled = {token: i for token, i in vocab.items() if token not in self.added}
        ids = [*spelled.values(), *self.added.values()]
        self.require(len(set(ids)) == len(ids) and len(self.added) == n_added,
                     "a token, or an id, that comes twice, so the number of ids", len(ids))
        alphabet = byte_alphabet()
        foreign = next((token for token in spelled if not alphabet.keys() >= set(token)), None)
        self.require(foreign is None, "a token of model.vocab", foreign)
        ranks = {bytes(alphabet[c] for c in token): i for token, i in spelled.items()}
        missing = [b for b in range(256) if bytes([b]) not in ranks]
        self.require(not missing, "model.vocab's list of missing bytes", missing)

        # The file orders merges by priority; tiktoken joins the neighbours whose product has the
        # lowest id. The two agree when the products' ids ascend along the list and merges reach
        # every token. tiktoken looks a whole piece up before it merges (the file's ignore_merges),
        # which changes nothing where merges reach every token.
        products = [spelled.get(left + right, -1) for left, right in merges]
        for merge, before, after in zip(merges, [0] + products, products):
            self.require(0 <= before <= after, "model.merges' order (it is not that of the ids) at",
                         merge)
        unmerged = set(spelled.values()) - set(products) - {ranks[bytes([b])] for b in range(256)}
        self.require(not unmerged, "model.vocab's ids that no merge makes", sorted(unmerged)[:5])
        return ranks


def is_id(number):
    return type(number) is int and 0 <= number < 2**31


class TiktokenTokenizer:
    """The byte-level BPE of a Hugging Face tokenizer.json (OLMo 2, GPT-2, Llama 3)."""

    def __init__(self, path):
        path = Path(path)
        spec = TokenizerJson(path)
        eos = self.end_of_text(path, spec.added)
        self.nfc, self.in_text, self.eos_id = spec.nfc, set(spec.in_text), spec.added[eos]
        self.n_vocab = 1 + max(*spec.ranks.values(), *spec.added.values())
        # All that ids depend on, and the end of text: two files of one tokenizer have one name.
        identity = repr((spec.pattern, spec.nfc, sorted(spec.ranks.items()),
                         sorted(spec.added.items()), sorted(spec.in_text), eos))
        self.name = f"bpe-{self.n_vocab}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"
        self.bytes_of = {i: token for token, i in spec.ranks.items()}
        self.bytes_of |= {i: token.encode() for token, i in spec.in_text.items()}

        # See SPACES.
        quick = spec.pattern
        if quick.endswith(SPACES):
            quick = f"(?>{quick.removesuffix(SPACES)}){SPACES}"
        try:
            self.bpe = tiktoken.Encoding(self.name, pat_str=quick, mergeable_ranks=spec.ranks,
                                         special_tokens=spec.in_text)
            whole = self.decode(self.encode(PROBE)) == PROBE
        except KeyboardInterrupt:
            raise
        except BaseException:
            # What tiktoken's Rust raises over a regex that it cannot run is no Exception.
            whole = False
        spec.require(whole, "pre_tokenizer Split.pattern (it drops text, or is no regex)",
                     spec.pattern)

    def end_of_text(self, path, added):
        """The token that the tokenizer_config.json beside it names, <|endoftext|> without one."""
        self.files, config = {"tokenizer.json": path}, path.with_name("tokenizer_config.json")
        # The config speaks of the folder's tokenizer.json. Of a file called otherwise it does so
        # only where there is none.
        alone = path.name == "tokenizer.json" or not path.with_name("tokenizer.json").exists()
        eos = None
        if alone and config.exists():
            self.files[config.name] = config
            found = read_json(config, "download it again")
            eos = found.get("eos_token") if isinstance(found, dict) else found
            eos = eos.get("content") if isinstance(eos, dict) else eos  # both forms exist
        eos = eos or "<|endoftext|>"
        if not isinstance(eos, str) or eos not in added:
            where = config if alone else "tokenizer_config.json, in a folder of their own"
            raise ValueError(f"{path}: added_tokens has no {short(eos)}; name the end of text as "
                             f"eos_token in {where}")
        return eos

    def encode(self, text):
        text = unicodedata.normalize("NFC", text) if self.nfc else text
        ids = []
        for part in SLICE.findall(text):
            ids += self.bpe.encode(part, allowed_special=self.in_text, disallowed_special=())
        return ids

    def decode(self, ids):
        return b"".join(self.pieces(ids)).decode("utf-8", errors="replace")

    def pieces(self, ids):
        return [self.bytes_of.get(i, b"") for i in ids]


# ---------------------------------------------------------------- tokenizer.model

class SentencePieceTokenizer:
    """A sentencepiece tokenizer.model, such as the LLaMA one of the released RAT+ checkpoints."""

    def __init__(self, path):
        try:
            import sentencepiece
        except ImportError:
            raise ValueError(f"{path} needs sentencepiece: pip install sentencepiece") from None
        proto = regular(path).read_bytes()
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_proto=proto)
        except RuntimeError as error:
            raise ValueError(f"{path}: not a sentencepiece model ({short(str(error))}); download "
                             "it again") from None
        self.n_vocab, self.eos_id = self.model.vocab_size(), self.model.eos_id()
        self.files = {"tokenizer.model": Path(path)}
        if self.eos_id < 0:
            raise ValueError(f"{path}: eos_id is {self.eos_id}, documents could not be told apart; "
                             "use a model with one")
        self.name = f"sp-{self.n_vocab}-{hashlib.sha256(proto).hexdigest()[:8]}"

    def encode(self, text):
        # It refuses lone surrogates, which JSON can hold.
        return self.model.encode(text.encode("utf-8", errors="replace").decode())

    def decode(self, ids):
        return self.model.decode([i for i in ids if i < self.n_vocab])

    def pieces(self, ids):
        def leading(text):
            return len(text) - len(text.lstrip(b" "))

        # encode puts a space before a text and decode takes it away, so the pieces lose it too.
        found = [self.bytes_of.get(i, b"") for i in ids]
        space = leading(b"".join(found)) - leading(self.decode(ids).encode())
        for n, piece in enumerate(found):
            found[n], space = piece[space:], max(0, space - len(piece))
        return found

    @functools.cached_property
    def bytes_of(self):
        return {i: self.bytes_of_one(i) for i in range(self.n_vocab)}

    def bytes_of_one(self, i):
        if self.model.is_control(i):
            return b""
        # A byte is spelled <0x41>, and a space U+2581.
        if self.model.is_byte(i):
            return bytes.fromhex(self.model.id_to_piece(i)[3:5])
        if self.model.is_unknown(i):
            return self.model.decode([i]).encode()
        return self.model.id_to_piece(i).replace("\u2581", " ").encode()


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

KINDS = {"tokenizer.json": TiktokenTokenizer, "tokenizer.model": SentencePieceTokenizer}


def get_tokenizer(spec):
    """
    spec: "bytes", a tokenizer.json or tokenizer.model, of any name before the dot, or a folder with
    one of them. Where it has both it is the .json, if tiktoken can be that.
    """
    if spec == "bytes":
        return ByteTokenizer()
    path = Path(spec)
    # lexists: a link to nowhere is a broken tokenizer, not none.
    if path.is_dir():
        files = [path / name for name in KINDS if os.path.lexists(path / name)]
    else:
        files = [path] if path.is_file() and f"tokenizer{path.suffix}" in KINDS else []
    if not files:
        raise FileNotFoundError(f"{spec}: no tokenizer here; give bytes, a tokenizer.json, a "
                                "tokenizer.model, or a folder with one")
    try:
        return KINDS[f"tokenizer{files[0].suffix}"](files[0])
    except NotReproducible as error:
        # A LLaMA's folder has a tokenizer.json of a kind that tiktoken cannot be, and the model.
        if len(files) == 1:
            raise
        say_once(f"note: {files[1]} is used, because {str(error).rpartition(';')[0]}")
    return SentencePieceTokenizer(files[1])


@functools.lru_cache
def say_once(line):
    print(line, file=sys.stderr, flush=True)


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
        raise ValueError(f"no tokenizer.json or tokenizer.model beside {model or 'a new model'}: "
                         "name one with --tokenizer")
    if tokenizer.n_vocab > vocab_size:
        raise ValueError(f"tokenizer {tokenizer.name} makes ids up to {tokenizer.n_vocab - 1}, the "
                         f"model's vocabulary is {vocab_size}: they do not belong together")

    # weights.write notes the tokenizer's name. Another with as many ids would load and be wrong.
    config = model and folder / "config.json"
    found = read_json(config) if config and config.exists() else {}
    made_with = found.get("tokenizer") if isinstance(found, dict) else None
    if made_with not in (None, tokenizer.name):
        raise ValueError(f"{config}: the model was made with tokenizer {short(made_with)}, and "
                         f"{spec or folder} gives {tokenizer.name}: name the one with --tokenizer")
    return tokenizer
