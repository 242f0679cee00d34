"""`prep pairs`: one row for every training sample, its target, its references and the prompts it may be shown.

`pairs` is the public function. References are files matched by relative path, or the target degraded by a recipe.
"""

import csv
import io
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc

from families import Source, open_project
from prep.aligning import Comparison, compare_all, worst_first
from prep.degrade import why_impossible
from prep.generating import generate
from prep.matching import COLUMNS, KINDS, Found, Manifest, Matched, match
from prep.pairing import pair_table
from prep.pixels import store
from prep.pool import Crew, default_workers
from prep.sheet import contact_sheet
from schemas.console import log, printable, tell_rejected
from schemas.datasets import DatasetConfig
from schemas.errors import UserError
from schemas.freshness import pairs_provenance, read_manifest
from schemas.lock import only_one
from schemas.project import Project
from schemas.rows import PairRow
from schemas.storage import write_aside
from schemas.summaries import DatasetPairs, PairsSummary
from schemas.tables import read_columns, read_provenance, write_table

Line: TypeAlias = tuple[str, str, str, str]  # kind, target, reference as set/path (or the set), what is the matter


@dataclass(slots=True)
class _Run:
    """What all sets of targets of one command share."""

    project: Project
    limit: int | None
    dry_run: bool
    misaligned: Literal["ignore", "report", "reject"] | None
    crew: Crew
    manifests: dict[str, Manifest] = field(default_factory=dict)  # by dataset

    def manifest(self, dataset: DatasetConfig) -> Manifest:
        """Read a manifest, each once."""
        if dataset.id not in self.manifests:
            self.manifests[dataset.id] = Manifest(dataset, read_manifest(self.project, dataset, COLUMNS))
        return self.manifests[dataset.id]


@dataclass(slots=True)
class _Set:
    """The targets of one set, matched, before anything is made of them."""

    matched: Matched
    cut: int | None  # targets that a limit left
    faults: list[tuple[int, str]]  # row of a target, why it has no proper reference: the first of each
    lines: list[Line]  # all that is odd, complete
    unused: int  # files of the references that belong to no target
    resized: int  # strict references that are scaled to their target's size


def pairs(
    project: Source,
    *,
    limit: int | None = None,
    workers: int | None = None,
    dry_run: bool = False,
    preview: int = 0,
    misaligned: Literal["ignore", "report", "reject"] | None = None,
) -> PairsSummary:
    """Write a pair table for every set of targets of a project.

    `limit` pairs the first N targets of each set; `preview` draws that many pairs on a contact sheet as the model sees
    them; `misaligned` says what becomes of strict references that do not lie on their targets, in place of
    `alignment_check`: "ignore" compares none. Raises UserError if a manifest is missing or stale, and, before anything
    is made, if targets lack proper references and `on_unpaired` is "error".
    """
    start = time.monotonic()
    project = open_project(project, need_images=True)
    _refuse_impossible(project)
    alone = nullcontext() if dry_run else only_one(project.workspace / "pairs", "prep pairs")
    with alone, Crew(workers or default_workers(), store) as crew:
        run = _Run(project, limit, dry_run, misaligned, crew)
        sets = [_match(run, target) for target in project.targets]
        _tell_unpaired(run, sets)
        done, previews = [], []
        for one in sets:
            summary, table = _pair(run, one)
            done.append(summary)
            if preview and not dry_run and (sheet := contact_sheet(project, one.matched.target.id, table, preview)):
                previews.append(str(sheet))
    return PairsSummary(tuple(done), tuple(previews), (), project.warnings, time.monotonic() - start, dry_run)


def _refuse_impossible(project: Project) -> None:
    """Raise UserError for a degradation that the installed libraries cannot do."""
    for target in project.targets:
        for name, entry in zip(target.generated_ids, target.conditioning, strict=True):
            if reason := why_impossible(entry.recipe):
                raise UserError(f"{name}: {reason}")


# Matching


def _match(run: _Run, target: DatasetConfig) -> _Set:
    """Match a set of targets with its references, and note all that is odd."""
    own, limit = run.manifest(target), run.limit
    cut = limit if limit is not None and limit < own.rows.num_rows else None
    own = replace(own, rows=own.rows.slice(0, cut)) if cut is not None else own
    matched = match(own, [run.manifest(one) for one in run.project.references_of(target)])
    paths = matched.images["path"]
    faults: dict[int, str] = {}
    lines: list[Line] = []
    for row, place, kind, reason in matched.faults():
        faults.setdefault(row, reason)
        lines.append((kind, paths[row].as_py(), _file_of(matched.found[place], row), reason.partition(": ")[2]))
    unused = resized = 0
    for found in matched.found:
        resized += len(found.resized)
        lines += _resized(matched, found)
        if cut is None:
            unused += len(found.unasked)
            strays = found.references.rows["path"].take(pa.array(found.unasked)).to_pylist()
            name = found.references.dataset.id
            lines += [("no target", "", f"{name}/{path}", f"{target.id} has no {path}") for path in strays]
    return _Set(matched, cut, sorted(faults.items()), lines, unused, resized)


def _file_of(found: Found, row: int) -> str:
    """Name a target's file as set/path, the set alone where there is none."""
    at, name = int(found.at[row]), found.references.dataset.id
    return name if at < 0 else f"{name}/{found.references.rows['path'][at].as_py()}"


def _resized(matched: Matched, found: Found) -> Iterator[Line]:
    """Yield the strict references that have another size than their target, and its aspect."""
    names = ["path", "width", "height"]
    images = matched.images.select(names).take(pa.array(found.resized)).to_pylist()
    files = found.references.rows.select(names).take(pa.array(found.at[found.resized])).to_pylist()
    for image, file in zip(images, files, strict=True):
        told = f"{file['width']}x{file['height']}, its target {image['width']}x{image['height']}: scaled"
        yield "size differs", image["path"], f"{found.references.dataset.id}/{file['path']}", told


def _tell_unpaired(run: _Run, sets: Sequence[_Set]) -> None:
    """Raise UserError, and write reports, if sets have faults and do not say what becomes of them."""
    told = []
    for one in sets:
        target, path = one.matched.target, run.project.pair_report(one.matched.target.id)
        if not one.faults or target.on_unpaired != "error":
            continue
        kinds = Counter(reason.partition(":")[0] for _, reason in one.faults)
        told.append(
            f"{target.id}: {len(one.faults)} of {one.matched.images.num_rows} targets have no proper reference:"
        )
        for kind in [kind for kind in KINDS if kind in kinds]:
            first = next(reason for _, reason in one.faults if reason.startswith(f"{kind}:"))
            told.append(f"  {kinds[kind]} {printable(first)}" + (", for example" if kinds[kind] > 1 else ""))
        told.append(
            f"  all of them: {path}" if not run.dry_run else "  all of them: the same command without --dry-run"
        )
    if told:
        for one in sets if not run.dry_run else ():
            _write_report(run.project.pair_report(one.matched.target.id), one.lines)
        advice = (
            f"nothing was paired; mend the files and run {run.project.command('prep scan')}, or say in "
            f'{Path(run.project.trainer.data_backend_config).name} "on_unpaired": "drop" or "train_without_reference"'
        )
        raise UserError("\n".join([*told, advice]))


def _write_report(path: Path, lines: Sequence[Line]) -> None:
    """Write all that was odd as CSV, if that is news."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("kind", "target", "reference", "detail"))
    writer.writerows([printable(cell) for cell in line] for line in lines)
    data = text.getvalue().encode("utf-8")
    if not path.exists() or path.read_bytes() != data:
        with write_aside(path) as aside:
            aside.write_bytes(data)


# Pairing


def _pair(run: _Run, one: _Set) -> tuple[DatasetPairs, pa.Table]:
    """Compare, make the table, make the pictures that are to be stored, write."""
    project, matched = run.project, one.matched
    target, path = matched.target, project.pair_table(matched.target.id)
    known = _known(path)
    rejects = dict(one.faults) if target.on_unpaired == "drop" else {}
    comparison = Comparison.none()
    if run.misaligned != "ignore":
        comparison = compare_all(project, matched, known, run.crew, dry_run=run.dry_run)
    if (run.misaligned or target.alignment_check.misaligned) == "reject":
        rejects |= {row: reason for row, _, reason in comparison.accused if row not in rejects}
    if not run.dry_run:
        _write_report(project.pair_report(target.id), [*one.lines, *_misaligned(matched, comparison)])
    table = pair_table(project, matched, comparison.measures, rejects)
    made = generate(project, target, table, run.crew, dry_run=run.dry_run)
    table = _with_rejects(table, made.refused)
    provenance = replace(pairs_provenance(project, target), limit=one.cut)
    written = provenance != read_provenance(path, PairRow) or known is None or not table.equals(known)
    if written and not run.dry_run:
        write_table(path, table, PairRow, provenance)
    kept = pc.is_null(table["reject"])
    count = pc.sum(kept).as_py() or 0
    if not count:
        log.warning("%s: no pair is left to train on", target.id)
    bad = table.filter(pc.invert(kept)).select(["target_path", "reject"]).to_pydict()
    tell_rejected(target.id, list(zip(*bad.values(), strict=True)), len(bad["reject"]), str(path))
    summary = DatasetPairs(
        dataset_id=target.id,
        targets=matched.images.num_rows,
        pairs=count,
        rejected=dict(Counter(reason.partition(":")[0] for reason in bad["reject"])),
        without_reference=len(one.faults) if target.on_unpaired == "train_without_reference" else 0,
        unused_references=one.unused,
        resized_references=one.resized,
        compared=comparison.compared,
        misaligned=len(comparison.accused),
        uncertain=comparison.uncertain,
        worst=tuple(f"{path_}: {reason}" for _, path_, _, reason in _misaligned(matched, comparison, 3)),
        generated=made.made,
        reused=made.reused,
        table=str(path),
        report=str(project.pair_report(target.id)),
        written=written,
    )
    return summary, table


def _with_rejects(table: pa.Table, reasons: Mapping[int, str]) -> pa.Table:
    """Reject rows of a table, those that are not rejected already."""
    if not reasons:
        return table
    column = table["reject"].to_pylist()
    for row, reason in reasons.items():
        column[row] = column[row] or reason
    place = table.schema.get_field_index("reject")
    return table.set_column(place, table.schema.field(place), pa.array(column, pa.string()))


def _known(path: Path) -> pa.Table | None:
    """Read the table that is there; None if it is damaged, or there is none."""
    try:
        return read_columns(path, PairRow)
    except UserError:
        return None


def _misaligned(matched: Matched, comparison: Comparison, most: int | None = None) -> Iterator[Line]:
    """Yield the pairs that look misaligned, the worst first."""
    paths = matched.images["path"]
    for row, place, reason in worst_first(comparison)[:most]:
        yield "misaligned", paths[row].as_py(), _file_of(matched.found[place], row), reason.partition(": ")[2]
