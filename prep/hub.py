"""Rows of datasets that the `datasets` library reads: from the hub, from a folder, all at once or as a stream.

`open_table` reads the columns beside the images, `open_rows` the images. What is opened is kept per process.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from schemas.errors import UserError
from schemas.fetch import masked, stubborn
from schemas.paths import is_url

if TYPE_CHECKING:
    import pyarrow as pa

_BATCH = 1024  # rows read at a time


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


def row_number(path: str) -> int:
    """Return the number of the row that a path names."""
    return int(path.partition(".")[0])


def row_bytes(value: Any) -> bytes:
    """Return the bytes of an image column's value: a struct of bytes or path, bytes, a path, a URL; raises OSError."""
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
            return _Stream(lambda: _with_images(place, _streamed(place, _builder(place), [place.image_column])))
        return _with_images(place, _whole(place))


@dataclass(frozen=True, slots=True)
class RowTable:
    """The other columns of a dataset."""

    place: Rows
    mark: int  # changes with the dataset
    schema: "pa.Schema"
    select: Callable[[list[str]], Any]

    def rows(self, columns: list[str]) -> Iterator[Mapping[str, Any]]:
        """Yield the values of some columns, row by row; images are not read. Raises UserError."""
        asked = columns or [self._lightest()]
        with _told(self.place):
            for batch in self.select(asked).with_format("arrow").iter(_BATCH):
                yield from batch.to_pylist() if columns else repeat({}, batch.num_rows)

    def _lightest(self) -> str:
        """Return a column to count rows by."""
        from pyarrow import types  # noqa: PLC0415 - workers start faster without

        light = [field.name for field in self.schema if not types.is_nested(field.type)
                 and not types.is_binary(field.type)]  # fmt: skip
        return light[0] if light else self.place.image_column


def open_table(place: Rows) -> RowTable:
    """Open a dataset anew, for its other columns; raises UserError."""
    open_rows.cache_clear()
    with _told(place):
        if not place.streaming:
            rows = _whole(place)
            return _table(place, rows, rows._fingerprint, rows.select_columns)
        builder = _builder(place)
        mark = builder._get_dataset_fingerprint(place.split)
        return _table(place, _streamed(place, builder), mark, lambda columns: _streamed(place, builder, columns))


def _table(place: Rows, rows: Any, mark: str, select: Callable[[list[str]], Any]) -> RowTable:
    if place.image_column not in rows.column_names:
        known = ", ".join(rows.column_names)
        raise UserError(f"{place.dataset}: no column '{place.image_column}' (image_column); it has {known}")
    return RowTable(place, xxhash.xxh3_64_intdigest(mark.encode()) >> 1, rows.features.arrow_schema, select)


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

    if not is_saved(Path(place.dataset)):
        return datasets.load_dataset(place.dataset, split=place.split, num_proc=place.num_proc, **_found(place))
    saved = datasets.load_from_disk(place.dataset)
    if isinstance(saved, datasets.Dataset):
        return saved
    if place.split not in saved:
        raise UserError(f"{place.dataset}: no split '{place.split}'; it has {', '.join(saved)}")
    return saved[place.split]


def _streamed(place: Rows, builder: Any, columns: Sequence[str] = ()) -> Any:
    """Open a dataset to be read over the network as it goes, some columns or all."""
    if columns and hasattr(builder.config, "columns"):  # of Parquet files no others are transferred
        builder = _builder(place, columns=list(columns))
    rows = builder.as_streaming_dataset(split=place.split)
    rows = rows if rows.features is not None else rows._resolve_features()
    return rows.select_columns(list(columns)) if columns else rows


def _builder(place: Rows, **more: Any) -> Any:
    import datasets  # noqa: PLC0415 - slow to load, and most projects need none

    return datasets.load_dataset_builder(place.dataset, **_found(place), **more)


def _found(place: Rows) -> dict[str, Any]:
    return {"revision": place.revision, "data_files": list(place.data_files) or None, "cache_dir": place.cache_dir}


def is_saved(folder: Path) -> bool:
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
