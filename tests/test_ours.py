"""
What is not ours stays: saving, exporting and training write over, move or delete what we wrote,
known by its name and its mark, and nothing else. A save that fails, or is killed, is in nobody's
way.
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

from conftest import refused, tiny
from infra import checkpoint, parallel, weights
from model import Transformer
from on_disk import INDEX, ONE, contents, foreign, save, tensors
from test_checkpoint import made
from test_checkpoint import save as save_checkpoint
from test_faults import needs_mounts, on_a_disk

ROOT = Path(__file__).parent.parent
STRANGERS = [
    "model_best.safetensors", "model-before-sft.safetensors", "model.safetensors.bak",
    "model.safetensors.sha256", "model-1-of-2.safetensors", "modeling.safetensors",
    "adapter_model.safetensors", "model.fp16.safetensors", "pytorch_model.bin", f"{INDEX}.old",
    "notes.txt", "optimizer.safetensors", "generation_config.json", ".model.safetensors"]


def sharded(folder, monkeypatch, seed=0):
    with monkeypatch.context() as patch:
        patch.setattr(weights, "SHARD_BYTES", 20000)
        save(folder, seed)


def test_saving_leaves_files_of_other_names(tmp_path, monkeypatch):
    """A month's best weights, gone because their name begins like ours."""
    sharded(tmp_path, monkeypatch)
    for name in STRANGERS:
        (tmp_path / name).write_bytes(b"mine")
    (tmp_path / "model.safetensors.d").mkdir()
    for some in (lambda: save(tmp_path, 1), lambda: sharded(tmp_path, monkeypatch, 2),
                 lambda: save(tmp_path, 3)):
        some()
        assert all((tmp_path / name).read_bytes() == b"mine" for name in STRANGERS)
    assert set(contents(tmp_path)) == {*STRANGERS, "config.json", ONE}
    assert torch.equal(Transformer.from_pretrained(tmp_path).norm.weight, tiny(3).norm.weight)


def written(name, text):
    """A change to a folder: this file is written."""
    def change(folder):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return change


def edited(folder):
    file = folder / "config.json"
    file.write_text(file.read_text().replace("10000.0", "5.0"))


def anothers(n_files):
    """A model of somebody else's takes the place of ours."""
    return lambda folder: (shutil.rmtree(folder), foreign(folder, n_files))


def rewritten(folder):
    tensors(folder, lambda found: None, next(folder.glob("model*.safetensors")).name)


NINTH = "model-00001-of-00009.safetensors"
IN_THE_WAY = {  # of one file, and of shards
    "another's model": anothers(1),
    "another's shards": anothers(3),
    "another's config": written("config.json", '{"model_type": "bert"}'),
    "a config that was edited": edited,
    "a config that is no JSON": written("config.json", "my notes"),
    "weights under our name": rewritten,
    "a shard more": written(NINTH, "half of a download"),
    "an index": written(INDEX, '{"weight_map": {"a": "theirs.safetensors"}}'),
    "an index that is none": written(INDEX, "[]"),
    "a link to another's": lambda folder: (folder / NINTH).symlink_to("gone"),
}


@pytest.mark.parametrize("ours", ["one file", "shards"])
@pytest.mark.parametrize("what", IN_THE_WAY)
def test_saving_over_what_is_not_ours_is_refused(what, ours, tmp_path, monkeypatch):
    """A downloaded model of 60 GB, or a config edited by hand, that a save replaces."""
    folder = tmp_path / "model"
    sharded(folder, monkeypatch) if ours == "shards" else save(folder)
    IN_THE_WAY[what](folder)
    before = contents(folder)
    refused(lambda: save(folder, 1), folder, "in the way", "another folder")
    assert contents(folder) == before


def test_our_own_damaged_model_makes_way(tmp_path, monkeypatch):
    """A folder in which a save was cut short by a power cut, and that then takes no other."""
    sharded(tmp_path, monkeypatch)
    for file in sorted(tmp_path.glob("*.safetensors"))[:2]:
        file.write_bytes(file.read_bytes()[:100])
    save(tmp_path, 1)
    assert set(contents(tmp_path)) == {"config.json", ONE}


def mine(folder, file="mine.json"):
    """A tokenizer of one file."""
    (folder / file).write_text("mine")
    return SimpleNamespace(name="bpe-9-abc", files={"tokenizer.json": folder / file})


def test_another_tokenizer_in_the_way_is_left(tmp_path):
    """A tokenizer replaced by the one that a model was saved with."""
    tokenizer, model = mine(tmp_path), tiny(memory=True)
    (tmp_path / "tokenizer.json").write_text("other")
    to = lambda folder: weights.write(folder, model.config, model.state_dict(), tokenizer)
    refused(lambda: to(tmp_path), tmp_path / "tokenizer.json", "in the way")
    assert contents(tmp_path) == {"tokenizer.json": b"other", "mine.json": b"mine"}
    for _ in range(2):  # the second time the same is there already
        to(tmp_path / "new")
        found = contents(tmp_path / "new")
        assert found.keys() == {"config.json", ONE, "tokenizer.json"}
        assert found["tokenizer.json"] == b"mine"
    assert json.loads(found["config.json"])["tokenizer"] == "bpe-9-abc"
    assert Transformer.from_pretrained(tmp_path / "new").config == model.config


# ---------------------------------------------------------------- checkpoints of a run

FIRST = "step_0000001"


def elsewhere(run):
    """A checkpoint moved to another disk, a link in its place."""
    shutil.move(run / FIRST, run.parent / "disk")
    (run / FIRST).symlink_to(run.parent / "disk")


def in_place_of_ours(change):
    return lambda run: (change(run), shutil.rmtree(run / FIRST))


def copies(run):
    for name in "step_0000500_best", f"{FIRST}.bak", ".step_mine.tmp", "best":
        shutil.copytree(run / FIRST, run / name)


USERS = {
    "notes": written(f"{FIRST}/notes.txt", "lr was wrong here"),
    "a link": elsewhere,
    "an edited config": lambda run: edited(run / FIRST),
    "copies": in_place_of_ours(copies),
    "in what a kill had left": in_place_of_ours(written(".step_0000009.tmp/why.txt", "?")),
    "under the next name": in_place_of_ours(written("step_0000004/samples.txt", "texts")),
    "a model": lambda run: anothers(1)(run / FIRST),
}


@pytest.mark.parametrize("what", USERS)
def test_a_run_deletes_no_file_of_the_users(what, tmp_path):
    """Notes in a checkpoint, or a copy of it, deleted with the oldest; a save that fails for it."""
    run, ours = tmp_path / "run", made()
    save_checkpoint(run, *ours, 1)
    USERS[what](run)
    before = contents(tmp_path)
    for step in 2, 3, 4, 5:
        save_checkpoint(run, *ours, step)
    now = contents(tmp_path)
    kept = [content for name, content in now.items()
            if name.replace("step_0000004.1/", "step_0000004/") in before]
    assert sorted(kept, key=repr) == sorted(before.values(), key=repr)
    last = [folder.name for folder in weights.checkpoints(run)][-2:]
    assert last == ["step_0000004", "step_0000005"]
    assert not [name for name in now
                if "step_0000002" in name or "step_0000003" in name or name.endswith(".tmp")]


def test_what_a_kill_left_is_taken_away(tmp_path):
    """Gigabytes under a hidden name after each kill."""
    run, ours = tmp_path / "run", made()
    save_checkpoint(run, *ours, 1)
    shutil.copytree(run / FIRST, run / ".step_0000002.tmp")
    (run / ".step_0000002.tmp" / "config.json").unlink()
    (run / ".step_0000002.tmp" / ".tmpCcJyfz").write_bytes(b"half")  # safetensors' own, from 0.8 on
    shutil.copytree(run / FIRST, run / ".step_0000003.old.tmp")
    save_checkpoint(run, *ours)
    assert [path.name for path in run.iterdir()] == [FIRST]


def test_the_tokenizer_goes_along_though_its_first_place_is_gone(tmp_path):
    """A run has its tokenizer from its first checkpoint, which is deleted in the end."""
    run, ours = tmp_path / "run", made()
    for steps in (1,), (2, 3, 4, 5):
        tokenizer = mine(tmp_path) if steps == (1,) else mine(run / FIRST, "tokenizer.json")
        with checkpoint.Saver(run, parallel.Processes(), tokenizer) as saver:
            for step in steps:
                saver.save(*ours, {"step": step})
    for step in 4, 5:
        found = contents(run / f"step_000000{step}")
        assert found["tokenizer.json"] == b"mine" and len(found) == 5
        assert json.loads(found["config.json"])["tokenizer"] == "bpe-9-abc"
    assert len(list(run.iterdir())) == 2


# ---------------------------------------------------------------- python -m experiments.export

def test_an_export_after_a_full_disk_goes_through(tmp_path, monkeypatch):
    """What the first attempt left, by which the second is refused: "exists"; half a model."""
    model, to = save(tmp_path / "model", memory=True), tmp_path / "to"

    def full(*_, **__):
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(weights, "save_file", full)
        model.save_pretrained(to)
    assert not contents(to)
    (to / ".model.safetensors.tmp").write_bytes(b"killed")  # with kill -9
    save(tmp_path / "other", 1)
    shutil.copy(tmp_path / "other" / ONE, to)  # or while all were renamed, config.json the last
    (to / "notes.txt").write_text("mine")

    def export():
        return subprocess.run(
            [sys.executable, "-m", "experiments.export", str(tmp_path / "model"), str(to)],
            capture_output=True, text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    result = export()
    assert result.returncode == 0, result.stderr
    before = contents(to)
    assert before.keys() == {"config.json", ONE, "notes.txt"}
    assert torch.equal(Transformer.from_pretrained(to).norm.weight, model.norm.weight)
    again = export()
    assert again.returncode == 2 and "exists" in again.stderr and again.stderr.count("\n") == 1
    assert contents(to) == before


@needs_mounts
def test_an_export_goes_through_once_there_is_room(tmp_path):
    """The same on a disk that is really full."""
    save(tmp_path / "model", memory=True, width=128, vocab_size=1000)
    export = f"{sys.executable} -m experiments.export model out/to"
    result = on_a_disk(tmp_path, f"""
        mkdir out; mount -t tmpfs -o size=200k none out
        {export}; echo "status $?" >&2
        ls -A out/to; mount -o remount,size=100m out; {export} || exit 1
        cp -r out/to kept""")
    assert result.returncode == 0 and result.stderr.count("\n") == 2, result
    assert "status 2\n" in result.stderr and "space" in result.stderr, result
    assert set(contents(tmp_path / "kept")) == {"config.json", ONE}
