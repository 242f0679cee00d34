"""Read what an image file says of itself (size, orientation, mode, frames) and whether it is whole, without a decoder.

To add a format, write a function of the shape of `_bmp` and enter it in `_READERS` under its first two bytes.

The answers equal Pillow's; wherever a file is odd enough that they might not, the answer is None: ask Pillow.
"""

import re
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

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


class _Picture(NamedTuple):
    """One picture of a GIF."""

    right: int
    bottom: int
    palette: bytes | None
    alpha: bool
    end: int  # after its data
    done: bool  # the data was closed by its terminator


# One segment or chunk: where its content lies, its length, and as much of it as the window held. Plain tuples, for a
# scan makes several of them a file.
_Piece: TypeAlias = tuple[int, int, bytes]
_Found: TypeAlias = dict[bytes, list[_Piece]]

_WINDOW = 4096  # bytes read at a time while walking
_AHEAD = 64  # bytes of a segment that its recognition needs
_PIECES = 20_000  # segments or chunks to be remembered: no file may take more than 80 MB
_STEPS = 400_000  # of any other walk: no file may keep us longer than about 0.2 s
_TAIL = 1 << 16  # where an end marker is looked for first
_BLOCK = 1 << 20  # bytes read at a time in search of an end marker
_LARGEST_GIF = 1 << 26  # a GIF is walked in memory

_CUT = "truncated: the header is cut short"
_SHORT = "truncated: no end marker, the file was cut short"

_LONG, _BIG_LONG = struct.Struct("<I").unpack_from, struct.Struct(">I").unpack_from


def parse(head: bytes, size: int, read: Read) -> Header | str | None:
    """Return the header, or the reason why the file cannot be used, or None: not ours, or doubtful, ask Pillow.

    `head` is the first 4096 bytes (or all, if the file is shorter), `size` the bytes of the whole file.
    Errors of `read` pass through; nothing else is raised, whatever the bytes are.
    """
    reader = _READERS.get(head[:2])
    return None if reader is None else reader(head, size, read)


def _upright(width: int, height: int, orientation: int) -> tuple[int, int]:
    return (height, width) if orientation >= 5 else (width, height)


def _nothing(width: int, height: int) -> str:
    return f"unreadable: a picture of {width}x{height} pixels"


# JPEG

_EXIF = b"Exif\0\0"
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


def _jpeg(head: bytes, size: int, read: Read) -> Header | str | None:
    found = _segments(head, size, read) if head[2:3] == b"\xff" else None
    if not isinstance(found, dict):
        return found
    [(scan, length, _)] = found[_SCAN]
    if not _ends(head, size, read, scan + length):
        return _SHORT
    frames = found.get(_FRAME, ())
    if len(frames) != 1:
        return None
    [(frame, length, start)] = frames
    bits, height, width, layers = _FRAME_HEADER(start) if length >= 6 else (0, 0, 0, 0)
    if bits != 8 or layers not in _JPEG_MODES or length != 6 + 3 * layers:
        return None
    if not width or not height:
        return _nothing(width, height)
    app1, app2 = found.get(_APP1, []), found.get(_APP2, [])
    orientation = _orientation_of_jpeg(app1, read) if app1 else 1
    pictures = _pictures(app1, app2, read) if app2 else 1
    if orientation is None or pictures is None:
        return None
    icc = any([start.startswith(_ICC) for at, _, start in app2 if at < frame])
    name = "MPO" if pictures > 1 else "JPEG"
    width, height = _upright(width, height, orientation)
    return Header(width, height, orientation, name, _JPEG_MODES[layers], bits, pictures, alpha=False, icc=icc)


def _segments(head: bytes, size: int, read: Read) -> _Found | str | None:
    """Walk to the first scan; return the segments that matter, by kind."""
    found: _Found = {}
    window, base, end, at = head, 0, len(head), 2
    for _ in range(_PIECES):
        if at + _AHEAD > end:
            if end < size:
                window, base = read(at, _WINDOW), at
                end = at + len(window)
            if at + 4 > end:
                return _CUT
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
    late = max(scan, size - _TAIL)
    if _END_OF_IMAGE in read(late, size - late):
        return True
    starts = range(scan, late, _BLOCK - 1)  # one byte of overlap: a marker has two
    return any(_END_OF_IMAGE in read(start, _BLOCK) for start in starts)


def _orientation_of_jpeg(app1: list[_Piece], read: Read) -> int | None:
    exif = xmp = None
    for piece in app1:
        at, length, start = piece
        if start.startswith(_EXIF):
            if exif:  # one EXIF in several segments
                return None
            exif = (at + 6, length - 6, start[6:])
        elif start.startswith(_XMP):
            xmp = piece
    orientation = _orientation(exif, read) if exif else 0
    if orientation == 0 and xmp:
        orientation = _orientation_in_xmp(_whole(xmp, read))
    return 1 if orientation == 0 else orientation


def _pictures(app1: list[_Piece], app2: list[_Piece], read: Read) -> int | None:
    """Return how many pictures a multi-picture index (CIPA DC-007) lists; None if it is doubtful."""
    indices = [piece for piece in app2 if piece[2].startswith(_MPF)]
    if not indices:
        return 1
    index = _whole(indices[-1], read)[4:]
    listed = list(_entries(index) or ())
    entries = {tag: (kind, number, value) for tag, kind, number, value in listed}
    taken = [(_TYPE_SIZES.get(kind, 0) * number, value) for kind, number, value in entries.values()]
    count_kind, count_number, count = entries.get(0xB001, (0, 0, 0))
    kind, number, at = entries.get(0xB002, (0, 0, 0))
    if (count_kind, count_number, kind, number) != (4, 1, 7, 16 * count) or not count or len(entries) < len(listed):
        return None
    # Pillow passes over values beyond the index, and over those that are too many for it.
    if sum(length for length, _ in taken) > len(index) or any(sum(one) > len(index) for one in taken if one[0] > 4):
        return None
    if any(attribute & 7 for attribute in index[at + (0 if index[:1] == b"M" else 3) : at + number : 16]):
        return None  # a picture that is no JPEG
    if count > 1 and any(_ULTRA_HDR in _whole(piece, read) for piece in app1):
        return 1
    return count


def _whole(piece: _Piece, read: Read) -> bytes:
    at, length, start = piece
    return start if len(start) >= length else read(at, length)


# EXIF: a TIFF file without a picture

_TIFF = {  # entries and their number, an offset, where the two bytes of a short value stand in the four
    b"II*\0": (struct.Struct("<HHII").iter_unpack, struct.Struct("<H").unpack_from, _LONG, 0),
    b"MM\0*": (struct.Struct(">HHII").iter_unpack, struct.Struct(">H").unpack_from, _BIG_LONG, 16),
}
_TYPE_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}
_ORIENTATION = 0x0112
_SHORT_VALUE = 3
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(="|>)([0-9])')  # Pillow's own pattern


def _orientation(exif: _Piece, read: Read) -> int | None:
    """Return the orientation in an EXIF block; 0: it has none; None: doubtful."""
    at, length, tiff = exif
    entries = _entries(tiff)
    if entries is None and len(tiff) < length:
        tiff = read(at, length)
        entries = _entries(tiff)
    if entries is None:
        return None
    for tag, kind, number, value in entries:
        if tag == _ORIENTATION:
            if kind != _SHORT_VALUE or number != 1:
                return None
            orientation: int = value >> _TIFF[tiff[:4]][3] & 0xFFFF
            return orientation if 1 <= orientation <= 8 else 1
        taken = _TYPE_SIZES.get(kind, 0) * number
        if taken > 4 and value + taken > length:  # Pillow stops here, and misses what follows
            return None
    return 0


def _entries(tiff: bytes) -> Iterator[tuple[int, int, int, int]] | None:
    """Return (tag, type, number, value or offset) of the first directory; None if it is not within these bytes."""
    order = _TIFF.get(tiff[:4])
    if order is None or len(tiff) < 8:
        return None
    unpack, short, long, _ = order
    [at] = long(tiff, 4)
    if at < 8 or at + 2 > len(tiff):
        return None
    [number] = short(tiff, at)
    if at + 2 + 12 * number > len(tiff):
        return None
    return unpack(tiff[at + 2 : at + 2 + 12 * number])


def _orientation_in_xmp(xmp: bytes) -> int:
    """Return the orientation that XMP names, as Pillow does when EXIF has none; 0: it has none."""
    match = _XMP_ORIENTATION.search(xmp)
    if match is None:
        return 0
    orientation = int(match[2])
    return orientation if 1 <= orientation <= 8 else 1


# PNG

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


def _png(head: bytes, size: int, read: Read) -> Header | str | None:
    if head[:8] != b"\x89PNG\r\n\x1a\n":
        return None
    if len(head) < 33:
        return _CUT
    _, length, name, width, height, bits, colour, compression, kind, _, crc = _PNG_HEADER(head)
    mode = _PNG_MODES.get((bits, colour))
    if (length, name, compression, kind) != (13, b"IHDR", 0, 0) or mode is None or zlib.crc32(head[12:29]) != crc:
        return None
    if not width or not height:
        return _nothing(width, height)
    found = _png_chunks(head, size, read)
    if not isinstance(found, dict):
        return found
    ends = _png_ends(head, size, read, found[b"IDAT"][0][0] - 8)
    if not ends:
        return None if ends is None else _SHORT
    orientation = _orientation_of_png(found, read)
    frames = _png_frames(found, width, height, read)
    alpha = _png_alpha(found, mode)
    if orientation is None or frames is None or alpha is None or (mode == "P" and b"PLTE" not in found):
        return None
    width, height = _upright(width, height, orientation)
    return Header(width, height, orientation, "PNG", mode, bits, frames, alpha, icc=b"iCCP" in found)


def _png_chunks(head: bytes, size: int, read: Read) -> _Found | str | None:
    """Walk to the first picture data; return the chunks on the way, by name."""
    found: _Found = {}
    window, base, end, at = head, 0, len(head), 33
    for _ in range(_PIECES):
        if at + _AHEAD > end and end < size:
            window, base = read(at, _WINDOW), at
            end = at + len(window)
        if at + 8 > end:
            return _CUT
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


def _png_regular(name: bytes, piece: _Piece, crc: bytes) -> bool:
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
    for _ in range(_STEPS):
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


def _orientation_of_png(found: _Found, read: Read) -> int | None:
    if b"eXIf" not in found:  # an orientation in XMP alone does not count: see `prep.images`
        return 1
    orientation = _orientation(found[b"eXIf"][-1], read)
    if orientation == 0 and any(start.startswith(_PNG_XMP) for _, _, start in found.get(b"tEXt", ())):
        return None
    return 1 if orientation == 0 else orientation


def _png_frames(found: _Found, width: int, height: int, read: Read) -> int | None:
    if b"acTL" not in found and b"fcTL" not in found:
        return 1
    if len(found.get(b"acTL", ())) != 1 or len(found.get(b"fcTL", ())) > 1:
        return None
    frames = int.from_bytes(_whole(found[b"acTL"][0], read)[:4], "big")
    if not 0 < frames <= 0x80000000:
        return None
    if b"fcTL" not in found:
        return frames + 1  # the picture data is no frame of the animation, yet Pillow counts it
    number, frame_width, frame_height, left, top = _PNG_FRAME(found[b"fcTL"][0][2])
    return None if number or left + frame_width > width or top + frame_height > height else frames


def _png_alpha(found: _Found, mode: str) -> bool | None:
    if mode in ("LA", "RGBA"):
        return True
    pieces = found.get(b"tRNS", ())
    least = {"P": 0, "RGB": 6}.get(mode, 2)
    return None if any(length < least for _, length, _ in pieces) else bool(pieces)


# WebP

_WEBP_ICC, _WEBP_ALPHA, _WEBP_EXIF, _WEBP_XMP, _WEBP_ANIMATION = 0x20, 0x10, 0x08, 0x04, 0x02
_RIFF_CHUNK = struct.Struct("<4sI").unpack_from
_VP8 = struct.Struct("<HB3sHH").unpack_from
_VP8L = struct.Struct("<BI").unpack_from


def _webp(head: bytes, size: int, read: Read) -> Header | str | None:
    if head[:4] != b"RIFF" or head[8:12] != b"WEBP":
        return None
    end = _LONG(head, 4)[0] + 8
    if end > size:
        return _SHORT
    if end < 30:
        return None
    name, length = _RIFF_CHUNK(head, 12)
    if name == b"VP8X":
        return _webp_extended(head, end, read) if length == 10 else None
    picture = _webp_picture(name, head[20:30])
    if picture is None or 20 + length > end:
        return None
    width, height, alpha = picture
    if not width or not height:
        return _nothing(width, height)
    return Header(width, height, 1, "WEBP", "RGBA" if alpha else "RGB", 8, 1, alpha, icc=False)


def _webp_picture(name: bytes, start: bytes) -> tuple[int, int, bool] | None:
    """Return width, height and alpha of a bitstream; None if it is none that libwebp reads."""
    if name == b"VP8L" and len(start) >= 5:
        signature, packed = _VP8L(start)
        known = signature == 0x2F and not packed >> 29
        return ((packed & 0x3FFF) + 1, (packed >> 14 & 0x3FFF) + 1, bool(packed >> 28 & 1)) if known else None
    if name != b"VP8 " or len(start) < 10:
        return None
    tag, _, signature, width, height = _VP8(start)
    key_frame, profile, shown = not tag & 1, tag >> 1 & 7, tag >> 4 & 1
    known = key_frame and profile <= 3 and shown and signature == b"\x9d\x01\x2a"
    return (width & 0x3FFF, height & 0x3FFF, False) if known else None


def _webp_extended(head: bytes, end: int, read: Read) -> Header | None:
    flags = head[20]
    width, height = (_LONG(head, 23)[0] >> 8) + 1, (_LONG(head, 26)[0] >> 8) + 1
    found = _webp_chunks(head, end, read, to_the_end=bool(flags & (_WEBP_EXIF | _WEBP_XMP | _WEBP_ANIMATION)))
    if found is None:
        return None
    orientation = _orientation_of_webp(found, flags, read)
    content = _webp_frames(found) if flags & _WEBP_ANIMATION else _webp_still(found, flags, (width, height))
    if orientation is None or content is None:
        return None
    frames, alpha = content
    alpha = bool(flags & _WEBP_ALPHA) if flags & _WEBP_ANIMATION else alpha
    icc = bool(flags & _WEBP_ICC) and any(length for _, length, _ in found.get(b"ICCP", ())[:1])
    width, height = _upright(width, height, orientation)
    return Header(width, height, orientation, "WEBP", "RGBA" if alpha else "RGB", 8, frames, alpha, icc)


def _webp_chunks(head: bytes, end: int, read: Read, to_the_end: bool) -> _Found | None:
    """Walk the chunks of an extended file, to the picture or to the end; None if they do not fill it exactly."""
    found: _Found = {}
    window, base, held, at = head, 0, len(head), 30
    for _ in range(_PIECES):
        if at == end:
            return found
        if at + _AHEAD > held and held < end:
            window, base = read(at, _WINDOW), at
            held = at + len(window)
        if at + 8 > min(held, end):
            return None
        name, length = _RIFF_CHUNK(window, at - base)
        start = at - base + 8
        found.setdefault(name, []).append((at + 8, length, window[start : start + length]))
        at += 8 + length + (length & 1)
        if not to_the_end and name in (b"VP8 ", b"VP8L"):
            return found if at <= end else None
    return None


def _webp_frames(found: _Found) -> tuple[int, bool] | None:
    if b"ANIM" not in found or b"ANMF" not in found or b"VP8 " in found or b"VP8L" in found:
        return None
    return len(found[b"ANMF"]), False


def _webp_still(found: _Found, flags: int, canvas: tuple[int, int]) -> tuple[int, bool] | None:
    pieces = [(name, piece) for name in (b"VP8 ", b"VP8L") for piece in found.get(name, ())]
    if len(pieces) != 1 or b"ANMF" in found:
        return None
    [(name, (_, _, start))] = pieces
    picture = _webp_picture(name, start[:10])
    if picture is None or picture[:2] != canvas:
        return None
    # libwebp believes the lossless bitstream before the flag, and the flag where the bitstream cannot tell.
    return 1, picture[2] if name == b"VP8L" else bool(flags & _WEBP_ALPHA) or b"ALPH" in found


def _orientation_of_webp(found: _Found, flags: int, read: Read) -> int | None:
    orientation: int | None = 0
    for at, length, start in found.get(b"EXIF", ())[:1]:
        if flags & _WEBP_EXIF and length:
            skip = 6 if start.startswith(_EXIF) else 0
            orientation = _orientation((at + skip, length - skip, start[skip:]), read)
    if orientation == 0 and flags & _WEBP_XMP and b"XMP " in found:
        orientation = _orientation_in_xmp(_whole(found[b"XMP "][0], read))
    return 1 if orientation == 0 else orientation


# GIF

_GIF_SCREEN = struct.Struct("<HHB").unpack_from
_GIF_DESCRIPTOR = struct.Struct("<xHHHHB").unpack_from
_GIF_EMPTY = "unreadable: a GIF without a picture"
_RAMP = b"".join(bytes((level, level, level)) for level in range(256))


def _gif(head: bytes, size: int, read: Read) -> Header | str | None:
    if head[:6] not in (b"GIF87a", b"GIF89a") or size > _LARGEST_GIF:
        return None
    data = head if size <= len(head) else read(0, size)
    if len(data) < 13:
        return _CUT
    width, height, flags = _GIF_SCREEN(data, 6)
    at = 13 + _palette_length(flags)
    steps = iter(range(_STEPS))  # of the whole walk
    first = _gif_picture(data, at, steps)
    if not isinstance(first, _Picture):
        return first
    if not first.done:
        return _SHORT if first.end > len(data) else None
    width, height = max(width, first.right), max(height, first.bottom)
    if not width or not height:
        return _nothing(width, height)
    frames, picture = 1, first
    while isinstance(following := _gif_picture(data, picture.end, steps), _Picture):
        frames, picture = frames + 1, following
    if following is None:
        return None
    palette = first.palette if first.palette is not None else data[13:at]
    mode = "L" if palette == _RAMP[: len(palette)] else "P"
    return Header(width, height, 1, "GIF", mode, 8, frames, first.alpha, icc=False)


def _gif_picture(data: bytes, at: int, steps: Iterator[int]) -> _Picture | str | None:
    """Walk to the next picture and over it; a reason where there is none, None where Pillow may read otherwise."""
    alpha = False
    for _ in steps:
        sign = data[at : at + 1]
        if sign == b",":
            return _gif_data(data, at, alpha, steps)
        if sign != b"!":
            return {b";": _GIF_EMPTY, b"": _CUT}.get(sign)
        block = data[at + 1 : at + 20]
        if len(block) < 8:
            return _CUT
        if _gif_odd(block):
            return None
        alpha = alpha or (block[0] == 0xF9 and bool(block[2] & 1))
        at, done = _gif_skip(data, at + 2, steps)
        if not done:
            return _CUT if at >= len(data) else None
    return None


def _gif_odd(block: bytes) -> bool:
    """Say whether an extension is one that Pillow stumbles over: it looks for a second end where it met the first."""
    label, length = block[0], block[1]
    if label == 0xF9:
        return length != 4
    if label == 0xFF and block[2:13] == b"NETSCAPE2.0":
        return length != 11 or block[13:14] == b"\0"
    return not length and label != 0xFE


def _gif_data(data: bytes, at: int, alpha: bool, steps: Iterator[int]) -> _Picture | str:
    start = at + 10
    if start > len(data):
        return _CUT
    left, top, width, height, flags = _GIF_DESCRIPTOR(data, at)
    palette = data[start : start + _palette_length(flags)] if flags & 0x80 else None
    start += _palette_length(flags)
    if start >= len(data):
        return _CUT
    end, done = _gif_skip(data, start + 1, steps)
    return _Picture(left + width, top + height, palette, alpha, end, done)


def _gif_skip(data: bytes, at: int, steps: Iterator[int]) -> tuple[int, bool]:
    """Walk over blocks and their terminator; False: there was none."""
    end = len(data)
    for _ in steps:
        if at >= end:
            break
        length = data[at]
        at += length + 1
        if not length:
            return at, True
    return at, False


def _palette_length(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


# BMP

_BMP_HEADER = struct.Struct("<2s8xIIIIHHI12xI").unpack_from
_BMP_HEADERS = (40, 52, 56, 108, 124)  # Windows 3 to 5; those of OS/2 are for Pillow
_BMP_CHANNEL = {1: 1, 4: 4, 8: 8, 16: 5, 24: 8, 32: 8}
_BMP_RAW, _BMP_MASKS = 0, 3
# Layouts (red, green, blue, alpha) that Pillow knows; those of 24 and 16 bits have no alpha.
_BMP_LAYOUTS = {
    32: {
        **{(0xFF0000, 0xFF00, 0xFF, 0): "RGB", (0xFF000000, 0xFF0000, 0xFF00, 0): "RGB"},
        **{(0xFF000000, 0xFF00, 0xFF, 0): "RGB", (0xFF000000, 0xFF0000, 0xFF00, 0xFF): "RGBA"},
        **{(0xFF, 0xFF00, 0xFF0000, 0xFF000000): "RGBA", (0xFF0000, 0xFF00, 0xFF, 0xFF000000): "RGBA"},
        **{(0xFF000000, 0xFF00, 0xFF, 0xFF0000): "RGBA", (0, 0, 0, 0): "RGBA"},
    },
    24: {(0xFF0000, 0xFF00, 0xFF, 0): "RGB"},
    16: {(0xF800, 0x7E0, 0x1F, 0): "RGB", (0x7C00, 0x3E0, 0x1F, 0): "RGB"},
}


def _bmp(head: bytes, size: int, read: Read) -> Header | str | None:
    if len(head) < 18 or _LONG(head, 14)[0] not in _BMP_HEADERS:
        return None
    if len(head) < 54:
        return _CUT
    _, offset, length, width, height, _, bits, compression, colours = _BMP_HEADER(head)
    if head[25] == 0xFF:  # a negative height: stored from the top
        height = 2**32 - height
    mode = _bmp_mode(head, bits, compression, colours or 1 << min(bits, 32))
    if mode is None or max(width, height) >= 2**31 or not offset:
        return None
    if not width or not height:
        return _nothing(width, height)
    if bits <= 8 and offset == 14 + length:  # some writers forget the palette
        offset += 4 * (colours or 1 << bits)
    stride = (width * bits + 31) // 32 * 4
    if offset + stride * (height - 1) + (width * bits + 7) // 8 > size:
        return "truncated: fewer pixels than its size needs, the file was cut short"
    return Header(width, height, 1, "BMP", mode, _BMP_CHANNEL[bits], 1, mode == "RGBA", icc=False)


def _bmp_mode(head: bytes, bits: int, compression: int, colours: int) -> str | None:
    if bits in (16, 24, 32):
        if compression == _BMP_MASKS and len(head) >= 70:
            red, green, blue, alpha = struct.unpack_from("<IIII", head, 54)
            has_alpha = bits == 32 and _LONG(head, 14)[0] >= 56
            return _BMP_LAYOUTS[bits].get((red, green, blue, alpha if has_alpha else 0))
        return "RGB" if compression == _BMP_RAW else None
    if bits not in (1, 4, 8) or compression != _BMP_RAW or colours > 256:
        return None
    start = 14 + _LONG(head, 14)[0]
    palette = head[start : start + 4 * colours]
    levels = b"\0\xff" if colours == 2 else bytes(range(colours))
    if any(palette[channel::4] != levels for channel in (0, 1, 2)):
        return "P"
    return {(1, True): "1", (8, False): "L"}.get((bits, colours <= 2))  # else Pillow reads other bits than are there


_READERS: dict[bytes, Callable[[bytes, int, Read], Header | str | None]] = {
    b"\xff\xd8": _jpeg,
    b"\x89P": _png,
    b"RI": _webp,
    b"GI": _gif,
    b"BM": _bmp,
}
