"""`prep scan`: one row for every image file, measured, captioned, bucketed, or rejected with a reason.

`scan` is the public function. Only new and changed files are read; unchanged ones keep their row's facts.
"""

import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from families import Source, open_project
from prep.captions import Captions, captions_of
from prep.geometry import Policy, Targets, fit
from prep.images import EXTENSIONS, Header, read_header
from prep.pool import Crash, default_workers, each
from schemas.console import log, progress, tell_rejected
from schemas.datasets import DatasetConfig
from schemas.errors import UserError
from schemas.keys import digest, file_id
from schemas.project import Project
from schemas.rows import Geometry, ImageRow
from schemas.summaries import DatasetScan, ScanSummary
from schemas.tables import Provenance, read_provenance, read_table, write_table

_CHUNK = 256  # files per task of the pool


@dataclass(frozen=True, slots=True)
class _Seen:
    """What is known of one file's content."""

    size_bytes: int
    mtime_ns: int
    image_id: str | None
    header: Header | str  # or the reason why there is none


def scan(
    project: Source, *, limit: int | None = None, workers: int | None = None, dry_run: bool = False
) -> ScanSummary:
    """Write a manifest for every dataset of a project.

    `limit` scans the first N files of each dataset in the order of their paths. Raises UserError.
    """
    start = time.monotonic()
    project = open_project(project, need_images=True)
    processes = workers or default_workers()
    scans = tuple(_scan_dataset(project, dataset, limit, processes, dry_run) for dataset in project.scanned)
    return ScanSummary(scans, project.warnings, time.monotonic() - start, dry_run)


def _scan_dataset(
    project: Project, dataset: DatasetConfig, limit: int | None, workers: int, dry_run: bool
) -> DatasetScan:
    folder, manifest = project.folder_of(dataset), project.manifest(dataset.id)
    if project.workspace in (folder.resolve(), *folder.resolve().parents):
        raise UserError(f"{dataset.id}: its folder {folder} lies in the workspace; give --workspace another place")
    files, ignored = _image_files(folder, project.workspace)
    cut = limit if limit is not None and limit < len(files) else None
    files = files[:limit]
    source = digest(dataset.type, dataset.instance_data_dir)
    known = _known(manifest, source)
    seen = {path: _unchanged(folder / path, known.get(_posix(path))) for path in files}
    unread = [path for path, facts in seen.items() if facts is None]
    with progress(f"scan {dataset.id}", len(files), "image", done=len(files) - len(unread)) as bar:
        for paths, facts in _read(folder, unread, workers):
            seen.update(zip(paths, facts, strict=True))
            bar.update(len(paths))
    rows = _rows(project, dataset, {path: facts for path, facts in seen.items() if facts is not None})
    provenance = Provenance(project.scan_settings(dataset), digest([_content(row) for row in rows]), cut, source)
    written = provenance != read_provenance(manifest, ImageRow) or rows != list(known.values())
    if written and not dry_run:
        write_table(manifest, rows, ImageRow, provenance)
    kept = [row for row in rows if row.reject is None]
    if not kept:
        log.warning("%s: no usable image below %s", dataset.id, folder)
    tell_rejected(dataset.id, [(row.path, row.reject) for row in rows if row.reject is not None])
    return DatasetScan(
        dataset_id=dataset.id,
        seen=len(rows),
        kept=len(kept),
        rejected=dict(Counter(row.reject.partition(":")[0] for row in rows if row.reject is not None)),
        read=len(unread),
        removed=len(known.keys() - {row.path for row in rows}) if cut is None else 0,
        buckets=dict(sorted(Counter(row.bucket for row in kept if row.bucket is not None).items())),
        captions=sum(len(row.captions) for row in kept),
        ignored_files=ignored,
        manifest=str(manifest),
        written=written,
    )


def _image_files(folder: Path, workspace: Path) -> tuple[list[Path], int]:
    """Return the image files below a folder, relative and in the order of their paths, and how many files are not."""
    found: list[Path] = []
    others = 0
    seen = {folder.resolve()}
    for place, folders, names in os.walk(folder, onerror=_tell_unreadable, followlinks=True):
        here = Path(place)
        folders[:] = [name for name in sorted(folders) if _is_images(here / name, workspace, seen)]
        for name in names:
            if Path(name).suffix.lower() in EXTENSIONS and not name.startswith("."):
                found.append((here / name).relative_to(folder))
            elif Path(name).suffix.lower() != ".txt":
                others += 1
    return sorted(found, key=lambda path: path.parts), others


def _is_images(folder: Path, workspace: Path, seen: set[Path]) -> bool:
    """Tell a sub-folder to look into: not hidden, no workspace, and not seen before by way of a link."""
    real = folder.resolve()
    if folder.name.startswith(".") or real == workspace or real in seen:
        return False
    if any((folder / "manifests").glob("*.parquet")):
        log.warning("%s: left out, it is a workspace", folder)
        return False
    seen.add(real)
    return True


def _tell_unreadable(fault: OSError) -> None:
    log.warning("%s: cannot be read, its images are left out: %s", fault.filename, fault.strerror)


def _known(manifest: Path, source: str) -> dict[str, ImageRow]:
    """Return the rows of the last scan by path; none if there was none, or of another folder, or it is damaged."""
    if not manifest.exists():
        return {}
    provenance = read_provenance(manifest, ImageRow)
    if provenance is not None and provenance.source != source:
        return {}
    try:
        return {row.path: row for row in read_table(manifest, ImageRow)}
    except UserError as fault:
        log.warning("%s; scanning everything", fault)
        return {}


def _unchanged(file: Path, row: ImageRow | None) -> _Seen | None:
    """Return what is known of a file, if size and modification time are those of the last scan."""
    if row is None or row.width is None or row.height is None or row.orientation is None:
        return None
    try:
        stat = file.stat()
    except OSError:
        return None
    if (stat.st_size, stat.st_mtime_ns) != (row.size_bytes, row.mtime_ns):
        return None
    header = Header(row.width, row.height, row.orientation, row.format or "", row.mode or "")
    return _Seen(row.size_bytes, row.mtime_ns, row.image_id, header)


def _read(folder: Path, paths: list[Path], workers: int) -> Iterator[tuple[list[Path], list[_Seen]]]:
    """Read files on the pool, many a task; the files of a task whose worker died are tried one by one."""
    chunks = [(folder, paths[first : first + _CHUNK]) for first in range(0, len(paths), _CHUNK)]
    for (_, chunk), facts in each(_read_files, chunks, workers if len(chunks) > 1 else 1):
        if not isinstance(facts, Crash):
            yield chunk, facts
            continue
        for (_, [path]), fact in each(_read_files, [(folder, [path]) for path in chunk], workers):
            if isinstance(fact, Crash):
                fact = [_Seen(0, 0, None, f"unreadable: {fact.reason}")]
            yield [path], fact


def _read_files(chunk: tuple[Path, list[Path]]) -> list[_Seen]:
    """Read and hash files; runs on the pool."""
    folder, paths = chunk
    return [_read_file(folder / path) for path in paths]


def _read_file(file: Path) -> _Seen:
    try:
        stat = file.stat()
        if stat.st_size == 0:
            return _Seen(0, stat.st_mtime_ns, None, "unreadable: the file is empty")
        return _Seen(stat.st_size, stat.st_mtime_ns, file_id(file), read_header(file))
    except OSError as fault:
        return _Seen(0, 0, None, f"unreadable: {fault.strerror or fault}")


def _rows(project: Project, dataset: DatasetConfig, seen: dict[Path, _Seen]) -> list[ImageRow]:
    """Caption and bucket files in the order of their paths, so that the order of work never shows."""
    policy = policy_of(project, dataset)
    targets: Targets = {}
    return [_row(project, dataset, path, facts, policy, targets) for path, facts in seen.items()]


def policy_of(project: Project, dataset: DatasetConfig) -> Policy:
    """Gather the settings that decide a dataset's sizes and crops."""
    downsample = dataset.target_downsample_size if dataset.crop and dataset.maximum_image_size else None
    return Policy(
        resolution=dataset.resolution,
        resolution_type=dataset.resolution_type,
        alignment=project.alignment,
        rounding=project.trainer.aspect_bucket_rounding,
        square=dataset.crop and dataset.crop_aspect == "square",
        crop_style=dataset.crop_style,
        downsample=downsample,
    )


def _row(
    project: Project, dataset: DatasetConfig, path: Path, facts: _Seen, policy: Policy, targets: Targets
) -> ImageRow:
    name = _posix(path)
    header = facts.header if isinstance(facts.header, Header) else None
    captions = captions_of(project.folder_of(dataset) / path, dataset)
    geometry: Geometry | str | None = None
    reject = facts.header if isinstance(facts.header, str) else _too_small(facts.header, dataset, policy)
    if name != path.as_posix():
        reject, captions = "name: it is not UTF-8", Captions([], None)
    if header is not None and reject is None:
        crop_seed = (project.trainer.prep_seed, "crop", dataset.id, name)
        geometry = fit((header.width, header.height), policy, targets, crop_seed)
        reject = geometry if isinstance(geometry, str) else captions.reject
    box = geometry if isinstance(geometry, Geometry) and reject is None else None
    return ImageRow(
        dataset_id=dataset.id,
        path=name,
        stem=_posix(Path(path.stem)),
        image_id=facts.image_id,
        size_bytes=facts.size_bytes,
        mtime_ns=facts.mtime_ns,
        width=header.width if header else None,
        height=header.height if header else None,
        orientation=header.orientation if header else None,
        format=header.format if header else None,
        mode=header.mode if header else None,
        captions=captions.texts,
        caption_source=captions.source,
        bucket=box.bucket if box else None,
        target_width=box.target_width if box else None,
        target_height=box.target_height if box else None,
        intermediary_width=box.intermediary_width if box else None,
        intermediary_height=box.intermediary_height if box else None,
        crop_top=box.crop_top if box else None,
        crop_left=box.crop_left if box else None,
        reject=reject,
    )


def _too_small(header: Header, dataset: DatasetConfig, policy: Policy) -> str | None:
    """Reject a target below `minimum_image_size`, by its size before any resize."""
    if dataset.minimum_image_size is None or not dataset.is_target:
        return None
    least, area = policy.by_area(dataset.minimum_image_size)
    if area:
        edge = int((least * 1e6) ** 0.5)
        fits = header.width * header.height >= least * 1e6
        if fits and (not policy.square or min(header.width, header.height) >= edge):
            return None
        need = f"{edge}x{edge}" if policy.square else f"an area of {edge}x{edge}"
    elif min(header.width, header.height) >= least:
        return None
    else:
        need = f"{int(least)} on each side"
    return f"too small: {header.width}x{header.height}, need {need}"


def _content(row: ImageRow) -> dict[str, object]:
    """Return what later stages may depend on: a file that was only touched is the same."""
    return {name: value for name, value in asdict(row).items() if name != "mtime_ns"}


def _posix(path: Path) -> str:
    """Spell a relative path as its row does; bytes that are not UTF-8 are escaped."""
    return path.as_posix().encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
