"""sample.py: the page that a new reader runs first. Refused flags: test_refusals.py."""
import importlib.util
import re

import pytest
from conftest import tiny
from test_niah import Bytes

import niah
import sample
import sparse
from experiments import ways
from infra import runlog


@pytest.fixture
def out(tmp_path, monkeypatch):
    """out/ with one trained run, which does the task of what comes with the code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runlog, "SHIPPED", [tmp_path / "out" / "demo"])
    folder = tmp_path / "out" / "demo" / "step_0000001"
    tiny(vocab_size=257, context_len=512, memory=True).save_pretrained(folder)
    (folder / "train.json").write_text('{"settings": {}}')
    return folder


def run(capsys, *flags):
    sample.main([*flags, "--device=cpu"])
    return capsys.readouterr().out


def reads(text):
    """Entries that a token of the prompt read, and a step, of each answer."""
    number = lambda words: None if words == "not told" else float(words)
    found = re.findall(r"that a token of the prompt read: (.*?), a step: (.*?)\)", text)
    return [tuple(map(number, pair)) for pair in found]


def test_with_no_flags_it_asks_the_newest_model_for_a_needle(out, capsys):
    """The gold answer of another prompt; a sparse answer that reads everything."""
    text = run(capsys)
    gold = text.split("\ngold")[1].split()[0]
    assert f"is: {gold}." in text
    assert "\ndense" in text and "\nquest:budget=1/4,block_size=8" in text
    (dense_prompt, dense), (quest_prompt, quest) = reads(text)
    assert quest <= 128 < dense and dense_prompt == quest_prompt > 200


def test_what_moba_reads_in_prefill_is_told(out, capsys):
    """A method of prefill that seems to read what dense attention does."""
    text = run(capsys, "--methods", "moba:budget=1/4", "dilated:local=16", "snapkv:budget=1/4")
    (dense, _), (moba, step), (dilated, _), (snapkv, of_cache) = reads(text)
    model = sample.Transformer.from_pretrained(out)
    example = niah.make_example("niah_single_1", 512, Bytes(), 0, 0, max_new_tokens=48)
    method = sparse.parse("moba:budget=1/4,block_size=8", 512)
    counted, = ways.evaluate(model, Bytes(), [example], [method])[method].prompt_read
    assert moba == pytest.approx(counted, abs=0.06) and dilated is None
    assert moba < 128 < dense == snapkv and of_cache < 180 < step


def test_several_methods_answer_one_prompt(out, capsys):
    """--methods of which one is asked, under either name; a long name that runs into the answer."""
    long = ("moba:budget=1/2,block_size=16+snapkv:budget=1/4,window=16,kernel=3"
            "+quest:budget=1/8,block_size=16")
    texts = [run(capsys, "--prompt=Hello", *flags)
             for flags in (["--methods", "dense", long], ["--method", "dense", long],
                           ["--method=dense", "--method", long])]
    assert texts[0] == texts[1] == texts[2] and len(reads(texts[0])) == 2
    line, = [line for line in texts[0].splitlines() if line.startswith("moba")]
    assert line.startswith(f"{long}  ")


def test_a_model_that_is_asked_beyond_its_context_is_told(out, capsys):
    """A model asked about what it never saw, without a word."""
    for flags in (["--context_len=768", "--method=quest:budget=1/4"],
                  ["--methods", "dense", "quest:budget=128"]):
        sample.main([f"--prompt={'a' * 600}", "--device=cpu", *flags])
        note, = capsys.readouterr().err.splitlines()
        assert "was trained on contexts of 512 tokens, and is asked about up to 648" in note
    sample.main([f"--prompt={'a' * 464}", "--device=cpu"])
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(not importlib.util.find_spec("wonderwords"), reason="pip install wonderwords")
def test_words_are_those_asked_for(out, capsys):
    """Keys that depend on what is installed."""
    def keys(*flags):
        text = run(capsys, "--method=dense", *flags)
        return set(re.findall(r"special magic numbers for (\S+?) is", text))
    built_in = keys()
    assert built_in == keys("--words=built-in")
    assert built_in.isdisjoint(keys("--words=wonderwords"))
    assert all(word.split("-")[0] in niah.ADJECTIVES for word in built_in)


def test_same_seed_same_text(out, capsys):
    """A draw that cannot be repeated, or is always the same."""
    draw = lambda seed: run(capsys, "--prompt=Hello", "--method=dense", "--temperature=1",
                            "--top_k=20", f"--seed={seed}")
    assert draw(0) == draw(0) != draw(1) and draw(0).startswith("Hello\n")


def test_a_full_budget_writes_what_dense_writes(out, capsys):
    """--method that is ignored, or misread."""
    def answer(method):
        text = run(capsys, "--prompt=Hello there", f"--method={method}")
        return text.split("\n", 2)[2][40:].rsplit("\n", 2)[0]
    dense = answer("dense")
    assert all(answer(f"{kind}:budget=1/1") == dense for kind in ("quest", "snapkv", "moba"))
