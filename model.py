"""
OLMo 2 (arXiv 2501.00656), Llama, Qwen and RAT+ (arXiv 2602.18196): one decoder, whole.

    tokens -> embedding -> [ attention block -> MLP block ] x n_layer -> norm -> head -> logits

In attention: project q, k, v  ->  decaying memory on k, v (memory.py)  ->  QK-norm  ->  RoPE  ->
sparse method (sparse.py)  ->  output projection. A model without memory is plain attention.

What separates the families is a few fields of Config:

                 OLMo 2          Llama     Qwen 2    Qwen 3      RAT+
    pre_norm     no              yes       yes       yes         yes     a sublayer's input is
                                                                         normalised, not its output
    qk_norm      all heads       none      none      each head   none    RMS norm of q and k
    qkv_bias     no              no        yes       no          no      biases of q, k and v
    head width   C / H           C / H     C / H     its own     C / H
    MLP          SwiGLU          SwiGLU    SwiGLU    SwiGLU      GELU; attention has a gate

    norm of the output:  x = x + norm(attn(x)); x = x + norm(mlp(x))
    norm of the input:   x = x + attn(norm(x)); x = x + mlp(norm(x))

Modules carry the names of Hugging Face's OLMo 2, so a parameter and its tensor in a file are called
the same (infra/names.py has the exceptions). With a cache the model continues what it has read, and
generates: that is engine.py, which also runs the same blocks in fused kernels. Checked against
transformers' models and the official RAT+ in tests/test_model.py, and on real weights in
tests/test_real_model.py. Read memory.py next, then sparse.py.

Letters: B batch, T tokens, C model width, H query heads, KV key/value heads, D head width (C / H in
most models), V vocabulary.
"""
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional as F

from engine import Inference
from infra import weights
from infra.files import short
from infra.init import first_values, memory_tensors
from infra.loss import weighted_loss, weighted_score
from infra.rope import attention_factor, stretched, yarn_for
from infra.spelling import check_type
from memory import MEMORIES
from sparse import Dense, dice_of, dice_of_layers
from triton_ops import backend


@dataclass
class Config:
    """The defaults are OLMo 2's form; the others change sizes, and fields from tied on."""
    vocab_size: int = 100352
    n_layer: int = 16
    width: int = 2048          # C
    n_head: int = 16           # H
    n_kv_head: int = 16        # KV, a divisor of n_head; fewer is grouped-query attention
    mlp_width: int = 8192      # hidden width of the MLP
    context_len: int = 4096    # the length it was trained for; nothing stops at it
    rope_theta: float = 500000.0
    norm_eps: float = 1e-6
    tied: bool = False         # one matrix for embedding and head
    head_dim: int | None = None        # D, where it is not C / H
    rope_scaling: dict | None = None   # for longer contexts, Llama 3's way or yarn: infra/rope.py
    pre_norm: bool = False     # normalise each sublayer's input, not its output
    qk_norm: str | None = "all"  # RMS norm of q and k, over "all" heads together or each "head"
    qkv_bias: bool = False     # q, k and v have biases
    swiglu: bool = True        # else exact (erf) GELU
    output_gate: bool = False  # attention output times sigmoid of one more projection
    memory: str | None = None  # which of memory.MEMORIES, None for none. True is read as "decay"
    eos_id: int | None = None  # the end-of-text token, where known

    def __post_init__(self):
        """ValueError unless a model can be made of it: it may come from a stranger's file."""
        if type(self.memory) is bool:  # in files from when there was but one
            self.memory = "decay" if self.memory else None
        if type(self.qk_norm) is bool:  # likewise
            self.qk_norm = "all" if self.qk_norm else None
        weights.check_config(self)
        if self.memory not in (None, *MEMORIES):
            raise ValueError(f"memory={short(self.memory)} is none of memory.MEMORIES, which are "
                             f"{', '.join(MEMORIES)}: import its file before, as `python -m "
                             "experiments.memories FILE.py SCRIPT` does")

    @property
    def head_width(self):
        return self.head_dim or self.width // self.n_head  # D


RATPLUS = dict(vocab_size=32000, rope_theta=10000.0, tied=True, pre_norm=True, qk_norm=None,
               swiglu=False, output_gate=True, memory="decay", eos_id=2)
OLMO2 = dict(eos_id=100257)
LLAMA = dict(tied=True, pre_norm=True, qk_norm=None, norm_eps=1e-5)
BYTES = dict(vocab_size=257, rope_theta=10000.0, eos_id=256)
PRESETS = {
    # ours, over bytes (256 values and the end of text): to train in minutes
    "pico": Config(n_layer=2, width=96, n_head=3, n_kv_head=3, mlp_width=256,  # 0.3M
                   context_len=512, **BYTES),
    "nano": Config(n_layer=3, width=128, n_head=4, n_kv_head=4, mlp_width=352,  # 0.7M
                   context_len=1024, **BYTES),
    "micro": Config(n_layer=4, width=384, n_head=6, n_kv_head=6, mlp_width=704,  # 5.8M
                    context_len=1024, **BYTES),
    # allenai/OLMo-2-0425-1B, -1124-7B, -1124-13B, -0325-32B
    "olmo2-1b": Config(n_layer=16, width=2048, n_head=16, n_kv_head=16, mlp_width=8192,  # 1.5B
                       **OLMO2),
    "olmo2-7b": Config(n_layer=32, width=4096, n_head=32, n_kv_head=32, mlp_width=11008,  # 7.3B
                       **OLMO2),
    "olmo2-13b": Config(n_layer=40, width=5120, n_head=40, n_kv_head=40, mlp_width=13824,  # 13.7B
                        **OLMO2),
    "olmo2-32b": Config(n_layer=64, width=5120, n_head=40, n_kv_head=8, mlp_width=27648,  # 32.2B
                        **OLMO2),
    # HuggingFaceTB/SmolLM2-135M, meta-llama/Llama-3.2-1B, Qwen/Qwen3-0.6B
    "smollm2-135m": Config(n_layer=30, width=576, n_head=9, n_kv_head=3, mlp_width=1536,  # 134.5M
                           vocab_size=49152, context_len=8192, rope_theta=100000.0, eos_id=0,
                           **LLAMA),
    "llama3.2-1b": Config(n_layer=16, width=2048, n_head=32, n_kv_head=8, mlp_width=8192,  # 1.24B
                          vocab_size=128256, context_len=131072, eos_id=128001, **LLAMA,
                          rope_scaling=dict(rope_type="llama3", factor=32.0, low_freq_factor=1.0,
                                            high_freq_factor=4.0,
                                            original_max_position_embeddings=8192)),
    "qwen3-0.6b": Config(n_layer=28, width=1024, n_head=16, n_kv_head=8, mlp_width=3072,  # 596M
                         vocab_size=151936, context_len=40960, rope_theta=1e6, tied=True,
                         head_dim=128, pre_norm=True, qk_norm="head", eos_id=151643),
    # barpitf/ratplus; LLaMA's tokenizer, whose end of text is 2
    "ratplus-1b": Config(n_layer=24, width=2048, n_head=16, n_kv_head=16, mlp_width=8192,  # 1.5B
                         **RATPLUS),
    "ratplus-3b": Config(n_layer=28, width=2560, n_head=20, n_kv_head=20, mlp_width=10240,  # 2.7B
                         **RATPLUS),
    "ratplus-7b": Config(n_layer=32, width=4096, n_head=32, n_kv_head=32, mlp_width=16384,  # 7.6B
                         **RATPLUS),
}


# ---------------------------------------------------------------- the blocks

class Attention(nn.Module):

    def __init__(self, config, index):
        super().__init__()
        self.config = config
        self.index = index  # which layer this is
        C, D = config.width, config.head_width
        q_width, kv_width = config.n_head * D, config.n_kv_head * D
        self.q_proj = nn.Linear(C, q_width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(C, kv_width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(C, kv_width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_width, C, bias=False)
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        if config.qk_norm:
            widths = (D, D) if config.qk_norm == "head" else (q_width, kv_width)
            self.q_norm, self.k_norm = (nn.RMSNorm(n, eps=config.norm_eps) for n in widths)
        self.memory = MEMORIES[config.memory](config) if config.memory else None
        self.output_gate = nn.Linear(C, q_width, bias=False) if config.output_gate else None

    def forward(
        self,
        x,           # (B, T, C)
        rope,        # cos and sin, see Transformer.rope
        prefill,     # of a sparse method, where there is no cache
        dice=None,   # (B, T)  chance, for the random selectors of H2
        cache=None,  # cache.Cache: what came before, and which tokens are padding
    ):               # -> (B, T, C)
        split = lambda y: y.unflatten(2, (-1, self.config.head_width))
        q = split(self.q_proj(x))  # (B, T, H, D)
        k = split(self.k_proj(x))  # (B, T, KV, D)
        v = split(self.v_proj(x))  # (B, T, KV, D)

        # Eq. 1, before QK-norm and RoPE
        if self.memory is not None:
            k, v = self.remember(x, k, v, cache)

        if self.config.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        else:  # over all heads together; without QK-norm this does nothing
            q = self.q_norm(q.flatten(2)).view_as(q)
            k = self.k_norm(k.flatten(2)).view_as(k)
        q, k = self.rotate(q, rope), self.rotate(k, rope)

        if cache is None:
            y, _ = prefill(q, k, v, 0, dice)
        else:  # the same, with what the cache holds before k and v
            y = cache.attend(self.index, q, k, v, dice)
        y = y.flatten(2)  # (B, T, H * D)
        if self.output_gate is not None:
            y = y * torch.sigmoid(self.output_gate(x))
        return self.o_proj(y)

    def remember(self, x, k, v, cache=None):
        """k~ and v~ of k and v (B, T, KV, D), from the cache's state and to it."""
        x = self.at_rms_1(x)
        if cache is None:
            k, v, _ = self.memory(x, k, v)
            return k, v
        return cache.remember(self.index, self.memory, x, k, v)

    def at_rms_1(self, x):
        """The block's input as a memory reads it. With pre-norm it is normalised already."""
        if self.config.pre_norm:
            return x
        return F.rms_norm(x, x.shape[-1:], eps=self.config.norm_eps)

    def rotate(self, x, rope):
        """RoPE on x (B, T, H, D): channels d and d + D/2 are turned by an angle. In fp32."""
        cos, sin = rope
        a, b = x.float().chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class MLP(nn.Module):

    def __init__(self, config):
        super().__init__()
        C, hidden = config.width, config.mlp_width
        self.gate_proj = nn.Linear(C, hidden, bias=False) if config.swiglu else None
        self.up_proj = nn.Linear(C, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, C, bias=False)

    def forward(self, x):  # (B, T, C) -> (B, T, C)
        if self.gate_proj is None:
            return self.down_proj(F.gelu(self.up_proj(x)))
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


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

    def forward(self, x, rope, prefill, dice=None, cache=None):  # x (B, T, C); as in Attention
        if self.pre_norm:  # Llama, Qwen, RAT+
            x = x + self.self_attn(self.input_layernorm(x), rope, prefill, dice, cache)
            x = x + self.mlp(self.pre_feedforward_layernorm(x))
        else:              # OLMo 2
            attended = self.self_attn(x, rope, prefill, dice, cache)
            x = x + self.post_attention_layernorm(attended)
            x = x + self.post_feedforward_layernorm(self.mlp(x))
        return x


# ---------------------------------------------------------------- the model

class Transformer(Inference, nn.Module):
    """From engine.Inference it has new_cache, prefill, step, decode and generate."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Block(config, index) for index in range(config.n_layer))
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.lm_head = None
        if not config.tied:
            self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        for name, parameter in self.named_parameters():
            first_values(name, parameter)

    @property
    def head_weight(self):
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight  # (V, C)

    def forward(
        self,
        tokens,        # (B, T)  ids; rows of different lengths are padded on the right, with any id
        lengths=None,  # (B,)    real tokens per row; None: all T. It matters to a cache alone,
                       #         as no token sees those after it
        cache=None,    # from new_cache: these tokens continue what it holds, and are added to it
        sparse=None,   # a method of sparse.py; None is dense
    ):                 # -> logits (B, T, V); at padding they mean nothing
        """
        With a cache, one token per row without lengths is a decoding step (sparse.decode). Else it
        is a prompt, or a chunk of one (sparse.prefill). The first decoding step lets the method
        drop prompt entries (sparse.compress).
        """
        if lengths is not None:
            self.check_lengths(lengths, self.check_ids(tokens), cache)
        if cache is not None:
            return self.feed(tokens, lengths, cache, sparse, head=True)
        return self.head(self.hidden(tokens, sparse))

    def hidden(self, tokens, sparse=None, cache=None):
        """
        forward without the head: tokens (B, T) -> (B, T, C), normalised. With a cache, engine.feed
        calls it, and has told the cache what comes.
        """
        if cache is None:
            self.check_tokens(tokens)
            sparse = sparse or Dense()
            prefill = backend.hook(sparse, "prefill", self.probe())  # on a GPU in Triton
            position = torch.arange(tokens.shape[1], device=tokens.device)[None]
            dices = [None] * self.config.n_layer
            if type(sparse) is not Dense:  # which draws nothing by chance
                dices = dice_of_layers(dice_of(tokens, position), self.config.n_layer)
        else:
            prefill, position, dices = cache.now.prefill, cache.now.position, cache.now.dices

        rope = self.rope(position)
        x = self.embed_tokens(tokens)
        if cache is not None:
            x = cache.without_padding(x)
        for layer, dice in zip(self.layers, dices):
            x = layer(x, rope, prefill, dice, cache)
        return self.norm(x)

    def rope(self, position):
        """
        position (1 or B, T) -> cos and sin of RoPE's angles, each (1 or B, T, 1, D/2), fp32; with
        yarn both are multiplied by its attention factor.
        """
        D, theta, scaling = self.config.head_width, self.config.rope_theta, self.config.rope_scaling
        pair = torch.arange(0, D, 2, device=position.device).float()
        frequency = 1 / theta ** (pair / D)
        if scaling:
            frequency = stretched(frequency, theta, scaling)
        angle = position[..., None] * frequency
        cos, sin = angle.cos().unsqueeze(2), angle.sin().unsqueeze(2)
        factor = attention_factor(scaling)
        return (cos, sin) if factor == 1 else (factor * cos, factor * sin)

    def loss(
        self,
        tokens,          # (B, T + 1)  ids
        weight,          # (B, T + 1)  fp32, of each token as a target; the first is none
        sparse=None,     # as in forward
        compiled=False,  # the loss by torch.compile
    ):                   # -> sum of weight * cross entropy of tokens[:, 1:], in nats
        """With gradients. Logits exist some thousand tokens at a time: infra/loss.py"""
        x = self.hidden(tokens[:, :-1], sparse).flatten(0, 1)  # (B * T, C)
        targets, weight = tokens[:, 1:].flatten(), weight[:, 1:].flatten()
        return weighted_loss(x, self.head_weight, targets, weight, compiled)

    def score(self, tokens, weight, sparse=None):
        """-> the same without gradients; the summed weights of the targets it finds likeliest"""
        x = self.hidden(tokens[:, :-1], sparse).flatten(0, 1)
        targets, weight = tokens[:, 1:].flatten(), weight[:, 1:].flatten()
        return weighted_score(x, self.head_weight, targets, weight)

    def check_ids(self, tokens):
        check_type(tokens, torch.Tensor, "tokens are a tensor (B, T) of ids")
        if tokens.dim() != 2 or tokens.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"tokens are ids (B, T), not {tokens.dtype} {tuple(tokens.shape)}")
        if tokens.numel() == 0:
            raise ValueError(f"there are no tokens: {tuple(tokens.shape)}")
        return tokens

    def check_lengths(self, lengths, tokens, cache):
        """-> the longest row's; ValueError unless lengths (B,) are those of tokens (B, T)."""
        B, T = tokens.shape
        check_type(lengths, torch.Tensor, "lengths are a tensor (B,) of numbers of tokens")
        before = 0 if cache is None else cache.used
        fits = lengths.shape == (B,)
        if fits:
            least, most = map(int, lengths.aminmax())
            fits = least >= 0 and 0 < most <= T and bool((before + lengths > 0).all())
        if not fits:
            raise ValueError(f"lengths={lengths.tolist()}: each of {B} rows must have 1 to {T} "
                             "tokens, or 0 if it has had some")
        return most

    def check_tokens(self, tokens):
        self.check_ids(tokens)
        # On a GPU the look-up itself asserts; asking first would make every step wait for the
        # answer.
        if tokens.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high >= self.config.vocab_size:
                token = high if low >= 0 else low
                raise ValueError(f"token {token} is outside the model's vocabulary of "
                                 f"{self.config.vocab_size}: was the text encoded with this "
                                 "model's tokenizer?")

    def add_memory(self, g=0.5, kind="decay"):
        """
        Give a model that has none a fresh memory, to be trained: every gate starts at g, above 0
        and below 1, whatever it reads. At 1/2, as in a model trained with a memory from the start;
        experiments/gate_start.py says what other values do. kind: which of memory.MEMORIES.
        ValueError for another g, or if there is a memory.
        """
        if not 0 < g < 1:
            raise ValueError(f"gate={g}: gates start above 0 and below 1")
        if self.config.memory:
            raise ValueError("this model has a memory already: load it without memory=True")
        self.config = replace(self.config, memory=kind)
        for layer in self.layers:
            like = layer.self_attn.k_proj.weight
            layer.self_attn.config = self.config
            layer.self_attn.memory = MEMORIES[kind](self.config).to(like.device, like.dtype)
        made = memory_tensors(MEMORIES[kind], self.config, g)
        self.load_state_dict({name: make() for name, make in made.items()}, strict=False)
        return self

    def stretch(self, factor):
        """
        Give a model whose RoPE is not stretched yarn's (infra/rope.py), for contexts `factor` times
        as long as its own; yarn's authors then train it on at that length. config.context_len stays
        what it was trained for. ValueError if its RoPE is stretched already, or if factor is not
        above 1 and finite. Caches made before hold keys of the old RoPE.
        """
        self.config = replace(self.config, rope_scaling=yarn_for(self.config, factor))
        for layer in self.layers:
            layer.self_attn.config = self.config
        return self

    @classmethod
    def from_pretrained(cls, path, dtype=None, device="cpu", memory=None):
        """
        Load a Hugging Face directory of OLMo 2, Llama, Qwen 2 or Qwen 3, one that save_pretrained
        wrote, or an official RAT+ .pth file (infra/weights.py).

        dtype: e.g. torch.bfloat16; None keeps what the file holds. memory=True, or a name of
        memory.MEMORIES, adds a fresh memory to a model that has none. Files are mapped: beyond the
        model itself, RAM for one tensor is enough. Raises ValueError or FileNotFoundError, whose
        one line names the file, what is wrong in it, and what to do.
        """
        settings, tensors = weights.read(path)
        with torch.device("meta"):  # shapes without storage, until the weights are there
            model = cls(config_of(settings, path))
        weights.fill(model, tensors, path, dtype, device)
        if memory:
            model.add_memory(kind="decay" if memory is True else memory)
        return model

    def save_pretrained(self, path, tokenizer=None):
        """
        Write config.json and safetensors into the directory `path`, and the tokenizer's files
        (data.get_tokenizer) if one is given; transformers opens it if it is of one of its families
        and has no memory. What is there of ours is replaced. ValueError, and nothing is changed, if
        something else has the name of a file to be written.
        """
        weights.write(path, self.config, self.state_dict(), tokenizer)


def config_of(settings, path):
    """The Config of what weights.read found at `path`. ValueError if it is none."""
    return weights.config_of(Config, settings, path)
