"""Buckets, resizes and crops: pure functions from an image's size to the picture a model trains on.

The arithmetic equals SimpleTuner's for the settings supported here, so that the same file falls into the same bucket;
`fit` is the way in. Rounding is half-to-even throughout, truncation is towards zero.
"""

import math
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from schemas.keys import seed_of
from schemas.rows import Geometry

Size: TypeAlias = tuple[int, int]  # width, height
Targets: TypeAlias = MutableMapping[float, Size]  # aspect of a bucket -> its target size

# Areas in megapixels that stand for a customary square: within 0.05, the edge is taken from here.
_CUSTOMARY = {0.25: 512, 0.5: 768, 1.0: 1024, 2.0: 1536, 4.0: 2048}

# An image of this much off a square may be resized to one without a crop: a change of shape that nobody sees.
_NEARLY_SQUARE = 0.0101


@dataclass(frozen=True, slots=True)
class Policy:
    """The settings of one dataset that decide sizes and crops."""

    resolution: float
    resolution_type: Literal["pixel", "area", "pixel_area"]
    alignment: int
    rounding: int = 2  # decimals of an aspect ratio
    square: bool = False  # crop to a square
    crop_style: Literal["random", "center", "centre", "corner"] = "random"
    downsample: float | None = None  # resolution to scale to before a crop

    def by_area(self, resolution: float) -> tuple[float, bool]:
        """Return (pixels or megapixels, whether it is an area)."""
        if self.resolution_type == "pixel_area":
            return int(resolution) ** 2 / 1e6, True
        return resolution, self.resolution_type == "area"


def fit(size: Size, policy: Policy, targets: Targets, random_crop: tuple[object, ...]) -> Geometry | str:
    """Return how an image of `size` becomes a training picture, or the reason why it cannot.

    `targets` remembers the target size of each bucket of this (resolution, alignment); call in a fixed order of
    images and pass the same mapping. `random_crop` seeds the place of a random crop.
    """
    resolution, area = policy.by_area(policy.resolution)
    ratio = round(size[0] / size[1], policy.rounding)
    if ratio == 0:
        return f"too narrow: {size[0]}x{size[1]}, its aspect ratio rounds to 0"
    if round(size[1] / size[0], policy.rounding) == 0:
        return f"too wide: {size[0]}x{size[1]}, the inverse of its aspect ratio rounds to 0"
    edge = _edge(resolution, area, policy.alignment)
    if policy.square:
        target, resized = (edge, edge), _sizes(size, 1.0, resolution, area, policy, None)[1]
        resized = _cover(resized, target)
    else:
        target, resized = _sizes(size, ratio, resolution, area, policy, targets)
        if round(target[0] / target[1], policy.rounding) == 1.0 and resized[0] < edge:
            target = (edge, edge)
            resized = target if abs(size[0] / size[1] - 1) <= _NEARLY_SQUARE else _cover(resized, target)
    if policy.downsample is not None and not _at_size(size, target, edge, area):
        downsample, down_area = policy.by_area(policy.downsample)
        resized = _cover(_sizes(size, ratio, downsample, down_area, policy, None)[1], target)
    top, left = _crop(resized, target, policy.crop_style, random_crop)
    return Geometry(*target, *resized, top, left)


def rounded(length: float, alignment: int) -> int:
    """Round a length in pixels to a multiple of `alignment`, at least one."""
    return max(alignment, round(length / alignment) * alignment)


def _edge(resolution: float, area: bool, alignment: int) -> int:
    """Return the side of a square of this resolution."""
    if not area:
        return rounded(resolution, alignment)
    customary = next((edge for near, edge in _CUSTOMARY.items() if abs(resolution - near) <= 0.05), None)
    return rounded(customary if customary is not None else math.sqrt(resolution * 1e6), alignment)


def _sizes(
    size: Size, ratio: float, resolution: float, area: bool, policy: Policy, targets: Targets | None
) -> tuple[Size, Size]:
    """Return (target, intermediary) for an aspect ratio and a resolution."""
    if area:
        return _sizes_by_area(size, ratio, resolution, policy, targets)
    return _sizes_by_edge(size, ratio, resolution, policy.alignment)


def _sizes_by_edge(size: Size, ratio: float, edge: float, alignment: int) -> tuple[Size, Size]:
    """Give the shorter side `edge` pixels."""
    true = size[0] / size[1]
    portrait = size[0] < size[1]
    raw = (int(edge), int(edge / ratio)) if portrait else (int(edge * ratio), int(edge))
    target = (rounded(raw[0], alignment), rounded(raw[1], alignment))
    if true < 1:
        width = max(target[0], raw[0])
        height = int(width / true)
        if height < target[1]:
            height = target[1]
            width = int(height * true)
    else:
        height = max(target[1], raw[1])
        width = int(height * true)
        if width < target[0]:
            width = target[0]
            height = int(width / true)
    return target, (width, height)


def _sizes_by_area(
    size: Size, ratio: float, megapixels: float, policy: Policy, targets: Targets | None
) -> tuple[Size, Size]:
    """Give the picture an area of `megapixels`."""
    alignment, true = policy.alignment, size[0] / size[1]
    edge = rounded(int(math.sqrt(megapixels * 1e6)), alignment)
    if ratio == 1 and size[0] == size[1]:
        return (edge, edge), (edge, edge)
    target = (rounded(edge * math.sqrt(ratio), alignment), rounded(edge / math.sqrt(ratio), alignment))
    if target[0] < target[1]:
        width, height = target[0], int(target[0] / true)
    else:
        width, height = int(target[1] * true), target[1]
    if targets is not None:
        target = targets.setdefault(round(target[0] / target[1], policy.rounding), target)
    if target[0] > width:
        missing = target[0] - width
        width, height = width + missing, height + int(missing / true)
    elif target[1] > height:
        missing = target[1] - height
        width, height = width + int(missing * true), height + missing
    return target, (width, height)


def _at_size(size: Size, target: Size, edge: int, area: bool) -> bool:
    """Tell an image that already has the resolution, which is then not scaled before the crop."""
    if area:
        return size[0] * size[1] == edge * edge and size[0] >= target[0] and size[1] >= target[1]
    return size == (edge, edge)


def _cover(resized: Size, target: Size) -> Size:
    """Enlarge an intermediary size that does not cover its target, keeping the image's aspect."""
    width, height = resized
    if width < target[0]:
        width, height = target[0], int(height * target[0] / width)
    if height < target[1]:
        width, height = int(width * target[1] / height), target[1]
    return max(width, target[0]), max(height, target[1])


def _crop(resized: Size, target: Size, style: str, random_crop: tuple[object, ...]) -> tuple[int, int]:
    """Return (top, left) of the target box."""
    spare_left, spare_top = resized[0] - target[0], resized[1] - target[1]
    if style == "corner":
        return 0, 0
    if style == "random":
        seed = seed_of(*random_crop)
        return seed % (spare_top + 1), (seed // (1 << 31)) % (spare_left + 1)
    return spare_top // 2, spare_left // 2
