"""What prep scan learns of single files: their identity and header, and, where asked for, what their pixels show.

`measure` and `examine` run on the pool. A new fact is a field of `Facts` and a column of the same name in
`schemas.rows.ImageRow`.
"""

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

import numpy as np
import xxhash

from prep.captions import read_text
from prep.headers import Header, Read
from prep.hub import Rows, open_rows, row_bytes, row_number
from prep.images import HEAD_BYTES, TURNED, decode, jpeg_damage, looks, read_header
from prep.places import Bucket, Downloads, Folder, Place, read_bytes, read_many, read_parts
from schemas.keys import content_id
from schemas.storage import whole_time

_FETCHED_AHEAD = 2  # files
_PIECE = 256 << 10  # bytes hashed at a time: they stay in the cache of the core
_PART = 64 << 10  # bytes of either end of a bucket's file
_AT_ONCE = 64 << 20  # bytes of a bucket's files in memory at a time

_LONGEST_TEXT = 1 << 16  # bytes of a text file of captions

UNKNOWN = (-1, 0)  # size and time

_CHANGED = "changed while it was read"


@dataclass(slots=True)
class Facts:
    """What is remembered of one file's content; names are those of the columns of a manifest."""

    image_id: str | None = None
    size_bytes: int = 0
    mtime_ns: int = 0
    width: int | None = None
    height: int | None = None
    orientation: int | None = None
    format: str | None = None
    mode: str | None = None
    bits: int | None = None
    frames: int | None = None
    alpha: bool | None = None
    icc: bool | None = None
    fault: str | None = None


@dataclass(frozen=True, slots=True)
class Task:
    """Files to measure, and text files to read, in one go."""

    place: Place
    paths: Sequence[str]  # of images
    stats: Sequence[tuple[int, int]]  # (bytes, modification time in ns) of each, as listed; none for local files
    texts: Sequence[str]  # of text files, relative to the place
    hashed: bool  # identify by content
    view: str = ""
    encoding: str = "utf-8"
    multiline: bool = False  # a text file is one caption
    careful: bool = False  # leave to others what compiled code must look at


@dataclass(frozen=True, slots=True)
class Measured:
    """What came of a task."""

    facts: list[list[Any]]  # columns of `Facts`, one row per path; plain lists, for workers start faster without Arrow
    captions: list[list[str] | str]  # of each text file, or the reason why it has none
    text_stats: list[tuple[int, int]]  # (bytes, modification time in ns) of each local text file as it was read


def columns_of_facts(rows: Sequence[Facts]) -> list[list[Any]]:
    """Turn facts into columns."""
    return [[getattr(row, field.name) for row in rows] for field in fields(Facts)]


def measure(task: Task) -> Measured:
    """Read headers, ids and captions."""
    if isinstance(task.place, Bucket):
        rows = list(_in_bucket(task.place, task))
    elif isinstance(task.place, Rows):
        rows = [_row(task.place, path, listed, task) for path, listed in zip(task.paths, task.stats, strict=True)]
    else:
        rows = list(_files([_spot(task.place, path) for path in task.paths], task))
    contents = _contents(task)
    captions = [
        read_text(content, path, task.encoding, multiline=task.multiline)
        for (content, _), path in zip(contents, task.texts, strict=True)
    ]
    return Measured(columns_of_facts(rows), captions, [listed for _, listed in contents])


def measure_carefully(task: Task) -> Measured:
    """Do the part of `measure` that cannot crash the process; what it leaves has the fault `DEFERRED`."""
    return measure(replace(task, careful=True))


def _contents(task: Task) -> list[tuple[bytes | OSError, tuple[int, int]]]:
    """Read text files, those of a bucket all at once, with the sizes and times of local ones."""
    if isinstance(task.place, Bucket):
        return [(content, UNKNOWN) for content in (read_many(task.place, task.texts) if task.texts else [])]
    assert isinstance(task.place, Folder) or not task.texts, "only folders and buckets have text files"
    return [_text(f"{task.place.root}/{path}") for path in task.texts] if isinstance(task.place, Folder) else []


def _text(file: str) -> tuple[bytes | OSError, tuple[int, int]]:
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            found = os.fstat(descriptor)
            listed = found.st_size, whole_time(found.st_mtime_ns)
            if found.st_size > _LONGEST_TEXT:
                return OSError(f"it has {found.st_size:,} bytes, more than a text of captions may"), listed
            return os.read(descriptor, _LONGEST_TEXT), listed
        finally:
            os.close(descriptor)
    except OSError as fault:
        return fault, UNKNOWN


def _spot(place: Folder | Downloads, path: str) -> str:
    return f"{place.root}/{path}" if isinstance(place, Folder) else str(place.file(path))


def _files(files: Sequence[str], task: Task) -> Iterator[Facts]:
    """Measure local files; the disk fetches those to come while one is hashed."""
    for number, file in enumerate(files):
        if task.hashed and number + _FETCHED_AHEAD < len(files):
            _fetch(files[number + _FETCHED_AHEAD])
        yield _file(file, task)


def _fetch(file: str) -> None:
    """Ask the system to read a file before it is wanted."""
    with suppress(OSError, AttributeError):  # it is told when it is read; not every system can
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)


def _file(file: str, task: Task) -> Facts:
    """Measure a local file through one descriptor."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe must not make us wait
    except OSError as fault:
        return Facts(fault=_told(fault))
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            return Facts(mtime_ns=whole_time(found.st_mtime_ns), fault="unreadable: not a regular file")
        size = found.st_size
        identity = _identity(descriptor) if task.hashed and size else None
        head = os.pread(descriptor, HEAD_BYTES, 0)
        header = read_header(
            head, size, lambda offset, length: os.pread(descriptor, length, offset), careful=task.careful
        )
        after = os.fstat(descriptor) if identity is not None else found
        if (after.st_size, after.st_mtime_ns) != (size, found.st_mtime_ns):
            return Facts(None, after.st_size, whole_time(after.st_mtime_ns), fault=f"unreadable: {_CHANGED}")
        return _facts(identity, size, whole_time(found.st_mtime_ns), header, task)
    except OSError as fault:
        return Facts(fault=_told(fault))
    except MemoryError:
        return Facts(fault="unreadable: not enough memory to read it")
    finally:
        os.close(descriptor)


def _identity(descriptor: int) -> str:
    """Hash a whole file through one buffer that is used again and again."""
    state, view = xxhash.xxh3_128(), _buffer()
    while count := os.readv(descriptor, [view]):
        state.update(view[:count])
    return state.hexdigest()


@cache
def _buffer() -> memoryview:
    return memoryview(bytearray(_PIECE))


def _facts(identity: str | None, size: int, mtime_ns: int, header: Header | str, task: Task) -> Facts:
    if isinstance(header, str):
        return Facts(identity, size, mtime_ns, fault=header)
    width, height = header.width, header.height
    says = looks(task.view)
    if says.get("orientation") == "ignore" and header.orientation in TURNED:
        width, height = height, width
    if "part" in says:
        width //= says["part"][1]
    return Facts(
        image_id=identity,
        size_bytes=size,
        mtime_ns=mtime_ns,
        width=width,
        height=height,
        orientation=header.orientation,
        format=header.format,
        mode=header.mode,
        bits=header.bits,
        frames=header.frames,
        alpha=header.alpha,
        icc=header.icc,
        fault=None if width else "unreadable: no picture is left after cutting it into parts",
    )


def _in_bucket(place: Bucket, task: Task) -> Iterator[Facts]:
    """Measure files of a bucket: whole where they are hashed, else by what their headers need."""
    listed = list(zip(task.paths, task.stats, strict=True))
    if not task.hashed:
        yield from _by_parts(place, listed, task)
        return
    first = 0
    while first < len(listed):
        last, size = first + 1, listed[first][1][0]
        while last < len(listed) and size + listed[last][1][0] <= _AT_ONCE:
            size += listed[last][1][0]
            last += 1
        some = listed[first:last]
        for (_, (_, mtime_ns)), data in zip(some, read_many(place, [path for path, _ in some]), strict=True):
            yield Facts(fault=_told(data)) if isinstance(data, OSError) else _bytes(data, mtime_ns, task)
        first = last


def _by_parts(place: Bucket, listed: Sequence[tuple[str, tuple[int, int]]], task: Task) -> Iterator[Facts]:
    """Measure files of a bucket by their first and last bytes, and whatever else a header asks for."""
    heads = read_parts(place, [(path, 0, min(size, _PART)) for path, (size, _) in listed])
    tails = read_parts(place, [(path, max(0, size - _PART), size) for path, (size, _) in listed])
    for (path, (size, mtime_ns)), head, tail in zip(listed, heads, tails, strict=True):
        if isinstance(head, OSError) or isinstance(tail, OSError):
            yield Facts(fault=_told(head if isinstance(head, OSError) else tail))  # type: ignore[arg-type]
            continue
        try:
            header = read_header(head[:HEAD_BYTES], size, _window(place, path, head, tail, size))
            yield _facts(None, size, mtime_ns, header, task)
        except OSError as fault:
            yield Facts(fault=_told(fault))


def _window(place: Bucket, path: str, head: bytes, tail: bytes, size: int) -> Read:
    """Return a reader of a file of which both ends are here already."""

    def read(offset: int, length: int) -> bytes:
        if offset + length <= len(head) or offset >= size:
            return head[offset : offset + length]
        if offset >= size - len(tail):
            return tail[offset - (size - len(tail)) :][:length]
        [part] = read_parts(place, [(path, offset, min(size, offset + length))])
        if isinstance(part, OSError):
            raise part
        return part

    return read


def _row(place: Rows, path: str, listed: tuple[int, int], task: Task) -> Facts:
    """Measure the image in one row of a dataset."""
    try:
        return _bytes(row_bytes(open_rows(place)[row_number(path)][place.image_column]), listed[1], task)
    except OSError as fault:
        return Facts(fault=_told(fault))


def _bytes(data: bytes, mtime_ns: int, task: Task) -> Facts:
    header = read_header(data[:HEAD_BYTES], len(data), lambda offset, length: data[offset : offset + length])
    return _facts(content_id(data) if task.hashed and data else None, len(data), mtime_ns, header, task)


def _told(fault: OSError) -> str:
    return f"unreadable: {fault.strerror or fault}"


# What pixels show


@dataclass(frozen=True, slots=True)
class Look:
    """One file whose pixels are to be looked at."""

    place: Place
    path: str
    image_id: str | None
    view: str
    wanted: str  # words of `verify`, `phash`, `face`


@dataclass(frozen=True, slots=True)
class Sight:
    """What was seen."""

    fault: str | None = None
    lasting: bool = True  # false if it may be otherwise another time
    phash: str | None = None
    face: tuple[float, float] | None = None  # centre, as shares of width and height


def examine(look: Look) -> Sight:
    """Decode one file whole; its header said that it can be."""
    try:
        data = read_bytes(look.place, look.path)
    except OSError as fault:
        return Sight(_told(fault), lasting=False)
    except MemoryError:
        return Sight("unreadable: not enough memory to read it", lasting=False)
    if look.image_id is not None and content_id(data) != look.image_id:
        return Sight(f"unreadable: {_CHANGED}", lasting=False)
    try:
        picture = decode(data, look.view)
    except MemoryError:
        return Sight("unreadable: not enough memory to decode it", lasting=False)
    wanted = look.wanted.split()
    if isinstance(picture, str):
        return Sight(picture)
    if "verify" in wanted and (damage := jpeg_damage(data)) is not None:
        return Sight(damage)
    return Sight(
        phash=perceptual_hash(picture) if "phash" in wanted else None,
        face=largest_face(picture) if "face" in wanted else None,
    )


def perceptual_hash(picture: Any) -> str:
    """Hash how a picture looks: signs of its 8×8 lowest cosine frequencies about their median, 16 hex digits.

    Zauner, Implementation and Benchmarking of Perceptual Image Hash Functions (2010), section 3.1.
    """
    import cv2  # noqa: PLC0415 - headers alone need none

    gray = np.asarray(picture.convert("L").resize((32, 32), 1), np.float32)
    lowest = cv2.dct(gray)[:8, :8].ravel()
    bits = lowest > np.median(lowest[1:])
    return np.packbits(bits).tobytes().hex()


def largest_face(picture: Any) -> tuple[float, float] | None:
    """Find the centre of the largest face with OpenCV's cascade, as shares of the sides; None if there is none."""
    scale = min(1.0, 640 / max(picture.size))
    small = picture.convert("L").resize([max(1, round(side * scale)) for side in picture.size])
    faces = _cascade().detectMultiScale(np.asarray(small), scaleFactor=1.1, minNeighbors=5, minSize=(24, 24))
    if len(faces) == 0:
        return None
    left, top, width, height = max((tuple(map(int, face)) for face in faces), key=lambda face: (face[2], face))
    return (left + width / 2) / small.width, (top + height / 2) / small.height


@cache
def _cascade() -> Any:
    from cv2 import CascadeClassifier, data  # noqa: PLC0415 - headers alone need none

    return CascadeClassifier(data.haarcascades + "haarcascade_frontalface_default.xml")
