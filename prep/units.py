"""The fixed plan of a cache run: what is needed, cut into units of one shape that depend on the need alone.

So every process of a run, on whatever machine, has the same units, and a lease on one of them means something.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from prep.pixels import Picture
from schemas.keys import digest
from schemas.shards import SHARD_BYTES
from schemas.stores import Store

_MOST_ROWS = 1024


@dataclass(frozen=True, slots=True)
class Unit:
    """Rows of one shape that are encoded together."""

    name: str  # of its lease
    store: Store  # of one encoder
    encoder: str
    folder: str  # in the store: the bucket; empty for prompts
    keys: tuple[str, ...]  # to be encoded, in order
    items: tuple[Picture | str, ...]  # pictures, or prompts
    most_rows: int  # of one write
    alike: int = 0  # rows of this shape that are to be encoded in all


@dataclass(frozen=True, slots=True)
class Span:
    """Where a unit lies in the sorted need of a store."""

    number: int  # of the unit, counted through all of the store
    name: str
    folder: str
    rows: npt.NDArray[np.int64]  # numbers of its keys in the need, finished ones included


def spans(
    keys: Sequence[str],
    folders: Sequence[str] | npt.NDArray[np.str_],
    row_bytes: Sequence[int] | npt.NDArray[np.int64],
    missing: Iterable[int],
) -> Iterator[Span]:
    """Yield the units that have missing rows, in order of folder and key.

    `row_bytes` is that of a row in each place. Units are cut from all keys, so that they depend on no store.
    """
    wanted = np.zeros(len(keys), np.bool_)
    wanted[list(missing)] = True
    spelled, where = np.asarray(keys, np.bytes_), np.asarray(folders)
    order = np.lexsort((spelled, where))
    number = 0
    starts = np.flatnonzero(np.r_[True, where[order][1:] != where[order][:-1]]) if len(keys) else np.empty(0, np.int64)
    for start, end in zip(starts, [*starts[1:], len(keys)], strict=True):
        size = int(np.clip(SHARD_BYTES // max(1, row_bytes[order[start]]), 1, _MOST_ROWS))
        for first in range(start, end, size):
            rows = order[first : min(first + size, end)]
            if wanted[rows].any():
                name = digest(keys[rows[0]], keys[rows[-1]], len(rows))[:16]
                yield Span(number, name, str(where[rows[0]]), rows)
            number += 1
