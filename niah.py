"""
Needles in a haystack: RULER's eight retrieval tasks, their two scores, and training samples.

A needle is the sentence "One of the special magic numbers for KEY is: VALUE.". It lies somewhere
in a long text, the haystack, and the prompt ends with a question for the value of that key:

    prompt   =  introduction, haystack with needles, question
    example  =  f(split, seed, task, index)      any order, any number of workers, the same text
    prompt tokens + max_new_tokens <= context_len, with as much haystack as fits

Wording, depths and the way needles enter the text are RULER's (arXiv 2404.06654, NVIDIA/RULER
scripts/data/synthetic). Where we differ on purpose, the line says so.

tests/test_niah.py holds prompts equal to hashes of RULER's own, tests/test_spans.py checks where
answers stand (infra/spans.py). Read eval_niah.py next, which asks them, or data.py, which trains
on samples; experiments/tasks.py has RULER's other tasks, and yours.
"""
import argparse
import hashlib
import random
import re
import uuid
from collections import Counter
from dataclasses import dataclass
from itertools import count, islice, repeat
from math import inf
from pathlib import Path
from string import ascii_lowercase
from typing import NamedTuple

import numpy as np

from infra.cli import command, flag_parser, whole
from infra.files import short, told_to_end
from infra.ruler import rows_of, write_jsonl, write_predictions  # noqa: F401 (users' names)
from infra.spans import border, target_ids, token_spans
from infra.spelling import check_type
from infra.tokenizers import get_tokenizer, pieces  # noqa: F401
from infra.words import ADJECTIVES, NOUNS, essay_words, read_haystack, word_lists

# ---------------------------------------------------------------- the eight tasks


class Task(NamedTuple):
    short: str          # column of the paper's tables
    haystack: str       # noise (five sentences, repeated), essay (prose) or needle (distractors)
    keys: str           # words (adjective-noun; wonderwords: RULER's) or uuids
    values: str         # numbers (7 digits) or uuids
    n_keys: int = 1
    n_values: int = 1   # needles per key
    n_queries: int = 1  # keys asked for
    # and what any task has (tasks.Other)
    max_new_tokens = max_new_bytes = 128
    asks, one_place, one_suffices = "What (?:is|are all) the special magic", True, False

    def draw(self, rng, *, essay, start=None, words="built-in", **_):
        task = self._replace(keys=words) if (self.keys, words) == ("words", WORDS[1]) else self
        return draw_draft(task, rng, essay, start)

    def target(self, answers, protocol):
        return answer_text(answers, protocol)

    def sources(self, words, essay_from):
        keys = self.keys if self.keys == "uuids" else word_lists(words)[2]
        return keys, essay_from if self.haystack == "essay" else self.haystack


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
OTHERS = {}  # the same of other tasks: experiments/tasks.py fills it, and yours may be added
# Under "base", RULER's protocol, a prompt ends with the opening of the answer ("... is") and the
# model goes on with " 123, 456". Under "sft", that of the official RAT+, it ends with the question
# and the answer is "123,456". Both scores read both forms.
PROTOCOLS = {"base": (" ", ", "), "sft": ("", ",")}  # what opens an answer, what joins several
WORDS = "built-in", "wonderwords"  # lists of words for keys, of which RULER's is the second
# The split is part of every seed, so that no two of them share an example.
SPLITS = "train", "val", "test"


class UnknownTask(argparse.ArgumentTypeError, ValueError):
    """Both, because argparse shows the message of the first and our scripts catch the second."""


def task_name(text):
    """The name of a task, from that or from its column in the tables: mk-2 is niah_multikey_2."""
    for name, task in (TASKS | OTHERS).items():
        if text.lower() in (name.lower(), task.short.lower()):
            return name
    known = ", ".join(f"{name} ({task.short})" for name, task in (TASKS | OTHERS).items())
    more = "" if OTHERS else " (others: python -m experiments.tasks)"
    raise UnknownTask(f"unknown task {short(text)}: one of {known}{more}")


def generated():
    """Names of all tasks whose prompts can be made here. Others are read from RULER's files."""
    return [*TASKS, *(name for name, task in OTHERS.items() if task.generated)]


# ---------------------------------------------------------------- what a needle prompt is

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
INTRO = ("{some} special magic {kind} {are} hidden within the following text. Make sure to "
         "memorize it. I will quiz you about the {kind} afterwards.\n")
QUESTION = "\nWhat {are_all} the special magic {kind} for {query} mentioned in the provided text?"
PREFIX = " The special magic {kind} for {query} mentioned in the provided text {are}"

# In percent of the haystack: RULER's 40 even steps.
DEPTHS = [round(100 * i / 39) for i in range(40)]
# RULER's essays are Paul Graham's, which nltk cuts into sentences. Ours are any text, cut after
# these. The default is the prose of Python's own help pages, which needs no download.
SENTENCE_ENDS = tuple(stop + close for stop in ".!?" for close in ("", '"', "'", ")", "”", "’"))


def wording(values, n_answers):
    """RULER asks for one answer in the singular and for several in the plural."""
    if n_answers == 1:
        return dict(some="A", are="is", are_all="is", kind=values[:-1])
    return dict(some="Some", are="are", are_all="are all", kind=values)


def question(task, queries):
    """-> the question about these keys, and the opening of its answer."""
    query = queries[0]
    if len(queries) > 1:
        query = ", ".join(queries[:-1]) + ", and " + queries[-1]
    words = wording(task.values, len(queries) * task.n_values)
    return QUESTION.format(query=query, **words), PREFIX.format(query=query, **words)


def intro(task):
    return INTRO.format(**wording(task.values, task.n_queries * task.n_values))


def needle(task, key, value):
    # RULER writes needles in the plural, whatever the question asks.
    return NEEDLE.format(kind=task.values, key=key, value=value)


def build_context(
    task,
    units,    # the haystack: words of an essay, else lines
    needles,  # texts, in order of appearance
    depths,   # percent, ascending, one per needle
):            # -> the haystack with its needles
    """A needle goes in front of sentence (of an essay) or line int(n * depth / 100) of n."""
    def positions(n):
        return [int(n * (depth / 100)) for depth in depths]

    if task.haystack != "essay":
        return "\n".join(insert(units, needles, positions(len(units))))

    # stops are the words (their number) at which a sentence begins, and the essay's end. At cuts
    # the needles go in.
    ends = (i for i, word in enumerate(units[:-1], 1) if word.endswith(SENTENCE_ENDS))
    stops = [0, *ends, len(units)]
    cuts = [0, *(stops[s] for s in positions(len(stops) - 1)), len(units)]
    parts = [" ".join(units[a:b]) for a, b in zip(cuts, cuts[1:])]
    # An empty part (depth 0 or 100, two needles side by side) leaves its space, as RULER's does.
    return parts[0] + "".join(f" {text} {part}" for text, part in zip(needles, parts[1:]))


def insert(lines, texts, positions):
    """The lines, with each text in front of the line that had this position; they ascend."""
    lines = list(lines)
    # Backwards, so that an inserted line does not shift the places of those still to come.
    for position, text in reversed(list(zip(positions, texts))):
        lines.insert(position, text)
    return lines


def answer_text(answers, protocol):
    """What the model is to write after the prompt, before the end token."""
    opening, comma = PROTOCOLS[protocol]
    return opening + comma.join(answers)


# ---------------------------------------------------------------- what chance decides

def draw_text(kind, rng):
    """A key or a value. kind: numbers, uuids, or where the words of a key are from."""
    if kind == "numbers":
        return str(rng.randint(10**6, 10**7 - 1))
    if kind == "uuids":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    if kind == "training words":
        return f"{draw_any_word(ADJECTIVES, rng)}-{draw_any_word(NOUNS, rng)}"
    # Some of RULER's words hold a space or a hyphen themselves. They stay as they are.
    adjectives, nouns, _ = word_lists("built-in" if kind == "words" else kind)
    return f"{rng.choice(adjectives)}-{rng.choice(nouns)}"


def draw_any_word(listed, rng):
    # Half the words are mere letters: who learns the list by heart finds no other words.
    if rng.random() < 0.5:
        return rng.choice(listed)
    return "".join(rng.choices(ascii_lowercase, k=rng.randint(2, 9)))


def draw_distinct(kind, n, rng, used):
    """n texts that are not in the set `used`, which grows by them."""
    # RULER may draw one twice. Then a question would have two right answers, or an answer two
    # places, of which we could ask for one only.
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
    # RULER shuffles the needles of every example of a file alike. Ours are drawn alike, so their
    # order is random as it is, and each example has its own.
    pairs = list(zip(keys * task.n_values, values))
    # In RULER an essay has 40 places, one per depth, and between lines any place will do.
    if task.haystack == "essay":
        depths = rng.sample(DEPTHS, len(pairs))
    else:
        depths = [100 * rng.random() for _ in pairs]
    return pairs, sorted(depths), rng.sample(keys, task.n_queries)


class Haystack:
    """haystack(n): the first n units."""

    def __init__(self, task, rng, avoid, words, start):
        # Each unit is drawn once, in order, so that the search for the size can go up and down.
        self.units, self.stream = [], self.draw(task, rng, avoid, words, start)

    def draw(self, task, rng, avoid, words, start):
        if task.haystack == "noise":
            yield from repeat(NOISE)
        # A text that is too short is repeated, as in RULER.
        if task.haystack == "essay":
            yield from (words[i % len(words)] for i in count(start))
        while True:
            # Distractors may share keys with each other, but not with a needle (the set avoid).
            key, = draw_distinct(task.keys, 1, rng, set(avoid))
            yield needle(task, key, draw_text(task.values, rng))

    def __call__(self, n):
        self.units += islice(self.stream, max(0, n - len(self.units)))
        return self.units[:n]


# ---------------------------------------------------------------- how a prompt is made to fit

LEAST_UNITS = {"noise": 1, "essay": 8, "needle": 1}  # less than this is no haystack


def fill(build, least, limit, most=inf):
    """
    build(n) for the largest n from least to most whose last item, the tokens, has at most `limit`.
    None if not even the least fits.
    """
    # RULER searches the size once per file, and its examples fall up to 500 words short. We fill
    # each. Tokens grow nearly in proportion to n, so each guess follows the slope of the one
    # before, until n fits and n + 1 does not. That takes about five builds.
    n, best = least, build(least)
    if len(best[-1]) > limit:
        return None
    probe, too_many = min(least + 8, most), most + 1
    while too_many - n > 1:
        built = build(probe)
        # In tokens per unit. A slope of 0 would send the next guess far away.
        slope = max(0.1, (len(built[-1]) - len(best[-1])) / (probe - n))
        if len(built[-1]) <= limit:
            n, best = probe, built
        else:
            too_many = probe
        probe = n + max(1, int((limit - len(best[-1])) / slope))
        probe = min(probe, too_many - 1)
    return best


class Question(NamedTuple):
    text: str           # what follows the context
    prefix: str         # the opening of the answer, which ends the prompt under "base"
    answers: list
    places: list = ()   # (the context's text that states it, depth in percent) of each answer, or
                        # none where answers stand in many places


class Draft(NamedTuple):
    """A prompt of which all but its size is decided."""
    context: object        # n units -> introduction and haystack, up to the last line break
    question: Question
    others: object = None  # n units -> more Questions that this context answers
    least: int = 1         # units; less is no haystack
    most: int = inf        # units; more are not there


def draw_draft(task, rng, words, start=None):
    """start: the essay's first word. None draws one."""
    pairs, depths, queries = draw_needles(task, rng)
    if start is None:
        start = rng.randrange(len(words))
    haystack = Haystack(task, rng, {key for key, _ in pairs}, words, start)
    texts = [needle(task, *pair) for pair in pairs]
    facts = [(*pair, depth) for pair, depth in zip(pairs, depths)]

    def context(n):
        return intro(task) + build_context(task, haystack(n), texts, depths) + "\n"

    def about(queries, facts):
        asked, prefix = question(task, queries)
        # Unlike RULER we list answers in the order in which a reader meets them.
        found = [(value, (needle(task, key, value), depth)) for query in queries
                 for key, value, depth in facts if key == query]
        return Question(asked.removeprefix("\n"), prefix, *map(list, zip(*found)))

    def others(n):
        lines = haystack(n) if task.haystack == "needle" else []
        pattern = re.compile(needle(task, "(.*)", "(.*)"))
        there = facts + [(*pattern.fullmatch(line).groups(), 100 * i / n)
                         for i, line in enumerate(lines)]
        times = Counter(key for key, *_ in there)
        return [about([fact[0]], [fact]) for fact in there
                if times[fact[0]] == 1 and fact[0] not in queries]

    several = task.n_values == task.n_queries == 1 < task.n_keys + (task.haystack == "needle")
    return Draft(context, about(queries, facts), others if several else None,
                 LEAST_UNITS[task.haystack])


def written(context, question, protocol, tokenizer):
    """-> prompt, answer prefix, tokens"""
    prefix = question.prefix if protocol == "base" else ""
    prompt = context + question.text + prefix
    return prompt, prefix, tokenizer.encode(prompt)


def compose(task, context_len, tokenizer, rng, protocol, essay, max_new_tokens, start=None,
            words="built-in", spare=0):
    """-> draft, units, prompt, answer prefix, tokens, target tokens; filled to the limit."""
    needed = []
    # Where the room is tight we draw again, for keys of another length may fit.
    for _ in range(50):
        draft = task.draw(rng, essay=essay, start=start, words=words, tokenizer=tokenizer,
                          context_len=context_len, max_new_tokens=max_new_tokens)

        def build(n):
            return n, *written(draft.context(n), draft.question, protocol, tokenizer)

        # Other questions about the same context may have longer keys.
        room = context_len - max_new_tokens - (spare if draft.others else 0)
        filled = fill(build, draft.least, room, draft.most)
        if filled and filled[0] >= draft.most:
            raise ValueError(f"{task.short}: {context_len=} has room for more than the "
                             f"{draft.most:,} different words there are: lower it, give a haystack "
                             "with more, or take words='wonderwords'")
        if filled:
            answer = task.target(draft.question.answers, protocol)
            target = target_ids(filled[1], answer, tokenizer)
            # RULER's numbers for other tasks hold an answer, and not always its end token.
            end = isinstance(task, Task)
            if len(target) + end > max_new_tokens:
                raise ValueError(f"{task.short}: {max_new_tokens=} leaves no room for an answer of "
                                 f"{len(target)} tokens and the end token: raise it")
            return draft, *filled, target
        needed.append(len(build(draft.least)[-1]) + context_len - room)
    # The original retries for ever.
    raise ValueError(f"{task.short} needs about {sorted(needed)[25]} tokens, {max_new_tokens=} "
                     f"included, but {context_len=}: raise that, lower max_new_tokens, or leave "
                     "the task out")


@dataclass(frozen=True)
class Example:
    task: str
    index: int
    prompt: str
    answer_prefix: str   # the end of the prompt that opens the answer; "" under sft
    ids: list            # tokens of the prompt
    answers: list        # texts, in the order of the queries, then of appearance
    target: str          # what a perfect model writes next, before the end token
    spans: list          # [start, end) tokens of each answer's value in the prompt, and ...
    depth: list          # percent, of its needle; both [] where answers stand in many places
    context_len: int     # tokens, those to generate included
    max_new_tokens: int
    keys_from: str       # where keys and haystack come from: only results whose prompts have the
    haystack_from: str   # same sources can be compared
    question_at: int     # ids[:question_at] is the context, the rest the question; None: a file's,
                         # in which no question of the task's wording is found
    question: int = 0    # its number in make_document


def make_example(
    task, context_len, tokenizer,
    seed, index,            # chance depends on split, seed, task and index alone
    protocol="base",        # or "sft"
    haystack=None,          # text of the essay; None: Python's help pages
    *, split="test",        # or "val"; "train", whose essays start anywhere
    max_new_tokens=None,    # room for the answer and the end token; None: RULER's number
    words="built-in",       # or "wonderwords"
):                          # -> Example
    return make_document(task, context_len, tokenizer, seed, index, 1, protocol, haystack,
                         split=split, max_new_tokens=max_new_tokens, words=words)[0]


def make_document(task, context_len, tokenizer, seed, index, n_questions, protocol="base",
                  haystack=None, *, split="test", max_new_tokens=None, words="built-in"):
    """
    Up to n_questions Examples that share one context, ids[:question_at]. The first asks what
    make_example asks; MK-1 to MK-3, and json_kv of experiments/tasks.py, have more keys to ask for.
    """
    name = task_name(task)
    check_type(context_len, int, "context_len is a number of tokens")
    if not hasattr(tokenizer, "eos_id"):  # a str can encode, too
        raise TypeError(f"no tokenizer: {short(tokenizer)}; data.get_tokenizer('bytes') makes one")
    for what, value, known in (("protocol", protocol, PROTOCOLS), ("split", split, SPLITS),
                               ("words", words, WORDS)):
        if value not in known:
            raise ValueError(f"unknown {what} {value!r}: one of {', '.join(known)}")

    task, (essay, essay_from) = (TASKS | OTHERS)[name], essay_words(haystack)
    new_tokens = max_new_tokens or own_new_tokens(task, tokenizer)
    rng = random.Random(f"{split}/{seed}/{name}/{index}")
    # RULER's essays begin with the text's first word. In training that would be one page of it.
    start = None if split == "train" else 0
    draft, n, *_ = compose(task, context_len, tokenizer, rng, protocol, essay, new_tokens, start,
                           words, spare=32 if n_questions > 1 else 0)  # tokens, for longer keys
    context, others = draft.context(n), []
    if n_questions > 1 and draft.others:
        others = draft.others(n)
        random.Random(f"{split}/{seed}/{name}/{index}/questions").shuffle(others)

    examples = []
    for asked in [draft.question, *others]:
        prompt, prefix, ids = written(context, asked, protocol, tokenizer)
        if len(ids) + new_tokens > context_len:
            continue
        places = []  # in characters
        for answer, (text, _) in zip(asked.answers, asked.places):
            place = context.index(text) + text.rindex(answer)
            places.append((place, place + len(answer)))
        depths = [round(depth) for _, depth in asked.places]
        examples.append(Example(
            name, index, prompt, prefix, ids, asked.answers, task.target(asked.answers, protocol),
            token_spans(prompt, ids, places, tokenizer), depths, context_len, new_tokens,
            *task.sources(words, essay_from), border(prompt, ids, len(context), tokenizer),
            question=len(examples)))
        first, e = examples[0], examples[-1]
        assert e.ids[:e.question_at] == first.ids[:first.question_at], f"{tokenizer.name}: {asked}"
        if len(examples) == n_questions:
            break
    return examples


def own_new_tokens(task, tokenizer):
    """Tokens that this task, of TASKS or OTHERS, has for an answer: RULER's number."""
    return task.max_new_bytes if tokenizer.name == "bytes" else task.max_new_tokens


def default_new_tokens(context_len, tokenizer, task=None):
    """RULER's 128, or 48 where the context is short or tokens are bytes; or the task's own."""
    if task in OTHERS:
        return own_new_tokens(OTHERS[task], tokenizer)
    # The longest answers take 38 bytes (a uuid) and 36 (four numbers).
    return 48 if context_len < 2048 or tokenizer.name == "bytes" else 128


def fitting_tasks(context_len, tokenizer, protocol="base", max_new_tokens=128, words="built-in"):
    """Names of the tasks that have room here for the least haystack and for every answer."""
    # Drafts differ in size by their keys. If nine of 16 fit, compose will find one that does.
    essay = essay_words()[0]

    def fits(name):
        task = TASKS[name]
        drafts = [task.draw(random.Random(i), essay=essay, words=words) for i in range(16)]
        sizes = sorted(len(written(d.context(d.least), d.question, protocol, tokenizer)[-1])
                       for d in drafts)
        longest = max(len(tokenizer.encode(task.target(d.question.answers, protocol)))
                      for d in drafts)
        return sizes[8] + max_new_tokens <= context_len and longest < max_new_tokens
    return [name for name in TASKS if fits(name)]


def prompt_hash(examples):
    """Twelve hex digits, which two runs share if and only if they asked the same in one order."""
    return hashlib.sha256("\0".join(e.prompt for e in examples).encode()).hexdigest()[:12]


# ---------------------------------------------------------------- scores, 0 to 1 per example

def score_ruler(prediction, answers, task=None):
    """RULER's string_match_all: the share of answers in the prediction, in any case of letters."""
    if task in OTHERS and OTHERS[task].one_suffices:  # its string_match_part
        return max(score_ruler(prediction, [answer]) for answer in answers)
    return sum(answer.lower() in prediction.lower() for answer in answers) / len(answers)


def score_paper(prediction, answers):
    """Official RAT+: the prediction's comma-separated parts against the answers, as exact sets."""
    written = {part.strip() for part in prediction.split(",")}
    return len(written & {answer.strip() for answer in answers}) / len(answers)


# ---------------------------------------------------------------- training samples

def many_questions(task, room, tokenizer, rng, words, protocol):
    """
    A context full of needles, then question, answer and end token, again and again, each about
    other keys, until the room (tokens) is full. -> [(ids, is an answer)]
    """
    # The wording is RULER's throughout. Half the samples are brief: they have no introduction and,
    # under "base", only the opening of each answer, so that twice as many questions fit. Where two
    # questions of the task's own kind do not fit even so, each has one key with one value. 256
    # bytes hold two such needles and an answer.
    one = dict(n_keys=1, n_values=1, n_queries=1)
    smallest = task._replace(keys="words", values="numbers", **one)
    for task, brief in ((task, rng.random() < 0.5), (task, True), (task._replace(**one), True),
                        (smallest, True)):
        used, opening = set(), "" if brief else intro(task)
        keys, pairs = draw_group(task, rng, used)
        cost = sum(map(len, ask(task, keys, pairs, brief, protocol, tokenizer)))
        cost += sum(len(tokenizer.encode(needle(task, *pair) + "\n")) for pair in pairs)
        n_groups = int((room - len(tokenizer.encode(opening))) / cost)
        if n_groups >= 2:
            break

    # Between all and half of those that fit. The rest of the room is haystack.
    n_groups = max(2, int(n_groups * rng.uniform(0.5, 1)))
    groups = [draw_group(task, rng, used) for _ in range(n_groups)]
    # Needles are shuffled, so that questions do not follow their order.
    pairs = [pair for _, pairs in groups for pair in pairs]
    rng.shuffle(pairs)
    depths = sorted(100 * rng.random() for _ in pairs)
    texts = [needle(task, *pair) for pair in pairs]
    haystack = Haystack(task, rng, used, words, rng.randrange(len(words)))

    def build(n):
        return [tokenizer.encode(opening + build_context(task, haystack(n), texts, depths))]

    questions = []
    for keys, _ in groups:
        asked, answer = ask(task, keys, pairs, brief, protocol, tokenizer)
        questions += [(asked, False), (answer, True)]
    room -= sum(len(ids) for ids, _ in questions)
    context, = fill(build, 0, room) or build(0)
    return [(context, False), *questions]


def draw_group(task, rng, used):
    """-> the keys of one question, and the (key, value) pairs of their needles."""
    keys = draw_distinct(task.keys, task.n_queries, rng, used)
    return keys, [(key, value) for key in keys
                  for value in draw_distinct(task.values, task.n_values, rng, used)]


def ask(task, keys, pairs, brief, protocol, tokenizer):
    """-> tokens of the question about these keys, and of its answer with the end token."""
    asked, prefix = question(task, keys)
    if protocol == "base":
        asked = "\n" + prefix if brief else asked + prefix
    target = answer_text([value for key in keys for k, value in pairs if k == key], protocol)
    return tokenizer.encode(asked), target_ids(asked, target, tokenizer) + [tokenizer.eos_id]


def drill(room, tokenizer, rng, words):
    """
    A few facts, stated once and then asked again and again until the room (tokens) is full.
    -> [(ids, is an answer)]
    """
    # Nearly every line trains retrieval, so a small model learns it within a thousand steps, and
    # uses it in the tasks later on. What varies is what it shall not depend on: how many keys, how
    # long values are, how much essay (in characters) lies between lines, which words ask.
    keys = draw_distinct("training words", rng.randint(1, 4), rng, set())
    n_digits = rng.choice((1, 1, 2, 7))
    gap = rng.choice((0, 0, 20, 60, 120))
    values = ["".join(rng.choices("0123456789", k=n_digits)) for _ in keys]
    needles = "{key} is: ", NEEDLE.removesuffix("{value}.")
    questions = "{key} is: ", "{key} mentioned in the provided text is ", PREFIX + " "

    parts, stated, size = [], set(), 0
    while size < room:
        i = rng.randrange(len(keys))
        template = rng.choice(questions if i in stated else needles)
        kind = "number" if template is questions[-1] else "numbers"
        opening = template.format(key=keys[i], query=keys[i], kind=kind, are="is")
        start, end = rng.randrange(len(words)), rng.randint(1, gap) if gap else 0
        essay = " ".join(words[start:start + 60])[:end] + "\n" if gap else ""
        # Where a fact is first stated nobody could know it, so only later mentions are answers.
        line = [(tokenizer.encode(opening), False),
                (tokenizer.encode(values[i]), i in stated),
                (tokenizer.encode(".\n" + essay), False)]
        stated.add(i)
        parts += line
        size += sum(len(ids) for ids, _ in line)
    return parts


def training_sample(
    context_len, tokenizer,
    seed, index,              # chance depends on these two alone
    tasks=tuple(TASKS),       # those that fit: fitting_tasks
    many=0.5,                 # share of many_questions among the samples that are no drills
    haystack=None,            # text of the essays; None: Python's help pages
    other_weight=0.1,         # loss weight of what is no answer; official RAT+: 0
    protocol="base",
    max_new_tokens=128,
    drills=0.0,               # share of drills
):                            # -> tokens int64, weights float32, both (context_len + 1,)
    """
    weights[t] is the loss weight of predicting tokens[t]: 1 on answers and the end token after
    each, other_weight on the rest, 0 on tokens[0] and on padding.
    """
    rng = random.Random(f"train/{seed}/{index}")
    task, words = TASKS[rng.choice(tasks)], essay_words(haystack)[0]
    # Keys are of built-in words and of mere letters, so that training needs no package and the
    # model knows any words.
    if task.keys == "words":
        task = task._replace(keys="training words")
    # With one answer per sample, as make_example's prompts have, retrieval takes far longer to
    # form. many_questions hold an answer every few dozen tokens, and drills are denser still.
    if rng.random() < drills:
        parts = drill(context_len + 1, tokenizer, rng, words)
    elif rng.random() < many:
        parts = many_questions(task, context_len + 1, tokenizer, rng, words, protocol)
    else:
        *_, ids, target = compose(
            task, context_len, tokenizer, rng, protocol, words, max_new_tokens)
        parts = [(ids, False), (target + [tokenizer.eos_id], True)]

    # What is left after the last part is padding: end tokens of weight 0.
    tokens = np.full(context_len + 1, tokenizer.eos_id, np.int64)
    weights = np.zeros(context_len + 1, np.float32)
    start = 0
    for ids, is_answer in parts:
        ids = ids[:len(tokens) - start]
        tokens[start:start + len(ids)] = ids
        weights[start:start + len(ids)] = 1 if is_answer else other_weight
        start += len(ids)
    weights[0] = 0  # nothing comes before it, so nothing predicts it
    return tokens, weights


class Needles:
    """The data set of training samples: needles[index] -> tokens, weights."""

    def __init__(self, args, tokenizer, seed, only_drills=0):
        self.args, self.tokenizer, self.seed = args, tokenizer, seed
        # The first samples are drills alone, which form retrieval. Of those after them 30 % are,
        # lest it fade.
        self.only_drills, self.later_drills = only_drills, 0.3 if only_drills else 0.0
        self.haystack = read_haystack(args.haystack) if args.haystack else None
        self.new_tokens = default_new_tokens(args.context_len, tokenizer)
        fitting = fitting_tasks(args.context_len, tokenizer, args.protocol, self.new_tokens)
        self.tasks = args.tasks or fitting
        if not self.tasks or set(self.tasks) - set(fitting):
            room = ", ".join(fitting) or "none (512 bytes hold the simplest)"
            raise ValueError(f"--context_len {args.context_len} is too short for these tasks; it "
                             f"has room for {room}")

    def __getitem__(self, index):
        args, drills = self.args, 1.0 if index < self.only_drills else self.later_drills
        return training_sample(
            args.context_len, self.tokenizer, self.seed, index, self.tasks, args.many,
            self.haystack, args.other_weight, args.protocol, self.new_tokens, drills)


# ---------------------------------------------------------------- RULER's files

def task_of(path):
    """The task of a data file: RULER writes TASK/validation.jsonl, and others TASK.jsonl."""
    path, known = Path(path), TASKS | OTHERS
    return next((name for name in (path.stem, path.parent.name) if name in known), path.stem)


def read_jsonl(path, tokenizer, protocol="base", task=None, max_new_tokens=None):
    """A data file of RULER's -> Examples. task: None takes the folder's or the file's name."""
    path, task = Path(path), task or task_of(path)
    kind = (TASKS | OTHERS).get(task, TASKS["niah_single_1"])
    new_tokens, examples = max_new_tokens or own_new_tokens(kind, tokenizer), []
    for where, row in rows_of(path):
        prefix = row["answer_prefix"] if protocol == "base" else ""
        prompt, answers = row["input"] + prefix, row["outputs"]
        places = [place_of(answer, prompt, where) for answer in answers if kind.one_place]
        *_, asked = [None, *re.finditer(kind.asks, row["input"])]  # the last one
        ids = tokenizer.encode(prompt)
        try:
            spans = token_spans(prompt, ids, places, tokenizer)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        # The file tells no depths, so we count characters of the prompt. Its index is such an
        # offset too, which two lines may share.
        depths = [round(100 * start / len(prompt)) for start, _ in places]
        examples.append(Example(
            task, row["index"], prompt, prefix, ids, answers, kind.target(answers, protocol),
            spans, depths, len(ids) + new_tokens, new_tokens, str(path), str(path),
            border(prompt, ids, asked.start(), tokenizer) if asked else None))
    return examples


def place_of(answer, prompt, where):
    """[start, end) characters of an answer: in its needle, or else where it first occurs."""
    text = re.escape(answer)
    found = re.search(rf"(?<= is: ){text}\.", prompt) or re.search(text, prompt)
    if not found:
        raise ValueError(f"{where}: answer {short(answer)} is not in the input; is this a needle "
                         "task?")
    return found.start(), found.start() + len(answer)


# ---------------------------------------------------------------- python niah.py

# Tokens and examples. More is a slip of the keyboard, which would fill the memory.
MOST = 10**8


def flags():
    parser = flag_parser("niah.py", "Show a needle-in-a-haystack example, or write RULER's jsonl.")
    add = parser.add_argument
    names = ", ".join(f"{name} or {(TASKS | OTHERS)[name].short}" for name in generated())
    add("--task", default="niah_multikey_1", type=task_name, help=names)
    add("--context_len", type=whole(1, MOST), default=1024, help="tokens, with those to generate")
    add("--max_new_tokens", type=whole(1, MOST), help="tokens to generate; default: 128, or 48 "
        "where context_len is below 2048 or tokens are bytes, or the task's own")
    add("--tokenizer", default="bytes", help="bytes, or what else data.get_tokenizer takes")
    add("--samples", type=whole(1, MOST), default=1, help="examples, from index 0")
    add("--seed", type=whole(0, 2**63 - 1), default=0, help="another seed, other examples")
    add("--split", default="test", choices=SPLITS, help="they share no example")
    add("--protocol", default="base", choices=PROTOCOLS, help="base: with answer prefix; sft: none")
    add("--words", default="built-in", choices=WORDS, help="of keys; wonderwords: RULER's")
    add("--haystack", metavar="FILE", help="text of the essay; default: Python's help pages")
    add("--output", metavar="FILE.jsonl", help="write RULER's jsonl; default: print one example")
    return parser


def run(args):
    tokenizer = get_tokenizer(args.tokenizer)
    new_tokens = args.max_new_tokens or default_new_tokens(
        args.context_len, tokenizer, args.task)
    haystack = read_haystack(args.haystack) if args.haystack else None
    examples = [make_example(args.task, args.context_len, tokenizer, args.seed, index,
                             args.protocol, haystack, split=args.split,
                             max_new_tokens=new_tokens, words=args.words)
                for index in range(args.samples)]
    e = examples[0]
    if args.output:
        write_jsonl(args.output, examples)
    else:
        print(e.prompt)
        print("-" * 80)
        print(f"answers   {e.answers}, to be written as {e.target!r} and the end token")
        for answer, (start, end), depth in zip(e.answers, e.spans, e.depth):
            print(f"needle    {answer} at tokens {start} to {end}, depth {depth} %")
        print(f"question  from token {e.question_at} on")
    size = f"{len(e.ids)} + {new_tokens} to generate of {e.context_len}"
    print(f"tokens    {size} ({tokenizer.name})")
    print(f"from      keys: {e.keys_from}; haystack: {e.haystack_from}")
    asked = f"{args.task}, {args.protocol}, {args.split}, seed {args.seed}"
    there = f", in {args.output}" if args.output else ""
    print(f"prompts   {prompt_hash(examples)} = hash of {len(examples)} ({asked}){there}")


def main(argv=None):
    args = flags().parse_args(argv)
    command("niah.py", lambda: run(args), interrupted="interrupted; nothing was written")


if __name__ == "__main__":
    told_to_end()
    main()
