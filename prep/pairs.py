"""`prep pairs`: one row for every training sample, its target, its references and the prompts it may be shown.

`pairs` is the public function. References are files matched by relative path, or the target degraded by a recipe.
"""

import math
import time
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from families import Source, open_project
from prep.frames import name_of
from prep.geometry import ASPECT_TOLERANCE, placed
from prep.pixels import Refusal, reference_picture, store
from prep.pool import Crash, default_workers, each
from prep.sheet import contact_sheet
from schemas.console import log, progress, tell_rejected
from schemas.datasets import DatasetConfig, Generator
from schemas.errors import UserError
from schemas.freshness import pairs_provenance, read_manifest
from schemas.keys import digest, seed_of
from schemas.project import Project
from schemas.recipes import recipe_text
from schemas.rows import ImageRow, PairRow, Reference
from schemas.summaries import DatasetPairs, PairsSummary
from schemas.tables import read_provenance, read_table, write_table

_SAMPLE_ID_DIGITS = 16


@dataclass(frozen=True, slots=True)
class _References:
    """A set of reference files, ready to be asked by path."""

    dataset: DatasetConfig
    rows: Mapping[str, ImageRow]
    folded: Mapping[str, str]  # path without extension, case and Unicode form -> path

    def like(self, path: str) -> str | None:
        """Find a file that differs from `path` in extension, case or Unicode form alone."""
        return self.folded.get(_folded(path))

    @property
    def strict(self) -> bool:
        return self.dataset.conditioning_type == "reference_strict"


def pairs(
    project: Source,
    *,
    limit: int | None = None,
    workers: int | None = None,
    dry_run: bool = False,
    preview: int = 0,
) -> PairsSummary:
    """Write a pair table for every set of targets of a project.

    `limit` pairs the first N targets of each set; `preview` draws that many pairs on a contact sheet as the model
    sees them. Raises UserError, also if a manifest is missing or stale.
    """
    start = time.monotonic()
    project = open_project(project, need_images=True)
    processes = workers or default_workers()
    done, previews = [], []
    for target in project.targets:
        summary, rows = _pair_dataset(project, target, limit, processes, dry_run)
        done.append(summary)
        if preview and not dry_run and (sheet := contact_sheet(project, target.id, rows, preview)):
            previews.append(str(sheet))
    return PairsSummary(tuple(done), tuple(previews), project.warnings, time.monotonic() - start, dry_run)


def _pair_dataset(
    project: Project, target: DatasetConfig, limit: int | None, workers: int, dry_run: bool
) -> tuple[DatasetPairs, list[PairRow]]:
    table = project.pair_table(target.id)
    images = read_manifest(project, target)
    cut = limit if limit is not None and limit < len(images) else None
    images = images[:limit]
    references = [_read_references(project, dataset) for dataset in project.references_of(target)]
    rows = [
        row
        for image in images
        if image.reject is None
        for row in _variants(project, target, _pair(project, target, image, references))
    ]
    rows, generated, reused = _generate(project, target, rows, workers, dry_run)
    provenance = replace(pairs_provenance(project, target), limit=cut)
    written = provenance != read_provenance(table, PairRow) or rows != _known(table)
    if written and not dry_run:
        write_table(table, rows, PairRow, provenance)
    kept = [row for row in rows if row.reject is None]
    if not kept:
        log.warning("%s: no pair is left to train on", target.id)
    rejected = [(row.target_path, row.reject) for row in rows if row.reject is not None]
    tell_rejected(target.id, rejected, len(rejected), str(table))
    asked = {row.target_path for row in rows}
    summary = DatasetPairs(
        dataset_id=target.id,
        targets=len(rows),
        pairs=len(kept),
        rejected=_reasons(rows),
        unused_references=sum(len(set(one.rows) - asked) for one in references) if cut is None else 0,
        generated=generated,
        reused=reused,
        table=str(table),
        written=written,
    )
    return summary, rows


def _variants(project: Project, target: DatasetConfig, row: PairRow) -> Iterator[PairRow]:
    """Yield a pair once for each random crop that is cached; references that share the target's box move with it."""
    yield replace(row, variants=target.variants)
    name = name_of(project, target, row.target_path)
    for variant in range(1, target.variants):
        geometry = placed(row.geometry, target.crop_style, name, variant)
        moved = [replace(one, geometry=geometry) if one.geometry == row.geometry else one for one in row.references]
        sample = digest("sample", target.id, row.target_path, variant)[:_SAMPLE_ID_DIGITS]
        yield replace(row, sample_id=sample, variant=variant, variants=target.variants, geometry=geometry,
                      references=moved)  # fmt: skip


def _read_references(project: Project, dataset: DatasetConfig) -> _References:
    rows = {row.path: row for row in read_manifest(project, dataset)}
    return _References(dataset, rows, {_folded(path): path for path in rows})


def _known(table: Path) -> list[PairRow] | None:
    """Read the table that is there; None if it is damaged."""
    try:
        return read_table(table, PairRow)
    except UserError:
        return None


def _pair(project: Project, target: DatasetConfig, image: ImageRow, references: list[_References]) -> PairRow:
    found = [_match(image, one) for one in references]
    missing = [reason for reason in found if isinstance(reason, str)]
    matched = [reference for reference in found if isinstance(reference, Reference)]
    matched += [_degraded(project, target, image, entry) for entry in target.conditioning]
    prompts = image.captions
    if len(matched) == 1 and matched[0].prompts:
        prompts, matched = matched[0].prompts, [replace(matched[0], prompts=[])]
    assert image.image_id is not None, "a kept row has been hashed"
    return PairRow(
        sample_id=digest("sample", target.id, image.path)[:_SAMPLE_ID_DIGITS],
        dataset_id=target.id,
        target_image_id=image.image_id,
        target_path=image.path,
        variant=0,
        variants=1,
        geometry=image.geometry,
        view=target.view,
        references=[] if missing else matched,
        prompts=prompts,
        bucket=image.geometry.bucket,
        repeats=target.repeats,
        reject=missing[0] if missing else None,
    )


def _match(image: ImageRow, references: _References) -> Reference | str:
    """Find a target's file in a set of references, or return the reason why the pair cannot be."""
    name, row = references.dataset.id, references.rows.get(image.path)
    if row is None:
        nearest = references.like(image.path)
        return f"no reference: {name} has no {image.path}" + (f", but {nearest}" if nearest else "")
    if row.width is None or row.height is None or row.image_id is None or (row.reject and not references.strict):
        return f"reference rejected: {name}/{row.path}: {row.reject}"
    if references.strict:
        assert image.width is not None and image.height is not None, "a kept row has been measured"
        difference = abs(math.log((row.width / row.height) / (image.width / image.height)))
        if difference > ASPECT_TOLERANCE:
            return (
                f"aspect differs: {name}/{row.path} is {row.width}x{row.height}, its target "
                f"{image.width}x{image.height}; reference_strict needs the same aspect"
            )
    geometry = image.geometry if references.strict else row.geometry
    view = references.dataset.view
    return Reference(name, row.image_id, row.path, None, None, geometry.bucket, geometry, view, row.captions)


def _folded(path: str) -> str:
    return unicodedata.normalize("NFC", str(Path(path).with_suffix(""))).casefold()


def _degraded(project: Project, target: DatasetConfig, image: ImageRow, entry: Generator) -> Reference:
    """Describe the reference that a generator makes of a target; its seed depends on image and recipe alone."""
    assert image.image_id is not None, "a kept row has been hashed"
    recipe = recipe_text(entry.recipe)
    return Reference(
        dataset_id=target.generated_id(entry),
        image_id=image.image_id,
        path=image.path,
        recipe=recipe,
        seed=seed_of(project.trainer.prep_seed, "degrade", image.image_id, recipe),
        bucket=image.geometry.bucket,
        geometry=image.geometry,
        view=target.view,
        prompts=list(entry.captions),
    )


def _generate(
    project: Project, target: DatasetConfig, rows: list[PairRow], workers: int, dry_run: bool
) -> tuple[list[PairRow], int, int]:
    """Make the reference pictures that are to be stored as files; return the rows and how many were made and reused.

    A picture that can never be made rejects its pair. Raises UserError for one that may be made another time.
    """
    stored = {target.generated_id(entry) for entry in target.conditioning if entry.storage == "files"}
    wanted = {
        (number, reference_picture(project, row, reference))
        for number, row in enumerate(rows)
        for reference in row.references
        if reference.dataset_id in stored
    }
    by_place = {picture.store: picture for _, picture in sorted(wanted, key=lambda one: one[0], reverse=True)}
    missing = [picture for place, picture in sorted(by_place.items()) if not place.exists()]
    total = len(by_place)
    if dry_run:
        return rows, len(missing), total - len(missing)
    refused: dict[Path, str] = {}
    unsettled: dict[str, str] = {}  # what may work another time
    with progress(f"degrade {target.id}", total, "image", done=total - len(missing)) as bar:
        for picture, fault in each(store, missing, workers):
            if isinstance(fault, Crash) or (isinstance(fault, Refusal) and not fault.lasting):
                unsettled[picture.name] = fault.reason
            elif isinstance(fault, Refusal):
                refused[picture.store] = f"reference not made: {fault.reason}"
            bar.update()
    if unsettled:
        listed = "\n".join(f"  {file}: {reason}" for file, reason in sorted(unsettled.items())[:20])
        raise UserError(f"{len(unsettled)} references could not be made; run prep scan and prep pairs again:\n{listed}")
    rejected = {number: refused[picture.store] for number, picture in wanted if picture.store in refused}
    rows = [replace(row, reject=rejected.get(number, row.reject)) for number, row in enumerate(rows)]
    return rows, len(missing) - len(refused), total - len(missing)


def _reasons(rows: Iterable[PairRow]) -> dict[str, int]:
    return dict(Counter(row.reject.partition(":")[0] for row in rows if row.reject is not None))
