"""Products with frozen weights; frozen layers in eight bits that compile, of int8 the weights, of float8 products too.

`added` is how a layer, any frozen one, multiplies with something of low rank added; `joined` makes one layer of several
that read the same input. Another kind is a class beside these.
"""

from collections.abc import Sequence
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

FLOAT8 = torch.float8_e4m3fn
_LARGEST8 = torch.finfo(FLOAT8).max
_LARGEST_INT8 = 127
_LEAST = torch.finfo(torch.float32).tiny  # of a scale: rows of zeros have one, too
_ROWS = 16  # of a factor in float8 on CUDA, or a multiple of them: cuBLAS refuses one row, and two
_LEAST_CAPABILITY = (8, 9)  # of a CUDA device that multiplies float8


def multiplies_float8(device: torch.device) -> bool:
    """Tell whether a device has products of float8. A CPU has none and computes them in float32, for tests."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY


def computed(values: Tensor) -> Tensor:
    """Return values in the dtype that products take here: that of autocast under it, else their own."""
    kind = values.device.type
    return values.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else values


class Frozen(nn.Linear):
    """A linear layer whose weights are numbers of eight bits, each row times a scale; nothing of it is trained."""

    scale: Tensor  # out × 1, float32

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        """Make a layer of weights, out × in."""
        super().__init__(1, 1, bias=False, device="meta")
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
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

    def forward(self, values: Tensor) -> Tensor:
        """Multiply; the result has the dtype of the values, of autocast under it."""
        return _product(computed(values), self.weight, self.scale, self.bias, None, None)


class Int8Linear(Frozen):
    """Weights in int8, dequantised where they are multiplied, again in the backward pass."""

    @classmethod
    def of(cls, layer: nn.Linear) -> Self:
        """Round each row to the nearest of 255 numbers, symmetric around zero."""
        exact = layer.weight.detach().float()
        scale = (exact.abs().amax(dim=1, keepdim=True) / _LARGEST_INT8).clamp(min=_LEAST)
        return cls((exact / scale).round().to(torch.int8), scale, layer.bias)


class Float8Linear(Frozen):
    """Weights, inputs and gradients in float8 (e4m3); each row of them has a scale, that of its largest value."""

    @classmethod
    def of(cls, layer: nn.Linear) -> Self:
        """Round the weights."""
        return cls(*_rounded(layer.weight.detach()), layer.bias)


class _Product(torch.autograd.Function):
    """A product with frozen weights, and what of low rank is added to it.

    Weights are kept as they are stored, so that what is dequantised or transposed need not be kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        weight: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
        down: Tensor | None,
        up: Tensor | None,
    ) -> Tensor:
        """Multiply values, … × in."""
        rows = values.reshape(-1, values.shape[-1])
        small = None if down is None else rows @ down.t()
        given = None if down is None else values  # which nothing else needs backwards
        ctx.save_for_backward(given, weight, scale, small, down, up)
        half = None if bias is None else bias.to(values.dtype)
        return _forwards(rows, weight, scale, half, small, up).view(*values.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of values, `down` and `up`."""
        values, weight, scale, small, down, up = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        through = None if up is None else rows @ up
        back = of_down = of_up = None
        if ctx.needs_input_grad[0]:
            back = _backwards(rows, weight, scale, through, down).view(*gradient.shape[:-1], weight.shape[1])
        if through is not None:
            of_down, of_up = through.t() @ values.reshape(-1, values.shape[-1]), rows.t() @ small
        return back, None, None, None, of_down, of_up


def _product(*given: Any) -> Tensor:
    product: Tensor = _Product.apply(*given)  # type: ignore[no-untyped-call]
    return product


def _forwards(
    rows: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, small: Tensor | None, up: Tensor | None
) -> Tensor:
    product: Tensor
    if weight.dtype == FLOAT8:
        product = _float8_added(*_rounded(rows), weight, scale, bias, small, up, rows.dtype)
    else:
        product = _linear_added(rows, _exact(weight, scale, rows.dtype), bias, small, up)
    return product


def _backwards(
    rows: Tensor, weight: Tensor, scale: Tensor | None, through: Tensor | None, down: Tensor | None
) -> Tensor:
    """Multiply gradients with weights transposed: products of float8 take their second factor column by column."""
    product: Tensor
    turned = None if down is None else down.t()
    if weight.dtype == FLOAT8 and scale is not None:
        rounded, own = _rounded(rows * scale.t())  # rows of weights are what is summed over here
        product = _float8_added(rounded, own, weight.t().contiguous(), None, None, through, turned, rows.dtype)
    else:
        product = _linear_added(rows, _exact(weight, scale, rows.dtype).t(), None, through, turned)
    return product


def _exact(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    return weight if scale is None else (weight * scale).to(dtype)


def _rounded(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows of values as float8, and the scales, rows × 1, that they are to be multiplied by."""
    exact = values.float()
    scale = (exact.abs().amax(dim=1, keepdim=True) / _LARGEST8).clamp(min=_LEAST)
    return (exact * (1 / scale)).to(FLOAT8).contiguous(), scale  # as products take them: row by row


def _multiplied(
    rows: Tensor, own: Tensor, columns: Tensor, scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Multiply float8 numbers, m × k in rows by k × n in columns, with scales of rows, m × 1, and columns, n × 1."""
    if scale is None:
        scale = own.new_ones(columns.shape[1], 1)
    if rows.is_cuda and (missing := -len(rows) % _ROWS):
        filled, ones = functional.pad(rows.view(torch.uint8), (0, 0, 0, missing)), own.new_ones(missing, 1)
        whole = _multiplied(filled.view(FLOAT8), torch.cat([own, ones]), columns, scale, bias, dtype)
        return whole[: len(rows)]
    if rows.is_cuda:  # whose product with a scale a row has one dtype, which is exact enough for any
        half = None if bias is None else bias.to(torch.bfloat16)
        product = torch._scaled_mm(
            rows, columns, scale_a=own, scale_b=scale.t(), bias=half, out_dtype=torch.bfloat16, use_fast_accum=True
        )
        return product.to(dtype)
    product = (rows.float() @ columns.float()) * (own * scale.t())
    return (product if bias is None else product + bias).to(dtype)


# What is added stays in place, which compilers do not do: they copy what it is added to before. So these are operations
# of their own, that no compiler looks into.


@torch.library.custom_op("pairline::float8_added", mutates_args=())
def _float8_added(
    rows: Tensor,
    own: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    small: Tensor | None,
    up: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    output = _multiplied(rows, own, weight.t(), scale, bias, dtype)
    return output if small is None or up is None else output.addmm_(small, up.t())


@_float8_added.register_fake
def _float8_shape(rows: Tensor, own: Tensor, weight: Tensor, *others: Any) -> Tensor:
    return own.new_empty(rows.shape[0], weight.shape[0], dtype=others[-1])


@torch.library.custom_op("pairline::linear_added", mutates_args=())
def _linear_added(rows: Tensor, weight: Tensor, bias: Tensor | None, small: Tensor | None, up: Tensor | None) -> Tensor:
    """What is added comes first: the large product reads it while it computes, a small one after it only waits."""
    if small is None or up is None:
        return functional.linear(rows, weight, bias)
    first = small @ up.t() if bias is None else torch.addmm(bias, small, up.t())
    return first.addmm_(rows, weight.t())


@_linear_added.register_fake
def _linear_shape(rows: Tensor, weight: Tensor, *others: Any) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[0])


def added(layer: nn.Module, values: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Add to a frozen layer's output what `down`, rank × in, and `up`, out × rank, make of values, in their dtype."""
    if isinstance(layer, Frozen):
        return _product(values, layer.weight, layer.scale, layer.bias, down, up)
    if type(layer) is nn.Linear and layer.weight.dtype == values.dtype:
        return _product(values, layer.weight, None, layer.bias, down, up)
    output: Tensor = layer(values)
    return output + functional.linear(functional.linear(values, down), up)


def joined(layers: Sequence[nn.Linear]) -> nn.Linear | None:
    """Make one frozen layer whose outputs are those of all, in their order; None if they are not of one joinable kind.

    Its weights are theirs: they become views, so that memory holds them once.
    """
    kinds = {type(layer) for layer in layers}
    biases = {layer.bias is None for layer in layers}
    if len(kinds) > 1 or len(biases) > 1:
        return None
    kind = kinds.pop()
    if issubclass(kind, Frozen):
        return kind.joined(cast(Any, layers))
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
