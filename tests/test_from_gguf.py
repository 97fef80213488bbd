"""
experiments/from_gguf.py: a tiny model, written as llama.cpp's converter does, comes back; what is
another model, or a damaged file, is one line. test_real_model.py has a file of others'.
"""
import json
import random
import struct
import sys

import gguf
import numpy as np
import pytest
import tokenizers
import torch
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

from conftest import QWEN2_FORM, QWEN3_FORM, draw_tokens, refused, tiny
from experiments import from_gguf
from infra.shards import builtin_text
from infra.tokenizers import get_tokenizer
from model import PRESETS, Transformer

# 32 channels in a head, and rows of whole blocks of 32, which is what types with blocks need
LLAMA = dict(pre_norm=True, qk_norm=None, width=96, n_head=3, n_kv_head=1, mlp_width=64,
             norm_eps=1e-5)
NAMES = {"embed_tokens": "token_embd", "lm_head": "output", "norm": "output_norm",
         "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
         "q_norm": "attn_q_norm", "k_norm": "attn_k_norm", "gate_proj": "ffn_gate",
         "up_proj": "ffn_up", "down_proj": "ffn_down", "input_layernorm": "attn_norm",
         "pre_feedforward_layernorm": "ffn_norm", "post_attention_layernorm": "post_attention_norm",
         "post_feedforward_layernorm": "post_ffw_norm"}


def theirs(name):
    """Our name of a parameter, as llama.cpp has it."""
    *block, module, kind = name.split(".")
    block = [f"blk.{block[1]}"] if block else []
    return ".".join([*block, NAMES[module], kind])


def interleaved(x, D):
    """Rows of heads of D channels: d and d + D/2 side by side."""
    rows = [head + d + half for head in range(0, len(x), D)
            for d in range(D // 2) for half in (0, D // 2)]
    return x[rows]


def divisors(config):
    """What llama.cpp divides RoPE's frequencies by, as its converter makes them of wave lengths."""
    D, scaling = config.head_width, config.rope_scaling
    lengths = 2 * np.pi * config.rope_theta ** (np.arange(0, D, 2) / D)
    old, factor = scaling["original_max_position_embeddings"], scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = (old / lengths - low) / (high - low)
    mixed = 1 / ((1 - smooth) / factor + smooth)
    return np.where(lengths < old / high, 1, np.where(lengths > old / low, factor, mixed))


def settings_of(config, family):
    prefix, more = f"{family}.", {}
    if family != "llama":
        more = {prefix + "attention.key_length": config.head_width,
                prefix + "attention.value_length": config.head_width}
    return {"general.architecture": family, prefix + "block_count": config.n_layer,
            prefix + "context_length": config.context_len,
            prefix + "embedding_length": config.width,
            prefix + "feed_forward_length": config.mlp_width,
            prefix + "attention.head_count": config.n_head,
            prefix + "attention.head_count_kv": config.n_kv_head,
            prefix + "rope.freq_base": float(config.rope_theta),
            prefix + "attention.layer_norm_rms_epsilon": config.norm_eps,
            prefix + "vocab_size": config.vocab_size,
            prefix + "rope.dimension_count": config.head_width, **more}


def write(path, model, family="llama", kind=Type.F32, change=lambda values, tensors: None,
          vocabulary=None):
    """
    A model as a GGUF file, its matrices of this type. change(settings, tensors) makes a stranger of
    it. -> the path, and the weights as they are then {our name: tensor}
    """
    values = settings_of(model.config, family) | (vocabulary or {})
    tensors, kept = {}, {}
    for name, tensor in model.state_dict().items():
        of_this = kind if tensor.dim() == 2 else Type.F32
        kept[name] = torch.from_numpy(dequantize(quantize(tensor.numpy(), of_this), of_this))
        if family == "llama" and ("q_proj" in name or "k_proj" in name):
            tensor = interleaved(tensor, model.config.head_width)
        tensors[theirs(name)] = quantize(tensor.numpy(), of_this), of_this
    if model.config.rope_scaling:
        tensors["rope_freqs.weight"] = divisors(model.config).astype("float32"), Type.F32
    change(values, tensors)

    file = gguf.GGUFWriter(path, values.pop("general.architecture"))
    for name, value in values.items():
        add = {bool: file.add_bool, int: file.add_uint32, float: file.add_float32,
               str: file.add_string, list: file.add_array}[type(value)]
        add(name, value)
    for name, (data, of_this) in tensors.items():
        file.add_tensor(name, data, raw_dtype=of_this)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path, kept


def convert(path, to, *flags):
    from_gguf.convert(from_gguf.flags().parse_args([str(path), str(to), *flags]))
    return to


@torch.no_grad()
def logits(model):
    return model(draw_tokens(2, 20, seed=1))


# ---------------------------------------------------------------- weights

FAMILIES = {
    "llama": ("llama", LLAMA),
    "llama, tied": ("llama", LLAMA | dict(tied=True)),
    "llama, 3 KV heads": ("llama", LLAMA | dict(n_kv_head=3)),
    "llama 3.2": ("llama", LLAMA | dict(rope_scaling=PRESETS["llama3.2-1b"].rope_scaling,
                                        rope_theta=5e5)),
    "qwen2": ("qwen2", QWEN2_FORM | dict(n_kv_head=2)),
    "qwen3": ("qwen3", QWEN3_FORM | dict(n_kv_head=2, tied=True)),
    "olmo2": ("olmo2", dict(n_kv_head=2)),
}


@pytest.mark.parametrize("case", FAMILIES)
def test_a_model_comes_back(case, tmp_path):
    """Rows of q and k left interleaved; names of norms exchanged; a head that is tied or not."""
    family, form = FAMILIES[case]
    model = tiny(**form)
    path, _ = write(tmp_path / "a.gguf", model, family)
    loaded = Transformer.from_pretrained(convert(path, tmp_path / "a", "--no_tokenizer",
                                                 "--dtype=float32"))
    assert loaded.config == model.config
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("kind", [Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1], ids=str)
def test_quantised_weights_are_what_they_were_quantised_to(kind, tmp_path):
    """Rows put in order before they are dequantised, or rounded once more on the way."""
    model = tiny(**LLAMA)
    path, kept = write(tmp_path / "a.gguf", model, kind=kind)
    _, _, tensors = from_gguf.read(path)
    assert tensors.keys() == kept.keys()
    for name, tensor in kept.items():
        assert torch.equal(tensors[name](), tensor), name
    assert not torch.equal(kept["layers.0.mlp.up_proj.weight"],
                           model.state_dict()["layers.0.mlp.up_proj.weight"])


def said(name, value):
    return lambda values, _: values.update({name: value})


def without(name):
    return lambda values, tensors: (values.pop(name, None), tensors.pop(name, None))


def a_tensor(name):
    return lambda _, tensors: tensors.update({name: tensors["blk.0.attn_q.weight"]})


def other_divisors(_, tensors):
    tensors["rope_freqs.weight"] = np.linspace(1, 8, 16, dtype="float32"), Type.F32


STRANGERS = {
    "gemma": (said("general.architecture", "gemma3"), ["architecture is 'gemma3'", "qwen3"]),
    "experts": (said("llama.expert_count", 8), ["llama.expert_count is 8"]),
    "window": (said("llama.attention.sliding_window", 512), ["sliding_window is 512"]),
    "yarn": (said("llama.rope.scaling.type", "yarn"), ["llama.rope.scaling.type is 'yarn'"]),
    "partial": (said("llama.rope.dimension_count", 16), ["rope.dimension_count is 16"]),
    "llama3": (a_tensor("rope_freqs.weight"), ["rope_freqs.weight", "original's folder"]),
    "another stretch": (other_divisors, ["rope_freqs.weight", "original's folder"]),
    "parts": (said("split.count", 2), ["one of several parts", "--merge"]),
    "no layers": (without("llama.block_count"), ["llama.block_count is None"]),
    "a list": (said("llama.attention.head_count", [3, 3]), ["head_count is [3, 3]"]),
    "text": (said("llama.attention.key_length", "32"), ["key_length is '32'"]),
    "no heads": (said("llama.attention.head_count", 0), ["describes no model here"]),
    "heads": (said("llama.attention.head_count", 7), ["describes no model here"]),
    "more layers": (said("llama.block_count", 2_000_000), ["weights of 2 layers", "2000000"]),
    "bias": (a_tensor("blk.0.attn_q.bias"), ["has 'layers.0.self_attn.q_proj.bias'"]),
    "another": (a_tensor("blk.0.attn_sinks.weight"), ["a tensor 'blk.0.attn_sinks.weight'"]),
    "lacking": (without("blk.1.ffn_up.weight"), ["lacks 'layers.1.mlp.up_proj.weight'"]),
    "no embedding": (without("token_embd.weight"), ["lacks token_embd.weight"]),
    "integers": (lambda _, tensors: tensors.update({"blk.0.ffn_up.weight": (
        np.zeros((64, 96), "int32"), Type.I32)}), ["'blk.0.ffn_up.weight' is I32"]),
    "shape": (a_tensor("blk.0.attn_k.weight"), ["k_proj.weight is (96, 96)", "(32, 96)"]),
}


@pytest.mark.parametrize("case", STRANGERS)
def test_another_model_is_refused_in_one_line(case, tmp_path):
    """A model that loads, and is not the one in the file."""
    change, words = STRANGERS[case]
    path, _ = write(tmp_path / "a.gguf", tiny(**LLAMA), change=change)
    refused(lambda: convert(path, tmp_path / "a", "--no_tokenizer"), path, *words)
    assert not (tmp_path / "a").exists()


# ---------------------------------------------------------------- files

def test_a_damaged_file_is_one_line_or_the_same_model(tmp_path):
    """A file that was cut, changed or made up: a traceback, or a loop of 2**60 rounds."""
    path, _ = write(tmp_path / "a.gguf", tiny(**LLAMA))
    whole, draw, results = path.read_bytes(), random.Random(1), []
    start = whole.index(b"token_embd.weight") + 4000  # beyond it are numbers, any of which may be

    def attempt(content):
        path.write_bytes(content)
        try:
            _, _, tensors = from_gguf.read(path)
            results.append({name: load() for name, load in tensors.items()})
        except ValueError as error:
            assert "\n" not in str(error) and str(path) in str(error), error
            results.append(None)

    for _ in range(60):
        attempt(whole[:draw.randrange(len(whole))])
    assert results == [None] * 60
    for _ in range(200):
        place = draw.randrange(start)
        attempt(whole[:place] + bytes([draw.randrange(256)]) + whole[place + 1:])
    assert 100 < results.count(None) < 260

    def instead(of_layers):  # of the number of layers
        before, after = whole[:2000].split(b"llama.block_count")
        return before + b"llama.block_count" + of_layers + after[8:]
    array, twice = struct.Struct("<IIQ"), (b"llama.rope.freq_base", b"llama.context_length")
    made_up = [
        b"", b"GGUF", b"PK" + whole, whole.replace(*twice),
        instead(array.pack(9, 0, 2**60)),                                 # so many bytes
        instead(array.pack(9, 9, 1) + struct.pack("<IQ", 9, 1) * 5000),   # arrays of arrays
        whole.replace(struct.pack("<QQ", 96, 61), struct.pack("<QQ", 2**63, 2))]  # of an embedding
    results.clear()
    for content in made_up:
        attempt(content)
    assert results == [None] * len(made_up)


def test_what_is_no_file_or_in_the_way_is_told(tmp_path, capsys, monkeypatch):
    """A folder read as a file; a model written over another; a traceback without the package."""
    path, _ = write(tmp_path / "a.gguf", tiny(**LLAMA))
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "config.json").write_text("{}")

    def told(*words, flags=()):
        with pytest.raises(SystemExit) as ended:
            from_gguf.main([*map(str, flags)])
        assert ended.value.code == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1 and all(str(word) in line for word in words), line

    told("no.gguf", "is missing", flags=[tmp_path / "no.gguf", tmp_path / "b"])
    told(tmp_path, "no regular file", flags=[tmp_path, tmp_path / "b"])
    told("config.json exists", flags=[path, tmp_path / "there"])
    monkeypatch.setitem(sys.modules, "gguf", None)
    told("pip install gguf", flags=[path, tmp_path / "b"])


# ---------------------------------------------------------------- the tokenizer

CL100K = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
          r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
TEXTS = ["", " ", "It's 1234567 o'clock, WE'LL see; 3.14e-10 ½ ١٢٣", "  two  spaces\r\n\r\n\tx \n",
         "naïve cafe\u0301 e\u0301\u0302 日本語 🙂👩‍👩‍👧 ZZZ_9", "<|endoftext|> a<|im_end|>b <tool>c"]


def byte_level(use_regex):
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def cut(regex):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(regex), "isolated"),
                                    byte_level(False)])


ORIGINALS = {  # what the tokenizer.json of such a model cuts by
    "gpt-2": byte_level(True), "llama-bpe": cut(CL100K), "dbrx": cut(CL100K),
    "qwen2": cut(CL100K.replace("{1,3}", "")),
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                       byte_level(True)]),
}


def original(pre):
    """A byte-level BPE of 400 ids, <tool> among them, which is a token in text."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = byte_level(True), decoders.ByteLevel()
    if pre == "qwen2":
        bpe.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if pre == "smollm":  # SmolLM2's vocabulary lacks some bytes, too
        alphabet = sorted(alphabet)[:-20]
    bpe.train_from_iterator([builtin_text()[:50_000], "1234 567 " * 999], trainers.BpeTrainer(
        vocab_size=399, special_tokens=["<|endoftext|>", "<|im_end|>"], show_progress=False,
        initial_alphabet=alphabet))
    bpe.pre_tokenizer = ORIGINALS[pre]  # only now: there are tokens of several digits
    bpe.add_tokens([tokenizers.AddedToken("<tool>", normalized=False)])
    return bpe


def vocabulary_of(bpe, pre):
    """Its settings in a GGUF file, padded to 410 as converters do."""
    spec, n = json.loads(bpe.to_str()), bpe.get_vocab_size()
    types = {"<|endoftext|>": 3, "<|im_end|>": 3, "<tool>": 4}
    tokens = [bpe.id_to_token(i) for i in range(n)]
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre,
            "tokenizer.ggml.tokens": tokens + [f"[PAD{i}]" for i in range(n, 410)],
            "tokenizer.ggml.token_type": [types.get(t, 1) for t in tokens] + [5] * (410 - n),
            "tokenizer.ggml.merges": [" ".join(pair) for pair in spec["model"]["merges"]],
            "tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.add_bos_token": False}


@pytest.mark.parametrize("pre", ORIGINALS)
def test_the_tokenizer_comes_back(pre, tmp_path):
    """Digits cut otherwise; NFC or an added token forgotten; padding as tokens; another end."""
    bpe, model = original(pre), tiny(**LLAMA | dict(vocab_size=410))
    path, _ = write(tmp_path / "a.gguf", model, vocabulary=vocabulary_of(bpe, pre))
    folder = convert(path, tmp_path / "a")
    ours = get_tokenizer(folder)
    assert ours.eos_id == Transformer.from_pretrained(folder).config.eos_id == 1
    assert ours.n_vocab == bpe.get_vocab_size()
    read = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs = AutoTokenizer.from_pretrained(folder)
    for text in [*TEXTS, builtin_text()[50_000:60_000]]:
        assert read.encode(text).ids == bpe.encode(text).ids
        assert theirs(text).input_ids == bpe.encode(text).ids
        bpe.encode_special_tokens = True  # of ours those spelled in a text are text
        assert ours.encode(text) == bpe.encode(text).ids
        bpe.encode_special_tokens = False
    assert theirs.eos_token == "<|im_end|>" and "<tool>" in bpe.encode("a <tool>").tokens


UNKNOWN = {
    "sentencepiece": ("tokenizer.ggml.model", "llama", ["tokenizer.ggml.model is 'llama'"]),
    "pre": ("tokenizer.ggml.pre", "tekken", ["tokenizer.ggml.pre is 'tekken'"]),
    "default": ("tokenizer.ggml.pre", "default", ["tokenizer.ggml.pre is 'default'"]),
    "none": ("tokenizer.ggml.tokens", None, ["tokenizer.ggml.tokens is None"]),
    "types": ("tokenizer.ggml.token_type", [1, 1], ["token_type is [1, 1]"]),
    "twice": ("tokenizer.ggml.tokens", ["a"] * 410, ["tokens is ['a', 'a'"]),
    "end": ("tokenizer.ggml.padding_token_id", 500, ["padding_token_id is 500"]),
    "no end": ("tokenizer.ggml.eos_token_id", 70, ["the tokenizer made of it", "added_tokens"]),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_a_tokenizer_that_cannot_be_made_is_one_line(case, tmp_path):
    """Text cut by a rule of another model, of which each token is known and each sentence odd."""
    name, value, words = UNKNOWN[case]
    vocabulary = vocabulary_of(original("gpt-2"), "gpt-2")
    vocabulary[name] = value
    if value is None:
        del vocabulary[name]
    path, _ = write(tmp_path / "a.gguf", tiny(**LLAMA | dict(vocab_size=410)),
                    vocabulary=vocabulary)
    refused(lambda: convert(path, tmp_path / "a"), path, *words, "--no_tokenizer", "tokenizer.json")
    assert not (tmp_path / "a").exists()
    convert(path, tmp_path / "a", "--no_tokenizer")
    assert not (tmp_path / "a" / "tokenizer.json").exists()
