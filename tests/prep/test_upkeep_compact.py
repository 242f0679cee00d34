"""prep cache --compact: what it makes of many shards, beside others, and killed at any moment."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from stores import HEADER, LATENTS, files, keys_of, latents, payloads, scatter, values_of

from prep import leases
from prep.leases import Leases
from prep.upkeep.compact import compact
from schemas import shards
from schemas.errors import UserError
from schemas.rows import RejectRow
from schemas.shards import ShardIndex, latent_row, rewrite, write_rejects, write_shard
from schemas.stores import LocalStore

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a full shard have a few rows."""
    monkeypatch.setattr(shards, "SHARD_BYTES", 20 * HEADER.row_bytes)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project without an image: compaction asks for stores alone."""
    folder = tmp_path / "project"
    (folder / "photos").mkdir(parents=True)
    (folder / "config.json").write_text('{"pretrained_model_name_or_path": "tiny"}')
    (folder / "multidatabackend.json").write_text(
        '[{"id": "photos", "instance_data_dir": "photos", "resolution": 64, "cache_dir_vae": "store/latents"}, {"id": "text", "dataset_type": "text_embeds", "cache_dir": "store/text"}]'
    )
    return folder


def test_what_a_store_becomes_follows_from_its_rows_alone(project: Path, small_shards: None) -> None:
    store = project / "store"
    made = []
    for seed in range(3):
        shutil.rmtree(store, ignore_errors=True)
        scatter(store, seed)
        before = payloads(store)
        summary = compact(project)
        assert payloads(store) == before and len(before) == 120
        made.append(files(store))
        assert sum(one.shards_after for one in summary.stores) == len(made[0])
    assert made[0] == made[1] == made[2]
    assert sorted(pq.read_metadata(path).num_rows for path in (store / LATENTS / "32x24").iterdir()) == [20, 20, 20]


def test_what_is_compact_is_left_as_it_is(project: Path, small_shards: None) -> None:
    store = project / "store"
    scatter(store, 1)
    compact(project)
    times = {path: path.stat().st_mtime_ns for path in store.rglob("*.parquet")}
    summary = compact(project)
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*.parquet")} == times
    assert not any(one.written for one in summary.stores) and "compact" in next(iter(summary.lines()))


def test_shards_that_were_merged_otherwise_are_the_same_bytes(tmp_path: Path, small_shards: None) -> None:
    keys = sorted(keys_of(20))
    names = [write_shard(tmp_path / "a", HEADER, latents(keys[start : start + 5])) for start in range(0, 20, 5)]
    rewrite(tmp_path / "a", names)
    write_shard(tmp_path / "b", HEADER, latents(keys))
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_a_dry_run_writes_nothing_and_says_the_same(project: Path, small_shards: None) -> None:
    store = project / "store"
    scatter(store, 4)
    before = files(store)
    said = compact(project, dry_run=True)
    assert files(store) == before
    assert [one.shards_after for one in said.stores] == [one.shards_after for one in compact(project).stores]


def test_of_two_copies_a_sound_one_is_kept_whichever_came_first(project: Path, small_shards: None) -> None:
    store, keys = project / "store" / LATENTS, keys_of(6)
    made = []
    for order in (keys, keys[::-1]):
        shutil.rmtree(store, ignore_errors=True)
        write_shard(store / "32x24", HEADER, latents(order[:4]))
        other = [latent_row(key, values_of(key, (2, 3, 4)) ^ 1) for key in order[2:]]
        write_shard(store / "32x24", HEADER, other)
        compact(project)
        assert payloads(store).keys() == {("latent", key) for key in keys}
        made.append(payloads(store)["latent", keys[2]])
    assert made[0] == made[1]
    damaged = store / "32x24" / write_shard(store / "32x24", HEADER, latents(keys[:1] + keys_of(7)[6:]))
    data = bytearray(damaged.read_bytes())
    data[data.index(values_of(keys[0], (2, 3, 4)).tobytes())] ^= 1
    damaged.write_bytes(bytes(data))
    compact(project)
    assert payloads(store)["latent", keys[0]] in (
        values_of(keys[0], (2, 3, 4)).tobytes(),
        (values_of(keys[0], (2, 3, 4)) ^ 1).tobytes(),
    )
    index = ShardIndex(store)
    assert all(index.read(key) for key in keys_of(7))


def test_a_damaged_row_stops_it_and_nothing_is_lost(project: Path, small_shards: None) -> None:
    store = project / "store"
    scatter(store, 5)
    before = payloads(store)
    path = sorted((store / LATENTS / "32x24").iterdir())[3]
    data = bytearray(path.read_bytes())
    data[data.index(pq.read_table(path)["latent"][0].as_py())] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(UserError, match="--verify --repair"):
        compact(project)
    assert payloads(store).keys() == before.keys()


def test_rejects_become_one_file(project: Path) -> None:
    store = project / "store"
    scatter(store, 6, count=4)
    for number in range(3):
        write_rejects(store / LATENTS, [RejectRow(f"{number}", "unreadable"), RejectRow("shared", f"reason {number}")])
    compact(project)
    assert len(list((store / LATENTS / "rejects").iterdir())) == 1
    assert ShardIndex(store / LATENTS).rejects == {
        "0": "unreadable",
        "1": "unreadable",
        "2": "unreadable",
        "shared": "reason 0",
    }


def test_a_reader_that_opened_the_store_before_reads_on(project: Path, small_shards: None) -> None:
    store = project / "store"
    scatter(store, 7)
    indexes = [ShardIndex(store / "latents"), ShardIndex(store / "text")]
    compact(project)
    for key in keys_of(60):
        assert [index.read(key)["key"] for index in indexes] == [key, key]
    assert sum(len(index.headers) for index in indexes) == len(files(store))


def test_where_somebody_works_nothing_is_touched(
    project: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = project / "store"
    scatter(store, 8)
    before = files(store)
    with Leases(expiry_s=0.9) as others:  # alive: another beat every 0.3 s
        assert others.take(LocalStore(store / LATENTS), "unit")
        summary = compact(project)
    after = files(store)
    assert {name: after[name] for name in before if name.startswith("latents")} == {
        name: data for name, data in before.items() if name.startswith("latents")
    }
    assert [one.busy for one in summary.stores] == [True, False]
    assert "somebody works there" in next(iter(summary.lines()))
    (store / LATENTS / "leases" / "unit").write_text(
        json.dumps({"holder": "x", "host": "another", "process": 1, "beat": 7})
    )
    monkeypatch.setattr(leases, "EXPIRY_S", 1.0)
    assert not any(one.busy for one in compact(project).stores), "a lease that never changes is dead"


def test_stopped_before_any_write_or_removal_no_row_is_lost(
    project: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = project / "store"
    scatter(store, 9)
    before, expected = payloads(store), None
    shutil.copytree(store, project / "copy")
    write, remove = LocalStore.write, LocalStore.remove
    left = [0]

    def stop(name: str) -> None:
        left[0] -= name.endswith(".parquet")
        if left[0] < 0:
            left[0] = 10_000
            raise KeyboardInterrupt

    monkeypatch.setattr(LocalStore, "write", lambda self, name: (stop(name), write(self, name))[1])
    monkeypatch.setattr(LocalStore, "remove", lambda self, name: (stop(name), remove(self, name))[1])
    left[0] = 10_000
    compact(project)
    expected, operations = files(store), 10_000 - left[0]
    assert operations > 20
    for number in range(operations):
        shutil.rmtree(store)
        shutil.copytree(project / "copy", store)
        left[0] = number
        with pytest.raises(KeyboardInterrupt):
            compact(project)
        assert payloads(store) == before
        compact(project)
        assert files(store) == expected


_VICTIM = """
import os, signal, sys, time
import schemas.shards
from families import open_project
from prep.upkeep.compact import compact

schemas.shards.SHARD_BYTES = int(sys.argv[2])
project = open_project(sys.argv[1])
seconds = 0.0
for line in sys.stdin:  # the share of a whole run after which it is killed; the first is a whole run
    start, child = time.monotonic(), os.fork()
    if child == 0:
        compact(project)
        os._exit(0)
    if seconds:
        time.sleep(float(line) * seconds)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    seconds = seconds or time.monotonic() - start
    print(status, flush=True)
"""


def test_killed_at_any_moment_no_row_is_lost_and_the_next_run_goes_on(project: Path, small_shards: None) -> None:
    store = project / "store"
    scatter(store, 10, count=400)
    before = payloads(store)
    shutil.copytree(store, project / "copy")
    compact(project)
    expected = files(store)
    victim = subprocess.Popen(
        [sys.executable, "-c", _VICTIM, project, str(20 * HEADER.row_bytes)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    assert victim.stdin is not None and victim.stdout is not None
    half_way = 0
    for share in [1.0, *np.random.default_rng(3).uniform(0.3, 1.0, 10)]:
        shutil.rmtree(store)
        shutil.copytree(project / "copy", store)
        victim.stdin.write(f"{share}\n")
        victim.stdin.flush()
        assert int(victim.stdout.readline()) in (0, 9)
        half_way += files(store).keys() not in (expected.keys(), files(project / "copy").keys())
        assert payloads(store) == before
        compact(project)
        assert files(store) == expected
    victim.stdin.close()
    victim.wait()
    victim.stdout.close()
    assert half_way, "at least one was killed while it worked"
