"""Files of equal bytes, and pictures that look alike: groups, each led by its first in path order."""

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_HASH_BITS = 64


def equal(identities: Sequence[str | None]) -> dict[int, int]:
    """Return, for every item that repeats an earlier one, the position of the first: {17: 3}."""
    first: dict[str, int] = {}
    repeats: dict[int, int] = {}
    for position, identity in enumerate(identities):
        if identity is not None:
            leader = first.setdefault(identity, position)
            if leader != position:
                repeats[position] = leader
    return repeats


def alike(hashes: Sequence[str | None], distance: int) -> dict[int, int]:
    """Return, for every picture that looks like an earlier one, the position of the first such.

    Hashes of 64 bits that differ in at most `distance` agree wholly in one of `distance` + 1 bands of bits, so only
    pictures that share a band are compared. Leaders are earlier pictures that are not repeats themselves.
    """
    known = [position for position, one in enumerate(hashes) if one is not None]
    words = np.array([int(one, 16) for one in hashes if one is not None], np.uint64)
    bands = [_band(words, start, end) for start, end in _cuts(distance + 1)]
    groups: list[dict[int, list[int]]] = [{} for _ in bands]
    repeats: dict[int, int] = {}
    for number, position in enumerate(known):
        candidates = sorted({one for band, group in zip(bands, groups, strict=True)
                             for one in group.get(int(band[number]), ())})  # fmt: skip
        if candidates:
            near = np.bitwise_count(words[candidates] ^ words[number]) <= distance
            if near.any():
                repeats[position] = known[candidates[int(np.argmax(near))]]
                continue
        for band, group in zip(bands, groups, strict=True):
            group.setdefault(int(band[number]), []).append(number)
    return repeats


def _cuts(count: int) -> list[tuple[int, int]]:
    edges = [number * _HASH_BITS // count for number in range(count + 1)]
    return list(itertools.pairwise(edges))


def _band(words: npt.NDArray[np.uint64], start: int, end: int) -> npt.NDArray[np.uint64]:
    mask = np.uint64((1 << (end - start)) - 1)
    return (words >> np.uint64(start)) & mask
