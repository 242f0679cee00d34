"""A few latents of `prep cache --verify` decoded and held against the pixels they were made from.

Apart from prep/upkeep/verify.py because it loads a tensor library.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from families.checkpoints import key_of
from families.runtime import default_device, dtype_of, family_of, release_memory
from prep.images import Pixels
from prep.needed import needed_of
from prep.noted import descriptions
from prep.pixels import Refusal, pixels_of
from prep.upkeep.stores import reached_by
from schemas.errors import UserError
from schemas.project import Project
from schemas.shards import Array, ShardIndex
from schemas.summaries import DecodedRow

_MOST_PSNR = 100.0  # dB; equal pictures have no limit, JSON no infinity


def decode(project: Project, checkpoint: Path, count: int) -> Iterator[DecodedRow]:
    """Decode `count` latents that a project needs, the same ones each time; raises UserError if it has no pairs."""
    pictures, _ = reached_by(project, needed_of(project))
    indexes = [ShardIndex(one.store) for one in pictures]
    there = [
        (key, place, number)
        for place, one in enumerate(pictures)
        for number, key in enumerate(one.keys)
        if key in indexes[place]
    ]
    of = {key_of(said): said for said in (descriptions(project) or {}).values()}
    family, encoder = family_of(project), None
    for key, place, number in sorted(there)[:count]:
        picture, index = pictures[place].picture(number), indexes[place]
        made = pixels_of(picture)
        if isinstance(made, Refusal):
            yield DecodedRow(key, picture.name, index.store.where(), None, made.reason)
            continue
        if encoder is None:
            encoder = family.load_image_encoder(
                checkpoint,
                dtype_of(project.trainer.vae_dtype),
                default_device(),
                tiling=project.trainer.vae_enable_tiling,
                slicing=project.trainer.vae_enable_slicing,
            )
        try:
            latent = _tensor(index.read(key)["latent"], moments=of[pictures[place].encoder]["posterior"] == "moments")
        except UserError:
            yield DecodedRow(key, picture.name, index.store.where(), None, "its row is damaged")
            continue
        shown = family.decode_latents(encoder, latent[None])[0].cpu().numpy()
        yield DecodedRow(key, picture.name, index.store.where(), _psnr(made, shown), None)
    del encoder
    release_memory()


def _tensor(bits: Array, *, moments: bool) -> torch.Tensor:
    """Turn a row into a latent; of mean and deviation, the mean."""
    latent = torch.from_numpy(bits).view(torch.bfloat16)
    return latent[: latent.shape[0] // 2] if moments else latent


def _psnr(pixels: Pixels, shown: Pixels) -> float:
    """Return the peak signal-to-noise ratio of a picture of 8 bits in dB."""
    error = float(np.mean(np.square(pixels.astype(np.float64) - shown)))
    return min(_MOST_PSNR, 10 * math.log10(255**2 / error)) if error else _MOST_PSNR
