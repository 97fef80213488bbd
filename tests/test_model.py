"""model.py: causal, trained by its logits; families as transformers has them, RAT+ as released."""
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, strategies as st
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import (AutoModelForCausalLM, LlamaForCausalLM, Olmo2ForCausalLM,
                          Qwen2ForCausalLM, Qwen3ForCausalLM)

import model as model_file
from conftest import (FORMS, RATPLUS_FORM, STRETCH, YARN, assert_close, draw_tokens, error,
                      in_pieces, official_names, randomize, refused, save_pth, tiny)
from drawn import (ROOM, configs, decisive, dilateds, dtypes, exact, law, methods, mobas, seeds,
                   talks, told)
from infra import cost, loss
from model import PRESETS, Config, Transformer
from on_disk import assert_same
from sparse import Dense, Dilated, MoBA, Quest

forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())


# ---------------------------------------------------------------- laws

@law(50)
@given(configs(), methods, st.lists(st.integers(1, 40), min_size=1, max_size=3),
       st.integers(0, 40), st.integers(0, 40), dtypes, seeds)
def test_later_tokens_change_nothing_earlier(config, method, lengths, t, cut_at, dtype, seed):
    """A query that sees the future, in its row, another one's, in padding or in a shared chunk."""
    model, B, T = tiny(**config).to(dtype), len(lengths), max(lengths)
    tokens, other, lengths = *(draw_tokens(B, T, seed + n) for n in (0, 1)), torch.tensor(lengths)
    t, cut_at = t % T, cut_at % T
    kept = torch.arange(T) < lengths.clamp_max(t)[:, None]
    changed = tokens.where(kept, other)

    def by_chunks(tokens):
        cache, first = model.new_cache(B, T, 5), lengths.clamp_max(cut_at)
        parts = [(tokens[:, :cut_at], first), (tokens[:, cut_at:], lengths - first)]
        out = [model(part, n, cache, method) for part, n in parts if part.shape[1]]
        return torch.cat(out, dim=1)

    with torch.no_grad():
        for run in (lambda tokens: model(tokens, lengths, sparse=method)), by_chunks:
            assert torch.equal(run(tokens)[kept], run(changed)[kept])
        if t and dtype != torch.bfloat16:
            with decisive():
                whole, begun = (model(x, sparse=method) for x in (tokens, tokens[:, :t]))
            assert_close(begun, whole[:, :t])


@law(40)
@given(configs(), st.just(Dense()) | dilateds, talks(), exact, seeds)
def test_steps_and_chunks_are_the_whole(config, method, turns, dtype, seed):
    """A position, mask or memory that restarts at a chunk; a phase in which the method is off."""
    model, rows = tiny(**config).to(dtype), draw_tokens(len(turns[0]), ROOM, seed)
    logits, _ = told(model, rows, turns, method, padding=seed)
    with torch.no_grad():
        whole = model(rows, sparse=method)
    for b, row in enumerate(whole):
        fed = torch.tensor([1 if turn is None else turn[b] for turn in turns]).cumsum(0)
        assert_close(logits[:, b], row[fed - 1])


@law(30)
@given(configs(), methods, talks(), dtypes, st.sampled_from([-math.inf, -1e4]), seeds)
def test_a_memory_that_forgets_at_once_is_none(config, method, turns, dtype, bias, seed):
    """Something else that a memory changes: g = 0 makes Eq. 1 k~ = k, bit by bit."""
    model = tiny(**config | dict(memory=True)).to(dtype)
    without = Transformer(replace(model.config, memory=False)).to(dtype)
    state = model.state_dict()
    without.load_state_dict({path: state[path] for path in state if ".memory." not in path})
    for layer in model.layers:
        torch.nn.init.constant_(layer.self_attn.memory.proj.bias, bias)
    rows = draw_tokens(len(turns[0]), ROOM, seed)
    assert torch.equal(*(told(one, rows, turns, method)[0] for one in (model, without)))


@law(30)
@given(configs(), st.just(None) | mobas | dilateds, st.integers(1, 3), st.integers(1, 20),
       st.integers(1, 2000), seeds)
def test_a_model_learns_from_the_cross_entropy_of_its_logits(config, method, B, T, most, seed):
    """A gradient that is not autograd's of all logits at once; a tied head that gets half of it."""
    model, tokens = tiny(**config), draw_tokens(B, T + 1, seed)
    weight = torch.rand(B, T + 1, generator=torch.Generator().manual_seed(seed))
    weight = weight.masked_fill(weight < 0.3, 0)
    x = model.hidden(tokens[:, :-1], sparse=method)
    logits = F.linear(x, (model.lm_head or model.embed_tokens).weight).flatten(0, 1)
    of_each = F.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="none")
    expected = (of_each * weight[:, 1:].flatten()).sum()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "CHUNK_LOGITS", most)
        ours, (score, _) = (f(tokens, weight, method) for f in (model.loss, model.score))
    for value in ours, score.float():
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
    names, parameters = zip(*model.named_parameters())
    gradients = (torch.autograd.grad(value, parameters) for value in (ours, expected))
    for name, mine, ref in zip(names, *gradients):
        assert_close(mine, ref, atol=1e-4 * (1 + ref.abs().max().item()), what=name)


# ---------------------------------------------------------------- precision, gradients, compilation

@pytest.mark.parametrize("form", ["gqa memory", "ratplus"])
@torch.no_grad()
def test_bf16_steps_are_as_close_to_fp32_as_the_bf16_whole(form):
    """A memory state or a score rounded to bf16 at each step, which drifts: the original's does."""
    model, tokens = tiny(**FORMS[form]), draw_tokens(2, 60)
    for p in model.parameters():
        p.copy_(p.bfloat16())  # rounding the weights is not what is measured
    reference = model(tokens)
    model.to(torch.bfloat16)
    logits, cache = in_pieces(model, tokens, range(5, 60))
    assert logits.dtype == cache.k[0].dtype == torch.bfloat16
    assert cache.state.dtype == torch.float32
    assert error(logits, reference) <= 1.5 * error(model(tokens), reference) + 1e-3


def test_the_loss_under_autocast_is_fp32_with_gradients_of_the_weights_dtype():
    """Training in bf16 whose loss is rounded to it, or whose head's gradient is."""
    model, tokens, weight = tiny(memory=True), draw_tokens(2, 31), torch.ones(2, 31)
    values = []
    for enabled in False, True:
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            value = model.loss(tokens, weight)
        values.append([value, *torch.autograd.grad(value, list(model.parameters()))])
    for ref, mine in zip(*values):
        assert mine.dtype == torch.float32 and 0 < error(mine, ref) < 0.1


@pytest.mark.parametrize("form", ["olmo2 tied", "gqa memory", "ratplus"])
def test_gradients_reach_every_parameter(form):
    """A part of the model that is cut off in training, or a fresh gate that is too closed to be."""
    for method in None, Dilated(8, 0, 0), MoBA(12, 4):
        model = tiny(**FORMS[form])
        model = model if model.config.memory else model.add_memory()
        model(draw_tokens(2, 30), sparse=method).logsumexp(-1).sum().backward()
        for name, p in model.named_parameters():
            assert p.grad.norm() > 1e-5, name


def test_compiled_layers_share_their_graphs():
    """Something of its own in each layer's forward, an index say, would compile each anew."""
    model = Transformer(Config(97, n_layer=3, width=16, n_head=2, n_kv_head=1, mlp_width=32,
                               memory=True))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    tokens, arl = torch.randint(97, (2, 20)), Dilated(dilation=8, local=0, initial=0)
    eager = model(tokens), model(tokens, sparse=arl)
    for layer in model.layers:
        layer.compile(backend="eager")
    for out, ref in zip((model(tokens), model(tokens, sparse=arl)), eager):
        assert_close(out, ref)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]


@torch.no_grad()
def test_the_gate_reads_the_input_at_rms_1():
    """A gate that follows a residual as it grows with depth, or small embeddings."""
    for form in dict(memory=True), RATPLUS_FORM:
        model, seen = tiny(**form, n_layer=4), []
        model.embed_tokens.weight.mul_(10)
        for layer in model.layers:
            gate = layer.self_attn.memory.proj
            gate.register_forward_hook(lambda module, inputs, y: seen.append(inputs[0]))
            if model.config.pre_norm:
                layer.input_layernorm.weight.fill_(1)
        model(draw_tokens(2, 20))
        assert_close(torch.stack(seen).square().mean(-1), torch.ones(4, 2, 20), atol=1e-3)


# ---------------------------------------------------------------- sizes, and a memory added

def test_presets_have_the_parameters_their_comments_say():
    """A preset that is not the checkpoint it is named after."""
    comments = re.findall(r"# ([\d.]+)([MB])$", Path(model_file.__file__).read_text(), re.M)
    counts = {preset: cost.parameters(config)[0] for preset, config in PRESETS.items()}
    for (preset, count), (number, unit) in zip(counts.items(), comments, strict=True):
        size, digits = count / {"M": 1e6, "B": 1e9}[unit], len(number.partition(".")[2])
        assert f"{size:.{digits}f}" == number, f"{preset}: {count:,}"
    # the model cards'
    assert counts["olmo2-1b"] == 1_484_916_736 and counts["olmo2-7b"] == 7_298_617_344
    assert counts["smollm2-135m"] == 134_515_008 and counts["llama3.2-1b"] == 1_235_814_400
    assert counts["qwen3-0.6b"] == 596_049_920


@forms
def test_flops_per_token_agrees_with_a_count_of_the_products(form):
    """MFU with the embedding table, without the head, with attention unhalved; a bias forgotten."""
    model, T = tiny(**form | dict(width=96, mlp_width=96, vocab_size=300)), 64
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(draw_tokens(1, T))
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counts.items() if "attention" not in str(op))
    q_width = model.config.n_head * model.config.head_width
    attention = 4 * model.config.n_layer * T * T * q_width  # QK^T and PV, forward, all pairs
    expected = 3 * (products + attention / 2) / T      # the backward costs twice the forward
    assert math.isclose(cost.flops_per_token(model.config, T / 2), expected, rel_tol=0.02)
    assert cost.parameters(model.config)[0] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("form", ["olmo2", "gqa"])
@torch.no_grad()
def test_added_memory_starts_at_its_gate_and_leaves_the_rest(form, tmp_path):
    """Trained weights lost; a gate the wrong way round, so that training begins from noise."""
    model, tokens = tiny(**FORMS[form]), draw_tokens(2, 50)
    before = model(tokens)
    model.save_pretrained(tmp_path)
    loaded = Transformer.from_pretrained(tmp_path, memory=True)
    assert loaded.config == replace(model.config, memory=True)
    for wrong in 0, 1, math.nan:
        refused(lambda: model.add_memory(wrong), "gate=")
    assert not model.config.memory  # still as it was
    assert model.add_memory(0.1) is model and model.config.memory
    x = torch.randn(2, 50, model.config.width)
    for m, gate in (model, 0.1), (loaded, 0.5):
        for layer in m.layers:
            g = torch.sigmoid(layer.self_attn.memory.gate(x))
            assert_close(g, torch.full_like(g, gate))
        assert error(m(tokens), before) > 0.01
        for layer in m.layers:
            layer.self_attn.memory.proj.bias.fill_(-30)  # g = 0
        assert_close(m(tokens), before)


# ---------------------------------------------------------------- errors

@pytest.mark.parametrize("token", [61, 1000, -1])
def test_token_beyond_the_vocabulary_is_a_clear_error(token):
    """The wrong tokenizer, found as an index error or not at all."""
    refused(lambda: tiny()(torch.tensor([[1, token, 2]])), token, "61", "tokenizer")


@pytest.mark.parametrize("sizes", [dict(width=30), dict(n_kv_head=3), dict(n_layer=0),
                                   dict(width=36, n_head=12, n_kv_head=12)], ids=str)
def test_sizes_that_do_not_fit_are_a_clear_error(sizes):
    """A head width rounded down."""
    refused(lambda: replace(tiny().config, **sizes), "width", "n_head")


def test_a_deep_model_throws_dice_in_every_layer():
    """A hash that outgrows 64 bits would end models of more than a few layers."""
    model = Transformer(Config(97, n_layer=80, width=4, n_head=1, n_kv_head=1, mlp_width=4))
    method = Quest(budget=8, block_size=4, random=2**40)
    assert model.generate(torch.randint(97, (1, 20)), 2, sparse=method).shape == (1, 2)


# ---------------------------------------------------------------- families, as transformers has

SIZES = dict(vocab_size=61, hidden_size=48, intermediate_size=40, num_hidden_layers=3,
             num_attention_heads=6, num_key_value_heads=6, max_position_embeddings=64,
             rms_norm_eps=1e-5, pad_token_id=None, bos_token_id=None, eos_token_id=60)
ROPE = dict(rope_type="default", rope_theta=10000.0)
TIED, GQA, ONE_KV = (dict(tie_word_embeddings=True), dict(num_key_value_heads=2),
                     dict(num_key_value_heads=1))
STRETCHED, YARNED = (dict(rope_parameters=scaling | dict(rope_theta=10000.0))
                     for scaling in (STRETCH, YARN))
PLAIN_YARN = dict(rope_theta=1e6, rope_type="yarn", factor=2.0, original_max_position_embeddings=32)
THEIRS = {"olmo2": Olmo2ForCausalLM, "llama": LlamaForCausalLM, "qwen2": Qwen2ForCausalLM,
          "qwen3": Qwen3ForCausalLM}
CASES = [  # family, what is not SIZES, in files of which size
    ("olmo2", {}, None), ("olmo2", GQA, "20KB"), ("olmo2", TIED, "20KB"),
    ("olmo2", ONE_KV | dict(rope_parameters=dict(rope_type="default", rope_theta=5e5)), None),
    ("llama", {}, "20KB"), ("llama", GQA | TIED, None), ("llama", GQA | STRETCHED, None),
    ("llama", ONE_KV | dict(head_dim=16), None),
    ("llama", GQA | YARNED, None), ("olmo2", YARNED, None),
    ("qwen2", {}, None), ("qwen2", GQA | TIED, "20KB"),
    ("qwen2", GQA | dict(rope_parameters=PLAIN_YARN), None),
    ("qwen3", GQA | dict(head_dim=16) | YARNED, None),
    ("qwen3", dict(head_dim=8), None), ("qwen3", GQA | TIED | dict(head_dim=16), "20KB"),
]


def theirs_of(family, settings):
    kind = THEIRS[family]
    # biases too are drawn, which are 0 in a new model of theirs
    return randomize(kind(kind.config_class(**SIZES | dict(rope_parameters=ROPE) | settings)), 0)


@pytest.mark.parametrize("family, settings, shard", CASES, ids=lambda x: str(x)[:60])
@torch.no_grad()
def test_logits_are_those_of_transformers(family, settings, shard, tmp_path):
    """Converted wrongly although names and shapes match: RoPE pairs, norm place, head order."""
    theirs = theirs_of(family, settings)
    theirs.save_pretrained(tmp_path, **({"max_shard_size": shard} if shard else {}))
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == bool(shard)
    ours, tokens = Transformer.from_pretrained(tmp_path), draw_tokens(2, 50)
    assert 0.3 < theirs(tokens).logits.std() < 8  # else an absolute bound means nothing
    assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4)
    tied = bool(settings.get("tie_word_embeddings"))
    assert (ours.config.eos_id, ours.config.tied) == (60, tied)
    expected = theirs.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=10,
                               do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(ours.generate(tokens, 10), expected[:, 50:])


def of_version_4(config):
    """The fields of RoPE as transformers 4 wrote them: the base at the top, the stretch below."""
    rope = dict(config.pop("rope_parameters"))
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    config["torch_dtype"] = config.pop("dtype")


@pytest.mark.parametrize("family, settings, _", CASES, ids=lambda x: str(x)[:60])
def test_both_forms_of_a_config_are_one_model(family, settings, _, tmp_path):
    """A base or a stretch that one of transformers' versions writes where nobody looks."""
    theirs_of(family, settings).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config, as_5 = json.loads(file.read_text()), Transformer.from_pretrained(tmp_path)
    of_version_4(config)
    file.write_text(json.dumps(config))
    assert_same(Transformer.from_pretrained(tmp_path), as_5)
    given = settings.get("rope_parameters", ROPE)
    assert as_5.config.rope_theta == given["rope_theta"]
    scaling = {name: value for name, value in given.items() if name != "rope_theta"}
    assert as_5.config.rope_scaling == (None if scaling == {"rope_type": "default"} else scaling)


PURE = [form for form, settings in FORMS.items() if form != "ratplus" and "memory" not in form]


@pytest.mark.parametrize("form", PURE)
@torch.no_grad()
def test_a_saved_model_opens_in_transformers(form, tmp_path):
    """A checkpoint that only we can read, or that others read with some weights left random."""
    settings = FORMS[form] | dict(rope_theta=5000.0, norm_eps=1e-5, eos_id=7)
    ours, tokens = tiny(**settings), draw_tokens(2, 50)
    ours.save_pretrained(tmp_path)
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    family = form.split()[0].replace("gqa", "olmo2")
    assert isinstance(theirs, THEIRS[family]) and theirs.config.eos_token_id == 7
    assert not any(report.values()), report
    assert_close(theirs(tokens).logits, ours(tokens), atol=1e-4)


# ---------------------------------------------------------------- RAT+, as released

PREFIXES = {
    "as it is": lambda key: key,
    "compiled whole": lambda key: "_orig_mod." + key,
    "compiled layers": lambda key: re.sub(r"layers\.(\d+)\.", r"layers.\1._orig_mod.", key),
    "compiled twice": lambda key:
        "_orig_mod._orig_mod." + key.replace("seq_layer.", "seq_layer._orig_mod."),
}


def dilated_of(key):
    """.../D16_W20_P4 -> Dilated(16, 20, 4); .../dense -> None"""
    found = re.search(r"/D(\w+)_W(\d+)_P(\d+)$", key)
    return found and Dilated(*(None if n == "none" else int(n) for n in found.groups()))


@pytest.mark.parametrize("kind, compiled", [
    *((kind, "as it is") for kind in ("packed", "separate", "attention")),
    ("packed", "compiled whole"), ("separate", "compiled layers"), ("attention", "compiled twice"),
])
@torch.no_grad()
def test_official_ratplus_logits(ratplus, kind, compiled, tmp_path, monkeypatch):
    """A projection split in the wrong order, the gate inverted, memory after RoPE, another GELU."""
    state = official_names(ratplus)
    for key in [key for key in state if "in_proj" in key and kind != "packed"]:
        state[key], gate = (part.clone() for part in state[key].split([256, 64]))
        if kind == "separate":
            state[key.replace("in_proj", "fgate_proj")] = gate
    state = {PREFIXES[compiled](key): tensor for key, tensor in state.items()}
    file = save_pth(tmp_path / "last.pth", state, monkeypatch, n_head=4)
    model, tokens = Transformer.from_pretrained(file), ratplus["tokens"]
    assert bool(model.config.memory) == (kind != "attention") and model.config.n_head == 4
    prefix, expected = ("attention/", (3, 1)) if kind == "attention" else ("", (7, 4))
    whole, steps = ([key for key in ratplus if key.startswith(prefix + what)]
                    for what in ("logits/", "decode/"))
    assert (len(whole), len(steps)) == expected
    for key in whole:
        assert_close(model(tokens, sparse=dilated_of(key)), ratplus[key], atol=1e-4, what=key)
    for key in steps if compiled == "as it is" else ():
        logits, _ = in_pieces(model, tokens, range(40, 75), dilated_of(key))
        assert_close(logits[:, 40:], ratplus[key], atol=1e-4, what=key)


def test_ratplus_file_of_weights_alone_has_heads_of_128(ratplus, tmp_path, monkeypatch):
    """Released files without a config, read with another number of heads: other logits."""
    wide = lambda x: x.repeat(*(4 if n % 64 == 0 else 1 for n in x.shape))  # 256 for 64
    state = {name: wide(tensor) for name, tensor in official_names(ratplus).items()}
    loaded = Transformer.from_pretrained(save_pth(tmp_path / "weights.pth", state, monkeypatch))
    sizes = dict(vocab_size=97, n_layer=2, width=256, n_head=2, n_kv_head=2, mlp_width=1024)
    assert loaded.config == replace(PRESETS["ratplus-1b"], **sizes)
