"""
Is each number that we publish held by a test? Wrong ones are planted, one after the other, and a
test must fail.

    python tests/mutants.py [--only WORD] [--list]       exit 1 if one survived or no longer applies

mutants.txt is the table: a file, the test that must see it (FILE::NAME without "test_"), and what
stands there exactly once ⇒ what is planted instead (⏎ is an end of line, ␠ a blank at the end).
Each would still look plausible in a table or a log. Whoever adds a number to a report adds a line
there. All of them take some ten minutes of two quiet cores; tests/test_report.py sees to it that
they still apply.
"""
import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OURS = [ROOT, *(ROOT / folder for folder in ("infra", "triton_ops", "experiments", "tests"))]
TIMEOUT = 120  # seconds of one test
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "results", "assets", "out", "data")



def table(path=Path(__file__).with_suffix(".txt")):
    """-> [(file, test, old, new)]"""
    found, file, test = [], None, None
    for line in path.read_text(encoding="utf-8").replace("\n    ⇒", " ⇒").splitlines():
        if not line.startswith("  "):
            file = line
        elif not line.startswith("    "):
            test = line.strip()
        else:
            old, _, new = line[4:].partition(" ⇒")
            found.append((file, test, *(text.replace("⏎", "\n").replace("␠", " ")
                                        for text in (old, new[1:]))))
    return found


def stale(file, test, old, root=ROOT):
    """Why a line of the table no longer applies; None if it does."""
    times = (root / file).read_text(encoding="utf-8").count(old)
    if times != 1:
        return f"what it changes is there {times} times"
    module, _, name = test.partition("::")
    tests = root / "tests" / f"test_{module}.py"
    if not tests.exists() or f"\ndef test_{name}(" not in tests.read_text(encoding="utf-8"):
        return f"there is no test {test}"


def load():
    """All modules of others that the tests take, so that no fork has to load them."""
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    sys.path[:1] = [str(ROOT), str(ROOT / "tests")]
    import conftest  # noqa: F401
    from experiments import reproduce  # noqa: F401
    for name, module in list(sys.modules.items()):
        folder = Path(getattr(module, "__file__", None) or "/").parent
        if folder in OURS and name != "__main__":
            del sys.modules[name]


def fails(tree, tests):
    """
    Whether one of these tests fails in a tree, or hangs. In a fork of this process, which has
    loaded all but our own modules: that takes little longer than the test itself.
    """
    def in_tree():
        out = os.open(tree / "told", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1), os.dup2(out, 2)
        os.chdir(tree)
        sys.path[:2] = []  # see load
        sys.dont_write_bytecode = True  # a module's cache knows no change within a second
        import pytest
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider",
                            *(f"tests/test_{test.replace('::', '.py::test_')}" for test in tests)])
        os._exit(code)

    process = multiprocessing.get_context("fork").Process(target=in_tree)
    process.start()
    process.join(TIMEOUT * len(tests))
    if process.is_alive():
        process.kill()
        return True
    if process.exitcode not in (0, 1):
        raise ValueError(f"pytest ended with {process.exitcode}:\n{said(tree)}")
    return process.exitcode == 1


def said(tree):
    """The end of what pytest has said."""
    return (tree / "told").read_text()[-3000:]


def main():
    parser = argparse.ArgumentParser(description="Plant wrong numbers, and see that a test fails.")
    parser.add_argument("--only", default="", metavar="WORD",
                        help="those whose line of the table holds it")
    parser.add_argument("--list", action="store_true", help="print them, and plant none")
    args = parser.parse_args()
    chosen = [mutant for mutant in table() if args.only in " ".join(mutant)]
    if args.list:
        for file, test, old, new in chosen:
            print(f"{file}: {test}\n    - {old}\n    + {new}")
        return
    load()
    began, ended = time.time(), {"killed": 0, "SURVIVED": 0, "STALE": 0}
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=LEFT_OUT)
        apply = {test for file, test, old, _ in chosen if not stale(file, test, old, tree)}
        if fails(tree, sorted(apply)):
            sys.exit(f"tests fail before anything is planted:\n{said(tree)}")
        for number, (file, test, old, new) in enumerate(chosen, start=1):
            why = stale(file, test, old, tree)
            how = "STALE" if why else None
            if not how:
                source = (tree / file).read_text(encoding="utf-8")
                (tree / file).write_text(source.replace(old, new), encoding="utf-8")
                how = "killed" if fails(tree, [test]) else "SURVIVED"
                (tree / file).write_text(source, encoding="utf-8")
            ended[how] += 1
            print(f"{number:>3} of {len(chosen)}  {how:8}  {file}: {old!r} -> {new!r} "
                  f"({why or test})", flush=True)
    counts = ", ".join(f"{n} {how}" for how, n in ended.items())
    print(f"{counts}, in {(time.time() - began) / 60:.1f} minutes")
    sys.exit(ended["killed"] < len(chosen))


if __name__ == "__main__":
    main()
