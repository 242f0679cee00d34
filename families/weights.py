"""Which numbers a safetensors file holds, whoever wrote it: a hash of its tensors, read without a tensor library.

`tensors_id` identifies one file, `combined` the files that a component is split over.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from schemas.errors import UserError
from schemas.keys import canonical

_LENGTH = 8  # bytes that say how long the header is
_LONGEST_HEADER = 100_000_000  # bytes, as safetensors itself allows
_PIECE = 4 << 20
_ALL = 1 << 128  # sums are taken modulo this


@dataclass(frozen=True, slots=True)
class _Stored:
    """One tensor of a file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int  # in the file
    length: int


def tensors_id(path: Path) -> str:
    """Identify a safetensors file by its tensors: names, dtypes, shapes and bytes.

    Neither their order nor the file's metadata matters. The file is read in pieces; raises UserError if it is damaged.
    """
    with path.open("rb", buffering=0) as file:
        return f"{sum(_tensor_id(path, file, one) for one in _stored(path, file)) % _ALL:032x}"


def combined(identities: Iterable[str]) -> str:
    """Identify what several files hold together: the same for one file and for its parts."""
    return f"{sum(int(one, 16) for one in identities) % _ALL:032x}"


def _tensor_id(path: Path, file: BinaryIO, tensor: _Stored) -> int:
    state = xxhash.xxh3_128(canonical([tensor.name, tensor.dtype, tensor.shape]).encode())
    file.seek(tensor.start)
    left = tensor.length
    while left:
        piece = file.read(min(_PIECE, left))
        if not piece:
            raise _damaged(path, "cut short")
        state.update(piece)
        left -= len(piece)
    return state.intdigest()


def _stored(path: Path, file: BinaryIO) -> Iterator[_Stored]:
    """Read the header of a file and yield its tensors; raises UserError unless they are all of it."""
    size = path.stat().st_size
    length = int.from_bytes(file.read(_LENGTH), "little")
    first = _LENGTH + length
    if size < _LENGTH or length > _LONGEST_HEADER or first > size:
        raise _damaged(path, f"{size} bytes, no safetensors header fits in")
    try:
        entries = json.loads(file.read(length))
        entries.pop("__metadata__", None)
        tensors = [_entry(first, name, entry) for name, entry in entries.items()]
    except (ValueError, LookupError, TypeError, AttributeError) as fault:
        raise _damaged(path, f"its header cannot be read: {fault}") from fault
    end = max((one.start + one.length for one in tensors), default=first)
    if end != size:
        raise _damaged(path, f"{size} bytes, its header tells of {end}")
    yield from tensors


def _entry(first: int, name: str, entry: Any) -> _Stored:
    """Read what a header says of a tensor; raises what a malformed one leads to."""
    dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or not all(type(one) is int and one >= 0 for one in (*shape, start, end)):
        raise ValueError(f"{name} is no tensor")
    if end < start or (prod(shape) == 0) != (start == end):
        raise ValueError(f"{name} has {end - start} bytes for a shape of {shape}")
    return _Stored(name, dtype, tuple(shape), first + start, end - start)


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"{path}: damaged ({reason}); fetch or build the checkpoint again")
