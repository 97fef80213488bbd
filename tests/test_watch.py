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
from test_train import TINY

OF_TWO_PASSES = {
    "memory_lr": 1e-2, "arl_seconds": 0.5, "dense_seconds": 1.0, "mfu": 0.45, "memory_gb": 60.0,
    "skipped": 0, "arl_grad_norm": 2.0, "wait_seconds": 0.1, "of a fork": "x"}


def a_log(steps, older=False):
    """Lines of a made-up run."""
    lines = []
    for step in range(1, steps + 1):
        line = {"step": step, "lr": 1e-3, "loss": 5 - step / 1000, "grad_norm": 1 + 1 / step,
                "seconds": 3.6 * step}
        if not older:
            line |= OF_TWO_PASSES
            line |= {"arl_loss": 6 - step / 1000, "tokens_per_second": 20000 + step}
        if not older and step % 50 == 0:
            line |= {"val_loss": 4.25, "val_accuracy": 0.375, "memory_lengths": [1.5, step / 10]}
        lines.append(line)
    return lines


def write(folder, lines, end=""):
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "log.jsonl").write_text(text + end)
    return folder


@pytest.fixture
def tell(capsys, monkeypatch):
    """
    Run watch.py: -> cells of the table without its head, what is printed below, and the figure's
    axes.
    """
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    from matplotlib.figure import Figure
    savefig, figures = Figure.savefig, []
    monkeypatch.setattr(Figure, "savefig", lambda self, *given, **more: (
        figures.append(self), savefig(self, *given, **more)))

    def run(*flags):
        watch.main([str(flag) for flag in flags])
        _, *lines = capsys.readouterr().out.splitlines()
        n = len([flag for flag in flags if isinstance(flag, Path)])
        return [line.split()[1:] for line in lines[:n]], "\n".join(lines[n:]), figures[-1].axes
    return run


def marks(axes):
    """{panel: steps with a cross}"""
    return {axis.get_title().split(" (")[0]: line.get_xdata().tolist()
            for axis in axes for line in axis.lines if line.get_marker() == "x"}


def test_table_and_plot_tell_what_the_log_says(tell, tmp_path):
    """
    A number below another's heading, a mean for a median, the newest for the highest; a panel that
    is lost; a file that is no PNG.
    """
    lines = a_log(1200)
    lines[600] |= {"memory_gb": 75.04, "tokens_per_second": 1, "mfu": 0.01}
    run = write(tmp_path / "run", lines)
    [cells], below, axes = tell(run)
    assert cells == ["1,200", "4.999", "4.900", "4.000", "3.800", "4.250", "37.5%", "20,600",
                     "45.0%", "75.0", "0", "1.20"]
    assert "memory_lengths, first layer to last: 1.5 120.0" in below
    assert str(run / "log.png") in below
    assert (run / "log.png").read_bytes().startswith(b"\x89PNG")
    drawn = {axis.get_title() for axis in axes}
    drawn |= {axis.get_ylabel().removesuffix(", dashed") for axis in axes}
    drawn |= {text.get_text() for axis in axes if axis.get_legend()
              for text in axis.get_legend().texts}
    wanted = {title for title, _, _ in watch.SCALES} | {""}
    wanted |= {field for _, fields, _ in watch.SCALES for field in fields}
    assert drawn == wanted - {"joint_loss", "joint_grad_norm", "joint_seconds"}


def test_older_and_newer_runs_are_drawn_together(tell, tmp_path):
    """
    A field that one of the logs lacks, of which no line has ever been told, or that has one layer
    less.
    """
    older = write(tmp_path / "older", a_log(120, older=True))
    newer = write(tmp_path / "newer", a_log(60))
    both, _, axes = tell(older, newer / "log.jsonl", f"--png={tmp_path / 'both'}")
    assert both == [["120", "4.999", "4.900", "-", "4.880", *"------", "0.12"],
                    ["60", "4.999", "-", "-", "4.940", "4.250", "37.5%", "20,030", "45.0%", "60.0",
                     "0", "0.06"]]
    assert (tmp_path / "both").read_bytes().startswith(b"\x89PNG")
    assert not (older / "log.png").exists()
    _, below, axes = tell(older)
    assert {axis.get_title().split(" (")[0] for axis in axes} == {
        "training loss, nats per token", "norm of the gradient", "learning rate", "seconds"}
    assert "memory_lengths" not in below
    tell(write(tmp_path / "first step", a_log(1)))


@pytest.mark.parametrize("end", ['{"step": 61, "lr": 0.0', "\0\0\0", '{"step": 61, "lr": 0.0\n',
                                 "\n"])
def test_a_torn_last_line_is_passed_over(tmp_path, end):
    """A run that is watched at the moment it writes, or whose machine lost power."""
    run = watch.read(write(tmp_path / "run", a_log(60), end))
    assert run["step"].tolist() == list(range(1, 61)) and run["loss"][-1] == 4.94


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
    assert marks(axes) == {"training loss, nats per token": [10, 20, 30],
                           "norm of the gradient": [10, 20, 30]}
    older = a_log(30, older=True)
    older[4] |= {"loss": None, "grad_norm": None}
    _, _, axes = tell(write(tmp_path / "older", older))
    assert marks(axes)["training loss, nats per token"] == [5]


def test_hours_count_on_after_a_resume(tmp_path):
    """`seconds` begins at 0 again: hours of the last process alone, or a whole_step below 0."""
    lines = a_log(100)
    for line in lines[60:]:
        line["seconds"] -= 3.6 * 59
    run = watch.read(write(tmp_path / "run", lines))
    assert watch.table({"run": run}).splitlines()[1].split()[-1] == "0.10"
    assert run["hours"][-1] == pytest.approx(0.101)
    assert run["whole_step"][10:].min() > 3.5 and run["whole_step"][10:].max() < 4


def test_long_runs_are_thinned_and_keep_their_spikes():
    """
    100,000 points a line, minutes of drawing; one step's spike that falls between the points that
    are left.
    """
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


def test_what_cannot_be_read_is_one_line(tmp_path, capsys):
    """
    A stack of calls for a wrong path; a run that is drawn without what a damaged line in its middle
    hides.
    """
    def refused(*flags):
        with pytest.raises(SystemExit) as end:
            watch.main([str(flag) for flag in flags])
        text = capsys.readouterr().err
        assert end.value.code == 2 and text.startswith("watch.py: "), text
        assert text.count("\n") == 1 and len(text) < 500, text
        return text
    assert "required" in refused()
    assert "is not there" in refused(tmp_path / "none")
    assert "log.jsonl is not there" in refused(tmp_path)
    assert "no step yet" in refused(write(tmp_path / "empty", []))
    assert "no step yet" in refused(write(tmp_path / "begun", [], '{"st'))
    assert "line 1 is no step" in refused(Path(__file__))

    log = write(tmp_path / "damaged", a_log(5)) / "log.jsonl"
    good = log.read_bytes().splitlines(keepends=True)
    # the last: two processes wrote
    for bad in b'{"step": 3, "lo\xff\n', b"\n", b"[3]\n", b'{"lr": 0.1}\n', good[1]:
        log.write_bytes(b"".join([*good[:2], bad, *good[3:]]))
        text = refused(log.parent)
        assert "log.jsonl, line 3 is no step after 2" in text and '{"step": 3} there' in text
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
    base = ["--preset=pico", "--tasks", "niah_single_1", "--steps=2", "--batch=2", "--eval_every=2",
            "--save_every=0", "--device=cpu", f"--out={tmp_path}"]
    fields = {"mfu", "memory_gb"}  # of a GPU
    for name, *flags in (["arl", "--memory=on", "--arl=16"],
                         ["joint", "--memory=off", "--arl=0", "--joint=64"]):
        _, last = train.train(train.parse([*base, f"--name={name}", *flags]))
        fields |= last.keys()
        assert watch.read(tmp_path / name)["loss"][-1] == last["loss"]
    assert {"joint_seconds", "memory_lengths", "val_loss"} <= fields
    assert not fields - set(re.findall(r"\w+", watch.__doc__))
