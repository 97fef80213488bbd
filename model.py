"""
A decoder that is OLMo 2 (arXiv 2501.00656) or RAT+ (arXiv 2602.18196) by a few fields of its Config.

    tokens -> embedding -> [ attention block -> MLP block ] x n_layer -> norm -> head -> logits

In attention: project q, k, v  ->  decaying memory on k, v (memory.py)  ->  QK-norm  ->  RoPE  ->  sparse method
(sparse.py)  ->  output projection. A model without memory is plain attention: that is all that separates the two.

    OLMo 2 normalises each sublayer's output,   x = x + norm(attn(x)); x = x + norm(mlp(x))   with QK-norm and SwiGLU.
    RAT+   normalises its input, as Llama does, x = x + attn(norm(x)); x = x + mlp(norm(x))   with an output gate, GELU.

Modules carry the names of Hugging Face's OLMo 2, so a parameter and its tensor in a file are called the same.
Here, top down: Config and presets, Transformer, its blocks, the cache. weights.py reads and writes the files.
Checked against transformers' Olmo2 and the official RAT+ in tests/test_model.py. Read memory.py next, then sparse.py.

Letters: B batch, T tokens, C model width, H query heads, KV key/value heads, D = C / H head width, V vocabulary.
"""
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional as F

import backend
import weights
from memory import memory_scan, memory_step
from sparse import Dense


@dataclass
class Config:
    """The defaults are OLMo 2's form; RAT+ changes the fields from pre_norm on."""
    vocab_size: int = 100352
    n_layer: int = 16
    width: int = 2048          # C
    n_head: int = 16           # H
    n_kv_head: int = 16        # KV, a divisor of n_head; fewer than n_head is grouped-query attention
    mlp_width: int = 8192      # hidden width of the MLP
    context_len: int = 4096    # the length it was trained for; nothing stops at it
    rope_theta: float = 500000.0
    norm_eps: float = 1e-6
    tied: bool = False         # one matrix for embedding and head
    pre_norm: bool = False     # normalise each sublayer's input (RAT+) instead of its output (OLMo 2)
    qk_norm: bool = True       # RMS norm over the whole q and k projections, before the split into heads
    swiglu: bool = True        # else exact (erf) GELU
    output_gate: bool = False  # attention output times sigmoid of one more projection
    memory: bool = False       # Eq. 1 on k and v
    eos_id: int | None = None  # the end-of-text token, where known

    def __post_init__(self):
        sizes = self.vocab_size, self.n_layer, self.width, self.n_head, self.n_kv_head, self.mlp_width
        if min(sizes) < 1 or self.width % self.n_head or self.n_head % self.n_kv_head or self.head_width % 2:
            raise ValueError(f"sizes do not fit together: width={self.width} must be n_head={self.n_head} heads of an "
                             f"even width, n_head a multiple of n_kv_head={self.n_kv_head}, and all at least 1")

    @property
    def head_width(self):
        return self.width // self.n_head  # D


RATPLUS = dict(vocab_size=32000, rope_theta=10000.0, tied=True, pre_norm=True, qk_norm=False, swiglu=False,
               output_gate=True, memory=True)
PRESETS = {
    # ours, over bytes (256 values and the end of text): to train in minutes
    "pico": Config(257, n_layer=2, width=96, n_head=3, n_kv_head=3, mlp_width=256, context_len=512,         # 0.3M
                   rope_theta=10000.0, eos_id=256),
    "micro": Config(257, n_layer=4, width=384, n_head=6, n_kv_head=6, mlp_width=704, context_len=1024,      # 5.8M
                    rope_theta=10000.0, eos_id=256),
    # allenai/OLMo-2-0425-1B, -1124-7B, -1124-13B, -0325-32B
    "olmo2-1b": Config(n_layer=16, width=2048, n_head=16, n_kv_head=16, mlp_width=8192, eos_id=100257),     # 1.5B
    "olmo2-7b": Config(n_layer=32, width=4096, n_head=32, n_kv_head=32, mlp_width=11008, eos_id=100257),    # 7.3B
    "olmo2-13b": Config(n_layer=40, width=5120, n_head=40, n_kv_head=40, mlp_width=13824, eos_id=100257),   # 13.7B
    "olmo2-32b": Config(n_layer=64, width=5120, n_head=40, n_kv_head=8, mlp_width=27648, eos_id=100257),    # 32.2B
    # barpitf/ratplus; LLaMA's tokenizer, whose end of text is 2
    "ratplus-1b": Config(n_layer=24, width=2048, n_head=16, n_kv_head=16, mlp_width=8192, eos_id=2, **RATPLUS),   # 1.5B
    "ratplus-3b": Config(n_layer=28, width=2560, n_head=20, n_kv_head=20, mlp_width=10240, eos_id=2, **RATPLUS),  # 2.7B
    "ratplus-7b": Config(n_layer=32, width=4096, n_head=32, n_kv_head=32, mlp_width=16384, eos_id=2, **RATPLUS),  # 7.6B
}


LAYER_DICE = 0x9E3779B97F4A7D  # large and odd, gives each layer its own dice; times the number of layers it stays below 2**63


@dataclass
class Feed:
    """What every layer needs to know about one call of the model."""
    cos: torch.Tensor            # (1 or B, T, 1, D/2)  RoPE at the tokens' positions
    sin: torch.Tensor
    sparse: Dense                # the method
    lengths: torch.Tensor | None  # (B,)    real tokens per row in this call; None: all T
    real: torch.Tensor | None    # (B, T)   True where there is a real token; None: everywhere
    dice: torch.Tensor | None    # (B, T)   a hash of the row's tokens so far: chance for H2's selectors, else ignored
    position: torch.Tensor       # (1 or B, T)  each token's
    decoding: bool = False       # one new token per row of a cache
    # with a cache, whose places for tokens are called slots (see Cache):
    start: object = 0            # int, or (B,)  the slot of the first token
    slots: tuple = ()            # index of the real tokens' slots in a (B, max_len, ...) tensor


# ---------------------------------------------------------------- the model

class Transformer(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Block(config, index) for index in range(config.n_layer))
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.lm_head = None if config.tied else nn.Linear(config.width, config.vocab_size, bias=False)
        self.apply(init)

    def forward(
        self,
        tokens,        # (B, T)  ids; rows of different lengths are padded on the right, with any id
        lengths=None,  # (B,)    real tokens per row; None: all T
        cache=None,    # from new_cache: these tokens continue what it holds, and are added to it
        sparse=None,   # a method of sparse.py; None is dense
    ):                 # -> logits (B, T, V); at padding they mean nothing
        """
        With a cache, one token per row without lengths is a decoding step (sparse.decode). Else it is a prompt, or a chunk
        of one (sparse.prefill). The first decoding step lets the method drop prompt entries (sparse.compress).
        """
        return self.head(self.hidden(tokens, lengths, cache, sparse))

    def hidden(self, tokens, lengths=None, cache=None, sparse=None):
        """forward without the head: (B, T, C), normalised. A prompt's last token alone may need the head."""
        self.check_tokens(tokens)
        sparse = sparse or Dense()
        decoding = cache is not None and tokens.shape[1] == 1 and lengths is None
        if decoding:
            cache.compress(sparse)  # once, and only if the method drops entries
        feed = self.feed(tokens, lengths, cache, sparse, decoding)
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, feed, cache)
            if feed.dice is not None:  # each layer throws its own
                feed.dice = feed.dice + LAYER_DICE
        return self.norm(x)

    def head(self, x):
        return F.linear(x, self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight)

    def feed(self, tokens, lengths, cache, sparse, decoding):
        """Where these tokens stand: positions, padding, dice. Makes room for them in the cache."""
        B, T = tokens.shape
        device, D = tokens.device, self.config.head_width
        index = torch.arange(T, device=device)
        # full rows are not padded. One token with lengths stays a prompt: only without is it a decoding step
        if lengths is not None and T > 1 and bool((lengths == T).all()):
            lengths = None
        real = None if lengths is None else index < lengths[:, None]
        position, start, slots = index[None], 0, ()
        if cache is not None:
            position = cache.lengths[:, None] + index
            start, slots = cache.grow(T, lengths, real)
        angle = position[..., None] * (1 / self.config.rope_theta ** (torch.arange(0, D, 2, device=device).float() / D))
        cos, sin = angle.cos().unsqueeze(2), angle.sin().unsqueeze(2)

        dice = None
        if cache is not None or type(sparse) is not Dense:
            mixed = (tokens + 1) * 0x1E3779B97F4A7C15 ^ (position + 1) * 0x632BE59BD9B4E019
            dice = (mixed if real is None else mixed * real).cumsum(1)
            if cache is not None:
                dice = dice + cache.token_hash[:, None]
                cache.token_hash = dice[:, -1]
        return Feed(cos, sin, sparse, lengths, real, dice, position, decoding, start, slots)

    def new_cache(self, B, max_len, window=64):
        """An empty cache for B rows of at most max_len tokens each. window: last queries kept, for SnapKV."""
        weight = self.embed_tokens.weight
        return Cache(self.config, B, max_len, window, device=weight.device, dtype=weight.dtype)

    @torch.no_grad()
    def prefill(self, tokens, lengths=None, cache=None, sparse=None):
        """Feed a prompt; the logits (B, V) of the token to follow each row."""
        if lengths is None and tokens.shape[1] == 1:  # without lengths it would be a decoding step
            lengths = torch.ones(len(tokens), dtype=torch.long, device=tokens.device)
        x = self.hidden(tokens, lengths, cache, sparse)
        last = x[:, -1] if lengths is None else x[torch.arange(len(x), device=x.device), lengths - 1]
        return self.head(last)

    @torch.no_grad()
    def decode(self, logits, cache, max_new_tokens, sparse=None, temperature=0, top_k=None, eos_id=None, seed=None):
        """
        Continue each row of a filled cache: new tokens (B, <= max_new_tokens). logits: (B, V), from prefill.

        temperature 0 takes the likeliest token; above, tokens are drawn, from the top_k likeliest if given, and the
        same seed draws the same. A row that has written eos_id repeats it; when all have, generation ends.
        """
        source = None
        if temperature > 0:
            source = torch.Generator(logits.device)
            source.manual_seed(seed) if seed is not None else source.seed()
        new, done = [], torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
        for step in range(max_new_tokens):
            token = sample(logits.float(), temperature, top_k, source)  # (B,)
            if eos_id is not None:
                token = token.masked_fill(done, eos_id)
                done = done | (token == eos_id)
            new.append(token)
            if step + 1 == max_new_tokens or (eos_id is not None and bool(done.all())):
                break
            logits = self(token[:, None], cache=cache, sparse=sparse)[:, -1]
        return torch.stack(new, dim=1)

    def generate(self, tokens, max_new_tokens, lengths=None, sparse=None, temperature=0, top_k=None, eos_id=None,
                 seed=None):
        """Prompts (B, T), right-padded to T where lengths (B,) says so -> new tokens alone. Settings as in decode."""
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
        compressor = getattr(sparse, "compress_by", sparse)
        cache = self.new_cache(len(tokens), tokens.shape[1] + max_new_tokens, window=max(64, getattr(compressor, "window", 0)))
        logits = self.prefill(tokens, lengths, cache, sparse)
        return self.decode(logits, cache, max_new_tokens, sparse, temperature, top_k, eos_id, seed)

    def check_tokens(self, tokens):
        # on a GPU the look-up itself asserts; asking first would make every step wait for the answer
        if tokens.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(f"token {high if low >= 0 else low} is outside the model's vocabulary of "
                                 f"{self.config.vocab_size}: was the text encoded with this model's tokenizer?")

    def add_memory(self, gate=0.5):
        """
        Give a model that has none a fresh memory, to be trained: every gate starts at `gate`, above 0 and below 1, whatever
        it reads. At 1/2, as in a model trained with a memory from the start; experiments/gate_start.py says what other values
        do. ValueError for another gate, or if there is a memory.
        """
        if not 0 < gate < 1:
            raise ValueError(f"gate={gate}: gates start above 0 and below 1")
        if self.config.memory:
            raise ValueError("this model has a memory already: load it without memory=True")
        self.config = replace(self.config, memory=True)
        for layer in self.layers:
            weight = layer.self_attn.k_proj.weight
            layer.self_attn.memory_proj = memory_proj(self.config).to(weight.device, weight.dtype)
            nn.init.zeros_(layer.self_attn.memory_proj.weight)
            nn.init.constant_(layer.self_attn.memory_proj.bias, math.log(gate / (1 - gate)))
        return self

    @classmethod
    def from_pretrained(cls, path, dtype=None, device="cpu", memory=None):
        """
        Load a Hugging Face OLMo 2 directory, one that save_pretrained wrote, or an official RAT+ .pth file.

        dtype: e.g. torch.bfloat16; None keeps what the file holds. memory=True adds a fresh memory to a model that has
        none. Files are mapped: beyond the model itself, memory for one tensor is enough. Raises ValueError or
        FileNotFoundError, whose one line names the file, what is wrong in it, and what to do.
        """
        settings, tensors = weights.read(path)
        try:
            config = Config(**settings)
        except (TypeError, ValueError) as error:  # a field of another name, type or size
            raise ValueError(f"{path}: its config describes no model here ({error}): fetch it again") from None
        with torch.device("meta"):  # shapes without storage, until the weights are there
            model = cls(config)
        weights.fill(model, tensors, path, dtype, device)
        return model.add_memory() if memory else model

    def save_pretrained(self, path):
        """Write config.json and safetensors into the directory `path`; transformers opens it if it is pure OLMo 2."""
        weights.write(path, self.config, self.state_dict())

    def flops_per_token(self, reads):
        """FLOPs per token, forward and backward, where it reads so many entries: T / 2 in dense attention."""
        used = sum(p.numel() for p in self.parameters()) - (0 if self.config.tied else self.embed_tokens.weight.numel())
        return 6 * used + 12 * self.config.n_layer * self.config.width * reads


def init(module):
    """
    Normal weights of std 0.02 (OLMo 2 and RAT+ alike), biases 0: a memory that is trained from scratch starts at g = 1/2.
    """
    if not isinstance(module, (nn.Linear, nn.Embedding)) or module.weight.is_meta:
        return
    nn.init.normal_(module.weight, std=0.02)
    if getattr(module, "bias", None) is not None:
        nn.init.zeros_(module.bias)


def sample(logits, temperature, top_k, source):
    """(B, V) -> (B,)"""
    if temperature == 0:
        return logits.argmax(-1)
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=source).squeeze(1)


# ---------------------------------------------------------------- its blocks

class Block(nn.Module):

    def __init__(self, config, index):
        super().__init__()
        self.pre_norm = config.pre_norm
        self.self_attn = Attention(config, index)
        self.mlp = MLP(config)
        norm = lambda: nn.RMSNorm(config.width, eps=config.norm_eps)
        if config.pre_norm:
            self.input_layernorm, self.pre_feedforward_layernorm = norm(), norm()
        else:
            self.post_attention_layernorm, self.post_feedforward_layernorm = norm(), norm()

    def forward(self, x, feed, cache):
        if self.pre_norm:
            x = x + self.self_attn(self.input_layernorm(x), feed, cache)
            x = x + self.mlp(self.pre_feedforward_layernorm(x))
        else:
            x = x + self.post_attention_layernorm(self.self_attn(x, feed, cache))
            x = x + self.post_feedforward_layernorm(self.mlp(x))
        return x


def memory_proj(config):
    """
    The gate's projection: as wide as k. RAT+ has no bias and loads with zeros; with one, a channel has a length of its own
    whatever it reads.
    """
    return nn.Linear(config.width, config.n_kv_head * config.head_width)


class Attention(nn.Module):

    def __init__(self, config, index):
        super().__init__()
        self.index = index                                       # which layer this is
        self.config = config
        C, kv_width = config.width, config.n_kv_head * config.head_width
        self.q_proj = nn.Linear(C, C, bias=False)
        self.k_proj = nn.Linear(C, kv_width, bias=False)
        self.v_proj = nn.Linear(C, kv_width, bias=False)
        self.o_proj = nn.Linear(C, C, bias=False)
        self.q_norm = nn.RMSNorm(C, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(kv_width, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.memory_proj = memory_proj(config) if config.memory else None
        self.output_gate = nn.Linear(C, C, bias=False) if config.output_gate else None

    def forward(self, x, feed, cache):
        B, T, C = x.shape
        heads = lambda y: y.view(B, T, -1, self.config.head_width)  # (B, T, C) -> (B, T, H, D); for k, v (B, T, KV, D)
        q, k, v = heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x))
        gate = None if self.memory_proj is None else heads(self.gate(x))

        if feed.decoding and backend.triton_for(q):
            q = cache.step(self, q, k, v, gate, feed)  # all of what follows until attention, in one kernel
            y = cache.read(self.index, q, feed)
        else:
            if gate is not None:
                k, v = self.remember(k, v, gate, feed, cache)
            # QK-norm spans the whole projection, all heads together
            q, k = heads(self.q_norm(q.flatten(2))), heads(self.k_norm(k.flatten(2)))
            q, k = rotate(q, feed), rotate(k, feed)
            if cache is None:
                y, _ = feed.sparse.prefill(q, k, v, 0, feed.dice)
            else:
                y = cache.attend(self.index, q, k, v, feed)  # the same, with what the cache holds before k and v
        y = y.flatten(2)  # (B, T, C)
        if self.output_gate is not None:
            y = y * torch.sigmoid(self.output_gate(x))
        return self.o_proj(y)

    def gate(self, x):
        """Logits of Eq. 1's g. They read the block's input at RMS 1: pre-norm has seen to that."""
        return self.memory_proj(x if self.config.pre_norm else F.rms_norm(x, x.shape[-1:], eps=self.config.norm_eps))

    def remember(self, k, v, gate, feed, cache):
        """Eq. 1 on k and v (B, T, KV, D), from the cache's state and to it."""
        if feed.real is not None:  # g = 1 and 1 - g = 0: padding adds nothing, and what was remembered passes unchanged
            gate = gate.masked_fill(~feed.real[..., None, None], torch.inf)
        if backend.triton_for(k):
            from kernels import memory_scan as form
        else:
            form = memory_step if k.shape[1] == 1 else memory_scan
        if cache is None:
            k, v, _ = form(k, v, gate)
        else:
            k, v, cache.state[self.index] = form(k, v, gate, cache.state[self.index])
        return k, v


def rotate(x, feed):
    """RoPE on x (B, T, H, D): channels d and d + D/2 are a pair, turned by the position's angle. In fp32."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * feed.cos - b * feed.sin, b * feed.cos + a * feed.sin], dim=-1).to(x.dtype)


class MLP(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.mlp_width, bias=False) if config.swiglu else None
        self.up_proj = nn.Linear(config.width, config.mlp_width, bias=False)
        self.down_proj = nn.Linear(config.mlp_width, config.width, bias=False)

    def forward(self, x):
        if self.gate_proj is not None:
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return self.down_proj(F.gelu(self.up_proj(x)))


# ---------------------------------------------------------------- the cache

@dataclass
class LayerCache:
    """One layer's cache as a decoding step sees it."""
    k: torch.Tensor                 # (B, Tk, KV, D)  the slots up to the fullest row's newest entry, the query's own
    v: torch.Tensor
    used: torch.Tensor              # (B,)            slots filled per row: its newest entry is in slot used - 1
    ragged: bool                    # rows differ in `used`
    dice: torch.Tensor              # (B, 1)
    positions: torch.Tensor | None  # (B, Tk, KV)     true position of each slot; None: the slot itself
    bounds_of: Callable = None      # block size -> low, high (B, N, KV, D) of its blocks' keys, which the cache keeps for Triton

    def filled_slots(self):
        """(B, Tk) True where a slot holds an entry."""
        return torch.arange(self.k.shape[1], device=self.used.device) < self.used[:, None]

    def positions_of(self, slots):
        """Slots (B, KV, S), -1 for none -> true positions, likewise."""
        if self.positions is None:
            return slots
        return self.positions.transpose(1, 2).gather(2, slots.clamp_min(0)).where(slots >= 0, -1)


class Cache:
    """
    Keys and values (after memory, QK-norm and RoPE) of B rows of tokens, and the memory's state, for all layers.

    A token's slot is its position, until SnapKV drops prompt entries and closes the gaps; `positions` then tells which
    token a slot holds. Rows may differ in length: row b fills the slots below used[b], the rest is zeros.
    """

    def __init__(self, config, B, max_len, window, device, dtype):
        layers = range(config.n_layer)
        entries = B, max_len, config.n_kv_head, config.head_width
        self.k = [torch.zeros(entries, device=device, dtype=dtype) for _ in layers]  # zeros: garbage might be NaN
        self.v = [torch.zeros(entries, device=device, dtype=dtype) for _ in layers]
        self.positions = [None for _ in layers]  # (B, slots, KV), once compressed
        self.state = [None for _ in layers]      # (2, B, KV, D) fp32, of the memory
        self.bounds = [None for _ in layers]     # (low, high, block size) of Quest's kernels: (B, N, KV, D), once asked for
        # each row's last queries, the newest at the end, for SnapKV; kept with any method, as a fork may use it
        queries = B, window, config.n_head, config.head_width
        self.recent_q = [torch.zeros(queries, device=device, dtype=dtype) for _ in layers]
        self.selected = [None for _ in layers]   # what the method read in the last call, in the words of sparse.py
        self.lengths = torch.zeros(B, dtype=torch.long, device=device)     # tokens fed per row: the next position
        self.used = torch.zeros(B, dtype=torch.long, device=device)        # slots filled per row
        self.token_hash = torch.zeros(B, dtype=torch.long, device=device)  # of all tokens fed, for the random selectors
        self.filled = 0                          # the largest of `used`, known without asking the GPU
        self.ragged = False                      # rows may differ in `used`

    @property
    def max_len(self):
        return self.k[0].shape[1]

    def fork(self):
        """An independent copy: one prefill can serve many settings."""
        clone = lambda x: x.clone() if isinstance(x, torch.Tensor) else tuple(map(clone, x)) if isinstance(x, tuple) else x
        copy = object.__new__(Cache)
        for field, value in vars(self).items():
            setattr(copy, field, [clone(x) for x in value] if isinstance(value, list) else clone(value))
        copy.selected = [None for _ in self.selected]  # large after a MoBA prefill
        return copy

    def grow(self, T, lengths, real):
        """
        Claim slots for T more tokens per row, of which lengths (B,) are real as real (B, T) says (None, None: all).
        Returns the first one's slot, int or (B,), and the index of all of them in a (B, max_len, ...) tensor.
        """
        start, new = self.used if self.ragged else self.filled, T if lengths is None else lengths
        filled = self.filled + T if lengths is None else int((self.used + lengths).max())
        if filled > self.max_len:
            raise ValueError(f"the cache has room for {self.max_len} entries a row and would need {filled}: "
                             "ask new_cache for a larger max_len")
        self.lengths, self.used, self.filled = self.lengths + new, self.used + new, filled
        if not self.ragged and lengths is None:
            return start, (slice(None), slice(start, start + T))
        self.ragged = True
        B, device = len(self.used), self.used.device
        slot = torch.as_tensor(start, device=device).view(-1, 1) + torch.arange(T, device=device)
        row = torch.arange(B, device=device)[:, None]
        return start, tuple(only_real(x.expand(B, T), real) for x in (row, slot))

    def attend(self, i, q, k, v, feed):
        """Store k, v (B, T, KV, D) of layer i, and attend with q (B, T, H, D) to all it holds, through the hooks."""
        self.store(self.k[i], k, feed)
        self.store(self.v[i], v, feed)
        self.bounds[i] = None  # of fewer keys
        self.note(i, q, feed)
        if isinstance(feed.start, int) and feed.start == 0 and not feed.decoding:  # nothing came before
            y, self.selected[i] = feed.sparse.prefill(q, k, v, 0, feed.dice)
            return y
        return self.read(i, q, feed)

    def step(self, attention, q, k, v, gate, feed):
        """
        The projections q (B, 1, H, D), k, v, gate (B, 1, KV, D) of a new token, through memory, QK-norm and RoPE, k and v
        into the cache: in one kernel, and in fp32 all the way. -> q, ready for attention.
        """
        from kernels import decode_step
        i, config = attention.index, attention.config
        if gate is not None and self.state[i] is None:
            self.state[i] = torch.zeros(2, *k[:, 0].shape, device=k.device)
        norms = (attention.q_norm.weight, attention.k_norm.weight) if config.qk_norm else (None, None)
        low, high, block_size = self.bounds[i] or (None, None, 1)
        q = decode_step(q, k, v, gate, *norms, config.norm_eps, feed.cos, feed.sin, self.state[i], self.k[i], self.v[i],
                        low, high, block_size, self.used)
        self.note(i, q, feed)
        return q

    def note(self, i, q, feed):
        """Keep what a later compression, or a compressed cache, needs to know of these tokens."""
        if self.positions[i] is None:
            self.recent_q[i] = self.newest(self.recent_q[i], q, feed.lengths)
        else:
            self.store(self.positions[i], feed.position.expand(q.shape[:2])[..., None], feed)

    def read(self, i, q, feed):
        """Attend with q (B, T, H, D), whose tokens are stored, to all that layer i holds, through the hooks."""
        if feed.decoding:
            y, self.selected[i] = feed.sparse.decode(q, self.layer(i, feed.dice))
        else:
            y, self.selected[i] = feed.sparse.prefill(q, self.k[i][:, :self.filled], self.v[i][:, :self.filled],
                                                      feed.start, feed.dice)
        return y

    def layer(self, i, dice):
        positions = None if self.positions[i] is None else self.positions[i][:, :self.filled]
        return LayerCache(self.k[i][:, :self.filled], self.v[i][:, :self.filled], self.used, self.ragged, dice, positions,
                          lambda block_size: self.bounds_of(i, block_size))

    def bounds_of(self, i, block_size):
        """Each block's least and greatest key, per channel: low, high (B, N, KV, D). From then on, step keeps them up to date."""
        from kernels_sparse import block_bounds
        if self.bounds[i] is None or self.bounds[i][2] != block_size:
            self.bounds[i] = *block_bounds(self.k[i], self.used, block_size), block_size
        N = -(-self.filled // block_size)
        return self.bounds[i][0][:, :N], self.bounds[i][1][:, :N]

    def store(self, where, x, feed):
        where[feed.slots] = x if isinstance(feed.slots[1], slice) else only_real(x, feed.real).to(where.dtype)

    def newest(self, old, q, lengths):
        """The last W queries of each row: of old (B, W, H, D), then the first lengths (B,) of q (B, T, H, D)."""
        W, both = old.shape[1], torch.cat([old, q.to(old.dtype)], dim=1)
        if lengths is None:
            return both[:, -W:]
        index = lengths[:, None] + torch.arange(W, device=q.device)  # (B, W)
        return both.gather(1, index[..., None, None].expand(-1, -1, *q.shape[2:]))

    def compress(self, sparse):
        """Before the first decoding step: drop the entries that the method does not keep, in every layer."""
        if self.filled == 0 or self.positions[0] is not None:
            return
        used, room = self.used, self.max_len - self.filled
        for i in range(len(self.k)):
            # the last prompt token's hash stands in for the draw of all of them
            k, v = self.k[i][:, :self.filled], self.v[i][:, :self.filled]
            dice = self.token_hash[:, None] + i * LAYER_DICE
            kept = sparse.compress(self.recent_q[i], k, v, self.lengths, dice)  # (B, KV, S)
            if kept is None:
                return
            kept = kept.transpose(1, 2)                                         # (B, S, KV), -1 at the end
            index = kept.clamp_min(0).unsqueeze(-1).expand(-1, -1, -1, k.shape[-1])
            gap = (kept < 0).unsqueeze(-1)
            grown = lambda x: F.pad(x, (0, 0) * (x.dim() - 2) + (0, room))
            self.k[i] = grown(k.gather(1, index).masked_fill(gap, 0))
            self.v[i] = grown(v.gather(1, index).masked_fill(gap, 0))
            self.positions[i] = grown(kept)
            self.recent_q[i] = self.bounds[i] = None
            used = (kept[:, :, 0] >= 0).sum(1)                                  # (B,), the same in all layers and heads
        self.used, self.filled = used, kept.shape[1]


def only_real(x, real):
    """(B, T, ...) -> (tokens, ...) without padding, of which real (B, T) tells; None: there is none."""
    return x.flatten(0, 1) if real is None else x[real]
