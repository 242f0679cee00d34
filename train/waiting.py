"""What recomputation starts from waits in the CPU's memory, and is back before its block's turn in the backward pass.

Copies run beside the computation, which takes far longer than they do.
"""

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from inspect import Signature, signature
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

_LEAST_BYTES = 16 << 20  # of what waits: smaller ones, which blocks have in common too, stay
_STEP = 1 << 20  # bytes that memory is taken in
_AHEAD = 3  # how many are fetched before they are asked for


def let_wait(blocks: Sequence[nn.Module], weights: Sequence[Tensor], device: torch.device) -> None:
    """Have large tensors that blocks keep for the backward pass, but for weights, wait in the CPU's memory."""
    room = _Room(weights, device, _LEAST_BYTES)
    for block in blocks:
        called = signature(MethodType(type(block).forward, block))
        block.forward = partial(_forward, room, called, block.forward)


def _forward(room: "_Room", called: Signature, forward: Callable[..., Any], *args: Any, **named: Any) -> Any:
    given = called.bind(*args, **named)  # by their places: what recomputation is given by name is not saved for it
    with saved_tensors_hooks(room.pack, room.unpack):
        return forward(*given.args, **given.kwargs)


class _Away:
    """A tensor that waits, for as long as the backward pass may ask for it."""

    def __init__(self, room: "_Room", home: Tensor, like: Tensor) -> None:
        self._bytes, self._room = home, room
        self.home = home[: like.nbytes].view(like.dtype).view(like.shape)  # in locked memory
        self.strides = like.stride()
        self.before = room.last  # what was sent away before
        self.back: Tensor | None = None  # once it is fetched
        self.taken = False  # whether it was asked for
        self.there: torch.cuda.Event | None = None  # when it is away, then when it is back

    def __del__(self) -> None:
        self._room.free(self._bytes, self.there)


class _Room:
    """Locked memory that is used again, and a stream each way."""

    def __init__(self, weights: Sequence[Tensor], device: torch.device, least: int) -> None:
        self._device, self._least = device, least
        self._weights = {one.untyped_storage().data_ptr() for one in weights}
        self._streams = [torch.cuda.Stream(device) for _ in range(2)] if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._free: list[tuple[Tensor, torch.cuda.Event | None]] = []  # bytes, and when they were last copied
        self.last: weakref.ref[_Away] | None = None

    def pack(self, tensor: Tensor) -> Tensor | _Away:
        """Send a tensor away, unless it is small or a weight."""
        if tensor.device.type != self._device.type or tensor.nbytes < self._least:
            return tensor
        if tensor.untyped_storage().data_ptr() in self._weights:
            return tensor
        home, read = self._home(tensor)
        away = _Away(self, home, tensor)
        self.last = weakref.ref(away)
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
        found, kept.back, kept.taken = kept.back, None, True
        ahead, before = 0, kept.before
        while before is not None and ahead < _AHEAD and (away := before()) is not None:
            if not away.taken:  # of one block all are asked for in the order they were sent
                self._fetch(away)
                ahead += 1
            before = away.before
        return found

    def free(self, home: Tensor, last: torch.cuda.Event | None) -> None:
        """Take memory back, once what was copied last has been."""
        self._free.append((home, last))

    def _home(self, tensor: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        """Return locked bytes for a tensor, the smallest that do, and when what was there before has been read.

        Where all are too small, one of them is let go: sizes vary, and there should not be memory for each of them.
        """
        fitting = [number for number, (home, _) in enumerate(self._free) if home.numel() >= tensor.nbytes]
        if fitting:
            return self._free.pop(min(fitting, key=lambda number: self._free[number][0].numel()))
        if self._free:
            self._free.pop(0)
        size = -(-tensor.nbytes // _STEP) * _STEP
        return torch.empty(size, dtype=torch.uint8, pin_memory=self._streams is not None), None

    def _fetch(self, away: _Away) -> None:
        """Have a tensor brought back, with the strides it had."""
        if away.back is not None:
            return
        away.back = torch.empty_strided(away.home.shape, away.strides, dtype=away.home.dtype, device=self._device)
        if self._streams is None:
            away.back.copy_(away.home)
            return
        stream = self._streams[1]
        stream.wait_stream(torch.cuda.current_stream(self._device))  # what had this memory may still be in use
        if away.there is not None:
            stream.wait_event(away.there)
        with torch.cuda.stream(stream):
            away.back.copy_(away.home, non_blocking=True)
        away.back.record_stream(stream)  # it may be let go before it is there, if nothing asks for it
        away.there = stream.record_event()
