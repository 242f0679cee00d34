"""Optimisers by name: their libraries, their arguments, and that each of them learns."""

import sys
from collections.abc import Callable

import pytest
import torch
from torch import nn

from schemas.errors import UserError
from schemas.trainer import TrainerConfig
from train.optimizer import check_optimizer, make_optimizer, make_schedule

HERE = ("adamw", "adamw_bf16", "optimi-adamw", "optimi-lion", "prodigy")


def _config(name: str = "adamw", **options: object) -> TrainerConfig:
    return TrainerConfig(optimizer=name, **options)


def _parameter() -> nn.Parameter:
    return nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))


@pytest.mark.parametrize("name", HERE)
def test_every_optimizer_goes_downhill_and_resumes_to_the_same_numbers(name: str) -> None:
    config = _config(name, learning_rate=1.0 if name == "prodigy" else 0.05)

    def steps(parameter: nn.Parameter, optimizer: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            parameter.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    whole, parts = _parameter(), _parameter()
    steps(whole, make_optimizer([whole], config), 30)
    assert whole.norm() < _parameter().norm()
    first = make_optimizer([parts], config)
    steps(parts, first, 12)
    second = make_optimizer([parts], config)
    second.load_state_dict(first.state_dict())
    steps(parts, second, 18)
    assert torch.equal(whole, parts)


@pytest.mark.parametrize(("name", "library"), [("adamw8bit", "bitsandbytes"), ("prodigy", "prodigyopt")])
def test_a_library_that_is_missing_is_told_with_the_command_that_brings_it(
    monkeypatch: pytest.MonkeyPatch, name: str, library: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=rf"optimizer {name} needs .*pip install 'pairline\[{name}\]'"):
        check_optimizer(_config(name))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("weight_decay=0.25,betas=0.8/0.95", {"weight_decay": 0.25, "betas": (0.8, 0.95)}),
        ("beta1=0.8,beta2=0.95", {"betas": (0.8, 0.95)}),
        ("beta1=0.8", {"betas": (0.8, 0.999)}),
        (" eps = 1e-6 , amsgrad=true,", {"eps": 1e-6, "amsgrad": True}),
        ('{"weight_decay": 0}', {"weight_decay": 0}),
        ({"betas": [0.5, 0.6]}, {"betas": (0.5, 0.6)}),
        (None, {"betas": (0.9, 0.999), "weight_decay": 0.01}),
    ],
)
def test_arguments_are_an_object_or_a_text(given: object, expected: dict[str, object]) -> None:
    config = _config(optimizer_config=given)
    check_optimizer(config)
    group = make_optimizer([_parameter()], config).param_groups[0]
    assert {name: group[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("adamw", "weight_dekay=1", "adamw takes no weight_dekay; it takes betas, eps, weight_decay"),
        ("adamw", "lr=1", "takes no lr; that is learning_rate"),
        ("optimi-lion", "eps=1,amsgrad=true", "optimi-lion takes no amsgrad, eps; it takes betas, weight_decay"),
        ("prodigy", {"d_coeff": 2}, "prodigy takes no d_coeff; .*d_coef"),
        ("adamw", "betas=0.9/0.99,beta1=0.8", "beta1 and betas are given"),
    ],
)
def test_arguments_that_an_optimizer_does_not_take_are_told_with_those_it_takes(
    name: str, given: object, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_optimizer(_config(name, optimizer_config=given))


def test_a_value_that_the_optimizer_refuses_is_told() -> None:
    with pytest.raises(UserError, match=r"optimizer_config: adamw cannot be built with .*betas.*Invalid beta"):
        make_optimizer([_parameter()], _config(optimizer_config="betas=2/0.9"))


def test_what_an_optimizer_prints_stays_out_of_the_summary(capsys: pytest.CaptureFixture[str]) -> None:
    make_optimizer([_parameter()], _config("prodigy", learning_rate=1, optimizer_config="weight_decay=0.1"))
    assert capsys.readouterr().out == ""


def _rates(**options: object) -> list[float]:
    config = _config(learning_rate=1.0, **options)
    optimizer = make_optimizer([_parameter()], config)
    schedule = make_schedule(optimizer, config, 12)
    rates = []
    for _ in range(12):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"lr_scheduler": "cosine_with_restarts", "lr_num_cycles": 3}, lambda x: x[4] == x[8] == 1.0 and x[3] < 0.2),
        ({"lr_scheduler": "polynomial", "lr_power": 2.0}, lambda x: x[6] == pytest.approx(0.25, abs=1e-6)),
        ({"lr_scheduler": "polynomial"}, lambda x: x[6] == pytest.approx(0.5, abs=1e-6)),
    ],
)
def test_cycles_and_power_reach_the_schedule(
    options: dict[str, object], expected: Callable[[list[float]], bool]
) -> None:
    assert expected(_rates(**options))


@pytest.mark.parametrize(
    ("name", "given"),
    [("adamw", "betas=0.9/0.99/0.999"), ("adamw", "differentiable=true"), ("prodigy", "slice_p=0")],
)
def test_arguments_under_which_no_step_can_be_taken_are_told_beforehand(name: str, given: str) -> None:
    with pytest.raises(UserError, match="cannot take a step"):
        check_optimizer(_config(name, optimizer_config=given))


def test_a_rate_beyond_all_numbers_is_told_beforehand() -> None:
    with pytest.raises(UserError, match="cannot take a step with learning_rate 1e\\+300"):
        check_optimizer(_config(learning_rate=1e300))
