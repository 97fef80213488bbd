"""
The decaying memory: before attention, each key and value becomes an average of itself and its past.

    k~[t] = g[t] * k~[t-1] + (1 - g[t]) * k[t]        g = sigmoid(gate) in (0, 1), one per channel
    v~[t] = g[t] * v~[t-1] + (1 - g[t]) * v[t]        the same gate for both

This is Eq. 1 of arXiv 2605.28640, from RAT+ (arXiv 2602.18196). It sits right after the
projections, before QK-norm and before RoPE. A key then carries a fading trace of the tokens before
it, and so does a value: whoever selects one token reads a little of those before it, too.

One recurrence in three forms, clearest first. tests/test_memory.py holds them equal, in values and
in gradients:

    memory_loop   a Python loop over t. This is the definition; when in doubt it is right.
    memory_scan   all t at once in O(log T) steps, for training and prefill. kernels.memory_scan is
                  the same in Triton.
    memory_step   one t, for decoding, carrying the state from call to call: the loop, once.

In a model, a memory is a module that owns its parameters and its decoding state. Decay is the
paper's; a memory of your own is one more class, in MEMORIES under a name that Config.memory and the
saved config hold. Then come active recurrence learning (ARL), which teaches a model to use its
memory, and effective_length, which measures how far back a trained memory reaches.

Read model.py first. sparse.py is next: it selects among k~, and defines the pattern of ARL.

Letters: B batch, T tokens, C model width, KV key/value heads, D head width.
"""
import math
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F

from sparse import Dilated
from triton_ops import backend


# ---------------------------------------------------------------- Eq. 1, three times

def memory_loop(
    k, v,        # (B, T, KV, D)  keys before QK-norm and RoPE; values
    gate,        # (B, T, KV, D)  logits of g
    state=None,  # (2, B, KV, D)  fp32: k~ and v~ before the first token here; None is zeros
):               # -> k~, v~ in the dtypes of k and v; the state after the last token, fp32
    """Eq. 1 as it is written. In fp32 (fp64 if k is): a product of many bf16 decays drifts."""
    exact = torch.promote_types(k.dtype, torch.float32)
    x = torch.stack([k, v]).to(exact)  # (2, B, T, KV, D)
    gate = gate.to(exact)
    m = torch.zeros_like(x[:, :, 0]) if state is None else state.to(exact)  # (2, B, KV, D)
    out = []
    for t in range(k.shape[1]):
        # sigmoid(-gate) is 1 - g without the cancellation that 1 - sigmoid(gate) has near g = 1
        m = torch.sigmoid(gate[:, t]) * m + torch.sigmoid(-gate[:, t]) * x[:, :, t]
        out.append(m)
    k_mem, v_mem = torch.stack(out, dim=2)
    return k_mem.to(k.dtype), v_mem.to(v.dtype), m


def memory_scan(
    k, v,        # (B, T, KV, D)
    gate,        # (B, T, KV, D)  logits of g
    state=None,  # (2, B, KV, D)  fp32, or None
):               # -> k~, v~, state: as memory_loop
    """Eq. 1 for all t at once. Same arguments, results and precision as memory_loop."""
    exact = torch.promote_types(k.dtype, torch.float32)
    x = torch.stack([k, v], dim=2).to(exact)        # (B, T, 2, KV, D)
    if state is None:
        start = torch.zeros_like(x[:, 0])           # (B, 2, KV, D)
    else:
        start = state.to(exact).transpose(0, 1)
    m = Recurrence.apply(x, gate.to(exact).unsqueeze(2), start)
    k_mem, v_mem = m.unbind(2)
    return k_mem.to(k.dtype), v_mem.to(v.dtype), m[:, -1].transpose(0, 1).contiguous()


def memory_step(
    k, v,        # (B, 1, KV, D)  the new token's
    gate,        # (B, 1, KV, D)  logits of g
    state=None,  # (2, B, KV, D)  fp32, or None
):               # -> k~, v~, state: as memory_loop
    """Eq. 1 for one new token. The state stays fp32 from step to step, also when k is bf16."""
    assert k.shape[1] == 1, f"memory_step takes one token, got {k.shape[1]}"
    return memory_loop(k, v, gate, state)


# ---------------------------------------------------------------- the scan

def scan(g, b):
    """
    m[t] = g[t] * m[t-1] + b[t] along dim 1, with m[-1] = 0.  b, m: (B, T, ...); g broadcasts to b.

    Two steps in a row are one step of the same form:

        m[t] = (g[t] g[t-1]) m[t-2] + (g[t] b[t-1] + b[t])

    So the odd t are a scan of half the length, and each even t is one step from its odd neighbour.
    The work is O(T), the depth log2(T). Only products of decays occur, never a quotient: nothing
    overflows, however small g is.
    """
    T = g.shape[1]
    if T == 1:
        return b
    even, odd = slice(0, T - T % 2, 2), slice(1, T, 2)
    m = torch.empty_like(b)
    m[:, odd] = scan(g[:, odd] * g[:, even], torch.addcmul(b[:, odd], g[:, odd], b[:, even]))
    m[:, 0] = b[:, 0]
    m[:, 2::2] = torch.addcmul(b[:, 2::2], g[:, 2::2], m[:, 1:T - 1:2])
    return m


class Recurrence(torch.autograd.Function):
    """
    Eq. 1 with its own gradient, which is the same recurrence run backwards in time:

        G[t] = dm[t] + g[t+1] G[t+1]
        dx[t] = (1 - g[t]) G[t]
        dgate[t] = g[t] (1 - g[t]) G[t] (m[t-1] - x[t])

    Autograd through scan would keep every level of the recursion; this keeps x, gate, start and m.
    And autograd's sigmoid takes 1 - g from a rounded g, and multiplies by it last: at a saturated
    gate 0 * inf would be NaN.
    """
    @staticmethod
    def forward(
        ctx,
        x,      # (B, T, 2, KV, D)  k and v
        gate,   # (B, T, 1, KV, D)
        start,  # (B, 2, KV, D)     the state before
    ):          # -> m (B, T, 2, KV, D)
        g, b = torch.sigmoid(gate), torch.sigmoid(-gate) * x
        b[:, 0] += g[:, 0] * start  # what was remembered is one more input to the first token
        m = scan(g, b)
        ctx.save_for_backward(x, gate, start, m)
        return m

    @staticmethod
    def backward(ctx, dm):
        x, gate, start, m = ctx.saved_tensors
        g = torch.sigmoid(gate)
        g_next = torch.cat([g[:, 1:], torch.zeros_like(g[:, :1])], dim=1)
        G = scan(g_next.flip(1), dm.flip(1)).flip(1)
        dx = torch.sigmoid(-gate) * G
        pull = g * dx
        dgate = pull * torch.cat([start.unsqueeze(1), m[:, :-1]], dim=1) - pull * x
        return dx, dgate.sum(2, keepdim=True), g[:, 0] * G[:, 0]


# ---------------------------------------------------------------- what a model has of it

def remember(
    k, v,        # (B, T, KV, D)
    gate,        # (B, T, KV, D)  logits of g
    state=None,  # (2, B, KV, D)  fp32, or None
):               # -> k~, v~, state: as memory_loop
    """Eq. 1 in the form that is fastest where the tensors are."""
    if backend.triton_for(k) and is_known_to_kernels():
        from kernels import memory_scan as in_triton
        return in_triton(k, v, gate, state)
    form = memory_step if k.shape[1] == 1 else memory_scan
    return form(k, v, gate, state)


@torch.compiler.assume_constant_result  # torch.compile would look into the sources, too
def is_known_to_kernels():
    """Whether the recurrence above is the one that the kernels were written from."""
    forms = {"memory_loop": memory_loop, "memory_scan": memory_scan, "memory_step": memory_step,
             "scan": scan, "Recurrence.forward": Recurrence.forward,
             "Recurrence.backward": Recurrence.backward}
    return all([backend.is_stock(f"memory.{name}", form) for name, form in forms.items()])


class Decay(nn.Module):
    """
    Eq. 1 with a gate that the block's input decides: the memory of the paper.

    This is also what a memory of your own looks like. It is made from the model's Config, once a
    layer; its parameters are saved with the model; forward is all that the model calls. Whatever
    __init__ draws, infra/init.py then sets the first values, or the method start does.
    """

    def __init__(self, config):
        super().__init__()
        self.head_width = config.head_width
        # As wide as k. RAT+ has no bias and loads with zeros; with one, a channel has a length of
        # its own whatever it reads.
        self.proj = nn.Linear(config.width, config.n_kv_head * config.head_width)

    @staticmethod
    def state_shape(config, B):
        """Of what decoding carries on, in fp32: zeros before the first token, dimension 1 is B."""
        return 2, B, config.n_kv_head, config.head_width

    def forward(
        self,
        x,           # (B, T, C)      the block's input, normalised (Attention.at_rms_1)
        k, v,        # (B, T, KV, D)  before QK-norm and RoPE
        state=None,  # as state_shape says; None is zeros, and nobody asks for the new one
        real=None,   # (B, T) bool    False at padding; None: no padding
    ):               # -> k~, v~ like k and v; the state after each row's last real token
        return self.average(self.gate(x), k, v, state, real)

    def gate(self, x):
        """Logits of Eq. 1's g: (B, T, C) -> (B, T, KV, D)."""
        return self.proj(x).unflatten(-1, (-1, self.head_width))

    def average(self, gate, k, v, state=None, real=None):
        """forward behind the gate (B, T, KV, D)."""
        if real is not None:
            # g = 1 and 1 - g = 0: padding adds nothing, and what was remembered passes unchanged
            gate = gate.masked_fill(~real[..., None, None], torch.inf)
        return remember(k, v, gate, state)

    @torch.no_grad()
    def start(self, g):
        """First values in a model that was trained without: every gate is g, in (0, 1)."""
        self.proj.weight.zero_()
        self.proj.bias.fill_(math.log(g / (1 - g)))


class ValuesAlone(Decay):
    """Eq. 1 for the values, and keys as they are: which of the two does a selector gain from?"""

    def forward(self, x, k, v, state=None, real=None):
        _, v, state = super().forward(x, k, v, state, real)
        return k, v, state


MEMORIES = {"decay": Decay, "values": ValuesAlone}


# ---------------------------------------------------------------- learning to remember

def arl_passes(length):
    """
    Active recurrence learning (ARL, arXiv 2602.18196): per batch one optimizer step on each of
    these two passes.

    A model that may look at every token has no need of its memory and leaves it unused. So the
    first pass takes the tokens away: a query reads itself and the last token of every complete
    chunk of `length` tokens before it. The rest of a chunk can reach it through that last token's
    memory alone, so the memory learns to span a chunk. The second pass is ordinary dense attention
    on the same batch. train.py's learning rate moves on once per batch, not per pass.

    length: how many tokens the memory shall span (the paper: 64); 0 switches ARL off.
    Returns the sparse methods of the passes in order, to be given to model(..., sparse=method).
    """
    if not length:
        return [None]
    return [Dilated(dilation=length, local=0, initial=0), None]


@torch.no_grad()
def effective_length(gate):
    """
    How many tokens a memory averages over, given what its gate does on real text: 1 for no memory.

    gate: (B, T, KV, D) logits -> (KV, D) tokens. The weight of token s in m[t] is
    (1 - g[s]) g[s+1] ... g[t]. The mean age t - s under these weights, plus one, is the length. A
    constant g gives 1 / (1 - g): 64 tokens need g = 0.984. A text of less than a few times this
    length shows less of it: g = 0.999 gives 980 in 8,192 tokens and 334 in 1,024. Weights w and
    weighted ages a obey recurrences of their own: w[t] = g w[t-1] + (1 - g),
    a[t] = g (a[t-1] + w[t-1]).
    """
    gate = gate.float()
    g = torch.sigmoid(gate)
    w = scan(g, torch.sigmoid(-gate))
    a = scan(g, g * F.pad(w, (0, 0, 0, 0, 1, 0))[:, :-1])
    # The mean age at the end of the text. The whole second half is averaged, so that a single token
    # matters little.
    half = gate.shape[1] // 2
    return 1 + (a[:, half:] / w[:, half:].clamp_min(1e-30)).mean(dim=(0, 1))


@contextmanager
def lengths_of(model):
    """
    While the block runs, what each layer's memory averages over as the model reads full rows:
    yields a list that fills with effective_length, (KV, D) of a layer. It stays empty where a
    memory has no gate to measure. Not under torch.compile.
    """
    found = []

    def measure(memory, inputs):
        found.append(effective_length(memory.gate(inputs[0])))

    memories = [layer.self_attn.memory for layer in model.layers]
    hooks = [memory.register_forward_pre_hook(measure)
             for memory in memories if isinstance(memory, Decay)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
