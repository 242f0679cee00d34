"""prep cache --explain after each kind of change: which components of which key it names."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps
from safetensors.numpy import load_file, save_file

from prep.cache import cache
from prep.pairs import pairs
from prep.scan import scan
from prep.upkeep.explain import explain
from schemas.config_file import read_json
from schemas.errors import UserError
from schemas.keys import file_id
from schemas.rows import NotedRow, arrow_schema

DEMO = Path(__file__).parent.parent.parent / "datasets_demo"
MakeCached = Callable[[], Path]


@pytest.fixture(scope="module")
def cached_once(tmp_path_factory: pytest.TempPathFactory, tiny_models: Path) -> Path:
    """Cache a project of two photographs, cut to squares; one of them is none."""
    folder = tmp_path_factory.mktemp("explain") / "project"
    (folder / "photos").mkdir(parents=True)
    for name in ("cat_eyes", "astronaut_wide"):
        shutil.copy2(DEMO / "photos" / f"{name}.jpg", folder / "photos")
    datasets = read_json(DEMO / "deblur" / "multidatabackend.json")
    square = {"crop": True, "crop_aspect": "square", "crop_style": "center", "caption_strategy": "filename"}
    datasets[0] |= {"instance_data_dir": "photos", "resolution": 128, **square}
    (folder / "multidatabackend.json").write_text(json.dumps(datasets))
    (folder / "config.json").write_text(json.dumps(read_json(DEMO / "deblur" / "config.json")))
    shutil.copytree(tiny_models, folder / "work" / "models")
    scan(folder), pairs(folder), cache(folder)
    return folder


@pytest.fixture
def project(cached_once: Path, tmp_path: Path) -> Path:
    """A copy of the cached project."""
    return Path(shutil.copytree(cached_once, tmp_path / "project"))


def settings(folder: Path, file: str, change: Callable[[Any], object]) -> None:
    values = json.loads((folder / file).read_text())
    change(values)
    (folder / file).write_text(json.dumps(values))


def changed(folder: Path, sample: str = "cat_eyes") -> dict[str, dict[str, tuple[Any, Any]]]:
    """Return the components that are told, by part."""
    scan(folder), pairs(folder)
    parts = explain(folder, sample).parts
    return {part.part: {one.component: (one.old, one.new) for one in part.changes} for part in parts if part.changes}


def missing(folder: Path) -> set[str]:
    return {part.part for part in explain(folder, "cat_eyes").parts if part.state == "missing"}


def test_nothing_changed(project: Path) -> None:
    assert changed(project) == {} and missing(project) == set()
    said = list(explain(project, "cat_eyes").lines())
    assert said[-1] == "nothing changed since it was last cached" and len(said) == 1 + 2 + 4 + 1


def test_a_replaced_image(project: Path) -> None:
    path = project / "photos" / "cat_eyes.jpg"
    before = file_id(path)
    with Image.open(path) as image:
        mirrored = ImageOps.mirror(image)
    mirrored.save(path)
    found = changed(project)
    assert found.keys() == missing(project) == {"target", "reference 1"}
    assert found["target"] == {"image": (before, file_id(path))}
    assert found["reference 1"].keys() == {"image", "seed"}, "degradations are drawn from the image's bytes"
    assert changed(project, "astronaut_wide") == {}


def test_another_resolution(project: Path) -> None:
    settings(project, "multidatabackend.json", lambda sets: sets[0].update(resolution=192))
    found = changed(project)
    assert found["target"]["size"] == found["reference 1"]["size"] == ("128x128", "192x192")
    assert {"intermediary size", "size"} <= found["target"].keys() <= {"intermediary size", "size", "crop"}


def test_another_crop(project: Path) -> None:
    settings(project, "multidatabackend.json", lambda sets: sets[0].update(crop_style="corner"))
    found = changed(project, "astronaut_wide")
    assert found.keys() == {"target", "reference 1"} and found["target"].keys() == {"crop"}
    assert found["target"]["crop"][1] == "0 from the left, 0 from the top"


def test_another_caption(project: Path) -> None:
    settings(
        project,
        "multidatabackend.json",
        lambda sets: sets[0]["conditioning"][0].update(captions=["deblur it", "deblur"]),
    )
    assert changed(project) == {"prompt 1": {"prompt": ("enhance sharpness", "deblur it")}}
    assert missing(project) == {"prompt 1"}
    said = explain(project, "cat_eyes")
    assert said.gone == ("prompt 3: increase clarity", "prompt 4: sharpen image")
    assert said.next_command is not None and said.next_command.startswith("prep cache")


def test_another_dtype_of_the_vae(project: Path) -> None:
    settings(project, "config.json", lambda config: config.update(vae_dtype="bf16"))
    assert changed(project) == {part: {"encoder dtype": ("fp32", "bf16")} for part in ("target", "reference 1")}


def test_other_weights_of_the_vae(project: Path) -> None:
    [weights] = (project / "work" / "models").glob("tiny*/vae/*.safetensors")
    tensors = load_file(weights)
    first = sorted(tensors)[0]
    save_file(tensors | {first: tensors[first] + np.float32(1)}, weights, {"format": "pt"})
    found = changed(project)
    assert found.keys() == {"target", "reference 1"} and found["target"].keys() == {"encoder weights"}
    assert found["target"] == found["reference 1"] and len(set(found["target"]["encoder weights"])) == 2


def test_another_parameter_of_the_recipe(project: Path) -> None:
    settings(project, "multidatabackend.json", lambda sets: sets[0]["conditioning"][0].update(blur_radius=4.5))
    found = changed(project)
    assert found.keys() == missing(project) == {"reference 1"}
    assert found["reference 1"]["recipe blur_radius"] == (3.0, 4.5)
    assert found["reference 1"].keys() == {"recipe blur_radius", "seed"}


def test_without_the_checkpoint_noted_keys_are_compared(project: Path) -> None:
    shutil.rmtree(project / "work" / "models")
    assert changed(project) == {} and missing(project) == set()
    settings(project, "multidatabackend.json", lambda sets: sets[0].update(crop_style="corner"))
    assert changed(project, "astronaut_wide")["target"].keys() == {"crop"}


def test_what_was_encoded_anew_is_the_last_version(project: Path) -> None:
    settings(project, "multidatabackend.json", lambda sets: sets[0]["conditioning"][0].update(blur_radius=4.5))
    assert changed(project)
    cache(project)
    assert changed(project) == {}


def test_what_was_never_cached_has_nothing_to_compare_with(project: Path) -> None:
    shutil.rmtree(project / "work" / "cache" / "noted")
    said = explain(project, "cat_eyes")
    assert not said.noted and "it was not cached before" in "\n".join(said.lines())


def test_samples_are_found_by_id_path_and_parts_of_them(project: Path) -> None:
    [sample_id] = [
        row["sample_id"]
        for row in pq.read_table(project / "work/pairs/photos.parquet").to_pylist()
        if row["target_path"] == "cat_eyes.jpg"
    ]
    for asked in (sample_id, sample_id[:9], "cat_eyes.jpg", "eyes.jpg", "cat", f"{project}/photos/cat_eyes.jpg"):
        assert explain(project, asked).sample_id == sample_id
    with pytest.raises(UserError, match=r"did you mean cat_eyes\.jpg"):
        explain(project, "cat_eye.jpg")
    with pytest.raises(UserError, match="2 samples begin or end so"):
        explain(project, ".jpg")


def test_notes_are_written_only_if_something_changed_and_only_of_whole_runs(project: Path) -> None:
    noted = project / "work" / "cache" / "noted" / "photos.parquet"
    assert pq.read_schema(noted).equals(arrow_schema(NotedRow)) and pq.read_metadata(noted).num_rows == 2
    before = noted.stat().st_mtime_ns
    cache(project)
    assert noted.stat().st_mtime_ns == before
    settings(project, "multidatabackend.json", lambda sets: sets[0].update(resolution=192))
    scan(project), pairs(project), cache(project, dry_run=True), cache(project, limit=1)
    assert noted.stat().st_mtime_ns == before
    cache(project)
    assert noted.stat().st_mtime_ns != before
