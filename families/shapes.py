"""Networks by their shapes alone: without memory, or with random weights; nothing is downloaded.

Its configuration is that of the project's checkpoint where it is on this machine, else of its flavour as published.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from families.checkpoints import denoiser_config
from families.protocol import Family
from families.runtime import family_of
from schemas.project import TINY, Project

META = torch.device("meta")
_SCALE = 0.02  # deviation of random weights
_DRAWN = 1 << 22  # numbers that are drawn; weights are made of them, which is quicker than to draw each


def config_of(project: Project) -> Mapping[str, Any]:
    """Return the configuration of a project's denoiser."""
    if (found := denoiser_config(project)) is not None:
        return found
    return family_of(project).denoiser_config(project.flavour, tiny=project.checkpoint == TINY)


def shaped_denoiser(family: Family, config: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    """Make a frozen network without memory."""
    with META:
        return family.build_denoiser(config).to(dtype).requires_grad_(False)


def random_denoiser(family: Family, config: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Make a frozen network of random weights on a device: scales of norms are 1, biases 0."""
    network = shaped_denoiser(family, config, dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    drawn = (torch.randn(_DRAWN, generator=generator, device=device) * _SCALE).to(dtype)
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1:
            _fill(parameter.data.view(-1), drawn)
        else:
            parameter.data.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return network


def _fill(values: Tensor, drawn: Tensor) -> None:
    """Repeat what was drawn, begun at a place that differs from tensor to tensor."""
    begun = drawn.roll(values.numel() % 1009)
    for first in range(0, values.numel(), drawn.numel()):
        part = values[first : first + drawn.numel()]
        part.copy_(begun[: part.numel()])
