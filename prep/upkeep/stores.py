"""What lies in the stores of a project, of whatever encoder, and whether somebody works there.

Files that are not of ours are never listed, so that nothing here touches them.
"""

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from prep.leases import Leases, is_busy
from prep.needed import Needed, Pictures
from prep.noted import DESCRIPTION, image_keys, text_key_of
from schemas.keys import text_keys
from schemas.project import Project
from schemas.shards import REJECTS
from schemas.stores import Store

_NAME = re.compile(r"[0-9a-f]{16}")  # of an encoder's folder, a shard, a file of rejects
_LEASE = "upkeep"
_KINDS = {"image": "latents", "text": "text"}  # encoder -> what it leaves


@dataclass(frozen=True, slots=True)
class Kept:
    """What one encoder left in one store."""

    kind: str  # latents or text
    root: Store
    encoder: str

    @property
    def store(self) -> Store:
        """Return the encoder's folder."""
        return self.root / self.encoder

    @property
    def is_of_kind(self) -> bool:
        """Tell latents from text where both lie in one folder; what says nothing is taken for what is asked for."""
        said = (self.description() or {}).get("encoder")
        return said is None or _KINDS.get(str(said)) == self.kind

    def description(self) -> dict[str, object] | None:
        """Return what the encoder's folder says of its encoder, None if it does not or is damaged."""
        try:
            said = json.loads(self.store.read(DESCRIPTION) or b"null")
        except ValueError:
            return None
        return said if isinstance(said, dict) else None


def stores_of(project: Project) -> list[Kept]:
    """Return all that encoders left in the stores of a project, whoever used them."""
    roots = dict.fromkeys(("latents", project.latent_store(dataset)) for dataset in project.scanned)
    return [
        Kept(kind, root, encoder)
        for kind, root in [*roots, ("text", project.text_store)]
        for encoder in sorted({name.split("/")[0] for name in root.files() if "/" in name})
        if _NAME.fullmatch(encoder) and Kept(kind, root, encoder).is_of_kind
    ]


def shards_of(store: Store) -> dict[str, int]:
    """List the shards of an encoder's folder with their bytes."""
    return {name: size for name, size in store.files().items() if folder_of(name) != REJECTS and _is_ours(name)}


def rejects_of(store: Store) -> list[str]:
    """List the files of rejects of an encoder's folder."""
    return [name for name in store.files(REJECTS) if _is_ours(name)]


def _is_ours(name: str) -> bool:
    return _NAME.fullmatch(name.rpartition("/")[2].removesuffix(".parquet")) is not None


def folder_of(name: str) -> str:
    """Return the bucket of a shard; empty for text."""
    return name.rpartition("/")[0]


def by_folder(names: Iterable[str]) -> dict[str, list[str]]:
    """Group shards by their bucket."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(folder_of(name), []).append(name)
    return groups


@contextmanager
def alone(store: Store) -> Iterator[bool]:
    """Keep other upkeep out of an encoder's folder; yields false if somebody works there.

    Files that were listed before and are there still belong to nobody who works: whoever starts later writes new ones.
    """
    with Leases() as leases:
        yield not is_busy(store) and leases.take(store, _LEASE)


def reached_by(project: Project, needed: Needed) -> tuple[list[Pictures], list[str]]:
    """Return what a project needs with its present encoders: pictures by store, keys of prompts; raises UserError."""
    return needed.pictures(project, image_keys(project)), list(text_keys(text_key_of(project), needed.prompts))
