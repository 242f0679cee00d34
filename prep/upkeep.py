"""The stores of a project looked after: is every row whole, and what is bad taken out so that it is encoded again.

`verify` is the public function.
"""

import re
import time
from pathlib import Path

import pyarrow.parquet as pq

from families import Source, open_project
from schemas.console import progress
from schemas.project import Project
from schemas.shards import REJECTS, drop_rows, faults_of
from schemas.summaries import StoreCheck, VerifySummary

_NAME = re.compile(r"[0-9a-f]{16}")  # of an encoder's folder and of a shard: whatever else lies there is not ours


def verify(project: Source, *, repair: bool = False) -> VerifySummary:
    """Read every row of a project's stores, of all encoders, and hold it against its checksum, shape and finiteness.

    `repair` takes bad rows, and files that cannot be read, out of the stores: the next prep cache encodes them again.
    """
    start = time.monotonic()
    project = open_project(project)
    checks = [
        _check(kind, folder, repair=repair)
        for kind, root in _roots(project)
        for folder in sorted(root.glob("*"))
        if folder.is_dir() and _NAME.fullmatch(folder.name)
    ]
    return VerifySummary(tuple(checks), None, project.warnings, time.monotonic() - start)


def _roots(project: Project) -> list[tuple[str, Path]]:
    """Return the folders above encoders' keys, each once."""
    latents = dict.fromkeys(project.latent_store(dataset) for dataset in project.scanned)
    return [*(("latents", folder) for folder in latents), ("text", project.text_store)]


def _check(kind: str, folder: Path, *, repair: bool) -> StoreCheck:
    shards = [
        path
        for path in sorted(folder.glob("**/*.parquet"))
        if path.parent.name != REJECTS and _NAME.fullmatch(path.stem)
    ]
    size, rows = sum(path.stat().st_size for path in shards), 0
    told: dict[str, str] = {}
    with progress(f"verify {kind}", len(shards), "shard") as bar:
        for path in shards:
            faults, name = faults_of(path), str(path.relative_to(folder))
            rows += 0 if None in faults else pq.read_metadata(path).num_rows
            told |= {name if key is None else f"{name} {key}": fault for key, fault in faults.items()}
            bad = [key for key in faults if key is not None]
            if repair and None in faults:
                path.unlink()
            elif repair and bad:
                drop_rows(path, bad)
            bar.update()
    return StoreCheck(kind, str(folder), len(shards), rows, size, told, repair and bool(told))
