"""What the page shows of a pair table: figures, pairs before and after, and the references that lie worst.

`show` is the way in. How references lie is read from the table, and nothing is compared anew; pictures are made in
prep/page/comparisons.py. A new figure is a line in `_figures`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from prep.aligning import Comparison, worst_first
from prep.alignment import MEASURES, TRUSTED, Alignment
from prep.page.columns import Figure, Flags, Indices
from prep.page.comparisons import REFERENCES, Compared, Pair, drawn
from prep.page.pictures import spread
from prep.showing import accusation
from prep.statistics import counts_of, kinds_of
from schemas.datasets import AlignmentCheck, DatasetConfig
from schemas.errors import UserError
from schemas.freshness import pairs_provenance
from schemas.project import Project
from schemas.recipes import Chain, Recipe
from schemas.rows import PairRow
from schemas.tables import Provenance, read_columns, read_provenance

_PAIRS = 24  # shown at most
_COMPARISONS = 48  # of their references with them: pairs of many references are fewer
_WORST = 12  # references shown at least, worst first, if there are so many
_ACCUSED = 24  # of those that the thresholds accuse, shown with pictures
_NAMED = 200  # of those, named
_REJECTS = 24  # rejected samples named


@dataclass(frozen=True, slots=True)
class Worst:
    """The references of files, those first that lie worst on their targets."""

    shown: tuple[tuple[str, Compared], ...]  # path of the target, reference
    named: tuple[tuple[str, str, str, str], ...]  # accused ones that are not shown: target, set, reference, words
    num_compared: int
    num_accused: int


@dataclass(frozen=True, slots=True)
class Rejects:
    """Why samples are not used."""

    kinds: tuple[Figure, ...]
    examples: tuple[tuple[str, str], ...]  # path of the target, reason
    number: int


@dataclass(frozen=True, slots=True)
class Facts:
    """What a pair table comes to."""

    figures: tuple[Figure, ...]
    sets: tuple[Figure, ...]  # of references
    pairs: tuple[Pair, ...]
    num_pairs: int
    worst: Worst
    rejects: Rejects
    report: str  # CSV of all that was odd


@dataclass(frozen=True, slots=True)
class PairsPage:
    """What is shown of one pair table."""

    dataset: DatasetConfig
    anchor: str
    notices: tuple[str, ...]
    facts: Facts | None  # null if there is no table that can be read


@dataclass(frozen=True, slots=True)
class _References:
    """The references of a table's rows as columns, one line for each."""

    row: Indices  # of the table
    place: Indices  # in its row
    columns: Any


def show(project: Project, thumbnails: int) -> list[PairsPage]:
    """Show the pair tables, those that are missing by a notice; nothing if there is none at all."""
    tried = (project.pair_table, project.pair_report)
    if not any(path(target.id).exists() for target in project.targets for path in tried):
        return []
    return [_page(project, target, f"pairs-{number}", thumbnails) for number, target in enumerate(project.targets, 1)]


def _page(project: Project, target: DatasetConfig, anchor: str, thumbnails: int) -> PairsPage:
    path, again = project.pair_table(target.id), f"run: {project.command('prep pairs')}"
    provenance = read_provenance(path, PairRow)
    if provenance is None:
        state = "Its pair table cannot be read" if path.exists() else "Not paired yet"
        if _lists_faults(project.pair_report(target.id)):
            state += f"; {project.pair_report(target.id)} lists what was wrong with its references"
        return PairsPage(target, anchor, (f"{state}; {again}",), None)
    try:
        table = read_columns(path, PairRow)
    except UserError:  # a page that does not fit its checksum
        return PairsPage(target, anchor, (f"Its pair table is damaged; {again}",), None)
    notices = tuple(_notices(project, target, provenance))
    return PairsPage(target, anchor, notices, _facts(project, target, table, thumbnails))


def _lists_faults(report: Path) -> bool:
    """Tell a report that has more than its first line."""
    try:
        with report.open("rb") as file:
            return len(list(islice(file, 2))) == 2
    except OSError:
        return False


def _notices(project: Project, target: DatasetConfig, provenance: Provenance) -> Iterator[str]:
    """Yield what is stale about a table, as `schemas.freshness.read_pairs` would refuse it."""
    together = (target, *project.references_of(target))
    here = all(project.manifest(dataset.id).exists() for dataset in together)
    try:
        now = pairs_provenance(project, target) if here else None
        scan = ""
    except UserError:  # a manifest of other settings, or damaged
        now, scan = None, f"{project.command('prep scan')}, then "
    again = f"run: {scan}{project.command('prep pairs')}"
    if provenance.config != project.pairs_settings(target):
        yield f"The settings of its images or pairs changed since it was paired, and this shows what was; {again}"
    elif scan:
        yield f"A manifest that it was made of cannot be used any more; {again}"
    elif now is not None and now.inputs != provenance.inputs:
        yield f"Scanned anew since it was paired, and this shows what was; {again}"
    if provenance.limit is not None:
        yield f"Only its first {provenance.limit:,} targets were paired (--limit)"


def _facts(project: Project, target: DatasetConfig, table: pa.Table, thumbnails: int) -> Facts:
    kept = pc.is_null(table["reject"]).to_numpy()
    references = _flat(table)
    worst = _worst(target.alignment_check, table, references)
    each = -(-len(references.row) // max(1, int(kept.sum())))
    pairs = _chosen(table, kept, references, min(thumbnails, _PAIRS, _COMPARISONS // max(1, min(each, REFERENCES))))
    limit = min(thumbnails, max(_WORST, min(_ACCUSED, len(worst.accused))))
    lines = worst.order[:limit]
    places = list(zip(references.row[lines].tolist(), references.place[lines].tolist(), strict=True))
    shown, lying = drawn(project, target, table, (pairs, places))
    return Facts(
        figures=_figures(table, kept, references, worst),
        sets=_sets(project, target, references, kept),
        pairs=shown,
        num_pairs=int(kept.sum()),
        worst=Worst(lying, _named(table, references, worst, limit), worst.num_compared, len(worst.accused)),
        rejects=_rejects(table, kept),
        report=str(project.pair_report(target.id)),
    )


# Columns


def _flat(table: pa.Table) -> _References:
    """Take the references of all rows apart."""
    column = table["references"].combine_chunks()
    rows = np.asarray(pc.list_parent_indices(column), np.int64)
    return _References(rows, np.arange(len(rows)) - np.searchsorted(rows, rows), column.flatten())


def _figures(table: pa.Table, kept: Flags, references: _References, worst: "_Ranked") -> tuple[Figure, ...]:
    counts = np.bincount(references.row, minlength=len(kept))[kept]
    first = np.asarray(table["variant"]) == 0
    variants = int(pc.max(table["variants"]).as_py() or 1)
    several = (Figure("variants of a target", variants, "shown in turn, epoch by epoch"),) if variants > 1 else ()
    without = int((counts == 0).sum())
    plain = (Figure("without a reference", without, "plain text-to-image"),) if without else ()
    compared = worst.num_compared
    lying = (Figure("misaligned", len(worst.accused), f"of {compared:,} compared"),) if compared else ()
    return (
        Figure("targets", int(first.sum())),
        Figure("pairs", int(kept.sum())),
        Figure("rejected", int((~kept).sum())),
        Figure("references per pair", _median(counts), _range(counts)),
        *several,
        *plain,
        *lying,
    )


def _median(counts: npt.NDArray[np.int64]) -> int | float:
    median = float(np.median(counts)) if len(counts) else 0.0
    return int(median) if median.is_integer() else median


def _range(counts: npt.NDArray[np.int64]) -> str:
    if not len(counts) or counts.min() == counts.max():
        return ""
    return f"median; {counts.min():,} to {counts.max():,}"


def _sets(project: Project, target: DatasetConfig, references: _References, kept: Flags) -> tuple[Figure, ...]:
    """Count the references of each set in kept rows, in the order of the project, and say what they are."""
    files = {"reference_loose": "files of their own size", "reference_strict": "files, cropped like the target"}
    said = {one.id: files.get(one.conditioning_type or "", "files") for one in project.references_of(target)}
    made = zip(target.generated_ids, target.conditioning, strict=True)
    said |= {name: f"made of the target: {_recipe(entry.recipe)}" for name, entry in made}
    shown = references.columns.field("dataset_id").filter(pa.array(kept[references.row]))
    counts = counts_of(pa.chunked_array([shown]))
    unknown = [name for name in counts if name not in said]
    return tuple(Figure(name, counts[name], said.get(name, "")) for name in (*said, *unknown) if name in counts)


def _recipe(recipe: Recipe) -> str:
    """Name a degradation."""
    preset = recipe.preset if isinstance(recipe, Chain) else None
    return preset or recipe.type.replace("_", " ")


def _chosen(table: pa.Table, kept: Flags, references: _References, count: int) -> Indices:
    """Choose kept rows, spread over buckets and sets of references; of each target one, if there are many targets."""
    variant, variants = np.asarray(table["variant"]), np.asarray(table["variants"])
    nth = np.cumsum(variant == 0)
    one_each = kept & (nth % variants == variant)
    candidates = one_each if one_each.sum() >= count else kept
    column = table["references"].combine_chunks()
    names = pa.ListArray.from_arrays(column.offsets, references.columns.field("dataset_id"))
    kinds = pc.binary_join_element_wise(table["bucket"].combine_chunks(), pc.binary_join(names, " "), " ")
    kinds = pc.if_else(pa.array(candidates), kinds, None)
    return spread(kinds, pc.unique(kinds.drop_null()).to_pylist(), count)


def _rejects(table: pa.Table, kept: Flags) -> Rejects:
    bad = table.select(["target_path", "reject"]).filter(pa.array(~kept))
    column = kinds_of(bad["reject"])
    kinds = counts_of(column)
    some = bad.take(pa.array(spread(column, list(kinds), _REJECTS))).to_pylist()
    examples = sorted(((one["target_path"], one["reject"]) for one in some), key=lambda one: _rank(one[1], kinds))
    return Rejects(tuple(Figure(*one) for one in kinds.items()), tuple(examples), bad.num_rows)


def _rank(reason: str, kinds: dict[str, int]) -> int:
    return list(kinds).index(reason.partition(":")[0])


# Alignment


@dataclass(frozen=True, slots=True)
class _Ranked:
    """Lines of references that were compared, the worst first; the accused come before all others."""

    order: Indices
    accused: tuple[int, ...]
    words: tuple[str, ...]  # of the accused
    num_compared: int


def _worst(check: AlignmentCheck, table: pa.Table, references: _References) -> _Ranked:
    """Rank what was compared, of each target once: variants repeat the same two files."""
    numbers = np.column_stack([_values(references.columns.field(name)) for name in MEASURES])
    first = np.asarray(table["variant"])[references.row] == 0
    compared = np.flatnonzero(~np.isnan(numbers).any(axis=1) & first)
    groups: tuple[list[tuple[int, int, str]], ...] = ([], [], [])  # accused, trusted, what cannot be told
    for line, values in zip(compared.tolist(), numbers[compared].tolist(), strict=True):
        found = Alignment(*values)
        words = accusation(found, check)
        groups[0 if words else 1 if found.confidence >= TRUSTED else 2].append((line, 0, words or ""))
    ranked = [worst_first(Comparison({0: numbers}, tuple(group), 0, 0)) for group in groups]
    order = np.array([line for some in ranked for line, _, _ in some], np.int64)
    lines, reasons = tuple(line for line, _, _ in ranked[0]), tuple(reason for _, _, reason in ranked[0])
    return _Ranked(order, lines, reasons, len(compared))


def _values(column: Any) -> npt.NDArray[np.float64]:
    return np.asarray(column.to_numpy(zero_copy_only=False), np.float64)


def _named(
    table: pa.Table, references: _References, worst: _Ranked, shown: int
) -> tuple[tuple[str, str, str, str], ...]:
    """Name the accused that are not shown."""
    lines = list(worst.accused[shown : shown + _NAMED])
    paths = table["target_path"].take(pa.array(references.row[lines])).to_pylist()
    files = references.columns.take(pa.array(lines, pa.int64()))
    names = (files.field(name).to_pylist() for name in ("dataset_id", "path"))
    return tuple(zip(paths, *names, worst.words[shown : shown + _NAMED], strict=True))
