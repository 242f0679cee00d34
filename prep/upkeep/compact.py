"""`prep cache --compact`: many small shards become few full ones, whose bytes follow from their rows alone.

`compact` is the public function. Rows are sorted by key and cut where a shard is full, so that it does not show who
wrote them in which order. A new shard is there before an old one goes: whoever is killed in between leaves rows twice,
never none, and the next run goes on. Memory is that of one shard, and of all keys of a bucket.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from families import Source, open_project
from prep.upkeep.stores import Kept, alone, by_folder, rejects_of, shards_of, stores_of
from schemas.console import log, progress
from schemas.errors import UserError
from schemas.keys import digest
from schemas.rows import LatentRow, RejectRow, TextRow
from schemas.shards import (
    ShardHeader,
    ShardIndex,
    headers_of,
    rebuilt,
    rejects_in,
    rows_of_shard,
    shard_name,
    write_rejects,
    write_shard,
)
from schemas.stores import Store
from schemas.upkeep import CompactSummary, StoreCompaction

Numbers = npt.NDArray[np.int64]


def compact(project: Source, *, dry_run: bool = False) -> CompactSummary:
    """Merge the shards of a project's stores, of all encoders; raises UserError if one is damaged.

    What somebody works on is left alone. Training may go on meanwhile.
    """
    start = time.monotonic()
    project = open_project(project)
    done = tuple(_compacted(kept, dry_run=dry_run) for kept in stores_of(project))
    return CompactSummary(done, project.warnings, time.monotonic() - start, dry_run)


@dataclass(frozen=True, slots=True)
class Merge:
    """Shards of one folder and kind, and how their rows are cut anew."""

    store: Store
    folder: str
    header: ShardHeader
    names: list[str]  # old shards
    keys: npt.NDArray[np.bytes_]  # each once, in order
    copies: Numbers  # of all keys in order: number of the old shard, row in it
    starts: Numbers  # per key, and once more: its first among the copies
    size: int  # rows of a full shard

    @property
    def cuts(self) -> list[slice]:
        """Return which keys each new shard holds."""
        return [slice(first, min(first + self.size, len(self.keys))) for first in range(0, len(self.keys), self.size)]

    def name(self, cut: slice) -> str:
        """Name a new shard."""
        name = shard_name([key.decode() for key in self.keys[cut].tolist()])
        return f"{self.folder}/{name}" if self.folder else name

    def is_done(self, cut: slice) -> bool:
        """Tell a shard that is as it should be."""
        alone = self.starts[cut.stop] - self.starts[cut.start] == cut.stop - cut.start  # no key has a second copy
        return bool(alone) and self.name(cut) in self.names

    def row(self, index: ShardIndex, place: int) -> LatentRow | TextRow:
        """Read a row; of several copies a sound one, the same whichever was written first.

        Raises UserError if it is damaged, FileNotFoundError if its shard is gone.
        """
        key = self.keys[place].decode()
        read, faults = [], []
        for old, row in self.copies[self.starts[place] : self.starts[place + 1]].tolist():
            try:
                read.append(index.read_from(self.names[old], row, key))
            except UserError as fault:
                faults.append(fault)
        if not read:
            raise faults[0]
        return rebuilt(self.header, min(read, key=lambda one: int(one["checksum"])))


def merges_of(store: Store, names: Sequence[str]) -> Iterator[Merge]:
    """Plan how shards are merged, folder by folder; raises UserError if one is damaged."""
    for folder, own in by_folder(list(names)).items():
        alike: dict[str, list[tuple[str, ShardHeader, list[str]]]] = {}
        for said in headers_of(store, own):
            alike.setdefault(digest(repr(said[1])), []).append(said)
        for _, group in sorted(alike.items()):
            yield _merge(store, folder, group)


def _merge(store: Store, folder: str, said: Sequence[tuple[str, ShardHeader, list[str]]]) -> Merge:
    names, header = [name for name, _, _ in said], said[0][1]
    counts = [len(keys) for _, _, keys in said]
    every = np.concatenate([np.asarray(keys, np.bytes_) for _, _, keys in said])
    order = np.argsort(every, kind="stable")
    keys, starts = np.unique(every[order], return_index=True)
    numbers = np.repeat(np.arange(len(said)), counts), np.concatenate([np.arange(count) for count in counts])
    copies = np.stack(numbers, axis=1)[order]
    size = rows_of_shard(header.row_bytes)
    return Merge(store, folder, header, names, keys, copies, np.r_[starts, len(every)], size)


def _compacted(kept: Kept, *, dry_run: bool) -> StoreCompaction:
    store = kept.store
    shards, rejects = shards_of(store), rejects_of(store)  # before others are looked for: see `alone`
    merges = list(merges_of(store, list(shards)))
    rows, after = sum(len(one.keys) for one in merges), sum(len(one.cuts) for one in merges)
    todo = sum(not one.is_done(cut) for one in merges for cut in one.cuts)
    size = sum(shards.values())
    if dry_run or (after == len(shards) and not todo and len(rejects) <= 1):
        return StoreCompaction(kept.kind, store.where(), rows, len(shards), after, size, size, 0, busy=False)
    with alone(store) as ours:
        if not ours:
            return StoreCompaction(kept.kind, store.where(), rows, len(shards), len(shards), size, size, 0, busy=True)
        with progress(f"compact {kept.kind}", todo, "shard") as bar:
            written = 0
            for merge in merges:
                for _ in carry_out(merge):
                    bar.update()
                    written += 1
        merge_rejects(store, rejects)
    now = shards_of(store)
    return StoreCompaction(
        kept.kind, store.where(), rows, len(shards), len(now), size, sum(now.values()), written, busy=False
    )


def carry_out(merge: Merge) -> Iterator[str]:
    """Write the new shards of a merge, and remove each old one as soon as its rows lie elsewhere; yields new names."""
    store, index = merge.store, ShardIndex(merge.store, merge.names)
    within = store / merge.folder if merge.folder else store
    new = np.repeat(np.arange(len(merge.keys)) // merge.size, np.diff(merge.starts))  # the shard of each copy
    last = np.zeros(len(merge.names), np.int64)  # new shard that an old one is read for
    np.maximum.at(last, merge.copies[:, 0], new)
    planned = {merge.name(cut) for cut in merge.cuts}
    for number, cut in enumerate(merge.cuts):
        if not merge.is_done(cut):
            try:
                rows = [merge.row(index, place) for place in range(cut.start, cut.stop)]
            except FileNotFoundError:
                log.warning("%s: changed meanwhile; run the command again", store.where(merge.folder))
                return
            write_shard(within, merge.header, rows)  # type: ignore[arg-type]  # rows are of one type
            yield merge.name(cut)
        for old in np.flatnonzero(last == number).tolist():
            if merge.names[old] not in planned:
                store.remove(merge.names[old])


def merge_rejects(store: Store, names: Sequence[str]) -> None:
    """Write the rejects of several files as one."""
    if len(names) < 2:
        return
    reasons: dict[str, str] = {}
    for name in names:
        for key, reason in rejects_in(store, name).items():
            reasons[key] = min(reason, reasons.get(key, reason))
    written = write_rejects(store, [RejectRow(key, reason) for key, reason in sorted(reasons.items())])
    for name in names:
        if name != written:
            store.remove(name)
