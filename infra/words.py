"""
Where the words of a needle prompt come from: lists for its keys, texts for its haystack.

    word_lists(words)     adjectives and nouns, ours or those of RULER
    essay_words(text)     the words of a text; without one, the prose of Python's own help pages
    distinct_words(...)   the words of lists in which some come more often than others

Each also says where its words are from, because results can be compared only where prompts are
the same. Checked in tests/test_niah.py. niah.py draws from these.
"""
import hashlib
import re
import sys
from functools import lru_cache
from importlib import metadata, resources

from infra.files import regular

ADJECTIVES = """
amber ample aqua bland bold brave brisk broad calm civil clear cool coral crisp curly damp deep
dense dry dusty eager early faint fair fancy firm fresh gentle glad grand humble icy jolly keen
late light loud lucky mellow merry mild modest narrow neat noble odd pale plain proud quick quiet
rapid rough round shy silent smooth tidy true warm""".split()
NOUNS = """
acorn anchor apron arrow barn basin beacon bell bench bridge bucket button cabin candle canoe
cedar chalk cliff clock comet copper dune engine falcon ferry fiddle garden gate glove hammer
harbor island jacket kettle ladder lantern lemon maple marble meadow mirror needle oak otter
paddle pebble pillow pond quilt raven river saddle shelf sparrow spoon tunnel valley violin wagon
willow""".split()


@lru_cache
def word_lists(words="built-in"):
    """-> adjectives, nouns, and where they are from. words: built-in, or RULER's, wonderwords."""
    # RULER's lists must be asked for. Taken wherever their package is, they would make prompts
    # depend on what is installed.
    if words == "built-in":
        return sorted(ADJECTIVES), sorted(NOUNS), "built-in words"
    lists = (sorted(wonderwords(kind)) for kind in ("adjective", "noun"))
    return *lists, f"wonderwords {metadata.version('wonderwords')}"


def wonderwords(kind):
    """The set of nouns, adjectives or verbs of the package of that name."""
    try:
        text = (resources.files("wonderwords.assets") / f"{kind}list.txt").read_text("utf-8")
    except ModuleNotFoundError:
        raise ValueError("words=wonderwords needs that package: pip install wonderwords, or take "
                         "built-in words") from None
    return {line.strip() for line in text.splitlines()} - {""}


def distinct_words(words, essay):
    """-> RULER's nouns, adjectives and verbs, or the essay's words of three small letters a-z or
    more, of which Python's help pages have some 1,550; sorted"""
    if words != "built-in":
        return sorted(set().union(*map(wonderwords, ("noun", "adjective", "verb"))))
    return sorted(word for word in set(essay) if re.fullmatch("[a-z]{3,}", word))


@lru_cache
def essay_words(text=None):
    """-> the words of a text, white space normalised as RULER does, and where they are from."""
    if text is not None:
        if not text.split():
            raise ValueError("the haystack's text is empty: give a text, or none for Python's "
                             "help pages")
        return text.split(), f"text {hashlib.sha256(text.encode()).hexdigest()[:12]}"

    from pydoc_data.topics import topics
    paragraphs = [text for name in sorted(topics) for text in re.split(r"\n\s*\n", topics[name])]
    # What begins and ends like a sentence is prose. The rest is code, tables and headings.
    prose = [text for text in paragraphs if text[:1].isupper() and text.endswith(".")]
    return " ".join(prose).split(), "pydoc_data.topics of Python %d.%d" % sys.version_info[:2]


def read_haystack(path):
    """The text of a file in UTF-8. The mark that some editors put in front is no part of it."""
    try:
        return regular(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8: save the text as "
                         "UTF-8") from None
