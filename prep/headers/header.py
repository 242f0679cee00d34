"""What a header says, and what all readers of headers share: types, limits, words."""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

Read: TypeAlias = Callable[[int, int], bytes]  # (offset, length) -> at most that many bytes of the file


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of itself before any pixel is decoded."""

    width: int  # pixels, of the upright picture (orientations 5 to 8 swap)
    height: int
    orientation: int  # EXIF, 1 to 8; anything else in the file counts as 1
    format: str  # as Pillow names it: JPEG, MPO, PNG, WEBP, GIF, BMP
    mode: str  # as Pillow names it right after Image.open
    bits: int  # per channel, or per palette index, as stored in the file
    frames: int  # 1, or the number of pictures of an animation
    alpha: bool  # transparency of any kind, in the first frame
    icc: bool  # an ICC profile is embedded


# One segment or chunk: where its content lies, its length, and as much of it as the window held. Plain tuples, for a
# scan makes several of them a file.
Piece: TypeAlias = tuple[int, int, bytes]
Found: TypeAlias = dict[bytes, list[Piece]]

WINDOW = 4096  # bytes read at a time while walking
AHEAD = 64  # bytes of a segment that its recognition needs
PIECES = 20_000  # segments or chunks to be remembered: no file may take more than 80 MB
STEPS = 400_000  # of any other walk: no file may keep us longer than about 0.2 s
TAIL = 1 << 16  # where an end marker is looked for first
BLOCK = 1 << 20  # bytes read at a time in search of an end marker
LARGEST_GIF = 1 << 26  # a GIF is walked in memory

HEADER_CUT = "truncated: the header is cut short"
CUT_SHORT = "truncated: no end marker, the file was cut short"

LONG, BIG_LONG = struct.Struct("<I").unpack_from, struct.Struct(">I").unpack_from


def upright(width: int, height: int, orientation: int) -> tuple[int, int]:
    """Return the size of a picture that is turned as its orientation says."""
    return (height, width) if orientation >= 5 else (width, height)


def nothing(width: int, height: int) -> str:
    """Say that there is no picture in a file."""
    return f"unreadable: a picture of {width}x{height} pixels"


def whole(piece: Piece, read: Read) -> bytes:
    """Return all of a segment or chunk."""
    at, length, start = piece
    return start if len(start) >= length else read(at, length)
