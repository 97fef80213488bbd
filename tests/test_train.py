"""
train.py: the schedule, resuming, accumulation and processes all leave the same numbers. Tiny models, a few steps.
"""
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import data
import eval_niah
import niah
from infra import files, runlog, shards, tokenizers
import train
from infra import weights
from conftest import ORACLE, draw_tokens
from conftest import tiny as tiny_model
from model import PRESETS, Config, Transformer
from sparse import Dilated

TRAIN = Path(__file__).parent.parent / "train.py"
TINY = Config(257, n_layer=1, width=32, n_head=2, n_kv_head=2, mlp_width=64, context_len=512, eos_id=256)
BASE = ["--preset=pico", "--memory=on", "--arl=16", "--tasks", "niah_single_1", "--drills=0.5", "--steps=4", "--batch=4",
        "--log_every=1", "--eval_every=4", "--save_every=2", "--device=cpu"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch, tmp_path):
    monkeypatch.setitem(PRESETS, "pico", TINY)
    monkeypatch.chdir(tmp_path)


def run(*flags):
    return train.train(train.parse([*BASE, *flags]))


def log_of(name):
    """Without what is another number each time."""
    rows = [json.loads(line) for line in Path("out", name, "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.endswith("second") and not key.endswith("seconds")} for row in rows]


def assert_same_files(a, b):
    for name in "model.safetensors", "optimizer.safetensors":
        a_tensors, b_tensors = load_file(a / name), load_file(b / name)
        assert a_tensors.keys() == b_tensors.keys()
        for key in a_tensors:
            assert torch.equal(a_tensors[key], b_tensors[key]), key


def test_learning_rate_is_the_official_schedule():
    """An off-by-one in warm-up or cosine would train other models than the paper's."""
    official = json.loads((ORACLE / "ratplus.json").read_text())["lr_schedule"]
    args = train.parse(["--preset=pico", f"--steps={official['steps']}", f"--lr={official['base']}",
                        f"--min_lr={official['min']}", f"--warmup={official['warmup']}"])
    ours = [train.learning_rate(step, args) * args.lr for step in range(official["steps"])]
    assert ours == pytest.approx(official["lr"][:official["steps"]], rel=1e-6)


PAPER = {  # arXiv 2605.28640 and 2602.18196; (c): the configs of official RAT+
    "olmo2-continue": dict(tokens=10e9, batch=768, context_len=4096, lr=6e-5, memory_lr=6e-4, warmup=0.02, weight_decay=0.1, arl=64,
                           min_lr=1e-6),                                                                        # (c) min_lr
    "niah-sft": dict(tokens=7e6, batch=32, context_len=4096, lr=1e-5, memory_lr=1e-5, arl=0, protocol="sft", other_weight=0.0,
                     weight_decay=0.01, warmup=0.05, min_lr=1e-6),                                              # (c) this line
    "ratplus-1b": dict(tokens=110e9, batch=512, context_len=4096, lr=8e-4, memory_lr=8e-4, warmup=0.05, weight_decay=0.1, arl=64, min_lr=1e-6),
    "ratplus-7b": dict(tokens=110e9, batch=768, context_len=4096, lr=6e-4, memory_lr=6e-4, warmup=0.05, weight_decay=0.1, arl=64, min_lr=1e-6),
    "ratplus-1b-adapt": dict(tokens=1e9, batch=512, context_len=4096, lr=8e-5, memory_lr=8e-5, warmup=0.0, weight_decay=0.1, arl=0, min_lr=1e-6,
                             adapt="dilated:dilation=16,local=256,initial=4"),
    "ratplus-7b-adapt": dict(tokens=1e9, batch=768, context_len=4096, lr=2e-5, memory_lr=2e-5, warmup=0.02, weight_decay=0.1, arl=0, min_lr=1e-6,
                             adapt="dilated:dilation=16,local=256,initial=4"),
}


@pytest.mark.parametrize("recipe", PAPER)
def test_recipes_are_the_papers(recipe):
    """A digit of the paper's settings lost, or a default that has changed under a recipe."""
    source = [] if recipe in ("ratplus-1b", "ratplus-7b") else ["--init=x"]
    args = train.parse([f"--recipe={recipe}", "--data=niah" if recipe == "niah-sft" else "--data=x", *source])
    wanted = dict(PAPER[recipe])
    assert args.steps * args.batch * args.context_len == pytest.approx(wanted.pop("tokens"), rel=0.02)
    assert {key: getattr(args, key) for key in wanted} == wanted
    assert args.clip == 1.0 and train.make_optimizer(torch.nn.Linear(1, 1), args).defaults["betas"] == (0.9, 0.95)  # (c)
    assert args.memory == ("on" if recipe == "olmo2-continue" else None)


def test_adaptation_trains_and_validates_through_the_pattern(monkeypatch):
    """A model adapted to its pattern in name only."""
    seen, forward, score = set(), train.parallel.Loss.forward, Transformer.score
    monkeypatch.setattr(train.parallel.Loss, "forward", lambda self, *args: seen.add(self.method) or forward(self, *args))
    monkeypatch.setattr(Transformer, "score", lambda self, tokens, weight, method: seen.add(("score", method)) or score(self, tokens, weight, method))
    run("--name=adapt", "--arl=0", "--adapt=dilated:dilation=16,local=32,initial=4", "--steps=2")
    pattern = Dilated(dilation=16, local=32, initial=4)
    assert seen == {pattern, ("score", pattern)}
    with pytest.raises(ValueError, match="dilated"):
        run("--name=other", "--arl=0", "--adapt=quest:budget=1/4")


def test_chance_is_a_function_of_seed_and_step(monkeypatch):
    """A fork's dropout that goes on otherwise after a resume."""
    hidden = Transformer.hidden
    monkeypatch.setattr(Transformer, "hidden", lambda self, *args, **more: torch.nn.functional.dropout(hidden(self, *args, **more), 0.1, self.training))
    whole, _ = run("--name=whole")
    run("--name=parts")
    shutil.rmtree("out/parts/step_0000004")
    resumed, _ = run("--name=parts", "--resume")
    assert_same_files(whole, resumed)


def test_a_finished_run_may_be_resumed_and_nothing_happens():
    """A traceback where there is nothing to do; a log that is lost."""
    checkpoint, last = run("--name=over")
    assert run("--name=over", "--resume") == (checkpoint, last)
    Path("out/over/log.jsonl").unlink()
    assert run("--name=over", "--resume", "--save_every=0")[0] == checkpoint


def test_a_full_disk_under_the_log_is_one_line_that_names_it(monkeypatch):
    write = runlog.Log.write

    def full(log, entry):
        log.file = open("/dev/full", "w")
        write(log, entry)
    monkeypatch.setattr(runlog.Log, "write", full)
    if Path("/dev/full").exists():
        with pytest.raises(OSError, match="/dev/full: not written .No space left on device.*--resume"):
            run("--name=full")


def test_a_trial_without_checkpoints_leaves_its_log_alone(capsys):
    path, last = run("--name=trial", "--save_every=0", "--eval_every=0")
    assert path is None and last["step"] == 4 and [p.name for p in Path("out/trial").iterdir()] == ["log.jsonl"]
    assert "no checkpoint was asked for" in capsys.readouterr().out


def test_a_lost_worker_is_one_line(monkeypatch, capsys):
    """A page of two processes' tracebacks, of which the last line is the news."""
    sample = niah.Needles.__getitem__
    monkeypatch.setattr(niah.Needles, "__getitem__", lambda self, index: sample(self, index) if index < 8 or not torch.utils.data.get_worker_info()
                        else os.kill(os.getpid(), signal.SIGKILL))
    monkeypatch.setattr(sys, "argv", ["train.py", *BASE, "--name=lost", "--workers=1"])
    with pytest.raises(SystemExit) as stop:
        train.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "a process that makes batches is gone" in error and error.count("\n") == 1, error


def test_an_error_in_a_worker_is_one_line(monkeypatch, capsys):
    """A damaged shard, found hours into a run."""
    sample = niah.Needles.__getitem__
    monkeypatch.setattr(niah.Needles, "__getitem__", lambda self, index: sample(self, index) if index < 8 or not torch.utils.data.get_worker_info()
                        else (_ for _ in ()).throw(ValueError("shards/00001.bin: token 9 is outside")))
    monkeypatch.setattr(sys, "argv", ["train.py", *BASE, "--name=lost", "--workers=1"])
    with pytest.raises(SystemExit) as stop:
        train.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error == "train.py: shards/00001.bin: token 9 is outside\n", error


def test_resumed_run_equals_uninterrupted_run():
    """State that a checkpoint forgets (moments, position in the data, schedule) would change the weights."""
    whole, _ = run("--name=whole")
    run("--name=parts")
    shutil.rmtree("out/parts/step_0000004")
    resumed, _ = run("--name=parts", "--resume")
    assert_same_files(whole, resumed)
    assert log_of("whole") == log_of("parts")


def test_killed_run_goes_on_as_if_nothing_had_happened():
    """kill -9 between two checkpoints must cost the steps since the last one, and nothing else."""
    script = f"import sys; sys.path[:0] = {[str(TRAIN.parent), str(Path(__file__).parent)]}; import torch; torch.set_num_threads(1)\n" \
             f"import train, model, test_train; model.PRESETS['pico'] = test_train.TINY; train.main()"
    command = [sys.executable, "-c", script, *BASE, "--name=killed", "--steps=60", "--eval_every=60"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not list(Path("out/killed").glob("step_*")):
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    run("--name=killed", "--resume", "--steps=60", "--eval_every=60")
    run("--name=whole", "--steps=60", "--eval_every=60")
    assert_same_files(Path("out/killed/step_0000060"), Path("out/whole/step_0000060"))
    assert log_of("killed") == log_of("whole")


def test_ctrl_c_saves_a_checkpoint_and_says_how_to_go_on(capsys, monkeypatch):
    """An interrupted run must keep its last step, end with status 130 and a line, and restore the handlers."""
    original, calls = train.parallel.Loss.forward, []

    def interrupt(*args):
        calls.append(1)
        if len(calls) == 5:  # in step 3 of 4: two passes each
            os.kill(os.getpid(), signal.SIGINT)
        return original(*args)
    monkeypatch.setattr(train.parallel.Loss, "forward", interrupt)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as stop:
        run("--name=stopped")
    assert stop.value.code == 130 and "--resume" in capsys.readouterr().out
    assert Path("out/stopped/step_0000003/config.json").exists()
    assert signal.getsignal(signal.SIGINT) == before


def test_accumulation_changes_nothing_but_rounding():
    """Averaging micro-batches instead of weighting them by their answers would change the loss."""
    run("--name=whole")
    run("--name=parts", "--device_batch=1")
    for a, b in zip(log_of("whole"), log_of("parts")):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4) and a["arl_loss"] == pytest.approx(b["arl_loss"], rel=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_graphed_steps_are_the_plain_ones():
    """A graph that reads the first batch again, or gradients that the next replay has overwritten."""
    for name in "on", "off":
        run(f"--name={name}", "--device=cuda", f"--compile={name}")
    for a, b in zip(log_of("on"), log_of("off")):
        for key in "loss", "arl_loss", "grad_norm":
            assert a[key] == pytest.approx(b[key], rel=0.02)


def two_processes(*flags, change=""):
    """train.py with these flags, after a change to it, in two processes."""
    script = Path("ranks.py")
    script.write_text(f"import os, signal, sys; sys.path[:0] = {[str(TRAIN.parent), str(Path(__file__).parent)]}\n"
                      "import torch; torch.set_num_threads(1)\n"
                      f"import train, model, test_train; model.PRESETS['pico'] = test_train.TINY\n{change}\ntrain.main()\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    return subprocess.run([*command, *BASE, *flags], capture_output=True, text=True)


def test_a_file_stops_a_run_and_the_next_one_is_not_stopped_by_it(monkeypatch):
    """The way to stop several processes whose step takes longer than torchrun waits."""
    original, calls = train.parallel.Loss.forward, []
    monkeypatch.setattr(train.parallel.Loss, "forward", lambda *args: (calls.append(1), len(calls) == 5 and Path("out/file/stop").touch(), original(*args))[2])
    with pytest.raises(SystemExit) as stop:
        run("--name=file")
    assert stop.value.code == 130 and weights.resolve("out/file").name == "step_0000003"
    checkpoint, _ = run("--name=file", "--resume")
    assert checkpoint.name == "step_0000004" and not Path("out/file/stop").exists()


INTERRUPT = """
original, calls = train.parallel.Loss.forward, []
def interrupt(*args):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 5:  # in step 3: two passes each
        os.kill(os.getpid(), signal.SIGINT)
    return original(*args)
train.parallel.Loss.forward = interrupt
"""


def test_a_signal_to_one_process_stops_both_after_the_same_step():
    """One that leaves while the other waits for it for ever; lines for steps that the checkpoint has not seen."""
    result = two_processes("--name=two", "--steps=12", "--log_every=99", "--eval_every=99", "--save_every=99", change=INTERRUPT)
    assert "stopped after step 4" in result.stdout, result.stdout + result.stderr[:4000]
    assert [row["step"] for row in log_of("two")] == [1, 2, 3, 4] and [path.name for path in Path("out/two").glob("step_*")] == ["step_0000004"]


def test_two_processes_train_like_one():
    """Ranks that see the same samples, or gradients averaged instead of summed, would give another curve."""
    result = two_processes("--name=two")
    assert "done" in result.stdout and result.returncode == 0, result.stderr[:4000]
    one, _ = run("--name=one")
    for a, b in zip(log_of("one"), log_of("two"), strict=True):
        for key in "loss", "arl_loss", "grad_norm", "lr":
            assert a[key] == pytest.approx(b[key], rel=2e-3), (a["step"], key)
    two = Path("out/two/step_0000004")
    a, b = Transformer.from_pretrained(one), Transformer.from_pretrained(two)
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=2e-3, rtol=0, msg=name)  # Adam's first steps are lr-sized, lr is 1e-3
    # what two have begun, two can end, and so can one
    unbroken = log_of("two")
    for end in two_processes, run:
        shutil.rmtree(two)
        end("--name=two", "--resume")
        for a, b in zip(unbroken, log_of("two"), strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=2e-3) and a["arl_loss"] == pytest.approx(b["arl_loss"], rel=2e-3)
        assert two.exists()


def test_two_groups_learn_at_their_own_rates(monkeypatch):
    """A gate in the wrong group would stall or spike in continued pretraining."""
    args = train.parse([*BASE, "--lr=1e-4", "--memory_lr=1e-2"])
    model = train.parallel.make_model(Transformer, *train.what_to_train(args), args)
    optimizer = train.make_optimizer(model, args)
    peak = {id(p): group["peak"] for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        assert peak[id(p)] == (1e-2 if ".memory." in name else 1e-4), name


def test_arl_is_two_optimizer_steps_on_one_batch_at_one_rate():
    """One step on the sum of both losses is another algorithm."""
    checkpoint, _ = run("--name=arl")
    moments = load_file(checkpoint / "optimizer.safetensors")
    assert {int(value) for key, value in moments.items() if key.endswith("/step")} == {8}  # 4 batches
    checkpoint, last = run("--name=dense", "--arl=0")
    moments = load_file(checkpoint / "optimizer.safetensors")
    assert {int(value) for key, value in moments.items() if key.endswith("/step")} == {4} and "arl_loss" not in last


def test_training_learns():
    """A sign error, or targets not shifted by one, would leave the loss at ln 257 = 5.5."""
    _, last = run("--name=learn", "--steps=40", "--lr=1e-2", "--arl=0", "--eval_every=40", "--save_every=40")
    assert last["loss"] < 3.5


def test_a_recipe_that_continues_a_model_has_samples_of_its_own():
    """Needles of the pretraining met again in the conversion, which has the same length and seed."""
    tokenizer = train.tokenizer_of(None, 257)
    data = [train.make_data(train.parse([*flags, "--drills=0"]), tokenizer, niah.Needles)[0]
            for flags in (["--recipe=micro"], ["--recipe=micro-convert", "--init=out/micro"])]
    assert all(len(dataset[0][0]) == 1025 for dataset in data) and (data[0][0][0] != data[1][0][0]).any()


def test_a_longer_context_is_written_to_the_model():
    """A model continued at 1,024 tokens whose config.json says 512: its evaluation would ask at 512. A shorter one changes nothing."""
    checkpoint, _ = run("--name=at512", "--arl=0")
    for context_len in 1024, 512:
        flags = [f"--init={checkpoint}", f"--context_len={context_len}", f"--name=then{context_len}", "--arl=0", *BASE[1:]]
        checkpoint, _ = train.train(train.parse(flags))
        assert Transformer.from_pretrained(checkpoint).config.context_len == 1024


def test_shards_train_and_are_checked_against_the_vocabulary():
    """Text from data.py trains through the same loop; a foreign vocabulary is refused before the first step."""
    shards.save_shard(Path("shards/000000.bin") if Path("shards").mkdir() is None else None,
                    [np.array([*b"to be or not to be. " * 20, 256], np.uint16).tobytes()] * 200, 257, "bytes", 0)
    _, last = run("--name=text", "--data=shards", "--context_len=64", "--arl=0", "--drills=0")
    assert last["val_loss"] < 5.5
    foreign = type("Tokenizer", (), {"name": "bpe"})
    with pytest.raises(ValueError, match="tokenizer bytes"):
        data.Text(train.parse([*BASE, "--data=shards", "--context_len=64"]), foreign, "train")


def test_memory_is_added_to_a_trained_model_and_the_run_is_its_own():
    """Continued pretraining: --init a run without memory, --memory=on."""
    run("--name=plain", "--memory=off", "--arl=0")
    flags = [flag for flag in BASE if not flag.startswith("--preset")]
    checkpoint, last = train.train(train.parse([*flags, "--init=out/plain", "--name=more"]))
    assert Transformer.from_pretrained(checkpoint).config.memory and "arl_loss" in last


@pytest.mark.parametrize("flags, message", [
    (["--preset=pico", "--stepz=3"], "stepz"),
    (["--preset=huge"], "invalid choice"),
    ([], "--preset"),
    (["--preset=pico", "--init=x"], "one of --preset"),
    (["--recipe=olmo2-continue", "--init=x"], "--data"),
    (["--preset=pico", "--lr=0"], "--lr"),
    (["--preset=pico", "--lr=nan"], "--lr"),
    (["--preset=pico", "--weight_decay=inf"], "--weight_decay"),
    (["--preset=pico", "--clip=1e-300"], "--clip"),
    (["--preset=pico", "--memory_lr=1e300"], "--memory_lr"),
    (["--preset=pico", "--other_weight=1e39"], "--other_weight"),
    (["--preset=pico", f"--seed={2**64}"], "--seed"),
    (["--preset=pico", f"--seed={-2**63}"], "--seed"),
    (["--preset=pico", f"--steps={10**400}"], "--steps"),
    (["--preset=pico", f"--batch={2**62}"], "--batch"),
    (["--preset=pico", f"--context_len={2**63}"], "--context_len"),
    (["--preset=pico", "--tasks", "mk-9"], "mk-9"),
    (["--preset=pico", "--log_every=0"], "--log_every"),
    (["--preset=pico", "--tasks", "niah_single_1", "niah_multiquery"], "too short"),
    (["--preset=pico", "--batch=6", "--device_batch=4"], "does not divide"),
    (["--preset=pico", "--memory=off", "--arl=64"], "--arl"),
    (["--preset=pico", "--memory=on", "--joint=64"], "--joint"),
    (["--preset=pico", "--memory=on", "--gate_start=0.1"], "--gate_start"),
    (["--preset=pico", "--joint=-1"], "--joint"),
    (["--init=nowhere"], "nowhere"),
    (["--preset=pico", "--context_len=100"], "too short"),
    (["--preset=pico", "--data=nowhere"], "nowhere"),
    (["--preset=pico", "--tokenizer=nowhere"], "nowhere"),
    (["--preset=olmo2-1b", "--context_len=512"], "--tokenizer"),
])
def test_bad_flags_are_one_line_and_exit_2(flags, message, capsys, monkeypatch):
    """A traceback tells a user nothing."""
    monkeypatch.setattr(sys, "argv", ["train.py", *flags, "--device=cpu"])
    monkeypatch.setitem(PRESETS, "olmo2-1b", Config(1000, n_layer=1, width=32, n_head=2, n_kv_head=2, mlp_width=64))
    with pytest.raises(SystemExit) as stop:
        train.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1, error


def test_runs_do_not_mix():
    """A second run under the same name must neither overwrite the first nor go on with other settings."""
    run("--name=one")
    with pytest.raises(ValueError, match="--resume"):
        run("--name=one")
    with pytest.raises(ValueError, match="--lr=0.001"):
        run("--name=one", "--resume", "--lr=0.5")
    sorted(Path("out/one").glob("step_*/train.json"))[-1].write_text('{"step": 3, "set')
    with pytest.raises(ValueError, match="step_.*/train.json is damaged"):
        run("--name=one", "--resume")


def test_torn_log_does_not_stop_a_resume():
    """A crash can leave half a line at the end of log.jsonl, behind the last checkpoint's."""
    run("--name=torn")
    shutil.rmtree("out/torn/step_0000004")
    whole = log_of("torn")
    log = Path("out/torn/log.jsonl")
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:3]) + '{"step": 4, "lo')
    run("--name=torn", "--resume")
    assert log_of("torn") == whole


def test_failed_save_leaves_the_last_checkpoint(monkeypatch):
    """A full disk at step 4 must not take step 2 with it, nor leave half a checkpoint."""
    original = weights.save_file
    monkeypatch.setattr(weights, "save_file", lambda flat, file, **more: original(flat, file, **more) if "0000002" in str(file) else
                        (_ for _ in ()).throw(OSError("No space left on device")))
    with pytest.raises(OSError, match="step_0000004.*No space left"):
        run("--name=full")
    assert [path.name for path in sorted(Path("out/full").iterdir())] == ["log.jsonl", "step_0000002"]
    monkeypatch.undo()


def test_loss_that_is_not_finite_stops_the_run():
    """Hours of NaN must not overwrite good checkpoints."""
    with pytest.raises(FloatingPointError, match="step"):
        run("--name=nan", "--lr=1e18", "--clip=1e18", "--steps=20")
    assert all(tensor.isfinite().all() for file in Path("out/nan").glob("step_*/model.safetensors") for tensor in load_file(file).values())


def test_seconds_go_on_where_the_checkpoint_left_them():
    """Hours counted twice or not at all over a resume, as one clock counts validation and the other does not."""
    run("--name=clock", "--eval_every=1")
    shutil.rmtree("out/clock/step_0000004")
    run("--name=clock", "--eval_every=1", "--resume")
    rows = [json.loads(line) for line in Path("out/clock/log.jsonl").read_text().splitlines()]
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds) and [row["tokens"] for row in rows] == [2048, 4096, 6144, 8192]


def test_fresh_weights_are_those_of_a_new_model():
    """Two initialisations, of which one is changed."""
    from infra.init import fresh
    tensors, model = fresh(Transformer, replace(TINY, memory=True), seed=0), Transformer(replace(TINY, memory=True))
    for name, parameter in model.named_parameters():
        tensor = tensors[name]()
        assert tensor.shape == parameter.shape
        torch.testing.assert_close(tensor.mean(), parameter.mean(), atol=0.004, rtol=0, msg=name)
        torch.testing.assert_close(tensor.std(correction=0), parameter.std(correction=0), rtol=0.1, atol=0, msg=name)
    assert torch.equal(tensors["lm_head.weight"](), tensors["lm_head.weight"]())
    assert not torch.equal(fresh(Transformer, TINY, seed=1)["lm_head.weight"](), tensors["lm_head.weight"]())


def test_update_clips_as_torch_does():
    """A gradient scaled twice or not at all: parallel.update leaves clipping to the fused AdamW. A gradient below the norm is as it is."""
    for clip in 0.5, 1e9:
        models = [tiny_model(memory=True), tiny_model(memory=True)]
        for model in models:
            optimizer = train.make_optimizer(model, train.parse([*BASE, "--lr=1e-2"]))
            for _ in range(3):
                model.loss(draw_tokens(2, 17), torch.ones(2, 17)).backward()
                norm = train.parallel.gradient_norm(model)
                assert 0.5 < norm < 1e9
                if model is models[0]:
                    train.parallel.update(optimizer, norm, clip)
                else:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
                    optimizer.step()
                    optimizer.zero_grad()
        for a, b in zip(*(model.parameters() for model in models)):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def poison(monkeypatch, *passes):
    """The gradient's norm is NaN in these passes, counted from 0; two make a step."""
    original, count = train.parallel.gradient_norm, iter(range(999))
    monkeypatch.setattr(train.parallel, "gradient_norm", lambda model: original(model) * (float("nan") if next(count) in passes else 1))


@pytest.mark.parametrize("every", [1, 1000])
def test_a_pass_that_is_not_finite_is_skipped_counted_and_told(every, monkeypatch, capsys):
    """NaN in a batch that reaches the weights or the moments; or whose whole run is lost for it; a resume that forgets the count."""
    poison(monkeypatch, 3)  # step 2's dense pass
    checkpoint, _ = run("--name=nan", f"--log_every={every}", "--eval_every=1000", "--save_every=2")
    assert [row["skipped"] for row in log_of("nan")] == [0, 1, 1, 1] and log_of("nan")[1]["grad_norm"] is None
    assert "1 of 2 passes skipped, 1 so far" in capsys.readouterr().out
    moments = load_file(checkpoint / "optimizer.safetensors")
    assert {int(value) for key, value in moments.items() if key.endswith("/step")} == {7}
    assert all(tensor.isfinite().all() for tensor in moments.values())
    assert json.loads((checkpoint / "train.json").read_text())["skipped"] == 1
    shutil.rmtree(checkpoint)
    run("--name=nan", "--resume", f"--log_every={every}", "--eval_every=1000", "--save_every=2")
    assert [row["skipped"] for row in log_of("nan")] == [0, 1, 1, 1]


def test_a_skipped_pass_changes_nothing(monkeypatch):
    """Weight decay or moments that go on without a gradient."""
    poison(monkeypatch, 2, 3)
    args = ["--steps=2", "--save_every=1", "--eval_every=0"]
    run("--name=nan", *args)
    assert_same_files(Path("out/nan/step_0000001"), Path("out/nan/step_0000002"))


def test_a_few_steps_in_a_row_that_are_not_finite_end_the_run(monkeypatch):
    """Days of a run that learns nothing any more."""
    poison(monkeypatch, *range(4, 99))
    with pytest.raises(FloatingPointError, match="3 steps in a row, up to step 5"):
        run("--name=nan", "--steps=20", "--save_every=2", "--log_every=1000", "--eval_every=0")
    assert [row["step"] for row in log_of("nan")] == [1, 2, 3, 4, 5, 6]  # told one step late
    assert all(tensor.isfinite().all() for tensor in load_file("out/nan/step_0000004/model.safetensors").values())


def test_steps_whose_numbers_are_told_late_are_logged_all_the_same():
    """A line lost, doubled or out of order, where the loop runs a step ahead of what it knows."""
    run("--name=at_once", "--steps=8")
    run("--name=late", "--steps=8", "--log_every=1000", "--eval_every=1000", "--save_every=1000")
    plain = lambda rows: [{key: value for key, value in row.items() if not key.startswith(("val_", "memory_lengths"))} for row in rows]
    assert plain(log_of("late")) == plain(log_of("at_once")) and len(log_of("late")) == 8


def test_a_run_whose_samples_have_changed_is_not_resumed(monkeypatch):
    """Half a run on other data: of a newer version, another Python's help pages, or shards made again."""
    run("--name=changed", "--steps=2")
    sample = niah.training_sample
    monkeypatch.setattr(niah, "training_sample", lambda *args: (sample(*args)[0] // 2, sample(*args)[1]))
    with pytest.raises(ValueError, match="the samples of out/changed are others by now"):
        run("--name=changed", "--steps=2", "--resume")


def test_joint_pass_sees_the_window_alone(monkeypatch):
    """A baseline whose extra pass is dense too, or whose FLOPs are counted as if it were."""
    args = train.parse([*BASE, "--memory=off", "--arl=0", "--joint=64", "--context_len=512"])
    (window, reads), (dense, all_reads) = train.passes_of(args).values()
    assert window == Dilated(dilation=None, local=64, initial=0) and dense is None and (reads, all_reads) == (64, 256)
    _, last = run("--name=joint", "--memory=off", "--arl=0", "--joint=64")
    assert {"loss", "joint_loss"} <= last.keys()


def test_a_checkpoint_tells_how_it_was_made():
    checkpoint, _ = run("--name=told")
    record = json.loads((checkpoint / "train.json").read_text())
    assert record.pop("sha256") == files.seal_of(record)
    assert {"step", "settings", "command", "commit", "device", "processes", "torch", "seconds", "step_seconds", "tokens_per_second", "mfu",
            "skipped", "first_sample", "tokenizer", "haystack", "from"} == record.keys()
    assert record["tokenizer"] == "bytes" and record["haystack"] is None
    assert record["tokens_per_second"] == pytest.approx(4 * 512 / record["step_seconds"], rel=0.01) and record["mfu"] is None
    assert record["from"] is None
    flags = [f"--init={checkpoint}", "--name=retold", *BASE[1:], "--steps=3", "--save_every=2"]
    path, _ = train.train(train.parse(flags))
    assert json.loads((path / "train.json").read_text())["from"] == record
    shutil.rmtree(path), shutil.rmtree(checkpoint)  # what it started from may be gone when it goes on
    path, _ = train.train(train.parse([*flags, "--resume"]))
    again = json.loads((path / "train.json").read_text())
    first_two = json.loads((path.parent / "step_0000002" / "train.json").read_text())
    assert again["from"] == record
    assert again["seconds"] > first_two["seconds"]  # not of this process alone
    (path / "train.json").write_text(json.dumps({"step": 3, "settings": again["settings"]}))
    with pytest.raises(ValueError, match="older version"):
        train.train(train.parse([*flags, "--resume"]))


def test_lesson_gives_the_attention_checkpoint_a_memory_and_shows_what_changed(monkeypatch, capsys, tmp_path):
    """`python train.py` without a flag, in small: it ends with a table, and again without training."""
    monkeypatch.setattr(runlog, "SHIPPED", [tmp_path / "checkpoints" / "attention"])
    Transformer(replace(TINY, context_len=1024)).save_pretrained(runlog.SHIPPED[0])
    monkeypatch.setattr(train, "LESSON", ["--steps=2", "--batch=1", "--device_batch=1", "--workers=0"])
    monkeypatch.setattr(eval_niah.niah, "default_new_tokens", lambda context_len, tokenizer: 12)
    for _ in range(2):
        train.lesson()
        text = capsys.readouterr().out
        assert "one entry in 64" in text and "converted - attention" in text and "quest" in text and "python eval_niah.py" in text
    assert "goes on from" in text
    model = Transformer.from_pretrained("out/converted")
    assert model.config.memory and weights.resolve("out/converted").name == "step_0000002"


# ---------------------------------------------------------------- batches without a token that counts

def weightless(monkeypatch, counts):
    """Samples of which counts(dataset, index) is false have weight 0 everywhere."""
    sample = niah.Needles.__getitem__

    def changed(self, index):
        tokens, weight = sample(self, index)
        return tokens, weight * bool(counts(self, index))
    monkeypatch.setattr(niah.Needles, "__getitem__", changed)


def test_a_batch_without_a_token_that_counts_learns_nothing_and_says_so(monkeypatch, capsys):
    """0/0 told as divergence, which ends a run of three such batches; or weight decay on nothing."""
    weightless(monkeypatch, lambda self, index: str(self.seed).startswith("val") or index < 4)
    run("--name=empty", "--steps=5", "--save_every=1", "--eval_every=0")
    assert [row["loss"] is None for row in log_of("empty")] == [False, True, True, True, True]
    assert [row["skipped"] for row in log_of("empty")] == [0, 0, 0, 0, 0]
    assert_same_files(Path("out/empty/step_0000004"), Path("out/empty/step_0000005"))
    said = capsys.readouterr().out
    assert said.count("no token of the batch counts") == 4 and "not finite" not in said
    moments = load_file("out/empty/step_0000005/optimizer.safetensors")
    assert {int(value) for key, value in moments.items() if key.endswith("/step")} == {2}


def test_a_validation_without_a_token_that_counts_is_none(monkeypatch, capsys):
    """A stack of calls for 0/0 at the end of a run."""
    weightless(monkeypatch, lambda self, index: not str(self.seed).startswith("val"))
    _, last = run("--name=blind")
    assert last["val_loss"] is None and last["val_accuracy"] is None
    assert "validation none, none of answer tokens right" in capsys.readouterr().out


@pytest.mark.parametrize("seed", [2**31 - 1, -2**31])
def test_the_largest_seeds_train(seed):
    """A seed that the flags take and the generator does not."""
    assert run(f"--name=seed{seed}", f"--seed={seed}", "--steps=1", "--eval_every=0")[1]["step"] == 1


# ---------------------------------------------------------------- the same files by other names

def some_shards(folder, text=b"to be or not to be. "):
    Path(folder).mkdir(parents=True)
    document = np.array([*text * 20, 256], np.uint16).tobytes()
    shards.save_shard(Path(folder, "00000.bin"), [document] * 200, 257, "bytes", 0)


def test_a_run_goes_on_with_the_same_files_wherever_they_are(tmp_path):
    """Shards, essays and models compared by how their paths are spelled: refused after a move, or taken though others are there now."""
    some_shards("shards")
    some_shards("others", b"it was a dark night. ")
    text = ["--name=text", "--context_len=64", "--arl=0", "--steps=2", "--resume"]
    run(*text, "--data=shards")
    run(*text, f"--data={tmp_path}/shards")
    shutil.move("shards", "moved/there") if Path("moved").mkdir() is None else None
    run(*text, "--data=moved/there")
    shutil.move("out/text", "out/renamed")
    run(*text, "--name=renamed", "--data=moved/there")
    with pytest.raises(ValueError, match="--data"):
        run(*text, "--name=renamed", "--data=others")

    Path("essay.txt").write_text("It was the best of times. " * 400)
    Path("same.txt").write_text("It was the best of times. " * 400)
    Path("other.txt").write_text("It was the worst of times. " * 400)
    needles = ["--name=essays", "--steps=2", "--resume"]  # whose first sample has no essay
    checkpoint, _ = run(*needles, "--haystack=essay.txt")
    run(*needles, "--haystack=same.txt")
    with pytest.raises(ValueError, match="--haystack=essay.txt"):
        run(*needles, "--haystack=other.txt")
    with pytest.raises(ValueError, match="--haystack=essay.txt"):
        run(*needles)

    go_on = lambda init: train.train(train.parse([*BASE[1:], f"--init={init}", "--name=on", "--steps=2", "--resume"]))
    go_on("out/essays")
    go_on(tmp_path / "out" / "essays")
    shutil.copytree(checkpoint, "copy")
    go_on("copy")
    with pytest.raises(ValueError, match="--init"):
        go_on("out/renamed")


def write_bpe(folder, *merges):
    """A byte-level BPE of our own: 256 bytes, these merges, an end of text. -> the folder"""
    vocab = {character: byte for character, byte in tokenizers.byte_alphabet().items()}
    for left, right in merges:
        vocab[left + right] = len(vocab)
    end = {"id": len(vocab), "content": "<|endoftext|>", "special": True, "lstrip": False, "rstrip": False, "single_word": False}
    steps = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    Path(folder).mkdir()
    Path(folder, "tokenizer.json").write_text(json.dumps({
        "model": {"type": "BPE", "vocab": vocab, "merges": [list(merge) for merge in merges]}, "added_tokens": [end], "pre_tokenizer": steps}))
    return folder


def test_a_checkpoint_has_the_tokenizer_it_was_trained_with_and_goes_on_with_no_other(monkeypatch):
    """A model that carries the tokenizer.json beside the one that was named; a second half trained on other tokens."""
    monkeypatch.setitem(PRESETS, "pico", replace(TINY, vocab_size=300, eos_id=None))
    write_bpe("one", "th", "he"), write_bpe("two", "an", "in")
    shutil.copy("two/tokenizer.json", "one/mine.json")
    flags = ["--name=bpe", "--steps=2", "--resume"]
    checkpoint, _ = run(*flags, "--tokenizer=one/mine.json")
    assert (checkpoint / "tokenizer.json").read_bytes() == Path("two/tokenizer.json").read_bytes()
    assert sorted(file.name for file in checkpoint.glob("*.json")) == ["config.json", "tokenizer.json", "train.json"]
    name = data.get_tokenizer("two").name
    assert json.loads((checkpoint / "train.json").read_text())["tokenizer"] == name
    assert json.loads((checkpoint / "config.json").read_text())["tokenizer"] == name
    for same in "--tokenizer=two", "--tokenizer=two/tokenizer.json":
        assert run(*flags, same)[0] == checkpoint
    assert run(*flags)[0] == checkpoint  # that of the checkpoint
    with pytest.raises(ValueError, match=name):
        run(*flags, "--tokenizer=one")


# ---------------------------------------------------------------- where and how it is called

def test_train_in_another_thread_says_what_it_does_not_hear_and_stops_by_a_file(monkeypatch, capsys):
    """A traceback of signal, which only the main thread may set; handlers of the program changed."""
    before, ends = signal.getsignal(signal.SIGINT), []

    def go(*flags):
        try:
            ends.append(run("--name=thread", *flags))
        except BaseException as error:
            ends.append(error)
    for flags in ["--steps=2"], ["--steps=2", "--resume"]:
        thread = threading.Thread(target=go, args=flags)
        thread.start(), thread.join()
    assert [end[1]["step"] for end in ends] == [2, 2] and signal.getsignal(signal.SIGINT) == before
    assert capsys.readouterr().err.count("make a file out/thread/stop") == 2
    forward = train.parallel.Loss.forward
    monkeypatch.setattr(train.parallel.Loss, "forward", lambda *args: (Path("out/other/stop").touch(), forward(*args))[1])
    thread = threading.Thread(target=go, args=["--name=other"])
    thread.start(), thread.join()
    assert isinstance(ends[-1], SystemExit) and ends[-1].code == 130


def test_a_context_beyond_the_models_is_told_once(capsys):
    """Numbers of a model at positions that it has never seen, without a word."""
    checkpoint, _ = run("--name=short", "--arl=0")
    capsys.readouterr()
    longer = [*BASE[1:], f"--init={checkpoint}", "--context_len=1024", "--name=longer", "--arl=0", "--resume"]
    train.train(train.parse(longer))
    assert capsys.readouterr().out.count("was trained for 512 tokens, and --context_len=1024 goes beyond") == 1
    train.train(train.parse(longer))
    run("--name=new", "--context_len=1024", "--steps=1", "--arl=0")
    assert "was trained for" not in capsys.readouterr().out


def test_tasks_are_named_as_in_the_tables_too():
    """MK-2 refused where all tables say MK-2; two spellings that --resume takes for two runs."""
    assert train.parse(["--preset=pico", "--tasks", "MK-2", "s-1", "niah_multiquery"]).tasks == ["niah_multikey_2", "niah_single_1", "niah_multiquery"]
