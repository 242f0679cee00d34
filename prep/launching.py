"""Batches of pictures on their way through an image encoder: on a GPU the next are launched before one is read back.

What goes there and comes back lies in pinned memory, so that neither side waits for the other.
"""

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from families.components import values_of
from families.fast_vae import FastEncoder
from families.protocol import Family, Posterior
from prep.images import Pixels
from schemas.summaries import AcceleratorUse

_BEHIND = 3  # batches that a GPU has left while this process is at others: enough for it to be held up a while
_WORTH = 512 << 20  # pixels of one size, from which on compiling for it is repaid


@dataclass(frozen=True, slots=True)
class Flight:
    """A batch that was launched."""

    posterior: Posterior  # on the CPU, but not there before it landed
    images: int
    begin: torch.cuda.Event | None  # of encoding; None on a CPU
    end: torch.cuda.Event | None
    back: torch.cuda.Event | None  # once all is read back


class Launcher:
    """An image encoder that batches are handed to, and a clock beside it."""

    def __init__(self, family: Family, encoder: Any, device: torch.device, fast: FastEncoder | None) -> None:
        self._family, self._encoder, self._device, self._fast = family, encoder, device, fast
        self._begun = self._seconds = self._busy = 0.0
        self._images = 0
        self._waited: defaultdict[str, float] = defaultdict(float)  # seconds, by what for

    @property
    def behind(self) -> int:
        """Return how many batches are left under way while another is made ready."""
        return _BEHIND if self._device.type == "cuda" else 0

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Note how long there is nothing to launch or to land, and what for: `pixels` or `disk`."""
        since = time.monotonic()
        yield
        if self._begun:
            self._waited[what] += time.monotonic() - since

    def launch(self, pixels: Sequence[Pixels], size: int, alike: int) -> Flight:
        """Encode pictures of one size, of which there are `alike` in all, in batches of `size` or fewer.

        Raises torch.OutOfMemoryError; what was launched before is not touched by it.
        """
        self._begun = self._begun or time.monotonic()
        there = self._brought(pixels, size, alike)
        begin = self._mark()
        posterior = self._family.encode_images(self._encoder, there)
        mean, std = (one[: len(pixels)].contiguous() for one in (posterior.mean, posterior.std))
        end = self._mark()
        back = Posterior(mean.to("cpu", non_blocking=True), std.to("cpu", non_blocking=True))  # pinned, if from a GPU
        return Flight(back, len(pixels), begin, end, self._mark())

    def land(self, flight: Flight) -> Posterior:
        """Wait for a batch, in the order they were launched, and return what became of it."""
        if flight.begin is not None and flight.end is not None and flight.back is not None:
            flight.back.synchronize()
            self._busy += flight.begin.elapsed_time(flight.end) / 1000
            self._seconds = time.monotonic() - self._begun
            self._images += flight.images
        return flight.posterior

    def used(self) -> AcceleratorUse | None:
        """Say how well the GPU was used; None if there is none, or nothing was encoded."""
        if not self._images:
            return None
        compiling = self._fast.seconds if self._fast is not None else 0.0
        seconds = self._seconds - compiling
        busy = self._busy / seconds
        return AcceleratorUse(busy, self._images, seconds, compiling, self._waited["pixels"], self._waited["disk"])

    def _mark(self) -> torch.cuda.Event | None:
        """Return what tells when the GPU is done with all that it was given."""
        if self._device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _brought(self, pixels: Sequence[Pixels], size: int, alike: int) -> Tensor:
        """Bring pictures to where they are encoded.

        Where the encoder is compiled for this size, a short batch is filled up with its last picture.
        """
        height, width, channels = pixels[0].shape
        compiled = self._fast is not None and alike * height * width >= _WORTH
        filling = max(0, size - len(pixels)) if compiled else 0
        shape = (len(pixels) + filling, height, width, channels)
        pinned = torch.empty(shape, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        np.stack([*pixels, *[pixels[-1]] * filling], out=pinned.numpy())
        there = pinned.to(self._device, non_blocking=True)
        if self._fast is not None and compiled and not self._fast.prepare(values_of(there).to(torch.bfloat16)):
            return there[: len(pixels)]
        return there
