"""
Results as tables, and the statistics in them.

    interval      of a mean of scores: Wilson's, never of width 0
    difference    of two models' means: Newcombe's, paired where both were asked the same prompts
    table         the paper's Table 3: accuracy by model, method and task, reads, H1
    table_random  H2: scores drawn by chance
    pyplot        of matplotlib, which is optional

A result is a row of results.json (eval_niah.report), of one model, method and task. Checked by hand
in tests/test_report_tables.py, against published figures. conclusion.py says what follows,
plots.py draws.
"""
import math
import re
import statistics
import textwrap

import torch

Z = 1.96  # of 95 %
WIDTH = 100  # columns of a text


# ---------------------------------------------------------------- statistics

def mean(values):
    """Of those that are not None; None if there is none."""
    values = [x for x in values if x is not None]
    return statistics.fmean(values) if values else None


def wilson(p, n):
    """
    [p, low, high] in percent, Wilson's 95 % interval of a share p of n: never of width 0, unlike p
    +- 1.96 standard errors.
    """
    z = Z
    middle = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    ends = [(middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)]
    return [round(100 * x, 2) for x in (p, *ends)]


def interval(values):
    """Mean of values in 0..1, and its interval."""
    return wilson(sum(values) / len(values), len(values))


def difference(a, b, paired):
    """
    Mean of b - a, the scores in 0..1 of two models, and its 95 % interval, in percent. Paired, of
    the same prompts, what is hard for both counts less.
    """
    r = correlation(a, b) if paired else 0.0
    return newcombe(interval(a), interval(b), r)


def newcombe(of_a, of_b, r):
    """
    [mean, low, high] of b - a, from those of each and their correlation (Statistics in Medicine 17,
    1998, p. 2635, method 10).
    """
    (q, q_low, q_high), (p, p_low, p_high) = of_a, of_b

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
    """
    Of [mean, low, high] of each task: the same of their mean. Each side has its own squares, as
    Newcombe's difference has, so that the ends stay within 0 and 100.
    """
    def side(widths):
        return math.sqrt(sum(width * width for width in widths)) / len(cells)
    middle = statistics.fmean(cell[0] for cell in cells)
    return [middle, middle - side(p - low for p, low, _ in cells),
            middle + side(high - p for p, _, high in cells)]


def plus_minus(low, high):
    """How a table tells an interval: half of it."""
    return f"±{(high - low) / 2:4.1f}"


def best_heads(rates):
    """Mean of the best 5 % of hit rates (layers, KV): the paper's top 50 of 1,024."""
    n_best = max(1, round(0.05 * rates.numel()))
    return float(rates.flatten().topk(n_best).values.mean())


def best_hits(rows):
    """H1 of a method's rows in percent; None if nobody asked."""
    rows = [row for row in rows if row["hits"]]
    if not rows:
        return None
    # the best heads of the mean over tasks: those that find the needle in all of them
    return 100 * best_heads(torch.tensor([row["hits"] for row in rows]).mean(0))


def by_tenth(found):
    """
    [(depth of the needle, 0 to 100; score, 0 to 1)] of answers -> [answers, percent found] of each
    tenth of the prompt; percent None where there is none
    """
    tenths = [[] for _ in range(10)]
    for depth, score in found:
        tenths[min(depth // 10, 9)].append(score)
    return [[len(tenth), 100 * mean(tenth) if tenth else None] for tenth in tenths]


# ---------------------------------------------------------------- results

def in_mean(results):
    """The rows that count in a mean: all but those of other tasks beside the needle tasks."""
    counted = [row for row in results if row.get("in_mean", True)]
    return counted or results


def lookup(results):
    """{(checkpoint, method): its rows, one per task}, without those drawn by chance."""
    found = {}
    for row in results:
        if row["random"] is None:
            found.setdefault((row["checkpoint"], row["method"]), []).append(row)
    return found


def parts_of(method):
    """[(kind, {setting: value})] of each part of a method's text"""
    parts = [part.partition(":") for part in method.split("+")]
    return [(kind, dict(pair.partition("=")[::2] for pair in given.split(",") if pair))
            for kind, _, given in parts]


def common_settings(methods):
    """{kind: {setting: value}}: what all methods of a kind have alike, except for the budget."""
    common = {}
    for method in methods:
        for kind, settings in parts_of(method):
            settings.pop("budget", None)
            common[kind] = dict(common.get(kind, settings).items() & settings.items())
    return common


def short_names(methods):
    """{method: "quest 1/8"}: its name in a table, without the common settings."""
    methods = list(methods)
    common, names = common_settings(methods), {}
    for method in methods:
        words = []
        for kind, settings in parts_of(method):
            own = [f"{key}={value}" for key, value in settings.items()
                   if key != "budget" and key not in common[kind]]
            words.append(" ".join(filter(None, [kind, settings.get("budget"), *own])))
        names[method] = " + ".join(words)
    return names


def by_budget(found):
    """Of lookup's: {a method but for its budget: {budget in tokens, None without one: method}}"""
    kinds = {}
    for (_, method), rows in found.items():
        if method != "dense":
            budget, kind = rows[0]["budget"], method
            if budget:
                kind = re.sub("budget=[^,]*,?", "", method).rstrip(",:")
            kinds.setdefault(kind, {})[budget] = method
    return kinds


# ---------------------------------------------------------------- tables

def table(results, names):
    """
    The paper's Table 3 as text, beside it entries read and H1's hits; below, how later checkpoints
    differ from the first. names: {task: its name in a head}. A column that tells nothing is left
    out.
    """
    found = lookup(results)
    short = short_names(dict.fromkeys(method for _, method in found))
    left, right = max(len(c) for c, _ in found) + 2, max(map(len, short.values()))
    of_mean = lookup(in_mean(results))
    tasks = [row["task"] for row in next(iter(found.values()))]

    def line(checkpoint, method, cells):
        return f"{checkpoint:{left}}{method:{right}}{''.join(cells)}".rstrip()

    columns = columns_of(found, of_mean, [names[task] for task in tasks])
    lines = [line("", "", [f"{top:>{width}}" for (top, _), width, _ in columns]),
             line("", "", [f"{head:>{width}}" for (_, head), width, _ in columns])]
    for i, (checkpoint, method) in enumerate(found):
        cells = [f"{cells[i] or '-':>{width}}" for _, width, cells in columns]
        lines.append(line(checkpoint, short[method], cells))

    first, *others = dict.fromkeys(checkpoint for checkpoint, _ in found)
    for other in others:
        lines.append(f"\n{other} - {first}, {prompts_of_both(found, first, other)}")
        gains = gaps(of_mean, first, other)
        for method, cells in gaps(found, first, other).items():
            gain, *ends = mean_of_tasks(gains[method])
            cells = [f"{cell[0]:+7.1f}" for cell in cells]
            lines.append(line("", short[method], [*cells, f"{gain:+8.1f} {plus_minus(*ends)}"]))
    counted = [names[row["task"]] for row in next(iter(of_mean.values()))]
    blind = any(row.get("blind") for row in results)
    mean_of = counted if len(counted) < len(tasks) else ()
    return "\n".join(lines + ["", *notes(found, columns, mean_of, blind)])


def columns_of(found, of_mean, tasks):
    """
    [((upper head, head), width, texts)] of columns; a text, or None, for each of lookup's. of_mean:
    those rows that count in a mean.
    """
    scores = [[f"{row['ruler'][0]:.1f}" for row in of_task] for of_task in zip(*found.values())]
    means = [mean_of_tasks([row["ruler"] for row in rows]) for rows in of_mean.values()]
    paper = [mean_of_tasks([row["paper"] for row in rows])[0] for rows in of_mean.values()]

    def numbers(values):
        return [None if x is None else f"{x:.1f}" for x in values]

    columns = [(("", task), 7, cells) for task, cells in zip(tasks, scores)]
    columns += [(("RULER score, %", "mean"), 14,
                 [f"{middle:.1f} {plus_minus(*ends)}" for middle, *ends in means])]
    if numbers(paper) != numbers(middle for middle, *_ in means):
        columns += [(("paper", "mean"), 7, numbers(paper))]
    for head, key in ("prompt", "prompt_read"), ("answer", "read"):
        read = [mean(row[key] for row in rows) for rows in of_mean.values()]
        columns += [(("read by", head), 9, numbers(read))]
    columns += [(("H1: best", "heads, %"), 10, numbers(map(best_hits, of_mean.values())))]
    return [column for column in columns if any(column[-1])]


def notes(found, columns, mean_of=(), blind=False):
    """
    Lines below a table: what its columns mean, and what its names leave out. mean_of: the tasks of
    a mean, if it is not of all.
    """
    heads, alike = [top for (top, _), *_ in columns], {}
    for kind, settings in common_settings(method for _, method in found).items():
        text = ", ".join(f"{key}={value}" for key, value in sorted(settings.items()))
        alike.setdefault(text, []).append(kind)
    told = ["±: half of a 95 % interval over prompts alone (Wilson's, which near 0 and 100 "
            "reaches further towards 50)"]
    if mean_of:
        told += [f"mean, and what follows it: of {', '.join(mean_of)}"]
    if blind:
        told += ["entries were dropped before the question was known (--blind)"]
    if "read by" in heads:
        told += ["read by: entries of a head's cache that a token of the prompt, or of the "
                 "answer, reads"]
    if "H1: best" in heads:
        told += ["H1: share of answers whose place the best 5 % of heads select while they answer"]
    told += [f"{text} in {' and '.join(kinds)}" for text, kinds in alike.items() if text]
    return [textwrap.fill(text, WIDTH) for text in told]


def gap(a, b):
    """[mean, low, high] of b - a, two rows of one task: paired if their prompts are the same."""
    if "scores" not in a or "scores" not in b:  # of an older version
        return newcombe(a["ruler"], b["ruler"], r=0.0)
    return difference(a["scores"], b["scores"], paired=a["prompts"] == b["prompts"])


def gaps(found, first, other):
    """{method: [mean, low, high] of each task} of other - first, two checkpoints"""
    return {method: [gap(*pair) for pair in zip(found[first, method], rows)]
            for (checkpoint, method), rows in found.items()
            if checkpoint == other and (first, method) in found}


def prompts_of_both(found, first, other):
    """In words: how the prompts of two checkpoints compare."""
    pairs = [*zip(found[first, "dense"], found[other, "dense"])]
    if any(a["prompts"] != b["prompts"] for a, b in pairs):
        return "of other prompts, as their tokens differ"
    if any("scores" not in row for pair in pairs for row in pair):
        return "± as of other prompts, so too wide: an older version kept no score of a prompt"
    return "each prompt asked of both, so ± of paired differences"


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

    short = short_names(method for _, method in found)
    lines = ["H2: scores drawn by chance, RULER's score, %: mean and sample standard deviation "
             f"over draws ({n}), models and prompts the same"]
    for (checkpoint, method), by_task in found.items():
        cells = [cell(task, draws) for task, draws in by_task.items()]
        lines.append(f"{checkpoint}   {short[method]}   " + "  ".join(cells))
    return "\n".join(lines)


# ---------------------------------------------------------------- pictures

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
