"""Group offload: frozen weights of blocks wait on the CPU, and come to the accelerator when their turn does.

diffusers' group offloading moves adapters too, and only knows the order of a forward pass; this one follows the
backward pass as well, and never copies back what has not changed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Groups:
    """How blocks are moved."""

    size: int  # blocks that are moved together
    ahead: bool  # whether the next group is copied while one computes


def offload(network: nn.Module, blocks: Sequence[nn.Module], device: torch.device, groups: Groups) -> None:
    """Move a network to a CUDA device, but for the frozen weights of its blocks.

    What is trained stays on the device, so adapters have to be there already.
    """
    grouped = _groups(blocks, groups.size)
    waiting = {id(tensor) for _, frozen in grouped for tensor in frozen}
    for tensor in (*network.parameters(), *network.buffers()):
        tensor.data = tensor.data.cpu() if id(tensor) in waiting else tensor.data.to(device)
    stage = _Stage([frozen for _, frozen in grouped], device, ahead=groups.ahead)
    for number, (members, _) in enumerate(grouped):
        for block in members:
            block.register_forward_pre_hook(partial(stage.enter, number))


def _groups(blocks: Sequence[nn.Module], size: int) -> list[tuple[Sequence[nn.Module], list[Tensor]]]:
    """Return every `size` blocks with their frozen weights."""
    grouped = [blocks[first : first + size] for first in range(0, len(blocks), size)]
    return [(group, [one for block in group for one in _frozen(block)]) for group in grouped]


def _frozen(block: nn.Module) -> list[Tensor]:
    return [one for one in (*block.parameters(), *block.buffers()) if not one.requires_grad]


def _locked(tensor: Tensor) -> Tensor:
    """Put a tensor's numbers into locked memory, and let those they were in go: never are all of them there twice."""
    tensor.data = tensor.data.pin_memory()
    return tensor.data


class _Stage:
    """Room on the accelerator for one group of frozen weights, and with `ahead` for the one that comes next.

    Their copies on the CPU never change, so nothing is copied back. A group stays until another enters, because the
    backward pass, which recomputes blocks in reverse order, needs a block's weights after the recomputation as well.
    """

    def __init__(self, groups: Sequence[Sequence[Tensor]], device: torch.device, *, ahead: bool) -> None:
        self._groups, self._device = groups, device
        self._homes = [[_locked(one) for one in group] for group in groups]
        self._stream = torch.cuda.Stream(device) if ahead else None  # type: ignore[no-untyped-call]
        self._coming: dict[int, tuple[list[Tensor], torch.cuda.Event]] = {}
        self._present: int | None = None

    def enter(self, number: int, *_: object) -> None:
        """Bring a group, send the one before it home, and have the one that follows in this direction on its way."""
        if number == self._present:
            return
        backwards = self._present is not None and number < self._present
        if self._present is not None:
            self._place(self._present, self._homes[self._present])
        if self._stream is None:
            copies = [home.to(self._device, non_blocking=True) for home in self._homes[number]]
        else:
            copies = self._received(number, self._stream)
            following = number - 1 if backwards else number + 1
            if 0 <= following < len(self._groups):
                self._send_for(following, self._stream)
        self._place(number, copies)
        self._present = number

    def _place(self, number: int, tensors: Sequence[Tensor]) -> None:
        for tensor, data in zip(self._groups[number], tensors, strict=True):
            tensor.data = data

    def _received(self, number: int, stream: torch.cuda.Stream) -> list[Tensor]:
        """Wait for a group, and for one sent for in vain too: its memory is free only when nothing writes there."""
        if number not in self._coming:
            self._send_for(number, stream)
        for _, there in self._coming.values():
            torch.cuda.current_stream(self._device).wait_event(there)
        copies, _ = self._coming[number]
        self._coming.clear()
        return copies

    def _send_for(self, number: int, stream: torch.cuda.Stream) -> None:
        """Copy a group beside the computation, into memory that the computation's own stream gives and takes back."""
        homes = self._homes[number]
        copies = [torch.empty_like(home, device=self._device) for home in homes]
        stream.wait_stream(torch.cuda.current_stream(self._device))  # what had this memory may still be in use
        with torch.cuda.stream(stream):
            for copy, home in zip(copies, homes, strict=True):
                copy.copy_(home, non_blocking=True)
        self._coming[number] = (copies, stream.record_event())
