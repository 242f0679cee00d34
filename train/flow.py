"""Rectified flow: times, noising and loss. Pure functions of numbers, tensors and a generator.

With x data and e noise: x_t = (1 - t) x + t e, and the model learns the velocity e - x (Liu et al. 2022,
arXiv:2209.03003; Esser et al. 2024, arXiv:2403.03206). A new loss is a line in `LOSSES`.
"""

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

# FLUX's schedule: the log of the shift grows linearly with the number of target tokens (its scheduler_config.json).
_TOKENS = (256, 4096)
_LOG_SHIFT = (0.5, 1.15)
_LARGEST = 700  # exponent whose exponential is a number

# Times that schnell runs at in four steps; it sees pure noise most.
_FAST_TIMES = (1.0,) * 7 + (0.75, 0.5, 0.25)


def auto_shift(num_tokens: int) -> float:
    """Return the shift for a target of this many tokens; references and text do not count."""
    slope = (_LOG_SHIFT[1] - _LOG_SHIFT[0]) / (_TOKENS[1] - _TOKENS[0])
    return math.exp(_LOG_SHIFT[0] + slope * (num_tokens - _TOKENS[0]))


def shifted(times: Tensor, shift: float) -> Tensor:
    """Move times towards noise: t' = s t / (1 + (s - 1) t)."""
    return shift * times / (1 + (shift - 1) * times)


def sigmoid_time(rng: np.random.Generator, scale: float) -> float:
    """Draw sigmoid(scale × normal)."""
    drawn = scale * rng.standard_normal()
    return 1 / (1 + math.exp(-drawn)) if drawn > -_LARGEST else 0.0


def fast_time(rng: np.random.Generator) -> float:
    """Draw one of the times that schnell runs at."""
    return _FAST_TIMES[rng.integers(len(_FAST_TIMES))]


def per_sample(values: Tensor) -> Tensor:
    """Shape one number per sample so that it meets latents, B × C × H × W."""
    return values.view(-1, 1, 1, 1)


def noised(latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
    """Mix latents and noise, B × C × H × W, at one time per sample."""
    times = per_sample(times)
    return (1 - times) * latents + times * noise


def _l2(error: Tensor, _: float) -> Tensor:
    return error.square()


def _huber(error: Tensor, c: float) -> Tensor:
    return 2 * c * (torch.sqrt(error.square() + c * c) - c)


def _smooth_l1(error: Tensor, c: float) -> Tensor:
    return 2 * (torch.sqrt(error.square() + c * c) - c)


# Of each error. The two others are pseudo-Huber (Song & Dhariwal 2023, arXiv:2310.14189), scaled as in diffusers'
# examples: `huber` is the square for errors far below c, `smooth_l1` twice the absolute error for those far above.
LOSSES: Mapping[str, Callable[[Tensor, float], Tensor]] = {"l2": _l2, "huber": _huber, "smooth_l1": _smooth_l1}


def losses(predicted: Tensor, velocity: Tensor, kind: str = "l2", c: float = 1.0) -> Tensor:
    """Return each sample's mean loss of the predicted velocity, in float32."""
    return LOSSES[kind](predicted.float() - velocity.float(), c).flatten(1).mean(1)
