"""Degraded pictures as files: which are wanted, which are there, and the pool that makes the others.

`generate` is the way in. A picture's name is the hash of all it depends on, so a name that exists is the right picture.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from prep.pixels import Picture, reference_picture, store
from prep.pool import Crash, Crew
from schemas.console import Progress, progress
from schemas.datasets import DatasetConfig
from schemas.errors import UserError
from schemas.project import Project
from schemas.rows import PairRow, from_columns

_CHUNK = 2048  # rows that are looked at at once: what bounds memory
_LIMIT_S = 600.0  # that one picture may take


@dataclass(slots=True)
class Made:
    """What became of the pictures of one set of targets."""

    made: int = 0
    reused: int = 0
    refused: dict[int, str] = field(default_factory=dict)  # row of the table -> why its picture was not made
    unsettled: dict[str, str] = field(default_factory=dict)  # image -> what has to be mended before it can be made


def generate(project: Project, target: DatasetConfig, table: pa.Table, crew: Crew, *, dry_run: bool) -> Made:
    """Make the reference pictures of a pair table that are to be stored as files and are not there.

    Raises UserError, when all others are made, if some could not be and may be another time.
    """
    named = zip(target.generated_ids, target.conditioning, strict=True)
    stored = {name for name, entry in named if entry.storage == "files"}
    done, seen = Made(), set[Path]()
    if not stored:
        return done
    with progress(f"degrade {target.id}", table.num_rows * len(stored), "image") as bar:
        for first in range(0, table.num_rows, _CHUNK):
            rows = from_columns(table.slice(first, _CHUNK), PairRow)
            wanted = list(_wanted(project, stored, enumerate(rows, first)))
            missing = {picture.store: picture for _, picture in reversed(wanted) if not picture.store.exists()}
            places = {picture.store for _, picture in wanted} - seen
            seen |= places
            done.reused += len(places - missing.keys())
            bar.update(len(rows) * len(stored) - len(missing))
            if dry_run:
                done.made += len(missing)
            else:
                refused = _make([missing[place] for place in sorted(missing)], crew, done, bar)
                done.refused |= {row: refused[one.store] for row, one in wanted if one.store in refused}
    if done.unsettled:
        listed = "\n".join(f"  {file}: {reason}" for file, reason in sorted(done.unsettled.items())[:20])
        raise UserError(
            f"{len(done.unsettled)} references could not be made; run prep scan and prep pairs again:\n{listed}"
        )
    return done


def _wanted(project: Project, stored: set[str], rows: Iterable[tuple[int, PairRow]]) -> Iterator[tuple[int, Picture]]:
    for number, row in rows:
        for reference in row.references:
            if reference.dataset_id in stored:
                yield number, reference_picture(project, row, reference)


def _make(missing: list[Picture], crew: Crew, done: Made, bar: Progress) -> Mapping[Path, str]:
    """Make pictures; return why some were not made. One that cost its worker its life is tried again next time."""
    refused: dict[Path, str] = {}
    limit_s = _LIMIT_S if crew.workers > 1 else None
    for picture, fault in crew.each(store, missing, limit_s):
        if fault is None:
            done.made += 1
        elif isinstance(fault, Crash) or fault.lasting:
            refused[picture.store] = f"reference not made: {fault.reason}"
        else:
            done.unsettled[picture.name] = fault.reason
        bar.update()
    return refused
