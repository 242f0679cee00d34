"""How a file comes to exist: written aside, flushed to the disk, renamed. A name that exists is whole.

All products of all stages go through `write_aside`.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

_MARK = ".tmp."


@contextmanager
def write_aside(path: Path) -> Iterator[Path]:
    """Yield a name beside `path` to write to; on success it replaces `path`, on any error it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}{_MARK}{os.getpid()}.{uuid4().hex[:8]}")
    try:
        yield aside
        sync(aside)
        aside.replace(path)
        sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


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
