"""The modes of `prep cache` that look after stores: which one a command line asks for, and what it comes to.

A new mode is a module beside this one, an option of the command, and a case in `run`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from families import open_project
from prep.upkeep.collect import collect
from prep.upkeep.compact import compact
from prep.upkeep.explain import explain
from prep.upkeep.stats import stats
from prep.upkeep.verify import verify
from schemas.project import Project
from schemas.summaries import Summary


@dataclass(frozen=True, slots=True)
class Asked:
    """The options of the modes, as they were given."""

    verify: bool = False
    repair: bool = False
    decode: int | None = None
    compact: bool = False
    stats: bool = False
    explain: str | None = None
    gc: bool = False
    also: Sequence[Path] = ()
    delete: bool = False
    dry_run: bool = False
    others: Sequence[str] = ()  # given options that only encoding has

    @property
    def mode(self) -> str | None:
        """Name the mode that is asked for, none to encode; raises ValueError if options do not go together."""
        given = {
            "--verify": self.verify, "--compact": self.compact, "--stats": self.stats,
            "--explain": self.explain is not None, "--gc": self.gc,
        }  # fmt: skip
        modes = [name for name, there in given.items() if there]
        if len(modes) > 1:
            raise ValueError(f"{' and '.join(modes)} do not go together; give one")
        mode = modes[0] if modes else None
        parts = {
            "--repair": (self.repair, "--verify"), "--decode": (self.decode is not None, "--verify"),
            "--also": (bool(self.also), "--gc"), "--delete": (self.delete, "--gc"),
        }  # fmt: skip
        for name, (there, owner) in parts.items():
            if there and owner != mode:
                raise ValueError(f"{name} goes with {owner}")
        encoding = [*self.others, *(["--dry-run"] if self.dry_run and mode not in (None, "--compact", "--gc") else [])]
        if mode is not None and encoding:
            raise ValueError(f"{' and '.join(encoding)} {'does' if len(encoding) == 1 else 'do'} not go with {mode}")
        if self.delete and self.dry_run:
            raise ValueError("--delete and --dry-run do not go together; --gc alone is a dry run")
        return mode


def run(project: Project, asked: Asked) -> Summary:
    """Do what a mode is for, but for the encoding that follows a repair."""
    match asked.mode:
        case "--verify":
            return verify(project, repair=asked.repair, decode=asked.decode)
        case "--compact":
            return compact(project, dry_run=asked.dry_run)
        case "--stats":
            return stats(project)
        case "--explain":
            return explain(project, asked.explain or "")
        case "--gc":
            return collect(project, [open_project(one) for one in asked.also], delete=asked.delete)
    raise AssertionError("no mode is asked for")
