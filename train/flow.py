"""Rectified flow: times, noising, target and loss. Pure functions of tensors and a generator.

With x data and e noise: x_t = (1 - t) x + t e, and the model learns the velocity e - x (Liu et al. 2022,
arXiv:2209.03003; Esser et al. 2024, arXiv:2403.03206).
"""

import math

import numpy as np
from torch import Tensor

# FLUX's schedule: the log of the shift grows linearly with the number of target tokens (its scheduler_config.json).
_TOKENS = (256, 4096)
_LOG_SHIFT = (0.5, 1.15)


def auto_shift(num_tokens: int) -> float:
    """Return the shift for a target of this many tokens; references and text do not count."""
    slope = (_LOG_SHIFT[1] - _LOG_SHIFT[0]) / (_TOKENS[1] - _TOKENS[0])
    return math.exp(_LOG_SHIFT[0] + slope * (num_tokens - _TOKENS[0]))


def shifted(times: Tensor, shift: float) -> Tensor:
    """Move times towards noise: t' = s t / (1 + (s - 1) t)."""
    return shift * times / (1 + (shift - 1) * times)


def draw_time(rng: np.random.Generator, scale: float, uniform: bool) -> float:
    """Draw a time in (0, 1): sigmoid(scale × normal), or uniform."""
    return float(rng.uniform()) if uniform else 1 / (1 + math.exp(-scale * rng.standard_normal()))


def noised(latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
    """Mix latents and noise, B × C × H × W, at one time per sample."""
    times = times.view(-1, 1, 1, 1)
    return (1 - times) * latents + times * noise


def loss(predicted: Tensor, latents: Tensor, noise: Tensor) -> Tensor:
    """Return the mean squared error of the velocity in float32: over each sample, then over the batch."""
    error = predicted.float() - (noise.float() - latents.float())
    return error.square().flatten(1).mean(1).mean()
