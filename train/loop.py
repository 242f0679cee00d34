"""`train run`, read top to bottom: load, freeze, adapt, then one step after the other.

`run` is the public function. Maths is in flow.py, what is shown when in data.py, the model in its family's module.
"""

import itertools
import json
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch import nn

from families import Source, open_project
from families.checkpoints import encoder_keys, fingerprint, here, locate
from families.protocol import Family
from families.quantize import quantize_and_place
from families.runtime import choose_attention, default_device, family_of
from schemas.console import progress
from schemas.errors import UserError
from schemas.keys import seed_of
from schemas.project import Project
from schemas.storage import write_aside
from schemas.summaries import TrainSummary
from schemas.trainer import DEFAULT_STEPS, TrainerConfig
from train import checkpoint
from train.adapter import LORA_NAME, adapter_layers, add_adapter, check_gradients, save_adapter, start_from_file
from train.data import Shelf, Shown, batches, epoch_batches
from train.fusing import fuse
from train.interrupt import stops
from train.metrics import Metrics
from train.optimizer import check_optimizer, make_optimizer, make_schedule
from train.step import base_dtype, step_loss

# Options that may differ between a checkpoint and the run that resumes it.
_FREE_ON_RESUME = {
    "max_train_steps", "num_train_epochs", "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint",
    "output_dir", "tracker_run_name", "pretrained_model_name_or_path", "gradient_checkpointing",
}  # fmt: skip


def run(  # noqa: PLR0915 - one run, read top to bottom
    project: Source, *, limit: int | None = None, workers: int | None = None, dry_run: bool = False
) -> TrainSummary:
    """Train a LoRA on the cached pairs of a project and write it to the run folder.

    Resumes where an earlier run stopped. `limit` stops after N steps of this run, `workers` is the number of CPU
    threads. Raises UserError before the first step if anything is missing, stale or damaged, and at the step where a
    loss or gradient is not finite.
    """
    start = time.monotonic()
    project = open_project(project)
    config, device, folder = project.trainer, default_device(), project.run_folder
    check_optimizer(config)

    # What is trained on: every latent and embed is there, or the run ends here.
    shelf = Shelf(project, encoder_keys(project, remember=not dry_run))
    steps = _steps(project, shelf)

    # Where to go on: a checkpoint must be of these very settings, samples and weights.
    denoiser = project.family.denoiser
    weights = here(project, denoiser) if dry_run else locate(project, denoiser)
    settings = _settings(project, shelf, weights, remember=not dry_run)
    resumed = checkpoint.chosen(folder, config.resume_from_checkpoint, project.root)
    first = checkpoint.check(resumed, settings) if resumed is not None else 0
    last = max(first, min(steps, first + limit) if limit is not None else steps)

    summary = TrainSummary(
        run_folder=str(folder),
        lora=None if dry_run else str(folder / LORA_NAME),
        samples=len(shelf.samples),
        skipped=shelf.skipped,
        first_step=first,
        last_step=last,
        device=str(device),
        dry_run=dry_run,
        warnings=project.warnings,
    )
    if dry_run or weights is None or (first == last and resumed and checkpoint.holds(resumed, folder / LORA_NAME)):
        return replace(summary, seconds=time.monotonic() - start)

    torch.set_num_threads(workers or torch.get_num_threads())
    family = family_of(project)
    state = _load(project, weights, device, steps)
    if resumed is not None:
        checkpoint.load(resumed, state)
    else:
        start_from_file(state.denoiser, project)
    checkpoint.sweep(folder)

    done: list[tuple[float, float]] = []  # loss and seconds of each step
    stream = itertools.islice(batches(project, shelf), first * config.gradient_accumulation_steps, None)
    with (
        Metrics(folder, first) as metrics,
        progress("train", last, "step", done=first) as bar,
        stops() as asked_to_stop,
    ):
        for step in range(first + 1, last + 1):
            began = time.monotonic()
            turns = list(itertools.islice(stream, config.gradient_accumulation_steps))
            loss = _accumulate(family, state.denoiser, shelf, [showings for _, showings in turns], step, config)
            if step == first + 1:
                check_gradients(state.denoiser.named_parameters(), project)
            norm = _clip(state, step, config.max_grad_norm)
            rate = state.schedule.get_last_lr()[0]
            state.optimizer.step()
            state.schedule.step()
            state.optimizer.zero_grad(set_to_none=True)

            done.append((loss, time.monotonic() - began))
            metrics.write(step=step, epoch=turns[-1][0], loss=loss, lr=rate, grad_norm=norm, seconds=done[-1][1])
            bar.set_postfix_str(f"loss {loss:.4f}, lr {rate:.2e}, {done[-1][1]:.2f} s/step")
            bar.update()
            last = step if asked_to_stop() else last
            if step == last or (config.checkpointing_steps and step % config.checkpointing_steps == 0):
                checkpoint.save(folder, state, step, settings, config.checkpoints_total_limit)
            if step == last:
                break
    _finish(project, state, settings)

    tenth = max(1, len(done) // 10)
    return replace(
        summary,
        last_step=last,
        stopped=last < steps and limit is None,
        first_loss=fmean(loss for loss, _ in done[:tenth]) if done else None,
        loss=fmean(loss for loss, _ in done[-tenth:]) if done else None,
        trainable_parameters=sum(parameter.numel() for parameter in state.parameters),
        seconds_per_step=median(seconds for _, seconds in done) if done else None,
        seconds=time.monotonic() - start,
    )


def _load(project: Project, folder: Path, device: torch.device, steps: int) -> checkpoint.State:
    """Load, freeze, quantise, then adapt: in this order, or the adapter would be quantised as well."""
    config = project.trainer
    choose_attention()
    denoiser = family_of(project).load_denoiser(folder, base_dtype(config))
    if config.fuse_qkv_projections:
        fuse(denoiser)
    denoiser.requires_grad_(False)
    spared = project.family.unquantised
    denoiser = quantize_and_place(denoiser, config.base_model_precision, spared, device, config.quantize_via)
    parameters = add_adapter(denoiser, project)
    if config.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
    optimizer = make_optimizer(parameters, config)
    return checkpoint.State(denoiser.train(), parameters, optimizer, make_schedule(optimizer, config, steps))


def _accumulate(
    family: Family,
    denoiser: nn.Module,
    shelf: Shelf,
    turns: Sequence[Sequence[Shown]],
    step: int,
    config: TrainerConfig,
) -> float:
    """Run the forward and backward passes of one step; returns the mean loss.

    Dropout depends on the seed and the step's number alone. Raises UserError if the loss is not finite.
    """
    device = next(denoiser.parameters()).device
    torch.manual_seed(seed_of(config.seed, "dropout", step))
    total = 0.0
    for showings in turns:
        batch = shelf.load(showings, device)
        loss = step_loss(family, denoiser, batch, step, config) / len(turns)
        if not torch.isfinite(loss):
            raise UserError(f"step {step}: the loss is {loss.item()}; samples: {', '.join(batch.sample_ids)}")
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.item()
    return total


def _clip(state: checkpoint.State, step: int, limit: float) -> float:
    """Scale gradients down to the norm `limit` and return the norm they had; raises UserError if it is not finite."""
    norm = nn.utils.clip_grad_norm_(state.parameters, limit or float("inf")).item()
    if not math.isfinite(norm):
        raise UserError(f"step {step}: the gradient is {norm}; a lower learning_rate or mixed_precision: no may help")
    return norm


def _steps(project: Project, shelf: Shelf) -> int:
    config = project.trainer
    if config.max_train_steps or not config.num_train_epochs:
        return config.max_train_steps or DEFAULT_STEPS
    passes = sum(len(epoch_batches(project, shelf, epoch)) for epoch in range(config.num_train_epochs))
    return max(1, passes // config.gradient_accumulation_steps)


def _settings(project: Project, shelf: Shelf, weights: Path | None, *, remember: bool) -> dict[str, Any]:
    """Return what a run's numbers depend on: a resumed run must have the same.

    Weights that are not on this machine are left out, which a dry run may do.
    """
    options = {name: value for name, value in project.trainer.acting("train").items() if name not in _FREE_ON_RESUME}
    options["model_flavour"] = project.flavour
    options["lycoris_config"] = project.lokr and project.lokr.model_dump(mode="json")  # what the file says
    settings = {**options, "samples": shelf.fingerprint()}
    if weights is not None:
        settings["weights"] = fingerprint(project, weights, project.family.denoiser, remember=remember)
    return settings


def _finish(project: Project, state: checkpoint.State, settings: dict[str, Any]) -> None:
    """Write the LoRA as pipelines load it, and what made it, unless they are there as they should be."""
    folder, layers = project.run_folder, adapter_layers(state.denoiser)
    libraries = {name: version(name) for name in ("pairline", "torch", "diffusers", "transformers", "peft")}
    options = project.trainer.model_dump(mode="json")
    document = {"config": options, "versions": libraries, "samples": settings["samples"]}
    text = json.dumps(document, indent=2)
    record = folder / "settings.json"
    if not record.exists() or record.read_text() != text:
        with write_aside(record) as aside:
            aside.write_text(text)
    if not checkpoint.same_layers(folder / LORA_NAME, layers):
        save_adapter(folder, project, state.denoiser, layers, document)
