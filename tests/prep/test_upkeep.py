"""What prep cache --verify finds and mends, on the tiny checkpoint's shards."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from families import open_project
from families.checkpoints import key_of, locate
from prep.cache import cache
from prep.cli import app
from prep.needed import needed_of
from prep.noted import image_keys
from prep.pairs import pairs
from prep.pixels import pixels_of
from prep.scan import scan
from prep.upkeep.verify import verify
from schemas.shards import ShardHeader, ShardIndex, latent_row, write_shard

MakeProject = Callable[..., Path]


def cached(make_project: MakeProject) -> Path:
    folder = make_project("deblur")
    scan(folder), pairs(folder), cache(folder)
    return folder


def shards(folder: Path, kind: str) -> list[Path]:
    return sorted((folder / "work" / "cache" / kind).rglob("*.parquet"))


def rows(folder: Path) -> dict[str, bytes]:
    """Return every payload of a project's stores."""
    tables = [pq.read_table(path) for kind in ("latents", "text") for path in shards(folder, kind)]
    return {row["key"]: row.get("latent") or row["embed"] for table in tables for row in table.to_pylist()}


def flip(path: Path, part: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * part)] ^= 1
    path.write_bytes(bytes(data))


def test_a_sound_cache_is_said_to_be_whole(make_project: MakeProject) -> None:
    folder = cached(make_project)
    summary = verify(folder)
    assert summary.faults == 0 and sum(store.rows for store in summary.stores) == len(rows(folder))
    assert list(summary.lines())[-1] == "every row is whole"


def test_every_planted_fault_is_found_and_repair_encodes_exactly_what_was_bad(make_project: MakeProject) -> None:
    folder = cached(make_project)
    before = rows(folder)
    flipped, cut, *_ = shards(folder, "latents")
    lost = pq.read_metadata(cut).num_rows
    flip(flipped)
    cut.write_bytes(cut.read_bytes()[:-9])
    flip(shards(folder, "text")[0], 0.3)
    found = verify(folder)
    assert found.faults == 3
    assert verify(folder).stores == found.stores, "looking changes nothing"
    assert verify(folder, repair=True).faults == 3
    assert verify(folder).faults == 0
    summary = cache(folder)
    assert [store.encoded for store in summary.stores] == [1 + lost, 1]
    assert rows(folder) == before


def test_numbers_that_are_not_finite_are_faults(tmp_path: Path, make_project: MakeProject) -> None:
    folder = cached(make_project)
    store = shards(folder, "latents")[0].parent.parent / "16x16"
    header = ShardHeader("LatentRow", store.parent.name, {"latent": (2, 2, 2)})
    for number, bits in enumerate((0x7F80, 0xFF80, 0x7FC1)):  # infinity, its negative, no number
        values = np.zeros((2, 2, 2), np.uint16)
        values[1, 1, 1] = bits
        write_shard(store, header, [latent_row(f"bad{number}", values), latent_row(f"good{number}", values * 0)])
    assert verify(folder).faults == 3
    verify(folder, repair=True)
    index = ShardIndex(store.parent)
    assert all(f"good{number}" in index and f"bad{number}" not in index for number in range(3))


def test_shards_where_they_do_not_belong_are_faults(make_project: MakeProject) -> None:
    folder = cached(make_project)
    [store] = (folder / "work" / "cache" / "latents").iterdir()
    good = len(rows(folder))
    header = ShardHeader("LatentRow", store.name, {"latent": (16, 2, 2)})
    row = [latent_row("a" * 32, np.zeros((16, 2, 2), np.uint16))]
    write_shard(store / "64x64", header, row)  # its latents are of 16x16
    write_shard(store / "16x16", replace(header, encoder="0" * 16), row)
    said = verify(folder, decode=0).stores[0]
    assert set(said.faults.values()) == {
        "misplaced: its latents are of 16x16",
        f"misplaced: it is of encoder {'0' * 16}",
    }
    verify(folder, repair=True, decode=0)
    assert verify(folder, decode=0).faults == 0 and len(rows(folder)) == good


def test_a_folder_that_describes_another_encoder_is_a_fault(make_project: MakeProject) -> None:
    folder = cached(make_project)
    [path] = (folder / "work" / "cache" / "latents").glob("*/encoder.json")
    said = json.loads(path.read_text())
    assert key_of(said) == path.parent.name
    path.write_text(json.dumps(said | {"posterior": "sample"}))
    assert [*verify(folder, decode=0).stores[0].faults.values()] == [
        f"describes the encoder {key_of(said | {'posterior': 'sample'})}"
    ]
    verify(folder, repair=True, decode=0), cache(folder)
    assert json.loads(path.read_text()) == said and verify(folder, decode=0).faults == 0


def test_a_few_latents_are_decoded_and_compared_with_their_pixels(make_project: MakeProject) -> None:
    import torch

    from families.runtime import family_of

    folder = cached(make_project)
    project = open_project(folder)
    found = verify(folder)
    assert len(found.decoded) == 4 and verify(folder).decoded == found.decoded
    assert found.decoded == verify(folder, decode=7).decoded[:4]
    family, checkpoint = family_of(project), locate(project, project.family.image_encoder)
    encoder = family.load_image_encoder(checkpoint, torch.float32, torch.device("cpu"), tiling=False, slicing=False)
    store = ShardIndex(shards(folder, "latents")[0].parent.parent)
    [pictures] = needed_of(project).pictures(project, image_keys(project))
    for one in found.decoded:
        latent = torch.from_numpy(store.read(one.key)["latent"]).view(torch.bfloat16)
        shown = family.decode_latents(encoder, latent[None])[0].numpy()
        made = pixels_of(pictures.picture(pictures.keys.index(one.key)))
        mean_square = ((made.astype(float) - shown) ** 2).mean()
        assert one.psnr == pytest.approx(10 * np.log10(255**2 / mean_square)) and one.psnr > 3
    assert found.psnr == (min(one.psnr for one in found.decoded), np.median([one.psnr for one in found.decoded]))


def test_a_picture_that_cannot_be_made_now_is_told_and_no_fault(make_project: MakeProject) -> None:
    folder = cached(make_project)
    for photo in (folder / "photos").glob("*.jpg"):
        photo.unlink()
    found = verify(folder)
    assert found.faults == 0 and found.psnr is None
    assert all("cannot be read" in str(one.fault) for one in found.decoded) and len(found.decoded) == 4
    shutil.rmtree(folder / "work" / "pairs")
    assert "not paired yet" in str(verify(folder).undecoded)
    shutil.rmtree(folder / "work" / "models")
    assert (
        verify(folder).undecoded is None
        and verify(folder, decode=2).undecoded == "the image encoder is not on this machine"
    )


def test_files_that_are_not_shards_of_ours_are_left_alone(make_project: MakeProject) -> None:
    folder = cached(make_project)
    store = shards(folder, "latents")[0].parent.parent
    others = [store / "notes.parquet", store.parent / "another" / "0123456789abcdef.parquet"]
    for path in others:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"somebody's own")
    assert verify(folder, repair=True).faults == 0
    assert all(path.read_bytes() == b"somebody's own" for path in others)


def test_a_repair_is_one_document(make_project: MakeProject) -> None:
    folder = cached(make_project)
    flip(shards(folder, "latents")[0])
    said = json.loads(CliRunner().invoke(app, ["cache", str(folder), "--verify", "--repair", "--json"]).stdout)
    assert [len(store["faults"]) for store in said["stores"]] == [1, 0]
    assert [store["encoded"] for store in said["encoded"]["stores"]] == [1, 0]


def test_the_command_says_how_to_mend_and_does_it(make_project: MakeProject) -> None:
    folder = cached(make_project)
    flip(shards(folder, "latents")[0])
    told = CliRunner().invoke(app, ["cache", str(folder), "--verify"])
    assert told.exit_code == 1 and "--repair takes it out and encodes it again" in told.output
    mended = CliRunner().invoke(app, ["cache", str(folder), "--verify", "--repair"])
    assert mended.exit_code == 0 and "1 encoded" in mended.output
    assert CliRunner().invoke(app, ["cache", str(folder), "--verify"]).exit_code == 0
    assert CliRunner().invoke(app, ["cache", str(folder), "--repair"]).exit_code == 2
