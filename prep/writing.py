"""How encoded rows reach a store: by the group while the encoder works on, then merged into one shard.

A killed run loses the open group; what was written is whole, and found again by its keys. A fast encoder's groups are
larger: a unit that takes less than `_KEPT_S` is written once, and not again to merge it.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field

from prep.units import Unit
from schemas.rows import LatentRow, RejectRow, TextRow
from schemas.shards import ShardHeader, group_rows, rewrite, write_rejects, write_shard
from schemas.stores import Store

_MOST_WRITES = 4  # under way, of at most a unit's rows each, before the encoder waits for the disk
_KEPT_S = 5.0  # that rows of a fast encoder are kept for a larger group


@dataclass(frozen=True, slots=True)
class Part:
    """What of a unit has reached the disk, or never will."""

    unit: str
    keys: tuple[str, ...] = ()
    rejected: dict[str, str] = field(default_factory=dict)  # key -> reason that is true of these bytes for ever
    unsettled: dict[str, str] = field(default_factory=dict)  # picture -> reason that may pass
    cut: tuple[str, ...] = ()  # prompts that were longer than the encoder takes, told for a person
    bytes: int = 0  # of payload
    last: bool = False


class Writer:
    """Writes the rows of units in a thread of its own, in the order they come, while the encoder works on."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._thread = ThreadPoolExecutor(1)
        self._asked: deque[Future[Part]] = deque()
        self._unit: _Open | None = None

    def put(self, unit: Unit, header: ShardHeader, rows: Sequence[LatentRow | TextRow]) -> list[Part]:
        """Take rows of a unit in; returns what reached the disk since."""
        if self._unit is None:
            self._unit = _Open(unit, self._clock())
        if self._unit.header not in (None, header):
            self._send(self._unit, len(self._unit.rows))
        self._unit.header = header
        self._unit.rows += rows
        while len(self._unit.rows) >= unit.most_rows:
            self._send(self._unit, unit.most_rows)
        late = self._clock() - self._unit.since >= _KEPT_S
        if late and len(self._unit.rows) >= group_rows(header.row_bytes):
            self._send(self._unit, len(self._unit.rows))
        return self._landed(_MOST_WRITES)

    def finish(self, unit: Unit, rejected: dict[str, str], unsettled: dict[str, str]) -> list[Part]:
        """Write what is left of a unit, merge its groups, note what was rejected; returns as `put` does."""
        open_unit, self._unit = self._unit or _Open(unit, self._clock()), None
        self._send(open_unit, len(open_unit.rows))
        self._asked.append(self._thread.submit(open_unit.merge, rejected, unsettled))
        return self._landed(_MOST_WRITES)

    def settle(self) -> list[Part]:
        """Wait for all that is to be written; returns what reached the disk since."""
        return self._landed(0)

    def close(self) -> None:
        """Write what was taken in, even of a unit that was interrupted, and end."""
        try:
            if self._unit is not None:
                self._send(self._unit, len(self._unit.rows))
            self._landed(0)
        finally:
            self._unit = None
            self._thread.shutdown()

    def _send(self, unit: "_Open", count: int) -> None:
        """Hand a group to the thread."""
        rows, unit.rows = unit.rows[:count], unit.rows[count:]
        unit.since = self._clock()
        if rows:
            assert unit.header is not None, "rows come with it"
            self._asked.append(self._thread.submit(unit.write, unit.header, rows))

    def _landed(self, most: int) -> list[Part]:
        """Return what was written, waiting until no more than `most` writes are under way."""
        landed = []
        while self._asked and (len(self._asked) > most or self._asked[0].done()):
            landed.append(self._asked.popleft().result())
        return landed


@dataclass(slots=True)
class _Open:
    """A unit that rows arrive of."""

    unit: Unit
    since: float  # it was begun, or a group was sent
    header: ShardHeader | None = None
    rows: list[LatentRow | TextRow] = field(default_factory=list)
    written: list[tuple[ShardHeader, list[str]]] = field(default_factory=list)  # names of shards, of each header

    @property
    def folder(self) -> Store:
        return self.unit.store / self.unit.folder if self.unit.folder else self.unit.store

    def write(self, header: ShardHeader, rows: list[LatentRow | TextRow]) -> Part:
        """Write a group."""
        names = next((names for said, names in self.written if said == header), None)
        if names is None:
            names = []
            self.written.append((header, names))
        names.append(write_shard(self.folder, header, rows))  # type: ignore[arg-type]  # of one type
        return Part(self.unit.name, tuple(row.key for row in rows), bytes=len(rows) * header.row_bytes)

    def merge(self, rejected: dict[str, str], unsettled: dict[str, str]) -> Part:
        """Make one shard of the groups that are alike."""
        for _, names in self.written:
            if len(names) > 1:
                with suppress(FileNotFoundError):  # another encodes the same unit, and merged them first
                    rewrite(self.folder, names)
        if rejected:
            write_rejects(self.unit.store, [RejectRow(key, reason) for key, reason in sorted(rejected.items())])
        return Part(self.unit.name, rejected=rejected, unsettled=unsettled, last=True)
