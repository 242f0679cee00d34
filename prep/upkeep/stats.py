"""`prep cache --stats`: what lies in the stores of a project, and how much of it the project needs.

`stats` is the public function; it reads the ends of files and writes nothing.
"""

import time
from collections.abc import Mapping

from families import Source, open_project
from prep.leases import held
from prep.needed import needed_of
from prep.noted import text_key_of
from prep.upkeep.stores import Kept, folder_of, reached_by, rejects_of, shards_of, stores_of
from schemas.errors import UserError
from schemas.project import Project
from schemas.shards import headers_of, rejects_in, rows_of_shard
from schemas.stores import Store
from schemas.upkeep import SPARE_TOLD, StatsSummary, StoreStats


def stats(project: Source) -> StatsSummary:
    """Count rows, bytes and shards of every encoder in a project's stores; raises UserError if a shard is damaged."""
    start = time.monotonic()
    project = open_project(project)
    needed, unknown = _needed(project)
    found = tuple(_counted(kept, needed) for kept in stores_of(project))
    many = sum(one.spare for one in found) >= SPARE_TOLD
    command = f"{project.command('prep cache')} --compact" if many else None
    return StatsSummary(found, unknown, command, project.warnings, time.monotonic() - start)


def _needed(project: Project) -> tuple[Mapping[Store, frozenset[str]] | None, str | None]:
    """Return the keys that a project needs of each encoder's folder; or why that is not known."""
    try:
        pictures, prompts = reached_by(project, needed_of(project))
    except UserError as fault:
        return None, str(fault)
    keys = {one.store: frozenset(one.keys) for one in pictures}
    return keys | {_text_folder(project): frozenset(prompts)}, None


def _text_folder(project: Project) -> Store:
    return project.text_store / text_key_of(project)


def _counted(kept: Kept, needed: Mapping[Store, frozenset[str]] | None) -> StoreStats:
    store, shards = kept.store, shards_of(kept.store)
    own = frozenset() if needed is None else needed.get(store, frozenset())
    rows, reached = 0, 0
    buckets: dict[str, int] = {}
    kinds: dict[tuple[str, int], list[int]] = {}  # folder and bytes of a row -> rows of each shard
    for name, header, keys in headers_of(store, list(shards)):
        folder = folder_of(name)
        rows += len(keys)
        reached += sum(key in own for key in keys)
        kinds.setdefault((folder, header.row_bytes), []).append(len(keys))
        if folder:
            buckets[folder] = buckets.get(folder, 0) + len(keys)
    full = [(rows_of_shard(row_bytes), counts) for (_, row_bytes), counts in kinds.items()]
    least = sum(-(-sum(counts) // most) for most, counts in full)
    small = sum(2 * count < most for most, counts in full if len(counts) > 1 for count in counts)
    return StoreStats(
        kind=kept.kind, folder=kept.root.where(), encoder=kept.encoder, description=kept.description(),
        current=None if needed is None else store in needed, rows=rows, size_bytes=sum(shards.values()),
        buckets=dict(sorted(buckets.items())), shards=len(shards), small=small, spare=len(shards) - least,
        rejects=sum(len(rejects_in(store, name)) for name in rejects_of(store)),
        needed=None if needed is None else reached, leases=len(held(store)),
    )  # fmt: skip
