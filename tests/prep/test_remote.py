"""Caches behind URLs, on a real S3 service of 127.0.0.1 and on other file systems of fsspec."""

import json
import pickle
import shutil
import sys
import threading
from collections import Counter
from dataclasses import replace

import fsspec
import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import _registry, known_implementations
from safetensors.numpy import load_file
from wires import Wire, put, said

import schemas.fetch
import schemas.remote
from families import open_project
from prep.cache import cache
from prep.leases import Leases
from prep.pairs import pairs
from prep.plan import plan
from prep.scan import scan
from prep.status import status
from prep.upkeep.stores import Kept
from prep.upkeep.verify import _check, verify
from schemas.config_file import read_json
from schemas.errors import UserError
from schemas.fetch import open_url
from schemas.remote import RemoteStore, store_behind
from schemas.shards import ShardHeader, ShardIndex, latent_row, rewrite, write_rejects, write_shard
from schemas.stores import LocalStore
from schemas.summaries import as_json

SECRET = "wJalrXUtnFEMI"
ENCODER = "0123456789abcdef"
HEADER = ShardHeader("LatentRow", ENCODER, {"latent": (2, 4, 4)})


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Do not wait between attempts."""
    monkeypatch.setattr(schemas.fetch, "_PAUSE_S", 0.01)


@pytest.fixture(scope="module")
def service():
    """An S3 service of moto's."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield server.get_host_and_port()[1]
    server.stop()


@pytest.fixture
def wire(service):
    """A wire to the service; the sessions over it are closed with it."""
    wire = Wire(service)
    yield wire
    open_url.cache_clear()
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    wire.close()


def options(wire):
    return {
        "aws_endpoint_url": wire.url, "aws_access_key_id": "AKIAEXAMPLE", "aws_secret_access_key": SECRET,
        "aws_region_name": "us-east-1",
    }  # fmt: skip


def far(tmp_path, wire, bucket, workspace="work"):
    """Make a bucket, and open a store in it."""
    put(wire, f"/{bucket}")
    given = {
        "key": "AKIAEXAMPLE", "secret": SECRET, "max_concurrency": 1,
        "client_kwargs": {"endpoint_url": wire.url, "region_name": "us-east-1"},
        "config_kwargs": {"retries": {"mode": "standard", "total_max_attempts": 1}},
    }  # fmt: skip
    return store_behind(f"s3://{bucket}/latents", json.dumps(given), tmp_path / workspace / "mirror") / ENCODER


def written(store, count=1, rows=4, seed=0):
    """Write shards of random latents into a bucket's folder."""
    rng = np.random.default_rng(seed)
    names = []
    for number in range(count):
        latents = rng.integers(0, 100, (rows, 2, 4, 4)).astype(np.uint16)
        keyed = [latent_row(f"{seed:04}{number:012}{row:016}", one) for row, one in enumerate(latents)]
        names.append(write_shard(store / "32x32", HEADER, keyed))
    return names


def asked(wire):
    """Return how many requests of each kind were made since the last call."""
    counts = Counter(one.partition(" ")[0] if "list-type" not in one else "LIST" for one in wire.asked.elements())
    wire.asked.clear()
    return dict(counts)


def stored(index):
    return {name: index.store.local(name).read_bytes() for name in index.headers}


def as_remote(folder, url, **given):
    """Put both stores of a project behind a URL."""
    path = folder / "multidatabackend.json"
    datasets = read_json(path)
    for dataset in datasets:
        if dataset.get("dataset_type") != "text_embeds":
            dataset |= {"cache_dir_vae": f"{url}/latents", **given}
    datasets = [one for one in datasets if one.get("dataset_type") != "text_embeds"]
    datasets.append({"id": "text", "dataset_type": "text_embeds", "default": True, "cache_dir": f"{url}/text", **given})
    path.write_text(json.dumps(datasets))
    return folder


# The pipeline


def test_a_project_is_cached_and_trained_on_from_a_bucket_as_from_a_folder(make_project, tmp_path, wire):
    from train.loop import run

    folder = make_project("edits", photos=3, max_train_steps=2, checkpointing_steps=2)
    scan(folder), pairs(folder)
    near = {store.kind: store for store in cache(folder).stores}
    run(folder)
    lora = load_file(folder / "work" / "runs" / "default" / "pytorch_lora_weights.safetensors")
    local = {path.name: path.read_bytes() for path in (folder / "work" / "cache").glob("[lt]*/**/*.parquet")}

    put(wire, "/pipeline")
    as_remote(folder, "s3://pipeline/cache", **options(wire))
    scan(folder), pairs(folder)
    made = cache(folder)
    assert {one.kind: one.encoded for one in made.stores} == {kind: one.encoded for kind, one in near.items()}
    assert {one.folder.partition("/cache/")[0] for one in made.stores} == {"s3://pipeline"}
    opened = open_project(folder)
    assert not [one for one in opened.warnings if "aws" in one]
    stores = [opened.text_store, opened.latent_store(opened.targets[0])]
    shards = {name.rpartition("/")[2]: store.local(name).read_bytes() for store in stores for name in store.files()}
    assert shards == local, "the very bytes of the local store"

    wire.asked.clear()
    again = cache(folder)
    assert sum(one.encoded for one in again.stores) == 0
    assert asked(wire) == {"LIST": 2, "GET": 4}, "of each store one listing, and what it says of encoder and project"
    planned = plan(folder)
    assert [(one.needed, one.to_make) for one in planned.stages[-2:]] == [(one.needed, 0) for one in made.stores]
    assert {one.state for one in status(folder).states if one.stage == "cache"} == {"complete"}

    shutil.rmtree(folder / "work" / "mirror")
    shutil.rmtree(folder / "work" / "runs")
    wire.asked.clear()
    run(folder)
    again = load_file(folder / "work" / "runs" / "default" / "pytorch_lora_weights.safetensors")
    assert again.keys() == lora.keys() and all((again[name] == lora[name]).all() for name in lora)
    counts = asked(wire)
    assert counts["GET"] <= 2 * len(shards) and counts.keys() <= {"GET", "LIST", "HEAD"}

    told = "".join(map(str, (as_json(made), as_json(planned), repr(stores), *planned.lines())))
    files = [file.read_bytes() for file in (folder / "work").rglob("*") if file.is_file()]
    assert SECRET not in told and SECRET.encode() not in b"".join(files)


def test_a_damaged_object_is_found_and_mended_though_the_mirror_is_whole(make_project, wire):
    folder = make_project("edits", photos=1)
    put(wire, "/damaged")
    opened = open_project(as_remote(folder, "s3://damaged/cache", **options(wire)))
    store = opened.latent_store(opened.targets[0]) / ENCODER
    flipped, cut, emptied, sound = (f"32x32/{name}" for name in written(store, 4))
    assert [verify(folder).faults, len(ShardIndex(store))] == [0, 16]
    body = bytearray(store.local(flipped).read_bytes())
    body[len(body) // 10] ^= 1
    at = f"/damaged/cache/latents/{ENCODER}"
    put(wire, f"{at}/{flipped}", bytes(body))
    put(wire, f"{at}/{cut}", store.local(cut).read_bytes()[:-9])
    put(wire, f"{at}/{emptied}", b"")
    with pytest.raises(UserError, match=r"^s3://damaged/cache/latents/.*: damaged .*; prep cache --verify --repair"):
        ShardIndex(store)

    found = verify(folder)
    assert found.faults == 3 and verify(folder).stores == found.stores
    assert verify(folder, repair=True).faults == 3
    assert verify(folder).faults == 0
    left = ShardIndex(store)
    assert sound in left.headers and len(left) == 7 and left.headers.keys().isdisjoint([flipped, cut, emptied])


def test_verifying_takes_no_outage_for_damage(tmp_path, wire, monkeypatch):
    store = far(tmp_path, wire, "outage")
    [name] = written(store)
    open_url(store.url, store.options)[0].retries = 1
    listed = store.files()
    monkeypatch.setattr("prep.upkeep.verify.shards_of", lambda store: listed)
    monkeypatch.setattr("prep.upkeep.verify._misnamed", lambda kept: iter(()))
    root, _, encoder = store.inside.rpartition("/")
    kept = Kept("latents", replace(store, inside=root), encoder)
    wire.down = True
    with pytest.raises(UserError, match=r"^s3://outage/latents/.*: cannot be read: .*; tried 5 times; run the command"):
        _check(kept, 8, repair=True)
    wire.down = False
    assert list(store.files()) == [f"32x32/{name}"]


# Requests


def test_opening_fetches_each_footer_once_and_reading_each_shard_once(tmp_path, wire):
    store = far(tmp_path, wire, "requests")
    written(store, 50)
    write_other = far(tmp_path, wire, "requests", "other")
    wire.asked.clear()
    cold = ShardIndex(write_other)
    assert len(cold) == 200 and asked(wire) == {"LIST": 1, "GET": 50}
    warm = ShardIndex(write_other)
    assert warm._places.keys() == cold._places.keys() and asked(wire) == {"LIST": 1}
    for key in list(cold._places)[:12]:
        assert warm.read(key)["latent"].shape == (2, 4, 4)
    assert asked(wire) == {"GET": 3}, "12 rows of 3 shards"
    assert len(ShardIndex(store)) == 200 and asked(wire) == {"LIST": 1}, "who wrote them knows them"

    shutil.rmtree(tmp_path / "other" / "mirror")
    assert ShardIndex(write_other).read(next(iter(cold._places)))["latent"].any()
    assert asked(wire) == {"LIST": 1, "GET": 51}


def test_footers_longer_than_what_is_asked_for_first_are_fetched_in_one_more_request(tmp_path, wire, monkeypatch):
    store = far(tmp_path, wire, "long")
    written(store, 2)
    monkeypatch.setattr(schemas.remote, "_TAIL", 100)
    other = far(tmp_path, wire, "long", "other")
    wire.asked.clear()
    assert len(ShardIndex(other)) == 8 and asked(wire) == {"LIST": 1, "GET": 4}


def test_a_mirror_that_is_deleted_while_it_is_read_is_fetched_again(tmp_path, wire):
    store = far(tmp_path, wire, "deleted")
    written(store, 2)
    index = ShardIndex(store)
    first, *_, last = index._places
    index.read(first)
    shutil.rmtree(tmp_path / "work" / "mirror")
    assert index.read(first)["latent"].shape == index.read(last)["latent"].shape


def test_the_mirror_leaves_room_on_the_disk(tmp_path, wire, monkeypatch):
    store = far(tmp_path, wire, "room")
    written(store, 3)
    index = ShardIndex(store)
    copies = list((tmp_path / "work").rglob("*.parquet"))
    assert len(copies) == 3
    used = shutil.disk_usage(tmp_path)
    size = copies[0].stat().st_size
    free = schemas.remote._SPARE - size - 1
    monkeypatch.setattr(schemas.remote.shutil, "disk_usage", lambda folder: used._replace(free=free))
    written(store, 1, seed=1)
    assert len(list((tmp_path / "work").rglob("*.parquet"))) == 2, "two of three went, one came"
    assert all(index.read(key)["latent"].any() for key in index._places)


# Writers


def test_several_writers_of_one_shard_leave_one_and_none_fails(tmp_path, wire):
    stores = [far(tmp_path, wire, "writers", f"work{number}") for number in range(4)]
    wire.asked.clear()
    faults = []

    def write(store):
        try:
            written(store, 3)
        except UserError as fault:
            faults.append(fault)

    threads = [threading.Thread(target=write, args=[store]) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == [] and asked(wire) == {"PUT": 12}
    local = LocalStore(tmp_path / "near")
    written(local, 3)
    assert stored(ShardIndex(stores[0])) == stored(ShardIndex(local)), "no byte of it differs"


def test_what_is_there_is_not_replaced_by_the_same_keys(tmp_path, wire):
    store = far(tmp_path, wire, "kept")
    [name] = written(store)
    before = store.local(f"32x32/{name}").read_bytes()
    other = far(tmp_path, wire, "kept", "other")
    with (other / "32x32").write(name) as path:
        path.write_bytes(b"other bytes")
    assert other.local(f"32x32/{name}").read_bytes() == before


def test_groups_are_merged_and_rejects_remembered(tmp_path, wire):
    store = far(tmp_path, wire, "merged")
    names = written(store, 3)
    wire.asked.clear()
    [merged] = rewrite(store / "32x32", names)
    assert asked(wire) == {"PUT": 1, "DELETE": 3}, "what was just written is read here"
    from schemas.rows import RejectRow

    write_rejects(store, [RejectRow("f" * 32, "not an image")])
    index = ShardIndex(far(tmp_path, wire, "merged", "other"))
    assert list(index.headers) == [f"32x32/{merged}"] and index.rejects == {"f" * 32: "not an image"}
    reader = ShardIndex(store)
    [last] = rewrite(store / "32x32", [merged, *written(store, 1, seed=7)])
    assert last != merged and reader.read(next(iter(reader._places)))["latent"].any(), "merged under the reader's hands"


def test_a_lease_is_given_to_one_of_many_and_passes_on(tmp_path, wire):
    store = far(tmp_path, wire, "leases")
    got = []

    def take(leases):
        got.append(leases.take(store, "unit"))

    clock = [0.0]
    many = [Leases(clock=lambda: clock[0]) for _ in range(6)]
    threads = [threading.Thread(target=take, args=[one]) for one in many]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == [False] * 5 + [True]
    store.replace("leases/unit", b'{"holder": "another", "host": "elsewhere", "process": 1}')
    late = Leases(clock=lambda: clock[0])
    assert not late.take(store, "unit")
    clock[0] += 61
    assert late.take(store, "unit")
    late.release(store, "unit")
    assert store.read("leases/unit") is None and store.files() == {}
    for one in (*many, late):
        one.__exit__(None, None, None)


# Faults


def test_a_service_that_is_busy_for_a_while_is_asked_again(tmp_path, wire):
    store = far(tmp_path, wire, "busy")
    for busy in (3, 6):
        wire.busy = busy  # s3fs asks twice itself
        written(store, seed=busy)
        assert wire.busy == 0
    wire.answer = said("500 Internal Server Error", "InternalError", "We encountered an internal error.")
    other = far(tmp_path, wire, "busy", "other")
    wire.busy = 4
    index = ShardIndex(other)
    wire.refusals = 2
    assert len(index) == 8 and index.read(next(iter(index._places)))["latent"].any()
    wire.busy = 2
    assert store.create("leases/a", b"me") and store.read("leases/a") == b"me"


@pytest.mark.parametrize(
    ("answer", "attempts", "message"),
    [
        (said("503 Slow Down", "SlowDown", "Reduce your request rate."), 10,
         r"^s3://refused/latents/0123456789abcdef: cannot be listed: Reduce your request rate\.; tried 5 times; run"),
        (said("403 Forbidden", "AccessDenied", "Access Denied"), 1,
         r"^s3://refused/latents/0123456789abcdef: cannot be listed: Access Denied; check the keys and what they may"),
        (said("404 Not Found", "NoSuchBucket", "The specified bucket does not exist"), 1,
         r"^s3://refused/latents/0123456789abcdef: cannot be listed: The specified bucket does not exist; check its n"),
        (said("400 Bad Request", "InvalidRequest", "No."), 1,
         r"^s3://refused/latents/0123456789abcdef: cannot be listed: .*; check the URL and the options of the dataset$"),
    ],
)  # fmt: skip
def test_a_service_that_refuses_is_one_error_that_says_what_to_do(tmp_path, wire, answer, attempts, message):
    store = far(tmp_path, wire, "refused")
    wire.busy, wire.answer = 1000, answer
    with pytest.raises(UserError, match=message) as told:
        ShardIndex(store)
    assert 1000 - wire.busy == attempts and SECRET not in str(told.value) and "\n" not in str(told.value)


def test_missing_keys_are_one_error_at_once(tmp_path, wire, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    without = json.dumps({"client_kwargs": {"endpoint_url": wire.url, "region_name": "us-east-1"}})
    with pytest.raises(UserError, match=r"^s3://keys/latents: cannot be listed: .*credentials; check the keys and"):
        store_behind("s3://keys/latents", without, tmp_path).files()
    assert asked(wire) == {}


def test_writing_to_a_bucket_that_is_not_there_is_an_error(tmp_path, wire):
    store = far(tmp_path, wire, "present")
    absent = RemoteStore("s3://no-such-bucket/latents", store.options, store.mirror)
    with pytest.raises(UserError, match=r"^s3://no-such-bucket/latents.*: cannot be written: .*bucket does not exist"):
        written(absent)
    with pytest.raises(UserError, match=r"cannot be listed: .*bucket does not exist; check its name"):
        absent.files()


def test_an_attempt_that_seemed_to_fail_is_still_ours(tmp_path, wire, monkeypatch):
    store = far(tmp_path, wire, "seemed")
    system, _ = open_url(store.url, store.options)
    pipe, failed = system.pipe_file, []

    def once(*arguments, **given):
        pipe(*arguments, **given)
        if not failed:
            failed.append(True)
            raise TimeoutError

    monkeypatch.setattr(system, "pipe_file", once)
    assert store.create("leases/unit", b"mine") is True
    assert store.create("leases/unit", b"other") is False


def test_a_service_that_knows_no_conditions_is_written_to_all_the_same(tmp_path, wire):
    store = far(tmp_path, wire, "simple")
    wire.busy, wire.answer = 1, said("501 Not Implemented", "NotImplemented", "A header is not implemented")
    [name] = written(store)
    assert list(store.files()) == [f"32x32/{name}"]
    wire.busy = 1
    assert store.create("a", b"first") is True
    wire.busy = 1
    assert store.create("a", b"second") is False


def test_a_file_system_that_is_not_installed_is_told_with_the_command(tmp_path, monkeypatch):
    absent = {"class": "nosuchfs.core.FileSystem", "err": "Install nosuchfs to read this"}
    monkeypatch.setitem(known_implementations, "nosuch", absent)
    store = store_behind(f"nosuch://user:{SECRET}@host/latents", "{}", tmp_path)
    with pytest.raises(UserError) as told:
        store.files()
    expected = "nosuch://host/latents: cannot be opened: Install nosuchfs to read this; pip install nosuchfs"
    assert str(told.value) == expected


# Other file systems


class Renaming(LocalFileSystem):
    """A file system whose files may be seen half written, as most are."""

    protocol = "renaming"


@pytest.fixture
def renaming():
    fsspec.register_implementation("renaming", Renaming, clobber=True)
    yield "renaming"
    _registry.pop("renaming", None)
    open_url.cache_clear()


@pytest.mark.parametrize("scheme", ["memory", "file", "renaming"])
def test_any_file_system_holds_a_store(tmp_path, scheme, renaming):
    url = f"memory://{tmp_path.name}" if scheme == "memory" else f"{scheme}://{tmp_path}/far"
    store = store_behind(url, "{}", tmp_path / "mirror") / ENCODER
    assert isinstance(store, LocalStore) == (scheme == "file")
    assert not store.exists() and store.files() == {}
    names = written(store, 2)
    assert store.exists() and written(store, 2) == names
    index = ShardIndex(pickle.loads(pickle.dumps(store)))
    assert len(index) == 8 and index.read(next(iter(index._places)))["latent"].any()
    near = LocalStore(tmp_path / "near")
    written(near, 2)
    assert stored(index) == stored(ShardIndex(near))
    assert store.create("leases/a", b"1") and not store.create("leases/a", b"2")
    store.replace("leases/a", b"3")
    assert store.read("leases/a") == b"3" and store.read("leases/b") is None
    store.remove("leases/a")
    store.remove("leases/a")
    store.remove(f"32x32/{names[0]}")
    index.refresh()
    assert list(store.files()) == [f"32x32/{names[1]}"] and len(index) == 4
    assert not [path for path in tmp_path.rglob("*.tmp.*")]


def test_a_file_url_is_a_folder_of_this_machine(make_project, tmp_path):
    opened = open_project(as_remote(make_project("edits", photos=1), f"file://{tmp_path}/far"))
    assert opened.text_store == LocalStore(tmp_path / "far" / "text")
    assert opened.latent_store(opened.targets[0]) == LocalStore(tmp_path / "far" / "latents")


def test_commands_start_without_what_reads_urls():
    import subprocess

    code = "import sys, prep.cli, prep.cache, schemas.remote; print([one for one in ('fsspec', 's3fs') if one in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
