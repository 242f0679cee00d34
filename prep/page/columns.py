"""What a manifest's columns add up to, as far as `prep.statistics` does not count it: batches, captions.

A new figure is a line in `summary`. A manifest may have a million rows: columns are reckoned with, never row objects.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from prep.statistics import Statistics, kinds_of
from schemas import tables
from schemas.rows import ImageRow, from_columns

Numbers: TypeAlias = npt.NDArray[np.float64]
Flags: TypeAlias = npt.NDArray[np.bool_]
Indices: TypeAlias = npt.NDArray[np.int64]

_FREQUENT = 8  # captions
_LONGEST = 3
_WITHOUT = 12  # paths


@dataclass(frozen=True, slots=True)
class Figure:
    """A number with its name."""

    label: str
    value: int | float
    note: str = ""


@dataclass(frozen=True, slots=True)
class Bucket:
    """A line of the bucket table."""

    name: str
    width: int
    height: int
    images: int
    share: float  # of the largest bucket
    batches: int  # in an epoch
    last: int  # samples of the last one


@dataclass(frozen=True, slots=True)
class Captions:
    """What the captions of kept images are like."""

    figures: tuple[Figure, ...]
    sources: tuple[Figure, ...]
    words: Indices  # of each caption
    frequent: tuple[tuple[str, int], ...]  # those of several images
    longest: tuple[tuple[str, int, int], ...]  # text, words, characters
    without: tuple[str, ...]  # paths, the first few
    num_without: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """The columns of a manifest, and as arrays those that everything asks for; NaN is null."""

    table: Any
    kept: Flags
    width: Numbers
    height: Numbers

    def of_kept(self, name: str) -> Any:
        """Return a column of the kept images."""
        return self.table[name].filter(pa.array(self.kept))

    def rows(self, indices: Indices) -> list[ImageRow]:
        """Return a few rows as objects."""
        return from_columns(self.table.take(pa.array(indices)), ImageRow)


def read(path: Path) -> Manifest:
    """Read a manifest's columns; raises UserError if the file is damaged."""
    table = tables.read_columns(path, ImageRow)
    kept = pc.is_null(table["reject"]).to_numpy()
    return Manifest(table, kept, numbers(table["width"]), numbers(table["height"]))


def numbers(column: Any) -> Numbers:
    """Return a column of numbers as an array; NaN is null."""
    return np.asarray(pc.cast(column, pa.float64()).to_numpy(), dtype=np.float64)


def counts(column: Any, null: str) -> tuple[Figure, ...]:
    """Count the values of a column, the most frequent first; `null` names what has none."""
    found = [(one["values"] or null, one["counts"]) for one in pc.value_counts(column).to_pylist()]
    return tuple(Figure(name, count) for name, count in sorted(found, key=lambda item: (-item[1], item[0])))


def summary(manifest: Manifest, found: Statistics) -> tuple[Figure, ...]:
    """Return the figures that head a dataset; the first three are the seen, the kept and the rejected."""
    area = manifest.width[manifest.kept] * manifest.height[manifest.kept]
    faces = () if found.faces is None else (Figure("with a face", found.faces, _share(found.faces, found.kept)),)
    return (
        Figure("seen", len(manifest.kept)),
        Figure("kept", found.kept),
        Figure("rejected", len(manifest.kept) - found.kept),
        Figure("captions", found.captions),
        Figure("buckets", len(found.buckets)),
        Figure("enlarged", found.upscaled, _share(found.upscaled, found.kept)),
        *faces,
        Figure("megapixels", float(np.nansum(area)) / 1e6, "kept images, as they are"),
    )


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%} of the kept" if part else ""


def oddities(found: Statistics) -> tuple[Figure, ...]:
    """Return what of the kept images is out of the ordinary."""
    equal = (Figure("same bytes as another", found.equal_files),) if found.equal_files else ()
    return (*(Figure(name, count) for name, count in found.oddities.items()), *equal)


def buckets(found: Statistics, batch_size: int, repeats: int) -> list[Bucket]:
    """Return the buckets, narrow ones first, and what an epoch of each comes to."""
    largest = max(found.buckets.values(), default=1)
    lines = []
    for name, images in found.buckets.items():
        width, _, height = name.partition("x")
        showings = images * (repeats + 1)
        batches = -(-showings // batch_size)
        last = showings - (batches - 1) * batch_size
        lines.append(Bucket(name, int(width), int(height), images, images / largest, batches, last))
    return sorted(lines, key=lambda line: (line.width / line.height, line.width))


def kinds(manifest: Manifest) -> Any:
    """Return the kind of every reject, null for a kept image."""
    return kinds_of(manifest.table["reject"])


def captions(manifest: Manifest) -> Captions:
    """Measure the captions of kept images; words are what white space separates."""
    column = manifest.of_kept("captions")
    each = np.asarray(pc.list_value_length(column).to_numpy(), dtype=np.int64)
    texts = pc.list_flatten(column)
    words = np.asarray(pc.count_substring_regex(texts, r"[^\s\p{Z}]+").to_numpy(), dtype=np.int64)
    characters = np.asarray(pc.utf8_length(texts).to_numpy(), dtype=np.int64)
    tallied = pc.value_counts(texts)
    tally = pa.table({"text": tallied.field("values"), "count": tallied.field("counts")})
    several = tally.filter(pc.greater(tally["count"], 1)).sort_by([("count", "descending"), ("text", "ascending")])
    longest = np.argsort(-characters, kind="stable")[:_LONGEST]
    without = manifest.of_kept("path").filter(pa.array(each == 0))
    return Captions(
        figures=(
            Figure("images with captions", int((each > 0).sum())),
            Figure("without", len(without)),
            *_spread_of("captions per image", each),
            *_spread_of("words", words),
            Figure("different captions", tally.num_rows),
        ),
        sources=counts(manifest.of_kept("caption_source"), "none"),
        words=words,
        frequent=tuple((one["text"], one["count"]) for one in several.slice(0, _FREQUENT).to_pylist()),
        longest=tuple((texts[int(at)].as_py(), int(words[at]), int(characters[at])) for at in longest),
        without=tuple(without.slice(0, _WITHOUT).to_pylist()),
        num_without=len(without),
    )


def _spread_of(label: str, values: Indices) -> tuple[Figure, ...]:
    if not len(values):
        return ()
    note = f"{int(values.min()):,} to {int(values.max()):,}"
    median = float(np.median(values))
    return (Figure(f"{label}, median", int(median) if median.is_integer() else median, note),)
