"""Both sides of every kept pair as files, as the model would see them, in the layout that another trainer reads.

`materialise` is the way in; layouts are in prep/layouts.py.
"""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path, PurePosixPath

from families import Source, open_project
from prep.degrade import png_file
from prep.layouts import LAYOUTS, Export, Layout, Sample
from prep.names import names_of
from prep.pixels import Picture, Refusal, pixels_of, reference_picture, target_picture
from prep.pool import default_workers, each
from schemas.console import log, printable, progress
from schemas.datasets import DatasetConfig
from schemas.errors import UserError
from schemas.freshness import read_pairs
from schemas.keys import CACHE_VERSION, PIXEL_POLICY, content_id, digest
from schemas.lock import only_one
from schemas.project import Project
from schemas.rows import PairRow
from schemas.storage import is_aside, sweep, write_aside
from schemas.summaries import Materialised

_MANIFEST = ".pairline.json"
_OF_THE_LOCK = (".lock", ".holder")
_FORMAT = 1
_MANY = 2000  # texts that are worth a process
_LIMIT_S = 600.0  # that one file may take
_NAMED = 5  # pairs that are left out, named one by one

# Of a picture, what does not decide its pixels: where its file is, and where it may lie made already.
_WHEREABOUTS = ("place", "path", "stored")


@dataclass(frozen=True, slots=True)
class _File:
    """A file to be: a picture's pixels, or a text."""

    name: str  # its path below the folder, POSIX
    path: Path
    content: Picture | str
    key: str  # of what is in it


@dataclass(frozen=True, slots=True)
class _Entry:
    """What the manifest knows of a file that was written: if there is a file of that name, it is whole and this."""

    key: str
    size: int | None  # bytes; null if the run that wrote it did not come to its end


@dataclass(frozen=True, slots=True)
class _Pair:
    """A pair and the files of its pictures."""

    row: PairRow
    sample: Sample
    pictures: tuple[_File, ...]


def materialise(
    project: Project, target: DatasetConfig, rows: Sequence[PairRow], folder: Path, layout: str, workers: int
) -> Materialised:
    """Write the kept pairs of a set of targets into `folder`, as `layout` has them; what is there and right stays.

    A pair of which a picture cannot be made is left out. Raises UserError, also if the folder is not ours to write to.
    """
    check_layout(layout)
    folder = folder.expanduser().absolute()
    _keep_apart(folder, project)
    _read_manifest(folder, target.id, layout)  # before the lock leaves a file there
    with only_one(folder, f"prep pairs --materialise {folder}"):
        known = _read_manifest(folder, target.id, layout)
        pairs = _planned(project, rows, folder, LAYOUTS[layout])
        return _Folder(folder, target, layout, known).write(project, pairs, workers)


def materialise_all(
    project: Source, folder: Path, layout: str, *, workers: int | None = None
) -> tuple[Materialised, ...]:
    """Write the kept pairs of all sets of targets; of several, each into a folder of its name below `folder`.

    Raises UserError, also if a set is not paired.
    """
    check_layout(layout)
    project = open_project(project, need_images=True)
    several = len(project.targets) > 1
    return tuple(
        materialise(project, target, read_pairs(project, target), folder / target.id if several else folder, layout,
                    workers or default_workers())
        for target in project.targets
    )  # fmt: skip


def check_layout(layout: str) -> None:
    """Raise UserError if there is no such layout."""
    if layout not in LAYOUTS:
        raise UserError(f"{layout}: no such layout; there are {', '.join(LAYOUTS)}")


def _keep_apart(folder: Path, project: Project) -> None:
    """Refuse a folder that the next scan would look into."""
    for dataset in project.scanned:
        if dataset.type == "local" and project.url_of(dataset) is None:
            images = project.folder_of(dataset).resolve()
            if folder.resolve().is_relative_to(images):
                raise UserError(f"{folder}: lies in the images of {dataset.id}, {images}; name a folder outside")


def _planned(project: Project, rows: Sequence[PairRow], folder: Path, layout: Layout) -> list[_Pair]:
    """Say which pictures the kept pairs are made of, and where each of them belongs."""
    kept = [row for row in rows if row.reject is None]
    pairs = []
    for row, name in zip(kept, names_of(kept), strict=True):
        pictures = [target_picture(project, row)]
        pictures += [reference_picture(project, row, reference) for reference in row.references]
        sizes = [(one.geometry.target_width, one.geometry.target_height) for one in pictures]
        sample = Sample(name, row.prompt, tuple(sizes))
        places = [layout.target(sample), *(layout.reference(sample, number) for number in range(len(row.references)))]
        files = [
            _File(place, folder / place, one, _pixels_key(one)) for place, one in zip(places, pictures, strict=True)
        ]
        pairs.append(_Pair(row, sample, tuple(files)))
    return pairs


def _pixels_key(picture: Picture) -> str:
    """Key a picture's file by all its pixels depend on."""
    parts = {field.name: getattr(picture, field.name) for field in fields(picture) if field.name not in _WHEREABOUTS}
    plain = {name: asdict(part) if is_dataclass(part) else part for name, part in parts.items()}  # type: ignore[arg-type]
    return digest("materialised", CACHE_VERSION, PIXEL_POLICY, plain)


class _Folder:
    """Brings a folder to what it should hold; its manifest is true at every moment."""

    def __init__(self, path: Path, target: DatasetConfig, layout: str, known: dict[str, _Entry]) -> None:
        self._path, self._target, self._layout = path, target, layout
        self._known, self._saved = known, dict(known)  # files of ours; what the manifest on disk says of them
        self._before, self._made = set(known), set[str]()  # names: of earlier runs, and written by this one
        self._reused = self._replaced = self._removed = 0

    def write(self, project: Project, pairs: Sequence[_Pair], workers: int) -> Materialised:
        """Write pictures, then captions and configuration of the pairs that are whole; remove what is left over."""
        for folder in {self._path, *(file.path.parent for pair in pairs for file in pair.pictures)}:
            sweep(folder)
        layout = LAYOUTS[self._layout]
        reasons = {pair.pictures[0].name: reason for pair in pairs if (reason := _too_small(pair.sample, layout))}
        asked = [pair for pair in pairs if pair.pictures[0].name not in reasons]
        reasons |= self._settle([file for pair in asked for file in pair.pictures], workers)
        whole = [pair for pair in pairs if _fault(pair, reasons) is None]
        left_out = [(pair, reason) for pair in pairs if (reason := _fault(pair, reasons)) is not None]
        export = Export(project, self._target, self._path, tuple(pair.sample for pair in whole))
        texts = [_text(self._path, name, text) for name, text in _texts(export, layout).items()]
        self._settle(texts, workers if len(texts) > _MANY else 1)
        self._prune({file.name for pair in whole for file in pair.pictures} | {file.name for file in texts})
        self._save()
        self._tell(left_out, layout)
        return Materialised(
            dataset_id=self._target.id,
            layout=self._layout,
            folder=str(self._path),
            pairs=len(whole),
            written=len(self._made),
            reused=self._reused,
            removed=self._removed,
            left_out=dict(Counter(reason.partition(":")[0] for _, reason in left_out)),
            altered=layout.altered(export),
            instructions=layout.start(export) if whole else "there is nothing to train on",
        )

    def _settle(self, files: Sequence[_File], workers: int) -> dict[str, str]:
        """Write the files that are not there as they should be; return why some could not be made, by name."""
        missing = [file for file in files if not self._stands(file)]
        self._reused += len(files) - len(missing)
        for file in missing:
            if file.name not in self._known and os.path.lexists(file.path):
                raise UserError(f"{file.path}: is not pairline's; move it away, or write to another folder")
        for file in missing:  # before the manifest says what will be there, nothing else may be
            if file.name in self._known and os.path.lexists(file.path):
                file.path.unlink()
                self._replaced += 1
            self._known[file.name] = _Entry(file.key, None)
        self._save()
        reasons: dict[str, str] = {}
        with progress(f"write {self._target.id}", len(files), "file", done=len(files) - len(missing)) as bar:
            for file, made in each(_make, missing, workers, _LIMIT_S if workers > 1 else None):
                if isinstance(made, int):
                    self._known[file.name] = _Entry(file.key, made)
                    self._made.add(file.name)
                else:
                    reasons[file.name] = made.reason
                bar.update()
        return reasons

    def _stands(self, file: _File) -> bool:
        """Tell whether a file is there and right. A text may have been edited since: that is not undone."""
        entry = self._known.get(file.name)
        if entry is None or entry.key != file.key:
            return False
        try:
            size = file.path.stat().st_size
        except OSError:
            return False
        if entry.size is None:
            self._known[file.name] = _Entry(file.key, size)
        return isinstance(file.content, str) or entry.size in (None, size)

    def _prune(self, wanted: set[str]) -> None:
        """Remove files of ours that nothing wants any more, and folders that are empty then."""
        for name in [name for name in self._known if name not in wanted]:
            path = self._path / name
            if os.path.lexists(path):
                path.unlink()
                self._removed += name in self._before
            self._made.discard(name)
            del self._known[name]
            with suppress(OSError):  # not empty
                for parent in list(path.parents)[: len(PurePosixPath(name).parents) - 1]:
                    parent.rmdir()

    def _save(self) -> None:
        if self._known == self._saved and (self._path / _MANIFEST).exists():
            return
        files = {name: [entry.key, entry.size] for name, entry in sorted(self._known.items())}
        said = {"format": _FORMAT, "dataset_id": self._target.id, "layout": self._layout, "files": files}
        with write_aside(self._path / _MANIFEST) as aside:
            aside.write_text(json.dumps(said, ensure_ascii=False, indent=0), encoding="utf-8")
        self._saved = dict(self._known)

    def _tell(self, left_out: Sequence[tuple[_Pair, str]], layout: Layout) -> None:
        for pair, reason in left_out[:_NAMED]:
            log.warning("%s: %s left out: %s", self._target.id, printable(pair.row.target_path), reason)
        if (self._replaced or self._removed) and layout.caches is not None:
            log.warning("%s: files changed under names that %s caches them by: if it ran, delete %s in %s",
                        self._target.id, self._layout, layout.caches, self._path)  # fmt: skip


def _too_small(sample: Sample, layout: Layout) -> str | None:
    """Return why a layout has no place for a pair, None if it has."""
    small = [f"{width}x{height}" for width, height in sample.sizes if min(width, height) < layout.least_edge]
    return f"too small: {small[0]}, shorter sides must be {layout.least_edge} pixels" if small else None


def _fault(pair: _Pair, reasons: Mapping[str, str]) -> str | None:
    """Return why a pair is not whole, None if it is."""
    return next((reasons[file.name] for file in pair.pictures if file.name in reasons), None)


def _texts(export: Export, layout: Layout) -> dict[str, str]:
    """Return the text files of an export, by name."""
    if not export.samples:
        return {}
    targets = {layout.target(sample): sample.prompt for sample in export.samples} if layout.captions else {}
    captions = {str(PurePosixPath(name).with_suffix("")) + ".txt": prompt for name, prompt in targets.items()}
    return {**captions, **layout.files(export)}


def _text(folder: Path, name: str, text: str) -> _File:
    return _File(name, folder / name, text, content_id(text.encode()))


def _make(file: _File) -> int | Refusal:
    """Write a file; return its length in bytes."""
    if isinstance(file.content, str):
        data = file.content.encode()
    else:
        pixels = pixels_of(file.content)
        if isinstance(pixels, Refusal):
            return pixels
        data = png_file(pixels)
    with write_aside(file.path, tidy=False) as aside:
        aside.write_bytes(data)
    return len(data)


def _read_manifest(folder: Path, dataset_id: str, layout: str) -> dict[str, _Entry]:
    """Read what a folder holds of ours; raises UserError if it holds something else."""
    try:
        said = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        if folder.is_dir() and any(path.name not in _OF_THE_LOCK and not is_aside(path) for path in folder.iterdir()):
            raise UserError(f"{folder}: is not empty and not pairline's; name a new or an empty folder") from None
        return {}
    except (OSError, ValueError) as fault:
        raise UserError(f"{folder / _MANIFEST}: cannot be read; delete the folder, or name another") from fault
    try:
        whose = (said["format"], said["dataset_id"], said["layout"])
        known = {str(name): _Entry(key, size) for name, (key, size) in said["files"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as fault:
        raise UserError(f"{folder / _MANIFEST}: cannot be read; delete the folder, or name another") from fault
    if whose != (_FORMAT, dataset_id, layout):
        raise UserError(f"{folder}: holds {whose[1]} for {whose[2]}; name another folder, or delete it")
    if any(PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts for name in known):
        raise UserError(f"{folder / _MANIFEST}: names files outside its folder; delete the folder, or name another")
    return known
