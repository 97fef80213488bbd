"""
infra/weights.py and ratplus.py: what is saved is what is loaded, a damaged file is one clear line,
and a save that fails leaves what was there. What does not fit together: test_contradictions.py.
What others may put into a file, a pointer of git-lfs among it: test_hostile.py.
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
from infra.families import family_of
from model import Transformer
from on_disk import INDEX, ONE, assert_same, contents, not_loaded, save, tensors, unsealed

load, ROOT = Transformer.from_pretrained, Path(__file__).parent.parent


# ---------------------------------------------------------------- round trips

@law(20)
@given(configs(), dtypes, seeds)
def test_a_model_that_was_saved_is_the_model(form, dtype, seed):
    """A weight rounded, renamed or left out; a field of some form that a file does not keep."""
    unusual = dict(eos_id=5, norm_eps=1e-5, rope_theta=777.0, context_len=99)
    model, tokens = tiny(**form | unusual).to(dtype), draw_tokens(2, 20, seed)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(Path(folder, "new", "folder"))
        loaded = load(Path(folder, "new", "folder"))
        assert_same(loaded, model)
        assert torch.equal(loaded(tokens), model(tokens))
    assert all(p.requires_grad and not p.is_meta for p in loaded.parameters())


@pytest.mark.parametrize("form", FORMS)
def test_saving_what_was_loaded_writes_the_same_bytes(form, tmp_path):
    """Files that change from save to save, which cannot be compared; gates in an "olmo2"."""
    model = save(tmp_path / "a", **FORMS[form])
    first = contents(tmp_path / "a")
    load(tmp_path / "a").save_pretrained(tmp_path / "b")
    model.save_pretrained(tmp_path / "a")
    assert first == contents(tmp_path / "a") == contents(tmp_path / "b")
    with safe_open(tmp_path / "a" / ONE, framework="pt") as file:
        # transformers before 5 refuses files without the format
        assert file.metadata()["format"] == "pt" and len(file.metadata()["sha256"]) == 64
    # another program that loads a memory as OLMo 2 would drop its gates without a word
    ours, family = form == "ratplus" or "memory" in form, form.split()[0].replace("gqa", "olmo2")
    assert json.loads(first["config.json"])["model_type"] == ("nanorat" if ours else family)


@pytest.mark.parametrize("form", FORMS)
def test_files_have_the_names_of_their_family(form, tmp_path):
    """A Llama's second norm under OLMo 2's name; a memory that no longer finds its norms."""
    model = save(tmp_path, **FORMS[form])
    names = {name.rpartition("layers.0.")[2] for name in load_file(tmp_path / ONE)}
    of_llama = family_of(model.config) in ("llama", "qwen2", "qwen3")
    assert ("post_attention_layernorm.weight" in names) == (of_llama or not model.config.pre_norm)
    assert ("pre_feedforward_layernorm.weight" in names) == (model.config.pre_norm and not of_llama)


@pytest.mark.parametrize("form, as_bool", [("memory", True), ("ratplus", False)])
def test_an_older_config_says_whether_there_is_qk_norm(form, as_bool, tmp_path):
    """A checkpoint from when there was but one kind of QK-norm that no longer loads."""
    model = save(tmp_path, **FORMS[form])
    unsealed(qk_norm=as_bool)(tmp_path)
    assert_same(load(tmp_path), model)


@pytest.mark.parametrize("before, after",
                         [(10**9, 20000), (20000, 10**9), (20000, 9000), (9000, 20000)])
def test_saving_over_a_model_in_other_files_leaves_none_of_them(
        before, after, tmp_path, monkeypatch):
    """Old shards, or an old index, that are later loaded as part of the new model."""
    monkeypatch.setattr(weights, "SHARD_BYTES", before)
    save(tmp_path, memory=True)
    old = contents(tmp_path)
    monkeypatch.setattr(weights, "SHARD_BYTES", after)
    model = save(tmp_path, seed=1)
    assert_same(load(tmp_path), model)
    files = contents(tmp_path).keys() - {"config.json"}
    if after == 10**9:
        assert files == {ONE}
        return
    index = json.loads((tmp_path / INDEX).read_text())
    shards = {file: [x.nbytes for x in load_file(tmp_path / file).values()]
              for file in set(index["weight_map"].values())}
    assert files == {INDEX, *shards} and len(shards) > 2 and old.keys() != {"config.json", *files}
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())
    assert all(sum(sizes) <= after or len(sizes) == 1 for sizes in shards.values())


def test_dtype_converts_and_none_keeps(tmp_path):
    """A model trained in bf16 silently loaded in fp32, or the other way round; fp16 files."""
    model = save(tmp_path, **FORMS["gqa memory"])
    dtypes = lambda path=tmp_path, **how: {p.dtype for p in load(path, **how).parameters()}
    for dtype in torch.bfloat16, torch.float16, torch.float32:
        for name, p in load(tmp_path, dtype=dtype).named_parameters():
            assert p.dtype == dtype and torch.equal(p, model.get_parameter(name).to(dtype))
    assert dtypes() == {torch.float32}
    save(tmp_path / "plain")
    assert dtypes(tmp_path / "plain", dtype=torch.bfloat16, memory=True) == {torch.bfloat16}
    unsealed()(tmp_path)
    tensors(tmp_path, lambda found: found.update({name: x.half() for name, x in found.items()}))
    assert dtypes() == {torch.float16} and dtypes(dtype=torch.float32) == {torch.float32}


def test_a_loaded_model_is_independent_of_its_file(tmp_path):
    """Weights that stay mapped: training them, or saving over the file, would change the other."""
    model = save(tmp_path)
    loaded = load(tmp_path)
    with torch.no_grad():
        loaded.norm.weight.add_(1)
    assert_same(load(tmp_path), model)
    kept = loaded.embed_tokens.weight.clone()
    loaded.save_pretrained(tmp_path)
    with open(tmp_path / ONE, "r+b") as file:
        file.seek(-5000, os.SEEK_END)
        file.write(bytes(5000))
    assert torch.equal(loaded.embed_tokens.weight, kept)


MEASURE = """
import sys, threading, torch
from pathlib import Path
from model import Config, Transformer
with torch.device("meta"):
    Transformer(Config(n_layer=1))  # what torch imports for this is no part of the measurement
def anonymous():  # MiB of this process itself: pages of a mapped file can go at any time
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) / 1024
def watch():
    while not stop.wait(0.001):
        seen.append(anonymous())
seen, stop = [anonymous()], threading.Event()
thread = threading.Thread(target=watch)
thread.start()
model = Transformer.from_pretrained(sys.argv[1])
stop.set(), thread.join()
print(max(seen) - seen[0], sum(p.nbytes for p in model.parameters()) / 2**20)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux's /proc measures memory")
def test_loading_takes_little_more_memory_than_the_model(tmp_path):
    """A file read whole before it is copied: a 64 GB model would need 128."""
    save(tmp_path, width=512, n_head=8, n_kv_head=8, mlp_width=1536, n_layer=6, vocab_size=8000,
         memory=True)
    result = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], cwd=ROOT,
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
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1:])
        weights.read(tmp_path, hashed=False)
        not_loaded(tmp_path, file, "hash", "restore")


def test_content_hash_tells_names_shapes_and_types_apart():
    """A hash of bytes alone: swapped or reshaped tensors have the same."""
    x = torch.arange(6, dtype=torch.float32)
    same = [{"a": x, "b": x + 1}, {"b": x + 1, "a": x.clone()}]
    other = [{"a": x + 1, "b": x}, {"a": x.view(2, 3), "b": x + 1},
             {"a": x.view(torch.int32), "b": x + 1}, {"a": x}]
    assert [len(set(map(weights.content_hash, found))) for found in (same, same + other)] == [1, 5]


def test_the_same_tensors_are_the_same_bytes(tmp_path):
    """Files of a run and of its repetition that differ, though no weight does."""
    shard, found = {"a": torch.arange(6.0).view(2, 3), "é": torch.ones(3)}, set()
    for _ in range(16):
        weights.save_shard(shard, tmp_path / ONE, {"a": (0, 0), "é": (2,)})
        weights.checked(tmp_path / ONE)
        found.add((tmp_path / ONE).read_bytes())
    assert len(found) == 1


def test_a_truncated_file_is_refused(tmp_path):
    """A download that broke off."""
    save(tmp_path)
    file = tmp_path / ONE
    whole = file.read_bytes()
    for left in 0, 4, 500, -1:
        file.write_bytes(whole[:left])
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


def test_of_several_ends_of_text_one_is_kept_and_it_is_said(tmp_path, capsys):
    """The others dropped without a word."""
    save(tmp_path, eos_id=3)
    told = f"note: {tmp_path / 'config.json'}: of eos_token_id=[3, 4] the first is kept; "
    for listed, said in ([3, 4], f"{told}texts end at the tokenizer's\n"), ([3], ""):
        unsealed(eos_token_id=listed)(tmp_path)
        assert load(tmp_path).config.eos_id == 3 and capsys.readouterr().err == said


# ---------------------------------------------------------------- RAT+ files

def test_ratplus_saves_and_loads_as_a_directory(ratplus, tmp_path, monkeypatch):
    """A conversion that is right in memory and wrong on disk."""
    file = save_pth(tmp_path / "last.pth", official_names(ratplus), monkeypatch, n_head=4)
    model = load(file)
    expected = RATPLUS_FORM | {"memory": "decay"}
    assert {key: getattr(model.config, key) for key in expected} == expected
    model.save_pretrained(tmp_path / "ours")
    assert_same(load(tmp_path / "ours"), model)
    assert {p.dtype for p in load(file, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


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
        patch.setattr(*(weights, "save_file") if fail_at else (os, "replace"), fails)
        refused(lambda: save(tmp_path, seed=1), tmp_path, "unchanged", "No space", error=OSError)
    assert calls and contents(tmp_path) == files
    assert_same(load(tmp_path), before)
