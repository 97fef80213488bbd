"""
RoPE for contexts longer than a model was first trained for: as Llama 3 does it, and YaRN
(arXiv 2309.00071).

Channel pair i of a head of D channels turns by frequency = theta^(-2i / D) radians a token. In the
old context of L tokens it turned n = L * frequency / 2 pi times. A pair that turned often tells
near tokens apart and stays as it is; one that hardly turned would meet angles that it has never
seen, so it is slowed down by `factor`; in between the two are mixed:

    frequency' = s * frequency + (1 - s) * frequency / factor            s between 0 and 1

    llama3   s = (n - low) / (high - low)                       linear in how often the pair turned
    yarn     s = (i(slow) - i) / (i(slow) - i(fast))            linear in which pair it is
             i(n) = D ln(L / (2 pi n)) / (2 ln theta)           the pair that turned n times
             cos and sin are multiplied by 0.1 ln(factor) + 1   the attention factor

A score q k has yarn's attention factor twice, which makes the softmax over more tokens sharper.

Held to transformers' frequencies and logits in tests/test_rope.py and tests/test_model.py.
model.Transformer.rope calls it.
"""
import math

import torch

from infra.files import short

# The fields of config.json's object beside rope_type, with Hugging Face's names: those that a type
# needs, and those that it may have.
NEEDED = {
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings")}
OPTIONAL = {
    "llama3": (),
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")}
FIELDS = tuple({field: None for kind in NEEDED for field in (*NEEDED[kind], *OPTIONAL[kind])})


def stretched(
    frequency,  # (D / 2)  radians a token
    theta,      # Config.rope_theta, of which they are powers
    scaling,    # Config.rope_scaling: {"rope_type": "llama3" or "yarn", and its fields}
):              # -> (D / 2)
    share_of = {"llama3": llama3_share, "yarn": yarn_share}[scaling["rope_type"]]
    share = share_of(frequency, theta, scaling)
    return share * frequency + (1 - share) * frequency / scaling["factor"]


def llama3_share(frequency, theta, scaling):
    """s of each pair, (D / 2)"""
    _, low, high, length = (scaling[field] for field in NEEDED["llama3"])
    turns = length * frequency / (2 * math.pi)
    return ((turns - low) / (high - low)).clamp(0, 1)


def yarn_share(frequency, theta, scaling):
    """s of each pair, (D / 2)"""
    D, length = 2 * len(frequency), scaling["original_max_position_embeddings"]
    first, last = (D * math.log(length / (2 * math.pi * turns)) / (2 * math.log(theta))
                   for turns in betas(scaling))
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    # The last pair is D / 2 - 1. The authors' code bounds the ramp at D - 1 all the same, and so do
    # transformers and we: it tells where even the slowest pair turned more than beta_slow times.
    first, last = max(first, 0), min(last, D - 1)
    if first == last:
        last += 0.001  # a step, as there
    pair = torch.arange(D // 2, device=frequency.device, dtype=frequency.dtype)
    return 1 - ((pair - first) / (last - first)).clamp(0, 1)


def betas(scaling):
    """Of yarn: a pair that turned so often stays as it is; so often, it is slowed down by all."""
    return scaling.get("beta_fast", 32), scaling.get("beta_slow", 1)


def attention_factor(scaling):
    """What cos and sin are multiplied by; 1 without yarn."""
    if not scaling or scaling["rope_type"] != "yarn":
        return 1.0
    if "attention_factor" in scaling:
        return scaling["attention_factor"]
    grown = lambda scale: 0.1 * scale * math.log(scaling["factor"]) + 1
    if "mscale" in scaling and "mscale_all_dim" in scaling:  # one of them alone says nothing
        return grown(scaling["mscale"]) / grown(scaling["mscale_all_dim"])
    return grown(1)


def yarn_for(config, factor):
    """Config.rope_scaling for a context `factor` times as long. ValueError if it has one."""
    if config.rope_scaling:
        raise ValueError("this model's RoPE is stretched already, by "
                         f"rope_scaling={short(config.rope_scaling)}")
    if not 1 < factor < math.inf:
        raise ValueError(f"yarn stretches by a finite factor above 1, not by {factor}")
    return {"rope_type": "yarn", "factor": float(factor),
            "original_max_position_embeddings": config.context_len}


def stretched_to(config):
    """How many tokens the RoPE of a Config is made for."""
    scaling = config.rope_scaling
    if not scaling:
        return config.context_len
    return int(scaling["factor"] * scaling["original_max_position_embeddings"])


def check(scaling, theta):
    """ValueError unless this is None or such an object: it may come from a file."""
    if scaling is None:
        return
    kind, given = scaling.get("rope_type"), set(scaling) - {"rope_type"}
    if kind not in tuple(NEEDED):
        known = " and ".join(map(repr, NEEDED))
        raise ValueError(f"rope_scaling.rope_type={short(kind)} is none of {known}")
    missing = [field for field in NEEDED[kind] if field not in given]
    foreign = sorted(given - {*NEEDED[kind], *OPTIONAL[kind]})
    if missing:
        raise ValueError(f"rope_scaling lacks {missing[0]} of {kind!r}")
    if foreign:
        raise ValueError(f"rope_scaling has {short(foreign[0])}, which is no field of {kind!r}")
    for field in sorted(given - {"truncate"}):
        value = scaling[field]
        if type(value) not in (int, float) or not 0 < value < 1e9:
            raise ValueError(f"rope_scaling.{field}={short(value)} is no number in (0, 1e9)")
    if scaling["factor"] < 1:
        raise ValueError(f"rope_scaling.factor={scaling['factor']} is below 1")
    if type(scaling.get("truncate", True)) is not bool:
        raise ValueError(f"rope_scaling.truncate={short(scaling['truncate'])} is no true or false")
    if kind == "llama3":
        ends = "low_freq_factor", "high_freq_factor"
        low, high = (scaling[field] for field in ends)
    else:
        ends = "beta_slow", "beta_fast"
        high, low = betas(scaling)
    if not low < high:
        raise ValueError(f"rope_scaling.{ends[0]}={low} is not below {ends[1]}={high}")
    if kind == "yarn" and not theta > 1:  # else no pair turns slower than another
        raise ValueError(f"rope_scaling of 'yarn' needs a rope_theta above 1, not {theta}")
