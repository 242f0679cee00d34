"""Which of the usable images of a dataset are used: no duplicates where they are not wanted, no more than asked for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from prep.duplicates import alike, equal
from schemas.datasets import DatasetConfig
from schemas.keys import seed_of


@dataclass(frozen=True, slots=True)
class Selected:
    """What was left out, and what was noticed."""

    rejects: dict[int, str] = field(default_factory=dict)
    alike: int = 0  # pictures that look like an earlier one


def select(
    dataset: DatasetConfig, seed: int, names: Sequence[str], facts: pa.Table, rejects: Mapping[int, str]
) -> Selected:
    """Choose among the images that are not rejected yet."""
    usable = [row not in rejects for row in range(len(names))] if rejects else [True] * len(names)
    left_out: dict[int, str] = {}
    if dataset.exact_duplicates == "reject":
        for row, first in equal(_of_usable(facts["image_id"], usable)).items():
            left_out[row] = f"duplicate: the same bytes as {names[first]}"
    near: dict[int, int] = {}
    if dataset.near_duplicates != "ignore":
        hashes = _of_usable(facts["phash"], usable)
        near = alike([None if row in left_out else one for row, one in enumerate(hashes)],
                     dataset.near_duplicate_distance)  # fmt: skip
    if dataset.near_duplicates == "reject":
        left_out |= {row: f"near duplicate: looks like {names[first]}" for row, first in near.items()}
    left_out |= _surplus(dataset, seed, names, [row for row, good in enumerate(usable) if good and row not in left_out])
    return Selected(left_out, len(near))


def _of_usable(column: pa.ChunkedArray, usable: Sequence[bool]) -> list[str | None]:
    return [value if good else None for value, good in zip(column.to_pylist(), usable, strict=True)]


def _surplus(dataset: DatasetConfig, seed: int, names: Sequence[str], rows: Sequence[int]) -> dict[int, str]:
    """Return the images beyond `max_num_samples`; an image that is added or removed displaces one other at most."""
    most = dataset.max_num_samples
    if most is None or len(rows) <= most:
        return {}
    drawn = sorted(rows, key=lambda row: seed_of(seed, "sample", dataset.id, names[row]))
    return dict.fromkeys(drawn[most:], f"not drawn: max_num_samples is {most}")
