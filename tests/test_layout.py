"""The book's shape: which file imports which. A reader never goes in a circle."""
import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOP = sorted(file.stem for file in ROOT.glob("*.py"))
FOLDERS = "infra", "triton_ops", "experiments"

# Who may import whom among the files at the top. What a line does not name, it may not import.
ARROWS = {
    "sparse": set(),
    "memory": {"sparse", "kernels"},
    "kernels": set(),
    "cache": {"memory", "sparse"},
    "engine": {"cache", "memory", "sparse"},
    "model": {"engine", "memory", "sparse"},
    "niah": set(),
    "data": set(),
    "recipes": {"memory", "model", "niah", "sparse"},
    "train": {"data", "eval_niah", "memory", "model", "niah", "recipes", "sparse"},
    "eval_niah": {"data", "model", "niah", "sparse"},
    "sample": {"data", "eval_niah", "model", "niah", "sparse"},
    "bench": {"engine", "experiments", "kernels", "memory", "model", "sparse"},
}


def imports(file):
    """The names of ours that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.partition(".")[0] in (*TOP, *FOLDERS)}


def top_of(names):
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("name", TOP)
def test_imports_run_one_way(name):
    """A definition that needs what is built on it: nobody could read one without the other."""
    assert name in ARROWS, f"{name}.py is new at the top: what may it import?"
    allowed = ARROWS[name] | {"infra", "triton_ops"}
    assert top_of(imports(ROOT / f"{name}.py")) <= allowed


def test_the_arrows_have_no_circle():
    """A table above that allows what it should forbid."""
    left = dict(ARROWS)
    while left:
        free = [name for name, wants in left.items() if not wants & left.keys()]
        assert free, f"a circle among {sorted(left)}"
        for name in free:
            del left[name]


def test_few_files_stand_at_the_top():
    assert len(TOP) <= 13


@pytest.mark.parametrize("file", sorted((ROOT / "infra").glob("*.py")), ids=lambda file: file.stem)
def test_infra_knows_nothing_of_the_model(file):
    """Machinery that cannot be skipped on a first reading."""
    assert top_of(imports(file)) <= {"infra"}


@pytest.mark.parametrize("file", sorted((ROOT / "triton_ops").glob("*.py")),
                         ids=lambda file: file.stem)
def test_kernels_know_nothing_of_what_calls_them(file):
    """The hooks alone look upward, to the definitions that they stand for."""
    allowed = {"triton_ops"}
    if file.stem in ("selectors", "backend"):
        allowed |= {"sparse"}
    assert top_of(imports(file)) <= allowed
