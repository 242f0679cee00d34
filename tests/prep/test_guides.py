"""Every list of datasets in SimpleTuner's Kontext and FLUX.2 guides, scanned on a made-up tree of the paths it names."""

import io
import json
import re
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from prep.scan import scan
from schemas.config_file import read_json
from schemas.rows import ImageRow
from schemas.tables import read_table

GUIDES = Path(__file__).parents[1] / "schemas" / "guides"
LISTS = sorted(path for path in GUIDES.iterdir() if isinstance(read_json(path), list))

# What every folder holds, and what becomes of it at 1024 pixels of area and an alignment of 64.
PHOTOS = {"wide.jpg": (1600, 1200), "sub/tall.png": (1080, 1920), "square.webp": (1024, 1024), "small.jpg": (640, 480)}
BUCKETS = {"wide.jpg": "1152x896", "sub/tall.png": "768x1344", "square.webp": "1024x1024", "small.jpg": "1152x896"}
SMALL = "too small: 640x480, need an area of 1024x1024"
SMALL_SQUARE = "too small: 640x480, need 1024x1024"

PLAIN = (BUCKETS, {})
LEAST = (BUCKETS | {"small.jpg": None}, {"small.jpg": SMALL})
SQUARE = (dict.fromkeys(BUCKETS, "1024x1024") | {"small.jpg": None}, {"small.jpg": SMALL_SQUARE})
HALVES = ({"0.jpg": "512x512", "1.jpg": "384x704", "2.jpg": "448x576"}, {})

# Guide and block -> dataset -> (buckets, rejects, captions of one image).
PAIR = {"my-edited-images": (*PLAIN, "textfile"), "my-reference-images": (*PLAIN, None)}
EXPECTED = {
    **{f"kontext_{language}_01": PAIR for language in ("en", "es", "hi", "pt")},
    **{
        f"kontext_{language}_03": {
            "edited-images": (*LEAST, "textfile"),
            "reference-images": (*PLAIN, None),
            "subjects200k-left": (*HALVES, "huggingface"),
            "subjects200k-right": (*HALVES, "huggingface"),
        }
        for language in ("es", "hi", "pt")
    },
    **{f"kontext_{language}_04": {"high-quality-images": (*PLAIN, "textfile")} for language in ("es", "hi", "pt")},
    **{f"kontext_{language}_05": {"pristine-images": (*PLAIN, "textfile")} for language in ("es", "hi", "pt")},
    "kontext_en_02": {"high-quality-images": (*PLAIN, "textfile")},
    "kontext_en_03": {"pristine-images": (*PLAIN, "textfile")},
    "flux2_pt_06": {"my-dataset": (*SQUARE, "textfile")},
    "flux2_pt_07": {"flux2-edits": (*PLAIN, "textfile"), "flux2-references": (*PLAIN, None)},
}


def fill(folder):
    """Write the photos and a text file beside each."""
    for name, size in PHOTOS.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", size, 99).save(file)
        file.with_suffix(".txt").write_text(f"edit {file.stem}\nchange {file.stem}\n")


def subjects(folder):
    """Write a dataset of pictures side by side, each half with a description."""
    rows = []
    for number, size in enumerate([(1024, 512), (1090, 970), (1201, 771)]):
        file = io.BytesIO()
        Image.fromarray(np.full((size[1], size[0], 3), number, np.uint8)).save(file, "PNG")
        description = {"description_0": f"left {number}", "description_1": f"right {number}"}
        rows.append({"image": {"bytes": file.getvalue(), "path": None}, "description": description})
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")


def test_every_list_is_expected():
    assert {path.stem for path in LISTS} == EXPECTED.keys() and len(LISTS) == 17


@pytest.mark.parametrize("path", LISTS, ids=lambda path: path.stem)
def test_every_list_of_datasets_gives_its_manifests(path, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    text = re.sub(r'"/(?!/)', f'"{tmp_path}/disk/', path.read_text(encoding="utf-8"))  # absolute paths, below our root
    (tmp_path / "multidatabackend.json").write_text(text, encoding="utf-8")
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_model_name_or_path": "tiny"}))
    for entry in read_json(tmp_path / "multidatabackend.json"):
        if "instance_data_dir" in entry:
            fill(tmp_path / entry["instance_data_dir"])
        elif "dataset_name" in entry and not (tmp_path / entry["dataset_name"]).exists():
            subjects(tmp_path / entry["dataset_name"])

    summary = scan(tmp_path, workers=1)

    assert [one.dataset_id for one in summary.datasets] == list(EXPECTED[path.stem])
    for name, (buckets, rejects, source) in EXPECTED[path.stem].items():
        rows = {row.path: row for row in read_table(tmp_path / "work" / "manifests" / f"{name}.parquet", ImageRow)}
        assert {path: row.bucket for path, row in rows.items()} == buckets
        assert {path: row.reject for path, row in rows.items() if row.reject} == rejects
        assert {row.caption_source for row in rows.values()} == {source}
        if source == "textfile":
            assert rows["sub/tall.png"].captions == ["edit tall", "change tall"]
        if source == "huggingface":
            side = name.removeprefix("subjects200k-")
            assert [row.captions for row in rows.values()] == [[f"{side} {number}"] for number in range(3)]
            assert [row.width for row in rows.values()] == [512, 545, 600]
        assert all(row.image_id for row in rows.values())
    assert not any(one.written for one in scan(tmp_path, workers=1).datasets)


def test_the_flux2_guide_says_what_its_size_without_a_second_one_means(tmp_path):
    path = GUIDES / "flux2_pt_06.json"
    (tmp_path / "multidatabackend.json").write_bytes(path.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_model_name_or_path": "tiny"}))
    fill(tmp_path / "datasets" / "my-dataset")
    warnings = scan(tmp_path, workers=1).warnings
    told = "maximum_image_size has no effect without target_downsample_size"
    assert any(told in warning for warning in warnings), warnings
