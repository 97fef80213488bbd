"""
A prompt in, text out, with any sparse method: the whole of nanoRAT in a page.

    python sample.py --ckpt DIR --prompt "Once upon" --method quest:budget=1/16

With no flags: the newest model of train.py that does the task of checkpoints/, or else checkpoints/memory, is asked for a
needle in a haystack, densely and with the method.
Checked in tests/test_sample.py. eval_niah.py is the same for many prompts, methods and models.
"""
import argparse

import torch

import backend
import niah
import sparse
import weights
from data import tokenizer_of
from eval_niah import Reads, known_models, positive, sized, trained_with, usable_device
from model import Transformer


def flags():
    parser = argparse.ArgumentParser(description="Continue a prompt.", allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"sample.py: {message}\n")
    add = parser.add_argument
    add("--ckpt", metavar="PATH", help="what Transformer.from_pretrained loads, or a run of train.py; None: the newest in out/ that does "
        "the task of checkpoints/, else checkpoints/memory")
    add("--prompt", metavar="TEXT", help="None: a needle in a haystack that fills the context")
    add("--method", default="quest:budget=1/4", help="as eval_niah.py takes it")
    add("--max_new_tokens", type=positive, default=48, metavar="TOKENS", help="at most so many")
    add("--temperature", type=float, default=0.0, help="0 takes the likeliest token, 1 draws as the model would")
    add("--top_k", type=positive, metavar="TOKENS", help="draw from the likeliest so many; None: from all")
    add("--seed", type=int, default=0, help="of the draw, and of the haystack")
    add("--context_len", type=positive, metavar="TOKENS", help="what budgets are fractions of; None: the model's")
    add("--tokenizer", metavar="SPEC", help="as in data.py; None: the one beside the model")
    add("--device", type=usable_device, default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    backend.add_flag(parser)
    return parser


def run(args):
    backend.use(args.kernels)
    if args.temperature < 0:
        raise ValueError(f"--temperature {args.temperature}: at least 0")
    path = args.ckpt or known_models()[-1]
    model = Transformer.from_pretrained(path, torch.bfloat16 if args.device.startswith("cuda") else torch.float32, args.device)
    tokenizer = tokenizer_of(weights.resolve(path), model.config.vocab_size, args.tokenizer)
    context_len = args.context_len or model.config.context_len
    prompt, methods = args.prompt, [args.method]
    if prompt is None:
        protocol = trained_with(path).get("protocol", "base")
        tasks = niah.fitting_tasks(context_len, tokenizer, protocol, max_new_tokens=args.max_new_tokens)
        if not tasks:
            raise ValueError(f"no needle task fits into {context_len} tokens: give a --prompt")
        example = niah.make_example(tasks[0], context_len, tokenizer, args.seed, 0, protocol, max_new_tokens=args.max_new_tokens)
        prompt, methods = example.prompt, ["dense", args.method]
    ids = tokenizer.encode(prompt)
    if not ids:
        raise ValueError("--prompt is empty: the model needs a token to start from")
    methods = {text: sparse.parse(text, context_len) for text in (sized(text, context_len, tokenizer) for text in methods)}

    print(prompt)
    if args.prompt is None:
        print(f"\n{'gold':40}{example.target}")
    for text, method in methods.items():
        reads = Reads()
        new = model.generate(torch.tensor([ids], device=args.device), args.max_new_tokens, sparse=method, watch=reads,
                             temperature=args.temperature, top_k=args.top_k, eos_id=tokenizer.eos_id, seed=args.seed)
        answer = tokenizer.decode([token for token in new[0].tolist() if token != tokenizer.eos_id])
        read = f"{torch.stack(reads.mean).mean():.1f}" if reads.mean else "no"
        print(f"\n{text:40}{answer}\n{'':40}({new.shape[1]} tokens after {len(ids)}; a step read {read} entries per head)")


def main(argv=None):
    parser = flags()
    args = parser.parse_args(argv)
    try:
        run(args)
    except (ValueError, OSError, ImportError) as error:
        parser.error(error)
    except KeyboardInterrupt:
        parser.exit(130, "\n")


if __name__ == "__main__":
    main()
