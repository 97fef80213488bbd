"""
How a reader takes a file that may be hostile: each is read in a process of its own, which says how
that ended.

    loaded     what was read, as JSON
    refused    by one of the errors that every script turns into its one line
    defect     anything else: a traceback, a hang, a crash, code that was run, memory beyond twice
               the files

And how a script of ours ends that is killed in the middle. Started once (Judge), it imports
everything and then forks for each file or script, so that a verdict takes some hundredths of a
second. test_hostile.py makes the files, test_faults.py kills.
"""
import hashlib
import importlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import asdict
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import niah  # noqa: E402
import train  # noqa: E402
from data import Shards, get_tokenizer  # noqa: E402
from infra import answers, checkpoint, files, parallel, runlog  # noqa: E402
from infra.tokenizers import ByteTokenizer  # noqa: E402
from model import Transformer  # noqa: E402

SECONDS = 120    # then it hangs, however busy the machine is
SPACE = 2 << 30  # of addresses: whoever wants more fails at once
# What a reader takes for itself, and for JSON as Python's objects, beside twice the files.
OWN_MEMORY = 48 << 20
TEXT = "Hello  world: 1234 times é 漢字\n\n"  # for tokenizers


class Judge:
    """The process that reads, as seen by a test."""

    def __init__(self):
        # without GPUs: CUDA, once asked for, fails in a process that was forked
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})

    def __call__(self, reader, path):
        """-> {"loaded" or "refused" or "defect": what}"""
        return self.ask(reader, str(path))

    def run(self, script, *flags, folder, kill_after=None, signal=signal.SIGKILL):
        """
        `python SCRIPT.py FLAGS` in the folder, sent the signal after so many seconds. -> its exit
        status (-9 if it was killed), what it printed, seconds
        """
        return self.ask("run", str(folder), script, *map(str, flags), kill_after, int(signal))

    def ask(self, *words):
        print(json.dumps(words), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()


# ---------------------------------------------------------------- readers: path -> what was read

def digest(tensors):
    """{name: tensor} -> {name: [dtype, shape, a hash of its bytes]}"""
    def of(t):
        of_bytes = hashlib.sha256(t.contiguous().view(-1).view(torch.uint8).numpy())
        return [str(t.dtype), list(t.shape), of_bytes.hexdigest()[:16]]
    return {name: of(tensor) for name, tensor in tensors.items()}


def read_model(path):
    model = Transformer.from_pretrained(path)
    return asdict(model.config), digest(model.state_dict())


def read_tokenizer(path):
    tokenizer = get_tokenizer(path)
    ids = tokenizer.encode(TEXT)
    return ids, tokenizer.decode(ids) == TEXT, tokenizer.eos_id


def read_shards(path):
    splits = [Shards(path, 16, seed=0, split=split) for split in ("train", "val")]
    tokens = [shards.sample(i).tolist() for shards in splits for i in range(len(shards))]
    return splits[0].tokenizer, hashlib.sha256(repr(tokens).encode()).hexdigest()[:16]


def read_ruler(path):
    return [[e.index, e.prompt, e.answers, e.spans] for e in niah.read_jsonl(path, ByteTokenizer())]


def read_checkpoint(path):
    """As train.py --resume does. path: the run."""
    flags = (path / "flags").read_text().split()
    args = train.parse(["--preset=pico", "--device=cpu", f"--out={path.parent}",
                        f"--name={path.name}", "--resume", *flags])
    folder = runlog.newest(path, resume=True)
    config, tensors = train.what_to_train(args, folder)
    train.settle(args, config)
    step, before = runlog.step_of(folder, path, args), runlog.begun(args, folder)
    model = parallel.make_model(Transformer, config, tensors, args)
    optimizer = train.make_optimizer(model, args)
    checkpoint.load(folder, model, optimizer, parallel.Processes())
    return step, before["seconds"], asdict(config), digest(checkpoint.state_of(model, optimizer))


def read_answers(path):
    return [[list(key), i, list(line)] for key, lines in answers.read_lines(path).items()
            for i, line in lines.items()]


READERS = {"model": read_model, "tokenizer": read_tokenizer, "shards": read_shards,
           "ruler": read_ruler, "checkpoint": read_checkpoint, "answers": read_answers}


# ---------------------------------------------------------------- one file

def memory(field):
    """VmRSS (resident now), VmHWM (at most so far) or VmSize (addresses), in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


# What no reader does.
CODE = {"os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.remove", "os.rename",
        "subprocess.Popen", "socket.connect", "socket.bind", "pty.spawn"}


def no_code(event, args):
    """An audit hook."""
    if event in CODE:
        os.write(1, json.dumps({"defect": f"code was run: {event} {args}"[:300]}).encode())
        os._exit(0)


def read(reader, path):
    """-> the verdict, in the forked process."""
    there = path.rglob("*") if path.is_dir() else [path]
    size = sum(file.stat().st_size for file in there if file.is_file())
    resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + SPACE,) * 2)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts from here
    before = memory("VmRSS")
    sys.addaudithook(no_code)
    try:
        verdict = {"loaded": READERS[reader](path)}
    except (ValueError, OSError, ImportError) as error:
        verdict = {"refused": str(error)}
    except BaseException as error:
        where = " ".join(f"{Path(frame.filename).name}:{frame.lineno}"
                         for frame in traceback.extract_tb(error.__traceback__)[-5:])
        return {"defect": f"{type(error).__name__}: {error}"[:200] + f" at {where}"}
    took = memory("VmHWM") - before
    if took < 2 * size + OWN_MEMORY:
        return verdict
    return {"defect": f"{took:,} bytes of memory for files of {size:,}: {str(verdict)[:300]}"}


def in_a_process_of_its_own(reader, path):
    theirs, ours = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(ours, 1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        signal.alarm(SECONDS)
        verdict = json.dumps(read(reader, path)).encode()
        while verdict:
            verdict = verdict[os.write(1, verdict):]
        os._exit(0)
    os.close(ours)
    with open(theirs, "rb") as pipe:
        verdict = pipe.read()
    _, status = os.waitpid(child, 0)
    if status:
        number = os.waitstatus_to_exitcode(status)
        how = "it hangs" if number == -signal.SIGALRM else f"it ended with {number}"
        verdict = json.dumps({"defect": how}).encode()
    return verdict


# ---------------------------------------------------------------- one script

def no_network(event, args):
    asks = event in ("socket.getaddrinfo", "socket.gethostbyname", "urllib.Request")
    if asks or (event == "socket.connect" and not isinstance(args[1], (str, bytes))):
        print(f"network: {event} {args}", flush=True)
        os._exit(99)


def run(folder, script, flags, kill_after, number):
    started, said = time.time(), tempfile.TemporaryFile("w+b")
    child = os.fork()
    if not child:
        os.setsid()
        for handle in 1, 2:
            os.dup2(said.fileno(), handle)
        os.chdir(folder)
        sys.addaudithook(no_network)
        sys.argv, sys.stdin = [f"{script}.py", *flags], open(os.devnull)
        random.seed()
        code = 0
        try:
            files.told_to_end()
            importlib.import_module(script).main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, number)
    _, status = os.waitpid(child, 0)
    said.seek(0)
    code, text = os.waitstatus_to_exitcode(status), said.read().decode(errors="replace")
    return code, text, time.time() - started


def main():
    torch.set_num_threads(1)
    for line in sys.stdin:
        what, path, *rest = json.loads(line)
        if what == "run":
            script, *flags, kill_after, number = rest
            answer = json.dumps(run(path, script, flags, kill_after, number)).encode()
        else:
            answer = in_a_process_of_its_own(what, Path(path))
        sys.stdout.buffer.write(answer + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
