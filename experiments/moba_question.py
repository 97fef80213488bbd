"""
Where does MoBA lose the needle: in the context, or when the question looks for it? The same budget, for a part of the prompt.

    dense      every token reads all before it
    moba       every token reads its blocks
    context    MoBA for the context, while the last tokens of the prompt, where the question stands, read all
    question   dense for the context, MoBA for those last tokens

MoBA decodes densely, so it can fail in two ways: tokens of the context miss what made their keys and values findable, or the
question picks blocks by mean keys that do not show the needle, and the first byte of the answer is written without it. If
"context" is near dense, the second is to blame; if "question" is, the first.

    python experiments/moba_question.py --ckpt checkpoints/attention checkpoints/memory --samples 20

Plain PyTorch computes, one prompt at a time. Checked in tests/test_moba_question.py.
"""
import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import backend  # noqa: E402
import eval_niah  # noqa: E402
import niah  # noqa: E402
import sparse  # noqa: E402
from model import Transformer  # noqa: E402


@dataclass(frozen=True)
class Part(sparse.MoBA):
    """MoBA for the last `question` tokens of the prompt, or for those before them. Of full rows: no padding."""
    question: int = 192
    of: str = "context"  # or "question"

    def prefill(self, q, k, v, start, dice):
        y, selected = super().prefill(q, k, v, start, dice)
        full, _ = sparse.Dense().prefill(q, k, v, start, dice)
        last = torch.arange(q.shape[1], device=q.device) >= q.shape[1] - self.question  # (T,)
        return torch.where((last == (self.of == "question"))[:, None, None], y, full), selected


def compare(model, tokenizer, examples, method, question):
    """RULER's score of the examples in percent, mean and 95 % interval: {"dense": [3], "moba": [3], "context": [3], "question": [3]}"""
    part = lambda of: Part(**vars(method), question=question, of=of)
    methods = {"dense": sparse.Dense(), "moba": method, "context": part("context"), "question": part("question")}
    outcomes = eval_niah.evaluate(model, tokenizer, examples, list(methods.values()), batch=1)
    return {name: eval_niah.scores(outcomes[m].texts, examples)["ruler"] for name, m in methods.items()}


def flags():
    parser = argparse.ArgumentParser(description="MoBA for the context alone, and for the question alone.", allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"moba_question.py: {message}\n")
    add = parser.add_argument
    add("--ckpt", nargs="+", required=True, metavar="PATH", help="models, as eval_niah.py takes them")
    add("--method", default="moba:budget=1/8", metavar="METHOD", help="a moba, as eval_niah.py takes it")
    add("--question", type=eval_niah.positive, default=192, metavar="TOKENS", help="of the prompt, its last ones: the question and an answer prefix (up to 150 bytes in protocol sft, 290 in base)")
    add("--samples", type=eval_niah.positive, default=50, help="examples per task")
    add("--seed", type=int, default=0, help="of the examples")
    add("--device", type=eval_niah.usable_device, default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    add("--json", default="results/moba_question.json", metavar="FILE", help="all results")
    return parser


def run(args):
    backend.use("torch")
    report = {"command": eval_niah.command_line(args.argv, "experiments/moba_question.py"), "commit": eval_niah.commit(),
              "device": eval_niah.device_name(args.device), "torch": torch.__version__, "settings": vars(args), "train": {}, "prompts": {}, "scores": {}}
    for path in args.ckpt:
        asked = eval_niah.flags().parse_args(["--ckpt", path, "--methods", args.method, f"--samples={args.samples}",
                                              f"--seed={args.seed}", f"--device={args.device}"])
        _, tokenizers, methods = eval_niah.prepare(asked)
        tokenizer, method = next(iter(tokenizers.values())), list(methods)[-1]  # after dense
        if not isinstance(method, sparse.MoBA):
            raise ValueError(f"--method {args.method}: it must be a moba, whose prefill is what this is about")
        tasks = eval_niah.choose_tasks(asked, [tokenizer])
        model = Transformer.from_pretrained(path, torch.float32, args.device)
        report["train"][path], report["scores"][path] = eval_niah.training_record(path), {}
        by_task = report["scores"][path]
        print(f"{path}, {sparse.name(method)}: RULER's score, %", flush=True)
        for task, examples in eval_niah.make_examples(asked, tokenizer, tasks).items():
            e = examples[0]
            report["prompts"][task] = {"hash": niah.prompt_hash(examples), "keys_from": e.keys_from, "haystack_from": e.haystack_from}
            by_task[task] = compare(model, tokenizer, examples, method, args.question)
            print(f"    {niah.TASKS[task].short:6}" + "".join(f"{name:>10}{score[0]:6.1f}" for name, score in by_task[task].items()), flush=True)
        print("    mean  " + "".join(f"{name:>10}{eval_niah.mean([of[name][0] for of in by_task.values()]):6.1f}"
                                    for name in ("dense", "moba", "context", "question")))
        eval_niah.save(report, args.json)  # after each model: the next one takes as long again
    print(f"results in {args.json}")


def main(argv=None):
    eval_niah.command(flags(), run, argv, "moba_question.py: interrupted")


if __name__ == "__main__":
    main()
