import importlib
import json
import logging
import os
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import prep.reading
from families import open_project
from prep.scan import scan
from schemas.console import log
from schemas.errors import ConfigError, UserError
from schemas.freshness import read_manifest
from schemas.keys import file_id
from schemas.lock import only_one
from schemas.rows import ImageRow
from schemas.summaries import as_json
from schemas.tables import read_provenance, read_table

DEMO = Path(__file__).parents[2] / "datasets_demo" / "photos"
CONFIG = {"resolution": 64, "aspect_bucket_alignment": 16}


def project(folder, *datasets, **config):
    """Write a project's files; without datasets, of one set `photos`, captioned by file name."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "photos").mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    entries = datasets or [{"id": "photos", "instance_data_dir": "photos"}]
    (folder / "multidatabackend.json").write_text(json.dumps(entries))
    return folder


def draw(path, width=96, height=64, seed=0, **options):
    """Draw a small picture of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng((seed, width, height)).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


def rows_of(folder, dataset="photos"):
    """Return the rows of a manifest by path."""
    return {row.path: row for row in read_table(folder / "work" / "manifests" / f"{dataset}.parquet", ImageRow)}


def provenance_of(folder, dataset="photos"):
    return read_provenance(folder / "work" / "manifests" / f"{dataset}.parquet", ImageRow)


def state(folder):
    """Return what would show that a manifest was written again."""
    stat = (folder / "work" / "manifests" / "photos.parquet").stat()
    return stat.st_ino, stat.st_mtime_ns


def changed(before, after):
    """Return the paths whose rows differ, are new or are gone."""
    return {path for path in before | after if before.get(path) != after.get(path)}


# What a row says


def test_a_row_says_all_that_is_known_of_an_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = draw(project(tmp_path) / "photos" / "day one" / "a_red car.JPG", 96, 64, exif=exif)

    [summary] = scan(tmp_path, workers=1).datasets

    [row] = rows_of(tmp_path).values()
    assert row == ImageRow(
        dataset_id="photos",
        path="day one/a_red car.JPG",
        image_id=file_id(path),
        size_bytes=path.stat().st_size,
        mtime_ns=path.stat().st_mtime_ns,
        width=64,
        height=96,
        orientation=6,
        format="JPEG",
        mode="RGB",
        bits=8,
        frames=1,
        alpha=False,
        icc=False,
        phash=None,
        face=[],
        examined=None,
        fault=None,
        captions=["a red car"],
        caption_source="filename",
        caption_size_bytes=None,
        caption_mtime_ns=None,
        bucket="48x80",
        target_width=48,
        target_height=80,
        intermediary_width=53,
        intermediary_height=80,
        crop_top=0,
        crop_left=row.crop_left,
        reject=None,
    )
    assert 0 <= row.crop_left <= 5
    assert (summary.seen, summary.kept, summary.read, summary.captions) == (1, 1, 1, 1)
    assert (summary.buckets, summary.rejected, summary.written) == ({"48x80": 1}, {}, True)
    assert summary.manifest == str(tmp_path / "work" / "manifests" / "photos.parquet")


def test_every_image_below_the_folder_has_a_row_in_the_order_of_paths(tmp_path):
    for name in ("b.png", "a/z.webp", "a/b/c.bmp", "C.TIFF", "a.gif", "a-b/d.jpeg"):
        draw(project(tmp_path) / "photos" / name)
    scan(tmp_path, workers=1)
    assert list(rows_of(tmp_path)) == ["C.TIFF", "a/b/c.bmp", "a/z.webp", "a-b/d.jpeg", "a.gif", "b.png"]


def test_hidden_files_captions_and_other_files_are_no_images(tmp_path):
    photos = project(tmp_path) / "photos"
    for name in ("a.png", ".hidden.png", ".hidden/b.png", "sub/.trash/c.png"):
        draw(photos / name)
    for name in ("a.txt", "notes.md", "sub/archive.zip", "Thumbs.db"):
        (photos / name).write_bytes(b"")
    (photos / "folder.png").mkdir()
    [summary] = scan(tmp_path, workers=1).datasets
    assert list(rows_of(tmp_path)) == ["a.png"]
    assert summary.ignored_files == 4  # the three others and the hidden file; hidden folders are not looked into


def test_products_in_the_folder_of_images_are_not_scanned(tmp_path):
    entry = {"id": "photos", "instance_data_dir": "."}
    draw(project(tmp_path, entry) / "a.png")
    draw(tmp_path / "work" / "references" / "made.png")
    scan(tmp_path, workers=1)
    assert list(rows_of(tmp_path)) == ["a.png"]


def test_unusable_images_keep_their_row_with_a_reason(tmp_path):
    photos = (
        project(tmp_path, {"id": "photos", "instance_data_dir": "photos", "caption_strategy": "textfile"}) / "photos"
    )
    (photos / "empty.png").write_bytes(b"")
    (photos / "page.jpg").write_text("<html>not found</html>")
    (photos / "link.png").symlink_to(tmp_path / "nowhere.png")
    draw(photos / "narrow.png", 2, 900)
    draw(photos / "no-text.png")
    draw(photos / "good.png")
    for name in ("empty", "page", "link", "narrow", "good"):
        (photos / f"{name}.txt").write_text("a photo\na picture")

    [summary] = scan(tmp_path, workers=1).datasets

    assert {path: row.reject for path, row in rows_of(tmp_path).items()} == {
        "empty.png": "unreadable: the file is empty",
        "good.png": None,
        "link.png": "unreadable: No such file or directory",
        "narrow.png": "too narrow: 2x900, its aspect ratio rounds to 0",
        "no-text.png": "no caption: no-text.txt is missing",
        "page.jpg": "unreadable: no known image format",
    }
    assert (summary.seen, summary.kept, summary.captions) == (6, 1, 2)
    assert summary.rejected == {"unreadable": 3, "too narrow": 1, "no caption": 1}
    for row in rows_of(tmp_path).values():
        assert (row.bucket is None) == (row.crop_left is None) == (row.reject is not None)
    page, narrow = rows_of(tmp_path)["page.jpg"], rows_of(tmp_path)["narrow.png"]
    assert page.image_id == file_id(photos / "page.jpg") and page.width is None
    assert (narrow.width, narrow.height) == (2, 900)


def test_references_need_no_captions_and_no_least_size(tmp_path):
    targets = {"id": "photos", "instance_data_dir": "photos", "minimum_image_size": 128, "conditioning_data": "refs"}
    references = {
        "id": "refs",
        "dataset_type": "conditioning",
        "conditioning_type": "reference_strict",
        "instance_data_dir": "photos",
        "minimum_image_size": 128,
        "caption_strategy": "textfile",
    }
    draw(project(tmp_path, targets, references) / "photos" / "a.png")
    scan(tmp_path, workers=1)
    assert rows_of(tmp_path)["a.png"].reject == "too small: 96x64, need an area of 128x128"
    assert rows_of(tmp_path, "refs")["a.png"].reject is None


def test_a_name_that_is_not_utf_8_does_not_stop_the_scan(tmp_path):
    draw(project(tmp_path) / "photos" / "good.png")
    draw(tmp_path / "photos" / "b.png").rename(tmp_path / "photos" / os.fsdecode(b"caf\xe9.png"))
    [summary] = scan(tmp_path, workers=1).datasets
    assert summary.seen == len(rows_of(tmp_path)) == 2
    assert rows_of(tmp_path)["good.png"].reject is None
    bad = rows_of(tmp_path)["caf\\xe9.png"]
    assert (bad.reject, bad.bucket) == ("name: it is not UTF-8", None)
    assert summary.rejected == {"name": 1}
    [again] = scan(tmp_path, workers=1).datasets
    assert (again.read, again.written) == (0, False)


def test_a_folder_whose_name_is_not_utf_8_does_not_stop_the_scan_either(tmp_path):
    draw(project(tmp_path) / "photos" / os.fsdecode(b"\xe9t\xe9") / "a.png")
    scan(tmp_path, workers=1)
    assert {path: row.reject for path, row in rows_of(tmp_path).items()} == {
        "\\xe9t\\xe9/a.png": "name: it is not UTF-8"
    }


def test_no_usable_image_is_a_warning(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(log, "propagate", True)
    with caplog.at_level(logging.WARNING, logger="pairline"):
        [summary] = scan(project(tmp_path), workers=1).datasets
    assert caplog.messages == [f"photos: no usable image in {tmp_path / 'photos'}"]
    assert (summary.seen, rows_of(tmp_path)) == (0, {})


def test_a_missing_folder_is_refused_before_anything_is_written(tmp_path):
    (project(tmp_path) / "photos").rmdir()
    with pytest.raises(ConfigError, match="no such folder"):
        scan(tmp_path, workers=1)
    assert not (tmp_path / "work").exists()


KNOWN = json.loads((Path(__file__).parent / "bucket_vectors.json").read_text())["minimum_size_filter"]


def test_the_least_size_rejects_what_simpletuner_leaves_out(tmp_path):
    keys = ("resolution_type", "minimum_image_size", "crop", "crop_aspect")
    settings = sorted({tuple(case[key] for key in keys) for case in KNOWN})
    entries = [
        {"id": f"set{number}", "instance_data_dir": "photos", **dict(zip(keys, one, strict=True))}
        for number, one in enumerate(settings)
    ]
    folder = project(tmp_path, *entries)
    for width, height in {(case["width"], case["height"]) for case in KNOWN}:
        Image.new("1", (width, height)).save(folder / "photos" / f"{width}x{height}.png")

    scan(folder, workers=1)

    for number, one in enumerate(settings):
        rows = rows_of(folder, f"set{number}")
        for case in KNOWN:
            if tuple(case[key] for key in keys) == one:
                reject = rows[f"{case['width']}x{case['height']}.png"].reject
                assert (reject is None) == case["kept"], (case, reject)
                assert reject is None or reject.startswith(f"too small: {case['width']}x{case['height']}, need ")


# Scanning again


def test_a_second_scan_reads_nothing_and_writes_nothing(tmp_path):
    for number in range(5):
        draw(project(tmp_path) / "photos" / f"{number}.png", 64 + 16 * number)
    [first] = scan(tmp_path, workers=1).datasets
    before = state(tmp_path)
    [second] = scan(tmp_path, workers=1).datasets
    assert (first.read, first.written) == (5, True)
    assert (second.read, second.written, second.seen, second.kept) == (0, False, 5, 5)
    assert state(tmp_path) == before


@pytest.fixture
def scanned(tmp_path):
    """A scanned project of four captioned photos."""
    folder = project(tmp_path, {"id": "photos", "instance_data_dir": "photos", "caption_strategy": "textfile"})
    for number in range(4):
        draw(folder / "photos" / f"{number}.png", seed=number)
        (folder / "photos" / f"{number}.txt").write_text(f"photo {number}")
    scan(folder, workers=1)
    return folder


def test_a_new_caption_changes_its_row_alone_and_no_image_is_read(scanned):
    before = rows_of(scanned)
    (scanned / "photos" / "2.txt").write_text("another")
    [summary] = scan(scanned, workers=1).datasets
    assert (summary.read, summary.written) == (0, True)
    assert changed(before, rows_of(scanned)) == {"2.png"}
    text = (scanned / "photos" / "2.txt").stat()
    known = {"caption_size_bytes": text.st_size, "caption_mtime_ns": text.st_mtime_ns}
    assert rows_of(scanned)["2.png"] == replace(before["2.png"], captions=["another"], **known)


def test_a_replaced_image_changes_its_row_alone(scanned):
    before = rows_of(scanned)
    draw(scanned / "photos" / "2.png", 64, 96, seed=9)
    [summary] = scan(scanned, workers=1).datasets
    after = rows_of(scanned)
    assert (summary.read, summary.written, summary.removed) == (1, True, 0)
    assert changed(before, after) == {"2.png"}
    assert (after["2.png"].width, after["2.png"].bucket) == (64, "48x80")
    assert after["2.png"].image_id == file_id(scanned / "photos" / "2.png") != before["2.png"].image_id


def test_an_image_replaced_by_one_of_the_same_size_and_name_is_noticed_by_its_time(tmp_path):
    path = draw(project(tmp_path) / "photos" / "a.bmp", seed=1)
    scan(tmp_path, workers=1)
    before = rows_of(tmp_path)["a.bmp"]
    draw(path, seed=2)
    os.utime(path, ns=(0, before.mtime_ns + 1))
    [summary] = scan(tmp_path, workers=1).datasets
    after = rows_of(tmp_path)["a.bmp"]
    assert summary.read == 1
    assert after.size_bytes == before.size_bytes and after.image_id != before.image_id


def test_a_touched_image_is_read_again_and_only_its_time_changes(scanned):
    before = rows_of(scanned)
    os.utime(scanned / "photos" / "2.png", ns=(0, 10**18))
    [summary] = scan(scanned, workers=1).datasets
    assert summary.read == 1
    assert changed(before, rows_of(scanned)) == {"2.png"}
    assert rows_of(scanned)["2.png"] == replace(before["2.png"], mtime_ns=10**18)
    assert summary.written


def test_a_touched_image_is_the_same_input_to_later_stages_and_a_changed_one_is_another(scanned):
    before = provenance_of(scanned)
    os.utime(scanned / "photos" / "2.png", ns=(0, 10**18))
    scan(scanned, workers=1)
    assert provenance_of(scanned) == before
    draw(scanned / "photos" / "2.png", seed=9)
    scan(scanned, workers=1)
    assert provenance_of(scanned).config == before.config
    assert provenance_of(scanned).inputs != before.inputs


def test_added_removed_and_renamed_images_change_exactly_their_rows(scanned):
    before = rows_of(scanned)
    photos = scanned / "photos"
    draw(photos / "new.png")
    (photos / "new.txt").write_text("new")
    (photos / "1.png").unlink()
    (photos / "2.png").rename(photos / "two.png")
    (photos / "2.txt").rename(photos / "two.txt")
    [summary] = scan(scanned, workers=1).datasets
    after = rows_of(scanned)
    assert (summary.seen, summary.read, summary.removed, summary.written) == (4, 2, 2, True)
    assert changed(before, after) == {"new.png", "1.png", "2.png", "two.png"}
    assert after["two.png"].image_id == before["2.png"].image_id


def test_a_mended_image_is_read_again(tmp_path):
    photos = project(tmp_path) / "photos"
    (photos / "a.png").write_bytes(b"")
    scan(tmp_path, workers=1)
    assert rows_of(tmp_path)["a.png"].reject == "unreadable: the file is empty"
    draw(photos / "a.png")
    scan(tmp_path, workers=1)
    assert rows_of(tmp_path)["a.png"].reject is None


def test_other_settings_give_other_buckets_and_read_no_image(scanned):
    before = rows_of(scanned)
    again = open_project(scanned, overrides=["resolution=128"])
    [summary] = scan(again, workers=1).datasets
    after = rows_of(scanned)
    assert (summary.read, summary.written) == (0, True)
    assert {row.bucket for row in before.values()} != {row.bucket for row in after.values()} == {"160x112"}
    assert [row.image_id for row in before.values()] == [row.image_id for row in after.values()]


def test_settings_that_change_no_row_are_recorded_all_the_same(scanned):
    before, where = rows_of(scanned), state(scanned)
    entries = [{"id": "photos", "instance_data_dir": "photos", "caption_strategy": "textfile", "instance_prompt": "x"}]
    project(scanned, *entries)
    [summary] = scan(scanned, workers=1).datasets
    assert summary.written and state(scanned) != where and rows_of(scanned) == before
    assert not scan(scanned, workers=1).datasets[0].written


def test_a_damaged_manifest_is_made_anew(scanned):
    before = rows_of(scanned)
    manifest = scanned / "work" / "manifests" / "photos.parquet"
    manifest.write_bytes(manifest.read_bytes()[:-100])
    [summary] = scan(scanned, workers=1).datasets
    assert (summary.read, summary.written) == (4, True)
    assert rows_of(scanned) == before


# Workers, limits, seeds


def test_any_number_of_workers_and_any_order_of_files_on_the_disk_give_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(prep.reading, "_CHUNK", 16)  # so that all workers have work
    names = [f"{number % 7}/{number}.png" for number in range(200)]
    entry = {"id": "photos", "instance_data_dir": "photos", "caption_strategy": "textfile", "max_num_samples": 150}
    manifests = []
    for workers, order in ((1, names), (2, names), (8, names[::-1]), (2, sorted(names, key=lambda name: hash(name)))):
        folder = project(tmp_path / str(len(manifests)), entry, resolution=96)
        for name in order:
            number = int(Path(name).stem)
            file = folder / "photos" / name
            file.parent.mkdir(exist_ok=True)
            Image.new("L", (40 + number % 60, 40 + number % 7), number).save(file)
            file.with_suffix(".txt").write_text(f"picture {number}")
            for one in (file, file.with_suffix(".txt")):
                os.utime(one, ns=(0, 10**18 + number))
        (folder / "photos" / names[17]).write_bytes(b"broken")
        os.utime(folder / "photos" / names[17], ns=(0, 10**18))
        [summary] = scan(folder, workers=workers).datasets
        assert (summary.read, summary.kept, summary.rejected) == (200, 150, {"not drawn": 49, "unreadable": 1})
        manifests.append((folder / "work" / "manifests" / "photos.parquet").read_bytes())
    assert manifests == [manifests[0]] * 4


def test_a_file_that_costs_its_worker_is_rejected_and_its_neighbours_are_read(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    monkeypatch.setattr(prep.reading, "measure", importlib.import_module("pool_tasks").measure_or_die)
    monkeypatch.setattr(prep.reading, "_CHUNK", 3)
    for name in ("0.png", "1.tif", "2-deadly.tif", "3.tif", "4.png", "5.png"):
        draw(project(tmp_path) / "photos" / name)
    [summary] = scan(tmp_path, workers=2).datasets
    assert {path: row.reject for path, row in rows_of(tmp_path).items() if row.reject} == {
        "2-deadly.tif": "unreadable: its worker process died with exit status 9"
    }
    assert (summary.seen, summary.kept, summary.read) == (6, 5, 6)


def test_a_limit_scans_the_first_files_of_each_set(scanned):
    entries = [{"id": name, "instance_data_dir": "photos"} for name in ("photos", "again")]
    project(scanned, *entries)
    first, second = scan(scanned, workers=1, limit=2).datasets
    assert (first.seen, second.seen) == (2, 2)
    assert list(rows_of(scanned)) == list(rows_of(scanned, "again")) == ["0.png", "1.png"]


def test_files_beyond_a_limit_are_not_gone(scanned):
    [summary] = scan(scanned, workers=1, limit=2).datasets
    assert summary.removed == 0
    (scanned / "photos" / "3.png").unlink()
    [whole] = scan(scanned, workers=1, limit=3).datasets
    assert (whole.removed, whole.read) == (0, 1)


def test_a_manifest_that_a_limit_cut_says_so_and_another_does_not(scanned):
    assert provenance_of(scanned).limit is None
    before = state(scanned)
    for enough in (4, 100):
        assert not scan(scanned, workers=1, limit=enough).datasets[0].written
    assert state(scanned) == before
    scan(scanned, workers=1, limit=3)
    assert provenance_of(scanned).limit == 3
    [summary] = scan(scanned, workers=1).datasets
    assert (summary.written, provenance_of(scanned).limit) == (True, None)


def test_a_limit_that_cuts_nothing_counts_what_is_gone(scanned):
    (scanned / "photos" / "3.png").unlink()
    [summary] = scan(scanned, workers=1, limit=3).datasets
    assert (summary.removed, provenance_of(scanned).limit) == (1, None)


def test_a_dry_run_says_the_same_and_writes_nothing(tmp_path):
    draw(project(tmp_path) / "photos" / "a.png")
    planned = scan(tmp_path, workers=1, dry_run=True)
    assert not (tmp_path / "work").exists()
    done = scan(tmp_path, workers=1)
    assert planned.dry_run and not done.dry_run
    assert planned.datasets == done.datasets
    assert "would write" in "\n".join(planned.lines()) and "would" not in "\n".join(done.lines())


def test_a_dry_run_leaves_an_old_manifest_alone(scanned):
    before = state(scanned)
    draw(scanned / "photos" / "new.png")
    [summary] = scan(scanned, workers=1, dry_run=True).datasets
    assert (summary.seen, summary.read, summary.written) == (5, 1, True)
    assert state(scanned) == before


def test_random_crops_depend_on_seed_set_and_path_alone(tmp_path):
    crop = {"crop": True, "crop_style": "random"}
    entries = [{"id": name, "instance_data_dir": "photos", **crop} for name in ("photos", "again")]
    folder = project(tmp_path, *entries)
    for number in range(12):
        draw(folder / "photos" / f"{number}.png", 400, 64)

    def crops(dataset="photos", **config):
        scan(project(folder, *entries, **config), workers=1)
        return {path: row.crop_left for path, row in rows_of(folder, dataset).items()}

    first = crops()
    assert first == crops() and len(set(first.values())) > 6
    assert first != crops("again") and first != crops(prep_seed=7) and first == crops(seed=7)
    (folder / "photos" / "0.png").unlink()
    assert crops() == {path: left for path, left in first.items() if path != "0.png"}


def test_the_first_path_of_a_bucket_decides_its_size_whatever_was_read_first(tmp_path):
    entry = {"id": "photos", "instance_data_dir": "photos", "resolution": 1024, "crop_style": "center"}
    for name, size in (("a.png", (1120, 2000)), ("b.png", (1140, 2000))):
        Image.new("1", size).save(project(tmp_path, entry) / "photos" / name)
    scan(tmp_path, workers=1)
    whole = rows_of(tmp_path)
    (tmp_path / "photos" / "b.png").touch()
    scan(tmp_path, workers=1)
    assert {path: row.bucket for path, row in rows_of(tmp_path).items()} == {
        path: row.bucket for path, row in whole.items()
    }
    assert {row.bucket for row in whole.values()} == {"768x1376"}


def test_the_summary_is_told_as_lines_and_as_json(scanned):
    (scanned / "photos" / "3.txt").unlink()
    summary = scan(scanned, workers=1)
    head, reason, tail = summary.lines()
    assert head == "photos: 4 images, 3 kept, 3 captions, 1 bucket; 0 read, 4 unchanged"
    assert reason == "  rejected 1: no caption"
    assert tail == f"  wrote {scanned / 'work' / 'manifests' / 'photos.parquet'}"
    assert json.loads(as_json(summary)) == json.loads(json.dumps(asdict(summary)))


# Pixels


def wave(path, period=32.0, **options):
    """Draw a smooth picture, of another pattern for another period."""
    down, across = np.mgrid[0:96, 0:128]
    pixels = (127 + 120 * np.sin(across / period) * np.cos(down / period * 1.3)).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).convert("RGB").save(path, **options)
    return path


def test_verifying_finds_damage_that_headers_and_decoders_do_not_tell(tmp_path):
    photos = project(tmp_path) / "photos"
    for name in ("good.jpg", "holed.jpg", "good.png", "flipped.png"):
        wave(photos / name, 7.0)
    data = (photos / "holed.jpg").read_bytes()
    (photos / "holed.jpg").write_bytes(data[: len(data) // 2] + bytes(60) + data[len(data) // 2 + 60 :])
    flipped = bytearray(Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 90, 3), np.uint8)).tobytes())
    Image.frombytes("RGB", (90, 90), bytes(flipped)).save(photos / "flipped.png")
    flipped = bytearray((photos / "flipped.png").read_bytes())
    flipped[len(flipped) // 2] ^= 255
    (photos / "flipped.png").write_bytes(flipped)

    [plain] = scan(tmp_path, workers=1).datasets
    assert (plain.kept, plain.decoded) == (4, 0)
    [verified] = scan(tmp_path, workers=1, verify=True).datasets
    assert (verified.kept, verified.decoded, verified.read) == (2, 4, 0)
    rows = rows_of(tmp_path)
    assert {path for path, row in rows.items() if row.reject} == {"holed.jpg", "flipped.png"}
    assert rows["holed.jpg"].reject.startswith("unreadable: Corrupt JPEG data")

    [again] = scan(tmp_path, workers=1, verify=True).datasets
    assert (again.decoded, again.written) == (0, False)
    [later] = scan(tmp_path, workers=1).datasets  # what was found is remembered
    assert (later.kept, later.written) == (2, False)


def test_equal_files_are_counted_and_may_be_left_out(tmp_path):
    first = draw(project(tmp_path) / "photos" / "a.png")
    for name in ("b.png", "c/a.png"):
        (tmp_path / "photos" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(first.read_bytes())
    draw(tmp_path / "photos" / "d.png", seed=4)
    [summary] = scan(tmp_path, workers=1).datasets
    assert (summary.kept, summary.equal_files) == (4, 2)
    project(tmp_path, {"id": "photos", "instance_data_dir": "photos", "exact_duplicates": "reject"})
    [summary] = scan(tmp_path, workers=1).datasets
    assert (summary.kept, summary.read, summary.rejected) == (2, 0, {"duplicate": 2})
    assert rows_of(tmp_path)["c/a.png"].reject == "duplicate: the same bytes as a.png"


def test_pictures_that_look_alike_are_counted_and_may_be_left_out(tmp_path):
    entry = {"id": "photos", "instance_data_dir": "photos", "near_duplicates": "report"}
    photos = project(tmp_path, entry) / "photos"
    cat, cup = (Image.open(DEMO / f"{name}.jpg") for name in ("cat_face", "coffee_cup"))
    cat.save(photos / "a.png")
    cat.save(photos / "b.jpg", quality=40)
    cat.resize((200, 150)).save(photos / "c.webp")
    cup.save(photos / "other.png")
    [summary] = scan(tmp_path, workers=1).datasets
    assert (summary.kept, summary.decoded, summary.near_duplicates) == (4, 4, 2)
    [again] = scan(tmp_path, workers=1).datasets
    assert (again.decoded, again.written) == (0, False)
    project(tmp_path, {**entry, "near_duplicates": "reject"})
    [summary] = scan(tmp_path, workers=1).datasets
    assert (summary.decoded, summary.rejected) == (0, {"near duplicate": 2})
    assert rows_of(tmp_path)["b.jpg"].reject == "near duplicate: looks like a.png"


def test_no_more_images_are_used_than_asked_for_and_a_new_one_displaces_one_at_most(tmp_path):
    entry = {"id": "photos", "instance_data_dir": "photos", "max_num_samples": 5}
    folder = project(tmp_path, entry)
    for number in range(12):
        draw(folder / "photos" / f"{number}.png", seed=number)
    [summary] = scan(folder, workers=1).datasets
    assert (summary.kept, summary.rejected) == (5, {"not drawn": 7})
    before = {path for path, row in rows_of(folder).items() if row.reject is None}
    draw(folder / "photos" / "new.png", seed=99)
    scan(folder, workers=1)
    after = {path for path, row in rows_of(folder).items() if row.reject is None}
    assert len(after) == 5 and len(before - after) <= 1


ODD = {
    "alpha.png": ("alpha", "transparent"),
    "cmyk.jpg": ("cmyk", "printing colours"),
    "deep.png": ("high_depth", "high depth"),
    "moving.gif": ("animation", "animation"),
}


def oddities(photos):
    Image.new("RGBA", (64, 64), (9, 9, 9, 9)).save(photos / "alpha.png")
    Image.new("CMYK", (64, 64)).save(photos / "cmyk.jpg")
    Image.fromarray(np.full((64, 64), 40_000, np.uint16)).save(photos / "deep.png")
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    frames[0].save(photos / "moving.gif", save_all=True, append_images=frames[1:])


def test_what_is_more_than_plain_pictures_is_counted(tmp_path):
    photos = project(tmp_path) / "photos"
    oddities(photos)
    exif = Image.Exif()
    exif[0x0112] = 3
    draw(photos / "turned.jpg", exif=exif)
    [summary] = scan(tmp_path, workers=1).datasets
    assert summary.oddities == {
        "turned by EXIF": 1,
        "transparent": 1,
        "CMYK": 1,
        "more than 8 bits": 1,
        "animated": 1,
    }


@pytest.mark.parametrize("name", ODD)
def test_every_kind_of_odd_picture_can_be_rejected(name, tmp_path):
    option, kind = ODD[name]
    entry = {"id": "photos", "instance_data_dir": "photos", "image_policy": {option: "reject"}}
    oddities(project(tmp_path, entry) / "photos")
    [summary] = scan(tmp_path, workers=1).datasets
    assert summary.rejected == {kind: 1}
    assert rows_of(tmp_path)[name].reject == f"{kind}: image_policy.{option}"


def test_pictures_of_too_many_pixels_are_rejected_and_never_decoded(tmp_path):
    policy = {"maximum_megapixels": 0.01}
    entry = {"id": "photos", "instance_data_dir": "photos", "image_policy": policy, "near_duplicates": "report"}
    draw(project(tmp_path, entry) / "photos" / "a.png", 200, 100)
    [summary] = scan(tmp_path, workers=1).datasets
    assert summary.decoded == 0
    assert rows_of(tmp_path)["a.png"].reject == "too large: 200x100, more than image_policy.maximum_megapixels"


def test_orientation_can_be_ignored_and_all_is_measured_anew(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    draw(project(tmp_path) / "photos" / "a.jpg", 96, 64, exif=exif)
    scan(tmp_path, workers=1)
    assert (rows_of(tmp_path)["a.jpg"].width, rows_of(tmp_path)["a.jpg"].height) == (64, 96)
    policy = {"orientation": "ignore"}
    project(tmp_path, {"id": "photos", "instance_data_dir": "photos", "image_policy": policy})
    [summary] = scan(tmp_path, workers=1).datasets
    assert summary.read == 1
    assert (rows_of(tmp_path)["a.jpg"].width, rows_of(tmp_path)["a.jpg"].height) == (96, 64)


# A look without hashing


def test_a_look_measures_without_identifying_and_a_scan_completes_it(tmp_path):
    draw(project(tmp_path) / "photos" / "a.png")
    [summary] = scan(tmp_path, workers=1, hashed=False).datasets
    assert (summary.read, summary.kept) == (1, 1)
    assert rows_of(tmp_path)["a.png"].image_id is None
    with pytest.raises(UserError, match="scanned with --no-hash, for a look; run: prep scan"):
        read_manifest(open_project(tmp_path), open_project(tmp_path).datasets[0], ["path"])
    [again] = scan(tmp_path, workers=1, hashed=False).datasets
    assert (again.read, again.written) == (0, False)
    [whole] = scan(tmp_path, workers=1).datasets
    assert (whole.read, whole.written) == (1, True)
    assert rows_of(tmp_path)["a.png"].image_id == file_id(tmp_path / "photos" / "a.png")
    [look] = scan(tmp_path, workers=1, hashed=False).datasets  # what is known stays
    assert look.read == 0 and rows_of(tmp_path)["a.png"].image_id is not None


# Several sets, skipped discovery, locks


def test_sets_of_one_resolution_share_their_buckets_sizes_and_strict_references_do_not(tmp_path):
    entries = [
        {"id": "a", "instance_data_dir": "first", "resolution": 1024},
        {"id": "b", "instance_data_dir": "second", "resolution": 1024},
        {"id": "c", "instance_data_dir": "second", "resolution": 1024, "conditioning_type": "reference_strict"},
    ]
    folder = project(tmp_path, *entries)
    for place, size in (("first", (1120, 2000)), ("second", (1140, 2000))):
        (folder / place).mkdir()
        Image.new("1", size).save(folder / place / "x.png")
    first, second, strict = scan(folder, workers=1).datasets
    assert set(first.buckets) == set(second.buckets) == {"768x1376"}
    assert second.collisions == {"0.56": ["768x1360", "768x1376"]}
    assert set(strict.buckets) == {"768x1360"}
    assert not any(one.written for one in scan(folder, workers=1).datasets)


def test_a_set_whose_discovery_is_skipped_is_not_looked_at_until_its_settings_change(tmp_path):
    entry = {"id": "photos", "instance_data_dir": "photos", "skip_file_discovery": "vae aspect metadata text"}
    draw(project(tmp_path, entry) / "photos" / "a.png")
    assert scan(tmp_path, workers=1).datasets[0].seen == 1  # there is no manifest yet
    draw(tmp_path / "photos" / "b.png", seed=1)
    [summary] = scan(tmp_path, workers=1).datasets
    assert (summary.seen, summary.looked_at, summary.written) == (1, False, False)
    assert "not looked at" in next(summary.lines(dry_run=False))
    [summary] = scan(open_project(tmp_path, overrides=["resolution=128"]), workers=1).datasets
    assert (summary.seen, summary.looked_at) == (2, True)


def test_a_second_scan_at_the_same_time_is_refused_and_told_who_is_at_work(tmp_path):
    draw(project(tmp_path) / "photos" / "a.png")
    with only_one(tmp_path / "work" / "manifests", "prep scan"):
        with pytest.raises(UserError, match=rf"prep scan \(process {os.getpid()} on .*, since .*\) is at work there"):
            scan(tmp_path, workers=1)
        scan(tmp_path, workers=1, dry_run=True)
    assert scan(tmp_path, workers=1).datasets[0].written


def test_faces_decide_crops_where_they_are_found_and_the_middle_where_not(tmp_path):
    entry = {"id": "photos", "instance_data_dir": "photos", "crop": True, "crop_style": "face"}
    photos = project(tmp_path, entry) / "photos"
    face = Image.open(DEMO / "astronaut_wide.jpg")
    canvas = Image.new("RGB", (face.width * 3, face.height), "gray")
    canvas.paste(face, (2 * face.width, 0))
    canvas.save(photos / "astronaut.png")
    Image.new("RGB", (300, 100), "gray").save(photos / "nobody.png")
    [summary] = scan(tmp_path, workers=1).datasets
    rows = rows_of(tmp_path)
    middle = (rows["nobody.png"].intermediary_width - rows["nobody.png"].target_width) // 2
    assert (summary.faces, summary.decoded) == (1, 2)
    assert rows["nobody.png"].crop_left == middle and rows["astronaut.png"].face[0] > 0.7
    assert rows["astronaut.png"].crop_left > 1.5 * middle
    assert "faces found in 1; the other 1 are cropped in the middle" in "\n".join(summary.lines(dry_run=False))
    assert scan(tmp_path, workers=1).datasets[0].decoded == 0


# What a later command may rely on


def test_a_look_at_a_scanned_set_leaves_it_usable(tmp_path):
    draw(project(tmp_path) / "photos" / "a.png")
    scan(tmp_path, workers=1)
    scan(tmp_path, workers=1, hashed=False)
    opened = open_project(tmp_path)
    assert len(read_manifest(opened, opened.datasets[0], ["path"])) == 1
    draw(tmp_path / "photos" / "new.png", seed=1)
    scan(tmp_path, workers=1, hashed=False)
    with pytest.raises(UserError, match="scanned with --no-hash"):
        read_manifest(opened, opened.datasets[0], ["path"])


def test_verifying_and_limits_look_at_a_set_whose_discovery_is_skipped(tmp_path):
    entry = {"id": "photos", "instance_data_dir": "photos", "skip_file_discovery": "metadata"}
    for number in range(3):
        draw(project(tmp_path, entry) / "photos" / f"{number}.png", seed=number)
    scan(tmp_path, workers=1)
    assert scan(tmp_path, workers=1, verify=True).datasets[0].decoded == 3
    assert scan(tmp_path, workers=1, limit=2).datasets[0].seen == 2


def test_another_background_reads_no_file_again_but_looks_at_pixels_anew(tmp_path):
    entry = {"id": "photos", "instance_data_dir": "photos", "near_duplicates": "report"}
    photos = project(tmp_path, entry) / "photos"
    clear = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    clear.paste((0, 0, 0, 255), (0, 0, 20, 64))
    clear.save(photos / "a.png")
    scan(tmp_path, workers=1)
    white = rows_of(tmp_path)["a.png"].phash
    project(tmp_path, {**entry, "image_policy": {"alpha_background": "black"}})
    [summary] = scan(tmp_path, workers=1).datasets
    assert (summary.read, summary.unchanged, summary.decoded) == (0, 1, 1)
    assert rows_of(tmp_path)["a.png"].phash != white


def test_one_rejected_image_of_each_kind_is_named_and_chosen_ones_are_not(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(log, "propagate", True)
    entry = {"id": "photos", "instance_data_dir": "photos", "max_num_samples": 2}
    photos = project(tmp_path, entry) / "photos"
    for number in range(5):
        draw(photos / f"{number}.png", seed=number)
        (photos / f"broken{number}.png").write_bytes(b"no picture")
    draw(photos / "narrow.png", 2, 900)
    with caplog.at_level(logging.WARNING, logger="pairline"):
        scan(tmp_path, workers=1)
    manifest = tmp_path / "work" / "manifests" / "photos.parquet"
    assert caplog.messages == [
        "photos: broken0.png: unreadable: no known image format",
        "photos: narrow.png: too narrow: 2x900, its aspect ratio rounds to 0",
        f"photos: 7 more are rejected; column `reject` of {manifest} says why",
    ]


def test_formats_that_compiled_code_must_read_are_left_to_workers_and_come_out_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(prep.reading, "_CHUNK", 4)
    for number in range(12):
        draw(project(tmp_path) / "photos" / f"{number:02d}.{('png', 'tif')[number % 2]}", 64 + number)
    [summary] = scan(tmp_path, workers=2).datasets
    rows = rows_of(tmp_path)
    assert (summary.read, summary.kept) == (12, 12)
    assert [row.width for row in rows.values()] == list(range(64, 76))
    assert [row.format for row in rows.values()] == ["PNG", "TIFF"] * 6
    assert {row.fault for row in rows.values()} == {None}
