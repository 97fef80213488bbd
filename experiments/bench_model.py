"""
How fast and how large a whole model is, prompt to answer: `python bench.py --end-to-end`.

A preset's shape (olmo2-7b) with random weights in bf16, without and with the memory, under each
method:

    prompt    to the logits of the first new token
    step      one decoding step, beside its roofline: every weight and every entry that it must
              read, once, at copy speed
    peak      GPU memory at most, beside what `bytes_needed` predicts

There are four parts. `single` is one row (or --rows) at several contexts, and the crossover: the
shortest context from which a request (a prompt and 128 new tokens) is faster than dense's,
selection included. `batch` is the largest batches that fit. `peers` is transformers' model with the
same weights, as it is (SDPA, dynamic cache) and with its static cache under torch.compile; its
logits are compared with ours first. `table3` is what the paper's evaluation costs, and what the
GPU's ceilings would allow.

Tokens are random and, where only steps are timed, entries too. No speed here depends on what they
say, but for Quest's choice of blocks, which is as scattered as can be. Times are medians over
single steps and over three prompts, between CUDA events. docs/speed.md has what came out; bench.py
times the kernels one by one.
"""
import gc
import statistics
import time
from dataclasses import replace

import torch

import niah
import sparse
from data import get_tokenizer
from engine import tokens_together, widest
from eval_niah import answer
from infra.cli import made_by, positive
from infra.families import described, family_of
from infra.files import save
from infra.names import hf_name
from model import PRESETS, Transformer

ON_GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if ON_GPU else ("cpu", torch.float32)
GB = 1e9
NEW = 128  # tokens of a request
PARTS = "single", "batch", "peers", "table3"
METHODS = ["dense", "quest:budget=1/16", "moba:budget=1/8,block_size=128",
           "moba:budget=1/8,block_size=512", "snapkv:budget=1/16"]
TABLE3 = ["dense", *(f"quest:budget=1/{n}" for n in (4, 8, 16)), "quest:budget=1/64,block_size=16",
          *(f"moba:budget=1/{n}" for n in (4, 8, 16)),
          *(f"moba:budget=1/{n},block_size=128" for n in (4, 8)),
          *(f"snapkv:budget=1/{n}" for n in (4, 8, 16))]


# ---------------------------------------------------------------- what a request takes

def matrices(model):
    """Parameters that a token is multiplied with: in the layers, and in the head."""
    in_layers = sum(p.numel() for p in model.layers.parameters() if p.dim() == 2)
    return in_layers, model.embed_tokens.weight.numel()


def prompt_flops(model, B, T, most=None):
    """
    Of a prompt: the layers' products, causal attention to at most `most` tokens (None: all), the
    last head.
    """
    layers, head = matrices(model)
    config, most = model.config, min(most or T, T)
    pairs = most * T - most * most / 2  # of a query and a key that it reads
    attention = 4 * pairs * config.n_head * config.head_width * config.n_layer
    return B * (2 * layers * T + attention + 2 * head)


def entry_bytes(model):
    """Of an entry, k and v, of all KV heads in one layer."""
    return 2 * model.config.n_kv_head * model.config.head_width * DTYPE.itemsize


def step_bytes(model, method, B, T):
    """
    What a step must read at context T: the weights but for the embedding's table; the entries, and
    Quest's bounds of all blocks.
    """
    parts = sparse.phases(method)
    entries = min(T, getattr(parts.compress_by, "budget", T))
    if isinstance(parts.decode_by, sparse.Quest):
        # a block's two bounds are as large as an entry
        entries = min(entries, parts.decode_by.budget + entries / parts.decode_by.block_size)
    weights = DTYPE.itemsize * sum(matrices(model))
    return weights + B * entries * model.config.n_layer * entry_bytes(model)


def least_seconds(model, methods, B, T, new, rates):
    """
    Of eval_niah.answer on B prompts of T tokens with `new` tokens each: at the matmul rate a prompt
    for each way to read one, which methods share, and each method's steps at copy speed. The first
    new token is the prompt's.
    """
    prompts = {sparse.phases(method).prefill_by for method in methods}
    flops = sum(prompt_flops(model, B, T, getattr(by, "budget", None)) for by in prompts)
    read = sum((new - 1) * step_bytes(model, method, B, T) for method in methods)
    return flops / rates["matmul"] / 1e12 + read / rates["copy"] / 1e9


def bytes_needed(model, method, B, T, new):
    """
    GPU memory of a request at its fullest.

    cache   slots for every layer, with SnapKV's positions in int32; Quest's bounds, an entry for
            each block; the last queries, for a method that would compress
    work    one layer's, on the part of the batch that goes through it together, in vectors of width
            C, or H * D, a token: x, q, k, v, attention's output, one more while q or k turns. With
            the memory 7, and a tenth for the states between its tiles. MoBA's partial results, and
            three lists of chosen blocks
    """
    config, parts = model.config, sparse.phases(method)
    entry, q_width = entry_bytes(model), model.config.n_head * model.config.head_width
    width = widest(config)
    if sparse.drops(method):
        slots = min(getattr(parts.compress_by, "budget", T), T) + new
        cache = B * slots * (entry + 4 * config.n_kv_head)
    else:
        slots = T + new
        cache = B * (slots * entry + 64 * q_width * DTYPE.itemsize)
    if isinstance(parts.decode_by, sparse.Quest):
        cache += B * -(-slots // parts.decode_by.block_size) * entry

    tokens = min(B, max(1, tokens_together(width) // T)) * T
    work = tokens * width * DTYPE.itemsize * (7.1 if config.memory else 6)
    if isinstance(parts.prefill_by, sparse.MoBA):
        from triton_ops.moba import PARTIAL_BYTES
        S = parts.prefill_by.budget // parts.prefill_by.block_size
        work += min(PARTIAL_BYTES, tokens * S * q_width * DTYPE.itemsize)
        work += 3 * tokens * S * config.n_kv_head * 4
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return weights + config.n_layer * cache + work


def largest_batch(model, method, T, new):
    """The most rows that fit into this GPU, 2 GB left to CUDA and the allocator's gaps."""
    room, B = torch.cuda.get_device_properties(0).total_memory - 2 * GB, 1
    while bytes_needed(model, method, B + 1, T, new) < room:
        B += 1
    return B


# ---------------------------------------------------------------- timing

def random_model(config):
    """Weights as they are before training, made where they are used."""
    with torch.device("meta"):
        model = Transformer(config)
    model.to(DTYPE).to_empty(device=DEVICE)
    return randomize(model)


def randomize(module):
    for p in module.parameters():
        if p.dim() == 1:
            p.data.fill_(1)
        else:
            p.data.normal_(std=0.02)
    return module.requires_grad_(False)


def clean():
    """Leaves the GPU as empty as it can be, and counts its peak anew."""
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def laps(f, n):
    """Milliseconds of each of n calls, queued one behind the other."""
    if not ON_GPU:
        times = [time.perf_counter()]
        for _ in range(n):
            f()
            times.append(time.perf_counter())
        return [1e3 * (b - a) for a, b in zip(times, times[1:])]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(n + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        f()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in zip(events, events[1:])]


def time_prompt(model, method, B, T, new, rounds=3):
    """
    Milliseconds of a prompt, and the cache after it. A round before the counted ones compiles,
    unless there is only one.
    """
    tokens, cache = torch.randint(model.config.vocab_size, (B, T), device=DEVICE), [None]

    def prompt():
        cache[0] = None  # before the next is made
        cache[0] = model.new_cache(B, T + new)
        model.prefill(tokens, cache=cache[0], sparse=method, whole=True)

    first = 1 if rounds > 1 else 0
    times = laps(prompt, rounds + first)
    return statistics.median(times[first:]), cache[0]


def random_cache(model, B, T, new):
    """A cache of T entries a row, as a dense prompt leaves it."""
    cache = model.new_cache(B, T + new)
    for i in range(model.config.n_layer):
        cache.room(i, cache.slots)
        cache.k[i][:, :T].normal_()
        cache.v[i][:, :T].normal_()
    cache.lengths += T
    cache.used += T
    cache.filled = T
    return cache


def time_steps(model, method, cache, n=40):
    """Median milliseconds of a greedy decoding step."""
    token = torch.zeros(cache.B, dtype=torch.long, device=DEVICE)
    step = lambda: token.copy_(model.step(token, cache, method).float().argmax(-1))
    laps(step, 4)  # compiles, captures
    return statistics.median(laps(step, n))


class Report:
    """Lines as they are measured, on the screen and in a file."""

    def __init__(self, path, rates):
        self.path, self.rates, self.rows = path, rates, []
        self.all = made_by(None, "bench.py", DEVICE) | {
            "dtype": str(DTYPE), "new_tokens": NEW, "ceilings": rates, "rows": self.rows}
        self.save()  # if it can't be written, that is better known now

    def save(self):
        save(self.all, self.path)

    def line(
        self, model, method,  # their labels
        B, T,
        prompt_ms=None, step_ms=None,
        flops=None,           # of the prompt
        step_bytes=None,      # of a step: both the fewest possible
        needs=None,           # bytes predicted
        entries=None,         # bytes of the cache's k and v
    ):
        row = {"model": model, "method": method, "batch": B, "context": T}
        text = f"{model:20} {method:32} {B:3} x {T:6,}"
        if prompt_ms:
            rate = flops / prompt_ms / 1e9 if flops else None
            row |= {"prompt_ms": prompt_ms, "prompt_TFLOP/s": rate}
            text += f"  prompt {prompt_ms:9.1f} ms"
            text += f" {rate:6.1f} TFLOP/s" if flops else " " * 15
        if step_ms:
            row |= {"step_ms": step_ms, "tokens/s": 1e3 * B / step_ms}
            text += f"  step {step_ms:7.2f} ms {1e3 * B / step_ms:7,.0f} tokens/s"
        if step_bytes and ON_GPU:
            row["roofline_ms"] = step_bytes / self.rates["copy"] / 1e6
            text += f" {row['roofline_ms'] / step_ms:4.0%} of roofline"
        if ON_GPU:
            peak = torch.cuda.max_memory_allocated()
            row |= {"peak_bytes": peak, "predicted_bytes": needs, "entries_bytes": entries}
            text += f"  peak {peak / GB:5.1f} GB"
            text += f", predicted {needs / GB:5.1f}" if needs else ""
        self.rows.append(row)
        self.save()
        print(text, flush=True)


def measure(report, model, label, text, B, T, rounds=3):
    """A prompt and the steps after it, by one method. -> milliseconds of each"""
    clean()
    method = sparse.parse(text, T)
    prompt, cache = time_prompt(model, method, B, T, NEW, rounds)
    entries = sum(x.nbytes for x in (*cache.k, *cache.v))
    step = time_steps(model, method, cache)
    dense = type(sparse.phases(method).prefill_by) is sparse.Dense
    report.line(label, text, B, T, prompt, step,
                flops=prompt_flops(model, B, T) if dense else None,
                step_bytes=step_bytes(model, method, B, T),
                needs=bytes_needed(model, method, B, T, NEW), entries=entries)
    return prompt, step


# ---------------------------------------------------------------- one row, and the largest batch

def single(report, model, label, contexts, B):
    """All methods at all contexts, and where each one's request gets faster than dense's."""
    clean()
    dense = sparse.Dense()
    step = time_steps(model, dense, random_cache(model, B, 16, NEW))
    report.line(label, "dense, almost empty", B, 16, step_ms=step,
                step_bytes=step_bytes(model, dense, B, 16))
    requests = {}
    for T in contexts:
        for text in METHODS:
            try:
                prompt, step = measure(report, model, label, text, B, T)
                requests[text, T] = prompt + NEW * step
            except ValueError as error:  # a budget smaller than what is always read
                print(f"{label:20} {text:32} {B:3} x {T:6,}  {error}")

    found = report.all.setdefault("crossover", {}).setdefault(label, {})
    for text in METHODS[1:]:
        # a context that was not measured counts as no faster
        slower = [T for T in contexts
                  if requests.get((text, T), requests["dense", T]) >= requests["dense", T]]
        later = [T for T in contexts if T > max(slower, default=0)]
        found[text] = min(later, default=None)
        where = f"from {found[text]:,} tokens" if found[text] else "nowhere here"
        print(f"{label:20} {text:32} a request is faster than dense's {where}")
    report.save()


def batch(report, model, label, T):
    """Dense's largest batch, Quest's step at it, and SnapKV at its own largest."""
    quest_text, snapkv_text = "quest:budget=1/16", "snapkv:budget=1/16"
    dense, quest, snapkv = (sparse.parse(x, T) for x in ("dense", quest_text, snapkv_text))
    B = largest_batch(model, dense, T, NEW)
    measure(report, model, label, "dense", B, T, rounds=2)
    if largest_batch(model, quest, T, NEW) >= B:
        clean()
        step = time_steps(model, quest, random_cache(model, B, T, NEW))
        report.line(label, quest_text, B, T, step_ms=step,
                    step_bytes=step_bytes(model, quest, B, T),
                    needs=bytes_needed(model, quest, B, T, NEW))
    measure(report, model, label, snapkv_text, largest_batch(model, snapkv, T, NEW), T, rounds=1)


# ---------------------------------------------------------------- transformers

@torch.no_grad()
def peers(report, model, label, contexts):
    """transformers' model of the same family, with our weights."""
    try:
        import transformers
    except ImportError:
        raise ImportError("--only peers compares with transformers: "
                          "pip install transformers") from None
    theirs = theirs_of(transformers, model, max(contexts) + NEW)
    name = f"transformers {transformers.__version__}"
    draw = lambda T: torch.randint(model.config.vocab_size, (1, T), device=DEVICE)

    tokens = draw(512)
    ours = model.prefill(tokens, cache=model.new_cache(1, 513)).float()
    logits = theirs(tokens).logits[:, -1].float()
    error = ((ours - logits).norm() / logits.norm()).item()
    print(f"logits after 512 tokens: ours and those of transformers differ by {error:.1e} rms",
          flush=True)
    if not error < 5e-2:
        raise ValueError("transformers computes another function: not timed")
    report.all["logits_error"] = error

    for T in contexts:
        clean()
        tokens, cache, token = draw(T), [None], [draw(1)]

        def prompt():
            cache[0] = None
            cache[0] = theirs(tokens, use_cache=True, logits_to_keep=1).past_key_values

        def step():
            out = theirs(token[0], past_key_values=cache[0], use_cache=True)
            token[0] = out.logits[:, -1:].argmax(-1)

        prompt_ms = statistics.median(laps(prompt, 4)[1:])
        laps(step, 4)
        report.line(label, name, 1, T, prompt_ms, statistics.median(laps(step, 20)),
                    prompt_flops(model, 1, T))

    T = contexts[0]
    clean()
    cache = transformers.StaticCache(config=theirs.config, max_cache_len=T + NEW)
    theirs(draw(T), past_key_values=cache, logits_to_keep=1,
           cache_position=torch.arange(T, device=DEVICE))
    compiled = torch.compile(theirs.forward, mode="reduce-overhead", fullgraph=True)
    token, place = draw(1), torch.tensor([T], device=DEVICE)

    def step():
        out = compiled(token, past_key_values=cache, cache_position=place, use_cache=True)
        token.copy_(out.logits[:, -1:].argmax(-1))
        place.add_(1)

    laps(step, 4)
    report.line(label, f"{name}, static, compiled", 1, T,
                step_ms=statistics.median(laps(step, 40)))


def theirs_of(transformers, model, positions):
    """The same model as transformers knows it, on the same memory."""
    config = replace(model.config, context_len=positions)
    family = family_of(config)
    if family is None:
        raise ValueError("--only peers: transformers knows no such model; choose a --preset of "
                         "OLMo 2, Llama or Qwen")
    said = described(config, "bfloat16")
    kind = getattr(transformers, *said.pop("architectures"))
    with torch.device("meta"):
        theirs = kind(transformers.AutoConfig.for_model(**said)).to(DTYPE)
    named = {hf_name(name, family): p for name, p in model.state_dict().items()}
    theirs.load_state_dict(named, assign=True, strict=not config.tied)
    theirs.tie_weights()  # a tied head is in no state_dict
    with torch.device(DEVICE):  # RoPE's frequencies are no weights
        theirs.model.rotary_emb = type(theirs.model.rotary_emb)(theirs.config)
    return theirs.eval().requires_grad_(False)


# ---------------------------------------------------------------- the paper's evaluation

def table3(report, model, label, tokenizer, batch=12, samples=500):
    """
    What eval_niah.py needs for the paper's 12 settings and dense: 8 tasks at 4,096 tokens, protocol
    sft.

    Answered as there, and as long as the task's longest gold answer and its end: random weights
    never end by themselves. Of two batches a task the second is timed: the first compiles kernels
    and captures graphs, which happens once, and not for each of 500 samples.
    """
    clean()
    methods, cache = [sparse.parse(text, 4096) for text in TABLE3], None
    both, seconds, new_tokens = 0, {}, {}  # of all batches; of an example, by task; by task
    least = {}
    for task in niah.TASKS:
        examples = [niah.make_example(task, 4096, tokenizer, 0, i, "sft") for i in range(2 * batch)]
        gold = [niah.target_ids(e.prompt, e.target, tokenizer) for e in examples]
        new_tokens[task] = 1 + max(map(len, gold))
        examples = [replace(e, max_new_tokens=new_tokens[task]) for e in examples]
        new = new_tokens[task]  # for which a prompt leaves room
        least[task] = least_seconds(model, methods, batch, 4096 - new, new, report.rates) / batch
        for some in examples[:batch], examples[batch:]:
            started = time.time()
            *_, cache = answer(model, tokenizer, some, methods, cache)
            seconds[task] = (time.time() - started) / batch
            both += seconds[task] * batch

    # what the first batches took longer than the second ones
    start = both - 2 * batch * sum(seconds.values())
    minutes = (start + samples * sum(seconds.values())) / 60
    report.all.setdefault("table3", {})[label] = {
        "methods": TABLE3, "tokenizer": tokenizer.name, "batch": batch, "new_tokens": new_tokens,
        "seconds_per_example": seconds, "least_seconds_per_example": least,
        "seconds_to_start": start, "samples": samples, "minutes": minutes,
        "peak_bytes": torch.cuda.max_memory_allocated()}
    report.save()
    each = ", ".join(f"{niah.TASKS[task].short} {s:.3f} ({least[task] / s:.0%} of the roofline)"
                     for task, s in seconds.items())
    print(f"{label}: table 3, {len(TABLE3)} methods, seconds per example: {each}; "
          f"{len(seconds)} tasks of {samples} samples: {minutes:.1f} GPU-minutes", flush=True)


# ---------------------------------------------------------------- the command

def add_flags(parser):
    """bench.py's flags that are of whole models. -> their names"""
    parser.add_argument("--preset", choices=PRESETS, metavar="NAME", help=(
        "whole models: their shape (default: olmo2-7b; without a GPU micro)"))
    parser.add_argument("--contexts", nargs="+", type=positive, metavar="TOKENS", help=(
        "whole models: lengths of prompts (default: 1024 to 65536; without a GPU 2048)"))
    parser.add_argument("--tokenizer", metavar="SPEC", help=(
        "whole models, table3: as in data.py (default: bytes, whose answers are longer than in "
        "tokens)"))
    parser.add_argument("--rows", type=positive, metavar="N", help=(
        "whole models, single: prompts at a time (default: 1)"))
    return "preset", "contexts", "tokenizer", "rows"


def run(args, rates):
    """args: bench.py's. rates: of bench.ceilings, None without a GPU. ValueError if not possible"""
    if ON_GPU:
        parts, preset, contexts = PARTS, "olmo2-7b", [1024 * 2**i for i in range(7)]
    else:
        parts, preset, contexts = ["single"], "micro", [2048]
    parts, preset = args.only or parts, args.preset or preset
    contexts, path = sorted(args.contexts or contexts), args.json or "out/bench-model.json"
    if not ON_GPU and set(parts) != {"single"}:
        raise ValueError(f"--only {' '.join(parts)}: these parts need a GPU")
    tokenizer, report = get_tokenizer(args.tokenizer or "bytes"), Report(path, rates)

    made = report.all
    print(f"{made['device']}, torch {made['torch']}, commit {made['commit'][:12]}; {preset}, "
          f"random weights, {DTYPE}", flush=True)
    if rates:
        print(f"ceilings: copy {rates['copy']:,.0f} GB/s, matmul {rates['matmul']:,.0f} TFLOP/s",
              flush=True)
    try:
        measure_all(report, preset, contexts, parts, tokenizer, args.rows or 1)
    except torch.OutOfMemoryError:
        raise ValueError("the GPU has no room for that: shorter --contexts, or a smaller "
                         "--preset") from None
    print(f"\nresults in {path}")


def measure_all(report, preset, contexts, parts, tokenizer, rows):
    """The parts, of the preset's model and of the same one with the memory."""
    torch.manual_seed(0)
    model = random_model(PRESETS[preset])
    if "peers" in parts and not model.config.memory:
        of_peers = [T for T in (4096, 32768) if T <= max(contexts)] or contexts[:1]
        peers(report, model, preset, of_peers)
    for label in preset, f"{preset} + memory":
        if "single" in parts:
            single(report, model, label, contexts, rows)
        if "batch" in parts:
            longest = max((T for T in contexts if T <= 32768), default=min(contexts))
            batch(report, model, label, longest)
        if "table3" in parts:
            table3(report, model, label, tokenizer)
        if not model.config.memory:
            for layer in model.add_memory().layers:
                randomize(layer.self_attn.memory.proj)
