"""
backend.py: whole models give the same whether plain PyTorch or the Triton kernels compute; and who
computes when.
"""
import pytest
import torch

import train
from conftest import DEVICE, FORMS, assert_close, draw_tokens, error, refused, times, tiny
from memory import arl_passes
from sparse import Dense, Dilated, MoBA, Quest, SnapKV, compose
from triton_ops import backend, common, selectors

ON_CPU = dict(n_layer=1) if DEVICE == "cpu" else {}  # the interpreter takes a second a step


OF_SIXTEEN = {"llama": {}, "qwen3 memory": dict(width=48, n_head=4)}


def a_model(form="gqa memory"):
    """With heads of 16 channels: the kernels cover no narrower ones."""
    sizes = OF_SIXTEEN.get(form, dict(width=64, n_head=4))
    return tiny(**FORMS[form] | sizes | ON_CPU).to(DEVICE)


# ---------------------------------------------------------------- the same numbers

@torch.no_grad()
def decode_all(model, method):
    """
    Logits of a ragged prompt fed in two chunks, then of steps of the same tokens; and what was
    selected at the end, as sets.
    """
    tokens, lengths = draw_tokens(2, 29, seed=1).to(DEVICE), torch.tensor([29, 18], device=DEVICE)
    cache, logits = model.new_cache(2, 40), []
    model(tokens[:, :9], cache=cache, sparse=method)
    logits.append(model.prefill(tokens[:, 9:], lengths - 9, cache, method))
    for token in draw_tokens(2, times(2, 4), seed=2).to(DEVICE).split(1, dim=1):
        logits.append(model(token, cache=cache, sparse=method)[:, -1])
    # the kernels' lists are as long as the cache; what they name must be the same
    read = [x if x is None else [set(row) - {-1} for row in x.flatten(0, 1).tolist()]
            for x in cache.selected]
    return torch.stack(logits), read


ALL_PHASES = compose(MoBA(12, 4), SnapKV(14, 6), Quest(12, 4))
SOME = [("gqa memory", ALL_PHASES), ("olmo2", Quest(12, 4, random=3)),
        ("ratplus", Dilated(8, 0, 0)), ("llama", Quest(12, 4)), ("qwen2 memory", SnapKV(14, 6)),
        ("qwen2 yarn", Dense()), ("qwen3 memory", Dense())]
EVERY = [("gqa memory", method) for method in (
    Dense(), Quest(12, 4), Quest(12, 4, random=3), MoBA(12, 4), MoBA(12, 4, random=1),
    SnapKV(14, 6), SnapKV(14, 6, random=2), Dilated(8, 5, 2), Dilated(8, 0, 0), ALL_PHASES)]
EVERY += [("olmo2", Quest(12, 4)), ("ratplus", Quest(12, 4)), *SOME]


@pytest.mark.parametrize("form, method", EVERY if DEVICE == "cuda" else times(SOME, EVERY))
def test_model_decodes_alike_with_either_backend(form, method, both):
    """
    A hook that hands a kernel the wrong slots, lengths or bounds; a cache that a fused step leaves
    behind; a fused step that expects QK-norm, or a memory.
    """
    model = a_model(form)
    (plain, read), (ours, read_too) = both(lambda: decode_all(model, method))
    assert_close(ours, plain, atol=1e-4, what="logits")
    assert read_too == read


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_the_kernels_know_every_family(form, monkeypatch):
    """A family whose steps run as they are written, several times slower, on a GPU alone."""
    monkeypatch.setattr(backend, "choice", "triton")
    assert a_model(form).by_kernels()


def test_decoding_from_an_empty_cache(both):
    """A memory without a state to start from."""
    model, token = a_model("memory"), draw_tokens(2, 1).to(DEVICE)
    plain, ours = both(lambda: model(token, cache=model.new_cache(2, 4)).detach())
    assert_close(ours, plain, atol=1e-4)


def test_a_fork_has_bounds_of_its_own(both):
    """Two texts from one prefill that update the same block bounds; bounds without new keys."""
    model, method, T = a_model(), Quest(8, 4, keep_first=False), 8
    prompt, first, second = (draw_tokens(1, T, seed=n).to(DEVICE) for n in (1, 2, 3))

    @torch.no_grad()
    def run():
        cache = model.new_cache(1, 2 * T)
        model.prefill(prompt, None, cache, method)
        model.step(first[:, 0], cache, method)
        other, logits = cache.fork(), []
        for t in range(1, T):
            model.step(second[:, t], other, method)
            logits.append(model.step(first[:, t], cache, method).clone())
        return torch.cat(logits)

    plain, ours = both(run)
    assert_close(ours, plain, atol=1e-4)


@pytest.mark.parametrize("sparse", [*arl_passes(8), MoBA(12, 4)], ids=["arl", "dense", "moba"])
def test_training_has_the_same_gradients_with_either_backend(sparse, both):
    """A gate that no longer learns, or a pass whose gradient stops at a kernel."""
    model, tokens = a_model(), draw_tokens(2, 21).to(DEVICE)

    def run():
        loss = model.loss(tokens, torch.ones(2, 21, device=DEVICE), sparse)
        return torch.autograd.grad(loss, list(model.parameters()))

    for (path, _), plain, ours in zip(model.named_parameters(), *both(run)):
        assert error(ours, plain) < 1e-4, path


@pytest.mark.parametrize("sparse", [arl_passes(8)[0], MoBA(12, 4)], ids=["arl", "moba"])
def test_a_layer_compiles_whole_with_the_kernels(sparse, monkeypatch):
    """A graph break at a kernel, in the middle of the layer that train.py compiles."""
    monkeypatch.setattr(backend, "choice", "triton")
    model, tokens = a_model(), draw_tokens(1, 11).to(DEVICE)
    expected = model(tokens, sparse=sparse)
    for layer in model.layers:
        layer.compile(fullgraph=True, backend="aot_eager")
    assert_close(model(tokens, sparse=sparse), expected)


def test_more_entries_than_topk_takes_are_refused(monkeypatch):
    """Counts that run over into each other: 2,097,152 scores of a row."""
    monkeypatch.setattr(backend, "choice", "triton")
    monkeypatch.setattr(selectors, "MOST_SCORES", 20)
    model, tokens = a_model(), draw_tokens(1, 21).to(DEVICE)
    refused(lambda: model.generate(tokens, 2, sparse=SnapKV(14, 6)), "at most 20", "--kernels")
    model.generate(tokens[:, :20], 2, sparse=SnapKV(14, 6))


@pytest.mark.skipif(DEVICE == "cpu", reason="on a GPU from Hopper on")
def test_steps_are_the_same_whether_kernels_start_early(monkeypatch):
    """A kernel that reads before the one before it has written, in a graph and without."""
    model = tiny(width=1024, n_head=8, mlp_width=4096, n_layer=6, memory="decay").to(DEVICE)
    tokens = torch.randint(61, (3, 700), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    answers = []
    for early in common.on_hopper, lambda device: False:
        monkeypatch.setattr(common, "on_hopper", early)
        for method in Dense(), Quest(128, 16), SnapKV(128, 64):
            for graph in True, False:
                monkeypatch.setattr(backend, "in_graph", lambda method: graph)
                answers += [model.generate(tokens[:rows], 200, sparse=method) for rows in (1, 3)]
    half = len(answers) // 2
    assert all(map(torch.equal, answers[:half], answers[half:]))


# ---------------------------------------------------------------- who computes

def test_auto_is_torch_on_a_cpu_and_torch_is_torch_everywhere(monkeypatch):
    """Kernels that start on a machine without a GPU; --kernels=torch ignored."""
    assert backend.choice == "auto" and not backend.triton_for(torch.empty(1, 1, 2, 64))
    monkeypatch.setattr(backend, "choice", "torch")
    assert not backend.triton_for(torch.empty(1, 1, 2, 64, device=DEVICE))
    assert train.parse(["--preset=pico", "--kernels=torch"]).kernels == "torch"


def many_blocks():
    q, k = torch.zeros(1, 1, 1, 16, device=DEVICE), torch.zeros(1, 2049, 1, 16, device=DEVICE)
    backend.hook(MoBA(2, 1), "prefill", k)(q, k, k, 2048, None)


def head_of(D, dtype=torch.float32, device=DEVICE):
    return lambda: backend.triton_for(torch.empty(1, 1, 2, D, dtype=dtype, device=device))


@pytest.mark.parametrize("use, lacks, words", [
    (head_of(48), None, ["48", "--kernels=torch"]),
    (head_of(64, torch.float16), None, ["64", "--kernels=torch"]),
    (many_blocks, None, ["moba", "2049 blocks", "block_size=1", "--kernels=torch"]),
    (lambda: backend.use("triton"), "HAS_TRITON", ["pip install triton"]),
    (head_of(64, device="cpu"), "INTERPRETED", ["GPU", "TRITON_INTERPRET=1"]),
], ids=["head width", "dtype", "blocks", "no Triton", "no GPU"])
def test_what_the_kernels_cannot_do_is_an_error(use, lacks, words, monkeypatch):
    """
    A silent fall to plain PyTorch on a GPU, or one that runs out of shared memory in the middle of
    a prompt; a traceback long after the command was given; Triton's own "0 active drivers".
    """
    monkeypatch.setattr(backend, "choice", "triton")
    if lacks:
        monkeypatch.setattr(backend, lacks, False)
    refused(use, *words)
