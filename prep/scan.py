"""`prep scan`: one row for every image, measured, captioned, bucketed, or rejected with a reason.

`scan` is the public function. Only new and changed files are read; of unchanged ones the last manifest tells what is
known. Everything is columns from the first to the last: a million images are an ordinary set.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from families import Source, open_project
from prep.captioning import CaptionColumns, caption_all
from prep.captions import Captioner
from prep.frames import Frames, frame_all, policy_of
from prep.geometry import Targets
from prep.listing import Asked, Listing, list_images
from prep.measure import measure
from prep.memory import CONTENT_APART_FROM, Memory, changed_rows, known_rows, numbers_of, recall, spelled
from prep.places import place_of
from prep.pool import Crew, default_workers
from prep.reading import Wanted, look_closer, read_new
from prep.selection import select
from prep.statistics import statistics
from schemas.console import log, tell_rejected
from schemas.datasets import DatasetConfig
from schemas.errors import UserError
from schemas.keys import digest
from schemas.lock import only_one
from schemas.project import Project
from schemas.rows import ImageRow, arrow_schema
from schemas.summaries import DatasetScan, ScanSummary
from schemas.tables import Provenance, content_of, read_columns, read_provenance, write_table


@dataclass(slots=True)
class _Run:
    """What all datasets of one scan share."""

    project: Project
    limit: int | None
    dry_run: bool
    hashed: bool
    verify: bool
    crew: Crew
    targets: dict[tuple[float, bool, int], Targets] = field(default_factory=dict)  # by (resolution, area, alignment)


def scan(
    project: Source,
    *,
    limit: int | None = None,
    workers: int | None = None,
    dry_run: bool = False,
    hashed: bool = True,
    verify: bool = False,
) -> ScanSummary:
    """Write a manifest for every dataset of a project.

    `limit` scans the first N images of each dataset in the order of their paths. Without `hashed`, images are measured
    but not identified, for a quick look that later stages refuse. `verify` decodes every image. Raises UserError.
    """
    start = time.monotonic()
    project = open_project(project, need_images=True)
    alone = nullcontext() if dry_run else only_one(project.workspace / "manifests", "prep scan")
    with alone, Crew(workers or default_workers(), measure) as crew:
        run = _Run(project, limit, dry_run, hashed, verify, crew)
        scans = tuple(scan_dataset(run, dataset)[0] for dataset in project.scanned)
    return ScanSummary(scans, project.warnings, time.monotonic() - start, dry_run)


@contextmanager
def looking(project: Project, workers: int | None = None) -> Iterator[Callable[[DatasetConfig], pa.Table]]:
    """Give a function that returns the manifest which a scan would write now, measured but not identified.

    Datasets share target sizes as in a scan if asked in the same order. Nothing is written.
    """
    with Crew(workers or default_workers(), measure) as crew:
        run = _Run(project, None, True, False, False, crew)
        yield lambda dataset: scan_dataset(run, dataset)[1]


def scan_dataset(run: _Run, dataset: DatasetConfig) -> tuple[DatasetScan, pa.Table]:
    """Scan one dataset; return what was done, and its rows."""
    project, manifest = run.project, run.project.manifest(dataset.id)
    _refuse_workspace(project, dataset)
    before = read_provenance(manifest, ImageRow)
    config = project.scan_settings(dataset)
    if _taken_as_it_is(run, dataset, before, config):
        known = read_columns(manifest, ImageRow)
        return _summary(run, dataset, known, _Done(looked_at=False)), known
    captioner = Captioner.of(dataset, project.caption_filter(dataset), project.trainer.prep_seed)
    source = digest(dataset.type, _where(project, dataset), dataset.view)
    known_table = known_rows(manifest, before, source)
    stats = known_table is not None
    many = None if stats else run.crew.summon
    listing = list_images(project, dataset, Asked(captioner.reads_text, stats, run.dry_run, many, run.limit))
    cut = run.limit if run.limit is not None and run.limit < len(listing.paths) else None
    if cut is not None:
        listing.cut(cut)
    captions = project.caption_settings(dataset)
    memory = recall(known_table, listing, hashed=run.hashed, captioned_alike=before is not None
                     and before.captions == captions)  # fmt: skip
    provenance = Provenance(config, "", cut, source, captions, run.hashed)
    if (
        known_table is not None
        and before is not None
        and _nothing_new(run, dataset, memory, listing, before, provenance)
    ):
        return _summary(run, dataset, known_table, _Done(listing)), known_table
    table, done = _made(run, dataset, listing, memory, captioner)
    provenance = replace(provenance, inputs=content_of(table, CONTENT_APART_FROM))
    done.written = provenance != before or known_table is None or not table.equals(known_table)
    done.settings_changed = before is not None and before.config != config
    if cut is None and known_table is not None:
        done.removed = known_table.num_rows - len(set(memory.at[memory.at >= 0].tolist()))
    if done.written and not run.dry_run:
        write_table(manifest, table, ImageRow, provenance)
    return _summary(run, dataset, table, done), table


@dataclass(slots=True)
class _Done:
    """What one dataset's scan did, besides the rows themselves."""

    listing: Listing = field(default_factory=Listing)
    read: int = 0  # images whose content was read
    examined: int = 0  # images that were decoded
    changed: int = 0  # rows of the last manifest that say something else now
    removed: int = 0
    near: int = 0  # images that look like another
    collisions: dict[str, list[str]] = field(default_factory=dict)
    written: bool = False
    settings_changed: bool = False
    looked_at: bool = True


def _refuse_workspace(project: Project, dataset: DatasetConfig) -> None:
    if dataset.type != "local" or project.url_of(dataset) is not None:
        return
    folder = project.folder_of(dataset)
    if project.workspace in (folder.resolve(), *folder.resolve().parents):
        raise UserError(f"{dataset.id}: its folder {folder} lies in the workspace; give --workspace another place")


def _taken_as_it_is(run: _Run, dataset: DatasetConfig, before: Provenance | None, config: str) -> bool:
    """Tell whether `skip_file_discovery` lets the manifest stand, which must be of these settings and whole."""
    asked = {"metadata", "aspect"} & set(dataset.skip_file_discovery)
    whole = before is not None and before.config == config and before.limit is None and before.hashed >= run.hashed
    return bool(asked) and whole


def _where(project: Project, dataset: DatasetConfig) -> list[str | None]:
    if dataset.type == "huggingface":
        table = dataset.huggingface
        return [dataset.dataset_name, table.split, table.revision, *table.data_files, table.image_column]
    return [project.url_of(dataset), dataset.instance_data_dir, dataset.csv_file]


def _nothing_new(
    run: _Run, dataset: DatasetConfig, memory: Memory, listing: Listing, before: Provenance, now: Provenance
) -> bool:
    """Tell whether the manifest stands as it is: the same settings, images, texts; then nothing is computed."""
    known = memory.table
    if known is None or replace(before, inputs="") != now or known.num_rows != len(listing.paths):
        return False
    plain = not (listing.captions or listing.measured or listing.rejects or listing.faults or run.verify)
    alone = sum(_size_of(run, other) == _size_of(run, dataset) for other in run.project.scanned) == 1
    untold = np.frombuffer(listing.text_sizes, np.int64) < 0
    texts = memory.same_text | (untold & (numbers_of(known, "caption_size_bytes")[memory.at] < 0))
    in_order = np.array_equal(memory.at, np.arange(known.num_rows))
    return plain and alone and in_order and bool(memory.same_image.all()) and bool(texts.all())


def _size_of(run: _Run, dataset: DatasetConfig) -> tuple[float, bool, int]:
    """Return what datasets must share to share target sizes."""
    policy = policy_of(run.project, dataset)
    return (*policy.by_area(policy.resolution), policy.alignment)


def _made(
    run: _Run, dataset: DatasetConfig, listing: Listing, memory: Memory, captioner: Captioner
) -> tuple[pa.Table, _Done]:
    """Read what is new, and make all rows."""
    project, place, names = run.project, place_of(run.project, dataset), spelled(listing.paths)
    wanted = Wanted(run.hashed, run.verify, run.crew)
    facts, texts, read = read_new(dataset, place, listing, memory, wanted)
    facts, examined = look_closer(dataset, place, names, facts, wanted)
    captions = caption_all(dataset, captioner, listing, memory, texts)
    frames = frame_all(project, dataset, names, facts, _targets(run, dataset), listing.rejects)
    rejects = {row: "name: it is not UTF-8" for row, path in enumerate(listing.paths) if path is not names[row]}
    for found in (_faults(facts), frames.rejects, captions.rejects):
        for row, reason in found.items():
            rejects.setdefault(row, reason)
    selected = select(dataset, project.trainer.prep_seed, names, facts, rejects)
    rejects |= selected.rejects
    table = _table(dataset, names, facts, captions, frames.without(rejects.keys()), rejects)
    changed = changed_rows(memory, table)
    return table, _Done(listing, read, examined, changed, near=selected.alike, collisions=frames.collisions)


def _targets(run: _Run, dataset: DatasetConfig) -> Targets:
    """Return the map of target sizes; strict references, which take their targets' crops, get one of their own."""
    if dataset.conditioning_type == "reference_strict":
        return Targets()
    return run.targets.setdefault(_size_of(run, dataset), Targets())


def _faults(facts: pa.Table) -> dict[int, str]:
    faults = facts["fault"]
    rows = np.flatnonzero(faults.is_valid().to_numpy())
    return dict(zip(rows.tolist(), faults.take(pa.array(rows)).to_pylist(), strict=True))


def _table(
    dataset: DatasetConfig,
    names: list[str],
    facts: pa.Table,
    captions: CaptionColumns,
    frames: Frames,
    rejects: dict[int, str],
) -> pa.Table:
    """Put all columns together in the order of the manifest's schema."""
    schema = arrow_schema(ImageRow)
    reject: list[str | None] = [None] * len(names)
    for row, reason in rejects.items():
        reject[row] = reason
    columns: dict[str, Any] = {
        "dataset_id": pa.repeat(dataset.id, len(names)),
        "path": pa.array(names, pa.string()),
        "captions": captions.texts,
        "caption_source": captions.source,
        "caption_size_bytes": captions.sizes,
        "caption_mtime_ns": captions.mtimes,
        **frames.columns(),
        "reject": pa.array(reject, pa.string()),
    }
    columns |= {name: facts[name] for name in facts.column_names}
    return pa.table([columns[name] for name in schema.names], schema=schema).combine_chunks()


def _summary(run: _Run, dataset: DatasetConfig, table: pa.Table, done: _Done) -> DatasetScan:
    """Sum a manifest up, and tell the rejected rows."""
    count = statistics(run.project, dataset, table)
    if not count.kept:
        log.warning("%s: no usable image in %s", dataset.id, place_of(run.project, dataset).name(""))
    rejected = table.filter(pc.is_valid(table["reject"])).slice(0, 6).select(["path", "reject"]).to_pylist()
    tell_rejected(dataset.id, [(row["path"], row["reject"]) for row in rejected], sum(count.rejected.values()))
    return DatasetScan(
        dataset_id=dataset.id,
        seen=table.num_rows,
        kept=count.kept,
        rejected=count.rejected,
        read=done.read,
        decoded=done.examined,
        removed=done.removed,
        changed=done.changed,
        settings_changed=done.settings_changed,
        buckets=count.buckets,
        batch_fill=count.batch_fill,
        upscaled=count.upscaled,
        oddities=count.oddities,
        equal_files=count.equal_files,
        near_duplicates=done.near,
        collisions=done.collisions,
        faces=count.faces,
        variants=dataset.variants,
        captions=count.captions,
        ignored_files=done.listing.ignored,
        unreadable_folders=tuple(done.listing.unreadable),
        manifest=str(run.project.manifest(dataset.id)),
        written=done.written,
        looked_at=done.looked_at,
    )
