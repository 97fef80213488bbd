"""
Where a text stands in tokens: answers in a prompt, the question behind its context, a target.

    token_spans(text, ids, spans, tokenizer)    the fewest tokens that cover each answer
    border(text, ids, end, tokenizer)           how many tokens hold the context
    target_ids(prompt, target, tokenizer)       the tokens of what follows a prompt

Checked in tests/test_spans.py, under tokenizers that normalise, put a space in front, or end tokens
inside characters. niah.py uses these.
"""
from bisect import bisect_left, bisect_right
from itertools import accumulate

from infra.files import short
from infra.tokenizers import pieces


def token_spans(
    text, ids,  # the prompt and its tokens
    spans,      # [start, end) characters of the text, of each answer
    tokenizer,
):              # -> [start, end) tokens: the fewest that cover each answer
    # A tokenizer may normalise the text, or put a space in front, so characters of the text are not
    # where its tokens put them. What comes before an answer is counted in the tokenizer's bytes.
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
        # The first token may begin before the answer, and the last may end after it.
        found.append((bisect_right(ends, low) - 1, bisect_left(ends, high)))
    return found


def border(text, ids, end, tokenizer):
    """How many tokens hold the first `end` characters, counted as above."""
    ends = accumulate(map(len, pieces(tokenizer, ids)), initial=0)
    high = len(tokenizer.decode(tokenizer.encode(text[:end])).encode(errors="replace"))
    # A token that straddles the border counts.
    return bisect_left([*ends], high)


def target_ids(prompt, target, tokenizer):
    """Tokens of the target where it follows the prompt."""
    # Alone, LLaMA's tokenizer would open the target with a space of its own; a byte pair may not
    # cross the prompt's end: so the prompt's last word is encoded with it, and cut off again.
    # Blanks at its end belong to that word.
    before = prompt[len(prompt.rstrip(" ").rpartition(" ")[0]):].removeprefix(" ")
    head, both = tokenizer.encode(before), tokenizer.encode(before + target)
    return both[len(head):] if both[:len(head)] == head else tokenizer.encode(target)
