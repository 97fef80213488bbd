"""bench.py: what can be shown of it without a GPU."""
import json
from dataclasses import replace

import pytest
import torch

import bench
from experiments import bench_model
from conftest import assert_close
from model import PRESETS
from sparse import Quest, parse
from test_sparse import draw, layer_cache


def run(monkeypatch, *argv):
    monkeypatch.setattr("sys.argv", ["bench.py", *argv])
    bench.main()


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it takes minutes")
def test_without_a_gpu_it_times_the_plain_forms(monkeypatch, capsys):
    """A traceback where there is no GPU, or a figure that could be taken for a kernel's."""
    run(monkeypatch)
    text = capsys.readouterr().out
    assert text.startswith("no GPU here: plain PyTorch") and "memory_scan" in text and "moba" in text
    for flags in ["--only", "memory"], ["--json=b.json"]:  # of what is not timed here
        with pytest.raises(SystemExit) as stop:
            run(monkeypatch, *flags)
        assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_an_unknown_part_is_one_line(monkeypatch, capsys):
    """A typing error that starts minutes of something else."""
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "--only", "memroy")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "memroy" in error and "memory" in error and error.count("\n") == 1


@pytest.mark.parametrize("flags", [["--preset=pico"], ["--contexts", "256"], ["--tokenizer=bytes"]], ids=str)
def test_what_is_of_whole_models_is_refused_without(flags, monkeypatch, capsys):
    """Minutes of the kernels at a shape that was not asked for."""
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *flags)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and flags[0].split("=")[0] in error and "--end-to-end" in error and error.count("\n") == 1


def test_its_plain_quest_is_quest(monkeypatch):
    """A peer that reads other blocks, and so is no peer."""
    q, k, v, _ = draw(2, 64, 4, 4, seed=1)
    monkeypatch.setattr(bench, "D", 8)
    blocks = k.unflatten(1, (8, 8))
    y = bench.plain_quest(q[:, -1:], k, v, blocks.amin(2), blocks.amax(2), 3, 8)
    assert_close(y.transpose(1, 2), Quest(24, 8).decode(q[:, -1:], layer_cache(k, v))[0])


# ---------------------------------------------------------------- --end-to-end

@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it takes minutes")
def test_whole_models_are_timed_without_a_gpu_too(monkeypatch, capsys, tmp_path):
    """A command that does nothing on a machine that has no GPU; parts that need one, in a traceback."""
    file = tmp_path / "bench.json"
    run(monkeypatch, "--end-to-end", "--preset=pico", "--contexts", "256", "2048", f"--json={file}")
    report = json.loads(file.read_text())
    assert {row["method"] for row in report["rows"]} >= {"dense", "dense, almost empty", "quest:budget=1/16", "snapkv:budget=1/16"}
    assert {row["model"] for row in report["rows"]} == {"pico", "pico + memory"} == set(report["crossover"])
    assert all(row["step_ms"] > 0 for row in report["rows"])
    for flags in ["--only=batch"], ["--only=memory"], ["--json=/dev/null/x"]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run(monkeypatch, "--end-to-end", *flags)
        assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_bytes_needed_counts_weights_and_entries():
    """A prediction that leaves out the gates, counts SnapKV's whole prompt, or is of half the batch."""
    model = bench_model.random_model(replace(PRESETS["pico"], vocab_size=300))
    size = bench_model.DTYPE.itemsize
    weights, entry = size * sum(p.numel() for p in model.parameters()), 2 * 96 * size * 2  # of both layers
    need = lambda text, B=1, T=4096: bench_model.bytes_needed(model, parse(text, T), B, T, new=100) - weights
    assert 4196 * entry < need("dense") < 4196 * entry + 64 * 96 * size * 2 + 4096 * 96 * size * 7
    assert need("snapkv:budget=1/16", B=8) - need("snapkv:budget=1/16", B=4) == 4 * (356 * (entry + 4 * 3 * 2) + 4096 * 96 * size * 6)
    assert need("quest:budget=1/16") - need("dense") == 66 * entry
    before = need("dense")
    model.add_memory()
    assert bench_model.bytes_needed(model, parse("dense", 1), 1, 4096, new=100) - size * sum(p.numel() for p in model.parameters()) > before


def test_a_step_reads_the_weights_and_what_was_selected():
    """A roofline that counts the embedding's table, or all entries of a sparse method."""
    model = bench_model.random_model(PRESETS["pico"])
    size = bench_model.DTYPE.itemsize
    weights = size * sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name)
    read = lambda text: (bench_model.step_bytes(model, parse(text, 4096), 2, 4096) - weights) / (2 * 2 * 2 * 96 * size)
    assert [read(text) for text in ("dense", "snapkv:budget=1/16", "quest:budget=1/16")] == [4096, 256, 256 + 64]
