"""The encoders at work for `prep cache`: pixels from the pool to latent shards, prompts to text shards.

Apart from prep/cache.py because it loads a tensor library, which a run with nothing to encode does without.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from families.runtime import default_device, dtype_of, family_of, quiet
from prep.images import Pixels
from prep.pixels import Picture, Refusal, pixels_of
from prep.pool import Crash, each
from schemas.keys import text_key
from schemas.project import Project
from schemas.rows import LatentRow, RejectRow, TextRow
from schemas.shards import Array, ShardHeader, latent_row, text_row, write_rejects, write_shard

SHARD_BYTES = 64 << 20  # of payload


@dataclass(frozen=True, slots=True)
class Shard:
    """A shard that is on the disk."""

    path: Path
    keys: list[str]


class Images:
    """The image encoder at work: pixels come from the pool, latents leave as shards."""

    def __init__(self, project: Project, checkpoint: Path) -> None:
        quiet()
        self._family = family_of(project)
        self._encoder = self._family.load_image_encoder(
            checkpoint, dtype_of(project.trainer.vae_dtype), default_device()
        )
        self._batch_size = _batch_size(project.trainer.vae_batch_size)
        self.rejected: dict[str, str] = {}  # of the last store, by key
        self.unsettled: dict[str, str] = {}  # files that may work another time, and why they did not

    def shards(self, folder: Path, encoder: str, todo: Sequence[tuple[str, Picture]], workers: int) -> Iterator[Shard]:
        """Encode pictures, sorted by bucket, and write them shard by shard; each is whole once yielded."""
        self.rejected = {}
        waiting: list[tuple[str, Picture, Pixels]] = []
        rows: list[LatentRow] = []
        shape: tuple[int, ...] = ()

        def close() -> Iterator[Shard]:
            if rows:
                header = ShardHeader("LatentRow", encoder, {"latent": shape})
                path = write_shard(folder / bucket, header, rows)
                yield Shard(path, [row.key for row in rows])
                rows.clear()

        bucket = ""
        for (key, picture), pixels in self._pixels(todo, workers):
            if picture.geometry.bucket != bucket or len(waiting) == self._batch_size:
                shape = self._encode(waiting, rows) or shape
            if picture.geometry.bucket != bucket or sum(len(row.latent) for row in rows) >= SHARD_BYTES:
                yield from close()
            bucket = picture.geometry.bucket
            waiting.append((key, picture, pixels))
        shape = self._encode(waiting, rows) or shape
        yield from close()
        if self.rejected:
            write_rejects(folder, [RejectRow(key, reason) for key, reason in sorted(self.rejected.items())])

    def _pixels(
        self, todo: Sequence[tuple[str, Picture]], workers: int
    ) -> Iterator[tuple[tuple[str, Picture], Pixels]]:
        """Yield the pixels of each picture; note those that have none."""
        for (key, picture), (_, pixels) in zip(
            todo, each(pixels_of, [picture for _, picture in todo], workers), strict=True
        ):
            if isinstance(pixels, Crash):
                self.unsettled[str(picture.file)] = pixels.reason
            elif isinstance(pixels, Refusal):
                noted = self.rejected if pixels.lasting else self.unsettled
                noted[key if pixels.lasting else str(picture.file)] = pixels.reason
            else:
                yield (key, picture), pixels

    def _encode(self, waiting: list[tuple[str, Picture, Pixels]], rows: list[LatentRow]) -> tuple[int, ...] | None:
        """Encode a batch into rows; returns the shape of a latent."""
        if not waiting:
            return None
        pixels = torch.from_numpy(np.stack([one for _, _, one in waiting]))
        latents = self._family.encode_images(self._encoder, pixels)
        for (key, _, _), latent in zip(waiting, latents, strict=True):
            if torch.isfinite(latent).all():
                rows.append(latent_row(key, _bits(latent)))
            else:
                self.rejected[key] = "not encodable: the VAE gave a value that is not finite"
        waiting.clear()
        return tuple(latents.shape[1:])


def text_shards(project: Project, checkpoint: Path, folder: Path, encoder: str, todo: Sequence[str]) -> Iterator[Shard]:
    """Encode prompts and write them shard by shard; each is whole once yielded."""
    quiet()
    family, settings = family_of(project), project.family.text_settings[project.flavour]
    encoders = family.load_text_encoders(checkpoint, torch.bfloat16, default_device())
    size = _batch_size(project.trainer.text_encoder_batch_size)
    rows: list[TextRow] = []
    for first in range(0, len(todo), size):
        prompts = todo[first : first + size]
        embeds = family.encode_prompts(encoders, prompts, settings)
        shapes = {"embed": tuple(embeds.embed.shape[1:])}
        if embeds.pooled is not None:
            shapes["pooled"] = tuple(embeds.pooled.shape[1:])
        for number, prompt in enumerate(prompts):
            pooled = _bits(embeds.pooled[number]) if embeds.pooled is not None else None
            embed, tokens = _bits(embeds.embed[number]), embeds.num_tokens[number]
            rows.append(text_row(text_key(encoder, prompt), prompt, embed, pooled, tokens))
        if sum(len(row.embed) for row in rows) >= SHARD_BYTES or first + size >= len(todo):
            path = write_shard(folder, ShardHeader("TextRow", encoder, shapes), rows)
            yield Shard(path, [row.key for row in rows])
            rows.clear()


def _batch_size(wanted: int) -> int:
    """Return how many go in at once. On a CPU batches gain nothing, and neighbours would change a row's last bits."""
    return wanted if default_device().type != "cpu" else 1


def _bits(values: torch.Tensor) -> Array:
    """Return a tensor's bfloat16 bit patterns."""
    bits: Array = values.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint16).numpy()
    return bits
