"""`prep report`: one HTML file that shows what the manifests and the pair tables say, with pictures.

`report` is the public function. Another part of the page (cache, runs) is a function of (project, thumbnails)
that returns a `Section`, an entry in `SECTIONS`, and a template in `prep/page` that draws the section's `content`.
"""

import base64
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

import jinja2

from families import Source, open_project
from prep.page import charts, columns, pictures
from prep.page import pairs as pair_tables
from prep.page.columns import Figure
from prep.showing import clipped, visible
from prep.statistics import pieces, statistics
from schemas.datasets import DatasetConfig
from schemas.errors import UserError
from schemas.project import Project
from schemas.rows import ImageRow
from schemas.storage import write_aside
from schemas.summaries import ReportSummary
from schemas.tables import read_provenance

_TEMPLATES = Path(__file__).parent / "page"
_BUCKETS = 80  # lines of the bucket table
_KINDS = 40  # lines of the table of reasons
_REJECTS = 24  # rejected images shown

_ROLES = {"image": "targets", "conditioning": "references", "eval": "held-out targets"}


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of the page's contents."""

    anchor: str
    label: str
    note: str


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page: a template of `prep/page`, and what it draws under the name `content`."""

    template: str
    content: object
    entries: tuple[Entry, ...]
    figures: tuple[Figure, ...] = ()  # for the head of the page
    datasets: tuple[str, ...] = ()  # shown
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Rejects:
    """Why images are not used."""

    kinds: tuple[Figure, ...]  # the most frequent
    num_kinds: int
    examples: tuple[pictures.Picture, ...]


@dataclass(frozen=True, slots=True)
class Facts:
    """What a manifest comes to."""

    scanned: str  # when
    figures: tuple[Figure, ...]
    oddities: tuple[Figure, ...]
    formats: tuple[Figure, ...]
    buckets: tuple[columns.Bucket, ...]  # the largest, narrow ones first
    num_buckets: int
    sizes: charts.Scatter | None
    aspects: charts.Histogram | None
    rejects: Rejects
    captions: columns.Captions
    words: charts.Histogram | None
    sheet: tuple[pictures.Picture, ...]


@dataclass(frozen=True, slots=True)
class DatasetPage:
    """What is shown of one dataset."""

    dataset: DatasetConfig
    role: str
    anchor: str
    notices: tuple[str, ...]
    facts: Facts | None  # null if it was not scanned


def report(project: Source, *, output: Path | None = None, thumbnails: int = 60) -> ReportSummary:
    """Write the page, by default WORKSPACE/report.html; of each dataset up to `thumbnails` kept images are shown.

    Nothing is scanned. Raises UserError if no dataset was.
    """
    start = time.monotonic()
    project = open_project(project)
    sections = [section for make in SECTIONS if (section := make(project, thumbnails)) is not None]
    if not sections:
        raise UserError(f"{project.workspace}: nothing was scanned yet; run: {project.command('prep scan')}")
    page = _page(project, sections)
    path = output or project.workspace / "report.html"
    with write_aside(path) as aside:
        aside.write_bytes(page)
    datasets = tuple(dict.fromkeys(name for section in sections for name in section.datasets))
    warnings = (*project.warnings, *(warning for section in sections for warning in section.warnings))
    return ReportSummary(str(path), len(page), datasets, warnings, time.monotonic() - start)


def _page(project: Project, sections: Sequence[Section]) -> bytes:
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"visible": visible, "clipped": clipped, "figure": figure}
    script = (_TEMPLATES / "page.js").read_text(encoding="utf-8")
    text = templates.get_template("page.html.j2").render(
        project=project,
        sections=sections,
        style=(_TEMPLATES / "page.css").read_text(encoding="utf-8"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    return text.encode("utf-8", "backslashreplace")  # a folder's name may not be UTF-8


def figure(value: int | float) -> str:
    """Spell a number: thousands apart, three digits of a small fraction."""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def images(project: Project, thumbnails: int) -> Section | None:
    """Show the manifests; None if there is none."""
    if not any(project.manifest(dataset.id).exists() for dataset in project.scanned):
        return None
    pages = [
        _dataset(project, dataset, f"dataset-{number}", thumbnails) for number, dataset in enumerate(project.scanned, 1)
    ]
    scanned = [page.facts for page in pages if page.facts is not None]
    totals = [sum(int(facts.figures[at].value) for facts in scanned) for at in range(3)]
    return Section(
        template="images.html.j2",
        content=pages,
        entries=tuple(Entry(page.anchor, page.dataset.id, _in_brief(page)) for page in pages),
        figures=(
            Figure("dataset" if len(pages) == 1 else "datasets", len(pages)),
            *(Figure(name, total) for name, total in zip(("images", "kept", "rejected"), totals, strict=True)),
        ),
        datasets=tuple(page.dataset.id for page in pages if page.facts is not None),
        warnings=tuple(f"{page.dataset.id}: {notice}" for page in pages for notice in page.notices),
    )


def _in_brief(page: DatasetPage) -> str:
    if page.facts is None:
        return "not scanned"
    seen, kept = page.facts.figures[:2]
    return f"{figure(kept.value)} of {figure(seen.value)} kept" + (" · see the notice" if page.notices else "")


def _dataset(project: Project, dataset: DatasetConfig, anchor: str, thumbnails: int) -> DatasetPage:
    path, again = project.manifest(dataset.id), f"run: {project.command('prep scan')}"
    role, notices = _ROLES[dataset.dataset_type], []
    provenance = read_provenance(path, ImageRow)
    if provenance is None:
        state = "Its manifest cannot be read" if path.exists() else "Not scanned yet"
        return DatasetPage(dataset, role, anchor, (f"{state}; {again}",), None)
    if provenance.config != project.scan_settings(dataset):
        notices.append(f"Its settings changed since it was scanned, and this shows what was; {again}")
    if provenance.limit is not None:
        notices.append(f"Only its first {provenance.limit:,} files were scanned (--limit)")
    if not provenance.hashed:
        notices.append(f"Scanned with --no-hash, for a look; before prep pairs, {again}")
    return DatasetPage(dataset, role, anchor, tuple(notices), _facts(project, dataset, path, thumbnails))


def _facts(project: Project, dataset: DatasetConfig, path: Path, thumbnails: int) -> Facts:
    manifest = columns.read(path)
    found = statistics(project, dataset, pieces(manifest.table))
    buckets = columns.buckets(found, project.trainer.train_batch_size, dataset.repeats)
    largest = sorted(buckets, key=lambda bucket: -bucket.images)[:_BUCKETS]
    captions = columns.captions(manifest)
    kinds = (columns.kinds(manifest), list(found.rejected))
    return Facts(
        # Not the time of this run: the same manifests make the same page, to the byte.
        scanned=datetime.fromtimestamp(path.stat().st_mtime, UTC).strftime("%Y-%m-%d %H:%M UTC"),
        figures=columns.summary(manifest, found),
        oddities=columns.oddities(found),
        formats=columns.counts(manifest.table["format"], "unknown"),
        buckets=tuple(bucket for bucket in buckets if bucket in largest),
        num_buckets=len(buckets),
        sizes=charts.scatter(manifest, dataset),
        aspects=charts.aspects(manifest),
        rejects=Rejects(
            kinds=tuple(Figure(kind, count) for kind, count in islice(found.rejected.items(), _KINDS)),
            num_kinds=len(found.rejected),
            examples=pictures.examples(project, dataset, manifest, kinds, _REJECTS),
        ),
        captions=captions,
        words=charts.words(captions.words),
        sheet=pictures.sheet(project, dataset, manifest, thumbnails),
    )


def pairs(project: Project, thumbnails: int) -> Section | None:
    """Show the pair tables; None if there is none."""
    pages = pair_tables.show(project, thumbnails)
    if not pages:
        return None
    paired = [page.facts for page in pages if page.facts is not None]
    accused = sum(facts.worst.num_accused for facts in paired)
    rejected = sum(facts.rejects.number for facts in paired)
    return Section(
        template="pairs.html.j2",
        content=pages,
        entries=tuple(Entry(page.anchor, f"{page.dataset.id}: pairs", _pairs_in_brief(page)) for page in pages),
        figures=(
            Figure("pairs", sum(facts.num_pairs for facts in paired)),
            Figure("targets not paired", rejected),
            Figure("misaligned references", accused),
        ),
        datasets=tuple(page.dataset.id for page in pages if page.facts is not None),
        warnings=tuple(f"{page.dataset.id}: {notice}" for page in pages for notice in page.notices),
    )


def _pairs_in_brief(page: pair_tables.PairsPage) -> str:
    if page.facts is None:
        return "not paired"
    accused = page.facts.worst.num_accused
    told = [figure(page.facts.num_pairs), *([f"{figure(accused)} misaligned"] if accused else [])]
    return " · ".join([*told, *(["see the notice"] if page.notices else [])])


SECTIONS: tuple[Callable[[Project, int], Section | None], ...] = (images, pairs)
