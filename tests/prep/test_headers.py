import io
import random
import struct
import warnings
import zlib
from itertools import product

import pytest
from PIL import Image

from prep.headers import Header, parse

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
PROFILE = bytes(range(256)) * 2
MODES = {
    "JPEG": ("L", "RGB", "CMYK"),
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "WEBP": ("RGB", "RGBA"),
    "GIF": ("L", "P", "RGB", "RGBA"),
    "BMP": ("1", "L", "P", "RGB", "RGBA"),
}


def ours(data):
    return parse(data[:4096], len(data), lambda offset, length: data[offset : offset + length])


def pillows(data, bits, icc=None):
    """The header as Pillow tells it; it does not tell the bits."""
    with Image.open(io.BytesIO(data)) as image:
        orientation = 1 if image.format == "PNG" and "exif" not in image.info else image.getexif().get(0x0112, 1)
        orientation = orientation if 1 <= orientation <= 8 else 1
        width, height = image.size[::-1] if orientation >= 5 else image.size
        frames = getattr(image, "n_frames", 1)
        alpha, icc = image.has_transparency_data, "icc_profile" in image.info
        return Header(width, height, orientation, image.format, image.mode, bits, frames, alpha, icc)


def picture(mode, width=37, height=23):
    gradient = Image.linear_gradient("L").resize((width, height))
    if mode == "RGBA":
        colours = Image.merge("RGB", (gradient, gradient.rotate(180), gradient.transpose(Image.Transpose.ROTATE_180)))
        colours.putalpha(gradient.point(lambda level: 255 if level < 99 else 80))
        return colours
    return picture("RGBA", width, height).convert("RGB").convert(mode) if mode != "I;16" else gradient.convert("I;16")


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def exif(orientation, **more):
    tags = Image.Exif()
    tags[0x0112] = orientation
    for tag, value in more.items():
        tags[int(tag[1:], 16)] = value
    return tags


def tiff(order, tags):
    """An EXIF block whose directory holds (tag, type, number, four bytes) as given."""
    entries = b"".join(struct.pack(order + "HHI", *tag[:3]) + tag[3] for tag in tags)
    start = b"II*\0" if order == "<" else b"MM\0*"
    return start + struct.pack(order + "IH", 8, len(tags)) + entries + bytes(4)


def segment(marker, content):
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(content) + 2) + content


def after_start(jpeg, *segments):
    return jpeg[:2] + b"".join(segments) + jpeg[2:]


def chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def after_header(png, *chunks):
    return png[:33] + b"".join(chunks) + png[33:]


def small_files():
    """One small file of each kind, each with as much around its pixels as its format bears."""
    film = [picture("RGB").rotate(turn) for turn in (0, 90, 180)]
    more = {"save_all": True, "append_images": film[1:]}
    return {
        "jpeg": saved(film[0], "JPEG", exif=exif(6), icc_profile=PROFILE, quality=20),
        "progressive": saved(film[0], "JPEG", progressive=True, quality=20),
        "mpo": saved(film[0], "MPO", quality=20, **more),
        "png": saved(picture("P"), "PNG", exif=exif(6), icc_profile=PROFILE, transparency=3),
        "apng": saved(film[0], "PNG", **more),
        "webp": saved(film[0], "WEBP", quality=20),
        "lossless": saved(picture("RGBA"), "WEBP", lossless=True),
        "extended": saved(picture("RGBA"), "WEBP", exif=exif(6), icc_profile=PROFILE, xmp=b"<x/>", quality=20),
        "moving": saved(film[0], "WEBP", quality=20, **more),
        "gif": saved(picture("P"), "GIF", transparency=3),
        "moving gif": saved(film[0], "GIF", **more),
        "bmp": saved(picture("P"), "BMP"),
    }


@pytest.mark.parametrize("kind", FORMATS)
def test_whatever_pillow_writes_reads_as_pillow_reads_it(kind):
    for mode, orientation, icc in product(MODES[kind], (None, *range(10)), (False, True)):
        options = {} if orientation is None else {"exif": exif(orientation)}
        if icc:
            options["icc_profile"] = PROFILE
        data = saved(picture(mode), kind, **options)
        bits = {"1": 1, "I;16": 16}.get(mode, 8)
        assert ours(data) == pillows(data, bits), (mode, orientation, icc)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "MPO"])
def test_the_frames_of_an_animation_are_counted(kind):
    for number, mode in product((1, 2, 5), ("L", "RGB", "RGBA") if kind != "MPO" else ("L", "RGB")):
        film = [picture(mode, 40 + place, 30).resize((40, 30)) for place in range(number)]
        film = [frame.rotate(90 * place) for place, frame in enumerate(film)]
        data = saved(film[0], kind, save_all=True, append_images=film[1:])
        assert ours(data) == pillows(data, 8), (number, mode)


def test_the_default_picture_of_an_animated_png_counts_as_pillow_counts_it():
    film = [picture("RGB").rotate(turn) for turn in (0, 90, 180)]
    data = saved(film[0], "PNG", save_all=True, append_images=film[1:], default_image=True)
    assert ours(data) == pillows(data, 8)
    assert ours(data).frames == 3


def test_an_animated_webp_with_an_orientation_and_a_profile():
    film = [picture("RGBA").rotate(turn) for turn in (0, 90)]
    data = saved(film[0], "WEBP", save_all=True, append_images=film[1:], exif=exif(8), icc_profile=PROFILE)
    assert ours(data) == pillows(data, 8) == Header(23, 37, 8, "WEBP", "RGBA", 8, 2, True, True)


def test_png_depths_and_transparency_of_every_kind():
    for bits in (1, 2, 4, 8):
        data = saved(picture("RGB").quantize(2**bits), "PNG", bits=bits)
        assert ours(data) == pillows(data, bits)
        assert ours(data).bits == bits
    for mode, transparency in (("L", 7), ("RGB", (1, 2, 3)), ("P", 5), ("P", b"\x00\x80\xff"), ("1", 0), ("I;16", 9)):
        data = saved(picture(mode), "PNG", transparency=transparency)
        assert ours(data) == pillows(data, ours(data).bits)
        assert ours(data).alpha


def test_png_modes_that_pillow_reads_but_does_not_write():
    for bits, colour in product((1, 2, 4, 8, 16), (0, 2, 3, 4, 6)):
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", 5, 4, bits, colour, 0, 0, 0))
        palette = chunk(b"PLTE", bytes(3 << min(bits, 8)))
        pixels = chunk(b"IDAT", zlib.compress(bytes(200))) + chunk(b"IEND", b"")
        data = b"\x89PNG\r\n\x1a\n" + header + palette + pixels
        allowed = colour == 0 or (bits >= 8 and colour != 3) or (bits <= 8 and colour == 3)
        assert ours(data) == (pillows(data, bits) if allowed else None)
        if colour == 3:  # Pillow itself does not know what to do without a palette
            assert ours(b"\x89PNG\r\n\x1a\n" + header + pixels) is None


def test_the_orientation_reads_in_both_byte_orders_and_only_as_a_single_short():
    jpeg = saved(picture("RGB"), "JPEG")
    for order, orientation in product("<>", range(10)):
        value = struct.pack(order + "HH", orientation, 0xFFFF)
        maker = (0x010F, 2, 4, b"abc\0")
        data = after_start(jpeg, segment(0xE1, b"Exif\0\0" + tiff(order, [maker, (0x0112, 3, 1, value)])))
        assert ours(data) == pillows(data, 8), (order, orientation)
    for odd in ((0x0112, 4, 1, b"\6\0\0\0"), (0x0112, 3, 2, b"\6\0\6\0"), (0x010F, 2, 99, b"\xff\xff\0\0")):
        data = after_start(jpeg, segment(0xE1, b"Exif\0\0" + tiff("<", [odd, (0x0112, 3, 1, b"\6\0\0\0")])))
        assert ours(data) is None
    for broken in (b"", b"II*\0", b"II*\0\xff\xff\0\0", b"II*\0\x08\0\0\0\x09\0", b"XX*\0\x08\0\0\0\0\0"):
        assert ours(after_start(jpeg, segment(0xE1, b"Exif\0\0" + broken))) is None


def test_an_exif_block_beyond_the_first_read_is_found_before_and_behind_its_end():
    for size in (3000, 4000, 4060, 4090, 5000, 60000):
        data = saved(picture("RGB"), "JPEG", exif=exif(6, x9286=b"x" * size), icc_profile=PROFILE * 10)
        assert ours(data) == pillows(data, 8), size
        assert ours(data).orientation == 6
    comment = segment(0xFE, b"x" * 4050)
    data = after_start(saved(picture("RGB"), "JPEG", exif=exif(6)), comment)
    assert ours(data) == pillows(data, 8)
    far_directory = (
        b"Exif\0\0II*\0" + struct.pack("<I", 9000) + bytes(8992) + tiff("<", [(0x0112, 3, 1, b"\6\0\0\0")])[8:]
    )
    data = after_start(saved(picture("RGB"), "JPEG"), segment(0xE1, far_directory))
    assert ours(data) == pillows(data, 8)
    assert ours(data).orientation == 6


def test_xmp_is_no_exif_but_its_orientation_counts_where_exif_has_none():
    jpeg, name = saved(picture("RGB"), "JPEG"), b"http://ns.adobe.com/xap/1.0/\0"
    for text in (b"<x/>", b'<x tiff:Orientation="6"/>', b"<tiff:Orientation>8<", b'tiff:Orientation="9"', b"y" * 9000):
        xmp = segment(0xE1, name + text)
        for data in (
            after_start(jpeg, xmp),
            after_start(jpeg, xmp, segment(0xE1, b"Exif\0\0" + tiff("<", [(0x0112, 3, 1, b"\3\0\0\0")]))),
            after_start(jpeg, segment(0xE1, b"Exif\0\0" + tiff("<", [(0x010F, 2, 4, b"abc\0")])), xmp),
            saved(picture("RGB"), "WEBP", xmp=text),
        ):
            assert ours(data) == pillows(data, 8), text


def test_an_orientation_in_two_places_of_a_png_is_for_pillow():
    png, xmp = saved(picture("RGB"), "PNG"), chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + b'tiff:Orientation="6"')
    nothing = chunk(b"eXIf", tiff("<", [(0x010F, 2, 4, b"abc\0")]))
    turned = chunk(b"eXIf", tiff(">", [(0x0112, 3, 1, b"\0\6\0\0")]))
    assert ours(after_header(png, xmp)) == pillows(after_header(png, xmp), 8)
    assert ours(after_header(png, xmp, turned)) == pillows(after_header(png, xmp, turned), 8)
    assert ours(after_header(png, nothing)) == pillows(after_header(png, nothing), 8)
    assert ours(after_header(png, nothing, xmp)) is None


def test_a_text_that_pillow_takes_for_more_than_a_text_is_for_pillow():
    png = saved(picture("RGB"), "PNG")
    for keyword in (b"Raw profile type exif", b"exif", b"icc_profile", b"transparency"):
        assert ours(after_header(png, chunk(b"tEXt", keyword + b"\0\n\nx"))) is None
        assert ours(after_header(png, chunk(b"zTXt", keyword + b"\0\0" + zlib.compress(b"x")))) is None
        assert ours(after_header(png, chunk(b"iTXt", keyword + b"\0\0\0\0\0x"))) is None
    bomb = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2**21)))
    assert ours(after_header(png, bomb)) is None
    plain = [chunk(b"tEXt", b"parameters\0a photo, 20 steps" * 400), chunk(b"iTXt", b"Title\0\0\0\0\0caf\xc3\xa9")]
    assert ours(after_header(png, *plain)) == pillows(after_header(png, *plain), 8)


def test_a_png_with_a_broken_chunk_is_for_pillow():
    png = saved(picture("RGB"), "PNG")
    broken = chunk(b"tEXt", b"Title\0x")[:-1] + b"\0"
    short = chunk(b"pHYs", b"\0\0\0\1")
    for data in (after_header(png, broken), after_header(png, short), png[:20] + b"\7" + png[21:]):
        assert ours(data) is None
    assert ours(after_header(png, chunk(b"iDOT", b"xxxx"))) == pillows(png, 8)


def test_a_jpeg_profile_counts_only_before_the_frame():
    jpeg, profile = saved(picture("RGB"), "JPEG"), segment(0xE2, b"ICC_PROFILE\0\1\1" + PROFILE)
    scan = jpeg.index(b"\xff\xda")
    late = jpeg[:scan] + profile + jpeg[scan:]
    assert ours(after_start(jpeg, profile)).icc and not ours(late).icc
    assert ours(late) == pillows(late, 8)


def test_fill_bytes_are_passed_over_and_junk_is_for_pillow():
    jpeg = saved(picture("RGB"), "JPEG")
    filled = after_start(jpeg, b"\xff" * 5, segment(0xFE, b"a comment"), b"\xff" * 5000)
    assert ours(filled) == pillows(filled, 8)
    for junk in (b"\0\0", b"\xff\0", b"\xff\xd8", b"\xff\xd9", b"\xff\xfe\0\1"):
        assert ours(after_start(jpeg, junk)) is None


def test_frames_of_a_jpeg_that_pillow_cannot_decode_are_for_pillow():
    jpeg = saved(picture("RGB"), "JPEG")
    frame = jpeg.index(b"\xff\xc0")
    twelve_bits = jpeg[: frame + 4] + b"\x0c" + jpeg[frame + 5 :]
    two_layers = jpeg[: frame + 9] + b"\2" + jpeg[frame + 10 :]
    twice = jpeg[:frame] + jpeg[frame : frame + 19] + jpeg[frame:]
    assert [ours(data) for data in (twelve_bits, two_layers, twice)] == [None, None, None]
    for marker in (0xC1, 0xC2, 0xC9, 0xCA):
        other = jpeg[: frame + 1] + bytes([marker]) + jpeg[frame + 2 :]
        assert ours(other) == pillows(other, 8)


def test_no_pixels_are_a_reason():
    jpeg, webp = saved(picture("RGB"), "JPEG"), saved(picture("RGB"), "WEBP")
    gif, bmp = saved(picture("P"), "GIF"), saved(picture("RGB"), "BMP")
    frame = jpeg.index(b"\xff\xc0")
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 0, 4, 8, 2, 0, 0, 0))
    at = gif.index(b",", 13 + (6 << (gif[10] & 7)))
    for data in (
        jpeg[: frame + 5] + bytes(2) + jpeg[frame + 7 :],
        b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b""),
        webp[:26] + bytes(2) + webp[28:],
        gif[:6] + bytes(4) + gif[10 : at + 1] + bytes(8) + gif[at + 9 :],
        bmp[:18] + bytes(4) + bmp[22:],
    ):
        assert str(ours(data)).startswith("unreadable: a picture of "), data[:4]


def test_a_gain_map_leaves_a_jpeg_a_jpeg_and_a_bad_index_is_for_pillow():
    film = [picture("RGB").rotate(turn) for turn in (0, 90)]
    mpo = saved(film[0], "MPO", save_all=True, append_images=film[1:])
    assert ours(mpo) == pillows(mpo, 8) and ours(mpo).format == "MPO" and ours(mpo).frames == 2
    gain = segment(0xE1, b'http://ns.adobe.com/xap/1.0/\0<x hdrgm:Version="1.0"/>')
    index = mpo.index(b"\xff\xe2")
    ultra = mpo[:index] + gain + mpo[index:]
    assert ours(ultra) == pillows(ultra, 8) and ours(ultra).format == "JPEG" and ours(ultra).frames == 1
    start = mpo.index(b"MPF\0") + 4
    for place, byte in ((0, 0), (4, 99), (8, 0), (22, 9), (24, 0), (30, 0), (38, 255)):
        broken = mpo[: start + place] + bytes([byte]) + mpo[start + place + 1 :]
        assert ours(broken) is None or ours(broken).frames == 2, place


def test_a_gif_is_as_large_as_its_first_frame_needs():
    gif = saved(picture("P"), "GIF")
    small = gif[:6] + struct.pack("<HH", 5, 40) + gif[10:]
    assert ours(small) == pillows(small, 8)
    assert (ours(small).width, ours(small).height) == (37, 40)


def test_extensions_of_a_gif_are_walked_over_or_for_pillow():
    gif = saved(picture("P"), "GIF")
    at = 13 + (6 << (gif[10] & 7))  # behind the palette
    for extension in (
        b"!\xfe\0",
        b"!\xfe\5hello\5again\0",
        b"!\xff\x0bNETSCAPE2.0\3\1\5\0\0",
        b"!\xf9\4\1\0\0\7\0",
        b"!\xf9\4\0\0\0\7\0",
        b"!\xff\x0bXMP DataXMP" + b"\xff" * 256 + b"\0",
    ):
        data = gif[:at] + extension + gif[at:]
        assert ours(data) == pillows(data, 8), extension
    for odd in (b"!\xff\0", b"!\xf9\3\1\0\0\0", b"!\xff\x0bNETSCAPE2.0\0", b"\0"):
        assert ours(gif[:at] + odd + gif[at:]) is None
    assert ours(gif[:at] + b";") == "unreadable: a GIF without a picture"


def test_bitmaps_of_every_windows_kind():
    pixels = bytes(range(240)) * 2
    for size, bits, height in product((40, 52, 56, 108, 124), (1, 4, 8, 16, 24, 32), (4, -4)):
        colours = 1 << bits if bits <= 8 else 0
        palettes = [b"".join(bytes((level, level, tone, 0)) for level in range(colours)) for tone in (0, 1)]
        palettes.append(b"".join(bytes((level * 255 // max(1, colours - 1),) * 3) + b"\0" for level in range(colours)))
        for palette in palettes:
            offset = 14 + size + len(palette)
            fields = struct.pack("<IiiHHIIiiII", size, 5, height, 1, bits, 0, 0, 0, 0, 0, 0)
            data = b"BM" + struct.pack("<IHHI", 0, 0, 0, offset) + fields + bytes(size - 40) + palette + pixels
            found = ours(data)
            assert found == pillows(data, {16: 5, 24: 8, 32: 8}.get(bits, bits)), (size, bits, height)
    masks = [(0xFF0000, 0xFF00, 0xFF, alpha) for alpha in (0, 0xFF000000)]
    for size, mask in product((40, 52, 56, 108, 124), masks):
        fields = struct.pack("<IiiHHIIiiII", size, 5, 4, 1, 32, 3, 0, 0, 0, 0, 0)
        data = b"BM" + struct.pack("<IHHI", 0, 0, 0, 14 + 124) + (fields + struct.pack("<4I", *mask)).ljust(124, b"\0")
        assert ours(data + pixels) == pillows(data + pixels, 8)
    for size, compression in ((40, 1), (40, 2), (64, 0), (12, 0)):
        fields = struct.pack("<IiiHHIIiiII", size, 5, 4, 1, 8, compression, 0, 0, 0, 0, 0)
        assert ours(b"BM" + struct.pack("<IHHI", 0, 0, 0, 1078) + fields + bytes(2000)) is None


def test_other_formats_and_other_bytes_are_for_pillow():
    for data in (
        b"",
        b"B",
        b"BM",
        b"GIF90a",
        b"RIFF\0\0\0\0WAVE",
        b"II*\0",
        b"\xff\xd8\0",
        b"P6 1 1 255 abc",
        bytes(5000),
    ):
        assert ours(data) is None
    assert ours(saved(picture("RGB"), "TIFF")) is None


def test_every_cut_of_a_small_file_is_told_or_left_to_pillow():
    for name, data in small_files().items():
        assert isinstance(ours(data), Header), name
        for end in range(len(data)):
            found = ours(data[:end])
            if isinstance(found, Header):
                # the first picture is whole: a later frame was cut, or only what follows the pixels
                assert name in ("mpo", "moving gif", "gif", "bmp"), (name, end)
                with warnings.catch_warnings(), Image.open(io.BytesIO(data[:end])) as image:
                    image.load()
            elif end >= (30 if name != "gif" else 13):
                assert found is None or found.startswith("truncated: "), (name, end, found)
        if name in ("jpeg", "progressive", "png", "apng", "webp", "lossless", "extended", "moving"):
            assert all(str(ours(data[:end])).startswith("truncated: ") for end in range(12, len(data))), name


def test_a_cut_in_a_large_file_is_told_and_its_whole_is_not():
    noise = Image.effect_noise((600, 500), 90).convert("RGB")
    for kind in ("JPEG", "PNG", "WEBP", "BMP"):
        data = saved(noise, kind)
        assert len(data) > 100_000
        assert ours(data) == pillows(data, 8)
        for share in (0.3, 0.9, 0.995):
            assert str(ours(data[: int(len(data) * share)])).startswith("truncated: "), (kind, share)


def test_the_end_marker_of_a_thumbnail_does_not_count():
    thumbnail = saved(picture("RGB", 16, 16), "JPEG")
    block = segment(0xE1, b"Exif\0\0" + tiff("<", [(0x0112, 3, 1, b"\6\0\0\0")]) + thumbnail)
    data = after_start(saved(picture("RGB"), "JPEG"), block)
    assert ours(data) == pillows(data, 8)
    for end in (*range(3, len(block)), len(data) - 1, len(data) - 2):
        assert str(ours(data[:end])).startswith("truncated: "), end


def test_what_follows_the_end_does_not_matter():
    jpeg, png = saved(picture("RGB"), "JPEG"), saved(picture("RGB"), "PNG")
    gif, webp, bmp = saved(picture("P"), "GIF"), saved(picture("RGB"), "WEBP"), saved(picture("RGB"), "BMP")
    video = b"\0\0\0\x18ftypmp42" + random.Random(0).randbytes(3_000_000).replace(b"\xff\xd9", b"\xff\xd8")
    for data in (jpeg, png, gif, webp, bmp):
        for trailer in (b"\0", b"\r\n", bytes(70_000), video):
            assert ours(data + trailer) == ours(data), (data[:4], len(trailer))
    for cut in (jpeg[:-2] + video, png[:-12] + bytes(70_000)):
        assert not isinstance(ours(cut), Header)


def test_an_end_marker_across_two_blocks_is_found():
    jpeg = saved(picture("RGB"), "JPEG")
    scan = jpeg.index(b"\xff\xda") + 14
    for shift in range(-3, 4):
        inside = bytes(2**20 - (len(jpeg) - scan) + shift)
        data = jpeg[:-2] + inside + b"\xff\xd9" + bytes(100_000)
        assert isinstance(ours(data), Header), shift


def test_no_bytes_make_it_raise_or_read_without_end():
    chance = random.Random(0)
    files = list(small_files().values())
    for _ in range(6000):
        data = bytearray(chance.choice(files))
        for _ in range(chance.choice((1, 2, 5))):
            place = chance.randrange(min(len(data), chance.choice((40, 200, 10_000))))
            data[place : place + chance.choice((0, 1, 1, 1, 4))] = chance.choice((b"\0", b"\xff", chance.randbytes(4)))
        data = bytes(data[: chance.choice((len(data), len(data), chance.randrange(len(data))))])
        reads = []

        def read(offset, length, data=data, reads=reads):
            assert offset >= 0 and length >= 0
            reads.append(offset)
            return data[offset : offset + length]

        found = parse(data[:4096], len(data), read)
        assert found is None or isinstance(found, str) or (found.width > 0 and found.height > 0 and found.frames > 0)
        assert len(reads) < 100


def test_bytes_of_no_sense_behind_a_good_start_do_not_make_it_raise():
    chance = random.Random(0)
    starts = [b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", b"GIF89a", b"BM", b"RIFF\x20\0\0\0WEBPVP8X\x0a\0\0\0"]
    for _ in range(4000):
        ours(chance.choice(starts) + chance.randbytes(chance.randrange(200)))


def test_a_walk_over_a_hostile_file_ends():
    jpeg = b"\xff\xd8" + segment(0xFE, b"") * 500_000
    png = saved(picture("RGB"), "PNG")[:33] + chunk(b"abCd", b"") * 450_000
    gif = b"GIF89a\1\0\1\0\0\0\0" + b"!\xfe\1x\0" * 500_000
    webp = b"RIFF" + struct.pack("<I", 8 * 500_022) + b"WEBPVP8X\x0a\0\0\0\2" + bytes(9) + b"abcd\0\0\0\0" * 500_000
    webp = webp[:4] + struct.pack("<I", len(webp) - 8) + webp[8:]
    assert [ours(data) for data in (jpeg, png, gif, webp)] == [None, None, None, None]


def test_a_file_that_shrinks_while_it_is_read_does_not_make_it_raise():
    for data in small_files().values():
        long = data[:40] + bytes(9000) + data[40:]
        for whole in (data, long):
            found = parse(whole[:64], len(whole), lambda offset, length: b"")
            assert found is None or isinstance(found, (str, Header))
