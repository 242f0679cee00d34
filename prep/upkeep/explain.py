"""`prep cache --explain SAMPLE`: what of a sample is cached, and what changed since it last was.

`explain` is the public function. The last version is what `prep cache` noted (prep/noted.py).
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import pyarrow.compute as pc

from families import Source, open_project
from families.checkpoints import Description, key_of
from prep.needed import REFERENCES, TARGETS
from prep.noted import POLICY, TEXT, descriptions, image_keys, text_key_of
from schemas.datasets import DatasetConfig
from schemas.errors import DamagedTable, UserError
from schemas.freshness import check_pairs
from schemas.keys import PIXEL_POLICY, text_key
from schemas.project import Project
from schemas.rows import Geometry, NotedReference, NotedRow, PairRow, Reference, from_columns
from schemas.shards import ShardIndex
from schemas.stores import Store
from schemas.tables import read_columns, read_pieces, read_provenance
from schemas.upkeep import Change, ExplainSummary, PartState

_NEAR = 3  # samples named where none fits

RowT = TypeVar("RowT", PairRow, NotedRow)
Components = dict[str, Any]  # of a key, by name


def explain(project: Source, sample: str) -> ExplainSummary:
    """Say of each row that a sample needs whether it is cached, and which components of its key changed since it was.

    `sample` is a sample id, a target's path, or the beginning or end of one. Raises UserError if it names no pair or
    several, and if pair tables or encoders are not known.
    """
    start = time.monotonic()
    project = open_project(project)
    encoders = _Encoders(project)
    target, row = _found(project, sample)
    now, before = _now(row, encoders), _before(project, target, row.sample_id, encoders)
    stores = {name: _store(project, part, encoders.keys[part.role]) for name, part in now.items()}
    indexes = {store: ShardIndex(store) for store in dict.fromkeys(stores.values())}
    parts = tuple(_state(indexes[stores[name]], name, part, before) for name, part in now.items())
    gone = () if before is None else tuple(f"{name}: {one.name}" for name, one in before.items() if name not in now)
    wanting = any(part.state == "missing" for part in parts)
    return ExplainSummary(
        row.sample_id, row.dataset_id, row.target_path, before is not None, parts, gone,
        project.command("prep cache") if wanting else None, project.warnings, time.monotonic() - start,
    )  # fmt: skip


# Which sample


def _found(project: Project, asked: str) -> tuple[DatasetConfig, PairRow]:
    """Find the one pair that is asked for."""
    named: dict[str, DatasetConfig] = {}  # sample id -> its set
    paths: dict[str, list[str]] = {}  # path -> sample ids
    for target in project.targets:
        check_pairs(project, target)
        columns = read_columns(project.pair_table(target.id), PairRow, ["sample_id", "target_path"])
        for sample_id, path in zip(columns["sample_id"].to_pylist(), columns["target_path"].to_pylist(), strict=True):
            named[sample_id] = target
            paths.setdefault(path, []).append(sample_id)
    fitting = _fitting(asked, named, paths)
    if not fitting:
        near = get_close_matches(asked, [*named, *paths], _NEAR, 0.4)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise UserError(f"{asked}: no sample id and no path of a target begins or ends so{hint}")
    if len(fitting) > 1:
        listed = ", ".join(fitting[:_NEAR]) + (", ..." if len(fitting) > _NEAR else "")
        raise UserError(f"{asked}: {len(fitting)} samples begin or end so, name one: {listed}")
    [sample_id] = fitting
    row = _row(project.pair_table(named[sample_id].id), PairRow, sample_id)
    assert row is not None, "it was listed"
    if row.reject is not None:
        raise UserError(f"{asked}: rejected, so that nothing of it is cached: {row.reject}")
    return named[sample_id], row


def _fitting(asked: str, named: Mapping[str, object], paths: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the samples that are meant: by id, by path, or by a part of either."""
    if asked in named:
        return [asked]
    if asked in paths:
        return list(paths[asked])
    ids = [one for one in named if one.startswith(asked) or one.endswith(asked)]
    by_path = [
        one
        for path, own in paths.items()
        if path.startswith(asked) or path.endswith(asked) or asked.endswith(f"/{path}")
        for one in own
    ]
    return list(dict.fromkeys([*ids, *by_path]))


def _row(path: Path, row_type: type[RowT], sample_id: str) -> RowT | None:
    """Find a sample in a table."""
    for piece in read_pieces(path, row_type):
        if rows := from_columns(piece.filter(pc.equal(piece["sample_id"], sample_id)), row_type):
            return rows[0]
    return None


# Its versions


@dataclass(frozen=True, slots=True)
class _Part:
    """One row that a sample needs: what it is called, and what its key is made of."""

    role: str  # of its encoder
    store_of: str  # id of the dataset whose store holds it; of prompts, empty
    name: str
    components: Components
    key: str = ""  # of the present version


def _now(row: PairRow, encoders: "_Encoders") -> dict[str, _Part]:
    """Return what a sample needs now."""
    said, keys = encoders.said, encoders.keys
    components = _picture(row.target_image_id, row.view, row.geometry, said[TARGETS])
    parts = {"target": _Part(TARGETS, row.dataset_id, row.target_path, components, row.target_key(keys[TARGETS]))}
    for number, one in enumerate(row.references, 1):
        parts[f"reference {number}"] = _Part(
            REFERENCES, row.store_of(one), one.path, _reference(one, said[REFERENCES]), one.key(keys[REFERENCES])
        )
    prompts = _prompts(row.prompts, row.references, said[TEXT])
    return parts | {name: replace(part, key=text_key(keys[TEXT], part.name)) for name, part in prompts.items()}


def _before(project: Project, target: DatasetConfig, sample_id: str, encoders: "_Encoders") -> dict[str, _Part] | None:
    """Return what a sample needed when it was last cached; None if that is not known."""
    path = project.noted(target.id)
    provenance = read_provenance(path, NotedRow)
    try:
        row = None if provenance is None else _row(path, NotedRow, sample_id)
    except DamagedTable:
        return None
    if provenance is None or row is None:
        return None
    noted = json.loads(provenance.noted)
    policy = noted.pop(POLICY)
    said = {role: encoders.comparable(role, one) | _policy(role, policy) for role, one in noted.items()}
    target_part = _picture(row.target_image_id, row.view, row.geometry, said[TARGETS])
    parts = {"target": _Part(TARGETS, target.id, row.target_path, target_part)}
    for number, one in enumerate(row.references, 1):
        parts[f"reference {number}"] = _Part(REFERENCES, one.dataset_id, one.path, _reference(one, said[REFERENCES]))
    return parts | _prompts(row.prompts, row.references, said[TEXT])


def _picture(image_id: str, view: str, box: Geometry, encoder: Components) -> Components:
    return {
        "image": image_id,
        "view": view or "as the file says",
        "size": f"{box.target_width}x{box.target_height}",
        "intermediary size": f"{box.intermediary_width}x{box.intermediary_height}",
        "crop": f"{box.crop_left} from the left, {box.crop_top} from the top",
        **encoder,
    }


def _reference(one: Reference | NotedReference, encoder: Components) -> Components:
    recipe = {} if one.recipe is None else {f"recipe {name}": value for name, value in json.loads(one.recipe).items()}
    return _picture(one.image_id, one.view, one.geometry, encoder) | recipe | {"seed": one.seed}


def _prompts(
    own: Sequence[str], references: Sequence[Reference | NotedReference], encoder: Components
) -> dict[str, _Part]:
    """Return the prompts that a sample may be shown, each once."""
    every = dict.fromkeys([*(own or [""]), *(text for one in references for text in one.prompts)])
    return {
        f"prompt {number}": _Part(TEXT, "", text, {"prompt": text, **encoder}) for number, text in enumerate(every, 1)
    }


class _Encoders:
    """The present encoders of a project, as components of keys."""

    def __init__(self, project: Project) -> None:
        """Raises UserError if their keys are unknown."""
        self.keys = image_keys(project) | {TEXT: text_key_of(project)}
        here = descriptions(project)
        self._known = here is not None  # else only the keys can be compared
        described = here or {}
        self.said = {
            role: (_named(described[role]) if here is not None else {"encoder": key}) | _policy(role, PIXEL_POLICY)
            for role, key in self.keys.items()
        }

    def comparable(self, role: str, description: Description) -> Components:
        """Spell an encoder's description as the present ones are."""
        return _named(description) if self._known else {"encoder": key_of(description)}


def _named(description: Description) -> Components:
    """Name what an encoder's key is made of."""
    return {f"encoder {name}".replace("_", " "): value for name, value in description.items() if name != "encoder"}


def _policy(role: str, policy: str) -> Components:
    return {} if role == TEXT else {POLICY: policy}


# What became of them


def _store(project: Project, part: _Part, encoder: str) -> Store:
    root = project.text_store if part.role == TEXT else project.latent_store(project.dataset(part.store_of))
    return root / encoder


def _state(index: ShardIndex, name: str, part: _Part, before: Mapping[str, _Part] | None) -> PartState:
    rejected = index.rejects.get(part.key)
    state = "cached" if part.key in index else "missing" if rejected is None else "rejected"
    changes: tuple[Change, ...] = ()
    if before is not None:
        changes = tuple(_changes(before[name].components, part.components)) if name in before else (_NEW,)
    return PartState(name, part.name, part.key, state, rejected, changes)


_NEW = Change("all of it", None, "new")


def _changes(old: Components, new: Components) -> Iterator[Change]:
    for name in dict.fromkeys([*old, *new]):
        if old.get(name) != new.get(name):
            yield Change(name, old.get(name), new.get(name))
