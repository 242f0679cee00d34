"""From a row to the pixels that a model sees: read, check, decode, frame, degrade.

`pixels_of` runs on the pool; it gives the same bytes whether a degraded picture was stored before or is made now.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from prep.degrade import degrade
from prep.images import Pixels, decode, frame
from prep.places import Place, place_of, read_bytes
from schemas.keys import content_id, pixels_key
from schemas.project import Project
from schemas.recipes import parse_recipe
from schemas.rows import Geometry, PairRow, Reference
from schemas.storage import write_aside


@dataclass(frozen=True, slots=True)
class Picture:
    """All that one training picture is made of."""

    place: Place
    path: str  # of the image, in its place
    image_id: str  # that its bytes must have
    view: str  # how the file becomes an upright picture
    geometry: Geometry
    recipe: str | None = None
    seed: int | None = None
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
    if reference.recipe is None or reference.seed is None:
        return plain
    geometry = reference.geometry.as_key()
    key = pixels_key(reference.image_id, geometry, reference.view, reference.recipe, reference.seed)
    stored = project.pixel_store / key[:2] / f"{key}.png"
    return replace(plain, recipe=reference.recipe, seed=reference.seed, stored=stored)


def pixels_of(picture: Picture) -> Pixels | Refusal:
    """Make a picture's pixels, or say why not."""
    if picture.stored is not None and picture.stored.exists():
        stored = cv2.imread(str(picture.stored), cv2.IMREAD_COLOR)
        if stored is not None:
            return np.ascontiguousarray(stored[:, :, ::-1], np.uint8)
    try:
        data = read_bytes(picture.place, picture.path)
    except OSError as fault:
        return Refusal(f"cannot be read: {fault.strerror or fault}", lasting=False)
    if content_id(data) != picture.image_id:
        return Refusal("changed since prep scan", lasting=False)
    try:
        decoded = decode(data, picture.view)
    except MemoryError:
        return Refusal("not enough memory to decode it", lasting=False)
    if isinstance(decoded, str):
        return Refusal(decoded, lasting=True)
    if picture.recipe is None or picture.seed is None:
        return frame(decoded, picture.geometry)
    recipe = parse_recipe(picture.recipe)
    if recipe.degrade_at == "source":
        whole = degrade(np.asarray(decoded), recipe, picture.seed)
        return frame(Image.fromarray(whole), picture.geometry)
    return degrade(frame(decoded, picture.geometry), recipe, picture.seed)


def store(picture: Picture) -> Refusal | None:
    """Write a degraded picture to its place, lossless; None when it is there."""
    pixels = pixels_of(picture)
    if isinstance(pixels, Refusal):
        return pixels
    done, data = cv2.imencode(".png", pixels[:, :, ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 1])
    assert done, "an 8-bit colour picture always encodes"
    with write_aside(picture.store) as aside:
        aside.write_bytes(data.tobytes())
    return None
