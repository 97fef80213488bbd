"""
One thing said in two places: it is the same, or it is refused in one line that names both and says
what to do. Never is one of them believed without a word. So is what no place says, or says wrongly.

Two tables, of a small OLMo 2 as others write it: what is refused, and what loads and as what. A new
field or file that says what another one says belongs into one of them.
"""
import itertools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import (LLAMA_FORM, QWEN2_FORM, QWEN3_FORM, STRETCH, YARN, official_names, refused,
                      save_pth)
from infra import checkpoint, parallel, weights
from infra.rope import stretched
from model import Transformer
from on_disk import (INDEX, ONE, assert_same, config, foreign, not_loaded, save, split, tensors,
                     unsealed, write_index)
from test_checkpoint import BYTES, made

HEAD, EMBEDDING, NORM = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"
MLP_NORM = "model.layers.1.post_attention_layernorm.weight"  # a Llama's
UP, GATE = "model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.memory_proj.weight"
FREQUENCIES = "model.rotary_emb.inv_freq"
AWAY = "Move the others away"


# ---------------------------------------------------------------- changes to a folder

def said(**changes):
    return lambda folder: config(folder, **changes)


def text(content):
    return lambda folder: (folder / "config.json").write_text(content)


def change(function):
    return lambda folder: tensors(folder, function)


def put(name, tensor):
    return change(lambda found: found.update({name: tensor}))


def renamed(old, new):
    return change(lambda found: found.update(
        {name.replace(old, new): found.pop(name) for name in list(found) if old in name}))


def tied(head=None):
    """The file's head stays, and the config ties it; head: another one for the file."""
    def both(folder):
        config(folder, tie_word_embeddings=True)
        if head:
            tensors(folder, lambda found: found.update({HEAD: head(found[EMBEDDING])}))
    return both


def sharded(then=lambda folder: None, one=False, parts=(2,), index=True):
    """
    Shards, then a change to them. one: model.safetensors stays; parts: of how many files; index: of
    the last ones.
    """
    def both(folder):
        for n in parts:
            split(folder, n)
        if index:
            write_index(folder, parts[-1])
        if not one:
            (folder / ONE).unlink()
        then(folder)
    return both


def misplaced(folder):
    found = json.loads((folder / INDEX).read_text())
    placed = found["weight_map"]
    placed[NORM] = next(file for file in placed.values() if file != placed[NORM])
    (folder / INDEX).write_text(json.dumps(found))


def twice(folder):
    for file in folder.glob("*.safetensors"):
        tensors(folder, lambda found: found.update({NORM: torch.ones(32)}), file.name)


def frequencies(theta, D=8):
    return theta ** -(torch.arange(0, D, 2) / D)


def ours(then, **form):
    """A model that we wrote, then changed."""
    def both(folder):
        shutil.rmtree(folder)
        save(folder, **form)
        then(folder)
    return both


def of(form, then=lambda folder: None):
    """A model of another family, as others write it, then changed."""
    def both(folder):
        shutil.rmtree(folder)
        foreign(folder, 1, **form)
        then(folder)
    return both


def other_weights(folder):
    """Ours too, of another model."""
    save(folder / "other", seed=1)
    shutil.move(folder / "other" / ONE, folder / ONE)


def in_other_files(folder):
    split(folder, 2)
    (folder / ONE).unlink()


def rows(*parts):
    """A model's norm in files of several GPUs: (where its rows begin, how many) of each."""
    def both(folder):
        (folder / ONE).unlink()
        for n, (first, count) in enumerate(parts, start=1):
            places = json.dumps({NORM: {"saved_offsets": [first]}})
            save_file({NORM: torch.ones(count)}, metadata={weights.PLACES: places},
                      filename=folder / f"model-{n:05d}-of-{len(parts):05d}.safetensors")
    return both


RAT = dict(memory=True)
REFUSED = {
    # the head
    "a tied config, another head": (tied(), ["tie", HEAD, "Set tie_word_embeddings to false"]),
    "a tied config, a head of another shape": (tied(lambda e: e[:-1].clone()), ["tie", HEAD]),
    "a tied config, a head that is nearly it": (tied(lambda e: e.bfloat16()), ["tie", HEAD]),
    "a tied config, an embedding of NaN": (
        tied(lambda e: e.fill_(torch.nan).clone()), ["not finite"]),
    "an untied config, no head": (change(lambda found: found.pop(HEAD)), ["lacks", HEAD]),
    # positions
    "no rope_theta": (said(rope_theta=None), ["rope_theta"]),
    "two rope_theta": (said(rope_parameters={"rope_theta": 5.0}),
                       ["rope_theta=10000.0", "rope_parameters.rope_theta=5.0"]),
    "a rope_theta of 400 digits": (said(rope_theta=10**400), ["config"]),
    "two rope_theta in two objects": (
        said(rope_theta=None, rope_parameters={"rope_theta": 5.0},
             rope_scaling={"rope_theta": 6.0}),
        ["rope_parameters.rope_theta", "rope_scaling.rope_theta"]),
    "a scaled RoPE": (said(rope_scaling={"rope_type": "linear", "factor": 2.0}), ["'linear'"]),
    "a scaled RoPE of older files": (said(rope_scaling={"type": "linear"}), ["'linear'"]),
    "two types of RoPE": (
        said(rope_scaling={"rope_type": "default", "type": "linear"}), ["type='linear'"]),
    "two types of RoPE in two objects": (
        said(rope_parameters={"rope_type": "default"}, rope_scaling={"rope_type": "yarn"}),
        ["'yarn'"]),
    "frequencies of another rope_theta": (
        put(FREQUENCIES, frequencies(500000.0)), ["rotary_emb.inv_freq", "rope_theta=10000.0"]),
    "frequencies of a scaled RoPE": (
        put(FREQUENCIES, frequencies(10000.0) / 2), ["rotary_emb.inv_freq"]),
    "frequencies of other heads": (
        put(FREQUENCIES, frequencies(10000.0, 16)), ["rotary_emb.inv_freq"]),
    # sizes
    "head_dim": (said(head_dim=16), ["head_dim=16", "hidden_size=32", "num_attention_heads=4"]),
    "n_head": (said(num_attention_heads=5), ["config.json describes no model", "n_head=5"]),
    "width": (said(hidden_size=64), ["64", "32"]),
    "mlp_width": (said(intermediate_size=40), ["mlp", "48", "40"]),
    "n_kv_head": (said(num_key_value_heads=2), ["k_proj", "(32, 32)", "(16, 32)"]),
    "vocab_size": (said(vocab_size=64), ["embed_tokens", "61", "64"]),
    "more layers in the config": (said(num_hidden_layers=3), ["3 layers", "2"]),
    "fewer layers in the config": (said(num_hidden_layers=1), ["1 layers", "2"]),
    "no layers in the config": (said(num_hidden_layers=None), ["num_hidden_layers"]),
    "layers that are no number": (said(num_hidden_layers="two"), ["config"]),
    "a gap in the layers": (renamed("layers.1", "layers.2"), ["lacks 'layers.1"]),
    "no eps": (said(rms_norm_eps=None), ["rms_norm_eps"]),
    # tensors
    "a tensor less": (change(lambda found: found.pop(UP)), ["lacks", UP.removeprefix("model.")]),
    "a tensor more": (put("extra", torch.zeros(3)), ["has", "extra"]),
    "a tensor of another name": (renamed(NORM, "model.x"), ["lacks", "norm.weight", "1 more"]),
    "a tensor transposed": (change(lambda found: found.update({UP: found[UP].T.contiguous()})),
                            ["layers.1.mlp.up_proj.weight", "(32, 48)", "(48, 32)"]),
    "a gate without a memory": (put(GATE, torch.zeros(32, 32)), ["memory_proj"]),
    # which model
    "another model": (said(model_type="mamba"), ["'mamba'", "olmo2"]),
    "a near one": (said(model_type="olmo3"), ["'olmo3'", "windows", "take OLMo 2"]),
    "one with experts": (said(model_type="qwen3_moe"), ["'qwen3_moe'", "experts"]),
    "no model": (said(model_type=None), ["None"]),
    "an activation": (said(hidden_act="gelu"), ["hidden_act", "'gelu'"]),
    "a bias": (said(attention_bias=True), ["attention_bias"]),
    "architectures": (said(architectures=["LlamaForCausalLM"]),
                      ["architectures", "'LlamaForCausalLM'", "'olmo2'"]),
    "a part of each head rotated": (
        said(rope_parameters={"partial_rotary_factor": 0.5}), ["rope_parameters"]),
    "quantised, and plain weights": (
        said(quantization_config={"bits": 4}), ["quantization_config"]),
    "a memory in the weights": (ours(unsealed(memory=False), **RAT), ["memory_proj"]),
    "a memory in the config": (ours(unsealed(memory=True, pre_norm=False), output_gate=True),
                               ["lacks", "memory_proj"]),
    # families
    "OLMo 2's weights as a Llama's": (
        said(model_type="llama", architectures=None), ["lacks", "input_layernorm"]),
    "a Llama's weights as OLMo 2's": (
        of(LLAMA_FORM, said(model_type="olmo2", architectures=None)), ["lacks"]),
    "Qwen 2's weights as a Llama's": (
        of(QWEN2_FORM, said(model_type="llama", architectures=None)), ["has", "k_proj.bias"]),
    "a Llama's weights as Qwen 2's": (
        of(LLAMA_FORM, said(model_type="qwen2", architectures=None)), ["lacks", "k_proj.bias"]),
    "a Llama with biases": (of(LLAMA_FORM, said(attention_bias=True)), ["attention_bias=True"]),
    "a Llama with biases in its MLP": (of(LLAMA_FORM, said(mlp_bias=True)), ["mlp_bias=True"]),
    "a Llama with both names of a norm": (of(LLAMA_FORM, put(
        "model.layers.0.pre_feedforward_layernorm.weight", torch.ones(32))), ["another place"]),
    "a Llama's tensor less": (
        of(LLAMA_FORM, change(lambda found: found.pop(MLP_NORM))), ["lacks", "post_attention"]),
    "Qwen 2 with windows": (
        of(QWEN2_FORM, said(use_sliding_window=True, sliding_window=64)), ["use_sliding_window"]),
    "Qwen 3 with windows in some layers": (
        of(QWEN3_FORM, said(layer_types=["full_attention", "sliding_attention"])), ["layer_types"]),
    "Qwen 2 with wide heads": (of(QWEN2_FORM, said(head_dim=16)), ["head_dim=16"]),
    "Qwen 3 without its head width": (of(QWEN3_FORM, said(head_dim=None)), ["asks for (512"]),
    "heads of an odd width": (of(QWEN3_FORM, said(head_dim=15)), ["head_dim=15", "even"]),
    # Llama 3's RoPE
    "frequencies without the stretch": (
        of(LLAMA_FORM | dict(rope_scaling=STRETCH), put(FREQUENCIES, frequencies(10000.0))),
        ["rotary_emb.inv_freq"]),
    "a stretch beside none": (
        of(LLAMA_FORM, said(rope_scaling=STRETCH, rope_parameters={"rope_type": "default"})),
        ["rope_parameters=None", "rope_scaling={", "which of them counts"]),
    "two stretches": (
        of(LLAMA_FORM, said(rope_scaling=STRETCH, rope_parameters=STRETCH | {"factor": 8.0})),
        ["rope_parameters={", "rope_scaling={", "which of them counts"]),
    "two kinds of RoPE in one object": (
        of(LLAMA_FORM, said(rope_scaling=STRETCH | {"type": "default"})), ["rope_type='llama3'"]),
    "a stretch without its name": (
        of(LLAMA_FORM, said(rope_scaling={name: STRETCH[name] for name in ("factor",)})),
        ["factor=4.0", "'default'", "which of them counts"]),
    "a stretch without its old length": (
        of(LLAMA_FORM, said(rope_scaling={"rope_type": "llama3", "factor": 8.0,
                                          "low_freq_factor": 1.0, "high_freq_factor": 4.0})),
        ["original_max_position_embeddings", "fetch it again"]),
    **{f"a stretch with {name}={value!r}": (
        of(LLAMA_FORM, said(rope_scaling=STRETCH | {name: value})), [f"rope_scaling.{told}"])
       for name, value, told in (
           ("factor", 0.5, "factor=0.5 is below 1"), ("factor", "8", "factor="),
           ("high_freq_factor", 1.0, "low_freq_factor=1.0 is not below high_freq_factor=1.0"),
           ("low_freq_factor", 0, "low_freq_factor=0 is no number in (0, 1e9)"),
           ("original_max_position_embeddings", True,
            "original_max_position_embeddings=True is no number in (0, 1e9)"))},
    # a config that is none: an error page, a field from a fork or a typing error
    **{f"a config that is {content!r}": (text(content), ["config.json"])
       for content in ("", "{", "[]", "3", '"olmo2"')},
    "our config, a field more": (ours(unsealed(foo=1), **RAT), ["config"]),
    "our config, a number as text": (ours(unsealed(n_layer="4"), **RAT), ["config"]),
    "our config, fields less": (ours(unsealed(width=None, n_head=None), **RAT), ["config"]),
    # which files
    "one file, and an index of others": (sharded(one=True), [ONE, INDEX, AWAY]),
    "one file, and shards": (sharded(one=True, index=False), [ONE, "model-*-of-00002", AWAY]),
    "two sets of shards": (sharded(parts=(2, 3), index=False), ["of-00002", "of-00003", AWAY]),
    "a shard fewer than its name says": (
        sharded(lambda folder: (folder / "model-00002-of-00003.safetensors").unlink(),
                parts=(3,), index=False), ["model-00002-of-00003", "missing"]),
    "the index has a tensor elsewhere": (sharded(misplaced), ["norm.weight", "index"]),
    "a tensor in two shards": (sharded(twice), ["norm.weight", "another place"]),
    "a tensor under two names": (
        put("module." + NORM, torch.ones(32)), ["norm.weight", "another place"]),
    "rows beside each other": (rows(([1], 3)), ["not whose rows"]),
    "rows after a text": (rows((0, 3), ("a", 3)), ["not whose rows"]),
    "rows twice": (rows((0, 3), (0, 3)), ["norm.weight", "another place"]),
    "rows with a gap": (rows((0, 3), (4, 3)), ["norm.weight", "follow each other"]),
    "our config, other weights of ours": (ours(other_weights), [ONE, "config.json"]),
    "our config, weights that are not ours": (
        ours(change(lambda found: None)), [ONE, "config.json"]),
    "our config, other files": (ours(in_other_files), ["config.json's 'files'"]),
    "a run, and a model in its folder": (
        lambda folder: save(folder / "step_0000007"), ["checkpoints", "step_0000007"]),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_contradicts_itself_is_refused(what, tmp_path):
    """One of two statements believed, and a table made with a model that nobody trained."""
    make, words = REFUSED[what]
    foreign(tmp_path / "model", 1)
    make(tmp_path / "model")
    not_loaded(tmp_path / "model", *words)


def others_beside(folder):
    for name in ("model_best.safetensors", "model-before-sft.safetensors",
                 "model.safetensors.bak", "optimizer.safetensors"):
        (folder / name).write_bytes(b"not even weights")


# OLMo-2-0425-1B's config.json on the hub has these fields beside its sizes, as transformers 4
# wrote it.
HUB = dict(architectures=["Olmo2ForCausalLM"], attention_bias=False, attention_dropout=0.0,
           hidden_act="silu", initializer_range=0.02, pad_token_id=100277, rope_theta=10000,
           tie_word_embeddings=False, torch_dtype="float32", transformers_version="4.47.0.dev0",
           use_cache=False)


def as_on_the_hub(folder):
    sharded()(folder)
    config(folder, **HUB)
    found = (folder / "config.json").read_text()
    text(found.replace('"use_cache"', '"rope_scaling": null, "use_cache"'))(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')


def byte_order_mark(folder):
    file = folder / "config.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())


DEFAULT = {"rope_theta": 10000.0, "rope_type": "default"}
OF_A_LAYER = "model.layers.1.self_attn.rotary_emb.inv_freq"
CONSISTENT = {
    "the same rope_theta twice": said(rope_parameters=DEFAULT),
    "rope_theta inside alone, as transformers 5": said(rope_theta=None, rope_parameters=DEFAULT),
    "the same frequencies": put(FREQUENCIES, frequencies(10000.0)),
    "the same of a layer, in 16 bits": put(OF_A_LAYER, frequencies(10000.0).bfloat16()),
    "the same head_dim": said(head_dim=8),
    "tie_word_embeddings missing, and a head": said(tie_word_embeddings=None),
    "another torch_dtype": said(torch_dtype="bfloat16"),
    "dtype and torch_dtype": said(torch_dtype="float16", dtype="bfloat16"),
    "num_key_value_heads missing": said(num_key_value_heads=None),
    "one end of text in a list": said(eos_token_id=[5, 5]),
    "an index, and what is left of other shards": sharded(
        lambda folder: (folder / "model-00001-of-00002.safetensors").touch(), parts=(2, 3)),
    "as on the hub": as_on_the_hub,
    "shards without an index": sharded(index=False),
    "files of other names beside": others_beside,
    "a byte order mark": byte_order_mark,
    "the same stretch twice": (said(rope_parameters=STRETCH | {"rope_theta": 10000.0}),
                               LLAMA_FORM | {"rope_scaling": STRETCH}),
    "the frequencies of a stretch": (
        put(FREQUENCIES, stretched(frequencies(10000.0), 10000.0, STRETCH)),
        LLAMA_FORM | {"rope_scaling": STRETCH}),
    "the frequencies of yarn": (
        put(FREQUENCIES, stretched(frequencies(10000.0), 10000.0, YARN)),
        LLAMA_FORM | {"rope_scaling": YARN}),
    "an older Llama without rope_theta": (said(rope_theta=None), LLAMA_FORM),
    "a Llama's fields that change nothing": (
        said(pretraining_tp=1, mlp_bias=False, layer_types=2 * ["full_attention"]), LLAMA_FORM),
    "a Qwen's windows that are off": (
        said(use_sliding_window=False, sliding_window=64, max_window_layers=1), QWEN2_FORM),
}


@pytest.mark.parametrize("what", CONSISTENT)
def test_what_agrees_or_is_of_no_matter_loads(what, tmp_path):
    """A refusal of what the world writes; a dtype taken from a field that is often wrong."""
    changed = CONSISTENT[what]
    changed, form = changed if isinstance(changed, tuple) else (changed, {})
    model = foreign(tmp_path, 1, **form)
    changed(tmp_path)
    assert_same(Transformer.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tied_model_may_have_its_head_in_the_file_too(dtype, tmp_path):
    """transformers sometimes repeats the embedding as lm_head; values are compared, not types."""
    model = foreign(tmp_path, 1, tied=True)
    tensors(tmp_path, lambda found: found.update(
        {name: tensor.bfloat16().float() for name, tensor in found.items()}))
    tensors(tmp_path, lambda found: found.update({HEAD: found[EMBEDDING].to(dtype, copy=True)}))
    loaded = Transformer.from_pretrained(tmp_path)
    assert loaded.config == model.config and HEAD not in loaded.state_dict()


# ---------------------------------------------------------------- names

WRAPPED = ["_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"]
BEFORE = [[], ["model"], ["model", "model"], ["model", "_orig_mod", "model"],
          *([wrap] for wrap in WRAPPED), *itertools.permutations(["module", "_orig_mod", "model"])]


def named(name, prefixes, inside):
    """A tensor's name, prefixes before it and what wraps a layer inside of it."""
    if inside:
        name = name.replace("layers.0.", f"layers.0.{inside}.")
    return ".".join([*prefixes, name.removeprefix("model.")])


@pytest.mark.parametrize("prefixes", BEFORE, ids=".".join)
def test_what_a_model_was_wrapped_in_is_no_part_of_names(prefixes, tmp_path):
    """Checkpoints of torch.compile, DDP and FSDP, which have all weights, refused for names."""
    for inside in None, *WRAPPED:
        folder = tmp_path / str(inside)
        model = foreign(folder, 2)
        for file in folder.glob("*.safetensors"):
            save_file({named(name, prefixes, inside): tensor
                       for name, tensor in load_file(file).items()}, file)
        write_index(folder, 2)
        assert_same(Transformer.from_pretrained(folder), model)


# ---------------------------------------------------------------- RAT+ files, checkpoints

TWICE = {
    "backbone.layers.0.seq_layer.fgate_proj.weight": lambda embedding: torch.zeros(64, 64),
    "_orig_mod.backbone.ln.weight": lambda embedding: torch.ones(64),
    "module.backbone.ln.weight": lambda embedding: torch.ones(64),
    "norm.weight": lambda embedding: torch.ones(64),
    "head.lm_head.weight": lambda embedding: embedding + 1,
    "head.lm_head.weight ": lambda embedding: (embedding + 1).bfloat16(),
}


@pytest.mark.parametrize("name", TWICE)
def test_a_pth_that_has_one_thing_twice_is_refused(name, ratplus, tmp_path, monkeypatch):
    """Whichever comes last in a dictionary, believed."""
    state = official_names(ratplus)
    state[name.strip()] = TWICE[name](state["embedding.wte.weight"])
    not_loaded(save_pth(tmp_path / "model.pth", state, monkeypatch, n_head=4))


def test_a_checkpoint_with_a_file_more_or_less_is_refused(tmp_path):
    """Another file of the same tensors, of which torch.distributed.checkpoint takes the last."""
    ours = made()
    with checkpoint.Saver(tmp_path, parallel.Processes(), BYTES) as saver:
        saver.save(*ours, {"step": 1})
    folder = tmp_path / "step_0000001"
    save(tmp_path / "other", seed=1, memory=True)
    shutil.copy(tmp_path / "other" / ONE, folder / "model_best.safetensors")
    refused(lambda: checkpoint.load(folder, *ours, parallel.Processes()),
            "model_best.safetensors", "config.json")
    # A model is known by its files' names, and may be read without the optimizer's.
    assert torch.equal(Transformer.from_pretrained(folder).norm.weight, ours[0].norm.weight)
    weights.as_written(folder, {}, [ONE])
