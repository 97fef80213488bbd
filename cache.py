"""
What a model keeps of the tokens it has read: keys and values of each layer, and the memory's state.

    prompt    attend stores a layer's k and v, and attends through the method's prefill.
    compress  A method that drops entries does so once: layer by layer as the prompt comes
              (model.generate), else before the first decoding step. The kept entries move together,
              and what they leave is given back.
    evict     Before each further step a method may drop entries again. They move together in place.
    step      One token per row is stored, and read attends through the method's decode. As all
              tensors stay in place, a GPU can replay it as a CUDA graph.

A prompt that fails, in a layer or behind them, leaves the cache as it was. A step that fails leaves
it unusable, and every later call says so: what a step changes in place is not kept twice.

One prefill serves many settings: one after the other in its `turn` (this cache `rewinding`, or a
`compressed` copy of what the method keeps), or all at once, each in a `fork`, an independent copy.
engine.py calls all this; the methods of sparse.py see a LayerCache. Checked in tests/test_model.py
and tests/test_cache.py.

Letters: B batch, T tokens, H query heads, KV key/value heads, D head width, W window, S kept
entries, L layers.
"""
import copy
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import torch

import sparse as methods
from memory import MEMORIES
from sparse import dice_of_layers
from triton_ops import backend


@dataclass
class Feed:
    """What one call of the model feeds to its cache. A place for a token is called a slot."""
    sparse: methods.Dense          # the method,
    prefill: Callable              # and its prefill, as it is computed here (backend.hook)
    position: torch.Tensor         # (B, T)  each token's
    start: object                  # int, or (B,)  the slot of the first token
    lengths: torch.Tensor | None   # (B,)    real tokens per row in this call; None: all T
    real: torch.Tensor | None      # (B, T)  True where there is a real token; None: everywhere
    dices: torch.Tensor            # (L, B, T)  each layer's hash of the row's tokens so far
    decoding: bool                 # one new token per row
    static: bool                   # and a graph may record it: no shape depends on the filling
    whole: bool                    # the prompt ends here, and the method drops entries: at once
    evicts: bool                   # the method drops entries between steps: queries are noted
    watch: Callable | None         # see engine.Inference.prefill


@dataclass
class LayerCache:
    """One layer's cache as a decoding step sees it."""
    k: torch.Tensor                 # (B, Tk, KV, D)  slots, at least up to the newest entry of all
    v: torch.Tensor
    used: torch.Tensor              # (B,)  slots filled per row: the query's own is used - 1
    ragged: bool                    # some slot of k and v may not be filled
    dice: torch.Tensor              # (B, 1)
    positions: torch.Tensor | None  # (B, Tk, KV)  int32, of each slot; None: the slot itself
    bounds_of: Callable = None      # block size -> low, high (B, N, KV, D) of its blocks' keys,
                                    # which the cache keeps from step to step
    prompt: Callable = None         # () -> lengths (B,), dice (B, 1): the prompt's, as compress
                                    # has them, which stay from step to step

    def filled_slots(self):
        """(B, Tk) True where a slot holds an entry."""
        return torch.arange(self.k.shape[1], device=self.used.device) < self.used[:, None]

    def positions_of(self, slots):
        """Slots (B, KV, S), -1 for none -> true positions, likewise."""
        if self.positions is None:
            return slots
        found = self.positions.transpose(1, 2).gather(2, slots.clamp_min(0))
        return found.where(slots >= 0, -1)


class Cache:
    """
    Keys and values (after memory, QK-norm and RoPE) of B rows of tokens, and the memory's state,
    for all layers.

    A token's slot is its position, until a method drops prompt entries and closes the gaps;
    `positions` then tells which token a slot holds. Rows may differ in length: row b fills the
    slots below used[b]; what lies behind may be anything, such as tokens that were forgotten.
    Tensors are made when their layer's first tokens come, and then updated in place.
    """

    def __init__(self, config, B, max_len, window, device, dtype):
        self.config, self.B, self.max_len, self.window = config, B, max_len, window
        self.device, self.dtype = device, dtype

        rows = lambda: torch.zeros(B, dtype=torch.long, device=device)
        self.lengths = rows()     # tokens fed per row: the next position
        self.used = rows()        # slots filled per row
        self.token_hash = rows()  # of all tokens fed, for the random selectors
        # both as they were behind the newest prompt
        self.prompt_lengths, self.prompt_hash = rows(), rows()

        # The memory's, of all layers in one tensor: (L, *its shape), with rows in dimension 2.
        self.state = [None] * config.n_layer
        if config.memory:
            shape = MEMORIES[config.memory].state_shape(config, B)
            self.state = torch.zeros(config.n_layer, *shape, device=device, dtype=torch.float32)

        self.part = slice(None)   # the rows that are fed: all but in a view of some (`rows`)
        self.now = None           # Feed, while the model computes
        self.empty()
        self.clear()

    def empty(self):
        """Without tensors."""
        none = lambda: [None] * self.config.n_layer
        self.k, self.v = none(), none()  # (B, slots, KV, D)
        self.positions = none()          # (B, slots, KV), once compressed
        self.bounds = none()             # {block size: (low, high)} for Quest, (B, N, KV, D)
        self.recent_q = none()           # (B, W, H, D)  each row's last queries, newest at the end
        self.selected = none()           # what the last step read, in the words of sparse.py
        self.slots = self.max_len        # places for entries in a row
        self.compressed_by = {}          # method -> what `compressed` made for it
        self.graphs = {}                 # method -> its decoding step, captured (engine.Graph)
        self.weights = None              # where a graph finds the model's, if it may be captured
        self.feeding = False             # a prompt is on its way (`prefilling`)
        self.evictions = 0               # how often `evict` has moved entries
        self.rewinds = False             # what is fed will be forgotten (`rewinding`)
        self.kept_by = None              # the method whose compress chose the entries

    def clear(self):
        """Forget all tokens. A cache that was not compressed keeps its tensors, and its graphs."""
        if self.positions[0] is not None:
            self.empty()
        self.recent_q = [None for _ in self.recent_q]
        # zeros, since a NaN would outlive its row: 0 * NaN is NaN
        for x in (self.lengths, self.used, self.token_hash, self.prompt_lengths, self.prompt_hash,
                  *self.state, *self.k, *self.v):
            if x is not None:
                x.zero_()
        self.filled = 0           # the largest of `used`, known without asking the GPU
        self.ragged = False       # rows may differ in `used`
        self.stepped = None       # the method, if a decoding step of it was the last to happen
        self.decoding = False     # a decoding step has happened
        self.bounded = [None] * self.config.n_layer   # the block size whose bounds are up to date
        self.spoiled = False      # a step was not completed

    # ---------------------------------------------------------------- one prefill, many settings

    def fork(self):
        """An independent copy."""
        def clone(x):
            if isinstance(x, torch.Tensor):
                return x.clone()
            if isinstance(x, (tuple, list)):
                return type(x)(clone(part) for part in x)
            if isinstance(x, dict):
                return {key: clone(value) for key, value in x.items()}
            return x

        # a graph and a compressed copy write to this cache's tensors
        own = {"graphs": {}, "compressed_by": {}, "selected": [None for _ in self.selected],
               "rewinds": False}
        fork = object.__new__(Cache)
        for field, value in vars(self).items():
            setattr(fork, field, own[field] if field in own else clone(value))
        return fork

    def noted(self):
        """
        Returns a function that brings back how things stand now: what was fed and decoded in
        between is forgotten. Nothing large is copied.
        """
        recent_q = list(self.recent_q)
        tensors = [x for x in (self.lengths, self.used, self.token_hash, self.prompt_lengths,
                               self.prompt_hash, *self.state, *recent_q) if x is not None]
        before = [x.clone() for x in tensors]
        filled, ragged, decoding = self.filled, self.ragged, self.decoding

        def forget():
            for x, old in zip(tensors, before):
                x.copy_(old)
            self.filled, self.ragged, self.decoding = filled, ragged, decoding
            self.recent_q, self.stepped, self.spoiled = recent_q, None, False
            self.bounded = [None for _ in self.bounded]
        return forget

    @contextmanager
    def rewinding(self):
        """What is fed and decoded within is forgotten at its end."""
        self.check_whole()
        forget, before, self.rewinds = self.noted(), self.rewinds, True
        try:
            yield self
        finally:
            self.spoiled = True  # until all is forgotten
            forget()
            self.rewinds = before

    def compressed(self, sparse):
        """
        A cache of what `sparse` keeps of this one, which stays as it is. The next call for the same
        method, or for one that differs by its seed alone, writes to the same tensors, so that a
        graph of it serves again. ValueError unless this cache holds a prompt, whole, and nothing
        more.
        """
        self.check_whole()
        refused = f"{methods.name(sparse)} chooses from a whole prompt, and this cache has"
        if self.filled == 0:
            raise ValueError(f"{refused} none")
        if self.positions[0] is not None:
            raise ValueError(f"{refused} dropped entries already: fork it before")
        self.check_not_decoding(sparse)

        like = methods.unseeded(sparse)
        if like not in self.compressed_by:
            self.compressed_by[like] = Cache(self.config, self.B, self.max_len, self.window,
                                             self.device, self.dtype)
        kept = self.compressed_by[like]
        of = lambda cache: (cache.lengths, cache.token_hash, cache.prompt_lengths,
                            cache.prompt_hash, *cache.state)
        for x, mine in zip(of(kept), of(self)):
            if x is not None:
                x.copy_(mine)
        kept.keep_of(self, sparse)
        if methods.evicts(sparse):
            kept.recent_q = [q.clone() for q in self.recent_q]
        kept.stepped, kept.decoding, kept.spoiled = None, False, False
        return kept

    @contextmanager
    def turn(self, sparse):
        """
        The cache that a method (None: dense) may decode from, in its turn: the next one finds this
        cache as it was.
        """
        if methods.drops(sparse):
            yield self.compressed(sparse)
        else:
            with self.rewinding():
                yield self

    def rows(self, part):
        """A view of the rows `part`, a slice. Feed it prompts, then tell the whole by `joined`."""
        view = copy.copy(self)
        view.part = part
        if self.ragged:
            view.filled = int(self.used[part].max())
        return view

    def joined(self, views):
        """Know what was fed to views of all rows."""
        self.ragged = any(view.ragged for view in views) or len({view.filled for view in views}) > 1
        self.filled = max(view.filled for view in views)
        self.slots, self.kept_by = views[0].slots, views[0].kept_by
        self.stepped = None

    # ---------------------------------------------------------------- what may fail

    def check_whole(self):
        if self.spoiled:
            raise ValueError("a step with this cache failed half-way, or a method evicted entries "
                             "after a row had ended, and nobody knows what it holds: clear it, or "
                             "go on with a fork that was made before")

    def check_may_drop(self):
        if self.rewinds:
            raise ValueError("dropping entries cannot be undone when what was fed is forgotten: "
                             "let the method have `compressed`")

    def check_not_decoding(self, sparse):
        if self.decoding:
            raise ValueError(f"{methods.name(sparse)} drops entries before the first decoding "
                             "step, and this cache has had one: fork it before, or clear it")

    def check_rows(self, B):
        rows = len(self.used[self.part])
        if B != rows:
            raise ValueError(f"{B} rows of tokens for a cache of {rows}: ask new_cache for as many")

    def check_room(self, filled):
        if filled > self.slots:
            raise ValueError(f"the cache has room for {self.slots} entries a row and would need "
                             f"{filled}: ask new_cache for a larger max_len")

    @contextmanager
    def prefilling(self):
        """
        A prompt, or a chunk of one, is fed within. If that fails, the cache is as it was before.
        Within another one: nothing.
        """
        if self.feeding:
            yield
            return
        self.check_whole()
        before, rewinds = self.noted() if self.filled else None, self.rewinds
        self.feeding = self.spoiled = True
        try:
            yield
        except BaseException:
            if before:
                before()
            else:  # it held nothing
                self.empty()
                self.clear()
            self.feeding, self.rewinds = False, rewinds
            raise
        self.feeding = self.spoiled = False

    @contextmanager
    def stepping(self):
        """A decoding step is taken within. If that fails, the cache is spoiled."""
        self.check_whole()
        self.spoiled = True
        yield
        self.spoiled = False

    @contextmanager
    def ending(self):
        """
        Yields end(rows), rows (B,) bool: at the end of the block, what was decoded after this call
        is forgotten of these rows. Where entries were evicted since, that cannot be undone, and the
        cache is spoiled.
        """
        ended, evictions = [], None

        def end(rows):
            nonlocal evictions
            evictions = self.evictions if evictions is None else evictions
            rows = rows.nonzero().squeeze(1)
            kept = [self.lengths, self.used, self.token_hash]
            if self.positions[0] is not None:  # a method that evicts asks with these
                kept += [q for q in self.recent_q if q is not None]
            tensors = [(x, x[rows]) for x in kept]
            state = self.state[:, :, rows] if self.config.memory else None
            ended.append((rows, tensors, state))
        try:
            yield end
        finally:
            whole = not self.spoiled and (not ended or self.evictions == evictions)
            self.spoiled = True  # until all is forgotten
            for rows, tensors, state in ended:
                for x, before in tensors:
                    x[rows] = before
                if state is not None:
                    self.state[:, :, rows] = state
            if ended:
                self.ragged, self.stepped, self.filled = True, None, int(self.used.max())
            self.spoiled = not whole

    # ---------------------------------------------------------------- tokens in

    def grow(self, T, lengths):
        """
        Claim slots for T more tokens per row, of which lengths (B,) are real (None: all). -> the
        first one's slot, int or (B,)
        """
        used, start = self.used[self.part], self.filled
        filled = self.filled + T if lengths is None else int((used + lengths).max())
        self.check_room(filled)
        if self.ragged:
            start = used.clone()
        new, self.filled = T if lengths is None else lengths, filled
        self.ragged = self.ragged or lengths is not None
        self.lengths[self.part] += new
        used += new
        return start

    def room(self, i, slots):
        """Tensors for layer i's entries."""
        if self.k[i] is not None and self.k[i].shape[1] >= slots:
            return
        if self.k[i] is not None and self.part != slice(None):
            raise ValueError("a method's compress must keep equally many entries (B, KV, S) of "
                             "each part of a batch: S may follow from k's length and the budget "
                             "alone")
        entries = self.B, slots, self.config.n_kv_head, self.config.head_width
        # zeros, since garbage might be NaN
        self.k[i] = torch.zeros(entries, device=self.device, dtype=self.dtype)
        self.v[i] = torch.zeros(entries, device=self.device, dtype=self.dtype)
        self.bounds[i], self.bounded[i] = None, None
        self.graphs.clear()  # they know the old ones

    def remember(self, i, memory, x, k, v):
        """A memory (memory.py) on k and v (B, T, KV, D), from layer i's state and to it."""
        state = self.state[i][:, self.part]
        k, v, last = memory(x, k, v, state, self.now.real)
        state.copy_(last)
        return k, v

    def without_padding(self, x):
        """x (B, T, C) with zeros at padding. What stands there might be NaN, and 0 * NaN is NaN."""
        real = self.now.real
        return x if real is None else x.masked_fill(~real[..., None], 0)

    def attend(self, i, q, k, v, dice):
        """
        Store k, v (B, T, KV, D) of layer i, and attend with q (B, T, H, D) to all it holds, through
        the method's hooks. -> (B, T, H, D)
        """
        feed = self.now
        if feed.decoding:
            self.store(i, k, v)
            return self.read(i, q, dice)

        if feed.whole:  # what the method drops is never stored
            y, selected = feed.prefill(q, k, v, 0, dice)
            self.keep_at_once(i, q, k, v, dice)
        else:
            self.store(i, k, v)
            if self.positions[i] is None or feed.evicts:  # else compression is over
                self.note_queries(i, q)
            start = feed.start
            if not isinstance(start, int) or start > 0:  # something came before
                # padding may reach further than any entry, and the kernels want a slot per query
                slots = max(self.filled, q.shape[1])
                k, v = self.k[i][self.part, :slots], self.v[i][self.part, :slots]
            y, selected = feed.prefill(q, k, v, start, dice)
        if feed.watch:
            feed.watch(i, selected, feed.real)
        return y

    def store(self, i, k, v):
        """k and v (B, T, KV, D) of the real tokens into their slots of layer i."""
        self.room(i, self.slots)
        self.put(self.k[i], k)
        self.put(self.v[i], v)
        if self.positions[i] is not None:
            self.put(self.positions[i], self.now.position[..., None].expand(k.shape[:3]))
        if not self.now.decoding:
            self.bounded[i] = None  # of fewer keys
        elif self.bounded[i]:
            self.widen_bounds(i)

    def widen_bounds(self, i):
        """Quest's bounds of the block that each row's newest key falls into, by that key."""
        size, slot, row = self.bounded[i], self.used - 1, torch.arange(self.B, device=self.device)
        k, block = self.k[i][row, slot], slot // size  # (B, KV, D), (B,)
        begins = (slot % size == 0)[:, None, None]     # what stood there may be of an older prompt
        for bound, further in zip(self.bounds[i][size], (torch.minimum, torch.maximum)):
            bound[row, block] = k.where(begins, further(bound[row, block], k))

    def put(self, where, x):
        """x (B, T, ...) into where (B, slots, ...), from slot now.start on."""
        start, real = self.now.start, self.now.real
        B, T = x.shape[:2]
        if self.now.static:  # one token of each row, in the slot that `used` tells a graph
            where[torch.arange(B, device=x.device), self.used - 1] = x[:, 0].to(where.dtype)
        elif isinstance(start, int):  # padding is stored too, as zeros
            end = min(start + T, self.slots)
            if real is not None:
                x = x.where(real.view(B, T, *[1] * (x.dim() - 2)), 0)
            where[self.part, start:end] = x[:, :end - start]
        else:
            x, where = x.to(where.dtype), where[self.part]
            if real is None:
                real = torch.ones(B, T, device=x.device, dtype=torch.bool)
            row, t = real.nonzero(as_tuple=True)
            where[row, start[row] + t] = x[row, t]

    def note_queries(self, i, q):
        """Keep the last W queries of each row, q (B, T, H, D) included: SnapKV asks with them."""
        if self.recent_q[i] is None:
            shape = self.B, self.window, *q.shape[2:]
            self.recent_q[i] = q.new_zeros(shape, dtype=self.dtype)
        of_part = self.recent_q[i][self.part]
        of_part.copy_(self.newest(of_part, q))

    def newest(self, old, q):
        """The last W of each row: of old (B, W, H, D), then of q (B, T, H, D), its real ones."""
        W, T, lengths = old.shape[1], q.shape[1], self.now.lengths
        if lengths is None:
            new = q[:, -W:].to(old.dtype)
            return new if T >= W else torch.cat([old[:, T:], new], dim=1)
        index = lengths[:, None] + torch.arange(W, device=q.device)  # in old, then q
        index = index[..., None, None].expand(-1, -1, *q.shape[2:])
        of_q = q.gather(1, (index - W).clamp_min(0)).to(old.dtype)
        return of_q.where(index >= W, old.gather(1, index.clamp_max(W - 1)))

    # ---------------------------------------------------------------- compression

    def compress(self, sparse):
        """Before the first step: drop the entries that the method does not keep, in every layer."""
        if not self.filled or not methods.drops(sparse):
            return
        if self.positions[0] is None:
            self.check_not_decoding(sparse)
            self.check_may_drop()
            self.keep_of(self, sparse)
            if not methods.evicts(sparse):
                self.recent_q = [None for _ in self.recent_q]
        elif self.kept_by != methods.phases(sparse).compress_by:
            raise ValueError(f"{methods.name(sparse)} would keep other entries than "
                             f"{methods.name(self.kept_by)}, which has dropped them: fork the "
                             "cache before, or clear it")

    def keep_at_once(self, i, q, k, v, dice):
        """Of a whole prompt's k, v (B, T, KV, D) in layer i hold what the method keeps."""
        sparse = self.now.sparse
        newest = self.newest(q.new_zeros(len(q), self.window, *q.shape[2:]), q)
        compress = backend.hook(sparse, "compress", k)
        kept = compress(newest, k, v, self.lengths[self.part], dice[:, -1:])
        self.keep(i, kept, k, v, self.max_len - k.shape[1])
        self.kept_by = methods.phases(sparse).compress_by
        if self.now.evicts:
            self.note_queries(i, q)

    def keep_of(self, source, sparse):
        """Hold what the method keeps of the cache `source`, this one or another."""
        filled, room = source.filled, source.slots - source.filled
        # the last prompt token's hash stands in for the draw of all of them
        dices = dice_of_layers(source.token_hash[:, None], len(self.k))
        for i, dice in enumerate(dices):
            k, v = source.k[i][:, :filled], source.v[i][:, :filled]
            compress = backend.hook(sparse, "compress", k)
            kept = compress(source.recent_q[i], k, v, source.lengths, dice)
            self.spoiled = True  # until all layers are through
            if self is source:
                self.k[i] = self.v[i] = None
            self.keep(i, kept, k, v, room)
        self.kept_by, self.spoiled = methods.phases(sparse).compress_by, False

    def evict(self, sparse):
        """Before a step: drop the entries that the method no longer keeps, in every layer."""
        if not methods.evicts(sparse) or not self.filled:
            return
        self.check_whole()
        if self.recent_q[0] is None:
            raise ValueError(f"{methods.name(sparse)} asks with the newest queries, which are not "
                             f"kept after {methods.name(self.kept_by)}: fork the cache before")
        filled, used = self.filled, self.used.clone()  # what the first layer keeps changes both
        dices, kept = dice_of_layers(self.token_hash[:, None], len(self.k)), []
        for i, dice in enumerate(dices):
            layer = LayerCache(self.k[i][:, :filled], self.v[i][:, :filled], used, self.ragged,
                               dice, self.positions[i][:, :filled])
            slots = backend.hook(sparse, "evict", layer.k)(self.recent_q[i], layer)
            kept.append(None if slots is None else slots.shape[2])
            if kept[i] != kept[0]:
                raise ValueError(f"{methods.name(sparse)}: evict keeps {kept[0]} entries in one "
                                 f"layer and {kept[i]} in another, None being all: it must be "
                                 "equally many")
            if slots is not None:
                self.check_may_drop()
                self.spoiled = True  # until all layers are through
                self.keep(i, slots, layer.k, layer.v, 0, layer.positions_of(slots))
        self.spoiled, self.evictions = False, self.evictions + (kept[0] is not None)

    def keep(self, i, kept, k, v, room, positions=None):
        """
        Of layer i's k, v (B, T, KV, D) hold the entries kept (B, KV, S), -1 at the end, None: all
        of the prompt; and room for more. positions: theirs, likewise; None: the same.
        """
        if kept is None:
            slot = torch.arange(k.shape[1], device=self.device)
            kept = slot.where(slot < self.lengths[self.part, None, None], -1)
            kept = kept.expand(-1, k.shape[2], -1)
        positions = kept if positions is None else positions
        kept, positions = kept.transpose(1, 2), positions.transpose(1, 2)  # (B, S, KV)
        S, gap = kept.shape[1], (kept < 0).unsqueeze(-1)
        self.room(i, S + room)

        if self.positions[i] is None or self.positions[i].shape != self.k[i].shape[:3]:
            shape = self.k[i].shape[:3]
            self.positions[i] = torch.zeros(shape, device=self.device, dtype=torch.int32)
            self.graphs.clear()  # they know none, or others
        index = kept.clamp_min(0).unsqueeze(-1).expand(-1, -1, -1, k.shape[-1])
        self.k[i][self.part, :S] = k.gather(1, index).masked_fill(gap, 0)
        self.v[i][self.part, :S] = v.gather(1, index).masked_fill(gap, 0)
        self.positions[i][self.part, :S] = positions.int()
        self.bounded[i] = None  # of what has moved

        self.used[self.part] = (kept[:, :, 0] >= 0).sum(1)  # the same in all layers and heads
        self.filled, self.slots = S, self.k[i].shape[1]
        self.ragged = True  # a short prompt may fill less than S

    # ---------------------------------------------------------------- decoding steps

    def before_step(self, sparse):
        """Room for a token, and the entries and bounds that a step of this method asks for."""
        self.check_room(self.filled + 1)
        self.compress(sparse)  # once, and only if the method drops entries
        self.evict(sparse)     # again and again, if it does so between steps
        if self.stepped != sparse:
            # a graph of another method need not have kept Quest's bounds up to date
            self.bounded = [None for _ in self.bounded]

    def step(self, attention, q, k, v, gate, rope):
        """
        The projections q (B, 1, H, D), k, v, gate (B, 1, KV, D) of a new token, through memory,
        QK-norm and RoPE, k and v into the cache: in one kernel, and in fp32 all the way. -> q,
        ready for attention.
        """
        from triton_ops.block import decode_step
        i, config, norms = attention.index, attention.config, (None, None)
        self.room(i, self.slots)
        if config.qk_norm:
            norms = attention.q_norm.weight, attention.k_norm.weight
        size, low, high = self.bounded[i], None, None
        if size:  # Quest's bounds of the block that the new key falls into
            low, high = self.bounds[i][size]
        return decode_step(q, k, v, gate, *norms, config.norm_eps, *rope, self.state[i],
                           self.k[i], self.v[i], low, high, size or 1, self.used,
                           self.positions[i], self.now.position[:, 0])

    def read(self, i, q, dice):
        """
        A decoding step's attention: q (B, 1, H, D), whose token is stored, to what layer i holds,
        through the hook.
        """
        if self.now.evicts:
            self.note_queries(i, q)
        # what a graph may record looks at `used`: no shape of its changes from step to step
        static = self.now.static
        slots = slice(None) if static else slice(self.filled)
        positions = None if self.positions[i] is None else self.positions[i][:, slots]
        layer = LayerCache(self.k[i][:, slots], self.v[i][:, slots], self.used,
                           self.ragged or static, dice, positions,
                           lambda block_size: self.bounds_of(i, block_size),
                           lambda: (self.prompt_lengths, self.prompt_dice(dice)))
        decode = backend.hook(self.now.sparse, "decode", q)
        y, self.selected[i] = decode(q, layer)
        return y

    def prompt_dice(self, dice):
        """Of a step's dice (B, 1), a layer's, without what the answer has added to them."""
        return dice - (self.token_hash - self.prompt_hash)[:, None]

    def bounds_of(self, i, block_size):
        """
        Each block's least and greatest key, per channel: low, high (B, N, KV, D). From then on,
        step and store keep them up to date.
        """
        if backend.wanted(self.k[i]):
            from triton_ops.quest import block_bounds
        else:
            from triton_ops.on_cpu import block_bounds
        # a store of a fork's own need not have kept them
        stock = backend.is_stock("cache.Cache.store", self.store)
        if self.bounded[i] != block_size or not stock:
            new, held = block_bounds(self.k[i], self.used, block_size), self.bounds[i] or {}
            if block_size in held:  # in place: a graph may know these tensors
                for old, x in zip(held[block_size], new):
                    old.copy_(x)
            else:
                self.bounds[i] = held | {block_size: new}
            self.bounded[i] = block_size
        return self.bounds[i][block_size]
