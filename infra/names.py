"""
What parameters are called: in model.py, and in files.

    model.py   layers.0.self_attn.q_proj.weight         layers.0.self_attn.memory.proj.weight
    files      model.layers.0.self_attn.q_proj.weight   model.layers.0.self_attn.memory_proj.weight

Files have the names of Hugging Face's models, so that others open them. The memory of RAT+ was in
files before there were other memories, so there its name stays as it was. A norm before the MLP is
pre_feedforward_layernorm here, and post_attention_layernorm in the files of Llama and Qwen, where
OLMo 2 has another norm of that name.
"""
import re

from infra.families import FORMS

# What torch.compile, DDP, FSDP and activation checkpointing leave in names.
WRAPPERS = re.compile(
    r"(?<![^.])(_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# With norms of the inputs, as Llama has them.
OURS, THEIRS = ".pre_feedforward_layernorm.", ".post_attention_layernorm."


def our_name(theirs, family=None):
    """
    A tensor's name in model.py: without what the model, or a part of it, was wrapped in ("model.",
    and WRAPPERS at any place), and with the memory's projection in the memory. family: the file's
    model_type.
    """
    name = re.sub(r"^(model\.)+", "", WRAPPERS.sub("", theirs))
    name = name.replace(".self_attn.memory_proj.", ".self_attn.memory.proj.")
    return name.replace(THEIRS, OURS) if is_like_llama(family) else name


def stored_name(name, family=None):
    """The inverse, without "model."."""
    name = name.replace(".self_attn.memory.proj.", ".self_attn.memory_proj.")
    return name.replace(OURS, THEIRS) if is_like_llama(family) else name


def is_like_llama(family):
    return isinstance(family, str) and FORMS.get(family, {}).get("pre_norm", False)


def hf_name(name, family=None):
    """A parameter's name in files."""
    name = stored_name(name, family)
    return name if name.startswith("lm_head") else f"model.{name}"
