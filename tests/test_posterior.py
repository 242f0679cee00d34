"""The option `posterior` from prep cache to training, on the tiny checkpoint."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from families import open_project
from families.checkpoints import EncoderKeys, encoder_keys
from prep.cache import cache
from prep.pairs import pairs
from prep.scan import scan
from schemas.freshness import read_pairs
from schemas.project import Project
from schemas.shards import ShardIndex
from train.data import Shelf
from train.loop import run
from train.order import epoch_batches

MakeProject = Callable[..., Path]
CPU = torch.device("cpu")


def _cached(folder: Path, posterior: str, *overrides: str) -> Project:
    project = open_project(folder, overrides=[f"posterior={posterior}", *overrides])
    scan(project), pairs(project), cache(project)
    return project


def _stored(project: Project, keys: EncoderKeys) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the latents of targets and of references, by sample."""
    [target] = project.targets
    store = project.latent_store(target)
    ours, theirs = ShardIndex(store / keys.target), ShardIndex(store / keys.reference)

    def read(index: ShardIndex, key: str) -> torch.Tensor:
        return torch.from_numpy(np.array(index.read(key)["latent"])).view(torch.bfloat16).float()

    rows = read_pairs(project, target)
    targets = {row.sample_id: read(ours, row.target_key(keys.target)) for row in rows}
    references = {row.sample_id: read(theirs, row.references[0].key(keys.reference)) for row in rows}
    return targets, references


@pytest.mark.parametrize("name", ["edits", "deblur"])
def test_targets_are_drawn_by_about_their_deviation_and_references_stay(make_project: MakeProject, name: str) -> None:
    folder = make_project(name, vae_dtype="fp32")
    stored = {kind: _stored(one, encoder_keys(one)) for kind in ("mode", "sample", "moments")
              for one in [_cached(folder, kind)]}  # fmt: skip
    (modes, references), (samples, others), (moments, also) = stored.values()
    for sample, mode in modes.items():
        mean, std = moments[sample].chunk(2)
        assert torch.equal(mean, mode)
        assert torch.equal(references[sample], others[sample]) and torch.equal(references[sample], also[sample])
        score = (samples[sample] - mode) / std
        assert abs(score.mean()) < 0.1 and 0.9 < score.std() < 1.1
    first, second, *_ = (samples[name] - modes[name] for name in modes)
    assert first.shape != second.shape or not torch.equal(first, second)


def test_one_file_as_target_and_as_reference_is_stored_as_both(make_project: MakeProject) -> None:
    folder = make_project("edits")
    for reference in (folder / "reference").glob("*.jpg"):
        reference.write_bytes((folder / "target" / reference.name).read_bytes() + b"end")
    plain = _cached(folder, "mode")
    assert len({key for key in (encoder_keys(plain).target, encoder_keys(plain).reference)}) == 1
    moments = _cached(folder, "moments")
    targets, references = _stored(moments, encoder_keys(moments))
    for sample, latent in references.items():
        assert torch.equal(targets[sample][: len(latent)], latent)


def test_moments_are_drawn_anew_every_showing_and_the_same_way_every_time(make_project: MakeProject) -> None:
    project = _cached(make_project("edits", train_batch_size=2), "moments")
    shelf = Shelf(project, encoder_keys(project))
    targets, _ = _stored(project, encoder_keys(project))

    def shown(epoch: int, shelf: Shelf) -> dict[str, torch.Tensor]:
        batches = [shelf.load(batch, CPU) for batch in epoch_batches(project, shelf, epoch)]
        return {name: row for batch in batches for name, row in zip(batch.sample_ids, batch.latents, strict=True)}

    first, second = shown(0, shelf), shown(1, shelf)
    again = shown(0, Shelf(project, encoder_keys(project)))
    for name, moments in targets.items():
        mean, std = moments.chunk(2)
        assert first[name].shape == mean.shape
        assert torch.equal(first[name], again[name]) and not torch.equal(first[name], second[name])
        scores = torch.stack([(one[name] - mean) / std for one in (first, second)])
        assert 0.9 < scores.std() < 1.1
    [batch, *_] = epoch_batches(project, shelf, 0)
    loaded = shelf.load(batch, CPU)
    assert loaded.latents.shape[1] == loaded.references[0].shape[1] == 16


def test_repeats_of_one_epoch_are_other_draws(make_project: MakeProject) -> None:
    folder = make_project("edits", photos=1)
    datasets = (
        (folder / "multidatabackend.json").read_text().replace('"resolution": 128', '"resolution": 128, "repeats": 1')
    )
    (folder / "multidatabackend.json").write_text(datasets)
    project = _cached(folder, "moments")
    shelf = Shelf(project, encoder_keys(project))
    first, second = (shelf.load(batch, CPU).latents for batch in epoch_batches(project, shelf, 0))
    assert first.shape == second.shape and not torch.equal(first, second)


def test_training_on_moments_is_reproducible_and_resumes_with_the_identical_stream(make_project: MakeProject) -> None:
    folder = make_project("edits", max_train_steps=8)
    _cached(folder, "moments")

    def trained(
        name: str, posterior: str = "moments", limits: tuple[int | None, ...] = (None,)
    ) -> dict[str, torch.Tensor]:
        project = open_project(folder, overrides=[f"posterior={posterior}", f"tracker_run_name={name}"])
        for limit in limits:
            run(project, limit=limit)
        return load_file(project.run_folder / "pytorch_lora_weights.safetensors")

    whole, again, resumed = trained("whole"), trained("again"), trained("resumed", limits=(3, None))
    _cached(folder, "mode")
    mode = trained("mode", "mode")
    assert all(torch.equal(whole[name], again[name]) and torch.equal(whole[name], resumed[name]) for name in whole)
    assert any(not torch.equal(whole[name], mode[name]) for name in whole)
