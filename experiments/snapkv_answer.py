"""
Does SnapKV drop what the model would have asked for? The same budget, chosen by other queries.

    question   SnapKV as it is: the last `window` queries of the prompt choose what stays
    answer     those that write the gold answer choose with them: what the model reads while it answers, known in advance

SnapKV bets that the question already looks where the answer will be read. Where "answer" scores higher, the model's heads
do not: they turn to the needle only once its first bytes are written, and by then the rest is gone. What "answer" still
lacks to dense attention is the budget's fault. No method may do this; it takes the gold answer.

    python experiments/snapkv_answer.py --ckpt checkpoints/attention checkpoints/memory --samples 50

Plain PyTorch computes, as the scores are exchanged inside SnapKV.compress. Checked in tests/test_snapkv_answer.py.
"""
import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import backend  # noqa: E402
import eval_niah  # noqa: E402
import niah  # noqa: E402
import sparse  # noqa: E402
from model import Transformer  # noqa: E402


@dataclass(frozen=True)
class Told(sparse.SnapKV):
    """SnapKV with scores that are known before: one (B, KV, Tk) per layer, first layer first."""
    scores: list = field(default_factory=list, hash=False)

    def score(self, q, k, lengths):
        return self.scores.pop(0)[:, :, :k.shape[1]]


def answer_scores(model, tokenizer, examples, method):
    """method.score of each layer, by the last queries of prompt and gold answer: `window` and the longest answer's."""
    gold = [niah.target_ids(e.prompt, e.target, tokenizer) for e in examples]
    tokens, lengths = eval_niah.padded([e.ids + ids for e, ids in zip(examples, gold)], model.embed_tokens.weight.device)
    cache = model.new_cache(len(examples), tokens.shape[1], method.window + max(map(len, gold)))
    model.hidden(tokens, lengths, cache)
    return [method.score(q, k, cache.lengths) for q, k in zip(cache.recent_q, cache.k)]


@torch.no_grad()
def compare(model, tokenizer, examples, method, batch=16):
    """RULER's score of the examples in percent, mean and 95 % interval: {"dense": [3], "question": [3], "answer": [3]}"""
    texts = {name: [None] * len(examples) for name in ("dense", "question", "answer")}
    for rows in eval_niah.by_length(examples, batch):
        some = [examples[i] for i in rows]
        told = Told(method.budget, method.window, method.kernel, scores=answer_scores(model, tokenizer, some, method))
        cache, logits, _ = eval_niah.prefill(model, some, sparse.Dense(), some[0].max_new_tokens, method.window)
        for name, chooser in ("dense", sparse.Dense()), ("question", method), ("answer", told):
            new = model.decode(logits, cache.fork(), some[0].max_new_tokens, chooser, eos_id=tokenizer.eos_id).tolist()
            for i, row in zip(rows, new):
                texts[name][i] = tokenizer.decode(row[:row.index(tokenizer.eos_id)] if tokenizer.eos_id in row else row)
    return {name: eval_niah.scores(predictions, examples)["ruler"] for name, predictions in texts.items()}


def flags():
    parser = argparse.ArgumentParser(description="SnapKV's choice by the question, and by the question and the gold answer.",
                                     allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"snapkv_answer.py: {message}\n")
    add = parser.add_argument
    add("--ckpt", nargs="+", required=True, metavar="PATH", help="models, as eval_niah.py takes them")
    add("--method", default="snapkv:budget=1/16", metavar="METHOD", help="a snapkv, as eval_niah.py takes it")
    add("--samples", type=eval_niah.positive, default=50, help="examples per task")
    add("--seed", type=int, default=0, help="of the examples")
    add("--batch", type=eval_niah.positive, default=16, help="prompts at a time")
    add("--device", type=eval_niah.usable_device, default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    add("--json", default="results/snapkv_answer.json", metavar="FILE", help="all results")
    return parser


def run(args):
    backend.use("torch")
    report = {"command": eval_niah.command_line(args.argv, "experiments/snapkv_answer.py"), "commit": eval_niah.commit(),
              "device": eval_niah.device_name(args.device), "torch": torch.__version__, "settings": vars(args), "scores": {}}
    for path in args.ckpt:
        asked = eval_niah.flags().parse_args(["--ckpt", path, "--methods", args.method, f"--samples={args.samples}",
                                              f"--seed={args.seed}", f"--device={args.device}"])
        _, tokenizers, methods = eval_niah.prepare(asked)
        tokenizer, method = next(iter(tokenizers.values())), list(methods)[-1]  # after dense
        if not isinstance(method, sparse.SnapKV):
            raise ValueError(f"--method {args.method}: it must be a snapkv, whose window is what this is about")
        tasks = eval_niah.choose_tasks(asked, [tokenizer])
        model = Transformer.from_pretrained(path, torch.float32, args.device)
        report["scores"][path] = by_task = {}
        print(f"{path}, {sparse.name(method)}: RULER's score, %", flush=True)
        for task, examples in eval_niah.make_examples(asked, tokenizer, tasks).items():
            by_task[task] = compare(model, tokenizer, examples, method, args.batch)
            print(f"    {niah.TASKS[task].short:6}" + "".join(f"{name:>10}{score[0]:6.1f}" for name, score in by_task[task].items()), flush=True)
        print("    mean  " + "".join(f"{name:>10}{eval_niah.mean([of[name][0] for of in by_task.values()]):6.1f}"
                                    for name in ("dense", "question", "answer")))
    eval_niah.save(report, args.json)
    print(f"results in {args.json}")


def main(argv=None):
    eval_niah.command(flags(), run, argv, "snapkv_answer.py: interrupted")


if __name__ == "__main__":
    main()
