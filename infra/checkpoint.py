"""
Checkpoints of a training run: written while it goes on, whole or not at all, read by any number of
GPUs.

    out/NAME/step_0000500/
        config.json                             what the model is
        model-00001-of-00002.safetensors        a GPU's rows of every weight, fp32
        optimizer-00001-of-00002.safetensors    and of both of AdamW's moments, NAME/exp_avg ...
        train.json                              the step, the flags, how it was made
        tokenizer.json ...                      the tokenizer, as it was when the run was started

torch.distributed.checkpoint decides who writes and who reads which rows; Writer below gives it
safetensors with a hash of their content, and no pickle. One process writes whole tensors
(model.safetensors): a family's model without memory opens in transformers as it is.
model.Transformer.from_pretrained and eval_niah.py read all of them, and

    python -m experiments.export out/NAME DIR --dtype=bfloat16

writes what several GPUs have made as one model in Hugging Face's layout.

The step is all that a checkpoint needs to know of data and chance: both are functions of
(seed, step). Checked in tests/test_checkpoint.py and tests/test_train.py. Read runlog.py next.
"""
import json
import os
import re
import shutil
import warnings
from dataclasses import replace

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from infra import weights
from infra.files import sealed

# One process on a CPU is no group, and needs none.
warnings.filterwarnings("ignore", "torch.distributed is disabled")
# If the newest checkpoint turns out to be of no use, there is one more.
KEPT = 2
OURS = re.compile(  # the names in a checkpoint, and of what safetensors was writing when killed
    r"(model|optimizer)(-\d{5}-of-\d{5})?\.safetensors|\.tmp[A-Za-z0-9]{6}|"
    r"(config|train|tokenizer|tokenizer_config)\.json|tokenizer\.model")


# ---------------------------------------------------------------- writing

def state_of(model, optimizer):
    """
    {name: tensor}, the very ones that model and optimizer use: of each the rows that this process
    keeps.
    """
    family = weights.family_of(model.config)
    # The weights come first: state_dict drops what forward has gathered.
    state = {weights.hf_name(name, family): tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        assert optimizer.state[parameter], f"the optimizer knows no moments of {name}"
        stored = weights.stored_name(name, family)
        state |= {f"{stored}/{key}": value for key, value in optimizer.state[parameter].items()}
    return state


class Writer(dcp.StorageWriter):
    """
    Where torch.distributed.checkpoint puts things: a folder that gets its final name once all
    processes are done.
    """

    def __init__(self, folder, config, record, tokenizer, beside):
        self.folder, self.config, self.record = folder, config, record
        self.tokenizer, self.beside = tokenizer, beside  # its name; {name: content} of its files
        self.temporary = folder.with_name(f".{folder.name}.tmp")

    # What torch.distributed.checkpoint calls, in this order. Every process makes a plan of the
    # tensors that it keeps, the first one collects the plans and hands them back, all write.

    def reset(self, checkpoint_id=None):
        pass

    def set_up_storage_writer(self, is_coordinator, *args, **kwargs):
        # The first makes the folder before the others are told what to write. What a killed run
        # left under the temporary name goes.
        if is_coordinator:
            make_way(self.temporary)
            self.temporary.mkdir(parents=True)

    def prepare_local_plan(self, plan):
        return plan

    def prepare_global_plan(self, plans):
        # Each process learns which of how many it is, for the names of its files.
        return [replace(plan, storage_data=(number, len(plans)))
                for number, plan in enumerate(plans, start=1)]

    def write_data(self, plan, planner):
        number, world = plan.storage_data
        files = {}
        for item in plan.items:  # a moment is called NAME/exp_avg, see state_of
            file = "optimizer" if "/" in item.index.fqn else "model"
            place = tuple(item.index.offset or ())
            files.setdefault(file, []).append((item.index.fqn, place, planner.resolve_data(item)))

        for file, entries in files.items():
            # Each process has files of its own, which say where in the whole tensors its rows are.
            name, places = f"{file}.safetensors", None
            if world > 1:
                name = f"{file}-{number:05d}-of-{world:05d}.safetensors"
                places = {fqn: place for fqn, place, _ in entries}
            tensors = {fqn: tensor for fqn, _, tensor in entries}
            weights.save_shard(tensors, self.temporary / name, places)

        # The results are for the index of torch's own format. Ours needs none: each safetensors
        # says what it holds.
        done = Future()
        done.set_result([WriteResult(index=item.index, size_in_bytes=0, storage_data=None)
                         for item in plan.items])
        return done

    def finish(self, metadata, results):
        """The first process, once all have written."""
        hashes = {file.name: weights.written_hash(weights.opened(file))
                  for file in sorted(self.temporary.glob("*.safetensors"))}
        config = weights.config_json(self.config, "float32", hashes, self.tokenizer)
        (self.temporary / "config.json").write_text(config)
        (self.temporary / "train.json").write_text(json.dumps(sealed(self.record), indent=1))
        for name, content in self.beside.items():
            (self.temporary / name).write_bytes(content)

        # Content first, then the name: whatever has the name survives a power cut whole.
        for path in *self.temporary.iterdir(), self.temporary:
            flush(path)
        make_way(self.folder)  # what is in the way has no config.json, and was passed over
        os.rename(self.temporary, self.folder)
        flush(self.folder.parent)

        # Only once the new one is there, older ones may go.
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
    Whether we wrote all that is in a folder, and, unless it has a temporary name, sealed it. Else
    there is something of a user's in it, notes or a model, which is not ours to delete.
    """
    if not folder.is_dir() or folder.is_symlink():
        return False
    sealed_or_temporary = folder.name.startswith(".") or weights.sealed_config(folder) != {}
    return sealed_or_temporary and all(OURS.fullmatch(file.name) for file in folder.iterdir())


def remove(folder):
    """
    A checkpoint that is no more needed: under a temporary name first, so that no half of it keeps
    its own.
    """
    # A run that is killed in between leaves it to the next one, see Saver.
    doomed = folder.with_name(f".{folder.name}.old.tmp")
    os.rename(folder, doomed)
    shutil.rmtree(doomed)


def make_way(folder):
    """Nothing has this name any more: what is ours is removed, anything else gets another name."""
    if is_ours(folder):
        remove(folder)
    elif os.path.lexists(folder):  # a link too
        names = (folder.with_name(f"{folder.name}.{n}") for n in range(1, 1000))
        os.rename(folder, next(name for name in names if not os.path.lexists(name)))


def flush(path):
    """To the disk itself: what a name stands for survives a power cut."""
    if os.name == "nt":  # where a folder cannot be opened
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Saver:
    """
    Checkpoints of one run. save copies the state to the CPU's memory and returns; the rest happens
    while training goes on.
    """

    def __init__(self, run, processes, tokenizer):
        self.run, self.processes, self.tokenizer = run, processes, tokenizer.name
        self.writer = self.writing = None
        # The tokenizer is read now: a run that goes on has it from a checkpoint, which is removed
        # after some more.
        self.beside = {name: file.read_bytes() for name, file in tokenizer.files.items()}
        if processes.rank == 0:
            for left in run.glob(".step_*.tmp"):  # by one that was killed
                if re.fullmatch(r"\.step_\d{7,}(\.old)?\.tmp", left.name) and is_ours(left):
                    shutil.rmtree(left)

    def save(self, model, optimizer, record):
        """
        run/step_N, with the record as train.json and the tokenizer beside it. OSError if the one
        before failed.
        """
        self.wait()
        folder = self.run / f"step_{record['step']:07d}"
        self.writer = Writer(folder, model.config, record, self.tokenizer, self.beside)
        # Weights and moments are copied before this returns, so that training may change them.
        self.writing = dcp.async_save(
            state_of(model, optimizer), storage_writer=self.writer,
            no_dist=self.processes.world == 1, process_group=self.processes.background)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        """What is being written is written, however the run ends."""
        try:
            self.wait()
        except OSError:
            if kind is None:  # else the error that ended the run is the one to be told
                raise

    def failed(self):
        """Whether the last one is known to have failed; wait tells why."""
        if self.writing is None or not self.writing.done():
            return False
        return self.writing.exception() is not None

    def wait(self):
        """Until the last checkpoint is on disk. OSError if it is not."""
        if self.writing is None:
            return
        writing, self.writing = self.writing, None
        try:
            writing.result()
        except dcp.CheckpointException as error:
            # Of several processes that failed the first one's reason will do.
            of_first, _ = error.failures[min(error.failures)]
            reason = " ".join(str(of_first).split())
            if self.processes.rank == 0:
                shutil.rmtree(self.writer.temporary, ignore_errors=True)
            raise OSError(f"checkpoint {self.writer.folder} failed ({reason}); those before it, if "
                          "any, are whole: make room, then --resume") from None


# ---------------------------------------------------------------- reading

def load(folder, model, optimizer, processes):
    """
    Weights and moments of a checkpoint into model and optimizer, which have storage. Each process
    reads its rows, whoever wrote them. ValueError or FileNotFoundError in one line if a file is
    damaged or missing.
    """
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    missing = weights.missing(files)
    missing += [f"{kind}.safetensors" for kind in ("model", "optimizer")
                if not any(file.startswith(kind) for file in files)]
    remedy = f"restore it from a copy, or move {folder} away to go on from the one before"
    if missing:
        raise FileNotFoundError(f"{folder / missing[0]} is missing: {remedy}")

    # To be checked, each file is read whole once, by someone; then everyone reads its own rows.
    mine = files[processes.rank::processes.world]
    mapped = {file: weights.checked(folder / file, remedy) for file in mine}
    weights.as_written(folder, mapped, files)
    if processes.world > 1:  # nobody takes rows that another has not checked yet
        dist.barrier(processes.background)
    try:
        dcp.load(state_of(model, optimizer),
                 storage_reader=dcp.HuggingFaceStorageReader(str(folder)),
                 no_dist=processes.world == 1, process_group=processes.background)
    except (dcp.CheckpointException, SafetensorError, OSError) as error:
        reason = str(error).splitlines()[0][:200]
        raise ValueError(f"{folder} is damaged or of another model ({reason}): move it away to go "
                         "on from the one before") from None
