"""Row tables on disk: Parquet files that carry the fingerprints of what made them.

`write_table` and `read_table` stand side by side; a stage compares `Provenance` to know whether there is work.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from schemas.errors import DamagedTable, UserError
from schemas.rows import arrow_schema, as_columns, from_columns
from schemas.storage import write_aside

TABLE_FORMAT = "2"

_GROUP = 1 << 17  # rows of a row group

RowT = TypeVar("RowT")


@dataclass(frozen=True, slots=True)
class Provenance:
    """What a table was made from: `config` is the hash of its settings, `inputs` of the data that went in."""

    config: str
    inputs: str
    limit: int | None = None  # of --limit, if the table is not the whole
    source: str = ""  # hash of where a manifest's files lie and how they are read: what is known holds there alone
    captions: str = ""  # hash of the settings that a manifest's captions depend on
    noted: str = "{}"  # JSON of what a scan noticed and its rows do not say
    hashed: bool = True  # false for a manifest whose images were not identified: no later stage can use it

    def metadata(self, row_type: type) -> dict[str, str]:
        """Spell it as Parquet schema metadata."""
        said = {"limit": "" if self.limit is None else str(self.limit), "hashed": "yes" if self.hashed else "no"}
        named = {"format": TABLE_FORMAT, "row": row_type.__name__, **asdict(self), **said}
        return {f"pairline.{name}": value for name, value in named.items()}


def write_table(path: Path, rows: list[Any] | pa.Table, row_type: type, provenance: Provenance) -> None:
    """Write rows, or columns of their schema, as one Parquet file, whole or not at all.

    The bytes depend on the values alone, not on the chunks that a table came in.
    """
    table = rows if isinstance(rows, pa.Table) else as_columns(rows, row_type)
    schema = table.schema.with_metadata(provenance.metadata(row_type))
    with (
        write_aside(path) as aside,
        pq.ParquetWriter(aside, schema, compression="zstd", write_page_checksum=True) as writer,
    ):
        for first in range(0, max(1, table.num_rows), _GROUP):
            writer.write_table(table.slice(first, _GROUP).combine_chunks().cast(schema))


def content_of(table: pa.Table, leave_out: Collection[str] = ()) -> str:
    """Identify what a table says, whatever its chunks and buffers look like: 32 hexadecimal digits."""
    state = xxhash.xxh3_128()
    for name in table.column_names:
        if name not in leave_out:
            state.update(f"{name}:{table.num_rows};".encode())
            _feed(state, table.column(name).combine_chunks())
    return state.hexdigest()


def _feed(state: Any, values: pa.Array) -> None:
    """Hash the values of one array: lengths of what has a length, then the values, nulls as such."""
    if values.null_count:
        state.update(np.packbits(values.is_null().to_numpy(zero_copy_only=False)).tobytes())
    if pa.types.is_list(values.type):
        lengths = pc.fill_null(pc.list_value_length(values), -1)
        state.update(lengths.to_numpy(zero_copy_only=False).tobytes())
        _feed(state, values.flatten())
    elif pa.types.is_string(values.type):
        filled = pc.fill_null(values, "")
        state.update(pc.binary_length(filled).to_numpy(zero_copy_only=False).tobytes())
        ends = np.frombuffer(filled.buffers()[1], np.int32)[filled.offset : filled.offset + len(filled) + 1]
        if len(filled):
            state.update(memoryview(filled.buffers()[2] or b"")[ends[0] : ends[-1]])
    else:
        filled = pc.fill_null(values, False if pa.types.is_boolean(values.type) else 0)
        state.update(filled.to_numpy(zero_copy_only=False).tobytes())


def read_provenance(path: Path, row_type: type) -> Provenance | None:
    """Return what made the table, or None if there is none that can be read: missing, damaged, of another format."""
    try:
        metadata = _metadata(path, _open(path), row_type)
        limit = metadata["pairline.limit"]
        return Provenance(
            config=metadata["pairline.config"],
            inputs=metadata["pairline.inputs"],
            limit=int(limit) if limit else None,
            source=metadata["pairline.source"],
            captions=metadata["pairline.captions"],
            noted=metadata["pairline.noted"],
            hashed=metadata["pairline.hashed"] == "yes",
        )
    except (UserError, ValueError):
        return None


def read_table(path: Path, row_type: type[RowT]) -> list[RowT]:
    """Read the rows of a table; raises DamagedTable if the file is damaged or of another kind."""
    columns = read_columns(path, row_type)
    try:
        return from_columns(columns, row_type)
    except (pa.ArrowException, UnicodeDecodeError) as fault:
        raise _damaged(path, fault) from fault


def read_columns(path: Path, row_type: type, names: Sequence[str] | None = None) -> pa.Table:
    """Read some columns of a table, or all; raises DamagedTable if the file is damaged or of another kind."""
    file = _open(path)
    _metadata(path, file, row_type)
    try:
        return file.read(names)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as fault:
        raise _damaged(path, fault) from fault


def read_pieces(path: Path, row_type: type) -> Iterator[pa.Table]:
    """Read a table piece by piece; raises DamagedTable if the file is damaged or of another kind."""
    file = _open(path)
    _metadata(path, file, row_type)
    try:
        for number in range(file.num_row_groups):
            yield file.read_row_group(number)
    except (pa.ArrowException, OSError) as fault:
        raise _damaged(path, fault) from fault


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as fault:
        raise _damaged(path, fault) from fault


def _damaged(path: Path, fault: Exception) -> DamagedTable:
    return DamagedTable(
        f"{path}: damaged ({str(fault).splitlines()[0]}); delete it and run the command that makes it again"
    )


def _metadata(path: Path, file: pq.ParquetFile, row_type: type) -> dict[str, str]:
    try:
        schema = file.schema_arrow
    except (pa.ArrowException, UnicodeDecodeError) as fault:
        raise _damaged(path, fault) from fault
    raw = schema.metadata or {}
    metadata = {key.decode(errors="replace"): value.decode(errors="replace") for key, value in raw.items()}
    kind, version = metadata.get("pairline.row"), metadata.get("pairline.format")
    said = {f"pairline.{field.name}" for field in fields(Provenance)} <= metadata.keys()
    if not said or (kind, version) != (row_type.__name__, TABLE_FORMAT) or not schema.equals(arrow_schema(row_type)):
        raise DamagedTable(
            f"{path}: expected a {row_type.__name__} table of format {TABLE_FORMAT}, found {kind} of format {version}; "
            "delete it and run the command that makes it again"
        )
    return metadata
