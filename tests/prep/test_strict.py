"""Strict references take the very box of their targets: held by pictures whose pixels say where they are."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageChops

from families import open_project
from prep.pairs import pairs
from prep.pixels import pixels_of, reference_picture, target_picture
from prep.scan import scan
from schemas.rows import PairRow
from schemas.tables import read_table

PHOTOS = Path(__file__).parents[2] / "datasets_demo" / "photos"
REFERENCES = {"id": "refs", "instance_data_dir": "refs", "conditioning_type": "reference_strict"}
SQUARE = {"crop": True, "crop_aspect": "square"}


def coded(width, height):
    """Draw a picture whose red says how far right a pixel is, whose green how far down, and whose blue is a grid."""
    down, across = np.mgrid[0:height, 0:width]
    red, green = (across + 0.5) * 255 / width, (down + 0.5) * 255 / height
    grid = ((across // 7 + down // 5) % 2) * 255
    return Image.fromarray(np.stack([red, green, grid], 2).round().astype(np.uint8))


def turned(upright, orientation, path):
    """Save a picture as a camera would that was held so: its pixels turned, the EXIF tag saying how."""
    back = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # Image.Transpose that undoes the tag
    stored = upright if back is None else upright.transpose(Image.Transpose(back))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(path, exif=exif)


def project(folder, references=REFERENCES, **options):
    """Write a project of one set of targets, `edits`, and one of references, `refs`."""
    target = {"id": "edits", "instance_data_dir": "edits", "conditioning_data": "refs", **options}
    for name in ("edits", "refs"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"resolution": 64, "aspect_bucket_alignment": 16}))
    (folder / "multidatabackend.json").write_text(json.dumps([target, references]))
    return folder


def paired(folder, **options):
    """Scan and pair; return (project, rows)."""
    scan(folder, workers=1)
    pairs(folder, workers=1, **options)
    return open_project(folder), read_table(folder / "work" / "pairs" / "edits.parquet", PairRow)


def both(opened, row):
    """Return the pixels of a pair's target and of its first reference."""
    return pixels_of(target_picture(opened, row)), pixels_of(reference_picture(opened, row, row.references[0]))


@pytest.mark.parametrize("orientations", [(1, 1), (1, 6), (8, 1), (3, 5), (2, 7), (4, 4)])
@pytest.mark.parametrize(
    "crop", [{}, SQUARE, {"crop": True, "crop_aspect": "closest", "crop_aspect_buckets": [0.5, 1.5]}]
)
@pytest.mark.parametrize("style", ["random", "corner", "center", "face"])
def test_target_and_reference_agree_to_the_pixel(style, crop, orientations, tmp_path):
    project(tmp_path, **crop, crop_style=style, crop_variants=3 if style == "random" else None,
            identical_references="keep")  # fmt: skip
    for number, size in enumerate([(300, 111), (90, 333), (200, 190)]):
        for folder, orientation in zip(("edits", "refs"), orientations, strict=True):
            turned(coded(*size), orientation, tmp_path / folder / f"{number}.png")
    opened, rows = paired(tmp_path)
    assert len(rows) == (9 if style == "random" else 3)
    for row in rows:
        target, reference = both(opened, row)
        assert np.array_equal(target, reference)
        assert target.shape == (row.geometry.target_height, row.geometry.target_width, 3)
    if style == "random" and crop:
        assert len({(row.geometry.crop_top, row.geometry.crop_left) for row in rows}) > 3


@pytest.mark.parametrize("scale", [0.5, 2, 1.37])
@pytest.mark.parametrize("style", ["random", "corner", "center"])
def test_a_reference_of_another_size_shows_the_same_part(style, scale, tmp_path):
    project(tmp_path, **SQUARE, crop_style=style, alignment_check={"misaligned": "reject"})
    width, height = 640, 256
    coded(width, height).save(tmp_path / "edits" / "a.png")
    coded(round(width * scale), round(height * scale)).save(tmp_path / "refs" / "a.png")
    opened, [row] = paired(tmp_path)
    target, reference = (picture[2:-2, 2:-2].astype(float) for picture in both(opened, row))
    levels = (target - reference)[..., :2]  # a level of red is 640 / 255 pixels of the file, 0.63 of this picture
    assert abs(levels).max() <= 1, "what rounding to 8 bits leaves, twice"
    assert abs(levels.mean(axis=(0, 1))).max() <= 0.5, "of which half is a third of a pixel across, an eighth down"


@pytest.mark.parametrize(
    ("asked", "kept", "compared", "told"),
    [(None, 4, 4, True), ("report", 4, 4, True), ("reject", 3, 4, True), ("ignore", 4, 0, False)],
)
def test_references_beside_their_targets_are_told_and_left_out_if_that_is_asked(asked, kept, compared, told, tmp_path):
    project(tmp_path, resolution=256, crop_style="center")
    for number, photo in enumerate(sorted(PHOTOS.glob("*.jpg"))[:4]):
        image = Image.open(photo).convert("RGB").resize((320, 240))
        image.save(tmp_path / "edits" / f"{number}.png")
        reference = ImageChops.offset(image, 6, 0) if number == 2 else image
        reference.convert("L").save(tmp_path / "refs" / f"{number}.png")
    scan(tmp_path, workers=1)
    [summary] = pairs(tmp_path, workers=1, misaligned=asked).datasets
    assert (summary.pairs, summary.compared, summary.misaligned) == (kept, compared, int(told))
    assert [one.startswith("2.png: shifted ") for one in summary.worst] == [True] * told
    rows = read_table(tmp_path / "work" / "pairs" / "edits.parquet", PairRow)
    rejects = [row.target_path for row in rows if (row.reject or "").startswith("misaligned: shifted ")]
    assert rejects == (["2.png"] if asked == "reject" else [])
    said = (tmp_path / "work" / "pairs" / "edits.report.csv").read_text().splitlines()[1:]
    assert [line.startswith('misaligned,2.png,refs/2.png,"shifted ') for line in said] == [True] * told
    [again] = pairs(tmp_path, workers=1, misaligned=asked).datasets
    assert again.misaligned == int(told) and not again.written
    assert again.compared == 0, "a row that is rejected keeps its numbers"
    [row] = [row for row in rows if row.target_path == "2.png"]
    assert row.references[0].path == "2.png" and (row.references[0].shift_x is not None) == (asked != "ignore")


# What SimpleTuner does with each of these stands beside it.
UNLUCKY = {
    "one reference is missing": "trains without",
    "the extension differs": "no reference is found at all",
    "extra references": "ignored",
    "another aspect": "squashed",
    "nested folders": "not found",
    "corrupt reference": "trains without",
    "stems twice in one folder": "share one latent",
}


@pytest.mark.parametrize("case", UNLUCKY)
def test_what_goes_wrong_in_silence_elsewhere_is_said_or_right_here(case, tmp_path):
    project(tmp_path, on_unpaired="drop")
    names = {"nested folders": ["day/a.png", "night/a.png"], "stems twice in one folder": ["a.png", "a.jpg"]}
    for name in names.get(case, ["a.png", "b.png"]):
        for folder, seed in (("edits", 0), ("refs", 1)):
            path = tmp_path / folder / name
            path.parent.mkdir(exist_ok=True)
            image = coded(96, 64 + len(name))
            image.paste((200 * seed, 0, 0), (0, 0, 16, 16))  # not the very bytes of its target
            image.save(path)
    last = tmp_path / "refs" / "b.png"
    if case == "one reference is missing":
        last.unlink()
    elif case == "the extension differs":
        last.rename(last.with_suffix(".jpg"))
    elif case == "extra references":
        coded(96, 64).save(tmp_path / "refs" / "c.png")
    elif case == "another aspect":
        coded(96, 100).save(last)
    elif case == "corrupt reference":
        last.write_bytes(last.read_bytes()[:200])
    _, rows = paired(tmp_path)
    expected = {
        "one reference is missing": "no reference: refs has no b.png",
        "the extension differs": "no reference: refs has no b.png, but b.jpg; ignore_extension pairs them",
        "another aspect": "aspect differs: refs/b.png is 96x100, its target 96x69; reference_strict needs the same aspect",
    }
    if case in ("nested folders", "stems twice in one folder", "extra references"):
        assert [row.reject for row in rows] == [None, None]
        assert len({row.references[0].key("e") for row in rows}) == 2
        assert all(row.references[0].path == row.target_path for row in rows)
    elif case == "corrupt reference":
        assert rows[1].reject.startswith("reference rejected: refs/b.png: truncated")
    else:
        assert rows[1].reject == expected[case]
    assert rows[0].reject is None
    said = (tmp_path / "work" / "pairs" / "edits.report.csv").read_text().splitlines()[1:]
    lines = {"nested folders": 0, "stems twice in one folder": 0, "the extension differs": 2}
    assert len(said) == lines.get(case, 1), said


@pytest.mark.parametrize("misaligned", ["report", "reject"])
def test_what_was_compared_is_not_compared_again_whether_it_was_rejected_or_not(misaligned, tmp_path):
    project(tmp_path, crop_style="center", resolution=256, alignment_check={"misaligned": misaligned})
    noise = np.random.default_rng(1).integers(0, 256, (5, 40, 40, 3), np.uint8)
    for number, small in enumerate(noise):
        picture = Image.fromarray(small).resize((320, 320), Image.Resampling.BICUBIC)
        picture.crop((20, 20, 276, 276)).save(tmp_path / "edits" / f"{number}.png")
        left = 20 + 6 * (number < 2)
        picture.crop((left, 19, left + 256, 275)).save(tmp_path / "refs" / f"{number}.png")
    paired(tmp_path)
    report = tmp_path / "work" / "pairs" / "edits.report.csv"
    before, mark = report.read_bytes(), report.stat().st_ino
    assert before.count(b"misaligned,") == 5
    [again] = pairs(tmp_path, workers=1).datasets
    assert (again.compared, again.misaligned, again.written) == (0, 5, False)
    assert again.rejected == ({"misaligned": 5} if misaligned == "reject" else {})
    assert (report.read_bytes(), report.stat().st_ino) == (before, mark)
