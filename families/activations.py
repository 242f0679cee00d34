"""GELU as its tanh approximation has it, computed by a sigmoid: the same function, in fewer operations.

In the kernels that compilers make tanh is a library's function with two branches, a sigmoid one exponential.
"""

import math

import torch
from diffusers.models.activations import GELU
from torch import Tensor, nn

_SLOPE = 2 * math.sqrt(2 / math.pi)
_CUBE = 0.044715  # Hendrycks and Gimpel, arXiv:1606.08415


def gelu_tanh(values: Tensor) -> Tensor:
    """Return `gelu(values, approximate="tanh")`, for 1 + tanh(u) is 2 sigmoid(2u); in float32 inside, any shape."""
    exact = values.float()
    together: Tensor = exact * torch.sigmoid(_SLOPE * (exact + _CUBE * exact * exact * exact))
    return together.to(values.dtype)


class _Gelu(nn.GELU):
    def forward(self, values: Tensor) -> Tensor:
        return gelu_tanh(values)


class _ProjectedGelu(GELU):  # type: ignore[misc]
    """That of diffusers' feed-forward layers, which projects first."""

    def gelu(self, gate: Tensor) -> Tensor:
        return gelu_tanh(gate)


def use_sigmoid(denoiser: nn.Module) -> None:
    """Have every GELU by tanh computed by a sigmoid; worth it where blocks are compiled, slower where they are not."""
    instead = {nn.GELU: _Gelu, GELU: _ProjectedGelu}
    for module in denoiser.modules():
        if type(module) in instead and module.approximate == "tanh":
            module.__class__ = instead[type(module)]
