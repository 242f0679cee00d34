"""Asking services for files: again where that may help, and with reasons that can be shown to anyone.

`open_url` opens what fsspec reads, `stubborn` asks for one thing, `fetch_all` for many files at once. Clients raise
errors of many kinds; here they become OSError, and what a URL may hold besides host and path is cut out of what they
say.
"""

import errno
import json
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

from schemas.errors import UserError
from schemas.keys import canonical

if TYPE_CHECKING:  # workers of the pool start in half the time without what checks options
    from schemas.datasets import DatasetConfig

ResultT = TypeVar("ResultT")

_ATTEMPTS = 3
_PAUSE_S = 0.5  # before the second attempt, about; doubled each time

_LASTING = (
    FileNotFoundError, FileExistsError, PermissionError, NotADirectoryError, IsADirectoryError, ImportError, TypeError,
    ValueError, UserError,
)  # fmt: skip
_LASTING_NAMES = ("NoCredentialsError", "PartialCredentialsError", "ParamValidationError", "ProfileNotFound")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # of this machine's disk
BUSY = (408, 409, 425, 429)  # HTTP: of the answers that blame the request, those that may be otherwise later


@lru_cache(maxsize=64)
def open_url(url: str, options: str = "{}") -> tuple[Any, str]:
    """Return (fsspec file system, path in it); raises UserError if nothing reads such URLs."""
    import fsspec  # noqa: PLC0415 - most projects need none

    try:
        system, root = fsspec.core.url_to_fs(url, **json.loads(options))
    except (ImportError, ValueError) as fault:
        raise UserError(f"{masked(url)}: cannot be opened: {masked(str(fault))}{_how_to_install(url)}") from fault
    if hasattr(system, "retries"):  # s3fs would ask 25 times, we a few times more
        system.retries = 2
    return system, root.rstrip("/")


def _how_to_install(url: str) -> str:
    """Say what is to be installed for a URL, if fsspec knows."""
    from importlib.util import find_spec  # noqa: PLC0415 - needed by the way to an error alone

    from fsspec.registry import known_implementations  # noqa: PLC0415

    known = known_implementations.get(url.partition("://")[0])
    package = known["class"].partition(".")[0] if known is not None else "fsspec"
    return f"; pip install {package}" if package != "fsspec" and find_spec(package) is None else ""


def url_options(url: str, dataset: "DatasetConfig") -> str:
    """Spell what fsspec needs to know besides the URL, from a dataset's `aws_*` options; only S3 needs anything."""
    if not url.startswith(("s3:", "s3a:")):
        return "{}"
    client = {"region_name": dataset.aws_region_name, "endpoint_url": dataset.aws_endpoint_url}
    options: dict[str, object] = {
        "key": dataset.aws_access_key_id,
        "secret": dataset.aws_secret_access_key,
        "token": dataset.aws_session_token,
        "client_kwargs": {name: value for name, value in client.items() if value},
        "config_kwargs": {
            "max_pool_connections": dataset.aws_max_pool_connections,
            "connect_timeout": 10,
            "read_timeout": 60,
            "retries": {"mode": "standard", "total_max_attempts": 1},  # who opens it asks again
        },
        "max_concurrency": 1,  # of one file: without, s3fs asks for each file's size first
    }
    return canonical({name: value for name, value in options.items() if value})


def stubborn(ask: Callable[[], ResultT], attempts: int = _ATTEMPTS) -> ResultT:
    """Ask a service several times; raises OSError, whatever its client raises."""
    for attempt in range(attempts):
        try:
            return ask()
        except Exception as fault:
            if attempt == attempts - 1 or _is_lasting(fault):
                raise as_os_error(fault) from fault
            _pause(attempt)
    raise AssertionError("the last attempt returns or raises")


def _pause(attempt: int) -> None:
    """Wait before another attempt; not all callers at once."""
    time.sleep(_PAUSE_S * 2**attempt * random.uniform(0.5, 1))


def fetch_all(
    system: Any,
    files: Sequence[str],
    starts: Sequence[int] | None = None,
    ends: Sequence[int | None] | None = None,
    attempts: int = _ATTEMPTS,
) -> list[bytes | OSError]:
    """Read files of an fsspec file system at once, or parts of them; a fault stands in for one that keeps failing.

    Parts run from `starts` to before `ends`, in bytes; a negative start without an end counts from the file's end.
    """
    got: list[bytes | OSError] = [OSError("not asked for")] * len(files)
    left = list(range(len(files)))
    for attempt in range(attempts):
        if attempt:
            _pause(attempt - 1)
        # not `cat`, which takes [ ] * ? in names for patterns
        asked = [[whole[place] for place in left] if whole is not None else None for whole in (files, starts, ends)]
        answers = system.cat_ranges(*asked, on_error="return")
        got_now = dict(zip(left, answers, strict=True))
        for place, answer in got_now.items():
            if isinstance(answer, BaseException):
                got[place] = as_os_error(answer)
                got[place].__cause__ = answer  # type: ignore[union-attr]
            else:
                got[place] = bytes(answer)
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
    if isinstance(fault, FileExistsError):
        return FileExistsError(errno.EEXIST, fault.strerror or text or "there already")
    if isinstance(fault, OSError) and fault.strerror:
        return OSError(fault.errno, masked(fault.strerror))
    return OSError(f"{type(fault).__name__}: {text}" if text else type(fault).__name__)


def masked(text: str) -> str:
    """Cut users, passwords and queries out of the URLs in a text: they may be secrets."""
    return re.sub(r"([a-z][a-z0-9+.-]*://)(?:[^/\s'\"@]*@)?([^\s'\"?]*)(?:\?[^\s'\"]*)?", r"\1\2", text)


def status_of(fault: BaseException) -> int | None:
    """Return the HTTP status of the answer that a fault comes from, as far as its client tells."""
    for one in _causes(fault):
        answer = getattr(one, "response", None)
        if isinstance(answer, dict):  # of botocore
            answer = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
        told = [getattr(place, name, None) for place in (one, answer) for name in ("status", "status_code")]
        if isinstance(one, OSError):  # of aiohttp, `code` may be the parser's own
            told.append(getattr(one, "code", None))
        for status in (answer, *told):
            if isinstance(status, int) and 100 <= status < 600:
                return status
    return None


def codes_of(fault: BaseException) -> list[str]:
    """Return what a service calls a fault, as far as its client tells."""
    answers = [getattr(one, "response", None) for one in _causes(fault)]
    return [str(one.get("Error", {}).get("Code")) for one in answers if isinstance(one, dict)]


def _causes(fault: BaseException) -> Iterator[BaseException]:
    """Yield a fault and what caused it."""
    cause: BaseException | None = fault
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _is_lasting(fault: BaseException) -> bool:
    """Tell a fault that another attempt would not change."""
    status = status_of(fault)
    if status is not None and status >= 400:
        return (status < 500 and status not in BUSY) or status == 501
    here = isinstance(fault, OSError) and fault.errno in FULL
    return here or isinstance(fault, _LASTING) or type(fault).__name__ in _LASTING_NAMES
