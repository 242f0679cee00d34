"""Where and in which numbers a model runs, and how its module is found."""

import gc
import importlib
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from families.checkpoints import text_precisions
from families.offloading import Groups
from families.protocol import Family, Placement
from schemas.errors import UserError
from schemas.project import Project
from schemas.trainer import TrainerConfig

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def family_of(project: Project) -> Family:
    """Import the module of a project's family, its libraries' own progress bars and hints kept out of the output."""
    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity(logging.ERROR)
        library.disable_progress_bar()
    # Norms that are float32 take bfloat16 values, under autocast, as well as their own; they are a little slower.
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
    return cast(Family, importlib.import_module(project.family.module))


@contextmanager
def library_silenced() -> Iterator[None]:
    """Keep warnings and errors that diffusers logs itself out of the output: whoever calls it tells what happened."""
    before = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        diffusers_logging.set_verbosity(before)


def default_device() -> torch.device:
    """Return this process's accelerator where there is one, else the CPU.

    Of several processes on one machine each has its own if torchrun, or another starter, tells it its LOCAL_RANK.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    rank = os.environ.get("LOCAL_RANK", "")
    return torch.device("cuda", int(rank) % torch.cuda.device_count()) if rank.isdecimal() else torch.device("cuda")


def dtype_of(name: str) -> torch.dtype:
    """Return the dtype of an option's value."""
    return _DTYPES[name]


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the host to a device without waiting until it is there."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def check_whole(folder: Path, model: nn.Module, missing: Sequence[str]) -> None:
    """Raise UserError for a model some of whose tensors are not in its files: they would be random numbers."""
    tensors = model.state_dict(keep_vars=True)
    there = {one.data_ptr() for name, one in tensors.items() if name not in missing}
    lost = [name for name in missing if name in tensors and tensors[name].data_ptr() not in there]  # others are tied
    if lost:
        raise UserError(f"{folder}: {len(lost)} tensors are not there, first {lost[0]}; fetch the checkpoint again")


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Have a network in its mode for use, and then in that it was in."""
    before = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(before)


def release_memory() -> None:
    """Give the accelerator back what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def placement(project: Project, device: torch.device) -> Placement:
    """Say where and how a project's options have text encoders run."""
    trainer = project.trainer
    groups = groups_of(trainer) if trainer.group_offload_text_encoder and device.type == "cuda" else None
    turns, via = trainer.offload_during_startup, trainer.quantize_via
    return Placement(device, text_precisions(project), via, turns=turns, groups=groups)


def groups_of(trainer: TrainerConfig) -> Groups:
    """Say how the options have blocks wait on the CPU."""
    return Groups(trainer.group_offload_blocks_per_group, ahead=trainer.group_offload_use_stream)
