import io
import json
from pathlib import Path

import numpy as np
import pytest
from degradations import photo
from PIL import Image, features

from families import open_project
from prep.degrade import STEPS, apply, decode_stored, encode, realise, suffix_of, why_impossible
from prep.images import decode, frame
from prep.pixels import Picture, pixels_of
from prep.places import place_of
from schemas.errors import UserError
from schemas.geometry import Geometry
from schemas.keys import content_id
from schemas.recipes import Chain, JpegArtifacts, Superresolution, recipe_text

SUFFIXES = {"jpeg": ".jpg", "webp": ".webp"}


@pytest.mark.parametrize("last", STEPS)
@pytest.mark.parametrize("size", [(96, 120), (1, 1), (7, 5), (17, 33)])
def test_a_stored_picture_reads_back_as_the_very_pixels_whatever_its_last_step(last, size):
    steps = realise(Chain(steps=[{"step": "jpeg"}, {"step": "noise"}, {"step": last}]), 5)
    data, suffix = encode(photo(*size), steps, 5)
    assert suffix == suffix_of(steps) == SUFFIXES.get(last, ".png")
    assert np.array_equal(decode_stored(data), apply(photo(*size), steps, 5))


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("quality", [1, 10, 50, 95, 100])
def test_a_jpeg_is_stored_as_its_own_bitstream(quality, subsampling):
    steps = [{"step": "jpeg", "quality": quality, "subsampling": subsampling}]
    data, suffix = encode(photo(), steps, 1)
    assert suffix == ".jpg" and np.array_equal(decode_stored(data), apply(photo(), steps, 1))
    with Image.open(io.BytesIO(data)) as picture:  # another decoder of libjpeg's sees the same
        assert picture.format == "JPEG"
        assert np.array_equal(np.asarray(picture.convert("RGB")), decode_stored(data))


def test_without_steps_the_picture_itself_is_stored_without_loss():
    data, suffix = encode(photo(), [], 1)
    assert suffix == suffix_of([]) == ".png" and np.array_equal(decode_stored(data), photo())
    untouched = apply(photo(), [], 1)
    assert np.array_equal(untouched, photo())


def test_what_the_guides_recipes_make_is_stored_as_png_and_jpeg():
    assert suffix_of(realise(Superresolution(), 1)) == ".png"
    assert suffix_of(realise(Superresolution(jpeg_quality=40), 1)) == ".jpg"
    assert suffix_of(realise(JpegArtifacts(compression_rounds=2), 1)) == ".jpg"
    assert suffix_of(realise(JpegArtifacts(enhance_blocks=True), 1)) == ".png"


@pytest.mark.parametrize("data", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0 cut off"])
def test_what_is_no_picture_is_refused(data):
    with pytest.raises(ValueError):
        decode_stored(data)


def test_a_missing_encoder_is_named_before_and_while_it_is_needed(monkeypatch):
    nested = Chain(steps=[{"step": "resize", "factor": 0.5, "steps": [{"step": "avif"}]}])
    assert why_impossible(nested) is None and why_impossible(JpegArtifacts()) is None
    monkeypatch.setattr(features, "check", lambda name: name != "avif")
    assert "'avif': the installed Pillow cannot write AVIF" in why_impossible(nested)
    assert why_impossible(Chain(preset="old-photo")) is None
    with pytest.raises(UserError, match="cannot write AVIF"):
        apply(photo(), realise(nested, 1), 1)


@pytest.mark.parametrize("degrade_at", ["target", "source"])
def test_a_picture_is_degraded_after_its_crop_or_at_full_size_before_it(degrade_at, tmp_path):
    demo = Path(__file__).parent.parent.parent / "datasets_demo"
    project = open_project(demo / "deblur", workspace=tmp_path, need_images=True)
    place = place_of(project, project.dataset("photos"))
    file = next((demo / "photos").glob("*.jpg"))
    whole = decode(file.read_bytes())
    box = Geometry(
        intermediary_width=128, intermediary_height=128, crop_left=8, crop_top=8, target_width=96, target_height=96
    )
    recipe = Superresolution(blur_radius=3, add_noise=False, degrade_at=degrade_at)
    picture = Picture(place, file.name, content_id(file.read_bytes()), "", box, recipe_text(recipe), 7,
                      json.dumps(realise(recipe, 7)))  # fmt: skip
    full = Image.fromarray(apply(np.asarray(whole), realise(recipe, 7), 7))
    expected = {"target": apply(frame(whole, box), realise(recipe, 7), 7), "source": frame(full, box)}
    assert np.array_equal(pixels_of(picture), expected[degrade_at])
    assert not np.array_equal(expected["target"], expected["source"])
