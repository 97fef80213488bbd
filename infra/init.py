"""
First values: what the parameters of a model are before any training.

Weights are normal of std 0.02, as in OLMo 2 and RAT+, norms are 1 and biases 0. So a memory that is
trained from scratch starts at g = 1/2. Each tensor is a function of (seed, its name in a file), so
a process may make some of them, or keep a part of each, and all processes agree. Checked in
tests/test_model.py and tests/test_train.py.
"""
import hashlib

import torch

from infra import weights


@torch.no_grad()
def first_values(name, tensor, source=None):
    """Fill a parameter in place. source: a torch.Generator, None: torch's own."""
    if tensor.dim() > 1:
        return tensor.normal_(std=0.02, generator=source)
    return tensor.fill_(1 if name.endswith("weight") else 0)


def fresh(kind, config, seed, device="cpu"):
    """A new model's tensors, {parameter name: () -> fp32 tensor}. kind: model.Transformer."""
    def make(name, shape):
        key = f"{seed} {weights.stored_name(name)}".encode()
        source = torch.Generator(device)
        source.manual_seed(int.from_bytes(hashlib.blake2b(key, digest_size=6).digest(), "little"))
        tensor = torch.empty(shape, device=device, dtype=torch.float32)
        return first_values(name, tensor, source)

    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in kind(config).state_dict().items()}
    return {name: lambda name=name, shape=shape: make(name, shape)
            for name, shape in shapes.items()}


def memory_tensors(kind, config, g):
    """
    The tensors of a fresh memory in a trained model, likewise. kind: a class of memory.MEMORIES; if
    it has a `start`, that is given g, in (0, 1).
    """
    def make(layer, name):
        with torch.device("meta"):
            memory = kind(config)
        memory = memory.to_empty(device="cpu").float()
        source = torch.Generator().manual_seed(layer)
        for path, parameter in memory.named_parameters():
            first_values(path, parameter, source)
        if hasattr(memory, "start"):
            memory.start(g)
        return memory.state_dict()[name]

    with torch.device("meta"):
        names = list(kind(config).state_dict())
    places = [(layer, name) for layer in range(config.n_layer) for name in names]
    return {f"layers.{layer}.self_attn.memory.{name}": lambda place=(layer, name): make(*place)
            for layer, name in places}
