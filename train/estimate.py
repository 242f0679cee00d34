"""How much memory and time a step takes, estimated from counts: every constant that was fitted to measurements is here.

They were, on FLUX.1 Kontext at 8704 tokens on an H200; docs/training.md says how far estimates are off. A precision is
a line in `PRECISIONS`, an optimiser one in `_STATES`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from schemas.trainer import TrainerConfig
from train.costs import Block, Costs, Shaped
from train.devices import Device
from train.step import base_dtype

# Eager autograd keeps what compilers compute again: casts for float32 adapters, products of norms and scales.
_EAGER_KEEPS = 1.9
# Bytes that pointwise kernels move in a forward and in a backward pass, launches included, for each byte of what lies
# between products.
_MOVED = {True: (5.6, 9.4), False: (16.8, 27.6)}  # compiled, eager
_AGAIN = 0.62  # of a block's products, those that recomputation takes where it is compiled: not what ends the block
_FLASH = 3.5  # operations of attention forwards and backwards, which computes its scores again, for each one forwards
_BESIDE = 0.11  # what copies that run along with the computation cost it, of their time
_ADAPTER_BYTES = 4  # float32, their gradients and states too

# Bytes that optimisers keep of each number that is trained, in float32.
_STATES: Mapping[str, float] = {
    "adamw": 8,
    "adamw_bf16": 8,
    "optimi-adamw": 8,
    "optimi-lion": 4,
    "adamw8bit": 2.1,
    "prodigy": 16,
}


@dataclass(frozen=True, slots=True)
class Precision:
    """How frozen weights are stored, and what reading them costs."""

    bits: int
    row_bytes: float = 0  # of each output, besides, whatever the dtype
    row_values: int = 0  # and numbers of the weights' dtype
    group_values: int = 0  # numbers of that dtype for each group of a row
    layer_values: int = 0  # and for each layer
    moved: tuple[float, float] = (0, 0)  # bytes a weight and pass to dequantise, or to quantise what it meets
    quick: bool = False  # products in 8 bits
    exact: bool = False


# Precision -> what it takes; `moved` eager, then compiled (where it has not been measured, what a fused kernel reads).
PRECISIONS: Mapping[str, Precision] = {
    "no_change": Precision(0, exact=True),
    "int8-quanto": Precision(8, row_bytes=4, moved=(11, 5)),
    "int4-quanto": Precision(4, group_values=2, layer_values=2, moved=(37, 8)),
    "int2-quanto": Precision(2, group_values=2, layer_values=2, moved=(37, 8)),
    "fp8-quanto": Precision(8, row_values=1, layer_values=2, moved=(28, 5)),
    "int8-torchao": Precision(8, row_bytes=4, moved=(11, 5)),
    "fp8-torchao": Precision(8, row_bytes=4, moved=(10, 3), quick=True),
}

Choice = Mapping[str, Any]  # options of config.json that decide time and memory


@dataclass(frozen=True, slots=True)
class Weights:
    """Bytes of the network's weights as they are stored."""

    outside: float  # of the blocks
    blocks: tuple[float, ...]
    quantised: float  # numbers that are quantised
    largest: float  # of these in one layer

    @property
    def total(self) -> float:
        """Return the bytes of all."""
        return self.outside + sum(self.blocks)


def weights_of(shape: Shaped, precision: str) -> Weights:
    """Count the bytes of a network's weights in a precision; layers that the family spares keep theirs."""
    how, spared = PRECISIONS[precision], shape.project.family.unquantised
    blocks = [block.module for block in shape.family.blocks(shape.network)]
    places = {id(one): number for number, block in enumerate(blocks) for one in block.modules()}
    stored, outside, numbers, largest = [0.0] * len(blocks), 0.0, 0.0, 0.0
    for name, module in shape.network.named_modules():
        lessened = isinstance(module, nn.Linear) and not how.exact and name not in spared
        if isinstance(module, nn.Linear) and lessened:
            size, count = _quantised(module, how), float(module.weight.numel())
            numbers, largest = numbers + count, max(largest, count)
        else:
            size = float(sum(one.numel() * one.itemsize for one in module.parameters(recurse=False)))
        if id(module) in places:
            stored[places[id(module)]] += size
        else:
            outside += size
    return Weights(outside, tuple(stored), numbers, largest)


def _quantised(layer: nn.Linear, how: Precision) -> float:
    item, rows, columns = layer.weight.itemsize, layer.out_features, layer.in_features
    values = rows * (how.row_values + how.group_values * _groups(columns)) + how.layer_values
    values += 0 if layer.bias is None else rows
    return layer.weight.numel() * how.bits / 8 + rows * how.row_bytes + values * item


def _groups(columns: int) -> int:
    """Count the groups of a row as quanto makes them: of 128 numbers, or fewer where that does not divide it."""
    return next((columns // size for size in (128, 96, 64, 32) if columns % size == 0), 1)


def trained_bytes(shape: Shaped) -> float:
    """Count the bytes of what is trained, its gradients and the optimiser's states; of all weights not themselves."""
    config = shape.project.trainer
    states, average = _STATES[config.optimizer], float(_ADAPTER_BYTES if config.use_ema else 0)
    if not shape.whole:
        return shape.parameters * (2 * _ADAPTER_BYTES + states + average)
    return shape.parameters * (base_dtype(config).itemsize * (1 + states / _ADAPTER_BYTES) + average)


def peak_bytes(costs: Costs, weights: Weights, trained: float, choice: Choice) -> float:
    """Estimate the most that tensors take during a step.

    Weights, what is trained, what blocks keep until the backward pass, and the one block that it is in: what that
    keeps, computed again, and the gradients that are there at once.
    """
    compiled = choice["dynamo_backend"] != "no"
    factor = 1.0 if compiled else _EAGER_KEEPS
    held = weights.total
    if choice["enable_group_offload"]:
        groups = choice["group_offload_blocks_per_group"] * (2 if choice["group_offload_use_stream"] else 1)
        held = weights.outside + groups * max(weights.blocks, default=0)
    kept = [_kept(block, place, choice, factor) for place, block in enumerate(costs.blocks)]
    away = choice["gradient_checkpointing"] and choice["gradient_checkpointing_backend"] == "unsloth"
    inputs = [one.inputs for place, one in enumerate(costs.blocks) if one.trains and _recomputed(place, choice)]
    saved = sum(inputs) - 2 * max(inputs, default=0) if away and len(inputs) > 1 else 0.0
    again = max((factor * one.kept for place, one in enumerate(costs.blocks) if _recomputed(place, choice)), default=0)
    working = max((one.working for one in costs.blocks), default=0) + 2 * weights.largest + costs.data
    return held + trained + sum(kept) - saved + again + working


def _recomputed(place: int, choice: Choice) -> bool:
    return bool(choice["gradient_checkpointing"]) and place % choice["gradient_checkpointing_interval"] == 0


def _kept(block: Block, place: int, choice: Choice, factor: float) -> float:
    if not block.trains:
        return 0.0
    if not _recomputed(place, choice):
        return factor * block.kept
    return block.inputs + (block.attended if choice["gradient_checkpointing_keep"] == "attention" else 0.0)


def seconds(costs: Costs, weights: Weights, choice: Choice, device: Device) -> float:
    """Estimate the time of one forward and backward pass of a batch: what is computed, moved and copied."""
    how, compiled = PRECISIONS[choice["base_model_precision"]], choice["dynamo_backend"] != "no"
    rate = device.products_fp8 if how.quick and device.products_fp8 is not None else device.products
    products = (costs.forward_frozen + costs.backward_frozen) / rate + 3 * costs.adapter / device.products
    attention = sum(
        _FLASH * one.attention / device.attention_both if one.trains else one.attention / device.attention
        for one in costs.blocks
    )
    forwards, backwards = _MOVED[compiled]
    moved = sum(one.touched * (forwards + (backwards if one.trains else 0)) for one in costs.blocks)
    again = [place for place, one in enumerate(costs.blocks) if one.trains and _recomputed(place, choice)]
    share = len(again) / max(1, len(costs.blocks))
    moved += forwards * sum(costs.blocks[place].touched for place in again)
    moved += how.moved[compiled] * weights.quantised * (2 + share)
    inside = [one for one in costs.products if one.block in set(again)]
    part = _AGAIN if compiled and not choice["enable_group_offload"] else 1.0
    products += part * sum(one.operations / rate + one.adapter / device.products for one in inside)
    if choice["gradient_checkpointing_keep"] != "attention":
        attention += sum(costs.blocks[place].attention for place in again) / device.attention
    return _beside_copies(products + attention + moved / device.memory, _copied(costs, weights, choice, again), device)


def _copied(costs: Costs, weights: Weights, choice: Choice, again: Sequence[int]) -> tuple[float, float]:
    """Return bytes that are copied from the CPU: those for which a step waits, and those that come while it computes.

    Weights come twice; the inputs of blocks go and come, each way with a copy of its own.
    """
    brought = 2 * sum(weights.blocks) if choice["enable_group_offload"] else 0.0
    away = choice["gradient_checkpointing"] and choice["gradient_checkpointing_backend"] == "unsloth"
    inputs = sum(costs.blocks[place].inputs for place in again) if away else 0.0
    if choice["enable_group_offload"] and not choice["group_offload_use_stream"]:
        return brought, inputs
    return 0.0, brought + inputs


def _beside_copies(computing: float, copied: tuple[float, float], device: Device) -> float:
    waited, beside = (one / device.transfer for one in copied)
    return waited + max(computing, beside) + _BESIDE * min(computing, beside)


def has_rates(config: TrainerConfig) -> bool:
    """Tell whether time can be estimated: rates are those of bfloat16."""
    return config.mixed_precision == "bf16" and base_dtype(config) == torch.bfloat16
