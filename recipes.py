"""
What train.py is told: its flags, and the recipes, which set many of them at once.

    value of a flag  =  what the command gives, else what its --recipe says, else the flag's default

RECIPES below is a table of training runs: ours in small, and the paper's at full size. A flag whose
default is None is settled later, by the rest of the command (parse) or by the model (settle).
tests/test_train.py holds the paper's rows against the paper. Read train.py first.
"""
import os
import sys
from dataclasses import replace

import torch

import niah
from infra.cli import (LONGEST, above_0, above_1, at_least_0, few, flag_parser, gate, natural,
                       positive, seed, share, usable_device)
from infra.parallel import is_first
from memory import MEMORIES
from model import PRESETS
from triton_ops import backend

# RAT+'s adaptation: every 16th token, the last 256 and the first 4 (arXiv 2602.18196)
PATTERN = "dilated:dilation=16,local=256,initial=4"

# Of the small model's 1,024 bytes: tasks that fit, and that sparse reading makes hard, but for S-2.
NANO_TASKS = ["niah_single_2", "niah_multikey_1", "niah_multikey_2", "niah_multivalue"]

# Flags that say something of needles, and nothing of text.
OF_NEEDLES = {"--protocol", "--tasks", "--drills", "--many", "--other_weight", "--haystack"}

# One recipe reads: what is trained on what; for how long; how fast; what is kept.
RECIPES = {
    # The paper in small, in minutes on a GPU: pretraining in a short context, where retrieval
    # forms. Every token counts alike. Heads that are paid for answers alone look at nothing during
    # the question, and SnapKV then drops what they need.
    "micro": dict(
        preset="micro", protocol="sft", drills=1/3, other_weight=1.0, arl=64,
        context_len=1024, batch=64, device_batch=64, steps=2000,
        lr=2e-3,
        log_every=100, eval_every=500, save_every=1000),

    # Its attention model is given a memory, for less than a fifth of the tokens of both stages.
    # Retrieval must form anew, now through the memory. Without drills and a learning rate as high
    # as before, the gates close and nothing is won.
    "micro-convert": dict(
        memory="on", protocol="sft", drills=1/3, other_weight=1.0, arl=64,
        context_len=1024, batch=64, device_batch=64, steps=600,
        lr=2e-3, memory_lr=1e-2,
        log_every=40, eval_every=300, save_every=300),

    # Either is fine-tuned at the paper's context, where answers count most, without ARL.
    "micro-sft": dict(
        protocol="sft", arl=0,
        context_len=4096, batch=16, device_batch=16, steps=1280,
        lr=1e-3,
        log_every=80, eval_every=320, save_every=640),

    # The start of the loop for ideas (experiments/ideas.py): attention in 0.7M parameters, made on
    # a GPU in a minute by these two. It ships as checkpoints/nano.
    "nano": dict(
        preset="nano", tasks=NANO_TASKS, protocol="sft", drills=1/3, other_weight=1.0,
        context_len=1024, batch=64, device_batch=64, steps=3000,
        lr=3e-3,
        log_every=100, eval_every=1000, save_every=1000),
    "nano-sft": dict(
        tasks=NANO_TASKS, protocol="sft", arl=0,
        context_len=1024, batch=64, device_batch=64, steps=800,
        lr=1e-3,
        log_every=100, eval_every=400, save_every=400),

    # The loop itself gives that model a memory, in two minutes on a CPU.
    "nano-convert": dict(
        memory="on", tasks=NANO_TASKS, protocol="sft", arl=64,
        context_len=1024, batch=8, device_batch=8, steps=96,
        lr=1e-3, memory_lr=5e-3,
        log_every=16, eval_every=0, save_every=48),

    # The paper's own (arXiv 2605.28640). What it leaves out is from the configs of official RAT+,
    # marked (c). data=None: it trains on text, and --data must say where that is.
    #
    # OLMo 2 is continued with a memory: 10B tokens of FineWeb-Edu. (c): min_lr, by a cosine.
    "olmo2-continue": dict(
        data=None, memory="on", arl=64,
        context_len=4096, batch=768, steps=3179,
        lr=6e-5, memory_lr=6e-4, min_lr=1e-6, warmup=0.02, weight_decay=0.1,
        save_every=25),

    # A memory for a language model of 135M parameters, on one GPU: the conversion that was chosen
    # in docs/real-model-plan.md, whose schedule all arms there have. Its gates hardly move, so
    # --init comes from experiments/starts.py, where they start long.
    "continue": dict(
        data=None, memory="on", arl=64, arl_weight=0.1,
        context_len=4096, batch=16, steps=381,
        lr=5e-4, memory_lr=1e-5, warmup=0.05, weight_decay=0.1),

    # Needles before the evaluation, for both backbones. The steps are a reading: the paper says
    # "about 7M tokens" and gives 16 GPUs two hours, and (c)'s file name says 2,248 steps, which are
    # 4 epochs of 73.7M tokens. So we take 7M for 70M. (c): the third line, but for lr.
    "niah-sft": dict(
        data="niah", protocol="sft", many=0.0, other_weight=0.0, arl=0,
        context_len=4096, batch=32, steps=2248,
        lr=1e-5, min_lr=1e-6, warmup=0.05, weight_decay=0.01),

    # RAT+ from scratch (arXiv 2602.18196) on FineWeb-Edu's sample of 100B tokens, which are 110B in
    # LLaMA's: as many steps as the released checkpoints' names tell. All (c).
    "ratplus-1b": dict(
        data=None, preset="ratplus-1b", arl=64,
        context_len=4096, batch=512, steps=52451,
        lr=8e-4, min_lr=1e-6, warmup=0.05, weight_decay=0.1,
        save_every=250),
    "ratplus-7b": dict(
        data=None, preset="ratplus-7b", arl=64,
        context_len=4096, batch=768, steps=34967,
        lr=6e-4, min_lr=1e-6, warmup=0.05, weight_decay=0.1,
        save_every=250),

    # Its adaptation to dilated inference: 1B tokens, with the wanted pattern in place of dense
    # attention, and without ARL. All (c).
    "ratplus-1b-adapt": dict(
        data=None, adapt=PATTERN, arl=0,
        context_len=4096, batch=512, steps=476,
        lr=8e-5, min_lr=1e-6, warmup=0.0, weight_decay=0.1),
    "ratplus-7b-adapt": dict(
        data=None, adapt=PATTERN, arl=0,
        context_len=4096, batch=768, steps=316,
        lr=2e-5, min_lr=1e-6, warmup=0.02, weight_decay=0.1),
}


# ---------------------------------------------------------------- the flags

def flags():
    parser = flag_parser("train.py", "Train a model; with no flags, a lesson of a few minutes.")
    add = parser.add_argument
    add("--recipe", choices=RECIPES, metavar="NAME",
        help="sets many flags at once: " + ", ".join(RECIPES) + "; --init is wanted by those that "
        "continue, fine-tune or adapt a model, --data by those of text")

    # what to train
    add("--preset", choices=PRESETS, metavar="NAME", help="a new model: " + ", ".join(PRESETS))
    add("--init", metavar="PATH",
        help="or a model to start from: anything that Transformer.from_pretrained loads")
    add("--memory", choices=["on", "off", *MEMORIES],
        help="the memory: on adds the decaying one to an --init without, a name of memory.MEMORIES "
        "one of that kind; default: as it is")
    add("--gate_start", type=gate, default=0.5, metavar="G",
        help="where the gates of a memory start that --init is given, above 0 and below 1")
    add("--yarn", type=above_1, metavar="FACTOR",
        help="stretch the RoPE of --init to a context so many times as long, to train it at a "
        "--context_len beyond its own; default: as it is")
    add("--arl", type=natural, metavar="TOKENS",
        help="length that ARL teaches the memory, 0 for none; without a memory its sparse pattern "
        "is trained alone, a control; default: 64 with a memory")
    add("--arl_weight", type=above_0, default=1.0, metavar="W",
        help="of the gradient of ARL's step beside that of the dense one: as Adam has one mean of "
        "both, a small weight leaves the dense one the say")
    add("--joint", type=natural, default=0, metavar="TOKENS",
        help="an extra pass before each dense one, with a window of so many tokens: what official "
        "RAT+ gives its attention baseline to match ARL's cost (64); 0: none")
    add("--adapt", metavar="METHOD",
        help="train through this dilated pattern instead of dense attention, for inference with "
        f"it: RAT+'s adaptation to {PATTERN}")

    # on what
    add("--data", default="niah", metavar="niah|DIR",
        help="needles made on the fly, or token shards that data.py wrote")
    add("--tokenizer", metavar="SPEC",
        help="as in data.py; default: the one beside --init, bytes for our presets")
    add("--context_len", type=positive, metavar="TOKENS",
        help=f"length of a sequence; default: the model's, at most {LONGEST}")
    add("--protocol", default="base", choices=niah.PROTOCOLS,
        help="needles: base (RULER's answer prefix) or sft (the question alone)")
    add("--tasks", nargs="+", type=niah.task_name, metavar="TASK",
        help="needles: which of RULER's, as niah_multikey_2 or mk-2; default: those that fit")
    add("--drills", type=share, default=0.0, metavar="SHARE",
        help="needles: of the steps, at the start, whose samples are all drills; of later samples "
        "30 %% are. 0: no drills")
    add("--many", type=share, default=0.5, metavar="SHARE",
        help="needles: share of samples with many questions")
    add("--other_weight", type=at_least_0, default=0.1, metavar="W",
        help="needles: loss weight of tokens that are no answer")
    add("--haystack", metavar="FILE",
        help="needles: text of the essays; default: Python's help pages")

    # how long, how fast
    add("--steps", type=positive, default=1000, help="batches")
    add("--batch", type=few, default=64, help="sequences per step, over all GPUs")
    add("--device_batch", type=few,
        help="sequences per GPU at a time; the rest is accumulated; default: as many as fit a GPU, "
        "16 on a CPU")
    add("--recompute", type=natural, metavar="LAYERS",
        help="how many layers' activations are computed anew in backward, to save memory; default: "
        "as few as must be")
    add("--lr", type=above_0, default=1e-3, help="peak learning rate")
    add("--memory_lr", type=above_0, help="that of the memory's gates; default: the same")
    add("--min_lr", type=at_least_0, default=0.0,
        help="where the cosine of --lr ends; that of --memory_lr in proportion")
    add("--warmup", type=share, default=0.05, metavar="SHARE",
        help="of the steps, in which the learning rate rises linearly")
    add("--weight_decay", type=at_least_0, default=0.1, help="on all parameters, as RAT+")
    add("--clip", type=above_0, default=1.0, help="largest norm of the gradient")
    add("--seed", type=seed, default=0, help="of weights and data")

    # where, and what is kept
    add("--device", type=usable_device, default="cuda" if torch.cuda.is_available() else "cpu",
        help="cuda or cpu")
    add("--compile", choices=["on", "off"],
        help="torch.compile, and CUDA graphs where one GPU takes a whole --batch of a small model "
        "at a time; default: on with a GPU")
    backend.add_flag(parser)
    add("--workers", type=natural,
        help="processes that make batches; default: 8 with a GPU, else 0")
    add("--out", default="out", metavar="DIR", help="folder of all runs")
    add("--name", help="this run's folder in it; default: the recipe's or preset's name")
    add("--log_every", type=positive, default=20,
        help="steps between printed lines; log.jsonl has every step")
    add("--eval_every", type=natural, default=200, help="steps between validations; 0: none")
    add("--save_every", type=natural, default=200,
        help="steps between checkpoints; the last two are kept, and written while training goes "
        "on. 0: none at all, for trials")
    add("--resume", action="store_true",
        help="go on from the run's newest checkpoint, if there is one")
    return parser


def parse(argv):
    """The flags of a command, settled among each other. Errors are one line and exit 2."""
    parser = flags()
    recipe = parser.parse_known_args(argv)[0].recipe
    parser.set_defaults(**RECIPES.get(recipe, {}))
    args = parser.parse_args(argv)
    given = {word.split("=")[0] for word in argv}

    # A model that the command names takes the place of the recipe's, and of the ARL that went with
    # that one, if it has no memory to be taught.
    if args.init and "--preset" not in given:
        args.preset = None
    if (args.preset is None) == (args.init is None):
        parser.error("give one of --preset (a new model) and --init (one to start from)")
    if args.yarn and args.preset:
        parser.error(f"--yarn={args.yarn:g} stretches a trained model: give it as --init")
    without = args.memory == "off" or (args.preset and not new_config(args).memory)
    if without and "--arl" not in given:
        args.arl = 0
    if args.data is None:
        parser.error(f"--recipe={args.recipe} trains on text: give --data, a folder of shards that "
                     "data.py wrote")
    if args.data != "niah" and (unheard := sorted(given & OF_NEEDLES)) and is_first():
        print(f"note: {', '.join(unheard)}: for needles, and of no effect on text, which "
              f"--data={args.data} is", file=sys.stderr)
    if args.warmup == 1:
        parser.error("--warmup=1 leaves no step at the full learning rate")
    if args.min_lr > args.lr:
        parser.error(f"--min_lr {args.min_lr} is above --lr {args.lr}")

    # The batch is what is trained on, however many processes share it: each must get as much.
    world, on_gpu = int(os.environ.get("WORLD_SIZE", 1)), args.device.startswith("cuda")
    share_of_each = args.batch // world
    if args.device_batch is None and not on_gpu:
        args.device_batch = 16
    at_a_time = min(args.device_batch or 1, share_of_each)
    if args.batch % world or (at_a_time and share_of_each % at_a_time):
        parser.error(f"--batch {args.batch} does not divide into {world} processes times "
                     f"--device_batch {args.device_batch}")
    if args.device_batch:
        args.device_batch = at_a_time

    if args.memory_lr is None:
        args.memory_lr = args.lr
    if args.compile is None:
        args.compile = "on" if on_gpu else "off"
    if args.workers is None:
        args.workers = 8 if on_gpu else 0
    args.name = args.name or args.recipe or args.preset or "run"
    return args


def new_config(args):
    """The preset's Config, with or without a memory as the flags say."""
    config = PRESETS[args.preset]
    return replace(config, memory=wanted_memory(args, config))


def wanted_memory(args, config):
    """The name of the memory that --memory asks for, given the Config that is there; None: none."""
    meant = {None: config.memory, "on": config.memory or "decay", "off": None}
    return meant.get(args.memory, args.memory)


def settle(args, config):
    """The flags whose defaults the model decides. ValueError if it cannot be trained so."""
    if args.context_len is None:
        args.context_len = min(LONGEST, config.context_len)
    if args.arl is None:
        args.arl = 64 if config.memory else 0
    if args.arl and args.joint:
        raise ValueError("--joint is attention's stand-in for ARL: give one of --joint and --arl, "
                         "and --arl=0 with a memory")
    if args.arl and not config.memory and is_first():
        print("note: this model has no memory, so that ARL's pass trains its sparse pattern alone; "
              "--arl=0 leaves that pass out", file=sys.stderr)
