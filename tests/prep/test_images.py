import io
import random
import warnings

import cv2
import numpy as np
import pytest
from PIL import Image, ImageCms, features

from prep.headers import Header
from prep.images import EXTENSIONS, HEAD_BYTES, decode, decode_pixels, frame, read_header
from schemas.rows import Geometry

ORIENTATION = 0x0112


def noise(height=7, width=13, channels=3):
    """Make a picture in which every turn and flip shows."""
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)


def smooth(height=24, width=40):
    """Make a picture in which every turn and flip shows after lossy compression too."""
    down, across = np.mgrid[0:height, 0:width]
    return np.stack([down * 255 // height, across * 255 // width, (down + across) * 255 // (height + width)], 2).astype(
        np.uint8
    )


def laid(upright, orientation):
    """Lay pixels as a camera stores them that writes this orientation: EXIF's table, row 0 and column 0 by side."""
    turned = upright.swapaxes(0, 1)
    return {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: turned,
        6: turned[::-1],
        7: turned[::-1, ::-1],
        8: turned[:, ::-1],
    }[orientation]


def encoded(pixels, kind, orientation=None, **options):
    exif = Image.Exif()
    if orientation is not None:
        exif[ORIENTATION] = orientation
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(np.ascontiguousarray(pixels))
    file = io.BytesIO()
    image.save(file, format=kind, **({"exif": exif} if orientation is not None else {}), **options)
    return file.getvalue()


def header_of(data):
    return read_header(data[:HEAD_BYTES], len(data), lambda offset, length: data[offset : offset + length])


def told(header):
    return header.width, header.height, header.orientation, header.format, header.mode


def pixels_of(data):
    picture = decode(data)
    assert isinstance(picture, Image.Image), picture
    assert picture.mode == "RGB"
    return np.asarray(picture)


# Orientation


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})], ids=str)
def test_lossless_pictures_stand_upright_whatever_their_orientation(kind, options, orientation):
    upright = noise()
    data = encoded(laid(upright, orientation), kind, orientation, **options)
    header = header_of(data)
    assert isinstance(header, Header)
    assert (header.width, header.height, header.format) == (13, 7, kind)
    assert np.array_equal(pixels_of(data), upright)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_stand_upright_whatever_their_orientation(orientation):
    upright = smooth()
    data = encoded(laid(upright, orientation), "JPEG", orientation, quality=95, subsampling=0)
    assert told(header_of(data)) == (40, 24, orientation, "JPEG", "RGB")
    assert np.abs(pixels_of(data).astype(int) - upright).max() <= 16


@pytest.mark.parametrize("orientation", [None, 0, 9, 300])
def test_an_orientation_that_is_none_of_the_eight_counts_as_upright(orientation):
    data = encoded(noise(), "PNG", orientation)
    assert told(header_of(data)) == (13, 7, 1, "PNG", "RGB")
    assert np.array_equal(pixels_of(data), noise())


# Colour


def test_alpha_is_laid_over_white():
    colours = np.zeros((2, 3, 4), np.uint8)
    colours[..., 0] = 200
    colours[:, 0, 3], colours[:, 1, 3], colours[:, 2, 3] = 0, 51, 255  # 51 is a fifth
    pixels = pixels_of(encoded(colours, "PNG"))
    assert pixels[0].tolist() == [[255, 255, 255], [244, 204, 204], [200, 0, 0]]


def test_gray_with_alpha_is_laid_over_white():
    alpha = Image.fromarray(np.array([[0, 51, 255]], np.uint8))
    image = Image.merge("LA", [Image.new("L", (3, 1), 0), alpha])
    assert pixels_of(encoded(image, "PNG"))[0].tolist() == [[255] * 3, [204] * 3, [0] * 3]


def test_a_transparent_colour_of_a_palette_becomes_white():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    assert pixels_of(encoded(image, "PNG"))[0].tolist() == [[255, 0, 0], [0, 0, 255]]
    assert pixels_of(encoded(image, "PNG", transparency=0))[0].tolist() == [[255, 255, 255], [0, 0, 255]]
    assert pixels_of(encoded(image, "PNG", transparency=b"\xff\x33"))[0].tolist() == [[255, 0, 0], [204, 204, 255]]


def test_a_transparent_colour_of_an_rgb_picture_becomes_white():
    data = encoded(np.array([[[9, 9, 9], [8, 8, 8]]], np.uint8), "PNG", transparency=(9, 9, 9))
    assert pixels_of(data)[0].tolist() == [[255, 255, 255], [8, 8, 8]]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bits_are_scaled_to_eight_and_rounded(kind):
    values = np.array([[0, 128, 129, 257, 32767, 32768, 65406, 65407, 65535]], np.uint16)
    data = encoded(values, kind)
    assert header_of(data).mode.startswith("I")
    assert pixels_of(data)[0].tolist() == [[value] * 3 for value in (0, 0, 1, 1, 127, 128, 254, 255, 255)]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_a_dark_picture_of_16_bits_stays_dark(kind):
    values = np.array([[0, 100, 255, 400]], np.uint16)
    assert pixels_of(encoded(values, kind))[0, :, 0].tolist() == [0, 0, 1, 2]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([-5, 0, 7, 255], [0, 0, 7, 255]),
        ([0, 128, 129, 256], [0, 0, 1, 1]),
        ([-5, 0, 32768, 65535], [0, 0, 128, 255]),
        ([0, 65536, 500_000, 1_000_000], [0, 17, 128, 255]),
        ([0, 2**30, 2**31 - 1], [0, 128, 255]),
        ([0, 0, 0], [0, 0, 0]),
        ([-7, -1], [0, 0]),
    ],
    ids=str,
)
def test_whole_numbers_of_32_bits_are_scaled_by_the_range_that_they_show(values, expected):
    assert pixels_of(encoded(np.array([values], np.int32), "TIFF"))[0, :, 0].tolist() == expected


@pytest.mark.parametrize("scale", [1, 255, 65535, 10**6, 1e30])
def test_floating_point_pictures_are_scaled_by_the_range_that_they_show(scale):
    values = np.array([[0, 0.2, 0.6, 1]], np.float32) * np.float32(scale)
    assert np.abs(pixels_of(encoded(values, "TIFF"))[0, :, 0].astype(int) - [0, 51, 153, 255]).max() <= 1


def test_what_is_no_number_in_a_floating_point_picture_is_black_or_clipped():
    for largest, expected in ((1, 255), (7, 7), (65535, 255), (10**6, 255)):
        values = np.array([[np.nan, -np.inf, np.inf, largest, -largest]], np.float32)
        assert pixels_of(encoded(values, "TIFF"))[0, :, 0].tolist() == [0, 0, 255, expected, 0]
    nothing = np.array([[np.nan, np.inf, -np.inf]], np.float32)
    assert pixels_of(encoded(nothing, "TIFF"))[0, :, 0].tolist() == [0, 255, 0]


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("CMYK", (255, 0, 0, 0), [0, 255, 255]),
        ("CMYK", (0, 0, 0, 255), [0, 0, 0]),
        ("CMYK", (0, 0, 0, 0), [255, 255, 255]),
        ("L", 77, [77, 77, 77]),
        ("1", 1, [255, 255, 255]),
        ("1", 0, [0, 0, 0]),
        ("YCbCr", (128, 128, 128), [128, 128, 128]),
    ],
)
def test_other_modes_become_rgb(mode, colour, expected):
    pixels = pixels_of(encoded(Image.new(mode, (9, 5), colour), "TIFF"))
    assert pixels.shape == (5, 9, 3)
    assert (pixels == expected).all()


def test_a_cmyk_photo_keeps_its_colours():
    data = encoded(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG")
    assert np.abs(pixels_of(data).astype(int) - [0, 255, 255]).max() <= 2


def test_the_first_frame_of_an_animation_counts():
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "green", "blue")]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        lossless = {"lossless": True} if kind == "WEBP" else {}
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **lossless)
        assert header_of(data).width == 6
        assert pixels_of(data)[0, 0].tolist() == [255, 0, 0]


# Files that are not what they seem


@pytest.mark.parametrize("content", [b"\n", b"<!DOCTYPE html><html>404</html>", b"\x00" * 500])
def test_what_is_no_image_is_a_reason(content):
    assert header_of(content) == decode(content) == "unreadable: no known image format"


def test_a_file_of_no_bytes_is_a_reason():
    assert header_of(b"") == "unreadable: the file is empty"


def test_only_what_a_header_needs_is_read_of_a_format_that_pillow_knows_alone():
    data, read = encoded(np.kron(noise(), np.ones((40, 40, 1), np.uint8)), "TIFF"), []

    def window(offset, length):
        read.append(len(data[offset : offset + length]))
        return data[offset : offset + length]

    assert told(read_header(data[:HEAD_BYTES], len(data), window)) == (520, 280, 1, "TIFF", "RGB")
    assert len(data) > 400_000 and sum(read) < 50_000


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_truncated_file_is_a_reason_when_it_is_decoded(kind):
    data = encoded(np.kron(noise(), np.ones((8, 8, 1), np.uint8)), kind)
    for share in (0.1, 0.5, 0.9):
        reason = decode(data[: int(len(data) * share)])
        assert isinstance(reason, str) and reason.startswith("unreadable: ") and "\n" not in reason


KINDS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "TGA", "JPEG2000", "MPO")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")  # Pillow's own, about the damage
def test_no_damage_to_a_file_raises(kind):
    data, draw = encoded(smooth(), kind, 6 if kind not in ("BMP", "GIF", "PPM", "TGA") else None), random.Random(kind)
    for _ in range(150):
        damaged = bytearray(data[: draw.randrange(len(data))] if draw.random() < 0.25 else data)
        for _ in range(min(draw.choice([0, 1, 3, 20]), len(damaged))):
            damaged[draw.randrange(min(len(damaged), draw.choice([64, 300, 10**6])))] = draw.randrange(256)
        assert isinstance(header_of(bytes(damaged)), Header | str)
        assert isinstance(decode(bytes(damaged)), Image.Image | str)


@pytest.mark.skipif(not features.check("avif"), reason="Pillow was built without AVIF")
def test_damage_to_an_avif_file_is_a_reason():
    data = bytearray(encoded(smooth(), "AVIF"))
    assert isinstance(decode(bytes(data)), Image.Image)
    data[data.index(b"mdat") + 4 : data.index(b"mdat") + 12] = bytes(8)
    reason = decode(bytes(data))
    assert isinstance(reason, str) and reason.startswith("unreadable: ")


def test_more_pixels_than_pillow_likes_are_no_fault_here_and_absurdly_many_are(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    data = encoded(noise(10, 10), "PPM")
    assert told(header_of(data))[:2] == (10, 10) and isinstance(decode(data), Image.Image)
    huge = data.replace(b"10 10", b"60000 60000")
    assert header_of(huge) == decode(huge) == "unreadable: its pixels are absurdly many"


def test_a_cut_file_is_noticed_by_its_header_without_decoding():
    for kind in ("PNG", "JPEG", "WEBP", "BMP"):
        data = encoded(np.kron(noise(), np.ones((20, 20, 1), np.uint8)), kind)
        assert isinstance(header_of(data), Header)
        assert header_of(data[: len(data) // 2]).startswith("truncated: "), kind


def test_reading_changes_no_settings_of_the_process():
    before = (list(warnings.filters), Image.MAX_IMAGE_PIXELS)
    header_of(encoded(noise(), "PNG"))
    decode(encoded(noise(), "PNG"))
    assert (list(warnings.filters), Image.MAX_IMAGE_PIXELS) == before


def test_extensions_are_those_of_the_pictures_that_pillow_opens():
    Image.init()
    opened = {*Image.OPEN, "MPO"} - {"EPS", "MPEG", "BUFR", "GRIB", "HDF5", "WMF"}
    assert {end[1:] for end, kind in Image.registered_extensions().items() if kind in opened} == EXTENSIONS


# Views: what differs from the defaults


def test_transparency_is_laid_over_the_colour_that_a_view_names():
    clear = Image.new("RGBA", (2, 2), (200, 0, 0, 0))
    for name, colour in (("black", [0, 0, 0]), ("gray", [128] * 3), ("#102030", [16, 32, 48]), ("white", [255] * 3)):
        picture = decode(encoded(clear, "PNG"), f'{{"alpha_background":"{name}"}}')
        assert np.asarray(picture)[0, 0].tolist() == colour


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_orientation_can_be_ignored(kind, orientation):
    stored = laid(noise(), orientation)
    picture = decode(encoded(stored, kind, orientation), '{"orientation":"ignore"}')
    assert np.array_equal(np.asarray(picture), stored)


@pytest.mark.parametrize(("count", "index", "left"), [(2, 0, 0), (2, 1, 6), (3, 2, 8), (13, 12, 12)])
def test_a_part_of_a_composite_is_cut_and_left_over_columns_are_dropped(count, index, left):
    picture = decode(encoded(noise(), "PNG"), f'{{"part":[{index},{count}]}}')
    assert np.array_equal(np.asarray(picture), noise()[:, left : left + 13 // count])


def profile(kind="sRGB"):
    return ImageCms.ImageCmsProfile(ImageCms.createProfile(kind)).tobytes()


def test_a_colour_profile_is_converted_to_srgb():
    lab = Image.new("LAB", (4, 4), (128, 128, 128))  # L* 50, a* and b* 0: a middle gray
    pixels = pixels_of(encoded(lab, "TIFF", icc_profile=profile("LAB")))
    assert np.abs(pixels.astype(int) - 119).max() <= 1
    swapped = swapped_primaries()
    red = encoded(Image.new("RGB", (4, 4), (255, 0, 0)), "PNG", icc_profile=swapped)
    assert np.asarray(decode(red))[0, 0, 1] > 200 > np.asarray(decode(red))[0, 0, 0]
    assert np.asarray(decode(red, '{"color_profile":"ignore"}'))[0, 0].tolist() == [255, 0, 0]


def swapped_primaries():
    """Make a profile whose red is sRGB's green and the other way round, by swapping the tags' names."""
    data = profile()
    swapped = data.replace(b"rXYZ", b"tmp?").replace(b"gXYZ", b"rXYZ").replace(b"tmp?", b"gXYZ")
    return swapped.replace("sRGB".encode("utf-16-be"), "RGBs".encode("utf-16-be"))


def test_srgb_itself_and_damaged_profiles_change_nothing():
    for found in (profile(), b"no profile at all", profile()[:200], profile("LAB")):
        assert np.array_equal(pixels_of(encoded(noise(), "PNG", icc_profile=found)), noise())


def test_transparency_and_profile_go_together():
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 255))
    clear.putpixel((0, 0), (255, 0, 0, 0))
    pixels = pixels_of(encoded(clear, "PNG", icc_profile=swapped_primaries()))
    assert pixels[0, 0].tolist() == [255, 255, 255] and pixels[1, 1, 1] > 200 > pixels[1, 1, 0]


# Resize and crop


def test_a_picture_that_fits_is_only_cropped():
    pixels = noise(20, 30)
    framed = frame(Image.fromarray(pixels), Geometry(16, 8, 30, 20, 3, 5))
    assert np.array_equal(framed, pixels[3:11, 5:21])


def test_a_resize_is_antialiased_and_keeps_flat_colours():
    lines = np.zeros((64, 64, 3), np.uint8)
    lines[:, ::2] = 255  # one pixel wide: without antialiasing, black or white would be left
    framed = frame(Image.fromarray(lines), Geometry(16, 16, 16, 16, 0, 0))
    assert np.abs(framed[:, 2:-2].astype(int) - 128).max() <= 2
    flat = frame(Image.new("RGB", (50, 40), (9, 99, 199)), Geometry(16, 8, 20, 16, 4, 2))
    assert flat.shape == (8, 16, 3) and (flat == (9, 99, 199)).all()


LINEAR = '{"interpolation":"opencv-linear"}'


@pytest.mark.parametrize("size", [(150, 100), (192, 128), (400, 300), (301, 50), (64, 201)])
def test_opencv_linear_is_opencvs_own_resize_to_the_bit(size):
    pixels = noise(201, 301)
    whole = cv2.resize(pixels, size, interpolation=cv2.INTER_LINEAR)
    framed = frame(Image.fromarray(pixels), Geometry(48, 40, *size, 5, 7), LINEAR)
    assert np.array_equal(framed, whole[5:45, 7:55])
    assert not np.array_equal(framed, frame(pixels, Geometry(48, 40, *size, 5, 7)))


def test_how_a_picture_is_scaled_does_not_change_how_it_is_decoded():
    for data in (encoded(noise(20, 30), "JPEG"), encoded(noise(20, 30), "PNG")):
        assert np.array_equal(decode_pixels(data, LINEAR), decode_pixels(data))


def test_the_crop_is_taken_from_the_resized_picture():
    left_half_white = np.zeros((40, 40, 3), np.uint8)
    left_half_white[:, :20] = 255
    framed = frame(Image.fromarray(left_half_white), Geometry(8, 8, 80, 80, 0, 36))
    assert (framed[:, :1] > 230).all() and (framed[:, -1:] < 25).all()


def test_postscript_under_the_name_of_a_picture_is_never_run():
    data = encoded(Image.new("RGB", (8, 8)), "EPS")
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "EPS"
    assert header_of(data) == decode(data) == "unreadable: no known image format"


@pytest.mark.parametrize("quality", [40, 95])
@pytest.mark.parametrize("sampling", [0, 1, 2])
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"optimize": True}])
def test_a_plain_jpeg_has_the_pixels_that_pillow_gives_it(options, mode, sampling, quality):
    rng = np.random.default_rng(quality + sampling)
    photo = Image.fromarray(rng.integers(0, 256, (61, 83, 3), np.uint8)).resize((203, 149)).convert(mode)
    file = io.BytesIO()
    photo.save(file, "JPEG", quality=quality, **({"subsampling": sampling} if mode == "RGB" else {}), **options)
    assert np.array_equal(decode_pixels(file.getvalue()), np.asarray(decode(file.getvalue())))


@pytest.mark.parametrize("oddity", ["turned", "profiled", "cmyk", "cut", "garbage", "trailing", "view", "png"])
def test_any_other_picture_is_decoded_by_pillow(oddity):
    photo = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 60, 3), np.uint8))
    file, view, options = io.BytesIO(), "", {}
    if oddity == "turned":
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = 6
    if oddity == "profiled":
        options["icc_profile"] = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    if oddity == "view":
        view = '{"part":[1,2]}'
    (photo.convert("CMYK") if oddity == "cmyk" else photo).save(file, "PNG" if oddity == "png" else "JPEG", **options)
    data = file.getvalue()
    data = {"cut": data[:-200], "garbage": data[:700] + bytes(60) + data[760:], "trailing": data + b"more"}.get(
        oddity, data
    )
    slow, fast = decode(data, view), decode_pixels(data, view)
    assert fast == slow if isinstance(slow, str) else np.array_equal(fast, np.asarray(slow))
