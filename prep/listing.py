"""What images a dataset has, in a fixed order: files of a folder or bucket, entries of a list, rows of a dataset.

`list_images` is the way in; it opens no image. A new kind of place is a function here beside `prep.places`.
"""

import csv
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
import xxhash

from prep.captions import beside, texts_of
from prep.hub import Rows, open_table
from prep.images import EXTENSIONS
from prep.metadata import note_row, read_table_beside, wanted_columns
from prep.places import Bucket, Downloads, Folder, open_bucket, place_of
from prep.walk import NOT_THERE, walk
from schemas.console import log, progress
from schemas.datasets import DatasetConfig
from schemas.errors import UserError
from schemas.fetch import fetch_all, masked, stubborn
from schemas.keys import content_id
from schemas.paths import is_url, resolved
from schemas.project import Project
from schemas.storage import write_aside

_AT_ONCE = 32  # downloads
_LONGEST_NAME = 150  # bytes of a file's or a folder's name
_WEB = ("http", "https")


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

    def add_unasked(self, path: str, *, text: bool) -> None:
        """Take in one image of which only the name is known, and whether there is a text file beside it."""
        self.paths.append(path)
        self.text_sizes.append(0 if text else -1)

    def add(self, path: str, listed: tuple[int, int], text: tuple[int, int] | None = None) -> None:
        """Take in one image."""
        self.paths.append(path)
        self.sizes.append(listed[0])
        self.mtimes.append(listed[1])
        self.text_sizes.append(text[0] if text is not None else -1)
        self.text_mtimes.append(text[1] if text is not None else -1)

    def of(self, name: str) -> npt.NDArray[np.int64]:
        """Return one of the sequences of numbers, to compute with; zeros of what was not asked for."""
        numbers = getattr(self, name)
        return (
            np.frombuffer(numbers, np.int64) if len(numbers) == len(self.paths) else np.zeros(len(self.paths), np.int64)
        )

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
    limit: int | None = None  # images that matter: what it takes to list more is not done


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
        return _list_entries(project, dataset, place, asked)
    return _list_rows(place, dataset, asked)


# A bucket


def _list_bucket(place: Bucket, *, texts: bool) -> Listing:
    """List the images below a URL; raises UserError if there is nothing at all, which no bucket tells from a typo."""
    system, root = open_bucket(place)
    system.invalidate_cache()
    try:
        details: dict[str, dict[str, Any]] = stubborn(lambda: system.find(root, detail=True))
    except OSError as fault:
        raise UserError(f"{masked(place.url)}: cannot be listed: {fault.strerror or fault}") from fault
    if not details:
        raise UserError(f"{masked(place.url)}: no file there; check the bucket and the folder in it")
    stripped = {name.removeprefix(f"{root}/"): facts for name, facts in details.items()}
    found = Listing()
    for path in sorted(stripped, key=lambda one: one.split("/")):
        name = path.rpartition("/")[2]
        if path.startswith(".") or "/." in path or "." not in name:
            found.ignored += 1
        elif name.rpartition(".")[2].lower() in EXTENSIONS:
            text = stripped.get(beside(path)) if texts else None
            found.add(path, _mark(stripped[path]), _mark(text) if text is not None else None)
        elif not name.endswith(".txt"):
            found.ignored += 1
    return found


def _mark(facts: Mapping[str, Any]) -> tuple[int, int]:
    """Return (bytes, -1 if that is not told; a number that changes with the content) of a bucket's file.

    The number is the time of the last change in ns, or a hash: of the tag that services give to contents, which tells
    apart what was written within one second, or where there is neither, of all that is told.
    """
    size = facts.get("size")
    told: object = next((facts[name] for name in ("ETag", "etag", "blob_id") if facts.get(name)), None)
    if told is None:
        for name in ("LastModified", "last_modified", "mtime", "updated", "last_commit", "created"):
            time = facts.get(name)
            if isinstance(time, datetime | int | float):
                seconds = time.timestamp() if isinstance(time, datetime) else time
                return int(size) if size is not None else -1, int(seconds * 1e9)
        told = sorted((name, str(value)) for name, value in facts.items())
    return int(size) if size is not None else -1, xxhash.xxh3_64_intdigest(repr(told).encode()) >> 1


# A list of URLs or paths


def _list_entries(project: Project, dataset: DatasetConfig, place: Downloads, asked: Asked) -> Listing:
    """List the images that a CSV file names, fetching those of URLs that are not here yet."""
    assert dataset.csv_file is not None, "checked when the project was loaded"
    found, urls = Listing(), dict[str, str | None]()  # path -> URL, if it has one
    for named, caption in _csv_entries(resolved(project.root, dataset.csv_file), dataset):
        path = _path_of(named)
        urls.setdefault(path, named if is_url(named) else None)
        if texts := texts_of(caption):
            found.captions.setdefault(path, []).extend(texts)
    wanted = {path: url for path, url in islice(urls.items(), asked.limit)
              if url is not None and not place.file(path).exists()}  # fmt: skip
    if not asked.dry_run:
        found.faults = _fetch(wanted, place, dataset.id)
    elif wanted:
        log.warning("%s: %d images are not downloaded yet", dataset.id, len(wanted))
        found.faults = dict.fromkeys(wanted, "not downloaded yet")
    for path in urls:
        try:
            there = place.file(path).stat()
        except OSError:
            found.add(path, NOT_THERE)
        else:
            found.add(path, (there.st_size, there.st_mtime_ns))
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
                (named, (row[caption] or "") if caption is not None else "")
                for row in table
                if (named := (row[dataset.csv_url_column] or "").strip())
            ]
    except (OSError, UnicodeDecodeError, csv.Error) as fault:
        raise UserError(f"{file}: cannot be read: {fault}") from fault


def _path_of(named: str) -> str:
    """Return the path of an image that a list names: of a URL, host and path, told apart by a hash of its query."""
    if not is_url(named):
        return named.replace("\\", "/").removeprefix("./")
    parts = urlsplit(named)
    host = parts.netloc.rpartition("@")[2]  # without a user and password
    path = [_short(part) for part in (host + parts.path).split("/") if part not in ("", ".", "..")]
    if parts.query:
        path[-1] = f"{content_id(parts.query.encode())[:8]}-{path[-1]}"
    return "/".join(path)


def _short(name: str) -> str:
    """Shorten a name that file systems may refuse."""
    if len(name.encode()) <= _LONGEST_NAME:
        return name
    return f"{content_id(name.encode())[:8]}-{name.encode()[-_LONGEST_NAME // 2 :].decode(errors='ignore')}"


def _fetch(wanted: Mapping[str, str], place: Downloads, dataset_id: str) -> dict[str, str]:
    """Download images; return why those failed that did."""
    faults: dict[str, str] = {}
    by_service: dict[str, list[tuple[str, str]]] = {}
    for path, url in wanted.items():
        parts = urlsplit(url)
        by_service.setdefault("http" if parts.scheme in _WEB else parts.scheme + parts.netloc, []).append((path, url))
    with progress(f"download {dataset_id}", len(wanted), "image") as bar:
        for listed in by_service.values():
            for first in range(0, len(listed), _AT_ONCE):
                some = listed[first : first + _AT_ONCE]
                for (path, _), data in zip(some, _get([url for _, url in some]), strict=True):
                    why = _keep(data, Path(place.root) / path) if isinstance(data, bytes) else data
                    if why is not None:
                        faults[path] = f"unreadable: not downloaded: {why.strerror or why}"
                    bar.update()
    return faults


def _keep(data: bytes, file: Path) -> OSError | None:
    """Write a download; the path of one URL may go through the file of another."""
    if any(folder.is_file() for folder in file.parents):
        return FileExistsError(f"{file} cannot be: a part of its path is a file")
    with write_aside(file) as aside:
        aside.write_bytes(data)
    return None


def _get(urls: list[str]) -> list[bytes | OSError]:
    """Read URLs of one service at once; a fault stands in for one that fails."""
    import fsspec  # noqa: PLC0415 - most projects need none

    options: dict[str, Any] = {}
    if urlsplit(urls[0]).scheme in _WEB:
        from aiohttp import ClientTimeout  # noqa: PLC0415 - as above

        options["client_kwargs"] = {"timeout": ClientTimeout(total=None, sock_connect=15, sock_read=60)}
    try:
        system = fsspec.core.url_to_fs(urls[0], **options)[0]
    except (ImportError, ValueError) as fault:
        return [OSError(masked(str(fault)))] * len(urls)
    return fetch_all(system, [system._strip_protocol(url) for url in urls])


# Rows of a dataset


def _list_rows(place: Rows, dataset: DatasetConfig, asked: Asked) -> Listing:
    """List the rows of a dataset; its fingerprint stands in for sizes and times of files."""
    table, found = open_table(place), Listing()
    columns = wanted_columns(table.schema, dataset)
    end = dataset.huggingface.file_extension.lstrip(".")
    enough = asked.limit + 1 if asked.limit is not None else None  # one more shows that there are more
    for number, row in enumerate(islice(table.rows(columns), enough)):
        path = f"{number}.{end}"
        found.add(path, (-1, table.mark))
        note_row(row, path, dataset, found)
    return found
