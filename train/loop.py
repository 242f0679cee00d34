"""`train run`, read top to bottom: what is trained on, where to go on, the model, then one step after the other.

`run` is the whole, `_train` the loop. What is shown when is in order.py, reading ahead in loader.py; time, noise and
loss of one forward pass in step.py; what is trained in lora.py; checkpoints in checkpoint.py, several processes in
processes.py; the model itself in its family's module.
"""

import json
import math
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch import nn

from families import Source, open_project
from families.checkpoints import encoder_keys, here, locate
from families.protocol import Family
from families.quantize import quantize_weights
from families.runtime import choose_attention, default_device, family_of
from schemas.console import Progress, progress
from schemas.errors import UserError
from schemas.freshness import check_pairs
from schemas.keys import digest, seed_of
from schemas.lock import only_one
from schemas.project import Project
from schemas.storage import write_aside
from schemas.summaries import TrainSummary
from schemas.trainer import DEFAULT_STEPS
from train import checkpoint
from train.data import Shelf, training_sets
from train.ema import averaged, make_average
from train.interrupt import stops
from train.loader import Loader
from train.lora import add_lora, lora_layers, lora_metadata
from train.metrics import Metrics, check_tracker
from train.optimizer import make_optimizer, make_schedule
from train.order import Cursor, epoch_batches, turns
from train.processes import Processes, processes
from train.step import base_dtype, step_loss

LORA_NAME = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True, slots=True)
class _Supply:
    """What a run is made from."""

    shelf: Shelf
    weights: Path | None  # the checkpoint of the model; null if it is not on this machine, in a dry run
    settings: Mapping[str, Any]  # that its numbers depend on


@dataclass(frozen=True, slots=True)
class _Plan:
    """What a run does, known before any model is loaded."""

    supply: _Supply
    resumed: checkpoint.Stored | None
    steps: int  # of the whole training
    last: int  # that this run takes

    @property
    def first(self) -> int:
        """Return the number of steps that were taken before."""
        return self.resumed.mark.step if self.resumed is not None else 0


@dataclass(slots=True)
class _Done:
    """What a run did so far."""

    step: int  # the last one
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # of each step, evaluations and checkpoints not counted
    samples: int = 0
    waited: float = 0.0  # seconds that steps waited for data


def run(
    project: Source, *, limit: int | None = None, workers: int | None = None, dry_run: bool = False
) -> TrainSummary:
    """Train on the cached pairs of a project and write the adapter to the run folder.

    Resumes where an earlier run stopped. `limit` stops after N steps of this run, `workers` is the number of CPU
    threads. Raises UserError before the first step if anything is missing, stale or damaged, and at the step where a
    loss or gradient is not finite.
    """
    start = time.monotonic()
    project, device = open_project(project), default_device()
    folder = project.run_folder
    with processes(device) as ranks, ExitStack() as held:
        supply = _supply(project, ranks, dry_run)
        if ranks.first and not dry_run:
            held.enter_context(only_one(folder, "train run"))
            checkpoint.sweep(folder)
        plan = _plan(project, supply, ranks, limit)
        summary = TrainSummary(
            run_folder=str(folder),
            lora=None if dry_run else str(folder / LORA_NAME),
            samples=len(supply.shelf.samples),
            skipped=supply.shelf.skipped,
            first_step=plan.first,
            last_step=plan.last,
            device=str(device),
            dry_run=dry_run,
            warnings=project.warnings,
        )
        if dry_run or supply.weights is None or _is_done(plan, folder):
            return replace(summary, seconds=time.monotonic() - start)

        torch.set_num_threads(workers or torch.get_num_threads())
        family = family_of(project)
        state = _load(project, family, supply.weights, device, plan.steps)
        if plan.resumed is not None:
            checkpoint.load(plan.resumed, state)
        record = _record(project)
        with Metrics(project, plan.first, record, quiet=not ranks.first) as metrics:
            done = _train(project, plan, family, state, ranks, metrics)
        if ranks.first:
            _finish(project, family, state, record)

    tenth = max(1, len(done.losses) // 10)
    return replace(
        summary,
        last_step=done.step,
        stopped=done.step < plan.last,
        first_loss=fmean(done.losses[:tenth]) if done.losses else None,
        loss=fmean(done.losses[-tenth:]) if done.losses else None,
        trainable_parameters=sum(parameter.numel() for parameter in state.parameters),
        seconds_per_step=median(done.seconds) if done.seconds else None,
        data_wait=done.waited / max(sum(done.seconds), 1e-9) if done.seconds else None,
        peak_memory_gib=_peak_gib(device),
        seconds=time.monotonic() - start,
    )


def _train(
    project: Project, plan: _Plan, family: Family, state: checkpoint.State, ranks: Processes, metrics: Metrics
) -> _Done:
    """Take the steps of a run, one after the other, and write its checkpoints."""
    config, folder, done = project.trainer, project.run_folder, _Done(plan.first)
    cursor = plan.resumed.mark.cursor if plan.resumed is not None else Cursor()
    planned = turns(project, plan.supply.shelf, cursor, ranks.rank, ranks.count)
    with (
        Loader(plan.supply.shelf, planned, ranks.device) as loader,
        progress("train", plan.last, "step", done=plan.first, quiet=not ranks.first) as bar,
        stops() as asked_to_stop,
    ):
        for step, (turn, batches) in zip(range(plan.first + 1, plan.last + 1), loader, strict=False):
            began, loss, odd = time.monotonic(), 0.0, list[str]()

            # Forward and backward, a batch at a time; each weighs as many samples as it has.
            for batch in batches:
                torch.manual_seed(seed_of(batch.seeds[0], "dropout"))
                part = step_loss(family, state.denoiser, batch, step, config) * (len(batch.seeds) / turn.samples)
                part.backward()  # type: ignore[no-untyped-call]
                loss += part.item()
                odd += [] if torch.isfinite(part) else batch.sample_ids
            loss, stop = ranks.sum(loss, asked_to_stop())
            if not math.isfinite(loss):
                raise UserError(f"step {step}: the loss is {loss}; samples: {', '.join(odd) or 'of another process'}")

            # The gradients of all processes, scaled down to the norm that is allowed; then the update.
            ranks.sum_gradients(state.parameters)
            norm = _clip(state, step, config.max_grad_norm, check=step == plan.first + 1)
            rate = state.schedule.get_last_lr()[0]
            state.optimizer.step()
            state.schedule.step()
            state.optimizer.zero_grad(set_to_none=True)
            if state.average is not None and step % config.ema_update_interval == 0:
                state.average.step(state.parameters)

            # What there is to tell.
            done.step = step
            done.losses.append(loss)
            done.seconds.append(time.monotonic() - began)
            done.samples += turn.samples
            waited, done.waited = loader.waited - done.waited, loader.waited
            metrics.write(
                step, epoch=turn.epoch, loss=loss, lr=rate, grad_norm=norm, seconds=done.seconds[-1], data_wait=waited
            )
            _tell(bar, done, rate, ranks.device)

            # Now and then.
            ends = step == plan.last or bool(stop)
            if ranks.first:
                mark = checkpoint.Mark(step, turn.after, plan.supply.settings)
                if ends or _due(step, config.checkpointing_steps):
                    checkpoint.save(folder, state, mark, keep=config.checkpoints_total_limit)
                elif _due(step, config.checkpointing_rolling_steps):
                    checkpoint.save(folder, state, mark, keep=config.checkpoints_rolling_total_limit, rolling=True)
            if ends:
                break
    return done


def _due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0


def _tell(bar: Progress, done: _Done, rate: float, device: torch.device) -> None:
    seconds = sum(done.seconds)
    parts = [f"loss {done.losses[-1]:.4f}", f"lr {rate:.2e}", f"{done.seconds[-1]:.2f} s/step",
             f"{done.samples / seconds:.2f} samples/s", f"data {done.waited / seconds:.0%}"]  # fmt: skip
    if (peak := _peak_gib(device)) is not None:
        parts.append(f"{peak:.1f} GiB")
    bar.set_postfix_str(", ".join(parts))
    bar.update()


def _peak_gib(device: torch.device) -> float | None:
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None


def _supply(project: Project, ranks: Processes, dry_run: bool) -> _Supply:
    """Check all that can be checked before anything is written; raises UserError for what is missing or damaged."""
    check_tracker(project)
    denoiser = project.family.denoiser
    with ranks.first_alone():  # one process builds or fetches the checkpoint
        shelf = Shelf(project, encoder_keys(project, remember=not dry_run))
        weights = here(project, denoiser) if dry_run else locate(project, denoiser)
        settings = checkpoint.settings_of(project, shelf, weights, ranks.count, remember=not dry_run)
    return _Supply(shelf, weights, settings)


def _plan(project: Project, supply: _Supply, ranks: Processes, limit: int | None) -> _Plan:
    """Find where to go on, and how far; raises UserError for a checkpoint of other settings."""
    resumed = checkpoint.find(project.run_folder, project.trainer.resume_from_checkpoint, project.root)
    if resumed is not None:
        checkpoint.check(resumed, supply.settings)
    steps, first = _steps(project, supply.shelf, ranks.count), resumed.mark.step if resumed is not None else 0
    last = max(first, min(steps, first + limit) if limit is not None else steps)
    return _Plan(supply, resumed, steps, last)


def _is_done(plan: _Plan, folder: Path) -> bool:
    """Tell whether every step is taken and the adapter is there as it should be."""
    return (
        plan.resumed is not None
        and plan.first == plan.last
        and checkpoint.holds(plan.resumed.folder, folder / LORA_NAME)
    )


def _steps(project: Project, shelf: Shelf, count: int) -> int:
    config = project.trainer
    if config.max_train_steps or not config.num_train_epochs:
        return config.max_train_steps or DEFAULT_STEPS
    batches = sum(len(epoch_batches(project, shelf, epoch)) for epoch in range(config.num_train_epochs))
    return max(1, batches // (config.gradient_accumulation_steps * count))


def _load(project: Project, family: Family, folder: Path, device: torch.device, steps: int) -> checkpoint.State:
    """Load, freeze, quantise, then adapt: in this order, or the adapter would be quantised as well."""
    config = project.trainer
    choose_attention()
    denoiser = family.load_denoiser(folder, base_dtype(config), device).requires_grad_(False)
    quantize_weights(denoiser, config.base_model_precision, project.family.unquantised)
    parameters = add_lora(denoiser, project)
    if config.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
    optimizer = make_optimizer(parameters, config)
    schedule = make_schedule(optimizer, config, steps)
    return checkpoint.State(denoiser.train(), parameters, optimizer, schedule, make_average(parameters, config))


def _clip(state: checkpoint.State, step: int, limit: float, *, check: bool) -> float:
    """Scale gradients down to the norm `limit` and return the norm they had.

    Raises UserError if it is not finite, or, with `check`, if a weight received none: some quantised layers lose it in
    silence.
    """
    named = [(name, one) for name, one in state.denoiser.named_parameters() if one.requires_grad] if check else []
    without = [name for name, parameter in named if parameter.grad is None]
    if without:
        raise UserError(
            f"{len(without)} of {len(named)} LoRA tensors receive no gradient, first {without[0]}; "
            "choose another base_model_precision or flux_lora_target"
        )
    norm = nn.utils.clip_grad_norm_(state.parameters, limit or float("inf")).item()
    if not math.isfinite(norm):
        raise UserError(f"step {step}: the gradient is {norm}; a lower learning_rate or mixed_precision: no may help")
    return norm


def _record(project: Project) -> dict[str, Any]:
    """Return what a run is made from: options, versions, and the pair tables, by what made them."""
    return {
        "config": project.trainer.model_dump(mode="json") | {"model_flavour": project.flavour},
        "versions": {name: version(name) for name in ("pairline", "torch", "diffusers", "transformers", "peft")},
        "datasets": {one.id: digest(_provenance(project, one.id)) for one in training_sets(project)},
    }


def _provenance(project: Project, dataset_id: str) -> list[str | None]:
    table = check_pairs(project, project.dataset(dataset_id))
    return [table.config, table.inputs]


def _finish(project: Project, family: Family, state: checkpoint.State, record: dict[str, Any]) -> None:
    """Write the LoRA as pipelines load it, and what made it, unless they are there as they should be."""
    folder, layers = project.run_folder, lora_layers(state.denoiser)
    text = json.dumps(record, indent=2)
    settings = folder / "settings.json"
    if not settings.exists() or settings.read_text() != text:
        with write_aside(settings) as aside:
            aside.write_text(text)
    if not checkpoint.same_layers(folder / LORA_NAME, layers):
        family.save_lora(folder, layers, lora_metadata(state.denoiser))
    if state.average is not None:
        with averaged(state.average, state.parameters):
            family.save_lora(folder / "ema", lora_layers(state.denoiser), lora_metadata(state.denoiser))
