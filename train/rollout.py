"""Rollout: some samples meet the model's own error in training, as they do in sampling (scheduled sampling).

Such a sample is noised at a later time and the model itself brings it to its time in one Euler step; its target is the
velocity that leads from there to the picture. A new way to draw the offset is a line in `OFFSETS`.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from schemas.keys import seed_of
from schemas.trainer import TrainerConfig
from train import flow

_LEAST_TIME = 0.02  # earlier ones are not rolled out: the target divides by the time

# Of a uniform draw from [0, 1): the share of the largest offset.
OFFSETS: Mapping[str, Callable[[float], float]] = {
    "uniform": lambda u: u,
    "biased_early": lambda u: u * u,
    "biased_late": lambda u: 1 - (1 - u) ** 2,
}


def starts(times: Tensor, seeds: Sequence[int], step: int, config: TrainerConfig) -> Tensor | None:
    """Return where each sample's rollout starts, its own time where it has none; None if no sample has one.

    All on the host, where times are drawn: nothing waits for the accelerator.
    """
    share = _share(step, config)
    if not (share and config.scheduled_sampling_max_step_offset):
        return None
    offsets = [_offset(seed, share, config) for seed in seeds]
    later = (times + torch.tensor(offsets)).clamp(max=1)
    later = torch.where(times < _LEAST_TIME, times, later)
    return later if bool((later > times).any()) else None


@torch.no_grad()
def rolled_out(
    latents: Tensor, noise: Tensor, times: Tensor, later: Tensor, velocity: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Return noisy latents at `times` and the velocities to learn there.

    `velocity` is the model's, of noisy latents and times; samples for which both times are the same are as ever.
    """
    at_start = flow.noised(latents, noise, later)
    drifted = at_start + flow.per_sample(times - later) * velocity(at_start, later).float()
    rolled = flow.per_sample(later > times)
    aimed = (drifted - latents) / flow.per_sample(times.clamp(min=_LEAST_TIME))
    return (
        torch.where(rolled, drifted, flow.noised(latents, noise, times)),
        torch.where(rolled, aimed, noise - latents),
    )


def _share(step: int, config: TrainerConfig) -> float:
    """Return the probability with which a sample is rolled out in a step."""
    ramp, gone = config.scheduled_sampling_ramp_steps, step - config.scheduled_sampling_start_step
    if gone < 0:
        return 0.0
    if not ramp:
        return config.scheduled_sampling_probability
    done = min(1.0, gone / ramp)
    if config.scheduled_sampling_ramp_shape == "cosine":
        done = (1 - math.cos(math.pi * done)) / 2
    low, high = config.scheduled_sampling_prob_start, config.scheduled_sampling_prob_end
    return low + (high - low) * done


def _offset(seed: int, share: float, config: TrainerConfig) -> float:
    """Draw by how much later a sample starts; 0 if it is not rolled out."""
    rng = np.random.default_rng(seed_of(seed, "rollout"))
    chosen, drawn = rng.random(2)
    if chosen >= share:
        return 0.0
    most = config.scheduled_sampling_max_step_offset
    return (1 + int(OFFSETS[config.scheduled_sampling_strategy](drawn) * most)) / 1000
