"""What saves memory: recomputed blocks, blocks that wait on the CPU, and what to change when it runs out.

Another way to save is a line in `_savings`, if it is an option of its own a function beside the others too.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from families.protocol import Family
from schemas.errors import UserError
from schemas.trainer import TrainerConfig

_GOES_ON = ", and the run can be resumed with it"


def checkpoint_blocks(family: Family, denoiser: nn.Module, interval: int) -> None:
    """Have the activations of every `interval`th block recomputed in the backward pass, from the first on."""
    recomputed = {block.module for block in family.blocks(denoiser)[::interval]}

    def call(module: nn.Module, *args: Any) -> Any:
        return checkpoint(module, *args, use_reentrant=False) if module in recomputed else module(*args)

    denoiser.enable_gradient_checkpointing(gradient_checkpointing_func=call)  # type: ignore[operator]


def offload_blocks(family: Family, denoiser: nn.Module, device: torch.device, config: TrainerConfig) -> None:
    """Move a denoiser to the accelerator, but for the frozen weights of its blocks, which come when their turn does.

    To be called when its adapter is there: what is trained stays on the accelerator, with its gradients. diffusers'
    group offloading moves adapters too, and only knows the order of a forward pass. Raises UserError without CUDA.
    """
    if device.type != "cuda":
        raise UserError(f"enable_group_offload: needs a CUDA device, and this run is on {device}; turn it off")
    groups = _groups([block.module for block in family.blocks(denoiser)], config.group_offload_blocks_per_group)
    waiting = {id(tensor) for _, frozen in groups for tensor in frozen}
    for tensor in (*denoiser.parameters(), *denoiser.buffers()):
        tensor.data = tensor.data.cpu() if id(tensor) in waiting else tensor.data.to(device)
    stage = _Stage([frozen for _, frozen in groups], device, ahead=config.group_offload_use_stream)
    for number, (blocks, _) in enumerate(groups):
        for block in blocks:
            block.register_forward_pre_hook(partial(stage.enter, number))


def _groups(blocks: Sequence[nn.Module], size: int) -> list[tuple[Sequence[nn.Module], list[Tensor]]]:
    """Return every `size` blocks with their frozen weights."""
    grouped = [blocks[first : first + size] for first in range(0, len(blocks), size)]
    return [(group, [one for block in group for one in _frozen(block)]) for group in grouped]


def _frozen(block: nn.Module) -> list[Tensor]:
    return [one for one in (*block.parameters(), *block.buffers()) if not one.requires_grad]


class _Stage:
    """Room on the accelerator for one group of frozen weights, and with `ahead` for the one that comes next.

    Their copies on the CPU never change, so nothing is copied back. A group stays until another enters, because the
    backward pass, which recomputes blocks in reverse order, needs a block's weights after the recomputation as well.
    """

    def __init__(self, groups: Sequence[Sequence[Tensor]], device: torch.device, *, ahead: bool) -> None:
        self._groups, self._device = groups, device
        self._homes = [[one.data.pin_memory() for one in group] for group in groups]
        for group, homes in zip(groups, self._homes, strict=True):
            for tensor, home in zip(group, homes, strict=True):
                tensor.data = home
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


@contextmanager
def enough_memory(config: TrainerConfig, device: torch.device) -> Iterator[None]:
    """Turn the accelerator's running out of memory into a UserError that says what to change."""
    try:
        yield
    except torch.OutOfMemoryError as fault:
        used = ""
        if device.type == "cuda":
            peak, total = torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
            used = f": {peak / 2**30:.1f} of {total / 2**30:.1f} GiB were in use at most"
        raise UserError(f"the accelerator's memory is full{used}; {advice(config)}") from fault


def advice(config: TrainerConfig) -> str:
    """Say what of the configuration saves memory, what costs least first."""
    return f"what saves memory, what costs least first: {'; '.join(_savings(config))}"


def _savings(config: TrainerConfig) -> Iterator[str]:
    quantised = config.base_model_precision != "no_change"
    if not config.gradient_checkpointing:
        yield f"gradient_checkpointing: true (a third slower{_GOES_ON})"
    elif config.gradient_checkpointing_interval > 1:
        yield f"gradient_checkpointing_interval: 1 (slower{_GOES_ON})"
    if config.model_type == "lora" and not (quantised or config.enable_group_offload):
        yield "base_model_precision: int8-quanto (half the bytes of the frozen weights)"
    if config.train_batch_size > 1:
        turns = config.gradient_accumulation_steps * config.train_batch_size
        yield f"train_batch_size: 1 with gradient_accumulation_steps: {turns} (as many samples a step)"
    if config.model_type == "lora" and config.optimizer != "adamw8bit":
        yield "optimizer: adamw8bit (pip install 'pairline[adamw8bit]')"
    if config.model_type == "lora" and not config.enable_group_offload:
        plain = " with base_model_precision: no_change" if quantised else ""
        yield f"enable_group_offload: true{plain} (frozen blocks wait on the CPU, slower)"
    if config.tread_config is None:
        yield "tread_config (some tokens skip some blocks, other gradients)"
    yield f"resolution below {config.resolution:g} (prep has to run again)"
