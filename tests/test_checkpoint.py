"""
checkpoint.py: what is written is read, by any number of processes, or is refused; a failure leaves
what was there.
"""
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors import safe_open

import train
from conftest import refused, tiny
from experiments import export
from infra import checkpoint, parallel, weights
from model import Config, Transformer
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


def assert_loads(folder, state):
    """A model and an optimizer that were others have this state."""
    other = made(seed=1)
    checkpoint.load(folder, *other, ALONE)
    found = checkpoint.state_of(*other)
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(found[name], tensor), name


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_is_the_state_at_the_call_and_two_are_kept_of_ours(tmp_path):
    """A moment left out; two moments in one, as training goes on; a copy that counts as newest."""
    run, ours = tmp_path / "run", made()
    (run / ".step_0000007.tmp").mkdir(parents=True)  # killed while it wrote
    (run / "step_0000003").mkdir()                   # half of one, in the way
    (run / "step_0000003" / "model.safetensors").touch()
    save(run, *ours, 1, 2)
    shutil.copytree(run / "step_0000001", run / "step_0000009.bak")
    assert weights.resolve(run).name == "step_0000002"

    before = {name: tensor.clone() for name, tensor in checkpoint.state_of(*ours).items()}
    with checkpoint.Saver(run, ALONE, BYTES) as saver, torch.no_grad():
        saver.save(*ours, {"step": 3})
        for tensor in checkpoint.state_of(*ours).values():
            tensor.fill_(7)
    assert names_in(run) == ["step_0000002", "step_0000003", "step_0000003.1", "step_0000009.bak"]
    assert names_in(run / "step_0000003") == ["config.json", "model.safetensors",
                                              "optimizer.safetensors", "train.json"]
    assert_loads(run / "step_0000003", before)
    head = Transformer.from_pretrained(run).lm_head.weight
    assert torch.equal(head, before["lm_head.weight"])


def rewrite():
    """As one of two processes: the first of two folders into the second."""
    source, to = map(Path, sys.argv[1:])
    with parallel.join("cpu") as us:
        config = Config(**weights.read(source)[0])
        model = parallel.make_model(Transformer, config, None, ARGS, us)
        optimizer = train.make_optimizer(model, ARGS)
        checkpoint.load(source, model, optimizer, us)
        save(to, model, optimizer, 5, processes=us)


def test_one_writes_two_read_and_write_one_reads(tmp_path, monkeypatch, capsys):
    """Rows in the wrong order; uneven ones, as 61 tokens on two; a moment of a scalar."""
    (model, optimizer), folder = made(), tmp_path / "two" / "step_0000005"
    save(tmp_path / "one", model, optimizer, 5)
    done = on_two(rewrite, str(tmp_path / "one" / folder.name), str(folder.parent), folder=tmp_path)
    assert folder.exists(), done.stderr[-3000:]
    assert [path.name for path in sorted(folder.glob("*.safetensors"))] == [
        f"{kind}-0000{n}-of-00002.safetensors" for kind in ("model", "optimizer") for n in (1, 2)]
    with safe_open(folder / "model-00002-of-00002.safetensors", "pt") as mapped:
        assert mapped.get_slice("lm_head.weight").get_shape() == [30, 32]  # not all of it twice
        assert "sha256" in mapped.metadata()
    assert_loads(folder, checkpoint.state_of(model, optimizer))
    joined = Transformer.from_pretrained(folder).state_dict()
    assert joined.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, joined[name]), name

    # and it is exported
    plain = tmp_path / "plain"
    monkeypatch.setattr(sys, "argv", ["export.py", str(folder.parent), str(plain),
                                      "--dtype=bfloat16"])
    export.main()
    assert f"is now {plain}, bfloat16" in capsys.readouterr().out
    exported = Transformer.from_pretrained(plain).lm_head.weight
    assert torch.equal(exported, model.lm_head.weight.bfloat16())

    # a part that is damaged or missing is named
    part = folder / "model-00001-of-00002.safetensors"
    content = bytearray(part.read_bytes())
    content[-5] ^= 1
    part.write_bytes(content)
    for word, error in ("damaged", ValueError), ("missing", FileNotFoundError):
        refused(lambda: Transformer.from_pretrained(folder), part, word, error=error)
        refused(lambda: checkpoint.load(folder, model, optimizer, ALONE), part, word, error=error)
        part.unlink(missing_ok=True)


def test_a_checkpoint_without_weights_or_moments_or_of_another_model_is_refused(tmp_path):
    """A run that goes on with fresh moments, and tells nobody."""
    ours, other = made(), tiny(memory=True, width=64)
    theirs = other, train.make_optimizer(other, ARGS)
    save(tmp_path, *ours, 1, 2)
    for missing, folder in ("model", "step_0000001"), ("optimizer", "step_0000002"):
        load = lambda who: lambda: checkpoint.load(tmp_path / folder, *who, ALONE)
        refused(load(theirs), folder, "another model")
        (tmp_path / folder / f"{missing}.safetensors").unlink()
        refused(load(ours), f"{missing}.safetensors is missing", error=FileNotFoundError)


def test_a_full_disk_is_told_at_the_next_call_or_the_end_and_leaves_what_was_there(tmp_path,
                                                                                  monkeypatch):
    """An error in a thread that nobody hears; a half checkpoint under its final name."""
    ours, original = made(), weights.save_file
    save(tmp_path, *ours, 1)

    def full(tensors, file, **more):
        if "optimizer" in str(file):
            raise OSError(28, "No space left on device")
        original(tensors, file, **more)
    with monkeypatch.context() as patch:
        patch.setattr(weights, "save_file", full)
        for steps in (2,), (2, 3):
            refused(lambda: save(tmp_path, *ours, *steps), "step_0000002", "--resume",
                    "No space left on device", error=OSError)
            assert names_in(tmp_path) == ["step_0000001"]
    save(tmp_path, *ours, 3)
    assert names_in(tmp_path) == ["step_0000001", "step_0000003"]
