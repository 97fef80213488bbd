"""
A prompt in, text out, with any sparse method: the whole of nanoRAT in a page.

    python sample.py --ckpt DIR --prompt "Once upon" --method quest:budget=1/16

With no flags: the newest model of train.py that does the task of checkpoints/, or else checkpoints/memory, is asked for a
needle in a haystack, densely and with the method.
Checked in tests/test_sample.py. eval_niah.py is the same for many prompts, methods and models.
"""
import torch

from triton_ops import backend
import niah
import sparse
from infra import weights
from data import tokenizer_of
from eval_niah import PromptReads, Reads, note_if_beyond, roomy
from infra.cli import command, flag_parser, positive, seed, sized, temperature, usable_device
from infra.runlog import known_models, trained_with
from model import Transformer


def flags():
    parser = flag_parser("sample.py", "Continue a prompt.")
    add = parser.add_argument
    add("--ckpt", metavar="PATH", help="what Transformer.from_pretrained loads, or a run of train.py; None: the newest in out/ that does "
        "the task of checkpoints/, else checkpoints/memory")
    add("--prompt", metavar="TEXT", help="None: a needle in a haystack that fills the context")
    add("--methods", "--method", nargs="+", action="extend", metavar="METHOD", help="as eval_niah.py takes them; None: quest:budget=1/4")
    add("--max_new_tokens", type=positive, default=48, metavar="TOKENS", help="at most so many")
    add("--temperature", type=temperature, default=0.0, help="0 takes the likeliest token, 1 draws as the model would")
    add("--top_k", type=positive, metavar="TOKENS", help="draw from the likeliest so many; None: from all")
    add("--seed", type=seed, default=0, help="of the draw, and of the haystack")
    add("--words", choices=niah.WORDS, default=niah.WORDS[0], help="of the haystack's keys: built-in, or RULER's from the package wonderwords")
    add("--context_len", type=positive, metavar="TOKENS", help="what budgets are fractions of; None: the model's")
    add("--tokenizer", metavar="SPEC", help="as in data.py; None: the one beside the model")
    add("--device", type=usable_device, default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    backend.add_flag(parser)
    return parser


def run(args):
    backend.use(args.kernels)
    path = args.ckpt or known_models()[-1]
    model = Transformer.from_pretrained(path, torch.bfloat16 if args.device.startswith("cuda") else torch.float32, args.device)
    tokenizer = tokenizer_of(weights.resolve(path), model.config.vocab_size, args.tokenizer)
    context_len = args.context_len or model.config.context_len
    prompt, methods = args.prompt, args.methods or ["quest:budget=1/4"]
    if prompt is None:
        protocol = trained_with(path).get("protocol", "base")
        more = {"max_new_tokens": args.max_new_tokens, "words": args.words}
        tasks = niah.fitting_tasks(context_len, tokenizer, protocol, **more)
        if not tasks:
            raise ValueError(f"no needle task fits into {context_len} tokens: give a --prompt")
        example = niah.make_example(tasks[0], context_len, tokenizer, args.seed, 0, protocol, **more)
        prompt, methods = example.prompt, ["dense", *methods]
    ids = tokenizer.encode(prompt)
    if not ids:
        raise ValueError("--prompt is empty: the model needs a token to start from")
    total = len(ids) + args.max_new_tokens
    if total > context_len and any("/" in text for text in methods):
        raise ValueError(f"the prompt has {len(ids):,} tokens, {total:,} with those to come, and budgets are fractions of {context_len:,}: "
                         f"give --context_len={roomy(total)}, or budgets in tokens")
    note_if_beyond(path, model.config.context_len, total)
    methods = {text: sparse.parse(text, context_len) for text in (sized(text, context_len, tokenizer) for text in methods)}

    print(prompt)
    width = 2 + max(38, *map(len, methods))
    if args.prompt is None:
        print(f"\n{'gold':{width}}{example.target}")
    for text, method in methods.items():
        new, prompt_read, read = answer(model, tokenizer, ids, method, args)
        told = tokenizer.decode([token for token in new if token != tokenizer.eos_id])
        print(f"\n{text:{width}}{told}\n{'':{width}}({len(new)} tokens after {len(ids)}; entries per head that a token of the prompt read: "
              f"{prompt_read}, a step: {read})")


def answer(model, tokenizer, ids, method, args):
    """-> new tokens; how many entries a token of the prompt read, and a decoding step, as text"""
    by_prompt, by_step, number = PromptReads(sparse.phases(method).prefill_by), Reads(), lambda x: "not told" if x is None else f"{x:.1f}"
    cache = model.new_cache(1, len(ids) + args.max_new_tokens, sparse.window_of(method))
    logits = model.prefill(torch.tensor([ids], device=args.device), None, cache, method, whole=True, watch=by_prompt)
    new = model.decode(logits, cache, args.max_new_tokens, method, args.temperature, args.top_k, tokenizer.eos_id, args.seed, by_step)
    row = new[0].tolist()
    written = row.index(tokenizer.eos_id) if tokenizer.eos_id in row else len(row) - 1
    read, = by_step.of_rows(method, cache, [written])  # as many steps as tokens were fed
    read = "there was none" if read is None else number(read)
    return row, number(by_prompt.of_rows(torch.tensor([len(ids)]))[0]), read


def main(argv=None):
    args = flags().parse_args(argv)
    args.argv = argv
    command("sample.py", lambda: run(args), args, "interrupted")


if __name__ == "__main__":
    main()
