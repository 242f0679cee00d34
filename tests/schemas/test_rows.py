import tempfile
from dataclasses import fields, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir

from schemas.errors import UserError
from schemas.rows import (
    Geometry,
    ImageRow,
    LatentRow,
    PairRow,
    Reference,
    RejectRow,
    TextRow,
    arrow_schema,
    as_columns,
    from_columns,
)
from schemas.tables import Provenance, read_provenance, read_table, write_table

set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "hypothesis")  # not into the repository

GEOMETRY = Geometry(64, 64, 80, 64, 0, 8)
IMAGE = ImageRow(
    dataset_id="photos",
    path="day/a.jpg",
    image_id="0" * 32,
    size_bytes=1234,
    mtime_ns=10**18,
    width=100,
    height=80,
    orientation=6,
    format="JPEG",
    mode="RGB",
    bits=8,
    frames=1,
    alpha=False,
    icc=True,
    phash="0123456789abcdef",
    face=[0.5, 0.25],
    examined="phash verify",
    fault=None,
    captions=["one", "zwölf"],
    caption_source="textfile",
    caption_size_bytes=10,
    caption_mtime_ns=10**18,
    bucket="64x64",
    target_width=64,
    target_height=64,
    intermediary_width=80,
    intermediary_height=64,
    crop_top=0,
    crop_left=8,
    reject=None,
)
REJECTED = ImageRow(
    dataset_id="photos",
    path="b.jpg",
    image_id=None,
    size_bytes=0,
    mtime_ns=0,
    width=None,
    height=None,
    orientation=None,
    format=None,
    mode=None,
    bits=None,
    frames=None,
    alpha=None,
    icc=None,
    phash=None,
    face=[],
    examined=None,
    fault="unreadable: the file is empty",
    captions=[],
    caption_source=None,
    caption_size_bytes=None,
    caption_mtime_ns=None,
    bucket=None,
    target_width=None,
    target_height=None,
    intermediary_width=None,
    intermediary_height=None,
    crop_top=None,
    crop_left=None,
    reject="unreadable: the file is empty",
)
MADE_FROM = Provenance(config="c" * 32, inputs="d" * 32)

whole = st.integers(-(2**63), 2**63 - 1)
text = st.text(st.characters(exclude_categories=["Cs"]))
geometries = st.builds(Geometry, *[whole] * 6)


def rows_of(row_type, **columns):
    """Draw rows: whole numbers and text by the names of the types, what is nested from `columns`."""
    shares = st.floats(allow_nan=False)
    small = st.integers(-(2**31), 2**31 - 1)
    plain = {
        "str": text,
        "int": whole,
        "typing.Optional[schemas.rows.Int32]": st.none() | small,
        "bool": st.booleans(),
        "float": shares,
        "list[str]": st.lists(text, max_size=3),
    }
    plain |= {"list[float]": st.lists(shares, max_size=2)}
    plain |= {f"{name} | None": st.none() | one for name, one in plain.items()}
    drawn = {field.name: plain[spelled(field.type)] for field in fields(row_type) if field.name not in columns}
    return st.builds(row_type, **drawn, **columns)


def spelled(hint):
    return hint.__name__ if isinstance(hint, type) and not hasattr(hint, "__args__") else str(hint)


references = rows_of(Reference, geometry=geometries)
image_rows = rows_of(ImageRow)
pair_rows = rows_of(PairRow, geometry=geometries, references=st.lists(references, max_size=3))


@given(st.lists(image_rows, max_size=4))
@settings(deadline=None, derandomize=True, database=None, max_examples=50)
def test_image_rows_come_back_from_a_file_as_they_went_in(rows):
    with tempfile.TemporaryDirectory() as folder:
        write_table(Path(folder) / "manifest.parquet", rows, ImageRow, MADE_FROM)
        assert read_table(Path(folder) / "manifest.parquet", ImageRow) == rows


@given(st.lists(pair_rows, max_size=4))
@settings(deadline=None, derandomize=True, database=None, max_examples=50)
def test_pair_rows_with_their_references_come_back_from_a_file_as_they_went_in(rows):
    with tempfile.TemporaryDirectory() as folder:
        write_table(Path(folder) / "pairs.parquet", rows, PairRow, MADE_FROM)
        assert read_table(Path(folder) / "pairs.parquet", PairRow) == rows


@given(st.lists(st.builds(RejectRow, text, text), max_size=4), st.lists(geometries, max_size=4))
@settings(deadline=None, derandomize=True, database=None, max_examples=50)
def test_rows_come_back_from_columns_without_a_file_too(rejects, boxes):
    assert from_columns(as_columns(rejects, RejectRow), RejectRow) == rejects
    assert from_columns(as_columns(boxes, Geometry), Geometry) == boxes


def columns(**types):
    """Spell a schema: a type alone is required, a type in a list may be null."""
    given_types = {name: (one[0], True) if isinstance(one, list) else (one, False) for name, one in types.items()}
    return [pa.field(name, kind, nullable) for name, (kind, nullable) in given_types.items()]


STRING, INT = pa.string(), pa.int64()
STRINGS = pa.list_(pa.field("item", STRING, False))
BOX = pa.struct(
    columns(
        target_width=INT,
        target_height=INT,
        intermediary_width=INT,
        intermediary_height=INT,
        crop_top=INT,
        crop_left=INT,
    )
)


def test_a_manifest_has_these_columns():
    assert arrow_schema(ImageRow) == pa.schema(
        columns(
            dataset_id=STRING,
            path=STRING,
            image_id=[STRING],
            size_bytes=INT,
            mtime_ns=INT,
            width=[pa.int32()],
            height=[pa.int32()],
            orientation=[pa.int32()],
            format=[STRING],
            mode=[STRING],
            bits=[pa.int32()],
            frames=[pa.int32()],
            alpha=[pa.bool_()],
            icc=[pa.bool_()],
            phash=[STRING],
            face=pa.list_(pa.field("item", pa.float64(), False)),
            examined=[STRING],
            fault=[STRING],
            captions=STRINGS,
            caption_source=[STRING],
            caption_size_bytes=[INT],
            caption_mtime_ns=[INT],
            bucket=[STRING],
            target_width=[pa.int32()],
            target_height=[pa.int32()],
            intermediary_width=[pa.int32()],
            intermediary_height=[pa.int32()],
            crop_top=[pa.int32()],
            crop_left=[pa.int32()],
            reject=[STRING],
        )
    )


def test_a_pair_table_has_these_columns():
    reference = pa.struct(
        columns(
            dataset_id=STRING,
            image_id=STRING,
            path=STRING,
            recipe=[STRING],
            seed=[INT],
            realised=[STRING],
            bucket=STRING,
            geometry=BOX,
            view=STRING,
            prompts=STRINGS,
            shift_x=[pa.float64()],
            shift_y=[pa.float64()],
            scale=[pa.float64()],
            similarity=[pa.float64()],
            confidence=[pa.float64()],
        )
    )
    assert arrow_schema(PairRow) == pa.schema(
        columns(
            sample_id=STRING,
            dataset_id=STRING,
            target_image_id=STRING,
            target_path=STRING,
            variant=INT,
            variants=INT,
            geometry=BOX,
            view=STRING,
            references=pa.list_(pa.field("item", reference, False)),
            prompts=STRINGS,
            prompt=STRING,
            bucket=STRING,
            repeats=INT,
            reject=[STRING],
        )
    )


def test_shards_have_these_columns():
    binary, total = pa.binary(), pa.uint64()
    assert arrow_schema(LatentRow) == pa.schema(columns(key=STRING, latent=binary, checksum=total))
    assert arrow_schema(TextRow) == pa.schema(
        columns(
            key=STRING,
            prompt=STRING,
            embed=binary,
            pooled=[binary],
            num_tokens=INT,
            scale=[pa.float64()],
            error=[pa.float64()],
            checksum=total,
        )
    )
    assert arrow_schema(RejectRow) == pa.schema(columns(key=STRING, reject=STRING))


@pytest.mark.parametrize("row_type", [ImageRow, PairRow])
def test_the_file_on_disk_has_the_columns_of_its_rows(row_type, tmp_path):
    write_table(tmp_path / "table.parquet", [], row_type, MADE_FROM)
    assert pq.read_schema(tmp_path / "table.parquet").remove_metadata() == arrow_schema(row_type)


def test_what_is_unknown_is_null_in_the_file(tmp_path):
    write_table(tmp_path / "manifest.parquet", [IMAGE, REJECTED], ImageRow, MADE_FROM)
    table = pq.read_table(tmp_path / "manifest.parquet")
    nulls = {name for name in table.column_names if table.column(name)[1].as_py() is None}
    assert nulls == {name for name in table.column_names if table.schema.field(name).nullable} - {
        "reject",
        "fault",
    }
    assert table.column("reject").to_pylist() == [None, "unreadable: the file is empty"]
    assert read_table(tmp_path / "manifest.parquet", ImageRow) == [IMAGE, REJECTED]


def test_a_kept_row_has_its_geometry_and_a_rejected_one_has_none():
    assert IMAGE.geometry == GEOMETRY
    assert GEOMETRY.bucket == "64x64"
    assert GEOMETRY.as_key() == (64, 64, 80, 64, 0, 8)
    with pytest.raises(ValueError, match=r"photos/b\.jpg was rejected"):
        _ = REJECTED.geometry


def test_a_table_carries_what_it_was_made_from(tmp_path):
    write_table(tmp_path / "manifest.parquet", [IMAGE], ImageRow, MADE_FROM)
    assert read_provenance(tmp_path / "manifest.parquet", ImageRow) == MADE_FROM
    metadata = pq.read_schema(tmp_path / "manifest.parquet").metadata
    assert metadata == {
        b"pairline.format": b"2",
        b"pairline.row": b"ImageRow",
        b"pairline.config": b"c" * 32,
        b"pairline.inputs": b"d" * 32,
        b"pairline.limit": b"",
        b"pairline.source": b"",
        b"pairline.captions": b"",
        b"pairline.noted": b"{}",
        b"pairline.hashed": b"yes",
    }


def test_a_manifest_says_where_its_files_lie(tmp_path):
    write_table(tmp_path / "manifest.parquet", [IMAGE], ImageRow, replace(MADE_FROM, source="e" * 32))
    assert pq.read_schema(tmp_path / "manifest.parquet").metadata[b"pairline.source"] == b"e" * 32
    assert read_provenance(tmp_path / "manifest.parquet", ImageRow).source == "e" * 32


def test_a_table_that_is_not_the_whole_says_where_it_was_cut(tmp_path):
    part = replace(MADE_FROM, limit=7)
    write_table(tmp_path / "manifest.parquet", [IMAGE], ImageRow, part)
    assert pq.read_schema(tmp_path / "manifest.parquet").metadata[b"pairline.limit"] == b"7"
    assert read_provenance(tmp_path / "manifest.parquet", ImageRow) == part != MADE_FROM


def test_a_table_that_is_missing_was_made_from_nothing(tmp_path):
    assert read_provenance(tmp_path / "manifest.parquet", ImageRow) is None


def refusal(path, row_type=ImageRow):
    """Return what is said of a table that must be refused, and counts as made from nothing: it is to be made anew."""
    assert read_provenance(path, row_type) is None
    with pytest.raises(UserError) as caught:
        read_table(path, row_type)
    assert str(path) in str(caught.value) and "delete it" in str(caught.value)
    return str(caught.value)


def test_a_table_of_another_kind_is_refused_by_name(tmp_path):
    path = tmp_path / "manifest.parquet"
    write_table(path, [IMAGE], ImageRow, MADE_FROM)
    assert "expected a PairRow table of format 2, found ImageRow" in refusal(path, PairRow)


def test_a_table_of_another_format_is_refused_by_number(tmp_path):
    path = tmp_path / "manifest.parquet"
    metadata = MADE_FROM.metadata(ImageRow) | {"pairline.format": "3"}
    pq.write_table(as_columns([IMAGE], ImageRow).replace_schema_metadata(metadata), path)
    assert "found ImageRow of format 3" in refusal(path)


def test_a_table_that_lacks_a_column_is_refused(tmp_path):
    path = tmp_path / "manifest.parquet"
    table = as_columns([IMAGE], ImageRow).drop_columns(["captions"])
    pq.write_table(table.replace_schema_metadata(MADE_FROM.metadata(ImageRow)), path)
    assert "expected a ImageRow table" in refusal(path)


def test_a_parquet_file_of_somebody_elses_is_refused(tmp_path):
    path = tmp_path / "manifest.parquet"
    pq.write_table(pa.table({"path": ["a.jpg"]}), path)
    assert "found None of format None" in refusal(path)


def test_a_table_that_does_not_say_what_it_was_made_from_is_refused(tmp_path):
    path = tmp_path / "manifest.parquet"
    said = MADE_FROM.metadata(ImageRow)
    for name in ("config", "inputs", "limit", "source"):
        metadata = {key: value for key, value in said.items() if key != f"pairline.{name}"}
        pq.write_table(as_columns([IMAGE], ImageRow).replace_schema_metadata(metadata), path)
        assert "expected a ImageRow table" in refusal(path)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" * 100, b"<html>not found</html>" * 100])
def test_a_file_that_is_no_parquet_is_refused(content, tmp_path):
    path = tmp_path / "manifest.parquet"
    path.write_bytes(content)
    assert "damaged" in refusal(path)


def test_a_table_cut_off_anywhere_is_refused(tmp_path):
    path = tmp_path / "manifest.parquet"
    write_table(path, [replace(IMAGE, path=f"{number}.jpg") for number in range(50)], ImageRow, MADE_FROM)
    data = path.read_bytes()
    for size in range(0, len(data), 97):
        path.write_bytes(data[:size])
        assert "damaged" in refusal(path)


@pytest.mark.parametrize("bit", [0, 7])
def test_a_flipped_bit_of_any_page_of_data_is_noticed(bit, tmp_path):
    path = tmp_path / "manifest.parquet"
    rows = [replace(IMAGE, path=f"{number}.jpg", size_bytes=number**5) for number in range(50)]
    write_table(path, rows, ImageRow, MADE_FROM)
    data, group = path.read_bytes(), pq.ParquetFile(path).metadata.row_group(0)
    for column in map(group.column, range(group.num_columns)):
        first = column.dictionary_page_offset or column.data_page_offset
        place = first + column.total_compressed_size - 1  # the last byte of its last page
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :])
        assert read_provenance(path, ImageRow) == MADE_FROM  # which lies elsewhere in the file
        with pytest.raises(UserError, match=r"manifest\.parquet: damaged .*; delete it and run the command"):
            read_table(path, ImageRow)


def test_text_that_went_bad_on_disk_is_refused(tmp_path):
    path = tmp_path / "rejects.parquet"
    columns = {name: pa.array([b"\xff\xfe"]).cast(pa.string(), safe=False) for name in ("key", "reject")}
    table = pa.table(columns, schema=arrow_schema(RejectRow))
    pq.write_table(table.replace_schema_metadata(MADE_FROM.metadata(RejectRow)), path)
    with pytest.raises(UserError, match=r"rejects\.parquet: damaged"):
        read_table(path, RejectRow)
