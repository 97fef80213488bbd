"""
experiments/conversion.py: where gates start and what that costs, by hand; each run made once; what
would end a run after hours known before.
"""
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from conftest import LLAMA_FORM, refused, tiny
from torch.nn import functional as F

import train
from data import Shards
from experiments import conversion, runs, starts
from experiments.conversion import LONG, PLAN
from experiments.starts import Start
from infra import files
from memory import effective_length
from model import Transformer
from triton_ops import backend

TINY = LLAMA_FORM | dict(vocab_size=257, n_head=4, n_kv_head=2, width=32, context_len=128)


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    monkeypatch.setattr(backend, "choice", "torch")


@pytest.fixture
def here(beginnings):
    beginnings()


TRIAL = ["--init=model", "--data=shards", "--context_len=64", "--device=cpu"]
STEPS = ["--steps=3", "--batch=2", "--compile=off"]


def convert(*flags):
    conversion.main([*TRIAL, *flags])


@pytest.fixture
def refusal(here, capsys, monkeypatch):
    """The line by which flags end the command, before anything is trained."""
    monkeypatch.setattr(train.parallel, "make_model", lambda *_: pytest.fail("trained"))
    monkeypatch.setattr(runs, "subprocess", None)

    def line(*flags):
        with pytest.raises(SystemExit) as end:
            convert(*flags)
        told = capsys.readouterr().err
        assert end.value.code == 2 and told.count("\n") == 1, told
        return told
    return line


# ---------------------------------------------------------------- what is measured

@torch.no_grad()
def test_held_out_loss_and_lengths_are_those_of_each_window(here):
    """Text that was trained on; a last batch of two that weighs as much as one of three."""
    model = tiny(**TINY | dict(memory="decay"))
    shards = Shards("shards", 16, seed=0, split="val")
    assert len(shards) >= 3
    inputs, losses = [[] for _ in model.layers], []
    hooks = [layer.self_attn.memory.register_forward_pre_hook(
        lambda memory, args, of_layer=of_layer: of_layer.append(
            effective_length(memory.gate(args[0]))))
        for layer, of_layer in zip(model.layers, inputs)]
    for i in range(3):
        tokens = torch.from_numpy(shards.sample(i))[None]
        losses.append(F.cross_entropy(model(tokens[:, :-1])[0], tokens[0, 1:]).item())
    for hook in hooks:
        hook.remove()
    loss, lengths = conversion.on_text(model, "shards", 16, windows=3, batch=2)
    assert loss == pytest.approx(sum(losses) / 3, abs=1e-5)
    assert lengths.shape == (2, 2, 8)
    torch.testing.assert_close(lengths, torch.stack([torch.stack(x).mean(0) for x in inputs]))
    assert conversion.on_text(tiny(**TINY), "shards", 16, windows=3)[1] is None
    assert conversion.on_text(tiny(**TINY | dict(memory="convolution")), "shards", 16,
                              windows=1)[1] is None


def test_quartiles_are_of_each_head_s_channels():
    """Those of a layer, or a mean for a median."""
    lengths = torch.tensor([[[1.0, 2, 3, 4, 100], [5, 5, 5, 5, 5]], [[9, 8, 7, 6, 5],
                                                                     [1, 1, 2, 2, 2]]])
    assert conversion.quartiles(lengths) == {
        "0.25": [[2, 5], [6, 1]], "0.5": [[3, 5], [7, 2]], "0.75": [[4, 5], [8, 2]]}


def test_losses_are_means_since_the_point_before(tmp_path):
    """A mean that reaches into other steps, or stumbles over a step that was skipped."""
    log = [{"step": n, "loss": float(n), "arl_loss": 2.0 * n} for n in range(1, 10)]
    log[4]["loss"] = None  # not finite
    write = lambda: (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, log)))
    write()
    assert conversion.losses(tmp_path, points=3) == {
        3: {"loss": 2, "arl_loss": 4}, 6: {"loss": 5, "arl_loss": 10},
        9: {"loss": 8, "arl_loss": 16}}
    log[1:] = [{"step": 2, "loss": None, "joint_loss": 7.00004}]
    write()
    assert conversion.losses(tmp_path) == {1: {"loss": 1, "arl_loss": 2}, 2: {"joint_loss": 7}}


def settings_of(steps, lr, **more):
    return {"settings": {"steps": steps, "lr": lr, "batch": 2, "context_len": 64, "data": "shards"}
            | more}


def report_of(lengths=None, **losses):
    found = {"name": "third", "held_out": 2.34567, "losses": {"1": {"loss": 9.0}, "2": losses},
             "train": settings_of(3, 1e-3)}
    return found | ({"lengths": {"0.25": [], "0.5": lengths}} if lengths else {})


def test_a_line_counts_long_heads_and_tells_the_newest_losses():
    """The first losses, heads of one layer, 15.9 tokens that are long or 16 that are not."""
    heads = [[15.9, 40.25], [16.0, 1.5]]
    words = conversion.line(report_of(heads, loss=2.0, arl_loss=3.0), 1.256).split()
    assert words == ["third", "2.3457", "+1.26", "-", "2.0000", "3.0000", "2", "of", "4", "16.0",
                     "40.2"]
    assert LONG == 16
    words = conversion.line(report_of(loss=2.0, joint_loss=4.0) | {"shut": 2.5}, math.nan).split()
    assert words == ["third", "2.3457", "-", "2.5000", "2.0000", "4.0000"]


# ---------------------------------------------------------------- runs

def plan(name, *rest):
    args = conversion.flags().parse_args([*TRIAL, "--out=o"])
    return train.parse(conversion.flags_of(name, args, [*rest]))


def test_every_conversion_is_what_its_name_says():
    """A rate or a pass that is another's; a control that has a memory, or fewer steps."""
    slow = {"slow": 1e-4, "slower": 3e-5, "slowest": 1e-5}
    shorter = {"18": dict(heads=0.34, length=18), "20": dict(heads=0.35, length=20),
               "two": dict(heads=0.7)}
    for name, (start, _) in PLAN.items():
        args, words = plan(name, "--batch=2"), name.split("-")
        control = words[0] in ("joint", "dilated")
        joint = "joint" in words
        assert (args.joint, args.arl) == ((64, 0) if joint else (0, 64)), name
        assert args.arl_weight == (0.1 if "light" in words else 1), name
        assert args.lr == next((float(rate) for rate in ("1e-3", "2e-3") if rate in name), 5e-4)
        if name == "half":
            assert start is None and (args.init, args.memory) == ("model", "on")
            assert (args.gate_start, args.memory_lr) == (0.5, 5e-3)
        elif control:
            assert start == Start(kind=None) and args.memory == "off", name
        else:
            kind = next((word for word in ("keys", "values") if word in words), "decay")
            [of] = [shorter[word] for word in words if word in shorter] or [{}]
            assert (start, args.memory) == (Start(kind, **of), None), name
            assert args.memory_lr == next((slow[word] for word in words if word in slow), 5e-4)
        assert args.init == ("model" if start is None else conversion.folder_of(start, args))
        assert (args.data, args.context_len, args.steps, args.batch, args.seed) == (
            "shards", 64, 381, 2, 0)
        assert (args.out, args.name, args.resume, args.eval_every) == ("o", name, True, 0)
        assert args.save_every > args.steps and args.min_lr == 0
    starts = {start for start, _ in PLAN.values() if start}
    assert len({conversion.folder_of(start, args) for start in starts}) == len(starts)
    for word in ("--memory=off", "--arl=0", "--joint=64", "--seed=1", "--name=x", "--lr=1",
                 "--arl_weight=2", "--memory_lr=1", "--gate_start=0.1", "--recipe=micro"):
        refused(lambda: plan("third", word), word)


def test_a_conversion_is_made_once_and_goes_on(here, monkeypatch, capsys):
    """A second call that trains again, or a first that cannot go on once its text is read."""
    name = "third-keys-slow-light"
    result = Path(f"results/conversion/{name}.json")
    with monkeypatch.context() as patch:  # killed after the training
        patch.setattr(conversion, "on_text", lambda *_: pytest.fail("asked"))
        with pytest.raises(pytest.fail.Exception, match="asked"):
            convert("--runs", name, *STEPS)
    assert not result.exists()
    monkeypatch.setattr(train, "train", lambda args: pytest.fail("trained again"))
    convert("--runs", name, "--keep", *STEPS)
    report, run = files.load(result), Path("out/conversion") / name
    loss, lengths = conversion.on_text(Transformer.from_pretrained(run, torch.bfloat16), "shards",
                                       64)
    assert report["held_out"] == pytest.approx(loss, abs=1e-6)
    trained = Transformer.from_pretrained(run, torch.bfloat16)
    plain = tiny(**TINY).to(torch.bfloat16)  # the same but for its memory
    plain.load_state_dict({name: tensor for name, tensor in trained.state_dict().items()
                           if ".memory." not in name})
    expected, _ = conversion.on_text(plain, "shards", 64)
    assert report["shut"] == pytest.approx(expected, abs=2e-3)
    assert abs(report["shut"] - report["held_out"]) > 1e-4
    assert report["lengths"] == conversion.quartiles(lengths)
    assert list(report["losses"]) == ["1", "2", "3"]
    assert report["losses"]["1"].keys() == {"loss", "arl_loss"}
    start = "out/conversion/start-keys-0.4-0.53-32"
    assert report["train"]["settings"]["init"] == start and report["train"]["step"] == 3
    assert report["start"] == files.load(f"{start}/start.json")
    assert report["start"]["start"]["kind"] == "keys"
    assert f"{report['held_out']:.4f}" in capsys.readouterr().out
    result.unlink()
    convert("--runs", name, *STEPS)
    assert not run.exists() and files.load(result)["held_out"] == report["held_out"]
    monkeypatch.setattr(conversion, "on_text", None)
    written = result.stat().st_mtime_ns
    convert("--runs", name, name, *STEPS)  # named twice, it is one
    assert "done already" in capsys.readouterr().out and result.stat().st_mtime_ns == written


def test_a_loss_is_compared_with_joint_of_the_same_rate_and_steps():
    """The other rate's control, or a run of other steps; a control's loss that is a hundredth."""
    def of(name, held_out, lr, steps=3, **more):
        return report_of() | {"name": name, "held_out": held_out,
                              "train": settings_of(steps, lr, **more)}
    reports = [of("joint", 2.0, 5e-4, steps=2), of("joint", 2.1, 5e-4, batch=4),
               of("joint", 2.2, 5e-4, context_len=32), of("joint", 2.3, 5e-4, data="others"),
               of("joint", 2.5, 5e-4), of("joint-2e-3", 4.0, 2e-3), of("dilated", 3.0, 1e-3)]
    assert conversion.above(of("third", 3.0, 5e-4), reports) == pytest.approx(20)
    assert conversion.above(of("third", 3.0, 2e-3), reports) == pytest.approx(-25)
    assert math.isnan(conversion.above(of("third", 3.0, 1e-3), reports))


def test_what_is_there_is_a_table_and_a_plot(tmp_path, capsys, monkeypatch):
    """A table that needs a model, leaves out what the plan has no more, or stands in another order;
    bars of the loss itself, lengths that ascend; a flag that is passed on to nobody."""
    def tell(*words):
        args, rest = conversion.flags().parse_known_args([f"--results={tmp_path}", *words])
        conversion.run_all(args, rest)
    refused(tell, str(tmp_path), "no result", "--init")
    for words in ("--runs=joint",), ("--init=model",), ("--data=shards",):
        refused(lambda: tell(*words), "--init and --data")
    refused(lambda: tell("--steps=3"), "--steps", "no flag of ours")
    reports = [report_of([[20.0, 1.0]], loss=2.0) | {"name": name, "held_out": held_out}
               for name, held_out in (("third", 2.5), ("joint", 2.0), ("first-of-all", 3.0))]
    for report in reports:
        files.save(report, tmp_path / f"{report['name']}.json")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    tell()
    rows = [row.split() for row in capsys.readouterr().out.splitlines()]
    assert [row[:3] for row in rows[1:4]] == [["joint", "2.0000", "+0.00"], [
        "third", "2.5000", "+25.00"], ["first-of-all", "3.0000", "+50.00"]]
    assert " ".join(rows[-1]) == "no plot: pip install matplotlib"
    monkeypatch.undo()
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    cost, length = conversion.plot(reports, tmp_path / "a.png").axes
    assert [bar.get_width() for bar in cost.patches] == pytest.approx([25, 0, 50])
    assert [label.get_text() for label in cost.get_yticklabels()] == [x["name"] for x in reports]
    assert list(length.lines[0].get_ydata()) == [20, 1]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_several_are_a_process_each_and_a_table(here, monkeypatch, capsys):
    """Flags that are lost on the way, what is there made again, a row that is another's."""
    made = []

    def on_all_gpus(jobs):
        for job in jobs:
            job(lambda words, log: made.append((words, log)))
        for name, loss in ("third", 2.0), ("joint", 3.0):
            files.save(report_of(loss=loss) | {"name": name}, f"results/conversion/{name}.json")
    monkeypatch.setattr(runs, "on_all_gpus", on_all_gpus)
    both = ["--runs", "third", "joint", "third", "--keep", "--steps=3"]
    convert(*both)
    assert [log for _, log in made] == [Path("out/conversion/third.log"),
                                        Path("out/conversion/joint.log")]
    words = made[0][0]
    args, rest = conversion.flags().parse_known_args(words[1:])
    assert words[0] == "experiments/conversion.py" and rest == ["--steps=3"]
    assert args == conversion.flags().parse_args([*TRIAL, "--keep", "--runs", "third"])
    rows = [line.split()[:4] for line in capsys.readouterr().out.splitlines()]
    assert ["third", "2.3457", "+0.00", "-"] in rows and "joint" in [row[0] for row in rows]
    assert Path("out/conversion/start-decay-0.4-0.53-32/start.json").exists()  # before the runs
    made.clear()
    convert(*both)
    assert made == []


@pytest.mark.parametrize("flags, word", [
    (["--runs", "thrid"], "thrid"),
    (["--runs", "joint", "--init=nowhere"], "nowhere"),
    (["--runs", "third", "--init=nowhere"], "nowhere"),
    (["--runs", "joint", "--data=nowhere"], "no .bin shards"),
    (["--runs", "third", "--data=nowhere"], "no .bin shards"),
    (["--runs", "third", "--frobnicate"], "--frobnicate"),
    (["--runs", "third", "--memory=off"], "--memory=off"),
    (["--runs", "third", "--results=text.txt"], "--results text.txt is no folder"),
    (["--runs", "third", "joint", "--results=text.txt"], "--results text.txt is no folder"),
    (["--runs", "third", "--context_len=4000"], "context_len 4000"),
])
def test_a_wrong_flag_is_one_line_before_any_training(flags, word, refusal, monkeypatch):
    """A traceback; minutes in which a start is found for a run that cannot begin."""
    monkeypatch.setattr(starts, "cheapest", lambda *_: pytest.fail("a start was looked for"))
    assert word in refusal(*flags)


@pytest.mark.parametrize("names", [["third"], ["joint", "third"]])
@pytest.mark.parametrize("content", ['{"held_out": 2.0, "los', "{}", "[]", ""])
def test_a_damaged_result_is_named_before_any_training(content, names, refusal):
    """A file of no bytes that is taken for a result, and a table that fails hours later."""
    file = Path("results/conversion/third.json")
    file.parent.mkdir(parents=True)
    file.write_text(content)
    told = refusal("--runs", *names)
    assert str(file) in told and "move it away" in told
