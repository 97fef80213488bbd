"""
Weights on disk: which files hold a model, and under which names.

    read(path) -> (settings for model.Config, tensors)    tensors: {name: function that loads it}
    fill(model, tensors, ...)                             one tensor at a time, into a model that
                                                          has no storage yet
    write(path, config, state)                            config.json and safetensors, atomically

Read are:
    a directory in Hugging Face layout: config.json of a family in families.py, and .safetensors
    a directory written here: the same, of model_type nanorat if it is none of these families
    a run of train.py (out/NAME): its newest checkpoint, which is such a directory. If several GPUs
        trained, each wrote a file with its rows of every tensor (checkpoint.py). They are joined
        here, and python -m experiments.export out/NAME DIR writes them as others read them
    an official RAT+ checkpoint, one .pth file (ratplus.py)

Every file is checked before use: one line tells the file, the field and the remedy. Where one thing
is said in two places, they must agree (tests/test_contradictions.py): nobody guesses which counts.
Checked in tests/test_weights.py, and in tests/test_hostile.py against whatever strangers might put
there. families.py has what a config.json says, names.py what tensors are called, files.py the rules
for all files.
"""
import hashlib
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from shutil import copyfile
from typing import get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from infra import rope
from infra.families import described, family_of, settings_of
from infra.files import (SEAL, all_or_nothing, opened_seal, parse_json, read_json, regular, sealed,
                         short)
from infra.names import hf_name, our_name, stored_name
from infra.ratplus import read_ratplus
from infra.spelling import check_type

SHARD_BYTES = 5 * 10**9  # a larger model is split into files of at most this size
DTYPES = "F64", "F32", "F16", "BF16"  # of weights, as safetensors calls them
INDEX = "model.safetensors.index.json"
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")  # as transformers and we name them
FREQUENCIES = "rotary_emb.inv_freq"  # RoPE's, which some files hold as a buffer
# Where torch.distributed.checkpoint notes which rows a file holds, so that it can read ours.
PLACES = "DCP_SHARDING_INFO"


# ---------------------------------------------------------------- a model, from wherever it is

def checkpoints(run):
    """The checkpoints of a run of train.py, oldest first. Copies under other names are none."""
    return sorted(file.parent for file in Path(run).glob("step_*/config.json")
                  if re.fullmatch(r"step_\d{7,}", file.parent.name))


def resolve(path):
    """`path`, or the newest checkpoint in it if it is a run of train.py's."""
    check_type(path, (str, os.PathLike), "a model is named by its path")
    # A run's folder has no config.json of its own, unless somebody put a model there.
    found = [Path(path), *checkpoints(path)]
    if len(found) > 1 and "model_type" in any_json(found[0] / "config.json"):
        raise ValueError(f"{path} holds a model and checkpoints of a run: which of them counts? "
                         f"Name one, as {found[-1]}, or move config.json away")
    return found[-1]


def read(path, without_tensors=False, hashed=True):
    """
    Settings (a dict of model.Config's fields) and tensors ({name: () -> tensor}, or None) of the
    model at `path`. hashed: ask whether files hold what their hash says.
    """
    # Hashing takes a second for every 2 GB.
    path = resolve(path)
    if path.is_dir():
        settings, tensors = settings_of_directory(path), None
        if not without_tensors:
            tensors = tensors_of_directory(path, hashed)
    elif not path.exists():
        raise FileNotFoundError(f"{path} does not exist: give a model's directory, or a RAT+ .pth "
                                "file")
    elif path.suffix == ".pth":
        settings, tensors = read_ratplus(path)
    else:
        raise ValueError(f"{path} is neither a directory with config.json nor a RAT+ .pth file")

    if tensors is not None:
        # Asked before a model of so many layers is made.
        layers = {name.split(".")[1] for name in tensors if name.startswith("layers.")}
        if settings.get("n_layer") != len(layers):
            raise ValueError(f"{path}: its config has {short(settings.get('n_layer'))} layers, its "
                             f"weights have {len(layers)}: they are not of one model")
    return settings, tensors


@torch.no_grad()
def fill(model, tensors, path, dtype, device):
    """
    Load `tensors` into `model`, whose parameters are on the meta device. dtype None: as they are.
    ValueError, which names `path`, unless they fit exactly.
    """
    wanted, family = model.state_dict(), family_of(model.config)
    missing = sorted(wanted.keys() - tensors.keys())
    foreign = sorted(tensors.keys() - wanted.keys())
    again = [name for name in foreign if is_said_again(name, model.config)]
    foreign = [name for name in foreign if name not in again]
    if missing or foreign:
        if missing:
            what = f"lacks {stored_name(missing[0], family)!r}"
        else:
            what = f"has {short(stored_name(foreign[0], family))}, which this model has not"
        more = len(missing) + len(foreign) - 1
        others = f" (and {more} more differ)" if more else ""
        raise ValueError(f"{path} {what}{others}: its config and its weights are not of one model")

    state = {}
    for name, parameter in wanted.items():
        tensor = tensors[name]()
        if tensor.shape != parameter.shape:
            called = stored_name(name, family)
            raise ValueError(f"{path}: {called} is {tuple(tensor.shape)}, its config asks for "
                             f"{tuple(parameter.shape)}: config and weights are not of one model")
        # Of what fully_shard has divided among processes, which are DTensors, we take our rows.
        mesh = getattr(parameter, "device_mesh", None)
        if mesh:
            parts, mine = tensor.chunk(mesh.size()), mesh.get_local_rank()
            tensor = parts[mine] if mine < len(parts) else tensor[:0]
        # Each is a copy of its own: what the file holds stays on disk, mapped, and can go. It is
        # cast on the device, where a GPU is sooner than one core.
        there = tensor.to(device)
        tensor = there.to(dtype or tensor.dtype, copy=there is tensor)
        # A number that is finite in the file may not be so in bf16 or fp16.
        if tensor.numel() and not all(bound.isfinite() for bound in tensor.aminmax()):
            called = stored_name(name, family)
            raise ValueError(f"{path}: {called} holds numbers that are not finite in "
                             f"{str(tensor.dtype).removeprefix('torch.')}: fetch it again")
        if mesh:
            tensor = type(parameter.data).from_local(
                tensor, mesh, parameter.placements, run_check=False,
                shape=parameter.shape, stride=parameter.stride())
        state[name] = tensor
    for name in again:
        check_said_again(name, tensors, model.config, path)
    model.load_state_dict(state, assign=True)


def is_said_again(name, config):
    """Whether a file may hold this besides parameters: a tied model's head, RoPE's frequencies."""
    return name.endswith(FREQUENCIES) or (name == "lm_head.weight" and config.tied)


def check_said_again(name, tensors, config, path):
    """ValueError unless such a tensor says what the embedding, or the config, says already."""
    found = tensors[name]()
    if name == "lm_head.weight":
        embedding = tensors["embed_tokens.weight"]()
        # == compares the values of two dtypes, and torch.equal does not.
        if found.shape != embedding.shape or not bool((found == embedding).all()):
            raise ValueError(f"{path}: its config ties the head to the embedding, and "
                             "lm_head.weight is another matrix: which of them counts? Set "
                             "tie_word_embeddings to false to use that head, or take "
                             "lm_head.weight out")
        return
    # What RoPE computes from the base. Files of 16 bits round it.
    D = config.head_width
    ours = config.rope_theta ** -(torch.arange(0, D, 2).double() / D)
    if config.rope_scaling:
        ours = rope.stretched(ours, config.rope_theta, config.rope_scaling)
    near = found.shape == ours.shape
    near = near and torch.allclose(found.double(), ours, rtol=0.02, atol=1e-7)
    if not near:
        raise ValueError(f"{path}: {name} is not that of the config's "
                         f"rope_theta={config.rope_theta}: which of them counts? Correct the "
                         "config, or take the buffer out")


# ---------------------------------------------------------------- config.json

def check_config(config):
    """ValueError unless a model can be made of a model.Config: it may come from a file."""
    for field in fields(config):
        value, kinds = getattr(config, field.name), get_args(field.type) or (field.type,)
        # To isinstance true would be an int.
        if type(value) not in kinds and not (float in kinds and type(value) is int):
            wanted = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"{field.name} is {short(value)}, not of type {wanted}")
    sizes = (config.vocab_size, config.n_layer, config.width, config.n_head, config.n_kv_head,
             config.mlp_width, config.context_len)
    own = config.head_dim is not None  # then heads need not divide the width among them
    if (min(sizes) < 1 or max(sizes) >= 2**28 or config.n_head % config.n_kv_head
            or not own and (config.width % config.n_head or config.head_width % 2)):
        raise ValueError(f"sizes do not fit together: width={config.width} must be "
                         f"n_head={config.n_head} heads of an even width, n_head a multiple of "
                         f"n_kv_head={config.n_kv_head}, and all at least 1 and below 2**28")
    if own and not (0 < config.head_dim < 2**16 and config.head_dim % 2 == 0):
        raise ValueError(f"head_dim={short(config.head_dim)} is no even width of a head")
    if not (0 < config.rope_theta < 1e30 and 0 <= config.norm_eps < 1):
        raise ValueError(f"rope_theta={short(config.rope_theta)} must be above 0 and below 1e30, "
                         f"norm_eps={config.norm_eps} from 0 to 1")
    rope.check(config.rope_scaling, config.rope_theta)
    if config.qk_norm not in ("all", "head", None):
        raise ValueError(f"qk_norm={short(config.qk_norm)} is none of 'all', 'head' and null")
    if config.eos_id is not None and not 0 <= config.eos_id < config.vocab_size:
        raise ValueError(f"eos_id={short(config.eos_id)} is no token of {config.vocab_size}")


def config_of(kind, settings, path):
    """The Config, a class, of what read found at `path`. ValueError if it is none."""
    try:
        return kind(**settings)
    except (TypeError, ValueError) as error:  # a field of another name, type or size
        file = Path(path)
        if file.is_dir():  # else the config is in the file itself
            file /= "config.json"
        if str(error).startswith("memory="):  # Config's own line, whose remedy is another
            raise ValueError(f"{file}: {error}") from None
        raise ValueError(f"{file} describes no model here ({short(str(error))}): fetch it "
                         "again") from None


def settings_of_directory(path):
    config_file, found = path / "config.json", found_config(path)
    # Ours has model.Config's own fields, beside these.
    kind = found.get("model_type")
    if kind == "nanorat":
        others = "model_type", "architectures", "files", "tokenizer"
        return {name: value for name, value in found.items() if name not in others}
    return settings_of(found, config_file)


def found_config(path):
    """config.json, an object; if we wrote it, as we wrote it."""
    config_file = path / "config.json"
    if not config_file.exists():
        raise FileNotFoundError(f"{config_file} is missing: is {path} a model's directory?")
    found = read_json(config_file)
    if not isinstance(found, dict) or not isinstance(found.get("files", {}), dict):
        raise ValueError(f"{config_file} is no configuration, but {short(found)}: fetch it again")
    return opened_seal(found, config_file)


def config_json(config, dtype, hashes, tokenizer=None):
    """
    config.json's text, sealed. hashes: {file of weights beside it: the hash in it}; tokenizer: its
    name, where it is known, by which tokenizer_of finds a wrong one.
    """
    known = {} if tokenizer is None else {"tokenizer": tokenizer}
    return json.dumps(sealed(described(config, dtype) | known | {"files": hashes}), indent=1)


# ---------------------------------------------------------------- the files of a directory

def files_of_directory(path):
    """The names of its weights' files, and which of them has which tensor as the index says."""
    index_file, placed = path / INDEX, {}
    named_as_usual = sorted(file.name for file in path.iterdir() if WEIGHTS.fullmatch(file.name))
    if index_file.exists():
        placed = weight_map(index_file)
        files = sorted(set(placed.values()))
        sets = {INDEX} | {"model.safetensors"}.intersection(named_as_usual) - set(files)
    else:
        files = named_as_usual
        if not files:
            raise FileNotFoundError(f"{path} holds no model.safetensors, nor parts of one called "
                                    "model-00001-of-00002.safetensors: fetch them, convert a "
                                    ".bin, or rename yours")
        sets = {re.sub(r"\d{5}-of", "*-of", file) for file in files}
    # Several sets may be two models, or one of them an older one, left behind by a save.
    if len(sets) > 1:
        raise ValueError(f"{path} holds weights twice, {' and '.join(sorted(sets))}: which of them "
                         "count? Move the others away")
    if not placed and missing(files):
        raise FileNotFoundError(f"{path / missing(files)[0]} is missing, though {files[0]} is "
                                "there: restore it from a copy")
    return files, placed


def weight_map(index_file):
    """{tensor: file} of an index, whose files are there."""
    index = read_json(index_file, most=8 << 20)
    placed = index.get("weight_map") if isinstance(index, dict) else None
    if (not isinstance(placed, dict) or not placed
            or not all(isinstance(file, str) for file in placed.values())):
        raise ValueError(f"{index_file} is no index of weights: fetch it again")
    for file in sorted(set(placed.values())):
        # A name with a slash would reach files elsewhere.
        if not re.fullmatch(r"\w[\w.-]*\.safetensors", file, re.ASCII):
            raise ValueError(f"{index_file}: {short(file)} is no name of a .safetensors file "
                             "beside it: fetch it again")
        if not (index_file.parent / file).exists():
            raise FileNotFoundError(f"{index_file.parent / file} is missing, though "
                                    f"{index_file.name} names it: fetch that shard")
    return placed


def tensors_of_directory(path, hashed=True):
    """{name: () -> tensor}. Files stay mapped; a tensor is read when its function is called."""
    files, placed = files_of_directory(path)
    family = found_config(path).get("model_type")
    with ThreadPoolExecutor(max_workers=8) as pool:  # hashing is all arithmetic, on a core each
        open_one = checked if hashed else opened
        mapped = dict(zip(files, pool.map(open_one, [path / file for file in files])))
    as_written(path, mapped, files)

    tensors, rows = {}, {}
    for file, content in mapped.items():
        places = rows_of(content, path / file)
        for theirs in content.keys():
            ours, part = our_name(theirs, family), content.get_slice(theirs)
            dtype, shape = part.get_dtype(), part.get_shape()
            if dtype not in DTYPES:
                raise ValueError(f"{path / file}: {short(theirs)} is of type {dtype}, and weights "
                                 f"are of {', '.join(DTYPES)}: fetch a file of those")
            # A GPU may have none of a small tensor's rows.
            if places and 0 in shape[:1]:
                continue
            first = places and places[theirs]
            if ours in tensors or (ours in rows and (not places or first in rows[ours])):
                raise ValueError(f"{path / file}: {short(theirs)} is in another place too: which "
                                 "of them counts? Fetch the files again")
            load = lambda content=content, theirs=theirs: content.get_tensor(theirs)
            if places:
                rows.setdefault(ours, {})[first] = load, shape
            else:
                tensors[ours] = load
        here = {our_name(theirs, family) for theirs in content.keys()}
        for theirs in sorted(name for name, where in placed.items() if where == file):
            if our_name(theirs, family) not in here:
                raise ValueError(f"{path / file} has no {short(theirs)}, which the index sees "
                                 "there: fetch both again")
    return tensors | {name: joined(name, parts, path) for name, parts in rows.items()}


def joined(
    name,
    parts,  # {its first row: (function that loads the part, the part's shape)}
    path,
):          # -> a function that loads the whole tensor, whose rows are in several files
    parts, end = sorted(parts.items()), 0
    loads, shapes = [load for _, (load, _) in parts], [shape for _, (_, shape) in parts]
    for (first, _), shape in zip(parts, shapes):
        scalar_in_parts = not shape and len(parts) > 1
        if first != end or shape[1:] != shapes[0][1:] or scalar_in_parts:
            raise ValueError(f"{path}: the rows of {short(name)} do not follow each other from "
                             "file to file: restore them from a copy")
        end += (shape or [1])[0]
    return lambda: torch.cat([load() for load in loads]) if len(loads) > 1 else loads[0]()


def as_written(path, mapped, there):
    """
    ValueError unless the files `there` are those that our config.json was written with; others'
    says nothing of them. mapped: {name: opened file}, of these or of some of them.
    """
    hashes = found_config(path).get("files", {})
    if not hashes:
        return
    remedy = (f"restore all from a copy, or take 'files' and {SEAL!r} out of config.json if you "
              "meant to")
    # A model may be read where the optimizer's files are gone: only kinds that are there count.
    kinds = {kind_of(file) for file in there}
    for file in sorted(set(hashes).symmetric_difference(there)):
        found = "is there, and not in" if file in there else "is not there, though in"
        if kind_of(file) in kinds:
            raise ValueError(f"{path / file} {found} config.json's 'files': {remedy}")
    for file, opened_file in mapped.items():
        if written_hash(opened_file) != hashes[file]:
            raise ValueError(f"{path / file} is not the file that config.json was written with: "
                             f"{remedy}")


def kind_of(file):
    """model of model-00001-of-00002.safetensors, likewise optimizer"""
    return re.match(r"\w*", file)[0]


def missing(files):
    """Files that belong with those called NAME-00001-of-00003.safetensors and are not there."""
    wanted = set()
    for file in files:
        if found := re.fullmatch(r"(.+-)\d{5}(-of-(\d{5})\.safetensors)", file):
            before, after, n_files = found.groups()
            wanted |= {f"{before}{n:05d}{after}" for n in range(1, int(n_files) + 1)}
    return sorted(wanted - set(files))


# ---------------------------------------------------------------- one safetensors file

def opened(file, remedy=None):
    """The file, mapped. ValueError, with the remedy, if its head does not describe the rest."""
    remedy = remedy or "fetch it again"
    with open(regular(file), "rb") as start:
        header = int.from_bytes(start.read(8), "little")
    # A thousand layers and their moments have less. safe_open takes 100 MB, and makes objects of
    # it.
    if header > 8 << 20:
        raise ValueError(f"{file} is damaged, or no model's: its header would have {header:,} "
                         f"bytes; {remedy}")
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged or incomplete ({short(str(error))}): "
                         f"{remedy}") from None


def written_hash(mapped):
    """What a file written here says of its content; None from others."""
    return (mapped.metadata() or {}).get("sha256")


def checked(file, remedy=None):
    """opened, and ValueError too if its content is not what its hash says."""
    mapped = opened(file, remedy)
    expected = written_hash(mapped)
    if expected:
        tensors = {name: mapped.get_tensor(name) for name in mapped.keys()}
        if expected != content_hash(tensors, mapped.metadata().get(PLACES)):
            raise ValueError(f"{file} is damaged: its content does not match its hash; "
                             f"{remedy or 'restore it from a copy'}")
    return mapped


def content_hash(tensors, places=None):
    """sha256 over {name: tensor}, and over the text that says whose rows they are."""
    # Not over the file: its header may be written in another order (see in_order).
    digest = hashlib.sha256((places or "").encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def rows_of(mapped, file):
    """Where each tensor's rows begin in one of several GPUs' files; None if it has all rows."""
    places = (mapped.metadata() or {}).get(PLACES)
    try:
        places = places and parse_json(places.encode())
        firsts = places and {name: (places[name]["saved_offsets"] or [0])[0]
                             for name in mapped.keys()}
        if firsts and not all(type(first) is int and first >= 0 for first in firsts.values()):
            raise ValueError
        return firsts
    except (ValueError, KeyError, TypeError, IndexError):
        raise ValueError(f"{file} tells not whose rows it holds: restore it from a copy") from None


def save_shard(
    shard,        # {name: tensor}
    file,
    places=None,  # {name: where it begins in a whole tensor}; None: all are whole
):                # -> a hash of its content, which the file holds too
    """OSError if there is no room."""
    shard = {name: tensor.detach().cpu().contiguous() for name, tensor in shard.items()}
    more = {}
    if places is not None:
        offsets = {name: {"saved_offsets": list(place)} for name, place in places.items()}
        more = {PLACES: json.dumps(offsets)}
    digest = content_hash(shard, more.get(PLACES))
    try:
        save_file(shard, file, metadata={"format": "pt", "sha256": digest, **more})
        in_order(file)
    except SafetensorError as error:
        raise OSError(error) from None
    return digest


def in_order(file):
    """Put a file's metadata into one order."""
    # safetensors draws it anew for each file, so the same weights would be other bytes, and whoever
    # compares files would see a difference that there is not.
    with open(file, "r+b") as opened_file:
        length = int.from_bytes(opened_file.read(8), "little")
        header = json.loads(opened_file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= length, f"{file}: a header of {len(text)} bytes where {length} were"
        opened_file.seek(8)
        opened_file.write(text.ljust(length))


# ---------------------------------------------------------------- writing a model

def write(
    path,
    config,
    state,           # {name: tensor}
    tokenizer=None,  # of infra/tokenizers.py, whose files are copied
):
    """
    Save a model into the directory `path`. All its files appear or none does; OSError names what
    failed. A model that we saved there before makes way, and other names stay; ValueError if what
    is in the way is not ours.
    """
    path = Path(path)
    before = has_our_mark(path)
    beside = {} if tokenizer is None else tokenizer.files
    # A model that we saved there may be replaced. One that somebody put there may be the only copy.
    in_the_way = [path / name for name, ours in before.items() if not ours]
    in_the_way += [path / name for name, file in beside.items() if differ(path / name, file)]
    if in_the_way:
        raise ValueError(f"{in_the_way[0]} is in the way, and is not ours to replace: choose "
                         "another folder, or move it away")
    path.mkdir(parents=True, exist_ok=True)

    state = {hf_name(name, family_of(config)): tensor for name, tensor in state.items()}
    shards = in_shards(state)
    placed, hashes, files = {}, {}, {}

    def saver(name, shard):
        return lambda file: hashes.update({name: save_shard(shard, file)})

    for number, shard in enumerate(shards, start=1):
        name = "model.safetensors"
        if len(shards) > 1:
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        placed |= dict.fromkeys(shard, name)
        files[path / name] = saver(name, shard)
    if len(shards) > 1:
        size = sum(tensor.nbytes for tensor in state.values())
        index = {"metadata": {"total_size": size}, "weight_map": placed}
        files[path / INDEX] = lambda file: file.write_text(json.dumps(index, indent=1))
    for name, source in beside.items():
        files[path / name] = lambda file, source=source: copyfile(source, file)
    # The last one, since it holds the hashes of the others.
    dtype = str(next(iter(state.values())).dtype).removeprefix("torch.")
    its_name = getattr(tokenizer, "name", None)
    files[path / "config.json"] = lambda file: file.write_text(
        config_json(config, dtype, hashes, its_name))
    all_or_nothing(files)
    for old in before.keys() - {file.name for file in files}:
        (path / old).unlink()


def in_shards(state):
    """The tensors of a model, file by file. One that is larger than SHARD_BYTES is alone in its."""
    shards, size = [{}], 0
    for name, tensor in state.items():
        size += tensor.nbytes
        if size > SHARD_BYTES and shards[-1]:
            shards.append({})
            size = tensor.nbytes
        shards[-1][name] = tensor
    return shards


def differ(path, other):
    """Whether there is a file at `path` that is not the same as the other."""
    return path.exists() and path.read_bytes() != other.read_bytes()


def has_our_mark(path):
    """{name: whether we wrote it} of what a reader takes for the model in a directory."""
    # Ours are config.json with our seal; weights with our hash or, if they are damaged, named by
    # that config.json; and an index of such files.
    names = sorted(file.name for file in path.iterdir()) if path.is_dir() else []
    config, marks = sealed_config(path), {}
    for name in filter(WEIGHTS.fullmatch, names):
        try:
            marks[name] = written_hash(opened(path / name)) is not None
        except (ValueError, OSError):
            marks[name] = name in config.get("files", {})
    if INDEX in names:
        placed = any_json(path / INDEX).get("weight_map")
        marks[INDEX] = (isinstance(placed, dict)
                        and all(marks.get(str(file)) for file in placed.values()))
    if "config.json" in names:
        marks["config.json"] = config != {}
    return marks


def sealed_config(path):
    """A directory's config.json if it is as we wrote it, else {}."""
    found = any_json(path / "config.json")
    try:
        return opened_seal(found, path) if SEAL in found else {}
    except ValueError:
        return {}


def any_json(path):
    """The object in a JSON file, {} if there is none."""
    try:
        found = read_json(path, most=8 << 20)
    except (ValueError, OSError):
        return {}
    return found if isinstance(found, dict) else {}
