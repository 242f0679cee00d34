"""`train run`, read top to bottom: load, freeze, adapt, then one step after the other.

`run` is the public function. Maths is in flow.py, what is shown when in data.py, the model in its family's module.
"""

import itertools
import json
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from families import Source, open_project
from families.checkpoints import image_encoder_key, locate, text_encoder_key
from families.protocol import Family
from families.runtime import choose_attention, default_device, dtype_of, family_of, quiet
from schemas.console import progress
from schemas.errors import UserError
from schemas.keys import digest, seed_of
from schemas.options import facts_of
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

# Options that may differ between a checkpoint and the run that resumes it.
_FREE_ON_RESUME = {
    "max_train_steps", "num_train_epochs", "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint",
    "output_dir", "tracker_run_name", "gradient_checkpointing",
}  # fmt: skip


def run(
    project: Source, *, limit: int | None = None, workers: int | None = None, dry_run: bool = False
) -> TrainSummary:
    """Train a LoRA on the cached pairs of a project and write it to the run folder.

    Resumes where an earlier run stopped. `limit` stops after N steps of this run, `workers` is the number of CPU
    threads. Raises UserError before the first step if anything is missing, stale or damaged, and at the step where the
    loss is not finite.
    """
    start = time.monotonic()
    project = open_project(project)
    config, device = project.trainer, default_device()
    quiet()
    choose_attention()
    family = family_of(project)
    torch.set_num_threads(workers or torch.get_num_threads())

    # What is trained on: every latent and embed is there, or the run ends here.
    folder = locate(project, (*project.family.denoiser, *project.family.image_encoder, *project.family.text_encoders))
    shelf = Shelf(project, image_encoder_key(project, folder), text_encoder_key(project, folder))
    steps = _steps(project, shelf)
    settings = _settings(project, shelf)
    resumed = checkpoint.chosen(project.run_folder, config.resume_from_checkpoint, project.root)

    # What is trained, then the state of an earlier run, if there is one.
    state = _load(project, folder, device, steps)
    first = checkpoint.load(resumed, state, settings) if resumed is not None else 0
    last = max(first, min(steps, first + limit) if limit is not None else steps)

    losses: list[float] = []
    if not dry_run:
        _write_settings(project, settings)
        stream = itertools.islice(batches(project, shelf), first * config.gradient_accumulation_steps, None)
        with Metrics(project.run_folder, first) as metrics, progress("train", last, "step", done=first) as bar:
            for step in range(first + 1, last + 1):
                began = time.monotonic()
                turns = list(itertools.islice(stream, config.gradient_accumulation_steps))
                loss = _accumulate(family, state.denoiser, shelf, [showings for _, showings in turns], step, config)
                if step == first + 1:
                    _check_gradients(state.denoiser)
                norm = nn.utils.clip_grad_norm_(state.parameters, config.max_grad_norm or float("inf"))
                rate = state.schedule.get_last_lr()[0]
                state.optimizer.step()
                state.schedule.step()
                state.optimizer.zero_grad(set_to_none=True)

                losses.append(loss)
                seconds = time.monotonic() - began
                metrics.write(step=step, epoch=turns[-1][0], loss=loss, lr=rate, grad_norm=norm.item(), seconds=seconds)
                bar.set_postfix_str(f"loss {loss:.4f}, lr {rate:.2e}, {seconds:.2f} s/step")
                bar.update()
                if step == last or (config.checkpointing_steps and step % config.checkpointing_steps == 0):
                    checkpoint.save(project.run_folder, state, step, settings, config.checkpoints_total_limit)
        family.save_lora(project.run_folder, lora_layers(state.denoiser), lora_metadata(state.denoiser))

    tenth = max(1, len(losses) // 10)
    return TrainSummary(
        run_folder=str(project.run_folder),
        lora=None if dry_run else str(project.run_folder / "pytorch_lora_weights.safetensors"),
        samples=len(shelf.samples),
        skipped=shelf.skipped,
        first_step=first,
        last_step=last,
        first_loss=fmean(losses[:tenth]) if losses else None,
        loss=fmean(losses[-tenth:]) if losses else None,
        trainable_parameters=sum(parameter.numel() for parameter in state.parameters),
        device=str(device),
        seconds=time.monotonic() - start,
        dry_run=dry_run,
        warnings=project.warnings,
    )


def _load(project: Project, folder: Path, device: torch.device, steps: int) -> checkpoint.State:
    """Load, freeze, quantise, then adapt: in this order, or the adapter would be quantised as well."""
    config = project.trainer
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
    shift = flow.auto_shift(tokens) if config.flow_schedule_auto_shift else config.flow_schedule_shift
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


def _steps(project: Project, shelf: Shelf) -> int:
    config = project.trainer
    if config.max_train_steps:
        return config.max_train_steps
    passes = sum(len(epoch_batches(project, shelf, epoch)) for epoch in range(config.num_train_epochs))
    return max(1, passes // config.gradient_accumulation_steps)


def _settings(project: Project, shelf: Shelf) -> dict[str, Any]:
    """Return what a run's numbers depend on: a resumed run must have the same."""
    options = project.trainer.model_dump(mode="json", exclude=_FREE_ON_RESUME)
    reading = {name for name, facts in facts_of(TrainerConfig) if "train" in facts["stages"]}
    samples = digest(
        [
            [one.sample_id, one.target.key, [image.key for image, _ in one.references], one.prompts, one.repeats]
            for one in shelf.samples
        ]
    )
    return {**{name: options[name] for name in sorted(reading & options.keys())}, "samples": samples}


def _write_settings(project: Project, settings: dict[str, Any]) -> None:
    """Leave the resolved configuration and the versions that ran it beside the weights."""
    libraries = {name: version(name) for name in ("pairline", "torch", "diffusers", "transformers", "peft")}
    document = {
        "config": project.trainer.model_dump(mode="json"),
        "samples": settings["samples"],
        "versions": libraries,
    }
    with write_aside(project.run_folder / "settings.json") as aside:
        aside.write_text(json.dumps(document, indent=2))


def _check_gradients(denoiser: nn.Module) -> None:
    """Refuse to train weights that receive no gradient: some quantised layers lose it in silence."""
    named = [(name, one) for name, one in denoiser.named_parameters() if one.requires_grad]
    without = [name for name, parameter in named if parameter.grad is None]
    if without:
        raise UserError(
            f"{len(without)} of {len(named)} LoRA tensors receive no gradient, first {without[0]}; "
            "choose another base_model_precision or flux_lora_target"
        )
