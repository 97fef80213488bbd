"""
Where does a pretrained model need its keys and values least? There a memory may start long without
much harm, to be trained from that.

    values   A head's values may be turned: W_v by R, and the columns of W_o that read them by R,
             too, and the model computes what it did. R sorts directions by their share of the
             output's energy, the least first: r' M C r for a direction r, with C = mean of v v' and
             M = W_o' W_o.
    keys     RoPE turns channels d and d + D/2 as a pair, so that keys stay as they are. A pair's
             need is the variance of its keys times the energy of its queries.
    heads    Each KV head gets the memory alone, and the loss tells what that costs; the cheapest
             ones get it together.

The gate is one for key and value, so the least needed pairs of the key are the channels to which
the least needed directions of the value are turned. `started` makes such a model, and conversion.py
trains it. Checked in tests/test_starts.py.

Letters: B batch, T tokens, H query heads, KV key/value heads, G = H / KV, D head width.
"""
import math
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from data import Shards, tokenizer_of
from experiments import memories  # noqa: F401  puts its classes into memory.MEMORIES
from infra import files
from model import Transformer


@dataclass(frozen=True)
class Start:
    """Where the gates of a fresh memory start long, and how these heads are found."""
    kind: str | None = "decay"  # of memory.MEMORIES; None: values are turned alone, for a control
    heads: float = 0.4          # share of the model's KV heads, those that it costs least
    pairs: float = 0.53         # share of each head's pairs of channels, those least needed
    length: float = 32.0        # tokens, 1 / (1 - g)
    rest: float = 0.02          # g of all other gates: k~ is k, but for 2 %
    at_a_time: int = 6          # heads that are added before all others are measured again


# ---------------------------------------------------------------- which channels

@torch.no_grad()
def moments(model, tokens):
    """
    What the layers' projections give on text (B, T): a list of q_energy (H, D), the mean square of
    each channel; k_variance (KV, D); v_moment (KV, D, D), the mean of v v'.
    """
    found = [{} for _ in model.layers]

    def look(of_layer, name):
        def hook(module, inputs, y):
            heads = y.double().unflatten(-1, (-1, model.config.head_width)).flatten(0, 1)
            if name == "q":
                of_layer["q_energy"] = heads.square().mean(0)
            elif name == "k":
                of_layer["k_variance"] = heads.var(0)
            else:
                of_layer["v_moment"] = torch.einsum("thc,thd->hcd", heads, heads) / len(heads)
        return hook

    hooks = [getattr(layer.self_attn, f"{name}_proj").register_forward_hook(look(of_layer, name))
             for layer, of_layer in zip(model.layers, found) for name in "qkv"]
    try:
        model.hidden(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def least_needed(found, start):
    """Which channels of each KV head are of the least needed pairs: bool (layers, KV, D)."""
    long = []
    for of_layer in found:
        k = of_layer["k_variance"]                           # (KV, D)
        q = of_layer["q_energy"].unflatten(0, (len(k), -1))  # (KV, G, D)
        of_pair = lambda x: x.unflatten(-1, (2, -1)).sum(-2)
        need = of_pair(k) * of_pair(q.sum(1))                # (KV, D/2)
        rank = need.argsort(-1).argsort(-1)
        long.append((rank < start.pairs * need.shape[-1]).repeat(1, 2))
    return torch.stack(long)


@torch.no_grad()
def turn_values(model, found, long):
    """
    Turn the values of each KV head, so that what reaches the output least comes to its channels
    `long` (layers, KV, D). The model computes what it did. ValueError if a gate stands between.
    """
    if model.config.output_gate:
        raise ValueError("values cannot be turned where attention has an output gate, channel by "
                         "channel: take a model without")
    D = model.config.head_width
    for layer, of_layer, of_heads in zip(model.layers, found, long):
        v_proj, o_proj = layer.self_attn.v_proj, layer.self_attn.o_proj
        read = o_proj.weight.double().unflatten(1, (len(of_heads), -1, D))  # (C, KV, G, D)
        for head, is_long in enumerate(of_heads):
            M = torch.einsum("cgd,cge->de", read[:, head], read[:, head])
            C = of_layer["v_moment"][head]
            _, ascending = torch.linalg.eigh(M @ C + C @ M)  # (D, D), a direction in each column
            R = torch.empty_like(ascending)
            R[:, (~is_long).int().argsort(stable=True)] = ascending  # the first to those long
            rows = slice(head * D, (head + 1) * D)
            v_proj.weight[rows] = (R.T @ v_proj.weight[rows].double()).to(v_proj.weight)
            if v_proj.bias is not None:
                v_proj.bias[rows] = (R.T @ v_proj.bias[rows].double()).to(v_proj.bias)
            read[:, head] = read[:, head] @ R
        o_proj.weight.copy_(read.flatten(1))


# ---------------------------------------------------------------- which heads

def set_gates(model, heads, long, start):
    """Every gate as at rest, but the channels `long` of `heads`, (layer, head)s, long."""
    D, projections = model.config.head_width, [x.self_attn.memory.proj for x in model.layers]
    for proj in projections:
        proj.weight.data.zero_()
        proj.bias.data.fill_(math.log(start.rest / (1 - start.rest)))
    for layer, head in heads:
        of_head = projections[layer].bias.data[head * D:(head + 1) * D]
        of_head[long[layer, head]] = math.log(start.length - 1)


@torch.no_grad()
def cheapest(
    model,         # with a fresh memory, in any state
    tokens,        # (B, T + 1)  text to measure on
    start,
    long,          # (layers, KV, D)  bool: which channels
):                 # -> heads [(layer, KV head)], cheapest first; the loss in nats per token of
                   #    none, {(layer, KV head): of it alone}, of all of them
    """
    Greedy: each round takes those that cost least beside the ones that were taken before. After the
    first round only the 2 n cheapest so far are measured again, n being how many are still wanted:
    we assume that a head that is dear alone stays dear. In the end the model's gates start so.
    """
    weight = torch.ones(tokens.shape, device=tokens.device)
    half = torch.autocast("cuda", torch.bfloat16) if tokens.is_cuda else nullcontext()

    def loss(heads):
        set_gates(model, heads, long, start)
        with half:
            total, _ = model.score(tokens, weight)
        return float(total) / (tokens.numel() - len(tokens))

    every = [(layer, head) for layer in range(model.config.n_layer)
             for head in range(model.config.n_kv_head)]
    before, alone = loss([]), {head: loss([head]) for head in every}
    left, chosen, wanted = sorted(every, key=alone.get), [], math.ceil(start.heads * len(every))
    while len(chosen) < wanted:
        if chosen:
            candidates = left[:max(start.at_a_time, 2 * (wanted - len(chosen)))]
            beside = {head: loss([*chosen, head]) for head in candidates}
            left = sorted(candidates, key=beside.get) + left[len(candidates):]
        n = min(start.at_a_time, wanted - len(chosen))
        chosen, left = chosen + left[:n], left[n:]
    return chosen, before, alone, loss(chosen)


# ---------------------------------------------------------------- a model that starts so

def started(start, init, data, folder, device, context_len=4096, windows=6):
    """
    The model --init with a memory that starts so, in `folder`, in fp32; what that costs stands
    beside it, in start.json. ValueError if the folder holds another start.
    """
    folder, file = Path(folder), Path(folder) / "start.json"
    made_of = {"start": asdict(start), "init": str(Path(init)), "data": str(Path(data)),
               "context_len": context_len}
    if file.exists():
        there = files.load(file, *made_of)
        if other := [key for key in made_of if there[key] != made_of[key]]:
            raise ValueError(f"{folder} was started with {other[0]} {there[other[0]]}, not "
                             f"{made_of[other[0]]}: move it away, or choose another --out")
        return folder
    model = Transformer.from_pretrained(init, torch.float32, device)
    config, shards = model.config, Shards(data, context_len, seed=0)
    tokens = torch.stack([torch.from_numpy(shards.sample(i)) for i in range(windows)]).to(device)
    found = moments(model, tokens[:, :-1])
    long = least_needed(found, start)
    turn_values(model, found, long)
    tokenizer = tokenizer_of(init, config.vocab_size, None)
    if start.kind is None:
        model.save_pretrained(folder, tokenizer)
        files.save(made_of, file)
        return folder
    model.add_memory(start.rest, start.kind)
    heads, before, alone, after = cheapest(model, tokens, start, long)
    model.save_pretrained(folder, tokenizer)
    costs = [[round(alone[layer, head] - before, 4) for head in range(config.n_kv_head)]
             for layer in range(config.n_layer)]
    files.save(made_of | {"heads": heads, "loss": before, "loss_with": after,
                          "cost_alone": costs}, file)
    print(f"{folder}: {len(heads)} heads start at {start.length:g} tokens; loss {before:.4f} -> "
          f"{after:.4f}", flush=True)
    return folder
