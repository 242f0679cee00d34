"""Reading a dataset's images on the pool: what is new is measured, and where pixels are asked for, decoded.

`read_new` and `look_closer` are the way in. A file that kills or holds up its worker costs itself alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prep.captioning import Texts, caption_batch, tell_broken
from prep.captions import Captioner, beside
from prep.hub import Rows
from prep.images import DEFERRED
from prep.listing import Listing
from prep.measure import (
    UNKNOWN,
    Facts,
    Look,
    Measured,
    Sight,
    Task,
    columns_of_facts,
    examine,
    measure,
    measure_carefully,
)  # fmt: skip
from prep.memory import Memory, Numbers, as_batch, gathered, is_broken
from prep.places import Bucket, Place
from prep.pool import Crash, Crew, each
from schemas.console import progress
from schemas.datasets import DatasetConfig

_EXAMINE_LIMIT_S = 60.0  # for decoding one file
_MEASURE_LIMIT_S = 60.0  # for the headers of one task, then of each of its files
_HASH_LIMIT_S = 900.0  # the same where whole files are read

_CHUNK = 1024  # files per task of the pool
_WHOLE_CHUNK = 64  # the same where whole files are read

_SEEN = ("fault", "phash", "face", "examined", "image_id")  # columns that decoding may change


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is asked of a dataset's images."""

    hashed: bool  # identify them by content
    verify: bool  # decode them
    crew: Crew


@dataclass(frozen=True, slots=True)
class _Tasks(Sequence[Task]):
    """Tasks that are made when they are asked for: a million paths are not all there twice."""

    blank: Task
    listing: Listing
    images: Numbers  # rows to measure
    texts: Numbers  # rows whose text file is read

    @property
    def _size(self) -> int:
        return min(_WHOLE_CHUNK, _CHUNK) if self.whole else _CHUNK

    @property
    def whole(self) -> bool:
        """Say whether whole files may be read: to hash them, or because they come from afar."""
        return self.far or self.blank.hashed

    @property
    def far(self) -> bool:
        """Say whether files come from a service or a library."""
        return isinstance(self.blank.place, Bucket | Rows)

    def __len__(self) -> int:
        return -(-max(len(self.images), len(self.texts)) // self._size)

    @overload
    def __getitem__(self, number: int) -> Task: ...
    @overload
    def __getitem__(self, number: slice) -> list[Task]: ...
    def __getitem__(self, number: int | slice) -> Task | list[Task]:
        if isinstance(number, slice):
            return [self[one] for one in range(*number.indices(len(self)))]
        if number >= len(self):
            raise IndexError(number)
        listing, first = self.listing, number * self._size
        images = self.images[first : first + self._size].tolist()
        return replace(
            self.blank,
            paths=[listing.paths[row] for row in images],
            stats=[(listing.sizes[row], listing.mtimes[row]) for row in images] if self.far else (),
            texts=[beside(listing.paths[row]) for row in self.texts[first : first + self._size].tolist()],
        )


def read_new(
    captioner: Captioner, place: Place, listing: Listing, memory: Memory, wanted: Wanted
) -> tuple[pa.Table, Texts, int]:
    """Measure what is new; return the facts of all images, the captions read, and how many images were read.

    Images whose name cannot be spelled are not opened: nothing is known of them.
    """
    dataset = captioner.dataset
    spellable = np.ones(len(listing.paths), np.bool_)
    spellable[[row for row, path in enumerate(listing.paths) if not path.isascii() and is_broken(path)]] = False
    new = np.flatnonzero(~memory.same_image & spellable)
    told = _told(listing, new, hashed=wanted.hashed)
    unread = new[~np.isin(new, list(told))] if told else new
    text_rows = np.flatnonzero(~memory.same_text & (listing.of("text_sizes") >= 0) & spellable)
    blank = Task(place, (), (), (), wanted.hashed, dataset.upright, dataset.caption_encoding,
                 dataset.disable_multiline_split)  # fmt: skip
    tasks = _Tasks(blank, listing, unread, text_rows)
    facts: list[pa.RecordBatch] = []
    captions: list[pa.RecordBatch] = []
    total, known = len(listing.paths), 0
    with progress(f"scan {dataset.id}", total, "image", done=total - len(unread)) as bar:
        for measured in _measured(tasks, wanted.crew, helping=not tasks.far):
            facts.append(as_batch(measured.facts))
            some = text_rows[known : known + len(measured.captions)].tolist()
            known += len(some)
            captions.append(caption_batch(captioner, measured.captions, _text_stats(listing, measured, some)))
            bar.update(facts[-1].num_rows)
            if not dataset.is_target:
                tell_broken(dataset.id, measured.captions)
    facts, unread = _with_deferred(facts, unread, blank, listing, wanted.crew)
    facts.append(as_batch(columns_of_facts([*told.values(), Facts()])))  # the last for images of which nothing is known
    order = np.concatenate([unread, np.array(list(told), np.int64)])
    read = Texts(text_rows, pa.Table.from_batches([*captions, caption_batch(captioner, [])]))
    together = gathered(memory, order, pa.Table.from_batches(facts))
    del facts, captions
    pa.default_memory_pool().release_unused()  # a million answers leave holes behind
    return together, read, len(unread)


def _with_deferred(
    facts: list[pa.RecordBatch], rows: Numbers, blank: Task, listing: Listing, crew: Crew
) -> tuple[list[pa.RecordBatch], Numbers]:
    """Measure on the pool what was left to it; return all facts, and their rows."""
    left = [pc.fill_null(pc.equal(batch["fault"], DEFERRED), False) for batch in facts]
    waits = np.concatenate([one.to_numpy(zero_copy_only=False) for one in left]) if left else np.zeros(0, np.bool_)
    if not waits.any():
        return facts, rows
    kept = [batch.filter(pc.invert(one)) for batch, one in zip(facts, left, strict=True)]
    tasks = _Tasks(blank, listing, rows[waits], np.zeros(0, np.int64))
    kept += [as_batch(measured.facts) for measured in _measured(tasks, crew, helping=False)]
    return kept, np.concatenate([rows[~waits], rows[waits]])


def _text_stats(listing: Listing, measured: Measured, rows: Sequence[int]) -> Sequence[tuple[int, int]]:
    """Return sizes and times of text files: as they were read, of a bucket's as they were listed."""
    if UNKNOWN not in measured.text_stats or len(listing.text_mtimes) != len(listing.paths):
        return measured.text_stats
    listed = [(listing.text_sizes[row], listing.text_mtimes[row]) for row in rows]
    return [read if read != UNKNOWN else told for read, told in zip(measured.text_stats, listed, strict=True)]


def _told(listing: Listing, new: Numbers, *, hashed: bool) -> dict[int, Facts]:
    """Return, by row, what is known of new images without opening them: faults, sizes of a table, unwanted ones."""
    told: dict[int, Facts] = {}
    if not listing.faults and not listing.rejects and (hashed or not listing.measured):
        return told
    for row in new.tolist():
        path = listing.paths[row]
        if path in listing.faults:
            told[row] = Facts(fault=listing.faults[path])
        elif path in listing.rejects:
            told[row] = Facts()
        elif not hashed and path in listing.measured:
            width, height = listing.measured[path]
            size, mtime_ns = int(listing.of("sizes")[row]), int(listing.of("mtimes")[row])
            told[row] = Facts(None, max(0, size), mtime_ns, width, height)
    return told


def _measured(tasks: _Tasks, crew: Crew, *, helping: bool) -> Iterator[Measured]:
    """Measure on the pool; the files of a task whose worker died are tried one by one.

    With `helping`, this process measures too while workers start, and leaves some files `DEFERRED`.
    """
    place = tasks.blank.place
    streamed = isinstance(place, Rows) and place.streaming  # from front to back, by one reader
    if streamed or crew.workers == 1:
        yield from map(measure, tasks)
        return
    if helping and len(tasks) == 1:  # no worker would be ready before it is done
        yield measure_carefully(tasks[0])
        return
    limit_s = _HASH_LIMIT_S if tasks.whole else _MEASURE_LIMIT_S
    for task, answer in crew.each(measure, tasks, limit_s, measure_carefully if helping else None):
        if not isinstance(answer, Crash):
            yield answer
            continue
        single = [
            replace(task, paths=[path], stats=task.stats[row : row + 1], texts=())
            for row, path in enumerate(task.paths)
        ]
        single += [replace(task, paths=(), stats=(), texts=[text]) for text in task.texts]
        for one, alone in each(measure, single, crew.workers, limit_s):
            yield _given_up(one, alone) if isinstance(alone, Crash) else alone


def _given_up(task: Task, crash: Crash) -> Measured:
    """Stand in for a file that costs its worker."""
    facts = [Facts(fault=f"unreadable: {crash.reason}") for _ in task.paths]
    return Measured(
        columns_of_facts(facts), [f"no caption: {crash.reason}" for _ in task.texts], [UNKNOWN for _ in task.texts]
    )


def look_closer(
    dataset: DatasetConfig, place: Place, names: Sequence[str], facts: pa.Table, wanted: Wanted
) -> tuple[pa.Table, int]:
    """Decode the images whose pixels are asked for and were not looked at yet; return all facts, and how many."""
    words = {"verify"} if wanted.verify else set()
    words |= {"phash"} if dataset.near_duplicates != "ignore" else set()
    words |= {"face"} if dataset.crop and dataset.crop_style == "face" else set()
    if not words:
        return facts, 0
    columns = {name: facts[name].to_pylist() for name in _SEEN}
    pixels = pc.fill_null(pc.multiply(facts["width"], facts["height"]), 0).to_pylist()
    most = dataset.image_policy.maximum_megapixels * 1e6
    looks: list[tuple[int, Look]] = []
    for row, name in enumerate(names):
        missing = words - set((columns["examined"][row] or "").split())
        if missing and columns["fault"][row] is None and 0 < pixels[row] <= most:
            asked = " ".join(sorted(missing))
            looks.append((row, Look(place, name, columns["image_id"][row], dataset.upright, asked)))
    with progress(f"decode {dataset.id}", len(looks), "image") as bar:
        answers = wanted.crew.each(examine, [look for _, look in looks], _EXAMINE_LIMIT_S)
        for (row, _), (look, sight) in zip(looks, answers, strict=True):
            if isinstance(sight, Crash) and sight.died:  # perhaps not by this file: once more, alone
                [(_, sight)] = each(examine, [look], 1, _EXAMINE_LIMIT_S)
            _note(columns, row, look, sight)
            bar.update()
    for name in _SEEN:
        field = facts.schema.field(name)
        facts = facts.set_column(facts.schema.get_field_index(name), field, pa.array(columns[name], field.type))
    return facts, len(looks)


def _note(columns: dict[str, list[Any]], row: int, look: Look, sight: Sight | Crash) -> None:
    """Note what was seen; what may be otherwise another time is forgotten with the file's identity."""
    if isinstance(sight, Crash) or not sight.lasting:
        columns["fault"][row] = f"unreadable: {sight.reason}" if isinstance(sight, Crash) else sight.fault
        columns["image_id"][row] = None
        return
    columns["fault"][row] = sight.fault
    columns["examined"][row] = " ".join(sorted({*(columns["examined"][row] or "").split(), *look.wanted.split()}))
    columns["phash"][row] = sight.phash or columns["phash"][row]
    columns["face"][row] = list(sight.face) if sight.face is not None else columns["face"][row]
