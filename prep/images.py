"""Image files: their headers, and their pixels as every later stage sees them.

The colour policy lives here and in `schemas.keys.PIXEL_POLICY`: orientation applied, alpha over white, 8-bit RGB.
"""

import io
import struct
import warnings
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from schemas.rows import Geometry

EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic", ".heif"}
    | {".jxl", ".jp2", ".j2k", ".ppm", ".pgm", ".pbm", ".tga"}
)

Pixels = npt.NDArray[np.uint8]  # height × width × 3, RGB

_ORIENTATION = 0x0112  # the EXIF tag
_UPRIGHT_ALREADY = ("TIFF",)  # formats whose size and pixels Pillow turns itself
_TURNED = (5, 6, 7, 8)  # orientations that swap width and height
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


# What Pillow's readers raise on damaged files; UnidentifiedImageError is an OSError.
_FAULTS = (
    *(OSError, ValueError, SyntaxError, EOFError, RuntimeError, ArithmeticError, LookupError, TypeError),
    *(AttributeError, struct.error, zlib.error),
)


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of itself before any pixel is decoded; sizes are those of the upright picture."""

    width: int
    height: int
    orientation: int
    format: str
    mode: str


def read_header(path: Path) -> Header | str:
    """Read a file's header, or return the reason why it cannot be used."""
    try:
        with warnings.catch_warnings(), Image.open(path, formats=_formats()) as image:
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            orientation = _orientation(image)
            width, height = image.size
            turned = orientation in _TURNED and image.format not in _UPRIGHT_ALREADY
            return Header(
                width=height if turned else width,
                height=width if turned else height,
                orientation=orientation,
                format=image.format or "",
                mode=image.mode,
            )
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as fault:
        return f"too large: {fault}"
    except _FAULTS as fault:
        return f"unreadable: {_reason(fault)}"


def decode(data: bytes) -> Image.Image | str:
    """Decode a whole file to an upright 8-bit RGB picture, or return the reason why it cannot be."""
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data), formats=_formats()) as image:
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            orientation = 1 if image.format in _UPRIGHT_ALREADY else _orientation(image)
            image.load()
            picture = _as_rgb(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as fault:
        return f"too large: {fault}"
    except _FAULTS as fault:
        return f"unreadable: {_reason(fault)}"
    return picture.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else picture


def frame(picture: Image.Image, geometry: Geometry) -> Pixels:
    """Resize a picture (Lanczos, antialiased) and crop the target box."""
    size = (geometry.intermediary_width, geometry.intermediary_height)
    if picture.size != size:
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    left, top = geometry.crop_left, geometry.crop_top
    box = (left, top, left + geometry.target_width, top + geometry.target_height)
    return np.asarray(picture.crop(box))


@cache
def _formats() -> tuple[str, ...]:
    """Return Pillow's formats but for EPS, which it hands to Ghostscript: a picture must not run a program."""
    Image.init()
    return tuple(name for name in Image.ID if name != "EPS")


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, without letting Pillow decode a PNG in search of it."""
    if image.format == "PNG" and not {"exif", "Raw profile type exif"} & set(image.info):
        return 1
    orientation = image.getexif().get(_ORIENTATION, 1)
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_in_eight_bits(np.asarray(image), image.mode, image.format)).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _in_eight_bits(values: npt.NDArray[np.generic], mode: str, kind: str | None) -> npt.NDArray[np.uint8]:
    """Scale whole numbers of 16 or 32 bits and floats to 0 to 255, by the range that their values show.

    Files do not say what white is: up to 1 (floats), 255 and 65535 are taken for it, in this order, then the maximum.
    """
    exact = values.astype(np.float64)
    largest = float(exact.max(initial=0.0, where=np.isfinite(exact)))
    if mode.startswith("I;16") or kind == "PPM":  # Pillow scales PPM's own white to 65535
        white = 65535.0
    else:
        customary = ([1.0] if mode == "F" else []) + [255.0, 65535.0]
        white = next((one for one in customary if largest <= one), largest)
    scaled = np.nan_to_num(exact * (255.0 / white), nan=0.0, posinf=255.0, neginf=0.0)
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)


def _reason(fault: Exception) -> str:
    text = str(fault).splitlines()[0] if str(fault) else type(fault).__name__
    return "no known image format" if isinstance(fault, UnidentifiedImageError) else text
