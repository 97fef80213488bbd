"""
Questions asked of the models that train.py makes, one file each: `python -m experiments.reproduce`.
"""
