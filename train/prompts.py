"""Embeds of prompts: one that repeats is read from its shard once, and copied to the model once, while it stays.

Many samples of a restoration share one prompt. How much may stay is `KEPT_BYTES`, in the memory of the accelerator.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Lock

import torch
from torch import Tensor

from families.protocol import TextEmbeds

KEPT_BYTES = 256 << 20


@dataclass(slots=True)
class Prompt:
    """A prompt's embeds as they are stored: on the host, then where the model is."""

    embed: Tensor  # tokens × width, bfloat16 or float8
    scale: float | None  # of float8
    pooled: Tensor | None  # width, bfloat16
    num_tokens: int
    moved: bool = False

    @property
    def num_bytes(self) -> int:
        """Return what it takes in memory."""
        return self.embed.nbytes + (self.pooled.nbytes if self.pooled is not None else 0)

    def move(self, device: torch.device) -> "Prompt":
        """Have it where the model is, if it is not, in memory of its own; the copy may be still under way."""
        if not self.moved:
            self.embed = self.embed.to(device, non_blocking=True, copy=True)
            if self.pooled is not None:
                self.pooled = self.pooled.to(device, non_blocking=True, copy=True)
            self.moved = True
        return self


def embeds_of(prompts: Sequence[Prompt], device: torch.device) -> TextEmbeds:
    """Return the embeds of prompts of one shape where the model is, in float32."""
    there = [one.move(device) for one in prompts]
    embed = torch.stack([_scaled(one.embed.to(torch.float32), one.scale) for one in there])
    pooled = [one.pooled for one in there if one.pooled is not None]
    return TextEmbeds(
        embed,
        torch.stack(pooled).to(torch.float32) if pooled else None,
        tuple(one.num_tokens for one in there),
    )


class Prompts:
    """What was read last, by key; several threads may ask, and what one of them reads the others wait for."""

    def __init__(self, most: int = KEPT_BYTES) -> None:
        self._most = most
        self._kept: OrderedDict[str, Future[Prompt]] = OrderedDict()
        self._lock = Lock()

    def of(self, keys: Sequence[str], read: Callable[[Sequence[str]], Sequence[Prompt]]) -> tuple[Prompt, ...]:
        """Return prompts by their keys; those that are not here are read, by one call that may raise."""
        with self._lock:
            new = {key: Future[Prompt]() for key in keys if key not in self._kept}
            self._kept |= new
            wanted = [self._kept[key] for key in keys]
            for key in keys:
                self._kept.move_to_end(key)
        if new:
            self._read(new, read)
        return tuple(one.result() for one in wanted)

    def _read(self, new: dict[str, Future[Prompt]], read: Callable[[Sequence[str]], Sequence[Prompt]]) -> None:
        try:
            found = read(list(new))
        except BaseException as fault:
            with self._lock:
                for key, future in new.items():
                    del self._kept[key]
                    future.set_exception(fault)
            raise
        with self._lock:
            for future, prompt in zip(new.values(), found, strict=True):
                future.set_result(prompt)
            self._forget()

    def _forget(self) -> None:
        """Let go of what was not used for longest, until the rest fits; what is being read stays."""
        sizes = {key: one.result().num_bytes for key, one in self._kept.items() if one.done()}
        total = sum(sizes.values())
        for key, size in sizes.items():
            if total <= self._most:
                return
            del self._kept[key]
            total -= size


def _scaled(embed: Tensor, scale: float | None) -> Tensor:
    return embed if scale is None else embed * scale
