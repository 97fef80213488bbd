"""
A sparse method as text, and back: what sparse.parse and sparse.name do for one method.

    "quest:budget=1/16,block_size=64"  <->  Quest(budget=256, block_size=64)     in 4,096 tokens

A method is a frozen dataclass whose fields are its settings. Their types say what may be given, so
a class of your own needs nothing but its line in sparse.METHODS. All errors are ValueErrors of one
line, for what a user typed. Checked in tests/test_sparse.py.
"""
import re
from dataclasses import fields
from inspect import get_annotations
from typing import get_args, get_type_hints

from infra.files import short

# Of a setting of type float. It is finite.
FLOAT = re.compile(r"-?\d{1,30}(\.\d{0,30})?(e-?\d{1,2})?", re.ASCII)


def of_text(text, context_len, methods):
    """One method, of a class in methods {label: class}. A fraction is one of context_len tokens."""
    label, _, settings = text.strip().partition(":")
    known = ", ".join(methods)
    check(label in methods, f"unknown method {label!r} in {text!r}: use one of {known}")
    kind = methods[label]
    check("__dataclass_fields__" in vars(kind) or not get_annotations(kind), f"{label}: the fields "
          f"of {kind.__name__} count once the class is a @dataclass(frozen=True)")
    try:
        hints = get_type_hints(kind)  # also where a file puts off its annotations
    except NameError as error:
        raise ValueError(f"{label}: the fields of {kind.__name__} have a type that is not known "
                         f"({error}): import it where the class is made") from None
    allowed, values = {f.name: hints[f.name] for f in fields(kind)}, {}
    for setting in filter(None, settings.split(",")):
        key, _, value = setting.partition("=")
        has = ", ".join(allowed) or "none"
        check(key in allowed, f"{label} has no setting {key!r}: it has {has}")
        check(key not in values, f"{text}: {key} is given twice")
        check(" " not in value, f"{text}: a space ends a method: give several as words of their "
              "own, and quote each by itself")
        setting = f"{label}:{setting}"
        kinds = get_args(allowed[key]) or [allowed[key]]
        if float in kinds and FLOAT.fullmatch(value):
            values[key] = float(value)
            continue
        values[key] = value = value_of(value, context_len, setting)

        # The exact type, as true is an int to isinstance.
        check(type(value) in kinds, f"{setting}: expected {in_words(kinds)}")
        check(type(value) is not int or value < 2**31, f"{setting}: must be below 2**31")
    return kind(**values)


def in_words(kinds):
    """The types of a setting: int or none"""
    return " or ".join(kind.__name__.removesuffix("Type").lower() for kind in kinds)


def value_of(text, context_len, setting):
    """True, False, None or an int. setting: the whole, for the error's line."""
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    numerator, slash, denominator = text.partition("/")
    divides = denominator.isdecimal() and int(denominator) > 0 if slash else True
    check(numerator.isdecimal() and divides, f"{setting}: expected an integer, a fraction like "
          "1/16, true, false or none, or where the field is float a number")
    if not slash:
        return int(numerator)
    tokens, rest = divmod(int(numerator) * context_len, int(denominator))
    check(rest == 0, f"{setting}: {text} of the context length {context_len} is not a whole "
          "number of tokens: give it in tokens, or another share")
    return tokens


def to_text(method, label):
    """The text of one method. What it selects is always told, other settings if not as usual."""
    settings = []
    for field in fields(method):
        value = getattr(method, field.name)
        if field.name in ("budget", "block_size") or value != field.default:
            text = str(value).lower().replace("e+", "e")  # a + would begin another method
            settings.append(f"{field.name}={text}")
    return ":".join([label, ",".join(settings)] if settings else [label])


def check(condition, message):
    """ValueError with one line for what a user typed."""
    if not condition:
        raise ValueError(message)


def check_type(value, kinds, what):
    """TypeError with one line for what a program passed: `what` says what is taken."""
    if not isinstance(value, kinds):
        raise TypeError(f"{what}, not {type(value).__name__}: {short(value)}")


def check_settings(label, method):
    """The types of a method's settings, where Python made it: of_text has asked already."""
    for field in fields(method):
        value, kinds = getattr(method, field.name), get_args(field.type) or (field.type,)
        if all(isinstance(kind, type) for kind in kinds):  # else a file put off its annotations
            known = type(value) in kinds or (float in kinds and type(value) is int)
            check(known, f"{label}: {field.name}={short(value)}: expected {in_words(kinds)}")


def check_blocks(label, method, forced):
    """The budget of a method that selects blocks: whole blocks, and room for the forced ones."""
    check_settings(label, method)
    budget, size = method.budget, method.block_size
    check(size > 0, f"{label}: block_size={size} must be positive")
    nearest = max(forced, 1, round(budget / size)) * size
    check(budget > 0 and budget % size == 0, f"{label}: budget={budget} is not a multiple of "
          f"block_size={size}; use {nearest} or another block_size=")
    check(budget // size >= forced, f"{label}: budget={budget} holds {budget // size} of the "
          f"{forced} blocks of {size} that are always read; raise the budget or use smaller blocks")
