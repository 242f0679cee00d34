"""`prep status`: of every stage what is complete, stale or missing, why, and the command that comes next.

`status` is the public function. Tables and shards are asked, images are not looked at, nothing is written.
"""

import re
import time
from collections.abc import Iterator

import pyarrow.parquet as pq

from families import Source, open_project
from prep.cache import cache
from schemas.errors import UserError
from schemas.freshness import check_pairs, manifest_provenance
from schemas.project import Project
from schemas.summaries import StageState, StatusSummary, counted


def status(project: Source) -> StatusSummary:
    """Say how far a project is; raises UserError if its files are faulty."""
    start = time.monotonic()
    project = open_project(project)
    states = [*_scanned(project), *_paired(project)]
    states += _cached(project, ready=all(one.state in ("complete", "partial") for one in states))
    states.append(_trained(project))
    unfinished = next((one for one in states if one.state in ("missing", "stale")), None)
    unfinished = unfinished or next((one for one in states if one.state == "partial"), None)
    command = None
    if unfinished is not None:
        name = "train run" if unfinished.stage == "train" else f"prep {unfinished.stage}"
        command = project.command(name)
    return StatusSummary(tuple(states), command, project.warnings, time.monotonic() - start)


def _scanned(project: Project) -> Iterator[StageState]:
    for dataset in project.scanned:
        path = project.manifest(dataset.id)
        try:
            provenance = manifest_provenance(project, dataset)
        except UserError as fault:
            yield StageState("scan", dataset.id, "stale" if path.exists() else "missing", _why(fault))
            continue
        rows = pq.read_metadata(path).num_rows
        if not provenance.hashed:
            yield StageState("scan", dataset.id, "partial", f"{counted(rows, 'image')}, measured only (--no-hash)")
        elif provenance.limit is not None:
            yield StageState("scan", dataset.id, "partial", f"the first {counted(rows, 'image')} (--limit)")
        else:
            yield StageState("scan", dataset.id, "complete", counted(rows, "image"))


def _paired(project: Project) -> Iterator[StageState]:
    for target in project.targets:
        path = project.pair_table(target.id)
        try:
            provenance = check_pairs(project, target)
        except UserError as fault:
            yield StageState("pairs", target.id, "stale" if path.exists() else "missing", _why(fault))
            continue
        rows = counted(pq.read_metadata(path).num_rows, "row")
        limited = provenance.limit is not None
        yield StageState("pairs", target.id, "partial" if limited else "complete", rows + " (--limit)" * limited)


def _cached(project: Project, *, ready: bool) -> Iterator[StageState]:
    if not ready:
        yield StageState("cache", "latents, text", "missing", "not known before pairs are")
        return
    try:
        stores = cache(project, dry_run=True).stores
    except UserError as fault:
        yield StageState("cache", "latents, text", "missing", _why(fault))
        return
    for store in stores:
        missing = store.needed - store.reused - len(store.rejected)
        state = "complete" if not missing else "missing" if not store.reused else "partial"
        there = f"{store.reused:,} of {store.needed:,} encoded"
        rejected = f", {len(store.rejected)} cannot be" if store.rejected else ""
        yield StageState("cache", store.kind, state, there + rejected)


def _trained(project: Project) -> StageState:
    folder, name = project.run_folder, project.trainer.tracker_run_name
    steps = [
        int(found[1]) for path in folder.glob("checkpoint-*") if (found := re.fullmatch(r"checkpoint-(\d+)", path.name))
    ]
    if any(folder.glob("*.safetensors")):
        return StageState("train", name, "complete", f"the LoRA is in {folder}")
    if steps:
        return StageState("train", name, "partial", f"last checkpoint at step {max(steps)}; goes on from there")
    return StageState("train", name, "missing", f"nothing in {folder} yet")


def _why(fault: UserError) -> str:
    """Say why, without the dataset's name before it and the advice after it."""
    return str(fault).partition(": ")[2].partition("; run:")[0].partition(" (")[0]
