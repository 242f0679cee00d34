"""Asking services for files: again where that may help, and with reasons that can be shown to anyone.

`stubborn` asks for one thing, `fetch_all` for many files at once. Clients raise errors of many kinds; here they become
OSError, and what a URL may hold besides host and path is cut out of what they say.
"""

import errno
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

ResultT = TypeVar("ResultT")

_ATTEMPTS = 3
_PAUSE_S = 0.5  # before the second attempt; doubled each time

_LASTING = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError)
_BUSY = (408, 429)  # HTTP: of the answers that blame the request, those that may be otherwise later


def stubborn(ask: Callable[[], ResultT]) -> ResultT:
    """Ask a service up to three times; raises OSError, whatever its client raises."""
    for attempt in range(_ATTEMPTS):
        try:
            return ask()
        except Exception as fault:
            if attempt == _ATTEMPTS - 1 or _is_lasting(fault):
                raise as_os_error(fault) from fault
            time.sleep(_PAUSE_S * 2**attempt)
    raise AssertionError("the last attempt returns or raises")


def fetch_all(
    system: Any, files: Sequence[str], starts: Sequence[int] | None = None, ends: Sequence[int] | None = None
) -> list[bytes | OSError]:
    """Read files of an fsspec file system at once, or parts of them; a fault stands in for one that fails three times.

    Parts run from `starts` to before `ends`, in bytes.
    """
    got: list[bytes | OSError] = [OSError("not asked for")] * len(files)
    left = list(range(len(files)))
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(_PAUSE_S * 2 ** (attempt - 1))
        # not `cat`, which takes [ ] * ? in names for patterns
        asked = [[whole[place] for place in left] if whole is not None else None for whole in (files, starts, ends)]
        answers = system.cat_ranges(*asked, on_error="return")
        got_now = dict(zip(left, answers, strict=True))
        for place, answer in got_now.items():
            got[place] = as_os_error(answer) if isinstance(answer, BaseException) else bytes(answer)
        left = [place for place, answer in got_now.items()
                if isinstance(answer, BaseException) and not _is_lasting(answer)]  # fmt: skip
        if not left:
            break
    return got


def as_os_error(fault: BaseException) -> OSError:
    """Turn what a client raised into an OSError that says no more than can be shown."""
    text = masked(str(fault))
    if isinstance(fault, FileNotFoundError):  # some say no more than the name
        return FileNotFoundError(errno.ENOENT, fault.strerror or (text if " " in text else "not found"))
    if isinstance(fault, PermissionError):
        return PermissionError(errno.EACCES, fault.strerror or text or "access denied")
    if isinstance(fault, OSError) and fault.strerror:
        return OSError(fault.errno, masked(fault.strerror))
    return OSError(f"{type(fault).__name__}: {text}" if text else type(fault).__name__)


def masked(text: str) -> str:
    """Cut users, passwords and queries out of the URLs in a text: they may be secrets."""
    return re.sub(r"([a-z][a-z0-9+.-]*://)(?:[^/\s'\"@]*@)?([^\s'\"?]*)(?:\?[^\s'\"]*)?", r"\1\2", text)


def _is_lasting(fault: BaseException) -> bool:
    """Tell a fault that another attempt would not change."""
    status = getattr(fault, "status", None)
    blamed = isinstance(status, int) and 400 <= status < 500 and status not in _BUSY
    return blamed or isinstance(fault, _LASTING)
