"""Row tables on disk: Parquet files that carry the fingerprints of what made them.

`write_table` and `read_table` stand side by side; a stage compares `Provenance` to know whether there is work.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.errors import UserError
from schemas.rows import arrow_schema, as_columns, from_columns
from schemas.storage import write_aside

TABLE_FORMAT = "1"

RowT = TypeVar("RowT")


@dataclass(frozen=True, slots=True)
class Provenance:
    """What a table was made from: `config` is the hash of its settings, `inputs` of the data that went in."""

    config: str
    inputs: str
    limit: int | None = None  # of --limit, if the table is not the whole
    source: str = ""  # hash of where a manifest's files lie: what is known of them holds there alone

    def metadata(self, row_type: type) -> dict[str, str]:
        """Spell it as Parquet schema metadata."""
        limit = "" if self.limit is None else str(self.limit)
        named = {"format": TABLE_FORMAT, "row": row_type.__name__, **asdict(self), "limit": limit}
        return {f"pairline.{name}": value for name, value in named.items()}


def write_table(path: Path, rows: list[Any], row_type: type, provenance: Provenance) -> None:
    """Write rows as one Parquet file, whole or not at all."""
    table = as_columns(rows, row_type).replace_schema_metadata(provenance.metadata(row_type))
    with write_aside(path) as aside:
        pq.write_table(table, aside, compression="zstd", write_page_checksum=True)


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
        )
    except (UserError, ValueError):
        return None


def read_table(path: Path, row_type: type[RowT]) -> list[RowT]:
    """Read the rows of a table; raises UserError if the file is damaged or of another kind."""
    file = _open(path)
    _metadata(path, file, row_type)
    try:
        return from_columns(file.read(), row_type)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as fault:
        raise _damaged(path, fault) from fault


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as fault:
        raise _damaged(path, fault) from fault


def _damaged(path: Path, fault: Exception) -> UserError:
    return UserError(
        f"{path}: damaged ({str(fault).splitlines()[0]}); delete it and run the command that makes it again"
    )


def _metadata(path: Path, file: pq.ParquetFile, row_type: type) -> dict[str, str]:
    raw = file.schema_arrow.metadata or {}
    metadata = {key.decode(errors="replace"): value.decode(errors="replace") for key, value in raw.items()}
    kind, version = metadata.get("pairline.row"), metadata.get("pairline.format")
    said = {f"pairline.{name}" for name in ("config", "inputs", "limit", "source")} <= metadata.keys()
    if (
        not said
        or kind != row_type.__name__
        or version != TABLE_FORMAT
        or set(file.schema_arrow.names) != set(arrow_schema(row_type).names)
    ):
        raise UserError(
            f"{path}: expected a {row_type.__name__} table of format {TABLE_FORMAT}, found {kind} of format {version}; "
            "delete it and run the command that makes it again"
        )
    return metadata
