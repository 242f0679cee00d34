"""What benchmarks/cache.py reads: the same rows as shards and as a file per sample, in memory or only on the disk.

Another peer is a format in `FORMATS`: how a sample is saved, and how it is loaded.
"""

import ctypes
import mmap
import os
import random
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, Dataset

from schemas.shards import SHARD_BYTES, ShardHeader, latent_row, text_row, write_shard

FORMATS = {".pt": (torch.save, torch.load), ".safetensors": (save_file, load_file)}


def header_of(shapes):
    """Return the header of rows with these columns."""
    return ShardHeader("LatentRow" if "latent" in shapes else "TextRow", "encoder", shapes)


def tensors(shapes, number):
    """Make one sample: values like those of an encoder, of its number alone."""
    generator = torch.Generator().manual_seed(number)
    return {name: torch.randn(shape, generator=generator).to(torch.bfloat16) for name, shape in shapes.items()}


def key_of(number):
    """Return the key of a sample, as long as real ones."""
    return f"{number:032x}"


def row_of(number, sample):
    """Make the row of a sample."""
    arrays = {name: values.view(torch.uint16).numpy() for name, values in sample.items()}
    if "latent" in arrays:
        return latent_row(key_of(number), arrays["latent"])
    return text_row(key_of(number), f"prompt {number}", arrays["embed"], arrays.get("pooled"), 77)


def written(folder, shapes, count):
    """Write samples as shards and as a file each; return the folders, by format."""
    places = {name: folder / name.strip(".") for name in ("shards", *FORMATS)}
    for place in places.values():
        place.mkdir(parents=True)
    header = header_of(shapes)
    size = SHARD_BYTES // header.row_bytes
    for first in range(0, count, size):
        samples = {number: tensors(shapes, number) for number in range(first, min(first + size, count))}
        write_shard(places["shards"], header, [row_of(*one) for one in samples.items()])
        for suffix, (save, _) in FORMATS.items():
            for number, sample in samples.items():
                save(sample, places[suffix] / f"{number:06d}{suffix}")
    os.sync()  # what is not on the disk yet cannot be dropped from memory
    return places


# Reading


class Files(Dataset):
    """A file per sample."""

    def __init__(self, folder, suffix):
        self._paths = sorted(folder.iterdir())
        self._load = FORMATS[suffix][1]

    def __len__(self):
        return len(self._paths)

    def __getitem__(self, number):
        return self._load(self._paths[number])


def loader(folder, suffix, batch):
    """Return a DataLoader with two workers that are started and ready."""
    made = DataLoader(Files(folder, suffix), batch, shuffle=True, num_workers=2, persistent_workers=True)
    for _ in made:
        pass
    return made


def loaded(made):
    """Go through a DataLoader once; return the seconds."""
    begun, rows = time.perf_counter(), 0
    for batch in made:
        rows += len(next(iter(batch.values())))
    assert rows == len(made.dataset), "every sample was read"
    return time.perf_counter() - begun


def filled(index, shapes, batch, threads, seed):
    """Go through an index once, in random order; return the seconds."""
    keys = [key_of(number) for number in range(len(index))]
    random.Random(seed).shuffle(keys)
    batches = [keys[first : first + batch] for first in range(0, len(keys), batch)]
    buffers = [{name: torch.empty((batch, *shape), dtype=torch.bfloat16) for name, shape in shapes.items()}
               for _ in range(threads + 1)]  # fmt: skip
    for one in buffers:
        for values in one.values():
            values.zero_()  # so that it has its memory
    begun, rows = time.perf_counter(), 0
    for one in ahead(index, batches, buffers):
        rows += len(next(iter(one.values())))
    assert rows == len(index), "every sample was read"
    return time.perf_counter() - begun


def ahead(index, batches, buffers):
    """Yield batches of tensors, read ahead by threads, one fewer than there are buffers to read into in turn.

    A batch is valid until the next one is asked for. The tensors may be of pinned memory.
    """
    flying = deque()
    with ThreadPoolExecutor(len(buffers) - 1) as pool:
        for number, keys in enumerate(batches):
            if len(flying) == len(buffers) - 1:
                yield flying.popleft().result()
            own = {name: values[: len(keys)] for name, values in buffers[number % len(buffers)].items()}
            flying.append(pool.submit(_filled, index, keys, own))
        while flying:
            yield flying.popleft().result()


def _filled(index, keys, own):
    index.fill(keys, {name: values.view(torch.uint16).numpy() for name, values in own.items()})
    return own


# What is in memory


def dropped(folder):
    """Drop a folder's files from memory; stop if they stay."""
    for path in folder.iterdir():
        handle = os.open(path, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)
    share = resident(folder)
    if share > 0.01:
        raise SystemExit(f"{share:.0%} of {folder} stay in memory: what is cold cannot be timed here")


def resident(folder):
    """Return how much of a folder's files is in memory, as a share."""
    here = pages = 0
    libc = ctypes.CDLL(None, use_errno=True)
    for path in folder.iterdir():
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
            count = -(-len(mapped) // mmap.PAGESIZE)
            vector, start = (ctypes.c_ubyte * count)(), ctypes.c_char.from_buffer(mapped)
            if libc.mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(len(mapped)), vector):
                raise OSError(ctypes.get_errno(), "mincore")
            here, pages = here + sum(one & 1 for one in vector), pages + count
            del start  # or the map could not be closed
    return here / pages
