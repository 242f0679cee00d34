"""What tables say of images: captions, sizes, and which rows are wanted.

Tables are Parquet, JSON lines or CSV files beside images, or the other columns of a dataset that the `datasets`
library reads. A new format is a function that yields rows, and a line in `_READERS`.
"""

import csv
import io
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from prep.captions import texts_of
from prep.places import Bucket, Folder, read_bytes
from schemas.console import log
from schemas.datasets import DatasetConfig, FilterFunc
from schemas.errors import UserError
from schemas.paths import is_url, resolved
from schemas.project import Project

_Row: TypeAlias = Mapping[str, Any]
_Check: TypeAlias = Callable[[Collection[str]], None]  # of the columns that a table has; raises UserError

_BATCH = 4096  # rows of a Parquet file decoded at a time


class Found(Protocol):
    """The part of a listing that tables fill in."""

    paths: list[str]
    captions: dict[str, list[str]]
    measured: dict[str, tuple[int, int]]
    rejects: dict[str, str]


class _Named(Protocol):
    """The column names that both kinds of table have."""

    @property
    def caption_column(self) -> tuple[str, ...]: ...
    @property
    def fallback_caption_column(self) -> str | None: ...
    @property
    def width_column(self) -> str | None: ...
    @property
    def height_column(self) -> str | None: ...


# A table beside the images


def read_table_beside(project: Project, dataset: DatasetConfig, place: Folder | Bucket, found: Found) -> None:
    """Take captions and sizes from the table that `parquet` names; raises UserError."""
    wanted = dataset.parquet
    assert wanted is not None, "asked for by the caller"
    file, where = _open(project, place, wanted.path)
    columns = [wanted.filename_column, *_columns(wanted, captions=True)]
    whole, root = wanted.identifier_includes_extension, place.name("").rstrip("/") + "/"
    listed, stems = set(found.paths), dict[str, list[str]]()
    for path in () if whole else found.paths:
        stems.setdefault(_stem(path), []).append(path)
    count = 0
    with file:
        for row in _rows(file, where, columns):
            name = str(cell(row, wanted.filename_column) or "").removeprefix(root).removeprefix("./")
            named = [name] if name in listed else stems.get(name) or stems.get(_stem(name)) or ()
            count += len(named)
            for path in named:
                _note(row, path, wanted, found)
    if found.paths and not count:
        hint = "" if not whole else "; identifier_includes_extension: false compares them without extension"
        log.warning("%s: its column '%s' names none of the images of %s%s", where, wanted.filename_column,
                    dataset.id, hint)  # fmt: skip


def _stem(path: str) -> str:
    """Leave out the extension of a name."""
    folder, slash, name = path.rpartition("/")
    return folder + slash + (name.rpartition(".")[0] or name)


def _open(project: Project, place: Folder | Bucket, path: str) -> tuple[BinaryIO, str]:
    """Open a table below the root, else in the folder or bucket of the images, or at a URL; raises UserError."""
    near = resolved(project.root, path)
    where = path if is_url(path) else str(near) if near.exists() else place.name(path)
    try:
        if is_url(path) or (isinstance(place, Bucket) and not near.exists()):
            folder, _, name = path.rpartition("/")
            options = place.options if isinstance(place, Bucket) else "{}"
            there = Bucket(folder, options) if is_url(path) else place
            return io.BytesIO(read_bytes(there, name if is_url(path) else path)), where
        return Path(where).open("rb"), where
    except OSError as fault:
        told = fault.strerror or fault
        raise UserError(f"{where}: the table that `parquet` names cannot be read: {told}") from fault


def _rows(file: BinaryIO, where: str, columns: Sequence[str]) -> Iterator[_Row]:
    """Read a table; raises UserError."""
    reader = _READERS.get(where.rpartition(".")[2].lower())
    if reader is None:
        raise UserError(f"{where}: a table must be one of {', '.join(f'.{kind}' for kind in _READERS)}")
    try:
        yield from reader(file, columns, lambda known: _check(columns, known, where))
    except (OSError, ValueError, pa.ArrowException, csv.Error) as fault:
        raise UserError(f"{where}: cannot be read: {str(fault).splitlines()[0]}") from fault


def _check(columns: Iterable[str], known: Collection[str], where: str) -> None:
    for column in columns:
        if column not in known:
            raise UserError(f"{where}: no column '{column}'; it has {', '.join(known)}")


def _read_parquet(file: BinaryIO, columns: Sequence[str], check: _Check) -> Iterator[_Row]:
    table = pq.ParquetFile(file)
    check(names_of(table.schema_arrow))
    for batch in table.iter_batches(_BATCH, columns=roots_of(columns, table.schema_arrow)):
        yield from batch.to_pylist()


def _read_csv(file: BinaryIO, columns: Sequence[str], check: _Check) -> Iterator[_Row]:
    with io.TextIOWrapper(file, "utf-8-sig", newline="") as lines:
        table = csv.DictReader(lines)
        check(table.fieldnames or [])
        yield from table


def _read_json(file: BinaryIO, columns: Sequence[str], check: _Check) -> Iterator[_Row]:
    """Read one object per line, or a list of objects; a column may be missing from some, not from all."""
    missing, known = set(columns), dict[str, None]()
    for row in _objects(file):
        if missing:
            known |= dict.fromkeys(row)
            missing -= {column for column in missing if has(row, column)}
        yield row
    check([*known, *(column for column in columns if column not in missing and column not in known)])


def _objects(file: BinaryIO) -> Iterator[_Row]:
    with io.TextIOWrapper(file, "utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if number == 1 and line.lstrip().startswith("["):
                yield from json.loads(line + lines.read())
                return
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError as fault:
                    raise ValueError(f"line {number}: {fault}") from fault
                if not isinstance(row, dict):
                    raise ValueError(f"line {number}: expected an object, found {line.strip()[:40]}")
                yield row


_READERS: Mapping[str, Callable[[BinaryIO, Sequence[str], _Check], Iterator[_Row]]] = {
    "parquet": _read_parquet, "jsonl": _read_json, "json": _read_json, "csv": _read_csv,
}  # fmt: skip


# Columns of a dataset


def wanted_columns(schema: pa.Schema, dataset: DatasetConfig) -> list[str]:
    """Return the columns of a dataset's rows that must be read, besides the images; raises UserError."""
    named = dataset.huggingface
    columns = _columns(named, captions=dataset.caption_strategy == "huggingface")
    columns += _filtering(named.filter_func, named.quality_column)
    _check(columns, names_of(schema), f"{dataset.id}: {dataset.dataset_name}")
    return roots_of(columns, schema)


def note_row(row: _Row, path: str, dataset: DatasetConfig, found: Found) -> None:
    """Take the captions, the size and the filter's verdict of one row of a dataset."""
    named = dataset.huggingface
    _note(row, path, named, found)
    composite = named.composite_image_config
    if composite is not None and composite.enabled and path in found.measured:
        width, height = found.measured[path]
        found.measured[path] = (width // composite.image_count, height)
    if named.filter_func is not None and (why := _unwanted(row, named.filter_func, named.quality_column)):
        found.rejects[path] = why


def _filtering(wanted: FilterFunc | None, scores: str) -> list[str]:
    """Return the columns that a filter looks at."""
    if wanted is None:
        return []
    return [*(["collection"] if wanted.collection else []),
            *([wanted.quality_column or scores] if wanted.quality_thresholds else [])]  # fmt: skip


def _unwanted(row: _Row, wanted: FilterFunc, quality_column: str) -> str | None:
    """Return the reason why `filter_func` leaves a row out, None if it does not; sizes are checked once measured."""
    if wanted.collection and row.get("collection") not in wanted.collection:
        return f"filtered: collection {row.get('collection')!r} is not wanted"
    scores = cell(row, wanted.quality_column or quality_column) if wanted.quality_thresholds else {}
    for name, least in wanted.quality_thresholds.items():
        score = _number(scores.get(name)) if isinstance(scores, Mapping) else None
        if score is None or score < least:
            told = "not known" if score is None else f"{score:g}"
            return f"filtered: {name} is {told}, wanted {least:g}"
    return None


# Both


def _columns(named: _Named, *, captions: bool) -> list[str]:
    """Return the columns that are asked for."""
    columns = [*named.caption_column, named.fallback_caption_column] if captions else []
    columns += [named.width_column, named.height_column]
    return [*dict.fromkeys(column for column in columns if column is not None)]


def _note(row: _Row, path: str, named: _Named, found: Found) -> None:
    """Note the captions and the size of one image; several rows of an image are several captions."""
    texts = [text for column in named.caption_column for text in texts_of(cell(row, column))]
    if not texts and named.fallback_caption_column is not None:
        texts = texts_of(cell(row, named.fallback_caption_column))
    if texts:
        found.captions.setdefault(path, []).extend(texts)
    if named.width_column is not None and named.height_column is not None:
        width, height = (_number(cell(row, column)) for column in (named.width_column, named.height_column))
        if width is not None and height is not None and 1 <= width < 1 << 31 and 1 <= height < 1 << 31:
            found.measured[path] = (int(width), int(height))


def names_of(schema: pa.Schema) -> list[str]:
    """Return the names of all columns, with those inside structs after dots."""
    names: list[str] = []
    for field in schema:
        names.append(field.name)
        if pa.types.is_struct(field.type):
            names += [f"{field.name}.{name}" for name in names_of(pa.schema(field.type))]
    return names


def roots_of(columns: Iterable[str], schema: pa.Schema) -> list[str]:
    """Return the top-level columns that hold some columns."""
    roots = (column if column in schema.names else column.partition(".")[0] for column in columns)
    return list(dict.fromkeys(roots))


def has(row: _Row, column: str) -> bool:
    """Tell whether a row has a column, be it empty; dots reach into structs."""
    value: Any = row
    for part in [column] if column in row else column.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return False
        value = value[part]
    return True


def cell(row: _Row, column: str) -> Any:
    """Return a row's value in a column; dots reach into structs. None if there is none."""
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _number(value: Any) -> float | None:
    """Read a number: itself, its text, or a list of one."""
    if isinstance(value, list | tuple):
        value = value[0] if value else None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if number == number else None
