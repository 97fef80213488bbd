"""
The paper's Figure 1: accuracy by budget, for each method a panel; below, by depth of the needle.

    read_results  the rows of results.json, of one run or of several that go into one picture
    plot          NAME.png, and NAME.pdf for print: 7 inches wide, no text below 8 points

Models differ in colour, marker and line, so that a picture in grey can be read. Checked in
tests/test_report_tables.py.
"""
import textwrap
from fractions import Fraction
from itertools import cycle
from pathlib import Path

from infra.files import load, short
from infra.report import (by_budget, in_mean, lookup, mean_of_tasks, parts_of, pyplot, short_names,
                          wilson)

# Colours that the colour-blind tell apart (Okabe and Ito), and what tells them apart in grey.
LOOKS = [{"color": color, "marker": marker, "linestyle": style} for color, marker, style in (
    ("#0072b2", "o", "-"), ("#d55e00", "^", "--"), ("#009e73", "s", "-."), ("#cc79a7", "D", ":"),
    ("#000000", "v", (0, (6, 1, 1, 1, 1, 1))), ("#e69f00", "P", (0, (1, 3))))]
STYLE = {"font.size": 8, "axes.titlesize": 9, "legend.fontsize": 8, "pdf.fonttype": 42,
         "axes.spines.top": False, "axes.spines.right": False}
FEWEST = 15  # answers of a point by depth


# ---------------------------------------------------------------- results that are there

NUMBER, NONE = (int, float), type(None)
ROW = {  # what tables and pictures take from a row, see fits
    "checkpoint": str, "method": str, "task": str, "prompts": str, "n": int,
    "random": (int, NONE), "budget": (int, NONE), "ruler": [NUMBER] * 3, "paper": [NUMBER] * 3,
    "by_depth": [[int, (*NUMBER, NONE)]] * 10, "read": (*NUMBER, NONE),
    "prompt_read": (*NUMBER, NONE), "hits": (NONE, [[NUMBER]]), "scores": [NUMBER]}


def fits(value, form):
    """Of a type; one of several, (a, b); a list of one form, [a], or of several, [a, b]."""
    if isinstance(form, tuple):
        return any(fits(value, one) for one in form)
    if isinstance(form, list):
        return (isinstance(value, list) and len(form) in (1, len(value))
                and all(map(fits, value, form * (len(value) if len(form) == 1 else 1))))
    return type(value) is form  # to isinstance, True is an int


def read_results(files, names):
    """
    -> the rows of these results.json, in the order of `names` {task: its name in a head}, and the
    --context_len that all have. ValueError, which names the file, for any other file.
    """
    found, heads, context_len, blind = {}, {}, None, set()
    for file in files:
        report = load(file, "results", "settings", remedy="give a results.json of eval_niah.py")
        for number, row in enumerate(rows_of(report, file), 1):
            refuse_other_row(row, f"{file}: row {number} of its results", names)
            shape = [len(layer) for layer in row["hits"] or []]
            if shape and (len({*shape}) > 1
                          or heads.setdefault(row["checkpoint"], shape) != shape):
                raise ValueError(f"{file}: row {number} of its results has hits that are not of "
                                 "one number per layer and head of its model")
            key = tuple(row[field] for field in ("checkpoint", "method", "random", "task"))
            there = found.setdefault(key, row)
            if (there["ruler"], there["prompts"]) != (row["ruler"], row["prompts"]):
                raise ValueError(f"{file} has another result of {short(row['checkpoint'])} under "
                                 f"{short(row['method'])} than before: plot it apart")
        blind |= {bool(row.get("blind")) for row in report["results"]}
        if len(blind) > 1:
            raise ValueError(f"{file} was asked blind and others were not, or the other way round: "
                             "plot it apart")
        context_len = context_len or report["settings"]["context_len"]
        if report["settings"]["context_len"] != context_len:
            raise ValueError(f"{file} is of another --context_len than {files[0]}, so budgets do "
                             "not compare: plot it apart")

    # As one run would order them: `found` has the first appearance of each.
    checkpoints, methods = ([*dict.fromkeys(row[field] for row in found.values())]
                            for field in ("checkpoint", "method"))
    rows = sorted(found.values(), key=lambda row: (
        checkpoints.index(row["checkpoint"]), list(names).index(row["task"]),
        methods.index(row["method"])))
    together = lookup(rows)
    tasks = {tuple(row["task"] for row in of_method) for of_method in together.values()}
    dense = {(checkpoint, "dense") for checkpoint, _ in together}
    if len(tasks) != 1 or not dense <= together.keys():
        raise ValueError(f"{', '.join(map(str, files))}: not all models and methods have the same "
                         "tasks, and dense attention beside them: plot them apart")
    return rows, context_len


def rows_of(report, file):
    settings = report["settings"]
    context_len = settings.get("context_len") if isinstance(settings, dict) else None
    if not (isinstance(report["results"], list) and fits(context_len, int) and context_len > 0):
        raise ValueError(f"{file} is damaged, or not of eval_niah.py (its results are no list, or "
                         "its settings lack a context_len)")
    return report["results"]


def refuse_other_row(row, where, names):
    """ValueError if it is no row of eval_niah.py's."""
    if not isinstance(row, dict):
        raise ValueError(f"{where} is no object")
    for field, form in ROW.items():
        old = field == "scores" and field not in row  # of a version before --plot
        if not (old or fits(row.get(field), form)):
            raise ValueError(f"{where} has no fitting {field}: {short(row.get(field))}")
    if row["task"] not in names or not 0 < row["n"] == len(row.get("scores", range(row["n"]))):
        raise ValueError(f"{where} is of no task that we know, or its scores are not of n prompts")


# ---------------------------------------------------------------- depth

def in_bins(rows, n_bins):
    """(answers, share found) of each of some bins of the prompt's tenths, all tasks pooled."""
    tenths = [*zip(*(row["by_depth"] for row in rows))]  # of each, every row's [n, percent]
    step, bins = 10 // n_bins, []
    for first in range(0, 10, step):
        pairs = [pair for tenth in tenths[first:first + step] for pair in tenth
                 if pair[1] is not None]
        n = sum(n for n, _ in pairs)
        bins.append((n, sum(n * percent for n, percent in pairs) / max(n, 1) / 100))
    return bins


def how_many_bins(found):
    """
    The most that hold enough answers each, for all of lookup's; None if few answers make a picture
    of depth one of chance.
    """
    for n_bins in 10, 5:
        if all(n >= FEWEST for rows in found.values() for n, _ in in_bins(rows, n_bins)):
            return n_bins


# ---------------------------------------------------------------- pictures

def plot(results, names, context_len, path):
    """
    For each method a panel, accuracy by budget; below, by depth of the needle at the least budget,
    if there are answers enough. names: {task: its name in a head}.
    """
    found = lookup(in_mean(results))
    kinds, n_bins = by_budget(found), how_many_bins(found)
    if not kinds or not (plt := pyplot()):
        return
    checkpoints = dict.fromkeys(checkpoint for checkpoint, _ in found)
    looks = dict(zip(checkpoints, cycle(LOOKS)))
    short = short_names(method for _, method in found)
    n_rows, width = 2 if n_bins else 1, max(1.75 * len(kinds), min(7, 1 + 2 * len(kinds)))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            n_rows, len(kinds), figsize=(width, 0.5 + 2.3 * n_rows), sharey=True, squeeze=False,
            layout="constrained", width_ratios=[1 + len(methods) for methods in kinds.values()])
        for methods, (above, *below) in zip(kinds.values(), axes.T):
            least = methods[min(methods)]
            draw_budgets(above, found, looks, methods, context_len)
            above.set_title(without_budget(short[least], least))
            for axis in below:
                draw_depths(axis, found, looks, least, n_bins)
                axis.set_title(short[least])
        for axis, label in zip(axes[:, 0], (f"RULER's score, %,\n{asked(found, names)}",
                                            "answers found,\ntasks pooled, %")):
            axis.set_ylabel(label)
        figure.legend(handles=handles(plt, looks), loc="outside upper center",
                      ncols=int(width / 1.7), frameon=False)
        figure.savefig(path, dpi=200)
        # without the date, so that the same results are the same file
        figure.savefig(Path(path).with_suffix(".pdf"), metadata={"CreationDate": None})
        plt.close(figure)
    print(f"picture in {path}, for print as .pdf beside it")


def asked(found, names):
    tasks = [names[row["task"]] for row in next(iter(found.values()))]
    return f"mean of {', '.join(tasks)}" if len(tasks) < 5 else f"mean of {len(tasks)} tasks"


def without_budget(name, method):
    """A panel's title, of a method's short name."""
    (_, settings), *more = parts_of(method)
    budget = None if more else settings.get("budget")
    return textwrap.fill(" ".join(word for word in name.split() if word != budget), 24)


def handles(plt, looks):
    """What a legend names: each model, the thin lines, and the bars."""
    line = plt.matplotlib.lines.Line2D
    models = [line([], [], label=checkpoint, markersize=5, **look)
              for checkpoint, look in looks.items()]
    return [*models, line([], [], color="0.4", linewidth=0.7, label="thin: the same, dense"),
            line([], [], color="0.4", linestyle="", marker="|", label="bars: 95 % intervals")]


def draw_budgets(axis, found, looks, methods, context_len):
    """A panel: each model's mean of tasks at each budget of {budget: method}; dense: a line."""
    budgets = sorted(methods)
    for checkpoint, look, beside in in_rows(looks, 0.12):
        dense, *_ = mean_of_tasks([row["ruler"] for row in found[checkpoint, "dense"]])
        axis.axhline(dense, color=look["color"], linestyle=look["linestyle"], linewidth=0.7)
        cells = [(n + beside, *mean_of_tasks([row["ruler"] for row in found[checkpoint, method]]))
                 for n, method in enumerate(methods[budget] for budget in budgets)
                 if (checkpoint, method) in found]
        draw(axis, cells, look)
    axis.set(xlim=(-0.5, len(budgets) - 0.5), ylim=(0, 103))
    axis.set_xticks(range(len(budgets)), [budget_name(b, context_len) for b in budgets])
    if budgets[0]:
        axis.set_xlabel("budget: share, tokens")


def budget_name(budget, context_len):
    """1/8, and below it the tokens; nothing for a method without a budget."""
    if not budget:
        return ""
    share, tokens = Fraction(budget, context_len), f"{budget:,}"
    return f"{share}\n{tokens}" if share.numerator == 1 else tokens


def draw_depths(axis, found, looks, method, n_bins):
    """A panel: answers found by depth with a method, and with dense attention a thin line."""
    centers = [100 * (i + 0.5) / n_bins for i in range(n_bins)]
    for checkpoint, look, beside in in_rows(looks, 2):
        if (checkpoint, method) not in found:
            continue
        dense = [100 * p for _, p in in_bins(found[checkpoint, "dense"], n_bins)]
        axis.plot(centers, dense, color=look["color"], linestyle=look["linestyle"], linewidth=0.7)
        own = [wilson(p, n) for n, p in in_bins(found[checkpoint, method], n_bins)]
        draw(axis, [(x + beside, *cell) for x, cell in zip(centers, own)], look)
    axis.set(xlim=(0, 100), ylim=(0, 103), xticks=(0, 50, 100), xlabel="depth of the needle, %")


def in_rows(looks, apart):
    """(checkpoint, look, how far beside its place), so that no interval hides another."""
    apart, middle = apart * min(1, 3 / len(looks)), (len(looks) - 1) / 2
    return [(checkpoint, look, apart * (i - middle))
            for i, (checkpoint, look) in enumerate(looks.items())]


def draw(axis, cells, look):
    """Points with intervals. cells: [(x, middle, low, high)]"""
    x, middles, low, high = zip(*cells) if cells else [()] * 4
    bars = [[p - end for p, end in zip(middles, low)], [end - p for p, end in zip(middles, high)]]
    axis.errorbar(x, middles, bars, capsize=2, markersize=5, **look)
