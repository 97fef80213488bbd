"""
Token shards on disk, and how texts become them.
"""
import functools
import gzip
import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import struct
import threading
import time
import zlib
from array import array
from collections import deque
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from infra.files import lines_of, regular, short
from infra.tokenizers import get_tokenizer

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
