"""
Who computes: plain PyTorch (memory.py, sparse.py), or the same in Triton (kernels.py and its sisters).

    auto     Triton for tensors on a GPU, PyTorch elsewhere. What the kernels do not cover on a GPU is an error that says
             so, never a silent change to something slower
    triton   the kernels or an error; on a CPU they need Triton's interpreter (TRITON_INTERPRET=1), which the tests use
    torch    plain PyTorch everywhere

The scripts' flag --kernels sets it. Results agree to rounding: tests/test_backend.py runs whole models both ways.
"""
import importlib.util
import os

import torch

CHOICES = "auto", "triton", "torch"
choice = "auto"

HAS_TRITON = importlib.util.find_spec("triton") is not None  # Linux has wheels
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def add_flag(parser):
    """--kernels, of every script."""
    parser.add_argument("--kernels", default="auto", choices=CHOICES, metavar="WHO",
                        help="who computes memory and methods: triton, torch, or auto (Triton on a GPU)")


def use(which):
    """Choose for all that follows. ValueError if it cannot be had here."""
    global choice
    if which == "triton" and not HAS_TRITON:
        raise ValueError("--kernels=triton: Triton is not installed; pip install triton (Linux), or --kernels=torch")
    choice = which


def triton_for(x):
    """Whether tensors like x (..., D) go to the kernels. ValueError if they should, and the kernels do not cover them."""
    if choice == "torch" or (choice == "auto" and not x.is_cuda):
        return False
    if not HAS_TRITON:
        raise ValueError("on a GPU Triton computes, and it is not installed: pip install triton, or --kernels=torch")
    if not (x.is_cuda or INTERPRETED):
        raise ValueError("--kernels=triton needs a GPU, or TRITON_INTERPRET=1 in the environment to run very slowly without")
    if x.dtype not in (torch.bfloat16, torch.float32) or x.shape[-1] not in (16, 32, 64, 128):
        raise ValueError(f"the Triton kernels cover heads of 16, 32, 64 and 128 channels in bfloat16 and float32, not "
                         f"{x.shape[-1]} in {str(x.dtype).removeprefix('torch.')}: --kernels=torch computes these")
    return True
