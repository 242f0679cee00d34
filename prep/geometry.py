"""Buckets, resizes and crops: pure functions from an image's size to the picture a model trains on.

The arithmetic equals SimpleTuner's for the settings supported here, so that the same file falls into the same bucket;
`fit` is the way in. Rounding is half-to-even throughout, truncation is towards zero.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from schemas.keys import seed_of, seeds_of
from schemas.rows import Geometry

Size: TypeAlias = tuple[int, int]  # width, height
Integers: TypeAlias = npt.NDArray[np.int64]

# Areas in megapixels that stand for a customary square: within 0.05, the edge is taken from here.
_CUSTOMARY = {0.25: 512, 0.5: 768, 1.0: 1024, 2.0: 1536, 4.0: 2048}

# Aspect ratios of a strict reference and its target may differ by this share: what rounding to whole pixels explains.
ASPECT_TOLERANCE = 0.02

# An image of this much off a square may be resized to one without a crop: a change of shape that nobody sees.
_NEARLY_SQUARE = 0.0101


@dataclass(slots=True)
class Targets:
    """The target size of each bucket of one (resolution, alignment): the first image of a bucket decides it."""

    sizes: dict[float, Size] = field(default_factory=dict)  # aspect of a bucket -> target
    others: dict[float, set[Size]] = field(default_factory=dict)  # sizes that later images would have had

    def first(self, aspect: float, size: Size) -> Size:
        """Return the size of a bucket, `size` if it has none yet."""
        chosen = self.sizes.setdefault(aspect, size)
        if chosen != size:
            self.others.setdefault(aspect, set()).add(size)
        return chosen


@dataclass(frozen=True, slots=True)
class Policy:
    """The settings of one dataset that decide sizes and crops."""

    resolution: float
    resolution_type: Literal["pixel", "area", "pixel_area"]
    alignment: int
    rounding: int = 2  # decimals of an aspect ratio
    crop_aspect: Literal["preserve", "square", "closest", "random"] = "preserve"
    aspects: tuple[tuple[float, float], ...] = ()  # (aspect, weight), for `closest` and `random`
    crop_style: Literal["random", "center", "centre", "corner", "face"] = "random"
    downsample: float | None = None  # resolution to scale to before a crop
    least_aspect: float | None = None  # width / height
    most_aspect: float | None = None
    most_upscale: float | None = None  # share by which an image may be enlarged

    def by_area(self, resolution: float) -> tuple[float, bool]:
        """Return (pixels or megapixels, whether it is an area)."""
        if self.resolution_type == "pixel_area":
            return int(resolution) ** 2 / 1e6, True
        return resolution, self.resolution_type == "area"

    def aspect_of(self, size: Size) -> float:
        """Return an image's aspect ratio, rounded as buckets are named."""
        return round(size[0] / size[1], self.rounding)


def fit(size: Size, policy: Policy, targets: Targets, name: tuple[object, ...]) -> Geometry | str:
    """Return how an image of `size` becomes a training picture, or the reason why it cannot.

    `targets` remembers the target size of each bucket of this (resolution, alignment); call in a fixed order of
    images and pass the same. `name` seeds what is drawn: (seed, dataset id, path).
    """
    aspects = aspects_for(size, policy)
    if isinstance(aspects, str):
        return aspects
    fitted = framed(size, policy, targets, drawn_aspect(aspects, name))
    return placed(fitted, policy.crop_style, name) if isinstance(fitted, Geometry) else fitted


def aspects_for(size: Size, policy: Policy) -> Sequence[tuple[float, float]] | str:
    """Return the (aspect, weight) that an image may be cropped to, or the reason why there is none.

    More than one only under `crop_aspect: random`.
    """
    own = policy.aspect_of(size)
    if own == 0:
        return f"too narrow: {size[0]}x{size[1]}, its aspect ratio rounds to 0"
    if round(size[1] / size[0], policy.rounding) == 0:
        return f"too wide: {size[0]}x{size[1]}, the inverse of its aspect ratio rounds to 0"
    if policy.least_aspect is not None and own < policy.least_aspect:
        return f"too narrow: {size[0]}x{size[1]}, minimum_aspect_ratio is {policy.least_aspect:g}"
    if policy.most_aspect is not None and own > policy.most_aspect:
        return f"too wide: {size[0]}x{size[1]}, maximum_aspect_ratio is {policy.most_aspect:g}"
    if policy.crop_aspect not in ("closest", "random"):
        return [(1.0 if policy.crop_aspect == "square" else own, 1.0)]
    allowed = [one for one in policy.aspects if _enlarged(size, policy, one[0]) is None]
    if not allowed:
        return _enlarged(size, policy, min(policy.aspects)[0]) or "too small: no aspect is left"
    return [min(allowed, key=lambda one: abs(one[0] - own))] if policy.crop_aspect == "closest" else allowed


def drawn_aspect(aspects: Sequence[tuple[float, float]], name: tuple[object, ...]) -> float:
    """Draw one aspect by its weight."""
    if len(aspects) == 1:
        return aspects[0][0]
    left = seed_of(*name, "aspect") / 2**63 * sum(weight for _, weight in aspects)
    for aspect, weight in aspects:
        left -= weight
        if left < 0:
            return aspect
    return aspects[-1][0]


def _enlarged(size: Size, policy: Policy, ratio: float) -> str | None:
    """Return the reason why an image would be enlarged too much for an aspect, None if it would not."""
    fitted = framed(size, policy, None, ratio)
    return fitted if isinstance(fitted, str) else None


def framed(size: Size, policy: Policy, targets: Targets | None, ratio: float) -> Geometry | str:
    """Return target and intermediary size of an image cropped to an aspect, the box in the middle; or why not."""
    resolution, area = policy.by_area(policy.resolution)
    edge = _edge(resolution, area, policy.alignment)
    if policy.crop_aspect == "square":
        target, resized = (edge, edge), _sizes(size, 1.0, resolution, area, policy, None)[1]
        resized = _cover(resized, target)
    else:
        target, resized = _sizes(size, ratio, resolution, area, policy, targets)
        if round(target[0] / target[1], policy.rounding) == 1.0 and resized[0] < edge:
            target = (edge, edge)
            resized = target if abs(size[0] / size[1] - 1) <= _NEARLY_SQUARE else _cover(resized, target)
    if policy.downsample is not None and not _at_size(size, target, edge, area):
        downsample, down_area = policy.by_area(policy.downsample)
        own = policy.aspect_of(size)
        resized = _cover(_sizes(size, own, downsample, down_area, policy, None)[1], target)
    scale = max(resized[0] / size[0], resized[1] / size[1])
    if policy.most_upscale is not None and round(scale, 2) > 1 + policy.most_upscale:
        allowed = 1 + policy.most_upscale
        return f"too small: {size[0]}x{size[1]} would be enlarged {scale:.2f} times, allowed are {allowed:g}"
    return Geometry(*target, *resized, (resized[1] - target[1]) // 2, (resized[0] - target[0]) // 2)


def placed(
    fitted: Geometry, style: str, name: tuple[object, ...], variant: int = 0, face: Sequence[float] = ()
) -> Geometry:
    """Move the box of a geometry, which is in the middle, to where the crop style wants it.

    `name` and `variant` seed a random place; `face` is the centre of one, as shares of width and height.
    """
    if style == "corner":
        return replace(fitted, crop_top=0, crop_left=0)
    if style == "face":
        top, left = placed_on_face(fitted, face)
        return replace(fitted, crop_top=top, crop_left=left)
    if style == "random":
        spare_top = fitted.intermediary_height - fitted.target_height
        spare_left = fitted.intermediary_width - fitted.target_width
        draw = np.array([seed_of(*name, "crop", variant)])
        tops, lefts = random_places(draw, np.array([spare_top]), np.array([spare_left]))
        return replace(fitted, crop_top=int(tops[0]), crop_left=int(lefts[0]))
    return fitted


def crop_draws(name: tuple[object, ...], paths: Iterable[str], count: int, variant: int = 0) -> Integers:
    """Draw the 63 bits that decide where a random crop lies, for each path in place of the last part of `name`."""
    return np.fromiter(seeds_of(name[:-1], paths, ("crop", variant)), np.int64, count)


def random_places(draws: Integers, spare_tops: Integers, spare_lefts: Integers) -> tuple[Integers, Integers]:
    """Return (tops, lefts) of random crops inside the room that each has."""
    return draws % (spare_tops + 1), (draws >> 31) % (spare_lefts + 1)


def placed_on_face(fitted: Geometry, face: Sequence[float]) -> tuple[int, int]:
    """Return (top, left) of a crop centred on a face as far as the image goes; in the middle without one."""
    if len(face) != 2:
        return fitted.crop_top, fitted.crop_left
    top = round(face[1] * fitted.intermediary_height - fitted.target_height / 2)
    left = round(face[0] * fitted.intermediary_width - fitted.target_width / 2)
    spare_top = fitted.intermediary_height - fitted.target_height
    spare_left = fitted.intermediary_width - fitted.target_width
    return min(max(top, 0), spare_top), min(max(left, 0), spare_left)


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
        target = targets.first(round(target[0] / target[1], policy.rounding), target)
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
