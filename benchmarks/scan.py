"""Time prep scan: against plain reads of the same files, against itself on an unchanged tree, and by number of files.

`python benchmarks/scan.py` makes its trees below a temporary folder: hard links to copies of the demo photographs, each
tree 1000 to a folder. `--peer "PYTHON SCRIPT"` also runs a peer's scan on `--photos FOLDER`; the script prints one JSON
line with `files_per_s`, `peak_rss_mib` and `version`. Pages are warm: every tree is read once before it is timed.
"""

import argparse
import json
import os
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DEMO = Path(__file__).parent.parent / "datasets_demo" / "photos"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, nargs="*", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--photos", type=Path, help="folder of real photographs, for hashing and the peer")
    parser.add_argument("--peer", help="command that scans a folder and prints one JSON line")
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


def of_photos(folder, photos, workers, peer):
    """Time a scan that hashes, against reading the same bytes; then the peer."""
    folder.mkdir()
    images = [path for path in sorted(photos.rglob("*")) if path.is_file() and path.suffix != ".json"]
    size = sum(path.stat().st_size for path in images)
    plain = min(reading(images, workers) for _ in range(3))
    print(f"\n{len(images):,} photographs, {size / 2**20:,.0f} MiB, {workers} workers")
    print(f"| reading them, nothing else | {len(images) / plain:,.0f} files/s | {size / plain / 2**20:,.0f} MiB/s |")
    for label, flags in (("scan with hashing", ()), ("scan without", ("--no-hash",))):
        rows = [fresh(folder, photos, workers, flags) for _ in range(3)]
        best = min(rows, key=lambda row: row["seconds"])
        print(f"| {label} | {len(images) / best['work']:,.0f} files/s | {size / best['work'] / 2**20:,.0f} MiB/s | "
              f"{plain / best['work']:.2f} of plain reading; {best['seconds']:.2f} s in all |")  # fmt: skip
    if peer is not None:
        answer = subprocess.run([*shlex.split(peer), str(photos)], capture_output=True, text=True, check=True)
        said = json.loads(answer.stdout.splitlines()[-1])
        ratio = len(images) / best["work"] / said["files_per_s"]
        print(f"| peer {said['version']} | {said['files_per_s']:,.1f} files/s | {said['peak_rss_mib']:,} MiB | "
              f"ours is {ratio:,.0f} times as fast |")  # fmt: skip


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
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"pretrained_model_name_or_path": "tiny"}')
    entry = {"id": "images", "instance_data_dir": str(images), "caption_strategy": "textfile"}
    if not any(Path(images).rglob("*.txt")):
        entry["caption_strategy"] = "filename"
    (folder / "multidatabackend.json").write_text(json.dumps([entry]))


def warm(folder):
    for place in folder.iterdir():
        for path in place.iterdir():
            with path.open("rb") as file:
                file.read(65536)


def run(folder, workers, *flags):
    """Run one scan in a process of its own; return its seconds and the peak of all its processes."""
    project(folder, folder / "images")
    return timed(folder, workers, flags)


def fresh(folder, photos, workers, flags):
    project(folder, photos)
    subprocess.run(["rm", "-rf", str(folder / "work")], check=True)
    return timed(folder, workers, flags)


def timed(folder, workers, flags):
    code = (
        "import sys, time, resource\n"
        "start = time.monotonic()\n"
        "from prep.scan import scan\n"
        "from families import open_project\n"
        "project, workers, *flags = sys.argv[1:]\n"
        "sets = [flags[i + 1] for i, flag in enumerate(flags) if flag == '--set']\n"
        "begun = time.monotonic()\n"
        "summary = scan(open_project(project, overrides=sets), workers=int(workers), hashed='--no-hash' not in flags)\n"
        "import json\n"
        "print(json.dumps({'seconds': time.monotonic() - start, 'work': time.monotonic() - begun,\n"
        "  'read': summary.datasets[0].read, 'written': summary.datasets[0].written}))\n"
    )
    command = [sys.executable, "-c", code, str(folder), str(workers), *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak = 0
    while process.poll() is None:
        peak = max(peak, memory_of(process.pid))
        time.sleep(0.05)
    answer = json.loads(process.stdout.read().splitlines()[-1])
    return answer | {"peak_mib": peak / 2**20}


def memory_of(root):
    """Return the proportional memory of a process and its children, in bytes."""
    total = 0
    for process in [root, *children(root)]:
        try:
            for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
        except OSError:
            continue
    return total


def children(process):
    try:
        own = [int(one) for one in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:
        return []
    return own + [one for child in own for one in children(child)]


def told(label, count, row):
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
                with open(path, "rb", buffering=0) as file:
                    while file.readinto(buffer):
                        pass
            os._exit(0)
        offspring.append(child)
    for child in offspring:
        os.waitpid(child, 0)
    return time.monotonic() - start


if __name__ == "__main__":
    main()
