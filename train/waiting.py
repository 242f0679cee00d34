"""What recomputation starts from waits in the CPU's memory, and is back before its block's turn in the backward pass.

Copies run beside the computation, which takes far longer than they do.
"""

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

_LEAST_BYTES = 16 << 20  # of what waits: smaller ones, which blocks have in common too, stay
_AHEAD = 3  # how many are fetched before they are asked for


def let_wait(blocks: Sequence[nn.Module], weights: Sequence[Tensor], device: torch.device) -> None:
    """Have large tensors that blocks keep for the backward pass, but for weights, wait in the CPU's memory."""
    room = _Room(weights, device, _LEAST_BYTES)
    for block in blocks:
        block.forward = partial(_forward, room, block.forward)


def _forward(room: "_Room", forward: Callable[..., Any], *args: Any, **named: Any) -> Any:
    with saved_tensors_hooks(room.pack, room.unpack):
        return forward(*args, **named)


class _Away:
    """A tensor that waits."""

    def __init__(self, home: Tensor, like: Tensor, before: "weakref.ref[_Away] | None") -> None:
        self.home, self.before = home, before  # in locked memory
        self.shape, self.strides = like.shape, like.stride()
        self.back: Tensor | None = None  # once it is fetched
        self.there: torch.cuda.Event | None = None  # when it is back


class _Room:
    """Locked memory that is used again, and a stream each way."""

    def __init__(self, weights: Sequence[Tensor], device: torch.device, least: int) -> None:
        self._device, self._least = device, least
        self._weights = {one.untyped_storage().data_ptr() for one in weights}
        self._streams = [torch.cuda.Stream(device) for _ in range(2)] if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._free: dict[tuple[int, torch.dtype], list[tuple[Tensor, torch.cuda.Event | None]]] = {}
        self._last: weakref.ref[_Away] | None = None

    def pack(self, tensor: Tensor) -> Tensor | _Away:
        """Send a tensor away, unless it is small or a weight."""
        if tensor.device.type != self._device.type or tensor.nbytes < self._least:
            return tensor
        if tensor.untyped_storage().data_ptr() in self._weights:
            return tensor
        home, read = self._home(tensor)
        away = _Away(home, tensor, self._last)
        self._last = weakref.ref(away)
        if self._streams is None:
            away.home.copy_(tensor)
            return away
        out = self._streams[0]
        out.wait_stream(torch.cuda.current_stream(self._device))
        if read is not None:
            out.wait_event(read)
        with torch.cuda.stream(out):
            away.home.copy_(tensor, non_blocking=True)
        tensor.record_stream(out)
        away.there = out.record_event()
        return away

    def unpack(self, kept: Tensor | _Away) -> Tensor:
        """Return a tensor, and have those that went before it on their way: the backward pass asks in reverse."""
        if isinstance(kept, Tensor):
            return kept
        self._fetch(kept)
        assert kept.back is not None, "it was fetched"
        if kept.there is not None:
            torch.cuda.current_stream(self._device).wait_event(kept.there)
        found, kept.back = kept.back, None
        self._free[kept.home.numel(), kept.home.dtype].append((kept.home, kept.there))
        before = kept.before() if kept.before is not None else None
        for _ in range(_AHEAD):
            if before is None:
                break
            self._fetch(before)
            before = before.before() if before.before is not None else None
        return found

    def _home(self, tensor: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        """Return locked memory for a tensor, and when what was there before has been read."""
        free = self._free.setdefault((tensor.numel(), tensor.dtype), [])
        if not free:
            pinned = self._streams is not None
            return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned), None
        home, read = free.pop()
        return home.view(tensor.shape), read

    def _fetch(self, away: _Away) -> None:
        """Have a tensor brought back, with the strides it had."""
        if away.back is not None:
            return
        away.back = torch.empty_strided(away.shape, away.strides, dtype=away.home.dtype, device=self._device)
        if self._streams is None:
            away.back.copy_(away.home)
            return
        stream = self._streams[1]
        stream.wait_stream(torch.cuda.current_stream(self._device))  # what had this memory may still be in use
        if away.there is not None:
            stream.wait_event(away.there)
        with torch.cuda.stream(stream):
            away.back.copy_(away.home, non_blocking=True)
        away.there = stream.record_event()
