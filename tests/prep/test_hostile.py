"""Files, names, trees and neighbours that mean no good: `prep scan` comes to its end and says what it found."""

import io
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import prep
from families import open_project
from prep.scan import scan
from schemas.rows import ImageRow
from schemas.tables import read_columns, read_provenance

SOURCES = Path(prep.__file__).parents[1]
CONFIG = {"pretrained_model_name_or_path": "tiny", "resolution": 64, "aspect_bucket_alignment": 16}
TEXTFILE = {"caption_strategy": "textfile"}
WITHOUT_ROOT = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.getuid() == 0 else []
KNOWN = ("phash", "face", "examined")  # what was once seen in pixels is kept when no longer asked for


def project(folder, **options):
    """Write a project of one set `photos`."""
    (folder / "photos").mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    entry = {"id": "photos", "instance_data_dir": "photos", **options}
    (folder / "multidatabackend.json").write_text(json.dumps([entry]))
    return folder


def picture(seed=0, size=(96, 64), kind="PNG", **options):
    """Return the bytes of a small picture of its own."""
    small = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    made = io.BytesIO()
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(made, kind, **options)
    return made.getvalue()


def put(file, content):
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_bytes(content)
    return Path(file)


def manifest(workspace):
    return workspace / "manifests" / "photos.parquet"


def columns(workspace, leave_out=()):
    table = read_columns(manifest(workspace), ImageRow)
    return {name: table[name].to_pylist() for name in table.column_names if name not in leave_out}


def rejects(folder):
    found = columns(folder / "work")
    return dict(zip(found["path"], found["reject"], strict=True))


def command(folder, *options, without_root=False, **more):
    """Start `prep scan` as a process of its own."""
    line = [*(WITHOUT_ROOT if without_root else ()), sys.executable, "-c", "import prep.cli; prep.cli.main()"]
    return subprocess.Popen(
        [*line, "scan", str(folder), *options],
        env={**os.environ, "PYTHONPATH": str(SOURCES)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **more,
    )


def ended(process, seconds=30):
    try:
        told = process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    return process.returncode, told


# Single files


def test_what_is_no_file_is_rejected_and_nothing_waits_for_it(tmp_path):
    photos = project(tmp_path, **TEXTFILE) / "photos"
    for name in ("good", "pipe-text", "folder-text", "loop-text", "binary-text"):
        put(photos / f"{name}.png", picture())
    put(photos / "good.txt", b"a photo")
    os.mkfifo(photos / "pipe.png")
    os.mkfifo(photos / "pipe-text.txt")
    (photos / "folder.png").mkdir()
    (photos / "folder-text.txt").mkdir()
    (photos / "loop.png").symlink_to("loop.png")
    (photos / "loop-text.txt").symlink_to("loop-text.txt")
    (photos / "round").symlink_to(".")
    (photos / "up").symlink_to("..")
    put(photos / "binary-text.txt", bytes(range(256)))
    with socket.socket(socket.AF_UNIX) as listening:
        here = Path.cwd()
        os.chdir(photos)  # the name of a socket is short
        listening.bind("socket.png")
        os.chdir(here)
        scan(tmp_path, workers=1)
    assert rejects(tmp_path) == {
        "binary-text.png": "no caption: binary-text.txt is not UTF-8 (byte 128); caption_encoding names another encoding",
        "folder-text.png": "no caption: folder-text.txt: Is a directory",
        "good.png": None,
        "loop-text.png": "no caption: loop-text.txt: Too many levels of symbolic links",
        "loop.png": "unreadable: Too many levels of symbolic links",
        "pipe-text.png": "no caption: pipe-text.txt is empty",
        "pipe.png": "unreadable: not a regular file",
        "socket.png": "unreadable: No such device or address",
    }


def test_a_large_file_of_nothing_is_hashed_in_little_memory(tmp_path):
    photos = project(tmp_path) / "photos"
    for name, head in (("jpeg.jpg", picture(kind="JPEG")), ("nothing.jpg", b"")):
        with put(photos / name, head).open("r+b") as file:
            file.truncate(200 << 20)
    limited = command(
        tmp_path, "--workers", "1", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (1 << 30,) * 2)
    )
    assert ended(limited)[0] == 0
    assert rejects(tmp_path) == {"jpeg.jpg": None, "nothing.jpg": "unreadable: no known image format"}


def test_a_small_icon_that_claims_a_huge_picture_takes_no_memory(tmp_path):
    photos = project(tmp_path) / "photos"
    bitmap = (40).to_bytes(4, "little") + (65535).to_bytes(4, "little") + (2 * 65535).to_bytes(4, "little")
    bitmap += bytes([1, 0, 1, 0]) + bytes(24)
    entry = bytes([16, 16, 0, 0, 1, 0, 1, 0]) + len(bitmap).to_bytes(4, "little") + (22).to_bytes(4, "little")
    put(photos / "bomb.ico", bytes([0, 0, 1, 0, 1, 0]) + entry + bitmap + bytes(1000))
    put(photos / "good.png", picture())
    limit = (1 << 30,) * 2
    code, told = ended(
        command(tmp_path, "--workers", "1", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, limit))
    )
    assert code == 0, told
    assert rejects(tmp_path)["good.png"] is None
    assert rejects(tmp_path)["bomb.ico"].startswith("unreadable: ")


def test_a_damaged_gif_does_not_hold_up_the_scan(tmp_path):
    photos = project(tmp_path) / "photos"
    head = b"GIF89a\x10\0\x10\0\x80\0\0" + bytes(6)
    with put(photos / "zeros.gif", head).open("r+b") as file:
        file.truncate(8 << 30)
    put(photos / "good.png", picture())
    code, told = ended(command(tmp_path, "--no-hash", "--workers", "1"), seconds=25)
    assert code == 0, told
    assert rejects(tmp_path)["good.png"] is None
    assert rejects(tmp_path)["zeros.gif"].startswith("unreadable: ")


@pytest.mark.parametrize("seconds", [-(10**9), -1, 2**31, 10**10])
def test_any_time_that_a_file_claims_is_no_obstacle(tmp_path, seconds):
    photos = project(tmp_path, **TEXTFILE) / "photos"
    for file in (put(photos / "a.png", picture()), put(photos / "a.txt", b"a photo")):
        os.utime(file, (seconds, seconds))
    scan(tmp_path, workers=1)
    assert rejects(tmp_path) == {"a.png": None}
    [again] = scan(tmp_path, workers=1).datasets
    assert (again.read, again.written) == (0, False)


def test_pictures_that_come_and_go_while_they_are_scanned_cost_nothing_but_themselves(tmp_path):
    photos = project(tmp_path, **TEXTFILE) / "photos"
    for number in range(300):
        put(photos / f"{number:03d}.png", picture(number))
        put(photos / f"{number:03d}.txt", b"a photo")
    restless = """
import os, random, sys
names = sorted(name for name in os.listdir(".") if name < "100")
while True:
    name = random.choice(names)
    act = random.randrange(4)
    if act == 0 and os.path.exists(name): os.remove(name)
    elif act == 1: open(name, "ab").write(b"more")
    elif act == 2: open(name, "wb").write(os.urandom(random.randrange(3000)))
    else: os.path.isdir(name) or os.path.exists(name) or os.mkdir(name + ".png") if random.random() < 0.01 else None
"""
    helper = subprocess.Popen([sys.executable, "-c", restless], cwd=photos, stderr=subprocess.DEVNULL)
    try:
        for options in ({"workers": 1}, {"workers": 1, "verify": True}, {"workers": 2, "verify": True}):
            scan(tmp_path, **options)
            said = rejects(tmp_path)
            assert {name for name, why in said.items() if why is not None} <= {name for name in said if name < "100"}
            assert len([name for name in said if name >= "100"]) == 200
    finally:
        helper.kill()
        helper.wait()
    scan(tmp_path, workers=1)
    scan(open_project(tmp_path, workspace=tmp_path / "fresh"), workers=1)
    for name in ("path", "image_id", "size_bytes", "mtime_ns"):
        assert columns(tmp_path / "work")[name] == columns(tmp_path / "fresh")[name]


# Names and trees


def test_any_name_has_its_row_and_its_caption(tmp_path):
    photos = project(tmp_path, **TEXTFILE) / "photos"
    odd = [
        "new\nline",
        "tab\t",
        "quo\"te'",
        "😀",
        "\u202eltr\u05d0",
        " lead",
        "a..b",
        "%s{0}",
        "--json",
        "x" * 251,
        "é",
    ]
    odd.append("e\u0301")  # the same to the eye
    for number, name in enumerate(odd):
        put(photos / name / f"{name}.PnG", picture(number))
        put(photos / name / f"{name}.txt", name.encode())
    for name in ("..jpg", ".jpg", ".a.jpg", "jpg", "a.jpg~", "a.jpg.txt"):
        put(photos / name, picture())
    [summary] = scan(tmp_path, workers=1).datasets
    found = columns(tmp_path / "work")
    assert sorted(found["path"]) == sorted(f"{name}/{name}.PnG" for name in odd)
    assert dict(zip(found["path"], found["captions"], strict=True)) == {
        f"{name}/{name}.PnG": [line.strip() for line in name.split("\n")] for name in odd
    }
    assert (summary.kept, summary.ignored_files) == (len(odd), 5)
    [again] = scan(tmp_path, workers=2).datasets
    assert (again.read, again.written) == (0, False)


def test_names_that_are_not_utf_8_are_scanned_again_as_they_were(tmp_path):
    photos = os.fsencode(project(tmp_path, **TEXTFILE) / "photos")
    for name in (b"caf\xe9", b"caf\\xe9", b"d\xe9r/a"):  # the second is what the first looks like in a table
        Path(os.fsdecode(photos + b"/" + name)).parent.mkdir(exist_ok=True)
        for end, content in ((b".png", picture()), (b".txt", b"a photo")):
            file = photos + b"/" + name + end
            Path(os.fsdecode(file)).write_bytes(content)
            os.utime(file, (10**9, 10**9))
    scan(tmp_path, workers=1)
    once = columns(tmp_path / "work"), read_provenance(manifest(tmp_path / "work"), ImageRow)
    [again] = scan(tmp_path, workers=1).datasets
    assert (columns(tmp_path / "work"), read_provenance(manifest(tmp_path / "work"), ImageRow)) == once
    assert (again.written, again.changed) == (False, 0)


def test_a_path_longer_than_the_system_opens_is_left_out(tmp_path):
    photos = project(tmp_path) / "photos"
    put(photos / "a.png", picture())
    folder = os.open(photos, os.O_RDONLY)
    for _ in range(20):
        os.mkdir("n" * 255, dir_fd=folder)
        inside = os.open("n" * 255, os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = inside
        os.link(photos / "a.png", "b.png", dst_dir_fd=folder)
    os.close(folder)
    try:
        [summary] = scan(tmp_path, workers=1).datasets
        assert summary.kept >= 10 and len(summary.unreadable_folders) == 1
    finally:
        subprocess.run(["rm", "-rf", str(photos)], check=True)


def test_three_hundred_folders_deep_is_not_too_deep(tmp_path):
    put(project(tmp_path) / "photos" / "/".join(["d"] * 300) / "a.png", picture())
    [summary] = scan(tmp_path, workers=1).datasets
    assert summary.kept == 1


@pytest.mark.skipif(os.getuid() == 0 and shutil.which("setpriv") is None, reason="root reads everything")
def test_a_folder_that_may_not_be_read_is_named_and_the_others_are_scanned(tmp_path):
    photos = project(tmp_path) / "photos"
    for name in ("a.png", "shut/b.png", "z.png"):
        put(photos / name, picture())
    (photos / "shut").chmod(0)
    try:
        for options in (["--dry-run"], []):
            code, told = ended(command(tmp_path, "--workers", "1", *options, without_root=True))
            assert code == 0, told
            assert "shut (Permission denied): cannot be read" in told
        assert rejects(tmp_path) == {"a.png": None, "z.png": None}
    finally:
        (photos / "shut").chmod(0o755)


@pytest.mark.skipif(os.getuid() == 0 and shutil.which("setpriv") is None, reason="root writes everywhere")
def test_a_workspace_that_may_not_be_written_is_an_error_of_one_line(tmp_path):
    put(project(tmp_path) / "photos" / "a.png", picture())
    (tmp_path / "work" / "manifests").mkdir(parents=True)
    (tmp_path / "work" / "manifests").chmod(0o555)
    code, told = ended(command(tmp_path, "--workers", "1", without_root=True))
    assert (code, told) == (1, f"error: {tmp_path}/work/manifests: cannot be written: Permission denied\n")


def test_a_folder_of_images_that_was_replaced_is_scanned_as_what_it_is_now(tmp_path):
    photos = project(tmp_path) / "photos"
    for number in range(4):
        put(photos / f"{number}.png", picture(number))
    scan(tmp_path, workers=1)
    photos.rename(tmp_path / "before")
    for number in range(2, 6):
        put(photos / f"{number}.png", picture(number + 10))
    scan(tmp_path, workers=1)
    assert_as_fresh(tmp_path)


# Manifests


def test_a_damaged_manifest_never_stops_the_scan_nor_tells_untruths(tmp_path):
    photos = project(tmp_path, **TEXTFILE) / "photos"
    for number in range(5):
        put(photos / f"{number}.png", picture(number))
        put(photos / f"{number}.txt", b"a photo")
    scan(tmp_path, workers=1)
    sound, truth = manifest(tmp_path / "work").read_bytes(), columns(tmp_path / "work")
    draw = random.Random(3)
    damaged = [sound[:cut] for cut in (0, 1, 7, len(sound) // 2, len(sound) - 1)] + [sound + b"x", b"PAR1" * 20]
    pages = len(sound) - 8 - int.from_bytes(sound[-8:-4], "little")  # the footer has no checksum
    for _ in range(60):
        flipped = bytearray(sound)
        flipped[draw.randrange(4, pages)] ^= draw.randrange(1, 256)
        damaged.append(bytes(flipped))
    for content in damaged:
        manifest(tmp_path / "work").write_bytes(content)
        scan(tmp_path, workers=1)
        assert columns(tmp_path / "work") == truth


# Processes


def many(folder, count=3000):
    """Fill a project with so many images that workers are started."""
    photos = project(folder) / "photos"
    for number in range(10):
        put(photos / f"{number}.png", picture(number, (320, 240)))
    for number in range(10, count):
        os.link(photos / f"{number % 10}.png", photos / f"{number}.png")
    return folder


def workers_of(process):
    found = []
    for thread in Path(f"/proc/{process.pid}/task").iterdir():
        for child in (thread / "children").read_text().split():
            if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text():
                found.append(int(child))
    return found


def runs(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for_line(process, start):
    """Read what a process tells until a line begins so."""
    while line := process.stdout.readline():
        if line.startswith(start):
            return
    raise AssertionError(f"it ended without: {start}")


def wait_until(true, seconds=20):
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.01)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in /proc")
def test_a_scan_keeps_a_second_one_out_and_when_it_is_killed_the_next_one_works(tmp_path):
    first = command(many(tmp_path), "--workers", "2", "--verify")
    try:
        wait_until((tmp_path / "work" / "manifests" / ".holder").exists)
        code, told = ended(command(tmp_path, "--workers", "1"))
        assert code == 1
        assert f"prep scan (process {first.pid} on " in told and told.count("\n") == 1
        wait_until(lambda: len(workers_of(first)) == 2)
    finally:
        workers = workers_of(first)
        first.kill()
        first.communicate()
    assert not manifest(tmp_path / "work").exists()
    code, told = ended(command(tmp_path, "--workers", "2"))
    assert code == 0, told
    assert_as_fresh(tmp_path)
    assert {file.name for file in manifest(tmp_path / "work").parent.iterdir()} == {".lock", "photos.parquet"}
    wait_until(lambda: not any(map(runs, workers)))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in /proc")
def test_a_worker_that_is_killed_costs_no_image(tmp_path):
    running = command(many(tmp_path), "--workers", "2", "--verify")
    wait_for_line(running, "scan photos: 3000 of 3000")  # now they decode
    os.kill(workers_of(running)[0], signal.SIGKILL)
    code, told = ended(running)
    assert code == 0, told
    assert set(rejects(tmp_path).values()) == {None}


def test_an_interrupt_ends_the_scan_at_once_and_leaves_nothing_torn(tmp_path):
    heeding = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # shells have what they start behind them ignore it
    running = command(many(tmp_path), "--workers", "2", "--verify", preexec_fn=heeding)
    wait_for_line(running, "scan photos: 3000 of 3000")
    running.send_signal(signal.SIGINT)
    assert ended(running, 5)[0] == 130
    assert {file.name for file in manifest(tmp_path / "work").parent.iterdir()} == {".lock"}


# The same result, whatever came before


def assert_as_fresh(folder, *, leave_out=(), **options):
    """Compare a project's manifest with that of a first scan of the same tree."""
    fresh = folder / "fresh"
    shutil.rmtree(fresh, ignore_errors=True)
    scan(open_project(folder, workspace=fresh), workers=1, **options)
    made, expected = columns(folder / "work", leave_out), columns(fresh, leave_out)
    for name in expected:
        assert made[name] == expected[name], name
    if not leave_out:
        assert read_provenance(manifest(folder / "work"), ImageRow) == read_provenance(manifest(fresh), ImageRow)
        assert manifest(folder / "work").read_bytes() == manifest(fresh).read_bytes()


SETTINGS = {
    "caption_strategy": ["textfile", "textfile", "filename", "instanceprompt"],
    "max_num_samples": [None, 3, 8],
    "exact_duplicates": ["report", "reject"],
    "crop_aspect": ["square", "preserve", "random", "closest"],
    "crop_style": ["random", "center", "corner"],
    "caption_shuffle": [{"enable": False}, {"enable": True, "count": 3}],
    "prepend_instance_prompt": [True, False],
    "disable_multiline_split": [True, False],
    "minimum_image_size": [None, 60],
    "image_policy": [{}, {"alpha": "reject"}, {"orientation": "ignore"}],
    "resolution": [64, 96],
}
LOOKING = {"near_duplicates": ["ignore", "report", "reject"], "crop_style": ["random", "face"]}


class Tree:
    """A folder of images that changes at random, with times of its own clock."""

    def __init__(self, root, seed, settings, fixed):
        self.root, self.draw, self.clock = root, random.Random(seed), 1_700_000_000
        self.settings, self.fixed = settings, fixed
        self.chosen = {name: self.draw.choice(values) for name, values in settings.items() if self.draw.random() < 0.5}
        self.photos = project(root) / "photos"

    def files(self):
        return sorted(path for path in self.photos.rglob("*") if path.is_file())

    def images(self):
        return [path for path in self.files() if path.suffix != ".txt"]

    def name(self):
        folder = self.draw.choice(["", "a", "a/b", "zé", "new\nline"])
        return (
            self.photos
            / folder
            / f"p{self.draw.randrange(12)}.{self.draw.choice(['png', 'jpg', 'webp', 'gif', 'JPG'])}"
        )

    def write(self, file, content):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        self.touch(file)

    def touch(self, file):
        self.clock += 1
        os.utime(file, (self.clock, self.clock))

    def content(self):
        """Draw a picture of few, so that some are the same, or something that is none."""
        draw, kind = self.draw, self.draw.choice(["PNG", "JPEG", "WEBP", "GIF"])
        exif = Image.Exif()
        exif[0x0112] = draw.choice([1, 3, 6])
        size = draw.choice([(96, 64), (64, 96), (64, 64), (130, 70), (40, 50), (3, 900)])
        whole = picture(draw.randrange(6), size, kind, **({"exif": exif} if kind == "JPEG" else {}))
        middle = len(whole) * 2 // 3
        damaged = whole[:middle] + draw.randbytes(8) + whole[middle + 8 :]
        return draw.choices([whole, whole[: len(whole) // 2], b"", draw.randbytes(50), damaged], [85, 4, 3, 3, 5])[0]

    def step(self):  # noqa: C901 - one branch for each thing that may happen
        draw, files, images = self.draw, self.files(), self.images()
        act = draw.choice(["add"] * 4 + ["caption"] * 4 + ["setting"] * 4 + ["copy", "link", "remove", "rename", "swap",
                          "touch", "rewrite", "uncaption", "move", "nothing"])  # fmt: skip
        if act == "setting":
            name = draw.choice(sorted(self.settings))
            self.chosen[name] = draw.choice(self.settings[name])
        elif act == "add" or not images:
            self.write(self.name(), self.content())
        elif act == "caption":
            text = draw.choice([b"one, two, three", b"a\nb\n", b"", b"\xff\xfe\0", b"a photo"])
            self.write(draw.choice(images).with_suffix(".txt"), text)
        elif act in ("copy", "link", "rename"):
            there, to = draw.choice(images), self.name()
            to.parent.mkdir(parents=True, exist_ok=True)
            if not to.exists():
                {"copy": shutil.copy2, "link": os.link, "rename": os.rename}[act](there, to)
        elif act == "swap" and len(images) > 1:
            one, other = draw.sample(images, 2)
            one.rename(self.root / "aside")
            other.rename(one)
            (self.root / "aside").rename(other)
        elif act in ("remove", "rewrite", "touch"):
            file = draw.choice(files if act == "touch" else images)
            {"remove": os.remove, "touch": self.touch, "rewrite": lambda one: self.write(one, self.content())}[act](
                file
            )
        elif act == "uncaption":
            for file in [file for file in files if file.suffix == ".txt"][:1]:
                file.unlink()
        elif act == "move" and (self.photos / "a").exists():
            to = self.photos / draw.choice(["moved", ".hidden", "a.png"])
            if not to.exists():
                (self.photos / "a").rename(to)

    def save(self):
        options = {"instance_prompt": "p", **self.chosen, **self.fixed}
        if options.get("crop_aspect") in ("random", "closest"):
            options["crop_aspect_buckets"] = [1.0, 0.5, 1.5]
        project(self.root, **{name: value for name, value in options.items() if value is not None})


@pytest.mark.parametrize(
    ("seed", "steps", "fixed", "options"),
    [
        (1, 30, {}, {}),
        (2, 30, {"crop": True}, {}),
        (3, 20, {}, {"hashed": False}),
        (4, 5, {"exact_duplicates": "reject", "max_num_samples": 5}, {"verify": True}),
        (5, 6, {"near_duplicates": "reject", "crop": True, "crop_style": "face"}, {}),
        (6, 5, {"near_duplicates": "report"}, {"verify": True}),
    ],
)
def test_whatever_happened_to_a_tree_its_manifest_is_that_of_a_first_scan(tmp_path, seed, steps, fixed, options):
    tree = Tree(tmp_path, seed, SETTINGS, fixed)
    for _ in range(8):
        tree.write(tree.name(), tree.content())
    for _ in range(steps):
        for _ in range(tree.draw.choice([1, 1, 3])):
            tree.step()
        tree.save()
        scan(tmp_path, workers=1, **options)
        assert_as_fresh(tmp_path, **options)


def test_what_was_looked_for_once_changes_no_row_when_it_is_no_longer(tmp_path):
    tree = Tree(tmp_path, 7, {**SETTINGS, **LOOKING}, {"crop": True})
    tree.content = lambda: picture(tree.draw.randrange(6), tree.draw.choice([(96, 64), (64, 96), (130, 70)]))
    for _ in range(8):
        tree.write(tree.name(), tree.content())
    for _ in range(10):
        tree.step()
        tree.save()
        options = tree.draw.choice([{}, {}, {"verify": True}])
        scan(tmp_path, workers=1, **options)
        assert_as_fresh(tmp_path, leave_out=KNOWN, **options)


def test_a_quick_look_leaves_no_trace_in_the_scan_that_follows(tmp_path):
    tree = Tree(tmp_path, 8, SETTINGS, {})
    for _ in range(10):
        for _ in range(5):
            tree.step()
        tree.save()
        scan(tmp_path, workers=1, hashed=False)
        scan(tmp_path, workers=1)
        assert_as_fresh(tmp_path)


def test_neither_workers_nor_the_order_of_directories_show_in_a_manifest(tmp_path):
    names = [f"{folder}{number}.png" for folder in ("", "a/", "a-b/", "é/") for number in range(12)]
    options = {**TEXTFILE, "crop": True, "crop_aspect": "random", "crop_aspect_buckets": [1.0, 0.5], "max_num_samples": 30,
               "exact_duplicates": "reject", "near_duplicates": "reject"}  # fmt: skip
    made = set()
    for seed, workers in enumerate((1, 2, 8)):
        folder = project(tmp_path / str(seed), **options)
        shuffled = random.Random(seed).sample(names, len(names))
        for name in shuffled:
            number = names.index(name)
            for file, content in (
                (name, picture(number % 40, (64 + number % 3 * 20, 64))),
                (name[:-4] + ".txt", b"one\ntwo"),
            ):
                os.utime(put(folder / "photos" / file, content), (10**9 + number, 10**9))
        scan(folder, workers=workers)
        made.add(manifest(folder / "work").read_bytes())
    assert len(made) == 1
