"""Thumbnails: which images are shown, small JPEGs of them, and the box that training sees of each.

A picture is shown whole and upright as `prep.images.decode` has it; what cannot be decoded is shown as a reason.
"""

import base64
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from prep.images import decode
from prep.page.columns import Indices, Manifest
from prep.places import Place, place_of, read_bytes
from schemas.console import progress
from schemas.datasets import DatasetConfig
from schemas.errors import UserError
from schemas.project import Project
from schemas.rows import ImageRow

_SIZE = (320, 192)  # most pixels of a thumbnail, across and down
_SMALL = (144, 96)
_BUDGET = 1_800_000  # bytes of the thumbnails of a sheet; base64 adds a third
_SHARE = 30_000  # most bytes of one
_QUALITIES = (82, 65, 45, 25)  # of JPEG: the first that keeps within the share

Box = tuple[float, float, float, float]  # left, top, width, height


@dataclass(frozen=True, slots=True)
class Refused:
    """Why there is no picture to show."""

    reason: str


@dataclass(frozen=True, slots=True)
class Picture:
    """An image as the page shows it."""

    path: str
    source: str | None  # data URI
    fault: str  # why there is none
    size: tuple[int, int] | None  # of the upright picture
    box: Box | None  # what training sees, in pixels of the picture
    bucket: str | None
    scale: float | None  # of the resize
    caption: str
    reject: str | None

    @property
    def enlarged(self) -> bool:
        """Tell a picture that is scaled up."""
        return self.scale is not None and self.scale > 1

    @property
    def cut(self) -> bool:
        """Tell a picture of which something is cut off."""
        return self.size is not None and self.box is not None and self.box != (0, 0, *self.size)


def sheet(project: Project, dataset: DatasetConfig, manifest: Manifest, count: int) -> tuple[Picture, ...]:
    """Show up to `count` kept images, spread over the buckets, narrow ones first."""
    column = pc.if_else(pa.array(manifest.kept), manifest.table["bucket"], None)
    rows = manifest.rows(spread(column, pc.unique(column.drop_null()).to_pylist(), count))
    rows.sort(key=lambda row: (row.geometry.target_width / row.geometry.target_height, row.bucket or ""))
    return _pictures(project, dataset, rows, _SIZE)


def examples(
    project: Project, dataset: DatasetConfig, manifest: Manifest, kinds: tuple[Any, list[str]], count: int
) -> tuple[Picture, ...]:
    """Show up to `count` rejected images, spread over the kinds of reasons, in the order of these."""
    column, names = kinds
    rows = manifest.rows(spread(column, names, count))
    rows.sort(key=lambda row: names.index((row.reject or "").partition(":")[0]))
    return _pictures(project, dataset, rows, _SMALL)


def spread(column: Any, names: list[str], count: int) -> Indices:
    """Choose up to `count` rows: of every value in turn, while it has any; of each value evenly over the table."""
    codes = pc.index_in(column, value_set=pa.array(names, pa.string())).fill_null(len(names)).to_numpy()
    order = np.argsort(codes, kind="stable")
    groups = np.split(order, np.searchsorted(codes[order], np.arange(1, len(names) + 1)))[: len(names)]
    sizes = np.array([len(group) for group in groups], dtype=np.int64)
    shares = np.zeros(len(names), dtype=np.int64)
    while (room := min(count, int(sizes.sum())) - int(shares.sum())) > 0:
        waiting = np.flatnonzero(shares < sizes)
        waiting = waiting[np.argsort(-sizes[waiting], kind="stable")]  # if not all can have one more: the largest
        shares[waiting[:room]] += 1
    chosen = [
        group[np.arange(share) * len(group) // max(share, 1)]
        for group, share in zip(groups, shares.tolist(), strict=True)
    ]
    return np.sort(np.concatenate(chosen)).astype(np.int64) if chosen else np.array([], dtype=np.int64)


def _pictures(
    project: Project, dataset: DatasetConfig, rows: list[ImageRow], most: tuple[int, int]
) -> tuple[Picture, ...]:
    place, share = place_of(project, dataset), min(_SHARE, _BUDGET // max(1, len(rows)))
    done = []
    with progress(f"report {dataset.id}", len(rows), "picture") as bar:
        for row in rows:
            done.append(_picture(row, _thumbnail(place, dataset, row, most, share)))
            bar.update()
    return tuple(done)


def _picture(row: ImageRow, thumbnail: str | Refused) -> Picture:
    size = (row.width, row.height) if row.width and row.height else None
    return Picture(
        path=row.path,
        source=thumbnail if isinstance(thumbnail, str) else None,
        fault=thumbnail.reason if isinstance(thumbnail, Refused) else "",
        size=size,
        box=_box(row, size) if size and row.reject is None else None,
        bucket=row.bucket,
        scale=row.geometry.intermediary_width / size[0] if size and row.reject is None else None,
        caption=row.captions[0] if row.captions else "",
        reject=row.reject,
    )


def _box(row: ImageRow, size: tuple[int, int]) -> Box:
    """Scale the crop box from the resized picture back to the picture itself."""
    geometry = row.geometry
    across, down = size[0] / geometry.intermediary_width, size[1] / geometry.intermediary_height
    return (
        geometry.crop_left * across,
        geometry.crop_top * down,
        geometry.target_width * across,
        geometry.target_height * down,
    )


def _thumbnail(place: Place, dataset: DatasetConfig, row: ImageRow, most: tuple[int, int], share: int) -> str | Refused:
    """Make a data URI of at most about `share` bytes."""
    if row.fault is not None:  # decoding would tell the same again, or cost this process
        return Refused(row.fault)
    if (row.width or 0) * (row.height or 0) > dataset.image_policy.maximum_megapixels * 1e6:
        return Refused("too large to be opened")
    try:
        data = read_bytes(place, row.path)
    except (OSError, UserError, ValueError) as fault:  # ValueError: a name that no file can have
        return Refused(f"cannot be read: {getattr(fault, 'strerror', None) or fault}")
    picture = decode(data, dataset.upright)
    if isinstance(picture, str):
        return Refused(picture)
    picture.thumbnail(most, Image.Resampling.LANCZOS, reducing_gap=3.0)
    return data_uri(picture, share)


def data_uri(picture: Image.Image, share: int) -> str:
    """Spell a picture as a JPEG of at most about `share` bytes."""
    for quality in _QUALITIES:
        buffer = BytesIO()
        picture.save(buffer, "JPEG", quality=quality, optimize=True)
        if buffer.tell() <= share:
            break
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
