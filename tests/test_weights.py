"""weights.py: what is saved is what is loaded, and a damaged or foreign file is one clear line."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from infra import weights
from conftest import FORMS, RATPLUS_FORM, draw_tokens, official_names, one_line, save_pth, tiny
from model import Transformer

forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())


def save(path, **form):
    model = tiny(**form)
    model.save_pretrained(path)
    return model


def assert_same(model, other):
    """The same config and the same weights, bit by bit."""
    assert model.config == other.config
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]), name


def edit_config(path, **changes):
    """Change fields of a config.json, from which then our hash is gone; None drops one."""
    file = path / "config.json"
    config = json.loads(file.read_text()) | changes | {"sha256": None, "files": None}
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def edit_tensors(path, change):
    """Rewrite model.safetensors, without our hash, with change(tensors) applied."""
    edit_config(path)
    tensors = load_file(path / "model.safetensors")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def refused(path, *words, error=ValueError, **settings):
    """Loading `path` fails in one line that names the file at fault and says these words."""
    with pytest.raises(error) as raised:
        Transformer.from_pretrained(path, **settings)
    one_line(raised, *words)
    assert str(path) in str(raised.value)


def contents(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


# ---------------------------------------------------------------- round trips

@forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_exact(form, dtype, tmp_path):
    """A weight rounded, renamed, left out or tied by mistake; a config field that is not saved."""
    model = tiny(**form, eos_id=5, norm_eps=1e-5, rope_theta=777.0, context_len=99).to(dtype)
    model.save_pretrained(tmp_path / "new" / "folder")
    loaded = Transformer.from_pretrained(tmp_path / "new" / "folder")
    assert_same(loaded, model)
    assert not any(p.is_meta for p in loaded.parameters()) and all(p.requires_grad for p in loaded.parameters())
    tokens = draw_tokens(2, 20)
    assert torch.equal(loaded(tokens), model(tokens))


@forms
def test_saving_what_was_loaded_writes_the_same_bytes(form, tmp_path):
    """Weights or a hash that change from save to save: two copies could not be compared. (safetensors orders metadata anew.)"""
    model = save(tmp_path / "a", **form)
    Transformer.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")

    def saved(path):
        with safe_open(path / "model.safetensors", framework="pt") as file:
            size = (path / "model.safetensors").stat().st_size
            data = (path / "model.safetensors").read_bytes()[-sum(p.nbytes for p in model.parameters()):]
            return sorted(file.keys()), file.metadata(), size, data, (path / "config.json").read_text()

    first = saved(tmp_path / "a")
    # transformers before 5 refuses files without the format
    assert first[1]["format"] == "pt" and len(first[1]["sha256"]) == 64 and first == saved(tmp_path / "b")
    model.save_pretrained(tmp_path / "a")
    assert first == saved(tmp_path / "a")


@pytest.mark.parametrize("before, after", [(10**9, 20000), (20000, 10**9), (20000, 9000), (9000, 20000)])
def test_saving_over_a_model_in_other_files_leaves_none_of_them(before, after, tmp_path, monkeypatch):
    """Old shards, or an old index, that are later loaded as part of the new model."""
    monkeypatch.setattr(weights, "SHARD_BYTES", before)
    save(tmp_path, memory=True)
    old = set(contents(tmp_path))
    monkeypatch.setattr(weights, "SHARD_BYTES", after)
    model = tiny(seed=1)
    model.save_pretrained(tmp_path)
    assert_same(Transformer.from_pretrained(tmp_path), model)
    new = set(contents(tmp_path))
    assert old != new
    shards = sorted(tmp_path.glob("*.safetensors"))
    if after == 10**9:
        assert new == {"config.json", "model.safetensors"}
    else:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert sorted(set(index["weight_map"].values())) == [shard.name for shard in shards] and len(shards) > 2
        assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())
        for shard in shards:
            with safe_open(shard, framework="pt") as file:
                sizes = [file.get_tensor(name).nbytes for name in file.keys()]
            assert sum(sizes) <= after or len(sizes) == 1


def test_dtype_converts_and_none_keeps(tmp_path):
    """A model trained in bf16 silently loaded in fp32, or the other way round."""
    model = save(tmp_path, **FORMS["gqa memory"])
    for dtype in torch.bfloat16, torch.float16, torch.float32:
        loaded = Transformer.from_pretrained(tmp_path, dtype=dtype)
        for name, p in loaded.named_parameters():
            assert p.dtype == dtype and torch.equal(p, model.get_parameter(name).to(dtype))
    assert Transformer.from_pretrained(tmp_path).norm.weight.dtype == torch.float32
    added = Transformer.from_pretrained(save_to(tmp_path / "plain"), dtype=torch.bfloat16, memory=True)
    assert {p.dtype for p in added.parameters()} == {torch.bfloat16}


def save_to(path, **form):
    save(path, **form)
    return path


def test_half_precision_files_load(tmp_path):
    """fp16 files, as older checkpoints are, read as something else."""
    save(tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.update({name: x.half() for name, x in tensors.items()}))
    loaded = Transformer.from_pretrained(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.float16}
    assert {p.dtype for p in Transformer.from_pretrained(tmp_path, dtype=torch.float32).parameters()} == {torch.float32}


def test_a_model_with_a_memory_does_not_call_itself_olmo2(tmp_path):
    """Another program that loads it as OLMo 2 would drop the gates without a word."""
    for form in FORMS:
        save(tmp_path / form, **FORMS[form])
        kind = json.loads((tmp_path / form / "config.json").read_text())["model_type"]
        assert kind == ("nanorat" if form in ("memory", "gqa memory", "ratplus") else "olmo2"), form


def test_both_forms_of_an_olmo2_config_are_read(tmp_path):
    """rope_theta stands at the top in transformers 4, inside rope_parameters in 5: the default is wrong for both."""
    model = save(tmp_path, rope_theta=1234.0, eos_id=3)
    assert_same(Transformer.from_pretrained(tmp_path), model)
    edit_config(tmp_path, rope_theta=None, rope_parameters={"rope_type": "default", "rope_theta": 1234.0})
    assert_same(Transformer.from_pretrained(tmp_path), model)
    edit_config(tmp_path, rope_theta=1234.0, rope_parameters=None, rope_scaling=None, num_key_value_heads=None, eos_token_id=[3, 4])
    assert_same(Transformer.from_pretrained(tmp_path), model)


def test_tied_files_may_hold_the_head_as_well(tmp_path):
    """transformers' files of tied models sometimes repeat the embedding as lm_head."""
    model = save(tmp_path, tied=True)
    edit_tensors(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    assert_same(Transformer.from_pretrained(tmp_path), model)


def test_the_newest_checkpoint_of_a_run_is_read(tmp_path):
    """The first checkpoint of a run taken for the last, or one that was still being written."""
    for step in 100, 200, 1000:
        tiny(seed=step).save_pretrained(tmp_path / f"step_{step:07d}")
    (tmp_path / "step_0002000").mkdir()  # no config yet: it is written last
    assert_same(Transformer.from_pretrained(tmp_path), tiny(seed=1000))


def test_loaded_model_is_independent_of_its_file(tmp_path):
    """Weights that stay mapped: training them, or saving over the file, would change or crash the other."""
    model = save(tmp_path)
    loaded = Transformer.from_pretrained(tmp_path)
    with torch.no_grad():
        loaded.norm.weight.add_(1)
    assert_same(Transformer.from_pretrained(tmp_path), model)
    kept = loaded.embed_tokens.weight.clone()
    loaded.save_pretrained(tmp_path)
    with open(tmp_path / "model.safetensors", "r+b") as file:
        file.seek(-5000, os.SEEK_END)
        file.write(bytes(5000))
    assert torch.equal(loaded.embed_tokens.weight, kept)


MEASURE = """
import resource, sys, threading, time
sys.path.insert(0, sys.argv[1])
import torch
from model import Config, Transformer
with torch.device("meta"):
    Transformer(Config(n_layer=1))  # what torch imports for this is no part of the measurement
def anonymous():  # MiB held by this process itself; pages of a mapped file can go at any time, and are not counted
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) / 1024
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


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured through Linux's /proc")
def test_loading_takes_little_more_memory_than_the_model(tmp_path):
    """A file read whole before it is copied: a 64 GB model would need 128."""
    save(tmp_path, width=512, n_head=8, n_kv_head=8, mlp_width=1536, n_layer=6, vocab_size=8000, memory=True)
    root = Path(weights.__file__).parent.parent
    result = subprocess.run([sys.executable, "-c", MEASURE, str(root), str(tmp_path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    grown, size = map(float, result.stdout.split())
    assert size > 100 and size * 0.9 < grown < size * 1.15 + 20, f"a model of {size:.0f} MiB took {grown:.0f}"


# ---------------------------------------------------------------- damaged files

def test_a_flipped_bit_is_found(tmp_path):
    """A weight damaged on disk or in transit, which shows as a slightly worse score."""
    save(tmp_path, memory=True)
    file = tmp_path / "model.safetensors"
    whole = bytearray(file.read_bytes())
    for place in len(whole) - 1, len(whole) // 2:
        damaged = whole.copy()
        damaged[place] ^= 1
        file.write_bytes(damaged)
        refused(tmp_path, file, "hash", "restore")
    file.write_bytes(whole)
    Transformer.from_pretrained(tmp_path)


def test_what_is_not_hashed_is_opened_and_hashed_when_it_is_loaded(tmp_path):
    """A shortcut for those who read no tensor yet, by which a damaged one is loaded in the end."""
    save(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    weights.read(tmp_path, hashed=False)
    refused(tmp_path, file, "hash", "restore")
    file.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="damaged or incomplete"):
        weights.read(tmp_path, hashed=False)


def test_content_hash_tells_names_shapes_and_types_apart():
    """A hash of bytes alone: swapped or reshaped tensors have the same."""
    x = torch.arange(6, dtype=torch.float32)
    same = [{"a": x, "b": x + 1}, {"b": x + 1, "a": x.clone()}]
    other = [{"a": x + 1, "b": x}, {"a": x.view(2, 3), "b": x + 1}, {"a": x.view(torch.int32), "b": x + 1}, {"a": x}]
    assert len({weights.content_hash(tensors) for tensors in same}) == 1
    assert len({weights.content_hash(tensors) for tensors in same + other}) == 1 + len(other)


@pytest.mark.parametrize("left", [0, 4, 500, -1])
def test_a_truncated_file_is_refused(left, tmp_path):
    """A download that broke off."""
    save(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:left])
    refused(tmp_path, file, "damaged or incomplete", "fetch it again")


def test_missing_files_are_named(tmp_path, monkeypatch):
    """An incomplete download that loads in part, or a wrong path."""
    monkeypatch.setattr(weights, "SHARD_BYTES", 20000)
    save(tmp_path)
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    refused(tmp_path, shard, "fetch", error=FileNotFoundError)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    refused(tmp_path, "index", "fetch it again")
    for file in tmp_path.glob("model*"):
        file.unlink()
    refused(tmp_path, "no model.safetensors", "rename", error=FileNotFoundError)
    (tmp_path / "config.json").unlink()
    refused(tmp_path, tmp_path / "config.json", "missing", error=FileNotFoundError)
    refused(tmp_path / "nowhere", "does not exist", error=FileNotFoundError)
    (tmp_path / "model.bin").write_bytes(b"x")
    refused(tmp_path / "model.bin", "neither", ".pth")


@pytest.mark.parametrize("changes, words", [
    (dict(model_type="llama"), ["'llama'", "olmo2"]),
    (dict(model_type=None), ["None"]),
    (dict(num_hidden_layers=None), ["num_hidden_layers"]),
    (dict(rope_theta=None), ["rope_theta"]),
    (dict(rms_norm_eps=None), ["rms_norm_eps"]),
    (dict(hidden_act="gelu"), ["hidden_act", "'gelu'"]),
    (dict(attention_bias=True), ["attention_bias"]),
    (dict(rope_scaling={"rope_type": "linear", "factor": 2.0}), ["'linear'"]),
    (dict(rope_scaling={"type": "linear", "factor": 2.0}), ["'linear'"]),
    (dict(num_hidden_layers=3), ["3 layers", "2"]),
    (dict(num_hidden_layers=1), ["1 layers", "2"]),
    (dict(hidden_size=64), ["64", "32"]),
    (dict(intermediate_size=40), ["mlp", "48", "40"]),
    (dict(vocab_size=62), ["embed_tokens", "61", "62"]),
    (dict(num_key_value_heads=2), ["16", "32"]),
    (dict(num_attention_heads=5), ["n_head=5"]),
    (dict(num_hidden_layers="two"), ["config"]),
], ids=str)
def test_a_config_that_does_not_fit_is_refused(changes, words, tmp_path):
    """A model of another architecture or size, loaded as far as shapes happen to agree."""
    save(tmp_path)
    edit_config(tmp_path, hidden_act="silu")
    Transformer.from_pretrained(tmp_path)  # an edited config is no error in itself
    edit_config(tmp_path, **changes)
    refused(tmp_path, *words)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '"olmo2"'])
def test_a_config_that_is_no_config_is_refused(text, tmp_path):
    """An error page saved as config.json."""
    save(tmp_path)
    (tmp_path / "config.json").write_text(text)
    refused(tmp_path, "config.json")


@pytest.mark.parametrize("changes", [dict(foo=1), dict(n_layer="4"), dict(width=None, n_head=None)], ids=str)
def test_our_own_config_is_checked_too(changes, tmp_path):
    """A field from a fork or a typing error: a traceback, or a default in its place."""
    save(tmp_path, memory=True)
    edit_config(tmp_path, **changes)
    refused(tmp_path, "config")


def rename(old, new):
    return lambda tensors: tensors.update({new: tensors.pop(old)})


@pytest.mark.parametrize("change, words", {
    "missing": (lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"), ["lacks", "layers.1.mlp.up_proj.weight"]),
    "foreign": (lambda tensors: tensors.update(extra=torch.zeros(3)), ["has", "extra"]),
    "renamed": (rename("model.norm.weight", "model.final.weight"), ["lacks", "norm.weight", "1 more"]),
    "transposed": (lambda t: t.update({"model.layers.0.mlp.up_proj.weight": t["model.layers.0.mlp.up_proj.weight"].T.contiguous()}),
                   ["layers.0.mlp.up_proj.weight", "(32, 48)", "(48, 32)"]),
    "head missing": (lambda tensors: tensors.pop("lm_head.weight"), ["lacks", "lm_head.weight"]),
    "gate of a memory": (lambda t: t.update({"model.layers.0.self_attn.memory_proj.weight": torch.zeros(32, 32)}), ["memory_proj"]),
}.items(), ids=lambda value: value if isinstance(value, str) else "")
def test_tensors_that_do_not_fit_are_refused(change, words, tmp_path):
    """A tensor left at random, or one dropped: a memory lost without a word."""
    save(tmp_path)
    edit_tensors(tmp_path, words[0])
    refused(tmp_path, *words[1])


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + 64 * "0" + "\nsize 123456\n"


@pytest.mark.parametrize("name", ["config.json", "model-00001-of-*.safetensors", "model.safetensors.index.json", "last.pth"])
def test_what_git_lfs_left_is_told_as_such(name, tmp_path, monkeypatch):
    """A clone without git-lfs: "fetch it again", by which one does the same again."""
    monkeypatch.setattr(weights, "SHARD_BYTES", 20000)
    save(tmp_path)
    edit_config(tmp_path)
    (tmp_path / "last.pth").touch()
    file = next(tmp_path.glob(name))
    file.write_text(POINTER)
    refused(file if name == "last.pth" else tmp_path, file, "git-lfs", "git lfs pull")


def test_of_several_ends_of_text_one_is_kept_and_it_is_said(tmp_path, capsys):
    """The others dropped without a word."""
    save(tmp_path, eos_id=3)
    edit_config(tmp_path, eos_token_id=[3, 4])
    assert Transformer.from_pretrained(tmp_path).config.eos_id == 3
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "eos_token_id=[3, 4]" in said and str(tmp_path / "config.json") in said
    edit_config(tmp_path, eos_token_id=[3])
    assert Transformer.from_pretrained(tmp_path).config.eos_id == 3 and not capsys.readouterr().err


# ---------------------------------------------------------------- RAT+ files

def test_a_pickle_runs_no_code(tmp_path):
    """A .pth from the internet that deletes one's home."""
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {ran}",)

    file = tmp_path / "evil.pth"
    torch.save({"task": {"embedding.wte.weight": torch.zeros(4, 4)}, "config": Evil()}, file)
    refused(file)
    assert not ran.exists()
    torch.load(file, weights_only=False)
    assert ran.exists(), "the file would not have run anything: the test is void"


@pytest.mark.parametrize("content", [b"", b"no pickle at all", b"PK\x03\x04 half a zip"], ids=["empty", "text", "zip"])
def test_a_damaged_pth_is_refused(content, tmp_path):
    """A traceback of the unpickler's."""
    file = tmp_path / "last.pth"
    file.write_bytes(content)
    refused(file, "fetch it again")


@pytest.mark.parametrize("what", ["no task", "list", "other model", "head differs", "tensor missing", "tensor foreign", "no heads"])
def test_a_pth_that_is_no_ratplus_is_refused(what, ratplus, tmp_path, monkeypatch):
    """Another project's .pth, or a RAT+ of another form, loaded as far as it goes."""
    state, file = official_names(ratplus), tmp_path / "last.pth"
    if what == "no task":
        torch.save({"model": state}, file)
    elif what == "list":
        torch.save([1, 2], file)
    else:
        if what == "other model":
            state = {"wte.weight": torch.zeros(4, 4)}
        elif what == "head differs":
            state["head.lm_head.weight"] = state["head.lm_head.weight"] + 1
        elif what == "tensor missing":
            del state["backbone.layers.1.hidden_layer.fc2.weight"]
        elif what == "tensor foreign":
            state["backbone.layers.1.hidden_layer.bias"] = torch.zeros(3)
        save_pth(file, state, monkeypatch, n_head=None if what == "no heads" else 4)  # of 128: its width is 64
    refused(file)


def test_ratplus_saves_and_loads_as_a_directory(ratplus, tmp_path, monkeypatch):
    """A conversion that is right in memory and wrong on disk."""
    model = Transformer.from_pretrained(save_pth(tmp_path / "last.pth", official_names(ratplus), monkeypatch, n_head=4))
    expected = RATPLUS_FORM | {"memory": "decay"}
    assert {key: getattr(model.config, key) for key in expected} == expected
    model.save_pretrained(tmp_path / "ours")
    loaded = Transformer.from_pretrained(tmp_path / "ours")
    assert_same(loaded, model)
    loaded_again = Transformer.from_pretrained(tmp_path / "last.pth", dtype=torch.bfloat16)
    assert {p.dtype for p in loaded_again.parameters()} == {torch.bfloat16}


# ---------------------------------------------------------------- failed saves

@pytest.mark.parametrize("shard_bytes", [10**9, 20000])
@pytest.mark.parametrize("fail_at", [1, 3])
def test_a_failed_save_leaves_what_was_there(shard_bytes, fail_at, tmp_path, monkeypatch):
    """A full disk that costs the previous checkpoint too, or leaves half of each: shards of two models in one folder."""
    monkeypatch.setattr(weights, "SHARD_BYTES", shard_bytes)
    before = save(tmp_path)
    files, calls = contents(tmp_path), []

    def full_disk(tensors, file, **settings):
        calls.append(file)
        save_file(tensors, file, **settings)
        if len(calls) >= min(fail_at, len(list(tmp_path.glob("model*.safetensors")))):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "save_file", full_disk)
    with pytest.raises(OSError) as raised:
        tiny(seed=1).save_pretrained(tmp_path)
    one_line(raised, tmp_path, "unchanged", "No space left")
    assert calls and contents(tmp_path) == files
    assert_same(Transformer.from_pretrained(tmp_path), before)


def test_a_failed_rename_leaves_what_was_there(tmp_path, monkeypatch):
    """A temporary file left behind by each failed save."""
    before = save(tmp_path)
    files = contents(tmp_path)

    def fail(source, target):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError) as raised:
        tiny(seed=1).save_pretrained(tmp_path)
    one_line(raised, tmp_path, "Input/output error")
    monkeypatch.undo()
    assert contents(tmp_path) == files
    assert_same(Transformer.from_pretrained(tmp_path), before)


def test_the_same_tensors_are_the_same_bytes(tmp_path):
    """Files of a run and of its repetition that differ, though no weight does."""
    shard, places = {"a": torch.arange(6.0).view(2, 3), "é": torch.ones(3)}, {"a": (0, 0), "é": (2,)}
    for where in None, places:
        found = set()
        for n in range(16):
            weights.save_shard(shard, tmp_path / f"{n}.safetensors", where)
            found.add((tmp_path / f"{n}.safetensors").read_bytes())
            assert weights.checked(tmp_path / f"{n}.safetensors", "fetch it again")
        assert len(found) == 1
