"""
Does SnapKV drop what the model would have asked for? The same budget, chosen by other queries.

    question   SnapKV as it is: the last `window` queries of the prompt choose what stays
    answer     those that write the gold answer choose with them: what the model reads while it answers, known in advance

SnapKV bets that the question already looks where the answer will be read. Where "answer" scores higher, the model's heads
do not: they turn to the needle only once its first bytes are written, and by then the rest is gone. What "answer" still
lacks to dense attention is the budget's fault. No method may do this; it takes the gold answer.

    python -m experiments.snapkv_answer --ckpt checkpoints/attention checkpoints/memory --samples 50

Plain PyTorch computes, as the scores are exchanged inside SnapKV.compress. Checked in tests/test_snapkv_answer.py.
"""
from dataclasses import dataclass, field

import torch

import eval_niah
import niah
import sparse
from experiments import ways
from infra.answers import by_length
from infra.cli import command, positive


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
    model.feed(tokens, lengths, cache)
    return [method.score(q, k, cache.lengths) for q, k in zip(cache.recent_q, cache.k)]


@torch.no_grad()
def compare(model, tokenizer, examples, method, batch=16):
    """RULER's score of the examples in percent, mean and 95 % interval: {"dense": [3], "question": [3], "answer": [3]}"""
    texts = {name: [None] * len(examples) for name in ("dense", "question", "answer")}
    for rows in by_length(examples, batch):
        some = [examples[i] for i in rows]
        told = Told(method.budget, method.window, method.kernel, scores=answer_scores(model, tokenizer, some, method))
        cache, logits, _ = eval_niah.prefill(model, some, sparse.Dense(), some[0].max_new_tokens, method.window)
        for name, chooser in ("dense", sparse.Dense()), ("question", method), ("answer", told):
            new = model.decode(logits, cache.fork(), some[0].max_new_tokens, chooser, eos_id=tokenizer.eos_id).tolist()
            for i, row in zip(rows, new):
                texts[name][i] = tokenizer.decode(row[:row.index(tokenizer.eos_id)] if tokenizer.eos_id in row else row)
    return {name: eval_niah.scores(predictions, examples)["ruler"] for name, predictions in texts.items()}


def flags():
    parser = ways.flags("snapkv_answer", "SnapKV's choice by the question, and by the question and the gold answer.", "snapkv:budget=1/16")
    parser.add_argument("--batch", type=positive, default=16, help="prompts at a time")
    return parser


def run(args):
    ways.run("snapkv_answer", args, sparse.SnapKV, "a snapkv, whose window is what this is about", lambda *asked: compare(*asked, args.batch))


def main(argv=None):
    args = flags().parse_args(argv)
    args.argv = argv
    command("snapkv_answer.py", lambda: run(args), args, "interrupted; what this call finished, if anything, is in {json}")


if __name__ == "__main__":
    main()
