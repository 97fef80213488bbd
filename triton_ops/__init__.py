"""
The methods and the model's blocks in Triton. kernels.py, at the top, teaches how such a kernel is
written and has a table of them all.
"""
