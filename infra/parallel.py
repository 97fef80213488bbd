"""
One model on one GPU, on many, on many nodes: the same script, started by python or by torchrun.

    a parameter    fp32 on the GPU that keeps its rows, 1/world of them: what the optimizer changes (fully_shard, FSDP2)
    a layer        gathers its parameters in bf16 just before it computes, and drops them, or keeps them where there is room
                   (cost.Plan.stays); the next layer's come meanwhile
    a gradient     bf16 where it is made, summed in fp32, over parts of a batch and over GPUs, kept by the owner of the rows
    activations    kept for backward, or computed anew from a layer's input (checkpointing), for as many layers as must be

So numbers do not depend on how many GPUs there are, but for the order of sums. On a CPU all is fp32. A model so small that
launches cost more than arithmetic takes another way on one GPU: train.py records its passes as CUDA graphs, in bf16 by
autocast, with norms and residuals in fp32; on several it is spread like any other, and its numbers are a little coarser.
cost.py predicts the memory all this takes. Checked with two gloo processes in tests/test_parallel.py. Another parallelism,
of tensors say, belongs into spread, with a mesh of its own dimension. Read checkpoint.py next.
"""
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

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.utils.checkpoint import checkpoint

# else the memory of a GPU that is nearly full falls into pieces. Read when the first tensor is made there
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ and torch.cuda.is_available():  # the older name, the one that counts before torch 2.11
    newer = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)
    os.environ.setdefault("PYTORCH_ALLOC_CONF" if newer else "PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


@dataclass
class Processes:
    """Those that train together; each has one GPU, or a share of the CPU."""
    rank: int = 0
    world: int = 1
    mesh: DeviceMesh | None = None               # None: nothing is spread, by one process on a CPU or with a small model
    background: dist.ProcessGroup | None = None  # talks over the CPU, beside what the GPUs say to each other: for checkpoints
    store: dist.Store | None = None              # outlives each of them, if torchrun keeps it
    here: dict = field(default_factory=dict)     # {rank: pid} of the others on this machine

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
        """End this process, as one of several, with a line for all of them: the first to fail knows why, the others follow."""
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
        with open(f"/proc/{pid}/stat") as file:  # a dead one that nobody has asked after yet is a zombie, Z
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except OSError:  # another user's, or no /proc
        return True


@contextmanager
def join(device):
    """Join the others that torchrun started, if it did, until the block ends."""
    world, on_gpu = int(os.environ.get("WORLD_SIZE", 1)), device.startswith("cuda")
    if world == 1 and not on_gpu:
        yield Processes()
        return
    if world == 1:
        store, rank = dist.HashStore(), 0
    else:
        store, rank, world = next(dist.rendezvous("env://"))
        if on_gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=world)
    background = dist.new_group(backend="gloo")
    all_of_us = [None] * world
    dist.all_gather_object(all_of_us, (socket.gethostname(), os.getpid()), background)
    here = {other: pid for other, (host, pid) in enumerate(all_of_us) if host == all_of_us[rank][0] and other != rank}
    us = Processes(rank, world, init_device_mesh("cuda" if on_gpu else "cpu", (world,)), background, store, here)
    try:
        yield us
    except BaseException as error:
        if world > 1:  # leave at once: NCCL's good order would be to wait for the others, who wait for us
            if not isinstance(error, (ValueError, FloatingPointError, OSError)):
                traceback.print_exc()
            us.fail(" ".join(str(error).split()) or type(error).__name__, 2)
        dist.destroy_process_group()
        raise
    dist.barrier(background)  # all leave together
    dist.destroy_process_group()


# ---------------------------------------------------------------- the model

def spread(model, processes, stays="nothing"):
    """
    Each process keeps its rows of every parameter of the model, which may be on the meta device still. bf16 where there are
    GPUs. Transformer.loss and score gather parameters as forward does. stays: cost.Plan's; see before_part.
    """
    if processes.mesh is None:
        return model
    on_gpu, one_machine = processes.mesh.device_type == "cuda", processes.world == 1 + len(processes.here)
    # inputs as they are: token weights and RoPE's angles stay fp32
    precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False) if on_gpu else MixedPrecisionPolicy()
    for module in *model.layers, model:
        fully_shard(module, mesh=processes.mesh, mp_policy=precision, reshard_after_forward=stays == "nothing" and module is not model)
        if on_gpu and processes.world > 1 and one_machine and stays != "all":  # else they travel in fp32, added up over parts
            module.set_custom_reduce_scatter(SumAtOwner())
    for method in "loss", "score":
        register_fsdp_forward_method(model, method)
    return model


class SumAtOwner:
    """
    fully_shard's sum of gradients with half its bytes. NCCL's reduce-scatter adds up on the way, so what it sums in fp32 must
    travel in fp32. Here each process sends its bf16 rows to their owners, who add them up in fp32: the same numbers, but for
    the order of a sum. (Between machines adding up on the way is less: a sum leaves each, not eight summands.)
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
    recompute: of the first so many layers backward computes the activations anew, from their input. compiled: each layer by
    torch.compile, which fuses what surrounds products and attention. Hooks of fully_shard stay outside of both.
    """
    for number, layer in enumerate(model.layers):
        if compiled:
            layer.forward = torch.compile(layer.forward, dynamic=False)  # few shapes, each worth kernels of its own
        if number < recompute:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    return model


def before_part(model, last, stays):
    """
    To be called before each part of a batch. stays, until the last part, on each GPU: "all", the weights in bf16 and the gradients
    of all rows in fp32, so that they travel once a batch; "weights" alone, and gradients are summed for each part; or "nothing",
    and weights are gathered for each part's forward and again for its backward.
    """
    if hasattr(model, "set_requires_gradient_sync"):  # by fully_shard
        model.set_requires_gradient_sync(last or stays != "all")
        model.set_reshard_after_backward(last or stays == "nothing")


def gradient_norm(model):
    """Over all parameters and processes, on the device."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


# ---------------------------------------------------------------- a signal to stop, a process that is no more

class Stop:
    """
    Ctrl-C, the signal to terminate, and a file out/NAME/stop become a wish, which the loop asks for after each step, so that it
    ends with a checkpoint.

    torchrun also sends that signal when one of the processes is lost. Then the others wait for it for ever, inside of a call
    where Python hears nothing. So it is a thread that listens; if a process is gone, it says so and ends this one. (torchrun
    kills what has not ended 30 seconds after its own signal. A step may take longer: then the file is the way.)
    """

    def __init__(self, processes, run):
        self.processes, self.file, self.wished, self.over = processes, run / "stop", False, False

    def __enter__(self):
        if self.processes.rank == 0:
            self.file.unlink(missing_ok=True)
        self.ours, self.theirs = socket.socketpair()
        self.theirs.setblocking(False)
        self.handlers = {}
        if threading.current_thread() is threading.main_thread():
            self.before = signal.set_wakeup_fd(self.theirs.fileno(), warn_on_full_buffer=False)
            ends = signal.SIGINT, signal.SIGTERM
            self.handlers = {number: signal.signal(number, lambda *_: None) for number in ends}
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
        self.theirs.shutdown(socket.SHUT_WR)  # the thread reads the end, and leaves. A child may hold a copy, so close is no end
        self.theirs.close()
        # before us: were it the last to hold a process group, it would take that apart while Python ends, which aborts
        self.thread.join()

    def asked(self):
        """Whether this process was told to stop; the first one for all."""
        return self.wished or (self.processes.rank == 0 and self.file.exists())

    def listen(self):
        while number := self.ours.recv(1):  # of any signal that Python handles, as a byte
            if ord(number) in self.handlers:
                self.wished = True
                self.end_if_alone()
        self.ours.close()

    def end_if_alone(self):
        time.sleep(0.5)  # its end may still be on the way
        if (gone := self.processes.gone()) and not self.over:  # once all is done, they may go
            self.processes.fail(f"process {', '.join(map(str, gone))} is gone, killed by someone or for want of memory: the last checkpoint is "
                                "whole, go on with the same command and --resume", 1)
