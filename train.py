"""
Train a model: from scratch, continued with a memory, or fine-tuned. One loop, on one CPU, one GPU
or many.

    for each step:
        batch = f(seed, step)                           any number of GPUs, the same numbers
        for each pass, through memory alone (ARL), then dense:
            loss = sum(weight * cross entropy) / sum(weight)
            one optimizer step, unless loss or gradient is not finite
        learning rate: warm-up, then cosine

A weight is 1, or less where a token is no answer. `python train.py` alone is a lesson of a few
minutes (experiments/ideas.py): the smallest model that comes with the code is trained on with and
without a memory, and the two are compared. Everything else is flags, and --recipe sets many at once
(recipes.py):

    torchrun --nproc_per_node=8 train.py --recipe=olmo2-continue --init=OLMo-2-1124-7B --data=shards

A run says what it will cost, then lives in out/NAME: log.jsonl, a line per step, which infra/watch
draws, and step_*/, complete checkpoints that model.Transformer, eval_niah and sample load. A run
that was stopped, by ctrl-C, kill or a lost GPU, goes on with --resume as if it never had: on a CPU
to the bit. What several GPUs, CUDA graphs and signals need is in infra/parallel. Checked in
tests/test_train.py. Read eval_niah.py and data.py before; recipes.py is next.
"""
import math
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch

import sparse
from data import batches, fingerprint, hash_of, make_data, tokenizer_of, workers_told
from infra import checkpoint, cost, parallel, runlog, watch, weights
from infra.cli import command, commit, device_name
from infra.files import make_folder, only_one, told_to_end
from infra.init import fresh, memory_tensors
from infra.rope import stretched_to, yarn_for
from memory import MEMORIES, arl_passes, lengths_of
from model import Transformer, config_of
from niah import Needles
from recipes import new_config, parse, settle, wanted_memory
from sparse import Dilated
from triton_ops import backend


# ---------------------------------------------------------------- what a step is made of

def what_to_train(args, folder=None):
    """
    Its Config, and its tensors as weights.fill takes them, None if they are in the checkpoint in
    `folder`.
    """
    source = folder or args.init
    if source:
        # A checkpoint's tensors go straight to the processes that keep their rows, once those are
        # known: only its settings are wanted here.
        settings, tensors = weights.read(source, without_tensors=folder is not None)
        config = config_of(settings, source)
    else:
        config = new_config(args)
        tensors = fresh(Transformer, config, args.seed, args.device)

    wanted = wanted_memory(args, config)
    if config.memory and wanted != config.memory:
        raise ValueError(f"{source} has the memory {config.memory}, which --memory={args.memory} "
                         "cannot take out or exchange")
    if wanted and not config.memory:
        config = replace(config, memory=wanted)
        tensors = tensors | memory_tensors(MEMORIES[wanted], config, args.gate_start)
    elif not folder and args.gate_start != 0.5:
        raise ValueError(f"--gate_start={args.gate_start} is for a memory that --memory=on adds to "
                         "an --init without: nothing was added here")

    # A checkpoint of this run has the stretch already, of the length that --init was trained for.
    if args.yarn and not folder:
        config = replace(config, rope_scaling=yarn_for(config, args.yarn))

    # A longer context becomes the model's own; a shorter one leaves it as it is.
    longer = args.context_len and args.context_len > config.context_len
    if longer and source and parallel.is_first():
        reach = stretched_to(config)
        what = "it has to learn positions that are new to it"
        if args.context_len <= reach:
            what = f"its RoPE is stretched to {reach:,}, and it has to get used to that"
        print(f"note: {source} was trained for {config.context_len:,} tokens, and --context_len="
              f"{args.context_len} goes beyond: {what}")
    elif args.yarn and not (longer or folder) and parallel.is_first():
        print(f"note: --yarn={args.yarn:g} is for a --context_len beyond the "
              f"{config.context_len:,} tokens that {source} was trained for: give one")
    if args.context_len and (args.preset or longer):
        config = replace(config, context_len=args.context_len)
    return config, tensors


def passes_of(args):
    """
    -> {name: (sparse method, entries a token reads on average)} of each optimizer step on a batch;
    the last is "dense".
    """
    # In dense attention the average query has T / 2 entries before it. In ARL's pass it reads one
    # in args.arl of them, so that what lies between must be in the memory.
    T, passes = args.context_len, {}
    if args.arl:
        passes["arl"] = arl_passes(args.arl)[0], T / 2 / args.arl
    # Attention's stand-in for ARL takes as many optimizer steps. It reads more entries: 64 where
    # ARL, in 1,024 tokens, reads 8.
    if args.joint:
        window = Dilated(dilation=None, local=args.joint, initial=0)
        passes["joint"] = window, min(args.joint, T / 2)
    passes["dense"] = None, T / 2
    if args.adapt:
        method = sparse.parse(args.adapt, T)
        if not isinstance(method, Dilated):
            raise ValueError(f"--adapt={args.adapt}: only dilated has a fixed pattern to be "
                             "trained through")
        reads = T / 2 / (method.dilation or T) + method.local + method.initial
        passes["dense"] = method, min(T / 2, reads)
    return passes


def flops_of(args, config):
    """-> {name: FLOPs of a step} of each pass, over all processes"""
    # Each pass sees all of the batch.
    tokens = args.batch * args.context_len
    return {name: tokens * cost.flops_per_token(config, reads)
            for name, (_, reads) in passes_of(args).items()}


def learning_rate(step, args):
    """Of the peak: linear up to 1 at the end of warm-up, then a cosine to min_lr / lr."""
    warm = int(args.warmup * args.steps)
    if step < warm:
        return (step + 1) / warm
    floor = args.min_lr / args.lr
    turned = math.pi * (step - warm) / max(1, args.steps - warm)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(turned))


def make_optimizer(model, args):
    """
    AdamW in two groups, whose "peak" learning rate the schedule scales. Another optimizer must have
    its state from the start, in tensors for every parameter, as checkpoints are read into it; and
    do what parallel.update asks.
    """
    # A memory that a trained model is given is new, and may learn faster than what is trained.
    named = list(model.named_parameters())
    gates = [p for name, p in named if ".memory." in name]
    rest = [p for name, p in named if ".memory." not in name]
    groups = [{"params": rest, "peak": args.lr}]
    if gates:
        groups.append({"params": gates, "peak": args.memory_lr})
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95),
                                  weight_decay=args.weight_decay, fused=True)
    for p in rest + gates:  # as AdamW would make them at its first step
        optimizer.state[p] = {"step": torch.zeros((), device=p.device),
                              "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return optimizer


@torch.no_grad()
def validate(model, dataset, args, method, autocast, processes, samples=64):
    """
    -> {"val_loss": mean loss per token of weight 1 (an answer's, or any of a text's),
    "val_accuracy": the share of these predicted first, "memory_lengths": how many tokens the median
    channel of each layer averages over, in the first samples}
    """
    n = math.ceil(samples / processes.world)
    mine = range(processes.rank * n, (processes.rank + 1) * n)
    totals, lengths = torch.zeros(3, dtype=torch.float64, device=args.device), []
    # Shapes are others than in training, and calls are few: not worth compiling.
    with autocast, torch.compiler.set_stance("force_eager"):
        for start in range(0, n, args.device_batch):
            some = mine[start:start + args.device_batch]
            rows = [dataset[i] for i in some]
            tokens, weight = (torch.stack([torch.as_tensor(part) for part in parts])
                              .to(args.device) for parts in zip(*rows))
            weight = (weight == 1).float()
            # All processes have as many samples, and those beyond the last have no weight.
            weight[[i >= samples for i in some]] = 0
            # How far the memory reaches is the same in all samples, near enough: the first tell it.
            looks = start == 0 and model.config.memory
            with lengths_of(model) if looks else nullcontext([]) as found:
                loss, right = model.score(tokens, weight, method)
            lengths = lengths or [layer.median() for layer in found]
            totals += torch.stack([loss, right, weight[:, 1:].sum().double()])

    # Sums, not means, go over the processes: each may have counted another number of tokens.
    loss, right, count = processes.sum(totals).tolist()
    scores = {"val_loss": None, "val_accuracy": None}  # if no token counts
    if count:
        scores = {"val_loss": runlog.finite(loss / count), "val_accuracy": right / count}
    if lengths:
        means = processes.sum(torch.stack(lengths)) / processes.world
        scores["memory_lengths"] = [round(length, 2) for length in means.tolist()]
    return scores


# ---------------------------------------------------------------- the loop

def train(args):
    """One run. Returns its newest checkpoint's path and the last line of its log."""
    backend.use(args.kernels)
    run = Path(args.out) / args.name
    make_folder(run, "--out and --name:")
    # All processes join before one of them takes the folder, so that if it is refused, all leave.
    with (parallel.join(args.device) as processes,
          only_one(run) if processes.rank == 0 else nullcontext(),
          parallel.Stop(processes, run) as stop, workers_told()):
        stopped, record, last_line = run_in(processes, stop, run, args)

    say = print if processes.rank == 0 else lambda *_: None
    if stopped:  # 130 is what a shell reports of ctrl-C: no success, and no error
        go_on = "go on with the same command" + ("" if args.resume else " and --resume")
        if not args.save_every:
            go_on = "nothing was saved, as --save_every=0 says"
        say(f"{run}: stopped after step {record['step']}; {go_on}")
        sys.exit(130)
    # With --save_every=0 it is that of an earlier run, or there is none.
    folder = runlog.newest(run, resume=True)
    speed = ""
    if record["mfu"]:
        speed = f"; {record['tokens_per_second']:,} tokens/s, MFU {record['mfu']:.1%}"
    say(f"{run}: done, {folder or 'no checkpoint was asked for'}{speed}")
    return folder, last_line


def run_in(processes, stop, run, args):
    """
    The run as one of these processes. -> whether it was stopped before its last step; its record;
    the last line of its log
    """
    rank, world = processes.rank, processes.world
    on_gpu, compiled = args.device.startswith("cuda"), args.compile == "on"
    say = print if rank == 0 else lambda *_, **__: None
    if on_gpu:  # what is multiplied in fp32, on tensor cores
        torch.set_float32_matmul_precision("high")
    code = commit()  # of the code as it is loaded; hours later it may be another

    # From where: a checkpoint of this run, a model that is continued, or a new one.
    folder = runlog.newest(run, args.resume)
    source = folder or (args.init and weights.resolve(args.init))
    config, tensors = what_to_train(args, folder)
    settle(args, config)
    passes = passes_of(args)

    # On what. Samples are functions of the seed and their index, so that of all that was done the
    # number of steps is enough to go on. The fingerprint tells whether they are still the same.
    tokenizer = tokenizer_of(source, config.vocab_size, args.tokenizer)
    training, validation = make_data(args, tokenizer, Needles)
    first_sample = fingerprint(training)
    inputs = {"tokenizer": tokenizer.name, "haystack": hash_of(args.haystack)}
    done = runlog.step_of(folder, run, args, {"data": first_sample, **inputs}) if folder else 0
    before = runlog.begun(args, folder)
    if folder and before["first_sample"] != first_sample:
        raise ValueError(f"--resume: the samples of {run} are others by now: move it away, or "
                         "choose another --name")

    # At what cost. All of it is said before anything is allocated, and what cannot fit ends here.
    # Processes may have unlike room and must cut their batches alike: the least decides.
    device = device_name(args.device)
    of_pass, peak = flops_of(args, config), cost.peak_flops(device)
    room = processes.least(cost.room(args.device, processes_here=1 + len(processes.here)))
    # The plan says how many sequences go through the model at a time, what stays on a GPU between
    # such parts, and whether the model is small: then each process keeps all of it.
    plan = cost.plan_of(args, config, of_pass, world, room)
    args.device_batch = plan.device_batch
    start = f"a new {args.preset}"
    if source:
        start = f"goes on from {folder}" if folder else f"starts from {source}"
    how = "spread by fully_shard, bf16" if on_gpu else "fp32"
    if plan.small:
        how = "recorded as CUDA graphs, bf16 by autocast"
    how += ", compiled" if compiled else ", not compiled"
    say(f"{run}: {start}, tokenizer {tokenizer.name}; on {device}: {how}, kernels {args.kernels}")
    for line in cost.lines(config, plan, args, of_pass, peak, world):
        say(f"{run}: {line}")
    what = "tokens"  # that validation counts
    if isinstance(training, Needles):
        what = "answer tokens"
        say(f"{run}: needles of {', '.join(training.tasks)}, protocol {args.protocol}")

    # The model, of which each process keeps its rows or, if it is small, all; and a loss for each
    # pass through it.
    keepers = parallel.Processes() if plan.small else processes
    model = parallel.make_model(Transformer, config, tensors, args, keepers, plan.stays)
    optimizer = make_optimizer(model, args)
    if folder:
        checkpoint.load(folder, model, optimizer, processes)
    parallel.recompute_and_compile(model, plan.recompute, compiled)
    autocast = torch.autocast("cuda", torch.bfloat16) if plan.small else nullcontext()
    losses_of = [parallel.Loss(model, method, autocast, compiled) for method, _ in passes.values()]
    if plan.small:
        losses_of = parallel.graphed(losses_of, args)

    # A wish to stop from before the first step has nothing to save. (Several processes hear of it
    # only when they sum their wishes.)
    if stop.wished and world == 1:
        raise KeyboardInterrupt
    stopped, step_seconds, record = False, [], before
    with checkpoint.Saver(run, processes, tokenizer) as saver:
        tokens_of_step = args.batch * args.context_len
        log = runlog.Log(run, rank, done, of_pass, peak and peak * world, tokens_of_step, before)
        since = time.time()
        for step, (tokens, weight) in enumerate(batches(training, args, done, processes), done + 1):
            waited = round(time.time() - since, 5)  # for the batch

            # Chance, where a fork adds any, is a function of the step too.
            torch.manual_seed((args.seed * 1_000_003 + step) * world + rank)

            # This process's share of the batch, in parts that fit; and the weights of all of it.
            tokens = tokens.to(args.device, non_blocking=True)
            weight = weight.to(args.device, non_blocking=True)
            parts = list(zip(tokens.split(args.device_batch), weight.split(args.device_batch)))
            weight_sum = processes.sum(weight[:, 1:].sum())

            # The schedule advances once per batch, for all of its passes.
            scale = learning_rate(step - 1, args)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * scale

            # ARL's pass, then the dense one: each is an optimizer step, on the same batch.
            losses, norms, marks = [], [], [runlog.mark(args.device)]
            for name, loss_of in zip(passes, losses_of):
                share = args.arl_weight if name == "arl" else 1.0
                loss, norm = parallel.one_pass(loss_of, model, optimizer, parts, weight_sum,
                                               processes, plan.stays, args.clip, share)
                losses.append(loss)
                norms.append(norm)
                marks.append(runlog.mark(args.device))

            # Losses are summed over processes, and so are their wishes to stop: all hear of a wish
            # in the same step, and nobody waits for one that has left.
            wish = torch.full_like(loss, stop.asked() or saver.failed())
            *losses, wishes = processes.sum(torch.stack([*losses, wish]))
            entry = {"step": step, "lr": args.lr * scale, "wait_seconds": waited}
            if config.memory:
                entry["memory_lr"] = args.memory_lr * scale
            log.add(entry, torch.stack([*losses, *norms, wishes]), marks, weight_sum)

            # To read a number is to wait for the GPU. So a step's numbers are read when the next
            # one has been launched, or at once where something is due that needs them.
            last = step == args.steps
            evaluates = last_or_every(args.eval_every, step, args)
            prints = last_or_every(args.log_every, step, args) or step == 1
            saves = last_or_every(args.save_every, step, args)
            entries, stopped = log.tell(keep=0 if evaluates or prints or saves else 1)
            stopped = stopped and not last
            if stopped:  # whoever wants to stop it may not want to wait for a validation
                entries += log.tell()[0]
                last, evaluates, prints, saves = True, False, True, args.save_every > 0
            step_seconds.append(time.time() - since)

            # What is due, for the newest step; the log has a line for every one.
            if evaluates:
                method, _ = passes["dense"]
                found = validate(model, validation, args, method, autocast, processes)
                entries[-1][0].update(found)
            for entry, bad in entries:
                if on_gpu:
                    most = torch.cuda.max_memory_allocated()
                    entry = entry | {"memory_gb": round(most / 1e9, 2)}
                log.write(entry)
                if bad != 0:
                    say(watch.line_of_skipped(entry, bad, passes), flush=True)
            if log.hopeless:
                raise FloatingPointError(
                    f"loss or gradient was not finite in {runlog.PATIENCE} steps in a row, up to "
                    f"step {log.hopeless}: lower --lr, or look at the data; nothing was learned "
                    "from them, and the last checkpoint is unharmed")
            if prints:
                entry, _ = entries[-1]
                say(watch.line_of(entry, passes, step_seconds, args, what), flush=True)

            # While the checkpoint is written, the next steps are computed.
            if saves or last:
                record = runlog.record_of(args, step, log, step_seconds, processes, code,
                                          first_sample, before, **inputs)
            if saves:  # waits for the one before, and raises why that failed if it did
                saver.save(model, optimizer, record)
            if last:
                break
            since = time.time()
    return stopped, record, log.close()


def last_or_every(n, step, args):
    """Whether what is done every n steps, and after the last, is due; 0 is never."""
    return n > 0 and (step % n == 0 or step == args.steps)


# ---------------------------------------------------------------- python train.py

def main():
    if len(sys.argv) == 1:
        from experiments.ideas import lesson  # which trains through this file
        command("train.py", lesson)
    else:
        command("train.py", lambda: train(parse(sys.argv[1:])))


if __name__ == "__main__":
    told_to_end()
    main()
