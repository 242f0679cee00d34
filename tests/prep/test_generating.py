"""Degraded pictures: the same however they are stored and by how many they are made, whole or not there."""

import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from families import open_project
from prep import generating
from prep.degrade import TooLarge, apply, encode
from prep.images import decode, frame
from prep.pairs import pairs
from prep.pixels import Refusal, pixels_of, reference_picture, target_picture
from prep.scan import scan
from schemas.rows import PairRow
from schemas.tables import read_table
from tests.prep.drawn import draw, paired, project, rows_of

TARGETS = {"id": "edits", "instance_data_dir": "edits", "crop_style": "center"}
KINDS = {
    "superresolution": {"type": "superresolution", "blur_radius": 3.0, "noise_level": 0.02},
    "jpeg_artifacts": {"type": "jpeg_artifacts", "quality_mode": "range", "quality_range": [10, 30], "compression_rounds": 2},
    "webp": {"type": "chain", "steps": [{"step": "blur", "sigma": [0.5, 2]}, {"step": "webp", "quality": [5, 40]}]},
    "realesrgan-like": {"type": "chain", "preset": "realesrgan-like"},
    "old-photo": {"type": "chain", "preset": "old-photo"},
}  # fmt: skip


def all_rows(folder):
    return read_table(folder / "work" / "pairs" / "edits.parquet", PairRow)


def made(folder):
    """Return the pixels of every generated reference of a project."""
    opened = open_project(folder)
    return [pixels_of(reference_picture(opened, row, one)) for row in all_rows(folder) for one in row.references]


@pytest.mark.parametrize("degrade_at", ["target", "source"])
@pytest.mark.parametrize("kind", KINDS)
def test_files_and_ondemand_give_the_same_bytes(kind, degrade_at, tmp_path):
    pixels = []
    for storage in ("ondemand", "files"):
        generator = {**KINDS[kind], "degrade_at": degrade_at, "storage": storage}
        folder = project(tmp_path / storage, {**TARGETS, "conditioning": generator})
        draw(folder / "edits" / "a.png", 150, 100)
        draw(folder / "edits" / "b.png", 90, 140, seed=9)
        paired(folder)
        pixels.append(made(folder))
        stored = [path for path in (folder / "work" / "references").rglob("*") if path.is_file()]
        assert len(stored) == (2 if storage == "files" else 0)
    assert all(np.array_equal(one, other) for one, other in zip(*pixels, strict=True))


@pytest.mark.parametrize(
    ("kind", "suffix"), [("superresolution", ".png"), ("jpeg_artifacts", ".jpg"), ("webp", ".webp")]
)
def test_what_ends_in_a_codec_is_kept_as_its_bitstream_and_all_else_lossless(kind, suffix, tmp_path):
    project(tmp_path, {**TARGETS, "conditioning": {**KINDS[kind], "storage": "files"}})
    draw(tmp_path / "edits" / "a.png")
    paired(tmp_path)
    [stored] = [path for path in (tmp_path / "work" / "references").rglob("*") if path.is_file()]
    assert stored.suffix == suffix
    with Image.open(stored) as image:
        assert np.array_equal(np.asarray(image.convert("RGB")), made(tmp_path)[0])


def test_one_two_and_eight_workers_make_the_same_tables_and_files(tmp_path):
    trees = []
    for workers in (1, 2, 8):
        generators = [{**one, "storage": "files"} for one in KINDS.values()]
        folder = project(tmp_path / str(workers), {**TARGETS, "conditioning": generators})
        for number in range(5):
            draw(folder / "edits" / f"{number}.png", 100 + number, 90, seed=number)
        scan(folder, workers=1)
        pairs(folder, workers=workers)
        files = [
            path for path in sorted((folder / "work").rglob("*")) if path.is_file() and "manifests" not in path.parts
        ]
        trees.append({str(path.relative_to(folder)): path.read_bytes() for path in files if path.name[0] != "."})
    assert trees[0] == trees[1] == trees[2]
    assert len(trees[0]) == 5 * len(KINDS) + 2  # the table and its report


def test_degrading_at_the_source_is_stronger_for_small_pictures_and_weaker_for_large_ones(tmp_path):
    blur = {"type": "superresolution", "blur_radius": 2.0, "add_noise": False}
    off = {}
    for place in ("target", "source"):
        folder = project(tmp_path / place, {**TARGETS, "conditioning": {**blur, "degrade_at": place}})
        draw(folder / "edits" / "large.png", 640, 480)
        draw(folder / "edits" / "small.png", 40, 30)
        _, rows = paired(folder)
        opened = open_project(folder)
        for name, row in rows.items():
            target, reference = (
                pixels_of(target_picture(opened, row)),
                pixels_of(reference_picture(opened, row, row.references[0])),
            )
            off[place, name] = np.abs(target.astype(float) - reference).mean()
    assert off["source", "large.png"] < off["target", "large.png"]
    assert off["source", "small.png"] > off["target", "small.png"]


def test_source_degradation_acts_on_the_upright_file_and_one_file_serves_all_crops(tmp_path):
    generator = {**KINDS["superresolution"], "degrade_at": "source", "storage": "files"}
    target = {**TARGETS, "crop": True, "crop_style": "random", "crop_variants": 3, "conditioning": generator}
    project(tmp_path, target)
    draw(tmp_path / "edits" / "a.png", 400, 100)
    summary, _ = paired(tmp_path)
    rows = all_rows(tmp_path)
    assert (summary.pairs, summary.generated) == (3, 1)
    whole = np.asarray(decode((tmp_path / "edits" / "a.png").read_bytes()))
    for row, pixels in zip(rows, made(tmp_path), strict=True):
        [reference] = row.references
        expected = frame(apply(whole, json.loads(reference.realised), reference.seed), row.geometry)
        assert np.array_equal(pixels, expected)


def test_variants_are_other_draws_of_the_same_target(tmp_path):
    generators = [{**KINDS["jpeg_artifacts"], "variants": 4}, {**KINDS["superresolution"], "variants": 2}]
    project(tmp_path, {**TARGETS, "conditioning": generators})
    draw(tmp_path / "edits" / "a.png")
    summary, _ = paired(tmp_path)
    rows = all_rows(tmp_path)
    assert summary.pairs == 4 and [(row.variant, row.variants) for row in rows] == [(number, 4) for number in range(4)]
    assert len({row.target_key("e") for row in rows}) == 1, "the target is cached once"
    assert len({row.sample_id for row in rows}) == 4
    first, second = zip(*([one.seed for one in row.references] for row in rows), strict=True)
    assert len(set(first)) == 4 and second[:2] == second[2:] and len(set(second)) == 2
    fewer = project(tmp_path, {**TARGETS, "conditioning": generators[0] | {"variants": 1}})
    _, again = paired(fewer)
    assert again["a.png"].references[0].seed == first[0], "more variants change none that were there"


def test_crops_and_degradations_vary_together(tmp_path):
    target = {**TARGETS, "crop": True, "crop_style": "random", "crop_variants": 2}
    project(tmp_path, {**target, "conditioning": {**KINDS["jpeg_artifacts"], "variants": 3}})
    draw(tmp_path / "edits" / "a.png", 400, 100)
    paired(tmp_path)
    rows = all_rows(tmp_path)
    assert len(rows) == 6 and len({row.target_key("e") for row in rows}) == 2
    assert len({(row.geometry.crop_left, row.references[0].seed) for row in rows}) == 6


def test_realised_numbers_of_every_sample_are_in_the_table(tmp_path):
    steps = [{"step": "blur", "sigma": [0.5, 2.0]}, {"step": "jpeg", "quality": [10, 30]}]
    project(tmp_path, {**TARGETS, "conditioning": {"type": "chain", "steps": steps}})
    for number in range(8):
        draw(tmp_path / "edits" / f"{number}.png", seed=number)
    _, rows = paired(tmp_path)
    drawn = [json.loads(row.references[0].realised) for row in rows.values()]
    assert all([one["step"] for one in each] == ["blur", "jpeg"] for each in drawn)
    assert all(0.5 <= each[0]["sigma"] <= 2 and 10 <= each[1]["quality"] <= 30 for each in drawn)
    assert len({each[0]["sigma"] for each in drawn}) == 8


def test_changed_parameters_make_new_files_and_unchanged_ones_are_reused(tmp_path):
    def run(**options):
        project(tmp_path, {**TARGETS, "conditioning": {**KINDS["superresolution"], "storage": "files", **options}})
        return paired(tmp_path)[0]

    project(tmp_path, TARGETS)
    for number in range(3):
        draw(tmp_path / "edits" / f"{number}.png", seed=number)
    assert (run().generated, run().reused) == (3, 3)
    assert (run(noise_level=0.05).generated, run(noise_level=0.05).reused) == (3, 3)
    back = run()
    assert (back.generated, back.reused) == (0, 3)


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("LA", ".png"), ("RGBA", ".png"), ("L", ".png"), ("P", ".gif"), ("1", ".png"), ("I;16", ".png"), ("CMYK", ".jpg")],
)
def test_sources_of_any_kind_are_degraded_as_they_are_seen(mode, suffix, tmp_path):
    project(tmp_path, {**TARGETS, "conditioning": [KINDS["superresolution"], KINDS["jpeg_artifacts"]]})
    image = Image.open(draw(tmp_path / "a.png", 120, 90))
    image = (
        Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
        if mode == "I;16"
        else image.convert(mode)
    )
    image.save(tmp_path / "edits" / f"a{suffix}")
    paired(tmp_path)
    [row] = all_rows(tmp_path)
    seen = pixels_of(target_picture(open_project(tmp_path), row))
    assert isinstance(seen, np.ndarray) and seen.std() > 5, "a picture, not a blank"
    for reference, pixels in zip(row.references, made(tmp_path), strict=True):
        assert np.array_equal(pixels, apply(seen, json.loads(reference.realised), reference.seed))


# Crashes


@pytest.fixture
def tasks(monkeypatch):
    """Make pool_tasks.py importable, here and in the workers."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    return importlib.import_module("pool_tasks")


def test_a_worker_that_dies_or_hangs_costs_one_image(tasks, monkeypatch, tmp_path):
    project(tmp_path, {**TARGETS, "conditioning": {**KINDS["superresolution"], "storage": "files"}})
    for name in ("a", "deadly", "m", "endless", "z"):
        draw(tmp_path / "edits" / f"{name}.png", seed=ord(name[0]))
    scan(tmp_path, workers=1)
    monkeypatch.setattr(generating, "store", tasks.store_or_die)
    monkeypatch.setattr(generating, "_LIMIT_S", 3.0)
    [summary] = pairs(tmp_path, workers=2).datasets
    rejects = {path: row.reject for path, row in rows_of(tmp_path).items() if row.reject is not None}
    assert rejects == {
        "deadly.png": "reference not made: its worker process died with exit status -9",
        "endless.png": "reference not made: it took longer than 3 s",
    }
    assert (summary.pairs, summary.generated) == (3, 3)
    monkeypatch.undo()
    [summary] = pairs(tmp_path, workers=1).datasets
    assert (summary.pairs, summary.generated, summary.reused) == (5, 2, 3)


LONGEST = [
    ({"step": "jpeg", "quality": 50, "subsampling": "4:2:0"}, 65_500),
    ({"step": "webp", "quality": 50}, 16_383),
    ({"step": "avif", "quality": 50}, 32_768),
    ({"step": "chromatic_aberration", "shift": 1.0}, 32_766),
]


@pytest.mark.parametrize(("step", "longest"), LONGEST)
def test_the_longest_side_of_a_step_is_what_its_format_takes(step, longest):
    inside = {"step": "resize", "factor": 1, "kernel": "area", "kernel_back": "area", "steps": [step]}
    for steps in ([step], [inside]):
        assert apply(np.zeros((2, longest, 3), np.uint8), steps, 1).shape == (2, longest, 3)
        for size in ((2, longest + 1), (longest + 1, 2)):
            told = f"{step['step']} takes sides of {longest} pixels at most, here {size[1]}x{size[0]}"
            with pytest.raises(TooLarge, match=told):
                apply(np.zeros((*size, 3), np.uint8), steps, 1)
            with pytest.raises(TooLarge, match=told):
                encode(np.zeros((*size, 3), np.uint8), steps, 1)


@pytest.mark.parametrize("storage", ["files", "ondemand"])
def test_a_picture_that_is_too_large_for_a_step_costs_itself_alone(storage, tmp_path):
    chain = {"type": "chain", "steps": [{"step": "webp"}], "degrade_at": "source", "storage": storage}
    project(tmp_path, {**TARGETS, "crop": True, "crop_aspect": "square", "conditioning": chain})
    draw(tmp_path / "edits" / "good.bmp", 16_383, 120)
    draw(tmp_path / "edits" / "large.bmp", 16_384, 120)
    _, rows = paired(tmp_path)
    reason = "not degradable: webp takes sides of 16383 pixels at most, here 16384x120"
    rejects = [rows[name].reject for name in ("good.bmp", "large.bmp")]
    assert rejects == [None, f"reference not made: {reason}" if storage == "files" else None]
    good, large = made(tmp_path)
    assert good.shape == (64, 64, 3)
    assert large == Refusal(reason, lasting=True)


def test_a_set_without_a_usable_image_is_an_empty_table(tmp_path):
    project(tmp_path, {**TARGETS, "conditioning": [KINDS["webp"], {**KINDS["jpeg_artifacts"], "captions": ["mend"]}]})
    (tmp_path / "edits" / "a.png").write_bytes(b"no picture")
    summary, rows = paired(tmp_path)
    assert (summary.targets, summary.pairs, rows) == (0, 0, {})


@pytest.mark.parametrize("damage", ["none", "empty", "half", "other"])
def test_a_stored_picture_that_is_not_whole_or_of_another_size_is_not_believed(damage, tmp_path):
    project(tmp_path, {**TARGETS, "conditioning": {**KINDS["superresolution"], "storage": "files"}})
    draw(tmp_path / "edits" / "a.png")
    _, rows = paired(tmp_path)
    picture = reference_picture(open_project(tmp_path), rows["a.png"], rows["a.png"].references[0])
    before, data = pixels_of(picture), picture.store.read_bytes()
    others = {"none": None, "empty": b"", "half": data[: len(data) // 2]}
    others["other"] = draw(tmp_path / "other.png", 32, 48).read_bytes()
    if others[damage] is None:
        picture.store.unlink()
    else:
        picture.store.write_bytes(others[damage])
    assert np.array_equal(pixels_of(picture), before)


def tree(folder):
    """Return every product below a workspace but locks: its bytes."""
    files = [path for path in (folder / "work").rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_killed_at_any_moment_and_run_again_it_ends_as_if_never_killed(tmp_path):
    folders = []
    for name in ("whole", "killed"):
        generators = [{**KINDS["superresolution"], "storage": "files"}, {**KINDS["jpeg_artifacts"], "storage": "files"}]
        folder = project(tmp_path / name, {**TARGETS, "resolution": 512, "conditioning": generators})
        for number in range(30):
            draw(folder / "edits" / f"{number:02d}.png", 700, 500, seed=number)
        for path in (folder / "edits").iterdir():  # the same tables from both
            os.utime(path, ns=(10**18, 10**18))
        scan(folder, workers=1)
        folders.append(folder)
    whole, killed = folders
    assert _command(whole).wait() == 0
    draws, marks = random.Random(5), {}
    for count in sorted(draws.sample(range(50), 5)):
        process = _command(killed)
        while len(_stored(killed)) <= count and process.poll() is None:
            time.sleep(0.002)
        time.sleep(draws.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.wait()
        _gone(process.pid)
        now = _stored(killed)
        assert {path: now[path] for path in marks} == marks, "what was whole was made again"
        assert marks.keys() <= now.keys() and len(now) > count
        marks = now
    assert _command(killed).wait() == 0
    assert {path: _stored(killed)[path] for path in marks} == marks
    assert tree(killed) == tree(whole)
    assert len([name for name in tree(whole) if "references" in name]) == 60


def _stored(folder):
    """Return the pictures that are whole, and what would change if they were made again."""
    files = [path for path in (folder / "work" / "references").rglob("*") if ".tmp." not in path.name]
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files if path.is_file()}


def _command(folder):
    code = "import sys; from prep.pairs import pairs; pairs(sys.argv[1], workers=2)"
    return subprocess.Popen([sys.executable, "-c", code, str(folder)], stderr=subprocess.DEVNULL)


def _gone(process):
    """Wait until the workers of a killed command, which end by themselves, are gone."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        told = subprocess.run(["pgrep", "-f", "multiprocess.*spawn_main"], capture_output=True, text=True, check=False)
        if not any(_parent(int(one)) in (1, process) for one in told.stdout.split()):
            return
        time.sleep(0.05)


def _parent(process):
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError):
        return 0
