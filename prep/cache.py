"""`prep cache`: every image and prompt of the pair tables encoded once, into shards found by content key.

`cache` is the public function. What a store holds already, from this or any other project, is not encoded again.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from families import Source, open_project
from families.checkpoints import encoder_keys, here, image_encoder_keys, locate, record_keys, text_encoder_key
from prep.pixels import Picture, reference_picture, target_picture
from prep.pool import default_workers
from schemas.console import progress
from schemas.errors import UserError
from schemas.freshness import read_pairs
from schemas.keys import text_key
from schemas.project import Project
from schemas.rows import PairRow
from schemas.shards import ShardIndex
from schemas.summaries import CacheSummary, StoreSummary

_NOT_HERE = "(encoder not known yet)"  # in place of an encoder's key, in a dry run without a checkpoint


@dataclass(slots=True)
class _Work:
    """What one latent store must hold."""

    index: ShardIndex
    pictures: dict[str, Picture] = field(default_factory=dict)  # by latent key

    def missing(self, limit: int | None) -> list[tuple[str, Picture]]:
        """Return what is to be encoded, bucket by bucket."""
        todo = [
            (key, one) for key, one in self.pictures.items() if key not in self.index and key not in self.index.rejects
        ]
        return sorted(todo, key=lambda item: (item[1].geometry.bucket, item[0]))[:limit]


def cache(
    project: Source, *, limit: int | None = None, workers: int | None = None, dry_run: bool = False
) -> CacheSummary:
    """Encode what the pair tables of a project need and the stores lack.

    `limit` encodes at most N images per store and N prompts. Raises UserError if a table is missing or stale, and, when
    all else is encoded, if images changed since they were scanned.
    """
    start = time.monotonic()
    project = open_project(project, need_images=True)
    tables = [read_pairs(project, target) for target in project.targets]
    rows = [row for table in tables for row in table if row.reject is None]
    if not rows:
        raise UserError("no pair is left to cache; prep pairs says why each was rejected")
    unsettled: dict[str, str] = {}
    latents = _cache_latents(project, rows, limit, workers or default_workers(), dry_run, unsettled)
    text = _cache_text(project, rows, limit, dry_run)
    if not dry_run:
        record_keys(project, encoder_keys(project))
    if unsettled:
        listed = "\n".join(f"  {file}: {reason}" for file, reason in sorted(unsettled.items())[:20])
        raise UserError(
            f"{len(unsettled)} images could not be used, all else is encoded; mend them and run prep scan, prep pairs "
            f"and prep cache again:\n{listed}"
        )
    return CacheSummary((*latents, text), project.warnings, time.monotonic() - start, dry_run)


def _checkpoint(project: Project, components: Sequence[str], dry_run: bool) -> Path | None:
    """Return the checkpoint's folder; a dry run neither builds nor fetches one."""
    return here(project, components) if dry_run else locate(project, components)


def _cache_latents(
    project: Project,
    rows: Sequence[PairRow],
    limit: int | None,
    workers: int,
    dry_run: bool,
    unsettled: dict[str, str],
) -> list[StoreSummary]:
    checkpoint = _checkpoint(project, project.family.image_encoder, dry_run)
    keys = (_NOT_HERE, _NOT_HERE)  # of targets and of references
    if checkpoint is not None:
        keys = image_encoder_keys(project, checkpoint, remember=not dry_run)
    stores = _latent_work(project, rows, *keys)
    todo = {folder: work.missing(limit) for folder, work in stores.items()}
    if dry_run or checkpoint is None or not any(todo.values()):
        return [_store_summary(folder, work, 0, 0) for folder, work in stores.items()]

    from prep.encode import Images  # noqa: PLC0415 - a run with nothing to encode loads no tensor library

    images = Images(project, checkpoint, keys)
    summaries = []
    for folder, work in stores.items():
        encoded = written = 0
        with progress("encode images", len(todo[folder]), "image") as bar:
            for shard in images.shards(folder, folder.name, todo[folder], workers):
                encoded += len(shard.keys)
                written += shard.path.stat().st_size
                bar.update(len(shard.keys))
            bar.update(len(images.rejected))
        work.index.rejects.update(images.rejected)
        summaries.append(_store_summary(folder, work, encoded, written))
    unsettled.update(images.unsettled)
    return summaries


def _store_summary(folder: Path, work: _Work, encoded: int, written: int) -> StoreSummary:
    rejects = work.index.rejects
    rejected = {picture.name: rejects[key] for key, picture in work.pictures.items() if key in rejects}
    reused = sum(key in work.index for key in work.pictures)
    return StoreSummary("latents", str(folder), len(work.pictures), reused, encoded, rejected, 0, written)


def _latent_work(project: Project, rows: Iterable[PairRow], targets: str, references: str) -> dict[Path, _Work]:
    """Collect the pictures that each store must hold; targets and references have their encoders' keys."""
    stores: dict[Path, _Work] = {}
    for row in rows:
        wanted = [(row.dataset_id, targets, row.target_key(targets), target_picture(project, row))]
        for reference in row.references:
            picture = reference_picture(project, row, reference)
            wanted.append((row.store_of(reference), references, reference.key(references), picture))
        for dataset_id, encoder, key, picture in wanted:
            folder = project.latent_store(project.dataset(dataset_id)) / encoder
            work = stores.get(folder) or stores.setdefault(folder, _Work(ShardIndex(folder)))
            work.pictures.setdefault(key, picture)
    return stores


def prompts_of(project: Project, rows: Iterable[PairRow]) -> list[str]:
    """Return every prompt that training or sampling may ask for, each once, the empty one included."""
    own = {prompt for row in rows for prompt in row.prompts}
    instead = {prompt for row in rows for reference in row.references for prompt in reference.prompts}
    return sorted(own | instead | set(project.prompt_library.values()) | {""})


def _cache_text(project: Project, rows: Sequence[PairRow], limit: int | None, dry_run: bool) -> StoreSummary:
    checkpoint = _checkpoint(project, project.family.text_encoders, dry_run)
    encoder = text_encoder_key(project, checkpoint, remember=not dry_run) if checkpoint is not None else _NOT_HERE
    folder = project.text_store / encoder
    index = ShardIndex(folder)
    prompts = prompts_of(project, rows)
    todo = [prompt for prompt in prompts if text_key(encoder, prompt) not in index]
    reused, todo = len(prompts) - len(todo), todo[:limit]
    encoded = written = truncated = 0
    if todo and checkpoint is not None and not dry_run:
        from prep.encode import text_shards  # noqa: PLC0415 - a run with nothing to encode loads no tensor library

        with progress("encode prompts", len(todo), "prompt") as bar:
            for shard in text_shards(project, checkpoint, folder, encoder, todo):
                encoded += len(shard.keys)
                written += shard.path.stat().st_size
                truncated += shard.truncated
                bar.update(len(shard.keys))
    return StoreSummary("text", str(folder), len(prompts), reused, encoded, {}, truncated, written)
