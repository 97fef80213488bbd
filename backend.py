"""
Who computes: plain PyTorch (memory.py, sparse.py), or the same in Triton (kernels.py and its sisters).

    auto     Triton for tensors on a GPU, PyTorch elsewhere. What the kernels do not cover there is an error, never a
             silent change to something slower
    triton   the kernels, or an error; on a CPU they need Triton's interpreter, TRITON_INTERPRET=1, for tests
    torch    plain PyTorch, everywhere

The scripts' flag --kernels sets it. Everything else reads the same either way: tests/test_backend.py runs whole models
both ways.
"""
import importlib.util

import torch

CHOICES = "auto", "triton", "torch"
choice = "auto"
DTYPES = torch.bfloat16, torch.float32


def use(which):
    """Set the choice for all that follows. ValueError if it cannot be had here."""
    global choice
    if which == "triton" and importlib.util.find_spec("triton") is None:
        raise ValueError("--kernels=triton: Triton is not installed (pip install triton; Linux only)")
    choice = which


def triton_for(x):
    """Whether tensors like x (..., D) go to Triton. ValueError if they should and the kernels do not cover them."""
    if choice == "torch" or (choice == "auto" and not x.is_cuda):
        return False
    D = x.shape[-1]
    if importlib.util.find_spec("triton") is None:
        raise ValueError("Triton is not installed, which computes on a GPU: pip install triton, or choose --kernels=torch")
    if x.dtype not in DTYPES or D not in (16, 32, 64, 128):
        raise ValueError(f"the Triton kernels cover head widths 16, 32, 64 and 128 in bfloat16 or float32, not {D} in "
                         f"{str(x.dtype).removeprefix('torch.')}: choose --kernels=torch")
    return True
