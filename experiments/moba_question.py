"""
Where does MoBA lose the needle: in the context, or when the question looks for it? The same budget,
for a part of the prompt.

    dense      every token reads all before it
    moba       every token reads its blocks
    context    MoBA for the context, while the last tokens of the prompt, where the question stands,
               read all
    question   dense for the context, MoBA for those last tokens

MoBA decodes densely, so it can fail in two ways. Tokens of the context miss what made their keys
and values findable; or the question picks blocks by mean keys that do not show the needle, and the
first byte of the answer is written without it. If "context" is near dense, the second is to blame;
if "question" is, the first.

    python -m experiments.moba_question --ckpt checkpoints/attention checkpoints/memory --samples 20

Plain PyTorch computes, one prompt at a time. Checked in tests/test_moba_question.py.
"""
from dataclasses import dataclass

import torch

import eval_niah
import sparse
from experiments import ways
from infra.cli import positive


@dataclass(frozen=True)
class Part(sparse.MoBA):
    """
    MoBA for the last `question` tokens of the prompt, or for those before them. Of full rows: no
    padding.
    """
    question: int = 192
    of: str = "context"  # or "question"

    def prefill(self, q, k, v, start, dice):
        y, selected = super().prefill(q, k, v, start, dice)
        full, _ = sparse.Dense().prefill(q, k, v, start, dice)
        last = torch.arange(q.shape[1], device=q.device) >= q.shape[1] - self.question  # (T,)
        mine = last == (self.of == "question")
        return torch.where(mine[:, None, None], y, full), selected


def compare(model, tokenizer, examples, method, question):
    """
    RULER's score of the examples in percent, mean and 95 % interval: {"dense": [3], "moba": [3],
    "context": [3], "question": [3]}
    """
    methods = {"dense": sparse.Dense(), "moba": method}
    for of in "context", "question":
        methods[of] = Part(**vars(method), question=question, of=of)
    outcomes = ways.evaluate(model, tokenizer, examples, list(methods.values()), batch=1)
    return {name: eval_niah.scores(outcomes[m].texts, examples)["ruler"]
            for name, m in methods.items()}


def flags():
    parser = ways.flags("moba_question", "MoBA for the context alone, and for the question alone.",
                        "moba:budget=1/8")
    parser.add_argument("--question", type=positive, default=192, metavar="TOKENS", help="of the "
                        "prompt, its last ones: the question and an answer prefix (up to 150 bytes "
                        "in protocol sft, 290 in base)")
    return parser


def run(args):
    ways.run("moba_question", args, sparse.MoBA, "a moba, whose prefill is what this is about",
             lambda *asked: compare(*asked, args.question))


def main(argv=None):
    ways.main("moba_question", flags(), argv, run)


if __name__ == "__main__":
    main()
