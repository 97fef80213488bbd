"""
A prompt in, text out, with any sparse method: the whole of nanoRAT in a page.

    python sample.py --ckpt DIR --prompt "Once upon" --method quest:budget=1/16

With no flags: the newest model of train.py that does the task of checkpoints/, or else
checkpoints/memory, is asked for a needle in a haystack, densely and with the method. Checked in
tests/test_sample.py. eval_niah.py is the same for many prompts, methods and models.
"""
import torch

import niah
import sparse
from data import tokenizer_of
from infra import weights
from infra.cli import (LONGEST, at_least_0, command, flag_parser, note_if_beyond, positive, roomy,
                       seed, sized, usable_device)
from infra.reads import PromptReads, StepReads
from infra.runlog import known_models, trained_with
from model import Transformer
from triton_ops import backend


def flags():
    parser = flag_parser("sample.py", "Continue a prompt.")
    add = parser.add_argument
    add("--ckpt", metavar="PATH", help="what Transformer.from_pretrained loads, or a run of "
        "train.py; None: the newest in out/ that does the task of checkpoints/, else "
        "checkpoints/memory")
    add("--prompt", metavar="TEXT", help="None: a needle in a haystack that fills the context")
    add("--methods", "--method", nargs="+", action="extend", metavar="METHOD",
        help="as eval_niah.py takes them; None: quest:budget=1/4")
    add("--max_new_tokens", type=positive, default=48, metavar="TOKENS", help="at most so many")
    add("--temperature", type=at_least_0, default=0.0,
        help="0 takes the likeliest token, 1 draws as the model would")
    add("--top_k", type=positive, metavar="TOKENS",
        help="draw from the likeliest so many; None: from all")
    add("--seed", type=seed, default=0, help="of the draw, and of the haystack")
    add("--words", choices=niah.WORDS, default=niah.WORDS[0],
        help="of the haystack's keys: built-in, or RULER's from the package wonderwords")
    add("--context_len", type=positive, metavar="TOKENS",
        help=f"what budgets are fractions of; None: the model's, at most {LONGEST}")
    add("--tokenizer", metavar="SPEC", help="as in data.py; None: the one beside the model")
    add("--device", type=usable_device, default="cuda" if torch.cuda.is_available() else "cpu",
        help="cuda or cpu")
    backend.add_flag(parser)
    return parser


def run(args):
    backend.use(args.kernels)
    path = args.ckpt or known_models()[-1]
    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    model = Transformer.from_pretrained(path, dtype, args.device)
    tokenizer = tokenizer_of(weights.resolve(path), model.config.vocab_size, args.tokenizer)
    context_len = args.context_len or min(LONGEST, model.config.context_len)

    prompt, texts, gold = args.prompt, args.methods or ["quest:budget=1/4"], None
    if prompt is None:
        example = a_needle(args, path, context_len, tokenizer)
        prompt, texts, gold = example.prompt, ["dense", *texts], example.target
    ids = tokenizer.encode(prompt)
    if not ids:
        raise ValueError("--prompt is empty: the model needs a token to start from")
    total = len(ids) + args.max_new_tokens
    if total > context_len and any("/" in text for text in texts):
        raise ValueError(f"the prompt has {len(ids):,} tokens, {total:,} with those to come, and "
                         f"budgets are fractions of {context_len:,}: give "
                         f"--context_len={roomy(total)}, or budgets in tokens")
    note_if_beyond(path, model.config.context_len, total)

    texts = [sized(text, context_len, tokenizer, sparse.METHODS) for text in texts]
    methods = {text: sparse.parse(text, context_len) for text in texts}
    print(prompt)
    width = 2 + max(38, *map(len, methods))
    if gold is not None:
        print(f"\n{'gold':{width}}{gold}")
    for text, method in methods.items():
        new, prompt_read, read = answer(model, tokenizer, ids, method, args)
        said = tokenizer.decode([token for token in new if token != tokenizer.eos_id])
        print(f"\n{text:{width}}{said}\n{'':{width}}({len(new)} tokens after {len(ids)}; entries "
              f"per head that a token of the prompt read: {prompt_read}, a step: {read})")


def a_needle(args, path, context_len, tokenizer):
    """The example of niah.py that the model is asked, in the protocol that it was trained on."""
    protocol = trained_with(path).get("protocol", "base")
    more = {"max_new_tokens": args.max_new_tokens, "words": args.words}
    tasks = niah.fitting_tasks(context_len, tokenizer, protocol, **more)
    if not tasks:
        raise ValueError(f"no needle task fits into {context_len} tokens: give a --prompt")
    return niah.make_example(tasks[0], context_len, tokenizer, args.seed, 0, protocol, **more)


def answer(model, tokenizer, ids, method, args):
    """-> new tokens; how many entries a token of the prompt read, and a step, as text"""
    phases = sparse.phases(method)
    by_prompt = PromptReads(phases.prefill_by, dense=phases.prefill_by == sparse.Dense())
    by_step = StepReads(phases)

    # The prompt at once, in which MoBA selects; SnapKV drops entries at its end. Then token by
    # token, where Quest selects.
    cache = model.new_cache(1, len(ids) + args.max_new_tokens, sparse.window_of(method))
    tokens = torch.tensor([ids], device=args.device)
    logits = model.prefill(tokens, None, cache, method, whole=True, watch=by_prompt)
    new = model.decode(logits, cache, args.max_new_tokens, method, args.temperature, args.top_k,
                       tokenizer.eos_id, args.seed, by_step)

    # Each token but the last was fed, up to the end of the text if there is one.
    row = new[0].tolist()
    fed = row.index(tokenizer.eos_id) if tokenizer.eos_id in row else len(row) - 1
    prompt_read, = by_prompt.of_rows(torch.tensor([len(ids)]))
    read, = by_step.of_rows(cache, [fed])
    return (row, "not told" if prompt_read is None else f"{prompt_read:.1f}",
            "there was none" if read is None else f"{read:.1f}")


def main(argv=None):
    args = flags().parse_args(argv)
    args.argv = argv
    command("sample.py", lambda: run(args), args, "interrupted")


if __name__ == "__main__":
    main()
