"""What lies over a picture: scan lines, moiré, scratches, dust."""

import math

import cv2
import numpy as np
import numpy.typing as npt

from prep.degrade.draws import Draws, add_levels
from prep.images import Pixels

_SHIFT = 4  # bits of a pixel's fraction in OpenCV's drawing


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
    """Draw white scratches, upright within 6°, of a fifth of the height to all of it."""
    height, across = pixels.shape[:2]
    cover = np.zeros((height, across), np.uint8)
    for place, tilt, long, top in draws.uniform(4 * count).reshape(-1, 4):
        length = (0.2 + 0.8 * long) * height
        start = place * across, top * (height - length)
        end = start[0] + (tilt - 0.5) * 0.2 * length, start[1] + length
        cv2.line(cover, _fixed(*start), _fixed(*end), 255, int(width), cv2.LINE_AA, _SHIFT)
    return _covered(pixels, cover, 255, opacity)


def dust(pixels: Pixels, draws: Draws, *, density: float, radius: float, opacity: float) -> Pixels:
    """Scatter round specks, every other one white, of a third of `radius` to all of it."""
    height, width = pixels.shape[:2]
    covers = [np.zeros((height, width), np.uint8) for _ in range(2)]
    count = round(density * height * width / 1_000_000)
    for number, (across, down, size) in enumerate(draws.uniform(3 * count).reshape(-1, 3)):
        reach = round(radius * (1 + 2 * size) / 3 * (1 << _SHIFT))
        cv2.circle(covers[number % 2], _fixed(across * width, down * height), reach, 255, -1, cv2.LINE_AA, _SHIFT)
    return _covered(_covered(pixels, covers[0], 0, opacity), covers[1], 255, opacity)


def _covered(pixels: Pixels, cover: npt.NDArray[np.uint8], level: int, opacity: float) -> Pixels:
    """Mix in a level where there is cover, in 256ths."""
    rows, columns = np.nonzero(cover)
    share = np.rint(cover[rows, columns] * (opacity * 256 / 255)).astype(np.int32)[:, None]
    covered = pixels.copy()
    covered[rows, columns] = (pixels[rows, columns] * (256 - share) + level * share + 128) >> 8
    return covered


def _outer(rows: npt.NDArray[np.float64], columns: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    return np.multiply.outer(rows.astype(np.float32), columns.astype(np.float32))


def _fixed(across: float, down: float) -> tuple[int, int]:
    return round(across * (1 << _SHIFT)), round(down * (1 << _SHIFT))
