"""What a user did wrong, said so that it can be mended.

A command catches `UserError` only, prints it and exits with 1; any other exception is a bug and keeps its traceback.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


class UserError(Exception):
    """A mistake the user can mend: the message says where, what, and what to do."""


class DamagedTable(UserError):
    """A table that cannot be read: a damaged file, or of another kind or format."""


class Unreachable(UserError):
    """A service that does not answer, or refuses: nothing is known of what it holds."""


def first_line(fault: BaseException, longest: int = 120) -> str:
    """Return the first line of a message that is not blank, shortened; of a fault without a message its kind."""
    lines = (line.strip() for line in str(fault).splitlines())
    return next(filter(None, lines), type(fault).__name__)[:longest]


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing wrong in a configuration file."""

    file: str
    key: str
    problem: str
    value: str | None = None
    hint: str | None = None

    def __str__(self) -> str:
        shown = f"{self.key} = {self.value}" if self.value is not None else self.key
        hint = f"; {self.hint}" if self.hint else ""
        return f"{self.file}: {shown}: {self.problem}{hint}" if shown else f"{self.file}: {self.problem}{hint}"


class ConfigError(UserError):
    """Everything wrong in a project's files, all at once."""

    def __init__(self, folder: Path, faults: Sequence[Fault]) -> None:
        self.faults = tuple(faults)
        if len(self.faults) == 1:
            super().__init__(f"{folder}: {self.faults[0]}")
        else:
            lines = "\n".join(f"  {fault}" for fault in self.faults)
            super().__init__(f"{len(self.faults)} faults in {folder}:\n{lines}")
