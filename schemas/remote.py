"""Shards behind a URL: any file system that fsspec writes to, S3 foremost.

`store_behind` opens one. What is read is kept in the workspace, in a mirror that may be deleted at any time; what is
written appears whole, and never replaces what is there. How a file system writes is told by `_WHOLE`.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.errors import Unreachable, UserError
from schemas.fetch import BUSY, FULL, codes_of, fetch_all, masked, open_url, status_of, stubborn
from schemas.keys import digest
from schemas.storage import is_aside, name_aside
from schemas.stores import Footer, LocalStore, Store

ResultT = TypeVar("ResultT")

# File systems in which a file appears when it is whole.
_WHOLE = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "oss", "obs", "hf", "memory"}
_ATTEMPTS = 5
_AT_ONCE = 128  # footers
_TAIL = 64 << 10  # bytes of a file's end that are asked for; most footers are shorter
_SPARE = 2 << 30  # bytes of the disk that the mirror leaves free
_LOCKS = tuple(Lock() for _ in range(32))  # of the mirror's files: threads do not fetch one twice


def store_behind(url: str, options: str, mirrors: Path) -> Store:
    """Return the store behind a URL; `options` are those of `schemas.fetch.url_options`."""
    scheme, _, path = url.partition("://")
    if scheme in ("file", "local"):
        return LocalStore(Path(path))
    endpoint = json.loads(options).get("client_kwargs", {}).get("endpoint_url")
    return RemoteStore(url.rstrip("/"), options, mirrors / digest(masked(url.rstrip("/")), endpoint)[:16])


@lru_cache(maxsize=64)
def _sizes_below(mirror: Path) -> dict[str, int]:
    """Return what this process knows of the bytes of files behind a URL, by path."""
    return {}


@dataclass(frozen=True, slots=True)
class RemoteStore:
    """A folder behind a URL."""

    url: str = field(repr=False)  # may hold a password
    options: str = field(repr=False)  # JSON; may hold a secret
    mirror: Path
    inside: str = ""  # folder below the URL

    def __truediv__(self, name: str) -> "RemoteStore":
        return replace(self, inside=self._path(name))

    def where(self, name: str = "") -> str:
        return "/".join(part for part in (masked(self.url), self._path(name)) if part)

    def _path(self, name: str) -> str:
        return "/".join(part for part in (self.inside, name) if part)

    def _opened(self, name: str) -> tuple[Any, str]:
        """Return the file system and the path of a file in it."""
        system, root = open_url(self.url, self.options)
        return system, "/".join(part for part in (root, self._path(name)) if part)

    @property
    def _sizes(self) -> dict[str, int]:
        return _sizes_below(self.mirror)

    def _ask(self, done: str, name: str, ask: Callable[[], ResultT]) -> ResultT:
        """Ask the service until it answers; raises Unreachable, FileNotFoundError or FileExistsError."""
        try:
            return stubborn(ask, _ATTEMPTS)
        except OSError as fault:
            told = isinstance(fault, FileNotFoundError | FileExistsError)
            if told and "NoSuchBucket" not in codes_of(fault):
                raise
            if fault.errno in FULL:
                raise Unreachable(f"{self.mirror}: cannot be written: {fault.strerror}") from fault
            raise self._unreachable(done, name, fault) from fault

    def _unreachable(self, done: str, name: str, fault: OSError) -> Unreachable:
        status = status_of(fault)
        if isinstance(fault, PermissionError) or status in (401, 403) or "Credentials" in str(fault):
            advice = "check the keys and what they may do: aws_* options of the dataset, or the environment"
        elif isinstance(fault, FileNotFoundError):
            advice = "check its name, or make it"
        elif status is not None and 400 <= status < 500 and status not in BUSY:
            advice = "check the URL and the options of the dataset"
        else:
            advice = f"tried {_ATTEMPTS} times; run the command again when the service answers"
        return Unreachable(f"{self.where(name)}: cannot be {done}: {fault.strerror or fault}; {advice}")

    def exists(self) -> bool:
        system, path = self._opened("")
        system.invalidate_cache()
        try:
            self._ask("listed", "", lambda: system.info(path))
        except FileNotFoundError:
            return False
        return True

    def files(self, below: str = "") -> dict[str, int]:
        system, path = self._opened(below)
        system.invalidate_cache()
        try:
            details: dict[str, Any] = self._ask("listed", below, lambda: system.find(path, detail=True))
        except FileNotFoundError:
            return {}
        start = len(self._opened("")[1]) + 1
        found = {
            name[start:]: int(facts["size"])
            for name, facts in sorted(details.items())
            if name.endswith(".parquet") and facts["type"] == "file" and not is_aside(Path(name))
        }
        self._sizes.update({self._path(name): size for name, size in found.items()})
        return found

    def names(self, below: str) -> list[str]:
        system, path = self._opened(below)
        system.invalidate_cache()
        try:
            details: list[dict[str, Any]] = self._ask("listed", below, lambda: system.ls(path, detail=True))
        except FileNotFoundError:
            return []
        files = [Path(facts["name"]) for facts in details if facts["type"] == "file"]
        return sorted(one.name for one in files if not is_aside(one))

    # The ends of files

    def footers(self, names: Sequence[str]) -> Iterator[tuple[str, Footer | Exception]]:
        for first in range(0, len(names), _AT_ONCE):
            some = names[first : first + _AT_ONCE]
            ends: dict[str, bytes | OSError | None] = {name: self._remembered(name) for name in some}
            ends |= self._fetched([name for name, end in ends.items() if end is None])
            for name, end in ends.items():
                yield name, _parsed(end) if isinstance(end, bytes) else end

    def _fetched(self, names: Sequence[str]) -> dict[str, bytes | OSError]:
        """Fetch the ends of files: once more where a footer is longer than expected."""
        ends = dict(zip(names, self._ends(names, [_TAIL] * len(names)), strict=True))
        lengths = {name: _length(end) for name, end in ends.items() if isinstance(end, bytes)}
        longer = {name: length for name, length in lengths.items() if length > len(ends[name])}  # type: ignore[arg-type]
        ends |= dict(zip(longer, self._ends(list(longer), list(longer.values())), strict=True))
        for name, end in ends.items():
            if isinstance(end, bytes) and len(end) >= lengths[name]:
                self._remember(name, end)
        return ends

    def _ends(self, names: Sequence[str], lengths: Sequence[int]) -> list[bytes | OSError]:
        if not names:
            return []
        system, _ = self._opened("")
        paths = [self._opened(name)[1] for name in names]
        got = fetch_all(system, paths, [-length for length in lengths], [None] * len(names), _ATTEMPTS)
        for name, one in zip(names, got, strict=True):
            gone = isinstance(one, FileNotFoundError) or (isinstance(one, OSError) and status_of(one) == 416)  # empty
            if isinstance(one, OSError) and not gone:
                raise self._unreachable("read", name, one) from one
        return got

    def _memo(self, name: str) -> Path | None:
        """Return where the footer of a file of known size is remembered."""
        size = self._sizes.get(self._path(name))
        return None if size is None else self.mirror / f"{self._path(name)}.{size}.footer"

    def _remembered(self, name: str) -> bytes | None:
        memo = self._memo(name)
        with suppress(OSError):
            end = memo.read_bytes() if memo is not None else b""
            if end and _length(end) == len(end):
                return end
        return None

    def _remember(self, name: str, end: bytes) -> None:
        memo, length = self._memo(name), _length(end)
        if memo is not None and length:
            with suppress(OSError), _aside(memo) as aside:
                aside.write_bytes(end[-length:])
                aside.replace(memo)

    # Whole files

    def local(self, name: str) -> Path:
        path, size = self.mirror / self._path(name), self._sizes.get(self._path(name))
        with _LOCKS[hash(path) % len(_LOCKS)]:
            with suppress(FileNotFoundError):
                if path.stat().st_size == size or size is None:
                    os.utime(path)  # used now: deleted last
                    return path
            try:
                with _aside(path) as aside:
                    _make_room(self.mirror.parent, size or 0)
                    there = self._download(name, aside)
                    if there:
                        aside.replace(path)
            except OSError as fault:
                raise Unreachable(f"{path}: cannot be written: {fault.strerror or fault}") from fault
        if not there:
            raise FileNotFoundError(errno.ENOENT, "not found", self.where(name))
        return path

    def _download(self, name: str, into: Path) -> bool:
        """Fetch a file; tell whether it is there."""
        system, path = self._opened(name)
        try:
            self._ask("read", name, lambda: system.get_file(path, str(into)))
        except FileNotFoundError:
            return False
        return True

    @contextmanager
    def write(self, name: str) -> Iterator[Path]:
        path = self.mirror / self._path(name)
        try:
            with _aside(path) as aside:
                _make_room(self.mirror.parent, 0)
                yield aside
                data = aside.read_bytes()
                self._sizes.pop(self._path(name), None)
                with suppress(FileExistsError):  # the same keys: what is there is as good
                    self._ask("written", name, lambda: _put(*self._opened(name), data))
                    self._sizes[self._path(name)] = len(data)
                    self._remember(name, data)
                    aside.replace(path)
        except OSError as fault:
            raise UserError(f"{path}: cannot be written: {fault.strerror or fault}") from fault

    @contextmanager
    def anew(self, name: str) -> Iterator[None]:
        kept = (self.mirror / self._path(name)).exists()
        self._forget(name)
        yield
        if not kept:
            (self.mirror / self._path(name)).unlink(missing_ok=True)

    def _forget(self, name: str) -> None:
        """Drop what is kept of a file on this machine."""
        memo = self._memo(name)
        for path in (self.mirror / self._path(name), *([memo] if memo is not None else [])):
            path.unlink(missing_ok=True)

    def remove(self, name: str) -> None:
        system, path = self._opened(name)
        with suppress(FileNotFoundError):
            self._ask("deleted", name, lambda: system.rm_file(path))
        self._forget(name)
        self._sizes.pop(self._path(name), None)

    # Small files

    def read(self, name: str) -> bytes | None:
        system, path = self._opened(name)
        try:
            return bytes(self._ask("read", name, lambda: system.cat_file(path)))
        except FileNotFoundError:
            return None

    def create(self, name: str, data: bytes) -> bool:
        attempts = 0

        def ask() -> None:
            nonlocal attempts
            attempts += 1
            _create(*self._opened(name), data)

        try:
            self._ask("written", name, ask)
        except FileExistsError:
            return attempts > 1 and self.read(name) == data  # an attempt that seemed to fail had not
        return True

    def replace(self, name: str, data: bytes) -> None:
        system, path = self._opened(name)
        self._ask("written", name, lambda: system.pipe_file(path, data))


def _put(system: Any, path: str, data: bytes) -> None:
    """Write a file that appears whole; raises FileExistsError if it is there."""
    if _is_whole(system):
        return _create(system, path, data)
    if system.exists(path):
        raise FileExistsError(path)
    aside = str(name_aside(Path(path)))
    system.makedirs(path.rpartition("/")[0], exist_ok=True)
    try:
        system.pipe_file(aside, data)
        system.mv(aside, path)
    finally:
        with suppress(FileNotFoundError):
            system.rm_file(aside)


def _create(system: Any, path: str, data: bytes) -> None:
    """Write a file unless it is there, of several writers one; raises FileExistsError."""
    if not _is_whole(system):
        system.makedirs(path.rpartition("/")[0], exist_ok=True)
        with system.open(path, "xb") as file:
            file.write(data)
        return
    try:
        system.pipe_file(path, data, mode="create")
    except OSError as fault:
        status = status_of(fault)
        if status == 412:
            raise FileExistsError(path) from fault
        if status != 501:
            raise
        if system.exists(path):  # a service that knows no conditions
            raise FileExistsError(path) from None
        system.pipe_file(path, data)


def _is_whole(system: Any) -> bool:
    names = system.protocol
    return not _WHOLE.isdisjoint([names] if isinstance(names, str) else names)


def _length(end: bytes) -> int:
    """Return the bytes of a Parquet footer, from its last ones; 0 if they are not those of one."""
    return int.from_bytes(end[-8:-4], "little") + 8 if len(end) >= 12 and end.endswith(b"PAR1") else 0


def _parsed(end: bytes) -> Footer | Exception:
    try:
        return pq.read_metadata(pa.BufferReader(end))
    except (pa.ArrowException, OSError) as fault:
        return fault


@contextmanager
def _aside(path: Path) -> Iterator[Path]:
    """Yield a name beside `path`; whatever has it at the end is deleted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = name_aside(path)
    try:
        yield aside
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)


def _make_room(mirrors: Path, size: int) -> None:
    """Delete copies, those first that were not used for longest, where the disk would get full."""
    short = size + _SPARE - shutil.disk_usage(mirrors).free
    if short <= 0:
        return
    copies: list[tuple[int, int, Path]] = []
    for file in mirrors.rglob("*.parquet"):
        with suppress(FileNotFoundError):  # deleted by others this moment
            copies.append((file.stat().st_mtime_ns, file.stat().st_size, file))
    for _, bytes_there, file in sorted(copies):
        if short > 0:
            file.unlink(missing_ok=True)
            short -= bytes_there
