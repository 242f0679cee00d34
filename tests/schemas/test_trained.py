"""What config.json and LyCORIS' file may say of what is trained, and what does not go together."""

import json
from pathlib import Path

import pytest

from families import open_project
from schemas.arguments import parsed_arguments
from schemas.errors import ConfigError
from schemas.project import Project

LOKR = {"algo": "lokr", "factor": 8, "linear_dim": 10000, "linear_alpha": 1, "multiplier": 1.0}
LYCORIS = {"lora_type": "lycoris", "lycoris_config": "lycoris.json"}


def _opened(folder: Path, config: object = None, lycoris: object = None) -> Project:
    (folder / "config.json").write_text(json.dumps(config or {}))
    (folder / "multidatabackend.json").write_text('[{"id": "photos", "instance_data_dir": "photos"}]')
    if lycoris is not None:
        (folder / "lycoris.json").write_text(json.dumps(lycoris))
    return open_project(folder)


def _faults(folder: Path, config: object = None, lycoris: object = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        _opened(folder, config, lycoris)
    return [str(fault) for fault in caught.value.faults]


# All weights


def test_everything_that_cannot_go_with_training_all_weights_is_told_at_once(tmp_path: Path) -> None:
    config = {"model_type": "full", "base_model_precision": "int8-quanto", "lora_type": "lycoris", "init_lora": "a"}
    faults = _faults(tmp_path, config | {"fuse_qkv_projections": True})
    told = [fault.removeprefix("config.json: ").split(" = ")[0] for fault in faults]
    assert told == ["base_model_precision", "lora_type", "init_lora", "fuse_qkv_projections", "optimizer"]
    assert "quantised weights cannot be trained" in faults[0]
    assert "optimi-adamw" in faults[-1] and "base_model_default_dtype" in faults[-1]


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "optimi-adamw"},
        {"optimizer": "optimi-lion", "optimizer_config": "kahan_sum=true"},
        {"optimizer": "adamw", "base_model_default_dtype": "fp32"},
        {"optimizer": "prodigy", "learning_rate": 1, "mixed_precision": "no"},
    ],
)
def test_all_weights_train_where_rounding_loses_nothing(tmp_path: Path, options: dict[str, object]) -> None:
    assert _opened(tmp_path, {"model_type": "full"} | options).warnings == ()


def test_an_optimizer_told_not_to_compensate_does_not(tmp_path: Path) -> None:
    config = {"model_type": "full", "optimizer": "optimi-adamw", "optimizer_config": "kahan_sum=false"}
    assert len(_faults(tmp_path, config)) == 1


# Adapters


def test_lokr_and_fused_layers_do_not_go_together(tmp_path: Path) -> None:
    [fault] = _faults(tmp_path, {"lora_type": "lycoris", "fuse_qkv_projections": True})
    assert fault.startswith("config.json: fuse_qkv_projections = true: LoKr of fused layers cannot be taken apart")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"lora_type": "lycoris", "lora_rank": 4, "lora_dropout": 0.1}, ["lora_rank", "lora_dropout"]),
        ({"lycoris_config": "nowhere.json"}, ["lycoris_config"]),
        ({"model_type": "full", "optimizer": "optimi-lion", "flux_lora_target": "all"}, ["flux_lora_target"]),
        ({"lr_num_cycles": 2, "lr_power": 0.5, "lr_scheduler": "cosine"}, ["lr_num_cycles", "lr_power"]),
        ({"optimizer": "prodigy"}, ["learning_rate"]),
        ({"lr_num_cycles": 2, "lr_scheduler": "cosine_with_restarts", "optimizer": "prodigy", "learning_rate": 1}, []),
    ],
)
def test_what_has_no_effect_is_a_warning(tmp_path: Path, config: dict[str, object], expected: list[str]) -> None:
    warnings = _opened(tmp_path, config).warnings
    assert [text.removeprefix("config.json: ").split(" ")[0] for text in warnings] == expected


def test_an_unknown_optimizer_is_told_what_there_is_and_what_brings_it(tmp_path: Path) -> None:
    [fault] = _faults(tmp_path, {"optimizer": "adamw8bits"})
    assert "must be one of 'adamw', 'adamw_bf16', 'optimi-adamw', 'optimi-lion', 'adamw8bit' or 'prodigy'" in fault
    assert "did you mean 'adamw8bit'?" in fault
    assert "pip install 'pairline[adamw8bit]'" in fault and "pip install 'pairline[prodigy]'" in fault


# Arguments of the optimiser


def test_a_text_and_an_object_of_arguments_are_the_same_settings(tmp_path: Path) -> None:
    text = _opened(tmp_path, {"optimizer_config": "weight_decay=0.01,betas=0.9/0.99"}).trainer
    given = _opened(tmp_path, {"optimizer_config": {"weight_decay": 0.01, "betas": [0.9, 0.99]}}).trainer
    assert text.optimizer_arguments == given.optimizer_arguments == {"weight_decay": 0.01, "betas": [0.9, 0.99]}
    assert text.fingerprint("train") == given.fingerprint("train")


def test_values_of_arguments_have_their_kinds() -> None:
    found = parsed_arguments("a=1, b=2e-3,c=True,d=none,e=mean,f=0.5/1/x")
    assert found == {"a": 1, "b": 0.002, "c": True, "d": None, "e": "mean", "f": [0.5, 1, "x"]}


@pytest.mark.parametrize("text", ["weight_decay", "=3", "a=", "a=1,a=2", "{1}"])
def test_arguments_that_cannot_be_read_are_a_fault_of_the_file(tmp_path: Path, text: str) -> None:
    [fault] = _faults(tmp_path, {"optimizer_config": text})
    assert fault.startswith("config.json: optimizer_config = ")


# LyCORIS' file


def test_lokr_without_a_file_is_whole_matrices_of_factor_10(tmp_path: Path) -> None:
    lokr = _opened(tmp_path, {"lora_type": "lycoris"}).lokr
    assert lokr is not None
    assert (lokr.factor, lokr.rank, lokr.alpha) == (10, 10000, 10000)
    assert _opened(tmp_path).lokr is None


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (8, 10000, 10000)),  # whole matrices have the strength 1, whatever alpha says
        ({"linear_dim": 16, "linear_alpha": 4}, (8, 16, 4)),
        ({"linear_dim": 16, "full_matrix": True, "factor": -1}, (-1, 10000, 10000)),
        ({"apply_preset": {"target_module": ["Attention"], "module_algo_map": {"Attention": {"factor": 8}}}},
         (8, 10000, 10000)),
    ],
)  # fmt: skip
def test_a_file_of_lycoris_says_what_lokr_is_like(
    tmp_path: Path, given: dict[str, object], expected: tuple[int, int, float]
) -> None:
    project = _opened(tmp_path, LYCORIS, LOKR | given)
    assert project.lokr is not None
    assert (project.lokr.factor, project.lokr.rank, project.lokr.alpha) == expected
    told = ["lycoris.json: apply_preset has no effect: flux_lora_target chooses the layers"]
    assert list(project.warnings) == (told if "apply_preset" in given else [])


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"algo": "loha"}, 'lycoris.json: algo = "loha": not supported; trained are lokr'),
        ({"algo": None}, "lycoris.json: algo"),
        ({"dropout": 0.1}, "dropout = 0.1: not supported; supported: algo, factor, linear_dim, linear_alpha"),
        ({"multiplier": 0.5}, "multiplier = 0.5: must be greater than or equal to 1"),
        ({"linear_alpha": None, "linear_dim": 4}, "needs linear_dim and linear_alpha, or full_matrix: true"),
        ({"factor": 0}, "factor must be -1, or 1 and more"),
        ({"apply_preset": {"module_algo_map": {"Attention": {"factor": 8}, "FeedForward": {"factor": 4}}}},
         'apply_preset.module_algo_map.FeedForward = {"factor": 4}: layers cannot differ; all layers share factor 8'),
        ({"apply_preset": "full"}, 'apply_preset = "full": must be an object'),
    ],
)  # fmt: skip
def test_what_is_not_supported_of_lycoris_is_a_fault(tmp_path: Path, given: dict[str, object], says: str) -> None:
    values = {key: value for key, value in (LOKR | given).items() if value is not None}
    [fault] = _faults(tmp_path, LYCORIS, values)
    assert says in fault


def test_a_file_of_lycoris_that_is_missing_or_broken_is_a_fault_beside_the_others(tmp_path: Path) -> None:
    missing, typo = _faults(tmp_path, LYCORIS | {"lora_rnak": 1})[::-1]
    assert missing.startswith("config.json: lycoris_config: no such file: ")
    assert typo.startswith("config.json: lora_rnak")
    (tmp_path / "lycoris.json").write_text("{")
    assert _faults(tmp_path, LYCORIS)[0].startswith("lycoris.json: not valid JSON")
    assert _faults(tmp_path, LYCORIS, ["lokr"])[0].startswith("lycoris.json: must be an object")


def test_ways_to_compute_the_same_are_warnings(tmp_path: Path) -> None:
    [warning] = _opened(tmp_path, LYCORIS, LOKR | {"bypass_mode": True}).warnings
    assert warning.startswith("lycoris.json: bypass_mode has no effect")


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"lr_warmup_steps": 5}, "lr_warmup_steps has no effect"),
        ({"scheduled_sampling_probability": 0.5}, "scheduled_sampling_probability has no effect"),
        ({"flow_schedule_shift": 2.0, "flow_schedule_auto_shift": True}, "flow_schedule_shift has no effect"),
    ],
)
def test_what_another_option_keeps_from_having_an_effect_is_told(tmp_path: Path, config: dict, told: str) -> None:
    [warning] = _opened(tmp_path, config).warnings
    assert warning.startswith(f"config.json: {told}")


# Compiled blocks


@pytest.mark.parametrize("precision", ["int4-quanto", "int2-quanto", "fp8-quanto"])
def test_weights_in_a_librarys_own_tensors_do_not_compile(tmp_path: Path, precision: str) -> None:
    [fault] = _faults(tmp_path, {"dynamo_backend": "inductor", "base_model_precision": precision})
    assert f'base_model_precision = "{precision}": contradicts dynamo_backend' in fault
    assert "no_change, int8-quanto, int8-torchao, fp8-torchao" in fault


@pytest.mark.parametrize(
    "beside",
    [
        {},
        {"enable_group_offload": True},
        {"gradient_checkpointing_keep": "attention"},
        *({"base_model_precision": one} for one in ("int8-quanto", "int8-torchao", "fp8-torchao")),
    ],
)
def test_what_compiles(tmp_path: Path, beside: dict[str, object]) -> None:
    assert _opened(tmp_path, {"dynamo_backend": "inductor"} | beside).trainer.dynamo_backend == "inductor"
