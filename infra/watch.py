"""
How training goes, while it goes or after: the line that train.py prints of a step, and a table and
a plot of what it writes to out/NAME/log.jsonl.

    python -m infra.watch out/NAME [out/OTHER ...] [--png FILE]
    watch -n 60 python -m infra.watch out/NAME                       again and again

The log has one JSON object per step. A pass is one forward, backward and optimizer step on the
step's batch. A step has one, dense, or two: before it ARL's, through the memory alone (--arl), or
one that sees a window alone (--joint).

    step                its number, from 1
    lr, memory_lr       learning rate of the weights, of the memory's gates
    loss                of the dense pass, before it updates: nats per token, weighted as
                        --other_weight says; null if not finite
    arl_loss            of ARL's pass, likewise; the dense one follows, with weights that have seen
                        this batch. joint_loss: of --joint's
    grad_norm           of the dense pass's gradient, before --clip; null if not finite.
                        arl_grad_norm (times --arl_weight), joint_grad_norm: of the other's
    skipped             passes so far whose gradient was not finite: they changed no weight. Three
                        steps in a row end the run. A batch of which no token counts has a loss of
                        null, changes nothing and is not among them
    dense_seconds       that the dense pass took on the first GPU; arl_seconds, joint_seconds: the
                        other. A first step compiles
    wait_seconds        that the first process waited for its part of the batch to be made
    tokens              seen so far
    tokens_per_second   the batch's tokens, over all GPUs and each counted once, by the seconds of
                        the passes alone
    mfu                 FLOPs of the passes (cost.py) by their seconds and the peak of all GPUs,
                        0 to 1; absent if that is unknown
    memory_gb           most that PyTorch has allocated on the first GPU since the process began,
                        1e9 bytes
    seconds             of training up to here; what was done after a checkpoint and lost does not
                        count

and every --eval_every steps, after the updates:

    val_loss            nats per token, over 64 held-out samples or some more: of needles the
                        answers alone, of text all tokens
    val_accuracy        share of these tokens that the model finds likeliest, 0 to 1
    memory_lengths      for each layer, how many tokens the median channel of its memory averages
                        over; 1 is no memory

Older logs have fewer, forks may have more. `whole_step` in the plot is what `seconds` grew by, as a
mean of ten steps: passes, waiting for data, validation, checkpoints. Checked in
tests/test_watch.py.
"""
import json
import statistics
from pathlib import Path

import numpy as np

from infra.cli import command, flag_parser
from infra.report import pyplot

SCALES = [  # panel; fields; what the scale is. A panel's second scale is on its right
    ("training loss, nats per token (x: a pass was skipped)",
     ["loss", "arl_loss", "joint_loss"], "from the lowest"),
    ("validation", ["val_loss"], "from the lowest"),
    ("validation", ["val_accuracy"], "0 to 1"),
    ("norm of the gradient (x: a pass was skipped)",
     ["grad_norm", "arl_grad_norm", "joint_grad_norm"], "log"),
    ("learning rate", ["lr"], "from 0"),
    ("learning rate", ["memory_lr"], "from 0"),
    ("speed while passes run", ["tokens_per_second"], "from 0"),
    ("speed while passes run", ["mfu"], "0 to 1"),
    ("seconds",
     ["dense_seconds", "arl_seconds", "joint_seconds", "wait_seconds", "whole_step"], "from 0"),
    ("memory of the first GPU, GB", ["memory_gb"], "from 0"),
    ("tokens that each layer's memory averages over (dark: first layer)",
     ["memory_lengths"], "log"),
]


# ---------------------------------------------------------------- a line, while it goes

def line_of(entry, passes, step_seconds, args, what):
    """
    What train.py prints of a step. passes: their names; step_seconds: of the steps so far; what:
    the tokens that validation counts.
    """
    # A loss is null where it was not finite, or where no token counted.
    show = lambda value, form: "none" if value is None else format(value, form)
    line = f"step {entry['step']:>5}  loss {show(entry['loss'], '.3f')}"
    if len(passes) > 1:
        first = next(iter(passes))
        line += f"  {first} {show(entry[f'{first}_loss'], '.3f')}"
    if "val_loss" in entry:
        right = show(entry["val_accuracy"], ".1%")
        line += f"  validation {show(entry['val_loss'], '.3f')}, {right} of {what} right"

    # The speed is a median, as validation and checkpoints make some steps longer, and of the newest
    # steps, as it may have changed.
    tokens = args.batch * args.context_len
    speed = tokens / statistics.median(step_seconds[-100:])
    line += f"  lr {entry['lr']:.1e}  norm {show(entry['grad_norm'], '.2f')}  {speed:,.0f} tokens/s"
    if "mfu" in entry:
        line += f"  MFU {entry['mfu']:.1%}"
    left = (args.steps - entry["step"]) * tokens / speed / 60
    return line + (f"  {left / 60:.1f} h left" if left > 120 else f"  {left:.1f} min left")


def line_of_skipped(entry, bad, passes):
    """Of a step of which `bad` passes were skipped; None: no token of its batch counts."""
    if bad is None:
        return (f"step {entry['step']:>5}  no token of the batch counts, as all have weight 0: "
                "nothing was learned from it")
    return (f"step {entry['step']:>5}  loss or gradient is not finite: {bad} of {len(passes)} "
            f"passes skipped, {entry['skipped']} so far")


# ---------------------------------------------------------------- logs

def read(path):
    """
    A run's folder, or its log -> {field: (steps,)}, NaN where a step has no value; memory_lengths
    (steps, layers).
    """
    file = path / "log.jsonl" if path.is_dir() else path
    if not file.exists():
        raise ValueError(f"{file} is not there: give the folder of a run of train.py that has "
                         "begun, as out/NAME, or its log")
    # Every line is a step after the one before, or two runs have written to the file, or a disk has
    # damaged it: a plot of what is left would hide that.
    entries, lines, last = [], file.read_bytes().splitlines(), 0
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            if entry["step"] <= last:
                raise ValueError
        except (ValueError, TypeError, KeyError):
            if number == len(lines):  # not all there yet, or torn by a power cut
                break
            start = line[:50].decode(errors="replace")
            raise ValueError(f"{file}, line {number} is no step after {last}: {start!r}; if this "
                             f'is a log of train.py, put {{"step": {last + 1}}} there instead'
                             ) from None
        entries.append(entry)
        last = entry["step"]
    if not entries:
        raise ValueError(f"{file} has no step yet: wait for the first")

    # A field that an entry lacks is None, which numpy makes NaN.
    fields = {"step", "skipped", "seconds"}.union(*(fields for _, fields, _ in SCALES))
    run = {field: np.array([entry.get(field) for entry in entries], float)
           for field in fields - {"memory_lengths"}}
    # Of a model without a memory there are no lengths, in any step or until the first validation.
    none = [None] * max(len(entry.get("memory_lengths") or []) for entry in entries)
    lengths = [entry.get("memory_lengths") or none for entry in entries]
    run["memory_lengths"] = np.array(lengths, float)

    # In older logs `seconds` began anew at a --resume: less than before means from 0.
    grown = np.diff(run["seconds"], prepend=0)
    run["hours"] = np.nancumsum(np.where(grown < 0, run["seconds"], grown)) / 3600
    run["whole_step"][10:] = (run["hours"][10:] - run["hours"][:-10]) * 3600 / 10
    # Older logs have no count, but a loss of null.
    more = np.diff(np.fmax.accumulate(run["skipped"]), prepend=0) > 0
    run["is_skipped"] = np.isnan(run["loss"]) | more
    return run


def known(values):
    return values[np.isfinite(values)]


# ---------------------------------------------------------------- a table

def cell(values, form, pick=lambda some: some[-1]):
    """One of those values that are known, the last; a dash if there is none."""
    values = known(values)
    return format(pick(values), form) if values.size else "-"


def table(runs):
    """A line for each run, and what its memory averages over."""
    rows = [["", "last step", "loss: first", "at 100", "at 1000", "last", "val_loss", "accuracy",
             "tokens/s", "MFU", "GB", "skipped", "hours"]]
    for name, run in runs.items():
        loss, step = run["loss"], run["step"]
        # Speed is a median, as first steps compile; memory the most that was ever needed.
        losses = loss[:1], loss[step == 100], loss[step == 1000], loss[-1:], run["val_loss"]
        rows.append([name, cell(step, ",.0f"), *(cell(values, ".3f") for values in losses),
                     cell(run["val_accuracy"], ".1%"),
                     cell(run["tokens_per_second"], ",.0f", np.median),
                     cell(run["mfu"], ".1%", np.median), cell(run["memory_gb"], ".1f", np.max),
                     cell(run["skipped"], ".0f"), cell(run["hours"], ".2f")])

    # Names to the left, numbers to the right.
    left, *widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for name, *cells in rows:
        right = [f"{text:>{width + 2}}" for text, width in zip(cells, widths)]
        lines.append(f"{name:{left}}" + "".join(right))
    for name, run in runs.items():
        told = run["memory_lengths"][np.isfinite(run["memory_lengths"]).any(axis=1)]
        for lengths in told[-1:]:
            numbers = " ".join(f"{length:.1f}" for length in lengths)
            lines.append(f"{name:{left}}  memory_lengths, first layer to last: {numbers}")
    return "\n".join(lines)


# ---------------------------------------------------------------- a plot

def draw(axis, steps, values, **look):
    """
    Pale, the range of each thousandth of the values; full, the mean of each hundredth. Or all,
    where there are fewer.
    """
    # Means alone would hide a spike of one step, and all points would take minutes to draw.
    steps, values = steps[np.isfinite(values)], known(values)
    starts = lambda parts: np.linspace(0, len(values), min(parts, len(values)), endpoint=False)
    pale, full = starts(1000).astype(int), starts(100).astype(int)
    mean = lambda x: np.add.reduceat(x, full) / np.diff([*full, len(x)])
    lowest, highest = np.minimum.reduceat(values, pale), np.maximum.reduceat(values, pale)
    span = np.stack([lowest, highest], axis=1)
    axis.plot(np.repeat(steps[pale], 2), span.flatten(), color=look["color"], linewidth=0.6,
              alpha=0.3)
    axis.plot(mean(steps), mean(values), linewidth=1.4, marker="o" if len(full) < 20 else None,
              markersize=3, **look)


STYLES = ["-", "--", ":", "-.", (0, (6, 1))]


def plot(runs, path):
    """Of several runs colors tell runs and styles tell fields; of one, colors tell fields."""
    if not (plt := pyplot()):
        return
    plt.rcParams.update({"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False,
                         "grid.alpha": 0.3})
    # Panels that no run has anything to show in are left out.
    has = lambda field: any(known(run[field]).size for run in runs.values())
    shown = [(title, list(filter(has, fields)), scale) for title, fields, scale in SCALES]
    shown = [panel for panel in shown if panel[1]]
    rows = -(-len({title for title, *_ in shown}) // 2)
    figure, axes = plt.subplots(rows, 2, figsize=(13, 2.7 * rows + 0.5), squeeze=False,
                                layout="constrained")
    free, panels = iter(axes.flat), {}
    for title, fields, scale in shown:
        # What comes twice shares a panel, with its second scale on the right.
        right = title in panels
        if right:
            axis = panels[title].twinx()
        else:
            axis = panels[title] = next(free)
        draw_fields(axis, runs, fields, title, right)
        set_limits(axis, runs, fields, scale)
        name_axis(axis, runs, fields, title, right)
    for axis in free:
        axis.remove()

    figure.supxlabel("step", fontsize=9)
    names = [plt.Line2D([], [], color=f"C{i}" if len(runs) > 1 else "none", label=name)
             for i, name in enumerate(runs)]
    figure.legend(handles=names, loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(path, dpi=120, format="png")
    plt.close(figure)
    print(f"plot in {path}")


def draw_fields(axis, runs, fields, title, right):
    """What was logged, and a cross where a pass was skipped."""
    from matplotlib import pyplot as plt
    several = len(runs) > 1
    for i, run in enumerate(runs.values()):
        for j, field in enumerate(fields):
            if field == "memory_lengths":
                layers = run[field].T
                for number, lengths in enumerate(layers):
                    draw(axis, run["step"], lengths, linestyle=STYLES[i % 5],
                         color=plt.cm.viridis(number / len(layers)))
            elif several:
                draw(axis, run["step"], run[field], color=f"C{i}", linestyle=STYLES[j + right])
            else:
                draw(axis, run["step"], run[field], color=f"C{j + right}", linestyle=STYLES[right])
        if "skipped" in title:  # at the panel's bottom, whatever its scale
            at, colour = run["step"][run["is_skipped"]], f"C{i}" if several else "C3"
            axis.plot(at, np.full(len(at), 0.03), "x", color=colour,
                      transform=axis.get_xaxis_transform())


def set_limits(axis, runs, fields, scale):
    """From the lowest value or 0, without the highest 2 %, but for logarithms and shares."""
    from matplotlib.ticker import LogLocator, NullLocator
    parts = [known(run[field]) for run in runs.values() for field in fields]
    parts = [part for part in parts if part.size]
    low, most = min(map(np.min, parts)), max(map(np.max, parts))
    if scale == "log":
        axis.set(yscale="log", ylim=(low / 1.5, most * 1.5))
        axis.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), minor_locator=NullLocator())
        return
    # A first step that compiles, or a loss before the first update, would make all others look the
    # same.
    high = max(np.percentile(part, 98) for part in parts)
    bottom = low if scale == "from the lowest" else 0
    room = 0.06 * (high - bottom) or 0.1 * high or 1
    axis.set_ylim(bottom and bottom - room, 1 if scale == "0 to 1" else high + room)


def name_axis(axis, runs, fields, title, right):
    """Title, ticks and legend, or what stands beside the axis where one field needs no legend."""
    from matplotlib import pyplot as plt
    axis.yaxis.set_major_formatter(lambda y, _: f"{y:,.0f}" if y >= 1000 else f"{y:.3g}")
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.set(title="" if right else title, xlim=(0, max(run["step"][-1] for run in runs.values())))
    axis.grid(not right)

    several, names = len(runs) > 1, fields
    if len(fields) == 1:  # of several runs' memories styles tell the runs, as colors tell layers
        names = list(runs) if several and fields == ["memory_lengths"] else []
    if not names:
        axis.set_ylabel(fields[0] + (", dashed" if right else ""))
        return
    lines = []
    for n, name in enumerate(names):
        look = {"color": "gray", "linestyle": STYLES[n % 5]} if several else {"color": f"C{n}"}
        lines.append(plt.Line2D([], [], label=name, **look))
    where = "upper right" if "loss" in fields else "lower right"
    axis.legend(handles=lines, loc=where, ncols=len(fields), columnspacing=1, handlelength=1.6,
                fontsize=8)


def main(argv=None):
    parser = flag_parser("watch.py", "A table and a plot of runs of train.py, from their logs.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="out/NAME",
                        help="folder of a run, or its log")
    parser.add_argument("--png", type=Path, metavar="FILE",
                        help="where to plot; None: log.png beside the first log")
    args = parser.parse_args(argv)
    first = args.runs[0]
    beside = first / "log.png" if first.is_dir() else first.with_suffix(".png")

    def run():
        runs = {str(path): read(path) for path in args.runs}
        print(table(runs))
        plot(runs, args.png or beside)
    command("watch.py", run)


if __name__ == "__main__":
    main()
