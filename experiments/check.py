"""
Does a selector or a memory of your own do what it must? Two seconds on a CPU, before any training.

Most mistakes run, and show as another score: a block too few, a NaN, H heads for KV, a state that
is not read. Here a class meets random tokens in rows of three lengths, and is asked what must hold:

    selector   Scores and y have their shapes, and no NaN. `selected` names what is in the row and
               of the past, nothing twice, within the budget. Later tokens, and what lies behind a
               row, change nothing. A budget of the whole gives dense attention.
    memory     k~, v~ and the state have their shapes and dtypes, B in dimension 1. Later tokens,
               padding and other rows change nothing. Pieces with the state passed on are the whole.

    python -m experiments.check --also bestkey.py --methods bestkey:budget=1/4
    python -m experiments.check --also shift.py --memories shift

What fails first is one line and exit 2; errors of the class's own come as they are. Checked in
tests/test_check.py. Letters as in sparse.py; M queries ask.
"""
import math
from dataclasses import replace

import torch

import sparse
from cache import LayerCache
from experiments import memories  # puts its classes into memory.MEMORIES
from infra.cli import command, flag_parser, sized
from infra.spelling import check
from infra.tokenizers import get_tokenizer
from memory import MEMORIES
from model import Config
from triton_ops import on_cpu

B, H, KV, D = 3, 4, 2, 16
CONTEXT = 512  # tokens of which a budget on the command line is a fraction
SCORES = {"prefill": sparse.MoBA, "decode": sparse.Quest, "compress": sparse.SnapKV,
          "evict": sparse.SnapKV}  # whose score and forced a hook of a subclass asks
LETTERS = {sparse.MoBA: "(B, KV, Tq, N)", sparse.Quest: "(B, KV, 1, N)",
           sparse.SnapKV: "(B, KV, Tk)"}


def check_form(what, x, letters, shape, dtype=None):
    came, shape = tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__, tuple(shape)
    check(came == shape, f"{what} gives {came} where {letters} = {shape} is wanted")
    check(dtype in (None, x.dtype), f"{what} gives {x.dtype} where {dtype} is wanted")


def check_tuple(what, out, names):
    came = f"{len(out)} values" if isinstance(out, tuple) else type(out).__name__
    check(came == f"{len(names.split())} values", f"{what} gives {came} where {names} is wanted")


def check_same(what, out, ref):
    for x, wanted in zip(out, ref):
        off = (x - wanted).abs().max().item() / max(1, wanted.abs().max().item())
        check(off <= 1e-4, f"{what} (by up to {off:.1e})")


def behind(x, end):
    """x (B, T, ...) with junk from each row's end (B,) on."""
    after = torch.arange(x.shape[1]) >= end[:, None]
    return x.masked_fill(after[(...,) + (None,) * (x.dim() - 2)], 100)


@torch.no_grad()
def check_method(method, whole=True):
    """
    Of a method as sparse.parse makes it: the hooks it overrides. ValueError: one is wrong. whole:
    is a budget of the whole to give dense attention? Not where a method reads less by choice.
    """
    parts = {hook: getattr(sparse.phases(method), f"{hook}_by") for hook in SCORES}
    own = [hook for hook, part in parts.items()
           if getattr(type(part), hook) is not getattr(sparse.Dense, hook)]
    for hook in own:
        check_hook(parts[hook], hook, whole)
    return own


def check_hook(method, hook, whole):
    what, source = f"{sparse.label_of(method)}.{hook}", torch.Generator().manual_seed(0)
    budget, size = (getattr(method, field, None) or 0 for field in ("budget", "block_size"))
    T = min(3 * max(32, budget, size) + 5, 2048)  # the last block is not full
    qkv = [torch.randn(B, T, heads, D, generator=source) for heads in (H, KV, KV)]
    dice, lengths = torch.randint(2**40, (B, T), generator=source), torch.tensor([T, T // 2, 10])
    for M in [T, 9] if hook == "prefill" else [1]:  # the prompt at once; each row's last M tokens
        slots = torch.arange(T).expand(B, T) if M == T else lengths[:, None] + torch.arange(-M, 0)
        rest, real = (slots, dice, lengths), slots < lengths[:, None]
        y, junk = ask(method, hook, *qkv, *rest), [behind(x, lengths) for x in qkv]
        check_same(f"{what}: y changes with later tokens, or with what lies behind a row",
                   [ask(method, hook, *junk, *rest)[real]], [y[real]])
        if budget and whole:
            of_all = replace(method, budget=budget * math.ceil(T / budget))  # of whole blocks, too
            check_same(f"{what}: with a budget of the whole, y is not dense attention's; a method "
                       "that reads less by choice is checked with --less",
                       ask(of_all, hook, *qkv, *rest), ask(sparse.Dense(), hook, *qkv, *rest))
        ask(method, hook, *(x.bfloat16() for x in qkv), *rest)


def ask(method, hook, q, k, v, slots, dice, lengths):
    """y of the queries in slots (B, M). ValueError unless scores, selected, y are as they must."""
    label, T, row = sparse.label_of(method), k.shape[1], torch.arange(B)[:, None]
    what, filled = f"{label}.{hook}", torch.arange(T) < lengths[:, None]
    window = lengths[:, None] + torch.arange(-getattr(method, "window", 64), 0)
    newest = q[row, window.clamp_min(0)].masked_fill((window < 0)[..., None, None], 0)
    q, dice = q[row, slots], dice[row, slots]
    kind, drops = SCORES[hook], hook in ("compress", "evict")
    if isinstance(method, kind):
        args = (newest, k, lengths) if drops else (q, k, filled)[:3 if hook == "decode" else 2]
        last = [T] if drops else [q.shape[1], math.ceil(T / method.block_size)]
        scores = method.score(*args)
        check_form(f"{label}.score", scores, LETTERS[kind], (B, KV, *last))
        scores = method.forced(scores, slots if hook == "prefill" else lengths)
        check(not scores.isnan().any(), f"{label}.score gives NaN where a number is wanted")

    if hook == "prefill":
        out = method.prefill(q, k, v, 0 if slots.shape[1] == T else slots[:, 0], dice)
    elif hook == "compress":  # what is kept shows in what the next query would read
        out = None, method.compress(newest, k, v, lengths, dice)
    else:
        bounds_of = lambda block_size: on_cpu.block_bounds(k, lengths, block_size)
        prompt = lambda: (lengths, dice)
        cache = LayerCache(k, v, lengths, True, dice, None, bounds_of, prompt)
        out = method.decode(q, cache) if hook == "decode" else (None, method.evict(newest, cache))
    check_tuple(what, out, "y, selected")
    y, selected = out
    if selected is None and hook != "prefill":  # everything; a prefill need not tell
        selected = torch.arange(T).where(filled, -1)[:, None].expand(-1, KV, -1)
    if selected is not None:
        check_selected(what, method, hook, selected, slots)
    if drops:
        order, count = selected.where(selected >= 0, T), (selected >= 0).sum(-1)
        tidy = (order.diff(dim=-1) >= 0).all() and (count == count[:, :1]).all()
        check(tidy, f"{what}: positions must ascend, with -1 at the end, as many in each KV head")
        y = sparse.attend_to_slots(q, k, v, selected)
    check_form(f"{what}: y", y, "(B, Tq, H, D)", q.shape, v.dtype)
    check(y.isfinite().all(), f"{what}: y is not finite")
    return y


def check_selected(what, method, hook, selected, slots):
    size, slot = 1, slots.expand(KV, B, -1).transpose(0, 1)  # (B, KV, M)
    if hook == "prefill":  # it names blocks
        size = getattr(method, "block_size", 1)
    else:
        slot = slot.squeeze(2)
    S = selected.shape[-1:] if isinstance(selected, torch.Tensor) else "S"
    check_form(f"{what}: selected", selected, "(B, KV, ..., S)", (*slot.shape, *S))
    check(not selected.is_floating_point(), f"{what}: selected holds no whole numbers")
    last = (slot // size).unsqueeze(-1).expand_as(selected)
    wrong = (selected < -1) | (selected > last)
    check(not wrong.any(), f"{what} selects {selected[wrong][:1].tolist()} where no more than "
          f"{last[wrong][:1].tolist()} is in the row and of the past; -1 is none")
    ordered = selected.sort(dim=-1).values
    twice = (ordered.diff(dim=-1) == 0) & (ordered[..., 1:] >= 0)
    check(not twice.any(), f"{what} selects {ordered[..., 1:][twice][:1].tolist()} twice")
    # as infra/reads.py counts: of its own block a token reads the entries up to itself
    most = ((selected >= 0).sum(-1) * size - (size - 1 - slot % size)).max().item()
    budget = getattr(method, "budget", most)
    check(most <= budget, f"{what} reads {most} entries where {budget=} is the most")


@torch.no_grad()
def check_memory(name):
    """A name in memory.MEMORIES. ValueError: its class does not do what a memory must."""
    config = Config(257, n_layer=1, width=H * D, n_head=H, n_kv_head=KV, mlp_width=D, memory=name)
    kind, T, source = MEMORIES[name], 24, torch.Generator().manual_seed(0)
    two, three = (tuple(kind.state_shape(config, rows)) for rows in (2, 3))
    check(two[1:2] == (2,) and three == (two[0], 3, *two[2:]), f"{name}.state_shape gives {two}, "
          f"and {three} for a row more, where B is wanted in dimension 1, and only there")
    memory, zeros, lengths = kind(config), torch.zeros(three), torch.tensor([T, 13, 1])
    for parameter in memory.parameters():  # small: a matrix may be applied again at each token
        parameter.normal_(std=0.2, generator=source)
    x = torch.randn(B, T, config.width, generator=source)
    xkv = x, *torch.randn(2, B, T, KV, D, generator=source)

    def run(x, k, v, *state_and_real):  # as Attention.remember and Cache.remember call it
        out, what = memory(x, k, v, *state_and_real), f"{name}.forward"
        check_tuple(what, out, "k, v, state")
        check_form(f"{what}: k", out[0], "(B, T, KV, D)", k.shape, k.dtype)
        check_form(f"{what}: v", out[1], "(B, T, KV, D)", v.shape, v.dtype)
        shape = kind.state_shape(config, len(x))
        check_form(f"{what}: state", out[2], "state_shape(config, B)", shape, torch.float32)
        return out

    whole = run(*xkv)
    check_same(f"{name}: a state of zeros is not as None is", run(*xkv, zeros, None), whole)
    later = run(*(behind(part, torch.full((B,), 9)) for part in xkv))
    check_same(f"{name}: k or v changes with later tokens", *([x[:, :9] for x in out[:2]]
                                                              for out in (later, whole)))
    real = torch.arange(T) < lengths[:, None]
    padded = run(*(behind(part, lengths) for part in xkv), zeros, real)
    for row, length in enumerate(lengths):
        one = slice(row, row + 1), slice(length)
        before, alone = [x[one] for x in whole[:2]], run(*(x[one] for x in xkv), zeros[:, :1], None)
        check_same(f"{name}: k or v of a row changes with the rows beside it", before, alone)
        check_same(f"{name}: padding, where `real` is False, changes k, v or the state",
                   [*(x[one] for x in padded[:2]), padded[2][:, one[0]]], alone)
    for size in 11, 1:
        outs, state = [], zeros
        for piece in zip(*(part.split(size, dim=1) for part in xkv)):
            *kv, state = run(*piece, state, None)
            outs.append(kv)
        check_same(f"{name}: pieces of {size}, with the state passed on, are not the whole",
                   [*(torch.cat(parts, dim=1) for parts in zip(*outs)), state], whole)
    memory.bfloat16()
    run(*(part.bfloat16() for part in xkv), zeros, None)


def run(args):
    for file in args.also:
        memories.bring(file)
    check(args.methods or args.memories, "nothing to check: name --methods or --memories")
    for text in args.methods:
        text = sized(text, CONTEXT, get_tokenizer("bytes"), sparse.METHODS)
        hooks = check_method(sparse.parse(text, CONTEXT), whole=not args.less)
        print(f"{text}: passed ({', '.join(hooks) or 'it overrides no hook'})")
    for name in args.memories:
        check_memory(name)
        print(f"{name}: passed")


def main(argv=None):
    parser = flag_parser("check.py", "Does a selector or a memory of your own do what it must?")
    for flag, of in {"also": "Python files that register what is to be checked",
                     "methods": f"as eval_niah.py takes them; 1/4 is {CONTEXT // 4} tokens",
                     "memories": "names in memory.MEMORIES"}.items():
        parser.add_argument(f"--{flag}", nargs="+", default=[], metavar="NAME", help=of)
    parser.add_argument("--less", action="store_true", help="the methods may read less than their "
                        "budget by choice, so that a budget of the whole need not be dense")
    args = parser.parse_args(argv)
    command("check.py", lambda: run(args))


if __name__ == "__main__":
    main()
