"""Contact sheets: pairs as the model sees them, after resize, crop and degradation, and where each reference differs.

A line of a pair is reference, target, difference; what is told below a pair is a line of text in `_notes`.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw, ImageFont

from prep.images import Pixels
from prep.pixels import Refusal, pixels_of, reference_picture, target_picture
from prep.showing import clipped, difference, measured, told, verdict, visible
from schemas.datasets import DatasetConfig
from schemas.project import Project
from schemas.rows import PairRow, Reference, from_columns
from schemas.storage import write_aside

_HEIGHTS = (224, 224, 160, 128)  # pixels of a thumbnail, by the number of references; more are as low as the last
_LONG = 2  # a thumbnail is at most so many times as wide as it might be high
_REFERENCES = 4  # of a pair that are drawn
_LINE = 17  # pixels of a line of text
_GAP = 6  # between the thumbnails of a pair
_MARGIN = 20  # between pairs
_WIDTH = 1960  # of a line of pairs
_NARROWEST = 330  # of a pair: its text must be read
_PROMPT = 3  # most lines of a prompt
_NOTE = 2  # most lines of anything else
_CHARACTERS = 600  # of a text that are looked at
_SIZE = 12  # of the text
_FONTS = ("DejaVuSans.ttf", "Arial.ttf", "arial.ttf")  # that know more letters than Pillow's own
_PLAIN = str.maketrans({"×": "x", "−": "-"})  # which Pillow's own font has not

_INK, _SOFT, _ALARM, _BLANK = "#1b1e22", "#5c636b", "#b4481c", "salmon"

_Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True, slots=True)
class _Note:
    """A text below a pair."""

    text: str
    colour: str = _SOFT
    most: int = _NOTE  # lines


def contact_sheet(project: Project, dataset_id: str, table: pa.Table, count: int) -> Path | None:
    """Draw up to `count` pairs, spread over the table, as one PNG beside it; None if there is nothing to draw."""
    kept = np.flatnonzero(table["reject"].is_null().to_numpy())
    if not len(kept):
        return None
    drawn = min(count, len(kept))
    chosen = from_columns(table.take(pa.array(kept[np.arange(drawn) * len(kept) // drawn])), PairRow)
    font = _font()
    lines = _lines([_cell(project, project.dataset(dataset_id), row, font) for row in chosen])
    widths = [sum(cell.width + _MARGIN for cell in line) for line in lines]
    heights = [max(cell.height for cell in line) + _MARGIN for line in lines]
    sheet, top = Image.new("RGB", (max(widths) + _MARGIN, sum(heights) + _MARGIN), "white"), _MARGIN
    for line, height in zip(lines, heights, strict=True):
        left = _MARGIN
        for cell in line:
            sheet.paste(cell, (left, top))
            left += cell.width + _MARGIN
        top += height
    path = project.pair_table(dataset_id).with_suffix(".preview.png")
    with write_aside(path) as aside:
        sheet.save(aside, format="PNG")
    return path


def _font() -> _Font:
    """Return a font of many scripts if there is one; prompts are not always English."""
    for name in _FONTS:
        with suppress(OSError):
            return ImageFont.truetype(name, _SIZE - 1)
    return ImageFont.load_default(_SIZE)


def _lines(cells: list[Image.Image]) -> list[list[Image.Image]]:
    """Set cells side by side as far as a line holds them."""
    lines: list[list[Image.Image]] = [[]]
    for cell in cells:
        if lines[-1] and sum(one.width + _MARGIN for one in lines[-1]) + cell.width > _WIDTH:
            lines.append([])
        lines[-1].append(cell)
    return lines


def _cell(project: Project, dataset: DatasetConfig, row: PairRow, font: _Font) -> Image.Image:
    """Draw one pair: a line for each reference, then what is to be said."""
    target = pixels_of(target_picture(project, row))
    shown = row.references[:_REFERENCES]
    height = _HEIGHTS[min(len(shown), len(_HEIGHTS) - 1)]
    bands = [
        _band(_compared(label, target, pixels_of(reference_picture(project, row, reference))), height, font)
        for label, reference in zip(_labels(len(shown)), shown, strict=True)
    ] or [_band([("target", target)], height, font)]
    width = max(_NARROWEST, *(band.width for band in bands))
    texts = [(line, note.colour) for note in _notes(dataset, row) for line in _wrapped(note, width, font)]
    cell = Image.new("RGB", (width, sum(band.height for band in bands) + _LINE * len(texts)), "white")
    draw, top = ImageDraw.Draw(cell), 0
    for band in bands:
        cell.paste(band, (0, top))
        top += band.height
    for text, colour in texts:
        draw.text((0, top), text, colour, font)
        top += _LINE
    return cell


def _labels(count: int) -> list[str]:
    return ["reference"] if count == 1 else [f"reference {number}" for number in range(1, count + 1)]


def _compared(label: str, target: Pixels | Refusal, reference: Pixels | Refusal) -> list[tuple[str, Pixels | Refusal]]:
    """Return the pictures of one line; references of another size have no difference."""
    pictures = [(label, reference), ("target", target)]
    if isinstance(target, Refusal) or isinstance(reference, Refusal):
        return pictures
    apart = difference(target, reference)
    return pictures if apart is None else [*pictures, (apart.label, apart.pixels)]


def _band(pictures: list[tuple[str, Pixels | Refusal]], height: int, font: _Font) -> Image.Image:
    """Set labelled pictures side by side."""
    thumbs = [(label, _thumb(picture, height, font)) for label, picture in pictures]
    widths = [max(thumb.width, int(font.getlength(label)) + 1) for label, thumb in thumbs]
    band = Image.new("RGB", (sum(widths) + _GAP * (len(widths) - 1), _LINE + height + _GAP), "white")
    draw, left = ImageDraw.Draw(band), 0
    for (label, thumb), width in zip(thumbs, widths, strict=True):
        draw.text((left, 0), label.translate(_PLAIN), _SOFT, font)
        band.paste(thumb, (left, _LINE))
        left += width + _GAP
    return band


def _thumb(pixels: Pixels | Refusal, height: int, font: _Font) -> Image.Image:
    """Fit a picture into the height, one that is very wide into the width; a blank says why there is none."""
    if isinstance(pixels, Refusal):
        blank = Image.new("RGB", (height, height), _BLANK)
        lines = _wrapped(_Note(pixels.reason, most=height // _LINE), height - 2 * _GAP, font)
        for number, line in enumerate(lines):
            ImageDraw.Draw(blank).text((_GAP, _GAP + number * _LINE), line, _INK, font)
        return blank
    down, across = pixels.shape[:2]
    scale = min(height / down, _LONG * height / across)
    size = (max(1, round(across * scale)), max(1, round(down * scale)))
    return Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS)


def _notes(dataset: DatasetConfig, row: PairRow) -> Iterator[_Note]:
    """Yield what is told of a pair."""
    variant = f"  variant {row.variant + 1} of {row.variants}" if row.variants > 1 else ""
    yield _Note(f"{clipped(row.target_path, 160, 60)}  {row.bucket}{variant}", _SOFT)
    others = len(row.prompts) - 1
    more = f"  (+{others} other {'prompt' if others == 1 else 'prompts'})" if others > 0 else ""
    yield _Note(f"{clipped(row.prompt, _CHARACTERS - len(more))}{more}" if row.prompt else "no prompt", _INK, _PROMPT)
    for label, reference in zip(_labels(len(row.references)), row.references[:_REFERENCES], strict=False):
        yield from _told(label, reference, dataset)
    hidden = len(row.references) - _REFERENCES
    if hidden > 0:
        yield _Note(f"and {hidden} more {'reference' if hidden == 1 else 'references'}")


def _told(label: str, reference: Reference, dataset: DatasetConfig) -> Iterator[_Note]:
    """Yield what is told of a reference: how it was made, or how it lies."""
    steps = told(reference.realised)
    if steps:
        yield _Note(f"{label}: " + "; ".join(f"{step.name} {step.details}".strip() for step in steps))
    found = measured(reference)
    if found is not None:
        how = verdict(found, dataset.alignment_check)
        numbers = ", ".join(f"{name} {value}" for name, value in how.numbers)
        yield _Note(f"{label}: {how.words} ({numbers})", _ALARM if how.accused else _SOFT)


def _wrapped(note: _Note, width: int, font: _Font) -> list[str]:
    """Break a text into lines of at most `width` pixels; what is left over of the last is cut."""
    rest = visible(" ".join(clipped(note.text, _CHARACTERS).split())).translate(_PLAIN)
    lines: list[str] = []
    while rest:
        fits = _fitting(rest, width, font)
        if fits == len(rest):
            return [*lines, rest]
        if len(lines) == note.most - 1:
            return [*lines, rest[: _fitting(rest, width - font.getlength("…"), font)].rstrip() + "…"]
        space = rest.rfind(" ", 0, fits + 1)
        lines.append(rest[: space if space > 0 else fits])
        rest = rest[len(lines[-1]) :].lstrip()
    return lines


def _fitting(text: str, width: float, font: _Font) -> int:
    """Return how many characters fit, one at least."""
    low, high = 1, max(1, len(text))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if font.getlength(text[:middle]) <= width else (low, middle - 1)
    return low
