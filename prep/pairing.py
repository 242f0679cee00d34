"""Pair tables from what was matched: columns in, columns out, so that a million pairs are an ordinary set.

`pair_table` is the way in. A new column of `PairRow` or `Reference` is computed here.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prep.alignment import MEASURES, Measures
from prep.degrade import realise
from prep.frames import name_of
from prep.geometry import crop_draws, random_places
from prep.matching import BOX, Mask, Matched, Numbers, boxes_of
from schemas.datasets import DatasetConfig, Generator
from schemas.keys import canonical, degrade_seeds, digests_of, seeds_of
from schemas.project import Project
from schemas.recipes import recipe_text
from schemas.rows import PairRow, Reference, arrow_schema

_SAMPLE_ID_DIGITS = 16
_TYPES = {field.name: field.type for field in arrow_schema(PairRow)}
_REFERENCE = {field.name: field.type for field in arrow_schema(Reference)}


@dataclass(frozen=True, slots=True)
class _Rows:
    """Which target and which variant each row of the table is."""

    target: Numbers
    variant: Numbers
    kept: Mask

    def take(self, values: pa.Array | pa.ChunkedArray) -> pa.Array:
        """Spread values of targets over the rows."""
        taken = values.take(pa.array(self.target))
        return taken.combine_chunks() if isinstance(taken, pa.ChunkedArray) else taken


def pair_table(project: Project, matched: Matched, measures: Measures, rejects: Mapping[int, str]) -> pa.Table:
    """Return the rows of `PairRow`: every variant of every target that is kept, and the others with a reason.

    `rejects` maps rows of targets to reasons; `measures` says how references lie on their targets.
    """
    dataset, images = matched.target, matched.images
    rows = _rows(matched, rejects)
    boxes = _boxes(project, dataset, matched, rows)
    sides = [*_files(matched, measures, rows, boxes), *_generated(project, dataset, matched, rows, boxes)]
    present = _present(matched, rows)
    references, prompts = _references(images, rows, sides, present)
    ids = _sample_ids(dataset, images, rows)
    reasons = [
        None if kept else rejects[row] for row, kept in zip(rows.target.tolist(), rows.kept.tolist(), strict=True)
    ]
    columns = {
        "sample_id": ids,
        "dataset_id": _constant(dataset.id, len(ids)),
        "target_image_id": rows.take(images["image_id"]),
        "target_path": rows.take(images["path"]),
        "variant": pa.array(rows.variant),
        "variants": _constant(dataset.variants, len(ids)),
        "geometry": _geometry(boxes),
        "view": _constant(matched.view, len(ids)),
        "references": references,
        "prompts": prompts,
        "prompt": _drawn(project, ids, prompts),
        "bucket": _buckets(boxes),
        "repeats": _constant(dataset.repeats, len(ids)),
        "reject": pa.array(reasons, pa.string()),
    }
    return pa.table({name: columns[name].cast(_TYPES[name]) for name in _TYPES}, schema=arrow_schema(PairRow))


def _rows(matched: Matched, rejects: Mapping[int, str]) -> _Rows:
    count, variants = matched.images.num_rows, matched.target.variants
    kept = np.ones(count, np.bool_)
    kept[list(rejects)] = False
    times = np.where(kept, variants, 1)
    target = np.repeat(np.arange(count), times)
    first = np.repeat(np.cumsum(times) - times, times)
    return _Rows(target, np.arange(len(target)) - first, kept[target])


def _boxes(project: Project, dataset: DatasetConfig, matched: Matched, rows: _Rows) -> Numbers:
    """Return the geometry of every row: further random crops lie elsewhere."""
    boxes = boxes_of(matched.images)[rows.target]
    for crop in range(1, dataset.crops):
        here = np.flatnonzero(rows.variant % dataset.crops == crop)
        paths = matched.images["path"].take(pa.array(rows.target[here])).to_pylist()
        draws = crop_draws(name_of(project, dataset, ""), paths, len(here), crop)
        spare_left, spare_top = (boxes[here, 2 + side] - boxes[here, side] for side in (0, 1))
        boxes[here, 4], boxes[here, 5] = random_places(draws, spare_top, spare_left)
    return boxes


def _files(matched: Matched, measures: Measures, rows: _Rows, boxes: Numbers) -> Iterator[pa.StructArray]:
    """Yield the references that are files, a row for each pair, whether it has one or not."""
    own = boxes_of(matched.images)
    for place, found in enumerate(matched.found):
        dataset, at = found.references.dataset, np.maximum(found.at, 0)[rows.target]
        if found.references.rows.num_rows == 0:
            yield _nobody(len(at))
            continue
        files = found.references.rows.take(pa.array(at))
        theirs = boxes
        if not found.references.strict:
            theirs = boxes_of(files)
            shared = (theirs == own[rows.target]).all(axis=1)  # one that has its target's box moves with it
            theirs = np.where(shared[:, None], boxes, theirs)
        numbers = measures.get(place)
        known = {
            name: pa.array(numbers[rows.target, column], mask=np.isnan(numbers[rows.target, column]))
            for column, name in enumerate(MEASURES)
        } if numbers is not None else {}  # fmt: skip
        columns = {
            "dataset_id": _constant(dataset.id, len(at)),
            "image_id": files["image_id"].combine_chunks(),
            "path": files["path"].combine_chunks(),
            "bucket": _buckets(theirs),
            "geometry": _geometry(theirs),
            "view": _constant(dataset.view, len(at)),
            "prompts": files["captions"].combine_chunks(),
        }
        yield _structs({**columns, **known}, len(at))


def _generated(
    project: Project, dataset: DatasetConfig, matched: Matched, rows: _Rows, boxes: Numbers
) -> Iterator[pa.StructArray]:
    """Yield the references that are made of their targets."""
    for name, entry in zip(dataset.generated_ids, dataset.conditioning, strict=True):
        ids, recipe, count = rows.take(matched.images["image_id"]), recipe_text(entry.recipe), len(rows.target)
        seeds = _seeds(project, dataset, entry, ids, rows)
        realised = [canonical(realise(entry.recipe, seed)) for seed in seeds.tolist()]
        columns = {
            "dataset_id": _constant(name, count),
            "image_id": ids,
            "path": rows.take(matched.images["path"]),
            "recipe": _constant(recipe, count),
            "seed": pa.array(seeds),
            "realised": pa.array(realised, pa.string()),
            "bucket": _buckets(boxes),
            "geometry": _geometry(boxes),
            "view": _constant(matched.view, count),
            "prompts": _alike(list(entry.captions), count),
        }
        yield _structs(columns, count)


def _seeds(project: Project, dataset: DatasetConfig, entry: Generator, ids: pa.Array, rows: _Rows) -> Numbers:
    """Return the seed of every row's degradation."""
    seeds, draws, recipe = (
        np.zeros(len(ids), np.int64),
        rows.variant // dataset.crops % entry.variants,
        recipe_text(entry.recipe),
    )
    for draw in range(entry.variants):
        here = np.flatnonzero(draws == draw)
        some = degrade_seeds(project.trainer.prep_seed, ids.take(pa.array(here)).to_pylist(), recipe, draw)
        seeds[here] = np.fromiter(some, np.int64, len(here))
    return seeds


def _present(matched: Matched, rows: _Rows) -> Mask:
    """Return which references each row has: rows × references.

    A rejected one keeps its proper files, and so how they lie on it; nothing is made for it.
    """
    generated = np.repeat(rows.kept[:, None], len(matched.target.conditioning), axis=1)
    present: Mask = np.concatenate([matched.present[rows.target], generated], axis=1)
    return present


def _references(
    images: pa.Table, rows: _Rows, sides: Sequence[pa.StructArray], present: Mask
) -> tuple[pa.ListArray, pa.ListArray]:
    """Return (references, prompts) of every row.

    A single reference's prompts stand in for its target's captions; of several, each keeps its own.
    """
    count, counts = len(rows.target), present.sum(axis=1)
    captions = rows.take(images["captions"]).cast(pa.list_(pa.string()))
    if not sides:
        empty = pa.array([[]] * count, _TYPES["references"])
        return empty, captions
    choices, chosen, kept = [captions], np.zeros(count, np.int64), []
    for place, side in enumerate(sides):
        theirs = side.field("prompts").cast(pa.list_(pa.string()))
        lengths = pc.fill_null(pc.list_value_length(theirs), 0).to_numpy(zero_copy_only=False)
        instead = (counts == 1) & present[:, place] & (lengths > 0)
        chosen[instead] = place + 1
        choices.append(theirs)
        kept.append(_without_prompts(side, theirs, instead))
    prompts = pa.concat_arrays(choices).take(pa.array(chosen * count + np.arange(count)))
    order = (np.arange(len(sides))[None, :] * count + np.arange(count)[:, None])[present]
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    values = pa.concat_arrays(kept).take(pa.array(order))
    return pa.ListArray.from_arrays(pa.array(offsets), values), prompts


def _without_prompts(side: pa.StructArray, prompts: pa.ListArray, instead: Mask) -> pa.StructArray:
    """Take the prompts out of references whose pair has them."""
    none = pa.array([[]], prompts.type)
    at = np.where(instead, len(prompts), np.arange(len(prompts)))
    columns = {name: side.field(name) for name in _REFERENCE}
    return _structs({**columns, "prompts": pa.concat_arrays([prompts, none]).take(pa.array(at))}, len(prompts))


def _structs(columns: Mapping[str, pa.Array], count: int) -> pa.StructArray:
    """Put columns together; those that are missing are null."""
    arrays = [
        columns[name].cast(kind) if name in columns else pa.nulls(count, kind) for name, kind in _REFERENCE.items()
    ]
    return pa.StructArray.from_arrays(arrays, fields=list(arrow_schema(Reference)))


def _nobody(count: int) -> pa.StructArray:
    """Return references that no row has."""
    nothing = {name: _constant("", count) for name in ("dataset_id", "image_id", "path", "bucket", "view")}
    none = pa.array([[]] * count, pa.list_(pa.string()))
    return _structs({**nothing, "geometry": _geometry(np.zeros((count, len(BOX)), np.int64)), "prompts": none}, count)


def _geometry(boxes: Numbers) -> pa.StructArray:
    kind = _TYPES["geometry"]
    arrays = [pa.array(np.ascontiguousarray(boxes[:, place])) for place in range(len(BOX))]
    return pa.StructArray.from_arrays(arrays, fields=[kind.field(place) for place in range(kind.num_fields)])


def _buckets(boxes: Numbers) -> pa.Array:
    sizes, which = np.unique(boxes[:, 0] << 32 | boxes[:, 1], return_inverse=True)
    named = pa.array([f"{size >> 32}x{size & 0xFFFFFFFF}" for size in sizes.tolist()], pa.string())
    return named.take(pa.array(which))


def _sample_ids(dataset: DatasetConfig, images: pa.Table, rows: _Rows) -> pa.Array:
    """Name samples by their set, path and variant."""
    paths, digits = images["path"].to_pylist(), _SAMPLE_ID_DIGITS
    by_variant = [
        pa.array(
            [one[:digits] for one in digests_of(("sample", dataset.id), paths, (variant,) if variant else ())],
            pa.string(),
        )
        for variant in range(dataset.variants)
    ]
    at = rows.variant * len(paths) + rows.target
    return pa.concat_arrays(by_variant).take(pa.array(at))


def _drawn(project: Project, ids: pa.Array, prompts: pa.ListArray) -> pa.Array:
    """Draw one prompt of each row, the empty one where there is none."""
    counts = pc.list_value_length(prompts).to_numpy(zero_copy_only=False)
    draws = np.fromiter(seeds_of((project.trainer.prep_seed, "prompt"), ids.to_pylist(), ()), np.int64, len(ids))
    starts = np.concatenate([[0], np.cumsum(counts)])[:-1]
    at = pa.array(starts + draws % np.maximum(counts, 1), mask=counts == 0)
    return pc.fill_null(prompts.flatten().take(at), "")


def _alike(texts: list[str], count: int) -> pa.Array:
    """Give every row the same list; `pa.repeat` cannot make none of them."""
    return pa.array([texts], pa.list_(pa.string())).take(pa.array(np.zeros(count, np.int64)))


def _constant(value: object, count: int) -> pa.Array:
    return pa.repeat(pa.scalar(value), count)
