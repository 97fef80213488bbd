"""
What makes nanoRAT safe and large: skip this folder on a first reading.

Nothing here knows the idea. It reads and writes files that may be hostile, shares a model among
GPUs, keeps checkpoints, says what a run will cost, and draws what it did. It imports nothing of
the top level.
"""
