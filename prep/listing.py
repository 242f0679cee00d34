"""What images a dataset has, in a fixed order: files of a folder or bucket, entries of a list, rows of a dataset.

`list_images` is the way in; it opens no image. A new kind of place is a function here beside `prep.places`.
"""

import csv
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import xxhash

from prep.captions import beside, texts_of
from prep.images import extensions
from prep.metadata import read_rows, read_table_beside
from prep.places import Bucket, Downloads, Folder, Rows, open_bucket, open_rows, place_of, stubborn
from prep.walk import NOT_THERE, walk
from schemas.console import log, progress
from schemas.datasets import DatasetConfig
from schemas.errors import UserError
from schemas.keys import content_id
from schemas.paths import is_url, resolved
from schemas.project import Project
from schemas.storage import write_aside

_AT_ONCE = 32  # downloads


@dataclass(slots=True)
class Listing:
    """The images of a dataset; the sequences run in parallel."""

    paths: list[str] = field(default_factory=list)
    sizes: "array[int]" = field(default_factory=lambda: array("q"))  # bytes
    mtimes: "array[int]" = field(default_factory=lambda: array("q"))  # ns
    text_sizes: "array[int]" = field(default_factory=lambda: array("q"))  # of the text file; -1 without one
    text_mtimes: "array[int]" = field(default_factory=lambda: array("q"))
    captions: dict[str, list[str]] = field(default_factory=dict)  # path -> captions of a table
    measured: dict[str, tuple[int, int]] = field(default_factory=dict)  # path -> width and height of a table
    rejects: dict[str, str] = field(default_factory=dict)  # path -> why a table's filter leaves it out
    faults: dict[str, str] = field(default_factory=dict)  # path -> why it cannot be read this time
    ignored: int = 0  # files that are neither images nor captions
    unreadable: list[str] = field(default_factory=list)  # folders

    def add(self, path: str, listed: tuple[int, int], text: tuple[int, int] | None = None) -> None:
        """Take in one image."""
        self.paths.append(path)
        self.sizes.append(listed[0])
        self.mtimes.append(listed[1])
        self.text_sizes.append(text[0] if text is not None else -1)
        self.text_mtimes.append(text[1] if text is not None else -1)

    def cut(self, limit: int) -> None:
        """Keep the first `limit` images."""
        for one in (self.paths, self.sizes, self.mtimes, self.text_sizes, self.text_mtimes):
            del one[limit:]


@dataclass(frozen=True, slots=True)
class Asked:
    """What a listing is to find out."""

    texts: bool  # look for text files beside images
    stats: bool  # ask for sizes and times of local files
    dry_run: bool  # fetch nothing
    many: Callable[[], None] | None = None  # called once there are many images


def list_images(project: Project, dataset: DatasetConfig, asked: Asked) -> Listing:
    """List a dataset's images in the order of their paths; raises UserError if they cannot be listed at all."""
    place = place_of(project, dataset)
    if isinstance(place, Folder | Bucket):
        if isinstance(place, Bucket):
            found = _list_bucket(place, texts=asked.texts)
        else:
            found = Listing()
            walk(place.root, project.workspace, found, texts=asked.texts, stats=asked.stats, many=asked.many)
        if dataset.parquet is not None:
            read_table_beside(project, dataset, place, found)
        return found
    if isinstance(place, Downloads):
        return _list_entries(project, dataset, place, dry_run=asked.dry_run)
    return _list_rows(place, dataset)


# A bucket


def _list_bucket(place: Bucket, *, texts: bool) -> Listing:
    """List the images below a URL."""
    system, root = open_bucket(place)
    try:
        details: dict[str, dict[str, Any]] = stubborn(lambda: system.find(root, detail=True))
    except OSError as fault:
        raise UserError(f"{place.url}: cannot be listed: {fault.strerror or fault}") from fault
    stripped = {name.removeprefix(root).lstrip("/"): facts for name, facts in details.items()}
    found, ends = Listing(), extensions()
    for path in sorted(stripped, key=lambda one: one.split("/")):
        name = path.rpartition("/")[2]
        if any(part.startswith(".") for part in path.split("/")) or "." not in name:
            found.ignored += 1
        elif name.rpartition(".")[2].lower() in ends:
            text = stripped.get(beside(path)) if texts else None
            found.add(path, _mark(stripped[path]), _mark(text) if text is not None else None)
        elif not name.endswith(".txt"):
            found.ignored += 1
    return found


def _mark(facts: dict[str, Any]) -> tuple[int, int]:
    """Return (bytes, time of the last change) of a bucket's file; without a time, a hash of what else is told of it."""
    for name in ("LastModified", "last_modified", "mtime", "updated", "last_commit", "created"):
        time = facts.get(name)
        if isinstance(time, datetime):
            return int(facts.get("size") or 0), int(time.timestamp() * 1e9)
        if isinstance(time, int | float):
            return int(facts.get("size") or 0), int(time * 1e9)
    told = repr(sorted((name, str(value)) for name, value in facts.items())).encode()
    return int(facts.get("size") or 0), xxhash.xxh3_64_intdigest(told) >> 1


# A list of URLs or paths


def _list_entries(project: Project, dataset: DatasetConfig, place: Downloads, *, dry_run: bool) -> Listing:
    """List the images that a CSV file names, fetching those of URLs that are not here yet."""
    assert dataset.csv_file is not None, "checked when the project was loaded"
    entries = _csv_entries(resolved(project.root, dataset.csv_file), dataset)
    found = Listing()
    wanted: dict[str, str] = {}  # path -> URL
    for named, caption in entries:
        path = _path_of(named)
        if caption:
            found.captions.setdefault(path, []).extend(texts_of(caption))
        if is_url(named) and not place.file(path).exists():
            wanted[path] = named
    if not dry_run:
        found.faults = _fetch(wanted, place, dataset.id)
    for path in dict.fromkeys(_path_of(named) for named, _ in entries):
        file = place.file(path)
        found.add(path, (file.stat().st_size, file.stat().st_mtime_ns) if file.is_file() else NOT_THERE)
    if dry_run and wanted:
        log.warning("%s: %d images are not downloaded yet", dataset.id, len(wanted))
    return found


def _csv_entries(file: Path, dataset: DatasetConfig) -> list[tuple[str, str]]:
    """Read (URL or path, caption) of every line."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            table = csv.DictReader(lines)
            columns = table.fieldnames or []
            for column in (dataset.csv_url_column, dataset.csv_caption_column):
                if column is not None and column not in columns:
                    raise UserError(f"{file}: no column '{column}'; it has {', '.join(columns)}")
            caption = dataset.csv_caption_column
            return [
                (row[dataset.csv_url_column].strip(), (row[caption] or "") if caption is not None else "")
                for row in table
                if row[dataset.csv_url_column]
            ]
    except (OSError, UnicodeDecodeError, csv.Error) as fault:
        raise UserError(f"{file}: cannot be read: {fault}") from fault


def _path_of(named: str) -> str:
    """Return the path of an image that a list names: of a URL, host and path, told apart by a hash of its query."""
    if not is_url(named):
        return named.replace("\\", "/").removeprefix("./")
    parts = urlsplit(named)
    path = "/".join(part for part in (parts.netloc + parts.path).split("/") if part not in ("", ".", ".."))
    if not parts.query:
        return path
    folder, _, name = path.rpartition("/")
    return f"{folder}/{content_id(parts.query.encode())[:8]}-{name}"


def _fetch(wanted: dict[str, str], place: Downloads, dataset_id: str) -> dict[str, str]:
    """Download images; return why those failed that did."""
    import fsspec  # noqa: PLC0415 - most projects need none

    faults: dict[str, str] = {}
    listed = list(wanted.items())
    with progress(f"download {dataset_id}", len(listed), "image") as bar:
        for first in range(0, len(listed), _AT_ONCE):
            some = listed[first : first + _AT_ONCE]
            for (path, _), data in zip(some, _get(fsspec, [url for _, url in some]), strict=True):
                if isinstance(data, bytes):
                    with write_aside(Path(place.root) / path) as aside:
                        aside.write_bytes(data)
                else:
                    faults[path] = f"unreadable: not downloaded: {data}"
                bar.update()
    return faults


def _get(fsspec: Any, urls: Sequence[str]) -> list[bytes | Exception]:
    """Read URLs, those of one service together; an exception stands in for one that fails."""
    got: dict[str, bytes | Exception] = {}
    by_service: dict[str, list[str]] = {}
    for url in urls:
        by_service.setdefault(urlsplit(url).scheme, []).append(url)
    for some in by_service.values():
        try:
            system = fsspec.core.url_to_fs(some[0])[0]
            answers: dict[str, Any] = stubborn(_asking(system, some))
            got |= {url: answers[system._strip_protocol(url)] for url in some}
        except (OSError, ImportError, ValueError, KeyError) as fault:
            got |= dict.fromkeys(some, fault)
    return [got[url] for url in urls]


def _asking(system: Any, urls: list[str]) -> Callable[[], dict[str, Any]]:
    def ask() -> dict[str, Any]:
        answers: dict[str, Any] = system.cat([*urls, urls[0]], on_error="return")  # two at least: a dict comes back
        return answers

    return ask


# Rows of a dataset


def _list_rows(place: Rows, dataset: DatasetConfig) -> Listing:
    """List the rows of a dataset; its fingerprint stands in for times of files."""
    rows, found = open_rows(place), Listing()
    mark = xxhash.xxh3_64_intdigest(str(rows._fingerprint).encode()) >> 1
    end = dataset.huggingface.file_extension.lstrip(".")
    for number in range(len(rows)):
        found.add(f"{number}.{end}", (0, mark))
    read_rows(rows, dataset, found)
    return found
