"""Small projects of drawn pictures for the tests of pairs: written, scanned, paired, read back."""

import json

import numpy as np
from PIL import Image

from prep.pairs import pairs
from prep.scan import scan
from schemas.rows import PairRow
from schemas.tables import read_table

EDITS = {"id": "edits", "instance_data_dir": "edits", "on_unpaired": "drop", "identical_references": "keep"}
REFS = {
    "id": "refs",
    "dataset_type": "conditioning",
    "instance_data_dir": "refs",
    "conditioning_type": "reference_strict",
}
PAIRED = ({**EDITS, "conditioning_data": "refs"}, REFS)
BLUR = {"type": "superresolution", "blur_radius": 3.0, "noise_level": 0.02, "storage": "files"}
JPEG = {"type": "jpeg_artifacts", "quality_mode": "range", "quality_range": [10, 30], "storage": "files"}


def project(folder, *datasets, **config):
    """Write a project's files, and the folders its sets name."""
    folder.mkdir(parents=True, exist_ok=True)
    for entry in datasets:
        (folder / entry["instance_data_dir"]).mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"resolution": 64, "aspect_bucket_alignment": 16, **config}))
    (folder / "multidatabackend.json").write_text(json.dumps(datasets))
    return folder


def draw(path, width=96, height=64, seed=0):
    """Draw a small picture of its own, smooth enough to show a blur."""
    path.parent.mkdir(parents=True, exist_ok=True)
    down, across = np.mgrid[0:height, 0:width]
    pixels = np.stack([down * 2 + seed, across * 2, (across // 8 + down // 8) % 2 * 200], 2).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def paired(folder, **options):
    """Scan and pair; return the summary of the first set of targets and its rows by path."""
    scan(folder, workers=1)
    [summary, *_] = pairs(folder, workers=1, **options).datasets
    return summary, rows_of(folder)


def rows_of(folder, dataset="edits"):
    return {row.target_path: row for row in read_table(folder / "work" / "pairs" / f"{dataset}.parquet", PairRow)}


def products(folder):
    """Return every file below the workspace with what would show that it was written again."""
    files = [path for path in (folder / "work").rglob("*") if path.is_file()]
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}
