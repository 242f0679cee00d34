import codecs
import json

import pytest
from PIL import Image

from prep.captions import Captioner, Captions, beside, read_text, shuffled, texts_of
from prep.scan import scan
from schemas.datasets import CaptionShuffle, DatasetConfig
from schemas.rows import ImageRow
from schemas.tables import read_table


def captioner(*filters, **options):
    return Captioner.of(DatasetConfig(id="photos", instance_data_dir="photos", **options), filters, 42)


def read(content, encoding="utf-8", multiline=False):
    return read_text(content, "sub/a.txt", encoding, multiline=multiline)


# Text files


def test_each_line_of_a_text_file_is_a_caption():
    assert read(b"a red car\nsharpen it, please\n") == ["a red car", "sharpen it, please"]


def test_line_ends_of_every_system_blank_lines_and_blanks_at_the_ends_do_not_count():
    for end in ("\n", "\r\n", "\r"):
        text = end.join(["", "  ein Auto ", "", "\t", "schärfer \u00a0", ""])
        assert read(text.encode()) == ["ein Auto", "schärfer"]


def test_a_file_may_be_one_caption_lines_and_all():
    for end in ("\n", "\r\n", "\r"):
        assert read(f"{end}a red car{end}{end}by night {end}".encode(), multiline=True) == ["a red car\n\nby night"]


def test_other_separators_than_line_ends_stay_in_a_caption():
    assert read("a\u2028b\x0bc\x85d".encode()) == ["a\u2028b\x0bc\x85d"]


@pytest.mark.parametrize(
    ("mark", "codec"),
    [
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
        (codecs.BOM_UTF32_LE, "utf-32-le"),
        (codecs.BOM_UTF32_BE, "utf-32-be"),
    ],
)
def test_a_byte_order_mark_tells_the_encoding_whatever_caption_encoding_says(mark, codec):
    content = mark + "ein Auto\r\nschärfer".encode(codec)
    assert read(content) == read(content, "cp1252") == ["ein Auto", "schärfer"]


def test_text_without_a_mark_is_read_in_caption_encoding():
    assert read("schärfer – „jetzt“".encode("cp1252"), "cp1252") == ["schärfer – „jetzt“"]
    assert read("schärfer".encode("utf-16-le"), "utf-16-le") == ["schärfer"]


@pytest.mark.parametrize(
    ("content", "encoding", "reason"),
    [
        (FileNotFoundError(2, "No such file or directory"), "utf-8", "a.txt is missing"),
        (IsADirectoryError(21, "Is a directory"), "utf-8", "a.txt: Is a directory"),
        (PermissionError(13, "Permission denied"), "utf-8", "a.txt: Permission denied"),
        (b"", "utf-8", "a.txt is empty"),
        (b"\xef\xbb\xbf \r\n\n", "utf-8", "a.txt is empty"),
        (b"caf\xe9", "utf-8", "a.txt is not UTF-8 (byte 3); caption_encoding names another encoding"),
        (b"caf\x81", "cp1252", "a.txt is not CP1252 (byte 3); caption_encoding names another encoding"),
        (codecs.BOM_UTF16_LE + b"a\0b", "utf-8", "a.txt is not UTF-16 (byte 4)"),
        (codecs.BOM_UTF8 + b"caf\xe9", "cp1252", "a.txt is not UTF-8 (byte 3)"),
        (
            "ab".encode("utf-16-le"),
            "utf-8",
            "a.txt holds zero bytes, as UTF-16 without a byte-order mark does; caption_encoding names another encoding",
        ),
    ],
)
def test_a_text_file_without_a_caption_gives_the_reason(content, encoding, reason):
    for multiline in (False, True):
        assert read(content, encoding, multiline) == f"no caption: {reason}"


def test_the_text_file_lies_beside_the_image_and_shares_its_whole_stem():
    assert beside("sub.d/a.v2.jpg") == "sub.d/a.v2.txt"
    assert beside("a.JPG") == "a.txt"


def test_one_scan_tells_every_image_without_a_caption_and_why(tmp_path):
    (tmp_path / "photos").mkdir()
    for name in "abcdef":
        Image.new("RGB", (64, 64)).save(tmp_path / "photos" / f"{name}.png")
    texts = {"b": b"", "c": b"caf\xe9", "d": b"a car", "e": codecs.BOM_UTF16_LE + "ein Auto".encode("utf-16-le")}
    for name, content in texts.items():
        (tmp_path / "photos" / f"{name}.txt").write_bytes(content)
    dataset = {"id": "photos", "instance_data_dir": "photos", "caption_strategy": "textfile", "resolution": 64}
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "multidatabackend.json").write_text(json.dumps([dataset]))

    summary = scan(tmp_path)

    rows = read_table(tmp_path / "work" / "manifests" / "photos.parquet", ImageRow)
    assert [row.reject for row in rows] == [
        "no caption: a.txt is missing",
        "no caption: b.txt is empty",
        "no caption: c.txt is not UTF-8 (byte 3); caption_encoding names another encoding",
        None,
        None,
        "no caption: f.txt is missing",
    ]
    assert [row.captions for row in rows if row.reject is None] == [["a car"], ["ein Auto"]]
    assert summary.datasets[0].rejected == {"no caption": 4}


# Tables


@pytest.mark.parametrize(
    ("value", "texts"),
    [
        (None, []),
        (float("nan"), []),
        ("", []),
        ("  \n", []),
        (" a red car\n", ["a red car"]),
        ("a\nb", ["a\nb"]),
        (["a", "", None, " b "], ["a", "b"]),
        ((["a"], ["b", []]), ["a", "b"]),
        (7, ["7"]),
        ("schärfer".encode(), ["schärfer"]),
    ],
)
def test_a_cell_is_a_text_or_a_list_of_texts_or_nothing(value, texts):
    assert texts_of(value) == texts


# Where captions come from


def test_what_was_found_are_the_captions():
    assert captioner(caption_strategy="textfile").of_found(["a", "b"], "textfile") == Captions(["a", "b"], "textfile")


@pytest.mark.parametrize("kind", ["image", "eval"])
def test_targets_held_out_or_not_need_captions(kind):
    targets = captioner(caption_strategy="textfile", dataset_type=kind)
    assert targets.of_found("no caption: a.txt is missing", "textfile").reject == "no caption: a.txt is missing"
    assert targets.of_found([], "csv").reject == "no caption: csv has none"


def test_references_may_go_without_captions():
    references = captioner("red", caption_strategy="textfile", dataset_type="conditioning")
    for found in ("no caption: a.txt is missing", [], ["red"]):
        assert references.of_found(found, "textfile") == Captions([], None)
    assert references.of_found(["sharpen"], "textfile") == Captions(["sharpen"], "textfile")


def test_a_file_name_is_a_caption_with_spaces_for_underscores():
    named = captioner(caption_strategy="filename")
    assert named.of_path("sub_d/a_red-car.v2.jpg") == Captions(["a red-car.v2"], "filename")
    assert captioner().of_path("x.jpg") == Captions(["x"], "filename")  # the default
    assert named.of_path("___.jpg") == Captions([], None, "no caption: ___.jpg says nothing")


@pytest.mark.parametrize(
    ("prompt", "texts"), [("a photo", ["a photo"]), (["a photo", "a picture"], ["a photo", "a picture"])]
)
def test_instance_prompts_may_be_one_or_several(prompt, texts):
    prompted = captioner(caption_strategy="instanceprompt", instance_prompt=prompt)
    assert prompted.of_path("a.jpg") == Captions(texts, "instanceprompt")
    assert not prompted.reads_text


def test_only_the_instance_prompt_stands_in_for_every_caption():
    prompted = captioner(caption_strategy="textfile", instance_prompt="a photo", only_instance_prompt=True)
    assert prompted.of_path("missing.jpg") == Captions(["a photo"], "instanceprompt")
    assert not prompted.reads_text
    assert captioner(caption_strategy="textfile").reads_text


def test_a_prepended_prompt_stands_before_every_caption():
    options = {"instance_prompt": ["sks,", "a photo of"], "prepend_instance_prompt": True}
    prompted = captioner(caption_strategy="textfile", **options)
    together = ["sks, one", "sks, two", "a photo of one", "a photo of two"]
    assert prompted.of_found(["one", "two"], "textfile") == Captions(together, "textfile")
    assert prompted.of_found("no caption: b.txt is missing", "textfile").reject == "no caption: b.txt is missing"
    by_name = captioner(caption_strategy="filename", instance_prompt="sks", prepend_instance_prompt=True)
    assert by_name.of_path("b_c.jpg") == Captions(["sks b c"], "filename")


def test_without_a_strategy_there_are_no_captions_and_no_reason():
    assert captioner(caption_strategy=None).of_path("a.jpg") == Captions([], None)


# Filters


@pytest.mark.parametrize(
    ("filters", "text", "left"),
    [
        (["blurry, "], "blurry, a car, blurry, red", "a car, red"),
        (["(low quality)"], "a car (low quality)", "a car"),  # as written
        ([r"\d+"], "a car 12 of 1999", "a car  of"),  # as a regular expression
        (["a(b"], "xa(b", "x"),  # no regular expression
        (["s/cat/dog/"], "a cat and a cat", "a dog and a dog"),
        (["s/cat/dog"], "a cat and a cat", "a dog and a dog"),
        (["s/cat/dog/g"], "a cat and a cat", "a dog and a dog"),
        (["s/CAT/dog/i"], "a Cat and a cat", "a dog and a dog"),
        (["s/CAT/dog/gi"], "a Cat and a cat", "a dog and a dog"),
        (["s/CAT/dog/"], "a cat", "a cat"),
        (["s/cat//"], "a cat", "a"),
        (["s/(red) (car)/\\2 \\1/"], "a red car", "a car red"),
        (["s/1\\/2/half\\/whole/"], "1/2 cup", "half/whole cup"),
        (["s/o"], "docs/open", "docpen"),  # a text with a slash
        (["", "car", "red"], "a red car", "a"),  # in order
        (["s/a/b/", "s/b/c/"], "a", "c"),
    ],
)
def test_a_filter_takes_out_or_replaces(filters, text, left):
    assert captioner(*filters, caption_strategy="textfile").of_found([text], "textfile").texts == [left]


def test_captions_that_a_filter_empties_are_gone_and_the_last_one_is_a_reason():
    filtered = captioner("red", r"\s+car", caption_strategy="textfile")
    assert filtered.of_found(["red", "a red car"], "textfile") == Captions(["a"], "textfile")
    reason = "no caption: caption_filter_list leaves nothing of it"
    assert filtered.of_found(["red", " car red"], "textfile") == Captions([], None, reason)


def test_filters_hold_for_names_and_instance_prompts_too():
    assert captioner("IMG ").of_path("IMG_0001.jpg").texts == ["0001"]
    prompted = captioner("sks ", caption_strategy="instanceprompt", instance_prompt=["sks dog", "sks "])
    assert prompted.of_path("a.jpg").texts == ["dog"]


# Shuffles


def test_a_shuffle_keeps_the_caption_and_adds_variants_of_the_same_tags():
    options = CaptionShuffle(enable=True, count=3)
    variants = shuffled("a, b,c ,  d, e", options, 1)
    assert variants[0] == "a, b,c ,  d, e" and len(variants) == 4
    assert all(sorted(one.split(", ")) == ["a", "b", "c", "d", "e"] for one in variants[1:])
    assert len(set(variants)) == 4
    assert shuffled("a, b,c ,  d, e", options, 1) == variants
    assert shuffled("a, b,c ,  d, e", options, 2) != variants


@pytest.mark.parametrize(
    ("split_on", "text", "tags"),
    [
        ("comma", "a b,c,,d", {"a b", "c", "d"}),
        ("space", "a  b c", {"a", "b", "c"}),
        ("period", "A dog. A cat. A bird.", {"A dog", "A cat", "A bird"}),
    ],
)
def test_tags_are_parted_as_split_on_says(split_on, text, tags):
    joined = {"comma": ", ", "space": " ", "period": ". "}[split_on]
    options = CaptionShuffle(enable=True, split_on=split_on, include_original=False, count=60)
    variants = shuffled(text, options, 1)
    assert all(set(one.removesuffix(".").split(joined)) == tags for one in variants)
    assert all(one.endswith(".") == text.endswith(".") for one in variants)
    assert len(variants) == len(set(variants)) == 6  # all orders of three, each once


def test_the_first_tags_keep_their_place():
    options = CaptionShuffle(enable=True, count=30, position_start=2, include_original=False)
    variants = shuffled("a, b, c, d, e", options, 1)
    assert len(variants) == 6 and all(one.startswith("a, b, ") for one in variants)


@pytest.mark.parametrize("text", ["a", "a, b", "a, b, "])
def test_too_few_tags_leave_a_caption_as_it_is(text):
    options = CaptionShuffle(enable=True, count=5, position_start=1, include_original=False)
    assert shuffled(text, options, 1) == [text]


def test_a_variant_in_the_order_of_the_caption_is_not_counted_twice():
    options = CaptionShuffle(enable=True, count=20)
    assert sorted(shuffled("a,b", options, 1)) == ["a,b", "b, a"]


def test_the_seed_of_a_shuffle_is_its_own_or_the_preparations():
    found, many = ["a, b, c, d, e, f"], {"enable": True, "count": 2}
    drawn = [
        Captioner.of(DatasetConfig(id="a", caption_shuffle=options), (), seed).of_found(found, "textfile").texts
        for options, seed in ((many, 1), (many, 2), (many | {"seed": 1}, 2))
    ]
    assert drawn[0] == drawn[2] != drawn[1]
    assert captioner(caption_shuffle={"count": 2}).of_found(found, "textfile").texts == found


def test_a_prompt_is_put_before_then_filters_then_shuffles():
    options = {"caption_shuffle": {"enable": True, "count": 1, "include_original": False, "position_start": 1}}
    made = captioner(", c", instance_prompt="sks,", prepend_instance_prompt=True, **options)
    assert sorted(made.of_found(["a, b, c"], "textfile").texts[0].split(", ")) == ["a", "b", "sks"]
    assert made.of_found(["a, b, c"], "textfile").texts[0].startswith("sks, ")
