"""What the contact sheet and the report tell alike of a pair: difference, steps of a degradation, alignment.

Only pixels, numbers and words: how they are drawn is the business of prep/sheet.py and prep/page.
"""

import json
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from prep.alignment import TRUSTED, Alignment, misaligned
from prep.images import Pixels
from schemas.datasets import AlignmentCheck
from schemas.rows import Reference

_FACTORS = (32, 16, 8, 4, 2)  # of the difference: the largest that leaves nearly all of it below white
_NEARLY_ALL = 0.995  # of the values
_STEPS = 16  # of a degradation that are told
_KINDS = ("kernel", "kind")  # of a step: values that speak for themselves
_DETAILS = 200  # characters of one


@dataclass(frozen=True, slots=True)
class Difference:
    """Where two pictures differ, on black."""

    pixels: Pixels
    factor: int  # by which it is amplified; 0: there is none

    @property
    def label(self) -> str:
        """Say what it is, and how much of it."""
        if self.factor == 0:
            return "no difference"
        return "difference" if self.factor == 1 else f"difference ×{self.factor}"


@dataclass(frozen=True, slots=True)
class Told:
    """One step of a degradation in words."""

    name: str
    details: str
    depth: int = 0  # of steps inside others


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a reference lies on its target, in words and numbers."""

    accused: bool  # by the thresholds of its set
    words: str
    numbers: tuple[tuple[str, str], ...]  # name, value


def difference(target: Pixels, reference: Pixels) -> Difference | None:
    """Show the absolute difference of two pictures, amplified as far as they are alike; None if their sizes differ."""
    if target.shape != reference.shape:
        return None
    apart = np.where(target > reference, target - reference, reference - target)
    counts = np.bincount(apart.ravel(), minlength=256)
    if not counts[1:].any():
        return Difference(apart, 0)
    high = int(np.searchsorted(np.cumsum(counts), _NEARLY_ALL * apart.size))
    factor = next((factor for factor in _FACTORS if high * factor <= 255), 1)
    amplified = np.minimum(np.arange(256) * factor, 255).astype(np.uint8)
    return Difference(amplified[apart], factor)


def told(realised: str | None) -> tuple[Told, ...]:
    """Spell the steps of a degradation with their numbers as they were drawn; what is no JSON as it stands."""
    if realised is None:
        return ()
    try:
        found = json.loads(realised)
        lines = list(_lines(found if isinstance(found, list) else [found], 0))
    except (ValueError, RecursionError):
        return (Told("", _cut(realised)),)
    more = len(lines) - _STEPS
    return (*lines[:_STEPS], Told("", f"and {more} more steps")) if more > 0 else tuple(lines)


def _lines(steps: list[Any], depth: int) -> Iterator[Told]:
    """Yield a line for each step, and for those inside it."""
    for step in steps:
        if not isinstance(step, dict):
            yield Told("", _cut(_value(step)), depth)
            continue
        name = "step" if "step" in step else "type"
        kind = next((step[key] for key in _KINDS if isinstance(step.get(key), str)), None)
        inside = step.get("steps") if isinstance(step.get("steps"), list) else None
        named = {name, "steps"} if inside is not None else {name}
        details = [] if kind is None else [kind.replace("_", " ")]
        details += [
            _detail(key, value)
            for key, value in step.items()
            if key not in named and value is not None and value is not False and not (key in _KINDS and value is kind)
        ]
        yield Told(_cut(_value(step.get(name, "")).replace("_", " ")), _cut(", ".join(details)), depth)
        yield from _lines(inside or [], depth + 1)


def _detail(key: str, value: Any) -> str:
    name = key.replace("_", " ")
    return name if value is True else f"{name} {_value(value)}"


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return " ".join(_value(one) for one in value[:_STEPS]) + (" …" if len(value) > _STEPS else "")
    return value if isinstance(value, str) else json.dumps(value)


def _cut(text: str) -> str:
    return clipped(text, _DETAILS)


def measured(reference: Reference) -> Alignment | None:
    """Return how a reference lies on its target as the table has it; None if it was not compared."""
    numbers = (reference.shift_x, reference.shift_y, reference.scale, reference.similarity, reference.confidence)
    known = [number for number in numbers if number is not None]
    return Alignment(*known) if len(known) == len(numbers) else None


def accusation(found: Alignment, check: AlignmentCheck) -> str | None:
    """Say what the thresholds of its set have against a reference, None if nothing."""
    reason = misaligned(found, check.maximum_shift, check.maximum_scale, check.minimum_similarity)
    return None if reason is None else reason.removeprefix("misaligned: ")


def verdict(found: Alignment, check: AlignmentCheck) -> Verdict:
    """Judge how a reference lies on its target."""
    reason, trusted = accusation(found, check), found.confidence >= TRUSTED
    words = reason or ("lies on its target" if trusted else "cannot be told: too little to go by")
    known = (("shift", _shift(found)), ("scale", f"×{found.scale:.4f}")) if trusted else ()
    likeness = (("similarity", f"{found.similarity:.2f}"), ("confidence", f"{found.confidence:.2f}"))
    return Verdict(reason is not None, words, (*known, *likeness))


def _shift(found: Alignment) -> str:
    """Spell a shift with signs: right and down are positive."""
    right, down = (round(shift, 2) + 0.0 for shift in (found.shift_x, found.shift_y))  # no negative zero
    return f"{right:+.2f}, {down:+.2f} px".replace("-", "−")


def visible(text: str) -> str:
    """Spell out what cannot be seen or would turn the text around it: `\\n`, `\\u202e`. Joiners of letters stay."""
    return "".join(
        char.encode("unicode_escape").decode()
        if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp") and char not in "\u200c\u200d"
        else char
        for char in text
    )


def clipped(text: str, length: int, ending: int = 0) -> str:
    """Shorten a text to `length` characters, of which the last `ending` are its own end."""
    if len(text) <= length:
        return text
    return text[: length - ending - 1] + "…" + text[len(text) - ending :]
