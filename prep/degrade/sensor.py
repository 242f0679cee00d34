"""Noise: of light, of sensors, of dead pixels."""

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from prep.degrade.draws import NORMAL, PIECE, Draws, add_levels, look_up
from prep.images import Pixels

_BLOCK = 8  # pixels of a JPEG block's side
_SHARES = 4096  # steps of a count's distribution function
_GOLDEN = (5**0.5 - 1) / 2  # whose multiples have the most even fractions


def noise(pixels: Pixels, draws: Draws, *, kind: str, gray: bool = False, **numbers: float) -> Pixels:
    """Add noise of a kind; gray noise is one draw for the three channels."""
    return KINDS[kind](pixels, draws, gray=gray, **numbers)


def gaussian(pixels: Pixels, draws: Draws, *, gray: bool, sigma: float) -> Pixels:
    """Add normal noise of standard deviation `sigma`, rounded to whole levels."""
    table = np.rint(NORMAL * sigma)
    table = table.astype(np.int8 if np.abs(table).max() < 128 else np.int16)
    if gray:
        drawn = np.concatenate([look_up(table, draws.words(n)) for n in _pieces(pixels.size // 3)])
        return add_levels(pixels, drawn.reshape(*pixels.shape[:2], 1).repeat(3, 2))
    flat = pixels.reshape(-1)
    noisy = np.empty_like(flat)
    start = 0
    for count in _pieces(flat.size):
        piece = slice(start, start + count)
        add_levels(flat[piece], look_up(table, draws.words(count)), noisy[piece])
        start += count
    return noisy.reshape(pixels.shape)


def speckle(pixels: Pixels, draws: Draws, *, gray: bool, sigma: float) -> Pixels:
    """Add normal noise whose deviation grows with brightness, up to `sigma` for white."""
    return _by_level(pixels, draws, np.arange(256) / 255 * sigma, gray)


def shot_read(pixels: Pixels, draws: Draws, *, gray: bool, shot: float, read: float) -> Pixels:
    """Add normal noise of variance shot·brightness + read² (Foi et al., TIP 2008; Brooks et al., CVPR 2019, eq. 2)."""
    return _by_level(pixels, draws, np.sqrt(shot * np.arange(256) / 255 * 255**2 + read**2), gray)


def poisson(pixels: Pixels, draws: Draws, *, gray: bool, scale: float) -> Pixels:
    """Count photons, 256 for white, and add `scale` times what the count is off (Wang et al. 2021, section 3.2)."""
    # Counts are whole, so all noise of a level has one fraction: rounded to nearest it would be biased. Rounded up or
    # down in turn it is not.
    turns = np.arange(_SHARES) * _GOLDEN % 1
    table = np.floor(_counts() * (scale * 255 / 256) + turns).astype(np.int16).ravel()
    levels = _levels(pixels, gray)
    drawn = [
        np.take(table, levels[at : at + PIECE] * np.intp(_SHARES) + (draws.words(len(levels[at : at + PIECE])) >> 4))
        for at in range(0, len(levels), PIECE)
    ]
    return add_levels(pixels, _spread(np.concatenate(drawn), pixels, gray))


def salt_pepper(pixels: Pixels, draws: Draws, *, gray: bool, amount: float, salt: float) -> Pixels:
    """Replace a share `amount` of values by white or black, `salt` of them by white."""
    count = pixels.size // 3 if gray else pixels.size
    words = _spread(draws.words(count).astype(np.int32), pixels, gray)
    replaced, white = round(amount * 65536), round(amount * salt * 65536)
    noisy = np.where(words < replaced, np.uint8(0), pixels)
    noisy[words < white] = 255
    return noisy


def block_noise(pixels: Pixels, draws: Draws, *, sigma: float) -> Pixels:
    """Add normal noise to every eighth row and column, where JPEG blocks meet."""
    noisy = pixels.copy()
    for lines in (noisy[::_BLOCK], noisy[:, ::_BLOCK]):
        lines[:] = gaussian(np.ascontiguousarray(lines), draws, gray=False, sigma=sigma)
    return noisy


def _by_level(pixels: Pixels, draws: Draws, deviations: npt.NDArray[np.float64], gray: bool) -> Pixels:
    """Add normal noise of a standard deviation that depends on the level."""
    table, normal = deviations.astype(np.float32), NORMAL.astype(np.float32)
    levels = _levels(pixels, gray)
    drawn = np.empty(levels.size, np.int16)
    for at in range(0, levels.size, PIECE):
        piece = levels[at : at + PIECE]
        # One product in float32, then rounded: the same on every machine.
        drawn[at : at + PIECE] = np.rint(table[piece] * normal[draws.words(piece.size)])
    return add_levels(pixels, _spread(drawn, pixels, gray))


@lru_cache(maxsize=1)
def _counts() -> npt.NDArray[np.float64]:
    """Return, per level and share of 4096, how much the Poisson quantile is above its mean, in photons."""
    shares = (np.arange(_SHARES) + 0.5) / _SHARES
    table = np.zeros((256, _SHARES))
    for level in range(1, 256):
        mean = level / 255 * 256
        number = np.arange(1, int(mean + 8 * math.sqrt(mean) + 10))
        logs = np.concatenate([[0.0], np.cumsum(np.log(mean / number))]) - mean
        table[level] = np.searchsorted(np.cumsum(np.exp(logs)), shares) - mean
    return table


def _levels(pixels: Pixels, gray: bool) -> npt.NDArray[np.uint8]:
    flat: npt.NDArray[np.uint8] = (cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY) if gray else pixels).reshape(-1)
    return flat


def _spread(values: npt.NDArray[Any], pixels: Pixels, gray: bool) -> npt.NDArray[Any]:
    """Bring one value per level drawn for into the picture's shape."""
    return values.reshape(*pixels.shape[:2], 1).repeat(3, 2) if gray else values.reshape(pixels.shape)


def _pieces(count: int) -> list[int]:
    whole, rest = divmod(count, PIECE)
    return [PIECE] * whole + [rest] * (rest > 0)


KINDS: Mapping[str, Callable[..., Pixels]] = {
    "gaussian": gaussian,
    "poisson": poisson,
    "shot_read": shot_read,
    "speckle": speckle,
    "salt_pepper": salt_pepper,
}
