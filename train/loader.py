"""Batches ahead of the step: a thread plans, a few read, into host memory that is used again.

No processes and no pickles: reading releases the interpreter's lock, and rows are found by offset.
"""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from queue import Queue
from typing import TypeAlias

import torch

from schemas.errors import UserError
from train.data import Batch, Loaded, Room, Shelf, Shown
from train.order import Turn
from train.prompts import Prompts

CPU = torch.device("cpu")
AHEAD = 4  # batches that are read, or being read, before they are asked for
_READERS = 2

_Read: TypeAlias = tuple[Future[Loaded], "_Place"]


class _Place:
    """A room, and when the accelerator is done with what was copied out of it."""

    def __init__(self, device: torch.device) -> None:
        self.room = Room(pinned=device.type == "cuda")
        self._copied = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def left(self) -> None:
        """Note that the copies are on their way."""
        if self._copied is not None:
            self._copied.record()

    def free(self) -> Room:
        """Wait until they arrived."""
        if self._copied is not None:
            self._copied.synchronize()
        return self.room


class Loader(AbstractContextManager["Loader"]):
    """Reads what `turns` plan; `waited` counts the seconds that steps waited for it."""

    def __init__(self, shelf: Shelf, turns: Iterator[Turn], device: torch.device) -> None:
        self._shelf, self._turns, self._device = shelf, turns, device
        self._prompts = Prompts()
        self._places: Queue[_Place | None] = Queue()
        for _ in range(AHEAD):
            self._places.put(_Place(device))
        self._closing = threading.Event()
        self._planned: Queue[Turn | BaseException] = Queue()
        self._reads: Queue[_Read] = Queue()
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="reader")
        self._planner = threading.Thread(target=self._plan, name="planner", daemon=True)
        self._planner.start()
        self.waited = 0.0

    def __exit__(self, *_: object) -> None:
        """Stop reading ahead."""
        self._closing.set()
        self._places.put(None)
        self._readers.shutdown(cancel_futures=True)
        self._planner.join(timeout=60)

    def __iter__(self) -> Iterator[tuple[Turn, Iterator[Batch]]]:
        """Yield every step's turn and the batches of this process; each is read before it is asked for."""
        while True:
            began = time.monotonic()
            turn = self._planned.get()
            self.waited += time.monotonic() - began
            if isinstance(turn, BaseException):
                raise turn
            yield turn, self._batches(len(turn.batches))

    def _batches(self, count: int) -> Iterator[Batch]:
        for _ in range(count):
            began = time.monotonic()
            future, place = self._reads.get()
            loaded = future.result()
            self.waited += time.monotonic() - began
            batch = loaded.to(self._device)
            place.left()
            self._places.put(place)
            yield batch

    def _plan(self) -> None:
        """Hand out reads as long as there is room; a fault of planning reaches the step that waits."""
        try:
            for turn in self._turns:
                self._planned.put(turn)
                for showings in turn.batches:
                    place = self._places.get()
                    if place is None:
                        return
                    self._reads.put((self._readers.submit(self._read, showings, place), place))
        except BaseException as fault:  # noqa: BLE001 - raised again where it can be told
            if not self._closing.is_set():  # else the readers are gone, and nobody waits
                failed: Future[Loaded] = Future()
                failed.set_exception(fault)
                self._reads.put((failed, _Place(CPU)))  # whichever of the two the step waits for
                self._planned.put(fault)

    def _read(self, showings: tuple[Shown, ...], place: _Place) -> Loaded:
        try:
            return self._shelf.read(showings, place.free(), self._prompts)
        except UserError as fault:
            raise UserError(f"samples {', '.join(one.sample_id for one in showings)}: {fault}") from fault
