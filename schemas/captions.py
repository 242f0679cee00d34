"""The entries of a caption filter list, as data: what is taken out of captions, or replaced.

`parse_filter` reads one; prep applies them in their order.
"""

import re
from collections.abc import Callable
from typing import TypeAlias

Filter: TypeAlias = Callable[[str], str]

_PART = r"((?:[^/\\]|\\.)*)"  # of a replacement; a slash in it is escaped
_REPLACEMENT = re.compile(rf"s/{_PART}/{_PART}(?:/([gi]*))?", re.DOTALL)


def parse_filter(entry: str) -> Filter:
    """Read one entry.

    `s/old/new/` replaces every match of a regular expression (`i` at its end: whatever the case; `g` is the rule
    already). Anything else is taken out, first as it is written, then as a regular expression. Raises ValueError.
    """
    if match := _REPLACEMENT.fullmatch(entry):
        return _replacement(*match.groups(default=""))
    if re.match(rf"s/{_PART}/{_PART}/", entry, re.DOTALL):
        raise ValueError(r"must be s/old/new/, then i or nothing; a slash inside is written \/")
    try:
        removed = re.compile(entry)
    except re.error:
        return lambda text: text.replace(entry, "")
    return lambda text: removed.sub("", text.replace(entry, ""))


def _replacement(old: str, new: str, flags: str) -> Filter:
    if not old:
        raise ValueError("must say what to replace between its first two slashes")
    try:
        pattern = re.compile(old, re.IGNORECASE if "i" in flags else 0)
        new = new.replace(r"\/", "/")
        pattern.sub(new, "")
    except (re.error, IndexError) as fault:
        raise ValueError(f"not a regular expression: {fault}") from fault
    return lambda text: pattern.sub(new, text)


def filter_fault(entry: str) -> str | None:
    """Return the reason why an entry cannot be used, None if it can."""
    try:
        parse_filter(entry)
    except ValueError as fault:
        return str(fault)
    return None
