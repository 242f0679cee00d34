"""Optimisers and learning-rate schedules, by the names of the options. A new one is a line in `OPTIMIZERS`.

Their libraries are imported when they are asked for: some are extras, some need a GPU.
"""

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import nn

from families.runtime import default_device
from schemas.errors import UserError
from schemas.trainer import TrainerConfig


@dataclass(frozen=True, slots=True)
class _Optimizer:
    """Where an optimiser is found."""

    module: str
    name: str
    extra: str | None = None  # of pairline, that brings its library


OPTIMIZERS: Mapping[str, _Optimizer] = {
    "adamw": _Optimizer("torch.optim", "AdamW"),
    "adamw_bf16": _Optimizer("torch.optim", "AdamW"),
    "optimi-adamw": _Optimizer("optimi", "AdamW"),
    "optimi-lion": _Optimizer("optimi", "Lion"),
    "adamw8bit": _Optimizer("bitsandbytes.optim", "AdamW8bit", "adamw8bit"),
    "prodigy": _Optimizer("prodigyopt", "Prodigy", "prodigy"),
}
_OURS = ("self", "params", "lr")  # parameters of an optimiser that other options fill
_BETAS = ("beta1", "beta2")


def check_optimizer(config: TrainerConfig) -> None:
    """Raise UserError if the optimiser's library is not there, or cannot take a step as told to; loads no model."""
    _arguments(_class(config), config)
    one = nn.Parameter(torch.zeros(4, 4, device=default_device()))
    one.grad = torch.ones_like(one)
    trial = make_optimizer([one], config)
    try:
        with redirect_stdout(sys.stderr):
            trial.step()
    except Exception as fault:  # libraries raise what they like
        raise UserError(
            f"optimizer {config.optimizer} cannot take a step with learning_rate {config.learning_rate:g} and "
            f"optimizer_config {config.optimizer_arguments}: {fault}"
        ) from fault


def make_optimizer(parameters: list[nn.Parameter], config: TrainerConfig) -> torch.optim.Optimizer:
    """Build the optimiser, by its library's own defaults but for the learning rate and `optimizer_config`."""
    kind = _class(config)
    arguments = _arguments(kind, config)
    if kind is torch.optim.AdamW and all(parameter.is_cuda for parameter in parameters):
        arguments.setdefault("fused", True)
    try:
        with redirect_stdout(sys.stderr):  # prodigy prints; the standard output is the summary's
            return kind(parameters, lr=config.learning_rate, **arguments)
    except (TypeError, ValueError, LookupError, RuntimeError, ImportError) as fault:
        raise UserError(f"optimizer_config: {config.optimizer} cannot be built with {arguments}: {fault}") from fault


def make_schedule(optimizer: torch.optim.Optimizer, config: TrainerConfig, steps: int) -> Any:
    """Build the learning-rate schedule over `steps` optimiser steps; raises UserError where it cannot be."""
    warmup = config.lr_warmup_steps
    if warmup >= steps and config.lr_scheduler not in ("constant", "constant_with_warmup"):
        raise UserError(f"lr_warmup_steps {warmup} must be less than the {steps} steps of the run")
    try:
        return get_scheduler(
            config.lr_scheduler,
            optimizer,
            num_warmup_steps=warmup,
            num_training_steps=steps,
            num_cycles=config.lr_num_cycles,
            power=config.lr_power,
        )
    except ValueError as fault:
        raise UserError(f"lr_scheduler {config.lr_scheduler}: {fault}") from fault


def _class(config: TrainerConfig) -> Callable[..., torch.optim.Optimizer]:
    found = OPTIMIZERS[config.optimizer]
    try:
        kind: Callable[..., torch.optim.Optimizer] = getattr(importlib.import_module(found.module), found.name)
    except ImportError as fault:
        raise UserError(
            f"optimizer {config.optimizer} needs a library that is not installed: "
            f"pip install 'pairline[{found.extra}]' ({fault})"
        ) from fault
    return kind


def _arguments(kind: Callable[..., torch.optim.Optimizer], config: TrainerConfig) -> dict[str, Any]:
    """Return the arguments of `optimizer_config` as the optimiser takes them; raises UserError for any other."""
    taken = {name: one.default for name, one in inspect.signature(kind).parameters.items() if name not in _OURS}
    given = {name: tuple(one) if isinstance(one, list) else one for name, one in config.optimizer_arguments.items()}
    if "betas" in taken and (single := [name for name in _BETAS if name in given]):
        if "betas" in given:
            raise UserError(f"optimizer_config: {single[0]} and betas are given; betas are {_BETAS[0]} and {_BETAS[1]}")
        given["betas"] = tuple(given.pop(name, usual) for name, usual in zip(_BETAS, taken["betas"], strict=True))
    unknown = sorted(given.keys() - taken.keys())
    if unknown:
        hint = "; that is learning_rate" if unknown == ["lr"] else ""
        raise UserError(
            f"optimizer_config: {config.optimizer} takes no {', '.join(unknown)}{hint}; it takes {', '.join(taken)}"
        )
    return given
