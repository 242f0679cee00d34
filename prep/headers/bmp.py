"""BMP, as Windows writes it."""

import struct

from prep.headers.header import HEADER_CUT, LONG, Header, Read, nothing

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


def read_bmp(head: bytes, size: int, read: Read) -> Header | str | None:
    """See `prep.headers.parse`."""
    if len(head) < 18 or LONG(head, 14)[0] not in _BMP_HEADERS:
        return None
    if len(head) < 54:
        return HEADER_CUT
    _, offset, length, width, height, _, bits, compression, colours = _BMP_HEADER(head)
    if head[25] == 0xFF:  # a negative height: stored from the top
        height = 2**32 - height
    mode = _bmp_mode(head, bits, compression, colours or 1 << min(bits, 32))
    if mode is None or max(width, height) >= 2**31 or not offset:
        return None
    if not width or not height:
        return nothing(width, height)
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
            has_alpha = bits == 32 and LONG(head, 14)[0] >= 56
            return _BMP_LAYOUTS[bits].get((red, green, blue, alpha if has_alpha else 0))
        return "RGB" if compression == _BMP_RAW else None
    if bits not in (1, 4, 8) or compression != _BMP_RAW or colours > 256:
        return None
    start = 14 + LONG(head, 14)[0]
    palette = head[start : start + 4 * colours]
    levels = b"\0\xff" if colours == 2 else bytes(range(colours))
    if any(palette[channel::4] != levels for channel in (0, 1, 2)):
        return "P"
    return {(1, True): "1", (8, False): "L"}.get((bits, colours <= 2))  # else Pillow reads other bits than are there
