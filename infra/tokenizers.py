"""
Text to tokens: three tokenizers, and which of them belongs to a model.
"""
import functools
import hashlib
import itertools
import os
import re
import sys
import unicodedata
from pathlib import Path

import tiktoken

from infra.files import read_json, regular, short

# -----------------------------------------------------------------------------
# Tokenizers. All have
#   encode(text) -> ids, in which special tokens spelled in the text are plain text
#   decode(ids) -> text, which skips ids that stand for no text
#   pieces(ids) -> the bytes of each id, which join to the text: a token may end inside a character
#   n_vocab, eos_id, and name: at most 24 characters, which tell two tokenizers apart
#   files: {name in a model's folder: the file that was read}, which is what goes along with a model


class ByteTokenizer:
    """Ids 0..255 are bytes and 256 ends a document. Needs no file."""
    name, n_vocab, eos_id, files = "bytes", 257, 256, {}

    def encode(self, text):
        return list(text.encode("utf-8", errors="replace"))

    def decode(self, ids):
        return b"".join(self.pieces(ids)).decode("utf-8", errors="replace")

    def pieces(self, ids):
        return [bytes([i]) if i < 256 else b"" for i in ids]


GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""

# How GPT-2's, cl100k's and o200k's patterns end. What comes before looks ahead nowhere; as one atomic group tiktoken matches
# it with a quicker engine. Nothing follows that group within a match, so the matches are those of the pattern as written.
SPACES = r"|\s+(?!\S)|\s+"

# tiktoken's regex engine overflows its stack on about a million spaces in a row, so long texts go through in slices.
# A slice ends before a space that follows something else, where GPT-2's and cl100k's patterns always split: same ids.
SLICE = re.compile(r"(?s).{1,400000}\Z|.{1,400000}(?<=\S)(?= )|.{1,400000}")


def byte_alphabet():
    """GPT-2 spells each byte as one visible character ("Ġ" is the space): {character: byte}."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [b for b in range(256) if b not in visible]
    return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(hidden)}


class NotReproducible(ValueError):
    """A tokenizer.json that is whole, of a tokenizer that tiktoken cannot be."""


class TiktokenTokenizer:
    """
    The byte-level BPE of a Hugging Face tokenizer.json (OLMo 2, GPT-2, Llama 3), run by tiktoken.

    The file orders merges by priority; tiktoken joins the neighbours whose product has the lowest id. The two agree when
    the products' ids ascend along the list and merges reach every token, so both are checked. tiktoken looks a whole
    piece up before it merges (the file's ignore_merges); where merges reach every token that changes nothing.
    Added tokens that are not special (OLMo 2's |||EMAIL_ADDRESS|||) match in text, as they do in Hugging Face.
    """

    def __init__(self, path):
        path = Path(path)

        def require(ok, field, found):
            if not ok:
                raise NotReproducible(f"{path}: {field} is {short(found)}, which tiktoken cannot reproduce; use a byte-level BPE "
                                 "tokenizer.json (OLMo 2, GPT-2, Llama 3) or the checkpoint's tokenizer.model")

        def part(of, field, kind, default=None):
            """A field that is of this kind; the default where it is null or not there."""
            found = of.get(field, default)
            found = default if found is None else found
            require(isinstance(found, kind), field, found)
            return found

        spec = read_json(path, "download it again", most=64 << 20)  # OLMo 2's has 7 MB
        require(isinstance(spec, dict), "the whole file", spec)
        model = part(spec, "model", dict, {})
        require(model.get("type") == "BPE", "model.type", model.get("type"))
        vocab, merges, tokens = part(model, "vocab", dict), part(model, "merges", list), part(spec, "added_tokens", list)
        for i in vocab.values():
            require(type(i) is int and 0 <= i < 2**31, "an id in model.vocab", i)
        for token in tokens:
            require(isinstance(token, dict), "one of added_tokens", token)
            content, number = token.get("content"), token.get("id")
            require(isinstance(content, str) and content.encode(errors="ignore").decode() == content != "", "the content of one of added_tokens", token)
            require(type(number) is int and 0 <= number < 2**31, "the id of one of added_tokens", token)
            require(all(type(token.get(flag)) is bool for flag in ("special", "lstrip", "rstrip", "single_word")), "a flag of one of added_tokens", token)
        merges = [m.split(" ") if isinstance(m, str) else m for m in merges]  # "a b" or ["a", "b"]
        for merge in merges:
            require(isinstance(merge, list) and len(merge) == 2 and all(isinstance(side, str) for side in merge), "one of model.merges", merge)
        for field in ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
            require(not model.get(field), f"model.{field}", model.get(field))
        normalizer = part(spec, "normalizer", dict, {}).get("type")
        require(normalizer in (None, "NFC"), "normalizer.type", normalizer)
        self.nfc = normalizer == "NFC"

        # The regex that cuts text into pieces: GPT-2's own inside ByteLevel, or a Split before it.
        steps = part(spec, "pre_tokenizer", dict, {})
        steps = part(steps, "pretokenizers", list, [steps])
        types = [step.get("type") if isinstance(step, dict) else step for step in steps]
        require(types in (["ByteLevel"], ["Split", "ByteLevel"]), "pre_tokenizer", types)
        split, byte_level = steps[0], steps[-1]
        require(byte_level.get("use_regex", True) == (len(steps) == 1), "pre_tokenizer ByteLevel.use_regex", len(steps) > 1)
        require(byte_level.get("add_prefix_space", True) is False, "pre_tokenizer ByteLevel.add_prefix_space", byte_level.get("add_prefix_space", True))
        pattern = GPT2_PATTERN
        if len(steps) == 2:
            how = split.get("behavior"), split.get("invert")  # both ways of saying: each match is a piece
            require(how in (("Removed", True), ("Isolated", False)), "pre_tokenizer Split (behavior, invert)", how)
            pattern = part(split, "pattern", dict, {}).get("Regex")
            require(isinstance(pattern, str), "pre_tokenizer Split.pattern", split.get("pattern"))

        alphabet = byte_alphabet()
        added = {token["content"]: token["id"] for token in tokens}
        spelled = {token: i for token, i in vocab.items() if token not in added}
        ids = [*spelled.values(), *added.values()]
        require(len(set(ids)) == len(ids) and len(added) == len(tokens), "a token, or an id, that comes twice, so the number of ids", len(ids))
        foreign = next((token for token in spelled if not alphabet.keys() >= set(token)), None)
        require(foreign is None, "a token of model.vocab", foreign)
        ranks = {bytes(alphabet[c] for c in token): i for token, i in spelled.items()}
        missing = [b for b in range(256) if bytes([b]) not in ranks]
        require(not missing, "model.vocab's list of missing bytes", missing)
        products = [spelled.get(left + right, -1) for left, right in merges]
        for merge, before, after in zip(merges, [0] + products, products):
            require(0 <= before <= after, "model.merges' order (it is not that of the ids) at", merge)
        unmerged = set(spelled.values()) - set(products) - {ranks[bytes([b])] for b in range(256)}
        require(not unmerged, "model.vocab's ids that no merge makes", sorted(unmerged)[:5])

        in_text = [t for t in tokens if not t["special"]]
        loose = [t["content"] for t in in_text if t["lstrip"] or t["rstrip"] or t["single_word"]]
        require(not loose, "added_tokens' list of non-special ones with lstrip, rstrip or single_word", loose)
        require(len(in_text) <= 1000, "the number of added_tokens that match in text", len(in_text))
        in_text = {t["content"]: t["id"] for t in in_text}
        for pair in itertools.permutations(in_text, 2):
            require(not pair[0].startswith(pair[1]), "a pair of added_tokens, one beginning with the other,", pair)

        self.files, config = {"tokenizer.json": path}, path.with_name("tokenizer_config.json")
        alone = path.name == "tokenizer.json" or not path.with_name("tokenizer.json").exists()
        if alone and config.exists():  # else it speaks of the tokenizer.json there
            self.files[config.name] = config
        eos = read_json(config, "download it again") if config.name in self.files else {}
        eos = eos.get("eos_token") if isinstance(eos, dict) else eos
        eos = (eos.get("content") if isinstance(eos, dict) else eos) or "<|endoftext|>"
        if not isinstance(eos, str) or eos not in added:
            where = config if alone else "tokenizer_config.json, in a folder of their own"
            raise ValueError(f"{path}: added_tokens has no {short(eos)}; name the end of text as "
                             f"eos_token in {where}")

        self.eos_id = added[eos]
        self.n_vocab = 1 + max(*ranks.values(), *added.values())
        identity = repr((pattern, self.nfc, sorted(ranks.items()), sorted(added.items()), sorted(in_text), eos))
        self.name = f"bpe-{self.n_vocab}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"
        self.in_text = set(in_text)
        self.bytes_of = {i: b for b, i in ranks.items()} | {i: token.encode() for token, i in in_text.items()}
        quick = f"(?>{pattern.removesuffix(SPACES)}){SPACES}" if pattern.endswith(SPACES) else pattern
        # tiktoken drops what its pattern does not match
        probe = unicodedata.normalize("NFC", "".join(map(chr, range(0x300))) + "あ漢🙂 \r\n\n x" + 3 * " some words again") + 99 * "a" + 99 * " "
        try:
            self.bpe = tiktoken.Encoding(self.name, pat_str=quick, mergeable_ranks=ranks, special_tokens=in_text)
            whole = self.decode(self.encode(probe)) == probe
        except KeyboardInterrupt:
            raise
        except BaseException:  # what its Rust raises over a regex that it cannot run is no Exception
            whole = False
        require(whole, "pre_tokenizer Split.pattern (it drops text, or is no regex)", pattern)

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
        except RuntimeError as e:
            raise ValueError(f"{path}: not a sentencepiece model ({short(str(e))}); download it again") from None
        self.n_vocab, self.eos_id = self.model.vocab_size(), self.model.eos_id()
        self.files = {"tokenizer.model": Path(path)}
        if self.eos_id < 0:
            raise ValueError(f"{path}: eos_id is {self.eos_id}, documents could not be told apart; use a model with one")
        self.name = f"sp-{self.n_vocab}-{hashlib.sha256(proto).hexdigest()[:8]}"

    def encode(self, text):
        return self.model.encode(text.encode("utf-8", errors="replace").decode())  # it refuses lone surrogates

    def decode(self, ids):
        return self.model.decode([i for i in ids if i < self.n_vocab])

    def pieces(self, ids):
        pieces = [self.bytes_of.get(i, b"") for i in ids]
        leading = lambda text: len(text) - len(text.lstrip(b" "))
        # encode puts a space before a text, and decode takes it away
        space = leading(b"".join(pieces)) - leading(self.decode(ids).encode())
        for n, piece in enumerate(pieces):
            pieces[n], space = piece[space:], max(0, space - len(piece))
        return pieces

    @functools.cached_property
    def bytes_of(self):
        """{id: bytes}. A piece of one byte is spelled <0x41>, and a space as U+2581."""
        def of(i):
            if self.model.is_control(i):
                return b""
            if self.model.is_byte(i):
                return bytes.fromhex(self.model.id_to_piece(i)[3:5])
            if self.model.is_unknown(i):
                return self.model.decode([i]).encode()
            return self.model.id_to_piece(i).replace("\u2581", " ").encode()
        return {i: of(i) for i in range(self.n_vocab)}


KINDS = {"tokenizer.json": TiktokenTokenizer, "tokenizer.model": SentencePieceTokenizer}


def get_tokenizer(spec):
    """
    spec: "bytes", a tokenizer.json or tokenizer.model, of any name before the dot, or a folder with
    one of them. Where it has both it is the .json, if tiktoken can be that.
    """
    if spec == "bytes":
        return ByteTokenizer()
    path = Path(spec)
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
        if len(files) == 1:
            raise
        say_once(f"note: {files[1]} is used, because {str(error).rpartition(';')[0]}")
    return SentencePieceTokenizer(files[1])


@functools.lru_cache
def say_once(line):
    print(line, file=sys.stderr, flush=True)


def folder_of(path):
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
        raise ValueError(f"no tokenizer.json or tokenizer.model beside {model or 'a new model'}: name one with --tokenizer")
    if tokenizer.n_vocab > vocab_size:
        raise ValueError(f"tokenizer {tokenizer.name} makes ids up to {tokenizer.n_vocab - 1}, the model's vocabulary is "
                         f"{vocab_size}: they do not belong together")
    config = model and folder / "config.json"
    found = read_json(config) if config and config.exists() else {}
    made_with = found.get("tokenizer") if isinstance(found, dict) else None
    if made_with not in (None, tokenizer.name):
        raise ValueError(f"{config}: the model was made with tokenizer {short(made_with)}, and "
                         f"{spec or folder} gives {tokenizer.name}: name the one with --tokenizer")
    return tokenizer
