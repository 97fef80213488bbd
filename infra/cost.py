"""
What a training run will cost, told before it starts: parameters, FLOPs, memory per GPU, time. What cannot fit is refused.

    FLOPs a token   6 * parameters + 12 * layers * C * entries read, for each pass (causal attention reads T / 2)
    memory a GPU    16 bytes a parameter / GPUs          weights, two moments and a gradient, fp32; or 12 / GPUs and all gradients
                  + 2 tokens * layers * (a C + b M)      what backward needs of a layer, bf16; a recomputed layer keeps C
                  + what the loss takes, and what is gathered in bf16: embedding, head, two layers; or all weights

plan() chooses how a GPU's share of a batch is cut into parts, and what stays on it between them. a and b are what
torch.compile keeps; README.md holds predictions beside measured peaks. Checked in tests/test_cost.py. Read parallel.py next.

Letters: C model width, M width of the MLP, T context, V vocabulary.
"""
import math
import os
import re
from dataclasses import dataclass

import torch

from infra.loss import CHUNK_LOGITS

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "GH200": 989e12, "A100": 312e12}  # a second, dense bf16, by data sheet
EXPECTED_MFU = 0.45   # what a time is estimated by
USABLE = 0.90         # of a GPU's memory: the rest is CUDA's, NCCL's, and what allocation leaves in pieces
MOST_TOKENS = 65536   # at a time on a GPU: more are no faster
ENOUGH_TOKENS = 8192  # at a time: 7B on H200 reaches an MFU of 55 % with all that stays between such parts, 50 % with all that travels


def peak_flops(device_name):
    """Of a GPU, a second; None if unknown here."""
    return next((flops for name, flops in PEAK_FLOPS.items() if re.search(rf"\b{name}", device_name)), None)


def parameters(config):
    """-> how many a model has; in one layer; in embedding, head and last norm"""
    C, M, kv = config.width, config.mlp_width, config.n_kv_head * config.head_width
    attention = 2 * C * C + 2 * C * kv + (C + kv if config.qk_norm else 0)            # q, o; k, v; QK-norm
    attention += (C + 1) * kv if config.memory else 0
    attention += C * C if config.output_gate else 0
    layer = attention + (3 if config.swiglu else 2) * C * M + 2 * C
    ends = (1 if config.tied else 2) * config.vocab_size * C + C
    return config.n_layer * layer + ends, layer, ends


def flops_per_token(config, reads):
    """FLOPs per token, forward and backward, of a pass in which it reads so many entries: T / 2 in dense attention."""
    used = parameters(config)[0] - (0 if config.tied else config.vocab_size * config.width)  # the embedding is only looked up
    return 6 * used + 12 * config.n_layer * config.width * reads


# "all": weights in bf16 and gradients in fp32, of all rows, which then travel once a batch; "weights": they alone, in a single part
# from forward to backward; "nothing": they are gathered for each part's forward and again for its backward
STAYS = "all", "weights", "nothing"


@dataclass
class Plan:
    """How a GPU's share of a batch is computed, and the bytes that takes."""
    device_batch: int      # sequences at a time
    recompute: int         # layers whose activations backward computes anew
    stays: str             # one of STAYS, on each GPU between the parts of a batch
    bytes: dict            # {what: bytes}
    room: float            # bytes that there are

    @property
    def total(self):
        return sum(self.bytes.values())


def needs(config, world, tokens, recompute=0, parts=1, stays="nothing", width=2, small=False):
    """
    {what: bytes} at the peak of a step, on each of `world` GPUs. tokens: at a time; parts: of a batch; stays: Plan's. width:
    bytes of a number in activations, 2 on a GPU. small: by autocast, as train.py computes small models.
    """
    total, layer, ends = parameters(config)
    C, M = config.width, config.mlp_width
    kept = width * (C * (per_width(config) + (4 if small else 0)) + M * (3 if config.swiglu else 2))     # a token in a layer
    anew = width * C                                                             # the layer's input alone
    activations = tokens * (max(config.n_layer - recompute, 1) * kept + recompute * anew)
    logits, head = min(CHUNK_LOGITS, tokens * config.vocab_size), config.vocab_size * C
    in_one_chunk = tokens * config.vocab_size <= CHUNK_LOGITS                    # else the head's gradient is added up, in fp32
    loss = 2 * width * logits + (width if in_one_chunk else 4 + 2 * width) * head + 3 * width * tokens * C
    gathered = 0 if small or (world == 1 and width == 4) else width * (2 * layer + ends if stays == "nothing" else total)
    if stays == "all":
        gradients = 4 * total                                                    # a layer's rows are kept as the whole is dropped
    elif parts > 1:
        gradients = 4 * total / world
    else:  # when a batch's only part begins backward, no gradient is there yet; at its end, no activation is
        gradients = max(0, 4 * total / world - activations - loss)
    return {"weights and moments": 12 * total / world, "gradients": gradients, "activations": activations, "loss": loss, "gathered": gathered}


def per_width(config):
    """a: vectors of C that backward needs of a token and a layer. b, of the MLP's width: its up projection(s), and what leaves them."""
    memory, normed = config.memory, config.qk_norm
    of_block = 4 + (1 if memory and not config.pre_norm else 0)      # inputs of attention and MLP, before and after norms, or their outputs; gate's
    of_q = 1 + (1 if normed else 0) + 1                              # after RoPE, before its norm; what attention gives
    of_kv = 2 + (1 if normed or memory else 0) + (2 if memory else 0) + (1 if normed and memory else 0)  # k, v; raw k; v~, gate; k~
    return of_block + of_q + of_kv * config.n_kv_head / config.n_head + (2 if config.output_gate else 0)


def plan(config, share, context_len, world, room, device_batch=None, recompute=None, width=2, small=False):
    """
    The cheapest Plan for `share` sequences a GPU and a batch that fits in `room` bytes. device_batch, recompute: not to be
    chosen; width, small: needs's. ValueError, which says what is missing, if nothing fits.
    """
    rows = [device_batch] if device_batch else [n for n in range(share, 0, -1) if share % n == 0 and (n * context_len <= MOST_TOKENS or n == 1)]
    # one GPU's gradients have nowhere to go, and those of a single part nothing to be added to
    can_stay = lambda n: STAYS if world > 1 and n < share else STAYS[1:]
    ways = [(n, stays) for n in rows if n == share for stays in can_stay(n)]              # best is one part
    ways += [(n, can_stay(n)[0]) for n in rows if n * context_len >= ENOUGH_TOKENS]       # then that all is sent once a batch
    ways += [(n, stays) for n in rows for stays in can_stay(n)]                           # then parts as large as can be
    candidates = [(n, min(recompute or 0, config.n_layer), stays) for n, stays in ways]
    if recompute is None:  # then as few layers as can be, with as few sequences as can be
        candidates += [(rows[-1], anew, stays) for anew in range(1, config.n_layer + 1) for stays in can_stay(rows[-1])]
    for n, anew, stays in candidates:
        found = Plan(n, anew, stays, needs(config, world, n * context_len, anew, share // n, stays, width, small), room)
        if found.total <= room:
            return found
    fixed = found.total - 16 * parameters(config)[0] / world
    enough = next((n for n in range(world, 4097) if fixed + 16 * parameters(config)[0] / n <= room), None)
    raise ValueError(f"this cannot fit: {size(found.total)} a process, and {size(room)} are there ({told(found.bytes)}): "
                     + (f"{enough} processes like this one could hold it" if enough else "shorten --context_len") + ", or choose a smaller model")


def told(sizes):
    """{what: bytes}, as a user reads it; hundredths of it all are left out."""
    return ", ".join(f"{what} {size(value)}" for what, value in sizes.items() if value > 0.01 * sum(sizes.values()))


def size(n):
    return f"{n / 1e9:.1f} GB" if n >= 1e8 else f"{n / 1e6:.1f} MB"


def short(number, units):
    """12,345,678 -> 12.3M, with the units' letters for thousands: KMBT of tokens, kMGTPE of FLOPs."""
    power = min(len(units), int(math.log10(max(1, number)) / 3 + 1e-9))
    return f"{number / 1000 ** power:.3g}{units[power - 1] if power else ''}"


def room(device, processes_here):
    """Bytes that one process may fill: of its GPU, or of this machine's memory, which all here share."""
    if device.startswith("cuda"):
        return USABLE * torch.cuda.mem_get_info()[1]
    if not hasattr(os, "sysconf"):  # Windows
        return math.inf
    return USABLE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / processes_here


def lines(config, plan, args, of_pass, peak, world):
    """What a run tells before it starts. of_pass: {name: FLOPs of a step}; peak: FLOPs a second of a GPU, None if unknown."""
    per_step, parts, flops = args.batch * args.context_len, args.batch // world // plan.device_batch, sum(of_pass.values())
    yield (f"{parameters(config)[0] / 1e6:,.1f}M parameters, the memory of Eq. 1 {'on' if config.memory else 'off'}, "
           + (f"ARL over {args.arl} tokens" if args.arl else "ARL off")
           + (f", joint window of {args.joint}" if args.joint else "") + (f", through {args.adapt}" if args.adapt else ""))
    yield (f"{args.steps:,} steps of {args.batch} x {args.context_len} = {per_step:,} tokens, {short(args.steps * per_step, 'KMBT')} in all. A step: "
           f"{' and '.join(of_pass)} pass, each of {world} process{'es' if world > 1 else ''} x "
           + (f"{parts} parts, whose gradients add up, x " if parts > 1 else "") + f"{plan.device_batch} sequences")
    on_gpu = args.device.startswith("cuda")
    time = ""
    if on_gpu and peak:
        hours = args.steps * flops / (EXPECTED_MFU * peak * world) / 3600
        hours = f"{hours:,.0f}" if hours >= 10 else f"{hours:.2g}"
        time = f", about {hours} hours at an MFU of {EXPECTED_MFU:.0%}"
    yield f"{short(flops / per_step, 'kMGTPE')}FLOP a token, {short(flops, 'kMGTPE')}FLOP a step, {args.steps * flops:.2e} in all{time}"
    yield (f"{'GPU memory' if on_gpu else 'RAM'} per process: {size(plan.total)} of {size(plan.room)} ({told(plan.bytes)})"
           + (f"; {plan.recompute} of {config.n_layer} layers compute their activations anew" if plan.recompute else "")
           + {"all": "; weights and gradients travel once a batch", "weights": "; weights travel once a batch", "nothing": ""}[plan.stays] * (world > 1))
