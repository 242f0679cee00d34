"""Frozen weights in fewer bits: by optimum-quanto, or by the layers of families/products.py, which compile.

A new precision is a line in `_QUANTO` or `_OWN`. Order matters: load, quantise, freeze, then adapt; an adapter that
is there already would be quantised as well.
"""

import re
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from optimum.quanto import freeze, qfloat8, qint2, qint4, qint8
from optimum.quanto.library.extensions.extension import _extensions
from optimum.quanto.nn import quantize_module
from optimum.quanto.tensor.weights import WeightQBitsTensor
from torch import Tensor, nn

from families.products import Float8Linear, Int8Linear, multiplies_float8
from schemas.errors import UserError, first_line


def _unpacked(packed: Tensor, bits: int) -> Tensor:
    """Take bytes apart into numbers of few bits, the lowest of all bytes first, as quanto packs them."""
    return torch.cat([(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)])


# quanto builds kernels of its own at their first use, for a minute, and fails where there is no compiler; its float8
# kernel for CUDA (Marlin) leaves the bias out besides (optimum-quanto 0.2.7, tensor/weights/marlin/fp8).
for _extension in _extensions.values():
    _extension._lib = SimpleNamespace(unpack=_unpacked)
_extensions.clear()  # of those that are there it would choose

_QUANTO = {"int8-quanto": qint8, "int4-quanto": qint4, "int2-quanto": qint2, "fp8-quanto": qfloat8}
_OWN: Mapping[str, type[Int8Linear] | type[Float8Linear]] = {"int8-torchao": Int8Linear, "fp8-torchao": Float8Linear}


def check_precision(precision: str, device: torch.device) -> None:
    """Raise UserError if a device cannot multiply what a precision makes of weights: float8 is tried both ways."""
    if _OWN.get(precision) is not Float8Linear:
        return
    wrong = _tried(device) if multiplies_float8(device) else "NVIDIA's Ada, Hopper and later can"
    if wrong is not None:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU"
        raise UserError(
            f"base_model_precision: {precision} multiplies in float8, which {name} cannot ({wrong}); set int8-quanto, "
            "or fp8-quanto, of which the weights alone are float8"
        )


def _tried(device: torch.device) -> str | None:
    """Multiply in float8 forwards and backwards; say what goes wrong, None if nothing does."""
    values = torch.ones(32, 32, device=device, dtype=torch.bfloat16, requires_grad=True)
    try:
        Float8Linear.of(nn.Linear(32, 32, device=device, dtype=torch.bfloat16))(values).sum().backward()
    except (RuntimeError, ValueError) as fault:
        return first_line(fault, 200)
    return None


def quantize_and_place(
    network: nn.Module, precision: str, spared: Sequence[str], device: torch.device, via: str, finer: str = "(?!)"
) -> nn.Module:
    """Quantise the linear layers of a frozen network on the CPU, but for those `spared`, and move it to `device`.

    Via `accelerator` each layer is moved, then quantised there, so that the device never holds all of them unquantised;
    via `cpu` it is quantised first. The two differ by rounding alone. Layers whose names match `finer`, a regular
    expression, are of int8 where others compute in float8.
    """
    names = () if precision == "no_change" else _linear_layers(network, spared)
    for name in names:  # looked up one by one: a reference kept would keep the unquantised weights too
        layer = network.get_submodule(name)
        own = "int8-torchao" if precision == "fp8-torchao" and re.fullmatch(finer, name) else precision
        quantised = _quantised(layer.to(device) if via == "accelerator" else layer, own)
        quantised = quantised if via == "accelerator" else quantised.to(device)
        _multiply_plainly(quantised)
        network.set_submodule(name, quantised)
    for name, module in network.named_modules():
        if name not in names:
            module._apply(lambda tensor: tensor.to(device), recurse=False)
    return network


def _multiply_plainly(layer: nn.Module) -> None:
    """Have a layer's weights of four bits dequantised and multiplied; where they stay.

    The kernel of PyTorch that quanto would use for them (TinyGemm) takes seven times as long on the thousands of tokens
    of a picture.
    """
    weight = getattr(layer, "weight", None)
    if isinstance(weight, WeightQBitsTensor) and type(weight) is not WeightQBitsTensor:
        layer.weight = nn.Parameter(weight.weight_qbits_tensor(), requires_grad=False)


def _linear_layers(network: nn.Module, spared: Sequence[str]) -> frozenset[str]:
    """Name the linear layers but for those that are spared; these are full names, no suffixes."""
    linear = {name for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    return frozenset(linear - set(spared))


def _quantised(layer: Any, precision: str) -> nn.Module:
    """Quantise and freeze one layer."""
    if precision in _OWN:
        return _told(_OWN[precision].of(layer), layer)
    quantised: nn.Module = quantize_module(layer, weights=_QUANTO[precision])
    freeze(quantised)
    weight: Any = quantised.weight
    if precision == "int8-quanto":  # its numbers, in a layer that compiles
        return _told(Int8Linear(weight._data, weight._scale.float(), layer.bias), layer)
    return quantised.requires_grad_(False)


def _told(quantised: nn.Module, layer: nn.Linear) -> nn.Module:
    """Tell peft the dtype to hold adapters in, which it takes for that of the weights: numbers of eight bits."""
    quantised.compute_dtype = layer.weight.dtype  # type: ignore[assignment]
    return quantised
