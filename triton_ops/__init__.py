"""
The methods and the model's blocks in Triton. kernels.py, at the top, teaches how such a kernel is
written and has a table of them all. `triton_ops.use` chooses who computes, as --kernels does.
"""
from triton_ops.backend import use  # noqa: F401
