"""Frozen linear layers in eight bits that compile: of int8 the weights alone, of float8 the products too.

`joined` makes one layer of several that read the same input, plain ones as well. Another kind is a class beside these.
"""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

FLOAT8 = torch.float8_e4m3fn
_LARGEST8 = torch.finfo(FLOAT8).max
_LARGEST_INT8 = 127
_LEAST = torch.finfo(torch.float32).tiny  # of a scale: rows of zeros have one, too
_LEAST_CAPABILITY = (8, 9)  # of a CUDA device that multiplies float8


def multiplies_float8(device: torch.device) -> bool:
    """Tell whether a device has products of float8. A CPU has none and computes them in float32, for tests."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY


class _Frozen(nn.Linear):
    """A linear layer whose weights are numbers of eight bits times a scale; nothing of it is trained."""

    scale: Tensor

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__(1, 1, bias=False, device="meta")
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)  # out × in
        self.register_buffer("scale", scale)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    @classmethod
    def joined(cls, layers: Sequence[Self]) -> Self:
        """Make one layer whose outputs are those of all, in their order; theirs are views of its weights then."""
        empty = layers[0].weight.new_empty(0, layers[0].in_features)
        bias = None if layers[0].bias is None else layers[0].bias.new_empty(0)
        whole = cls(empty, torch.cat([layer.scale for layer in layers]), bias)
        _take_over(whole, layers)
        return whole

    def _biased(self, product: Tensor) -> Tensor:
        return product if self.bias is None else product + self.bias.to(product.dtype)


class Int8Linear(_Frozen):
    """Weights in int8, one scale a row: dequantised where they are multiplied, again in the backward pass."""

    @classmethod
    def of(cls, layer: nn.Linear) -> Self:
        """Round each row to the nearest of 255 numbers, symmetric around zero."""
        scale = layer.weight.detach().abs().amax(dim=1, keepdim=True).float() / _LARGEST_INT8
        scale = scale.clamp(min=_LEAST)
        rounded = (layer.weight.detach().float() / scale).round().to(torch.int8)
        return cls(rounded, scale, layer.bias)

    def forward(self, values: Tensor) -> Tensor:
        """Multiply in the dtype of the values, of autocast under it."""
        return self._biased(_Int8Product.apply(computed(values), self.weight, self.scale))  # type: ignore[no-untyped-call]


class _Int8Product(torch.autograd.Function):
    """Saves the weights as they are, so that what is dequantised need not be kept."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        """Multiply values, … × in, by weights, out × in."""
        ctx.save_for_backward(weight, scale)
        return functional.linear(values, (weight * scale).to(values.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient of the values."""
        weight, scale = ctx.saved_tensors
        return gradient @ (weight * scale).to(gradient.dtype), None, None


class Float8Linear(_Frozen):
    """Weights, inputs and gradients in float8 (e4m3): one scale a row of weights, one a row of what is multiplied.

    Products are of unit scale, and scales are put to their results, where a compiler has them at no cost.
    """

    @classmethod
    def of(cls, layer: nn.Linear) -> Self:
        """Round the weights."""
        return cls(*_rounded(layer.weight.detach()), layer.bias)

    def forward(self, values: Tensor) -> Tensor:
        """Multiply; the result has the dtype of the values, of autocast under it."""
        return self._biased(_Float8Product.apply(computed(values), self.weight, self.scale))  # type: ignore[no-untyped-call]


class _Float8Product(torch.autograd.Function):
    """The weights are kept once: products take their second factor column by column, so backwards it is transposed."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        """Multiply values, … × in, by weights, out × in."""
        ctx.save_for_backward(weight, scale)
        rounded, own = _rounded(values.reshape(-1, values.shape[-1]))
        product = _multiplied(rounded, weight.t(), values.dtype) * (own * scale.t())
        return product.to(values.dtype).view(*values.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient of the values."""
        weight, scale = ctx.saved_tensors
        rounded, own = _rounded(gradient.reshape(-1, gradient.shape[-1]) * scale.t())
        product = _multiplied(rounded, weight.t().contiguous().t(), gradient.dtype) * own
        return product.to(gradient.dtype).view(*gradient.shape[:-1], weight.shape[1]), None, None


def _multiplied(rows: Tensor, columns: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply float8 numbers, m × k in rows by k × n in columns."""
    if rows.is_cuda:
        one = torch.ones((), device=rows.device)
        return torch._scaled_mm(rows, columns, scale_a=one, scale_b=one, out_dtype=dtype, use_fast_accum=True)
    return (rows.float() @ columns.float()).to(dtype)


def _rounded(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows of values as float8, and the scales, rows × 1, that they are to be multiplied by."""
    exact = values.float()
    scale = (exact.abs().amax(dim=1, keepdim=True) / _LARGEST8).clamp(min=_LEAST)
    return (exact / scale).clamp(-_LARGEST8, _LARGEST8).to(FLOAT8), scale


def computed(values: Tensor) -> Tensor:
    """Return values in the dtype that products take here: that of autocast under it, else their own."""
    kind = values.device.type
    return values.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else values


def joined(layers: Sequence[nn.Linear]) -> nn.Linear | None:
    """Make one frozen layer whose outputs are those of all, in their order; None if they are not of one joinable kind.

    Its weights are theirs: they become views, so that memory holds them once.
    """
    kinds = {type(layer) for layer in layers}
    biases = {layer.bias is None for layer in layers}
    if len(kinds) > 1 or len(biases) > 1:
        return None
    kind = kinds.pop()
    if issubclass(kind, _Frozen):
        return kind.joined(layers)  # type: ignore[arg-type]
    if kind is not nn.Linear:
        return None
    with torch.device("meta"):
        whole = nn.Linear(layers[0].in_features, sum(layer.out_features for layer in layers), bias=not biases.pop())
    _take_over(whole, layers)
    return whole


def _take_over(whole: nn.Linear, layers: Sequence[nn.Linear]) -> None:
    """Move weights and biases of layers into one, and leave them views of it."""
    for name in dict(whole.named_parameters()):
        data = torch.cat([getattr(layer, name).detach() for layer in layers])
        setattr(whole, name, nn.Parameter(data, requires_grad=False))
        start = 0
        for layer in layers:
            own = getattr(layer, name)
            own.data = data[start : start + len(own)]
            start += len(own)
    whole.out_features = len(whole.weight)
