"""How every command talks: progress and logs on stderr, results on stdout, 0 done, 1 user error.

A command's body runs inside `reporting`; long work counts itself with `progress`.
"""

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from tqdm import tqdm

from schemas.errors import UserError
from schemas.summaries import Summary, as_json

log = logging.getLogger("pairline")

_LINE_EVERY = 5.0  # seconds between plain progress lines
_NAMED = 5  # rejected rows named one by one


class Progress(Protocol):
    """Counts finished work."""

    def update(self, n: int = 1) -> object:
        """Count `n` more."""

    def set_postfix_str(self, text: str) -> None:
        """Show text behind the counter."""


class _Lines:
    """Progress where there is no terminal: a log line now and then."""

    def __init__(self, label: str, total: int, unit: str, done: int) -> None:
        self._label, self._total, self._unit = label, total, unit
        self._done = done
        self._first, self._text = done, ""
        self._start = self._last = time.monotonic()

    def update(self, n: int = 1) -> None:
        self._done += n
        if time.monotonic() - self._last >= _LINE_EVERY and self._done < self._total:
            self._last = time.monotonic()
            self.tell()

    @property
    def counted(self) -> bool:
        return self._done > self._first

    def set_postfix_str(self, text: str) -> None:
        self._text = f", {text}" if text else ""

    def tell(self) -> None:
        rate = (self._done - self._first) / max(time.monotonic() - self._start, 1e-9)
        log.info("%s: %d of %d, %.1f %ss/s%s", self._label, self._done, self._total, rate, self._unit, self._text)


@contextmanager
def progress(label: str, total: int, unit: str, done: int = 0, *, quiet: bool = False) -> Iterator[Progress]:
    """Count work: a bar with rate and time left on a terminal, plain lines otherwise, nothing at all if quiet."""
    if quiet or sys.stderr.isatty():
        with tqdm(total=total, initial=done, desc=label, unit=unit, dynamic_ncols=True, disable=quiet) as bar:
            yield bar
        return
    lines = _Lines(label, total, unit, done)
    yield lines
    if lines.counted:
        lines.tell()


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno == logging.INFO else f"{record.levelname.lower()}: {text}"


@contextmanager
def reporting() -> Iterator[None]:
    """Send pairline's log to stderr; turn a UserError into its message and exit status 1."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter("%(message)s"))
    before = log.handlers, log.level, log.propagate
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.INFO)
    try:
        yield
    except UserError as fault:
        log.error("%s", fault)
        raise SystemExit(1) from None
    except OSError as fault:
        log.error("%s: %s", fault.filename or "cannot go on", fault.strerror or fault)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        log.error("interrupted; the same command goes on from what is finished")
        raise SystemExit(130) from None
    finally:
        log.handlers, log.level, log.propagate = before


# Reasons that the configuration asks for: they are counted, not warned of.
_CHOSEN = ("not drawn", "duplicate", "near duplicate", "filtered")


def tell_rejected(dataset_id: str, rejected: Sequence[tuple[str, str]], count: int, table: str) -> None:
    """Name one rejected row of each kind, of `count`; the table has them all."""
    kinds = {reason.partition(":")[0]: (path, reason) for path, reason in reversed(rejected)}
    told = [one for kind, one in reversed(kinds.items()) if kind not in _CHOSEN][:_NAMED]
    for path, reason in told:
        log.warning("%s: %s: %s", dataset_id, printable(path), reason)
    if told and count > len(told):
        more = count - len(told)
        log.warning("%s: %d more are rejected; column `reject` of %s says why", dataset_id, more, table)


def printable(text: str) -> str:
    """Spell a name on one line, whatever is in it."""
    return text if text.isprintable() else text.encode("unicode_escape").decode()


def warn(warnings: Iterable[str]) -> None:
    """Tell what was odd in the configuration, before the work starts."""
    for warning in warnings:
        log.warning("%s", warning)


def report(summary: Summary, as_json_document: bool) -> None:
    """Print what was done: one JSON document, or lines for a person."""
    text = as_json(summary) if as_json_document else "\n".join(summary.lines())
    sys.stdout.write(text + "\n")
