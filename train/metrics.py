"""metrics.jsonl: one line per step, and nothing after the step that a resumed run starts from."""

import json
from pathlib import Path

from schemas.storage import write_aside


class Metrics:
    """Appends steps to a run's metrics.jsonl."""

    def __init__(self, run_folder: Path, first_step: int) -> None:
        path = run_folder / "metrics.jsonl"
        kept = [line for line in _lines(path) if json.loads(line)["step"] <= first_step]
        with write_aside(path) as aside:
            aside.write_text("".join(f"{line}\n" for line in kept))
        self._file = path.open("a")

    def write(self, **values: float | int) -> None:
        """Append one step."""
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _lines(path: Path) -> list[str]:
    """Return the whole lines of an earlier run; one cut short by a crash is left out."""
    if not path.exists():
        return []
    return [line for line in path.read_text().splitlines(keepends=False) if line.startswith("{") and line.endswith("}")]
