"""
Train a model: from scratch, continued with a memory, or fine-tuned. One loop, on one CPU, one GPU or many.

    for each step:   batch = f(seed, step)                      any order, any number of GPUs, the same numbers
        for each pass of memory.arl_passes:                     with ARL first through the memory alone, then dense
            loss = sum(weight * cross entropy) / sum(weight)    weights: 1, or less where a token is no answer (niah.py)
            one optimizer step
        learning rate: warm-up, then cosine

`python train.py` alone is a lesson of a few minutes: the small attention model that comes with the code is given a
memory, trained on, and compared with itself. Everything else is flags; `--recipe` sets many at once, and the paper's are
there: `python train.py --recipe=olmo2-continue --init=OLMo-2-1124-7B --data=shards`.

A run lives in out/NAME: log.jsonl, a line per step, and step_*/, complete checkpoints that model.Transformer, eval_niah
and sample load. A run that was stopped, by ctrl-C or kill, goes on with --resume as if it never had: on a CPU to the
bit. Checked in tests/test_train.py. Read niah.py and data.py for the batches, eval_niah.py for what follows.
"""
import argparse
import gc
import hashlib
import json
import math
import os
import re
import shutil
import signal
import statistics
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_model_state_dict, get_optimizer_state_dict, set_optimizer_state_dict)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

import backend
import eval_niah
import niah
import weights
from data import Shards, folder_of, tokenizer_files, tokenizer_of
from eval_niah import positive, usable_device
from memory import arl_passes
from model import PRESETS, Transformer
from sparse import Dilated

PEAK_FLOPS = 989e12  # of an H100 or H200 a second, dense bf16: what model FLOPs utilisation (MFU) is a share of

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
    # OLMo 2 continued with a memory: 10B tokens of FineWeb-Edu, 768 x 4096 a step
    "olmo2-continue": dict(data=None, memory="on", context_len=4096, steps=3179, batch=768, device_batch=1, lr=6e-5, memory_lr=6e-4,
                           min_lr=1e-6, warmup=0.02, arl=64),
    # about 7M tokens of needles before the evaluation, both backbones (official: 32 a step, weight decay 0.01)
    "niah-sft": dict(data="niah", context_len=4096, steps=54, batch=32, device_batch=1, lr=1e-5, min_lr=1e-6, warmup=0.05,
                     weight_decay=0.01, arl=0, protocol="sft", many=0.0, other_weight=0.0),
    # RAT+ from scratch, 100B tokens
    "ratplus-1b": dict(data=None, preset="ratplus-1b", context_len=4096, steps=47684, batch=512, device_batch=4, lr=8e-4, min_lr=1e-6,
                       warmup=0.05, arl=64),
    "ratplus-7b": dict(data=None, preset="ratplus-7b", context_len=4096, steps=31789, batch=768, device_batch=1, lr=6e-4, min_lr=1e-6,
                       warmup=0.05, arl=64),
}

# A 240th of micro-convert's tokens, in a few minutes on two cores: so few must change little but the gates
LESSON = ["--context_len=4096", "--drills=0", "--gate_start=0.1", "--steps=40", "--batch=1", "--device_batch=1", "--lr=5e-5",
          "--memory_lr=3e-3", "--log_every=5", "--eval_every=40"]


def gate(text):
    """A number above 0 and below 1, where a gate can start."""
    if not 0 < float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and below 1")
    return float(text)


def flags():
    parser = argparse.ArgumentParser(description="Train a model; with no flags, a lesson of a few minutes.", allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"train.py: {message}\n")
    add = parser.add_argument
    add("--recipe", choices=RECIPES, metavar="NAME", help="sets many flags at once: " + ", ".join(RECIPES))
    # what to train
    add("--preset", choices=PRESETS, metavar="NAME", help="a new model: " + ", ".join(PRESETS))
    add("--init", metavar="PATH", help="or a model to start from: anything that Transformer.from_pretrained loads")
    add("--memory", choices=["on", "off"], help="the decaying memory: on adds one to an --init without; None: as it is")
    add("--gate_start", type=gate, default=0.5, metavar="G", help="where the gates of a memory start that --init is "
        "given, above 0 and below 1")
    add("--arl", type=int, metavar="TOKENS", help="length that ARL teaches the memory, 0 for none; None: 64 with a memory")
    add("--joint", type=int, default=0, metavar="TOKENS", help="before each dense pass one that sees so many tokens back, as official "
        "RAT+ gives its attention baseline to match ARL's cost (64); 0: none")
    # on what
    add("--data", default="niah", metavar="niah|DIR", help="needles made on the fly, or token shards that data.py wrote")
    add("--tokenizer", metavar="SPEC", help="as in data.py; None: the one beside --init, bytes for our presets")
    add("--context_len", type=positive, metavar="TOKENS", help="length of a sequence; None: the model's")
    add("--protocol", default="base", choices=niah.PROTOCOLS, help="needles: base (RULER's answer prefix) or sft (the question alone)")
    add("--tasks", nargs="+", choices=niah.TASKS, metavar="TASK", help="needles: which of RULER's; None: those that fit")
    add("--drills", type=float, default=0.0, metavar="SHARE", help="needles: of the steps that begin with drills alone; of the rest 30 %% are; 0: none at all")
    add("--many", type=float, default=0.5, metavar="SHARE", help="needles: share of samples with many questions")
    add("--other_weight", type=float, default=0.1, metavar="W", help="needles: loss weight of tokens that are no answer")
    add("--haystack", metavar="FILE", help="needles: text of the essays; None: Python's help pages")
    # how long, how fast
    add("--steps", type=positive, default=1000, help="batches")
    add("--batch", type=positive, default=64, help="sequences per step, over all GPUs")
    add("--device_batch", type=positive, default=16, help="sequences per GPU at a time; the rest is accumulated")
    add("--lr", type=float, default=1e-3, help="peak learning rate")
    add("--memory_lr", type=float, help="that of the memory's gates; None: the same")
    add("--min_lr", type=float, default=0.0, help="where the cosine of --lr ends; that of --memory_lr in proportion")
    add("--warmup", type=float, default=0.05, metavar="SHARE", help="of the steps, linear")
    add("--weight_decay", type=float, default=0.1, help="on all parameters, as RAT+")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient")
    add("--seed", type=int, default=0, help="of weights and data")
    # where, and what is kept
    add("--device", type=usable_device, default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    add("--compile", choices=["on", "off"], help="torch.compile, and CUDA graphs where one GPU takes a whole --batch at a time; "
        "None: on with a GPU")
    backend.add_flag(parser)
    add("--workers", type=int, help="processes that make batches; None: 8 with a GPU, else 0")
    add("--out", default="out", metavar="DIR", help="folder of all runs")
    add("--name", help="this run's folder in it; None: the recipe's or preset's name")
    add("--log_every", type=positive, default=20, help="steps between printed lines; log.jsonl has every step")
    add("--eval_every", type=positive, default=200, help="steps between validations")
    add("--save_every", type=positive, default=200, help="steps between checkpoints; the last two are kept")
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
    if args.clip <= 0 or args.warmup == 1 or not all(0 <= share <= 1 for share in (args.warmup, args.drills, args.many)):
        parser.error("--clip must be above 0, --warmup, --drills and --many shares from 0 to 1")
    if args.lr <= 0 or args.joint < 0:
        parser.error(f"--lr {args.lr} must be above 0, --joint {args.joint} at least 0")
    if args.batch % world or (args.batch // world) % min(args.device_batch, args.batch // world):
        parser.error(f"--batch {args.batch} does not divide into {world} processes times --device_batch {args.device_batch}")
    args.device_batch = min(args.device_batch, args.batch // world)
    if args.memory_lr is None:
        args.memory_lr = args.lr
    args.name = args.name or args.recipe or args.preset or "run"
    on_gpu = args.device.startswith("cuda")
    args.compile = args.compile or ("on" if on_gpu else "off")
    args.workers = args.workers if args.workers is not None else (8 if on_gpu else 0)
    return args


# ---------------------------------------------------------------- pieces

def new_config(args):
    """The preset's, with or without memory as the flags say."""
    preset = PRESETS[args.preset]
    return preset if args.memory is None else replace(preset, memory=args.memory == "on")


def make_model(args, checkpoint=None):
    """The model to train, in fp32: the checkpoint's that the run goes on from, else --init's, else a new one."""
    torch.manual_seed(args.seed)
    if checkpoint or args.init:
        model = Transformer.from_pretrained(checkpoint or args.init, dtype=torch.float32)
    else:
        model = Transformer(new_config(args))
    if args.memory == "on" and not model.config.memory:
        model.add_memory(args.gate_start)
    elif not checkpoint and args.gate_start != 0.5:
        raise ValueError(f"--gate_start={args.gate_start} is for a memory that --memory=on adds to an --init without: nothing was added here")
    if args.memory == "off" and model.config.memory:
        raise ValueError(f"{checkpoint or args.init} has a memory, which --memory=off cannot take out")
    args.context_len = args.context_len or model.config.context_len
    args.arl = (64 if model.config.memory else 0) if args.arl is None else args.arl
    if args.arl and args.joint:
        raise ValueError("--joint is attention's stand-in for ARL: give one of --joint and --arl, and --arl=0 with a memory")
    if args.arl and not model.config.memory:
        raise ValueError("--arl teaches a memory, and this model has none: add --memory=on or --arl=0")
    return model


def passes_of(args):
    """-> (sparse method, entries a token reads on average) of each optimizer step on a batch."""
    T = args.context_len
    first = [(method, T / 2 / args.arl) for method in arl_passes(args.arl)[:-1]]
    if args.joint:
        first = [(Dilated(dilation=None, local=args.joint, initial=0), min(args.joint, T / 2))]
    return first + [(None, T / 2)]


class Needles(torch.utils.data.Dataset):
    """
    Sample `index` of niah.training_sample: tokens and loss weights (context_len + 1,).

    The first `only_drills` samples are drills, which form retrieval; of the others 30 % are, lest it fade.
    """

    def __init__(self, args, tokenizer, seed, only_drills=0):
        self.only_drills, self.later_drills = only_drills, 0.3 if only_drills else 0.0
        self.haystack = Path(args.haystack).read_text(encoding="utf-8") if args.haystack else None
        self.new_tokens = niah.default_new_tokens(args.context_len, tokenizer)
        fitting = niah.fitting_tasks(args.context_len, tokenizer, args.protocol, max_new_tokens=self.new_tokens)
        self.tasks = args.tasks or fitting
        if not self.tasks or set(self.tasks) - set(fitting):
            raise ValueError(f"--context_len {args.context_len} is too short for these tasks; it has room for "
                             f"{', '.join(fitting) or 'none (512 bytes hold the simplest)'}")
        self.args, self.tokenizer, self.seed = args, tokenizer, seed

    def __getitem__(self, index):
        a, drills = self.args, 1.0 if index < self.only_drills else self.later_drills
        return niah.training_sample(a.context_len, self.tokenizer, self.seed, index, self.tasks, a.many, self.haystack,
                                    a.other_weight, a.protocol, self.new_tokens, drills)


class Text(torch.utils.data.Dataset):
    """Window `index` of token shards, every token with weight 1."""

    def __init__(self, args, tokenizer, split):
        self.shards = Shards(args.data, args.context_len, args.seed, split)
        if self.shards.tokenizer != tokenizer.name:
            raise ValueError(f"{args.data} was made with tokenizer {self.shards.tokenizer}, the model's is {tokenizer.name}: "
                             "make shards with the model's tokenizer, or name theirs with --tokenizer")

    def __getitem__(self, index):
        tokens = self.shards.sample(index)
        one = torch.ones(len(tokens))
        one[0] = 0
        return tokens, one


def make_data(args, tokenizer):
    """Training and validation samples, both functions of an index."""
    if args.data != "niah":
        return Text(args, tokenizer, "train"), Text(args, tokenizer, "val")
    only_drills = int(args.drills * args.steps) * args.batch
    # in validation only answers count, however much the rest weighs in training
    held_out = argparse.Namespace(**{**vars(args), "other_weight": 0.0})
    seed = f"{args.recipe}-{args.seed}" if args.init else args.seed  # a model that is continued sees samples that are new to it
    return Needles(args, tokenizer, seed, only_drills), Needles(held_out, tokenizer, f"val-{seed}")


def batches(dataset, args, first_step, rank, world):
    """This rank's part of each batch from first_step on: tokens, weights (batch / world, context_len + 1)."""
    share = args.batch // world
    index = [step * args.batch + rank * share + i for step in range(first_step, args.steps) for i in range(share)]
    return torch.utils.data.DataLoader(dataset, batch_size=share, sampler=index, num_workers=args.workers,
                                       pin_memory=args.device.startswith("cuda"))


def learning_rate(step, args):
    """Of the peak: linear from the first step to 1 at the end of warm-up, then a cosine to min_lr / lr."""
    warm = int(args.warmup * args.steps)
    if step < warm:
        return (step + 1) / warm
    floor = args.min_lr / args.lr
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, args.steps - warm)))


def make_optimizer(model, args):
    gates = [p for name, p in model.named_parameters() if "memory_proj" in name]
    rest = [p for name, p in model.named_parameters() if "memory_proj" not in name]
    groups = [{"params": rest, "peak": args.lr}] + ([{"params": gates, "peak": args.memory_lr}] if gates else [])
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), weight_decay=args.weight_decay,
                             fused=args.device.startswith("cuda"))


def summed(tensor):
    """Over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def weighted_loss(model, tokens, weight, sparse, autocast):
    """Sum of weight * cross entropy of tokens[:, 1:], in nats; the caller divides. tokens, weight: (B, T + 1)."""
    with autocast:
        logits = model(tokens[:, :-1], sparse=sparse)  # (B, T, V)
    loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
    return (loss * weight[:, 1:].flatten()).sum()


class Loss(torch.nn.Module):
    """weighted_loss of one pass as a module: what make_graphed_callables takes."""

    def __init__(self, model, sparse, autocast):
        super().__init__()
        self.model, self.sparse, self.autocast = model, sparse, autocast

    def forward(self, tokens, weight):
        return weighted_loss(self.model, tokens, weight, self.sparse, self.autocast)


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
def validate(model, dataset, args, autocast, rank, world, samples=64):
    """-> mean loss per token of weight 1 (an answer's, or any of a text's), and the share of these predicted first."""
    share, (total, right, count) = math.ceil(samples / world), (0.0, 0.0, 0.0)
    mine = range(rank * share, (rank + 1) * share)
    for start in range(0, share, args.device_batch):
        rows = [dataset[i] for i in mine[start:start + args.device_batch]]
        tokens, weight = (torch.stack([torch.as_tensor(row[part]) for row in rows]).to(args.device) for part in (0, 1))
        answer = weight[:, 1:] == 1
        with autocast:
            logits = model(tokens[:, :-1])[answer].float()
        target = tokens[:, 1:][answer]
        total += F.cross_entropy(logits, target, reduction="sum").item()
        right += (logits.argmax(-1) == target).sum().item()
        count += answer.sum().item()
    total, right, count = summed(torch.tensor([total, right, count], dtype=torch.float64, device=args.device)).tolist()
    return total / count, right / count


# ---------------------------------------------------------------- checkpoints

MAY_CHANGE = {"resume", "device", "kernels", "workers", "compile", "device_batch", "log_every", "eval_every", "save_every", "out"}  # on --resume
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # gather what fully_shard has spread


def save(run, model, optimizer, record, beside, rank):
    """
    run/step_N: the model as save_pretrained writes it, the files `beside` it (its tokenizer's), optimizer.safetensors and
    the record as train.json. Whole or not at all.
    """
    step = record["step"]
    state, momenta = get_model_state_dict(model, options=WHOLE), get_optimizer_state_dict(model, optimizer, options=WHOLE)
    if rank == 0:
        final, temporary = run / f"step_{step:07d}", run / f".step_{step:07d}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            weights.write(temporary, model.config, state)
            flat = {f"{name}/{key}": value for name, entry in momenta["state"].items() for key, value in entry.items()}
            weights.whole_or_nothing(temporary / "optimizer.safetensors", lambda file: save_file(flat, file))
            for file in beside:
                shutil.copy(file, temporary)
            (temporary / "train.json").write_text(json.dumps(record, indent=1))
            os.rename(temporary, final)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise OSError(f"checkpoint of step {step} failed ({error}); those before it, if any, are whole: make room, then --resume") from None
        for old in sorted(run.glob("step_*"))[:-2]:
            shutil.rmtree(old)
    if dist.is_initialized():
        dist.barrier()


def record_of(step, durations, flops, commit, first_sample, before, args):
    """
    What a checkpoint tells of its making; None where nobody knows. durations: seconds from step to step of this process.
    flops: of a step. first_sample: fingerprint's. before: begun's.
    """
    seconds = statistics.median(durations)
    peak = PEAK_FLOPS * int(os.environ.get("WORLD_SIZE", 1)) if re.search("H[12]00", eval_niah.device_name(args.device)) else None
    return {"step": step, "settings": vars(args), "command": eval_niah.command_line(None, "train.py"), "commit": commit,
            "device": eval_niah.device_name(args.device), "torch": torch.__version__,
            "seconds": round(before["seconds"] + sum(durations), 2), "step_seconds": round(seconds, 5),
            "tokens_per_second": round(args.batch * args.context_len / seconds), "mfu": peak and round(flops / seconds / peak, 4),
            "first_sample": first_sample, "from": before["from"]}


def begun(args, checkpoint):
    """What a record goes on from: the seconds of the steps so far, and "from", the record of --init if that has one."""
    if checkpoint:
        return eval_niah.load(checkpoint / "train.json")
    return {"seconds": 0.0, "from": eval_niah.training_record(args.init) if args.init else None}


def newest(run, resume):
    """The run's newest checkpoint, None if it has none. ValueError if there is one and it was not asked for."""
    checkpoint = weights.resolve(run)
    if checkpoint == run:
        return None
    if not resume:
        raise ValueError(f"{run} holds a run already: go on with --resume, choose another --name, or delete it")
    return checkpoint


def fingerprint(dataset):
    """Of its first sample: another one, and the flags mean other data by now (our code, Python's help pages, the shards)."""
    return hashlib.sha256(b"".join(np.asarray(part).tobytes() for part in dataset[0])).hexdigest()[:12]


def step_of(checkpoint, run, args):
    """How many steps the checkpoint has seen. ValueError if going on with these flags would mix two runs."""
    saved = eval_niah.load(checkpoint / "train.json", "settings", "step")
    if "first_sample" not in saved:
        raise ValueError(f"--resume: an older version made {run}, with other samples: delete it, or choose another --name")
    for key, value in saved["settings"].items():
        if key not in MAY_CHANGE and vars(args).get(key) != value:
            raise ValueError(f"--resume: {run} was started with --{key}={value}, not {vars(args).get(key)}: "
                             "give the same flags, or another --name")
    return saved["step"]


def restore_optimizer(path, model, optimizer):
    momenta = get_optimizer_state_dict(model, optimizer)  # its groups, on every rank: with WHOLE only rank 0 gets any
    momenta["state"] = {}
    for name, value in load_file(path / "optimizer.safetensors").items():
        parameter, key = name.rsplit("/", 1)
        momenta["state"].setdefault(parameter, {})[key] = value
    set_optimizer_state_dict(model, optimizer, momenta, options=StateDictOptions(full_state_dict=True))


# ---------------------------------------------------------------- the loop

def tell(entry, numbers, labels):
    """Into a step's entry what the device computed in it: losses, by label, and the gradient's norm. -> does a process want to stop?"""
    *losses, norm, stops = numbers.tolist()  # waits for the device
    entry |= zip([*labels, "grad_norm"], [*losses, norm])
    for name in [*labels, "grad_norm"]:
        if not math.isfinite(entry[name]):
            raise FloatingPointError(f"{name} is {entry[name]} at step {entry['step']}: lower --lr; the last checkpoint is unharmed")
    return stops > 0


def train(args):
    """One run. Returns its newest checkpoint's path and the last line of its log."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    say = print if rank == 0 else lambda *_, **__: None
    backend.use(args.kernels)
    on_gpu = args.device.startswith("cuda")
    if on_gpu:
        torch.set_float32_matmul_precision("high")
    if world > 1 and not dist.is_initialized():
        if on_gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if on_gpu else "gloo")

    # what to train on what
    commit = eval_niah.commit()
    run = Path(args.out) / args.name
    checkpoint = newest(run, args.resume)
    model = make_model(args, checkpoint)
    source = checkpoint or (args.init and weights.resolve(args.init))
    tokenizer = tokenizer_of(source, model.config.vocab_size, args.tokenizer)
    beside = [] if tokenizer.name == "bytes" else tokenizer_files(folder_of(args.tokenizer or source))
    training, validation = make_data(args, tokenizer)
    first_step, first_sample = step_of(checkpoint, run, args) if checkpoint else 0, fingerprint(training)
    before = begun(args, checkpoint)
    if checkpoint and before["first_sample"] != first_sample:
        raise ValueError(f"--resume: the samples of {run} are others by now: delete it, or choose another --name")
    if args.preset or args.context_len > model.config.context_len:
        model.config = replace(model.config, context_len=args.context_len)
    model.to(args.device)
    n_parameters, passes = sum(p.numel() for p in model.parameters()), passes_of(args)
    per_step = args.batch * args.context_len
    flops = per_step * sum(model.flops_per_token(reads) for _, reads in passes)
    if args.compile == "on":
        for layer in model.layers:
            layer.compile(dynamic=False)  # there are few shapes, each worth its own kernels
    if world > 1:
        mesh = init_device_mesh("cuda" if on_gpu else "cpu", (world,))  # without, a machine's GPUs, also where --device=cpu
        for part in *model.layers, model:
            fully_shard(part, mesh=mesh)
    optimizer = make_optimizer(model, args)
    if checkpoint:
        restore_optimizer(checkpoint, model, optimizer)
    autocast = torch.autocast("cuda", torch.bfloat16) if on_gpu else nullcontext()
    say(f"{run}: {n_parameters / 1e6:.1f}M parameters, memory {'on' if model.config.memory else 'off'}, "
        f"ARL {args.arl or 'off'}{f', joint window {args.joint}' if args.joint else ''}; "
        f"{args.steps} steps of {args.batch} x {args.context_len} = {per_step:,} tokens "
        f"({world} x {args.device_batch} x {args.batch // world // args.device_batch} accumulated), "
        f"{len(passes)} pass{'es' if len(passes) > 1 else ''} each, {flops / 1e12:.2f} TFLOP a step")
    if isinstance(training, Needles):
        say(f"{run}: needles of {', '.join(niah.TASKS[task].short for task in training.tasks)}")
    first_pass, what = "arl" if args.arl else "joint", "answer tokens" if isinstance(training, Needles) else "tokens"
    labels = [f"{first_pass}_loss", "loss"][-len(passes):]
    if first_step:
        say(f"{run}: goes on from {checkpoint}")

    run.mkdir(parents=True, exist_ok=True)
    log_file = run / "log.jsonl"
    log = None
    if rank == 0:  # the lines up to the checkpoint; a power cut may have torn the last one, after it
        lines = log_file.read_text().splitlines(keepends=True)[:first_step] if first_step else []
        weights.whole_or_nothing(log_file, lambda file: file.write_text("".join(lines)))
        log = open(log_file, "a")
    stop = []  # ctrl-C and kill end the run, with a checkpoint
    handlers = {s: signal.signal(s, lambda number, _: stop.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}

    def write(entry):
        if log:
            log.write(json.dumps(entry | {"seconds": round(time.time() - started, 2)}) + "\n")
            log.flush()

    started = time.time()
    losses_of = [Loss(model, sparse, autocast) for sparse, _ in passes]
    if on_gpu and args.compile == "on" and args.device_batch == args.batch:
        losses_of = graphed(losses_of, args)
    step, stopped, durations = first_step, False, []
    since, untold = started, []  # a step whose numbers we have not waited for: first the device gets the next one to do
    for step, (tokens, weight) in enumerate(batches(training, args, first_step, rank, world), start=first_step + 1):
        tokens, weight = tokens.to(args.device, non_blocking=True), weight.to(args.device, non_blocking=True)
        whole_weight = summed(weight[:, 1:].sum())
        scale = learning_rate(step - 1, args)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * scale
        losses = []
        for loss_of in losses_of:
            loss = 0.0
            for some, its_weight in zip(tokens.split(args.device_batch), weight.split(args.device_batch)):
                part = loss_of(some, its_weight) / whole_weight
                # fully_shard averages gradients over the processes; we want their sum
                (part * world).backward()
                loss += part.detach()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss)
        *losses, stops = summed(torch.stack([*losses, torch.full_like(loss, len(stop))]))
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        untold.append(({"step": step, "lr": args.lr * scale}, torch.stack([*losses, norm, stops])))
        if len(untold) == 2:
            stopped |= tell(*untold[0], labels)
            write(untold.pop(0)[0])
        stopped |= world == 1 and bool(stop)  # of several processes all leave together, one or two steps later
        last = step == args.steps or stopped
        evaluates, prints, saves = (step % every == 0 or last for every in (args.eval_every, args.log_every, args.save_every))
        if evaluates or prints or saves or step == 1:
            entry, numbers = untold.pop()
            stopped |= tell(entry, numbers, labels)
        durations.append(time.time() - since)
        if evaluates:
            entry["val_loss"], entry["val_accuracy"] = validate(model, validation, args, autocast, rank, world)
        if not untold:
            write(entry)
        if prints or step == 1:
            speed = per_step / statistics.median(durations[-100:])
            left = (args.steps - step) * per_step / speed / 60
            say(f"step {step:>5}  loss {entry['loss']:.3f}"
                + (f"  {first_pass} {entry[f'{first_pass}_loss']:.3f}" if len(passes) > 1 else "")
                + (f"  validation {entry['val_loss']:.3f}, {entry['val_accuracy']:.1%} of {what} right" if "val_loss" in entry else "")
                + f"  lr {entry['lr']:.1e}  norm {entry['grad_norm']:.2f}  {speed:,.0f} tokens/s  {left:.1f} min left", flush=True)
        if saves:
            save(run, model, optimizer, record_of(step, durations, flops, commit, first_sample, before, args), beside, rank)
        if last:
            break
        since = time.time()
    if log:
        log.close()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if stopped:
        say(f"{run}: stopped after step {step}; go on with the same command{'' if args.resume else ' and --resume'}")
        sys.exit(130)
    checkpoint, made = weights.resolve(run), eval_niah.training_record(run)
    speed = f"; {made['tokens_per_second']:,} tokens/s, MFU {made['mfu']:.1%}" if made.get("mfu") else ""
    say(f"{run}: done, {checkpoint}{speed}")
    return checkpoint, json.loads(log_file.read_text().splitlines()[-1])


# ---------------------------------------------------------------- python train.py

def lesson():
    """The attention checkpoint that comes with the code is given a memory and trained on; then both are asked for needles."""
    attention = os.path.relpath(eval_niah.SHIPPED[0])
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


def main():
    try:
        if len(sys.argv) > 1:
            train(parse(sys.argv[1:]))
        else:
            lesson()
        if dist.is_initialized():
            dist.barrier()  # all leave together
    except (ValueError, FloatingPointError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
