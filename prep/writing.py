"""How encoded rows reach a store: group by group while the encoder works on, then merged into one shard.

A killed run loses the open group; what was written is whole, and found again by its keys.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType

from prep.units import Unit
from schemas.rows import LatentRow, RejectRow, TextRow
from schemas.shards import ShardHeader, group_rows, rewrite, write_rejects, write_shard


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
    """Writes the rows of one unit. Used as a context; what is left when it ends is written too."""

    def __init__(self, unit: Unit) -> None:
        self._unit = unit
        self._folder = unit.store / unit.folder if unit.folder else unit.store
        self._header: ShardHeader | None = None
        self._open: list[LatentRow | TextRow] = []
        self._flying: Future[tuple[str, Part]] | None = None
        self._names: list[str] = []
        self._thread = ThreadPoolExecutor(1)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, at: TracebackType | None) -> None:
        try:
            if kind is not None and issubclass(kind, KeyboardInterrupt | GeneratorExit):
                self._land()
                self._send()
                self._land()
        finally:
            self._thread.shutdown()

    def put(self, header: ShardHeader, rows: Sequence[LatentRow | TextRow]) -> list[Part]:
        """Take rows in; returns what reached the disk since."""
        self._header = header
        self._open += rows
        landed = []
        while len(self._open) >= self._size(header):
            landed += self._land()
            self._send()
        return landed

    def finish(self, rejected: dict[str, str], unsettled: dict[str, str]) -> list[Part]:
        """Write what is left, merge the unit's groups and note what was rejected; returns the last parts."""
        landed = self._land()
        self._send()
        landed += self._land()
        if len(self._names) > 1:
            with suppress(FileNotFoundError):  # another encodes the same unit, and merged them first
                rewrite(self._folder, self._names)
        if rejected:
            write_rejects(self._unit.store, [RejectRow(key, reason) for key, reason in sorted(rejected.items())])
        return [*landed, Part(self._unit.name, rejected=rejected, unsettled=unsettled, last=True)]

    def _size(self, header: ShardHeader) -> int:
        """Return the rows of one write."""
        return min(self._unit.most_rows, group_rows(header.row_bytes))

    def _send(self) -> None:
        """Hand a group to the thread that writes."""
        header = self._header
        if not self._open or header is None:
            return
        rows, self._open = self._open[: self._size(header)], self._open[self._size(header) :]
        self._flying = self._thread.submit(self._write, header, rows)

    def _write(self, header: ShardHeader, rows: list[LatentRow | TextRow]) -> tuple[str, Part]:
        name = write_shard(self._folder, header, rows)  # type: ignore[arg-type]  # rows are of one type
        return name, Part(self._unit.name, tuple(row.key for row in rows), bytes=len(rows) * header.row_bytes)

    def _land(self) -> list[Part]:
        """Wait for the write that is under way."""
        if self._flying is None:
            return []
        flying, self._flying = self._flying, None
        name, part = flying.result()
        self._names.append(name)
        return [part]
