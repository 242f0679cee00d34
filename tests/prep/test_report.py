import base64
import json
import os
import re
import shutil
import subprocess
import time
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from families import open_project
from prep.page.charts import words
from prep.page.pictures import spread
from prep.report import report
from prep.showing import clipped, visible
from schemas.errors import UserError
from schemas.project import Project
from schemas.rows import ImageRow, arrow_schema
from schemas.tables import Provenance, write_table

KEPT = ImageRow(
    dataset_id="photos", path="a.jpg", image_id="0" * 32, size_bytes=9, mtime_ns=9, width=1200, height=800,
    orientation=1, format="JPEG", mode="RGB", bits=8, frames=1, alpha=False, icc=False, phash=None, face=[],
    examined=None, fault=None, captions=["a red barn"], caption_source="textfile", caption_size_bytes=9,
    caption_mtime_ns=9, bucket="320x256", target_width=320, target_height=256, intermediary_width=384,
    intermediary_height=256, crop_top=0, crop_left=32, reject=None,
)  # fmt: skip

VOID = {"meta", "img", "br", "input", "link"}


class Page(HTMLParser):
    """The elements of a page, and its text; fails on a tag that closes another."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []  # (tags it is in, text)
        self._open: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.texts.append((" ".join(self._open), " ".join(data.split())))

    def attributes(self, tag, **wanted):
        return [found for name, found in self.tags if name == tag and wanted.items() <= found.items()]

    @property
    def text(self):
        return " ".join(text for place, text in self.texts if "script" not in place and "style" not in place)

    @property
    def figures(self):
        """Every name of a definition list with the texts that follow it, in order."""
        found = []
        for place, text in self.texts:
            if place.split()[-1] == "dt" or "dt bdi" in place:
                found.append((text, []))
            elif "dd" in place.split() and found:
                found[-1][1].append(text)
        return found


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """One dataset, `photos`, at 256 pixels; nothing scanned."""
    return project_of(tmp_path / "barns", [{}])


def project_of(folder: Path, datasets: list[dict[str, object]], **options: object) -> Project:
    folder.mkdir(exist_ok=True)
    (folder / "photos").mkdir(exist_ok=True)
    first = {"id": "photos", "type": "local", "instance_data_dir": "photos", "resolution": 256}
    config = {"model_family": "flux", "pretrained_model_name_or_path": "tiny", "max_train_steps": 1, **options}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "multidatabackend.json").write_text(json.dumps([first | dataset for dataset in datasets]))
    return open_project(folder)


def rejected(path: str, reason: str, **changes: object) -> ImageRow:
    nothing = dict.fromkeys(
        [
            "bucket",
            "target_width",
            "target_height",
            "intermediary_width",
            "intermediary_height",
            "crop_top",
            "crop_left",
        ]
    )
    return replace(KEPT, path=path, reject=reason, **nothing, **changes)


def write(project: Project, rows: list[ImageRow] | pa.Table, dataset: str = "photos", **changes: object) -> None:
    provenance = replace(Provenance(project.scan_settings(project.dataset(dataset)), "inputs"), **changes)
    write_table(project.manifest(dataset), rows, ImageRow, provenance)


def draw(project: Project, path: str, size: tuple[int, int], colour: str = "teal") -> None:
    Image.new("RGB", size, colour).save(project.root / "photos" / path)


def page_of(project: Project, **options: object) -> Page:
    return Page(Path(report(project, **options).path))


def test_without_a_manifest_the_command_that_makes_one_is_named(project):
    with pytest.raises(UserError, match=re.escape(project.command("prep scan"))):
        report(project)
    assert not (project.workspace / "report.html").exists()


def test_the_summary_says_what_was_written(project, tmp_path):
    write(project, [KEPT])
    summary = report(project)
    assert summary.path == str(project.workspace / "report.html")
    assert summary.size_bytes == Path(summary.path).stat().st_size
    assert (summary.datasets, summary.warnings, summary.command) == (("photos",), (), "prep report")
    assert summary.path in " ".join(summary.lines())
    assert report(project, output=tmp_path / "other" / "page.html").path == str(tmp_path / "other" / "page.html")
    assert (tmp_path / "other" / "page.html").read_bytes() == Path(summary.path).read_bytes()


def test_the_page_is_one_file_that_asks_for_nothing(project):
    draw(project, "a.jpg", (1200, 800))
    write(project, [KEPT, rejected("b.jpg", "too small: 3x3, need 64", captions=["see https://example.org/x.png"])])
    page = page_of(project)
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "image", "use")
        for name in ("src", "href", "xlink:href", "srcset", "action", "data"):
            assert attributes.get(name, "#").startswith(("#", "data:image/jpeg;base64,"))
        assert "url(" not in attributes.get("style", "")
    [style] = [text for place, text in page.texts if place.endswith("style")]
    assert "url(" not in style and "@import" not in style and "http" not in style
    [policy] = page.attributes("meta", **{"http-equiv": "Content-Security-Policy"})
    assert policy["content"].startswith("default-src 'none'")


HOSTILE = [
    "<script>alert(1)</script>.jpg", "\"quoted\" 'single' & <b>.jpg", "new\nline\r\x07.jpg", "gpj.\u202eevil.jpg",
    "{{ 7 * 7 }}{% raw %}.jpg", "</style></title><!--.jpg", "x" * 3000, "javascript:alert(1)", "שלום.jpg", "\ufeff.jpg",
]  # fmt: skip


@pytest.mark.parametrize("hostile", HOSTILE)
def test_what_comes_from_the_data_is_shown_as_it_is_spelled(project, hostile):
    rows = [replace(KEPT, path=hostile, captions=[hostile]), replace(KEPT, path="z.jpg", captions=[hostile, ""])]
    write(project, [*rows, rejected(hostile, f"{hostile}: {hostile}", format=hostile)])
    page = page_of(project)
    assert len(page.attributes("script")) == len(page.attributes("style")) == 1
    assert not {tag for tag, _ in page.tags} & {"b", "iframe", "object"}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert page.text.count(" ".join(visible(hostile)[:30].split())) >= 4  # path and caption, kept and rejected
    assert not re.search("[\u202e\ufeff\x07\r]", page.source)


def test_a_dataset_and_a_folder_may_have_odd_names(tmp_path):
    project = project_of(tmp_path / "a <b> & 'c'", [{"id": "i & 'x' \u202e"}])
    write(project, [KEPT], project.scanned[0].id)
    page = page_of(project)
    assert "a <b> & 'c'" in page.text and "i & 'x' \\u202e" in page.text


def test_the_figures_are_those_of_the_manifest(project):
    small = {"width": 300, "height": 200, "format": "PNG", "alpha": True, "frames": 4, "captions": []}
    enlarged = replace(KEPT, path="small.png", image_id="1" * 32, **small)
    turned = {"orientation": 6, "icc": True, "bits": 16, "mode": "CMYK", "captions": ["one two", "a red barn"]}
    moving = rejected("moving.gif", "animation: 4 pictures", format="GIF", frames=4, captions=[])
    unread = rejected("cut.jpg", "unreadable: cut short", width=None, height=None, mode=None, format=None, icc=None)
    write(project, [KEPT, enlarged, replace(KEPT, path="turned.jpg", **turned), moving, unread])
    figures = page_of(project).figures
    shown = dict(figures[4:])  # the head has four totals
    assert figures[:4] == [("dataset", ["1"]), ("images", ["5"]), ("kept", ["3"]), ("rejected", ["2"])]
    assert (shown["seen"], shown["kept"], shown["rejected"]) == (["5"], ["3"], ["2"])
    assert shown["captions"] == ["3"]
    assert shown["buckets"] == ["1"]
    assert shown["enlarged"] == ["1", "33.3% of the kept"]
    assert shown["megapixels"][0] == "1.98"
    assert [shown[name] for name in ("JPEG", "PNG", "GIF", "unknown")] == [["2"], ["1"], ["1"], ["1"]]
    odd = ("turned by EXIF", "transparent", "colour profile", "CMYK", "more than 8 bits", "animated")
    assert [shown[name] for name in (*odd, "same bytes as another")] == [["1"]] * 7
    assert shown["images with captions"] == ["2"] and shown["without"] == ["1"]
    assert shown["captions per image, median"] == ["1", "0 to 2"]
    assert shown["words, median"] == ["3", "2 to 3"]
    assert shown["different captions"] == ["2"]


def test_buckets_say_how_full_their_last_batch_is(tmp_path):
    project = project_of(tmp_path / "batches", [{"repeats": 1}], train_batch_size=4)
    wide = replace(KEPT, bucket="512x128", target_width=512, target_height=128)
    tall = replace(KEPT, bucket="128x512", target_width=128, target_height=512)
    write(project, [replace(wide, path=f"w{number}") for number in range(3)] + [replace(tall, path="t")])
    texts = [text for place, text in page_of(project).texts if "tbody tr" in place]
    assert texts[:8] == ["128×512", "1", "1", "2 of 4", "512×128", "3", "2", "2 of 4"]


def test_references_have_no_batches_of_their_own(tmp_path):
    reference = {"id": "gray", "conditioning_type": "reference_strict", "caption_strategy": None}
    project = project_of(tmp_path / "pairs", [{"conditioning_data": ["gray"]}, reference])
    write(project, [replace(KEPT, captions=[], caption_source=None)], "gray")
    page = page_of(project)
    assert "last batch" not in page.text
    assert "None of the 1 kept images has a caption: caption_strategy is null" in page.text
    assert "Not scanned yet; run: prep scan" in page.text  # the other one


def test_a_crop_box_lies_where_training_cuts(project):
    draw(project, "a.jpg", (1200, 800))
    write(project, [KEPT])
    # 1200x800 becomes 384x256, of which 320 columns from 32 on stay: one column is 3.125 of the picture's.
    page = page_of(project)
    [box] = page.attributes("rect", **{"class": "crop"})
    assert (box["x"], box["y"], box["width"], box["height"]) == ("100.0", "0.0", "1000.0", "800.0")
    assert page.attributes("svg", viewbox="0 0 1200 800")
    assert "1200×800 → 320×256" in page.text and "×0.32" in page.text


def test_a_picture_that_is_used_whole_has_no_box(project):
    whole = {"intermediary_width": 320, "intermediary_height": 256, "crop_left": 0, "width": 320, "height": 256}
    draw(project, "a.jpg", (320, 256))
    write(project, [replace(KEPT, **whole)])
    page = page_of(project)
    assert page.attributes("rect", **{"class": "crop"}) == []
    assert "▲" not in page.text


def test_an_upscale_is_marked(project):
    write(project, [replace(KEPT, width=300, height=200)])
    assert "▲ enlarged ×1.28" in page_of(project).text


def test_a_picture_that_only_grows_wider_counts_as_enlarged(project):
    write(project, [replace(KEPT, width=320, height=300), replace(KEPT, path="b.jpg", width=384, height=256)])
    page = page_of(project)
    assert dict(page.figures[4:])["enlarged"] == ["1", "50.0% of the kept"]
    assert page.text.count("▲ enlarged") == 1


def test_as_many_kept_images_are_shown_as_asked_for(project):
    rows = [replace(KEPT, path=f"{number}.jpg") for number in range(9)]
    write(project, [*rows, rejected("r.jpg", "too small: 3x3, need 64")])
    page = page_of(project, thumbnails=4)
    assert page.text.count("1200×800 → 320×256") == 4
    assert "4 of 9 kept images" in page.text and page.text.endswith("and 5 more")
    assert "What training sees" not in page_of(project, thumbnails=0).text


def test_a_thumbnail_shows_the_whole_upright_picture(project):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (800, 1200), "teal").save(project.root / "photos" / "a.jpg", exif=exif)
    write(project, [KEPT])
    [image] = page_of(project).attributes("img")
    data = base64.b64decode(image["src"].removeprefix("data:image/jpeg;base64,"))
    assert Image.open(BytesIO(data)).size == (288, 192)
    assert image["alt"] == "a red barn"


def test_a_file_that_is_gone_or_broken_is_a_place_holder_with_a_reason(project):
    (project.root / "photos" / "broken.jpg").write_bytes(b"no picture")
    write(project, [KEPT, replace(KEPT, path="broken.jpg"), rejected("r\x00.jpg", "unreadable: cut short")])
    page = page_of(project)
    assert page.attributes("img") == []
    assert page.text.count("no picture") == 3
    assert "cannot be read: No such file or directory" in page.text and "unreadable: " in page.text


def test_what_is_too_large_to_be_opened_is_not(project):
    draw(project, "a.jpg", (120, 80))
    write(project, [rejected("a.jpg", "too large: 400 megapixels", width=20000, height=20000)])
    assert page_of(project).attributes("img") == []


def test_rejects_are_counted_by_kind_and_shown_by_turns(project):
    small = [rejected(f"small {number:03}", f"too small: {number}x9, need 64") for number in range(100)]
    write(project, [*small, rejected("odd", "unreadable: cut short"), rejected("plain", "no colon in it")])
    page = page_of(project)
    texts = [text for place, text in page.texts if "tbody tr" in place]
    assert texts[:6] == ["too small", "100", "no colon in it", "1", "unreadable", "1"]
    assert "and 78 more" in page.text
    shown = [text for text in texts if text.startswith("small ")]
    assert len(shown) == 22 and shown[0] == "small 000" and shown == sorted(shown) and shown[-1] > "small 090"
    assert "odd" in texts and "plain" in texts and "No image was kept." in page.text


def test_frequent_and_long_captions_and_images_without_are_listed(project):
    often = [replace(KEPT, path=f"o{number}", captions=["colour this"]) for number in range(3)]
    silent = [replace(KEPT, path=f"s{number:02}", captions=[], caption_source=None) for number in range(15)]
    write(project, [*often, replace(KEPT, path="long", captions=["word " * 500]), *silent])
    page = page_of(project)
    assert "3× colour this" in page.text
    assert "500 words word word" in page.text and "(2,500 characters)" in page.text
    assert "s11 and 3 more" in page.text and "s12" not in page.text.partition("What training sees")[0]


def test_the_histogram_of_words_counts_every_caption():
    lengths = np.array([1, 1, 2, 5, 900], dtype=np.int64)
    chart = words(lengths)
    told = [int(bar.title.rpartition(": ")[2]) for bar in chart.bars]
    assert sum(told) == 5 and told[1] == 2 and chart.highest == 2
    assert chart.bars[-1].title.endswith("or more words: 1")


def test_thumbnails_are_spread_over_all_buckets():
    column = pa.chunked_array([["a"] * 90, ["b"] * 6 + [None] * 3, ["c"]])
    chosen = spread(column, ["a", "b", "c"], 12).tolist()
    values = column.to_pylist()
    assert [sum(values[at] == name for at in chosen) for name in "abc"] == [6, 5, 1]
    assert [at for at in chosen if at < 90] == [0, 15, 30, 45, 60, 75]
    assert spread(column, ["a", "b", "c"], 2).tolist() == [0, 90]  # of the largest first
    assert len(spread(column, ["a", "b", "c"], 1000)) == 97
    assert len(spread(column, [], 5)) == len(spread(column, ["a"], 0)) == 0


def test_the_same_manifests_make_the_same_page(project):
    draw(project, "a.jpg", (1200, 800))
    write(project, [KEPT, rejected("b.jpg", "too small: 3x3, need 64")])
    first = Path(report(project).path).read_bytes()
    assert Path(report(project).path).read_bytes() == first


def test_an_empty_manifest_is_said_to_be_empty(project):
    write(project, [])
    assert "No image file was found." in page_of(project).text


def test_a_stale_manifest_is_shown_and_called_so(project):
    write(project, [KEPT], config="of other settings", limit=1, hashed=False)
    summary = report(project)
    page = Page(Path(summary.path))
    notices = [text for place, text in page.texts if place.endswith("section p") and "run: " in text]
    assert notices[0].startswith("Its settings changed since it was scanned")
    assert notices[0].endswith(project.command("prep scan"))
    assert "Only its first 1 files were scanned (--limit)" in page.text and "--no-hash" in page.text
    assert len(summary.warnings) == 3
    assert dict(page.figures[4:])["seen"] == ["1"]


def test_a_manifest_that_cannot_be_read_is_called_so(project):
    project.manifest("photos").parent.mkdir(parents=True)
    project.manifest("photos").write_bytes(b"no table")
    summary = report(project)
    assert summary.datasets == ()
    assert "Its manifest cannot be read; run: prep scan" in Page(Path(summary.path)).text


def test_the_page_stays_small_whatever_its_pictures_are(project):
    rng = np.random.default_rng(0)
    for number in range(60):
        noise = Image.fromarray(rng.integers(0, 256, (192, 320, 3), dtype=np.uint8))
        noise.save(project.root / "photos" / f"{number}.png", compress_level=1)
    write(project, [replace(KEPT, path=f"{number}.png", width=320, height=192) for number in range(60)])
    assert report(project).size_bytes < 3_000_000


def test_a_hundred_thousand_rows_take_seconds(project):
    count = 100_000
    rng = np.random.default_rng(0)
    width, height = rng.integers(64, 4096, (2, count))
    columns = {name: [getattr(KEPT, name)] * count for name in arrow_schema(ImageRow).names}
    columns |= {"path": [f"{at}.jpg" for at in range(count)], "width": width, "height": height}
    columns |= {"captions": [[f"caption {at % 777} of this"] for at in range(count)]}
    columns |= {"reject": [f"odd {at}: 7" if at % 9 == 0 else None for at in range(count)]}
    columns |= {"bucket": [None if at % 9 == 0 else "320x256" for at in range(count)]}
    schema = arrow_schema(ImageRow)
    write(project, pa.table({name: pa.array(columns[name], schema.field(name).type) for name in columns}, schema))
    start = time.monotonic()
    summary = report(project)
    assert time.monotonic() - start < 10  # one on an idle machine
    assert summary.size_bytes < 3_000_000
    page = Page(Path(summary.path))
    assert dict(page.figures[4:])["rejected"] == ["11,112"]
    assert "and 11,072 more reasons" in page.text and "Sizes that are about the same share a mark." in page.text


def test_what_cannot_be_seen_is_spelled_out():
    assert visible("a\nb\u202ec\u200d\x00\ud800") == "a\\nb\\u202ec\u200d\\x00\\ud800"
    assert clipped("abcdefghij", 6, 2) == "abc…ij"
    assert clipped("abcdef", 6, 2) == "abcdef"


BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)


@pytest.mark.skipif(not BROWSER, reason="needs a Chromium")
def test_a_telephone_shows_the_page_without_scrolling_sideways(project, tmp_path):
    draw(project, "a.jpg", (1200, 800))
    long = [replace(KEPT, path=path, captions=[path]) for path in HOSTILE]
    write(project, [KEPT, *long, *(rejected(path, f"{path}: {path}") for path in HOSTILE)])
    page = Path(report(project).path)
    (tmp_path / "frame.html").write_text(
        f"""<body><iframe src="{page.as_uri()}" width="375" height="800" style="border:0"></iframe><script>
        const frame = document.querySelector("iframe");
        frame.onload = () => {{
          const inside = frame.contentDocument, field = inside.querySelector(".filter");
          document.body.textContent = `${{inside.documentElement.scrollWidth}} ${{field.hidden}}`;
        }};
        </script>"""
    )
    command = [
        BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        "--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'browser'}", "--enable-logging=stderr",
        "--virtual-time-budget=5000", "--dump-dom", (tmp_path / "frame.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "HOME": str(tmp_path)}
    )
    found = re.search(r"<body>(\d+) (\w+)", done.stdout)
    assert found is not None, done.stdout[-500:] + done.stderr[-500:]
    assert int(found[1]) <= 375
    assert found[2] == "false"  # the script ran: its policy lets it
    assert "CONSOLE" not in done.stderr


def test_what_is_no_file_is_never_opened_for_its_picture(tmp_path):
    (tmp_path / "photos").mkdir()
    os.mkfifo(tmp_path / "photos" / "pipe.jpg")
    (tmp_path / "config.json").write_text('{"pretrained_model_name_or_path": "tiny"}')
    (tmp_path / "multidatabackend.json").write_text('[{"id": "photos", "instance_data_dir": "photos"}]')
    from prep.scan import scan

    scan(tmp_path, workers=1)
    assert "unreadable: not a regular file" in Path(report(tmp_path).path).read_text()
