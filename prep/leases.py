"""Who encodes what: leases on units of work, so that several processes share a store without a server.

A lease is a small file that its holder keeps alive. No clock of another machine is believed: a lease is dead when what
it says has not changed for `EXPIRY_S` seconds by the clock of who looks at it, or when its process, of the same
machine, is gone. Leases spare work and guard nothing: two that encode the same unit write the same rows.
"""

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from threading import Event, Lock, Thread
from types import TracebackType
from uuid import uuid4

from schemas.errors import UserError
from schemas.storage import MACHINE, runs
from schemas.stores import Store

EXPIRY_S = 60.0
_BEAT_S = 10.0  # between signs of life
_SETTLE_S = 0.2  # between taking over a dead lease and looking whether another did at the same moment
_LOOK_S = 0.5  # between looks for one
_FOLDER = "leases"


class Leases:
    """The leases of one process on the units of any stores."""

    def __init__(self, expiry_s: float = EXPIRY_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._expiry_s, self._clock = expiry_s, clock
        self._me = uuid4().hex
        self._beats = 0
        self._held: dict[tuple[Store, str], None] = {}
        self._seen: dict[tuple[Store, str], tuple[bytes, float]] = {}  # what another's said, and since when
        self._lock, self._done = Lock(), Event()
        self._thread: Thread | None = None

    def __enter__(self) -> "Leases":
        return self

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, at: TracebackType | None) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()
        for store, unit in list(self._held):
            self.release(store, unit)

    def take(self, store: Store, unit: str) -> bool:
        """Take a unit unless another holds it; tell whether it is ours now."""
        name = f"{_FOLDER}/{unit}"
        if store.create(name, self._says()):
            self._hold(store, unit)
            return True
        said = store.read(name)
        if said is None:  # just released
            return False
        before = self._seen.get((store, unit))
        if before is None or before[0] != said:
            self._seen[store, unit] = before = (said, self._clock())
        if not _is_gone(said) and self._clock() - before[1] < self._expiry_s:
            return False
        store.replace(name, self._says())
        time.sleep(_SETTLE_S)
        if not self._is_mine(store.read(name)):
            return False
        self._hold(store, unit)
        return True

    def release(self, store: Store, unit: str) -> None:
        """Give a unit back: it is done, or left. One that cannot be given back dies for want of signs of life."""
        with self._lock, suppress(UserError, OSError):
            self._held.pop((store, unit), None)
            name = f"{_FOLDER}/{unit}"
            if self._is_mine(store.read(name)):
                store.remove(name)

    def _hold(self, store: Store, unit: str) -> None:
        self._seen.pop((store, unit), None)
        with self._lock:
            self._held[store, unit] = None
        if self._thread is None:
            self._thread = Thread(target=self._beat, daemon=True)
            self._thread.start()

    def _beat(self) -> None:
        """Keep what is held alive; what another took over is left to it."""
        while not self._done.wait(min(_BEAT_S, self._expiry_s / 3)):
            self._beats += 1
            for store, unit in list(self._held):
                with self._lock, suppress(UserError, OSError):
                    name = f"{_FOLDER}/{unit}"
                    if (store, unit) in self._held and self._is_mine(store.read(name)):
                        store.replace(name, self._says())

    def _says(self) -> bytes:
        mine = {"holder": self._me, "machine": MACHINE, "process": os.getpid(), "beat": self._beats}
        return json.dumps(mine).encode()

    def _is_mine(self, said: bytes | None) -> bool:
        return said is not None and self._me.encode() in said


def held(store: Store) -> dict[str, bytes]:
    """Return the units of a store on which somebody works, or died on another machine, and what their leases say."""
    found = {unit: store.read(f"{_FOLDER}/{unit}") for unit in store.names(_FOLDER)}
    return {unit: said for unit, said in found.items() if said is not None and not _is_gone(said)}


def is_busy(store: Store) -> bool:
    """Tell whether somebody works on a store; leases that show no sign of life for `EXPIRY_S` are removed."""
    first, until = held(store), time.monotonic() + EXPIRY_S
    while first and time.monotonic() < until:
        time.sleep(_LOOK_S)
        now = held(store)
        if any(first.get(unit) != said for unit, said in now.items()):
            return True
        first = now
    for unit in first:
        store.remove(f"{_FOLDER}/{unit}")
    return False


def _is_gone(said: bytes) -> bool:
    """Tell a lease whose process ended on this machine without giving it back."""
    try:
        holder = json.loads(said)
        return bool(holder["machine"] == MACHINE and not runs(int(holder["process"])))
    except (ValueError, KeyError, TypeError):
        return False  # half written: it changes, or dies
