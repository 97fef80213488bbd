"""
Results as tables and plots.
"""
import math
import re
import statistics

import torch


def interval(values):
    """Mean of values in 0..1 and Wilson's 95 % interval, in percent: never of width 0, unlike mean +- 1.96 std errors."""
    n, z = len(values), 1.96
    p = sum(values) / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [round(100 * x, 2) for x in (p, (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n))]


def difference(a, b, paired):
    """
    Mean of b - a, the scores in 0..1 of two models, and its 95 % interval, in percent: Newcombe's, of the two Wilson intervals
    (Statistics in Medicine 17, 1998, p. 2635, method 10). Paired, of the same prompts, what is hard for both counts less.
    """
    (p, p_low, p_high), (q, q_low, q_high) = interval(b), interval(a)
    r = correlation(a, b) if paired else 0.0
    half = lambda x, y: math.sqrt(max(0.0, x * x - 2 * r * x * y + y * y))
    return [p - q, p - q - half(p - p_low, q_high - q), p - q + half(p_high - p, q - q_low)]


def correlation(a, b):
    """Of scores in 0..1, with Newcombe's correction: without it few prompts that both find, or miss, would seem to prove all."""
    n, spread = len(a), statistics.pstdev(a) * statistics.pstdev(b)
    together = statistics.fmean(x * y for x, y in zip(a, b, strict=True)) - statistics.fmean(a) * statistics.fmean(b)
    if together > 0:
        together = max(0.0, together - 1 / (2 * n))
    return together / spread if spread else 0.0


def mean(values):
    """Of those that are not None; None if there is none."""
    values = [x for x in values if x is not None]
    return statistics.fmean(values) if values else None


def best_heads(rates):
    """Mean of the best 5 % of hit rates (layers, KV): the paper's top 50 of 1,024."""
    return float(rates.flatten().topk(max(1, round(0.05 * rates.numel()))).values.mean())


def mean_of_tasks(cells):
    """Of [mean, low, high] of each task: the mean, and half its 95 % interval."""
    halves = [(high - low) / 2 for _, low, high in cells]
    return statistics.fmean(mean for mean, *_ in cells), math.sqrt(sum(h * h for h in halves)) / len(cells)


def lookup(results):
    """{(checkpoint, method): its rows, one per task}, without the random ones."""
    found = {}
    for row in results:
        if row["random"] is None:
            found.setdefault((row["checkpoint"], row["method"]), []).append(row)
    return found


def table(results, by_prompt, names):
    """
    The paper's Table 3 as text, beside it entries read and H1's hits; below, how later checkpoints differ from the first.
    by_prompt: {(checkpoint, method, task): ruler_scores}
    """
    found = lookup(results)
    left, right = max(len(c) for c, _ in found) + 3, max(len(m) for _, m in found)
    line = lambda checkpoint, method, cells, end: f"{checkpoint:{left}}{method:{right}}" + "".join(f"{c:>7}" for c in cells) + end
    number = lambda x: "-" if x is None else f"{x:.1f}"
    tasks = [names[row["task"]] for row in next(iter(found.values()))]
    above = f"{'RULER score, %':>{7 * len(tasks) + 14}}{'paper':>7}{'read by a token of':>20}{'H1: best':>10}"
    lines = [" " * (left + right) + above,
             line("", "", tasks, f"{'mean':>14}{'mean':>7}{'prompt':>11}{'answer':>9}{'heads, %':>10}")]
    for (checkpoint, method), rows in found.items():
        (ruler, half), (paper, _) = (mean_of_tasks([row[score] for row in rows]) for score in ("ruler", "paper"))
        best = 100 * best_heads(torch.tensor([row["hits"] for row in rows]).mean(0)) if rows[0]["hits"] else None
        prompt_read, read = mean(row["prompt_read"] for row in rows), mean(row["read"] for row in rows)
        lines.append(line(checkpoint, method, [f"{row['ruler'][0]:.1f}" for row in rows],
                          f"{ruler:8.1f} ±{half:4.1f}{paper:7.1f}{number(prompt_read):>11}{number(read):>9}{number(best):>10}"))
    first, *others = dict.fromkeys(checkpoint for checkpoint, _ in found)
    for other in others:
        same = all(a["prompts"] == b["prompts"] for a, b in zip(found[first, "dense"], found[other, "dense"]))
        how = "each prompt asked of both, so ± of paired differences" if same else "of other prompts, as their tokens differ"
        lines.append(f"\n{other} - {first}, {how}")
        for method in (method for checkpoint, method in found if checkpoint == other):
            cells = [difference(by_prompt[first, method, row["task"]], by_prompt[other, method, row["task"]], same)
                     for row in found[other, method]]
            gain, half = mean_of_tasks(cells)
            lines.append(line("", method, [f"{cell[0]:+.1f}" for cell in cells], f"{gain:+8.1f} ±{half:4.1f}"))
    lines.append("\n±: half a 95 % interval, over prompts alone. Models that differ in nothing but their training's seed often differ by "
                 "more: whether a recipe gains, several seeds of it must tell (reproduce.py)")
    return "\n".join(lines)


def table_random(results, names):
    found = {}
    for row in results:
        if row["random"] is not None:
            found.setdefault((row["checkpoint"], row["method"]), {}).setdefault(row["task"], []).append(row["ruler"][0])
    n = max(len(x) for by_task in found.values() for x in by_task.values())
    lines = [f"H2: scores drawn by chance, RULER's score, %: mean and sample standard deviation over draws ({n}), models and prompts the same"]
    for (checkpoint, method), by_task in found.items():
        spread = lambda x: f" ±{statistics.stdev(x):.1f}" if len(x) > 1 else ""
        cells = [f"{names[task]} {statistics.fmean(x):.1f}{spread(x)}" for task, x in by_task.items()]
        lines.append(f"{checkpoint}   {method}   " + "  ".join(cells))
    return "\n".join(lines)


def plot(results, path):
    """The paper's Figure 1, accuracy by budget for each method; below, accuracy by needle depth at the least budget."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: pip install matplotlib")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    found = lookup(results)
    kinds = {}  # a method but for its budget: {budget: method}
    for (_, method), rows in found.items():
        if rows[0]["budget"]:
            kind = re.sub("budget=[^,]*,?", "", method).rstrip(",:")
            kinds.setdefault(kind, {})[rows[0]["budget"]] = method
    if not kinds:
        return
    figure, axes = plt.subplots(2, len(kinds), figsize=(4 * len(kinds), 6.5), sharey=True, squeeze=False)

    def depths(rows):  # -> percent found in each tenth of the prompt, over all tasks
        tenths = [[cell for cell in cells if cell[0]] for cells in zip(*(row["by_depth"] for row in rows))]
        return [sum(n * p for n, p in cells) / sum(n for n, _ in cells) if cells else math.nan for cells in tenths]

    for (kind, methods), (above, below) in zip(kinds.items(), axes.T):
        budgets = sorted(methods)
        for i, checkpoint in enumerate(dict.fromkeys(checkpoint for checkpoint, _ in found)):
            dense, least, color = found[checkpoint, "dense"], found[checkpoint, methods[budgets[0]]], f"C{i}"
            means, halves = zip(*(mean_of_tasks([row["ruler"] for row in found[checkpoint, methods[budget]]]) for budget in budgets))
            above.errorbar(budgets, means, halves, marker="o", capsize=3, color=color, label=checkpoint)
            above.axhline(mean_of_tasks([row["ruler"] for row in dense])[0], color=color, linestyle="--", linewidth=1)
            below.plot(range(5, 100, 10), depths(least), marker="o", color=color)
            below.plot(range(5, 100, 10), depths(dense), color=color, linestyle="--", linewidth=1)
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
