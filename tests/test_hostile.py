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
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
import torch
from safetensors.torch import save_file

import judge
import niah
import train
from conftest import official_names, save_pth, times
from infra import answers, shards, weights
from infra.files import write_lines
from infra.tokenizers import ByteTokenizer
from judge import ROOT
from model import Config, Transformer
from on_disk import INDEX, ONE, config, foreign, save
from test_tokenizers import train_bpe, train_sentencepiece

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="judge.py reads /proc")
# With --slow. CI tries a tenth.
INPUTS = {"olmo2": 500, "olmo2 shards": 300, "olmo2 config": 300, "ours": 400, "checkpoint": 200,
          "pth": 400, "tokenizer": 300, "shards": 300, "ruler": 300, "answers": 200,
          "sentencepiece": 200}


# ---------------------------------------------------------------- the generator: bytes

def change_bytes(data, random):
    """-> what was done, and the changed bytes"""
    at = random.randrange(len(data))
    length = min(len(data) - at, random.choice([1, 4, 8, 64, 1024]))
    before, part, after = data[:at], data[at:at + length], data[at + length:]
    what = random.choice(["flip", "byte", "cut", "grow", "drop", "twice", "zeros", "ones", "swap"])
    if what == "swap":
        changed, other = bytearray(data), random.randrange(len(data) - length + 1)
        changed[at:at + length], changed[other:other + length] = data[other:other + length], part
        return f"swap at {at} and {other}, {length} bytes", bytes(changed)
    changed = {
        "flip": lambda: before + bytes([data[at] ^ 1 << random.randrange(8)]) + data[at + 1:],
        "byte": lambda: before + bytes([random.randrange(256)]) + data[at + 1:],
        "cut": lambda: before, "grow": lambda: data + bytes(length),
        "drop": lambda: before + after, "twice": lambda: before + part + part + after,
        "zeros": lambda: before + bytes(length) + after,
        "ones": lambda: before + b"\xff" * length + after}[what]()
    return f"{what} at {at}, {length} bytes", changed


# ---------------------------------------------------------------- JSON

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
    if isinstance(tree, list):
        return "[" + ",".join(map(dump, tree)) + "]"
    return json.dumps(tree)


def nodes(tree):
    """All (container, position) in the tree."""
    children = range(len(tree)) if isinstance(tree, list) else ()
    for i in children:
        yield tree, i
        yield from nodes(tree[i][1] if isinstance(tree, Pairs) else tree[i])


def change_json(text, random):
    """-> what was done, and the changed text"""
    tree = json.loads(text, object_pairs_hook=Pairs)
    container, i = random.choice(list(nodes(tree)))
    is_object = isinstance(container, Pairs)
    key, old = container[i] if is_object else (i, container[i])
    entry = lambda value: (key, value) if is_object else value
    what = random.choice(["replace", "replace", "replace", "drop", "twice", "rename", "deep",
                          "root", "near"])
    strange = random.choice(STRANGE)
    if what == "near" and isinstance(old, (int, float)) and not isinstance(old, bool):
        strange = old + random.choice([-1, 1, 8, -8])
        container[i] = entry(strange)
    elif what == "drop":
        del container[i]
    elif what == "twice":
        container.insert(i, entry(strange))
    elif what == "rename" and is_object:
        container[i] = random.choice(["", "x", f"{key}x", "../x", "\n"]), old
    elif what == "deep":
        deep = random.choice([50, 900, 100_000])
        container[i] = entry("@@")
        return f"{deep} deep at {key!r}", dump(tree).replace('"@@"', "[" * deep + "]" * deep, 1)
    elif what == "root":
        return f"all is {strange!r:.60}", dump(strange)
    else:
        container[i] = entry(strange)
    return f"{what} {key!r}: {strange!r:.60}", dump(tree)


def change_text(data, random):
    """JSON files and lines: half of the changes are to the tree, half to the bytes."""
    if random.random() < 0.3:
        return change_bytes(data, random)
    what, text = change_json(data.decode(), random)
    return what, text.encode(errors="surrogatepass")


def change_lines(data, random):
    lines = data.splitlines(keepends=True)
    i = random.randrange(len(lines))
    what, lines[i] = change_text(lines[i].rstrip(b"\n"), random)
    return f"line {i + 1}: {what}", b"".join(lines[:i] + [lines[i] + b"\n"] + lines[i + 1:])


# ---------------------------------------------------------------- safetensors, token shards, .pth

def change_safetensors(data, random):
    """
    Half of the changes are to the header's tree, whose length stays right; the others to the
    length, the head's or the body's bytes.
    """
    length, = struct.unpack("<Q", data[:8])
    header, body = data[8:8 + length], data[8 + length:]
    what = random.choice(["header", "header", "length", "head", "body", "body", "not finite"])
    if what == "header":
        done, text = change_json(header.decode(), random)
        header = text.encode(errors="surrogatepass")
        header += b" " * (-len(header) % 8)
        return f"header: {done}", struct.pack("<Q", len(header)) + header + body
    if what == "length":
        other = random.choice([0, 1, 2, length - 1, length + 8, len(data), 10**8, 2**31, 2**32,
                               2**63, 2**64 - 1, random.randrange(2**64)])
        return f"length {other}", struct.pack("<Q", other) + header + body
    if what == "head":
        done, header = change_bytes(header, random)
        return f"head: {done}", data[:8] + header + body
    if what == "body":
        done, body = change_bytes(body, random)
        return f"body: {done}", data[:8] + header + body
    at = random.randrange(len(body) // 4) * 4  # fp32
    number = struct.pack("<f", random.choice([math.nan, math.inf, -math.inf]))
    return f"not finite at {at}", data[:8] + header + body[:at] + number + body[at + 4:]


def change_shard(data, random):
    """Half of the changes are to the 64 bytes of header."""
    if random.random() < 0.5:
        what, head = change_bytes(data[:64], random)
        return f"header: {what}", head + data[64:]
    return change_bytes(data, random)


class Reduced:
    """A pickle that calls something."""

    def __init__(self, function, *args):
        self.reduced = function, args

    def __reduce__(self):
        return self.reduced


def change_state(state, random):
    """A RAT+ state dict that torch.save writes: names, shapes, types, or what is no tensor."""
    state = dict(state)
    name = random.choice(list(state))
    tensor = state.pop(name)
    what = random.choice(["drop", "rename", "dtype", "shape", "not finite", "no tensor", "huge",
                          "sparse", "strided", "layers"])
    if what == "rename":
        others = [name.replace("layers.0", f"layers.{n}") for n in ("x", 99)]
        state[random.choice(["x", name + ".x", *others, "backbone.layers.", ""])] = tensor
    elif what == "dtype":
        state[name] = tensor.to(random.choice([torch.int64, torch.bool, torch.complex64,
                                               torch.float8_e4m3fn]))
    elif what == "shape":
        expanded = tensor.unsqueeze(-1).expand(*tensor.shape, 2)
        state[name] = random.choice([tensor.flatten(), tensor[:-1], tensor[None], tensor[:0],
                                     torch.zeros(()), expanded])
    elif what == "not finite":
        state[name] = tensor.clone()
        number = random.choice([math.nan, math.inf, -math.inf])
        state[name].view(-1)[random.randrange(tensor.numel())] = number
    elif what == "no tensor":
        state[name] = random.choice([None, 1, "x", [1, 2], {}, b"x"])
    elif what == "huge":
        shape = random.choice([(10**6, 10**6), (2**40,), (97, 10**9), (10**5, 64)])
        state[name] = torch.zeros(1).expand(*shape)
    elif what == "sparse":
        state[name] = random.choice([tensor.to_sparse(), tensor.to("meta")])
    elif what == "strided":
        state[name] = tensor.t() if tensor.dim() == 2 else tensor.repeat(2)[::2]
    elif what == "layers":
        state[f"backbone.layers.{random.choice([5, 10**9, -1])}.x"] = tensor
    return f"{what} {name}", state


EVIL = {  # what a pickle might call
    "system": Reduced(os.system, "true"), "eval": Reduced(eval, "1"),
    "open": Reduced(open, "evil", "w"), "attribute": Reduced(getattr, "x", "__class__"),
    "bytes": [Reduced(bytearray, 10**9), Reduced(bytearray, 10**9)],
    "module": Reduced(torch.nn.Linear, 3, 3), "load": Reduced(torch.hub.load, "x", "y"),
    "storage": Reduced(torch.UntypedStorage, 10**10), "tensor": Reduced(torch.zeros, 10**10),
    "numpy": np.zeros(3), "deep": None}


def change_pth(data, random):
    what = random.choice(["bytes", "state", "state", "evil", "pickle", "members"])
    if what == "bytes":
        return change_bytes(data, random)
    change = {"state": change_task, "evil": change_task, "pickle": change_members,
              "members": change_members}[what]
    done, changed = change(what, data, random)
    return f"{what}: {done}", changed


def change_task(what, data, random):
    with torch.serialization.safe_globals([(OrderedDict, "easydict.EasyDict")]):
        file = torch.load(io.BytesIO(data), weights_only=True)
    if what == "state":
        done, file["task"] = change_state(file["task"], random)
    else:
        done = random.choice(list(EVIL))
        place, evil = random.choice([file, file["task"]]), EVIL[done]
        for _ in range(200 if done == "deep" else 0):  # as deep as pickle.dump goes
            evil = [evil]
        place[random.choice(["evil", next(iter(place))])] = evil
    saved = io.BytesIO()
    torch.save(file, saved, _use_new_zipfile_serialization=random.random() < 0.9)
    return done, saved.getvalue()


def change_members(what, data, random):
    """Of the zip file that a .pth is."""
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        members = {info.filename: file.read(info) for info in file.infolist()}
    packed = zipfile.ZIP_STORED
    if what == "pickle":
        name = next(name for name in members if name.endswith("data.pkl"))
        done, members[name] = change_bytes(members[name], random)
    else:
        name = random.choice(list(members))
        done = random.choice(["drop", "rename", "bomb", "escape", "empty"])
        if done == "drop":
            del members[name]
        elif done == "rename":
            members[name + "x"] = members.pop(name)
        elif done == "bomb":
            members[name], packed = members[name] + bytes(3 * 10**8), zipfile.ZIP_DEFLATED
        elif done == "escape":
            members["../../evil"] = b"evil"
        else:
            members[name] = b""
    saved = io.BytesIO()
    with zipfile.ZipFile(saved, "w", packed) as file:
        for called, content in members.items():
            file.writestr(called, content)
    return f"{done} {name}", saved.getvalue()


# ---------------------------------------------------------------- the files before, what is right

@pytest.fixture(scope="module")
def originals(tmp_path_factory, ratplus):
    """The folder of them, {kind: (reader, what it reads, the files to change, how)}"""
    root = tmp_path_factory.mktemp("originals")
    foreign(root / "olmo2", 1)
    foreign(root / "olmo2 shards", 3)
    save(root / "ours", memory=True)
    for name in "pth", "shards", "answers":
        (root / name).mkdir()
    save_pth(root / "pth" / "model.pth", official_names(ratplus), pytest.MonkeyPatch(), n_head=4)
    train_bpe(root / "tokenizer", "gpt2")
    (root / "tokenizer" / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|endoftext|>", "added": {"x": [1, 2]}}))
    train_sentencepiece(root / "sentencepiece")
    for n, length in enumerate((3000, 2000)):
        tokens = np.random.default_rng(n).integers(0, 257, length).astype("<u2")
        shards.save_shard(root / "shards" / f"{n:05d}.bin", [tokens.tobytes()], 257, "bytes", 0)
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

    safetensors = lambda folder: sorted(path.relative_to(root / folder)
                                        for path in (root / folder).rglob("*.safetensors"))
    step = Path("step_0000001")
    of_run = [*safetensors("checkpoint"), step / "config.json", step / "train.json"]
    of_tokenizer = 4 * ["tokenizer.json"] + ["tokenizer_config.json"]
    return root, {
        "olmo2": ("model", "", safetensors("olmo2"), change_safetensors),
        "olmo2 shards": ("model", "", [*safetensors("olmo2 shards"), *3 * [INDEX]], None),
        "olmo2 config": ("model", "", ["config.json"], None),
        "ours": ("model", "", [*safetensors("ours"), "config.json"], None),
        "checkpoint": ("checkpoint", "", of_run, None),
        "pth": ("model", "model.pth", ["model.pth"], change_pth),
        "tokenizer": ("tokenizer", "", of_tokenizer, None),
        "shards": ("shards", "", ["00000.bin", "00001.bin"], change_shard),
        "ruler": ("ruler", "niah_single_1.jsonl", ["niah_single_1.jsonl"], change_lines),
        "answers": ("answers", "", ["answers-0.jsonl"], change_lines),
        "sentencepiece": ("tokenizer", "", ["tokenizer.model"], change_bytes)}


def plain_safetensors(folder):
    """Another reader, in numpy: {our name: [dtype, shape, hash]}, as judge.digest gives it."""
    found = {}
    for file in folder.glob("*.safetensors"):
        data = file.read_bytes()
        length, = struct.unpack("<Q", data[:8])
        header, body = json.loads(data[8:8 + length]), data[8 + length:]
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            of_bytes = hashlib.sha256(body[begin:end]).hexdigest()[:16]
            dtype = {"F32": "torch.float32"}[entry["dtype"]]
            found[name.removeprefix("model.")] = [dtype, entry["shape"], of_bytes]
    return found


def right(kind, loaded, original, path):
    """Whether what was loaded from the changed files is what is in them."""
    if kind == "answers":  # a last line without its end was cut off by a kill, and is asked again
        return loaded == original[:len(loaded)] and len(loaded) >= len(original) - 1
    if kind in ("olmo2", "olmo2 shards"):
        return loaded[0] == original[0] and loaded[1] == plain_safetensors(path)
    if kind == "olmo2 config":
        found, settings = json.loads((path / "config.json").read_text()), loaded[0]
        theirs = {"norm_eps": "rms_norm_eps", "context_len": "max_position_embeddings",
                  "n_head": "num_attention_heads", "n_layer": "num_hidden_layers"}
        eos, theta = found.get("eos_token_id"), found.get("rope_parameters", found)["rope_theta"]
        return (loaded[1] == original[1]
                and all(settings[ours] == found[name] for ours, name in theirs.items())
                and settings["rope_theta"] == theta
                and settings["eos_id"] in (None, eos, *(eos if isinstance(eos, list) else [])))
    if kind == "ruler":
        lines = (path / "niah_single_1.jsonl").read_bytes().splitlines()
        return [row[:3] for row in loaded] == [
            [row["index"], row["input"] + (row.get("answer_prefix") or ""), row["outputs"]]
            for row in map(json.loads, lines)]
    if kind == "sentencepiece":
        oracle = sentencepiece.SentencePieceProcessor(model_file=str(path / "tokenizer.model"))
        return loaded[0] == oracle.encode(judge.TEXT) and loaded[2] == oracle.eos_id()
    if kind == "tokenizer":
        return loaded == original or loaded[:2] == [of_hugging_face(path), True]
    # ours, checkpoints, shards: any change is found; pth: zip's checksums cover it all
    return loaded == original


def of_hugging_face(path):
    oracle = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    oracle.encode_special_tokens = True
    return oracle.encode(judge.TEXT, add_special_tokens=False).ids


def verdict_of(judged, reader, path):
    """-> "loaded", "refused" or "defect", and what was loaded or said. A refusal is one line."""
    verdict, message = next(iter(judged(reader, path).items()))
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
    original, found, defects = judged(reader, source / what), Counter(), []
    assert "loaded" in original, original
    for index in range(times(INPUTS[kind] // 10, INPUTS[kind])):
        chance, path = random.Random(f"{kind} {index}"), tmp_path / str(index)
        shutil.copytree(source, path)
        file = path / chance.choice(files)
        how = change or (change_safetensors if file.suffix == ".safetensors" else change_text)
        done, changed = how(file.read_bytes(), chance)
        file.write_bytes(changed)
        verdict, message = verdict_of(judged, reader, path / what)
        if verdict == "loaded" and not right(kind, message, original["loaded"], path):
            verdict, message = "defect", f"loaded wrong: {str(message):.300}"
        if verdict == "defect":
            defects.append(f"{kind} {index}, {file.name}, {done}: {message}")
        found[verdict] += 1
        shutil.rmtree(path)
    with capsys.disabled():
        print(f"\n{kind}: {dict(found)}", end=" ")
    assert not defects, f"{len(defects)} of {sum(found.values())}:\n" + "\n".join(defects)


# ---------------------------------------------------------------- what no mutation makes

PLACES = [("olmo2", "config.json"), ("olmo2", ONE), ("olmo2 shards", INDEX), ("pth", "model.pth"),
          ("tokenizer", "tokenizer.json"), ("tokenizer", "tokenizer_config.json"),
          ("shards", "00000.bin"), ("ruler", "niah_single_1.jsonl"),
          ("checkpoint", "step_0000001/train.json")]


@pytest.mark.parametrize("kind, name", PLACES)
def test_what_has_no_end_is_refused_at_once(kind, name, judged, originals, tmp_path):
    """A pipe that nobody writes into, a link to a device: waiting for ever, memory without end."""
    root, kinds = originals
    reader, what, *_ = kinds[kind]
    for make in os.mkfifo, lambda file: file.symlink_to("/dev/zero"), Path.mkdir:
        shutil.copytree(root / kind, tmp_path / kind)
        (tmp_path / kind / name).unlink()
        make(tmp_path / kind / name)
        verdict, message = verdict_of(judged, reader, tmp_path / kind / what)
        assert verdict == "refused" and name in message, message
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


def large(memory):
    return Transformer(Config(vocab_size=100_000, n_layer=1, width=256, n_head=4, n_kv_head=4,
                              mlp_width=256, memory=memory))


def honest(folder):
    model = large(memory=False)
    config(folder, **weights.described(model.config, "float32"))
    save_file({weights.hf_name(name): tensor for name, tensor in model.state_dict().items()},
              folder / ONE)


def ours(folder):
    shutil.rmtree(folder)
    large(memory=True).save_pretrained(folder)


MANY = "[]," * 10**7 + "[]"
BOMBS = {  # files whose content would be much larger in memory
    "config": lambda folder: (folder / "config.json").write_text(f"[{MANY}]"),
    "keys": lambda folder: (folder / "config.json").write_text(  # the one that comes twice is last
        "{" + ",".join(f'"{i}":0' for i in [*range(90_000), 89_999]) + "}"),
    "files": lambda folder: config(folder, files=[1]),
    "index": lambda folder: (folder / INDEX).write_text(f'{{"weight_map": [{MANY}]}}'),
    "header": model_of_names, "places": rows_of_names, "honest": honest, "ours": ours}


@pytest.mark.parametrize("what", BOMBS)
def test_memory_is_at_most_twice_the_files_and_time_is_short(what, judged, tmp_path):
    """JSON that Python blows up; work that grows with its square; a model that is kept twice."""
    foreign(tmp_path / "model", 1)
    BOMBS[what](tmp_path / "model")
    verdict, message = verdict_of(judged, "model", tmp_path / "model")
    assert verdict == ("loaded" if what in ("honest", "ours") else "refused"), message


def test_many_answers_in_a_long_prompt_are_refused(judged, tmp_path):
    """A search for each of 100,000 answers in a prompt of a million characters."""
    file = tmp_path / "niah_single_1.jsonl"
    write_lines({file: [{"index": 0, "input": "x" * 10**6 + " a", "outputs": ["a"] * 100_000}]})
    assert verdict_of(judged, "ruler", file)[0] == "refused"


@pytest.mark.parametrize("line", ['["sha256"]', '"sha256"', "3", "{}", '{"sha256": 1}', "null"])
def test_odd_lines_of_answers_are_refused(line, judged, tmp_path):
    (tmp_path / "answers-0.jsonl").write_text(line + "\n")
    verdict, message = verdict_of(judged, "answers", tmp_path)
    assert verdict == "refused" and "answers-0.jsonl line 1" in message, message


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
        names, where = [], f"{file.name} line {getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in CALLS, f"{where}: {called}"
            if called in ("torch.load", "np.load", "numpy.load"):
                flags = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert flags.get("weights_only") == "True" and file.name == "ratplus.py", where
        assert IMPORTS.isdisjoint(name.split(".")[0] for name in names), f"{where}: {names}"
