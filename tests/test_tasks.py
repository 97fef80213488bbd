"""
experiments/tasks.py against the originals: hashes of prompts that RULER's generators wrote, a
prompt in HELMET's wording, rows and scores of RULER's (tests/oracle/ruler_tasks.json says how they
were made). Then the promises: what is asked can be answered from the context, prompts are full, the
question stands where it is said to, and several questions share a context.
"""
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from itertools import accumulate, combinations
from pathlib import Path

import pytest

import eval_niah
import niah
from experiments import tasks
from conftest import refused
from niah import OTHERS
from test_niah import ASKED, Bytes, Pairs, needles_in, queries_of, sha256, tokenizer_of
from test_spans import made

ORACLE = json.loads(
    (Path(__file__).parent / "oracle" / "ruler_tasks.json").read_text(encoding="utf-8"))
MADE = "vt", "cwe", "fwe", "json_kv"
each_made = pytest.mark.parametrize("name", MADE)
each_tokenizer = pytest.mark.parametrize("tokenizer", ["bytes", "pairs", "cl100k"])


def cases(name):
    return pytest.mark.parametrize("case", ORACLE["prompts"][name], ids=lambda case: "")


def make(name, context_len=3000, index=0, seed=0, tokenizer=Bytes(), **more):
    if tokenizer.name == "pairs":  # nearly bytes
        more = {"max_new_tokens": niah.default_new_tokens(context_len, Bytes(), name)} | more
    return niah.make_example(name, context_len, tokenizer, seed, index, **more)


# ---------------------------------------------------------------- against the originals

@cases("vt")
def test_variable_tracking_is_rulers_to_the_letter(case):
    """Its blanks at ends of lines, its line breaks between the two texts: all change tokens."""
    vt = OTHERS["vt"]

    def written(of):
        names, value = of["variables"], of["value"]
        assert len(names) == vt.hops + 1
        return vt.context(names, value, of["positions"], of["size"]), vt.question(names, value)
    context, asked = written(case["chain"])
    front = vt.answered(*written(case["shot"])) + "\n"
    assert sha256(front + context + asked.text) == case["input_sha256"]
    assert sha256(asked.prefix) == case["prefix_sha256"]
    assert [len(of["variables"][0]) for of in (case["shot"], case["chain"])] == [3, 5]


@cases("cwe")
def test_common_words_are_rulers_to_the_letter(case):
    """Half as many repetitions are a harder task under the same name."""
    cwe = OTHERS["cwe"]
    n_shot, *times = cwe.shape(case["max_seq_length"])
    shot, words = case["shot"], case["words"]
    assert len(shot) == n_shot
    lists = [cwe.context(cwe.repeated(of, *often, random.Random(42)))
             for of, often in ((shot, times[:2]), (words, times[2:]))]
    asked = cwe.question(words)
    text = cwe.answered(lists[0], cwe.question(shot)) + lists[1]
    assert sha256(text + asked.text) == case["input_sha256"]
    assert sha256(asked.prefix) == case["prefix_sha256"] and asked.answers == words[:10]


@cases("fwe")
def test_frequent_words_are_rulers_to_the_letter(case):
    """Another law makes the third word easier to tell from the fourth."""
    fwe = OTHERS["fwe"]
    words, room = case["vocabulary"], case["max_seq_length"] - fwe.max_new_tokens
    assert len(words) == fwe.vocabulary(room) and words[1:4] == case["outputs"]
    text = fwe.repeated(words, case["size"])
    random.Random(42).shuffle(text)  # RULER's order, in all prompts
    text = fwe.context(text)
    assert sha256(text + fwe.asked) == case["input_sha256"]
    assert sha256(fwe.prefix) == case["prefix_sha256"]


@cases("json_kv")
def test_json_keys_are_helmets_to_the_letter(case):
    """An object that is written otherwise, or a demonstration with another blank."""
    kv, pairs = OTHERS["json_kv"], case["pairs"]
    asked = kv.question(pairs[case["asked"]], [pairs[i] for i in case["demos"]])
    assert sha256(kv.context(pairs) + asked + kv.prefix) == case["prompt_sha256"]


def test_numbers_of_new_tokens_are_rulers_and_helmets():
    """An answer that is cut off is wrong however good the model is."""
    expected = {"vt": 30, "cwe": 120, "fwe": 50, "json_kv": 100, "qa_1": 32, "qa_2": 32}
    assert {name: task.max_new_tokens for name, task in OTHERS.items()} == expected
    for name, n in expected.items():
        assert niah.default_new_tokens(1024, made("own cl100k"), name) == n
    for name in niah.TASKS:
        assert niah.default_new_tokens(4096, Bytes(), name) == 48


@each_made
@pytest.mark.parametrize("protocol", niah.PROTOCOLS)
@pytest.mark.parametrize("tokenizer", ["bytes", "cl100k", "smollm2", "llama"])
def test_answers_fit_into_the_new_tokens(name, protocol, tokenizer):
    """Bytes that are counted as tokens: five names take 30 of them, and ten words over 120."""
    tokenizer = made({"cl100k": "own cl100k"}.get(tokenizer, tokenizer))
    if tokenizer.name.startswith("bytes") or name != "json_kv":
        for index in range(6):
            e = make(name, 3000, index, tokenizer=tokenizer, protocol=protocol, words="wonderwords")
            target = niah.target_ids(e.prompt, e.target, tokenizer)
            assert e.max_new_tokens == niah.default_new_tokens(3000, tokenizer, name)
            assert len(target) <= e.max_new_tokens
            assert tokenizer.decode(e.ids + target) == tokenizer.decode(
                tokenizer.encode(e.prompt + e.target))


@pytest.mark.parametrize("prediction, answers, share, best", ORACLE["scores"])
def test_scores_of_both_kinds_are_rulers(prediction, answers, share, best):
    """A question with two spellings of its answer, of which a model can write one: half a point."""
    for name in [None, "data", *niah.TASKS, *OTHERS]:
        expected = best if name in ("qa_1", "qa_2") else share
        assert niah.score_ruler(prediction, answers, name) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", ORACLE["rows"])
def test_rulers_own_file_is_read(tmp_path, name):
    """Answers that stand in many places, asked for in one; a context that ends in the question."""
    row, path = ORACLE["rows"][name], tmp_path / name / "validation.jsonl"
    path.parent.mkdir()
    path.write_text(json.dumps(row) + "\n")
    for protocol, end in ("base", row["answer_prefix"]), ("sft", ""):
        e, = niah.read_jsonl(path, Bytes(), protocol)
        assert (e.task, e.answers, e.spans, e.depth) == (name, row["outputs"], [], [])
        assert e.prompt == row["input"] + end and e.max_new_tokens == OTHERS[name].max_new_bytes
        at = row["input"].rindex("\nQuestion:") + 1
        assert e.ids[:e.question_at] == Bytes().encode(row["input"][:at])
        assert e.target == OTHERS[name].target(row["outputs"], protocol)


def test_a_file_of_questions_about_documents_is_read(tmp_path):
    """Its instruction stands twice, before and behind the documents: the second time it asks."""
    told = "Answer the question based on the given documents. Only give me the answer.\n\n"
    text = f"{told}Document 1:\nQuestion: no.\n\n{told}Question: where?"
    row = {"index": 3, "input": text, "outputs": ["Rome", "in Rome"], "answer_prefix": " Answer:"}
    (tmp_path / "qa_2.jsonl").write_text(json.dumps(row))
    e, = niah.read_jsonl(tmp_path / "qa_2.jsonl", Bytes())
    assert (e.spans, e.depth, e.target, e.max_new_tokens) == ([], [], " Rome", 128)
    assert Bytes().decode(e.ids[e.question_at:]) == f"{told}Question: where? Answer:"


def test_a_row_without_a_question_is_not_asked_blind(tmp_path):
    """A text of one's own wording that is refused, or whose context is cut anywhere."""
    for name, text in ("vt", "x"), ("qa_1", "Question: 7?"), ("niah_single_1", "7"):
        row = {"index": 0, "input": text, "outputs": ["7"]}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
        e, = niah.read_jsonl(tmp_path / f"{name}.jsonl", Bytes())
        assert e.question_at is None and Bytes().decode(e.ids) == text
        refused(lambda: eval_niah.rounds([e]), "--blind", f"{name}.jsonl")


# ---------------------------------------------------------------- what is asked has its answer

def question_of(e):
    """The prompt behind the context, and the context; of the tokenizer Bytes."""
    return Bytes().decode(e.ids[e.question_at:]), Bytes().decode(e.ids[:e.question_at])


def chain_of(text):
    """-> {variable: value} as the lines of a text assign them, in their order"""
    values = {}
    for new, old in re.findall(r"^VAR (\w+) = (?:VAR )?(\w+) ?$", text, re.M):
        values[new] = values.get(old, old)
    return values


@pytest.mark.parametrize("index", range(20))
def test_the_variables_asked_for_are_those_of_the_value(index):
    """A name in both chains, or a chain out of order: another right answer, or none."""
    e = make("vt", index=index)
    asked, context = question_of(e)
    shot, text = context.split("\n\nMemorize")
    value = re.search(r"assigned the value (\d{5}) in the text above\.", asked)[1]
    ours, theirs = chain_of(text), chain_of(shot)
    assert list(ours) == e.answers and set(ours.values()) == {value} and len(ours) == 5
    assert len(theirs) == 5 and not {value, *ours} & {"VAR", *theirs, *theirs.values()}
    assert {len(name) for name in ours} == {5} and {len(name) for name in theirs} == {3}
    answer = shot.split("they are: ")[1].split("\n")[0]
    assert answer == OTHERS["vt"].target(list(theirs), "base") and e.target[0] == " "


def test_the_example_in_front_has_at_most_500_tokens():
    """One that grows with the prompt, or that is left without noise where 500 tokens hold some."""
    for tokenizer in made("own cl100k"), made("smollm2"):
        e = make("vt", 4096, tokenizer=tokenizer)
        shot = e.prompt.split("they are: ")[0] + "they are: "
        size = lambda text: len(tokenizer.encode(text))
        assert size(shot) <= 500 < size(shot.replace("\nQ", f"\n{niah.NOISE}\nQ"))
    shot = make("vt").prompt.split("they are: ")[0]
    assert shot.count(niah.NOISE) == 5 and len(shot) > 500  # in bytes not even these fit


def test_places_in_the_noise_are_anywhere():
    """A chain in one line after the other is found by a local window."""
    places = []
    for index in range(40):
        lines = question_of(make("vt", index=index))[1].split("\n\nMemorize")[1].split("\n")[2:-1]
        at = [i for i, line in enumerate(lines) if line.startswith("VAR")]
        places += [i / len(lines) for i in at]
        assert not lines[-1].startswith("VAR")  # RULER: in front of a sentence
    assert min(places) < 0.1 and max(places) > 0.9 and 0.4 < sum(places) / len(places) < 0.6


@pytest.mark.parametrize("context_len, tokenizer, shot, times", [
    (4095, "bytes", (3, 1), (6, 1)), (2048, "cl100k", (3, 1), (6, 1)),
    (8192, "bytes", (10, 3), (30, 3)), (4096, "cl100k", (10, 3), (30, 3))])
def test_common_words_are_the_most_common(context_len, tokenizer, shot, times):
    """A word in both lists, or twice among the words: more common than those that are asked for."""
    orders = set()
    for index in range(5):
        e = make("cwe", context_len, index, tokenizer=tokenizer_of(tokenizer))
        first, second = e.prompt.split("Memorize the ones that appear most often.\n")[1:]
        found = [re.findall(r"(\d+)\. (\S+)", text.split("\nQuestion")[0])
                 for text in (first, second)]
        for numbered, (often, seldom) in zip(found, (shot, times)):
            assert [int(i) for i, _ in numbered] == list(range(1, len(numbered) + 1))
            counts = Counter(word for _, word in numbered)
            assert sorted(counts.values(), reverse=True) == (
                [often] * 10 + [seldom] * (len(counts) - 10))
        common = {word for word, n in counts.items() if n == often}
        assert common == set(e.answers) and len(e.answers) == 10
        words = [{word for _, word in numbered} for numbered in found]
        assert len(words[0]) == (20 if context_len < 4096 else 40) and not words[0] & words[1]
        assert e.target == " " + " ".join(f"{i}. {word}" for i, word in enumerate(e.answers, 1))
        assert f"in the list are:{OTHERS['cwe'].target(e.answers, 'base')[:4]}" in first + e.target
        orders.add(tuple([word for _, word in numbered].index(word) for word in e.answers))
    assert len(orders) == 5  # in RULER all shuffles of a length are one


def test_words_are_the_essays_or_rulers():
    """Words of one list called those of another: results that seem to compare."""
    words = {e.keys_from.split()[0]: set(re.findall(r"\d+\. (\S+)", e.prompt))
             for e in (make("cwe", words=words) for words in niah.WORDS)}
    essay = set(niah.essay_words()[0])
    assert words["pydoc_data.topics"] <= essay and not words["wonderwords"] <= essay
    assert all(re.fullmatch("[a-z]{3,}", word) for word in words["pydoc_data.topics"])
    assert tasks.distinct_words("built-in", ["of", "The", "words.", "two", "words", "two"]) == [
        "two", "words"]
    listed = tasks.distinct_words("wonderwords", [])
    assert words["wonderwords"] <= {part for word in listed for part in word.split()}
    assert {"aglet", "bumpy", "abide"} <= {*listed} and len(listed) == 8166
    own = " ".join(f"word{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(600))
    e = make("cwe", haystack=own)
    assert e.keys_from.startswith("text ") and {word[:4] for word in e.answers} == {"word"}


@pytest.mark.parametrize("context_len", [700, 1024, 4096])
def test_frequent_words_are_the_most_frequent(context_len):
    """A tie between the third and the fourth: two right answers, of which one counts."""
    for index in range(5):
        e = make("fwe", context_len, index)
        text = e.prompt.split("coded words. ")[1].split("\nQuestion")[0].split(" ")
        (noise, n), *counts = Counter(text).most_common()
        assert noise == "..." and [word for word, _ in counts[:3]] == e.answers
        assert n > counts[0][1] > counts[1][1] > counts[2][1] > (counts + [("", 0)])[3][1]
        assert all(re.fullmatch("[a-z]{6}", word) for word, _ in counts)
        assert text[:n] != ["..."] * n  # shuffled


@pytest.mark.parametrize("index", range(10))
def test_the_json_object_has_the_value_of_each_key(index):
    """An object that no parser reads; a demonstration that gives the answer, or a wrong one."""
    e = make("json_kv", index=index)
    asked, context = question_of(e)
    pairs = json.loads(context)
    *demos, (key, rest) = re.findall(r"Key: (\S+)\nCorresponding value:(.*)", asked)
    assert [pairs[key]] == e.answers and rest == "" and context.count(e.answers[0]) == 1
    assert len(demos) == 2 and all(value == " " + pairs[of] for of, value in demos)
    assert len({key, *(of for of, _ in demos)}) == 3 and len(pairs) == context.count("\n") - 1
    (start, end), (depth,) = *e.spans, e.depth
    assert Bytes().decode(e.ids[start:end]) == e.answers[0]
    assert abs(100 * list(pairs).index(key) / len(pairs) - depth) < 10
    assert e.target == " " + e.answers[0]


def test_depths_of_json_keys_are_spread():
    """Keys that always stand at the end are easy for a local window."""
    depths = sorted(make("json_kv", index=index).depth[0] for index in range(60))
    assert depths[5] < 25 < depths[25] < 75 < depths[-5]


# ---------------------------------------------------------------- promises of every task

@each_tokenizer
@each_made
@pytest.mark.parametrize("protocol", niah.PROTOCOLS)
def test_each_example_is_filled_to_its_limit(name, tokenizer, protocol):
    """A "4096" that is 3,500: RULER's search may end hundreds of words short."""
    tokenizer, task = tokenizer_of(tokenizer), OTHERS[name]
    new = niah.default_new_tokens(3000, Bytes(), name)
    for index in range(3):
        e = make(name, 3000, index, tokenizer=tokenizer, protocol=protocol, max_new_tokens=new)
        rng = random.Random(f"test/0/{name}/{index}")
        draft, n, *_ = niah.compose(task, 3000, tokenizer, rng, protocol, niah.essay_words()[0],
                                    new, 0)
        size = lambda n: len(niah.written(draft.context(n), draft.question, protocol, tokenizer)[2])
        assert len(e.ids) == size(n) <= 3000 - new < size(n + 1)
        assert e.ids == tokenizer.encode(e.prompt)


@each_made
def test_an_example_is_a_function_of_split_seed_and_index(name):
    """State that leaks from one to the next; two splits that share an example."""
    some = lambda **more: [make(name, index=i, **more) for i in (0, 1, 2)]
    first = some()
    assert [make(name, index=i) for i in (2, 1, 0)] == first[::-1]
    assert make(OTHERS[name].short.lower()) == first[0]
    others = [first, some(seed=1), some(split="val"), some(split="train")]
    assert len({e.prompt for examples in others for e in examples}) == 12


def test_an_example_is_the_same_in_another_process():
    """Python's sets and hash() differ from process to process: no test above would see it."""
    code = "; ".join([
        "import sys", "sys.path[:0] = sys.argv[1:]", "import niah, experiments.tasks",
        "from infra.tokenizers import ByteTokenizer as T",
        f"of = [niah.make_document(n, 3000, T(), 0, 0, 3) for n in ('MK-1', 'MK-2', *{MADE})]",
        "print(niah.prompt_hash([e for some in of for e in some]))"])
    folder = str(Path(niah.__file__).parent)
    seen = [subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True,
                           check=True, env=os.environ | {"PYTHONHASHSEED": seed}).stdout
            for seed in "12"]
    assert seen[0] == seen[1] != ""


class Straddling(Pairs):
    """Its tokens begin in the context and end in the question."""
    PAIRS = [*(pair for pair in Pairs.PAIRS if pair != ".\n"), "\nWhat", "\nQues", "\nExtract"]
    name, n_vocab = "straddling", 257 + len(PAIRS)
    longest_first = sorted(PAIRS, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, longest_first)) + r"|[\s\S]")


TOKENIZERS = ["bytes", "own bytes", "own pairs", "straddling", "own cl100k", "bpe NFC", "llama",
              "metaspace", "smollm2", "hf NFC", "hf space in front", "own llama"]


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("name", ["niah_single_2", "niah_multikey_2", "niah_multiquery", *MADE])
def test_the_question_begins_where_it_is_said_to(name, tokenizer):
    """Off by a token, and a context is compressed with its question, or a question is cut."""
    tokenizer = Straddling() if tokenizer == "straddling" else made(tokenizer)
    task = (niah.TASKS | OTHERS)[name]
    for protocol, split in (("base", "test"), ("sft", "train")):
        e = make(name, index=1, tokenizer=tokenizer, protocol=protocol, split=split,
                 max_new_tokens=250)
        at = [found.start() for found in re.finditer(task.asks, e.prompt)][-1]
        assert e.prompt[at - 1] == "\n" and e.ids == tokenizer.encode(e.prompt)
        raw = b"".join(parts := niah.pieces(tokenizer, e.ids))
        ends = [0, *accumulate(map(len, parts))]
        border = len(raw) - len(e.prompt[at:].encode())
        assert raw[border:].decode() == e.prompt[at:]
        # the fewest tokens that hold the context
        assert ends[e.question_at - 1] < border <= ends[e.question_at]
        if tokenizer.name == "straddling":
            assert border < ends[e.question_at]


@pytest.mark.parametrize("name", ["niah_multiquery", "niah_single_1", *MADE])
@pytest.mark.parametrize("protocol", niah.PROTOCOLS)
def test_jsonl_written_is_jsonl_read(tmp_path, name, protocol):
    """A field that is lost on the way makes a file's prompts differ from those that were scored."""
    examples = [make(name, index=index, protocol=protocol) for index in range(3)]
    path = tmp_path / name / "validation.jsonl"
    niah.write_jsonl(path, examples)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["index"] for row in rows] == [0, 1, 2]
    if name in ORACLE["rows"]:
        assert rows[0].keys() | {"length_w_model_temp"} == set(ORACLE["rows"][name])
    new = examples[0].max_new_tokens
    read = niah.read_jsonl(path, Bytes(), protocol, max_new_tokens=new)
    for e, back in zip(examples, read, strict=True):
        for field in ("task", "prompt", "ids", "target", "answers", "spans", "question_at",
                      "answer_prefix", "max_new_tokens"):
            assert getattr(back, field) == getattr(e, field), field


# ---------------------------------------------------------------- several questions

SEVERAL = "niah_multikey_1", "niah_multikey_2", "niah_multikey_3", "json_kv"


@each_tokenizer
@pytest.mark.parametrize("name", SEVERAL)
@pytest.mark.parametrize("protocol", niah.PROTOCOLS)
def test_questions_of_a_document_share_its_context(name, tokenizer, protocol):
    """A cache of the context that serves one of them alone; an answer that is another's."""
    tokenizer = tokenizer_of(tokenizer)
    asked = dict(protocol=protocol, max_new_tokens=60, words="wonderwords")
    of = niah.make_document(name, 3000, tokenizer, 0, 1, 4, **asked)
    alone = niah.make_example(name, 3000, tokenizer, 0, 1, **asked)
    at, text = of[0].question_at, tokenizer.decode(of[0].ids[:of[0].question_at])
    assert len(of) == 4 == len({e.answers[0] for e in of}) == len({e.prompt for e in of})
    assert (of[0].answers, of[0].target) == (alone.answers, alone.target)
    assert len(of[0].ids) > 2700
    stated = json.loads(text) if name == "json_kv" else dict(needles_in(text))
    for number, e in enumerate(of):
        assert (e.question_at, e.ids[:at]) == (at, of[0].ids[:at])
        assert (e.index, e.question) == (1, number) and len(e.ids) + 60 <= 3000
        key = e.prompt.rsplit("Key: ", 1)[-1].split("\n")[0]
        key, = [key] if name == "json_kv" else queries_of(e)
        assert [stated[key]] == e.answers and e.answers[0] in e.target
        (start, end), = e.spans
        assert end <= at and e.answers[0] in tokenizer.decode(e.ids[start:end])
        assert end - start <= len(e.answers[0]) and abs(100 * start / at - e.depth[0]) < 12
    assert niah.make_document(name, 3000, tokenizer, 0, 1, 1, **asked) == [alone]
    assert niah.make_document(name, 3000, tokenizer, 0, 1, 2, **asked) == of[:2]


@pytest.mark.parametrize("name", [*niah.TASKS, *MADE])
def test_as_many_questions_as_a_document_has(name):
    """A key with two values among the lines: a question with two right answers."""
    of = niah.make_document(name, 4000, Bytes(), 0, 0, 10**6, max_new_tokens=250)
    if name not in SEVERAL:
        assert of == [make(name, 4000, max_new_tokens=250)]
        return
    asked, context = question_of(of[0])
    if name == "json_kv":
        demos = re.findall("Key: (.*)\n", asked)[:2]
        once = set(json.loads(context)) - set(demos)
        keys = [re.findall("Key: (.*)\n", question_of(e)[0])[-1] for e in of]
        assert demos == re.findall("Key: (.*)\n", question_of(of[-1])[0])[:2]
    else:
        times = Counter(key for key, _ in needles_in(context))
        once = {key for key, n in times.items() if n == 1}
        keys = [key for e in of for key in queries_of(e)]
    assert len(keys) == len(set(keys)) and set(keys) == once
    assert len(keys) == 4 if name == "niah_multikey_1" else len(keys) > 20
    assert keys[1:] != sorted(keys[1:], key=context.index)  # drawn, not in order


def test_a_key_that_stands_twice_is_not_asked_for(monkeypatch):
    """The haystack's lines may share a key, which then has two values."""
    monkeypatch.setattr(niah, "word_lists", lambda words: (["red", "blue"], [*"abcdefghijk"], ""))
    of = niah.make_document("MK-2", 1500, Bytes(), 0, 0, 99, max_new_tokens=48)
    times = Counter(key for key, _ in needles_in(question_of(of[0])[1]))
    assert max(times.values()) > 1
    assert {times[key] for e in of for key in queries_of(e)} == {1} and len(of) > 1


def test_a_question_that_does_not_fit_is_left_out(monkeypatch):
    """A key that is longer than the room that is left: a prompt beyond the model's limit."""
    monkeypatch.setattr(niah, "word_lists", lambda words: (["red", 80 * "x"], [*"abcdefgh"], ""))
    documents = [niah.make_document("MK-1", 1500, Bytes(), 0, index, 4, max_new_tokens=48)
                 for index in range(8)]
    assert max(len(e.ids) for of in documents for e in of) <= 1500 - 48
    assert {len(of) for of in documents} > {4} and all(documents)
    for index, of in enumerate(documents):  # the first is there even if its key is a long one
        assert of[0].answers == make("MK-1", 1500, index, max_new_tokens=48).answers


def test_lines_of_one_document_have_an_index_each(tmp_path):
    """evaluate.py takes lines of one index for one prompt."""
    of = [e for index in range(3)
          for e in niah.make_document("MK-1", 2048, Bytes(), 0, index, 3, max_new_tokens=48)]
    other = make("json_kv")
    niah.write_jsonl(tmp_path / "a.jsonl", of)
    niah.write_predictions(tmp_path, [*of, other], ["7"] * 10)
    for file in "a.jsonl", "niah_multikey_1.jsonl":
        rows = [json.loads(line) for line in (tmp_path / file).read_text().splitlines()]
        assert [row["index"] for row in rows] == list(range(9))
    assert json.loads((tmp_path / "json_kv.jsonl").read_text())["index"] == 0


# ---------------------------------------------------------------- names, refusals, your own

def test_tasks_that_can_be_made_are_told_from_those_that_are_read():
    """A run of all tasks that ends at its last two."""
    assert niah.generated() == [*niah.TASKS, *MADE]
    assert [task.short for task in OTHERS.values()] == ["VT", "CWE", "FWE", "KV", "QA-1", "QA-2"]
    for name, task in OTHERS.items():
        assert {niah.task_name(text) for text in (name, name.upper(), task.short)} == {name}
    for name, data in ("qa_1", "SQuAD"), ("QA-2", "HotpotQA"):
        refused(lambda: make(name), "cannot be made here", data, "RULER's scripts/data/prepare.py")
    refused(lambda: niah.task_name("vtt"), "unknown task 'vtt'", "S-1", "vt (VT)", "qa_2 (QA-2)")


def test_what_cannot_be_made_is_one_clear_line():
    """RULER retries for ever, or takes its words from another list."""
    refused(lambda: make("vt", 1200), "VT needs about ", "context_len=1200")
    refused(lambda: make("fwe", 500), "FWE needs about ", "context_len=500")
    refused(lambda: make("vt", max_new_tokens=29), "VT: max_new_tokens=29 leaves no room")
    refused(lambda: make("cwe", 100_000), "CWE: context_len=100000 has room for more than the 1,",
            "words='wonderwords'")
    refused(lambda: make("cwe", haystack="a few words"), "CWE: ", "the 0 different words")
    assert len(make("cwe", 100_000, words="wonderwords").ids) > 99_000


class Capital(tasks.Other):
    short, max_new_tokens, max_new_bytes, one_place = "CAP", 8, 8, True

    def draw(self, rng, **_):
        city = rng.choice(["Rome", "Oslo", "Bern"])
        question = niah.Question("Question: which city?", " Answer:", [city],
                                 [(f"It is {city}.", 0)])
        return niah.Draft(lambda n: f"It is {city}." + " No." * n + "\n", question)


def test_a_task_of_ones_own_is_a_class_and_a_line(monkeypatch, tmp_path, capsys):
    """A name that is known to half of the code."""
    monkeypatch.setitem(OTHERS, "capital", Capital())
    assert niah.task_name("cap") == "capital" == niah.generated()[-1]
    assert niah.default_new_tokens(512, Bytes(), "capital") == 8
    e = make("CAP", 512)
    assert 500 < len(e.ids) + 8 <= 512 and e.prompt.endswith(" No.\nQuestion: which city? Answer:")
    assert Bytes().decode(e.ids[slice(*e.spans[0])]) == e.answers[0] and e.target[1:] in e.answers
    niah.write_jsonl(tmp_path / "capital.jsonl", [e])
    back, = niah.read_jsonl(tmp_path / "capital.jsonl", Bytes())
    assert (back.question_at, back.spans, back.target) == (e.question_at, e.spans, e.target)
    niah.main(["--task=cap", "--context_len=512"])
    assert f"answers   {e.answers}" in capsys.readouterr().out


def test_the_command_shows_and_writes_each_task(tmp_path, capsys):
    """The first thing anybody runs."""
    for name in MADE:
        niah.main([f"--task={OTHERS[name].short}", "--context_len=2600"])
        shown, e = capsys.readouterr().out, make(name, 2600)
        assert shown.startswith(e.prompt + "\n---") and f"from token {e.question_at} on" in shown
    script = [sys.executable, "-m", "experiments.tasks", "--context_len=2600"]
    path = tmp_path / "vt.jsonl"
    there = dict(cwd=Path(niah.__file__).parent, text=True, capture_output=True)
    subprocess.run([*script, "--task=vt", "--samples=2", f"--output={path}"], check=True, **there)
    assert [e.prompt for e in niah.read_jsonl(path, Bytes())] == [
        make("vt", 2600, index).prompt for index in range(2)]
    seen = subprocess.run([*script, "--task=qa_1"], **there)
    assert seen.returncode == 2 and "SQuAD" in seen.stderr and seen.stderr.count("\n") == 1
