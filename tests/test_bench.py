"""bench.py and experiments/bench_model.py: what can be shown of them without a GPU."""
import json
from dataclasses import replace

import pytest
import torch
import transformers

import bench
from conftest import FORMS, assert_close, draw_tokens, error, layer_cache, refused, tiny
from experiments import bench_model, bench_peers
from memory import memory_loop
from model import PRESETS
from sparse import Quest, parse
from test_sparse import draw

alone = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it takes minutes")


@pytest.fixture
def run(monkeypatch, capsys):
    """bench.py with these flags -> what it prints; exit 2 -> its one line."""
    def command(*flags):
        monkeypatch.setattr("sys.argv", ["bench.py", *flags])
        try:
            bench.command("bench.py", bench.main)
        except SystemExit as stop:
            error = capsys.readouterr().err
            assert stop.code == 2 and error.startswith("bench.py: ") and error.count("\n") == 1
            return error
        return capsys.readouterr().out
    return command


@alone
def test_without_a_gpu_it_times_the_plain_forms(run):
    """A traceback where there is no GPU, or a figure that could be taken for a kernel's."""
    text = run()
    assert text.startswith("no GPU here: plain PyTorch")
    assert "memory_scan" in text and "moba" in text


@pytest.mark.parametrize("flags, words", [
    *(pytest.param(*row, marks=alone) for row in (
        (["--only", "memory"], ["need a GPU"]),  # of what is not timed here
        (["--json=b.json"], ["need a GPU"]),
        (["--end-to-end", "--only=batch"], ["need a GPU"]),
        (["--end-to-end", "--only=memory"], ["one of single"]),
        (["--end-to-end", "--json=/dev/null/x"], ["/dev/null"]))),
    (["--only", "memroy"], ["memroy", "memory"]),
    (["--preset=pico"], ["--preset", "--end-to-end"]),
    (["--table=x.json", "--only=moba"], ["--table", "other flags"]),
    (["--contexts", "256"], ["--contexts", "--end-to-end"]),
    (["--tokenizer=bytes"], ["--tokenizer", "--end-to-end"])], ids=str)
def test_what_cannot_be_timed_is_one_line(flags, words, run):
    """A traceback, or a typing error that starts minutes of something else than was asked for."""
    error = run(*flags)
    assert all(word in error for word in words)


def test_a_file_as_a_table(run, tmp_path):
    """A share of the floor, or a ratio, that is not the file's; a traceback for a damaged one."""
    row = dict(kernel="  select", shape="B1", ms=0.5, floor_ms=0.4,
               peers={"cuDNN": 1.25, "fla": "not installed: fla"})
    report = dict(device="GPU", commit="abcdefghij", ceilings=dict(copy=3000, matmul=700))
    file = tmp_path / "b.json"
    file.write_text(json.dumps(report | {"rows": [row, row | {"floor_ms": 0.3}]}))
    text = run(f"--table={file}")
    assert text.startswith("GPU, commit abcdefg: copy 3,000 GB/s, matmul 700 TFLOP/s\n")
    assert "| select | B1 | 0.5 | 80% near | cuDNN 1.250 (2.50x), fla not installed: fla |" in text
    assert "| 60% | " in text
    for rows in [row | {"ms": 0}], [row | {"peers": None}], [{}], 5:
        file.write_text(json.dumps(report | {"rows": rows}))
        assert all(word in run(f"--table={file}") for word in ("b.json", "--json"))


def test_a_peer_that_fails_is_told(monkeypatch):
    """A run that ends because a package is missing, or is of another version."""
    def failing(problem):
        def peer(*_):
            raise problem
        return peer

    for problem, words in (
            (ModuleNotFoundError("no", name="flash_moba"), "not installed: flash_moba"),
            (ImportError("undefined symbol: x"), "failed: ImportError: undefined"),
            (RuntimeError(""), "failed: RuntimeError: "), (OSError("no nvcc"), "no nvcc"),
            (TypeError("one argument"), "one argument")):
        assert words in bench.time_peer([failing(problem)])
        assert bench.unlike(failing(problem), [], [], 0.1) is None
    y = torch.ones(3)
    assert bench.unlike(lambda: [y], [], [y], 0.1) is None
    text = bench.unlike(lambda: [2 * y], [], [y], 0.1)
    assert text == bench.time_peer(text) == "computes something else: relative error 1.0e+00"


@pytest.mark.parametrize("T, block_size, S", [(64, 8, 3), (64, 16, 1), (32, 8, 9)])
def test_entries_of_moba_are_counted(T, block_size, S):
    """FLOPs of blocks that early queries do not have, or of keys behind the query."""
    read = [min(t // block_size, S - 1) * block_size + t % block_size + 1 for t in range(T)]
    assert bench.moba_entries(T, block_size, S) == sum(read)


# ---------------------------------------------------------------- peers

def test_its_plain_quest_is_quest():
    """A peer that reads other blocks, and so is no peer."""
    q, k, v, _ = draw(2, 64, 4, 4, seed=1)
    blocks = k.unflatten(1, (8, 8))
    y = bench_peers.plain_quest(q[:, -1:], k, v, blocks.amin(2), blocks.amax(2), 3, 8)
    assert_close(y, Quest(24, 8).decode(q[:, -1:], layer_cache(k, v))[0])


def test_its_official_memory_is_eq_1(monkeypatch):
    """A peer with another gate, or a gradient one token off. (torch's own scan needs a GPU.)"""
    def scan(g, b, reverse=False):
        m, steps = torch.zeros_like(b), range(b.shape[1])
        state = torch.zeros_like(b[:, 0])
        for t in reversed(steps) if reverse else steps:
            m[:, t] = state = g[:, t] * state + b[:, t]
        return m

    monkeypatch.setattr(bench_peers, "scan", scan)
    k, v, gate = (x.requires_grad_() for x in torch.randn(3, 2, 9, 2, 4))
    ours, exact = bench_peers.official_memory(k, v, gate), memory_loop(k, v, gate)[:2]
    gradients = torch.randn(2, *k.shape).unbind()
    for outs in zip([*ours, *torch.autograd.grad(ours, (k, v, gate), gradients)],
                    [*exact, *torch.autograd.grad(exact, (k, v, gate), gradients)]):
        assert_close(*outs)


def test_inputs_of_scans_make_eq_1():
    """A peer with another gate, with keys for values, or with 1 - g left out."""
    k, v, gate = torch.randn(3, 2, 9, 2, 4)

    def steps(g, x):  # (B, T, W)
        m = [torch.zeros_like(x[:, 0])]
        for t in range(x.shape[1]):
            m.append(g[:, t] * m[-1] + x[:, t])
        return torch.stack(m[1:], dim=1).view(k.shape)

    log_g, *tensors = bench_peers.hgrn_inputs(k, v, gate)
    g, *turned = (x.mT for x in bench_peers.warp_inputs(k, v, gate))
    for g, tensors in (log_g.exp(), tensors), (g, turned):
        for x, exact in zip(tensors, memory_loop(k, v, gate)):
            assert_close(steps(g, x), exact)


# ---------------------------------------------------------------- whole models

@pytest.mark.parametrize("form", ["gqa", "llama", "qwen2", "qwen3"])
@torch.no_grad()
def test_its_peer_is_the_same_model(form):
    """A peer of other weights, or of RoPE's base for another model."""
    device, dtype = bench_model.DEVICE, bench_model.DTYPE
    heads_of_16 = dict(width=64, n_head=4)
    model = tiny(**heads_of_16 | FORMS[form]).to(device, dtype)
    tokens, before = draw_tokens(1, 40).to(device), repr(model.config)
    theirs = bench_model.theirs_of(transformers, model, 100)
    assert repr(model.config) == before  # transformers writes into the objects that it is given
    assert error(theirs(tokens).logits, model(tokens)) < (1e-5 if device == "cpu" else 3e-2)
    refused(lambda: bench_model.theirs_of(transformers, tiny(memory=True), 100), "--preset")


@alone
def test_whole_models_are_timed_without_a_gpu_too(run, tmp_path):
    """A command that does nothing on a machine that has no GPU."""
    file = tmp_path / "bench.json"
    run("--end-to-end", "--preset=pico", "--contexts", "256", "2048", f"--json={file}")
    report = json.loads(file.read_text())
    methods, models = ({row[key] for row in report["rows"]} for key in ("method", "model"))
    assert methods >= {"dense", "dense, almost empty", "quest:budget=1/16", "snapkv:budget=1/16"}
    assert models == {"pico", "pico + memory"} == set(report["crossover"])
    assert all(row["step_ms"] > 0 for row in report["rows"])


def test_bytes_needed_counts_weights_and_entries():
    """A prediction that leaves out the gates, or SnapKV's dropping, or is of half the batch."""
    model = bench_model.random_model(replace(PRESETS["pico"], vocab_size=300))
    size = bench_model.DTYPE.itemsize
    entry = 2 * 96 * size * 2  # of both layers
    weights = lambda: size * sum(p.numel() for p in model.parameters())
    need = lambda text, B=1, T=4096: \
        bench_model.bytes_needed(model, parse(text, T), B, T, new=100) - weights()
    assert 4196 * entry < need("dense") < 4196 * entry + 64 * 96 * size * 2 + 4096 * 96 * size * 7
    of_four = 4 * (356 * (entry + 4 * 3 * 2) + 4096 * 96 * size * 6)
    assert need("snapkv:budget=1/16", B=8) - need("snapkv:budget=1/16", B=4) == of_four
    assert need("quest:budget=1/16") - need("dense") == 66 * entry
    before = need("dense")
    model.add_memory()
    assert need("dense") > before


def test_a_step_reads_the_weights_and_what_was_selected():
    """A roofline that counts the embedding's table, or all entries of a sparse method."""
    model = bench_model.random_model(PRESETS["pico"])
    size = bench_model.DTYPE.itemsize
    weights = size * sum(p.numel() for name, p in model.named_parameters()
                         if p.dim() == 2 and "embed" not in name)
    read = lambda text: bench_model.step_bytes(model, parse(text, 4096), 2, 4096) - weights
    entry = 2 * 2 * 2 * 96 * size  # of both rows and layers
    assert read("dense") == 4096 * entry
    assert read("snapkv:budget=1/16") == 256 * entry
    assert read("quest:budget=1/16") == (256 + 64) * entry


def test_an_evaluations_least_seconds():
    """A prompt counted for each method that shares one; MoBA's attention as if it were dense."""
    model = bench_model.random_model(PRESETS["pico"])
    rates, texts = {"matmul": 1e-12, "copy": 1e-9}, ("dense", "quest:budget=1/16")
    least = lambda texts, new=1: bench_model.least_seconds(
        model, [parse(text, 4096) for text in texts], 3, 4096, new, rates)
    assert least(texts) == bench_model.prompt_flops(model, 3, 4096) == least(texts[:1])
    pairs = sum(min(t, 1024) for t in range(4096))
    moba = least([*texts, "moba:budget=1/4"]) - least(texts)
    assert abs(moba - least(texts) + 3 * 4 * 96 * 2 * (4096**2 / 2 - pairs)) < 1e-3 * moba
    step = sum(bench_model.step_bytes(model, parse(text, 4096), 3, 4096) for text in texts)
    assert abs(least(texts, 5) - least(texts) - 4 * step) < 1e-6 * step
