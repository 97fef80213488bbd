"""
One model on one GPU, on many, on many nodes: the same script, started by python or by torchrun.

    a parameter    fp32 on the GPU that keeps its rows, 1/world of them: what the optimizer changes
                   (fully_shard, FSDP2)
    a layer        gathers its parameters in bf16 just before it computes, while the layer before
                   it does, and drops them, or keeps them where there is room (cost.Plan.stays)
    a gradient     is made in bf16, summed in fp32 over the parts of a batch and over GPUs, and kept
                   by the owner of the rows
    activations    are kept for backward, or computed anew from a layer's input (checkpointing), for
                   as many layers as must be

So numbers do not depend on how many GPUs there are, but for the order of sums. On a CPU all is
fp32. A model so small that launches cost more than arithmetic takes another way on one GPU: its
passes are recorded as CUDA graphs (graphed), in bf16 by autocast, with norms and residuals in fp32.
On several GPUs it is spread like any other, and its numbers are a little coarser.

In this order: the processes, the model among them, one pass of a training step, and how a run is
stopped or one of its processes lost. cost.py predicts the memory that all this takes. Another
parallelism, of tensors say, belongs into spread, with a mesh of its own dimension. Checked with two
gloo processes in tests/test_parallel.py. Read checkpoint.py next.
"""
import gc
import os
import signal
import socket
import sys
import threading
import time
import traceback
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import product

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (MixedPrecisionPolicy, fully_shard,
                                    register_fsdp_forward_method)
from torch.utils.checkpoint import checkpoint

from infra import weights

# Else the memory of a GPU that is nearly full falls into pieces. The setting is read when the first
# tensor is made there. Before torch 2.11 only its older name counts.
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ and torch.cuda.is_available():
    newer = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)
    os.environ.setdefault("PYTORCH_ALLOC_CONF" if newer else "PYTORCH_CUDA_ALLOC_CONF",
                          "expandable_segments:True")

ENDING = threading.Lock()  # of the thread that ends this process, until it has


# ---------------------------------------------------------------- the processes

@dataclass
class Processes:
    """Those that train together; each has one GPU, or a share of the CPU."""
    rank: int = 0
    world: int = 1
    mesh: DeviceMesh | None = None   # None: nothing is spread, on one CPU or of a small model
    background: dist.ProcessGroup | None = None  # over the CPU, beside what GPUs say to each other
    store: dist.Store | None = None  # outlives each of them, if torchrun keeps it
    here: dict = field(default_factory=dict)  # {rank: pid} of the others on this machine

    def sum(self, tensor):
        """Over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def least(self, number):
        """Of all processes: what they decide by must be the same."""
        least = torch.tensor(float(number), dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(least, dist.ReduceOp.MIN, self.background)
        return least.item()

    def gone(self):
        """Ranks of the others on this machine that are no more."""
        return [rank for rank, pid in self.here.items() if not alive(pid)]

    def fail(self, line, code):
        """End this process, as one of several, with one line for all of them."""
        # Of its threads, the main one and Stop's may both find that another process is gone: the
        # second waits here, as it would end the process before the first has said why.
        ENDING.acquire()
        # The first to fail knows why. The others follow, and their errors would only bury its.
        try:
            if self.store.add("failed", 1) == 1:
                print(f"train.py: {line}", file=sys.stderr, flush=True)
            sys.stdout.flush()
        finally:
            os._exit(code)


def is_first():
    """Whether this process is the one that speaks, of those that torchrun started, if it did."""
    return os.environ.get("RANK", "0") == "0"


def alive(pid):
    try:
        os.kill(pid, 0)
        # A dead process that nobody has asked after yet is a zombie, Z.
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except OSError:  # it is another user's, or there is no /proc
        return True


@contextmanager
def join(device):
    """Join the others that torchrun started, if it did, until the block ends."""
    world, on_gpu = int(os.environ.get("WORLD_SIZE", 1)), device.startswith("cuda")
    if world == 1 and not on_gpu:
        yield Processes()
        return

    if world == 1:  # fully_shard wants a group also where there is one process
        store, rank = dist.HashStore(), 0
    else:
        store, rank, world = next(dist.rendezvous("env://"))
        if on_gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=world)
    background = dist.new_group(backend="gloo")

    places = [None] * world
    dist.all_gather_object(places, (socket.gethostname(), os.getpid()), background)
    my_host, _ = places[rank]
    here = {other: pid for other, (host, pid) in enumerate(places)
            if host == my_host and other != rank}
    mesh = init_device_mesh("cuda" if on_gpu else "cpu", (world,))
    us = Processes(rank, world, mesh, background, store, here)

    try:
        yield us
    except BaseException as error:
        # Leave at once. NCCL's good order would be to wait for the others, who wait for us.
        if world > 1:
            if not isinstance(error, (ValueError, FloatingPointError, OSError)):
                traceback.print_exc()
            us.fail(" ".join(str(error).split()) or type(error).__name__, 2)
        dist.destroy_process_group()
        raise
    dist.barrier(background)  # all leave together
    dist.destroy_process_group()


# ---------------------------------------------------------------- the model among them

def make_model(make, config, tensors, args, processes=Processes(), stays="nothing"):
    """
    make(config), the model to train, in fp32; each process has its rows. tensors: as weights.fill
    takes them; None leaves the model unset, for a checkpoint to fill. stays: cost.Plan's.
    """
    # Shapes without storage: no process ever holds all of a large model.
    with torch.device("meta"):
        model = make(config)
    spread(model, processes, stays)
    if tensors is None:
        model.to_empty(device=args.device)
    else:
        weights.fill(model, tensors, args.init, torch.float32, args.device)
    return model


def spread(model, processes, stays="nothing"):
    """
    Each process keeps its rows of every parameter of the model, which may be on the meta device
    still. bf16 where there are GPUs. stays: cost.Plan's; see before_part.
    """
    if processes.mesh is None:
        return model
    on_gpu = processes.mesh.device_type == "cuda"
    precision = MixedPrecisionPolicy()
    if on_gpu:  # inputs as they are: token weights and RoPE's angles stay fp32
        precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)

    # Where gradients travel for each part of a batch, on one machine, they do so in bf16. Where
    # they stay until the last part, they are sums in fp32 by then, and travel as such.
    one_machine = processes.world == 1 + len(processes.here)
    halves = on_gpu and processes.world > 1 and one_machine and stays != "all"
    for module in *model.layers, model:
        drops = stays == "nothing" and module is not model
        fully_shard(module, mesh=processes.mesh, mp_policy=precision, reshard_after_forward=drops)
        if halves:
            module.set_custom_reduce_scatter(SumAtOwner())
    for method in "loss", "score":  # they gather parameters as forward does
        register_fsdp_forward_method(model, method)
    return model


class SumAtOwner:
    """
    fully_shard's sum of gradients with half its bytes. NCCL's reduce-scatter adds up on the way, so
    what it sums in fp32 must travel in fp32. Here each process sends its bf16 rows to their owners,
    who add them up in fp32: the same numbers, but for the order of a sum. (Between machines adding
    up on the way is less: a sum leaves each, not eight summands.)
    """

    sends = False

    def allocate(self, size, *, dtype, device):
        """Called for what is sent, then for its sum, in dtype."""
        self.sends = not self.sends
        return torch.empty(size, dtype=torch.bfloat16 if self.sends else dtype, device=device)

    def __call__(
        self,
        output_tensor,   # (n,)          this process's rows of all parameters of a layer, fp32
        input_tensor,    # (world * n,)  those of every process, as made here, bf16
        group, op,       # op: fully_shard wants the mean
        async_op=False,
    ):
        assert op == dist.ReduceOp.AVG, f"{op}: the mean is what is computed here"
        of_all = torch.empty_like(input_tensor)
        dist.all_to_all_single(of_all, input_tensor, group=group)
        torch.mean(of_all.view(group.size(), -1), 0, dtype=output_tensor.dtype, out=output_tensor)


def recompute_and_compile(model, recompute=0, compiled=False):
    """
    recompute: of the first so many layers backward computes the activations anew, from their input.
    compiled: each layer by torch.compile, which fuses what surrounds products and attention.
    """
    # Both wrap a layer's forward, so that the hooks of fully_shard stay outside.
    for number, layer in enumerate(model.layers):
        if compiled:  # few shapes, each worth kernels of its own
            layer.forward = torch.compile(layer.forward, dynamic=False)
        if number < recompute:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False,
                                    preserve_rng_state=False)
    return model


# ---------------------------------------------------------------- one pass of a training step

class Loss(torch.nn.Module):
    """The model's loss of one pass as a module: what make_graphed_callables takes."""

    def __init__(self, model, method, autocast, compiled):
        super().__init__()
        self.model, self.method = model, method
        self.autocast, self.compiled = autocast, compiled

    def forward(self, tokens, weight):
        with self.autocast:
            return self.model.loss(tokens, weight, self.method, self.compiled)


def graphed(losses, args):
    """
    The same losses, whose forward and backward are a CUDA graph each: two launches instead of
    hundreds, for which a small model's GPU would wait. For batches that are not split: the next
    replay writes where this one's gradients are.
    """
    # Graphs of an earlier run in this process hold each other, and much memory.
    gc.collect()
    torch.cuda.empty_cache()
    pool = torch.cuda.graph_pool_handle()
    shape = args.batch, args.context_len + 1
    sample = (torch.zeros(shape, dtype=torch.long, device=args.device),
              torch.ones(shape, device=args.device))
    # Each runs three times before it is recorded, as PyTorch advises, and all do so before the
    # first is: what a graph holds is taken over by the next one, but not by what runs meanwhile.
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for loss, _ in product(losses, range(3)):
            torch.autograd.grad(loss(*sample), [*loss.parameters()])
    return [torch.cuda.make_graphed_callables(loss, sample, num_warmup_iters=0, pool=pool)
            for loss in losses]


def one_pass(loss_of, model, optimizer, parts, weight_sum, processes, stays, clip, share=1.0):
    """
    A batch's forward and backward, and one update. parts: (tokens, weight) of this process, one
    after the other; weight_sum: of the whole batch; stays: cost.Plan's; share: what the gradient is
    multiplied by. -> this process's share of the loss; the gradient's norm; both on the device. If
    no token counts both are 0/0, and update does nothing.
    """
    loss = 0.0
    for number, (tokens, weight) in enumerate(parts, start=1):
        before_part(model, last=number == len(parts), stays=stays)
        # Each part is divided by the weights of the whole batch: a mean of the parts' own means
        # would let a token count more where fewer answers are.
        of_part = loss_of(tokens, weight) / weight_sum
        # fully_shard averages gradients over the processes, and we want their sum.
        (of_part * (share * processes.world)).backward()
        loss += of_part.detach()
    norm = gradient_norm(model)
    update(optimizer, norm, clip)
    return loss, norm


def before_part(model, last, stays):
    """
    To be called before each part of a batch. stays, until the last part, on each GPU:
        "all"       the weights in bf16 and the gradients of all rows in fp32, which travel once
        "weights"   they alone; gradients are summed for each part
        "nothing"   weights are gathered for each part's forward and again for its backward
    """
    if hasattr(model, "set_requires_gradient_sync"):  # by fully_shard
        model.set_requires_gradient_sync(last or stays != "all")
        model.set_reshard_after_backward(last or stays == "nothing")


def gradient_norm(model):
    """Over all parameters and processes, on the device."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def update(optimizer, norm, clip):
    """
    A step on gradients divided by max(1, norm / clip), so that their norm is at most clip; and
    nothing at all if norm is not finite.
    """
    # The fused optimizer can do both, for the sake of mixed precision's scaling, and on the device:
    # nobody waits for the norm.
    assert getattr(optimizer, "_step_supports_amp_scaling", False), (
        f"{type(optimizer).__name__} would neither clip nor skip: do both here")
    optimizer.grad_scale = (norm / clip).clamp_min(1)
    optimizer.found_inf = (~norm.isfinite()).float()
    optimizer.step()
    optimizer.zero_grad()


# ---------------------------------------------------------------- to be stopped, or lost

class Stop:
    """
    Ctrl-C, the signal to terminate, and a file out/NAME/stop become a wish, which the loop asks for
    after each step, so that it ends with a checkpoint.

    torchrun also sends that signal when one of the processes is lost. Then the others wait for it
    for ever, inside of a call where Python hears nothing. So it is a thread that listens; if a
    process is gone, it says so and ends this one. (torchrun kills what has not ended 30 seconds
    after its own signal. A step may take longer: then the file is the way.)
    """

    def __init__(self, processes, run):
        self.processes, self.file = processes, run / "stop"
        self.wished = self.over = False

    def __enter__(self):
        if self.processes.rank == 0:
            self.file.unlink(missing_ok=True)
        self.ours, self.theirs = socket.socketpair()
        self.theirs.setblocking(False)
        self.handlers = {}
        if threading.current_thread() is threading.main_thread():
            # Python writes each signal's number into the socket, wherever it is stuck itself. The
            # handlers are there so that it does not end the process instead.
            self.before = signal.set_wakeup_fd(self.theirs.fileno(), warn_on_full_buffer=False)
            self.handlers = {number: signal.signal(number, lambda *_: None)
                             for number in (signal.SIGINT, signal.SIGTERM)}
        elif self.processes.rank == 0:
            print(f"note: only a program's main thread hears signals, and this is another: "
                  f"make a file {self.file} to stop", file=sys.stderr)
        self.thread = threading.Thread(target=self.listen, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, kind, *_):
        if kind and issubclass(kind, RuntimeError):  # what gloo raises when nobody answers
            self.end_if_alone()
        self.over = True
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.handlers:
            signal.set_wakeup_fd(self.before)
        # The thread reads the end, and leaves. A child may hold a copy of the socket, so that
        # closing ours would be no end.
        self.theirs.shutdown(socket.SHUT_WR)
        self.theirs.close()
        # It must leave before us. Were it the last to hold a process group, it would take that
        # apart while Python ends, which aborts.
        self.thread.join()

    def asked(self):
        """Whether this process is wished to stop; the first one hears of the file for all."""
        return self.wished or (self.processes.rank == 0 and self.file.exists())

    def listen(self):
        while number := self.ours.recv(1):  # of any signal that Python handles, as a byte
            if ord(number) in self.handlers:
                if not self.wished and self.processes.rank == 0:
                    print("note: stops after this step", file=sys.stderr, flush=True)
                self.wished = True
                self.end_if_alone()
        self.ours.close()

    def end_if_alone(self):
        time.sleep(0.5)  # the other's end may still be on the way
        gone = self.processes.gone()
        if gone and not self.over:  # once all is done, they may go
            ranks = ", ".join(map(str, gone))
            self.processes.fail(
                f"process {ranks} is gone, killed by someone or for want of memory: the last "
                "checkpoint is whole, go on with the same command and --resume", 1)
