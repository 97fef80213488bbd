"""
Official RAT+ checkpoints (arXiv 2602.18196, weights barpitf/ratplus): one .pth file each.

    {"task": {name: tensor}, "config": the trainer's, ...}

A .pth is a pickle, which could run anything. torch.load(weights_only=True) runs nothing that it has
no list of, and maps what it loads; before that, parts_of_pickle makes sure that what it makes is no
larger than the file. Checked in tests/test_weights.py against what the official code computes, and
in tests/test_hostile.py. weights.py reads all other files.
"""
import pickletools
import re
import struct
import zipfile
import zlib
from collections import Counter, OrderedDict

import torch

from infra.files import regular, short
from infra.names import our_name

# Their names -> ours, part by part. in_proj is not among them: it is five matrices in one.
RENAMED = {
    "embedding.wte": "embed_tokens", "backbone.ln": "norm", "backbone.layers.": "layers.",
    "seq_layer.input_norm": "input_layernorm", "seq_layer.out_proj": "self_attn.o_proj",
    "seq_layer.fgate_proj": "self_attn.memory.proj",
    "hidden_layer.ln": "pre_feedforward_layernorm",
    "hidden_layer.fc1": "mlp.up_proj", "hidden_layer.fc2": "mlp.down_proj"}
# in_proj's rows, C for each. A model without memory has no fifth part, and older files keep it in
# fgate_proj.
PACKED = "output_gate", "q_proj", "k_proj", "v_proj", "memory.proj"
HEAD, EMBEDDING = "head.lm_head.weight", "embedding.wte.weight"

# All that a pickle of weights names. The trainer's config is an easydict.EasyDict.
PLAIN = re.compile(
    r"collections OrderedDict|easydict EasyDict|_codecs encode|(__builtin__|builtins) set"
    r"|torch._utils (_rebuild_tensor_v2|_rebuild_parameter)"
    r"|torch (\w+Storage|Size|device|bool|(b?float|u?int|complex)\d+)")


def read_ratplus(path):
    """-> settings (a dict of model.Config's fields), tensors ({our name: () -> tensor})"""
    file = load(path)
    state = plain_weights(file, path)
    settings = settings_of(file, state, path)
    C, dtype = settings["width"], state[EMBEDDING].dtype
    head = state.pop(HEAD, None)
    if head is not None and not torch.equal(head, state[EMBEDDING]):
        raise ValueError(f"{path}: {HEAD} differs from the embedding, and RAT+ ties them")

    tensors = {}
    for name, tensor in state.items():
        for theirs, ours in RENAMED.items():
            name = name.replace(theirs, ours)
        # A fifth part that this model does not want, or lacks, shows in weights.fill.
        parts = zip(PACKED, tensor.split(C)) if "seq_layer.in_proj" in name else [("", tensor)]
        for part, chunk in parts:
            ours = name.replace("seq_layer.in_proj", f"self_attn.{part}")
            if ours in tensors:
                raise ValueError(f"{path}: {short(ours)} is there twice, under two names: which of "
                                 "them counts? Fetch it again")
            tensors[ours] = lambda chunk=chunk: chunk
    if settings["memory"]:  # RAT+'s gate has no bias, and ours has
        tensors |= {f"layers.{i}.self_attn.memory.proj.bias": lambda: torch.zeros(C, dtype=dtype)
                    for i in range(settings["n_layer"])}
    return settings, tensors


def load(path):
    """-> the file's dictionary. ValueError if it is damaged, or no checkpoint."""
    sizes = parts_of_pickle(path)
    try:
        # The EasyDict is read as a plain dictionary, which runs none of its code.
        with torch.serialization.safe_globals([(OrderedDict, "easydict.EasyDict")]):
            file = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # unpickling errors have no common class
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{path} is damaged or no RAT+ checkpoint ({short(reason)}): fetch it "
                         "again") from None
    if not isinstance(file, dict) or not isinstance(file.get("task"), dict):
        raise ValueError(f"{path} has no state dict under 'task': it is no RAT+ checkpoint")
    check_tensors(file["task"], sizes, path)
    return file


def check_tensors(task, sizes, path):
    """sizes: of the file's parts, as parts_of_pickle counts them."""
    for name, tensor in task.items():
        plain = (isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
                 and tensor.device.type == "cpu" and tensor.is_contiguous()
                 and tensor.dtype in (torch.float32, torch.bfloat16, torch.float16))
        if not plain:
            raise ValueError(f"{path}: {short(name)} is no tensor of plain weights: it is no RAT+ "
                             "checkpoint")
    # torch does not compare what it maps with the part it maps. A part that is too short would go
    # on into the next one.
    storages = {t.data_ptr() - t.storage_offset() * t.itemsize: t.untyped_storage().nbytes()
                for t in task.values()}
    if Counter(storages.values()) - sizes:
        raise ValueError(f"{path} is damaged: its parts are not as long as its tensors: fetch it "
                         "again")


def plain_weights(file, path):
    """{name without wrappers: tensor}"""
    # torch.compile may have left "_orig_mod." anywhere in a name.
    state = {our_name(str(name)): tensor for name, tensor in file["task"].items()}
    if len(state) < len(file["task"]):
        raise ValueError(f"{path}: a tensor is there twice, with and without a prefix like "
                         "'_orig_mod.': fetch it again")
    return state


def settings_of(file, state, path):
    """model.Config's fields, from the shapes of tensors."""
    first = "backbone.layers.0."
    needed = {EMBEDDING, first + "hidden_layer.fc1.weight", first + "seq_layer.in_proj.weight"}
    for name in sorted(needed | {name for name in state if "seq_layer.in_proj" in name}):
        if name not in state or state[name].dim() != 2:
            raise ValueError(f"{path} lacks {name!r}, a matrix: it is no RAT+ checkpoint")
    vocab_size, C = state[EMBEDDING].shape
    mlp_width = state[first + "hidden_layer.fc1.weight"].shape[0]
    rows = state[first + "seq_layer.in_proj.weight"].shape[0]
    layers = {name.split(".")[2] for name in state if name.startswith("backbone.layers.")}
    memory = rows == 5 * C or first + "seq_layer.fgate_proj.weight" in state
    try:
        n_head = file["config"]["model"]["backbone"]["seq_cell"]["num_head"]
    except (KeyError, TypeError):  # files of weights alone have heads of 128
        n_head = C // 128
    return dict(vocab_size=vocab_size, n_layer=len(layers), width=C, n_head=n_head,
                n_kv_head=n_head, mlp_width=mlp_width, context_len=4096, rope_theta=10000.0,
                norm_eps=1e-6, tied=True, pre_norm=True, qk_norm=False, swiglu=False,
                output_gate=True, memory=memory, eos_id=2)


def parts_of_pickle(path):
    """
    -> how many parts of each size the file has, a Counter. ValueError unless this .pth is a zip
    file whose parts are stored as they are, and whole, and whose pickle names nothing but tensors
    and dictionaries. It takes 1 s a GB: the checksums.
    """
    regular(path)
    try:
        with zipfile.ZipFile(path) as file:
            parts = file.infolist()
            packed = any(part.compress_type != zipfile.ZIP_STORED for part in parts)
            if packed or sum(part.file_size for part in parts) > path.stat().st_size:
                raise ValueError("its parts are compressed, which torch.save does not do")
            if len({part.filename for part in parts}) < len(parts):
                raise ValueError("a part comes twice")
            if (damaged := file.testzip()) is not None:
                raise ValueError(f"its part {damaged} does not match its checksum")
            pickles = [part for part in parts if part.filename.endswith("/data.pkl")]
            if not pickles:
                raise ValueError("it holds no pickle")
            for code, name, _ in pickletools.genops(file.read(pickles[0])):
                # These name things in ways that cannot be read off the pickle.
                hidden = code.name in ("STACK_GLOBAL", "INST") or code.name.startswith("EXT")
                if hidden or (code.name == "GLOBAL" and not PLAIN.fullmatch(name)):
                    raise ValueError(f"it asks for {name or 'something hidden'}, which is no part "
                                     "of weights")
            return Counter(part.file_size for part in parts)
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError, EOFError, RuntimeError,
            IndexError, struct.error, zlib.error) as error:
        raise ValueError(f"{path} is damaged or no RAT+ checkpoint ({short(str(error))}): fetch it "
                         "again") from None
