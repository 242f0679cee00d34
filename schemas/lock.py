"""One writer at a time: a second command that writes the same tables is refused, and told who is at work.

The lock is the operating system's, so it ends with its process; a note beside it says whose it is.
"""

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from schemas.errors import UserError
from schemas.storage import write_aside


@contextmanager
def only_one(folder: Path, command: str) -> Iterator[None]:
    """Hold the lock of a folder; raises UserError, naming who holds it, if someone else does."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"{folder}: {_holder(folder)} is at work there; wait for it, or stop it") from None
    except OSError as fault:
        raise UserError(f"{folder}: cannot be written: {fault.strerror or fault}") from fault
    try:
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        with write_aside(folder / ".holder") as aside:
            aside.write_text(json.dumps({"command": command, "process": os.getpid(), "host": platform.node(),
                                         "since": since}))  # fmt: skip
        yield
    finally:
        (folder / ".holder").unlink(missing_ok=True)
        lock.release()


def _holder(folder: Path) -> str:
    try:
        note = json.loads((folder / ".holder").read_text())
        return f"{note['command']} (process {note['process']} on {note['host']}, since {note['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
