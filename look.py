"""
One prompt, looked at: what each head selects along it, and how a token spreads through the memory.

    selection   share[l, h, t]   of the answer's tokens, at how many KV head h of layer l read
                                 position t of the prompt
    trace       w[t] = (1 - g[s]) g[s+1] ... g[t]   what k~[t] and v~[t] hold of token s: Eq. 1 of
                                 an impulse, 1 at s and 0 elsewhere, with the model's own gates

    python look.py                                      # attention and memory beside each other
    python look.py --method moba:budget=1/8 --index=3
    python look.py --prompt "$(cat notes.txt) The code is" --mark 8071342

The answer that is fed in is the gold one, as in H1 (eval_niah.hits), so that all models are asked
at the same places. Its first token follows from the prefill, and does not count. MoBA selects in
prefill alone: there the prompt's last tokens are looked at, which the answer follows from. After a
--prompt of one's own the model's own answer is fed in.

Shown is what a method says that it has read, of one prompt; how often heads find the needle,
eval_niah.py --hits counts. Checked in tests/test_look.py. Read sample.py first.

Letters: L layers, KV key/value heads, T tokens of the prompt, Q tokens that read, n tokens in which
a trace is followed.
"""
import math
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional as F

import niah
import sparse
from infra.cli import LONGEST, ROOT, command, flag_parser, sized
from infra.reads import places_of, was_read
from infra.report import pyplot
from memory import Decay
from sample import NEEDLE, a_needle, add_question, ids_of, loaded, right_or_wrong
from triton_ops import backend

LAST = 16   # of a method of prefill: tokens of the prompt that are looked at
REACH = 64  # tokens in which a trace is followed
TASK = "niah_multikey_2"  # of the needle, if nobody names one


class View(NamedTuple):
    """What is seen of one model under one method."""
    name: str            # of both
    memory: str          # which of memory.MEMORIES, or None
    said: str            # its own answer
    verdict: str         # "right", "wrong", or "" where nobody knows
    score: float         # 0 to 1, or None
    share: torch.Tensor  # (L, KV, T)  of Q tokens, how many read each position of the prompt
    found: torch.Tensor  # (L, KV)     of these, how many read the needle, where it is copied from
    counts: str          # the same in words
    spans: list          # [start, end) tokens of the needle
    others: list         # likewise, of needles that nobody asks for
    traces: dict         # {"k~": (L, KV, n), "v~": ...} of the needle's first token
    text: list           # of these n tokens


# ---------------------------------------------------------------- what each head selects

@torch.no_grad()
def look(name, model, tokenizer, ids, method, question, args):
    """-> View. question: of question_of; ids: its prompt in the model's tokens"""
    prompt, answers, target, places = question
    T, by, pieces = len(ids), sparse.phases(method), niah.pieces(tokenizer, ids)
    others = [one.span(1) for one in NEEDLE.finditer(prompt) if one.span(1) not in places]
    spans, others = (niah.token_spans(prompt, ids, of, tokenizer) for of in (places, others))

    tokens, blocks = torch.tensor([ids], device=args.device), []
    cache = model.new_cache(1, T + args.max_new_tokens, sparse.window_of(method))
    logits = model.prefill(tokens, None, cache, method,
                           watch=lambda layer, selected, real: blocks.append(selected))
    with cache.turn(method) as own:
        fed, = model.decode(logits, own, args.max_new_tokens, method,
                            eos_id=tokenizer.eos_id).tolist()
    said = tokenizer.decode([token for token in fed if token != tokenizer.eos_id])

    # What is read at each token, and the spans that it is after: none at a comma of the answer.
    if not sparse.drops(method) and by.decode_by == sparse.Dense():
        read, which = read_in_prefill(blocks, by.prefill_by, T), "at the prompt's end"
        after = [spans] * len(read)
    else:
        after, which = [spans] * len(fed), "fed this answer"
        if answers:
            fed, which = niah.target_ids(prompt, target, tokenizer), "fed the right answer"
            sources = places_of(niah.pieces(tokenizer, fed), pieces, answers, spans)
            after = [[(one.low, one.high)] if one else [] for one in sources[1:]]
        with cache.turn(method) as own:
            read = [read_in_step(model, own, token, method, T) for token, _ in zip(fed, after)]
    if not read:
        raise ValueError(f"{name} writes the answer as one token, which follows from the prefill: "
                         "there is no step to look at")
    hits = [(one & inside(T, of)).any(-1) for one, of in zip(read, after) if of or not spans]
    share, found = torch.stack(read).float().mean(0), torch.stack(hits).float().mean(0)
    every, some = int((found == 1).sum()), int((found > 0).sum())
    counts = (f"{which}, the best of {found.numel()} heads reads the needle at {found.max():.0%} "
              f"of {len(hits)} tokens; {every} at all, {some - every} at some")

    s = spans[0][0] if spans else T
    text = [readable(piece.decode(errors="replace")) for piece in pieces[s:s + REACH]]
    return View(name, model.config.memory, readable(said)[:60], right_or_wrong(said, answers),
                niah.score_ruler(said, answers) if answers else None, share, found,
                counts if spans else "no needle: --mark names one", spans, others,
                traces_of(model, tokens, s, method), text)


def read_in_step(model, cache, token, method, T):
    """Feeds one token. -> which of the prompt's positions each head reads, bool (L, KV, T)"""
    model.step(torch.tensor([token], device=cache.device), cache, method)
    # some positions at a time, as each is compared with all that was selected
    parts = torch.arange(T, device=cache.device).split(256)
    return torch.stack([torch.cat([was_read(cache, layer, some, some + 1) for some in parts]).T
                        for layer in range(model.config.n_layer)]).cpu()


def read_in_prefill(blocks, method, T):
    """The same of the prompt's last tokens, of the blocks (1, KV, T, S) that each layer selects."""
    if not hasattr(method, "block_size") or any(of_layer is None for of_layer in blocks):
        raise ValueError(f"{sparse.name(method)} tells of nothing that it selects: name another "
                         "--method, such as quest:budget=1/16")
    chosen = torch.stack([of_layer[0, :, -LAST:].cpu() for of_layer in blocks])  # (L, KV, Q, S)
    position, Q = torch.arange(T), chosen.shape[2]
    keep = (chosen[..., None] == position // method.block_size).any(-2)          # (L, KV, Q, T)
    return [keep[:, :, i] & (position <= T - Q + i) for i in range(Q)]


def inside(T, spans):
    """Whether a position is in one of the spans, bool (T,)"""
    found = torch.zeros(T, dtype=torch.bool)
    for start, end in spans:
        found[start:end] = True
    return found


# ---------------------------------------------------------------- how a token spreads

@torch.no_grad()
def traces_of(model, tokens, s, method=None):
    """
    As the model reads tokens (1, T): what k~ and v~ hold of token s from there on, means over
    channels, {"k~": (L, KV, n), "v~": ...}, or {"k~ and v~": ...} where they are alike. {} without
    a memory that has gates, or such a token.
    """
    memories, found = [layer.self_attn.memory for layer in model.layers], []
    if s >= tokens.shape[1] or not all(isinstance(memory, Decay) for memory in memories):
        return {}

    def send_impulse(memory, inputs):
        x, k, _ = inputs
        impulse = torch.zeros_like(k, dtype=torch.float32)  # (1, s + n, KV, D)
        impulse[:, s] = 1
        k, v, _ = memory.forward(x, impulse, impulse)
        found.append(torch.stack([k, v])[:, 0, s:].mean(-1).transpose(1, 2).cpu())  # (2, KV, n)

    hooks = [memory.register_forward_pre_hook(send_impulse) for memory in memories]
    try:
        model.hidden(tokens[:, :s + REACH], method)
    finally:
        for hook in hooks:
            hook.remove()
    k, v = torch.stack(found, dim=1)
    return {"k~ and v~": v} if k.equal(v) else {"k~": k, "v~": v}


def by_decades(w):
    """Weights on a scale on which decay is even: 0.1 % -> 0, 1 % -> 1/3, 10 % -> 2/3, 100 % -> 1"""
    return 1 + w.clamp_min(1e-3).log10() / 3


# ---------------------------------------------------------------- in words, and as text

def columns(share, block, most):
    """(..., T) -> (..., N <= most) means of neighbours, whole blocks; how many tokens are one"""
    size = block * math.ceil(share.shape[-1] / (block * most))
    return F.avg_pool1d(share, size, ceil_mode=True), size


def tell(view, block):
    """Prints what draw draws."""
    shares, size = columns(view.share, block, 96)
    needle, _ = columns(inside(view.share.shape[-1], view.spans).float()[None], block, 96)
    print(f"\n{view.name}: {view.said}   {view.verdict}\n{view.counts}")
    print_heads(shares, [f"{x:.0%}" if x else "" for x in view.found.flatten().tolist()])
    below = "".join("^" if x else " " for x in needle[0])
    print(f"{'':11}{below.rstrip()}\n{'':11}^: needle; a column is {size} tokens; . : + # are read "
          "at up to a quarter, a half, three quarters, all of these tokens")
    if not view.traces:
        why = "no --mark to follow" if not view.text else f"memory: {view.memory}, without gates"
        print(f"no trace: {why if view.memory else 'no memory'}")
    for name, w in view.traces.items():
        far = [t for t in range(w.shape[-1]) if (w[..., t] >= 0.01).any()]
        own, behind = w[..., 0].mean(), w[..., 1:].sum(-1).mean()
        print(f"\nwhat {name} hold of {view.text[0]!r}, the needle's first token: in the mean of "
              f"heads {own:.0%} in its place and {behind:.0%} behind, in some head 1 % as far as "
              f"{max(far, default=0)} tokens behind")
        if max(map(len, view.text)) < 2:
            print(f"{'':11}{''.join(view.text)}")
        print_heads(by_decades(w), [""] * w[..., 0].numel())
        print(f"{'':11}. : + # are more than 0.1, 0.6, 3 and 18 %")


def print_heads(values, ends):
    """A line for each head of values (L, KV, N), 0 to 1, and what stands behind it."""
    KV = values.shape[1]
    for row, (of_head, end) in enumerate(zip(values.flatten(0, 1).tolist(), ends)):
        label = "" if row % KV else f"layer {row // KV}"
        shades = "".join(" .:+#"[math.ceil(4 * min(value, 1))] for value in of_head)
        print(f"{label:>9} |{shades}| {end}".rstrip())


def lesson(views):
    """Whether models with a memory did better than those without, this once."""
    plain, remembering = [v for v in views if not v.memory], [v for v in views if v.memory]
    if not plain or not remembering or views[0].score is None:
        return ""
    before, after = (max(v.score for v in some) for some in (plain, remembering))
    read = [f"{max(v.found.max() for v in some):.0%}" for some in (plain, remembering)]
    does = "helps" if after > before else "harms" if after < before else "makes no difference"
    return (f"\nThe memory {does} here: {before:.0%} of the answer is right without it, "
            f"{after:.0%} with it. The best head reads the needle at {read[0]} of the tokens "
            f"without the memory, at {read[1]} with it.")


def readable(text):
    """On one line."""
    return "".join(c if c.isprintable() else {"\n": "\u21b5"}.get(c, "\u00b7") for c in text)


# ---------------------------------------------------------------- as figures

INK = {"font.size": 8, "axes.titlesize": 8, "axes.linewidth": 0.5, "xtick.major.width": 0.5,
       "ytick.major.size": 0, "text.parse_math": False, "figure.constrained_layout.use": True}
ORANGE = "#d9641e"


def draw(views, block, folder):
    if not (plt := pyplot()):
        return
    folder.mkdir(parents=True, exist_ok=True)
    traces = [(view, *trace) for view in views for trace in view.traces.items()]
    with plt.rc_context(INK), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the font lacks some of the world's letters
        figures = {"selection": draw_selection(plt, views, block)}
        if traces:
            figures["trace"] = draw_traces(plt, traces, block)
        for name, figure in figures.items():
            figure.savefig(folder / f"{name}.png", dpi=200)
            figure.savefig(folder / f"{name}.svg", dpi=200)
            plt.close(figure)
    print(f"\n{' and '.join(figures)}, as .png and .svg, in {folder}")


def panels(plt, n, heads):
    """A figure of 7 inches with n axes below each other, each of them with a row for each head."""
    height = min(4, max(1.2, 0.075 * heads))
    figure, axes = plt.subplots(n, figsize=(7, 0.5 + n * (height + 0.6)), squeeze=False)
    return figure, axes[:, 0]


def draw_heads(ax, image, KV, width):
    """image: (L * KV, N) from 0 to 1, or colours (L * KV, N, 3); lines set layers apart"""
    rows = len(image)
    drawn = ax.imshow(image.numpy(), cmap="Greys", vmin=0, vmax=1, aspect="auto",
                      interpolation="nearest", extent=(0, width, rows, 0))
    ax.hlines(range(KV, rows, KV), 0, width, color="0.7", lw=0.5)
    layers = range(0, rows // KV, math.ceil(rows / KV / 12))
    ax.set_yticks([(layer + 0.5) * KV for layer in layers], [f"layer {layer}" for layer in layers])
    return drawn


def draw_selection(plt, views, block):
    figure, axes = panels(plt, len(views), views[0].found.numel())
    for ax, view in zip(axes, views):
        T, rows = view.share.shape[-1], view.found.numel()
        shares, size = columns(view.share, block, 512)
        needle, _ = columns(inside(T, view.spans).float()[None], block, 512)
        # what is taken from white: all, and where the needle is, what leaves orange
        ink = torch.where(needle[0, :, None] > 0, torch.tensor([0.15, 0.61, 0.88]), 1)
        draw_heads(ax, 1 - shares.flatten(0, 1)[..., None] * ink, shares.shape[1], size * len(ink))
        above = -0.05 * rows
        for span in view.others:
            ax.plot(span, (above, above), color="0.6", lw=2)
        for start, _ in view.spans:
            ax.plot(start, above, "v", color=ORANGE, ms=6, zorder=4)
        for start, _ in view.spans[-1:]:
            ax.text(start, above, "   needle   ", ha="left" if start < 0.9 * T else "right",
                    va="center", color=ORANGE, zorder=3, bbox={"color": "white", "pad": 0})
        for row, found in enumerate(view.found.flatten().tolist()):
            if found:
                ax.plot(1.012 * T, row + 0.5, "o", ms=4, mec=ORANGE, clip_on=False,
                        mfc=ORANGE if found == 1 else "white")
        ax.set(xlim=(0, T), ylim=(rows, 2 * above))
        mark = {"right": "\u2713", "wrong": "\u2717"}.get(view.verdict, view.verdict)
        ax.set_title(f"{view.name}: {view.said} {mark}\n{view.counts}", loc="left")
    ax.set_xlabel("position in the prompt; a row is a KV head; black: read at each of these "
                  "tokens, white: at none\norange: where the needle is; \u25cf a head that reads "
                  "it at each, \u25cb at some; grey dashes: other needles")
    return figure


def draw_traces(plt, traces, block):
    """traces: [(view, name, weights (L, KV, n))]"""
    figure, axes = panels(plt, len(traces), traces[0][2][..., 0].numel())
    for ax, (view, name, w) in zip(axes, traces):
        n, start = w.shape[-1], view.spans[0][0]
        drawn = draw_heads(ax, by_decades(w).flatten(0, 1), w.shape[1], n)
        ax.set_xticks([t + 0.5 for t in range(n)], view.text, family="monospace",
                      rotation=90 if max(map(len, view.text)) > 1 else 0)
        ax.tick_params(axis="x", length=0)
        ends = range(-start % block or block, n, block) if block > 1 else ()
        ax.vlines(ends, 0, len(w.flatten(0, 1)), color=ORANGE, lw=1, ls="--")
        ax.set_title(f"{view.name.partition(',')[0]}: how much of {view.text[0]!r}, the needle's "
                     f"first token, {name} hold", loc="left")
        bar = figure.colorbar(drawn, ax=ax, pad=0.01, aspect=30)
        bar.set_ticks([0, 1 / 3, 2 / 3, 1], labels=["0.1 %", "1 %", "10 %", "100 %"])
    if block > 1:
        ax.set_xlabel("the tokens from there on; dashed: where the method's next block begins")
    return figure


# ---------------------------------------------------------------- python look.py

def flags():
    parser = flag_parser("look.py", "See what each head selects in one prompt, and how a token "
                         "spreads through the memory: as text, and as figures with matplotlib.")
    add_question(parser, "checkpoints/attention and checkpoints/memory", TASK)
    add = parser.add_argument
    add("--method", default="quest:budget=1/16", metavar="METHOD", help="as eval_niah.py takes it")
    add("--mark", metavar="TEXT", help="what in --prompt is the needle: where it first stands")
    add("--out", default="out/look", metavar="DIR", help="folder of the figures")
    return parser


def run(args):
    backend.use(args.kernels)
    args.ckpt = args.ckpt or [ROOT / "checkpoints" / name for name in ("attention", "memory")]
    models = loaded(args)
    first, tokenizer = next(iter(models.values()))
    most = LONGEST if args.device.startswith("cuda") else 2048
    context_len = args.context_len or min(most, first.config.context_len)
    question = question_of(args, context_len, tokenizer)
    views = []
    for path, (model, tokenizer) in models.items():
        ids = ids_of(question[0], path, model, tokenizer, [args.method], context_len, args)
        text = sized(args.method, context_len, tokenizer, sparse.METHODS)
        method = sparse.parse(text, context_len)
        by = sparse.phases(method)
        if by == sparse.Compose():
            raise ValueError("--method: dense selects nothing, it reads everything")
        block = getattr(by.decode_by, "block_size", getattr(by.prefill_by, "block_size", 1))
        name = f"{Path(path).resolve().name}, {text}"
        views.append(look(name, model, tokenizer, ids, method, question, args))
        tell(views[-1], block)
    print(lesson(views))
    draw(views, block, Path(args.out))


def question_of(args, context_len, tokenizer):
    """
    Of a task, or of --prompt and --mark: the prompt; its answers, [] where nobody knows; what a
    perfect model writes; and [start, end) characters of the needle, of each answer.
    """
    if args.prompt is None:
        if args.mark:
            raise ValueError("--mark goes with a --prompt: a task knows its needle")
        args.task = args.task or TASK
        e = a_needle(args, context_len, tokenizer)
        places = [niah.place_of(answer, e.prompt, e.task) for answer in e.answers]
        return e.prompt, e.answers, e.target, places
    start = args.prompt.find(args.mark or "")
    if start < 0:
        raise ValueError("--mark: this text is not in --prompt")
    return args.prompt, [], "", [(start, start + len(args.mark))] if args.mark else []


def main(argv=None):
    args = flags().parse_args(argv)
    args.argv = argv
    command("look.py", lambda: run(args), args, "interrupted")


if __name__ == "__main__":
    main()
