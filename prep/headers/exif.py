"""EXIF, a TIFF file without a picture, and XMP: where they say how a picture is to be turned."""

import re
import struct
from collections.abc import Iterator

from prep.headers.header import BIG_LONG, LONG, Piece, Read

EXIF = b"Exif\0\0"  # begins its segment in a JPEG, now and then its chunk in a WebP

_TIFF = {  # entries and their number, an offset, where the two bytes of a short value stand in the four
    b"II*\0": (struct.Struct("<HHII").iter_unpack, struct.Struct("<H").unpack_from, LONG, 0),
    b"MM\0*": (struct.Struct(">HHII").iter_unpack, struct.Struct(">H").unpack_from, BIG_LONG, 16),
}
TYPE_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}
_ORIENTATION = 0x0112
_SHORT_VALUE = 3
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(="|>)([0-9])')  # Pillow's own pattern


def orientation_in_exif(exif: Piece, read: Read) -> int | None:
    """Return the orientation in an EXIF block; 0: it has none; None: doubtful."""
    at, length, tiff = exif
    entries = exif_entries(tiff)
    if entries is None and len(tiff) < length:
        tiff = read(at, length)
        entries = exif_entries(tiff)
    if entries is None:
        return None
    for tag, kind, number, value in entries:
        if tag == _ORIENTATION:
            if kind != _SHORT_VALUE or number != 1:
                return None
            orientation: int = value >> _TIFF[tiff[:4]][3] & 0xFFFF
            return orientation if 1 <= orientation <= 8 else 1
        taken = TYPE_SIZES.get(kind, 0) * number
        if taken > 4 and value + taken > length:  # Pillow stops here, and misses what follows
            return None
    return 0


def exif_entries(tiff: bytes) -> Iterator[tuple[int, int, int, int]] | None:
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


def orientation_in_xmp(xmp: bytes) -> int:
    """Return the orientation that XMP names, as Pillow does when EXIF has none; 0: it has none."""
    match = _XMP_ORIENTATION.search(xmp)
    if match is None:
        return 0
    orientation = int(match[2])
    return orientation if 1 <= orientation <= 8 else 1
