"""WebP, animated ones included."""

import struct

from prep.headers.exif import EXIF, orientation_in_exif, orientation_in_xmp
from prep.headers.header import AHEAD, CUT_SHORT, LONG, PIECES, WINDOW, Found, Header, Read, nothing, upright, whole

_WEBP_ICC, _WEBP_ALPHA, _WEBP_EXIF, _WEBP_XMP, _WEBP_ANIMATION = 0x20, 0x10, 0x08, 0x04, 0x02
_RIFF_CHUNK = struct.Struct("<4sI").unpack_from
_VP8 = struct.Struct("<HB3sHH").unpack_from
_VP8L = struct.Struct("<BI").unpack_from


def read_webp(head: bytes, size: int, read: Read) -> Header | str | None:
    """See `prep.headers.parse`."""
    if head[:4] != b"RIFF" or head[8:12] != b"WEBP":
        return None
    end = LONG(head, 4)[0] + 8
    if end > size:
        return CUT_SHORT
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
        return nothing(width, height)
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
    width, height = (LONG(head, 23)[0] >> 8) + 1, (LONG(head, 26)[0] >> 8) + 1
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
    width, height = upright(width, height, orientation)
    return Header(width, height, orientation, "WEBP", "RGBA" if alpha else "RGB", 8, frames, alpha, icc)


def _webp_chunks(head: bytes, end: int, read: Read, to_the_end: bool) -> Found | None:
    """Walk the chunks of an extended file, to the picture or to the end; None if they do not fill it exactly."""
    found: Found = {}
    window, base, held, at = head, 0, len(head), 30
    for _ in range(PIECES):
        if at == end:
            return found
        if at + AHEAD > held and held < end:
            window, base = read(at, WINDOW), at
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


def _webp_frames(found: Found) -> tuple[int, bool] | None:
    if b"ANIM" not in found or b"ANMF" not in found or b"VP8 " in found or b"VP8L" in found:
        return None
    return len(found[b"ANMF"]), False


def _webp_still(found: Found, flags: int, canvas: tuple[int, int]) -> tuple[int, bool] | None:
    pieces = [(name, piece) for name in (b"VP8 ", b"VP8L") for piece in found.get(name, ())]
    if len(pieces) != 1 or b"ANMF" in found:
        return None
    [(name, (_, _, start))] = pieces
    picture = _webp_picture(name, start[:10])
    if picture is None or picture[:2] != canvas:
        return None
    # libwebp believes the lossless bitstream before the flag, and the flag where the bitstream cannot tell.
    return 1, picture[2] if name == b"VP8L" else bool(flags & _WEBP_ALPHA) or b"ALPH" in found


def _orientation_of_webp(found: Found, flags: int, read: Read) -> int | None:
    orientation: int | None = 0
    for at, length, start in found.get(b"EXIF", ())[:1]:
        if flags & _WEBP_EXIF and length:
            skip = 6 if start.startswith(EXIF) else 0
            orientation = orientation_in_exif((at + skip, length - skip, start[skip:]), read)
    if orientation == 0 and flags & _WEBP_XMP and b"XMP " in found:
        orientation = orientation_in_xmp(whole(found[b"XMP "][0], read))
    return 1 if orientation == 0 else orientation
