"""A pool of processes in which one task is one item and a crashed worker costs one item.

`each` is the way in. Workers are spawned, so tasks are functions of a module and nothing leaks in from the parent.
"""

import gc
import os
import pickle
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar, cast

import multiprocess
from multiprocess import resource_tracker
from multiprocess.connection import wait

from prep.mailbox import Inbox, Outbox
from schemas.errors import UserError

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

_THREADS = ("OPENCV_FOR_THREADS_NUM", "VIPS_CONCURRENCY")  # variables that limit them

_STILLBORN = 3  # workers that may die at their start, one after the other
_AHEAD = 4  # items in flight or waiting to be yielded, per worker: what bounds memory


@dataclass(frozen=True, slots=True)
class Crash:
    """What stands in for the result of an item whose worker died."""

    reason: str
    died: bool = field(default=False, compare=False)  # the worker ended by itself or was killed by someone else


def default_workers() -> int:
    """Return the number of cores that this process may use: its part, if torchrun started several here."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    beside = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, cores // int(beside)) if beside.isdecimal() and int(beside) else cores


def each(
    task: Callable[[ItemT], ResultT], items: Iterable[ItemT], workers: int, limit_s: float | None = None
) -> Iterator[tuple[ItemT, ResultT | Crash]]:
    """Yield (item, result) in the order of `items`, worked on ahead by a crew of its own: see `Crew.each`."""
    with Crew(workers, task) as crew:
        yield from crew.each(task, items, limit_s)


def ahead(items: Generator[ItemT, None, None], most: int) -> Iterator[ItemT]:
    """Yield items that a thread asks for, up to `most` of them before they are wanted here.

    So a crew is kept at work by a caller that is busy with what it got.
    """
    end = object()
    try:
        with ThreadPoolExecutor(1) as thread:
            asked = deque(thread.submit(next, items, end) for _ in range(most))
            try:
                while (item := asked.popleft().result()) is not end:
                    asked.append(thread.submit(next, items, end))
                    yield cast(ItemT, item)
            finally:
                for one in asked:
                    one.cancel()
    finally:
        items.close()


class Crew:
    """Worker processes that go from task to task; none is started before it is needed, or summoned."""

    def __init__(self, workers: int, warm: Callable[[Any], Any]) -> None:
        """`warm` is a task whose module each worker loads at once."""
        self._context = multiprocess.get_context("spawn")
        self.workers, self._warm = max(1, workers), warm
        self._limit_s: float | None = None
        self._idle: list[Any] = []  # pipes
        self._busy: dict[Any, int] = {}  # pipe -> position of its item
        self._processes: dict[Any, Any] = {}
        self._inboxes: dict[Any, Inbox] = {}
        self._stillborn = 0  # workers in a row that died before they said anything
        self._starting: set[Any] = set()  # pipes whose worker has not said anything yet
        self._since: dict[Any, float] = {}  # pipe -> when its worker began the item, if there is a limit
        self._overdue: set[Any] = set()  # pipes whose worker was killed for taking too long

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, *_: object) -> None:
        self._dismiss(list(self._processes))

    def summon(self, most: int | None = None) -> None:
        """Start the workers, or so many, so that they are ready when there is work; one worker is this process."""
        if self.workers > 1:
            self._staff(self.workers if most is None else min(self.workers, most))

    def each(
        self,
        task: Callable[[ItemT], ResultT],
        items: Iterable[ItemT],
        limit_s: float | None = None,
        help_out: Callable[[ItemT], ResultT] | None = None,
    ) -> Iterator[tuple[ItemT, ResultT | Crash]]:
        """Yield (item, result) in the order of `items`, worked on ahead by the workers; by one worker, in here.

        Items are taken a few ahead of what was yielded, never all: a stream of them may be endless.
        A worker that takes longer than `limit_s` seconds for one item is killed, which needs a process even of one
        worker. Until the first worker is ready, this process does `help_out` with items, which must not crash: where
        they are short, all may be done by then. A task reports faults in its result. An exception is a bug: it is
        raised here with the worker's traceback. Raises UserError if workers cannot be started at all.
        """
        if self.workers == 1 and limit_s is None:
            for item in items:
                yield item, task(item)
            return
        self._limit_s = limit_s
        source, ahead = iter(items), dict[int, ItemT]()  # position -> item that was taken and not yielded
        done: dict[int, Any] = {}
        taken = handed = position = 0
        try:
            while True:
                for item in islice(source, position + _AHEAD * self.workers - taken):
                    ahead[taken] = item
                    taken += 1
                if position == taken:
                    return
                while position not in done:
                    self._staff(min(self.workers, taken - handed + len(self._busy)))
                    while handed < taken and self._idle:
                        self._hand_out(handed, task, ahead[handed])
                        handed += 1
                    waiting = self._patience()
                    if help_out is not None and not self._busy and handed < taken:
                        done[handed] = help_out(ahead[handed])
                        handed += 1
                        waiting = 0.0
                    self._listen(done, ahead, waiting)
                    self._kill_overdue()
                yield ahead.pop(position), done.pop(position)
                position += 1
        finally:
            self._dismiss(list(self._busy))  # left over when the caller, or a worker, stopped early

    def _staff(self, workers: int) -> None:
        """Start as many workers as are wanted and not there."""
        while len(self._processes) < workers:
            self._start()

    def _listen(self, done: dict[int, Any], items: Mapping[int, object], wait_s: float | None) -> None:
        """Take in what workers have to say: that they are ready, or their results."""
        for pipe in wait([*self._busy, *self._starting], wait_s):
            if pipe in self._starting:
                self._welcome(pipe)
            else:
                finished = self._busy.pop(pipe)
                done[finished] = self._fetch(pipe, items[finished])

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

    def _hand_out(self, position: int, task: Callable[[Any], Any], item: object) -> None:
        """Give an item to a worker that is idle."""
        pipe = self._idle.pop()
        self._busy[pipe] = position
        if self._limit_s is not None:
            self._since[pipe] = time.monotonic()
        with suppress(BrokenPipeError):  # it died before its item: told when its result is fetched
            pipe.send_bytes(pickle.dumps((task, item)))

    def _start(self) -> None:
        here, there = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(there, self._warm), daemon=True)
        with _interrupts_held_back(), _nameless_main(), _one_thread():  # the worker inherits the first and the last
            process.start()
        there.close()
        self._processes[here] = process
        self._inboxes[here] = Inbox()
        self._starting.add(here)

    def _welcome(self, pipe: Any) -> None:
        """Take a worker's first word, which says that it could import what it needs."""
        self._starting.remove(pipe)
        try:
            pipe.recv()
            self._idle.append(pipe)
            self._stillborn = 0
        except (EOFError, ConnectionResetError):
            self._stillborn += 1
            if self._stillborn == _STILLBORN:
                raise UserError("worker processes cannot start; --workers 1 does without them") from None
            self._processes.pop(pipe).join()  # someone killed it: another takes its place
            self._inboxes.pop(pipe).close()
            pipe.close()

    def _fetch(self, pipe: Any, item: object) -> Any:
        self._since.pop(pipe, None)
        try:
            result, failure = self._inboxes[pipe].unpack(pipe.recv_bytes())
        except (EOFError, ConnectionResetError):
            process = self._processes.pop(pipe)
            process.join()
            pipe.close()
            self._inboxes.pop(pipe).close()
            if pipe in self._overdue:
                return Crash(f"it took longer than {self._limit_s:g} s")
            return Crash(f"its worker process died with exit status {process.exitcode}", died=True)
        if isinstance(failure, UserError):
            raise failure
        if failure is not None:
            raise RuntimeError(f"a worker process failed on {item!r}:\n{failure}")
        self._idle.append(pipe)
        return result

    def _dismiss(self, pipes: Sequence[Any]) -> None:
        """End workers, all at the same time: those that are idle by themselves, busy ones by force."""
        for pipe in pipes:
            pipe.close()
            if self._busy.pop(pipe, None) is not None or pipe in self._starting:
                self._processes[pipe].terminate()
            self._starting.discard(pipe)
            if pipe in self._idle:
                self._idle.remove(pipe)
        for pipe in pipes:
            self._processes.pop(pipe).join()
            self._inboxes.pop(pipe).close()


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Hold back Ctrl-C for a moment: workers inherit that for good, this process is told afterwards."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # it would let them through
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _nameless_main() -> Iterator[None]:
    """Keep a worker from running the program's main file again: its tasks are functions of modules."""
    main = sys.modules["__main__"]
    hidden = {name: getattr(main, name, None) for name in ("__file__", "__spec__")}
    for name in hidden:
        setattr(main, name, None)
    try:
        yield
    finally:
        for name, value in hidden.items():
            setattr(main, name, value)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Have image libraries work in one thread each: there is a worker for every core."""
    before = {name: os.environ.get(name) for name in _THREADS}
    os.environ.update(dict.fromkeys(_THREADS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


def _serve(pipe: Any, _warm: Callable[[Any], Any]) -> None:
    """Run in the worker: one item in, one result out, until the pipe closes.

    Both are pickled here: the pipe's own `send` would go through `dill`, which takes twenty times as long.
    """
    gc.freeze()  # what is imported by now is never looked through again
    pipe.send(None)
    outbox = Outbox()
    while True:
        try:
            task, item = pickle.loads(pipe.recv_bytes())
        except (EOFError, ConnectionResetError):
            outbox.close()
            return
        try:
            answer = outbox.pack((task(item), None))
        except UserError as fault:
            answer = outbox.pack((None, fault))
        except Exception:  # noqa: BLE001 - carried to the parent, raised there
            answer = outbox.pack((None, traceback.format_exc()))
        with suppress(BrokenPipeError):  # the command was killed: nobody asks any more
            pipe.send_bytes(answer)
