import base64
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from families import open_project
from prep.page.charts import words
from prep.page.pictures import spread
from prep.pairs import pairs
from prep.report import report
from prep.scan import scan
from prep.showing import visible
from schemas.errors import UserError
from schemas.project import Project
from schemas.rows import ImageRow, PairRow, arrow_schema, as_columns
from schemas.tables import Provenance, read_provenance, read_table, write_table

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


BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)


def shown(page: Path, tmp_path: Path, width: int, script: str) -> str:
    """Open a page in a frame of a width; return what a script finds in its document `inside`."""
    (tmp_path / "frame.html").write_text(
        f"""<body><iframe src="{page.as_uri()}" width="{width}" height="800" style="border:0"></iframe><script>
        const frame = document.querySelector("iframe");
        frame.onload = () => {{
          const inside = frame.contentDocument;
          document.body.textContent = (() => {{ {script} }})();
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
    found = re.search(r"<body>(.*)</body>", done.stdout, re.DOTALL)
    assert found is not None and "iframe" not in found[1], done.stdout[-500:] + done.stderr[-500:]
    assert "CONSOLE" not in done.stderr, done.stderr[-500:]
    return found[1].strip()


@pytest.mark.skipif(not BROWSER, reason="needs a Chromium")
def test_a_telephone_shows_the_page_without_scrolling_sideways(project, tmp_path):
    draw(project, "a.jpg", (1200, 800))
    long = [replace(KEPT, path=path, captions=[path]) for path in HOSTILE]
    write(project, [KEPT, *long, *(rejected(path, f"{path}: {path}") for path in HOSTILE)])
    page = Path(report(project).path)
    found = shown(
        page, tmp_path, 375,
        "return `${inside.documentElement.scrollWidth} ${inside.querySelector('.filter').hidden}`",
    )  # fmt: skip
    width, hidden = found.split()
    assert int(width) <= 375
    assert hidden == "false"  # the script ran: its policy lets it


def test_what_is_no_file_is_never_opened_for_its_picture(tmp_path):
    (tmp_path / "photos").mkdir()
    os.mkfifo(tmp_path / "photos" / "pipe.jpg")
    (tmp_path / "config.json").write_text('{"pretrained_model_name_or_path": "tiny"}')
    (tmp_path / "multidatabackend.json").write_text('[{"id": "photos", "instance_data_dir": "photos"}]')
    scan(tmp_path, workers=1)
    assert "unreadable: not a regular file" in Path(report(tmp_path).path).read_text()


# Pairs

REFERENCES = {"type": "local", "dataset_type": "conditioning", "caption_strategy": None, "resolution": 256}
STRICT = {**REFERENCES, "conditioning_type": "reference_strict"}
TARGETS = {"on_unpaired": "drop", "identical_references": "keep", "alignment_check": {"enabled": False}}
BLURRED = {"type": "superresolution", "blur_radius": 3.0, "jpeg_quality": 40}


def textured(path: Path, size: tuple[int, int] = (320, 256), seed: int = 0, channel: int | None = None) -> None:
    """Draw a picture with detail, in colour or the gray of one of its channels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC))
    Image.fromarray(pixels if channel is None else pixels[:, :, channel]).save(path)


def pairs_of(
    folder: Path, targets: dict[str, object], *others: dict[str, object], count: int = 2, **how: object
) -> Project:
    """Make a project of `count` targets and of references with the same names, scan and pair it."""
    named = [{**other, "instance_data_dir": str(other["id"])} for other in others]
    for other in named:
        (folder / str(other["id"])).mkdir(parents=True)
    listed = {"conditioning_data": [other["id"] for other in named]} if named else {}
    project = project_of(folder, [{**TARGETS, **listed, **targets}, *named])
    for number in range(count):
        textured(folder / "photos" / f"{number}.png", seed=number, **how)
        for other in named:
            textured(folder / str(other["id"]) / f"{number}.png", seed=number, channel=1, **how)
    scan(project, workers=1)
    pairs(project, workers=1)
    return project


def altered(
    project: Project, change: Callable[[list[PairRow]], list[PairRow]], dataset: str = "photos", **provenance: object
) -> None:
    """Write a pair table anew with other rows."""
    path = project.pair_table(dataset)
    made = read_provenance(path, PairRow)
    write_table(path, change(read_table(path, PairRow)), PairRow, replace(made, **provenance))


def lying(row: PairRow, shift: float, confidence: float = 1.0, **changes: object) -> PairRow:
    """Say of the first reference of a row how it lies."""
    numbers = {"shift_x": shift, "shift_y": 0.0, "scale": 1.0, "similarity": 0.8, "confidence": confidence}
    return replace(row, references=[replace(row.references[0], **numbers), *row.references[1:]], **changes)


def notices_of(page: Page) -> list[str]:
    return [text for place, text in page.texts if place.endswith("section p") and "prep " in text]


def test_a_project_that_was_not_paired_has_no_pairs_on_its_page(project):
    write(project, [KEPT])
    page = page_of(project)
    assert not page.attributes("section", id="pairs-1") and "pairs" not in dict(page.figures)


def test_the_figures_of_pairs_are_those_of_their_table(tmp_path):
    made = pairs_of(tmp_path / "p", {"conditioning": {**BLURRED, "variants": 2}}, {**STRICT, "id": "gray"}, count=3)

    def change(rows):
        far, near, *others, last = [lying(row, 0.1, variants=2) for row in rows]
        return [lying(far, 9.0), near, *others, replace(last, reject="no reference: gray has none", references=[])]

    altered(made, change)
    page = page_of(made)
    figures = page.figures
    assert figures[4:7] == [("pairs", ["5"]), ("targets not paired", ["1"]), ("misaligned references", ["1"])]
    start = [name for name, _ in figures].index("targets")
    assert dict(figures[start:]) == {
        "targets": ["3"], "pairs": ["5"], "rejected": ["1"], "references per pair": ["2"],
        "variants of a target": ["2", "shown in turn, epoch by epoch"], "misaligned": ["1", "of 3 compared"],
        "gray": ["5", "files, cropped like the target"],
        "photos_conditioning_superresolution": ["5", "made of the target: superresolution"],
    }  # fmt: skip
    assert "no reference: gray has none" in page.text
    assert "variant 1 of 2" in page.text


def test_a_reference_can_be_slid_over_its_target_and_its_difference_stands_beside(tmp_path):
    page = page_of(pairs_of(tmp_path / "p", {}, {**STRICT, "id": "gray"}, count=1))
    [slider] = page.attributes("input", type="range")
    assert len(page.attributes("label", **{"for": slider["id"]})) == 1
    assert "hidden" in slider  # until a script can move it
    before, after, apart = [one for one in page.attributes("img") if "class" in one]
    assert (before["alt"], after["alt"]) == ("reference of 0.png", "target 0.png")
    assert apart["alt"].startswith("difference") and apart["alt"] in page.text
    sizes = [Image.open(BytesIO(base64.b64decode(one["src"].partition(",")[2]))).size for one in (before, after, apart)]
    assert sizes == [(256, 256)] * 3  # as the model sees them


def test_a_large_picture_is_shown_in_a_part_pixel_for_pixel_where_it_differs_most(tmp_path):
    made = pairs_of(
        tmp_path / "p", {"resolution": 768}, {**STRICT, "id": "gray", "resolution": 768}, count=1, size=(768, 768)
    )
    target = Image.open(made.root / "photos" / "0.png")
    spotted = np.asarray(target).copy()
    spotted[600:640, 500:560] = 255 - spotted[600:640, 500:560]
    Image.fromarray(spotted).save(made.root / "gray" / "0.png")
    scan(made, workers=1)
    pairs(made, workers=1)
    page = page_of(made)
    assert len(page.attributes("input", type="range")) == 2
    *_, detail = page.attributes("img", **{"class": "one"})
    pixels = np.asarray(Image.open(BytesIO(base64.b64decode(detail["src"].partition(",")[2]))).convert("L"), np.int64)
    assert pixels.shape == (180, 240)
    assert 40 * 60 * 0.9 < (pixels > 20).sum() < 40 * 60 * 1.3  # all of what was changed, and nothing else


def test_the_numbers_of_a_degradation_are_told_step_by_step(tmp_path):
    made = pairs_of(tmp_path / "p", {"conditioning": BLURRED}, count=1)
    steps = json.dumps([{"step": "blur", "kernel": "gaussian", "sigma": 1.8312}, {"step": "jpeg", "quality": 23}])
    altered(made, lambda rows: [replace(row, references=[replace(row.references[0], realised=steps)]) for row in rows])
    items = [text for place, text in page_of(made).texts if "ol li" in place and "texts" not in place]
    assert items[-4:] == ["blur", "gaussian, sigma 1.831", "jpeg", "quality 23"]


def test_a_set_of_references_says_what_it_is_made_by(tmp_path):
    made = pairs_of(tmp_path / "p", {"conditioning": [BLURRED, {"type": "chain", "preset": "web-jpeg"}]}, count=1)
    figures = dict(page_of(made).figures)
    assert figures["photos_conditioning_superresolution"] == ["1", "made of the target: superresolution"]
    assert figures["photos_conditioning_chain"] == ["1", "made of the target: web-jpeg"]


def test_prompts_are_the_drawn_one_and_how_many_others(tmp_path):
    made = pairs_of(
        tmp_path / "p", {"conditioning": {**BLURRED, "captions": ["deblur", "sharpen", "undo the blur"]}}, count=1
    )
    [row] = read_table(made.pair_table("photos"), PairRow)
    page = page_of(made)
    texts = [text for place, text in page.texts if "details" in place]
    assert texts[0] == "2 other prompts"
    assert sorted([row.prompt, *texts[1:]]) == ["deblur", "sharpen", "undo the blur"]
    assert [text for place, text in page.texts if place.endswith("p bdi") and text == row.prompt]


def test_three_references_are_each_held_against_the_target(tmp_path):
    made = pairs_of(tmp_path / "p", {}, *({**STRICT, "id": name} for name in ("one", "two", "three")), count=1)
    page = page_of(made)
    assert len(page.attributes("input", type="range")) == 3
    assert len(page.attributes("li", **{"class": "several"})) == 1
    assert [one["alt"] for one in page.attributes("img", **{"class": "before"})] == [
        f"reference {number} of 0.png" for number in (1, 2, 3)
    ]
    altered(made, lambda rows: [replace(row, references=row.references * 3) for row in rows])
    assert "and 5 more references" in page_of(made).text


def test_a_loose_reference_of_another_size_stands_beside_its_target(tmp_path):
    made = pairs_of(
        tmp_path / "p",
        {},
        {**REFERENCES, "id": "loose", "conditioning_type": "reference_loose"},
        count=1,
        size=(640, 256),
    )
    Image.new("RGB", (8, 8), "teal").save(made.root / "loose" / "0.png")
    scan(made, workers=1)
    pairs(made, workers=1)
    page = page_of(made)
    assert page.attributes("input", type="range") == []
    assert "reference · 256×256" in page.text and "difference" not in page.text


def test_a_pair_without_reference_is_its_target_and_called_so(tmp_path):
    page = page_of(pairs_of(tmp_path / "p", {}, count=1))
    assert "no reference: plain text-to-image" in page.text
    assert page.attributes("img", alt="target 0.png") and not page.attributes("input", type="range")
    assert dict(page.figures)["without a reference"] == ["1", "plain text-to-image"]


def test_references_stand_in_the_order_in_which_they_lie_worst(tmp_path):
    check = {"enabled": False, "maximum_shift": 0.6, "maximum_scale": 0.004}
    made = pairs_of(tmp_path / "p", {"alignment_check": check}, {**STRICT, "id": "gray"}, count=6)
    shifts = [(0.2, 1.0), (4.0, 1.0), (0.0, 0.3), (0.4, 1.0), (30.0, 1.0), (0.0, 0.0)]

    def change(rows):
        rows = [lying(row, *how) for row, how in zip(rows, shifts, strict=True)]
        another = replace(rows[5].references[0], similarity=0.02)
        return [*rows[:5], replace(rows[5], references=[another])]

    altered(made, change)
    page = page_of(made)
    verdicts = [one for one in page.attributes("p") if one.get("class", "").startswith("verdict")]
    assert [one["class"] for one in verdicts[6:]] == ["verdict accused"] * 3 + ["verdict"] * 3
    told = page.text.partition("Worst aligned")[2]
    places = [told.index(path) for path in ("5.png", "4.png", "1.png", "3.png", "0.png", "2.png")]
    assert places == sorted(places)
    assert "shows another picture (similarity 0.02)" in told
    assert "shifted 30.0 px right, 0.0 px down" in told and "+30.00, +0.00 px" in told
    assert "3 of 6 compared references do not lie on their targets. Allowed are 0.6 px and 0.4% of size" in told


def test_all_that_is_misaligned_is_named_though_not_all_of_it_is_shown(tmp_path):
    made = pairs_of(tmp_path / "p", {"on_unpaired": "drop"}, {**STRICT, "id": "gray"}, count=1)
    altered(
        made, lambda rows: [lying(rows[0], 5.0 + at, sample_id=f"{at}", target_path=f"{at}.png") for at in range(300)]
    )
    page = page_of(made)
    rows = [text for place, text in page.texts if place.endswith("tbody tr td bdi") and re.fullmatch(r"\d+\.png", text)]
    shown = [one for one in page.attributes("p") if one.get("class") == "verdict accused"]
    assert len(shown) == 24 + 24  # of the pairs, and of the worst
    assert rows[0] == "275.png" and len([text for text in rows if text != "0.png"]) == 200
    assert "and 76 more; all of them are in" in page.text and str(made.pair_report("photos")) in page.text


def test_references_that_were_not_compared_are_not_called_aligned(tmp_path):
    page = page_of(pairs_of(tmp_path / "p", {}, {**STRICT, "id": "gray"}, count=1))
    assert "Worst aligned" not in page.text and "misaligned" not in page.text


@pytest.mark.parametrize("hostile", HOSTILE)
def test_what_a_pair_says_is_shown_as_it_is_spelled(hostile, tmp_path):
    made = pairs_of(tmp_path / "p", {"conditioning": BLURRED}, {**STRICT, "id": "gray"}, count=2)

    def change(rows):
        steps = json.dumps([{"step": hostile, hostile: hostile}])
        odd = lying(rows[0], 9.0, target_path=hostile, prompt=hostile, prompts=[hostile, hostile, "x"])
        own, blurred = odd.references
        own = replace(own, path=hostile, prompts=[hostile])
        odd = replace(odd, references=[own, replace(blurred, realised=steps)])
        return [odd, replace(rows[1], target_path=hostile, reject=f"{hostile}: {hostile}", references=[])]

    altered(made, change)
    page = page_of(made)
    assert len(page.attributes("script")) == len(page.attributes("style")) == 1
    assert not {tag for tag, _ in page.tags} & {"b b", "iframe", "object"}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert page.text.partition("Before and after")[2].count(" ".join(visible(hostile)[:30].split())) >= 6
    assert not re.search("[\u202e\ufeff\x07\r]", page.source)


@pytest.mark.parametrize("steps", ["{", "[" * 100_000, '"' + "x" * 1_000_000 + '"', "[1, null, {}]", ""])
def test_steps_that_make_no_sense_cost_their_picture_alone(steps, tmp_path):
    made = pairs_of(tmp_path / "p", {"conditioning": BLURRED}, count=1)
    altered(made, lambda rows: [replace(row, references=[replace(row.references[0], realised=steps)]) for row in rows])
    summary = report(made)
    page = Page(Path(summary.path))
    assert "no picture: cannot be made" in " ".join(page.text.split()) and summary.size_bytes < 200_000
    assert page.attributes("img", alt="target 0.png")


def test_a_file_that_is_gone_or_changed_is_a_reason_in_place_of_its_picture(tmp_path):
    made = pairs_of(tmp_path / "p", {}, {**STRICT, "id": "gray"}, count=2)
    (made.root / "gray" / "0.png").unlink()
    (made.root / "gray" / "1.png").write_bytes(b"other")
    altered(made, lambda rows: [lying(row, 9.0) for row in rows])
    page = page_of(made)
    text = page.text.partition("Before and after")[2]
    assert text.count("cannot be read: No such file or directory") == 2  # in both lists
    assert text.count("changed since prep scan") == 2
    assert page.attributes("input", type="range") == []


def test_a_table_of_sets_that_are_no_more_is_shown_as_far_as_it_goes(tmp_path):
    made = pairs_of(tmp_path / "p", {}, {**STRICT, "id": "gray"}, count=1)
    page = page_of(project_of(tmp_path / "p", [TARGETS]))
    assert "The settings of its images or pairs changed since it was paired" in notices_of(page)[-1]
    assert "cannot be made: 'gray'" in page.text and page.attributes("img", alt="target 0.png")
    assert made.pair_table("photos").exists()


def test_tables_that_are_missing_or_damaged_are_called_so_with_the_command_that_mends_them(tmp_path):
    more = {"id": "more", "type": "local", "instance_data_dir": "photos", "resolution": 256}
    made = project_of(tmp_path / "p", [TARGETS, {**more, **TARGETS}])
    textured(made.root / "photos" / "0.png")
    scan(made, workers=1)
    pairs(made, workers=1)
    command = made.command("prep pairs")
    made.pair_table("more").unlink()
    page = page_of(made)
    assert notices_of(page) == [f"Not paired yet; run: {command}"]
    assert dict(page.figures)["pairs"] == ["1"]

    made.pair_table("more").write_bytes(b"no table")
    assert notices_of(page_of(made)) == [f"Its pair table cannot be read; run: {command}"]

    data = bytearray(made.pair_table("photos").read_bytes())
    column = pq.ParquetFile(made.pair_table("photos")).metadata.row_group(0).column(0)
    data[(column.dictionary_page_offset or column.data_page_offset) + column.total_compressed_size - 1] ^= 1
    made.pair_table("photos").write_bytes(bytes(data))
    summary = report(made)
    assert notices_of(Page(Path(summary.path)))[0] == f"Its pair table is damaged; run: {command}"
    assert len(summary.warnings) == 2


def test_a_stale_table_is_shown_and_called_so_with_the_command_that_mends_it(tmp_path):
    made = pairs_of(tmp_path / "p", {}, {**STRICT, "id": "gray"}, count=2)
    assert notices_of(page_of(made)) == []
    pairing, scanning = made.command("prep pairs"), made.command("prep scan")

    textured(made.root / "gray" / "0.png", seed=77)
    scan(made, workers=1)
    [notice] = notices_of(page_of(made))
    assert notice == f"Scanned anew since it was paired, and this shows what was; run: {pairing}"

    made.manifest("gray").write_bytes(b"no table")
    assert notices_of(page_of(made))[-1] == (
        f"A manifest that it was made of cannot be used any more; run: {scanning}, then {pairing}"
    )
    for dataset in ("photos", "gray"):
        made.manifest(dataset).unlink()  # as on a machine that trains
    assert notices_of(page_of(made)) == []

    altered(made, lambda rows: rows, config="of other settings", limit=1)
    page = page_of(made)
    assert notices_of(page)[0].startswith("The settings of its images or pairs changed since it was paired")
    assert "Only its first 1 targets were paired (--limit)" in page.text


def test_no_pair_and_only_rejected_ones_are_said_to_be_so(tmp_path):
    made = pairs_of(tmp_path / "p", {}, {**STRICT, "id": "gray"}, count=30)
    altered(
        made, lambda rows: [replace(row, reject=f"aspect differs: {row.target_path}", references=[]) for row in rows]
    )
    page = page_of(made)
    assert "No pair is left to train on." in page.text and "and 6 more; column reject" in page.text
    assert len([text for _, text in page.texts if text.startswith("aspect differs: ")]) == 24
    altered(made, lambda rows: [])
    page = page_of(made)
    assert "There was no target to pair." in page.text and dict(page.figures)["references per pair"] == ["0"]


def test_pairs_shown_are_spread_over_buckets_and_sets_of_references_and_over_targets(tmp_path):
    made = pairs_of(tmp_path / "p", {}, {**STRICT, "id": "gray"}, count=1)

    def change(rows):
        [row] = rows
        many = [replace(row, target_path=f"plain {at}", references=[]) for at in range(40)]
        drawn = [
            replace(row, target_path=f"drawn {at}", variant=one, variants=4) for at in range(40) for one in range(4)
        ]
        return [*many, replace(row, target_path="other", bucket="64x64"), *drawn]

    altered(made, change)
    page = page_of(made)
    shown = [text for place, text in page.texts if place.endswith("h4 bdi")]
    assert len(shown) == len(set(shown)) == 24 and "other" in shown
    assert sum(name.startswith("plain") for name in shown) in (11, 12)
    assert page_of(made, thumbnails=3).text.count("256") < page.text.count("256")
    assert page_of(made, thumbnails=0).attributes("input", type="range") == []


def test_the_same_tables_make_the_same_page(tmp_path):
    made = pairs_of(tmp_path / "p", {"conditioning": BLURRED}, {**STRICT, "id": "gray"}, count=3)
    altered(made, lambda rows: [lying(row, 2.0) for row in rows])
    first = Path(report(made).path).read_bytes()
    assert Path(report(made).path).read_bytes() == first


def test_pictures_of_pairs_keep_the_page_small_and_take_seconds(tmp_path):
    made = pairs_of(tmp_path / "p", {"resolution": 512}, {**STRICT, "id": "gray", "resolution": 512}, count=0)
    rng = np.random.default_rng(0)
    for folder in ("photos", "gray"):
        for number in range(24):
            noise = Image.fromarray(rng.integers(0, 256, (512, 640, 3), dtype=np.uint8))
            noise.save(made.root / folder / f"{number}.png", compress_level=0)
    scan(made, workers=1)
    pairs(made, workers=1)
    altered(made, lambda rows: [lying(row, 5.0) for row in rows])
    start = time.monotonic()
    size = report(made, thumbnails=24).size_bytes
    assert time.monotonic() - start < 30  # four on an idle machine
    assert size < 2 * 24 * 8 * 15_000  # noise is what compresses worst


def test_a_hundred_thousand_pairs_take_seconds(tmp_path):
    made = pairs_of(tmp_path / "p", {}, {**STRICT, "id": "gray"}, count=1)
    path = made.pair_table("photos")
    [row] = read_table(path, PairRow)
    near = as_columns([lying(row, 0.1), lying(row, 3.0)], PairRow)
    table = near.take(pa.array(np.arange(100_000) % 2))
    write_table(path, table, PairRow, read_provenance(path, PairRow))
    start = time.monotonic()
    page = page_of(made, thumbnails=4)
    assert time.monotonic() - start < 10  # two on an idle machine
    assert dict(page.figures)["misaligned"] == ["50,000", "of 100,000 compared"]


@pytest.mark.skipif(not BROWSER, reason="needs a Chromium")
def test_sliders_follow_keys_and_a_telephone_shows_them_without_scrolling_sideways(tmp_path):
    loose = {**REFERENCES, "id": "loose", "conditioning_type": "reference_loose"}
    made = pairs_of(tmp_path / "p", {"conditioning": BLURRED}, {**STRICT, "id": "gray"}, loose, count=2)
    Image.new("RGB", (8, 8), "teal").save(made.root / "loose" / "0.png")
    for folder in ("photos", "gray", "loose"):
        textured(made.root / folder / "wide.png", (2000, 60))
        textured(made.root / folder / "tall.png", (60, 2000))
    scan(made, workers=1)
    pairs(made, workers=1)

    def change(rows):
        steps = json.dumps([{"step": "x" * 500, "y" * 500: "z" * 500}] * 40)
        odd = [
            lying(rows[0], 9.0, target_path=text, prompt=text, prompts=[text] * 30, reject=reject)
            for text in HOSTILE
            for reject in (None, f"{text}: {text}")
        ]
        odd = [replace(row, references=[replace(one, prompts=HOSTILE) for one in row.references]) for row in odd]
        made_up = replace(rows[0], references=[replace(rows[0].references[-1], realised=steps)])
        return [*rows, *odd, made_up]

    altered(made, change)
    page = Path(report(made).path)
    found = json.loads(
        shown(
            page, tmp_path, 375,
            """
            const ranges = [...inside.querySelectorAll("input[type=range]")], range = ranges[0];
            const stage = range.closest("[data-slider]"), at = () => stage.style.getPropertyValue("--at");
            const seen = [at()];
            range.value = 20; range.dispatchEvent(new Event("input")); seen.push(at());
            const box = stage.getBoundingClientRect(), view = frame.contentWindow;
            stage.setPointerCapture = () => {};
            const x = box.left + box.width * 0.75;
            stage.dispatchEvent(new view.PointerEvent("pointerdown", { clientX: x, pointerId: 1 })); seen.push(at());
            range.focus();
            return JSON.stringify({
              width: inside.documentElement.scrollWidth, seen, hidden: ranges.filter((one) => one.hidden).length,
              named: ranges.every((one) => one.labels.length === 1), told: range.getAttribute("aria-valuetext"),
              focused: inside.activeElement === range, hint: inside.querySelector(".hint").hidden,
              ids: ranges.length - new Set(ranges.map((one) => one.id)).size,
              clipped: view.getComputedStyle(stage.querySelector(".before")).clipPath,
            });
            """,
        )
    )  # fmt: skip
    assert found["width"] <= 375
    assert found["seen"][:2] == ["50%", "20%"] and abs(int(found["seen"][2][:-1]) - 75) <= 1
    assert found["told"] == f"{found['seen'][2]} reference" and found["clipped"].startswith("inset(")
    assert (found["hidden"], found["named"], found["ids"], found["hint"], found["focused"]) == (0, True, 0, False, True)
