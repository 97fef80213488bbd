"""
RULER's other tasks, HELMET's JSON keys, and yours: what a needle is not.

    vt       VT     a chain of assignments in noise: which variables have the value 12345?
    cwe      CWE    a numbered list of words: which ten come most often?
    fwe      FWE    coded text, whose words follow a zeta law: which three come most often?
    json_kv  KV     a JSON object of uuids: which value belongs to this key?
    qa_1, qa_2      SQuAD and HotpotQA among other documents: read from RULER's files alone

Each is a class whose draw decides by chance all but the size, and says how a prompt of n units
is written. niah.py fills it to the limit, as it does its needles:

    OTHERS[name].draw(rng, ...)  ->  Draft: n -> introduction and text; a Question; others to ask

vt, cwe and fwe have RULER's wording (arXiv 2404.06654, NVIDIA/RULER scripts/data/synthetic),
json_kv has HELMET's (arXiv 2410.02694, princeton-nlp/HELMET data.py). RULER shuffles all prompts
of a file alike, and its search ends short of the limit or never; ours are each their own, and
full. tests/test_tasks.py holds prompts equal to hashes of RULER's own. Read niah.py first.
"""
import math
import random
from string import ascii_lowercase, ascii_uppercase

import niah
from infra.files import told_to_end
from infra.words import distinct_words
from niah import NOISE, Draft, Question, draw_distinct, fill, insert


class Other:
    """
    What any task of niah.OTHERS has. Yours derives from this, with a short and a draw of its own:
    niah.OTHERS["mine"] = Mine().
    """
    short = ""                   # column of the tables
    max_new_tokens = 128         # to generate
    max_new_bytes = 128          # the same for a tokenizer of bytes
    one_suffices = False         # RULER's string_match_part: one of the answers, else all of them
    comma = ", "                 # between answers
    origin = "drawn", "drawn"    # where keys and text are from: results of the same compare
    generated = True             # whether draw makes prompts, else they are read from files
    asks = "Question:"           # how a question begins in a file, a regular expression
    one_place = False            # whether an answer stands in one place of a file's prompt

    def draw(self, rng, *, essay, start, words, tokenizer, context_len, max_new_tokens):
        """
        -> Draft. Take what you need of these by name, and the rest as **_. essay: a list of words;
        start: the first of them, None draws it; words: one of niah.WORDS.
        """
        raise NotImplementedError

    def target(self, answers, protocol):
        """What a perfect model writes next."""
        return " " + self.comma.join(answers) if protocol == "base" else ",".join(answers)

    def answered(self, context, question):
        """A prompt with its answer, which stands in front of another as an example."""
        answer = self.target(question.answers, "base")
        return context + question.text + question.prefix + answer + "\n"

    def sources(self, words, essay_from):
        return self.origin


def draw_words(letters, length, n, rng, used):
    """n distinct words of so many letters that are not in the set `used`, which grows by them."""
    words = []
    while len(words) < n:
        word = "".join(rng.choices(letters, k=length))
        if word not in used:
            used.add(word)
            words.append(word)
    return words


# ---------------------------------------------------------------- vt: variable tracking

class VariableTracking(Other):
    # RULER generates 30 tokens whatever the tokenizer. They hold five names of five letters and
    # their blanks even letter by letter (SmolLM2's takes 14 to 21), so no right answer is cut off;
    # where a letter is a token its end is, which RULER's score does not ask for.
    short, max_new_tokens, max_new_bytes = "VT", 30, 32
    intro = ("Memorize and track the chain(s) of variable assignment hidden in the following "
             "text.\n\n")
    asked = "Question: Find all variables that are assigned the value {value} in the text above."
    prefix = (" Answer: According to the chain(s) of variable assignment in the text above, {n} "
              "variables are assigned the value {value}, they are: ")
    comma, origin = " ", ("letters", "noise")
    hops, shot_tokens = 4, 500

    def draw(self, rng, *, tokenizer, **_):
        # RULER may draw a name, or the value, for both chains, and then calls two things alike.
        used, values = {"VAR"}, rng.sample(range(10000, 100000), 2)
        theirs, ours = (draw_words(ascii_uppercase, length, self.hops + 1, rng, used)
                        for length in (3, 5))
        shot_asked, asked = map(self.question, (theirs, ours), values)
        dice = rng.getrandbits(64), rng.getrandbits(64)

        def positions(n, dice):
            return sorted(random.Random(dice).sample(range(n), self.hops + 1))

        def shot(n):
            text = self.context(theirs, values[0], positions(n, dice[0]), n)
            return text, niah.written(text, shot_asked, "base", tokenizer)[-1]

        # An example stands in front. Where 500 tokens do not hold the least one (bytes), RULER's
        # loop has no end, and ours takes the least.
        least = self.hops + 1
        front, _ = fill(shot, least, self.shot_tokens) or shot(least)
        front = self.answered(front, shot_asked) + "\n"

        def context(n):
            return front + self.context(ours, values[1], positions(n, dice[1]), n)

        return Draft(context, asked, least=least)

    def context(self, variables, value, positions, n):
        """positions: of n sentences of noise those that an assignment precedes, ascending."""
        chain = [f"VAR {variables[0]} = {value}"]
        # The blank at the end is RULER's, and so are two more: in front of an answer, and between
        # it and what opens it.
        chain += [f"VAR {new} = VAR {old} " for old, new in zip(variables, variables[1:])]
        return self.intro + "\n".join(insert([NOISE] * n, chain, positions)) + "\n"

    def question(self, variables, value):
        words = dict(value=value, n=len(variables))
        return Question(self.asked.format(**words), self.prefix.format(**words), variables)


# ---------------------------------------------------------------- cwe: common words

def numbered(words):
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))


class CommonWords(Other):
    short, max_new_tokens, max_new_bytes = "CWE", 120, 224
    intro = ("Below is a numbered list of words. In these words, some appear more often than "
             "others. Memorize the ones that appear most often.\n")
    asked = "Question: What are the 10 most common words in the above list?"
    prefix = " Answer: The top 10 words that appear most often in the list are:"
    common = 10

    def draw(self, rng, *, context_len, essay, words, **_):
        n_shot, *times = self.shape(context_len)
        # RULER may give a word to both lists.
        there = distinct_words(words, essay)
        there = rng.sample(there, len(there))
        shot, rest = there[:n_shot], there[n_shot:]
        dice = rng.getrandbits(64)
        front = self.context(self.repeated(shot, *times[:2], rng))
        front = self.answered(front, self.question(shot))

        def context(n):
            return front + self.context(self.repeated(rest[:n], *times[2:], random.Random(dice)))

        # At least as many others as common ones.
        return Draft(context, self.question(rest), least=2 * self.common, most=len(rest))

    def shape(self, context_len):
        """
        How many words the example in front has, how often its common and its other words come, and
        how often those of the list that is asked about.
        """
        return (20, 3, 1, 6, 1) if context_len < 4096 else (40, 10, 3, 30, 3)

    def repeated(self, words, often, seldom, rng):
        """The list of words, of which the first ten are the common ones."""
        words = words[:self.common] * often + words[self.common:] * seldom
        # RULER shuffles all lists of a length alike. Ours are each their own.
        rng.shuffle(words)
        return words

    def context(self, words):
        return self.intro + numbered(words) + "\n"

    def question(self, words):
        return Question(self.asked, self.prefix, words[:self.common])

    def target(self, answers, protocol):
        return " " + numbered(answers) if protocol == "base" else ",".join(answers)

    def sources(self, words, essay_from):
        return niah.word_lists(words)[2] if words != "built-in" else essay_from, "numbered list"


# ---------------------------------------------------------------- fwe: frequent words

class FrequentWords(Other):
    short, max_new_tokens, max_new_bytes = "FWE", 50, 24
    intro = ("Read the following coded text and track the frequency of each coded word. Find the "
             "three most frequently appeared coded words. ")
    asked = ("Question: Do not provide any explanation. Please ignore the dots '....'. What are "
             "the three most frequently appeared words in the above coded text?")
    prefix = (" Answer: According to the coded text above, the three most frequently appeared "
              "words are:")
    comma, origin = " ", ("letters", "coded text")

    def draw(self, rng, *, context_len, max_new_tokens, **_):
        # The most frequent of all is noise.
        n_words = self.vocabulary(context_len - max_new_tokens)
        words = ["...", *draw_words(ascii_lowercase, 6, n_words - 1, rng, set())]
        dice = rng.getrandbits(64)

        def context(n):
            text = self.repeated(words, n)
            random.Random(dice).shuffle(text)
            return self.context(text)

        # From 34 on the third comes more often than the fourth: 34 / zeta(2) * (1/9 - 1/16) > 1.
        return Draft(context, Question(self.asked, self.prefix, words[1:4]), least=34)

    def vocabulary(self, room):
        return max(4, room // 50)

    def repeated(self, words, n):
        """The k-th word as often as a zeta law of exponent 2 has it among n."""
        return [word for k, word in enumerate(words, 1)
                for _ in range(int(n * k**-2.0 / (math.pi**2 / 6)))]

    def context(self, words):
        return self.intro + " ".join(words) + "\n"


# ---------------------------------------------------------------- json_kv: keys of a JSON object

class JsonKeys(Other):
    # HELMET's wording is in its code; its data are not. Assumed: the object is written as in
    # nelson-liu/lost-in-the-middle (one pair a line, a blank in front of all but the first, double
    # quotes), whose prompt HELMET names as its source, nothing else is in the context, keys are
    # asked for without quotes, and the two demonstrations are about keys of the same object.
    short, max_new_tokens, max_new_bytes = "KV", 100, 40
    asked = ("Extract the value corresponding to the specified key in the JSON object "
             "below.\n\n{demos}Key: {key}")
    prefix = "\nCorresponding value:"
    origin = "uuids", "JSON"
    asks, one_place = "Extract the value corresponding to the specified key in", True

    def draw(self, rng, **_):
        used = set()
        first, *demos = (draw_distinct("uuids", 2, rng, used) for _ in range(3))
        # Names of HELMET's files tell of six depths. Ours is drawn, as a needle's between lines.
        depths, pairs = [rng.random() for _ in range(3)], []
        placed = sorted(zip(depths, [first, *demos]))

        def all_pairs(n):
            while len(pairs) < n:
                pairs.append(draw_distinct("uuids", 2, rng, used))
            return insert(pairs[:n], [pair for _, pair in placed], [int(n * d) for d, _ in placed])

        def question(pair, depth):
            return Question(self.question(pair, demos), self.prefix, [pair[1]],
                            [(line(pair), 100 * depth)])

        def others(n):
            there = all_pairs(n)
            return [question(pair, i / len(there)) for i, pair in enumerate(there)
                    if pair not in (first, *demos)]

        return Draft(lambda n: self.context(all_pairs(n)), question(first, depths[0]), others)

    def question(self, pair, demos):
        shots = "".join(f"Key: {key}{self.prefix} {value}\n\n" for key, value in demos)
        return self.asked.format(demos=shots, key=pair[0])

    def context(self, pairs):
        return "{" + ",\n ".join(map(line, pairs)) + "}\n\n"


def line(pair):
    return '"{}": "{}"'.format(*pair)


# ---------------------------------------------------------------- qa: files alone

class FromFile(Other):
    """RULER's questions about documents, each of which any one of its answers satisfies."""
    max_new_tokens, max_new_bytes, generated, one_suffices = 32, 128, False, True
    # as kvpress cuts RULER's prompts: the instruction, the second time
    asks = r"Answer the question based on the given documents\."

    def __init__(self, short, data):
        self.short, self.data = short, data

    def draw(self, rng, **_):
        raise ValueError(f"{self.short} cannot be made here, for its documents are {self.data}'s: "
                         "make its file with RULER's scripts/data/prepare.py and read that")

    def target(self, answers, protocol):
        return super().target(answers[:1], protocol)


niah.OTHERS |= {"vt": VariableTracking(), "cwe": CommonWords(), "fwe": FrequentWords(),
                "json_kv": JsonKeys(), "qa_1": FromFile("QA-1", "SQuAD"),
                "qa_2": FromFile("QA-2", "HotpotQA")}

if __name__ == "__main__":
    told_to_end()
    niah.main()
