"""experiments/ablations.py: a variant is what its name says, in training and in decoding, and nothing of it stays behind."""
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from experiments import ablations
from conftest import DEVICE, assert_close, draw_tokens, tiny

from triton_ops import backend
import eval_niah
import niah
from experiments import runs
import train
from infra.tokenizers import ByteTokenizer
from memory import memory_loop
from model import PRESETS, Attention, Config, Transformer
from sparse import Dense


TINY = Config(257, n_layer=1, width=32, n_head=2, n_kv_head=2, mlp_width=64, context_len=512, eos_id=256)
RUN = ["--context_len=512", "--tasks", "niah_single_1", "--arl=16", "--batch=2", "--device=cpu"]


@pytest.fixture(autouse=True)
def kernels_stay_as_they_were(monkeypatch):
    """A run's --kernels=torch would hold for the tests of other files."""
    monkeypatch.setattr(backend, "choice", backend.choice)


@pytest.fixture
def one_layer():
    """Attention of a tiny model; x (B, T, C) and what a layer is told; k, v (B, T, KV, D)."""
    model, source = tiny(memory=True), torch.Generator().manual_seed(1)
    feed = model.feed(draw_tokens(2, 20), None, None, Dense())
    x, k, v = torch.randn(2, 20, 32, generator=source), *torch.randn(2, 2, 20, 4, 8, generator=source)
    return model.layers[0].self_attn, x, feed, k, v


def computed(attention, x, feed, k, v):
    """-> gate logits (B, T, KV, D), k~, v~: as Attention.forward gets them."""
    gate = attention.gate(x).view(k.shape)
    return gate, *attention.remember(k, v, gate, feed, None)


# ---------------------------------------------------------------- the variants

@pytest.mark.parametrize("variant", ["memory", "no-arl"])
def test_memory_and_no_arl_compute_eq_1_as_it_is(one_layer, variant):
    """A baseline that is itself changed."""
    attention, x, feed, k, v = one_layer
    before = attention.gate(x).view(k.shape)
    with ablations.changed(variant, 16):
        gate, k_mem, v_mem = computed(*one_layer)
    assert torch.equal(gate, before)
    k_ref, v_ref, _ = memory_loop(k, v, gate)
    assert_close(k_mem, k_ref), assert_close(v_mem, v_ref)


def test_keys_only_leaves_v_and_values_only_leaves_k(one_layer):
    """k and v confused, or both changed: two lines of the table would be exchanged, or equal."""
    *_, k, v = one_layer
    with ablations.changed("keys-only", 16):
        gate, k_mem, v_mem = computed(*one_layer)
    assert_close(k_mem, memory_loop(k, v, gate)[0])
    assert torch.equal(v_mem, v)
    with ablations.changed("values-only", 16):
        gate, k_mem, v_mem = computed(*one_layer)
    assert torch.equal(k_mem, k)
    assert_close(v_mem, memory_loop(k, v, gate)[1])


def test_head_gate_is_the_mean_of_a_heads_channels(one_layer):
    """A mean over another dimension: over heads, or over tokens, which would look into the future."""
    attention, x, *_, k, v = one_layer
    own = attention.gate(x).view(k.shape)
    with ablations.changed("head-gate", 16):
        gate, k_mem, v_mem = computed(*one_layer)
    assert torch.equal(gate, gate[..., :1].expand_as(gate))
    assert_close(gate[..., 0], own.mean(-1))
    k_ref, v_ref, _ = memory_loop(k, v, gate)
    assert_close(k_mem, k_ref), assert_close(v_mem, v_ref)


def test_fixed_decay_has_its_lengths_and_neither_sees_nor_learns(one_layer):
    """Lengths that are not 1 to ARL's, -inf where L = 1, or a gate that still depends on x or gets a gradient."""
    attention, x, feed, k, v = one_layer
    with ablations.changed("fixed-decay", 27):
        gate, k_mem, v_mem = computed(*one_layer)
        other = attention.gate(x + 1).view(k.shape)
        attention(x, feed, None).sum().backward()
    assert torch.equal(gate, other) and gate.isfinite().all()
    lengths = 1 / torch.sigmoid(-gate.double())  # 1 / (1 - g)
    assert_close(lengths, torch.tensor([1., 3, 9, 27]).double()[:, None].expand(k.shape), atol=1e-3)
    k_ref, v_ref, _ = memory_loop(k, v, gate)
    assert_close(k_mem, k_ref), assert_close(v_mem, v_ref)
    assert torch.equal(k_mem[:, :, 0], k[:, :, 0])
    assert not any(p.grad.any() for p in attention.memory_proj.parameters()) and attention.k_proj.weight.grad.any()


@pytest.mark.parametrize("form", [{}, dict(n_kv_head=2), dict(pre_norm=True, qk_norm=False, output_gate=True)])
@pytest.mark.parametrize("variant", ablations.VARIANTS)
def test_a_variant_decodes_as_it_trains(variant, form):
    """A change that reaches the pass of training alone: the evaluation would be of the full memory, or of a mixture."""
    model, tokens = tiny(memory=True, **form), draw_tokens(2, 24)
    plain = model(tokens)
    with ablations.changed(variant, 16), torch.no_grad():
        whole = model(tokens)
        cache = model.new_cache(2, 24)
        prompt = model.prefill(tokens[:, :20], cache=cache)
        steps = [model(tokens[:, t:t + 1], cache=cache)[:, 0] for t in range(20, 24)]
    assert_close(torch.stack([prompt, *steps], dim=1), whole[:, 19:])
    assert (variant in ("memory", "no-arl")) == torch.equal(whole, plain)


@pytest.mark.skipif(not backend.HAS_TRITON, reason="no Triton here")
@pytest.mark.parametrize("variant", ablations.VARIANTS[2:])
def test_a_variant_trains_alike_with_either_backend(variant, monkeypatch):
    """A kernel that goes past Attention.remember, or that a gate of other strides and an unused k~ or v~ confuse."""
    tokens, gradients = draw_tokens(1, 20).to(DEVICE), []
    for choice in "torch", "triton":
        monkeypatch.setattr(backend, "choice", choice)
        model = tiny(memory=True, n_layer=1, width=64, n_kv_head=2).to(DEVICE)  # heads of 16
        with ablations.changed(variant, 16):
            model(tokens).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, ours in zip(*gradients):
        assert_close(ours, plain, atol=1e-4, what="gradients")


def test_nothing_of_a_variant_stays_behind():
    """The next model in the process, or the next test, would compute as the last variant; after an error, too."""
    gate, remember = Attention.gate, Attention.remember
    for variant in ablations.VARIANTS:
        with pytest.raises(ZeroDivisionError), ablations.changed(variant, 16):
            1 / 0
        assert Attention.gate is gate and Attention.remember is remember
    with pytest.raises(ValueError, match="--arl"), ablations.changed("fixed-decay", 0):
        pass
    assert Attention.gate is gate


# ---------------------------------------------------------------- lengths, loss

def constant_gates(model, most=10):
    """Give each channel of each layer a gate of its own that reads nothing. -> its length 1 / (1 - g), (layers, KV, D)"""
    expected = []
    for i, layer in enumerate(model.layers):
        projection = layer.self_attn.memory_proj
        L = torch.linspace(1.5, most - i, len(projection.bias))
        with torch.no_grad():
            projection.weight.zero_()
            projection.bias.copy_((L - 1).log())
        expected.append(L.view(model.config.n_kv_head, -1))
    return torch.stack(expected)


def test_lengths_of_constant_gates():
    """Layers, heads or channels in the wrong place; a gate that is not the one the layer used."""
    model, tokens = tiny(memory=True, n_kv_head=2), draw_tokens(2, 300)
    expected = constant_gates(model)
    found = ablations.lengths(model, tokens)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)
    assert torch.equal(ablations.lengths(model, tokens), found)  # the hooks of the first call are gone
    with ablations.changed("fixed-decay", 9):
        found = ablations.lengths(model, tokens)
    torch.testing.assert_close(found, torch.tensor([1., 9])[:, None].expand_as(found), rtol=1e-3, atol=0)


def test_lm_loss_of_an_untrained_model_is_that_of_guessing():
    """Targets off by one place, a sum for a mean, or logits in another unit: none would give log(vocabulary)."""
    torch.manual_seed(0)
    model = Transformer(Config(257, n_layer=1, width=32, n_head=2, n_kv_head=2, mlp_width=64, context_len=128, memory=True))
    loss = ablations.lm_loss(model, ByteTokenizer(), n_windows=4)
    assert loss == pytest.approx(math.log(257), abs=0.05)
    ids = torch.tensor(ByteTokenizer().encode(ablations.docstrings())[:4 * 129]).view(4, 129)
    logits = model(ids)[:, :-1].log_softmax(-1)  # the last input token adds nothing to what comes before it
    assert loss == pytest.approx(-logits.gather(2, ids[:, 1:, None]).mean().item(), abs=1e-5)


def test_docstrings_are_text_that_training_never_saw():
    """A text that the essays hold as well, that changes from call to call, or that is too short for 64 windows of 1024."""
    text = ablations.docstrings()
    assert text == ablations.docstrings() and len(text) > 64 * 1025
    words, essays = text.split(), " ".join(niah.essay_words()[0])
    assert not [start for start in range(0, len(words), 10) if " ".join(words[start:start + 10]) in essays]


# ---------------------------------------------------------------- the command

@pytest.fixture
def small_run(tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "micro", TINY)
    monkeypatch.setattr(eval_niah, "METHODS", ["quest:budget=1/4", "snapkv:budget=1/4"])
    monkeypatch.chdir(tmp_path)
    return lambda *flags: ablations.main(["--run=fixed-decay-0", "--samples=1", *RUN, "--steps=2", "--save_every=1", *flags])


def test_a_variant_is_trained_once_as_itself_and_evaluated(small_run, monkeypatch, capsys):
    """Training without the change, evaluation of something else, a finished run trained again, one that cannot go on."""
    small_run()
    run, result = Path("out/ablations/ablation-fixed-decay-0"), Path("results/ablations/fixed-decay-0.json")
    record = json.loads(result.read_text())
    assert record["command"] == "python -m experiments.ablations --run=fixed-decay-0 --samples=1 " + " ".join(RUN) + " --steps=2 --save_every=1"
    assert record["train"]["settings"]["seed"] == 0 and record["train"]["settings"]["batch"] == 2 and {"command", "commit", "device", "torch"} <= record["train"].keys()
    assert record["eval"]["settings"]["kernels"] == "torch" and record["eval"]["settings"]["samples"] == 1
    assert list(record["scores"]) == ["dense", "quest:budget=1/4,block_size=8", "snapkv:budget=1/4,window=8,kernel=15"]
    assert record["scores"]["dense"]["tasks"].keys() == {"niah_single_1"} == record["prompts"].keys()
    assert record["median_length"] == pytest.approx(1)  # of lengths 1 and 16, the lower
    model, new = Transformer.from_pretrained(run), train.parallel.make_model(Transformer, *train.what_to_train(args := train.parse(["--memory=on", "--recipe=micro", *RUN])), args)
    trained, untrained = model.layers[0].self_attn, new.layers[0].self_attn
    # lr * weight decay alone, of two steps of two passes, and two steps of one in fine-tuning, which has no ARL
    shrunk = math.prod(1 - lr * 0.1 for lr in (2e-3, 2e-3, 1e-3, 1e-3, 1e-3, 5e-4))
    assert_close(trained.memory_proj.weight, shrunk * untrained.memory_proj.weight, atol=1e-7)
    assert not torch.equal(trained.k_proj.weight, untrained.k_proj.weight)

    for path in str(run), f"{run}-pretrained":  # as a checkpoint it is still what it was trained as
        with ablations.loaded(path):
            assert Attention.gate is not ablations.plain_gate
    shutil.rmtree(run / "step_0000002")
    result.write_text(json.dumps(record | {"median_length": "of another model"}))  # its train.json differs in the time it took
    small_run()  # goes on after step 1, though AdamW has no state of the gate, and is asked again
    assert json.loads(result.read_text())["median_length"] == pytest.approx(1)
    monkeypatch.setattr(train, "train", lambda args: pytest.fail("trained again"))
    small_run("--samples=2")
    assert json.loads(result.read_text())["eval"]["settings"]["samples"] == 2
    monkeypatch.setattr(eval_niah, "main", lambda argv: pytest.fail("evaluated again"))
    small_run("--samples=2")
    monkeypatch.setattr(runs, "prompts_of", lambda *_: {"niah_single_1": "of other words"})
    with pytest.raises(pytest.fail.Exception, match="evaluated again"):
        small_run("--samples=2")
    monkeypatch.setattr(runs, "prompts_of", lambda *_: json.loads(result.read_text())["prompts"])
    small_run("--samples=2")
    with pytest.raises(SystemExit) as end:  # a run of other flags is not this one
        small_run("--lr=1e-5")
    assert end.value.code == 2 and "--lr" in capsys.readouterr().err and result.exists()


def test_lengths_and_lm_loss_of_a_checkpoint(tmp_path, monkeypatch, capsys):
    """A table that mixes up heads and layers; a loss or a plot that the command does not give."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ablations, "MODULES", ["heapq"])
    model = tiny(vocab_size=257, memory=True, width=64, n_kv_head=2, context_len=512)
    expected = constant_gates(model).median(dim=2).values
    model.save_pretrained("model")
    ablations.main(["--lengths", "model"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.split()[0].isdigit()]
    assert [[float(cell) for cell in row[1:]] for row in rows] == [pytest.approx(row, abs=0.06) for row in expected.tolist()]
    ablations.main(["--lm_loss", "model", "model"])
    losses = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines() if line.startswith("model ")]
    assert losses == [pytest.approx(ablations.lm_loss(model, ByteTokenizer()), abs=1e-3)] * 2
    told = json.loads(Path("results/lm-loss.json").read_text())
    assert told["nats_per_token"]["model"] == pytest.approx(losses[0], abs=1e-3) and "--lm_loss model model" in told["command"]
    report = json.loads(Path("results/lengths.json").read_text())
    assert report["checkpoint"] == "model" and torch.tensor(report["lengths"]).median(dim=2).values.tolist() == [
        pytest.approx(row, rel=1e-3, abs=1e-3) for row in expected.tolist()]
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    assert Path("results/lengths.png").read_bytes().startswith(b"\x89PNG")


def test_all_variants_stop_at_the_first_that_fails(tmp_path, monkeypatch, capsys):
    """A table of what is left, or a wait for the rest; and a line that does not tell which run, or why."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # one at a time
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        ablations.main(["--variants", "head-gate", "memory", "--steps=1", "--haystack=nowhere.txt", *RUN])
    line = capsys.readouterr().err
    assert end.value.code == 2 and line.startswith("ablations.py: ablation-head-gate-0: ") and line.count("\n") == 1, line
    assert "nowhere.txt" in line and not Path("out/ablations/ablation-memory-0.log").exists() and not Path("results").exists()


def written(variant, seed, score, prompts="a hash"):
    scores = {method: {"mean": score, "tasks": {}} for method in ["dense", *eval_niah.METHODS]}
    eval_niah.save({"scores": scores, "median_length": 7.0, "prompts": {"niah_single_1": prompts}, "train": {},
                    "eval": {"settings": {"samples": 100}}}, f"results/ablations/{variant}-{seed}.json")


def test_all_runs_make_one_table(tmp_path, monkeypatch, capsys):
    """A row under another variant's name, seeds that are left out or run twice, results that were there and are not told."""
    monkeypatch.chdir(tmp_path)
    made, asked_before = [], []

    class Process:  # in place of a run
        def __init__(self, command, **_):
            made.append(command[2].removeprefix("--run="))
            variant, seed = ablations.named(made[-1])
            written(variant, seed, 10.0 * len(made))

        def wait(self):
            return 0
    monkeypatch.setattr(runs, "subprocess", SimpleNamespace(Popen=Process))
    written("values-only", 0, 90.0)
    with pytest.raises(SystemExit):  # it was asked other prompts than these would be
        ablations.main(["--variants", "no-arl", *RUN])
    assert "values-only-0.json was asked other prompts" in capsys.readouterr().err and made == []
    Path("results/ablations/no-arl-1.json").write_text("{")
    with pytest.raises(SystemExit):  # of a wanted run, but who knows what it was
        ablations.main(["--variants", "no-arl", "--seeds", "1", *RUN])
    assert "no-arl-1.json is damaged" in capsys.readouterr().err and made == []
    Path("results/ablations/no-arl-1.json").unlink()
    monkeypatch.setattr(runs, "refuse_others", lambda stay, _: asked_before.append(stay))
    ablations.main(["--variants", "no-arl", "memory", "--seeds", "3", "1", "3", *RUN])
    rows = {row[0]: row[1:] for row in map(str.split, capsys.readouterr().out.splitlines()) if row}
    assert made == ["no-arl-3", "memory-3", "no-arl-1", "memory-1"]
    assert rows["no-arl"] == ["2", *["20.0±14.1"] * 10, "7.0"] and rows["memory"] == ["2", *["30.0±14.1"] * 10, "7.0"]
    assert rows["values-only"] == ["1", *["90.0"] * 10, "7.0"]
    ablations.main(["--variants"])  # the table again, and nothing else
    assert "30.0" in capsys.readouterr().out and len(made) == 4
    ablations.main(["--variants", "no-arl", "--seeds", "3", *RUN])
    stay = [[file.stem for file in before] for before in asked_before]
    assert stay == [["values-only-0"], ["memory-1", "memory-3", "no-arl-1", "values-only-0"]]


def test_results_that_make_no_table_are_refused(tmp_path, monkeypatch, capsys):
    """None at all, one of other prompts, a foreign file: the line must say which, and how to go on."""
    monkeypatch.chdir(tmp_path)

    def refused():
        with pytest.raises(SystemExit) as end:
            ablations.main(["--variants"])
        line = capsys.readouterr().err
        assert end.value.code == 2 and line.count("\n") == 1, line
        return line
    assert "--variants" in refused()
    written("memory", 0, 1.0)
    written("no-arl", 0, 1.0, "other prompts")
    assert "no-arl-0.json" in refused()
    for foreign in "{}", "[]", "{":
        Path("results/ablations/memory-0.json").write_text(foreign)
        assert "memory-0.json" in refused()


@pytest.mark.parametrize("argv, words", [
    (["--frobnicate"], "--frobnicate"),
    (["--variants", "valuesonly"], "valuesonly"),
    (["--variants", "fixed-decay", "--steps=0"], "--steps"),
    (["--run", "fixed-decay"], "fixed-decay"),
    (["--run", "memory-0", "--seed=3"], "--seed=3"),
    (["--variants", "memory", "--memory=off"], "--memory=off"),
    (["--variants", "--frobnicate"], "--frobnicate"),
    (["--seeds", "-1"], "-1"),
    (["--run", "decay-0"], "decay-0"),
    (["--run", "memory-0", f"--results={__file__}"], "--results"),
    (["--run", "fixed-decay-0", "--arl=0"], "--arl"),
    (["--variants", "memory", "fixed-decay", "--arl=0"], "--arl"),
    (["--samples=0"], "--samples"),
    (["--lengths", "nowhere"], "nowhere"),
    (["--lm_loss", "nowhere"], "nowhere"),
    (["--lm_loss", "nowhere", "--steps=3"], "--steps"),
])
def test_a_wrong_flag_is_one_line_and_exit_2(tmp_path, monkeypatch, capsys, argv, words):
    """A traceback, or six processes that each end in one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "subprocess", None)  # no run may start
    with pytest.raises(SystemExit) as end:
        ablations.main(argv)
    line = capsys.readouterr().err
    assert end.value.code == 2 and words in line and line.count("\n") == 1, line
