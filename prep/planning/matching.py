"""Pairs before they are made: what `prep pairs` would match, from the columns of manifests that need not be hashed.

`match` is the way in. Its reasons are those of prep/pairs.py; tests hold the two together.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from prep.geometry import ASPECT_TOLERANCE
from schemas.datasets import DatasetConfig
from schemas.project import Project
from schemas.recipes import recipe_text

COLUMNS = (
    "path", "image_id", "width", "height", "captions", "target_width", "target_height", "intermediary_width",
    "intermediary_height", "crop_top", "crop_left", "reject",
)  # fmt: skip
BOX = ("target_width", "target_height", "intermediary_width", "intermediary_height", "crop_top", "crop_left")

_REASONS = ("no reference", "reference rejected", "aspect differs")

Numbers = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Manifest:
    """What is known of a dataset's images."""

    dataset: DatasetConfig
    rows: pa.Table  # `COLUMNS` of schemas.rows.ImageRow
    stale: str | None  # why its images were looked at now; null if its manifest was read
    hashed: bool  # every image that could be read has an `image_id`
    absent: int = 0  # images of a list that are not downloaded yet: nothing is known of them


@dataclass(frozen=True, slots=True)
class Side:
    """The pictures that stand in one place of all pairs of a set: the targets, or one reference of each."""

    store: str  # dataset whose store holds their latents
    boxes: Numbers  # pairs × 6, in the order of `schemas.rows.Geometry`
    moves: Mask  # the crop is the target's: further random crops move it too
    ids: pa.Array  # `image_id`, or dataset and path of an image that was not identified
    named: bool  # every id is an `image_id`
    view: str
    resolution: DatasetConfig  # whose settings decide the size
    recipe: str | None = None
    to_file: bool = False  # degraded, and kept as a picture
    captions: pa.Array | None = None  # a list for each pair
    instead: tuple[str, ...] = ()  # prompts that take the place of captions, in every pair


@dataclass(frozen=True, slots=True)
class Match:
    """The pairs of one set of targets."""

    target: DatasetConfig
    kept: int  # targets, paired or not
    paths: pa.Array  # of the targets that have all their references
    sides: tuple[Side, ...]  # targets first, then references in their order
    rejected: dict[str, int]  # kind of reason -> targets
    examples: dict[str, tuple[str, str]]  # kind of reason -> the set of references, and the first target's path

    @property
    def count(self) -> int:
        """Return the targets that are paired."""
        return len(self.paths)


def match(project: Project, target: Manifest, references: Sequence[Manifest]) -> Match:
    """Find every kept target's references by its path, and describe those that would be made of it."""
    dataset = target.dataset
    images = target.rows.filter(pc.is_null(target.rows["reject"])).combine_chunks()
    places, why = [], np.full(images.num_rows, -1)
    examples: dict[str, tuple[str, str]] = {}
    for reference in references:
        at, reasons = _matched(images, reference)
        places.append(at)
        for kind in np.unique(reasons[(why < 0) & (reasons >= 0)]).tolist():
            row = int(np.flatnonzero((why < 0) & (reasons == kind))[0])
            examples.setdefault(_REASONS[kind], (reference.dataset.id, images["path"][row].as_py()))
        why = np.where(why < 0, reasons, why)
    good = why < 0
    images = images.filter(pa.array(good))
    first = _side(target, images, dataset, boxes_of(images), np.ones(images.num_rows, np.bool_))
    sides = [first]
    for reference, at in zip(references, places, strict=True):
        found, strict = reference.rows.take(pa.array(at[good])), _strict(reference)
        boxes = first.boxes if strict else boxes_of(found)
        moves = (boxes == first.boxes).all(axis=1)
        sides.append(_side(reference, found, dataset if strict else reference.dataset, boxes, moves))
    for entry in dataset.conditioning:
        sides.append(
            Side(dataset.id, first.boxes, first.moves, first.ids, first.named, dataset.view, dataset,
                 recipe_text(entry.recipe), entry.storage == "files", None, tuple(entry.captions))
        )  # fmt: skip
    counts = {name: int((why == kind).sum()) for kind, name in enumerate(_REASONS) if (why == kind).any()}
    return Match(dataset, len(good), images["path"].combine_chunks(), tuple(sides), counts, examples)


def _matched(images: pa.Table, reference: Manifest) -> tuple[Numbers, Numbers]:
    """Return the row of every target's reference, and the number of the reason why it has none, -1 without."""
    rows, strict = reference.rows, _strict(reference)
    if rows.num_rows == 0:
        return np.zeros(images.num_rows, np.int64), np.zeros(images.num_rows, np.int64)
    at = pc.fill_null(pc.index_in(images["path"], value_set=rows["path"].combine_chunks()), -1)
    at = at.to_numpy().astype(np.int64)
    widths, heights = (pc.fill_null(rows[name], 0).to_numpy() for name in ("width", "height"))
    useless = (widths == 0) | (heights == 0)
    if reference.hashed:
        useless |= rows["image_id"].is_null().to_numpy()
    if not strict:
        useless |= rows["reject"].is_valid().to_numpy()
    reasons = np.where(at < 0, 0, np.where(useless[at], 1, -1))
    if strict:
        with np.errstate(divide="ignore", invalid="ignore"):
            own = images["width"].to_numpy() / images["height"].to_numpy()
            difference = np.abs(np.log(widths[at] / heights[at] / own))
        reasons = np.where((reasons < 0) & (difference > ASPECT_TOLERANCE), 2, reasons)
    return at, reasons


def _strict(reference: Manifest) -> bool:
    return reference.dataset.conditioning_type == "reference_strict"


def _side(manifest: Manifest, images: pa.Table, sized: DatasetConfig, boxes: Numbers, moves: Mask) -> Side:
    dataset = manifest.dataset
    named = images["image_id"].null_count == 0
    prefix = pa.scalar(f"{dataset.id}/")
    paths = pc.binary_join_element_wise(prefix, images["path"], "")
    ids = pc.coalesce(images["image_id"], paths).combine_chunks()
    captions = images["captions"].combine_chunks()
    return Side(dataset.id, boxes, moves, ids, named, dataset.view, sized, captions=captions)


def boxes_of(images: pa.Table) -> Numbers:
    """Return the geometry of kept images."""
    columns = [pc.fill_null(images[name], 0).to_numpy() for name in BOX]
    return np.stack(columns, axis=1).astype(np.int64)


def prompts_of(pairs: Match) -> pa.Array:
    """Return the prompts that these pairs may be shown, each once: as prep/pairs.py writes them, prep/cache.py reads.

    A single reference's prompts stand in for its target's captions; of several, both are needed.
    """
    own, references = pairs.sides[0].captions, pairs.sides[1:]
    assert own is not None, "targets have captions, if empty ones"
    if pairs.count == 0:
        return pa.array([], pa.string())
    theirs = [pa.array(side.instead, pa.string()) for side in references if side.instead]
    theirs += [side.captions.flatten() for side in references if side.captions is not None]
    if len(references) == 1 and references[0].instead:
        own = own.slice(0, 0)
    elif len(references) == 1 and references[0].captions is not None:
        own = own.filter(pc.equal(pc.list_value_length(references[0].captions), 0))
    return pc.unique(pa.concat_arrays([own.flatten(), *theirs]))
