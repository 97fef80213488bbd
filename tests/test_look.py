"""look.py: what is drawn is what was read, and a token's trace is Eq. 1 of an impulse."""
import sys
from argparse import Namespace
from dataclasses import dataclass

import pytest
import torch
from conftest import assert_close, tiny
from test_niah import Bytes

import experiments.memories  # noqa: F401 (a memory without gates)
import look
import niah
import sparse
from memory import memory_loop

ARGS = Namespace(device="cpu", max_new_tokens=8)
DILATED = sparse.Dilated(dilation=8, local=4, initial=2)
QUEST = sparse.Quest(budget=64, block_size=16)


@pytest.fixture(scope="module")
def question():
    """A number that is hidden among prose, and its place."""
    e = niah.make_example("S-2", 512, Bytes(), 0, 0, max_new_tokens=48)
    places = [niah.place_of(answer, e.prompt, "here") for answer in e.answers]
    return e.prompt, e.answers, e.target, places


def seen(model, question, method):
    return look.look("a name", model, Bytes(), Bytes().encode(question[0]), method, question, ARGS)


def run(capsys, *flags):
    look.main([*flags, "--device=cpu"])
    return capsys.readouterr().out


@pytest.fixture
def models(tmp_path, monkeypatch):
    """--ckpt of a model without a memory and one with"""
    monkeypatch.chdir(tmp_path)
    for name, memory in ("plain", False), ("remembering", True):
        tiny(vocab_size=257, context_len=512, memory=memory).save_pretrained(name)
    return "--ckpt", "plain", "remembering"


# ---------------------------------------------------------------- the selection

def test_a_known_pattern_is_drawn_as_it_is(question):
    """A step that is left out or counted twice; positions off by one; a gold answer not fed in."""
    view = seen(tiny(vocab_size=257, memory=True), question, DILATED)
    prompt, (answer,), target, ((start, end),) = question
    T = len(prompt)
    # The opening space follows from the prefill. Each later token but the last is fed, from slot T
    # on, and the next one copies the next digit.
    steps = range(T, T + len(target) - 1)
    pattern = torch.stack([DILATED.pattern(torch.tensor(i), torch.arange(T)) for i in steps])
    assert_close(view.share, pattern.float().mean(0).expand_as(view.share))
    digits = [bool(pattern[n, start + n]) for n in range(len(answer))]
    assert target == " " + answer and len(steps) == len(digits)
    assert_close(view.found, torch.full((2, 4), sum(digits) / len(digits)))
    assert view.spans == [(start, end)]


def test_what_a_selector_of_ones_own_tells_is_drawn(question):
    """Heads or layers that are mixed up."""
    @dataclass(frozen=True)
    class Own(sparse.Dense):
        def decode(self, q, cache):
            y, _ = super().decode(q, cache)
            first = torch.tensor([[5], [7], [9], [-1]])  # of each head
            return y, torch.cat([first, first + question[3][0][0]], dim=1)[None]

    view = seen(tiny(vocab_size=257), question, Own())
    expected, start = torch.zeros_like(view.share), question[3][0][0]
    for head, place in enumerate((5, 7, 9)):
        expected[:, head, place] = expected[:, head, start + place] = 1
    expected[:, 3, start - 1] = 1
    assert_close(view.share, expected)
    # Of seven digits the sixth is copied from start + 5.
    assert_close(view.found, torch.tensor([1 / 7, 0, 0, 0]).expand(2, 4))
    assert view.counts == ("fed the right answer, the best of 8 heads reads the needle at 14% of 7 "
                           "tokens; 0 at all, 2 at some")


def test_snapkv_is_drawn_as_what_it_keeps(question):
    """Slots that are taken for positions."""
    method = sparse.SnapKV(budget=48, window=16)
    view = seen(tiny(vocab_size=257, n_kv_head=2), question, method)
    assert set(view.share.unique().tolist()) == {0, 1}
    assert (view.share.sum(-1) == 48).all() and (view.share[..., -16:] == 1).all()


def test_moba_is_drawn_by_the_last_tokens_of_the_prompt():
    """Blocks of other tokens; a block that is read beyond its query."""
    T, blocks = 70, torch.zeros(1, 2, 70, 2, dtype=torch.long)
    blocks[0, 0, :, 1] = torch.arange(T) // 16  # the own block, and the first
    blocks[0, 1, :, 1] = -1                     # the first alone
    method = sparse.MoBA(budget=32, block_size=16)
    read = look.read_in_prefill([blocks, blocks], method, T)
    assert len(read) == look.LAST and read[0].shape == (2, 2, T)
    for t, of_token in zip(range(T - look.LAST, T), read):
        first, own = set(range(16)), set(range(t // 16 * 16, t + 1))
        assert set(of_token[1, 0].nonzero().flatten().tolist()) == first | own
        assert set(of_token[0, 1].nonzero().flatten().tolist()) == first


def test_moba_finds_the_needle_in_what_it_reads(question):
    """A hook that is not called, or tells of another part of the prompt."""
    method = sparse.MoBA(budget=64, block_size=16)
    view = seen(tiny(vocab_size=257), question, method)
    T = len(question[0])
    own = torch.arange(T - look.LAST, T)
    least = (own[:, None] >= own).float().mean(0)  # the own tokens are always read, causally
    assert "at the prompt's end, the best of 8 heads reads the needle at " in view.counts
    assert (view.share[..., :16] == 1).all() and (view.share[..., -look.LAST:] >= 0).all()
    assert_close(view.share[..., -1], least[-1].expand(2, 4))
    start, end = view.spans[0]
    assert (view.found >= view.share[..., start:end].amax(-1) - 1e-6).all()


# ---------------------------------------------------------------- the trace

def test_a_trace_is_the_memory_of_an_impulse():
    """Gates of other tokens, or of the average prompt; a weight that is not Eq. 1's."""
    model, s, n = tiny(memory=True, context_len=128), 9, 40
    tokens = torch.randint(61, (1, s + n), generator=torch.Generator().manual_seed(0))
    gates = []
    for layer in model.layers:
        layer.self_attn.memory.register_forward_pre_hook(
            lambda memory, inputs: gates.append(memory.gate(inputs[0]).detach()))
    (name, w), = look.traces_of(model, tokens, s).items()
    assert name == "k~ and v~" and w.shape == (2, 4, n)

    for layer, gate in enumerate(gates):  # (1, T, KV, D)
        impulse = torch.zeros_like(gate)
        impulse[:, s] = 1
        k, _, _ = memory_loop(impulse, impulse, gate)
        assert_close(w[layer], k[0, s:].mean(-1).T)
        g = gate[0].sigmoid()
        by_hand = torch.stack([(1 - g[s]) * g[s + 1:s + 1 + t].prod(0) for t in range(n)])
        assert_close(w[layer], by_hand.mean(-1).T)


def test_traces_of_all_tokens_share_one_place():
    """Weights that are none: what a place holds of all tokens is at most 1."""
    model = tiny(memory=True)
    tokens = torch.randint(61, (1, 24), generator=torch.Generator().manual_seed(1))
    at_end = [look.traces_of(model, tokens, s)["k~ and v~"][..., -1] for s in range(24)]
    total = torch.stack(at_end).sum(0)
    assert (total <= 1 + 1e-5).all() and (total > 0.1).all()


def test_a_memory_of_values_alone_has_two_traces_and_others_have_none():
    """A trace in keys that keep nothing; one of a memory that has no gates."""
    tokens = torch.arange(20)[None]
    traces = look.traces_of(tiny(memory="values"), tokens, 4)
    assert list(traces) == ["k~", "v~"] and (traces["v~"] > 0).all()
    assert (traces["k~"][..., 0] == 1).all() and (traces["k~"][..., 1:] == 0).all()
    for memory in None, "convolution":
        assert look.traces_of(tiny(memory=memory), tokens, 4) == {}
    assert look.traces_of(tiny(memory=True), tokens, 20) == {}  # there is no such token


# ---------------------------------------------------------------- text and figures

def test_columns_are_means_of_whole_blocks():
    """A last column that counts what is not there; a block that is cut in two."""
    share = torch.zeros(1, 1, 100)
    share[..., 32:48] = share[..., 96:] = 1
    found, size = look.columns(share, 16, 96)
    assert size == 16 and found.flatten().tolist() == [0, 0, 1, 0, 0, 0, 1]
    found, size = look.columns(share, 16, 4)
    assert size == 32 and found.flatten().tolist() == [0, 0.5, 0, 1]


def test_the_needle_is_marked_below_its_column(models, capsys):
    """A mark beside the needle; a line for each head that is missing."""
    text = run(capsys, *models, "--task=S-2", "--method=quest:budget=64,block_size=16",
               "--out=figures")
    e = niah.make_example("S-2", 512, Bytes(), 0, 0, max_new_tokens=48)
    start, end = e.spans[0]
    marks = [line for line in text.splitlines() if "^" in line and "^:" not in line]
    columns = [{i - 11 for i, c in enumerate(line) if c == "^"}
               for line in marks]
    assert columns == 2 * [{t // 16 for t in range(start, end)}]
    heads = [line for line in text.splitlines() if "|" in line]
    assert len(heads) == 2 * 8 + 8 and all(line[10] == "|" for line in heads)
    assert sum("layer 1" in line for line in heads) == 3
    assert heads[0][11] == "#"  # Quest always reads the first block
    assert "no trace: no memory" in text and "needle's first token" in text
    assert repr(e.answers[0][0]) in text
    assert "plain, quest:budget=64,block_size=16: " in text and "wrong" in text
    assert "The memory makes no difference here: 0%" in text


def test_figures_are_written_and_hold_what_was_read(models, question, capsys):
    """An image upside down, or of other numbers; $ that matplotlib would set as mathematics."""
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    text = run(capsys, *models, "--task=S-2", "--method=quest:budget=64,block_size=16",
               "--out=a/folder")
    assert text.endswith("selection and trace, as .png and .svg, in a/folder\n")
    for name in "selection", "trace":
        for suffix, start in ("png", b"\x89PNG"), ("svg", b"<?xml"):
            with open(f"a/folder/{name}.{suffix}", "rb") as file:
                assert file.read().startswith(start)

    plt = look.pyplot()
    view = seen(tiny(vocab_size=257, memory=True), question, QUEST)._replace(said="$x^{$ \\")
    with plt.rc_context(look.INK):
        figure = look.draw_selection(plt, [view, view], 16)
        figure.canvas.draw()
    image = torch.from_numpy(figure.axes[1].images[0].get_array().data)  # (L * KV, N, 3)
    shares, _ = look.columns(view.share, 16, 512)
    needle = {t // 16 for t in range(*view.spans[0])}
    for column in range(shares.shape[-1]):
        white = 1 - image[..., column, 2]  # the channel in which black and orange differ least
        factor = 0.88 if column in needle else 1
        assert_close(white, (factor * shares.flatten(0, 1)[:, column]).to(white.dtype))
    trace, = view.traces.values()
    figure = look.draw_traces(plt, [(view, "k~ and v~", trace)], 16)
    image = torch.from_numpy(figure.axes[0].images[0].get_array().data)
    assert_close(image, look.by_decades(trace).flatten(0, 1).to(image.dtype))
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert labels == view.text and view.text[0] == question[1][0][0]


def test_without_matplotlib_there_is_the_text(models, monkeypatch, tmp_path, capsys):
    """A plot that is needed."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = run(capsys, *models, "--task=S-2", "--method=quest:budget=64,block_size=16")
    assert text.endswith("\nno plot: pip install matplotlib\n") and "^: needle" in text
    assert not (tmp_path / "out").exists()


def test_a_prompt_of_ones_own_has_a_needle_if_one_is_marked(models, capsys):
    """The mark's second place; a count of heads that find nothing; a line break that breaks."""
    flags = ("--ckpt", "remembering", "--method=quest:budget=64,block_size=16", "--out=figures",
             "--max_new_tokens=3", "--prompt=" + "The code is 417.\n" + 20 * "Rain. " + "417 is ")
    text = run(capsys, *flags, "--mark=417")
    assert "fed this answer, the best of 8 heads reads the needle at " in text
    assert "of '4', the needle's first token" in text and "\u21b5" in text
    assert "right" not in text and "wrong" not in text
    line, = [line for line in text.splitlines() if "^" in line and "^:" not in line]
    assert line == " " * 11 + "^"  # at 12 to 14
    text = run(capsys, *flags)
    assert "no needle: --mark names one" in text and "no trace: no --mark to follow" in text


def test_a_lesson_says_also_that_nothing_was_gained(question):
    """A gain that is always found; a memory without gates among those without a memory."""
    view = seen(tiny(vocab_size=257, memory="convolution"), question, QUEST)
    plain, other = view._replace(memory=None, score=0.0), view._replace(score=1.0)
    assert look.lesson([plain, other]).startswith("\nThe memory helps here: 0% of the answer is")
    for before, after in (1.0, 1.0), (1.0, 0.0), (0.0, 0.0), (0.5, 0.25):
        views = [plain._replace(score=before), other._replace(score=after)]
        does = "makes no difference" if before == after else "harms"
        assert f"The memory {does} here: {before:.0%}" in look.lesson(views)
    assert look.lesson([plain]) == look.lesson([other, other]) == ""


@pytest.mark.parametrize("flags, words", [
    (["--method=dense"], "selects nothing"),
    (["--method=qwest"], "qwest"),
    (["--mark=x"], "--prompt"),
    (["--prompt=abc", "--mark=x", "--method=quest:budget=64"], "--mark"),
    (["--prompt="], "--prompt"),
    (["--ckpt=nowhere"], "nowhere"),
    (["--task=S-9"], "--task"),
    (["--index=-1"], "--index"),
    (["--context_len=64"], "64"),
    ([f"--prompt={'a' * 600}", "--method=quest:budget=1/4"], "--context_len=768"),
    (["--method=quest:budget=64", "--task=S-2", "--out=plain/config.json"], "plain/config.json"),
])
def test_what_cannot_be_seen_is_one_line(models, flags, words, capsys):
    """A traceback; a picture in which everything is read."""
    with pytest.raises(SystemExit) as end:
        look.main([*models, "--device=cpu", *flags])
    line = capsys.readouterr().err
    assert end.value.code == 2 and line.count("\n") == 1, line
    assert line.startswith("look.py: ") and words in line


def test_a_method_of_prefill_that_does_not_tell_is_refused(question):
    """A picture of nothing."""
    @dataclass(frozen=True)
    class Silent(sparse.MoBA):
        def prefill(self, q, k, v, start, dice):
            return super().prefill(q, k, v, start, dice)[0], None

    with pytest.raises(ValueError, match="tells of nothing that it selects"):
        seen(tiny(vocab_size=257), question, Silent())
