"""Tone and colour: tables of 256 levels, and mixes of channels."""

import cv2
import numpy as np
import numpy.typing as npt

from prep.degrade.draws import Draws
from prep.images import Pixels

# How much of red, green and blue goes into each channel of a brown print; the matrix that most programs use.
_SEPIA = np.array([[0.393, 0.769, 0.189], [0.349, 0.686, 0.168], [0.272, 0.534, 0.131]])

_LEVELS = np.arange(256)


def color_cast(pixels: Pixels, _: Draws, *, red: float, green: float, blue: float) -> Pixels:
    """Multiply each channel."""
    return _through(pixels, np.stack([_LEVELS * factor for factor in (red, green, blue)], 1))


def gamma(pixels: Pixels, _: Draws, *, gamma: float) -> Pixels:
    """Raise brightness to a power, black and white fixed."""
    return _through(pixels, 255 * (_LEVELS / 255) ** gamma)


def banding(pixels: Pixels, _: Draws, *, levels: int) -> Pixels:
    """Keep `levels` levels per channel: equal shares of the range, spread from black to white."""
    return _through(pixels, (_LEVELS * levels // 256) * 255 / (levels - 1))


def fade(pixels: Pixels, _: Draws, *, contrast: float, lift: float) -> Pixels:
    """Lose contrast and lift black."""
    return _through(pixels, _LEVELS * contrast + lift)


def grayscale(pixels: Pixels, _: Draws) -> Pixels:
    """Keep brightness alone (ITU-R BT.601 weights)."""
    gray: Pixels = cv2.cvtColor(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return gray


def sepia(pixels: Pixels, _: Draws, *, strength: float) -> Pixels:
    """Mix with the picture toned brown."""
    # In 256ths every product of a level is exact in float32, so all machines round alike.
    mix = np.rint((np.eye(3) + strength * (_SEPIA - np.eye(3))) * 256) / 256
    toned: Pixels = cv2.transform(pixels, mix.astype(np.float32))
    return toned


def _through(pixels: Pixels, table: npt.NDArray[np.floating]) -> Pixels:
    """Send every level through a table, one for all channels or one for each."""
    # Rounded twice: a power that differs in its last bit between machines still gives the same level.
    whole = np.clip(np.rint(np.round(table, 6)), 0, 255).astype(np.uint8)
    through: Pixels = cv2.LUT(pixels, whole if whole.ndim == 1 else whole.reshape(1, 256, 3))
    return through
