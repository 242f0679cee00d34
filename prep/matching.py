"""Which reference file belongs to which target, and what is wrong with those that have none: over columns.

`match` is the way in, for `prep pairs` and `prep plan` alike. A new fault is a name in `KINDS`, a line in `_faults` and
a sentence in `reason`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import TypeAlias
from unicodedata import normalize

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from prep.geometry import ASPECT_TOLERANCE
from schemas.datasets import DatasetConfig

BOX = ("target_width", "target_height", "intermediary_width", "intermediary_height", "crop_top", "crop_left")
COLUMNS = ("path", "image_id", "width", "height", "fault", "captions", *BOX, "reject")  # of a manifest, all it takes

KINDS = (
    "no reference", "reference collides", "reference rejected", "orientation differs", "aspect differs",
    "reference equals target",
)  # fmt: skip
_MISSING, _COLLIDES, _REJECTED, _TURNED, _ASPECT, _EQUAL = range(len(KINDS))

# Rejects that say something of a reference's own bucket or set, which a strict one does without.
_OF_ITS_SET = ("too narrow", "too wide", "too small", "not drawn", "duplicate", "near duplicate")

_EXTENSION = r"([^/])\.[^./]*$"

Numbers: TypeAlias = npt.NDArray[np.int64]
Mask: TypeAlias = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Manifest:
    """What is known of a dataset's images."""

    dataset: DatasetConfig
    rows: pa.Table  # `COLUMNS` of schemas.rows.ImageRow
    stale: str | None = None  # why its images were looked at now; null if its manifest was read
    hashed: bool = True  # every image that could be read has an `image_id`
    absent: int = 0  # images of a list that are not downloaded yet: nothing is known of them

    @property
    def strict(self) -> bool:
        """Tell references that take their target's box."""
        return self.dataset.conditioning_type == "reference_strict"


@dataclass(frozen=True)
class Found:
    """The files of one set of references that belong to targets."""

    references: Manifest
    at: Numbers  # row of each target's file, -1 without one
    kinds: Numbers  # what is wrong with it: a number of `KINDS`, -1 for nothing
    resized: Numbers  # targets whose strict reference has another size, to be scaled
    unasked: Numbers  # rows of files that no target has the name of

    @cached_property
    def folded(self) -> Mapping[str, str]:
        """Map paths without extension, case and Unicode form to the first such path."""
        paths = self.references.rows["path"].to_pylist()
        return {_folded(path): path for path in reversed(paths)}

    @cached_property
    def by_stem(self) -> Mapping[str, list[str]]:
        """Map paths without extension to all such paths."""
        stems: dict[str, list[str]] = {}
        for path in self.references.rows["path"].to_pylist():
            stems.setdefault(_stem(path), []).append(path)
        return stems


@dataclass(frozen=True, slots=True)
class Matched:
    """The targets of one set, and what was found for them."""

    target: DatasetConfig
    view: str
    images: pa.Table  # the kept ones, in the order of their paths
    found: tuple[Found, ...]  # for each set of references

    @property
    def first_faults(self) -> Numbers:
        """Return for each target the number of the first set of references that has a fault, -1 without."""
        first = np.full(self.images.num_rows, -1)
        for place in reversed(range(len(self.found))):
            first[self.found[place].kinds >= 0] = place
        return first

    @property
    def kept(self) -> Mask:
        """Return which targets make pairs, under the policy of the set."""
        if self.target.on_unpaired == "train_without_reference":
            return np.ones(self.images.num_rows, np.bool_)
        return self.first_faults < 0

    @property
    def present(self) -> Mask:
        """Return which references each target is shown with: targets × sets of references."""
        columns = [one.kinds < 0 for one in self.found]
        return np.stack(columns, axis=1) if columns else np.zeros((self.images.num_rows, 0), np.bool_)

    def faults(self) -> Iterator[tuple[int, int, str, str]]:
        """Yield (row of the target, place of the set of references, kind, reason) of every fault."""
        for place, found in enumerate(self.found):
            rows = np.flatnonzero(found.kinds >= 0)
            if not len(rows):
                continue
            targets = self.images.take(pa.array(rows)).to_pylist()
            files = _rows_at(found.references.rows, found.at[rows])
            asking = self._asking(found) if (found.kinds == _COLLIDES).any() else {}
            for row, image, file in zip(rows.tolist(), targets, files, strict=True):
                kind = int(found.kinds[row])
                yield row, place, KINDS[kind], _reason(kind, image, file, asking.get(int(found.at[row]), ()), found)

    def _asking(self, found: Found) -> Mapping[int, Sequence[str]]:
        """Map rows of files to the paths of all targets that ask for them."""
        asking: dict[int, list[str]] = {}
        for at, path in zip(found.at.tolist(), self.images["path"].to_pylist(), strict=True):
            asking.setdefault(at, []).append(path)
        return asking


def match(target: Manifest, references: Sequence[Manifest]) -> Matched:
    """Find every kept target's files by their paths below their folders."""
    images = target.rows.filter(pc.is_null(target.rows["reject"])).combine_chunks()
    return Matched(target.dataset, target.dataset.view, images, tuple(_find(target, images, one) for one in references))


def _find(target: Manifest, images: pa.Table, references: Manifest) -> Found:
    files = references.rows
    at, collides = _paired(images["path"], files["path"], by_stem=target.dataset.ignore_extension)
    named, _ = _paired(target.rows["path"], files["path"], by_stem=target.dataset.ignore_extension)
    asked = np.zeros(files.num_rows, np.bool_)
    asked[named[named >= 0]] = True  # by rejected targets too: their references are no strays
    if files.num_rows == 0:
        kinds = np.full(len(at), _MISSING)
        return Found(references, at, kinds, np.array([], np.int64), np.array([], np.int64))
    kinds, resized = _kinds(target, images, references, at)
    kinds[collides] = _COLLIDES
    return Found(references, at, kinds, np.flatnonzero(resized & (kinds < 0)), np.flatnonzero(~asked))


def _positions(wanted: pa.ChunkedArray, paths: pa.ChunkedArray) -> Numbers:
    """Return the row of every wanted path, -1 where there is none."""
    if len(paths) == 0:
        return np.full(len(wanted), -1)
    found: Numbers = pc.fill_null(pc.index_in(wanted, value_set=paths.combine_chunks()), -1).to_numpy()
    return found.astype(np.int64)


def _paired(wanted: pa.ChunkedArray, paths: pa.ChunkedArray, *, by_stem: bool) -> tuple[Numbers, Mask]:
    """Return the row of every wanted path, and which are ambiguous.

    What has no file of its very path may be found without extension. It is ambiguous if several files are called so,
    or if several targets ask for one file.
    """
    exact = _positions(wanted, paths)
    if not by_stem or len(paths) == 0:
        return exact, np.zeros(len(exact), np.bool_)
    asked, there = (pc.replace_substring_regex(one, _EXTENSION, r"\1") for one in (wanted, paths))
    at = np.where(exact < 0, _positions(asked, there), exact)
    alone = -np.arange(1, len(at) + 1)  # no two targets without a file ask for the same
    shared = _repeated(pa.chunked_array([pa.array(np.where(at < 0, alone, at))]))
    return at, (exact < 0) & (at >= 0) & (_repeated(there)[at] | shared)


def _repeated(values: pa.ChunkedArray) -> Mask:
    """Tell which values occur more than once."""
    if len(values) == 0:
        return np.zeros(0, np.bool_)
    codes = values.combine_chunks().dictionary_encode().indices.to_numpy()
    repeated: Mask = np.bincount(codes)[codes] > 1
    return repeated


def _kinds(target: Manifest, images: pa.Table, references: Manifest, at: Numbers) -> tuple[Numbers, Mask]:
    """Return what is wrong with each target's file, and whether it has another size than its target."""
    rows = references.rows
    widths, heights = (pc.fill_null(rows[name], 0).to_numpy() for name in ("width", "height"))
    useless = (widths == 0) | (heights == 0) | rows["fault"].is_valid().to_numpy()
    if references.hashed:
        useless |= rows["image_id"].is_null().to_numpy()
    rejected = rows["reject"].is_valid()
    if references.strict:
        kind = pc.replace_substring_regex(rows["reject"], "(?s):.*", "")
        rejected = pc.and_not(rejected, pc.fill_null(pc.is_in(kind, value_set=pa.array(_OF_ITS_SET)), False))
    useless |= rejected.to_numpy()
    kinds = np.where(at < 0, _MISSING, np.where(useless[at], _REJECTED, -1))
    own_widths, own_heights = images["width"].to_numpy(), images["height"].to_numpy()
    resized = (widths[at] != own_widths) | (heights[at] != own_heights)
    if references.strict:
        with np.errstate(divide="ignore", invalid="ignore"):
            own, theirs = np.log(own_widths / own_heights), np.log(widths[at] / heights[at])
            differs = np.abs(theirs - own) > ASPECT_TOLERANCE
            turned = differs & (np.abs(theirs + own) <= ASPECT_TOLERANCE)
        kinds = np.where((kinds < 0) & differs, np.where(turned, _TURNED, _ASPECT), kinds)
    if target.dataset.identical_references == "refuse":
        kinds = np.where((kinds < 0) & _equal(target, images, references, at), _EQUAL, kinds)
    return kinds, resized & references.strict


def _equal(target: Manifest, images: pa.Table, references: Manifest, at: Numbers) -> Mask:
    """Tell references that are the target itself: its bytes, seen and cropped alike."""
    if target.dataset.upright != references.dataset.upright or not (target.hashed and references.hashed):
        return np.zeros(len(at), np.bool_)
    theirs = references.rows["image_id"].take(pa.array(np.maximum(at, 0)))
    same: Mask = np.array(pc.fill_null(pc.equal(images["image_id"], theirs), False).to_numpy(), np.bool_)
    if not references.strict:
        same &= (boxes_of(images) == boxes_of(references.rows)[at]).all(axis=1)
    return same


def _rows_at(table: pa.Table, at: Numbers) -> list[dict[str, object] | None]:
    """Return rows of a table, None in place of -1."""
    if table.num_rows == 0:
        return [None] * len(at)
    rows = table.select(["path", "width", "height", "reject"]).take(pa.array(np.maximum(at, 0))).to_pylist()
    return [row if place >= 0 else None for row, place in zip(rows, at.tolist(), strict=True)]


def _reason(
    kind: int, image: Mapping[str, object], file: Mapping[str, object] | None, asking: Sequence[str], found: Found
) -> str:
    """Say why a target has no proper reference; `asking` are all targets of the same file."""
    name, path = found.references.dataset.id, str(image["path"])
    if file is None:
        nearest = found.folded.get(_folded(path))
        near = f", but {nearest}" if nearest is not None else ""
        advice = _advice(path, nearest) if nearest is not None else ""
        return f"no reference: {name} has no {path}{near}{advice}"
    if kind == _COLLIDES:
        both = _colliding(path, str(file["path"]), asking, found)
        return f"{KINDS[kind]}: {both}; rename one, or leave ignore_extension out"
    size, own = f"{file['width']}x{file['height']}", f"{image['width']}x{image['height']}"
    said = {
        _REJECTED: f"{name}/{file['path']}: {file['reject']}",
        _TURNED: f"{name}/{file['path']} is {size}, its target {own}; turn one of them",
        _ASPECT: f"{name}/{file['path']} is {size}, its target {own}; reference_strict needs the same aspect",
        _EQUAL: f"{name}/{file['path']} has the very bytes of its target; "
        '"identical_references": "keep" keeps such pairs',
    }
    return f"{KINDS[kind]}: {said[kind]}"


def _colliding(path: str, file: str, asking: Sequence[str], found: Found) -> str:
    """Name both sides of a collision: two files of one target, or else two targets of one file."""
    name = found.references.dataset.id
    rival = next((one for one in found.by_stem[_stem(file)] if one != file), None)
    if rival is not None:
        return f"{name}/{file} and {name}/{rival} differ in their extension alone"
    other = next(one for one in asking if one != path)
    return f"{path} and {other} both ask for {name}/{file}"


def _stem(path: str) -> str:
    return str(PurePosixPath(path).with_suffix(""))


def _folded(path: str) -> str:
    return normalize("NFC", _stem(path)).casefold()


def _advice(path: str, nearest: str) -> str:
    """Say how a target and a file of nearly its path may be paired."""
    if normalize("NFC", path) == normalize("NFC", nearest):
        return ", which looks the same: one has its accents composed, the other not; rename one"
    return "; ignore_extension pairs them" if _stem(path) == _stem(nearest) else ""


def boxes_of(images: pa.Table) -> Numbers:
    """Return the geometry of images, zeros for those that have none."""
    columns = [pc.fill_null(images[name], 0).to_numpy() for name in BOX]
    return np.stack(columns, axis=1).astype(np.int64)
