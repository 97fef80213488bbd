"""
What a run leaves of itself beside its checkpoints' weights, and what others ask of it.

    newest, step_of, begun      may a run go on, and from where?
    record_of                   train.json of a checkpoint: command, commit, device, settings, speed
    training_record,            what made a model, of those who evaluate it or train it on
        trained_with
    SHIPPED, known_models       models that are there without being named
    Log                         log.jsonl, a line per step; watch.py explains its fields, draws them

train.py writes these, experiments/runs.py asks about runs that are there. Checked in
tests/test_train.py and, by hand, tests/test_report.py.
"""
import json
import math
import os
import statistics
import time
from pathlib import Path

import torch

from infra import weights
from infra.cli import ROOT, command_line, device_name
from infra.files import load, whole_or_nothing

SHIPPED = [ROOT / "checkpoints" / name for name in ("attention", "memory")]
PATIENCE = 3  # steps in a row whose loss or gradient is not finite: then the run ends

# flags that --resume may give otherwise
MAY_CHANGE = {"resume", "device", "kernels", "workers", "compile", "device_batch", "recompute",
              "log_every", "eval_every", "save_every", "out", "name"}
# and those that name files, of which what they hold counts
FILES = {"data", "tokenizer", "haystack", "init"}


# ---------------------------------------------------------------- may a run go on?

def newest(run, resume):
    """
    The run's newest checkpoint, None if it has none. ValueError if there is one and it was not
    asked for.
    """
    folder = weights.resolve(run)
    if folder == run:
        return None
    if not resume:
        raise ValueError(f"{run} holds a run already: go on with --resume, choose another --name, "
                         "or move it away")
    return folder


def step_of(folder, run, args, inputs=None):
    """
    How many steps the checkpoint has seen. ValueError if going on with these flags would mix two
    runs. inputs: hashes of what the files hold, as in the record; None: not known, and a file is
    the same if it is in the same place.
    """
    go_back = f"move {folder} away to go on from the one before"
    saved = load(folder / "train.json", "settings", "step", remedy=f"restore it, or {go_back}")
    if "first_sample" not in saved:
        raise ValueError(f"--resume: an older version made {run}, with other samples: move it "
                         "away, or choose another --name")
    if not isinstance(saved["settings"], dict):
        raise ValueError(f"{folder / 'train.json'} is damaged: its settings are no flags; "
                         f"{go_back}")
    for key, value in saved["settings"].items():
        now = vars(args).get(key)
        if key in MAY_CHANGE or now == value or same_file(key, saved, args, inputs or {}):
            continue
        raise ValueError(f"--resume: {run} was started with --{key}={value}, not {now}: give the "
                         "same flags, or another --name")
    return saved["step"]


def same_file(key, saved, args, inputs):
    """
    Whether a flag that is spelled otherwise than in the record `saved` names the same file. See
    step_of.
    """
    then, now = saved["settings"][key], vars(args).get(key)
    if key not in FILES:
        return False
    # What data holds is known by its first sample, also in older runs, which know no other hash.
    if key in inputs and key == "data":
        return inputs[key] == saved["first_sample"]
    if key in inputs and key in saved:
        return inputs[key] == saved[key]
    if not (then and now):
        return False
    if key == "init" and saved.get("from") and saved["from"] == training_record(now):
        return True
    return os.path.realpath(str(then)) == os.path.realpath(now)


def begun(args, folder):
    """
    What a record goes on from: the seconds and the skipped passes of the steps so far, and "from",
    the record of --init if that has one.
    """
    if folder:
        return {"skipped": 0} | load(folder / "train.json")
    source = training_record(args.init) if args.init else None
    return {"seconds": 0.0, "skipped": 0, "from": source}


def record_of(
    args, step, log,
    step_seconds,     # of the steps so far
    processes, commit,
    first_sample,     # data.fingerprint's
    before,           # begun's
    tokenizer=None,   # its name
    haystack=None,    # a hash of the file
):
    """What a checkpoint tells of its making; None where nobody knows."""
    seconds = statistics.median(step_seconds)
    return {"step": step, "settings": vars(args), "command": command_line(None, "train.py"),
            "commit": commit, "device": device_name(args.device), "processes": processes.world,
            "torch": torch.__version__, "seconds": log.seconds(),
            "step_seconds": round(seconds, 5), "tokens_per_second": round(log.tokens / seconds),
            "mfu": log.peak and round(sum(log.of_pass.values()) / seconds / log.peak, 4),
            "skipped": log.skipped, "first_sample": first_sample, "tokenizer": tokenizer,
            "haystack": haystack, "from": before["from"]}


# ---------------------------------------------------------------- models that are there

def training_record(path):
    """What train.py wrote beside the model of its making (record_of), None if there is none."""
    file = weights.resolve(path) / "train.json"
    return load(file, "settings") if file.exists() else None


def trained_with(path):
    """The flags of train.py that made the model, {} if it is not of ours."""
    record = training_record(path)
    return record["settings"] if record else {}


def known_models(folder="out"):
    """
    The two checkpoints that come with the code, and the newest run of train.py if it does the same
    task.
    """
    def task(path):
        settings, flags = weights.read(path, without_tensors=True)[0], trained_with(path)
        return (settings["context_len"], settings["vocab_size"], flags.get("protocol"),
                flags.get("tokenizer"))

    def age(run):
        return (weights.resolve(run) / "train.json").stat().st_mtime

    runs = [run for run in Path(folder).glob("*") if weights.checkpoints(run)]
    # beside models of another task its scores would mean nothing
    latest = [run for run in sorted(runs, key=age)[-1:] if task(run) == task(SHIPPED[0])]
    return [Path(os.path.relpath(path)) for path in SHIPPED] + latest


# ---------------------------------------------------------------- log.jsonl

def field(name, what):
    """
    What a pass's loss, grad_norm or seconds is called in the log: the dense pass's loss is just
    that.
    """
    return what if name == "dense" and what != "seconds" else f"{name}_{what}"


def finite(number):
    """What JSON has no word for is null."""
    return number if math.isfinite(number) else None


class Log:
    """
    log.jsonl, a line per step; watch.py explains its fields. What the device computes in a step is
    not waited for until it has the next one to do.
    """

    def __init__(
        self, run, rank,
        done,     # steps whose lines stay
        of_pass,  # {name: FLOPs of the pass}
        peak,     # FLOPs a second of all GPUs, None if unknown
        tokens,   # of a step
        before,   # begun's
    ):
        self.of_pass, self.peak, self.tokens = of_pass, peak, tokens
        self.skipped, self.in_a_row, self.hopeless = before["skipped"], 0, None
        self.waiting, self.file, self.last = [], None, {}
        self.started = time.time() - before["seconds"]
        if rank:
            return
        # Lines behind the checkpoint's are of steps that are taken again, and a power cut may have
        # torn the last one.
        path, lines = run / "log.jsonl", []
        if done and path.exists():
            lines = path.read_text().splitlines(keepends=True)[:done]
        whole_or_nothing(path, lambda file: file.write_text("".join(lines)))
        self.last = json.loads(lines[-1]) if lines else {}
        self.file = open(path, "a")

    def seconds(self):
        """
        Of training so far, what earlier processes did for the checkpoint that this one goes on from
        included.
        """
        return round(time.time() - self.started, 2)

    def add(
        self, entry,
        numbers,         # on the device: losses of each pass, their norms, how many want to stop
        marks,           # see mark: the start, and the end of each pass
        weight_sum=1.0,  # of the batch
    ):
        entry = entry | {"tokens": entry["step"] * self.tokens, "seconds": self.seconds()}
        self.waiting.append((entry, numbers, marks, weight_sum))

    def tell(self, keep=0):
        """
        Wait for all steps but the newest `keep`. -> their entries, each with its number of skipped
        passes, None if no token of the batch counted; does a process want to stop?
        """
        entries, stops, n = [], 0, len(self.of_pass)
        while len(self.waiting) > keep:
            entry, numbers, marks, weight_sum = self.waiting.pop(0)
            *values, wish = numbers.tolist()  # waits for the device
            stops += wish
            norms = values[n:]
            for name, loss, norm, start, end in zip(self.of_pass, values, norms, marks, marks[1:]):
                entry[field(name, "loss")] = finite(loss)
                entry[field(name, "grad_norm")] = finite(norm)
                entry[field(name, "seconds")] = round(seconds_between(start, end), 5)
            seconds = seconds_between(marks[0], marks[-1])
            entry["tokens_per_second"] = round(self.tokens / seconds)
            if self.peak:
                entry["mfu"] = round(sum(self.of_pass.values()) / seconds / self.peak, 4)

            # A batch of which no token counts has a loss of 0/0, and is no divergence.
            bad = None
            if weight_sum != 0:
                bad = sum(not math.isfinite(norm) for norm in norms)
                self.skipped += bad
                self.in_a_row = self.in_a_row + 1 if bad else 0
                if self.in_a_row == PATIENCE:
                    self.hopeless = entry["step"]
            entries.append((entry | {"skipped": self.skipped}, bad))
        return entries, stops > 0

    def write(self, entry):
        self.last = entry
        try:
            if self.file:
                self.file.write(json.dumps(entry) + "\n")
                self.file.flush()
        except OSError as error:
            raise OSError(f"{self.file.name}: not written ({error.strerror}); the last checkpoint "
                          "is whole: make room, then --resume") from None

    def close(self):
        """-> the last line, {} if there is none"""
        if self.file:
            self.file.close()
        return self.last


def mark(device):
    """This moment, as the device counts time."""
    if not device.startswith("cuda"):
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start, end):
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1000
