"""
Who computes: plain PyTorch (model.py, memory.py, sparse.py), or the same in Triton.

    auto     Triton for tensors on a GPU, PyTorch elsewhere: on a CPU two hooks sooner than they are
             written (on_cpu.py). What the kernels do not cover on a GPU is an error that says so,
             never a silent change to something slower.
    triton   The kernels or an error. On a CPU they need Triton's interpreter (TRITON_INTERPRET=1),
             which the tests use.
    torch    Plain PyTorch everywhere, as it is written.

The scripts' flag --kernels sets it. Results agree to rounding: tests/test_backend.py runs whole
models both ways.

A kernel, or a hook of on_cpu.py, stands for code that is written out in PyTorch, and that code
decides. CODE has a hash of each definition that one was written from. Where a fork edited it, a
subclass overrides it or something else took its place, that code runs as it is written, and a run
says so once. Whoever changes a definition together with its kernel puts the new hash here;
tests/test_hooks.py prints it.
"""
import ast
import functools
import importlib.util
import inspect
import io
import math
import os
import sys
import textwrap
import tokenize
from collections.abc import Callable
from hashlib import blake2b
from types import FunctionType, MethodType
from typing import NamedTuple

import torch

CHOICES = "auto", "triton", "torch"
choice = "auto"

HAS_TRITON = importlib.util.find_spec("triton") is not None  # Linux has wheels
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

CODE = {
    "cache.Cache.attend": "e08ce459",
    "cache.Cache.put": "e6211918",
    "cache.Cache.read": "6d4eca57",
    "cache.Cache.remember": "e9736d29",
    "cache.Cache.step": "cb0d30ae",
    "cache.Cache.store": "a799d181",
    "engine.Inference.described": "79d19030",
    "engine.Inference.feed": "96a2e1d2",
    "engine.Inference.head": "e5435c2d",
    "memory.Decay.average": "1f988179",
    "memory.Decay.forward": "72f6ae5f",
    "memory.Decay.gate": "2af384bd",
    "memory.Recurrence.backward": "267af602",
    "memory.Recurrence.forward": "5cdaf0e3",
    "memory.memory_loop": "29444303",
    "memory.memory_scan": "ed190700",
    "memory.memory_step": "6f774ff9",
    "memory.remember": "82e25362",
    "memory.scan": "508c6457",
    "model.Attention.at_rms_1": "ae2b6fcb",
    "model.Attention.forward": "e6a90e32",
    "model.Attention.remember": "b1898dcf",
    "model.Attention.rotate": "9355eb20",
    "model.Block.forward": "a1d11e14",
    "model.MLP.forward": "a49e6a90",
    "model.Transformer.forward": "fd38be44",
    "model.Transformer.hidden": "174890a0",
    "sparse.Dense.decode": "e8d8fe43",
    "sparse.Dilated.attend_to_shared": "8345ad28",
    "sparse.Dilated.decode": "5ad7a378",
    "sparse.Dilated.pattern": "9ad3062e",
    "sparse.Dilated.prefill": "9389b832",
    "sparse.Dilated.reads": "fd4d84a5",
    "sparse.MoBA.attend_to_blocks": "ae361ac4",
    "sparse.MoBA.choose": "0dd989b0",
    "sparse.MoBA.forced": "795d611b",
    "sparse.MoBA.prefill": "8ae0a943",
    "sparse.MoBA.score": "e1adac3b",
    "sparse.Quest.choose": "055bc9f6",
    "sparse.Quest.decode": "aa749ec4",
    "sparse.Quest.forced": "7b19eb02",
    "sparse.Quest.score": "9a125e09",
    "sparse.Quest.score_bounds": "89920b50",
    "sparse.Quest.slots_of": "4539841a",
    "sparse.SnapKV.best": "11b8c23e",
    "sparse.SnapKV.compress": "f7427126",
    "sparse.SnapKV.forced": "3ab7933f",
    "sparse.SnapKV.score": "1e6fbdfa",
    "sparse.attend": "13e66820",
    "sparse.attend_to_slots": "6fcc3925",
    "sparse.block_bounds": "bcdc7fd5",
    "sparse.chance": "868cd993",
    "sparse.per_kv_head": "af4f02da",
    "sparse.query_slots": "517da718",
    "sparse.to_blocks": "437e55df",
    "sparse.top": "c2a8e825",
    "sparse.up_to_queries": "57867a86",
}


def add_flag(parser):
    """--kernels, of every script."""
    parser.add_argument("--kernels", default="auto", choices=CHOICES, metavar="WHO",
                        help="who computes memory and methods: triton, torch, or auto (Triton on "
                        "a GPU)")


def use(which):
    """Choose for all that follows. ValueError if it cannot be had here."""
    global choice
    if which == "triton" and not HAS_TRITON:
        raise ValueError("--kernels=triton: Triton is not installed; pip install triton (Linux), "
                         "or --kernels=torch")
    choice = which


def wanted(x):
    """Whether Triton is to compute for tensors where x is."""
    return choice == "triton" or (choice == "auto" and x.is_cuda)


def triton_for(x):
    """
    Whether tensors like x (..., D) go to the kernels. ValueError if they should, and the kernels do
    not cover them.
    """
    if not wanted(x):
        return False
    if not HAS_TRITON:
        raise ValueError("on a GPU Triton computes, and it is not installed: pip install triton, "
                         "or --kernels=torch")
    if not (x.is_cuda or INTERPRETED):
        raise ValueError("--kernels=triton needs a GPU, or TRITON_INTERPRET=1 in the environment "
                         "to run very slowly without")
    if x.dtype not in (torch.bfloat16, torch.float32) or x.shape[-1] not in (16, 32, 64, 128):
        dtype = str(x.dtype).removeprefix("torch.")
        raise ValueError("the Triton kernels cover heads of 16, 32, 64 and 128 channels in "
                         f"bfloat16 and float32, not {x.shape[-1]} in {dtype}: --kernels=torch "
                         "computes these")
    return True


# ---------------------------------------------------------------- whose code it is

def hook(method, phase, x):
    """method.prefill, .compress or .decode (phase), as computed for tensors like x (..., D)."""
    method = part_of(method, phase)
    if wanted(x):
        return hooks_for(x).form_of(method, phase, x)
    if choice == "auto" and x.device.type == "cpu" and not torch.is_grad_enabled():
        from triton_ops import on_cpu
        return form_in(on_cpu.FORMS, method, phase)
    return getattr(method, phase)


def in_graph(method):
    """Whether a GPU may replay this method's decoding steps: selectors.in_graph."""
    return hooks_for(None).in_graph(part_of(method, "decode"))


def decodes(method):
    """Whether this method's decoding steps are ours, all that they call included."""
    return hooks_for(None).decodes(part_of(method, "decode"))


def part_of(method, phase):
    """
    The method that decides this phase, itself or in a sparse.Compose. A subclass of that decides
    itself.
    """
    from sparse import Compose, Dense
    if not isinstance(method, Dense):
        raise TypeError(f"a method is what sparse.parse makes of a text, not {method!r:.80}")
    while type(method) is Compose:
        method = getattr(method, f"{phase}_by")
    return method


def hooks_for(x):
    """triton_ops.selectors, which needs Triton."""
    if not HAS_TRITON:
        triton_for(x)  # says so
    from triton_ops import selectors
    return selectors


class Form(NamedTuple):
    """
    A hook computed otherwise, and the names in sparse.py that it stands for. A class's names mean
    what the method has under them, its own or inherited. Functions take (method, *the hook's
    arguments).
    """
    compute: Callable               # all of it
    names: str                      # what must be stock, or the hook runs as it is written
    choice: str = ""                # what must be stock too, or method.choose says what to read
    chosen: Callable | None = None  # and this reads it; None: then too the hook as it is written


# What Quest's decoding stands for, in Triton as on a CPU: without the choice, and that.
QUEST = ("Quest.decode Quest.slots_of attend_to_slots attend",
         "Quest.choose Quest.score Quest.score_bounds Quest.forced chance block_bounds per_kv_head "
         "to_blocks top")


def registered(forms, method, phase):
    """
    Of {(class of sparse.py, hook): Form} the one of the class that defines this hook of the method,
    None if there is none.
    """
    owner = next(kind for kind in type(method).__mro__ if phase in vars(kind))
    return forms.get((owner, phase))


def form_in(forms, method, phase):
    """The hook as these forms have it, bound to the method, or as it is written."""
    form, as_written = registered(forms, method, phase), getattr(method, phase)
    if form is None or not all_stock(method, form.names):
        return as_written
    if method.random is None and all_stock(method, form.choice):
        return MethodType(form.compute, method)
    return MethodType(form.chosen, method) if form.chosen else as_written


def all_stock(method, names):
    """Whether these names mean to the method what the forms stand for."""
    import sparse
    stock = (sparse.NEVER, sparse.ALWAYS) == (-math.inf, math.inf)
    for name in names.split():
        owner = method if "." in name else sparse
        stock &= is_stock(f"sparse.{name}", getattr(owner, name.rpartition(".")[2]))
    return stock


def is_stock(name, found):
    """
    Whether `found` is the code that the kernels know by this name, e.g. "sparse.Quest.score". If
    it is not, a run says so once.
    """
    function = getattr(found, "__func__", found)  # of a bound method
    if type(function) is FunctionType and function.__module__ == name.partition(".")[0]:
        if code_of(function.__code__) == CODE[name]:
            return True
    module = getattr(function, "__module__", "?")
    whose = getattr(function, "__qualname__", type(function).__name__)
    tell(f"note: {module}.{whose} is computed as it is written; the faster form is of an unchanged "
         f"{name}")
    return False


@functools.lru_cache(maxsize=None)
def code_of(code):
    """
    Eight hex digits of a function's code as it is written, comments, docstring and empty lines
    apart; None if nobody knows how it is written.
    """
    try:
        source = textwrap.dedent(inspect.getsource(code))
        tree = ast.parse(source).body[0]
        tokens = [*tokenize.generate_tokens(io.StringIO(source).readline)]
    except (OSError, SyntaxError, IndexError, tokenize.TokenError):
        return None  # typed in, or the file has changed meanwhile
    lines = source.splitlines()
    for token in tokens:
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    if isinstance(tree, ast.FunctionDef) and ast.get_docstring(tree) is not None:
        docstring = tree.body[0]
        lines[docstring.lineno - 1:docstring.end_lineno] = []
    text = "\n".join(line.rstrip() for line in lines if line.strip())
    return blake2b(text.encode(), digest_size=4).hexdigest()


@functools.lru_cache(maxsize=None)
def tell(line):
    """On stderr, once a process."""
    print(line, file=sys.stderr, flush=True)
