"""Read what an image file says of itself (size, orientation, mode, frames) and whether it is whole, without a decoder.

To add a format, write a function of the shape of `read_bmp` and enter it in `_READERS` under its first two bytes.

The answers equal Pillow's; wherever a file is odd enough that they might not, the answer is None: ask Pillow.
"""

from collections.abc import Callable, Mapping

from prep.headers.bmp import read_bmp
from prep.headers.gif import read_gif
from prep.headers.header import Header as Header
from prep.headers.header import Read as Read
from prep.headers.jpeg import read_jpeg
from prep.headers.png import read_png
from prep.headers.webp import read_webp

_READERS: Mapping[bytes, Callable[[bytes, int, Read], Header | str | None]] = {
    b"\xff\xd8": read_jpeg,
    b"\x89P": read_png,
    b"RI": read_webp,
    b"GI": read_gif,
    b"BM": read_bmp,
}


def parse(head: bytes, size: int, read: Read) -> Header | str | None:
    """Return the header, or the reason why the file cannot be used, or None: not ours, or doubtful, ask Pillow.

    `head` is the first 4096 bytes (or all, if the file is shorter), `size` the bytes of the whole file.
    Errors of `read` pass through; nothing else is raised, whatever the bytes are.
    """
    reader = _READERS.get(head[:2])
    return None if reader is None else reader(head, size, read)
