import json
import os

import pytest
import xxhash

import schemas.keys as keys
from schemas.keys import (
    FileIds,
    canonical,
    content_id,
    digest,
    file_id,
    latent_key,
    pixels_key,
    seed_of,
    seeds_of,
    text_key,
)

LATENT = {
    "encoder": "e1",
    "image_id": "i1",
    "geometry": (64, 64, 64, 80, 8, 0),
    "view": '{"part":[0,2]}',
    "recipe": '{"type":"jpeg_artifacts"}',
    "seed": 7,
}


def hashed(*parts):
    """Hash a list of ingredients as JSON without spaces: what every key below must equal."""
    return xxhash.xxh3_128(json.dumps(parts, separators=(",", ":")).encode()).hexdigest()


def test_a_latent_key_hashes_its_ingredients_and_nothing_else():
    assert latent_key(**LATENT) == hashed(
        "latent",
        keys.CACHE_VERSION,
        "e1",
        "i1",
        keys.PIXEL_POLICY,
        '{"part":[0,2]}',
        [64, 64, 64, 80, 8, 0],
        '{"type":"jpeg_artifacts"}',
        7,
    )
    assert latent_key("e1", "i1", (1, 2)) == hashed(
        "latent", keys.CACHE_VERSION, "e1", "i1", keys.PIXEL_POLICY, "", [1, 2], None, None
    )


def test_a_text_key_hashes_encoder_and_prompt_and_nothing_else():
    assert text_key("e1", "a photo") == hashed("text", keys.CACHE_VERSION, "e1", "a photo")


def test_a_pixels_key_hashes_its_ingredients_and_nothing_else():
    assert pixels_key("i1", (1, 2), "", "{}", 7) == hashed(
        "pixels", keys.CACHE_VERSION, "i1", keys.PIXEL_POLICY, "", [1, 2], "{}", 7
    )


@pytest.mark.parametrize(
    "change",
    [
        {"encoder": "e2"},
        {"image_id": "i2"},
        {"recipe": '{"type":"superresolution"}'},
        {"recipe": None},
        {"view": ""},
        {"view": '{"part":[1,2]}'},
        {"seed": 8},
        {"seed": None},
        *({"geometry": tuple(n + (i == place) for i, n in enumerate(LATENT["geometry"]))} for place in range(6)),
        {"geometry": (64, 64, 80, 64, 8, 0)},
        {"geometry": (64, 64, 64, 80, 0, 8)},
    ],
    ids=str,
)
def test_every_ingredient_of_a_latent_changes_its_key(change):
    assert latent_key(**{**LATENT, **change}) != latent_key(**LATENT)


def test_every_ingredient_of_text_and_pixels_changes_their_keys():
    texts = [text_key("e1", "a"), text_key("e2", "a"), text_key("e1", "b"), text_key("e1", "a "), text_key("e1a", "")]
    pixels = [
        pixels_key("i1", (1, 2), "", "{}", 7),
        pixels_key("i2", (1, 2), "", "{}", 7),
        pixels_key("i1", (2, 1), "", "{}", 7),
        pixels_key("i1", (1, 2), "", "{ }", 7),
        pixels_key("i1", (1, 2), "", "{}", 8),
        pixels_key("i1", (1, 2), "v", "{}", 7),
    ]
    assert len({*texts, *pixels}) == len(texts) + len(pixels)


@pytest.mark.parametrize(("constant", "kinds"), [("CACHE_VERSION", 3), ("PIXEL_POLICY", 2)])
def test_another_version_or_pixel_policy_changes_the_keys_of_what_depends_on_it(constant, kinds, monkeypatch):
    def every_kind():
        return [latent_key(**LATENT), pixels_key("i1", (1, 2), "", "{}", 7), text_key("e1", "a")]

    before = every_kind()
    monkeypatch.setattr(keys, constant, "another")
    assert [now != then for now, then in zip(every_kind(), before, strict=True)] == [True] * kinds + [False] * (
        3 - kinds
    )


def test_canonical_json_does_not_depend_on_order_and_keeps_letters():
    assert canonical({"b": [1, 2.5, None], "a": "é", "c": True}) == '{"a":"é","b":[1,2.5,null],"c":true}'
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 2, "b": 1})
    assert digest("a", "b") != digest("ab") != digest(["a", "b"])
    with pytest.raises(ValueError):
        canonical(float("nan"))


def test_seeds_fit_63_bits_and_depend_on_every_part():
    seeds = {seed_of(seed, "crop", name) for seed in range(50) for name in ("a", "b")}
    assert len(seeds) == 100
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62 > min(seeds)
    assert seed_of(1, "crop", "a") == xxhash.xxh3_64_intdigest(b'[1,"crop","a"]') // 2


def test_many_seeds_at_once_are_the_same_as_one_by_one():
    names = ["a", "b c.jpg", 'quo"te', "back\\slash", "né", "line\nbreak", "\x00", "日本", ""]
    assert list(seeds_of((42, "set"), names, ("crop", 0))) == [seed_of(42, "set", name, "crop", 0) for name in names]


def test_a_file_is_identified_by_its_bytes_alone_however_many(tmp_path):
    data = bytes(range(256)) * (3 * 4096 + 1)  # more than three pieces
    (tmp_path / "a.bin").write_bytes(data)
    (tmp_path / "b.bin").write_bytes(data)
    (tmp_path / "empty").write_bytes(b"")
    assert (
        file_id(tmp_path / "a.bin")
        == file_id(tmp_path / "b.bin")
        == content_id(data)
        == xxhash.xxh3_128_hexdigest(data)
    )
    assert file_id(tmp_path / "empty") == content_id(b"")
    with pytest.raises(OSError):
        file_id(tmp_path / "missing")


def test_file_ids_read_a_file_again_only_if_its_size_or_time_changed(tmp_path):
    memory, kept, touched, grown = (
        tmp_path / "deep" / "ids.json",
        tmp_path / "kept",
        tmp_path / "touched",
        tmp_path / "grown",
    )
    for path in (kept, touched, grown):
        path.write_bytes(b"first")
    times = {path: path.stat().st_mtime_ns for path in (kept, touched, grown)}
    first = content_id(b"first")
    ids = FileIds(memory)
    assert [ids.of(path) for path in (kept, touched, grown)] == [first] * 3

    # Other bytes under the same size and time: only one who reads the file would notice.
    kept.write_bytes(b"other")
    touched.write_bytes(b"other")
    grown.write_bytes(b"longer")
    os.utime(kept, ns=(0, times[kept]))
    os.utime(touched, ns=(0, times[touched] + 1))
    os.utime(grown, ns=(0, times[grown]))

    for again in (ids, FileIds(memory)):  # remembered in the process, and in the file
        assert again.of(kept) == first
        assert again.of(touched) == content_id(b"other")
        assert again.of(grown) == content_id(b"longer")
    assert [path.name for path in memory.parent.iterdir()] == ["ids.json"]


def test_file_ids_know_a_file_by_its_real_place(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"first")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    ids = FileIds(tmp_path / "ids.json")
    monkeypatch.chdir(tmp_path)
    assert ids.of(tmp_path / "file") == ids.of(tmp_path / "link")
    assert ids.of((tmp_path / "file").relative_to(tmp_path)) == content_id(b"first")
    assert len(json.loads((tmp_path / "ids.json").read_text())) == 1


def test_file_ids_that_are_not_to_be_remembered_write_nothing(tmp_path):
    (tmp_path / "file").write_bytes(b"first")
    memory = tmp_path / "ids.json"
    assert FileIds(memory, remember=False).of(tmp_path / "file") == content_id(b"first")
    assert not memory.exists()


@pytest.mark.parametrize("damaged", [b"", b'{"half": [1, 2', b"[]", b"null", b"\xff\xfe"])
def test_a_damaged_memory_of_file_ids_is_forgotten(damaged, tmp_path):
    (tmp_path / "file").write_bytes(b"first")
    memory = tmp_path / "ids.json"
    memory.write_bytes(damaged)
    assert FileIds(memory).of(tmp_path / "file") == content_id(b"first")
    assert list(json.loads(memory.read_text())) == [str(tmp_path / "file")]
