"""Contact sheets: pairs side by side as the model sees them, after resize, crop and degradation."""

from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw, ImageFont

from prep.images import Pixels
from prep.pixels import Refusal, pixels_of, reference_picture, target_picture
from schemas.project import Project
from schemas.rows import PairRow, from_columns
from schemas.storage import write_aside

_HEIGHT = 224  # pixels of a thumbnail
_TEXT = 18  # pixels of a line of text
_GAP = 12
_WIDTH = 1500  # of a line of pairs


def contact_sheet(project: Project, dataset_id: str, table: pa.Table, count: int) -> Path | None:
    """Draw up to `count` pairs, spread over the table, as one PNG beside it; None if there is nothing to draw."""
    kept = np.flatnonzero(table["reject"].is_null().to_numpy())
    if not len(kept):
        return None
    drawn = min(count, len(kept))
    chosen = from_columns(table.take(pa.array(kept[np.arange(drawn) * len(kept) // drawn])), PairRow)
    lines = _lines([_cell(project, row) for row in chosen])
    widths = [sum(cell.width + _GAP for cell in line) for line in lines]
    heights = [max(cell.height for cell in line) + _GAP for line in lines]
    sheet, top = Image.new("RGB", (max(widths) + _GAP, sum(heights) + _GAP), "white"), _GAP
    for line, height in zip(lines, heights, strict=True):
        left = _GAP
        for cell in line:
            sheet.paste(cell, (left, top))
            left += cell.width + _GAP
        top += height
    path = project.pair_table(dataset_id).with_suffix(".preview.png")
    with write_aside(path) as aside:
        sheet.save(aside, format="PNG")
    return path


def _lines(cells: list[Image.Image]) -> list[list[Image.Image]]:
    """Set cells side by side as far as a line holds them."""
    lines: list[list[Image.Image]] = [[]]
    for cell in cells:
        if lines[-1] and sum(one.width + _GAP for one in lines[-1]) + cell.width > _WIDTH:
            lines.append([])
        lines[-1].append(cell)
    return lines


def _cell(project: Project, row: PairRow) -> Image.Image:
    """Draw one pair: its references, its target, and what it is asked for."""
    pictures = [
        (f"reference {number}", reference_picture(project, row, reference))
        for number, reference in enumerate(row.references, 1)
    ]
    pictures.append(("target", target_picture(project, row)))
    thumbs = [(label, _thumb(pixels_of(picture))) for label, picture in pictures]
    width = sum(thumb.width for _, thumb in thumbs) + _GAP // 2 * (len(thumbs) - 1)
    cell = Image.new("RGB", (width, _HEIGHT + 3 * _TEXT), "white")
    draw, font, left = ImageDraw.Draw(cell), ImageFont.load_default(size=12), 0
    for label, thumb in thumbs:
        cell.paste(thumb, (left, _TEXT))
        draw.text((left, 1), label, "gray", font)
        left += thumb.width + _GAP // 2
    prompt = row.prompts[0] if row.prompts else ""
    more = f" (+{len(row.prompts) - 1} other prompts)" if len(row.prompts) > 1 else ""
    for line, text in enumerate((f"{row.target_path}  {row.bucket}", f"{prompt}{more}")):
        draw.text((0, _HEIGHT + _TEXT * (1 + line)), _shortened(text, width, font), "black", font)
    return cell


def _thumb(pixels: Pixels | Refusal) -> Image.Image:
    if isinstance(pixels, Refusal):
        return Image.new("RGB", (_HEIGHT, _HEIGHT), "salmon")
    height, width = pixels.shape[:2]
    return Image.fromarray(pixels).resize((max(1, width * _HEIGHT // height), _HEIGHT), Image.Resampling.LANCZOS)


def _shortened(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Cut a text to `width` pixels."""
    text = text[:width]  # no character is narrower than a pixel
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
