"""
Text to tokens to training samples: three tokenizers, one shard file format, one reader.

    stream = document, eos, document, eos, ...                        whole documents, over as many shards as it takes
    sample(index) = stream[w * context_len : (w + 1) * context_len + 1]    w = shuffled(index), anew in every epoch

A sample depends on (seed, index) only, so a run resumes from its step alone and ranks slice the indices as they like.
As a script it turns .txt, .jsonl, .jsonl.gz and .parquet into shards; with no argument, the text that comes with CPython:

    this process    lists the work in the order of the input, puts the results back into that order, writes the shards
    a worker        reads a row group of a .parquet by itself, or is sent 32 texts of another file; encodes; sends token bytes

So the shards depend on the input only, not on the workers or on how often the run was killed. The whole shards say how many
documents are done, and row groups of done documents are skipped unread. In memory: two shards (one fills, one goes to disk)
and two pieces of work for each worker, a row group of at most GROUP_BYTES or 32 texts.
tests/test_data.py holds the tokenizers equal to Hugging Face's `tokenizers` and to sentencepiece. Read niah.py next.
"""
import argparse
import functools
import gzip
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import struct
import sys
import threading
import time
import unicodedata
import zlib
from array import array
from bisect import bisect_right
from collections import deque
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken

from infra.files import lines_of, only_one, read_json, regular, short, told_to_end

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


# -----------------------------------------------------------------------------
# Shards: 64 bytes of header; the tokens, little-endian, uint16 where the vocabulary fits and uint32 where not; then the hash of
# the header and of each HASHED tokens, 8 bytes each. What is read is hashed, so a shard's damage is found before it is learned.

MAGIC, VERSION, HASHED = b"nanoRAT\0", 2, 8192
HEADER = struct.Struct("<8sIIIIQQ24s")  # magic, version, bytes per token, n_vocab, job, tokens, documents, tokenizer name


class Shard(NamedTuple):
    path: Path
    tokens: np.ndarray  # (tokens,) memory-mapped
    hashes: bytes       # of each HASHED of them
    n_vocab: int
    tokenizer: str      # its name
    job: int            # checksum of what data.py was asked for, so that it only continues its own work
    n_docs: int

    def read(self, start, end):
        """Tokens start to end - 1. ValueError unless they are what was written."""
        for n in range(start // HASHED, (end - 1) // HASHED + 1):
            part = self.tokens[n * HASHED:(n + 1) * HASHED]
            if hash_of(part) != self.hashes[8 * n:8 * n + 8]:
                raise ValueError(f"{self.path}: damaged among tokens {n * HASHED:,} to {n * HASHED + len(part):,}, which do not match their "
                                 "hash; move it away and run data.py again")
        return self.tokens[start:end]


def token_dtype(n_vocab):
    return np.dtype("<u2" if n_vocab <= 1 << 16 else "<u4")


def hash_of(data):
    return hashlib.blake2b(data, digest_size=8).digest()


def hashes_of(docs, n_bytes):
    """hash_of each n_bytes of the documents one after the other."""
    digest, room = hashlib.blake2b(digest_size=8), n_bytes
    for doc in map(memoryview, docs):
        while len(doc) >= room:
            digest.update(doc[:room])
            yield digest.digest()
            doc, digest, room = doc[room:], hashlib.blake2b(digest_size=8), n_bytes
        digest.update(doc)
        room -= len(doc)
    if room < n_bytes:
        yield digest.digest()


def save_shard(path, docs, n_vocab, tokenizer, job):
    """docs: the bytes of each document's tokens. A kill at any moment leaves no part of a shard under its final name."""
    width = token_dtype(n_vocab).itemsize
    n_tokens = sum(map(len, docs)) // width
    tmp, head = Path(f"{path}.tmp"), HEADER.pack(MAGIC, VERSION, width, n_vocab, job, n_tokens, len(docs), tokenizer.encode())
    try:
        with open(tmp, "wb", buffering=1 << 24) as f:  # few, large writes, between which the other thread works
            f.write(head)
            f.writelines(docs)
            f.write(hash_of(head))
            f.writelines(hashes_of(docs, HASHED * width))
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except OSError as e:
        raise OSError(f"{path}: not written ({e.strerror}); put that right, and the same command goes on after the whole "
                      "shards") from None
    finally:
        tmp.unlink(missing_ok=True)


def open_shard(path):
    def require(ok, problem):
        if not ok:
            raise ValueError(f"{path}: {problem}; move it away and run data.py again")

    with open(regular(path), "rb") as f:
        head, size = f.read(HEADER.size), os.fstat(f.fileno()).st_size
        require(len(head) == HEADER.size and head.startswith(MAGIC), "not a nanoRAT shard")
        _, version, width, n_vocab, job, n_tokens, n_docs, name = HEADER.unpack(head)
        require(version == VERSION, f"shard version {version}, this data.py reads {VERSION}")
        require(width == token_dtype(n_vocab).itemsize, f"{width} bytes per token do not fit a vocabulary of {n_vocab}")
        require(n_tokens > 0, "an empty shard")
        end = HEADER.size + n_tokens * width
        whole = end + 8 + 8 * -(-n_tokens // HASHED)
        require(size == whole, f"{size:,} bytes where its header says {whole:,}")
        f.seek(end)
        hashes = f.read()
    require(hash_of(head) == hashes[:8], "a damaged header, which does not match its hash")
    tokens = np.memmap(path, dtype=token_dtype(n_vocab), mode="r", offset=HEADER.size, shape=(n_tokens,))
    return Shard(path, tokens, hashes[8:], n_vocab, name.rstrip(b"\0").decode(), job, n_docs)


def shuffled(index, n, key):
    """
    Where a pseudo-random permutation of range(n) sends index. A Feistel network permutes a power of four >= n, and
    walking on until the value is below n keeps it a permutation of range(n): no table, however many windows there are.
    """
    half = ((n - 1).bit_length() + 1) // 2
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(4):
            mixed = hashlib.blake2b(f"{key} {turn} {right}".encode(), digest_size=8).digest()
            left, right = right, left ^ int.from_bytes(mixed, "little") & mask
        index = left << half | right
        if index < n:
            return index


class Shards:
    """
    The shards of a folder as one stream of tokens, cut into windows of context_len; the last 1 % of windows is "val".

    len() is the windows of one epoch of this split. n_tokens counts the whole stream, both splits.
    """

    def __init__(self, path, context_len, seed, split="train"):
        assert context_len > 0 and split in ("train", "val"), f"{context_len=} {split=}"
        self.shards = [open_shard(file) for file in sorted(Path(path).glob("*.bin"))]
        if not self.shards:
            raise FileNotFoundError(f"{path}: no .bin shards; make them with: python data.py --output={path}")
        first = self.shards[0]
        self.n_vocab, self.tokenizer = first.n_vocab, first.tokenizer
        for n, shard in enumerate(self.shards):
            if shard.path.stem.isdigit() and int(shard.path.stem) != n:
                raise FileNotFoundError(f"{Path(path) / f'{n:05d}.bin'} is missing, though {shard.path.name} is there: restore it from a copy, "
                                        "or move those after it away and run data.py again")
            if (shard.n_vocab, shard.tokenizer) != (self.n_vocab, self.tokenizer):
                raise ValueError(f"{shard.path}: tokenizer {shard.tokenizer} of {shard.n_vocab} ids, but {first.path} has "
                                 f"{self.tokenizer} of {self.n_vocab}; keep one tokenizer per folder")
        self.starts = np.cumsum([0] + [len(shard.tokens) for shard in self.shards]).tolist()  # of each shard in the stream
        self.n_tokens = self.starts[-1]
        n_windows = (self.n_tokens - 1) // context_len  # the last target needs one more token
        if n_windows < 2:
            raise ValueError(f"{path}: {self.n_tokens:,} tokens give {max(n_windows, 0)} windows of context_len {context_len}, "
                             "train and val need 2; add text or shorten context_len")
        n_val = max(1, n_windows // 100)
        self.first, self.len = (0, n_windows - n_val) if split == "train" else (n_windows - n_val, n_val)
        self.context_len, self.seed = context_len, seed

    def __len__(self):
        return self.len

    def sample(self, index):
        """-> (context_len + 1,) int64. Every len() indices in a row from a multiple of len() visit each window once."""
        epoch, i = divmod(index, self.len)
        window = self.first + shuffled(i, self.len, key=f"{self.seed} {epoch}")
        start, end = window * self.context_len, (window + 1) * self.context_len + 1
        pieces = []
        while start < end:  # a window may cross into the next shard, or several
            n = bisect_right(self.starts, start) - 1
            shard = self.shards[n]
            piece = shard.read(start - self.starts[n], min(end - self.starts[n], len(shard.tokens)))
            if piece.max() >= self.n_vocab:
                raise ValueError(f"{shard.path}: token {piece.max()} is outside the vocabulary of {self.n_vocab}; "
                                 "the file is damaged, move it away and run data.py again")
            pieces.append(piece)
            start += len(piece)
        return np.concatenate(pieces).astype(np.int64)


# -----------------------------------------------------------------------------
# Documents

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")


def builtin_text():
    """The reference manual inside every CPython, about 0.5 MB of English: the same text for the same Python version."""
    from pydoc_data.topics import topics
    return "\n\n".join(topics[name] for name in sorted(topics))


def find_files(inputs):
    """The files to read: inputs in their order, a folder as all files below it that we can read, sorted."""
    files = []
    for path in map(Path, inputs):
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder; check --input")
        found = sorted(path.rglob("*")) if path.is_dir() else [path]
        found = [p for p in found if p.is_file() and p.name.endswith(SUFFIXES)]
        if not found:
            raise ValueError(f"{path}: nothing to read; --input takes {', '.join(SUFFIXES)} files and folders of them")
        files += map(regular, found)
    return files


class RowGroup(NamedTuple):
    """Documents of a .parquet that a worker is to read."""
    path: Path
    field: str
    index: int      # of the row group in the file
    first_row: int  # of the row group in the file, for messages
    n_rows: int
    done: int = 0   # rows at its beginning that whole shards have already


# Larger row groups are read by the parent, so that a piece of work stays small and all workers have a part in them.
GROUP_BYTES = 64e6  # uncompressed, all columns. FineWeb-Edu's have about 1,000 rows, 5 MB


@contextmanager
def naming(path):
    """Errors inside name the file and what to do, in one line."""
    try:
        yield
    except (ValueError, OSError, EOFError, NotImplementedError, zlib.error) as e:
        raise ValueError(f"{path}: {' '.join(str(e).split())} (mend or leave out the file, or set --text_field)") from None


def documents(files, field):
    """Yield each document, a text or a RowGroup of them, with how many bytes of the input are read by then."""
    before = 0
    for path in files:
        read = {".txt": read_txt, ".parquet": read_parquet}.get(path.suffix, read_jsonl)
        with naming(path):
            for doc, position in read(path, field):
                yield doc, before + position
        before += path.stat().st_size


def skip(docs, n):
    """docs without the first n documents, of which row groups stay unread."""
    for doc, position in docs:
        rows = doc.n_rows if isinstance(doc, RowGroup) else 1
        if n >= rows:
            n -= rows
        else:
            yield (doc._replace(done=n) if n else doc), position
            n = 0


def read_txt(path, field):
    raw = path.read_bytes()
    yield raw.decode("utf-8-sig"), len(raw)


def read_jsonl(path, field):
    with open(path, "rb") as raw:
        for number, line in lines_of(gzip.open(raw) if path.suffix == ".gz" else raw):
            try:
                row = json.loads(line)  # one field of it counts: whatever the others hold
            except (ValueError, RecursionError) as e:
                raise ValueError(f"line {number}: not JSON, {e}") from None
            yield text_of(row, field, f"line {number}"), raw.tell()


@functools.lru_cache(maxsize=1)  # the next row group is of the same file, as a rule
def open_parquet(path, field):
    try:
        import pyarrow.parquet
    except ImportError:
        raise ImportError(f"{path} needs pyarrow: pip install pyarrow") from None
    file = pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20)  # read a row group piece by piece
    if field not in file.schema_arrow.names:
        raise ValueError(f"no column {field!r} among {file.schema_arrow.names}")
    return file


def read_parquet(path, field):
    meta, row = open_parquet(path, field).metadata, 0
    size, n_rows = path.stat().st_size, max(1, meta.num_rows)
    for index in range(meta.num_row_groups):
        group = RowGroup(path, field, index, first_row=row, n_rows=meta.row_group(index).num_rows)
        if meta.row_group(index).total_byte_size <= GROUP_BYTES:
            row += group.n_rows
            yield group, size * row // n_rows
        else:
            for row, text in enumerate(read_rows(group), row + 1):
                yield text, size * row // n_rows


def read_rows(group):
    file, number = open_parquet(group.path, group.field), group.first_row
    for batch in file.iter_batches(batch_size=64, row_groups=[group.index], columns=[group.field], use_threads=False):
        for value in batch.column(0):
            number += 1
            yield text_of({group.field: value.as_py()}, group.field, f"row {number}")


def text_of(row, field, where):
    if not isinstance(row, dict) or not isinstance(row.get(field), str):
        raise ValueError(f"{where}: no text under {field!r} in {short(row)}")
    return row[field]


# -----------------------------------------------------------------------------
# Tokenising: this process lists the work and writes the shards, workers encode.


def start_worker(tok):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C is the parent's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDS)
    # a worker whose parent was killed would wait for work for ever
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()
    open_parquet.cache_clear()  # a file opened before the fork would be read by all from one shared place
    global tokenizer
    tokenizer = tok


def encode_unit(unit):
    """unit: a RowGroup, or texts. -> the bytes of each document's tokens, and how many bytes the texts have in UTF-8"""
    if isinstance(unit, RowGroup):
        with naming(unit.path):
            return encode_texts(itertools.islice(read_rows(unit), unit.done, None))
    return encode_texts(unit)


def encode_texts(texts):
    dtype = token_dtype(tokenizer.n_vocab)
    docs, n_bytes = [], 0
    for text in texts:
        ids = array(dtype.char, tokenizer.encode(text))  # numpy reads an array three times as fast as a list
        ids.append(tokenizer.eos_id)
        docs.append(np.array(ids, dtype).tobytes())
        n_bytes += len(text.encode(errors="replace"))
    return docs, n_bytes


ENDS = {signal.SIGINT, signal.SIGTERM}


def start_all(pool):
    """Starts the workers. What ctrl-C raises while Python forks is lost, so it is heard after that."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDS) if hasattr(signal, "pthread_sigmask") else None
    pool.submit(len, ())
    if before is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def encode_all(docs, tok, workers):
    """Yield what encode_unit says of each unit, and the position after it, in the order of docs, few units at a time."""
    pending = deque()
    with ProcessPoolExecutor(workers, initializer=start_worker, initargs=(tok,)) as pool:
        start_all(pool)
        for is_group, run in itertools.groupby(docs, key=lambda doc: isinstance(doc[0], RowGroup)):
            while batch := list(itertools.islice(run, 1 if is_group else 32)):
                units, positions = zip(*batch)
                pending.append((pool.submit(encode_unit, units[0] if is_group else units), positions[-1]))
                if len(pending) > 2 * workers:
                    future, position = pending.popleft()
                    yield *future.result(), position
        for future, position in pending:
            yield *future.result(), position


def write_shards(docs, total, out, spec, shard_tokens, workers, job):
    """docs: (text or RowGroup, position) pairs, position running to total. Goes on after the shards that are there."""
    tok, out = get_tokenizer(spec), Path(out)
    width = token_dtype(tok.n_vocab).itemsize
    out.mkdir(parents=True, exist_ok=True)
    whole = [open_shard(path) for path in sorted(out.glob("*.bin"))]
    for n, shard in enumerate(whole):
        if (shard.path.name, shard.tokenizer, shard.job) != (f"{n:05d}.bin", tok.name, job):
            raise ValueError(f"{shard.path}: a shard of another run (other input, tokenizer, --text_field or --shard_tokens), "
                             "or one before it is missing; choose another --output, or move the .bin files there away")
    for path in out.glob("*.bin.tmp"):  # of a run that was killed while it wrote
        path.unlink()
    n_shards, n_tokens = len(whole), sum(len(shard.tokens) for shard in whole)
    if whole:
        print(f"{n_tokens:,} tokens in {n_shards} shards are whole already: going on after them", flush=True)
    docs = skip(docs, sum(shard.n_docs for shard in whole))
    first = list(itertools.islice(docs, 1))  # this is where what is skipped gets read, so the clock starts after it
    start = reported = time.perf_counter()
    n_before, n_text = n_tokens, 0

    def rates(seconds):
        text = n_text / seconds / 1e6
        return f"{(n_tokens - n_before) / seconds:,.0f} tokens/s  {text:.1f} MB/s of text, {text / workers:.1f} a worker"

    shard_docs, in_shard, saving = [], 0, None
    with ThreadPoolExecutor(1) as writer:  # a shard goes to disk while the next one fills
        for unit, unit_text, position in encode_all(itertools.chain(first, docs), tok, workers):
            for doc in unit:
                shard_docs.append(doc)
                in_shard += len(doc) // width
                n_tokens += len(doc) // width
                if in_shard >= shard_tokens:
                    if saving:
                        saving.result()
                    saving = writer.submit(save_shard, out / f"{n_shards:05d}.bin", shard_docs, tok.n_vocab, tok.name, job)
                    n_shards, shard_docs, in_shard = n_shards + 1, [], 0
            n_text, now = n_text + unit_text, time.perf_counter()
            if now - reported >= 5 and position > first[0][1]:
                left = (now - start) * (total - position) / (position - first[0][1])
                print(f"{n_tokens:,} tokens  {position / total:.1%}  {rates(now - start)}  {left / 60:.1f} min left", flush=True)
                reported = now
        if saving:
            saving.result()
    if shard_docs:
        save_shard(out / f"{n_shards:05d}.bin", shard_docs, tok.n_vocab, tok.name, job)
        n_shards += 1
    if not n_shards:
        raise ValueError(f"no documents in the input; nothing was written to {out}")
    seconds = time.perf_counter() - start
    print(f"{n_tokens:,} tokens in {n_shards} shards  {seconds:.1f} s  {rates(seconds)}")
    print(f"Next: python train.py {'--preset=pico' if tok.name == 'bytes' else '--init=MODEL --memory=on'} --data={out}")


def count(most):
    """The type of a flag that takes a whole number from 1 to this; 100e6 will do."""
    def number(text):
        try:
            found = float(text)
        except ValueError:
            found = math.nan
        if not (1 <= found <= most and found == int(found)):
            raise argparse.ArgumentTypeError(f"{short(text)} is no whole number from 1 to {most:,.0f}")
        return int(found)
    return number


def main():
    parser = argparse.ArgumentParser(description="Turn text into token shards for train.py.", allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--input", nargs="+", metavar="PATH", help=f"files ({', '.join(SUFFIXES)}) or folders, searched below; "
                        "a .txt is one document, a line or row of the others is one. None: the text that comes with CPython")
    parser.add_argument("--output", metavar="DIR", help="folder for the shards; data/pydoc where there is no --input")
    parser.add_argument("--tokenizer", default="bytes", help="bytes, or a tokenizer.json, a tokenizer.model, or a folder with one")
    parser.add_argument("--shard_tokens", type=count(1e12), default="100e6", help="a shard is closed by the document that reaches this "
                        "many tokens; two shards are held in memory")
    parser.add_argument("--workers", type=count(1024), default=os.cpu_count(), help="processes that encode; the shards do not depend on it")
    parser.add_argument("--text_field", default="text", help="field (.jsonl) or column (.parquet) that holds the text")
    args = parser.parse_args()
    if args.input and not args.output:
        parser.error("--input needs --output=DIR")
    try:
        if args.input:
            files = find_files(args.input)
            for path in files:
                if path.suffix == ".parquet":  # a download that was cut off shows here, not hours into the work
                    with naming(path):
                        open_parquet(path, args.text_field)
            docs, total = documents(files, args.text_field), sum(f.stat().st_size for f in files)
            print(f"{len(files)} files, {total / 1e6:,.1f} MB", end="; ")
        else:
            files, text = [], builtin_text()
            docs, total = [(text, len(text))], len(text)
            args.output = args.output or "data/pydoc"
            print(f"no --input: the text that comes with CPython (pydoc_data), {total / 1e6:.2f} M characters", end="; ")
        print(f"tokenizer {args.tokenizer}; {args.workers} workers; shards of {args.shard_tokens:,} tokens", flush=True)
        job = zlib.crc32(repr(([(f.name, f.stat().st_size) for f in files], args.text_field, args.shard_tokens)).encode())
        Path(args.output).mkdir(parents=True, exist_ok=True)
        with only_one(args.output):
            write_shards(docs, total, args.output, args.tokenizer, args.shard_tokens, args.workers, job)
    except (ValueError, OSError, ImportError) as e:
        print(f"data.py: error: {e}", file=sys.stderr)
        sys.exit(2)
    except BrokenProcessPool:
        print("data.py: error: a worker was killed, for want of memory perhaps (fewer --workers take less); whole shards are kept and "
              "the same command goes on after them", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ndata.py: interrupted; whole shards are kept and the same command goes on after them", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    told_to_end()
    main()
