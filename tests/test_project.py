"""What holds for the repository as a whole: contracts, documents, the surface of the commands."""

import ast
import importlib
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import jsonschema
import pytest
from pydantic import BaseModel, ValidationError
from typer.testing import CliRunner

from families import FAMILIES, open_project
from schemas.config_file import read_json
from schemas.datasets import (
    AlignmentCheck,
    AspectBucket,
    CaptionShuffle,
    CompositeImage,
    DatasetConfig,
    FilterFunc,
    Generator,
    HuggingFace,
    ImagePolicy,
    MetadataTable,
)  # fmt: skip
from schemas.options import facts_of
from schemas.recipes import RECIPES, Chain
from schemas.simpletuner import DATASET_KEYS, TRAINER_KEYS
from schemas.steps import STEP_MODELS
from schemas.trainer import TrainerConfig

ROOT = Path(__file__).parent.parent
PACKAGES = ("schemas", "families", "prep", "train")


def _python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize("command", ["prep", "train"])
def test_a_command_line_starts_without_loading_what_only_its_work_needs(command: str) -> None:
    heavy = "{'torch', 'diffusers', 'transformers', 'cv2', 'PIL', 'pyarrow', 'numpy'}"
    assert _python(f"import sys, {command}.cli; print({heavy} & set(sys.modules))") == "set()"


def test_scanning_and_pairing_load_no_tensor_library() -> None:
    code = "import sys, prep.scan, prep.pairs, prep.cache; print({'torch', 'diffusers', 'transformers'} & set(sys.modules))"
    assert _python(code) == "set()"


def test_imports_keep_the_contracts() -> None:
    done = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout


def test_no_core_module_names_a_family_or_flavour() -> None:
    names = {*FAMILIES, *(flavour for spec in FAMILIES.values() for flavour in spec.flavours)}
    for package in ("prep", "train"):
        for path in (ROOT / package).rglob("*.py"):
            words = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
            assert not words & names, f"{path.name} names {words & names}"


def test_generated_documents_are_current() -> None:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for path, text in module.documents().items():
        assert path.read_text() == text, f"{path.relative_to(ROOT)} is stale: run make docs"


@pytest.mark.parametrize(
    "model",
    [
        TrainerConfig,
        DatasetConfig,
        Generator,
        HuggingFace,
        CompositeImage,
        FilterFunc,
        MetadataTable,
        AspectBucket,
        CaptionShuffle,
        ImagePolicy,
        AlignmentCheck,
        *RECIPES.values(),
    ],
)
def test_every_option_is_documented_and_either_acted_on_or_said_to_have_no_effect(model: type[BaseModel]) -> None:
    source = "\n".join(path.read_text() for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    page = (ROOT / "docs" / "options.md").read_text()
    for name, facts in facts_of(model):
        assert name in ("recipe", "type") or f"`{name}`" in page
        assert model.model_fields[name].description
        one_choice = len(get_args(model.model_fields[name].annotation)) == 1
        if facts["no_effect"] is None and not one_choice:
            assert re.search(rf'\.{name}\b|"{name}"', source), f"nothing reads {name}"


@pytest.mark.parametrize("name", STEP_MODELS)
def test_every_step_of_a_chain_and_its_parameters_are_documented(name: str) -> None:
    section = (ROOT / "docs" / "options.md").read_text().split(f"##### step: {name}\n")[1].split("\n#")[0]
    for parameter, _ in facts_of(STEP_MODELS[name]):
        assert STEP_MODELS[name].model_fields[parameter].description
        assert parameter in ("step", "probability") or f"`{parameter}`" in section
    assert f"| `{name}` |" in (ROOT / "docs" / "degradations.md").read_text()


def test_no_key_is_both_an_option_and_not_needed() -> None:
    assert not TRAINER_KEYS.keys() & TrainerConfig.model_fields.keys()
    assert not DATASET_KEYS.keys() & DatasetConfig.model_fields.keys()


def _schema(name: str) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(json.loads((ROOT / "schemas" / "json" / f"{name}.schema.json").read_text()))


@pytest.mark.parametrize(
    "path",
    [*sorted((ROOT / "tests/schemas/guides").glob("*.json*")), *sorted(ROOT.glob("datasets_demo/*/*.json"))],
    ids=lambda path: f"{path.parent.name}/{path.name}",
)
def test_the_json_schemas_accept_what_guides_and_demo_projects_say(path: Path) -> None:
    values = read_json(path)
    if "portrait_subject" not in values and path.name != "prompts.json":  # a prompt library
        assert not list(_schema("multidatabackend" if isinstance(values, list) else "config").iter_errors(values))


@pytest.mark.parametrize("change", [{"learning_rte": 1}, {"lora_rank": 0}, {"optimizer": "sgd"}, {"model_type": 3}])
def test_the_json_schema_refuses_what_the_loader_refuses(change: dict[str, object]) -> None:
    assert list(_schema("config").iter_errors(change))
    assert not list(
        _schema("config").iter_errors({"--learning_rate": 1e-4, "$schema": "x", next(iter(TRAINER_KEYS)): "y"})
    )


@pytest.mark.parametrize(
    "entry",
    [{"type": "jpeg", "captions": False}, {"type": "lowres", "params": {"blur_radius": 2}, "captions": "sharpen"}],
)
def test_the_json_schema_takes_every_way_to_write_a_generator(entry: dict[str, object]) -> None:
    for conditioning in (entry, [entry]):
        dataset = {"id": "a", "instance_data_dir": "b", "conditioning": conditioning, "instance_prompt": "c"}
        assert not list(_schema("multidatabackend").iter_errors([dataset]))
    assert list(_schema("multidatabackend").iter_errors([{"id": "a", "conditioning": [entry | {"quality": 101}]}]))


@pytest.mark.parametrize(
    ("steps", "sound"),
    [
        ([{"step": "blur", "sigma": [1, 3], "kernel": "gaussian"}, {"step": "jpeg", "quality": 30}], True),
        ([{"step": "shuffle", "steps": [{"step": "one_of", "steps": [{"step": "gamma"}]}]}], True),
        ([{"step": "resize", "factor": 0.5, "steps": [{"step": "noise", "kind": ["gaussian", "poisson"]}]}], True),
        ([{"step": "blurr"}], False),
        ([{"sigma": 3}], False),
        ([{"step": "blur", "sigma": -1}], False),
        ([{"step": "jpeg", "quality": [10, 20, 30]}], False),
        ([{"step": "shuffle", "steps": [{"step": "gamma", "gama": 2}]}], False),
    ],
    ids=str,
)
def test_the_json_schema_takes_the_chains_that_the_loader_takes(steps: list[dict[str, object]], sound: bool) -> None:
    dataset = {"id": "a", "instance_data_dir": "b", "conditioning": {"type": "chain", "steps": steps}}
    assert (not list(_schema("multidatabackend").iter_errors([dataset]))) == sound
    try:
        loaded = Chain.model_validate({"steps": steps}) is not None
    except ValidationError:
        loaded = False
    assert loaded == sound


@pytest.mark.parametrize("name", ["deblur", "jpeg", "edits", "flux2", "flux2_edits"])
def test_the_demo_projects_are_sound(name: str, tmp_path: Path) -> None:
    project = open_project(ROOT / "datasets_demo" / name, workspace=tmp_path, need_images=True)
    assert project.warnings == ()


def test_the_demo_photographs_are_small_attributed_and_captioned() -> None:
    files = [path for path in (ROOT / "datasets_demo").rglob("*") if path.suffix in (".jpg", ".txt")]
    assert sum(path.stat().st_size for path in files) < 8_000_000
    photos = [path for path in files if path.suffix == ".jpg" and "photos" in path.parts]
    assert 24 <= len(photos) <= 32
    attribution = (ROOT / "datasets_demo" / "ATTRIBUTION.md").read_text()
    for path in files:
        if path.suffix == ".jpg":
            assert path.stem in attribution, f"{path.name} is not attributed"
            assert {"reference", "palette"} & set(path.parts) or path.with_suffix(".txt").read_text().strip()


@pytest.mark.parametrize(("command", "stages"), [("prep", ["scan", "pairs", "cache"]), ("train", ["run"])])
def test_every_command_has_the_same_options_help_with_an_example_and_a_place_in_the_readme(
    command: str, stages: list[str]
) -> None:
    module = importlib.import_module(f"{command}.cli")
    readme = (ROOT / "README.md").read_text()
    for stage in stages:
        shown = CliRunner().invoke(module.app, [stage, "--help"], env={"COLUMNS": "200"})
        assert shown.exit_code == 0
        for option in ("--json", "--dry-run", "--limit", "--workers", "--workspace", "--root", "--set"):
            assert option in shown.stdout
        assert "Example:" in shown.stdout
        assert f"{command} {stage}" in readme


def test_options_of_pairs_that_would_do_nothing_are_told(tmp_path: Path) -> None:
    app = importlib.import_module("prep.cli").app
    alone = CliRunner().invoke(app, ["pairs", str(tmp_path), "--layout", "musubi"])
    assert alone.exit_code == 2 and "--materialise DIR" in alone.output
    both = CliRunner().invoke(app, ["pairs", str(tmp_path), "--no-align", "--reject-misaligned"])
    assert both.exit_code == 2 and "needs the check" in both.output


def test_public_functions_have_docstrings_and_annotations() -> None:
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            tree = ast.parse(path.read_text())
            assert ast.get_docstring(tree), f"{path} says nothing of itself"
            for node in tree.body:
                if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                    assert ast.get_docstring(node), f"{path.name}: {node.name} has no docstring"
