"""What benchmarks/cache.py tries on text embeds: exact compression of their bytes, and float8.

Byte planes are compressed apart, for the low bytes of bfloat16 are noise and the high ones are not.
"""

import time

import numpy as np
import pyarrow as pa
import torch
from pairs import project
from rows import filled, header_of, row_of, tensors

from families import open_project
from families.checkpoints import locate
from families.protocol import Placement
from families.runtime import family_of
from schemas.shards import ShardIndex, write_shard


def gaussian_embeds():
    """Make embeds of the full size, of values drawn at random."""
    return torch.stack([tensors({"embed": (512, 4096)}, number)["embed"] for number in range(16)])


def tiny_embeds(folder):
    """Encode prompts with the tiny T5: real outputs of random weights."""
    photos = folder / "photos"
    photos.mkdir()
    opened = open_project(project(folder / "tiny", photos, None), need_images=False)
    family, settings = family_of(opened), opened.text_settings
    checkpoint = locate(opened, opened.family.text_encoders)
    encoders = family.load_text_encoders(checkpoint, torch.bfloat16, Placement(torch.device("cpu")), settings)
    prompts = [f"make photo {number} sharper, and keep its colours as they are" for number in range(64)]
    return family.encode_prompts(encoders, prompts, settings).embed.to(torch.bfloat16)


def plain_rate(place, values, repeats):
    """Return the rows per second that one thread reads, checked."""
    shapes = {"embed": tuple(values.shape[1:])}
    write_shard(place, header_of(shapes), [row_of(number, {"embed": one}) for number, one in enumerate(values)])
    return len(values) / min(filled(ShardIndex(place), shapes, 1, 1, turn) for turn in range(repeats))


def compressed(values, level, repeats):
    """Compress low and high bytes apart; return the share of the size, and the rows decompressed a second."""
    codec = pa.Codec("zstd", compression_level=level)
    planes = values.contiguous().view(torch.uint8).numpy().reshape(len(values), -1, 2)
    packed = [[codec.compress(plane[:, half].tobytes()) for half in (0, 1)] for plane in planes]
    out, size, taken = np.empty_like(planes[0]), planes.shape[1], []
    for _ in range(repeats):
        begun = time.perf_counter()
        for row, original in zip(packed, planes, strict=True):
            for half in (0, 1):
                out[:, half] = np.frombuffer(codec.decompress(row[half], decompressed_size=size), np.uint8)
            assert out[-1, 1] == original[-1, 1], "it is exact"
        taken.append(time.perf_counter() - begun)
    return sum(len(half) for row in packed for half in row) / planes.nbytes, len(values) / min(taken)


def float8(values):
    """Return the mean relative error of embeds kept as float8 (e4m3) with a scale each."""
    exact = values.float().flatten(1)
    scale = exact.abs().amax(1, keepdim=True) / 448
    lost = (exact / scale).to(torch.float8_e4m3fn).float() * scale - exact
    return float((lost.square().mean(1) / exact.square().mean(1)).sqrt().mean())
