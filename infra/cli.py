"""
What all scripts have in common: the types of their flags, and what they say of themselves.

    whole, number, seed ...     types of flags: a bad value is one line that names flag and range
    flag_parser, command        a script's parser; its main, whose errors are one line and exit 2
    made_by                     what made a result: it stands in every report, so that the same
                                command on the same code repeats it
    sized                       a method of the command line, with what suits the context added
    refuse_longer, note_...     prompts that do not fit what budgets are fractions of
    Progress                    a line with the time left

Nothing here knows of models or tasks. Checked in tests/test_cli.py.
"""
import argparse
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import time
import traceback
from inspect import get_annotations
from pathlib import Path

import torch

from infra.files import short

ROOT = Path(__file__).resolve().parents[1]  # of the project
LONGEST = 4096  # of --context_len, unless told: the paper's, and models of today know more
STARTER = ["python"]  # of a script at the top, in a report: experiments/memories.py adds itself


# ---------------------------------------------------------------- types of flags

def whole(least, most):
    """A flag's type: a whole number within these, both included."""
    def of_flag(text):
        # int() also takes "1_000", and needs seconds for a million digits
        if not re.fullmatch(r"[+-]?\d{1,30}", text, re.ASCII) or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{short(text)} is no whole number from {least:,} to "
                                             f"{most:,}")
        return int(text)
    return of_flag


def number(holds, what):
    """A flag's type: a number of which holds(number) is true, and that fp32 has, squared too."""
    def of_flag(text):
        try:
            value = float(text)
        except ValueError:
            value = math.nan  # of which nothing holds
        if not (holds(value) and (value == 0 or 1e-18 <= value <= 1e18)):
            raise argparse.ArgumentTypeError(f"{short(text)} is not {what}, or not within 1e-18 "
                                             "and 1e18")
        return value
    return of_flag


natural, positive = whole(0, 2**31 - 1), whole(1, 2**31 - 1)
few = whole(1, 1_000_000)           # sequences: a list of them is made
seed = whole(-2**31, 2**31 - 1)     # with step and process it must fit a generator's 64 bits

above_0, at_least_0 = number(lambda x: x > 0, "above 0"), number(lambda x: x >= 0, "0 or above")
share = number(lambda x: 0 <= x <= 1, "a share from 0 to 1")
above_1 = number(lambda x: x > 1, "above 1")
gate = number(lambda g: 0 < g < 1, "above 0 and below 1")  # where a memory's gate can start
temperature = at_least_0


def usable_device(text):
    """A flag's device. Each process of torchrun has a GPU of its own: cuda is cuda:LOCAL_RANK."""
    try:
        if text == "cuda" and "LOCAL_RANK" in os.environ:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{text}: {reason}") from None
    return text


def sized(text, context_len, tokenizer, methods):
    """
    A method's text, with what suits the context and the tokens added where it has none of its own.

    block_size and window: 1/64 of the context but 8 to 64. The paper's 4096 gives its 64; from 512
    on a budget of 1/16 holds four blocks. kernel, SnapKV's: the paper's 5, for a model of bytes 15,
    about as much text. methods: {label: dataclass}, whose fields say which of these a method has;
    a field that is declared anew outside of sparse.py keeps its own default.
    """
    size, parts = min(64, max(8, context_len // 64)), []
    fitting = {"block_size": size, "window": size}
    if tokenizer.name == "bytes":
        fitting["kernel"] = 15
    for part in text.split("+"):
        label, _, given = part.partition(":")
        kinds = methods[label].__mro__ if label in methods else ()
        owners = {key: next((kind.__module__ for kind in kinds if key in get_annotations(kind)), "")
                  for key in fitting}
        added = [f"{key}={value}" for key, value in fitting.items()
                 if owners[key] == "sparse" and f"{key}=" not in given]
        parts.append(f"{label}:" + ",".join(filter(None, [given, *added])) if added else part)
    return "+".join(parts)


# ---------------------------------------------------------------- lengths

def roomy(tokens):
    """The next --context_len of which 1/16 is whole blocks (`sized`)."""
    step = 1024 if tokens > 1024 else 128
    return tokens + -tokens % step


def refuse_longer(tokens, context_len):
    """
    ValueError if the longest prompt and its answer are more than --context_len: budgets, and the
    shares that a table tells, are fractions of it.
    """
    if tokens > context_len:
        raise ValueError(f"the longest prompt and its answer take {tokens:,} tokens, more than "
                         f"--context_len {context_len}, of which budgets are fractions: give "
                         f"--context_len={roomy(tokens)}, or shorter prompts")


def note_if_beyond(name, trained, asked, yarn=None):
    """
    A line, if a model is asked about more tokens than it has learned to look back, or was stretched
    by `yarn` to and needs no stretch.
    """
    if asked > round(trained * (yarn or 1)):
        print(f"note: {name} was trained on contexts of {trained:,} tokens, and is asked about up "
              f"to {asked:,}: where it fails, it need not be a method's fault", file=sys.stderr)
    elif yarn and asked <= trained:
        print(f"note: --yarn={yarn:g} stretches {name}, which was trained on contexts of "
              f"{trained:,} tokens and is asked about up to {asked:,}: without it positions are "
              "those that it has learned", file=sys.stderr)


def note_lengths(trained, longest, max_new_tokens, context_len, yarn=None):
    """
    note_if_beyond of each model of {name: context that it was trained on}, and a line if prompts
    are far shorter than --context_len.
    """
    asked = longest + max_new_tokens
    for name, of_model in trained.items():
        note_if_beyond(name, of_model, asked, yarn)
    if asked < 0.75 * context_len:
        print(f"note: the longest prompt has {longest:,} tokens, and budgets are fractions of "
              f"--context_len {context_len}: --context_len={roomy(asked)} fits", file=sys.stderr)


# ---------------------------------------------------------------- a script

class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Tells a flag's default, but for one that its help has to put into words."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def flag_parser(script, description):
    """A parser whose --help tells the defaults, and whose errors are one line and exit 2."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=Help)
    parser.error = lambda message: parser.exit(2, f"{script}: {message}\n")
    return parser


def command(script, main, args=None, interrupted=None):
    """
    main() as the whole of a script: what a user can mend is one line and exit 2, ctrl-C exit 130.

    interrupted: what ctrl-C says, with fields of `args` in braces; None: nothing. args: the flags,
    if a GPU without room for --batch, or for one prompt, is to be one line too.
    """
    fields = vars(args) if args else {}
    try:
        main()
    except torch.OutOfMemoryError:
        if not args:
            raise
        asked = f"--batch {args.batch}: lower it" if "batch" in fields else "one prompt"
        end(f"{script}: the GPU has no room for {asked}")
    except (ValueError, FloatingPointError, OSError, ImportError) as error:
        end(f"{script}: {where(error)}{' '.join(str(error).split())}")
    except KeyboardInterrupt:
        # of torchrun's processes one says it
        if interrupted and os.environ.get("RANK", "0") == "0":
            # the terminal has put ^C at the start of the line
            print(f"\n{script}: {interrupted.format(**fields)}", file=sys.stderr)
        sys.exit(130)


def where(error):
    """
    "FILE:LINE: " of an error that Python itself raised, as a wrong number of values to unpack: it
    does not say where. "" of one that is written out, and of files.
    """
    frame = traceback.extract_tb(error.__traceback__)[-1]
    if isinstance(error, OSError) or "raise" in (frame.line or "raise"):
        return ""
    return f"{frame.filename}:{frame.lineno}: "


def end(message):
    print(message, file=sys.stderr)
    sys.exit(2)


# ---------------------------------------------------------------- what made a result

def commit():
    """The commit of this code, "+dirty" if its files differ from it."""
    def git(*words):
        return subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True,
                              check=True).stdout.strip()
    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def command_line(argv, script):
    """
    What is running, as a command. argv: flags with which Python called our script; None: the shell
    called some script, perhaps this one.
    """
    if argv is None:
        path, argv = Path(sys.argv[0]).resolve(), sys.argv[1:]
        script = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name
    script = Path(script)
    if len(script.parts) > 1:  # in a folder: a module, by its dotted name
        return shlex.join(["python", "-m", ".".join(script.with_suffix("").parts), *argv])
    return shlex.join([*STARTER, str(script), *argv])


def device_name(device):
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}), {torch.get_num_threads()} threads"


def made_by(argv, script, device, processes=1):
    """What each report begins with. argv, script: as in command_line."""
    device = device_name(device)
    if processes > 1:
        device = f"{processes} x {device}"
    return {"command": command_line(argv, script), "commit": commit(), "device": device,
            "torch": torch.__version__}


class Progress:
    """A line with the time left: on a terminal always the same, else a new one each half minute."""

    def __init__(self, total, there):
        self.total, self.there, self.done = total, there, there
        self.started = self.shown = time.time()

    def __call__(self, n):
        self.done += n
        now, again = time.time(), sys.stdout.isatty()
        if now - self.shown <= (0.5 if again else 30):
            return
        # what was there before took no time of this run
        each = (now - self.started) / (self.done - self.there)
        left = each * (self.total - self.done) / 60
        print(f"{self.done:.0f} of {self.total} answers, {left:.1f} min left",
              end="  \r" if again else "\n", flush=True)
        self.shown = now
