"""Image files: their headers, and their pixels as every later stage sees them.

The colour policy lives here, in `schemas.datasets.ImagePolicy` and in `schemas.keys.PIXEL_POLICY`: orientation
applied, profiles converted to sRGB, alpha over white, 8-bit RGB.
"""

import io
import json
import re
import struct
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyvips
import simplejpeg
from PIL import Image, ImageCms, UnidentifiedImageError

from prep.headers import Header, Read, parse
from schemas.geometry import Geometry

Pixels = npt.NDArray[np.uint8]  # height × width × 3, RGB

DEFERRED = "deferred: to be read by a process that may die of it"

HEAD_BYTES = 4096  # of a file, enough for most headers

_HARD_LIMIT = 2_000_000_000  # pixels; what `maximum_megapixels` may be set to
_NESTED_LIMIT = 1 << 26  # pixels of a picture inside an icon, if the icon says less
_READS_FOR_HEADER = 1024  # reads in which Pillow must find one: damaged files lead it through gigabytes, byte by byte
_READS_FOR_FRAMES = 200_000  # to count pictures
_LARGEST_WHOLE = 1 << 29  # bytes of a file whose header Pillow asks for the whole file
_ORIENTATION = 0x0112  # the EXIF tag
_UPRIGHT_ALREADY = ("TIFF",)  # formats whose size and pixels Pillow turns itself
TURNED = (5, 6, 7, 8)  # orientations that swap width and height
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = {_UPRIGHT[orientation] for orientation in TURNED}
_BACK = {**_UPRIGHT, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}

# Formats that Pillow names without being able to show a picture, or only by running a program (EPS: Ghostscript).
_NOT_PICTURES = ("EPS", "MPEG", "BUFR", "GRIB", "HDF5", "WMF")

# What libjpeg says of the segments before the picture's data, which is sound all the same.
_BESIDE_THE_DATA = re.compile(r"bad ICC marker|extraneous bytes before marker 0x(db|e[0-9a-f]|fe)$")

# File extensions of the pictures that Pillow opens; written down because asking it loads all its readers.
_EXTENSIONS = """
apng avif avifs blp bmp bw cur dcx dds dib fit fits flc fli ftc ftu gbr gif icb icns ico iim im j2c j2k jfif jp2 jpc jpe
jpeg jpf jpg jpx mpo msp pbm pcd pcx pfm pgm png pnm ppm psd pxr qoi ras rgb rgba sgi tga tif tiff vda vst webp xbm xpm
"""
EXTENSIONS = frozenset(_EXTENSIONS.split())

# Where libvips may average whole pixels before the Lanczos kernel: reductions of more than four times, whose kernel its
# whole numbers would round to a darker picture.
_GAP = 2.0

_SCALED = "interpolation"  # the one key of a view that is not about decoding

_COLOURS = {"white": (255, 255, 255), "black": (0, 0, 0), "gray": (128, 128, 128)}


# What Pillow's readers raise on damaged files; UnidentifiedImageError is an OSError.
_FAULTS = (
    *(OSError, ValueError, SyntaxError, EOFError, RuntimeError, ArithmeticError, LookupError, TypeError),
    *(AttributeError, AssertionError, struct.error, zlib.error, Image.DecompressionBombError),
)


def read_header(head: bytes, size: int, read: Read, *, careful: bool = False) -> Header | str:
    """Read a file's header, or return the reason why the file cannot be used.

    `head` is its first `HEAD_BYTES`, `size` its length in bytes, `read(offset, length)` reads more of it. If `careful`,
    what only compiled code of Pillow's could tell is `DEFERRED`.
    """
    if size == 0:
        return "unreadable: the file is empty"
    return parse(head, size, read) or (DEFERRED if careful else _ask_pillow(_Window(size, read)))


class _Window(io.RawIOBase):
    """A file of which only what is asked for is read."""

    def __init__(self, size: int, read: Read) -> None:
        self._size, self._read, self._place = size, read, 0
        self.reads_left = _READS_FOR_HEADER

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._place = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence])
        return self._place

    def tell(self) -> int:
        return self._place

    def readall(self) -> bytes:
        if self._size - self._place > _LARGEST_WHOLE:
            raise OSError(f"{self._size} bytes are absurdly many")
        return super().readall()

    def readinto(self, buffer: Any, /) -> int:
        self.reads_left -= 1
        if self.reads_left < 0:
            raise OSError("its header leads through more of the file than a header may")
        piece = self._read(self._place, min(len(buffer), max(0, self._size - self._place)))
        buffer[: len(piece)] = piece
        self._place += len(piece)
        return len(piece)


def _ask_pillow(window: _Window) -> Header | str:
    """Read the header of a format that `prep.headers` does not know."""
    try:
        with _opened(io.BufferedReader(window, HEAD_BYTES)) as image:
            window.reads_left = _READS_FOR_FRAMES
            orientation = _orientation(image)
            width, height = image.size
            turned = orientation in TURNED and image.format not in _UPRIGHT_ALREADY
            return Header(
                width=height if turned else width,
                height=width if turned else height,
                orientation=orientation,
                format=image.format or "",
                mode=image.mode,
                bits=_bits(image),
                frames=_frames(image),
                alpha=image.has_transparency_data,
                icc=bool(image.info.get("icc_profile")),
            )
    except _FAULTS as fault:
        return f"unreadable: {_reason(fault)}"


def _bits(image: Image.Image) -> int:
    mode = image.mode
    if mode == "1":
        return 1
    return 16 if mode.startswith("I;16") else 32 if mode in ("I", "F") else 8


def _frames(image: Image.Image) -> int:
    """Count the pictures in a file; where that fails, the first is what there is."""
    try:
        return int(getattr(image, "n_frames", 1))
    except _FAULTS:
        return 1


@cache
def looks(view: str) -> Mapping[str, Any]:
    """Read a view: what differs from the defaults in how a file becomes an upright picture and how that is scaled."""
    return json.loads(view) if view else {}


def decode(data: bytes, view: str = "") -> Image.Image | str:
    """Decode a whole file to an upright 8-bit RGB picture, or return the reason why it cannot be.

    `view` is `DatasetConfig.view`, by default empty.
    """
    says = looks(view)
    try:
        with _opened(io.BytesIO(data)) as image:
            turn = _turn(image, ignored=says.get("orientation") == "ignore")
            image.load()
            background = _colour(says.get("alpha_background", "white"))
            picture = _as_rgb(image, background, profiled=says.get("color_profile") != "ignore")
    except _FAULTS as fault:
        return f"unreadable: {_reason(fault)}"
    picture = picture.transpose(turn) if turn is not None else picture
    return _part(picture, *says["part"]) if "part" in says else picture


def decode_pixels(data: bytes, view: str = "") -> Pixels | str:
    """Decode as `decode` does, to an array.

    A JPEG that is upright and has no colour profile goes straight into it, in half of Pillow's time and to the same
    values, for both use libjpeg-turbo's exact transform; at the least doubt Pillow has the word.
    """
    if looks(view).keys() <= {_SCALED} and data.startswith(b"\xff\xd8"):
        header = parse(data[:HEAD_BYTES], len(data), lambda start, length: data[start : start + length])
        if header is not None and not isinstance(header, str) and _plain(header):
            with suppress(ValueError):
                pixels: Pixels = simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False, strict=True)
                return pixels
    decoded = decode(data, view)
    return decoded if isinstance(decoded, str) else np.asarray(decoded)


def _plain(header: Header) -> bool:
    return header.orientation == 1 and not header.icc and header.mode in ("RGB", "L")


def decode_gray(data: bytes, view: str, least: tuple[int, int]) -> Image.Image | str:
    """Decode a whole file to an upright gray picture for measuring, or return the reason why it cannot be.

    A JPEG comes reduced, by its own transform and to no less than `least` (width, height), and without its colour
    profile; it is still the whole picture, to a fraction of a pixel. Other files are decoded as by `decode`.
    """
    if not data.startswith(b"\xff\xd8"):
        whole = decode(data, view)
        return whole if isinstance(whole, str) else whole.convert("L")
    says = looks(view)
    index, count = says.get("part", (0, 1))
    try:
        with _opened(io.BytesIO(data)) as image:
            turn = _turn(image, ignored=says.get("orientation") == "ignore")
            turned = turn is not None and turn in _SIDEWAYS
            width = (image.height if turned else image.width) // count * count  # as `_part` cuts
            kept = width / (image.height if turned else image.width)
            wanted = (least[0] * count, least[1])
            reduced = image.draft("L", wanted[::-1] if turned else wanted)
            image.load()
            picture = image.convert("L")
    except _FAULTS as fault:
        return f"unreadable: {_reason(fault)}"
    if reduced is not None:
        picture = _filled(picture, reduced[1][2:])
    picture = picture.transpose(turn) if turn is not None else picture
    if count == 1:
        return picture
    step = picture.width * kept / count
    box = (index * step, 0, (index + 1) * step, picture.height)
    return picture.resize((max(1, int(step)), picture.height), Image.Resampling.BILINEAR, box)


def _filled(picture: Image.Image, extent: tuple[float, float]) -> Image.Image:
    """Stretch a reduced picture that ends inside its last row and column, so that it ends with them."""
    if extent == picture.size:
        return picture
    size = (max(1, int(extent[0])), max(1, int(extent[1])))
    return picture.resize(size, Image.Resampling.BILINEAR, (0, 0, *extent))


def jpeg_damage(data: bytes) -> str | None:
    """Return what is wrong in the data of a JPEG that decoders paper over with gray, None if it is sound.

    The picture is decoded at an eighth of its size: every bit of the data is read all the same.
    """
    if not data.startswith(b"\xff\xd8"):
        return None
    try:
        colours = simplejpeg.decode_jpeg_header(data, strict=False)[2]
        kind = "CMYK" if colours in ("CMYK", "YCCK") else "GRAY"
        simplejpeg.decode_jpeg(data, colorspace=kind, fastdct=True, min_height=1, min_width=1, strict=True)
    except ValueError as fault:
        told = str(fault)
        damaged = told.lower().startswith(("corrupt", "premature")) and not _BESIDE_THE_DATA.search(told)
        return f"unreadable: {told}" if damaged else None
    return None


@contextmanager
def _opened(file: BinaryIO) -> Iterator[Image.Image]:
    """Open a picture; raises what Pillow raises, and ValueError if it is absurdly large."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, _HARD_LIMIT // 2  # Pillow refuses twice as many
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file, formats=_formats()) as image:
                if image.width * image.height > _HARD_LIMIT:
                    raise ValueError(f"{image.width}x{image.height} pixels are absurdly many")
                Image.MAX_IMAGE_PIXELS = max(image.width * image.height, _NESTED_LIMIT)  # of pictures inside
                yield image
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _turn(image: Image.Image, *, ignored: bool) -> Image.Transpose | None:
    """Return how to turn a picture as Pillow gives it."""
    orientation, turned_already = _orientation(image), image.format in _UPRIGHT_ALREADY
    if ignored:
        return _BACK.get(orientation) if turned_already else None
    return None if turned_already else _UPRIGHT.get(orientation)


def _part(picture: Image.Image, index: int, count: int) -> Image.Image:
    """Cut one of several pictures side by side; columns that are left over on the right are dropped."""
    width = picture.width // count
    return picture.crop((index * width, 0, (index + 1) * width, picture.height))


def _colour(name: str) -> tuple[int, int, int]:
    if name in _COLOURS:
        return _COLOURS[name]
    red, green, blue = bytes.fromhex(name.removeprefix("#"))
    return red, green, blue


def frame(picture: Image.Image | Pixels, geometry: Geometry, view: str = "") -> Pixels:
    """Resize a picture, as `view` says or by Lanczos, antialiased, and crop the target box.

    libvips reduces, at a sixth of Pillow's time and within 2 of 255 of its values on photographs; it enlarges by
    bicubic interpolation, so that Pillow does that.
    """
    pixels = np.asarray(picture)
    height, width = pixels.shape[:2]
    size = (geometry.intermediary_width, geometry.intermediary_height)
    left, top = geometry.crop_left, geometry.crop_top
    across, down = geometry.target_width, geometry.target_height
    if (width, height) != size and looks(view).get(_SCALED) == "opencv-linear":
        pixels = _linear(pixels, size)
    elif (width, height) != size and size[0] <= width and size[1] <= height:
        source = pyvips.Image.new_from_memory(np.ascontiguousarray(pixels), width, height, 3, "uchar")
        reduced = source.resize(size[0] / width, vscale=size[1] / height, kernel="lanczos3", gap=_GAP)
        assert (reduced.width, reduced.height) == size, "libvips rounds to the nearest size"
        cropped: Pixels = reduced.crop(left, top, across, down).numpy()
        return cropped
    elif (width, height) != size:
        pixels = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))
    return np.ascontiguousarray(pixels[top : top + down, left : left + across])


def _linear(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """Resize by the four nearest pixels alone, as SimpleTuner does."""
    import cv2  # noqa: PLC0415 - scanning does without it

    scaled: Pixels = cv2.resize(np.ascontiguousarray(pixels), size, interpolation=cv2.INTER_LINEAR)
    return scaled


@cache
def _formats() -> tuple[str, ...]:
    """Return Pillow's formats of pictures: a picture must not run a program."""
    Image.init()
    return tuple(name for name in Image.ID if name not in _NOT_PICTURES)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, without letting Pillow decode a PNG in search of it."""
    if image.format == "PNG" and not {"exif", "Raw profile type exif"} & set(image.info):
        return 1
    orientation = image.getexif().get(_ORIENTATION, 1)
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def _as_rgb(image: Image.Image, background: tuple[int, int, int], *, profiled: bool) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_in_eight_bits(np.asarray(image), image.mode, image.format)).convert("RGB")
    profile = image.info.get("icc_profile") if profiled else None
    if not image.has_transparency_data:
        return _in_srgb(image, profile)
    layered = image.convert("RGBA")
    colours = _in_srgb(layered.convert("RGB"), profile) if profile else layered
    flat = Image.new("RGBA", image.size, (*background, 255))
    top = colours.convert("RGBA")
    top.putalpha(layered.getchannel("A"))
    return Image.alpha_composite(flat, top).convert("RGB")


def _in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert to RGB, by the picture's colour profile if it has one that fits; sRGB's own changes nothing."""
    if not profile:
        return image.convert("RGB")
    coloured = image if image.mode in ("L", "RGB", "CMYK", "LAB") else image.convert("RGB")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if coloured.mode == "RGB" and "srgb" in ImageCms.getProfileDescription(source).lower():
            return coloured
        converted = ImageCms.profileToProfile(coloured, source, _srgb(), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):  # damaged, or of another kind of picture
        return coloured.convert("RGB")
    assert converted is not None, "only a conversion in place returns None"
    return converted


@cache
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


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
    if isinstance(fault, Image.DecompressionBombError):
        return "its pixels are absurdly many"
    text = str(fault).splitlines()[0] if str(fault) else type(fault).__name__
    return "no known image format" if isinstance(fault, UnidentifiedImageError) else text
