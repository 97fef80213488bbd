"""experiments/ideas.py: arms that share all but their memory, paired gains, ideas from files."""
import json
import re
import sys
from pathlib import Path

import pytest
import torch

import memory
import niah
import sparse
import train
from experiments import ideas, memories
from infra.cli import ROOT
from model import Config, Transformer
from triton_ops import backend

TINY = Config(257, n_layer=1, width=32, n_head=2, n_kv_head=2, mlp_width=64, context_len=1024,
              eos_id=256)
SMALL = ["--train=--steps=2 --batch=1 --device_batch=1", "--samples=2", "--device=cpu"]


@pytest.fixture
def start(tmp_path, monkeypatch):
    """An empty folder, in which a tiny model is the start."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(backend, "choice", backend.choice)
    monkeypatch.setattr(ideas, "START", tmp_path / "nano")
    monkeypatch.setattr(memory, "MEMORIES", memory.MEMORIES)  # one dict for all, put back below
    before, methods = dict(memory.MEMORIES), dict(sparse.METHODS)
    torch.manual_seed(0)
    Transformer(TINY).save_pretrained(ideas.START)
    yield tmp_path
    for known, old in (memory.MEMORIES, before), (sparse.METHODS, methods):
        known.clear()
        known.update(old)


def flags_of(*argv):
    return ideas.flags().parse_args([*SMALL, *argv])


# ---------------------------------------------------------------- the arms

def test_arms_share_all_but_their_memory_and_their_passes(start):
    """A control with other batches, fewer steps, or one pass where the others take two."""
    (_, arms), = ideas.arms_of(flags_of("--memories", "decay", "values", "dilated", "--seeds", "3"))
    assert list(arms) == ["start", "joint", "decay", "values", "dilated"]
    parsed = {name: train.parse(flags) for name, flags in arms.items() if flags}
    own = {"memory", "arl", "joint", "name"}
    shared = [{k: v for k, v in vars(args).items() if k not in own} for args in parsed.values()]
    assert all(settings == shared[0] for settings in shared) and shared[0]["seed"] == 3
    passes = {name: (args.memory, args.arl, args.joint) for name, args in parsed.items()}
    assert passes == {"joint": ("off", 0, 64), "dilated": ("off", 64, 0),
                      "decay": ("decay", 64, 0), "values": ("values", 64, 0)}


def test_a_memory_whose_file_has_changed_is_another_run(start):
    """A stale model that is asked in place of the edited idea."""
    file = start / "mine.py"
    for code in "0", "1":
        file.write_text("from memory import MEMORIES, Decay\nclass Mine(Decay):\n"
                        f"    number = {code}\nMEMORIES['mine'] = Mine\n")
        memories.bring(file)
        (_, arms), = ideas.arms_of(flags_of("--memories", "mine", "decay"))
        names = {arm: ideas.folder_of(flags).name for arm, flags in arms.items() if flags}
        if code == "0":
            before = names
    assert before["mine"] != names["mine"] and before["decay"] == names["decay"]
    assert re.fullmatch("mine-0-[0-9a-f]{6}-[0-9a-f]{4}", names["mine"])
    (_, others), = ideas.arms_of(flags_of("--memories", "mine", "--train=--steps=3"))
    (_, plain), = ideas.arms_of(flags_of("--memories", "mine", "--train="))
    assert len({ideas.folder_of(of["joint"]).name for of in (arms, others, plain)}) == 3


# ---------------------------------------------------------------- numbers, by hand

def test_gains_are_paired_pooled_over_methods_and_told_by_seed():
    """Start or dense in the pool; an unpaired interval; one seed told for all."""
    joint = {"dense": [1, 1, 1, 1], "a:budget=1/8,x=1": [0, 0, 1, 1], "b": [0, 1, 0, 0]}
    better = {"dense": [0, 0, 0, 0], "a:budget=1/8,x=1": [1, 0, 1, 1], "b": [1, 1, 1, 0]}
    found = {0: {"start": joint, "joint": joint, "decay": better, "keys": joint},
             1: {"start": joint, "joint": joint, "decay": joint, "keys": joint}}
    text, rows = ideas.report(found, joint)
    # The first seed gains 1, 0, 1/2 and 0 of the prompts, the second nothing: by prompt 50, 0, 25
    # and 0 points.
    assert rows["decay"]["gain"] == pytest.approx(18.75)
    deviations = [31.25, -18.75, 6.25, -18.75]
    half = 1.96 * (sum(d * d for d in deviations) / 3) ** 0.5 / 2
    assert rows["decay"]["half"] == pytest.approx(half) and half > 18.75
    assert rows["decay"]["verdict"] == "not told apart"
    assert rows["decay"]["over_start"] == (rows["decay"]["gain"], rows["decay"]["half"])
    assert rows["decay"]["by_seed"] == [37.5, 0] and "(by seed +37.5 +0.0)" in text
    assert rows["decay"]["gains"]["dense"] == (-50, 0) and rows["keys"]["gain"] == 0
    assert rows["joint"]["scores"] == {"dense": 100, "a:budget=1/8,x=1": 50, "b": 25}
    assert "decay has the most; minus the others, over the sparse methods: keys +18.8" in text
    assert text.splitlines()[0].split() == ["score,", "%", "dense", "a", "1/8", "b"]
    assert [ideas.verdict(gain, 2) for gain in (2.1, 2, -2, -2.1)] == [
        "better", "not told apart", "not told apart", "worse"]
    assert ideas.selectors(found, joint).splitlines()[0] == "start: b - a 1/8 -25.0 ±93.8 " \
        "not told apart"


# ---------------------------------------------------------------- the commands

def test_lesson_trains_control_and_memory_once_and_says_what_it_found(start, capsys, monkeypatch):
    """`python train.py` without a flag, in small; a second time nothing is trained."""
    steps = ideas.flags().parse_args(ideas.LESSON).train
    assert train.parse(["--recipe=nano-convert", "--init=x", *steps]).steps == 64
    monkeypatch.setattr(ideas, "LESSON", ["--out=out/lesson"])
    monkeypatch.setattr(ideas, "flags", lambda: Preset(SMALL))
    monkeypatch.setattr(ideas, "TASKS", ["niah_multikey_2"])
    for trained in True, False:
        monkeypatch.setattr(sys, "argv", ["train.py"])
        train.main()
        said = capsys.readouterr().out
        assert ("optimizer" in said or "2 steps of 1 x 1024" in said) == trained
        assert "points over the four sparse methods" in said and "python look.py" in said
    result = json.loads(min(Path("out/lesson").glob("results-*.json")).read_text())
    assert list(result["rows"]) == ["start", "joint", "decay"]
    assert len(result["scores"]["0"]["decay"]["dense"]) == 2
    folder, = Path("out/lesson").glob("decay-0-*")
    assert Transformer.from_pretrained(folder).config.memory == "decay"


class Preset:
    """ideas.flags with SMALL in front of what is parsed."""

    def __init__(self, first, flags=ideas.flags):
        self.first, self.parser = first, flags()

    def parse_args(self, argv):
        return self.parser.parse_args([*self.first, *argv])


def test_ideas_from_files_of_the_readme(start, capsys, monkeypatch):
    """Its memory and its selector, as they are printed there, through --also."""
    monkeypatch.setattr(ideas, "TASKS", ["niah_multikey_2"])
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    shift, = [block for block in blocks if "class Shift" in block]
    bestkey, = [block for block in blocks if "class BestKey" in block]
    Path("shift.py").write_text("import torch\nfrom torch import nn\nfrom memory import MEMORIES\n"
                                + shift)
    Path("bestkey.py").write_text(bestkey)
    ideas.main([*SMALL, "--also", "shift.py", "bestkey.py", "--memories", "shift", "--methods",
                "moba:budget=1/8", "bestkey:budget=1/8"])
    said = capsys.readouterr().out
    assert "shift: bestkey 1/8 - moba 1/8" in said and "mean of sparse" in said
    ideas.main([*SMALL, "--memories", "--methods", "quest:budget=1/8"])  # no training at all
    assert "joint" not in capsys.readouterr().out


def test_all_arms_are_asked_the_same_prompts(start):
    args = flags_of("--eval_seed=5")
    some = ideas.questions(args, ideas.get_tokenizer("bytes"))
    assert list(some) == ["niah_multikey_1", "niah_multikey_2", "niah_multivalue"]
    example = niah.make_example("niah_multivalue", 1024, ideas.get_tokenizer("bytes"), 5, 0, "sft")
    assert some["niah_multivalue"][0].ids == example.ids


@pytest.mark.parametrize("flags, said", [
    (["--memories", "none"], "there is no none"),
    (["--also", "nowhere.py"], "there is no file nowhere.py"),
    (["--also", str(ROOT / "README.md")], "is no Python file"),
    (["--methods", "quest:budget=2"], "budget=2"),
    (["--train=--joint=3"], "--joint=3: not here"),
])
def test_refusals_are_one_line(start, flags, said, capsys):
    with pytest.raises(SystemExit) as end:
        ideas.main([*SMALL[1:], *flags])
    line = capsys.readouterr().err
    assert end.value.code == 2 and line.count("\n") == 1 and said in line, line
