"""backend.py: whole models give the same whether plain PyTorch or the Triton kernels compute; and who computes when."""
import pytest
import torch
from conftest import DEVICE, assert_close, draw_tokens, error, one_line, tiny

from triton_ops import backend
import train
from memory import arl_passes
from sparse import parse

METHODS = ["dense", "quest:budget=16,block_size=8", "quest:budget=16,block_size=8,random=3", "moba:budget=24,block_size=8",
           "moba:budget=24,block_size=8,random=1", "snapkv:budget=20,window=6", "snapkv:budget=20,window=6,random=2",
           "dilated:dilation=8,local=5,initial=2", "dilated:dilation=8,local=0,initial=0",
           "moba:budget=24,block_size=8+snapkv:budget=20,window=6+quest:budget=16,block_size=8"]
HEADS_OF_16 = dict(width=64, n_head=4)


def decode_all(model, method, steps=4):
    """Logits of a ragged prompt fed in two chunks, then of steps of the same tokens; and what was selected at the end."""
    tokens, lengths = draw_tokens(2, 45, seed=1).to(DEVICE), torch.tensor([45, 31], device=DEVICE)
    cache, logits = model.new_cache(2, 60), []
    with torch.no_grad():
        model(tokens[:, :20], cache=cache, sparse=method)
        logits.append(model.prefill(tokens[:, 20:], lengths - 20, cache, method))
        for token in draw_tokens(2, steps, seed=2).to(DEVICE).split(1, dim=1):
            logits.append(model(token, cache=cache, sparse=method)[:, -1])
    return torch.stack(logits), cache.selected


@pytest.mark.parametrize("text", METHODS)
def test_model_decodes_alike_with_either_backend(text, both):
    """A hook that hands a kernel the wrong slots, lengths or bounds; a cache that a fused step leaves behind."""
    model = tiny(n_kv_head=2, memory=True, **HEADS_OF_16).to(DEVICE)
    (plain, read), (ours, read_too) = both(lambda: decode_all(model, parse(text, 64)))
    assert_close(ours, plain, atol=1e-4, what="logits")
    for a, b in zip(read, read_too):
        assert (a is None) == (b is None)
        if a is not None:  # the kernels' lists are as long as the cache; what they name must be the same
            assert [sorted(set(x) - {-1}) for x in a.flatten(0, 1).tolist()] == [sorted(set(x) - {-1}) for x in b.flatten(0, 1).tolist()]


@pytest.mark.parametrize("form", ["olmo2", "ratplus"])
def test_other_forms_decode_alike_with_either_backend(form, both):
    """A fused step that expects QK-norm, or a memory."""
    settings = dict(tied=True, pre_norm=True, qk_norm=False, swiglu=False, output_gate=True, memory=True) if form == "ratplus" else {}
    model = tiny(**HEADS_OF_16, **settings).to(DEVICE)
    (plain, _), (ours, _) = both(lambda: decode_all(model, parse("quest:budget=16,block_size=8", 64)))
    assert_close(ours, plain, atol=1e-4)


def test_decoding_from_an_empty_cache(both):
    """A memory without a state to start from."""
    model, token = tiny(memory=True, **HEADS_OF_16).to(DEVICE), draw_tokens(2, 1).to(DEVICE)
    plain, ours = both(lambda: model(token, cache=model.new_cache(2, 4)).detach())
    assert_close(ours, plain, atol=1e-4)


def test_a_fork_has_bounds_of_its_own(both):
    """Two settings from one prefill that update the same block bounds."""
    model, method = tiny(memory=True, **HEADS_OF_16).to(DEVICE), parse("quest:budget=16,block_size=8", 64)
    tokens = draw_tokens(1, 30).to(DEVICE)

    def run():
        cache = model.new_cache(1, 60)
        logits = model.prefill(tokens, None, cache, method)
        model.decode(logits, cache, 2, method)
        other = cache.fork()
        return torch.cat([model.decode(logits, c, 6, method) for c in (other, cache)], dim=1)

    plain, ours = both(run)
    assert torch.equal(plain, ours)


@pytest.mark.parametrize("sparse", [*arl_passes(8), parse("moba:budget=24,block_size=8", 64)], ids=["arl", "dense", "moba"])
def test_training_has_the_same_gradients_with_either_backend(sparse, both):
    """A gate that no longer learns, or a pass whose gradient stops at a kernel."""
    model, tokens = tiny(memory=True, n_kv_head=2, **HEADS_OF_16).to(DEVICE), draw_tokens(2, 40).to(DEVICE)

    def run():
        model.zero_grad()
        logits = model(tokens, sparse=sparse)
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    plain, ours = both(run)
    for name in plain:
        assert error(ours[name], plain[name]) < 1e-4, name


def test_auto_is_torch_on_a_cpu():
    """Kernels that start on a machine without a GPU."""
    assert backend.choice == "auto" and not backend.triton_for(torch.empty(1, 1, 2, 64))


def test_torch_is_torch_everywhere(monkeypatch):
    """--kernels=torch ignored."""
    monkeypatch.setattr(backend, "choice", "torch")
    assert not backend.triton_for(torch.empty(1, 1, 2, 64, device=DEVICE))


@pytest.mark.parametrize("shape, dtype", [((1, 1, 2, 48), torch.float32), ((1, 1, 2, 64), torch.float16)])
def test_what_the_kernels_do_not_cover_is_an_error(shape, dtype, monkeypatch):
    """A silent fall to plain PyTorch on a GPU."""
    monkeypatch.setattr(backend, "choice", "triton")
    with pytest.raises(ValueError) as raised:
        backend.triton_for(torch.empty(shape, dtype=dtype, device=DEVICE))
    one_line(raised, shape[-1], "--kernels=torch")


def test_more_blocks_than_the_kernels_route_among_is_an_error(monkeypatch):
    """A GPU that runs out of shared memory in the middle of a prompt."""
    monkeypatch.setattr(backend, "choice", "triton")
    q, k = torch.zeros(1, 1, 1, 16, device=DEVICE), torch.zeros(1, 2049, 1, 16, device=DEVICE)
    with pytest.raises(ValueError) as raised:
        backend.hook(parse("moba:budget=2,block_size=1", 2049), "prefill", k)(q, k, k, 2048, None)
    one_line(raised, "moba", "2,049 blocks", "block_size=1", "--kernels=torch")


def test_without_triton_the_choice_is_an_error(monkeypatch):
    """A traceback of an import on a machine without Triton, long after the command was given."""
    monkeypatch.setattr(backend, "HAS_TRITON", False)
    with pytest.raises(ValueError) as raised:
        backend.use("triton")
    one_line(raised, "pip install triton")


def test_without_a_gpu_or_the_interpreter_the_choice_is_an_error(monkeypatch):
    """Triton's own "0 active drivers"."""
    monkeypatch.setattr(backend, "choice", "triton")
    monkeypatch.setattr(backend, "INTERPRETED", False)
    with pytest.raises(ValueError) as raised:
        backend.triton_for(torch.empty(1, 1, 2, 64))
    one_line(raised, "GPU", "TRITON_INTERPRET=1")


@pytest.mark.parametrize("sparse", [*arl_passes(8), parse("moba:budget=24,block_size=8", 64)], ids=["arl", "dense", "moba"])
def test_a_layer_compiles_whole_with_the_kernels(sparse, monkeypatch):
    """A graph break at a kernel, in the middle of the layer that train.py compiles."""
    monkeypatch.setattr(backend, "choice", "triton")
    model, tokens = tiny(memory=True, **HEADS_OF_16).to(DEVICE), draw_tokens(2, 20).to(DEVICE)
    expected = model(tokens, sparse=sparse)
    for layer in model.layers:
        layer.compile(fullgraph=True, backend="aot_eager")
    assert_close(model(tokens, sparse=sparse), expected)


def test_the_flag_reaches_the_kernels():
    """--kernels that no script reads."""
    assert train.parse(["--preset=pico", "--kernels=torch"]).kernels == "torch"
