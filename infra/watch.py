"""
How training goes, while it goes or after: a table and a plot of what train.py writes to out/NAME/log.jsonl.

    python -m infra.watch out/NAME [out/OTHER ...] [--png FILE]        again and again: watch -n 60 python -m infra.watch out/NAME

The log has one JSON object per step. A pass is one forward, backward and optimizer step on the step's batch. A step has one,
dense, or two: before it ARL's, through the memory alone (--arl), or one that sees a window alone (--joint).
    step                its number, from 1
    lr, memory_lr       learning rate of the weights, of the memory's gates
    loss                of the dense pass, before it updates: nats per token, weighted as --other_weight says; null if not finite
    arl_loss            of ARL's pass, likewise; the dense one follows, with weights that have seen this batch. joint_loss: of --joint's
    grad_norm           of the dense pass's gradient, before --clip; null if not finite. arl_grad_norm, joint_grad_norm: of the other's
    skipped             passes so far whose gradient was not finite: they changed no weight. Three steps in a row end the run.
                        A batch of which no token counts has a loss of null, changes nothing and is not among them
    dense_seconds       that the dense pass took on the first GPU; arl_seconds, joint_seconds: the other. A first step compiles
    wait_seconds        that the first process waited for its part of the batch to be made
    tokens              seen so far
    tokens_per_second   the batch's tokens, over all GPUs and each counted once, by the seconds of the passes alone
    mfu                 FLOPs of the passes (cost.py) by their seconds and the peak of all GPUs, 0 to 1; absent if that is unknown
    memory_gb           most that PyTorch has allocated on the first GPU since the process began, 1e9 bytes
    seconds             of training up to here; what was done after a checkpoint and lost does not count
and every --eval_every steps, after the updates:
    val_loss            nats per token, over 64 held-out samples or some more: of needles the answers alone, of text all tokens
    val_accuracy        share of these tokens that the model finds likeliest, 0 to 1
    memory_lengths      for each layer, how many tokens the median channel of its memory averages over; 1 is no memory
Older logs have fewer, forks may have more. `whole_step` in the plot is what `seconds` grew by, as a mean of ten steps: passes,
waiting for data, validation, checkpoints. Pale lines are single steps, or of a long run the range of each thousandth; full ones
means of a hundredth. The highest 2 % are cut off, but for logarithms and shares. Checked in tests/test_watch.py.
"""
import argparse
import json
from pathlib import Path

import numpy as np

SCALES = [  # panel; fields; what the scale is. A panel's second scale is on its right
    ("training loss, nats per token (x: a pass was skipped)", ["loss", "arl_loss", "joint_loss"], "from the lowest"),
    ("validation", ["val_loss"], "from the lowest"),
    ("validation", ["val_accuracy"], "0 to 1"),
    ("norm of the gradient (x: a pass was skipped)", ["grad_norm", "arl_grad_norm", "joint_grad_norm"], "log"),
    ("learning rate", ["lr"], "from 0"),
    ("learning rate", ["memory_lr"], "from 0"),
    ("speed while passes run", ["tokens_per_second"], "from 0"),
    ("speed while passes run", ["mfu"], "0 to 1"),
    ("seconds", ["dense_seconds", "arl_seconds", "joint_seconds", "wait_seconds", "whole_step"], "from 0"),
    ("memory of the first GPU, GB", ["memory_gb"], "from 0"),
    ("tokens that each layer's memory averages over (dark: first layer)", ["memory_lengths"], "log"),
]


def read(path):
    """A run's folder, or its log -> {field: (steps,)}, NaN where a step has no value; memory_lengths (steps, layers)."""
    file = path / "log.jsonl" if path.is_dir() else path
    if not file.exists():
        raise ValueError(f"{file} is not there: give the folder of a run of train.py that has begun, as out/NAME, or its log")
    entries, lines, last = [], file.read_bytes().splitlines(), 0
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            if entry["step"] <= last:
                raise ValueError
        except (ValueError, TypeError, KeyError):
            if number == len(lines):  # not all there yet, or torn by a power cut
                break
            raise ValueError(f"{file}, line {number} is no step after {last}: {line[:50].decode(errors='replace')!r}; if this is a log "
                             f'of train.py, put {{"step": {last + 1}}} there instead') from None
        entries.append(entry)
        last = entry["step"]
    if not entries:
        raise ValueError(f"{file} has no step yet: wait for the first")
    fields = {"step", "skipped", "seconds"}.union(*(fields for _, fields, _ in SCALES)) - {"memory_lengths"}
    run = {field: np.array([entry.get(field) for entry in entries], float) for field in fields}
    none = [None] * max(len(entry.get("memory_lengths") or []) for entry in entries)
    run["memory_lengths"] = np.array([entry.get("memory_lengths") or none for entry in entries], float)
    grown = np.diff(run["seconds"], prepend=0)
    run["hours"] = np.nancumsum(np.where(grown < 0, run["seconds"], grown)) / 3600  # less than before: an older --resume began anew
    run["whole_step"][10:] = (run["hours"][10:] - run["hours"][:-10]) * 3600 / 10
    run["is_skipped"] = np.isnan(run["loss"]) | (np.diff(np.fmax.accumulate(run["skipped"]), prepend=0) > 0)
    return run


def known(values):
    return values[np.isfinite(values)]


def table(runs):
    """A line for each run, and what its memory averages over."""
    rows = [["", "last step", "loss: first", "at 100", "at 1000", "last", "val_loss", "accuracy", "tokens/s", "MFU", "GB", "skipped", "hours"]]
    for name, run in runs.items():
        show = lambda values, form, pick=lambda some: some[-1]: format(pick(known(values)), form) if known(values).size else "-"
        loss, step = run["loss"], run["step"]
        losses = loss[:1], loss[step == 100], loss[step == 1000], loss[-1:], run["val_loss"]
        rows.append([name, show(step, ",.0f"), *(show(values, ".3f") for values in losses), show(run["val_accuracy"], ".1%"),
                     show(run["tokens_per_second"], ",.0f", np.median), show(run["mfu"], ".1%", np.median),
                     show(run["memory_gb"], ".1f", np.max), show(run["skipped"], ".0f"), show(run["hours"], ".2f")])
    left, *widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [f"{name:{left}}" + "".join(f"{cell:>{width + 2}}" for cell, width in zip(cells, widths)) for name, *cells in rows]
    for name, run in runs.items():
        for lengths in run["memory_lengths"][np.isfinite(run["memory_lengths"]).any(axis=1)][-1:]:
            lines.append(f"{name:{left}}  memory_lengths, first layer to last: {' '.join(f'{length:.1f}' for length in lengths)}")
    return "\n".join(lines)


def draw(axis, steps, values, **look):
    """Pale, the range of each thousandth of the values; full, the mean of each hundredth. Or all, where there are fewer."""
    steps, values = steps[np.isfinite(values)], known(values)
    pale, full = (np.linspace(0, len(values), min(parts, len(values)), endpoint=False).astype(int) for parts in (1000, 100))
    mean = lambda x: np.add.reduceat(x, full) / np.diff([*full, len(x)])
    span = np.stack([np.minimum.reduceat(values, pale), np.maximum.reduceat(values, pale)], axis=1)
    axis.plot(np.repeat(steps[pale], 2), span.flatten(), color=look["color"], linewidth=0.6, alpha=0.3)
    axis.plot(mean(steps), mean(values), linewidth=1.4, marker="o" if len(full) < 20 else None, markersize=3, **look)


def plot(runs, path):
    """Of several runs colors tell the runs and styles the fields; of one, colors tell the fields."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: pip install matplotlib")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, NullLocator
    plt.rcParams.update({"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "grid.alpha": 0.3})
    has = lambda field: any(known(run[field]).size for run in runs.values())
    shown = [(title, list(filter(has, fields)), scale) for title, fields, scale in SCALES if any(map(has, fields))]
    rows = -(-len({title for title, *_ in shown}) // 2)
    figure, axes = plt.subplots(rows, 2, figsize=(13, 2.7 * rows + 0.5), squeeze=False, layout="constrained")
    several, styles, free, panels = len(runs) > 1, ["-", "--", ":", "-.", (0, (6, 1))], iter(axes.flat), {}
    for title, fields, scale in shown:
        right = title in panels
        axis = panels[title].twinx() if right else panels.setdefault(title, next(free))

        # what was logged
        for i, run in enumerate(runs.values()):
            for j, field in enumerate(fields):
                if field == "memory_lengths":
                    for layer, lengths in enumerate(run[field].T):
                        draw(axis, run["step"], lengths, color=plt.cm.viridis(layer / run[field].shape[1]), linestyle=styles[i % 5])
                else:
                    draw(axis, run["step"], run[field], color=f"C{i if several else j + right}", linestyle=styles[j * several + right])
            if "skipped" in title:
                at = run["step"][run["is_skipped"]]
                axis.plot(at, np.full(len(at), 0.03), "x", color=f"C{i if several else 3}", transform=axis.get_xaxis_transform())

        # how high: without the highest 2 %, or a step that compiles makes all others look the same
        parts = [known(run[field]) for run in runs.values() for field in fields if known(run[field]).size]
        low, high, most = min(map(np.min, parts)), max(np.percentile(part, 98) for part in parts), max(map(np.max, parts))
        if scale == "log":
            axis.set(yscale="log", ylim=(low / 1.5, most * 1.5))
            axis.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), minor_locator=NullLocator())
        else:
            bottom = low if scale == "from the lowest" else 0
            room = 0.06 * (high - bottom) or 0.1 * high or 1
            axis.set_ylim(bottom and bottom - room, 1 if scale == "0 to 1" else high + room)

        # what it is called
        axis.yaxis.set_major_formatter(lambda y, _: f"{y:,.0f}" if y >= 1000 else f"{y:.3g}")
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.set(title="" if right else title, xlim=(0, max(run["step"][-1] for run in runs.values())))
        axis.grid(not right)
        names = fields if len(fields) > 1 else runs if several and fields == ["memory_lengths"] else []
        if names:
            axis.legend(handles=[plt.Line2D([], [], color="gray" if several else f"C{n}", linestyle=styles[n % 5 * several], label=name)
                                 for n, name in enumerate(names)], loc="upper right" if "loss" in fields else "lower right",
                        ncols=len(fields), columnspacing=1, handlelength=1.6, fontsize=8)
        else:
            axis.set_ylabel(fields[0] + ", dashed" * right)
    for axis in free:
        axis.remove()
    figure.supxlabel("step", fontsize=9)
    figure.legend(handles=[plt.Line2D([], [], color=f"C{i}" if several else "none", label=name) for i, name in enumerate(runs)],
                  loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(path, dpi=120, format="png")
    plt.close(figure)
    print(f"plot in {path}")


def main(argv=None):
    parser = argparse.ArgumentParser(description="A table and a plot of runs of train.py, from their logs.", allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"watch.py: {message}\n")
    parser.add_argument("runs", nargs="+", type=Path, metavar="out/NAME", help="folder of a run, or its log")
    parser.add_argument("--png", type=Path, metavar="FILE", help="where to plot; None: log.png beside the first log")
    args = parser.parse_args(argv)
    try:
        runs = {str(path): read(path) for path in args.runs}
        print(table(runs))
        plot(runs, args.png or (args.runs[0] / "log.png" if args.runs[0].is_dir() else args.runs[0].with_suffix(".png")))
    except (ValueError, OSError) as error:
        parser.error(error)


if __name__ == "__main__":
    main()
