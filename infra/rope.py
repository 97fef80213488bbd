"""
RoPE for contexts longer than a model was first trained for, as Llama 3 does it.

Channel pair d turns by `frequency` radians a token. In the old context of L tokens it turned n =
L * frequency / 2 pi times. A pair that turned often tells near tokens apart and stays as it is; one
that hardly turned would meet angles that it has never seen, so it is slowed down by `factor`; in
between the two are mixed:

    s = (n - low) / (high - low), between 0 and 1
    frequency' = s * frequency + (1 - s) * frequency / factor

Held to transformers' Llama in tests/test_model.py. model.Transformer.rope calls it.
"""
import math

from infra.files import short

# The fields of config.json's object, with Hugging Face's names.
FIELDS = "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"


def stretched(
    frequency,  # (D / 2)  radians a token
    scaling,    # Config.rope_scaling: {"rope_type": "llama3", factor, low, high, L}
):              # -> (D / 2)
    factor, low, high, length = (scaling[field] for field in FIELDS)
    turns = length * frequency / (2 * math.pi)
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return share * frequency + (1 - share) * frequency / factor


def check(scaling):
    """ValueError unless this is None or such an object: it may come from a file."""
    if scaling is None:
        return
    known = {"rope_type", *FIELDS}
    if set(scaling) != known or scaling["rope_type"] != "llama3":
        raise ValueError(f"rope_scaling={short(scaling)} is none of type 'llama3' with the fields "
                         f"{', '.join(FIELDS)}")
    numbers = [scaling[field] for field in FIELDS]
    plain = all(type(number) in (int, float) and 0 < number < 1e9 for number in numbers)
    ordered = plain and scaling["low_freq_factor"] < scaling["high_freq_factor"]
    if not ordered or scaling["factor"] < 1:
        raise ValueError(f"rope_scaling={short(scaling)}: numbers above 0, a factor of 1 or more, "
                         "and low_freq_factor below high_freq_factor")
