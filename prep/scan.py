"""`prep scan`: one row for every image, measured, captioned, bucketed, or rejected with a reason.

`scan` is the public function. Only new and changed files are read; of unchanged ones the last manifest tells what is
known. Everything is columns from the first to the last: a million images are an ordinary set.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from families import Source, open_project
from prep.captions import Captioner, beside
from prep.frames import Frames, frame_all, policy_of
from prep.geometry import Targets
from prep.listing import Listing, list_images
from prep.measure import Facts, Look, Measured, Sight, Task, as_batch, columns_of, examine, facts_schema, measure
from prep.places import Bucket, Place, Rows, place_of
from prep.pool import Crash, default_workers, each
from prep.selection import Selected, select
from prep.statistics import statistics
from schemas.console import log, progress, tell_rejected
from schemas.datasets import DatasetConfig
from schemas.errors import UserError
from schemas.keys import digest
from schemas.lock import only_one
from schemas.project import Project
from schemas.rows import ImageRow, arrow_schema
from schemas.summaries import DatasetScan, ScanSummary
from schemas.tables import Provenance, content_of, read_columns, read_provenance, write_table

EXAMINE_LIMIT_S = 60.0  # for decoding one file
_MEASURE_LIMIT_S = 60.0  # for the headers of one task, then of each of its files

_CHUNK = 1024  # files per task of the pool
_FAR_CHUNK = 64  # the same where every file is fetched

_CONTENT_APART_FROM = ("mtime_ns", "caption_mtime_ns")  # a file that was only touched is the same

Numbers = npt.NDArray[np.int64]


@dataclass(slots=True)
class _Run:
    """What all datasets of one scan share."""

    project: Project
    limit: int | None
    workers: int
    dry_run: bool
    hashed: bool
    verify: bool
    targets: dict[tuple[float, bool, int], Targets] = field(default_factory=dict)  # by (resolution, area, alignment)


@dataclass(slots=True)
class _Memory:
    """What the last manifest knows of the images that are listed now."""

    table: pa.Table | None
    at: Numbers  # row of the table for every image, -1 where it has none
    same_image: npt.NDArray[np.bool_]  # the file has the size and time of then
    same_text: npt.NDArray[np.bool_]  # the same of its text file, and captions were made as they are now


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
    run = _Run(project, limit, workers or default_workers(), dry_run, hashed, verify)
    if dry_run:
        scans = tuple(scan_dataset(run, dataset)[0] for dataset in project.scanned)
    else:
        with only_one(project.workspace / "manifests", "prep scan"):
            scans = tuple(scan_dataset(run, dataset)[0] for dataset in project.scanned)
    return ScanSummary(scans, project.warnings, time.monotonic() - start, dry_run)


def look(project: Project, dataset: DatasetConfig) -> pa.Table:
    """Return the manifest that a scan would write now, measured but not identified; nothing is written."""
    return scan_dataset(_Run(project, None, default_workers(), True, False, False), dataset)[1]


def scan_dataset(run: _Run, dataset: DatasetConfig) -> tuple[DatasetScan, pa.Table]:
    """Scan one dataset; return what was done, and its rows."""
    project, manifest = run.project, run.project.manifest(dataset.id)
    _refuse_workspace(project, dataset)
    before = read_provenance(manifest, ImageRow)
    config = project.scan_settings(dataset)
    if _taken_as_it_is(run, dataset, before, config):
        known = read_columns(manifest, ImageRow)
        return _summary(run, dataset, known, _Done(not_looked_at=True)), known
    captioner = Captioner.of(dataset, project.caption_filter(dataset), project.trainer.prep_seed)
    listing = list_images(project, dataset, texts=captioner.reads_text, dry_run=run.dry_run)
    cut = run.limit if run.limit is not None and run.limit < len(listing.paths) else None
    if cut is not None:
        listing.cut(cut)
    source = digest(dataset.type, _where(project, dataset), dataset.view)
    captions = project.caption_settings(dataset)
    known_table = _known(manifest, before, source)
    memory = _recall(known_table, listing, hashed=run.hashed, captioned_alike=before is not None
                     and before.captions == captions)  # fmt: skip
    provenance = Provenance(config, "", cut, source, captions, run.hashed)
    if (
        known_table is not None
        and before is not None
        and _nothing_new(run, dataset, memory, listing, before, provenance)
    ):
        return _summary(run, dataset, known_table, _Done(seen=len(listing.paths), listing=listing)), known_table
    table, done = _made(run, dataset, listing, memory, captioner)
    provenance = replace(provenance, inputs=content_of(table, _CONTENT_APART_FROM))
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

    seen: int = 0
    read: int = 0  # images whose content was read
    examined: int = 0  # images that were decoded
    removed: int = 0
    changed: int = 0  # rows whose content differs from the last manifest's
    written: bool = False
    settings_changed: bool = False
    not_looked_at: bool = False
    listing: Listing = field(default_factory=Listing)
    selected: Selected = field(default_factory=Selected)
    collisions: dict[str, list[str]] = field(default_factory=dict)


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


def _known(manifest: Path, before: Provenance | None, source: str) -> pa.Table | None:
    """Return the rows of the last scan; none if there was none, or of another place, or it is damaged."""
    if not manifest.exists():
        return None
    if before is not None and before.source != source:
        return None
    try:
        return read_columns(manifest, ImageRow)
    except UserError as fault:
        log.warning("%s; scanning everything", fault)
        return None


def _recall(known: pa.Table | None, listing: Listing, *, hashed: bool, captioned_alike: bool) -> _Memory:
    """Find every listed image in the last manifest, and tell which files are as they were."""
    count = len(listing.paths)
    nothing = np.zeros(count, np.bool_)
    if known is None or count == 0 or known.num_rows == 0:
        return _Memory(known if count else None, np.full(count, -1, np.int64), nothing, nothing.copy())
    at = pc.index_in(pa.array(_spelled(listing.paths)), known["path"].combine_chunks())
    at = pc.fill_null(at, -1).to_numpy(zero_copy_only=False).astype(np.int64)
    sizes, mtimes = np.frombuffer(listing.sizes, np.int64), np.frombuffer(listing.mtimes, np.int64)
    settled = _settled(known, hashed=hashed)
    there = at >= 0
    same = there & settled[at] & (mtimes == _numbers(known, "mtime_ns")[at])
    same &= (sizes == _numbers(known, "size_bytes")[at]) | ((sizes < 0) & (mtimes > 0))
    text_sizes, text_mtimes = np.frombuffer(listing.text_sizes, np.int64), np.frombuffer(listing.text_mtimes, np.int64)
    text = there & (text_sizes >= 0) & captioned_alike & known["caption_source"].is_valid().to_numpy()[at]
    text &= text_sizes == _numbers(known, "caption_size_bytes")[at]
    text &= text_mtimes == _numbers(known, "caption_mtime_ns")[at]
    return _Memory(known, at, same, text)


def _settled(known: pa.Table, *, hashed: bool) -> npt.NDArray[np.bool_]:
    """Tell the rows whose facts hold as long as the file is the same: identified ones, or measured ones."""
    identified = known["image_id"].is_valid().to_numpy()
    if hashed:
        return np.asarray(identified, np.bool_)
    return np.asarray(identified | (known["width"].is_valid().to_numpy() & known["fault"].is_null().to_numpy()))


def _numbers(table: pa.Table, column: str) -> Numbers:
    numbers: Numbers = pc.fill_null(table[column], -1).to_numpy()
    return numbers


def _spelled(paths: Sequence[str]) -> list[str]:
    """Spell paths as rows do; bytes that are not UTF-8 are escaped."""
    return [path if path.isascii() or not _is_broken(path) else _escaped(path) for path in paths]


def _is_broken(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return True
    return False


def _escaped(path: str) -> str:
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _nothing_new(
    run: _Run, dataset: DatasetConfig, memory: _Memory, listing: Listing, before: Provenance, now: Provenance
) -> bool:
    """Tell whether the manifest stands as it is: the same settings, images, texts; then nothing is computed."""
    known = memory.table
    if known is None or replace(before, inputs="") != now or known.num_rows != len(listing.paths):
        return False
    plain = not (listing.captions or listing.measured or listing.rejects or listing.faults or run.verify)
    alone = sum(_size_of(run, other) == _size_of(run, dataset) for other in run.project.scanned) == 1
    untold = np.frombuffer(listing.text_sizes, np.int64) < 0
    texts = memory.same_text | (untold & (_numbers(known, "caption_size_bytes")[memory.at] < 0))
    in_order = np.array_equal(memory.at, np.arange(known.num_rows))
    return plain and alone and in_order and bool(memory.same_image.all()) and bool(texts.all())


def _size_of(run: _Run, dataset: DatasetConfig) -> tuple[float, bool, int]:
    """Return what datasets must share to share target sizes."""
    policy = policy_of(run.project, dataset)
    return (*policy.by_area(policy.resolution), policy.alignment)


def _made(
    run: _Run, dataset: DatasetConfig, listing: Listing, memory: _Memory, captioner: Captioner
) -> tuple[pa.Table, _Done]:
    """Read what is new, and make all rows."""
    done = _Done(seen=len(listing.paths), listing=listing)
    place = place_of(run.project, dataset)
    names = _spelled(listing.paths)
    broken = {row for row, (path, name) in enumerate(zip(listing.paths, names, strict=True)) if path is not name}
    facts, texts = _read(run, dataset, place, _Todo(listing, memory, captioner, broken), done)
    facts = _examined(run, dataset, place, names, facts, done)
    captions = _captions(dataset, listing, memory, captioner, texts)
    frames = frame_all(run.project, dataset, names, facts, _targets(run, dataset), listing.rejects)
    rejects = {row: "name: it is not UTF-8" for row in broken}
    for found in (_faults(facts), frames.rejects, captions.rejects):
        for row, reason in found.items():
            rejects.setdefault(row, reason)
    done.selected = select(dataset, run.project.trainer.prep_seed, names, facts, rejects)
    rejects |= done.selected.rejects
    table = _table(dataset, names, facts, captions, frames.without(rejects.keys()), rejects)
    done.collisions = frames.collisions
    done.changed = _changed(memory, table)
    return table, done


def _targets(run: _Run, dataset: DatasetConfig) -> Targets:
    """Return the map of target sizes; strict references, which take their targets' crops, get one of their own."""
    if dataset.conditioning_type == "reference_strict":
        return Targets()
    return run.targets.setdefault(_size_of(run, dataset), Targets())


@dataclass(frozen=True, slots=True)
class _Todo:
    """What a dataset's scan may have to read."""

    listing: Listing
    memory: _Memory
    captioner: Captioner
    broken: set[int]  # rows whose name cannot be spelled: their files are not opened


def _read(
    run: _Run, dataset: DatasetConfig, place: Place, todo: _Todo, done: _Done
) -> tuple[pa.Table, dict[int, list[str] | str]]:
    """Measure the images that are new; return the facts of all, and the text files that were read, by row."""
    listing, memory = todo.listing, todo.memory
    new = [row for row in np.flatnonzero(~memory.same_image).tolist() if row not in todo.broken]
    told = {} if run.hashed else {listing.paths[row]: row for row in new if listing.paths[row] in listing.measured}
    for path in listing.faults:
        told.pop(path, None)
    unread = [row for row in new if listing.paths[row] not in told and listing.paths[row] not in listing.faults]
    fresh = ~memory.same_text & (np.frombuffer(listing.text_sizes, np.int64) >= 0)
    text_rows = [row for row in np.flatnonzero(fresh).tolist() if row not in todo.broken]
    chunk = _FAR_CHUNK if isinstance(place, Bucket | Rows) else _CHUNK
    blank = Task(place, (), (), (), run.hashed, dataset.view, dataset.caption_encoding, dataset.disable_multiline_split)
    tasks = [
        replace(
            blank,
            paths=[listing.paths[row] for row in rows or ()],
            stats=[(listing.sizes[row], listing.mtimes[row]) for row in rows or ()],
            texts=[beside(listing.paths[row]) for row in texts or ()],
        )
        for rows, texts in zip_longest(_pieces(unread, chunk), _pieces(text_rows, chunk))
    ]
    batches: list[pa.RecordBatch] = []
    captions: list[list[str] | str] = []
    kept = len(listing.paths) - len(unread)
    with progress(f"scan {dataset.id}", len(listing.paths), "image", done=kept) as bar:
        for measured in _measured(tasks, run.workers):
            batches.append(measured.facts)
            captions += measured.captions
            bar.update(measured.facts.num_rows)
    done.read = len(unread)
    others = [_told(listing, path) for path in told] + [Facts(fault=listing.faults[listing.paths[row]])
              for row in new if listing.paths[row] in listing.faults]  # fmt: skip
    elsewhere = [*told.values(), *(row for row in new if listing.paths[row] in listing.faults)]
    batches.append(as_batch([*others, Facts()]))  # the last for names that cannot be spelled
    return _gathered(memory, [*unread, *elsewhere], pa.Table.from_batches(batches)), dict(
        zip(text_rows, captions, strict=True)
    )


def _told(listing: Listing, path: str) -> Facts:
    """Take a table's word for an image's size."""
    width, height = listing.measured[path]
    return Facts(width=width, height=height)


def _gathered(memory: _Memory, rows: list[int], new: pa.Table) -> pa.Table:
    """Put the facts of all images in order: those known, those of `rows`, and none for what is left."""
    names = [*facts_schema().names, "phash", "face", "examined"]
    unseen = pa.table(
        {"phash": pa.nulls(new.num_rows, pa.string()), "face": [[]] * new.num_rows,
         "examined": pa.nulls(new.num_rows, pa.string())},
        schema=columns_of("phash", "face", "examined"),
    )  # fmt: skip
    for name in unseen.column_names:
        new = new.append_column(unseen.schema.field(name), unseen[name])
    known = memory.table.select(names) if memory.table is not None else new.schema.empty_table()
    order = np.where(memory.same_image, memory.at, known.num_rows + new.num_rows - 1)
    order[rows] = known.num_rows + np.arange(len(rows))
    both = pa.concat_tables([known.cast(new.schema), new])
    return both.take(pa.array(order)).combine_chunks()


def _pieces(rows: list[int], size: int) -> Iterator[list[int]]:
    for first in range(0, len(rows), size):
        yield rows[first : first + size]


def _measured(tasks: list[Task], workers: int) -> Iterator[Measured]:
    """Measure on the pool; the files of a task whose worker died are tried one by one."""
    pooled = len(tasks) > 1
    for task, answer in each(measure, tasks, workers if pooled else 1, _MEASURE_LIMIT_S if pooled else None):
        if not isinstance(answer, Crash):
            yield answer
            continue
        single = [replace(task, paths=[path], stats=[listed], texts=()) for path, listed in
                  zip(task.paths, task.stats, strict=True)]  # fmt: skip
        single += [replace(task, paths=(), stats=(), texts=[text]) for text in task.texts]
        for one, alone in each(measure, single, workers, _MEASURE_LIMIT_S):
            yield _given_up(one, alone) if isinstance(alone, Crash) else alone


def _given_up(task: Task, crash: Crash) -> Measured:
    """Stand in for a file that costs its worker."""
    reason = f"unreadable: {crash.reason}"
    return Measured(as_batch([Facts(fault=reason) for _ in task.paths]), [f"no caption: {crash.reason}"
                                                                          for _ in task.texts])  # fmt: skip


def _examined(
    run: _Run, dataset: DatasetConfig, place: Place, names: list[str], facts: pa.Table, done: _Done
) -> pa.Table:
    """Decode the images whose pixels are asked for and were not looked at yet."""
    wanted = {"verify"} if run.verify else set()
    wanted |= {"phash"} if dataset.near_duplicates != "ignore" else set()
    wanted |= {"face"} if dataset.crop and dataset.crop_style == "face" else set()
    if not wanted:
        return facts
    columns = {name: facts[name].to_pylist() for name in ("fault", "phash", "face", "examined", "image_id", "width")}
    pixels = [width * height if width and height else 0 for width, height in
              zip(columns["width"], facts["height"].to_pylist(), strict=True)]  # fmt: skip
    most = dataset.image_policy.maximum_megapixels * 1e6
    looks: list[tuple[int, Look]] = []
    for row, name in enumerate(names):
        missing = wanted - set((columns["examined"][row] or "").split())
        if missing and columns["fault"][row] is None and 0 < pixels[row] <= most:
            words = " ".join(sorted(missing))
            looks.append((row, Look(place, name, columns["image_id"][row], dataset.view, words)))
    done.examined = len(looks)
    with progress(f"decode {dataset.id}", len(looks), "image") as bar:
        answers = each(examine, [look for _, look in looks], run.workers, EXAMINE_LIMIT_S)
        for (row, _), (look, sight) in zip(looks, answers, strict=True):
            _note_sight(columns, row, look, sight)
            bar.update()
    for name in ("fault", "phash", "face", "examined"):
        place_of_column = facts.schema.get_field_index(name)
        field_of_column = facts.schema.field(name)
        facts = facts.set_column(place_of_column, field_of_column, pa.array(columns[name], field_of_column.type))
    return facts


def _note_sight(columns: dict[str, list[Any]], row: int, look: Look, sight: Sight | Crash) -> None:
    if isinstance(sight, Crash):
        columns["fault"][row] = f"unreadable: {sight.reason}"
        return
    columns["fault"][row] = sight.fault
    if not sight.lasting:
        columns["image_id"][row] = None
        return
    columns["examined"][row] = " ".join(sorted({*(columns["examined"][row] or "").split(), *look.wanted.split()}))
    columns["phash"][row] = sight.phash or columns["phash"][row]
    columns["face"][row] = list(sight.face) if sight.face is not None else columns["face"][row]


@dataclass(frozen=True, slots=True)
class _Captions:
    """The captions of all images, as columns."""

    texts: pa.Array
    source: pa.Array
    sizes: pa.Array  # of the text files
    mtimes: pa.Array
    rejects: dict[int, str]


def _captions(
    dataset: DatasetConfig,
    listing: Listing,
    memory: _Memory,
    captioner: Captioner,
    texts: dict[int, list[str] | str],
) -> _Captions:
    """Caption all images; those whose text file is unchanged keep what they have."""
    schema = columns_of("captions", "caption_source", "caption_size_bytes", "caption_mtime_ns")
    made: list[list[str] | None] = []
    sources: list[str | None] = []
    rejects: dict[int, str] = {}
    kept = memory.same_text.tolist() if captioner.reads_text else [False] * len(listing.paths)
    table = dataset.caption_strategy if dataset.caption_strategy in ("parquet", "csv", "huggingface") else None
    for row, path in enumerate(listing.paths):
        if kept[row]:
            made.append(None)
            sources.append(None)
            continue
        if captioner.reads_text:
            found = captioner.of_found(texts.get(row, f"no caption: {_named(beside(path))} is missing"), "textfile")
        elif table is not None and not dataset.only_instance_prompt:
            found = captioner.of_found(listing.captions.get(path, f"no caption: {table} has none"), table)
        else:
            found = captioner.of_path(path)
        made.append(found.texts)
        sources.append(found.source)
        if found.reject is not None:
            rejects[row] = found.reject
    columns = [pa.array(_cleaned(made), schema.field(0).type), pa.array(sources, pa.string())]
    if any(kept) and memory.table is not None:
        columns = [_overlaid(column, memory, name) for column, name in zip(columns, schema.names[:2], strict=True)]
    sizes, mtimes = np.frombuffer(listing.text_sizes, np.int64), np.frombuffer(listing.text_mtimes, np.int64)
    without = sizes < 0
    return _Captions(columns[0], columns[1], pa.array(sizes, mask=without), pa.array(mtimes, mask=without), rejects)


def _named(path: str) -> str:
    return _escaped(path.rpartition("/")[2])


def _cleaned(captions: list[list[str] | None]) -> list[list[str] | None]:
    """Replace what is no character, which a file name may hold."""
    return [
        [text if text.isascii() or not _is_broken(text) else _escaped(text) for text in texts] if texts else texts
        for texts in captions
    ]


def _overlaid(column: pa.Array, memory: _Memory, name: str) -> pa.Array:
    """Put in the values of the last manifest where the text file is unchanged."""
    assert memory.table is not None, "something is unchanged"
    known = memory.table[name].combine_chunks()
    both = pa.concat_arrays([known.cast(column.type), column])
    order = np.where(memory.same_text, memory.at, len(known) + np.arange(len(column)))
    return both.take(pa.array(order))


def _faults(facts: pa.Table) -> dict[int, str]:
    faults = facts["fault"]
    rows = np.flatnonzero(faults.is_valid().to_numpy())
    return dict(zip(rows.tolist(), faults.take(pa.array(rows)).to_pylist(), strict=True))


def _table(
    dataset: DatasetConfig,
    names: list[str],
    facts: pa.Table,
    captions: _Captions,
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


def _changed(memory: _Memory, table: pa.Table) -> int:
    """Count the images of the last manifest whose row says something else now."""
    if memory.table is None:
        return 0
    both = np.flatnonzero(memory.at >= 0)
    before, now = memory.table.take(pa.array(memory.at[both])), table.take(pa.array(both))
    differs = np.zeros(len(both), np.bool_)
    for name in table.column_names:
        if name not in _CONTENT_APART_FROM:
            differs |= _differs(before[name].combine_chunks(), now[name].combine_chunks())
    return int(differs.sum())


def _differs(before: pa.Array, now: pa.Array) -> npt.NDArray[np.bool_]:
    if before.equals(now):
        return np.zeros(len(now), np.bool_)
    if pa.types.is_list(now.type):
        pairs = zip(before.to_pylist(), now.to_pylist(), strict=True)
        return np.fromiter((one != other for one, other in pairs), np.bool_, len(now))
    either = pc.xor(before.is_null(), now.is_null())
    return np.asarray(pc.or_(either, pc.fill_null(pc.not_equal(before, now), False)))


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
        near_duplicates=done.selected.alike,
        collisions=done.collisions,
        faces=count.faces,
        variants=dataset.variants,
        captions=count.captions,
        ignored_files=done.listing.ignored,
        unreadable_folders=tuple(done.listing.unreadable),
        manifest=str(run.project.manifest(dataset.id)),
        written=done.written,
        looked_at=not done.not_looked_at,
    )
