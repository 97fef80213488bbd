"""
The engine: the same model with a cache, sooner. What it gives is what model.py gives, token by
token.

    prefill   A prompt, or a chunk of one, of rows that may differ in length; a few rows at a time
              where it is long.
    step      One token per row. On a GPU it is replayed as one CUDA graph.
    decode    Steps, each with the token that the one before has drawn, until all rows have ended.
    generate  All three.

cache.py keeps what was read. Where Triton computes, the blocks of model.py run in a few fused
kernels (triton_ops/block.py), as long as they are the blocks of model.py: a layer that a fork has
edited, overridden, wrapped or hooked is computed as it is written, and a run says so once.

model.Transformer inherits Inference. Checked in tests/test_cache.py and tests/test_hooks.py. Read
cache.py next.

Letters: B batch, T tokens, C model width, H query heads, KV key/value heads, D head width, V
vocabulary.
"""
import math
from contextlib import nullcontext

import torch
from torch import nn
from torch.nn import functional as F

import memory
from cache import Cache, Feed
from sparse import (Dense, Dilated, dice_of, dice_of_layers, drops, evicts, name, phases,
                    window_of)
from triton_ops import backend

# Tokens of a prompt that go through a layer at a time on a CPU: what the layer makes of them then
# stays in its caches.
TOGETHER_ON_CPU = 4096


class Inference:
    """What model.Transformer does with a cache."""

    # Whether a graph may record steps that are computed as they are written. A layer that a fork
    # has edited may mind, as the Python in it then runs no more.
    in_graph = False

    def new_cache(self, B, max_len, window=64):
        """An empty cache for B rows of at most max_len tokens. window: queries kept for SnapKV."""
        weight = self.embed_tokens.weight
        return Cache(self.config, B, max_len, window, device=weight.device, dtype=weight.dtype)

    def head(self, x):
        """(..., C), normalised -> logits (..., V)"""
        in_triton = not torch.is_grad_enabled() and backend.triton_for(self.probe())
        if in_triton and is_few(x):
            from triton_ops.block import products
            return products(x, [self.head_weight])[0]
        return F.linear(x, self.head_weight)

    def probe(self):
        """An empty tensor like the model's heads: backend asks what computes its like."""
        weight = self.embed_tokens.weight
        return torch.empty(0, self.config.head_width, dtype=weight.dtype, device=weight.device)

    def feed(self, tokens, lengths, cache, sparse=None, whole=False, watch=None, head=False):
        """
        Tokens (B, T) through the layers, into the cache: (B, T, C), normalised, or with `head`
        logits (B, T, V). The arguments are those of model.forward and of prefill.
        """
        # What cannot go well is said before anything is changed.
        self.check_tokens(tokens)
        cache.check_rows(len(tokens))
        sparse = sparse or Dense()
        decoding = tokens.shape[1] == 1 and lengths is None
        by = phases(sparse).decode_by if decoding else phases(sparse).prefill_by
        if cache.positions[0] is not None and isinstance(by, Dilated):
            raise ValueError(f"{name(sparse)} cannot go on after {name(cache.kept_by)}: its "
                             "pattern needs every position")
        if whole and drops(sparse):
            cache.check_may_drop()

        # A prompt that fails leaves the cache as it was. A step that fails spoils it: what a step
        # changes in place is not kept twice.
        guard = cache.prefilling
        if decoding:
            guard = cache.stepping
            cache.before_step(sparse)

        with guard():
            by_kernels = self.by_kernels()
            static = decoding and (by_kernels or self.in_graph) and self.may_record(sparse)
            cache.now = self.described(tokens, lengths, cache, sparse, decoding, static,
                                       whole and drops(sparse), watch)
            try:
                if by_kernels:
                    x = fused(self, tokens, cache)
                else:
                    x = self.hidden(tokens, sparse, cache)
            finally:
                cache.now = None
            cache.stepped = sparse if decoding else None
            cache.decoding = cache.decoding or decoding
            cache.weights = self.places() if static else None
            return self.head(x) if head else x

    def described(self, tokens, lengths, cache, sparse, decoding, static, whole, watch):
        """The Feed of these tokens, for which the cache makes room."""
        B, T = tokens.shape
        # full rows are not padded. One token with lengths stays a prompt: only without is it a step
        if lengths is not None and T > 1 and bool((lengths == T).all()):
            lengths = None
        index = torch.arange(T, device=tokens.device)
        real = None if lengths is None else index < lengths[:, None]
        position = cache.lengths[cache.part, None] + index  # (B, T)
        start = cache.grow(T, lengths)

        dice = dice_of(tokens, position, cache.token_hash[cache.part, None], real)
        cache.token_hash[cache.part] = dice[:, -1]
        if not decoding:
            cache.prompt_hash[cache.part] = dice[:, -1]
            cache.prompt_lengths[cache.part] = cache.lengths[cache.part]
        dices = dice_of_layers(dice, self.config.n_layer)
        prefill = backend.hook(sparse, "prefill", self.probe())
        return Feed(sparse=sparse, prefill=prefill, position=position, start=start, lengths=lengths,
                    real=real, dices=dices, decoding=decoding, static=static, whole=whole,
                    evicts=evicts(sparse), watch=watch)

    @torch.no_grad()
    def prefill(self, tokens, lengths=None, cache=None, sparse=None, whole=False, watch=None):
        """
        Feed a prompt; the logits (B, V) of the token to follow each row. Rows of long prompts go
        through the layers a few at a time, so that RAM for one of them is enough.

        whole: the prompt ends here and the cache is empty. A method that drops entries then does so
        in each layer as soon as it is done, so that one layer's k and v are all that is ever whole:
        SnapKV's cache is small from the start.
        watch: called after each layer of each part of the batch, with the layer, what the method
        selected, and which tokens are real (B, T), None: all; T is the longest row's.
        A row may have no tokens in a later chunk of a prompt. It has no logits there: those of its
        last chunk hold.
        """
        B, T = self.check_ids(tokens).shape
        if cache is None and (whole or watch):
            raise ValueError("prefill(whole=True) and watch need a cache")
        if whole and cache.filled:
            raise ValueError("prefill(whole=True) takes a whole prompt, and this cache holds some "
                             "of it already")
        if cache is not None:
            cache.check_whole()
            cache.check_rows(B)
        if lengths is not None:
            T = self.check_lengths(lengths, tokens, cache)
            tokens = tokens[:, :T]  # what pads all rows is left out
        elif T == 1:  # without lengths it would be a decoding step
            lengths = torch.ones(B, dtype=torch.long, device=tokens.device)
        if cache is not None:  # for all parts, before the first is fed
            after = cache.filled + T if lengths is None else int((cache.used + lengths).max())
            cache.check_room(after)

        together = tokens_together(widest(self.config))
        if tokens.device.type == "cpu":
            together = min(together, TOGETHER_ON_CPU)
        rows = max(1, min(together // T, 65535))  # no grid takes more rows than that
        parts = [slice(first, first + rows) for first in range(0, B, rows)]
        if cache is None or len(parts) == 1:
            views = [cache] * len(parts)
        else:
            views = [cache.rows(part) for part in parts]
        logits = []
        with nullcontext() if cache is None else cache.prefilling():
            for part, view in zip(parts, views):
                some = None if lengths is None else lengths[part]
                if view is None:
                    x = self.hidden(tokens[part], sparse)
                else:
                    x = self.feed(tokens[part], some, view, sparse, whole, watch)
                # of a prompt only the last token has to go through the head
                last = -1 if some is None else some - 1
                row = torch.arange(len(x), device=x.device)
                logits.append(self.head(x[row, last][:, None])[:, 0])
            if cache is not None and len(parts) > 1:
                cache.joined(views)
        return torch.cat(logits)

    @torch.no_grad()
    def step(self, token, cache, sparse=None):
        """
        One decoding step: token (B,) -> logits (B, V), which the next step may write over.

        With the kernels on a GPU, or where the model says so (in_graph), steps of one method that
        follow each other are replays of one CUDA graph, so that Python costs nothing. The first of
        them runs as it is (it may drop entries, and sums up Quest's blocks); the graph is captured
        at the second, once for a cache and a method. After a later prompt it takes the first step,
        too, if the kernels know all that the method does in it. Code that is not ours is run at
        each step, as it is: whether there is any is asked at the first step after a prompt.
        """
        sparse = sparse or Dense()
        # weights are known after a step that a graph may record, and stepped says of which method
        follows = cache.weights and cache.stepped == sparse
        may_replay = token.is_cuda and len(token) == cache.B
        if not may_replay or not (follows or self.resumes(token, cache, sparse)):
            return self(token[:, None], cache=cache, sparse=sparse)[:, -1]
        if sparse not in cache.graphs or cache.graphs[sparse].of != (self, cache.weights):
            cache.graphs[sparse] = Graph(self, cache, sparse)
        return cache.graphs[sparse].replay(token, cache)

    def resumes(self, token, cache, sparse):
        """
        Whether a graph from an earlier prompt may take the first step after this one: not of a
        method whose steps are Python's, which may look at the prompt then. If so, the cache is made
        ready for it, as `feed` would.
        """
        if sparse not in cache.graphs or not (
                self.by_kernels() and self.may_record(sparse) and backend.decodes(sparse)):
            return False
        self.check_tokens(token[:, None])
        cache.check_whole()
        cache.before_step(sparse)
        graph, places = cache.graphs.get(sparse), self.places()
        if graph is None or graph.of != (self, places):  # the entries are elsewhere, or the weights
            return False
        for i, block_size in enumerate(graph.bounded):
            if block_size:
                cache.bounds_of(i, block_size)
        cache.stepped, cache.decoding, cache.weights = sparse, True, places
        return True

    @torch.no_grad()
    def decode(
        self,
        logits,          # (B, V)  from prefill
        cache,
        max_new_tokens,
        sparse=None,
        temperature=0,   # 0 takes the likeliest token; above, tokens are drawn,
        top_k=None,      # from the top_k likeliest if given,
        eos_id=None,
        seed=None,       # and the same seed draws the same
        watch=None,      # called with the cache after each step, e.g. to look at cache.selected
    ):                   # -> new tokens (B, <= max_new_tokens)
        """
        Continue each row of a filled cache. A row that has written eos_id repeats it; when all
        have, generation ends.

        Afterwards the cache holds of each row all but its last token, eos_id where it has written
        that: a next turn of the row begins with this token. ValueError, before the first step, if
        the cache has no room for so many.
        """
        too_few = max_new_tokens < 1 or (top_k is not None and top_k < 1)
        if too_few or not 0 <= temperature < math.inf:
            raise ValueError(f"{max_new_tokens=}, {temperature=}, {top_k=}: at least 1 token, a "
                             "temperature of 0 or more, top_k of 1 or more")
        cache.check_room(cache.filled + max_new_tokens - 1)
        source = None
        if temperature > 0:
            source = torch.Generator(logits.device)
            source.manual_seed(seed) if seed is not None else source.seed()

        new, n_done = [], 0
        done = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
        # As the first step does, but also for a row that takes none: what it holds must not depend
        # on the other rows.
        cache.compress(sparse or Dense())
        with cache.ending() as end:
            for n in range(max_new_tokens):
                token = draw(logits.float(), temperature, top_k, source)  # (B,)
                if eos_id is not None:
                    token = token.masked_fill(done, eos_id)
                    ended, done = (token == eos_id) & ~done, done | (token == eos_id)
                    n_before, n_done = n_done, int(done.sum())
                new.append(token)
                if n + 1 == max_new_tokens or n_done == len(done):
                    break
                if eos_id is not None and n_done > n_before:
                    end(ended)  # the steps that other rows still take are not theirs
                logits = self.step(token, cache, sparse)
                if watch:
                    watch(cache)
        return torch.stack(new, dim=1)

    def generate(self, tokens, max_new_tokens, lengths=None, sparse=None, **settings):
        """
        Prompts (B, T), right-padded to T where lengths (B,) says so -> new tokens alone. settings:
        temperature, top_k, eos_id, seed and watch, as in decode.
        """
        room = self.check_ids(tokens).shape[1] + max_new_tokens
        cache = self.new_cache(len(tokens), room, window_of(sparse))
        logits = self.prefill(tokens, lengths, cache, sparse, whole=True)
        return self.decode(logits, cache, max_new_tokens, sparse, **settings)

    # ----------------------------------------------------------- whether the kernels know the model

    def by_kernels(self):
        """
        Whether this is inference in Triton, block by block: the kernels take the weights out of the
        modules, and go around what these do in PyTorch. So they must be the modules of model.py,
        and plain ones of torch.
        """
        if torch.is_grad_enabled() or not backend.triton_for(self.probe()):
            return False
        found = [backend.is_stock("model.Transformer.hidden", self.hidden)]
        found += [are_stock(Cache, OF_CACHE), are_stock(memory, OF_RECURRENCE)]
        found += [is_stock(layer, self.config) for layer in self.layers]
        return all(found)

    def may_record(self, sparse):
        """Whether a graph may take this method's steps, where it may take the layers'."""
        return backend.in_graph(sparse) and self.is_unhooked() and not evicts(sparse)

    def is_unhooked(self):
        """Whether no Python would be missed: a graph calls it once, and then never again."""
        if any(has_hooks(module) for module in self.modules()):
            return False
        return are_stock(self, [("forward", "model.Transformer.forward"), *OF_INFERENCE])

    def places(self):
        """The config, and where the weights are: a graph computes so, and reads there."""
        return self.config, *(parameter.data_ptr() for parameter in self.parameters())


def tokens_together(width):
    """
    Tokens of a prompt, in vectors of this width, that go through a layer at a time on a GPU: 32,768
    of a 7B model, of which a layer makes a few GB. More would not make the GPU any busier.
    """
    return max(1, 2**27 // width)


def widest(config):
    """The width of a token's largest vector between a layer's products but for the MLP's."""
    return max(config.width, config.n_head * config.head_width)


def draw(logits, temperature, top_k, source):
    """The next tokens: (B, V) -> (B,)"""
    if temperature == 0:
        return logits.argmax(-1)
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    # From the likeliest one's down, and never by 0, which is what fp32 makes of 1e-50: no inf -
    # inf, no 0 / 0.
    logits = (logits - logits.amax(-1, keepdim=True)) / max(temperature, 1e-30)
    return torch.multinomial(logits.softmax(-1), 1, generator=source).squeeze(1)


class Graph:
    """
    A decoding step of one cache and method as a CUDA graph: what is launched is recorded once, then
    launched as one.
    """

    def __init__(self, model, cache, sparse):
        self.of, filled = (model, cache.weights), cache.filled
        self.token, self.graph = torch.zeros_like(cache.used), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):  # records, and computes nothing
            self.logits = model(self.token[:, None], cache=cache, sparse=sparse)[:, -1]
        cache.filled, self.selected = filled, list(cache.selected)
        self.bounded = list(cache.bounded)  # the layers' blocks whose bounds it keeps up to date

    def replay(self, token, cache):
        cache.check_room(cache.filled + 1)
        with cache.stepping():
            cache.filled, cache.selected = cache.filled + 1, list(self.selected)
            self.token.copy_(token)
            self.graph.replay()
        return self.logits


# ---------------------------------------------------------------- Transformer.hidden in kernels

def fused(model, tokens, cache):
    """model.Transformer.hidden for tokens (B, T) that are fed to a cache: (B, T, C)"""
    rope = model.rope(cache.now.position)
    x = cache.without_padding(model.embed_tokens(tokens))
    for layer, dice in zip(model.layers, cache.now.dices):
        x = fused_block(layer, x, rope, dice, cache)
    return model.norm(x)


def fused_block(block, x, rope, dice, cache):
    """model.Block.forward: a sum and the norm of what is added are one kernel."""
    from triton_ops.block import add_norm
    if block.pre_norm:  # of few rows the sum is part of a product, of one row the norm too
        x = fused_attention(block.self_attn, x, rope, dice, cache, block.input_layernorm, onto=x)
        return fused_mlp(block.mlp, x, block.pre_feedforward_layernorm, onto=x)
    attn_norm, mlp_norm = block.post_attention_layernorm, block.post_feedforward_layernorm
    attended = fused_attention(block.self_attn, x, rope, dice, cache)
    x = add_norm(x, attended, attn_norm.weight, attn_norm.eps)
    return add_norm(x, fused_mlp(block.mlp, x), mlp_norm.weight, mlp_norm.eps)


def fused_attention(attention, x, rope, dice, cache, norm=None, onto=None):
    """
    onto + model.Attention.forward(norm(x)): of a step all between projections and attention is one
    kernel.
    """
    config, index = attention.config, attention.index
    q, k, v, gate, output_gate = projections(attention, x, norm)
    if cache.now.decoding:
        # memory, QK-norm, RoPE and the cache: with one token each is a launch that does nothing
        # else
        q = cache.step(attention, q, k, v, gate, rope)
        y = cache.read(index, q, dice)
    else:
        from triton_ops.block import norm_rotate
        if gate is not None:
            k, v = cache.remember(index, attention.memory.average, gate, k, v)
        norms = None, None
        if config.qk_norm:
            norms = attention.q_norm.weight, attention.k_norm.weight
        q, k = norm_rotate(q, k, *norms, config.norm_eps, *rope)
        y = cache.attend(index, q, k, v, dice)
    y = y.flatten(2)  # (B, T, H * D)
    if output_gate is not None:
        y = y * torch.sigmoid(output_gate)
    return product(attention.o_proj, y, onto)


def projections(attention, x, norm=None):
    """
    Of norm(x), (B, T, C) -> q (B, T, H, D), k, v and the memory's gate (B, T, KV, D), output gate
    (B, T, H * D); None: not in this model.
    """
    from triton_ops.block import products
    config, own = attention.config, attention.memory
    heads = lambda y: y.view(*y.shape[:2], -1, config.head_width)
    linears = [attention.q_proj, attention.k_proj, attention.v_proj]
    if attention.output_gate is not None:  # first, as those with a bias must be the last
        linears.insert(0, attention.output_gate)

    gate = None
    if is_few(x):  # all in one launch, the gate's norm included
        if own is not None:
            linears.append(own.proj)
        biases = [linear.bias for linear in linears if linear.bias is not None]
        eps = config.norm_eps if own is not None or norm is not None else None
        parts = products(x, [linear.weight for linear in linears], biases, eps,
                         None if norm is None else norm.weight)
        if own is not None:
            gate = heads(parts.pop())
    else:
        x = normalised(norm, x)
        parts = [F.linear(x, linear.weight, linear.bias) for linear in linears]
        if own is not None:
            gate = heads(F.linear(attention.at_rms_1(x), own.proj.weight, own.proj.bias))
    *rest, q, k, v = parts
    return heads(q), heads(k), heads(v), gate, rest[0] if rest else None


def fused_mlp(mlp, x, norm=None, onto=None):
    """onto + model.MLP.forward(norm(x))"""
    from triton_ops.block import swiglu, swiglu_products
    if is_few(x) and mlp.gate_proj is not None:
        normed = () if norm is None else (norm.eps, norm.weight)
        hidden = swiglu_products(x, mlp.gate_proj.weight, mlp.up_proj.weight, *normed)
        return product(mlp.down_proj, hidden, onto)
    out, x = [], normalised(norm, x)
    # a part of a long prompt at a time: its hidden vectors are large
    for part in x.flatten(0, 1).split(tokens_together(mlp.up_proj.out_features)):
        hidden = F.linear(part, mlp.up_proj.weight)
        if mlp.gate_proj is None:
            hidden = F.gelu(hidden)
        else:
            hidden = swiglu(F.linear(part, mlp.gate_proj.weight), hidden)
        out.append(F.linear(hidden, mlp.down_proj.weight))
    y = (out[0] if len(out) == 1 else torch.cat(out)).view(x.shape)
    return y if onto is None else onto + y


def product(linear, x, onto=None):
    """onto + linear(x), which has no bias"""
    if not is_few(x):
        y = F.linear(x, linear.weight)
        return y if onto is None else onto + y
    from triton_ops.block import products
    return products(x, [linear.weight], onto=onto)[0]


def normalised(norm, x):
    """norm(x), without what calling a module takes; of norm None x"""
    return x if norm is None else F.rms_norm(x, norm.normalized_shape, norm.weight, norm.eps)


def is_few(x):
    """
    Whether x (B, T, C) is so few rows that reading the weights, or launching, is all that a product
    costs: triton_ops/block.py does that best.
    """
    from triton_ops.block import most_rows
    return x.shape[0] * x.shape[1] <= most_rows(x.shape[2])


# ---------------------------------------------------------------- whether the kernels know a layer

LINEAR, RMS_NORM = nn.Linear.forward, nn.RMSNorm.forward  # torch's

# What the kernels stand for beside the methods: of a layer's parts, and what these call.
OF_BLOCK = [("forward", "model.Block.forward")]
OF_ATTENTION = [(method, f"model.Attention.{method}")
                for method in ("forward", "remember", "at_rms_1", "rotate")]
OF_MLP = [("forward", "model.MLP.forward")]
OF_MEMORY = [(method, f"memory.Decay.{method}") for method in ("forward", "gate", "average")]
OF_INFERENCE = [(method, f"engine.Inference.{method}")
                for method in ("feed", "described", "head")]
OF_CACHE = [(method, f"cache.Cache.{method}")
            for method in ("attend", "store", "put", "read", "step", "remember")]
OF_RECURRENCE = [(form, f"memory.{form}") for form in ("remember", "memory_loop", "memory_step")]


def are_stock(owner, names):
    """Whether these of the owner's functions are the code that the kernels were written from."""
    found = [backend.is_stock(name, getattr(owner, function, None)) for function, name in names]
    return all(found)


def is_stock(layer, config):
    """Whether fused_block may compute this layer: it is the one that the kernels stand for."""
    attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
    if not (are_stock(layer, OF_BLOCK) and are_stock(attention, OF_ATTENTION)
            and are_stock(mlp, OF_MLP)):
        return False
    parts = [layer, attention, mlp]
    if attention.memory is not None:
        if not are_stock(attention.memory, OF_MEMORY):
            return False
        parts.append(attention.memory)
    known = [is_known(name, module, config) for part in parts
             for name, module in part.named_children() if module not in parts]
    return all(known) and not any([has_hooks(part, tell=True) for part in parts])


def is_known(name, module, config):
    """
    Whether the kernels know all of a module of a stock layer: they take its weight, the bias of the
    memory's projection and of q, k and v, and config's eps. If they do not, a run says so once.
    """
    kind = type(module)
    if kind is nn.Linear:
        with_bias = config.qkv_bias and name in ("q_proj", "k_proj", "v_proj")
        known = kind.forward is LINEAR
        known &= (module.bias is not None) == (with_bias or name == "proj")
    elif name in ("q_norm", "k_norm") and not config.qk_norm:
        known = kind is nn.Identity
    else:
        known = (kind is nn.RMSNorm and kind.forward is RMS_NORM and module.weight is not None
                 and module.eps == config.norm_eps)
    if not known:
        note_unknown(name, module)
    return known and not has_hooks(module, tell=True)


def has_hooks(module, tell=False):
    """Whether something is called beside the module's forward, or in its place."""
    of_all, own = torch.nn.modules.module, vars(module)
    found = bool(own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own
                 or of_all._global_forward_hooks or of_all._global_forward_pre_hooks)
    if found and tell:
        note_unknown("a part", module)
    return found


def note_unknown(name, module):
    backend.tell(f"note: {name} is a {type(module).__name__} with more to it than the Triton "
                 "kernels know: the model's layers are computed as they are written")
