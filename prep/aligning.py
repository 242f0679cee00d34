"""Whether strict references lie on their targets: every pair compared on the pool, once.

`compare_all` is the way in; the measure itself is prep/alignment.py's. What the last table says of the same two images
and the same crop is taken from there.
"""

from collections.abc import Iterator
from dataclasses import astuple, dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from prep.alignment import MEASURES, TRUSTED, Alignment, Measures, compare, misaligned
from prep.matching import Found, Matched, boxes_of
from prep.pixels import Picture, Refusal, bytes_of
from prep.places import place_of
from prep.pool import Crew
from schemas.console import progress
from schemas.project import Project
from schemas.rows import Geometry

_ZOOMED = 256  # pixels from the middle to where a zoom is counted as a shift, to compare the two
_LIMIT_S = 600.0  # that one pair may take
_AT_ONCE = 8192  # pairs that are described at once: what bounds memory

Key: TypeAlias = tuple[str, str, str, str, tuple[int, ...]]  # ids and views of both, the target's box


@dataclass(frozen=True, slots=True)
class Comparison:
    """How the references of one set of targets lie on them."""

    measures: Measures
    accused: tuple[tuple[int, int, str], ...]  # row of the target, place of the set of references, reason
    compared: int  # now, not before
    uncertain: int  # that differ too much, or show too little, to tell

    @classmethod
    def none(cls) -> "Comparison":
        """Return that of no pair."""
        return cls({}, (), 0, 0)


def compare_all(project: Project, matched: Matched, known: pa.Table | None, crew: Crew, *, dry_run: bool) -> Comparison:
    """Compare every strict reference of a file with its target; one that cannot be read is not compared."""
    check = matched.target.alignment_check
    strict = [place for place, found in enumerate(matched.found) if found.references.strict]
    if not check.enabled or not strict:
        return Comparison.none()
    before = _remembered(known)
    measures: dict[int, npt.NDArray[np.float64]] = {}
    accused, compared, uncertain = [], 0, 0
    for place in strict:
        found = matched.found[place]
        rows = np.flatnonzero(found.kinds < 0)
        numbers = np.full((matched.images.num_rows, len(MEASURES)), np.nan)
        compared += _compare(project, matched, found, (rows, numbers), before, (crew, dry_run))
        measures[place] = numbers
        for row in np.flatnonzero(~np.isnan(numbers[:, 0])).tolist():
            limits = check.maximum_shift, check.maximum_scale, check.minimum_similarity
            found_there = Alignment(*numbers[row].tolist())
            if reason := misaligned(found_there, *limits):
                accused.append((row, place, reason))
            else:
                uncertain += found_there.confidence < TRUSTED
    return Comparison(measures, tuple(accused), compared, uncertain)


def worst_first(comparison: Comparison) -> list[tuple[int, int, str]]:
    """Sort the accused: those that show another picture, then by how far they lie off."""

    def badness(accused: tuple[int, int, str]) -> tuple[float, ...]:
        row, place, _ = accused
        shift_x, shift_y, scale, similarity, confidence = comparison.measures[place][row].tolist()
        another = confidence < TRUSTED
        off = float(np.hypot(shift_x, shift_y)) + abs(scale - 1) * _ZOOMED
        return (0, similarity, row) if another else (1, -off, row)

    return sorted(comparison.accused, key=badness)


def _compare(
    project: Project,
    matched: Matched,
    found: Found,
    wanted: tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]],
    before: dict[Key, tuple[float, ...]],
    work: tuple[Crew, bool],
) -> int:
    """Fill in how references lie, from before or by looking; return how many were looked at."""
    (rows, numbers), (crew, dry_run), looked = wanted, work, 0
    with progress(f"compare {found.references.dataset.id}", len(rows), "pair") as bar:
        for first in range(0, len(rows), _AT_ONCE):
            some = rows[first : first + _AT_ONCE]
            pairs = list(_pairs(project, matched, found, some))
            for row, pair in zip(some.tolist(), pairs, strict=True):
                numbers[row] = before.get(pair.key, np.nan)
            new = [(row, pair) for row, pair in zip(some.tolist(), pairs, strict=True) if pair.key not in before]
            looked += len(new)
            bar.update(len(some) - len(new))
            if dry_run:
                continue
            limit_s = _LIMIT_S if crew.workers > 1 else None
            compared = crew.each(look, [pair for _, pair in new], limit_s)
            for (row, _), (_, result) in zip(new, compared, strict=True):
                if isinstance(result, Alignment):
                    numbers[row] = astuple(result)
                bar.update()
    return looked


@dataclass(frozen=True, slots=True)
class Pair:
    """Two files to be compared."""

    target: Picture
    reference: Picture

    @property
    def key(self) -> Key:
        """Identify what the comparison depends on."""
        one, other = self.target, self.reference
        return one.image_id, other.image_id, one.view, other.view, one.geometry.as_key()


def look(pair: Pair) -> Alignment | Refusal:
    """Read both files of a pair and compare them."""
    target, reference = bytes_of(pair.target), bytes_of(pair.reference)
    for data in (target, reference):
        if isinstance(data, Refusal):
            return data
    assert isinstance(target, bytes) and isinstance(reference, bytes)
    found = compare(target, pair.target.view, reference, pair.reference.view, pair.target.geometry)
    return Refusal(found, lasting=True) if isinstance(found, str) else found


def _pairs(project: Project, matched: Matched, found: Found, rows: npt.NDArray[np.int64]) -> Iterator[Pair]:
    here, there = place_of(project, matched.target), place_of(project, found.references.dataset)
    images = matched.images.take(pa.array(rows))
    files = found.references.rows.take(pa.array(found.at[rows])).select(["path", "image_id"]).to_pylist()
    named, boxes = images.select(["path", "image_id"]).to_pylist(), boxes_of(images).tolist()
    for image, file, box in zip(named, files, boxes, strict=True):
        geometry = Geometry(*box)
        yield Pair(
            Picture(here, image["path"], image["image_id"], matched.view, geometry),
            Picture(there, file["path"], file["image_id"], found.references.dataset.view, geometry),
        )


def _remembered(known: pa.Table | None) -> dict[Key, tuple[float, ...]]:
    """Return what the last pair table says."""
    if known is None:
        return {}
    rows = known.filter(pc.equal(known["variant"], 0)).combine_chunks()
    references = rows["references"].combine_chunks()
    parents = pc.list_parent_indices(references)
    flat = references.flatten()
    compared = flat.field("shift_x").is_valid()
    flat, rows = flat.filter(compared), rows.take(parents.filter(compared))
    keys = zip(
        rows["target_image_id"].to_pylist(), flat.field("image_id").to_pylist(), rows["view"].to_pylist(),
        flat.field("view").to_pylist(), [tuple(box.values()) for box in rows["geometry"].to_pylist()], strict=True,
    )  # fmt: skip
    values = zip(*(flat.field(name).to_pylist() for name in MEASURES), strict=True)
    return dict(zip(keys, values, strict=True))
