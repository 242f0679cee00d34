"""Shards of latents and text embeds: Parquet files of one shape each, found by content key.

`write_shard` and `ShardIndex` stand side by side: what one writes the other reads. A shard's schema metadata says
what the bytes mean and which keys it holds; docs/formats.md lists it. Payloads lie in the file as they are, so that a
row is read where it lies, without a Parquet reader; of a file that somebody wrote anew, pyarrow reads them.
"""

import json
import os
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from threading import Lock
from typing import Any
from weakref import finalize

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from schemas.errors import UserError
from schemas.keys import checksum, digest
from schemas.rows import LatentRow, RejectRow, TextRow, UInt64, arrow_schema, as_columns, from_columns
from schemas.storage import is_aside, write_aside

SHARD_FORMAT = 2
REJECTS = "rejects"  # folder of the images that could not be encoded, beside the buckets

_GROUP_ROWS, _GROUP_BYTES = 16, 8 << 20  # most of a row group: what a generic reader fetches for one row
_LONGEST_HEADER = 128  # bytes of a page before its values
_MOST_ROWS = 1 << 24  # of a shard
_OPEN_FILES = 128

Array = npt.NDArray[np.uint16]  # bfloat16 bit patterns: NumPy has no bfloat16


@dataclass(frozen=True, slots=True)
class ShardHeader:
    """What the rows of one shard are: written to the Parquet schema metadata under `pairline.shard`."""

    row: str  # LatentRow or TextRow
    encoder: str  # key of the encoder: weights, settings and dtype
    shapes: Mapping[str, tuple[int, ...]]  # per binary column; latent is C×H×W
    dtype: str = "bfloat16"
    normalised: bool = True
    format: int = SHARD_FORMAT

    def bytes_of(self, column: str) -> int:
        """Return the bytes of one row of a binary column."""
        return int(np.prod(self.shapes[column])) * 2


def latent_row(key: str, latent: Array) -> LatentRow:
    """Make a row of one encoded image, its checksum included."""
    data = latent.tobytes()
    return LatentRow(key=key, latent=data, checksum=UInt64(checksum(data)))


def text_row(key: str, prompt: str, embed: Array, pooled: Array | None, num_tokens: int) -> TextRow:
    """Make a row of one encoded prompt, its checksum included."""
    data, extra = embed.tobytes(), pooled.tobytes() if pooled is not None else None
    total = UInt64(checksum(data + (extra or b"")))
    return TextRow(key=key, prompt=prompt, embed=data, pooled=extra, num_tokens=num_tokens, checksum=total)


def write_shard(folder: Path, header: ShardHeader, rows: Sequence[LatentRow] | Sequence[TextRow]) -> Path:
    """Write rows of one shape as one shard, named by the keys it holds; returns its path.

    Payload columns are fixed-size binary, plain and uncompressed, one page per row group, and row groups are small: a
    row lies at a known place, and any Parquet reader fetches it cheaply.
    """
    keys = [row.key for row in rows]
    path = folder / f"{_name(keys)}.parquet"
    table = as_columns(list(rows), type(rows[0]))
    for column in header.shapes:
        position = table.schema.get_field_index(column)
        field = table.schema.field(column).with_type(pa.binary(header.bytes_of(column)))
        table = table.set_column(position, field, table.column(column).cast(field.type))
    said = {"pairline.shard": json.dumps(asdict(header), sort_keys=True), "pairline.keys": json.dumps(keys)}
    row_bytes = sum(map(header.bytes_of, header.shapes))
    with write_aside(path) as aside:
        pq.write_table(
            table.replace_schema_metadata(said),
            aside,
            row_group_size=max(1, min(_GROUP_ROWS, _GROUP_BYTES // max(1, row_bytes))),
            data_page_size=2 * _GROUP_BYTES + row_bytes,
            compression="none",
            use_dictionary=False,
            write_statistics=False,
        )
    return path


def _name(keys: Sequence[str]) -> str:
    return digest(list(keys))[:16]


def write_rejects(folder: Path, rows: Sequence[RejectRow]) -> Path:
    """Remember images that could not be encoded, beside the buckets of the store `folder`."""
    path = folder / REJECTS / f"{digest([row.key for row in rows])[:16]}.parquet"
    with write_aside(path) as aside:
        pq.write_table(as_columns(list(rows), RejectRow), aside)
    return path


class ShardIndex:
    """All rows below one encoder's folder, by key. Opening reads the ends of files; `read` fetches one row."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.headers: dict[Path, ShardHeader] = {}
        self.rejects: dict[str, str] = {}
        self._paths: list[Path] = []
        self._places: dict[str, int] = {}  # file × _MOST_ROWS + row
        self._open: OrderedDict[Path, _Shard] = OrderedDict()
        self._lock = Lock()
        for path in sorted(folder.glob("**/*.parquet")) if folder.exists() else []:
            if is_aside(path):
                continue
            if path.parent.name == REJECTS:
                self.rejects |= {record["key"]: record["reject"] for record in _records(path, ["key", "reject"])}
                continue
            self.headers[path], keys = _header(path)
            first = len(self._paths) * _MOST_ROWS
            self._paths.append(path)
            self._places.update(zip(keys, range(first, first + len(keys)), strict=True))

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def header_of(self, key: str) -> ShardHeader:
        """Return the header of the shard that holds `key`; raises KeyError."""
        return self.headers[self._paths[self._places[key] // _MOST_ROWS]]

    def read(self, key: str) -> dict[str, Any]:
        """Fetch one row: binary columns as bfloat16 bit patterns in their shape; raises UserError if damaged.

        Several threads may read at once.
        """
        number, row = divmod(self._places[key], _MOST_ROWS)
        path = self._paths[number]
        header = self.headers[path]
        arrays = {column: np.empty(shape, np.uint16) for column, shape in header.shapes.items()}
        shard = self._shard(path)
        shard.read_into(row, arrays)
        rest = {name: values[row] for name, values in shard.rest.items()}
        if _sum(list(arrays.values())) != rest["checksum"]:
            raise UserError(
                f"{path}: row {row} ({key}) is damaged, its checksum differs; delete this file and run prep cache again"
            )
        absent = {"pooled": None} if header.row == "TextRow" and "pooled" not in header.shapes else {}
        return {"key": key, **rest, **absent, **arrays}

    def _shard(self, path: Path) -> "_Shard":
        """Return an opened shard; the ones used last stay open."""
        with self._lock:
            shard = self._open.get(path)
            if shard is None:
                shard = self._open[path] = _Shard(path, self.headers[path])
                if len(self._open) > _OPEN_FILES:
                    self._open.popitem(last=False)
            else:
                self._open.move_to_end(path)
            return shard


class _Shard:
    """One file, opened: where each row's payload lies in it, and its other columns."""

    def __init__(self, path: Path, header: ShardHeader) -> None:
        self._path, self._header = path, header
        try:
            self._file = os.open(path, os.O_RDONLY)
            finalize(self, os.close, self._file)
            parquet = pq.ParquetFile(path)
            metadata = parquet.metadata
            names = [metadata.schema.column(place).name for place in range(metadata.num_columns)]
            others = [name for name in names if name not in (*header.shapes, "key", "pooled")]
            self.rest: dict[str, list[Any]] = parquet.read(others).to_pydict()
        except (pa.ArrowException, OSError, UnicodeDecodeError) as fault:
            raise _damaged(path, fault) from fault
        self._starts = {name: _starts(metadata, names.index(name), header.bytes_of(name)) for name in header.shapes}

    def read_into(self, row: int, arrays: Mapping[str, Array]) -> None:
        """Fill arrays with a row's payload."""
        for name, array in arrays.items():
            start = self._starts[name]
            if start is None:
                array[...] = self._by_arrow(row, name).reshape(array.shape)
            elif os.preadv(self._file, [array.data.cast("B")], start[row]) != array.nbytes:
                raise _damaged(self._path, OSError("cut short"))

    def _by_arrow(self, row: int, name: str) -> Array:
        """Read a row of a file that somebody wrote otherwise."""
        try:
            [value] = pq.ParquetFile(self._path).read([name]).column(name).slice(row, 1).to_pylist()
        except (pa.ArrowException, OSError, ValueError) as fault:
            raise _damaged(self._path, fault) from fault
        return np.frombuffer(value, np.uint16)


def _starts(metadata: Any, column: int, row_bytes: int) -> list[int] | None:
    """Return where each row of a payload column lies; None if that cannot be told from the file's footer.

    A page is a header, perhaps levels that say which values are null, and the values: they end where their column does.
    """
    starts: list[int] = []
    for group in range(metadata.num_row_groups):
        chunk, rows = metadata.row_group(group).column(column), metadata.row_group(group).num_rows
        before = chunk.total_compressed_size - rows * row_bytes
        plain = chunk.compression == "UNCOMPRESSED" and not chunk.has_dictionary_page
        if not plain or not 0 < before <= _LONGEST_HEADER:
            return None
        first = chunk.data_page_offset + before
        starts += range(first, first + rows * row_bytes, row_bytes)
    return starts


def _sum(arrays: Sequence[Array]) -> int:
    """Sum payloads as if they were one."""
    state = xxhash.xxh3_64()
    for array in arrays:
        state.update(array.data)
    return state.intdigest()


def faults_of(path: Path) -> dict[str | None, str]:
    """Return what is wrong with the rows of a shard, by key; of a file that cannot be read at all, under None."""
    try:
        header, keys = _header(path)
        shard = _Shard(path, header)
        faults: dict[str | None, str] = {}
        for row, key in enumerate(keys):
            arrays = {column: np.empty(shape, np.uint16) for column, shape in header.shapes.items()}
            shard.read_into(row, arrays)
            if _sum(list(arrays.values())) != shard.rest["checksum"][row]:
                faults[key] = "damaged: its checksum differs"
            elif not all(map(_finite, arrays.values())):
                faults[key] = "not finite"
        return faults
    except UserError as fault:
        return {None: str(fault).partition(": ")[2]}


def drop_rows(path: Path, keys: Collection[str]) -> Path | None:
    """Write a shard anew without some of its rows; returns its new path, None if no row is left."""
    header, _ = _header(path)
    row_type = LatentRow if header.row == "LatentRow" else TextRow
    table = pq.ParquetFile(path).read()
    plain = table.cast(arrow_schema(row_type).with_metadata(table.schema.metadata))
    every: list[Any] = from_columns(plain, row_type)
    rows = [row for row in every if row.key not in keys]
    kept = write_shard(path.parent, header, rows) if rows else None
    path.unlink()
    return kept


def _finite(bits: Array) -> bool:
    """Tell bfloat16 bit patterns that are numbers: the eight bits of the exponent are not all ones."""
    return not (bits & np.uint16(0x7F80) == 0x7F80).any()


def _header(path: Path) -> tuple[ShardHeader, list[str]]:
    """Read what a shard says of itself, and its keys; raises UserError if it is damaged or of another format."""
    try:
        metadata = pq.read_metadata(path).metadata or {}
        values = json.loads(metadata[b"pairline.shard"])
        shapes = {column: tuple(shape) for column, shape in values["shapes"].items()}
        header = ShardHeader(**{field.name: values[field.name] for field in fields(ShardHeader)} | {"shapes": shapes})
        if header.format == SHARD_FORMAT:
            keys = json.loads(metadata[b"pairline.keys"])
            if _name(keys) != path.stem:
                raise ValueError("its keys are not those it is named by")
            return header, keys
    except (pa.ArrowException, OSError, KeyError, ValueError) as fault:
        raise _damaged(path, fault) from fault
    raise UserError(
        f"{path}: shard format {header.format}, this version reads {SHARD_FORMAT}; "
        f"delete {path.parent} and run prep cache again"
    )


def _records(path: Path, columns: list[str]) -> list[dict[str, Any]]:
    try:
        records: list[dict[str, Any]] = pq.ParquetFile(path).read(columns).to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as fault:
        raise _damaged(path, fault) from fault
    return records


def _damaged(path: Path, fault: Exception) -> UserError:
    first = str(fault).splitlines()[0] if str(fault) else type(fault).__name__
    return UserError(f"{path}: damaged ({first}); delete this file and run prep cache again")
