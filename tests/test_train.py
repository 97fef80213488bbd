"""
train.py: the schedule, resuming, accumulation and processes all leave the same numbers. Tiny
models, a few steps.
"""
import gc
import json
import os
import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import data
import niah
import train
from conftest import FORMS, ORACLE, assert_close, draw_tokens, refused, tiny
from experiments import export
from infra import files, parallel, runlog, shards, weights
from infra.init import fresh
from model import PRESETS, Config, Transformer
from ranks import on_two
from sparse import Dilated
from test_tokenizers import train_bpe

TINY = Config(257, n_layer=1, width=32, n_head=2, n_kv_head=2, mlp_width=64, context_len=512,
              eos_id=256)
BASE = ["--preset=pico", "--memory=on", "--arl=16", "--tasks", "niah_single_1", "--drills=0.5",
        "--steps=4", "--batch=4", "--log_every=1", "--eval_every=4", "--save_every=2",
        "--device=cpu"]
RARELY = ["--log_every=1000", "--eval_every=0", "--save_every=1000"]


@pytest.fixture(autouse=True)
def tiny_pico(monkeypatch, tmp_path):
    monkeypatch.setitem(PRESETS, "pico", TINY)
    monkeypatch.chdir(tmp_path)


def run(*flags, base=BASE):
    return train.train(train.parse([*base, *flags]))


def continued(source, *flags):
    """run, of a model that is there."""
    return run(f"--init={source}", *flags, base=BASE[1:])


def record_of(checkpoint):
    return json.loads((checkpoint / "train.json").read_text())


def log_of(name):
    """Without what is another number each time."""
    rows = [json.loads(line) for line in Path("out", name, "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.endswith(("second", "seconds"))}
            for row in rows]


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


def before_each_loss(monkeypatch, act):
    """act(number) before the loss is computed for the number-th time; each step does so twice."""
    original, calls = parallel.Loss.forward, []

    def forward(*given):
        calls.append(1)
        act(len(calls))
        return original(*given)
    monkeypatch.setattr(parallel.Loss, "forward", forward)


def send(number):
    os.kill(os.getpid(), number)


def ending(main, capsys, *flags):
    """-> the one line with which a script of these flags ends, and with exit 2"""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", ["script.py", *map(str, flags)])
        main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and len(error) < 500, error
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
SETTINGS = "tokens", "batch", "lr", "memory_lr", "warmup", "weight_decay", "arl", "adapt", "memory"
PAPER = {  # arXiv 2605.28640 and 2602.18196; (c): the configs of official RAT+, as is every min_lr
    "olmo2-continue": (10e9, 768, 6e-5, 6e-4, 0.02, 0.1, 64, None, "on"),
    "niah-sft": (4 * 73.7e6, 32, 1e-5, 1e-5, 0.05, 0.01, 0, None, None),  # (c) from warmup on
    "ratplus-1b": (110e9, 512, 8e-4, 8e-4, 0.05, 0.1, 64, None, None),
    "ratplus-7b": (110e9, 768, 6e-4, 6e-4, 0.05, 0.1, 64, None, None),
    "ratplus-1b-adapt": (1e9, 512, 8e-5, 8e-5, 0.0, 0.1, 0, PATTERN, None),
    "ratplus-7b-adapt": (1e9, 768, 2e-5, 2e-5, 0.02, 0.1, 0, PATTERN, None),
}


@pytest.mark.parametrize("recipe", PAPER)
def test_recipes_are_the_papers(recipe):
    """A digit of the paper's lost; a default changed under a recipe; a gate in the wrong group."""
    source = [] if recipe in ("ratplus-1b", "ratplus-7b") else ["--init=x"]
    text = "niah" if recipe == "niah-sft" else "x"
    args = train.parse([f"--recipe={recipe}", f"--data={text}", *source])
    wanted = dict(zip(SETTINGS, PAPER[recipe], strict=True))
    wanted |= {"context_len": 4096, "min_lr": 1e-6, "clip": 1.0}
    if recipe == "niah-sft":
        wanted |= {"protocol": "sft", "other_weight": 0.0}  # (c)
    tokens = args.steps * args.batch * args.context_len
    assert tokens == pytest.approx(wanted.pop("tokens"), rel=0.02)
    assert {key: getattr(args, key) for key in wanted} == wanted
    model = tiny(memory=True)
    optimizer = train.make_optimizer(model, args)
    assert optimizer.defaults["betas"] == (0.9, 0.95)  # (c)
    peaks = {id(p): group["peak"] for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        assert peaks[id(p)] == (args.memory_lr if ".memory." in name else args.lr), name


OUT_OF_RANGE = [
    "--lr=0", "--lr=nan", "--weight_decay=inf", "--clip=1e-300", "--memory_lr=1e300",
    "--other_weight=1e39", f"--seed={2**64}", f"--seed={-2**63}", f"--steps={10**400}",
    f"--batch={2**62}", f"--context_len={2**63}", "--log_every=0", "--warmup=1", "--joint=-1",
    "--memory=on --joint=64", "--memory=on --gate_start=0.1", "--yarn=1", "--yarn=nan"]
REFUSED = [
    ("--preset=pico --stepz=3", "stepz"),
    ("--preset=huge", "invalid choice"),
    ("--steps=3", "--preset"),
    ("--preset=pico --init=x", "one of --preset"),
    ("--preset=pico --yarn=2", "--yarn=2 stretches a trained model: give it as --init"),
    ("--init=nowhere", "nowhere"),
    ("--recipe=olmo2-continue --init=x", "--data"),
    ("--preset=pico --data=nowhere", "nowhere"),
    ("--preset=pico --tokenizer=nowhere", "nowhere"),
    ("--preset=olmo2-1b --context_len=512", "--tokenizer"),
    ("--preset=pico --tasks mk-9", "mk-9"),
    ("--preset=pico --tasks S-1 mq", "too short"),  # as tables name them
    ("--preset=pico --context_len=100", "too short"),
    ("--preset=pico --min_lr=1", "--min_lr 1.0 is above --lr"),
    ("--preset=pico --batch=6 --device_batch=4", "does not divide"),
    ("--preset=pico --adapt=quest:budget=1/4", "only dilated"),
    *((f"--preset=pico {flag}", flag.split()[-1].split("=")[0]) for flag in OUT_OF_RANGE)]


@pytest.mark.parametrize("flags, message", REFUSED, ids=range(len(REFUSED)))
def test_bad_flags_are_one_line_and_exit_2(flags, message, capsys, monkeypatch):
    """A traceback tells a user nothing."""
    monkeypatch.setitem(PRESETS, "olmo2-1b", replace(TINY, vocab_size=1000, eos_id=None))
    assert message in ending(train.main, capsys, *flags.split(), "--device=cpu")


# ---------------------------------------------------------------- what a step does

@pytest.mark.parametrize("seed", [2**31 - 1, -2**31])  # the largest that the flag takes
def test_training_learns_and_leaves_a_log_alone_if_told_so(seed, capsys):
    """A sign error, or targets not shifted by one, would leave the loss at ln 257 = 5.5."""
    path, last = run(f"--seed={seed}", "--steps=40", "--lr=1e-2", "--arl=0", "--eval_every=0",
                     "--save_every=0")
    assert last["step"] == 40 and last["loss"] < 3.5 and path is None
    assert [file.name for file in Path("out/pico").iterdir()] == ["log.jsonl"]
    assert "no checkpoint was asked for" in capsys.readouterr().out


@pytest.mark.parametrize("flags, extra", [
    ("--memory=off", []), ("--memory=off --arl=16", [Dilated(16, local=0, initial=0)]),
    ("--memory=off --joint=16", [Dilated(None, local=16, initial=0)]),
    ("--memory=on --arl=0 --joint=16", [Dilated(None, local=16, initial=0)])])
def test_the_extra_pass_is_what_was_asked_for_with_memory_or_without(
        flags, extra, monkeypatch, capsys):
    """A control that lacks ARL's pass as it has no memory, or has a pass that nobody wanted."""
    hidden, seen = Transformer.hidden, []
    monkeypatch.setattr(Transformer, "hidden", lambda self, tokens, method: seen.append(method)
                        or hidden(self, tokens, method))
    run(*flags.split(), "--steps=1", "--eval_every=0", base=[f for f in BASE if "arl" not in f])
    assert seen == [*extra, None]
    noted = "trains its sparse pattern alone" in capsys.readouterr().err
    assert noted == (flags == "--memory=off --arl=16")


def test_arl_weight_is_of_arls_gradient_alone():
    """A weight that the log's loss shows, or that the dense pass has too."""
    for weight in 1, 0.25:
        run(f"--name=w{weight}", f"--arl_weight={weight}", "--lr=1e-18", "--steps=1",
            "--eval_every=0")
    whole, quarter = log_of("w1")[0], log_of("w0.25")[0]
    assert quarter["arl_grad_norm"] == pytest.approx(whole["arl_grad_norm"] / 4, rel=1e-4)
    for key in "loss", "arl_loss", "grad_norm":
        assert quarter[key] == pytest.approx(whole[key], rel=1e-5)


def test_adaptation_trains_and_validates_through_the_pattern(monkeypatch):
    """A model adapted to its pattern in name only."""
    hidden, seen = Transformer.hidden, set()
    monkeypatch.setattr(Transformer, "hidden", lambda self, tokens, method: seen.add(
        (method, torch.is_grad_enabled())) or hidden(self, tokens, method))
    run("--arl=0", "--adapt=dilated:dilation=16,local=32,initial=4", "--steps=2")
    pattern = Dilated(dilation=16, local=32, initial=4)
    assert seen == {(pattern, True), (pattern, False)}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_graphed_steps_are_the_plain_ones():
    """A graph that reads the first batch again, or gradients that the next replay overwrote."""
    for name in "on", "off":
        run(f"--name={name}", "--device=cuda", f"--compile={name}")
    for a, b in zip(log_of("on"), log_of("off")):
        for key in "loss", "arl_loss", "grad_norm":
            assert a[key] == pytest.approx(b[key], rel=0.02)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_two_graphed_passes_take_the_memory_of_one(monkeypatch):
    """What a graph holds beside what the second one's first runs take: 83 GB where 47 are told."""
    monkeypatch.setitem(PRESETS, "pico", replace(TINY, width=256, mlp_width=1024, n_layer=4))

    def most(*flags):
        gc.collect()  # graphs of the run before
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        run("--device=cuda", "--compile=on", "--batch=64", "--context_len=512", *flags)
        return torch.cuda.max_memory_reserved()
    most("--name=compiled")
    assert most("--name=two") < 1.5 * most("--name=one", "--arl=0")


@pytest.mark.parametrize("clip", [0.5, 1e9])
def test_update_clips_as_torch_does(clip):
    """A gradient scaled twice or not at all, as clipping is left to the fused AdamW."""
    ours, theirs = models = tiny(memory=True), tiny(memory=True)
    for model in models:
        optimizer = train.make_optimizer(model, train.parse([*BASE, "--lr=1e-2"]))
        for _ in range(3):
            model.loss(draw_tokens(2, 17), torch.ones(2, 17)).backward()
            norm = parallel.gradient_norm(model)
            assert 0.5 < norm < 1e9
            if model is ours:
                parallel.update(optimizer, norm, clip)
            else:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_fresh_weights_are_those_of_a_new_model():
    """Two initialisations, of which one is changed."""
    config = replace(TINY, memory=True)
    tensors, model = fresh(Transformer, config, seed=0), Transformer(config)
    for name, p in model.named_parameters():
        tensor = tensors[name]()
        assert tensor.shape == p.shape and torch.equal(tensor, tensors[name]()), name
        assert tensor.mean().item() == pytest.approx(p.mean().item(), abs=0.004), name
        std = p.std(correction=0).item()
        assert tensor.std(correction=0).item() == pytest.approx(std, rel=0.1), name
    other = fresh(Transformer, config, seed=1)
    assert not torch.equal(other["lm_head.weight"](), tensors["lm_head.weight"]())


# ---------------------------------------------------------------- what is trained, on what

def test_a_longer_context_is_the_models_and_is_told_once(capsys):
    """A config.json that says 512: an evaluation asks at 512. Positions never seen, and no word."""
    newest, _ = run("--name=at512", "--arl=0")
    for context_len, notes in (1024, 1), (512, 0):
        flags = f"--context_len={context_len}", f"--name=then{context_len}", "--arl=0", "--resume"
        beyond = f"was trained for 512 tokens, and --context_len={context_len} goes beyond"
        source = newest
        for told in notes, 0:  # not again, of what the model has learned by now
            newest, _ = continued(source, *flags)
            said = capsys.readouterr().out
            assert said.count(beyond) == said.count("was trained for") == told
        assert Transformer.from_pretrained(newest).config.context_len == 1024
    run("--name=new", "--context_len=1024", "--steps=1", "--arl=0")
    assert "was trained for" not in capsys.readouterr().out


def test_a_run_in_a_file_is_refused():
    """A number of an error, and no word of what to do."""
    Path("file").touch()
    refused(lambda: run("--out=file"), "file/", "--out")
    Path("out").mkdir()
    Path("out/named").touch()
    refused(lambda: run("--name=named"), "out/named", "--name")


def test_flags_that_text_does_not_hear_are_told(capsys):
    """Tasks that someone believes to have trained on."""
    train.parse(["--recipe=nano", "--data=shards"])  # which has tasks, and nobody named any
    assert capsys.readouterr().err == ""
    train.parse(["--preset=pico", "--data=shards", "--tasks", "S-1", "--many=0.2"])
    assert "note: --many, --tasks: for needles, and of no effect on text" in capsys.readouterr().err


def test_yarn_stretches_the_length_before_and_stays(capsys):
    """A stretch that counts from the new length, is lost at --resume, or is made twice."""
    source, _ = run("--name=at512", "--arl=0")
    longer = "--context_len=1024", "--arl=0"
    continued(source, *longer, "--name=plain")
    assert "it has to learn positions that are new to it" in capsys.readouterr().out

    stretched = *longer, "--name=far", "--yarn=4"
    newest, _ = continued(source, *stretched)
    assert "its RoPE is stretched to 2,048, and it has to get" in capsys.readouterr().out
    config = Transformer.from_pretrained(newest).config
    scaling = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=512)
    assert (config.rope_scaling, config.context_len) == (scaling, 1024)
    # the same start and samples: what differs from the first step on is the RoPE
    plain, far = ([row["loss"] for row in log_of(name)] for name in ("plain", "far"))
    assert all(abs(a - b) > 1e-6 for a, b in zip(plain, far, strict=True))

    # stopped after two of four steps
    for flags in longer, (*longer, "--yarn=3"):
        refused(lambda: continued(source, *flags, "--name=far", "--resume"), "--yarn=4.0")
    before = Path(shutil.move(newest, "before"))
    assert continued(source, *stretched, "--resume")[0] == newest
    assert_same_files(newest, before)
    assert Transformer.from_pretrained(newest).config == config
    assert "was trained for" not in capsys.readouterr().out  # it has been said

    # trained on, it keeps the stretch; within it, nothing is new
    last, _ = continued(newest, "--name=on", "--context_len=1536", "--arl=0", "--steps=1")
    assert Transformer.from_pretrained(last).config == replace(config, context_len=1536)
    assert "its RoPE is stretched to 2,048" in capsys.readouterr().out
    continued(newest, "--name=beyond", "--context_len=2560", "--arl=0", "--steps=1")
    assert "it has to learn positions that are new to it" in capsys.readouterr().out
    refused(lambda: continued(newest, "--name=again", "--yarn=2"), "stretched already")
    continued(source, "--name=within", "--yarn=2", "--arl=0", "--steps=1")
    assert "--yarn=2 is for a --context_len beyond the 512" in capsys.readouterr().out


@pytest.mark.parametrize("death, says", [
    (lambda: send(signal.SIGKILL), "a process that makes batches is gone"),
    (lambda: files.refuse_number("x"), "train.py: x is no number\n")])
def test_what_ends_a_worker_is_one_line(death, says, monkeypatch, capsys):
    """Two processes' tracebacks of a worker that is lost, or has found a damaged shard."""
    sample = niah.Needles.__getitem__
    monkeypatch.setattr(niah.Needles, "__getitem__", lambda self, index: death() if (
        index >= 8 and torch.utils.data.get_worker_info()) else sample(self, index))
    assert says in ending(train.main, capsys, *BASE, "--workers=1")


# ---------------------------------------------------------------- stopped and resumed

def test_resumed_run_equals_uninterrupted_run(monkeypatch):
    """State that a checkpoint forgets; chance that goes on otherwise; a log torn or lost."""
    hidden = Transformer.hidden
    monkeypatch.setattr(Transformer, "hidden", lambda self, *given, **more: (
        torch.nn.functional.dropout(hidden(self, *given, **more), 0.1, self.training)))
    whole, _ = run("--name=whole")
    resumed, _ = run("--name=parts")
    shutil.rmtree(resumed)
    log = Path("out/parts/log.jsonl")
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:3]) + '{"step": 4, "lo')
    end = run("--name=parts", "--resume")
    assert_same_files(whole, resumed)
    assert log_of("whole") == log_of("parts")
    seconds = [json.loads(line)["seconds"] for line in log.read_text().splitlines()]
    assert seconds == sorted(seconds)  # not of the last process alone
    assert run("--name=parts", "--resume") == end  # where nothing is left to do
    log.unlink()
    assert run("--name=parts", "--resume", "--save_every=0")[0] == resumed


def in_a_thread(*flags):
    """run, where no signal is heard."""
    with ThreadPoolExecutor() as threads:
        return threads.submit(run, *flags).result()


@pytest.mark.parametrize("start, wish", [
    (run, lambda: send(signal.SIGINT)),
    (run, lambda: Path("out/pico/stop").touch()),
    (in_a_thread, lambda: Path("out/pico/stop").touch())])
def test_a_wish_to_stop_saves_a_checkpoint_and_the_next_run_goes_on(start, wish, capsys,
                                                                    monkeypatch):
    """A last step lost, an end like success, handlers that stay; a thread that claims to hear."""
    before_each_loss(monkeypatch, lambda n: n == 5 and wish())  # in step 3 of 4
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as stop:
        start()
    said = capsys.readouterr()
    assert stop.value.code == 130 and "--resume" in said.out
    assert said.err.count("make a file out/pico/stop to stop") == (start is in_a_thread)
    by_signal = start is run and not Path("out/pico/stop").exists()
    assert said.err.count("stops after this step") == by_signal
    assert weights.resolve("out/pico").name == "step_0000003"
    checkpoint, _ = start("--resume")
    assert checkpoint.name == "step_0000004" and not Path("out/pico/stop").exists()
    assert signal.getsignal(signal.SIGINT) == before


def train_tiny():
    """train.py as one of two processes."""
    PRESETS["pico"] = TINY
    train.main()


def interrupted():
    """The same; the second hears ctrl-C in step 3."""
    before_each_loss(pytest.MonkeyPatch(), lambda n: n == 5 and os.environ["RANK"] == "1" and send(
        signal.SIGINT))
    train_tiny()


def test_a_signal_to_one_process_stops_both_after_the_same_step(tmp_path):
    """One that waits for the other for ever; lines for steps that the checkpoint has not seen."""
    done = on_two(interrupted, *BASE, "--steps=12", *RARELY, folder=tmp_path)
    assert "stopped after step 4" in done.stdout, done.stdout + done.stderr[:4000]
    assert [row["step"] for row in log_of("pico")] == [1, 2, 3, 4]
    assert [path.name for path in Path("out/pico").glob("step_*")] == ["step_0000004"]


# ---------------------------------------------------------------- may it go on?

def test_runs_do_not_mix(monkeypatch):
    """A run that is written over, or goes on with other settings, or with samples of other code."""
    checkpoint, _ = run("--steps=2")
    again = lambda *flags: lambda: run("--steps=2", *flags)
    refused(again(), "--resume")
    refused(again("--resume", "--lr=0.5"), "--lr=0.001")
    with monkeypatch.context() as patch:
        sample = niah.training_sample
        patch.setattr(niah, "training_sample",
                      lambda *given: (sample(*given)[0] // 2, sample(*given)[1]))
        refused(again("--resume"), "the samples of out/pico are others by now")
    older = json.dumps({key: record_of(checkpoint)[key] for key in ("step", "settings")})
    for text, words in (older, "older version"), (older[:20], "2/train.json is damaged"):
        (checkpoint / "train.json").write_text(text)
        refused(again("--resume"), words)


def some_shards(folder, text=b"to be or not to be. "):
    Path(folder).mkdir(parents=True)
    document = np.array([*text * 20, 256], np.uint16).tobytes()
    shards.save_shard(Path(folder, "00000.bin"), [document] * 200, 257, "bytes", 0)


def test_a_run_goes_on_with_the_same_files_wherever_they_are(tmp_path):
    """Files known by their paths: refused after a move, or taken though others are there now."""
    some_shards("shards")
    some_shards("others", b"it was a dark night. ")
    text = ["--name=text", "--context_len=64", "--arl=0", "--steps=2", "--resume"]
    run(*text, "--data=shards")
    run(*text, f"--data={tmp_path}/shards")
    shutil.move("shards", "moved")
    run(*text, "--data=moved")
    shutil.move("out/text", "out/renamed")
    run(*text, "--name=renamed", "--data=moved")
    refused(lambda: run(*text, "--name=renamed", "--data=others"), "--data")

    for file, word in ("essay", "best"), ("same", "best"), ("other", "worst"):
        Path(f"{file}.txt").write_text(f"It was the {word} of times. " * 400)
    needles = ["--name=essays", "--steps=2", "--resume"]  # whose first sample has no essay
    checkpoint, _ = run(*needles, "--haystack=essay.txt")
    run(*needles, "--haystack=same.txt")
    for other in ["--haystack=other.txt"], []:
        refused(lambda: run(*needles, *other), "--haystack=essay.txt")

    shutil.copytree(checkpoint, "copy")
    on = ["--name=on", "--steps=2", "--resume"]
    for source in "out/essays", tmp_path / "out/essays", "copy":
        continued(source, *on)
    refused(lambda: continued("out/renamed", *on), "--init")


def test_a_checkpoint_has_the_tokenizer_it_was_trained_with_and_goes_on_with_no_other(monkeypatch):
    """The tokenizer.json beside the one that was named; a second half trained on other tokens."""
    monkeypatch.setitem(PRESETS, "pico", replace(TINY, vocab_size=700, eos_id=None))
    train_bpe(Path("one"), "gpt2"), train_bpe(Path("two"), "llama3")
    shutil.copy("two/tokenizer.json", "one/mine.json")
    flags, name = ["--steps=2", "--resume"], data.get_tokenizer("two").name
    checkpoint, _ = run(*flags, "--tokenizer=one/mine.json")
    found = {file.name: json.loads(file.read_text()) for file in checkpoint.glob("*.json")}
    assert found["config.json"]["tokenizer"] == found["train.json"]["tokenizer"] == name
    assert found.keys() == {"config.json", "tokenizer.json", "train.json"}
    mine = Path("two/tokenizer.json").read_bytes()
    assert (checkpoint / "tokenizer.json").read_bytes() == mine
    for same in ["--tokenizer=two"], ["--tokenizer=two/tokenizer.json"], []:  # []: the checkpoint's
        assert run(*flags, *same)[0] == checkpoint
    refused(lambda: run(*flags, "--tokenizer=one"), name)
    some_shards("shards")
    text = ["--name=text", "--data=shards", "--context_len=64", "--arl=0"]
    refused(lambda: run(*text, "--tokenizer=two"), "tokenizer bytes")


# ---------------------------------------------------------------- log and record

@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a full disk at hand")
def test_a_full_disk_under_the_log_is_one_line_that_names_it(monkeypatch):
    monkeypatch.setattr(runlog, "open", lambda *_: open("/dev/full", "w"), raising=False)
    refused(run, "/dev/full: not written (No space left on device)", "--res", error=OSError)


def test_steps_whose_numbers_are_told_late_are_logged_all_the_same():
    """A line lost, doubled or out of order, where the loop runs a step ahead of what it knows."""
    run("--name=at_once", "--steps=8", "--eval_every=0")
    run("--name=late", "--steps=8", *RARELY)
    assert log_of("late") == log_of("at_once") and len(log_of("late")) == 8


def test_a_checkpoint_tells_how_it_was_made():
    """A record without what a table quotes of it, or of the last process alone."""
    checkpoint, _ = run("--name=told")
    record = record_of(checkpoint)
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
    assert record_of(path)["from"] == record
    shutil.rmtree(path), shutil.rmtree(checkpoint)  # what it started from may be gone by then
    path, _ = continued(checkpoint, *flags, "--resume")
    again, first_two = record_of(path), record_of(path.parent / "step_0000002")
    assert again["from"] == record
    assert again["seconds"] > first_two["seconds"]  # not of this process alone


# ---------------------------------------------------------------- passes that teach nothing

def poison(monkeypatch, *passes):
    """The gradient's norm is NaN in these passes, counted from 0; two make a step."""
    original, count = parallel.gradient_norm, iter(range(999))
    monkeypatch.setattr(parallel, "gradient_norm", lambda model: original(model) * (
        float("nan") if next(count) in passes else 1))


@pytest.mark.parametrize("every", [1, 1000])
def test_a_pass_that_is_not_finite_is_skipped_counted_and_told(every, monkeypatch, capsys):
    """NaN that reaches weights or moments, or ends the run; a resume that forgets the count."""
    poison(monkeypatch, 3)  # step 2's dense pass
    for resume in [], ["--resume"]:
        checkpoint, _ = run(f"--log_every={every}", "--eval_every=1000", *resume)
        log = log_of("pico")
        assert [row["skipped"] for row in log] == [0, 1, 1, 1] and log[1]["grad_norm"] is None
        assert record_of(checkpoint)["skipped"] == 1 and updates_in(checkpoint) == 7
        said = capsys.readouterr().out
        assert ("1 of 2 passes skipped, 1 so far" in said) == (not resume)
        shutil.rmtree(checkpoint)


def test_a_few_steps_in_a_row_that_are_not_finite_end_the_run(monkeypatch):
    """Days of a run that learns nothing any more, or NaN over its last good checkpoint."""
    poison(monkeypatch, *range(4, 99))
    with pytest.raises(FloatingPointError, match="3 steps in a row, up to step 5"):
        run("--steps=20", "--save_every=2", "--log_every=1000", "--eval_every=0")
    assert [row["step"] for row in log_of("pico")] == [1, 2, 3, 4, 5, 6]  # told one step late
    assert updates_in("out/pico/step_0000004") == 4


def test_a_batch_without_a_token_that_counts_learns_nothing_and_says_so(monkeypatch, capsys):
    """0/0 told as divergence, or as a stack of calls in validation; weight decay on nothing."""
    sample = niah.Needles.__getitem__

    def weightless(self, index):  # but for the first batch
        tokens, weight = sample(self, index)
        return tokens, weight * (self.seed == 0 and index < 4)
    monkeypatch.setattr(niah.Needles, "__getitem__", weightless)
    _, last = run("--steps=5", "--save_every=1", "--eval_every=5")
    assert [row["loss"] is None for row in log_of("pico")] == [False, True, True, True, True]
    assert [row["skipped"] for row in log_of("pico")] == [0, 0, 0, 0, 0]
    assert last["val_loss"] is last["val_accuracy"] is None
    assert_same_files("out/pico/step_0000004", "out/pico/step_0000005")
    assert updates_in("out/pico/step_0000005") == 2
    said = capsys.readouterr().out
    assert said.count("no token of the batch counts") == 4 and "not finite" not in said
    assert "validation none, none of answer tokens right" in said


# ---------------------------------------------------------------- families

@pytest.mark.parametrize("form", ["gqa", "llama", "qwen2", "qwen3"])
def test_a_family_takes_a_memory_trains_and_comes_out_again(form, tmp_path, monkeypatch, capsys):
    """
    A bias or a head's norm that is not trained, or not saved; a Llama that comes out under names
    that transformers does not know; a memory that stays in the file that promises none.
    """
    from transformers import AutoModelForCausalLM
    source = tiny(vocab_size=257, eos_id=256, context_len=512, **FORMS[form])
    source.save_pretrained(tmp_path / "in")
    folder, _ = continued(tmp_path / "in", "--memory=on")
    trained = Transformer.from_pretrained(folder)
    assert trained.config.memory and json.loads(
        (folder / "config.json").read_text())["model_type"] == "nanorat"
    state, before = trained.state_dict(), source.state_dict()
    same = [name for name in before if torch.equal(before[name], state[name])]
    assert not same, "not trained"

    def exported(*flags):
        monkeypatch.setattr(sys, "argv", ["export.py", str(folder), "out/plain", *flags])
        export.main()
        return Path("out/plain")
    plain = exported("--memory=off")
    assert "without its memory" in capsys.readouterr().out
    without = Transformer(replace(trained.config, memory=None))
    without.load_state_dict({name: x for name, x in state.items() if ".memory." not in name})
    theirs, report = AutoModelForCausalLM.from_pretrained(plain, output_loading_info=True)
    assert not any(report.values()), report
    tokens = draw_tokens(2, 30, vocab_size=257)
    with torch.no_grad():
        assert_close(theirs(tokens).logits, without(tokens), atol=1e-4)
    monkeypatch.setattr(sys, "argv", ["export.py", str(plain), "out/again", "--memory=off"])
    with pytest.raises(SystemExit):
        export.main()
    assert "has none to take out" in capsys.readouterr().err
