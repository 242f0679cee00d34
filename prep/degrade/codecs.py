"""Compression: steps that encode and decode, and how a degraded picture is stored and read back."""

import io
from collections.abc import Callable, Mapping
from typing import Any

import cv2
import numpy as np
import pyvips
import simplejpeg
from PIL import Image, features

from prep.degrade.draws import Draws
from prep.images import Pixels
from schemas.errors import UserError

_SUBSAMPLING = {
    "4:4:4": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
    "4:2:2": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_422,
    "4:2:0": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420,
}
_AVIF_SPEED = 8  # of 10; slower ones make smaller files of the same quality

# Of OpenCV's settings for a noisy photograph the fastest that compresses; docs/degradations.md has the measurements.
_PNG = [
    cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_HUFFMAN_ONLY,
    cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_SUB,
]  # fmt: skip

_BAND = 32  # rows that are compressed to see whether the whole should be
_WORTHWHILE = 0.4  # share of the bytes above which compressing takes more time than it saves room


def jpeg(pixels: Pixels, _: Draws, *, quality: int, subsampling: str) -> Pixels:
    """Compress and decode once."""
    return decode_stored(jpeg_file(pixels, quality=quality, subsampling=subsampling))


def webp(pixels: Pixels, _: Draws, *, quality: int) -> Pixels:
    """Compress and decode once."""
    return decode_stored(webp_file(pixels, quality=quality))


def avif(pixels: Pixels, _: Draws, *, quality: int) -> Pixels:
    """Compress and decode once."""
    _must_have("avif")
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "AVIF", quality=quality, speed=_AVIF_SPEED, max_threads=1)
    with Image.open(file) as picture:
        return np.array(picture.convert("RGB"))


def jpeg_file(pixels: Pixels, *, quality: int, subsampling: str) -> bytes:
    """Encode as JPEG, with libjpeg-turbo's exact transform."""
    options = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, _SUBSAMPLING[subsampling]]
    return _encoded(".jpg", pixels, options)


def webp_file(pixels: Pixels, *, quality: int) -> bytes:
    """Encode as lossy WebP."""
    _must_have("webp")
    return _encoded(".webp", pixels, [cv2.IMWRITE_WEBP_QUALITY, quality])


def png_file(pixels: Pixels) -> bytes:
    """Encode without loss."""
    return _encoded(".png", pixels, _PNG)


def quick_png_file(pixels: Pixels) -> bytes:
    """Encode without loss; what a band of it shows to be mostly noise is not compressed, a tenth of the work."""
    middle = max(0, pixels.shape[0] - _BAND) // 2
    band = pixels[middle : middle + _BAND]
    if len(png_file(band)) <= _WORTHWHILE * band.size:
        return png_file(pixels)
    height, width = pixels.shape[:2]
    picture = pyvips.Image.new_from_memory(np.ascontiguousarray(pixels), width, height, 3, "uchar")
    plain: bytes = picture.pngsave_buffer(compression=0, filter="none")  # a third of OpenCV's time
    return plain


def decode_stored(data: bytes) -> Pixels:
    """Decode what `encode` wrote; raises ValueError for anything else."""
    if data[:2] == b"\xff\xd8":
        # The pixels of OpenCV's decoder, in RGB and a fifth faster.
        decoded: Pixels = simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False)
        return decoded
    read: Any = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) if data else None
    if read is None:
        raise ValueError("not a picture that was stored here")
    pixels: Pixels = cv2.cvtColor(read, cv2.COLOR_BGR2RGB)
    return pixels


def missing_codec(step: str) -> str | None:
    """Say what a step lacks on this machine; None if it has all."""
    if step == "avif" and not features.check("avif"):
        return "step 'avif': the installed Pillow cannot write AVIF; install one with libavif (11.3 or newer)"
    if step == "webp" and not cv2.haveImageWriter(".webp"):
        return "step 'webp': the installed OpenCV cannot write WebP"
    return None


def _must_have(step: str) -> None:
    if lacking := missing_codec(step):
        raise UserError(lacking)


def _encoded(suffix: str, pixels: Pixels, options: list[int]) -> bytes:
    done, data = cv2.imencode(suffix, cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), options)
    assert done, "an 8-bit colour picture always encodes"
    return bytes(data)


# Steps whose bitstream is stored as it is, if they come last: nothing is lost by it, and nothing encoded twice.
STORED_AS: Mapping[str, tuple[str, Callable[..., bytes]]] = {
    "jpeg": (".jpg", jpeg_file),
    "webp": (".webp", webp_file),
}
