"""
Needles in a haystack: RULER's eight retrieval tasks as a function, its two scores, and its jsonl in and out.

    sample = f(split, seed, task, index)          any order, any number of workers, the same text
    prompt tokens + max_new_tokens <= context_len, with as much haystack as fits

Wording, depths and the way needles enter the text are RULER's (arXiv 2404.06654, NVIDIA/RULER scripts/data/synthetic),
held by the hashes of its own prompts in tests/test_niah.py. Here otherwise, on purpose:
    RULER searches the haystack's size once per file and falls up to 500 words short; here every sample is filled.
    RULER shuffles the needles of every sample of a file alike; here each sample has its own order, no two keys or
    values of a sample's needles are equal, and answers are listed in the order a reader meets them.
    RULER's essays are Paul Graham's, cut into sentences by nltk; here any text, cut after . ! or ? (quotes included).
    The default is the prose of Python's own help pages (pydoc_data.topics), which needs no download.

Two protocols. "base": RULER's prompt, which ends in the opening of the answer ("... is");
the model goes on with " 123, 456". "sft", as official RAT+: the prompt ends with the question, the answer is "123,456".
Both scores read both forms. Training samples are at the end; train.py and eval_niah.py use this file.
"""
import argparse
import hashlib
import json
import random
import re
import sys
import uuid
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib import metadata, resources
from itertools import accumulate, count, islice, repeat
from os.path import commonprefix
from pathlib import Path
from string import ascii_lowercase
from typing import NamedTuple

import numpy as np

from infra.files import all_or_nothing, lines_of, parse_json, regular, short, told_to_end


class Task(NamedTuple):
    short: str          # column of the paper's tables
    haystack: str       # noise (five sentences, repeated), essay (prose) or needle (needles that nobody asks for)
    keys: str           # words (adjective-noun; wonderwords: RULER's) or uuids
    values: str         # numbers (7 digits) or uuids
    n_keys: int = 1
    n_values: int = 1   # needles per key
    n_queries: int = 1  # keys asked for


TASKS = {
    "niah_single_1":   Task("S-1", "noise", "words", "numbers"),
    "niah_single_2":   Task("S-2", "essay", "words", "numbers"),
    "niah_single_3":   Task("S-3", "essay", "words", "uuids"),
    "niah_multikey_1": Task("MK-1", "essay", "words", "numbers", n_keys=4),
    "niah_multikey_2": Task("MK-2", "needle", "words", "numbers"),
    "niah_multikey_3": Task("MK-3", "needle", "uuids", "uuids"),
    "niah_multivalue": Task("MV", "essay", "words", "numbers", n_values=4),
    "niah_multiquery": Task("MQ", "essay", "words", "numbers", n_keys=4, n_queries=4),
}
PROTOCOLS = {"base": (" ", ", "), "sft": ("", ",")}  # what opens an answer, what joins several
WORDS = "built-in", "wonderwords"  # of keys; RULER's are those of the package wonderwords
SPLITS = "train", "val", "test"  # part of every seed, so that they never share a sample

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
INTRO = ("{some} special magic {kind} {are} hidden within the following text. Make sure to memorize it. "
         "I will quiz you about the {kind} afterwards.\n")
QUESTION = "\nWhat {are_all} the special magic {kind} for {query} mentioned in the provided text?"
PREFIX = " The special magic {kind} for {query} mentioned in the provided text {are}"

DEPTHS = [round(100 * i / 39) for i in range(40)]          # percent; RULER's 40 even steps
LEAST_UNITS = {"noise": 1, "essay": 8, "needle": 1}        # less than this is no haystack
SENTENCE_ENDS = tuple(stop + close for stop in ".!?" for close in ("", '"', "'", ")", "”", "’"))


class UnknownTask(argparse.ArgumentTypeError, ValueError):
    """As an argument's type it is told as it is."""


def task_name(text):
    """A task's name, from that or from its column in the tables: mk-2 is niah_multikey_2."""
    for name, task in TASKS.items():
        if text.lower() in (name, task.short.lower()):
            return name
    known = ", ".join(f"{name} ({task.short})" for name, task in TASKS.items())
    raise UnknownTask(f"unknown task {short(text)}: one of {known}")


@dataclass(frozen=True)
class Example:
    task: str
    index: int
    prompt: str
    answer_prefix: str   # the end of the prompt that RULER keeps in a field of its own; "" under sft
    ids: list            # tokens of the prompt
    answers: list        # texts, in the order of the queries, then of appearance
    target: str          # what a perfect model writes next, before the end token
    spans: list          # [start, end) tokens of each answer's value in the prompt
    depth: list          # percent, of each answer's needle
    context_len: int     # tokens, those to generate included
    max_new_tokens: int
    keys_from: str       # where keys and haystack come from: results are only comparable where these are equal
    haystack_from: str


# ---------------------------------------------------------------- text: everything given, nothing drawn

def wording(values, n_answers):
    """RULER asks for one answer in the singular, for several in the plural; needles are always in the plural."""
    if n_answers == 1:
        return dict(some="A", are="is", are_all="is", kind=values[:-1])
    return dict(some="Some", are="are", are_all="are all", kind=values)


def question(task, queries):
    """-> the question about these keys, and the opening of its answer."""
    words = wording(task.values, len(queries) * task.n_values)
    words["query"] = queries[0] if len(queries) == 1 else ", ".join(queries[:-1]) + ", and " + queries[-1]
    return QUESTION.format(**words), PREFIX.format(**words)


def intro(task):
    return INTRO.format(**wording(task.values, task.n_queries * task.n_values))


def needle(task, key, value):
    return NEEDLE.format(kind=task.values, key=key, value=value)


def build_context(
    task,
    units,    # the haystack: words of an essay, else lines
    needles,  # texts, in order of appearance
    depths,   # percent, ascending: a needle goes in front of sentence (essay) or line int(n * depth / 100) of n
):
    positions = lambda n: [int(n * (depth / 100)) for depth in depths]
    if task.haystack != "essay":
        lines = list(units)
        for position, text in reversed(list(zip(positions(len(lines)), needles))):
            lines.insert(position, text)
        return "\n".join(lines)
    stops = [0, *(i for i, word in enumerate(units[:-1], 1) if word.endswith(SENTENCE_ENDS)), len(units)]
    cuts = [0, *(stops[s] for s in positions(len(stops) - 1)), len(units)]  # in words
    parts = [" ".join(units[a:b]) for a, b in zip(cuts, cuts[1:])]
    # an empty part (depth 0 or 100, two needles side by side) leaves its space behind, as RULER's does
    return parts[0] + "".join(f" {text} {part}" for text, part in zip(needles, parts[1:]))


def answer_text(answers, protocol):
    """What the model is to write after the prompt, before the end token."""
    opening, comma = PROTOCOLS[protocol]
    return opening + comma.join(answers)


# ---------------------------------------------------------------- chance: keys, values, depths, haystack

@lru_cache
def word_lists(words="built-in"):
    """-> adjectives, nouns, where from. RULER's must be asked for, whatever is installed."""
    if words == "built-in":
        return sorted(ADJECTIVES), sorted(NOUNS), "built-in words"
    try:
        files = resources.files("wonderwords.assets")
        lists = [(files / name).read_text("utf-8").splitlines() for name in ("adjectivelist.txt", "nounlist.txt")]
    except ModuleNotFoundError:
        raise ValueError("words=wonderwords needs that package: pip install wonderwords, or take "
                         "built-in words") from None
    adjectives, nouns = (sorted({word.strip() for word in lines} - {""}) for lines in lists)
    return adjectives, nouns, f"wonderwords {metadata.version('wonderwords')}"


ADJECTIVES = """amber ample aqua bland bold brave brisk broad calm civil clear cool coral crisp curly damp deep dense
dry dusty eager early faint fair fancy firm fresh gentle glad grand humble icy jolly keen late light loud lucky mellow
merry mild modest narrow neat noble odd pale plain proud quick quiet rapid rough round shy silent smooth tidy true warm""".split()
NOUNS = """acorn anchor apron arrow barn basin beacon bell bench bridge bucket button cabin candle canoe cedar chalk
cliff clock comet copper dune engine falcon ferry fiddle garden gate glove hammer harbor island jacket kettle ladder
lantern lemon maple marble meadow mirror needle oak otter paddle pebble pillow pond quilt raven river saddle shelf
sparrow spoon tunnel valley violin wagon willow""".split()


def draw_text(kind, rng):
    if kind == "numbers":
        return str(rng.randint(10**6, 10**7 - 1))
    if kind == "uuids":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    if kind == "training words":  # half of them mere letters: who knows the list by heart finds no other words
        word = lambda some: rng.choice(some) if rng.random() < 0.5 else "".join(rng.choices(ascii_lowercase, k=rng.randint(2, 9)))
        return f"{word(ADJECTIVES)}-{word(NOUNS)}"
    adjectives, nouns, _ = word_lists("wonderwords" if kind == "wonderwords" else "built-in")
    return f"{rng.choice(adjectives)}-{rng.choice(nouns)}"  # RULER: some words hold a space or a hyphen, kept as is


def draw_distinct(kind, n, rng, used):
    """n texts that are not in the set `used`, which grows by them."""
    texts = []
    while len(texts) < n:
        text = draw_text(kind, rng)
        if text not in used:
            used.add(text)
            texts.append(text)
    return texts


def draw_needles(task, rng):
    """-> (key, value) pairs in order of appearance, their depths (percent), the keys asked for."""
    used = set()
    keys = draw_distinct(task.keys, task.n_keys, rng, used)
    values = draw_distinct(task.values, task.n_keys * task.n_values, rng, used)
    pairs = list(zip(keys * task.n_values, values))  # all alike, so in random order already; RULER shuffles as well
    # RULER: an essay has 40 places, one per depth; between lines any place will do
    depths = rng.sample(DEPTHS, len(pairs)) if task.haystack == "essay" else [100 * rng.random() for _ in pairs]
    return pairs, sorted(depths), rng.sample(keys, task.n_queries)


@lru_cache
def essay_words(text=None):
    """-> words of the text, whitespace normalised as RULER does, and its name. None: the help pages of Python."""
    if text is not None:
        if not text.split():
            raise ValueError("the haystack's text is empty: give a text, or none for Python's help pages")
        return text.split(), f"text {hashlib.sha256(text.encode()).hexdigest()[:12]}"
    from pydoc_data.topics import topics
    paragraphs = [text for name in sorted(topics) for text in re.split(r"\n\s*\n", topics[name])]
    prose = [text for text in paragraphs if text[:1].isupper() and text.endswith(".")]  # no code, tables or headings
    return " ".join(prose).split(), "pydoc_data.topics of Python %d.%d" % sys.version_info[:2]


def read_haystack(path):
    """The text of a file in UTF-8."""
    try:
        return regular(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8: save the text as UTF-8") from None


class Haystack:
    """haystack(n): the first n units. Each is drawn once, in order, so that the size can be searched for."""

    def __init__(self, task, rng, avoid, words, start):
        self.units, self.stream = [], self.draw(task, rng, avoid, words, start)

    def draw(self, task, rng, avoid, words, start):
        if task.haystack == "noise":
            yield from repeat(NOISE)
        if task.haystack == "essay":
            yield from (words[i % len(words)] for i in count(start))  # RULER too repeats a text that is too short
        while True:  # distractors may share keys with each other, but not with a needle (avoid, a set)
            key, = draw_distinct(task.keys, 1, rng, set(avoid))
            yield needle(task, key, draw_text(task.values, rng))

    def __call__(self, n):
        self.units += islice(self.stream, max(0, n - len(self.units)))
        return self.units[:n]


# ---------------------------------------------------------------- one example

def fill(build, least, limit):
    """
    build(n) for the largest n >= least whose last item, the tokens, has at most `limit`; None if not even the least.
    Tokens grow nearly in proportion to n: aim by the slope, until n fits and n + 1 does not. About five builds.
    """
    n, best, over, probe = least, build(least), None, least + 8
    if len(best[-1]) > limit:
        return None
    while over is None or over - n > 1:
        built = build(probe)
        slope = max(0.1, (len(built[-1]) - len(best[-1])) / (probe - n))  # tokens per unit
        if len(built[-1]) <= limit:
            n, best = probe, built
        else:
            over = probe
        probe = n + max(1, int((limit - len(best[-1])) / slope))
        probe = probe if over is None else min(probe, over - 1)
    return best


def pieces(tokenizer, ids):
    """
    The bytes that each token stands for. They join to the text as the tokenizer has it, normalised
    perhaps. One that has encode and decode alone cannot tell where in a character a token ends:
    each token that has a part in the character gets a byte of it or more.
    """
    if hasattr(tokenizer, "pieces"):
        return tokenizer.pieces(ids)
    text, size = tokenizer.decode(ids), lambda text: len(text.encode(errors="replace"))
    done, n_bytes, ends = 0, 0, [0]  # the characters of the text that are complete, and their bytes
    before, start = 0, 0  # some drop a space in front: the token before is decoded too, and cut off
    for n in range(1, len(ids) + 1):
        new = tokenizer.decode(ids[before:n])[len(tokenizer.decode(ids[before:start])):]
        same = len(commonprefix([new, text[done:done + len(new)]]))
        end, rest = n_bytes + size(text[done:done + same]), new[same:]
        character = text[done + same:done + same + 1]
        if rest.strip("\ufffd") or (rest and not character):
            raise ValueError(f"tokenizer {tokenizer.name} decodes token {n - 1} otherwise among "
                             "others: give it pieces(ids), as the tokenizers of data.py have")
        if not rest:
            done, n_bytes = done + same, end
            before, start = (start, n) if new else (before, start)
        else:
            end = min(max(end, ends[-1]) + 1, end + size(character) - 1)
        ends.append(max(end, ends[-1]))
    raw = text.encode(errors="replace")
    if ends[-1] != len(raw):
        raise ValueError(f"tokenizer {tokenizer.name} decodes more than its tokens: give it "
                         "pieces(ids), as the tokenizers of data.py have")
    return [raw[low:high] for low, high in zip(ends, ends[1:])]


def byte_ends(tokenizer, ids):
    """How many bytes of text come before each token, and in all."""
    return [0, *accumulate(map(len, pieces(tokenizer, ids)))]


def token_spans(text, ids, spans, tokenizer):
    """
    Character spans [start, end) of the text -> the fewest tokens that cover them. A tokenizer may
    normalise, or put a space in front: what is before a span's end is counted in its own bytes.
    """
    parts, found = pieces(tokenizer, ids), []
    raw, ends = b"".join(parts), [0, *accumulate(map(len, parts))]
    for start, end in spans:
        answer = text[start:end].encode(errors="replace")
        high = len(tokenizer.decode(tokenizer.encode(text[:end])).encode(errors="replace"))
        low = high - len(answer)
        if raw[max(0, low):high] != answer:
            there = short(raw[max(0, low):high].decode(errors="replace"))
            raise ValueError(f"tokenizer {tokenizer.name} has {there} where the text has "
                             f"{short(text[start:end])}, which it cannot write: write that as it "
                             "does (NFC, lower case?), or take another tokenizer")
        found.append((bisect_right(ends, low) - 1, bisect_left(ends, high)))
    return found


def target_ids(prompt, target, tokenizer):
    """Tokens of the target where it follows the prompt; sentencepiece alone would open it with a space of its own."""
    before = prompt.rsplit(" ", 1)[-1]
    head, both = tokenizer.encode(before), tokenizer.encode(before + target)
    return both[len(head):] if both[:len(head)] == head else tokenizer.encode(target)


class Draft(NamedTuple):
    answers: list   # (key, value, depth in percent): by query, then in order of appearance
    target: str     # what a perfect model writes next
    build: object   # n units of haystack -> prompt, answer prefix, tokens


def draw_draft(task, tokenizer, rng, protocol, words, start=None):
    """Everything but the size. start: an essay's first word, None draws one."""
    pairs, depths, queries = draw_needles(task, rng)
    start = rng.randrange(len(words)) if start is None else start
    haystack = Haystack(task, rng, {key for key, _ in pairs}, words, start)
    asked, prefix = question(task, queries)
    prefix = prefix if protocol == "base" else ""
    texts = [needle(task, *pair) for pair in pairs]

    def build(n):
        prompt = intro(task) + build_context(task, haystack(n), texts, depths) + asked + prefix
        return prompt, prefix, tokenizer.encode(prompt)
    answers = [(key, value, depth) for query in queries for (key, value), depth in zip(pairs, depths) if key == query]
    return Draft(answers, answer_text([value for _, value, _ in answers], protocol), build)


def compose(task, context_len, tokenizer, rng, protocol, words, max_new_tokens, start=None):
    """-> draft, prompt, answer prefix, tokens, target tokens; the prompt filled to the limit."""
    needed = []
    for _ in range(50):  # where the room is tight, draw again: keys of another length may fit
        draft = draw_draft(task, tokenizer, rng, protocol, words, start)
        filled = fill(draft.build, LEAST_UNITS[task.haystack], context_len - max_new_tokens)
        if filled:
            target = target_ids(filled[0], draft.target, tokenizer)
            if len(target) >= max_new_tokens:
                raise ValueError(f"{task.short}: {max_new_tokens=} leaves no room for an answer of {len(target)} tokens "
                                 "and the end token: raise it")
            return draft, *filled, target
        needed.append(len(draft.build(LEAST_UNITS[task.haystack])[-1]) + max_new_tokens)
    raise ValueError(f"{task.short} needs about {sorted(needed)[25]} tokens, {max_new_tokens=} included, but "
                     f"{context_len=}: raise that, lower max_new_tokens, or take the tasks niah.fitting_tasks names")


def make_example(
    task, context_len, tokenizer,
    seed, index,            # the sample is a function of split, seed, task and index, nothing else
    protocol="base",        # or "sft"
    haystack=None,          # text of the essay; None: Python's help pages
    *, split="test",        # training essays start anywhere, others at the first word, as RULER's do
    max_new_tokens=128,     # RULER's; room for the answer and the end token at least
    words="built-in",       # or "wonderwords"
):                          # -> Example
    task = task_name(task)
    for name, value, known in (("protocol", protocol, PROTOCOLS), ("split", split, SPLITS),
                               ("words", words, WORDS)):
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}: one of {', '.join(known)}")
    t, (essay, source) = with_words(TASKS[task], words), essay_words(haystack)
    rng = random.Random(f"{split}/{seed}/{task}/{index}")
    start = None if split == "train" else 0
    draft, prompt, prefix, ids, _ = compose(
        t, context_len, tokenizer, rng, protocol, essay, max_new_tokens, start)

    chars = []
    for key, value, _ in draft.answers:
        end = prompt.index(needle(t, key, value)) + len(needle(t, key, value)) - 1  # the value stands before the "."
        chars.append((end - len(value), end))
    return Example(
        task, index, prompt, prefix, ids, [value for _, value, _ in draft.answers], draft.target,
        token_spans(prompt, ids, chars, tokenizer), [round(depth) for *_, depth in draft.answers],
        context_len, max_new_tokens,
        keys_from=t.keys if t.keys == "uuids" else word_lists(words)[2],
        haystack_from=source if t.haystack == "essay" else t.haystack)


def with_words(task, words):
    """The task with keys of these words, where it has keys of words."""
    return task._replace(keys=words) if task.keys == "words" and words != "built-in" else task


def default_new_tokens(context_len, tokenizer):
    """RULER's 128; in a short context, and for models of bytes, 48: the longest answers take 38 bytes (a uuid) and 36."""
    return 48 if context_len < 2048 or tokenizer.name == "bytes" else 128


def fitting_tasks(context_len, tokenizer, protocol="base", max_new_tokens=128, words="built-in"):
    """Names of the tasks that this length has room for: half of 16 drafts or more, with the least haystack, fit."""
    essay = essay_words()[0]

    def fits(name):
        task = with_words(TASKS[name], words)
        drafts = [draw_draft(task, tokenizer, random.Random(i), protocol, essay) for i in range(16)]
        prompts = sorted(len(draft.build(LEAST_UNITS[TASKS[name].haystack])[-1]) for draft in drafts)
        answer = max(len(tokenizer.encode(draft.target)) for draft in drafts)
        return prompts[8] + max_new_tokens <= context_len and answer < max_new_tokens
    return [name for name in TASKS if fits(name)]


def prompt_hash(examples):
    """Twelve hex digits that two runs share if and only if they asked the same prompts, in the same order."""
    return hashlib.sha256("\0".join(e.prompt for e in examples).encode()).hexdigest()[:12]


# ---------------------------------------------------------------- scores, 0 to 1 per example

def score_ruler(prediction, answers):
    """RULER's string_match_all: the share of answers that occur in the prediction, in any case of letters."""
    return sum(answer.lower() in prediction.lower() for answer in answers) / len(answers)


def score_paper(prediction, answers):
    """Official RAT+: the prediction's comma-separated pieces against the answers, as exact sets."""
    return len({piece.strip() for piece in prediction.split(",")} & {a.strip() for a in answers}) / len(answers)


# ---------------------------------------------------------------- RULER's jsonl

def write_jsonl(path, examples):
    """The form of RULER's data files, which read_jsonl and RULER's own scripts/pred/call_api.py read."""
    write_lines(path, ({
        "index": e.index, "input": e.prompt.removesuffix(e.answer_prefix), "outputs": e.answers,
        "length": len(e.ids) + e.max_new_tokens, "answer_prefix": e.answer_prefix,
        "token_position_answer": e.spans[0][0]} for e in examples))


def write_predictions(folder, examples, predictions):
    """One <task>.jsonl per task, as RULER's scripts/eval/evaluate.py --data_dir folder and official RAT+ score them."""
    lines = {}
    for e, prediction in zip(examples, predictions, strict=True):
        lines.setdefault(e.task, []).append({
            "index": e.index, "pred": prediction, "input": e.prompt, "outputs": e.answers,
            "others": {}, "truncation": -1, "length": len(e.ids) + e.max_new_tokens})
    write_files({Path(folder) / f"{task}.jsonl": rows for task, rows in lines.items()})


def write_lines(path, rows):
    write_files({Path(path): rows})


def write_files(files):
    """{path: rows of a jsonl}. All are there in the end, or none is."""
    def writer(rows):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        return lambda path: path.write_text(text, encoding="utf-8")
    for path in files:
        path.parent.mkdir(parents=True, exist_ok=True)
    all_or_nothing({path: writer(rows) for path, rows in files.items()})


def read_jsonl(path, tokenizer, protocol="base", task=None, max_new_tokens=128):
    """
    A data file of RULER's -> Examples. task: None takes the folder or file name (RULER: <task>/validation.jsonl).
    An answer's span is its needle, or the first place where it occurs; its depth counts characters of the prompt.
    RULER's `index` is a character offset, so two lines may share one.
    """
    path = Path(path)
    task = task or next((name for name in (path.stem, path.parent.name) if name in TASKS), path.stem)
    with open(regular(path), "rb") as file:
        read = partial(read_row, path=path, tokenizer=tokenizer, protocol=protocol, task=task,
                       max_new_tokens=max_new_tokens)
        return [read(line, f"{path} line {number}") for number, line in lines_of(file)]


def read_row(line, where, path, tokenizer, protocol, task, max_new_tokens):
    try:
        row = parse_json(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error}); write one object per line") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: not an object {{...}}; write one per line")
    for field, kind, what in ("index", int, "a number"), ("input", str, "a text"), ("outputs", list, "a list"):
        if not isinstance(row.get(field), kind):
            raise ValueError(f"{where}: no field {field!r} that is {what}; RULER's scripts/data/prepare.py writes it")
    if not 0 < len(row["outputs"]) <= 1000 or not all(isinstance(answer, str) and answer for answer in row["outputs"]):
        raise ValueError(f"{where}: outputs must be one or more texts (at most 1,000), not {short(row['outputs'])}")
    prefix = row.get("answer_prefix")
    prefix = "" if prefix is None else prefix
    if not isinstance(prefix, str):
        raise ValueError(f"{where}: answer_prefix must be a text, not {short(prefix)}")
    prefix = prefix if protocol == "base" else ""
    prompt, answers, chars = row["input"] + prefix, row["outputs"], []
    for answer in answers:
        found = re.search(rf"(?<= is: ){re.escape(answer)}\.", prompt) or re.search(re.escape(answer), prompt)
        if not found:
            raise ValueError(f"{where}: answer {short(answer)} is not in the input; is this a needle task?")
        chars.append((found.start(), found.start() + len(answer)))
    ids = tokenizer.encode(prompt)
    try:
        spans = token_spans(prompt, ids, chars, tokenizer)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return Example(
        task, row["index"], prompt, prefix, ids, answers, answer_text(answers, protocol), spans,
        [round(100 * start / len(prompt)) for start, _ in chars],
        len(ids) + max_new_tokens, max_new_tokens, keys_from=str(path), haystack_from=str(path))


# ---------------------------------------------------------------- training

def many_questions(task, room, tokenizer, rng, words, protocol):
    """
    A context full of needles, then question, answer and end token, again and again, each about other keys, until the
    room (tokens) is full. -> [(ids, is an answer)]

    RULER's wording throughout. Half the samples are brief: no introduction and, under "base", only the opening of each
    answer, so that twice as many fit. Where two questions of the task's own kind do not fit even so, questions have one
    key with one value: 256 bytes hold two needles and an answer.
    """
    size = lambda text: len(tokenizer.encode(text))
    one = dict(n_keys=1, n_values=1, n_queries=1)
    smallest = task._replace(keys="words", values="numbers", **one)
    for task, brief in (task, rng.random() < 0.5), (task, True), (task._replace(**one), True), (smallest, True):
        used, opening = set(), "" if brief else intro(task)

        def draw_group():  # the keys of one question, and their needles
            keys = draw_distinct(task.keys, task.n_queries, rng, used)
            return keys, [(key, value) for key in keys for value in draw_distinct(task.values, task.n_values, rng, used)]

        def ask(keys, pairs):  # -> tokens of the question, tokens of the answer
            asked, prefix = question(task, keys)
            asked = asked if protocol == "sft" else "\n" + prefix if brief else asked + prefix
            target = answer_text([value for key in keys for k, value in pairs if k == key], protocol)
            return tokenizer.encode(asked), target_ids(asked, target, tokenizer) + [tokenizer.eos_id]

        group = draw_group()
        cost = sum(map(len, ask(*group))) + sum(size(needle(task, *pair) + "\n") for pair in group[1])
        n_groups = int((room - size(opening)) / cost)
        if n_groups >= 2:
            break
    groups = [draw_group() for _ in range(max(2, int(n_groups * rng.uniform(0.5, 1))))]
    pairs = [pair for _, group in groups for pair in group]
    rng.shuffle(pairs)
    depths, texts = sorted(100 * rng.random() for _ in pairs), [needle(task, *pair) for pair in pairs]
    haystack = Haystack(task, rng, used, words, rng.randrange(len(words)))
    build = lambda n: [tokenizer.encode(opening + build_context(task, haystack(n), texts, depths))]
    questions = [piece for keys, _ in groups for piece in zip(ask(keys, pairs), (False, True))]
    context, = fill(build, 0, room - sum(len(ids) for ids, _ in questions)) or build(0)
    return [(context, False), *questions]


def drill(room, tokenizer, rng, words):
    """
    A few facts, stated once and then asked again and again until the room (tokens) is full. -> [(ids, is an answer)]

    One to four keys, values of one to seven digits, RULER's wording whole or cut short, essay in between or none. Nearly
    every line trains retrieval, so a small model learns it within a thousand steps, and uses it in the tasks later on.
    """
    keys = draw_distinct("training words", rng.randint(1, 4), rng, set())
    n_digits, gap = rng.choice((1, 1, 2, 7)), rng.choice((0, 0, 20, 60, 120))  # longest piece of essay, in characters
    values = ["".join(rng.choices("0123456789", k=n_digits)) for _ in keys]
    needles = "{key} is: ", NEEDLE.removesuffix("{value}.")
    questions = "{key} is: ", "{key} mentioned in the provided text is ", PREFIX + " "
    pieces, stated, size = [], set(), 0
    while size < room:
        i = rng.randrange(len(keys))
        template = rng.choice(questions if i in stated else needles)
        kind = "number" if template is questions[-1] else "numbers"
        start, end = rng.randrange(len(words)), rng.randint(1, gap) if gap else 0
        essay = " ".join(words[start:start + 60])[:end] + "\n" if gap else ""
        line = [(tokenizer.encode(template.format(key=keys[i], query=keys[i], kind=kind, are="is")), False),
                (tokenizer.encode(values[i]), i in stated), (tokenizer.encode(".\n" + essay), False)]
        stated.add(i)
        pieces += line
        size += sum(len(ids) for ids, _ in line)
    return pieces


def training_sample(
    context_len, tokenizer,
    seed, index,              # the sample is a function of these two, nothing else
    tasks=tuple(TASKS),       # those that fit: fitting_tasks
    many=0.5,                 # share of samples with many needles and many questions, of those that are no drills
    haystack=None,
    other_weight=0.1,         # loss weight of what is no answer; official RAT+: 0
    protocol="base",
    max_new_tokens=128,
    drills=0.0,               # share of samples that are drills
):                            # -> tokens int64, weights float32, both (context_len + 1,)
    """
    weights[t] is the loss weight of predicting tokens[t]: 1 on answers and the end token after each, other_weight on the
    rest, 0 on tokens[0] and on padding. Half the samples look like make_example's, the other half (many_questions) hold
    an answer every few dozen tokens: with one answer per sample, retrieval takes far longer to form. Drills are denser still.
    Keys come from the built-in words and from no list at all, so that training needs no package and models know any words.
    """
    rng = random.Random(f"train/{seed}/{index}")
    task, words = TASKS[rng.choice(tasks)], essay_words(haystack)[0]
    if task.keys == "words":
        task = task._replace(keys="training words")
    if rng.random() < drills:
        pieces = drill(context_len + 1, tokenizer, rng, words)
    elif rng.random() < many:
        pieces = many_questions(task, context_len + 1, tokenizer, rng, words, protocol)
    else:
        *_, ids, target = compose(task, context_len, tokenizer, rng, protocol, words, max_new_tokens)
        pieces = [(ids, False), (target + [tokenizer.eos_id], True)]
    tokens, weights = np.full(context_len + 1, tokenizer.eos_id, np.int64), np.zeros(context_len + 1, np.float32)
    start = 0
    for ids, is_answer in pieces:
        ids = ids[:len(tokens) - start]
        tokens[start:start + len(ids)] = ids
        weights[start:start + len(ids)] = 1 if is_answer else other_weight
        start += len(ids)
    weights[0] = 0  # nothing comes before it
    return tokens, weights


class Needles:
    """
    Sample `index` of training_sample: tokens and loss weights (context_len + 1,).

    The first `only_drills` samples are drills, which form retrieval; of the others 30 % are, lest it fade.
    """

    def __init__(self, args, tokenizer, seed, only_drills=0):
        self.only_drills, self.later_drills = only_drills, 0.3 if only_drills else 0.0
        self.haystack = read_haystack(args.haystack) if args.haystack else None
        self.new_tokens = default_new_tokens(args.context_len, tokenizer)
        fitting = fitting_tasks(args.context_len, tokenizer, args.protocol, max_new_tokens=self.new_tokens)
        self.tasks = args.tasks or fitting
        if not self.tasks or set(self.tasks) - set(fitting):
            raise ValueError(f"--context_len {args.context_len} is too short for these tasks; it has room for "
                             f"{', '.join(fitting) or 'none (512 bytes hold the simplest)'}")
        self.args, self.tokenizer, self.seed = args, tokenizer, seed

    def __getitem__(self, index):
        args, drills = self.args, 1.0 if index < self.only_drills else self.later_drills
        return training_sample(args.context_len, self.tokenizer, self.seed, index, self.tasks, args.many, self.haystack,
                                    args.other_weight, args.protocol, self.new_tokens, drills)


# ---------------------------------------------------------------- python niah.py

MOST = 10**8  # tokens and examples: more is a slip of the keyboard, which would fill the memory


def between(least, most):
    """The type of a flag that takes a whole number, these two included."""
    def number(text):
        if not re.fullmatch(r"[+-]?\d{1,30}", text, re.ASCII) or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{short(text)} is no whole number from {least} to {most}")
        return int(text)
    return number


def main():
    parser = argparse.ArgumentParser(
        description="Show a needle-in-a-haystack example, or write RULER's jsonl.",
        allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"niah.py: {message}\n")
    flag = parser.add_argument
    names = ", ".join(f"{name} or {task.short}" for name, task in TASKS.items())
    flag("--task", default="niah_multikey_1", type=task_name, help=names)
    flag("--context_len", type=between(1, MOST), default=1024, help="tokens, those to generate included")
    flag("--max_new_tokens", type=between(1, MOST), help="tokens to generate; None: 128, or 48 "
         "where context_len is below 2048 or tokens are bytes")
    flag("--tokenizer", default="bytes", help="bytes, or what else data.get_tokenizer takes")
    flag("--samples", type=between(1, MOST), default=1, help="examples, from index 0")
    flag("--seed", type=between(0, 2**63 - 1), default=0, help="another seed, other examples")
    flag("--split", default="test", choices=SPLITS, metavar="SPLIT", help="train, val or test: they share no example")
    flag("--protocol", default="base", choices=PROTOCOLS, metavar="PROTOCOL", help="base (answer prefix) or sft (none)")
    flag("--words", default="built-in", choices=WORDS, help="of keys; wonderwords: RULER's")
    flag("--haystack", metavar="FILE", help="text of the essay; None: Python's help pages")
    flag("--output", metavar="FILE.jsonl", help="write RULER's jsonl there; None: print the first example")
    args = parser.parse_args()
    try:
        from data import get_tokenizer
        tokenizer = get_tokenizer(args.tokenizer)
        new_tokens = default_new_tokens(args.context_len, tokenizer) if args.max_new_tokens is None else args.max_new_tokens
        haystack = read_haystack(args.haystack) if args.haystack else None
        make = partial(make_example, args.task, args.context_len, tokenizer, args.seed,
                       protocol=args.protocol, haystack=haystack, split=args.split,
                       max_new_tokens=new_tokens, words=args.words)
        examples = [make(index=index) for index in range(args.samples)]
        if args.output:
            write_jsonl(args.output, examples)
    except (ValueError, OSError, ImportError) as error:
        parser.error(error)
    except KeyboardInterrupt:
        parser.exit(130, "niah.py: interrupted; nothing was written\n")
    e = examples[0]
    if not args.output:
        print(e.prompt)
        print("-" * 80)
        print(f"answers   {e.answers}, to be written as {e.target!r} and the end token")
        for answer, span, depth in zip(e.answers, e.spans, e.depth):
            print(f"needle    {answer} at tokens {span[0]} to {span[1]}, depth {depth} %")
    print(f"tokens    {len(e.ids)} + {e.max_new_tokens} to generate of {e.context_len} ({tokenizer.name})")
    print(f"from      keys: {e.keys_from}; haystack: {e.haystack_from}")
    print(f"prompts   {prompt_hash(examples)} = hash of {len(examples)} ({args.task}, {args.protocol}, {args.split}, "
          f"seed {args.seed})" + (f", in {args.output}" if args.output else ""))


if __name__ == "__main__":
    told_to_end()
    main()
