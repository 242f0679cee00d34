"""Arguments of an optimiser written as text: `weight_decay=0.01,betas=0.9/0.99`.

A new kind of value is a line in `_value`.
"""

import json
from typing import Any

_WORDS = {"true": True, "false": False, "none": None, "null": None}


def parsed_arguments(text: str) -> dict[str, Any]:
    """Read `name=value` parts with commas between them, or a JSON object; raises ValueError for anything else."""
    if text.lstrip().startswith("{"):
        return dict(json.loads(text))
    arguments: dict[str, Any] = {}
    for part in filter(None, (one.strip() for one in text.split(","))):
        name, equals, value = (one.strip() for one in part.partition("="))
        if not (name.isidentifier() and equals and value):
            raise ValueError(f"must be name=value parts with commas between them, found {part!r}")
        if name in arguments:
            raise ValueError(f"{name} is given twice")
        arguments[name] = _value(value)
    return arguments


def _value(text: str) -> Any:
    """Read one value: a number, true, false, none, several with slashes between them, or a word."""
    if "/" in text:
        return [_value(part.strip()) for part in text.split("/")]
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
