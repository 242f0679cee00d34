"""prep plan against what the stages then do, on real photographs and the tiny checkpoint."""

import csv
import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from families import open_project
from families.checkpoints import encoder_keys
from prep.cache import cache
from prep.pairs import pairs
from prep.plan import plan
from prep.planning.epochs import _apportioned
from prep.scan import scan
from schemas.planned import PlanSummary, StagePlan
from schemas.project import Project
from schemas.rows import ImageRow, arrow_schema
from schemas.summaries import as_json
from schemas.tables import Provenance, write_table

MakeProject = Callable[..., Path]


def _prepare(project: Project):
    scan(project, workers=1)
    return pairs(project, workers=1), cache(project, workers=1)


def _stage(summary: PlanSummary, name: str) -> StagePlan:
    [stage] = [one for one in summary.stages if one.stage == name]
    return stage


def _payload(folder: Path, *columns: str) -> int:
    """Sum the bytes that shards hold."""
    tables = [pq.read_table(path, columns=list(columns)) for path in folder.glob("**/*.parquet")]
    return sum(len(value) for table in tables for name in columns for value in table[name].to_pylist())


def _edit(folder: Path, position: int, **options: object) -> None:
    """Replace options of one dataset."""
    path = folder / "multidatabackend.json"
    datasets = json.loads(path.read_text())
    datasets[position] |= options
    path.write_text(json.dumps(datasets))


def _tree(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def _batched(project: Project, epoch: int = 0) -> Counter[tuple[str, ...]]:
    """Count the batches that training plans, by the sizes of what is shown and how many there are."""
    from train.data import Shelf
    from train.order import epoch_batches

    shelf = Shelf(project, encoder_keys(project))

    def sizes(showing) -> tuple[str, ...]:
        target, _, *references = shelf.shapes(showing)
        return tuple(f"{width * 8}x{height * 8}" for _, height, width in (target, *references))

    return Counter((*sizes(batch[0]), str(len(batch))) for batch in epoch_batches(project, shelf, epoch))


def _planned(summary: PlanSummary) -> Counter[tuple[str, ...]]:
    counts: Counter[tuple[str, ...]] = Counter()
    for one in summary.epoch.buckets:
        counts[(one.target, *one.references, str(summary.train_batch_size))] += one.batches - 1
        counts[(one.target, *one.references, str(one.last))] += 1
    return +counts


def _as_it_happened(folder: Path) -> None:
    """Plan, do it, plan again: three accounts of one thing."""
    project = open_project(folder)
    before = plan(project)
    paired, cached = _prepare(project)
    after = plan(project)
    *latents, text = cached.stores
    assert before.blocked is None
    assert before.pairs == after.pairs == sum(one.pairs for one in paired.datasets)
    assert [one.looked_at for one in before.datasets] == ["not scanned yet"] * len(before.datasets)
    assert [one.looked_at for one in after.datasets] == [None] * len(after.datasets)
    for summary in (before, after):
        assert _stage(summary, "latents").needed == sum(one.needed for one in latents)
        assert _stage(summary, "text embeds").needed == text.needed
        assert _stage(summary, "latents").bytes == _payload(project.workspace / "cache" / "latents", "latent")
        assert _stage(summary, "text embeds").bytes == _payload(project.workspace / "cache" / "text", "embed", "pooled")
        assert _planned(summary) == _batched(project)
    assert _stage(before, "latents").there == 0
    assert [one.to_make for one in after.stages] == [0] * len(after.stages)
    assert after.bytes_to_write == 0
    assert not any(one.at_most for one in after.stages)


@pytest.mark.parametrize("posterior", ["sample", "moments"])
@pytest.mark.parametrize("name", ["edits", "deblur"])
def test_latents_that_are_drawn_are_planned_with_their_bytes(
    make_project: MakeProject, name: str, posterior: str
) -> None:
    _as_it_happened(make_project(name, posterior=posterior))


@pytest.mark.parametrize("degrade_at", ["target", "source"])
@pytest.mark.parametrize("crops", [1, 2])
def test_degradations_are_made_as_they_were_planned(make_project: MakeProject, crops: int, degrade_at: str) -> None:
    folder = make_project("deblur", train_batch_size=2)
    place = {"degrade_at": degrade_at, "storage": "files"}
    generators = [
        {"type": "chain", "preset": "web-jpeg", "variants": 3, "captions": ["one", "two"], **place},
        {"type": "jpeg_artifacts", "quality_mode": "range", "variants": 2, **place},
    ]
    _edit(folder, 0, crop=True, crop_style="random", crop_variants=crops, conditioning=generators)
    _as_it_happened(folder)
    project = open_project(folder)
    pictures = [path for path in project.pixel_store.rglob("*") if path.is_file()]
    stage = _stage(plan(project), "reference pictures")
    assert stage.needed == stage.there == len(pictures)
    assert len(pictures) == 6 * 5 or (crops == 2 and degrade_at == "target" and 6 * 5 < len(pictures) <= 6 * 5 * 2)
    assert plan(project).datasets[0].pairs == 6 * 3 * crops


def test_targets_that_lack_references_are_counted_as_they_are_shown(make_project: MakeProject) -> None:
    folder = make_project("edits", train_batch_size=2)
    datasets = json.loads((folder / "multidatabackend.json").read_text())
    shutil.copytree(folder / "reference", folder / "more")
    for picture in (folder / "more").glob("*.jpg"):
        picture.write_bytes(picture.read_bytes() + b"another file")
    datasets[0] |= {"on_unpaired": "train_without_reference", "conditioning_data": ["gray", "more"]}
    datasets.append({**datasets[1], "id": "more", "instance_data_dir": "more", "conditioning_type": "reference_loose"})
    (folder / "multidatabackend.json").write_text(json.dumps(datasets))
    first, second, third = sorted((folder / "more").glob("*.jpg"))[:3]
    first.unlink()
    second.write_bytes(b"no picture")
    third.unlink()
    (folder / "reference" / third.name).unlink()
    config = json.loads((folder / "config.json").read_text()) | {"conditioning_multidataset_sampling": "combined"}
    (folder / "config.json").write_text(json.dumps(config))
    _as_it_happened(folder)


def test_a_set_whose_pairs_are_faulty_blocks_the_plan_until_it_says_what_becomes_of_them(
    make_project: MakeProject,
) -> None:
    folder = make_project("edits")
    next((folder / "reference").glob("*.jpg")).unlink()
    told = plan(open_project(folder)).blocked
    assert told is not None and told.startswith("colour: prep pairs stops, as 1 of 6 targets have no proper reference")
    _edit(folder, 0, on_unpaired="drop")
    assert plan(open_project(folder)).blocked is None


@pytest.mark.parametrize("name", ["deblur", "edits", "jpeg"])
def test_a_demo_is_done_as_it_was_planned(make_project: MakeProject, name: str) -> None:
    _as_it_happened(make_project(name, train_batch_size=4, gradient_accumulation_steps=2))


def test_random_crops_and_repeats_are_planned_as_they_are_made(make_project: MakeProject) -> None:
    folder = make_project("deblur", train_batch_size=4)
    _edit(folder, 0, crop=True, crop_aspect="square", crop_variants=3, repeats=2)
    _as_it_happened(folder)
    [photos] = plan(open_project(folder)).datasets
    assert (photos.targets, photos.variants, photos.pairs, photos.showings) == (6, 3, 18, 18)


def test_targets_that_lack_references_have_random_crops_of_their_own(make_project: MakeProject) -> None:
    folder = make_project("edits")
    square = {"crop": True, "crop_aspect": "square", "crop_variants": 3}
    _edit(folder, 0, on_unpaired="train_without_reference", **square)
    sorted((folder / "reference").glob("*.jpg"))[0].unlink()
    _as_it_happened(folder)


def test_pictures_degraded_at_their_own_size_are_counted_beside_others(make_project: MakeProject) -> None:
    folder = make_project("deblur")
    kinds = [{"type": "jpeg_artifacts", "storage": "files", "degrade_at": at} for at in ("source", "target")]
    _edit(folder, 0, conditioning=kinds)
    project = open_project(folder)
    scan(project, workers=1)
    planned = _stage(plan(project), "reference pictures")
    [paired] = pairs(project, workers=1).datasets
    assert planned.to_make == paired.generated == 12
    assert _stage(plan(project), "reference pictures").there == 12


def test_loose_references_of_another_size_make_buckets_of_their_own(make_project: MakeProject) -> None:
    folder = make_project("edits", train_batch_size=2)
    _edit(folder, 1, conditioning_type="reference_loose", resolution=192)
    _as_it_happened(folder)


@pytest.mark.parametrize("sampling", ["random", "combined"])
def test_several_references_are_planned_as_they_are_sampled(make_project: MakeProject, sampling: str) -> None:
    folder = make_project("edits", train_batch_size=4, conditioning_multidataset_sampling=sampling)
    _edit(folder, 0, conditioning=[{"type": "jpeg_artifacts", "quality": 20}])
    _as_it_happened(folder)


def test_captions_of_references_stand_in_for_the_targets(make_project: MakeProject) -> None:
    folder = make_project("edits")
    _edit(folder, 1, caption_strategy="filename")
    for text in list((folder / "target").glob("*.txt"))[:2]:
        shutil.copy(text, folder / "reference")
    _as_it_happened(folder)
    _edit(folder, 1, caption_strategy="textfile")  # of some references only
    project = open_project(folder)
    planned = plan(project)
    assert _stage(planned, "text embeds").needed == _prepare(project)[1].stores[1].needed


def test_a_held_out_set_is_cached_but_in_no_batch(make_project: MakeProject) -> None:
    folder = make_project("edits", train_batch_size=2)
    datasets = json.loads((folder / "multidatabackend.json").read_text())
    _solid(folder / "held", (200, 150))
    held = {"id": "held", "instance_data_dir": "held", "resolution": 128, "dataset_type": "eval"}
    (folder / "multidatabackend.json").write_text(json.dumps([*datasets, held]))
    _as_it_happened(folder)
    summary = plan(open_project(folder))
    assert {one.dataset_id: one.role for one in summary.datasets} == {
        "colour": "targets", "gray": "references", "held": "held out",
    }  # fmt: skip
    assert summary.epoch.showings == 6


def test_of_a_share_of_a_set_the_number_is_exact_and_the_buckets_are_about_right(make_project: MakeProject) -> None:
    folder = make_project("deblur", photos=12, train_batch_size=2)
    _edit(folder, 0, probability=0.5, repeats=1)
    project = open_project(folder)
    summary = plan(project)
    _prepare(project)
    assert not summary.epoch.exact
    assert summary.epoch.showings == sum(int(key[-1]) * count for key, count in _batched(project).items()) == 12
    assert any("about" in line for line in summary.lines())


def test_steps_and_epochs_follow_from_each_other(make_project: MakeProject) -> None:
    folder = make_project("edits", train_batch_size=2, gradient_accumulation_steps=3, max_train_steps=10)
    by_steps = plan(open_project(folder)).epoch
    assert by_steps.epochs == round(10 * 3 / by_steps.batches, 2)
    by_epochs = plan(open_project(folder, overrides=["max_train_steps=0", "num_train_epochs=7"])).epoch
    assert (by_epochs.steps, by_epochs.set_by) == (by_epochs.batches * 7 // 3, "num_train_epochs")
    neither = plan(open_project(folder, overrides=["max_train_steps=0"])).epoch
    assert (neither.steps, neither.set_by) == (1000, "default")


def test_planning_writes_nothing(make_project: MakeProject) -> None:
    folder = make_project("deblur")
    shutil.rmtree(folder / "work")
    before = _tree(folder)
    plan(open_project(folder))
    assert _tree(folder) == before
    _prepare(open_project(folder))
    before = _tree(folder)
    plan(open_project(folder))
    plan(open_project(folder, overrides=["resolution=256"]))
    assert _tree(folder) == before


def test_planning_loads_no_tensor_library(make_project: MakeProject) -> None:
    folder = make_project("deblur")
    _prepare(open_project(folder))
    code = (
        "import sys; from prep.plan import plan; plan(sys.argv[1]);"
        "assert not {'torch', 'transformers', 'diffusers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True)


def test_a_stale_manifest_is_not_believed(make_project: MakeProject) -> None:
    folder = make_project("edits")
    scan(open_project(folder), workers=1)
    _edit(folder, 0, resolution=256)
    summary = plan(open_project(folder))
    assert [one.looked_at for one in summary.datasets] == ["its settings changed", None]
    other = open_project(folder, workspace=folder / "other")
    assert summary.epoch == plan(other).epoch
    scan(open_project(folder), workers=1, limit=2)
    assert [one.looked_at for one in plan(open_project(folder)).datasets] == ["scanned with --limit 2"] * 2
    manifest = open_project(folder).manifest("gray")
    scan(open_project(folder), workers=1)
    manifest.write_bytes(manifest.read_bytes()[:-4])
    assert [one.looked_at for one in plan(open_project(folder)).datasets] == [None, "its manifest cannot be read"]


def test_equal_files_count_once_when_they_are_hashed_and_are_a_bound_before(make_project: MakeProject) -> None:
    folder = make_project("deblur")
    _edit(folder, 0, crop_style="center")  # a random crop depends on the path
    shutil.copy(next((folder / "photos").glob("*.jpg")), folder / "photos" / "again.jpg")
    (folder / "photos" / "again.txt").write_text("the same again")
    project = open_project(folder)
    before, cached = plan(project), _prepare(project)[1]
    after = plan(project)
    assert (_stage(before, "latents").needed, _stage(before, "latents").at_most) == (14, True)
    assert (_stage(after, "latents").needed, _stage(after, "latents").at_most) == (12, False)
    assert cached.stores[0].needed == 12
    assert any("upper bounds" in note for note in before.notes)
    assert not any("upper bounds" in note for note in after.notes)


def test_what_a_half_filled_cache_holds_is_counted(make_project: MakeProject) -> None:
    project = open_project(make_project("edits"))
    scan(project, workers=1)
    pairs(project, workers=1)
    cache(project, workers=1, limit=5)
    summary = plan(project)
    latents, text = _stage(summary, "latents"), _stage(summary, "text embeds")
    assert (latents.there, text.there) == (5, 5)
    assert cache(project, workers=1).stores[0].encoded == latents.to_make


def test_pairs_that_cannot_be_are_counted_by_the_reasons_that_prep_pairs_gives(make_project: MakeProject) -> None:
    folder = make_project("edits", photos=8)
    first, second, third, fourth = sorted((folder / "reference").glob("*.jpg"))[:4]
    first.unlink()
    second.rename(second.with_suffix(".jpeg"))
    third.write_bytes(b"no picture")
    Image.open(fourth).resize((400, 100)).save(fourth)
    _edit(folder, 0, on_unpaired="drop")
    project = open_project(folder)
    before, (paired, _) = plan(project), _prepare(project)
    assert dict(before.datasets[0].unpaired) == dict(paired.datasets[0].rejected)
    assert dict(before.datasets[0].unpaired) == {"no reference": 2, "reference rejected": 1, "aspect differs": 1}
    assert before.datasets[0].unpaired == plan(project).datasets[0].unpaired
    assert before.datasets[0].targets == 4


def test_sizes_of_the_real_checkpoint_are_known_without_it(tmp_path: Path, make_project: MakeProject) -> None:
    folder = make_project("edits", pretrained_model_name_or_path=None)
    for image in (folder / "target").glob("*.jpg"):
        Image.open(image).resize((1024, 1024)).save(image)
        Image.open(image).convert("L").save(folder / "reference" / image.name)
    for position in (0, 1):
        _edit(folder, position, resolution=1024)
    summary = plan(open_project(folder))
    latents, text = _stage(summary, "latents"), _stage(summary, "text embeds")
    assert latents.bytes == latents.needed * 512 * 1024
    assert text.bytes == text.needed * (512 * 4096 * 2 + 768 * 2)
    assert not latents.assumed and not text.assumed
    assert summary.smaller == {"resolution 768": latents.bytes * 9 // 16, "resolution 512": latents.bytes // 4}


def test_a_checkpoint_that_is_not_here_is_reckoned_as_the_flavours_own_and_said_so(make_project: MakeProject) -> None:
    folder = make_project("edits")
    shutil.rmtree(folder / "work" / "models")
    summary = plan(open_project(folder))
    assert _stage(summary, "text embeds").assumed
    assert any("checkpoint tiny is not on this machine" in note for note in summary.notes)
    _prepare(open_project(folder))
    assert not _stage(plan(open_project(folder)), "text embeds").assumed


def test_what_is_cached_for_another_checkpoint_is_not_taken_for_this_ones(make_project: MakeProject) -> None:
    folder = make_project("edits")
    _prepare(open_project(folder))
    summary = plan(open_project(folder, overrides=["pretrained_model_name_or_path=null"]))
    assert (_stage(summary, "latents").there, _stage(summary, "text embeds").there) == (0, 0)
    assert any("all is counted as to be encoded" in note for note in summary.notes)


def test_half_the_random_crops_halve_what_moves(make_project: MakeProject) -> None:
    folder = make_project("deblur")
    _edit(folder, 0, crop=True, crop_aspect="square", crop_variants=4)
    summary = plan(open_project(folder))
    assert summary.smaller["crop_variants 2"] == pytest.approx(_stage(summary, "latents").bytes / 2, rel=0.05)


def test_the_size_of_degraded_pictures_is_an_assumption_of_the_right_order(make_project: MakeProject) -> None:
    folder = make_project("deblur")
    _edit(folder, 0, conditioning=[{"type": "superresolution", "blur_radius": 1.5, "storage": "files"}])
    project = open_project(folder)
    planned = _stage(plan(project), "reference pictures")
    _prepare(project)
    written = sum(path.stat().st_size for path in project.pixel_store.rglob("*.png"))
    assert planned.assumed
    assert planned.needed == 6
    assert written / 2 < planned.bytes < written * 2
    assert _stage(plan(project), "reference pictures").bytes == written


def test_a_disk_that_is_too_small_is_told(make_project: MakeProject, monkeypatch: pytest.MonkeyPatch) -> None:
    project = open_project(make_project("deblur"))
    assert plan(project).warnings == ()
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(100, 90, 10))
    summary = plan(project)
    [disk] = summary.disks
    assert (disk.free_bytes, disk.needed_bytes) == (10, summary.bytes_to_write)
    assert "would be written, 0.0 KiB are free" in summary.warnings[0]
    assert any("not enough" in line for line in summary.lines())


# Nothing to train on


def _solid(folder: Path, size: tuple[int, int], count: int = 3, mode: str = "RGB") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.new(mode, size, number).save(folder / f"{number}.png")


def _alone(tmp_path: Path, dataset: Mapping[str, object], **trainer: object) -> Path:
    """Make a project of one set of targets in `images`."""
    folder = tmp_path / "alone"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"pretrained_model_name_or_path": "tiny", **trainer}))
    entry = {"id": "set", "instance_data_dir": "images", "resolution": 128, **dataset}
    (folder / "multidatabackend.json").write_text(json.dumps([entry]))
    return folder


@pytest.mark.parametrize(
    ("dataset", "size", "mode", "told", "remedy"),
    [
        (
            {"minimum_image_size": 1024}, (800, 600), "RGB",
            "set: all 3 images: too small: minimum_image_size 1024 keeps none, the largest is 800x600; set "
            "minimum_image_size to 512, or to 0 for any size",
            {"minimum_image_size": 512},
        ),
        (
            {"minimum_image_size": 1024, "resolution_type": "pixel"}, (800, 600), "RGB",
            "the largest is 800x600; set minimum_image_size to 512",
            {"minimum_image_size": 512},
        ),
        (
            {"minimum_image_size": 2.0, "resolution_type": "area", "resolution": 0.25}, (800, 600), "RGB",
            "minimum_image_size 2 keeps none, the largest is 800x600; set minimum_image_size to 0.26",
            {"minimum_image_size": 0.26},
        ),
        (
            {"max_upscale_threshold": 0.1, "resolution": 1024}, (300, 280), "RGB",
            "at resolution 1024 each would be enlarged by more than max_upscale_threshold 0.1, the largest is 300x280; "
            "set resolution to 256",
            {"resolution": 256},
        ),
        (
            {"minimum_aspect_ratio": 1.5}, (200, 300), "RGB",
            "too narrow: minimum_aspect_ratio 1.5 keeps none, the widest is 0.67; set minimum_aspect_ratio to 0.66",
            {"minimum_aspect_ratio": 0.66},
        ),
        (
            {"maximum_aspect_ratio": 1.0}, (300, 200), "RGB", "the narrowest is 1.50; set maximum_aspect_ratio to 1.5",
            {"maximum_aspect_ratio": 1.5},
        ),
        (
            {"image_policy": {"alpha": "reject"}}, (200, 200), "RGBA",
            'transparent: image_policy.alpha is "reject"; set it to "compose"',
            {"image_policy": {"alpha": "compose"}},
        ),
        (
            {"image_policy": {"maximum_megapixels": 0.01}}, (200, 200), "RGB",
            "too large: image_policy.maximum_megapixels 0.01 keeps none, the smallest has 0.04; set it to 1",
            {"image_policy": {"maximum_megapixels": 1}},
        ),
        (
            {"caption_strategy": "textfile"}, (200, 200), "RGB",
            'no caption: 3 text files are missing; caption_strategy "filename" or "instanceprompt" needs none',
            {"caption_strategy": "filename"},
        ),
        (
            {"dataset_type": "eval"}, (200, 200), "RGB",
            'every dataset is held out: dataset_type of set is "eval"; make one dataset_type "image"',
            {"dataset_type": "image"},
        ),
    ],
)  # fmt: skip
def test_no_batch_at_all_is_explained_and_the_remedy_works(tmp_path, dataset, size, mode, told, remedy) -> None:
    _solid(tmp_path / "alone" / "images", size, mode=mode)
    summary = plan(_alone(tmp_path, dataset))
    assert summary.epoch.batches == 0
    assert told in summary.blocked
    mended = plan(_alone(tmp_path, dataset | remedy))
    assert mended.blocked is None
    assert mended.epoch.showings == 3


def test_an_evaluation_set_that_is_the_only_one_is_named(tmp_path) -> None:
    _solid(tmp_path / "alone" / "images", (200, 200))
    blocked = plan(_alone(tmp_path, {}, eval_dataset_id="set")).blocked
    assert blocked.startswith('every dataset is held out: eval_dataset_id is "set"; leave eval_dataset_id out')


def test_an_empty_folder_and_damaged_files_are_named(tmp_path) -> None:
    images = tmp_path / "alone" / "images"
    images.mkdir(parents=True)
    assert f"set: no image in {images}" in plan(_alone(tmp_path, {})).blocked
    (images / "one.jpg").write_bytes(b"nothing")
    blocked = plan(_alone(tmp_path, {})).blocked
    assert "set: all 1 images: unreadable" in blocked
    assert "(first one.jpg)" in blocked


def test_several_reasons_are_told_the_most_frequent_first(tmp_path) -> None:
    _solid(tmp_path / "alone" / "images", (300, 100), 3)
    (tmp_path / "alone" / "images" / "broken.jpg").write_bytes(b"nothing")
    blocked = plan(_alone(tmp_path, {"maximum_aspect_ratio": 2})).blocked
    assert blocked.startswith("set: 3 of 4 images: too wide")
    assert "1 of 4 images: unreadable" in blocked


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda path: path.unlink(), "all 6 targets have no reference: gray has no image in"),
        (lambda path: path.rename(path.with_suffix(".jpeg")), "gray has no astronaut.jpg, but astronaut.jpeg;"),
        (
            lambda path: path.write_bytes(b""),
            "all 6 targets have no proper reference, first reference rejected: gray/astronaut.jpg",
        ),
        (lambda path: Image.new("RGB", (400, 90)).save(path), "first aspect differs: gray/astronaut.jpg is 400x90"),
    ],
)
def test_references_that_are_all_missing_or_unfit_are_named(make_project: MakeProject, spoil, told) -> None:
    folder = make_project("edits")
    for path in (folder / "reference").glob("*.jpg"):
        spoil(path)
    summary = plan(open_project(folder))
    assert told in summary.blocked
    assert summary.stages[-1].needed == 1  # the empty prompt


def test_one_empty_set_of_several_is_a_note(make_project: MakeProject) -> None:
    folder = make_project("edits")
    datasets = json.loads((folder / "multidatabackend.json").read_text())
    (folder / "nothing").mkdir()
    other = {"id": "other", "instance_data_dir": "nothing"}
    (folder / "multidatabackend.json").write_text(json.dumps([*datasets, other]))
    summary = plan(open_project(folder))
    assert summary.blocked is None
    assert summary.epoch.showings == 6
    assert any(note.startswith("other gives no pair: no image in") for note in summary.notes)


def test_images_of_a_list_that_are_not_downloaded_block_nothing(tmp_path) -> None:
    folder = _alone(tmp_path, {"type": "csv", "csv_file": "list.csv"})
    with (folder / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["url"], *[[f"https://example.invalid/{number}.jpg"] for number in range(4)]])
    summary = plan(folder)
    assert summary.blocked is None
    assert (summary.datasets[0].seen, summary.datasets[0].absent, summary.epoch.batches) == (4, 4, 0)
    assert any("4 of the images are not downloaded yet" in note for note in summary.notes)


# What is told, and how fast


def test_lines_fit_a_hundred_columns_and_the_document_is_json(tmp_path, make_project: MakeProject) -> None:
    for folder in (make_project("deblur", train_batch_size=4), _alone(tmp_path, {"minimum_image_size": 1024})):
        _solid(tmp_path / "alone" / "images", (200, 200))
        summary = plan(folder)
        for line in summary.lines():
            assert len(line) <= 100 or str(tmp_path) in line, line
        document = json.loads(as_json(summary))
        assert document["command"] == "prep plan"
        assert document["epoch"]["batches"] == summary.epoch.batches
    told = " ".join(line.strip() for line in summary.lines())
    assert f"nothing would be trained on: {summary.blocked}" in told


def test_many_buckets_are_told_in_short(tmp_path) -> None:
    images = tmp_path / "alone" / "images"
    images.mkdir(parents=True)
    for number in range(12):
        Image.new("RGB", (200 + 60 * number, 200)).save(images / f"{number}.png")
    summary = plan(_alone(tmp_path, {}, train_batch_size=2, aspect_bucket_alignment=16))
    lines = list(summary.lines())
    assert len(summary.epoch.buckets) > 8
    assert any(line.startswith(f"  and {len(summary.epoch.buckets) - 8} more with") for line in lines)


def test_200_000_images_are_planned_in_seconds(tmp_path) -> None:
    folder, count = _alone(tmp_path, {"caption_strategy": "filename", "crop_variants": 4}), 200_000
    (folder / "images").mkdir()
    project = open_project(folder)
    sizes = np.tile([[1024, 1024], [832, 1216], [1216, 832], [768, 1344]], (count // 4, 1))
    columns = {
        "dataset_id": pa.repeat("set", count),
        "path": pa.array([f"{number:07}.jpg" for number in range(count)]),
        "image_id": pa.array([f"{number // 2:032x}" for number in range(count)]),
        "captions": pa.array([[f"caption {number % 1000}"] for number in range(count)]),
        "face": pa.array([[]] * count, pa.list_(pa.float64())),
        "width": sizes[:, 0], "height": sizes[:, 1], "target_width": sizes[:, 0], "target_height": sizes[:, 1],
        "intermediary_width": sizes[:, 0], "intermediary_height": sizes[:, 1] + 40,
        "crop_top": np.zeros(count, np.int64), "crop_left": np.zeros(count, np.int64),
        "size_bytes": np.ones(count, np.int64), "mtime_ns": np.ones(count, np.int64),
    }  # fmt: skip
    schema = arrow_schema(ImageRow)
    table = pa.table(
        [
            pa.array(columns[field.name], field.type) if field.name in columns else pa.nulls(count, field.type)
            for field in schema
        ],
        schema=schema,
    )
    write_table(
        project.manifest("set"), table, ImageRow, Provenance(project.scan_settings(project.dataset("set")), "x")
    )
    start = time.monotonic()
    summary = plan(project)
    assert time.monotonic() - start < 6
    assert (summary.epoch.showings, len(summary.epoch.buckets)) == (count, 4)
    assert _stage(summary, "latents").at_most
    assert count < _stage(summary, "latents").needed <= 4 * count
    assert _stage(summary, "text embeds").needed == 1001


def test_expected_showings_are_rounded_so_that_they_add_up_and_none_is_told_of_none():
    halves = {(name, ()): Fraction(1, 2) for name in "abc"} | {("d", ()): Fraction(7, 2)}
    rounded = _apportioned(halves, 5)
    assert sum(rounded.values()) == 5 and rounded["d", ()] in (3, 4) and 0 not in rounded.values()
    assert _apportioned({("a", ()): Fraction(3), ("b", ()): Fraction(2)}, 5) == {("a", ()): 3, ("b", ()): 2}
