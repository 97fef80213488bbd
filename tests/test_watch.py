"""
watch.py: what a log says is what table and plot say, whatever it lacks; what cannot be read is told
in one line.
"""
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

import train
from infra import watch
from model import PRESETS
from test_train import BASE, TINY, ending

OF_TWO_PASSES = {
    "memory_lr": 1e-2, "arl_seconds": 0.5, "dense_seconds": 1.0, "mfu": 0.45, "memory_gb": 60.0,
    "skipped": 0, "arl_grad_norm": 2.0, "wait_seconds": 0.1, "of a fork": "x"}


def a_log(steps, older=False):
    """Lines of a made-up run."""
    lines = [{"step": step, "lr": 1e-3, "loss": 5 - step / 1000, "grad_norm": 1 + 1 / step,
              "seconds": 3.6 * step} for step in range(1, steps + 1)]
    for step, line in enumerate([] if older else lines, start=1):
        line |= OF_TWO_PASSES | {"arl_loss": 6 - step / 1000, "tokens_per_second": 20000 + step}
        if step % 50 == 0:
            line |= {"val_loss": 4.25, "val_accuracy": 0.375, "memory_lengths": [1.5, step / 10]}
    return lines


def write(folder, lines, end=""):
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "log.jsonl").write_text(text + end)
    return folder


@pytest.fixture
def tell(capsys, monkeypatch):
    """Run watch.py: -> cells of the table without its head, lines below it, the figure's axes."""
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="pip install matplotlib")
    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)

    def run(*runs, flags=()):
        watch.main([*map(str, runs), *flags])
        _, *lines = capsys.readouterr().out.splitlines()
        n = len(runs)
        return [line.split()[1:] for line in lines[:n]], "\n".join(lines[n:]), figures[-1].axes
    return run


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG")


def panels(axes):
    """{title: steps with a cross}"""
    return {axis.get_title().split(" (")[0]: [
        step for line in axis.lines if line.get_marker() == "x" for step in line.get_xdata()]
        for axis in axes if axis.get_title()}


def test_table_and_plot_tell_what_the_log_says(tell, tmp_path):
    """A number below another's heading, a mean for a median, the newest for the highest."""
    lines = a_log(1200)
    lines[600] |= {"memory_gb": 75.04, "tokens_per_second": 1, "mfu": 0.01}
    run = write(tmp_path / "run", lines)
    [cells], below, axes = tell(run)
    assert cells == ["1,200", "4.999", "4.900", "4.000", "3.800", "4.250", "37.5%", "20,600",
                     "45.0%", "75.0", "0", "1.20"]
    assert "memory_lengths, first layer to last: 1.5 120.0" in below
    assert str(run / "log.png") in below and is_png(run / "log.png")
    drawn = {axis.get_title() for axis in axes}
    drawn |= {axis.get_ylabel().removesuffix(", dashed") for axis in axes}
    drawn |= {text.get_text() for axis in axes if axis.get_legend()
              for text in axis.get_legend().texts}
    wanted = {title for title, _, _ in watch.SCALES} | {""}
    wanted |= {field for _, fields, _ in watch.SCALES for field in fields}
    assert drawn == wanted - {"joint_loss", "joint_grad_norm", "joint_seconds"}


def test_older_and_newer_runs_are_drawn_together(tell, tmp_path):
    """A field that one log lacks; hours of the last process alone, as `seconds` began anew."""
    lines = a_log(120, older=True)
    for line in lines[60:]:
        line["seconds"] -= 3.6 * 59
    older = write(tmp_path / "older", lines)
    newer = write(tmp_path / "newer", a_log(60))
    both, _, _ = tell(older, newer / "log.jsonl", flags=[f"--png={tmp_path / 'both'}"])
    assert both == [["120", "4.999", "4.900", "-", "4.880", *"------", "0.12"],
                    ["60", "4.999", "-", "-", "4.940", "4.250", "37.5%", "20,030", "45.0%", "60.0",
                     "0", "0.06"]]
    assert is_png(tmp_path / "both") and not (older / "log.png").exists()
    _, below, axes = tell(older)
    assert panels(axes).keys() == {"training loss, nats per token", "norm of the gradient",
                                   "learning rate", "seconds"}
    assert "memory_lengths" not in below
    run = watch.read(older)
    assert run["hours"][-1] == pytest.approx(0.121)
    assert run["whole_step"][10:].min() > 3.5 and run["whole_step"][10:].max() < 4
    tell(write(tmp_path / "first step", a_log(1)))


def test_skipped_passes_are_marked_and_left_out(tell, tmp_path):
    """null taken for 0; a skipped ARL pass that only the count tells; an older log, without one."""
    lines = a_log(30)
    lines[9] |= {"loss": None, "grad_norm": None}
    lines[19] |= {"arl_loss": None}
    lines[29] |= {"loss": None, "grad_norm": None, "val_loss": float("nan")}
    for line in lines:
        line["skipped"] = sum(line["step"] >= at for at in (10, 20, 30))
    [cells], _, axes = tell(write(tmp_path / "run", lines))
    assert cells[1:6] == ["4.999", *"----"] and cells[-2] == "3"
    crosses = {title: steps for title, steps in panels(axes).items() if steps}
    assert crosses == dict.fromkeys(["training loss, nats per token", "norm of the gradient"],
                                    [10, 20, 30])
    older = a_log(30, older=True)
    older[4] |= {"loss": None, "grad_norm": None}
    _, _, axes = tell(write(tmp_path / "older", older))
    assert panels(axes)["training loss, nats per token"] == [5]


def test_long_runs_are_thinned_and_keep_their_spikes():
    """Minutes of drawing; one step's spike that falls between the points that are left."""
    class Axis:
        drawn = []

        def plot(self, x, y, **look):
            self.drawn.append((x, y))
    steps, values = np.arange(1, 100_001), np.ones(100_000)
    values[54_321], values[7] = 9, np.nan
    watch.draw(Axis(), steps, values, color="C0")
    (x, pale), (at, full) = Axis.drawn
    assert len(x) == len(pale) == 2000 and pale.max() == 9
    assert abs(x[pale.argmax()] - 54_322) <= 100
    assert len(at) == len(full) == 100
    assert full.max() == pytest.approx(1.008) and np.median(full) == 1


def test_a_torn_last_line_is_passed_over(tmp_path):
    """A run that is watched at the moment it writes, or whose machine lost power."""
    for end in '{"step": 61, "lr": 0.0', "\0\0\0", '{"step": 61, "lr": 0.0\n', "\n":
        run = watch.read(write(tmp_path, a_log(60), end))
        assert run["step"].tolist() == list(range(1, 61)) and run["loss"][-1] == 4.94, end


def test_what_cannot_be_read_is_one_line(tmp_path, capsys):
    """A stack of calls for a wrong path; a plot that hides a damaged line in the middle."""
    begun = write(tmp_path / "begun", [], '{"st')
    for words, *flags in (
            ["required"], ["is not there", tmp_path / "none"],
            ["log.jsonl is not there", tmp_path], ["no step yet", write(tmp_path / "empty", [])],
            ["no step yet", begun], ["line 1 is no step", Path(__file__)]):
        line = ending(watch.main, capsys, *flags)
        assert line.startswith("watch.py: ") and words in line

    log = write(tmp_path / "damaged", a_log(5)) / "log.jsonl"
    good = log.read_bytes().splitlines(keepends=True)
    # the last: two processes wrote
    for bad in b'{"step": 3, "lo\xff\n', b"\n", b"[3]\n", b'{"lr": 0.1}\n', good[1]:
        log.write_bytes(b"".join([*good[:2], bad, *good[3:]]))
        line = ending(watch.main, capsys, log.parent)
        assert "log.jsonl, line 3 is no step after 2" in line and '{"step": 3} there' in line
    log.write_bytes(b"".join([*good[:2], b'{"step": 3}\n', *good[3:]]))  # what it advises
    assert watch.read(log)["step"].tolist() == [1, 2, 3, 4, 5]


def test_without_matplotlib_there_is_the_table_and_a_hint(tmp_path, capsys, monkeypatch):
    """A stack of calls on a machine that only trains."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    watch.main([str(write(tmp_path / "run", a_log(60)))])
    text = capsys.readouterr().out
    assert "4.940" in text and text.endswith("no plot: pip install matplotlib\n")


def test_every_field_that_train_writes_is_explained(tmp_path, monkeypatch):
    """A field that is added or renamed in train.py, and missing where its users look it up."""
    monkeypatch.setitem(PRESETS, "pico", TINY)
    fields = {"mfu", "memory_gb"}  # of a GPU
    for name, flags in ("arl", []), ("joint", ["--memory=off", "--arl=0", "--joint=64"]):
        _, last = train.train(train.parse([*BASE, *flags, "--save_every=0", f"--out={tmp_path}",
                                           f"--name={name}"]))
        fields |= last.keys()
        assert watch.read(tmp_path / name)["loss"][-1] == last["loss"]
    assert {"joint_seconds", "memory_lengths", "val_loss"} <= fields
    assert not fields - set(re.findall(r"\w+", watch.__doc__))
