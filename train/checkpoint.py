"""Checkpoints: folders `checkpoint-N` that exist only when they are whole.

`save` and `load` stand side by side; the state of the loop is listed in `save` and nowhere else.
"""

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from schemas.errors import UserError
from schemas.storage import sync
from schemas.trainer import TrainerConfig
from train.adapter import adapter_layers, load_adapter

_NAME = re.compile(r"checkpoint-(\d+)")
_WEIGHTS, _OPTIMIZER, _STATE = "lora.safetensors", "optimizer.pt", "state.json"
_ASIDE = ".tmp."
_DAMAGE = (SafetensorError, UnpicklingError)


@dataclass(frozen=True, slots=True)
class State:
    """Everything that training changes."""

    denoiser: nn.Module  # frozen but for its adapter
    parameters: list[nn.Parameter]  # of the adapter
    optimizer: torch.optim.Optimizer
    schedule: Any


def save(run_folder: Path, state: State, step: int, settings: dict[str, Any], keep: int) -> Path:
    """Write a checkpoint after `step` steps and delete all but the last `keep`; 0 keeps all.

    Raises UserError if it cannot be written; the checkpoints before it are left as they are.
    """
    folder = run_folder / f"checkpoint-{step}"
    aside = _aside(folder)
    layers = {name: tensor.detach().cpu().contiguous() for name, tensor in adapter_layers(state.denoiser).items()}
    try:
        aside.mkdir(parents=True)
        save_file(layers, aside / _WEIGHTS)
        torch.save(state.optimizer.state_dict(), aside / _OPTIMIZER)
        (aside / _STATE).write_text(json.dumps({"step": step, "settings": settings}, indent=1))
        for file in aside.iterdir():
            sync(file)
        _delete(folder)
        aside.rename(folder)
        sync(run_folder)
    except (OSError, RuntimeError, SafetensorError) as fault:  # torch and safetensors wrap a full disk in their own
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(
            f"{folder}: cannot be written: {fault}; the same command resumes from the one before"
        ) from fault
    if keep:
        for old in checkpoints(run_folder)[:-keep]:
            _delete(old)
    return folder


def sweep(run_folder: Path) -> None:
    """Remove what an interrupted run left half written or half deleted."""
    for leftover in run_folder.glob(f"checkpoint-*{_ASIDE}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def check(folder: Path, settings: dict[str, Any]) -> int:
    """Return the number of steps a checkpoint stands after.

    Raises UserError if it is damaged or was written under other settings.
    """
    try:
        stored = json.loads((folder / _STATE).read_text())
        step, earlier = int(stored["step"]), dict(stored["settings"])
    except (OSError, ValueError, LookupError, TypeError) as fault:
        raise _damaged(folder, fault) from fault
    defaults = TrainerConfig().model_dump(mode="json")  # of options that the checkpoint's version did not have
    changed = [key for key in settings if settings[key] != earlier.get(key, defaults.get(key))]
    if changed:
        hidden = {"samples": "the pairs themselves", "weights": "the model's weights"}
        listed = [
            hidden.get(key) or f"{key} {json.dumps(earlier.get(key))} -> {json.dumps(settings[key])}" for key in changed
        ]
        raise UserError(
            f"{folder}: written under other settings ({', '.join(listed)}); "
            "give the new run another output_dir or tracker_run_name"
        )
    return step


def load(folder: Path, state: State) -> None:
    """Restore a checkpoint that was checked; raises UserError if it is damaged or of another rank or preset."""
    try:
        step = int(json.loads((folder / _STATE).read_text())["step"])
        layers = load_file(folder / _WEIGHTS)
        optimizer = torch.load(folder / _OPTIMIZER, map_location="cpu", weights_only=True)
        load_adapter(state.denoiser, layers)
        state.optimizer.load_state_dict(optimizer)
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, EOFError, *_DAMAGE) as fault:
        raise _damaged(folder, fault) from fault
    _move_schedule(state, step)


def holds(folder: Path, lora: Path) -> bool:
    """Tell whether a LoRA file has the weights of a checkpoint."""
    try:
        return same_layers(lora, load_file(folder / _WEIGHTS))
    except (OSError, SafetensorError):
        return False


def same_layers(lora: Path, layers: dict[str, Tensor]) -> bool:
    """Tell whether a LoRA file exists and has these weights, named as peft names them."""
    try:
        stored = {name.partition(".")[2]: tensor for name, tensor in load_file(lora).items()}
    except (OSError, SafetensorError):
        return False
    return stored.keys() == layers.keys() and all(torch.equal(stored[name], layers[name].cpu()) for name in layers)


def _damaged(folder: Path, fault: Exception) -> UserError:
    return UserError(
        f"{folder}: damaged ({str(fault) or type(fault).__name__}); delete it to resume from the one before"
    )


def _move_schedule(state: State, step: int) -> None:
    """Put the learning rate where this run's schedule has it after `step` steps: its length may have changed."""
    rates = [
        base * factor(step) for base, factor in zip(state.schedule.base_lrs, state.schedule.lr_lambdas, strict=True)
    ]
    for group, rate in zip(state.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    state.schedule.last_epoch, state.schedule._last_lr = step, rates


def _aside(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}{_ASIDE}{os.getpid()}.{uuid4().hex[:8]}")


def _delete(folder: Path) -> None:
    """Delete a checkpoint so that at no moment half of one bears its name."""
    if folder.exists():
        leaving = folder.rename(_aside(folder))
        shutil.rmtree(leaving)


def checkpoints(run_folder: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first."""
    named = [(match, path) for path in run_folder.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted((int(match[1]), path) for match, path in named)]


def chosen(run_folder: Path, resume: str | None, root: Path) -> Path | None:
    """Return the checkpoint to go on from, as `resume_from_checkpoint` says; None starts afresh."""
    existing = checkpoints(run_folder)
    if resume == "latest":
        return existing[-1] if existing else None
    if resume is None:
        if existing:
            raise UserError(
                f'{run_folder} holds a run already; set resume_from_checkpoint to "latest", or another output_dir'
            )
        return None
    listed = ", ".join(path.name for path in existing) or "none"
    for folder in (run_folder / resume, root / resume):
        if resume and (folder / _STATE).is_file():
            step = check(folder, {})
            later = [path.name for path in existing if int(path.name.partition("-")[2]) > step]
            if later:
                raise UserError(
                    f"{run_folder} holds later checkpoints ({', '.join(later)}); delete them, or give the run that "
                    f"starts from {folder.name} another output_dir"
                )
            return folder
    raise UserError(
        f"resume_from_checkpoint: no checkpoint {resume!r} in {run_folder} or {root}; checkpoints there: {listed}"
    )
