"""What of a VAE's posterior is stored: its mean, one draw of it, or mean and standard deviation.

`chosen` is the one function; a draw depends on the latent's key alone, not on batch, device or order.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from families.protocol import Posterior
from schemas.keys import seed_of
from schemas.trainer import Posterior as Choice


def chosen(posterior: Posterior, keys: Sequence[str], choice: Choice) -> Tensor:
    """Return the latents to be stored, one for each key: batch × C × H × W, of `moments` 2C, the means first."""
    if choice == "mode":
        return posterior.mean
    if choice == "moments":
        return torch.cat([posterior.mean, posterior.std], dim=1)
    noise = torch.stack([_noise(key, posterior.mean[0].shape) for key in keys])
    return posterior.mean.to("cpu", torch.float32) + posterior.std.to("cpu", torch.float32) * noise


def _noise(key: str, shape: torch.Size) -> Tensor:
    generator = torch.Generator().manual_seed(seed_of("posterior", key))
    return torch.randn(shape, generator=generator, dtype=torch.float32)
