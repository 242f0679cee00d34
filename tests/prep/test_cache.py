"""What prep cache encodes and what it leaves, and what becomes of faults on the way."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import command, forked, small_files
from kill_cache import kill_cache
from PIL import Image

from families import flux, open_project
from prep import encode
from prep.cache import cache
from prep.pairs import pairs
from prep.scan import scan
from schemas import console
from schemas.errors import UserError
from schemas.shards import ShardIndex

MakeProject = Callable[..., Path]


def prepared(folder: Path) -> Path:
    scan(folder, workers=1), pairs(folder, workers=1)
    return folder


def stores(folder: Path) -> list[Path]:
    return sorted(path for kind in ("latents", "text") for path in (folder / "work" / "cache" / kind).glob("*"))


def rows(folder: Path) -> dict[str, bytes]:
    """Return every payload of a project's stores."""
    return {
        key: (row["latent"] if "latent" in row else row["embed"]).tobytes()
        for store in stores(folder)
        for index in [ShardIndex(store)]
        for key in index._places
        for row in [index.read(key)]
    }


def encoded(folder: Path, **options: object) -> list[int]:
    return [store.encoded for store in cache(folder, workers=1, **options).stores]


def change(folder: Path, number: int = 0, **options: object) -> None:
    """Give a dataset of a project other options."""
    path = folder / "multidatabackend.json"
    datasets = json.loads(path.read_text())
    datasets[number] |= options
    path.write_text(json.dumps(datasets))


# A row is itself, whatever is around it


def test_neighbours_order_and_workers_never_show_in_a_row(make_project: MakeProject) -> None:
    folder = make_project("deblur", vae_dtype="bf16")
    change(
        folder, crop=True, crop_aspect="square", crop_style="center"
    )  # or the first image of a bucket decides on the sizes of others
    prepared(folder)
    cache(folder, workers=1)
    expected = rows(folder)

    def again(**options: object) -> dict[str, bytes]:
        shutil.rmtree(folder / "work" / "cache")
        cache(folder, **options)
        return rows(folder)

    assert again(workers=3) == expected
    shutil.rmtree(folder / "work" / "cache")
    while any(encoded(folder, limit=1)):  # one at a time
        pass
    assert rows(folder) == expected
    names = sorted(path.stem for path in (folder / "photos").glob("*.jpg"))
    for number, name in enumerate(names):  # another order of names is another order of rows
        for file in (folder / "photos").glob(f"{name}.*"):
            file.rename(file.with_name(f"{len(names) - number}{file.suffix}"))
    prepared(folder)
    assert again(workers=1) == expected


def test_failing_neighbours_leave_a_row_as_it_is(make_project: MakeProject) -> None:
    folder = make_project("edits")
    broken = sorted((folder / "target").glob("*.jpg"))[2]
    Image.open(broken).save(broken, format="PNG")
    prepared(folder)
    cache(folder, workers=1)
    whole = rows(folder)
    data = bytearray(broken.read_bytes())
    data[len(data) // 2] ^= 255
    broken.write_bytes(data)
    prepared(folder)
    shutil.rmtree(folder / "work" / "cache")
    summary = cache(folder, workers=1)
    kept = rows(folder)
    assert [len(store.rejected) for store in summary.stores] == [1, 0]
    assert len(kept) == len(whole) - 1 and kept.items() <= whole.items()


class Third:
    """Stands before a family, whose third picture it spoils."""

    def __init__(self, family: object) -> None:
        self._family, self._seen = family, 0

    def __getattr__(self, name: str) -> object:
        return getattr(self._family, name)

    def encode_images(self, encoder: object, pixels: torch.Tensor) -> object:
        self._seen += 1
        posterior = self._family.encode_images(encoder, pixels)
        if self._seen == 3:
            posterior.mean[0, 0, 0, 1] = float("inf")
        return posterior


def test_a_value_that_is_not_finite_rejects_its_row_alone(
    make_project: MakeProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = prepared(make_project("edits"))
    cache(folder, workers=1)
    whole = rows(folder)
    shutil.rmtree(folder / "work" / "cache")
    spoilt = Third(flux)
    monkeypatch.setattr(encode, "family_of", lambda project: spoilt)
    [latents, _] = cache(folder, workers=1).stores
    assert list(latents.rejected.values()) == ["not encodable: the VAE gave a value that is not finite"]
    assert len(rows(folder)) == len(whole) - 1 and rows(folder).items() <= whole.items()
    assert encoded(folder) == [0, 0]


# Memory


class Small:
    """Stands before an encoder of the family and has room for so many images at once."""

    def __init__(self, family: object, room: int) -> None:
        self._family, self._room = family, room
        self.batches: list[int] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self._family, name)

    def encode_prompts(self, encoders: object, prompts: list[str], settings: object) -> object:
        self.batches.append(len(prompts))
        if len(prompts) > self._room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self._family.encode_prompts(encoders, prompts, settings)

    def encode_images(self, encoder: object, pixels: torch.Tensor) -> object:
        self.batches.append(len(pixels))
        if len(pixels) > self._room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self._family.encode_images(encoder, pixels)


def test_out_of_memory_halves_the_batch_and_goes_on(
    make_project: MakeProject, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = prepared(make_project("deblur"))
    monkeypatch.setattr(encode, "_batch_size", lambda wanted: 4)
    small = Small(encode.family_of(open_project(folder)), 1)
    monkeypatch.setattr(encode, "family_of", lambda project: small)
    monkeypatch.setattr(console.log, "propagate", True)
    assert encoded(folder)[0] == 12
    assert small.batches[0] > 1 and small.batches[-3:] == [1, 1, 1]
    assert "out of memory with" in caplog.text and "going on with" in caplog.text
    assert encoded(folder) == [0, 0]


def test_prompts_that_memory_does_not_hold_at_once_are_halved_too(
    make_project: MakeProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = prepared(make_project("edits"))
    monkeypatch.setattr(encode, "_batch_size", lambda wanted: 4)
    small = Small(encode.family_of(open_project(folder)), 2)
    monkeypatch.setattr(encode, "family_of", lambda project: small)
    assert encoded(folder) == [12, 7]
    assert small.batches[-5:] == [4, 2, 2, 2, 1]
    shutil.rmtree(folder / "work" / "cache" / "text")
    monkeypatch.setattr(encode, "family_of", lambda project: Small(small._family, 0))
    with pytest.raises(UserError, match="does not hold the text encoders and one prompt"):
        cache(folder, workers=1)


def test_text_encoders_that_give_no_numbers_are_told_of_and_nothing_is_stored(
    make_project: MakeProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = prepared(make_project("edits"))
    cache(folder, workers=1, limit=1)
    monkeypatch.setattr(encode.torch, "isfinite", lambda values: torch.zeros_like(values, dtype=torch.bool))
    with pytest.raises(UserError, match="values that are not finite for"):
        cache(folder, workers=1)


def test_a_text_encoder_that_lacks_a_tensor_is_refused(make_project: MakeProject) -> None:
    from safetensors.torch import load_file, save_file

    folder = prepared(make_project("edits"))
    file = folder / "work" / "models" / "tiny-flux-kontext" / "text_encoder_2" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in sorted(tensors) if "SelfAttention.k" in name)
    save_file({one: tensor for one, tensor in tensors.items() if one != name}, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"text_encoder_2: 1 tensors are not there, first .*SelfAttention\.k"):
        cache(folder, workers=1)
    assert not list((folder / "work" / "cache" / "text").glob("*/*.parquet"))


def test_latents_and_text_may_share_a_folder(make_project: MakeProject) -> None:
    from prep.upkeep.verify import verify

    folder = make_project("edits")
    change(folder, cache_dir_vae="shared")
    change(folder, 1, cache_dir_vae="shared")
    path = folder / "multidatabackend.json"
    sets = json.loads(path.read_text())
    path.write_text(json.dumps([*sets, {"id": "texts", "dataset_type": "text_embeds", "cache_dir": "shared"}]))
    prepared(folder)
    assert encoded(folder) == [12, 7]
    found = verify(folder)
    assert found.faults == 0 and sorted((one.kind, one.rows) for one in found.stores) == [("latents", 12), ("text", 7)]


def test_an_image_too_large_alone_is_told_and_tried_again(
    make_project: MakeProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = prepared(make_project("edits"))
    with monkeypatch.context() as patch:
        small = Small(encode.family_of(open_project(folder)), 0)
        patch.setattr(encode, "family_of", lambda project: small)
        small.encode_prompts = small._family.encode_prompts
        with pytest.raises(UserError, match="accelerator's memory does not hold it; vae_enable_tiling needs less"):
            cache(folder, workers=1)
    assert encoded(folder) == [12, 0]


# Interruptions


def test_killed_at_random_moments_loses_nothing_that_was_written(make_project: MakeProject) -> None:
    folder = prepared(make_project("edits", write_batch_size=1))
    cache(folder, workers=1)
    whole = rows(folder)
    shutil.rmtree(folder / "work" / "cache")
    process = forked(kill_cache, folder, 1, 5, folder / "told.json")
    process.start()
    process.join()
    told = json.loads((folder / "told.json").read_text())
    before: set[str] = set()
    for seen in told["seen"]:
        assert before <= set(seen)
        before = set(seen)
    assert sum(told["encoded"]) == len(whole) - len(before)
    assert rows(folder) == whole
    assert not [path for path in (folder / "work" / "cache").rglob("*.tmp.*") if path.is_file()]
    leases = [path for path in (folder / "work" / "cache").rglob("leases/*") if path.is_file()]
    mine = f'"process": {told["process"]}'  # one may be of who was killed when nothing else was left to do
    assert not any(mine in path.read_text() for path in leases)


def test_interrupted_by_hand_writes_what_is_encoded(make_project: MakeProject, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = prepared(make_project("edits"))
    bits, seen = encode._bits, []

    def stop_at_the_fourth(values: torch.Tensor) -> object:
        seen.append(values)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return bits(values)

    with monkeypatch.context() as patch:
        patch.setattr(encode, "_bits", stop_at_the_fourth)
        with pytest.raises(KeyboardInterrupt):
            cache(folder, workers=1)
    there = len(rows(folder))
    assert there >= 1
    [latents, _] = cache(folder, workers=1).stores
    assert latents.reused == there and latents.encoded == 12 - there


def test_a_full_disk_stops_the_run_and_what_was_written_stays(make_project: MakeProject) -> None:
    folder = prepared(make_project("edits"))
    arguments, told = ["prep", "cache", str(folder), "--workers", "1"], folder / "told.txt"
    process = forked(command, arguments, {}, folder / "out.txt", told, small_files)
    process.start()
    process.join()
    assert process.exitcode == 1
    failed = told.read_text()
    assert "cannot be written" in failed and "File too large" in failed and "Traceback" not in failed
    assert not list((folder / "work" / "cache").rglob("*.tmp.*"))
    there = rows(folder)
    assert encoded(folder)[0] == 12 - len(there)
    assert there.items() <= rows(folder).items()


# Sharing


def test_five_experiments_on_one_store_encode_once(make_project: MakeProject, tmp_path: Path) -> None:
    shared = {"cache_dir_vae": str(tmp_path / "shared"), "resolution": 128}
    first = make_project("edits")
    datasets = [entry | shared for entry in json.loads((first / "multidatabackend.json").read_text())]
    datasets.append({"id": "texts", "dataset_type": "text_embeds", "cache_dir": str(tmp_path / "texts")})
    (first / "multidatabackend.json").write_text(json.dumps(datasets))
    prepared(first)
    assert encoded(first) == [12, 7]

    def another(name: str, **options: object) -> list[int]:
        folder = tmp_path / name
        shutil.copytree(first, folder, ignore=shutil.ignore_patterns("manifests", "pairs", "cache", "encoders.json"))
        config = json.loads((folder / "config.json").read_text()) | options
        (folder / "config.json").write_text(json.dumps(config))
        if name == "half":
            for picture in sorted((folder / "target").glob("*.jpg"))[::2]:
                for file in (picture, picture.with_suffix(".txt"), folder / "reference" / picture.name):
                    file.unlink()
        if name == "captions":
            texts = sorted((folder / "target").glob("*.txt"))
            for text in texts:
                text.write_text(texts[0].read_text())
        return encoded(prepared(folder))

    assert another("rank", lora_rank=32) == [0, 0]
    assert another("targets", flux_lora_target="all+ffs", learning_rate=1e-5, seed=7) == [0, 0]
    assert another("flavour", model_flavour="dev") == [0, 0]
    assert another("captions") == [0, 0]
    assert another("half") == [0, 0]


# Readers


def test_duckdb_reads_shards(make_project: MakeProject) -> None:
    import duckdb

    folder = prepared(make_project("edits"))
    cache(folder, workers=1)
    shards = str(folder / "work" / "cache" / "latents" / "*" / "*" / "*.parquet")
    found = dict(duckdb.sql(f"select key, latent from '{shards}'").fetchall())
    expected = {key: data for key, data in rows(folder).items() if key in found}
    assert len(found) == 12 and found == expected
    assert np.frombuffer(next(iter(found.values())), np.uint16).size % 16 == 0
