"""A tiny text grammar: [a|b|c] picks one alternative (nestable), {name} inserts a value, {^name} capitalises it."""

import re

_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_VALUE = re.compile(r"\{(\^?)([\w.]+)\}")


def capital(text):
    """First letter in upper case, the rest unchanged."""
    return text[:1].upper() + text[1:]


def article(words):
    """'otter' -> 'an otter'"""
    return ("an " if words[0] in "aeiou" else "a ") + words


def choose(rng, text):
    """Replace every [a|b] by one alternative, innermost first."""
    while True:
        text, n = _CHOICE.subn(lambda m: rng.choice(m[1].split("|")), text)
        if not n:
            return text


def fill(text, values):
    """Replace {name} and {^name} from the mapping; an unknown name is a KeyError."""
    return _VALUE.sub(lambda m: capital(values[m[2]]) if m[1] else values[m[2]], text)


def expand(rng, text, values=None):
    """Choose alternatives, then insert values; single spaces throughout."""
    return re.sub(r"  +", " ", fill(choose(rng, text), values or {})).strip()
