"""Time prep scan: by number of files, against plain reads of the same files, and against a peer.

`python benchmarks/scan.py` makes its trees below a temporary folder: hard links to copies of the demo photographs, 1000
to a folder, a text file beside each image. With `--photos FOLDER`, scans that hash are compared with processes
that do nothing but read the same files, from memory and, if it may drop the system's caches, from the disk. `--peer
"PYTHON SCRIPT"` (repeatable) runs a peer's scan on that folder too; the script prints one JSON line with `files_per_s`,
`peak_rss_mib` and `version`. Times are those of the work, without importing Python modules, but with starting workers.
Memory is the proportional share of all processes together. Otherwise pages are warm: what is timed was read before.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import measured

DEMO = Path(__file__).parent.parent / "datasets_demo" / "photos"


def main():
    """Time what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, nargs="*", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--photos", type=Path, help="folder of real photographs, for hashing and the peer")
    parser.add_argument("--peer", action="append", default=[], help="command that scans a folder, prints a JSON line")
    parser.add_argument("--folder", type=Path, help="where to make the trees")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for count in options.files:
            of_links(Path(folder) / str(count), count, options.workers)
        if options.photos is not None:
            of_photos(Path(folder) / "photos", options.photos, options.workers, options.peer)


def of_links(folder, count, workers):
    """Time scans of one tree of hard links, with a caption each."""
    tree(folder / "images", count)
    warm(folder / "images")
    print(f"\n{count:,} files, a text file each, {workers} workers")
    first = run(folder, workers, "--no-hash")
    told("measured, not hashed", count, first)
    again = run(folder, workers, "--no-hash")
    told("again, unchanged", count, again)
    wider = run(folder, workers, "--no-hash", "--set", "resolution=768")
    told("again, another resolution", count, wider)
    print(f"manifest {(folder / 'work' / 'manifests' / 'images.parquet').stat().st_size / 2**20:.1f} MiB")


def of_photos(folder, photos, workers, peers):
    """Time scans that hash, against reading the same bytes; then the peers."""
    folder.mkdir()
    images = [path for path in sorted(photos.rglob("*")) if path.is_file() and path.suffix != ".json"]
    size = sum(path.stat().st_size for path in images)
    print(f"\n{len(images):,} photographs, {size / 2**20:,.0f} MiB, {workers} workers")
    for path in images:
        path.read_bytes()
    many = folder / "many"
    for copy in range(10):
        for image in images:
            link = many / str(copy) / image.relative_to(photos)
            link.parent.mkdir(parents=True, exist_ok=True)
            os.link(image, link)
    links = sorted(many.rglob("*.*"))
    for label, place, some, repeated in (("warm, each ten times", many, links, 3), ("cold", photos, images, 4)):
        plain, scans = [], []
        for _ in range(repeated):  # in turn, for the machine is not alone
            if label == "cold" and not drop_caches():
                print("| cold: not measured, caches cannot be dropped |")
                break
            plain.append(reading(some, workers))
            if label == "cold":
                drop_caches()
                (folder / "first").mkdir(exist_ok=True)
                fresh(folder / "first", DEMO, workers, ())  # Python's own files are warm
            scans.append(fresh(folder, place, workers, ())["work"])
        else:
            total = sum(path.stat().st_size for path in some) / 2**20
            print(f"| {label}: only reading | {total / min(plain):,.0f} MiB/s |")
            ratio = min(plain) / min(scans)
            print(f"| {label}: scan with hashing | {total / min(scans):,.0f} MiB/s | {ratio:.2f} of it |")
    for path in images:
        path.read_bytes()
    rows = [fresh(folder, photos, workers, ("--no-hash",)) for _ in range(5)]
    best = min(row["work"] for row in rows)
    peak = max(row["peak_mib"] for row in rows)
    print(f"| scan without hashing | {len(images) / best:,.0f} files/s | {peak:,.0f} MiB |")
    for peer in peers:
        answer = subprocess.run([*shlex.split(peer), str(photos)], capture_output=True, text=True, check=True)
        said = json.loads(answer.stdout.splitlines()[-1])
        ratio = len(images) / best / said["files_per_s"]
        print(f"| peer {said['version']} | {said['files_per_s']:,.1f} files/s | {said['peak_rss_mib']:,} MiB | "
              f"pairline is {ratio:,.0f} times as fast |")  # fmt: skip


def drop_caches():
    """Forget what was read of the disk; only root may."""
    try:
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("1")
    except OSError:
        return False
    return True


def tree(folder, count):
    """Make `count` images, 1000 to a folder, and a text file for each: hard links, 60 names to a file's copy."""
    originals = sorted(DEMO.glob("*.jpg"))
    copies = {}
    for number in range(count):
        place = folder / f"{number // 1000:05d}"
        if number % 1000 == 0:
            place.mkdir(parents=True)
        which = (number % len(originals), number // 30_000)  # a file system allows 65,000 links
        if which not in copies:
            image, text = place / f"{number:07d}.jpg", place / f"{number:07d}.txt"
            image.write_bytes(originals[which[0]].read_bytes())
            text.write_text(f"a photograph of number {which[0]}, as it was taken")
            copies[which] = image, text
            continue
        image, text = copies[which]
        os.link(image, place / f"{number:07d}.jpg")
        os.link(text, place / f"{number:07d}.txt")


def project(folder, images):
    """Write a project whose one dataset is a folder of images."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"pretrained_model_name_or_path": "tiny"}')
    entry = {"id": "images", "instance_data_dir": str(images), "caption_strategy": "textfile"}
    if not any(Path(images).rglob("*.txt")):
        entry["caption_strategy"] = "filename"
    (folder / "multidatabackend.json").write_text(json.dumps([entry]))


def warm(folder):
    """Read the beginning of every file."""
    for place in folder.iterdir():
        for path in place.iterdir():
            with path.open("rb") as file:
                file.read(65536)


def run(folder, workers, *flags):
    """Run one scan in a process of its own; return its seconds and the peak of all its processes."""
    project(folder, folder / "images")
    return timed(folder, workers, flags)


def fresh(folder, photos, workers, flags):
    """Run a first scan of photographs in a process of its own."""
    project(folder, photos)
    subprocess.run(["rm", "-rf", str(folder / "work")], check=True)
    return timed(folder, workers, flags)


def timed(folder, workers, flags):
    """Run a scan in a process of its own; return its times and the peak memory of all its processes."""
    code = (
        "import sys, time, resource\n"
        "start = time.monotonic()\n"
        "from prep.scan import scan\n"
        "from families import open_project\n"
        "import pandas, pyarrow.compute\n"  # Arrow loads it with its first array
        "project, workers, *flags = sys.argv[1:]\n"
        "sets = [flags[i + 1] for i, flag in enumerate(flags) if flag == '--set']\n"
        "begun = time.monotonic()\n"
        "summary = scan(open_project(project, overrides=sets), workers=int(workers), hashed='--no-hash' not in flags)\n"
        "import json\n"
        "print(json.dumps({'seconds': time.monotonic() - start, 'work': time.monotonic() - begun,\n"
        "  'read': summary.datasets[0].read, 'written': summary.datasets[0].written}))\n"
    )
    command = [sys.executable, "-c", code, str(folder), str(workers), *flags]
    return measured(command)


def told(label, count, row):
    """Print one line of a table."""
    print(f"| {label} | {count / row['work']:,.0f} files/s | {row['work']:.2f} s | {row['peak_mib']:,.0f} MiB | "
          f"read {row['read']:,}, written {row['written']} |", flush=True)  # fmt: skip


def reading(images, workers):
    """Time plain reads of whole files, shared among as many processes."""
    start = time.monotonic()
    offspring = []
    for number in range(workers):
        child = os.fork()
        if child == 0:
            buffer = bytearray(1 << 20)
            for path in images[number::workers]:
                with path.open("rb", buffering=0) as file:
                    while file.readinto(buffer):
                        pass
            os._exit(0)
        offspring.append(child)
    for child in offspring:
        os.waitpid(child, 0)
    return time.monotonic() - start


if __name__ == "__main__":
    main()
