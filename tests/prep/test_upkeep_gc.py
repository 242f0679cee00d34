"""prep cache --gc: what two projects that share a store keep, and when nothing may be judged."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from stores import payloads

from prep.cache import cache
from prep.leases import Leases
from prep.pairs import pairs
from prep.scan import scan
from prep.upkeep.collect import collect
from prep.upkeep.compact import compact
from prep.upkeep.stats import stats
from schemas.config_file import read_json
from schemas.errors import UserError
from schemas.rows import RejectRow
from schemas.shards import ShardIndex, write_rejects
from schemas.stores import LocalStore

DEMO = Path(__file__).parent.parent.parent / "datasets_demo"
MakeProject = Callable[..., Path]


def configure(folder: Path, **options: object) -> None:
    sets = json.loads((folder / "multidatabackend.json").read_text())
    sets[0] |= options
    (folder / "multidatabackend.json").write_text(json.dumps(sets))
    scan(folder), pairs(folder)


@pytest.fixture(scope="module")
def shared_once(tmp_path_factory: pytest.TempPathFactory, tiny_models: Path) -> Path:
    """Cache two projects with one latent store: the same photographs, but for two, at one resolution."""
    folder = tmp_path_factory.mktemp("gc") / "both"
    for name, photos in (("first", 4), ("second", 2)):
        project = folder / name
        (project / "photos").mkdir(parents=True)
        for photo in sorted((DEMO / "photos").glob("*.jpg"))[4 - photos : 4]:
            shutil.copy2(photo, project / "photos")
        sets = read_json(DEMO / "deblur" / "multidatabackend.json")
        sets[0] |= {
            "instance_data_dir": "photos",
            "resolution": 128,
            "cache_dir_vae": "../store",
            "caption_strategy": "filename",
        }
        (project / "multidatabackend.json").write_text(json.dumps(sets))
        (project / "config.json").write_text(json.dumps(read_json(DEMO / "deblur" / "config.json")))
        shutil.copytree(tiny_models, project / "work" / "models")
        scan(project), pairs(project), cache(project)
    return folder


@pytest.fixture
def sharing(shared_once: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Copies of them and of their store, which the originals do not use."""
    both = Path(shutil.copytree(shared_once, tmp_path / "both"))
    for folder in (both / "first", both / "second"):
        scan(folder), pairs(folder), cache(folder)
    return both / "first", both / "second"


def whole(folder: Path) -> bool:
    return all(store.reused == store.needed for store in cache(folder, dry_run=True).stores)


def test_what_a_named_project_needs_stays_and_the_rest_goes(sharing: tuple[Path, Path]) -> None:
    first, second = sharing
    compact(first)  # rows of both in the same shards
    assert collect(first, [second]).stores[0].rows == 0
    configure(first, resolution=192)
    cache(first)
    before = payloads(first.parent / "store")
    told = collect(first, [second])
    assert payloads(first.parent / "store") == before, "a dry run"
    assert (told.stores[0].rows, told.stores[0].rows_kept) == (4, 8 + 4) and told.stores[0].shards_rewritten
    done = collect(first, [second], delete=True)
    assert [(one.rows, one.bytes) for one in done.stores] == [(one.rows, one.bytes) for one in told.stores]
    assert whole(first) and whole(second) and len(payloads(first.parent / "store")) == 12
    assert list(collect(first, [second]).lines())[-1] == "all rows are reached"


def test_a_project_that_uses_the_store_must_be_named(sharing: tuple[Path, Path]) -> None:
    first, second = sharing
    told = collect(second)
    assert told.unnamed == (first.name,) and told.stores[0].rows == 4
    assert any("name it with --also" in line for line in told.lines())
    with pytest.raises(UserError, match="name it with --also") as refused:
        collect(second, delete=True)
    assert whole(first)
    shutil.rmtree(first)
    notes = re.findall(r"\S+/users/\w+\.json", str(refused.value))
    assert notes and not any("first" in Path(note).read_text().replace('"project": "first"', "") for note in notes)
    for note in notes:  # what the message advises for a project that is no more
        Path(note).unlink()
    assert collect(second, delete=True).unnamed == () and whole(second)


def test_nothing_is_judged_by_tables_that_are_missing_stale_or_cut(sharing: tuple[Path, Path]) -> None:
    first, second = sharing
    pairs(second, limit=1)
    with pytest.raises(UserError, match=r"not whole \(--limit\)"):
        collect(first, [second], delete=True)
    pairs(second)
    (second / "work" / "pairs" / "photos.parquet").unlink()
    with pytest.raises(UserError, match="not paired yet"):
        collect(first, [second], delete=True)
    sets = json.loads((first / "multidatabackend.json").read_text())
    sets[0]["resolution"] = 192
    (first / "multidatabackend.json").write_text(json.dumps(sets))
    with pytest.raises(UserError, match="changed since"):
        collect(first, delete=True)


def test_nothing_is_judged_without_the_keys_of_encoders(sharing: tuple[Path, Path]) -> None:
    first, second = sharing
    shutil.rmtree(second / "work" / "models")
    assert collect(first, [second]).stores[0].rows == 0, "they were noted"
    (second / "work" / "cache" / "encoders.json").unlink()
    with pytest.raises(UserError, match="nothing is cached for checkpoint"):
        collect(first, [second])


def test_nothing_is_deleted_where_somebody_works(sharing: tuple[Path, Path]) -> None:
    first, second = sharing
    configure(first, resolution=192)
    cache(first)
    [encoder] = (first.parent / "store").iterdir()
    before = payloads(encoder)
    with Leases(expiry_s=0.9) as others:
        assert others.take(LocalStore(encoder), "unit")
        with pytest.raises(UserError, match="somebody works there"):
            collect(first, [second], delete=True)
    assert payloads(encoder) == before


def test_rejects_that_nothing_reaches_go_too(sharing: tuple[Path, Path]) -> None:
    first, second = sharing
    [encoder] = (first.parent / "store").iterdir()
    needed = sorted(key for _, key in payloads(encoder))[0]
    write_rejects(encoder, [RejectRow("0" * 32, "unreadable"), RejectRow(needed, "unreadable")])
    told = collect(first, [second])
    assert (told.stores[0].rows, told.stores[0].rejects) == (0, 1)
    collect(first, [second], delete=True)
    assert ShardIndex(encoder).rejects == {needed: "unreadable"}


def test_rows_of_an_encoder_that_is_no_more_used_go(make_project: MakeProject) -> None:
    folder = make_project("deblur", photos=2)
    scan(folder), pairs(folder), cache(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vae_dtype": "bf16"}))
    cache(folder)
    assert {
        one.description["dtype"]: (one.rows, one.needed, one.current)
        for one in stats(folder).stores
        if one.kind == "latents" and one.description
    } == {"fp32": (4, 0, False), "bf16": (4, 4, True)}
    collect(folder, delete=True)
    assert [(one.kind, one.rows) for one in stats(folder).stores] == [("latents", 4), ("text", 5)] and whole(folder)
