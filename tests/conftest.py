"""Shared ground: a small project on real photographs, and the tiny checkpoints built once."""

import gc
import json
import os
import shutil
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side; last bits depend on how many compute
os.environ["LOCAL_WORLD_SIZE"] = str(os.cpu_count())  # so stages start no workers, unless a test asks for several

gc.disable()  # while modules are imported, which are no garbage: a fifth of the time that this takes

DEMO = Path(__file__).parent.parent / "datasets_demo"
FOLDERS = {
    "deblur": ("photos",),
    "jpeg": ("photos", "held_out"),
    "edits": ("edits/target", "edits/reference"),
}


def pytest_collection_finish() -> None:
    """Have the collector work from here on, and pass over what was imported."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="module", autouse=True)
def imports_are_no_garbage() -> None:
    """Take what was imported out of the collector's rounds: every stage ends with one, which then takes a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace's `models` folder that holds tiny Kontext."""
    from families import open_project
    from families.checkpoints import locate

    folder = tmp_path_factory.mktemp("tiny")
    project = open_project(DEMO / "edits", workspace=folder)
    locate(project, project.family.denoiser)
    return folder / "models"


@pytest.fixture(scope="session")
def tiny_flux2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds tiny FLUX.2, one checkpoint for each flavour, by its name."""
    from families import FAMILIES, flux2

    folder = tmp_path_factory.mktemp("flux2")
    for flavour in FAMILIES["flux2"].flavours:
        flux2.build_tiny(folder / flavour, flavour)
    return folder


@cache
def _plain(path: Path) -> str:
    """Return what a file with comments says, as plain JSON."""
    from schemas.config_file import read_json

    return json.dumps(read_json(path))


@pytest.fixture(scope="session")
def copy_demo(tiny_models: Path) -> Callable[..., Path]:
    """Copy a demo project into a folder; see `make_project`."""

    def copy(parent: Path, name: str = "edits", photos: int = 6, **options: object) -> Path:
        folder = parent / name
        folder.mkdir(parents=True)
        for file in (DEMO / name).glob("prompts.json"):
            shutil.copy2(file, folder)
        for pictures in FOLDERS[name]:
            kept = folder / pictures.removeprefix("edits/")
            kept.mkdir()
            for picture in sorted((DEMO / pictures).glob("*.jpg"))[:photos]:
                for file in (picture, picture.with_suffix(".txt")):
                    if file.exists():
                        shutil.copy2(file, kept)
        datasets = json.loads(_plain(DEMO / name / "multidatabackend.json"))
        for dataset in datasets:
            if "instance_data_dir" in dataset:
                dataset["instance_data_dir"] = dataset["instance_data_dir"].removeprefix("../")
                dataset["resolution"] = 128
        small = {"max_train_steps": 12, "checkpointing_steps": 4}
        config = json.loads(_plain(DEMO / name / "config.json")) | small | options
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "multidatabackend.json").write_text(json.dumps(datasets))
        shutil.copytree(tiny_models, folder / "work" / "models")
        return folder

    return copy


@pytest.fixture
def make_project(tmp_path: Path, copy_demo: Callable[..., Path]) -> Callable[..., Path]:
    """Copy a demo project with at most six of its photographs, at 128 px; keywords replace trainer options."""
    return partial(copy_demo, tmp_path)
