"""
A decoder that is OLMo 2 (arXiv 2501.00656) or RAT+ (arXiv 2602.18196) by a few fields of its Config.

    tokens -> embedding -> [ attention block -> MLP block ] x n_layer -> norm -> head -> logits

In attention: project q, k, v  ->  decaying memory on k, v (memory.py)  ->  QK-norm  ->  RoPE  ->  sparse method
(sparse.py)  ->  output projection. A model without memory is plain attention: that is all that separates the two.

    OLMo 2 normalises each sublayer's output,   x = x + norm(attn(x)); x = x + norm(mlp(x))   with QK-norm and SwiGLU.
    RAT+   normalises its input, as Llama does, x = x + attn(norm(x)); x = x + mlp(norm(x))   with an output gate, GELU.

Modules carry the names of Hugging Face's OLMo 2, so a parameter and its tensor in a file are called the same.
Here, top down: Config and presets, Transformer, its blocks. cache.py has the cache, weights.py reads and writes the files.
Checked against transformers' Olmo2 and the official RAT+ in tests/test_model.py. Read memory.py next, then sparse.py.

Letters: B batch, T tokens, C model width, H query heads, KV key/value heads, D = C / H head width, V vocabulary.
"""
import hashlib
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from typing import get_args

import torch
from torch import nn
from torch.nn import functional as F

from triton_ops import backend
import memory
from infra import weights
from engine import LAYER_DICE, Cache
from infra.files import short
from infra.loss import weighted_loss, weighted_score
from memory import memory_scan, memory_step
from sparse import Dense, Dilated, drops, name, phases, window_of

TOGETHER = 32768  # tokens of a prompt that go through a layer at a time: more take memory and save no time


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
        """ValueError unless a model can be made of it: it may come from a file."""
        for field in fields(self):
            value, kinds = getattr(self, field.name), get_args(field.type) or (field.type,)
            if type(value) not in kinds and not (float in kinds and type(value) is int):  # true is an int to isinstance
                raise ValueError(f"{field.name} is {short(value)}, not of type {' or '.join(kind.__name__ for kind in kinds)}")
        sizes = self.vocab_size, self.n_layer, self.width, self.n_head, self.n_kv_head, self.mlp_width, self.context_len
        if min(sizes) < 1 or max(sizes) >= 2**28 or self.width % self.n_head or self.n_head % self.n_kv_head or self.head_width % 2:
            raise ValueError(f"sizes do not fit together: width={self.width} must be n_head={self.n_head} heads of an "
                             f"even width, n_head a multiple of n_kv_head={self.n_kv_head}, and all at least 1 and below 2**28")
        if not (0 < self.rope_theta < 1e30 and 0 <= self.norm_eps < 1):
            raise ValueError(f"rope_theta={short(self.rope_theta)} must be above 0 and below 1e30, norm_eps={self.norm_eps} from 0 to 1")
        if self.eos_id is not None and not 0 <= self.eos_id < self.vocab_size:
            raise ValueError(f"eos_id={short(self.eos_id)} is no token of {self.vocab_size}")

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


@dataclass
class Feed:
    """What every layer needs to know about one call of the model."""
    cos: torch.Tensor            # (1 or B, T, 1, D/2)  RoPE at the tokens' positions
    sin: torch.Tensor
    sparse: Dense                # the method,
    prefill: Callable            # and its prefill, as it is computed here (backend.hook)
    lengths: torch.Tensor | None  # (B,)    real tokens per row in this call; None: all T
    real: torch.Tensor | None    # (B, T)   True where there is a real token; None: everywhere
    dices: list                  # per layer, (B, T) or None: a hash of the row's tokens so far, chance for H2's selectors
    position: torch.Tensor       # (1 or B, T)  each token's
    scan: Callable | None = None  # Triton's memory_scan, where it computes
    fused: bool = False          # inference in Triton, triton_ops/block.py too
    dice: torch.Tensor | None = None  # the layer's own, while it computes
    # with a cache, whose places for tokens are called slots (see cache.py):
    decoding: bool = False       # one new token per row
    static: bool = False         # and a graph may record it: no shape depends on how many tokens the cache holds
    whole: bool = False          # the prompt ends here, and the method drops entries: at once
    watch: Callable | None = None  # see Transformer.prefill
    start: object = 0            # int, or (B,)  the slot of the first token


# ---------------------------------------------------------------- the model

class Transformer(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Block(config, index) for index in range(config.n_layer))
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.lm_head = None if config.tied else nn.Linear(config.width, config.vocab_size, bias=False)
        for path, parameter in self.named_parameters():
            init(path, parameter)

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
        return self.hidden(tokens, lengths, cache, sparse, head=True)

    def hidden(self, tokens, lengths=None, cache=None, sparse=None, whole=False, watch=None, head=False):
        """forward without the head: (B, T, C), normalised. A prompt's last token alone may need the head. See also prefill."""
        self.check_tokens(tokens)
        sparse = sparse or Dense()
        decoding = cache is not None and tokens.shape[1] == 1 and lengths is None
        if cache is not None:
            cache.check_rows(len(tokens))
        decides = phases(sparse).decode_by if decoding else phases(sparse).prefill_by
        if cache is not None and cache.positions[0] is not None and isinstance(decides, Dilated):
            raise ValueError(f"{name(sparse)} cannot go on after {name(cache.kept_by)}: its pattern needs every position")
        unharmed = nullcontext if cache is None else cache.prefilling
        if whole and drops(sparse):
            cache.check_may_drop()
        if decoding:
            cache.check_room(cache.filled + 1)
            cache.compress(sparse)  # once, and only if the method drops entries
            if cache.stepped != sparse:  # a graph of another method need not have kept Quest's bounds up to date
                cache.bounded = [None for _ in cache.bounded]
            unharmed = cache.stepping
        with unharmed():
            feed = self.feed(tokens, lengths, cache, sparse)
            feed.decoding, feed.whole, feed.watch = decoding, whole and drops(sparse), watch
            feed.static = feed.fused and decoding and backend.in_graph(sparse) and self.unhooked()
            x = self.embed_tokens(tokens)
            if feed.real is not None:  # the embedding of what pads might be NaN, and 0 * NaN is NaN
                x = x.masked_fill(~feed.real[..., None], 0)
            for layer, feed.dice in zip(self.layers, feed.dices):
                x = layer(x, feed, cache)
            if cache is not None:
                cache.stepped, cache.decoding = sparse if decoding else None, cache.decoding or decoding
                cache.weights = self.places() if feed.static else None
            x = self.norm(x)
            return self.head(x) if head else x

    def head(self, x):
        in_triton = not torch.is_grad_enabled() and backend.triton_for(self.probe(self.head_weight))
        return few_products(x, [self.head_weight])[0] if in_triton and few(x) else F.linear(x, self.head_weight)

    @property
    def head_weight(self):
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight  # (V, C)

    def loss(
        self,
        tokens,          # (B, T + 1)  ids
        weight,          # (B, T + 1)  fp32, of each token as a target; the first is none
        sparse=None,     # as in forward
        compiled=False,  # the loss by torch.compile
    ):                   # -> sum of weight * cross entropy of tokens[:, 1:], in nats
        """For training, with gradients: logits exist some thousand tokens at a time (loss.py)."""
        x = self.hidden(tokens[:, :-1], sparse=sparse)
        return weighted_loss(x.flatten(0, 1), self.head_weight, tokens[:, 1:].flatten(), weight[:, 1:].flatten(), compiled)

    def score(self, tokens, weight, sparse=None):
        """The same without gradients, and the sum of weights whose target is the likeliest token."""
        x = self.hidden(tokens[:, :-1], sparse=sparse)
        return weighted_score(x.flatten(0, 1), self.head_weight, tokens[:, 1:].flatten(), weight[:, 1:].flatten())

    def by_kernels(self):
        """
        Whether this is inference in Triton, block by block: the kernels take the weights out of the modules, and go around what
        these do in PyTorch. So they must be the modules of this file, and plain ones of torch.
        """
        return (not torch.is_grad_enabled() and backend.triton_for(self.probe(self.embed_tokens.weight))
                and all([isinstance(layer, Block) and layer.is_stock(self.config) for layer in self.layers]))

    def unhooked(self):
        """Whether this is the model of this file and no module has a hook: a graph would call it once, and then never again."""
        found = {f"model.Transformer.{name}": getattr(self, name) for name in ("forward", "hidden", "feed", "head")}
        plain_calls = not any(module._forward_hooks or module._forward_pre_hooks for module in self.modules())
        return plain_calls and all([backend.is_stock(name, code) for name, code in found.items()])

    def places(self):
        """Where the weights are: a graph reads there, whatever the model's are by then."""
        return tuple(parameter.data_ptr() for parameter in self.parameters())

    def probe(self, x):
        """An empty tensor that is like the heads that are made of x: in its dtype and place."""
        return torch.empty(0, self.config.head_width, dtype=x.dtype, device=x.device)

    def scan(self, x):
        """The memory's scan in Triton, if it is to compute what memory.py says; None: memory.py computes it."""
        if not self.config.memory or not backend.triton_for(x):
            return None
        stock = {"memory_loop": memory.memory_loop, "memory_scan": memory_scan, "memory_step": memory_step,
                 "scan": memory.scan, "Recurrence.forward": memory.Recurrence.forward,
                 "Recurrence.backward": memory.Recurrence.backward}
        if not all([backend.is_stock(f"memory.{name}", found) for name, found in stock.items()]):
            return None
        from kernels import memory_scan as in_triton
        return in_triton

    def feed(self, tokens, lengths, cache, sparse):
        """Where these tokens stand: positions, padding, dice. Makes room for them in the cache."""
        B, T = tokens.shape
        device, D = tokens.device, self.config.head_width
        index = torch.arange(T, device=device)
        # full rows are not padded. One token with lengths stays a prompt: only without is it a decoding step
        if lengths is not None and T > 1 and bool((lengths == T).all()):
            lengths = None
        real = None if lengths is None else index < lengths[:, None]
        position, start = index[None], 0
        if cache is not None:
            position = cache.lengths[cache.part, None] + index
            start = cache.grow(T, lengths)
        angle = position[..., None] * (1 / self.config.rope_theta ** (torch.arange(0, D, 2, device=device).float() / D))
        cos, sin = angle.cos().unsqueeze(2), angle.sin().unsqueeze(2)

        dices = [None] * self.config.n_layer
        if cache is not None or type(sparse) is not Dense:
            mixed = (tokens + 1) * 0x1E3779B97F4A7C15 ^ (position + 1) * 0x632BE59BD9B4E019
            dice = (mixed if real is None else mixed * real).cumsum(1)
            if cache is not None:
                dice = dice + cache.token_hash[cache.part, None]
                cache.token_hash[cache.part] = dice[:, -1]
            dices = dice + LAYER_DICE * torch.arange(self.config.n_layer, device=device)[:, None, None]
        like = self.probe(self.embed_tokens.weight)
        return Feed(cos, sin, sparse, backend.hook(sparse, "prefill", like), lengths, real, dices, position, self.scan(like),
                    cache is not None and self.by_kernels(), start=start)

    def new_cache(self, B, max_len, window=64):
        """An empty cache for B rows of at most max_len tokens each. window: last queries kept, for SnapKV."""
        weight = self.embed_tokens.weight
        return Cache(self.config, B, max_len, window, device=weight.device, dtype=weight.dtype)

    @torch.no_grad()
    def prefill(self, tokens, lengths=None, cache=None, sparse=None, whole=False, watch=None):
        """
        Feed a prompt; the logits (B, V) of the token to follow each row. Rows of long prompts go through the layers a few
        at a time, so that memory for one of them is enough.

        whole: the prompt ends here and the cache is empty. A method that drops entries then does so in each layer as soon as
        it is done, so that one layer's k and v are all that is ever whole: SnapKV's cache is small from the start.
        watch: called after each layer of each part of the batch, with the layer, what the method selected, and which tokens
        are real (B, T), None: all; T is the longest row's.
        A row may have no tokens in a later chunk of a prompt. It has no logits there: those of its last chunk hold.
        """
        B, T = tokens.shape
        if T == 0:
            raise ValueError("the prompt has no tokens")
        if cache is None and (whole or watch):
            raise ValueError("prefill(whole=True) and watch need a cache")
        if whole and cache.filled:
            raise ValueError("prefill(whole=True) takes a whole prompt, and this cache holds some of it already")
        if cache is not None:
            cache.check_whole()
            cache.check_rows(B)
        if lengths is not None:
            least, most = map(int, lengths.aminmax())
            before = 0 if cache is None else cache.used
            if not (len(lengths) == B and least >= 0 and 0 < most <= T and bool((before + lengths > 0).all())):
                raise ValueError(f"lengths={lengths.tolist()}: each of {B} rows must have 1 to {T} tokens, or 0 if it has had some")
            tokens, T = tokens[:, :most], most  # what pads all rows is left out
        elif T == 1:  # without lengths it would be a decoding step
            lengths = torch.ones(B, dtype=torch.long, device=tokens.device)
        if cache is not None:  # for all parts, before the first is fed
            cache.check_room(cache.filled + T if lengths is None else int((cache.used + lengths).max()))
        parts = [slice(first, first + max(1, TOGETHER // T)) for first in range(0, B, max(1, TOGETHER // T))]
        views = [None] * len(parts) if cache is None else [cache] if len(parts) == 1 else [cache.rows(part) for part in parts]
        logits = []
        with nullcontext() if cache is None else cache.prefilling():
            for part, view in zip(parts, views):
                some = None if lengths is None else lengths[part]
                x = self.hidden(tokens[part], some, view, sparse, whole, watch)
                last = -1 if some is None else some - 1
                logits.append(self.head(x[torch.arange(len(x), device=x.device), last][:, None])[:, 0])
            if len(parts) > 1 and cache is not None:
                cache.joined(views)
        return torch.cat(logits)

    @torch.no_grad()
    def step(self, token, cache, sparse=None):
        """
        One decoding step: token (B,) -> logits (B, V), which the next step may write over.

        With the kernels on a GPU, steps of one method that follow each other are replays of one CUDA graph, so that Python
        costs nothing. The first of them runs as it is (it may drop entries, and sums up Quest's blocks); the graph is
        captured at the second, once for a cache and a method. Code that is not ours is run at each step, as it is: whether
        there is any is asked at the first step after a prompt.
        """
        sparse = sparse or Dense()
        if not (token.is_cuda and cache.weights) or cache.stepped != sparse or len(token) != cache.B:
            return self(token[:, None], cache=cache, sparse=sparse)[:, -1]
        if sparse not in cache.graphs or cache.graphs[sparse].of != (self, cache.weights):
            cache.graphs[sparse] = Graph(self, cache, sparse)
        return cache.graphs[sparse].replay(token, cache)

    @torch.no_grad()
    def decode(self, logits, cache, max_new_tokens, sparse=None, temperature=0, top_k=None, eos_id=None, seed=None, watch=None):
        """
        Continue each row of a filled cache: new tokens (B, <= max_new_tokens). logits: (B, V), from prefill.

        temperature 0 takes the likeliest token; above, tokens are drawn, from the top_k likeliest if given, and the
        same seed draws the same. A row that has written eos_id repeats it; when all have, generation ends.
        watch: called with the cache after each step, e.g. to look at cache.selected.

        Afterwards the cache holds of each row all but its last token, eos_id where it has written that: a next turn of the
        row begins with this token. ValueError, before the first step, if the cache has no room for so many.
        """
        if max_new_tokens < 1 or not 0 <= temperature < math.inf or (top_k is not None and top_k < 1):
            raise ValueError(f"{max_new_tokens=}, {temperature=}, {top_k=}: at least 1 token, a temperature of 0 or more, top_k of 1 or more")
        cache.check_room(cache.filled + max_new_tokens - 1)
        source = None
        if temperature > 0:
            source = torch.Generator(logits.device)
            source.manual_seed(seed) if seed is not None else source.seed()
        new, done, n_done = [], torch.zeros(len(logits), dtype=torch.bool, device=logits.device), 0
        with cache.ending() as end:
            for n in range(max_new_tokens):
                token = sample(logits.float(), temperature, top_k, source)  # (B,)
                if eos_id is not None:
                    token = token.masked_fill(done, eos_id)
                    ended, done = (token == eos_id) & ~done, done | (token == eos_id)
                    n_before, n_done = n_done, int(done.sum())
                new.append(token)
                if n + 1 == max_new_tokens or n_done == len(done):
                    break
                if eos_id is not None and n_done > n_before:
                    cache.compress(sparse or Dense())  # as the first step does, but for what a row that has ended holds
                    end(ended)  # the steps that other rows still take are not theirs
                logits = self.step(token, cache, sparse)
                if watch:
                    watch(cache)
        return torch.stack(new, dim=1)

    def generate(self, tokens, max_new_tokens, lengths=None, sparse=None, temperature=0, top_k=None, eos_id=None,
                 seed=None, watch=None):
        """Prompts (B, T), right-padded to T where lengths (B,) says so -> new tokens alone. Settings as in decode."""
        cache = self.new_cache(len(tokens), tokens.shape[1] + max_new_tokens, window_of(sparse))
        logits = self.prefill(tokens, lengths, cache, sparse, whole=True)
        return self.decode(logits, cache, max_new_tokens, sparse, temperature, top_k, eos_id, seed, watch)

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
        self.load_state_dict({name: make() for name, make in memory_tensors(self.config, gate).items()}, strict=False)
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
        with torch.device("meta"):  # shapes without storage, until the weights are there
            model = cls(config_of(settings, path))
        weights.fill(model, tensors, path, dtype, device)
        return model.add_memory() if memory else model

    def save_pretrained(self, path, tokenizer=None):
        """
        Write config.json and safetensors into the directory `path`, and the tokenizer's files (data.get_tokenizer) if one is
        given; transformers opens it if it is pure OLMo 2. What is there of ours is replaced. ValueError, and nothing is changed,
        if something else has the name of a file to be written.
        """
        weights.write(path, self.config, self.state_dict(), tokenizer)


def config_of(settings, path):
    """The Config of what weights.read found at `path`. ValueError if it is none."""
    try:
        return Config(**settings)
    except (TypeError, ValueError) as error:  # a field of another name, type or size
        raise ValueError(f"{path}: its config describes no model here ({short(str(error))}): fetch it again") from None


def fresh(config, seed, device="cpu"):
    """
    A new model's tensors, {parameter name: () -> fp32 tensor}: each by init, from a source of (seed, its name). So a process
    may make some of them, or keep a part of each.
    """
    def make(name, shape):
        source = torch.Generator(device)
        source.manual_seed(int.from_bytes(hashlib.blake2b(f"{seed} {name}".encode(), digest_size=6).digest(), "little"))
        return init(name, torch.empty(shape, device=device, dtype=torch.float32), source)

    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Transformer(config).state_dict().items()}
    return {name: lambda name=name, shape=shape: make(name, shape) for name, shape in shapes.items()}


def memory_tensors(config, gate):
    """The tensors of a fresh memory, as fresh gives them: every gate is `gate`, above 0 and below 1, whatever it reads."""
    kv_width, name = config.n_kv_head * config.head_width, "layers.{}.self_attn.memory_proj.{}".format
    bias = math.log(gate / (1 - gate))
    weight = lambda: torch.zeros(kv_width, config.width, dtype=torch.float32)
    biases = lambda: torch.full((kv_width,), bias, dtype=torch.float32)
    return ({name(i, "weight"): weight for i in range(config.n_layer)}
            | {name(i, "bias"): biases for i in range(config.n_layer)})


@torch.no_grad()
def init(name, tensor, source=None):
    """
    A parameter's first values, in place: weights normal of std 0.02 (OLMo 2 and RAT+ alike), norms 1, biases 0. So a memory
    that is trained from scratch starts at g = 1/2.
    """
    if tensor.dim() > 1:
        return tensor.normal_(std=0.02, generator=source)
    return tensor.fill_(1 if name.endswith("weight") else 0)


def sample(logits, temperature, top_k, source):
    """(B, V) -> (B,)"""
    if temperature == 0:
        return logits.argmax(-1)
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    # from the likeliest one's down, and never by 0, which is what fp32 makes of 1e-50: no inf - inf, no 0 / 0
    logits = (logits - logits.amax(-1, keepdim=True)) / max(temperature, 1e-30)
    return torch.multinomial(logits.softmax(-1), 1, generator=source).squeeze(1)


class Graph:
    """A decoding step of one cache and method as a CUDA graph: what is launched is recorded once, then launched as one."""

    def __init__(self, model, cache, sparse):
        self.of, filled = (model, cache.weights), cache.filled
        self.token, self.graph = torch.zeros_like(cache.used), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):  # records, and computes nothing
            self.logits = model(self.token[:, None], cache=cache, sparse=sparse)[:, -1]
        cache.filled, self.selected = filled, list(cache.selected)

    def replay(self, token, cache):
        cache.check_room(cache.filled + 1)
        with cache.stepping():
            cache.filled, cache.selected = cache.filled + 1, list(self.selected)
            self.token.copy_(token)
            self.graph.replay()
        return self.logits


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

    def is_stock(self, config):
        """Whether the kernels may compute this layer: whether all that they go around is what they were written from."""
        attention, mlp = self.self_attn, self.mlp
        code = {"Block.forward": self.forward, "add_normed": add_normed, "product": product, "rotate": rotate}
        for part, kind, names in ((attention, "Attention", ("forward", "project", "gate", "remember", "normed_and_rotated")),
                                  (mlp, "MLP", ("forward", "hidden"))):
            code |= {f"{kind}.{name}": getattr(part, name, None) for name in names}
        code = {f"model.{name}": found for name, found in code.items()}
        code |= {f"engine.Cache.{name}": getattr(Cache, name) for name in ("store", "put", "read", "step")}
        code |= {"memory.memory_loop": memory.memory_loop, "memory.memory_step": memory_step}
        return all([backend.is_stock(name, found) for name, found in code.items()]) and all(
            plain(name, module, config) for parent in (self, attention, mlp)
            for name, module in parent.named_children() if module not in (attention, mlp))

    def forward(self, x, feed, cache):
        if self.pre_norm:
            x = x + self.self_attn(self.input_layernorm(x), feed, cache)
            x = x + self.mlp(self.pre_feedforward_layernorm(x), feed)
        else:  # x + norm(attn(x)), x + norm(mlp(x))
            x = add_normed(x, self.self_attn(x, feed, cache), self.post_attention_layernorm, feed)
            x = add_normed(x, self.mlp(x, feed), self.post_feedforward_layernorm, feed)
        return x


LINEAR, RMS_NORM = nn.Linear.forward, nn.RMSNorm.forward  # torch's


def plain(name, module, config):
    """
    Whether the kernels know all of a module: they take the weight, of memory_proj the bias too, and config's eps. If they do
    not, a run says so once.
    """
    kind, called = type(module), torch.nn.modules.module
    hooks = (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
             or called._global_forward_hooks or called._global_forward_pre_hooks)
    if kind is nn.Linear:
        known = kind.forward is LINEAR and (module.bias is None or name == "memory_proj")
    elif name in ("q_norm", "k_norm") and not config.qk_norm:
        known = kind is nn.Identity
    else:
        known = (kind is nn.RMSNorm and kind.forward is RMS_NORM and module.weight is not None
                 and module.eps == config.norm_eps)
    if not known or hooks:
        backend.tell(f"note: {name} is a {kind.__name__} with more to it than the Triton kernels know: the model's layers are "
                     "computed as they are written")
    return known and not hooks


def add_normed(x, y, norm, feed):
    """x + norm(y)"""
    if feed.fused:
        from triton_ops.block import add_norm
        return add_norm(x, y, norm.weight, norm.eps)
    return x + norm(y)


def few(x):
    """Whether x (B, T, C) is so few rows that reading the weights is all that a product costs: triton_ops/block.py does that best."""
    from triton_ops.block import MOST_ROWS
    return x.shape[0] * x.shape[1] <= MOST_ROWS


def few_products(x, weights, bias=None, eps=None):
    """block.products, as it is imported only where it computes."""
    from triton_ops.block import products
    return products(x, weights, bias, eps)


def product(linear, x, feed):
    """linear(x), which has no bias"""
    return few_products(x, [linear.weight])[0] if feed.fused and few(x) else linear(x)


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
        q, k, v, gate, output_gate = self.project(x, feed)

        if feed.decoding and feed.fused:
            q = cache.step(self, q, k, v, gate, feed)  # all of what follows until attention, in one kernel
            y = cache.read(self.index, q, feed)
        else:
            if gate is not None:
                k, v = self.remember(k, v, gate, feed, cache)
            q, k = self.normed_and_rotated(q, self.q_norm, feed), self.normed_and_rotated(k, self.k_norm, feed)
            if cache is None:
                y, _ = feed.prefill(q, k, v, 0, feed.dice)
            elif feed.decoding:
                cache.store(self.index, k, v, feed)
                y = cache.read(self.index, q, feed)
            else:
                y = cache.attend(self.index, q, k, v, feed)  # the same, with what the cache holds before k and v
        y = y.flatten(2)  # (B, T, C)
        if output_gate is not None:
            y = y * torch.sigmoid(output_gate)
        return product(self.o_proj, y, feed)

    def project(self, x, feed):
        """(B, T, C) -> q (B, T, H, D), k, v and the memory's gate (B, T, KV, D), output gate (B, T, C); None: not in this model."""
        heads = lambda y: y.unflatten(2, (-1, self.config.head_width))
        linears = [self.q_proj, self.k_proj, self.v_proj, *([self.output_gate] if self.output_gate else [])]
        if feed.fused and few(x):
            gate, normed = self.memory_proj, None if self.config.pre_norm else self.config.norm_eps
            q, k, v, *rest = few_products(x, [part.weight for part in (*linears, *([gate] if gate else []))],
                                          gate.bias if gate else None, normed)
            gate = heads(rest.pop()) if gate else None
        else:
            q, k, v, *rest = (part(x) for part in linears)
            gate = None if self.memory_proj is None else heads(self.gate(x))
        return heads(q), heads(k), heads(v), gate, rest[0] if rest else None

    def normed_and_rotated(self, x, norm, feed):
        """QK-norm, which spans the whole projection, all heads together; then RoPE. x: (B, T, H, D)"""
        if feed.fused:
            from triton_ops.block import norm_rotate
            return norm_rotate(x, norm.weight if self.config.qk_norm else None, self.config.norm_eps, feed.cos, feed.sin)
        return rotate(norm(x.flatten(2)).view(x.shape), feed)

    def gate(self, x):
        """Logits of Eq. 1's g. They read the block's input at RMS 1: pre-norm has seen to that."""
        return self.memory_proj(x if self.config.pre_norm else F.rms_norm(x, x.shape[-1:], eps=self.config.norm_eps))

    def remember(self, k, v, gate, feed, cache):
        """Eq. 1 on k and v (B, T, KV, D), from the cache's state and to it."""
        if feed.real is not None:  # g = 1 and 1 - g = 0: padding adds nothing, and what was remembered passes unchanged
            gate = gate.masked_fill(~feed.real[..., None, None], torch.inf)
        form = feed.scan or (memory_step if k.shape[1] == 1 else memory_scan)
        if cache is None:
            k, v, _ = form(k, v, gate)
        else:
            state = cache.state[self.index][:, cache.part]
            k, v, last = form(k, v, gate, state)
            state.copy_(last)
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

    def forward(self, x, feed):
        if not feed.fused:
            return self.down_proj(self.hidden(x))
        if few(x) and self.gate_proj is not None:
            from triton_ops.block import swiglu_products
            return product(self.down_proj, swiglu_products(x, self.gate_proj.weight, self.up_proj.weight), feed)
        # a part of a long prompt at a time: its hidden vectors are large
        return torch.cat([self.down_proj(self.hidden(part, fused=True)) for part in x.flatten(0, 1).split(TOGETHER // 2)]).view(x.shape)

    def hidden(self, x, fused=False):
        """(..., C) -> (..., mlp_width)"""
        if self.gate_proj is None:
            return F.gelu(self.up_proj(x))
        if fused:
            from triton_ops.block import swiglu
            return swiglu(self.gate_proj(x), self.up_proj(x))
        return F.silu(self.gate_proj(x)) * self.up_proj(x)
