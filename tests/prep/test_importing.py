"""prep import: caches in the layouts of other trainers, next to what prep cache encodes from the same pictures."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import foreign
import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from prep.cache import cache
from prep.cli import app
from prep.geometry import Size
from prep.images import frame
from prep.importing.found import FoundLatent, Wanted
from prep.importing.musubi import Musubi
from prep.importing.proof import disproved, resampling_of
from prep.importing.run import import_cache
from prep.importing.trial import compared
from prep.pairs import pairs
from prep.pixels import Picture
from prep.places import Folder
from prep.scan import scan
from schemas.errors import UserError
from schemas.imported import ImportedStore, ImportSummary
from schemas.rows import Geometry
from schemas.shards import ShardIndex, headers_of

MakeProject = Callable[..., Path]

SIZES: tuple[Size, ...] = ((128, 128), (128, 128), (192, 128))  # of the pictures: buckets of their own size
NAMES = ("a.png", "b.png", "deep/c.png")
PROMPTS = ("turn it into colour", "make it bright", "")


@dataclass
class Scene:
    """A project of pictures that need neither resize nor crop, and what its latents and embeds are."""

    folder: Path
    encoders: foreign.Encoders
    cache: Path

    def picture(self, side: str, name: str) -> Image.Image:
        return Image.open(self.folder / side / name).convert("RGB")

    def latent(self, side: str, name: str, **options: bool) -> torch.Tensor:
        return self.encoders.latent(self.picture(side, name), **options)

    def run(self, cache: Path | None = None, **options: object) -> ImportSummary:
        return import_cache(self.folder, cache or self.cache, **options)  # type: ignore[arg-type]

    def stored(self) -> dict[str, dict[str, object]]:
        """Return every row of the stores."""
        found: dict[str, dict[str, object]] = {}
        for kind in ("latents", "text"):
            for encoder in (self.folder / "work" / "cache" / kind).glob("*"):
                index = ShardIndex(encoder)
                keys = [key for _, _, keys in headers_of(index.store, list(index.headers)) for key in keys]
                found |= {key: index.read(key) for key in keys}
        return found

    def rescan(self) -> None:
        scan(self.folder), pairs(self.folder)


@pytest.fixture
def scene(make_project: MakeProject, tmp_path: Path) -> Scene:
    folder = make_project("edits", photos=3)
    photos = sorted((folder / "target").glob("*.jpg"))
    for side in ("target", "reference"):
        for name, size, source in zip(NAMES, SIZES, photos, strict=True):
            picture = Image.open(folder / side / source.name).convert("RGB").resize(size, Image.Resampling.BICUBIC)
            (folder / side / name).parent.mkdir(exist_ok=True)
            picture.save(folder / side / name)
        for file in (*(folder / side).glob("*.jpg"), *(folder / side).glob("*.txt")):
            file.unlink()
    for name, prompt in zip(NAMES, PROMPTS, strict=True):
        if prompt:
            (folder / "target" / name).with_suffix(".txt").write_text(prompt)
    (folder / "target" / "deep" / "c.txt").write_text(PROMPTS[1])
    settings(folder, resolution_type="pixel")
    scene = Scene(folder, foreign.Encoders(folder), tmp_path / "cache")
    scene.rescan()
    return scene


def settings(folder: Path, **options: object) -> None:
    """Set options of every dataset."""
    path = folder / "multidatabackend.json"
    path.write_text(json.dumps([dataset | options for dataset in json.loads(path.read_text())]))


def simpletuner(scene: Scene, side: str, dataset_id: str, *, zipped: bool = False, drawn: bool = False) -> Path:
    """Write the cache and the metadata of one side."""
    folder = scene.cache / side
    records = {}
    for name, size in zip(NAMES, SIZES, strict=True):
        foreign.simpletuner_latent(folder, name, scene.latent(side, name, drawn=drawn), zipped=zipped)
        sizes = {"original_size": size, "target_size": size, "intermediary_size": size}
        records[name] = {**sizes, "crop_coordinates": (0, 0), "aspect_ratio": round(size[0] / size[1], 2)}
    foreign.simpletuner_metadata(scene.folder / side, dataset_id, records, {"crop": False, "crop_style": "random"})
    return folder


def simpletuner_texts(scene: Scene) -> Path:
    for prompt in PROMPTS:
        foreign.simpletuner_text(scene.cache / "text", prompt, *scene.encoders.prompt(prompt))
    return scene.cache / "text"


def musubi(scene: Scene) -> Path:
    for name, size in zip(NAMES, SIZES, strict=True):
        foreign.musubi_latent(scene.cache, name, size, scene.latent("target", name), scene.latent("reference", name))
        prompt = PROMPTS[0] if name == NAMES[0] else PROMPTS[1]
        foreign.musubi_text(scene.cache, name, prompt, *scene.encoders.prompt(prompt))
    return scene.cache


def part(summary: ImportSummary, name: str) -> ImportedStore:
    [found] = [store for store in summary.stores if store.name == name]
    return found


def kinds(summary: ImportSummary, name: str) -> dict[str, int]:
    return dict(part(summary, name).refused)


def assert_as_encoded(scene: Scene, count: int) -> None:
    """Hold what was imported against what prep cache makes of the same project.

    Embeds are equal to the bit. Some values of latents are rounded to the next bfloat16, for pixels in another order in
    memory give other last bits of a float32.
    """
    imported = scene.stored()
    shutil.rmtree(scene.folder / "work" / "cache")
    cache(scene.folder)
    encoded = scene.stored()
    assert len(imported) == count
    for key, row in imported.items():
        assert encoded[key].keys() == row.keys()
        if "latent" in row:
            ours, theirs = (_floats(one["latent"]) for one in (encoded[key], row))
            assert np.linalg.norm(ours - theirs) < 2**-10 * np.linalg.norm(ours)
        else:
            assert all(np.array_equal(np.asarray(row[name]), np.asarray(encoded[key][name])) for name in row)


def _floats(bits: object) -> np.ndarray:
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


# Taken over


@pytest.mark.parametrize("zipped", [False, True])
def test_simpletuners_cache_becomes_the_rows_that_prep_cache_encodes(scene: Scene, zipped: bool) -> None:
    targets = scene.run(simpletuner(scene, "target", "colour", zipped=zipped), dataset="colour")
    assert part(targets, "colour").imported == 3 and targets.format == "simpletuner" and not targets.unclaimed
    references = scene.run(simpletuner(scene, "reference", "gray", zipped=zipped), dataset="gray")
    assert part(references, "gray").imported == 3
    assert part(scene.run(simpletuner_texts(scene)), "text").imported == 3
    assert_as_encoded(scene, 9)


def test_musubis_cache_has_targets_controls_and_captions(scene: Scene) -> None:
    summary = scene.run(musubi(scene))
    assert [store.imported for store in summary.stores] == [3, 3, 2]
    assert kinds(summary, "text") == {"not in this cache": 1}  # the empty prompt
    assert_as_encoded(scene, 8)


@pytest.mark.parametrize("newer", [False, True])
def test_sd_scripts_caches_lie_beside_the_images_and_tell_no_captions(scene: Scene, newer: bool) -> None:
    for name, size in zip(NAMES, SIZES, strict=True):
        image, latent = scene.folder / "target" / name, scene.latent("target", name)
        if newer:
            foreign.sd_scripts_safetensors(image, size, latent)
        else:
            foreign.sd_scripts_latent(image, size, [torch.zeros(16, 8, 8), latent])
    np.savez(scene.folder / "target" / "a_flux_te.npz", t5_out=np.zeros((512, 64)))
    summary = scene.run(scene.folder / "target", dataset="colour")
    assert summary.format == "sd-scripts" and part(summary, "colour").imported == 3
    assert kinds(summary, "text") == {"caption not recorded": 3}
    assert_as_encoded(scene, 3)


def test_a_second_run_imports_nothing_and_prep_cache_encodes_only_the_rest(scene: Scene) -> None:
    musubi(scene)
    scene.run()
    before = scene.stored()
    again = scene.run()
    assert [(store.present, store.imported) for store in again.stores] == [(3, 0), (3, 0), (2, 0)]
    assert not again.unclaimed and all(store.verification is None for store in again.stores)
    assert scene.stored().keys() == before.keys()
    assert [store.encoded for store in cache(scene.folder).stores] == [0, 1]


def test_a_dry_run_compares_and_counts_but_writes_nothing(scene: Scene) -> None:
    musubi(scene)
    files = sorted(path for path in (scene.folder / "work").rglob("*") if path.is_file())
    summary = scene.run(dry_run=True)
    assert [store.imported for store in summary.stores] == [3, 3, 2]
    assert [store.verification.checked for store in summary.stores if store.verification] == [3, 3, 2]
    assert sorted(path for path in (scene.folder / "work").rglob("*") if path.is_file()) == files


def test_a_recorded_crop_in_the_middle_is_proof_and_one_at_random_is_not(scene: Scene) -> None:
    settings(scene.folder, crop=True, crop_aspect="square", crop_style="center")
    scene.rescan()
    left = (192 - 128) // 2
    crop = scene.picture("target", NAMES[2]).crop((left, 0, left + 128, 128))
    foreign.simpletuner_latent(scene.cache, NAMES[2], scene.encoders.latent(crop))
    record = {"original_size": (192, 128), "intermediary_size": (192, 128), "crop_coordinates": (0, left)}
    images = scene.folder / "target"
    for style, expected in (("random", 0), ("center", 1)):
        foreign.simpletuner_metadata(images, "colour", {NAMES[2]: record}, {"crop": True, "crop_style": style})
        summary = scene.run(dataset="colour")
        assert part(summary, "colour").imported == expected
        assert ("crop not recorded" in kinds(summary, "colour")) == (expected == 0)
    assert_as_encoded(scene, 1)


def test_a_strict_reference_without_a_record_of_its_own_has_that_of_its_target(scene: Scene) -> None:
    simpletuner(scene, "target", "colour")
    folder = simpletuner(scene, "reference", "gray")
    for file in (scene.folder / "reference").glob("aspect_ratio_*.json"):
        file.unlink()
    assert part(scene.run(folder, dataset="gray"), "gray").imported == 3


# Refused


def test_one_file_that_two_images_ask_for_is_nobodys(scene: Scene) -> None:
    folder = simpletuner(scene, "target", "colour")
    summary = scene.run(folder)  # both sides have a picture of each name
    assert kinds(summary, "colour") == kinds(summary, "gray") == {"ambiguous": 3}
    assert not scene.stored()


def test_draws_from_the_posterior_are_told_and_not_taken_for_its_mode(scene: Scene) -> None:
    summary = scene.run(simpletuner(scene, "target", "colour", drawn=True), dataset="colour")
    verification = part(summary, "colour").verification
    assert summary.failed and verification is not None and verification.checked == 3
    assert "draws from the posterior" in str(verification.fault)
    assert kinds(summary, "colour") == {"sample not equal": 3} and not scene.stored()


def test_latents_of_another_vae_are_not_taken(scene: Scene) -> None:
    generator = torch.Generator().manual_seed(3)
    for weight in scene.encoders.vae.parameters():
        weight.data += 0.02 * torch.randn(weight.shape, generator=generator)
    summary = scene.run(simpletuner(scene, "target", "colour"), dataset="colour")
    verification = part(summary, "colour").verification
    assert verification is not None and verification.worst > verification.tolerance
    assert "other weights" in str(verification.fault) and not scene.stored()


def test_embeds_of_another_length_or_encoder_are_not_taken(scene: Scene) -> None:
    embed, pooled = scene.encoders.prompt(PROMPTS[0])
    foreign.simpletuner_text(scene.cache, PROMPTS[0], embed[:256], pooled)
    assert kinds(scene.run(), "text") == {"not in this cache": 2, "another shape": 1}
    foreign.simpletuner_text(scene.cache, PROMPTS[0], embed * 1.1, pooled)
    summary = scene.run()
    assert kinds(summary, "text") == {"not in this cache": 2, "sample not equal": 1} and summary.failed
    assert not scene.stored()


def test_each_damaged_or_foreign_file_costs_itself_alone(scene: Scene) -> None:
    folder = simpletuner(scene, "target", "colour")
    first = foreign.simpletuner_latent(folder, NAMES[0], scene.latent("target", NAMES[0]))
    first.write_bytes(first.read_bytes()[:-200])
    spoilt = scene.latent("target", NAMES[1])
    spoilt[3, 2, 1] = torch.nan
    foreign.simpletuner_latent(folder, NAMES[1], spoilt)
    foreign.simpletuner_latent(folder, "nobody.png", spoilt)
    summary = scene.run(folder, dataset="colour")
    assert kinds(summary, "colour") == {"unreadable": 1, "not finite": 1}
    assert part(summary, "colour").imported == 1
    assert [Path(path).parent for path in summary.unclaimed] == [folder]
    assert_as_encoded(scene, 1)


def test_a_flipped_bit_in_a_tensor_is_noticed(scene: Scene) -> None:
    folder = simpletuner(scene, "target", "colour")
    path = foreign.simpletuner_latent(folder, NAMES[0], scene.latent("target", NAMES[0]))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert kinds(scene.run(folder, dataset="colour"), "colour") == {"unreadable": 1}


class _Harmful:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> object:
        return Path.touch, (self.path,)


def test_a_file_that_would_run_code_is_refused_and_runs_none(scene: Scene, tmp_path: Path) -> None:
    folder = simpletuner(scene, "target", "colour")
    touched = tmp_path / "touched"
    path = foreign.simpletuner_latent(folder, NAMES[0], scene.latent("target", NAMES[0]))
    foreign.pt(_Harmful(touched), path)
    summary = scene.run(folder, dataset="colour")
    assert kinds(summary, "colour") == {"unsafe": 1} and not touched.exists()
    path.write_bytes(pickle.dumps(_Harmful(touched)))
    assert part(scene.run(folder, dataset="colour"), "colour").imported == 0 and not touched.exists()


def test_an_image_that_changed_since_is_not_that_of_its_latent(scene: Scene) -> None:
    folder = simpletuner(scene, "target", "colour")
    image = scene.folder / "target" / NAMES[0]
    after = (folder / "x").parent.stat().st_mtime_ns + 10**10
    os.utime(image, ns=(after, after))
    assert kinds(scene.run(folder, dataset="colour"), "colour") == {"changed since prep scan": 1}
    scene.rescan()
    shutil.rmtree(scene.folder / "work" / "cache")
    assert kinds(scene.run(folder, dataset="colour"), "colour") == {"image newer than its latent": 1}


def test_pictures_that_trainers_read_differently_are_left_to_prep_cache(scene: Scene) -> None:
    picture = scene.picture("target", NAMES[0])
    turned, clear = Image.Exif(), picture.convert("RGBA")
    turned[0x0112] = 3
    clear.putalpha(100)
    picture.save(scene.folder / "target" / NAMES[0], exif=turned)
    clear.save(scene.folder / "target" / NAMES[1])
    scene.rescan()
    folder = simpletuner(scene, "target", "colour")
    assert kinds(scene.run(folder, dataset="colour"), "colour") == {"read differently elsewhere": 2}


def test_metadata_that_is_missing_or_says_otherwise_refuses_its_image(scene: Scene) -> None:
    folder = simpletuner(scene, "target", "colour")
    path = scene.folder / "target" / "aspect_ratio_bucket_metadata_colour.json"
    records = json.loads(path.read_text())
    first, second, third = (str(scene.folder / "target" / name) for name in NAMES)
    records[first]["original_size"] = [256, 256]
    records[second]["intermediary_size"] = [160, 160]
    del records[third]
    path.write_text(json.dumps(records))
    assert kinds(scene.run(folder, dataset="colour"), "colour") == {
        "another image": 1,
        "another resize": 1,
        "geometry unknown": 1,
    }


def test_degraded_references_are_counted_for_they_are_in_no_other_cache(
    make_project: MakeProject, tmp_path: Path
) -> None:
    folder = make_project("deblur", photos=2)
    scan(folder), pairs(folder)
    scene = Scene(folder, foreign.Encoders(folder), tmp_path / "cache")
    foreign.simpletuner_text(scene.cache, "sharpen image", *scene.encoders.prompt("sharpen image"))
    summary = scene.run()
    assert kinds(summary, "photos, resized")["degraded here, and so in no other cache"] == 2
    assert part(summary, "text").imported == 1


def test_a_folder_that_holds_nothing_or_two_formats_is_told_of(scene: Scene, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        scene.run(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no cache files of simpletuner or musubi or sd-scripts"):
        scene.run(tmp_path / "empty")
    musubi(scene)
    simpletuner_texts(scene)
    with pytest.raises(UserError, match="caches of simpletuner and musubi; say which with --format"):
        scene.run()
    assert scene.run(format="musubi").format == "musubi"
    with pytest.raises(UserError, match="one of auto, simpletuner"):
        scene.run(format="onetrainer")
    with pytest.raises(UserError, match="not a dataset of this project; it has colour, gray"):
        scene.run(dataset="color")


def test_the_command_reports_every_reason_and_fails_if_a_sample_does(scene: Scene) -> None:
    folder = simpletuner(scene, "target", "colour", drawn=True)
    told = CliRunner().invoke(app, ["import", str(scene.folder), str(folder), "--dataset", "colour"])
    assert told.exit_code == 1 and "refused 3: sample not equal" in told.output
    assert "encoded again 3: they differ by at most" in told.output
    simpletuner(scene, "target", "colour")
    arguments = ["import", str(scene.folder), str(folder), "--dataset", "colour", "--sample", "1", "--json"]
    done = CliRunner().invoke(app, arguments)
    said = json.loads(done.stdout)
    assert done.exit_code == 0 and said["command"] == "prep import"
    assert said["stores"][0]["imported"] == 3 and said["stores"][0]["verification"]["checked"] == 1


# Rules by themselves


def _wanted(size: Size, geometry: Geometry, view: str = "") -> Wanted:
    picture = Picture(Folder("/images"), "a.png", "id", view, geometry)
    return Wanted("key", Path("/store"), "set", picture, Path("/images/a.png"), size, (1, 1), None)


def _found(original: Size | None, resized: Size | None, crop: Size | None, resampling: str | None) -> FoundLatent:
    methods = frozenset({resampling} if resampling else ())
    return FoundLatent(torch.zeros(16, 16, 16), original, resized, crop, methods)


LARGE, SMALL = (400, 300), (170, 128)
CROPPED = Geometry(128, 128, *SMALL, 0, 21)


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (_found(LARGE, SMALL, (0, 21), "vips-lanczos3"), None),
        (_found(None, SMALL, (0, 21), "vips-lanczos3"), None),
        (_found(LARGE, SMALL, (0, 21), "opencv-linear"), "resampled otherwise"),
        (_found(LARGE, SMALL, (0, 21), None), "resampled otherwise"),
        (_found(LARGE, SMALL, (0, 20), "vips-lanczos3"), "another crop"),
        (_found(LARGE, SMALL, None, "vips-lanczos3"), "crop not recorded"),
        (_found(LARGE, (171, 128), (0, 21), "vips-lanczos3"), "another resize"),
        (_found(LARGE, None, (0, 21), "vips-lanczos3"), "resize not recorded"),
        (_found((300, 400), SMALL, (0, 21), "vips-lanczos3"), "another image"),
    ],
)
def test_a_resized_and_cropped_latent_is_proven_by_all_of_its_numbers(found: FoundLatent, reason: str | None) -> None:
    said = disproved(_wanted(LARGE, CROPPED), found, 16, 8)
    assert (said.partition(":")[0] if said else None) == reason


def test_a_view_that_resizes_as_another_trainer_does_makes_its_latents_equal() -> None:
    found = _found(LARGE, SMALL, (0, 21), "opencv-linear")
    assert disproved(_wanted(LARGE, CROPPED, '{"interpolation":"opencv-linear"}'), found, 16, 8) is None


def test_shapes_are_those_of_the_family_and_the_target() -> None:
    whole = Geometry(128, 128, 128, 128, 0, 0)
    found = _found((128, 128), None, None, None)
    assert str(disproved(_wanted((128, 128), whole), found, 32, 8)).startswith("another shape")
    assert str(disproved(_wanted((128, 128), whole), found, 16, 16)).startswith("another target size")
    assert disproved(_wanted((128, 128), whole), _found(None, None, None, None), 16, 8) is None


@pytest.mark.parametrize(
    ("size", "bucket", "resized", "crop"),
    [
        ((1000, 1000), (992, 992), (992, 992), (0, 0)),
        ((1600, 900), (1360, 768), (1365, 768), (0, 2)),
        ((900, 1601), (768, 1360), (768, 1366), (3, 0)),
        ((500, 500), (1024, 1024), (1024, 1024), (0, 0)),
    ],
)
def test_musubis_resize_follows_from_image_and_bucket(
    size: Size, bucket: Size, resized: Size, crop: Size, tmp_path: Path
) -> None:
    latent = torch.zeros(16, bucket[1] // 8, bucket[0] // 8)
    foreign.musubi_latent(tmp_path, "a.png", size, latent, None)
    wanted = _wanted(size, Geometry(*bucket, *bucket, 0, 0))
    cache = Musubi(tmp_path, "fk", 8)
    slot = cache.slot(wanted)
    assert not isinstance(slot, str)
    found = cache.latent(wanted, slot)
    assert not isinstance(found, str)
    assert (found.original, found.resized, found.crop) == (size, resized, crop)
    assert found.resampling == {"pillow-lanczos" if bucket > size else "opencv-area"}


def test_an_enlargement_by_pillows_lanczos_is_ours_to_the_bit_and_a_reduction_is_not() -> None:
    generator = np.random.default_rng(2)
    for size, larger in (
        ((100, 90), (128, 128)),
        ((120, 128), (133, 141)),
        ((64, 40), (200, 128)),
        ((128, 100), (128, 128)),
    ):
        pixels = generator.integers(0, 256, (size[1], size[0], 3), np.uint8)
        geometry = Geometry(*larger, *larger, 0, 0)
        theirs = np.asarray(Image.fromarray(pixels).resize(larger, Image.Resampling.LANCZOS))
        assert np.array_equal(frame(pixels, geometry), theirs), size
        assert "pillow-lanczos" in resampling_of(_wanted(size, geometry))
    assert resampling_of(_wanted(LARGE, CROPPED)) == {"vips-lanczos3"}


def test_enlarged_pictures_are_a_part_of_their_own_and_come_in_too(scene: Scene) -> None:
    Image.open(scene.folder / "target" / NAMES[0]).resize((100, 100)).save(scene.folder / "target" / NAMES[0])
    scene.rescan()
    folder = simpletuner(scene, "target", "colour")
    enlarged = scene.picture("target", NAMES[0]).resize((128, 128), Image.Resampling.LANCZOS)
    foreign.simpletuner_latent(folder, NAMES[0], scene.encoders.latent(enlarged))
    path = scene.folder / "target" / "aspect_ratio_bucket_metadata_colour.json"
    records = json.loads(path.read_text())
    records[str(scene.folder / "target" / NAMES[0])]["original_size"] = [100, 100]
    path.write_text(json.dumps(records))
    summary = scene.run(folder, dataset="colour")
    assert [part(summary, name).imported for name in ("colour", "colour, resized")] == [2, 1]
    assert_as_encoded(scene, 3)


def test_a_draw_is_told_from_the_mode_and_from_anything_else() -> None:
    generator = torch.Generator().manual_seed(0)
    mode = torch.randn(16, 16, 16, generator=generator)
    deviation = torch.full_like(mode, 0.1)
    drawn = mode + 0.1 * torch.randn(mode.shape, generator=generator)
    assert compared(mode.to(torch.bfloat16), mode, deviation, 2**-7).kind == "mode"
    assert compared(drawn, mode, deviation, 2**-7).kind == "draw"
    assert compared(mode.roll(1, -1), mode, deviation, 2**-7).kind == "other"
    assert compared(mode + 0.1, mode, deviation, 2**-7).kind == "other"
    assert compared(drawn, mode, None, 2**-7).kind == "other"
    assert compared(mode + 1e-4 * (drawn - mode), mode, deviation * 1e-4, 2**-7).kind == "mode"
