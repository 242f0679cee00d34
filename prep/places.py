"""Where the bytes of images are: a folder, a bucket behind a URL, downloads of a list, rows of a dataset.

A new kind is a frozen class here, a branch of `place_of` and one of `read_bytes`. Places are small and can be sent to
other processes; what is opened for them is kept per process.
"""

import stat
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from prep.hub import Rows, is_saved, open_rows, row_bytes, row_number
from schemas.fetch import fetch_all, masked, open_url, url_options
from schemas.paths import resolved

if TYPE_CHECKING:  # workers of the pool start in half the time without what checks options
    from schemas.datasets import DatasetConfig
    from schemas.project import Project


@dataclass(frozen=True, slots=True)
class Folder:
    """Files of a local folder."""

    root: str

    def name(self, path: str) -> str:
        """Name one image for a person."""
        return str(Path(self.root) / path)


@dataclass(frozen=True, slots=True)
class Downloads:
    """Images of a list: fetched into a folder, or lying beside the list."""

    root: str
    beside: str

    def name(self, path: str) -> str:
        """Name one image for a person."""
        return str(self.file(path))

    def file(self, path: str) -> Path:
        """Return the file of one image."""
        fetched = Path(self.root) / path
        return fetched if fetched.exists() else Path(self.beside) / path


@dataclass(frozen=True, slots=True)
class Bucket:
    """Files below a URL that fsspec reads."""

    url: str = field(repr=False)  # may hold a password
    options: str = field(default="{}", repr=False)  # JSON; may hold a secret

    def name(self, path: str) -> str:
        """Name one image for a person."""
        return f"{masked(self.url)}/{path}"


Place: TypeAlias = Folder | Downloads | Bucket | Rows


def place_of(project: "Project", dataset: "DatasetConfig") -> Place:
    """Return where a dataset's images are."""
    if dataset.type == "csv":
        assert dataset.csv_file is not None, "checked when the project was loaded"
        return Downloads(str(project.downloads(dataset)), str(resolved(project.root, dataset.csv_file).parent))
    if dataset.type == "huggingface":
        return _rows(project, dataset)
    url = project.url_of(dataset)
    return Bucket(url, url_options(url, dataset)) if url is not None else Folder(str(project.folder_of(dataset)))


def _rows(project: "Project", dataset: "DatasetConfig") -> Rows:
    table = dataset.huggingface
    assert dataset.dataset_name is not None, "checked when the project was loaded"
    here = resolved(project.root, dataset.dataset_name)
    return Rows(
        dataset=str(here) if here.exists() else dataset.dataset_name,
        split=table.split,
        image_column=table.image_column,
        revision=None if here.exists() else table.revision,
        data_files=table.data_files,
        cache_dir=str(resolved(project.root, table.cache_dir)) if table.cache_dir is not None else None,
        num_proc=table.num_proc,
        streaming=table.streaming and not is_saved(here),
    )


def read_bytes(place: Place, path: str) -> bytes:
    """Read one image's file; raises OSError."""
    if isinstance(place, Folder):
        return _file_bytes(Path(place.root) / path)
    if isinstance(place, Downloads):
        return _file_bytes(place.file(path))
    if isinstance(place, Rows):
        try:
            return row_bytes(open_rows(replace(place, streaming=False))[row_number(path)][place.image_column])
        except IndexError:
            raise OSError("the dataset has no such row") from None
    [got] = read_many(place, [path])
    if isinstance(got, OSError):
        raise got
    return got


def _file_bytes(file: Path) -> bytes:
    """Read a file; a pipe would make us wait for ever."""
    if not stat.S_ISREG(file.stat().st_mode):
        raise OSError("not a regular file")
    return file.read_bytes()


# Buckets


def read_many(place: Bucket, paths: Sequence[str]) -> list[bytes | OSError]:
    """Read several files of a bucket at once; a fault stands in for a file that cannot be read."""
    system, root = open_bucket(place)
    return fetch_all(system, [f"{root}/{path}" for path in paths])


def read_parts(place: Bucket, parts: Sequence[tuple[str, int, int]]) -> list[bytes | OSError]:
    """Read parts of several files of a bucket at once: of each (path, start, end)."""
    system, root = open_bucket(place)
    starts, ends = [start for _, start, _ in parts], [end for _, _, end in parts]
    return fetch_all(system, [f"{root}/{path}" for path, _, _ in parts], starts, ends)


def open_bucket(place: Bucket) -> tuple[Any, str]:
    """Return (fsspec file system, path in it); raises UserError if nothing reads such URLs."""
    return open_url(place.url, place.options)
