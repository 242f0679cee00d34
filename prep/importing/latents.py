"""The latents of an import: where they lie, what speaks against them, a sample encoded again, the rest taken over."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from prep.importing.found import Cache, Slot, Wanted
from prep.importing.part import UNEQUAL, Checked, Part
from prep.importing.proof import disproved
from prep.importing.storing import LATENTS, Needed, store_latents
from prep.importing.trial import LatentTrial, bits
from prep.planning.budget import sizes_of
from schemas.console import progress
from schemas.imported import Verification
from schemas.keys import seed_of
from schemas.project import Project
from schemas.shards import SHARD_BYTES, Array


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A latent that lies somewhere and that nothing speaks against so far."""

    wanted: Wanted
    slot: Slot


class Latents:
    """The latents of a project, dataset by dataset."""

    def __init__(self, project: Project, cache: Cache, checkpoint: Path, needed: Needed, dataset: str | None) -> None:
        self._project, self._cache, self._checkpoint, self._needed = project, cache, checkpoint, needed
        self._sizes = sizes_of(project)
        self.parts: dict[str, Part] = {}
        self.claimed: set[Path] = set()
        self._candidates: dict[str, list[_Candidate]] = defaultdict(list)  # by part
        self._collect([one for one in needed.latents if dataset in (None, one.dataset_id)])
        for name, dataset_id in needed.degraded.items():
            part = next((one for one in self.parts.values() if one.name.partition(",")[0] == dataset_id), None)
            if part is not None:
                part.needed += 1
                part.reasons[name] = "degraded here, and so in no other cache"

    def _collect(self, wanted: Sequence[Wanted]) -> None:
        """Find where latents lie, and leave out what is doubtful without reading it."""
        slots = {one.key: self._cache.slot(one) for one in wanted}
        askers: dict[Slot, set[tuple[str, str]]] = defaultdict(set)
        for one in wanted:
            if isinstance(slot := slots[one.key], Slot):
                askers[slot].add((one.dataset_id, one.picture.path))
                self.claimed.add(slot.file)
        for one in wanted:
            part = self.parts.setdefault(_part(one), Part(_part(one), one.folder))
            part.needed += 1
            if one.key in self._needed.present:
                part.present += 1
                continue
            slot = slots[one.key]
            if isinstance(slot, str):
                part.reasons[_name(one)] = slot
                continue
            part.found += 1
            doubt = _doubt(one, slot, askers[slot])
            if doubt is None:
                self._candidates[part.name].append(_Candidate(one, slot))
            else:
                part.reasons[_name(one)] = doubt

    def run(self, sample: int, dry_run: bool) -> None:
        """Verify a sample of each part, then import what is left."""
        trial: LatentTrial | None = None
        for name, candidates in self._candidates.items():
            part = self.parts[name]
            trial = trial or LatentTrial(self._project, self._checkpoint)
            part.verification = self._verify(part, candidates, trial, sample)
            if part.verification is not None and part.verification.fault is not None:
                part.reasons |= {_name(one.wanted): UNEQUAL for one in candidates}
            elif part.verification is not None:
                self._import(part, candidates, dry_run)

    def _verify(self, part: Part, candidates: list[_Candidate], trial: LatentTrial, sample: int) -> Verification | None:
        """Encode some again; those that turn out not to be proven are taken out, and others take their place."""
        checked = Checked(trial.tolerance)
        seed = self._project.trainer.prep_seed
        for one in sorted(candidates, key=lambda one: seed_of(seed, "import", one.wanted.key)):
            if checked.count == sample:
                break
            values = self._proven(one)
            judgement = values if isinstance(values, str) else trial.judge(one.wanted, values)
            if isinstance(judgement, str):
                part.reasons[_name(one.wanted)] = judgement
                candidates.remove(one)
            else:
                checked.add(_name(one.wanted), judgement, LATENTS)
        return checked.result()

    def _import(self, part: Part, candidates: Sequence[_Candidate], dry_run: bool) -> None:
        ordered = sorted(candidates, key=lambda one: (one.wanted.picture.geometry.bucket, one.wanted.key))
        with progress(f"import {part.name}", len(ordered), "latent") as bar:
            for _, group in groupby(ordered, key=lambda one: one.wanted.picture.geometry.bucket):
                for rows in _pieces(self._rows(part, group)):
                    part.imported += len(rows)
                    if not dry_run:
                        part.written += store_latents(self._needed.encoder, rows)
                    bar.update(len(rows))

    def _rows(self, part: Part, candidates: Iterator[_Candidate]) -> Iterator[tuple[Wanted, Array]]:
        for one in candidates:
            values = self._proven(one)
            if isinstance(values, str):
                part.reasons[_name(one.wanted)] = values
            else:
                yield one.wanted, bits(values)

    def _proven(self, one: _Candidate) -> Tensor | str:
        """Read a latent; a text says why it is not proven to be the wanted one."""
        found = self._cache.latent(one.wanted, one.slot)
        if isinstance(found, str):
            return found
        channels = self._sizes.per_cell // torch.bfloat16.itemsize
        return disproved(one.wanted, found, channels, self._sizes.scale) or found.values


def _pieces(rows: Iterator[tuple[Wanted, Array]]) -> Iterator[list[tuple[Wanted, Array]]]:
    """Cut a stream into what goes into one shard."""
    piece: list[tuple[Wanted, Array]] = []
    for row in rows:
        piece.append(row)
        if len(piece) * row[1].nbytes >= SHARD_BYTES:
            yield piece
            piece = []
    if piece:
        yield piece


def _part(wanted: Wanted) -> str:
    """Name the part of a latent: resized pictures are sampled by themselves, for their pixels depend on more."""
    geometry = wanted.picture.geometry
    resized = wanted.size != (geometry.intermediary_width, geometry.intermediary_height)
    return f"{wanted.dataset_id}, resized" if resized else wanted.dataset_id


def _name(wanted: Wanted) -> str:
    """Name a latent: its image, and which crop of it."""
    geometry = wanted.picture.geometry
    return f"{wanted.picture.name} ({geometry.bucket} at {geometry.crop_left},{geometry.crop_top})"


def _doubt(wanted: Wanted, slot: Slot, askers: set[tuple[str, str]]) -> str | None:
    """Say why a latent is not taken, whatever its file holds."""
    if len(askers) > 1:
        return f"ambiguous: its file is that of {len(askers)} images; name the folder of one dataset, and --dataset"
    if wanted.odd is not None:
        return f"read differently elsewhere: the image has {wanted.odd}"
    if wanted.file is None:
        return "not local: its images are not files of a folder"
    try:
        image, cached = wanted.file.stat(), slot.file.stat()
    except OSError as fault:
        return f"unreadable: {fault.strerror or fault}"
    if (image.st_size, image.st_mtime_ns) != wanted.mark:
        return "changed since prep scan"
    return "image newer than its latent" if image.st_mtime_ns > cached.st_mtime_ns else None
