"""Optimisers and learning-rate schedules, by the names of the options. A new one is a line in `OPTIMIZERS`."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from optimi import AdamW, Lion
from torch import nn

from schemas.errors import UserError
from schemas.trainer import TrainerConfig

OPTIMIZERS: Mapping[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adamw_bf16": torch.optim.AdamW,
    "optimi-adamw": AdamW,
    "optimi-lion": Lion,
}


def make_optimizer(parameters: list[nn.Parameter], config: TrainerConfig) -> torch.optim.Optimizer:
    """Build the optimiser with its library's own defaults for all but the learning rate."""
    return OPTIMIZERS[config.optimizer](parameters, lr=config.learning_rate)


def make_schedule(optimizer: torch.optim.Optimizer, config: TrainerConfig, steps: int) -> Any:
    """Build the learning-rate schedule over `steps` optimiser steps; raises UserError where it cannot be."""
    warmup = config.lr_warmup_steps
    if warmup >= steps and config.lr_scheduler not in ("constant", "constant_with_warmup"):
        raise UserError(f"lr_warmup_steps {warmup} must be less than the {steps} steps of the run")
    try:
        return get_scheduler(config.lr_scheduler, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    except ValueError as fault:
        raise UserError(f"lr_scheduler {config.lr_scheduler}: {fault}") from fault
