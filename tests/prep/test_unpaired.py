"""What is wrong with pairs is told once, whole, before anything is made; then the policy decides."""

import csv
import shutil

import pytest

from prep.pairs import pairs
from prep.scan import scan
from schemas.errors import ConfigError, UserError
from tests.prep.drawn import JPEG, REFS, draw, paired, products, project, rows_of

EDITS = {"id": "edits", "instance_data_dir": "edits", "conditioning_data": "refs"}


def trouble(folder, **options):
    """Write a project in which every kind of fault occurs once, and one pair is right."""
    project(folder, {**EDITS, **options}, REFS)
    for name in ("broken", "good", "missing", "same", "turned", "wide"):
        draw(folder / "edits" / f"{name}.png", 96, 64)
        draw(folder / "refs" / f"{name}.png", 96, 64, seed=3)
    (folder / "refs" / "missing.png").rename(folder / "refs" / "stray.png")
    (folder / "refs" / "broken.png").write_bytes(b"no picture")
    shutil.copy(folder / "edits" / "same.png", folder / "refs" / "same.png")
    draw(folder / "refs" / "turned.png", 64, 96)
    draw(folder / "refs" / "wide.png", 160, 64)
    draw(folder / "refs" / "good.png", 48, 32)
    scan(folder, workers=1)
    return folder


FAULTS = {
    "broken.png": "reference rejected: refs/broken.png: unreadable: no known image format",
    "missing.png": "no reference: refs has no missing.png",
    "same.png": "reference equals target: refs/same.png has the very bytes of its target; "
    '"identical_references": "keep" keeps such pairs',
    "turned.png": "orientation differs: refs/turned.png is 64x96, its target 96x64; turn one of them",
    "wide.png": "aspect differs: refs/wide.png is 160x64, its target 96x64; reference_strict needs the same aspect",
}


def report_of(folder):
    with (folder / "work" / "pairs" / "edits.report.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_by_default_nothing_is_paired_and_all_faults_are_told_at_once(tmp_path):
    trouble(tmp_path, conditioning={**JPEG})
    with pytest.raises(UserError) as caught:
        pairs(tmp_path, workers=1)
    told = str(caught.value)
    assert told.startswith("edits: 5 of 6 targets have no proper reference:\n")
    assert all(f"  1 {reason}\n" in told for reason in FAULTS.values())
    assert 'say in multidatabackend.json "on_unpaired": "drop" or "train_without_reference"' in told
    assert not (tmp_path / "work" / "references").exists()
    assert not (tmp_path / "work" / "pairs" / "edits.parquet").exists()


def test_the_report_is_complete_and_written_once(tmp_path):
    trouble(tmp_path)
    with pytest.raises(UserError, match=r"edits\.report\.csv"):
        pairs(tmp_path, workers=1)
    report = report_of(tmp_path)
    assert sorted((line["kind"], line["target"]) for line in report) == sorted(
        [(reason.partition(": ")[0], name) for name, reason in FAULTS.items()]
        + [("no target", ""), ("size differs", "good.png")]
    )
    files = {line["target"]: line["reference"] for line in report if line["target"] in FAULTS}
    assert files == {name: "refs" if name == "missing.png" else f"refs/{name}" for name in FAULTS}
    [stray] = [line for line in report if line["kind"] == "no target"]
    assert stray["reference"] == "refs/stray.png"
    [resized] = [line for line in report if line["kind"] == "size differs"]
    assert resized["detail"] == "48x32, its target 96x64: scaled"
    before = products(tmp_path)
    with pytest.raises(UserError):
        pairs(tmp_path, workers=1)
    assert {path: mark for path, mark in products(tmp_path).items() if path.suffix == ".csv"} == {
        path: mark for path, mark in before.items() if path.suffix == ".csv"
    }


def test_faults_of_all_sets_come_together(tmp_path):
    other = {"id": "more", "instance_data_dir": "more", "conditioning_data": "refs"}
    project(tmp_path, EDITS, other, REFS)
    draw(tmp_path / "edits" / "a.png")
    draw(tmp_path / "more" / "b.png")
    scan(tmp_path, workers=1)
    with pytest.raises(UserError, match=r"(?s)edits: 1 of 1 .*refs has no a\.png.*more: 1 of 1 .*refs has no b\.png"):
        pairs(tmp_path, workers=1)


def test_dropped_targets_keep_a_row_with_the_reason(tmp_path):
    trouble(tmp_path, on_unpaired="drop")
    [summary] = pairs(tmp_path, workers=1).datasets
    assert {path: row.reject for path, row in rows_of(tmp_path).items()} == {**FAULTS, "good.png": None}
    assert (summary.targets, summary.pairs, summary.unused_references, summary.resized_references) == (6, 1, 1, 1)
    assert summary.rejected == {reason.partition(":")[0]: 1 for reason in FAULTS.values()}


def test_targets_may_train_without_the_references_they_lack(tmp_path):
    trouble(tmp_path, on_unpaired="train_without_reference", conditioning={**JPEG, "storage": "ondemand"})
    [summary] = pairs(tmp_path, workers=1).datasets
    rows = rows_of(tmp_path)
    assert {row.reject for row in rows.values()} == {None}
    made = "edits_conditioning_jpeg_artifacts"
    assert {path: [one.dataset_id for one in row.references] for path, row in rows.items()} == {
        **{path: [made] for path in FAULTS},
        "good.png": ["refs", made],
    }
    assert (summary.pairs, summary.without_reference) == (6, 5)
    assert "  kept 5 targets without the references they lack" in list(summary.lines(dry_run=False))


def test_identical_references_may_be_meant(tmp_path):
    trouble(tmp_path, on_unpaired="drop", identical_references="keep")
    pairs(tmp_path, workers=1)
    assert rows_of(tmp_path)["same.png"].reject is None


def test_a_loose_reference_of_the_same_file_is_another_picture_if_it_is_cropped_otherwise(tmp_path):
    for resolution, reject in ((64, "reference equals target"), (128, None)):
        loose = {**REFS, "conditioning_type": "reference_loose", "resolution": resolution, "crop_style": "center"}
        folder = project(tmp_path / str(resolution), {**EDITS, "on_unpaired": "drop", "crop_style": "center"}, loose)
        for name in ("edits", "refs"):
            draw(folder / name / "a.png")
        _, rows = paired(folder)
        assert (rows["a.png"].reject or "").partition(":")[0] == (reject or "")


# Without extensions


def test_extensions_may_be_ignored_where_the_very_path_is_not_there(tmp_path):
    project(tmp_path, {**EDITS, "ignore_extension": True}, REFS)
    for target, reference in (
        ("a.png", "a.webp"),
        ("day/a.png", "day/a.jpg"),
        ("b.png", "b.png"),
        ("c.d.png", "c.d.bmp"),
    ):
        draw(tmp_path / "edits" / target)
        draw(tmp_path / "refs" / reference, seed=3)
    draw(tmp_path / "refs" / "b.jpg", seed=5)  # b.png has its own
    summary, rows = paired(tmp_path)
    assert {path: row.references[0].path for path, row in rows.items()} == {
        "a.png": "a.webp", "b.png": "b.png", "day/a.png": "day/a.jpg", "c.d.png": "c.d.bmp",
    }  # fmt: skip
    assert summary.unused_references == 1


@pytest.mark.parametrize(
    ("edits", "refs", "told"),
    [
        (["a.png"], ["a.jpg", "a.webp"], "refs/a.jpg and refs/a.webp differ in their extension alone"),
        (["a.png", "a.bmp"], ["a.jpg"], "a.bmp and a.png both ask for refs/a.jpg"),
        (["a.png", "a.bmp"], ["a.png"], "a.bmp and a.png both ask for refs/a.png"),
    ],
)
def test_stems_that_collide_are_an_error_that_lists_both(edits, refs, told, tmp_path):
    project(tmp_path, {**EDITS, "ignore_extension": True}, REFS)
    for name in edits:
        draw(tmp_path / "edits" / name)
    for name in refs:
        draw(tmp_path / "refs" / name, seed=3)
    scan(tmp_path, workers=1)
    with pytest.raises(UserError) as caught:
        pairs(tmp_path, workers=1)
    assert f"reference collides: {told}" in str(caught.value)


def test_a_name_in_another_unicode_form_is_said_to_be_one(tmp_path):
    project(tmp_path, {**EDITS, "on_unpaired": "drop"}, REFS)
    composed, decomposed = "caf\u00e9.png", "cafe\u0301.png"
    draw(tmp_path / "edits" / composed)
    draw(tmp_path / "refs" / decomposed, seed=3)
    _, rows = paired(tmp_path)
    assert rows[composed].reject == (
        f"no reference: refs has no {composed}, but {decomposed}, which looks the same: one has its accents composed, "
        "the other not; rename one"
    )


def test_a_dry_run_tells_faults_and_writes_no_report(tmp_path):
    trouble(tmp_path)
    before = products(tmp_path)
    with pytest.raises(UserError, match="all of them: the same command without --dry-run"):
        pairs(tmp_path, workers=1, dry_run=True)
    assert products(tmp_path) == before


@pytest.mark.parametrize("option", [{"on_unpaired": "skip"}, {"alignment_check": {"shift": 1}}])
def test_unknown_words_are_config_faults(option, tmp_path):
    project(tmp_path, {**EDITS, **option}, REFS)
    with pytest.raises(ConfigError, match=f'"edits".*{next(iter(option))}|{next(iter(option))}'):
        pairs(tmp_path, workers=1)
