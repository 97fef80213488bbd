"""
data.py and infra/shards.py: shards and samples against the plain stream of tokens, the script
killed, interrupted, repeated and fed damaged files. Tokenizers are in test_tokenizers.py.
"""
import errno
import gzip
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from hypothesis import assume, example, given, settings, strategies as st

import data
from conftest import refused
from infra import shards
from infra.shards import builtin_text, open_shard, save_shard
from infra.tokenizers import ByteTokenizer, get_tokenizer
from on_disk import contents
from test_refusals import parquet, refusal
from test_tokenizers import NASTY, train_bpe

ROOT = Path(__file__).resolve().parent.parent


# ---------------------------------------------------------------- shards and samples

def write_stream(folder, lengths, n_vocab=60_000, tokenizer="t"):
    """Shards of these lengths whose tokens count 0, 1, 2, ... along the stream."""
    folder.mkdir(exist_ok=True)
    starts = np.cumsum([0] + lengths)
    for n, length in enumerate(lengths):
        tokens = np.arange(starts[n], starts[n] + length).astype(shards.token_dtype(n_vocab))
        save_shard(folder / f"{n:05d}.bin", [tokens.tobytes()], n_vocab, tokenizer, job=7)
    return folder


@given(n=st.integers(1, 300) | st.sampled_from([1000, 4097]), key=st.text(max_size=3))
@settings(max_examples=60, deadline=None)
def test_shuffled_is_a_permutation(n, key):
    """A Feistel round that is not invertible; a walk that leads two indices to one window."""
    assert sorted(data.shuffled(i, n, key) for i in range(n)) == list(range(n))


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6), context_len=st.integers(1, 9),
       seed=st.integers(0, 9))
@example(lengths=[8 * 250 + 1], context_len=8, seed=0)
@example(lengths=[8 * 250], context_len=8, seed=0)  # the last window lacks its last target
@settings(max_examples=60, deadline=None)
def test_an_epoch_visits_every_window_of_its_split_once(lengths, context_len, seed):
    """Windows lost, repeated or cut wrongly where shards meet; validation on training's."""
    n_windows = (sum(lengths) - 1) // context_len
    assume(n_windows >= 2)
    n_val = 1 + (n_windows >= 200)
    windows = {"train": range(n_windows - n_val), "val": range(n_windows - n_val, n_windows)}
    with tempfile.TemporaryDirectory() as folder:
        write_stream(Path(folder), lengths)
        for split, expected in windows.items():
            stream = data.Shards(folder, context_len, seed, split)
            samples = [stream.sample(i) for i in range(len(stream), 2 * len(stream))]  # epoch 1
            assert sorted(sample[0] // context_len for sample in samples) == list(expected)
            for sample in samples:
                assert sample.dtype == np.int64 and sample[0] % context_len == 0
                assert sample.tolist() == list(range(sample[0], sample[0] + context_len + 1))


def test_a_sample_depends_on_seed_and_index_only(tmp_path):
    """
    Hidden state, by which a resumed run, or other ranks, would train on other data; an order that
    repeats in the next epoch, or with another seed.
    """
    folder = write_stream(tmp_path / "s", [3000])
    stream = data.Shards(folder, 30, seed=1)
    n, alone = len(stream), lambda seed, i: data.Shards(folder, 30, seed).sample(i)[0] // 30
    orders = [range(n), *([alone(seed, first + i) for i in range(n)]
                          for seed, first in ((1, 0), (1, n), (2, 0)))]
    assert orders[1] == [stream.sample(i)[0] // 30 for i in range(n)]
    for a, b in itertools.combinations(orders, 2):  # by chance two agree at about one place
        assert sum(x == y for x, y in zip(a, b)) < 8
    assert np.corrcoef(*orders[:2])[0, 1] < 0.5


@pytest.mark.parametrize("n_vocab, width", [(257, 2), (65536, 2), (65537, 4), (100278, 4)])
def test_tokens_are_as_wide_as_the_vocabulary_needs(tmp_path, n_vocab, width):
    """Ids above 65535 that wrap around."""
    top = np.array([n_vocab - 1] * 20, dtype=shards.token_dtype(n_vocab))
    save_shard(tmp_path / "00000.bin", [top.tobytes()], n_vocab, "t", job=0)
    assert (tmp_path / "00000.bin").stat().st_size == 64 + 20 * width + 16
    assert data.Shards(tmp_path, 4, seed=0).sample(0).tolist() == [n_vocab - 1] * 5


@pytest.mark.parametrize("at, content, problem", [
    (0, b"PK", "not a nanoRAT shard"), (63, None, "not a nanoRAT shard"),
    (8, b"\x09", "shard version 9"), (12, b"\x04", "4 bytes per token"),
    (-1, None, "header says"), (24, bytes(8), "empty shard")])
def test_a_damaged_shard_is_refused(tmp_path, at, content, problem):
    """A half-copied or foreign file read as tokens. None: cut off there."""
    path = write_stream(tmp_path / "s", [100]) / "00000.bin"
    raw = path.read_bytes()
    path.write_bytes(raw[:at] + (content + raw[at + len(content):] if content else b""))
    refused(lambda: data.Shards(path.parent, 4, seed=0), path, problem)


def test_a_folder_that_cannot_be_a_stream_is_refused(tmp_path):
    """Two tokenizers, no shard, too few tokens, a shard missing among others, foreign ids."""
    folder = write_stream(tmp_path / "s", [100, 100, 100])
    make = lambda context_len=8: data.Shards(folder, context_len, seed=0)
    refused(lambda: make(200), "context_len 200, train and val need 2")
    (folder / "00001.bin").rename(tmp_path / "away")
    refused(make, "00001.bin is missing", "00002.bin", error=FileNotFoundError)
    save_shard(folder / "00001.bin", [bytes(200)], 60_000, "other", job=7)
    refused(make, "00001.bin: tokenizer other")
    refused(lambda: data.Shards(tmp_path, 8, 0), "no .bin shards", error=FileNotFoundError)
    small = data.Shards(write_stream(tmp_path / "small", [100, 100], n_vocab=150), 4, seed=0)
    refused(lambda: list(map(small.sample, range(len(small)))), "00001.bin: token 1",
            "is outside the vocabulary of 150")


# ---------------------------------------------------------------- the script

def run_main(*args):
    data.main(list(map(str, args)))


def make_input(folder, n_docs=300):
    """
    The same documents as a .jsonl, a .jsonl.gz, a .parquet and one .txt each, some with the mark in
    front that editors leave. -> documents
    """
    topics, mark = builtin_text().split("\n\n"), b"\xef\xbb\xbf"
    docs = [f"{i} {NASTY[i % len(NASTY)]} {topics[i % len(topics)]}" for i in range(n_docs)]
    (folder / "d").mkdir(parents=True)
    lines = mark + "".join(json.dumps({"id": i, "text": doc}) + "\n" + "\n" * (i % 3 == 0)
                           for i, doc in enumerate(docs)).encode()
    (folder / "a.jsonl").write_bytes(lines)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (folder / "c.parquet").write_bytes(parquet(id=range(n_docs), text=docs))
    for i, doc in enumerate(docs):
        (folder / "d" / f"{i:04d}.txt").write_bytes(mark * (i % 3 == 0) + doc.encode())
    (folder / "ignored.md").write_text("not read")
    return docs


def written_plainly(docs, files, out, tok, shard_tokens):
    """
    {name: bytes} of the shards that data.py promises: whole documents, a shard closed by the one
    that reaches shard_tokens.
    """
    asked = [(f.name, f.stat().st_size) for f in files], "text", shard_tokens
    job, shard, n_tokens = zlib.crc32(repr(asked).encode()), [], 0
    out.mkdir()
    for number, doc in enumerate(docs, 1):
        ids = tok.encode(doc) + [tok.eos_id]
        shard.append(np.array(ids, shards.token_dtype(tok.n_vocab)).tobytes())
        n_tokens += len(ids)
        if n_tokens >= shard_tokens or number == len(docs):
            path = out / f"{len(list(out.glob('*'))):05d}.bin"
            save_shard(path, shard, tok.n_vocab, tok.name, job)
            shard, n_tokens = [], 0
    return contents(out)


@pytest.mark.parametrize("workers, group_bytes", [(1, 64e6), (3, 64e6), (3, 0)])
def test_shards_are_those_of_a_plain_loop(tmp_path, monkeypatch, workers, group_bytes):
    """
    All four kinds of file, row groups read by workers or, as large ones are, by the parent:
    documents lost, reordered or split, workers that race, and another checksum of the job, with
    which shards of an earlier version would not be continued.
    """
    docs, tokenizer = make_input(tmp_path / "in"), train_bpe(tmp_path / "bpe", "gpt2")
    monkeypatch.setattr(shards, "GROUP_BYTES", group_bytes)
    files = shards.find_files([tmp_path / "in"])
    plain = written_plainly(docs * 4, files, tmp_path / "plain", get_tokenizer(tokenizer), 50_000)
    run_main("--input", tmp_path / "in", "--output", tmp_path / "out", "--tokenizer", tokenizer,
             "--shard_tokens=5e4", "--workers", workers)
    assert len(plain) > 2 and contents(tmp_path / "out") == plain


def test_progress_says_how_much_and_how_fast(tmp_path, monkeypatch, capsys):
    """A rate over the wrong time, a share beyond 100 %, a division by zero hours into the work."""
    docs = [f"{i} " + "é" * 9_999 for i in range(37 * 20)]
    (tmp_path / "in.parquet").write_bytes(parquet(text=docs))
    monkeypatch.setattr(time, "perf_counter", itertools.count(step=5).__next__)
    run_main("--input", tmp_path / "in.parquet", "--output", tmp_path / "out", "--workers=2")
    lines = [line for line in capsys.readouterr().out.splitlines() if "tokens/s" in line]
    form = ("{} tokens  {}%  {} tokens/s  {} MB/s of text, {} a worker  {} min left"
            .replace("{}", r"([\d,.]+)"))
    seen = [re.match(form, line) for line in lines[:-1]]
    shares = [float(match[2]) for match in seen]
    assert len(lines) == 20 and shares == sorted(shares) and shares[-1] == 100
    assert float(seen[-1][6]) == 0
    seconds = 5 * 21  # the clock is read at the start, after each row group, at the end
    n_tokens = sum(len(doc.encode()) + 1 for doc in docs)
    text = (n_tokens - len(docs)) / seconds / 1e6
    assert lines[-1] == (f"{n_tokens:,} tokens in 1 shards  {seconds:.1f} s  "
                         f"{n_tokens / seconds:,.0f} tokens/s  {text:.1f} MB/s of text, "
                         f"{text / 2:.1f} a worker")


def start_script(tmp_path, out, workers=2, suffix=".jsonl"):
    """
    -> a run that has written its second shard and cannot end before tmp_path / "hold" is removed;
    the texts; the same command without a hold
    """
    source, texts = tmp_path / f"in{suffix}", [f"{i} {builtin_text()[:100_000]}"
                                               for i in range(400)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    source.write_bytes(parquet(text=texts) if suffix == ".parquet" else lines)
    flags = [f"--input={source}", f"--output={out}", "--shard_tokens=2e6", f"--workers={workers}"]
    (tmp_path / "hold").touch()
    script = subprocess.Popen(
        [sys.executable, "tests/held.py", *flags], cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
        # where a shell runs the tests in the background, ctrl-C is ignored, and that is inherited
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        env=os.environ | {"HOLD": str(tmp_path / "hold")})
    while not (out / "00001.bin").exists():
        assert script.poll() is None, script.communicate()
        time.sleep(0.01)
    return script, texts, [sys.executable, "data.py", *flags]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_killed_run_leaves_whole_shards_and_a_rerun_completes_them(tmp_path, suffix):
    """
    Half a shard under its final name, work done twice or skipped, workers that outlive their
    parent, row groups read again although whole shards have them, a .tmp that stays for ever.
    """
    out = tmp_path / "out"
    script, texts, command = start_script(tmp_path, out, suffix=suffix)
    script.kill()
    script.communicate(timeout=300)  # ends when the last worker has closed its stdout
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*.bin")}
    n_docs = sum(open_shard(path).n_docs for path in kept)
    assert 2 <= len(kept) <= 6  # of 20: the others are held
    (out / "00099.bin.tmp").write_bytes(b"half a shard")
    if suffix == ".parquet":
        assert n_docs >= 37 and n_docs % 37  # a row group is done, and another in part
        damage(tmp_path / "in.parquet", range(n_docs // 37))
    rerun = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert f"in {len(kept)} shards are whole already" in rerun.stdout, rerun
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
    plain = written_plainly(texts, [tmp_path / f"in{suffix}"], tmp_path / "plain",
                            ByteTokenizer(), 2_000_000)
    assert contents(out) == plain
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0 and contents(out) == plain


def damage(path, groups):
    """Overwrite the text of these row groups of a .parquet, whose size and footer stay."""
    file = pyarrow.parquet.ParquetFile(path)
    with open(path, "r+b") as f:
        for index in groups:
            names = file.schema_arrow.names
            column = file.metadata.row_group(index).column(names.index("text"))
            f.seek(column.data_page_offset)
            f.write(b"\xff" * column.total_compressed_size)


encode_unit = shards.encode_unit  # as it is before the next one takes its place


def killed_in_row_group_17(unit):
    if unit.index == 17:
        os.kill(os.getpid(), signal.SIGKILL)
    return encode_unit(unit)


def no_room(_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("fault, said", [
    (lambda patch, source: damage(source, [17]), "in.parquet: "),
    (lambda patch, _: patch.setattr(shards, "encode_unit", killed_in_row_group_17),
     "a worker was killed"),
    (lambda patch, _: patch.setattr(os, "fsync", no_room),
     "00000.bin: not written (No space left on device)")],
    ids=["a damaged row group", "a killed worker", "a full disk"])
def test_a_fault_is_one_line_and_once_mended_the_run_goes_on(
        tmp_path, monkeypatch, capsys, fault, said):
    """
    Whole shards that are lost, a traceback, a line that does not name the file or the disk, half a
    shard that keeps the disk full. The kernel kills what takes too much memory.
    """
    docs = [f"{i} text" for i in range(37 * 20)]
    source, out = tmp_path / "in.parquet", tmp_path / "out"
    source.write_bytes(whole := parquet(id=range(len(docs)), text=docs))
    command = ["--input", source, "--output", out, "--workers=1", "--shard_tokens=1000"]
    with monkeypatch.context() as patch:
        fault(patch, source)
        refusal("data", command, said, capsys)
    # 629 rows come before row group 17, and 1,000 tokens are 104 to 112 of them
    n_whole = 0 if said.startswith("00000") else 5
    assert sorted(contents(out)) == [f"{n:05d}.bin" for n in range(n_whole)]
    source.write_bytes(whole)
    run_main(*command)
    assert contents(out) == written_plainly(docs, [source], tmp_path / "plain", ByteTokenizer(),
                                            1000)


def test_ctrl_c_ends_in_one_line(tmp_path):
    """A screenful of tracebacks, one per worker."""
    script, *_ = start_script(tmp_path, tmp_path / "out", workers=8)
    os.killpg(script.pid, signal.SIGINT)  # as a terminal does: to the workers too
    (tmp_path / "hold").unlink()  # workers end what they have begun
    _, said = script.communicate(timeout=300)
    said = said.strip()
    assert script.returncode == 130, said
    assert said.startswith("data.py: interrupted") and "\n" not in said, said


def test_workers_leave_ctrl_c_to_their_parent():
    """Workers that die of it, with a traceback each: in the test above a matter of timing."""
    with ProcessPoolExecutor(1, initializer=shards.start_worker,
                             initargs=(ByteTokenizer(),)) as pool:
        assert pool.submit(signal.getsignal, signal.SIGINT).result() == signal.SIG_IGN
