"""Several processes, one model each: `torchrun --nproc-per-node N -m train.cli run PROJECT`.

Gradients of what is trained are summed by hand: the frozen network, quantised or not, is nobody's business but its
process's, and what wraps whole networks stumbles over it. A new collective is a method of `Processes`.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from schemas.errors import UserError
from schemas.keys import seed_of

_PATIENCE = timedelta(hours=2)  # others wait while the first evaluates and samples
_AT_ONCE = 64 << 20  # numbers summed together


@dataclass(frozen=True, slots=True)
class Processes:
    """This process among those that train together."""

    rank: int
    count: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Tell whether this one writes files and talks."""
        return self.rank == 0

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Add up the gradients of all processes, in place; one that has none counts as zero."""
        if self.count == 1:
            return
        for group in _groups(parameters):
            flat = torch.cat([_gradient(one).reshape(-1) for one in group])
            _all_reduce(flat)
            parts = torch.split(flat, [one.numel() for one in group])
            for parameter, part in zip(group, parts, strict=True):
                parameter.grad = part.view_as(parameter)

    def sum(self, numbers: Tensor) -> Tensor:
        """Add up numbers over all processes, in place; on an accelerator nothing waits until they are read."""
        if self.count > 1:
            _all_reduce(numbers)
        return numbers

    def agree(self, what: object) -> bool:
        """Tell whether all processes have the same to say."""
        number = float(seed_of(what) >> 11)  # exact in float64
        return self.count == 1 or _all_reduced(number, self.device) == -_all_reduced(-number, self.device)

    def wait(self) -> None:
        """Wait for all others to come here."""
        self.sum(torch.zeros(1, device=self.device)).item()

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """Let the first process go first, the others when it is done."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()


@contextmanager
def processes(device: torch.device) -> Iterator[Processes]:
    """Join the processes that the environment tells of (RANK, WORLD_SIZE, MASTER_ADDR, as torchrun sets them)."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Processes(0, 1, device)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()


def _all_reduced(number: float, device: torch.device) -> float:
    """Return the largest of all processes' numbers."""
    largest = torch.tensor(number, dtype=torch.float64, device=device)
    _all_reduce(largest, dist.ReduceOp.MAX)
    return float(largest.item())


def _all_reduce(tensor: Tensor, how: Any = dist.ReduceOp.SUM) -> None:
    try:
        dist.all_reduce(tensor, how)
    except RuntimeError as fault:
        raise UserError("another process ended, or cannot be reached; it says why") from fault


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _groups(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield parameters of one dtype in groups that are summed together."""
    group: list[Tensor] = []
    for one in parameters:
        if group and (sum(other.numel() for other in group) + one.numel() > _AT_ONCE or one.dtype != group[0].dtype):
            yield group
            group = []
        group.append(one)
    if group:
        yield group
