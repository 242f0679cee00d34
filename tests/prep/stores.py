"""Stores for the tests of upkeep: small shards written by hand, and what lies in a folder."""

import random
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from schemas.keys import digest
from schemas.shards import ShardHeader, latent_row, text_row, write_shard

ENCODER = "0123456789abcdef"
LATENTS, TEXT = f"latents/{ENCODER}", f"text/{ENCODER}"
HEADER = ShardHeader("LatentRow", ENCODER, {"latent": (2, 3, 4)})
TEXTS = ShardHeader("TextRow", ENCODER, {"embed": (3, 4), "pooled": (5,)})


def keys_of(count: int) -> list[str]:
    return [digest(number) for number in range(count)]


def values_of(key: str, shape: Sequence[int]) -> np.ndarray:
    return np.random.default_rng(int(key[:8], 16)).integers(0, 0x7F00, shape, np.uint16)


def latents(keys: Iterable[str]) -> list:
    return [latent_row(key, values_of(key, (2, 3, 4))) for key in keys]


def texts(keys: Iterable[str]) -> list:
    return [text_row(key, f"prompt {key}", values_of(key, (3, 4)), values_of(key, (5,)), 3) for key in keys]


def scatter(root: Path, seed: int, count: int = 60) -> None:
    """Write latents and texts in an order and in shards that follow from a seed."""
    drawn = random.Random(seed)
    for folder, header, make in ((root / LATENTS / "32x24", HEADER, latents), (root / TEXT, TEXTS, texts)):
        keys = keys_of(count)
        drawn.shuffle(keys)
        while keys:
            size = drawn.randint(1, 9)
            write_shard(folder, header, make(keys[:size]))
            keys = keys[size:]


def files(folder: Path) -> dict[str, bytes]:
    """Return all Parquet files below a folder, by name."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.parquet"))}


def payloads(folder: Path) -> dict[tuple[str, str], bytes]:
    """Return every payload below a folder, by kind and key."""
    found = {}
    for path in sorted(folder.rglob("*.parquet")):
        if path.parent.name != "rejects":
            for row in pq.read_table(path).to_pylist():
                kind = "latent" if "latent" in row else "text"
                found[kind, row["key"]] = row["latent"] if kind == "latent" else row["embed"] + (row["pooled"] or b"")
    return found
