"""`train plan`: which ways there are, which fit, and what to set."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from families import open_project
from prep.pairs import pairs
from prep.scan import scan
from schemas.errors import UserError
from schemas.timed import TrainPlan
from schemas.trainer import TrainerConfig
from train.cli import app
from train.memory import CUDA_GIB, enough_memory, limit_memory, room_of
from train.planner import Asked, plan

FULL_SIZE = {"pretrained_model_name_or_path": "nobody/has-this", "flux_lora_target": "nano", "mixed_precision": "bf16"}
H200 = Asked(1024, 1, "H200")
_PLANS: dict[Any, TrainPlan] = {}  # that several tests look at


@pytest.fixture
def planned(copy_demo: Callable[..., Path], tmp_path: Path) -> Callable[..., TrainPlan]:
    """Plan for the full-size model without its weights."""

    def made(asked: Asked = H200, **options: Any) -> TrainPlan:
        if (key := (asked, *options.items())) not in _PLANS:
            folder = copy_demo(tmp_path / str(len(list(tmp_path.iterdir()))), **(FULL_SIZE | options))
            _PLANS[key] = plan(open_project(folder), asked)
        return _PLANS[key]

    return made


def test_the_fastest_that_fits_is_named_with_what_to_set(planned: Callable[..., TrainPlan]) -> None:
    found = planned()
    took = [one.seconds_per_step for one in found.choices]
    assert None not in took and took == sorted(took) and found.choices[0].relative == 1
    assert found.fastest is found.choices[0] and [one.now for one in found.choices].count(True) == 1
    told = "\n".join(found.lines())
    best = 'fp8-torchao, compiled, no checkpointing; in config.json:\n  "base_model_precision": "fp8-torchao",\n'
    exact = 'unquantised, compiled, no checkpointing; in config.json:\n  "dynamo_backend": "inductor",\n'
    assert f"fastest that fits: {best}" in told and f"with the same numbers: {exact}" in told
    assert '  "gradient_checkpointing": false,' in told and "| now " in told
    assert len({tuple(one.settings.items()) for one in found.choices}) == len(found.choices)
    assert all(one.exact == (one.settings["base_model_precision"] == "no_change") for one in found.choices)
    compiled = {one.settings["base_model_precision"] for one in found.choices if "compiled" in one.name}
    assert compiled == {"no_change", "fp8-torchao", "int8-quanto"}
    assert any("attention kept" in one.name for one in found.choices)


def test_what_is_worthwhile_gains_something(planned: Callable[..., TrainPlan]) -> None:
    found = planned()
    told = [one for one in found.choices if one.worthwhile]
    assert 2 < len(told) < len(found.choices)
    for one in told:
        others = [other for other in told if other is not one and other.exact >= one.exact]
        assert not any(other.relative <= one.relative and other.peak_gib <= one.peak_gib for other in others)
    assert sum(line.startswith("| ") for line in found.lines()) - 2 == len({*map(id, told)} | {
        id(one) for one in found.choices if one.now})  # fmt: skip


def test_a_budget_changes_what_fits(planned: Callable[..., TrainPlan]) -> None:
    found = planned(memory_budget_gib=16)
    assert found.memory_gib == pytest.approx(16 - CUDA_GIB)
    assert {one.fits for one in found.choices} == {True, False}
    assert all(one.fits == (one.peak_gib * 1.03 <= 16 - CUDA_GIB) for one in found.choices)
    assert found.fastest is not None and found.fastest.relative > 1
    assert found.fastest_exact is None or found.fastest_exact.settings["enable_group_offload"]


def test_what_nothing_fits_into_is_told_by_how_much_with_what_else_saves(planned: Callable[..., TrainPlan]) -> None:
    with pytest.raises(
        UserError, match=r"fits into 0\.400 GiB: the smallest \(.*group offload\) takes about .* more; what"
    ):
        planned(memory_budget_gib=1)


def _refused(folder: Path, asked: Asked) -> str:
    with pytest.raises(UserError, match="no way to train fits") as caught:
        plan(open_project(folder), asked)
    return str(caught.value)


def test_small_numbers_are_told_to_the_mib_and_nothing_that_was_tried_is_advised(
    make_project: Callable[..., Path],
) -> None:
    told = _refused(make_project(memory_budget_gib=CUDA_GIB + 0.002), Asked(128, 1))
    least = re.search(r"into 0\.002 GiB: the smallest \((.*)\) takes about (0\.\d{3}) GiB, (0\.\d{3}) more", told)
    assert least and float(least[2]) - 0.002 == pytest.approx(float(least[3]), abs=0.0011) and float(least[3]) > 0
    assert "group offload" not in least[1]  # it takes more here, and so is not advised
    assert not any(f"{name}:" in told for name in ("enable_group_offload", "base_model_precision"))
    assert "optimizer: adamw8bit" in told and "tread_config" in told


def test_a_smaller_rank_is_advised_where_it_saves_something(copy_demo: Callable[..., Path], tmp_path: Path) -> None:
    def told(place: str, pixels: int, **options: Any) -> str:
        return _refused(copy_demo(tmp_path / place, **options), Asked(pixels, 1, "RTX 4090"))

    small = {**FULL_SIZE, "memory_budget_gib": 1}
    assert "lora_rank below 256" in told("large", 512, **small, lora_rank=256)
    assert "lora_rank" not in told("least", 512, **small, lora_rank=1)
    assert "lora_rank" not in told("lokr", 512, **small, lora_type="lycoris")
    assert "lora_rank" not in told("little", 1024, memory_budget_gib=CUDA_GIB + 0.002, lora_rank=2)


def test_shapes_of_the_tiny_checkpoint_are_its_own_before_it_is_built(make_project: Callable[..., Path]) -> None:
    folder = make_project()
    built = plan(open_project(folder), Asked(128, 1))
    shutil.rmtree(folder / "work" / "models")
    bare = plan(open_project(folder), Asked(128, 1))
    assert bare == built and not any("as published" in one for one in bare.notes)


@pytest.mark.parametrize("budget", [0.1, CUDA_GIB])
def test_a_budget_that_cuda_itself_takes_is_refused(budget: float) -> None:
    with pytest.raises(UserError, match="CUDA itself takes about"):
        room_of(budget)


def test_a_budget_is_for_accelerators_alone_and_must_be_more_than_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="pairline"):
        limit_memory(TrainerConfig(memory_budget_gib=8), torch.device("cpu"))
        limit_memory(TrainerConfig(), torch.device("cpu"))
    assert [one.getMessage() for one in caplog.records] == ["memory_budget_gib has no effect on cpu"]
    with pytest.raises(ValueError, match="memory_budget_gib"):
        TrainerConfig(memory_budget_gib=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_process_keeps_to_its_budget() -> None:
    device = torch.device("cuda")
    limit_memory(TrainerConfig(memory_budget_gib=CUDA_GIB + 1), device)
    try:
        with pytest.raises(UserError, match="memory is full"), enough_memory(TrainerConfig(), device):
            torch.empty(2 << 30, dtype=torch.uint8, device=device)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def test_who_runs_out_of_memory_is_told_of_the_plan() -> None:
    with pytest.raises(UserError, match="train plan"), enough_memory(TrainerConfig(), torch.device("cpu")):
        raise torch.OutOfMemoryError("full")


def test_accelerators_without_fp8_have_no_such_choice(planned: Callable[..., TrainPlan]) -> None:
    quick = [{one.settings["base_model_precision"] for one in planned(Asked(512, 0, card)).choices}
             for card in ("RTX 4090", "RTX 3090")]  # fmt: skip
    assert quick[0] - quick[1] == {"fp8-torchao"}


def test_what_is_set_but_refused_is_never_the_fastest(planned: Callable[..., TrainPlan]) -> None:
    quick = {"dynamo_backend": "inductor", "gradient_checkpointing_keep": "attention"}
    found = planned(Asked(1024, 1, "A100"), memory_budget_gib=18, base_model_precision="fp8-torchao",
                    gradient_checkpointing_backend="unsloth", **quick)  # fmt: skip
    (now,) = (one for one in found.choices if one.now)
    reason = "fp8-torchao multiplies in float8, which the A100 cannot"
    assert now is found.choices[-1] and now.fits and now.refused == reason and now.seconds_per_step is None
    assert [one.refused for one in found.choices[:-1]] == [None] * (len(found.choices) - 1)
    assert found.fastest is found.choices[[one.fits for one in found.choices].index(True)] and found.fastest is not now
    assert found.choices[0].relative == 1 and any(one.worthwhile for one in found.choices) and not now.worthwhile
    told = list(found.lines())
    assert f"what is set now cannot be: {reason}" in told and not any("set already" in line for line in told)
    assert [line for line in told if "| now, refused, other numbers" in line] != []


@pytest.mark.parametrize(("name", "capability", "rates"), [
    ("NVIDIA RTX A6000", (8, 6), None), ("NVIDIA L40S", (8, 9), None), ("NVIDIA A100-SXM4-40GB", (8, 0), "A100 40GB"),
    ("NVIDIA GeForce RTX 5090 Laptop GPU", (12, 0), None)])  # fmt: skip
def test_a_card_that_is_here_is_asked_whether_it_multiplies_float8(
    copy_demo: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    capability: tuple[int, int],
    rates: str | None,
) -> None:
    project = open_project(copy_demo(tmp_path, **FULL_SIZE))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: name)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: capability)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (36 << 30, 40 << 30))
    found = plan(project, Asked(512, 0))
    precisions = {one.settings["base_model_precision"] for one in found.choices}
    assert ("fp8-torchao" in precisions) == (capability >= (8, 9)) and found.memory_gib == 36
    assert (found.device, found.rates) == (name, rates)
    head, none = f"{name}, rates of {rates}: 36.0" if rates else f"{name}: 36.0", f"no rates of {name} are known"
    told = list(found.lines())
    assert told[1].startswith(head) and any(line.startswith(none) for line in told) == (rates is None)


def test_the_device_that_was_taken_is_told(planned: Callable[..., TrainPlan]) -> None:
    told = {asked: list(planned(Asked(512, 0, asked)).lines())[1] for asked in ("4090", "A100 40GB", "H100 64GB")}
    assert told == {
        "4090": "RTX 4090: 22.9 GiB for tensors",
        "A100 40GB": "A100 40GB: 38.8 GiB for tensors",
        "H100 64GB": "H100 64GB: 63.4 GiB for tensors",
    }
    with pytest.raises(UserError, match=r"--device RTX 4090 D: nothing is known of it; there are H200, .*, RTX 4090, "):
        planned(Asked(device="RTX 4090 D"))


def test_an_unknown_accelerator_is_refused_and_none_has_no_times(planned: Callable[..., TrainPlan]) -> None:
    with pytest.raises(UserError, match="--device abacus: nothing is known of it; there are H200"):
        planned(Asked(device="abacus"))
    if torch.cuda.is_available():
        return
    here = planned(Asked(512, 0), train_batch_size=2)
    assert all(one.seconds_per_step is None and one.fits is None for one in here.choices)
    assert here.fastest is None and any("no rates of cpu" in line for line in here.lines())


def test_all_weights_are_planned_for_too(planned: Callable[..., TrainPlan]) -> None:
    found = planned(model_type="full", optimizer="optimi-lion", flux_lora_target=None)
    assert found.trainable_parameters > 11e9 and all(one.exact for one in found.choices)
    assert min(one.peak_gib for one in found.choices) > 11.9e9 * 2 * 3 / 2**30


def test_sizes_are_those_of_the_pairs(make_project: Callable[..., Path]) -> None:
    folder = make_project(mixed_precision="bf16")
    before = plan(open_project(folder), Asked(device="H200"))
    assert any("not paired yet" in note and "1024x1024" in note for note in before.notes)
    scan(open_project(folder))
    pairs(open_project(folder))
    after = plan(open_project(folder), Asked(device="H200"))
    assert after.notes == () and after.tokens[0] < before.tokens[0] and "x" in after.largest
    width, height = map(int, after.largest.split(" ")[0].split("x"))
    assert width * height == pytest.approx(128**2, rel=0.3) and after.largest.count("x") == 2


def test_the_command_prints_a_table_or_json(make_project: Callable[..., Path]) -> None:
    folder = make_project()
    asked = ["plan", str(folder), "--pixels", "128", "--references", "1", "--device", "RTX 4090", "--set"]
    told = CliRunner().invoke(app, [*asked, "lora_rank=4", "--all"])
    assert told.exit_code == 0 and "| choice" in told.stdout and "fastest that fits" in told.stdout
    found = json.loads(CliRunner().invoke(app, [*asked, "lora_rank=4", "--json", "--memory-budget-gib", "8"]).stdout)
    assert found["command"] == "train plan" and found["budget_gib"] == 8 and found["memory_gib"] == 8 - CUDA_GIB
    assert sum(line.startswith("| unq") or line.startswith("| int") or line.startswith("| fp8")
               for line in told.stdout.splitlines()) == len(found["choices"])  # fmt: skip
    failed = CliRunner().invoke(app, [*asked, "lora_rank=4", "--memory-budget-gib", "0.601"])
    assert failed.exit_code == 1 and "no way to train fits into 0.001 GiB" in failed.stderr
    odd = CliRunner().invoke(app, ["plan", str(folder), "--pixels", "100"])
    assert odd.exit_code == 1 and "--pixels 100: must be a multiple of 16" in odd.stderr


def test_its_help_names_every_argument() -> None:
    shown = CliRunner().invoke(app, ["plan", "--help"], env={"COLUMNS": "200"}).stdout
    for name in ("--pixels", "--references", "--memory-budget-gib", "--device", "--all", "--json", "--set", "PROJECT"):
        assert name in shown
