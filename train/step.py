"""One forward pass of training: time, noise, prediction, loss.

Every draw comes from the seeds of the showings, so that batch size, accumulation and processes change none. A new
way to draw times is a line in `flow.TIMES`.
"""

import numpy as np
import torch
from torch import Tensor, nn

from families.protocol import Family
from families.runtime import dtype_of
from schemas.keys import seed_of
from schemas.trainer import TrainerConfig
from train import flow
from train.data import Batch


def step_loss(family: Family, denoiser: nn.Module, batch: Batch, step: int, config: TrainerConfig) -> Tensor:
    """Predict the velocity at a drawn time and compare on the target's tokens; `step` counts from 1."""
    device = batch.latents.device
    times = drawn_times(batch, family.num_tokens(batch.latents.shape[1:]), config).to(device)
    guidance = drawn_guidance(batch, config).to(device) if family.takes_guidance(denoiser) else None
    noisy = flow.noised(batch.latents, batch.noise, times)
    with autocast(config, device):
        predicted = family.velocity(denoiser, noisy, batch.references, batch.text, times, guidance)
    return flow.loss(predicted, batch.latents, batch.noise)


def drawn_times(batch: Batch, num_tokens: int, config: TrainerConfig) -> Tensor:
    """Draw one time per sample, shifted by the number of the target's tokens."""
    drawn = [
        flow.draw_time(_rng(seed, "time"), config.flow_sigmoid_scale, config.flow_use_uniform_schedule)
        for seed in batch.seeds
    ]
    shift = flow.auto_shift(num_tokens) if config.flow_schedule_auto_shift else config.flow_schedule_shift or 1.0
    return flow.shifted(torch.tensor(drawn, dtype=torch.float32), shift)


def drawn_guidance(batch: Batch, config: TrainerConfig) -> Tensor:
    """Return the guidance that each sample is told."""
    if config.flux_guidance_mode == "constant":
        return torch.full((len(batch.seeds),), config.flux_guidance_value)
    low, high = config.flux_guidance_min, config.flux_guidance_max
    drawn = [_rng(seed, "guidance").uniform(low, high) for seed in batch.seeds]
    return torch.tensor(drawn, dtype=torch.float32)


def base_dtype(config: TrainerConfig) -> torch.dtype:
    """Return the dtype of frozen weights that are not quantised."""
    return dtype_of(config.base_model_default_dtype) if config.mixed_precision == "bf16" else torch.float32


def autocast(config: TrainerConfig, device: torch.device) -> torch.autocast:
    """Run the float32 adapters in bfloat16.

    Not over quanto's kernels for float8 and four bits and less: they refuse the float32 that autocast makes of norms.
    """
    half = config.mixed_precision == "bf16" and config.base_model_precision in ("no_change", "int8-quanto")
    return torch.autocast(device.type, torch.bfloat16, enabled=half)


def _rng(seed: int, stage: str) -> np.random.Generator:
    return np.random.default_rng(seed_of(seed, stage))
