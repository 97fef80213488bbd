"""
A GGUF file (of llama.cpp) as a folder that model.py loads: weights and tokenizer.

    python -m experiments.from_gguf FILE.gguf DIR --dtype=bfloat16

For those who have no other file of a model. What was quantised is dequantised to fp32 and rounded
to --dtype. What was lost before stays lost, so such a model scores a little otherwise than the
original. A setting or a tensor that is not known here ends this in one line: with it the model
would be another.

Two things are not as in the original's folder. Of a Llama's heads llama.cpp rotates the channels 2d
and 2d + 1 together, and we d and d + D/2, so rows of q and k are put back (`load`). And the file
has no tokenizer.json, but tokens, merges and a name for how text is cut (PRE): it is made again of
these, without a token in front of each text. Checked in tests/test_from_gguf.py, and with a real
model in tests/test_real_model.py.
"""
import json
import tempfile
from pathlib import Path

import numpy as np
import torch

from infra import weights
from infra.cli import command, flag_parser
from infra.families import FORMS
from infra.files import regular, short
from infra.rope import stretched
from infra.tokenizers import SPLIT_PATTERNS, get_tokenizer
from model import Transformer, config_of

# ---------------------------------------------------------------- names

SIZES = {  # a setting's name after the architecture's: our name
    "block_count": "n_layer", "embedding_length": "width", "feed_forward_length": "mlp_width",
    "attention.head_count": "n_head", "attention.head_count_kv": "n_kv_head",
    "attention.key_length": "head_dim", "attention.layer_norm_rms_epsilon": "norm_eps",
    "context_length": "context_len", "rope.freq_base": "rope_theta",
}
# What a file may leave out. llama.cpp has the same defaults.
DEFAULTS = {"attention.key_length": None, "rope.freq_base": 10000.0}
MODULES = {  # llama.cpp's names: ours
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm",
    "ffn_norm": "pre_feedforward_layernorm", "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
OUTSIDE = {"token_embd": "embed_tokens", "output_norm": "norm", "output": "lm_head"}


def our_name(theirs):
    """blk.7.attn_q.weight -> layers.7.self_attn.q_proj.weight; None for what no model here has."""
    match theirs.split("."):
        case [module, kind] if module in OUTSIDE:
            return f"{OUTSIDE[module]}.{kind}"
        case ["blk", layer, module, kind] if module in MODULES:
            return f"layers.{layer}.{MODULES[module]}.{kind}"


# ---------------------------------------------------------------- the file

def opened(path):
    """A file's settings {name: value} and tensors {name: gguf's}. ValueError if it is damaged."""
    try:
        import gguf
    except ImportError:
        raise ImportError("this needs the package gguf: pip install gguf") from None

    class Bounded(gguf.GGUFReader):
        """
        Beyond the end of a file the package's own reads nothing, as often as a count in it says.
        """
        entries = 0

        def _get(self, offset, dtype, count=1, override_order=None):
            self.entries += 1
            if offset + np.dtype(dtype).itemsize * int(count) > len(self.data):
                raise ValueError("it ends too soon")
            if self.entries > 2_000_000:  # Llama 3's vocabulary takes half of it
                raise ValueError("it has more than 2 million entries before its weights")
            return super()._get(offset, dtype, count, override_order)

    regular(path)
    try:
        reader = Bounded(path)
        values = {name: field.contents() for name, field in reader.fields.items()}
    # A key that comes twice is a KeyError, and arrays within arrays recurse.
    except (ValueError, KeyError, RecursionError) as error:
        raise ValueError(f"{path} is damaged, or no GGUF file ({short(str(error))}): fetch it "
                         "again") from None
    if reader.byte_order != "I":
        raise ValueError(f"{path} has the other byte order: fetch the usual, little-endian one")
    if values.get("split.count", 1) != 1:
        raise ValueError(f"{path} is one of several parts: join them with llama.cpp's "
                         "llama-gguf-split --merge")
    return values, {tensor.name: tensor for tensor in reader.tensors}


def read(path):
    """A file's settings {name: value}, model.Config, and tensors {our name: () -> fp32 tensor}."""
    values, tensors = opened(path)
    config = config_in(path, values, tensors)
    return values, config, tensors_in(path, values, tensors, config)


def config_in(path, values, tensors):
    """The model.Config of a file. ValueError if it is of a kind that is not here."""
    family = values.get("general.architecture")
    if not isinstance(family, str) or family not in FORMS:
        raise ValueError(f"{path}: general.architecture is {short(family)}, and only "
                         f"{', '.join(FORMS)} can be loaded here")
    prefix, embedding = f"{family}.", tensors.get("token_embd.weight")
    found = {name.removeprefix(prefix): value for name, value in values.items()
             if name.startswith(prefix)}
    settings = dict(FORMS[family])
    for theirs, ours in SIZES.items():
        settings[ours] = found.get(theirs, DEFAULTS.get(theirs))
        left_out = settings[ours] is None and theirs in DEFAULTS
        if type(settings[ours]) not in (int, float) and not left_out:
            raise ValueError(f"{path}: {prefix}{theirs} is {short(settings[ours])}, and a number "
                             "for all layers is needed: is it another kind of model?")
    if embedding is None or len(embedding.shape) != 2:
        raise ValueError(f"{path} lacks token_embd.weight: fetch a file with a whole model")

    # It was fp32, which has made 9.999999747378752e-06 of 1e-5.
    settings["norm_eps"] = float(str(np.float32(settings["norm_eps"])))
    settings["vocab_size"] = int(embedding.shape[-1])  # GGUF has the dimensions in reverse
    settings["tied"] = "output.weight" not in tensors
    settings["eos_id"] = values.get("tokenizer.ggml.eos_token_id")
    if (settings["head_dim"] or 0) * settings["n_head"] == settings["width"]:
        settings["head_dim"] = None
    config = config_of(settings, path)
    if "rope_freqs.weight" in tensors:
        config.rope_scaling = scaling_in(path, tensors.pop("rope_freqs.weight"), config)

    # A setting that we do not know makes another model: experts, windows, a scale.
    D = config.head_width
    plain = {"vocab_size": config.vocab_size, "rope.dimension_count": D,
             "attention.value_length": D, "rope.scaling.type": "none"}
    for name, value in found.items():
        if name not in SIZES and value != plain.get(name):
            raise ValueError(f"{path}: {prefix}{name} is {short(value)}, and such a model cannot "
                             "be loaded here")
    return config


def scaling_in(path, divisors, config):
    """
    Config.rope_scaling where a file has what each of RoPE's frequencies is divided by, and not the
    four numbers that this was made of. Three of them are the same in all Llamas from 3.1 on, and
    the fourth is the largest divisor.
    """
    divisors, D = torch.tensor(divisors.data).double().flatten(), config.head_width
    frequency = config.rope_theta ** -(torch.arange(0, D, 2).double() / D)
    scaling = dict(rope_type="llama3", factor=max(divisors.tolist(), default=1.0),
                   low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=8192)
    near = divisors.shape == frequency.shape and torch.allclose(
        frequency / divisors, stretched(frequency, config.rope_theta, scaling), rtol=1e-5)
    if not near:
        raise ValueError(f"{path}: rope_freqs.weight is not that of Llama 3.1, 3.2 or 3.3: fetch "
                         "the original's folder, whose config.json says how it was made")
    return scaling


def tensors_in(path, values, tensors, config):
    """{our name: () -> fp32 tensor}. ValueError if there are others."""
    foreign = [name for name in tensors if our_name(name) is None]
    layers = {name.split(".")[1] for name in tensors if name.startswith("blk.")}
    if foreign or len(layers) != config.n_layer:
        what = f"a tensor {short(foreign[0])}" if foreign else f"weights of {len(layers)} layers"
        raise ValueError(f"{path} has {what}, and its settings, of {config.n_layer} layers, are of "
                         "no such model here")
    rotary = {"attn_q": config.n_head, "attn_k": config.n_kv_head}
    if values["general.architecture"] != "llama":
        rotary = {}
    return {our_name(name): lambda tensor=tensor: load(path, tensor, rotary)
            for name, tensor in tensors.items()}


def load(path, tensor, rotary):
    """One tensor, in fp32. rotary: {module: heads} of those whose channels are interleaved."""
    from gguf.quants import dequantize
    try:
        x = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
    except (NotImplementedError, ValueError):
        raise ValueError(f"{path}: {short(tensor.name)} is {tensor.tensor_type.name} of a kind "
                         "that the package gguf cannot read: fetch another file") from None
    heads = rotary.get(tensor.name.split(".")[-2])
    # Other shapes are refused where they are compared with the model's.
    if heads and x.dim() == 2 and len(x) % (2 * heads) == 0:
        x = x.unflatten(0, (heads, -1, 2))   # (H, D/2, 2, C)
        x = x.transpose(1, 2).flatten(0, 2)  # (H * D, C)
    return x


# ---------------------------------------------------------------- the tokenizer

def byte_level(use_regex):
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
            "use_regex": use_regex}


def split(regex):
    return [{"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated",
             "invert": False}, byte_level(use_regex=False)]


PRE = {  # tokenizer.ggml.pre: how the tokenizer of that name cuts text before it merges
    "gpt-2": [byte_level(use_regex=True)],
    "smollm": [{"type": "Digits", "individual_digits": True}, byte_level(use_regex=True)],
    "llama-bpe": split(SPLIT_PATTERNS[0]),  # Llama 3
    "dbrx": split(SPLIT_PATTERNS[0]),       # OLMo 2
    "qwen2": split(SPLIT_PATTERNS[1]),
}
NORMALIZED = {"qwen2"}  # to NFC
WITHOUT = "give --no_tokenizer, and put the original's tokenizer.json beside the weights"
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # of tokenizer.ggml.token_type


def tokenizer_in(path, values, folder):
    """The file's tokenizer, made in a folder. ValueError if it is of a kind that is not here."""
    def need(ok, field):
        if not ok:
            raise ValueError(
                f"{path}: no tokenizer.json can be made where tokenizer.ggml.{field} is "
                f"{short(values.get(f'tokenizer.ggml.{field}'))}: {WITHOUT}")
        return values.get(f"tokenizer.ggml.{field}")

    kind, pre = values.get("tokenizer.ggml.model"), values.get("tokenizer.ggml.pre")
    need(kind == "gpt2", "model")
    need(isinstance(pre, str) and pre in PRE, "pre")
    tokens, types, merges = (
        need(isinstance(values.get(f"tokenizer.ggml.{field}"), list), field)
        for field in ("tokens", "token_type", "merges"))
    need(len(tokens) == len(set(map(str, tokens))), "tokens")
    need(len(tokens) == len(types), "token_type")

    # Added tokens behind the last ordinary one are not in the original's vocabulary either.
    last = max((i for i, kind in enumerate(types) if kind not in (CONTROL, USER_DEFINED, UNUSED)),
               default=-1)
    all_of_them = {token: i for i, token in enumerate(tokens) if types[i] != UNUSED}
    vocab = {token: i for token, i in all_of_them.items() if i <= last}
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    added = [{"id": i, "content": token, **flags, "special": types[i] == CONTROL}
             for token, i in all_of_them.items() if types[i] in (CONTROL, USER_DEFINED)]
    spec = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": {"type": "NFC"} if pre in NORMALIZED else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": PRE[pre]},
        "post_processor": None, "decoder": byte_level(use_regex=True),
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "byte_fallback": False, "ignore_merges": pre == "llama-bpe",
                  "vocab": vocab, "merges": merges}}

    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for theirs, name in ("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad"):
        i = values.get(f"tokenizer.ggml.{theirs}_token_id")
        if i is not None:
            need(type(i) is int and 0 <= i < len(tokens), f"{theirs}_token_id")
            config[f"{name}_token"] = tokens[i]
    if "tokenizer.chat_template" in values:
        config["chat_template"] = values["tokenizer.chat_template"]
    for name, content in ("tokenizer.json", spec), ("tokenizer_config.json", config):
        text = json.dumps(content, ensure_ascii=False, indent=1)
        Path(folder, name).write_text(text, encoding="utf-8")
    try:
        return get_tokenizer(folder)
    except ValueError as error:
        reason = str(error).replace(f"{folder}/", "").partition(";")[0]
        raise ValueError(f"{path}: the tokenizer made of it cannot be used ({reason}): "
                         f"{WITHOUT}") from None


# ---------------------------------------------------------------- the script

def flags():
    parser = flag_parser("from_gguf.py", "Make a model's folder of a GGUF file.")
    add = parser.add_argument
    add("gguf", metavar="FILE.gguf", help=f"a model of {', '.join(FORMS)}")
    add("to", metavar="DIR", help="a new folder")
    add("--dtype", default="bfloat16", choices=["float32", "bfloat16"], help="of the weights")
    add("--no_tokenizer", action="store_true", help="weights alone: the original's tokenizer.json, "
        "put beside them, serves as well")
    return parser


def convert(args):
    path, to = Path(args.gguf), Path(args.to)
    if (to / "config.json").exists():
        raise ValueError(f"{to / 'config.json'} exists: choose another folder")
    values, config, tensors = read(path)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = None if args.no_tokenizer else tokenizer_in(path, values, folder)
        with torch.device("meta"):
            model = Transformer(config)
        weights.fill(model, tensors, path, getattr(torch, args.dtype), "cpu")
        model.save_pretrained(to, tokenizer)
    print(f"{path} is now {to}, {args.dtype}")


def main(argv=None):
    args = flags().parse_args(argv)
    command("from_gguf.py", lambda: convert(args))


if __name__ == "__main__":
    main()
