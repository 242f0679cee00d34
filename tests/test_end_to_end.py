"""The four stages together on real photographs and real classes, at toy size."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import command, forked
from diffusers import FluxKontextPipeline
from PIL import Image
from safetensors.torch import load_file

from families import flux, open_project
from families.checkpoints import encoder_keys, locate
from prep.cache import cache
from prep.pairs import pairs
from prep.pool import Crew
from prep.scan import scan
from schemas import console
from schemas.errors import UserError
from schemas.freshness import read_pairs
from schemas.project import Project
from schemas.rows import ImageRow
from schemas.summaries import CacheSummary
from schemas.tables import read_table
from train.adapter import add_adapter, load_adapter
from train.data import Shelf
from train.loop import run
from train.order import epoch_batches
from train.step import step_loss

MakeProject = Callable[..., Path]
CPU = torch.device("cpu")


def _prepare(folder: Path, workers: int = 1) -> tuple[Project, CacheSummary]:
    project = open_project(folder)
    scan(project, workers=workers)
    pairs(project, workers=workers)
    return project, cache(project, workers=workers)


def _shelf(project: Project) -> Shelf:
    return Shelf(project, encoder_keys(project))


def _tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _loss_on_fixed_noise(project: Project, lora: dict[str, torch.Tensor] | None) -> float:
    """Average the loss over all samples at fixed noise and times."""
    shelf = _shelf(project)
    denoiser = flux.load_denoiser(locate(project, project.family.denoiser), torch.float32)
    add_adapter(denoiser, project)
    if lora is not None:
        load_adapter(denoiser, lora)
    with torch.no_grad():
        losses = [
            step_loss(flux, denoiser, shelf.load(batch, CPU), 1, project.trainer).item()
            for epoch in range(4)
            for batch in epoch_batches(project, shelf, epoch)
        ]
    return float(np.mean(losses))


def _trained(project: Project) -> dict[str, torch.Tensor]:
    """Read the trained LoRA by peft's names."""
    stored = load_file(project.run_folder / "pytorch_lora_weights.safetensors")
    return {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}


def test_training_lowers_the_loss_on_fixed_noise(make_project: MakeProject) -> None:
    project, _ = _prepare(make_project("deblur", max_train_steps=80, learning_rate=3e-3, lora_rank=16))
    before = _loss_on_fixed_noise(project, None)
    summary = run(project)
    after = _loss_on_fixed_noise(project, _trained(project))
    assert summary.last_step == 80
    assert after < 0.97 * before


def test_two_runs_are_equal_to_the_bit(make_project: MakeProject) -> None:
    folder = make_project("deblur", caption_dropout_probability=0.3, lora_dropout=0.1, gradient_accumulation_steps=2)
    _prepare(folder)
    first, second = (open_project(folder, overrides=[f"tracker_run_name={name}"]) for name in ("first", "second"))
    run(first)
    torch.manual_seed(1234)  # nothing may depend on the global generator
    run(second)
    assert _equal(_trained(first), _trained(second))
    other = open_project(folder, overrides=["tracker_run_name=third", "seed=43"])
    run(other)
    assert not _equal(_trained(first), _trained(other))


def _equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_stopped_and_resumed_equals_an_uninterrupted_one(make_project: MakeProject) -> None:
    options = {"optimizer": "optimi-lion", "lr_scheduler": "cosine", "lora_dropout": 0.1, "max_train_steps": 10}
    folder = make_project("edits", **options)
    _prepare(folder)
    whole, parts = (open_project(folder, overrides=[f"tracker_run_name={name}"]) for name in ("whole", "parts"))
    run(whole)
    assert run(parts, limit=3).last_step == 3
    resumed = run(parts)
    assert (resumed.first_step, resumed.last_step) == (3, 10)
    assert _equal(_trained(whole), _trained(parts))
    lines = [(project.run_folder / "metrics.jsonl").read_text().splitlines() for project in (whole, parts)]
    kept = [
        [{k: v for k, v in json.loads(line).items() if k not in ("seconds", "data_wait")} for line in one]
        for one in lines
    ]
    assert kept[0] == kept[1]
    again = run(parts)
    assert (again.first_step, again.last_step) == (10, 10)


def _lines(project: Project) -> list[str]:
    return (project.run_folder / "metrics.jsonl").read_text().splitlines()


def test_the_saved_lora_gives_the_pipeline_the_trained_model(make_project: MakeProject) -> None:
    folder = make_project("edits", lora_alpha=2.0, max_train_steps=6, learning_rate=1e-2)
    project, _ = _prepare(folder)
    run(project)
    checkpoint = locate(project, project.family.denoiser)
    denoiser = flux.load_denoiser(checkpoint, torch.float32)
    add_adapter(denoiser, project)
    load_adapter(denoiser, _trained(project))
    pipeline = FluxKontextPipeline.from_pretrained(checkpoint)
    bare = FluxKontextPipeline.from_pretrained(checkpoint)
    pipeline.load_lora_weights(project.run_folder)

    picture = Image.open(next((folder / "reference").glob("*.jpg"))).resize((96, 96))
    arguments = {"image": picture, "prompt": "colorize", "height": 64, "width": 64, "max_area": 64 * 64}
    arguments |= {"num_inference_steps": 3, "output_type": "latent", "guidance_scale": 1.0}

    def sample(model: FluxKontextPipeline) -> torch.Tensor:
        return model(**arguments, generator=torch.Generator().manual_seed(0)).images

    loaded, untrained = sample(pipeline), sample(bare)
    pipeline.unload_lora_weights()
    pipeline.transformer = denoiser.eval()
    assert torch.equal(loaded, sample(pipeline))
    assert not torch.equal(loaded, untrained)


def test_a_second_pass_over_everything_writes_nothing(make_project: MakeProject) -> None:
    folder = make_project("deblur")
    _prepare(folder)
    run(open_project(folder))
    before = _tree(folder)
    _, summary = _prepare(folder)
    assert [store.encoded for store in summary.stores] == [0, 0]
    run(open_project(folder))
    assert _tree(folder) == before
    run(open_project(folder, overrides=["learning_rate=1e-4", "output_dir=elsewhere"]))
    after = {name: kept for name, kept in _tree(folder).items() if not name.startswith("elsewhere/")}
    assert after == before


def test_a_changed_caption_encodes_that_text_alone(make_project: MakeProject) -> None:
    folder = make_project("edits")
    _prepare(folder)
    caption = next((folder / "target").glob("*.txt"))
    caption.write_text("colorize this photograph, but differently")
    _, summary = _prepare(folder)
    assert [(store.kind, store.encoded) for store in summary.stores] == [("latents", 0), ("text", 1)]


def _storing(folder: Path, storage: str) -> Path:
    """Have the references of a project's first set stored, or made on demand."""
    datasets = json.loads((folder / "multidatabackend.json").read_text())
    datasets[0]["conditioning"][0]["storage"] = storage
    (folder / "multidatabackend.json").write_text(json.dumps(datasets))
    return folder


def test_a_replaced_image_changes_its_own_rows_and_latents_alone(make_project: MakeProject) -> None:
    folder = _storing(make_project("deblur"), "files")
    project, _ = _prepare(folder)
    manifest, shards = project.manifest("photos"), folder / "work" / "cache"
    rows = {row.path: row for row in read_table(manifest, ImageRow)}
    before = {name: kept for name, kept in _tree(shards).items() if not name.startswith("noted/")}
    name = sorted(rows)[0]
    Image.open(folder / "photos" / name).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(folder / "photos" / name)

    project = open_project(folder)
    assert scan(project).datasets[0].read == 1
    assert pairs(project).datasets[0].generated == 1
    summary = cache(project)
    assert [(store.kind, store.encoded) for store in summary.stores] == [("latents", 2), ("text", 0)]
    changed = {row.path for row in read_table(manifest, ImageRow) if row != rows[row.path]}
    assert changed == {name}
    assert before.items() <= _tree(shards).items()


def test_another_vae_is_noticed_and_the_same_vae_elsewhere_is_not(make_project: MakeProject) -> None:
    folder = make_project("edits")
    project, _ = _prepare(folder)
    tiny = locate(project, project.family.image_encoder)
    copy = folder / "copy"
    shutil.copytree(tiny, copy)
    moved = open_project(folder, overrides=[f"pretrained_model_name_or_path={copy}"])
    assert [store.encoded for store in cache(moved).stores] == [0, 0]
    vae = flux.load_image_encoder(copy, torch.float32, CPU, tiling=False, slicing=False)
    with torch.no_grad():
        next(vae.parameters()).add_(0.1)
    vae.save_pretrained(copy / "vae")
    summary = cache(open_project(folder, overrides=[f"pretrained_model_name_or_path={copy}"]))
    assert [(store.kind, store.encoded) for store in summary.stores] == [("latents", 12), ("text", 0)]


def test_schnell_and_dev_share_latents_with_kontext(make_project: MakeProject) -> None:
    folder = make_project("edits")
    _prepare(folder)
    encoded = {
        flavour: [store.encoded for store in cache(open_project(folder, overrides=[f"model_flavour={flavour}"])).stores]
        for flavour in ("dev", "schnell")
    }
    assert encoded == {"dev": [0, 0], "schnell": [0, 7]}  # schnell pads T5 to another length


@pytest.mark.parametrize("flavour", ["dev", "schnell"])
def test_other_flavours_train_too(make_project: MakeProject, flavour: str) -> None:
    project, _ = _prepare(make_project("edits", model_flavour=flavour, max_train_steps=2))
    assert run(project).last_step == 2


def test_one_and_three_workers_write_the_same_bytes(make_project: MakeProject) -> None:
    folder = make_project("deblur", photos=9)
    trees = []
    for workers in (1, 3):
        workspace = folder / f"work-{workers}"
        project = open_project(folder, workspace=workspace)
        shutil.copytree(folder / "work" / "models", workspace / "models")
        scan(project, workers=workers), pairs(project, workers=workers), cache(project, workers=workers)
        tree = {name: data for name, (_, data) in _tree(workspace).items() if not name.startswith("models")}
        trees.append({name: data for name, data in tree.items() if "/users/" not in name})  # they tell where it lies
    assert trees[0] == trees[1]


def test_every_stage_has_as_many_workers_as_there_are_cores_unless_it_is_told(
    make_project: MakeProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    project, asked = open_project(make_project("deblur", photos=1)), []
    made = Crew.__init__
    monkeypatch.setattr(Crew, "__init__", lambda self, *given: (asked.append(given[0]), made(self, *given))[1])
    monkeypatch.setattr("prep.pool.os.sched_getaffinity", lambda process: {0, 1, 2}, raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    for stage in (scan, pairs, cache):
        stage(project)
        assert set(asked) == {3}
        asked.clear()


def test_references_on_demand_give_the_same_latents_as_files(make_project: MakeProject) -> None:
    folder = _storing(make_project("deblur"), "files")
    _prepare(folder)
    _storing(folder, "ondemand")
    shutil.rmtree(folder / "work" / "references")
    project, summary = _prepare(folder)
    assert [store.encoded for store in summary.stores] == [0, 0]
    shutil.rmtree(folder / "work" / "cache" / "latents")
    before = _tree(folder)
    _prepare(folder)
    assert not project.pixel_store.exists()
    kept = {name: data for name, (_, data) in before.items() if "latents" in name}
    assert all(_tree(folder)[name][1] == data for name, data in kept.items())


def test_several_reference_sets_and_plain_images_train_together(make_project: MakeProject) -> None:
    folder = make_project("edits", max_train_steps=12)
    datasets = json.loads((folder / "multidatabackend.json").read_text())
    shutil.copytree(folder / "reference", folder / "second")
    for text in ("recolour the photograph", "make it colourful"):
        for picture in (folder / "second").glob("*.jpg"):
            picture.with_suffix(".txt").write_text(text)
    shutil.copytree(folder / "target", folder / "plain")
    datasets[0]["conditioning_data"] = ["gray", "second"]
    datasets.append(datasets[1] | {"id": "second", "instance_data_dir": "second", "caption_strategy": "textfile"})
    datasets[-1] |= {"conditioning_type": "reference_loose", "crop": True}
    datasets.append(
        {"id": "plain", "instance_data_dir": "plain", "resolution": 128, "caption_strategy": "textfile", "repeats": 1}
    )
    (folder / "multidatabackend.json").write_text(json.dumps(datasets))
    project, _ = _prepare(folder)
    shelf = _shelf(project)
    showings = [one for epoch in range(6) for batch in epoch_batches(project, shelf, epoch) for one in batch]
    edits = [one for one in showings if one.references]
    assert len(edits) == 6 * 6
    assert len(showings) - len(edits) == 6 * 6 * 2
    assert {len(one.references) for one in edits} == {1}
    assert {one.references[0].store for one in edits} == {"gray", "second"}
    assert all((one.prompt == "make it colourful") == (one.references[0].store == "second") for one in edits)
    assert run(project).last_step == 12

    datasets[2]["caption_strategy"] = None
    (folder / "multidatabackend.json").write_text(json.dumps(datasets))
    combined = open_project(folder, overrides=["conditioning_multidataset_sampling=combined"])
    scan(combined), pairs(combined), cache(combined)
    shelf = _shelf(combined)
    counts = {len(one.references) for batch in epoch_batches(combined, shelf, 0) for one in batch}
    assert counts == {0, 2}
    assert (
        run(
            open_project(
                folder,
                overrides=[
                    "conditioning_multidataset_sampling=combined",
                    "tracker_run_name=combined",
                    "train_batch_size=3",
                ],
            )
        ).last_step
        == 12
    )


def _edit_dataset(folder: Path, **options: object) -> None:
    """Give the first dataset of a project more options."""
    path = folder / "multidatabackend.json"
    first, *others = json.loads(path.read_text())
    path.write_text(json.dumps([first | options, *others]))


def test_variants_of_a_crop_are_shown_in_turn_epoch_by_epoch(make_project: MakeProject) -> None:
    folder = make_project("deblur")
    _edit_dataset(folder, crop=True, crop_aspect="square", crop_style="random", crop_variants=2)
    project, summary = _prepare(folder)
    shelf = _shelf(project)
    epochs = [{one.target.key for batch in epoch_batches(project, shelf, epoch) for one in batch} for epoch in range(4)]
    assert len(epochs[0]) == 6 and epochs[0] == epochs[2] and epochs[1] == epochs[3]
    assert len(epochs[0] & epochs[1]) <= 2  # pictures that are squares already have no room for another crop
    assert len(epochs[0] | epochs[1]) * 2 == summary.stores[0].needed
    assert run(project, limit=3).last_step == 3


def test_a_share_of_a_set_is_drawn_anew_for_each_epoch(make_project: MakeProject) -> None:
    folder = make_project("deblur")
    _edit_dataset(folder, probability=0.5, repeats=1)
    project, _ = _prepare(folder)
    shelf = _shelf(project)
    epochs = [
        sorted(one.sample_id for batch in epoch_batches(project, shelf, epoch) for one in batch) for epoch in range(8)
    ]
    assert {len(shown) for shown in epochs} == {6}  # half of six pictures, each twice
    assert all(len(set(shown)) == 3 for shown in epochs)
    assert len({tuple(shown) for shown in epochs}) > 3
    assert len({name for shown in epochs for name in shown}) == 6


def test_an_unreadable_image_is_rejected_once_and_left_out_of_training(make_project: MakeProject) -> None:
    folder = make_project("edits")
    broken = sorted((folder / "target").glob("*.jpg"))[0]
    Image.open(broken).save(broken, format="PNG")
    data = bytearray(broken.read_bytes())
    data[len(data) // 2] ^= 255  # the header and the end are whole, the picture is not
    broken.write_bytes(data)
    project, summary = _prepare(folder)
    [latents, _] = summary.stores
    assert (latents.needed, latents.encoded) == (12, 11)
    [(name, reason)] = latents.rejected.items()
    assert name.endswith(broken.name)
    assert reason.startswith("unreadable")
    again = cache(open_project(folder)).stores[0]
    assert (again.encoded, again.reused, list(again.rejected)) == (0, 11, [name])
    trained = run(project, limit=2)
    assert (trained.samples, trained.skipped) == (5, 1)


def test_an_image_changed_after_the_scan_asks_for_another_scan(make_project: MakeProject) -> None:
    folder = make_project("edits")
    project = open_project(folder)
    scan(project), pairs(project)
    changed = sorted((folder / "target").glob("*.jpg"))[0]
    Image.open(changed).rotate(180).save(changed)
    with pytest.raises(UserError, match=r"(?s)1 images could not be used.*changed since prep scan"):
        cache(project)
    _, summary = _prepare(folder)
    assert summary.stores[0].reused == 11


def test_training_refuses_what_is_not_there_before_it_starts(make_project: MakeProject) -> None:
    folder = make_project("edits")
    with pytest.raises(UserError, match=r"not paired yet.*prep pairs"):
        run(folder)
    project, _ = _prepare(folder)
    with pytest.raises(UserError, match=r"not cached for this checkpoint.*prep cache"):
        run(open_project(folder, overrides=["vae_dtype=bf16"]))
    datasets = json.loads((folder / "multidatabackend.json").read_text())
    datasets[0]["resolution"] = 192
    (folder / "multidatabackend.json").write_text(json.dumps(datasets))
    with pytest.raises(UserError, match=r"settings.*changed since it was paired"):
        run(folder)
    assert not project.run_folder.exists()


def test_a_damaged_shard_stops_the_run_and_names_the_file(make_project: MakeProject) -> None:
    folder = make_project("edits")
    _prepare(folder)
    shard = next((folder / "work" / "cache" / "latents").glob("*/1*/*.parquet"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1  # inside a latent
    shard.write_bytes(data)
    with pytest.raises(UserError, match=f"{shard.name}.*damaged.*prep cache"):
        run(open_project(folder))


def test_a_run_folder_of_other_settings_is_refused(make_project: MakeProject) -> None:
    folder = make_project("edits", max_train_steps=2)
    _prepare(folder)
    run(folder)
    with pytest.raises(UserError, match=r"learning_rate 0.002 -> 0.001.*output_dir"):
        run(open_project(folder, overrides=["learning_rate=1e-3"]))
    with pytest.raises(UserError, match="holds a run already"):
        run(open_project(folder, overrides=["resume_from_checkpoint=null"]))
    assert run(open_project(folder, overrides=["max_train_steps=4"])).first_step == 2


@pytest.mark.parametrize("precision", ["int8-quanto", "int4-quanto", "fp8-quanto"])
def test_a_quantised_base_trains_every_adapter(make_project: MakeProject, precision: str) -> None:
    options = {"base_model_precision": precision, "mixed_precision": "bf16", "flux_lora_target": "all+ffs"}
    project, _ = _prepare(make_project("edits", max_train_steps=2, **options))
    summary = run(project)
    assert summary.loss is not None and np.isfinite(summary.loss)
    assert all(torch.isfinite(tensor).all() for tensor in _trained(project).values())
    assert all(tensor.abs().sum() > 0 for name, tensor in _trained(project).items() if "lora_B" in name)


def test_a_held_out_dataset_is_not_trained_on(make_project: MakeProject) -> None:
    folder = make_project("edits", eval_dataset_id="colour")
    _prepare(folder)
    with pytest.raises(UserError, match="held out"):
        run(folder)


def test_pairs_of_a_set_without_references_are_plain_text_to_image(make_project: MakeProject) -> None:
    folder = make_project("edits")
    datasets = json.loads((folder / "multidatabackend.json").read_text())
    del datasets[0]["conditioning_data"], datasets[1]
    (folder / "multidatabackend.json").write_text(json.dumps(datasets))
    project, _ = _prepare(folder)
    assert {len(row.references) for row in read_pairs(project, project.targets[0])} == {0}
    assert run(project, limit=2).last_step == 2


def test_a_limited_table_is_told_and_the_whole_one_replaces_it(
    make_project: MakeProject, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_project("edits")
    project = open_project(folder)
    scan(project)
    pairs(project, limit=2)
    monkeypatch.setattr(console.log, "propagate", True)
    cache(project)
    assert "first 2 targets only (prep pairs --limit)" in caplog.text
    assert pairs(project).datasets[0].pairs == 6


def test_a_dry_run_writes_nothing_at_any_stage(make_project: MakeProject) -> None:
    folder = _storing(make_project("deblur"), "files")
    shutil.rmtree(folder / "work")
    before = _tree(folder)
    assert scan(folder, dry_run=True).datasets[0].written
    assert _tree(folder) == before
    scan(folder)
    before = _tree(folder)
    assert pairs(folder, dry_run=True).datasets[0].generated == 6
    assert _tree(folder) == before
    pairs(folder)
    before = _tree(folder)
    assert [(store.needed, store.reused) for store in cache(folder, dry_run=True).stores] == [(12, 0), (5, 0)]
    assert _tree(folder) == before
    cache(folder)
    before = _tree(folder)
    (folder / "work" / "models" / "tensors.json").unlink()
    before = _tree(folder)
    assert run(folder, dry_run=True).last_step == 12
    assert _tree(folder) == before
    run(folder)
    with pytest.raises(UserError, match="learning_rate"):
        run(open_project(folder, overrides=["learning_rate=1"]), dry_run=True)


def test_a_machine_without_the_encoders_trains_from_the_shards(make_project: MakeProject) -> None:
    folder = make_project("edits", max_train_steps=2)
    project, _ = _prepare(folder)
    for part in ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        shutil.rmtree(project.models / "tiny-flux-kontext" / part)
    shutil.rmtree(folder / "target")
    shutil.rmtree(folder / "work" / "manifests")
    assert run(folder).last_step == 2
    with pytest.raises(UserError, match="nothing is cached for checkpoint tiny, flux kontext, with vae_dtype bf16"):
        run(open_project(folder, overrides=["vae_dtype=bf16"]))


@pytest.mark.parametrize("part", ["lora.safetensors", "optimizer.pt", "state.json"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    make_project: MakeProject, part: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console.log, "propagate", True)
    folder = make_project("edits", max_train_steps=8)
    project, _ = _prepare(folder)
    run(project, limit=5)
    damaged = project.run_folder / "checkpoint-5" / part
    for data in (damaged.read_bytes()[: damaged.stat().st_size // 2], b""):
        damaged.write_bytes(data)
        assert run(project, dry_run=True).first_step == 4
        assert "checkpoint-5: damaged" in caplog.text and "going on from the one before" in caplog.text
        with pytest.raises(UserError, match=r"checkpoint-5: damaged.*\"latest\" takes the last one that is whole"):
            run(open_project(folder, overrides=["resume_from_checkpoint=checkpoint-5"]))
    (project.run_folder / "checkpoint-4" / part).write_bytes(b"")
    with pytest.raises(UserError, match="no checkpoint there is whole; delete them to start afresh"):
        run(project)


def test_a_full_disk_leaves_the_last_checkpoint_whole(
    make_project: MakeProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_project("edits", max_train_steps=8)
    project, _ = _prepare(folder)
    run(project, limit=4)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("train.checkpoint.sync", full)
        with pytest.raises(UserError, match=r"checkpoint-8: cannot be written.*No space left"):
            run(project)
    assert [path.name for path in sorted(project.run_folder.glob("checkpoint-*"))] == ["checkpoint-4"]
    assert run(project).first_step == 4


def test_epochs_count_where_no_steps_are_given(make_project: MakeProject) -> None:
    folder = make_project("edits", max_train_steps=0, num_train_epochs=2, train_batch_size=2)
    project, _ = _prepare(folder)
    batches = sum(len(epoch_batches(project, _shelf(project), epoch)) for epoch in range(2))
    assert run(project).last_step == batches < 12


def test_prompts_longer_than_the_encoder_takes_are_counted(make_project: MakeProject) -> None:
    folder = make_project("edits")
    next((folder / "target").glob("*.txt")).write_text("colorize " * 200)
    _, summary = _prepare(folder)
    assert len(summary.stores[1].cut) == 1 and "tokens, the encoder takes 512" in summary.stores[1].cut[0]


def test_options_without_effect_do_not_stand_in_the_way_of_a_resume(make_project: MakeProject) -> None:
    folder = make_project("edits", max_train_steps=4)
    project, _ = _prepare(folder)
    run(project, limit=2)
    other = open_project(folder, overrides=["validation_num_inference_steps=5", "vae_batch_size=1", "prep_seed=42"])
    assert run(other).first_step == 2


def test_a_script_needs_no_main_guard_and_is_not_run_by_workers(make_project: MakeProject) -> None:
    folder = _storing(make_project("deblur"), "files")
    script = folder / "script.py"
    script.write_text(
        "print('run')\nfrom prep.scan import scan\nfrom prep.pairs import pairs\n"
        f"scan({str(folder)!r})\npairs({str(folder)!r}, workers=2)\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent
    )
    assert (done.returncode, done.stdout) == (0, "run\n"), done.stderr
    assert len(list(open_project(folder).pixel_store.rglob("*.png"))) == 6


def test_a_longer_run_goes_on_at_the_rate_that_its_schedule_has_there(make_project: MakeProject) -> None:
    folder = make_project("edits", lr_scheduler="cosine", max_train_steps=4)
    project, _ = _prepare(folder)
    run(project)
    run(open_project(folder, overrides=["max_train_steps=8"]))
    rates = [json.loads(line)["lr"] for line in _lines(project)]
    assert rates[4:] == pytest.approx([2e-3 * 0.5 * (1 + np.cos(np.pi * step / 8)) for step in range(4, 8)])


def test_an_older_checkpoint_is_not_gone_on_from_beside_later_ones(make_project: MakeProject) -> None:
    folder = make_project("edits", max_train_steps=8)
    project, _ = _prepare(folder)
    run(project)
    older = open_project(folder, overrides=["resume_from_checkpoint=checkpoint-4"])
    with pytest.raises(UserError, match=r"holds later checkpoints \(checkpoint-8\)"):
        run(older)
    shutil.rmtree(project.run_folder / "checkpoint-8")
    assert run(older).first_step == 4
    with pytest.raises(UserError, match=r"no checkpoint '' in"):
        run(open_project(folder, overrides=["resume_from_checkpoint="]))


def test_other_weights_at_the_same_place_are_not_resumed_on(make_project: MakeProject) -> None:
    folder = make_project("edits", max_train_steps=4)
    project, _ = _prepare(folder)
    run(project, limit=2)
    weights = project.models / "tiny-flux-kontext" / "transformer"
    denoiser = flux.load_denoiser(weights.parent, torch.float32)
    with torch.no_grad():
        next(denoiser.parameters()).mul_(1.5)
    denoiser.save_pretrained(weights)
    with pytest.raises(UserError, match="the model's weights"):
        run(project)


def test_another_folder_of_equal_names_sizes_and_times_is_read_anew(make_project: MakeProject) -> None:
    folder = make_project("edits")
    datasets = json.loads((folder / "multidatabackend.json").read_text())
    del datasets[0]["conditioning_data"], datasets[1]
    for name, level in (("a", 10), ("b", 200)):
        (folder / name).mkdir()
        Image.new("RGB", (64, 64), (level,) * 3).save(folder / name / "x.bmp")
        os.utime(folder / name / "x.bmp", (1, 1))
    found = []
    for name in ("a", "b"):
        datasets[0] |= {"instance_data_dir": name, "caption_strategy": "filename"}
        (folder / "multidatabackend.json").write_text(json.dumps(datasets))
        assert scan(folder).datasets[0].read == 1
        found.append(read_table(open_project(folder).manifest("colour"), ImageRow)[0].image_id)
    assert found[0] != found[1]


def test_linked_folders_are_looked_into_once_and_workspaces_never(make_project: MakeProject) -> None:
    folder = make_project("edits")
    (folder / "target" / "again").symlink_to(folder / "target")
    (folder / "target" / "other").symlink_to(folder / "reference")
    assert scan(folder).datasets[0].seen == 12
    datasets = json.loads((folder / "multidatabackend.json").read_text())
    del datasets[0]["conditioning_data"], datasets[1]
    datasets[0] |= {"instance_data_dir": ".", "caption_strategy": "filename"}
    (folder / "multidatabackend.json").write_text(json.dumps(datasets))
    (folder / "work" / "references").mkdir()
    shutil.copy2(next((folder / "target").glob("*.jpg")), folder / "work" / "references")
    for workspace in ("work", "elsewhere"):
        assert scan(open_project(folder, workspace=folder / workspace)).datasets[0].seen == 12
    with pytest.raises(UserError, match="lies in the workspace"):
        scan(open_project(folder, workspace=folder))


def test_repeats_are_spread_over_the_epoch(make_project: MakeProject) -> None:
    folder = make_project("edits")
    datasets = json.loads((folder / "multidatabackend.json").read_text())
    datasets[0]["repeats"] = 9
    (folder / "multidatabackend.json").write_text(json.dumps(datasets))
    project, _ = _prepare(folder)
    shown = [one.sample_id for batch in epoch_batches(project, _shelf(project), 0) for one in batch]
    assert {shown.count(name) for name in set(shown)} == {10}
    alike = sum(one == other for one, other in pairwise(shown))
    assert alike < 20  # of 59 neighbours, a sixth by chance: 20 is four standard deviations above
    assert shown != [one.sample_id for batch in epoch_batches(project, _shelf(project), 1) for one in batch]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_finishes_the_step_and_writes_a_checkpoint(
    make_project: MakeProject, number: signal.Signals
) -> None:
    folder = make_project("edits", max_train_steps=400, checkpointing_steps=0)
    _prepare(folder)
    project, told = open_project(folder), folder / "told.txt"
    process = forked(command, ["train", "run", str(folder)], {}, told, folder / "log.txt")
    process.start()
    while not (project.run_folder / "metrics.jsonl").exists() or len(_lines(project)) < 3:
        assert process.is_alive(), "it ended before it could be interrupted"
        time.sleep(0.005)
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == 0
    steps = len(_lines(project))
    assert f"stopped after step {steps}; the same command goes on from there" in told.read_text()
    assert run(open_project(folder, overrides=[f"max_train_steps={steps + 1}"])).first_step == steps
