"""
Weights on disk: which files hold a model, and under which names.

    read(path) -> (settings for model.Config, tensors)      tensors: {parameter name: function that loads it}
    fill(model, tensors, ...)                               one tensor at a time into a model that has no storage yet
    write(path, config, state)                              config.json and safetensors, atomically

Read are:
    a directory in Hugging Face layout: config.json of model_type olmo2, and one or many .safetensors files
    a directory written here: the same, of model_type nanorat if it is more than OLMo 2 (a memory, RAT+'s form)
    a run of train.py (out/NAME): its newest checkpoint, which is such a directory. If several GPUs trained, each wrote a
        file with its rows of every tensor (checkpoint.py); they are joined here, and
        python -m experiments.export out/NAME DIR writes them as others read them
    an official RAT+ checkpoint, one .pth file (arXiv 2602.18196, weights barpitf/ratplus)

Parameters are named as in Hugging Face's OLMo 2, here without its prefix "model."; a memory's gate is
layers.N.self_attn.memory_proj. Every file is checked before use: one line tells the file, the field and the remedy.
Where one thing is said in two places, they must agree (tests/test_contradictions.py): nobody guesses which one counts.
Checked in tests/test_weights.py, and in tests/test_hostile.py against whatever strangers might put there.
"""
import hashlib
import json
import pickletools
import re
import struct
import sys
import zipfile
import zlib
from collections import Counter, OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from pathlib import Path
from shutil import copyfile
from typing import get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from infra.files import SEAL, all_or_nothing, opened_seal, parse_json, read_json, regular, sealed, short

SHARD_BYTES = 5 * 10**9  # a larger model is split into files of at most this size
DTYPES = "F64", "F32", "F16", "BF16"  # of weights, as safetensors calls them
PLACES = "DCP_SHARDING_INFO"  # where torch.distributed.checkpoint notes which rows a file holds: it can read our checkpoints
INDEX = "model.safetensors.index.json"
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")  # as transformers and we name them
# what torch.compile, DDP, FSDP and activation checkpointing leave in names
WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
FREQUENCIES = "rotary_emb.inv_freq"  # RoPE's, which some files hold as a buffer


def checkpoints(run):
    """The checkpoints in the folder of a run of train.py, oldest first; copies under other names are none."""
    return sorted(file.parent for file in Path(run).glob("step_*/config.json") if re.fullmatch(r"step_\d{7,}", file.parent.name))


def resolve(path):
    """`path`, or the newest checkpoint in it if it is a run of train.py's; ValueError if it is a model's folder too."""
    found = [Path(path), *checkpoints(path)]
    if len(found) > 1 and "model_type" in any_json(found[0] / "config.json"):
        raise ValueError(f"{path} holds a model and checkpoints of a run: which of them counts? Name one, as "
                         f"{found[-1]}, or move config.json away")
    return found[-1]


def read(path, without_tensors=False, hashed=True):
    """
    Settings (a dict of model.Config's fields) and tensors ({name: () -> tensor}, or None) of the model at `path`. hashed=False:
    whether files hold what their hash says is not asked, a matter of a second for every 2 GB.
    """
    path = resolve(path)
    if path.is_dir():
        settings, tensors = settings_of_directory(path), None if without_tensors else tensors_of_directory(path, hashed)
    elif not path.exists():
        raise FileNotFoundError(f"{path} does not exist: give a model's directory, or a RAT+ .pth file")
    elif path.suffix == ".pth":
        settings, tensors = read_ratplus(path)
    else:
        raise ValueError(f"{path} is neither a directory with config.json nor a RAT+ .pth file")
    if tensors is not None:  # before a model of so many is made
        layers = {name.split(".")[1] for name in tensors if name.startswith("layers.")}
        if settings.get("n_layer") != len(layers):
            raise ValueError(f"{path}: its config has {short(settings.get('n_layer'))} layers, its weights have {len(layers)}: "
                             "they are not of one model")
    return settings, tensors


@torch.no_grad()
def fill(model, tensors, path, dtype, device):
    """
    Load `tensors` into `model`, whose parameters are on the meta device: of those that fully_shard has spread this process's
    rows alone. dtype None: as they are. ValueError, which names `path`, unless they fit exactly.
    """
    wanted = model.state_dict()
    missing, foreign = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    again = [name for name in foreign if is_said_again(name, model.config)]
    foreign = [name for name in foreign if name not in again]
    if missing or foreign:
        what = f"lacks {missing[0]!r}" if missing else f"has {short(foreign[0])}, which this model has not"
        more = len(missing) + len(foreign) - 1
        raise ValueError(f"{path} {what}{f' (and {more} more differ)' if more else ''}: "
                         "its config and its weights are not of one model")
    state = {}
    for name, parameter in wanted.items():
        tensor = tensors[name]()
        if tensor.shape != parameter.shape:
            raise ValueError(f"{path}: {name} is {tuple(tensor.shape)}, its config asks for {tuple(parameter.shape)}: "
                             "config and weights are not of one model")
        spread = hasattr(parameter, "device_mesh")  # by fully_shard, as a DTensor: this process has some of the rows
        if spread:
            mesh = parameter.device_mesh
            parts, mine = tensor.chunk(mesh.size()), mesh.get_local_rank()
            tensor = parts[mine] if mine < len(parts) else tensor[:0]
        # a copy of its own: what the file holds stays on disk, mapped, and can go. A GPU casts faster than one core
        there = tensor.to(device)
        tensor = there.to(dtype or tensor.dtype, copy=there is tensor)
        if tensor.numel() and not all(bound.isfinite() for bound in tensor.aminmax()):
            raise ValueError(f"{path}: {name} holds numbers that are not finite in {str(tensor.dtype).removeprefix('torch.')}: fetch it again")
        if spread:
            tensor = type(parameter.data).from_local(tensor, mesh, parameter.placements, run_check=False, shape=parameter.shape, stride=parameter.stride())
        state[name] = tensor
    for name in again:
        check_said_again(name, tensors, model.config, path)
    model.load_state_dict(state, assign=True)


def is_said_again(name, config):
    """Whether a file may hold this besides the parameters: the head of a tied model, and RoPE's frequencies."""
    return name.endswith(FREQUENCIES) or (name == "lm_head.weight" and config.tied)


def check_said_again(name, tensors, config, path):
    """ValueError unless such a tensor says what the embedding, or the config, says already."""
    told = tensors[name]()
    if name == "lm_head.weight":
        embedding = tensors["embed_tokens.weight"]()
        # == compares the values of two dtypes, and torch.equal does not
        if told.shape != embedding.shape or not bool((told == embedding).all()):
            raise ValueError(f"{path}: its config ties the head to the embedding, and lm_head.weight is another "
                             "matrix: which of them counts? Set tie_word_embeddings to false to use that head, or "
                             "take lm_head.weight out")
        return
    D = config.head_width
    ours = config.rope_theta ** -(torch.arange(0, D, 2).double() / D)
    as_16_bits_go = dict(rtol=0.02, atol=1e-7)
    if told.shape != ours.shape or not torch.allclose(told.double(), ours, **as_16_bits_go):
        raise ValueError(f"{path}: {name} is not that of the config's rope_theta={config.rope_theta}: which of them "
                         "counts? Correct the config, or take the buffer out")


# ---------------------------------------------------------------- directories

def settings_of_directory(path):
    config_file = path / "config.json"
    found = config_of_directory(path)
    kind = found.get("model_type")
    if kind == "nanorat":
        others = "model_type", "architectures", "files", "tokenizer"
        return {name: value for name, value in found.items() if name not in others}
    if kind == "olmo2":
        return settings_of_olmo2(found, config_file)
    raise ValueError(f"{config_file}: model_type is {short(kind)}, and only 'olmo2' and 'nanorat' can be loaded here")


def config_of_directory(path):
    """config.json, an object; if we wrote it, as we wrote it."""
    config_file = path / "config.json"
    if not config_file.exists():
        raise FileNotFoundError(f"{config_file} is missing: is {path} a model's directory?")
    found = read_json(config_file)
    if not isinstance(found, dict) or not isinstance(found.get("files", {}), dict):
        raise ValueError(f"{config_file} is no configuration, but {short(found)}: fetch it again")
    return opened_seal(found, config_file)


OLMO2 = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "clip_qkv": None,
         "sliding_window": None, "partial_rotary_factor": 1.0, "quantization_config": None}  # else it is another model


def settings_of_olmo2(found, config_file):
    """Hugging Face's names -> ours. Transformers 4 writes rope_theta at the top, 5 inside rope_parameters."""
    for name, value in OLMO2.items():
        if found.get(name, value) != value:
            raise ValueError(f"{config_file}: {name}={short(found[name])}, and OLMo 2 has {value!r}: this is another model")
    architectures = found.get("architectures") or ["Olmo2ForCausalLM"]
    if architectures != ["Olmo2ForCausalLM"]:
        raise ValueError(f"{config_file}: architectures={short(architectures)}, and model_type is 'olmo2': "
                         "this is another model")
    ropes = {name: found[name] for name in ("rope_parameters", "rope_scaling") if found.get(name)}
    for name, rope in ropes.items():
        if not isinstance(rope, dict):
            raise ValueError(f"{config_file}: {name}={short(rope)} is no object: fetch it again")
        for key in "rope_type", "type":  # older files say type
            if (rope.get(key) or "default") != "default":
                raise ValueError(f"{config_file}: {key}={short(rope[key])} is not supported, only 'default' is")
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(f"{config_file}: {name} rotates a part of each head, and OLMo 2 all of it: "
                             "this is another model")
    names = {"vocab_size": "vocab_size", "n_layer": "num_hidden_layers", "width": "hidden_size",
             "n_head": "num_attention_heads", "mlp_width": "intermediate_size", "norm_eps": "rms_norm_eps",
             "context_len": "max_position_embeddings"}
    thetas = {f"{name}.rope_theta": rope.get("rope_theta") for name, rope in ropes.items()}
    thetas["rope_theta"] = found.get("rope_theta")
    try:
        settings = {ours: found[theirs] for ours, theirs in names.items()}
        settings["rope_theta"] = one_theta(thetas, config_file)
    except KeyError as error:
        raise ValueError(f"{config_file} lacks {error}: fetch it again") from None
    kv_heads, head_dim = found.get("num_key_value_heads"), found.get("head_dim")
    width, n_head, vocab_size = settings["width"], settings["n_head"], settings["vocab_size"]
    ints = all(type(size) is int for size in (head_dim, width, n_head))
    if head_dim is not None and not (ints and head_dim * n_head == width):
        raise ValueError(f"{config_file}: head_dim={short(head_dim)}, and OLMo 2 has hidden_size={short(width)} / "
                         f"num_attention_heads={short(n_head)}: this is another model")
    settings["n_kv_head"] = n_head if kv_heads is None else kv_heads
    settings["tied"] = found.get("tie_word_embeddings", False)
    settings["eos_id"] = eos_of(found.get("eos_token_id"), vocab_size, config_file)
    return settings


def one_theta(told, config_file):
    """The value of rope_theta's fields, {field: value or None}. ValueError if two differ, KeyError if there is none."""
    told = {field: value for field, value in told.items() if value is not None}
    if not told:
        raise KeyError("rope_theta")
    first, *_ = told
    for field, value in told.items():
        if value != told[first]:
            raise ValueError(f"{config_file}: {first}={short(told[first])} and {field}={short(value)}: which of them "
                             "counts? Take the other out")
    return told[first]


def eos_of(told, vocab_size, config_file):
    """
    config.json's end of text; None if the vocabulary has no such token, being cut to a smaller one, say. Nothing is
    computed by it: sample.py and eval_niah.py end a text at the tokenizer's. A list may name several, as chat models'
    do: then one alone is kept, and it is said.
    """
    if isinstance(told, list) and told:
        if told != told[:1] * len(told):
            print(f"note: {config_file}: of eos_token_id={short(told)} the first is kept; texts end at the tokenizer's",
                  file=sys.stderr)
        told = told[0]
    outside = type(told) is int and type(vocab_size) is int and not 0 <= told < vocab_size
    return None if outside else told


def files_of_directory(path):
    """The names of its weights' files, and which of them has which tensor as the index says, {} if there is none."""
    index_file, placed = path / INDEX, {}
    named_as_usual = sorted(file.name for file in path.iterdir() if WEIGHTS.fullmatch(file.name))
    if index_file.exists():
        index = read_json(index_file, most=8 << 20)
        placed = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(placed, dict) or not placed or not all(isinstance(file, str) for file in placed.values()):
            raise ValueError(f"{index_file} is no index of weights: fetch it again")
        files = sorted(set(placed.values()))
        for file in files:
            if not re.fullmatch(r"\w[\w.-]*\.safetensors", file, re.ASCII):
                raise ValueError(f"{index_file}: {short(file)} is no name of a .safetensors file beside it: fetch it again")
            if not (path / file).exists():
                raise FileNotFoundError(f"{path / file} is missing, though {index_file.name} names it: fetch that shard")
        sets = {INDEX} | {"model.safetensors"}.intersection(named_as_usual) - set(files)
    else:
        files = named_as_usual
        if not files:
            raise FileNotFoundError(f"{path} holds no model.safetensors, nor parts of one called "
                                    "model-00001-of-00002.safetensors: fetch them, convert a .bin, or rename yours")
        sets = {re.sub(r"\d{5}-of", "*-of", file) for file in files}
    if len(sets) > 1:
        raise ValueError(f"{path} holds weights twice, {' and '.join(sorted(sets))}: which of them count? "
                         "Move the others away")
    if not placed and missing(files):
        raise FileNotFoundError(f"{path / missing(files)[0]} is missing, though {files[0]} is there: "
                                "restore it from a copy")
    return files, placed


def our_name(theirs):
    """
    A tensor's name in model.py: without what the model, or a part of it, was wrapped in ("model.",
    and WRAPPERS at any place), and with the memory's projection in the memory.
    """
    name = re.sub(r"^(model\.)+", "", WRAPPERS.sub("", theirs))
    return name.replace(".self_attn.memory_proj.", ".self_attn.memory.proj.")


def stored_name(name):
    """The inverse, without "model.": RAT+'s memory came before there were others."""
    return name.replace(".self_attn.memory.proj.", ".self_attn.memory_proj.")


def tensors_of_directory(path, hashed=True):
    """{name: () -> tensor}. Files stay mapped; a tensor is read when its function is called."""
    files, placed = files_of_directory(path)
    with ThreadPoolExecutor(max_workers=8) as pool:  # hashing is all arithmetic, on a core each
        mapped = dict(zip(files, pool.map(checked if hashed else opened, [path / file for file in files])))
    as_written(path, mapped, files)
    tensors, rows = {}, {}
    for file, content in mapped.items():
        places = rows_of(content, path / file)
        for theirs in content.keys():
            load = lambda content=content, theirs=theirs: content.get_tensor(theirs)
            ours = our_name(theirs)
            if (dtype := content.get_slice(theirs).get_dtype()) not in DTYPES:
                raise ValueError(f"{path / file}: {short(theirs)} is of type {dtype}, and weights are of {', '.join(DTYPES)}: fetch a file of those")
            shape = content.get_slice(theirs).get_shape()
            if places and 0 in shape[:1]:
                continue  # of a GPU that has none of its rows
            if ours in tensors or (ours in rows and (not places or places[theirs] in rows[ours])):
                raise ValueError(f"{path / file}: {short(theirs)} is in another place too: which of them counts? Fetch the files again")
            if places:
                rows.setdefault(ours, {})[places[theirs]] = load, shape
            else:
                tensors[ours] = load
        here = {our_name(theirs) for theirs in content.keys()}
        for theirs in sorted(name for name, where in placed.items() if where == file):
            if our_name(theirs) not in here:
                raise ValueError(f"{path / file} has no {short(theirs)}, which the index sees there: fetch both again")
    return tensors | {name: joined(name, parts, path) for name, parts in rows.items()}


def joined(name, parts, path):
    """A tensor whose rows are in several files, as a function that loads it. parts: {its first row: (the part's function, its shape)}"""
    parts, end = sorted(parts.items()), 0
    loads, shapes = [load for _, (load, _) in parts], [shape for _, (_, shape) in parts]
    for (first, _), shape in zip(parts, shapes):
        if first != end or shape[1:] != shapes[0][1:] or (not shape and len(parts) > 1):
            raise ValueError(f"{path}: the rows of {short(name)} do not follow each other from file to file: restore them from a copy")
        end += (shape or [1])[0]
    return lambda: torch.cat([load() for load in loads]) if len(loads) > 1 else loads[0]()


def as_written(path, mapped, there):
    """
    ValueError unless the files `there` are those that our config.json was written with; others' tells none.
    mapped: {name: opened file}, of these or of some of them.
    """
    told = config_of_directory(path).get("files", {})
    remedy = f"restore all from a copy, or take 'files' and {SEAL!r} out of config.json if you meant to"
    kinds = {kind_of(file) for file in there}
    for file in sorted(set(told).symmetric_difference(there)):
        found = "is there, and not in" if file in there else "is not there, though in"
        if told and kind_of(file) in kinds:  # a model may be read where the optimizer's files are gone
            raise ValueError(f"{path / file} {found} config.json's 'files': {remedy}")
    for file, opened_file in mapped.items():
        if told and told_hash(opened_file) != told[file]:
            raise ValueError(f"{path / file} is not the file that config.json was written with: {remedy}")


def kind_of(file):
    """model of model-00001-of-00002.safetensors, likewise optimizer"""
    return re.match(r"\w*", file)[0]


def opened(file, remedy=None):
    """A safetensors file, mapped. ValueError, with the remedy, if its head does not describe what is there."""
    with open(regular(file), "rb") as start:
        header = int.from_bytes(start.read(8), "little")
    if header > 8 << 20:  # of a thousand layers and their moments
        raise ValueError(f"{file} is damaged, or no model's: its header would have {header:,} bytes; {remedy or 'fetch it again'}")
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged or incomplete ({short(str(error))}): {remedy or 'fetch it again'}") from None


def told_hash(mapped):
    """What a file written here says of its content; None from others."""
    return (mapped.metadata() or {}).get("sha256")


def checked(file, remedy=None):
    """opened, and ValueError too if its content is not what its hash says."""
    mapped = opened(file, remedy)
    expected = told_hash(mapped)
    if expected and expected != content_hash({name: mapped.get_tensor(name) for name in mapped.keys()}, mapped.metadata().get(PLACES)):
        raise ValueError(f"{file} is damaged: its content does not match its hash; {remedy or 'restore it from a copy'}")
    return mapped


def rows_of(mapped, file):
    """Where the rows of each tensor in one of several GPUs' files begin, {name: row}; None for a file of whole tensors."""
    places = (mapped.metadata() or {}).get(PLACES)
    try:
        places = places and parse_json(places.encode())
        firsts = places and {name: (places[name]["saved_offsets"] or [0])[0] for name in mapped.keys()}
        if firsts and not all(type(first) is int and first >= 0 for first in firsts.values()):
            raise ValueError
        return firsts
    except (ValueError, KeyError, TypeError, IndexError):
        raise ValueError(f"{file} tells not whose rows it holds: restore it from a copy") from None


def write(path, config, state, tokenizer=None):
    """
    Save a model into the directory `path`: its tensors (state: {name: tensor}), its tokenizer's files if there is one
    (of data.py), and config.json, last.

    A pure OLMo 2 is written as one, and opens in transformers. Anything else gets a model_type of its own, so that no
    other program drops its gates unknowingly. All files appear or none does; OSError names what failed. A model that we
    saved there before makes way, and other names stay; ValueError if what is in the way is not ours.
    """
    path = Path(path)
    before = has_our_mark(path)
    beside = {} if tokenizer is None else tokenizer.files
    in_the_way = [path / name for name, ours in before.items() if not ours]
    in_the_way += [path / name for name, file in beside.items() if differ(path / name, file)]
    if in_the_way:
        raise ValueError(f"{in_the_way[0]} is in the way, and is not ours to replace: choose another folder, or move "
                         "it away")
    path.mkdir(parents=True, exist_ok=True)
    state = {hf_name(name): tensor for name, tensor in state.items()}
    shards, size = [{}], 0
    for name, tensor in state.items():
        size += tensor.nbytes
        if size > SHARD_BYTES and shards[-1]:
            shards.append({})
            size = tensor.nbytes
        shards[-1][name] = tensor
    weight_map, hashes, files = {}, {}, {}
    for number, shard in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(shard, file)
        files[path / file] = lambda temporary, file=file, shard=shard: hashes.update({file: save_shard(shard, temporary)})
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(t.nbytes for t in state.values())}, "weight_map": weight_map}
        files[path / INDEX] = lambda file: file.write_text(json.dumps(index, indent=1))
    for name, source in beside.items():
        files[path / name] = lambda temporary, source=source: copyfile(source, temporary)
    dtype, called = str(next(iter(state.values())).dtype).removeprefix("torch."), getattr(tokenizer, "name", None)
    files[path / "config.json"] = lambda file: file.write_text(config_json(config, dtype, hashes, called))
    all_or_nothing(files)
    for old in before.keys() - {file.name for file in files}:
        (path / old).unlink()


def differ(path, other):
    """Whether there is a file at `path` that is not the same as the other."""
    return path.exists() and path.read_bytes() != other.read_bytes()


def has_our_mark(path):
    """
    {name: whether we wrote it} of what a reader takes for the model in a directory: config.json with our seal, weights
    with our hash, or, if they are damaged, named by that config.json, and an index of such files.
    """
    names = sorted(file.name for file in path.iterdir()) if path.is_dir() else []
    config, marks = sealed_config(path), {}
    for name in filter(WEIGHTS.fullmatch, names):
        try:
            marks[name] = told_hash(opened(path / name)) is not None
        except (ValueError, OSError):
            marks[name] = name in config.get("files", {})
    if INDEX in names:
        indexed = any_json(path / INDEX).get("weight_map")
        marks[INDEX] = isinstance(indexed, dict) and all(marks.get(str(file)) for file in indexed.values())
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


def hf_name(name):
    """A parameter's name in files."""
    name = stored_name(name)
    return name if name.startswith("lm_head") else f"model.{name}"


def missing(files):
    """The names that files called NAME-00001-of-00003.safetensors belong with and that are not among them, in order."""
    wanted = set()
    for file in files:
        if found := re.fullmatch(r"(.+-)\d{5}(-of-(\d{5})\.safetensors)", file):
            wanted |= {f"{found[1]}{n:05d}{found[2]}" for n in range(1, int(found[3]) + 1)}
    return sorted(wanted - set(files))


def save_shard(shard, file, places=None):
    """
    Tensors into a file with a hash of their content, which is returned. places: {name: where it begins in a whole tensor}; None:
    all are whole. OSError if there is no room.
    """
    shard = {name: tensor.detach().cpu().contiguous() for name, tensor in shard.items()}
    more = {} if places is None else {PLACES: json.dumps({name: {"saved_offsets": list(place)} for name, place in places.items()})}
    told = content_hash(shard, more.get(PLACES))
    try:
        save_file(shard, file, metadata={"format": "pt", "sha256": told, **more})
        in_order(file)
    except SafetensorError as error:
        raise OSError(error) from None
    return told


def in_order(file):
    """
    Puts a file's metadata into one order. safetensors draws it anew for each file, so the same weights would be other
    bytes, and whoever compares files would see a difference that there is not.
    """
    with open(file, "r+b") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= length, f"{file}: a header of {len(text)} bytes where {length} were"
        opened.seek(8)
        opened.write(text.ljust(length))


def config_json(config, dtype, hashes, tokenizer=None):
    """
    config.json's text, sealed. hashes: {file of weights beside it: what it tells of its content}; tokenizer: its name,
    where it is known, by which data.tokenizer_of finds a wrong one.
    """
    known = {} if tokenizer is None else {"tokenizer": tokenizer}
    return json.dumps(sealed(described(config, dtype) | known | {"files": hashes}), indent=1)


def described(config, dtype):
    """What config.json says of the model: what transformers reads, if it is OLMo 2."""
    is_olmo2 = not (config.pre_norm or config.output_gate or config.memory) and config.qk_norm and config.swiglu
    if not is_olmo2:
        return {"model_type": "nanorat", "architectures": ["Transformer"], **asdict(config)}
    return {
        "model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"], "torch_dtype": dtype,
        "vocab_size": config.vocab_size, "num_hidden_layers": config.n_layer, "hidden_size": config.width,
        "num_attention_heads": config.n_head, "num_key_value_heads": config.n_kv_head,
        "intermediate_size": config.mlp_width, "max_position_embeddings": config.context_len,
        "rope_theta": config.rope_theta, "rms_norm_eps": config.norm_eps, "tie_word_embeddings": config.tied,
        "hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0,
        "eos_token_id": config.eos_id, "bos_token_id": None, "pad_token_id": None,
    }


def content_hash(tensors, places=None):
    """sha256 over names, dtypes, shapes and bytes of {name: tensor}, in the order of names; and over the text that says whose rows they are."""
    digest = hashlib.sha256((places or "").encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# ---------------------------------------------------------------- official RAT+ checkpoints

def read_ratplus(path):
    """
    An official RAT+ .pth: {"task": state dict, ...}. Its in_proj packs output gate, q, k, v and memory gate, C rows
    each; older files keep the last in fgate_proj; a model without memory has no fifth. torch.compile may have left
    "_orig_mod." anywhere in a key. The head is the embedding.
    """
    sizes = parts_of_pickle(path)
    try:
        # the trainer's config is an EasyDict: read as a plain dictionary, which runs none of its code
        with torch.serialization.safe_globals([(OrderedDict, "easydict.EasyDict")]):
            file = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # unpickling errors have no common class
        raise ValueError(f"{path} is damaged or no RAT+ checkpoint ({short(str(error).partition(chr(10))[0] or type(error).__name__)}): fetch it again") from None
    if not isinstance(file, dict) or not isinstance(file.get("task"), dict):
        raise ValueError(f"{path} has no state dict under 'task': it is no RAT+ checkpoint")
    state = {our_name(str(name)): tensor for name, tensor in file["task"].items()}
    if len(state) < len(file["task"]):
        raise ValueError(f"{path}: a tensor is there twice, with and without a prefix like '_orig_mod.': fetch it again")
    for name, tensor in state.items():
        if not (isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu" and tensor.is_contiguous()
                and tensor.dtype in (torch.float32, torch.bfloat16, torch.float16)):
            raise ValueError(f"{path}: {short(name)} is no tensor of plain weights: it is no RAT+ checkpoint")
    # what is mapped is not compared with its part: one that is too short would go on into the next
    storages = {tensor.data_ptr() - tensor.storage_offset() * tensor.itemsize: tensor.untyped_storage().nbytes() for tensor in state.values()}
    if Counter(storages.values()) - sizes:
        raise ValueError(f"{path} is damaged: its parts are not as long as its tensors: fetch it again")
    first = "backbone.layers.0."
    needed = {"embedding.wte.weight", first + "hidden_layer.fc1.weight", first + "seq_layer.in_proj.weight"}
    for name in sorted(needed | {name for name in state if "seq_layer.in_proj" in name}):
        if name not in state or state[name].dim() != 2:
            raise ValueError(f"{path} lacks {name!r}, a matrix: it is no RAT+ checkpoint")
    vocab_size, C = state["embedding.wte.weight"].shape
    mlp_width, rows = state[first + "hidden_layer.fc1.weight"].shape[0], state[first + "seq_layer.in_proj.weight"].shape[0]
    n_layer = len({name.split(".")[2] for name in state if name.startswith("backbone.layers.")})
    memory = rows == 5 * C or "backbone.layers.0.seq_layer.fgate_proj.weight" in state
    try:  # where the trainer's config is there, it knows; files of weights alone have heads of 128
        n_head = file["config"]["model"]["backbone"]["seq_cell"]["num_head"]
    except (KeyError, TypeError):
        n_head = C // 128
    settings = dict(vocab_size=vocab_size, n_layer=n_layer, width=C, n_head=n_head, n_kv_head=n_head,
                    mlp_width=mlp_width, context_len=4096, rope_theta=10000.0, norm_eps=1e-6, tied=True, pre_norm=True,
                    qk_norm=False, swiglu=False, output_gate=True, memory=memory, eos_id=2)

    head = state.get("head.lm_head.weight")
    if head is not None and not torch.equal(head, state["embedding.wte.weight"]):
        raise ValueError(f"{path}: head.lm_head.weight differs from the embedding, and RAT+ ties them")
    renamed = {"embedding.wte": "embed_tokens", "backbone.ln": "norm", "backbone.layers.": "layers.",
               "seq_layer.input_norm": "input_layernorm", "seq_layer.out_proj": "self_attn.o_proj",
               "seq_layer.fgate_proj": "self_attn.memory.proj", "hidden_layer.ln": "pre_feedforward_layernorm",
               "hidden_layer.fc1": "mlp.up_proj", "hidden_layer.fc2": "mlp.down_proj"}
    packed = "output_gate", "q_proj", "k_proj", "v_proj", "memory.proj"
    tensors = {}
    for name, tensor in state.items():
        if name == "head.lm_head.weight":
            continue
        for theirs, ours in renamed.items():
            name = name.replace(theirs, ours)
        # a fifth part that this model does not want, or lacks, shows in fill
        parts = zip(packed, tensor.split(C)) if "seq_layer.in_proj" in name else [("", tensor)]
        for part, chunk in parts:
            ours = name.replace("seq_layer.in_proj", f"self_attn.{part}")
            if ours in tensors:
                raise ValueError(f"{path}: {short(ours)} is there twice, under two names: which of them counts? "
                                 "Fetch it again")
            tensors[ours] = lambda chunk=chunk: chunk
    if memory:  # RAT+'s gate has no bias
        dtype = state["embedding.wte.weight"].dtype
        tensors |= {f"layers.{i}.self_attn.memory.proj.bias": lambda: torch.zeros(C, dtype=dtype) for i in range(n_layer)}
    return settings, tensors


def parts_of_pickle(path):
    """
    -> how many parts there are of each size, a Counter. ValueError unless this .pth is a zip file whose parts are stored as they are,
    and whole, and whose pickle names nothing but tensors and dictionaries. So what torch.load makes of it is no larger than the
    file. It takes 1 s a GB: the checksums.
    """
    plain = re.compile(r"collections OrderedDict|easydict EasyDict|torch._utils (_rebuild_tensor_v2|_rebuild_parameter)|torch (\w+Storage|Size|device|bool|(b?float|u?int|complex)\d+)|_codecs encode|(__builtin__|builtins) set")
    regular(path)
    try:
        with zipfile.ZipFile(path) as file:
            parts = file.infolist()
            if any(part.compress_type != zipfile.ZIP_STORED for part in parts) or sum(part.file_size for part in parts) > path.stat().st_size:
                raise ValueError("its parts are compressed, which torch.save does not do")
            if len({part.filename for part in parts}) < len(parts):
                raise ValueError("a part comes twice")
            if (damaged := file.testzip()) is not None:
                raise ValueError(f"its part {damaged} does not match its checksum")
            pickles = [part for part in parts if part.filename.endswith("/data.pkl")]
            if not pickles:
                raise ValueError("it holds no pickle")
            for code, name, _ in pickletools.genops(file.read(pickles[0])):
                if code.name in ("STACK_GLOBAL", "INST") or code.name.startswith("EXT") or (code.name == "GLOBAL" and not plain.fullmatch(name)):
                    raise ValueError(f"it asks for {name or 'something hidden'}, which is no part of weights")
            return Counter(part.file_size for part in parts)
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError, EOFError, RuntimeError, IndexError, struct.error, zlib.error) as error:
        raise ValueError(f"{path} is damaged or no RAT+ checkpoint ({short(str(error))}): fetch it again") from None


def check_config(config):
    """ValueError unless a model can be made of a model.Config: it may come from a file."""
    for field in fields(config):
        value, kinds = getattr(config, field.name), get_args(field.type) or (field.type,)
        # true is an int to isinstance
        if type(value) not in kinds and not (float in kinds and type(value) is int):
            wanted = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"{field.name} is {short(value)}, not of type {wanted}")
    sizes = (config.vocab_size, config.n_layer, config.width, config.n_head, config.n_kv_head,
             config.mlp_width, config.context_len)
    if (min(sizes) < 1 or max(sizes) >= 2**28 or config.width % config.n_head
            or config.n_head % config.n_kv_head or config.head_width % 2):
        raise ValueError(f"sizes do not fit together: width={config.width} must be "
                         f"n_head={config.n_head} heads of an even width, n_head a multiple of "
                         f"n_kv_head={config.n_kv_head}, and all at least 1 and below 2**28")
    if not (0 < config.rope_theta < 1e30 and 0 <= config.norm_eps < 1):
        raise ValueError(f"rope_theta={short(config.rope_theta)} must be above 0 and below 1e30, "
                         f"norm_eps={config.norm_eps} from 0 to 1")
    if config.eos_id is not None and not 0 <= config.eos_id < config.vocab_size:
        raise ValueError(f"eos_id={short(config.eos_id)} is no token of {config.vocab_size}")


def config_of(kind, settings, path):
    """The Config, a class, of what read found at `path`. ValueError if it is none."""
    try:
        return kind(**settings)
    except (TypeError, ValueError) as error:  # a field of another name, type or size
        raise ValueError(f"{path}: its config describes no model here ({short(str(error))}): "
                         "fetch it again") from None
