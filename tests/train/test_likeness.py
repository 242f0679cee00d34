"""The measures are those that the literature means."""

import math

import numpy as np
import pytest
import torch

from train.likeness import MOST_DB, psnr, ssim


def _pictures(height: int = 40, width: int = 56) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(0)
    one = np.clip(np.cumsum(rng.normal(0, 6, (height, width, 3)), 1) + 128, 0, 255).astype(np.uint8)
    other = np.clip(one + rng.normal(0, 12, one.shape), 0, 255).astype(np.uint8)
    return torch.from_numpy(one), torch.from_numpy(other)


def test_equal_pictures_are_alike_entirely() -> None:
    one, _ = _pictures()
    assert psnr(one, one) == MOST_DB == 100 and ssim(one, one) == pytest.approx(1, abs=1e-12)


def test_psnr_of_a_known_error() -> None:
    black = torch.zeros(16, 16, 3, dtype=torch.uint8)
    assert psnr(black, black + 255) == 0
    assert psnr(black, black + 1) == pytest.approx(20 * math.log10(255))  # 48.13 dB
    half = black.clone()
    half[:8] = 10
    assert psnr(half, black) == pytest.approx(10 * math.log10(255**2 / 50))


def test_ssim_of_flat_pictures_is_its_luminance_term() -> None:
    low, high = (torch.full((16, 16, 3), value, dtype=torch.uint8) for value in (100, 150))
    c1 = 2.55**2
    assert ssim(low, high) == pytest.approx((2 * 100 * 150 + c1) / (100**2 + 150**2 + c1))


def test_both_equal_those_of_scikit_image() -> None:
    metrics = pytest.importorskip("skimage.metrics")
    one, other = _pictures()
    assert psnr(one, other) == pytest.approx(metrics.peak_signal_noise_ratio(one.numpy(), other.numpy()), rel=1e-12)
    expected = metrics.structural_similarity(
        one.numpy(), other.numpy(), channel_axis=2, data_range=255,
        gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
    )  # fmt: skip
    assert ssim(one, other) == pytest.approx(expected, rel=1e-9) and 0.1 < expected < 0.95
    assert ssim(one[:11, :11], other[:11, :11]) < 1  # the smallest
