"""PNG, animated ones included."""

import re
import struct
import zlib

from prep.headers.exif import orientation_in_exif
from prep.headers.header import (
    AHEAD,
    CUT_SHORT,
    HEADER_CUT,
    PIECES,
    STEPS,
    WINDOW,
    Found,
    Header,
    Piece,
    Read,
    nothing,
    upright,
    whole,
)

_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
_PNG_HEADER = struct.Struct(">8sI4sIIBBBBBI").unpack_from
_PNG_CHUNK = struct.Struct(">I4s").unpack_from
_PNG_FRAME = struct.Struct(">5I").unpack_from
_PNG_MODES = {
    **{(1, 0): "1", (2, 0): "L", (4, 0): "L", (8, 0): "L", (16, 0): "I;16"},
    **{(8, 2): "RGB", (16, 2): "RGB", (1, 3): "P", (2, 3): "P", (4, 3): "P", (8, 3): "P"},
    **{(8, 4): "LA", (16, 4): "RGBA", (8, 6): "RGBA", (16, 6): "RGBA"},  # Pillow has no 16-bit LA
}
# Chunks that Pillow refuses when they are shorter.
_PNG_LEAST = {b"gAMA": 4, b"cHRM": 32, b"sRGB": 1, b"pHYs": 9, b"acTL": 8, b"fcTL": 26, b"iCCP": 2}
_PNG_TEXT = frozenset({b"tEXt", b"zTXt", b"iTXt"})
# Keywords under which Pillow takes a text for more than a text.
_PNG_MEANT = re.compile(rb"(Raw profile type exif|exif|transparency|icc_profile)(\0|\Z)")
_PNG_XMP = b"XML:com.adobe.xmp\0"
_PNG_PACKED_TEXT = 1000  # bytes that cannot unpack to more than the 1 MiB that Pillow bears
_PNG_STRAY = frozenset({b"IHDR", b"IEND", b"fdAT"})  # before the picture: nothing that Pillow reads
_NAME = re.compile(rb"\w{4}").match


def read_png(head: bytes, size: int, read: Read) -> Header | str | None:
    """See `prep.headers.parse`."""
    if head[:8] != b"\x89PNG\r\n\x1a\n":
        return None
    if len(head) < 33:
        return HEADER_CUT
    _, length, name, width, height, bits, colour, compression, kind, _, crc = _PNG_HEADER(head)
    mode = _PNG_MODES.get((bits, colour))
    if (length, name, compression, kind) != (13, b"IHDR", 0, 0) or mode is None or zlib.crc32(head[12:29]) != crc:
        return None
    if not width or not height:
        return nothing(width, height)
    found = _png_chunks(head, size, read)
    if not isinstance(found, dict):
        return found
    ends = _png_ends(head, size, read, found[b"IDAT"][0][0] - 8)
    if not ends:
        return None if ends is None else CUT_SHORT
    orientation = _orientation_of_png(found, read)
    frames = _png_frames(found, width, height, read)
    alpha = _png_alpha(found, mode)
    if orientation is None or frames is None or alpha is None or (mode == "P" and b"PLTE" not in found):
        return None
    width, height = upright(width, height, orientation)
    return Header(width, height, orientation, "PNG", mode, bits, frames, alpha, icc=b"iCCP" in found)


def _png_chunks(head: bytes, size: int, read: Read) -> Found | str | None:
    """Walk to the first picture data; return the chunks on the way, by name."""
    found: Found = {}
    window, base, end, at = head, 0, len(head), 33
    for _ in range(PIECES):
        if at + AHEAD > end and end < size:
            window, base = read(at, WINDOW), at
            end = at + len(window)
        if at + 8 > end:
            return HEADER_CUT
        length, name = _PNG_CHUNK(window, at - base)
        start = at - base + 8
        piece = (at + 8, length, window[start : start + length])
        if name == b"IDAT":
            found[name] = [piece]
            return found
        if not _png_regular(name, piece, window[start + length : start + length + 4]):
            return None
        found.setdefault(b"tEXt" if name in _PNG_TEXT else name, []).append(piece)
        at += 12 + length
    return None


def _png_regular(name: bytes, piece: Piece, crc: bytes) -> bool:
    """Say whether Pillow would read on after this chunk; checksums only where the window holds all of it."""
    _, length, start = piece
    if name in _PNG_STRAY or not _NAME(name) or length < _PNG_LEAST.get(name, 0):
        return False
    if name in _PNG_TEXT and _png_meant(name, length, start):
        return False
    return len(crc) < 4 or zlib.crc32(start, zlib.crc32(name)).to_bytes(4, "big") == crc


def _png_meant(name: bytes, length: int, start: bytes) -> bool:
    """Say whether a text may be more than a text to Pillow, or unpack to more than it bears."""
    packed = name == b"zTXt" or (name == b"iTXt" and start.partition(b"\0")[2][:1] == b"\1")
    return _PNG_MEANT.match(start) is not None or (packed and length > _PNG_PACKED_TEXT)


def _png_ends(head: bytes, size: int, read: Read, at: int) -> bool | None:
    """Find the end chunk, at the end or by a walk from the picture data on; None where the walk meets no chunk."""
    tail = head[size - 12 : size] if size <= len(head) else read(size - 12, 12)
    if tail == _PNG_END and size - 12 > at:
        return True
    for _ in range(STEPS):
        start = read(at, 8)
        if len(start) < 8:
            return False
        length, name = _PNG_CHUNK(start)
        at += 12 + length
        if name == b"IEND":
            return at <= size
        if not _NAME(name):
            return None
    return None


def _orientation_of_png(found: Found, read: Read) -> int | None:
    if b"eXIf" not in found:  # an orientation in XMP alone does not count: see `prep.images`
        return 1
    orientation = orientation_in_exif(found[b"eXIf"][-1], read)
    if orientation == 0 and any(start.startswith(_PNG_XMP) for _, _, start in found.get(b"tEXt", ())):
        return None
    return 1 if orientation == 0 else orientation


def _png_frames(found: Found, width: int, height: int, read: Read) -> int | None:
    if b"acTL" not in found and b"fcTL" not in found:
        return 1
    if len(found.get(b"acTL", ())) != 1 or len(found.get(b"fcTL", ())) > 1:
        return None
    frames = int.from_bytes(whole(found[b"acTL"][0], read)[:4], "big")
    if not 0 < frames <= 0x80000000:
        return None
    if b"fcTL" not in found:
        return frames + 1  # the picture data is no frame of the animation, yet Pillow counts it
    number, frame_width, frame_height, left, top = _PNG_FRAME(found[b"fcTL"][0][2])
    return None if number or left + frame_width > width or top + frame_height > height else frames


def _png_alpha(found: Found, mode: str) -> bool | None:
    if mode in ("LA", "RGBA"):
        return True
    pieces = found.get(b"tRNS", ())
    least = {"P": 0, "RGB": 6}.get(mode, 2)
    return None if any(length < least for _, length, _ in pieces) else bool(pieces)
