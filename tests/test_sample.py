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


def answers(text):
    """{method: what follows its name} of each answer: what was said, then what was read."""
    return dict(re.findall(r"^\S*out/demo\S*, (\S+):(.*?^    .*?)$", text, re.M | re.S))


def reads(text):
    """(entries that a token of the prompt read, of the answer): text, "all", None: not told"""
    numbers = r"each {} token read (all|[\d,]+)"
    found = []
    for answer in answers(text).values():
        pair = [re.search(numbers.format(of), answer) for of in ("prompt", "answer")]
        found.append(tuple(one and one[1] for one in pair))
    return found


def test_with_no_flags_it_asks_the_newest_model_for_a_needle(out, capsys):
    """The gold answer of another prompt; a sparse answer that reads everything."""
    text = run(capsys)
    assert text.startswith("demo: out/demo/step_0000001, ") and "memory: decay" in text
    gold = re.search(r"^gold: (\S+)$", text, re.M)[1]
    assert f"is: {gold}." in text and len(text.splitlines()) < 20
    assert list(answers(text)) == ["dense", "quest:budget=1/4,block_size=8"]
    (dense_prompt, dense), (quest_prompt, quest) = reads(text)
    assert dense_prompt == quest_prompt == dense == "all" and 100 < int(quest) <= 128
    assert all(re.search(r"(wrong|right)\n", answer) for answer in answers(text).values())


def test_what_moba_reads_in_prefill_is_told(out, capsys):
    """A method of prefill that seems to read what dense attention does."""
    text = run(capsys, "--methods", "moba:budget=1/4", "dilated:local=16", "snapkv:budget=1/4")
    (dense, _), (moba, step), (dilated, _), (snapkv, of_cache) = reads(text)
    model = sample.Transformer.from_pretrained(out)
    example = niah.make_example("niah_single_1", 512, Bytes(), 0, 0, max_new_tokens=48)
    method = sparse.parse("moba:budget=1/4,block_size=8", 512)
    counted, = ways.evaluate(model, Bytes(), [example], [method])[method].prompt_read
    assert int(moba) == round(counted) and dilated is None and "no reads of the prompt" in text
    assert counted < 128 and dense == snapkv == step == "all" and int(of_cache) < 180


def test_yarn_stretches_each_model_that_is_asked(out, capsys, monkeypatch):
    """A flag that is taken and forgotten; a model that is asked as it was."""
    made, answer = [], sample.answer
    monkeypatch.setattr(sample, "answer", lambda model, *rest: made.append(model)
                        or answer(model, *rest))
    text = run(capsys, "--yarn=2", "--context_len=1024", "--method=quest:budget=1/4")
    scaling = dict(rope_type="yarn", factor=2.0, original_max_position_embeddings=512)
    assert len(made) == 2 and all(model.config.rope_scaling == scaling for model in made)
    assert "trained on contexts of 512 tokens" in text
    tiny(vocab_size=257, rope_scaling=scaling).save_pretrained(out)
    with pytest.raises(SystemExit):
        sample.main(["--yarn=2", "--device=cpu"])
    assert "stretched already" in capsys.readouterr().err


def test_an_example_of_a_task_is_not_one_of_a_prompt(out, capsys):
    """An index that nobody hears."""
    with pytest.raises(SystemExit):
        sample.main(["--prompt=Hello", "--index=2", "--device=cpu"])
    assert "--index is the example of a task" in capsys.readouterr().err
    run(capsys, "--prompt=Hello", "--index=0")


def test_what_has_no_effect_or_no_room_is_said(out, capsys):
    """A draw from five tokens that is none; a context blamed for an answer's room."""
    sample.main(["--prompt=Hello", "--top_k=5", "--device=cpu"])
    assert "--top_k is of no effect" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        sample.main(["--max_new_tokens=2", "--device=cpu"])
    assert "2 of them for the answer" in capsys.readouterr().err


def test_several_models_answer_one_prompt(tmp_path, monkeypatch, capsys):
    """A model asked with the other's tokens; two answers that cannot be told apart."""
    monkeypatch.chdir(tmp_path)
    for name, seed in ("a", 0), ("b", 1):
        tiny(vocab_size=257, context_len=512, seed=seed).save_pretrained(f"out/{name}")
    text = run(capsys, "--ckpt", "out/a", "out/b", "--method=quest:budget=1/2", "--task=S-2")
    assert text.startswith("a: out/a, ") and "\nb: out/b, " in text
    names = [f"out/{name}, {method}: " for name in "ab"
             for method in ("dense", "quest:budget=1/2,block_size=8")]
    places = [text.index(f"\n{name}") for name in names]
    assert places == sorted(places) and text.count("gold: ") == 1


@pytest.mark.parametrize("task", ["S-1", "MK-1", "MK-2", "MQ"])
def test_the_haystack_is_elided_around_the_needles_asked_for(task):
    """A needle that is cut off; a screen full of haystack; a size that is another text's."""
    e = niah.make_example(task, 4096, Bytes(), 0, 3, max_new_tokens=48)
    text = sample.abridged(e.prompt, e.answers, Bytes())
    lines = text.splitlines()
    assert lines[0] == e.prompt.splitlines()[0] and e.prompt.endswith(lines[-1])
    assert [sample.NEEDLE.fullmatch(line)[1] for line in lines if line.startswith("One of")] == \
        [value for value in re.findall(r"is: (\S+)\.", e.prompt) if value in e.answers]
    left = sum(int(n.replace(",", "")) for n in re.findall(r"^\.\.\. ([\d,]+) tokens", text, re.M))
    kept = sum(len(line) for line in lines if not line.startswith("... "))
    # but for the spaces and ends of line between these parts
    assert len(e.prompt) - 2 * len(lines) <= left + kept <= len(e.prompt) and len(text) < 900
    others = sum(map(int, re.findall(r"(\d+) other needles", text)))
    assert others == len(sample.NEEDLE.findall(e.prompt)) - len(e.answers)


def test_an_answer_is_judged_as_ruler_does():
    """A right answer called wrong, for its case or what follows it."""
    assert sample.right_or_wrong("It is 12.", ["12"]) == "right"
    assert sample.right_or_wrong("21", ["12"]) == "wrong"
    assert sample.right_or_wrong("1, 2, 3", ["1", "9"]) == "50% right"
    assert sample.right_or_wrong("12", []) == ""


def test_several_methods_answer_one_prompt(out, capsys):
    """--methods of which one is asked, under either name; a long name that runs into the answer."""
    long = ("moba:budget=1/2,block_size=16+snapkv:budget=1/4,window=16,kernel=3"
            "+quest:budget=1/8,block_size=16")
    texts = [run(capsys, "--prompt=Hello", *flags)
             for flags in (["--methods", "dense", long], ["--method", "dense", long],
                           ["--method=dense", "--method", long])]
    assert texts[0] == texts[1] == texts[2] and list(answers(texts[0])) == ["dense", long]


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
        text = run(capsys, "--method=dense", "--whole", *flags)
        return set(re.findall(r"special magic numbers for (\S+?) is", text))
    built_in = keys()
    assert built_in == keys("--words=built-in")
    assert built_in.isdisjoint(keys("--words=wonderwords"))
    assert all(word.split("-")[0] in niah.ADJECTIVES for word in built_in)


def test_same_seed_same_text(out, capsys):
    """A draw that cannot be repeated, or is always the same."""
    draw = lambda seed: run(capsys, "--prompt=Hello", "--method=dense", "--temperature=1",
                            "--top_k=20", f"--seed={seed}")
    assert draw(0) == draw(0) != draw(1) and "\n\nHello\n\n" in draw(0)


def test_a_full_budget_writes_what_dense_writes(out, capsys):
    """--method that is ignored, or misread."""
    def answer(method):
        told, = answers(run(capsys, "--prompt=Hello there", f"--method={method}")).values()
        return told.rsplit("\n", 1)[0]
    dense = answer("dense")
    assert all(answer(f"{kind}:budget=1/1") == dense for kind in ("quest", "snapkv", "moba"))
