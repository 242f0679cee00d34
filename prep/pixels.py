"""From a row to the pixels that a model sees: read, check, decode, frame, degrade.

`pixels_of` runs on the pool; it gives the same bytes whether a degraded picture was stored before or is made now.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from prep.degrade import Step, TooLarge, apply, decode_stored, encode, suffix_of
from prep.images import Pixels, decode_pixels, frame
from prep.places import Place, place_of, read_bytes
from schemas.keys import content_id, pixels_key
from schemas.project import Project
from schemas.recipes import degraded_at_source
from schemas.rows import Geometry, PairRow, Reference
from schemas.storage import write_aside


@dataclass(frozen=True, slots=True)
class Picture:
    """All that one training picture is made of."""

    place: Place
    path: str  # of the image, in its place
    image_id: str  # that its bytes must have
    view: str  # how the file becomes an upright picture, and how that is scaled
    geometry: Geometry
    recipe: str | None = None
    seed: int | None = None
    realised: str | None = None  # the steps of the degradation
    stored: Path | None = None  # where prep pairs keeps it, if degraded

    @property
    def name(self) -> str:
        """Name the image for a person."""
        return self.place.name(self.path)

    @property
    def store(self) -> Path:
        """Return where a degraded picture is kept; others have no such place."""
        assert self.stored is not None, "only degraded pictures are stored"
        return self.stored

    @property
    def steps(self) -> list[Step] | None:
        """Return the steps of the degradation, None if the picture is shown as it is."""
        return None if self.realised is None else json.loads(self.realised)

    @property
    def at_source(self) -> bool:
        """Tell a picture that is degraded at its own size, before resize and crop."""
        return self.recipe is not None and degraded_at_source(self.recipe)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why there are no pixels; a lasting one is true of these bytes for ever."""

    reason: str
    lasting: bool


def target_picture(project: Project, row: PairRow) -> Picture:
    """Describe the target of a pair."""
    place = place_of(project, project.dataset(row.dataset_id))
    return Picture(place, row.target_path, row.target_image_id, row.view, row.geometry)


def reference_picture(project: Project, row: PairRow, reference: Reference) -> Picture:
    """Describe one reference of a pair."""
    place = place_of(project, project.dataset(row.store_of(reference)))
    plain = Picture(place, reference.path, reference.image_id, reference.view, reference.geometry)
    return degraded(project, plain, reference.recipe, reference.seed, reference.realised)


def degraded(project: Project, plain: Picture, recipe: str | None, seed: int | None, realised: str | None) -> Picture:
    """Describe a picture degraded, or as it is if there is no recipe."""
    if recipe is None or seed is None:
        return plain
    picture = replace(plain, recipe=recipe, seed=seed, realised=realised)
    geometry = () if picture.at_source else plain.geometry.as_key()
    key = pixels_key(plain.image_id, geometry, plain.view, recipe, seed)
    return replace(picture, stored=project.pixel_store / key[:2] / f"{key}{suffix_of(picture.steps or [])}")


def pixels_of(picture: Picture) -> Pixels | Refusal:
    """Make a picture's pixels, or say why not."""
    steps, seed = picture.steps, picture.seed or 0
    stored = _stored(picture)
    if stored is not None:
        return frame(stored, picture.geometry, picture.view) if picture.at_source else stored
    decoded = upright(picture)
    if isinstance(decoded, Refusal):
        return decoded
    if steps is None:
        return frame(decoded, picture.geometry, picture.view)
    try:
        if picture.at_source:
            return frame(apply(decoded, steps, seed), picture.geometry, picture.view)
        return apply(frame(decoded, picture.geometry, picture.view), steps, seed)
    except TooLarge as fault:
        return Refusal(str(fault), lasting=True)


def upright(picture: Picture) -> Pixels | Refusal:
    """Read and decode the whole image of a picture, or say why not."""
    data = bytes_of(picture)
    if isinstance(data, Refusal):
        return data
    try:
        decoded = decode_pixels(data, picture.view)
    except MemoryError:
        return Refusal("not enough memory to decode it", lasting=False)
    return Refusal(decoded, lasting=True) if isinstance(decoded, str) else decoded


def bytes_of(picture: Picture) -> bytes | Refusal:
    """Read the file of a picture, which must be as it was when it was scanned."""
    try:
        data = read_bytes(picture.place, picture.path)
    except OSError as fault:
        return Refusal(f"cannot be read: {fault.strerror or fault}", lasting=False)
    return data if content_id(data) == picture.image_id else Refusal("changed since prep scan", lasting=False)


def _stored(picture: Picture) -> Pixels | None:
    """Read a picture that prep pairs kept; None if there is none, none that can be read, or one of another size."""
    try:
        stored = decode_stored(picture.stored.read_bytes()) if picture.stored is not None else None
    except (OSError, ValueError):
        return None
    size = (picture.geometry.target_height, picture.geometry.target_width)
    return stored if stored is None or picture.at_source or stored.shape[:2] == size else None


def store(picture: Picture) -> Refusal | None:
    """Write a degraded picture to its place, lossless; None when it is there.

    What is degraded at its own size is kept at its own size.
    """
    decoded = upright(picture)
    if isinstance(decoded, Refusal):
        return decoded
    pixels = decoded if picture.at_source else frame(decoded, picture.geometry, picture.view)
    del decoded  # of a large photograph it is much of what this takes
    try:
        data, _ = encode(pixels, picture.steps or [], picture.seed or 0)
    except TooLarge as fault:
        return Refusal(str(fault), lasting=True)
    with write_aside(picture.store) as aside:
        aside.write_bytes(data)
    return None
