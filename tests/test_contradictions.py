"""
One thing said in two places: it is the same, or it is refused in one line that names both and says what to do. Never is one of
them believed without a word.

Two tables, of a small OLMo 2 as others write it: what is refused, and what loads and as what. A new field or file that says
what another one says belongs into one of them.
"""
import itertools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from infra import checkpoint
from infra import parallel
from infra import weights
from conftest import official_names, one_line, save_pth, tiny
from model import Transformer
from test_checkpoint import BYTES, made
from test_hostile import foreign

HEAD, EMBEDDING, NORM, FREQUENCIES = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight", "model.rotary_emb.inv_freq"
ONE, INDEX = "model.safetensors", "model.safetensors.index.json"


def config(folder, **changes):
    """Fields of config.json; None takes one out."""
    file = folder / "config.json"
    found = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in found.items() if value is not None}))


def tensors(folder, change, file=ONE):
    found = {name: tensor.clone() for name, tensor in load_file(folder / file).items()}
    change(found)
    save_file(found, folder / file, metadata={"format": "pt"})


def put(name, tensor):
    return lambda folder: tensors(folder, lambda found: found.update({name: tensor}))


def tied(head=None):
    """The file's head stays, and the config ties it; head: another one for the file."""
    def change(folder):
        config(folder, tie_word_embeddings=True)
        tensors(folder, lambda found: found.update({HEAD: found[HEAD] if head is None else head(found[EMBEDDING])}))
    return change


def said(**changes):
    return lambda folder: config(folder, **changes)


def split(folder, parts):
    """As shards without an index."""
    found = load_file(folder / ONE)
    for n in range(parts):
        some = {name: found[name] for name in sorted(found)[n::parts]}
        save_file(some, folder / f"model-{n + 1:05d}-of-{parts:05d}.safetensors", metadata={"format": "pt"})


def index_of(folder, parts):
    placed = {name: file.name for file in folder.glob(f"*-of-{parts:05d}.safetensors") for name in load_file(file)}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": placed}))


def sharded(then, one=False, parts=(2,), index=True):
    """Shards, then a change to them. one: model.safetensors stays, parts: of how many files; index: of the last ones."""
    def change(folder):
        for n in parts:
            split(folder, n)
        if index:
            index_of(folder, parts[-1])
        if not one:
            (folder / ONE).unlink()
        then(folder)
    return change


def misplaced(folder):
    found = json.loads((folder / INDEX).read_text())
    found["weight_map"][NORM] = next(file for file in found["weight_map"].values() if file != found["weight_map"][NORM])
    (folder / INDEX).write_text(json.dumps(found))


def twice(folder):
    for file in folder.glob("*.safetensors"):
        tensors(folder, lambda found: found.update({NORM: torch.ones(32)}), file.name)


def frequencies(theta, D=8):
    return theta ** -(torch.arange(0, D, 2) / D)


def ours(change, **form):
    """A model that we wrote, then changed."""
    def make(folder):
        shutil.rmtree(folder)
        tiny(**form).save_pretrained(folder)
        change(folder)
    return make


def unsealed(**changes):
    return lambda folder: config(folder, sha256=None, files=None, **changes)


def other_weights(folder):
    """Ours too, of another model."""
    tiny(seed=1).save_pretrained(folder / "other")
    shutil.move(folder / "other" / ONE, folder / ONE)


def in_other_files(folder):
    split(folder, 2)
    (folder / ONE).unlink()


nothing = lambda folder: None
REFUSED = {
    # the head
    "a tied config, another head": (tied(), ["tie", HEAD, "Set tie_word_embeddings to false"]),
    "a tied config, a head of another shape": (tied(lambda embedding: embedding[:-1].clone()), ["tie", HEAD]),
    "a tied config, and an embedding that is not finite": (tied(lambda embedding: embedding.fill_(torch.nan).clone()), ["not finite"]),
    "a tied config, a head that is nearly it": (tied(lambda embedding: embedding.bfloat16()), ["tie", HEAD]),
    "an untied config, no head": (lambda folder: tensors(folder, lambda found: found.pop(HEAD)), ["lacks", HEAD]),
    # positions
    "two rope_theta": (said(rope_parameters={"rope_theta": 5.0}), ["rope_theta=10000.0", "rope_parameters.rope_theta=5.0"]),
    "two rope_theta in two objects": (said(rope_theta=None, rope_parameters={"rope_theta": 5.0}, rope_scaling={"rope_theta": 6.0}),
                                      ["rope_parameters.rope_theta", "rope_scaling.rope_theta"]),
    "two types of RoPE": (said(rope_scaling={"rope_type": "default", "type": "linear"}), ["type='linear'"]),
    "two types of RoPE in two objects": (said(rope_parameters={"rope_type": "default"}, rope_scaling={"rope_type": "yarn"}), ["'yarn'"]),
    "frequencies of another rope_theta": (put(FREQUENCIES, frequencies(500000.0)), ["rotary_emb.inv_freq", "rope_theta=10000.0"]),
    "frequencies of a scaled RoPE": (put(FREQUENCIES, frequencies(10000.0) / 2), ["rotary_emb.inv_freq"]),
    "frequencies of other heads": (put(FREQUENCIES, frequencies(10000.0, 16)), ["rotary_emb.inv_freq"]),
    # sizes
    "head_dim": (said(head_dim=16), ["head_dim=16", "hidden_size=32", "num_attention_heads=4"]),
    "num_key_value_heads": (said(num_key_value_heads=2), ["k_proj", "(32, 32)", "(16, 32)"]),
    "vocab_size": (said(vocab_size=64), ["embed_tokens", "61", "64"]),
    "more layers in the config": (said(num_hidden_layers=3), ["3 layers", "2"]),
    "fewer layers in the config": (said(num_hidden_layers=1), ["1 layers", "2"]),
    "a gap in the layers": (lambda folder: tensors(folder, lambda found: found.update(
        {name.replace("layers.1", "layers.2"): found.pop(name) for name in list(found) if "layers.1" in name})), ["lacks 'layers.1"]),
    # which model
    "architectures": (said(architectures=["LlamaForCausalLM"]), ["architectures", "'LlamaForCausalLM'", "'olmo2'"]),
    "a part of each head rotated": (said(rope_parameters={"partial_rotary_factor": 0.5}), ["rope_parameters"]),
    "quantised, and plain weights": (said(quantization_config={"bits": 4}), ["quantization_config"]),
    "a memory in the weights": (ours(unsealed(memory=False), memory=True), ["memory_proj"]),
    "a memory in the config": (ours(unsealed(memory=True, pre_norm=False), memory=False, output_gate=True), ["lacks", "memory_proj"]),
    # which files
    "one file, and an index of others": (sharded(nothing, one=True), [ONE, INDEX, "Move the others away"]),
    "one file, and shards": (sharded(nothing, one=True, index=False), [ONE, "model-*-of-00002", "Move the others away"]),
    "two sets of shards": (sharded(nothing, parts=(2, 3), index=False), ["of-00002", "of-00003", "Move the others away"]),
    "a shard fewer than its name says": (sharded(lambda folder: (folder / "model-00002-of-00003.safetensors").unlink(), parts=(3,), index=False),
                                         ["model-00002-of-00003", "missing"]),
    "the index has a tensor elsewhere": (sharded(misplaced), ["norm.weight", "index"]),
    "a tensor in two shards": (sharded(twice), ["norm.weight", "another place"]),
    "a tensor under two names": (put("module." + NORM, torch.ones(32)), ["norm.weight", "another place"]),
    "our config, other weights of ours": (ours(other_weights), [ONE, "config.json"]),
    "our config, weights that are not ours": (ours(lambda folder: tensors(folder, lambda found: None)), [ONE, "config.json"]),
    "our config, other files": (ours(in_other_files), ["config.json's 'files'"]),
    "a run, and a model in its folder": (lambda folder: tiny().save_pretrained(folder / "step_0000007"), ["checkpoints", "step_0000007"]),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_contradicts_itself_is_refused(what, tmp_path):
    """One of two statements believed, and a table made with a model that nobody trained."""
    change, words = REFUSED[what]
    foreign(tmp_path / "model", 1)
    change(tmp_path / "model")
    with pytest.raises((ValueError, FileNotFoundError)) as raised:
        Transformer.from_pretrained(tmp_path / "model")
    one_line(raised, tmp_path / "model", *words)


def others_beside(folder):
    for name in "model_best.safetensors", "model-before-sft.safetensors", "model.safetensors.bak", "optimizer.safetensors":
        (folder / name).write_bytes(b"not even weights")


# OLMo-2-0425-1B's config.json on the hub has these fields beside its sizes, as transformers 4 wrote it
HUB = dict(architectures=["Olmo2ForCausalLM"], attention_bias=False, attention_dropout=0.0, hidden_act="silu", initializer_range=0.02,
           pad_token_id=100277, rope_theta=10000, tie_word_embeddings=False, torch_dtype="float32",
           transformers_version="4.47.0.dev0", use_cache=False)


def as_on_the_hub(folder):
    sharded(nothing)(folder)
    config(folder, **HUB)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"use_cache"', '"rope_scaling": null, "use_cache"'))
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')


CONSISTENT = {
    # a change, and what makes of the model's {name: tensor} what is expected
    "the same rope_theta twice": said(rope_parameters={"rope_theta": 10000, "rope_type": "default"}),
    "rope_theta null at the top": said(rope_theta=None, rope_parameters={"rope_theta": 10000.0, "rope_type": "default"}),
    "the same frequencies": put(FREQUENCIES, frequencies(10000.0)),
    "the same frequencies of each layer, in 16 bits": put("model.layers.1.self_attn.rotary_emb.inv_freq", frequencies(10000.0).bfloat16()),
    "the same head_dim": said(head_dim=8),
    "tie_word_embeddings missing, and a head": said(tie_word_embeddings=None),
    "another torch_dtype": said(torch_dtype="bfloat16"),
    "dtype and torch_dtype": said(torch_dtype="float16", dtype="bfloat16"),
    "num_key_value_heads missing": said(num_key_value_heads=None),
    "one end of text in a list": said(eos_token_id=[5, 5]),
    "an index, and what is left of other shards": sharded(lambda folder: (folder / "model-00001-of-00002.safetensors").touch(), parts=(2, 3)),
    "as on the hub": as_on_the_hub,
    "shards without an index": sharded(nothing, index=False),
    "files of other names beside": others_beside,
    "a byte order mark": lambda folder: (folder / "config.json").write_bytes(b"\xef\xbb\xbf" + (folder / "config.json").read_bytes()),
}


@pytest.mark.parametrize("what", CONSISTENT)
def test_what_agrees_or_is_of_no_matter_loads(what, tmp_path):
    """A refusal of what the world writes; a file's dtype overruled by a field that half of the hub has wrong."""
    model = foreign(tmp_path, 1)
    CONSISTENT[what](tmp_path)
    loaded = Transformer.from_pretrained(tmp_path)
    assert loaded.config == model.config
    for (name, one), (other, two) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert name == other and one.dtype == two.dtype and torch.equal(one, two), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tied_model_may_have_its_head_in_the_file_too(dtype, tmp_path):
    """transformers' files of tied models sometimes repeat the embedding as lm_head; a head in another dtype is compared by value."""
    model = foreign(tmp_path, 1, tied=True)
    coarse = lambda found: {name: tensor.bfloat16().float() for name, tensor in found.items()}
    tensors(tmp_path, lambda found: found.update(coarse(found)))
    tensors(tmp_path, lambda found: found.update({HEAD: found[EMBEDDING].to(dtype, copy=True)}))
    loaded = Transformer.from_pretrained(tmp_path)
    assert loaded.config == model.config and "lm_head.weight" not in loaded.state_dict()


# ---------------------------------------------------------------- names

WRAPPED = ["_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"]


def named(name, prefixes, inside):
    """A tensor's name, prefixes before it and what wraps a layer inside of it."""
    return ".".join([*prefixes, name.replace("layers.0.", f"layers.0.{inside}.") if inside else name])


@pytest.mark.parametrize("prefixes", [[], ["model"], ["model", "model"], *([wrap] for wrap in WRAPPED),
                                      *itertools.permutations(["module", "_orig_mod", "model"]), ["model", "_orig_mod", "model"]], ids=".".join)
def test_what_a_model_was_wrapped_in_is_no_part_of_names(prefixes, tmp_path):
    """The usual checkpoints of torch.compile, DDP and FSDP, which have all weights, refused for their names."""
    for inside in None, *WRAPPED:
        folder = tmp_path / str(inside)
        model = foreign(folder, 2)
        for file in folder.glob("*.safetensors"):
            save_file({named(name.removeprefix("model."), prefixes, inside): tensor for name, tensor in load_file(file).items()}, file)
        index_of(folder, 2)
        loaded = Transformer.from_pretrained(folder).state_dict()
        assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())


# ---------------------------------------------------------------- RAT+ files

TWICE = {
    "a gate packed and on its own": lambda state: {"backbone.layers.0.seq_layer.fgate_proj.weight": torch.zeros(64, 64)},
    "a wrapper": lambda state: {"_orig_mod.backbone.ln.weight": torch.ones(64)},
    "a prefix": lambda state: {"module.backbone.ln.weight": torch.ones(64)},
    "two names of one norm": lambda state: {"norm.weight": torch.ones(64)},
    "another head": lambda state: {"head.lm_head.weight": state["embedding.wte.weight"] + 1},
    "a head in another dtype": lambda state: {"head.lm_head.weight": (state["embedding.wte.weight"] + 1).bfloat16()},
}


@pytest.mark.parametrize("what", TWICE)
def test_a_pth_that_has_one_thing_twice_is_refused(what, ratplus, tmp_path, monkeypatch):
    """Whichever comes last in a dictionary, believed."""
    state = official_names(ratplus)
    save_pth(tmp_path / "model.pth", state | TWICE[what](state), monkeypatch, n_head=4)
    with pytest.raises(ValueError) as raised:
        Transformer.from_pretrained(tmp_path / "model.pth")
    one_line(raised, tmp_path / "model.pth")


# ---------------------------------------------------------------- checkpoints

def test_a_checkpoint_with_a_file_more_or_less_is_refused(tmp_path):
    """Another file of the same tensors in its folder, of which torch.distributed.checkpoint takes whichever it sees last."""
    ours = made()
    with checkpoint.Saver(tmp_path, parallel.Processes(), BYTES) as saver:
        saver.save(*ours, {"step": 1})
    folder = tmp_path / "step_0000001"
    tiny(seed=1, memory=True).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / ONE, folder / "model_best.safetensors")
    with pytest.raises(ValueError) as raised:
        checkpoint.load(folder, *ours, parallel.Processes())
    one_line(raised, "model_best.safetensors", "config.json")
    assert torch.equal(Transformer.from_pretrained(folder).norm.weight, ours[0].norm.weight)  # a model is told by its files' names
    weights.as_written(folder, {}, [ONE])  # and may be read without the optimizer's
