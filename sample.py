"""
A prompt in, text out, with any sparse method: the whole of nanoRAT in a page.

    python sample.py --ckpt DIR --prompt "Once upon" --method quest:budget=1/16
    python sample.py --ckpt checkpoints/attention checkpoints/memory --task MK-2

With no flags: the newest model of train.py that does the task of checkpoints/, or else
checkpoints/memory, is asked for a needle in a haystack, densely and with the method. Checked in
tests/test_sample.py. look.py draws what each head reads meanwhile; eval_niah.py asks many prompts.
"""
import re
import sys
from itertools import pairwise
from pathlib import Path

import torch

import niah
import sparse
from data import tokenizer_of
from infra import weights
from infra.cli import (LONGEST, above_1, at_least_0, command, flag_parser, natural,
                       note_if_beyond, positive, roomy, seed, sized, usable_device)
from infra.reads import PromptReads, StepReads
from infra.runlog import known_models, trained_with
from model import Transformer
from triton_ops import backend

# A needle as a prompt has it; the group is its value.
NEEDLE = re.compile(niah.NEEDLE.format(kind=r"\w+", key=r"\S.*?", value=r"([\w-]+)"))


def flags():
    parser = flag_parser("sample.py", "Continue a prompt, or answer a needle's question.")
    add_question(parser, "the newest in out/ that does the task of checkpoints/, else "
                 "checkpoints/memory", "the first that fits")
    add = parser.add_argument
    add("--methods", "--method", nargs="+", action="extend", metavar="METHOD",
        help="as eval_niah.py takes them; default: quest:budget=1/4")
    add("--temperature", type=at_least_0, default=0.0,
        help="0 takes the likeliest token, 1 draws as the model would")
    add("--top_k", type=positive, metavar="TOKENS",
        help="draw from the likeliest so many; default: from all")
    add("--whole", action="store_true", help="print the whole haystack, not its size alone")
    return parser


def add_question(parser, models, task):
    """
    The flags of whom to ask what, which look.py has too. models, task: what --ckpt and --task are
    if not given, for --help.
    """
    add = parser.add_argument
    add("--ckpt", nargs="+", metavar="PATH", help="what Transformer.from_pretrained loads, or runs "
        f"of train.py; several are asked the same text; default: {models}")
    asked = parser.add_mutually_exclusive_group().add_argument
    asked("--prompt", metavar="TEXT", help="default: a needle in a haystack that fills the context")
    asked("--task", type=niah.task_name, help=f"{', '.join(niah.TASKS)}, or as the tables call it: "
          f"MK-2; default: {task}")
    add("--index", type=natural, default=0, help="which example of the task")
    add("--seed", type=seed, default=0, help="of the draw, and of the haystack")
    add("--words", choices=niah.WORDS, default=niah.WORDS[0],
        help="of the haystack's keys: built-in, or RULER's from the package wonderwords")
    add("--max_new_tokens", type=positive, default=48, metavar="TOKENS", help="at most so many")
    add("--context_len", type=positive, metavar="TOKENS", help="what budgets are fractions of; "
        f"default: the first model's, at most {LONGEST}")
    add("--yarn", type=above_1, metavar="FACTOR", help="stretch each model's RoPE to a context so "
        "many times as long, for a --context_len beyond its own; default: as it is")
    add("--tokenizer", metavar="SPEC", help="as in data.py; default: the one beside each model")
    add("--device", type=usable_device, default="cuda" if torch.cuda.is_available() else "cpu",
        help="cuda or cpu")
    backend.add_flag(parser)


def run(args):
    backend.use(args.kernels)
    if args.top_k and not args.temperature:
        print("note: --top_k is of no effect where --temperature=0 takes the likeliest token",
              file=sys.stderr)
    args.ckpt = args.ckpt or known_models()[-1:]
    models = loaded(args)
    first, tokenizer = next(iter(models.values()))
    context_len = args.context_len or min(LONGEST, first.config.context_len)
    prompt, texts, gold = args.prompt, args.methods or ["quest:budget=1/4"], []
    if prompt is None:
        example = a_needle(args, context_len, tokenizer)
        prompt, texts, gold = example.prompt, ["dense", *texts], example.answers
    shown = prompt if args.whole or not gold else abridged(prompt, gold, tokenizer)

    asked = []  # all of them, so that what is wrong is said before the first answers
    for path, (model, tokenizer) in models.items():
        ids = ids_of(prompt, path, model, tokenizer, texts, context_len, args)
        for text in (sized(text, context_len, tokenizer, sparse.METHODS) for text in texts):
            method = sparse.parse(text, context_len)
            asked.append((f"{path}, {text}", model, tokenizer, ids, method))

    for path, (model, _) in models.items():
        print(f"{Path(path).resolve().name}: {weights.resolve(path)}, trained on contexts of "
              f"{model.config.context_len:,} tokens, memory: {model.config.memory or 'none'}")
    print(f"\n{shown}\n")
    if gold:
        print(f"gold: {example.target.strip()}\n")
    elif any(trained_with(path).get("data") == "niah" for path in models):
        print("note: a model that was trained on needles last has little to say to other prompts\n")
    for name, *what in asked:
        said, read = answer(*what, args)
        print(f"{name}: {said}   {right_or_wrong(said, gold)}".rstrip())
        print(f"    {read}\n", flush=True)


def loaded(args):
    """{path: (model, its tokenizer)} of --ckpt. ValueError for flags that do not go together."""
    if args.prompt is not None and args.index:
        raise ValueError("--index is the example of a task, and --prompt is a text of your own: "
                         "leave one of them out")
    dtype, models = torch.bfloat16 if args.device.startswith("cuda") else torch.float32, {}
    for path in map(str, args.ckpt):
        model = Transformer.from_pretrained(path, dtype, args.device)
        if args.yarn:
            model.stretch(args.yarn)
        folder = weights.resolve(path)
        models[path] = model, tokenizer_of(folder, model.config.vocab_size, args.tokenizer)
    return models


def a_needle(args, context_len, tokenizer):
    """The example of niah.py that is asked, in the protocol that the first model was trained on."""
    protocol = trained_with(args.ckpt[0]).get("protocol", "base")
    more = {"max_new_tokens": args.max_new_tokens, "words": args.words}
    tasks = [args.task]
    if not args.task:
        tasks = niah.fitting_tasks(context_len, tokenizer, protocol, **more)
    if not tasks:
        raise ValueError(f"no needle task fits into {context_len} tokens, {args.max_new_tokens} "
                         "of them for the answer: raise --context_len or --max_new_tokens, or give "
                         "a --prompt")
    return niah.make_example(tasks[0], context_len, tokenizer, args.seed, args.index, protocol,
                             **more)


def abridged(prompt, answers, tokenizer):
    """The prompt's first line, the needles asked for and the question; between them its size."""
    needles = [found.span() for found in NEEDLE.finditer(prompt) if found[1] in answers]
    kept = [(0, prompt.index("\n")), *needles, (prompt.rindex("\n"), len(prompt))]
    lines = [prompt[:kept[0][1]]]
    for (_, end), (start, stop) in pairwise(kept):
        if left := prompt[end:start].strip():
            others = f", {n} other needles" if (n := len(NEEDLE.findall(left))) else ""
            lines.append(f"... {len(tokenizer.encode(left)):,} tokens{others} ...")
        lines.append(prompt[start:stop].strip())
    return "\n".join(lines)


def ids_of(prompt, path, model, tokenizer, texts, context_len, args):
    """The prompt in the model's tokens. ValueError where the methods `texts` do not fit them."""
    ids = tokenizer.encode(prompt)
    if not ids:
        raise ValueError("--prompt is empty: the model needs a token to start from")
    total = len(ids) + args.max_new_tokens
    if total > context_len and any("/" in text for text in texts):
        raise ValueError(f"the prompt has {len(ids):,} tokens, {total:,} with those to come, and "
                         f"budgets are fractions of {context_len:,}: give "
                         f"--context_len={roomy(total)}, or budgets in tokens")
    note_if_beyond(path, model.config.context_len, total, args.yarn)
    return ids


def answer(model, tokenizer, ids, method, args):
    """-> the text that follows; how many tokens it has, and how many entries were read, in words"""
    phases = sparse.phases(method)
    by_prompt = PromptReads(phases.prefill_by, dense=phases.prefill_by == sparse.Dense())
    by_step = StepReads(phases)

    # The prompt at once, in which MoBA selects; SnapKV drops entries at its end. Then token by
    # token, where Quest selects.
    cache = model.new_cache(1, len(ids) + args.max_new_tokens, sparse.window_of(method))
    tokens = torch.tensor([ids], device=args.device)
    logits = model.prefill(tokens, None, cache, method, whole=True, watch=by_prompt)
    new = model.decode(logits, cache, args.max_new_tokens, method, args.temperature, args.top_k,
                       tokenizer.eos_id, args.seed, by_step)[0].tolist()

    # Each token but the last was fed, up to the end of the text if there is one.
    fed = new.index(tokenizer.eos_id) if tokenizer.eos_id in new else len(new) - 1
    of_prompt, = by_prompt.of_rows(torch.tensor([len(ids)]))
    of_step, = by_step.of_rows(cache, [fed])
    # Means over tokens, layers and KV heads. At most a token reads those before it, and itself.
    read = (in_words("prompt", of_prompt, (len(ids) + 1) / 2),
            in_words("answer", of_step, len(ids) + (fed + 1) / 2))
    said = tokenizer.decode([token for token in new if token != tokenizer.eos_id])
    return said, f"{len(new)} tokens after {len(ids):,}: {read[0]}, {read[1]}"


def in_words(of, read, there):
    if read is None:
        return f"no reads of the {of} are told"
    if there - read < 0.5:
        return f"each {of} token read all before it"
    return f"each {of} token read {read:,.0f} of {there:,.0f} entries"


def right_or_wrong(said, gold):
    """RULER's score of an answer in words, nothing without a gold one."""
    if not gold:
        return ""
    score = niah.score_ruler(said, gold)
    return {0: "wrong", 1: "right"}.get(score, f"{score:.0%} right")


def main(argv=None):
    args = flags().parse_args(argv)
    args.argv = argv
    command("sample.py", lambda: run(args), args, "interrupted")


if __name__ == "__main__":
    main()
