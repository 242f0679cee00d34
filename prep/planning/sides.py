"""Pairs before they are made, as planning counts them: the pictures that stand in each place of a set of pairs.

`sides_of` is the way in; what belongs together is prep/matching.py's to say.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prep.matching import Manifest, Mask, Matched, Numbers, boxes_of, match
from schemas.datasets import DatasetConfig
from schemas.recipes import degraded_at_source, recipe_text


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
    draw: int = 0  # of several degradations of each image, which; the others take the place of the first in turn
    to_file: bool = False  # degraded, and kept as a picture
    sizes: Numbers | None = None  # width and height of each image, if it is degraded at its own size
    captions: pa.Array | None = None  # a list for each pair
    instead: tuple[str, ...] = ()  # prompts that take the place of captions, in every pair


@dataclass(frozen=True, slots=True)
class Match:
    """Pairs of one set of targets that have the same references."""

    target: DatasetConfig
    kept: int  # targets, paired or not
    paths: pa.Array  # of the targets that are paired
    sides: tuple[Side, ...]  # targets first, then references in their order
    rejected: dict[str, int]  # kind of reason -> targets
    examples: dict[str, tuple[str, str, str]]  # kind of reason -> set of references, the first target's path, reason

    @property
    def count(self) -> int:
        """Return the targets that are paired."""
        return len(self.paths)

    @property
    def shown(self) -> tuple[Side, ...]:
        """Return what is shown at once: of several degradations the first stands for all."""
        return tuple(side for side in self.sides if side.draw == 0)


def sides_of(target: Manifest, references: Sequence[Manifest]) -> list[Match]:
    """Match a set, and part its pairs by the references that they have; there is one part at least.

    The first part also tells of the targets that make no pair.
    """
    matched = match(target, references)
    patterns, which = np.unique(matched.present, axis=0, return_inverse=True)
    whole = [place for place, pattern in enumerate(patterns) if pattern.all()]
    parts = range(len(patterns)) if target.dataset.on_unpaired == "train_without_reference" else whole
    groups = [np.flatnonzero(which.reshape(-1) == place) for place in parts]
    rejected: dict[str, int] = {}
    examples: dict[str, tuple[str, str, str]] = {}
    if target.dataset.on_unpaired != "train_without_reference":
        rejected, examples = _faults(matched)
    first, *others = [_part(target, matched, rows) for rows in groups] or [
        _part(target, matched, np.array([], np.int64))
    ]
    count = matched.images.num_rows
    parted = [Match(target.dataset, count, first[0], first[1], rejected, examples)]
    return parted + [Match(target.dataset, len(paths), paths, sides, {}, {}) for paths, sides in others]


def _faults(matched: Matched) -> tuple[dict[str, int], dict[str, tuple[str, str, str]]]:
    """Count the targets without a proper reference by the first reason, with the first example of each."""
    firsts = matched.first_faults
    rejected: dict[str, int] = {}
    examples: dict[str, tuple[str, str, str]] = {}
    for row, place, kind, reason in matched.faults():
        if firsts[row] == place:
            rejected[kind] = rejected.get(kind, 0) + 1
            said = matched.found[place].references.dataset.id, matched.images["path"][row].as_py(), reason
            examples.setdefault(kind, said)
    return rejected, examples


def _part(target: Manifest, matched: Matched, rows: Numbers) -> tuple[pa.Array, tuple[Side, ...]]:
    """Return the paths of some targets, and their pictures; all of them have the same references."""
    dataset, images = target.dataset, matched.images.take(pa.array(rows))
    present = matched.present[rows[0]] if len(rows) else np.ones(len(matched.found), np.bool_)
    first = _side(target, images, dataset, boxes_of(images), np.ones(images.num_rows, np.bool_))
    sides = [first]
    for found, here in zip(matched.found, present.tolist(), strict=True):
        if not here:
            continue
        references = found.references
        files = references.rows.take(pa.array(found.at[rows]))
        boxes = first.boxes if references.strict else boxes_of(files)
        moves = (boxes == first.boxes).all(axis=1)
        sides.append(_side(references, files, dataset if references.strict else references.dataset, boxes, moves))
    sizes = np.stack([pc.fill_null(images[name], 0).to_numpy() for name in ("width", "height")], axis=1)
    sizes = sizes.astype(np.int64)
    for entry in dataset.conditioning:
        recipe = recipe_text(entry.recipe)
        at_source = sizes if degraded_at_source(recipe) else None
        for draw in range(entry.variants):
            sides.append(
                Side(dataset.id, first.boxes, first.moves, first.ids, first.named, dataset.view, dataset, recipe, draw,
                     entry.storage == "files", at_source, None, tuple(entry.captions))
            )  # fmt: skip
    paths: pa.Array = images["path"].combine_chunks()
    return paths, tuple(sides)


def _side(manifest: Manifest, images: pa.Table, sized: DatasetConfig, boxes: Numbers, moves: Mask) -> Side:
    dataset = manifest.dataset
    named = images["image_id"].null_count == 0
    prefix = pa.scalar(f"{dataset.id}/")
    paths = pc.binary_join_element_wise(prefix, images["path"], "")
    ids = pc.coalesce(images["image_id"], paths).combine_chunks()
    captions = images["captions"].combine_chunks()
    return Side(dataset.id, boxes, moves, ids, named, dataset.view, sized, captions=captions)


def prompts_of(pairs: Match) -> pa.Array:
    """Return the prompts that these pairs may be shown, each once: as prep/pairing.py writes them, prep/cache.py reads.

    A single reference's prompts stand in for its target's captions; of several, both are needed.
    """
    own, references = pairs.sides[0].captions, pairs.shown[1:]
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
