"""
What follows from results, in sentences: whose mean over tasks is ahead beyond its interval.

    several checkpoints   each later one beside the first, under each method; and H1
    a single one          dense attention beside the least budget of each method

Nothing here is known before: all words follow from the rows that report.table prints. Checked by
hand in tests/test_report_tables.py.
"""
import math
import textwrap

from infra.report import (WIDTH, best_hits, by_budget, gap, gaps, in_mean, lookup, mean_of_tasks,
                          parts_of, short_names)


def conclusion(results, names):
    """names: {task: its name in a head} -> lines; none if there is nothing to compare"""
    found = lookup(in_mean(results))
    first, *others = dict.fromkeys(checkpoint for checkpoint, _ in found)
    short = short_names(method for _, method in found)
    tasks = [names[row["task"]] for row in found[first, "dense"]]
    told = [beside(found, first, other, short, tasks) for other in others]
    if others:
        told += ["Each is a single model: whether its recipe gains, only several seeds of it tell "
                 "(experiments/reproduce.py)."]
    elif by_budget(found):
        told = [cost(found, first, short, tasks)]
    return "\n".join(textwrap.fill(text, WIDTH) for text in told)


def beside(found, first, other, short, tasks):
    """A later checkpoint and the first."""
    gains = gaps(found, first, other)
    verbs = [f"is ahead of {first}", f"is behind {first}", f"differs from {first}"]
    text = f"{on_mean_of(tasks)} {other} {clauses(gains, verbs, short, tasks)}"
    rates = {method: [best_hits(found[of, method]) for of in (other, first)] for method in gains}
    with_hits = [method for method, of_both in rates.items() if None not in of_both]
    if not with_hits:
        return text
    least = min(with_hits, key=lambda method: found[first, method][0]["budget"] or math.inf)
    rate, of_first = rates[least]
    return (f"{text} Under {short[least]} its best heads select the answer's place for {rate:.0f} "
            f"% of answers, those of {first} for {of_first:.0f} % (H1).")


def cost(found, checkpoint, short, tasks):
    """A checkpoint with dense attention and with the least budgets."""
    dense = found[checkpoint, "dense"]
    least = [methods[min(methods)] for methods in by_budget(found).values()]
    losses = {method: [gap(*pair) for pair in zip(dense, found[checkpoint, method])]
              for method in least}
    score, *_ = mean_of_tasks([row["ruler"] for row in dense])
    return (f"{on_mean_of(tasks)} {checkpoint} scores {score:.1f} with dense attention. With the "
            f"least budgets it {clauses(losses, ['gains', 'loses', 'changes'], short, tasks)}")


def on_mean_of(tasks):
    return f"In {tasks[0]}" if len(tasks) == 1 else f"On the mean of {len(tasks)} tasks"


def clauses(
    gains,  # {method: [mean, low, high] of each task}
    verbs,  # for a mean whose interval is above 0, below, and for one that holds 0
    short,  # {method: its name}
    tasks,  # their names
):          # -> "is ahead of A under B and C, by 3.0 to 4.0 points; under D ..."
    means = {method: mean_of_tasks(cells) for method, cells in gains.items()}
    told = []
    for verb, sign in zip(verbs, (1, -1)):
        decided = [method for method, (_, *ends) in means.items()
                   if min(sign * end for end in ends) > 0]
        if decided:
            sizes = sorted(abs(means[method][0]) for method in decided)
            by = " to ".join(dict.fromkeys(f"{size:.1f}" for size in (sizes[0], sizes[-1])))
            but = {method: exceptions(gains[method], sign, tasks) for method in decided}
            it = "it " if told else ""
            told += [f"{it}{verb} under {listed(decided, short, but)}, by {by} points"]

    undecided = [method for method, (_, low, high) in means.items() if low <= 0 <= high]
    if undecided and told:
        told += [f"under {listed(undecided, short, {})} the difference is within its ±"]
    elif undecided:
        told = [f"{verbs[-1]} by no more than the ± under {listed(undecided, short, {})}, so "
                "nothing is decided"]
    return "; ".join(told) + "."


def exceptions(cells, sign, tasks):
    """The tasks that are clearly on the other side than their mean, which would hide them."""
    others = [task for task, (_, *ends) in zip(tasks, cells) if max(sign * end for end in ends) < 0]
    return f" (but not in {', '.join(others)})" if others else ""


def listed(methods, short, but):
    """quest 1/4, 1/8 and moba 1/8: a kind is named once. but: {method: what is said after it}"""
    words, kind = [], None
    for method in methods:
        name = "dense attention" if method == "dense" else short[method]
        if len(parts_of(method)) == 1 and method.partition(":")[0] == kind:
            name = name.removeprefix(kind).strip()
        kind = method.partition(":")[0]
        words.append(name + but.get(method, ""))
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last
