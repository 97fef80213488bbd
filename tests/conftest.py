"""
What the tests share: the originals' recorded data (oracle/), tiny random models, and one measure of
error.

    error(out, ref) = rms(out - ref) / rms(ref)
"""
import os
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

# of the kernels' tests; on a CPU Triton's interpreter runs them
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

sys.path.insert(0, str(Path(__file__).parent.parent))
torch.set_num_threads(1)  # tiny tensors: threads would only get in each other's way

from triton_ops import backend  # noqa: E402
from cache import LayerCache  # noqa: E402
from model import Config, Transformer  # noqa: E402

ORACLE = Path(__file__).parent / "oracle"
SLOW = False  # pytest --slow


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true",
                     help="all of the inputs, kills and draws of which CI takes a sample")


def pytest_configure(config):  # before the tests are imported
    global SLOW
    SLOW = config.getoption("--slow")


def times(sample, all_of_them):
    """How many to try: in CI `sample`, with --slow all."""
    return all_of_them if SLOW else sample


RATPLUS_FORM = dict(tied=True, pre_norm=True, qk_norm=None, swiglu=False, output_gate=True,
                    memory=True)
STRETCH = dict(rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=2.0,
               original_max_position_embeddings=16)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=2.0,
            beta_slow=0.05)
LLAMA_FORM = dict(pre_norm=True, qk_norm=None)
QWEN2_FORM = dict(pre_norm=True, qk_norm=None, qkv_bias=True)
QWEN3_FORM = dict(pre_norm=True, qk_norm="head", head_dim=16)
FORMS = {  # of a tiny model
    "olmo2": {},
    "olmo2 tied": dict(tied=True),
    "gqa": dict(n_kv_head=2),
    "memory": dict(memory=True),
    "gqa memory": dict(n_kv_head=2, memory=True),
    "ratplus": RATPLUS_FORM,
    "llama": LLAMA_FORM | dict(n_head=6, n_kv_head=2, width=96, tied=True, rope_scaling=STRETCH),
    "qwen2": QWEN2_FORM | dict(n_kv_head=2),
    "qwen2 yarn": QWEN2_FORM | dict(n_kv_head=2, rope_scaling=YARN),
    "qwen2 memory": QWEN2_FORM | dict(n_kv_head=1, memory=True),
    "qwen3": QWEN3_FORM | dict(n_kv_head=2, tied=True),
    "qwen3 memory": QWEN3_FORM | dict(memory=True),
}


@pytest.fixture(scope="session")
def ratplus():
    """What the official RAT+ computes; see oracle/README.md."""
    return load_file(ORACLE / "ratplus.safetensors")


@pytest.fixture(scope="session")
def selectors():
    """What the originals of MoBA, SnapKV and Quest compute."""
    return load_file(ORACLE / "selectors.safetensors")


@pytest.fixture(scope="module")
def judged():
    """The process that reads strange files and runs scripts that are killed, see judge.py."""
    from judge import Judge
    with Judge() as judge:
        yield judge


# ---------------------------------------------------------------- Triton kernels

def repair_interpreter():
    """
    Three faults of Triton's interpreter (seen in 3.6 with numpy 2.4): a range() takes no bound that
    the kernel computed; tl.dot multiplies the bit patterns of bf16 numbers; fp32 to bf16 cuts off
    instead of rounding to nearest.
    """
    import triton.language as tl
    from triton.runtime import interpreter
    patch_tensor, convert = interpreter._patch_lang_tensor, interpreter._convert_float
    dot = interpreter.InterpreterBuilder.create_dot

    def patched_tensor(tensor, *scope):  # none in Triton 3.5
        patch_tensor(tensor, *scope)
        change = scope[0].set_attr if scope else setattr
        change(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def patched_dot(self, a, b, *rest):
        a, b = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x
                for x in (a, b))
        return dot(self, a, b, *rest)

    def patched_convert(x, old, new, rounding):
        if (old, new) != (tl.float32, tl.bfloat16):
            return convert(x, old, new, rounding)
        return torch.from_numpy(x.copy()).bfloat16().view(torch.int16).numpy().view("uint16")

    interpreter._patch_lang_tensor, interpreter._convert_float = patched_tensor, patched_convert
    interpreter.InterpreterBuilder.create_dot = patched_dot


if not backend.HAS_TRITON:  # Mac, Windows
    collect_ignore_glob = ["test_kernels.py", "test_backend.py"]
elif DEVICE == "cpu":
    import kernels
    from triton_ops import block
    repair_interpreter()
    kernels.TILE.update(ROWS=16, STRIPS=2)  # the interpreter is slow, above all where strips meet
    kernels.LONG_TILE.update(ROWS=32, STRIPS=2)
    kernels.NARROW_TILE.update(ROWS=24, STRIPS=2)
    kernels.NARROW_BOTH.update(ROWS=16, STRIPS=2)
    kernels.FEW = 0  # as in a large model; what is cut otherwise, test_kernels.py says
    block.ONE.update(BLOCK_N=16)


@pytest.fixture
def poisoned():
    """torch.empty fills with NaN, or the largest integer: an element that no kernel wrote shows."""
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("warn")
    yield
    torch.set_deterministic_debug_mode(before)


@pytest.fixture
def both(monkeypatch):
    """Run a function with either backend: (plain, triton)."""
    def run(f):
        results = []
        for choice in "torch", "triton":
            monkeypatch.setattr(backend, "choice", choice)
            results.append(f())
        return results
    return run


FLOOR = {torch.float32: 1e-6, torch.bfloat16: 2e-3}
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.fixture
def plain_references(monkeypatch):
    """sparse.py in PyTorch on a GPU too: there it is what the kernels are compared with."""
    monkeypatch.setattr(backend, "choice", "torch")


def assert_as_good(out, plain, ref, what="values", dtype=None):
    """
    The house rule: at most twice as far from the exact `ref` as PyTorch (`plain`), plus a floor,
    both for the dtype that went in (None: the one that came out).
    """
    dtype = dtype or plain.dtype
    assert out.shape == ref.shape and out.dtype == plain.dtype, (
        f"{what}: {out.dtype} {tuple(out.shape)} for {plain.dtype} {tuple(ref.shape)}")
    assert out.isfinite().all(), f"{what}: {(~out.isfinite()).sum()} elements are not finite"
    if ref.abs().max() < 1e-12:  # a gradient that is zero has no relative error
        return assert_close(out.double(), ref.double(), atol=FLOOR[dtype], what=what)
    allowed, rms = min(2 * error(plain, ref) + FLOOR[dtype], LIMIT[dtype]), error(out, ref)
    worst = (out.double() - ref.double()).abs().max()
    assert rms <= allowed, f"{what}: rms error {rms:.2e}, allowed {allowed:.2e}, max {worst:.2e}"


def error(out, ref):
    out, ref = out.double(), ref.double()
    return ((out - ref).square().mean().sqrt() / ref.square().mean().sqrt()).item()


def assert_close(out, ref, atol=2e-5, what="values"):
    """Nowhere off by more than atol, nor NaN."""
    assert out.shape == ref.shape, f"{what}: {tuple(out.shape)} is not {tuple(ref.shape)}"
    worst = (out - ref).abs().max().item()
    assert worst <= atol, (f"{what} differ by up to {worst:.2e} (rms error "
                           f"{error(out, ref):.2e}), allowed {atol:.0e}")


@torch.no_grad()
def randomize(module, seed):
    """Weights that keep activations, and logits, of order 1: errors are then seen as they are."""
    source = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        noise = torch.randn(p.shape, generator=source)
        if p.dim() == 2:  # the embedding's rows are inputs, and in a tied model outputs
            p.copy_(noise * p.shape[1] ** -0.5)
        else:             # norms near 1, memory biases wide: lengths from 1 to hundreds of tokens
            p.copy_(noise * 3 if name.endswith("bias") else 1 + 0.2 * noise)
    return module.eval()


def tiny(seed=0, **changes):
    """A random model that takes milliseconds."""
    settings = dict(vocab_size=61, n_layer=2, width=32, n_head=4, n_kv_head=4, mlp_width=48,
                    context_len=64, rope_theta=10000.0)
    return randomize(Transformer(Config(**settings | changes)), seed)


def draw_tokens(B, T, seed=0, vocab_size=61):
    return torch.randint(vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


def layer_cache(k, v, used=None, dice=None):
    """k, v as a decoding step finds them; used: rows that are filled only so far."""
    filled = torch.as_tensor([k.shape[1]] * len(k) if used is None else used, device=k.device)

    def bounds_of(block_size):
        from triton_ops.quest import block_bounds
        return block_bounds(k, filled, block_size)
    return LayerCache(k, v, filled, used is not None, dice, None, bounds_of)


@torch.no_grad()
def in_pieces(model, tokens, cuts, sparse=None, room=0, window=64):
    """Logits (B, T, V) of tokens fed in pieces that end at `cuts`, and the cache after them."""
    cache = model.new_cache(len(tokens), tokens.shape[1] + room, window)
    cuts = (0, *cuts, tokens.shape[1])
    out = [model(tokens[:, start:end], cache=cache, sparse=sparse)
           for start, end in zip(cuts, cuts[1:])]
    return torch.cat(out, dim=1), cache


def one_line(raised, *words):
    """The message of a pytest.raises is one line, and says these words."""
    text = str(raised.value)
    assert "\n" not in text and len(text) < 700, text
    for word in words:
        assert str(word) in text, f"{word!r} is not in: {text}"


def refused(call, *words, error=ValueError):
    """call() raises such an error, whose message is one line and says these words."""
    with pytest.raises(error) as raised:
        call()
    one_line(raised, *words)


def official_names(ratplus):
    """The official RAT+ state dict among the oracle's tensors."""
    return {name.removeprefix("packed/"): tensor for name, tensor in ratplus.items()
            if name.startswith("packed/")}


def save_pth(path, state, monkeypatch, n_head=None):
    """
    Write a .pth as the official trainer does, its config an easydict.EasyDict, which is installed
    only while saving. Without n_head: weights alone.
    """
    module = types.ModuleType("easydict")
    module.EasyDict = type("EasyDict", (dict,), {"__module__": "easydict"})

    def easy(tree):
        tree = module.EasyDict({key: easy(value) if isinstance(value, dict) else value
                                for key, value in tree.items()})
        tree.__dict__.update(tree)  # as the real one does
        return tree

    file = {"task": state}
    if n_head is not None:
        seq_cell = {"_name_": "attention", "num_head": n_head}
        config = {"model": {"backbone": {"seq_cell": seq_cell}}, "data": {"vocab": 97}}
        file |= {"config": easy(config), "step": 7}
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "easydict", module)
        torch.save(file, path)
    assert "easydict" not in sys.modules
    return path


@pytest.fixture(scope="session")
def smollm2():
    """The folder of a real model, which the first to ask fetches (real.py); else a skip."""
    import real
    return real.smollm2()


@pytest.fixture
def beginnings(tmp_path, monkeypatch):
    """
    beginnings(**changes) makes the current folder one with a model of Llama's form, two KV heads
    for four query heads, and 6,000 letters in shards.
    """
    def make(**changes):
        import data
        monkeypatch.chdir(tmp_path)
        grouped = dict(vocab_size=257, n_head=4, n_kv_head=2, context_len=128)
        tiny(**LLAMA_FORM | grouped | changes).save_pretrained("model")
        letters = draw_tokens(1, 6000, vocab_size=26).flatten().add(97).tolist()
        Path("text.txt").write_text(bytes(letters).decode())
        data.main(["--input", "text.txt", "--output=shards", "--workers=1"])
    return make
