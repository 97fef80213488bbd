"""
checkpoint.py: what is written is read, by any number of processes, or is refused; a failure leaves
what was there.
"""
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

import train
from conftest import one_line, tiny
from experiments import export
from infra import checkpoint, parallel, weights
from model import Transformer
from ranks import on_two

ARGS = SimpleNamespace(lr=1e-3, memory_lr=1e-2, weight_decay=0.1, device="cpu", init=None)
BYTES = SimpleNamespace(name="bytes", files={})  # a tokenizer without files
ALONE = parallel.Processes()


def made(seed=0):
    """A model and an optimizer that has taken steps."""
    model = tiny(seed, memory=True)
    optimizer = train.make_optimizer(model, ARGS)
    for _ in range(2):
        model.loss(torch.randint(61, (2, 9)), torch.ones(2, 9)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def save(run, model, optimizer, *steps, processes=ALONE):
    with checkpoint.Saver(run, processes, BYTES) as saver:
        for step in steps:
            saver.save(model, optimizer, {"step": step})


def assert_same(a, b):
    a, b = checkpoint.state_of(*a), checkpoint.state_of(*b)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_is_loaded_and_only_two_are_kept(tmp_path):
    """A moment left out; a disk that fills up over days."""
    run, ours, other = tmp_path / "run", made(), made(seed=1)
    (run / ".step_0000007.tmp").mkdir(parents=True)  # killed while it wrote
    save(run, *ours, 1, 2, 3)
    assert names_in(run) == ["step_0000002", "step_0000003"]
    assert names_in(run / "step_0000003") == ["config.json", "model.safetensors",
                                              "optimizer.safetensors", "train.json"]
    checkpoint.load(run / "step_0000003", *other, ALONE)
    assert_same(ours, other)
    assert torch.equal(Transformer.from_pretrained(run).lm_head.weight, ours[0].lm_head.weight)


def test_copies_and_halves_of_checkpoints_are_none(tmp_path):
    """
    A user's copy that is taken for the newest, or deleted as the oldest; a half one in whose way
    the next cannot be saved.
    """
    ours = made()
    save(tmp_path, *ours, 1, 2)
    for name in "step_0000009.bak", "step_old":
        shutil.copytree(tmp_path / "step_0000001", tmp_path / name)
    (tmp_path / "step_0000003").mkdir()
    (tmp_path / "step_0000003" / "model.safetensors").touch()
    assert weights.resolve(tmp_path).name == "step_0000002"
    save(tmp_path, *ours, 3, 4)
    assert names_in(tmp_path) == ["step_0000003", "step_0000003.1", "step_0000004",
                                  "step_0000009.bak", "step_old"]


def test_what_is_saved_is_the_state_at_the_call(tmp_path):
    """A checkpoint of two moments in one, as training goes on while it is written."""
    ours = made()
    before = {name: tensor.clone() for name, tensor in checkpoint.state_of(*ours).items()}
    with checkpoint.Saver(tmp_path, ALONE, BYTES) as saver:
        saver.save(*ours, {"step": 1})
        with torch.no_grad():
            for tensor in checkpoint.state_of(*ours).values():
                tensor.fill_(7)
    checkpoint.load(tmp_path / "step_0000001", *ours, ALONE)
    for name, tensor in checkpoint.state_of(*ours).items():
        assert torch.equal(tensor, before[name]), name


TWO = """
import sys
from pathlib import Path
import train
from infra import checkpoint, parallel, weights
from model import Config, Transformer
from test_checkpoint import ARGS, save
source, to = map(Path, sys.argv[1:])
with parallel.join("cpu") as us:
    config = Config(**weights.read(source)[0])
    model = parallel.make_model(Transformer, config, None, ARGS, us)
    optimizer = train.make_optimizer(model, ARGS)
    checkpoint.load(source, model, optimizer, us)
    save(to, model, optimizer, 5, processes=us)
"""


def test_one_writes_two_read_and_write_one_reads(tmp_path, monkeypatch, capsys):
    """
    Rows in the wrong order or of the wrong process; uneven ones, as 61 tokens on two; a moment of a
    scalar.
    """
    ours, other = made(), made(seed=1)
    save(tmp_path / "one", *ours, 5)
    folder = tmp_path / "two" / "step_0000005"
    done = on_two(TWO, str(tmp_path / "one" / folder.name), str(tmp_path / "two"), folder=tmp_path)
    assert folder.exists(), done.stderr[-3000:]
    files = {path.name for path in folder.glob("*.safetensors")}
    assert files == {f"{kind}-0000{n}-of-00002.safetensors" for kind in ("model", "optimizer")
                     for n in (1, 2)}
    with safe_open(folder / "model-00002-of-00002.safetensors", "pt") as mapped:
        assert mapped.get_slice("lm_head.weight").get_shape() == [30, 32]  # not all of it twice
        assert "sha256" in mapped.metadata()
    checkpoint.load(folder, *other, ALONE)
    assert_same(ours, other)
    joined = Transformer.from_pretrained(folder).state_dict()
    for name, tensor in ours[0].state_dict().items():
        assert torch.equal(tensor, joined.pop(name)), name
    assert not joined

    # and it is exported
    plain = tmp_path / "plain"
    command = ["export.py", str(tmp_path / "two"), str(plain), "--dtype=bfloat16"]
    monkeypatch.setattr(sys, "argv", command)
    export.main()
    assert f"is now {plain}, bfloat16" in capsys.readouterr().out
    exported = Transformer.from_pretrained(plain).lm_head.weight
    assert torch.equal(exported, ours[0].lm_head.weight.bfloat16())
    with pytest.raises(SystemExit) as end:
        export.main()
    said = capsys.readouterr().err
    assert end.value.code == 2 and "exists" in said and said.count("\n") == 1

    # a part that is damaged or missing is named
    part = folder / "model-00001-of-00002.safetensors"
    content = bytearray(part.read_bytes())
    content[-5] ^= 1
    part.write_bytes(content)
    loads = (lambda: Transformer.from_pretrained(folder),
             lambda: checkpoint.load(folder, *other, ALONE))
    for load in loads:
        with pytest.raises(ValueError) as raised:
            load()
        one_line(raised, part, "damaged")
    part.unlink()
    for load in loads:
        with pytest.raises(FileNotFoundError) as raised:
            load()
        one_line(raised, part, "missing")


def test_a_checkpoint_without_weights_or_moments_or_of_another_model_is_refused(tmp_path):
    """A run that goes on with fresh moments, and tells nobody."""
    ours, other = made(), tiny(memory=True, width=64)
    save(tmp_path, *ours, 1, 2)
    for missing, folder in ("model", "step_0000001"), ("optimizer", "step_0000002"):
        with pytest.raises(ValueError) as raised:
            checkpoint.load(tmp_path / folder, other, train.make_optimizer(other, ARGS), ALONE)
        one_line(raised, folder, "another model")
        (tmp_path / folder / f"{missing}.safetensors").unlink()
        with pytest.raises(FileNotFoundError) as raised:
            checkpoint.load(tmp_path / folder, *ours, ALONE)
        one_line(raised, f"{missing}.safetensors is missing")


def test_a_full_disk_is_told_at_the_next_call_and_leaves_what_was_there(tmp_path, monkeypatch):
    """An error in a thread that nobody hears; a half checkpoint under its final name."""
    ours, original = made(), weights.save_file
    save(tmp_path, *ours, 1)

    def full(tensors, file, **more):
        if "optimizer" in str(file):
            raise OSError(28, "No space left on device")
        original(tensors, file, **more)
    monkeypatch.setattr(weights, "save_file", full)
    saver = checkpoint.Saver(tmp_path, ALONE, BYTES)
    saver.save(*ours, {"step": 2})
    with pytest.raises(OSError) as raised:
        saver.save(*ours, {"step": 3})
    one_line(raised, "step_0000002", "No space left on device", "--resume")
    assert names_in(tmp_path) == ["step_0000001"]
    monkeypatch.undo()
    saver.save(*ours, {"step": 3})
    saver.wait()
    assert names_in(tmp_path) == ["step_0000001", "step_0000003"]
