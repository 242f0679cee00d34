"""The captions of a whole dataset as columns; `caption_all` is the way in."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from prep.captions import Captioner, Captions, beside
from prep.listing import Listing
from prep.measure import columns_of
from prep.memory import Memory, escaped, is_broken
from prep.reading import Texts
from schemas.console import log, printable
from schemas.datasets import DatasetConfig


@dataclass(frozen=True, slots=True)
class CaptionColumns:
    """The captions of all images, as columns."""

    texts: pa.Array
    source: pa.Array
    sizes: pa.Array  # of the text files
    mtimes: pa.Array
    rejects: dict[int, str]


def caption_all(
    dataset: DatasetConfig, captioner: Captioner, listing: Listing, memory: Memory, texts: Texts
) -> CaptionColumns:
    """Caption all images; those whose text file is unchanged keep what they have."""
    made: list[list[str] | None] = []
    sources: list[str | None] = []
    rejects: dict[int, str] = {}
    kept = memory.same_text.tolist() if captioner.reads_text else [False] * len(listing.paths)
    for row, path in enumerate(listing.paths):
        if kept[row]:
            made.append(None)
            sources.append(None)
            continue
        found = _caption(dataset, captioner, listing, path, texts.found.get(row))
        made.append(found.texts)
        sources.append(found.source)
        if found.reject is not None:
            rejects[row] = found.reject
    _tell_broken(dataset, texts)
    schema = columns_of("captions", "caption_source")
    columns = [pa.array(_cleaned(made), schema.field(0).type), pa.array(sources, pa.string())]
    if any(kept):
        columns = [_overlaid(column, memory, name) for column, name in zip(columns, schema.names, strict=True)]
    sizes, mtimes = (np.frombuffer(numbers, np.int64).copy() for numbers in (listing.text_sizes, listing.text_mtimes))
    for row, (size, mtime_ns) in texts.stats.items():
        sizes[row], mtimes[row] = size, mtime_ns
    without = sizes < 0
    return CaptionColumns(
        columns[0], columns[1], pa.array(sizes, mask=without), pa.array(mtimes, mask=without), rejects
    )


def _tell_broken(dataset: DatasetConfig, texts: Texts) -> None:
    """Warn of references' text files that are there but cannot be used: their pairs keep the targets' captions."""
    broken = [found for found in texts.found.values() if isinstance(found, str)]
    if broken and not dataset.is_target:
        log.warning("%s: %d text files cannot be used, first: %s", dataset.id, len(broken), printable(broken[0]))


def _caption(
    dataset: DatasetConfig, captioner: Captioner, listing: Listing, path: str, read: list[str] | str | None
) -> Captions:
    """Caption one image by what its text file or a table says, or by its name."""
    if captioner.reads_text:
        return captioner.of_found(
            read if read is not None else f"no caption: {_named(beside(path))} is missing", "textfile"
        )
    table = dataset.caption_strategy
    if table in ("parquet", "csv", "huggingface") and not dataset.only_instance_prompt:
        return captioner.of_found(listing.captions.get(path, f"no caption: {table} has none"), table)
    return captioner.of_path(path)


def _named(path: str) -> str:
    return escaped(path.rpartition("/")[2])


def _cleaned(captions: list[list[str] | None]) -> list[list[str] | None]:
    """Replace what is no character, which a file name may hold."""
    return [
        [text if text.isascii() or not is_broken(text) else escaped(text) for text in texts] if texts else texts
        for texts in captions
    ]


def _overlaid(column: pa.Array, memory: Memory, name: str) -> pa.Array:
    """Put in the values of the last manifest where the text file is unchanged."""
    assert memory.table is not None, "something is unchanged"
    known = memory.table[name].combine_chunks()
    both = pa.concat_arrays([known.cast(column.type), column])
    order = np.where(memory.same_text, memory.at, len(known) + np.arange(len(column)))
    return both.take(pa.array(order))
