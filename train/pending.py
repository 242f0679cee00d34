"""Steps whose numbers are on their way to the host: they are read one step late, so that launching never waits.

Whoever needs what training made to be settled (a checkpoint, an evaluation, the end) calls `settle` before; a further
number of a step is an element of what `push` is given and a field of `Arrived`.
"""

import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from train.compiling import compiled_graphs
from train.order import Turn


@dataclass(frozen=True, slots=True)
class Taken:
    """A step that was launched: what is known of it without asking the accelerator."""

    step: int
    turn: Turn
    rate: float  # learning rate
    waited: float  # seconds that it waited for data
    parts: tuple[Tensor, ...]  # losses of its batches in this process, where they were computed


@dataclass(frozen=True, slots=True)
class Arrived:
    """The numbers of a step, on the host."""

    loss: float  # of all processes
    stops: bool  # whether one of them was asked to stop
    norm: float  # of the gradient before it was scaled down
    seconds: float  # since the step before had arrived, or the clock was set
    compiled: bool  # whether something was compiled meanwhile, or when the step was launched


def lateness(device: torch.device) -> int:
    """Return by how many steps numbers are read late: on a CPU there is nothing to wait for."""
    return 1 if device.type == "cuda" else 0


class Pending(AbstractContextManager["Pending"]):
    """Hands every step to `tell` when its numbers are there, in order; left early, those that can still be had."""

    def __init__(self, tell: Callable[[Taken, Arrived], None], late: int) -> None:
        """`tell` may raise, which ends it all: later steps are not told."""
        self._tell, self._late = tell, late
        self._coming: deque[tuple[Taken, Tensor, torch.cuda.Event | None, int]] = deque()
        self._since, self._graphs = time.monotonic(), compiled_graphs()
        self._stops = False

    def push(self, taken: Taken, numbers: Tensor) -> None:
        """Have the numbers of a step copied as soon as they are computed: loss, wishes to stop, norm."""
        there = numbers.to("cpu", non_blocking=True)  # into pinned memory
        arrives = torch.cuda.current_stream(numbers.device).record_event() if numbers.is_cuda else None
        self._coming.append((taken, there, arrives, self._graphs))
        self._graphs = compiled_graphs()

    def settle(self, *, wholly: bool) -> bool:
        """Tell of steps that must have arrived by now, `wholly` of all; returns whether the run is to stop.

        What is told when is the same in every process if `wholly` is.
        """
        while len(self._coming) > (0 if wholly else self._late):
            taken, there, arrives, graphs = self._coming.popleft()
            if arrives is not None:
                arrives.synchronize()
            loss, stops, norm = there.tolist()
            now = time.monotonic()
            seconds, self._since = now - self._since, now
            self._stops |= stops > 0
            try:
                self._tell(taken, Arrived(loss, stops > 0, norm, seconds, compiled_graphs() > graphs))
            except BaseException:
                self._coming.clear()
                raise
        return self._stops

    def set_clock(self) -> None:
        """Leave what was done since the last step out of the next one's seconds."""
        self._since, self._graphs = time.monotonic(), compiled_graphs()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Tell what is left; after a fault, unless the accelerator cannot say any more."""
        with suppress(*() if kind is None else (RuntimeError,)):
            self.settle(wholly=True)
