"""
A memory of one's own: a class with parameters and a decoding state, named in the config and saved
with it. What holds for the paper's holds for each of memory.MEMORIES and experiments/memories.py.
"""
from pathlib import Path

import pytest
import torch
import train
from conftest import DEVICE, FORMS, assert_close, draw_tokens, error, refused, tiny
from drawn import ROOM, told

import sparse
from experiments import memories
from infra import cli
from memory import MEMORIES, memory_loop
from model import Config, Transformer
from on_disk import not_loaded
from triton_ops import backend

kinds = pytest.mark.parametrize("kind", MEMORIES)


def one_layer(kind):
    """-> a memory, x (B, T, C), k, v (B, T, KV, D)"""
    model, source = tiny(memory=kind), torch.Generator().manual_seed(1)
    x = torch.randn(2, 20, 32, generator=source)
    k, v = torch.randn(2, 2, 20, 4, 8, generator=source)
    return model.layers[0].self_attn.memory, x, k, v


# ---------------------------------------------------------------- each is what its name says

def test_keys_and_values_are_the_memory_s_halves():
    """k and v confused, or both changed: two lines of a table would be exchanged, or equal."""
    decay, x, k, v = one_layer("decay")
    k_mem, v_mem, _ = memory_loop(k, v, decay.gate(x))
    for kind, expected in ("decay", (k_mem, v_mem)), ("keys", (k_mem, v)), ("values", (k, v_mem)):
        memory, *inputs = one_layer(kind)
        for out, ref in zip(memory(*inputs), expected):
            assert_close(out, ref, what=kind)


def test_head_gate_is_the_mean_of_a_head_s_channels():
    """A mean over another dimension: over heads, or over tokens, which would see the future."""
    memory, x, k, v = one_layer("head-gate")
    gate, own = memory.gate(x), one_layer("decay")[0].gate(x)
    assert torch.equal(gate, gate[..., :1].expand_as(gate))
    assert_close(gate[..., 0], own.mean(-1))
    for out, ref in zip(memory(x, k, v), memory_loop(k, v, gate)):
        assert_close(out, ref)


def test_fixed_decay_has_its_lengths_whatever_it_reads():
    """Lengths that are not 1 to 64; -inf where L = 1; a gate that depends on x."""
    memory, x, k, v = one_layer("fixed-decay")
    gate = memory.gate(x)
    assert torch.equal(gate, memory.gate(x + 1)) and gate.isfinite().all()
    lengths = 1 / torch.sigmoid(-gate.double())  # 1 / (1 - g)
    assert_close(lengths, torch.tensor([1., 4, 16, 64]).double()[:, None].expand(k.shape), 1e-3)
    k_mem, _, _ = memory(x, k, v)
    assert_close(k_mem, memory_loop(k, v, gate)[0])
    assert torch.equal(k_mem[:, :, 0], k[:, :, 0])


def test_convolution_is_torch_s():
    """A filter that runs backwards, sees the future, or reads another channel."""
    memory, x, k, v = one_layer("convolution")
    for out, x, filters in zip(memory(x, k, v), (k, v), memory.filters):
        padded = torch.nn.functional.pad(x.flatten(2).transpose(1, 2), (memories.W - 1, 0))
        weight = filters.flatten(1).T.flip(1).unsqueeze(1)  # (KV * D, 1, W), oldest first
        ref = torch.nn.functional.conv1d(padded, weight, groups=32).transpose(1, 2)
        assert_close(out, x + ref.reshape(x.shape))


# ---------------------------------------------------------------- what holds for all

@torch.no_grad()
def assert_goes_on(kind, form):
    """Ragged chunks and steps give what a row alone gives, all at once."""
    model, tokens = tiny(**FORMS[form] | dict(memory=kind)), draw_tokens(3, ROOM)
    turns = [[9, 1, 4], [3, 8, 0], None, None, None]
    logits, _ = told(model, tokens, turns)  # (turns, B, V)
    for b, alone in enumerate(model(tokens)):
        fed = torch.tensor([1 if turn is None else turn[b] for turn in turns]).cumsum(0)
        assert_close(logits[:, b], alone[fed - 1], what=f"row {b}")


@kinds
@pytest.mark.parametrize("form", ["olmo2", "gqa", "ratplus"])
def test_a_memory_goes_on_where_it_stopped(kind, form):
    """A state that is lost, another row's, or of padding; a change that training alone sees."""
    assert_goes_on(kind, form)


def test_the_memory_of_readme_is_one(monkeypatch):
    """An example that has gone stale."""
    text = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    section = text.partition("## A memory of your own")[2]
    code = section.partition("```python\n")[2].partition("```")[0]
    monkeypatch.setitem(MEMORIES, "shift", None)  # so that it is taken out again
    exec(code, {"torch": torch, "nn": torch.nn, "MEMORIES": MEMORIES})
    assert_goes_on("shift", "gqa")
    model, tokens = tiny(memory="shift"), draw_tokens(1, 9)
    assert error(model(tokens), tiny()(tokens)) > 0.01
    tiny().add_memory(kind="shift")


@kinds
def test_a_model_is_saved_with_its_memory_and_may_be_given_one(kind, tmp_path):
    """A class that is never called, a name that is lost, a convolution that starts far from k."""
    plain, model, tokens = tiny(), tiny(memory=kind), draw_tokens(2, 20)
    model.load_state_dict(plain.state_dict(), strict=False)
    assert error(model(tokens), plain(tokens)) > 0.01
    model.save_pretrained(tmp_path / "model")
    plain.save_pretrained(tmp_path / "plain")
    loaded = Transformer.from_pretrained(tmp_path / "model")
    given = Transformer.from_pretrained(tmp_path / "plain", memory=kind)
    assert loaded.config.memory == given.config.memory == kind
    assert torch.equal(loaded(tokens), model(tokens))
    assert torch.equal(given(tokens), plain(tokens)) == (kind == "convolution")
    refused(lambda: given.add_memory(kind=kind), "a memory already")


@pytest.mark.parametrize("words", [[], ["nowhere.py", "--steps=1"]])
def test_what_is_no_script_is_one_line(words, monkeypatch, capsys):
    """A traceback for a name that is missing or mistyped."""
    monkeypatch.setattr("sys.argv", ["memories.py", *words])
    with pytest.raises(SystemExit) as end:
        memories.main()
    told = capsys.readouterr().err
    assert end.value.code == 2 and told.count("\n") == 1 and "train.py" in told


def test_a_record_says_who_called_the_script(monkeypatch):
    """A command in a report that ends at a memory it does not know."""
    monkeypatch.setattr(train, "main", lambda: None)
    monkeypatch.setattr(cli, "STARTER", ["python"])
    monkeypatch.setattr("sys.argv", ["memories.py", "train.py", "--memory=keys"])
    memories.main()
    assert cli.command_line(None, "train.py") == (
        "python -m experiments.memories train.py --memory=keys")


def test_a_users_files_are_known_to_a_script(tmp_path, monkeypatch, capsys):
    """A selector that look.py does not know; a file that is taken for the script."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "STARTER", ["python"])
    monkeypatch.setattr(sparse, "METHODS", {**sparse.METHODS})
    Path("mine.py").write_text("import sparse\nsparse.METHODS['mine'] = sparse.Quest\n")
    monkeypatch.setattr(train, "main", lambda: print(sparse.parse("mine", 4096)))
    monkeypatch.setattr("sys.argv", ["memories.py", "mine.py", "train.py", "--steps=1"])
    memories.main()
    assert "Quest" in capsys.readouterr().out
    assert cli.command_line(None, "train.py") == (
        "python -m experiments.memories mine.py train.py --steps=1")
    monkeypatch.setattr("sys.argv", ["memories.py", "none.py", "train.py"])
    with pytest.raises(SystemExit):
        memories.main()
    assert capsys.readouterr().err == "memories.py: there is no file none.py\n"


def test_a_memory_that_nobody_knows_is_refused(tmp_path, monkeypatch):
    """A KeyError, or a model that loads without its memory."""
    tiny(memory="convolution").save_pretrained(tmp_path)
    monkeypatch.delitem(MEMORIES, "convolution")
    not_loaded(tmp_path, "convolution", "memory.MEMORIES")
    for old, now in (True, "decay"), (False, None):  # files from when there was but one
        assert Config(memory=old).memory == now


@pytest.mark.skipif(not backend.HAS_TRITON, reason="no Triton here")
@kinds
def test_a_memory_decodes_and_trains_alike_with_either_backend(kind, both, capsys):
    """The paper's recurrence whatever the memory is; an unused k~ that confuses a gradient."""
    tokens = draw_tokens(1, 20).to(DEVICE)
    backend.tell.cache_clear()

    def run():
        model = tiny(memory=kind, n_layer=1, width=64, n_kv_head=2).to(DEVICE)
        cache = model.new_cache(1, 9)
        logits = [model.prefill(tokens[:, :6], None, cache)]
        logits += [model.step(token, cache).clone() for token in tokens[0, 6:9, None]]
        model(tokens).square().mean().backward()
        return [torch.cat(logits), *(p.grad for p in model.parameters())]
    for plain, ours in zip(*both(run)):
        assert_close(ours, plain, atol=1e-4, what="logits or gradients")
    told = capsys.readouterr().err
    assert (told == "") == (kind == "decay") and told.count("\n") == told.count("as it is written")
