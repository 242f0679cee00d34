"""What is looked for in another trainer's cache, and what a format's module answers.

Everything that a file does not record is None here, and what is None proves nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from prep.geometry import Size
from prep.pixels import Picture
from schemas.stores import Store

ABSENT = "not in this cache"


@dataclass(frozen=True, slots=True)
class Wanted:
    """One latent that the project needs."""

    key: str
    folder: Store  # the encoder's key included
    dataset_id: str
    picture: Picture
    file: Path | None  # of the image; None if it is not a file of a local folder
    size: Size  # of the upright image
    mark: tuple[int, int]  # bytes and time of change of the image when it was scanned
    odd: str | None  # what about the image others read differently; None of a plain one
    target: "Wanted | None" = None  # of a reference: the latent of its target
    place: int = 0  # of a reference among those of its target


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a latent lies."""

    file: Path
    entry: str = ""  # of a file that holds several


@dataclass(frozen=True, slots=True)
class FoundLatent:
    """What a slot holds and what is recorded of it."""

    values: Tensor  # C × H × W, normalised
    original: Size | None  # of the image that it was made of
    resized: Size | None  # of that image before the crop
    crop: tuple[int, int] | None  # top and left of the crop
    resampling: frozenset[str]  # methods that it may have been resized by, if it was; none if nothing is known


@dataclass(frozen=True, slots=True)
class FoundText:
    """One encoded prompt."""

    files: tuple[Path, ...]  # that hold it; the first was read
    embed: Tensor  # tokens × width
    pooled: Tensor | None


class Cache(Protocol):
    """One folder of files in one format. A text in place of a result says why there is none: its kind, then a colon."""

    def files(self) -> Sequence[Path]:
        """List the files that are in this format by their names."""

    def slot(self, wanted: Wanted) -> Slot | str:
        """Say where a latent would lie; the file exists."""

    def latent(self, wanted: Wanted, slot: Slot) -> FoundLatent | str:
        """Read a latent."""

    def text(self, prompt: str) -> FoundText | str:
        """Find and read a prompt."""


def unreadable(fault: Exception) -> str:
    """Say that a file cannot be read."""
    lines = str(fault).splitlines()
    return f"unreadable: {lines[0] if lines else type(fault).__name__}"
