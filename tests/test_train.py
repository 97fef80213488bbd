"""
train.py: the schedule, resuming, accumulation and processes all leave the same numbers. Tiny
models, a few steps.
"""
import json
import os
import shutil
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import data
import eval_niah
import niah
import train
from conftest import ORACLE, draw_tokens, tiny
from infra import files, parallel, runlog, shards, tokenizers, weights
from infra.init import fresh
from model import PRESETS, Config, Transformer
from ranks import by_torchrun, on_two
from sparse import Dilated

TINY = Config(257, n_layer=1, width=32, n_head=2, n_kv_head=2, mlp_width=64, context_len=512,
              eos_id=256)
BASE = ["--preset=pico", "--memory=on", "--arl=16", "--tasks", "niah_single_1", "--drills=0.5",
        "--steps=4", "--batch=4", "--log_every=1", "--eval_every=4", "--save_every=2",
        "--device=cpu"]
FOUR = Path("step_0000004")


@pytest.fixture(autouse=True)
def tiny_pico(monkeypatch, tmp_path):
    monkeypatch.setitem(PRESETS, "pico", TINY)
    monkeypatch.chdir(tmp_path)


def run(*flags, base=BASE):
    return train.train(train.parse([*base, *flags]))


def continued(source, *flags):
    """run, of a model that is there."""
    return run(f"--init={source}", *flags, base=BASE[1:])


def log_of(name):
    """Without what is another number each time."""
    rows = [json.loads(line) for line in Path("out", name, "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items()
             if not key.endswith("second") and not key.endswith("seconds")} for row in rows]


def assert_same_files(a, b):
    for name in "model.safetensors", "optimizer.safetensors":
        a_tensors, b_tensors = load_file(Path(a, name)), load_file(Path(b, name))
        assert a_tensors.keys() == b_tensors.keys()
        for key in a_tensors:
            assert torch.equal(a_tensors[key], b_tensors[key]), key


def updates_in(checkpoint):
    """How many optimizer steps its moments have seen."""
    moments = load_file(Path(checkpoint, "optimizer.safetensors"))
    assert all(tensor.isfinite().all() for tensor in moments.values())
    steps, = {int(value) for key, value in moments.items() if key.endswith("/step")}
    return steps


def at_call(monkeypatch, number, act):
    """act() before the loss is computed for the number-th time; each step does so twice."""
    original, calls = parallel.Loss.forward, []

    def forward(*given):
        calls.append(1)
        if len(calls) == number:
            act()
        return original(*given)
    monkeypatch.setattr(parallel.Loss, "forward", forward)


def main_says(capsys, monkeypatch, *flags):
    """-> the line of `python train.py FLAGS`, which must be one, and exit 2."""
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    with pytest.raises(SystemExit) as stop:
        train.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1, error
    return error


# ---------------------------------------------------------------- recipes and flags

def test_learning_rate_is_the_official_schedule():
    """An off-by-one in warm-up or cosine would train other models than the paper's."""
    official = json.loads((ORACLE / "ratplus.json").read_text())["lr_schedule"]
    args = train.parse(["--preset=pico", f"--steps={official['steps']}", f"--lr={official['base']}",
                        f"--min_lr={official['min']}", f"--warmup={official['warmup']}"])
    ours = [train.learning_rate(step, args) * args.lr for step in range(official["steps"])]
    assert ours == pytest.approx(official["lr"][:official["steps"]], rel=1e-6)


PATTERN = "dilated:dilation=16,local=256,initial=4"
PAPER = {  # arXiv 2605.28640 and 2602.18196; (c): the configs of official RAT+, as is every min_lr
    "olmo2-continue": dict(tokens=10e9, batch=768, lr=6e-5, memory_lr=6e-4, warmup=0.02,
                           weight_decay=0.1, arl=64),
    "niah-sft": dict(tokens=7e6, batch=32, lr=1e-5, memory_lr=1e-5, arl=0, protocol="sft",
                     other_weight=0.0, weight_decay=0.01, warmup=0.05),  # (c) from arl on
    "ratplus-1b": dict(tokens=110e9, batch=512, lr=8e-4, memory_lr=8e-4, warmup=0.05,
                       weight_decay=0.1, arl=64),
    "ratplus-7b": dict(tokens=110e9, batch=768, lr=6e-4, memory_lr=6e-4, warmup=0.05,
                       weight_decay=0.1, arl=64),
    "ratplus-1b-adapt": dict(tokens=1e9, batch=512, lr=8e-5, memory_lr=8e-5, warmup=0.0,
                             weight_decay=0.1, arl=0, adapt=PATTERN),
    "ratplus-7b-adapt": dict(tokens=1e9, batch=768, lr=2e-5, memory_lr=2e-5, warmup=0.02,
                             weight_decay=0.1, arl=0, adapt=PATTERN),
}


@pytest.mark.parametrize("recipe", PAPER)
def test_recipes_are_the_papers(recipe):
    """A digit of the paper's settings lost, or a default that has changed under a recipe."""
    source = [] if recipe in ("ratplus-1b", "ratplus-7b") else ["--init=x"]
    text = "niah" if recipe == "niah-sft" else "x"
    args = train.parse([f"--recipe={recipe}", f"--data={text}", *source])
    wanted = PAPER[recipe] | {"context_len": 4096, "min_lr": 1e-6, "clip": 1.0}
    tokens = args.steps * args.batch * args.context_len
    assert tokens == pytest.approx(wanted.pop("tokens"), rel=0.02)
    assert {key: getattr(args, key) for key in wanted} == wanted
    optimizer = train.make_optimizer(torch.nn.Linear(1, 1), args)
    assert optimizer.defaults["betas"] == (0.9, 0.95)  # (c)
    assert args.memory == ("on" if recipe == "olmo2-continue" else None)


@pytest.mark.parametrize("flags, message", [
    (["--preset=pico", "--stepz=3"], "stepz"),
    (["--preset=huge"], "invalid choice"),
    (["--steps=3"], "--preset"),
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
    (["--preset=pico", "--warmup=1"], "--warmup=1"),
    (["--preset=pico", "--min_lr=1"], "--min_lr 1.0 is above --lr"),
    (["--preset=pico", "--tasks", "niah_single_1", "niah_multiquery"], "too short"),
    (["--preset=pico", "--batch=6", "--device_batch=4"], "does not divide"),
    (["--preset=pico", "--memory=off", "--arl=64"], "--arl"),
    (["--preset=pico", "--memory=on", "--joint=64"], "--joint"),
    (["--preset=pico", "--memory=on", "--gate_start=0.1"], "--gate_start"),
    (["--preset=pico", "--joint=-1"], "--joint"),
    (["--preset=pico", "--adapt=quest:budget=1/4"], "only dilated"),
    (["--init=nowhere"], "nowhere"),
    (["--preset=pico", "--context_len=100"], "too short"),
    (["--preset=pico", "--data=nowhere"], "nowhere"),
    (["--preset=pico", "--tokenizer=nowhere"], "nowhere"),
    (["--preset=olmo2-1b", "--context_len=512"], "--tokenizer"),
])
def test_bad_flags_are_one_line_and_exit_2(flags, message, capsys, monkeypatch):
    """A traceback tells a user nothing."""
    monkeypatch.setitem(PRESETS, "olmo2-1b", replace(TINY, vocab_size=1000, eos_id=None))
    assert message in main_says(capsys, monkeypatch, *flags, "--device=cpu")


def test_tasks_are_named_as_in_the_tables_too():
    """MK-2 refused where all tables say MK-2; two spellings that --resume takes for two runs."""
    args = train.parse(["--preset=pico", "--tasks", "MK-2", "s-1", "niah_multiquery"])
    assert args.tasks == ["niah_multikey_2", "niah_single_1", "niah_multiquery"]


@pytest.mark.parametrize("seed", [2**31 - 1, -2**31])
def test_the_largest_seeds_train(seed):
    """A seed that the flags take and the generator does not."""
    _, last = run(f"--name=seed{seed}", f"--seed={seed}", "--steps=1", "--eval_every=0")
    assert last["step"] == 1


# ---------------------------------------------------------------- what a step does

def test_training_learns():
    """A sign error, or targets not shifted by one, would leave the loss at ln 257 = 5.5."""
    _, last = run("--name=learn", "--steps=40", "--lr=1e-2", "--arl=0", "--eval_every=0",
                  "--save_every=0")
    assert last["loss"] < 3.5


def test_arl_is_two_optimizer_steps_on_one_batch_at_one_rate():
    """One step on the sum of both losses is another algorithm."""
    checkpoint, last = run("--name=arl")
    assert updates_in(checkpoint) == 2 * 4 and "arl_loss" in last  # 4 batches
    checkpoint, last = run("--name=dense", "--arl=0")
    assert updates_in(checkpoint) == 4 and "arl_loss" not in last


def test_two_groups_learn_at_their_own_rates():
    """A gate in the wrong group would stall or spike in continued pretraining."""
    args = train.parse([*BASE, "--lr=1e-4", "--memory_lr=1e-2"])
    model = parallel.make_model(Transformer, *train.what_to_train(args), args)
    optimizer = train.make_optimizer(model, args)
    peak = {id(p): group["peak"] for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        assert peak[id(p)] == (1e-2 if ".memory." in name else 1e-4), name


def test_adaptation_trains_and_validates_through_the_pattern(monkeypatch):
    """A model adapted to its pattern in name only."""
    seen, forward, score = set(), parallel.Loss.forward, Transformer.score
    monkeypatch.setattr(parallel.Loss, "forward",
                        lambda self, *given: seen.add(self.method) or forward(self, *given))
    monkeypatch.setattr(Transformer, "score", lambda self, tokens, weight, method: seen.add(
        ("score", method)) or score(self, tokens, weight, method))
    run("--name=adapt", "--arl=0", "--adapt=dilated:dilation=16,local=32,initial=4", "--steps=2")
    pattern = Dilated(dilation=16, local=32, initial=4)
    assert seen == {pattern, ("score", pattern)}


def test_accumulation_changes_nothing_but_rounding():
    """Averaging micro-batches instead of weighting them by their answers would change the loss."""
    run("--name=whole")
    run("--name=parts", "--device_batch=1")
    for a, b in zip(log_of("whole"), log_of("parts")):
        for key in "loss", "arl_loss":
            assert a[key] == pytest.approx(b[key], rel=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_graphed_steps_are_the_plain_ones():
    """A graph that reads the first batch again, or gradients that the next replay overwrote."""
    for name in "on", "off":
        run(f"--name={name}", "--device=cuda", f"--compile={name}")
    for a, b in zip(log_of("on"), log_of("off")):
        for key in "loss", "arl_loss", "grad_norm":
            assert a[key] == pytest.approx(b[key], rel=0.02)


def test_update_clips_as_torch_does():
    """
    A gradient scaled twice or not at all: parallel.update leaves clipping to the fused AdamW. A
    gradient below the norm is as it is.
    """
    for clip in 0.5, 1e9:
        models = [tiny(memory=True), tiny(memory=True)]
        for model in models:
            optimizer = train.make_optimizer(model, train.parse([*BASE, "--lr=1e-2"]))
            for _ in range(3):
                model.loss(draw_tokens(2, 17), torch.ones(2, 17)).backward()
                norm = parallel.gradient_norm(model)
                assert 0.5 < norm < 1e9
                if model is models[0]:
                    parallel.update(optimizer, norm, clip)
                else:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
                    optimizer.step()
                    optimizer.zero_grad()
        for a, b in zip(*(model.parameters() for model in models)):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_fresh_weights_are_those_of_a_new_model():
    """Two initialisations, of which one is changed."""
    config = replace(TINY, memory=True)
    tensors, model = fresh(Transformer, config, seed=0), Transformer(config)
    for name, parameter in model.named_parameters():
        tensor = tensors[name]()
        assert tensor.shape == parameter.shape
        torch.testing.assert_close(tensor.mean(), parameter.mean(), atol=0.004, rtol=0, msg=name)
        torch.testing.assert_close(tensor.std(correction=0), parameter.std(correction=0), rtol=0.1,
                                   atol=0, msg=name)
    head = tensors["lm_head.weight"]()
    assert torch.equal(tensors["lm_head.weight"](), head)
    assert not torch.equal(fresh(Transformer, TINY, seed=1)["lm_head.weight"](), head)


# ---------------------------------------------------------------- what is trained, on what

def test_memory_is_added_to_a_trained_model_and_the_run_is_its_own():
    """Continued pretraining: --init a run without memory, --memory=on."""
    run("--name=plain", "--memory=off", "--arl=0")
    checkpoint, last = continued("out/plain", "--name=more")
    assert Transformer.from_pretrained(checkpoint).config.memory and "arl_loss" in last


def test_a_longer_context_is_the_models_and_is_told_once(capsys):
    """
    A model continued at 1,024 tokens whose config.json says 512: its evaluation would ask at 512. A
    shorter one changes nothing. Or numbers at positions that it has never seen, without a word.
    """
    checkpoint, _ = run("--name=at512", "--arl=0")
    for context_len, notes in (1024, 1), (512, 0):
        flags = f"--context_len={context_len}", f"--name=then{context_len}", "--arl=0", "--resume"
        last, _ = continued(checkpoint, *flags)
        said = capsys.readouterr().out
        beyond = f"was trained for 512 tokens, and --context_len={context_len} goes beyond"
        assert said.count(beyond) == said.count("was trained for") == notes
        continued(checkpoint, *flags)  # and not again, of what the model has learned by now
        assert "was trained for" not in capsys.readouterr().out
        assert Transformer.from_pretrained(last).config.context_len == 1024
        checkpoint = last
    run("--name=new", "--context_len=1024", "--steps=1", "--arl=0")
    assert "was trained for" not in capsys.readouterr().out


def some_shards(folder, text=b"to be or not to be. "):
    Path(folder).mkdir(parents=True)
    document = np.array([*text * 20, 256], np.uint16).tobytes()
    shards.save_shard(Path(folder, "00000.bin"), [document] * 200, 257, "bytes", 0)


def test_shards_train_and_are_checked_against_the_vocabulary():
    """
    Text from data.py trains through the same loop; a foreign vocabulary is refused before the first
    step.
    """
    some_shards("shards")
    flags = ["--data=shards", "--context_len=64", "--arl=0", "--drills=0"]
    assert run("--name=text", *flags)[1]["val_loss"] < 5.5
    foreign = type("Tokenizer", (), {"name": "bpe"})
    with pytest.raises(ValueError, match="tokenizer bytes"):
        data.Text(train.parse([*BASE, *flags]), foreign, "train")


@pytest.mark.parametrize("death, says", [
    (lambda: os.kill(os.getpid(), signal.SIGKILL), "a process that makes batches is gone"),
    (lambda: files.refuse_number("x"), "train.py: x is no number\n")])
def test_what_ends_a_worker_is_one_line(death, says, monkeypatch, capsys):
    """
    A page of two processes' tracebacks, of which the last line is the news: a worker that is lost,
    or has found a damaged shard, hours into a run.
    """
    sample = niah.Needles.__getitem__
    monkeypatch.setattr(niah.Needles, "__getitem__", lambda self, index: death() if (
        index >= 8 and torch.utils.data.get_worker_info()) else sample(self, index))
    assert says in main_says(capsys, monkeypatch, *BASE, "--name=lost", "--workers=1")


# ---------------------------------------------------------------- stopped and resumed

def test_resumed_run_equals_uninterrupted_run(monkeypatch):
    """
    State that a checkpoint forgets (moments, position in the data, schedule) would change the
    weights; or chance that goes on otherwise, as of a fork's dropout.
    """
    hidden = Transformer.hidden
    monkeypatch.setattr(Transformer, "hidden", lambda self, *given, **more: (
        torch.nn.functional.dropout(hidden(self, *given, **more), 0.1, self.training)))
    whole, _ = run("--name=whole")
    resumed, _ = run("--name=parts")
    shutil.rmtree(resumed)
    run("--name=parts", "--resume")
    assert_same_files(whole, resumed)
    assert log_of("whole") == log_of("parts")


def test_a_finished_run_may_be_resumed_and_nothing_happens():
    """A traceback where there is nothing to do; a log that is lost."""
    checkpoint, last = run("--name=over")
    assert run("--name=over", "--resume") == (checkpoint, last)
    Path("out/over/log.jsonl").unlink()
    assert run("--name=over", "--resume", "--save_every=0")[0] == checkpoint


def test_a_trial_without_checkpoints_leaves_its_log_alone(capsys):
    path, last = run("--name=trial", "--save_every=0", "--eval_every=0")
    assert path is None and last["step"] == 4
    assert [file.name for file in Path("out/trial").iterdir()] == ["log.jsonl"]
    assert "no checkpoint was asked for" in capsys.readouterr().out


def test_ctrl_c_saves_a_checkpoint_and_says_how_to_go_on(capsys, monkeypatch):
    """
    An interrupted run must keep its last step, end with status 130 and a line, and restore the
    handlers.
    """
    at_call(monkeypatch, 5, lambda: os.kill(os.getpid(), signal.SIGINT))  # in step 3 of 4
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as stop:
        run("--name=stopped")
    assert stop.value.code == 130 and "--resume" in capsys.readouterr().out
    assert Path("out/stopped/step_0000003/config.json").exists()
    assert signal.getsignal(signal.SIGINT) == before


def test_a_file_stops_a_run_and_the_next_one_is_not_stopped_by_it(monkeypatch):
    """The way to stop several processes whose step takes longer than torchrun waits."""
    at_call(monkeypatch, 5, Path("out/file/stop").touch)
    with pytest.raises(SystemExit) as stop:
        run("--name=file")
    assert stop.value.code == 130 and weights.resolve("out/file").name == "step_0000003"
    checkpoint, _ = run("--name=file", "--resume")
    assert checkpoint.name == FOUR.name and not Path("out/file/stop").exists()


def test_train_in_another_thread_says_what_it_does_not_hear_and_stops_by_a_file(monkeypatch,
                                                                                capsys):
    """A traceback of signal, which only the main thread may set; handlers that are changed."""
    before, ends = signal.getsignal(signal.SIGINT), []

    def in_thread(*flags):
        def go():
            try:
                ends.append(run(*flags))
            except BaseException as error:
                ends.append(error)
        thread = threading.Thread(target=go)
        thread.start(), thread.join()
    for flags in ["--steps=2"], ["--steps=2", "--resume"]:
        in_thread("--name=thread", *flags)
    assert [end[1]["step"] for end in ends] == [2, 2]
    assert signal.getsignal(signal.SIGINT) == before
    assert capsys.readouterr().err.count("make a file out/thread/stop") == 2
    at_call(monkeypatch, 1, Path("out/other/stop").touch)
    in_thread("--name=other")
    assert isinstance(ends[-1], SystemExit) and ends[-1].code == 130


AS_TINY = "import train, model, test_train; model.PRESETS['pico'] = test_train.TINY\n"
INTERRUPT = AS_TINY + """
import os, signal
original, calls = train.parallel.Loss.forward, []
def interrupt(*args):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 5:  # in step 3: two passes each
        os.kill(os.getpid(), signal.SIGINT)
    return original(*args)
train.parallel.Loss.forward = interrupt
train.main()
"""


def test_a_signal_to_one_process_stops_both_after_the_same_step(tmp_path):
    """
    One that leaves while the other waits for it for ever; lines for steps that the checkpoint has
    not seen.
    """
    rarely = ["--log_every=99", "--eval_every=99", "--save_every=99"]
    done = on_two(INTERRUPT, *BASE, "--name=two", "--steps=12", *rarely, folder=tmp_path)
    assert "stopped after step 4" in done.stdout, done.stdout + done.stderr[:4000]
    assert [row["step"] for row in log_of("two")] == [1, 2, 3, 4]
    assert [path.name for path in Path("out/two").glob("step_*")] == [FOUR.name]


def test_two_processes_train_like_one(tmp_path):
    """Ranks that see the same samples, or gradients averaged instead of summed: another curve."""
    done = by_torchrun(AS_TINY + "train.main()", *BASE, "--name=two", folder=tmp_path)
    assert "done" in done.stdout and done.returncode == 0, done.stderr[:4000]
    one, _ = run("--name=one")
    for a, b in zip(log_of("one"), log_of("two"), strict=True):
        for key in "loss", "arl_loss", "grad_norm", "lr":
            assert a[key] == pytest.approx(b[key], rel=2e-3), (a["step"], key)
    a, b = (Transformer.from_pretrained(folder) for folder in (one, "out/two"))
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        # Adam's first steps are lr-sized, lr is 1e-3
        torch.testing.assert_close(p, q, atol=2e-3, rtol=0, msg=name)


# ---------------------------------------------------------------- may it go on?

def test_runs_do_not_mix():
    """
    A second run under the same name must neither overwrite the first nor go on with other settings.
    """
    run("--name=one")
    with pytest.raises(ValueError, match="--resume"):
        run("--name=one")
    with pytest.raises(ValueError, match="--lr=0.001"):
        run("--name=one", "--resume", "--lr=0.5")
    sorted(Path("out/one").glob("step_*/train.json"))[-1].write_text('{"step": 3, "set')
    with pytest.raises(ValueError, match="step_.*/train.json is damaged"):
        run("--name=one", "--resume")


def test_a_run_whose_samples_have_changed_is_not_resumed(monkeypatch):
    """Half a run on other data: of a newer version, another Python's help pages, or new shards."""
    run("--name=changed", "--steps=2")
    sample = niah.training_sample
    monkeypatch.setattr(niah, "training_sample",
                        lambda *given: (sample(*given)[0] // 2, sample(*given)[1]))
    with pytest.raises(ValueError, match="the samples of out/changed are others by now"):
        run("--name=changed", "--steps=2", "--resume")


def test_a_run_goes_on_with_the_same_files_wherever_they_are(tmp_path):
    """
    Shards, essays and models compared by how their paths are spelled: refused after a move, or
    taken though others are there now.
    """
    some_shards("shards")
    some_shards("others", b"it was a dark night. ")
    text = ["--name=text", "--context_len=64", "--arl=0", "--steps=2", "--resume"]
    run(*text, "--data=shards")
    run(*text, f"--data={tmp_path}/shards")
    Path("moved").mkdir()
    shutil.move("shards", "moved/there")
    run(*text, "--data=moved/there")
    shutil.move("out/text", "out/renamed")
    run(*text, "--name=renamed", "--data=moved/there")
    with pytest.raises(ValueError, match="--data"):
        run(*text, "--name=renamed", "--data=others")

    for file, word in ("essay", "best"), ("same", "best"), ("other", "worst"):
        Path(f"{file}.txt").write_text(f"It was the {word} of times. " * 400)
    needles = ["--name=essays", "--steps=2", "--resume"]  # whose first sample has no essay
    checkpoint, _ = run(*needles, "--haystack=essay.txt")
    run(*needles, "--haystack=same.txt")
    for other in ["--haystack=other.txt"], []:
        with pytest.raises(ValueError, match="--haystack=essay.txt"):
            run(*needles, *other)

    shutil.copytree(checkpoint, "copy")
    on = ["--name=on", "--steps=2", "--resume"]
    for source in "out/essays", tmp_path / "out/essays", "copy":
        continued(source, *on)
    with pytest.raises(ValueError, match="--init"):
        continued("out/renamed", *on)


def write_bpe(folder, *merges):
    """A byte-level BPE of our own: 256 bytes, these merges, an end of text."""
    vocab = dict(tokenizers.byte_alphabet())
    for left, right in merges:
        vocab[left + right] = len(vocab)
    end = {"id": len(vocab), "content": "<|endoftext|>", "special": True, "lstrip": False,
           "rstrip": False, "single_word": False}
    steps = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    model = {"type": "BPE", "vocab": vocab, "merges": [list(merge) for merge in merges]}
    Path(folder).mkdir()
    Path(folder, "tokenizer.json").write_text(json.dumps(
        {"model": model, "added_tokens": [end], "pre_tokenizer": steps}))


def test_a_checkpoint_has_the_tokenizer_it_was_trained_with_and_goes_on_with_no_other(monkeypatch):
    """
    A model that carries the tokenizer.json beside the one that was named; a second half trained on
    other tokens.
    """
    monkeypatch.setitem(PRESETS, "pico", replace(TINY, vocab_size=300, eos_id=None))
    write_bpe("one", "th", "he"), write_bpe("two", "an", "in")
    shutil.copy("two/tokenizer.json", "one/mine.json")
    flags, name = ["--name=bpe", "--steps=2", "--resume"], data.get_tokenizer("two").name
    checkpoint, _ = run(*flags, "--tokenizer=one/mine.json")
    beside = sorted(file.name for file in checkpoint.glob("*.json"))
    assert beside == ["config.json", "tokenizer.json", "train.json"]
    mine = Path("two/tokenizer.json").read_bytes()
    assert (checkpoint / "tokenizer.json").read_bytes() == mine
    for file in "train.json", "config.json":
        assert json.loads((checkpoint / file).read_text())["tokenizer"] == name
    for same in ["--tokenizer=two"], ["--tokenizer=two/tokenizer.json"], []:  # []: the checkpoint's
        assert run(*flags, *same)[0] == checkpoint
    with pytest.raises(ValueError, match=name):
        run(*flags, "--tokenizer=one")


# ---------------------------------------------------------------- log and record

def test_torn_log_does_not_stop_a_resume():
    """A crash can leave half a line at the end of log.jsonl, behind the last checkpoint's."""
    checkpoint, _ = run("--name=torn")
    shutil.rmtree(checkpoint)
    whole, log = log_of("torn"), Path("out/torn/log.jsonl")
    torn = log.read_text().splitlines(keepends=True)[:3] + ['{"step": 4, "lo']
    log.write_text("".join(torn))
    run("--name=torn", "--resume")
    assert log_of("torn") == whole


def test_a_full_disk_under_the_log_is_one_line_that_names_it(monkeypatch):
    write = runlog.Log.write

    def full(log, entry):
        log.file = open("/dev/full", "w")
        write(log, entry)
    monkeypatch.setattr(runlog.Log, "write", full)
    if Path("/dev/full").exists():
        with pytest.raises(OSError, match="/dev/full: not written .No space left on device.*--res"):
            run("--name=full")


def test_failed_save_leaves_the_last_checkpoint(monkeypatch):
    """A full disk at step 4 must not take step 2 with it, nor leave half a checkpoint."""
    original = weights.save_file

    def full(flat, file, **more):
        if "0000004" in str(file):
            raise OSError("No space left on device")
        original(flat, file, **more)
    monkeypatch.setattr(weights, "save_file", full)
    with pytest.raises(OSError, match="step_0000004.*No space left"):
        run("--name=full")
    assert sorted(path.name for path in Path("out/full").iterdir()) == ["log.jsonl", "step_0000002"]


def test_seconds_go_on_where_the_checkpoint_left_them():
    """Hours counted twice or not at all over a resume, as only one clock counts validation."""
    checkpoint, _ = run("--name=clock", "--eval_every=1")
    shutil.rmtree(checkpoint)
    run("--name=clock", "--eval_every=1", "--resume")
    rows = [json.loads(line) for line in Path("out/clock/log.jsonl").read_text().splitlines()]
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds)
    assert [row["tokens"] for row in rows] == [2048, 4096, 6144, 8192]


def test_steps_whose_numbers_are_told_late_are_logged_all_the_same():
    """A line lost, doubled or out of order, where the loop runs a step ahead of what it knows."""
    run("--name=at_once", "--steps=8", "--eval_every=0")
    run("--name=late", "--steps=8", "--eval_every=0", "--log_every=1000", "--save_every=1000")
    assert log_of("late") == log_of("at_once") and len(log_of("late")) == 8


def test_a_checkpoint_tells_how_it_was_made():
    """A record without what a table quotes of it, or of the last process alone."""
    checkpoint, _ = run("--name=told")
    record = json.loads((checkpoint / "train.json").read_text())
    assert record.pop("sha256") == files.seal_of(record)
    assert record.keys() == {
        "step", "settings", "command", "commit", "device", "processes", "torch", "seconds",
        "step_seconds", "tokens_per_second", "mfu", "skipped", "first_sample", "tokenizer",
        "haystack", "from"}
    assert record["tokenizer"] == "bytes" and record["haystack"] is record["from"] is None
    speed = 4 * 512 / record["step_seconds"]
    assert record["tokens_per_second"] == pytest.approx(speed, rel=0.01) and record["mfu"] is None

    flags = ["--name=retold", "--steps=3"]
    path, _ = continued(checkpoint, *flags)
    assert json.loads((path / "train.json").read_text())["from"] == record
    shutil.rmtree(path), shutil.rmtree(checkpoint)  # what it started from may be gone by then
    path, _ = continued(checkpoint, *flags, "--resume")
    again = json.loads((path / "train.json").read_text())
    first_two = json.loads((path.parent / "step_0000002" / "train.json").read_text())
    assert again["from"] == record
    assert again["seconds"] > first_two["seconds"]  # not of this process alone
    (path / "train.json").write_text(json.dumps({"step": 3, "settings": again["settings"]}))
    with pytest.raises(ValueError, match="older version"):
        continued(checkpoint, *flags, "--resume")


def test_lesson_gives_the_attention_checkpoint_a_memory_and_shows_what_changed(monkeypatch, capsys,
                                                                               tmp_path):
    """`python train.py` without a flag, in small: ends with a table, and again without training."""
    monkeypatch.setattr(runlog, "SHIPPED", [tmp_path / "checkpoints" / "attention"])
    Transformer(replace(TINY, context_len=1024)).save_pretrained(runlog.SHIPPED[0])
    monkeypatch.setattr(train, "LESSON", ["--steps=2", "--batch=1", "--device_batch=1",
                                          "--workers=0"])
    monkeypatch.setattr(eval_niah.niah, "default_new_tokens", lambda context_len, tokenizer: 12)
    for _ in range(2):
        train.lesson()
        text = capsys.readouterr().out
        for word in "one entry in 64", "converted - attention", "quest", "python eval_niah.py":
            assert word in text
    assert "goes on from" in text
    model = Transformer.from_pretrained("out/converted")
    assert model.config.memory and weights.resolve("out/converted").name == "step_0000002"


# ---------------------------------------------------------------- passes that teach nothing

def poison(monkeypatch, *passes):
    """The gradient's norm is NaN in these passes, counted from 0; two make a step."""
    original, count = parallel.gradient_norm, iter(range(999))
    monkeypatch.setattr(parallel, "gradient_norm", lambda model: original(model) * (
        float("nan") if next(count) in passes else 1))


@pytest.mark.parametrize("every", [1, 1000])
def test_a_pass_that_is_not_finite_is_skipped_counted_and_told(every, monkeypatch, capsys):
    """
    NaN in a batch that reaches the weights or the moments; or whose whole run is lost for it; a
    resume that forgets the count.
    """
    poison(monkeypatch, 3)  # step 2's dense pass
    flags = ["--name=nan", f"--log_every={every}", "--eval_every=1000", "--save_every=2"]
    for resume in [], ["--resume"]:
        checkpoint, _ = run(*flags, *resume)
        assert [row["skipped"] for row in log_of("nan")] == [0, 1, 1, 1]
        assert log_of("nan")[1]["grad_norm"] is None and updates_in(checkpoint) == 7
        assert json.loads((checkpoint / "train.json").read_text())["skipped"] == 1
        said = capsys.readouterr().out
        assert ("1 of 2 passes skipped, 1 so far" in said) == (not resume)
        shutil.rmtree(checkpoint)


def test_a_skipped_pass_changes_nothing(monkeypatch):
    """Weight decay or moments that go on without a gradient."""
    poison(monkeypatch, 2, 3)
    run("--name=nan", "--steps=2", "--save_every=1", "--eval_every=0")
    assert_same_files("out/nan/step_0000001", "out/nan/step_0000002")


def test_a_few_steps_in_a_row_that_are_not_finite_end_the_run(monkeypatch):
    """Days of a run that learns nothing any more."""
    poison(monkeypatch, *range(4, 99))
    with pytest.raises(FloatingPointError, match="3 steps in a row, up to step 5"):
        run("--name=nan", "--steps=20", "--save_every=2", "--log_every=1000", "--eval_every=0")
    assert [row["step"] for row in log_of("nan")] == [1, 2, 3, 4, 5, 6]  # told one step late
    assert updates_in("out/nan/step_0000004") == 4


def test_loss_that_is_not_finite_stops_the_run():
    """Hours of NaN must not overwrite good checkpoints."""
    with pytest.raises(FloatingPointError, match="step"):
        run("--name=nan", "--lr=1e18", "--clip=1e18", "--steps=20")
    for file in Path("out/nan").glob("step_*/model.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(file).values())


def weightless(monkeypatch, counts):
    """Samples of which counts(is of validation, index) is false have weight 0 everywhere."""
    sample = niah.Needles.__getitem__

    def changed(self, index):
        tokens, weight = sample(self, index)
        return tokens, weight * bool(counts(str(self.seed).startswith("val"), index))
    monkeypatch.setattr(niah.Needles, "__getitem__", changed)


def test_a_batch_without_a_token_that_counts_learns_nothing_and_says_so(monkeypatch, capsys):
    """0/0 told as divergence, which ends a run of three such batches; weight decay on nothing."""
    weightless(monkeypatch, lambda validation, index: validation or index < 4)
    run("--name=empty", "--steps=5", "--save_every=1", "--eval_every=0")
    assert [row["loss"] is None for row in log_of("empty")] == [False, True, True, True, True]
    assert [row["skipped"] for row in log_of("empty")] == [0, 0, 0, 0, 0]
    assert_same_files("out/empty/step_0000004", "out/empty/step_0000005")
    assert updates_in("out/empty/step_0000005") == 2
    said = capsys.readouterr().out
    assert said.count("no token of the batch counts") == 4 and "not finite" not in said


def test_a_validation_without_a_token_that_counts_is_none(monkeypatch, capsys):
    """A stack of calls for 0/0 at the end of a run."""
    weightless(monkeypatch, lambda validation, index: not validation)
    _, last = run("--name=blind")
    assert last["val_loss"] is last["val_accuracy"] is None
    assert "validation none, none of answer tokens right" in capsys.readouterr().out
