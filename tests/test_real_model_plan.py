"""
experiments/real_model.py: the plan as flags of train.py, a run that is stopped anywhere, what is
asked of a model, and the tables. Figures are worked by hand. test_real_model.py is of the model.
"""
import itertools
import json
import lzma
import statistics
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import LLAMA_FORM, refused, tiny

import eval_niah
import niah
import sparse
import train
from experiments import conversion, real_model, reproduce, runs, starts, swap, ways
from experiments.oracle import Frozen, Needles, left_out, oracle
from experiments.real_model import ARMS, STAGES, parts_of, stages_of
from infra import files
from infra.report import best_heads
from infra.tokenizers import ByteTokenizer
from model import Transformer
from triton_ops import backend

TINY = LLAMA_FORM | dict(vocab_size=257, n_head=4, n_kv_head=2, width=32, context_len=512)
TRIAL = ["--init=model", "--data=shards", "--context_len=512", "--device=cpu", "--samples=2",
         "--few=1", "--eval_batch=2"]
STEPS = ["--steps=2", "--batch=1", "--compile=off", "--tasks", "niah_single_1"]
QUEST = {"quest": ["quest:budget=1/4", "quest:budget=1/8"]}  # cells that take seconds


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """Plain PyTorch; cells that 512 tokens allow, whatever the development chooses."""
    monkeypatch.setattr(backend, "choice", "torch")
    monkeypatch.setattr(real_model, "CELLS", {
        kind: [f"{kind}:budget=1/{n}{more}" for n in (4, 8, 16)]
        for kind, more in (("quest", ""), ("moba", ""), ("snapkv", ",kernel=21,window=16"))})


def of_letters(text, answers, task=None):
    """A score that tells answers of an untrained model apart."""
    return sum(text.encode()) % 97 / 97


@pytest.fixture
def here(beginnings, monkeypatch, tmp_path):
    beginnings(context_len=512)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # no waiting for other trainings
    monkeypatch.setattr(niah, "score_ruler", of_letters)


def flags(*more):
    return real_model.flags().parse_args([*TRIAL, *more])


def do(*more):
    real_model.main([*TRIAL, *more])


# ---------------------------------------------------------------- the plan

def test_stages_are_the_runs_of_the_plan():
    """A seed or an arm too few; memory-joint-0 taken for a memory; a rate of the others."""
    of = lambda stage: [parts_of(name) for name in STAGES[stage]]
    assert of("curve") == [("released", 0, steps, rate) for rate in ("1e-4", "3e-4")
                           for steps in (54, 160, 320, 640)]
    assert of("develop") == [("joint", 100, 160, "3e-4")]
    assert sorted(of("primary")) == sorted((arm, seed, 160, "3e-4") for seed in range(8)
                                           for arm in ("joint", "memory", "dilated"))
    assert sorted(of("others")) == sorted(
        (arm, seed, 160, "3e-4") for seed in range(2)
        for arm in ("released", "continued", "memory-joint", "convolution"))
    assert parts_of("memory-joint-12-7x2e-5") == ("memory-joint", 12, 7, "2e-5")


@pytest.mark.parametrize("name", [
    "", "memory", "memory-", "memory-joint", "memory-0-same", "memory-0-320x3e-4-same",
    "memory-0-", "memory-0-54", "memory-0-54x", "memory-0-0x1e-4", "memory-0-54xfast", "memory-00",
    "memory--1", "memory-٣", "memoir-0", "memory-0 ", "../memory-0"])
def test_what_is_no_run_is_refused(name):
    """Two names of one run; a rate that train.py refuses once the text is read."""
    refused(lambda: parts_of(name), "is no run", "ARM-SEED-STEPSxRATE")


# arm: of the text init, memory, arl, joint; of the fine-tuning "-same" arl, joint (None: not there)
PLAN = {
    "released": (None, None),
    "continued": (("o/start-plain", "off", 0, 0), None),
    "joint": (("o/start-plain", "off", 0, 64), (0, 64)),
    "dilated": (("o/start-plain", "off", 64, 0), (64, 0)),
    "memory": (("o/start", "on", 64, 0), (64, 0)),
    "memory-joint": (("o/start", "on", 0, 64), (0, 64)),
    "convolution": (("o/start-plain", "convolution", 0, 64), (0, 64)),
}


@pytest.mark.parametrize("arm", PLAN)
def test_each_arm_is_trained_as_the_plan_says(arm):
    """A pass, a rate or a start that is another arm's; text of another seed; too few steps."""
    assert PLAN.keys() == ARMS.keys()
    (on_text, same), name = PLAN[arm], f"{arm}-1"
    assert stages_of(f"{arm}-2", flags(), [])[1].keys() == {""}  # of no more seeds than two
    text, tuned = stages_of(name, flags("--out=o"), ["--workers=0"])
    assert bool(text) == bool(on_text)
    start = f"o/{name}-text" if text else "model"
    stages = {suffix: train.parse(of) for suffix, of in tuned.items()}
    filters = arm == "convolution"  # learn as fast as the weights, where gates hardly move
    if text:
        s = stages["-text"] = train.parse(text)
        assert (s.init, s.memory, s.arl, s.joint) == on_text
        assert (s.recipe, s.data, s.steps, s.batch, s.lr, s.memory_lr, s.min_lr, s.warmup) == (
            "continue", "shards", 381, 16, 5e-4, 5e-4 if filters else 1e-5, 0, 0.05)
        assert (s.weight_decay, s.arl_weight) == (0.1, 0.1)
    for suffix, passes in ("", (0, 0)), ("-same", same):
        assert (suffix in tuned) == (passes is not None)
        if passes:
            s = stages[suffix]
            assert (s.init, s.memory, (s.arl, s.joint)) == (start, None, passes)
            assert (s.recipe, s.data, s.protocol, s.steps, s.batch, s.lr, s.min_lr) == (
                "niah-sft", "niah", "sft", 160, 16, 3e-4, 0)
            assert (s.warmup, s.weight_decay, s.many, s.other_weight) == (0.05, 0.01, 0, 0)
            assert s.memory_lr == (3e-4 if filters else 1e-5)
            assert s.arl_weight == 0.1 or not s.arl
    for suffix, s in stages.items():
        assert (s.out, s.name, s.seed, s.resume) == ("o", name + suffix, 1, True)
        assert (s.context_len, s.eval_every, s.workers, s.tasks) == (512, 0, 0, None)
        assert s.save_every > s.steps


@pytest.mark.parametrize("arm, name", [("memory", "third-18-slowest-light"), ("joint", "joint"),
                                       ("dilated", "dilated-light")])
def test_arms_are_the_conversions_that_were_measured(arm, name):
    """A conversion that is chosen by its loss and lengths, and an arm that is another one."""
    text, _ = stages_of(f"{arm}-0", flags("--out=o"), [])
    args = conversion.flags().parse_args([*TRIAL[:4], "--out=c"])
    ours, chosen = (vars(train.parse(of)) for of in (text, conversion.flags_of(name, args, [])))
    assert chosen["memory"] == (None if arm == "memory" else "off")  # its start has it already
    folders = {"recipe", "memory", "init", "out", "name"}
    without = {"joint": {"memory_lr", "arl_weight"}, "dilated": {"memory_lr"}}  # of no effect
    assert {key for key in ours if ours[key] != chosen[key]} - folders == without.get(arm, set())
    start, folder = real_model.start_of(text, flags())
    assert start.kind == conversion.PLAN[name][0].kind
    assert arm != "memory" or start == conversion.PLAN[name][0]


def test_a_run_may_name_its_steps_and_rate():
    """Those of the plan in a curve of which all points are then one."""
    text, tuned = stages_of("joint-0-54x1e-4", flags(), [])
    assert (train.parse(text).steps, train.parse(text).lr) == (381, 5e-4)
    assert [(s.steps, s.lr, s.name) for s in map(train.parse, tuned.values())] == [
        (54, 1e-4, "joint-0-54x1e-4"), (54, 1e-4, "joint-0-54x1e-4-same")]
    text, tuned = stages_of("convolution-2-54x1e-4", flags(), [])
    assert (train.parse(text).memory_lr, train.parse(tuned[""]).memory_lr) == (5e-4, 1e-4)
    _, longer = stages_of("joint-3", flags(), ["--steps=2"])  # of a trial
    assert {train.parse(of).steps for of in longer.values()} == {2}


# ---------------------------------------------------------------- a run that is stopped

class Stop(BaseException):
    """What kill -9 leaves: nothing is caught, nothing is cleaned up."""


@pytest.fixture
def steps(here, monkeypatch):
    """
    What a run does, in its order: "start", a folder that is trained, "ask NAME"; before(n) stops it
    before its n-th. Models are real, and asked nothing.
    """
    made, stop_at = [], [None]

    def noted(name):
        if len(made) == stop_at[0]:
            raise Stop
        made.append(name)
    real = train.train, starts.cheapest

    def training(settings):
        noted(settings.name)
        return real[0](settings)

    def cheapest(*args):
        noted("start")
        return real[1](*args)

    def ask(name, suffix, args):
        noted(f"ask {name}{suffix}")
        return {
            **{key: report(name)[key] for key in ("samples", "few", "prompts", "cells")},
            "model": str(Path(args.out) / (name + suffix))}
    monkeypatch.setattr(train, "train", training)
    monkeypatch.setattr(starts, "cheapest", cheapest)
    monkeypatch.setattr(real_model, "ask", ask)
    monkeypatch.setattr(real_model, "ask_why", lambda name, suffix, args: noted(
        f"why {name}{suffix}") or {"oracle": {}})

    def before(n, *more):
        """What was done, up to the n-th of it; None: all."""
        made.clear()
        stop_at[0] = n
        try:
            do(*more, *STEPS)
        except Stop:
            pass
        return [*made]
    return before


ALL = ["start", "memory-0-text", "memory-0", "ask memory-0", "why memory-0",
       "memory-0-same", "ask memory-0-same", "why memory-0-same"]


def test_a_run_goes_on_from_wherever_it_was_stopped(steps):
    """Text read twice; a model that is asked before it is trained; the second for the first."""
    results = [Path(f"results/real-model/memory-0{suffix}.json") for suffix in ("", "-same")]
    assert steps(0, "--runs", "memory-0") == []
    for n in range(1, len(ALL)):
        assert steps(1, "--runs", "memory-0") == ALL[n - 1:n]
        assert [file.exists() for file in results] == [n >= 4, n >= 7], n
        assert real_model.missing("memory-0", flags()) == ["", "-same"][n >= 5:], n
        assert {path.name for path in Path("out/real-model").iterdir()} == {
            name for name in ALL[:n] if " " not in name}, n
    assert steps(None, "--runs", "memory-0") == ALL[7:]
    assert all("cells" in files.load(file) and "oracle" in files.load(file) for file in results)
    # only the start, which others share, and which took minutes, is still there
    assert [path.name for path in Path("out/real-model").iterdir()] == ["start"]
    assert steps(None, "--runs", "memory-0") == []
    assert steps(None, "--runs", "memory-1", "--out=elsewhere")[:2] == [  # as was chosen before
        "memory-1-text", "memory-1"]
    there, elsewhere = (files.load(f"{out}/start/start.json")
                        for out in ("out/real-model", "elsewhere"))
    assert there == elsewhere == files.load("results/real-model/start/start.json")

    for file, suffix, arl in zip(results, ("", "-same"), (0, 64)):
        report = files.load(file)
        assert (report["name"], report["arm"], report["seed"]) == (f"memory-0{suffix}", "memory", 0)
        assert report["model"] == f"out/real-model/memory-0{suffix}"
        tuning, text = report["tuning"], report["text"]
        assert tuning["train"]["settings"]["arl"] == arl and text["train"]["settings"]["arl"] == 64
        assert tuning["train"]["from"] == text["train"] and text["train"]["step"] == 2
        for part in tuning, text:
            assert set(part) == {"train", "losses", "held_out", "lengths", "shut"}
            assert list(part["losses"]) == ["1", "2"] and 1 < part["held_out"] < 20
        assert ("arl_loss" in tuning["losses"]["1"]) == bool(arl)


def test_models_are_kept_if_asked_to_be(steps):
    """Models that somebody wants to look at, and that are gone."""
    assert steps(None, "--runs", "convolution-0", "--keep") == [
        "start", "convolution-0-text", "convolution-0", "ask convolution-0", "why convolution-0",
        "convolution-0-same", "ask convolution-0-same", "why convolution-0-same"]
    folder = Path("out/real-model")
    assert {path.name for path in folder.iterdir()} == {
        "start", "start-plain", "convolution-0-text", "convolution-0", "convolution-0-same"}
    report = files.load("results/real-model/convolution-0.json")
    assert "lengths" not in report["tuning"]  # of a memory that has none
    assert Transformer.from_pretrained(folder / "convolution-0").config.memory == "convolution"

    # one of the two results is gone, and the models are there
    Path("results/real-model/convolution-0.json").unlink()
    assert steps(None, "--runs", "convolution-0", "--keep") == [
        "ask convolution-0", "why convolution-0"]
    assert steps(None, "--runs", "released-0") == [
        "released-0", "ask released-0", "why released-0"]
    assert "text" not in files.load("results/real-model/released-0.json")
    assert not (folder / "released-0").exists() and (folder / "convolution-0").exists()


# ---------------------------------------------------------------- what is asked

@pytest.fixture
def one_task(monkeypatch):
    monkeypatch.setattr(eval_niah, "choose_tasks", lambda *_: ["niah_single_1"])


def save_model(name, **changes):
    tiny(**TINY | changes).save_pretrained(f"out/real-model/{name}")
    return Path("out/real-model") / name


def kept_answers(name):
    with lzma.open(f"results/real-model/{name}.answers.xz", "rt") as file:
        return [json.loads(line) for line in file]


def test_a_model_is_asked_all_cells(here, one_task):
    """A cell of another method or prompt; answers that belong to no score."""
    save_model("memory-0-same", memory="decay")
    found = real_model.ask("memory-0", "-same", flags())
    assert found.keys() == {"samples", "few", "prompts", "cells"}
    size = ",block_size=8"
    assert list(found["cells"]) == [
        "dense", *(f"{kind}:budget=1/{n}{size}" for kind in ("quest", "moba") for n in (4, 8, 16)),
        *(f"snapkv:budget=1/{n},kernel=21,window=16" for n in (4, 8, 16)),
        "quest:budget=1/64,block_size=2"]
    assert (found["samples"], found["few"]) == (2, 1)

    # each cell is the mean score of the answers that are kept, of the prompts of seed 1000
    answers, examples = kept_answers("memory-0-same"), [
        niah.make_example("niah_single_1", 512, ByteTokenizer(), 1000, i, "sft",
                          max_new_tokens=niah.default_new_tokens(512, ByteTokenizer()))
        for i in range(2)]
    assert found["prompts"] == {"niah_single_1": niah.prompt_hash(examples)}
    assert len(answers) == 11 * 2 == len({tuple(line[:3]) for line in answers})
    for text, of_tasks in found["cells"].items():
        name = sparse.name(sparse.parse(text, 512))
        texts = [told for _, method, _, told in answers if method == name]
        assert [i for _, method, i, _ in answers if method == name] == [0, 1]
        expected = 100 * statistics.fmean(of_letters(told, None) for told in texts)
        assert of_tasks == {"niah_single_1": pytest.approx(expected, abs=0.01)}
    assert len({of["niah_single_1"] for of in found["cells"].values()}) > 8


def test_fewer_prompts_tell_why_as_an_evaluation_does(here, one_task, monkeypatch):
    """Another prompt, or H1 of another method; a draw that counts twice, or not at all."""
    monkeypatch.setattr(real_model, "CELLS", {kind: cells[:1]
                                              for kind, cells in real_model.CELLS.items()})
    folder = save_model("joint-0", n_layer=3)
    found = real_model.ask_why("joint-0", "", flags("--few=2"))
    asked = [text for text in found["few_cells"] if text != "dense"]
    eval_niah.main(["--ckpt", str(folder), "--protocol=sft", "--context_len=512", "--samples=2",
                    "--seed=1000", "--device=cpu", "--dtype=bfloat16", "--methods", *asked,
                    "--hits", "--random=5", "--tasks=niah_single_1", "--out=why"])
    report = files.load("why/results.json")
    means = reproduce.means(report)
    assert len(asked) == 3 and found["few_cells"] | found["by_chance"] == pytest.approx(
        means, abs=0.01)
    assert len(found["by_chance"]) == 3 and len({*means.values()}) > 5
    hits = {method: 100 * best_heads(rates)
            for method, rates in reproduce.hit_rates(report).items()}
    assert found["hits"] == pytest.approx(hits, abs=0.01) and len({*hits.values()}) > 1


def test_h1_is_a_mean_of_tasks(monkeypatch):
    """Tasks that count by their answers, or by none; MoBA asked, which selects for the prompt."""
    hit = {"a": [[1, 0]], "b": [[0, 0], [0, 1]], "c": []}  # answers by heads
    examples = [SimpleNamespace(task=task, ids=[0] * n) for n, task in enumerate("abcb")]

    def answer(model, tokenizer, some, methods, cache, selecting):
        assert not methods and cache == (None if len(some) == 3 else "kept")
        return {}, {m: [torch.tensor(hit[e.task]).view(-1, 1, 2).bool() for e in some]
                    for m in selecting}, "kept"
    monkeypatch.setattr(eval_niah, "answer", answer)
    methods = {"quest": sparse.Quest(), "moba": sparse.MoBA(), "snapkv": sparse.SnapKV()}
    of = real_model.hits_of(None, None, examples, methods, 3)
    assert of == {"quest": pytest.approx(50), "snapkv": pytest.approx(50)}  # of head 0: 1 and 0


def test_the_curve_is_asked_the_cells_alone_and_development_the_grid(here, one_task, monkeypatch):
    """Settings chosen on the prompts by which they are judged; prompts that tell nothing."""
    monkeypatch.setattr(real_model, "CELLS", QUEST)
    save_model("released-0-54x1e-4")
    found = real_model.ask("released-0-54x1e-4", "", flags())
    assert found.keys() == {"samples", "few", "prompts", "cells"}
    settings = files.load("out/real-model/released-0-54x1e-4/cells/results.json")["settings"]
    assert settings["seed"] == 100  # as steps and rate are chosen by it
    assert len(kept_answers("released-0-54x1e-4")) == 4 * 2

    save_model("joint-2")  # a seed that only counts
    assert real_model.ask("joint-2", "", flags()).keys() == {"samples", "few", "prompts", "cells"}
    settings = files.load("out/real-model/joint-2/cells/results.json")["settings"]
    assert settings["seed"] == 1000

    assert len(real_model.GRID) == len(set(real_model.GRID)) == 14
    for method in real_model.GRID:
        sparse.parse(method, 4096)
    monkeypatch.setattr(real_model, "GRID", ["snapkv:budget=1/8,kernel=5,window=16",
                                             "moba:budget=1/8,block_size=32"])
    folder = save_model("joint-100-same")
    found = real_model.ask("joint-100", "-same", flags())
    assert found.keys() == {"samples", "few", "prompts", "grid"}
    assert list(found["grid"]) == ["dense", *real_model.GRID]
    assert files.load(folder / "grid/results.json")["settings"]["seed"] == 100
    assert not list(Path("results").glob("*/joint-100*.xz"))


def test_asking_that_is_stopped_goes_on(here, monkeypatch):
    """Answers that are asked again, or those of a model that is not there any more."""
    monkeypatch.setattr(real_model, "CELLS", QUEST)
    tasks = ["niah_single_1", "niah_single_2", "niah_single_3"]
    monkeypatch.setattr(eval_niah, "choose_tasks", lambda *_: tasks)
    save_model("released-0-54x1e-4")
    asked, ask = [], eval_niah.ask

    def counted(model, tokenizer, examples, batch, *rest):
        if len(asked) == 1:
            asked.append(None)
            raise KeyboardInterrupt
        asked.append(batch.task)
        return ask(model, tokenizer, examples, batch, *rest)
    monkeypatch.setattr(eval_niah, "ask", counted)
    once = lambda: real_model.ask("released-0-54x1e-4", "", flags())
    with pytest.raises(SystemExit) as end:
        once()
    assert end.value.code == 130 and not Path("results").exists()
    assert once()["cells"].keys() == {"dense", *(f"{m},block_size=8" for m in QUEST["quest"]),
                                      "quest:budget=1/64,block_size=2"}
    assert asked == [tasks[0], None, *tasks[1:]]
    assert len(kept_answers("released-0-54x1e-4")) == 3 * 4 * 2


def by_hand(model, examples, method):
    """The score in percent."""
    outcome = ways.evaluate(model, ByteTokenizer(), examples, [method], 2)[method]
    return 100 * statistics.fmean(of_letters(text, None) for text in outcome.texts)


def test_besides_methods_a_frozen_draw_the_oracle_and_the_swap_are_asked(here, one_task):
    """A draw or a needle that is another prompt's; a swap of 1/4; a cell under another's name."""
    folder = save_model("memory-0", memory="decay")
    args = flags("--few=2")
    found = real_model.ask_why("memory-0", "", args)
    model = Transformer.from_pretrained(folder, torch.bfloat16)
    examples = [niah.make_example("niah_single_1", 512, ByteTokenizer(), 1000, i, "sft",
                                  max_new_tokens=48) for i in range(2)]
    assert found.keys() == {"hits", "few_cells", "by_chance", "frozen", "oracle", "needles",
                            "needles_left_out", "swap"}
    draws = [by_hand(model, examples, Frozen(128, 8, random=draw)) for draw in range(5)]
    assert len({*draws}) > 2 and found["frozen"] == pytest.approx(draws)
    assert list(found["oracle"]) == list(found["needles_left_out"]) and len(found["oracle"]) == 9
    needles, of_oracle = Needles(examples, ByteTokenizer()), set()
    for text in found["oracle"]:
        method = sparse.parse(text, 512)
        expected = by_hand(model, examples, oracle(method, needles))
        assert found["oracle"][text] == pytest.approx(expected), text
        assert found["needles_left_out"][text] == left_out(method, needles)
        of_oracle.add(expected)
    assert len(of_oracle) > 4 and len({*found["needles_left_out"].values()}) > 1

    assert found["needles"] == 2
    wanted = {text: sparse.parse(text, 512) for text in found["oracle"] if "1/8" in text}
    assert found["swap"].keys() == wanted.keys() and len(wanted) == 3
    both = swap.swapped(model)
    for name, method in wanted.items():
        cells = swap.cells(method)
        assert found["swap"][name].keys() == cells.keys() and len(cells) == 8
        assert found["swap"][name]["k~: k~, v~"] == pytest.approx(by_hand(model, examples, method))
        for cell in cells if name.startswith("snapkv") else ["k: k, v"]:
            assert found["swap"][name][cell] == pytest.approx(
                by_hand(both, examples, cells[cell])), cell


@pytest.mark.parametrize("memory", [None, "convolution"])
def test_without_an_average_there_is_nothing_to_swap(memory, here, one_task, monkeypatch):
    """A traceback at the end of a run without memory, or of a convolution."""
    monkeypatch.setattr(real_model, "CELLS", QUEST)
    save_model("joint-0", memory=memory)
    assert "swap" not in real_model.ask_why("joint-0", "", flags())


def test_a_whole_run_from_a_command(here, monkeypatch, capsys):
    """Parts that do not fit each other, or whose result cannot be written or read."""
    monkeypatch.setattr(real_model, "CELLS", QUEST)
    monkeypatch.setattr(real_model, "BUDGETS", ("1/4", "1/8"))
    monkeypatch.setattr(real_model, "PAPER", {})  # it has three
    monkeypatch.setattr(real_model, "DRAWS", 2)
    for name in "memory-0", "joint-0":
        do("--runs", name, *STEPS, "--samples=1")
    found = real_model.read_all(flags())
    assert {arm: list(of) for arm, of in found.items()} == dict.fromkeys(
        ["joint", "joint-same", "memory", "memory-same"], [0])
    here, there = (found[arm][0]["start"] for arm in ("memory", "joint"))
    assert here["long"] == there["long"] and here["start"]["kind"] != there["start"]["kind"]
    assert found["memory"][0]["swap"] and "swap" not in found["joint-same"][0]
    assert len(found["joint"][0]["cells"]) == 4 and sum(found["joint"][0]["frozen"]) > 0
    assert found["memory"][0]["command"].startswith("python -m experiments.real_model --init=model")
    capsys.readouterr()
    do("--runs", "memory-0")
    assert "memory-0: done already" in capsys.readouterr().out
    real_model.main([])
    rows = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    assert ["joint", "1"] in rows and ["memory-same", "1"] in rows
    assert ["S-1"] in rows  # the head of the tasks


# ---------------------------------------------------------------- tables

METHODS = ["dense", *(f"{kind}:budget=1/{n},block_size=64" for kind in ("quest", "moba")
                      for n in (4, 8, 16)),
           *(f"snapkv:budget=1/{n},kernel=21,window=16" for n in (4, 8, 16)),
           "quest:budget=1/64,block_size=16"]


def tuning_of(seed, first_sample="s{}", more={}, **other):
    settings = vars(train.parse(stages_of(f"joint-{seed}", flags(), [])[1][""])) | other
    return {"held_out": 2.0 + seed / 10, "train": {
        "settings": settings, "first_sample": first_sample.format(seed)}} | more


def report(name, scores=range(11), **more):
    """scores: of METHODS; two tasks are 1 above and below."""
    arm, seed, *_ = parts_of(name.removesuffix("-same"))
    cells = {method: {"a": score + 1.0, "b": score - 1.0}
             for method, score in zip(METHODS, scores)}
    return {"name": name, "arm": arm, "seed": seed, "tuning": tuning_of(seed),
            "samples": 2, "few": 1, "prompts": {"a": "p", "b": "p"}, "cells": cells} | more


def write(*reports):
    for of in reports:
        files.save(of, f"results/real-model/{of['name']}.json")


def of_kinds(dense, quest, moba, snapkv, extreme=0):
    """Scores whose mean over a method's budgets is as given."""
    return [dense, *(x + d for x in (quest, moba, snapkv) for d in (3, 1, -4)), extreme]


def test_results_are_by_arm_and_seed(tmp_path, monkeypatch):
    """The curve, the development or another number of steps in a mean of the plan's runs."""
    monkeypatch.chdir(tmp_path)
    curve = report("released-0-54x1e-4", samples=7)
    grid = report("joint-100", grid={})
    del grid["cells"]
    write(curve, grid, report("joint-1"), report("joint-1-same"), report("joint-0"),
          report("memory-joint-0"), report("memory-0-7x3e-4"), report("memory-0-7x3e-4-same"))
    found = real_model.read_all(flags())
    assert {arm: [of[seed]["name"] for seed in sorted(of)] for arm, of in found.items()} == {
        "joint": ["joint-0", "joint-1"], "joint-same": ["joint-1-same"],
        "memory-joint": ["memory-joint-0"]}


WHOLE = {"oracle": {}, "frozen": []}  # of a result that was asked why
START = {"long": [["10"]], "heads": [[0, 0]]}


@pytest.mark.parametrize("other, word", [
    (dict(samples=3), "what is asked, samples"), (dict(few=2), "what is asked, few"),
    (dict(prompts={"a": "p", "b": "o"}), "what is asked, prompts"),
    (dict(cells=report("joint-1")["cells"] | {"dilated": {}}), "what is asked, methods"),
    (dict(tuning=tuning_of(1, steps=2)), "tuning, steps"),
    (dict(tuning=tuning_of(1, clip=2.0)), "tuning, clip"),
    (dict(tuning=tuning_of(1, arl=64)), "tuning of joint, arl"),
    (dict(tuning=tuning_of(1, first_sample="s0")), "order of tuning, seed 1"),
    (dict(text=tuning_of(1, lr=2e-4)), "text, lr"),
    (dict(text=tuning_of(1, first_sample="other")), "order of text, seed 1"),
    (dict(start=START | {"heads": [[0, 1]]}), "heads of the start"),
    (dict(weights="other"), "weights"),
    (dict(start=START | {"long": [["01"]]}), "long of the start")])
def test_results_that_were_made_otherwise_do_not_mix(other, word, tmp_path, monkeypatch):
    """100 prompts beside 50, other methods, a trial of two steps, another order, another start."""
    monkeypatch.chdir(tmp_path)
    memory = report("memory-1", text=tuning_of(1), start=START, tuning=tuning_of(1, arl=64),
                    weights="w")
    write(report("dilated-0"), report("joint-0"), memory,
          report("joint-1", text=tuning_of(1, workers=3, later="a flag of another day"),
                 start={"long": START["long"]}))
    real_model.read_all(flags())
    write(report("joint-1", **other))
    refused(lambda: real_model.read_all(flags()), ".json is made otherwise than",
            f".json ({word}): give the same flags, or move one of them away")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"name": "joint-0", "cells": {}}'])
def test_a_damaged_result_is_named(content, tmp_path, monkeypatch):
    """A file of no bytes that is taken for a result, or a traceback."""
    monkeypatch.chdir(tmp_path)
    write(report("joint-0"))
    Path("results/real-model/joint-0.json").write_text(content)
    for call in (lambda: real_model.read_all(flags()),
                 lambda: real_model.missing("joint-0", flags())):
        refused(call, "joint-0.json", "move it away")


def test_what_is_missing_is_asked_for_by_suffix(tmp_path, monkeypatch):
    """A pass's result that stands for both."""
    monkeypatch.chdir(tmp_path)
    args = flags()
    assert real_model.missing("joint-0", args) == ["", "-same"]
    assert real_model.missing("continued-0", args) == real_model.missing("released-0", args) == [""]
    write(report("joint-0-same", oracle={}), report("joint-2"), report("joint-0-54x1e-4"))
    assert real_model.missing("joint-0", args) == [""]
    write(report("joint-0"))  # and was not asked why
    assert real_model.missing("joint-0", args) == [""]
    write(report("joint-0", oracle={}))
    for name in "joint-0", "joint-2":
        assert real_model.missing(name, args) == []
    assert real_model.missing("joint-0-54x1e-4", args) == ["-same"]
    assert real_model.missing("joint-1", args) == ["", "-same"]


def test_a_score_is_the_mean_of_three_budgets():
    """The extreme budget of 1/64 among Quest's, dense in a mean, another method's cells."""
    of = report("joint-0", of_kinds(99, 40, 60, 20, extreme=7))
    assert [real_model.score(of, kind) for kind in ("quest", "moba", "snapkv")] == [40, 60, 20]


# seed by seed: memory - joint is 1, 2, 3 of Quest, 1, 1, 1 of MoBA, 2, -1, 2 of SnapKV
JOINT = {seed: report(f"joint-{seed}", of_kinds(90, 40 + seed, 60, 20 - seed)) for seed in range(4)}
MEMORY = {seed: report(f"memory-{seed}", of_kinds(90, 41 + 2 * seed, 61, 20 - seed + gain))
          for seed, gain in ((5, 50), (0, 2), (2, 2), (1, -1))}


def test_contrasts_are_paired_by_seed_and_corrected_for_three_methods(monkeypatch):
    """Seeds that only one arm has, or in another order, or none of the plan's; too few tests."""
    arms = {"memory": MEMORY, "joint": JOINT, "memory-same": JOINT}
    early = real_model.contrasts(arms)["primary: memory - joint"]
    assert {kind: [*of] for kind, of in early.items()} == dict.fromkeys(
        ("quest", "moba", "snapkv"), ["gain", "interval", "by_seed"])  # three of eight
    monkeypatch.setattr(real_model, "SEEDS", range(3))
    made = real_model.contrasts(arms)
    assert [*made] == ["primary: memory - joint", "beside it: memory - dilated",
                       "exploratory: dilated - joint"]
    assert made["beside it: memory - dilated"] == {}
    quest, moba, snapkv = (made["primary: memory - joint"][kind]
                           for kind in ("quest", "moba", "snapkv"))
    assert [(of["gain"], sorted(of["by_seed"])) for of in (quest, moba, snapkv)] == [
        (2, [1, 2, 3]), (1, [1, 1, 1]), (1, [-1, 2, 2])]
    # t = 2 sqrt(3) and 1, of 2 degrees of freedom: p = 1 - t / sqrt(t ** 2 + 2)
    assert quest["p"] == pytest.approx(1 - (12 / 14) ** 0.5)
    assert snapkv["p"] == pytest.approx(1 - (1 / 3) ** 0.5)
    assert moba["p"] == 1 == moba["holm"]  # differences that do not differ
    assert quest["holm"] == pytest.approx(3 * quest["p"])
    assert snapkv["holm"] == pytest.approx(2 * snapkv["p"])
    outside = MEMORY | {7: report("memory-7", of_kinds(90, 99, 99, 99))}
    assert real_model.contrasts({"memory": outside, "joint": JOINT | {7: JOINT[0]}}) == made
    explored = real_model.contrasts({"dilated": MEMORY, "joint": JOINT})[[*made][2]]
    assert explored["quest"].keys() == {"gain", "interval", "by_seed"}  # and no p


def test_tables_are_of_all_arms_and_contrasts(monkeypatch):
    """A column under another's head, a deviation over tasks."""
    monkeypatch.setattr(real_model, "SEEDS", range(3))
    lines = real_model.tables({"joint": JOINT, "memory": MEMORY, "memory-same": {0: MEMORY[0]}})
    assert lines[0].split() == ["seeds", "dense", *(
        word for kind in ("quest", "moba", "snapkv") for n in ("1/4", "1/8", "1/16")
        for word in (kind, n)), "1/64"]
    assert lines[1].split() == ["joint", "4", "90.0±0.0", "44.5±1.3", "42.5±1.3",
                                "37.5±1.3", "63.0±0.0", "61.0±0.0", "56.0±0.0", "21.5±1.3",
                                "19.5±1.3", "14.5±1.3", "0.0±0.0"]
    assert lines[3].split() == ["memory-same", "1", "90.0", "44.0", "42.0", "37.0", "64.0",
                                "62.0", "57.0", "25.0", "23.0", "18.0", "0.0"]
    # 4.303 is t of two degrees of freedom, deviations are 1, 0 and sqrt(3)
    assert lines[4:7] == [
        "primary: memory - joint, quest: +2.0 [-0.5, +4.5] of 3 seeds   p 0.074, Holm 0.223",
        "primary: memory - joint, moba: +1.0 [+1.0, +1.0] of 3 seeds   p 1.000, Holm 1.000",
        "primary: memory - joint, snapkv: +1.0 [-3.3, +5.3] of 3 seeds   p 0.423, Holm 0.845"]
    assert len(lines) == 8 and lines[7].startswith("RULER's score")
    assert len({len(line) for line in lines[:4]}) == 1  # columns stand under their heads


def test_gains_are_told_task_by_task():
    """A task under another's head, one task's gain in all, another method's; seeds of one arm."""
    changed = {seed: report(f"memory-{seed}", of_kinds(90, 50, 60, 20)) for seed in range(2)}
    for cell in METHODS[4:7]:  # MoBA's, of two tasks
        changed[0]["cells"][cell]["a"] += 6
        changed[1]["cells"][cell]["a"] += 4
    plain = {seed: report(f"joint-{seed}", of_kinds(90, 50, 60, 20)) for seed in range(2)}
    more = {seed: report(f"joint-{seed}", of_kinds(0, 0, 0, 0)) for seed in (2, 9)}
    head, *lines, _ = real_model.gains_by_task({"joint": plain | more, "memory": changed})
    assert head.split() == ["a", "b"] and len(lines) == 6
    assert [line.split() for line in lines[::2]] == [
        ["joint", "quest", "51.0", "49.0"], ["joint", "moba", "61.0", "59.0"],
        ["joint", "snapkv", "21.0", "19.0"]]
    assert [line.split()[3:] for line in lines[1::2]] == [
        ["quest", *["+0.0±0.0"] * 2], ["moba", "+5.0±12.7", "+0.0±0.0"],  # t of one degree
        ["snapkv", *["+0.0±0.0"] * 2]]
    assert {len(line) for line in lines} == {len(head)}
    one = {0: changed[0]}
    _, *lines, _ = real_model.gains_by_task({"joint": plain, "memory": one, "dilated": one})
    assert [" ".join(line.split()[:-3]) for line in lines[:12:3]] == [
        "joint", "memory - joint", "dilated", "memory - dilated"]
    assert len(lines) == 15 and lines[-2].split()[3:] == ["moba", "+6.0", "+0.0"]
    assert len(real_model.gains_by_task({"joint": plain})) == 2


def test_gains_stand_beside_the_papers_by_budget():
    """A budget under another's head, a control that nobody ran, a seed that one arm has."""
    lines = real_model.beside_paper({"joint": JOINT, "memory": MEMORY})
    assert lines[0].split()[:4] == ["quest", "1/4", "quest", "1/8"]
    assert lines[1].split() == ["memory", "-", "joint", *["2.0±1.0"] * 3, *["1.0±0.0"] * 3,
                                *["1.0±1.7"] * 3]
    assert lines[2].split() == ["paper,", "RAT+", "7B", "6.2", "9.1", "7.4", "1.9", "10.5", "26.8",
                                "34.1", "40.0", "38.9"]
    assert lines[3].split()[-1] == "31.9" and len(lines) == 5
    assert len({len(line) for line in lines[:4]}) == 1  # columns stand under their heads
    changed = {seed: report(f"memory-{seed}", of_kinds(90, 50, 60, 20)) for seed in range(2)}
    changed[0]["cells"][METHODS[2]]["a"] += 8  # Quest at 1/8, of two tasks and two seeds
    of = lambda at: real_model.compared({"memory": changed, "joint": JOINT}, "memory", "joint",
                                        "quest", at)["gain"]
    assert of("1/8") == of("1/4") + 2 == of("1/16") + 2 == pytest.approx(of(None) + 4 / 3)


def test_the_figure_shows_each_seeds_gain(tmp_path):
    """A method's dots in another's panel, an interval of one seed, no seed at all."""
    pytest.importorskip("matplotlib")
    assert real_model.plot_gains({"joint": JOINT}, tmp_path / "gains.png") is None
    made = real_model.plot_gains({"joint": JOINT, "memory": MEMORY}, tmp_path / "gains.png")
    assert (tmp_path / "gains.png").exists()
    assert [panel.get_title() for panel in made.axes] == ["Quest", "MoBA", "SnapKV"]
    shown = [sorted(y for line in panel.lines if line.get_marker() == "." for y in line.get_ydata())
             for panel in made.axes]
    assert shown == [sorted([1, 2, 3] * 4), [1] * 12, sorted([2, -1, 2] * 4)]
    one = real_model.plot_gains({"joint": JOINT, "memory": {0: MEMORY[0]}}, tmp_path / "gains.png")
    assert len(one.axes) == 3


def test_losses_and_lengths_are_of_both_trainings():
    """Lengths before the fine-tuning in its place; a head that is not the third; a loss alone."""
    of = lambda *medians: {"lengths": {"0.5": [[x] for x in medians]}, "shut": 2.5}
    found = {
        "joint": {0: report("joint-0", text=tuning_of(3)), 5: report("joint-5")},
        "memory": {seed: report(f"memory-{seed}", text=tuning_of(0, more=of(9, 1, 5, 2)),
                                tuning=tuning_of(seed, more=of(3, 8 + seed, 7 + seed, 1)))
                   for seed in (0, 2)}}
    lines = real_model.memories(found)
    assert lines[0].split() == ["after", "continuing", "after", "fine-tuning"]
    assert lines[1].split() == ["seeds", *["loss", "long", "shut"] * 2]
    assert lines[2].split() == ["joint", "2", "2.300", "2.250"]
    assert lines[3].split() == ["memory", "2", "2.000", "5.0", "+0.500", "2.100", "8.0", "+0.400"]
    assert len({len(line) for line in (*lines[:2], lines[3])}) == 1 and len(lines) == 5


def test_what_tells_why_is_a_line_for_each_arm_and_method():
    """A column of another budget, a frozen draw of MoBA, a seed that was not asked in the mean."""
    def asked(plus, **more):
        methods = [text for text in METHODS if "1/64" not in text]
        of = lambda start: {text: start + plus + i for i, text in enumerate(methods)}
        hits = {text: x for text, x in of(10).items() if "moba" not in text}
        by_chance = {f"{text} by chance": x for text, x in of(50).items() if "1/4" in text}
        return {"oracle": of(30), "hits": hits, "few_cells": of(20), "by_chance": by_chance,
                "frozen": [plus, plus + 3.0]} | more

    quest, moba = (next(text for text in METHODS if text.startswith(f"{kind}:budget=1/8"))
                   for kind in ("quest", "moba"))
    swaps = [{"swap": {quest: {"k: k, v": x, "k: k~, v": 1.0}, moba: {"k: k, v": 7.0}}}
             for x in (3.0, 4.0)]
    found = {"joint": {0: asked(0.0), 5: {}}, "continued": {5: {}},
             "memory": {0: asked(0.0, **swaps[0]), 1: asked(2.0, **swaps[1])}}
    assert len({len(line) for line in real_model.why(found)[:7]}) == 1  # columns under their heads
    lines = [line.split() for line in real_model.why(found)]
    assert lines[0][:5] == ["seeds", "H1", "1/4", "H1", "1/8"]
    first = {"quest": 1, "moba": 4, "snapkv": 7}  # where its 1/4 stands among METHODS
    for line, (arm, kind) in zip(lines[1:], itertools.product(["joint", "memory"], first)):
        i, plus, seeds = first[kind], *((1, 2) if arm == "memory" else (0, 1))
        starts = [10] * (kind != "moba") + [20, 30]
        cells = [start + i + n for start in starts for n in range(3)]
        cells += [50 + i] + [1.5] * (kind == "quest")
        assert line == [arm, str(seeds), kind, *(f"{x + plus:.1f}" for x in cells)]
    assert [" ".join(line) for line in lines[8:10]] == [
        "memory quest 1/8 k: k, v 3.5; k: k~, v 1.0", "memory moba 1/8 k: k, v 7.0"]
    assert real_model.why({"joint": {5: {}}}) == []


# ---------------------------------------------------------------- all runs, and refusals

def test_all_that_is_missing_is_a_process_each_and_a_table(here, monkeypatch, capsys):
    """Flags lost on the way; two processes that make one start; what is there made again."""
    made, started = [], []
    monkeypatch.setattr(starts, "started", lambda *of, like: started.append(
        (len(made), *of, like)) or Path("chosen"))
    chosen = START | {"start": {}, "weights": "w"}
    files.save(chosen, "chosen/start.json")
    record = Path("results/real-model/start/start.json")

    def on_all_gpus(jobs, per_gpu):
        assert per_gpu == 3
        for job in jobs:
            job(lambda words, log: made.append((words, log)))
        write(*(report(name, **WHOLE) for name in ("memory-0", "memory-1", "memory-1-same")))
    monkeypatch.setattr(runs, "on_all_gpus", on_all_gpus)
    write(*(report(name, **WHOLE) for name in ("joint-0", "joint-0-same", "memory-0-same")))
    do("--runs", "memory-1", "memory-0", "joint-0", "memory-1", "--keep", "--out=o", "--workers=0",
       "--per_gpu=3")
    assert [log for _, log in made] == [Path("o/memory-1.log"), Path("o/memory-0.log")]
    words = made[1][0]
    args, rest = real_model.flags().parse_known_args(words[1:])
    assert words[0] == "experiments/real_model.py" and rest == ["--workers=0"]
    assert args == flags("--runs", "memory-0", "--keep", "--out=o")
    memory = real_model.START, "model", "shards", Path("o/start"), "cpu", 512
    assert started == [(0, *memory, None), (0, *memory, record)]
    assert files.load(record) == chosen
    assert "memory-same" in capsys.readouterr().out
    made.clear(), started.clear()
    do("--runs", "memory-1", "joint-0", "--per_gpu=3")
    assert made == started == [] and "memory-same" in capsys.readouterr().out
    monkeypatch.setattr(real_model, "GRID", ["moba:budget=1/8,block_size=32"])  # of 512 tokens
    do("--stages", "others", "develop", "--per_gpu=3")
    plain = real_model.PLAIN, "model", "shards", Path("out/real-model/start-plain"), "cpu", 512
    assert (0, *plain, record) in started and not any(like is None for *_, like in started)
    words = [words for words, _ in made]
    assert [line[-1] for line in words] == [f"--runs={name}" for stage in ("others", "develop")
                                            for name in STAGES[stage]]
    assert not any("--keep" in line for line in words)


@pytest.fixture
def refusal(here, capsys, monkeypatch):
    """The line by which flags end the command, before anything is trained."""
    monkeypatch.setattr(train.parallel, "make_model", lambda *_: pytest.fail("trained"))
    monkeypatch.setattr(starts, "cheapest", lambda *_: pytest.fail("a start was looked for"))
    monkeypatch.setattr(runs, "subprocess", None)  # no run may start

    def line(*flags):
        with pytest.raises(SystemExit) as end:
            real_model.main([*flags])
        told = capsys.readouterr().err
        assert end.value.code == 2 and told.count("\n") == 1, told
        return told
    return line


@pytest.mark.parametrize("flags, word", [
    ("--runs memroy-0", "memroy-0 is no run"),
    ("--runs memory-0-same", "memory-0-same is no run"),
    ("--stages primry", "primry"),
    ("--runs joint-0 --init=nowhere", "nowhere"),
    ("--runs memory-0 --init=nowhere", "nowhere"),
    ("--runs memory-0 --data=nowhere", "no .bin shards"),
    ("--runs released-0 --data=nowhere", "no .bin shards"),
    ("--runs released-0 --data=text.txt", "text.txt is a file"),
    ("--runs joint-0 memory-0 --data=nowhere", "no .bin shards"),
    ("--runs joint-0 --results=text.txt", "--results text.txt is no folder"),
    ("--runs joint-0 joint-1 --results=text.txt", "--results text.txt is no folder"),
    ("--runs memory-0 --frobnicate", "--frobnicate"),
    ("--runs joint-0 memory-0 --frobnicate", "--frobnicate"),
    ("--runs memory-0 --memory=off", "--memory=off: not here"),
    ("--runs joint-0 joint-1 --arl=64", "--arl=64: not here"),
    ("--runs joint-0 --seed 3", "--seed: not here"),
    ("--runs joint-0 --lr=1e-3", "--lr=1e-3: not here"),
    ("--runs released-0-54x1e-4 --steps=7", "--steps: released-0-54x1e-4"),
    ("--stage primary", "--stage: no flag of ours"),
    ("--runs joint-100", "budget=64 must exceed window=64"),  # the grid, in 512 tokens
    ("--runs joint-0 --min_lr=4e-4", "--min_lr"),  # above the fine-tuning's rate alone
    ("--runs joint-0 --samples=0", "--samples"),
    ("", "holds no result: name --stages or --runs"),
])
def test_a_wrong_flag_is_one_line_before_any_training(flags, word, refusal):
    """A traceback, or a training of which nothing can be asked or written."""
    assert word in refusal(*TRIAL, *flags.split())


def test_a_run_wants_a_model_and_text(refusal):
    """A traceback of None."""
    for given in "--init=model", "--data=shards":
        assert "--init and --data" in refusal(given, "--runs", "joint-0")


def test_what_is_there_is_known_before_any_training(refusal):
    """A table that is refused when all are trained, and their models deleted."""
    write(report("joint-0", samples=3))
    told = refusal(*TRIAL, "--runs", "memory-0", "memory-1")
    assert "joint-0, asked with --samples=3 --few=1" in told
    write(report("joint-0", oracle={}))
    told = refusal(*TRIAL, "--runs", "joint-1", "--steps=7")
    assert "joint-1 is made otherwise than results/real-model/joint-0.json (tuning, " \
           "steps): give the same flags" in told
    write(report("joint-0", oracle={}), report("released-0-54x1e-4", samples=7, few=7),
          report("joint-0-2x1e-4", samples=7))  # no run of the plan
    told = refusal(*TRIAL, "--runs", "memory-0", "memory-1")
    assert "released-0-54x1e-4, asked with --samples=7 --few=7" in told
    write(report("released-0-54x1e-4"))
    write(report("joint-0", oracle={}, prompts={"niah_single_2": "of another Python"}))
    told = refusal(*TRIAL, "--runs", "memory-0")
    assert "joint-0.json was asked other prompts" in told and "version of Python" in told
    write(report("joint-0", oracle={}))
    write(report("joint-1", few=7))
    told = refusal(*TRIAL, "--runs", "memory-0", "memory-1")
    assert "joint-1.json is made otherwise" in told
    Path("results/real-model/joint-1.json").write_text("{")
    assert "joint-1.json is damaged" in refusal(*TRIAL, "--runs", "memory-0", "memory-1")
    assert "joint-1.json is damaged" in refusal(*TRIAL, "--runs", "joint-1")


def test_what_is_chosen_by_is_told(here, monkeypatch, capsys):
    """A curve that nobody can read; a table that ends the first command of the plan badly."""
    curve = [report(f"released-0-{n}x1e-4", of_kinds(90, score, score + 5, score + 25))
             for n, score in ((54, 30), (160, 42))]
    write(*curve, {key: value for key, value in report("joint-100").items() if key != "cells"}
          | {"grid": {"moba:budget=1/8,block_size=32": {"a": 40.0, "b": 50.0}}})
    figures, draw = [], real_model.plot_curve
    monkeypatch.setattr(real_model, "plot_curve", lambda *args: figures.append(draw(*args)))
    real_model.main(["--results=results/real-model"])
    told = [line.split() for line in capsys.readouterr().out.splitlines() if "no plot" not in line]
    assert told == [
        ["dense", "quest", "moba", "snapkv", "nine", "text"],
        ["released-0-54x1e-4", "90.0", "30.0", "35.0", "55.0", "40.0", "2.000"],
        ["released-0-160x1e-4", "90.0", "42.0", "47.0", "67.0", "52.0", "2.000"],
        ["joint-100", "moba:budget=1/8,block_size=32", "45.0"]]
    if figure := figures[0]:  # matplotlib is there
        assert Path("results/real-model/curve.png").exists()
        [panel] = figure.axes
        assert [[*line.get_xdata()] for line in panel.lines] == [[54, 160]] * 5
        assert [tuple(line.get_ydata()) for line in panel.lines] == [
            (90, 90), (30, 42), (35, 47), (55, 67), (40, 52)]


def test_the_curve_is_told_when_settings_have_been_chosen_by_it(here, monkeypatch, capsys):
    """No table at all, from the day on which the development has chosen another kernel."""
    write(report("released-0-54x1e-4", of_kinds(90, 30, 35, 55)))
    monkeypatch.setitem(real_model.CELLS, "snapkv", ["snapkv:budget=1/4,kernel=5,window=64"])
    real_model.main(["--results=results/real-model"])
    assert capsys.readouterr().out.split()[-7:-1] == [
        "released-0-54x1e-4", "90.0", "30.0", "35.0", "55.0", "40.0"]


def test_results_of_other_settings_are_named(here, monkeypatch):
    """A mean of no cells, once the grid has changed a kernel."""
    write(report("joint-0"))
    monkeypatch.setitem(real_model.CELLS, "snapkv", ["snapkv:budget=1/4,kernel=5,window=64"])
    refused(lambda: real_model.read_all(flags()), "joint-0.json", "other settings", "move it away")
