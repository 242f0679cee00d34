import pytest

from prep.captions import Captions, captions_of
from schemas.datasets import DatasetConfig


def dataset(**options):
    return DatasetConfig(id="photos", instance_data_dir="photos", **options)


TEXTFILE = dataset(caption_strategy="textfile")


def test_each_line_of_a_text_file_is_a_caption(tmp_path):
    (tmp_path / "a.txt").write_text("a red car\nsharpen it, please\n", encoding="utf-8")
    assert captions_of(tmp_path / "a.jpg", TEXTFILE) == Captions(["a red car", "sharpen it, please"], "textfile")


def test_byte_order_mark_windows_line_ends_and_blank_lines_do_not_count(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeff\r\n  ein Auto \r\n\r\n\t\r\nschärfer\r".encode())
    assert captions_of(tmp_path / "a.jpg", TEXTFILE) == Captions(["ein Auto", "schärfer"], "textfile")


def test_the_text_file_lies_beside_the_image_and_shares_its_whole_stem(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.v2.txt").write_text("mine")
    (tmp_path / "sub" / "a.txt").write_text("another's")
    (tmp_path / "a.v2.txt").write_text("another's")
    assert captions_of(tmp_path / "sub" / "a.v2.jpg", TEXTFILE).texts == ["mine"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "no caption: a.txt is missing"),
        (b"", "no caption: a.txt is empty"),
        (b"\xef\xbb\xbf \r\n\n", "no caption: a.txt is empty"),
        (b"caf\xe9", "no caption: a.txt is not UTF-8 (byte 3)"),
        ("ä".encode("utf-16"), "no caption: a.txt is not UTF-8 (byte 0)"),
    ],
)
def test_a_target_whose_text_file_says_nothing_is_rejected(content, reason, tmp_path):
    if content is not None:
        (tmp_path / "a.txt").write_bytes(content)
    assert captions_of(tmp_path / "a.jpg", TEXTFILE) == Captions([], None, reason)


def test_a_text_file_that_cannot_be_read_is_a_reason(tmp_path):
    (tmp_path / "a.txt").mkdir()
    assert captions_of(tmp_path / "a.jpg", TEXTFILE).reject == "no caption: a.txt: Is a directory"


@pytest.mark.parametrize("kind", ["image", "eval"])
def test_held_out_targets_need_captions_like_others(kind, tmp_path):
    targets = dataset(caption_strategy="textfile", dataset_type=kind)
    assert captions_of(tmp_path / "a.jpg", targets).reject is not None


def test_references_may_go_without_captions(tmp_path):
    references = dataset(caption_strategy="textfile", dataset_type="conditioning")
    assert captions_of(tmp_path / "a.jpg", references) == Captions([], None)
    (tmp_path / "a.txt").write_text("sharpen")
    assert captions_of(tmp_path / "a.jpg", references) == Captions(["sharpen"], "textfile")


def test_a_file_name_is_a_caption_with_spaces_for_underscores(tmp_path):
    named = dataset(caption_strategy="filename")
    assert captions_of(tmp_path / "a_red-car.v2.jpg", named) == Captions(["a red-car.v2"], "filename")
    assert captions_of(tmp_path / "x.jpg", dataset()) == Captions(["x"], "filename")  # the default


@pytest.mark.parametrize(
    ("prompt", "texts"), [("a photo", ["a photo"]), (["a photo", "a picture"], ["a photo", "a picture"])]
)
def test_instance_prompts_may_be_one_or_several(prompt, texts, tmp_path):
    (tmp_path / "a.txt").write_text("unused")
    prompted = dataset(caption_strategy="instanceprompt", instance_prompt=prompt)
    assert captions_of(tmp_path / "a.jpg", prompted) == Captions(texts, "instanceprompt")


def test_only_the_instance_prompt_stands_in_for_every_caption(tmp_path):
    prompted = dataset(caption_strategy="textfile", instance_prompt="a photo", only_instance_prompt=True)
    assert captions_of(tmp_path / "missing.jpg", prompted) == Captions(["a photo"], "instanceprompt")


def test_a_prepended_prompt_stands_before_every_caption(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo")
    prompted = dataset(
        caption_strategy="textfile", instance_prompt=["sks,", "a photo of"], prepend_instance_prompt=True
    )
    together = ["sks, one", "sks, two", "a photo of one", "a photo of two"]
    assert captions_of(tmp_path / "a.jpg", prompted) == Captions(together, "textfile")
    assert captions_of(tmp_path / "b_c.jpg", prompted).reject == "no caption: b_c.txt is missing"
    by_name = dataset(caption_strategy="filename", instance_prompt="sks", prepend_instance_prompt=True)
    assert captions_of(tmp_path / "b_c.jpg", by_name) == Captions(["sks b c"], "filename")


def test_without_a_strategy_there_are_no_captions_and_no_reason(tmp_path):
    (tmp_path / "a.txt").write_text("unused")
    assert captions_of(tmp_path / "a.jpg", dataset(caption_strategy=None)) == Captions([], None)
