"""
Families of released models: what Hugging Face's config.json says of one, in the fields of
model.Config, and back.

    settings_of(found, file)     config.json -> Config's fields, or one line why it is no such model
    family_of(config)            which family a Config is, None for one of our own
    described(config, dtype)     Config -> what config.json says of it

A family is three fields of Config (FORMS); the table in model.py's docstring explains them, and all
others are sizes. A config that says more than our model can do is refused: its weights would load,
and compute something else. Checked against transformers, whose versions 4 and 5 write RoPE's fields
in two ways, in tests/test_model.py and tests/test_contradictions.py. weights.py calls this.
"""
import sys
from dataclasses import asdict

from infra import rope
from infra.files import short

FORMS = {
    "olmo2": dict(pre_norm=False, qk_norm="all", qkv_bias=False),
    "llama": dict(pre_norm=True, qk_norm=None, qkv_bias=False),
    "qwen2": dict(pre_norm=True, qk_norm=None, qkv_bias=True),
    "qwen3": dict(pre_norm=True, qk_norm="head", qkv_bias=False),
}
CLASSES = {"olmo2": "Olmo2ForCausalLM", "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM",
           "qwen3": "Qwen3ForCausalLM"}
OWN_HEAD_WIDTH = "llama", "qwen3"  # whose heads need not divide the width among them

# Our names for the sizes: Hugging Face's.
SIZES = {"vocab_size": "vocab_size", "n_layer": "num_hidden_layers", "width": "hidden_size",
         "n_head": "num_attention_heads", "mlp_width": "intermediate_size",
         "norm_eps": "rms_norm_eps", "context_len": "max_position_embeddings"}

# With other values it would be another model. The value is also what a config without the field
# means. Qwen 2 has its biases whatever such a field says.
FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "clip_qkv": None,
         "use_sliding_window": False, "sliding_window": None, "partial_rotary_factor": 1.0,
         "quantization_config": None}

# What comes near, why it is not read, and what to take.
OTHERS = {
    "olmo": "has norms without weights: take OLMo 2",
    "olmo3": "has windows in three of four layers, which the selectors here do not know: take "
             "OLMo 2",
    "mistral": "may have windows: without (sliding_window null) it is a llama, and loads with that "
               "model_type and LlamaForCausalLM in config.json",
    "phi3": "keeps its projections in one matrix: take Llama 3 or Qwen 3",
    "smollm3": "has layers without RoPE: take SmolLM2",
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3_text"),
                    "has another norm: take Llama 3 or Qwen 3"),
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "olmoe"),
                    "has experts: take a model without")}


# ---------------------------------------------------------------- config.json -> Config

def settings_of(
    found,        # config.json, an object
    config_file,  # its path, for messages
):                # -> model.Config's fields
    family = found.get("model_type")
    if not isinstance(family, str) or family not in FORMS:
        known = ", ".join(map(repr, FORMS))
        why = OTHERS.get(family) if isinstance(family, str) else None
        raise ValueError(f"{config_file}: model_type is {short(family)}, and only {known} and "
                         "'nanorat' can be loaded here" + (f": {family} {why}" if why else ""))
    check_fixed(found, family, config_file)
    try:
        settings = {ours: found[theirs] for ours, theirs in SIZES.items()}
        settings |= rope_of(found, family, config_file)
    except KeyError as error:
        raise ValueError(f"{config_file} lacks {error}: fetch it again") from None

    kv_heads = found.get("num_key_value_heads")
    settings["n_kv_head"] = settings["n_head"] if kv_heads is None else kv_heads
    settings["head_dim"] = head_dim_of(found, family, settings, config_file)
    settings["tied"] = found.get("tie_word_embeddings", False)
    settings["eos_id"] = eos_of(found.get("eos_token_id"), settings["vocab_size"], config_file)
    return settings | FORMS[family]


def check_fixed(found, family, config_file):
    """ValueError for a field that makes it another model than those of this family here."""
    for name, value in FIXED.items():
        unused = (name == "attention_bias" and family == "qwen2") or (
            # its width counts only where use_sliding_window is true
            name == "sliding_window" and family in ("qwen2", "qwen3"))
        if not unused and found.get(name, value) != value:
            raise ValueError(f"{config_file}: {name}={short(found[name])}, and a {family} that can "
                             f"be loaded here has {value!r}: this is another model")
    kinds = found.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise ValueError(f"{config_file}: layer_types={short(kinds)}, and only 'full_attention' "
                         "can be computed here: this is another model")
    architectures = found.get("architectures") or [CLASSES[family]]
    if architectures != [CLASSES[family]]:
        raise ValueError(f"{config_file}: architectures={short(architectures)}, and model_type is "
                         f"{family!r}: this is another model")


def head_dim_of(found, family, settings, config_file):
    """D where it is not hidden_size / num_attention_heads, else None."""
    head_dim, width, n_head = found.get("head_dim"), settings["width"], settings["n_head"]
    if head_dim is None and family == "qwen3":  # transformers' value, where nothing is said
        head_dim = 128
    ints = all(type(size) is int for size in (head_dim, width, n_head))
    if head_dim is None or (ints and head_dim * n_head == width):
        return None
    if not ints or family not in OWN_HEAD_WIDTH:
        raise ValueError(f"{config_file}: head_dim={short(head_dim)}, and a {family} has "
                         f"hidden_size={short(width)} / num_attention_heads={short(n_head)}: this "
                         "is another model")
    return head_dim


def rope_of(found, family, config_file):
    """
    -> {"rope_theta", "rope_scaling"}. transformers 4 writes the base at the top and the stretch
    into rope_scaling, 5 both into rope_parameters.
    """
    thetas, scalings = {}, {}
    for name in "rope_parameters", "rope_scaling":
        given = found.get(name)
        if not given:
            continue
        if not isinstance(given, dict):
            raise ValueError(f"{config_file}: {name}={short(given)} is no object: fetch it again")
        if given.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(f"{config_file}: {name} rotates a part of each head, and a {family} "
                             "all of it: this is another model")
        thetas[f"{name}.rope_theta"] = given.get("rope_theta")
        scalings[name] = scaling_of(given, config_file)
    thetas["rope_theta"] = found.get("rope_theta")
    if family == "llama" and all(theta is None for theta in thetas.values()):
        thetas["rope_theta"] = 10000.0  # LLaMA 1 and 2 are older than the field
    scaling = the_one(scalings or {"rope_scaling": None}, config_file)
    if scaling:  # Phi writes the old length at the top, and transformers takes it from there first
        name = "original_max_position_embeddings"
        the_one({name: found.get(name), f"{name} of RoPE": scaling[name]}, config_file, name)
    return {"rope_theta": the_one(thetas, config_file, "rope_theta"), "rope_scaling": scaling}


def scaling_of(given, config_file):
    """Config.rope_scaling of config.json's object; None where it asks for no stretch."""
    # older files say type
    kinds = {key: given[key] for key in ("rope_type", "type") if given.get(key) is not None}
    for key, kind in kinds.items():
        if kind not in ("default", *rope.NEEDED):
            known = " and ".join(map(repr, rope.NEEDED))
            raise ValueError(f"{config_file}: {key}={short(kind)} is not supported, only 'default' "
                             f"and {known} are")
    kind = the_one(kinds or {"rope_type": "default"}, config_file)
    if kind == "default":
        more = [field for field in rope.FIELDS if given.get(field) is not None]
        if more:
            raise ValueError(f"{config_file}: {more[0]}={short(given[more[0]])} of a RoPE that is "
                             "'default': which of them counts? Set rope_type, or take it out")
        return None
    try:
        needed = {field: given[field] for field in rope.NEEDED[kind]}
    except KeyError as error:
        raise ValueError(f"{config_file} lacks {error} of {kind!r}: fetch it again") from None
    optional = {field: given[field] for field in rope.OPTIONAL[kind] if field in given}
    # null says nothing, but of truncate, where transformers reads it as false: Config refuses that
    said = {field: value for field, value in optional.items()
            if value is not None or field == "truncate"}
    return {"rope_type": kind} | needed | said


def the_one(values, config_file, needed=None):
    """
    The value that all of {field: value} have. None says nothing where a value is `needed`, and it
    is a KeyError of that name if there is none. ValueError if two differ.
    """
    given = {field: value for field, value in values.items() if value is not None or not needed}
    if not given:
        raise KeyError(needed)
    first, *_ = given
    for field, value in given.items():
        if value != given[first]:
            raise ValueError(f"{config_file}: {first}={short(given[first])} and "
                             f"{field}={short(value)}: which of them counts? Take the other out")
    return given[first]


def eos_of(given, vocab_size, config_file):
    """
    config.json's end of text; None if the vocabulary has no such token, as one that was cut to a
    smaller size.
    """
    # Nothing is computed by it: sample.py and eval_niah.py end a text at the tokenizer's. A list
    # may name several, as chat models' do. Then the first alone is kept, and we say so.
    if isinstance(given, list) and given:
        if given != given[:1] * len(given):
            print(f"note: {config_file}: of eos_token_id={short(given)} the first is kept; texts "
                  "end at the tokenizer's", file=sys.stderr)
        given = given[0]
    outside = type(given) is int and type(vocab_size) is int and not 0 <= given < vocab_size
    return None if outside else given


# ---------------------------------------------------------------- Config -> config.json

def family_of(config):
    """The family whose form a Config has, None if it is more than any of them."""
    more = config.memory or config.output_gate or not config.swiglu
    for family, form in FORMS.items():
        same = all(getattr(config, field) == value for field, value in form.items())
        if same and not more and (config.head_dim is None or family in OWN_HEAD_WIDTH):
            return family
    return None


def described(config, dtype):
    """What config.json says of the model. dtype: "float32", "bfloat16"."""
    # A family's model is written as one, and opens in transformers. Anything else gets a model_type
    # of its own, so that no other program drops its gates unknowingly.
    family = family_of(config)
    if family is None:
        return {"model_type": "nanorat", "architectures": ["Transformer"], **asdict(config)}
    said = {"model_type": family, "architectures": [CLASSES[family]], "torch_dtype": dtype}
    said |= {theirs: getattr(config, ours) for ours, theirs in SIZES.items()}
    said |= {"num_key_value_heads": config.n_kv_head, "rope_theta": config.rope_theta,
             "tie_word_embeddings": config.tied, "hidden_act": "silu", "attention_dropout": 0.0,
             "eos_token_id": config.eos_id, "bos_token_id": None, "pad_token_id": None}
    if family != "qwen2":
        said["attention_bias"] = False
    if family in OWN_HEAD_WIDTH:
        said["head_dim"] = config.head_width
    if config.rope_scaling:
        said["rope_scaling"] = dict(config.rope_scaling)  # transformers adds to what it is given
    return said
