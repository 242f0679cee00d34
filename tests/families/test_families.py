"""What every family offers, and how checkpoints are found."""

import ast
import importlib
import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel

from families import FAMILIES, open_project
from families.checkpoints import fingerprint, locate
from families.protocol import Family
from schemas.errors import UserError

ROOT = Path(__file__).parent.parent.parent
WANTED = [name for name, member in vars(Family).items() if inspect.isfunction(member) and not name.startswith("_")]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_offers_the_functions_of_the_protocol_with_the_same_parameters(name: str) -> None:
    module = importlib.import_module(FAMILIES[name].module)
    assert len(WANTED) > 8
    for function in WANTED:
        asked = list(inspect.signature(getattr(Family, function)).parameters)[1:]
        assert list(inspect.signature(getattr(module, function)).parameters) == asked, function


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_one_module_that_only_the_table_names(name: str) -> None:
    module = FAMILIES[name].module
    for path in ROOT.glob("families/*.py"):
        if path.stem != module.split(".")[-1]:
            imported = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
            assert all(node.module != module for node in imported), path.name


@pytest.mark.parametrize("name", FAMILIES)
def test_every_flavour_has_a_checkpoint_and_text_settings(name: str) -> None:
    spec = FAMILIES[name]
    assert spec.default_flavour in spec.flavours
    assert all(model.text_settings["max_sequence_length"] > 0 for model in spec.flavours.values())
    assert spec.default_lora_target in spec.lora_targets


# Modules, and parameters at rank 16 in millions, of SimpleTuner's presets and of diffusers' Kontext example.
PRESETS = {
    "mmdit": (190, 18.68), "all": (266, 26.15), "context": (76, 7.47), "context+ffs": (114, 16.81),
    "all+ffs": (419, 65.42), "all+ffs+embedder": (420, 65.47), "ai-toolkit": (495, 85.97), "tiny": (2, 0.59),
    "nano": (1, 0.29), "diffusers": (380, 54.17),
}  # fmt: skip


@pytest.fixture(scope="module")
def flux_layers() -> dict[str, torch.nn.Linear]:
    """The linear layers of full-size FLUX.1, without their numbers."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True)
    return {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}


@pytest.mark.parametrize("preset", FAMILIES["flux"].lora_targets)
def test_flux_presets_wrap_as_many_layers_of_the_real_model_as_elsewhere(
    flux_layers: dict[str, torch.nn.Linear], preset: str
) -> None:
    pattern = re.compile(FAMILIES["flux"].lora_targets[preset])
    wrapped = [layer for name, layer in flux_layers.items() if pattern.fullmatch(name)]
    parameters = sum(16 * (layer.in_features + layer.out_features) for layer in wrapped)
    assert (len(wrapped), round(parameters / 1e6, 2)) == PRESETS[preset]


@pytest.mark.parametrize("flavour", ["dev", "schnell", "kontext"])
def test_tiny_is_the_same_everywhere_and_in_the_hubs_layout(
    tmp_path: Path, make_project: Callable[..., Path], flavour: str
) -> None:
    folder = make_project(model_flavour=flavour)
    built = [locate(open_project(folder, workspace=tmp_path / name), ("vae",)) for name in ("one", "other")]
    files = [{path.relative_to(one): path.read_bytes() for path in one.rglob("*") if path.is_file()} for one in built]
    assert files[0] == files[1]
    index = json.loads((built[0] / "model_index.json").read_text())
    parts = {"scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer", "vae"}
    assert parts <= index.keys()
    assert index["_class_name"] == ("FluxKontextPipeline" if flavour == "kontext" else "FluxPipeline")
    config = json.loads((built[0] / "transformer" / "config.json").read_text())
    assert config["guidance_embeds"] == (flavour != "schnell")


def test_a_fingerprint_follows_weights_and_settings_not_names(make_project: Callable[..., Path]) -> None:
    project = open_project(make_project())
    folder = locate(project, ("vae",))
    before = fingerprint(project, folder, ("vae",))
    moved = folder.rename(folder.parent / "another name")
    assert fingerprint(project, moved, ("vae",)) == before
    config = moved / "vae" / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"_name_or_path": "elsewhere", "_diffusers_version": "9"}))
    assert fingerprint(project, moved, ("vae",)) == before
    config.write_text(json.dumps(values | {"shift_factor": 0.2}))
    assert fingerprint(project, moved, ("vae",)) != before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nobody/nothing", r"nobody/nothing is not on this machine and the hub cannot be reached.*'tiny'"),
        ("not a hub id!", r"'not a hub id!' is neither a folder nor a hub id"),
        ("target", r"not a whole checkpoint, it lacks vae"),
    ],
)
def test_a_checkpoint_that_cannot_be_had_is_an_error_that_says_why(
    make_project: Callable[..., Path], name: str, message: str
) -> None:
    project = open_project(make_project(pretrained_model_name_or_path=name))
    with pytest.raises(UserError, match=message):
        locate(project, project.family.image_encoder)
