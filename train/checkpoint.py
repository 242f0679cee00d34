"""Checkpoints: folders `checkpoint-N` that exist only when they are whole.

`save` and `load` stand side by side; the state of the loop is listed in `save` and nowhere else.
"""

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from schemas.errors import UserError
from schemas.storage import sync
from train.lora import load_lora, lora_layers

_NAME = re.compile(r"checkpoint-(\d+)")
_WEIGHTS, _OPTIMIZER, _STATE = "lora.safetensors", "optimizer.pt", "state.json"


@dataclass(frozen=True, slots=True)
class State:
    """Everything that training changes."""

    denoiser: nn.Module  # frozen but for its adapter
    parameters: list[nn.Parameter]  # of the adapter
    optimizer: torch.optim.Optimizer
    schedule: Any


def save(run_folder: Path, state: State, step: int, settings: dict[str, Any], keep: int) -> Path:
    """Write a checkpoint after `step` steps and delete all but the last `keep`; 0 keeps all."""
    folder = run_folder / f"checkpoint-{step}"
    aside = run_folder / f"{folder.name}.tmp.{os.getpid()}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    layers = {name: tensor.detach().cpu().contiguous() for name, tensor in lora_layers(state.denoiser).items()}
    save_file(layers, aside / _WEIGHTS)
    torch.save({"optimizer": state.optimizer.state_dict(), "schedule": state.schedule.state_dict()}, aside / _OPTIMIZER)
    (aside / _STATE).write_text(json.dumps({"step": step, "settings": settings}, indent=1))
    for file in aside.iterdir():
        sync(file)
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
    sync(run_folder)
    if keep:
        for old in checkpoints(run_folder)[:-keep]:
            shutil.rmtree(old)
    return folder


def load(folder: Path, state: State, settings: dict[str, Any]) -> int:
    """Restore a checkpoint and return the number of steps it stands after.

    Raises UserError if it was written under other settings or is damaged.
    """
    try:
        stored = json.loads((folder / _STATE).read_text())
        layers = load_file(folder / _WEIGHTS)
        tensors = torch.load(folder / _OPTIMIZER, map_location="cpu", weights_only=True)
    except (OSError, ValueError, RuntimeError, KeyError) as fault:
        raise UserError(f"{folder}: damaged ({fault}); delete it to resume from the one before") from fault
    changed = [key for key in settings if settings[key] != stored["settings"].get(key)]
    if changed:
        listed = [f"{key} {stored['settings'].get(key)!r} -> {settings[key]!r}" for key in changed if key != "samples"]
        listed += ["the pairs themselves"] if "samples" in changed else []
        raise UserError(
            f"{folder}: written under other settings ({', '.join(listed)}); "
            "give the new run another output_dir or tracker_run_name"
        )
    load_lora(state.denoiser, layers)
    state.optimizer.load_state_dict(tensors["optimizer"])
    state.schedule.load_state_dict(tensors["schedule"])
    return int(stored["step"])


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
    for folder in (run_folder / resume, root / resume):
        if folder.is_dir():
            return folder
    listed = ", ".join(path.name for path in existing) or "none"
    raise UserError(
        f"resume_from_checkpoint: no folder {resume!r} in {run_folder} or {root}; checkpoints there: {listed}"
    )
