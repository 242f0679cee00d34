"""What the pair tables of a project ask of the cache: pictures by store and encoder, and prompts.

All of it is columns, for a million pairs are an ordinary project; `Pictures.picture` makes one of them whole.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from prep.pixels import Picture, degraded
from prep.places import Place, place_of
from schemas.freshness import read_pair_columns
from schemas.geometry import Geometry
from schemas.keys import latent_keys
from schemas.project import Project
from schemas.stores import Store

_GEOMETRY = tuple(Geometry.__dataclass_fields__)
_PICTURE = ("dataset_id", "path", "image_id", "view", *_GEOMETRY, "recipe", "seed", "realised")
_PAIR = ("dataset_id", "target_path", "target_image_id", "view", "geometry", "references", "prompts", "reject")

TARGETS, REFERENCES = "targets", "references"


class Pictures:
    """The pictures that one store must hold, each once, in the order of the pair tables."""

    def __init__(self, project: Project, store: Store, encoder: str, rows: pa.Table) -> None:
        """`store` is that of the encoder; `rows` has the columns of `_PICTURE`."""
        self.store, self.encoder = store, encoder
        self.asked = rows.num_rows  # places in the pair tables that ask for one of them
        keys = list(latent_keys(encoder, _ingredients(rows)))
        distinct = dict.fromkeys(keys)
        if len(distinct) < len(keys):
            first = dict(zip(reversed(keys), range(len(keys) - 1, -1, -1), strict=True))
            rows = rows.take(pa.array([first[key] for key in distinct], pa.int64()))
            keys = list(distinct)
        self.keys, self.rows = keys, rows
        self._project = project
        self._place = cache(self._place_of)

    def __len__(self) -> int:
        return len(self.keys)

    def picture(self, number: int) -> Picture:
        """Describe one of them."""
        [row] = self.rows.slice(number, 1).to_pylist()
        geometry = Geometry(*(row[name] for name in _GEOMETRY))
        plain = Picture(self._place(row["dataset_id"]), row["path"], row["image_id"], row["view"], geometry)
        return degraded(self._project, plain, row["recipe"], row["seed"], row["realised"])

    @property
    def dataset_ids(self) -> list[str]:
        """Name the sets that they are of."""
        return list(pc.unique(self.rows["dataset_id"]).to_pylist())

    def _place_of(self, dataset_id: str) -> Place:
        return place_of(self._project, self._project.dataset(dataset_id))

    def sizes(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the sizes there are, a row of width and height in pixels each, and which of them each picture has."""
        width, height = (self.rows[name].to_numpy().astype(np.int64) for name in ("target_width", "target_height"))
        distinct, which = np.unique(width << 32 | height, return_inverse=True)
        return np.stack([distinct >> 32, distinct & 0xFFFFFFFF], axis=1), which


@dataclass(frozen=True, slots=True)
class Needed:
    """All that training on a project may read."""

    tables: Mapping[str, pa.Table]  # kept pairs of each set of targets
    prompts: list[str]  # each once
    asked: int  # prompts of all pairs, repeats included

    def pictures(self, project: Project, encoders: Mapping[str, str]) -> list[Pictures]:
        """Return the pictures of every store; `encoders` has the keys of those of targets and of references."""
        parts: dict[tuple[Store, str], list[pa.Table]] = {}
        for table in self.tables.values():
            for role, rows in ((TARGETS, _targets(table)), (REFERENCES, _references(table))):
                for dataset_id, own in _by_dataset(rows):
                    store = project.latent_store(project.dataset(dataset_id)) / encoders[role]
                    parts.setdefault((store, encoders[role]), []).append(own)
        return [
            Pictures(project, store, encoder, pa.concat_tables(own).combine_chunks())
            for (store, encoder), own in parts.items()
        ]


def needed_of(project: Project) -> Needed:
    """Read what a project's pair tables need; raises UserError if one is missing, stale or damaged."""
    tables = {}
    for target in project.targets:
        rows = read_pair_columns(project, target, _PAIR)
        kept = rows["reject"].null_count == rows.num_rows  # of all: a copy less
        tables[target.id] = rows if kept else rows.filter(pc.is_null(rows["reject"]))
    asked = list(chain.from_iterable(map(_prompts, tables.values())))
    distinct = pc.unique(pa.chunked_array(asked, pa.string())).to_pylist() if asked else []
    further = project.further_prompts
    return Needed(tables, sorted({*distinct, *further}), sum(map(len, asked)) + len(further))


def _prompts(pairs: pa.Table) -> list[pa.Array]:
    own = _flat(pairs["prompts"])
    instead = pc.struct_field(_flat(pairs["references"]), "prompts")
    return [own, instead.flatten()]


def _flat(column: pa.ChunkedArray) -> pa.Array:
    """Return the elements of lists, one after the other."""
    whole = column.combine_chunks()
    return (whole.chunk(0) if isinstance(whole, pa.ChunkedArray) else whole).flatten()


def _targets(pairs: pa.Table) -> pa.Table:
    geometry, count = pairs["geometry"], pairs.num_rows
    return pa.table(
        {
            "dataset_id": pairs["dataset_id"],
            "path": pairs["target_path"],
            "image_id": pairs["target_image_id"],
            "view": pairs["view"],
            **{name: pc.struct_field(geometry, name) for name in _GEOMETRY},
            "recipe": pa.nulls(count, pa.string()),
            "seed": pa.nulls(count, pa.int64()),
            "realised": pa.nulls(count, pa.string()),
        }
    )


def _references(pairs: pa.Table) -> pa.Table:
    """Return the references of pairs; a degraded one is its target's file, and lies with its target."""
    lists = pairs["references"].combine_chunks()
    lists = lists.chunk(0) if isinstance(lists, pa.ChunkedArray) else lists
    flat, parents = lists.flatten(), pc.list_parent_indices(lists)
    field = {name: pc.struct_field(flat, name) for name in ("dataset_id", "path", "image_id", "view", "geometry",
                                                           "recipe", "seed", "realised")}  # fmt: skip
    own = pairs["dataset_id"].take(parents).combine_chunks()
    own = own.chunk(0) if isinstance(own, pa.ChunkedArray) else own
    field["dataset_id"] = pc.if_else(pc.is_null(field["recipe"]), field["dataset_id"], own)
    geometry = field.pop("geometry")
    return pa.table(field | {name: pc.struct_field(geometry, name) for name in _GEOMETRY}).select(_PICTURE)


def _by_dataset(rows: pa.Table) -> Iterator[tuple[str, pa.Table]]:
    for dataset_id in pc.unique(rows["dataset_id"]).to_pylist():
        yield dataset_id, rows.filter(pc.equal(rows["dataset_id"], dataset_id))


def _ingredients(rows: pa.Table) -> Iterable[tuple[str, tuple[int, ...], str, str | None, int | None]]:
    """Yield what keys are made of, piece by piece: image, geometry, view, recipe, seed."""
    for piece in rows.to_batches(max_chunksize=1 << 16):
        boxes = zip(*(piece[name].to_pylist() for name in _GEOMETRY), strict=True)
        columns: Sequence[list[object]] = [piece[name].to_pylist() for name in ("image_id", "view", "recipe", "seed")]
        image_ids, views, recipes, seeds = columns
        yield from zip(image_ids, boxes, views, recipes, seeds, strict=True)
