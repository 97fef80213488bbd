"""
Where does a pretrained model need its keys and values least? There a memory may start long without
much harm, to be trained from that.

Dense attention over k and v is watched, and what it would get wrong with the memory's k~ and v~:

    values   e[i] = sum over t of a[i, t] (v[t] - v~[t]), a being the softmax of a query head.
             A head's values may be turned: W_v by R, and the columns of W_o that read them by R,
             too, and the model computes what it did. R sorts directions by the energy of the error,
             the least first: r' C r for a direction r, with C the sum of mean e e' over the query
             heads that read these values.
    keys     RoPE turns channels d and d + D/2 as a pair, so that keys stay as they are. A pair's
             need is the mean over queries of |q[i]|^2 times the sum of a[i, t] |k[t] - k~[t]|^2.
    heads    Each KV head is given the memory alone, and the loss tells what that costs. The
             cheapest get it, the next ones are measured beside them, and so on.

The gate is one for key and value, so the least needed pairs of the key are the channels to which
the least needed directions of the value are turned. `started` makes such a model, and conversion.py
trains it. Checked in tests/test_starts.py. Read swap.py before, which lets attention see k and k~.

Letters: B batch, T tokens, H query heads, KV key/value heads, G = H / KV, D head width.
"""
import copy
import math
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import torch

from data import Shards, tokenizer_of
from experiments import memories  # noqa: F401  puts its classes into memory.MEMORIES
from experiments.swap import half, swapped
from infra import files, weights
from model import Transformer
from sparse import Dense, attend

REST = 0.005  # g of the gates that do not start long: k~ is k, but for half a percent


@dataclass(frozen=True)
class Start:
    """Where the gates of a fresh memory start long. Elsewhere they start at REST."""
    kind: str | None = "decay"  # of memory.MEMORIES; None: values are turned alone, for a control
    heads: float = 0.4          # share of the model's KV heads, those that it costs least
    pairs: float = 0.53         # share of each head's pairs of channels, those least needed
    length: float = 32.0        # tokens, 1 / (1 - g)


# ---------------------------------------------------------------- which channels

class Watch(Dense):
    """
    Dense attention over k and v of a `swapped` model, which notes of each layer what k~ and v~
    would do: k_need (KV, D/2), and v_error (KV, D, D), the C of above.
    """
    takes_half = True

    def __init__(self):
        self.found = []

    def prefill(self, q, k, v, start, dice):
        read = lambda x: attend(q, half(k, "k"), x, causal=True)          # (B, T, H, D)
        energy = lambda x: x.unflatten(-1, (2, -1)).square().sum(-2)      # (..., D/2) of each pair
        of_groups = lambda x: x.unflatten(2, (k.shape[2] // 2, -1))       # (B, T, KV, G, ...)
        error = energy(half(k, "k") - half(k, "k~"))                      # (B, T, KV, D/2)
        # on a GPU, what attention reads must be as wide as the keys
        need = energy(q) * read(error.repeat(1, 1, 1, 2)).chunk(2, -1)[0]  # (B, T, H, D/2)
        e = of_groups(read(half(v, "v") - half(v, "v~"))).double()
        self.found.append({
            "k_need": of_groups(need).mean((0, 1)).sum(1),
            "v_error": torch.einsum("btkgc,btkgd->kcd", e, e) / math.prod(e.shape[:2])})
        return read(half(v, "v")), None


@torch.no_grad()
def watch(
    model,    # without a memory
    tokens,   # (B, T)  text
    length,   # tokens, of a memory in all channels
):            # -> {"k_need": (KV, D/2), "v_error": (KV, D, D)} of each layer, as Watch notes them;
              #    the mean of the rows
    probe = copy.deepcopy(model, {id(x): x for x in model.parameters()}).add_memory(0.5)
    n, KV, D = model.config.n_layer, model.config.n_kv_head, model.config.head_width
    everywhere = torch.ones(n, KV, D, dtype=torch.bool)
    set_gates(probe, product(range(n), range(KV)), everywhere, length)
    of_rows = []
    for row in tokens.split(1):  # on a GPU, attention in fp32 takes (H, T, T) of each row
        watched = Watch()
        swapped(probe).hidden(row, watched)
        of_rows.append(watched.found)
    return [{key: sum(of[key] for of in of_layer) / len(of_layer) for key in of_layer[0]}
            for of_layer in zip(*of_rows)]


def least_needed(found, start):
    """Which channels of each KV head are of the least needed pairs: bool (layers, KV, D)."""
    rank = torch.stack([of_layer["k_need"] for of_layer in found]).argsort(-1).argsort(-1)
    return (rank < start.pairs * rank.shape[-1]).repeat(1, 1, 2)


@torch.no_grad()
def turn_values(model, found, long):
    """
    Turn the values of each KV head, so that the directions in which attention errs least come to
    its channels `long` (layers, KV, D). The model computes what it did. ValueError if a gate stands
    between.
    """
    if model.config.output_gate:
        raise ValueError("values cannot be turned where attention has an output gate, channel by "
                         "channel: take a model without")
    D = model.config.head_width
    for layer, of_layer, of_heads in zip(model.layers, found, long):
        v_proj, o_proj = layer.self_attn.v_proj, layer.self_attn.o_proj
        read = o_proj.weight.double().unflatten(1, (len(of_heads), -1, D))  # (C, KV, G, D)
        for head, is_long in enumerate(of_heads):
            _, ascending = torch.linalg.eigh(of_layer["v_error"][head])  # in columns
            R = torch.empty_like(ascending)
            R[:, (~is_long).int().argsort(stable=True)] = ascending  # the first to those long
            rows = slice(head * D, (head + 1) * D)
            v_proj.weight[rows] = (R.T @ v_proj.weight[rows].double()).to(v_proj.weight)
            if v_proj.bias is not None:
                v_proj.bias[rows] = (R.T @ v_proj.bias[rows].double()).to(v_proj.bias)
            read[:, head] = read[:, head] @ R
        o_proj.weight.copy_(read.flatten(1))


# ---------------------------------------------------------------- which heads

def set_gates(model, heads, long, length):
    """Every gate to REST, but to `length` tokens the channels `long` of `heads`: (layer, head)s."""
    D, projections = model.config.head_width, [x.self_attn.memory.proj for x in model.layers]
    for proj in projections:
        proj.weight.data.zero_()
        proj.bias.data.fill_(math.log(REST / (1 - REST)))
    for layer, head in heads:
        of_head = projections[layer].bias.data[head * D:(head + 1) * D]
        of_head[long[layer, head]] = math.log(length - 1)


@torch.no_grad()
def cheapest(
    model,         # with a fresh memory, in any state
    tokens,        # (B, T + 1)  text to measure on
    start,
    long,          # (layers, KV, D)  bool: which channels
    at_a_time=6,   # heads that are added between two measurements
):                 # -> heads [(layer, KV head)], cheapest first; the loss in nats per token of
                   #    none, {(layer, KV head): of it alone}, of all of them
    """
    Greedy: each round takes those that cost least beside the ones that were taken before. After the
    first round only the 2 n cheapest so far are measured again, n being how many are still wanted:
    we assume that a head that is dear alone stays dear. In the end the model's gates start so.
    """
    weight = torch.ones(tokens.shape, device=tokens.device)
    autocast = torch.autocast("cuda", torch.bfloat16) if tokens.is_cuda else nullcontext()

    def loss(heads):
        set_gates(model, heads, long, start.length)
        with autocast:
            total, _ = model.score(tokens, weight)
        return float(total) / (tokens.numel() - len(tokens))

    every = [(layer, head) for layer in range(model.config.n_layer)
             for head in range(model.config.n_kv_head)]
    before, alone = loss([]), {head: loss([head]) for head in every}
    left, chosen, wanted = sorted(every, key=alone.get), [], math.ceil(start.heads * len(every))
    while len(chosen) < wanted:
        if chosen:
            candidates = left[:max(at_a_time, 2 * (wanted - len(chosen)))]
            beside = {head: loss([*chosen, head]) for head in candidates}
            left = sorted(candidates, key=beside.get) + left[len(candidates):]
        n = min(at_a_time, wanted - len(chosen))
        chosen, left = chosen + left[:n], left[n:]
    return chosen, before, alone, loss(chosen)


# ---------------------------------------------------------------- a model that starts so

# Of a memory's start.json: [layer, KV head] of those chosen, cheapest first; the loss in nats per
# token before, and with all of them; what each of the model's heads costs alone.
OF_HEADS = "heads", "loss", "loss_with", "cost_alone"


def started(start, init, data, folder, device, context_len=4096, windows=6, like=None):
    """
    The model --init with a memory that starts so, in `folder`, in fp32. What it chose and what that
    costs stand beside it, in start.json. With `like`, the start.json of another memory, channels
    and heads are those of that, as another machine may choose otherwise. ValueError if the folder
    holds another start, or if `like` was chosen for another model or in another way.
    """
    folder, file = Path(folder), Path(folder) / "start.json"
    made_of = {"start": asdict(start), "init": str(Path(init)), "data": str(Path(data)),
               "context_len": context_len, "windows": windows, "rest": REST}
    chosen = chosen_in(like, made_of) if like else None
    if file.exists():
        there = files.load(file, *made_of)
        if other := [key for key in made_of if there[key] != made_of[key]]:
            raise ValueError(f"{folder} was started with {other[0]} {there[other[0]]}, not "
                             f"{made_of[other[0]]}: move it away, or choose another --out")
        if chosen and any(there[key] != chosen[key] for key in {"long", "heads"} & there.keys()):
            raise ValueError(f"{folder} has other channels or heads than {like}: move it away, or "
                             "choose another --out")
        return folder
    model = Transformer.from_pretrained(init, torch.float32, device)
    about = made_of | {"weights": hash_of(model)}
    if chosen and chosen["weights"] != about["weights"]:
        raise ValueError(f"{like} was chosen for another model than {init}: choose another "
                         "--results")
    config, shards = model.config, Shards(data, context_len, seed=0)
    tokens = torch.stack([torch.from_numpy(shards.sample(i)) for i in range(windows)]).to(device)
    found = watch(model, tokens[:, :-1], start.length)
    long = from_words(chosen["long"]).to(device) if chosen else least_needed(found, start)
    about["long"] = to_words(long)
    turn_values(model, found, long)
    if start.kind is not None:
        model.add_memory(REST, start.kind)
        if chosen:
            about |= {key: chosen[key] for key in OF_HEADS}
            set_gates(model, chosen["heads"], long, start.length)
        else:
            heads, before, alone, after = cheapest(model, tokens, start, long)
            costs = [[round(alone[layer, head] - before, 4) for head in range(config.n_kv_head)]
                     for layer in range(config.n_layer)]
            about |= dict(zip(OF_HEADS, (heads, before, after, costs)))
            print(f"{folder}: {len(heads)} heads start at {start.length:g} tokens; loss "
                  f"{before:.4f} -> {after:.4f}", flush=True)
    model.save_pretrained(folder, tokenizer_of(init, config.vocab_size, None))
    files.save(about, file)
    return folder


def chosen_in(file, made_of):
    """
    What a memory's start.json holds. ValueError if it was chosen otherwise than a start that is
    `made_of` this; --init and --data are paths of another machine, and in a longer context the
    memory stays where it is.
    """
    chosen = files.load(file, *made_of, "weights", "long", *OF_HEADS)
    same_kind = made_of | {"start": made_of["start"] | {"kind": chosen["start"]["kind"]}}
    for key in "start", "windows", "rest":
        if chosen[key] != same_kind[key]:
            raise ValueError(f"{file} was chosen with {key} {chosen[key]}, not {same_kind[key]}: "
                             "choose another --results")
    return chosen


def hash_of(model):
    """Of all weights, as twelve letters."""
    return weights.content_hash({name: x.detach().cpu()
                                 for name, x in model.named_parameters()})[:12]


def to_words(long):
    """(layers, KV, D) -> for each KV head of each layer a word of D letters, 0 or 1"""
    return [["".join(str(int(x)) for x in of_head) for of_head in of_layer]
            for of_layer in long.tolist()]


def from_words(words):
    return torch.tensor([[[x == "1" for x in of_head] for of_head in of_layer]
                         for of_layer in words])
