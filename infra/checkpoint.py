"""
Checkpoints of a training run: written while it goes on, whole or not at all, read by any number of GPUs.

    out/NAME/step_0000500/config.json                  what the model is
                          model-00001-of-00002.safetensors       a GPU's rows of every weight, fp32
                          optimizer-00001-of-00002.safetensors   and of both of AdamW's moments, NAME/exp_avg ...
                          train.json                   the step, the flags, how it was made
                          tokenizer.json ...           the tokenizer, as it was when the run was started

torch.distributed.checkpoint decides who writes and who reads which rows; Writer below gives it safetensors with a hash of
their content, and no pickle. One process writes whole tensors (model.safetensors): an OLMo 2 without memory opens in
transformers as it is. model.Transformer.from_pretrained and eval_niah.py read all of them, and

    python -m infra.checkpoint out/NAME DIR --dtype=bfloat16

writes what several GPUs have made as one model in Hugging Face's layout. The step is all that a checkpoint needs to know of
data and chance: both are functions of (seed, step). Checked in tests/test_checkpoint.py and tests/test_train.py. Read record.py
and train.py next.
"""
import argparse
import json
import os
import re
import shutil
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from infra import weights
from infra.tokenizers import KINDS, ByteTokenizer, folder_of, tokenizer_of
from infra.files import sealed
from model import Transformer

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process on a CPU is no group, and needs none
KEPT = 2  # checkpoints: if the newest turns out to be of no use, there is one more
OURS = re.compile(r"(model|optimizer)(-\d{5}-of-\d{5})?\.safetensors|"  # the names in a checkpoint
                  r"(config|train|tokenizer|tokenizer_config)\.json|tokenizer\.model")


# ---------------------------------------------------------------- writing

def state_of(model, optimizer):
    """{name: tensor}, the very ones that model and optimizer use: of each the rows that this process keeps."""
    state = {weights.hf_name(name): tensor for name, tensor in model.state_dict().items()}  # first: it drops what forward has gathered
    for name, parameter in model.named_parameters():
        assert optimizer.state[parameter], f"the optimizer knows no moments of {name}"
        state |= {f"{name}/{key}": value for key, value in optimizer.state[parameter].items()}
    return state


class Writer(dcp.StorageWriter):
    """Where torch.distributed.checkpoint puts things: a folder that gets its final name once all processes are done."""

    def __init__(self, folder, config, record, tokenizer, beside):
        self.folder, self.config, self.record = folder, config, record
        self.tokenizer, self.beside = tokenizer, beside  # its name; {name: content} of its files
        self.temporary = folder.with_name(f".{folder.name}.tmp")

    def reset(self, checkpoint_id=None):
        pass

    def set_up_storage_writer(self, is_coordinator, *args, **kwargs):
        if is_coordinator:  # before the others are told what to write
            make_way(self.temporary)
            self.temporary.mkdir(parents=True)

    def prepare_local_plan(self, plan):
        return plan

    def prepare_global_plan(self, plans):
        return [replace(plan, storage_data=(number, len(plans))) for number, plan in enumerate(plans, start=1)]

    def write_data(self, plan, planner):
        number, world = plan.storage_data
        files = {}
        for item in plan.items:
            file = "optimizer" if "/" in item.index.fqn else "model"
            tensor = planner.resolve_data(item)
            files.setdefault(file, []).append((item.index.fqn, tuple(item.index.offset or ()), tensor))
        for file, entries in files.items():
            name = f"{file}.safetensors" if world == 1 else f"{file}-{number:05d}-of-{world:05d}.safetensors"
            places = None if world == 1 else {fqn: place for fqn, place, _ in entries}
            weights.save_shard({fqn: tensor for fqn, _, tensor in entries}, self.temporary / name, places)
        done = Future()
        done.set_result([WriteResult(index=item.index, size_in_bytes=0, storage_data=None) for item in plan.items])
        return done

    def finish(self, metadata, results):
        """The first process, once all have written."""
        hashes = {file.name: weights.told_hash(weights.opened(file)) for file in sorted(self.temporary.glob("*.safetensors"))}
        (self.temporary / "config.json").write_text(weights.config_json(self.config, "float32", hashes, self.tokenizer))
        (self.temporary / "train.json").write_text(json.dumps(sealed(self.record), indent=1))
        for name, content in self.beside.items():
            (self.temporary / name).write_bytes(content)
        for path in *self.temporary.iterdir(), self.temporary:
            flush(path)
        make_way(self.folder)  # without its config.json it was passed over
        os.rename(self.temporary, self.folder)
        flush(self.folder.parent)
        for old in weights.checkpoints(self.folder.parent)[:-KEPT]:
            if is_ours(old):
                remove(old)

    def storage_meta(self):
        return StorageMeta()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id):
        return True


def is_ours(folder):
    """
    Whether we wrote all that is in a folder, and, unless it has a temporary name, sealed it. Else there is something of a
    user's in it, notes or a model, which is not ours to delete.
    """
    names = [file.name for file in folder.iterdir()] if folder.is_dir() and not folder.is_symlink() else ["no folder"]
    sealed_or_temporary = folder.name.startswith(".") or weights.sealed_config(folder) != {}
    return all(OURS.fullmatch(name) for name in names) and sealed_or_temporary


def remove(folder):
    """A checkpoint that is no more needed: under a temporary name first, so that no half of it keeps its own."""
    doomed = folder.with_name(f".{folder.name}.old.tmp")
    os.rename(folder, doomed)
    shutil.rmtree(doomed)


def make_way(folder):
    """Nothing has this name any more: what is ours is removed, anything else gets another name."""
    if is_ours(folder):
        remove(folder)
    elif os.path.lexists(folder):
        names = (folder.with_name(f"{folder.name}.{n}") for n in range(1, 1000))
        os.rename(folder, next(name for name in names if not os.path.lexists(name)))


def flush(path):
    """To the disk itself: what a name stands for survives a power cut. Not on Windows, where a folder cannot be opened."""
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Saver:
    """Checkpoints of one run. save copies the state to the CPU's memory and returns; the rest happens while training goes on."""

    def __init__(self, run, processes, tokenizer):
        self.run, self.processes, self.tokenizer = run, processes, tokenizer.name
        self.writer = self.writing = None
        # read now: a run that goes on has them from a checkpoint, which is removed after some more
        self.beside = {name: file.read_bytes() for name, file in tokenizer.files.items()}
        if processes.rank == 0:
            for left in run.glob(".step_*.tmp"):  # by one that was killed
                if re.fullmatch(r"\.step_\d{7,}(\.old)?\.tmp", left.name) and is_ours(left):
                    shutil.rmtree(left)

    def save(self, model, optimizer, record):
        """run/step_N, with the record as train.json and the tokenizer beside it. OSError if the one before failed."""
        self.wait()
        folder = self.run / f"step_{record['step']:07d}"
        self.writer = Writer(folder, model.config, record, self.tokenizer, self.beside)
        self.writing = dcp.async_save(state_of(model, optimizer), storage_writer=self.writer, no_dist=self.processes.world == 1,
                                      process_group=self.processes.background)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        """What is being written is written, however the run ends."""
        try:
            self.wait()
        except OSError:
            if kind is None:
                raise

    def failed(self):
        """Whether the last one is known to have failed; wait tells why."""
        return self.writing is not None and self.writing.done() and self.writing.exception() is not None

    def wait(self):
        """Until the last checkpoint is on disk. OSError if it is not."""
        if self.writing is None:
            return
        writing, self.writing = self.writing, None
        try:
            writing.result()
        except dcp.CheckpointException as error:
            first = min(error.failures)
            reason = error.failures[first][0]
            if self.processes.rank == 0:
                shutil.rmtree(self.writer.temporary, ignore_errors=True)
            raise OSError(f"checkpoint {self.writer.folder} failed ({' '.join(str(reason).split())}); those before it, if any, are whole: "
                          "make room, then --resume") from None


# ---------------------------------------------------------------- reading

def load(folder, model, optimizer, processes):
    """
    Weights and moments of a checkpoint into model and optimizer, which have storage. Each process reads its rows, whoever wrote
    them. ValueError or FileNotFoundError in one line if a file is damaged or missing.
    """
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    missing = weights.missing(files)
    missing += [f"{kind}.safetensors" for kind in ("model", "optimizer") if not any(file.startswith(kind) for file in files)]
    remedy = f"restore it from a copy, or move {folder} away to go on from the one before"
    if missing:
        raise FileNotFoundError(f"{folder / missing[0]} is missing: {remedy}")
    mine = files[processes.rank::processes.world]  # each is read whole once, by someone
    weights.as_written(folder, {file: weights.checked(folder / file, remedy) for file in mine}, files)
    if processes.world > 1:
        dist.barrier(processes.background)
    try:
        dcp.load(state_of(model, optimizer), storage_reader=dcp.HuggingFaceStorageReader(str(folder)),
                 no_dist=processes.world == 1, process_group=processes.background)
    except (dcp.CheckpointException, SafetensorError, OSError) as error:
        raise ValueError(f"{folder} is damaged or of another model ({str(error).splitlines()[0][:200]}): "
                         "move it away to go on from the one before") from None


# ---------------------------------------------------------------- python -m infra.checkpoint

def tokenizer_beside(source, vocab_size):
    """The tokenizer that goes with the model at `source`; None if there is none, as with weights that came alone."""
    has_one = any((folder_of(source) / name).exists() for name in KINDS)
    return tokenizer_of(source, vocab_size) if has_one or vocab_size == ByteTokenizer.n_vocab else None


def main():
    parser = argparse.ArgumentParser(description="Write a run's newest checkpoint as one model in Hugging Face's layout.", allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", help="a run of train.py (out/NAME), one of its checkpoints, or any model that we load")
    parser.add_argument("to", metavar="DIR", help="a new folder")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the weights (default: float32)")
    args = parser.parse_args()
    try:
        source, to = weights.resolve(args.run), Path(args.to)
        if (to / "config.json").exists():  # it comes last: an export whose disk was full leaves none
            raise ValueError(f"{to / 'config.json'} exists: choose another folder")
        model = Transformer.from_pretrained(source, getattr(torch, args.dtype))
        weights.write(to, model.config, model.state_dict(), tokenizer_beside(source, model.config.vocab_size))
        print(f"{source} is now {to}, {args.dtype}")
    except (ValueError, OSError) as error:
        print(f"checkpoint.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
