"""What tables say of images: captions, sizes, and which rows are wanted.

Tables are Parquet, JSON lines or CSV files beside images, or the other columns of a dataset that the `datasets`
library reads. A new format is a line in `_READERS`.
"""

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from prep.captions import texts_of
from prep.places import Bucket, Folder, open_bucket, stubborn
from schemas.datasets import DatasetConfig, FilterFunc, MetadataTable
from schemas.errors import UserError
from schemas.paths import resolved
from schemas.project import Project

_READERS: Mapping[str, Callable[[Any], pa.Table]] = {
    "parquet": pq.read_table,
    "jsonl": pyarrow.json.read_json,
    "json": pyarrow.json.read_json,
    "csv": pyarrow.csv.read_csv,
}


class Found(Protocol):
    """The part of a listing that tables fill in."""

    paths: list[str]
    captions: dict[str, list[str]]
    measured: dict[str, tuple[int, int]]
    rejects: dict[str, str]


def read_table_beside(project: Project, dataset: DatasetConfig, place: Folder | Bucket, found: Found) -> None:
    """Take captions and sizes from the table that `parquet` names; raises UserError."""
    wanted = dataset.parquet
    assert wanted is not None, "asked for by the caller"
    table, where = _read(project, place, wanted.path)
    columns = _columns(table, wanted, where)
    whole = wanted.identifier_includes_extension
    by_name = {path if whole else path.rpartition(".")[0]: path for path in found.paths}
    for row in _rows(table, columns):
        name = str(row[wanted.filename_column])
        path = by_name.get(name) or by_name.get(name.rpartition(".")[0] if not whole else name)
        if path is not None:
            _note(row, path, wanted, found)


def _read(project: Project, place: Folder | Bucket, path: str) -> tuple[pa.Table, str]:
    """Read a table from the root, else from the folder or bucket of the images."""
    reader = _READERS.get(path.rpartition(".")[2].lower())
    if reader is None:
        raise UserError(f"{path}: a table must be one of {', '.join(f'.{kind}' for kind in _READERS)}")
    near = resolved(project.root, path)
    where = str(near) if near.exists() else place.name(path)
    try:
        if near.exists() or isinstance(place, Folder):
            return reader(where), where
        system, root = open_bucket(place)
        return reader(io.BytesIO(stubborn(lambda: system.cat_file(f"{root}/{path}")))), where
    except (OSError, pa.ArrowException) as fault:
        raise UserError(f"{where}: cannot be read: {str(fault).splitlines()[0]}") from fault


def _columns(table: pa.Table, wanted: MetadataTable, where: str) -> list[str]:
    """Return the columns that are asked for; raises UserError if one is not there."""
    single = (wanted.filename_column, wanted.fallback_caption_column, wanted.width_column, wanted.height_column)
    columns = [*dict.fromkeys([one for one in single if one is not None] + list(wanted.caption_column))]
    for column in columns:
        if column.partition(".")[0] not in table.column_names:
            raise UserError(f"{where}: no column '{column}'; it has {', '.join(table.column_names)}")
    return columns


def _rows(table: pa.Table, columns: Sequence[str]) -> Iterable[dict[str, Any]]:
    some = table.select(list(dict.fromkeys(column.partition(".")[0] for column in columns)))
    for batch in some.to_batches(max_chunksize=4096):
        yield from batch.to_pylist()


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


def _note(row: Mapping[str, Any], path: str, named: _Named, found: Found) -> None:
    """Note the captions and the size of one image."""
    texts = [text for column in named.caption_column for text in texts_of(cell(row, column))]
    if not texts and named.fallback_caption_column is not None:
        texts = texts_of(cell(row, named.fallback_caption_column))
    if texts:
        found.captions[path] = texts
    if named.width_column is not None and named.height_column is not None:
        width, height = (_length(cell(row, column)) for column in (named.width_column, named.height_column))
        if width and height:
            found.measured[path] = (width, height)


def cell(row: Mapping[str, Any], column: str) -> Any:
    """Return a row's value in a column; dots reach into structs. None if there is none."""
    value: Any = row
    for part in [column] if column in row else column.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _length(value: Any) -> int:
    """Read a width or height: a number, its text, or a list of one."""
    if isinstance(value, list | tuple):
        value = value[0] if value else None
    try:
        return max(0, int(float(value)))
    except (TypeError, ValueError):
        return 0


def read_rows(rows: Any, dataset: DatasetConfig, found: Found) -> None:
    """Take captions, sizes and the filter's verdict from the columns of an opened dataset; raises UserError."""
    named = dataset.huggingface
    asked = dataset.caption_strategy == "huggingface"
    columns = list(named.caption_column) if asked else []
    columns += [one for one in (named.width_column, named.height_column) if one is not None]
    columns += [named.fallback_caption_column] if asked and named.fallback_caption_column is not None else []
    columns += _filtering(named.filter_func, named.quality_column)
    roots = [*dict.fromkeys(column.partition(".")[0] for column in columns)]
    for column in roots:
        if column not in rows.column_names:
            raise UserError(f"{dataset.id}: no column '{column}'; the dataset has {', '.join(rows.column_names)}")
    if not roots:
        return
    for path, row in zip(found.paths, rows.select_columns(roots), strict=True):
        _note(row, path, named, found)
        if named.filter_func is not None and (why := unwanted(row, path, dataset, found)):
            found.rejects[path] = why


def _filtering(wanted: FilterFunc | None, scores: str) -> list[str]:
    """Return the columns that a filter looks at."""
    if wanted is None:
        return []
    return [*(["collection"] if wanted.collection else []),
            *([wanted.quality_column or scores] if wanted.quality_thresholds else [])]  # fmt: skip


def unwanted(row: Mapping[str, Any], path: str, dataset: DatasetConfig, found: Found) -> str | None:
    """Return the reason why `filter_func` leaves a row out, None if it does not; sizes are checked where known."""
    wanted = dataset.huggingface.filter_func
    assert wanted is not None, "asked for by the caller"
    if wanted.collection and row.get("collection") not in wanted.collection:
        return f"filtered: collection {row.get('collection')!r} is not wanted"
    scores = cell(row, wanted.quality_column or dataset.huggingface.quality_column) if wanted.quality_thresholds else {}
    for name, least in wanted.quality_thresholds.items():
        score = scores.get(name) if isinstance(scores, Mapping) else None
        if score is None or score < least:
            return f"filtered: {name} is {score}, wanted {least:g}"
    return None
