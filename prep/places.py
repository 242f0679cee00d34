"""Where the bytes of images are: a folder, a bucket behind a URL, downloads of a list, rows of a dataset.

A new kind is a frozen class here, a branch of `place_of` and one of `read_bytes`. Places are small and can be sent to
other processes; what is opened for them is kept per process.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import islice, repeat
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import xxhash

from prep.fetch import fetch_all, masked, stubborn
from schemas.datasets import DatasetConfig
from schemas.errors import UserError
from schemas.keys import canonical
from schemas.project import Project, is_url, resolved

_BATCH = 1024  # rows of a dataset read at a time


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


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a dataset that the `datasets` library reads; row 7 is `7.jpg`."""

    dataset: str  # hub name, or path of a folder
    split: str
    image_column: str
    revision: str | None = None
    data_files: tuple[str, ...] = ()
    cache_dir: str | None = None
    num_proc: int | None = None
    streaming: bool = False  # prep scan reads it from front to back; later stages open it whole

    def name(self, path: str) -> str:
        """Name one image for a person."""
        return f"{self.dataset}[{self.split}]/{path}"


Place: TypeAlias = Folder | Downloads | Bucket | Rows


def place_of(project: Project, dataset: DatasetConfig) -> Place:
    """Return where a dataset's images are."""
    if dataset.type == "csv":
        assert dataset.csv_file is not None, "checked when the project was loaded"
        return Downloads(str(project.downloads(dataset)), str(resolved(project.root, dataset.csv_file).parent))
    if dataset.type == "huggingface":
        return _rows(project, dataset)
    url = project.url_of(dataset)
    return Bucket(url, _bucket_options(url, dataset)) if url is not None else Folder(str(project.folder_of(dataset)))


def _rows(project: Project, dataset: DatasetConfig) -> Rows:
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
        streaming=table.streaming and not _is_saved(here),
    )


def _bucket_options(url: str, dataset: DatasetConfig) -> str:
    """Spell what fsspec needs to know besides the URL; only S3 needs anything."""
    if not url.startswith(("s3:", "s3a:")):
        return "{}"
    client = {"region_name": dataset.aws_region_name, "endpoint_url": dataset.aws_endpoint_url}
    options: dict[str, object] = {
        "key": dataset.aws_access_key_id,
        "secret": dataset.aws_secret_access_key,
        "token": dataset.aws_session_token,
        "client_kwargs": {name: value for name, value in client.items() if value},
        "config_kwargs": {
            "max_pool_connections": dataset.aws_max_pool_connections,
            "connect_timeout": 10,
            "read_timeout": 60,
            "retries": {"mode": "standard", "total_max_attempts": 1},  # s3fs and we ask again
        },
        "max_concurrency": 1,  # of one file: without, s3fs asks for each file's size first
    }
    return canonical({name: value for name, value in options.items() if value})


def read_bytes(place: Place, path: str) -> bytes:
    """Read one image's file; raises OSError."""
    if isinstance(place, Folder):
        return (Path(place.root) / path).read_bytes()
    if isinstance(place, Downloads):
        return place.file(path).read_bytes()
    if isinstance(place, Rows):
        try:
            return row_bytes(open_rows(replace(place, streaming=False))[row_number(path)][place.image_column])
        except IndexError:
            raise OSError("the dataset has no such row") from None
    [got] = read_many(place, [path])
    if isinstance(got, OSError):
        raise got
    return got


# Buckets


def read_many(place: Bucket, paths: Sequence[str]) -> list[bytes | OSError]:
    """Read several files of a bucket at once; a fault stands in for a file that cannot be read."""
    system, root = open_bucket(place)
    return fetch_all(system, [f"{root}/{path}" for path in paths])


@lru_cache(maxsize=16)
def open_bucket(place: Bucket) -> tuple[Any, str]:
    """Return (fsspec file system, path in it); raises UserError if nothing reads such URLs."""
    import fsspec  # noqa: PLC0415 - most projects need none

    try:
        system, root = fsspec.core.url_to_fs(place.url, **json.loads(place.options))
    except (ImportError, ValueError) as fault:
        raise UserError(f"{masked(place.url)}: cannot be opened: {masked(str(fault))}") from fault
    return system, root.rstrip("/")


# Datasets


def row_number(path: str) -> int:
    """Return the number of the row that a path names."""
    return int(path.partition(".")[0])


def row_bytes(value: Any) -> bytes:
    """Return the bytes of an image column's value: a struct of bytes or a path, bytes, a path, a URL; raises OSError."""
    path = value
    if isinstance(value, dict):
        path = value.get("path")
        value = value.get("bytes")
    if isinstance(value, bytes):
        return value
    if isinstance(path, str):
        return stubborn(lambda: _url_bytes(path)) if is_url(path) else Path(path).read_bytes()
    raise OSError("the row has no image")


def _url_bytes(url: str) -> bytes:
    import fsspec  # noqa: PLC0415 - most projects need none

    with fsspec.open(url, "rb") as file:
        return bytes(file.read())


@lru_cache(maxsize=16)
def open_rows(place: Rows) -> Any:
    """Open a dataset to ask rows by their number for their image, undecoded; raises UserError."""
    with _told(place):
        if place.streaming:
            return _Stream(lambda: _with_images(place, _streamed(place, [place.image_column])))
        return _with_images(place, _whole(place))


@dataclass(frozen=True, slots=True)
class RowTable:
    """The other columns of a dataset."""

    place: Rows
    mark: int  # changes with the dataset
    schema: pa.Schema
    select: Callable[[list[str]], Any]

    def rows(self, columns: list[str]) -> Iterator[Mapping[str, Any]]:
        """Yield the values of some columns, row by row; images are not read. Raises UserError."""
        asked = columns or [self._lightest()]
        with _told(self.place):
            for batch in self.select(asked).with_format("arrow").iter(_BATCH):
                yield from batch.to_pylist() if columns else repeat({}, batch.num_rows)

    def _lightest(self) -> str:
        """Return a column to count rows by."""
        light = [field.name for field in self.schema if not pa.types.is_nested(field.type)
                 and not pa.types.is_binary(field.type)]  # fmt: skip
        return light[0] if light else self.place.image_column


def open_table(place: Rows) -> RowTable:
    """Open a dataset anew, for its other columns; raises UserError."""
    open_rows.cache_clear()
    with _told(place):
        if place.streaming:
            mark, rows = _builder(place)._get_dataset_fingerprint(place.split), _streamed(place)
        else:
            rows = _whole(place)
            mark = rows._fingerprint
        if place.image_column not in rows.column_names:
            known = ", ".join(rows.column_names)
            raise UserError(f"{place.dataset}: no column '{place.image_column}' (image_column); it has {known}")
        return RowTable(
            place,
            xxhash.xxh3_64_intdigest(str(mark).encode()) >> 1,
            rows.features.arrow_schema,
            lambda columns: _streamed(place, columns) if place.streaming else rows.select_columns(columns),
        )


class _Stream:
    """Rows that come from front to back; to ask for an earlier one begins again."""

    def __init__(self, open_it: Callable[[], Any]) -> None:
        self._open = open_it
        self._rows: Iterator[Any] | None = None
        self._next = 0
        self._fault: OSError | None = None  # the source is out of reach

    def __getitem__(self, number: int) -> Any:
        if self._fault is not None:
            raise self._fault
        try:
            return stubborn(lambda: self._take(number))
        except OSError as fault:
            self._fault = fault
            raise

    def _take(self, number: int) -> Any:
        if self._rows is None or number < self._next:
            self._rows, self._next = iter(self._open()), 0
        rows, skipped = self._rows, number - self._next
        self._rows = None  # should it fail
        row = next(islice(rows, skipped, None), None)
        if row is None:
            raise FileNotFoundError("the dataset has no such row")
        self._rows, self._next = rows, number + 1
        return row


def _with_images(place: Rows, rows: Any) -> Any:
    """Keep the image column, and what is in it undecoded."""
    import datasets  # noqa: PLC0415 - slow to load, and most projects need none

    rows = rows.select_columns([place.image_column])
    if isinstance(rows.features[place.image_column], datasets.Image):
        return rows.cast_column(place.image_column, datasets.Image(decode=False))
    return rows


def _whole(place: Rows) -> Any:
    """Open a dataset that is on this machine, or download it."""
    import datasets  # noqa: PLC0415 - slow to load, and most projects need none

    if not _is_saved(Path(place.dataset)):
        return datasets.load_dataset(place.dataset, split=place.split, num_proc=place.num_proc, **_found(place))
    saved = datasets.load_from_disk(place.dataset)
    if isinstance(saved, datasets.Dataset):
        return saved
    if place.split not in saved:
        raise UserError(f"{place.dataset}: no split '{place.split}'; it has {', '.join(saved)}")
    return saved[place.split]


def _streamed(place: Rows, columns: Sequence[str] = ()) -> Any:
    """Open a dataset to be read over the network as it goes, some columns or all."""
    builder = _builder(place)
    narrow = {"columns": list(columns)} if columns and hasattr(builder.config, "columns") else {}
    rows = (_builder(place, **narrow) if narrow else builder).as_streaming_dataset(split=place.split)
    rows = rows if rows.features is not None else rows._resolve_features()
    return rows.select_columns(list(columns)) if columns else rows


def _builder(place: Rows, **more: Any) -> Any:
    import datasets  # noqa: PLC0415 - slow to load, and most projects need none

    return datasets.load_dataset_builder(place.dataset, **_found(place), **more)


def _found(place: Rows) -> dict[str, Any]:
    return {"revision": place.revision, "data_files": list(place.data_files) or None, "cache_dir": place.cache_dir}


def _is_saved(folder: Path) -> bool:
    """Tell a folder of `save_to_disk`."""
    return any((folder / name).exists() for name in ("state.json", "dataset_dict.json"))


@contextmanager
def _told(place: Rows) -> Iterator[None]:
    """Turn whatever the `datasets` library raises into a UserError."""
    import datasets  # noqa: PLC0415 - slow to load, and most projects need none

    datasets.disable_progress_bars()
    try:
        yield
    except UserError:
        raise
    except Exception as fault:
        told = " ".join(masked(str(fault)).split()) or type(fault).__name__
        raise UserError(
            f"{place.dataset}: cannot be opened by the datasets library: {told}; check dataset_name (a hub name, or a "
            "folder from the project's root), split and data_files"
        ) from fault
