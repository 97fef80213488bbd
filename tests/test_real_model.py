"""
A real language model, SmolLM2-135M-Instruct with its matrices of 4 bits (real.py), through all that
else only tiny random models go through. transformers says what is right.

Three things are only seen here: activations of a trained model, some of which are large; a shape
that is nobody's power of two (9 query heads on 3 of 64 channels, 30 layers); and text.
"""
import json
from dataclasses import replace

import pytest
import tokenizers
import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

import niah
from conftest import DEVICE, assert_close, error, times
from infra.tokenizers import get_tokenizer
from model import Transformer
from sparse import Dense, MoBA, Quest, SnapKV, compose
from triton_ops import backend

ALL_PHASES = compose(MoBA(16, 8), SnapKV(16, 8), Quest(16, 8))
PROMPTS = ["The capital of France is", "def fibonacci(n):\n    if n",
           "<|im_start|>user\nName three colours.<|im_end|>\n<|im_start|>assistant\n"]


@pytest.fixture(scope="module")
def ours(smollm2):
    return Transformer.from_pretrained(smollm2, torch.float32).eval()


@pytest.fixture(scope="module")
def theirs(smollm2):
    return AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return get_tokenizer(smollm2)


@pytest.fixture(scope="module")
def rows(smollm2):
    """The prompts' ids (1, T), special tokens taken as such."""
    of_text = tokenizers.Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    return [torch.tensor([of_text.encode(text).ids]) for text in PROMPTS]


@torch.no_grad()
def greedy(theirs, prompt, n):
    """transformers' n likeliest tokens after a prompt (1, T), one after the other."""
    new = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=n,
                          do_sample=False, eos_token_id=-1, pad_token_id=0)
    return new[:, prompt.shape[1]:]


# ---------------------------------------------------------------- transformers says the same

@torch.no_grad()
def test_logits_are_those_of_transformers(ours, theirs, rows):
    """A norm, a rotation or a scale that is off by little, which random models do not show."""
    for prompt in rows:
        of_theirs = theirs(prompt).logits
        assert 20 < of_theirs.abs().max() < 60
        assert_close(ours(prompt), of_theirs, atol=1e-4, what="logits")


def test_greedy_text_is_that_of_transformers(ours, theirs, rows, tokenizer):
    """A step that finds its cache one token off, after which text is still text."""
    for prompt, n in zip(rows, (32, 6, 6)):
        new = ours.generate(prompt, n)
        assert torch.equal(new, greedy(theirs, prompt, n)), tokenizer.decode(new[0].tolist())
    first = ours.generate(rows[0], 2)[0].tolist()
    assert tokenizer.decode(first) == " Paris."


@torch.no_grad()
def test_plain_english_is_likely(ours, tokenizer):
    """
    Rows of q and k that stay as llama.cpp rotates them: transformers, with the same weights,
    agrees, the needle is lost, and Paris is still the capital.
    """
    ids = torch.tensor([tokenizer.encode(
        "The quick brown fox jumps over the lazy dog. Paris is the capital of France, and Berlin "
        "is the capital of Germany. Water boils at one hundred degrees Celsius at sea level.")])
    nats = F.cross_entropy(ours(ids)[0, :-1], ids[0, 1:]).item()
    assert nats < 3.2  # 2.86; 4.33 with such rows


def test_it_finds_a_needle_and_says_what_transformers_says(ours, theirs, tokenizer):
    """Positions, or a cache, that are right in short prompts alone."""
    example = niah.make_example("niah_single_1", 1024, tokenizer, seed=0, index=0)
    prompt = torch.tensor([example.ids])
    assert prompt.shape[1] > 800
    new = ours.generate(prompt, 12)
    text = tokenizer.decode(new[0].tolist())
    assert niah.score_ruler(text, example.answers) == 1, text
    with torch.no_grad():  # the likeliest after each of these tokens, in one go
        fed = torch.cat([prompt, new[:, :-1]], dim=1)
        assert torch.equal(theirs(fed).logits[:, -12:].argmax(-1), new), text


def test_saved_it_is_the_same_and_with_a_memory_another(smollm2, ours, theirs, tokenizer, tmp_path):
    """A name or a field that is lost on the way out, so that nobody else opens it."""
    half = Transformer.from_pretrained(smollm2)
    half.save_pretrained(tmp_path / "same", tokenizer)
    for file in smollm2.iterdir():
        assert file.read_bytes() == (tmp_path / "same" / file.name).read_bytes(), file.name
    told = json.loads((tmp_path / "same" / "config.json").read_text())
    assert told["model_type"] == theirs.config.model_type == "llama"
    assert told["eos_token_id"] == tokenizer.eos_id == 2

    half.add_memory().save_pretrained(tmp_path / "memory", tokenizer)
    told = json.loads((tmp_path / "memory" / "config.json").read_text())
    assert told["model_type"] == "nanorat"  # nobody drops its gates unknowingly
    again = Transformer.from_pretrained(tmp_path / "memory", torch.float32)
    assert again.config == replace(ours.config, memory="decay")
    assert torch.equal(again.layers[29].mlp.down_proj.weight, ours.layers[29].mlp.down_proj.weight)


# ---------------------------------------------------------------- methods, batches, kernels

def test_quest_with_a_full_budget_is_dense_and_a_row_is_what_it_is_alone(ours, rows):
    """Blocks that a method leaves out though it may read all; padding that a row reads."""
    lengths = torch.tensor([row.shape[1] for row in rows])
    tokens = pad_sequence([row[0] for row in rows], batch_first=True)
    alone = torch.cat([ours.generate(row, 10) for row in rows])
    for method in None, Quest(budget=64, block_size=8):
        assert torch.equal(ours.generate(tokens, 10, lengths, method), alone), method


@pytest.fixture(scope="module")
def two_layers(ours):
    """Its first two layers, and the first 300 tokens."""
    config = replace(ours.config, n_layer=2, vocab_size=300)
    model, whole = Transformer(config), ours.state_dict()
    model.load_state_dict({name: whole[name][:300] if "embed" in name else whole[name]
                           for name in model.state_dict()})
    return model.eval()


@torch.no_grad()
@pytest.mark.skipif(not backend.HAS_TRITON, reason="Triton's wheels are for Linux alone")
@pytest.mark.parametrize("memory", [False, True], ids=["attention", "memory"])
def test_kernels_compute_its_layers(memory, two_layers, both, monkeypatch):
    """A tile that takes G = 3 query heads a KV head, or 576 channels, for a power of two."""
    from triton_ops import block
    if DEVICE == "cpu":  # the interpreter takes its time by the tile
        monkeypatch.setattr(block, "FEW", block.FEW | dict(BLOCK_K=1024))
    model, method = two_layers, Dense()
    if memory:
        model, method = Transformer(two_layers.config).add_memory(g=0.8), ALL_PHASES
        model.load_state_dict(two_layers.state_dict(), strict=False)
    model = model.to(DEVICE)
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(300, (2, 20), generator=draw).to(DEVICE)
    lengths = torch.tensor([20, 13], device=DEVICE)

    def run():
        cache = model.new_cache(2, 24, 8)
        logits = [model.prefill(tokens, lengths, cache, method)]
        logits += [model.step(tokens[:, n], cache, method).clone() for n in range(times(1, 2))]
        return torch.stack(logits)
    plain, kernels = both(run)
    assert error(kernels, plain) < 1e-5


# ---------------------------------------------------------------- text

# Published ids of its tokenizer.
IDS = {"The capital of France is": [504, 3575, 282, 4649, 314],
       "Hello world! 123": [19556, 905, 17, 216, 33, 34, 35],
       "Café déjà vu.": [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30],
       "  multiple   spaces": [216, 2701, 256, 5600]}


def test_its_tokenizer_gives_the_ids_of_hugging_face(smollm2, tokenizer):
    """Digits that stay together, a space that is lost, special tokens read out of text."""
    oracle = tokenizers.Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    oracle.encode_special_tokens = True
    prose = niah.make_example("niah_multikey_1", 2048, tokenizer, 0, 0).prompt
    for text in [*IDS, *PROMPTS, prose, "3.14e-10, 2\u00bd \u0661\u0662; \r\n\r\n\t x  \n"]:
        ids = tokenizer.encode(text)
        assert ids == oracle.encode(text).ids == IDS.get(text, ids)
        assert tokenizer.decode(ids) == text
        assert b"".join(tokenizer.pieces(ids)) == text.encode()
    assert tokenizer.n_vocab == 49152 and tokenizer.decode([tokenizer.eos_id]) in ("", "<|im_end|>")
    auto = AutoTokenizer.from_pretrained(smollm2)
    assert auto("Hello world! 123").input_ids == IDS["Hello world! 123"]
    assert auto.convert_tokens_to_ids("<|im_end|>") == tokenizer.eos_id == 2
    # There these tokens are one each, as the model learned them.
    chat = auto.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n")
    assert auto(chat).input_ids[0] == 1
