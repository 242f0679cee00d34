"""Images that lie elsewhere than in a folder, read with the real libraries; services run on 127.0.0.1."""

import csv
import io
import json
import socket
import threading
from collections import Counter
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from wires import Wire, put

import schemas.fetch
from families import open_project
from prep.listing import Asked, list_images
from prep.pairs import pairs
from prep.pixels import pixels_of, reference_picture, target_picture
from prep.places import open_bucket, place_of, read_bytes
from prep.scan import scan
from schemas.console import log
from schemas.errors import UserError
from schemas.fetch import open_url
from schemas.freshness import read_pairs
from schemas.rows import ImageRow
from schemas.summaries import as_json
from schemas.tables import read_table

CONFIG = {"resolution": 64, "aspect_bucket_alignment": 16}
SECRET = "wJalrXUtnFEMI"


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Do not wait between attempts."""
    monkeypatch.setattr(schemas.fetch, "_PAUSE_S", 0.01)


def project(folder, *datasets, **config):
    """Write a project's files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    (folder / "multidatabackend.json").write_text(json.dumps(datasets))
    return folder


def pixels(width=64, height=64, seed=0):
    """Draw a small picture of its own."""
    return np.random.default_rng((seed, width, height)).integers(0, 256, (height, width, 3), np.uint8)


def png(width=64, height=64, seed=0):
    """Draw one and encode it."""
    file = io.BytesIO()
    Image.fromarray(pixels(width, height, seed)).save(file, "PNG")
    return file.getvalue()


def rows_of(folder, dataset="photos"):
    """Return the rows of a manifest by path."""
    return {row.path: row for row in read_table(folder / "work" / "manifests" / f"{dataset}.parquet", ImageRow)}


def read(folder, **options):
    """Scan, and return how many images were read."""
    [summary] = scan(folder, workers=1, **options).datasets
    return summary.read


def rejected(folder, dataset="photos"):
    """Return the reasons by path."""
    return {path: row.reject for path, row in rows_of(folder, dataset).items() if row.reject is not None}


# Rows of datasets


def hub(folder, **options):
    """Write a project whose images are rows of the dataset in the folder `data`, cached in the folder `cache`."""
    inside = {"cache_dir": "cache", **options.pop("huggingface", {})}
    entry = {"id": "photos", "type": "huggingface", "dataset_name": "data", "caption_strategy": "huggingface"}
    return project(folder, {**entry, "huggingface": inside, **options})


def parquet(path, count=3, **columns):
    """Write rows of images and captions; other columns replace or join them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = {
        "image": [{"bytes": png(seed=number), "path": f"{number}.png"} for number in range(count)],
        "caption": [f"photo {number}" for number in range(count)],
    }
    table = {name: values for name, values in {**plain, **columns}.items() if values is not None}
    pq.write_table(pa.table(table), path)


def test_rows_of_a_dataset_are_scanned_once_and_again_when_it_changes(tmp_path):
    parquet(hub(tmp_path) / "data" / "train.parquet")

    assert read(tmp_path) == 3
    found = rows_of(tmp_path)
    assert list(found) == ["0.jpg", "1.jpg", "2.jpg"]
    assert {(row.width, row.height, row.format, row.caption_source) for row in found.values()} == {
        (64, 64, "PNG", "huggingface")
    }
    assert [row.captions for row in found.values()] == [["photo 0"], ["photo 1"], ["photo 2"]]
    assert [row.size_bytes for row in found.values()] == [len(png(seed=number)) for number in range(3)]
    [again] = scan(tmp_path, workers=1).datasets
    assert (again.read, again.written) == (0, False)

    parquet(tmp_path / "data" / "train.parquet", 2, caption=["new", "newer"])
    place = place_of(opened := open_project(tmp_path), opened.dataset("photos"))
    [after] = scan(tmp_path, workers=1).datasets
    assert (after.read, after.removed) == (2, 1)
    assert [row.captions for row in rows_of(tmp_path).values()] == [["new"], ["newer"]]
    with pytest.raises(OSError, match="no such row"):
        read_bytes(place, "2.jpg")


def test_rows_are_read_by_several_processes_alike(tmp_path):
    parquet(hub(tmp_path) / "data" / "train.parquet", 130, image=[{"bytes": png(seed=n % 3), "path": None}
                                                                  for n in range(130)])  # fmt: skip
    scan(tmp_path, workers=2)
    found = list(rows_of(tmp_path).values())
    (tmp_path / "work" / "manifests" / "photos.parquet").unlink()
    scan(tmp_path, workers=1)
    assert found == list(rows_of(tmp_path).values())


def test_images_may_be_bytes_or_paths(tmp_path):
    (tmp_path / "a.png").write_bytes(png(seed=1))
    parquet(hub(tmp_path) / "data" / "train.parquet", 2, image=[{"bytes": None, "path": str(tmp_path / "a.png")},
                                                                {"bytes": None, "path": None}])  # fmt: skip
    scan(tmp_path, workers=1)
    assert rejected(tmp_path) == {"1.jpg": "unreadable: the row has no image"}
    parquet(tmp_path / "data" / "train.parquet", 2, image=[png(), b"no image"])
    scan(tmp_path, workers=1)
    assert [row.width for row in rows_of(tmp_path).values()] == [64, None]
    parquet(tmp_path / "data" / "train.parquet", 1, image=[str(tmp_path / "a.png")])
    scan(tmp_path, workers=1)
    assert [row.width for row in rows_of(tmp_path).values()] == [64]


def test_a_folder_of_images_with_its_table_is_a_dataset_too(tmp_path):
    """The hub's `imagefolder`, below the project's root under a name like the hub's, one split of two."""
    hub(tmp_path, dataset_name="Owner/Name", huggingface={"split": "test", "revision": "v1", "file_extension": "png"})
    for split, count in (("train", 3), ("test", 2)):
        folder = tmp_path / "Owner" / "Name" / split
        folder.mkdir(parents=True)
        for number in range(count):
            (folder / f"{number}.png").write_bytes(png(seed=number))
        lines = [json.dumps({"file_name": f"{number}.png", "caption": f"{split} {number}"}) for number in range(count)]
        (folder / "metadata.jsonl").write_text("\n".join(lines))
    assert read(tmp_path) == 2
    assert {path: row.captions for path, row in rows_of(tmp_path).items()} == {
        "0.png": ["test 0"],
        "1.png": ["test 1"],
    }
    assert read(tmp_path) == 0


def test_only_some_of_its_files_are_read(tmp_path):
    hub(tmp_path, huggingface={"data_files": ["b*.parquet"]})
    parquet(tmp_path / "data" / "a.parquet", 3)
    parquet(tmp_path / "data" / "b1.parquet", 1)
    parquet(tmp_path / "data" / "b2.parquet", 1)
    assert read(tmp_path) == 2


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_that_was_saved_to_disk_is_read_from_there(tmp_path, streaming):
    import datasets

    pictures = [Image.fromarray(pixels(seed=number)) for number in range(3)]
    rows = datasets.Dataset.from_dict({"image": pictures[:2], "caption": ["a", "b"]})
    rows = rows.cast_column("image", datasets.Image())
    hub(tmp_path, huggingface={"streaming": streaming})
    rows.save_to_disk(tmp_path / "data")
    assert read(tmp_path) == 2
    assert [row.captions for row in rows_of(tmp_path).values()] == [["a"], ["b"]]

    hub(tmp_path, dataset_name="both", huggingface={"split": "test"})
    datasets.DatasetDict(train=rows, test=rows.select([1])).save_to_disk(tmp_path / "both")
    assert read(tmp_path) == 1
    hub(tmp_path, dataset_name="both", huggingface={"split": "tset"})
    with pytest.raises(UserError, match=r"both: no split 'tset'; it has train, test$"):
        scan(tmp_path, workers=1)


def test_captions_come_from_columns_structs_lists_and_a_fallback(tmp_path):
    hub(tmp_path, huggingface={"caption_column": ["description.description_0", "tags"],
                               "fallback_caption_column": "title"})  # fmt: skip
    parquet(
        tmp_path / "data" / "train.parquet",
        4,
        description=[{"description_0": text, "description_1": "no"} for text in ("one", "two", None, " ")],
        tags=[["a", "b"], [], [], None],
        title=["t", "t", "title", None],
    )
    scan(tmp_path, workers=1)
    assert [row.captions for row in rows_of(tmp_path).values()] == [["one", "a", "b"], ["two"], ["title"], []]
    assert rejected(tmp_path) == {"3.jpg": "no caption: huggingface has none"}


@pytest.mark.parametrize("streaming", [False, True])
def test_with_columns_of_sizes_a_quick_look_reads_no_image(tmp_path, streaming):
    hub(tmp_path, metadata_backend="huggingface",
        huggingface={"width_column": "w", "height_column": "size.h", "streaming": streaming,
                     "composite_image_config": {"image_count": 2}})  # fmt: skip
    parquet(
        tmp_path / "data" / "train.parquet",
        2,
        image=[{"bytes": b"not an image", "path": None}] * 2,
        w=["129", "64"],
        size=[{"h": 64}, {"h": 96}],
    )
    assert read(tmp_path, hashed=False) == 0
    assert [(row.width, row.height, row.reject) for row in rows_of(tmp_path).values()] == [
        (64, 64, None), (32, 96, None)
    ]  # fmt: skip
    assert read(tmp_path, hashed=False) == 0
    assert read(tmp_path) == 2
    assert set(rejected(tmp_path)) == {"0.jpg", "1.jpg"}


def test_the_parts_of_a_composite_picture_are_paired_and_cut(tmp_path):
    common = {"type": "huggingface", "dataset_name": "data", "caption_strategy": "huggingface"}
    part = {"cache_dir": "cache", "composite_image_config": {"enabled": True, "image_count": 2, "select_index": 0}}
    right = {**part, "composite_image_config": {"enabled": True, "image_count": 2, "select_index": 1}}
    left_entry = {"id": "left", **common, "huggingface": part, "conditioning_data": ["right"]}
    right_entry = {"id": "right", **common, "huggingface": right, "dataset_type": "conditioning",
                   "conditioning_type": "reference_strict", "caption_strategy": None}  # fmt: skip
    project(tmp_path, left_entry, right_entry)
    image = [{"bytes": png(width, 64, seed), "path": None} for seed, width in enumerate((128, 129))]
    parquet(tmp_path / "data" / "train.parquet", 2, image=image)
    scan(tmp_path, workers=1)
    assert {row.width for row in rows_of(tmp_path, "right").values()} == {64}
    pairs(tmp_path, workers=1)

    opened = open_project(tmp_path)
    rows = read_pairs(opened, opened.dataset("left"))
    assert [(row.target_path, row.prompts) for row in rows] == [("0.jpg", ["photo 0"]), ("1.jpg", ["photo 1"])]
    for seed, row in enumerate(rows):
        whole = pixels((128, 129)[seed], 64, seed)
        np.testing.assert_array_equal(pixels_of(target_picture(opened, row)), whole[:, :64])
        [reference] = row.references
        np.testing.assert_array_equal(pixels_of(reference_picture(opened, row, reference)), whole[:, 64:128])


def test_rows_that_filter_func_does_not_want_are_rejected(tmp_path):
    wanted = {"collection": "a", "quality_thresholds": {"composition": 3}, "min_width": 64, "min_height": 64}
    parquet(
        hub(tmp_path, huggingface={"filter_func": wanted}) / "data" / "train.parquet",
        5,
        image=[{"bytes": png(width, 64), "path": None} for width in (64, 64, 64, 64, 48)],
        collection=["a", "b", "a", "a", "a"],
        quality_assessment=[{"composition": score} for score in (3, 5, 2, None, 5)],
    )
    scan(tmp_path, workers=1)
    assert rejected(tmp_path) == {
        "1.jpg": "filtered: collection 'b' is not wanted",
        "2.jpg": "filtered: composition is 2, wanted 3",
        "3.jpg": "filtered: composition is not known, wanted 3",
        "4.jpg": "filtered: 48x64, wanted 64x64",
    }


def test_a_streamed_dataset_is_scanned_without_a_copy_of_it(tmp_path):
    parquet(hub(tmp_path) / "data" / "train.parquet")
    scan(tmp_path, workers=1)
    copied, plain = list((tmp_path / "cache").rglob("*.arrow")), rows_of(tmp_path)
    hub(tmp_path, huggingface={"streaming": True, "cache_dir": "other"})
    assert copied and read(tmp_path) == 0  # by its fingerprint it is the same dataset
    (tmp_path / "work" / "manifests" / "photos.parquet").unlink()

    assert read(tmp_path) == 3
    assert rows_of(tmp_path) == plain
    assert not list((tmp_path / "other").rglob("*.arrow"))
    assert read(tmp_path) == 0
    parquet(tmp_path / "data" / "train.parquet", 2, caption=["new", "newer"])
    assert read(tmp_path) == 2
    assert read(tmp_path, limit=1) == 0
    assert list(rows_of(tmp_path)) == ["0.jpg"]

    scan(tmp_path, workers=1)
    pairs(tmp_path, workers=1)
    opened = open_project(tmp_path)
    row = read_pairs(opened, opened.dataset("photos"))[1]
    np.testing.assert_array_equal(pixels_of(target_picture(opened, row)), pixels(seed=1))
    assert list((tmp_path / "other").rglob("*.arrow"))  # pixels are asked for in any order


def test_a_streamed_folder_of_images_is_scanned_too(tmp_path):
    hub(tmp_path, huggingface={"streaming": True}, caption_strategy="instanceprompt", instance_prompt="a photo")
    (tmp_path / "data").mkdir()
    for number in range(2):
        (tmp_path / "data" / f"{number}.png").write_bytes(png(seed=number))
    assert read(tmp_path) == 2
    assert [row.width for row in rows_of(tmp_path).values()] == [64, 64]
    assert read(tmp_path) == 0


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset_name": "No/Such"}, "^No/Such: cannot be opened by the datasets library: .*; check dataset_name"),
        ({"huggingface": {"split": "tset"}}, "data: cannot be opened .*tset.*train.*; check dataset_name.*split"),
        ({"huggingface": {"image_column": "picture"}}, "data: no column 'picture' .image_column.; it has image, cap"),
        ({"huggingface": {"caption_column": "text"}}, "^photos: data: no column 'text'; it has image, .*caption$"),
        ({"huggingface": {"caption_column": "image.text"}}, "no column 'image.text'; it has image, image.bytes"),
        ({"huggingface": {"data_files": "x.parquet"}}, "data: cannot be opened .*x.parquet"),
    ],
)  # fmt: skip
def test_what_a_dataset_does_not_have_is_told_in_one_line(tmp_path, options, message, streaming):
    inside = {"streaming": streaming, **options.get("huggingface", {})}
    parquet(hub(tmp_path, **{**options, "huggingface": inside}) / "data" / "train.parquet")
    with pytest.raises(UserError, match=message) as told:
        scan(tmp_path, workers=1)
    assert "\n" not in str(told.value)


# Lists of URLs


class Site(BaseHTTPRequestHandler):
    """Files by path; every answer is counted, some break off."""

    def do_GET(self):
        self.server.asked[self.path] += 1
        data = self.server.files.get(self.path.partition("?")[0])
        if data is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.server.broken.get(self.path, 0) > 0:
            self.server.broken[self.path] -= 1
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.close_connection = True
        else:
            self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def site():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    server.files, server.broken, server.asked = {}, {}, Counter()
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=partial(server.serve_forever, 0.01))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def listed(folder, lines, columns=("url", "text"), **options):
    """Write a project of one CSV file."""
    entry = {"id": "photos", "type": "csv", "csv_file": "lists/photos.csv", "csv_caption_column": "text"}
    project(folder, {**entry, "csv_url_column": "url", "csv_cache_dir": "fetched", **options})
    (folder / "lists").mkdir(exist_ok=True)
    with (folder / "lists" / "photos.csv").open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([columns, *lines])
    return folder


def test_a_list_names_urls_and_files_beside_it(tmp_path, site):
    site.files = {"/a%20b.png": png(seed=1), "/x/image": png(seed=2)}
    named = [
        (f"{site.url}/a%20b.png", "first"), ("near/c.png", "second"), (f"{site.url}/a%20b.png", "another\nline"),
        (f"{site.url}/x/image?id=1", "one"), (f"{site.url}/x/image?id=2", "two"), ("gone.png", "none"), (" ", "blank"),
    ]  # fmt: skip
    (listed(tmp_path, named) / "lists" / "near").mkdir()
    (tmp_path / "lists" / "near" / "c.png").write_bytes(png(seed=3))

    assert read(tmp_path) == 5
    found = {path.partition("/")[2]: row for path, row in rows_of(tmp_path).items()}
    assert found["a%20b.png"].captions == ["first", "another\nline"]
    assert [row.captions for row in found.values()][2:4] == [["one"], ["two"]]
    assert found["c.png"].captions == ["second"]
    assert {row.caption_source for row in found.values()} == {"csv"}
    assert rejected(tmp_path) == {"gone.png": "unreadable: No such file or directory"}
    assert len(list((tmp_path / "fetched").rglob("*"))) == 5  # three files, two folders

    assert read(tmp_path) == 1  # the missing one is looked for again
    assert set(site.asked.values()) == {1}


def test_a_download_that_fails_is_a_row_with_a_reason_and_is_tried_again(tmp_path, site):
    site.files = {"/cut.png": png(), "/often.png": png(seed=1)}
    site.broken = {"/cut.png": 1, "/often.png": 99}
    listed(tmp_path, [(f"{site.url}/{name}.png", name) for name in ("cut", "often", "lost")])
    scan(tmp_path, workers=1)
    reasons = {path.rpartition("/")[2]: reason for path, reason in rejected(tmp_path).items()}
    assert reasons["lost.png"] == "unreadable: not downloaded: not found"
    assert reasons["often.png"].startswith("unreadable: not downloaded: ClientPayloadError")
    assert site.asked == {"/cut.png": 2, "/often.png": 3, "/lost.png": 1}

    site.broken, site.files["/lost.png"] = {}, png(seed=2)
    assert read(tmp_path) == 2
    assert rejected(tmp_path) == {}
    assert site.asked["/cut.png"] == 2


def test_a_service_that_is_down_costs_rows_not_the_scan(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/a.png"
    listed(tmp_path, [(url, "a"), ("s4://b/c.png", "b")])
    scan(tmp_path, workers=1)
    first, second = rejected(tmp_path).values()
    assert first.startswith("unreadable: not downloaded: ") and "onnect" in first
    assert second.startswith("unreadable: not downloaded: ") and "s4" in second


def test_a_dry_run_downloads_nothing_and_a_limit_no_more_than_it_lists(tmp_path, site, caplog):
    log.addHandler(caplog.handler)
    site.files = {f"/{name}.png": png() for name in "abc"}
    listed(tmp_path, [(f"{site.url}/{name}.png", name) for name in "abc"])
    try:
        [told] = scan(tmp_path, workers=1, dry_run=True).datasets
    finally:
        log.removeHandler(caplog.handler)
    assert told.rejected == {"not downloaded yet": 3}
    assert "3 images are not downloaded yet" in caplog.text
    assert not site.asked and not (tmp_path / "fetched").exists()

    opened = open_project(tmp_path)
    found = list_images(opened, opened.dataset("photos"), Asked(texts=False, stats=True, dry_run=False, limit=1))
    assert len(found.paths) == 3 and site.asked == {"/a.png": 1}


def test_urls_show_no_more_than_host_and_path(tmp_path, site):
    site.files = {"/a.png": png()}
    host = site.url.removeprefix("http://")
    listed(tmp_path, [(f"http://user:{SECRET}@{host}/{name}.png?sig={SECRET}", name) for name in "ab"])
    told = as_json(scan(tmp_path, workers=1))
    assert len(rejected(tmp_path)) == 1
    assert SECRET not in f"{told}{rows_of(tmp_path)}{[str(path) for path in tmp_path.rglob('*')]}"


def test_odd_urls_are_kept_under_names_that_files_can_have(tmp_path, site):
    site.files = {f"/{'n' * 300}.png": png(), "/a": png(seed=1), "/a/b.png": png(seed=2), "/up.png": png(seed=3)}
    listed(tmp_path, [(site.url + path, "x") for path in (f"/{'n' * 300}.png", "/a", "/a/b.png", "/../up.png")])
    scan(tmp_path, workers=1)
    assert [row.width for row in rows_of(tmp_path).values()] == [64, 64, None, 64]
    [reason] = rejected(tmp_path).values()
    assert "a part of its path is a file" in reason


def test_a_missing_column_of_a_list_is_told(tmp_path):
    listed(tmp_path, [("a.png", "x")], columns=("link", "text"))
    with pytest.raises(UserError, match=r"photos.csv: no column 'url'; it has link, text$"):
        scan(tmp_path, workers=1)
    listed(tmp_path, [("a.png", "x")], columns=("url", "caption"))
    with pytest.raises(UserError, match=r"photos.csv: no column 'text'; it has url, caption$"):
        scan(tmp_path, workers=1)


# A table beside the images


def tabled(folder, name, rows, **options):
    """Write a project of a folder of images and a table beside them."""
    table = {"path": f"tables/{name}", "filename_column": "file", "caption_column": "text", **options}
    entry = {"id": "photos", "instance_data_dir": "photos", "caption_strategy": "parquet", "parquet": table}
    if "width_column" in options:
        entry["metadata_backend"] = "parquet"
    project(folder, entry)
    for path in ("a.png", "sub/b.png", "sub/001.png"):
        (folder / "photos" / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / "photos" / path).write_bytes(png())
    (folder / "tables").mkdir(exist_ok=True)
    write_rows(folder / "tables" / name, rows)
    return folder


def write_rows(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, rows[0].keys())
            table.writeheader()
            table.writerows(rows)
    else:
        path.write_text("\n".join(map(json.dumps, rows)) if path.suffix == ".jsonl" else json.dumps(rows))


def captions_of(folder):
    return {path: row.captions for path, row in rows_of(folder).items()}


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "json", "csv"])
def test_a_table_names_images_with_or_without_their_extension(tmp_path, kind):
    rows = [{"file": "a", "text": "1.0"}, {"file": "sub/b.png", "text": "two\nlines"}, {"file": "sub/001", "text": "c"}]
    tabled(tmp_path, f"t.{kind}", rows)
    wanted = {"a.png": ["1.0"], "sub/001.png": ["c"], "sub/b.png": ["two\nlines"]}
    scan(tmp_path, workers=1)
    assert captions_of(tmp_path) == wanted
    assert {row.caption_source for row in rows_of(tmp_path).values()} == {"parquet"}

    whole = [{**row, "file": row["file"].removesuffix(".png") + ".png"} for row in rows]
    tabled(tmp_path, f"t.{kind}", whole, identifier_includes_extension=True)
    scan(tmp_path, workers=1)
    assert captions_of(tmp_path) == wanted


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_table_may_have_lists_structs_a_fallback_and_several_rows_of_an_image(tmp_path, kind):
    rows = [
        {"file": "a", "texts": {"list": ["x", "y"]}, "other": "no"},
        {"file": "a", "texts": {"list": ["z"]}, "other": "no"},
        {"file": "sub/b", "texts": {"list": []}, "other": "fallback"},
        {"file": "sub/001", "texts": {"list": None}, "other": None},
    ]
    tabled(tmp_path, f"t.{kind}", rows, caption_column=["texts.list"], fallback_caption_column="other")
    scan(tmp_path, workers=1)
    assert captions_of(tmp_path) == {"a.png": ["x", "y", "z"], "sub/001.png": [], "sub/b.png": ["fallback"]}
    assert rejected(tmp_path) == {"sub/001.png": "no caption: parquet has none"}


@pytest.mark.parametrize(
    ("kind", "sides"),
    [("parquet", [64, 96, 128]), ("parquet", ["64", "96", "128.0"]), ("parquet", [[64], [96], [128]]),
     ("csv", [64, 96, 128]), ("jsonl", [[64], "96", 128])],
)  # fmt: skip
def test_with_a_table_of_sizes_a_quick_look_opens_no_image(tmp_path, kind, sides):
    names = ("a", "sub/001", "sub/b")
    rows = [{"file": name, "text": "t", "w": side, "h": side} for name, side in zip(names, sides, strict=True)]
    tabled(tmp_path, f"t.{kind}", rows, width_column="w", height_column="h")
    for path in (tmp_path / "photos").rglob("*.png"):
        path.write_bytes(b"")  # whoever opens it finds no image
    assert read(tmp_path, hashed=False) == 0
    assert [(row.width, row.height) for row in rows_of(tmp_path).values()] == [(64, 64), (96, 96), (128, 128)]
    assert rejected(tmp_path) == {}
    assert read(tmp_path) == 3
    assert len(rejected(tmp_path)) == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.parquet", b"PAR1", "t.parquet: cannot be read: "),
        ("t.jsonl", b'{"file": "a", "text": "x"}\n{"file"', "t.jsonl: cannot be read: line 2: "),
        ("t.jsonl", b'{"file": "a", "caption": "x"}', "t.jsonl: no column 'text'; it has file, caption$"),
        ("t.csv", b"file,caption\na,x", "t.csv: no column 'text'; it has file, caption$"),
        ("t.csv", b"file,text\na,\xff", "t.csv: cannot be read: .*decode"),
        ("t.xlsx", b"", "t.xlsx: a table must be one of .parquet, .jsonl"),
        (None, b"", "photos/tables/t.parquet: the table that `parquet` names cannot be read: No such file"),
    ],
)
def test_a_table_that_cannot_be_read_is_told_in_one_line(tmp_path, name, content, message):
    tabled(tmp_path, "t.parquet", [{"file": "a", "text": "x"}], path=f"tables/{name or 't.parquet'}")
    (tmp_path / "tables" / "t.parquet").unlink()
    if name is not None:
        (tmp_path / "tables" / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as told:
        scan(tmp_path, workers=1)
    assert "\n" not in str(told.value)


# Buckets


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


def remote(folder, wire, bucket, files, **options):
    """Write a project of a bucket, and upload its files."""
    entry = {
        "id": "photos", "instance_data_dir": f"s3://{bucket}/set", "caption_strategy": "textfile",
        "aws_endpoint_url": wire.url, "aws_access_key_id": "AKIAEXAMPLE", "aws_secret_access_key": SECRET,
        "aws_region_name": "us-east-1", **options,
    }  # fmt: skip
    project(folder, {name: value for name, value in entry.items() if value is not None})
    put(wire, f"/{bucket}")
    for path, body in files.items():
        put(wire, f"/{bucket}/set/{path}", body)
    return folder


FILES = {"a.png": png(), "a.txt": b"one\ntwo", "sub/b [1].png": png(96, 64), "sub/b [1].txt": b"three", "notes.md": b""}


@pytest.mark.parametrize("kind", ["url", "aws"])
def test_a_bucket_is_scanned_as_a_folder_is_and_asked_only_for_what_is_new(tmp_path, wire, kind):
    bucket = f"first-{kind}"
    named = {"type": "aws", "aws_bucket_name": bucket, "aws_data_prefix": "set/", "instance_data_dir": None}
    remote(tmp_path, wire, bucket, FILES, **(named if kind == "aws" else {}))
    [summary] = scan(tmp_path, workers=1).datasets
    assert (summary.read, summary.ignored_files) == (2, 1)
    assert wire.bodies() == {f"GET {bucket}/set/{quote(path)}": 1 for path in FILES if path != "notes.md"}
    found = rows_of(tmp_path)
    assert [(path, row.captions, row.width) for path, row in found.items()] == [
        ("a.png", ["one", "two"], 64), ("sub/b [1].png", ["three"], 96)
    ]  # fmt: skip

    far = tmp_path / "near" / "photos"
    for path, body in FILES.items():
        (far / path).parent.mkdir(parents=True, exist_ok=True)
        (far / path).write_bytes(body)
    project(tmp_path / "near", {"id": "photos", "instance_data_dir": "photos", "caption_strategy": "textfile"})
    scan(tmp_path / "near", workers=1)
    for path, row in rows_of(tmp_path / "near").items():
        assert found[path].image_id == row.image_id
        assert found[path].geometry == row.geometry

    [again] = scan(tmp_path, workers=1).datasets
    assert (again.read, again.written, wire.bodies()) == (0, False, {})
    put(wire, f"/{bucket}/set/a.png", png(seed=5))  # of equal size, within the second
    put(wire, f"/{bucket}/set/a.txt", b"new")
    assert read(tmp_path) == 1
    assert sorted(wire.bodies()) == [f"GET {bucket}/set/a.png", f"GET {bucket}/set/a.txt"]
    assert rows_of(tmp_path)["a.png"].captions == ["new"]


def test_several_processes_read_a_bucket_alike(tmp_path, wire):
    files = {f"{number:03}.png": png(seed=number % 4) for number in range(80)}
    remote(tmp_path, wire, "processes", files, caption_strategy="filename")
    scan(tmp_path, workers=2)
    assert len(wire.bodies()) == 80
    found = rows_of(tmp_path)
    (tmp_path / "work" / "manifests" / "photos.parquet").unlink()
    scan(tmp_path, workers=1)
    assert rows_of(tmp_path) == found and rejected(tmp_path) == {}


def test_pairs_and_pixels_come_from_a_bucket(tmp_path, wire):
    remote(tmp_path, wire, "pixels", FILES, conditioning=[{"type": "superresolution"}])
    scan(tmp_path, workers=1)
    pairs(tmp_path, workers=1)
    opened = open_project(tmp_path)
    row = read_pairs(opened, opened.dataset("photos"))[0]
    np.testing.assert_array_equal(pixels_of(target_picture(opened, row)), pixels())
    assert pixels_of(reference_picture(opened, row, row.references[0])).shape == (64, 64, 3)

    put(wire, "/pixels/set/a.png", png(seed=9))
    assert pixels_of(target_picture(opened, row)).reason == "changed since prep scan"
    wire.down = True
    assert pixels_of(target_picture(opened, row)).reason.startswith("cannot be read: ")


@pytest.mark.parametrize("cut", [{"refusals": 2}, {"breaks": 3}])
def test_connections_that_are_cut_are_made_again(tmp_path, wire, cut):
    bucket = f"cut-{next(iter(cut))}"
    remote(tmp_path, wire, bucket, FILES)
    for name, count in cut.items():
        setattr(wire, name, count)
    assert read(tmp_path) == 2
    assert rejected(tmp_path) == {}
    assert [getattr(wire, name) for name in cut] == [0]


def test_a_service_that_is_down_is_one_error_before_reading_and_rows_with_reasons_after(tmp_path, wire, monkeypatch):
    remote(tmp_path, wire, "down", FILES)
    wire.down = True
    with pytest.raises(UserError, match=r"^s3://down/set: cannot be listed: ") as told:
        scan(tmp_path, workers=1)
    assert "\n" not in str(told.value) and SECRET not in str(told.value)
    assert not (tmp_path / "work" / "manifests" / "photos.parquet").exists()
    wire.down = False

    [system, _] = open_bucket(place_of(opened := open_project(tmp_path), opened.dataset("photos")))
    listed = type(system).find

    def find(*arguments, **options):
        found = listed(*arguments, **options)
        wire.down = True
        return found

    with monkeypatch.context() as patch:
        patch.setattr(type(system), "find", find)
        [summary] = scan(tmp_path, workers=1).datasets
    assert summary.kept == 0
    assert all(reason.startswith("unreadable: ") for reason in rejected(tmp_path).values())
    wire.down = False
    assert read(tmp_path) == 2
    assert rejected(tmp_path) == {}


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://no-such-bucket/set", "^s3://no-such-bucket/set: cannot be listed: The specified bucket does not exist$"),
        ("s3://empty/nowhere", "^s3://empty/nowhere: no file there; check the bucket and the folder in it$"),
        ("s4://bucket/set", "^s4://bucket/set: cannot be opened: Protocol not known: s4"),
        (f"ftp4://user:{SECRET}@host/set", "^ftp4://host/set: cannot be opened"),
    ],
)
def test_a_bucket_that_is_not_there_is_told_in_one_line(tmp_path, wire, url, message):
    remote(tmp_path, wire, "empty", {"a.png": png()}, instance_data_dir=url)
    with pytest.raises(UserError, match=message) as told:
        scan(tmp_path, workers=1)
    assert "\n" not in str(told.value) and SECRET not in str(told.value)


def test_secrets_show_nowhere(tmp_path, wire):
    remote(tmp_path, wire, "secrets", FILES)
    told = [as_json(scan(tmp_path, workers=1)), as_json(pairs(tmp_path, workers=1))]
    opened = open_project(tmp_path)
    place = place_of(opened, opened.dataset("photos"))
    told += [repr(place), place.name("a.png"), repr(target_picture(opened, read_pairs(opened, opened.datasets[0])[0]))]
    written = [file.read_bytes() for file in (tmp_path / "work").rglob("*") if file.is_file()]
    assert SECRET not in "".join(map(str, told)) and SECRET.encode() not in b"".join(written)


@pytest.mark.parametrize("where", ["beside", "url", "root"])
def test_a_table_may_lie_in_the_bucket(tmp_path, wire, where):
    file = io.BytesIO()
    rows = [
        {"file": "a", "text": "from the table", "w": 64, "h": 64},
        {"file": "sub/b [1]", "text": "x", "w": 96, "h": 64},
    ]
    pq.write_table(pa.Table.from_pylist(rows), file)
    path = {"beside": "t.parquet", "url": f"s3://table-{where}/set/t.parquet", "root": "t.parquet"}[where]
    table = {
        "path": path,
        "filename_column": "file",
        "caption_column": "text",
        "width_column": "w",
        "height_column": "h",
    }
    remote(tmp_path, wire, f"table-{where}", {**FILES, **({} if where == "root" else {"t.parquet": file.getvalue()})},
           caption_strategy="parquet", metadata_backend="parquet", parquet=table)  # fmt: skip
    if where == "root":
        (tmp_path / "t.parquet").write_bytes(file.getvalue())
    assert read(tmp_path, hashed=False) == 0
    assert captions_of(tmp_path) == {"a.png": ["from the table"], "sub/b [1].png": ["x"]}
    assert not [asked for asked in wire.bodies() if not asked.endswith("t.parquet")]


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_any_url_that_fsspec_reads_is_a_folder_of_images(tmp_path, scheme):
    url = f"memory://{tmp_path.name}" if scheme == "memory" else f"file://{tmp_path}/photos"
    project(tmp_path, {"id": "photos", "instance_data_dir": url, "caption_strategy": "textfile"})
    system, root = fsspec.core.url_to_fs(url)
    for path, body in FILES.items():
        system.makedirs(f"{root}/{path}".rpartition("/")[0], exist_ok=True)
        system.pipe_file(f"{root}/{path}", body)
    assert read(tmp_path) == 2
    assert captions_of(tmp_path) == {"a.png": ["one", "two"], "sub/b [1].png": ["three"]}
    assert read(tmp_path) == 0
    system.pipe_file(f"{root}/a.png", png(128, 64))
    assert read(tmp_path) == 1
    pairs(tmp_path, workers=1)


def test_a_web_page_of_links_is_a_folder_of_images(tmp_path, site):
    site.files = {"/set": b'<a href="a.png">a</a> <a href="b.png">b</a>', "/a.png": png(), "/b.png": png(seed=1)}
    site.files |= {f"/set{path}": body for path, body in site.files.items() if path != "/set"}
    site.files["/set/"] = site.files["/set"]
    project(tmp_path, {"id": "photos", "instance_data_dir": f"{site.url}/set/"})
    assert read(tmp_path) == 2
    assert [(path, row.reject) for path, row in rows_of(tmp_path).items()] == [("a.png", None), ("b.png", None)]
