"""The book's shape: which file imports which. A reader never goes in a circle."""
import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Who may import whom. What a line does not name, it may not import; at the top all may import from
# the folders infra and triton_ops.
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
    "train": {"data", "experiments", "memory", "model", "niah", "recipes", "sparse"},
    "eval_niah": {"data", "experiments", "model", "niah", "sparse"},
    "sample": {"data", "eval_niah", "model", "niah", "sparse"},
    "look": {"memory", "model", "niah", "sample", "sparse"},
    "bench": {"engine", "experiments", "kernels", "memory", "model", "sparse"},
}
# The hooks alone look upward, to the definitions that they stand for.
UPWARD = {f"triton_ops/{name}.py": {"sparse"} for name in ("selectors", "on_cpu", "backend")}
OURS = {*ARROWS, "infra", "triton_ops", "experiments"}
FILES = sorted(file.relative_to(ROOT) for pattern in ("*.py", "infra/*.py", "triton_ops/*.py")
               for file in ROOT.glob(pattern))


def imported(file):
    """What of ours a file imports, anywhere in it: files at the top, and folders."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.partition(".")[0])
    return found & OURS


@pytest.mark.parametrize("file", FILES, ids=str)
def test_imports_run_one_way(file):
    """A definition that needs what is built on it; machinery that knows the model."""
    if file.parent.name:
        allowed = {file.parent.name} | UPWARD.get(file.as_posix(), set())
    else:
        assert file.stem in ARROWS, f"{file} is new at the top: what may it import?"
        allowed = ARROWS[file.stem] | {"infra", "triton_ops"}
    assert imported(file) <= allowed


def test_the_arrows_have_no_circle():
    """A table above that allows what it should forbid, or more files than a reader takes in."""
    assert len(ARROWS) <= 14
    left = dict(ARROWS)
    while left:
        free = [name for name, wants in left.items() if not wants & left.keys()]
        assert free, f"a circle among {sorted(left)}"
        for name in free:
            del left[name]
