"""
The hooks of sparse.py in Triton, and the rule by which they compute.

    form_of(method, phase, x)    method.prefill, .compress or .decode, as it is computed for tensors like x

A kernel stands for definitions that sparse.py spells out. It computes only where each of these is the code that the kernel
was written from (backend.CODE). A definition that a subclass overrides, a fork edits or a test replaces is computed as it is
written, in PyTorch, and a run says so once. Where a method's own definitions choose what to read (`choose`, `score`,
`forced`), only the choice is theirs: attention to what they chose stays with the kernel.

A form is a function of the method and of the hook's arguments. Each is checked against the hook in sparse.py that it
stands for: tests/test_backend.py, and tests/test_hooks.py for methods that override something. Read kernels_sparse.py next.

Letters as in sparse.py: B batch, Tq queries, Tk slots, H query heads, KV key/value heads, D head width, N blocks, S selected.
"""
import math
from collections.abc import Callable
from types import MethodType
from typing import NamedTuple

import torch

import sparse
from backend import is_stock, triton_for
from kernels_dilated import dilated
from kernels_moba import MOST_BLOCKS, moba_attend, moba_route
from kernels_sparse import attend_slots, quest_attend, quest_scores, select, snapkv_scores


class Form(NamedTuple):
    """
    A hook in Triton, (method, *the hook's arguments) -> what the hook returns, and the names in sparse.py that it stands for.
    A class's names mean what the method has under them, its own or inherited.
    """
    compute: Callable              # in Triton altogether
    names: str                     # what it must find to compute at all
    choice: str = ""               # and to choose what is read. Where it does not find that,
    chosen: Callable | None = None  # this computes, to whom method.choose says what to read; None: the hook as written


def all_stock(method, names):
    """Whether these names mean to the method what the kernels stand for."""
    found = {name: getattr(method if "." in name else sparse, name.rpartition(".")[2]) for name in names.split()}
    return all([is_stock(f"sparse.{name}", definition) for name, definition in found.items()])


def first_slots(q, start):
    """start, an int or (B,), as the kernels take it: (B,) int64."""
    return torch.as_tensor(start, device=q.device).expand(len(q)).contiguous()


# ---------------------------------------------------------------- the forms

def dense_decode(method, q, cache):
    return attend_slots(q, cache.k, cache.v, cache.used), None


def quest_decode(method, q, cache):
    size, N = method.block_size, math.ceil(cache.k.shape[1] / method.block_size)
    low, high = cache.bounds_of(size)                                                          # (B, N, KV, D)
    scores = quest_scores(q, low, high, cache.used, size, method.keep_first, method.keep_current)
    return quest_read(method, q, cache, select(scores, min(method.budget // size, N)))


def quest_decode_chosen(method, q, cache):
    return quest_read(method, q, cache, method.choose(q, cache).int())


def quest_read(method, q, cache, chosen):
    """chosen: blocks (B, KV, S), int32"""
    y, slots = quest_attend(q, cache.k, cache.v, chosen, cache.used, method.block_size)
    return y, cache.positions_of(slots)


def moba_prefill(method, q, k, v, start, dice):
    q, k = q.to(v.dtype), k.to(v.dtype)  # autocast leaves them in fp32, behind their norms
    size, N = method.block_size, math.ceil(k.shape[1] / method.block_size)
    sparse.check(N <= MOST_BLOCKS[v.dtype], f"moba: {N:,} blocks, and the Triton kernels route among at most "
                 f"{MOST_BLOCKS[v.dtype]:,}: raise block_size={size}, or --kernels=torch computes it")
    chosen = moba_route(q, k, first_slots(q, start), size, min(method.budget // size, N), method.keep_first)
    return moba_attend(q, k, v, chosen, first_slots(q, start), size), chosen


def moba_prefill_chosen(method, q, k, v, start, dice):
    chosen = method.choose(q, k, start, dice).int()                                            # (B, KV, Tq, S)
    return moba_attend(q.to(v.dtype), k.to(v.dtype), v, chosen, first_slots(q, start), method.block_size), chosen


def snapkv_compress(method, q, k, v, lengths, dice):
    method.check_window(q)
    scores = snapkv_scores(q[:, -method.window:], k, lengths, method.kernel)                   # (B, KV, Tk)
    return select(scores, min(method.budget, k.shape[1])).long()


def dilated_prefill(method, q, k, v, start, dice):
    q, k = q.to(v.dtype), k.to(v.dtype)
    return dilated(q, k, v, first_slots(q, start), method.dilation, method.local, method.initial), None


def dilated_decode(method, q, cache):
    _, selected = method.reads(q, cache)
    return dilated(q, cache.k, cache.v, cache.used - 1, method.dilation, method.local, method.initial), selected


# By the class of sparse.py that defines a hook, and the hook. Dense.prefill is PyTorch's own attention everywhere.
FORMS = {
    (sparse.Dense, "decode"): Form(dense_decode, "Dense.decode attend"),
    (sparse.Quest, "decode"): Form(
        quest_decode, "Quest.decode attend_to_slots attend",
        "Quest.choose Quest.score Quest.forced chance per_kv_head to_blocks top", quest_decode_chosen),
    (sparse.MoBA, "prefill"): Form(
        moba_prefill, "MoBA.prefill MoBA.attend_to_blocks attend query_slots up_to_queries "
        "MoBA.choose MoBA.forced top",  # moba_attend wants the own block among the chosen, and none twice
        "MoBA.score chance per_kv_head to_blocks", moba_prefill_chosen),
    (sparse.SnapKV, "compress"): Form(
        snapkv_compress, "SnapKV.compress", "SnapKV.score SnapKV.forced chance per_kv_head top"),
    (sparse.Dilated, "prefill"): Form(
        dilated_prefill, "Dilated.prefill Dilated.pattern Dilated.attend_to_shared attend query_slots up_to_queries"),
    (sparse.Dilated, "decode"): Form(dilated_decode, "Dilated.decode Dilated.reads Dilated.pattern attend"),
}


# ---------------------------------------------------------------- the rule

def registered(method, phase):
    """The Form of the class that defines this hook of the method; None if that is none of sparse.py's, or has no kernel."""
    owner = next(kind for kind in type(method).__mro__ if phase in vars(kind))
    return FORMS.get((owner, phase))


def form_of(method, phase, x):
    """The hook as it is computed for tensors like x (..., D), bound to the method. ValueError if the kernels do not cover x."""
    form, as_written = registered(method, phase), getattr(method, phase)
    if form is None or not triton_for(x) or not all_stock(method, form.names):
        return as_written
    if method.random is None and all_stock(method, form.choice):
        return MethodType(form.compute, method)
    return MethodType(form.chosen, method) if form.chosen else as_written


def in_graph(method):
    """Whether a decoding step may be recorded once and replayed: its code is known not to mind, or says that it does not."""
    form = registered(method, "decode")
    return method.in_graph or (form is not None and all_stock(method, f"{form.names} {form.choice}"))
