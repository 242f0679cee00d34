import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from families import open_project
from prep.pairs import pairs
from prep.scan import scan
from prep.sheet import _font, _labels, _Note, _notes, _wrapped, contact_sheet
from schemas.rows import PairRow, as_columns
from schemas.tables import read_table

EDITS = {"id": "edits", "instance_data_dir": "edits", "on_unpaired": "drop", "identical_references": "keep"}
REFERENCES = {"dataset_type": "conditioning", "conditioning_type": "reference_strict"}
JPEG = {"type": "jpeg_artifacts", "quality": 5}
SALMON = (250, 128, 114)


def project(folder, *datasets):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"resolution": 64, "aspect_bucket_alignment": 16}))
    (folder / "multidatabackend.json").write_text(json.dumps(datasets))
    return folder


def draw(path, width=96, height=64, shift=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    down, across = np.mgrid[0:height, shift : width + shift]
    pixels = np.stack([down * 2, across * 2, (across // 8 + down // 8) % 2 * 200], 2).astype(np.uint8)
    Image.fromarray(pixels).save(path)


def references(*names, **options):
    return [{**REFERENCES, "id": name, "instance_data_dir": name, **options} for name in names]


def sheet_of(folder, count=9):
    """Scan, pair, draw; return the sheet's pixels."""
    scan(folder, workers=1)
    [path] = pairs(folder, workers=1, preview=count).previews
    with Image.open(path) as sheet:
        assert sheet.format == "PNG"
        return np.asarray(sheet.convert("RGB"))


def rows_of(folder):
    return read_table(folder / "work" / "pairs" / "edits.parquet", PairRow)


def texts(folder, row):
    dataset = open_project(folder).dataset("edits")
    return [note.text for note in _notes(dataset, row)]


def dark(pixels):
    """Tell how much of a sheet is the black that only a difference has here."""
    return float((pixels.max(axis=2) < 3).mean())


def test_a_reference_on_its_target_has_a_black_difference_and_one_of_another_size_none(tmp_path):
    shown = {}
    for kind in ("reference_strict", "reference_loose"):
        folder = project(
            tmp_path / kind, {**EDITS, "conditioning_data": "refs"}, *references("refs", conditioning_type=kind)
        )
        draw(folder / "edits" / "a.png")
        if kind == "reference_strict":
            shutil.copytree(folder / "edits", folder / "refs")
        else:
            draw(folder / "refs" / "a.png", 64, 96)
        shown[kind] = sheet_of(folder)
    assert dark(shown["reference_strict"]) > 0.15 > 0.01 > dark(shown["reference_loose"])


def test_three_references_make_a_pair_higher_not_wider(tmp_path):
    sizes = {}
    for names in (("r1",), ("r1", "r2", "r3")):
        folder = project(tmp_path / str(len(names)), {**EDITS, "conditioning_data": list(names)}, *references(*names))
        for name in ("edits", *names):
            draw(folder / name / "a.png")
        sizes[len(names)] = sheet_of(folder).shape[:2]
    assert sizes[3][0] > sizes[1][0] and sizes[3][1] <= sizes[1][1]


@pytest.mark.parametrize("size", [(1600, 40), (40, 1600), (8, 8)])
def test_no_shape_of_picture_makes_a_pair_wider_than_a_screen(size, tmp_path):
    folder = project(tmp_path, {**EDITS, "conditioning": JPEG})
    for number in range(3):
        draw(folder / "edits" / f"{number}.png", *size)
    height, width = sheet_of(folder).shape[:2]
    assert width <= 1960 and height <= 1200


def test_below_a_pair_stand_its_path_prompt_steps_and_alignment(tmp_path):
    target = {**EDITS, "conditioning_data": "refs", "conditioning": {**JPEG, "variants": 2}}
    folder = project(tmp_path, target, *references("refs", caption_strategy=None))
    draw(folder / "edits" / "red barn.png", 256, 256)
    draw(folder / "refs" / "red barn.png", 256, 256)
    sheet_of(folder)
    row = rows_of(folder)[0]
    near = {"shift_x": 0.1, "shift_y": 0.0, "scale": 1.0, "similarity": 0.9, "confidence": 1.0}
    row = replace(row, references=[replace(row.references[0], **near), row.references[1]])
    path, prompt, lying, made = texts(folder, row)
    assert path == "red barn.png  64x64  variant 1 of 2" and prompt == "red barn"
    assert lying.startswith("reference 1: lies on its target (shift +0.10, +0.00 px, scale ×1.0000, similarity 0.90")
    assert made.startswith("reference 2: ") and "jpeg" in made
    changed = replace(row, prompts=["a", "b", "c"], prompt="b", references=[])
    assert texts(folder, changed) == [path, "b  (+2 other prompts)"]
    assert texts(folder, replace(row, prompts=[], prompt="", references=[]))[1] == "no prompt"
    six = texts(folder, replace(row, references=row.references * 3))
    assert six[-1] == "and 2 more references" and sum("lies on" in text for text in six) == 2


def test_a_misaligned_reference_is_told_in_another_colour(tmp_path):
    folder = project(tmp_path, {**EDITS, "conditioning_data": "refs"}, *references("refs"))
    draw(folder / "edits" / "a.png")
    draw(folder / "refs" / "a.png")
    sheet_of(folder)
    [row] = rows_of(folder)
    far = replace(row.references[0], shift_x=5.0, shift_y=0.0, scale=1.0, similarity=0.5, confidence=1.0)
    notes = list(_notes(open_project(folder).dataset("edits"), replace(row, references=[far])))
    assert [note.text for note in notes if note.colour != notes[0].colour][-1].startswith(
        "reference: shifted 5.0 px right"
    )


HOSTILE = [
    "<b>a</b>",
    "line\nbreak\ttab",
    "\u202eevil",
    "שלום עולם",
    "x" * 5000,
    "word " * 2000,
    "\ud800",
    "",
    "a\x00b",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_any_text_is_broken_into_lines_that_fit(text):
    font = _font()
    lines = _wrapped(_Note(text, most=3), 200, font)
    assert len(lines) <= 3 and all(font.getlength(line) <= 200 for line in lines)
    assert not any(char in line for line in lines for char in "\n\t\u202e\x00")
    if len(text) > 1000:
        assert lines[-1].endswith("…")


@pytest.mark.parametrize("text", HOSTILE)
def test_a_sheet_is_drawn_whatever_prompts_names_and_steps_say(text, tmp_path):
    folder = project(tmp_path, {**EDITS, "conditioning": JPEG})
    draw(folder / "edits" / "a.png")
    sheet_of(folder)
    [row] = rows_of(folder)
    encodable = text.encode(errors="replace").decode()
    odd = replace(row, prompt=encodable, prompts=[encodable] * 3, target_path=encodable)
    made = contact_sheet(open_project(folder), "edits", as_columns([odd], PairRow), 1)
    with Image.open(made) as sheet:
        assert sheet.width <= 1960


def test_a_picture_that_cannot_be_made_is_a_blank_that_says_why(tmp_path):
    folder = project(tmp_path, {**EDITS, "conditioning_data": "refs"}, *references("refs"))
    for name in ("edits", "refs"):
        draw(folder / name / "a.png")
    before = sheet_of(folder)
    assert not (before == SALMON).all(axis=2).any()
    draw(folder / "refs" / "a.png", shift=40)
    [path] = pairs(folder, workers=1, preview=1).previews
    with Image.open(path) as sheet:
        blank = (np.asarray(sheet) == SALMON).all(axis=2)
    assert 100 * 100 < blank.sum() < 224 * 224  # the rest is its reason


def test_pairs_without_references_are_their_targets(tmp_path):
    folder = project(tmp_path, EDITS)
    draw(folder / "edits" / "a.png")
    assert sheet_of(folder).shape[1] < 600


def test_the_same_table_makes_the_same_sheet(tmp_path):
    folder = project(tmp_path, {**EDITS, "conditioning": JPEG})
    for number in range(3):
        draw(folder / "edits" / f"{number}.png", shift=number)
    sheet_of(folder)
    path = folder / "work" / "pairs" / "edits.preview.png"
    first = path.read_bytes()
    path.unlink()
    sheet_of(folder)
    assert Path(path).read_bytes() == first


def test_several_references_are_numbered_and_one_is_not():
    assert (_labels(1), _labels(2)) == (["reference"], ["reference 1", "reference 2"])
