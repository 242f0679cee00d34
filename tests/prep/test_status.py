"""prep status against what was done, on real photographs and the tiny checkpoint."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from families import open_project
from prep.cache import cache
from prep.pairs import pairs
from prep.scan import scan
from prep.status import status

MakeProject = Callable[..., Path]


def states(folder: Path, *overrides: str) -> dict[tuple[str, str], str]:
    """Return the state of every product."""
    summary = status(open_project(folder, overrides=list(overrides)))
    return {(one.stage, one.product): one.state for one in summary.states}


def following(folder: Path) -> str | None:
    """Return the command that comes next, without its project."""
    command = status(folder).next_command
    return None if command is None else " ".join(command.split()[:2])


def test_a_project_goes_from_stage_to_stage_by_the_commands_that_status_names(make_project: MakeProject) -> None:
    folder = make_project("deblur", max_train_steps=2)
    done = []
    stages = {"prep scan": scan, "prep pairs": pairs, "prep cache": cache}
    while (command := following(folder)) in stages:
        done.append(command)
        stages[command](folder)
        assert len(done) <= 3
    assert done == list(stages) and command == "train run"
    from train.loop import run

    run(folder)
    assert following(folder) is None
    assert set(states(folder).values()) == {"complete"}
    assert list(status(folder).lines())[-1] == "all is done"


def test_a_changed_setting_makes_stale_what_depends_on_it_and_nothing_else(make_project: MakeProject) -> None:
    folder = make_project("edits")
    scan(folder), pairs(folder), cache(folder)
    whole = states(folder)
    assert states(folder, "learning_rate=0.1") == whole
    caption = json.loads((folder / "multidatabackend.json").read_text())
    caption[0]["repeats"] = 3
    (folder / "multidatabackend.json").write_text(json.dumps(caption))
    now = states(folder)
    assert now["scan", "colour"] == now["scan", "gray"] == "complete" and now["pairs", "colour"] == "stale"
    assert now["cache", "latents, text"] == "missing" and following(folder) == "prep pairs"
    [said] = [one.detail for one in status(folder).states if one.product == "colour" and one.stage == "pairs"]
    assert said == "the settings of its images or pairs changed since it was paired"


def test_what_a_limit_left_out_is_partial_and_a_lost_store_is_missing(make_project: MakeProject) -> None:
    folder = make_project("deblur")
    scan(folder)
    pairs(folder, limit=2)
    assert states(folder)["pairs", "photos"] == "partial"
    pairs(folder)
    cache(folder, limit=3)
    assert states(folder)["cache", "latents"] == "partial"
    cache(folder)
    shutil.rmtree(folder / "work" / "cache" / "latents")
    assert states(folder)["cache", "latents"] == "missing" and states(folder)["cache", "text"] == "complete"
    assert following(folder) == "prep cache"


@pytest.mark.parametrize("product", ["manifests", "pairs"])
def test_a_damaged_table_is_stale(product: str, make_project: MakeProject) -> None:
    folder = make_project("deblur")
    scan(folder), pairs(folder)
    (folder / "work" / product / "photos.parquet").write_bytes(b"")
    assert "stale" in states(folder).values()


def test_status_writes_nothing(make_project: MakeProject) -> None:
    folder = make_project("deblur")
    before = sorted(folder.rglob("*"))
    status(folder)
    assert sorted(folder.rglob("*")) == before
