"""
Files from strangers: whatever is in them, they are read right or refused in one line that names the
file. Nothing hangs, no code runs, memory stays within twice the files (judge.py watches).

    for each kind of file and index:   change = mutated(kind, Random(f"{kind} {index}"))
        loaded  -> must be what an independent reader finds in the changed file, or, where files are
                   hashed, in the original
        refused -> one line, which names the file

CI tries a sample, `pytest --slow` all: see INPUTS.
"""
import ast
import hashlib
import io
import json
import math
import os
import random
import shutil
import struct
import sys
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from safetensors.torch import save_file

import judge
import niah
import train
from conftest import (LLAMA_FORM, QWEN2_FORM, QWEN3_FORM, STRETCH, official_names, save_pth,
                      times)
from infra import answers, shards, weights
from infra.tokenizers import ByteTokenizer
from judge import ROOT
from on_disk import INDEX, ONE, config, foreign, save
from test_data import write_stream
from test_tokenizers import train_bpe, train_llama

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="judge.py reads /proc")
FAMILIES = {"llama": LLAMA_FORM | dict(rope_scaling=STRETCH), "qwen2": QWEN2_FORM,
            "qwen3": QWEN3_FORM}
# With --slow. CI tries a tenth.
INPUTS = {"olmo2": 500, "olmo2 shards": 300, "olmo2 config": 300, "ours": 400, "checkpoint": 200,
          "llama": 200, "llama config": 300, "qwen2": 200, "qwen3": 200, "qwen3 config": 300,
          "pth": 400, "tokenizer": 300, "shards": 300, "ruler": 300, "answers": 200,
          "llama tokenizer": 300}


# ---------------------------------------------------------------- the generator: bytes, JSON

def change_bytes(data, random):
    """-> what was done, and the changed bytes"""
    at, length = random.randrange(len(data)), random.choice([1, 4, 8, 64, 1024])
    before, part, after = data[:at], data[at:at + length], data[at + length:]
    what, changed = random.choice([
        ("flip", bytes([part[0] ^ 1 << random.randrange(8)]) + part[1:] + after),
        ("byte", bytes([random.randrange(256)]) + part[1:] + after),
        ("cut", b""), ("grow", part + after + bytes(length)), ("drop", after),
        ("twice", part + part + after), ("swap", after[:length] + part + after[length:]),
        ("zeros", bytes(len(part)) + after), ("ones", b"\xff" * len(part) + after)])
    return f"{what} at {at}, {length} bytes", before + changed


class Pairs(list):
    """A JSON object as pairs, so that a key may come twice."""


STRANGE = [
    None, True, False, 0, -1, 1, 2, 3, 7, 1.5, -0.5, 2**31, 2**53 + 1, 2**63, 2**64, 10**40,
    -10**12, 1e308, math.inf, -math.inf, math.nan, "", "x", "0", "../x", "/etc/passwd", "..",
    "a\0b", "\x1b[31m\n", "\ud800", "x" * 5000, [], [0], [-1], [[]], ["x"], [1e400],
    [2**40, 2**40], Pairs(), Pairs([("", Pairs())]), Pairs([("a", 1), ("a", 2)])]


def dump(tree):
    if isinstance(tree, Pairs):
        return "{" + ",".join(f"{json.dumps(key)}:{dump(value)}" for key, value in tree) + "}"
    return "[" + ",".join(map(dump, tree)) + "]" if isinstance(tree, list) else json.dumps(tree)


def nodes(tree):
    """All (container, position) in the tree."""
    for i in range(len(tree)) if isinstance(tree, list) else ():
        yield tree, i
        yield from nodes(tree[i][1] if isinstance(tree, Pairs) else tree[i])


def change_json(data, random):
    """-> what was done, and the changed bytes"""
    tree = json.loads(data, object_pairs_hook=Pairs)
    container, i = random.choice(list(nodes(tree)))
    keyed = isinstance(container, Pairs)
    key, old = container[i] if keyed else (i, container[i])
    entry = lambda value, key=key: (key, value) if keyed else value
    strange, deep = random.choice(STRANGE), random.choice([50, 900, 100_000])
    near = old + random.choice([-1, 1, 8, -8]) if type(old) in (int, float) else strange
    name = random.choice(["", "x", f"{key}x", "../x", "\n"])
    what, container[i:i + 1] = random.choice([
        *3 * [("replace", [entry(strange)])], ("near", [entry(near)]), ("drop", []),
        ("twice", [entry(strange), entry(old)]),
        ("rename", [entry(old if keyed else strange, name)]),
        ("deep", [entry("@@")]), ("root", [entry(old)])])
    text = dump(strange if what == "root" else tree)
    text = text.replace('"@@"', "[" * deep + "]" * deep, 1)
    return f"{what} {key!r}: {strange!r:.60}", text.encode(errors="surrogatepass")


def change_text(data, random):
    """JSON: seven of ten changes are to the tree, the others to the bytes."""
    return (change_bytes if random.random() < 0.3 else change_json)(data, random)


def change_lines(data, random):
    lines = data.splitlines(keepends=True)
    i = random.randrange(len(lines))
    what, lines[i] = change_text(lines[i].rstrip(b"\n"), random)
    return f"line {i + 1}: {what}", b"".join(lines[:i] + [lines[i] + b"\n"] + lines[i + 1:])


# ---------------------------------------------------------------- safetensors, token shards, .pth

def change_safetensors(data, random):
    """The header's tree, with its length put right; the length; bytes of the head or the body."""
    length, = struct.unpack("<Q", data[:8])
    header, body = data[8:8 + length], data[8 + length:]
    file = lambda header, body, length=length: struct.pack("<Q", length) + header + body
    done, tree = change_json(header, random)
    tree += b" " * (-len(tree) % 8)
    other = random.choice([0, 1, 2, length - 1, length + 8, len(data), 10**8, 2**31, 2**32, 2**63,
                           2**64 - 1, random.randrange(2**64)])
    (of_head, head), (of_body, changed) = (change_bytes(part, random) for part in (header, body))
    at = random.randrange(len(body) // 4) * 4  # fp32
    number = struct.pack("<f", random.choice([math.nan, math.inf, -math.inf]))
    return random.choice([
        *2 * [(f"header: {done}", file(tree, body, len(tree)))],
        *2 * [(f"body: {of_body}", file(header, changed))], (f"head: {of_head}", file(head, body)),
        (f"length {other}", file(header, body, other)),
        (f"not finite at {at}", file(header, body[:at] + number + body[at + 4:]))])


def change_shard(data, random):
    """Half of the changes are to the 64 bytes of header."""
    size = random.choice([64, len(data)])
    what, head = change_bytes(data[:size], random)
    return what, head + data[size:]


BOMB = bytes(10**8)


def change_pth(data, random):
    """Bytes of it or of its pickle, or which parts the zip file has that it is."""
    if random.random() < 0.3:
        return change_bytes(data, random)
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        parts = {part: file.read(part) for part in file.namelist()}
    pickle, = (part for part in parts if part.endswith("data.pkl"))
    name, saved = random.choice(list(parts)), io.BytesIO()
    done, broken = change_bytes(parts[pickle], random)
    what, changed = random.choice([
        *5 * [(f"pickle: {done}", {pickle: broken})], ("drop", {name: None}),
        ("rename", {name: None, f"{name}x": parts[name]}), ("empty", {name: b""}),
        ("escape", {"../../evil": b"evil"}), ("bomb", {pickle: BOMB})])
    packed = zipfile.ZIP_DEFLATED if what == "bomb" else zipfile.ZIP_STORED
    with zipfile.ZipFile(saved, "w", packed) as file:
        for called, content in (parts | changed).items():
            if content is not None:
                file.writestr(called, content)
    return f"{what}, {name}", saved.getvalue()


# ---------------------------------------------------------------- the files before, what is right

@pytest.fixture(scope="module")
def originals(tmp_path_factory, ratplus):
    """The folder of them, {kind: (reader, what it reads, the files to change, how)}"""
    root = tmp_path_factory.mktemp("originals")
    foreign(root / "olmo2", 1)
    foreign(root / "olmo2 shards", 3)
    for family, form in FAMILIES.items():
        foreign(root / family, 1, **form)
    save(root / "ours", memory=True)
    (root / "pth").mkdir()
    (root / "answers").mkdir()
    save_pth(root / "pth" / "model.pth", official_names(ratplus), pytest.MonkeyPatch(), n_head=4)
    train_bpe(root / "tokenizer", "gpt2")
    (root / "tokenizer" / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|endoftext|>", "added": {"x": [1, 2]}}))
    train_llama(root / "llama tokenizer")
    write_stream(root / "shards", [3000, 2000])
    examples = [niah.make_example(f"niah_single_{n}", 1024, ByteTokenizer(), 0, 0)
                for n in (1, 1, 2)]
    niah.write_jsonl(root / "ruler" / "niah_single_1.jsonl", examples)
    flags = ["--memory=on", "--steps=1", "--batch=1", "--context_len=512", "--tasks",
             "niah_single_1", "--eval_every=0"]
    train.train(train.parse(["--preset=pico", "--device=cpu", f"--out={root}", "--name=checkpoint",
                             *flags]))
    (root / "checkpoint" / "flags").write_text(" ".join(flags))
    told = lambda i: {"text": f"the {i}", "read": 3.5, "prompt_read": None, "seconds": 0.1}
    lines = [answers.Line("a", "niah_single_1", "quest:budget=64", [i], told(i)) for i in range(9)]
    (root / "answers" / "answers-0.jsonl").write_bytes(b"".join(map(answers.written, lines)))

    tensors = lambda kind: [str(file.relative_to(root / kind))
                            for file in sorted((root / kind).rglob("*.safetensors"))]
    of_run = [f"step_0000001/{name}.json" for name in ("config", "train")]
    return root, {
        "olmo2": ("model", "", tensors("olmo2"), change_safetensors),
        "olmo2 shards": ("model", "", [*tensors("olmo2 shards"), *3 * [INDEX]], None),
        "olmo2 config": ("model", "", ["config.json"], None),
        **{family: ("model", "", tensors(family), None) for family in FAMILIES},
        **{f"{family} config": ("model", "", ["config.json"], None) for family in FAMILIES},
        "ours": ("model", "", [*tensors("ours"), "config.json"], None),
        "checkpoint": ("checkpoint", "", [*tensors("checkpoint"), *of_run], None),
        "pth": ("model", "model.pth", ["model.pth"], change_pth),
        "tokenizer": ("tokenizer", "", 4 * ["tokenizer.json"] + ["tokenizer_config.json"], None),
        "shards": ("shards", "", ["00000.bin", "00001.bin"], change_shard),
        "ruler": ("ruler", "niah_single_1.jsonl", ["niah_single_1.jsonl"], change_lines),
        "answers": ("answers", "", ["answers-0.jsonl"], change_lines),
        "llama tokenizer": ("tokenizer", "", ["tokenizer.json"], None)}


def plain_safetensors(folder, family):
    """Another reader, in numpy: {our name: [dtype, shape, hash]}, as judge.digest gives it."""
    found = {}
    for file in folder.glob("*.safetensors"):
        data = file.read_bytes()
        length, = struct.unpack("<Q", data[:8])
        header, body = json.loads(data[8:8 + length]), data[8 + length:]
        header.pop("__metadata__", None)
        for name, entry in header.items():
            assert entry["dtype"] == "F32"
            of_bytes = hashlib.sha256(body[slice(*entry["data_offsets"])]).hexdigest()[:16]
            ours = name.removeprefix("model.")
            if family in FAMILIES:
                ours = ours.replace("post_attention_layernorm", "pre_feedforward_layernorm")
            found[ours] = ["torch.float32", entry["shape"], of_bytes]
    return found


def right(kind, loaded, original, path):
    """Whether what was loaded from the changed files is what is in them."""
    if kind == "answers":  # a last line without its end was cut off by a kill, and is asked again
        return loaded == original[:len(loaded)] and len(loaded) >= len(original) - 1
    if kind in ("olmo2", "olmo2 shards", *FAMILIES):
        return loaded == [original[0], plain_safetensors(path, kind)]
    if kind.endswith(" config"):
        found, settings = json.loads((path / "config.json").read_text()), loaded[0]
        theirs = {"norm_eps": "rms_norm_eps", "context_len": "max_position_embeddings",
                  "n_head": "num_attention_heads", "n_layer": "num_hidden_layers"}
        given = found.get("rope_parameters") or found
        eos, theta = found.get("eos_token_id"), given.get("rope_theta", 10000.0)
        stretch = (found.get("rope_scaling") or {"rope_type": "default"})
        same = stretch["rope_type"] == "default" or stretch == settings["rope_scaling"]
        return (loaded[1] == original[1] and settings["rope_theta"] == theta and same
                and all(settings[ours] == found[name] for ours, name in theirs.items())
                and settings["eos_id"] in (None, eos, *(eos if isinstance(eos, list) else [])))
    if kind == "ruler":
        lines = (path / "niah_single_1.jsonl").read_bytes().splitlines()
        return [row[:3] for row in loaded] == [
            [row["index"], row["input"] + (row.get("answer_prefix") or ""), row["outputs"]]
            for row in map(json.loads, lines)]
    if kind in ("tokenizer", "llama tokenizer") and loaded != original:
        oracle = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
        oracle.encode_special_tokens = True
        ids = oracle.encode(judge.TEXT, add_special_tokens=False).ids
        return loaded[:2] == [ids, oracle.decode(ids) == judge.TEXT]
    # ours, checkpoints, shards: any change is found; pth: zip's checksums cover it all
    return loaded == original


def verdict_of(judged, reader, path):
    """-> "loaded", "refused" or "defect", and what was loaded or said. A refusal is one line."""
    (verdict, message), = judged(reader, path).items()
    if verdict == "refused" and not (str(path) in message and message.isprintable()
                                     and len(message) < 700):
        return "defect", f"no clear line: {message!r:.700}"
    return verdict, message


@pytest.mark.parametrize("kind", INPUTS)
def test_changed_files_are_read_right_or_refused(kind, judged, originals, tmp_path, capsys):
    """A change that ends in a traceback, hangs, runs code, takes memory, or is read as another."""
    root, kinds = originals
    reader, what, files, change = kinds[kind]
    source = root / kind.removesuffix(" config")
    original, found, defects = judged(reader, source / what)["loaded"], Counter(), []
    for index in range(times(INPUTS[kind] // 10, INPUTS[kind])):
        chance, path = random.Random(f"{kind} {index}"), tmp_path / str(index)
        shutil.copytree(source, path)
        file = path / chance.choice(files)
        how = change or (change_safetensors if file.suffix == ".safetensors" else change_text)
        done, changed = how(file.read_bytes(), chance)
        file.write_bytes(changed)
        verdict, message = verdict_of(judged, reader, path / what)
        if verdict == "loaded" and not right(kind, message, original, path):
            verdict, message = "defect", f"loaded wrong: {str(message):.300}"
        if verdict == "defect":
            defects.append(f"{kind} {index}, {file.name}, {done}: {message}")
        found[verdict] += 1
        shutil.rmtree(path)
    with capsys.disabled():
        print(f"\n{kind}: {dict(found)}", end=" ")
    assert not defects, f"{len(defects)} of {sum(found.values())}:\n" + "\n".join(defects)


# ---------------------------------------------------------------- what no mutation makes

class Reduced:
    """A pickle that calls something."""

    def __init__(self, *called):
        self.called = called

    def __reduce__(self):
        return self.called[0], self.called[1:]


EVIL = [Reduced(os.system, "true"), Reduced(eval, "1"), Reduced(open, "evil", "w"),
        Reduced(getattr, "x", "__class__"), 2 * [Reduced(bytearray, 10**9)],
        Reduced(torch.nn.Linear, 3, 3), Reduced(torch.hub.load, "x", "y"), np.zeros(3),
        Reduced(torch.UntypedStorage, 10**10), Reduced(torch.zeros, 10**10)]
NO_WEIGHTS = [  # instead of a tensor; lambdas: made of it
    None, 1, "x", [1, 2], {}, b"x", torch.zeros(()),
    *(lambda x, dtype=dtype: x.to(dtype)
      for dtype in (torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)),
    *(lambda x, number=number: x.flatten().index_fill(0, torch.tensor(7), number).view_as(x)
      for number in (math.nan, math.inf, -math.inf)),
    *(torch.zeros(1).expand(size) for size in ((10**6, 10**6), (2**40,), (97, 10**9), (10**5, 64))),
    lambda x: x[..., :-1], lambda x: x[None], lambda x: x[:0], lambda x: x.to_sparse(),
    lambda x: x.repeat_interleave(2, 0)[::2], lambda x: x[..., None].expand(*x.shape, 2),
    lambda x: x.to("meta")]


def of_weights(state):
    """What the official trainer saves."""
    return {"task": state, "config": {"model": {"backbone": {"seq_cell": {"num_head": 4}}}}}


def all_refused(judged, contents, file):
    for content in contents:
        torch.save(content, file)
        assert verdict_of(judged, "model", file)[0] == "refused", str(content)[-500:]


@pytest.mark.parametrize("name", [
    "embedding.wte", *(f"backbone.layers.{part}" for part in (
        "1.seq_layer.in_proj", "0.hidden_layer.fc1", "1.hidden_layer.ln"))])
def test_a_pth_of_what_is_no_ratplus_is_refused(name, judged, ratplus, tmp_path):
    """One that takes all memory; a RAT+ of another form, loaded as far as it goes."""
    state, name = official_names(ratplus), f"{name}.weight"
    x, rest = state[name], {other: x for other, x in state.items() if other != name}
    states = [rest, *(rest | {name: odd(x) if callable(odd) else odd} for odd in NO_WEIGHTS)]
    states += [rest | {other: x} for other in (
        "x", f"{name}.x", name.replace(".", ".x", 1), "backbone.layers.", "", None)]
    states += [state | {f"backbone.layers.{n}.x": x} for n in (1, 5, 10**9, -1)]
    all_refused(judged, map(of_weights, states), tmp_path / "last.pth")


def test_a_pickle_runs_no_code(judged, ratplus, tmp_path):
    """A .pth from the internet that deletes one's home."""
    state, file = official_names(ratplus), tmp_path / "last.pth"
    beside = [of_weights(state) | {"evil": evil} for evil in EVIL]
    all_refused(judged, beside + [of_weights(state | {"evil": evil}) for evil in EVIL], file)
    torch.save(of_weights(state), file)
    assert verdict_of(judged, "model", file)[0] == "loaded"
    # without a config its heads are of 128, in a width of 64
    all_refused(judged, [{"task": state}], file)


@pytest.mark.parametrize("content", [
    b"", b"no pickle at all", b"PK\x03\x04 half a zip", [1, 2], {"task": [1, 2]}, {"task": {}},
    {"model": {}}, {"task": {"wte.weight": torch.zeros(4, 4)}}], ids=str)
def test_a_file_that_is_no_pth_is_refused(content, judged, tmp_path):
    """A traceback of the unpickler's."""
    file = tmp_path / "last.pth"
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    assert verdict_of(judged, "model", file)[0] == "refused"


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 123456\n"
PLACES = [("olmo2", "config.json"), ("olmo2", ONE), ("olmo2 shards", INDEX), ("pth", "model.pth"),
          ("tokenizer", "tokenizer.json"), ("tokenizer", "tokenizer_config.json"),
          ("shards", "00000.bin"), ("ruler", "niah_single_1.jsonl"),
          ("checkpoint", "step_0000001/train.json")]


@pytest.mark.parametrize("kind, name", PLACES)
def test_what_is_no_file_is_refused_at_once(kind, name, judged, originals, tmp_path):
    """
    A pipe that nobody writes into, a link to a device: waiting for ever, memory without end. What a
    clone without git-lfs has: "fetch it again", by which one does the same again.
    """
    root, kinds = originals
    reader, what, *_ = kinds[kind]
    pointer = lambda file: file.write_text(POINTER)
    for make in os.mkfifo, lambda file: file.symlink_to("/dev/zero"), Path.mkdir, pointer:
        shutil.copytree(root / kind, tmp_path / kind)
        (tmp_path / kind / name).unlink()
        make(tmp_path / kind / name)
        verdict, message = verdict_of(judged, reader, tmp_path / kind / what)
        assert verdict == "refused" and name in message, message
        assert make is not pointer or "git lfs pull" in message, message
        shutil.rmtree(tmp_path / kind)


def model_of_names(folder):
    """300,000 tensors without an element."""
    entry = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    header = "{" + ",".join(f'"{i:06d}":{entry}' for i in range(300_000)) + "}"
    header += " " * (-len(header) % 8)
    (folder / ONE).write_bytes(struct.pack("<Q", len(header)) + header.encode())


def rows_of_names(folder):
    """Rows of 5,000 tensors, of which there are none."""
    places = {str(i): {"saved_offsets": [0]} for i in range(5000)}
    save_file({name: torch.zeros(0) for name in places}, folder / ONE,
              metadata={weights.PLACES: json.dumps(places)})


MANY = "[]," * 10**7 + "[]"
BOMBS = {  # files whose content would be much larger in memory
    "config": lambda folder: (folder / "config.json").write_text(f"[{MANY}]"),
    "keys": lambda folder: (folder / "config.json").write_text(  # the one that comes twice is last
        "{" + ",".join(f'"{i}":0' for i in [*range(90_000), 89_999]) + "}"),
    "files": lambda folder: config(folder, files=[1]),
    "index": lambda folder: (folder / INDEX).write_text(f'{{"weight_map": [{MANY}]}}'),
    "header": model_of_names, "places": rows_of_names}


@pytest.mark.parametrize("what", BOMBS)
def test_memory_is_at_most_twice_the_files_and_time_is_short(what, judged, tmp_path):
    """JSON that Python blows up; work that grows with its square."""
    foreign(tmp_path / "model", 1)
    BOMBS[what](tmp_path / "model")
    assert verdict_of(judged, "model", tmp_path / "model")[0] == "refused"


def test_a_large_model_is_not_kept_twice(judged, tmp_path):
    """A model that is read whole, and then copied."""
    form = dict(vocab_size=50_000, n_layer=1, width=256, mlp_width=256)
    foreign(tmp_path / "theirs", 1, **form)
    save(tmp_path / "ours", memory=True, **form)
    for whose in "theirs", "ours":
        assert verdict_of(judged, "model", tmp_path / whose)[0] == "loaded"


@pytest.mark.parametrize("line", ['["sha256"]', '"sha256"', "3", "{}", '{"sha256": 1}', "null"])
def test_odd_lines_of_answers_are_refused(line, judged, tmp_path):
    """What is JSON, and no answer."""
    (tmp_path / "answers-0.jsonl").write_text(line + "\n")
    verdict, message = verdict_of(judged, "answers", tmp_path)
    assert verdict == "refused" and "answers-0.jsonl line 1" in message, message


def test_many_answers_in_a_long_prompt_are_refused(judged, tmp_path):
    """A search for each of 100,000 answers in a prompt of a million characters."""
    row = {"index": 0, "input": "x" * 10**6 + " a", "outputs": ["a"] * 100_000}
    (tmp_path / "niah_single_1.jsonl").write_text(json.dumps(row) + "\n")
    assert verdict_of(judged, "ruler", tmp_path / "niah_single_1.jsonl")[0] == "refused"


def test_what_the_world_writes_is_not_refused(judged, tmp_path):
    """A byte order mark, a null prefix, NaN beside the text, an end outside a cut vocabulary."""
    line = {"index": 0, "input": "for a is: 7.", "outputs": ["7"], "answer_prefix": None}
    file = tmp_path / "niah_single_1.jsonl"
    file.write_text("\ufeff" + json.dumps(line))
    assert judged("ruler", file) == {"loaded": [[0, "for a is: 7.", ["7"], [[10, 11]]]]}
    (tmp_path / "a.jsonl").write_text('{"text": "x", "score": NaN, "a": 1, "a": 2}\n')
    assert [text for text, _ in shards.documents([tmp_path / "a.jsonl"], "text")] == ["x"]
    foreign(tmp_path / "model", 1)
    config(tmp_path / "model", eos_token_id=50279)
    assert judged("model", tmp_path / "model")["loaded"][0]["eos_id"] is None


OURS = [file for folder in (".", "infra", "triton_ops", "experiments")
        for file in sorted((ROOT / folder).glob("*.py"))]
CALLS = {"eval", "exec", "compile", "__import__", "breakpoint", "input"}
IMPORTS = {"pickle", "marshal", "shelve", "dill", "joblib", "urllib", "http", "requests", "ftplib",
           "smtplib", "huggingface_hub", "socketserver"}


@pytest.mark.parametrize("file", OURS, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_script_runs_what_it_reads_or_asks_the_network(file):
    """A pickle, an eval or a download that a change brings in."""
    for node in ast.walk(ast.parse(file.read_text())):
        what = ast.unparse(node) if isinstance(node, (ast.Import, ast.ImportFrom, ast.Call)) else ""
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in CALLS, what
            safe = file.name == "ratplus.py" and "weights_only=True" in what
            assert safe or called not in ("torch.load", "np.load", "numpy.load"), what
        elif what:
            names = [getattr(node, "module", None) or "", *(a.name for a in node.names)]
            assert IMPORTS.isdisjoint(name.split(".")[0] for name in names), what
