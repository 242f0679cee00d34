"""The entries of a caption filter list, as data: what is taken out of captions, or replaced.

`parse_filter` reads one; prep applies them in their order.
"""

import re
from collections.abc import Callable
from typing import TypeAlias

Filter: TypeAlias = Callable[[str], str]

_REPLACEMENT = re.compile(r"s/((?:[^/\\]|\\.)*)/((?:[^/\\]|\\.)*)(?:/([gi]*))?", re.DOTALL)


def parse_filter(entry: str) -> Filter:
    """Read one entry.

    `s/old/new/` replaces the first match of a regular expression (`g`: every match, `i`: whatever the case). Anything
    else is taken out, first as it is written, then as a regular expression. Raises ValueError.
    """
    if match := _REPLACEMENT.fullmatch(entry):
        old, new, flags = (part.replace(r"\/", "/") for part in match.groups(default=""))
        try:
            pattern = re.compile(old, re.IGNORECASE if "i" in flags else 0)
            pattern.sub(new, "")
        except (re.error, IndexError) as fault:
            raise ValueError(f"not a regular expression: {fault}") from fault
        return lambda text: pattern.sub(new, text, count=0 if "g" in flags else 1)
    try:
        removed = re.compile(entry)
    except re.error:
        return lambda text: text.replace(entry, "")
    return lambda text: removed.sub("", text.replace(entry, ""))


def filter_fault(entry: str) -> str | None:
    """Return the reason why an entry cannot be used, None if it can."""
    try:
        parse_filter(entry)
    except ValueError as fault:
        return str(fault)
    return None
