"""Ctrl-C and SIGTERM as a wish: the step under way is finished and saved before the run ends."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from schemas.console import log


@contextmanager
def stops() -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether the run was asked to stop; asked a second time, it stops at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set signals
        yield asked.is_set
        return

    def ask(number: int, _frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        log.info("%s: finishing this step and writing a checkpoint", signal.Signals(number).name)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
