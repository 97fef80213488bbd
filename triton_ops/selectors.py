"""
The hooks of sparse.py in Triton, and the rule by which they compute.

    form_of(method, phase, x)    a method's prefill, compress or decode for tensors like x

A kernel stands for definitions that sparse.py spells out. It computes only where each of them is
the code that it was written from (backend.form_in). What a subclass overrides, a fork edits or a
test replaces is computed as it is written, in PyTorch, and a run says so once. Where only the
choice of what to read is a method's own (`choose`, `score`, `forced`), attention to what it chose
stays with the kernel.

A form is a function of the method and of the hook's arguments. tests/test_backend.py checks each
against the hook that it stands for, tests/test_hooks.py checks the rule. Read quest.py next.

Letters as in sparse.py: B batch, Tq queries, Tk slots, H query heads, KV key/value heads, D head
width, N blocks, S selected.
"""
import math

import torch

import sparse
from triton_ops.backend import QUEST, Form, all_stock, form_in, registered, triton_for
from triton_ops.dilated import dilated
from triton_ops.moba import moba_attend
from triton_ops.moba_route import MOST_BLOCKS, moba_route
from triton_ops.quest import attend_slots, quest_attend, quest_scores
from triton_ops.snapkv import snapkv_scores
from triton_ops.topk import MOST_SCORES, select


def first_slots(q, start):
    """start, an int or (B,), as the kernels take it: (B,) int64."""
    return torch.as_tensor(start, device=q.device).expand(len(q)).contiguous()


# ---------------------------------------------------------------- the forms

def dense_decode(method, q, cache):
    return attend_slots(q.to(cache.k.dtype), cache.k, cache.v, cache.used), None


def quest_decode(method, q, cache):
    q = q.to(cache.k.dtype)  # autocast leaves it in fp32
    size, N = method.block_size, math.ceil(cache.k.shape[1] / method.block_size)
    low, high = cache.bounds_of(size)  # (B, N, KV, D)
    scores = quest_scores(q, low, high, cache.used, size, method.keep_first, method.keep_current)
    return quest_read(method, q, cache, select(scores, min(method.budget // size, N)))


def quest_decode_chosen(method, q, cache):
    return quest_read(method, q, cache, method.choose(q, cache).int())


def quest_read(method, q, cache, chosen):
    """chosen: blocks (B, KV, S), int32"""
    q = q.to(cache.k.dtype)
    y, slots = quest_attend(q, cache.k, cache.v, chosen, cache.used, method.block_size)
    return y, cache.positions_of(slots)


def moba_prefill(method, q, k, v, start, dice):
    q, k = q.to(v.dtype), k.to(v.dtype)  # autocast leaves them in fp32, behind their norms
    size, N = method.block_size, math.ceil(k.shape[1] / method.block_size)
    most = MOST_BLOCKS[v.dtype]
    sparse.check(N <= most, f"moba: {N} blocks, and the Triton kernels route among at most "
                 f"{most:,}: raise block_size={size}, or --kernels=torch computes it")
    first, S = first_slots(q, start), min(method.budget // size, N)
    chosen = moba_route(q, k, first, size, S, method.keep_first)  # (B, KV, Tq, S)
    return moba_attend(q, k, v, chosen, first, size), chosen


def moba_prefill_chosen(method, q, k, v, start, dice):
    chosen = method.choose(q, k, start, dice).int()  # (B, KV, Tq, S)
    q, k, first = q.to(v.dtype), k.to(v.dtype), first_slots(q, start)
    return moba_attend(q, k, v, chosen, first, method.block_size), chosen


def snapkv_compress(method, q, k, v, lengths, dice):
    method.check_window(q)
    Tk = k.shape[1]
    sparse.check(Tk <= MOST_SCORES, f"snapkv: {Tk:,} entries, and the Triton kernels choose among "
                 f"at most {MOST_SCORES:,}: --kernels=torch computes it")
    q = q[:, -method.window:].to(k.dtype)
    scores = snapkv_scores(q, k, lengths, method.kernel)  # (B, KV, Tk)
    return select(scores, min(method.budget, Tk)).long()


def dilated_prefill(method, q, k, v, start, dice):
    pattern = method.dilation, method.local, method.initial
    return dilated(q.to(v.dtype), k.to(v.dtype), v, first_slots(q, start), *pattern), None


def dilated_decode(method, q, cache):
    _, selected = method.reads(q, cache)
    pattern = method.dilation, method.local, method.initial
    return dilated(q.to(cache.k.dtype), cache.k, cache.v, cache.used - 1, *pattern), selected


# By the class of sparse.py that defines a hook, and the hook. Dense.prefill is PyTorch's own
# attention everywhere.
FORMS = {
    (sparse.Dense, "decode"): Form(dense_decode, "Dense.decode attend"),
    (sparse.Quest, "decode"): Form(quest_decode, *QUEST, quest_decode_chosen),
    (sparse.MoBA, "prefill"): Form(
        moba_prefill, "MoBA.prefill MoBA.attend_to_blocks attend query_slots up_to_queries "
        # moba_attend wants the own block among the chosen, and none twice
        "MoBA.choose MoBA.forced top",
        "MoBA.score chance per_kv_head to_blocks", moba_prefill_chosen),
    (sparse.SnapKV, "compress"): Form(
        snapkv_compress, "SnapKV.compress SnapKV.best",
        "SnapKV.score SnapKV.forced chance per_kv_head top"),
    (sparse.Dilated, "prefill"): Form(
        dilated_prefill, "Dilated.prefill Dilated.pattern Dilated.attend_to_shared attend "
        "query_slots up_to_queries"),
    (sparse.Dilated, "decode"): Form(
        dilated_decode, "Dilated.decode Dilated.reads Dilated.pattern attend"),
}


# ---------------------------------------------------------------- the rule

def form_of(method, phase, x):
    """
    The hook as it is computed for tensors like x (..., D), bound to the method. ValueError if the
    kernels do not cover x.
    """
    if registered(FORMS, method, phase) is None or not triton_for(x):
        return getattr(method, phase)
    return form_in(FORMS, method, phase)


def decodes(method):
    """Whether its decoding steps are ours, all that they call included."""
    form = registered(FORMS, method, "decode")
    return form is not None and all_stock(method, f"{form.names} {form.choice}")


def in_graph(method):
    """
    Whether a decoding step may be recorded once and replayed: its code is known not to mind, or
    says that it does not (Dense.in_graph).
    """
    return decodes(method) or method.in_graph
