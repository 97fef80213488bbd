"""
Token shards on disk, and how texts become them.

    shard = header | tokens, uint16 where the vocabulary fits and uint32 where not | hashes

Texts come from .txt, .jsonl, .jsonl.gz and .parquet, and encoding them is the work of many cores:

    this process   lists the work in the order of the input, puts the results back into that order,
                   and writes the shards
    a worker       reads a row group of a .parquet by itself, or is sent 32 texts of another file;
                   encodes; sends the bytes of each document's tokens

So the shards depend on the input alone, not on the workers or on how often the run was killed. The
whole shards say how many documents are done, and row groups of done documents are skipped unread.
In memory are two shards (one fills, one goes to disk) and two pieces of work for each worker.
tests/test_data.py holds the shards equal to those of a plain loop, and kills the script that writes
them. data.py is that script, and reads them.
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
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from infra.files import lines_of, regular, short
from infra.tokenizers import get_tokenizer

# ---------------------------------------------------------------- the format

MAGIC, VERSION = b"nanoRAT\0", 2
# magic, version, bytes per token, n_vocab, job, tokens, documents, tokenizer's name; little-endian
HEADER = struct.Struct("<8sIIIIQQ24s")
# After the tokens come 8-byte hashes of the header and of each so many tokens. Whatever is read is
# hashed, so a shard's damage is found before it is learned.
HASHED = 8192


class Shard(NamedTuple):
    path: Path
    tokens: np.ndarray  # (tokens,) memory-mapped
    hashes: bytes       # of each HASHED of them
    n_vocab: int
    tokenizer: str      # its name
    job: int            # checksum of what data.py was asked for: it goes on with its own work alone
    n_docs: int

    def read(self, start, end):
        """Tokens start to end - 1. ValueError unless they are what was written."""
        # The hashed parts that they lie in are read whole, 16 or 32 KB each.
        for n in range(start // HASHED, (end - 1) // HASHED + 1):
            part = self.tokens[n * HASHED:(n + 1) * HASHED]
            if digest(part) != self.hashes[8 * n:8 * n + 8]:
                raise ValueError(f"{self.path}: damaged among tokens {n * HASHED:,} to "
                                 f"{n * HASHED + len(part):,}, which do not match their hash; move "
                                 "it away and run data.py again")
        return self.tokens[start:end]


def token_dtype(n_vocab):
    return np.dtype("<u2" if n_vocab <= 1 << 16 else "<u4")


def digest(block):
    return hashlib.blake2b(block, digest_size=8).digest()


def digests(docs, n_bytes):
    """The digest of each n_bytes of the documents, one after the other."""
    hashed, room = hashlib.blake2b(digest_size=8), n_bytes
    for doc in map(memoryview, docs):
        while len(doc) >= room:
            hashed.update(doc[:room])
            yield hashed.digest()
            doc, hashed, room = doc[room:], hashlib.blake2b(digest_size=8), n_bytes
        hashed.update(doc)
        room -= len(doc)
    if room < n_bytes:
        yield hashed.digest()


def save_shard(
    path,
    docs,       # bytes of each document's tokens
    n_vocab,
    tokenizer,  # its name
    job,        # see Shard
):
    # A kill at any moment leaves no part of a shard under its final name.
    width = token_dtype(n_vocab).itemsize
    n_tokens = sum(map(len, docs)) // width
    header = HEADER.pack(MAGIC, VERSION, width, n_vocab, job, n_tokens, len(docs),
                         tokenizer.encode())
    unfinished = Path(f"{path}.tmp")
    try:
        # Few, large writes: between them the thread that encodes gets its turn.
        with open(unfinished, "wb", buffering=1 << 24) as file:
            file.write(header)
            file.writelines(docs)
            file.write(digest(header))
            file.writelines(digests(docs, HASHED * width))
            file.flush()
            # Renamed before it is on the disk, it could be empty after a power cut.
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        raise OSError(f"{path}: not written ({error.strerror}); put that right, and the same "
                      "command goes on after the whole shards") from None
    finally:
        unfinished.unlink(missing_ok=True)


def open_shard(path):
    """-> Shard, its tokens unread. ValueError unless the file is as long as its header says."""
    def require(ok, problem):
        if not ok:
            raise ValueError(f"{path}: {problem}; move it away and run data.py again")

    with open(regular(path), "rb") as file:
        header, size = file.read(HEADER.size), os.fstat(file.fileno()).st_size
        require(len(header) == HEADER.size and header.startswith(MAGIC), "not a nanoRAT shard")
        _, version, width, n_vocab, job, n_tokens, n_docs, name = HEADER.unpack(header)
        require(version == VERSION, f"shard version {version}, this data.py reads {VERSION}")
        require(width == token_dtype(n_vocab).itemsize,
                f"{width} bytes per token do not fit a vocabulary of {n_vocab}")
        require(n_tokens > 0, "an empty shard")
        end = HEADER.size + n_tokens * width
        whole = end + 8 + 8 * -(-n_tokens // HASHED)
        require(size == whole, f"{size:,} bytes where its header says {whole:,}")
        file.seek(end)
        hashes = file.read()
    require(digest(header) == hashes[:8], "a damaged header, which does not match its hash")
    # Mapped: a folder of shards is larger than memory, and samples take a little from each.
    tokens = np.memmap(path, dtype=token_dtype(n_vocab), mode="r", offset=HEADER.size,
                       shape=(n_tokens,))
    return Shard(path, tokens, hashes[8:], n_vocab, name.rstrip(b"\0").decode(), job, n_docs)


# ---------------------------------------------------------------- documents

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")

# Larger row groups are read by the parent, so that a piece of work stays small and all workers have
# a part in them. Uncompressed bytes, all columns. FineWeb-Edu's have about 1,000 rows, 5 MB.
GROUP_BYTES = 64e6


class RowGroup(NamedTuple):
    """Documents of a .parquet that a worker is to read."""
    path: Path
    field: str
    index: int      # of the row group in the file
    first_row: int  # of the row group in the file, for messages
    n_rows: int
    done: int = 0   # rows at its beginning that whole shards have already


def builtin_text():
    """The reference manual inside every CPython, 0.5 MB of English: the same for each version."""
    from pydoc_data.topics import topics
    return "\n\n".join(topics[name] for name in sorted(topics))


def find_files(inputs):
    """The files to read, in the order of the inputs. Of a folder all that we can read, sorted."""
    files = []
    for path in map(Path, inputs):
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder; check --input")
        found = sorted(path.rglob("*")) if path.is_dir() else [path]
        found = [file for file in found if file.is_file() and file.name.endswith(SUFFIXES)]
        if not found:
            raise ValueError(f"{path}: nothing to read; --input takes {', '.join(SUFFIXES)} files "
                             "and folders of them")
        files += map(regular, found)
    return files


@contextmanager
def naming(path):
    """Errors inside name the file and what to do, in one line."""
    try:
        yield
    except (ValueError, OSError, EOFError, NotImplementedError, zlib.error) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())} (mend or leave out the file, or "
                         "set --text_field)") from None


def documents(files, field):
    """Yield each document, a text or a RowGroup, and how many bytes of input are read by then."""
    before = 0
    for path in files:
        # .jsonl.gz has the suffix .gz.
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
                # Not parse_json: one field counts here, whatever the others hold.
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"line {number}: not JSON, {error}") from None
            yield text_of(row, field, f"line {number}"), raw.tell()


@functools.lru_cache(maxsize=1)  # the next row group is of the same file, as a rule
def open_parquet(path, field):
    try:
        import pyarrow.parquet
    except ImportError:
        raise ImportError(f"{path} needs pyarrow: pip install pyarrow") from None
    # With a buffer a row group is read bit by bit, not whole.
    file = pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20)
    if field not in file.schema_arrow.names:
        raise ValueError(f"no column {field!r} among {file.schema_arrow.names}")
    return file


def read_parquet(path, field):
    meta, row = open_parquet(path, field).metadata, 0
    size, n_rows = path.stat().st_size, max(1, meta.num_rows)
    for index in range(meta.num_row_groups):
        group = RowGroup(path, field, index, row, n_rows=meta.row_group(index).num_rows)
        if meta.row_group(index).total_byte_size <= GROUP_BYTES:
            row += group.n_rows
            yield group, size * row // n_rows
        else:
            for row, text in enumerate(read_rows(group), row + 1):
                yield text, size * row // n_rows


def read_rows(group):
    # 64 rows at a time, and in this thread: all cores are busy with encoding already.
    file, number = open_parquet(group.path, group.field), group.first_row
    for batch in file.iter_batches(batch_size=64, row_groups=[group.index],
                                   columns=[group.field], use_threads=False):
        for value in batch.column(0):
            number += 1
            yield text_of({group.field: value.as_py()}, group.field, f"row {number}")


def text_of(row, field, where):
    if not isinstance(row, dict) or not isinstance(row.get(field), str):
        raise ValueError(f"{where}: no text under {field!r} in {short(row)}")
    return row[field]


# ---------------------------------------------------------------- workers, which encode

ENDS = {signal.SIGINT, signal.SIGTERM}


def start_worker(its_tokenizer):
    # Ctrl-C is the parent's to handle.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDS)
    # A worker whose parent was killed would wait for work for ever.
    threading.Thread(target=end_with_parent, daemon=True).start()
    # A file opened before the fork would be read by all workers from one shared place.
    open_parquet.cache_clear()
    global tokenizer
    tokenizer = its_tokenizer


def end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def encode_unit(unit):
    """
    unit: a RowGroup, or texts. -> the bytes of each document's tokens, and how many bytes the texts
    have in UTF-8
    """
    if isinstance(unit, RowGroup):
        with naming(unit.path):
            return encode_texts(itertools.islice(read_rows(unit), unit.done, None))
    return encode_texts(unit)


def encode_texts(texts):
    dtype = token_dtype(tokenizer.n_vocab)
    docs, n_bytes = [], 0
    for text in texts:
        ids = array(dtype.char, tokenizer.encode(text))  # numpy reads it three times as fast
        ids.append(tokenizer.eos_id)
        docs.append(np.array(ids, dtype).tobytes())
        n_bytes += len(text.encode(errors="replace"))
    return docs, n_bytes


def start_all(pool):
    """Start the workers. What ctrl-C raises while Python forks is lost, so it is heard after."""
    before = None
    if hasattr(signal, "pthread_sigmask"):
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDS)
    pool.submit(len, ())
    if before is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def encode_all(docs, its_tokenizer, workers):
    """Yield encode_unit of each unit, and the position after it, in the order of docs."""
    # Workers end in any order, so the oldest unit is waited for, while younger ones go on.
    pending = deque()
    with ProcessPoolExecutor(workers, initializer=start_worker, initargs=(its_tokenizer,)) as pool:
        start_all(pool)
        for is_group, run in itertools.groupby(docs, key=lambda doc: isinstance(doc[0], RowGroup)):
            while batch := list(itertools.islice(run, 1 if is_group else 32)):
                units, positions = zip(*batch)
                unit = units[0] if is_group else units
                pending.append((pool.submit(encode_unit, unit), positions[-1]))
                # Results wait in memory, so no more are asked for than keep all workers busy.
                if len(pending) > 2 * workers:
                    future, position = pending.popleft()
                    yield *future.result(), position
        for future, position in pending:
            yield *future.result(), position


# ---------------------------------------------------------------- the parent, which writes

class Writer:
    """Documents into shards. A shard goes to disk, on the thread, while the next one fills."""

    def __init__(self, out, n_shards, tokenizer, shard_tokens, job, thread):
        self.out, self.n_shards, self.shard_tokens = out, n_shards, shard_tokens
        self.rest = tokenizer.n_vocab, tokenizer.name, job
        self.width = token_dtype(tokenizer.n_vocab).itemsize
        self.thread, self.saving, self.docs, self.in_shard = thread, None, [], 0

    def add(self, doc):
        """-> how many tokens this document has"""
        n_tokens = len(doc) // self.width
        self.docs.append(doc)
        self.in_shard += n_tokens
        if self.in_shard >= self.shard_tokens:
            self.save()
        return n_tokens

    def save(self):
        self.wait()
        path = self.out / f"{self.n_shards:05d}.bin"
        self.saving = self.thread.submit(save_shard, path, self.docs, *self.rest)
        self.n_shards, self.docs, self.in_shard = self.n_shards + 1, [], 0

    def wait(self):
        if self.saving:
            self.saving.result()

    def close(self):
        if self.docs:
            self.save()
        self.wait()


def write_shards(docs, total, out, spec, shard_tokens, workers, job):
    """
    docs: (text or RowGroup, position) pairs, position running to total. Goes on after the shards
    that are there.
    """
    its_tokenizer, out = get_tokenizer(spec), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    whole = shards_to_continue(out, its_tokenizer.name, job)
    n_tokens = n_before = sum(len(shard.tokens) for shard in whole)
    if whole:
        print(f"{n_tokens:,} tokens in {len(whole)} shards are whole already: going on after them",
              flush=True)
    docs = skip(docs, sum(shard.n_docs for shard in whole))
    # Asking for the first reads all that is skipped, so the clock starts after it.
    first = list(itertools.islice(docs, 1))
    start = reported = time.perf_counter()
    n_text = 0

    def rates(seconds):
        text = n_text / seconds / 1e6
        return (f"{(n_tokens - n_before) / seconds:,.0f} tokens/s  {text:.1f} MB/s of text, "
                f"{text / workers:.1f} a worker")

    # On a full disk, say, the generator is closed with its workers, before the error is told.
    encoded = encode_all(itertools.chain(first, docs), its_tokenizer, workers)
    with ThreadPoolExecutor(1) as thread, closing(encoded):
        writer = Writer(out, len(whole), its_tokenizer, shard_tokens, job, thread)
        for unit, unit_text, position in encoded:
            n_tokens += sum(map(writer.add, unit))
            # The time left follows from the input, of which bytes are known: not from tokens.
            n_text, now = n_text + unit_text, time.perf_counter()
            if now - reported >= 5 and position > first[0][1]:
                left = (now - start) * (total - position) / (position - first[0][1])
                print(f"{n_tokens:,} tokens  {position / total:.1%}  {rates(now - start)}  "
                      f"{left / 60:.1f} min left", flush=True)
                reported = now
        writer.close()
    if not writer.n_shards:
        raise ValueError(f"no documents in the input; nothing was written to {out}")
    seconds = time.perf_counter() - start
    print(f"{n_tokens:,} tokens in {writer.n_shards} shards  {seconds:.1f} s  {rates(seconds)}")
    model = "--preset=pico" if its_tokenizer.name == "bytes" else "--init=MODEL --memory=on"
    print(f"Next: python train.py {model} --data={out}")


def shards_to_continue(out, tokenizer_name, job):
    """The whole shards of this job in a folder, from which their numbers go on."""
    whole = [open_shard(path) for path in sorted(out.glob("*.bin"))]
    for n, shard in enumerate(whole):
        expected = f"{n:05d}.bin", tokenizer_name, job
        if (shard.path.name, shard.tokenizer, shard.job) != expected:
            raise ValueError(
                f"{shard.path}: a shard of another run (other input, tokenizer, --text_field or "
                "--shard_tokens), or one before it is missing; choose another --output, or move "
                "the .bin files there away")
    # A run that was killed while it wrote leaves these.
    for path in out.glob("*.bin.tmp"):
        path.unlink()
    return whole
