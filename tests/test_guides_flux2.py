"""The blocks of SimpleTuner's FLUX.2 guide that are settings, run through all four stages on tiny checkpoints.

Keys and values are the guide's. Replaced are the checkpoint, absolute paths, and 1024 pixels; `--set` makes runs short.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline
from safetensors.torch import load_file

from families import open_project
from families.checkpoints import encoder_keys, locate
from prep.cache import cache
from prep.pairs import pairs
from prep.scan import scan
from schemas.config_file import read_json
from schemas.project import Project
from schemas.rows import PairRow
from schemas.shards import ShardIndex
from schemas.summaries import CacheSummary
from schemas.tables import read_table
from train.loop import run

GUIDES = Path(__file__).parent / "schemas" / "guides"
PHOTOS = Path(__file__).parent.parent / "datasets_demo" / "edits"
NAMES = ("cat", "coffee")  # one wide, one nearly square
FLAVOURS = ("dev", "klein-9b", "klein-4b")
PIPELINES = {"dev": Flux2Pipeline, "klein-9b": Flux2KleinPipeline, "klein-4b": Flux2KleinPipeline}
SHORT = ("max_train_steps=2", "pretrained_model_name_or_path=tiny")


def _block(number: str) -> Any:
    [path] = GUIDES.glob(f"flux2_pt_{number}.*")
    return read_json(path)


def _opened(folder: Path, flavour: str, *numbers: str, **changes: str) -> Project:
    """Open the project of the guide's main block with some of its other blocks added, as they are."""
    config: dict[str, Any] = {}
    for number in ("01", *numbers):
        config |= _block(number)
    (folder / "config.json").write_text(json.dumps(config))
    name = "-".join(["run", flavour, *numbers, *changes])
    told = [f"{key}={value}" for key, value in {"model_flavour": flavour, "output_dir": name, **changes}.items()]
    return open_project(folder, overrides=[*SHORT, *told])


def _losses(project: Project) -> list[float]:
    """Train, and return the loss of each step."""
    if not (project.run_folder / "finished.json").exists():
        assert run(project).last_step == 2
    lines = map(json.loads, (project.run_folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project of blocks 01, 06 and 07: photographs beside edit pairs."""
    folder = tmp_path_factory.mktemp("guide")
    listed = []
    for path in sorted(GUIDES.glob("flux2_pt_0[67].*")):
        text = path.read_text().replace("1024", "64").replace('"/datasets', f'"{folder}/disk/datasets')
        listed += json.loads(text)
    (folder / "multidatabackend.json").write_text(json.dumps(listed))
    for place, source in (("datasets/my-dataset", "target"), ("disk/datasets/flux2/edits", "target"),
                          ("disk/datasets/flux2/references", "reference")):  # fmt: skip
        (folder / place).mkdir(parents=True)
        for name in NAMES:
            for file in (PHOTOS / source).glob(f"{name}.*"):
                shutil.copy2(file, folder / place)
    return folder


@pytest.fixture(scope="module")
def cached(folder: Path) -> Mapping[str, CacheSummary]:
    """What caching made, once for each flavour."""
    made = {}
    for flavour in FLAVOURS:
        project = _opened(folder, flavour)
        scan(project, workers=1)
        pairs(project, workers=1)
        made[flavour] = cache(project, workers=1)
    return made


def test_only_sizes_and_places_of_the_dataset_blocks_were_changed(folder: Path) -> None:
    listed, theirs = read_json(folder / "multidatabackend.json"), [*_block("06"), *_block("07")]
    for ours, original in zip(listed, theirs, strict=True):
        changed = {key for key in original if ours[key] != original[key]}
        assert changed <= {"resolution", "minimum_image_size", "maximum_image_size", "instance_data_dir"}
        assert ours.keys() == original.keys()


def test_photographs_are_square_and_edits_have_their_references(
    folder: Path, cached: Mapping[str, CacheSummary]
) -> None:
    project = _opened(folder, "dev")
    plain, edits = (list(read_table(project.pair_table(name), PairRow)) for name in ("my-dataset", "flux2-edits"))
    assert {(row.geometry.target_width, row.geometry.target_height) for row in plain} == {(64, 64)}
    assert [(row.repeats, len(row.references)) for row in plain] == [(10, 0)] * 2
    assert [len(row.references) for row in edits] == [1, 1]
    assert all(row.references[0].geometry.target_width == row.geometry.target_width for row in edits)


def test_flavours_share_latents_and_their_folders_are_the_guides(
    folder: Path, cached: Mapping[str, CacheSummary]
) -> None:
    encoded = {name: sum(one.encoded for one in made.stores if one.kind == "latents") for name, made in cached.items()}
    assert encoded == {"dev": 6, "klein-9b": 0, "klein-4b": 0}  # the VAE is one
    assert {path.name for path in (folder / "cache" / "vae" / "flux2").iterdir()} == {
        "my-dataset",
        "edits",
        "references",
    }
    assert len(list((folder / "cache" / "text" / "flux2").iterdir())) == 3
    assert _opened(folder, "dev").dataset("text-embeds").write_batch_size == 64


def test_the_page_of_files_tells_how_rows_of_padding_are_read(folder: Path, cached: Mapping[str, CacheSummary]) -> None:
    page = (Path(__file__).parent.parent / "docs" / "formats.md").read_text()
    example = page.partition("### Rows of padding")[2].partition("```python\n")[2].partition("```")[0]
    project = _opened(folder, "dev")
    index = ShardIndex(project.text_store / encoder_keys(project).text)
    files = list((folder / "cache" / "text" / "flux2" / encoder_keys(project).text).rglob("*.parquet"))
    assert len(files) == 3
    for file in files:
        names = {"header": json.loads(pq.read_metadata(file).metadata[b"pairline.shard"]), "np": np}
        table = pq.read_table(file)
        names["data"] = table["embed"][0].as_py()
        exec(example, names)
        assert names["header"]["pad_rows"] > 100
        assert np.array_equal(names["embed"], index.read(table["key"][0].as_py())["embed"])


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_guidance_is_told_to_dev_and_ignored_with_one_notice_by_klein(
    folder: Path, cached: Mapping[str, CacheSummary], flavour: str
) -> None:
    constant, ranged = _opened(folder, flavour, "02", "08"), _opened(folder, flavour, "03")
    for project in (constant, ranged):
        told = [one for one in project.warnings if "guidance" in one]
        assert len(told) == (0 if flavour == "dev" else 1), told
    assert ranged.trainer.flux_guidance_max == 5.0
    assert (_losses(constant) == _losses(ranged)) == (flavour != "dev")


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_what_the_main_block_trains_loads_in_the_flavours_pipeline(
    folder: Path, cached: Mapping[str, CacheSummary], flavour: str
) -> None:
    project = _opened(folder, flavour, "02", "08")  # LoRA of all layers, which is the default too
    assert len(_losses(project)) == 2
    stored = load_file(project.run_folder / "pytorch_lora_weights.safetensors")
    downs = [name for name in stored if name.endswith("lora_A.weight")]
    assert len(downs) == 2 * 12 + 6 * 2 and all(stored[name].shape[0] == 16 for name in downs)
    pipeline = PIPELINES[flavour].from_pretrained(locate(project, project.family.denoiser))
    pipeline.load_lora_weights(project.run_folder)
    loaded = dict(pipeline.transformer.named_parameters())
    for name, tensor in stored.items():
        ours = name.removeprefix("transformer.").replace(".weight", ".default_0.weight")
        assert torch.equal(loaded[ours], tensor), name


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_both_routes_of_tread_run_and_act(folder: Path, cached: Mapping[str, CacheSummary], flavour: str) -> None:
    plain, *routed = (_losses(_opened(folder, flavour, *one)) for one in (("02", "08"), ("05",), ("10",)))
    assert len({tuple(one) for one in (plain, *routed)}) == 3


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_quantised_encoders_have_a_cache_of_their_own_and_the_quantised_base_acts(
    folder: Path, cached: Mapping[str, CacheSummary], flavour: str
) -> None:
    plain, both = _opened(folder, flavour), _opened(folder, flavour, "04")
    again = cache(both, workers=1)
    assert [one.encoded for one in again.stores] == [0, 0, 0, cached[flavour].stores[-1].encoded]
    assert encoder_keys(both).text != encoder_keys(plain).text
    assert encoder_keys(both).target == encoder_keys(plain).target
    half = _opened(folder, flavour, "04", base_model_precision="no_change")
    quantised, unquantised = _losses(_opened(folder, flavour, "04")), _losses(half)
    assert quantised != unquantised
    assert quantised == pytest.approx(unquantised, rel=0.05)
