"""A table of single changes to a cached project: which rows are encoded again, no more and no less."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from families import open_project, runtime
from families.checkpoints import encoder_keys
from prep.cache import cache
from prep.pairs import pairs
from prep.scan import scan
from schemas.freshness import read_pairs
from schemas.keys import text_key

DEMO = Path(__file__).parent.parent.parent / "datasets_demo"
NAMES = ("a", "b", "c")
CAPTIONS = 3  # one of each image; with the generator's and the empty one there are five texts

Change = Callable[[Path], None]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_models: Path) -> Path:
    """A cached project of three targets, each with a file and a degraded version of itself as references."""
    folder = tmp_path_factory.mktemp("base") / "project"
    sizes = ((180, 150), (150, 180), (200, 150))
    pictures = sorted((DEMO / "photos").glob("*.jpg"))
    for name, size, picture in zip(NAMES, sizes, pictures, strict=False):
        image = Image.open(picture).convert("RGB").resize(size)
        for place, shown in (("sharp", image), ("gray", image.convert("L").convert("RGB"))):
            (folder / place).mkdir(parents=True, exist_ok=True)
            shown.save(folder / place / f"{name}.png")
        (folder / "sharp" / f"{name}.txt").write_text(f"colour {name}")
    config = {"pretrained_model_name_or_path": "tiny", "mixed_precision": "no", "vae_dtype": "fp32", "resolution": 160}
    targets = {
        "id": "sharp",
        "instance_data_dir": "sharp",
        "caption_strategy": "textfile",
        "conditioning_data": ["gray"],
        "conditioning": [{"type": "jpeg_artifacts", "quality_range": [10, 30], "captions": ["mend the picture"]}],
        "crop": True,
        "crop_aspect": "square",
        "crop_style": "center",
    }
    gray = {
        "id": "gray",
        "instance_data_dir": "gray",
        "conditioning_type": "reference_strict",
        "caption_strategy": None,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "multidatabackend.json").write_text(json.dumps([targets, gray]))
    shutil.copytree(tiny_models, folder / "work" / "models")
    scan(folder, workers=1), pairs(folder, workers=1), cache(folder, workers=1)
    return folder


def configured(**options: object) -> Change:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | options))

    return change


def dataset(number: int | None = 0, **options: object) -> Change:
    def change(folder: Path) -> None:
        path = folder / "multidatabackend.json"
        sets = json.loads(path.read_text())
        for entry in sets if number is None else [sets[number]]:
            entry |= options
        path.write_text(json.dumps(sets))

    return change


def generator(**options: object) -> Change:
    def change(folder: Path) -> None:
        path = folder / "multidatabackend.json"
        sets = json.loads(path.read_text())
        sets[0]["conditioning"][0] |= options
        path.write_text(json.dumps(sets))

    return change


def renamed(folder: Path) -> None:
    for file in folder.glob("*/a.*"):
        file.rename(file.with_name(f"another{file.suffix}"))


def moved(folder: Path) -> None:
    for number, place in enumerate(("sharp", "gray")):
        (folder / place).rename(folder / f"{place} elsewhere")
        dataset(number, instance_data_dir=f"{place} elsewhere")(folder)


def touched(folder: Path) -> None:
    for file in folder.glob("*/a.*"):
        os.utime(file, ns=(0, 0))


def turned(folder: Path) -> None:
    """Turn a target upside down by its EXIF orientation alone: the pixels in the file stay as they are."""
    image = Image.open(folder / "sharp" / "a.png")
    exif = image.getexif()
    exif[0x0112] = 3
    image.save(folder / "sharp" / "a.png", exif=exif)


def one_pixel(folder: Path) -> None:
    pixels = np.array(Image.open(folder / "sharp" / "b.png"))
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(folder / "sharp" / "b.png")


def of_the_reference(folder: Path) -> None:
    pixels = np.array(Image.open(folder / "gray" / "b.png"))
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(folder / "gray" / "b.png")


def caption(folder: Path) -> None:
    (folder / "sharp" / "a.txt").write_text("another colour")


def removed(folder: Path) -> None:
    for file in folder.glob("*/a.*"):
        file.unlink()


def added(folder: Path) -> None:
    for place in ("sharp", "gray"):
        Image.open(folder / place / "a.png").transpose(Image.Transpose.ROTATE_180).save(folder / place / "d.png")
    (folder / "sharp" / "d.txt").write_text("colour a")


def tiny(folder: Path) -> Path:
    return folder / "work" / "models" / "tiny-flux-kontext"


def vae_elsewhere(folder: Path) -> None:
    shutil.copytree(tiny(folder), folder / "checkpoint")
    configured(pretrained_model_name_or_path="checkpoint")(folder)


def other_vae(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    vae_elsewhere(folder)
    file = next((folder / "checkpoint" / "vae").glob("*.safetensors"))
    tensors = load_file(file)
    name = sorted(tensors)[0]
    tensors[name] = tensors[name] + 0.01
    save_file(tensors, file)


def split_text_encoder(folder: Path) -> None:
    """Save the same weights in several files."""
    from transformers import T5EncoderModel

    vae_elsewhere(folder)
    part = folder / "checkpoint" / "text_encoder_2"
    model = T5EncoderModel.from_pretrained(part)
    for file in part.glob("*.safetensors*"):
        file.unlink()
    model.save_pretrained(part, max_shard_size="50KB")
    assert len(list(part.glob("*.safetensors"))) > 1


def nothing(folder: Path) -> None:
    pass


ALL = "all"
# change -> targets, references from files, degraded references, texts that are encoded again
TABLE: dict[str, tuple[Change, object, object, object, object]] = {
    "nothing": (nothing, 0, 0, 0, 0),
    "images renamed": (renamed, 0, 0, 0, 0),
    "folders moved": (moved, 0, 0, 0, 0),
    "files touched": (touched, 0, 0, 0, 0),
    "turned by EXIF": (turned, "a", 0, "a", 0),
    "one pixel of a target": (one_pixel, "b", 0, "b", 0),
    "one pixel of a reference": (of_the_reference, 0, "b", 0, 0),
    "caption": (caption, 0, 0, 0, 1),
    "image removed": (removed, 0, 0, 0, 0),
    "image added": (added, "d", "d", "d", 0),
    "resolution": (dataset(None, resolution=256), ALL, ALL, ALL, 0),
    "crop style": (dataset(crop_style="corner"), ALL, ALL, ALL, 0),
    "crop aspect": (dataset(crop_aspect="closest", crop_aspect_buckets=[2.0]), ALL, ALL, ALL, 0),
    "alignment": (configured(aspect_bucket_alignment=32), ALL, ALL, ALL, 0),
    "interpolation": (configured(interpolation="opencv-linear"), ALL, ALL, ALL, 0),
    "VAE weights": (other_vae, ALL, ALL, ALL, 0),
    "checkpoint's path": (vae_elsewhere, 0, 0, 0, 0),
    "weights split over files": (split_text_encoder, 0, 0, 0, 0),
    "VAE dtype": (configured(vae_dtype="bf16"), ALL, ALL, ALL, 0),
    "VAE tiling": (configured(vae_enable_tiling=True), ALL, ALL, ALL, 0),
    "VAE slicing": (configured(vae_enable_slicing=True), 0, 0, 0, 0),
    "posterior sampled": (configured(posterior="sample"), ALL, 0, 0, 0),
    "posterior moments": (configured(posterior="moments"), ALL, 0, 0, 0),
    "recipe parameter": (generator(quality_range=[10, 31]), 0, 0, ALL, 0),
    "degradations stored as files": (generator(storage="files"), 0, 0, 0, 0),
    "prep seed": (configured(prep_seed=7), 0, 0, ALL, 0),
    "training seed": (configured(seed=7), 0, 0, 0, 0),
    "prompt template: captions of the generator": (generator(captions=["mend it"]), 0, 0, 0, 1),
    "text length": (configured(model_flavour="schnell"), 0, 0, 0, ALL),
    "flavour with the same encoders": (configured(model_flavour="dev"), 0, 0, 0, 0),
    "text encoder's precision": (configured(text_encoder_2_precision="int8-quanto"), 0, 0, 0, ALL),
    "float8 text": (configured(text_cache_dtype="float8"), 0, 0, 0, ALL),
    "batch sizes": (configured(vae_batch_size=1, text_encoder_batch_size=4, write_batch_size=3), 0, 0, 0, 0),
    "dataset id": (dataset(id="crisp"), 0, 0, 0, 0),
    "repeats": (dataset(repeats=5), 0, 0, 0, 0),
    "trainer": (configured(lora_rank=64, learning_rate=1e-5, optimizer="optimi-lion"), 0, 0, 0, 0),
}


def keys_of(folder: Path) -> Iterator[tuple[str, str, str]]:
    """Yield (kind, name, key) of every row that training may read."""
    project = open_project(folder)
    encoders = encoder_keys(project)
    for row in read_pairs(project, project.targets[0]):
        yield "target", Path(row.target_path).stem, row.target_key(encoders.target)
        for reference in row.references:
            kind = "reference" if reference.recipe is None else "degraded"
            yield kind, Path(reference.path).stem, reference.key(encoders.reference)
        for prompt in [*row.prompts, *(text for one in row.references for text in one.prompts), ""]:
            yield "text", prompt, text_key(encoders.text, prompt)


def again(folder: Path, before: set[str], expected: tuple[object, ...]) -> None:
    """Run the three stages and hold what was encoded against the table."""
    shards = {path: path.read_bytes() for path in (folder / "work" / "cache").glob("[lt]*/**/*.parquet")}
    scan(folder, workers=1), pairs(folder, workers=1)
    summary = cache(folder, workers=1)
    every = set(keys_of(folder))
    fresh = {(kind, name) for kind, name, key in every if key not in before}
    for kind, wanted in zip(("target", "reference", "degraded", "text"), expected, strict=True):
        names = {name for one, name in fresh if one == kind}
        whole = {name for one, name, _ in every if one == kind}
        if isinstance(wanted, int):
            assert len(names) == wanted, (kind, names)
        else:
            assert names == (whole if wanted == ALL else set(str(wanted))), kind
    distinct = {key for kind, _, key in every if key not in before and kind != "text"}
    texts = {key for kind, _, key in every if key not in before and kind == "text"}
    assert sum(one.encoded for one in summary.stores if one.kind == "latents") == len(distinct)
    assert sum(one.encoded for one in summary.stores if one.kind == "text") == len(texts)
    assert all(path.read_bytes() == data for path, data in shards.items()), "what was there is left alone"


@pytest.mark.parametrize("name", TABLE)
def test_a_change_encodes_again_what_it_touches(name: str, base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(base, folder)
    before = {key for _, _, key in keys_of(base)}
    change, *expected = TABLE[name]
    change(folder)
    again(folder, before, tuple(expected))


def test_neither_workers_nor_the_device_matter(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(base, folder)
    before = {key for _, _, key in keys_of(base)}
    monkeypatch.setattr(runtime, "default_device", lambda: torch.device("cuda:3"))
    scan(folder, workers=2), pairs(folder, workers=2)
    assert [store.encoded for store in cache(folder, workers=2).stores] == [0, 0]
    assert {key for _, _, key in keys_of(folder)} == before
