"""JPEG, and the several pictures of an MPO."""

import struct

from prep.headers.exif import EXIF, TYPE_SIZES, exif_entries, orientation_in_exif, orientation_in_xmp
from prep.headers.header import (
    AHEAD,
    BLOCK,
    CUT_SHORT,
    HEADER_CUT,
    PIECES,
    TAIL,
    WINDOW,
    Found,
    Header,
    Piece,
    Read,
    nothing,
    upright,
    whole,
)

_XMP = b"http://ns.adobe.com/xap/1.0/\0"
_ICC = b"ICC_PROFILE\0"
_MPF = b"MPF\0"
_ULTRA_HDR = b' hdrgm:Version="'  # Pillow takes these for a plain JPEG, in spite of their second picture
_END_OF_IMAGE = b"\xff\xd9"

_FRAME, _SCAN, _APP1, _APP2, _PASSED = b"frame", b"scan", b"app1", b"app2", b""
# Frame headers, then tables, restarts, application segments and comments. What is not here
# has no length or no business before the first scan.
_SEGMENTS = (
    {0xFF00 | marker: _FRAME for marker in (*range(0xC0, 0xC8), *range(0xC9, 0xD0), 0xDE)}
    | {0xFF00 | marker: _PASSED for marker in (0xC4, 0xCC, *range(0xDB, 0xDE), *range(0xDF, 0xF0), 0xFE)}
    | {0xFFDA: _SCAN, 0xFFE1: _APP1, 0xFFE2: _APP2}
)

_JPEG_MODES = {1: "L", 3: "RGB", 4: "CMYK"}
_SEGMENT = struct.Struct(">HH").unpack_from
_FRAME_HEADER = struct.Struct(">BHHB").unpack_from


def read_jpeg(head: bytes, size: int, read: Read) -> Header | str | None:
    """See `prep.headers.parse`."""
    found = _segments(head, size, read) if head[2:3] == b"\xff" else None
    if not isinstance(found, dict):
        return found
    [(scan, length, _)] = found[_SCAN]
    if not _ends(head, size, read, scan + length):
        return CUT_SHORT
    frames = found.get(_FRAME, ())
    if len(frames) != 1:
        return None
    [(frame, length, start)] = frames
    bits, height, width, layers = _FRAME_HEADER(start) if length >= 6 else (0, 0, 0, 0)
    if bits != 8 or layers not in _JPEG_MODES or length != 6 + 3 * layers:
        return None
    if not width or not height:
        return nothing(width, height)
    app1, app2 = found.get(_APP1, []), found.get(_APP2, [])
    orientation = _orientation_of_jpeg(app1, read) if app1 else 1
    pictures = _pictures(app1, app2, read) if app2 else 1
    if orientation is None or pictures is None:
        return None
    icc = any([start.startswith(_ICC) for at, _, start in app2 if at < frame])
    name = "MPO" if pictures > 1 else "JPEG"
    width, height = upright(width, height, orientation)
    return Header(width, height, orientation, name, _JPEG_MODES[layers], bits, pictures, alpha=False, icc=icc)


def _segments(head: bytes, size: int, read: Read) -> Found | str | None:
    """Walk to the first scan; return the segments that matter, by kind."""
    found: Found = {}
    window, base, end, at = head, 0, len(head), 2
    for _ in range(PIECES):
        if at + AHEAD > end:
            if end < size:
                window, base = read(at, WINDOW), at
                end = at + len(window)
            if at + 4 > end:
                return HEADER_CUT
        marker, length = _SEGMENT(window, at - base)
        kind = _SEGMENTS.get(marker)
        if kind is None or length < 2:
            if marker != 0xFFFF:
                return None
            at += 1  # fill byte
            continue
        if kind:
            start = at - base + 4
            found.setdefault(kind, []).append((at + 4, length - 2, window[start : start + length - 2]))
            if kind is _SCAN:
                return found
        at += 2 + length
    return None


def _ends(head: bytes, size: int, read: Read, scan: int) -> bool:
    """Find an end marker behind the first scan header: data of a scan never holds one, a thumbnail lies before.

    What may follow (a second picture, the video of a motion photo) does not matter.
    """
    if size < scan + 2:
        return False
    if (head[size - 2 : size] if size <= len(head) else read(size - 2, 2)) == _END_OF_IMAGE:
        return True
    late = max(scan, size - TAIL)
    if _END_OF_IMAGE in read(late, size - late):
        return True
    starts = range(scan, late, BLOCK - 1)  # one byte of overlap: a marker has two
    return any(_END_OF_IMAGE in read(start, BLOCK) for start in starts)


def _orientation_of_jpeg(app1: list[Piece], read: Read) -> int | None:
    exif = xmp = None
    for piece in app1:
        at, length, start = piece
        if start.startswith(EXIF):
            if exif:  # one EXIF in several segments
                return None
            exif = (at + 6, length - 6, start[6:])
        elif start.startswith(_XMP):
            xmp = piece
    orientation = orientation_in_exif(exif, read) if exif else 0
    if orientation == 0 and xmp:
        orientation = orientation_in_xmp(whole(xmp, read))
    return 1 if orientation == 0 else orientation


def _pictures(app1: list[Piece], app2: list[Piece], read: Read) -> int | None:
    """Return how many pictures a multi-picture index (CIPA DC-007) lists; None if it is doubtful."""
    indices = [piece for piece in app2 if piece[2].startswith(_MPF)]
    if not indices:
        return 1
    index = whole(indices[-1], read)[4:]
    listed = list(exif_entries(index) or ())
    entries = {tag: (kind, number, value) for tag, kind, number, value in listed}
    taken = [(TYPE_SIZES.get(kind, 0) * number, value) for kind, number, value in entries.values()]
    count_kind, count_number, count = entries.get(0xB001, (0, 0, 0))
    kind, number, at = entries.get(0xB002, (0, 0, 0))
    if (count_kind, count_number, kind, number) != (4, 1, 7, 16 * count) or not count or len(entries) < len(listed):
        return None
    # Pillow passes over values beyond the index, and over those that are too many for it.
    if sum(length for length, _ in taken) > len(index) or any(sum(one) > len(index) for one in taken if one[0] > 4):
        return None
    if any(attribute & 7 for attribute in index[at + (0 if index[:1] == b"M" else 3) : at + number : 16]):
        return None  # a picture that is no JPEG
    if count > 1 and any(_ULTRA_HDR in whole(piece, read) for piece in app1):
        return 1
    return count
