"""
What parameters are called: in model.py, and in files.

    model.py   layers.0.self_attn.q_proj.weight         layers.0.self_attn.memory.proj.weight
    files      model.layers.0.self_attn.q_proj.weight   model.layers.0.self_attn.memory_proj.weight

Files have the names of Hugging Face's OLMo 2, so that others open them. The memory of RAT+ was in
files before there were other memories, so there its name stays as it was.
"""
import re

# What torch.compile, DDP, FSDP and activation checkpointing leave in names.
WRAPPERS = re.compile(
    r"(?<![^.])(_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def our_name(theirs):
    """
    A tensor's name in model.py: without what the model, or a part of it, was wrapped in ("model.",
    and WRAPPERS at any place), and with the memory's projection in the memory.
    """
    name = re.sub(r"^(model\.)+", "", WRAPPERS.sub("", theirs))
    return name.replace(".self_attn.memory_proj.", ".self_attn.memory.proj.")


def stored_name(name):
    """The inverse, without "model."."""
    return name.replace(".self_attn.memory.proj.", ".self_attn.memory_proj.")


def hf_name(name):
    """A parameter's name in files."""
    name = stored_name(name)
    return name if name.startswith("lm_head") else f"model.{name}"
