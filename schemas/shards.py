"""Shards of latents and text embeds: Parquet files of one shape each, found by content key.

`write_shard` and `ShardIndex` stand side by side: what one writes the other reads. A shard's schema metadata says
what the bytes mean and which keys it holds; docs/formats.md lists it. Payloads lie in the file as they are, so that a
row is read where it lies, without a Parquet reader; of a file that somebody wrote anew, pyarrow reads them.
"""

import json
import os
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from threading import Lock
from typing import Any
from weakref import finalize

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from schemas.errors import Unreachable, UserError
from schemas.keys import canonical, digest
from schemas.rows import LatentRow, RejectRow, TextRow, UInt64, arrow_schema, as_columns
from schemas.stores import Footer, Store, store_at

SHARD_FORMAT, PADDED_FORMAT = 4, 5  # the second of shards with `pad_rows`, which is older readers' warning
SHARD_BYTES = 64 << 20  # of payload; what is merged comes close to it
REJECTS = "rejects"  # folder of the images that could not be encoded, beside the buckets

GROUP_ROWS, GROUP_BYTES = 16, 8 << 20  # most of a row group: what a generic reader fetches for one row
_SUMMED = ("prompt", "num_tokens", "scale", "error")  # columns that a row's sum has beside payload and key
_REST = {"LatentRow": {"checksum"}, "TextRow": {*_SUMMED, "checksum"}}  # columns beside those
_LONGEST_HEADER = 128  # bytes of a page before its values
_MOST_ROWS = 1 << 24  # of a shard
_PADDED = "embed"  # column that `pad_rows` is about
_OPEN_FILES = 128
_KNOWN_SHARDS = 1 << 14  # of which it is remembered where their rows lie: a few KB each
_AT_ONCE = getattr(os, "RWF_NOWAIT", 0)  # read what is in memory, and no more

Array = npt.NDArray[Any]  # unsigned bit patterns: NumPy has neither bfloat16 nor float8

_BITS: Mapping[str, type[np.uint16] | type[np.uint8]] = {"bfloat16": np.uint16, "float8_e4m3fn": np.uint8}


@dataclass(frozen=True, slots=True)
class ShardHeader:
    """What the rows of one shard are: written to the Parquet schema metadata under `pairline.shard`."""

    row: str  # LatentRow or TextRow
    encoder: str  # key of the encoder: weights, settings and dtype
    shapes: Mapping[str, tuple[int, ...]]  # per binary column; latent is C×H×W, or 2C×H×W: mean, then deviation
    dtypes: Mapping[str, str] = field(default_factory=dict)  # of binary columns that are not bfloat16
    pad_rows: int = 0  # of an embed: rows equal to its first that were left out before it
    normalised: bool = True
    format: int = SHARD_FORMAT

    def __post_init__(self) -> None:
        """Name the format that has rows left out, if they are."""
        if self.pad_rows and self.format == SHARD_FORMAT:
            object.__setattr__(self, "format", PADDED_FORMAT)

    def bits(self, column: str) -> type[np.uint16] | type[np.uint8]:
        """Return the unsigned integers that hold a binary column's values."""
        return _BITS[self.dtypes.get(column, "bfloat16")]

    def bytes_of(self, column: str) -> int:
        """Return the bytes of one row of a binary column."""
        rows, *inner = self.shapes[column]
        stored = rows - self.pad_rows if column == _PADDED else rows
        return stored * int(np.prod(inner)) * np.dtype(self.bits(column)).itemsize

    @property
    def row_bytes(self) -> int:
        """Return the bytes of one row's binary columns."""
        return sum(map(self.bytes_of, self.shapes))

    def empty(self, rows: int) -> dict[str, Array]:
        """Return arrays for the binary columns of some rows, whole."""
        return {name: np.empty((rows, *shape), self.bits(name)) for name, shape in self.shapes.items()}

    def stored(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """View what a shard holds of the arrays of one row."""
        return {name: one[self.pad_rows :] if name == _PADDED else one for name, one in arrays.items()}

    def complete(self, arrays: Mapping[str, Array]) -> None:
        """Fill in what a shard does not hold of the arrays of one row."""
        if self.pad_rows:
            arrays[_PADDED][: self.pad_rows] = arrays[_PADDED][self.pad_rows]


def latent_row(key: str, latent: Array) -> LatentRow:
    """Make a row of one encoded image, its checksum included."""
    data = latent.tobytes()
    return LatentRow(key=key, latent=data, checksum=UInt64(_sum([data], key, {})))


def text_row(
    key: str, prompt: str, embed: Array, pooled: Array | None, num_tokens: int,
    lossy: tuple[float, float] | tuple[None, None] = (None, None),
) -> TextRow:  # fmt: skip
    """Make a row of one encoded prompt, its checksum included; `lossy` is the scale and error of a float8 embed."""
    data, extra = embed.tobytes(), pooled.tobytes() if pooled is not None else None
    scale, error = lossy
    rest = {"prompt": prompt, "num_tokens": num_tokens, "scale": scale, "error": error}
    total = UInt64(_sum([data] if extra is None else [data, extra], key, rest))
    return TextRow(key, prompt, data, extra, num_tokens, scale, error, total)


def group_rows(row_bytes: int) -> int:
    """Return how many rows go into one row group."""
    return max(1, min(GROUP_ROWS, GROUP_BYTES // max(1, row_bytes)))


def rebuilt(header: ShardHeader, read: Mapping[str, Any]) -> LatentRow | TextRow:
    """Turn what `ShardIndex.read` gave back into a row, as it is stored."""
    read = {**read, **header.stored({name: read[name] for name in header.shapes})}
    values: dict[str, Any] = {
        name: value.tobytes() if isinstance(value, np.ndarray) else value for name, value in read.items()
    }
    return LatentRow(**values) if header.row == "LatentRow" else TextRow(**values)


def write_shard(folder: Store | Path, header: ShardHeader, rows: Sequence[LatentRow] | Sequence[TextRow]) -> str:
    """Write rows of one shape as one shard, named by the keys it holds; returns its name in the folder.

    Payload columns are fixed-size binary, plain and uncompressed, one page per row group, and row groups are small: a
    row lies at a known place, and any Parquet reader fetches it cheaply.
    """
    schema = arrow_schema(LatentRow if header.row == "LatentRow" else TextRow)
    columns: dict[str, pa.Array | pa.ChunkedArray] = {}
    for one in schema:
        values = [getattr(row, one.name) for row in rows]
        columns[one.name] = (
            _payload(values, header.bytes_of(one.name)) if one.name in header.shapes else pa.array(values, one.type)
        )
    shaped = pa.schema([one.with_type(columns[one.name].type) for one in schema])
    return _write(store_at(folder), header, pa.table(columns, schema=shaped))


def _payload(values: Sequence[bytes], size: int) -> pa.ChunkedArray:
    """Make a column of values as they lie in memory, none of them copied."""
    if any(len(value) != size for value in values):
        raise pa.ArrowInvalid(f"a value of a column of {size} bytes a row has another size")
    kind = pa.binary(size)
    return pa.chunked_array(
        [pa.FixedSizeBinaryArray.from_buffers(kind, 1, [None, pa.py_buffer(value)]) for value in values], kind
    )


def _write(store: Store, header: ShardHeader, table: pa.Table) -> str:
    keys = table.column("key").to_pylist()
    name = shard_name(keys)
    spelled = asdict(header)
    if not header.pad_rows:
        del spelled["pad_rows"]  # as shards were before there was any
    said = {"pairline.shard": json.dumps(spelled, sort_keys=True), "pairline.keys": json.dumps(keys)}
    with store.write(name) as path:
        pq.write_table(
            table.replace_schema_metadata(said),
            path,
            row_group_size=group_rows(header.row_bytes),
            data_page_size=2 * GROUP_BYTES + header.row_bytes,
            compression="none",
            use_dictionary=False,
            write_statistics=False,
        )
    return name


def shard_name(keys: Sequence[str]) -> str:
    """Name the shard that holds these keys, in this order."""
    return f"{digest(list(keys))[:16]}.parquet"


def rows_of_shard(row_bytes: int) -> int:
    """Return how many rows a full shard has."""
    return max(1, SHARD_BYTES // max(1, row_bytes))


def write_rejects(store: Store | Path, rows: Sequence[RejectRow]) -> str:
    """Remember images that could not be encoded, beside the buckets of a store; returns the name of the file."""
    name = f"{REJECTS}/{digest([row.key for row in rows])[:16]}.parquet"
    with store_at(store).write(name) as path:
        pq.write_table(as_columns(list(rows), RejectRow), path)
    return name


class ShardIndex:
    """All rows below one encoder's folder, by key. Opening reads the ends of files; `read` fetches one row."""

    def __init__(self, store: Store | Path, names: Sequence[str] | None = None) -> None:
        """Look at all that is there, or at some files alone."""
        self.store = store_at(store)
        self.headers: dict[str, ShardHeader] = {}  # by name of the shard
        self.rejects: dict[str, str] = {}
        self._names: list[str] = []
        self._places: dict[str, int] = {}  # file × _MOST_ROWS + row
        self._rejected: set[str] = set()  # names of files
        self._known: OrderedDict[str, _Shard] = OrderedDict()
        self._open: OrderedDict[str, _File] = OrderedDict()
        self._lock = Lock()
        if names is None:
            self.refresh()
        else:
            self._take_in(names)

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def refresh(self, below: str = "") -> None:
        """Look for what was written or removed since, everywhere or in one folder; raises UserError if damaged."""
        while not self._looked(below):
            pass

    def _looked(self, below: str) -> bool:
        """Look once; false if files went: what they held may lie in others that were not listed yet."""
        found = self.store.files(below)
        known = {name for name in (*self.headers, *self._rejected) if not below or name.startswith(f"{below}/")}
        whole = self._take_in([name for name in found if name not in known])
        if gone := known - found.keys():
            self.forget(gone)
        return whole and not gone

    def _take_in(self, names: Sequence[str]) -> bool:
        """Read what files hold; tell whether all of them were still there."""
        whole = True
        rejects = [name for name in names if name.split("/")[-2:-1] == [REJECTS]]
        for name in rejects:
            try:
                self.rejects |= rejects_in(self.store, name)
                self._rejected.add(name)
            except FileNotFoundError:
                whole = False
        for name, footer in self.store.footers([name for name in names if name not in rejects]):
            try:
                header, keys = _header(self.store, name, footer)
            except FileNotFoundError:
                whole = False
                continue
            self.headers[name] = header
            first = len(self._names) * _MOST_ROWS
            self._names.append(name)
            self._places.update(zip(keys, range(first, first + len(keys)), strict=True))
        return whole

    def forget(self, names: Collection[str]) -> None:
        """Drop shards that are no more; rows that another shard holds too stay."""
        numbers = {number for number, name in enumerate(self._names) if name in names and name in self.headers}
        for name in names:
            self.headers.pop(name, None)
            self._look_anew(name)
        lost = [key for key, place in self._places.items() if place // _MOST_ROWS in numbers]
        if lost or self._rejected & set(names):
            again = [*self.headers, *(self._rejected - set(names))]
            self.headers, self.rejects, self._names, self._places, self._rejected = {}, {}, [], {}, set()
            with self._lock:
                self._known.clear()
                self._open.clear()
            self._take_in(again)

    def place_of(self, key: str) -> tuple[str, int]:
        """Return (shard, row) of a key; raises KeyError."""
        number, row = divmod(self._places[key], _MOST_ROWS)
        return self._names[number], row

    def header_of(self, key: str) -> ShardHeader:
        """Return the header of the shard that holds `key`; raises KeyError."""
        return self.headers[self.place_of(key)[0]]

    def missing(self, keys: Sequence[str]) -> tuple[list[int], int]:
        """Return the numbers of keys that are neither here nor rejected, and how many are rejected."""
        places, rejects = self._places, self.rejects
        absent = [number for number, key in enumerate(keys) if key not in places]
        if not rejects:
            return absent, 0
        missing = [number for number in absent if keys[number] not in rejects]
        return missing, sum(key in rejects for key in keys)

    def read(self, key: str) -> dict[str, Any]:
        """Fetch one row: binary columns as bit patterns in their shape; raises KeyError, and UserError if damaged.

        Several threads may read at once.
        """
        header = self.header_of(key)
        arrays = header.empty(1)
        [rest] = self.fill([key], arrays)
        return _whole(header, key, rest, arrays)

    def read_from(self, name: str, row: int, key: str) -> dict[str, Any]:
        """Fetch a row, as `read` does, from a shard that is known to hold it, though others may hold it too."""
        arrays = self.headers[name].empty(1)
        rest = self._row((name, row), key, _at(0, arrays), wait=True)
        assert rest is not None, "it waited"
        return _whole(self.headers[name], key, rest, arrays)

    def fill(self, keys: Sequence[str], arrays: Mapping[str, Array]) -> list[dict[str, Any]]:
        """Read rows of one shape into the rows of arrays, which may be reused; returns their other columns.

        `arrays` are as `ShardHeader.empty` makes them, contiguous; they may be views of pinned memory. Raises as `read`
        does. Several threads may read at once, into arrays of their own. What is in memory is read first, while the
        disk brings the rest.
        """
        found = [self._fill(key, _at(place, arrays), len(keys) == 1) for place, key in enumerate(keys)]
        for place, row in enumerate(found):
            if row is None:
                found[place] = self._fill(keys[place], _at(place, arrays), wait=True)
        return [row for row in found if row is not None]

    def _fill(self, key: str, arrays: Mapping[str, Array], wait: bool) -> dict[str, Any] | None:
        """Read one row; None if the disk was asked for it instead, which happens unless told to wait."""
        place = self.place_of(key)
        try:
            return self._row(place, key, arrays, wait)
        except (FileNotFoundError, UserError):  # somebody merged it with others, or wrote it anew
            self._look_anew(place[0])
            self.refresh()
            return self._row(self.place_of(key), key, arrays, wait)

    def _row(self, place: tuple[str, int], key: str, arrays: Mapping[str, Array], wait: bool) -> dict[str, Any] | None:
        name, row = place
        shard, file = self._shard(name)
        stored = shard.header.stored(arrays)
        if not shard.read_into(row, stored, file, wait):
            return None
        rest = {column: values[row].as_py() for column, values in shard.rest.items()}
        if _sum(_buffers(stored), key, rest) != rest["checksum"]:
            raise UserError(
                f"{self.store.where(name)}: row {row} ({key}) is damaged, its checksum differs; "
                "prep cache --verify --repair takes it out and encodes it again"
            )
        shard.header.complete(arrays)
        return rest

    def _shard(self, name: str) -> "tuple[_Shard, _File]":
        """Return where rows of a shard lie, and its file; the ones used last stay known, and fewer of them open."""
        with self._lock:
            shard, file = self._known.get(name), self._open.get(name)
        shard = shard or _Shard(self.store, name, self.headers[name])  # others read meanwhile
        file = file or _File(shard.path)
        with self._lock:
            _keep(self._known, name, shard, _KNOWN_SHARDS)
            _keep(self._open, name, file, _OPEN_FILES)
        return shard, file

    def _look_anew(self, name: str) -> None:
        """Forget where rows of a shard lie."""
        with self._lock:
            self._known.pop(name, None)
            self._open.pop(name, None)


def _at(place: int, arrays: Mapping[str, Array]) -> dict[str, Array]:
    return {name: array[place] for name, array in arrays.items()}


def _keep(kept: OrderedDict[str, Any], name: str, value: object, most: int) -> None:
    kept[name] = value
    kept.move_to_end(name)
    if len(kept) > most:
        kept.popitem(last=False)


class _File:
    """A file that is open for as long as somebody has it."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY)
        finalize(self, os.close, self.number)

    def read_into(self, buffer: memoryview, start: int, wait: bool) -> int:
        """Fill a buffer from a place in the file; returns the bytes, fewer if the disk was only asked for them."""
        if wait or not _AT_ONCE:
            return os.preadv(self.number, [buffer], start)
        try:
            read = os.preadv(self.number, [buffer], start, _AT_ONCE)
        except BlockingIOError:
            read = 0
        except OSError:  # the file system does not know the question
            return os.preadv(self.number, [buffer], start)
        if read < buffer.nbytes:
            os.posix_fadvise(self.number, start, buffer.nbytes, os.POSIX_FADV_WILLNEED)
        return read


def _whole(header: ShardHeader, key: str, rest: dict[str, Any], arrays: Mapping[str, Array]) -> dict[str, Any]:
    absent = {"pooled": None} if header.row == "TextRow" and "pooled" not in header.shapes else {}
    return {"key": key, **rest, **absent, **{name: array[0] for name, array in arrays.items()}}


class _Shard:
    """One file, looked into: where each row's payload lies in it, and its other columns."""

    def __init__(self, store: Store, name: str, header: ShardHeader) -> None:
        self._where, self.header = store.where(name), header
        try:
            self.path = store.local(name)
            parquet = pq.ParquetFile(self.path)
            metadata = parquet.metadata
            names = [metadata.schema.column(place).name for place in range(metadata.num_columns)]
            others = [one for one in names if one not in (*header.shapes, "key", "pooled")]
            table = parquet.read(others, use_threads=False)
            self.rest = {one: table[one].combine_chunks() for one in others}
            self._starts = {one: _starts(metadata, names.index(one), header.bytes_of(one)) for one in header.shapes}
            if not _REST[header.row] <= self.rest.keys():
                raise ValueError("it lacks columns")
        except FileNotFoundError:
            raise
        except (pa.ArrowException, OSError, ValueError, KeyError) as fault:
            raise _damaged(self._where, fault) from fault

    def read_into(self, row: int, arrays: Mapping[str, Array], file: _File, wait: bool = True) -> bool:
        """Fill arrays with a row's payload; tell whether all of it was there, which it is if told to wait."""
        for name, array in arrays.items():
            starts = self._starts[name]
            if starts is None:
                array[...] = self._by_arrow(row, name).reshape(array.shape)
            elif file.read_into(array.data.cast("B"), int(starts[row]), wait) != array.nbytes:
                if not wait:
                    return False
                raise _damaged(self._where, OSError("cut short"))
        return True

    def _by_arrow(self, row: int, name: str) -> Array:
        """Read a row of a file that somebody wrote otherwise."""
        try:
            [value] = pq.ParquetFile(self.path).read([name]).column(name).slice(row, 1).to_pylist()
        except (pa.ArrowException, OSError, ValueError) as fault:
            raise _damaged(self._where, fault) from fault
        return np.frombuffer(value, self.header.bits(name))


def _starts(metadata: Any, column: int, row_bytes: int) -> npt.NDArray[np.int64] | None:
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
    return np.array(starts, np.int64)


def _sum(payloads: Iterable[Any], key: str, rest: Mapping[str, Any]) -> int:
    """Sum a row: its payloads as if they were one, then its key and what else it says, as JSON."""
    state = xxhash.xxh3_64()
    for payload in payloads:
        state.update(payload)
    state.update(canonical([key, *(rest[name] for name in _SUMMED if name in rest)]).encode())
    return state.intdigest()


def _buffers(arrays: Mapping[str, Array]) -> Iterator[memoryview]:
    return (array.data for array in arrays.values())


def faults_of(store: Store | Path, name: str) -> dict[str | None, str]:
    """Return what is wrong with the rows of a shard, by key; of a file that cannot be read at all, under None."""
    store = store_at(store)
    try:
        [(_, footer)] = store.footers([name])
        header, keys = _header(store, name, footer)
        shard = _Shard(store, name, header)
        file, table = _File(shard.path), pq.ParquetFile(shard.path).read()
        faults: dict[str | None, str] = {}
        for row, key in enumerate(keys):
            arrays = header.stored(_at(0, header.empty(1)))
            shard.read_into(row, arrays, file)
            rest = {column: values[row].as_py() for column, values in shard.rest.items()}
            by_others = [table[column][row].as_buffer() for column in header.shapes]  # as other readers see it
            sums = {_sum(_buffers(arrays), key, rest), _sum(by_others, table["key"][row].as_py(), rest)}
            if sums != {rest["checksum"]}:
                faults[key] = "damaged: its checksum differs"
            elif not all(map(is_finite, arrays.values())):
                faults[key] = "not finite"
        return faults
    except Unreachable:
        raise
    except UserError as fault:
        return {None: str(fault).partition(": ")[2]}
    except FileNotFoundError:
        return {}  # merged with others meanwhile
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as fault:
        return {None: f"damaged: {str(fault).splitlines()[0] if str(fault) else type(fault).__name__}"}


def rewrite(store: Store | Path, names: Sequence[str], drop: Collection[str] = ()) -> list[str]:
    """Write the rows of some shards of one folder anew, each key once and in order, without those to drop.

    All have one header. Returns the names of what was written; the old files are removed once the new are there.
    Raises FileNotFoundError, nothing done, if somebody else merged one of them meanwhile.
    """
    store = store_at(store)
    [folder] = {name.rpartition("/")[0] for name in names}
    tables, every, header = [], list[str](), None
    for name in names:
        [(_, footer)] = store.footers([name])
        header, keys_of_it = _header(store, name, footer)
        every += keys_of_it
        try:
            tables.append(pq.ParquetFile(store.local(name)).read().replace_schema_metadata(None))
        except FileNotFoundError:
            raise
        except (pa.ArrowException, OSError) as fault:
            raise _damaged(store.where(name), fault) from fault
    assert header is not None, "there are shards"
    table = pa.concat_tables([one.cast(tables[0].schema) for one in tables])
    place = table.schema.get_field_index("key")  # the footer's keys are those that the file is named by
    table = table.set_column(place, table.schema.field(place), pa.array(every, pa.string()))
    keys = np.asarray(every, object)
    _, first = np.unique(keys, return_index=True)
    kept = np.asarray([place for place in first if keys[place] not in drop], np.int64)
    size = rows_of_shard(header.row_bytes)
    within = store / folder if folder else store
    written = [
        _write(within, header, _rows_of(table, kept[start : start + size])) for start in range(0, len(kept), size)
    ]
    written = [f"{folder}/{name}" if folder else name for name in written]
    for name in names:
        if name not in written:
            store.remove(name)
    return written


def _rows_of(table: pa.Table, rows: npt.NDArray[np.int64]) -> pa.Table:
    """Return some rows; those that follow each other, as what one run wrote does, are not copied."""
    if len(rows) and (np.diff(rows) == 1).all():
        return table.slice(rows[0], len(rows))
    return table.take(pa.array(rows))


def headers_of(store: Store, names: Sequence[str]) -> Iterator[tuple[str, ShardHeader, list[str]]]:
    """Yield (name, header, keys) of shards; raises UserError if one is damaged. What is gone by now is left out."""
    for name, footer in store.footers(names):
        if not isinstance(footer, FileNotFoundError):
            yield name, *_header(store, name, footer)


def is_finite(bits: Array) -> bool:
    """Tell bit patterns that are numbers: of bfloat16 not all bits of the exponent are ones, of float8 not all but the
    sign."""
    if bits.dtype == np.uint8:
        return not (bits & 0x7F == 0x7F).any()
    return not (bits & np.uint16(0x7F80) == 0x7F80).any()


def _header(store: Store, name: str, footer: Footer | Exception) -> tuple[ShardHeader, list[str]]:
    """Read what a shard says of itself, and its keys.

    Raises UserError if it is damaged or of another format, FileNotFoundError if it is no more.
    """
    where = store.where(name)
    try:
        if isinstance(footer, Exception):
            raise footer
        metadata = footer.metadata or {}
        values = json.loads(metadata[b"pairline.shard"])
        if values["format"] in (SHARD_FORMAT, PADDED_FORMAT):
            shapes = {column: tuple(shape) for column, shape in values["shapes"].items()}
            known = {one.name: values[one.name] for one in fields(ShardHeader) if one.name in values}
            header = ShardHeader(**known | {"shapes": shapes})
            keys = json.loads(metadata[b"pairline.keys"])
            if shard_name(keys) != name.rpartition("/")[2]:
                raise ValueError("its keys are not those it is named by")
            return header, keys
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, KeyError, ValueError) as fault:
        raise _damaged(where, fault) from fault
    raise UserError(
        f"{where}: shard format {values['format']}, this version reads {SHARD_FORMAT} and {PADDED_FORMAT}; "
        f"delete {where.rpartition('/')[0]} and run prep cache again"
    )


def rejects_in(store: Store, name: str) -> dict[str, str]:
    """Read one file of rejects: key -> reason; raises UserError if it is damaged, FileNotFoundError if it is gone."""
    return {record["key"]: record["reject"] for record in _records(store, name)}


def _records(store: Store, name: str) -> list[dict[str, Any]]:
    try:
        records: list[dict[str, Any]] = pq.ParquetFile(store.local(name)).read(["key", "reject"]).to_pylist()
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, UnicodeDecodeError) as fault:
        raise _damaged(store.where(name), fault) from fault
    return records


def _damaged(where: str, fault: Exception) -> UserError:
    first = str(fault).splitlines()[0] if str(fault) else type(fault).__name__
    return UserError(
        f"{where}: damaged ({first}); prep cache --verify --repair takes it out, and what it held is encoded again"
    )
