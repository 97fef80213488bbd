"""sample.py: the page that a new reader runs first."""
import pytest
from conftest import tiny

import eval_niah
import sample


@pytest.fixture
def out(tmp_path, monkeypatch):
    """out/ with one trained run, which does the task of what comes with the code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(eval_niah, "SHIPPED", [tmp_path / "out" / "demo"])
    folder = tmp_path / "out" / "demo" / "step_0000001"
    tiny(vocab_size=257, context_len=512, memory=True).save_pretrained(folder)
    (folder / "train.json").write_text('{"settings": {}}')
    return folder


def run(capsys, *argv):
    sample.main([*argv, "--device=cpu"])
    return capsys.readouterr().out


def test_with_no_flags_it_asks_the_newest_model_for_a_needle(out, capsys):
    """The gold answer of another prompt; a sparse answer that reads everything."""
    text = run(capsys)
    gold = text.split("\ngold")[1].split()[0]
    assert f"is: {gold}." in text and "\ndense" in text and "\nquest:budget=1/4,block_size=8" in text
    dense, quest = (float(part.split()[0]) for part in text.split("a step read ")[1:])
    assert quest <= 128 < dense


def test_same_seed_same_text(out, capsys):
    """A draw that cannot be repeated, or is always the same."""
    draw = lambda seed: run(capsys, "--prompt=Hello", "--method=dense", "--temperature=1", "--top_k=20", f"--seed={seed}")
    assert draw(0) == draw(0) != draw(1) and draw(0).startswith("Hello\n")


def test_a_full_budget_writes_what_dense_writes(out, capsys):
    """--method that is ignored, or misread."""
    answer = lambda method: run(capsys, "--prompt=Hello there", f"--method={method}").split("\n", 2)[2][40:].rsplit("\n", 2)[0]
    dense = answer("dense")
    assert answer("quest:budget=1/1") == answer("snapkv:budget=1/1") == answer("moba:budget=1/1") == dense


@pytest.mark.parametrize("argv, words", [
    (["--frobnicate"], "--frobnicate"),
    (["--ckpt=nowhere"], "nowhere"),
    (["--method=qwest"], "qwest"),
    (["--prompt="], "--prompt"),
    (["--max_new_tokens=0"], "--max_new_tokens"),
    (["--temperature=-1"], "--temperature"),
    (["--context_len=64"], "64"),
])
def test_a_wrong_flag_is_one_line_and_exit_2(out, capsys, argv, words):
    """A traceback."""
    with pytest.raises(SystemExit) as end:
        sample.main(argv)
    line = capsys.readouterr().err
    assert end.value.code == 2 and words in line and line.startswith("sample.py: ") and line.count("\n") == 1, line
