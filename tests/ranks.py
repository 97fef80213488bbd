"""
Two processes that train together, as torchrun starts them, but without its ten seconds: forked from
one process that has imported everything. As with torchrun the store lives outside of them, and when
one fails the other gets SIGTERM. A few tests take torchrun itself, lest it does otherwise.

    on_two(code, flag, ..., folder=..., NAME="of the environment") -> returncode, stdout, stderr
    by_torchrun(...)                                               the same
"""
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

TESTS = Path(__file__).resolve().parent
PATHS = [str(TESTS.parent), str(TESTS)]


def on_two(code, *flags, folder, **env):
    """Run Python code as both of two processes, in a folder, with these flags as sys.argv."""
    process = helper()
    print(json.dumps([code, flags, str(folder), env]), file=process.stdin, flush=True)
    return SimpleNamespace(**json.loads(process.stdout.readline()))


def by_torchrun(code, *flags, folder, **env):
    """The same, but really by torchrun."""
    script = Path(folder, "script.py")
    script.write_text(f"import sys; sys.path[:0] = {PATHS}\nimport torch\n"
                      f"torch.set_num_threads(1)\n{code}")
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
    for handle, name in (1, "out"), (2, "err"):
        os.dup2(os.open(f"{folder}/.{name}{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), handle)
    os.chdir(folder)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                   "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                   "TORCHELASTIC_USE_AGENT_STORE": "True", **env}
    sys.argv, status = ["script.py", *flags], 0
    try:
        exec(compile(code, "script.py", "exec"), {"__name__": "__main__"})
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
    running = {}
    for rank in 0, 1:
        running[child := os.fork()] = rank
        if not child:
            one(rank, port, code, flags, folder, env)
    # Only now, as a fork takes no threads along. The two wait for it.
    store = dist.TCPStore("127.0.0.1", port, 2, is_master=True, wait_for_workers=False)
    codes, failed = [], None
    while running:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            del running[child]
            codes.append(os.waitstatus_to_exitcode(status))
            if codes[-1] and failed is None:
                failed = time.time()
                for other in running:
                    os.kill(other, signal.SIGTERM)
        elif failed and time.time() - failed > 30:
            for other in running:
                os.kill(other, signal.SIGKILL)
        time.sleep(0.01)
    del store
    said = {what: "".join(Path(folder, f".{short}{rank}").read_text() for rank in (0, 1))
            for what, short in (("stdout", "out"), ("stderr", "err"))}
    return {"returncode": next(filter(None, codes), 0), **said}


def main():
    """Imports what the two need, but starts no thread that a fork would lose."""
    sys.path[:0] = PATHS
    import torch
    torch.set_num_threads(1)
    import test_bench_train, test_checkpoint, test_parallel, test_train  # noqa: E401, F401
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        print(json.dumps(two(*json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
