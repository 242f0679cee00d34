import io
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from prep.alignment import (
    TRUSTED,
    Alignment,
    alignment,
    compare,
    gray,
    misaligned,
)
from prep.images import decode, decode_gray
from schemas.datasets import AlignmentCheck
from schemas.geometry import Geometry

DEMO = Path(__file__).parent.parent.parent / "datasets_demo"
FILES = sorted((DEMO / "photos").rglob("*.jpg"))
SIZES = (512, 640, 768, 1024)  # sides of a square with the training picture's area


def judged(found):
    """Judge by the defaults."""
    check = AlignmentCheck()
    return misaligned(found, check.maximum_shift, check.maximum_scale, check.minimum_similarity)


def photo(number):
    picture = decode(FILES[number % len(FILES)].read_bytes())
    assert not isinstance(picture, str)
    return np.asarray(picture)


def pair(number, side, right=0.0, below=0.0, zoom=1.0):
    """Cut target and reference out of a photograph; the reference lies right and below, and is larger by `zoom`."""
    source = photo(number)
    height, width = source.shape[:2]
    scale = side / (0.8 * np.sqrt(width * height))  # training pixels per pixel of the photograph
    columns, rows = int(0.8 * width * scale) // 16 * 16, int(0.8 * height * scale) // 16 * 16

    def cut(right, below, zoom):
        across = (0.1 * width * scale + columns / 2 - (columns / 2 + right - 0.5) / zoom) / scale - 0.5
        down = (0.1 * height * scale + rows / 2 - (rows / 2 + below - 0.5) / zoom) / scale - 0.5
        matrix = np.array([[1 / zoom / scale, 0, across], [0, 1 / zoom / scale, down]])
        return cv2.warpAffine(source, matrix, (columns, rows), flags=cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP)

    return cut(0.0, 0.0, 1.0), cut(right, below, zoom)


def measured(target, reference):
    """Measure two training pictures."""
    height, width = target.shape[:2]
    geometry = Geometry(width, height, width, height, 0, 0)
    one, scale = gray(Image.fromarray(target), geometry)
    other, _ = gray(Image.fromarray(reference), geometry)
    return alignment(one, other, scale)


def blur(pixels, random):
    return cv2.GaussianBlur(pixels, (0, 0), random.uniform(1, 5))


def low_resolution(pixels, random):
    height, width = pixels.shape[:2]
    factor = random.uniform(2, 6)
    small = cv2.resize(pixels, (int(width / factor), int(height / factor)), interpolation=cv2.INTER_AREA)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


def jpeg(pixels, random):
    return cv2.imdecode(cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, int(random.integers(8, 60))])[1], 1)


def noise(pixels, random):
    level = random.uniform(5, 40)
    grain = random.standard_normal(pixels.shape[:2], np.float32) * np.float32(level)
    return np.clip(pixels + grain[:, :, None], 0, 255).astype(np.uint8)


def gamma(pixels, random):
    return cv2.LUT(pixels, (255 * (np.arange(256) / 255) ** random.uniform(0.5, 2)).astype(np.uint8))


def cast(pixels, random):
    return np.clip(pixels * random.uniform(0.6, 1.2, 3).astype(np.float32) + 20, 0, 255).astype(np.uint8)


def old_photo(pixels, random):
    """Fade to black and white, scratch, and darken the corners."""
    print_ = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY).astype(np.float32) * 0.6 + 52
    height, width = print_.shape
    for _ in range(12):
        ends = random.integers(0, (width, height), (2, 2)).tolist()
        cv2.line(print_, *map(tuple, ends), 220.0, 2)
    down, across = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    return np.repeat((print_ * (1 - 0.2 * (across**2 + down**2))).astype(np.uint8)[:, :, None], 3, 2)


def local_edits(pixels, random):
    """Put pieces of other photographs and plain patches over up to 40 % of the picture."""
    edited, (height, width) = pixels.copy(), pixels.shape[:2]
    covered = np.zeros((height, width), bool)
    for _ in range(12):
        across, down = int(width * random.uniform(0.15, 0.4)), int(height * random.uniform(0.15, 0.4))
        left, top = int(random.integers(0, width - across)), int(random.integers(0, height - down))
        box = (slice(top, top + down), slice(left, left + across))
        if covered.mean() + across * down / (width * height) > 0.4:
            continue
        covered[box] = True
        piece = cv2.resize(photo(int(random.integers(len(FILES)))), (across, down))
        edited[box] = piece if random.random() < 0.7 else random.integers(0, 255, 3)
    return edited


def half_inverted(pixels, random):
    edited, edge = pixels.copy(), int(pixels.shape[1] * random.uniform(0.3, 0.7))
    edited[:, :edge] = 255 - edited[:, :edge]
    return edited


def pencil(pixels, random):
    """Draw light and dark sides of edges, as colour dodging does."""
    light = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    soft = cv2.GaussianBlur(light, (0, 0), random.uniform(3, 8))
    return np.repeat(cv2.divide(light, np.maximum(soft, 1), scale=240)[:, :, None], 3, 2)


def several(pixels, random):
    return jpeg(noise(gamma(blur(pixels, random), random), random), random)


EDITS = (blur, low_resolution, jpeg, noise, gamma, cast, old_photo, local_edits, half_inverted, several)


# Among two hundred good pairs


def test_no_good_pair_is_accused_whatever_its_reference_is_made_to_look_like():
    random = np.random.default_rng(0)
    accused = []
    for number in range(200):
        edit = (*EDITS, pencil)[number % (len(EDITS) + 1)]
        target, reference = pair(number, SIZES[number % 4])
        if said := judged(measured(target, edit(reference, random))):
            accused.append((FILES[number % len(FILES)].stem, edit.__name__, said))
    assert accused == []


@pytest.mark.parametrize("distance", [1, 3, 10])
def test_planted_shifts_are_found_and_measured_to_a_third_of_a_pixel(distance):
    random = np.random.default_rng(distance)
    for number, edit in enumerate(EDITS):
        angle = random.uniform(0, 2 * np.pi)
        right, below = distance * np.cos(angle), distance * np.sin(angle)
        target, reference = pair(3 * number + distance, SIZES[number % 4], right, below)
        found = measured(target, edit(reference, random))
        assert (judged(found) or "").startswith("misaligned: shifted"), (edit, found)
        assert np.hypot(found.shift_x - right, found.shift_y - below) < 0.3, (edit, found)
        assert abs(found.scale - 1) < 0.002, (edit, found)


@pytest.mark.parametrize("zoom", [1.01, 1 / 1.01, 1.04])
def test_a_planted_zoom_is_found_and_measured_to_two_thousandths(zoom):
    random = np.random.default_rng(1)
    for number, edit in enumerate(EDITS):
        target, reference = pair(5 * number + 1, SIZES[number % 4], zoom=zoom)
        found = measured(target, edit(reference, random))
        assert (judged(found) or "").endswith("larger" if zoom > 1 else "smaller"), (edit, found)
        assert abs(found.scale - zoom) < 0.002, (edit, found)
        assert np.hypot(found.shift_x, found.shift_y) < 0.3, (edit, found)


def test_shifts_of_parts_of_a_pixel_are_measured_and_pardoned():
    for number, (right, below) in enumerate([(0.5, 0.0), (0.0, -0.25), (-0.3, 0.3), (0.25, 0.4)]):
        found = measured(*pair(number, 1024, right, below))
        assert np.hypot(found.shift_x - right, found.shift_y - below) < 0.1
        assert judged(found) is None


def test_swapped_pairs_show_another_picture():
    random = np.random.default_rng(2)
    for number, other in enumerate([4, 9, 14, 17, 21, 0, 11]):
        target, _ = pair(other, SIZES[number % 4])
        reference = cv2.resize(pair(other + 8, 512)[0], target.shape[1::-1])
        found = measured(target, EDITS[number](reference, random))
        assert (judged(found) or "").startswith("misaligned: shows another picture"), (other, found)
        assert (found.shift_x, found.shift_y, found.scale, found.confidence) == (0, 0, 1, 0)


# Signs and sentences


def test_a_reference_that_lies_right_and_below_has_positive_shifts():
    target = photo(0)[:256, :256]
    reference = np.roll(target, (2, 5), (0, 1))  # two rows down, five columns right
    found = measured(target, reference)
    assert abs(found.shift_x - 5) < 0.1 and abs(found.shift_y - 2) < 0.1
    assert judged(found) == "misaligned: shifted 5.0 px right, 2.0 px down"
    back = measured(reference, target)
    assert judged(back) == "misaligned: shifted 5.0 px left, 2.0 px up"


def test_the_sentences_say_all_that_is_wrong_and_nothing_else():
    def said(*numbers):
        return misaligned(Alignment(*numbers), 1.0, 0.005, 0.5)

    assert said(3.1, 0.2, 1.0, 0.9, 1.0) == "misaligned: shifted 3.1 px right, 0.2 px down"
    assert said(0.3, 0.2, 1.0101, 0.9, 1.0) == "misaligned: 1.0 % larger"
    assert said(-3.1, -2.0, 0.98, 0.9, 1.0) == "misaligned: shifted 3.1 px left, 2.0 px up, 2.0 % smaller"
    assert said(0.0, 0.0, 1.0, 0.03, 0.0) == "misaligned: shows another picture (similarity 0.03)"
    assert said(0.0, 0.0, 1.0, 0.6, 0.0) is None  # too alike
    assert said(9.0, 9.0, 1.1, 0.03, 0.4) is None  # not to be trusted
    assert said(0.9, 0.3, 1.004, 0.03, 1.0) is None


# Pictures that tell nothing


@pytest.mark.parametrize("shape", [(256, 256), (8, 8), (1, 1), (16, 4000), (30, 2000), (600, 25)])
def test_pictures_that_tell_nothing_are_not_accused(shape):
    ramp = np.broadcast_to(np.linspace(20, 220, shape[1]).astype(np.uint8), shape)
    busy = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    flat = np.full(shape, 90, np.uint8)
    for target, reference in [(flat, flat), (flat, flat + 60), (ramp, ramp[:, ::-1]), (flat, busy), (ramp, busy)]:
        for one, other in ((target, reference), (reference, target)):
            found = alignment(np.ascontiguousarray(one), np.ascontiguousarray(other), 4.0)
            assert found.confidence < TRUSTED and judged(found) is None
            assert (found.shift_x, found.shift_y, found.scale) == (0, 0, 1)
            assert 0 <= found.similarity <= 1


@pytest.mark.parametrize(("width", "height"), [(2048, 128), (96, 1536), (64, 64), (8, 8), (4096, 8)])
def test_training_pictures_of_any_shape_are_measured_or_left_alone(width, height):
    picture = Image.fromarray(photo(3)).resize((width + 8, height))
    one, scale = gray(picture, Geometry(width, height, width + 8, height, 0, 4))
    other, _ = gray(picture, Geometry(width, height, width + 8, height, 0, 0))
    found = alignment(one, other, scale)
    if found.confidence >= TRUSTED:
        assert abs(found.shift_x - 4) < 0.3 and abs(found.shift_y) < 0.3
    assert judged(alignment(one, one, scale)) is None


def test_a_blank_reference_is_not_another_picture():
    target = photo(0)
    for blank in (0, 127, 255):
        assert judged(measured(target, np.full_like(target, blank))) is None


# From files


def file(picture, exif=None, kind="JPEG"):
    stream = io.BytesIO()
    picture.save(stream, kind, quality=92, **({} if exif is None else {"exif": exif}))
    return stream.getvalue()


def whole(width, height):
    return Geometry(width, height, width, height, 0, 0)


def test_the_demo_pairs_lie_on_their_targets():
    targets = sorted((DEMO / "edits" / "target").glob("*.jpg"))
    assert len(targets) == 10
    for target in targets:
        reference = (DEMO / "edits" / "reference" / target.name).read_bytes()
        with Image.open(target) as picture:
            width, height = picture.size
        for times in (1, 2.5):
            found = compare(target.read_bytes(), "", reference, "", whole(int(width * times), int(height * times)))
            assert not isinstance(found, str)
            assert found.confidence >= TRUSTED and np.hypot(found.shift_x, found.shift_y) < 0.1
            assert judged(found) is None


def test_a_shift_survives_other_sizes_turned_files_and_reduced_decoding():
    """A reference of other pixel size takes the target's geometry; odd sizes end inside a reduced JPEG's last pixel."""
    source = Image.fromarray(photo(12)).resize((2211, 1467), Image.Resampling.BICUBIC)
    target, reference = source.crop((11, 6, 2200, 1461)), source.crop((8, 6, 2197, 1461))  # of 2189 × 1455
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = file(target.transpose(Image.Transpose.ROTATE_90), exif)
    geometry = Geometry(1024, 640, 1095, 728, 31, 57)
    for data in (file(target), turned, file(target, kind="PNG")):
        for size in ((2189, 1455), (1501, 998)):
            found = compare(data, "", file(reference.resize(size)), "", geometry)
            assert not isinstance(found, str)
            assert abs(found.shift_x - 3 * 1095 / 2189) < 0.1 and abs(found.shift_y) < 0.1
            assert abs(found.scale - 1) < 0.0005


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("view", ["", '{"orientation":"ignore"}', '{"part":[1,2]}'])
def test_a_reduced_gray_picture_is_the_whole_picture_reduced(orientation, view):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = file(Image.fromarray(photo(12)).resize((1205, 803), Image.Resampling.BICUBIC), exif)
    full = decode(data, view)
    reduced = decode_gray(data, view, (150, 150))
    assert not isinstance(full, str) and not isinstance(reduced, str)
    assert reduced.width < full.width / 1.9 and min(reduced.size) >= 150
    geometry = whole(150, 150)
    assert np.abs(gray(full, geometry)[0].astype(float) - gray(reduced, geometry)[0]).mean() < 2
    found = alignment(gray(full, geometry)[0], gray(reduced, geometry)[0], 1.0)
    assert np.hypot(found.shift_x, found.shift_y) < 0.05 and abs(found.scale - 1) < 0.0005


def test_halves_of_one_file_are_compared():
    half = Image.fromarray(photo(5))
    both = Image.new("RGB", (2 * half.width, half.height))
    both.paste(half, (0, 0))
    both.paste(half, (half.width + 4, 0))
    data = file(both)
    found = compare(data, '{"part":[0,2]}', data, '{"part":[1,2]}', whole(*half.size))
    assert not isinstance(found, str)
    assert abs(found.shift_x - 4) < 0.2


def test_an_unreadable_file_is_told():
    good = FILES[0].read_bytes()
    for bad in (b"", b"no picture", good[:400]):
        for pair_ in ((bad, good), (good, bad)):
            told = compare(pair_[0], "", pair_[1], "", whole(256, 256))
            assert isinstance(told, str) and told.startswith("unreadable: ")
