"""Random numbers as functions of a seed alone, the same on every machine and with every version of NumPy."""

from statistics import NormalDist
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from schemas.keys import seed_of

PIECE = 1 << 16  # numbers drawn at once: what is drawn, looked up and added stays in the processor's cache

# Quantiles of the standard normal at the middle of 65536 equal shares: raw 16-bit draws become normal by look-up.
NORMAL = np.array([NormalDist().inv_cdf((i + 0.5) / 65536) for i in range(65536)])


def _looks_up_words() -> bool:
    try:
        return bool(cv2.LUT(np.zeros((1, 1), np.uint16), np.zeros((1, 65536), np.int8)) is not None)
    except cv2.error:
        return False


_WORDS = _looks_up_words()  # newer versions of OpenCV look up 16-bit numbers, in half the time of NumPy


def chance(*parts: object) -> float:
    """Draw from 0 (in) to 1 (out), evenly: a hash of what the draw depends on."""
    return (seed_of(*parts) >> 10) / (1 << 53)


class Draws:
    """The numbers that one step of one picture draws.

    They come from the raw bits of SFC64, whose stream NumPy keeps fixed, as it does not Generator's draws (NEP 19).
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._bits = np.random.SFC64(seed)

    def words(self, count: int) -> npt.NDArray[np.uint16]:
        """Draw whole numbers from 0 to 65535."""
        raw: npt.NDArray[np.uint64] = self._bits.random_raw(-(-count // 4))
        return raw.view(np.uint16)[:count]

    def uniform(self, count: int) -> npt.NDArray[np.float64]:
        """Draw numbers from 0 (in) to 1 (out)."""
        raw: npt.NDArray[np.uint64] = self._bits.random_raw(count)
        return (raw >> np.uint64(11)) / float(1 << 53)


def add_levels(
    levels: npt.NDArray[np.uint8], drawn: npt.NDArray[Any], into: npt.NDArray[np.uint8] | None = None
) -> npt.NDArray[np.uint8]:
    """Add whole numbers to levels, and stop at black and white."""
    added = np.empty(levels.shape, np.uint8) if into is None else into
    # OpenCV takes lists of up to four numbers for one colour, rows of them never.
    cv2.add(levels.reshape(1, -1), drawn.reshape(1, -1), dst=added.reshape(1, -1), dtype=cv2.CV_8U)
    return added


def look_up(table: npt.NDArray[Any], words: npt.NDArray[np.uint16]) -> npt.NDArray[Any]:
    """Return `table[words]`, fast; the table has 65536 entries of 8 or 16 bits."""
    if not _WORDS:
        return np.take(table, words)
    found: npt.NDArray[Any] = cv2.LUT(words.reshape(1, -1), table.reshape(1, -1))
    return found.reshape(-1)
