"""The stores of a project looked after: is every row whole, and what is bad taken out so that it is encoded again.

`verify` is the public function.
"""

import re
import time

from families import Source, open_project
from schemas.console import progress
from schemas.project import Project
from schemas.shards import REJECTS, faults_of, headers_of, rewrite
from schemas.stores import Store
from schemas.summaries import StoreCheck, VerifySummary

_NAME = re.compile(r"[0-9a-f]{16}")  # of an encoder's folder and of a shard: whatever else lies there is not ours


def verify(project: Source, *, repair: bool = False) -> VerifySummary:
    """Read every row of a project's stores, of all encoders, and hold it against its checksum, shape and finiteness.

    `repair` takes bad rows, and files that cannot be read, out of the stores: the next prep cache encodes them again.
    """
    start = time.monotonic()
    project = open_project(project)
    checks = [_check(kind, store, repair=repair) for kind, store in stores_of(project)]
    return VerifySummary(tuple(checks), None, project.warnings, time.monotonic() - start)


def stores_of(project: Project) -> list[tuple[str, Store]]:
    """Return the stores of a project, of all encoders that were ever used in them: ("latents" or "text", store)."""
    roots = dict.fromkeys(("latents", project.latent_store(dataset)) for dataset in project.scanned)
    return [
        (kind, root / encoder)
        for kind, root in [*roots, ("text", project.text_store)]
        for encoder in sorted({name.split("/")[0] for name in root.files() if "/" in name})
        if _NAME.fullmatch(encoder)
    ]


def shards_of(store: Store) -> dict[str, int]:
    """List the shards of a store with their bytes; whatever else lies there is not ours."""
    return {name: size for name, size in store.files().items() if _is_shard(name)}


def _is_shard(name: str) -> bool:
    folder, _, file = name.rpartition("/")
    return folder != REJECTS and _NAME.fullmatch(file.removesuffix(".parquet")) is not None


def _check(kind: str, store: Store, *, repair: bool) -> StoreCheck:
    shards, rows = shards_of(store), 0
    told: dict[str, str] = {}
    with progress(f"verify {kind}", len(shards), "shard") as bar:
        for name in shards:
            with store.anew(name):
                faults = faults_of(store, name)
                rows += 0 if None in faults else next(headers_of(store, [name]))[2]
                told |= {name if key is None else f"{name} {key}": fault for key, fault in faults.items()}
                bad = [key for key in faults if key is not None]
                if repair and None in faults:
                    store.remove(name)
                elif repair and bad:
                    rewrite(store, [name], drop=bad)
            bar.update()
    return StoreCheck(kind, store.where(), len(shards), rows, sum(shards.values()), told, repair and bool(told))
