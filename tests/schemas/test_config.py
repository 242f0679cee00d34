import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from families import FAMILIES, open_project
from schemas.config_file import read_json
from schemas.datasets import CompositeImage, DatasetConfig, Generator, HuggingFace
from schemas.errors import ConfigError, UserError
from schemas.options import facts_of
from schemas.recipes import RECIPES
from schemas.stores import LocalStore
from schemas.trainer import Route, TrainerConfig, Tread

STAGES = ("scan", "pairs", "cache", "train")

PHOTOS = '[{"id": "photos", "instance_data_dir": "photos"}]'
REFERENCES = {
    "id": "refs",
    "dataset_type": "conditioning",
    "instance_data_dir": "refs",
    "conditioning_type": "reference_strict",
}


def written(folder, config="{}", datasets=PHOTOS):
    """Write a project's two files; anything but text is spelled as JSON."""
    folder.mkdir(exist_ok=True)
    for name, content in (("config.json", config), ("multidatabackend.json", datasets)):
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def faults_of(project, **options):
    with pytest.raises(ConfigError) as caught:
        open_project(project, **options)
    return [str(fault) for fault in caught.value.faults]


# How the files may be written


def test_comments_trailing_commas_byte_order_marks_and_dashes_are_welcome(tmp_path):
    config = '\ufeff{\n  // the rank\n  "--lora_rank": 8, /* é */\n  "--learning-rate": 2e-4,\n}'
    datasets = '\ufeff[\n  {"id": "photos", "instance_data_dir": "photos",}, // "one" set\n]'

    project = open_project(written(tmp_path, config, datasets))

    assert (project.trainer.lora_rank, project.trainer.learning_rate) == (8, 2e-4)
    assert [dataset.id for dataset in project.datasets] == ["photos"]
    assert project.warnings == ()


def test_second_spellings_mean_the_first(tmp_path):
    datasets = [{"id": "photos", "instance_data_root": "photos"}, {"id": "old", "disable": True}]
    project = open_project(written(tmp_path, {"checkpoint_step_interval": 7}, datasets))
    assert project.trainer.checkpointing_steps == 7
    assert [(dataset.id, dataset.instance_data_dir) for dataset in project.datasets] == [("photos", "photos")]


@pytest.mark.parametrize(
    "config",
    ['{"lora_rank": 4, "--lora_rank": 8}', '{"checkpointing_steps": 4, "checkpoint_step_interval": 8}'],
)
def test_one_option_given_twice_is_a_fault(config, tmp_path):
    [fault] = faults_of(written(tmp_path, config))
    assert "given twice" in fault and "keep one" in fault


def test_bf16_text_encoders_are_those_that_are_not_quantised(tmp_path):
    options = {"text_encoder_1_precision": "bf16", "text_encoder_2_precision": "int8-quanto"}
    trainer = open_project(written(tmp_path, options)).trainer
    assert (trainer.text_encoder_1_precision, trainer.text_encoder_2_precision) == ("no_change", "int8-quanto")


def test_the_path_of_the_file_itself_names_a_project_too(tmp_path):
    written(tmp_path).joinpath("config.json").rename(tmp_path / "other.json")
    assert open_project(tmp_path / "other.json").config_path == tmp_path / "other.json"


def test_a_folder_without_config_says_what_a_project_is(tmp_path):
    with pytest.raises(UserError, match=r"config\.json: no such file; a project is a folder that holds config\.json"):
        open_project(tmp_path)


@pytest.mark.parametrize("broken", ["config.json", "multidatabackend.json"])
def test_a_syntax_error_names_the_file_and_its_line(broken, tmp_path):
    written(tmp_path).joinpath(broken).write_text('[\n  {"id": "photos"}\n  {"id": "more"}\n]')
    with pytest.raises(ConfigError) as caught:
        open_project(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}: {broken}: not valid JSON: line 3 ")


def test_syntax_errors_of_all_three_files_stand_beside_the_other_faults(tmp_path):
    (tmp_path / "prompts.json").write_text('{"portrait": }')
    faults = faults_of(written(tmp_path, {"lora_rnak": 8, "user_prompt_library": "prompts.json"}, "[\n{]"))
    assert [fault.partition(" ")[0] for fault in faults] == ["config.json:", "multidatabackend.json:", "prompts.json:"]
    assert faults[0].startswith("config.json: lora_rnak = 8: unknown key")
    assert faults[1].startswith("multidatabackend.json: not valid JSON: line 2 ")
    assert faults[2].startswith("prompts.json: not valid JSON: line 1 ")
    datasets = [{"id": "photos", "instance_data_dir": "photos", "repeatz": 3}]
    first, second = faults_of(written(tmp_path, "{", datasets))
    assert first.startswith("config.json: not valid JSON: ") and "repeatz" in second


@pytest.mark.parametrize("text", [
    '{"a": [1, -2.5, 1e3, true, null, ""], "b": {"c": {}}}', '"\\ud83d\\ude00 \\u00e9 \\n"', "[-Infinity, 1e999, -0]", " [] ",
])  # fmt: skip
def test_plain_json_reads_as_it_does_with_a_comment(text, tmp_path):
    read = []
    for name, comment in (("plain", ""), ("commented", "// so it is JSON5")):
        (tmp_path / name).write_text(text + comment)
        read.append(repr(read_json(tmp_path / name)))
    assert read[0] == read[1]


@pytest.mark.parametrize("text", ['{"a": 1, "b": 2, "a": 1}', '[{"b": {"a": 1, "a": 2}}]', '{"a": 1, "a": 2,}'])
def test_a_key_that_is_there_twice_is_told(text, tmp_path):
    (tmp_path / "twice.json").write_text(text)
    with pytest.raises(UserError, match=r'twice\.json: not valid JSON: Duplicate key "a"'):
        read_json(tmp_path / "twice.json")


def test_text_that_is_not_utf_8_is_named_with_the_place(tmp_path):
    written(tmp_path).joinpath("config.json").write_bytes(b'{"tracker_run_name": "caf\xe9"}')
    with pytest.raises(UserError, match=r"config\.json: not UTF-8 text .* at byte 25"):
        open_project(tmp_path)


def test_a_key_written_twice_is_not_valid(tmp_path):
    with pytest.raises(UserError, match="lora_rank"):
        open_project(written(tmp_path, '{"lora_rank": 4, "lora_rank": 8}'))


@pytest.mark.parametrize(
    ("config", "datasets", "says"),
    [
        ("[]", PHOTOS, "config.json: must be an object of options, found []"),
        ("{}", "{}", "multidatabackend.json: must be a list of at least one dataset, found {}"),
        ("{}", "[]", "multidatabackend.json: must be a list of at least one dataset, found []"),
    ],
)
def test_files_of_the_wrong_shape_are_refused(config, datasets, says, tmp_path):
    with pytest.raises(UserError) as caught:
        open_project(written(tmp_path, config, datasets))
    assert says in str(caught.value)


# Faults


FIVE_FAULTS = (
    {"lora_rnak": 8, "lr_scheduler": "cosin", "learning_rate": -1},
    [
        {
            "id": "photos",
            "instance_data_dir": "photos",
            "captoin_strategy": "textfile",
            "conditioning": [{"type": "superresolution", "blur_type": "gausian"}],
        }
    ],
)
FIVE_MESSAGES = (
    "config.json: lora_rnak = 8: unknown key; did you mean 'lora_rank'?",
    "config.json: lr_scheduler = \"cosin\": must be one of 'constant', 'constant_with_warmup', 'cosine', "
    "'cosine_with_restarts', 'linear' or 'polynomial'; did you mean 'cosine'?",
    "config.json: learning_rate = -1: must be greater than 0",
    'multidatabackend.json: [0] "photos" captoin_strategy = "textfile": unknown key; did you mean \'caption_strategy\'?',
    'multidatabackend.json: [0] "photos" conditioning[0].blur_type = "gausian": must be one of '
    "'gaussian', 'box', 'both' or 'none'; did you mean 'gaussian'?",
)


def test_all_faults_of_both_files_are_told_at_once_with_place_value_choices_and_hint(tmp_path):
    with pytest.raises(ConfigError) as caught:
        open_project(written(tmp_path, *FIVE_FAULTS))
    first, *lines = str(caught.value).splitlines()
    assert first == f"5 faults in {tmp_path}:"
    assert sorted(lines) == sorted(f"  {message}" for message in FIVE_MESSAGES)


def test_one_fault_is_told_on_one_line_with_the_projects_folder(tmp_path):
    with pytest.raises(ConfigError) as caught:
        open_project(written(tmp_path, {"lora_rnak": 8}))
    assert str(caught.value) == f"{tmp_path}: {FIVE_MESSAGES[0]}"


def test_a_fault_beside_an_unknown_family_hides_neither(tmp_path):
    faults = faults_of(written(tmp_path, {"model_family": "fluxx", "lora_rnak": 8}))
    assert len(faults) == 2
    assert any("model_family" in fault and "known: flux" in fault for fault in faults)


def test_a_fault_in_the_config_does_not_lose_the_dataset_file_it_names(tmp_path):
    config = {"lora_rnak": 8, "data_backend_config": "sets.json"}
    (tmp_path / "sets.json").write_text('[{"id": "photos", "instance_data_dir": "photos", "repeatz": 3}]')
    (tmp_path / "config.json").write_text(json.dumps(config))
    faults = faults_of(tmp_path)
    assert {fault.partition(" = ")[0] for fault in faults} == {
        "config.json: lora_rnak",
        'sets.json: [0] "photos" repeatz',
    }


def test_a_fault_in_the_config_does_not_hide_those_of_the_prompt_library(tmp_path):
    (tmp_path / "prompts.json").write_text('{"portrait": 3}')
    faults = faults_of(written(tmp_path, {"lora_rnak": 8, "user_prompt_library": "prompts.json"}))
    assert len(faults) == 2 and "prompts.json: portrait = 3: a prompt must be text" in faults


def test_an_unknown_family_flavour_or_lora_target_names_what_there_is(tmp_path):
    [family] = faults_of(written(tmp_path, {"model_family": "sdxl"}))
    flavour, target = faults_of(written(tmp_path, {"model_flavour": "kontxt", "flux_lora_target": "everything"}))
    assert family == f'config.json: model_family = "sdxl": unknown family; known: {", ".join(FAMILIES)}'
    assert flavour == 'config.json: model_flavour = "kontxt": unknown; flux has dev, schnell, kontext'
    assert target.startswith('config.json: flux_lora_target = "everything": unknown; flux has ')
    assert all(name in target for name in FAMILIES["flux"].lora_targets)


def test_an_alignment_the_family_cannot_run_is_a_fault(tmp_path):
    [fault] = faults_of(written(tmp_path, {"aspect_bucket_alignment": 24}))
    assert fault == "config.json: aspect_bucket_alignment = 24: flux needs a multiple of 16"
    assert open_project(written(tmp_path, {"aspect_bucket_alignment": 16})).alignment == 16
    assert open_project(written(tmp_path)).alignment == 64


def test_a_guidance_range_upside_down_is_a_fault(tmp_path):
    [fault] = faults_of(written(tmp_path, {"flux_guidance_min": 5, "flux_guidance_max": 4}))
    assert "flux_guidance_min 5.0 is above flux_guidance_max 4.0" in fault


def test_two_datasets_of_one_id_are_a_fault(tmp_path):
    twice = [{"id": "photos", "instance_data_dir": "a"}, {"id": "photos", "instance_data_dir": "b"}]
    [fault] = faults_of(written(tmp_path, datasets=twice))
    assert fault == 'multidatabackend.json: "photos" id: given to two datasets; ids are unique'


@pytest.mark.parametrize(
    "name", ["a/b", "a\\b", "..", ".hidden", "", "c:", "what?", "a*", 'say "so"', "<a>", "a|b", "a\tb", "a\n", "a\0"]
)
def test_an_id_that_cannot_be_a_file_name_is_a_fault(name, tmp_path):
    [fault] = faults_of(written(tmp_path, datasets=[{"id": name, "instance_data_dir": "photos"}]))
    assert fault.startswith("multidatabackend.json: [0] ") and " id = " in fault


def test_an_id_too_long_for_a_file_name_is_a_fault(tmp_path):
    [fault] = faults_of(written(tmp_path, datasets=[{"id": "x" * 300, "instance_data_dir": "photos"}]))
    assert " id = " in fault


@pytest.mark.parametrize("name", ["photos", "Fotos für später", "v1.2", "a-b_c", "9", "фото"])
def test_other_ids_are_file_names(name, tmp_path):
    project = open_project(written(tmp_path, datasets=[{"id": name, "instance_data_dir": "photos"}]))
    assert project.manifest(name) == tmp_path / "work" / "manifests" / f"{name}.parquet"
    assert project.pair_table(name) == tmp_path / "work" / "pairs" / f"{name}.parquet"


def test_conditioning_data_must_name_a_dataset(tmp_path):
    datasets = [{"id": "photos", "instance_data_dir": "photos", "conditioning_data": ["refs", "photos"]}]
    place = 'multidatabackend.json: "photos" conditioning_data'
    assert faults_of(written(tmp_path, datasets=datasets)) == [
        f'{place} = "refs": no such dataset; datasets: photos',
        f'{place} = "photos": names the dataset itself; name another',
    ]


def test_conditioning_data_must_name_references_and_nothing_else(tmp_path):
    targets = {"id": "photos", "instance_data_dir": "photos", "conditioning_data": ["text", "more"]}
    others = [{"id": "text", "dataset_type": "text_embeds"}, {"id": "more", "instance_data_dir": "more"}]
    place, hint = 'multidatabackend.json: "photos" conditioning_data', 'references have "dataset_type": "conditioning"'
    assert faults_of(written(tmp_path, datasets=[targets, *others])) == [
        f'{place} = "{name}": must name a set of references; {hint}' for name in ("text", "more")
    ]


def test_a_link_to_a_disabled_set_says_so(tmp_path):
    targets = {"id": "photos", "instance_data_dir": "photos", "conditioning_data": "refs"}
    [fault] = faults_of(written(tmp_path, datasets=[targets, {**REFERENCES, "disabled": True}]))
    assert fault == 'multidatabackend.json: "photos" conditioning_data = "refs": no such dataset; it is disabled'


@pytest.mark.parametrize("given", ["refs", ["refs"]])
@pytest.mark.parametrize("order", [1, -1])
def test_a_set_and_its_references_may_stand_in_any_order_and_be_linked_both_ways(given, order, tmp_path):
    targets = {"id": "photos", "instance_data_dir": "photos", "conditioning_data": given}
    for links in ({}, {"source_dataset_id": "photos"}):
        project = open_project(written(tmp_path, datasets=[targets, {**REFERENCES, **links}][::order]))
        assert [one.id for one in project.references_of(project.dataset("photos"))] == ["refs"]
        assert project.dataset("photos").conditioning_data == ("refs",)
        assert project.warnings == ()


def test_sets_that_reference_each_other_go_in_a_circle_and_every_circle_is_told(tmp_path):
    def references(name, other):
        return {**REFERENCES, "id": name, "conditioning_data": other}

    targets = {"id": "photos", "instance_data_dir": "photos", "conditioning_data": "a"}
    datasets = [targets, references("a", "b"), references("b", "a"), references("c", "d"), references("d", "c")]
    faults = faults_of(written(tmp_path, datasets=datasets))
    circles = [fault.rpartition("goes in a circle: ")[2].partition(";")[0].split(" -> ") for fault in faults]
    assert [(len(one), one[0] == one[-1], set(one)) for one in circles] == [
        (3, True, {"a", "b"}),
        (3, True, {"c", "d"}),
    ]
    [between, role] = faults_of(written(tmp_path, datasets=[targets, references("a", "photos")]))
    assert sorted([between, role])[0].startswith('multidatabackend.json: "a" conditioning_data = "photos": must name')
    assert any("goes in a circle: " in one and "photos -> a" in one for one in (between, role))


def test_several_default_text_stores_are_a_fault(tmp_path):
    stores = [{"id": name, "dataset_type": "text_embeds", "default": True} for name in ("one", "two")]
    [fault] = faults_of(written(tmp_path, datasets=[*json.loads(PHOTOS), *stores]))
    assert fault == (
        'multidatabackend.json: "two" default = true: two text_embeds entries are the default; "one" is one already'
    )


def test_source_dataset_id_must_name_a_set_of_targets(tmp_path):
    datasets = [
        {"id": "photos", "instance_data_dir": "photos"},
        {**REFERENCES, "id": "a", "source_dataset_id": "b"},
        {**REFERENCES, "id": "b", "source_dataset_id": "c"},
    ]
    references, unknown = faults_of(written(tmp_path, datasets=datasets))
    assert references.startswith(
        'multidatabackend.json: "a" source_dataset_id = "b": must name a set of targets; references have '
    )
    assert unknown == ('multidatabackend.json: "b" source_dataset_id = "c": no such dataset; datasets: photos, a, b')


def test_references_must_say_whether_they_take_their_targets_crop(tmp_path):
    references = {**REFERENCES, "source_dataset_id": "photos"}
    references.pop("conditioning_type")
    datasets = [{"id": "photos", "instance_data_dir": "photos"}, references]
    [fault] = faults_of(written(tmp_path, datasets=datasets))
    assert fault == (
        'multidatabackend.json: "refs" conditioning_type: missing, but required of references; '
        "reference_strict takes the target's crop, reference_loose its own"
    )


@pytest.mark.parametrize("kind", ["image", "eval"])
def test_targets_must_not_say_what_is_for_references(kind, tmp_path):
    targets = {"id": "photos", "dataset_type": kind, "instance_data_dir": "photos"}
    others = {"id": "more", "instance_data_dir": "more"}
    [geometry] = faults_of(written(tmp_path, datasets=[{**targets, "conditioning_type": "reference_loose"}, others]))
    [source] = faults_of(written(tmp_path, datasets=[{**targets, "source_dataset_id": "more"}, others]))
    assert geometry == (
        'multidatabackend.json: "photos" conditioning_type = "reference_loose": is for references; '
        'references have "dataset_type": "conditioning"'
    )
    assert source == (
        'multidatabackend.json: "photos" source_dataset_id = "more": is for references; '
        'references have "dataset_type": "conditioning"'
    )


def test_conditioning_data_that_names_a_set_twice_is_a_fault(tmp_path):
    targets = {"id": "photos", "instance_data_dir": "photos", "conditioning_data": ["refs", "refs"]}
    [fault] = faults_of(written(tmp_path, datasets=[targets, REFERENCES]))
    assert fault == 'multidatabackend.json: "photos" conditioning_data = "refs": names a set twice; keep one'


@pytest.mark.parametrize(
    "datasets",
    [
        [{"id": "photos", "instance_data_dir": "photos", "disabled": True}],
        [{"id": "text", "dataset_type": "text_embeds"}],
        [REFERENCES],
    ],
)
def test_a_project_without_a_set_of_targets_is_a_fault(datasets, tmp_path):
    faults = faults_of(written(tmp_path, datasets=datasets))
    assert faults == ["multidatabackend.json: no dataset of targets is enabled; nothing to prepare or train on"]


def test_the_held_out_set_must_be_a_set_of_targets(tmp_path):
    targets = {"id": "photos", "instance_data_dir": "photos", "conditioning_data": "refs"}
    held_out = {"id": "held-out", "dataset_type": "eval", "instance_data_dir": "more"}
    datasets = [targets, REFERENCES, held_out]
    for name in ("refs", "missing"):
        [fault] = faults_of(written(tmp_path, {"eval_dataset_id": name}, datasets))
        assert fault == (
            f'config.json: eval_dataset_id = "{name}": no such set of targets; sets of targets: photos, held-out'
        )
    assert open_project(written(tmp_path, {"eval_dataset_id": "held-out"}, datasets)).trainer.eval_dataset_id


def test_a_dataset_of_images_needs_a_folder(tmp_path):
    faults = faults_of(written(tmp_path, datasets=[{"id": "photos"}, {"id": "text", "dataset_type": "text_embeds"}]))
    assert faults == [
        'multidatabackend.json: "photos" instance_data_dir: missing, but required; a dataset of type "local" lies there'
    ]


@pytest.mark.parametrize(
    "how", [{"caption_strategy": "instanceprompt"}, {"prepend_instance_prompt": True}, {"only_instance_prompt": True}]
)
def test_options_that_show_the_instance_prompt_need_one(how, tmp_path):
    dataset = {"id": "photos", "instance_data_dir": "photos", **how}
    [fault] = faults_of(written(tmp_path, datasets=[dataset]))
    assert fault == (
        'multidatabackend.json: "photos" instance_prompt: missing, but required; a text, or a list of texts'
    )
    assert open_project(written(tmp_path, datasets=[{**dataset, "instance_prompt": "a photo"}]))


@pytest.mark.parametrize("strategy", ["csv", "parquet", "huggingface"])
def test_captions_that_a_folder_of_images_does_not_have_are_a_fault(strategy, tmp_path):
    dataset = {"id": "photos", "instance_data_dir": "photos", "caption_strategy": strategy}
    [fault] = faults_of(written(tmp_path, datasets=[dataset]))
    assert fault.startswith(f'multidatabackend.json: "photos" caption_strategy = "{strategy}": ')


# Warnings


def test_simpletuner_keys_that_are_not_needed_are_warnings(tmp_path):
    config = {"--push_to_hub": True, "ema_device": "cpu"}
    datasets = [{"id": "photos", "instance_data_dir": "photos", "start_epoch": 2}]
    warnings = open_project(written(tmp_path, config, datasets)).warnings
    assert [text.partition(": ")[0] for text in warnings] == ["config.json", "config.json", "multidatabackend.json"]
    assert warnings[0].startswith("config.json: push_to_hub: ignored: nothing is uploaded")
    assert warnings[1].startswith("config.json: ema_device: not in this version")
    assert warnings[2].startswith('multidatabackend.json: [0] "photos" start_epoch: not in this version')


def test_a_generators_options_without_effect_are_warnings_too(tmp_path):
    generator = {"type": "jpeg_artifacts", "progressive": True, "instance_data_dir": "generated"}
    datasets = [{"id": "photos", "instance_data_dir": "photos", "conditioning": [generator]}]
    warnings = open_project(written(tmp_path, datasets=datasets)).warnings
    assert any("progressive has no effect" in text for text in warnings)
    assert any("instance_data_dir has no effect" in text for text in warnings)


NEVER = {"step": "blur", "probability": 0}
UNCHANGED = {"step": "resize", "factor": 1}


@pytest.mark.parametrize(
    ("generator", "idle"),
    [
        ({"type": "chain", "steps": [NEVER]}, True),
        ({"type": "chain", "steps": [{"step": "shuffle", "steps": [NEVER, {**UNCHANGED, "steps": [NEVER]}]}]}, True),
        ({"type": "chain", "steps": [NEVER, {"step": "jpeg", "probability": 0.01}]}, False),
        ({"type": "chain", "steps": [{**UNCHANGED, "steps": [{"step": "jpeg"}]}]}, False),
        ({"type": "superresolution", "blur_type": "none", "add_noise": False}, True),
        ({"type": "superresolution", "blur_radius": 0, "noise_level": 0, "downscale_factor": 1}, True),
        ({"type": "superresolution", "blur_type": "none", "add_noise": False, "jpeg_quality": 90}, False),
        ({"type": "jpeg_artifacts"}, False),
    ],
)
def test_a_generator_that_changes_no_picture_is_a_warning(generator, idle, tmp_path):
    datasets = [{"id": "photos", "instance_data_dir": "photos", "conditioning": [generator]}]
    warnings = open_project(written(tmp_path, datasets=datasets)).warnings
    assert [True for text in warnings if "conditioning[0] has no effect: no picture is changed" in text] == [
        True
    ] * idle


def test_sizes_that_need_a_crop_warn_without_one(tmp_path):
    sizes = {"maximum_image_size": 2048, "target_downsample_size": 1024}
    folder = {"id": "photos", "instance_data_dir": "photos"}
    [without] = open_project(written(tmp_path, datasets=[{**folder, **sizes}])).warnings
    [half] = open_project(written(tmp_path, datasets=[{**folder, "crop": True, "maximum_image_size": 2048}])).warnings
    assert 'have no effect without "crop": true' in without
    assert "maximum_image_size has no effect without target_downsample_size" in half
    assert open_project(written(tmp_path, datasets=[{**folder, **sizes, "crop": True}])).warnings == ()


def test_references_that_no_target_asks_for_are_a_warning(tmp_path):
    targets = {"id": "photos", "instance_data_dir": "photos"}
    [warning] = open_project(written(tmp_path, datasets=[targets, REFERENCES])).warnings
    assert '"refs" is no target set\'s conditioning_data' in warning
    linked = [targets, {**REFERENCES, "source_dataset_id": "photos"}]
    assert open_project(written(tmp_path, datasets=linked)).warnings == ()


# Folders


def test_relative_paths_start_at_the_folder_of_the_config_and_products_go_to_work(tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    project = open_project(written(tmp_path, {"output_dir": "run"}))
    assert project.folder_of(project.dataset("photos")) == tmp_path / "photos"
    assert (project.root, project.workspace, project.run_folder) == (tmp_path, tmp_path / "work", tmp_path / "run")


def test_root_and_workspace_move_inputs_and_products(tmp_path, monkeypatch):
    project = written(tmp_path)
    (tmp_path / "elsewhere" / "photos").mkdir(parents=True)
    (tmp_path / "elsewhere" / "multidatabackend.json").write_text(PHOTOS)
    monkeypatch.chdir(tmp_path)

    opened = open_project(project, root="elsewhere", workspace="products", need_images=True)

    assert opened.folder_of(opened.dataset("photos")) == tmp_path / "elsewhere" / "photos"
    assert opened.manifest("photos") == tmp_path / "products" / "manifests" / "photos.parquet"


def test_the_dataset_file_lies_beside_the_config_whatever_the_root_unless_it_is_named(tmp_path):
    project = written(tmp_path / "project", datasets=PHOTOS)
    opened = open_project(project, root=tmp_path)
    assert opened.folder_of(opened.dataset("photos")) == tmp_path / "photos"
    written(project, {"data_backend_config": "project/sets.json"})
    (project / "sets.json").write_text('[{"id": "named", "instance_data_dir": "named"}]')
    assert [one.id for one in open_project(project, root=tmp_path).datasets] == ["named"]


def test_absolute_paths_stay_as_they_are(tmp_path):
    datasets = [{"id": "photos", "instance_data_dir": "/data/photos", "cache_dir_vae": "/data/latents"}]
    project = open_project(written(tmp_path, {"output_dir": "/data/run"}, datasets), root=tmp_path / "x" / "..")
    [photos] = project.datasets
    assert project.folder_of(photos) == Path("/data/photos")
    assert (project.latent_store(photos), project.run_folder) == (LocalStore(Path("/data/latents")), Path("/data/run"))


def test_a_missing_folder_is_named_resolved_only_when_images_are_needed(tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    project = written(tmp_path)
    assert open_project(project).targets
    [fault] = faults_of(project, need_images=True)
    assert fault == f'multidatabackend.json: "photos" instance_data_dir: no such folder: {tmp_path / "photos"}'
    with pytest.raises(ConfigError, match="no such folder"):
        open_project(open_project(project), need_images=True)


def test_a_folder_found_from_here_hints_at_root(tmp_path, monkeypatch):
    (tmp_path / "project").mkdir()
    (tmp_path / "photos").mkdir()
    project = written(tmp_path / "project")
    monkeypatch.chdir(tmp_path)
    [fault] = faults_of(project, need_images=True)
    assert str(tmp_path / "project" / "photos") in fault
    assert fault.endswith("it exists below the current folder: add --root .")


def test_a_missing_dataset_file_is_named_resolved_and_hints_at_root_where_that_helps(tmp_path, monkeypatch):
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "config.json").write_text('{"data_backend_config": "sets/all.json"}')
    monkeypatch.chdir(tmp_path)
    [missing] = faults_of(tmp_path / "project")
    assert missing == (
        f"config.json: data_backend_config: no such file: {tmp_path / 'project' / 'sets' / 'all.json'}; "
        "data_backend_config names the file"
    )
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets" / "all.json").write_text(PHOTOS)
    [found] = faults_of(tmp_path / "project")
    assert found.endswith("add --root .")
    assert open_project(tmp_path / "project", root=".").targets


def test_a_file_in_place_of_a_folder_is_missing_too(tmp_path):
    (tmp_path / "photos").write_bytes(b"")
    [fault] = faults_of(written(tmp_path), need_images=True)
    assert "no such folder" in fault


def test_only_local_folders_and_lists_must_be_there_when_the_project_is_opened(tmp_path):
    there = [
        {"id": "hub", "type": "huggingface", "dataset_name": "a/b"},
        {"id": "bucket", "type": "aws", "aws_bucket_name": "photos"},
        {"id": "url", "instance_data_dir": "s3://photos/sub"},
    ]
    assert len(open_project(written(tmp_path, datasets=there), need_images=True).targets) == 3
    [fault] = faults_of(
        written(tmp_path, datasets=[*there, {"id": "list", "type": "csv", "csv_file": "list.csv"}]), need_images=True
    )
    assert fault == f'multidatabackend.json: "list" csv_file: no such file: {tmp_path / "list.csv"}'


def test_text_embeds_go_to_the_default_store(tmp_path):
    datasets = [
        {"id": "photos", "instance_data_dir": "photos"},
        {"id": "first", "dataset_type": "text_embeds", "cache_dir": "one"},
        {"id": "second", "dataset_type": "text_embeds", "cache_dir": "two", "default": True},
    ]
    assert open_project(written(tmp_path, datasets=datasets)).text_store == LocalStore(tmp_path / "two")
    assert open_project(written(tmp_path, datasets=datasets[:2])).text_store == LocalStore(tmp_path / "one")
    assert open_project(written(tmp_path, datasets=datasets[:1])).text_store == LocalStore(
        tmp_path / "work" / "cache" / "text"
    )


def test_a_prompt_library_is_read_beside_the_config(tmp_path):
    (tmp_path / "prompts.json").write_text('{"portrait": "a portrait", "scène": "une scène"}', encoding="utf-8")
    project = open_project(written(tmp_path, {"user_prompt_library": "prompts.json"}))
    assert project.prompt_library == {"portrait": "a portrait", "scène": "une scène"}
    [fault] = faults_of(written(tmp_path, {"user_prompt_library": "other.json"}))
    assert f"no such file: {tmp_path / 'other.json'}" in fault


# Overrides


def test_overrides_replace_options_of_the_config(tmp_path):
    project = written(tmp_path, {"lora_rank": 4, "model_flavour": "dev", "tracker_run_name": "first"})
    overrides = [
        "lora_rank=8",
        "--learning_rate=2e-4",
        "model_flavour=null",
        "flow_schedule_auto_shift=false",
        "pretrained_model_name_or_path=models/a=b",
    ]
    trainer = open_project(project, overrides=overrides).trainer
    assert (trainer.lora_rank, trainer.learning_rate, trainer.model_flavour) == (8, 2e-4, None)
    assert trainer.flow_schedule_auto_shift is False
    assert trainer.pretrained_model_name_or_path == "models/a=b"
    assert trainer.tracker_run_name == "first"


def test_an_override_of_an_option_that_is_text_stays_text(tmp_path):
    (tmp_path / "2024").write_text(PHOTOS)
    project = written(tmp_path)
    for name in ("2024", "null", "true", "2e-4"):
        assert open_project(project, overrides=[f"--tracker-run-name={name}"]).trainer.tracker_run_name == name
    assert open_project(project, overrides=["data_backend_config=2024"]).trainer.data_backend_config == "2024"


def test_an_override_mends_a_bad_value_and_the_last_one_counts(tmp_path):
    project = written(tmp_path, {"lora_rank": "many"})
    assert open_project(project, overrides=["lora_rank=4", "lora_rank=8"]).trainer.lora_rank == 8


@pytest.mark.parametrize("text", ["lora_rank", "lora_rank 8", ""])
def test_an_override_without_a_value_shows_how_it_is_written(text, tmp_path):
    with pytest.raises(UserError, match="must be key=value, for example --set learning_rate=2e-4"):
        open_project(written(tmp_path), overrides=[text])


def test_a_bad_override_is_a_fault_like_any_other(tmp_path):
    unknown, value = faults_of(written(tmp_path), overrides=["lora_rnak=8", "lr_scheduler=cosin"])
    assert unknown == "--set: lora_rnak = 8: unknown key; did you mean 'lora_rank'?"
    assert value.startswith('--set: lr_scheduler = "cosin": must be one of ')
    assert value.endswith("did you mean 'cosine'?")


def test_a_fault_of_a_value_names_where_the_value_stands(tmp_path):
    faults = faults_of(written(tmp_path, {"lora_rank": 0, "seed": -1}), overrides=["seed=-2", "--max-grad-norm=-1"])
    assert sorted(fault.partition(": ")[0::2] for fault in faults) == [
        ("--set", "max_grad_norm = -1: must be greater than or equal to 0"),
        ("--set", "seed = -2: must be greater than or equal to 0"),
        ("config.json", "lora_rank = 0: must be greater than or equal to 1"),
    ]


# Datasets


def test_a_disabled_entry_is_dropped_whatever_it_says(tmp_path):
    datasets = [
        {"id": "photos", "instance_data_dir": "photos", "conditioning_data": "refs"},
        {"id": "refs", "disabled": True, "nonsense": 1},
        {"id": "photos", "disable": True, "resolution": "none"},
    ]
    [fault] = faults_of(written(tmp_path, datasets=datasets))
    assert "no such dataset" in fault
    datasets[0].pop("conditioning_data")
    assert [dataset.id for dataset in open_project(written(tmp_path, datasets=datasets)).datasets] == ["photos"]


@pytest.mark.parametrize("value", [False, "false", "False", "no", 0, "0", "", None])
@pytest.mark.parametrize("key", ["disabled", "disable"])
def test_an_entry_that_is_not_disabled_stays_in_however_that_is_spelled(key, value, tmp_path):
    datasets = [{"id": "photos", "instance_data_dir": "photos", key: value}]
    assert [one.id for one in open_project(written(tmp_path, datasets=datasets)).targets] == ["photos"]


@pytest.mark.parametrize("value", [True, "true", 1, "1", "yes"])
def test_an_entry_that_is_disabled_is_left_out_however_that_is_spelled(value, tmp_path):
    datasets = [{"id": "photos", "instance_data_dir": "photos"}, {"id": "more", "disabled": value}]
    assert [one.id for one in open_project(written(tmp_path, datasets=datasets)).datasets] == ["photos"]


def test_an_entry_that_is_no_object_is_a_fault(tmp_path):
    [fault] = faults_of(written(tmp_path, datasets='[{"id": "photos", "instance_data_dir": "photos"}, "more"]'))
    assert fault == 'multidatabackend.json: [1] = "more": must be an object'


def test_the_configs_sizes_and_captions_stand_in_where_a_dataset_says_nothing(tmp_path):
    config = {"resolution": 512, "resolution_type": "pixel", "caption_strategy": "textfile", "minimum_image_size": 256}
    datasets = [
        {"id": "silent", "instance_data_dir": "a"},
        {
            "id": "own",
            "instance_data_dir": "b",
            "resolution": 768,
            "caption_strategy": None,
            "minimum_image_size": None,
        },
        {"id": "refs", "instance_data_dir": "c", "conditioning_type": "reference_loose", "source_dataset_id": "own"},
    ]
    silent, own, refs = open_project(written(tmp_path, config, datasets)).datasets
    assert (silent.resolution, silent.resolution_type, silent.caption_strategy) == (512, "pixel", "textfile")
    assert (own.resolution, own.resolution_type, own.caption_strategy) == (768, "pixel", None)
    assert (silent.minimum_image_size, own.minimum_image_size) == (256, None)
    assert (refs.dataset_type, refs.caption_strategy, refs.resolution) == ("conditioning", None, 512)


def test_references_come_in_the_order_listed_then_those_that_name_their_source(tmp_path):
    references = [{**REFERENCES, "id": name} for name in ("one", "two", "three")]
    references[0]["source_dataset_id"] = references[1]["source_dataset_id"] = "photos"
    photos = {"id": "photos", "instance_data_dir": "photos", "conditioning_data": ["three", "two"]}
    project = open_project(written(tmp_path, datasets=[*references, photos]))
    assert [dataset.id for dataset in project.references_of(project.dataset("photos"))] == ["three", "two", "one"]


def test_held_out_sets_are_targets_too(tmp_path):
    datasets = [
        {"id": "photos", "instance_data_dir": "photos"},
        {"id": "held-out", "dataset_type": "eval", "instance_data_dir": "more"},
        {"id": "text", "dataset_type": "text_embeds"},
    ]
    project = open_project(written(tmp_path, datasets=datasets))
    assert [dataset.id for dataset in project.targets] == ["photos", "held-out"]
    assert [dataset.id for dataset in project.scanned] == ["photos", "held-out"]


# Values


@pytest.mark.parametrize("none", [0, "0", "", None])
@pytest.mark.parametrize("key", ["minimum_image_size", "maximum_image_size", "target_downsample_size"])
def test_a_size_of_nothing_is_none(key, none, tmp_path):
    dataset = {"id": "photos", "instance_data_dir": "photos", "crop": True}
    project = open_project(written(tmp_path, {key: none}, [{**dataset, key: none}, {**dataset, "id": "silent"}]))
    assert getattr(project.trainer, key) is None
    assert [getattr(one, key) for one in project.datasets] == [None, None]
    assert project.warnings == ()
    [fault] = faults_of(written(tmp_path, datasets=[{**dataset, key: -1}]))
    assert f"{key} = -1: must be greater than 0" in fault


@pytest.mark.parametrize("none", ["", None, 0])
def test_no_repeats_may_be_spelled_in_three_ways(none, tmp_path):
    [photos] = open_project(
        written(tmp_path, datasets=[{"id": "photos", "instance_data_dir": "photos", "repeats": none}])
    ).targets
    assert photos.repeats == 0


def test_neither_steps_nor_epochs_are_set_unless_they_are_given(tmp_path):
    trainer = open_project(written(tmp_path)).trainer
    assert (trainer.max_train_steps, trainer.num_train_epochs) == (0, 0)


def test_a_fixed_shift_may_be_0_and_not_below(tmp_path):
    assert open_project(written(tmp_path, {"flow_schedule_shift": 0})).trainer.flow_schedule_shift == 0
    [fault] = faults_of(written(tmp_path, {"flow_schedule_shift": -0.1}))
    assert "flow_schedule_shift = -0.1: must be greater than or equal to 0" in fault


@pytest.mark.parametrize("name", ["team/portraits", "2024/05/first try", "a", "première-fois_2.0"])
def test_a_run_may_lie_in_folders_of_runs(name, tmp_path):
    assert open_project(written(tmp_path, {"tracker_run_name": name})).run_folder == tmp_path / "work" / "runs" / name


@pytest.mark.parametrize("name", ["", "/", "/a", "a/", "a//b", "../a", "a/..", "a/./b", ".hidden", "a\\b"])
def test_a_run_must_lie_among_the_runs(name, tmp_path):
    [fault] = faults_of(written(tmp_path, {"tracker_run_name": name}))
    assert fault.startswith("config.json: tracker_run_name = ")


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (1024, ((1024, 1024),)),
        ("768", ((768, 768),)),
        ("1024x768", ((1024, 768),)),
        ("512x768, 1024X1024", ((512, 768), (1024, 1024))),
        ("0.25", ((500, 500),)),
        (1.0, ((1000, 1000),)),
    ],
)
def test_sampled_pictures_may_have_any_size(size, expected, tmp_path):
    project = open_project(written(tmp_path, {"validation_resolution": size}))
    assert project.warnings == () and project.trainer.validation_sizes == expected


@pytest.mark.parametrize(
    "size", ["", "large", "1024x", "x1024", "1024x768x3", "0", "-512", "100x15", "9000", "512x8", "1e999"]
)
def test_sizes_of_sampled_pictures_are_checked(size, tmp_path):
    [fault] = faults_of(written(tmp_path, {"validation_resolution": size}))
    assert fault.startswith(f'config.json: validation_resolution = "{size}"') and "such as 1024x768" in fault


def test_a_schema_named_for_an_editor_is_ignored(tmp_path):
    datasets = [{"$schema": "datasets.json", "id": "photos", "instance_data_dir": "photos"}]
    assert open_project(written(tmp_path, {"$schema": "config.schema.json"}, datasets)).warnings == ()


def test_gradient_checkpointing_has_a_second_spelling(tmp_path):
    for value in (True, False):
        trainer = open_project(written(tmp_path, {"use_gradient_checkpointing": value})).trainer
        assert trainer.gradient_checkpointing is value


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("key", ["lora_rank", "learning_rate", "lora_alpha", "max_train_steps", "minimum_image_size"])
def test_a_yes_or_no_is_no_number(key, value, tmp_path):
    [fault] = faults_of(written(tmp_path, {key: value}))
    assert fault == f"config.json: {key} = {json.dumps(value)}: must be a number"


@pytest.mark.parametrize("key", ["repeats", "resolution", "target_downsample_size"])
def test_a_yes_or_no_is_no_number_of_a_dataset_either(key, tmp_path):
    [fault] = faults_of(written(tmp_path, datasets=[{"id": "photos", "instance_data_dir": "photos", key: True}]))
    assert fault == f'multidatabackend.json: [0] "photos" {key} = true: must be a number'


def test_an_unknown_key_inside_an_option_is_a_fault_with_a_hint(tmp_path):
    columns = {"caption_colunm": "text", "composite_image_config": {"image_cuont": 3}, "nonsense": 1}
    datasets = [{"id": "hub", "type": "huggingface", "dataset_name": "a/b", "huggingface": columns}]
    place = 'multidatabackend.json: [0] "hub" huggingface'
    assert sorted(faults_of(written(tmp_path, datasets=datasets))) == [
        f"{place}.caption_colunm = \"text\": unknown key; did you mean 'caption_column'?",
        f"{place}.composite_image_config.image_cuont = 3: unknown key; did you mean 'image_count'?",
        f"{place}.nonsense = 1: unknown key",
    ]


# Generators of references


def test_generators_may_be_named_by_their_aliases_with_parameters_flat_or_in_params(tmp_path):
    generators = [
        {"type": "lowres", "params": {"blur_radius": 3.5, "add_noise": False}, "captions": "sharpen"},
        {"type": "jpeg", "quality": 7, "params": {"quality": 9, "compression_rounds": 2}, "captions": False},
    ]
    datasets = [{"id": "photos", "instance_data_dir": "photos", "conditioning": generators}]
    project = open_project(written(tmp_path, datasets=datasets))
    [photos] = project.datasets
    blurred, compressed = photos.conditioning
    assert (blurred.recipe.type, blurred.recipe.blur_radius, blurred.recipe.add_noise) == (
        "superresolution",
        3.5,
        False,
    )
    assert (compressed.recipe.type, compressed.recipe.quality, compressed.recipe.compression_rounds) == (
        "jpeg_artifacts",
        7,
        2,
    )
    assert (blurred.captions, compressed.captions) == (("sharpen",), ())
    assert photos.generated_ids == ("photos_conditioning_superresolution", "photos_conditioning_jpeg_artifacts")


@pytest.mark.parametrize(
    ("alias", "kind"), [("super_resolution", "superresolution"), ("compression", "jpeg_artifacts")]
)
def test_simpletuners_other_names_of_generators_are_known(alias, kind, tmp_path):
    datasets = [{"id": "photos", "instance_data_dir": "photos", "conditioning": {"type": alias}}]
    [photos] = open_project(written(tmp_path, datasets=datasets)).datasets
    assert [entry.recipe.type for entry in photos.conditioning] == [kind]


def test_faults_of_generators_name_the_entry_and_the_parameter(tmp_path):
    generators = [
        {"type": "jpeg", "qualty": 3},
        {"type": "canny"},
        {"type": "superresolution", "params": {"noise_level": 2}},
        {"quality": 3},
        {"type": "jpeg", "quality_range": [50, 10]},
    ]
    place = 'multidatabackend.json: [0] "photos" conditioning'
    datasets = [{"id": "photos", "instance_data_dir": "photos", "conditioning": generators}]
    faults = faults_of(written(tmp_path, datasets=datasets))
    assert (
        f"{place}[3] = {{\"quality\": 3}}: must be an object with a 'type'; known types: superresolution, jpeg_artifacts, chain"
        in faults
    )
    assert f"{place}[0].qualty = 3: unknown key; did you mean 'quality'?" in faults
    assert (
        f"{place}[1].type = \"canny\": must be one of 'superresolution', 'jpeg_artifacts', 'chain'; did you mean 'chain'?"
        in faults
    )
    assert f"{place}[2].noise_level = 2: must be less than or equal to 1" in faults
    assert any("the lower end comes first: [10, 50]" in fault for fault in faults)


@pytest.mark.parametrize("params", [5, "blur", ["blur_radius", 3]])
def test_params_that_are_no_object_are_a_fault(params, tmp_path):
    generator = {"type": "superresolution", "params": params}
    datasets = [{"id": "photos", "instance_data_dir": "photos", "conditioning": [generator]}]
    [fault] = faults_of(written(tmp_path, datasets=datasets))
    assert "params" in fault


def test_generators_that_are_no_list_are_a_fault(tmp_path):
    datasets = [{"id": "photos", "instance_data_dir": "photos", "conditioning": "superresolution"}]
    [fault] = faults_of(written(tmp_path, datasets=datasets))
    assert fault == 'multidatabackend.json: [0] "photos" conditioning = "superresolution": must be a list of generators'


def test_two_reference_sets_of_one_name_are_a_fault(tmp_path):
    datasets = [
        {"id": "photos", "instance_data_dir": "photos", "conditioning": [{"type": "jpeg"}]},
        {**REFERENCES, "id": "photos_conditioning_jpeg_artifacts"},
    ]
    faults = faults_of(written(tmp_path, datasets=datasets))
    assert faults and all(
        "two reference sets would have the id 'photos_conditioning_jpeg_artifacts'" in one for one in faults
    )


def test_generators_of_one_type_have_ids_of_their_own(tmp_path):
    generators = [{"type": "jpeg", "quality": 10}, {"type": "lowres"}, {"type": "jpeg", "quality": 20}]
    datasets = [{"id": "photos", "instance_data_dir": "photos", "conditioning": generators}]
    project = open_project(written(tmp_path, datasets=datasets))
    names = ["jpeg_artifacts", "superresolution", "jpeg_artifacts_2"]
    assert list(project.targets[0].generated_ids) == [f"photos_conditioning_{name}" for name in names]


def test_captions_of_references_are_a_fault_where_all_are_shown_together(tmp_path):
    generated = {"id": "a", "instance_data_dir": "a", "conditioning": [{"type": "jpeg", "captions": ["restore"]}]}
    with_text = {**REFERENCES, "id": "b", "caption_strategy": "textfile", "source_dataset_id": "a"}
    without = {**REFERENCES, "id": "c", "source_dataset_id": "a"}
    datasets = [generated, with_text, without]
    project = written(tmp_path, {"conditioning_multidataset_sampling": "combined"}, datasets)
    faults = faults_of(project)
    assert [fault.partition(" captions")[0] for fault in faults] == [
        'multidatabackend.json: "a"',
        'multidatabackend.json: "b"',
    ]
    assert all("combined" in fault and "use the target set's captions" in fault for fault in faults)
    assert open_project(project, overrides=["conditioning_multidataset_sampling=random"]).targets


# What notices which change


def test_a_change_is_noticed_by_the_stages_that_read_it_and_by_no_other(tmp_path):
    datasets = [{"id": "photos", "instance_data_dir": "photos", "repeats": 1}]
    base = open_project(written(tmp_path, {"prep_seed": 1, "learning_rate": 1e-4}, datasets))

    def changed(overrides=(), **options):
        other = open_project(written(tmp_path, {"prep_seed": 1}, [{**datasets[0], **options}]), overrides=overrides)
        [now], [before] = other.targets, base.targets
        return (
            other.scan_settings(now) != base.scan_settings(before),
            other.pairs_settings(now) != base.pairs_settings(before),
        )

    assert changed() == (False, False)
    assert changed(["learning_rate=1e-3"]) == (False, False)
    assert changed(["prep_seed=2"]) == (True, True)
    assert changed(["aspect_bucket_alignment=16"]) == (True, True)
    assert changed(["aspect_bucket_rounding=3"]) == (True, True)
    assert changed(resolution=512) == (True, True)
    assert changed(repeats=2) == (False, True)
    assert changed(["conditioning_multidataset_sampling=combined"]) == (False, False)
    assert changed(conditioning=[{"type": "jpeg"}]) == (False, True)
    assert changed(write_batch_size=7) == changed(["write_batch_size=7"]) == (False, False)
    assert changed(interpolation="opencv-linear") == changed(["interpolation=opencv-linear"]) == (False, True)
    assert changed(["posterior=moments"]) == changed(["vae_enable_tiling=true"]) == (False, False)
    assert changed(skip_file_discovery="metadata", metadata_backend="json") == (False, False)
    assert changed(vae_cache_clear_each_epoch=True) == changed(crop_variants=4) == (False, True)
    assert changed(caption_encoding="cp1252") == (True, True)
    assert changed(probability=0.5) == (False, False)
    assert changed(cache_dir_vae="latents") == (False, False)


def test_nested_options_count_if_they_have_an_effect_and_only_then(tmp_path):
    def settings(**generator):
        entry = {"id": "photos", "instance_data_dir": "photos", "conditioning": [{"type": "jpeg", **generator}]}
        project = open_project(written(tmp_path, datasets=[entry]))
        return project.pairs_settings(*project.targets), project.scan_settings(*project.targets)

    base = settings()
    without_effect = {"progressive": True, "optimize": True, "instance_data_dir": "a", "cache_dir_vae": "b"}
    assert all(settings(**{name: value}) == base for name, value in without_effect.items())
    assert settings(quality=24)[0] != base[0] != settings(captions=["restore"])[0]
    assert settings(quality=24)[1] == base[1]

    def scanned(**columns):
        entry = {"id": "hub", "type": "huggingface", "dataset_name": "a/b", "huggingface": columns}
        project = open_project(written(tmp_path, datasets=[entry]))
        return project.scan_settings(*project.targets)

    composite = {"composite_image_config": {"image_count": 3}}
    assert len({scanned(), scanned(image_column="picture"), scanned(**composite)}) == 3


def test_options_without_effect_are_read_by_no_stage():
    models = [TrainerConfig, DatasetConfig, Generator, CompositeImage, HuggingFace, Route, Tread, *RECIPES.values()]
    facts = [(name, one) for model in models for name, one in facts_of(model) if one["no_effect"]]
    assert len(facts) >= 5
    assert all(list(one["stages"]) == [] for _, one in facts), facts
    assert not [name for name, one in facts_of(TrainerConfig) if one["no_effect"]]


def test_an_open_project_is_returned_as_it_is_and_cannot_be_changed(tmp_path):
    project = open_project(written(tmp_path))
    assert open_project(project) is project
    with pytest.raises(AttributeError):
        project.root = tmp_path
    with pytest.raises(ValueError, match="frozen"):
        project.trainer.lora_rank = 1


# The command line


def prep(*arguments):
    command = [sys.executable, "-m", "prep.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "200"})


def test_the_command_exits_with_1_and_tells_all_faults_on_stderr(tmp_path):
    done = prep("scan", written(tmp_path, *FIVE_FAULTS))
    assert (done.returncode, done.stdout) == (1, "")
    assert all(message in done.stderr for message in FIVE_MESSAGES)
    assert "Traceback" not in done.stderr


def test_the_command_exits_with_0_and_prints_one_json_document_on_stdout(tmp_path):
    (tmp_path / "photos").mkdir()
    done = prep("scan", written(tmp_path, {"push_to_hub": True}), "--json", "--set", "lora_rank=8", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["command"] == "prep scan"
    assert not (tmp_path / "work").exists()
    assert "warning: config.json: push_to_hub" in done.stderr


def test_the_command_exits_with_2_where_it_is_called_wrongly(tmp_path):
    done = prep("scan", tmp_path, "--limit", "0")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--limit" in done.stderr
