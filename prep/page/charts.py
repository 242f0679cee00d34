"""Where the bars and marks of charts go, as shares of the chart; the templates draw them.

A new chart is a function that returns a `Histogram` or a `Scatter`, and a call of its macro in a template.
"""

import math
from dataclasses import dataclass

import numpy as np

from prep.page.columns import Flags, Indices, Manifest, Numbers
from schemas.datasets import DatasetConfig

_MARKS = 1500  # sizes that are drawn as they are; more are gathered in a grid
_GRID = 48  # cells of that grid along each axis
_OCTAVE = 6  # bars of the aspect chart between 1:1 and 2:1
_REACH = 15  # bars on each side of 1:1
_WORD_BARS = 24
_TICKS = 8  # at most, on an axis of sizes
_ASPECTS = ((1, 4), (1, 2), (2, 3), (1, 1), (3, 2), (2, 1), (4, 1))


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar of a histogram, kept images below rejected ones."""

    left: float
    width: float
    kept: float
    rejected: float
    title: str


@dataclass(frozen=True, slots=True)
class Histogram:
    """Bars over an axis; ticks are (place, text)."""

    bars: tuple[Bar, ...]
    ticks: tuple[tuple[float, str], ...]
    highest: int


@dataclass(frozen=True, slots=True)
class Mark:
    """Images of one size, or of about one."""

    x: float
    y: float
    radius: float  # in units of the drawing
    kept: bool
    title: str


@dataclass(frozen=True, slots=True)
class Scatter:
    """Sizes, width across and height up, on logarithmic axes of the same range."""

    marks: tuple[Mark, ...]
    ticks: tuple[tuple[float, str], ...]
    guide: tuple[tuple[float, float], ...]  # below and left of this line images are enlarged
    gathered: bool  # a mark stands for sizes that are about the same
    unknown: int  # images without a size


def aspects(manifest: Manifest) -> Histogram | None:
    """Count images by aspect ratio, on a logarithmic axis; what lies beyond its ends is in the outermost bars."""
    known = (manifest.width > 0) & (manifest.height > 0)
    if not known.any():
        return None
    octaves = np.log2(manifest.width[known] / manifest.height[known])
    place = np.clip(np.rint(octaves * _OCTAVE), -_REACH, _REACH).astype(np.int64) + _REACH
    names = [f"{2 ** ((bar - 0.5) / _OCTAVE):.2f} to {2 ** ((bar + 0.5) / _OCTAVE):.2f}" for bar in _range(_REACH)]
    names[0], names[-1] = f"below {names[0].split()[-1]}", f"above {names[-1].split()[0]}"
    ticks = tuple((_aspect_place(width / height), f"{width}:{height}") for width, height in _ASPECTS)
    return _histogram(place, manifest.kept[known], [f"aspect {name}" for name in names], ticks)


def _range(reach: int) -> range:
    return range(-reach, reach + 1)


def _aspect_place(aspect: float) -> float:
    return (math.log2(aspect) * _OCTAVE + _REACH + 0.5) / (2 * _REACH + 1)


def words(lengths: Indices) -> Histogram | None:
    """Count captions by their words; those far longer than the others share the last bar."""
    if not len(lengths):
        return None
    longest = int(lengths.max())
    usual = min(longest, max(_WORD_BARS - 1, 2 * int(np.percentile(lengths, 95, method="lower"))))
    step = math.ceil((usual + 1) / _WORD_BARS)
    count = usual // step + 1
    place = np.minimum(lengths // step, count - 1)
    starts = [bar * step for bar in range(count)]
    names = [f"{start}" if step == 1 else f"{start} to {start + step - 1}" for start in starts]
    every = math.ceil(count / 8)
    told = [bar for bar in range(0, count - 1, every) if bar <= count - 1 - 0.75 * every] + [count - 1]
    beyond = longest >= starts[-1] + step
    if beyond:
        names[-1] = f"{starts[-1]} or more"
    ticks = tuple(((bar + 0.5) / count, f"{starts[bar]}{'+' if beyond and bar == count - 1 else ''}") for bar in told)
    return _histogram(place, np.ones(len(lengths), dtype=np.bool_), [f"{name} words" for name in names], ticks)


def _histogram(place: Indices, kept: Flags, names: list[str], ticks: tuple[tuple[float, str], ...]) -> Histogram:
    """Count places, one bar for each name."""
    below = np.bincount(place[kept], minlength=len(names))
    above = np.bincount(place[~kept], minlength=len(names))
    highest = int((below + above).max())
    bars = []
    for bar, name in enumerate(names):
        told = f"{name}: {below[bar]:,}" + (f", and {above[bar]:,} rejected" if above[bar] else "")
        shares = (float(below[bar] / highest), float(above[bar] / highest))
        bars.append(Bar(bar / len(names), 1 / len(names), *shares, told))
    return Histogram(tuple(bars), ticks, highest)


def scatter(manifest: Manifest, dataset: DatasetConfig) -> Scatter | None:
    """Place images by size: as they are while there are few sizes, gathered in a grid otherwise."""
    known = (manifest.width > 0) & (manifest.height > 0)
    if not known.any():
        return None
    sizes, kept = np.stack([manifest.width[known], manifest.height[known]]), manifest.kept[known]
    low, high = math.log2(sizes.min()) - 0.25, math.log2(sizes.max()) + 0.25
    different, number = _tally(sizes, kept)
    gathered = different.shape[1] > _MARKS
    if gathered:
        cells = np.floor((np.log2(sizes) - low) / (high - low) * _GRID) + 0.5
        different, number = _tally(np.rint(2 ** (low + cells / _GRID * (high - low))), kept)
    places = (np.log2(different[:2]) - low) / (high - low)
    share = number / number.max()
    radius = np.maximum(0.9, 4.0 * np.sqrt(share)) if gathered else 2.4 + 1.8 * np.sqrt(share) * (number > 1)
    marks = [
        Mark(
            x=float(places[0, at]),
            y=float(places[1, at]),
            radius=float(radius[at]),
            kept=bool(different[2, at]),
            title=("about " if gathered else "") + _told(different[:, at], count),
        )
        for at, count in enumerate(number.tolist())
    ]
    ends = (low, high)
    return Scatter(tuple(marks), _ticks(ends), _guide(dataset, ends), gathered, int((~known).sum()))


def _tally(sizes: Numbers, kept: Flags) -> tuple[Indices, Indices]:
    """Return (width, height and whether kept of every different size; how many have it)."""
    width, height = sizes.astype(np.int64)
    packed, number = np.unique(width << 32 | height << 1 | kept, return_counts=True)
    return np.stack([packed >> 32, packed >> 1 & 0x7FFFFFFF, packed & 1]), number


def _told(size: Indices, count: int) -> str:
    return f"{size[0]}×{size[1]}: {count:,} {'kept' if size[2] else 'rejected'}"


def _ticks(ends: tuple[float, float]) -> tuple[tuple[float, str], ...]:
    """Mark powers of two, and what lies between where these are few."""
    powers = range(math.floor(ends[0]), math.ceil(ends[1]) + 1)
    every = max(1, math.ceil(len(powers) / _TICKS))
    parts = 1 if len(powers) > 5 else 2 if len(powers) > 3 else 4
    sizes = [2**power * (parts + part) // parts for power in powers if power % every == 0 for part in range(parts)]
    places = [((math.log2(size) - ends[0]) / (ends[1] - ends[0]), f"{size}") for size in sizes if size > 0]
    return tuple((place, text) for place, text in dict(places).items() if 0 <= place <= 1)


def _guide(dataset: DatasetConfig, ends: tuple[float, float]) -> tuple[tuple[float, float], ...]:
    """Draw the sizes that come to the dataset's `resolution`: an area, or a shorter edge."""
    low, high = ends
    if dataset.resolution_type == "pixel":
        edge = math.log2(dataset.resolution)
        line = [(edge, high + 9), (edge, edge), (high + 9, edge)]
    else:
        square = dataset.resolution_type == "area"
        area = math.log2(dataset.resolution * 1e6) if square else 2 * math.log2(dataset.resolution)
        line = [(low - 9, area - low + 9), (area - low + 9, low - 9)]
    return tuple(((x - low) / (high - low), (y - low) / (high - low)) for x, y in line)
