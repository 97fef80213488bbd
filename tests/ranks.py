"""
Two processes that train together, as torchrun starts them, but without its ten seconds: forked from
one that has imported everything. As with torchrun the store lives outside of them, and when one
fails the other gets SIGTERM. A few tests take torchrun itself, lest it does otherwise.

    on_two(function, flag, ..., folder=..., NAME="of the environment") -> returncode, stdout, stderr
    by_torchrun(...)                                                   the same

Both call function(), which is a module's, in a folder, with these flags as sys.argv.
"""
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

TESTS = Path(__file__).resolve().parent
PATHS = [str(TESTS.parent), str(TESTS)]


def call_of(function):
    return f"import {function.__module__} as module\nmodule.{function.__name__}()"


def on_two(function, *flags, folder, **env):
    process = helper()
    print(json.dumps([call_of(function), flags, str(folder), env]), file=process.stdin, flush=True)
    return SimpleNamespace(**json.loads(process.stdout.readline()))


def by_torchrun(function, *flags, folder, **env):
    script = Path(folder, "script.py")
    script.write_text(f"import sys\nsys.path[:0] = {PATHS}\n{call_of(function)}")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.run([*command, str(script), *flags], capture_output=True, text=True,
                          cwd=folder, timeout=600, env=os.environ | {"OMP_NUM_THREADS": "1"} | env)


@functools.cache
def helper():
    """The process that forks. It ends with the tests, as its input does."""
    return subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"})


def one(rank, port, code, flags, folder, env):
    """The code, as one of two processes; never returns."""
    os.chdir(folder)
    for handle, name in (1, "out"), (2, "err"):
        os.dup2(os.open(f".{name}{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), handle)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                   "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                   "TORCHELASTIC_USE_AGENT_STORE": "True", **env}
    sys.argv, status = ["script.py", *flags], 0
    try:
        exec(code)
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(status)


def two(code, flags, folder, env):
    import torch.distributed as dist
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    running = set()
    for rank in 0, 1:
        running.add(child := os.fork())
        if not child:
            one(rank, port, code, flags, folder, env)
    # Only now, as a fork takes no threads along. The two wait for it.
    store = dist.TCPStore("127.0.0.1", port, 2, is_master=True, wait_for_workers=False)
    child, status = os.wait()
    codes, (other,) = [os.waitstatus_to_exitcode(status)], running - {child}
    if codes[0]:  # the signal to end, and half a minute later kill -9
        os.kill(other, signal.SIGTERM)
        signal.signal(signal.SIGALRM, lambda *_: os.kill(other, signal.SIGKILL))
        signal.alarm(30)
    codes.append(os.waitstatus_to_exitcode(os.wait()[1]))
    signal.alarm(0)
    del store
    said = {what: "".join(Path(folder, f".{what[3:]}{rank}").read_text() for rank in (0, 1))
            for what in ("stdout", "stderr")}
    return {"returncode": codes[0] or codes[1], **said}


def main():
    """Imports what the two need, but starts no thread that a fork would lose."""
    sys.path[:0] = PATHS
    import test_bench_train, test_checkpoint, test_parallel, test_train  # noqa: E401, F401
    for line in sys.stdin:
        print(json.dumps(two(*json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
