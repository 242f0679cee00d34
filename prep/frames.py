"""The geometry of a whole dataset: which images are usable, their target sizes, their crops.

`frame_all` is the way in. Images of equal size are computed once, in the order of their paths, so that the order and
number of workers never show.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from prep.geometry import (
    Policy,
    Targets,
    aspects_for,
    crop_draws,
    drawn_aspect,
    framed,
    placed_on_face,
    random_places,
)  # fmt: skip
from schemas.datasets import DatasetConfig
from schemas.project import Project
from schemas.rows import Geometry

Integers: TypeAlias = npt.NDArray[np.int64]

_COLUMNS = tuple(field.name for field in fields(Geometry))
_DEEP_MODES = ("I", "F")  # Pillow's modes of 32 bits; 16-bit ones begin with I;16


@dataclass(frozen=True, slots=True)
class Frames:
    """The geometry of every image; that of unusable ones is masked."""

    numbers: npt.NDArray[np.int32]  # images × 6, in the order of `Geometry`
    usable: npt.NDArray[np.bool_]
    rejects: dict[int, str]
    collisions: dict[str, list[str]]  # bucket -> target sizes that some of its images would have had

    def without(self, rows: Collection[int]) -> "Frames":
        """Mask more images."""
        usable = self.usable.copy()
        usable[list(rows)] = False
        return replace(self, usable=usable)

    def columns(self) -> dict[str, pa.Array]:
        """Return the columns of a manifest."""
        masked = ~self.usable
        columns = {name: pa.array(self.numbers[:, place], mask=masked) for place, name in enumerate(_COLUMNS)}
        sizes, which = np.unique(self.numbers[:, 0].astype(np.int64) << 32 | self.numbers[:, 1], return_inverse=True)
        named = pa.array([f"{size >> 32}x{size & 0xFFFFFFFF}" for size in sizes.tolist()], pa.string())
        bucket = pa.DictionaryArray.from_arrays(pa.array(which.astype(np.int32), mask=masked), named)
        return {"bucket": bucket.cast(pa.string()), **columns}


def policy_of(project: Project, dataset: DatasetConfig) -> Policy:
    """Gather the settings that decide a dataset's sizes and crops."""
    return Policy(
        resolution=dataset.resolution,
        resolution_type=dataset.resolution_type,
        alignment=project.alignment,
        rounding=project.trainer.aspect_bucket_rounding,
        crop_aspect=dataset.crop_aspect if dataset.crop else "preserve",
        aspects=tuple((one.aspect, one.weight) for one in dataset.crop_aspect_buckets),
        crop_style=dataset.crop_style if dataset.crop or dataset.crop_style != "face" else "center",
        downsample=dataset.target_downsample_size if dataset.crop and dataset.maximum_image_size else None,
        least_aspect=dataset.minimum_aspect_ratio,
        most_aspect=dataset.maximum_aspect_ratio,
        most_upscale=dataset.max_upscale_threshold,
    )


def name_of(project: Project, dataset: DatasetConfig, path: str) -> tuple[object, ...]:
    """Return what the random draws of one image depend on."""
    return project.trainer.prep_seed, dataset.id, path


def frame_all(
    project: Project,
    dataset: DatasetConfig,
    names: Sequence[str],
    facts: pa.Table,
    targets: Targets,
    left_out: Mapping[str, str],
) -> Frames:
    """Return the geometry of all images; `left_out` says which paths a table's filter does not want, and why."""
    rejects = {row: left_out[name] for row, name in enumerate(names) if name in left_out} if left_out else {}
    rejects |= {row: reason for row, reason in _odd(dataset, facts).items() if row not in rejects}
    widths, heights = (pc.fill_null(facts[name], 0).to_numpy() for name in ("width", "height"))
    good = np.array(facts["fault"].is_null().to_numpy() & (widths > 0) & (heights > 0))
    good[list(rejects)] = False
    rows, policy, told = np.flatnonzero(good), policy_of(project, dataset), set(targets.others)
    sizes, first, which = np.unique(
        widths[rows].astype(np.int64) << 32 | heights[rows], return_index=True, return_inverse=True
    )
    shapes = [(size >> 32, size & 0xFFFFFFFF) for size in sizes.tolist()]
    choices = [_choices(shape, dataset, policy) for shape in shapes]
    kinds, first, kind = _kinds(project, dataset, names, choices, (rows, first, which))
    made: list[Geometry | str] = [""] * len(kinds)
    for place in np.argsort(first).tolist():  # buckets fill up in the order of paths
        size, aspect = kinds[place]
        choice = choices[size]
        made[place] = choice if isinstance(choice, str) else framed(shapes[size], policy, targets, aspect)
    frames = _spread(made, kind, rows, len(names), rejects)
    _place(project, dataset, policy, names, facts, frames)
    collisions = {f"{aspect:g}": [f"{width}x{height}" for width, height in sorted(others | {targets.sizes[aspect]})]
                  for aspect, others in sorted(targets.others.items()) if aspect not in told}  # fmt: skip
    return replace(frames, collisions=collisions)


def _choices(size: tuple[int, int], dataset: DatasetConfig, policy: Policy) -> Sequence[tuple[float, float]] | str:
    """Return the aspects an image of this size may be cropped to, or the reason why it is not used."""
    return _too_small(size, dataset, policy) or aspects_for(size, policy)


def _kinds(
    project: Project,
    dataset: DatasetConfig,
    names: Sequence[str],
    choices: Sequence[Sequence[tuple[float, float]] | str],
    images: tuple[Integers, Integers, Integers],
) -> tuple[list[tuple[int, float]], Integers, Integers]:
    """Return every (size, aspect) there is, the first image of each, and which of them each image is.

    `images` are their rows, the first image of each size, and which size each image has. Aspects are drawn where a
    size has several.
    """
    rows, first, which = images
    single = [0.0 if isinstance(choice, str) else choice[0][0] for choice in choices]
    several = np.array([not isinstance(choice, str) and len(choice) > 1 for choice in choices], np.bool_)
    if not several.any():
        return list(enumerate(single)), first, which
    aspects = np.array(single)[which]
    for place in np.flatnonzero(several[which]).tolist():
        choice = choices[which[place]]
        assert not isinstance(choice, str), "several are never a reason"
        aspects[place] = drawn_aspect(choice, name_of(project, dataset, names[rows[place]]))
    distinct, aspect = np.unique(aspects, return_inverse=True)
    keys, first, kind = np.unique(which * len(distinct) + aspect, return_index=True, return_inverse=True)
    found = [(key // len(distinct), distinct[key % len(distinct)].item()) for key in keys.tolist()]
    return found, first, kind


def _spread(
    made: Sequence[Geometry | str],
    kind: Integers,
    rows: Integers,
    count: int,
    rejects: dict[int, str],
) -> Frames:
    """Give every image the geometry of its kind."""
    numbers, usable = np.zeros((count, 6), np.int32, order="F"), np.zeros(count, np.bool_)
    if len(rows):
        fits = np.array([isinstance(one, Geometry) for one in made], np.bool_)
        by_kind = np.array([one.as_key() if isinstance(one, Geometry) else (0,) * 6 for one in made], np.int32)
        for place in range(6):  # one after the other: each is as long as the dataset
            numbers[rows, place] = by_kind[kind, place]
        usable[rows] = fits[kind]
        for row, place in zip(rows[~fits[kind]].tolist(), kind[~fits[kind]].tolist(), strict=True):
            rejects[row] = str(made[place])
    return Frames(numbers, usable, rejects, {})


def _place(
    project: Project, dataset: DatasetConfig, policy: Policy, names: Sequence[str], facts: pa.Table, frames: Frames
) -> None:
    """Move the boxes from the middle to where the crop style wants them."""
    if policy.crop_style in ("center", "centre"):
        return
    numbers = frames.numbers
    if policy.crop_style == "corner":
        numbers[:, 4:] = 0
        return
    room = np.flatnonzero(frames.usable & (numbers[:, :2] != numbers[:, 2:4]).any(1))
    if policy.crop_style == "random":
        draws = crop_draws(name_of(project, dataset, ""), (names[row] for row in room.tolist()), len(room))
        spare_left, spare_top = (numbers[room, 2 + side] - numbers[room, side] for side in (0, 1))
        numbers[room, 4], numbers[room, 5] = random_places(draws, spare_top, spare_left)
        return
    faces = facts["face"].to_pylist()
    for row in room.tolist():
        numbers[row, 4:] = placed_on_face(Geometry(*numbers[row].tolist()), faces[row])


def _odd(dataset: DatasetConfig, facts: pa.Table) -> dict[int, str]:
    """Return the images that `image_policy` does not want."""
    policy = dataset.image_policy
    depth, modes = pc.fill_null(facts["bits"], 8), pc.fill_null(facts["mode"], "")
    deep = pc.or_(pc.greater(depth, 8), pc.is_in(modes, pa.array(_DEEP_MODES)))
    pixels = pc.multiply(pc.fill_null(facts["width"], 0), pc.fill_null(facts["height"], 0))
    tests = [
        ("too large", "more than image_policy.maximum_megapixels", pc.greater(pixels, policy.maximum_megapixels * 1e6)),
        ("transparent", "image_policy.alpha", _if(policy.alpha, pc.fill_null(facts["alpha"], False))),
        ("printing colours", "image_policy.cmyk", _if(policy.cmyk, pc.equal(modes, "CMYK"))),
        ("high depth", "image_policy.high_depth", _if(policy.high_depth, deep)),
        ("animation", "image_policy.animation", _if(policy.animation, pc.greater(pc.fill_null(facts["frames"], 1), 1))),
    ]
    odd: dict[int, str] = {}
    for kind, named, found in tests:
        for row in np.flatnonzero(found.to_numpy()).tolist() if found is not None else ():
            width, height = facts["width"][row].as_py(), facts["height"][row].as_py()
            odd.setdefault(row, f"{kind}: {width}x{height}, {named}" if kind == "too large" else f"{kind}: {named}")
    return odd


def _if(choice: str, found: pa.ChunkedArray) -> pa.ChunkedArray | None:
    return found if choice == "reject" else None


def _too_small(size: tuple[int, int], dataset: DatasetConfig, policy: Policy) -> str | None:
    """Reject a target below `minimum_image_size` or a filter's, by its size before any resize."""
    width, height = size
    wanted = dataset.huggingface.filter_func if dataset.type == "huggingface" else None
    if wanted is not None and (width < wanted.min_width or height < wanted.min_height):
        return f"filtered: {width}x{height}, wanted {wanted.min_width}x{wanted.min_height}"
    if dataset.minimum_image_size is None or not dataset.is_target:
        return None
    least, area = policy.by_area(dataset.minimum_image_size)
    if area:
        edge, square = int((least * 1e6) ** 0.5), policy.crop_aspect == "square"
        fits = width * height >= least * 1e6
        if fits and (not square or min(size) >= edge):
            return None
        need = f"{edge}x{edge}" if square else f"an area of {edge}x{edge}"
    elif min(size) >= least:
        return None
    else:
        need = f"{int(least)} on each side"
    return f"too small: {width}x{height}, need {need}"
