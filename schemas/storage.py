"""How a file comes to exist: written aside, flushed to the disk, renamed. A name that exists is whole.

All products of all stages go through `write_aside`.
"""

import glob
import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from schemas.errors import UserError

_MARK = ".tmp."
HOST = re.sub(r"\W", "-", platform.node()) or "host"


def _machine() -> str:
    """Name what a process's number counts in: this machine since its start, or a container of it.

    Its name alone will not do: containers and freshly installed machines are often called alike.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return re.sub(r"\W", "-", f"{HOST}-{boot[:8]}-{Path('/proc/self/ns/pid').readlink()}")
    except OSError:
        return HOST


MACHINE = _machine()


@contextmanager
def write_aside(path: Path, *, tidy: bool = True) -> Iterator[Path]:
    """Yield a name beside `path` to write to; on success it replaces `path`, on any error it is removed.

    Raises UserError if it cannot be written: a full disk, no permission, a file where a folder should be. What killed
    writers of `path` left is removed too, unless not `tidy`: that lists its folder, which for many files is done once.
    """
    aside = name_aside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if tidy:
            sweep(path.parent, path.name)
        yield aside
        sync(aside)
        aside.replace(path)
        sync(path.parent)
    except OSError as fault:
        raise UserError(f"{path}: cannot be written: {fault.strerror or fault}") from fault
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)


def name_aside(path: Path) -> Path:
    """Return a name beside `path` that nobody else uses; what has it is no product."""
    return path.with_name(f"{path.name}{_MARK}{MACHINE}.{os.getpid()}.{uuid4().hex[:8]}")


def sweep(folder: Path, name: str | None = None) -> None:
    """Remove what writers of a file, or of any in the folder, left behind that were killed on this machine."""
    for leftover in folder.glob(f"{'*' if name is None else glob.escape(name)}{_MARK}{MACHINE}.*"):
        writer = leftover.name.rpartition(_MARK)[2].split(".")[1]
        if writer.isdigit() and int(writer) != os.getpid() and not runs(int(writer)):
            leftover.unlink(missing_ok=True)


def runs(process: int) -> bool:
    """Tell whether a process of this machine is there."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_aside(path: Path) -> bool:
    """Tell the leftover of an interrupted write from a product."""
    return _MARK in path.name


def whole_time(mtime_ns: int) -> int:
    """Fit a time into 64 bits: file systems know years that no count of ns does."""
    return min(max(mtime_ns, -(2**63)), 2**63 - 1)
