"""Frozen base weights in fewer bits, by optimum-quanto: less memory, no speed-up.

Order matters: load, quantise, freeze, then add LoRA, which would be quantised as well otherwise.
"""

from optimum.quanto import freeze, qfloat8, qint2, qint4, qint8, quantize
from torch import nn

_WEIGHTS = {"int8-quanto": qint8, "int4-quanto": qint4, "int2-quanto": qint2, "fp8-quanto": qfloat8}

# First and last layers carry the picture itself and are small.
_SPARED = ["proj_out", "x_embedder", "context_embedder"]


def quantize_base(denoiser: nn.Module, precision: str) -> None:
    """Quantise a network's linear layers in place; `no_change` leaves it alone."""
    if precision == "no_change":
        return
    quantize(denoiser, weights=_WEIGHTS[precision], exclude=_SPARED)
    freeze(denoiser)
