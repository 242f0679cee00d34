"""GIF: its pictures are walked, for it has no table of them."""

import struct
from collections.abc import Iterator
from typing import NamedTuple

from prep.headers.header import CUT_SHORT, HEADER_CUT, LARGEST_GIF, STEPS, Header, Read, nothing


class _Picture(NamedTuple):
    """One picture of a GIF."""

    right: int
    bottom: int
    palette: bytes | None
    alpha: bool
    end: int  # after its data
    done: bool  # the data was closed by its terminator


_GIF_SCREEN = struct.Struct("<HHB").unpack_from
_GIF_DESCRIPTOR = struct.Struct("<xHHHHB").unpack_from
_GIF_EMPTY = "unreadable: a GIF without a picture"
_RAMP = b"".join(bytes((level, level, level)) for level in range(256))


def read_gif(head: bytes, size: int, read: Read) -> Header | str | None:
    """See `prep.headers.parse`."""
    if head[:6] not in (b"GIF87a", b"GIF89a") or size > LARGEST_GIF:
        return None
    data = head if size <= len(head) else read(0, size)
    if len(data) < 13:
        return HEADER_CUT
    width, height, flags = _GIF_SCREEN(data, 6)
    at = 13 + _palette_length(flags)
    steps = iter(range(STEPS))  # of the whole walk
    first = _gif_picture(data, at, steps)
    if not isinstance(first, _Picture):
        return first
    if not first.done:
        return CUT_SHORT if first.end > len(data) else None
    width, height = max(width, first.right), max(height, first.bottom)
    if not width or not height:
        return nothing(width, height)
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
            return {b";": _GIF_EMPTY, b"": HEADER_CUT}.get(sign)
        block = data[at + 1 : at + 20]
        if len(block) < 8:
            return HEADER_CUT
        if _gif_odd(block):
            return None
        alpha = alpha or (block[0] == 0xF9 and bool(block[2] & 1))
        at, done = _gif_skip(data, at + 2, steps)
        if not done:
            return HEADER_CUT if at >= len(data) else None
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
        return HEADER_CUT
    left, top, width, height, flags = _GIF_DESCRIPTOR(data, at)
    palette = data[start : start + _palette_length(flags)] if flags & 0x80 else None
    start += _palette_length(flags)
    if start >= len(data):
        return HEADER_CUT
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
