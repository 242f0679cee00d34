"""Pictures and measures that the tests of degradations share."""

import numpy as np


def photo(height=96, width=120):
    """Draw a picture with flat parts, edges, colours and fine texture; a smaller one is its corner."""
    down, across = np.mgrid[0:96, 0:120]
    picture = np.stack([down * 2 % 256, across * 2 % 256, (down + across) % 256], 2).astype(np.uint8)
    picture[20:60, 30:80] = (220, 40, 90)
    picture[30:50, 40:70] = np.random.default_rng(0).integers(0, 256, (20, 30, 3))
    return np.ascontiguousarray(picture[:height, :width])


def flat(level=128, side=256):
    """Return a picture of one gray."""
    return np.full((side, side, 3), level, np.uint8)


def wave(frequency, angle=0.0, side=256, amplitude=100.0):
    """Draw a gray sine wave of `frequency` cycles per pixel, its crests moving along `angle` (degrees, anticlockwise)."""
    places = np.arange(side) - (side - 1) / 2
    along = np.cos(np.radians(angle)) * places - np.sin(np.radians(angle)) * places[:, None]
    values = np.rint(127.5 + amplitude * np.cos(2 * np.pi * frequency * along))
    return np.repeat(values[:, :, None], 3, 2).astype(np.uint8)


def gain(before, after, border):
    """Return by how much a wave's amplitude changed, away from the borders: a regression of one on the other."""
    inside = slice(border, -border)
    first, second = (one[inside, inside, 1].astype(float) for one in (before, after))
    first, second = first - first.mean(), second - second.mean()
    return float((first * second).sum() / (first**2).sum())


def error(pixels, other):
    """Return the root of the mean squared difference."""
    return float(np.sqrt(np.mean((pixels.astype(float) - other) ** 2)))


def gradient(pixels):
    """Return the energy of the differences between neighbours."""
    values = pixels.astype(float)
    return float((np.diff(values, axis=0) ** 2).sum() + (np.diff(values, axis=1) ** 2).sum())
