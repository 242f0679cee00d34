"""The images below a local folder, in the order of their paths: the one loop that sees every file of every scan.

`walk` is the way in. It opens no file, and asks the system about single files only where it is told to.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeAlias

from prep.images import EXTENSIONS
from schemas.console import log
from schemas.storage import whole_time

_Entries: TypeAlias = dict[str, os.DirEntry[str]]

_MANY = 4096

NOT_THERE = (-1, 0)  # (size, time) of a file that cannot be asked


class Found(Protocol):
    """The part of a listing that a walk fills in."""

    paths: list[str]
    ignored: int
    unreadable: list[str]

    def add(self, path: str, listed: tuple[int, int], text: tuple[int, int] | None = None) -> None:
        """Take in one image."""

    def add_unasked(self, path: str, *, text: bool) -> None:
        """Take in one image of which only the name is known."""


@dataclass(slots=True)
class _Walk:
    """A walk on its way."""

    texts: bool  # look for text files beside images
    stats: bool  # ask for sizes and times
    kept_out: tuple[int, int] | None  # the workspace
    many: Callable[[], None] | None  # called once there are many images
    seen: set[tuple[int, int]] = field(default_factory=set)  # folders, against links in circles
    stack: list[tuple[str, Iterator[os.DirEntry[str]], _Entries]] = field(default_factory=list)


def walk(
    root: str, workspace: Path, found: Found, *, texts: bool, stats: bool, many: Callable[[], None] | None = None
) -> None:
    """List the images below a folder; hidden folders and workspaces are left out, links are followed once.

    `many` is called, once, when there are so many images that workers are worth starting before all are listed.
    """
    on = _Walk(texts, stats, _identity(str(workspace)), many)
    _enter(root, "", found, on)
    while on.stack:
        prefix, entries, captions = on.stack[-1]
        if on.many is not None and len(found.paths) >= _MANY:
            on.many()
            on.many = None
        folder = _take(prefix, entries, captions, found, on)
        if folder is None:
            on.stack.pop()
        elif _is_wanted(folder, on):
            _enter(folder.path, f"{prefix}{folder.name}/", found, on)
    for unreadable in found.unreadable:
        log.warning("%s: cannot be read, its images are left out", unreadable)


def _take(
    prefix: str, entries: Iterator[os.DirEntry[str]], captions: _Entries, found: Found, on: _Walk
) -> os.DirEntry[str] | None:
    """Take in the images up to the next folder, which is returned; None at the end."""
    ends, add = EXTENSIONS, found.add
    for entry in entries:
        name = entry.name
        dot = name.rfind(".")
        if _is_folder(entry):
            return entry
        if dot <= 0 or name[dot + 1 :].lower() not in ends or name[0] == ".":
            found.ignored += name[0] == "." or not name.endswith(".txt")
            continue
        text = captions.get(name[:dot] + ".txt")
        if on.stats:
            add(prefix + name, _stat(entry), _stat(text) if text is not None else None)
        else:
            found.add_unasked(prefix + name, text=text is not None)
    return None


def _enter(folder: str, prefix: str, found: Found, on: _Walk) -> None:
    """Put a folder's entries, sorted by name, on top of the stack, unless it was seen by way of another link."""
    identity = _identity(folder)
    if identity in on.seen:
        return
    if identity is not None:
        on.seen.add(identity)
    try:
        with os.scandir(folder) as entries:
            inside = sorted(entries, key=lambda entry: entry.name)
    except OSError as fault:
        found.unreadable.append(f"{folder} ({fault.strerror})")
        return
    captions = {entry.name: entry for entry in inside if entry.name.endswith(".txt")} if on.texts else {}
    on.stack.append((prefix, iter(inside), captions))


def _is_wanted(folder: os.DirEntry[str], on: _Walk) -> bool:
    """Tell a folder to look into: not hidden, no workspace of this project or another."""
    identity = _identity(folder.path)
    if folder.name[0] == "." or (identity is not None and identity == on.kept_out):
        return False
    if _holds_manifests(folder.path):
        log.warning("%s: left out, it is a workspace", folder.path)
        return False
    return True


def _holds_manifests(folder: str) -> bool:
    try:
        with os.scandir(f"{folder}/manifests") as entries:
            return any(entry.name.endswith(".parquet") for entry in entries)
    except OSError:  # there is none; or the folder cannot be read, which is told when it is entered
        return False


def _identity(folder: str) -> tuple[int, int] | None:
    try:
        found = Path(folder).stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _stat(entry: os.DirEntry[str]) -> tuple[int, int]:
    try:
        found = entry.stat()
    except OSError:
        return NOT_THERE
    return found.st_size, whole_time(found.st_mtime_ns)
