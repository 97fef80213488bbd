"""
Does SnapKV drop what the model would have asked for? The same budget, chosen by other queries.

    question   SnapKV as it is: the last `window` queries of the prompt choose what stays
    answer     those that write the gold answer choose with them: what the model reads while it
               answers, known in advance

SnapKV bets that the question already looks where the answer will be read. Where "answer" scores
higher, the model's heads do not: they turn to the needle only once its first bytes are written, and
by then the rest is gone. What "answer" still lacks to dense attention is the budget's fault. No
method may do this; it takes the gold answer.

    python -m experiments.snapkv_answer --ckpt checkpoints/attention checkpoints/memory --samples 50

Plain PyTorch computes, as the scores are exchanged inside SnapKV.compress. Checked in
tests/test_snapkv_answer.py.
"""
from dataclasses import dataclass, field

import torch

import eval_niah
import niah
import sparse
from experiments import ways
from infra.answers import by_length
from infra.cli import positive


@dataclass(frozen=True)
class Foreseeing(sparse.SnapKV):
    """SnapKV with scores that are known before: one (B, KV, Tk) per layer, first layer first."""
    scores: list = field(default_factory=list, hash=False)

    def score(self, q, k, lengths):
        return self.scores.pop(0)[:, :, :k.shape[1]]


def answer_scores(model, tokenizer, examples, method):
    """
    method.score of each layer, by the last queries of prompt and gold answer: `window` and the
    longest answer's.
    """
    gold = [niah.target_ids(e.prompt, e.target, tokenizer) for e in examples]
    rows = [e.ids + ids for e, ids in zip(examples, gold)]
    tokens, lengths = eval_niah.padded(rows, model.embed_tokens.weight.device)
    window = method.window + max(map(len, gold))
    cache = model.new_cache(len(examples), tokens.shape[1], window)
    model.feed(tokens, lengths, cache)
    return [method.score(q, k, cache.lengths) for q, k in zip(cache.recent_q, cache.k)]


@torch.no_grad()
def compare(model, tokenizer, examples, method, batch=16):
    """
    RULER's score of the examples in percent, mean and 95 % interval: {"dense": [3], "question":
    [3], "answer": [3]}
    """
    eos_id, texts = tokenizer.eos_id, {}
    for rows in by_length(examples, batch):
        some = [examples[i] for i in rows]
        n_new = some[0].max_new_tokens
        foreseen = answer_scores(model, tokenizer, some, method)
        foreseeing = Foreseeing(method.budget, method.window, method.kernel, scores=foreseen)
        cache, logits, _ = eval_niah.prefill(model, some, sparse.Dense(), n_new, method.window)
        choosers = {"dense": sparse.Dense(), "question": method, "answer": foreseeing}
        for name, chooser in choosers.items():
            new = model.decode(logits, cache.fork(), n_new, chooser, eos_id=eos_id).tolist()
            for i, row in zip(rows, new):
                row = row[:row.index(eos_id)] if eos_id in row else row
                texts.setdefault(name, [None] * len(examples))[i] = tokenizer.decode(row)
    return {name: eval_niah.scores(of_all, examples)["ruler"] for name, of_all in texts.items()}


def flags():
    parser = ways.flags("snapkv_answer", "SnapKV's choice by the question, and by the question and "
                        "the gold answer.", "snapkv:budget=1/16")
    parser.add_argument("--batch", type=positive, default=16, help="prompts at a time")
    return parser


def run(args):
    ways.run("snapkv_answer", args, sparse.SnapKV, "a snapkv, whose window is what this is about",
             lambda *asked: compare(*asked, args.batch))


def main(argv=None):
    ways.main("snapkv_answer", flags(), argv, run)


if __name__ == "__main__":
    main()
