"""Several processes and machines that encode into the same stores: leases, shares, Ray."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Barrier, Thread
from uuid import uuid4

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from commands import command, forked, single_rows, slow_single_rows
from PIL import Image
from typer.testing import CliRunner

from families import open_project
from families.checkpoints import fingerprint, locate
from prep.cache import Here, Share, cache, share_of
from prep.cli import app
from prep.distributed import Encoder, OnRay
from prep.leases import EXPIRY_S, Leases
from prep.pairs import pairs
from prep.scan import scan
from prep.units import Unit
from prep.writing import Part, Writer
from schemas.errors import UserError
from schemas.shards import ShardHeader, ShardIndex, latent_row, rewrite, write_shard
from schemas.stores import LocalStore

MakeProject = Callable[..., Path]

HEADER = ShardHeader("LatentRow", "e1", {"latent": (2, 3)})
WHOLE: dict[str, bytes] = {}
ELSEWHERE = json.dumps({"holder": "x", "machine": "another", "process": 1, "beat": 1}).encode()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Encode as the processes that are started here do: the number of threads shows in a latent's last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Clock:
    """Time that passes when it is told to."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def paired(make_project: MakeProject) -> Path:
    folder = make_project("deblur", photos=4)
    scan(folder), pairs(folder)
    return folder


def rows(folder: Path) -> dict[str, bytes]:
    """Return every payload of a project's stores; no key is there twice."""
    shards = (folder / "work" / "cache").glob("[lt]*/**/*.parquet")
    listed = [row for path in shards for row in pq.read_table(path).to_pylist()]
    found = {row["key"]: row.get("latent") or row["embed"] for row in listed if "checksum" in row}
    assert len(found) == len(listed), "encoded twice"
    return found


def files(folder: Path) -> dict[str, bytes]:
    cached = folder / "work" / "cache"
    return {path.relative_to(cached).as_posix(): path.read_bytes() for path in cached.glob("[lt]*/**/*.parquet")}


def forget(folder: Path) -> None:
    """Empty the stores."""
    for path in sorted((folder / "work" / "cache").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


def whole_of(folder: Path) -> dict[str, bytes]:
    """Return what one process by itself makes of `paired`, encoded by the first test that asks."""
    if not WHOLE:
        cache(folder)
        WHOLE.update(rows(folder))
        forget(folder)
    return WHOLE


class Started:
    """A run of `prep cache` in a process of its own."""

    def __init__(self, folder: Path, *options: str, prepare: Callable[[], None] = single_rows) -> None:
        self._told = [folder / f"{uuid4().hex}.txt" for _ in ("out", "err")]
        arguments = ["prep", "cache", str(folder), "--json", *options]
        self.process = forked(command, arguments, {}, *self._told, prepare)
        self.process.start()

    def told(self) -> tuple[str, str]:
        """Wait for its end; returns what it wrote."""
        self.process.join(240)
        out, err = (file.read_text() for file in self._told)
        return out, err

    def summary(self) -> dict[str, object]:
        out, err = self.told()
        assert self.process.exitcode == 0, err
        return json.loads(out)


# Leases


def test_a_lease_dies_when_it_has_not_changed_for_a_while_by_the_clock_of_who_looks(tmp_path: Path) -> None:
    store, clock = LocalStore(tmp_path), Clock()
    with Leases(clock=clock) as mine:
        store.replace("leases/u", ELSEWHERE)
        assert not mine.take(store, "u")
        clock.now += EXPIRY_S - 1
        assert not mine.take(store, "u")
        store.replace("leases/u", ELSEWHERE.replace(b'"beat": 1', b'"beat": 2'))
        clock.now += EXPIRY_S - 1
        assert not mine.take(store, "u"), "it gave a sign of life"
        clock.now += EXPIRY_S + 1
        assert mine.take(store, "u")
    assert store.read("leases/u") is None


def test_the_time_of_day_and_the_times_of_files_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, clock = LocalStore(tmp_path), Clock()
    with Leases() as holder, Leases(clock=clock) as other:
        assert holder.take(store, "u")
        for jump in (-1e9, 0, 1e9):
            monkeypatch.setattr("time.time", lambda jump=jump: 1.7e9 + jump)
            os.utime(tmp_path / "leases" / "u", (1e9 + jump, 1e9 + jump))
            assert not other.take(store, "u")


def test_a_holder_that_lives_gives_signs_of_life(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    with Leases(expiry_s=0.6) as holder, Leases(expiry_s=0.6) as other:
        assert holder.take(store, "u")
        for _ in range(15):
            assert not other.take(store, "u")
            time.sleep(0.1)
        holder.release(store, "u")
        assert other.take(store, "u")


@pytest.mark.parametrize(("machine", "at_once"), [("mine", True), ("of my name", False)])
def test_what_a_dead_process_of_this_machine_held_is_free_at_once(tmp_path: Path, machine: str, at_once: bool) -> None:
    store = LocalStore(tmp_path)
    code = f"""
import os, signal
from pathlib import Path
from prep.leases import Leases
from schemas.stores import LocalStore
Leases().take(LocalStore(Path({str(tmp_path)!r})), "u")
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    if machine == "of my name":  # a container, whose processes are counted from 1 too
        said = json.loads(store.read("leases/u") or b"")
        store.replace("leases/u", json.dumps(said | {"machine": said["machine"].rpartition("-pid")[0]}).encode())
    with Leases(clock=Clock()) as other:
        assert other.take(store, "u") == at_once


def test_of_two_that_take_a_dead_lease_at_the_same_moment_one_has_it(tmp_path: Path) -> None:
    class Together(LocalStore):
        """A store where nobody writes before both have seen that the lease is dead."""

        def replace(self, name: str, data: bytes) -> None:
            barrier.wait(10)
            LocalStore.replace(self, name, data)

    LocalStore(tmp_path).replace("leases/u", ELSEWHERE)
    barrier, clock, taken = Barrier(2), Clock(), []
    with Leases(clock=clock) as one, Leases(clock=clock) as other:
        assert not any(taker.take(Together(tmp_path), "u") for taker in (one, other))
        clock.now += EXPIRY_S
        threads = [Thread(target=lambda of=of: taken.append(of.take(Together(tmp_path), "u"))) for of in (one, other)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    assert sorted(taken) == [False, True]


def test_a_lease_that_another_took_over_is_left_to_it(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    with Leases(expiry_s=0.3) as first:
        assert first.take(store, "u")
        store.replace("leases/u", ELSEWHERE)
        time.sleep(0.5)
        first.release(store, "u")
        assert store.read("leases/u") == ELSEWHERE


# Two that write the same


def latents(*keys: str) -> list[object]:
    return [latent_row(key, np.full((2, 3), number, np.uint16)) for number, key in enumerate(keys)]


def test_two_that_encode_the_same_unit_at_the_same_time_leave_each_row_there(tmp_path: Path) -> None:
    keys = ("a", "b", "c", "d", "e")
    unit = Unit("u", LocalStore(tmp_path), "e1", "3x2", keys, keys, 2)
    writers = Writer(), Writer()
    for writer in writers:
        writer.put(unit, HEADER, latents(*keys))
    for writer in writers:
        writer.finish(unit, {}, {})
    assert all([part.last for part in writer.settle()][-1] for writer in writers)
    for writer in writers:
        writer.close()
    index = ShardIndex(tmp_path)
    assert {key for key in keys if key in index} == set(keys)


def test_shards_that_are_merged_while_a_store_is_looked_through_are_found_merged(tmp_path: Path) -> None:
    class Busy(LocalStore):
        """A store in which somebody merges shards right after they were listed."""

        def footers(self, names: list[str]) -> Iterator[tuple[str, object]]:
            if merge:
                rewrite(LocalStore(self.folder), merge.pop())
            yield from LocalStore(self.folder).footers(names)

    merge = [[f"3x2/{write_shard(tmp_path / '3x2', HEADER, latents(*keys))}" for keys in ("ab", "cd")]]
    index = ShardIndex(Busy(tmp_path))
    assert not merge and len(index.headers) == 1 and all(key in index for key in "abcd")


# Shares


def test_a_share_is_what_was_asked_for_or_what_torchrun_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert share_of(None, None) == Share(0, 1)
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(UserError, match="only one is there"):
        share_of(None, None)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert share_of(None, None) == Share(2, 4)
    assert share_of(1, 3) == Share(1, 3), "what is said goes before"
    for index, count in ((3, 3), (None, 3), (1, None)):
        with pytest.raises(UserError, match="shard"):
            share_of(index, count)
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(UserError, match="RANK='first' is no number"):
        share_of(None, None)


def test_all_shares_together_are_one_run_to_the_byte(
    make_project: MakeProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prep.units._MOST_ROWS", 2)
    folder = paired(make_project)
    cache(folder)
    whole = files(folder)
    forget(folder)
    encoded = []
    for index in range(3):
        options = ["--num-shards", "3", "--shard-index", str(index)] if index else []
        torchrun = {"RANK": "0", "WORLD_SIZE": "3"}
        done = CliRunner().invoke(app, ["cache", str(folder), "--json", *options], env=torchrun)
        assert done.exit_code == 0, done.output
        encoded.append(sum(store["encoded"] for store in json.loads(done.stdout)["stores"]))
    assert files(folder) == whole and all(encoded)
    assert cache(folder).stores[0].encoded == 0


# Several processes


def test_two_processes_share_the_work_and_do_nothing_twice(make_project: MakeProject) -> None:
    folder = paired(make_project)
    whole = whole_of(folder)
    both = [one.summary() for one in [Started(folder, "--workers", "1") for _ in range(2)]]
    assert rows(folder) == whole
    for stores in zip(*(one["stores"] for one in both), strict=True):
        assert sum(store["encoded"] for store in stores) == stores[0]["needed"]
    assert not list((folder / "work" / "cache").rglob("leases/*"))


def test_what_a_killed_process_left_is_finished_by_another_at_once(make_project: MakeProject) -> None:
    folder = paired(make_project)
    whole = whole_of(folder)
    started = Started(folder, "--workers", "1", prepare=slow_single_rows)
    wait_for(lambda: any(files(folder)), started)
    started.process.kill()
    started.told()
    assert started.process.exitcode == -signal.SIGKILL and list((folder / "work" / "cache").rglob("leases/*"))
    start = time.monotonic()
    cache(folder)
    assert rows(folder) == whole and time.monotonic() - start < EXPIRY_S / 2


def test_what_others_did_since_the_run_began_is_not_done_again(make_project: MakeProject) -> None:
    folder = make_project("deblur")
    [photo, *_] = sorted((folder / "photos").glob("*.jpg"))
    Image.open(photo).save(photo, format="PNG")
    data = bytearray(photo.read_bytes())
    data[len(data) // 2] ^= 255  # the header and the end are whole, the picture is not
    photo.write_bytes(data)
    scan(folder), pairs(folder)
    taken: list[Unit] = []

    class Late(Here):
        """An engine that asks for work when another run has done all of it."""

        def latents(self, checkpoint: Path, units: Iterator[Unit]) -> Iterator[Part]:
            cache(folder)
            for unit in units:
                taken.append(unit)
                yield Part(unit.name, last=True)

    project = open_project(folder)
    [images, _] = cache(project, engine=Late(project, 1)).stores
    assert not taken and images.encoded == 0 and len(images.rejected) == 1


def wait_for(there: Callable[[], object], started: Started, limit_s: float = 120) -> None:
    end = time.monotonic() + limit_s
    while not there():
        assert started.process.is_alive(), started.told()
        assert time.monotonic() < end, "nothing came"
        time.sleep(0.05)


# Ray

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None or not sys.platform.startswith("linux"), reason="needs Ray, and /proc"
)


@contextmanager
def ray_cluster() -> Iterator[tuple[str, str]]:
    """Start a cluster; yields its address, and a mark that its processes carry in their environment."""
    mark, pipe = uuid4().hex, subprocess.PIPE
    variables = os.environ | {"PAIRLINE_TEST": mark, "RAY_USAGE_STATS_ENABLED": "0"}
    script = Path(__file__).with_name("ray_cluster.py")
    command = [sys.executable, "-W", "ignore", str(script)]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, env=variables) as run:
        assert run.stdout is not None and run.stdin is not None
        try:
            yield run.stdout.readline().strip(), mark
        finally:
            run.stdin.close()


def at_work(mark: str) -> list[int]:
    """Return the processes of a cluster that encode at this moment."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (
                b"ray::Encoder.work" in (place / "cmdline").read_bytes()
                and mark.encode() in (place / "environ").read_bytes()
            ):
                found.append(int(place.name))
    return found


def kill(processes: list[int]) -> bool:
    for process in processes[:1]:
        os.kill(process, signal.SIGKILL)
    return bool(processes)


@needs_ray
def test_a_ray_cluster_gives_the_rows_of_one_process_whoever_dies(make_project: MakeProject) -> None:
    folder = paired(make_project)
    whole = whole_of(folder)
    with ray_cluster() as (address, mark):
        started = Started(folder, "--engine", "ray", "--address", address)
        wait_for(lambda: files(folder) and kill(at_work(mark)), started)
        out, err = started.told()
    assert started.process.exitcode == 0, err
    assert rows(folder) == whole
    assert "an encoder was lost, another does its work" in err
    assert "ray::" not in err and "raylet" not in err
    assert not list((folder / "work" / "cache").rglob("leases/*"))
    assert out.startswith("{"), "Ray's own messages are kept out"
    assert all(store["encoded"] == store["needed"] for store in json.loads(out)["stores"]), out


def test_without_ray_it_is_said_how_to_have_it(make_project: MakeProject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'pairline\[ray\]'"):
        OnRay(open_project(make_project("deblur")))


@needs_ray
def test_a_cluster_that_is_not_there_is_a_users_mistake(make_project: MakeProject) -> None:
    project = open_project(paired(make_project))
    with OnRay(project, "127.0.0.1:1") as engine, pytest.raises(UserError, match=r"no Ray cluster at 127\.0\.0\.1:1: "):
        cache(project, engine=engine)


@needs_ray
def test_a_node_with_other_weights_or_another_folder_is_named(make_project: MakeProject, tmp_path: Path) -> None:
    project, encoder = open_project(make_project("deblur")), Encoder()
    components = project.family.image_encoder
    with pytest.raises(UserError, match=r"^node [\d.]+: .*tiny-flux-kontext: other weights or settings"):
        encoder.start(project, "Latents", components, "of the command", 0)
    weights = fingerprint(project, locate(project, components), components)
    encoder.start(project, "Latents", components, weights, 0)
    unit = Unit("u", LocalStore(tmp_path / "store"), "e1", "3x2", (), (), 16)
    with pytest.raises(UserError, match=r"^node [\d.]+: .*store is another folder than where the command runs"):
        next(encoder.work(unit, "leases/token", ()))
