"""Time prep pairs: degrading at native and at target size, memory by number of images, matching, alignment, a peer.

`python benchmarks/pairs.py --photos FOLDER` links the folder's JPEGs into a temporary folder; without it, the demo's
photographs are used. Every measurement is a process of its own; memory is the proportional share of all processes
together. Times are those of the work, without importing Python modules, but with starting workers. `--peer "PYTHON
SCRIPT"` (repeatable) runs a peer's generator too, as `SCRIPT FOLDER TYPE`, TYPE superresolution or jpeg_artifacts; the
script prints one JSON line with `images_per_s`, `peak_rss_mib`, `images`, `failed` and `version`.
With `--repeats N`, all that are compared run N times in turn: the best time and the highest memory count. Pages are
warm: what is timed was read before. `--only PART` (repeatable) leaves out the other parts, `--quick` is a smoke test.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas  # noqa: F401 - Arrow loads it with its first array, which would be timed
import pyarrow as pa
from full_size import degraded
from measure import measured
from PIL import Image

from families import open_project
from prep.pairs import pairs
from prep.pixels import Refusal, pixels_of, reference_picture, target_picture
from prep.pool import Crash, each
from prep.scan import scan
from schemas.freshness import read_pairs
from schemas.rows import ImageRow, arrow_schema
from schemas.tables import Provenance, write_table

DEMO = Path(__file__).parent.parent / "datasets_demo" / "photos"
PARTS = ("native", "target", "flat", "matching", "alignment")
RECIPES = {
    "superresolution": {"type": "superresolution", "blur_radius": 3, "blur_type": "gaussian", "noise_level": 0.02},
    "jpeg_artifacts": {
        "type": "jpeg_artifacts",
        "quality_mode": "range",
        "quality_range": [10, 30],
        "compression_rounds": 2,
    },
    "realesrgan-like": {"type": "chain", "preset": "realesrgan-like"},
}
AT_SOURCE = {"degrade_at": "source"}


def main():
    """Time what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, default=DEMO, help="folder of JPEGs")
    parser.add_argument("--rows", type=int, default=1_000_000, help="targets to match with as many references")
    parser.add_argument("--many", type=int, default=10_000, help="images whose memory is compared with a tenth's")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1, help="runs of what is compared with a peer")
    parser.add_argument(
        "--peer", action="append", default=[], help="command that degrades a folder, prints a JSON line"
    )
    parser.add_argument("--only", action="append", choices=PARTS, help="one part of the measurements")
    parser.add_argument("--quick", action="store_true", help="little of everything: does it run?")
    parser.add_argument("--folder", type=Path, help="where to make the projects")
    parser.add_argument("--job", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job is not None:
        name, arguments = options.job
        print(json.dumps(JOBS[name](*json.loads(arguments))))
        return
    if options.quick:
        options.rows, options.many = 20_000, 500
    parts = {"native": native, "target": at_target, "flat": flat, "matching": matching, "alignment": alignment}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        photos = linked(options.photos.resolve(), Path(folder) / "photos", 24 if options.quick else None)
        for part in options.only or PARTS:
            (Path(folder) / part).mkdir()
            parts[part](Path(folder) / part, photos, options)


# The parts


def native(folder, photos, options):
    """Compare degrading at native size, to files and on demand, with the peers."""
    for name in ("superresolution", "jpeg_artifacts"):
        entry = RECIPES[name] | AT_SOURCE
        files = project(folder / f"{name}-files", photos, entry | {"storage": "files"}, scanned=options.workers)
        asked = project(folder / f"{name}-ondemand", photos, entry, scanned=options.workers)
        pairs(asked, workers=1)
        stored, made, said = [], [], {peer: [] for peer in options.peer}
        for _ in range(options.repeats):  # in turn, for the machine is not alone
            shutil.rmtree(files / "work" / "references", ignore_errors=True)
            shutil.rmtree(files / "work" / "pairs", ignore_errors=True)
            stored.append(run("paired", files, options.workers))
            check_all_made(stored[-1])
            made.append(run("made", asked, options.workers, "native"))
            for peer in options.peer:
                said[peer].append(peers_word(peer, photos, name))
        title(f"{name}, native size, {options.workers} workers", photos)
        kept = [path for path in (files / "work" / "references").rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in kept) / 2**20
        kinds = ", ".join(sorted({path.suffix for path in kept}))
        ours = [best(stored, "generated"), best(made, "count")]
        told("prep pairs, files", *ours[0], f"{size:,.0f} MiB of {kinds}")
        told("on demand", *ours[1])
        for runs in said.values():
            rate, peak = max(one["images_per_s"] for one in runs), max(one["peak_rss_mib"] for one in runs)
            failed = f", {runs[0]['failed']} failed" if runs[0]["failed"] else ""
            ratios = " and ".join(f"{one[0] / rate:.1f}" for one in ours)
            lighter = " and ".join(f"{peak / one[1]:.1f}" for one in ours)
            told(f"peer {runs[0]['version']}", rate, peak, f"pairline is {ratios} times as fast, takes {lighter} times "
                 f"less memory{failed}")  # fmt: skip


def at_target(folder, photos, options):
    """Time degrading at target size on demand, the arrays handed to this process as prep cache gets them."""
    title(f"1024 px, on demand, {options.workers} workers, arrays delivered", photos)
    entries = RECIPES | {"realesrgan-like, native": RECIPES["realesrgan-like"] | AT_SOURCE}
    for name, entry in entries.items():
        place = project(folder / name.replace(", ", "-"), photos, entry, scanned=options.workers)
        pairs(place, workers=1)
        if name == "superresolution":
            told("not degraded", *best([run("made", place, options.workers, "targets")], "count"))
        told(name, *best([run("made", place, options.workers, "delivered")], "count"))


def flat(folder, _, options):
    """Compare the memory of prep pairs for many images with that for a tenth of them."""
    print(f"\nsmall images, superresolution at target size to files, {options.workers} workers", flush=True)
    for count in (options.many // 10, options.many):
        photos = small(folder / f"photos-{count}", count)
        entry = RECIPES["superresolution"] | {"storage": "files"}
        place = project(folder / str(count), photos, entry, scanned=options.workers, resolution=128)
        done = run("paired", place, options.workers)
        check_all_made(done)
        told(f"{count:,} images", *best([done], "generated"))


def matching(folder, _, options):
    """Time strict matching of rows that no files lie behind."""
    print(f"\n{options.rows:,} targets, as many strict references, not compared", flush=True)
    written_manifests(folder, options.rows)
    for label in ("first", "again, unchanged"):
        done = run("paired", folder, options.workers, "ignore")
        assert done["pairs"] == options.rows and done["written"] == (label == "first")
        told(label, options.rows / done["work"], done["peak_mib"], f"{done['work']:.1f} s", "rows/s")
    table = folder / "work" / "pairs" / "edits.parquet"
    print(f"pair table {table.stat().st_size / 2**20:.1f} MiB")


def alignment(folder, photos, options):
    """Time the comparison of strict references with their targets, and that it is remembered."""
    references = folder / "references"
    references.mkdir()
    for path in sorted(photos.iterdir()):
        with Image.open(path) as image:
            image.save(references / path.name, quality=75, exif=image.info.get("exif", b""))
    place = project(folder / "project", photos, None, references=references, scanned=options.workers)
    title(f"alignment check, {options.workers} workers", photos)
    count = len(list(photos.iterdir()))
    for label, looked in (("first", count), ("again, remembered", 0)):
        done = run("paired", place, options.workers)
        assert done["compared"] == looked, f"{done['compared']} pairs were compared, not {looked}"
        accused = f"{done['misaligned']} look misaligned"
        told(label, count / done["work"], done["peak_mib"], f"{done['work']:.2f} s, {accused}", "pairs/s")


# What is timed, each in a process of its own


def paired(folder, workers, misaligned=None):
    """Run prep pairs."""
    opened = open_project(folder)
    begun = time.perf_counter()
    [done] = pairs(opened, workers=workers, misaligned=misaligned).datasets
    work = time.perf_counter() - begun
    numbers = ("targets", "pairs", "generated", "compared", "misaligned", "written")
    return {name: getattr(done, name) for name in numbers} | {"work": work}


def made(folder, workers, what):
    """Make every picture on the pool: `targets`, or references, `delivered` or only made at `native` size."""
    opened = open_project(folder)
    rows = read_pairs(opened, opened.targets[0])
    if what == "targets":
        pictures = [target_picture(opened, row) for row in rows]
    else:
        pictures = [reference_picture(opened, row, row.references[0]) for row in rows]
    begun, count = time.perf_counter(), 0
    for picture, result in each(degraded if what == "native" else pixels_of, pictures, workers):
        if isinstance(result, (Refusal, Crash)):
            raise SystemExit(f"{picture.name}: {result.reason}")
        count += 1
    return {"work": time.perf_counter() - begun, "count": count}


JOBS = {"paired": paired, "made": made}


def run(job, *arguments):
    """Run one of `JOBS` in a process of its own; return what it says, and its peak memory."""
    return measured([sys.executable, __file__, "--job", job, json.dumps(arguments, default=str)])


def peers_word(peer, photos, name):
    """Run a peer's generator; return what it says of itself."""
    answer = subprocess.run([*shlex.split(peer), str(photos), name], capture_output=True, text=True)
    if answer.returncode:
        raise SystemExit(f"{peer} failed:\n{answer.stderr[-4000:]}")
    return json.loads(answer.stdout.splitlines()[-1])


# What it is timed on


def linked(folder, place, limit):
    """Link a folder's JPEGs into another, and read them, so that they are in memory."""
    place.mkdir()
    images = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))[:limit]
    for number, image in enumerate(images):
        link = place / f"{number:06d}.jpg"
        try:
            os.link(image, link)
        except OSError:  # another disk
            shutil.copyfile(image, link)
        link.read_bytes()
    return place


def small(place, count):
    """Make small images, each of its own bytes: a comment tells them apart."""
    place.mkdir()
    originals = []
    for path in sorted(DEMO.glob("*.jpg"))[:60]:
        with Image.open(path) as image:
            image.thumbnail((320, 320))
            reduced = place / "reduced.jpg"
            image.save(reduced, quality=90)
        originals.append(reduced.read_bytes())
    reduced.unlink()
    for number in range(count):
        folder = place / f"{number // 1000:05d}"
        if number % 1000 == 0:
            folder.mkdir()
        image, comment = originals[number % len(originals)], b"%08d" % number
        marked = image[:2] + b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment + image[2:]
        (folder / f"{number:07d}.jpg").write_bytes(marked)
    return place


def project(folder, photos, generator, *, scanned=0, references=None, resolution=1024):
    """Write a project of one set of photographs, with a generator or a set of references, and scan it."""
    folder.mkdir(parents=True, exist_ok=True)
    edits = {"id": "edits", "instance_data_dir": str(photos), "caption_strategy": "filename", "resolution": resolution}
    sets = [edits]
    if generator is not None:
        edits["conditioning"] = [generator]
    if references is not None:
        edits["conditioning_data"] = "references"
        linked_set = {"id": "references", "dataset_type": "conditioning", "conditioning_type": "reference_strict"}
        sets.append(linked_set | {"instance_data_dir": str(references), "resolution": resolution})
    (folder / "config.json").write_text('{"pretrained_model_name_or_path": "tiny"}')
    (folder / "multidatabackend.json").write_text(json.dumps(sets))
    if scanned:
        scan(folder, workers=scanned)
    return folder


def written_manifests(folder, count):
    """Write the manifests of a set of targets and of a set of strict references, from columns: there are no files."""
    photos, references = folder / "photos", folder / "references"
    for place in (photos, references):
        place.mkdir()
    opened = open_project(project(folder, photos, None, references=references))
    for number, dataset in enumerate(opened.scanned):
        columns = _columns(number, dataset.id, count)
        schema = arrow_schema(ImageRow)
        table = pa.table([columns.get(field.name, pa.nulls(count, field.type)).cast(field.type) for field in schema],
                         schema=schema)  # fmt: skip
        provenance = Provenance(opened.scan_settings(dataset), f"inputs {number}")
        write_table(opened.manifest(dataset.id), table, ImageRow, provenance)


def _columns(number, dataset, count):
    """Return the columns of a manifest: every third image landscape, the others portrait, a caption for each target."""
    at = np.arange(count)
    landscape = at % 3 == 0
    texts = [f"a caption of photo {row}, which is a little longer than need be" for row in range(count)]
    ids = np.random.default_rng(number).bytes(16 * count).hex()  # as little compressible as hashes
    ends = np.arange(count + 1) if number == 0 else np.zeros(count + 1)
    geometry = {
        "width": (1600, 1200),
        "height": (1200, 1600),
        "target_width": (1152, 896),
        "target_height": (896, 1152),
        "intermediary_width": (1194, 896),
        "intermediary_height": (896, 1194),
        "crop_top": (0, 21),
        "crop_left": (21, 0),
    }
    same = {"dataset_id": dataset, "format": "JPEG", "mode": "RGB", "alpha": False, "icc": False}
    return {
        **{name: pa.array(np.where(landscape, *sizes)) for name, sizes in geometry.items()},
        **{name: pa.repeat(pa.scalar(value), count) for name, value in same.items()},
        **{name: pa.repeat(pa.scalar(1), count) for name in ("orientation", "bits", "frames")},
        "path": pa.array([f"{row // 1000:05d}/photo_{row:07d}.jpg" for row in range(count)]),
        "image_id": pa.array([ids[start : start + 32] for start in range(0, len(ids), 32)]),
        "size_bytes": pa.array(at),
        "mtime_ns": pa.array(at),
        "face": pa.ListArray.from_arrays(pa.array(np.zeros(count + 1, np.int32)), pa.array([], pa.float64())),
        "captions": pa.ListArray.from_arrays(
            pa.array(ends.astype(np.int32)), pa.array(texts if number == 0 else [], pa.string())
        ),
        "bucket": pa.array(np.where(landscape, "1152x896", "896x1152")),
    }


# What is said


def check_all_made(done):
    """Stop if a run of prep pairs left out an image, or made one picture for two."""
    if not done["targets"] == done["generated"] == done["pairs"]:
        raise SystemExit(f"{done['generated']} pictures were made for {done['targets']} targets")


def best(runs, count):
    """Return (per second, MiB): of the fastest run, of the one that took most."""
    return max(one[count] / one["work"] for one in runs), max(one["peak_mib"] for one in runs)


def title(text, photos):
    """Print what a table is of."""
    sizes = []
    for path in photos.iterdir():
        with Image.open(path) as image:
            sizes.append(image.width * image.height / 1e6)
    print(f"\n{text}: {len(sizes):,} JPEGs, {np.mean(sizes):.2f} megapixels on average", flush=True)


def told(label, rate, peak, more="", unit="images/s"):
    """Print one line of a table."""
    print(f"| {label} | {rate:,.{0 if rate >= 1000 else 1}f} {unit} | {peak:,.0f} MiB | {more} |", flush=True)


if __name__ == "__main__":
    main()
