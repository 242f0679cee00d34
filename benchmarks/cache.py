"""Time prep cache and its stores: reading and writing rows, decoding ahead, opening and looking up a million rows.

`python benchmarks/cache.py` makes its data in a temporary folder (`--folder` says where), at most 10 GB at a time. What
is compared runs in turn, N times with `--repeats N`; the best counts. Rows are read in random order, as a training
loader would: checked, into buffers that are used again; the peer is `torch.utils.data.DataLoader` over a file per
sample. *Cold* means that no page of the files was in memory before, which is checked. `--photos FOLDER` decodes a
folder's JPEGs; without it, pictures of 2 megapixels are put together from the demo's photographs. `--only PART`
(repeatable) leaves out the other parts, `--quick` is a smoke test. Memory is the proportional share of all processes.
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from collections import deque
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas  # noqa: F401 - Arrow loads it with its first array, which would be timed
import pyarrow.parquet as pq
import torch
from measure import measured
from pairs import DEMO, linked, project, written_manifests
from PIL import Image
from rows import FORMATS, dropped, filled, header_of, key_of, loaded, loader, row_of, tensors, written
from smaller import compressed, float8, gaussian_embeds, plain_rate, tiny_embeds

import schemas.storage
from families import open_project
from families.checkpoints import image_encoder_keys, locate, text_encoder_key
from families.protocol import Posterior
from prep.cache import Here, cache
from prep.encode import Latents
from prep.launching import Flight, Launcher
from prep.needed import REFERENCES, TARGETS, needed_of
from prep.pairs import pairs
from prep.pixels import pixels_of
from prep.pool import Crew
from prep.units import Unit
from prep.writing import Part, Writer
from schemas.keys import text_keys
from schemas.rows import LatentRow, as_columns
from schemas.shards import ShardIndex, write_shard
from schemas.storage import sync
from schemas.stores import LocalStore

PARTS = ("reading", "text", "writing", "ahead", "opening", "again", "compressing")
LATENT = {"latent": (16, 128, 128)}
TEXTS = {"4 MB": {"embed": (512, 4096), "pooled": (768,)}, "15.7 MB": {"embed": (512, 15360)}}
SHARD_ROWS = 128  # of latents of 512 KiB


def main():
    """Time what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--latents", type=int, default=2000, help="rows of 512 KiB to read and to write")
    parser.add_argument("--text-mb", type=int, default=1024, help="payload of the text stores")
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of a store to open, pairs of a project")
    parser.add_argument("--pictures", type=int, default=1200, help="JPEGs to decode")
    parser.add_argument("--photos", type=Path, help="folder of JPEGs to decode instead")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", action="append", choices=PARTS, help="one part of the measurements")
    parser.add_argument("--quick", action="store_true", help="little of everything: does it run?")
    parser.add_argument("--folder", type=Path, help="where to make the data")
    options = parser.parse_args()
    if options.quick:
        options.latents, options.text_mb, options.rows, options.pictures, options.repeats = 200, 128, 2000, 40, 1
    parts = dict(zip(PARTS, (reading, text, writing, decoding, opening, again, compressing), strict=True))
    for part in options.only or PARTS:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            parts[part](Path(folder), options)


# The parts


def reading(folder, options):
    """Compare reading latents with DataLoaders."""
    against_loaders(folder, "latents of 512 KiB", LATENT, options.latents, 16, options.repeats)


def text(folder, options):
    """Compare reading text embeds with DataLoaders."""
    for name, shapes in TEXTS.items():
        count = (options.text_mb << 20) // header_of(shapes).row_bytes
        batch = max(1, (64 << 20) // header_of(shapes).row_bytes)
        against_loaders(folder / name, f"text embeds of {name}", shapes, count, batch, options.repeats)
        shutil.rmtree(folder / name)


def against_loaders(folder, label, shapes, count, batch, repeats):
    """Read the same rows from shards and, two workers at work, from a file each, warm and cold."""
    places = written(folder, shapes, count)
    index = ShardIndex(places["shards"])
    loaders = {suffix: loader(places[suffix], suffix, batch) for suffix in FORMATS}
    ways = {
        "ShardIndex.fill, 1 thread": ("shards", lambda turn: filled(index, shapes, batch, 1, turn)),
        "ShardIndex.fill, 2 threads": ("shards", lambda turn: filled(index, shapes, batch, 2, turn)),
        "DataLoader, .pt": (".pt", lambda _: loaded(loaders[".pt"])),
        "DataLoader, .safetensors": (".safetensors", lambda _: loaded(loaders[".safetensors"])),
    }
    for state in ("warm", "cold"):
        taken = {name: [] for name in ways}
        for turn in range(repeats):
            for name, (place, read) in ways.items():
                if state == "cold":
                    dropped(places[place])
                taken[name].append(read(turn))
        head(f"{count:,} {label}, batches of {batch}, {state}", "", "rows/s", "MiB/s", "of .pt", "of .safetensors")
        peers = [min(taken[f"DataLoader, {suffix}"]) for suffix in FORMATS]
        for name, runs in taken.items():
            rate = count / min(runs)
            line(name, rate, rate * index.header_of(key_of(0)).row_bytes / 2**20, *(one / min(runs) for one in peers))


def writing(folder, options):
    """Compare writing latents, each file flushed to the disk, with other ways to keep them."""
    samples = [tensors(LATENT, number) for number in range(options.latents)]
    size = sum(one.nbytes for sample in samples for one in sample.values()) / 1e6
    taken = {name: [] for name in WAYS}
    for _ in range(options.repeats):
        for name, write in WAYS.items():
            place = folder / "written"
            place.mkdir()
            os.sync()  # what the last way left to be done is not this one's
            begun = time.perf_counter()
            write(place, samples)
            taken[name].append(time.perf_counter() - begun)
            shutil.rmtree(place)
    head(f"{options.latents:,} latents of 512 KiB written and flushed", "", "MB/s", "of plain files")
    for name, runs in taken.items():
        line(name, size / min(runs), min(taken["plain files of 64 MiB"]) / min(runs))


def decoding(folder, options):
    """Compare prep cache with an encoder that costs nothing with the pool alone."""
    photos = folder / "photos"
    if options.photos is None:
        mosaics(photos, options.pictures)
    else:
        linked(options.photos.resolve(), photos, options.pictures)
    place = project(folder / "project", photos, None, scanned=options.workers)
    pairs(place, workers=1)
    torch.set_num_threads(1)  # an encoder on an accelerator has no threads that spin beside the pool
    opened, taken = open_project(place), {"the pool alone": [], "prep cache, encoder free": []}
    for _ in range(options.repeats):
        taken["the pool alone"].append(pool_alone(opened, options.workers))
        taken["prep cache, encoder free"].append(stored(opened, options.workers))
    count = len(list(photos.iterdir()))
    head(f"{count:,} JPEGs to 1024 px, {options.workers} workers", "", "images/s", "of the pool alone")
    for name, runs in taken.items():
        line(name, count / min(runs), min(taken["the pool alone"]) / min(runs))


def opening(folder, options):
    """Open a store of many rows, their payload next to nothing."""
    keys = [key_of(number) for number in range(options.rows)]
    random.Random(0).shuffle(keys)
    many_rows(folder, "1024x1024", keys, {"latent": (16, 1, 1)})
    head(f"a store of {options.rows:,} rows, {SHARD_ROWS} to a shard", "", "s", "MiB")
    for label in ("opened", "again"):
        done = run("opened", folder)
        assert done["rows"] == options.rows, "every row was found"
        line(label, done["work"], done["peak_mib"])


def again(folder, options):
    """Run prep cache where nothing is left to do."""
    written_manifests(folder, options.rows)
    pairs(folder, misaligned="ignore")
    rows = complete(folder)
    head(f"prep cache, nothing to do: {options.rows:,} pairs, {rows:,} rows", "", "s", "MiB")
    for label in ("run", "again"):
        done = run("cached", folder)
        assert (done["encoded"], done["reused"]) == (0, rows), f"nothing was left to do, but {done}"
        line(label, done["work"], done["peak_mib"])


def compressing(folder, options):
    """Say what exact compression and float8 would do to text embeds."""
    head("text embeds, bfloat16", "", "zstd level", "size", "rows/s", "of reading plain", "float8: relative error")
    for name, values in {"gaussian": gaussian_embeds(), "tiny T5": tiny_embeds(folder)}.items():
        plain = plain_rate(folder / name, values, options.repeats)
        for level in (1, 3):
            share, rate = compressed(values, level, options.repeats)
            line(f"{name}, {values.shape[1]} × {values.shape[2]}", level, share, rate, rate / plain, float8(values))


# How latents are written


def as_shards(place, samples):
    """Write shards, their rows made from arrays."""
    for first in range(0, len(samples), SHARD_ROWS):
        rows = [row_of(first + number, one) for number, one in enumerate(samples[first : first + SHARD_ROWS])]
        write_shard(place, header_of(LATENT), rows)


def as_units(place, samples):
    """Write as prep cache does with a fast encoder: a unit at once, in a thread of its own."""
    writer = Writer()
    for first in range(0, len(samples), SHARD_ROWS):
        unit = Unit(str(first), LocalStore(place), "encoder", "", (), (), SHARD_ROWS)
        for number, sample in enumerate(samples[first : first + SHARD_ROWS], first):
            writer.put(unit, header_of(LATENT), [row_of(number, sample)])
        writer.finish(unit, {}, {})
    writer.close()


def as_plain(place, samples):
    """Write nothing but the bytes."""
    for first in range(0, len(samples), SHARD_ROWS):
        path = place / str(first)
        with path.open("wb") as file:
            for sample in samples[first : first + SHARD_ROWS]:
                file.write(sample["latent"].view(torch.uint8).numpy().data)
        sync(path)


def as_parquet(place, samples):
    """Write Parquet as it is commonly written."""
    for first in range(0, len(samples), SHARD_ROWS):
        path = place / f"{first}.parquet"
        rows = [row_of(first + number, one) for number, one in enumerate(samples[first : first + SHARD_ROWS])]
        pq.write_table(as_columns(rows, LatentRow), path, compression="zstd")
        sync(path)


def as_files(suffix):
    """Return a function that writes a file per sample."""

    def write(place, samples):
        for number, sample in enumerate(samples):
            path = place / f"{number:06d}{suffix}"
            FORMATS[suffix][0](sample, path)
            sync(path)

    return write


WAYS = {
    "plain files of 64 MiB": as_plain,
    "shards": as_shards,
    "shards as prep cache writes them": as_units,
    "a .pt each": as_files(".pt"),
    "a .safetensors each": as_files(".safetensors"),
    "Parquet with zstd": as_parquet,
}


# Decoding ahead


class NoEncoder(Launcher):
    """Latents of the right size at no cost."""

    def __init__(self):
        super().__init__(None, None, torch.device("cpu"), None)
        self._made = {}

    def launch(self, pixels, size, alike):
        """Return what was made before for pictures of this size."""
        height, width = (one // 8 for one in pixels[0].shape[:2])
        if (height, width) not in self._made:
            self._made[height, width] = torch.randn(1, 16, height, width).to(torch.bfloat16)
        made = self._made[height, width].expand(len(pixels), -1, -1, -1)
        return Flight(Posterior(made, made), len(pixels), None, None, None)


class Free(Latents):
    """An image encoder that costs nothing: latents of the right size, always the same."""

    def __init__(self, project, checkpoint):
        targets, references = image_encoder_keys(project, checkpoint)
        self._checkpoint, self._choices = checkpoint, {references: "mode", targets: "mode"}
        self._size, self._writer = 1, Writer()
        self._launcher, self._under_way = NoEncoder(), deque()

    def close(self):
        """Write what is left."""
        self._writer.close()


class Costless(Here):
    """The pool at work for the free encoder; prompts are left out, and only pictures are timed."""

    seconds = 0.0

    def latents(self, checkpoint, units):
        """Encode pictures, and time it."""
        begun = time.perf_counter()
        yield from super().latents(checkpoint, units)
        self.seconds += time.perf_counter() - begun

    def texts(self, checkpoint, units):
        """Take prompts for done."""
        for unit in units:
            yield Part(unit.name, last=True)

    def _loaded(self, kind, checkpoint):
        self._encoder = self._encoder or Free(self._project, checkpoint)
        return self._encoder


def pool_alone(opened, workers):
    """Make every picture and drop it; return the seconds."""
    [pictures] = needed_of(opened).pictures(opened, {TARGETS: "encoder", REFERENCES: "encoder"})
    listed = [pictures.picture(number) for number in range(len(pictures))]
    begun = time.perf_counter()
    with Crew(workers, pixels_of) as crew:
        for _, pixels in crew.each(pixels_of, listed):
            assert isinstance(pixels, np.ndarray), pixels
        return time.perf_counter() - begun


def stored(opened, workers):
    """Run prep cache into an empty store; return the seconds of its pictures."""
    shutil.rmtree(opened.latent_store(opened.datasets[0]).folder, ignore_errors=True)
    engine = Costless(opened, workers)
    done = cache(opened, engine=engine)
    assert done.stores[0].encoded == done.stores[0].needed, "every picture was stored"
    return engine.seconds


def mosaics(place, count):
    """Make JPEGs of 2 megapixels from photographs of the demo, each of its own content."""
    place.mkdir()
    photos = []
    for path in sorted(DEMO.glob("*.jpg")):
        with Image.open(path) as image:
            photos.append(image.convert("RGB").resize((408, 408), Image.Resampling.LANCZOS))
    draw = random.Random(0)
    for number in range(count):
        whole = Image.new("RGB", (1632, 1224) if number % 3 else (1224, 1632))
        for left in range(0, whole.width, 408):
            for top in range(0, whole.height, 408):
                whole.paste(draw.choice(photos), (left, top))
        whole.save(place / f"{number:06d}.jpg", quality=90)


# A million rows


def complete(folder):
    """Write all rows that a project needs, their payload next to nothing; return how many."""
    opened = open_project(folder, need_images=False)
    needed, images, rows = needed_of(opened), opened.family.image_encoder, 0
    key, _ = image_encoder_keys(opened, locate(opened, images))
    for pictures in needed.pictures(opened, {TARGETS: key, REFERENCES: key}):
        sides, which = pictures.sizes()
        for number, (width, height) in enumerate(sides):
            keys = sorted(pictures.keys[own] for own in np.flatnonzero(which == number))
            many_rows(pictures.store.folder, f"{width}x{height}", keys, {"latent": (16, 1, 1)})
        rows += len(pictures)
    key = text_encoder_key(opened, locate(opened, opened.family.text_encoders))
    keys = sorted(text_keys(key, needed.prompts))
    many_rows((opened.text_store / key).folder, "", keys, {"embed": (1, 16), "pooled": (16,)})
    return rows + len(keys)


def run(job, folder):
    """Run a job of benchmarks/asked.py; return what it says, and its peak memory."""
    return measured([sys.executable, str(Path(__file__).with_name("asked.py")), job, str(folder)])


def many_rows(folder, bucket, keys, shapes):
    """Write shards of rows that are all alike but for their keys; they need not survive a loss of power."""
    schemas.storage.sync = schemas.storage.sweep = lambda *_: None
    place, header = LocalStore(folder / bucket), header_of(shapes)
    row = row_of(0, tensors(shapes, 0))
    for first in range(0, len(keys), SHARD_ROWS):
        write_shard(place, header, [replace(row, key=key) for key in keys[first : first + SHARD_ROWS]])


# What is said


def head(title, *columns):
    """Print what a table is of, and its first row."""
    print(f"\n{title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)


def line(label, *numbers):
    """Print one row of a table."""
    cells = [f"{one:,.0f}" if one >= 100 or isinstance(one, int) else f"{one:.3g}" for one in numbers]
    print(f"| {label} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
