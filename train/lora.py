"""LoRA in few products: its strength folded into one factor, and one down-projection where several share an input.

peft's own layers stay what holds the weights, by peft's names; only how they are multiplied changes. Layers with
dropout, and adapters of other kinds, are left as they are. Layers change their class, not their `forward`: compiled
blocks are told apart by classes, and share what is compiled.
"""

from collections.abc import Mapping, Sequence

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from families.products import added, computed, joined
from train.fusing import FUSED

_ADAPTER = "default"


class LeanLora(LoraLinear):  # type: ignore[misc]
    """A LoRA layer in three products: the frozen one, down, and up onto the first's output."""

    def forward(self, values: Tensor) -> Tensor:
        """Multiply in the dtype of the values, of autocast under it; as peft does if the adapter is off or merged."""
        if self.apart:
            output: Tensor = super().forward(values)
            return output
        values = computed(values)
        down, up = self.factors(values.dtype)
        return added(self.base_layer, values, down, up)

    @property
    def apart(self) -> bool:
        """Tell whether what is trained is no part of the output now, or part of the frozen weights."""
        return bool(self.disable_adapters or self.merged)

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
        if any(layer.apart for layer in self._layers):
            return torch.cat([layer(values) for layer in self._layers], dim=-1)
        values = computed(values)
        downs, ups = zip(*(layer.factors(values.dtype) for layer in self._layers), strict=True)
        up: Tensor = torch.block_diag(*ups)  # type: ignore[no-untyped-call]
        return added(self.whole, values, torch.cat(downs), up)


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
    together = [JoinedLora(one, layers) for one, layers in zip(wholes, found.values(), strict=True) if one is not None]
    if len(together) == len(found):
        for fused, layer in zip(found, together, strict=True):
            setattr(attention, fused, layer)
        attention.fused_projections = True  # type: ignore[assignment]
