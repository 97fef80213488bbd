"""
What is not ours stays: saving, exporting and training write over, move or delete what we wrote, known by its name and its mark,
and nothing else. A save that fails, or is killed, is in nobody's way.
"""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from infra import checkpoint
from infra import parallel
from infra import weights
from conftest import one_line, tiny
from model import Transformer
from test_checkpoint import BYTES, made, save
from test_faults import needs_mounts, on_a_disk
from test_hostile import foreign

ROOT = Path(__file__).parent.parent
STRANGERS = ["model_best.safetensors", "model-before-sft.safetensors", "model.safetensors.bak", "model.safetensors.sha256",
             "model-1-of-2.safetensors", "modeling.safetensors", "adapter_model.safetensors", "model.fp16.safetensors", "pytorch_model.bin",
             "model.safetensors.index.json.old", "notes.txt", "optimizer.safetensors", "generation_config.json", ".model.safetensors"]


def contents(folder):
    """{name: content} of all files; a link's is where it points to."""
    return {str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
            for path in folder.rglob("*") if path.is_symlink() or path.is_file()}


def sharded(folder, monkeypatch, seed=0):
    with monkeypatch.context() as patch:
        patch.setattr(weights, "SHARD_BYTES", 20000)
        tiny(seed).save_pretrained(folder)


def test_saving_leaves_files_of_other_names(tmp_path, monkeypatch):
    """A month's best weights, gone because their name begins like ours."""
    sharded(tmp_path, monkeypatch)
    for name in STRANGERS:
        (tmp_path / name).write_bytes(b"mine")
    (tmp_path / "model.safetensors.d").mkdir()
    for save in lambda: tiny(1).save_pretrained(tmp_path), lambda: sharded(tmp_path, monkeypatch, 2), lambda: tiny(3).save_pretrained(tmp_path):
        save()
        assert all((tmp_path / name).read_bytes() == b"mine" for name in STRANGERS)
    assert set(contents(tmp_path)) == {*STRANGERS, "config.json", "model.safetensors"}
    assert torch.equal(Transformer.from_pretrained(tmp_path).norm.weight, tiny(3).norm.weight)


def unmarked(file):
    save_file(load_file(file), file, metadata={"format": "pt"})


IN_THE_WAY = {  # of one file, and of shards
    "another's model": lambda folder: foreign(folder, 1),
    "another's shards": lambda folder: foreign(folder, 3),
    "another's config": lambda folder: (folder / "config.json").write_text('{"model_type": "bert"}'),
    "a config that was edited": lambda folder: (folder / "config.json").write_text((folder / "config.json").read_text().replace("10000.0", "5.0")),
    "a config that is no JSON": lambda folder: (folder / "config.json").write_text("my notes"),
    "weights under our name": lambda folder: unmarked(next(folder.glob("model*.safetensors"))),
    "a shard more": lambda folder: (folder / "model-00003-of-00009.safetensors").write_bytes(b"half of a download"),
    "an index": lambda folder: (folder / weights.INDEX).write_text('{"weight_map": {"a": "theirs.safetensors"}}'),
    "an index that is none": lambda folder: (folder / weights.INDEX).write_text("[]"),
    "a link to another's": lambda folder: next(folder.glob("model*.safetensors")).with_name("model-00001-of-00009.safetensors").symlink_to("gone"),
}


@pytest.mark.parametrize("ours", ["one file", "shards"])
@pytest.mark.parametrize("what", IN_THE_WAY)
def test_saving_over_what_is_not_ours_is_refused(what, ours, tmp_path, monkeypatch):
    """A downloaded model of 60 GB, or a config edited by hand, that a save into its folder replaces."""
    folder = tmp_path / "model"
    sharded(folder, monkeypatch) if ours == "shards" else tiny().save_pretrained(folder)
    if what.startswith("another's m") or what.startswith("another's s"):
        shutil.rmtree(folder)
    IN_THE_WAY[what](folder)
    before = contents(folder)
    with pytest.raises(ValueError) as raised:
        tiny(1).save_pretrained(folder)
    one_line(raised, folder, "in the way", "another folder")
    assert contents(folder) == before


def test_our_own_damaged_model_makes_way(tmp_path, monkeypatch):
    """A folder in which a save was cut short by a power cut, and that then takes no other."""
    sharded(tmp_path, monkeypatch)
    for file in sorted(tmp_path.glob("*.safetensors"))[:2]:
        file.write_bytes(file.read_bytes()[:100])
    tiny(1).save_pretrained(tmp_path)
    assert set(contents(tmp_path)) == {"config.json", "model.safetensors"}


def test_another_tokenizer_in_the_way_is_left(tmp_path):
    """A tokenizer replaced by the one that a model was saved with."""
    (tmp_path / "tokenizer.json").write_text("other")
    (tmp_path / "mine.json").write_text("mine")
    tokenizer = SimpleNamespace(name="bpe-9-abc", files={"tokenizer.json": tmp_path / "mine.json"})
    for file in "config.json", "model.safetensors":
        assert not (tmp_path / file).exists()
    with pytest.raises(ValueError) as raised:
        weights.write(tmp_path, tiny(memory=True).config, tiny(memory=True).state_dict(), tokenizer)
    one_line(raised, tmp_path / "tokenizer.json", "in the way")
    assert contents(tmp_path) == {"tokenizer.json": b"other", "mine.json": b"mine"}
    for _ in range(2):  # the second time the same is there already
        weights.write(tmp_path / "new", tiny(memory=True).config, tiny(memory=True).state_dict(), tokenizer)
        assert set(contents(tmp_path / "new")) == {"config.json", "model.safetensors", "tokenizer.json"}
        assert (tmp_path / "new" / "tokenizer.json").read_text() == "mine"
    assert json.loads((tmp_path / "new" / "config.json").read_text())["tokenizer"] == "bpe-9-abc"
    assert Transformer.from_pretrained(tmp_path / "new").config == tiny(memory=True).config


# ---------------------------------------------------------------- checkpoints of a run

def user_model(run):
    foreign(run / "step_0000001", 1)


def with_notes(run):
    (run / "step_0000001" / "notes.txt").write_text("lr was wrong here")


def elsewhere(run):
    """A checkpoint moved to another disk, a link in its place."""
    shutil.move(run / "step_0000001", run.parent / "disk")
    (run / "step_0000001").symlink_to(run.parent / "disk")


def edited(run):
    file = run / "step_0000001" / "config.json"
    file.write_text(file.read_text().replace("10000.0", "5.0"))


def copies(run):
    for name in "step_0000500_best", "step_0000001.bak", ".step_mine.tmp", "best":
        shutil.copytree(run / "step_0000001", run / name)
    shutil.rmtree(run / "step_0000001")


def in_temporary(run):
    """A user who looked into what a kill had left."""
    (run / ".step_0000009.tmp").mkdir()
    (run / ".step_0000009.tmp" / "why.txt").write_text("?")
    shutil.rmtree(run / "step_0000001")


def under_the_next_name(run):
    (run / "step_0000004").mkdir()
    (run / "step_0000004" / "samples.txt").write_text("texts")
    shutil.rmtree(run / "step_0000001")


USERS = [with_notes, elsewhere, edited, copies, in_temporary, under_the_next_name, user_model]


@pytest.mark.parametrize("put", USERS)
def test_a_run_deletes_no_file_of_the_users(put, tmp_path):
    """Notes in a checkpoint, or a copy under a name of one's own, deleted with the oldest; a save that fails for what it finds."""
    run, ours = tmp_path / "run", made()
    run.mkdir()
    if put is not user_model:
        save(run, *ours, 1)
    put(run)
    before = contents(tmp_path)
    for step in 2, 3, 4, 5:
        save(run, *ours, step)
    now = contents(tmp_path)
    found = {name: content for name, content in now.items() if name.replace("step_0000004.1/", "step_0000004/") in before}
    assert sorted(found.values(), key=repr) == sorted(before.values(), key=repr)
    assert [folder.name for folder in weights.checkpoints(run)][-2:] == ["step_0000004", "step_0000005"]
    assert not [name for name in now if "step_0000002" in name or "step_0000003" in name or name.endswith(".tmp")]


def test_what_a_kill_left_is_taken_away(tmp_path):
    """Gigabytes under a hidden name after each kill."""
    run, ours = tmp_path / "run", made()
    save(run, *ours, 1)
    shutil.copytree(run / "step_0000001", run / ".step_0000002.tmp")
    (run / ".step_0000002.tmp" / "config.json").unlink()
    shutil.copytree(run / "step_0000001", run / ".step_0000003.old.tmp")
    save(run, *ours)
    assert [path.name for path in run.iterdir()] == ["step_0000001"]


def test_the_tokenizer_goes_along_though_its_first_place_is_gone(tmp_path):
    """A run that goes on from a checkpoint has its tokenizer from there, and deletes that checkpoint two later: the third save failed."""
    run, ours = tmp_path / "run", made()
    (tmp_path / "mine.json").write_text("mine")
    tokenizer = SimpleNamespace(name="bpe-9-abc", files={"tokenizer.json": tmp_path / "mine.json"})
    with checkpoint.Saver(run, parallel.Processes(), tokenizer) as saver:
        saver.save(*ours, {"step": 1})
    again = SimpleNamespace(name="bpe-9-abc", files={"tokenizer.json": run / "step_0000001" / "tokenizer.json"})
    with checkpoint.Saver(run, parallel.Processes(), again) as saver:
        for step in 2, 3, 4, 5:
            saver.save(*ours, {"step": step})
    for step in 4, 5:
        folder = run / f"step_000000{step}"
        assert (folder / "tokenizer.json").read_text() == "mine" and len(list(folder.iterdir())) == 5
        assert json.loads((folder / "config.json").read_text())["tokenizer"] == "bpe-9-abc"
    assert len(list(run.iterdir())) == 2


# ---------------------------------------------------------------- python -m experiments.export

def exported(run, to):
    return subprocess.run([sys.executable, "-m", "experiments.export", str(run), str(to)], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_an_export_after_a_full_disk_goes_through(tmp_path, monkeypatch):
    """What the first attempt left, by which the second one is refused: "exists". Nor does the first leave half a model."""
    tiny(memory=True).save_pretrained(tmp_path / "model")
    to = tmp_path / "to"
    with monkeypatch.context() as patch:
        patch.setattr(weights, "save_file", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError):
            tiny(memory=True).save_pretrained(to)
    assert not contents(to)
    (to / ".model.safetensors.tmp").write_bytes(b"killed")  # with kill -9
    tiny(seed=1).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", to)  # or while all were renamed: config.json is the last
    (to / "notes.txt").write_text("mine")
    result = exported(tmp_path / "model", to)
    assert result.returncode == 0, result.stderr
    assert set(contents(to)) == {"config.json", "model.safetensors", "notes.txt"}
    assert torch.equal(Transformer.from_pretrained(to).norm.weight, tiny(memory=True).norm.weight)
    before = contents(to)
    again = exported(tmp_path / "model", to)
    assert again.returncode == 2 and "exists" in again.stderr and again.stderr.count("\n") == 1 and contents(to) == before


@needs_mounts
def test_an_export_goes_through_once_there_is_room(tmp_path):
    """The same on a disk that is really full."""
    tiny(memory=True, width=128, vocab_size=1000).save_pretrained(tmp_path / "model")
    export = f"{sys.executable} -m experiments.export model out/to"
    result = on_a_disk(tmp_path, f"""
        mkdir out; mount -t tmpfs -o size=200k none out
        {export}; echo "status $?" >&2
        ls -A out/to; mount -o remount,size=100m out; {export} || exit 1
        cp -r out/to kept""")
    assert result.returncode == 0 and "status 2\n" in result.stderr and "space" in result.stderr, result
    assert result.stderr.count("\n") == 2 and set(contents(tmp_path / "kept")) == {"config.json", "model.safetensors"}, result
