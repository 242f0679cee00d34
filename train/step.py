"""One forward pass of training: time, noise, prediction, loss.

Every draw comes from the seeds of the showings, so that batch size, accumulation and processes change none. A new
way to draw times is a line in `TIMES`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from families.protocol import Family
from families.routing import Routing
from families.runtime import dtype_of, evaluating, sent
from schemas.keys import seed_of
from schemas.trainer import TrainerConfig
from train import flow, rollout
from train.data import Batch


@dataclass(frozen=True, slots=True)
class Times:
    """A way to draw times, and the option that chooses it."""

    option: str
    draw: Callable[[np.random.Generator, TrainerConfig], float]


# Besides the usual one, sigmoid; a configuration chooses one at most.
TIMES = (
    Times("flow_use_uniform_schedule", lambda rng, _: rng.uniform()),
    Times(
        "flow_use_beta_schedule", lambda rng, one: rng.beta(one.flow_beta_schedule_alpha, one.flow_beta_schedule_beta)
    ),
    Times("flux_fast_schedule", lambda rng, _: flow.fast_time(rng)),
)
_USUAL = Times("", lambda rng, one: flow.sigmoid_time(rng, one.flow_sigmoid_scale))


def step_loss(
    family: Family, denoiser: nn.Module, batch: Batch, step: int, config: TrainerConfig, routing: Routing | None = None
) -> Tensor:
    """Predict the velocity at a drawn time and compare on the target's tokens; `step` counts from 1.

    `routing` is of `tread_config`; its backward pass must come before the next call.
    """
    num_tokens = family.num_tokens(batch.latents.shape[1:])
    device, drawn = batch.latents.device, drawn_times(batch, num_tokens, config)
    times, later = sent(drawn, device), rollout.starts(drawn, batch.seeds, step, config)
    guidance = sent(drawn_guidance(batch, config), device) if family.takes_guidance(denoiser) else None

    def predict(noisy: Tensor, at: Tensor) -> Tensor:
        return predicted(family, denoiser, batch, (noisy, at, guidance), config)

    if later is None:
        noisy, velocity = flow.noised(batch.latents, batch.noise, times), batch.noise - batch.latents
    else:
        with evaluating(denoiser):
            noisy, velocity = rollout.rolled_out(batch.latents, batch.noise, times, sent(later, device), predict)
    if routing is not None:
        routing.choose(batch.seeds[0], num_tokens, batch.text.embed.shape[1], device)
    return flow.losses(predict(noisy, times), velocity, config.loss_type, config.huber_c).mean()


def sample_losses(
    family: Family, denoiser: nn.Module, batch: Batch, times: Tensor, guidance: Tensor | None, config: TrainerConfig
) -> Tensor:
    """Return each sample's squared error at given times, whatever loss, routes and rollouts training has."""
    noisy = flow.noised(batch.latents, batch.noise, times)
    found = predicted(family, denoiser, batch, (noisy, times, guidance), config)
    return flow.losses(found, batch.noise - batch.latents)


def predicted(
    family: Family,
    denoiser: nn.Module,
    batch: Batch,
    at: tuple[Tensor, Tensor, Tensor | None],
    config: TrainerConfig,
) -> Tensor:
    """Predict the velocity of a batch `at` noisy latents, times and guidance, in the dtype of computation."""
    noisy, times, guidance = at
    with autocast(config, noisy.device):
        return family.velocity(denoiser, noisy, batch.references, batch.text, times, guidance)


def drawn_times(batch: Batch, num_tokens: int, config: TrainerConfig) -> Tensor:
    """Draw one time per sample, shifted by the number of the target's tokens."""
    chosen = next((one for one in TIMES if getattr(config, one.option)), _USUAL)
    drawn = torch.tensor([chosen.draw(_rng(seed, "time"), config) for seed in batch.seeds], dtype=torch.float32)
    return flow.shifted(drawn, shift_of(num_tokens, config))


def shift_of(num_tokens: int, config: TrainerConfig) -> float:
    """Return how far times are moved towards noise, for a target of this many tokens."""
    if config.flux_fast_schedule:
        return 1.0
    return flow.auto_shift(num_tokens) if config.flow_schedule_auto_shift else config.flow_schedule_shift or 1.0


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


def in_half(config: TrainerConfig) -> bool:
    """Tell whether the network computes in bfloat16: not on quantised weights of float32, which cannot be cast."""
    exact = config.base_model_precision != "no_change" and base_dtype(config) == torch.float32
    return config.mixed_precision == "bf16" and not exact


def autocast(config: TrainerConfig, device: torch.device) -> torch.autocast:
    """Run the float32 adapters in bfloat16, where the network does."""
    return torch.autocast(device.type, torch.bfloat16, enabled=in_half(config))


def _rng(seed: int, stage: str) -> np.random.Generator:
    return np.random.default_rng(seed_of(seed, stage))
