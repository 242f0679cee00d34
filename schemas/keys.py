"""Every identity and every seed: one hash function, xxh3-128, over bytes or canonical JSON.

A new key is a function here that names its ingredients; change what goes in and `CACHE_VERSION` changes with it.
"""

import json
import json.encoder
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import xxhash

from schemas.storage import write_aside

# Part of every latent and text key: raise it when the same inputs would give other numbers.
CACHE_VERSION = 3

# How a file becomes pixels, besides its geometry; part of every latent key.
PIXEL_POLICY = "exif-oriented/icc-to-srgb/alpha-on-white/rgb8/vips-lanczos3"

_CHUNK = 1 << 20
_FRAMINGS = 1 << 16  # ways to frame and degrade an image that are spelled once


def content_id(data: bytes) -> str:
    """Identify bytes by their content: 32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(data)


def file_id(path: Path) -> str:
    """Identify a file by its bytes, read in pieces; raises OSError."""
    state = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_CHUNK):
            state.update(piece)
    return state.hexdigest()


def canonical(value: object) -> str:
    """Spell a value as JSON in the one way that is hashed: sorted keys, no spaces, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(*parts: object) -> str:
    """Identify JSON-like values by their content: 32 hexadecimal digits."""
    return content_id(canonical(parts).encode())


def seed_of(*parts: object) -> int:
    """Derive a seed of 63 bits from what a random draw may depend on: (seed, stage, row id, ...)."""
    return xxhash.xxh3_64_intdigest(canonical(parts).encode()) >> 1


def seeds_of(before: Sequence[object], names: Iterable[str], after: Sequence[object]) -> Iterator[int]:
    """Yield `seed_of(*before, name, *after)` for many names, at a fraction of the time."""
    for spelled in _spelled(before, names, after):
        yield xxhash.xxh3_64_intdigest(spelled) >> 1


def digests_of(before: Sequence[object], names: Iterable[str], after: Sequence[object]) -> Iterator[str]:
    """Yield `digest(*before, name, *after)` for many names, at a fraction of the time."""
    return map(content_id, _spelled(before, names, after))


def _spelled(before: Sequence[object], names: Iterable[str], after: Sequence[object]) -> Iterator[bytes]:
    """Yield the canonical spelling of (*before, name, *after) for many names."""
    head, tail = canonical(list(before))[:-1], f",{canonical(list(after))[1:]}" if after else "]"
    spelled = json.encoder.encode_basestring
    for name in names:
        yield f"{head},{spelled(name)}{tail}".encode()


def degrade_seed(prep_seed: int, image_id: str, recipe: str, draw: int) -> int:
    """Seed the draws of one degraded image: the first, or another of several variants."""
    return seed_of(prep_seed, "degrade", image_id, recipe, draw)


def degrade_seeds(prep_seed: int, image_ids: Iterable[str], recipe: str, draw: int) -> Iterator[int]:
    """Yield `degrade_seed` for many images."""
    return seeds_of((prep_seed, "degrade"), image_ids, (recipe, draw))


def latent_key(
    encoder: str, image_id: str, geometry: tuple[int, ...], view: str = "", recipe: str | None = None,
    seed: int | None = None,
) -> str:  # fmt: skip
    """Key a latent by all its numbers depend on: encoder, image bytes, how they are viewed, geometry, recipe, seed."""
    return digest("latent", CACHE_VERSION, encoder, image_id, PIXEL_POLICY, view, geometry, recipe, seed)


def latent_keys(
    encoder: str, images: Iterable[tuple[str, tuple[int, ...], str, str | None, int | None]]
) -> Iterator[str]:
    """Yield `latent_key` of many images (id, geometry, view, recipe, seed), at a fraction of the time."""
    head = canonical(["latent", CACHE_VERSION, encoder])[:-1]
    policy, hashed = canonical(PIXEL_POLICY), xxhash.xxh3_128_hexdigest

    @lru_cache(_FRAMINGS)
    def framed(geometry: tuple[int, ...], view: str, recipe: str | None) -> str:
        return f"{policy},{canonical(view)},{canonical(geometry)},{canonical(recipe)}"

    for image_id, geometry, view, recipe, seed in images:
        drawn = "null" if seed is None else seed
        yield hashed(f'{head},"{image_id}",{framed(geometry, view, recipe)},{drawn}]'.encode())


def text_key(encoder: str, prompt: str) -> str:
    """Key a text embed by its encoder (weights, tokenizer, length, dtype) and the prompt."""
    return digest("text", CACHE_VERSION, encoder, prompt)


def text_keys(encoder: str, prompts: Iterable[str]) -> Iterator[str]:
    """Yield `text_key` of many prompts, at a fraction of the time."""
    return digests_of(("text", CACHE_VERSION, encoder), prompts, ())


def pixels_key(image_id: str, geometry: tuple[int, ...], view: str, recipe: str, seed: int) -> str:
    """Key the pixels of one degraded image; one that is degraded at its own size has an empty geometry."""
    return digest("pixels", CACHE_VERSION, image_id, PIXEL_POLICY, view, geometry, recipe, seed)


class FileIds:
    """Content ids of large files, remembered by (path, size, mtime) in one small JSON file.

    `identify` reads a file and says what it is; each such function has a file of its own to remember in.
    """

    def __init__(self, memory: Path, identify: Callable[[Path], str] = file_id, *, remember: bool = True) -> None:
        self._memory, self._identify, self._remember = memory, identify, remember
        self._known = _read_memory(memory)

    def of(self, path: Path) -> str:
        """Return the file's content id, reading the file only if it changed since it was last asked for."""
        path = path.resolve()
        stat = path.stat()
        mark: list[object] = [stat.st_size, stat.st_mtime_ns]
        known = self._known.get(str(path))
        if known is not None and known[:2] == mark:
            return str(known[2])
        identity = self._identify(path)
        self._known[str(path)] = [*mark, identity]
        if self._remember:
            with write_aside(self._memory) as aside:
                aside.write_text(json.dumps(self._known, indent=1))
        return identity


def _read_memory(memory: Path) -> dict[str, list[object]]:
    """Read what is remembered; a damaged file is forgotten."""
    try:
        known = json.loads(memory.read_text())
    except (OSError, ValueError):
        return {}
    listed = known.items() if isinstance(known, dict) else ()
    return {path: entry for path, entry in listed if isinstance(entry, list) and len(entry) == 3}
