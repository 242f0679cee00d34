"""Pairs as pictures on the page: target, reference, their difference, and the part in which they differ most.

`drawn` is the way in. Pictures are what a model sees, reduced to a share of the page's bytes each.
"""

from collections import Counter
from dataclasses import dataclass
from typing import TypeAlias

import cv2
import numpy as np
import pyarrow as pa
from PIL import Image

from prep.images import Pixels
from prep.page.columns import Indices
from prep.page.pictures import data_uri
from prep.pixels import Refusal
from prep.sheet import pictured
from prep.showing import Told, Verdict, difference, measured, told, verdict
from schemas.console import progress
from schemas.datasets import AlignmentCheck, DatasetConfig
from schemas.project import Project
from schemas.rows import PairRow, from_columns

REFERENCES = 4  # of one pair
_PROMPTS = 12  # of one pair
_SIZE = (400, 300)  # most pixels of a picture, across and down
_DETAIL = (240, 180)  # pixels of the part that is shown as large as it is
_ENLARGED = 1.5  # reduction from which it is shown
_BUDGET = 1_800_000  # bytes of the pictures of a table; base64 adds a third
_SHARE = 40_000  # most bytes of one

Seen: TypeAlias = Pixels | Refusal


@dataclass(frozen=True, slots=True)
class View:
    """A picture, or why there is none."""

    source: str | None  # data URI
    fault: str
    size: tuple[int, int] | None  # of the training picture


@dataclass(frozen=True, slots=True)
class Detail:
    """The part in which two pictures differ most, pixel for pixel."""

    picture: View
    target: View
    apart: View


@dataclass(frozen=True, slots=True)
class Compared:
    """A reference beside its target."""

    label: str
    dataset_id: str
    path: str
    bucket: str
    made: bool  # of its target, by degradation
    picture: View
    target: View
    apart: View | None  # the difference; None if the two have different sizes
    apart_label: str
    detail: Detail | None  # None if the pictures are shown about as large as they are
    steps: tuple[Told, ...]
    alignment: Verdict | None
    prompts: tuple[str, ...]

    @property
    def slides(self) -> bool:
        """Tell a reference that can be laid over its target."""
        return bool(self.apart and self.picture.source and self.target.source)


@dataclass(frozen=True, slots=True)
class Pair:
    """A sample as the page shows it."""

    path: str
    bucket: str
    variant: int
    variants: int
    prompt: str
    others: tuple[str, ...]  # prompts, the first few
    num_others: int
    target: View
    references: tuple[Compared, ...]
    num_references: int


# Pictures


@dataclass(frozen=True, slots=True)
class _Camera:
    """What every picture of a table needs."""

    project: Project
    check: AlignmentCheck
    share: int  # most bytes of a picture

    def view(self, seen: Seen, most: tuple[int, int] | None = None) -> View:
        """Show a picture, reduced to fit."""
        if isinstance(seen, Refusal):
            return View(None, seen.reason, None)
        image = Image.fromarray(seen)
        if most is not None:
            image.thumbnail(most, Image.Resampling.LANCZOS, reducing_gap=3.0)
        return View(data_uri(image, self.share), "", (seen.shape[1], seen.shape[0]))


def drawn(
    project: Project, target: DatasetConfig, table: pa.Table, wanted: tuple[Indices, list[tuple[int, int]]]
) -> tuple[tuple[Pair, ...], tuple[tuple[str, Compared], ...]]:
    """Draw rows of a table, narrow ones first, and single references (row, place in it), none of them twice."""
    chosen, beside = wanted
    numbers = sorted({*chosen.tolist(), *(number for number, _ in beside)})
    rows = dict(zip(numbers, from_columns(table.take(pa.array(numbers, pa.int64())), PairRow), strict=True))
    order = sorted(chosen.tolist(), key=lambda at: rows[at].geometry.target_width / rows[at].geometry.target_height)
    count = sum(max(1, 6 * len(rows[at].references[:REFERENCES])) for at in order) + 6 * len(beside)
    camera = _Camera(project, target.alignment_check, min(_SHARE, _BUDGET // max(1, count)))
    pairs, lying, known = [], [], dict[tuple[int, int], Compared]()
    with progress(f"report pairs {target.id}", len(order) + len(beside), "pair") as bar:
        for at in order:
            pairs.append(_pair(camera, rows[at]))
            known |= {(at, place): one for place, one in enumerate(pairs[-1].references)}
            bar.update()
        for at, place in beside:
            lying.append((rows[at].target_path, known.get((at, place)) or _lying(camera, rows[at], place)))
            bar.update()
    return tuple(pairs), tuple(lying)


def _pair(camera: _Camera, row: PairRow) -> Pair:
    target = pictured(camera.project, row)
    view = camera.view(target, _SIZE)
    others = list((Counter(row.prompts) - Counter([row.prompt])).elements())
    shown = row.references[:REFERENCES]
    return Pair(
        path=row.target_path,
        bucket=row.bucket,
        variant=row.variant + 1,
        variants=row.variants,
        prompt=row.prompt,
        others=tuple(others[:_PROMPTS]),
        num_others=len(others),
        target=view,
        references=tuple(_compared(camera, row, place, target, view) for place in range(len(shown))),
        num_references=len(row.references),
    )


def _lying(camera: _Camera, row: PairRow, place: int) -> Compared:
    target = pictured(camera.project, row)
    return _compared(camera, row, place, target, camera.view(target, _SIZE))


def _compared(camera: _Camera, row: PairRow, place: int, target: Seen, view: View) -> Compared:
    """Hold one of a pair's references against the target."""
    reference = row.references[place]
    seen, found = pictured(camera.project, row, reference), measured(reference)
    apart = detail = None
    if not isinstance(seen, Refusal) and not isinstance(target, Refusal):
        apart = difference(target, seen)
        detail = _detail(camera, target, seen, apart.pixels) if apart is not None else None
    return Compared(
        label=f"reference {place + 1}" if len(row.references) > 1 else "reference",
        dataset_id=reference.dataset_id,
        path=reference.path,
        bucket=reference.bucket,
        made=reference.recipe is not None,
        picture=camera.view(seen, _SIZE),
        target=view,
        apart=camera.view(apart.pixels, _SIZE) if apart is not None else None,
        apart_label=apart.label if apart is not None else "",
        detail=detail,
        steps=told(reference.realised),
        alignment=verdict(found, camera.check) if found is not None else None,
        prompts=tuple(reference.prompts),
    )


def _detail(camera: _Camera, target: Pixels, reference: Pixels, apart: Pixels) -> Detail | None:
    """Cut out the part in which two pictures differ most; None if they are small enough to be judged as a whole."""
    height, width = apart.shape[:2]
    if max(width / _SIZE[0], height / _SIZE[1]) < _ENLARGED:
        return None
    across, down = min(width, _DETAIL[0]), min(height, _DETAIL[1])
    sums = cv2.integral(apart.max(axis=2), sdepth=cv2.CV_64F)
    totals = sums[down:, across:] - sums[:-down, across:] - sums[down:, :-across] + sums[:-down, :-across]
    top, left = (int(place) for place in np.unravel_index(np.argmax(totals), totals.shape))
    part = np.s_[top : top + down, left : left + across]
    picture, its_target, its_difference = (camera.view(pixels[part]) for pixels in (reference, target, apart))
    return Detail(picture, its_target, its_difference)
