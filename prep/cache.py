"""`prep cache`: every image and prompt of the pair tables encoded once, into shards found by content key.

`cache` is the public function. What a store holds already, from this or any other project, is not encoded again.
Several processes, on one machine or many, may work on the same stores at once: see prep/units.py and prep/leases.py.
"""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from families import Source, open_project
from families.checkpoints import (
    Description,
    describe_image_encoder,
    describe_text_encoder,
    encoder_keys,
    here,
    key_of,
    locate,
    record_keys,
    stored_rows,
)
from prep.leases import Leases
from prep.needed import REFERENCES, TARGETS, Needed, Pictures, needed_of
from prep.noted import TEXT, announce, note
from prep.pixels import Picture, pixels_of
from prep.planning.budget import Sizes, sizes_of
from prep.pool import Crew, ahead, default_workers
from prep.units import Span, Unit, spans
from prep.writing import Part
from schemas.console import Progress, log, progress
from schemas.errors import UserError
from schemas.keys import text_keys
from schemas.planned import sized
from schemas.project import Project
from schemas.shards import REJECTS, ShardIndex
from schemas.stores import Store
from schemas.summaries import AcceleratorUse, CacheSummary, StoreSummary, counted
from schemas.trainer import Posterior

_NOT_HERE = "(encoder not known yet)"  # in place of an encoder's key, in a dry run without a checkpoint
_AHEAD = 8  # pictures per worker that wait for the encoder
_POLL_S = 2.0  # between looks at what others encode


@dataclass(frozen=True, slots=True)
class Share:
    """Which units of a run are this process's own: every `count`-th, starting from `index`."""

    index: int = 0
    count: int = 1

    def has(self, unit: int) -> bool:
        """Tell whether a unit is ours."""
        return unit % self.count == self.index


def share_of(index: int | None, count: int | None) -> Share:
    """Return the share that was asked for, or the one that torchrun gives this process; raises UserError."""
    if (index is None) != (count is None):
        raise UserError("--num-shards and --shard-index go together")
    if index is None or count is None:
        count, index = _numbered("WORLD_SIZE", 1), _numbered("RANK", 0)
        if ("WORLD_SIZE" in os.environ) != ("RANK" in os.environ):
            raise UserError(
                "of the variables WORLD_SIZE and RANK, which torchrun sets, only one is there; "
                "unset it, or say --num-shards and --shard-index"
            )
    if not 0 <= index < count:
        raise UserError(f"--shard-index {index} is not one of {count} shards, which count from 0")
    return Share(index, count)


def _numbered(variable: str, default: int) -> int:
    value = os.environ.get(variable, str(default))
    if not value.isdecimal():
        raise UserError(f"the variable {variable}={value!r} is no number; --num-shards and --shard-index go before it")
    return int(value)


class Engine(Protocol):
    """Who encodes: this process, or many."""

    def latents(self, checkpoint: Path, units: Iterator[Unit]) -> Iterator[Part]:
        """Encode units of pictures; a unit is taken when there is someone for it."""

    def texts(self, checkpoint: Path, units: Iterator[Unit]) -> Iterator[Part]:
        """Encode units of prompts."""

    def release(self) -> None:
        """Free the encoders that were loaded, and what else was started."""

    def used(self) -> AcceleratorUse | None:
        """Say how well this process's GPU was used for images; None if it has none."""


class Here:
    """Encoders in this process, one after the other, pixels from a pool of others."""

    def __init__(self, project: Project, workers: int) -> None:
        self._project, self._workers = project, workers
        self._crew: Crew | None = None
        self._encoder: Any = None
        self._used: AcceleratorUse | None = None

    def latents(self, checkpoint: Path, units: Iterator[Unit]) -> Iterator[Part]:
        """Encode units of pictures, decoded ahead; workers start while the encoder is loaded."""
        start = next(units, None)
        if start is None:
            return
        self._crew = self._crew or Crew(self._workers, pixels_of)
        self._crew.summon(len(start.items))
        encoder = self._loaded("Latents", checkpoint)
        taken: list[Unit] = []  # whose pictures are being made, or encoded

        def pictures() -> Iterator[Picture]:
            for unit in chain([start], units):
                taken.append(unit)
                for picture in unit.items:
                    assert isinstance(picture, Picture), "a unit of latents"
                    yield picture

        made = ahead((pixels for _, pixels in self._crew.each(pixels_of, pictures())), _AHEAD * self._workers)
        for first in made:
            unit = taken.pop(0)
            yield from encoder.work(unit, chain([first], islice(made, len(unit.items) - 1)))
        yield from self._settled()
        self._used = encoder.used()

    def texts(self, checkpoint: Path, units: Iterator[Unit]) -> Iterator[Part]:
        """Encode units of prompts."""
        for unit in units:
            yield from self._loaded("Texts", checkpoint).work(unit)
        yield from self._settled()

    def _settled(self) -> Iterator[Part]:
        if self._encoder is not None:
            yield from self._encoder.settle()

    def _loaded(self, kind: str, checkpoint: Path) -> Any:
        from prep import encode  # noqa: PLC0415 - a run with nothing to encode loads no tensor library

        if self._encoder is None:
            self._encoder = getattr(encode, kind)(self._project, checkpoint)
        return self._encoder

    def release(self) -> None:
        """Let the encoder's memory go, and the workers."""
        encoder, crew = self._encoder, self._crew
        self._encoder = self._crew = None
        if crew is not None:
            crew.__exit__()
        if encoder is not None:
            encoder.close()

    def used(self) -> AcceleratorUse | None:
        """Say how well the GPU was used for images."""
        return self._used


@dataclass(slots=True)
class _Work:
    """What one store needs, and what became of it."""

    kind: str  # latents or text
    index: ShardIndex
    encoder: str
    keys: list[str]
    folders: Sequence[str] | npt.NDArray[np.str_]  # of each key
    row_bytes: Sequence[int] | npt.NDArray[np.int64]  # of each key, before it is encoded
    item: Callable[[int], Picture | str]
    asked: int
    most_rows: int  # of one write
    wanted: list[int] = field(default_factory=list)  # numbers of keys that are to be encoded
    reused: int = 0
    encoded: int = 0
    bytes: int = 0
    cut: list[str] = field(default_factory=list)

    def look(self, limit: int | None) -> None:
        """Find what is missing."""
        missing, rejected = self.index.missing(self.keys)
        self.reused = len(self.keys) - len(missing) - rejected
        self.wanted = missing[:limit]

    def cost(self, unit: str) -> str:
        """Say what is to be encoded takes, and what is saved by storing what is asked for twice once."""
        sizes = np.asarray(self.row_bytes, np.int64)
        todo = sizes[self.wanted]
        each = f"{sized(int(todo.mean()))} {'each' if todo.min() == todo.max() else 'on average'}"
        said = f"{counted(len(todo), unit)} to encode, {each}, {sized(int(todo.sum()))} in all"
        saved = (self.asked - len(self.keys)) * int(sizes.mean())
        return f"{said}; asked for {self.asked} times, storing each once saves {sized(saved)}" if saved > 0 else said

    def is_whole(self) -> bool:
        """Tell whether all is there by now, whoever made it."""
        if self.wanted:
            self.index.refresh()
        return all(key in self.index or key in self.index.rejects for key in self.keys)

    def take_in(self, part: Part) -> None:
        """Note what reached the disk."""
        self.encoded += len(part.keys)
        self.bytes += part.bytes
        self.cut += part.cut
        self.index.rejects.update(part.rejected)

    def summary(self) -> StoreSummary:
        """Say what was done."""
        rejects = self.index.rejects
        bad = [n for n, key in enumerate(self.keys) if key in rejects] if rejects else []
        rejected = {_name(self.item(n)): rejects[self.keys[n]] for n in bad}
        size = int(np.sum(self.row_bytes, dtype=np.int64))
        return StoreSummary(
            kind=self.kind, folder=self.index.store.where(), asked=self.asked, needed=len(self.keys), bytes=size,
            reused=self.reused, encoded=self.encoded, rejected=rejected, cut=tuple(self.cut), bytes_written=self.bytes,
        )  # fmt: skip


def _name(item: Picture | str) -> str:
    return item.name if isinstance(item, Picture) else item


def cache(
    project: Source,
    *,
    limit: int | None = None,
    workers: int | None = None,
    dry_run: bool = False,
    share: Share | None = None,
    engine: Engine | None = None,
) -> CacheSummary:
    """Encode what the pair tables of a project need and the stores lack.

    `limit` encodes at most N images per store and N prompts. Raises UserError if a table is missing or stale, and, when
    all else is encoded, if images changed since they were scanned.
    """
    start = time.monotonic()
    project = open_project(project, need_images=True)
    needed = needed_of(project)
    if not any(table.num_rows for table in needed.tables.values()):
        raise UserError("no pair is left to cache; prep pairs says why each was rejected")
    engine = engine or Here(project, workers or default_workers())
    run = _Run(project, engine, share or Share(), limit, dry_run)
    run.locate_all()
    works = [*run.latents(needed), run.text(needed)]
    if not dry_run:
        record_keys(project, encoder_keys(project))
    if run.unsettled:
        listed = "\n".join(f"  {file}: {reason}" for file, reason in sorted(run.unsettled.items())[:20])
        raise UserError(
            f"{len(run.unsettled)} images could not be used, all else is encoded; mend them and run prep scan, "
            f"prep pairs and prep cache again:\n{listed}"
        )
    if not dry_run and limit is None and all(work.is_whole() for work in works):
        note(project, run.said)
    summaries = tuple(work.summary() for work in works)
    return CacheSummary(summaries, project.warnings, time.monotonic() - start, dry_run, engine.used())


class _Run:
    """One run over all stores of a project."""

    def __init__(self, project: Project, engine: Engine, share: Share, limit: int | None, dry_run: bool) -> None:
        self._project, self._engine, self._share = project, engine, share
        self._limit, self._dry_run = limit, dry_run
        self.said: dict[str, Description] = {}  # of the encoders, by what they encode
        self.unsettled: dict[str, str] = {}  # files that may work another time, and why they did not

    def locate_all(self) -> None:
        """Raise UserError for what a checkpoint lacks before anything is encoded."""
        family = self._project.family
        self._checkpoint((*family.image_encoder, *family.text_encoders))

    def latents(self, needed: Needed) -> list[_Work]:
        """Encode what the latent stores lack."""
        project = self._project
        checkpoint = self._checkpoint(project.family.image_encoder)
        keys = {TARGETS: _NOT_HERE, REFERENCES: _NOT_HERE}
        if checkpoint is not None:
            roles: dict[str, Posterior] = {TARGETS: project.trainer.posterior, REFERENCES: "mode"}
            for role, posterior in roles.items():
                self.said[role] = describe_image_encoder(project, checkpoint, posterior, remember=not self._dry_run)
                keys[role] = key_of(self.said[role])
        doubled = keys[TARGETS] if project.trainer.posterior == "moments" else None
        pictures, sizes = needed.pictures(project, keys), sizes_of(project)
        works = [self._latent_work(one, sizes, 2 if one.encoder == doubled else 1) for one in pictures]
        self._encode("encode images", "image", works, checkpoint, self._engine.latents)
        return works

    def _latent_work(self, pictures: Pictures, sizes: Sizes, parts: int) -> _Work:
        """Describe a store's need; a row has the mean alone, or two parts, mean and deviation."""
        sides, which = pictures.sizes()
        folders = np.array([f"{width}x{height}" for width, height in sides])
        cells = (sides[:, 0] // sizes.scale) * (sides[:, 1] // sizes.scale)
        return _Work(
            "latents", ShardIndex(pictures.store), pictures.encoder, pictures.keys, folders[which],
            (cells * sizes.per_cell * parts)[which], pictures.picture, pictures.asked,
            min(self._project.dataset(name).write_batch_size for name in pictures.dataset_ids),
        )  # fmt: skip

    def text(self, needed: Needed) -> _Work:
        """Encode the prompts that the text store lacks."""
        project, prompts = self._project, needed.prompts
        checkpoint = self._checkpoint(project.family.text_encoders)
        key = _NOT_HERE
        if checkpoint is not None:
            self.said[TEXT] = describe_text_encoder(project, checkpoint, remember=not self._dry_run)
            key = key_of(self.said[TEXT])
        index = ShardIndex(project.text_store / key)
        keys = list(text_keys(key, prompts))
        rows = self._text_rows(checkpoint, index, keys, prompts)
        sizes = [sizes_of(project).of_prompt(one) for one in rows]  # asked once the checkpoint is there
        folders = [f"{one}-rows" if project.model.padding_first else "" for one in rows]  # a shard has one shape
        own = project.dataset(project.text_dataset) if project.text_dataset is not None else project.trainer
        work = _Work(
            "text", index, key, keys, folders, sizes, prompts.__getitem__, needed.asked,
            own.write_batch_size,
        )  # fmt: skip
        self._encode("encode prompts", "prompt", [work], checkpoint, self._engine.texts)
        return work

    def _text_rows(
        self, checkpoint: Path | None, index: ShardIndex, keys: Sequence[str], prompts: Sequence[str]
    ) -> list[int]:
        """Return how many rows of each prompt's embed are stored; what is all there is not counted anew."""
        project = self._project
        if checkpoint is None or not project.model.padding_first:
            return [project.text_tokens] * len(prompts)
        if all(key in index for key in keys):
            headers = map(index.header_of, keys)
            return [header.shapes["embed"][0] - header.pad_rows for header in headers]
        return stored_rows(project, checkpoint, prompts)

    def _checkpoint(self, components: Sequence[str]) -> Path | None:
        """Return the checkpoint's folder; a dry run neither builds nor fetches one."""
        return here(self._project, components) if self._dry_run else locate(self._project, components)

    def _encode(
        self,
        label: str,
        unit: str,
        works: Sequence[_Work],
        checkpoint: Path | None,
        engine: Callable[[Path, Iterator[Unit]], Iterator[Part]],
    ) -> None:
        """Encode what stores lack, in turn."""
        for work in works:
            work.look(self._limit)
        if self._dry_run or checkpoint is None:
            return
        said = {key_of(one): one for one in self.said.values()}
        for work in works:
            announce(self._project, work.index.store, said[work.encoder])
        if not any(work.wanted for work in works):
            return
        for work in works:
            if work.wanted:
                log.info("%s", work.cost(unit))
        try:
            for work in works:
                self._finish(label, unit, work, lambda units: engine(checkpoint, units))
        finally:
            self._engine.release()

    def _finish(self, label: str, unit: str, work: _Work, engine: Callable[[Iterator[Unit]], Iterator[Part]]) -> None:
        """Encode what one store lacks; done when all of it is there, whoever made it."""
        plan = spans(work.keys, work.folders, work.row_bytes, work.wanted)
        pending = {span.name: span for span in plan if self._share.has(span.number)}
        if not pending:
            return
        wanted = set(work.wanted)
        total = sum(int(n) in wanted for span in pending.values() for n in span.rows)
        with progress(label, total, unit) as bar, Leases() as leases:
            left = _Left(work, pending, wanted, leases)
            while left.pending:
                self._work_off(left, engine(left.units(bar)), bar)
                if left.pending:
                    left.wait()

    def _work_off(self, left: "_Left", parts: Iterator[Part], bar: Progress) -> None:
        for part in parts:
            left.work.take_in(part)
            self.unsettled.update(part.unsettled)
            bar.update(len(part.keys) + len(part.rejected) + len(part.unsettled))
            if part.last:
                left.finish(part.unit)


class _Left:
    """The units of a store that are not done yet, and who works on them."""

    def __init__(self, work: _Work, pending: dict[str, Span], wanted: set[int], leases: Leases) -> None:
        self.work, self.pending = work, pending
        self._wanted, self._leases = wanted, leases
        self._alike: Counter[str] = Counter()  # rows that are wanted, by folder
        for span in pending.values():
            self._alike[span.folder] += sum(int(n) in wanted for n in span.rows)
        self._mine: set[str] = set()
        self._told = False

    def units(self, bar: Progress) -> Iterator[Unit]:
        """Yield the units that nobody else works on, leased, with what they still lack."""
        store: Store = self.work.index.store
        for span in list(self.pending.values()):
            if span.name in self._mine or not self._leases.take(store, span.name):
                continue
            if span.folder:
                self.work.index.refresh(REJECTS)
            self.work.index.refresh(span.folder)
            rows = [int(n) for n in span.rows if int(n) in self._wanted]
            todo = [n for n in rows if not self._there(n)]
            bar.update(len(rows) - len(todo))  # done by others meanwhile
            if todo:
                self._mine.add(span.name)
                keys = tuple(self.work.keys[n] for n in todo)
                items = tuple(map(self.work.item, todo))
                alike = self._alike[span.folder]
                yield Unit(span.name, store, self.work.encoder, span.folder, keys, items, self.work.most_rows, alike)
            else:
                self.finish(span.name)

    def _there(self, number: int) -> bool:
        key = self.work.keys[number]
        return key in self.work.index or key in self.work.index.rejects

    def finish(self, name: str) -> None:
        """Give a unit back, done."""
        self._leases.release(self.work.index.store, name)
        self._mine.discard(name)
        self.pending.pop(name, None)

    def wait(self) -> None:
        """Wait a moment for units that other processes hold."""
        if not self._told:
            log.info("%d units are being encoded by others; waiting for them", len(self.pending))
            self._told = True
        time.sleep(_POLL_S)
