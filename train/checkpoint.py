"""Checkpoints: folders `checkpoint-N` that exist only when they are whole.

`save` and `load` stand side by side; the state of the loop is listed in `State` and nowhere else. No state of a random
generator is among it: every draw comes from the seed and the names of what it is drawn for.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from uuid import uuid4

import torch
import xxhash
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from families.checkpoints import fingerprint
from schemas.console import log
from schemas.errors import UserError
from schemas.project import Project
from schemas.storage import sync
from schemas.trainer import TrainerConfig
from train.adapter import adapter_layers, load_adapter
from train.data import Shelf
from train.order import Cursor

_NAME = re.compile(r"checkpoint-(\d+)(-rolling)?")
_WEIGHTS, _OPTIMIZER, _AVERAGE, _STATE = "lora.safetensors", "optimizer.pt", "ema.pt", "state.json"
_ASIDE = ".tmp."
_READING = 16 << 20

# Options that may differ between a checkpoint and the run that resumes it: where it runs, what it shows.
_FREE = {
    "max_train_steps", "num_train_epochs", "output_dir", "tracker_run_name", "tracker_project_name", "report_to",
    "checkpointing_steps", "checkpoints_total_limit", "checkpointing_rolling_steps",
    "checkpoints_rolling_total_limit", "resume_from_checkpoint", "pretrained_model_name_or_path",
    "gradient_checkpointing", "gradient_checkpointing_interval", "gradient_checkpointing_keep",
    "gradient_checkpointing_backend", "quantize_via", "dynamo_backend", "dynamo_mode", "enable_group_offload",
    "group_offload_type", "group_offload_blocks_per_group", "group_offload_use_stream", "gradient_accumulation_steps",
    "memory_budget_gib", "eval_steps_interval", "num_eval_images", "eval_timesteps", "user_prompt_library",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class State:
    """Everything that training changes."""

    denoiser: nn.Module  # frozen but for what is trained
    parameters: list[nn.Parameter]  # that are trained
    optimizer: torch.optim.Optimizer
    schedule: Any
    average: EMAModel | None


@dataclass(frozen=True, slots=True)
class Mark:
    """Where a run stands."""

    step: int  # the last one taken
    cursor: Cursor  # where the next one goes on
    settings: Mapping[str, Any]  # that its numbers depend on


@dataclass(frozen=True, slots=True)
class Stored:
    """A checkpoint that was read and is whole."""

    folder: Path
    mark: Mark


class _Damaged(Exception):
    """A checkpoint that cannot be used."""


def settings_of(
    project: Project, shelf: Shelf, weights: Path | None, processes: int, *, remember: bool
) -> dict[str, Any]:
    """Return what a run's numbers depend on: a resumed run must have the same.

    Weights that are not on this machine are left out, which a dry run may do.
    """
    acting = project.trainer.acting("train").items()
    settings = {name: value for name, value in acting if name not in _FREE and not name.startswith("validation_")}
    settings |= {
        "model_flavour": project.flavour,
        "caption_dropout_probability": project.caption_dropout,
        "batches_per_step": project.trainer.gradient_accumulation_steps * processes,
        "samples": shelf.fingerprint(),
        "lycoris_config": project.lokr.model_dump(mode="json")
        if project.lokr is not None
        else None,  # what the file says
    }
    if weights is not None:
        settings["weights"] = fingerprint(project, weights, project.family.denoiser, remember=remember)
    return settings


def save(run_folder: Path, state: State, mark: Mark, *, keep: int, rolling: bool = False) -> Path:
    """Write a checkpoint and delete all but the last `keep` of its kind; 0 keeps all.

    Raises UserError if it cannot be written; the checkpoints before it are left as they are.
    """
    folder = run_folder / f"checkpoint-{mark.step}{'-rolling' if rolling else ''}"
    aside = _aside(folder)
    layers = {name: tensor.detach().cpu().contiguous() for name, tensor in adapter_layers(state.denoiser).items()}
    try:
        aside.mkdir(parents=True)
        save_file(layers, aside / _WEIGHTS)
        torch.save(state.optimizer.state_dict(), aside / _OPTIMIZER)
        if state.average is not None:
            torch.save(state.average.state_dict(), aside / _AVERAGE)
        files = {file.name: _sum(file) for file in sorted(aside.iterdir())}
        (aside / _STATE).write_text(json.dumps(asdict(mark) | {"files": files}, indent=1))
        for file in aside.iterdir():
            sync(file)
        _delete(folder)
        aside.rename(folder)
        sync(run_folder)
    except (OSError, RuntimeError, SafetensorError) as fault:  # torch and safetensors wrap a full disk in their own
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(
            f"{folder}: cannot be written: {fault} ({_free(run_folder)}); the same command resumes from the one before"
        ) from fault
    _make_room(run_folder, folder, keep)
    return folder


def _free(folder: Path) -> str:
    return f"{shutil.disk_usage(folder).free / 2**30:.1f} GiB are free there"


def _make_room(run_folder: Path, newest: Path, keep: int) -> None:
    """Delete all but the last `keep` of a kind, 0 keeps all, and those after the newest, which were passed over."""
    existing, rolling = checkpoints(run_folder), newest.name.endswith("-rolling")
    later = [one for one in existing if _step(one) > _step(newest)]
    alike = [one for one in existing if one.name.endswith("-rolling") == rolling and one not in later]
    for old in [*later, *(alike[:-keep] if keep else [])]:
        try:
            _delete(old)
        except OSError as fault:
            log.warning("%s: cannot be deleted: %s", old, fault.strerror or fault)


def load(stored: Stored, state: State) -> None:
    """Restore a checkpoint; raises UserError if it is of another rank or preset."""
    try:
        layers = load_file(stored.folder / _WEIGHTS)
        load_adapter(state.denoiser, layers)
        state.optimizer.load_state_dict(torch.load(stored.folder / _OPTIMIZER, map_location="cpu", weights_only=True))
        if state.average is not None:
            kept = torch.load(stored.folder / _AVERAGE, map_location="cpu", weights_only=True)
            state.average.load_state_dict(kept)
            state.average.to(device=state.parameters[0].device)
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, EOFError, SafetensorError,
            UnpicklingError) as fault:  # fmt: skip
        raise UserError(f"{stored.folder}: cannot be restored ({str(fault) or type(fault).__name__})") from fault
    _move_schedule(state, stored.mark.step)


def find(run_folder: Path, resume: str | None, root: Path) -> Stored | None:
    """Return the checkpoint to go on from, as `resume_from_checkpoint` says; None starts afresh.

    Under `latest` a damaged one is passed over, with a warning, for the one before.
    """
    existing = checkpoints(run_folder)
    if resume == "latest":
        return _latest(existing)
    if resume is None:
        if existing:
            raise UserError(
                f'{run_folder} holds a run already; set resume_from_checkpoint to "latest", or another output_dir'
            )
        return None
    for folder in (run_folder / resume, root / resume):
        if resume and folder.is_dir():
            return _named(folder, existing, run_folder)
    listed = ", ".join(path.name for path in existing) or "none"
    raise UserError(
        f"resume_from_checkpoint: no checkpoint {resume!r} in {run_folder} or {root}; checkpoints there: {listed}"
    )


def _latest(existing: list[Path]) -> Stored | None:
    for folder in reversed(existing):
        try:
            return _read(folder)
        except _Damaged as fault:
            log.warning("%s: %s; going on from the one before", folder, fault)
    if existing:
        raise UserError(f"{existing[0].parent}: no checkpoint there is whole; delete them to start afresh")
    return None


def _named(folder: Path, existing: list[Path], run_folder: Path) -> Stored:
    try:
        stored = _read(folder)
    except _Damaged as fault:
        raise UserError(f'{folder}: {fault}; "latest" takes the last one that is whole') from fault
    if later := [path.name for path in existing if _step(path) > stored.mark.step]:
        raise UserError(
            f"{run_folder} holds later checkpoints ({', '.join(later)}); delete them, or give the run that "
            f"starts from {folder.name} another output_dir"
        )
    return stored


def check(stored: Stored, settings: Mapping[str, Any]) -> None:
    """Raise UserError if a checkpoint was written under other settings."""
    defaults = TrainerConfig().model_dump(mode="json")  # of options that the checkpoint's version did not have
    earlier = stored.mark.settings
    changed = [key for key in settings if settings[key] != earlier.get(key, defaults.get(key))]
    if changed:
        hidden = {"samples": "the pairs themselves", "weights": "the model's weights"}
        named = {"batches_per_step": "gradient_accumulation_steps × processes"}
        listed = [
            hidden.get(key) or f"{named.get(key, key)} {json.dumps(earlier.get(key))} -> {json.dumps(settings[key])}"
            for key in changed
        ]
        raise UserError(
            f"{stored.folder}: written under other settings ({', '.join(listed)}); "
            "give the new run another output_dir or tracker_run_name"
        )


def sweep(run_folder: Path) -> None:
    """Remove what an interrupted run left half written or half deleted."""
    for leftover in run_folder.glob(f"checkpoint-*{_ASIDE}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def checkpoints(run_folder: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first."""
    named = [path for path in run_folder.glob("checkpoint-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(named, key=lambda path: (_step(path), path.name))


def holds(folder: Path, lora: Path) -> bool:
    """Tell whether a LoRA file has the weights of a checkpoint."""
    try:
        return same_layers(lora, load_file(folder / _WEIGHTS))
    except (OSError, SafetensorError):
        return False


def is_one(folder: Path) -> bool:
    """Tell a checkpoint's folder from others."""
    return (folder / _STATE).is_file()


def layers_of(folder: Path) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """Read what a checkpoint trained, and the settings it was trained with; raises UserError if it is damaged."""
    try:
        settings = _read(folder).mark.settings
        return load_file(folder / _WEIGHTS), settings
    except (_Damaged, OSError, SafetensorError) as fault:
        raise UserError(f"{folder}: {fault}; choose another checkpoint") from fault


def same_layers(lora: Path, layers: Mapping[str, Tensor]) -> bool:
    """Tell whether a LoRA file exists and has these weights, named as peft names them."""
    try:
        stored = {name.partition(".")[2]: tensor for name, tensor in load_file(lora).items()}
    except (OSError, SafetensorError):
        return False
    return stored.keys() == layers.keys() and all(torch.equal(stored[name], layers[name].cpu()) for name in layers)


def _read(folder: Path) -> Stored:
    """Read what a checkpoint says of itself, and whether its files are what it says."""
    try:
        document = json.loads((folder / _STATE).read_text())
        cursor = Cursor(int(document["cursor"]["epoch"]), int(document["cursor"]["batch"]))
        mark = Mark(int(document["step"]), cursor, dict(document["settings"]))
        files = dict(document["files"])
        if (
            mark.step != _step(folder)
            or min(cursor.epoch, cursor.batch) < 0
            or not {_WEIGHTS, _OPTIMIZER} <= files.keys()
        ):
            raise ValueError(f"{_STATE} does not say what the folder's name does")
        wrong = [name for name, total in files.items() if _sum(folder / name) != total]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as fault:
        raise _Damaged(f"damaged ({str(fault) or type(fault).__name__})") from fault
    if wrong:
        raise _Damaged(f"damaged ({', '.join(wrong)} is not as it was written)")
    return Stored(folder, mark)


def _sum(file: Path) -> str:
    total = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while part := stream.read(_READING):
            total.update(part)
    return total.hexdigest()


def _step(folder: Path) -> int:
    return int(folder.name.split("-")[1])


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
