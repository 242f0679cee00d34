"""`train run`, read top to bottom: load, freeze, adapt, then one step after the other.

`run` is the public function. Maths is in flow.py, what is shown when in data.py, the model in its family's module.
"""

import itertools
import json
import math
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from families import Source, open_project
from families.checkpoints import encoder_keys, fingerprint, locate
from families.protocol import Family
from families.runtime import choose_attention, default_device, dtype_of, family_of
from schemas.console import progress
from schemas.errors import UserError
from schemas.keys import seed_of
from schemas.project import Project
from schemas.storage import write_aside
from schemas.summaries import TrainSummary
from schemas.trainer import TrainerConfig
from train import checkpoint, flow
from train.data import Batch, Shelf, Shown, batches, epoch_batches
from train.lora import add_lora, lora_layers, lora_metadata
from train.metrics import Metrics
from train.optimizer import make_optimizer, make_schedule
from train.quantize import quantize_base

LORA_NAME = "pytorch_lora_weights.safetensors"
DEFAULT_STEPS = 1000  # where neither steps nor epochs are given

# Options that may differ between a checkpoint and the run that resumes it.
_FREE_ON_RESUME = {
    "max_train_steps", "num_train_epochs", "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint",
    "output_dir", "tracker_run_name", "pretrained_model_name_or_path", "gradient_checkpointing",
}  # fmt: skip


def run(
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

    # What is trained on: every latent and embed is there, or the run ends here.
    shelf = Shelf(project, encoder_keys(project))
    steps = _steps(project, shelf)
    resumed = checkpoint.chosen(folder, config.resume_from_checkpoint, project.root)
    first = checkpoint.step_of(resumed) if resumed is not None else 0
    last = max(first, min(steps, first + limit) if limit is not None else steps)

    losses: list[float] = []
    trainable = None
    if not dry_run:
        torch.set_num_threads(workers or torch.get_num_threads())
        family = family_of(project)
        weights = locate(project, project.family.denoiser)
        settings = _settings(project, shelf, weights)

        # What is trained, then the state of an earlier run, if there is one.
        state = _load(project, weights, device, steps)
        trainable = sum(parameter.numel() for parameter in state.parameters)
        if resumed is not None:
            checkpoint.load(resumed, state, settings)
        checkpoint.sweep(folder)

        stream = itertools.islice(batches(project, shelf), first * config.gradient_accumulation_steps, None)
        with Metrics(folder, first) as metrics, progress("train", last, "step", done=first) as bar:
            for step in range(first + 1, last + 1):
                began = time.monotonic()
                turns = list(itertools.islice(stream, config.gradient_accumulation_steps))
                loss = _accumulate(family, state.denoiser, shelf, [showings for _, showings in turns], step, config)
                norm = _clip(state, step, config.max_grad_norm, check=step == first + 1)
                rate = state.schedule.get_last_lr()[0]
                state.optimizer.step()
                state.schedule.step()
                state.optimizer.zero_grad(set_to_none=True)

                losses.append(loss)
                seconds = time.monotonic() - began
                metrics.write(step=step, epoch=turns[-1][0], loss=loss, lr=rate, grad_norm=norm, seconds=seconds)
                bar.set_postfix_str(f"loss {loss:.4f}, lr {rate:.2e}, {seconds:.2f} s/step")
                bar.update()
                if step == last or (config.checkpointing_steps and step % config.checkpointing_steps == 0):
                    checkpoint.save(folder, state, step, settings, config.checkpoints_total_limit)
        _finish(project, family, state, settings)

    tenth = max(1, len(losses) // 10)
    return TrainSummary(
        run_folder=str(folder),
        lora=None if dry_run else str(folder / LORA_NAME),
        samples=len(shelf.samples),
        skipped=shelf.skipped,
        first_step=first,
        last_step=last,
        first_loss=fmean(losses[:tenth]) if losses else None,
        loss=fmean(losses[-tenth:]) if losses else None,
        trainable_parameters=trainable,
        device=str(device),
        seconds=time.monotonic() - start,
        dry_run=dry_run,
        warnings=project.warnings,
    )


def _load(project: Project, folder: Path, device: torch.device, steps: int) -> checkpoint.State:
    """Load, freeze, quantise, then adapt: in this order, or the adapter would be quantised as well."""
    config = project.trainer
    choose_attention()
    denoiser = family_of(project).load_denoiser(folder, _base_dtype(config), device).requires_grad_(False)
    quantize_base(denoiser, config.base_model_precision)
    parameters = add_lora(denoiser, project)
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

    Noise and dropout depend on the seed and the step's number alone. Raises UserError if the loss is not finite.
    """
    device = next(denoiser.parameters()).device
    generator = torch.Generator().manual_seed(seed_of(config.seed, "noise", step))
    torch.manual_seed(seed_of(config.seed, "dropout", step))
    total = 0.0
    for showings in turns:
        batch = shelf.load(showings, device)
        loss = step_loss(family, denoiser, batch, generator, config) / len(turns)
        if not torch.isfinite(loss):
            raise UserError(f"step {step}: the loss is {loss.item()}; samples: {', '.join(batch.sample_ids)}")
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.item()
    return total


def step_loss(
    family: Family, denoiser: nn.Module, batch: Batch, generator: torch.Generator, config: TrainerConfig
) -> Tensor:
    """Run one forward pass: draw time and noise, predict the velocity, compare on the target's tokens."""
    count, device = len(batch.sample_ids), batch.latents.device
    times = flow.draw_times(count, generator, config.flow_sigmoid_scale, config.flow_use_uniform_schedule)
    noise = torch.randn(batch.latents.shape, generator=generator).to(device)
    tokens = family.num_tokens(batch.latents.shape[1:])
    shift = flow.auto_shift(tokens) if config.flow_schedule_auto_shift else config.flow_schedule_shift or 1.0
    times = flow.shifted(times, shift).to(device)
    guidance = _guidance(count, generator, config).to(device) if family.takes_guidance(denoiser) else None
    noisy = flow.noised(batch.latents, noise, times)
    with _autocast(config, device):
        predicted = family.velocity(denoiser, noisy, batch.references, batch.text, times, guidance)
    return flow.loss(predicted, batch.latents, noise)


def _guidance(count: int, generator: torch.Generator, config: TrainerConfig) -> Tensor:
    if config.flux_guidance_mode == "constant":
        return torch.full((count,), config.flux_guidance_value)
    low, high = config.flux_guidance_min, config.flux_guidance_max
    return low + (high - low) * torch.rand(count, generator=generator)


def _base_dtype(config: TrainerConfig) -> torch.dtype:
    return dtype_of(config.base_model_default_dtype) if config.mixed_precision == "bf16" else torch.float32


def _autocast(config: TrainerConfig, device: torch.device) -> torch.autocast:
    """Run the float32 adapters in bfloat16.

    Not over quanto's kernels for float8 and four bits and less: they refuse the float32 that autocast makes of norms.
    """
    half = config.mixed_precision == "bf16" and config.base_model_precision in ("no_change", "int8-quanto")
    return torch.autocast(device.type, torch.bfloat16, enabled=half)


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


def _steps(project: Project, shelf: Shelf) -> int:
    config = project.trainer
    if config.max_train_steps or not config.num_train_epochs:
        return config.max_train_steps or DEFAULT_STEPS
    passes = sum(len(epoch_batches(project, shelf, epoch)) for epoch in range(config.num_train_epochs))
    return max(1, passes // config.gradient_accumulation_steps)


def _settings(project: Project, shelf: Shelf, weights: Path) -> dict[str, Any]:
    """Return what a run's numbers depend on: a resumed run must have the same."""
    options = {name: value for name, value in project.trainer.acting("train").items() if name not in _FREE_ON_RESUME}
    options["model_flavour"] = project.flavour
    return {
        **options,
        "samples": shelf.fingerprint(),
        "weights": fingerprint(project, weights, project.family.denoiser),
    }


def _finish(project: Project, family: Family, state: checkpoint.State, settings: dict[str, Any]) -> None:
    """Write the LoRA as pipelines load it, and what made it; nothing if both are there as they should be."""
    folder, layers = project.run_folder, lora_layers(state.denoiser)
    libraries = {name: version(name) for name in ("pairline", "torch", "diffusers", "transformers", "peft")}
    options = project.trainer.model_dump(mode="json")
    document = {"config": options, "versions": libraries, "samples": settings["samples"]}
    text = json.dumps(document, indent=2)
    record = folder / "settings.json"
    if not record.exists() or record.read_text() != text:
        with write_aside(record) as aside:
            aside.write_text(text)
    lora = folder / LORA_NAME
    if not lora.exists() or not _holds(lora, layers):
        family.save_lora(folder, layers, lora_metadata(state.denoiser))


def _holds(file: Path, layers: dict[str, Tensor]) -> bool:
    """Tell whether a LoRA file has these weights already."""
    try:
        stored = load_file(file)
    except (OSError, SafetensorError):
        return False
    names = {name: f"transformer.{name}" for name in layers}
    return stored.keys() == set(names.values()) and all(
        torch.equal(stored[names[name]], tensor.cpu()) for name, tensor in layers.items()
    )
