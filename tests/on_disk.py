"""Models on disk for tests that change them: ours, and those that others write."""
import json
import os

import torch
from safetensors.torch import load_file, save_file

from conftest import refused, tiny
from model import Transformer

ONE, INDEX = "model.safetensors", "model.safetensors.index.json"


def save(path, seed=0, **form):
    """-> the model"""
    model = tiny(seed, **form)
    model.save_pretrained(path)
    return model


def foreign(folder, n_files, **form):
    """An OLMo 2 as others write it, without a hash of ours. -> the model"""
    model = save(folder, eos_id=5, **form)
    split(folder, n_files)
    if n_files > 1:
        (folder / ONE).unlink()
        write_index(folder, n_files)
    config(folder, sha256=None, files=None)
    return model


def split(folder, n_files):
    """The tensors of model.safetensors in so many files, without our hash."""
    found = load_file(folder / ONE)
    for n in range(n_files):
        file = f"model-{n + 1:05d}-of-{n_files:05d}.safetensors" if n_files > 1 else ONE
        some = {name: found[name].clone() for name in sorted(found)[n::n_files]}
        save_file(some, folder / file, metadata={"format": "pt"})


def write_index(folder, n_files):
    placed = {name: file.name for file in folder.glob(f"*-of-{n_files:05d}.safetensors")
              for name in load_file(file)}
    index = {"metadata": {"total_size": 1}, "weight_map": placed}
    (folder / INDEX).write_text(json.dumps(index))


def config(folder, **changes):
    """Change fields of config.json; None takes one out."""
    file = folder / "config.json"
    found = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in found.items() if value is not None}))


def unsealed(**changes):
    """The same, of a config.json that we wrote: our hash goes too."""
    return lambda folder: config(folder, **{"sha256": None, "files": None} | changes)


def tensors(folder, change, file=ONE):
    """Rewrite a file with change(its tensors) applied, without our hash."""
    found = {name: tensor.clone() for name, tensor in load_file(folder / file).items()}
    change(found)
    save_file(found, folder / file, metadata={"format": "pt"})


def contents(folder):
    """{name: content} of all files below; a link's is where it points to."""
    return {str(path.relative_to(folder)): os.readlink(path) if path.is_symlink()
            else path.read_bytes()
            for path in folder.rglob("*") if path.is_symlink() or path.is_file()}


def assert_same(model, other):
    """The same config and the same weights, bit by bit."""
    assert model.config == other.config
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


def not_loaded(path, *words, error=(ValueError, FileNotFoundError)):
    """Loading fails in one line that names the path and says these words."""
    refused(lambda: Transformer.from_pretrained(path), path, *words, error=error)
