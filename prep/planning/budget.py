"""What would be encoded and how many bytes it takes: distinct latents, prompts and pictures of matched pairs.

Sizes come from a family's facts, the numbers in them from the checkpoint where it is on this machine.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from families.checkpoints import here, stored_rows
from prep.frames import name_of
from prep.geometry import placed
from prep.matching import BOX, Mask, Numbers
from prep.planning.sides import Match, Side, prompts_of
from schemas.datasets import DatasetConfig
from schemas.family import Width
from schemas.keys import degrade_seed, latent_keys, pixels_key, text_keys
from schemas.project import Project
from schemas.recipes import degraded_at_source
from schemas.rows import Geometry
from schemas.shards import ShardIndex
from schemas.storage import is_aside
from schemas.stores import Store
from schemas.trainer import Posterior

PICTURE_BYTES = 3.0  # per pixel of a noisy picture as PNG; what has no noise takes half, JPEG and WebP far less

_DRAWN = 300_000  # random crops that are drawn to be counted exactly; of more, a bound is told
_VALUE_BYTES = 2  # bfloat16
_CUSTOMARY = (2048, 1536, 1024, 768, 512, 256)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of what encoders give."""

    per_cell: int  # of a latent
    scale: int  # pixels per cell and side
    per_row: int  # of a text embed
    rows: int  # of a text embed at most
    per_pooled: int
    assumed: bool  # the flavour's own numbers, another checkpoint being asked for that is not on this machine

    @property
    def per_prompt(self) -> int:
        """Return the bytes of a prompt all of whose rows are stored."""
        return self.of_prompt(self.rows)

    def of_prompt(self, rows: int) -> int:
        """Return the bytes of a prompt of which so many rows are stored."""
        return rows * self.per_row + self.per_pooled

    def latents(self, boxes: Numbers) -> int:
        """Return the bytes of latents; their Parquet files are some 300 bytes a row larger."""
        return int((boxes[:, 0] // self.scale * (boxes[:, 1] // self.scale)).sum()) * self.per_cell


@dataclass(frozen=True, slots=True)
class Need:
    """What one kind of product comes to."""

    needed: int
    there: int  # in its place already
    bytes: int  # of all that is needed
    bytes_there: int
    exact: bool  # false: at most so many

    def __add__(self, other: "Need") -> "Need":
        return Need(
            self.needed + other.needed,
            self.there + other.there,
            self.bytes + other.bytes,
            self.bytes_there + other.bytes_there,
            self.exact and other.exact,
        )


@dataclass(slots=True)
class _Wanted:
    """Pictures that one store must hold, not yet each once."""

    parts: list[pa.Table] = field(default_factory=list)
    named: bool = True
    undrawn: int = 0  # random crops that were not drawn
    undrawn_boxes: list[Numbers] = field(default_factory=list)

    def once(self) -> pa.Table:
        """Return the pictures, each once."""
        table = pa.concat_tables(self.parts)
        return table.group_by(table.column_names).aggregate([])


def sizes_of(project: Project) -> Sizes:
    """Return the bytes of a project's latents and text embeds."""
    family = project.family
    widths = (family.latent_channels, project.model.text_width, family.pooled_width)
    numbers = [_number(project, one) for one in widths]
    channels, width, pooled = (number for number, _ in numbers)
    own = project.checkpoint == project.model.checkpoint
    return Sizes(
        per_cell=channels * _VALUE_BYTES,
        scale=family.latent_scale,
        per_row=width * _VALUE_BYTES,
        rows=project.text_tokens,
        per_pooled=pooled * _VALUE_BYTES,
        assumed=not own and not all(read for _, read in numbers),
    )


def _number(project: Project, width: Width | None) -> tuple[int, bool]:
    """Return a width, and whether the checkpoint was asked."""
    if width is None:
        return 0, True
    folder = here(project, [width.component])
    try:
        said = json.loads((folder / width.component / "config.json").read_text()) if folder else None
        for key in width.key.split("."):
            said = said[key]  # type: ignore[index]  # what is not so is caught
    except (OSError, ValueError, KeyError, TypeError):
        said = None
    return (said * width.times, True) if isinstance(said, int) else (width.usual, False)


# Pictures


def latents(
    project: Project, matches: Sequence[Match], sizes: Sizes, encoders: tuple[str, str] | None
) -> dict[Store, Need]:
    """Count the latents of every store.

    `encoders` are the keys of targets' and references' encoders; without them no latent is known to be there.
    """
    posterior = project.trainer.posterior
    keys = dict(zip((posterior, "mode"), encoders, strict=True)) if encoders is not None else {}
    stores: dict[tuple[Store, Posterior], list[tuple[Match, Side]]] = {}
    for pairs in matches:
        for place, side in enumerate(pairs.sides if pairs.count else ()):
            folder = project.latent_store(project.dataset(side.store))
            kind: Posterior = "mode" if place else posterior
            stores.setdefault((folder, kind), []).append((pairs, side))
    needs: dict[Store, Need] = {}
    for (folder, kind), sides in stores.items():
        stored = replace(sizes, per_cell=sizes.per_cell * (2 if kind == "moments" else 1))
        need = _latents(project, folder, sides, stored, keys.get(kind))
        needs[folder] = needs[folder] + need if folder in needs else need
    return needs


def _latents(
    project: Project, folder: Store, sides: Sequence[tuple[Match, Side]], sizes: Sizes, encoder: str | None
) -> Need:
    """Count the latents of one encoder in a store."""
    index = ShardIndex(folder / encoder) if encoder is not None and (folder / encoder).exists() else None
    wanted = _gathered(project, sides, all_drawn=index is not None)
    pictures = wanted.once()
    boxes = _boxes(pictures)
    there = np.zeros(len(boxes), np.bool_)
    if index is not None and encoder is not None:
        keys = latent_keys(encoder, _rows(project, pictures))
        there = np.fromiter((key in index or key in index.rejects for key in keys), np.bool_, len(boxes))
    return Need(
        needed=len(boxes) + wanted.undrawn,
        there=int(there.sum()),
        bytes=sizes.latents(boxes) + sum(sizes.latents(some) for some in wanted.undrawn_boxes),
        bytes_there=sizes.latents(boxes[there]),
        exact=wanted.named and not wanted.undrawn,
    )


def pictures(project: Project, matches: Sequence[Match]) -> Need:
    """Count the degraded pictures that are kept as files."""
    sides = [(pairs, side) for pairs in matches for side in pairs.sides if side.to_file and pairs.count]
    if not sides:
        return Need(0, 0, 0, 0, True)
    stored = {path.stem: path.stat().st_size for path in project.pixel_store.glob("*/*") if not is_aside(path)}
    framed = [(pairs, side) for pairs, side in sides if side.sizes is None]
    wanted = _gathered(project, framed, all_drawn=bool(stored))
    for _, side in sides:
        if side.sizes is not None:
            wanted.named &= side.named
            wanted.parts.append(_table(side.ids, np.pad(side.sizes, ((0, 0), (0, len(BOX) - 2))), side))
    table = wanted.once()
    boxes = [_boxes(table), *wanted.undrawn_boxes]
    pixels = sum(int((some[:, 0] * some[:, 1]).sum()) for some in boxes)
    there = [stored[key] for key in _pixel_keys(project, table) if key in stored] if stored else []
    known = round(pixels * PICTURE_BYTES * (1 - len(there) / max(1, table.num_rows)))
    needed, exact = table.num_rows + wanted.undrawn, wanted.named and not wanted.undrawn
    return Need(needed, len(there), known + sum(there), sum(there), exact)


def _gathered(project: Project, sides: Sequence[tuple[Match, Side]], *, all_drawn: bool) -> _Wanted:
    """Collect the pictures of some places of pairs, further random crops included."""
    wanted = _Wanted()
    crops: dict[int, list[Numbers] | None] = {}  # by the identity of pairs: a set may have several parts
    for pairs, side in sides:
        if id(pairs) not in crops:
            crops[id(pairs)] = _crops(project, pairs, all_drawn=all_drawn)
        drawn = crops[id(pairs)]
        wanted.named &= side.named
        wanted.parts.append(_table(side.ids, side.boxes, side))
        for boxes in drawn or ():
            wanted.parts.append(_table(side.ids.filter(pa.array(side.moves)), boxes[side.moves], side))
        if drawn is None:
            extra = _positions(side.boxes, pairs.target.crops, side.moves) - 1
            wanted.undrawn += int(extra.sum())
            wanted.undrawn_boxes.append(np.repeat(side.boxes[:, :2], extra, axis=0))
    return wanted


def _table(ids: pa.Array, boxes: Numbers, side: Side) -> pa.Table:
    columns = {name: pa.array(np.ascontiguousarray(boxes[:, place])) for place, name in enumerate(BOX)}
    said = {"view": side.view, "recipe": side.recipe or "", "draw": side.draw}
    return pa.table({"id": ids, **columns, **{name: pa.repeat(value, len(ids)) for name, value in said.items()}})


def _boxes(table: pa.Table) -> Numbers:
    return np.stack([table[name].to_numpy() for name in BOX], axis=1)


def _positions(boxes: Numbers, variants: int, moves: Mask) -> Numbers:
    """Return how many crops each picture can have, at most."""
    room = (boxes[:, 2] - boxes[:, 0] + 1) * (boxes[:, 3] - boxes[:, 1] + 1)
    return np.where(moves, np.minimum(room, variants), 1)


def _crops(project: Project, pairs: Match, *, all_drawn: bool) -> list[Numbers] | None:
    """Draw the further random crops of targets; None if they are too many to be drawn for a count."""
    boxes, target = pairs.sides[0].boxes, pairs.target
    rows = np.flatnonzero((boxes[:, 0] != boxes[:, 2]) | (boxes[:, 1] != boxes[:, 3]))
    if len(rows) * (target.crops - 1) > _DRAWN and not all_drawn:
        return None
    drawn, paths = [], pairs.paths.take(pa.array(rows)).to_pylist()
    for variant in range(1, target.crops):
        moved = boxes.copy()
        for row, path in zip(rows.tolist(), paths, strict=True):
            box = placed(Geometry(*boxes[row].tolist()), target.crop_style, name_of(project, target, path), variant)
            moved[row, 4:] = box.crop_top, box.crop_left
        drawn.append(moved)
    return drawn


def _rows(project: Project, table: pa.Table) -> Iterator[tuple[str, tuple[int, ...], str, str | None, int | None]]:
    """Yield what keys are made of: image, box, view, recipe, seed."""
    boxes = map(tuple, _boxes(table).tolist())
    columns = (table[name].to_pylist() for name in ("id", "view", "recipe", "draw"))
    for image_id, view, recipe, draw, box in zip(*columns, boxes, strict=True):
        seed = degrade_seed(project.trainer.prep_seed, image_id, recipe, draw) if recipe else None
        yield image_id, box, view, recipe or None, seed


def _pixel_keys(project: Project, table: pa.Table) -> Iterator[str]:
    for image_id, box, view, recipe, seed in _rows(project, table):
        assert recipe is not None and seed is not None, "only degraded pictures are kept"
        yield pixels_key(image_id, () if degraded_at_source(recipe) else box, view, recipe, seed)


# Prompts


def texts(project: Project, matches: Sequence[Match], sizes: Sizes, encoder: str | None) -> Need:
    """Count the prompts: distinct captions, those that pictures are sampled with, and the empty prompt."""
    own = pa.array(project.further_prompts, pa.string())
    prompts = pc.unique(pa.concat_arrays([own, *(prompts_of(pairs) for pairs in matches)])).to_pylist()
    checkpoint = here(project, project.family.text_encoders)
    rows = stored_rows(project, checkpoint, prompts) if checkpoint is not None else [sizes.rows] * len(prompts)
    stored, there = [sizes.of_prompt(one) for one in rows], [False] * len(prompts)
    folder = project.text_store / encoder if encoder is not None else None
    if folder is not None and encoder is not None and folder.exists():
        index = ShardIndex(folder)
        there = [key in index for key in text_keys(encoder, prompts)]
    exact = checkpoint is not None or not project.model.padding_first  # else rows of padding are counted too
    return Need(len(prompts), sum(there), sum(stored), sum(compress(stored, there)), exact)


# What smaller settings save


def edge_of(dataset: DatasetConfig) -> float:
    """Return the side of a square of a dataset's resolution."""
    return (dataset.resolution * 1e6) ** 0.5 if dataset.resolution_type == "area" else dataset.resolution


def smaller(matches: Sequence[Match], whole: int) -> dict[str, int]:
    """Return what latents of `whole` bytes would about take with smaller settings."""
    sides = [(pairs, side) for pairs in matches for side in pairs.sides if pairs.count]
    if not sides:
        return {}
    largest = max(edge_of(side.resolution) for _, side in sides)
    now, saved = _area(sides, None, 1), {}
    for edge in [edge for edge in _CUSTOMARY if edge < largest][:2]:
        saved[f"resolution {edge}"] = round(whole * _area(sides, edge, 1) / now)
    most = max(pairs.target.crops for pairs, _ in sides)
    if most > 1:
        saved[f"crop_variants {most // 2}"] = round(whole * _area(sides, None, 2) / now)
    return saved


def _area(sides: Sequence[tuple[Match, Side]], edge: float | None, share: int) -> float:
    """Sum pixels, no picture larger than `edge`, with one of `share` random crops."""
    total = 0.0
    for pairs, side in sides:
        scale = min(1.0, (edge / edge_of(side.resolution)) ** 2) if edge is not None else 1.0
        crops = _positions(side.boxes, max(1, pairs.target.crops // share), side.moves)
        total += scale * float((side.boxes[:, 0] * side.boxes[:, 1] * crops).sum())
    return total
