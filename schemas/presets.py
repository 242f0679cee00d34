"""Chains that have a name: published degradations as data, each with where its numbers come from.

A new one is an entry in `PRESETS` and its name in `PresetName`. Rows spell out the steps, so a changed preset makes
anew what it made. docs/degradations.md says in what each differs from its source.
"""

from collections.abc import Mapping
from typing import Any, Literal

PresetName = Literal["realesrgan-like", "old-photo", "web-jpeg", "denoise", "deblur"]

_ANY = ["area", "bilinear", "bicubic"]
_TURNED = {"angle": [-180, 180]}


def _mixed_kernels(sigma: list[float]) -> dict[str, Any]:
    """Return kernel_list, kernel_prob, sinc_prob and the ranges of β as the options file and BasicSR have them.

    BasicSR draws β below 1 and above 1 alike often; for plateaus, whose range starts at 1, half of all are 1.
    """
    iso = {"step": "blur", "sigma": sigma, "size": [7, 21]}
    aniso = {**iso, "sigma_y": sigma, **_TURNED}
    choices: list[tuple[float, dict[str, Any]]] = [
        (0.9 * 0.45, {**iso, "kernel": "gaussian"}),
        (0.9 * 0.25, {**aniso, "kernel": "anisotropic"}),
        (0.9 * 0.06, {**iso, "kernel": "generalized_gaussian", "beta": [0.5, 1]}),
        (0.9 * 0.06, {**iso, "kernel": "generalized_gaussian", "beta": [1, 4]}),
        (0.9 * 0.015, {**aniso, "kernel": "generalized_gaussian", "beta": [0.5, 1]}),
        (0.9 * 0.015, {**aniso, "kernel": "generalized_gaussian", "beta": [1, 4]}),
        (0.9 * 0.06, {**iso, "kernel": "plateau", "beta": 1}),
        (0.9 * 0.06, {**iso, "kernel": "plateau", "beta": [1, 2]}),
        (0.9 * 0.015, {**aniso, "kernel": "plateau", "beta": 1}),
        (0.9 * 0.015, {**aniso, "kernel": "plateau", "beta": [1, 2]}),
        (0.1 * 3 / 8, {"step": "blur", "kernel": "sinc", "cutoff": [1.0472, 3.1416], "size": [7, 11]}),
        (0.1 * 5 / 8, {"step": "blur", "kernel": "sinc", "cutoff": [0.62832, 3.1416], "size": [13, 21]}),
    ]
    return {
        "step": "one_of",
        "weights": [round(weight, 6) for weight, _ in choices],
        "steps": [step for _, step in choices],
    }


def _resized(factors: list[Any], weights: list[float], inside: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the draw of up, down or keep, with what happens at that size."""
    one = {"step": "resize", "kernel": _ANY, "kernel_back": _ANY, "steps": inside}
    return {"step": "one_of", "weights": weights, "steps": [{**one, "factor": factor} for factor in factors]}


def _gaussian_or_poisson(sigma: list[float], scale: list[float]) -> dict[str, Any]:
    noise = {"step": "noise", "gray_probability": 0.4}
    return {
        "step": "one_of",
        "weights": [0.5, 0.5],
        "steps": [{**noise, "kind": "gaussian", "sigma": sigma}, {**noise, "kind": "poisson", "scale": scale}],
    }


_JPEG = {"step": "jpeg", "quality": [30, 95]}
_SINC = {"step": "blur", "kernel": "sinc", "cutoff": [1.0472, 3.1416], "size": [7, 21], "probability": 0.8}
_QUARTER = {"step": "resize", "factor": 0.25, "kernel": _ANY, "kernel_back": "bicubic"}
# Up, down, keep of the second process, at a quarter of the size.
_SECOND = ([[0.25, 0.3], [0.075, 0.25], 0.25], [0.3, 0.4, 0.3])

# Wang, Xie, Dong, Shan: Real-ESRGAN, ICCVW 2021, https://arxiv.org/abs/2107.10833; numbers of
# options/finetune_realesrgan_x4plus.yml, order of realesrgan/models/realesrgan_model.py
_REALESRGAN: list[dict[str, Any]] = [
    _mixed_kernels([0.2, 3]),
    _resized([[1, 1.5], [0.15, 1], 1], [0.2, 0.7, 0.1], [_gaussian_or_poisson([1, 30], [0.05, 3]), _JPEG]),
    {**_mixed_kernels([0.2, 1.5]), "probability": 0.8},
    {
        "step": "one_of",
        "steps": [
            {
                "step": "sequence",
                "steps": [
                    _resized(*_SECOND, [_gaussian_or_poisson([1, 25], [0.05, 2.5])]),
                    {**_QUARTER, "steps": [_SINC, _JPEG]},
                ],
            },
            {
                "step": "sequence",
                "steps": [
                    _resized(*_SECOND, [_gaussian_or_poisson([1, 25], [0.05, 2.5]), _JPEG]),
                    {**_QUARTER, "steps": [_SINC]},
                ],
            },
        ],
    },
]

# Wan et al.: Bringing Old Photos Back to Life, CVPR 2020, https://arxiv.org/abs/2004.09484; the shuffled part is
# online_add_degradation_v2 of Global/data/online_dataset_for_old_photos.py, what comes before is ours.
_OLD_PHOTO: list[dict[str, Any]] = [
    {
        "step": "one_of",
        "weights": [0.3, 0.4, 0.3],
        "steps": [
            {"step": "grayscale"},
            {"step": "sepia", "strength": [0.3, 1]},
            {"step": "color_cast", "red": [0.95, 1.15], "green": [0.9, 1.05], "blue": [0.7, 0.95]},
        ],
    },
    {"step": "fade", "contrast": [0.5, 0.9], "lift": [10, 60], "probability": 0.7},
    {"step": "scratches", "count": [1, 8], "probability": 0.4},
    {"step": "dust", "density": [20, 200], "probability": 0.5},
    {
        "step": "shuffle",
        "steps": [
            {"step": "blur", "kernel": "gaussian", "sigma": [1, 5], "size": [3, 7], "probability": 0.7},
            {
                "step": "one_of",
                "probability": 0.7,
                "steps": [
                    {"step": "noise", "kind": "gaussian", "sigma": [5, 50]},
                    {"step": "noise", "kind": "speckle", "sigma": [5, 50]},
                    {"step": "noise", "kind": "salt_pepper", "amount": [0, 0.01], "salt": [0.3, 0.8]},
                ],
            },
            {
                "step": "resize",
                "factor": [0.5, 1],
                "kernel": "bicubic",
                "kernel_back": ["nearest", "bilinear"],
                "probability": 0.7,
            },
            {"step": "jpeg", "quality": [40, 100], "probability": 0.7},
        ],
    },
]

# Jiang, Zhang, Timofte: Towards Flexible Blind JPEG Artifacts Removal (FBCNN), ICCV 2021,
# https://arxiv.org/abs/2109.14573; its data/dataset_jpeggraydouble.py: qualities 5 to 95, half of the time twice with
# unaligned blocks. Here the first lies in a scaled picture, as on sites that show previews, which unaligns them.
_WEB_JPEG: list[dict[str, Any]] = [
    {
        "step": "resize",
        "factor": [0.5, 1],
        "kernel": "area",
        "kernel_back": ["bilinear", "bicubic"],
        "probability": 0.5,
        "steps": [{"step": "jpeg", "quality": [5, 95]}],
    },
    {"step": "jpeg", "quality": [5, 95], "subsampling": ["4:2:0", "4:4:4"]},
]

# Zhang et al.: Beyond a Gaussian Denoiser (DnCNN), TIP 2017, https://arxiv.org/abs/1608.03981: CDnCNN-B, blind, σ from
# 0 to 55.
_DENOISE: list[dict[str, Any]] = [{"step": "noise", "kind": "gaussian", "sigma": [0, 55]}]

# Sun, Cao, Xu, Ponce: Learning a Convolutional Neural Network for Non-uniform Motion Blur Removal, CVPR 2015,
# https://arxiv.org/abs/1503.00593: straight kernels of length 1 to 25 in all directions.
_DEBLUR: list[dict[str, Any]] = [
    {"step": "blur", "kernel": "motion", "length": [1, 25], "angle": [0, 180]},
    {"step": "noise", "kind": "gaussian", "sigma": [0, 2.55]},
]

PRESETS: Mapping[str, list[dict[str, Any]]] = {
    "realesrgan-like": _REALESRGAN,
    "old-photo": _OLD_PHOTO,
    "web-jpeg": _WEB_JPEG,
    "denoise": _DENOISE,
    "deblur": _DEBLUR,
}
