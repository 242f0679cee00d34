"""LoRA in few products: its strength folded into one factor, and one down-projection where several share an input.

peft's own layers stay what holds the weights, by peft's names; only how they are multiplied changes. Layers with
dropout, and adapters of other kinds, are left as they are. Layers change their class, not their `forward`: compiled
blocks are told apart by classes, and share what is compiled.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn import functional

from families.products import computed, joined
from train.fusing import FUSED

_ADAPTER = "default"


class LeanLora(LoraLinear):  # type: ignore[misc]
    """A LoRA layer in three products: the frozen one, down, and up onto the first's output."""

    def forward(self, values: Tensor) -> Tensor:
        """Multiply in the dtype of the values, of autocast under it."""
        values = computed(values)
        return _with_lora(self.base_layer, values, *self.factors(values.dtype))

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return its matrices, rank × in and out × rank, the second times the adapter's strength."""
        up = self.lora_B[_ADAPTER].weight * self.scaling[_ADAPTER]
        return self.lora_A[_ADAPTER].weight.to(dtype), up.to(dtype)


class JoinedLora(nn.Module):
    """LoRA layers that read one input, as one: their outputs, one after the other in the last dimension."""

    def __init__(self, whole: nn.Linear, layers: Sequence[LeanLora]) -> None:
        """Join layers whose frozen weights are parts of `whole`."""
        super().__init__()
        self.whole = whole
        self._layers = tuple(layers)  # a tuple: they have their names elsewhere

    def forward(self, values: Tensor) -> Tensor:
        """Multiply as each of the layers does."""
        values = computed(values)
        downs, ups = zip(*(layer.factors(values.dtype) for layer in self._layers), strict=True)
        up: Tensor = torch.block_diag(*ups)  # type: ignore[no-untyped-call]
        return _with_lora(self.whole, values, torch.cat(downs), up)


def make_lean(denoiser: nn.Module, *, join: bool) -> None:
    """Have LoRA layers multiply in few kernels; with `join` q, k and v of an attention become one product.

    Joined weights are kept once, outside of the layers that they belong to: not for weights that move.
    """
    for module in denoiser.modules():
        if type(module) is LoraLinear and not module.lora_variant and _undropped(module):
            module.__class__ = LeanLora
    if join:
        for module in denoiser.modules():
            _join(module, {fused: parts for fused, parts in FUSED.items() if hasattr(module, parts[0])})


def _undropped(layer: LoraLinear) -> bool:
    return isinstance(layer.lora_dropout[_ADAPTER], nn.Identity)


def _join(attention: nn.Module, present: Mapping[str, Sequence[str]]) -> None:
    """Give an attention fused layers, if all can be: diffusers calls them where `fused_projections` is set."""
    found = {fused: [getattr(attention, part) for part in parts] for fused, parts in present.items()}
    if not found or not all(type(one) is LeanLora for layers in found.values() for one in layers):
        return
    wholes = [joined([one.base_layer for one in layers]) for layers in found.values()]
    for (fused, layers), whole in zip(found.items(), wholes, strict=True):
        if whole is None:
            return
        setattr(attention, fused, JoinedLora(whole, layers))
    attention.fused_projections = True  # type: ignore[assignment]


def _with_lora(layer: nn.Linear, values: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Add to a frozen layer's output what LoRA's matrices, rank × in and out × rank, make of the same input."""
    small = functional.linear(values, down)
    if type(layer) is nn.Linear and layer.weight.dtype == values.dtype:
        summed: Tensor = linear_added(values, layer.weight, layer.bias, small, up)
        return summed
    output: Tensor = layer(values)
    return output + functional.linear(small, up)


@torch.library.custom_op("pairline::linear_added", mutates_args=())
def linear_added(
    values: Tensor, weight: Tensor, bias: Tensor | None, small: Tensor, up: Tensor
) -> Tensor:  # … × in, out × in, out, … × rank, out × rank -> … × out
    """Multiply, then add a second product in place, which compilers do not: they copy what is added to before."""
    output = functional.linear(values, weight, bias)
    output.view(-1, output.shape[-1]).addmm_(small.reshape(-1, small.shape[-1]), up.t())
    return output


@linear_added.register_fake
def _linear_added_shape(values: Tensor, weight: Tensor, bias: Tensor | None, small: Tensor, up: Tensor) -> Tensor:
    return values.new_empty(*values.shape[:-1], weight.shape[0])


def _keep_factors(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, _, small, up = inputs
    ctx.save_for_backward(weight, small, up)


def _linear_added_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, Tensor, Tensor]:
    weight, small, up = ctx.saved_tensors
    across = gradient.flatten(0, -2).t() @ small.flatten(0, -2)
    return gradient @ weight, None, None, gradient @ up, across


linear_added.register_autograd(_linear_added_backward, setup_context=_keep_factors)
