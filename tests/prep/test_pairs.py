import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from families import open_project
from prep.degrade import degrade
from prep.images import frame
from prep.pairs import pairs
from prep.pixels import Refusal, pixels_of, reference_picture, store, target_picture
from prep.scan import scan
from schemas.console import log
from schemas.errors import UserError
from schemas.freshness import read_pairs
from schemas.keys import file_id, latent_key
from schemas.recipes import JpegArtifacts, Superresolution, recipe_text
from schemas.rows import PairRow
from schemas.tables import read_provenance, read_table
from tests.prep.drawn import BLUR, EDITS, JPEG, PAIRED, REFS, draw, paired, products, project, rows_of

# Matching


def test_targets_and_references_match_by_their_path_below_their_folders(tmp_path):
    project(tmp_path, *PAIRED)
    for name in ("a.png", "day/a.png", "day/deep/b.png"):
        draw(tmp_path / "edits" / name)
        draw(tmp_path / "refs" / name, seed=len(name))

    summary, rows = paired(tmp_path)

    assert (summary.targets, summary.pairs, summary.rejected, summary.unused_references) == (3, 3, {}, 0)
    assert list(rows) == ["a.png", "day/a.png", "day/deep/b.png"]
    for path, row in rows.items():
        [reference] = row.references
        assert (reference.dataset_id, reference.path, reference.recipe, reference.seed) == ("refs", path, None, None)
        assert reference.image_id == file_id(tmp_path / "refs" / path)
        assert row.target_image_id == file_id(tmp_path / "edits" / path)
        assert (row.dataset_id, row.bucket, row.repeats, row.reject) == ("edits", row.geometry.bucket, 0, None)
    assert len({row.sample_id for row in rows.values()}) == 3


def test_a_target_without_its_reference_is_rejected_with_the_path_that_is_missing(tmp_path):
    project(tmp_path, *PAIRED)
    draw(tmp_path / "edits" / "a.png")
    draw(tmp_path / "edits" / "day" / "b.png")
    draw(tmp_path / "refs" / "a.png")
    draw(tmp_path / "refs" / "b.png")  # not below day/
    summary, rows = paired(tmp_path)
    assert rows["day/b.png"].reject == "no reference: refs has no day/b.png"
    assert rows["day/b.png"].references == []
    assert rows["a.png"].reject is None
    assert (summary.targets, summary.pairs, summary.rejected) == (2, 1, {"no reference": 1})


def test_reference_files_that_no_target_asks_for_are_counted(tmp_path):
    project(tmp_path, *PAIRED)
    draw(tmp_path / "edits" / "a.png")
    for name in ("a.png", "b.png", "c.png"):
        draw(tmp_path / "refs" / name)
    summary, _ = paired(tmp_path)
    assert summary.unused_references == 2
    assert "  2 reference files without a target" in list(pairs(tmp_path, workers=1).lines())


def test_a_target_that_the_scan_rejected_makes_no_pair(tmp_path):
    project(tmp_path, *PAIRED)
    for name in ("edits", "refs"):
        draw(tmp_path / name / "a.png")
        (tmp_path / name / "broken.png").write_bytes(b"broken")
    summary, rows = paired(tmp_path)
    assert list(rows) == ["a.png"] and summary.targets == 1


def test_a_reference_that_cannot_be_read_rejects_its_pair(tmp_path):
    project(tmp_path, *PAIRED)
    draw(tmp_path / "edits" / "a.png")
    (tmp_path / "refs" / "a.png").write_bytes(b"broken")
    summary, rows = paired(tmp_path)
    assert rows["a.png"].reject == "reference rejected: refs/a.png: unreadable: no known image format"
    assert summary.rejected == {"reference rejected": 1}


# Strict and loose


def test_a_strict_reference_takes_its_targets_geometry_whatever_its_own_would_be(tmp_path):
    crop = {"crop": True, "crop_aspect": "square", "crop_style": "random"}
    targets, references = {**PAIRED[0], **crop}, {**REFS, "resolution": 128}
    project(tmp_path, targets, references)
    draw(tmp_path / "edits" / "a.png", 160, 80)
    draw(tmp_path / "refs" / "a.png", 320, 160)
    _, rows = paired(tmp_path)
    [reference] = rows["a.png"].references
    assert (reference.geometry, reference.bucket) == (rows["a.png"].geometry, "64x64")


@pytest.mark.parametrize(
    ("size", "kept"), [((302, 200), True), ((304, 200), True), ((309, 200), False), ((200, 333), False)]
)
def test_a_strict_reference_must_have_its_targets_aspect_but_for_rounding(size, kept, tmp_path):
    project(tmp_path, *PAIRED)
    draw(tmp_path / "edits" / "a.png", 300, 200)
    draw(tmp_path / "refs" / "a.png", *size)
    _, rows = paired(tmp_path)
    reason = (
        f"aspect differs: refs/a.png is {size[0]}x{size[1]}, its target 300x200; reference_strict needs the same aspect"
    )
    assert rows["a.png"].reject == (None if kept else reason)


def test_a_loose_reference_keeps_its_own_geometry(tmp_path):
    project(tmp_path, PAIRED[0], {**REFS, "resolution": 96, "conditioning_type": "reference_loose"})
    draw(tmp_path / "edits" / "a.png", 96, 64)
    draw(tmp_path / "refs" / "a.png", 100, 200)
    _, rows = paired(tmp_path)
    [reference] = rows["a.png"].references
    assert rows["a.png"].reject is None and rows["a.png"].bucket == "80x48"
    assert (reference.bucket, reference.geometry.bucket) == ("64x128", "64x128")


def test_a_reference_that_fits_no_bucket_of_its_own_is_refused_loose_and_accepted_strict(tmp_path):
    rejects = {}
    for kind in ("reference_loose", "reference_strict"):
        folder = project(tmp_path / kind, PAIRED[0], {**REFS, "conditioning_type": kind})
        draw(folder / "edits" / "a.png", 4, 792)  # an aspect that rounds to 0.01
        draw(folder / "refs" / "a.png", 4, 803)  # and one that rounds to 0
        _, rows = paired(folder)
        rejects[kind] = rows["a.png"].reject
    assert rejects["reference_loose"].startswith("reference rejected: refs/a.png: too narrow: 4x803")
    assert rejects["reference_strict"] is None


# Several references, generators


def test_several_reference_sets_come_in_order_and_all_must_be_there(tmp_path):
    more = {**REFS, "id": "more", "instance_data_dir": "more"}
    project(tmp_path, {**EDITS, "conditioning_data": ["more", "refs"]}, REFS, more)
    for name in ("a.png", "b.png"):
        draw(tmp_path / "edits" / name)
        draw(tmp_path / "refs" / name)
    draw(tmp_path / "more" / "a.png")
    summary, rows = paired(tmp_path)
    assert [reference.dataset_id for reference in rows["a.png"].references] == ["more", "refs"]
    assert rows["b.png"].reject == "no reference: more has no b.png"
    assert [reference.dataset_id for reference in rows["b.png"].references] == ["refs"]
    assert summary.pairs == 1


def test_a_generated_reference_is_its_target_degraded_by_recipe_and_seed(tmp_path):
    project(tmp_path, {**EDITS, "conditioning": [BLUR, JPEG]})
    draw(tmp_path / "edits" / "a.png")
    draw(tmp_path / "edits" / "b.png", seed=9)

    summary, rows = paired(tmp_path)

    assert (summary.pairs, summary.generated, summary.reused) == (2, 4, 0)
    blurred, compressed = rows["a.png"].references
    assert [one.dataset_id for one in (blurred, compressed)] == [
        "edits_conditioning_superresolution",
        "edits_conditioning_jpeg_artifacts",
    ]
    assert blurred.recipe == recipe_text(Superresolution(blur_radius=3, noise_level=0.02))
    assert compressed.recipe == recipe_text(JpegArtifacts(quality_mode="range", quality_range=(10, 30)))
    for row in rows.values():
        for one in row.references:
            assert (one.image_id, one.path, one.geometry) == (row.target_image_id, row.target_path, row.geometry)
    assert len({one.seed for row in rows.values() for one in row.references}) == 4


def test_seeds_depend_on_prep_seed_image_and_recipe_alone(tmp_path):
    def seeds(*generators, name="a.png", **config):
        folder = project(tmp_path, {**EDITS, "conditioning": list(generators)}, **config)
        for path in (folder / "edits").iterdir():
            path.unlink()
        draw(folder / "edits" / name)
        _, rows = paired(folder)
        return [reference.seed for reference in rows[name].references]

    [first] = seeds(BLUR)
    assert seeds(BLUR, name="b.png", seed=7, resolution=128) == [first]
    assert seeds(JPEG, BLUR)[1] == first
    assert seeds({**BLUR, "storage": "ondemand", "captions": ["sharpen"]}) == [first]
    assert seeds({**BLUR, "noise_level": 0.03}) != [first] != seeds(BLUR, prep_seed=7)


def test_stored_references_are_lossless_pictures_of_what_the_recipe_gives(tmp_path):
    project(tmp_path, {**EDITS, "conditioning": BLUR})
    draw(tmp_path / "edits" / "a.png")
    _, rows = paired(tmp_path)
    opened, row = open_project(tmp_path), rows["a.png"]
    [reference] = row.references
    picture = reference_picture(opened, row, reference)
    sharp = frame(Image.open(tmp_path / "edits" / "a.png"), row.geometry)
    expected = degrade(sharp, Superresolution(blur_radius=3, noise_level=0.02), reference.seed)
    with Image.open(picture.stored) as stored:
        assert stored.format == "PNG" and np.array_equal(np.asarray(stored), expected)
    assert np.array_equal(pixels_of(picture), expected)
    assert np.array_equal(pixels_of(target_picture(opened, row)), sharp)
    assert not np.array_equal(expected, sharp)


def test_pictures_are_made_once_and_used_again(tmp_path):
    project(tmp_path, {**EDITS, "conditioning": BLUR})
    draw(tmp_path / "edits" / "a.png")
    first, _ = paired(tmp_path)
    before = products(tmp_path)
    second, _ = paired(tmp_path)
    assert (first.generated, first.reused) == (1, 0)
    assert (second.generated, second.reused, second.written) == (0, 1, False)
    assert products(tmp_path) == before


def test_one_image_under_two_names_makes_one_picture(tmp_path):
    project(tmp_path, {**EDITS, "crop_style": "center", "conditioning": BLUR})
    draw(tmp_path / "edits" / "a.png")
    draw(tmp_path / "edits" / "same.png")
    first, rows = paired(tmp_path)
    second, _ = paired(tmp_path)
    opened = open_project(tmp_path)
    assert len({reference_picture(opened, row, row.references[0]).stored for row in rows.values()}) == 1
    assert (first.generated, first.reused) == (1, 0)
    assert (second.generated, second.reused) == (0, 1)


def test_a_lost_picture_is_made_again_and_equal(tmp_path):
    project(tmp_path, {**EDITS, "conditioning": BLUR})
    for number in range(3):
        draw(tmp_path / "edits" / f"{number}.png", seed=number)
    _, rows = paired(tmp_path)
    opened = open_project(tmp_path)
    stored = reference_picture(opened, rows["1.png"], rows["1.png"].references[0]).stored
    before = stored.read_bytes()
    stored.unlink()
    summary, _ = paired(tmp_path)
    assert (summary.generated, summary.reused) == (1, 2)
    assert stored.read_bytes() == before


def test_ondemand_references_write_nothing_and_give_the_same_pixels(tmp_path):
    pixels, folders = [], []
    for storage in ("files", "ondemand"):
        folder = project(
            tmp_path / storage, {**EDITS, "conditioning": [{**BLUR, "storage": storage}, {**JPEG, "storage": storage}]}
        )
        draw(folder / "edits" / "a.png")
        _, rows = paired(folder)
        pictures = [reference_picture(open_project(folder), rows["a.png"], one) for one in rows["a.png"].references]
        pixels.append([pixels_of(picture) for picture in pictures])
        folders.append(folder / "work" / "references")
    assert folders[0].exists() and not folders[1].exists()
    assert all(np.array_equal(stored, made) for stored, made in zip(*pixels, strict=True))


def test_a_generated_picture_stands_for_the_same_latent_however_it_is_stored(tmp_path):
    keys = []
    for storage in ("files", "ondemand"):
        folder = project(tmp_path / storage, {**EDITS, "conditioning": {**BLUR, "storage": storage}})
        draw(folder / "edits" / "a.png")
        _, rows = paired(folder)
        keys.append(rows["a.png"].references[0].key("e1"))
    assert keys[0] == keys[1] != rows["a.png"].target_key("e1")


def test_keys_of_latents_depend_on_the_bytes_the_geometry_and_the_degradation(tmp_path):
    project(tmp_path, {**PAIRED[0], "conditioning": JPEG}, REFS)
    draw(tmp_path / "edits" / "a.png")
    draw(tmp_path / "refs" / "a.png", seed=1)
    _, rows = paired(tmp_path)
    row = rows["a.png"]
    own, made = row.references
    box = row.geometry.as_key()
    assert row.target_key("e1") == latent_key("e1", row.target_image_id, box)
    assert own.key("e1") == latent_key("e1", own.image_id, box)
    assert made.key("e1") == latent_key("e1", row.target_image_id, box, "", made.recipe, made.seed)
    assert row.target_key("e1") != row.target_key("e2")


def test_a_latent_lies_with_its_file_and_that_of_a_generated_reference_with_its_target(tmp_path):
    project(tmp_path, {**PAIRED[0], "conditioning": JPEG}, REFS)
    draw(tmp_path / "edits" / "a.png")
    draw(tmp_path / "refs" / "a.png")
    _, rows = paired(tmp_path)
    assert [rows["a.png"].store_of(reference) for reference in rows["a.png"].references] == ["refs", "edits"]


def test_files_and_generators_may_be_mixed_files_first(tmp_path):
    project(tmp_path, {**PAIRED[0], "conditioning": JPEG}, REFS)
    draw(tmp_path / "edits" / "a.png")
    draw(tmp_path / "refs" / "a.png")
    _, rows = paired(tmp_path)
    assert [one.dataset_id for one in rows["a.png"].references] == ["refs", "edits_conditioning_jpeg_artifacts"]


def test_any_number_of_workers_makes_the_same(tmp_path):
    tables, pictures = [], []
    for workers in (1, 2):
        folder = project(tmp_path / str(workers), {**EDITS, "conditioning": [BLUR, JPEG]})
        for number in range(4):
            draw(folder / "edits" / f"{number}.png", seed=number)
        scan(folder, workers=1)
        pairs(folder, workers=workers)
        tables.append(rows_of(folder))
        stored = sorted((folder / "work" / "references").rglob("*.*"))
        pictures.append({path.name: path.read_bytes() for path in stored})
    assert tables[0] == tables[1] and pictures[0] == pictures[1] and len(pictures[0]) == 8


def test_an_image_that_cannot_be_decoded_rejects_the_pair_of_its_generated_reference(tmp_path):
    project(tmp_path, {**EDITS, "conditioning": BLUR})
    draw(tmp_path / "edits" / "good.png")
    whole = draw(tmp_path / "edits" / "half.tif", seed=1).read_bytes()
    (tmp_path / "edits" / "half.tif").write_bytes(whole[: len(whole) // 2])  # its header is whole
    summary, rows = paired(tmp_path)
    assert rows["half.tif"].reject.startswith("reference not made: unreadable: ")
    assert rows["good.png"].reject is None
    assert (summary.pairs, summary.generated, summary.rejected) == (1, 1, {"reference not made": 1})


def test_a_picture_whose_file_changed_since_the_scan_is_not_made(tmp_path):
    project(tmp_path, {**EDITS, "conditioning": BLUR})
    draw(tmp_path / "edits" / "a.png")
    _, rows = paired(tmp_path)
    row = rows["a.png"]
    draw(tmp_path / "edits" / "a.png", seed=5)
    shutil.rmtree(open_project(tmp_path).pixel_store)
    with pytest.raises(UserError, match=r"(?s)1 references could not be made.*a.png: changed since prep scan"):
        pairs(tmp_path, workers=1)
    assert rows_of(tmp_path)["a.png"] == row  # the table is as it was
    picture = reference_picture(open_project(tmp_path), row, row.references[0])
    assert pixels_of(picture) == store(picture) == Refusal("changed since prep scan", lasting=False)
    gone = replace(picture, path="gone.png")
    assert pixels_of(gone) == Refusal("cannot be read: No such file or directory", lasting=False)


# Prompts


def captioned(folder, *names, text="{} {}"):
    """Write a caption beside each image, which names its set and itself."""
    for name in names:
        for path in (folder / name).rglob("*.png"):
            path.with_suffix(".txt").write_text(text.format(name, path.stem))


def test_a_references_own_captions_stand_in_for_its_targets(tmp_path):
    project(tmp_path, PAIRED[0], {**REFS, "caption_strategy": "textfile"}, caption_strategy="textfile")
    for name in ("a.png", "b.png"):
        draw(tmp_path / "edits" / name)
        draw(tmp_path / "refs" / name)
    captioned(tmp_path, "edits", "refs")
    (tmp_path / "refs" / "b.txt").unlink()
    _, rows = paired(tmp_path)
    assert {path: row.prompts for path, row in rows.items()} == {"a.png": ["refs a"], "b.png": ["edits b"]}
    assert all(reference.prompts == [] for row in rows.values() for reference in row.references)


def test_a_generators_captions_stand_in_for_its_targets(tmp_path):
    for number, (captions, expected) in enumerate(
        [(["sharpen", "deblur"], ["sharpen", "deblur"]), ("sharpen", ["sharpen"]), (None, ["a"]), (False, ["a"])]
    ):
        folder = project(tmp_path / str(number), {**EDITS, "conditioning": {**BLUR, "captions": captions}})
        draw(folder / "edits" / "a.png")
        _, rows = paired(folder)
        assert rows["a.png"].prompts == expected
        assert rows["a.png"].references[0].prompts == []


def test_of_several_references_each_keeps_its_captions_and_the_sample_its_own(tmp_path):
    project(tmp_path, {**EDITS, "conditioning": [{**BLUR, "captions": ["sharpen"]}, JPEG]})
    draw(tmp_path / "edits" / "a.png")
    _, rows = paired(tmp_path)
    assert rows["a.png"].prompts == ["a"]
    assert [reference.prompts for reference in rows["a.png"].references] == [["sharpen"], []]


def test_targets_without_references_are_samples_of_text_to_image(tmp_path):
    project(tmp_path, {**EDITS, "repeats": 3})
    draw(tmp_path / "edits" / "a_photo.png")
    summary, rows = paired(tmp_path)
    row = rows["a_photo.png"]
    assert (row.references, row.prompts, row.repeats, row.reject) == ([], ["a photo"], 3, None)
    assert (summary.pairs, summary.unused_references) == (1, 0)


def test_sets_without_captions_have_no_prompts(tmp_path):
    project(tmp_path, {**EDITS, "caption_strategy": None})
    draw(tmp_path / "edits" / "a.png")
    _, rows = paired(tmp_path)
    assert rows["a.png"].prompts == [] and rows["a.png"].reject is None


# Stale and fresh


def test_a_set_that_was_not_scanned_is_refused_with_the_command_to_run(tmp_path):
    project(tmp_path, *PAIRED)
    with pytest.raises(UserError) as caught:
        pairs(tmp_path, workers=1)
    assert str(caught.value).startswith("edits: not scanned yet (")
    assert str(caught.value).endswith(f"; run: prep scan {tmp_path}")


@pytest.mark.parametrize(("change", "name"), [({"resolution": 128}, "edits"), ({"prep_seed": 1}, "edits")])
def test_a_manifest_of_other_settings_is_refused_with_the_command_to_run(change, name, tmp_path):
    project(tmp_path, *PAIRED)
    draw(tmp_path / "edits" / "a.png")
    draw(tmp_path / "refs" / "a.png")
    paired(tmp_path)
    before = products(tmp_path)
    project(tmp_path, *PAIRED, **change)
    with pytest.raises(UserError) as caught:
        pairs(tmp_path, workers=1)
    assert str(caught.value) == f"{name}: its settings changed since it was scanned; run: prep scan {tmp_path}"
    assert products(tmp_path) == before


def test_a_stale_manifest_of_the_references_is_refused_too(tmp_path):
    project(tmp_path, *PAIRED)
    scan(tmp_path, workers=1)
    project(tmp_path, PAIRED[0], {**REFS, "resolution": 128})
    with pytest.raises(UserError, match="refs: its settings changed since it was scanned; run: prep scan"):
        pairs(tmp_path, workers=1)


def test_the_command_to_run_names_the_file_of_a_project_that_is_not_called_config(tmp_path):
    project(tmp_path, EDITS)
    (tmp_path / "config.json").rename(tmp_path / "other.json")
    with pytest.raises(UserError, match=f"run: prep scan {tmp_path / 'other.json'}$"):
        pairs(tmp_path / "other.json", workers=1)


def test_pairing_again_writes_nothing_and_a_new_scan_or_setting_writes_the_table(tmp_path):
    project(tmp_path, *PAIRED)
    draw(tmp_path / "edits" / "a.png")
    draw(tmp_path / "refs" / "a.png")
    first, _ = paired(tmp_path)
    before = products(tmp_path)
    again, _ = paired(tmp_path)
    assert (first.written, again.written) == (True, False)
    assert products(tmp_path) == before

    draw(tmp_path / "refs" / "a.png", seed=3)
    replaced, rows = paired(tmp_path)
    assert replaced.written
    assert rows["a.png"].references[0].image_id == file_id(tmp_path / "refs" / "a.png")

    project(tmp_path, {**PAIRED[0], "repeats": 2}, REFS)
    repeated, rows = paired(tmp_path)
    assert repeated.written and rows["a.png"].repeats == 2


def test_a_touched_image_makes_no_pair_stale(tmp_path):
    project(tmp_path, *PAIRED)
    for name in ("edits", "refs"):
        draw(tmp_path / name / "a.png")
    paired(tmp_path)
    before = (tmp_path / "work" / "pairs" / "edits.parquet").stat()
    for name in ("edits", "refs"):
        os.utime(tmp_path / name / "a.png", ns=(0, 10**18))
    assert all(one.written for one in scan(tmp_path, workers=1).datasets)
    opened = open_project(tmp_path)
    assert read_pairs(opened, opened.dataset("edits")) == list(rows_of(tmp_path).values())
    [summary] = pairs(tmp_path, workers=1).datasets
    after = (tmp_path / "work" / "pairs" / "edits.parquet").stat()
    assert not summary.written and (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize("damage", [b"", b"<html>not found</html>"])
def test_a_damaged_pair_table_is_made_anew(damage, tmp_path):
    project(tmp_path, EDITS)
    draw(tmp_path / "edits" / "a.png")
    _, before = paired(tmp_path)
    (tmp_path / "work" / "pairs" / "edits.parquet").write_bytes(damage)
    summary, rows = paired(tmp_path)
    assert summary.written and rows == before


def test_a_pair_table_with_a_flipped_bit_is_made_anew(tmp_path):
    project(tmp_path, EDITS)
    draw(tmp_path / "edits" / "a.png")
    _, before = paired(tmp_path)
    table = tmp_path / "work" / "pairs" / "edits.parquet"
    data = bytearray(table.read_bytes())
    column = pq.ParquetFile(table).metadata.row_group(0).column(0)
    data[(column.dictionary_page_offset or column.data_page_offset) + column.total_compressed_size - 1] ^= 1
    table.write_bytes(bytes(data))
    opened = open_project(tmp_path)
    with pytest.raises(UserError, match=r"edits\.parquet: damaged"):
        read_pairs(opened, opened.dataset("edits"))
    summary, rows = paired(tmp_path)
    assert summary.written and rows == before


def test_a_damaged_manifest_is_refused_with_the_command_to_run(tmp_path):
    project(tmp_path, EDITS)
    draw(tmp_path / "edits" / "a.png")
    paired(tmp_path)
    (tmp_path / "work" / "manifests" / "edits.parquet").write_bytes(b"")
    with pytest.raises(UserError, match=r"edits: not scanned yet \(.*edits\.parquet cannot be read\); run: prep scan"):
        pairs(tmp_path, workers=1)


def test_a_sample_keeps_its_id_while_its_set_and_path_stay(tmp_path):
    project(tmp_path, *PAIRED)
    draw(tmp_path / "edits" / "a.png")
    draw(tmp_path / "refs" / "a.png")
    _, before = paired(tmp_path)
    draw(tmp_path / "edits" / "a.png", seed=3)
    _, after = paired(tmp_path)
    assert before["a.png"] != after["a.png"] and before["a.png"].sample_id == after["a.png"].sample_id


# Limits, dry runs, contact sheets


def test_a_limit_pairs_the_first_targets_of_each_set(tmp_path):
    project(tmp_path, {**EDITS, "conditioning": BLUR})
    for number in range(4):
        draw(tmp_path / "edits" / f"{number}.png", seed=number)
    summary, rows = paired(tmp_path, limit=2)
    assert list(rows) == ["0.png", "1.png"]
    assert (summary.targets, summary.generated) == (2, 2)


def test_a_table_that_a_limit_cut_says_so_and_who_reads_it_is_warned(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level(logging.WARNING, logger="pairline")
    project(tmp_path, EDITS)
    for number in range(3):
        draw(tmp_path / "edits" / f"{number}.png", seed=number)
    table, opened = tmp_path / "work" / "pairs" / "edits.parquet", open_project(tmp_path)

    for limit, cut in ((2, 2), (3, None), (1, 1), (9, None), (None, None)):
        paired(tmp_path, limit=limit)
        assert read_provenance(table, PairRow).limit == cut
        caplog.clear()
        assert len(read_pairs(opened, opened.dataset("edits"))) == (cut or 3)
        said = [f"edits: its table has the first {cut} targets only (prep pairs --limit)"] if cut else []
        assert caplog.messages == said


def test_pairs_of_a_manifest_that_a_limit_cut_are_made_with_a_warning(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level(logging.WARNING, logger="pairline")
    project(tmp_path, *PAIRED)
    for number in range(3):
        draw(tmp_path / "edits" / f"{number}.png", seed=number)
        draw(tmp_path / "refs" / f"{number}.png", seed=number)
    scan(tmp_path, workers=1, limit=2)
    assert caplog.messages == []
    [summary] = pairs(tmp_path, workers=1).datasets
    assert summary.pairs == 2
    assert caplog.messages == [
        f"{name}: its manifest has the first 2 files only (prep scan --limit)" for name in ("edits", "refs")
    ]
    caplog.clear()
    summary, _ = paired(tmp_path)
    assert (summary.pairs, summary.written, caplog.messages) == (3, True, [])


def test_references_of_targets_beyond_a_limit_do_not_count_as_unused(tmp_path):
    project(tmp_path, *PAIRED)
    for number in range(3):
        draw(tmp_path / "edits" / f"{number}.png", seed=number)
        draw(tmp_path / "refs" / f"{number}.png", seed=number)
    summary, _ = paired(tmp_path, limit=1)
    assert (summary.pairs, summary.unused_references) == (1, 0)


@pytest.mark.parametrize("workers", [1, 2])
def test_pictures_that_cannot_be_written_are_told_to_the_user(workers, tmp_path):
    project(tmp_path, {**EDITS, "conditioning": BLUR})
    for number in range(3):
        draw(tmp_path / "edits" / f"{number}.png", seed=number)
    scan(tmp_path, workers=1)
    (tmp_path / "work" / "references").write_bytes(b"")  # a file in place of the folder
    with pytest.raises(UserError, match=r"\.png: cannot be written: "):
        pairs(tmp_path, workers=workers)


def test_a_dry_run_says_what_would_be_made_and_writes_nothing(tmp_path):
    project(tmp_path, {**EDITS, "conditioning": BLUR})
    draw(tmp_path / "edits" / "a.png")
    scan(tmp_path, workers=1)
    before = products(tmp_path)
    summary = pairs(tmp_path, workers=1, dry_run=True, preview=1)
    [planned] = summary.datasets
    assert products(tmp_path) == before
    assert (planned.pairs, planned.generated, planned.reused, planned.written) == (1, 1, 0, True)
    assert summary.dry_run and summary.previews == () and "would write" in "\n".join(summary.lines())
    assert pairs(tmp_path, workers=1).datasets == (planned,)


@pytest.mark.parametrize("count", [1, 3, 12])
def test_a_contact_sheet_shows_pairs_as_one_png(count, tmp_path):
    project(tmp_path, {**EDITS, "conditioning": [BLUR, JPEG]})
    for number in range(3):
        draw(tmp_path / "edits" / f"a rather long name, number {number}.png", 64 + 64 * number, 64)
    scan(tmp_path, workers=1)
    [path] = pairs(tmp_path, workers=1, preview=count).previews
    assert Path(path) == tmp_path / "work" / "pairs" / "edits.preview.png"
    with Image.open(path) as sheet:
        sheet.load()
        assert sheet.format == "PNG"
        assert np.asarray(sheet).std() > 10  # something is drawn
        assert sheet.width <= 1960 and 2 * 160 < sheet.height < 1000


def test_a_sheet_is_drawn_though_a_picture_is_gone_and_none_if_there_is_no_pair(tmp_path):
    project(tmp_path, *PAIRED)
    draw(tmp_path / "edits" / "a.png")
    draw(tmp_path / "refs" / "a.png")
    scan(tmp_path, workers=1)
    (tmp_path / "refs" / "a.png").unlink()
    [path] = pairs(tmp_path, workers=1, preview=1).previews
    with Image.open(path) as sheet:
        assert (np.asarray(sheet) == (250, 128, 114)).all(axis=2).sum() > 100 * 100  # a blank in salmon
    scan(tmp_path, workers=1)
    assert pairs(tmp_path, workers=1, preview=1).previews == ()


def test_no_pair_at_all_is_a_warning(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(log, "propagate", True)
    project(tmp_path, *PAIRED)
    draw(tmp_path / "edits" / "a.png")
    with caplog.at_level(logging.WARNING, logger="pairline"):
        summary, _ = paired(tmp_path)
    assert "edits: no pair is left to train on" in caplog.messages
    assert summary.pairs == 0


def test_held_out_sets_have_a_table_of_their_own(tmp_path):
    held_out = {"id": "held-out", "dataset_type": "eval", "instance_data_dir": "held", "conditioning": JPEG}
    project(tmp_path, EDITS, held_out)
    draw(tmp_path / "edits" / "a.png")
    draw(tmp_path / "held" / "b.png")
    scan(tmp_path, workers=1)
    first, second = pairs(tmp_path, workers=1).datasets
    assert (first.dataset_id, second.dataset_id) == ("edits", "held-out")
    assert list(rows_of(tmp_path)) == ["a.png"] and list(rows_of(tmp_path, "held-out")) == ["b.png"]


def test_pictures_of_any_file_are_found_from_any_folder(tmp_path, monkeypatch):
    project(tmp_path, {**EDITS, "conditioning": BLUR})
    draw(tmp_path / "edits" / "a.png")
    monkeypatch.chdir(tmp_path)
    scan(".", workers=1)
    pairs(".", workers=1)
    monkeypatch.chdir(os.sep)
    row = rows_of(tmp_path)["a.png"]
    assert reference_picture(open_project(tmp_path), row, row.references[0]).stored.exists()


# Variants of random crops


def test_every_variant_of_a_random_crop_is_a_row_and_what_shares_the_targets_box_moves_with_it(tmp_path):
    target = {**PAIRED[0], "crop": True, "crop_style": "random", "crop_variants": 3, "conditioning": JPEG}
    project(tmp_path, target, REFS, {**REFS, "id": "loose", "conditioning_type": "reference_loose",
                                     "source_dataset_id": "edits"})  # fmt: skip
    for name in ("a.png", "b.png"):
        draw(tmp_path / "edits" / name, 400, 100)
        draw(tmp_path / "refs" / name, 400, 100, seed=1)
    summary, _ = paired(tmp_path)
    rows = read_table(tmp_path / "work" / "pairs" / "edits.parquet", PairRow)
    assert (summary.pairs, summary.unused_references) == (6, 0)
    assert [(row.target_path, row.variant, row.variants) for row in rows] == [
        (name, variant, 3) for name in ("a.png", "b.png") for variant in range(3)
    ]
    assert len({row.sample_id for row in rows}) == 6
    for row in rows:
        strict, loose, made = row.references
        assert strict.geometry == made.geometry == row.geometry
        assert loose.geometry == rows[0 if row.target_path == "a.png" else 3].references[1].geometry
    assert len({row.geometry.crop_left for row in rows}) >= 4
    assert len({row.geometry.as_key()[:4] for row in rows}) == 1
    assert len({row.target_key("e1") for row in rows}) == 6


def test_an_epoch_that_clears_the_cache_upstream_is_four_variants_here_and_none_without_random_crops(tmp_path):
    clearing = {**EDITS, "crop": True, "vae_cache_clear_each_epoch": True}
    for style, count in (("random", 4), ("center", 1)):
        folder = project(tmp_path / style, {**clearing, "crop_style": style})
        draw(folder / "edits" / "a.png", 400, 100)
        assert paired(folder)[0].pairs == count
