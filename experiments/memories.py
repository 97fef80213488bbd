"""
Memories that are not the paper's, a class each: how one of your own is written.

    keys          k~ by Eq. 1, and v~[t] = v[t]; `values` in memory.py is the opposite
    head-gate     Eq. 1 with one g[t] for all channels of a KV head
    fixed-decay   g = 1 - 1/L, whatever the input: the heads' L spread from 1 to 64 tokens, as in
                  RetNet (arXiv 2307.08621)
    convolution   k~[t] = k[t] + sum over j < 4 of w[j] k[t-j], v~ alike: a short memory that is no
                  average, as in H3 (arXiv 2212.14052) and Mamba

    python -m experiments.memories train.py --preset=pico --memory=convolution
    python -m experiments.memories shift.py bestkey.py look.py --method bestkey:budget=1/8

runs a script of ours that knows them, and what the files before it register: a memory of yours in
memory.MEMORIES, a selector in sparse.METHODS. A model holds its memory's name, and loads where that
name is in memory.MEMORIES. On a GPU the kernels do not know these classes: their layers are
computed as they are written here, and a run says so once.

Checked in tests/test_memories.py. Read memory.Decay first; experiments/ablations.py compares some.

Letters: B batch, T tokens, C model width, KV key/value heads, D head width, W width of a filter.
"""
import importlib.util
import sys
from pathlib import Path

import torch
from torch import nn

from infra import cli
from infra.files import short
from memory import MEMORIES, Decay

W = 4         # tokens that a convolution reads
LONGEST = 64  # tokens that the longest fixed decay averages over: what the paper's ARL teaches


class KeysAlone(Decay):
    """Eq. 1 for the keys, and values as they are."""

    def forward(self, x, k, v, state=None, real=None):
        k, _, state = super().forward(x, k, v, state, real)
        return k, v, state


class HeadGate(Decay):
    """logit[h, d] = mean over d' of logit[h, d']"""

    def gate(self, x):
        logits = super().gate(x)  # (B, T, KV, D)
        return logits.mean(-1, keepdim=True).expand_as(logits)


class FixedDecay(Decay):
    """
    logit[h, d] = log(L[h] - 1), so g = 1 - 1/L[h], with L[h] = 64 ** (h / (KV - 1)). It learns
    nothing.
    """

    def __init__(self, config):
        nn.Module.__init__(self)
        self.heads = config.n_kv_head, config.head_width

    def gate(self, x):
        KV, D = self.heads
        L = LONGEST ** torch.linspace(0, 1, KV, device=x.device)  # (KV,)
        logits = (L - 1).clamp_min(1e-13).log()                   # (KV,)  -30 where L = 1: g = 0
        return logits[:, None].expand(*x.shape[:2], KV, D)

    def start(self, g):
        pass


class Convolution(nn.Module):
    """A causal filter of W tokens for each channel of k and of v, added to them."""

    def __init__(self, config):
        super().__init__()
        self.filters = nn.Parameter(torch.empty(2, W, config.n_kv_head, config.head_width))

    @staticmethod
    def state_shape(config, B):
        """The last W - 1 keys and values."""
        return 2, B, W - 1, config.n_kv_head, config.head_width

    def forward(self, x, k, v, state=None, real=None):
        T, kv = k.shape[1], torch.stack([k, v])  # (2, B, T, KV, D)
        if state is None:
            state = torch.zeros_like(kv[:, :, :1]).expand(-1, -1, W - 1, -1, -1)
        past = torch.cat([state.to(kv.dtype), kv], dim=2)  # (2, B, W - 1 + T, KV, D)
        for j in range(W):
            kv = kv + self.filters[:, None, j, None].to(kv.dtype) * past[:, :, W - 1 - j:][:, :, :T]

        # what the next token reads: each row's last entries, of which padding is none
        if real is None:
            state = past[:, :, T:]
        else:
            last = real.sum(1)[:, None] + torch.arange(W - 1, device=x.device)  # (B, W - 1)
            state = past.gather(2, last[None, :, :, None, None].expand_as(past[:, :, T:]))
        return *kv, state.float()

    @torch.no_grad()
    def start(self, g):
        """In a model that was trained without, k~ = k at first."""
        self.filters.zero_()


MEMORIES |= {"keys": KeysAlone, "head-gate": HeadGate, "fixed-decay": FixedDecay,
             "convolution": Convolution}


SCRIPTS = "train.py", "eval_niah.py", "sample.py", "look.py"


def bring(file):
    """Run a Python file of the user's as a module, for what it registers."""
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"there is no file {file}")
    if path.suffix != ".py":
        raise ValueError(f"{file} is no Python file: its name must end in .py")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # where inspect finds its source
    spec.loader.exec_module(module)


def main():
    words = sys.argv[1:]
    if words[:1] in (["-h"], ["--help"]):
        print(__doc__.strip())
        return
    n = next((i for i, word in enumerate(words) if word in SCRIPTS), None)
    if n is None:
        cli.end(f"memories.py: {short(' '.join(words)) if words else 'nothing'}: behind your files "
                f"comes a script to run, one of {', '.join(SCRIPTS)}, and its flags")
    files, script = words[:n], words[n]
    cli.command("memories.py", lambda: [bring(file) for file in files])
    sys.argv[:n + 2] = [script]  # its own flags are what it finds
    cli.STARTER[1:] = ["-m", "experiments.memories", *files]
    importlib.import_module(Path(script).stem).main()


if __name__ == "__main__":
    main()
