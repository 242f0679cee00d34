"""Where shards lie: a folder of this machine, or one behind a URL.

A `Store` is a folder as the cache needs it: files that appear whole or not at all, listed by name. Names are relative
and POSIX. `store_at` opens one; a new kind of place is a class like `LocalStore`; schemas/remote.py has the
one for URLs.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.errors import UserError
from schemas.storage import is_aside, sweep, write_aside

Footer = Any  # pyarrow.parquet.FileMetaData, which has no type


class Store(Protocol):
    """A folder of shards."""

    def __truediv__(self, name: str) -> "Store":
        """Return a folder inside it."""

    def where(self, name: str = "") -> str:
        """Spell where a file of it lies, for a person."""

    def exists(self) -> bool:
        """Tell whether there is anything."""

    def files(self, below: str = "") -> dict[str, int]:
        """List its Parquet files, or those of a folder in it: names in order, with their bytes."""

    def names(self, below: str) -> list[str]:
        """List the files of whatever kind that lie in a folder of it, in order."""

    def footers(self, names: Sequence[str]) -> Iterator[tuple[str, "Footer | Exception"]]:
        """Yield what each file says of itself at its end; of one that is gone or damaged the fault."""

    def local(self, name: str) -> Path:
        """Return a file of this machine with the content of `name`; raises OSError, or Unreachable."""

    def write(self, name: str) -> AbstractContextManager[Path]:
        """Yield a path to write to; what is there at the end becomes `name`. Raises UserError if it cannot be kept."""

    def anew(self, name: str) -> AbstractContextManager[None]:
        """Read a file in this context as it is there now, whatever this machine keeps of it."""

    def remove(self, name: str) -> None:
        """Delete a file, if it is there."""

    def read(self, name: str) -> bytes | None:
        """Return a small file's content, None if it is not there."""

    def create(self, name: str, data: bytes) -> bool:
        """Write a small file unless it exists; tell whether this call made it. Of several callers one succeeds."""

    def replace(self, name: str, data: bytes) -> None:
        """Write a small file, whatever was there."""


@dataclass(frozen=True, slots=True)
class LocalStore:
    """A folder of this machine, or of a file system that several share."""

    folder: Path

    def __truediv__(self, name: str) -> "LocalStore":
        return LocalStore(self.folder / name)

    def where(self, name: str = "") -> str:
        return str(self.folder / name)

    def exists(self) -> bool:
        return self.folder.exists()

    def files(self, below: str = "") -> dict[str, int]:
        return dict(sorted(self._found(self.folder / below)))

    def _found(self, folder: Path) -> Iterator[tuple[str, int]]:
        for place, _, names in os.walk(folder):
            for name in names:
                path = Path(place, name)
                if path.suffix == ".parquet" and not is_aside(path):
                    with suppress(FileNotFoundError):  # merged with others this moment
                        yield path.relative_to(self.folder).as_posix(), path.stat().st_size

    def names(self, below: str) -> list[str]:
        try:
            return sorted(
                path.name for path in (self.folder / below).iterdir() if path.is_file() and not is_aside(path)
            )
        except FileNotFoundError:
            return []

    def footers(self, names: Sequence[str]) -> Iterator[tuple[str, Footer | Exception]]:
        for name in names:
            try:
                with pa.OSFile(str(self.folder / name)) as file:  # opened by name it takes twice the time
                    yield name, pq.read_metadata(file)
            except (pa.ArrowException, OSError) as fault:
                yield name, fault

    def local(self, name: str) -> Path:
        return self.folder / name

    def write(self, name: str) -> AbstractContextManager[Path]:
        path = self.folder / name
        _swept(path.parent)
        return write_aside(path, tidy=False)

    def anew(self, name: str) -> AbstractContextManager[None]:
        return nullcontext()

    def remove(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)

    def read(self, name: str) -> bytes | None:
        try:
            return (self.folder / name).read_bytes()
        except FileNotFoundError:
            return None

    def create(self, name: str, data: bytes) -> bool:
        path = self.folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("xb") as file:
                file.write(data)
        except FileExistsError:
            return False
        except OSError as fault:
            raise UserError(f"{path}: cannot be written: {fault.strerror or fault}") from fault
        return True

    def replace(self, name: str, data: bytes) -> None:
        with write_aside(self.folder / name, tidy=False) as aside:
            aside.write_bytes(data)


@cache
def _swept(folder: Path) -> None:
    """Remove what killed writers left in a folder, once: for thousands of shards it is not listed each time."""
    sweep(folder)


def store_at(place: "Path | Store") -> Store:
    """Open a store."""
    return LocalStore(place) if isinstance(place, Path) else place
