"""What the trainer's loader delivers alone: samples a second, and how long steps wait for data at a given rate.

Run `python benchmarks/loader.py [--samples 10000] [--prompts 1000] [--pixels 1024] [--rate 11]`. It makes that many
pairs of one target and one reference, with T5 embeds of 512 tokens, as shards and a pair table; 10,000 samples of
1024 px take 10 GiB, 1,000 prompts 4 GiB. Then it reads them in training's own order, in batches of one. `--rate` is of
the steps that the second part pretends to take.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from families import open_project
from families.checkpoints import EncoderKeys
from families.runtime import default_device
from schemas.geometry import Geometry
from schemas.keys import text_key
from schemas.rows import PairRow, Reference
from schemas.shards import ShardHeader, latent_row, rows_of_shard, text_row, write_shard
from schemas.tables import Provenance, write_table
from train.data import Shelf
from train.loader import Loader
from train.order import Cursor, turns

KEYS = EncoderKeys("image-encoder", "image-encoder", "text-encoder")
TOKENS, WIDTH, POOLED = 512, 4096, 768
LOT = torch.randn(1 << 23, generator=torch.Generator().manual_seed(0)).bfloat16().view(torch.uint16).numpy()


def pair(number, pixels, prompts):
    """Make one row of the pair table."""
    geometry = Geometry(pixels, pixels, pixels, pixels, 0, 0)
    bucket, name = geometry.bucket, f"{number:06d}"
    reference = Reference(
        "references", f"reference {name}", f"{name}.png", None, None, None, bucket, geometry, "", [], *(None,) * 5
    )
    prompt = f"prompt {number % prompts}"
    target = (name, "targets", f"target {name}", f"{name}.png", 0, 1, geometry, "")
    return PairRow(*target, [reference], [prompt], prompt, bucket, 0, None)


def normal(rng, *shape):
    """Cut bit patterns of normal numbers out of a fixed lot, which is quicker than drawing them."""
    size = int(np.prod(shape))
    first = rng.integers(len(LOT) - size)
    return LOT[first : first + size].reshape(shape)


def project_of(folder, samples, prompts, pixels, checkpoint=None):
    """Write a project whose pairs and cache are there."""
    options = {"train_batch_size": 1, "pretrained_model_name_or_path": checkpoint and str(checkpoint)}
    (folder / "config.json").write_text(json.dumps(options))
    sets = [
        {"id": "targets", "instance_data_dir": "targets", "conditioning_data": ["references"]},
        {"id": "references", "instance_data_dir": "references", "conditioning_type": "reference_strict"},
    ]
    (folder / "multidatabackend.json").write_text(json.dumps(sets))
    project = open_project(folder)
    [target] = project.targets
    rows = [pair(number, pixels, prompts) for number in range(samples)]
    write_table(project.pair_table(target.id), rows, PairRow, Provenance(project.pairs_settings(target), "none"))
    rng = np.random.default_rng(0)

    side = pixels // 8
    header = ShardHeader("LatentRow", KEYS.target, {"latent": (16, side, side)})
    keys = [key for row in rows for key in (row.target_key(KEYS.target), row.references[0].key(KEYS.reference))]
    size = rows_of_shard(header.row_bytes)
    store = project.latent_store(target) / KEYS.target
    for first in range(0, len(keys), size):
        named = [(key, normal(rng, 16, side, side)) for key in keys[first : first + size]]
        write_shard(store / f"{pixels}x{pixels}", header, [latent_row(key, one) for key, one in named])

    header = ShardHeader("TextRow", KEYS.text, {"embed": (TOKENS, WIDTH), "pooled": (POOLED,)})
    said = ["", *(f"prompt {number}" for number in range(prompts))]
    store = project.text_store / KEYS.text
    for first in range(0, len(said), size := rows_of_shard(header.row_bytes)):
        some = said[first : first + size]
        named = [(text, normal(rng, TOKENS, WIDTH), normal(rng, POOLED)) for text in some]
        write_shard(store, header, [text_row(text_key(KEYS.text, text), text, *one, 77) for text, *one in named])
    return project


def delivered(project, shelf, device, samples, pause=0.0):
    """Take that many steps; return the seconds they took and the share that they waited for data."""
    with Loader(shelf, turns(project, shelf, Cursor()), device) as loader:
        steps = iter(loader)
        for batch in next(steps)[1]:  # an epoch is planned before the first
            assert batch.latents.shape[0] == 1
        loader.waited, begin = 0.0, time.perf_counter()
        for _ in range(samples - 1):
            for batch in next(steps)[1]:
                used = batch.latents.shape[-1]
            time.sleep(pause)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
    assert used
    return seconds, loader.waited / seconds


def main():
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--prompts", type=int, default=1_000)
    parser.add_argument("--pixels", type=int, default=1024)
    parser.add_argument("--rate", type=float, default=11.0, help="steps a second that the second part pretends to take")
    arguments = parser.parse_args()
    device = default_device()
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        project = project_of(Path(folder), arguments.samples, arguments.prompts, arguments.pixels)
        print(f"{arguments.samples} samples written in {time.perf_counter() - begin:.0f} s; reading to {device}")
        begin = time.perf_counter()
        shelf = Shelf(project, KEYS)
        print("| what | seconds | samples/s | waited for data |\n|---|---|---|---|")
        print(f"| opened: every key looked up | {time.perf_counter() - begin:.2f} | | |", flush=True)
        begin = time.perf_counter()
        next(turns(project, shelf, Cursor()))
        print(f"| an epoch planned | {time.perf_counter() - begin:.2f} | | |", flush=True)
        seconds, _ = delivered(project, shelf, device, arguments.samples)
        print(f"| as fast as it can, an epoch | {seconds:.1f} | {arguments.samples / seconds:.0f} | |", flush=True)
        count = min(arguments.samples, int(30 * arguments.rate))
        seconds, waited = delivered(project, shelf, device, count, 1 / arguments.rate)
        name = f"{arguments.rate:g} steps a second"
        print(f"| {name} | {seconds:.1f} | {count / seconds:.1f} | {waited:.2%} |", flush=True)


if __name__ == "__main__":
    main()
