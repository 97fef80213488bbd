"""
What we take from a disk and leave on it: files may come from strangers, and ours must outlive
whatever happens to us.

    regular                   a file is a file: no pipe that never ends, no pointer of git-lfs
    read_json, parse_json     JSON that has one meaning: no key twice, no number that is not finite
    lines_of, write_lines     the lines of a .jsonl, counted alike by every reader
    sealed, opened_seal       JSON of ours that carries a hash of itself, so any change is found
    all_or_nothing            several files appear under their names together, or none does
    save, load                a report as JSON, with the fields that its reader needs
    only_one                  a folder that one run writes into refuses a second
    told_to_end               SIGTERM, by which schedulers end us, is ctrl-C

No pickle is read, and nothing in a file is ever called. Errors are one line: ValueError or OSError
with the file, what is wrong and what to do. Checked in tests/test_hostile.py, where files are
changed at random, and in tests/test_faults.py, where scripts are killed. weights.py reads models by
these rules, shards.py token shards.
"""
import hashlib
import json
import math
import os
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

POINTER = b"version https://git-lfs.github.com/spec/"  # what a clone without git-lfs begins with
BOM = b"\xef\xbb\xbf"  # what some editors put in front of UTF-8
SEAL = "sha256"        # the field of sealed JSON
MOST_JSON = 1 << 20    # bytes, where no more is expected


# ---------------------------------------------------------------- reading

def regular(path):
    """The path of a file, or of a link to one. ValueError for anything else."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing")
    # A pipe or a device might have no end, and reading it would not return.
    if not path.is_file():
        raise ValueError(f"{path} is no regular file: put one in its place")
    # A clone without git-lfs has such files. They look like damaged ones, and have another remedy.
    with open(path, "rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise ValueError(f"{path} is a pointer that git-lfs left in place of the file: install "
                             "git-lfs and run `git lfs pull` there")
    return path


def read_json(path, remedy="fetch it again", most=MOST_JSON):
    """What a JSON file of at most `most` bytes holds. ValueError, with the remedy, for others."""
    # Python's objects take up to 25 times as much memory as their JSON, so the size is asked first.
    size = regular(path).stat().st_size
    if size > most:
        raise ValueError(f"{path} has {size:,} bytes, and no such file has more than {most:,}: "
                         f"{remedy}")
    try:
        return parse_json(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged, or no JSON ({error}): {remedy}") from None


def parse_json(text):
    """json.loads of UTF-8 bytes. ValueError also for a key that comes twice, NaN, 1e999."""
    # Other readers understand these otherwise than we: the first of two keys, null, an error. Then
    # what one program has checked is not what another one uses.
    try:
        return json.loads(text.decode("utf-8-sig"), object_pairs_hook=distinct_keys,
                          parse_constant=refuse_number, parse_float=finite_number)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from None


def distinct_keys(pairs):
    found = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{short(key)} comes twice")
        found[key] = value
    return found


def refuse_number(text):
    raise ValueError(f"{text} is no number")


def finite_number(text):
    # float takes 1e999 for infinity.
    return float(text) if math.isfinite(float(text)) else refuse_number(text[:20])


def lines_of(file):
    """(number, bytes) of the lines of an open file that are not blank. Those that are count too."""
    # Iterating over bytes ends lines at \n alone: a text may hold U+2028, where str.splitlines ends
    # one. An editor's mark at the start of a file is no part of its first line.
    for number, line in enumerate(file, 1):
        line = line.removeprefix(BOM) if number == 1 else line
        if line.strip():
            yield number, line


def short(value):
    """What a message may show of something from a file: printable, and not much of it."""
    # Unescaped, a name in a file could write to the terminal whatever it likes.
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# ---------------------------------------------------------------- our own JSON

def seal_of(content):
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sealed(content):
    """A dictionary with one field more, the hash of the others."""
    # The hash is of what comes back from a file, where keys are strings and tuples are lists.
    content = json.loads(json.dumps(content))
    return content | {SEAL: seal_of(content)}


def opened_seal(found, path, remedy="restore it from a copy"):
    """
    The content of what `sealed` made; what has no hash is taken as it is. ValueError, which names
    `path`, if it was changed.
    """
    if SEAL not in found:
        return found
    content = {name: value for name, value in found.items() if name != SEAL}
    if found[SEAL] != seal_of(content):
        raise ValueError(f"{path} was changed: its content does not match its hash; {remedy}, or "
                         f"delete the field {SEAL!r} if you meant to")
    return content


# ---------------------------------------------------------------- writing

def all_or_nothing(files):
    """files: {file: function that writes it to another path}"""
    # They are renamed only once all are written, so an interrupted or failed save leaves what was
    # there before, and never the shards of two models side by side. What kill -9 leaves under a
    # temporary name the next save writes over.
    temporary = {file: file.with_name(f".{file.name}.tmp") for file in files}
    unchanged = "what was there is unchanged; is the disk full?"
    try:
        for file, save in files.items():
            # A link under this name would be followed, to a file that is none of ours.
            temporary[file].unlink(missing_ok=True)
            save(temporary[file])
        for file in files:
            os.replace(temporary[file], file)
            unchanged = ("those written before it are new, it and those after it are not: write "
                         "them again")
    except OSError as error:
        raise OSError(f"could not write {file} ({error}): {unchanged}") from None
    finally:
        for written in temporary.values():
            written.unlink(missing_ok=True)


def whole_or_nothing(file, save):
    """all_or_nothing for one file."""
    all_or_nothing({file: save})


def save(report, path):
    """Write a report as JSON, in a folder that is made if need be; whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    whole_or_nothing(path, lambda file: file.write_text(json.dumps(report, indent=1)))


def make_folder(path, flag):
    """Make the folder that a flag names, if need be. ValueError where there is a file."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"{flag} {path} is a file, or in one: give a folder") from None


def load(path, *fields, remedy="move it away"):
    """
    What save wrote. ValueError, which names the file, if it has not all these fields, or is no
    JSON, or was sealed and then changed.
    """
    report = read_json(path, remedy, most=1 << 30)
    if not isinstance(report, dict):
        raise ValueError(f"{path} is damaged, or not of ours (it is no object): {remedy}")
    if lacking := [field for field in fields if field not in report]:
        raise ValueError(f"{path} is damaged, or not of ours (it has no field {lacking[0]!r}): "
                         f"{remedy}")
    return opened_seal(report, path, remedy)


def write_lines(files):
    """{path: rows} as .jsonl, one row a line. All of them are there in the end, or none is."""
    def writer(rows):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        return lambda path: path.write_text(text, encoding="utf-8")
    for path in files:
        path.parent.mkdir(parents=True, exist_ok=True)
    all_or_nothing({path: writer(rows) for path, rows in files.items()})


# Handles of the locks that this process holds. A child would inherit them and might outlive it,
# so it closes them: only the process that took a lock keeps it.
HELD = set()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: [os.close(HELD.pop()) for _ in range(len(HELD))])


@contextmanager
def lock_handle(path, flags=os.O_RDONLY):
    """A handle for flock of a file or folder, opened with these flags of os.open. A lock on it
    leaves with this process, or with the block."""
    handle = os.open(path, flags, 0o600)
    HELD.add(handle)
    try:
        yield handle
    finally:
        if handle in HELD:  # not in a child, which has closed it already
            HELD.remove(handle)
            os.close(handle)


@contextmanager
def only_one(folder):
    """
    Inside, no other process on this machine may enter with the same folder; nor one on another,
    where the disk passes locks on. ValueError if one has.
    """
    if fcntl is None:
        print(f"note: this system does not keep two runs from writing to {folder}: see to it",
              file=sys.stderr)
        yield
        return
    # The lock is the kernel's: it leaves no file, and it ends with the process however that ends.
    with lock_handle(folder) as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder} is being written to by another run: wait for it, end it, "
                             "or choose another folder") from None
        except OSError as error:
            print(f"note: the disk of {folder} knows no locks ({error.strerror}): see that no two "
                  "runs write there", file=sys.stderr)
        yield


def told_to_end():
    """SIGTERM becomes KeyboardInterrupt, so files are closed and the script says how to go on."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
