"""What a manifest adds up to: counts by reason, bucket and oddity, computed from its columns."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from schemas.datasets import DatasetConfig
from schemas.project import Project

_PIECE = 1 << 17  # rows counted at a time


@dataclass(frozen=True, slots=True)
class Statistics:
    """Counts of one manifest."""

    seen: int
    kept: int
    examples: tuple[tuple[str, str], ...]  # path and reason of the first rejected one of each kind
    rejected: Mapping[str, int]  # kind of reason -> images
    buckets: Mapping[str, int]  # "WxH" -> kept images
    batch_fill: Mapping[str, float]  # "WxH" -> share of the places in its batches that an epoch fills
    upscaled: int  # kept images that are enlarged
    oddities: Mapping[str, int]  # kept images that are more than plain 8-bit RGB, by what they are
    equal_files: int  # kept images whose bytes an earlier one has
    faces: int | None  # kept images with a face; null unless faces are looked for
    captions: int


def statistics(project: Project, dataset: DatasetConfig, rows: Iterable[pa.Table]) -> Statistics:
    """Count a manifest, given in pieces: what is counted of one is let go before the next."""
    seen = kept = upscaled = faces = captions = 0
    examples: list[tuple[str, str]] = []
    reasons, sizes, oddities = Counter[str](), Counter[str](), Counter[str]()
    identities: list[npt.NDArray[np.uint64]] = []
    for piece in rows:
        seen += piece.num_rows
        bad = piece.filter(pc.is_valid(piece["reject"]))
        reasons.update(counts_of(kinds_of(bad["reject"])))
        examples += _firsts(bad, {reason.partition(":")[0] for _, reason in examples})
        good = piece.filter(pc.is_null(piece["reject"]))
        kept += good.num_rows
        sizes.update(counts_of(good["bucket"]))
        oddities.update(_oddities(good))
        identities.append(_halves(pc.drop_null(good["image_id"])))
        upscaled += _count(pc.greater(good["intermediary_width"], good["width"]))
        faces += _count(pc.greater(pc.list_value_length(good["face"]), 0))
        captions += int(pc.sum(pc.list_value_length(good["captions"])).as_py() or 0)
    known = np.concatenate(identities) if identities else np.zeros(0, np.uint64)
    buckets, batch = dict(sorted(sizes.items())), project.trainer.train_batch_size
    return Statistics(
        seen=seen,
        kept=kept,
        examples=tuple(examples),
        rejected=dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0]))),
        buckets=buckets,
        batch_fill={name: _fill(count * (dataset.repeats + 1), batch) for name, count in buckets.items()},
        upscaled=upscaled,
        oddities={name: number for name, number in oddities.items() if number},
        equal_files=len(known) - len(np.unique(known)),
        faces=faces if dataset.crop and dataset.crop_style == "face" else None,
        captions=captions,
    )


def _firsts(bad: pa.Table, known: set[str]) -> list[tuple[str, str]]:
    """Return path and reason of the first rejected row of each kind that is not known yet."""
    kinds = kinds_of(bad["reject"]).combine_chunks()
    rows = [pc.index(kinds, kind).as_py() for kind in kinds.unique() if kind.as_py() not in known]
    return [(bad["path"][row].as_py(), bad["reject"][row].as_py()) for row in sorted(rows)]


def pieces(table: pa.Table) -> Iterator[pa.Table]:
    """Cut a table that is in memory."""
    for first in range(0, table.num_rows, _PIECE):
        yield table.slice(first, _PIECE)


def kinds_of(reasons: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return the kind of every reason, which stands before its first colon; null where there is none."""
    return pc.list_element(pc.split_pattern(reasons, ":", max_splits=1), 0) if len(reasons) else reasons


def _halves(identities: pa.ChunkedArray) -> npt.NDArray[np.uint64]:
    """Return the first 64 of the 128 bits of content ids: enough to count those that are equal."""
    return np.frombuffer(bytes.fromhex("".join(identities.to_pylist())), np.uint64)[::2]


def counts_of(column: pa.ChunkedArray) -> dict[str, int]:
    """Count the values of a column, the most frequent first, then in the order of their names."""
    found = [(one["values"], one["counts"]) for one in pc.value_counts(column).to_pylist()]
    return dict(sorted(found, key=lambda item: (-item[1], str(item[0]))))


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
