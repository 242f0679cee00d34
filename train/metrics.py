"""What a run tells of itself: metrics.jsonl, a tracker for curves and pictures, and how quick its steps are.

A resumed run's metrics.jsonl holds nothing after the step that it starts from. A new tracker is a class with the
methods of `Tracker` and a line in `TRACKERS`.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, Protocol

from schemas.errors import UserError
from schemas.project import Project
from schemas.storage import write_aside
from train.grid import Pixels

_RECENT = 20  # steps that what is shown looks back on
_INSTANT = 1e-9


class Tracker(Protocol):
    """Shows curves and pictures somewhere."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point to curves."""

    def picture(self, step: int, name: str, pixels: Pixels) -> None:
        """Add a picture."""

    def close(self) -> None:
        """Write what is left."""


class _TensorBoard:
    def __init__(self, project: Project, first_step: int, settings: Mapping[str, Any]) -> None:
        logging.getLogger("tensorboard").setLevel(logging.ERROR)
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - takes seconds, and only a run needs it

        folder = project.run_folder / "tensorboard"
        self._writer: Any = SummaryWriter(folder, purge_step=first_step + 1)
        if not first_step:
            self._writer.add_text("settings", f"```json\n{json.dumps(settings, indent=1)}\n```", 0)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, pixels: Pixels) -> None:
        self._writer.add_image(name, pixels, step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, project: Project, first_step: int, settings: Mapping[str, Any]) -> None:
        self._wandb = import_module("wandb")
        trainer = project.trainer
        name = trainer.tracker_run_name
        project.run_folder.mkdir(parents=True, exist_ok=True)
        known = project.run_folder / "wandb-id.txt"  # a resumed run goes on with its own curves
        identity = known.read_text().strip() if first_step and known.exists() else self._wandb.util.generate_id()
        known.write_text(identity)
        self._run = self._wandb.init(
            project=trainer.tracker_project_name, name=name, id=identity, resume="allow", config=dict(settings),
            dir=str(project.run_folder),
        )  # fmt: skip

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def picture(self, step: int, name: str, pixels: Pixels) -> None:
        self._run.log({name: self._wandb.Image(pixels)}, step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS: Mapping[str, Callable[[Project, int, Mapping[str, Any]], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
}


@dataclass(frozen=True, slots=True)
class _Timed:
    """A step: seconds in all and of waiting for data, and how many samples it took."""

    seconds: float
    samples: int
    waited: float


class Pace:
    """How quick steps are, as far as they show it: the first and those that something was compiled for do not.

    They count all the same as long as there are no others.
    """

    def __init__(self) -> None:
        self._steps: list[_Timed] = []
        self._steady: list[_Timed] = []

    def add(self, seconds: float, samples: int, waited: float, *, compiled: bool) -> None:
        """Count a step; it waited for data for some of its seconds."""
        step = _Timed(seconds, samples, waited)
        if self._steps and not compiled:
            self._steady.append(step)
        self._steps.append(step)

    @property
    def seconds_per_step(self) -> float | None:
        """Return the median; None without a step."""
        return median(one.seconds for one in self._counted) if self._steps else None

    @property
    def data_wait(self) -> float | None:
        """Return the share of time that steps waited for data; None without a step."""
        return _waited(self._counted) if self._steps else None

    def recent(self) -> list[str]:
        """Say how quick the last steps were; only what the last one took while none shows more."""
        last = self._steady[-_RECENT:]
        if not last:
            return [f"{self._steps[-1].seconds:.1f} s for this step"]
        seconds = max(sum(one.seconds for one in last), _INSTANT)
        rate = sum(one.samples for one in last) / seconds
        return [f"{seconds / len(last):.2f} s/step", f"{rate:.2f} samples/s", f"data {_waited(last):.0%}"]

    @property
    def _counted(self) -> Sequence[_Timed]:
        return self._steady or self._steps


def _waited(steps: Sequence[_Timed]) -> float:
    # What a step waited may lie in the seconds of the one before, which is told after it was launched.
    return min(1.0, sum(one.waited for one in steps) / max(sum(one.seconds for one in steps), _INSTANT))


def check_tracker(project: Project) -> None:
    """Raise UserError if the library of `report_to` is not installed."""
    if project.trainer.report_to == "wandb" and find_spec("wandb") is None:
        raise UserError("report_to: wandb is not installed; pip install 'pairline[wandb]', or report_to: tensorboard")


class Metrics(AbstractContextManager["Metrics"]):
    """Appends to a run's metrics.jsonl and tells the tracker; a quiet one does neither."""

    def __init__(self, project: Project, first_step: int, settings: Mapping[str, Any], *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._tracker: Tracker | None = None
        if quiet:
            return
        path = project.run_folder / "metrics.jsonl"
        kept = "".join(f"{line}\n" for line, step in _lines(path) if first_step and step <= first_step)
        if not path.exists() or path.read_text(errors="replace") != kept:
            with write_aside(path) as aside:
                aside.write_text(kept)
        self._file = path.open("a")
        kind = TRACKERS.get(project.trainer.report_to)
        self._tracker = kind(project, first_step, settings) if kind is not None else None

    def write(self, step: int, **values: float | int) -> None:
        """Append numbers of one step; raises UserError if they cannot be written."""
        if self._quiet:
            return
        try:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        except OSError as fault:
            raise UserError(
                f"{self._file.name}: cannot be written: {fault.strerror or fault}; "
                "the same command resumes from the last checkpoint"
            ) from fault
        if self._tracker is not None:
            self._tracker.scalars(step, values)

    def picture(self, step: int, name: str, pixels: Pixels) -> None:
        """Show a picture, where there is a tracker."""
        if self._tracker is not None:
            self._tracker.picture(step, name, pixels)

    def __exit__(self, *_: object) -> None:
        if self._quiet:
            return
        with suppress(OSError):  # of a line that could not be written, which was told
            self._file.close()
        if self._tracker is not None:
            self._tracker.close()


def _lines(path: Path) -> Iterator[tuple[str, int]]:
    """Yield the lines of an earlier run and their steps; one that a crash left damaged is left out."""
    text = path.read_text(errors="replace") if path.exists() else ""
    for line in text.splitlines():
        with suppress(ValueError, LookupError, TypeError):
            yield line, int(json.loads(line)["step"])
