"""What lies over a picture: scan lines, moiré, scratches, dust."""

import math

import numpy as np
import numpy.typing as npt

from prep.degrade.draws import Draws, add_levels
from prep.images import Pixels

Numbers = npt.NDArray[np.float64]
Plane = npt.NDArray[np.float32]


def scanlines(pixels: Pixels, _: Draws, *, period: float, strength: float, phase: float) -> Pixels:
    """Darken rows in a sine wave, from no loss to `strength`."""
    rows = 2 * np.pi * (np.arange(len(pixels)) / period + phase)
    kept = np.rint((1 - strength * (0.5 - 0.5 * np.cos(rows))) * 256).astype(np.uint16)
    lined: Pixels = ((pixels * kept[:, None, None] + 128) >> 8).astype(np.uint8)
    return lined


def moire(
    pixels: Pixels, _: Draws, *, period: float, angle: float, strength: float, color: float, phase: float
) -> Pixels:
    """Add a wave of amplitude `strength`, a part of a period apart in each channel."""
    height, width = pixels.shape[:2]
    turn = 2 * np.pi / period
    across = turn * math.cos(math.radians(angle)) * (np.arange(width) - (width - 1) / 2)
    up = turn * math.sin(math.radians(angle)) * ((height - 1) / 2 - np.arange(height))
    wave = np.empty(pixels.shape, np.int16)
    for channel in range(3):
        starts = up + 2 * np.pi * (phase + color * channel / 3)
        # cos(a + b) from cosines and sines of rows and columns: two products per pixel instead of a cosine.
        plane = _outer(np.cos(starts), np.cos(across)) - _outer(np.sin(starts), np.sin(across))
        wave[:, :, channel] = np.rint(plane * np.float32(strength))
    return add_levels(pixels, wave)


def scratches(pixels: Pixels, draws: Draws, *, count: int, width: int, opacity: float) -> Pixels:
    """Draw white scratches, upright within 6°, of a fifth of the height to all of it; their sides fade over a pixel."""
    height, across = pixels.shape[:2]
    cover = np.zeros((height, across), np.float32)
    beside = np.arange(-(width // 2) - 1, width // 2 + 2)
    for place, tilt, long, top in draws.uniform(4 * count).reshape(-1, 4):
        length = (0.2 + 0.8 * long) * height
        start = top * (height - length)
        rows = np.arange(round(start), min(height, round(start + length)))[:, None]
        middle = place * across + (tilt - 0.5) * 0.2 * (rows - start)
        columns = np.floor(middle + 0.5).astype(np.intp) + beside
        _cover(cover, rows, columns, width / 2 + 0.5 - np.abs(columns - middle))
    return _covered(pixels, cover, 255, opacity)


def dust(pixels: Pixels, draws: Draws, *, density: float, radius: float, opacity: float) -> Pixels:
    """Scatter round specks, every other one white, of a third of `radius` to all of it; edges fade over a pixel."""
    height, width = pixels.shape[:2]
    covers = np.zeros((2, height, width), np.float32)
    count = round(density * height * width / 1_000_000)
    beside = np.arange(-math.ceil(radius) - 1, math.ceil(radius) + 2)
    for number, (across, down, size) in enumerate(draws.uniform(3 * count).reshape(-1, 3)):
        middle, line = across * width, down * height
        rows, columns = round(line) + beside[:, None], round(middle) + beside
        distance = np.hypot(rows - line, columns - middle)
        _cover(covers[number % 2], rows, columns, radius * (1 + 2 * size) / 3 + 0.5 - distance)
    return _covered(_covered(pixels, covers[0], 0, opacity), covers[1], 255, opacity)


def _cover(cover: Plane, rows: npt.NDArray[np.intp], columns: npt.NDArray[np.intp], shares: Numbers) -> None:
    """Cover pixels by a share each, those that are in the picture."""
    rows, columns = np.broadcast_arrays(rows, columns)
    inside = (shares > 0) & (rows >= 0) & (rows < cover.shape[0]) & (columns >= 0) & (columns < cover.shape[1])
    place = rows[inside], columns[inside]
    cover[place] = np.maximum(cover[place], np.minimum(shares[inside], 1))


def _covered(pixels: Pixels, cover: Plane, level: int, opacity: float) -> Pixels:
    """Mix in a level where there is cover, in 256ths."""
    rows, columns = np.nonzero(cover)
    share = np.rint(cover[rows, columns] * (opacity * 256)).astype(np.int32)[:, None]
    covered = pixels.copy()
    covered[rows, columns] = (pixels[rows, columns] * (256 - share) + level * share + 128) >> 8
    return covered


def _outer(rows: Numbers, columns: Numbers) -> Plane:
    return np.multiply.outer(rows.astype(np.float32), columns.astype(np.float32))
