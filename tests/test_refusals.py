"""
What a user can mend is one line that names it, and exit 2: data.py, eval_niah.py, sample.py and the
experiments. A traceback tells a user nothing, and a long run that ends in one even less.
"""
import gzip
import importlib
import io
import json
from pathlib import Path

import pyarrow.parquet
import pytest
import torch

import data
import eval_niah
import niah
import sparse
from conftest import tiny
from experiments import runs
from infra import runlog
from infra.tokenizers import get_tokenizer
from model import Transformer
from test_niah import Bytes
from test_tokenizers import train_bpe
from triton_ops import backend


def parquet(**columns):
    """-> bytes of a .parquet, row groups of 37 rows, its text plain, so that tests can damage it"""
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), out, row_group_size=37,
                                compression="none", use_dictionary=False)
    return out.getvalue()


BRIEF = ["--arms", "memory", "--seeds", "0", "--samples=1"]  # the last of two flags counts
CONVERT = ["--init=plain", "--steps=2", "--batch=2", "--device_batch=2", "--context_len=512",
           "--device=cpu", "--compile=off", "--arl=16"]
SHARDS = ["--input=two.jsonl", "--output=shards", "--workers=1"]
POINTER, NO_TEXT = b"version https://git-lfs.github.com/spec/v1\noid", "no text under 'text'"

# what data.py cannot read: (content, what the line says of it)
BAD_INPUT = {
    "bad.jsonl": (b'{"text": "a"}\n\n{"text": \n', "bad.jsonl: line 3: not JSON"),
    "field.jsonl": (b'{"text": "a"}\n{"content": "b"}\n', f"field.jsonl: line 2: {NO_TEXT}"),
    "null.jsonl": (b'{"text": null}\n', f"null.jsonl: line 1: {NO_TEXT}"),
    "array.jsonl": (b'["text"]\n', f"array.jsonl: line 1: {NO_TEXT}"),
    "cut.jsonl.gz": (gzip.compress(b'{"text": "a"}\n' * 1000)[:-20],
                     "cut.jsonl.gz: Compressed file ended before the end-of-stream"),
    "plain.jsonl.gz": (b'{"text": "a"}\n', "plain.jsonl.gz: Not a gzipped file"),
    "cut.parquet": (parquet(text=["a"] * 99)[:-99], "cut.parquet: Parquet magic bytes"),
    "null.parquet": (parquet(text=["a"] * 40 + [None]), f"null.parquet: row 41: {NO_TEXT}"),
    "number.parquet": (parquet(text=[1]), f"number.parquet: row 1: {NO_TEXT}"),
    "column.parquet": (parquet(id=[1], content=["a"]),
                       "column.parquet: no column 'text' among ['id', 'content']"),
    "empty.parquet": (parquet(text=pyarrow.array([], "string")), "no documents"),
    "latin.txt": ("naïve".encode("latin1"), "latin.txt: 'utf-8' codec can't decode"),
    "empty.jsonl": (b"", "no documents"),
    "blank.jsonl": (b"\xef\xbb\xbf \r\n\n\t\n", "no documents"),
    **{f"lfs{suffix}": (POINTER, "git lfs pull") for suffix in (".jsonl", ".txt", ".parquet")},
    "notes.md": (b"", "notes.md: nothing to read"),
}


def alone(flags, *before):
    """Rows of one bad flag each, which the line names."""
    return [([*before, flag], flag.partition("=")[0]) for flag in flags.split()]


# script: [(flags, what the line says)]
REFUSED = {
    "data": [
        *(([f"--input={name}", "--output=nothing", "--workers=1"], says)
          for name, (_, says) in BAD_INPUT.items()),
        *alone("--worker=2 --workers=0 --workers=inf --workers=1e9 --shard_tokens=many "
               "--shard_tokens=nan --shard_tokens=1e999 --shard_tokens=-1 --shard_tokens=1.5"),
        (["--workers=1e9"], "1 to 1,024"),
        (["--input=x"], "--output"),
        (["--input=x", "--output=y"], "x: no such file"),
        *((["--output=nothing", f"--tokenizer={path}"], f"{path}: no tokenizer here")
          for path in ("nowhere", "byte", "a", "a/tokenizer.json")),
        *(([*SHARDS, other], "a shard of another run")
          for other in ("--shard_tokens=999", "--tokenizer=bpe", "--text_field=body")),
    ],
    "eval_niah": [
        *alone("--frobnicate --samples=0 --seed=-2147483649 --seed=2147483648 --words=none"),
        (["--device=toaster"], "toaster"),
        (["--tasks", "niah_single_9"], "niah_single_9"),
        (["--ckpt", "nowhere"], "nowhere"),
        (["--methods", "quest:budget=1/999"], "1/999"),
        (["--methods", "qwest"], "qwest"),
        (["--random=2", "--methods", "quest:budget=1/8"], "--random"),
        (["--context_len=128", "--methods", "dense"], "--context_len"),
        (["--tokenizer=nowhere"], "nowhere"),
        (["--haystack=nowhere.txt"], "nowhere.txt"),
        (["--jsonl", "other.jsonl"], "other"),
        (["--jsonl", "niah_single_2.jsonl", "a/niah_single_2.jsonl"], "second file of niah_single"),
    ],
    "sample": [
        *alone("--frobnicate --prompt= --max_new_tokens=0 --temperature=nan --seed=2147483648 "
               "--words=none"),
        (["--ckpt=nowhere"], "nowhere"),
        (["--method=qwest"], "qwest"),
        (["--context_len=64"], "64"),
        ([f"--prompt={'a' * 600}", "--method=quest:budget=1/4"], "--context_len=768"),
    ],
    "experiments.reproduce": [
        ([*BRIEF, "--train=--seed=5"], "--seed=5"),
        ([*BRIEF, "--train=--memory=off"], "--memory"),
        ([*BRIEF, "--train=--joint=64"], "--joint"),
        ([*BRIEF, "--train=--name=x"], "--name"),
        ([*BRIEF, "--train=--lr '1"], "--train"),
        ([*BRIEF, "--train=--init x"], "--init"),
        ([*BRIEF, "--seeds", "-1"], "--seeds"),
        ([*BRIEF, "--results=plain/config.json"], "plain/config.json"),
        (["--arms", "--results=model"], "no finished run"),
    ],
    "experiments.gate_start": [
        *alone("--g0=1 --steps=none --name=other", *CONVERT),
        ([*CONVERT, "--arl=0"], "--arl=0"),
        ([*CONVERT, "--init=nowhere"], "nowhere"),
        ([*CONVERT], "train.json"),
        ([*CONVERT, "--init=model"], "memory already"),
    ],
    "experiments.moba_question": [
        *alone("--method=dense --question=0", "--ckpt=model"),
        (["--ckpt", "model", "nowhere"], "nowhere"),
        (["--ckpt=damaged"], "damaged/train.json is damaged"),
    ],
    "experiments.snapkv_answer": [
        *alone("--method=dense --batch=0", "--ckpt=model"),
        (["--ckpt=nowhere"], "nowhere"),
    ],
}


def refusal(script, flags, words, capsys):
    """The script ends with exit 2 and one line that says these words."""
    with pytest.raises(SystemExit) as end:
        importlib.import_module(script).main(list(map(str, flags)))
    line = capsys.readouterr().err
    assert end.value.code == 2 and line.count("\n") == 1 and len(line) < 700, line
    # gate_start's --steps are a flag of train.py, which refuses them itself
    assert line.startswith((f"{script.rpartition('.')[2]}.py: ", "train.py: ")), line
    assert words in line, line


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two models, of which one tells how it was made, and files of examples."""
    folder = tmp_path_factory.mktemp("refusals")
    for name, memory in ("plain", False), ("model", True):
        tiny(vocab_size=257, context_len=512, memory=memory).save_pretrained(folder / name)
    record = {"step": 1, "settings": {"protocol": "base", "tokenizer": None}}
    (folder / "model" / "train.json").write_text(json.dumps(record))
    for name in "damaged", "a":
        (folder / name).mkdir()
    (folder / "damaged" / "train.json").write_text('{"step": 3, "set')
    example = niah.make_example("niah_single_2", 512, Bytes(), 0, 0, max_new_tokens=48)
    for file in "other.jsonl", "niah_single_2.jsonl", "a/niah_single_2.jsonl":
        niah.write_jsonl(folder / file, [example])
    for name, (content, _) in BAD_INPUT.items():
        (folder / name).write_bytes(content)
    train_bpe(folder / "bpe", "gpt2")
    (folder / "two.jsonl").write_text('{"text": "a", "body": "b"}\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        data.main(SHARDS)
    return folder


@pytest.mark.parametrize("script, flags, words", [
    (script, *case) for script, cases in REFUSED.items() for case in cases])
def test_a_refusal_is_one_line_and_exit_2(script, flags, words, folder, monkeypatch, capsys):
    """A traceback; a line that does not tell what to mend; hours of work before it."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(runlog, "SHIPPED", [Path("model")])
    monkeypatch.setattr(backend, "choice", backend.choice)  # which the experiments set
    monkeypatch.setattr(runs, "subprocess", None)  # nothing is started, and nobody asked
    monkeypatch.setattr(eval_niah, "prefill", lambda *_: pytest.fail("asked"))
    refusal(script, flags, words, capsys)
    assert not (folder / "nothing" / "00000.bin").exists()


# ---------------------------------------------------------------- in a program

MODEL = tiny(vocab_size=257)
IDS = torch.tensor([[1, 2, 3]])
BYTES = get_tokenizer("bytes")
WRONG = {
    "a model is named by its path": lambda: Transformer.from_pretrained(None),
    "a method's text is parsed": lambda: sparse.parse(3, 1024),
    "number of tokens, not str: '64'": lambda: sparse.parse("quest:budget=1/4", "64"),
    "quest: budget=0.25: expected int": lambda: sparse.Quest(budget=1 / 4),
    "snapkv: kernel=None: expected int": lambda: sparse.SnapKV(kernel=None),
    "dilated: local='a': expected int": lambda: sparse.Dilated(local="a"),
    "moba: keep_first=3: expected bool": lambda: sparse.MoBA(keep_first=3),
    "ids, not list: [1]": lambda: MODEL.prefill([1]),
    "torch.float32 (1, 3)": lambda: MODEL(IDS.float()),
    "torch.int64 (3,)": lambda: MODEL.generate(IDS[0], 2),
    "of a text, not 'moba'": lambda: MODEL(IDS, sparse="moba"),
    "of a text, not str: 'quest'": lambda: MODEL.prefill(IDS, None, MODEL.new_cache(1, 8), "quest"),
    "encodes text, not bytes": lambda: BYTES.encode(b"a"),
    "bytes or a path, not int": lambda: get_tokenizer(3),
    "no tokenizer: 'bytes'": lambda: niah.make_example("S-1", 1024, "bytes", 0, 0),
    "tokens, not str: '1024'": lambda: niah.make_example("S-1", "1024", BYTES, 0, 0),
}


@pytest.mark.parametrize("said", WRONG)
def test_a_wrong_type_is_one_line_that_says_what_is_taken(said):
    with pytest.raises((TypeError, ValueError)) as error:
        WRONG[said]()
    assert said in str(error.value) and "\n" not in str(error.value)
