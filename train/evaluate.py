"""The loss on pairs held out of training: the same noise and the same times every time, so that it can be compared.

It draws nothing, and leaves no trace in training. What it measures is in `evaluate`; a further number is a field of
`Evaluation`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

import torch
from torch import Tensor, nn

from families.protocol import Family
from families.runtime import evaluating
from schemas.trainer import TrainerConfig
from train import flow
from train.data import Batch
from train.step import drawn_guidance, sample_losses, shift_of

_QUANTILES = 4


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Mean squared error of the velocity, over pairs and times."""

    loss: float
    by_time: tuple[float, ...]  # means of quarters of the times, from the picture to noise

    def numbers(self) -> Mapping[str, float]:
        """Name the numbers as metrics.jsonl has them."""
        quarters = {f"eval_loss_q{number}": loss for number, loss in enumerate(self.by_time, 1)}
        return {"eval_loss": self.loss, **quarters}


@torch.no_grad()
def evaluate(
    family: Family,
    denoiser: nn.Module,
    batches: Iterable[Batch],
    config: TrainerConfig,
) -> Evaluation:
    """Measure the loss of batches of one held-out pair each, at `eval_timesteps` times."""
    losses: list[list[float]] = []  # of each showing, by time
    with evaluating(denoiser):
        for batch in batches:
            device = batch.latents.device
            grid = times_of(family.num_tokens(batch.latents.shape[1:]), config)
            guidance = drawn_guidance(batch, config).to(device) if family.takes_guidance(denoiser) else None
            losses.append(
                [
                    sample_losses(family, denoiser, batch, time[None].to(device), guidance, config).item()
                    for time in grid
                ]
            )
    by_time = [fmean(column) for column in zip(*losses, strict=True)]
    edges = [round(len(by_time) * part / _QUANTILES) for part in range(_QUANTILES + 1)]
    quarters = [by_time[low:high] for low, high in pairwise(edges) if low < high]
    return Evaluation(fmean(by_time), tuple(map(fmean, quarters)))


def times_of(num_tokens: int, config: TrainerConfig) -> Tensor:
    """Return the middles of `eval_timesteps` equal parts of (0, 1), shifted as training shifts them."""
    middles = (torch.arange(config.eval_timesteps, dtype=torch.float32) + 0.5) / config.eval_timesteps
    return flow.shifted(middles, shift_of(num_tokens, config))
