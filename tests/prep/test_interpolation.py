"""The option `interpolation`: what it changes from the pair table to the latents, and what it leaves alone."""

import json
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from families import open_project
from prep.cache import cache
from prep.images import decode
from prep.pairs import pairs
from prep.pixels import pixels_of, reference_picture, target_picture
from prep.scan import scan
from schemas.datasets import DatasetConfig
from schemas.freshness import read_pairs
from schemas.project import Project
from schemas.rows import PairRow

MakeProject = Callable[..., Path]
OTHER = ["interpolation=opencv-linear"]


def _rows(project: Project) -> list[PairRow]:
    [target] = project.targets
    return read_pairs(project, target)


def test_a_view_says_it_where_it_is_not_the_default() -> None:
    plain, linear = (DatasetConfig(id="a", interpolation=one) for one in ("lanczos", "opencv-linear"))
    assert (plain.view, plain.upright) == ("", "")
    assert (linear.view, linear.upright) == ('{"interpolation":"opencv-linear"}', "")
    turned = DatasetConfig(id="a", interpolation="opencv-linear", image_policy={"orientation": "ignore"})
    assert json.loads(turned.view) == {"interpolation": "opencv-linear", "orientation": "ignore"}
    assert json.loads(turned.upright) == {"orientation": "ignore"}


def test_a_dataset_has_its_own_or_the_trainers(make_project: MakeProject) -> None:
    folder = make_project("edits", interpolation="opencv-linear")
    datasets = json.loads((folder / "multidatabackend.json").read_text())
    datasets[0]["interpolation"] = "lanczos"
    (folder / "multidatabackend.json").write_text(json.dumps(datasets))
    own, others = open_project(folder).scanned
    assert (own.interpolation, others.interpolation) == ("lanczos", "opencv-linear")


def test_the_training_picture_is_opencvs_to_the_bit(make_project: MakeProject) -> None:
    folder = make_project("edits", interpolation="opencv-linear")
    project = open_project(folder)
    scan(project), pairs(project)
    for row in _rows(project):
        for picture, file in (
            (target_picture(project, row), folder / "target" / row.target_path),
            (reference_picture(project, row, row.references[0]), folder / "reference" / row.references[0].path),
        ):
            box, whole = row.geometry, np.asarray(decode(file.read_bytes()))
            size = (box.intermediary_width, box.intermediary_height)
            scaled = cv2.resize(whole, size, interpolation=cv2.INTER_LINEAR)
            down, across = slice(box.crop_top, None), slice(box.crop_left, None)
            expected = scaled[down, across][: box.target_height, : box.target_width]
            assert np.array_equal(pixels_of(picture), expected)


@pytest.mark.parametrize("name", ["edits", "deblur"])
def test_pairs_and_latents_are_made_anew_and_manifests_are_not(make_project: MakeProject, name: str) -> None:
    folder = make_project(name)
    plain, linear = open_project(folder), open_project(folder, overrides=OTHER)
    scan(plain), pairs(plain), cache(plain)
    before = _rows(plain)
    assert not any(one.written for one in scan(linear).datasets)
    assert [one.written for one in pairs(linear).datasets] == [True]
    after = _rows(linear)
    assert [store.encoded for store in cache(linear).stores] == [12, 0]
    for old, new in zip(before, after, strict=True):
        assert old.target_key("e") != new.target_key("e") and old.references[0].key("e") != new.references[0].key("e")
        assert new.references[0].view == new.view
        assert (old.geometry, old.references[0].geometry) == (new.geometry, new.references[0].geometry)
    scan(plain), pairs(plain)
    assert [store.encoded for store in cache(plain).stores] == [0, 0]


def test_what_is_seen_in_pixels_by_a_scan_is_not_looked_at_again(make_project: MakeProject) -> None:
    folder = make_project("edits")
    datasets = [
        one | {"near_duplicates": "report"} for one in json.loads((folder / "multidatabackend.json").read_text())
    ]
    (folder / "multidatabackend.json").write_text(json.dumps(datasets))
    first, second = (scan(open_project(folder, overrides=overrides)).datasets for overrides in ([], OTHER))
    assert [one.decoded for one in first] == [6, 6]
    assert [one.decoded for one in second] == [0, 0] and not any(one.written for one in second)
