"""
Files from strangers: whatever is in them, they are read right or refused in one line that names the file. Nothing hangs, no
code runs, memory stays within twice the files (judge.py watches).

    for each kind of file, seed and index:   change = mutated(kind, Random(f"{kind} {index}"))      a small, seeded generator
        loaded  -> must be what an independent reader finds in the changed file, or, where files are hashed, in the original
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
from safetensors.torch import load_file, save_file

from infra import answers
from infra import shards
import judge
import niah
import train
from infra import weights
from infra.files import write_lines
from infra.tokenizers import ByteTokenizer
from conftest import official_names, save_pth, times, tiny
from judge import ROOT
from model import Config, Transformer
from test_data import train_bpe, train_sentencepiece

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="judge.py reads /proc")
INPUTS = {"olmo2": 500, "olmo2 shards": 300, "olmo2 config": 300, "ours": 400, "checkpoint": 200, "pth": 400, "tokenizer": 300, "shards": 300,
          "ruler": 300, "answers": 200, "sentencepiece": 200}  # with --slow; CI tries a tenth


# ---------------------------------------------------------------- the generator: bytes

def change_bytes(data, random):
    """-> what was done, and the changed bytes"""
    data, at = bytearray(data), random.randrange(len(data))
    length = min(len(data) - at, random.choice([1, 4, 8, 64, 1024]))
    what = random.choice(["flip", "byte", "cut", "grow", "drop", "twice", "zeros", "ones", "swap"])
    if what == "flip":
        data[at] ^= 1 << random.randrange(8)
    elif what == "byte":
        data[at] = random.randrange(256)
    elif what == "cut":
        del data[at:]
    elif what == "grow":
        data += bytes(length)
    elif what == "drop":
        del data[at:at + length]
    elif what == "twice":
        data[at:at] = data[at:at + length]
    elif what in ("zeros", "ones"):
        data[at:at + length] = bytes([255 * (what == "ones")]) * length
    else:
        other = random.randrange(len(data) - length + 1)
        data[at:at + length], data[other:other + length] = data[other:other + length], data[at:at + length]
    return f"{what} at {at}, {length} bytes", bytes(data)


# ---------------------------------------------------------------- JSON

class Pairs(list):
    """A JSON object as pairs, so that a key may come twice."""


STRANGE = [None, True, False, 0, -1, 1, 2, 3, 7, 1.5, -0.5, 2**31, 2**53 + 1, 2**63, 2**64, 10**40, -10**12, 1e308, math.inf, -math.inf, math.nan,
           "", "x", "0", "../x", "/etc/passwd", "..", "a\0b", "\x1b[31m\n", "\ud800", "x" * 5000, [], [0], [-1], [[]], ["x"], [1e400],
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
    key = container[i][0] if isinstance(container, Pairs) else i
    put = lambda value: container.__setitem__(i, (key, value) if isinstance(container, Pairs) else value)
    what, strange = random.choice(["replace", "replace", "replace", "drop", "twice", "rename", "deep", "root", "near"]), random.choice(STRANGE)
    old = container[i][1] if isinstance(container, Pairs) else container[i]
    if what == "near" and isinstance(old, (int, float)) and not isinstance(old, bool):
        strange = old + random.choice([-1, 1, 8, -8])
        put(strange)
    elif what == "drop":
        del container[i]
    elif what == "twice":
        container.insert(i, (key, strange) if isinstance(container, Pairs) else strange)
    elif what == "rename" and isinstance(container, Pairs):
        container[i] = (random.choice(["", "x", str(key) + "x", "../x", "\n"]), container[i][1])
    elif what == "deep":
        deep = random.choice([50, 900, 100_000])
        return f"{deep} deep at {key!r}", (lambda text: text.replace('"@@"', "[" * deep + "]" * deep, 1))((put("@@"), dump(tree))[1])
    elif what == "root":
        return f"all is {strange!r:.60}", dump(strange)
    else:
        put(strange)
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
    """Half of the changes are to the header's tree, whose length stays right; the others to the length, the head's or the body's bytes."""
    length, = struct.unpack("<Q", data[:8])
    header, body = data[8:8 + length], data[8 + length:]
    what = random.choice(["header", "header", "length", "head", "body", "body", "not finite"])
    if what == "header":
        done, header = change_json(header.decode(), random)
        header = header.encode(errors="surrogatepass")
        header += b" " * (-len(header) % 8)
        return f"header: {done}", struct.pack("<Q", len(header)) + header + body
    if what == "length":
        other = random.choice([0, 1, 2, length - 1, length + 8, len(data), 10**8, 2**31, 2**32, 2**63, 2**64 - 1, random.randrange(2**64)])
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
    """A RAT+ state dict that torch.save writes: names, shapes, types, or what is no tensor at all."""
    state = dict(state)
    name = random.choice(list(state))
    tensor, what = state.pop(name), random.choice(["drop", "rename", "dtype", "shape", "not finite", "no tensor", "huge", "sparse", "strided", "layers"])
    if what == "rename":
        state[random.choice(["x", name + ".x", name.replace("layers.0", "layers.x"), name.replace("layers.0", "layers.99"), "backbone.layers.", ""])] = tensor
    elif what == "dtype":
        state[name] = tensor.to(random.choice([torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn]))
    elif what == "shape":
        state[name] = random.choice([tensor.flatten(), tensor[:-1], tensor[None], tensor[:0], torch.zeros(()), tensor.unsqueeze(-1).expand(*tensor.shape, 2)])
    elif what == "not finite":
        state[name] = tensor.clone()
        state[name].view(-1)[random.randrange(tensor.numel())] = random.choice([math.nan, math.inf, -math.inf])
    elif what == "no tensor":
        state[name] = random.choice([None, 1, "x", [1, 2], {}, b"x"])
    elif what == "huge":
        state[name] = torch.zeros(1).expand(*random.choice([(10**6, 10**6), (2**40,), (97, 10**9), (10**5, 64)]))
    elif what == "sparse":
        state[name] = random.choice([tensor.to_sparse(), tensor.to("meta")])
    elif what == "strided":
        state[name] = tensor.t() if tensor.dim() == 2 else tensor.repeat(2)[::2]
    elif what == "layers":
        state[f"backbone.layers.{random.choice([5, 10**9, -1])}.x"] = tensor
    return f"{what} {name}", state


EVIL = {  # what a pickle might call
    "system": Reduced(__import__("os").system, "true"), "eval": Reduced(eval, "1"), "exec": Reduced(exec, "import os; os.system('true')"),
    "open": Reduced(open, "evil", "w"), "import": Reduced(__import__, "antigravity"), "bytes": Reduced(bytearray, 10**10),
    "bytes twice": [Reduced(bytearray, 10**9), Reduced(bytearray, 10**9)], "attribute": Reduced(getattr, "x", "__class__"),
    "module": Reduced(torch.nn.Linear, 3, 3), "load": Reduced(torch.hub.load, "x", "y"), "popen": Reduced(__import__("subprocess").Popen, ["true"]),
    "storage": Reduced(torch.UntypedStorage, 10**10), "tensor": Reduced(torch.zeros, 10**10), "numpy": np.zeros(3), "deep": None}


def change_pth(data, random):
    what = random.choice(["bytes", "state", "state", "evil", "pickle", "members"])
    if what == "bytes":
        return change_bytes(data, random)
    saved = io.BytesIO()
    if what in ("state", "evil"):
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
        torch.save(file, saved, _use_new_zipfile_serialization=random.random() < 0.9)
        return f"{what}: {done}", saved.getvalue()
    members = {info.filename: zipfile.ZipFile(io.BytesIO(data)).read(info) for info in zipfile.ZipFile(io.BytesIO(data)).infolist()}
    packed = zipfile.ZIP_STORED
    if what == "pickle":
        name = next(name for name in members if name.endswith("data.pkl"))
        done, members[name] = change_bytes(members[name], random)
    else:
        name = random.choice(list(members))
        done = random.choice(["drop", "rename", "bomb", "escape", "empty"]) + f" {name}"
        if done.startswith("drop"):
            del members[name]
        elif done.startswith("rename"):
            members[name + "x"] = members.pop(name)
        elif done.startswith("bomb"):
            members[name], packed = members[name] + bytes(3 * 10**8), zipfile.ZIP_DEFLATED
        elif done.startswith("escape"):
            members["../../evil"] = b"evil"
        else:
            members[name] = b""
    with zipfile.ZipFile(saved, "w", packed) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return f"{what}: {done}", saved.getvalue()


# ---------------------------------------------------------------- the files before, and what is right after

def foreign(folder, shards, **form):
    """An OLMo 2 as others write it, without a hash of ours. -> the model"""
    model = tiny(eos_id=5, **form)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {f"model-{n + 1:05d}-of-{shards:05d}.safetensors" if shards > 1 else "model.safetensors": names[n::shards] for n in range(shards)}
    for file, some in files.items():
        save_file({name: tensors[name] for name in some}, folder / file, metadata={"format": "pt"})
    if shards > 1:
        index = {"metadata": {"total_size": 1}, "weight_map": {name: file for file, some in files.items() for name in some}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({name: value for name, value in config.items() if name not in ("sha256", "files")}))
    return model


@pytest.fixture(scope="module")
def originals(tmp_path_factory, ratplus):
    """{kind: (reader, what it reads, the files to change, how)}"""
    root = tmp_path_factory.mktemp("originals")
    foreign(root / "olmo2", 1)
    foreign(root / "olmo2 shards", 3)
    tiny(memory=True).save_pretrained(root / "ours")
    (root / "pth").mkdir()
    save_pth(root / "pth" / "model.pth", official_names(ratplus), pytest.MonkeyPatch(), n_head=4)
    train_bpe(root / "tokenizer", "gpt2")
    (root / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>", "added": {"x": [1, 2]}}))
    train_sentencepiece(root / "sentencepiece")
    (root / "shards").mkdir()
    for n, length in enumerate((3000, 2000)):
        tokens = np.random.default_rng(n).integers(0, 257, length).astype("<u2")
        shards.save_shard(root / "shards" / f"{n:05d}.bin", [tokens.tobytes()], 257, "bytes", 0)
    examples = [niah.make_example(task, 1024, ByteTokenizer(), 0, 0) for task in ("niah_single_1", "niah_single_1", "niah_single_2")]
    niah.write_jsonl(root / "ruler" / "niah_single_1.jsonl", examples)
    flags = ["--memory=on", "--steps=1", "--batch=1", "--context_len=512", "--tasks", "niah_single_1", "--eval_every=0"]
    train.train(train.parse(["--preset=pico", "--device=cpu", f"--out={root}", "--name=checkpoint", *flags]))
    (root / "checkpoint" / "flags").write_text(" ".join(flags))
    (root / "answers").mkdir()
    lines = [answers.Line("a", "niah_single_1", "quest:budget=64", [i], {"text": f"the {i}", "read": 3.5, "prompt_read": None, "seconds": 0.1}) for i in range(9)]
    (root / "answers" / "answers-0.jsonl").write_bytes(b"".join(map(answers.written, lines)))
    safetensors = lambda folder: sorted(path.relative_to(root / folder) for path in (root / folder).rglob("*.safetensors"))
    step = Path("step_0000001")
    return root, {
        "olmo2": ("model", "", safetensors("olmo2"), change_safetensors),
        "olmo2 shards": ("model", "", [*safetensors("olmo2 shards"), *3 * ["model.safetensors.index.json"]], None),
        "olmo2 config": ("model", "", ["config.json"], None),
        "ours": ("model", "", [*safetensors("ours"), "config.json"], None),
        "checkpoint": ("checkpoint", "", [*safetensors("checkpoint"), step / "config.json", step / "train.json"], None),
        "pth": ("model", "model.pth", ["model.pth"], change_pth),
        "tokenizer": ("tokenizer", "", 4 * ["tokenizer.json"] + ["tokenizer_config.json"], None),
        "shards": ("shards", "", ["00000.bin", "00001.bin"], change_shard),
        "ruler": ("ruler", "niah_single_1.jsonl", ["niah_single_1.jsonl"], change_lines),
        "answers": ("answers", "", ["answers-0.jsonl"], change_lines),
        "sentencepiece": ("tokenizer", "", ["tokenizer.model"], change_bytes)}


def plain_safetensors(folder):
    """Another reader, in numpy: {our name: [dtype, shape, hash]} of all files, as judge.digest tells it."""
    found = {}
    for file in folder.glob("*.safetensors"):
        data = file.read_bytes()
        length, = struct.unpack("<Q", data[:8])
        for name, entry in json.loads(data[8:8 + length]).items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                of_bytes = hashlib.sha256(data[8 + length + begin:8 + length + end]).hexdigest()[:16]
                found[name.removeprefix("model.")] = [{"F32": "torch.float32"}[entry["dtype"]], entry["shape"], of_bytes]
    return found


def right(kind, loaded, original, path):
    """Whether what was loaded from the changed files is what is in them."""
    if kind in ("ours", "checkpoint", "shards"):
        return loaded == original  # any change is found
    if kind == "answers":  # a last line without its end was cut off by a kill, and is asked again
        return loaded == original[:len(loaded)] and len(loaded) >= len(original) - 1
    if kind in ("olmo2", "olmo2 shards"):
        return loaded[0] == original[0] and loaded[1] == plain_safetensors(path)
    if kind == "olmo2 config":
        found = json.loads((path / "config.json").read_text())
        theirs = {"norm_eps": "rms_norm_eps", "context_len": "max_position_embeddings", "n_head": "num_attention_heads", "n_layer": "num_hidden_layers"}
        eos = found.get("eos_token_id")
        return loaded[1] == original[1] and all(loaded[0][ours] == found[name] for ours, name in theirs.items()) \
            and loaded[0]["rope_theta"] == found.get("rope_parameters", found)["rope_theta"] and loaded[0]["eos_id"] in (None, eos, *(eos if isinstance(eos, list) else []))
    if kind == "ruler":
        rows = [json.loads(line) for line in (path / "niah_single_1.jsonl").read_bytes().splitlines()]
        return [[i, prompt, answers] for i, prompt, answers, _ in loaded] == [[row["index"], row["input"] + (row.get("answer_prefix") or ""), row["outputs"]] for row in rows]
    if kind == "sentencepiece":
        oracle = sentencepiece.SentencePieceProcessor(model_file=str(path / "tokenizer.model"))
        return loaded[0] == oracle.encode(judge.TEXT) and loaded[2] == oracle.eos_id()
    if kind == "tokenizer":
        return loaded == original or loaded[:2] == [of_hugging_face(path), True]
    return loaded == original  # pth: zip's checksums cover it all


def of_hugging_face(path):
    oracle = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    oracle.encode_special_tokens = True
    return oracle.encode(judge.TEXT, add_special_tokens=False).ids


@pytest.mark.parametrize("kind", INPUTS)
def test_changed_files_are_read_right_or_refused_in_one_line(kind, judged, originals, tmp_path, capsys):
    """Any change that ends in a traceback, hangs, runs code, takes memory, or is read as something that is not there."""
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
        verdict, message = next(iter(judged(reader, path / what).items()))
        if verdict == "refused" and not (str(path) in message and message.isprintable() and len(message) < 700):
            verdict, message = "defect", f"no clear line: {message!r:.700}"
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

PLACES = [("olmo2", "config.json"), ("olmo2", "model.safetensors"), ("olmo2 shards", "model.safetensors.index.json"), ("pth", "model.pth"),
          ("tokenizer", "tokenizer.json"), ("tokenizer", "tokenizer_config.json"), ("shards", "00000.bin"), ("ruler", "niah_single_1.jsonl"),
          ("checkpoint", "step_0000001/train.json")]


@pytest.mark.parametrize("kind, name", PLACES)
def test_what_has_no_end_is_refused_at_once(kind, name, judged, originals, tmp_path):
    """A pipe that nobody writes into, or a link to a device, in a folder from a stranger: waiting for ever, or memory without end."""
    root, kinds = originals
    reader, what, *_ = kinds[kind]
    for make in os.mkfifo, lambda file: file.symlink_to("/dev/zero"), Path.mkdir:
        shutil.copytree(root / kind, tmp_path / kind)
        (tmp_path / kind / name).unlink()
        make(tmp_path / kind / name)
        verdict, message = next(iter(judged(reader, tmp_path / kind / what).items()))
        assert verdict == "refused" and name in message and message.isprintable(), message
        shutil.rmtree(tmp_path / kind)


def bomb(folder, what):
    """Files whose content would be much larger in memory."""
    foreign(folder, 1)
    if what == "config":
        (folder / "config.json").write_text("[" + "[]," * 10**7 + "[]]")
    elif what == "keys":  # all are there before the one that comes twice
        (folder / "config.json").write_text("{" + ",".join(f'"{i}":0' for i in [*range(90_000), 89_999]) + "}")
    elif what == "places":
        tensors = {str(i): torch.zeros(0) for i in range(5000)}
        save_file(tensors, folder / "model.safetensors", metadata={weights.PLACES: json.dumps({name: {"saved_offsets": [0]} for name in tensors})})
    elif what == "files":
        (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | {"files": [1]}))
    elif what == "index":
        (folder / "model.safetensors.index.json").write_text('{"weight_map": [' + "[]," * 10**7 + "[]]}")
    elif what == "header":  # 300,000 tensors without an element
        header = ",".join(f'"{i:06d}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(300_000))
        header = "{" + header + "}" + " " * (-(len(header) + 2) % 8)
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header.encode())
    else:  # honest, and large
        model = Transformer(Config(vocab_size=100_000, n_layer=1, width=256, n_head=4, n_kv_head=4, mlp_width=256, memory=what == "ours"))
        if what == "ours":
            return model.save_pretrained(folder / "ours")
        (folder / "config.json").write_text(json.dumps(weights.described(model.config, "float32")))
        save_file({weights.hf_name(name): tensor for name, tensor in model.state_dict().items()}, folder / "model.safetensors")


@pytest.mark.parametrize("what", ["config", "keys", "files", "index", "header", "places", "honest", "ours"])
def test_memory_is_at_most_twice_the_files_and_time_is_short(what, judged, tmp_path):
    """JSON that Python blows up; a header of nothing but names; work that grows with their square; a model read and kept twice."""
    bomb(tmp_path / what, what)
    folder = tmp_path / what / "ours" if what == "ours" else tmp_path / what
    verdict, message = next(iter(judged("model", folder).items()))
    if what == "keys":
        asked = [{"index": 0, "input": "x" * 10**6 + " a", "outputs": ["a"] * 100_000}]
        write_lines({tmp_path / "niah_single_1.jsonl": asked})
        assert "refused" in judged("ruler", tmp_path / "niah_single_1.jsonl")
    assert verdict == ("loaded" if what in ("honest", "ours") else "refused"), message


def rows(folder, *parts):
    """A model's norm in files of several GPUs: (where its rows begin, how many) of each."""
    (folder / "model.safetensors").unlink()
    for n, (first, count) in enumerate(parts, start=1):
        save_file({"model.norm.weight": torch.ones(count)}, folder / f"model-{n:05d}-of-{len(parts):05d}.safetensors",
                  metadata={weights.PLACES: json.dumps({"model.norm.weight": {"saved_offsets": [first]}})})


ODD = {  # what a reader of this code thought of: each ended in a traceback, or was read
    "rows beside each other": lambda folder: rows(folder, ([1], 3)),
    "rows after a text": lambda folder: rows(folder, (0, 3), ("a", 3)),
    "rows twice": lambda folder: rows(folder, (0, 3), (0, 3)),
    "rows with a gap": lambda folder: rows(folder, (0, 3), (4, 3)),
    "a theta of 400 digits": lambda folder: (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text())
                                                                                          | {"rope_theta": 10**400})),
}


@pytest.mark.parametrize("what", ODD)
def test_odd_models_are_refused(what, judged, tmp_path):
    foreign(tmp_path / "model", 1)
    ODD[what](tmp_path / "model")
    verdict, message = next(iter(judged("model", tmp_path / "model").items()))
    assert verdict == "refused" and str(tmp_path) in message and message.isprintable(), message


@pytest.mark.parametrize("line", ['["sha256"]', '"sha256"', "3", "{}", '{"sha256": 1}', "null"])
def test_odd_lines_of_answers_are_refused(line, judged, tmp_path):
    (tmp_path / "answers-0.jsonl").write_text(line + "\n")
    verdict, message = next(iter(judged("answers", tmp_path).items()))
    assert verdict == "refused" and "answers-0.jsonl line 1" in message, message


def test_what_the_world_writes_is_not_refused(judged, tmp_path):
    """A byte order mark, a prefix that is null, a NaN beside the text, an end of text outside a cut vocabulary."""
    line = {"index": 0, "input": "for a is: 7.", "outputs": ["7"], "answer_prefix": None}
    (tmp_path / "niah_single_1.jsonl").write_text("\ufeff" + json.dumps(line))
    assert judged("ruler", tmp_path / "niah_single_1.jsonl") == {"loaded": [[0, "for a is: 7.", ["7"], [[10, 11]]]]}
    (tmp_path / "a.jsonl").write_text('{"text": "x", "score": NaN, "a": 1, "a": 2}\n')
    assert [text for text, _ in shards.documents([tmp_path / "a.jsonl"], "text")] == ["x"]
    foreign(tmp_path / "model", 1)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"eos_token_id": 50279}))
    assert judged("model", tmp_path / "model")["loaded"][0]["eos_id"] is None


OURS = [file for folder in (".", "infra", "triton_ops", "experiments") for file in sorted((ROOT / folder).glob("*.py"))]
CALLS = {"eval", "exec", "compile", "__import__", "breakpoint", "input"}
IMPORTS = {"pickle", "marshal", "shelve", "dill", "joblib", "urllib", "http", "requests", "ftplib", "smtplib", "huggingface_hub", "socketserver"}


@pytest.mark.parametrize("file", OURS, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_script_runs_what_it_reads_or_asks_the_network(file):
    """A pickle, an eval or a download that a change brings in."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in CALLS, f"{file.name} line {node.lineno}: {node.func.id}"
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            assert IMPORTS.isdisjoint(name.split(".")[0] for name in names), f"{file.name} line {node.lineno}: {names}"
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "np.load", "numpy.load"):
            flags = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert flags.get("weights_only") == "True" and file.name == "ratplus.py", f"{file.name} line {node.lineno}: {ast.unparse(node)}"
