"""Frozen weights in fewer bits, by optimum-quanto: less memory, no speed-up.

Order matters: load, quantise, freeze, then add LoRA, which would be quantised as well otherwise.
"""

from collections.abc import Sequence

from optimum.quanto import freeze, qfloat8, qint2, qint4, qint8, quantize
from torch import nn

_WEIGHTS = {"int8-quanto": qint8, "int4-quanto": qint4, "int2-quanto": qint2, "fp8-quanto": qfloat8}


def quantize_weights(network: nn.Module, precision: str, spared: Sequence[str] = ()) -> None:
    """Quantise a network's linear layers in place, but for those `spared`; `no_change` leaves it alone."""
    if precision == "no_change":
        return
    quantize(network, weights=_WEIGHTS[precision], exclude=list(spared))
    freeze(network)
