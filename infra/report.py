"""
Results as tables and plots, and the statistics in them.

    interval      of a mean of scores: Wilson's, never of width 0
    difference    of two models' means: Newcombe's, paired where both were asked the same prompts
    table         the paper's Table 3: accuracy by model, method and task, reads, H1
    table_random  H2: scores drawn by chance
    pyplot        of matplotlib, which is optional
    plot          the paper's Figure 1: accuracy by budget; and by depth of the needle

A result is a row of results.json (eval_niah.report), of one model, method and task. Checked by hand
in tests/test_report_tables.py, against published figures.
"""
import math
import re
import statistics

import torch

Z = 1.96  # of 95 %


# ---------------------------------------------------------------- statistics

def mean(values):
    """Of those that are not None; None if there is none."""
    values = [x for x in values if x is not None]
    return statistics.fmean(values) if values else None


def interval(values):
    """
    Mean of values in 0..1 and Wilson's 95 % interval, in percent: never of width 0, unlike mean
    +- 1.96 standard errors.
    """
    n, z = len(values), Z
    p = sum(values) / n
    middle = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    ends = [(middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)]
    return [round(100 * x, 2) for x in (p, *ends)]


def difference(a, b, paired):
    """
    Mean of b - a, the scores in 0..1 of two models, and its 95 % interval, in percent: Newcombe's,
    of the two Wilson intervals (Statistics in Medicine 17, 1998, p. 2635, method 10). Paired, of
    the same prompts, what is hard for both counts less.
    """
    (p, p_low, p_high), (q, q_low, q_high) = interval(b), interval(a)
    r = correlation(a, b) if paired else 0.0

    def half(x, y):
        return math.sqrt(max(0.0, x * x - 2 * r * x * y + y * y))
    return [p - q, p - q - half(p - p_low, q_high - q), p - q + half(p_high - p, q - q_low)]


def correlation(a, b):
    """
    Of scores in 0..1, with Newcombe's correction: without it few prompts that both find, or miss,
    would seem to prove all.
    """
    n, deviations = len(a), statistics.pstdev(a) * statistics.pstdev(b)
    products = statistics.fmean(x * y for x, y in zip(a, b, strict=True))
    together = products - statistics.fmean(a) * statistics.fmean(b)
    if together > 0:
        together = max(0.0, together - 1 / (2 * n))
    return together / deviations if deviations else 0.0


def mean_of_tasks(cells):
    """Of [mean, low, high] of each task: the mean, and half its 95 % interval."""
    halves = [(high - low) / 2 for _, low, high in cells]
    return (statistics.fmean(middle for middle, *_ in cells),
            math.sqrt(sum(h * h for h in halves)) / len(cells))


def best_heads(rates):
    """Mean of the best 5 % of hit rates (layers, KV): the paper's top 50 of 1,024."""
    n_best = max(1, round(0.05 * rates.numel()))
    return float(rates.flatten().topk(n_best).values.mean())


def by_tenth(found):
    """
    [(depth of the needle, 0 to 100; score, 0 to 1)] of answers -> [answers, percent found] of each
    tenth of the prompt; percent None where there is none
    """
    tenths = [[] for _ in range(10)]
    for depth, score in found:
        tenths[min(depth // 10, 9)].append(score)
    return [[len(tenth), 100 * mean(tenth) if tenth else None] for tenth in tenths]


# ---------------------------------------------------------------- tables

def lookup(results):
    """{(checkpoint, method): its rows, one per task}, without those drawn by chance."""
    found = {}
    for row in results:
        if row["random"] is None:
            found.setdefault((row["checkpoint"], row["method"]), []).append(row)
    return found


def table(
    results,    # rows
    by_prompt,  # {(checkpoint, method, task): RULER's score of each prompt}
    names,      # {task: its name in a head}
):
    """
    The paper's Table 3 as text, beside it entries read and H1's hits; below, how later checkpoints
    differ from the first.
    """
    found = lookup(results)
    left, right = max(len(c) for c, _ in found) + 3, max(len(m) for _, m in found)

    def line(checkpoint, method, cells, end):
        cells = "".join(f"{c:>7}" for c in cells)
        return f"{checkpoint:{left}}{method:{right}}{cells}{end}"

    def number(x):
        return "-" if x is None else f"{x:.1f}"

    tasks = [names[row["task"]] for row in next(iter(found.values()))]
    above = f"{'RULER score, %':>{7 * len(tasks) + 14}}{'paper':>7}{'read by a token of':>20}"
    lines = [" " * (left + right) + above + f"{'H1: best':>10}",
             line("", "", tasks,
                  f"{'mean':>14}{'mean':>7}{'prompt':>11}{'answer':>9}{'heads, %':>10}")]

    for (checkpoint, method), rows in found.items():
        ruler, half = mean_of_tasks([row["ruler"] for row in rows])
        paper, _ = mean_of_tasks([row["paper"] for row in rows])
        prompt_read = mean(row["prompt_read"] for row in rows)
        read = mean(row["read"] for row in rows)
        best = None
        if rows[0]["hits"]:
            # the best heads of the mean over tasks: those that find the needle in all of them
            best = 100 * best_heads(torch.tensor([row["hits"] for row in rows]).mean(0))
        end = (f"{ruler:8.1f} ±{half:4.1f}{paper:7.1f}{number(prompt_read):>11}{number(read):>9}"
               f"{number(best):>10}")
        lines.append(line(checkpoint, method, [f"{row['ruler'][0]:.1f}" for row in rows], end))

    first, *others = dict.fromkeys(checkpoint for checkpoint, _ in found)
    for other in others:
        pairs = zip(found[first, "dense"], found[other, "dense"])
        same = all(a["prompts"] == b["prompts"] for a, b in pairs)
        how = "of other prompts, as their tokens differ"
        if same:
            how = "each prompt asked of both, so ± of paired differences"
        lines.append(f"\n{other} - {first}, {how}")
        for method in (method for checkpoint, method in found if checkpoint == other):
            cells = [difference(by_prompt[first, method, row["task"]],
                                by_prompt[other, method, row["task"]], same)
                     for row in found[other, method]]
            gain, half = mean_of_tasks(cells)
            lines.append(line("", method, [f"{cell[0]:+.1f}" for cell in cells],
                              f"{gain:+8.1f} ±{half:4.1f}"))

    lines.append("\n±: half the width of a 95 % interval (Wilson's, which near 0 and 100 reaches "
                 "further towards 50), over prompts alone. Models that differ in nothing but their "
                 "training's seed often differ by more: whether a recipe gains, several seeds of "
                 "it must tell (experiments/reproduce.py)")
    return "\n".join(lines)


def table_random(results, names):
    """H2: for each method and task the scores of its draws, mean and sample standard deviation."""
    found = {}
    for row in results:
        if row["random"] is not None:
            by_task = found.setdefault((row["checkpoint"], row["method"]), {})
            by_task.setdefault(row["task"], []).append(row["ruler"][0])
    n = max(len(draws) for by_task in found.values() for draws in by_task.values())

    def cell(task, draws):
        score = f"{names[task]} {statistics.fmean(draws):.1f}"
        return score + f" ±{statistics.stdev(draws):.1f}" if len(draws) > 1 else score

    lines = ["H2: scores drawn by chance, RULER's score, %: mean and sample standard deviation "
             f"over draws ({n}), models and prompts the same"]
    for (checkpoint, method), by_task in found.items():
        cells = [cell(task, draws) for task, draws in by_task.items()]
        lines.append(f"{checkpoint}   {method}   " + "  ".join(cells))
    return "\n".join(lines)


# ---------------------------------------------------------------- the plot

def by_budget(found):
    """Of lookup's: {a method but for its budget: {budget: method}}"""
    kinds = {}
    for (_, method), rows in found.items():
        if rows[0]["budget"]:
            kind = re.sub("budget=[^,]*,?", "", method).rstrip(",:")
            kinds.setdefault(kind, {})[rows[0]["budget"]] = method
    return kinds


def depths(rows):
    """Percent of answers found in each tenth of the prompt, over all tasks; NaN where none is."""
    found = []
    for cells in zip(*(row["by_depth"] for row in rows)):
        n = sum(n for n, _ in cells)
        found.append(sum(n * p for n, p in cells if n) / n if n else math.nan)
    return found


def pyplot():
    """matplotlib's, which draws into files; None, and a line that says so, where it is missing."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: pip install matplotlib")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    return plt


def plot(results, path):
    """
    The paper's Figure 1, accuracy by budget for each method; below, accuracy by needle depth at the
    least budget.
    """
    if not (plt := pyplot()):
        return
    found = lookup(results)
    kinds = by_budget(found)
    if not kinds:
        return
    figure, axes = plt.subplots(2, len(kinds), figsize=(4 * len(kinds), 6.5), sharey=True,
                                squeeze=False)
    checkpoints = dict.fromkeys(checkpoint for checkpoint, _ in found)
    tenths = range(5, 100, 10)
    for (kind, methods), (above, below) in zip(kinds.items(), axes.T):
        budgets = sorted(methods)
        for i, checkpoint in enumerate(checkpoints):
            color, dense = f"C{i}", found[checkpoint, "dense"]
            of_budgets = [found[checkpoint, methods[budget]] for budget in budgets]
            means, halves = zip(*(mean_of_tasks([row["ruler"] for row in rows])
                                  for rows in of_budgets))
            above.errorbar(budgets, means, halves, marker="o", capsize=3, color=color,
                           label=checkpoint)
            above.axhline(mean_of_tasks([row["ruler"] for row in dense])[0], color=color,
                          linestyle="--", linewidth=1)
            below.plot(tenths, depths(of_budgets[0]), marker="o", color=color)
            below.plot(tenths, depths(dense), color=color, linestyle="--", linewidth=1)
        above.set(title=kind, xlabel="budget, tokens", xscale="log", ylim=(-3, 103))
        above.set_xticks(budgets, budgets)
        above.minorticks_off()
        below.set(title=methods[budgets[0]], xlabel="depth of the needle, %")
    axes[0, 0].set_ylabel("RULER's score, mean of tasks, %\n(bars: 95 %, over prompts)")
    axes[1, 0].set_ylabel("answers found, %")
    axes[0, 0].legend(title="dense: dashed")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
    print(f"plot in {path}")
