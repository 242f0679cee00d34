"""The JSON blocks of SimpleTuner's Kontext and FLUX.2 guides, as fixtures: keys and values theirs, comments ours."""

import json
from collections import Counter
from pathlib import Path

import pytest

from families import open_project
from schemas.config_file import Findings, normalise, read_json, validate
from schemas.loading import parse_prompt_library
from schemas.simpletuner import TRAINER_KEYS
from schemas.trainer import TrainerConfig

GUIDES = sorted((Path(__file__).parent / "guides").iterdir())


def kind_of(block):
    """Tell what a block is by its shape: a list holds datasets; an object's keys are options, or names of prompts."""
    if isinstance(block, list):
        return "datasets"
    known = {*TrainerConfig.model_fields, *TRAINER_KEYS}
    return "trainer" if any(key.lstrip("-") in known for key in block) else "prompts"


def test_the_guides_hold_17_dataset_files_15_trainer_fragments_and_a_prompt_library():
    assert Counter(kind_of(read_json(path)) for path in GUIDES) == {"datasets": 17, "trainer": 15, "prompts": 1}


def test_the_fixtures_keep_what_plain_json_refuses():
    with pytest.raises(ValueError):
        json.loads((GUIDES[0].parent / "kontext_pt_02.json").read_text())  # a trailing comma
    commented = [path.read_text(encoding="utf-8") for path in GUIDES if path.name.endswith(("_00.jsonc", "_01.jsonc"))]
    assert all("//" in text for text in commented)
    assert sum(not text.isascii() for text in commented) >= 6


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.stem)
def test_every_block_of_the_guides_is_valid_as_what_it_is(path, tmp_path):
    block, found = read_json(path), Findings()
    match kind_of(block):
        case "datasets":
            (tmp_path / "config.json").write_text(json.dumps({"data_backend_config": str(path)}))
            project = open_project(tmp_path)
            assert [dataset.id for dataset in project.datasets] == [entry["id"] for entry in block]
        case "trainer":
            values = normalise(block, TrainerConfig, TRAINER_KEYS, (path.name, ""), found)
            config = validate(values, TrainerConfig, (path.name, ""), found)
            assert config is not None and set(values) == config.model_fields_set
        case "prompts":
            assert parse_prompt_library(block, path.name, found) == block
    assert found.faults == []


@pytest.mark.parametrize("language", ["pt", "es", "hi", "en"])
def test_the_first_two_blocks_of_each_kontext_guide_make_a_project(language, tmp_path):
    folder = GUIDES[0].parent
    (tmp_path / "config.json").write_bytes((folder / f"kontext_{language}_00.jsonc").read_bytes())
    (tmp_path / "multidatabackend.json").write_bytes((folder / f"kontext_{language}_01.jsonc").read_bytes())

    project = open_project(tmp_path)

    [target] = project.targets
    [references] = project.references_of(target)
    assert project.flavour == "kontext"
    assert (target.id, target.caption_strategy) == ("my-edited-images", "textfile")
    assert (references.id, references.conditioning_type) == ("my-reference-images", "reference_strict")
    assert references.dataset_type == "conditioning" and references.caption_strategy is None


def test_the_flux2_guides_main_block_is_accepted_with_a_warning_where_simpletuner_refuses_it(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "multidatabackend.json").write_bytes((GUIDES[0].parent / "flux2_pt_06.json").read_bytes())
    project = open_project(tmp_path)
    assert [(one.maximum_image_size, one.target_downsample_size) for one in project.targets] == [(1024, None)]
    told = [one for one in project.warnings if "maximum_image_size" in one]
    assert len(told) == 1 and told[0].endswith("images are scaled to their bucket at once")


@pytest.mark.parametrize("number", ["00", "01", "02", "03", "04", "05"])
def test_translations_of_the_kontext_guide_differ_in_comments_only(number):
    [first, *others] = [
        read_json(path) for path in GUIDES if path.stem in {f"kontext_{x}_{number}" for x in ("pt", "es", "hi")}
    ]
    assert others == [first, first]
