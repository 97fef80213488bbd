"""bench.py: what can be shown of it without a GPU."""
import pytest
import torch

import bench
from conftest import assert_close
from sparse import Quest
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


def test_an_unknown_part_is_one_line(monkeypatch, capsys):
    """A typing error that starts minutes of something else."""
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "--only", "memroy")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "memroy" in error and "memory" in error and error.count("\n") == 1


def test_its_plain_quest_is_quest(monkeypatch):
    """A peer that reads other blocks, and so is no peer."""
    q, k, v, _ = draw(2, 64, 4, 4, seed=1)
    monkeypatch.setattr(bench, "D", 8)
    blocks = k.unflatten(1, (8, 8))
    y = bench.plain_quest(q[:, -1:], k, v, blocks.amin(2), blocks.amax(2), 3, 8)
    assert_close(y.transpose(1, 2), Quest(24, 8).decode(q[:, -1:], layer_cache(k, v))[0])
