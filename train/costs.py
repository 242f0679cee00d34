"""What a step computes and keeps, counted on shapes: products, attention, activations.

The network is made without memory and runs once, its linear layers noted; no family is asked for its arithmetic. A
network whose blocks do more than linear layers and one attention over all tokens needs a term in `_block`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from families.protocol import Family, TextEmbeds
from families.runtime import family_of
from families.shapes import META, config_of, shaped_denoiser
from schemas.project import Project
from train.adapter import add_adapter
from train.fusing import fuse
from train.step import base_dtype, in_half

Size = tuple[int, int]  # width and height, pixels


@dataclass(frozen=True, slots=True)
class Sizes:
    """What one sample consists of."""

    target: Size
    references: tuple[Size, ...]


@dataclass(frozen=True, slots=True)
class Shaped:
    """A project's network without memory, and what of it would be trained."""

    project: Project
    family: Family
    config: Mapping[str, Any]
    network: nn.Module  # without the adapter
    trained: Mapping[str, int]  # layer -> numbers that are trained in it

    @property
    def whole(self) -> bool:
        """Tell whether all weights are trained."""
        return self.project.trainer.model_type == "full"

    @property
    def parameters(self) -> int:
        """Count what is trained."""
        return sum(self.trained.values())


@dataclass(frozen=True, slots=True)
class Product:
    """A linear layer, and the rows that it multiplies in one forward pass."""

    name: str
    rows: int
    inputs: int
    outputs: int
    source: int  # equal for layers that read the same tensor
    block: int | None  # of the network, by its place
    tokens: bool  # rows are tokens; else one a sample, of time and guidance, whose gradient nothing needs
    flows: bool  # whether its input needs a gradient
    trained: int  # numbers that are trained in it

    @property
    def operations(self) -> float:
        """Count those of the weights, forward."""
        return 2.0 * self.rows * self.inputs * self.outputs

    @property
    def adapter(self) -> float:
        """Count those of the adapter, forward."""
        return 2.0 * self.rows * self.trained


@dataclass(frozen=True, slots=True)
class Block:
    """One block: its attention, and what it keeps for its backward pass, in bytes."""

    attention: float  # operations, forward
    trains: bool  # whether a gradient comes as far as here
    inputs: float  # text and image tokens that come in
    attended: float  # the output of its attention
    kept: float  # all that is kept, both of these included
    touched: float  # all that it reads and writes between products
    working: float  # gradients that are there at once


@dataclass(frozen=True, slots=True)
class Costs:
    """What one forward and backward pass of a batch takes."""

    tokens: int  # of all its samples, text included
    products: tuple[Product, ...]
    blocks: tuple[Block, ...]
    whole: bool  # all weights are trained
    data: float  # bytes of latents and text

    @property
    def forward_frozen(self) -> float:
        """Count operations of products but for adapters', forward."""
        return sum(one.operations for one in self.products)

    @property
    def backward_frozen(self) -> float:
        """Count those of the backward pass: for inputs that need a gradient, and for weights if all are trained."""
        inputs = sum(one.operations for one in self.products if one.flows)
        return inputs + (self.forward_frozen if self.whole else 0)

    @property
    def adapter(self) -> float:
        """Count operations of adapters, forward; the backward pass has twice as many."""
        return 0.0 if self.whole else sum(one.adapter for one in self.products)

    @property
    def attention(self) -> float:
        """Count operations of attention, forward."""
        return sum(one.attention for one in self.blocks)

    @property
    def attention_backward(self) -> float:
        """Count attention's four products of the backward pass, not those that are computed again."""
        return 2 * sum(one.attention for one in self.blocks if one.trains)

    @property
    def operations(self) -> float:
        """Count all that a step has to compute, whatever a loop computes twice."""
        products = self.forward_frozen + self.backward_frozen + 3 * self.adapter
        return products + self.attention + self.attention_backward


def shaped(project: Project) -> Shaped:
    """Make a project's network without memory, and find what is trained of it."""
    family, config, dtype = family_of(project), config_of(project), base_dtype(project.trainer)
    plain, adapted = (_made(project, family, config, dtype) for _ in range(2))
    add_adapter(adapted, project)
    layers = {name for name, module in plain.named_modules() if not any(True for _ in module.children())}
    trained: dict[str, int] = {}
    for path, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            parts = path.split(".")
            owners = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
            layer = next((one for one in owners if one in layers), "")
            trained[layer] = trained.get(layer, 0) + parameter.numel()
    return Shaped(project, family, config, plain, trained)


def _made(project: Project, family: Family, config: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    network = shaped_denoiser(family, config, dtype)
    if project.trainer.fuse_qkv_projections:
        fuse(network)
    return network.requires_grad_(False)


def tokens_of(project: Project, sizes: Sizes) -> int:
    """Count the tokens of one sample: target, references and text."""
    family = family_of(project)
    pictures = [family.num_tokens(_latent(project, one)) for one in (sizes.target, *sizes.references)]
    return sum(pictures) + project.text_tokens


def costs_of(shape: Shaped, sizes: Sizes, batch: int) -> Costs:
    """Run a batch of equal samples through a network without memory and count what it takes."""
    noted, tokens = _noted(shape, sizes, batch), batch * tokens_of(shape.project, sizes)
    first = _first(shape, noted)
    products = tuple(replace(one, flows=one.flows and (one.block is None or one.block >= first)) for one in noted)
    blocks = []
    for number in range(len(shape.family.blocks(shape.network))):
        own = [one for one in products if one.block == number and one.tokens]
        blocks.append(_block(shape, own, (tokens, batch), trains=number >= first))
    text = shape.project.text_tokens * _width(shape, shape.project.family.text_input)
    pictures = sum(_values(_latent(shape.project, one)) for one in (sizes.target, sizes.target, *sizes.references))
    return Costs(tokens, products, tuple(blocks), shape.whole, 4.0 * batch * (text + pictures))


def _block(shape: Shaped, products: Sequence[Product], count: tuple[int, int], *, trains: bool) -> Block:
    """Count what compiled autograd keeps of a block; `count` is that of tokens, and of samples that share them.

    In units of tokens × width, of a double block of FLUX.1, whose feed-forward is 4 wide: the normalised inputs of
    layers that have an adapter, which need them for its gradient: of q, k and v 1, of attention's way out 1, of the
    feed-forward 1 and 4; what layers put out: q, k, v 3, before the activation 4, both residual streams that norms read
    2; q and k normalised and rotated 2, attention's output 1; in all 19. Of a single block: inputs 1 and 5, outputs 3,
    4 and 1, attention 3; in all 17. Everything pointwise between these is computed again where it is read, and a frozen
    layer without an adapter does not need its input.
    """
    tokens, batch = count
    network: Any = shape.network
    item = 2 if in_half(shape.project.trainer) else 4
    stream = float(tokens * network.config.attention_head_dim * network.config.num_attention_heads)
    read = {one.source: one.rows * one.inputs for one in products if one.trained or shape.whole}
    every = {one.source: one.rows * one.inputs for one in products}
    put = [one.rows * one.outputs for one in products]
    widest = max((one.inputs for one in products), default=0) + max((one.outputs for one in products), default=0)
    return Block(
        attention=4.0 * stream * tokens / batch,
        trains=trains,
        inputs=item * stream,
        attended=item * stream,
        kept=item * (sum(read.values()) + sum(put) + 3 * stream) if trains else 0.0,
        touched=item * (sum(every.values()) + sum(put) + 3 * stream),
        working=float(item * tokens * widest),
    )


def _first(shape: Shaped, products: Sequence[Product]) -> int:
    """Return the first block that a gradient has to come to; all if what comes before them is trained."""
    before = [one for one in products if one.block is None and not one.flows]
    if shape.whole or any(one.trained for one in before):
        return 0
    return min((one.block for one in products if one.trained and one.block is not None), default=0)


def _noted(shape: Shaped, sizes: Sizes, batch: int) -> list[Product]:
    """Note the linear layers in the order they run in; what comes before the first block needs no gradient."""
    places = _places(shape)
    noted: list[Product] = []
    seen: list[Tensor] = []  # kept, so that no two of them are taken for one

    def note(name: str, layer: nn.Linear, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        values, block = arguments[0], places.get(name)
        seen.append(values)
        tokens, within = values.ndim > 2, any(one.block is not None for one in noted) or block is not None
        noted.append(
            Product(
                name=name,
                rows=values.numel() // layer.in_features,
                inputs=layer.in_features,
                outputs=layer.out_features,
                source=id(values),
                block=block,
                tokens=tokens,
                flows=tokens and within,
                trained=shape.trained.get(name, 0),
            )
        )

    linear = [(name, one) for name, one in shape.network.named_modules() if isinstance(one, nn.Linear)]
    handles = [one.register_forward_hook(partial(_called, note, name)) for name, one in linear]
    try:
        with torch.no_grad():
            _forward(shape, sizes, batch)
    finally:
        for handle in handles:
            handle.remove()
    return noted


def _called(note: Any, name: str, layer: nn.Module, arguments: Any, output: Any) -> None:
    note(name, layer, arguments, output)


def _places(shape: Shaped) -> dict[str, int]:
    """Return the block of each module that is in one."""
    numbers = {id(block.module): number for number, block in enumerate(shape.family.blocks(shape.network))}
    roots = {name: numbers[id(one)] for name, one in shape.network.named_modules() if id(one) in numbers}
    return {
        name: number
        for name, _ in shape.network.named_modules()
        for root, number in roots.items()
        if name.startswith(f"{root}.")
    }


def _forward(shape: Shaped, sizes: Sizes, batch: int) -> None:
    """Call the network as a step does, with tensors that have shapes alone."""
    project, family = shape.project, shape.family
    text, pooled = _width(shape, project.family.text_input), _width(shape, project.family.pooled_input)
    embeds = TextEmbeds(
        torch.empty(batch, project.text_tokens, text, device=META),
        torch.empty(batch, pooled, device=META) if pooled else None,
        (project.text_tokens,) * batch,
    )
    target, *references = (
        torch.empty(batch, *_latent(shape.project, one), device=META) for one in (sizes.target, *sizes.references)
    )
    times = torch.empty(batch, device=META)
    family.velocity(
        shape.network, target, references, embeds, times, times if family.takes_guidance(shape.network) else None
    )


def _latent(project: Project, size: Size) -> tuple[int, int, int]:
    spec = project.family
    width, height = size
    return spec.latent_channels.usual, height // spec.latent_scale, width // spec.latent_scale


def _values(latent: tuple[int, int, int]) -> int:
    channels, height, width = latent
    return channels * height * width


def _width(shape: Shaped, key: str) -> int:
    """Return a width that the network's configuration says, 0 if the family has no such input."""
    network: Any = shape.network
    return int(network.config.get(key, 0))
