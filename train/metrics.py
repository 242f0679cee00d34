"""metrics.jsonl: one line per step, and nothing after the step that a resumed run starts from."""

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from schemas.storage import write_aside


class Metrics:
    """Appends steps to a run's metrics.jsonl."""

    def __init__(self, run_folder: Path, first_step: int) -> None:
        path = run_folder / "metrics.jsonl"
        kept = "".join(f"{line}\n" for line, step in _lines(path) if step <= first_step)
        if not path.exists() or path.read_text(errors="replace") != kept:
            with write_aside(path) as aside:
                aside.write_text(kept)
        self._file = path.open("a")

    def write(self, **values: float | int) -> None:
        """Append one step."""
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _lines(path: Path) -> Iterator[tuple[str, int]]:
    """Yield the lines of an earlier run and their steps; one that a crash left damaged is left out."""
    text = path.read_text(errors="replace") if path.exists() else ""
    for line in text.splitlines():
        with suppress(ValueError, LookupError, TypeError):
            yield line, int(json.loads(line)["step"])
