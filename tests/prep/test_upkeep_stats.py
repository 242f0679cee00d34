"""prep cache --stats, and the modes of prep cache as the command line takes them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from stores import ENCODER, files, scatter
from typer.testing import CliRunner

from prep.cache import cache
from prep.cli import app
from prep.leases import Leases
from prep.pairs import pairs
from prep.scan import scan
from prep.upkeep.modes import Asked
from prep.upkeep.stats import stats
from schemas.stores import LocalStore

MakeProject = Callable[..., Path]


def said(folder: Path, *options: str) -> dict:
    """Return the JSON summary of a mode."""
    return json.loads(CliRunner().invoke(app, ["cache", str(folder), *options, "--json"]).stdout)


def test_a_store_is_counted_described_and_held_against_the_need(make_project: MakeProject) -> None:
    folder = make_project("deblur", photos=3)
    assert list(stats(folder).lines()) == ["nothing is cached yet"]
    scan(folder), pairs(folder), cache(folder)
    scatter(folder / "work" / "cache", 1)
    mine, foreign = sorted(
        (one for one in stats(folder).stores if one.kind == "latents"), key=lambda one: one.encoder == ENCODER
    )
    assert (mine.rows, mine.needed, mine.current, mine.small, mine.spare) == (6, 6, True, 0, 0)
    assert sum(mine.buckets.values()) == 6 and mine.description is not None and mine.description["posterior"] == "mode"
    on_disk = files(folder / "work" / "cache" / "latents" / ENCODER)
    assert (foreign.rows, foreign.needed, foreign.current, foreign.description) == (60, 0, False, None)
    assert foreign.buckets == {"32x24": 60} and foreign.shards == len(on_disk) == foreign.small == foreign.spare + 1
    assert foreign.size_bytes == sum(map(len, on_disk.values()))


def test_many_small_shards_lead_to_compaction_and_leases_are_counted(make_project: MakeProject) -> None:
    folder = make_project("deblur", photos=1)
    scatter(folder / "work" / "cache", 2)
    with Leases() as others:
        others.take(LocalStore(folder / "work" / "cache" / "text" / ENCODER), "unit")
        found = stats(folder)
    assert [one.leases for one in found.stores] == [0, 1]
    assert found.compact is not None and found.compact.endswith("--compact")
    assert "not paired yet" in str(found.unknown)
    compacted = said(folder, "--compact")
    assert [one["shards_after"] for one in compacted["stores"]] == [1, 1]
    assert stats(folder).compact is None


def test_the_table_lines_up(make_project: MakeProject) -> None:
    folder = make_project("deblur", photos=1)
    scatter(folder / "work" / "cache", 3)
    lines = list(stats(folder).lines())
    head, row = lines[1], lines[2]
    for name, value in (("rows", "60"), ("needed", "?"), ("buckets", "1")):
        assert head.index(name) + len(name) == row.index(f" {value} ") + len(value) + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gc", "--stats"], "--stats and --gc do not go together"),
        (["--verify", "--compact", "--explain", "x"], "do not go together"),
        (["--repair"], "--repair goes with --verify"),
        (["--decode", "3", "--stats"], "--decode goes with --verify"),
        (["--also", "x"], "--also goes with --gc"),
        (["--delete", "--compact"], "--delete goes with --gc"),
        (["--limit", "3", "--gc"], "--limit does not go with --gc"),
        (["--dry-run", "--verify"], "--dry-run does not go with --verify"),
        (["--dry-run", "--gc", "--delete"], "--delete and --dry-run do not go together"),
    ],
)
def test_options_that_do_not_go_together_are_a_wrong_command_line(
    options: list[str], message: str, tmp_path: Path
) -> None:
    told = CliRunner().invoke(app, ["cache", str(tmp_path), *options])
    assert told.exit_code == 2 and message in " ".join(told.output.split())


def test_one_mode_is_asked_for_or_none() -> None:
    assert Asked().mode is None and Asked(dry_run=True, others=("--limit",)).mode is None
    assert Asked(gc=True, dry_run=True).mode == "--gc" and Asked(explain="x").mode == "--explain"


def test_each_mode_is_one_document(make_project: MakeProject) -> None:
    folder = make_project("deblur", photos=2)
    scan(folder), pairs(folder), cache(folder)
    assert said(folder, "--stats")["stores"][0]["rows"] == 4
    assert said(folder, "--gc")["deleted"] is False
    shutil.rmtree(folder / "work" / "cache" / "text")
    [sample] = {path.stem for path in sorted((folder / "photos").glob("*.jpg"))[:1]}
    states = [part["state"] for part in said(folder, "--explain", sample)["parts"]]
    assert states[:2] == ["cached"] * 2 and set(states[2:]) == {"missing"}
