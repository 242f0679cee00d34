"""Degradations: pure functions from (pixels, recipe, draws) to pixels.

A new one is a function here named like its recipe in schemas/recipes.py, and a line in `DEGRADATIONS`.
"""

import json
from collections.abc import Callable, Mapping
from statistics import NormalDist
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from prep.images import Pixels
from schemas.recipes import JpegArtifacts, Recipe, Superresolution, parse_recipe

_SUBSAMPLING = {
    "4:4:4": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
    "4:2:2": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_422,
    "4:2:0": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420,
}
_BLOCK = 8  # pixels of a JPEG block's side

# Quantiles of the standard normal at the middle of 65536 equal shares: raw 16-bit draws become normal by look-up.
_NORMAL = np.array([NormalDist().inv_cdf((i + 0.5) / 65536) for i in range(65536)], np.float32)


class Draws:
    """Random numbers of one degraded image, a function of its seed alone.

    They come from the raw bits of SFC64, whose stream NumPy keeps fixed, as it does not Generator's draws (NEP 19).
    """

    def __init__(self, seed: int) -> None:
        self._bits = np.random.SFC64(seed)

    def integer(self, low: int, high: int) -> int:
        """Draw a whole number, both ends included."""
        return low + int(self._bits.random_raw()) % (high - low + 1)

    def normal(self, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        """Draw standard normal numbers, of 16 bits each."""
        count = int(np.prod(shape))
        raw = self._bits.random_raw(-(-count // 4)).view(np.uint16)[:count]
        return _NORMAL[raw].reshape(shape)


def degrade(pixels: Pixels, recipe: Recipe, seed: int) -> Pixels:
    """Apply a recipe to a picture of any size; the same arguments give the same bytes."""
    return DEGRADATIONS[recipe.type](pixels, recipe, Draws(seed))


def superresolution(pixels: Pixels, recipe: Superresolution, draws: Draws) -> Pixels:
    """Downscale and upscale, blur, add noise, compress, in this order."""
    height, width = pixels.shape[:2]
    if recipe.downscale_factor is not None and recipe.downscale_factor > 1:
        small = (max(1, int(width / recipe.downscale_factor)), max(1, int(height / recipe.downscale_factor)))
        reduced = cv2.resize(pixels, small, interpolation=cv2.INTER_LINEAR)
        pixels = _pixels(cv2.resize(reduced, (width, height), interpolation=cv2.INTER_LINEAR))
    if recipe.blur_type == "gaussian":
        pixels = gaussian_blur(pixels, recipe.blur_radius)
    elif recipe.blur_type == "box":
        pixels = box_blur(pixels, recipe.blur_radius)
    elif recipe.blur_type == "both":
        pixels = gaussian_blur(box_blur(pixels, 0.7 * recipe.blur_radius), 0.7 * recipe.blur_radius)
    if recipe.add_noise:
        pixels = add_noise(pixels, recipe.noise_level, draws)
    return pixels if recipe.jpeg_quality is None else jpeg(pixels, recipe.jpeg_quality, None)


def jpeg_artifacts(pixels: Pixels, recipe: JpegArtifacts, draws: Draws) -> Pixels:
    """Blur, add noise, compress round by round, stress the block edges, in this order."""
    if recipe.pre_blur:
        pixels = gaussian_blur(pixels, recipe.pre_blur_radius)
    if recipe.add_noise:
        pixels = add_noise(pixels, recipe.noise_level, draws)
    for number in range(recipe.compression_rounds):
        quality = _quality(recipe, draws)
        if number > 0:
            quality = min(95, max(1, int(quality * recipe.round_quality_decay**number)))
        pixels = jpeg(pixels, quality, recipe.subsampling)
    return block_noise(pixels, recipe.block_noise_level, draws) if recipe.enhance_blocks else pixels


def gaussian_blur(pixels: Pixels, sigma: float) -> Pixels:
    """Blur with a gaussian of `sigma` pixels."""
    if sigma <= 0:
        return pixels
    return _pixels(cv2.GaussianBlur(pixels, (0, 0), sigma, borderType=cv2.BORDER_REPLICATE))


def box_blur(pixels: Pixels, radius: float) -> Pixels:
    """Average over a square of side 2 × radius + 1; the outermost pixels count by the radius's fraction."""
    if radius <= 0:
        return pixels
    whole = int(radius)
    ends = [radius - whole] if radius > whole else []
    kernel = np.array([*ends, *[1.0] * (2 * whole + 1), *ends]) / (2 * radius + 1)
    return _pixels(cv2.sepFilter2D(pixels, -1, kernel, kernel, borderType=cv2.BORDER_REPLICATE))


def add_noise(pixels: Pixels, level: float, draws: Draws) -> Pixels:
    """Add normal noise of standard deviation `level` (of full scale) to each channel."""
    noisy = pixels + draws.normal(pixels.shape) * np.float32(level * 255)
    return _rounded(noisy)


def jpeg(pixels: Pixels, quality: int, subsampling: str | None) -> Pixels:
    """Compress and decode once."""
    options = [cv2.IMWRITE_JPEG_QUALITY, quality]
    if subsampling is not None:
        options += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, _SUBSAMPLING[subsampling]]
    done, data = cv2.imencode(".jpg", pixels[:, :, ::-1], options)
    assert done, "an 8-bit colour picture always encodes"
    decoded: Any = cv2.imdecode(data, cv2.IMREAD_COLOR)
    return _pixels(decoded[:, :, ::-1])


def block_noise(pixels: Pixels, level: float, draws: Draws) -> Pixels:
    """Add normal noise to every eighth row and column, where JPEG blocks meet."""
    noisy = pixels.astype(np.float32)
    for lines in (noisy[::_BLOCK], noisy[:, ::_BLOCK]):
        lines += draws.normal(lines.shape) * np.float32(level * 255)
    return _rounded(noisy)


def _quality(recipe: JpegArtifacts, draws: Draws) -> int:
    if recipe.quality_mode == "range":
        return draws.integer(*recipe.quality_range)
    if recipe.quality_mode == "random":
        return recipe.quality_list[draws.integer(0, len(recipe.quality_list) - 1)]
    return recipe.quality


def _rounded(values: npt.NDArray[np.float32]) -> Pixels:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def _pixels(picture: Any) -> Pixels:
    return np.ascontiguousarray(picture, np.uint8)


DEGRADATIONS: Mapping[str, Callable[[Pixels, Any, Draws], Pixels]] = {
    "superresolution": superresolution,
    "jpeg_artifacts": jpeg_artifacts,
}


Step = dict


def realise(recipe, seed):
    return [recipe.acting("pairs")]


def apply(pixels, steps, seed):
    return degrade(pixels, parse_recipe(json.dumps(steps[0])), seed)


def encode(pixels, steps, seed):
    return cv2.imencode(".png", apply(pixels, steps, seed)[:, :, ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 1])[
        1
    ].tobytes(), ".png"


def suffix_of(steps):
    return ".png"


def decode_stored(data):
    stored = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    if stored is None:
        raise ValueError("damaged")
    return np.ascontiguousarray(stored[:, :, ::-1], np.uint8)
