import json
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from schemas import shards
from schemas.errors import UserError
from schemas.keys import canonical
from schemas.rows import RejectRow
from schemas.shards import ShardHeader, ShardIndex, latent_row, rebuilt, text_row, write_rejects, write_shard

HEADER = ShardHeader(row="LatentRow", encoder="e1", shapes={"latent": (16, 3, 5)})


def total(payload, *rest):
    """Sum a row as the documents say: its bytes, then key and other columns as JSON."""
    return xxhash.xxh3_64_intdigest(payload + canonical(list(rest)).encode())


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 2**16, shape, np.uint16)


def test_latents_come_back_by_their_key_in_their_shape(tmp_path):
    latents = {f"key{number}": numbers(16, 3, 5, seed=number) for number in range(5)}
    path = (
        tmp_path
        / "3x5"
        / write_shard(tmp_path / "3x5", HEADER, [latent_row(key, latent) for key, latent in latents.items()])
    )

    index = ShardIndex(tmp_path)

    assert len(index) == 5 and "key3" in index and "key9" not in index
    assert index.headers == {path.relative_to(tmp_path).as_posix(): HEADER}
    assert index.header_of("key3") == HEADER
    for key, latent in latents.items():
        row = index.read(key)
        assert row["key"] == key and row["latent"].dtype == np.uint16
        assert np.array_equal(row["latent"], latent)
    with pytest.raises(KeyError):
        index.read("key9")


def test_prompts_come_back_with_and_without_a_pooled_embed(tmp_path):
    both = ShardHeader("TextRow", "e1", {"embed": (7, 4), "pooled": (6,)})
    alone = ShardHeader("TextRow", "e1", {"embed": (7, 4)})
    embed, pooled = numbers(7, 4), numbers(6, seed=1)
    write_shard(tmp_path, both, [text_row("k1", "ein Foto, schärfer", embed, pooled, 3)])
    write_shard(tmp_path, alone, [text_row("k2", "", embed, None, 0)])

    index = ShardIndex(tmp_path)

    first, second = index.read("k1"), index.read("k2")
    assert (first["prompt"], first["num_tokens"]) == ("ein Foto, schärfer", 3)
    assert np.array_equal(first["embed"], embed) and np.array_equal(first["pooled"], pooled)
    assert (second["prompt"], second["num_tokens"], second["pooled"]) == ("", 0, None)
    assert np.array_equal(second["embed"], embed)


def test_rows_equal_to_the_first_are_left_out_before_an_embed_and_read_all_the_same(tmp_path):
    header = ShardHeader("TextRow", "e1", {"embed": (9, 4), "pooled": (6,)}, pad_rows=5)
    embeds = {f"k{number}": numbers(9, 4, seed=number) for number in range(3)}
    for embed in embeds.values():
        embed[:5] = embed[5]
    rows = [text_row(key, "a", embed[5:], numbers(6), 3) for key, embed in embeds.items()]
    name = write_shard(tmp_path, header, rows)
    index = ShardIndex(tmp_path)
    assert pq.read_schema(tmp_path / name).field("embed").type == pa.binary(4 * 4 * 2) and header.row_bytes == 32 + 12
    assert index.headers == {name: header}
    arrays = {column: np.full_like(array, 7) for column, array in header.empty(3).items()}
    index.fill(list(embeds), arrays)
    for number, (key, embed) in enumerate(embeds.items()):
        read = index.read(key)
        assert np.array_equal(read["embed"], embed) and np.array_equal(arrays["embed"][number], embed)
        assert rebuilt(header, read) == rows[number]
    with pytest.raises(pa.ArrowInvalid):
        write_shard(tmp_path, header, [text_row("k9", "a", numbers(9, 4), numbers(6), 3)])


def test_only_shards_that_leave_rows_out_are_of_the_format_that_older_readers_refuse(tmp_path):
    plain, padded = (
        ShardHeader("TextRow", "e1", {"embed": (7, 4)}),
        ShardHeader("TextRow", "e1", {"embed": (7, 4)}, pad_rows=2),
    )
    said = []
    for number, header in enumerate((plain, padded)):
        row = text_row(f"k{number}", "a", numbers(7, 4)[header.pad_rows :], None, 3)
        name = write_shard(tmp_path, header, [row])
        said.append(json.loads(pq.read_schema(tmp_path / name).metadata[b"pairline.shard"]))
    assert [(one["format"], one.get("pad_rows")) for one in said] == [(4, None), (5, 2)]
    assert ShardIndex(tmp_path).header_of("k0") == plain and ShardIndex(tmp_path).header_of("k1") == padded


def test_what_is_read_can_be_written_to_without_touching_the_file(tmp_path):
    path = tmp_path / write_shard(tmp_path, HEADER, [latent_row("key", numbers(16, 3, 5))])
    before = path.read_bytes()
    index = ShardIndex(tmp_path)
    index.read("key")["latent"][:] = 0
    assert index.read("key")["latent"].any() and path.read_bytes() == before


def test_any_parquet_reader_finds_fixed_size_columns_row_by_row_and_the_header(tmp_path):
    latents = [numbers(16, 3, 5, seed=number) for number in range(3)]
    path = tmp_path / write_shard(
        tmp_path, HEADER, [latent_row(f"key{number}", one) for number, one in enumerate(latents)]
    )

    file = pq.ParquetFile(path)

    assert file.schema_arrow.field("key") == pa.field("key", pa.string(), False)
    assert file.schema_arrow.field("latent") == pa.field("latent", pa.binary(16 * 3 * 5 * 2), False)
    assert file.schema_arrow.field("checksum") == pa.field("checksum", pa.uint64(), False)
    assert json.loads(file.schema_arrow.metadata[b"pairline.keys"]) == ["key0", "key1", "key2"]
    assert json.loads(file.schema_arrow.metadata[b"pairline.shard"]) == {
        "row": "LatentRow",
        "encoder": "e1",
        "shapes": {"latent": [16, 3, 5]},
        "dtypes": {},
        "normalised": True,
        "format": 4,
    }
    assert {file.metadata.row_group(0).column(place).compression for place in range(3)} == {"UNCOMPRESSED"}
    second = file.read().to_pylist()[1]
    assert second == {"key": "key1", "latent": latents[1].tobytes(), "checksum": total(latents[1].tobytes(), "key1")}


def test_a_text_shard_has_two_fixed_size_columns_and_one_sum_over_both(tmp_path):
    header = ShardHeader("TextRow", "e1", {"embed": (7, 4), "pooled": (6,)})
    embed, pooled = numbers(7, 4), numbers(6, seed=1)
    path = tmp_path / write_shard(tmp_path, header, [text_row("k1", "a", embed, pooled, 3)])
    table = pq.read_table(path)
    assert (table.schema.field("embed").type, table.schema.field("pooled").type) == (pa.binary(56), pa.binary(12))
    assert table.column("checksum").to_pylist() == [total(embed.tobytes() + pooled.tobytes(), "k1", "a", 3, None, None)]


def test_a_row_of_another_shape_is_not_written(tmp_path):
    with pytest.raises(pa.ArrowInvalid):
        write_shard(tmp_path, HEADER, [latent_row("key", numbers(16, 3, 4))])
    assert list(tmp_path.iterdir()) == []


def test_a_shard_is_named_by_its_keys(tmp_path):
    def shard(*keys):
        return tmp_path / write_shard(tmp_path, HEADER, [latent_row(key, numbers(16, 3, 5)) for key in keys])

    assert shard("a", "b") == shard("a", "b")
    assert len({shard("a", "b"), shard("b", "a"), shard("a")}) == 3
    assert len(list(tmp_path.iterdir())) == 3


def test_shards_of_all_buckets_below_a_folder_are_one_index(tmp_path):
    other = ShardHeader("LatentRow", "e1", {"latent": (16, 2, 2)})
    write_shard(tmp_path / "3x5", HEADER, [latent_row("wide", numbers(16, 3, 5))])
    write_shard(tmp_path / "2x2", other, [latent_row("square", numbers(16, 2, 2))])
    index = ShardIndex(tmp_path)
    assert (index.header_of("wide"), index.header_of("square")) == (HEADER, other)
    assert index.read("square")["latent"].shape == (16, 2, 2)


def test_a_folder_that_does_not_exist_is_an_empty_index(tmp_path):
    index = ShardIndex(tmp_path / "missing")
    assert len(index) == 0 and "key" not in index and index.rejects == {}


def test_rejected_images_are_remembered_apart_from_latents(tmp_path):
    write_shard(tmp_path / "3x5", HEADER, [latent_row("good", numbers(16, 3, 5))])
    write_rejects(tmp_path, [RejectRow("bad", "unreadable: broken"), RejectRow("worse", "too large: bomb")])
    index = ShardIndex(tmp_path)
    assert index.rejects == {"bad": "unreadable: broken", "worse": "too large: bomb"}
    assert len(index) == 1 and "bad" not in index


def test_leftovers_of_an_interrupted_write_are_not_read(tmp_path):
    path = tmp_path / write_shard(tmp_path, HEADER, [latent_row("key", numbers(16, 3, 5))])
    path.rename(tmp_path / f"{path.name}.tmp.123.abc.parquet")
    assert len(ShardIndex(tmp_path)) == 0


@pytest.mark.parametrize("bit", [0, 7])
@pytest.mark.parametrize("place", [0, 200, 479])
def test_one_flipped_bit_of_a_latent_is_told_with_its_file_and_spares_the_other_rows(place, bit, tmp_path):
    latents = {f"key{number}": numbers(16, 3, 5, seed=number) for number in range(3)}
    path = tmp_path / write_shard(tmp_path, HEADER, [latent_row(key, one) for key, one in latents.items()])
    data = bytearray(path.read_bytes())
    assert data.count(latents["key1"].tobytes()) == 1
    data[data.index(latents["key1"].tobytes()) + place] ^= 1 << bit
    path.write_bytes(bytes(data))

    index = ShardIndex(tmp_path)

    with pytest.raises(
        UserError, match="damaged, its checksum differs; prep cache --verify --repair takes it out"
    ) as caught:
        index.read("key1")
    assert str(path) in str(caught.value) and "row 1 (key1)" in str(caught.value)
    assert np.array_equal(index.read("key0")["latent"], latents["key0"])
    assert np.array_equal(index.read("key2")["latent"], latents["key2"])


def test_one_flipped_bit_of_a_pooled_embed_is_noticed_too(tmp_path):
    header = ShardHeader("TextRow", "e1", {"embed": (7, 4), "pooled": (6,)})
    pooled = numbers(6, seed=1)
    path = tmp_path / write_shard(tmp_path, header, [text_row("k1", "a", numbers(7, 4), pooled, 3)])
    data = bytearray(path.read_bytes())
    data[data.index(pooled.tobytes())] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(UserError, match="its checksum differs"):
        ShardIndex(tmp_path).read("k1")


def test_a_key_that_went_bad_on_disk_is_told_with_its_file(tmp_path):
    path = tmp_path / write_shard(tmp_path, HEADER, [latent_row("0123456789abcdef", numbers(16, 3, 5))])
    data = bytearray(path.read_bytes())
    for bit in (1, 0x80):  # another key; no text at all
        changed = bytearray(data)
        changed[data.rindex(b"0123456789abcdef")] ^= bit
        path.write_bytes(bytes(changed))
        with pytest.raises(UserError, match="damaged") as caught:
            ShardIndex(tmp_path)
        assert str(path) in str(caught.value)


def test_a_shard_cut_off_anywhere_is_told_with_its_file(tmp_path):
    path = tmp_path / write_shard(tmp_path, HEADER, [latent_row("key", numbers(16, 3, 5))])
    data = path.read_bytes()
    for size in range(0, len(data), 41):
        path.write_bytes(data[:size])
        with pytest.raises(UserError, match="damaged") as caught:
            ShardIndex(tmp_path)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {"pairline.shard": "no JSON"},
        {"pairline.shard": "{}"},
        {"pairline.shard": '{"shapes": {"latent": [1]}}'},
    ],
)
def test_a_parquet_file_of_somebody_elses_is_told_by_name(metadata, tmp_path):
    table = pa.table({"key": ["a"], "latent": [b"ab"], "checksum": [1]})
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "foreign.parquet")
    with pytest.raises(UserError, match=r"foreign\.parquet: damaged"):
        ShardIndex(tmp_path)


def test_a_shard_of_another_format_names_both_formats_and_what_to_delete(tmp_path):
    header = ShardHeader(row="LatentRow", encoder="e1", shapes={"latent": (16, 3, 5)}, format=9)
    write_shard(tmp_path / "3x5", header, [latent_row("key", numbers(16, 3, 5))])
    with pytest.raises(UserError, match="shard format 9, this version reads 4 and 5") as caught:
        ShardIndex(tmp_path)
    assert f"delete {tmp_path / '3x5'} and run prep cache again" in str(caught.value)


# Where rows lie


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 50])
def test_rows_are_read_where_they_lie_whatever_their_number(rows, tmp_path, monkeypatch):
    header = ShardHeader("TextRow", "e1", {"embed": (7, 4), "pooled": (6,)})
    texts = [text_row(f"k{n}", f"prompt {n}", numbers(7, 4, seed=n), numbers(6, seed=100 + n), n) for n in range(rows)]
    path = tmp_path / write_shard(tmp_path, header, texts)
    assert pq.ParquetFile(path).num_row_groups == -(-rows // 16)
    index = ShardIndex(tmp_path)
    monkeypatch.setattr(shards._Shard, "_by_arrow", None)  # it would be asked in vain
    for number in np.random.default_rng(0).permutation(rows).tolist():
        row = index.read(f"k{number}")
        assert np.array_equal(row["embed"], numbers(7, 4, seed=number))
        assert np.array_equal(row["pooled"], numbers(6, seed=100 + number))
        assert row["num_tokens"] == number and row["prompt"] == f"prompt {number}"


def test_large_rows_have_row_groups_of_their_own(tmp_path):
    header = ShardHeader("LatentRow", "e1", {"latent": (3, 1024, 1024)})
    path = tmp_path / write_shard(
        tmp_path, header, [latent_row(f"k{n}", numbers(3, 1024, 1024, seed=n)) for n in range(3)]
    )
    assert pq.ParquetFile(path).num_row_groups == 3
    index = ShardIndex(tmp_path)
    assert all(np.array_equal(index.read(f"k{n}")["latent"], numbers(3, 1024, 1024, seed=n)) for n in range(3))


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "zstd"},
        {"use_dictionary": True},
        {"data_page_size": 512, "row_group_size": 9},
        {"version": "1.0"},
    ],
)
def test_a_shard_that_was_written_anew_by_somebody_else_is_read_all_the_same(options, tmp_path):
    latents = {f"key{number}": numbers(16, 3, 5, seed=number) for number in range(20)}
    path = tmp_path / write_shard(tmp_path, HEADER, [latent_row(key, latent) for key, latent in latents.items()])
    pq.write_table(pq.read_table(path), path, **options)
    index = ShardIndex(tmp_path)
    for key, latent in latents.items():
        assert np.array_equal(index.read(key)["latent"], latent)


def test_several_threads_read_at_once_and_few_files_stay_open(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_OPEN_FILES", 3)
    for number in range(9):
        write_shard(tmp_path, HEADER, [latent_row(f"{number}-{n}", numbers(16, 3, 5, seed=n)) for n in range(4)])
    index = ShardIndex(tmp_path)
    keys = [f"{number}-{n}" for number in range(9) for n in range(4)] * 5
    with ThreadPoolExecutor(4) as pool:
        for key, row in zip(keys, pool.map(index.read, keys), strict=True):
            assert np.array_equal(row["latent"], numbers(16, 3, 5, seed=int(key[-1])))
    assert len(index._open) == 3


def test_pandas_and_datasets_read_shards(tmp_path):
    import datasets
    import pandas

    latents = [numbers(16, 3, 5, seed=number) for number in range(20)]
    path = tmp_path / write_shard(
        tmp_path, HEADER, [latent_row(f"key{number}", one) for number, one in enumerate(latents)]
    )
    assert pandas.read_parquet(path)["latent"][7] == latents[7].tobytes()
    loaded = datasets.load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "hf"))
    assert loaded[7]["latent"] == latents[7].tobytes() and loaded[7]["key"] == "key7"


def test_of_many_keys_the_missing_are_told_and_the_rejected_counted(tmp_path):
    write_shard(tmp_path, HEADER, [latent_row(f"key{number}", numbers(16, 3, 5)) for number in range(3)])
    assert ShardIndex(tmp_path).missing(["key0", "other", "key2"]) == ([1], 0)
    write_rejects(tmp_path, [RejectRow("bad", "too large")])
    index = ShardIndex(tmp_path)
    assert index.missing(["bad", "key0", "other", "bad", "more"]) == ([2, 4], 2)


def test_more_shards_are_read_than_may_stay_open_or_known(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_OPEN_FILES", 2)
    monkeypatch.setattr(shards, "_KNOWN_SHARDS", 4)
    latents = {f"key{number}": numbers(16, 3, 5, seed=number) for number in range(8)}
    for key, latent in latents.items():
        write_shard(tmp_path, HEADER, [latent_row(key, latent)])
    index = ShardIndex(tmp_path)
    arrays = HEADER.empty(8)
    for _ in range(2):
        index.fill(list(latents), arrays)
        assert np.array_equal(arrays["latent"], np.stack(list(latents.values())))
    assert (len(index._open), len(index._known)) == (2, 4)


def test_a_shard_that_somebody_wrote_anew_is_read_as_it_is_now(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_OPEN_FILES", 1)
    write_shard(tmp_path, HEADER, [latent_row("key", numbers(16, 3, 5))])
    write_shard(tmp_path, HEADER, [latent_row("other", numbers(16, 3, 5, seed=1))])
    index = ShardIndex(tmp_path)
    index.read("key")
    index.read("other")  # closes the first
    write_shard(tmp_path, HEADER, [latent_row("key", numbers(16, 3, 5, seed=2))])
    assert np.array_equal(index.read("key")["latent"], numbers(16, 3, 5, seed=2))


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="reads always wait")
@pytest.mark.parametrize("answer", ["some", "none", "unknown"])
def test_rows_that_are_not_in_memory_are_waited_for_after_those_that_are(tmp_path, monkeypatch, answer):
    latents = {f"key{number}": numbers(16, 3, 5, seed=number) for number in range(3)}
    write_shard(tmp_path, HEADER, [latent_row(key, latent) for key, latent in latents.items()])
    preadv, asked, read = os.preadv, [], []

    def cold(file, buffers, start, flags=0):
        if flags == os.RWF_NOWAIT:
            asked.append(start)
            if answer == "some":
                return preadv(file, [buffers[0][:10]], start)
            raise BlockingIOError if answer == "none" else OSError(95, "not supported")
        read.append(start)
        return preadv(file, buffers, start)

    monkeypatch.setattr(os, "preadv", cold)
    arrays = HEADER.empty(3)
    rest = ShardIndex(tmp_path).fill(list(latents), arrays)
    assert np.array_equal(arrays["latent"], np.stack(list(latents.values())))
    assert [one["checksum"] for one in rest] == [total(latent.tobytes(), key) for key, latent in latents.items()]
    assert len(asked) == len(read) == 3


@pytest.mark.parametrize("kind", ["latents", "text"])
def test_every_flipped_bit_of_a_shard_is_noticed_or_changes_nothing(kind, tmp_path):
    """Flip one bit in each place before the footer: either verify tells, or every value is still what it was."""
    if kind == "latents":
        rows = [latent_row(f"key{number}", numbers(2, 2, 2, seed=number) & 0x3FFF) for number in range(3)]
        header = ShardHeader("LatentRow", "e1", {"latent": (2, 2, 2)})
    else:
        header = ShardHeader("TextRow", "e1", {"embed": (3, 2), "pooled": (2,)})
        embeds = [(numbers(3, 2, seed=n) & 0x3FFF, numbers(2, seed=n + 9) & 0x3FFF) for n in range(3)]
        rows = [text_row(f"key{n}", f"prompt {n}", *pair, n) for n, pair in enumerate(embeds)]
    name = write_shard(tmp_path, header, rows)
    sound = (tmp_path / name).read_bytes()
    before = pq.read_table(tmp_path / name).to_pylist()
    assert shards.faults_of(tmp_path, name) == {}
    for place in range(len(sound) - 8 - int.from_bytes(sound[-8:-4], "little")):
        data = bytearray(sound)
        data[place] ^= 1 << place % 8
        (tmp_path / name).write_bytes(data)
        if not shards.faults_of(tmp_path, name):
            index = ShardIndex(tmp_path)
            assert pq.read_table(tmp_path / name).to_pylist() == before, place
            for row in before:
                read = index.read(row["key"])
                payload = "latent" if kind == "latents" else "embed"
                assert read[payload].tobytes() == row[payload], place
