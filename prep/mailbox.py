"""How large results leave a worker: arrays lie in shared memory, the pipe carries what they are.

`Outbox` is the worker's end, `Inbox` the parent's. Pickle gives the arrays' bytes apart (protocol 5, PEP 574).
"""

import os
import pickle
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from multiprocess.shared_memory import SharedMemory

_LEAST = 1 << 16  # bytes of arrays from which shared memory is the shorter way
_SHARED = Path("/dev/shm")  # where Linux keeps it; a block that does not fit there would kill its writer


class Outbox:
    """One block of shared memory, grown as needed; the parent reads a result before it hands out the next item."""

    def __init__(self) -> None:
        self._block: Any = None

    def pack(self, result: object) -> bytes:
        """Put a result's arrays into the block, and the rest into a message."""
        buffers: list[pickle.PickleBuffer] = []
        message = pickle.dumps(result, protocol=5, buffer_callback=buffers.append)
        try:
            views = [buffer.raw() for buffer in buffers]
        except BufferError:  # an array that is not contiguous
            return pickle.dumps((None, [], pickle.dumps(result)))
        sizes = [view.nbytes for view in views]
        if sum(sizes) < _LEAST or not self._reserve(sum(sizes)):
            return pickle.dumps((None, [], pickle.dumps(result)))
        start = 0
        for view, size in zip(views, sizes, strict=True):
            self._block.buf[start : start + size] = view
            start += size
        return pickle.dumps((self._block.name, sizes, message))

    def _reserve(self, size: int) -> bool:
        """Have a block of at least `size` bytes; tell whether there is one."""
        if self._block is not None and self._block.size >= size:
            return True
        if _SHARED.is_dir():
            free = os.statvfs(_SHARED)
            if free.f_bavail * free.f_frsize < 2 * size:
                return False
        self.close()
        try:
            self._block = SharedMemory(create=True, size=size)
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Give the block back."""
        if self._block is not None:
            self._block.close()
            with suppress(FileNotFoundError):
                self._block.unlink()
        self._block = None


class Inbox:
    """What one worker's results are read from."""

    def __init__(self) -> None:
        self._block: Any = None

    def unpack(self, packed: bytes) -> Any:
        """Return a result; its arrays are copies, so that the worker may go on, made while other threads run."""
        name, sizes, message = pickle.loads(packed)
        if name is None:
            return pickle.loads(message)
        if self._block is None or self._block.name != name:
            self._drop()
            self._block = SharedMemory(name)
        buffers, start = [], 0
        for size in sizes:
            buffers.append(np.frombuffer(self._block.buf, np.uint8, size, start).copy())
            start += size
        return pickle.loads(message, buffers=buffers)

    def _drop(self) -> None:
        if self._block is not None:
            self._block.close()
        self._block = None

    def close(self) -> None:
        """Forget the worker, and give back what it could not if it died."""
        if self._block is not None:
            with suppress(FileNotFoundError):
                self._block.unlink()
        self._drop()
