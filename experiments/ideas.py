"""
A short loop for ideas: is a memory, or a selector, better than what there is, beyond noise? It
takes five to seven minutes on two CPU cores and half a minute on an H200.

    start    checkpoints/nano: attention in 0.7M parameters, which finds needles in 1,024 bytes
    joint    the control: trained on without a memory, two passes a step as the others take
    dilated  a second control, if it is named: the passes of ARL without a memory
    NAME     given the memory of that name, and trained on (recipe nano-convert)

All of a seed take the same batches and as many optimizer steps. Then all are asked the same prompts
under the same methods, and differences are paired by prompt:

    gain(arm) = mean over prompts of (mean over sparse methods of score(arm) - score(joint))

    python -m experiments.ideas                                     the paper's memory: decay
    python -m experiments.ideas --memories values head-gate convolution
    python -m experiments.ideas --also shift.py --memories shift    a memory of your own
    python -m experiments.ideas --also bestkey.py --memories --methods moba:budget=1/8 \\
                                bestkey:budget=1/8              a selector of your own, asked alone

`python train.py` without flags is the first of these with fewer steps. A trained arm lies in
out/ideas, and is not trained again unless --train or its memory's code has changed. What --also
brings is checked before anything is trained (check.py).

What the loop cannot say is whether an idea helps a large model. Its start was chosen among four
because the paper's memory gains there at all (docs/training.md). Checked in tests/test_ideas.py.
Read memories.py first, where a memory of your own is written.
"""
import hashlib
import inspect
import shlex
import statistics
import time
from pathlib import Path

import torch

import eval_niah
import niah
import sparse
import train
from experiments import check, memories, runs  # memories puts its classes into memory.MEMORIES
from infra.cli import (ROOT, command, flag_parser, made_by, natural, seed, sized,
                       usable_device, whole)
from infra.files import save, told_to_end
from infra.report import Z, mean, short_names
from infra.tokenizers import get_tokenizer
from memory import MEMORIES
from model import Transformer
from recipes import NANO_TASKS
from triton_ops import backend

START = ROOT / "checkpoints" / "nano"
CONTEXT = 1024
TASKS = [task for task in NANO_TASKS if task != "niah_single_2"]  # which all arms find: tells none
METHODS = ["quest:budget=1/8", "quest:budget=1/16", "moba:budget=1/8", "snapkv:budget=1/8"]
BATCH = 64  # prompts at a time
CONTROLS = {"joint": ["--memory=off", "--arl=0", "--joint=64"],
            "dilated": ["--memory=off", "--arl=64"]}
# A minute or two less than the recipe's 96 steps; the rate of the gates was chosen for that, on
# prompts of seed 7.
LESSON = ["--train=--steps=64 --memory_lr=1e-2", "--out=out/lesson"]


# ---------------------------------------------------------------- the arms

def arms_of(args):
    """{arm: its train.py flags, None for the start}, for each seed: [(seed, arms), ...]"""
    for name in args.memories:
        if name not in MEMORIES and name != "dilated":
            raise ValueError(f"--memories: there is no {name}; there are {', '.join(MEMORIES)}, "
                             "the control dilated, and what --also FILE.py brings")
    common = ["--recipe=nano-convert", f"--init={START}", "--resume", f"--out={args.out}",
              f"--device={args.device}", f"--kernels={args.kernels}", "--compile=off",
              *runs.passed_on(args.train, (*runs.OURS, "--joint", "--arl", "--resume"))]
    of_seeds = []
    for number in args.seeds:
        arms = {"start": None}
        for name in (["joint"] if args.memories else []) + args.memories:
            own = CONTROLS.get(name)
            folder = f"{name}-{number}"
            if own is None:
                own, folder = [f"--memory={name}"], f"{folder}-{code_of(MEMORIES[name])}"
            if args.train:  # other flags make another model
                folder += "-" + hashlib.sha256(shlex.join(args.train).encode()).hexdigest()[:4]
            arms[name] = [*common, *own, f"--seed={number}", f"--name={folder}"]
        of_seeds.append((number, arms))
    return of_seeds


def code_of(kind):
    """Six hex digits of the files that a memory's class, and those that it derives from, are in."""
    files = {inspect.getfile(owner) for owner in kind.__mro__ if issubclass(owner, torch.nn.Module)
             and owner.__module__.partition(".")[0] != "torch"}
    content = b"".join(Path(file).read_bytes() for file in sorted(files))
    return hashlib.sha256(content).hexdigest()[:6]


def folder_of(flags):
    """The folder of the model that these flags of train.py make; None: the start's."""
    if flags is None:
        return START
    settings = train.parse(flags)
    return Path(settings.out) / settings.name


def make(arms):
    """Train what is not there yet."""
    for name, flags in arms.items():
        if flags and not runs.finished(folder_of(flags), flags):
            print(f"\n{name}: python train.py {shlex.join(flags)}", flush=True)
            train.train(train.parse(flags))


# ---------------------------------------------------------------- the questions

def questions(args, tokenizer):
    """Examples of all tasks, by task: the same for all arms."""
    return {task: [niah.make_example(task, CONTEXT, tokenizer, args.eval_seed, index, "sft")
                   for index in range(args.samples)] for task in TASKS}


def ask(path, methods, args, tokenizer, examples):
    """-> {method's text: RULER's score of each prompt, 0 to 1, task after task}"""
    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    model, cache = Transformer.from_pretrained(path, dtype, args.device), None
    scores = {text: [] for text in methods}
    for of_task in examples.values():
        for first in range(0, len(of_task), BATCH):
            some = of_task[first:first + BATCH]
            answers, _, cache = eval_niah.answer(model, tokenizer, some, [*methods.values()], cache)
            for text, method in methods.items():
                texts = [answer.text for answer in answers[method]]
                scores[text] += eval_niah.ruler_scores(texts, some)
    return scores


# ---------------------------------------------------------------- the verdict

def paired(a, b):
    """
    Mean of b - a over prompts, of scores 0 to 1, and half its 95 % interval, in percent. Not
    Newcombe's (report.difference), which is of proportions: these are means of several answers.
    """
    differences = [100 * (y - x) for x, y in zip(a, b, strict=True)]
    half = Z * statistics.stdev(differences) / len(differences) ** 0.5
    return statistics.fmean(differences), half


def by_prompt(lists):
    """Of lists of scores by prompt: each prompt's mean over them."""
    return [*map(statistics.fmean, zip(*lists, strict=True))]


def pooled(scores, texts):
    """Of {method: scores by prompt}: each prompt's mean over these methods."""
    return by_prompt(scores[text] for text in texts)


def over_seeds(found, arm):
    """{method: scores by prompt} of an arm, each prompt's mean over the seeds of training."""
    of_arm = [scores[arm] for scores in found.values()]
    return {text: by_prompt(scores[text] for scores in of_arm) for text in of_arm[0]}


def verdict(gain, half):
    return "better" if gain > half else "worse" if gain < -half else "not told apart"


def report(found, methods):
    """
    found: {seed: {arm: {method: scores by prompt}}} -> the tables as text, and as JSON has them:
    {arm: {"scores": {method: percent}; but for start and joint "gains": {method: [gain, half]},
    "gain", "half", "verdict" over the sparse methods, "over_start" likewise [gain, half] over the
    start, and "by_seed", the gain of each seed}}
    """
    reading = [text for text in methods if text != "dense"]
    arms = list(next(iter(found.values())))
    scores = {arm: over_seeds(found, arm) for arm in arms}
    rows = {arm: {"scores": {text: 100 * mean(scores[arm][text]) for text in methods}}
            for arm in arms}
    width, short = 2 + max(map(len, [*arms, "score, %"])), [*short_names(methods).values()]
    column = 2 + max(11, *map(len, short))

    def line(name, cells, end=""):
        return f"{name:{width}}" + "".join(f"{cell:>{column}}" for cell in cells) + end

    lines = [line("score, %", short)]
    lines += [line(arm, [f"{x:.1f}" for x in rows[arm]["scores"].values()]) for arm in arms]
    others = [arm for arm in arms if arm not in ("start", "joint")]
    if not others:
        return "\n".join(lines), rows

    lines += ["", line("- joint", short, "   mean of sparse")]
    for arm in others:
        row = rows[arm]
        row["gains"] = {text: paired(scores["joint"][text], scores[arm][text]) for text in methods}
        row["gain"], row["half"] = paired(pooled(scores["joint"], reading),
                                          pooled(scores[arm], reading))
        row["verdict"] = verdict(row["gain"], row["half"])
        row["over_start"] = paired(pooled(scores["start"], reading), pooled(scores[arm], reading))
        row["by_seed"] = [paired(*(pooled(of_seed[name], reading) for name in ("joint", arm)))[0]
                          for of_seed in found.values()]
        end = f"   {row['gain']:+.1f} ±{row['half']:.1f} {row['verdict']}"
        if len(found) > 1:
            end += f" (by seed {' '.join(f'{x:+.1f}' for x in row['by_seed'])})"
        cells = [f"{gain:+.1f} ±{half:.1f}" for gain, half in row["gains"].values()]
        lines.append(line(arm, cells, end))

    best, *rest = sorted(others, key=lambda arm: -rows[arm]["gain"])
    if rest:
        ahead = []
        for arm in rest:
            gain, half = paired(pooled(scores[arm], reading), pooled(scores[best], reading))
            ahead.append(f"{arm} {gain:+.1f} ±{half:.1f}")
        lines += ["", f"{best} has the most; minus the others, over the sparse methods: "
                  + ", ".join(ahead)]
    return "\n".join(lines), rows


def selectors(found, methods):
    """How methods differ from the first sparse one, for each arm, as lines of text."""
    first, *others = [text for text in methods if text != "dense"]
    short, lines = short_names(methods), []
    for arm in next(iter(found.values())):
        scores = over_seeds(found, arm)
        for other in others:
            gain, half = paired(scores[first], scores[other])
            lines.append(f"{arm}: {short[other]} - {short[first]} {gain:+.1f} ±{half:.1f} "
                         f"{verdict(gain, half)}")
    return "\n".join(lines)


# ---------------------------------------------------------------- python -m experiments.ideas

def flags():
    parser = flag_parser("ideas.py", "A short loop for ideas: memories and selectors, trained and "
                         "asked in minutes beside a control.")
    add = parser.add_argument
    add("--memories", nargs="*", default=["decay"], metavar="NAME", help="of memory.MEMORIES, each "
        "beside attention that is trained on as long (joint); none: the start alone is asked")
    add("--methods", "--method", nargs="+", metavar="METHOD", default=METHODS,
        help="as eval_niah.py takes them; dense is added")
    add("--also", nargs="+", default=[], metavar="FILE", help="Python files that are run before, "
        "which put a memory into memory.MEMORIES or a selector into sparse.METHODS")
    add("--seeds", nargs="+", type=natural, default=[0], help="of training, one model each")
    add("--samples", type=whole(2, 100_000), default=64,
        help=f"prompts of each of {len(TASKS)} tasks")
    add("--eval_seed", type=seed, default=0, help="of the prompts; whoever changes an idea until "
        "it wins looks at another seed's, and at this one's at the end")
    add("--train", type=shlex.split, default="", metavar="FLAGS", help="more flags of train.py for "
        "all arms, as --train='--steps=256'")
    add("--out", default="out/ideas", metavar="DIR", help="folder of the trained arms")
    add("--json", metavar="FILE", help="the result; None: results-DATE-TIME.json in --out")
    add("--device", type=usable_device, default="cuda" if torch.cuda.is_available() else "cpu",
        help="cuda or cpu")
    backend.add_flag(parser)
    return parser


def run(args):
    """-> {arm: its row}, as report has it"""
    started = time.time()
    backend.use(args.kernels)
    for file in args.also:
        memories.bring(file)
    tokenizer = get_tokenizer("bytes")
    texts = dict.fromkeys(["dense", *(sized(text, CONTEXT, tokenizer, sparse.METHODS)
                                      for text in args.methods)])
    methods = {text: sparse.parse(text, CONTEXT) for text in texts}

    of_seeds = arms_of(args)
    for method in methods.values():  # before minutes of training
        check.check_method(method, whole=False)
    for name in args.memories:
        if name in MEMORIES:
            check.check_memory(name)
    for _, arms in of_seeds:
        make(arms)

    examples, found = questions(args, tokenizer), {}
    n, tasks = sum(map(len, examples.values())), ", ".join(eval_niah.names()[t] for t in TASKS)
    print(f"\nasking {n} prompts of up to {CONTEXT:,} bytes ({tasks}) under {len(methods)} "
          f"methods\n{'  '.join(methods)}", flush=True)
    for number, arms in of_seeds:
        found[number] = {}
        for arm, of_arm in arms.items():
            since = time.time()
            found[number][arm] = ask(folder_of(of_arm), methods, args, tokenizer, examples)
            print(f"  {arm}, seed {number}: {time.time() - since:.0f} s", flush=True)

    table, rows = report(found, methods)
    print(f"\n{table}\n")
    if args.methods != METHODS and len(methods) > 2:
        print(selectors(found, methods) + "\n")
    print("±: half of a 95 % interval over prompts. Another seed of training moves a gain too: "
          "--seeds 0 1 2 tells by how much.")
    seconds = round(time.time() - started, 1)
    result = {**made_by(args.argv, "experiments/ideas.py", args.device), "settings": vars(args),
              "seconds": seconds, "prompts": {task: niah.prompt_hash(of_task)
                                              for task, of_task in examples.items()},
              "rows": rows, "scores": found}
    file = args.json or Path(args.out) / time.strftime("results-%Y%m%d-%H%M%S.json")
    save(result, file)
    print(f"all scores in {file}; {seconds / 60:.1f} minutes")
    return rows


# ---------------------------------------------------------------- python train.py

def lesson():
    """The paper's memory, for the attention model of checkpoints/nano; what it gained, in words."""
    print("checkpoints/nano is attention that finds needles in 1,024 bytes. It is trained on "
          "twice, on the same batches and for as many steps: as it is (joint, the control), and "
          "with the memory of Eq. 1 on its keys and values (decay). Then all are asked for "
          "needles, reading all of the prompt or a part. Ctrl-C stops; the same command goes on.")
    args = flags().parse_args(LESSON)
    args.argv = LESSON
    rows = run(args)
    print("\n" + told(rows))
    print("\nNext: python look.py (what the heads select, drawn)   python -m experiments.ideas "
          "--memories values head-gate convolution (other memories, or yours)")


def told(rows):
    """What the lesson's rows say, in sentences."""
    decay = rows["decay"]
    gain, half = decay["over_start"]
    quest = next(text for text in decay["scores"] if text.startswith("quest:budget=1/8"))
    found = {arm: f"{row['scores'][quest]:.0f} %" for arm, row in rows.items()}
    dense = {arm: f"{row['scores']['dense']:.0f} %" for arm, row in rows.items()}
    how = {"better": "More answers are found with the memory than by the control",
           "worse": "Fewer answers are found with the memory than by the control",
           "not told apart": "Memory and control cannot be told apart"}[decay["verdict"]]
    return (f"{how}: {decay['gain']:+.1f} ±{decay['half']:.1f} points over the four sparse "
            f"methods, and {gain:+.1f} ±{half:.1f} beside the model that both come from. Where a "
            f"step reads an eighth of the prompt by Quest, the memory finds {found['decay']} of "
            f"the answers, the control {found['joint']}, and that model {found['start']}. Reading "
            f"all, they find {dense['decay']}, {dense['joint']} and {dense['start']}: a training "
            "this short costs some of what was known.")


def main(argv=None):
    args = flags().parse_args(argv)
    args.argv = argv
    command("ideas.py", lambda: run(args), args, "interrupted; what is trained is kept, and the "
            "same command goes on")


if __name__ == "__main__":
    told_to_end()
    main()
