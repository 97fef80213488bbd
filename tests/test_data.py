"""
data.py and infra/shards.py: shards and samples against the plain stream of tokens, the script
killed, interrupted, repeated and fed damaged files. Tokenizers are in test_tokenizers.py.
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
from hypothesis import given, settings, strategies as st

import data
from conftest import refused
from infra import shards
from infra.shards import builtin_text, open_shard, save_shard
from infra.tokenizers import ByteTokenizer, get_tokenizer
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


def test_each_epoch_visits_every_window_once_in_another_order(tmp_path):
    """Windows lost, repeated or cut wrongly where shards meet; an order that repeats."""
    folder = write_stream(tmp_path / "s", [101, 3, 1, 1, 2, 700])
    orders = []
    for seed, epoch in (1, 0), (1, 1), (2, 0):
        stream = data.Shards(folder, 8, seed)
        samples = [stream.sample(epoch * len(stream) + i) for i in range(len(stream))]
        for sample in samples:
            assert sample.dtype == np.int64
            np.testing.assert_array_equal(sample, np.arange(sample[0], sample[0] + 8 + 1))
        orders.append([int(sample[0]) for sample in samples])
        assert sorted(orders[-1]) == [8 * w for w in range(len(stream))]
    for a, b in itertools.combinations(orders, 2):  # by chance two agree at about one place
        assert sum(x == y for x, y in zip(a, b)) < 8
    assert np.corrcoef(orders[0], range(len(orders[0])))[0, 1] < 0.5


def test_a_sample_depends_on_seed_and_index_only(tmp_path):
    """Hidden state, by which a resumed run, or other ranks, would train on other data."""
    folder = write_stream(tmp_path / "s", [3000])
    forward = list(map(data.Shards(folder, 16, seed=5).sample, range(500)))
    for i in reversed(range(500)):
        np.testing.assert_array_equal(data.Shards(folder, 16, seed=5).sample(i), forward[i])


@pytest.mark.parametrize("length, n_train, n_val",
                         [(17, 1, 1), (8 * 250 + 1, 248, 2), (8 * 250, 247, 2)])
def test_train_and_val_share_no_window_and_miss_none(tmp_path, length, n_train, n_val):
    """Validation on what was trained on, and a last window without its last target."""
    folder = write_stream(tmp_path / "s", [length])
    train, val = (data.Shards(folder, 8, seed=1, split=split) for split in ("train", "val"))
    starts = [sorted(int(s.sample(i)[0]) for i in range(len(s))) for s in (train, val)]
    assert (len(train), len(val)) == (n_train, n_val)
    assert starts[0] + starts[1] == [8 * w for w in range(n_train + n_val)]


@pytest.mark.parametrize("n_vocab, width", [(257, 2), (65536, 2), (65537, 4), (100278, 4)])
def test_tokens_are_as_wide_as_the_vocabulary_needs(tmp_path, n_vocab, width):
    """Ids above 65535 that wrap around."""
    top = np.array([n_vocab - 1] * 20, dtype=shards.token_dtype(n_vocab))
    save_shard(tmp_path / "00000.bin", [top.tobytes()], n_vocab, "t", job=0)
    assert (tmp_path / "00000.bin").stat().st_size == 64 + 20 * width + 16
    assert data.Shards(tmp_path, 4, seed=0).sample(0).tolist() == [n_vocab - 1] * 5


def test_an_interrupted_write_leaves_no_shard(tmp_path, monkeypatch):
    """Tokens written under the final name, where a kill leaves a shard that looks like one."""
    def killed(_):
        raise KeyboardInterrupt
    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        save_shard(tmp_path / "00000.bin", [bytes(100)], 257, "bytes", job=0)
    assert not list(tmp_path.glob("*.bin"))


@pytest.mark.parametrize("damage, problem", [
    (lambda raw: b"PK" + raw[2:], "not a nanoRAT shard"),
    (lambda raw: raw[:63], "not a nanoRAT shard"),
    (lambda raw: raw[:8] + b"\x09" + raw[9:], "shard version"),
    (lambda raw: raw[:12] + b"\x04" + raw[13:], "bytes per token"),
    (lambda raw: raw[:-1], "header says"),
    (lambda raw: raw[:24] + bytes(8) + raw[32:64], "empty shard")])
def test_a_damaged_shard_is_refused(tmp_path, damage, problem):
    """A half-copied or foreign file read as tokens."""
    path = write_stream(tmp_path / "s", [100]) / "00000.bin"
    path.write_bytes(damage(path.read_bytes()))
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


def ends(capsys, *args, code=2):
    """The script ends with this code and one line, which is returned."""
    with pytest.raises(SystemExit) as end:
        run_main(*args)
    said = capsys.readouterr().err
    assert end.value.code == code and said.startswith("data.py: ") and said.count("\n") == 1, said
    return said


def parquet(**columns):
    """-> bytes of a .parquet, row groups of 37 rows, its text plain, so that tests can damage it"""
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), out, row_group_size=37,
                                compression="none", use_dictionary=False)
    return out.getvalue()


def make_input(folder, n_docs=300):
    """The same documents as a .jsonl, a .jsonl.gz, a .parquet and one .txt each. -> documents"""
    topics = builtin_text().split("\n\n")
    docs = [f"{i} {NASTY[i % len(NASTY)]} {topics[i % len(topics)]}" for i in range(n_docs)]
    (folder / "d").mkdir(parents=True)
    lines = "".join(json.dumps({"id": i, "text": doc}) + "\n" + "\n" * (i % 3 == 0)
                    for i, doc in enumerate(docs)).encode()
    (folder / "a.jsonl").write_bytes(lines)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    pyarrow.parquet.write_table(pyarrow.table({"id": range(n_docs), "text": docs}),
                                folder / "c.parquet", row_group_size=37)
    for i, doc in enumerate(docs):
        (folder / "d" / f"{i:04d}.txt").write_bytes(doc.encode())
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


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*")}


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


@pytest.mark.parametrize("fault", ["a damaged row group", "a killed worker", "a full disk"])
def test_a_fault_is_one_line_and_once_mended_the_run_goes_on(tmp_path, monkeypatch, capsys, fault):
    """
    Whole shards that are lost, a traceback, a line that does not name the file or the disk, half a
    shard that keeps the disk full. The kernel kills what takes too much memory.
    """
    docs = [f"{i} text" for i in range(37 * 20)]
    source, out = tmp_path / "in.parquet", tmp_path / "out"
    source.write_bytes(whole := parquet(id=range(len(docs)), text=docs))
    command = "--input", source, "--output", out, "--workers=1", "--shard_tokens=1000"
    with monkeypatch.context() as patch:
        if fault == "a damaged row group":
            damage(source, [17])
            said = f"data.py: {source}: "
        elif fault == "a killed worker":
            patch.setattr(shards, "encode_unit", killed_in_row_group_17)
            said = "data.py: a worker was killed"
        else:
            patch.setattr(os, "fsync", no_room)
            said = f"data.py: {out / '00000.bin'}: not written (No space left on device)"
        assert ends(capsys, *command).startswith(said)
    # 629 rows come before row group 17, and 1,000 tokens are 104 to 112 of them
    expected = [] if fault == "a full disk" else [f"{n:05d}.bin" for n in range(5)]
    assert sorted(contents(out)) == expected
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
    assert script.returncode == 130
    assert said.startswith("data.py: interrupted") and "\n" not in said, said


def test_workers_leave_ctrl_c_to_their_parent():
    """Workers that die of it, with a traceback each: in the test above a matter of timing."""
    with ProcessPoolExecutor(1, initializer=shards.start_worker,
                             initargs=(ByteTokenizer(),)) as pool:
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
def test_bad_input_is_one_line_and_exit_2(tmp_path, capsys, name):
    """A traceback, or a message that leaves the reader to find the file and the line."""
    content, message = BAD_INPUT[name]
    (tmp_path / name).write_bytes(content)
    said = ends(capsys, "--input", tmp_path / name, "--output", tmp_path / "out", "--workers=1")
    assert message in said and (name in said or name.startswith(("empty", "blank")))
    assert not list((tmp_path / "out").glob("*.bin"))


@pytest.mark.parametrize("args, message", [
    ("--worker=2", "--worker=2"), ("--workers=0", "--workers"), ("--workers=inf", "--workers"),
    ("--workers=1e9", "1 to 1,024"), ("--shard_tokens=many", "many"),
    ("--shard_tokens=nan", "--shard_tokens"), ("--shard_tokens=1e999", "--shard_tokens"),
    ("--shard_tokens=-1", "--shard_tokens"), ("--shard_tokens=1.5", "--shard_tokens"),
    ("--input=x", "--output"), ("--input=x --output=y", "x: no such file"),
    ("--tokenizer=nowhere --output=y", "nowhere: no tokenizer here")])
def test_bad_flags_are_one_line_and_exit_2(tmp_path, monkeypatch, capsys, args, message):
    """A mistyped flag that is ignored or completed to another."""
    monkeypatch.chdir(tmp_path)
    assert message in ends(capsys, *args.split())


def test_shards_of_another_run_are_not_continued(tmp_path, capsys):
    """A folder whose first shards are of one tokenizer or input and whose last are of another."""
    (tmp_path / "in.jsonl").write_text('{"text": "a", "body": "b"}\n')
    base = "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out", "--workers=1"
    run_main(*base)
    gpt2 = train_bpe(tmp_path / "bpe", "gpt2")
    for change in "--shard_tokens=999", f"--tokenizer={gpt2}", "--text_field=body":
        assert "a shard of another run" in ends(capsys, *base, change)


def test_the_mark_that_an_editor_begins_a_text_with_is_no_part_of_it(tmp_path):
    """A first token that stands for nothing, in each document of a folder."""
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\n")
    assert [text for text, _ in shards.documents([tmp_path / "a.txt"], "text")] == ["one\n"]
