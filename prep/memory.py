"""What the last manifest knows of the images that are listed now, so that only what is new is read.

`known_rows` opens it, `recall` compares, `gathered` puts old and new facts together, `changed_rows` counts differences.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from prep.listing import Listing
from prep.measure import columns_of, facts_schema
from schemas.console import log
from schemas.errors import UserError
from schemas.rows import ImageRow
from schemas.tables import Provenance, read_columns

CONTENT_APART_FROM = ("mtime_ns", "caption_mtime_ns")  # a file that was only touched is the same

Numbers: TypeAlias = npt.NDArray[np.int64]


@dataclass(slots=True)
class Memory:
    """What the last manifest knows of the images that are listed now."""

    table: pa.Table | None
    at: Numbers  # row of the table for every image, -1 where it has none
    same_image: npt.NDArray[np.bool_]  # the file has the size and time of then
    same_text: npt.NDArray[np.bool_]  # the same of its text file, and captions were made as they are now


def recall(known: pa.Table | None, listing: Listing, *, hashed: bool, captioned_alike: bool) -> Memory:
    """Find every listed image in the last manifest, and tell which files are as they were."""
    count = len(listing.paths)
    nothing = np.zeros(count, np.bool_)
    if known is None or count == 0 or known.num_rows == 0:
        return Memory(known if count else None, np.full(count, -1, np.int64), nothing, nothing.copy())
    at = pc.index_in(pa.array(spelled(listing.paths)), known["path"].combine_chunks())
    at = pc.fill_null(at, -1).to_numpy(zero_copy_only=False).astype(np.int64)
    sizes, mtimes = np.frombuffer(listing.sizes, np.int64), np.frombuffer(listing.mtimes, np.int64)
    settled = _settled(known, hashed=hashed)
    there = at >= 0
    same = there & settled[at] & (mtimes == numbers_of(known, "mtime_ns")[at])
    same &= (sizes == numbers_of(known, "size_bytes")[at]) | ((sizes < 0) & (mtimes > 0))
    text_sizes, text_mtimes = np.frombuffer(listing.text_sizes, np.int64), np.frombuffer(listing.text_mtimes, np.int64)
    text = there & (text_sizes >= 0) & captioned_alike & known["caption_source"].is_valid().to_numpy()[at]
    text &= text_sizes == numbers_of(known, "caption_size_bytes")[at]
    text &= text_mtimes == numbers_of(known, "caption_mtime_ns")[at]
    return Memory(known, at, same, text)


def _settled(known: pa.Table, *, hashed: bool) -> npt.NDArray[np.bool_]:
    """Tell the rows whose facts hold as long as the file is the same: identified ones, or measured ones."""
    identified = known["image_id"].is_valid().to_numpy()
    if hashed:
        return np.asarray(identified, np.bool_)
    return np.asarray(identified | (known["width"].is_valid().to_numpy() & known["fault"].is_null().to_numpy()))


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


def known_rows(manifest: Path, before: Provenance | None, source: str) -> pa.Table | None:
    """Return the rows of the last scan; none if there was none, or of another place, or it is damaged."""
    if not manifest.exists():
        return None
    if before is not None and before.source != source:
        return None
    try:
        return read_columns(manifest, ImageRow)
    except UserError as fault:
        log.warning("%s; scanning everything", fault)
        return None


def gathered(memory: Memory, rows: list[int], new: pa.Table) -> pa.Table:
    """Put the facts of all images in order: those known, those of `rows`, and none for what is left."""
    names = [*facts_schema().names, "phash", "face", "examined"]
    unseen = pa.table(
        {"phash": pa.nulls(new.num_rows, pa.string()), "face": [[]] * new.num_rows,
         "examined": pa.nulls(new.num_rows, pa.string())},
        schema=columns_of("phash", "face", "examined"),
    )  # fmt: skip
    for name in unseen.column_names:
        new = new.append_column(unseen.schema.field(name), unseen[name])
    known = memory.table.select(names) if memory.table is not None else new.schema.empty_table()
    order = np.where(memory.same_image, memory.at, known.num_rows + new.num_rows - 1)
    order[rows] = known.num_rows + np.arange(len(rows))
    both = pa.concat_tables([known.cast(new.schema), new])
    return both.take(pa.array(order)).combine_chunks()


def changed_rows(memory: Memory, table: pa.Table) -> int:
    """Count the images of the last manifest whose row says something else now."""
    if memory.table is None:
        return 0
    both = np.flatnonzero(memory.at >= 0)
    before, now = memory.table.take(pa.array(memory.at[both])), table.take(pa.array(both))
    differs = np.zeros(len(both), np.bool_)
    for name in table.column_names:
        if name not in CONTENT_APART_FROM:
            differs |= _differs(before[name].combine_chunks(), now[name].combine_chunks())
    return int(differs.sum())


def _differs(before: pa.Array, now: pa.Array) -> npt.NDArray[np.bool_]:
    if before.equals(now):
        return np.zeros(len(now), np.bool_)
    if pa.types.is_list(now.type):
        pairs = zip(before.to_pylist(), now.to_pylist(), strict=True)
        return np.fromiter((one != other for one, other in pairs), np.bool_, len(now))
    either = pc.xor(before.is_null(), now.is_null())
    return np.asarray(pc.or_(either, pc.fill_null(pc.not_equal(before, now), False)))
