"""
Trainings that belong together, each in a process of its own on one of the GPUs, and not made again
once they are there.

    stages        the flags of train.py for a run's two stages: pretraining, then fine-tuning
    finished      has a run seen all its steps, by the flags that it would be given now?
    on_all_gpus   runs our scripts on all visible GPUs, some at a time on each; the first failure
                  ends all
    turn          waits until no other one does what takes much of a GPU's memory

Each run's result is a file NAME-SEED.json, and a table is made of all that are there. They must
have been asked the same prompts: prompts_of tells those of a model that is not made yet. reproduce,
ablations and gate_start are made of these. Checked in tests/test_runs.py.
"""
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from queue import Queue

import torch

import eval_niah
import niah
import train
from data import tokenizer_of
from infra import files, runlog
from infra.cli import ROOT
from infra.files import fcntl
from model import PRESETS

# flags of train.py that an experiment gives each run itself
OURS = ("--recipe", "--preset", "--init", "--memory", "--seed", "--name", "--out", "--gate_start")


# ---------------------------------------------------------------- one run

def passed_on(words, ours=OURS):
    """
    A user's flags of train.py, for all runs of an experiment. ValueError for one that the
    experiment sets.
    """
    for word in words:
        if word.split("=")[0] in ours:
            raise ValueError(f"{word}: not here, where every run is given its own")
    return words


def stages(run, pretraining, seed, more):
    """
    {folder: flags of train.py}: pretraining with these flags, then fine-tuning of what that made,
    into `run`. more: a user's flags for both, though fine-tuning has neither ARL nor a joint pass.
    """
    first = run.with_name(f"{run.name}-pretrained")
    both = [*passed_on(more), f"--seed={seed}"]

    def into(folder):
        return [f"--out={folder.parent}", f"--name={folder.name}", "--resume"]
    return {first: [*pretraining, *both, *into(first)],
            run: ["--recipe=micro-sft", *both, f"--init={first}", "--arl=0", "--joint=0",
                  *into(run)]}


def finished(run, flags):
    """
    Whether the run has seen all its steps. ValueError if other flags made it, or another model than
    --init now is, by its train.json; a model that has none is known by its path alone.
    """
    settings, checkpoint = train.parse(flags), runlog.newest(run, resume=True)
    if checkpoint is None:
        return False
    steps = runlog.step_of(checkpoint, run, settings)
    if settings.init:
        now = runlog.begun(settings, None)["from"]
        if now != runlog.begun(settings, checkpoint)["from"]:
            raise ValueError(f"{run} did not start from {settings.init} as it is now: move {run} "
                             "away")
    return steps == settings.steps


# ---------------------------------------------------------------- all runs

def on_all_gpus(jobs, per_gpu=1):
    """
    Run jobs on all visible GPUs, or without any on the CPU, `per_gpu` at a time on each. The first
    failure ends all, and so does ctrl-C or kill.

    A job is a function of call, by which it runs scripts of ours on its GPU:
    call(["train.py", flag, ...], log) waits until the script has ended, its output in the file log.
    ValueError, which names the log, if it ended badly.
    """
    gpus, running, failures, over = Queue(), set(), [], threading.Event()
    every = range(torch.cuda.device_count())
    visible = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, every))).split(",")
    for gpu in (visible if torch.cuda.is_available() else [None]) * per_gpu:
        gpus.put(gpu)

    # a script in a folder finds what lies at the top
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path}

    def on_a_gpu(job):
        gpu = gpus.get()
        mine = environment if gpu is None else environment | {"CUDA_VISIBLE_DEVICES": gpu}

        def call(words, log):
            if over.is_set():
                raise ValueError("another job has failed")
            started, script, name = time.time(), words[0], log.stem
            print(f"{name}: python {shlex.join(words)}", flush=True)
            log.parent.mkdir(parents=True, exist_ok=True)
            with open(log, "a") as file:
                process = subprocess.Popen([sys.executable, ROOT / script, *words[1:]],
                                           stdout=file, stderr=file, env=mine)
            running.add(process)
            if over.is_set():  # between the look above and now
                process.terminate()
            code = process.wait()
            running.discard(process)
            if code:
                said = log.read_text().strip().splitlines() or ["nothing"]
                raise ValueError(f"{name}: {script} ended with code {code}, its last words: "
                                 f"{said[-1]}. All are in {log}; what is finished is kept")
            print(f"{name}: {script} took {(time.time() - started) / 60:.1f} min", flush=True)

        try:
            if not over.is_set():
                job(call)
        except BaseException as error:
            failures.append(error)
            over.set()
            raise
        finally:
            gpus.put(gpu)

    kill = signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as ctrl-C does
    try:
        with ThreadPoolExecutor(gpus.qsize()) as pool:
            try:
                wait([pool.submit(on_a_gpu, job) for job in jobs], return_when=FIRST_EXCEPTION)
                if failures:
                    raise failures[0]
            except BaseException:
                signal.signal(signal.SIGTERM, lambda *_: None)  # once is enough
                over.set()
                pool.shutdown(wait=False, cancel_futures=True)
                # training ends after its step, with a checkpoint to go on from
                for process in list(running):
                    process.terminate()
                raise
    finally:
        signal.signal(signal.SIGTERM, kill)


@contextmanager
def turn(device, last=False):
    """
    Wait until no other process of this user is within on this GPU, or on the CPU: device "cuda" or
    "cpu". With `last`, wait also until nobody waits without it. Who dies has left.
    """
    if fcntl is None:  # Windows, where nobody waits
        yield
        return
    gpu = "" if device == "cpu" else os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    name = f"nanorat-{os.getuid()}-{device}{gpu}".replace("/", "-")
    file, opened = Path(tempfile.gettempdir(), name), os.O_RDWR | os.O_CREAT
    with files.lock_handle(file, opened) as within, \
            files.lock_handle(f"{file}-first", opened) as waiting:
        if not last:
            fcntl.flock(waiting, fcntl.LOCK_SH)
        fcntl.flock(within, fcntl.LOCK_EX)
        while last and not is_free(waiting):
            fcntl.flock(within, fcntl.LOCK_UN)
            time.sleep(0.2)
            fcntl.flock(within, fcntl.LOCK_EX)
        fcntl.flock(waiting, fcntl.LOCK_UN)
        yield


def is_free(handle):
    """Whether no other holds a lock on this file; if so, it is ours."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


# ---------------------------------------------------------------- results

def result_files(folder, names):
    """(name, seed, file) of each NAME-SEED.json that is there, in the order of names."""
    for name in names:
        for file in sorted(Path(folder).glob(f"{name}-*.json")):
            seed = file.stem.removeprefix(f"{name}-")
            if seed.isdigit():
                yield name, int(seed), file


def prompts_of(settings, samples, seed):
    """
    {task: niah.prompt_hash} of what eval_niah.py will ask a model that train.py makes by these
    settings.
    """
    tokenizer = tokenizer_of(None, PRESETS["micro"].vocab_size, settings.tokenizer)
    asked = eval_niah.flags().parse_args([
        f"--samples={samples}", f"--seed={seed}", f"--context_len={settings.context_len}",
        f"--protocol={settings.protocol}"])
    asked.max_new_tokens = niah.default_new_tokens(asked.context_len, tokenizer)
    tasks = settings.tasks or niah.fitting_tasks(asked.context_len, tokenizer, asked.protocol,
                                                 asked.max_new_tokens)
    examples = eval_niah.make_examples(asked, tokenizer, tasks)
    return {task: niah.prompt_hash(of_task) for task, of_task in examples.items()}


def refuse_other_prompts(results, prompts):
    """ValueError if results that will stay, {file: {task: hash}}, were not asked these prompts."""
    for file, theirs in results.items():
        if theirs != prompts:
            raise ValueError(f"{file} was asked other prompts than these runs would be (samples, "
                             "seed, tasks, the words that keys are made of, or Python's help "
                             "pages): move it away, or choose another --results")
