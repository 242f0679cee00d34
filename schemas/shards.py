"""Shards of latents and text embeds: Parquet files of one shape each, found by content key.

`write_shard` and `ShardIndex` stand side by side: what one writes the other reads. A shard's schema metadata says
what the bytes mean; docs/formats.md lists it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from schemas.errors import UserError
from schemas.keys import checksum, digest
from schemas.rows import LatentRow, RejectRow, TextRow, UInt64, as_columns
from schemas.storage import is_aside, write_aside

SHARD_FORMAT = 1
REJECTS = "rejects"  # folder of the images that could not be encoded, beside the buckets

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

    Payload columns are fixed-size binary, plain and uncompressed, one row group per row, so that any Parquet reader
    fetches a single row cheaply.
    """
    path = folder / f"{digest([row.key for row in rows])[:16]}.parquet"
    table = as_columns(list(rows), type(rows[0]))
    for column in header.shapes:
        position = table.schema.get_field_index(column)
        field = table.schema.field(column).with_type(pa.binary(header.bytes_of(column)))
        table = table.set_column(position, field, table.column(column).cast(field.type))
    table = table.replace_schema_metadata({"pairline.shard": json.dumps(asdict(header), sort_keys=True)})
    with write_aside(path) as aside:
        pq.write_table(table, aside, row_group_size=1, compression="none", use_dictionary=False, write_statistics=False)
    return path


def write_rejects(folder: Path, rows: Sequence[RejectRow]) -> Path:
    """Remember images that could not be encoded, beside the buckets of the store `folder`."""
    path = folder / REJECTS / f"{digest([row.key for row in rows])[:16]}.parquet"
    with write_aside(path) as aside:
        pq.write_table(as_columns(list(rows), RejectRow), aside)
    return path


@dataclass(frozen=True, slots=True)
class _Place:
    path: Path
    row: int


class ShardIndex:
    """All rows below one encoder's folder, by key. Opening reads key columns only; `read` fetches one row."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.headers: dict[Path, ShardHeader] = {}
        self.rejects: dict[str, str] = {}
        self._places: dict[str, _Place] = {}
        for path in sorted(folder.glob("**/*.parquet")) if folder.exists() else []:
            if is_aside(path):
                continue
            if path.parent.name == REJECTS:
                self.rejects |= {record["key"]: record["reject"] for record in _records(path, None, ["key", "reject"])}
                continue
            self.headers[path] = _header(path)
            for row, record in enumerate(_records(path, None, ["key"])):
                self._places[record["key"]] = _Place(path, row)

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def header_of(self, key: str) -> ShardHeader:
        """Return the header of the shard that holds `key`; raises KeyError."""
        return self.headers[self._places[key].path]

    def read(self, key: str) -> dict[str, Any]:
        """Fetch one row: binary columns as bfloat16 bit patterns in their shape; raises UserError if damaged."""
        place = self._places[key]
        header = self.headers[place.path]
        [record] = _records(place.path, place.row, None)
        payload = b"".join(record[column] or b"" for column in header.shapes)
        if checksum(payload) != record["checksum"]:
            raise UserError(
                f"{place.path}: row {place.row} ({key}) is damaged, its checksum differs; "
                "delete this file and run prep cache again"
            )
        for column, shape in header.shapes.items():
            record[column] = np.frombuffer(bytearray(record[column]), np.uint16).reshape(shape)
        return dict(record)


def _header(path: Path) -> ShardHeader:
    try:
        metadata = pq.read_schema(path).metadata or {}
        values = json.loads(metadata[b"pairline.shard"])
        shapes = {column: tuple(shape) for column, shape in values["shapes"].items()}
        header = ShardHeader(**{field.name: values[field.name] for field in fields(ShardHeader)} | {"shapes": shapes})
    except (pa.ArrowException, OSError, KeyError, ValueError) as fault:
        raise _damaged(path, fault) from fault
    if header.format != SHARD_FORMAT:
        raise UserError(
            f"{path}: shard format {header.format}, this version reads {SHARD_FORMAT}; "
            f"delete {path.parent} and run prep cache again"
        )
    return header


def _records(path: Path, row_group: int | None, columns: list[str] | None) -> list[dict[str, Any]]:
    try:
        file = pq.ParquetFile(path)
        table = file.read(columns) if row_group is None else file.read_row_group(row_group, columns)
        records: list[dict[str, Any]] = table.to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as fault:
        raise _damaged(path, fault) from fault
    return records


def _damaged(path: Path, fault: Exception) -> UserError:
    first = str(fault).splitlines()[0] if str(fault) else type(fault).__name__
    return UserError(f"{path}: damaged ({first}); delete this file and run prep cache again")
