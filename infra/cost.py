"""
What a training run will cost, told before it starts: parameters, FLOPs, memory per GPU, time. What
cannot fit is refused.

    FLOPs a token   6 * parameters + 12 * layers * H * D * entries read, for each pass (causal
                    attention reads T / 2)
    memory a GPU    16 bytes a parameter / GPUs       weights, two moments and a gradient, fp32; or
                                                      12 / GPUs and all gradients
                  + 2 tokens * layers * (a C + b M)   what backward needs of a layer, bf16; a layer
                                                      that is computed anew keeps C
                  + what the loss takes, and what is gathered in bf16: embedding, head and two
                    layers, or all weights

a and b are what torch.compile keeps (per_width). plan() chooses how a GPU's share of a batch is cut
into parts, and what stays on it between them. tests/test_cost.py holds the formula within 3 % of
the peaks that GPUs measured. Read parallel.py next.

Letters: C model width, H query heads, D head width, M width of the MLP, T context, V vocabulary.
"""
import math
import os
import re
from dataclasses import dataclass

import torch

from infra.loss import CHUNK_LOGITS

PEAK_FLOPS = {  # a second, dense bf16, by data sheet
    "H100": 989e12, "H200": 989e12, "GH200": 989e12, "A100": 312e12}
EXPECTED_MFU = 0.45   # what a time is estimated by
USABLE = 0.90         # of a GPU's memory: the rest is CUDA's, NCCL's, and lost between allocations
MOST_TOKENS = 65536   # at a time on a GPU: more are no faster
ENOUGH_TOKENS = 8192  # at a time: 7B on H200 then has an MFU of 55 % where all stays between parts,
                      # and of 50 % where all travels
SMALL = 1e14          # FLOPs of a pass below which a GPU waits for launches: docs/speed.md


# ---------------------------------------------------------------- FLOPs

def peak_flops(device_name):
    """Of a GPU, a second; None if unknown here."""
    for name, flops in PEAK_FLOPS.items():
        if re.search(rf"\b{name}", device_name):
            return flops
    return None


def parameters(config):
    """-> how many a model has; in one layer; in embedding, head and last norm"""
    C, M, D = config.width, config.mlp_width, config.head_width
    q, kv = config.n_head * D, config.n_kv_head * D
    layer = 2 * C * q + 2 * C * kv               # q and o; k and v
    layer += matrices_of_mlp(config) * C * M
    layer += 2 * C                               # two norms
    if config.qkv_bias:
        layer += q + 2 * kv
    if config.qk_norm:
        layer += 2 * D if config.qk_norm == "head" else q + kv
    if config.memory:                            # of any kind, counted as the paper's
        layer += (C + 1) * kv                    # the gates' projection and their biases
    if config.output_gate:
        layer += C * q
    ends = config.vocab_size * C + C             # head and last norm
    if not config.tied:
        ends += config.vocab_size * C            # the embedding
    return config.n_layer * layer + ends, layer, ends


def matrices_of_mlp(config):
    """SwiGLU has two up projections and one down, GELU one of each."""
    return 3 if config.swiglu else 2


def flops_per_token(config, reads):
    """
    FLOPs per token, forward and backward, of a pass in which it reads so many entries: T / 2 in
    dense attention.
    """
    used, _, _ = parameters(config)
    if not config.tied:  # the embedding is only looked up
        used -= config.vocab_size * config.width
    # A parameter takes a product and a sum forward, and twice that backward. So does each channel
    # of an entry that is read, once in q k and once in p v.
    return 6 * used + 12 * config.n_layer * config.n_head * config.head_width * reads


# ---------------------------------------------------------------- memory

# What stays on a GPU between the parts of a batch, on each GPU:
#   all       weights in bf16 and gradients in fp32, of all rows, which then travel once a batch
#   weights   they alone; in a single part, from its forward to its backward
#   nothing   weights are gathered for each part's forward and again for its backward
STAYS = "all", "weights", "nothing"


@dataclass
class Plan:
    """How a GPU's share of a batch is computed, and the bytes that takes."""
    device_batch: int      # sequences at a time
    recompute: int         # layers whose activations backward computes anew
    stays: str             # one of STAYS
    bytes: dict            # {what: bytes}
    room: float            # bytes that there are
    small: bool = False    # recorded as CUDA graphs, see parallel.py

    @property
    def total(self):
        return sum(self.bytes.values())


def needs(config, world, tokens, recompute=0, parts=1, stays="nothing", width=2, small=False):
    """
    {what: bytes} at the peak of a step, on each of `world` GPUs. tokens: at a time; parts: of a
    batch; stays, small: Plan's; width: bytes of a number in activations, 2 on a GPU.
    """
    total, layer, ends = parameters(config)
    C, M, V = config.width, config.mlp_width, config.vocab_size

    # A layer that backward computes anew keeps its input alone, but the one that backward is at
    # has all of its activations. A small model's residuals are in fp32, beside what bf16 needs.
    vectors = per_width(config)
    if small:
        vectors += 4
    of_layer = width * (C * vectors + M * matrices_of_mlp(config))
    activations = tokens * max(config.n_layer - recompute, 1) * of_layer
    activations += tokens * recompute * width * C

    # Logits and their gradient, a chunk at a time; the head's gradient; three vectors of x's size.
    # Over several chunks the head's gradient is added up in fp32, beside those of one chunk.
    logits, head = min(CHUNK_LOGITS, tokens * V), V * C
    of_head = width
    if tokens * V > CHUNK_LOGITS:
        of_head = 4 + 2 * width
    loss = 2 * width * logits + of_head * head + 3 * width * tokens * C

    # bf16 copies of the weights that are in use. Autocast makes none that last, fp32 none at all.
    gathered = width * total
    if small or (world == 1 and width == 4):
        gathered = 0
    elif stays == "nothing":
        gathered = width * (2 * layer + ends)

    # When a batch's only part begins backward, no gradient is there yet; at its end, no activation
    # is. So the larger of the two counts.
    if stays == "all":
        gradients = 4 * total
    elif parts > 1:
        gradients = 4 * total / world
    else:
        gradients = max(0, 4 * total / world - activations - loss)
    return {"weights and moments": 12 * total / world, "gradients": gradients,
            "activations": activations, "loss": loss, "gathered": gathered}


def per_width(config):
    """
    a: how many vectors of C backward needs of a token and a layer. b is that of the MLP's width:
    its up projections, and what leaves them.
    """
    # Of the block: inputs of attention and MLP before and after their norms, or their outputs.
    # Of q: as projected before its norm, after RoPE, and what attention gives. Of k and v: both.
    of_block, of_q, of_kv = 4, 2, 2
    if config.qk_norm:
        of_q += 1
    if config.qk_norm or config.memory:
        of_kv += 1                           # raw k
    if config.memory:
        of_kv += 2                           # v~ and the gate
    if config.memory and not config.pre_norm:
        of_block += 1                        # the gate's own input, where no norm's is there
    if config.memory and config.qk_norm:
        of_kv += 1                           # k~, before its norm
    if config.output_gate:
        of_block += 2
    of_heads = of_q + of_kv * config.n_kv_head / config.n_head  # times H * D, which may not be C
    return of_block + of_heads * config.n_head * config.head_width / config.width


def room(device, processes_here):
    """Bytes that one process may fill: of its GPU, or of the memory that all here share."""
    if device.startswith("cuda"):
        return USABLE * torch.cuda.mem_get_info()[1]
    if not hasattr(os, "sysconf"):  # Windows
        return math.inf
    return USABLE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / processes_here


# ---------------------------------------------------------------- a plan that fits

def plan(config, share, context_len, world, room, device_batch=None, recompute=None, width=2,
         small=False):
    """
    The cheapest Plan for `share` sequences a GPU and a batch that fits in `room` bytes.
    device_batch, recompute: not to be chosen; width, small: needs's. ValueError, which says what is
    missing, if nothing fits.
    """
    rows = [device_batch]
    if device_batch is None:
        rows = [n for n in range(share, 0, -1)
                if share % n == 0 and (n * context_len <= MOST_TOKENS or n == 1)]

    def can_stay(n):
        # One GPU's gradients have nowhere to go, and those of a single part nothing to be added to.
        return STAYS if world > 1 and n < share else STAYS[1:]

    # Quickest first: all as one part; then parts large enough, where everything is sent once a
    # batch; then parts as large as can be.
    ways = [(n, stays) for n in rows if n == share for stays in can_stay(n)]
    ways += [(n, can_stay(n)[0]) for n in rows if n * context_len >= ENOUGH_TOKENS]
    ways += [(n, stays) for n in rows for stays in can_stay(n)]
    candidates = [(n, min(recompute or 0, config.n_layer), stays) for n, stays in ways]
    if recompute is None:  # last, as few layers anew as can be, with as few sequences as can be
        few = rows[-1]
        candidates += [(few, anew, stays)
                       for anew in range(1, config.n_layer + 1) for stays in can_stay(few)]

    for n, anew, stays in candidates:
        bytes_of = needs(config, world, n * context_len, anew, share // n, stays, width, small)
        found = Plan(n, anew, stays, bytes_of, room, small)
        if found.total <= room:
            return found
    raise ValueError(f"this cannot fit: {size(found.total)} a process, and {size(room)} are there "
                     f"({in_words(found.bytes)}): {remedy(config, world, found)}, or choose a "
                     "smaller model")


def remedy(config, world, smallest):
    """What to do where even the smallest plan does not fit."""
    of_weights = 16 * parameters(config)[0]
    fixed = smallest.total - of_weights / world
    for n in range(world, 4097):
        if fixed + of_weights / n <= smallest.room:
            return f"{n} processes like this one could hold it"
    return "shorten --context_len"


def plan_of(args, config, of_pass, world, room):
    """
    The Plan of a run with these flags. of_pass: {name: FLOPs of a step}. One GPU records the passes
    of a small model as CUDA graphs, where it has room for the batch as a whole.
    """
    on_gpu = args.device.startswith("cuda")
    shape = config, args.batch // world, args.context_len, world, room
    settings = dict(recompute=args.recompute, width=2 if on_gpu else 4)
    waits_for_launches = on_gpu and max(of_pass.values()) < SMALL
    whole = world == 1 and args.device_batch in (None, args.batch)
    if waits_for_launches and whole and args.compile == "on":
        try:
            return plan(*shape, args.batch, small=True, **settings)
        except ValueError:
            pass  # cut into parts, and computed as large models are, it may fit
    return plan(*shape, args.device_batch, **settings)


# ---------------------------------------------------------------- what a run tells

def in_words(sizes):
    """{what: bytes}, as a user reads it; hundredths of it all are left out."""
    enough = 0.01 * sum(sizes.values())
    return ", ".join(f"{what} {size(value)}" for what, value in sizes.items() if value > enough)


def size(n):
    return f"{n / 1e9:.1f} GB" if n >= 1e8 else f"{n / 1e6:.1f} MB"


def compact(number, units):
    """12,345,678 -> 12.3M, by the units' letters for thousands: KMBT of tokens, kMGTPE of FLOPs."""
    power = min(len(units), int(math.log10(max(1, number)) / 3 + 1e-9))
    unit = units[power - 1] if power else ""
    return f"{number / 1000 ** power:.3g}{unit}"


def lines(config, plan, args, of_pass, peak, world):
    """
    What a run tells before it starts. of_pass: {name: FLOPs of a step}; peak: FLOPs a second of a
    GPU, None if unknown.
    """
    on_gpu = args.device.startswith("cuda")
    per_step, flops = args.batch * args.context_len, sum(of_pass.values())

    # what is trained
    memory = {None: "the memory of Eq. 1 off", "decay": "the memory of Eq. 1 on"}
    of_kind = memory.get(config.memory, f"the memory {config.memory} on")
    line = f"{parameters(config)[0] / 1e6:,.1f}M parameters, {of_kind}"
    line += f", ARL over {args.arl} tokens" if args.arl else ", ARL off"
    if args.joint:
        line += f", joint window of {args.joint}"
    if args.adapt:
        line += f", through {args.adapt}"
    yield line

    # on how much, and how a step is cut
    parts = args.batch // world // plan.device_batch
    processes = "1 process" if world == 1 else f"{world} processes"
    in_parts = f"{parts} parts, whose gradients add up, x " if parts > 1 else ""
    yield (f"{args.steps:,} steps of {args.batch} x {args.context_len} = {per_step:,} tokens, "
           f"{compact(args.steps * per_step, 'KMBT')} in all. A step: {' and '.join(of_pass)} "
           f"pass, each of {processes} x {in_parts}{plan.device_batch} sequences")

    # for how long
    line = (f"{compact(flops / per_step, 'kMGTPE')}FLOP a token, {compact(flops, 'kMGTPE')}FLOP a "
            f"step, {args.steps * flops:.2e} in all")
    if on_gpu and peak:
        hours = args.steps * flops / (EXPECTED_MFU * peak * world) / 3600
        hours = f"{hours:,.0f}" if hours >= 10 else f"{hours:.2g}"
        line += f", about {hours} hours at an MFU of {EXPECTED_MFU:.0%}"
    yield line

    # where it is held
    where = "GPU memory" if on_gpu else "RAM"
    line = (f"{where} per process: {size(plan.total)} of {size(plan.room)} "
            f"({in_words(plan.bytes)})")
    if plan.recompute:
        line += f"; {plan.recompute} of {config.n_layer} layers compute their activations anew"
    if world > 1 and plan.stays == "all":
        line += "; weights and gradients travel once a batch"
    if world > 1 and plan.stays == "weights":
        line += "; weights travel once a batch"
    yield line
