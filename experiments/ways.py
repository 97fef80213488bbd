"""
One method asked in several ways, each model and task: what snapkv_answer and moba_question have in
common.

An experiment gives compare(model, tokenizer, examples, method) -> {way: [mean, low, high] of
RULER's score in percent}. The table and the JSON, with what a result needs to be compared with
another, come from here, and `evaluate`: methods asked without files, for whatever is asked once.
Plain PyTorch computes. Checked in tests/test_snapkv_answer.py and tests/test_moba_question.py.
"""
import torch

import eval_niah
import niah
import sparse
from infra import files, runlog
from infra.answers import Outcome, by_length
from infra.cli import command, flag_parser, made_by, positive, seed, usable_device
from infra.report import mean
from model import Transformer
from triton_ops import backend


def by_batch(model, tokenizer, examples, methods, batch, selecting=()):
    """
    All examples, `batch` at a time: yields which they are, and of eval_niah.answer the answers to
    `methods` and H1's hits of those `selecting`.
    """
    cache = None
    for rows in by_length(examples, batch):
        some = [examples[i] for i in rows]
        answers, hits, cache = eval_niah.answer(model, tokenizer, some, methods, cache, selecting)
        yield rows, answers, hits


def evaluate(model, tokenizer, examples, methods, batch=16):
    """The answers to all examples, `batch` at a time: {method: Outcome}"""
    answers = {method: [None] * len(examples) for method in methods}
    for rows, of_batch, _ in by_batch(model, tokenizer, examples, methods, batch):
        for method, of_rows in of_batch.items():
            for i, of_row in zip(rows, of_rows):
                answers[method][i] = of_row
    return {method: Outcome.of(of_all) for method, of_all in answers.items()}


def flags(name, description, method):
    """Those of experiments/NAME.py; method: the one it asks if none is named."""
    parser = flag_parser(f"{name}.py", description)
    add = parser.add_argument
    add("--ckpt", nargs="+", required=True, metavar="PATH", help="models, as eval_niah.py takes "
        "them")
    add("--method", "--methods", default=method, metavar="METHOD",
        help=f"a {method.split(':')[0]}, as eval_niah.py takes it")
    add("--samples", type=positive, default=50, help="examples per task")
    add("--seed", type=seed, default=0, help="of the examples")
    add("--device", type=usable_device, default="cuda" if torch.cuda.is_available() else "cpu",
        help="cuda or cpu")
    add("--json", default=f"results/{name}.json", metavar="FILE", help="all results")
    return parser


def main(name, parser, argv, run):
    """run(args) as the whole of experiments/NAME.py."""
    args = parser.parse_args(argv)
    args.argv = argv
    command(f"{name}.py", lambda: run(args), args, "interrupted; what this call finished, if "
            "anything, is in {json}")


def run(name, args, kind, wanted, compare):
    """
    Ask all models, and save after each. ValueError, with the words `wanted`, if --method is not of
    the class `kind`.
    """
    backend.use("torch")
    report = made_by(args.argv, f"experiments/{name}.py", args.device)
    report |= {"settings": vars(args), "train": {}, "methods": {}, "prompts": {}, "scores": {}}
    models = [prepare(path, args) for path in args.ckpt]  # all, so that a wrong path is known now
    if not all(isinstance(method, kind) for _, _, method in models):
        raise ValueError(f"--method {args.method}: it must be {wanted}")

    for path, (asked, tokenizer, method) in zip(args.ckpt, models):
        tasks = eval_niah.choose_tasks(asked, [tokenizer])
        model = Transformer.from_pretrained(path, torch.float32, args.device)
        scores, prompts = {}, {}
        print(f"{path}, {sparse.name(method)}: RULER's score, %", flush=True)
        for task, examples in eval_niah.make_examples(asked, tokenizer, tasks).items():
            prompts[task] = {"hash": niah.prompt_hash(examples),
                             "keys_from": examples[0].keys_from,
                             "haystack_from": examples[0].haystack_from}
            scores[task] = compare(model, tokenizer, examples, method)
            of_ways = {way: score[0] for way, score in scores[task].items()}
            print(line(niah.TASKS[task].short, of_ways), flush=True)
        means = {way: mean([of[way][0] for of in scores.values()]) for way in scores[task]}
        print(line("mean", means), flush=True)

        report["train"][path] = runlog.training_record(path)
        report["methods"][path] = sparse.name(method)
        report["prompts"][path], report["scores"][path] = prompts, scores
        files.save(report, args.json)
    print(f"results in {args.json}")


def prepare(path, args):
    """-> flags of eval_niah.py for one model, its tokenizer, the method as its context sizes it"""
    asked = eval_niah.flags().parse_args([
        "--ckpt", path, "--methods", args.method, f"--samples={args.samples}",
        f"--seed={args.seed}", f"--device={args.device}"])
    _, tokenizers, methods = eval_niah.prepare(asked)
    return asked, next(iter(tokenizers.values())), list(methods)[-1]  # after dense


def line(title, scores):
    return f"    {title:6}" + "".join(f"{way:>10}{score:6.1f}" for way, score in scores.items())
