"""`prep cache --gc`: rows that no named project's pair tables reach with their present encoders, told and removed.

`collect` is the public function. A key says all that a row depends on, so that one is needed wherever somebody asks for
it: a store that two projects reach by different paths loses nothing that either needs.
"""

import json
import time
from collections.abc import Iterator, Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass, field

from families import Source, open_project
from prep.needed import needed_of
from prep.noted import DESCRIPTION, USERS, place_id, user_id
from prep.upkeep.stores import Kept, alone, reached_by, rejects_of, shards_of, stores_of
from schemas.errors import UserError
from schemas.freshness import check_pairs
from schemas.project import Project
from schemas.rows import RejectRow
from schemas.shards import headers_of, rejects_in, rewrite, write_rejects
from schemas.storage import HOST
from schemas.stores import Store
from schemas.upkeep import GcSummary, StoreGc


def collect(project: Source, also: Sequence[Source] = (), *, delete: bool = False) -> GcSummary:
    """Count the rows of a project's stores that neither it nor `also` reaches; `delete` removes them.

    Raises UserError if pair tables or encoders of one of the projects are not known, for all would seem unreached then;
    and before anything is deleted, if somebody works on a store, or a project that uses it was not named.
    """
    start = time.monotonic()
    project = open_project(project)
    named = [project, *map(open_project, also)]
    reached = frozenset(key for one in named for key in _reached(one))
    kept = stores_of(project)
    unnamed = sorted({user for one in kept for user in _unnamed(one.store, named)})
    if delete and unnamed:
        raise UserError(
            f"{', '.join(path for path, _ in unnamed)}: uses these stores too; name it with --also, "
            f"or delete {', '.join(note for _, note in unnamed)} if it needs them no more"
        )
    found = [_Found.of(one, reached) for one in kept]
    if delete:
        _delete([one for one in found if one.lost or one.lost_rejects], reached)
    done = tuple(one.told() for one in found)
    return GcSummary(
        done, tuple(str(one.config_path.parent) for one in named), tuple(dict.fromkeys(path for path, _ in unnamed)),
        delete, project.warnings, time.monotonic() - start,
    )  # fmt: skip


def _reached(project: Project) -> Iterator[str]:
    """Yield the keys that a project needs."""
    for target in project.targets:
        if check_pairs(project, target).limit is not None:
            raise UserError(
                f"{target.id}: its pair table is not whole (--limit); run: {project.command('prep pairs')}, "
                "or rows that its other pairs need would go"
            )
    pictures, prompts = reached_by(project, needed_of(project))
    for one in pictures:
        yield from one.keys
    yield from prompts


def _unnamed(store: Store, named: Sequence[Project]) -> Iterator[tuple[str, str]]:
    """Yield other projects that noted that they use a store, and where they did."""
    for name in sorted(set(store.names(USERS)) - {f"{user_id(one)}.json" for one in named}):
        where = store.where(f"{USERS}/{name}")
        try:
            said = json.loads(store.read(f"{USERS}/{name}") or b"{}")
            if said and (said["host"] != HOST or said["place"] == place_id(store)):
                yield said["project"], where
        except (ValueError, KeyError, TypeError):
            yield "a project whose note is damaged", where


@dataclass(slots=True)
class _Found:
    """What of one encoder's folder is reached, and what is not."""

    kept: Kept
    rejects: dict[str, dict[str, str]]  # file -> what it says
    drop: dict[str, list[str]] = field(default_factory=dict)  # shard -> keys that nothing reaches
    whole: set[str] = field(default_factory=set)  # shards of such keys alone
    rows: int = 0
    bytes: int = 0
    lost: int = 0
    lost_bytes: int = 0
    lost_rejects: int = 0

    @classmethod
    def of(cls, kept: Kept, reached: Set[str]) -> "_Found":
        """Look at one encoder's folder; raises UserError if a shard is damaged."""
        store = kept.store
        found = cls(kept, {name: rejects_in(store, name) for name in rejects_of(store)})
        for name, header, keys in headers_of(store, list(shards_of(store))):
            gone = [key for key in keys if key not in reached]
            found.rows += len(keys)
            found.bytes += len(keys) * header.row_bytes
            found.lost += len(gone)
            found.lost_bytes += len(gone) * header.row_bytes
            if gone:
                found.drop[name] = gone
            if len(gone) == len(keys):
                found.whole.add(name)
        found.lost_rejects = sum(key not in reached for reasons in found.rejects.values() for key in reasons)
        return found

    def told(self) -> StoreGc:
        """Say what was found."""
        return StoreGc(
            self.kept.kind, self.kept.store.where(), self.lost, self.lost_bytes, self.lost_rejects, len(self.whole),
            len(self.drop) - len(self.whole), self.rows - self.lost, self.bytes - self.lost_bytes,
        )  # fmt: skip


def _delete(found: Sequence[_Found], reached: Set[str]) -> None:
    """Remove what nothing reaches, of all stores or, if somebody works on one, of none."""
    with ExitStack() as held:
        for one in found:
            if not held.enter_context(alone(one.kept.store)):
                raise UserError(
                    f"{one.kept.store.where()}: somebody works there; run the command again when that is done"
                )
        for one in found:
            store = one.kept.store
            _remove_rows(store, one.drop, one.whole)
            _remove_rejects(store, one.rejects, reached)
            if not shards_of(store) and not rejects_of(store):
                store.remove(DESCRIPTION)


def _remove_rows(store: Store, drop: dict[str, list[str]], whole: Set[str]) -> None:
    for name, keys in drop.items():
        if name in whole:
            store.remove(name)
        else:
            rewrite(store, [name], drop=frozenset(keys))


def _remove_rejects(store: Store, rejects: dict[str, dict[str, str]], reached: Set[str]) -> None:
    for name, reasons in rejects.items():
        left = [RejectRow(key, reason) for key, reason in sorted(reasons.items()) if key in reached]
        if len(left) == len(reasons):
            continue
        if left:
            write_rejects(store, left)
        store.remove(name)
