"""`prep plan`: what scan, pairs, cache and train would do, and what it takes, before any of it is done.

`plan` is the public function. Nothing is written, decoded or loaded: fresh manifests are read, other images looked at.
"""

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from families import Source, open_project
from families.checkpoints import here, image_encoder_keys, text_encoder_key
from prep.matching import COLUMNS, Manifest
from prep.planning import budget
from prep.planning.budget import PICTURE_BYTES, Need, Sizes
from prep.planning.epochs import plan_epoch, shown_of
from prep.planning.obstacles import trained, why_blocked, why_empty
from prep.planning.sides import Match, sides_of
from prep.scan import looking
from prep.statistics import counts_of, kinds_of
from schemas.datasets import DatasetConfig
from schemas.errors import UserError
from schemas.freshness import pairs_provenance
from schemas.paths import is_url
from schemas.planned import DatasetPlan, Disk, PlanSummary, StagePlan, sized
from schemas.project import Project
from schemas.rows import ImageRow, PairRow
from schemas.stores import Store
from schemas.tables import read_columns, read_provenance

_TABLE_BYTES, _IMAGE_BYTES, _PAIR_BYTES, _REFERENCE_BYTES = 10_000, 200, 200, 100  # of Parquet tables, about
_ROLES = {"conditioning": "references", "eval": "held out"}


def plan(project: Source, *, workers: int | None = None) -> PlanSummary:
    """Plan a project; raises UserError if its files are faulty or images cannot be listed."""
    start = time.monotonic()
    project = open_project(project, need_images=True)
    with looking(project, workers) as look:
        manifests = {dataset.id: _manifest(project, dataset, look) for dataset in project.scanned}
    matches = [
        part
        for target in project.targets
        for part in sides_of(manifests[target.id], [manifests[one.id] for one in project.references_of(target)])
    ]
    sizes, (image_encoders, text_encoder) = budget.sizes_of(project), _keys(project)
    latents = budget.latents(project, matches, sizes, image_encoders)
    text = budget.texts(project, matches, sizes, text_encoder)
    made = budget.pictures(project, matches)
    stages = (
        *_tables(project, manifests, matches),
        *([_stage("reference pictures", project.pixel_store, made, assumed=True)] if made.needed else []),
        *(_stage("latents", folder, need, assumed=sizes.assumed) for folder, need in latents.items()),
        _stage("text embeds", project.text_store, text, assumed=sizes.assumed),
    )
    disks = tuple(_disks(project.workspace, stages))
    empty = why_empty(project, manifests, matches)
    blocked = why_blocked(project, matches, empty)
    notes = [*_notes(project, manifests, sizes, made, [*latents.values()])]
    if not text.exact:
        notes.append(
            "text embeds are counted with all their padding: how long prompts are, the checkpoint's tokenizer tells"
        )
    if _cached(project) and None in (image_encoders, text_encoder):
        notes.append(f"checkpoint {project.checkpoint} is not on this machine: all is counted as to be encoded")
    notes += [f"{name} gives no pair: {reason}" for name, reason in empty.items() if blocked is None]
    datasets = tuple(_dataset(project, one, matches) for one in manifests.values())
    return PlanSummary(
        datasets=datasets,
        seen=sum(one.seen for one in datasets),
        kept=sum(one.kept for one in datasets),
        pairs=sum(one.pairs for one in datasets),
        stages=stages,
        bytes=sum(one.bytes for one in stages),
        bytes_to_write=sum(one.bytes_to_write for one in stages),
        disks=disks,
        smaller=budget.smaller(matches, sum(need.bytes for need in latents.values())),
        train_batch_size=project.trainer.train_batch_size,
        gradient_accumulation_steps=project.trainer.gradient_accumulation_steps,
        epoch=plan_epoch(project, [one for one in matches if trained(project, one.target)]),
        notes=tuple(notes),
        warnings=(*project.warnings, *_warnings(disks)),
        blocked=blocked,
        seconds=time.monotonic() - start,
    )


def _manifest(project: Project, dataset: DatasetConfig, look: Callable[[DatasetConfig], pa.Table]) -> Manifest:
    """Read a manifest that is whole and of these settings, or look at the images."""
    path = project.manifest(dataset.id)
    provenance = read_provenance(path, ImageRow)
    stale = "its manifest cannot be read" if path.exists() else "not scanned yet"
    if provenance is not None and provenance.config != project.scan_settings(dataset):
        stale = "its settings changed"
    elif provenance is not None and provenance.limit is not None:
        stale = f"scanned with --limit {provenance.limit}"
    elif provenance is not None:
        try:
            return Manifest(dataset, read_columns(path, ImageRow, COLUMNS), None, provenance.hashed)
        except UserError:
            pass  # looked at, as prep scan would
    undecoded = {"near_duplicates": "ignore"} | ({"crop_style": "center"} if dataset.crop_style == "face" else {})
    rows = look(dataset.model_copy(update=undecoded)).select(COLUMNS)
    missing = pc.fill_null(pc.starts_with(rows["reject"], "not downloaded yet"), False)
    here = rows.filter(pc.invert(missing))
    return Manifest(dataset, here, stale, hashed=False, absent=rows.num_rows - here.num_rows)


def _keys(project: Project) -> tuple[tuple[str, str] | None, str | None]:
    """Return the keys of image encoders, of targets and of references, and of text encoders that are on this machine.

    None where there is nothing to compare. What prep cache noted is not asked: it may be of another checkpoint.
    """
    image = text = None
    checkpoint = here(project, project.family.image_encoder) if _cached(project) else None
    if checkpoint is not None:
        image = image_encoder_keys(project, checkpoint, remember=False)
    checkpoint = here(project, project.family.text_encoders) if _cached(project) else None
    if checkpoint is not None:
        text = text_encoder_key(project, checkpoint, remember=False)
    return image, text


def _cached(project: Project) -> bool:
    """Tell whether there is a store, of whatever encoder."""
    return any(
        folder.exists()
        for folder in (project.text_store, *(project.latent_store(dataset) for dataset in project.scanned))
    )


def _dataset(project: Project, manifest: Manifest, matches: Sequence[Match]) -> DatasetPlan:
    dataset, rejects = manifest.dataset, pc.drop_null(manifest.rows["reject"])
    parts = [one for one in matches if one.target.id == dataset.id]
    count = sum(one.count for one in parts)
    learnt = dataset.is_target and trained(project, dataset)
    return DatasetPlan(
        dataset_id=dataset.id,
        role="targets" if learnt else _ROLES.get(dataset.dataset_type, "held out"),
        looked_at=manifest.stale,
        seen=manifest.rows.num_rows + manifest.absent,
        kept=manifest.rows.num_rows - len(rejects),
        rejected=counts_of(kinds_of(rejects)),
        absent=manifest.absent,
        targets=count,
        variants=dataset.crops,
        degradations=dataset.variants // dataset.crops,
        pairs=count * dataset.variants,
        unpaired=parts[0].rejected if parts else {},
        file_references=len(project.references_of(dataset)) if dataset.is_target else 0,
        made_references=len(dataset.conditioning) if dataset.is_target else 0,
        showings=sum(map(shown_of, parts)) * (dataset.repeats + 1) if learnt else 0,
    )


def _tables(project: Project, manifests: Mapping[str, Manifest], matches: Sequence[Match]) -> Iterator[StagePlan]:
    """Yield the manifests and pair tables; of their bytes only an idea is given."""
    rows = {name: one.rows.num_rows for name, one in manifests.items()}
    read = sum(rows[name] for name, one in manifests.items() if one.stale is None and one.hashed)
    need = Need(sum(rows.values()), read, sum(map(_manifest_bytes, rows.values())),
                sum(_manifest_bytes(rows[name]) for name, one in manifests.items() if one.stale is None and one.hashed),
                True)  # fmt: skip
    yield _stage("manifests", project.manifest("").parent, need, assumed=True)
    tables = [(one.count * one.target.variants, _pair_bytes(one), _paired(project, one.target)) for one in matches]
    need = Need(sum(count for count, _, _ in tables), sum(count for count, _, there in tables if there),
                sum(size for _, size, _ in tables), sum(size for _, size, there in tables if there), True)  # fmt: skip
    yield _stage("pair tables", project.pair_table("").parent, need, assumed=True)


def _manifest_bytes(rows: int) -> int:
    return _TABLE_BYTES + _IMAGE_BYTES * rows


def _pair_bytes(pairs: Match) -> int:
    row = _PAIR_BYTES + _REFERENCE_BYTES * (len(pairs.shown) - 1)
    return _TABLE_BYTES + pairs.count * pairs.target.variants * row


def _paired(project: Project, target: DatasetConfig) -> bool:
    """Tell whether a pair table is as prep pairs would write it."""
    try:
        return read_provenance(project.pair_table(target.id), PairRow) == pairs_provenance(project, target)
    except UserError:
        return False


def _stage(stage: str, folder: Path | Store, need: Need, *, assumed: bool) -> StagePlan:
    where = str(folder) if isinstance(folder, Path) else folder.where()
    return StagePlan(
        stage, where, need.needed, need.there, need.needed - need.there, need.bytes,
        need.bytes - need.bytes_there, not need.exact, assumed,
    )  # fmt: skip


def _disks(workspace: Path, stages: Sequence[StagePlan]) -> Iterator[Disk]:
    """Yield the file systems of this machine that would be written to."""
    needed: dict[int, tuple[Path, int]] = {}
    here = [stage for stage in stages if not is_url(stage.folder)]
    for place, size in [(str(workspace), 0), *((stage.folder, stage.bytes_to_write) for stage in here)]:
        folder = next(one for one in (Path(place), *Path(place).parents) if one.exists())
        first, before = needed.get(folder.stat().st_dev, (folder, 0))
        needed[folder.stat().st_dev] = first, before + size
    for folder, size in needed.values():
        yield Disk(str(folder), shutil.disk_usage(folder).free, size)


def _warnings(disks: Sequence[Disk]) -> Iterator[str]:
    for disk in disks:
        if disk.needed_bytes > disk.free_bytes:
            yield f"{disk.folder}: {sized(disk.needed_bytes)} would be written, {sized(disk.free_bytes)} are free"


def _notes(
    project: Project, manifests: Mapping[str, Manifest], sizes: Sizes, made: Need, latents: Sequence[Need]
) -> Iterator[str]:
    """Yield what the numbers rest on."""
    if not all(need.exact for need in latents):
        yield "numbers of latents are upper bounds: files of equal bytes, and equal crops, are encoded once"
    if sizes.assumed:
        own = project.model.checkpoint
        yield f"sizes are those of {own}: checkpoint {project.checkpoint} is not on this machine"
    if made.needed:
        yield f'reference pictures are reckoned at {PICTURE_BYTES:g} bytes per pixel; "storage": "ondemand" writes none'
    unscanned = [one.dataset for one in manifests.values() if one.stale is not None]
    if any(one.near_duplicates != "ignore" or one.exact_duplicates == "reject" for one in unscanned):
        yield "duplicates are found by prep scan alone: fewer images may be kept"
    absent = sum(one.absent for one in manifests.values())
    if absent:
        yield f"{absent} of the images are not downloaded yet, so that little is known of them; prep scan fetches them"
