"""What the last manifest knows of the images that are listed now, so that only what is new is read.

`known_rows` opens it, `recall` compares, `gathered` puts old and new facts together, `changed_rows` counts differences.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from prep.listing import Listing
from prep.measure import Facts
from schemas.rows import ImageRow, arrow_schema
from schemas.tables import Provenance, read_columns


def columns_of(*names: str) -> pa.Schema:
    """Return some columns of the manifest."""
    schema = arrow_schema(ImageRow)
    return pa.schema([schema.field(name) for name in names])


FACTS = columns_of(*(field.name for field in fields(Facts)))

# What later stages do not depend on: a file that was only touched is the same, and so is one that was looked at closer.
CONTENT_APART_FROM = ("mtime_ns", "caption_mtime_ns", "phash", "face", "examined")

# What comparing needs of a manifest.
COMPARED = (
    "path", "image_id", "size_bytes", "mtime_ns", "width", "format", "fault", "caption_source", "caption_size_bytes",
    "caption_mtime_ns",
)  # fmt: skip

_UNSEEN = columns_of("phash", "face", "examined")  # what only pixels show

Numbers: TypeAlias = npt.NDArray[np.int64]


@dataclass(slots=True)
class Memory:
    """What the last manifest knows of the images that are listed now."""

    table: pa.Table | None  # of the columns that comparing needs, or all
    at: Numbers  # row of the table for every image, -1 where it has none
    same_image: npt.NDArray[np.bool_]  # the file has the size and time of then
    same_text: npt.NDArray[np.bool_]  # the same of its text file, and captions were made as they are now
    same_view: bool = True  # what was seen in pixels still holds


def recall(known: pa.Table | None, listing: Listing, *, hashed: bool, captioned_alike: bool) -> Memory:
    """Find every listed image in the last manifest, and tell which files are as they were."""
    count = len(listing.paths)
    nothing = np.zeros(count, np.bool_)
    if known is None or count == 0 or known.num_rows == 0:
        return Memory(known if count else None, np.full(count, -1, np.int64), nothing, nothing.copy())
    at = _places(pa.array(spelled(listing.paths)), known["path"].combine_chunks())
    sizes, mtimes = listing.of("sizes"), listing.of("mtimes")
    settled = _settled(known, hashed=hashed)
    there = at >= 0
    same = there & settled[at] & (mtimes == numbers_of(known, "mtime_ns")[at])
    same &= (sizes == numbers_of(known, "size_bytes")[at]) | ((sizes < 0) & (mtimes > 0))
    text_sizes, text_mtimes = listing.of("text_sizes"), listing.of("text_mtimes")
    text = there & (text_sizes >= 0) & captioned_alike & known["caption_source"].is_valid().to_numpy()[at]
    text &= text_sizes == numbers_of(known, "caption_size_bytes")[at]
    text &= text_mtimes == numbers_of(known, "caption_mtime_ns")[at]
    return Memory(known, at, same, text)


def _places(names: pa.Array, known: pa.Array) -> Numbers:
    """Return where each name stands among those known, -1 where it does not."""
    if names.equals(known):
        return np.arange(len(names))
    found = pc.fill_null(pc.index_in(names, known), -1)
    return np.asarray(found.to_numpy(zero_copy_only=False).astype(np.int64))


def _settled(known: pa.Table, *, hashed: bool) -> npt.NDArray[np.bool_]:
    """Tell the rows whose facts hold as long as the file is the same: identified ones, or measured ones."""
    identified = known["image_id"].is_valid().to_numpy()
    if hashed:
        return np.asarray(identified, np.bool_)
    measured = known["width"].is_valid().to_numpy() & known["fault"].is_null().to_numpy()
    # Of a table's sizes there is no format: they are asked for again.
    return np.asarray(identified | (measured & known["format"].is_valid().to_numpy()))


def numbers_of(table: pa.Table, column: str) -> Numbers:
    """Return a column of whole numbers, -1 for what is null."""
    numbers: Numbers = pc.fill_null(table[column], -1).to_numpy()
    return numbers


def spelled(paths: Sequence[str]) -> list[str]:
    """Spell paths as rows do; bytes that are not UTF-8 are escaped."""
    return [path if path.isascii() or not is_broken(path) else escaped(path) for path in paths]


def is_broken(path: str) -> bool:
    """Tell a path whose bytes are not UTF-8."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return True
    return False


def escaped(path: str) -> str:
    """Spell a path as rows do that is not UTF-8."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def known_rows(
    manifest: Path, before: Provenance | None, source: str, columns: Sequence[str] | None = None
) -> pa.Table | None:
    """Return the rows of the last scan, none if there was none or of another place; raises DamagedTable."""
    if not manifest.exists() or (before is not None and _place_of(before.source) != _place_of(source)):
        return None
    return read_columns(manifest, ImageRow, columns)


def _place_of(source: str) -> str:
    """Return the part of a manifest's source that its facts depend on; what pixels show depends on all of it."""
    return source.partition(":")[0]


def as_batch(columns: Sequence[Sequence[Any]]) -> pa.RecordBatch:
    """Turn columns of facts into Arrow's."""
    return pa.record_batch([pa.array(column, field.type) for column, field in zip(columns, FACTS, strict=True)], FACTS)


def gathered(memory: Memory, rows: Numbers, new: pa.Table) -> pa.Table:
    """Put the facts of all images in order: those known, those of `rows`, and none for what is left."""
    names = [*FACTS.names, *_UNSEEN.names]
    for field in _UNSEEN:
        new = new.append_column(field, _nothing(field.type, new.num_rows))
    known = memory.table.select(names) if memory.table is not None else new.schema.empty_table()
    for field in _UNSEEN if not memory.same_view else ():
        known = known.set_column(known.schema.get_field_index(field.name), field, _nothing(field.type, known.num_rows))
    order = np.where(memory.same_image, memory.at, known.num_rows + new.num_rows - 1)
    order[rows] = known.num_rows + np.arange(len(rows))
    return taken(pa.concat_tables([known.cast(new.schema), new]), order)


def _nothing(kind: pa.DataType, count: int) -> pa.Array:
    """Return a column in which nothing is said."""
    if not pa.types.is_list(kind):
        return pa.nulls(count, kind)
    return pa.ListArray.from_arrays(pa.array(np.zeros(count + 1, np.int32)), pa.array([], kind.value_type), type=kind)


def taken(table: pa.Table, order: Numbers) -> pa.Table:
    """Return rows of a table in an order, column by column so that no more than one is there twice."""
    if np.array_equal(order, np.arange(len(order))):
        return table.slice(0, len(order))
    wanted = pa.array(order)
    return pa.table([column.take(wanted) for column in table.columns], schema=table.schema)


def changed_rows(memory: Memory, table: pa.Table) -> int:
    """Count the images of the last manifest whose row says something else now."""
    if memory.table is None:
        return 0
    both = np.flatnonzero(memory.at >= 0)
    differs = np.zeros(len(both), np.bool_)
    for name in table.column_names:
        if name not in (*CONTENT_APART_FROM, "path", "dataset_id"):
            before, now = _rows(memory.table[name], memory.at[both]), _rows(table[name], both)
            differs |= _differs(before, now)
    return int(differs.sum())


def _rows(column: pa.ChunkedArray, wanted: Numbers) -> pa.Array:
    whole = len(wanted) == len(column) and np.array_equal(wanted, np.arange(len(column)))
    return (column if whole else column.take(pa.array(wanted))).combine_chunks()


def _differs(before: pa.Array, now: pa.Array) -> npt.NDArray[np.bool_]:
    if before.equals(now):
        return np.zeros(len(now), np.bool_)
    if pa.types.is_list(now.type):
        pairs = zip(before.to_pylist(), now.to_pylist(), strict=True)
        return np.fromiter((one != other for one, other in pairs), np.bool_, len(now))
    either = pc.xor(before.is_null(), now.is_null())
    return np.asarray(pc.or_(either, pc.fill_null(pc.not_equal(before, now), False)))
