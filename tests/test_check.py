"""
experiments/check.py: what is here and in the README passes, and each mistake that would run, and
give another score, is refused with its words.
"""
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import refused

import memory
import sparse
from experiments import check
from infra.cli import ROOT
from memory import Decay
from sparse import Dense, MoBA, Quest, SlidingSnapKV, SnapKV, attend

MINE = dict(budget=32, block_size=8)
SNAP = dict(budget=32, window=8)


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """What a test registers is taken out again."""
    known = (memory.MEMORIES, dict(memory.MEMORIES)), (sparse.METHODS, dict(sparse.METHODS))
    yield
    for now, before in known:
        now.clear()
        now.update(before)


# ---------------------------------------------------------------- what is right passes

@pytest.mark.parametrize("text, hooks", [
    ("dense", []), ("quest:budget=32,block_size=8", ["decode"]),
    ("quest:budget=64,block_size=16,keep_first=false,keep_current=false,random=3", ["decode"]),
    ("moba:budget=32,block_size=8", ["prefill"]), ("moba:budget=8,block_size=8,keep_first=false",
                                                   ["prefill"]),
    ("snapkv:budget=40,window=8", ["compress"]), ("snapkv", ["compress"]),
    ("snapkv:budget=32,window=8,random=1", ["compress"]), ("dilated", ["prefill", "decode"]),
    ("dilated:dilation=16,local=0,initial=0", ["prefill", "decode"]),
    ("topp:budget=32,block_size=8,p=1", ["decode"]),
    ("sliding:budget=40,window=8,every=8", ["compress", "evict"]),
    ("moba:budget=32,block_size=8+snapkv:budget=40,window=8+quest:budget=16,block_size=8",
     ["prefill", "decode", "compress"]),
])
def test_the_methods_that_are_here_pass(text, hooks):
    """A check that asks for more than the hooks promise."""
    assert check.check_method(sparse.parse(text, 512)) == hooks


@pytest.mark.parametrize("name", list(memory.MEMORIES))
def test_the_memories_that_are_here_pass(name):
    check.check_memory(name)


def test_the_readme_s_selector_and_memory_pass_by_the_command(tmp_path, monkeypatch, capsys):
    """Its code as it is printed there; and what fails is one line."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    for name, word in ("bestkey", "class BestKey"), ("shift", "class Shift"):
        code, = [block for block in blocks if word in block]
        Path(f"{name}.py").write_text(code)
    also = ["--also", "bestkey.py", "shift.py"]
    check.main([*also, "--methods", "bestkey:budget=1/4", "bestkey:budget=16",
                "--memories", "shift"])
    assert capsys.readouterr().out.splitlines() == [
        "bestkey:budget=1/4,block_size=8: passed (prefill)",
        "bestkey:budget=16,block_size=8: passed (prefill)", "shift: passed"]
    right = Path("bestkey.py").read_text()
    Path("bestkey.py").write_text(re.sub("return per_kv_head.*", "return torch.stack(best, -1)",
                                         right))
    for flags, said in ((["--methods", "bestkey:budget=32"], "bestkey.score gives (3, 4, 101, 13) "
                         "where (B, KV, Tq, N) = (3, 2, 101, 13) is wanted"), ([], "nothing")):
        with pytest.raises(SystemExit) as end:
            check.main([*also, *flags])
        line = capsys.readouterr().err
        assert end.value.code == 2 and line.count("\n") == 1 and said in line, line


# ---------------------------------------------------------------- mistakes in a selector

def changed(kind, hook, change):
    """A class whose hook, or score, gives change(what that of `kind` gives, *args)."""
    def mistaken(self, *args):
        return change(getattr(kind, hook)(self, *args), *args)
    return dataclass(frozen=True)(type("Mine", (kind,), {hook: mistaken}))


def also_later(found, q, k, *_):
    """A mean key of the whole prompt in each y."""
    return found[0] + k.mean((1, 2), keepdim=True), found[1]


def uneven(kept, q, k, v, lengths, dice):
    """One KV head without its last entry."""
    kept = kept.clone()
    kept[:, 0, -1:], kept[2, 0, 9] = -1, -1
    return kept


class More(Quest):
    def choose(self, q, cache):
        return sparse.top(self.score(q, cache.k, cache.filled_slots()), 9).squeeze(2)


selectors = {
    "a block too few": (changed(MoBA, "score", lambda s, *_: s[..., :-1])(**MINE), "mine.score "
                        "gives (3, 2, 101, 12) where (B, KV, Tq, N) = (3, 2, 101, 13) is wanted"),
    "H heads for KV": (changed(Quest, "score", lambda s, *_: s.repeat(1, 2, 1, 1))(**MINE),
                       "mine.score gives (3, 4, 1, 13) where (B, KV, 1, N) = (3, 2, 1, 13)"),
    "no scores of the window": (changed(SnapKV, "score", lambda s, *_: s[..., :-8])(**SNAP),
                                "mine.score gives (3, 2, 93) where (B, KV, Tk) = (3, 2, 101)"),
    "no tensor": (changed(MoBA, "score", lambda s, *_: [s])(**MINE), "mine.score gives list where"),
    "NaN scores": (changed(MoBA, "score", lambda s, *_: s.log())(**MINE), "mine.score gives NaN"),
    "no pair": (changed(Quest, "decode", lambda out, *_: out[0])(**MINE),
                "mine.decode gives Tensor"),
    "y transposed": (changed(Quest, "decode", lambda out, *_: (out[0].mT, out[1]))(**MINE),
                     "mine.decode: y gives (3, 1, 16, 4) where (B, Tq, H, D) = (3, 1, 4, 16)"),
    "y always fp32": (changed(MoBA, "prefill", lambda out, *_: (out[0].float(), out[1]))(**MINE),
                      "torch.float32 where torch.bfloat16 is wanted"),
    "y is NaN": (changed(Dense, "decode", lambda out, *_: (out[0] * torch.nan, None))(),
                 "mine.decode: y is not finite"),
    "selected of H heads": (changed(Quest, "decode", lambda out, *_: (
        out[0], out[1].repeat(1, 2, 1)))(**MINE), "mine.decode: selected gives (3, 4, 32) where "
        "(B, KV, ..., S) = (3, 2, 32) is wanted"),
    "selected as floats": (changed(MoBA, "prefill", lambda out, *_: (
        out[0], out[1].float()))(**MINE),
                           "no whole numbers"),
    "the future": (changed(MoBA, "prefill", lambda out, *_: (out[0], out[1] + 1))(**MINE),
                   "mine.prefill selects [1] where no more than [0]"),
    "below -1": (changed(MoBA, "prefill", lambda out, *_: (out[0], out[1] - 1))(**MINE), "[-2]"),
    "slots that hold nothing": (changed(SnapKV, "compress", lambda kept, *_: kept.where(
        kept >= 0, 50))(**SNAP), "mine.compress selects [50] where no more than [9]"),
    "twice": (changed(Quest, "decode", lambda out, *_: (out[0], out[1].repeat(1, 1, 2)))(**MINE),
              "] twice"),
    "a block above the budget": (More(**MINE), "more.decode reads "),
    "everything": (changed(Quest, "decode", lambda out, *_: (out[0], None))(**MINE),
                   "mine.decode reads 101 entries where budget=32"),
    "drops nothing": (changed(SnapKV, "compress", lambda *_: None)(**SNAP),
                      "mine.compress reads 101"),
    "unordered": (changed(SnapKV, "compress", lambda kept, *_: kept.flip(-1))(**SNAP),
                  "must ascend"),
    "evicts nothing": (changed(SlidingSnapKV, "evict", lambda *_: None)(**SNAP, every=8),
                       "mine.evict reads 101 entries where budget=32"),
    "evicts one head": (changed(SlidingSnapKV, "evict", lambda kept, q, cache: uneven(
        kept, q, None, None, None, None))(**SNAP, every=8), "as many in each KV head"),
    "evicts what is not there": (changed(SlidingSnapKV, "evict", lambda kept, *_: kept.where(
        kept >= 0, 50))(**SNAP, every=8), "mine.evict selects [50] where no more than [9]"),
    "uneven heads": (changed(SnapKV, "compress", uneven)(**SNAP), "as many in each KV head"),
    "acausal": (changed(MoBA, "prefill", also_later)(**MINE), "mine.prefill: y changes with later"),
    "reads padding": (changed(Quest, "decode", lambda out, q, cache: (attend(q, cache.k, cache.v),
                      out[1]))(**MINE), "mine.decode: y changes with later"),
    "scores of padding": (changed(SnapKV, "score", lambda s, q, k, *_: s.where(k.amax() < 50, -s))
                          (**SNAP), "mine.compress: y changes"),
    "start ignored": (changed(MoBA, "prefill", lambda out, q, k, v, start, dice: (
        MoBA(**MINE).prefill(q, k, v, 0, dice)[0], out[1]))(**MINE), "dense attention"),
    "never all": (changed(Quest, "choose", lambda chosen, *_: chosen[..., :4])(**MINE),
                  "mine.decode: with a budget of the whole, y is not dense attention's"),
}


@pytest.mark.parametrize("mistake", selectors)
def test_a_mistake_in_a_selector_is_one_line(mistake):
    method, words = selectors[mistake]
    refused(lambda: check.check_method(method), words)


def test_a_method_may_read_less_than_its_budget(capsys):
    """A selector with a cap, and no more, that the loop for ideas will not take."""
    method, _ = selectors["never all"]
    assert check.check_method(method, whole=False) == ["decode"]
    flags = ["--methods", "topp:budget=1/4"]
    check.main([*flags, "--less"])
    assert "topp:budget=1/4,block_size=8: passed (decode)" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        check.main(flags)
    assert "--less" in capsys.readouterr().err


def test_an_error_of_the_class_s_own_passes_through():
    """A bug whose traceback is swallowed."""
    method = changed(MoBA, "score", lambda s, *_: {}["mine"])(**MINE)
    refused(lambda: check.check_method(method), "mine", error=KeyError)


# ---------------------------------------------------------------- mistakes in a memory

def mistaken(change):
    """A memory whose forward is Decay's, called by change(forward, x, k, v, state, real)."""
    def forward(self, x, k, v, state=None, real=None):
        return change(lambda *args: Decay.forward(self, *args), x, k, v, state, real)
    return type("Mine", (Decay,), {"forward": forward})


def after(change):
    """Likewise, with change(k~, v~, state) of what it gives."""
    return mistaken(lambda forward, *args: change(*forward(*args)))


def shaped(shape):
    return type("Mine", (Decay,), {"state_shape": staticmethod(shape)})


memories = {
    "ignores state": (mistaken(lambda forward, x, k, v, state, real: forward(x, k, v, None, real)),
                      "pieces of 11, with the state passed on, are not the whole"),
    "steps differ": (mistaken(lambda forward, x, k, v, state, real: forward(
        x, k, v, state if k.shape[1] > 1 else None, real)), "pieces of 1, with"),
    "ignores real": (mistaken(lambda forward, x, k, v, state, real: forward(x, k, v, state)),
                     "padding, where `real` is False, changes"),
    "acausal": (after(lambda k, v, state: (k + k.mean(1, keepdim=True), v, state)),
                "k or v changes with later tokens"),
    "rows mix": (after(lambda k, v, state: (k, v + v.mean(0), state)),
                 "k or v of a row changes with the rows beside it"),
    "zeros and None": (mistaken(lambda forward, x, k, v, state, real: forward(
        x, k, v if state is None else v + 1, state, real)), "a state of zeros is not as None is"),
    "another state": (after(lambda k, v, state: (k, v, state.flip(0))), "pieces of 11"),
    "B in dimension 0": (shaped(lambda config, B: (B, 2, 2, 16)), "gives (2, 2, 2, 16), and (3, 2, "
                         "2, 16) for a row more, where B is wanted in dimension 1"),
    "B twice": (shaped(lambda config, B: (2, B, B, 16)), "and only there"),
    "another shape": (shaped(lambda config, B: (2, B, 16)), "mine.forward: state gives (2, 3, 2, "
                      "16) where state_shape(config, B) = (2, 3, 16) is wanted"),
    "no state": (after(lambda k, v, state: (k, v)),
                 "mine.forward gives 2 values where k, v, state is wanted"),
    "k of H heads": (after(lambda k, v, state: (k.repeat(1, 1, 2, 1), v, state)), "mine.forward: k "
                     "gives (3, 24, 4, 16) where (B, T, KV, D) = (3, 24, 2, 16) is wanted"),
    "v in fp32": (after(lambda k, v, state: (k, v.float(), state)),
                  "mine.forward: v gives torch.float32 where torch.bfloat16 is wanted"),
    "state in bf16": (after(lambda k, v, state: (k, v, state.to(k.dtype))),
                      "mine.forward: state gives torch.bfloat16 where torch.float32 is wanted"),
    "NaN": (after(lambda k, v, state: (k.log(), v, state)), "(by up to nan)"),
}


@pytest.mark.parametrize("mistake", memories)
def test_a_mistake_in_a_memory_is_one_line(mistake, monkeypatch):
    kind, words = memories[mistake]
    monkeypatch.setitem(memory.MEMORIES, "mine", kind)
    refused(lambda: check.check_memory("mine"), "mine", words)
