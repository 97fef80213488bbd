"""
checkpoint.py: what is written is read, by any number of processes, or is refused; a failure leaves what was there.
"""
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from infra import checkpoint
from infra import parallel
import train
from infra import weights
from conftest import one_line, tiny
from model import Transformer

HERE = Path(__file__).parent
ARGS = SimpleNamespace(lr=1e-3, memory_lr=1e-2, weight_decay=0.1)
BYTES = SimpleNamespace(name="bytes", files={})  # a tokenizer without files


def made(seed=0):
    """A model and an optimizer that has taken steps."""
    model = tiny(seed, memory=True)
    optimizer = train.make_optimizer(model, ARGS)
    for _ in range(2):
        model.loss(torch.randint(61, (2, 9)), torch.ones(2, 9)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def save(run, model, optimizer, *steps):
    with checkpoint.Saver(run, parallel.Processes(), BYTES) as saver:
        for step in steps:
            saver.save(model, optimizer, {"step": step})


def assert_same(a, b):
    a, b = checkpoint.state_of(*a), checkpoint.state_of(*b)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_what_is_saved_is_loaded_and_only_two_are_kept(tmp_path):
    """A moment left out; a disk that fills up over days."""
    run, ours, other = tmp_path / "run", made(), made(seed=1)
    (run / ".step_0000007.tmp").mkdir(parents=True)  # killed while it wrote
    save(run, *ours, 1, 2, 3)
    assert sorted(path.name for path in run.iterdir()) == ["step_0000002", "step_0000003"]
    assert {path.name for path in (run / "step_0000003").iterdir()} == {"config.json", "train.json", "model.safetensors", "optimizer.safetensors"}
    checkpoint.load(run / "step_0000003", *other, parallel.Processes())
    assert_same(ours, other)
    assert torch.equal(Transformer.from_pretrained(run).lm_head.weight, ours[0].lm_head.weight)


def test_copies_and_halves_of_checkpoints_are_none(tmp_path):
    """A user's copy that is taken for the newest, or deleted as the oldest; a half one in whose way the next cannot be saved."""
    ours = made()
    save(tmp_path, *ours, 1, 2)
    for name in "step_0000009.bak", "step_old":
        shutil.copytree(tmp_path / "step_0000001", tmp_path / name)
    (tmp_path / "step_0000003").mkdir()
    (tmp_path / "step_0000003" / "model.safetensors").touch()
    assert weights.resolve(tmp_path).name == "step_0000002"
    save(tmp_path, *ours, 3, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_0000003", "step_0000003.1", "step_0000004", "step_0000009.bak", "step_old"]


def test_what_is_saved_is_the_state_at_the_call(tmp_path):
    """A checkpoint of two moments in one, as training goes on while it is written."""
    run, (model, optimizer) = tmp_path / "run", made()
    before = {name: tensor.clone() for name, tensor in checkpoint.state_of(model, optimizer).items()}
    with checkpoint.Saver(run, parallel.Processes(), BYTES) as saver:
        saver.save(model, optimizer, {"step": 1})
        with torch.no_grad():
            for tensor in checkpoint.state_of(model, optimizer).values():
                tensor.fill_(7)
    checkpoint.load(run / "step_0000001", model, optimizer, parallel.Processes())
    for name, tensor in checkpoint.state_of(model, optimizer).items():
        assert torch.equal(tensor, before[name]), name


TWO = """
import os, sys
sys.path[:0] = {paths}
import torch, torch.distributed as dist
torch.set_num_threads(1)
import train
from infra import checkpoint, parallel, weights
from dataclasses import replace
from model import Transformer
from pathlib import Path
from test_checkpoint import ARGS, BYTES, made
source, to = map(Path, sys.argv[1:])
with parallel.join("cpu") as us:
    from model import Config
    settings, tensors = weights.read(source)
    with torch.device("meta"):
        model = Transformer(Config(**settings))
    parallel.spread(model, us)
    model.to_empty(device="cpu")
    optimizer = train.make_optimizer(model, ARGS)
    checkpoint.load(source, model, optimizer, us)
    with checkpoint.Saver(to, us, BYTES) as saver:
        saver.save(model, optimizer, {{"step": 5}})
"""


def on_two(tmp_path, source, to):
    script = tmp_path / "two.py"
    script.write_text(TWO.format(paths=[str(HERE.parent), str(HERE)]))
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script), str(source), str(to)],
                          capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_one_writes_two_read_and_write_one_reads(tmp_path):
    """Rows in the wrong order or of the wrong process; uneven ones, as 61 tokens on two; a moment of a scalar."""
    ours, other = made(), made(seed=1)
    save(tmp_path / "one", *ours, 5)
    result = on_two(tmp_path, tmp_path / "one" / "step_0000005", tmp_path / "two")
    folder = tmp_path / "two" / "step_0000005"
    assert folder.exists(), result.stderr[-3000:]
    files = {path.name for path in folder.glob("*.safetensors")}
    assert files == {f"{kind}-0000{n}-of-00002.safetensors" for kind in ("model", "optimizer") for n in (1, 2)}
    with safe_open(folder / "model-00002-of-00002.safetensors", "pt") as mapped:  # half of it, not all of it twice
        assert mapped.get_slice("lm_head.weight").get_shape() == [30, 32] and "sha256" in mapped.metadata()
    checkpoint.load(folder, *other, parallel.Processes())
    assert_same(ours, other)
    joined = Transformer.from_pretrained(folder)
    for (name, a), b in zip(ours[0].state_dict().items(), joined.state_dict().values(), strict=True):
        assert torch.equal(a, b), name

    # and it is exported, by the command of README.md
    command = [sys.executable, "-m", "experiments.export", str(tmp_path / "two"), str(tmp_path / "plain"), "--dtype=bfloat16"]
    assert "is now" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert torch.equal(Transformer.from_pretrained(tmp_path / "plain").lm_head.weight, ours[0].lm_head.weight.bfloat16())
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 2 and "exists" in again.stderr and again.stderr.count("\n") == 1

    # a part that is missing or damaged is named
    part = folder / "model-00001-of-00002.safetensors"
    content = bytearray(part.read_bytes())
    content[-5] ^= 1
    part.write_bytes(content)
    for load in lambda: Transformer.from_pretrained(folder), lambda: checkpoint.load(folder, *other, parallel.Processes()):
        with pytest.raises(ValueError) as raised:
            load()
        one_line(raised, part, "damaged")
    part.unlink()
    for load in lambda: Transformer.from_pretrained(folder), lambda: checkpoint.load(folder, *other, parallel.Processes()):
        with pytest.raises(FileNotFoundError) as raised:
            load()
        one_line(raised, part, "missing")


@pytest.mark.parametrize("missing", ["model", "optimizer"])
def test_a_checkpoint_without_weights_or_moments_is_refused(missing, tmp_path):
    """A run that goes on with fresh moments, and tells nobody."""
    ours = made()
    save(tmp_path, *ours, 1)
    (tmp_path / "step_0000001" / f"{missing}.safetensors").unlink()
    with pytest.raises(FileNotFoundError) as raised:
        checkpoint.load(tmp_path / "step_0000001", *ours, parallel.Processes())
    one_line(raised, f"{missing}.safetensors is missing")


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    ours = made()
    save(tmp_path, *ours, 1)
    other = tiny(memory=True, width=64)
    with pytest.raises(ValueError) as raised:
        checkpoint.load(tmp_path / "step_0000001", other, train.make_optimizer(other, ARGS), parallel.Processes())
    one_line(raised, "step_0000001", "another model")


def test_a_full_disk_is_told_at_the_next_call_and_leaves_what_was_there(tmp_path, monkeypatch):
    """An error in a thread that nobody hears; a half checkpoint under its final name."""
    ours, original = made(), weights.save_file
    save(tmp_path, *ours, 1)
    monkeypatch.setattr(weights, "save_file", lambda tensors, file, **more: (_ for _ in ()).throw(OSError(28, "No space left on device"))
                        if "optimizer" in str(file) else original(tensors, file, **more))
    saver = checkpoint.Saver(tmp_path, parallel.Processes(), BYTES)
    saver.save(*ours, {"step": 2})
    with pytest.raises(OSError) as raised:
        saver.wait()
    one_line(raised, "step_0000002", "No space left on device", "--resume")
    assert [path.name for path in tmp_path.iterdir()] == ["step_0000001"]
    monkeypatch.undo()
    saver.save(*ours, {"step": 3})
    saver.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_0000001", "step_0000003"]
