"""
Train a model: from scratch, continued with a memory, or fine-tuned. One loop, on one CPU, one GPU or many.

    for each step:   batch = f(seed, step)                      samples.py; any number of GPUs, the same numbers
        for each pass of memory.arl_passes:                     with ARL first through the memory alone, then dense
            loss = sum(weight * cross entropy) / sum(weight)    weights: 1, or less where a token is no answer
            one optimizer step, unless loss or gradient is not finite
        learning rate: warm-up, then cosine

`python train.py` alone is a lesson of a few minutes: the small attention model that comes with the code is given a
memory, trained on, and compared with itself. Everything else is flags; `--recipe` sets many at once, and the paper's are
there: `torchrun --nproc_per_node=8 train.py --recipe=olmo2-continue --init=OLMo-2-1124-7B --data=shards`.

A run says what it will cost (cost.py), then lives in out/NAME: log.jsonl, a line per step, which watch.py draws (record.py),
and step_*/, complete checkpoints (checkpoint.py) that model.Transformer, eval_niah and sample load. A run that was stopped,
by ctrl-C, kill or a lost GPU, goes on with --resume as if it never had: on a CPU to the bit. parallel.py has what several
GPUs need. Checked in tests/test_train.py. Read samples.py before, eval_niah.py for what follows.
"""
import argparse
import gc
import json
import math
import os
import statistics
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from triton_ops import backend
from infra import checkpoint
from infra import cost
import eval_niah
import niah
from infra import parallel
import sparse
from infra import weights
from data import batches, fingerprint, hash_of, make_data, tokenizer_of, workers_told
from eval_niah import usable_device
from infra.files import only_one, told_to_end
from memory import arl_passes, lengths_of
from model import PRESETS, Transformer, config_of, fresh, memory_tensors
from infra.runlog import PATIENCE, SHIPPED, Log, begun, field, finite, mark, newest, record_of, step_of
from niah import Needles
from sparse import Dilated

SMALL = 2e13      # FLOPs of a pass below which a GPU waits for launches: one GPU records such passes as CUDA graphs

# What --recipe sets; a flag given beside it wins. The paper's: arXiv 2605.28640 and the configs of official RAT+.
RECIPES = {
    # the paper in small, in minutes on a GPU: pretraining in a short context, where retrieval forms. Every token counts alike:
    # heads that are paid for answers alone look at nothing during the question, and SnapKV drops what they need
    "micro": dict(preset="micro", context_len=1024, protocol="sft", drills=1/3, other_weight=1.0, steps=2000, batch=64,
                  device_batch=64, lr=2e-3, arl=64, log_every=100, eval_every=500, save_every=1000),
    # its attention model given a memory: less than a fifth of the tokens of both stages, again with drills, and with as high
    # a learning rate. Retrieval must form anew, now through the memory; else the gates close and nothing is won
    "micro-convert": dict(memory="on", context_len=1024, protocol="sft", drills=1/3, other_weight=1.0, steps=600, batch=64,
                          device_batch=64, lr=2e-3, memory_lr=1e-2, arl=64, log_every=40, eval_every=300, save_every=300),
    # and either fine-tuned at the paper's context, where answers count most, without ARL
    "micro-sft": dict(context_len=4096, protocol="sft", steps=1280, batch=16, device_batch=16, lr=1e-3, arl=0,
                      log_every=80, eval_every=320, save_every=640),
    # a toy of two tasks for a CPU
    "pico": dict(preset="pico", context_len=512, tasks=["niah_single_1", "niah_single_2"], drills=0.5, many=0.3, steps=1600,
                 batch=4, device_batch=4, lr=3e-3, arl=32, log_every=100, eval_every=200, save_every=700),
    # The paper's (arXiv 2605.28640). What it leaves out is from the configs of official RAT+, marked (c)
    # data=None: --data must be given
    # OLMo 2 continued with a memory: 10B tokens of FineWeb-Edu, 768 x 4,096 a step. (c): cosine to 1e-6
    "olmo2-continue": dict(data=None, memory="on", context_len=4096, steps=3179, batch=768, lr=6e-5, memory_lr=6e-4, min_lr=1e-6,
                           warmup=0.02, weight_decay=0.1, arl=64, save_every=25),
    # about 7M tokens of needles before the evaluation, both backbones. (c): weight decay, warm-up, cosine to 1e-6
    "niah-sft": dict(data="niah", context_len=4096, steps=54, batch=32, lr=1e-5, min_lr=1e-6, warmup=0.05, weight_decay=0.01, arl=0,
                     protocol="sft", many=0.0, other_weight=0.0),
    # RAT+ from scratch (arXiv 2602.18196) on FineWeb-Edu's sample of 100B tokens, 110B in LLaMA's: as many steps as the released
    # checkpoints' names tell. All (c)
    "ratplus-1b": dict(data=None, preset="ratplus-1b", context_len=4096, steps=52451, batch=512, lr=8e-4, min_lr=1e-6, warmup=0.05,
                       weight_decay=0.1, arl=64, save_every=250),
    "ratplus-7b": dict(data=None, preset="ratplus-7b", context_len=4096, steps=34967, batch=768, lr=6e-4, min_lr=1e-6, warmup=0.05,
                       weight_decay=0.1, arl=64, save_every=250),
    # and its adaptation to dilated inference: 1B tokens, the wanted pattern in place of dense attention, no ARL. All (c)
    "ratplus-1b-adapt": dict(data=None, context_len=4096, steps=476, batch=512, lr=8e-5, min_lr=1e-6, warmup=0.0, weight_decay=0.1, arl=0,
                             adapt="dilated:dilation=16,local=256,initial=4"),
    "ratplus-7b-adapt": dict(data=None, context_len=4096, steps=316, batch=768, lr=2e-5, min_lr=1e-6, warmup=0.02, weight_decay=0.1, arl=0,
                             adapt="dilated:dilation=16,local=256,initial=4"),
}

# A 240th of micro-convert's tokens, in a few minutes on two cores: so few must change little but the gates
LESSON = ["--context_len=4096", "--drills=0", "--gate_start=0.1", "--steps=40", "--batch=1", "--device_batch=1", "--lr=5e-5",
          "--memory_lr=3e-3", "--log_every=5", "--eval_every=40"]


def number(holds, what):
    """A flag's type: a number of which holds(number) is true, and that fp32 has, squared too."""
    def number(text):
        value = float(text)
        if not (holds(value) and (value == 0 or 1e-18 <= value <= 1e18)):
            raise argparse.ArgumentTypeError(f"{text} is not {what}, or not within 1e-18 and 1e18")
        return value
    return number


def whole(least, most):
    """A flag's type: a whole number within these."""
    def number(text):
        value = int(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} is not a whole number from {least:,} to {most:,}")
        return value
    return number


gate = number(lambda g: 0 < g < 1, "above 0 and below 1")  # where it can start
share = number(lambda x: 0 <= x <= 1, "a share from 0 to 1")
above_0, at_least_0 = number(lambda x: x > 0, "above 0"), number(lambda x: x >= 0, "0 or above")
natural, positive = whole(0, 2**31 - 1), whole(1, 2**31 - 1)
few = whole(1, 1_000_000)                                  # sequences: a list of them is made
seed = whole(-2**31, 2**31 - 1)                            # with step and process it is 64 bits


def flags():
    parser = argparse.ArgumentParser(description="Train a model; with no flags, a lesson of a few minutes.", allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"train.py: {message}\n")
    add = parser.add_argument
    add("--recipe", choices=RECIPES, metavar="NAME", help="sets many flags at once: " + ", ".join(RECIPES) + "; --init is wanted by those "
        "that continue, fine-tune or adapt a model, --data by those of text")
    # what to train
    add("--preset", choices=PRESETS, metavar="NAME", help="a new model: " + ", ".join(PRESETS))
    add("--init", metavar="PATH", help="or a model to start from: anything that Transformer.from_pretrained loads")
    add("--memory", choices=["on", "off"], help="the decaying memory: on adds one to an --init without; None: as it is")
    add("--gate_start", type=gate, default=0.5, metavar="G", help="where the gates of a memory start that --init is "
        "given, above 0 and below 1")
    add("--arl", type=natural, metavar="TOKENS", help="length that ARL teaches the memory, 0 for none; None: 64 with a memory")
    add("--joint", type=natural, default=0, metavar="TOKENS", help="an extra pass before each dense one, with a window of so many tokens: what "
        "official RAT+ gives its attention baseline to match ARL's cost (64); 0: none")
    add("--adapt", metavar="METHOD", help="train through this dilated pattern instead of dense attention, for inference with it: "
        "RAT+'s adaptation to dilated:dilation=16,local=256,initial=4")
    # on what
    add("--data", default="niah", metavar="niah|DIR", help="needles made on the fly, or token shards that data.py wrote")
    add("--tokenizer", metavar="SPEC", help="as in data.py; None: the one beside --init, bytes for our presets")
    add("--context_len", type=positive, metavar="TOKENS", help="length of a sequence; None: the model's")
    add("--protocol", default="base", choices=niah.PROTOCOLS, help="needles: base (RULER's answer prefix) or sft (the question alone)")
    add("--tasks", nargs="+", type=niah.task_name, metavar="TASK",
        help="needles: which of RULER's, as niah_multikey_2 or mk-2; None: those that fit")
    add("--drills", type=share, default=0.0, metavar="SHARE", help="needles: of the steps, at the start, whose samples are all drills; "
        "of later samples 30 %% are. 0: no drills")
    add("--many", type=share, default=0.5, metavar="SHARE", help="needles: share of samples with many questions")
    add("--other_weight", type=at_least_0, default=0.1, metavar="W", help="needles: loss weight of tokens that are no answer")
    add("--haystack", metavar="FILE", help="needles: text of the essays; None: Python's help pages")
    # how long, how fast
    add("--steps", type=positive, default=1000, help="batches")
    add("--batch", type=few, default=64, help="sequences per step, over all GPUs")
    add("--device_batch", type=few, help="sequences per GPU at a time; the rest is accumulated. None: as many as fit a GPU, 16 on a CPU")
    add("--recompute", type=natural, metavar="LAYERS", help="how many layers' activations are computed anew in backward, to save memory; "
        "None: as few as must be")
    add("--lr", type=above_0, default=1e-3, help="peak learning rate")
    add("--memory_lr", type=above_0, help="that of the memory's gates; None: the same")
    add("--min_lr", type=at_least_0, default=0.0, help="where the cosine of --lr ends; that of --memory_lr in proportion")
    add("--warmup", type=share, default=0.05, metavar="SHARE", help="of the steps, in which the learning rate rises linearly")
    add("--weight_decay", type=at_least_0, default=0.1, help="on all parameters, as RAT+")
    add("--clip", type=above_0, default=1.0, help="largest norm of the gradient")
    add("--seed", type=seed, default=0, help="of weights and data")
    # where, and what is kept
    add("--device", type=usable_device, default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    add("--compile", choices=["on", "off"], help="torch.compile, and CUDA graphs where one GPU takes a whole --batch of a small model "
        "at a time; None: on with a GPU")
    backend.add_flag(parser)
    add("--workers", type=natural, help="processes that make batches; None: 8 with a GPU, else 0")
    add("--out", default="out", metavar="DIR", help="folder of all runs")
    add("--name", help="this run's folder in it; None: the recipe's or preset's name")
    add("--log_every", type=positive, default=20, help="steps between printed lines; log.jsonl has every step")
    add("--eval_every", type=natural, default=200, help="steps between validations; 0: none")
    add("--save_every", type=natural, default=200, help="steps between checkpoints; the last two are kept, and written while training goes on. "
        "0: none at all, for trials")
    add("--resume", action="store_true", help="go on from the run's newest checkpoint, if there is one")
    return parser


def parse(argv):
    """Flags, with the recipe's values as defaults. Errors are one line and exit 2."""
    parser = flags()
    recipe, _ = parser.parse_known_args(argv)
    parser.set_defaults(**RECIPES.get(recipe.recipe, {}))
    args = parser.parse_args(argv)
    given = {word.split("=")[0] for word in argv}
    if args.init and "--preset" not in given:  # the recipe's preset gives way
        args.preset = None
    if (args.preset is None) == (args.init is None):
        parser.error("give one of --preset (a new model) and --init (one to start from)")
    if args.preset and "--arl" not in given and not new_config(args).memory:  # so does its ARL, which needs a memory
        args.arl = 0
    if args.data is None:
        parser.error(f"--recipe={args.recipe} trains on text: give --data, a folder of shards that data.py wrote")
    world = int(os.environ.get("WORLD_SIZE", 1))
    if args.warmup == 1:
        parser.error("--warmup=1 leaves no step at the full learning rate")
    if args.min_lr > args.lr:
        parser.error(f"--min_lr {args.min_lr} is above --lr {args.lr}")
    per_process, on_gpu = args.batch // world, args.device.startswith("cuda")
    if args.device_batch is None and not on_gpu:
        args.device_batch = 16
    if args.batch % world or (args.device_batch and per_process % min(args.device_batch, per_process)):
        parser.error(f"--batch {args.batch} does not divide into {world} processes times --device_batch {args.device_batch}")
    if args.device_batch:
        args.device_batch = min(args.device_batch, per_process)
    if args.memory_lr is None:
        args.memory_lr = args.lr
    args.name = args.name or args.recipe or args.preset or "run"
    args.compile = args.compile or ("on" if on_gpu else "off")
    args.workers = args.workers if args.workers is not None else (8 if on_gpu else 0)
    return args


# ---------------------------------------------------------------- pieces

def new_config(args):
    """The preset's, with or without memory as the flags say."""
    preset = PRESETS[args.preset]
    return preset if args.memory is None else replace(preset, memory=args.memory == "on")


def what_to_train(args, folder=None):
    """Its Config, and its tensors as weights.fill takes them, None if they are in the checkpoint in `folder`."""
    source = folder or args.init
    if source:
        settings, tensors = weights.read(source, without_tensors=folder is not None)
        config = config_of(settings, source)
    else:
        config = new_config(args)
        tensors = fresh(config, args.seed, args.device)
    if args.memory == "on" and not config.memory:
        config = replace(config, memory=True)
        tensors = tensors | memory_tensors(config, args.gate_start)
    elif not folder and args.gate_start != 0.5:
        raise ValueError(f"--gate_start={args.gate_start} is for a memory that --memory=on adds to an --init without: nothing was added here")
    if args.memory == "off" and config.memory:
        raise ValueError(f"{source} has a memory, which --memory=off cannot take out")
    longer = args.context_len and args.context_len > config.context_len
    if longer and source and parallel.is_first():
        print(f"note: {source} was trained for {config.context_len:,} tokens, and "
              f"--context_len={args.context_len} goes beyond: it has to learn positions that are new to it")
    if args.context_len and (args.preset or longer):
        config = replace(config, context_len=args.context_len)
    return config, tensors


def settle(args, config):
    """The flags whose defaults the model decides."""
    args.context_len = args.context_len or config.context_len
    args.arl = (64 if config.memory else 0) if args.arl is None else args.arl
    if args.arl and args.joint:
        raise ValueError("--joint is attention's stand-in for ARL: give one of --joint and --arl, and --arl=0 with a memory")
    if args.arl and not config.memory:
        raise ValueError("--arl teaches a memory, and this model has none: add --memory=on or --arl=0")


def make_model(config, tensors, args, processes=parallel.Processes(), stays="nothing"):
    """The model to train, in fp32; each process has its rows. tensors: what_to_train's; None leaves them unset. stays: cost.Plan's."""
    with torch.device("meta"):  # shapes without storage
        model = Transformer(config)
    parallel.spread(model, processes, stays)
    if tensors is None:
        model.to_empty(device=args.device)
    else:
        weights.fill(model, tensors, args.init, torch.float32, args.device)
    return model


def passes_of(args):
    """-> {name: (sparse method, entries a token reads on average)} of each optimizer step on a batch; the last is "dense"."""
    T, passes = args.context_len, {}
    if args.arl:
        passes["arl"] = arl_passes(args.arl)[0], T / 2 / args.arl
    if args.joint:
        passes["joint"] = Dilated(dilation=None, local=args.joint, initial=0), min(args.joint, T / 2)
    passes["dense"] = None, T / 2
    if args.adapt:
        method = sparse.parse(args.adapt, T)
        if not isinstance(method, Dilated):
            raise ValueError(f"--adapt={args.adapt}: only dilated has a fixed pattern to be trained through")
        passes["dense"] = method, min(T / 2, T / 2 / (method.dilation or T) + method.local + method.initial)
    return passes


def flops_of(args, config):
    """-> {name: FLOPs of a step} of each pass, over all processes"""
    return {name: args.batch * args.context_len * cost.flops_per_token(config, reads) for name, (_, reads) in passes_of(args).items()}


def learning_rate(step, args):
    """Of the peak: linear from the first step to 1 at the end of warm-up, then a cosine to min_lr / lr."""
    warm = int(args.warmup * args.steps)
    if step < warm:
        return (step + 1) / warm
    floor = args.min_lr / args.lr
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, args.steps - warm)))


def make_optimizer(model, args):
    """
    AdamW in two groups, whose "peak" learning rate the schedule scales. Another optimizer must have its state from the start, in
    tensors for every parameter, as checkpoints are read into it; and do what update asks.
    """
    gates = [p for name, p in model.named_parameters() if "memory_proj" in name]
    rest = [p for name, p in model.named_parameters() if "memory_proj" not in name]
    groups = [{"params": rest, "peak": args.lr}] + ([{"params": gates, "peak": args.memory_lr}] if gates else [])
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), weight_decay=args.weight_decay, fused=True)
    for p in rest + gates:
        optimizer.state[p] = {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return optimizer


def update(optimizer, norm, clip):
    """
    A step on gradients divided by max(1, norm / clip), so that their norm is at most clip; and nothing at all if norm is not
    finite. The optimizer knows how, from mixed precision's scaling, on the device: nobody waits for the norm.
    """
    assert getattr(optimizer, "_step_supports_amp_scaling", False), f"{type(optimizer).__name__} would neither clip nor skip: do both here"
    optimizer.grad_scale, optimizer.found_inf = (norm / clip).clamp_min(1), (~norm.isfinite()).float()
    optimizer.step()
    optimizer.zero_grad()


class Loss(torch.nn.Module):
    """The model's loss of one pass as a module: what make_graphed_callables takes."""

    def __init__(self, model, method, autocast, compiled):
        super().__init__()
        self.model, self.method, self.autocast, self.compiled = model, method, autocast, compiled

    def forward(self, tokens, weight):
        with self.autocast:
            return self.model.loss(tokens, weight, self.method, self.compiled)


def one_pass(loss_of, model, optimizer, parts, weight_sum, processes, stays, clip):
    """
    A batch's forward and backward, and one update. parts: (tokens, weight) of this process, one after the other; weight_sum: of
    the batch; stays: cost.Plan's. -> this process's share of the loss; the gradient's norm; both on the device.
    If no token counts both are 0/0, and update does nothing.
    """
    loss = 0.0
    for number, (tokens, weight) in enumerate(parts, start=1):
        parallel.before_part(model, last=number == len(parts), stays=stays)
        of_part = loss_of(tokens, weight) / weight_sum
        (of_part * processes.world).backward()  # fully_shard averages gradients over the processes; we want their sum
        loss += of_part.detach()
    norm = parallel.gradient_norm(model)
    update(optimizer, norm, clip)
    return loss, norm


def graphed(losses, args):
    """
    The same losses, whose forward and backward are a CUDA graph each: two launches instead of hundreds, for which a small
    model's GPU would wait. For batches that are not split: the next replay writes where this one's gradients are.
    """
    gc.collect()  # graphs of an earlier run in this process, which hold each other and much memory
    shape, pool = (args.batch, args.context_len + 1), torch.cuda.graph_pool_handle()
    sample = torch.zeros(shape, dtype=torch.long, device=args.device), torch.ones(shape, device=args.device)
    return [torch.cuda.make_graphed_callables(loss, sample, pool=pool) for loss in losses]


@torch.no_grad()
def validate(model, dataset, args, method, autocast, processes, samples=64):
    """
    -> {"val_loss": mean loss per token of weight 1 (an answer's, or any of a text's), "val_accuracy": the share of these
    predicted first, "memory_lengths": how many tokens the median channel of each layer averages over, in the first samples}
    """
    n, totals, lengths = math.ceil(samples / processes.world), torch.zeros(3, dtype=torch.float64, device=args.device), []
    mine = range(processes.rank * n, (processes.rank + 1) * n)
    with autocast, torch.compiler.set_stance("force_eager"):  # other shapes, few calls: not worth compiling
        for start in range(0, n, args.device_batch):
            rows = [dataset[i] for i in mine[start:start + args.device_batch]]
            tokens, weight = (torch.stack([torch.as_tensor(row[part]) for row in rows]).to(args.device) for part in (0, 1))
            weight = (weight == 1).float()
            # all processes have as many samples, those after the last one without weight
            weight[[i >= samples for i in mine[start:start + args.device_batch]]] = 0
            with lengths_of(model) if start == 0 and model.config.memory else nullcontext([]) as found:
                loss, right = model.score(tokens, weight, method)
            lengths = lengths or [layer.median() for layer in found]
            totals += torch.stack([loss, right, weight[:, 1:].sum().double()])
    loss, right, count = processes.sum(totals).tolist()
    scores = {"val_loss": None, "val_accuracy": None}  # if no token counts
    if count:
        scores = {"val_loss": finite(loss / count), "val_accuracy": right / count}
    if lengths:
        scores["memory_lengths"] = [round(length, 2) for length in (processes.sum(torch.stack(lengths)) / processes.world).tolist()]
    return scores


# ---------------------------------------------------------------- the loop

def train(args):
    """One run. Returns its newest checkpoint's path and the last line of its log."""
    backend.use(args.kernels)
    run = Path(args.out) / args.name
    run.mkdir(parents=True, exist_ok=True)
    with (parallel.join(args.device) as processes, nullcontext() if processes.rank else only_one(run),
          parallel.Stop(processes, run) as stop, workers_told()):
        stopped, made, last_line = run_in(processes, stop, run, args)
    say = print if processes.rank == 0 else lambda *_: None
    if stopped:
        go_on = f"go on with the same command{'' if args.resume else ' and --resume'}"
        say(f"{run}: stopped after step {made['step']}; {go_on if args.save_every else 'nothing was saved, as --save_every=0 says'}")
        sys.exit(130)
    folder = newest(run, resume=True)
    speed = f"; {made['tokens_per_second']:,} tokens/s, MFU {made['mfu']:.1%}" if made["mfu"] else ""
    say(f"{run}: done, {folder or 'no checkpoint was asked for'}{speed}")
    return folder, last_line


def run_in(processes, stop, run, args):
    """The run as one of these processes. -> whether it was stopped before its last step; its record; the last line of its log"""
    rank, world, on_gpu, compiled = processes.rank, processes.world, args.device.startswith("cuda"), args.compile == "on"
    say = print if rank == 0 else lambda *_, **__: None
    if on_gpu:
        torch.set_float32_matmul_precision("high")

    # what to train on what
    commit = eval_niah.commit()
    folder = newest(run, args.resume)
    config, tensors = what_to_train(args, folder)
    settle(args, config)
    passes = passes_of(args)
    source = folder or (args.init and weights.resolve(args.init))
    tokenizer = tokenizer_of(source, config.vocab_size, args.tokenizer)
    training, validation = make_data(args, tokenizer, Needles)
    first_sample = fingerprint(training)
    inputs = {"tokenizer": tokenizer.name, "haystack": hash_of(args.haystack)}
    done = step_of(folder, run, args, {"data": first_sample, **inputs}) if folder else 0
    before = begun(args, folder)
    if folder and before["first_sample"] != first_sample:
        raise ValueError(f"--resume: the samples of {run} are others by now: move it away, or choose another --name")

    # what it will cost. A small model on one GPU would wait for launches: if a batch fits whole, its passes are recorded
    of_pass = flops_of(args, config)
    peak = cost.peak_flops(eval_niah.device_name(args.device))
    space = processes.least(cost.room(args.device, processes_here=1 + len(processes.here)))
    planned = lambda rows, small: cost.plan(config, args.batch // world, args.context_len, world, space, rows, args.recompute,
                                            width=2 if on_gpu else 4, small=small)
    small = on_gpu and world == 1 and compiled and args.device_batch in (None, args.batch) and max(of_pass.values()) < SMALL
    try:
        plan = planned(args.batch if small else args.device_batch, small)
    except ValueError:
        if not small:
            raise
        small, plan = False, planned(args.device_batch, False)
    args.device_batch = plan.device_batch
    how = "recorded as CUDA graphs, bf16 by autocast" if small else "spread by fully_shard, bf16" if on_gpu else "fp32"
    start = f"goes on from {folder}" if folder else f"starts from {source}" if source else f"a new {args.preset}"
    say(f"{run}: {start}, tokenizer {tokenizer.name}; on {eval_niah.device_name(args.device)}: {how}, "
        f"{'compiled' if compiled else 'not compiled'}, kernels {args.kernels}")
    for line in cost.lines(config, plan, args, of_pass, peak, world):
        say(f"{run}: {line}")
    if isinstance(training, Needles):
        say(f"{run}: needles of {', '.join(training.tasks)}")

    # the model
    model = make_model(config, tensors, args, parallel.Processes() if small else processes, plan.stays)
    optimizer = make_optimizer(model, args)
    if folder:
        checkpoint.load(folder, model, optimizer, processes)
    parallel.recompute_and_compile(model, plan.recompute, compiled)
    autocast = torch.autocast("cuda", torch.bfloat16) if small else nullcontext()
    losses_of = [Loss(model, method, autocast, compiled) for method, _ in passes.values()]
    if small:
        losses_of = graphed(losses_of, args)

    stopped, step_seconds, record = False, [], before
    if stop.wished and world == 1:
        raise KeyboardInterrupt
    with checkpoint.Saver(run, processes, tokenizer) as saver:
        log = Log(run, rank, done, of_pass, peak and peak * world, args.batch * args.context_len, before)
        since = time.time()
        for step, (tokens, weight) in enumerate(batches(training, args, done, processes), start=done + 1):
            waited = round(time.time() - since, 5)  # for the batch
            torch.manual_seed((args.seed * 1_000_003 + step) * world + rank)  # chance, where a fork adds any, is a function of the step too
            tokens, weight = tokens.to(args.device, non_blocking=True), weight.to(args.device, non_blocking=True)
            parts = list(zip(tokens.split(args.device_batch), weight.split(args.device_batch)))
            weight_sum = processes.sum(weight[:, 1:].sum())
            scale = learning_rate(step - 1, args)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * scale
            losses, norms, marks = [], [], [mark(args.device)]
            for loss_of in losses_of:
                loss, norm = one_pass(loss_of, model, optimizer, parts, weight_sum, processes, plan.stays, args.clip)
                losses.append(loss), norms.append(norm), marks.append(mark(args.device))
            *losses, wishes = processes.sum(torch.stack([*losses, torch.full_like(loss, stop.asked() or saver.failed())]))
            entry = {"step": step, "lr": args.lr * scale, "wait_seconds": waited} | ({"memory_lr": args.memory_lr * scale} if config.memory else {})
            log.add(entry, torch.stack([*losses, *norms, wishes]), marks, weight_sum)
            last = step == args.steps
            due = lambda every: every > 0 and (step % every == 0 or last)
            evaluates, prints, saves = due(args.eval_every), due(args.log_every) or step == 1, due(args.save_every)
            told, stopped = log.tell(keep=0 if evaluates or prints or saves else 1)
            stopped = stopped and not last
            if stopped:  # all processes know it by now, some steps later. Whoever wants to stop it may not wait for a validation
                told += log.tell()[0]
                last, evaluates, prints, saves = True, False, True, args.save_every > 0
            step_seconds.append(time.time() - since)
            if evaluates:
                told[-1][0].update(validate(model, validation, args, passes["dense"][0], autocast, processes))
            for entry, bad in told:
                log.write(entry | ({"memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2)} if on_gpu else {}))
                if bad is None:
                    say(f"step {entry['step']:>5}  no token of the batch counts, as all have weight 0: "
                        "nothing was learned from it", flush=True)
                elif bad:
                    say(f"step {entry['step']:>5}  loss or gradient is not finite: {bad} of {len(passes)} passes skipped, "
                        f"{entry['skipped']} so far", flush=True)
            if log.hopeless:
                raise FloatingPointError(f"loss or gradient was not finite in {PATIENCE} steps in a row, up to step {log.hopeless}: lower --lr, or "
                                         "look at the data; nothing was learned from them, and the last checkpoint is unharmed")
            if prints:
                say(line_of(told[-1][0], passes, step_seconds, training, args), flush=True)
            if saves or last:
                record = record_of(args, step, log, step_seconds, processes, commit, first_sample, before, **inputs)
            if saves:  # waits for the one before, and raises why that failed if it did
                saver.save(model, optimizer, record)
            if last:
                break
            since = time.time()
    return stopped, record, log.close()


def line_of(entry, passes, step_seconds, training, args):
    """What is printed of a step."""
    show = lambda value, form: "none" if value is None else format(value, form)
    first, what = next(iter(passes)), "answer tokens" if isinstance(training, Needles) else "tokens"
    speed = args.batch * args.context_len / statistics.median(step_seconds[-100:])
    left = (args.steps - entry["step"]) * args.batch * args.context_len / speed / 60
    return (f"step {entry['step']:>5}  loss {show(entry['loss'], '.3f')}"
            + (f"  {first} {show(entry[field(first, 'loss')], '.3f')}" if len(passes) > 1 else "")
            + (f"  validation {show(entry['val_loss'], '.3f')}, {show(entry['val_accuracy'], '.1%')} of {what} right" if "val_loss" in entry else "")
            + f"  lr {entry['lr']:.1e}  norm {show(entry['grad_norm'], '.2f')}  {speed:,.0f} tokens/s"
            + (f"  MFU {entry['mfu']:.1%}" if "mfu" in entry else "")
            + (f"  {left / 60:.1f} h left" if left > 120 else f"  {left:.1f} min left"))


# ---------------------------------------------------------------- python train.py

def lesson():
    """The attention checkpoint that comes with the code is given a memory and trained on; then both are asked for needles."""
    attention = os.path.relpath(SHIPPED[0])
    args = parse(["--recipe=micro-convert", f"--init={attention}", "--name=converted", "--resume", *LESSON])
    print("checkpoints/attention, trained without a memory, gets one (Eq. 1 on its keys and values) and is trained on: each batch "
          "once through the memory alone (ARL), once dense. Ctrl-C stops; the same command goes on.\n")
    train(args)
    if int(os.environ.get("RANK", 0)):
        return
    run, whole = Path(args.out) / args.name, parse(["--recipe=micro-convert", f"--init={attention}"])
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    print(f"\nWhat changed: loss per token where each query reads one entry in {args.arl} (ARL): {log[0]['arl_loss']:.2f} at the first "
          f"step, {statistics.fmean(entry['arl_loss'] for entry in log[-10:]):.2f} over the last ten."
          f" That took {args.steps * args.batch * args.context_len:,} tokens, of the {whole.steps * whole.batch * whole.context_len:,} of the "
          "recipe: expect less of the needles below.")
    print("\nNeedles, before and after, reading all of the prompt or a sixteenth of it:\n")
    eval_niah.main(["--ckpt", attention, str(run), "--methods", *(f"{kind}:budget=1/16" for kind in ("quest", "moba", "snapkv")),
                    f"--out={run / 'lesson'}"])
    print("\nNext: python eval_niah.py (all methods and budgets, and the model trained with a memory from the start)   "
          "python sample.py (one prompt, to read)")


def command(script, run):
    """run(); what a user can mend is one line of this script, and exit 2."""
    try:
        run()
    except (ValueError, FloatingPointError, OSError) as error:
        print(f"{script}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # before the first step
        sys.exit(130)


def main():
    command("train.py", lambda: train(parse(sys.argv[1:])) if len(sys.argv) > 1 else lesson())


if __name__ == "__main__":
    told_to_end()
    main()
