"""
infra/weights.py and ratplus.py: what is saved is what is loaded, a damaged file is one clear line,
and a save that fails leaves what was there. What does not fit together: test_contradictions.py.
"""
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from conftest import FORMS, RATPLUS_FORM, draw_tokens, official_names, refused, save_pth, tiny
from drawn import configs, dtypes, law, seeds
from infra import weights
from model import Transformer
from on_disk import INDEX, ONE, assert_same, contents, not_loaded, save, tensors, unsealed

ROOT = Path(__file__).parent.parent


# ---------------------------------------------------------------- round trips

@law(20)
@given(configs(), dtypes, seeds)
def test_a_model_that_was_saved_is_the_model(form, dtype, seed):
    """A weight rounded, renamed or left out; a field of some form that a file does not keep."""
    unusual = dict(eos_id=5, norm_eps=1e-5, rope_theta=777.0, context_len=99)
    model, tokens = tiny(**form | unusual).to(dtype), draw_tokens(2, 20, seed)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(Path(folder, "new", "folder"))
        loaded = Transformer.from_pretrained(Path(folder, "new", "folder"))
        assert_same(loaded, model)
        assert torch.equal(loaded(tokens), model(tokens))
    assert all(p.requires_grad and not p.is_meta for p in loaded.parameters())


@pytest.mark.parametrize("form", FORMS)
def test_saving_what_was_loaded_writes_the_same_bytes(form, tmp_path):
    """Files that change from save to save, which cannot be compared; gates in an "olmo2"."""
    model = save(tmp_path / "a", **FORMS[form])
    Transformer.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    first = contents(tmp_path / "a")
    assert first == contents(tmp_path / "b")
    model.save_pretrained(tmp_path / "a")
    assert first == contents(tmp_path / "a")
    with safe_open(tmp_path / "a" / ONE, framework="pt") as file:
        # transformers before 5 refuses files without the format
        assert file.metadata()["format"] == "pt" and len(file.metadata()["sha256"]) == 64
    # another program that loads a memory as OLMo 2 would drop its gates without a word
    kind = json.loads(first["config.json"])["model_type"]
    assert kind == ("nanorat" if form in ("memory", "gqa memory", "ratplus") else "olmo2")


@pytest.mark.parametrize("before, after",
                         [(10**9, 20000), (20000, 10**9), (20000, 9000), (9000, 20000)])
def test_saving_over_a_model_in_other_files_leaves_none_of_them(
        before, after, tmp_path, monkeypatch):
    """Old shards, or an old index, that are later loaded as part of the new model."""
    monkeypatch.setattr(weights, "SHARD_BYTES", before)
    save(tmp_path, memory=True)
    old = set(contents(tmp_path))
    monkeypatch.setattr(weights, "SHARD_BYTES", after)
    model = save(tmp_path, seed=1)
    assert_same(Transformer.from_pretrained(tmp_path), model)
    new = set(contents(tmp_path))
    assert old != new
    if after == 10**9:
        assert new == {"config.json", ONE}
        return
    shards = sorted(tmp_path.glob("*.safetensors"))
    index = json.loads((tmp_path / INDEX).read_text())
    assert sorted(set(index["weight_map"].values())) == [shard.name for shard in shards]
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())
    assert len(shards) > 2
    for shard in shards:
        sizes = [tensor.nbytes for tensor in load_file(shard).values()]
        assert sum(sizes) <= after or len(sizes) == 1


def test_dtype_converts_and_none_keeps(tmp_path):
    """A model trained in bf16 silently loaded in fp32, or the other way round; fp16 files."""
    model = save(tmp_path, **FORMS["gqa memory"])
    dtypes = lambda path=tmp_path, **how: {
        p.dtype for p in Transformer.from_pretrained(path, **how).parameters()}
    for dtype in torch.bfloat16, torch.float16, torch.float32:
        for name, p in Transformer.from_pretrained(tmp_path, dtype=dtype).named_parameters():
            assert p.dtype == dtype and torch.equal(p, model.get_parameter(name).to(dtype))
    assert dtypes() == {torch.float32}
    save(tmp_path / "plain")
    assert dtypes(tmp_path / "plain", dtype=torch.bfloat16, memory=True) == {torch.bfloat16}
    unsealed()(tmp_path)
    tensors(tmp_path, lambda found: found.update({name: x.half() for name, x in found.items()}))
    assert dtypes() == {torch.float16} and dtypes(dtype=torch.float32) == {torch.float32}


def test_the_newest_checkpoint_of_a_run_is_read(tmp_path):
    """The first checkpoint of a run taken for the last, or one that was still being written."""
    for step in 100, 200, 1000:
        save(tmp_path / f"step_{step:07d}", seed=step)
    (tmp_path / "step_0002000").mkdir()  # no config yet: it is written last
    assert_same(Transformer.from_pretrained(tmp_path), tiny(seed=1000))


def test_a_loaded_model_is_independent_of_its_file(tmp_path):
    """Weights that stay mapped: training them, or saving over the file, would change the other."""
    model = save(tmp_path)
    loaded = Transformer.from_pretrained(tmp_path)
    with torch.no_grad():
        loaded.norm.weight.add_(1)
    assert_same(Transformer.from_pretrained(tmp_path), model)
    kept = loaded.embed_tokens.weight.clone()
    loaded.save_pretrained(tmp_path)
    with open(tmp_path / ONE, "r+b") as file:
        file.seek(-5000, os.SEEK_END)
        file.write(bytes(5000))
    assert torch.equal(loaded.embed_tokens.weight, kept)


MEASURE = """
import sys, threading, time
sys.path.insert(0, sys.argv[1])
import torch
from model import Config, Transformer
with torch.device("meta"):
    Transformer(Config(n_layer=1))  # what torch imports for this is no part of the measurement
def anonymous():  # MiB of this process itself: pages of a mapped file can go at any time
    lines = open("/proc/self/status")
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024
peak, stop = anonymous(), False
def watch():
    global peak
    while not stop:
        peak = max(peak, anonymous())
        time.sleep(0.001)
before = anonymous()
thread = threading.Thread(target=watch); thread.start()
model = Transformer.from_pretrained(sys.argv[2])
stop = True; thread.join()
print(peak - before, sum(p.nbytes for p in model.parameters()) / 2**20)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux's /proc measures memory")
def test_loading_takes_little_more_memory_than_the_model(tmp_path):
    """A file read whole before it is copied: a 64 GB model would need 128."""
    save(tmp_path, width=512, n_head=8, n_kv_head=8, mlp_width=1536, n_layer=6, vocab_size=8000,
         memory=True)
    result = subprocess.run([sys.executable, "-c", MEASURE, str(ROOT), str(tmp_path)],
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    grown, size = map(float, result.stdout.split())
    assert size > 100 and size * 0.9 < grown < size * 1.15 + 20, f"{size:.0f} MiB took {grown:.0f}"


# ---------------------------------------------------------------- damaged files

def test_a_flipped_bit_is_found_by_whoever_loads(tmp_path):
    """
    A weight damaged on disk or in transit shows as a slightly worse score. Who reads no tensor yet
    need not hash: but then it is hashed when it is loaded.
    """
    save(tmp_path, memory=True)
    file = tmp_path / ONE
    whole = file.read_bytes()
    for place in len(whole) - 1, len(whole) // 2:
        damaged = bytearray(whole)
        damaged[place] ^= 1
        file.write_bytes(damaged)
        weights.read(tmp_path, hashed=False)
        not_loaded(tmp_path, file, "hash", "restore")
    file.write_bytes(whole)
    Transformer.from_pretrained(tmp_path)


def test_content_hash_tells_names_shapes_and_types_apart():
    """A hash of bytes alone: swapped or reshaped tensors have the same."""
    x = torch.arange(6, dtype=torch.float32)
    same = [{"a": x, "b": x + 1}, {"b": x + 1, "a": x.clone()}]
    other = [{"a": x + 1, "b": x}, {"a": x.view(2, 3), "b": x + 1},
             {"a": x.view(torch.int32), "b": x + 1}, {"a": x}]
    assert len({weights.content_hash(found) for found in same}) == 1
    assert len({weights.content_hash(found) for found in same + other}) == 1 + len(other)


def test_the_same_tensors_are_the_same_bytes(tmp_path):
    """Files of a run and of its repetition that differ, though no weight does."""
    shard = {"a": torch.arange(6.0).view(2, 3), "é": torch.ones(3)}
    for places in None, {"a": (0, 0), "é": (2,)}:
        found = set()
        for n in range(16):
            file = tmp_path / f"{n}.safetensors"
            weights.save_shard(shard, file, places)
            found.add(file.read_bytes())
            assert weights.checked(file, "fetch it again")
        assert len(found) == 1


@pytest.mark.parametrize("left", [0, 4, 500, -1])
def test_a_truncated_file_is_refused(left, tmp_path):
    """A download that broke off."""
    save(tmp_path)
    file = tmp_path / ONE
    file.write_bytes(file.read_bytes()[:left])
    not_loaded(tmp_path, file, "damaged or incomplete", "fetch it again")
    refused(lambda: weights.read(tmp_path, hashed=False), "damaged or incomplete")


def test_missing_files_are_named(tmp_path, monkeypatch):
    """An incomplete download that loads in part, or a wrong path."""
    monkeypatch.setattr(weights, "SHARD_BYTES", 20000)
    save(tmp_path)
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    not_loaded(tmp_path, shard, "fetch", error=FileNotFoundError)
    (tmp_path / INDEX).write_text("{}")
    not_loaded(tmp_path, "index", "fetch it again")
    for file in tmp_path.glob("model*"):
        file.unlink()
    not_loaded(tmp_path, "no model.safetensors", "rename", error=FileNotFoundError)
    (tmp_path / "config.json").unlink()
    not_loaded(tmp_path, tmp_path / "config.json", "missing", error=FileNotFoundError)
    not_loaded(tmp_path / "nowhere", "does not exist", error=FileNotFoundError)
    (tmp_path / "model.bin").write_bytes(b"x")
    not_loaded(tmp_path / "model.bin", "neither", ".pth")


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + 64 * "0" + "\nsize 123456\n"


@pytest.mark.parametrize("name", ["config.json", "model-00001-of-*.safetensors", INDEX, "last.pth"])
def test_what_git_lfs_left_is_known(name, tmp_path, monkeypatch):
    """A clone without git-lfs: "fetch it again", by which one does the same again."""
    monkeypatch.setattr(weights, "SHARD_BYTES", 20000)
    save(tmp_path)
    unsealed()(tmp_path)
    (tmp_path / "last.pth").touch()
    file = next(tmp_path.glob(name))
    file.write_text(POINTER)
    not_loaded(file if name == "last.pth" else tmp_path, file, "git-lfs", "git lfs pull")


def test_of_several_ends_of_text_one_is_kept_and_it_is_said(tmp_path, capsys):
    """The others dropped without a word."""
    save(tmp_path, eos_id=3)
    for given, lines in ([3, 4], 1), ([3], 0):
        unsealed(eos_token_id=given)(tmp_path)
        assert Transformer.from_pretrained(tmp_path).config.eos_id == 3
        said = capsys.readouterr().err
        assert said.count("\n") == lines
        assert not lines or f"{tmp_path / 'config.json'}: of eos_token_id=[3, 4]" in said


# ---------------------------------------------------------------- RAT+ files

def test_a_pickle_runs_no_code(tmp_path):
    """A .pth from the internet that deletes one's home."""
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {ran}",)

    file = tmp_path / "evil.pth"
    torch.save({"task": {"embedding.wte.weight": torch.zeros(4, 4)}, "config": Evil()}, file)
    not_loaded(file)
    assert not ran.exists()
    torch.load(file, weights_only=False)
    assert ran.exists(), "the file would not have run anything: the test is void"


@pytest.mark.parametrize("content", [b"", b"no pickle at all", b"PK\x03\x04 half a zip"], ids=str)
def test_a_damaged_pth_is_refused(content, tmp_path):
    """A traceback of the unpickler's."""
    (tmp_path / "last.pth").write_bytes(content)
    not_loaded(tmp_path / "last.pth", "fetch it again")


FC2, BIAS = (f"backbone.layers.1.hidden_layer.{name}" for name in ("fc2.weight", "bias"))
NO_RATPLUS = {
    "no task": lambda state: {"model": state},
    "list": lambda state: [1, 2],
    "other model": lambda state: {"task": {"wte.weight": torch.zeros(4, 4)}},
    "tensor missing": lambda state: {"task": state, "dropped": state.pop(FC2)},
    "tensor foreign": lambda state: {"task": state | {BIAS: torch.zeros(3)}},
    "heads of 128, in a width of 64": lambda state: {"task": state},
}


@pytest.mark.parametrize("what", NO_RATPLUS)
def test_a_pth_that_is_no_ratplus_is_refused(what, ratplus, tmp_path, monkeypatch):
    """Another project's .pth, or a RAT+ of another form, loaded as far as it goes."""
    file = NO_RATPLUS[what](official_names(ratplus))
    if "tensor" in what or "other" in what:
        save_pth(tmp_path / "last.pth", file["task"], monkeypatch, n_head=4)
    else:
        torch.save(file, tmp_path / "last.pth")
    not_loaded(tmp_path / "last.pth")


def test_ratplus_saves_and_loads_as_a_directory(ratplus, tmp_path, monkeypatch):
    """A conversion that is right in memory and wrong on disk."""
    file = save_pth(tmp_path / "last.pth", official_names(ratplus), monkeypatch, n_head=4)
    model = Transformer.from_pretrained(file)
    expected = RATPLUS_FORM | {"memory": "decay"}
    assert {key: getattr(model.config, key) for key in expected} == expected
    model.save_pretrained(tmp_path / "ours")
    assert_same(Transformer.from_pretrained(tmp_path / "ours"), model)
    coarse = Transformer.from_pretrained(file, dtype=torch.bfloat16)
    assert {p.dtype for p in coarse.parameters()} == {torch.bfloat16}


# ---------------------------------------------------------------- failed saves

@pytest.mark.parametrize("fail_at, shard_bytes",
                         [(1, 10**9), (1, 20000), (3, 20000), (None, 10**9)])
def test_a_failed_save_leaves_what_was_there(fail_at, shard_bytes, tmp_path, monkeypatch):
    """
    A full disk, or a rename that fails (None), which costs the previous checkpoint too, or leaves
    half of each: shards of two models in one folder; a temporary file after each failed save.
    """
    monkeypatch.setattr(weights, "SHARD_BYTES", shard_bytes)
    before = save(tmp_path)
    files, calls = contents(tmp_path), []

    def fails(found, file, **more):
        calls.append(file)
        if fail_at:
            save_file(found, file, **more)
        if len(calls) == (fail_at or 1):
            raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        if fail_at:
            patch.setattr(weights, "save_file", fails)
        else:
            patch.setattr(os, "replace", fails)
        refused(lambda: save(tmp_path, seed=1), tmp_path, "unchanged", "No space", error=OSError)
    assert calls and contents(tmp_path) == files
    assert_same(Transformer.from_pretrained(tmp_path), before)
