"""`prep scan`: one row for every image, measured, captioned, bucketed, or rejected with a reason.

`scan` is the public function. Only new and changed files are read; of unchanged ones the last manifest tells what is
known. Everything is columns from the first to the last: a million images are an ordinary set.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from families import Source, open_project
from prep.captioning import caption_all
from prep.captions import Captioner
from prep.frames import frame_all, policy_of
from prep.geometry import Targets
from prep.images import looks
from prep.listing import Asked, Listing, list_images
from prep.measure import measure
from prep.memory import COMPARED, CONTENT_APART_FROM, Memory, changed_rows, known_rows, numbers_of, recall, spelled
from prep.places import place_of
from prep.pool import Crew, default_workers
from prep.reading import Wanted, look_closer, read_new
from prep.selection import select
from prep.statistics import pieces, statistics
from schemas.console import log, tell_rejected
from schemas.datasets import DatasetConfig
from schemas.errors import DamagedTable, UserError
from schemas.keys import canonical, digest
from schemas.lock import only_one
from schemas.project import Project
from schemas.rows import ImageRow, arrow_schema
from schemas.summaries import DatasetScan, ScanSummary
from schemas.tables import Provenance, content_of, read_columns, read_pieces, read_provenance, write_table


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
        scans = tuple(_scan(run, dataset)[0] for dataset in project.scanned)
    return ScanSummary(scans, project.warnings, time.monotonic() - start, dry_run)


@contextmanager
def looking(project: Project, workers: int | None = None) -> Iterator[Callable[[DatasetConfig], pa.Table]]:
    """Give a function that returns the manifest which a scan would write now, measured but not identified.

    Datasets share target sizes as in a scan if asked in the same order. Nothing is written.
    """
    with Crew(workers or default_workers(), measure) as crew:
        run = _Run(project, None, True, False, False, crew)

        def look(dataset: DatasetConfig) -> pa.Table:
            table = _scan(run, dataset)[1]
            return read_columns(project.manifest(dataset.id), ImageRow) if table is None else table

        yield look


def _scan(run: _Run, dataset: DatasetConfig) -> tuple[DatasetScan, pa.Table | None]:
    """Scan one dataset; return what was done, and its rows, None where the manifest stands as it is."""
    try:
        return _scan_what_is_new(run, dataset, forget=False)
    except DamagedTable as fault:
        log.warning("%s; scanning everything", fault)
        return _scan_what_is_new(run, dataset, forget=True)


def _scan_what_is_new(run: _Run, dataset: DatasetConfig, *, forget: bool) -> tuple[DatasetScan, pa.Table | None]:
    """Do the work of `_scan`; raises DamagedTable if the last manifest cannot be read, unless it is to be forgotten."""
    project, manifest = run.project, run.project.manifest(dataset.id)
    _refuse_workspace(project, dataset)
    before, config = None if forget else read_provenance(manifest, ImageRow), project.scan_settings(dataset)
    if _taken_as_it_is(run, dataset, before, config):
        return _summary(
            run, dataset, read_pieces(manifest, ImageRow), _Done(noted=_noted(before), looked_at=False)
        ), None
    captioner = Captioner.of(dataset, project.caption_filter(dataset), project.trainer.prep_seed)
    source, captions = _source(project, dataset), project.caption_settings(dataset)
    compared = None if forget else known_rows(manifest, before, source, COMPARED)
    many = run.crew.summon if compared is None else None
    asked = Asked(captioner.reads_text, compared is not None, run.dry_run, many, run.limit)
    listing = list_images(project, dataset, asked)
    cut = run.limit if run.limit is not None and run.limit < len(listing.paths) else None
    if cut is not None:
        listing.cut(cut)
        if compared is not None and compared.num_rows > cut:
            log.warning(
                "%s: --limit: what is known of %d more images is forgotten", dataset.id, compared.num_rows - cut
            )
    alike = before is not None and before.captions == captions
    memory = recall(compared, listing, hashed=run.hashed, captioned_alike=alike)
    memory.same_view = before is not None and before.source == source
    provenance = Provenance(config, "", cut, source, captions, hashed=run.hashed)
    if before is not None and memory.same_view and _nothing_new(run, dataset, memory, listing, before, provenance):
        return _summary(run, dataset, read_pieces(manifest, ImageRow), _Done(listing, noted=_noted(before))), None
    gone = compared.num_rows - int(np.count_nonzero(memory.at >= 0)) if compared is not None and cut is None else 0
    memory.table = known = known_rows(manifest, before, source) if compared is not None else None
    del compared
    table, done = _made(run, dataset, listing, memory, captioner)
    provenance = replace(
        provenance,
        inputs=content_of(table, CONTENT_APART_FROM),
        noted=canonical(done.noted),
        hashed=run.hashed or _all_identified(table),
    )
    done.unchanged = int(memory.same_image.sum())
    done.removed, done.settings_changed = gone, before is not None and before.config != config
    done.written = provenance != before or known is None or not table.equals(known)
    if done.written and not run.dry_run:
        write_table(manifest, table, ImageRow, provenance)
    return _summary(run, dataset, pieces(table), done), table


@dataclass(slots=True)
class _Done:
    """What one dataset's scan did, besides the rows themselves."""

    listing: Listing = field(default_factory=Listing)
    read: int = 0  # images whose content was read
    examined: int = 0  # images that were decoded
    changed: int = 0  # rows of the last manifest that say something else now
    removed: int = 0
    noted: dict[str, Any] = field(default_factory=dict)  # what rows do not say: alike, collisions
    written: bool = False
    settings_changed: bool = False
    looked_at: bool = True
    unchanged: int | None = None  # images that are as they were; null for all


def _all_identified(table: pa.Table) -> bool:
    """Tell whether every usable image of a look is known by its content from an earlier scan."""
    unknown = pc.and_(pc.is_null(table["image_id"]), pc.is_null(table["reject"]))
    return table.num_rows > 0 and not pc.any(unknown).as_py()


def _noted(before: Provenance | None) -> dict[str, Any]:
    """Return what the last scan noted."""
    noted: dict[str, Any] = json.loads(before.noted) if before is not None else {}
    return noted


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
    return bool(asked) and whole and not run.verify and run.limit is None


def _source(project: Project, dataset: DatasetConfig) -> str:
    """Hash where images lie and what decides their sizes, then all that decides how they look."""
    says = looks(dataset.upright)
    sizes = [says.get("orientation"), says.get("part")]
    return f"{digest(dataset.type, _where(project, dataset), sizes)}:{digest(dataset.upright)}"


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
    if known is None or replace(before, inputs="", noted="{}") != now or known.num_rows != len(listing.paths):
        return False
    plain = not (listing.captions or listing.measured or listing.rejects or listing.faults or run.verify)
    sharing = [one for one in run.project.scanned if one.conditioning_type != "reference_strict"]
    alike = sum(_size_of(run, other) == _size_of(run, dataset) for other in sharing)
    alone = alike <= (dataset in sharing)
    untold = listing.of("text_sizes") < 0
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
    facts, texts, read = read_new(captioner, place, listing, memory, wanted)
    facts, examined = look_closer(dataset, place, names, facts, wanted)
    captions = caption_all(captioner, listing, memory, texts)
    del texts
    frames = frame_all(project, dataset, names, facts, _targets(run, dataset), listing.rejects)
    rejects = {row: "name: it is not UTF-8" for row, path in enumerate(listing.paths) if path is not names[row]}
    for found in (_reasons(facts["fault"]), frames.rejects, _reasons(captions["reject"])):
        for row, reason in found.items():
            rejects.setdefault(row, reason)
    selected = select(dataset, project.trainer.prep_seed, names, facts, rejects)
    rejects |= selected.rejects
    boxes, noted = frames.without(rejects.keys()).columns(), {"alike": selected.alike, "collisions": frames.collisions}
    del frames
    table = _table(dataset, names, facts, captions, boxes | {"reject": _reject_column(len(names), rejects)})
    changed = changed_rows(memory, table)
    return table, _Done(listing, read, examined, changed, noted={name: one for name, one in noted.items() if one})


def _targets(run: _Run, dataset: DatasetConfig) -> Targets:
    """Return the map of target sizes; strict references, which take their targets' crops, get one of their own."""
    if dataset.conditioning_type == "reference_strict":
        return Targets()
    return run.targets.setdefault(_size_of(run, dataset), Targets())


def _reasons(column: pa.ChunkedArray) -> dict[int, str]:
    """Return the reasons in a column by their row."""
    rows = np.flatnonzero(column.is_valid().to_numpy())
    return dict(zip(rows.tolist(), column.take(pa.array(rows)).to_pylist(), strict=True))


def _reject_column(count: int, rejects: Mapping[int, str]) -> pa.Array:
    reject: list[str | None] = [None] * count
    for row, reason in rejects.items():
        reject[row] = reason
    return pa.array(reject, pa.string())


def _table(
    dataset: DatasetConfig, names: list[str], facts: pa.Table, captions: pa.Table, more: Mapping[str, pa.Array]
) -> pa.Table:
    """Put all columns together in the order of the manifest's schema."""
    schema = arrow_schema(ImageRow)
    columns: dict[str, Any] = {"dataset_id": pa.repeat(dataset.id, len(names)), "path": pa.array(names, pa.string())}
    columns |= {name: facts[name] for name in facts.column_names}
    columns |= {name: captions[name] for name in captions.column_names}
    columns |= more
    return pa.table([columns[name] for name in schema.names], schema=schema)


def _summary(run: _Run, dataset: DatasetConfig, rows: Iterable[pa.Table], done: _Done) -> DatasetScan:
    """Sum a manifest up, and tell the rejected rows."""
    count = statistics(run.project, dataset, rows)
    if not count.kept:
        log.warning("%s: no usable image in %s", dataset.id, place_of(run.project, dataset).name(""))
    manifest = str(run.project.manifest(dataset.id))
    tell_rejected(dataset.id, count.examples, count.seen - count.kept, manifest)
    return DatasetScan(
        dataset_id=dataset.id,
        seen=count.seen,
        kept=count.kept,
        rejected=count.rejected,
        read=done.read,
        unchanged=count.seen if done.unchanged is None else done.unchanged,
        decoded=done.examined,
        removed=done.removed,
        changed=done.changed,
        settings_changed=done.settings_changed,
        buckets=count.buckets,
        batch_fill=count.batch_fill,
        upscaled=count.upscaled,
        oddities=count.oddities,
        equal_files=count.equal_files,
        near_duplicates=done.noted.get("alike", 0),
        collisions=done.noted.get("collisions", {}),
        faces=count.faces,
        variants=dataset.crops,
        captions=count.captions,
        ignored_files=done.listing.ignored,
        unreadable_folders=tuple(done.listing.unreadable),
        manifest=manifest,
        written=done.written,
        looked_at=done.looked_at,
    )
