"""
rope.py: yarn as transformers computes it, what is no such RoPE, and a model that is stretched.
test_model.py has whole models of both types beside transformers'.
"""
import math
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from conftest import (FORMS, LLAMA_FORM, QWEN2_FORM, YARN, assert_close, draw_tokens, in_pieces,
                      refused, tiny)
from infra.rope import attention_factor, stretched
from model import Transformer
from on_disk import config, foreign, not_loaded

LENGTH = "original_max_position_embeddings"


def yarn(factor=4.0, length=32768, **more):
    return {"rope_type": "yarn", "factor": factor, LENGTH: length, **more}


# ---------------------------------------------------------------- the numbers

MANY = [  # of a head of D channels, at the base theta
    (128, 1e6, yarn()),                       # Qwen 2.5 and 3, as their cards have it
    (64, 1e4, yarn(2.0, 4096)),
    (64, 5e5, yarn(40.0, 4096, mscale=0.707, mscale_all_dim=0.5)),
    (64, 1e4, yarn(40.0, 4096, mscale=1.0, mscale_all_dim=1.0)),
    (64, 1e4, yarn(40.0, 4096, mscale=0.707)),            # one of the two alone
    (64, 1e4, yarn(8.0, 4096, attention_factor=1.5, mscale=0.7, mscale_all_dim=0.5)),
    (64, 1e4, yarn(8.0, 4096, truncate=False)),
    (26, 1e4, yarn(3.5, 2048, truncate=False)),           # 13 pairs
    (18, 1e4, yarn(3.5, 2048)),
    (2, 1e4, yarn(4.0, 2048)),                            # one pair
    (64, 1e4, yarn(4, 4096, beta_fast=16, beta_slow=2.5)),
    (64, 1e4, yarn(1.0, 4096)),
    (32, 100.0, yarn(4.0, 1000)),                         # the ramp ends behind the last pair
    (8, 20.0, yarn(4.0, 10**8, truncate=False)),          # and begins there
    (16, 1e4, yarn(4.0, 5)),                              # no pair turned once
    (32, 1e4, yarn(4.0, 200, beta_fast=1.001, truncate=False)),  # nearly a step
]


@pytest.mark.parametrize("D, theta, scaling", MANY, ids=lambda x: str(x)[:90])
def test_yarn_is_that_of_transformers(D, theta, scaling):
    """A ramp the wrong way round or of other ends, a factor forgotten, a field not looked at."""
    settings = LlamaConfig(head_dim=D, max_position_embeddings=131072,
                           rope_parameters=scaling | {"rope_theta": theta})
    theirs, factor = ROPE_INIT_FUNCTIONS["yarn"](settings)
    plain = theta ** -(torch.arange(0, D, 2).float() / D)
    torch.testing.assert_close(stretched(plain, theta, scaling), theirs, rtol=2e-6, atol=0)
    assert attention_factor(scaling) == pytest.approx(factor, rel=1e-12)

    # and the model's cos and sin, which have both
    model = tiny(n_layer=1, n_head=1, n_kv_head=1, width=D, rope_theta=theta, rope_scaling=scaling)
    position = torch.tensor([[0, 1, 7], [30, 31, 2]])
    angle = position[..., None, None] * theirs  # (2, 3, 1, D / 2)
    cos, sin = model.rope(position)
    assert cos.dtype == sin.dtype == torch.float32 and cos.is_contiguous() and sin.is_contiguous()
    assert_close(cos, factor * angle.cos())
    assert_close(sin, factor * angle.sin())


def test_yarn_by_hand():
    """A fault that transformers has too: the pair that turned so often is counted wrongly."""
    # At the base 16 pairs 0 to 3 of 8 channels turn 16, 8, 4 and 2 times in 32 pi tokens.
    plain = torch.tensor([1, 1 / 2, 1 / 4, 1 / 8])
    scaling = yarn(2.0, 32 * math.pi, beta_fast=16, beta_slow=1, truncate=False)
    share = torch.tensor([1, 3 / 4, 1 / 2, 1 / 4])  # of pair 4, which turned once, none
    torch.testing.assert_close(stretched(plain, 16.0, scaling), plain * (share + (1 - share) / 2))
    assert attention_factor(yarn(math.e)) == pytest.approx(1.1)
    assert attention_factor(None) == attention_factor(FORMS["llama"]["rope_scaling"]) == 1


# ---------------------------------------------------------------- files

@pytest.mark.parametrize("form", [LLAMA_FORM, QWEN2_FORM], ids=["llama", "qwen2"])
@pytest.mark.parametrize("scaling", [
    YARN, YARN | dict(attention_factor=1.3), yarn(40.0, 20, mscale=0.7, mscale_all_dim=0.2),
    yarn(3.0, 40, truncate=False)], ids=["betas", "attention_factor", "mscale", "truncate"])
@torch.no_grad()
def test_a_saved_yarn_is_read_again_by_us_and_by_transformers(form, scaling, tmp_path):
    """A field that is lost on the way: another model, of which no name tells."""
    model, tokens = tiny(**form, n_kv_head=2, rope_scaling=scaling), draw_tokens(2, 50)
    model.save_pretrained(tmp_path)
    again = Transformer.from_pretrained(tmp_path)
    assert again.config == model.config and again.config.rope_scaling == scaling
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    whole = model(tokens)
    assert_close(again(tokens), whole)
    assert_close(theirs(tokens).logits, whole, atol=1e-4)
    # as each decodes, with its own cache
    steps, _ = in_pieces(again, tokens, range(20, 50))
    assert_close(steps, whole)
    begun = theirs(tokens[:, :20], use_cache=True)
    further = theirs(tokens[:, 20:], past_key_values=begun.past_key_values)
    assert_close(steps[:, 20:], further.logits, atol=1e-4)
    # the factor and both betas matter in so short a text
    assert (tiny(**form, n_kv_head=2)(tokens) - whole).abs().max() > 0.1


def model_with(folder, **changes):
    """The folder of a Qwen 2 in whose config.json somebody wrote these fields."""
    foreign(folder, 1, **QWEN2_FORM)
    config(folder, **changes)
    return folder


@pytest.mark.parametrize("changes", [
    dict(rope_scaling={"type": "yarn", "factor": 4.0, LENGTH: 32}),
    dict(rope_scaling={"rope_type": "yarn", "type": "yarn", "factor": 4.0, LENGTH: 32}),
    dict(rope_scaling={"type": "yarn", "factor": 4.0, LENGTH: 32, "beta_fast": None,
                       "attention_factor": None, "mscale": None, "finetuned": True}),
    dict(rope_theta=None, rope_parameters={"rope_type": "yarn", "factor": 4.0, LENGTH: 32,
                                           "rope_theta": 10000.0}),
    dict(rope_scaling={"type": "yarn", "factor": 4.0, LENGTH: 32}, **{LENGTH: 32}),
], ids=["type", "both", "null", "5", "length twice"])
def test_yarn_is_known_as_others_spell_it(changes, tmp_path):
    """Qwen's cards say type, files of transformers 5 rope_parameters: refused, or read as none."""
    model = Transformer.from_pretrained(model_with(tmp_path, **changes))
    assert model.config.rope_scaling == yarn(4.0, 32)


# ---------------------------------------------------------------- what is refused

WRONG = {
    "factor below 1": (yarn(0.5), "factor=0.5 is below 1"),
    "factor infinite": (yarn(math.inf), "factor=inf is no number in (0, 1e9)"),
    "factor not a number": (yarn(math.nan), "factor=nan is no number"),
    "factor as text": (yarn("4"), "factor='4' is no number"),
    "factor true": (yarn(True), "factor=True is no number"),
    "no length": (yarn(4.0, 0), f"{LENGTH}=0 is no number in (0, 1e9)"),
    "attention_factor of 0": (yarn(attention_factor=0.0), "attention_factor=0.0 is no number"),
    "mscale as a list": (yarn(mscale=[1.0], mscale_all_dim=1.0), "mscale=[1.0] is no number"),
    "betas exchanged": (yarn(beta_fast=1, beta_slow=32), "beta_slow=32 is not below beta_fast=1"),
    "one beta at the other's default": (yarn(beta_slow=32), "=32 is not below beta_fast=32"),
    "truncate as a number": (yarn(truncate=1), "truncate=1 is no true or false"),
    "truncate null": (yarn(truncate=None), "truncate=None is no true or false"),
    "a field of llama3": (yarn(low_freq_factor=1.0), "has 'low_freq_factor', which is no field of"),
    "no factor": ({"rope_type": "yarn", LENGTH: 32}, "lacks factor of 'yarn'"),
    "no type": ({"factor": 4.0}, "rope_type=None is none of 'llama3' and 'yarn'"),
    "a type that is none": ({"rope_type": ["yarn"]}, "rope_type=['yarn'] is none of"),
    **{kind: ({"rope_type": kind, "factor": 4.0}, f"'{kind}' is none of 'llama3' and 'yarn'")
       for kind in ("dynamic", "linear", "longrope")},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_no_such_rope_is_refused(wrong):
    """A field that is silently another number, or a division by zero at the first token."""
    scaling, told = WRONG[wrong]
    refused(lambda: replace(tiny().config, rope_scaling=scaling), "rope_scaling", told)


@pytest.mark.parametrize("theta", [1.0, 0.5])
def test_yarn_needs_pairs_that_turn_slower(theta):
    """A division by ln 1, a ramp from the slow end."""
    refused(lambda: tiny(rope_theta=theta, rope_scaling=yarn()), "rope_theta above 1", theta)
    tiny(rope_theta=theta)


IN_FILES = {
    "dynamic": (dict(rope_scaling={"type": "dynamic", "factor": 4.0}), ["type='dynamic'"]),
    "longrope": (dict(rope_parameters={"rope_type": "longrope"}), ["rope_type='longrope'"]),
    "no length": (dict(rope_scaling={"type": "yarn", "factor": 4.0}), ["lacks", LENGTH, "'yarn'"]),
    "two lengths": (dict(rope_scaling=yarn(4.0, 32), **{LENGTH: 16}),
                    [f"{LENGTH}=16", "32", "which of them counts"]),
    "yarn's fields without it": (dict(rope_scaling={"beta_fast": 32.0}),
                                 ["beta_fast=32.0", "'default'", "which of them counts"]),
    "null for truncate": (dict(rope_scaling=yarn(truncate=None)), ["truncate=None is no true"]),
    "betas exchanged": (dict(rope_scaling=yarn(beta_fast=1, beta_slow=2)),
                        ["beta_slow=2 is not below beta_fast=1"]),
    "a length that is none": (dict(rope_scaling=yarn(4.0, True)),
                              [f"{LENGTH}=True is no number in (0, 1e9)"]),
}


@pytest.mark.parametrize("wrong", IN_FILES)
def test_a_file_whose_rope_is_not_known_is_refused(wrong, tmp_path):
    """Weights that load, and compute something else."""
    changes, words = IN_FILES[wrong]
    folder = model_with(tmp_path, **changes)
    known = ["'default' and 'llama3' and 'yarn'"] if wrong in ("dynamic", "longrope") else []
    not_loaded(folder, *words, *known)


# ---------------------------------------------------------------- a model stretched

@torch.no_grad()
def test_a_stretched_model_is_one_whose_config_says_so(tmp_path):
    """Attention that keeps its old angles; a length that is the new one's; a second stretch."""
    model, tokens = tiny(**QWEN2_FORM, context_len=40), draw_tokens(2, 60)
    before = model(tokens)
    for factor in 1, 0.5, -2, 0, math.inf, math.nan:
        refused(lambda: model.stretch(factor), "factor above 1", factor)
    assert model.config.rope_scaling is None and torch.equal(model(tokens), before)

    assert model.stretch(4) is model
    assert model.config.rope_scaling == yarn(4.0, 40) and model.config.context_len == 40
    assert type(model.config.rope_scaling["factor"]) is float
    assert all(layer.self_attn.config is model.config for layer in model.layers)
    assert (model(tokens) - before).abs().max() > 0.1
    made = Transformer(model.config)
    made.load_state_dict(model.state_dict())
    assert torch.equal(model(tokens), made(tokens))
    model.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_close(theirs(tokens).logits, model(tokens), atol=1e-4)

    for already in model, tiny(**FORMS["llama"]):
        refused(lambda: already.stretch(2.0), "stretched already", "rope_scaling={")


def test_a_stretch_and_a_memory_go_together():
    """One of the two that takes the other's config back."""
    model = tiny(context_len=40).add_memory().stretch(2)
    other = tiny(context_len=40).stretch(2).add_memory()
    assert model.config == other.config and model.config.memory == "decay"
    assert model.config.rope_scaling == yarn(2.0, 40)
