"""The encoders at work for `prep cache`: pixels from the pool to latent shards, prompts to text shards.

Apart from prep/cache.py because it loads a tensor library, which a run with nothing to encode does without.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from families.checkpoints import check_unchanged, image_encoder_keys, text_encoder_key, text_precisions
from families.runtime import default_device, dtype_of, family_of
from prep.images import Pixels
from prep.pixels import Picture, Refusal, pixels_of
from prep.pool import Crash, each
from prep.posterior import chosen
from schemas.keys import text_key
from schemas.project import Project
from schemas.rows import RejectRow, TextRow
from schemas.shards import Array, ShardHeader, latent_row, text_row, write_rejects, write_shard
from schemas.trainer import Posterior as Choice

SHARD_BYTES = 64 << 20  # of payload

ItemT = TypeVar("ItemT")


@dataclass(frozen=True, slots=True)
class Shard:
    """A shard that is on the disk."""

    path: Path
    keys: list[str]
    truncated: int = 0  # prompts that were longer than the encoder takes


@dataclass(frozen=True, slots=True)
class _Decoded:
    key: str
    bucket: str
    pixels: Pixels


class Images:
    """The image encoder at work: pixels come from the pool, latents leave as shards."""

    def __init__(self, project: Project, checkpoint: Path, keys: tuple[str, str]) -> None:
        self._family, trainer = family_of(project), project.trainer
        self._encoder = self._family.load_image_encoder(
            checkpoint,
            dtype_of(trainer.vae_dtype),
            default_device(),
            tiling=trainer.vae_enable_tiling,
            slicing=trainer.vae_enable_slicing,
        )
        check_unchanged(checkpoint, keys, image_encoder_keys(project, checkpoint))
        self._choices: dict[str, Choice] = {keys[1]: "mode", keys[0]: trainer.posterior}  # by the key of the encoder
        self._batch_size = _batch_size(project.trainer.vae_batch_size)
        self.rejected: dict[str, str] = {}  # of the last store, by key
        self.unsettled: dict[str, str] = {}  # files that may work another time, and why they did not

    def shards(self, folder: Path, encoder: str, todo: Sequence[tuple[str, Picture]], workers: int) -> Iterator[Shard]:
        """Encode pictures, sorted by bucket, and write them shard by shard; each is whole once yielded."""
        self.rejected = {}
        for bucket, pictures in groupby(self._pixels(todo, workers), key=lambda one: one.bucket):
            latents: list[tuple[str, Array]] = []
            for batch in _batches(pictures, self._batch_size):
                latents += self._encode(batch, self._choices[encoder])
                if sum(latent.nbytes for _, latent in latents) >= SHARD_BYTES:
                    yield _write_latents(folder / bucket, encoder, latents)
                    latents = []
            if latents:
                yield _write_latents(folder / bucket, encoder, latents)
        if self.rejected:
            write_rejects(folder, [RejectRow(key, reason) for key, reason in sorted(self.rejected.items())])

    def _pixels(self, todo: Sequence[tuple[str, Picture]], workers: int) -> Iterator[_Decoded]:
        """Yield the pixels of each picture; note those that have none."""
        made = each(pixels_of, [picture for _, picture in todo], workers)
        for (key, picture), (_, pixels) in zip(todo, made, strict=True):
            if isinstance(pixels, Crash):
                self.unsettled[picture.name] = pixels.reason
            elif not isinstance(pixels, Refusal):
                yield _Decoded(key, picture.geometry.bucket, pixels)
            elif pixels.lasting:
                self.rejected[key] = pixels.reason
            else:
                self.unsettled[picture.name] = pixels.reason

    def _encode(self, batch: Sequence[_Decoded], choice: Choice) -> list[tuple[str, Array]]:
        """Encode a batch; a latent that is not finite is rejected."""
        pixels = torch.from_numpy(np.stack([one.pixels for one in batch]))
        encoded = []
        posterior = self._family.encode_images(self._encoder, pixels)
        for one, latent in zip(batch, chosen(posterior, [one.key for one in batch], choice), strict=True):
            if torch.isfinite(latent).all():
                encoded.append((one.key, _bits(latent)))
            else:
                self.rejected[one.key] = "not encodable: the VAE gave a value that is not finite"
        return encoded


def _write_latents(folder: Path, encoder: str, latents: Sequence[tuple[str, Array]]) -> Shard:
    header = ShardHeader("LatentRow", encoder, {"latent": latents[0][1].shape})
    path = write_shard(folder, header, [latent_row(key, latent) for key, latent in latents])
    return Shard(path, [key for key, _ in latents])


def _batches(items: Iterable[ItemT], size: int) -> Iterator[list[ItemT]]:
    """Cut a stream into lists of `size`."""
    stream = iter(items)
    while batch := list(islice(stream, size)):
        yield batch


def text_shards(project: Project, checkpoint: Path, folder: Path, encoder: str, todo: Sequence[str]) -> Iterator[Shard]:
    """Encode prompts and write them shard by shard; each is whole once yielded."""
    family, settings = family_of(project), project.family.text_settings[project.flavour]
    encoders = family.load_text_encoders(
        checkpoint,
        torch.bfloat16,
        default_device(),
        precisions=text_precisions(project),
        offload=project.trainer.offload_during_startup,
    )
    check_unchanged(checkpoint, encoder, text_encoder_key(project, checkpoint))
    size = _batch_size(project.trainer.text_encoder_batch_size)
    rows: list[TextRow] = []
    truncated = 0
    for first in range(0, len(todo), size):
        prompts = todo[first : first + size]
        embeds = family.encode_prompts(encoders, prompts, settings)
        length = embeds.embed.shape[1]
        shapes = {"embed": tuple(embeds.embed.shape[1:])}
        if embeds.pooled is not None:
            shapes["pooled"] = tuple(embeds.pooled.shape[1:])
        for number, prompt in enumerate(prompts):
            pooled = _bits(embeds.pooled[number]) if embeds.pooled is not None else None
            embed, tokens = _bits(embeds.embed[number]), embeds.num_tokens[number]
            rows.append(text_row(text_key(encoder, prompt), prompt, embed, pooled, min(tokens, length)))
            truncated += tokens > length
        if sum(len(row.embed) for row in rows) >= SHARD_BYTES or first + size >= len(todo):
            path = write_shard(folder, ShardHeader("TextRow", encoder, shapes), rows)
            yield Shard(path, [row.key for row in rows], truncated)
            rows, truncated = [], 0


def _batch_size(wanted: int) -> int:
    """Return how many go in at once. On a CPU batches gain nothing, and neighbours would change a row's last bits."""
    return wanted if default_device().type != "cpu" else 1


def _bits(values: torch.Tensor) -> Array:
    """Return a tensor's bfloat16 bit patterns."""
    bits: Array = values.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint16).numpy()
    return bits
