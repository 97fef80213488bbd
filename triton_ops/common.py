"""
What several kernels share; kernels.py explains how a kernel is written here.

    await_inputs, early    kernels of a step that are launched before the last one has ended
    gates             the memory's g and 1 - g, each to full precision
    ROOM, log_sum     a softmax whose sums cannot overflow
    by_token          a layout with a token's channels side by side
    check_heads, check_tensors    what the launchers of topk, quest and snapkv refuse

tests/test_numbers.py has what gates and ROOM are for: saturated gates, the largest numbers.
"""
import functools
import math

import torch
import triton
import triton.language as tl

# ---------------------------------------------------------------- a chain of short kernels

@triton.jit
def await_inputs(EARLY: tl.constexpr):
    """
    A kernel that was launched early goes on when all before it are through. It calls this before it
    reads what another has written, and before it writes anything. Weights it may read sooner, as
    the kernel just before it, of the same step, does not write them.
    """
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()  # now the next one may come, but none behind that


def early(x, short=True):
    """
    Constants of a kernel that calls await_inputs, for tensors where x is. A decoding step is a
    chain of kernels of a few microseconds each. From Hopper on each is launched while the one
    before it still runs (CUDA's programmatic dependent launch).

    short: whether its programs are few, and quickly done. A kernel that is not short is launched
    when the one before it has ended, as its programs would find the GPU unevenly filled.
    """
    if short and x.is_cuda and on_hopper(x.device):
        return dict(EARLY=True, launch_pdl=True)
    return dict(EARLY=False)


@functools.lru_cache(maxsize=None)
def on_hopper(device):
    """Whether this GPU is NVIDIA's, of Hopper's generation or a later one."""
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (9, 0)


# ---------------------------------------------------------------- arithmetic, and what is refused

LOG2E = tl.constexpr(math.log2(math.e))  # exp(x) = exp2(x * LOG2E), and exp2 is one instruction

# The attention kernels carry a softmax's running maximum as 20 more than it is (in base 2). So each
# exponential is at most 2**-20, and a sum of up to 2**20 values overflows no sooner than their mean
# does, whatever they are. Powers of two cost no bits.
ROOM, SHRUNK = tl.constexpr(20.0), tl.constexpr(2.0 ** -20)


@triton.jit
def log_sum(peak, total):
    """
    log2(total * exp2(peak)), for a peak with ROOM: what that added is taken away before it rounds
    anything off.
    """
    return peak - ROOM + tl.log2(total * (1 / SHRUNK))


@triton.jit
def gates(logit):
    """
    g = sigmoid(logit) and 1 - g = sigmoid(-logit).

    The smaller one has full relative precision, also where the other rounds to 1, and down to 0: a
    memory of a million tokens has a 1 - g of a millionth. Spelled for few instructions: a square of
    rsqrt is the hardware's shortest reciprocal.
    """
    # exp of the smaller logit, at most 1, so that nothing overflows
    odds = tl.exp2(tl.minimum(logit, -logit) * 1.4426950408889634)
    root = tl.rsqrt(1 + odds)
    small = odds * root * root
    rest = tl.where(logit > 0, small, 1 - small)
    return tl.where(logit > 0, 1 - small, small), rest


def by_token(x):
    """x (B, T, KV, D) with a token's channels side by side: itself if they are."""
    side_by_side = x.stride(3) == 1 and (x.stride(2) == x.shape[3] or x.shape[2] == 1)
    return x if side_by_side else x.contiguous()


def check_heads(H, KV, D):
    assert H % KV == 0, f"{H=} query heads cannot share {KV=} heads"
    assert 16 <= D <= 128 and D & (D - 1) == 0, f"{D=} must be a power of two from 16 to 128"


def check_tensors(*tensors):
    """Layouts and dtypes that every kernel relies on. Leading dims may have any stride."""
    for x in tensors:
        assert x.dtype in (torch.bfloat16, torch.float32), \
            f"{x.dtype} is neither bfloat16 nor float32"
        assert x.dtype == tensors[0].dtype, f"{x.dtype} beside {tensors[0].dtype}"
        assert x.stride(-1) == 1, \
            f"the last dim of a {tuple(x.shape)} tensor has stride {x.stride(-1)}, not 1"
