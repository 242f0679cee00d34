"""What a manifest adds up to: counts by reason, bucket and oddity, computed from its columns."""

from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from schemas.datasets import DatasetConfig
from schemas.project import Project


@dataclass(frozen=True, slots=True)
class Statistics:
    """Counts of one manifest."""

    kept: int
    rejected: Mapping[str, int]  # kind of reason -> images
    buckets: Mapping[str, int]  # "WxH" -> kept images
    batch_fill: Mapping[str, float]  # "WxH" -> share of the places in its batches that an epoch fills
    upscaled: int  # kept images that are enlarged
    oddities: Mapping[str, int]  # kept images that are more than plain 8-bit RGB, by what they are
    equal_files: int  # kept images whose bytes an earlier one has
    faces: int | None  # kept images with a face; null unless faces are looked for
    captions: int


def statistics(project: Project, dataset: DatasetConfig, table: pa.Table) -> Statistics:
    """Count a manifest's columns."""
    kept = table.filter(pc.is_null(table["reject"]))
    reasons = pc.list_element(pc.split_pattern(pc.drop_null(table["reject"]), ":", max_splits=1), 0)
    buckets = dict(sorted(_counts(kept["bucket"]).items()))
    identified = pc.drop_null(kept["image_id"])
    seeks_faces = dataset.crop and dataset.crop_style == "face"
    return Statistics(
        kept=kept.num_rows,
        rejected=_counts(reasons),
        buckets=buckets,
        batch_fill={name: _fill(count * (dataset.repeats + 1), project.trainer.train_batch_size)
                    for name, count in buckets.items()},
        upscaled=_count(pc.greater(kept["intermediary_width"], kept["width"])),
        oddities={name: number for name, number in _oddities(kept).items() if number},
        equal_files=len(identified) - len(identified.unique()),
        faces=_count(pc.greater(pc.list_value_length(kept["face"]), 0)) if seeks_faces else None,
        captions=int(pc.sum(pc.list_value_length(kept["captions"])).as_py() or 0),
    )  # fmt: skip


def _counts(column: pa.ChunkedArray) -> dict[str, int]:
    """Count values, the most frequent first, then in the order of their names."""
    counted = [(one["values"], one["counts"]) for one in pc.value_counts(column).to_pylist()]
    return dict(sorted(counted, key=lambda item: (-item[1], item[0])))


def _count(found: pa.ChunkedArray) -> int:
    return int(pc.sum(found).as_py() or 0)


def _fill(samples: int, batch: int) -> float:
    """Return the share of places that samples fill in batches of which none is dropped."""
    return round(samples / (-(-samples // batch) * batch), 4)


def _oddities(kept: pa.Table) -> dict[str, int]:
    modes = pc.fill_null(kept["mode"], "")
    depth = pc.greater(pc.fill_null(kept["bits"], 8), 8)
    return {
        "turned by EXIF": _count(pc.greater(pc.fill_null(kept["orientation"], 1), 1)),
        "transparent": _count(pc.fill_null(kept["alpha"], False)),
        "colour profile": _count(pc.fill_null(kept["icc"], False)),
        "CMYK": _count(pc.equal(modes, "CMYK")),
        "more than 8 bits": _count(pc.or_(depth, pc.is_in(modes, pa.array(["I", "F"])))),
        "animated": _count(pc.greater(pc.fill_null(kept["frames"], 1), 1)),
    }
