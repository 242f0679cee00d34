import json
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import unicodedata
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import datasets
import numpy as np
import pytest
import yaml
from PIL import Image

from families import open_project
from prep.layouts import LAYOUTS
from prep.materialise import materialise
from prep.names import names_of
from prep.pairs import pairs
from prep.pixels import pixels_of, reference_picture, target_picture
from prep.scan import scan
from schemas.console import log
from schemas.errors import UserError
from schemas.freshness import read_pairs
from schemas.lock import only_one

TEXT = {"caption_strategy": "textfile"}
EDITS = {"id": "edits", "instance_data_dir": "edits", "on_unpaired": "drop", "identical_references": "keep", **TEXT}
REFS = {
    "id": "refs",
    "dataset_type": "conditioning",
    "instance_data_dir": "refs",
    "conditioning_type": "reference_strict",
}
MORE = {**REFS, "id": "more", "instance_data_dir": "more"}
BLUR = {"type": "superresolution", "blur_radius": 2.0, "noise_level": 0.02}
JPEG = {"type": "jpeg_artifacts", "quality": 20}
PAIRED = ({**EDITS, "conditioning_data": "refs"}, REFS)
TWICE = ({**EDITS, "conditioning_data": ["refs", "more"]}, REFS, MORE)
MADE = ({**EDITS, "conditioning": [BLUR, JPEG]},)
PLAIN = (EDITS,)
KINDS = {"file": PAIRED, "two files": TWICE, "generated": MADE, "none": PLAIN}


def project(folder, *sets, **config):
    """Write a project's files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"resolution": 96, "aspect_bucket_alignment": 16, **config}))
    (folder / "multidatabackend.json").write_text(json.dumps(sets))
    return folder


def draw(path, width=96, height=64, seed=0):
    """Draw a small picture of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    down, across = np.mgrid[0:height, 0:width]
    pixels = np.stack([down * 2 + seed * 7, across * 2, (across // 8 + down // 8) % 2 * 200], 2).astype(np.uint8)
    Image.fromarray(pixels).save(path, "PNG")


def filled(folder, *sets, names=("a.png", "day/b.png"), sizes=((96, 64), (64, 96), (64, 64)), **config):
    """Make a project whose sets hold pictures of these names, and say what is asked for."""
    project(folder, *sets, **config)
    for number, name in enumerate(names):
        for shift, dataset in enumerate(sets):
            draw(folder / dataset["instance_data_dir"] / name, *sizes[number % len(sizes)], number + 50 * shift)
        caption = folder / "edits" / name.replace(name.rpartition("/")[2], Path(name).stem + ".txt")
        caption.write_text(f"make {name} — sharp, please")
    return folder


def rows_of(opened):
    return read_pairs(opened, opened.targets[0])


def written(folder, layout, into=None, *, workers=1):
    """Scan, pair and materialise; return (what was done, the project, its rows, the folder)."""
    scan(folder, workers=1)
    pairs(folder, workers=1)
    opened, into = open_project(folder), into or folder.parent / f"{folder.name}-{layout}"
    rows = rows_of(opened)
    return materialise(opened, opened.targets[0], rows, into, layout, workers), opened, rows, into


def tree(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def listed(folder):
    return sorted(name for name in tree(folder) if not name.startswith("."))


def marks(folder):
    """Return what would show that a file was written again; the lock is taken every time."""
    files = {path: path.stat() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
    return {path.relative_to(folder).as_posix(): (stat.st_ino, stat.st_mtime_ns) for path, stat in files.items()}


def shown(path):
    with Image.open(path) as image:
        assert (image.format, image.mode) == ("PNG", "RGB")
        return np.asarray(image)


def paths_of(layout, rows, name, row):
    """Return where a layout keeps the pictures of a row: the target, then the references."""
    from prep.layouts import Sample

    pictures = [row.geometry, *(one.geometry for one in row.references)]
    sample = Sample(name, "", tuple((one.target_width, one.target_height) for one in pictures))
    chosen = LAYOUTS[layout]
    return [chosen.target(sample), *(chosen.reference(sample, number) for number in range(len(row.references)))]


def pictures_of(opened, row):
    return [target_picture(opened, row), *(reference_picture(opened, row, one) for one in row.references)]


# What is where


TREES = {
    "pairline": ["config.json", "multidatabackend.json", "reference/80/a.png", "reference/80/day-b.png",
                 "target/80/a.png", "target/80/a.txt", "target/80/day-b.png", "target/80/day-b.txt"],
    "simpletuner": ["multidatabackend.json", "reference/80/a.png", "reference/80/day-b.png",
                    "target/80/a.png", "target/80/a.txt", "target/80/day-b.png", "target/80/day-b.txt"],
    "musubi": ["dataset.toml", "reference/a.png", "reference/day-b.png",
               "target/a.png", "target/a.txt", "target/day-b.png", "target/day-b.txt"],
    "ai-toolkit": ["datasets.yaml", "reference/a.png", "reference/day-b.png",
                   "target/a.png", "target/a.txt", "target/day-b.png", "target/day-b.txt"],
    "diffusers": ["train/metadata.jsonl", "train/reference/a.png", "train/reference/day-b.png",
                  "train/target/a.png", "train/target/day-b.png"],
}  # fmt: skip


def test_every_layout_is_tested_here():
    assert set(TREES) == set(LAYOUTS)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layouts_files_are_those_that_its_trainer_looks_for(layout, tmp_path):
    done, _, _, into = written(filled(tmp_path / "p", *PAIRED), layout)
    assert listed(into) == sorted(TREES[layout])
    assert (done.dataset_id, done.layout, done.folder) == ("edits", layout, str(into))
    assert (done.pairs, done.written, done.reused, done.removed, done.left_out) == (2, len(TREES[layout]), 0, 0, {})
    if LAYOUTS[layout].captions:
        captions = {path.name: path.read_bytes().decode() for path in into.rglob("*.txt")}
        assert captions == {"a.txt": "make a.png — sharp, please", "day-b.txt": "make day/b.png — sharp, please"}
    assert json.loads(json.dumps(asdict(done)))["layout"] == layout
    assert done.instructions in list(done.lines())[-1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_file_holds_the_pixels_that_the_model_sees(layout, kind, tmp_path):
    done, opened, rows, into = written(filled(tmp_path / "p", *KINDS[kind]), layout)
    references = {"file": 1, "two files": 2, "generated": 2, "none": 0}[kind]
    for row, name in zip(rows, names_of(rows), strict=True):
        paths = paths_of(layout, rows, name, row)
        assert len(paths) == 1 + references
        for path, picture in zip(paths, pictures_of(opened, row), strict=True):
            assert np.array_equal(shown(into / path), pixels_of(picture))
    assert done.pairs == 2
    assert len([name for name in listed(into) if name.endswith(".png")]) == 2 * (1 + references)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_strict_pair_has_one_size_and_lies_on_top_of_each_other(layout, tmp_path):
    crop = {"crop": True, "crop_aspect": "square", "crop_style": "random"}
    folder = filled(tmp_path / "p", {**PAIRED[0], **crop}, {**REFS, **crop}, sizes=((200, 90), (90, 200)))
    for name in ("a.png", "day/b.png"):
        shutil.copy(folder / "edits" / name, folder / "refs" / name)
    _, _, rows, into = written(folder, layout)
    assert any(row.geometry.crop_left or row.geometry.crop_top for row in rows)
    for row, name in zip(rows, names_of(rows), strict=True):
        target, reference = paths_of(layout, rows, name, row)
        assert np.array_equal(shown(into / target), shown(into / reference))


def test_several_references_are_numbered_as_each_trainer_wants(tmp_path):
    folder = filled(tmp_path / "p", *TWICE, names=("a.png",))
    kept = {layout: [name for name in listed(written(folder, layout)[3]) if "reference" in name] for layout in LAYOUTS}
    assert kept == {
        "pairline": ["reference-2/80/a.png", "reference/80/a.png"],
        "simpletuner": ["reference-2/80/a.png", "reference/80/a.png"],
        "musubi": ["reference/a_0.png", "reference/a_1.png"],
        "ai-toolkit": ["reference-2/a.png", "reference/a.png"],
        "diffusers": ["train/reference-2/a.png", "train/reference/a.png"],
    }


def test_of_several_prompts_the_one_drawn_by_seed_is_written(tmp_path):
    folder = filled(tmp_path / "p", *PAIRED, names=tuple(f"{number}.png" for number in range(12)))
    for path in (folder / "edits").glob("*.txt"):
        path.write_text("first\nsecond\nthird")
    _, _, _, into = written(folder, "musubi")
    drawn = [path.read_text() for path in sorted((into / "target").glob("*.txt"))]
    assert set(drawn) == {"first", "second", "third"}
    _, _, _, again = written(folder, "ai-toolkit")
    assert drawn == [path.read_text() for path in sorted((again / "target").glob("*.txt"))]


def test_a_caption_of_several_lines_stays_one(tmp_path):
    folder = filled(tmp_path / "p", *({**one, "disable_multiline_split": True} for one in PAIRED), names=("a.png",))
    (folder / "edits" / "a.txt").write_text("one\ntwo")
    _, _, rows, into = written(folder, "pairline")
    assert (into / "target" / "80" / "a.txt").read_text() == "one\ntwo"
    _, _, again, _ = written(into, "musubi")
    assert [row.prompts for row in again] == [row.prompts for row in rows] == [["one\ntwo"]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pairs_without_captions_have_empty_ones(layout, tmp_path):
    done, _, _, into = written(filled(tmp_path / "p", *({**one, "caption_strategy": None} for one in PAIRED)), layout)
    assert done.pairs == 2
    assert [path.read_text() for path in into.rglob("*.txt")] == ([""] * 2 if LAYOUTS[layout].captions else [])


def test_random_crops_are_files_of_their_own(tmp_path):
    crop = {"crop": True, "crop_style": "random", "crop_variants": 3}
    folder = filled(tmp_path / "p", {**MADE[0], **crop}, names=("a.png", "a-v1.png"), sizes=((300, 100),))
    done, opened, rows, into = written(folder, "musubi")
    assert done.pairs == len(rows) == 6
    names = {path.stem for path in (into / "target").glob("*.png")}
    assert names == {f"{stem}-v{variant}" for stem in ("a", "a-v1") for variant in range(3)}
    assert len({path.read_bytes() for path in (into / "target").glob("*.png")}) == 6
    for row, name in zip(rows, names_of(rows), strict=True):
        for path, picture in zip(paths_of("musubi", rows, name, row), pictures_of(opened, row), strict=True):
            assert np.array_equal(shown(into / path), pixels_of(picture))


# Names


HOSTILE = (
    *("a.jpg", "a.png", "day/a.png", "day-a.png", "A.png", "sub.dir/x.png", "with space.png", "trailing .png"),
    *("grün/ähre.png", "日本/猫.png", unicodedata.normalize("NFD", "é.png"), "😀.png", "Straße.png", "STRASSE.png"),
    *("l" * 200 + ".png", "l" * 199 + "x.png", "日" * 80 + ".png", "b.png", "b_1.png", "b_0001.png", "b_².png"),
    *("x[1].png", "x#%{id}.png", "it's.png", "-rf.png", "con.png", "nul.v2.png", "cat-test.png", "a.b.c.png"),
    *("q*?.png", 'quo"te<>|.png', "col:on.png", "back\\slash.png", "line\nbreak.png", "a-0123456789abcdef.png"),
)  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_name_finds_a_file_that_is_no_others(layout, tmp_path):
    folder = filled(tmp_path / "p", *PAIRED, names=HOSTILE, sizes=((64, 64),))
    for number, name in enumerate(HOSTILE):  # a.jpg and a.png share their text file
        draw(folder / "edits" / name, 64, 64, number)
        draw(folder / "refs" / name, 64, 64, number + 100)
    done, opened, rows, into = written(folder, layout)
    assert {row.target_path for row in rows} == set(HOSTILE)
    names = names_of(rows)
    assert done.pairs == len({unicodedata.normalize("NFC", name).casefold() for name in names}) == len(HOSTILE)
    for row, name in zip(rows, names, strict=True):
        assert (
            re.fullmatch(r'[^\x00-\x1f\x7f/\\:*?"<>| .][^\x00-\x1f\x7f/\\:*?"<>|]*', name) and len(name.encode()) < 140
        )
        for path, picture in zip(paths_of(layout, rows, name, row), pictures_of(opened, row), strict=True):
            assert np.array_equal(shown(into / path), pixels_of(picture))
    assert written(folder, layout)[0].written == 0


def test_a_plain_name_stays_as_it_is(tmp_path):
    folder = filled(tmp_path / "p", *PLAIN, names=("IMG_0001.png", "grün/my cat.v2.png"))
    assert names_of(written(folder, "musubi")[2]) == ["IMG_0001", "grün-my cat.v2"]


@pytest.mark.parametrize("path", [".hidden.png", "day/.hidden", "...", "12", " .png", "a/b.c/d", "x" * 400 + ".png"])
def test_a_name_does_not_start_with_a_dot_and_is_never_empty(path, tmp_path):
    [row] = written(filled(tmp_path / "p", *PLAIN, names=("a.png",)), "musubi")[2]
    [name] = names_of([replace(row, target_path=path)])
    assert re.match(r"[^. ].*[^. ]$", name) and len(name.encode()) < 140
    [again, other] = names_of([replace(row, target_path=path), replace(row, target_path="b.png")])
    assert (again, other) == (name, "b")


def test_a_name_does_not_depend_on_the_order_of_rows(tmp_path):
    rows = written(filled(tmp_path / "p", *PLAIN, names=("a.png", "A.png", "b.png")), "musubi")[2]
    assert names_of(rows[::-1]) == names_of(rows)[::-1]


# Again


@pytest.mark.parametrize("kind", ["two files", "generated"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_second_run_writes_nothing(layout, kind, tmp_path):
    folder = filled(tmp_path / "p", *KINDS[kind])
    first, _, _, into = written(folder, layout)
    before = marks(into)
    again = written(folder, layout)[0]
    assert marks(into) == before
    assert (again.pairs, again.written, again.reused, again.removed) == (2, 0, first.written, 0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_another_recipe_writes_the_references_alone(layout, tmp_path):
    folder = filled(tmp_path / "p", {**EDITS, "conditioning": [BLUR]})
    _, _, _, into = written(folder, layout)
    before = marks(into)
    project(folder, {**EDITS, "conditioning": [{**BLUR, "blur_radius": 5.0}]})
    done, opened, rows, _ = written(folder, layout)
    changed = {name for name, mark in marks(into).items() if mark != before[name]}
    assert changed == {".pairline.json"} | {name for name in TREES[layout] if "reference" in name}
    assert (done.written, done.removed) == (2, 0)
    for row, name in zip(rows, names_of(rows), strict=True):
        _, reference = paths_of(layout, rows, name, row)
        assert np.array_equal(shown(into / reference), pixels_of(pictures_of(opened, row)[1]))


def test_changed_files_are_told_where_the_trainer_caches_by_name(tmp_path, caplog):
    folder = filled(tmp_path / "p", {**EDITS, "conditioning": [BLUR]})
    with caplog.at_level(logging.WARNING, log.name):
        written(folder, "musubi")
        assert not caplog.messages
        project(folder, {**EDITS, "conditioning": [JPEG]})
        _, _, _, into = written(folder, "musubi")
    assert caplog.messages == [
        f"edits: files changed under names that musubi caches them by: if it ran, delete cache in {into}"
    ]


def test_another_caption_writes_that_caption_alone(tmp_path):
    folder = filled(tmp_path / "p", *PAIRED)
    _, _, _, into = written(folder, "simpletuner")
    before = marks(into)
    (folder / "edits" / "a.txt").write_text("make it pop")
    written(folder, "simpletuner")
    changed = {name for name, mark in marks(into).items() if mark != before[name]}
    assert changed == {".pairline.json", "target/80/a.txt"}
    assert (into / "target/80/a.txt").read_text() == "make it pop"


def test_a_picture_that_is_damaged_or_gone_is_made_again_and_an_edited_text_stays(tmp_path):
    folder = filled(tmp_path / "p", *PAIRED)
    _, _, _, into = written(folder, "ai-toolkit")
    whole = tree(into)
    (into / "target/a.png").write_bytes(whole["target/a.png"][:-9])
    (into / "reference/day-b.png").unlink()
    (into / "target/a.txt").write_text("mine")
    done = written(folder, "ai-toolkit")[0]
    assert done.written == 2
    assert tree(into) == {**whole, "target/a.txt": b"mine"}


def test_files_of_pairs_that_are_no_more_are_removed_and_no_others(tmp_path):
    folder = filled(tmp_path / "p", *PAIRED)
    _, _, _, into = written(folder, "diffusers")
    (into / "train/target/mine.png").write_bytes(b"mine")
    (into / "notes.md").write_text("mine")
    for name in ("edits/day", "refs/day"):
        shutil.rmtree(folder / name)
    done = written(folder, "diffusers")[0]
    assert (done.pairs, done.removed) == (1, 2)
    assert listed(into) == [
        *("notes.md", "train/metadata.jsonl", "train/reference/a.png", "train/target/a.png", "train/target/mine.png")
    ]


def test_when_no_pair_is_left_nothing_of_ours_is(tmp_path):
    folder = filled(tmp_path / "p", *PAIRED)
    _, opened, rows, into = written(folder, "pairline")
    done = materialise(opened, opened.targets[0], [replace(row, reject="gone") for row in rows], into, "pairline", 1)
    assert (done.pairs, done.removed, done.instructions) == (0, 8, "there is nothing to train on")
    assert listed(into) == [] and [path.name for path in into.iterdir() if path.is_dir()] == []


def test_a_killed_run_leaves_no_torn_file_and_the_next_one_ends_as_if_it_had_not_been(tmp_path):
    names = tuple(f"{number:02}.png" for number in range(20))
    folder = filled(tmp_path / "p", {**EDITS, "conditioning": [{**BLUR, "storage": "ondemand"}]}, names=names,
                    sizes=((500, 350),), resolution=384)  # fmt: skip
    _, opened, rows, whole = written(folder, "musubi")
    into = tmp_path / "killed"
    program = (
        "import sys; from pathlib import Path; from families import open_project; from prep.materialise import *\n"
        "from schemas.freshness import read_pairs\n"
        "project = open_project(sys.argv[1])\n"
        "target = project.targets[0]\n"
        "materialise(project, target, read_pairs(project, target), Path(sys.argv[2]), 'musubi', 1)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(folder), str(into)])
    while process.poll() is None and len(list(into.glob("*/*.png"))) < 5:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    finished = sorted(into.glob("*/*.png"))
    assert 5 <= len(finished) < 40
    for path in finished:
        assert path.read_bytes() == (whole / path.relative_to(into)).read_bytes()

    before = marks(into)
    done = materialise(opened, opened.targets[0], rows, into, "musubi", 1)

    assert (done.pairs, done.reused) == (20, len(finished))
    assert {name for name, mark in marks(into).items() if before.get(name, mark) != mark} == {".pairline.json"}
    expected, got = tree(whole), tree(into)
    moved = "dataset.toml"  # names its folder
    assert got.pop(moved).decode().replace(str(into), str(whole)).encode() == expected.pop(moved)
    assert not [name for name in got if ".tmp." in name]
    got.pop(".pairline.json"), expected.pop(".pairline.json")
    assert got == expected


def test_a_file_left_from_before_a_change_is_not_taken_for_the_new_one_when_killed(tmp_path):
    folder = filled(tmp_path / "p", {**EDITS, "conditioning": [BLUR]}, names=("a.png",))
    _, _, _, into = written(folder, "musubi")
    manifest = json.loads((into / ".pairline.json").read_text())
    old = (into / "reference/a.png").read_bytes()
    project(folder, {**EDITS, "conditioning": [JPEG]})
    written(folder, "musubi")
    new = (into / "reference/a.png").read_bytes()
    (into / "reference/a.png").write_bytes(old)  # as it was when the manifest of the first run was
    (into / ".pairline.json").write_text(json.dumps(manifest))
    written(folder, "musubi")
    assert (into / "reference/a.png").read_bytes() == new != old


@pytest.mark.parametrize("kind", ["file", "generated"])
def test_workers_do_not_show(kind, tmp_path):
    folder = filled(tmp_path / "p", *KINDS[kind])
    one = tree(written(folder, "diffusers", tmp_path / "one")[3])
    two = tree(written(folder, "diffusers", tmp_path / "two", workers=2)[3])
    assert one == two


# What is refused, and what is left out


@pytest.mark.parametrize(("name", "content"), [("photo.jpg", b"mine"), (".notes", b"mine")])
def test_a_folder_that_holds_something_else_is_refused_untouched(name, content, tmp_path):
    into = tmp_path / "mine"
    into.mkdir()
    (into / name).write_bytes(content)
    with pytest.raises(UserError, match="is not empty and not pairline's; name a new or an empty folder"):
        written(filled(tmp_path / "p", *PAIRED), "musubi", into)
    assert tree(into) == {name: content}


def test_an_empty_folder_and_a_new_one_below_others_are_taken(tmp_path):
    (tmp_path / "empty").mkdir()
    folder = filled(tmp_path / "p", *PAIRED)
    for into in (tmp_path / "empty", tmp_path / "new" / "deep"):
        assert written(folder, "musubi", into)[0].written == 7


def test_a_file_in_place_of_the_folder_is_told(tmp_path):
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(UserError, match="cannot be written"):
        written(filled(tmp_path / "p", *PAIRED), "musubi", tmp_path / "file")


def test_a_folder_belongs_to_one_dataset_and_one_layout(tmp_path):
    folder = filled(tmp_path / "p", *PAIRED)
    _, _, _, into = written(folder, "musubi")
    with pytest.raises(UserError, match="holds edits for musubi; name another folder, or delete it"):
        written(folder, "diffusers", into)
    other = filled(tmp_path / "q", {**PAIRED[0], "id": "others"}, REFS)
    with pytest.raises(UserError, match="holds edits for musubi"):
        written(other, "musubi", into)


def test_a_foreign_file_where_one_of_ours_would_be_is_told_and_stays(tmp_path):
    folder = filled(tmp_path / "p", *PAIRED)
    _, _, _, into = written(folder, "musubi")
    (into / "target/c.png").write_bytes(b"mine")
    filled(folder, *PAIRED, names=("a.png", "day/b.png", "c.png"))
    with pytest.raises(UserError, match=r"target/c\.png: is not pairline's; move it away, or write to another folder"):
        written(folder, "musubi")
    assert (into / "target/c.png").read_bytes() == b"mine"


@pytest.mark.parametrize(
    "said",
    [
        "{",
        "[]",
        '{"format": 1}',
        '{"format": 1, "dataset_id": "edits", "layout": "musubi", "files": {"../x": ["k", 1]}}',
    ],
)
def test_a_damaged_manifest_is_told(said, tmp_path):
    folder = filled(tmp_path / "p", *PAIRED)
    _, _, _, into = written(folder, "musubi")
    (into / ".pairline.json").write_text(said)
    with pytest.raises(UserError, match="delete the folder, or name another"):
        written(folder, "musubi")


def test_a_folder_among_the_images_is_refused(tmp_path):
    folder = filled(tmp_path / "p", *PAIRED)
    with pytest.raises(UserError, match="lies in the images of refs"):
        written(folder, "musubi", folder / "refs" / "out")
    assert not (folder / "refs" / "out").exists()


def test_one_run_at_a_time_writes_to_a_folder(tmp_path):
    folder = filled(tmp_path / "p", *PAIRED)
    _, _, _, into = written(folder, "musubi")
    with only_one(into, "another"), pytest.raises(UserError, match="is at work there"):
        written(folder, "musubi")


def test_an_unknown_layout_is_told_with_those_that_there_are(tmp_path):
    with pytest.raises(
        UserError, match="kohya: no such layout; there are pairline, simpletuner, musubi, ai-toolkit, diffusers"
    ):
        written(filled(tmp_path / "p", *PAIRED), "kohya")


def test_a_picture_that_cannot_be_made_costs_its_pair_and_is_made_when_it_can_be(tmp_path, caplog):
    folder = filled(tmp_path / "p", *PAIRED, names=("a.png", "b.png", "c.png"))
    scan(folder, workers=1), pairs(folder, workers=1)
    opened, into = open_project(folder), tmp_path / "out"
    rows = rows_of(opened)
    kept = (folder / "refs" / "a.png").read_bytes()
    draw(folder / "refs" / "a.png", seed=99)
    (folder / "edits" / "b.png").rename(tmp_path / "b.png")

    with caplog.at_level(logging.WARNING, log.name):
        done = materialise(opened, opened.targets[0], rows, into, "musubi", 1)

    assert (done.pairs, done.left_out) == (1, {"changed since prep scan": 1, "cannot be read": 1})
    assert (done.written, done.reused, done.removed) == (4, 0, 0)
    assert listed(into) == ["dataset.toml", "reference/c.png", "target/c.png", "target/c.txt"]
    assert caplog.messages == [
        "edits: a.png left out: changed since prep scan",
        "edits: b.png left out: cannot be read: No such file or directory",
    ]
    assert "  left out 1: cannot be read" in list(done.lines())

    (folder / "refs" / "a.png").write_bytes(kept)
    (tmp_path / "b.png").rename(folder / "edits" / "b.png")
    done = materialise(opened, opened.targets[0], rows, into, "musubi", 1)
    assert (done.pairs, done.left_out, done.reused) == (3, {}, 4)
    assert len(listed(into)) == 10


def test_a_side_that_pairlines_own_options_cannot_name_costs_the_pair(tmp_path):
    folder = filled(tmp_path / "p", *PAIRED, sizes=((96, 96), (1000, 100)))
    done, _, _, into = written(folder, "pairline")
    assert (done.pairs, done.left_out) == (1, {"too small": 1})
    assert not [name for name in listed(into) if "day-b" in name]


def test_rejected_pairs_are_not_written(tmp_path):
    folder = filled(tmp_path / "p", *PAIRED)
    (folder / "refs" / "a.png").unlink()
    done, _, _, into = written(folder, "musubi")
    assert (done.pairs, done.left_out) == (1, {})
    assert "target/a.png" not in listed(into)


# What the trainers make of it


SIZES = ((400, 225), (225, 400), (75, 75), (1000, 325), (175, 500), (333, 250), (161, 245))


@pytest.mark.parametrize(
    "options",
    [
        *(
            {"resolution": 128},
            {"resolution": 256, "resolution_type": "pixel"},
            {"resolution": 0.02, "resolution_type": "area"},
        ),
        {"resolution": 128, "crop": True, "crop_aspect": "closest", "crop_aspect_buckets": [0.5, 1.0, 1.8]},
    ],
)
@pytest.mark.parametrize("kind", ["reference_strict", "reference_loose", "generated"])
def test_pairline_reads_its_own_layout_and_takes_every_pixel(kind, options, tmp_path):
    names = tuple(f"{number}.png" for number in range(len(SIZES)))
    both = ({**EDITS, "conditioning": [BLUR]},) if kind == "generated" else (
        PAIRED[0], {**REFS, "conditioning_type": kind, **({"resolution": 160, "resolution_type": "pixel_area"} if kind == "reference_loose" else {})}
    )  # fmt: skip
    folder = filled(tmp_path / "p", {**both[0], "crop_style": "center", **options}, *both[1:], names=names, sizes=SIZES)
    _, opened, rows, into = written(folder, "pairline")

    scan(into, workers=1), pairs(into, workers=1)
    again = open_project(into)

    rows = {name: row for row, name in zip(rows, names_of(rows), strict=True)}
    copies = {Path(row.target_path).stem: row for target in again.targets for row in read_pairs(again, target)}
    assert list(sorted(copies)) == sorted(rows)
    for name, copy in copies.items():
        assert copy.reject is None and copy.prompts == rows[name].prompts
        for before, after in zip(pictures_of(opened, rows[name]), pictures_of(again, copy), strict=True):
            size = (before.geometry.target_width, before.geometry.target_height)
            assert after.geometry.as_key() == (*size, *size, 0, 0)
            assert np.array_equal(pixels_of(before), pixels_of(after))
    assert again.alignment == opened.alignment


def test_pairline_keeps_what_the_project_says_of_model_and_training(tmp_path):
    (tmp_path / "library.json").write_text('{"x": "y"}')
    (tmp_path / "p" / "checkpoint").mkdir(parents=True)
    folder = filled(
        tmp_path / "p", {**PAIRED[0], "repeats": 2, "probability": 0.5}, REFS, lora_rank=4, learning_rate=3e-4,
        model_flavour="dev", pretrained_model_name_or_path="checkpoint", user_prompt_library="../library.json", output_dir="runs",
    )  # fmt: skip
    _, _, _, into = written(folder, "pairline")
    again = open_project(into)
    assert (again.trainer.lora_rank, again.trainer.learning_rate, again.flavour) == (4, 3e-4, "dev")
    assert again.trainer.pretrained_model_name_or_path == str(folder / "checkpoint")
    assert again.prompt_library == {"x": "y"} and again.trainer.output_dir is None
    assert [(one.repeats, one.probability) for one in again.targets] == [(2, 0.5)]
    assert again.warnings == ()


def test_simpletuners_file_is_plain_json_in_which_every_picture_is_its_own_bucket(tmp_path):
    names = tuple(f"{number}.png" for number in range(len(SIZES)))
    folder = filled(tmp_path / "p", *({**one, "resolution": 512} for one in TWICE), names=names, sizes=SIZES,
                    aspect_bucket_alignment=64)  # fmt: skip
    done, _, _, into = written(folder, "simpletuner")
    entries = json.loads((into / "multidatabackend.json").read_text())
    assert done.altered == 0
    images = [entry for entry in entries if entry["dataset_type"] != "text_embeds"]
    [text] = [entry for entry in entries if entry["dataset_type"] == "text_embeds"]
    assert text["default"] is True and text["cache_dir"] == str(into / "cache" / "text")
    assert len({entry["id"] for entry in entries}) == len(entries)
    assert len({entry["cache_dir_vae"] for entry in images}) == len(images)
    by_id = {entry["id"]: entry for entry in entries}
    seen = 0
    for entry in images:
        folder_of = Path(entry["instance_data_dir"])
        assert folder_of.is_absolute() and folder_of.is_dir()
        assert (entry["crop"], entry["crop_style"], entry["resolution_type"]) == (False, "center", "pixel")
        for path in folder_of.glob("*.png"):
            height, width = shown(path).shape[:2]
            assert min(width, height) == entry["resolution"] and width % 64 == height % 64 == 0
            seen += 1
        if entry["dataset_type"] == "image":
            assert entry["caption_strategy"] == "textfile" and len(entry["conditioning_data"]) == 2
            for number, name in enumerate(entry["conditioning_data"]):
                reference = by_id[name]
                assert (reference["conditioning_type"], reference["caption_strategy"]) == ("reference_strict", None)
                assert sorted(path.name for path in Path(reference["instance_data_dir"]).iterdir()) == sorted(
                    path.name for path in folder_of.glob("*.png")
                ), number
    assert seen == 3 * len(SIZES)
    assert (
        '"aspect_bucket_alignment": 64' in done.instructions
        and "conditioning_multidataset_sampling" in done.instructions
    )


def test_sizes_that_simpletuner_would_cut_to_its_own_alignment_are_counted(tmp_path):
    done, _, _, _ = written(filled(tmp_path / "p", *PAIRED), "simpletuner")  # 112x80: FLUX.1 there is cut to 64
    assert done.altered == 2
    assert "  2 of them it would resize or crop again" in list(done.lines())


@pytest.mark.parametrize("sets", [PAIRED, TWICE, PLAIN])
def test_musubis_rules_leave_every_picture_as_it_is(sets, tmp_path):
    names = ("a.png", "a_1.png", "a_1_0.png", "b_0.png", "b/_0.png")
    done, _, _, into = written(
        filled(
            tmp_path / "p",
            *({**one, "repeats": 3} if one["id"] == "edits" else one for one in sets),
            names=names,
            sizes=SIZES,
            resolution=128,
        ),
        "musubi",
    )
    config = tomllib.loads((into / "dataset.toml").read_text())
    general, [dataset] = config["general"], config["datasets"]
    assert (general["enable_bucket"], general["bucket_no_upscale"], general["caption_extension"]) == (
        True,
        True,
        ".txt",
    )
    assert dataset["num_repeats"] == 4 and done.altered == 0
    area = general["resolution"][0] * general["resolution"][1]
    targets = sorted(Path(dataset["image_directory"]).glob("*.png"))
    assert len(targets) == len(names)
    controls = set(Path(dataset["control_directory"]).glob("*.png")) if len(sets) > 1 else set()
    assert ("control_directory" in dataset) == ("no_resize_control" in dataset) == (len(sets) > 1)
    for path in [*targets, *controls]:
        height, width = shown(path).shape[:2]
        assert width * height <= area and width % 16 == height % 16 == 0  # neither enlarged nor cut
    for path in sorted(targets, key=lambda one: len(one.name), reverse=True):  # longest first, each control once
        assert path.with_suffix(".txt").read_text()
        mine = {one for one in controls if one.stem == path.stem or (
            one.stem.startswith(path.stem + "_") and one.stem[len(path.stem) + 1 :].isdigit())}  # fmt: skip
        assert len(mine) == len(sets) - 1
        controls -= mine
    assert not controls


@pytest.mark.parametrize("sets", [PAIRED, TWICE, PLAIN])
def test_ai_toolkits_fragment_names_its_folders_and_a_resolution_that_holds_every_picture(sets, tmp_path):
    done, _, _, into = written(filled(tmp_path / "it's #1", *sets, sizes=SIZES, resolution=128), "ai-toolkit")
    [dataset] = yaml.safe_load((into / "datasets.yaml").read_text())["datasets"]
    folders = [str(into / name) for name in ("reference", "reference-2")][: len(sets) - 1]
    assert dataset["folder_path"] == str(into / "target") and dataset["caption_ext"] == "txt"
    assert dataset.get("control_path") == (None if not folders else folders[0] if len(folders) == 1 else folders)
    [edge] = dataset["resolution"]
    for folder in (dataset["folder_path"], *folders):
        for path in Path(folder).glob("*.png"):
            height, width = shown(path).shape[:2]
            assert width * height <= edge**2 and width % 16 == height % 16 == 0
    assert done.altered == 0 and dataset["num_repeats"] == 1


@pytest.mark.parametrize("named", [True, False], ids=["imagefolder", "path"])
def test_datasets_loads_the_diffusers_layout_with_equal_pixels(named, tmp_path):
    names = ("cat-test.png", "validation.png", "day/x[1] #.png", "日本.png")
    _, opened, rows, into = written(filled(tmp_path / "p", *TWICE, names=names), "diffusers")
    asked = {"path": "imagefolder", "data_dir": str(into)} if named else {"path": str(into)}

    loaded = datasets.load_dataset(**asked, cache_dir=str(tmp_path / "cache"))

    assert list(loaded) == ["train"]
    assert sorted(loaded["train"].column_names) == ["cond_image", "cond_image_2", "image", "text"]
    assert len(loaded["train"]) == len(rows) == 4
    by_prompt = {row.prompts[0]: row for row in rows}
    for line in loaded["train"]:
        pictures = pictures_of(opened, by_prompt.pop(line["text"]))
        for column, picture in zip(("image", "cond_image", "cond_image_2"), pictures, strict=True):
            assert np.array_equal(np.asarray(line[column].convert("RGB")), pixels_of(picture))


def test_the_diffusers_command_names_every_size_and_column(tmp_path):
    done, _, rows, into = written(filled(tmp_path / "p q", *PAIRED, sizes=SIZES[:2], resolution=128), "diffusers")
    words = shlex.split(done.instructions)
    given = dict(pairwise(words))
    assert given["--dataset_name"] == str(into)
    assert (given["--image_column"], given["--cond_image_column"], given["--caption_column"]) == (
        "image",
        "cond_image",
        "text",
    )
    assert set(given["--aspect_ratio_buckets"].split(";")) == {
        f"{row.geometry.target_height},{row.geometry.target_width}" for row in rows
    }
    assert done.altered == 0


def test_two_sizes_of_one_aspect_are_told_to_be_one_bucket_of_diffusers(tmp_path):
    options = {"resolution": 64, "max_num_samples": None}
    folder = filled(
        tmp_path / "p",
        {**PLAIN[0], **options, "resolution_type": "pixel"},
        names=("a.png", "b.png"),
        sizes=((64, 64), (128, 128)),
    )
    _, opened, rows, _ = written(folder, "diffusers")
    rows = [rows[0], replace(rows[1], geometry=replace(rows[1].geometry, target_width=32, target_height=32))]
    assert materialise(opened, opened.targets[0], rows, tmp_path / "two", "diffusers", 1).altered == 1


def test_a_path_with_quotes_and_umlauts_is_spelled_so_that_every_configuration_reads_it(tmp_path):
    folder = filled(tmp_path / "p", *PAIRED)
    into = tmp_path / 'it\'s "übel" \\ #1'
    for layout in ("simpletuner", "musubi", "ai-toolkit"):
        written(folder, layout, into / layout)
    [dataset] = tomllib.loads((into / "musubi" / "dataset.toml").read_text())["datasets"]
    assert dataset["image_directory"] == str(into / "musubi" / "target")
    entry = json.loads((into / "simpletuner" / "multidatabackend.json").read_text())[0]
    assert entry["instance_data_dir"] == str(into / "simpletuner" / "target" / "80")


def test_a_relative_folder_starts_here(tmp_path, monkeypatch):
    folder = filled(tmp_path / "p", *PAIRED)
    monkeypatch.chdir(tmp_path)
    done, *_ = written(folder, "musubi", Path("out"))
    assert done.folder == str(tmp_path / "out")
    assert os.fspath(tmp_path / "out" / "target") in (tmp_path / "out" / "dataset.toml").read_text()
