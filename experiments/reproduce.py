"""
The paper's result from scratch: each backbone trained with several seeds, asked under every method,
compared in one table.

    for each arm and seed:
        train.py       ->  out/reproduce/ARM-SEED-pretrained      unless it is there, whole
        train.py       ->  out/reproduce/ARM-SEED                 that, fine-tuned without ARL
        eval_niah.py   ->  results/reproduce/ARM-SEED.json        the nine cells, H1, H2
                           results/reproduce/ARM-SEED-more.json   other methods and block sizes
    then the summary   ->  results/reproduce/summary.md, summary.json, accuracy.png, hits.png

The arms differ in their pretraining alone; fine-tuning is the same, one optimizer step per batch.
Those with * are asked the nine cells alone.

    attention   OLMo 2's form                                   one optimizer step per batch
    joint *     attention, and before each dense step one       the extra step that official RAT+
                that sees 64 tokens back                        gives its baseline
    long *      attention with twice the batches                as many steps as memory, in about
                                                                the same time
    memory      Eq. 1 on keys and values, with ARL              two steps per batch
    converted * attention of the same seed, given a memory      the paper's OLMo 2 path; 18 % more
                                                                tokens, with ARL
    continued * attention of the same seed, on the batches of   the control of converted: is it the
                converted, without a memory                     tokens?

Of one seed, attention, joint and memory see the same samples in the same order (niah.py: a sample
is a function of seed and index): seeds are the unit of a test, and differences are paired by them.
A cell is bold if the p of a paired t test, corrected for the cells of its column (Holm), is below
0.05; three seeds seldom give that.

`python -m experiments.reproduce` does all of it on all visible GPUs; --arms and --seeds do a part,
and the summary is made of what is there. --ship writes checkpoints/ from seed 0. Checked in
tests/test_reproduce.py and, by hand, tests/test_report_tables.py. Read runs.py first.
"""
import math
import shlex
import shutil
import statistics
from pathlib import Path

import torch

import eval_niah
import niah
import train
from experiments import runs
from infra import runlog, weights
from infra.cli import command, flag_parser, natural, positive, seed
from infra.files import load, save, whole_or_nothing
from infra.report import best_heads, pyplot
from model import Transformer

ARMS = {  # pretraining: flags of train.py; {seed} is filled in
    "attention": "--recipe=micro --memory=off",
    "joint": "--recipe=micro --memory=off --joint=64",
    "long": "--recipe=micro --memory=off --steps=4000",
    "memory": "--recipe=micro --memory=on",
    "converted": "--recipe=micro-convert --init=out/reproduce/attention-{seed}-pretrained",
    "continued": "--recipe=micro-convert --init=out/reproduce/attention-{seed}-pretrained "
                 "--memory=off --arl=0",
}
LATER = "converted", "continued"         # arms that start from attention's pretraining
BRIEF = "joint", "long", *LATER          # arms that are asked NINE alone
CONTROLS = "joint", "long", "continued"  # in the tables, not in the plots

# The paper's settings at its context of 4,096, but for SnapKV's kernel: 15 bytes (cli.sized), as
# much text as its 5 tokens
NINE = eval_niah.METHODS
OTHERS = [
    "quest:budget=1/64,block_size=16",
    "moba:budget=1/4,block_size=128",
    "moba:budget=1/8,block_size=128",
    *(f"dilated:dilation={d},local=64,initial=4" for d in (4, 16, 64)),
    "dilated:dilation=none,local=1019,initial=4",  # StreamingLLM: 1,024 entries, the query's own
]                                                  # included
BY_CHANCE = " by chance"  # what H2's rows are called


# ---------------------------------------------------------------- one run

def run_of(arm, seed):
    """The run's folder."""
    return Path("out/reproduce") / f"{arm}-{seed}"


def stages_of(arm, seed, args):
    more = runs.passed_on(args.train, ("--arl", "--joint"))  # what arms differ in
    return runs.stages(run_of(arm, seed), ARMS[arm].format(seed=seed).split(), seed, more)


def do(arm, seed, prompts, args, call):
    """
    Train and evaluate, unless it is done: a report of this model that was asked these prompts.
    call: runs.on_all_gpus's.
    """
    run, results = run_of(arm, seed), Path(args.results)
    log, record = run.with_suffix(".log"), results / f"{run.name}-train.json"
    parts = {"": NINE}
    if arm not in BRIEF:
        parts = {"": [*NINE, "--hits", f"--random={args.random}"], "-more": OTHERS}
    files = {part: results / f"{run.name}{part}.json" for part in parts}

    # a folder that cannot be made and a damaged file are known before the training
    results.mkdir(parents=True, exist_ok=True)
    there = {part: read(file) for part, file in files.items()}
    model_of = load(record) if record.exists() else None

    if arm in LATER:
        source, flags = next(iter(stages_of("attention", seed, args).items()))
        if not runs.finished(source, flags):
            raise ValueError(f"{run.name} starts from {source}, which is not trained to its end: "
                             f"--arms attention {arm}")
    stages = stages_of(arm, seed, args)
    for flags in [flags for folder, flags in stages.items() if not runs.finished(folder, flags)]:
        call(["train.py", *flags], log)

    # results of the model that was here before are no results
    made = runlog.training_record(run)
    if made != model_of:
        there = {}
        for part, file in files.items():
            file.unlink(missing_ok=True)
            shutil.rmtree(run / f"niah{part}", ignore_errors=True)
        save(made, record)

    for part, methods in parts.items():
        flags = ["--ckpt", str(run), f"--samples={args.samples}", f"--seed={args.eval_seed}",
                 f"--batch={args.batch}", f"--out={run}/niah{part}", f"--json={files[part]}",
                 "--methods", *methods]
        report, asked = there.get(part), vars(eval_niah.flags().parse_args(flags))
        if report and prompts_in(report) != prompts:
            report = None
            shutil.rmtree(run / f"niah{part}", ignore_errors=True)  # answers to others
        if not report or any(report["settings"].get(key) != asked[key]
                             for key in ("hits", "random")):
            call(["eval_niah.py", *flags], log)


def do_all(args):
    """Converted and continued models come after those that they start from."""
    arms, seeds = dict.fromkeys(args.arms), dict.fromkeys(args.seeds)
    for arm in arms:
        for flags in stages_of(arm, 0, args).values():
            settings = train.parse(flags)  # a wrong flag is known now, once
    if not arms:
        return
    # all arms are fine-tuned alike, so they are asked alike
    prompts = runs.prompts_of(settings, args.samples, args.eval_seed)
    staying = {file: prompts_in(report) for arm, seed, file, report in reports(args.results)
               if arm not in arms or seed not in seeds}
    runs.refuse_other_prompts(staying, prompts)
    for phase in [arm for arm in arms if arm not in LATER], [arm for arm in arms if arm in LATER]:
        jobs = [lambda call, arm=arm, seed=seed: do(arm, seed, prompts, args, call)
                for seed in seeds for arm in phase]
        runs.on_all_gpus(jobs, args.per_gpu)


# ---------------------------------------------------------------- the results that are there

def read(file):
    """A report of eval_niah.py that ran to its end, else None."""
    report = load(file, "finished", "settings", "results") if file.exists() else None
    return report if report and report["finished"] else None


def prompts_in(report):
    """{task: hash}"""
    return {row["task"]: row["prompts"] for row in report["results"]}


def reports(folder):
    """(arm, seed, file, report) of each result that is there, whole, in the order of ARMS."""
    for arm, seed, file in runs.result_files(folder, ARMS):
        if report := read(file):
            yield arm, seed, file, report


def read_results(folder):
    """
    {arm: {seed: report}}; with the rows of its -more.json, if it is whole, and the record of its
    training.
    """
    found, first = {}, {}
    for arm, seed, file, report in reports(folder):
        more = read(file.with_stem(f"{file.stem}-more"))
        if more and all(more["settings"][key] == report["settings"][key]
                        for key in ("samples", "seed")):
            report["results"] += [row for row in more["results"] if row["method"] != "dense"]
        report["train"] = load(file.with_stem(f"{file.stem}-train"), "settings", "step", "seconds",
                               "device", "commit")

        asked = {}  # {method: {(task, n, prompts)}}
        for row in report["results"]:
            prompts = row["task"], row["n"], row["prompts"]
            asked.setdefault(row["method"], set()).add(prompts)
        first = first or asked
        if any(asked.get(method, prompts) != prompts for method, prompts in first.items()):
            raise ValueError(f"{file} asks other prompts than the first result there: move it "
                             "away, and run again")
        found.setdefault(arm, {})[seed] = report
    return found


def first_report(found):
    """Any of them, for what all have in common: settings, tasks, methods."""
    return next(iter(next(iter(found.values())).values()))


def means(report):
    """
    {method: mean over tasks} in percent; chosen by chance (H2): {method + " by chance": likewise,
    over its draws}.
    """
    cells = {}
    for row in report["results"]:
        name = row["method"] + ("" if row["random"] is None else BY_CHANCE)
        cells.setdefault(name, []).append(row["ruler"][0])
    return {name: statistics.fmean(values) for name, values in cells.items()}


def hit_rates(report):
    """H1: {method: hit rates of all heads, mean over tasks, best first}"""
    cells = {}
    for row in report["results"]:
        if row["hits"]:
            cells.setdefault(row["method"], []).append(torch.tensor(row["hits"]).flatten())
    return {method: torch.stack(rates).mean(0).sort(descending=True).values
            for method, rates in cells.items()}


# ---------------------------------------------------------------- is it more than chance?

def p_of_t(t, df):
    """
    Two-sided p of Student's t: its finite sum for whole degrees of freedom (Abramowitz and Stegun
    26.7.3, 26.7.4).
    """
    angle, odd = math.atan(abs(t) / math.sqrt(df)), df % 2
    inside = 2 / math.pi * angle if odd else 0.0
    term = math.sin(angle) * (2 / math.pi * math.cos(angle) if odd else 1.0)
    for k in range(2 + odd, df + 1, 2):
        inside += term
        term *= math.cos(angle) ** 2 * (k - 1) / k
    return 1 - inside


def holm(ps):
    """
    {key: p} -> {key: p corrected for their number}: by chance alone, any of them is below 0.05 in
    one of 20 tables.
    """
    corrected, least = {}, 0.0
    for n, (key, p) in enumerate(sorted(ps.items(), key=lambda item: item[1])):
        least = max(least, min(1.0, (len(ps) - n) * p))
        corrected[key] = least
    return corrected


def t_interval(values):
    """[low, high] of a mean: Student's 95 % interval; None of fewer than two values"""
    if len(values) < 2:
        return None
    low, high = 0.0, 1e9  # of t where p is 0.05, by halves
    for _ in range(100):
        t = (low + high) / 2
        low, high = (t, high) if p_of_t(t, len(values) - 1) > 0.05 else (low, t)
    middle, half = statistics.fmean(values), t * statistics.stdev(values) / math.sqrt(len(values))
    return [middle - half, middle + half]


def compare(values, base):
    """
    {seed: score} of an arm against attention's: {"gain", "interval", "p", "by_seed"} of the seeds
    that both have, None if there is none. p: of a paired t test, None where differences do not
    differ. interval: of 95 %, None of one seed.
    """
    pairs = [values[seed] - base[seed] for seed in values if seed in base]
    if not pairs:
        return None
    gain, p = statistics.fmean(pairs), None
    deviation = statistics.stdev(pairs) if len(pairs) > 1 else 0.0
    if deviation:
        p = p_of_t(gain / deviation * math.sqrt(len(pairs)), len(pairs) - 1)
    return {"gain": gain, "interval": t_interval(pairs), "p": p, "by_seed": pairs}


def column(values, base, seeds):
    """
    {method: compare's} of an arm's {method: [per seed]} against attention's, and "holm": p
    corrected for all of these cells. seeds: the arm's, and attention's.
    """
    cells = {}
    for method in values:
        if method in base:
            of_arm, of_base = zip(seeds[0], values[method]), zip(seeds[1], base[method])
            if cell := compare(dict(of_arm), dict(of_base)):
                cells[method] = cell
    ps = {method: cell["p"] for method, cell in cells.items() if cell["p"] is not None}
    corrected = holm(ps)
    return {method: cell | {"holm": corrected.get(method)} for method, cell in cells.items()}


# ---------------------------------------------------------------- the summary

def summarise(found):
    """
    {"scores": {arm: {method: [per seed]}},
     "by_chance": the same where entries are chosen by chance,
     "hits": of the best 5 % of heads,
     "against_attention": {each of these: {arm: column's}},
     "runs": {arm: {seed: how it was made}}}
    """
    def over_seeds(of_report):
        return {arm: transpose([of_report(report) for report in reports.values()])
                for arm, reports in found.items()}

    def chosen(report, chance):
        return {m: x for m, x in means(report).items() if m.endswith(BY_CHANCE) == chance}

    def best(report):
        return {m: 100 * float(best_heads(rates)) for m, rates in hit_rates(report).items()}

    kinds = {"scores": over_seeds(lambda report: chosen(report, False)),
             "by_chance": over_seeds(lambda report: chosen(report, True)),
             "hits": over_seeds(best)}
    against = {kind: {} for kind in kinds}
    for kind, of in kinds.items():
        for arm, of_arm in of.items():
            if arm != "attention" and "attention" in of:
                seeds = list(found[arm]), list(found["attention"])
                against[kind][arm] = column(of_arm, of["attention"], seeds)

    made = {}
    for arm, reports in found.items():
        for seed, report in reports.items():
            asked = {key: report[key] for key in ("command", "commit", "device", "torch")}
            made.setdefault(arm, {})[seed] = {"train": report["train"], "eval": asked}
    return kinds | {"against_attention": against, "runs": made}


def transpose(dicts):
    """
    [{key: x}] -> {key: [x]}, of the keys that all have: those of seeds that are asked less so far
    must wait.
    """
    return {key: [each[key] for each in dicts]
            for key in dicts[0] if all(key in each for each in dicts)}


def seven_digits(commit):
    """Of a commit, and whether the code was that commit's."""
    return commit[:7] + ("+dirty" if commit.endswith("+dirty") else "")


def cell(values, plus_minus=" ± "):
    """Mean and sample standard deviation of a score over seeds; None: nobody was asked."""
    if values is None:
        return ""
    mean = f"{statistics.fmean(values):.1f}"
    if len(values) == 1:
        return mean
    return f"{mean}{plus_minus}{statistics.stdev(values):.1f}"


def gap(against):
    """
    A cell of `column`: the gain, p of this cell alone, and bold if it holds for the column; None:
    nothing to compare.
    """
    if against is None:
        return ""
    gain = f"{against['gain']:+.1f}"
    if against["p"] is None:
        return gain
    if against["holm"] < 0.05:
        gain = f"**{gain}**"
    return f"{gain} ({against['p']:.2g})"


def markdown(summary, found):
    """The summary as tables: scores, H2, H1, and how each run was made."""
    def table(title, kind):
        arms = {arm: of for arm, of in summary[kind].items() if of}  # those that were asked any
        if not arms:
            return []
        compared = [arm for arm in ("memory", "converted") if arm in arms and "attention" in arms]
        head = [*arms, *(f"{arm} - attention" for arm in compared)]
        lines = ["", title, "", "| | " + " | ".join(head) + " |", "|---|" + "---|" * len(head)]
        for method in dict.fromkeys(m for of in arms.values() for m in of):
            cells = [cell(of.get(method)) for of in arms.values()]
            against = summary["against_attention"][kind]
            cells += [gap(against[arm].get(method)) for arm in compared]
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
        return lines

    settings = first_report(found)["settings"]
    seeds = ", ".join(f"{arm} {len(reports)}" for arm, reports in found.items())
    lines = table(f"RULER's score, %, mean of tasks: mean and sample standard deviation over seeds "
                  f"({seeds}); {settings['samples']} samples a task, protocol "
                  f"{settings['protocol']}, context {settings['context_len']}. Differences are "
                  "paired by seed; in brackets p of a paired t test, of that cell alone. Bold: "
                  "below 0.05 also when corrected for the cells of its column (Holm). The test "
                  "takes differences for normal; by their signs alone, three seeds give no p below "
                  "0.25.", "scores")[1:]
    lines += table("H2, entries chosen by chance:", "by_chance")
    lines += table("H1, hit rate of the best 5 % of heads, %:", "hits")
    lines += ["", "Training, seed by seed:", "", "| | recipe | steps | minutes of steps | tokens/s "
              "| MFU | device | commit |", "|---|---|---|---|---|---|---|---|"]
    for arm, reports in found.items():
        for seed, report in reports.items():
            lines += training_rows(f"{arm} {seed}", report["train"])
    return "\n".join(lines) + "\n"


def training_rows(name, made):
    """A row for each stage of a run, the first one first. made: the last one's record."""
    rows = []
    while made:
        commit = seven_digits(made["commit"])
        rows.insert(0, f"| {name} | {made['settings']['recipe']} | {made['step']} | "
                       f"{made['seconds'] / 60:.1f} | {made['tokens_per_second']:,} | "
                       f"{made['mfu'] or ''} | {made['device']} | {commit} |")
        made = made.get("from")  # an --init of an older version has none
    return rows


# ---------------------------------------------------------------- plots

def plots(found, folder):
    """
    Of the arms that are no controls. accuracy.png: score by budget, a row per method and a column
    per task. hits.png: hit rates by rank of the head.
    """
    found = {arm: reports for arm, reports in found.items() if arm not in CONTROLS}
    if not found:
        return
    if not (plt := pyplot()):
        return

    report = first_report(found)
    tasks = list(dict.fromkeys(row["task"] for row in report["results"]))
    nine = [method for method in report["settings"]["methods"] if method != "dense"]
    figure, axes = plt.subplots(3, len(tasks), figsize=(1 + 2.4 * len(tasks), 7.5), sharex=True,
                                sharey=True, squeeze=False)
    for kind, row in zip(("quest", "moba", "snapkv"), axes):
        methods = [method for method in nine if method.startswith(kind)]
        for task, axis in zip(tasks, row):
            for arm, reports in found.items():
                columns = [scores_of(reports, method, task) for method in methods]
                deviations = [statistics.stdev(c) if len(c) > 1 else 0 for c in columns]
                axis.errorbar([0, 1, 2], [statistics.fmean(c) for c in columns], deviations,
                              marker="o", ms=4, capsize=2, label=arm)
            axis.set(title=f"{kind} {niah.TASKS[task].short}", ylim=(-4, 104), xticks=[0, 1, 2],
                     xticklabels=eval_niah.BUDGETS)
    axes[0, 0].legend(fontsize=8)
    for row in axes:
        row[0].set_ylabel("RULER's score, %")
    for axis in axes[-1]:
        axis.set_xlabel("budget")
    figure.tight_layout()
    figure.savefig(folder / "accuracy.png", dpi=110)

    asked = {arm: reports for arm, reports in found.items() if arm not in BRIEF}
    if not asked:
        return
    with_hits = [method for method in nine if not method.startswith("moba")]
    figure, axes = plt.subplots(1, len(with_hits), figsize=(3.2 * len(with_hits), 3.2), sharey=True)
    for method, axis in zip(with_hits, axes):
        for arm, reports in asked.items():
            rates = [hit_rates(report)[method] for report in reports.values()]
            rates = torch.stack(rates).mean(0)
            axis.plot(range(1, len(rates) + 1), 100 * rates, label=arm)
        axis.set(title=method.split(",")[0], xlabel="head, best first")
    axes[0].set_ylabel("answers hit, %")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(folder / "hits.png", dpi=110)


def scores_of(reports, method, task):
    """The score of each seed, of what the method chose itself."""
    return [row["ruler"][0] for report in reports.values() for row in report["results"]
            if (row["method"], row["task"], row["random"]) == (method, task, None)]


# ---------------------------------------------------------------- python -m experiments.reproduce

def ship(args):
    """
    checkpoints/: seed 0 of attention and memory in bf16, with train.json, which tells how they were
    made.
    """
    for folder in runlog.SHIPPED:
        run, flags = list(stages_of(folder.name, 0, args).items())[-1]
        if not runs.finished(run, flags):
            raise ValueError(f"{run} is not trained to its end: --ship needs seed 0 of attention "
                             "and memory")
        source = weights.resolve(run)
        Transformer.from_pretrained(source, torch.bfloat16).save_pretrained(folder)
        shutil.copy(source / "train.json", folder)
        print(f"{source} in bf16: {folder}")


def flags():
    parser = flag_parser("reproduce.py", "The paper's comparison from scratch.")
    add = parser.add_argument
    add("--arms", nargs="*", choices=ARMS, default=list(ARMS), metavar="ARM",
        help=f"which to train and evaluate: {', '.join(ARMS)}; none: only the summary of what is "
        "there")
    add("--seeds", nargs="+", type=natural, default=[0, 1, 2], help="of weights and training data")
    add("--samples", type=positive, default=200, help="examples per task; the same for all runs")
    add("--eval_seed", type=seed, default=0, help="of the examples; who changes a recipe looks at "
        "another seed's until it is final")
    add("--random", type=positive, default=1, metavar="SEEDS",
        help="H2: draws of a selection by chance, for each model")
    add("--batch", type=positive, default=200, help="prompts at a time in the evaluation")
    add("--train", type=shlex.split, default="", metavar="FLAGS", help="more flags of train.py, "
        "for both stages of every run: --train='--steps=2 --batch=2' --results=out/trial is a "
        "trial; delete out/reproduce after it")
    add("--per_gpu", type=positive, default=1, metavar="RUNS", help="runs at a time on each GPU; 2 "
        "takes less time in all, but then the tokens per second of one run mean little")
    add("--results", default="results/reproduce", metavar="DIR",
        help="where the JSON of each run and the summary go")
    add("--ship", action="store_true", help="at the end, write checkpoints/ from seed 0")
    return parser


def run(args):
    do_all(args)
    found = read_results(args.results)
    if not found:
        raise ValueError(f"{args.results} holds no finished run: name --arms to make some")
    summary, folder = summarise(found), Path(args.results)
    save(summary, folder / "summary.json")
    text = markdown(summary, found)
    whole_or_nothing(folder / "summary.md", lambda file: file.write_text(text))
    print("\n" + text)
    if args.ship:
        ship(args)
    plots(found, folder)


def main(argv=None):
    args = flags().parse_args(argv)
    command("reproduce.py", lambda: run(args), interrupted="interrupted; what is finished is kept, "
            "and the same command goes on")


if __name__ == "__main__":
    main()
