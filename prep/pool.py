"""A pool of processes in which one task is one item and a crashed worker costs one item.

`each` is the way in. Workers are spawned, so tasks are functions of a module and nothing leaks in from the parent.
"""

import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import multiprocess
from multiprocess.connection import wait

from schemas.errors import UserError

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

_AHEAD = 4  # items in flight or waiting to be yielded, per worker: what bounds memory


@dataclass(frozen=True, slots=True)
class Crash:
    """What stands in for the result of an item whose worker died."""

    reason: str


def default_workers() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def each(
    task: Callable[[ItemT], ResultT], items: Sequence[ItemT], workers: int, limit_s: float | None = None
) -> Iterator[tuple[ItemT, ResultT | Crash]]:
    """Yield (item, result) in the order of `items`, worked on ahead by `workers` processes; by one worker, in here.

    A worker that takes longer than `limit_s` seconds for one item is killed, which needs a process even of one worker.
    A task reports faults in its result. An exception is a bug: it is raised here with the worker's traceback. Raises
    UserError if workers cannot be started at all.
    """
    if workers <= 1 and limit_s is None:
        for item in items:
            yield item, task(item)
        return
    pool: _Pool[ItemT, ResultT] = _Pool(task, items, max(1, min(workers, len(items))), limit_s)
    try:
        yield from pool.results()
    finally:
        pool.close()


class _Pool(Generic[ItemT, ResultT]):
    """Workers by their pipe, and the items each is busy with."""

    def __init__(
        self, task: Callable[[ItemT], ResultT], items: Sequence[ItemT], workers: int, limit_s: float | None
    ) -> None:
        self._context = multiprocess.get_context("spawn")
        self._task, self._items, self._workers, self._limit_s = task, items, workers, limit_s
        self._next = 0  # position of the item to hand out next
        self._idle: list[Any] = []  # pipes
        self._busy: dict[Any, int] = {}  # pipe -> position of its item
        self._processes: dict[Any, Any] = {}
        self._starting: set[Any] = set()  # pipes whose worker has not said anything yet
        self._since: dict[Any, float] = {}  # pipe -> when its worker began the item, if there is a limit
        self._overdue: set[Any] = set()  # pipes whose worker was killed for taking too long

    def results(self) -> Iterator[tuple[ItemT, ResultT | Crash]]:
        done: dict[int, ResultT | Crash] = {}
        for position, item in enumerate(self._items):
            while position not in done:
                self._hand_out(position + _AHEAD * self._workers)
                for pipe in wait(list(self._busy), self._patience()):
                    if pipe in self._starting:
                        self._welcome(pipe)
                    else:
                        finished = self._busy.pop(pipe)
                        done[finished] = self._fetch(pipe, self._items[finished])
                self._kill_overdue()
            yield item, done.pop(position)

    def _patience(self) -> float | None:
        """Return how long to wait before someone may be overdue."""
        if self._limit_s is None:
            return None
        return max(0.01, min(self._since.values(), default=time.monotonic()) + self._limit_s - time.monotonic())

    def _kill_overdue(self) -> None:
        now = time.monotonic()
        for pipe in [pipe for pipe, since in self._since.items() if now - since > (self._limit_s or 0)]:
            self._since.pop(pipe)
            if pipe in self._busy and not pipe.poll():
                self._overdue.add(pipe)
                self._processes[pipe].kill()  # told when its result is fetched

    def _hand_out(self, end: int) -> None:
        """Give items before position `end` to idle workers, starting workers up to their number."""
        while self._next < min(end, len(self._items)) and len(self._busy) < self._workers:
            pipe = self._idle.pop() if self._idle else self._start()
            self._busy[pipe] = self._next
            with suppress(BrokenPipeError):  # it died before its first item: told when its result is fetched
                pipe.send_bytes(pickle.dumps(self._items[self._next]))
            if pipe not in self._starting:
                self._clock(pipe)
            self._next += 1

    def _clock(self, pipe: Any) -> None:
        if self._limit_s is not None:
            self._since[pipe] = time.monotonic()

    def _start(self) -> Any:
        here, there = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(there, self._task), daemon=True)
        with _interrupts_ignored():  # the worker inherits it: the parent decides
            process.start()
        there.close()
        self._processes[here] = process
        self._starting.add(here)
        return here

    def _welcome(self, pipe: Any) -> None:
        """Take a worker's first word, which says that it could import what it needs."""
        self._starting.remove(pipe)
        self._clock(pipe)
        try:
            pipe.recv()
        except (EOFError, ConnectionResetError):
            raise UserError(
                "worker processes cannot start; a script that calls pairline needs its calls below "
                'if __name__ == "__main__": (or pass workers=1)'
            ) from None

    def _fetch(self, pipe: Any, item: ItemT) -> ResultT | Crash:
        self._since.pop(pipe, None)
        try:
            result, failure = pickle.loads(pipe.recv_bytes())
        except (EOFError, ConnectionResetError):
            process = self._processes.pop(pipe)
            process.join()
            pipe.close()
            if pipe in self._overdue:
                return Crash(f"it took longer than {self._limit_s:g} s")
            return Crash(f"its worker process died with exit status {process.exitcode}")
        if isinstance(failure, UserError):
            raise failure
        if failure is not None:
            raise RuntimeError(f"a worker process failed on {item!r}:\n{failure}")
        self._idle.append(pipe)
        answer: ResultT = result
        return answer

    def close(self) -> None:
        for pipe, process in self._processes.items():
            pipe.close()
            if pipe in self._busy:
                process.terminate()
            process.join()


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Ignore Ctrl-C for a moment; only the main thread may set signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _serve(pipe: Any, task: Callable[[Any], Any]) -> None:
    """Run in the worker: one item in, one result out, until the pipe closes.

    Both are pickled here: the pipe's own `send` would go through `dill`, which takes twenty times as long.
    """
    os.environ["OPENCV_FOR_THREADS_NUM"] = "1"  # should OpenCV be loaded later
    if "cv2" in sys.modules:
        sys.modules["cv2"].setNumThreads(1)
    pipe.send(None)
    while True:
        try:
            item = pickle.loads(pipe.recv_bytes())
        except (EOFError, ConnectionResetError):
            return
        try:
            answer = pickle.dumps((task(item), None))
        except UserError as fault:
            answer = pickle.dumps((None, fault))
        except Exception:  # noqa: BLE001 - carried to the parent, raised there
            answer = pickle.dumps((None, traceback.format_exc()))
        pipe.send_bytes(answer)
