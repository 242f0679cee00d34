"""The captions of a whole dataset as columns: those known, those of text files just read, those of tables and names.

`caption_batch` turns what a few text files say into columns as soon as it is read, `caption_all` puts all in order.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from prep.captions import Captioner, Captions, beside
from prep.listing import Listing
from prep.memory import Memory, Numbers, escaped, is_broken, taken
from schemas.console import log, printable

_PIECE = 1 << 16  # images captioned at a time

_COLUMNS = pa.schema(
    [
        pa.field("captions", pa.list_(pa.field("item", pa.string(), False)), False),
        pa.field("caption_source", pa.string()),
        pa.field("caption_size_bytes", pa.int64()),
        pa.field("caption_mtime_ns", pa.int64()),
        pa.field("reject", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class Texts:
    """Captions of text files that were read."""

    rows: Numbers  # of their images
    columns: pa.Table


def caption_batch(
    captioner: Captioner, found: Iterable[list[str] | str], stats: Sequence[tuple[int, int]] = ()
) -> pa.RecordBatch:
    """Turn what text files say, or why they say nothing, into columns; `stats` are their sizes and times."""
    return _columns([captioner.of_found(one, "textfile") for one in found], stats)


def _columns(captions: Sequence[Captions], stats: Sequence[tuple[int, int]]) -> pa.RecordBatch:
    known = [(size, mtime_ns) if size >= 0 else (None, None) for size, mtime_ns in stats] or [(None, None)] * len(
        captions
    )
    columns = [
        [_spelled(one.texts) for one in captions],
        [one.source for one in captions],
        [size for size, _ in known],
        [mtime_ns for _, mtime_ns in known],
        [one.reject for one in captions],
    ]
    return pa.record_batch(
        [pa.array(column, field.type) for column, field in zip(columns, _COLUMNS, strict=True)], _COLUMNS
    )


def _spelled(texts: list[str]) -> list[str]:
    """Replace what is no character, which a file name may hold."""
    return [text if text.isascii() or not is_broken(text) else escaped(text) for text in texts]


def caption_all(captioner: Captioner, listing: Listing, memory: Memory, texts: Texts) -> pa.Table:
    """Caption all images; those whose text file is unchanged keep what they have.

    The table has the manifest's columns of captions, and `reject` where there is none.
    """
    count = len(listing.paths)
    known = memory.same_text if captioner.reads_text else np.zeros(count, np.bool_)
    parts, order, rows = [texts.columns], np.zeros(count, np.int64), texts.columns.num_rows
    order[texts.rows] = np.arange(rows)
    if known.any():
        assert memory.table is not None, "something is known"
        old = memory.table.select(_COLUMNS.names[:-1])
        parts.append(old.append_column(_COLUMNS.field("reject"), pa.nulls(old.num_rows, pa.string())).cast(_COLUMNS))
        order[known] = rows + memory.at[known]
        rows += old.num_rows
    others = ~known
    others[texts.rows] = False
    batches = list(_others(captioner, listing, np.flatnonzero(others)))
    order[others] = rows + np.arange(int(others.sum()))
    parts.append(pa.Table.from_batches(batches, _COLUMNS))
    return taken(pa.concat_tables(parts), order)


def _others(captioner: Captioner, listing: Listing, rows: Numbers) -> Iterator[pa.RecordBatch]:
    """Caption images by a table, their name, the configuration; or say that their text file is missing."""
    table = captioner.dataset.caption_strategy
    tabled = table in ("parquet", "csv", "huggingface") and not captioner.dataset.only_instance_prompt
    for first in range(0, len(rows), _PIECE):
        captions: list[Captions] = []
        for row in rows[first : first + _PIECE].tolist():
            path = listing.paths[row]
            if captioner.reads_text:
                name = escaped(beside(path).rpartition("/")[2])
                captions.append(captioner.of_found(f"no caption: {name} is missing", "textfile"))
            elif tabled:
                captions.append(
                    captioner.of_found(listing.captions.get(path, f"no caption: {table} has none"), str(table))
                )
            else:
                captions.append(captioner.of_path(path))
        yield _columns(captions, ())


def tell_broken(dataset_id: str, found: Iterable[list[str] | str]) -> None:
    """Warn of references' text files that are there but cannot be used: their pairs keep the targets' captions."""
    broken = [one for one in found if isinstance(one, str)]
    if broken:
        log.warning("%s: %d text files cannot be used, first: %s", dataset_id, len(broken), printable(broken[0]))
