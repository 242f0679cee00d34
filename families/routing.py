"""TREAD: some of the target's tokens skip a span of blocks in training (Krause et al. 2025, arXiv:2501.04765).

Hooks around the blocks that a family names (`families.protocol.Block`); another layout of tokens is a field there.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from families.protocol import Block
from families.runtime import sent
from schemas.errors import UserError
from schemas.keys import seed_of
from schemas.trainer import Route


@dataclass(slots=True)
class _Pass:
    """What a span does in the current forward pass, and in the backward pass that recomputes it."""

    kept: Tensor  # places, among the target's tokens, of those that do not skip
    num_target: int
    num_text: int
    before: Tensor | None = None  # the target's tokens as they came to the span


class _Span:
    """A route's blocks."""

    def __init__(self, blocks: Sequence[Block], ratio: float) -> None:
        self.ratio = ratio
        self.now: _Pass | None = None
        for number, block in enumerate(blocks):
            enter = partial(self._enter, block, number == 0)
            block.module.register_forward_pre_hook(enter, with_kwargs=True)
        blocks[-1].module.register_forward_hook(partial(self._leave, blocks[-1]))

    def _active(self, module: nn.Module) -> _Pass | None:
        return self.now if torch.is_grad_enabled() and module.training else None

    def _enter(
        self, block: Block, first: bool, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Hand a block its arguments without the tokens that skip it."""
        now = self._active(module)
        if now is None:
            return None
        called = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
        given = called.arguments
        given[block.rotary] = tuple(_shortened(one, 0, now.num_text, now) for one in given[block.rotary])
        if first:
            images, start = given[block.images], now.num_text if block.joined else 0
            now.before = images[:, start : start + now.num_target]
            given[block.images] = _shortened(images, 1, start, now)
        return called.args[1:], called.kwargs

    def _leave(self, block: Block, module: nn.Module, _: object, output: Any) -> Any:
        """Put the tokens that skipped the span back where they were, as they were."""
        now = self._active(module)
        if now is None:
            return output
        assert now.before is not None, "a span is entered before it is left"
        images = output if block.output is None else output[block.output]
        start = now.num_text if block.joined else 0
        end = start + len(now.kept)
        target = now.before.to(images.dtype).index_copy(1, now.kept, images[:, start:end])
        whole = torch.cat([images[:, :start], target, images[:, end:]], dim=1)
        if block.output is None:
            return whole
        return (*output[: block.output], whole, *output[block.output + 1 :])


class Routing:
    """The routes of a denoiser: active in training mode, where gradients are taken, once tokens are chosen.

    Gradient checkpointing recomputes blocks in the backward pass, so a choice holds until the next.
    """

    def __init__(self, blocks: Sequence[Block], routes: Sequence[Route]) -> None:
        """Hook into the blocks; raises UserError if a route does not fit them."""
        self._spans = [
            _Span(blocks[start : end + 1], route.selection_ratio)
            for (start, end), route in zip(spans(routes, len(blocks)), routes, strict=True)
        ]

    def choose(self, seed: int, num_target: int, num_text: int, device: torch.device) -> None:
        """Choose the tokens that skip each span in the next pass: the same for all samples, whose positions agree."""
        for number, span in enumerate(self._spans):
            skipping = int(num_target * span.ratio)
            order = np.random.default_rng(seed_of(seed, "tread", number)).permutation(num_target)
            kept = sent(torch.from_numpy(np.sort(order[skipping:])), device)
            span.now = _Pass(kept, num_target, num_text) if skipping else None


def spans(routes: Sequence[Route], num_blocks: int) -> list[tuple[int, int]]:
    """Return the first and last block of each route; raises UserError if one is not there or two overlap."""
    found: list[tuple[int, int]] = []
    for number, route in enumerate(routes):
        told = f"tread_config: route {number} spans layers {route.start_layer_idx} to {route.end_layer_idx}"
        start, end = (
            index + num_blocks if index < 0 else index for index in (route.start_layer_idx, route.end_layer_idx)
        )
        if not 0 <= start <= end < num_blocks:
            counted = f"the model has {num_blocks} blocks, 0 to {num_blocks - 1}, or -{num_blocks} to -1 from the end"
            raise UserError(f"{told}; {counted}; give a first layer that is not after the last")
        for other, (earlier, later) in enumerate(found):
            if start <= later and earlier <= end:
                counted = f"of the model's {num_blocks} blocks, route {other} has {earlier} to {later} already"
                raise UserError(f"{told}; {counted}; routes may not overlap")
        found.append((start, end))
    return found


def _shortened(tokens: Tensor, dim: int, start: int, now: _Pass) -> Tensor:
    """Leave out the target's tokens that skip; the target's begin at `start` of dimension `dim`."""
    after = torch.arange(start + now.num_target, tokens.shape[dim], device=tokens.device)
    rows = torch.cat([torch.arange(start, device=tokens.device), start + now.kept, after])
    return tokens.index_select(dim, rows)
