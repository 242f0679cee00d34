"""How like two pictures are: PSNR and SSIM of uint8 pixels, height × width × 3.

A new measure is a function of two such tensors.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

MOST_DB = 100.0  # that is said of equal pictures, whose PSNR is infinite

_PEAK = 255.0
_RADIUS, _SIGMA = 5, 1.5  # of SSIM's window: 11 × 11
_C1, _C2 = (0.01 * _PEAK) ** 2, (0.03 * _PEAK) ** 2


def psnr(picture: Tensor, truth: Tensor) -> float:
    """Return the peak signal-to-noise ratio in dB: 10 log10(peak² / mean squared error)."""
    error = (picture.double() - truth.double()).square().mean().item()
    return min(MOST_DB, 10 * math.log10(_PEAK**2 / error)) if error else MOST_DB


def ssim(picture: Tensor, truth: Tensor) -> float:
    """Return the structural similarity, 1 for equal pictures: the mean over channels and windows inside the picture.

    As defined by Wang et al. 2004 (doi:10.1109/TIP.2003.819861) with a Gaussian window; sides are 11 pixels at least.
    """
    one, other = (pixels.double().permute(2, 0, 1).unsqueeze(1) for pixels in (picture, truth))  # 3 × 1 × H × W
    mean, mean_other = _blurred(one), _blurred(other)
    variance, variance_other = _blurred(one * one) - mean**2, _blurred(other * other) - mean_other**2
    covariance = _blurred(one * other) - mean * mean_other
    likeness = ((2 * mean * mean_other + _C1) * (2 * covariance + _C2)) / (
        (mean**2 + mean_other**2 + _C1) * (variance + variance_other + _C2)
    )
    return likeness.mean().item()


def _blurred(maps: Tensor) -> Tensor:
    """Weigh with the Gaussian window wherever it fits."""
    offsets = torch.arange(-_RADIUS, _RADIUS + 1, dtype=maps.dtype, device=maps.device)
    window = torch.softmax(-offsets.square() / (2 * _SIGMA**2), 0)
    return functional.conv2d(functional.conv2d(maps, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))
