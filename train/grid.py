"""Pictures on one sheet: cells of labelled pictures side by side, what is to be said below them.

What is drawn is decided in pictures.py and sample.py; how, here.
"""

import textwrap
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from schemas.storage import write_aside

Pixels: TypeAlias = npt.NDArray[np.uint8]  # height × width × 3

_HEIGHT = 512  # pixels of a picture at most: larger ones are reduced, none is enlarged
_WIDTH = 2080  # of a line of cells
_NARROWEST = 300  # of a cell: its text must be read
_LINE, _GAP, _MARGIN = 17, 6, 20  # pixels of a line of text, between pictures, between cells
_LINES = 3  # most of a text
_SIZE = 12  # of the text
_FONTS = ("DejaVuSans.ttf", "Arial.ttf", "arial.ttf")  # that know more letters than Pillow's own
_INK, _SOFT = "#1b1e22", "#5c636b"

_Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True, slots=True)
class Cell:
    """Pictures that belong together."""

    pictures: tuple[tuple[str, Pixels], ...]  # with their labels
    texts: tuple[str, ...]


def save_picture(pixels: Pixels, path: Path) -> None:
    """Write a PNG; raises UserError if it cannot be written."""
    with write_aside(path) as aside:
        Image.fromarray(pixels).save(aside, format="PNG")


def drawn(cells: Sequence[Cell]) -> Pixels:
    """Draw cells in lines, in their order."""
    font = _font()
    lines: list[list[Image.Image]] = [[]]
    for cell in (_cell(one, font) for one in cells):
        if lines[-1] and sum(one.width + _MARGIN for one in lines[-1]) + cell.width > _WIDTH:
            lines.append([])
        lines[-1].append(cell)
    widths = [sum(one.width + _MARGIN for one in line) for line in lines]
    heights = [max((one.height for one in line), default=0) + _MARGIN for line in lines]
    sheet, top = Image.new("RGB", (max(widths) + _MARGIN, sum(heights) + _MARGIN), "white"), _MARGIN
    for line, height in zip(lines, heights, strict=True):
        left = _MARGIN
        for one in line:
            sheet.paste(one, (left, top))
            left += one.width + _MARGIN
        top += height
    return np.array(sheet)


def _cell(cell: Cell, font: _Font) -> Image.Image:
    thumbs = [(label, _reduced(pixels)) for label, pixels in cell.pictures]
    widths = [max(thumb.width, int(font.getlength(label)) + 1) for label, thumb in thumbs]
    width = max(_NARROWEST, sum(widths) + _GAP * (len(widths) - 1))
    letters = max(1, int(width / font.getlength("n")))
    texts = [line for text in cell.texts for line in _wrapped(text, letters)]
    height = _LINE + max(thumb.height for _, thumb in thumbs) + _GAP
    sheet = Image.new("RGB", (width, height + _LINE * len(texts)), "white")
    draw, left = ImageDraw.Draw(sheet), 0
    for (label, thumb), taken in zip(thumbs, widths, strict=True):
        draw.text((left, 0), label, _SOFT, font)
        sheet.paste(thumb, (left, _LINE))
        left += taken + _GAP
    for number, text in enumerate(texts):
        draw.text((0, height + number * _LINE), text, _INK, font)
    return sheet


def _reduced(pixels: Pixels) -> Image.Image:
    picture = Image.fromarray(pixels)
    scale = min(1.0, _HEIGHT / picture.height, 2 * _HEIGHT / picture.width)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture if scale == 1 else picture.resize(size, Image.Resampling.LANCZOS)


def _wrapped(text: str, letters: int) -> list[str]:
    shown = "".join(letter if letter.isprintable() else " " for letter in text)
    return textwrap.wrap(shown, letters, max_lines=_LINES, placeholder=" ...")


def _font() -> _Font:
    """Return a font of many scripts if there is one; prompts are not always English."""
    for name in _FONTS:
        with suppress(OSError):
            return ImageFont.truetype(name, _SIZE)
    return ImageFont.load_default(_SIZE)
