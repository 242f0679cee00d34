"""A project of random latents and embeds, with everything that training reads: options, pair table, shards, and the
configuration of a network whose weights nobody needs. What is read and computed does not depend on the numbers.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from families import open_project
from families.checkpoints import EncoderKeys, record_keys
from families.runtime import family_of
from families.shapes import config_of, shaped_denoiser
from schemas.geometry import Geometry
from schemas.keys import text_key
from schemas.paths import resolved
from schemas.project import Project
from schemas.rows import PairRow, Reference
from schemas.shards import Array, ShardHeader, latent_row, text_row, write_shard
from schemas.tables import Provenance, write_table
from train.costs import Size, Sizes

_KEYS = EncoderKeys("image-encoder", "image-encoder", "text-encoder")
_PROMPT = "prompt"
_SCALE = 0.5  # of random latents and embeds

# What a run has besides its steps, and what is not stored here.
_SET: Mapping[str, Any] = {
    "lr_scheduler": "constant",
    "lr_warmup_steps": 0,
    "checkpointing_steps": 0,
    "checkpointing_rolling_steps": 0,
    "validation_disable": True,
    "report_to": "none",
    "posterior": "mode",
    "text_cache_dtype": "bf16",
    "conditioning_multidataset_sampling": "combined",
}
_LEFT_OUT = (
    "data_backend_config", "output_dir", "tracker_run_name", "num_train_epochs", "user_prompt_library",
    "validation_prompt", "init_lora", "eval_dataset_id", "resume_from_checkpoint",
)  # fmt: skip


def synthetic_project(like: Project, folder: Path, sizes: Sizes, samples: int, steps: int) -> Project:
    """Write a project with another's options and equal samples of some sizes into a folder, and open it."""
    trainer, checkpoint = like.trainer, folder / "checkpoint"
    config = _write_checkpoint(like, checkpoint)
    given = {name: value for name, value in trainer.model_dump(mode="json").items() if name in trainer.model_fields_set}
    options = {**{name: value for name, value in given.items() if name not in _LEFT_OUT}, **_SET}
    if isinstance(trainer.lycoris_config, str):
        options["lycoris_config"] = str(resolved(like.root, trainer.lycoris_config))
    options |= {"pretrained_model_name_or_path": str(checkpoint), "max_train_steps": steps}
    references = [f"references-{number}" for number in range(len(sizes.references))]
    sets: list[dict[str, Any]] = [{"id": "targets", "instance_data_dir": "targets", "conditioning_data": references}]
    sets += [{"id": one, "instance_data_dir": one, "conditioning_type": "reference_loose"} for one in references]
    (folder / "config.json").write_text(json.dumps(options))
    (folder / "multidatabackend.json").write_text(json.dumps(sets))
    project = open_project(folder)
    rows = [_row(number, sizes, references) for number in range(samples)]
    table = Provenance(project.pairs_settings(project.targets[0]), "none")
    write_table(project.pair_table("targets"), rows, PairRow, table)
    _write_latents(project, rows, sizes)
    _write_text(project, config)
    record_keys(project, _KEYS)
    return project


def _write_checkpoint(like: Project, folder: Path) -> Mapping[str, Any]:
    """Write the configuration of a project's network, and a file without weights; returns the configuration."""
    network: Any = shaped_denoiser(family_of(like), config_of(like), torch.bfloat16)
    part = folder / like.family.denoiser[0]
    network.save_config(part)
    save_file({}, part / "model.safetensors")
    config: Mapping[str, Any] = network.config
    return config


def _row(number: int, sizes: Sizes, stores: list[str]) -> PairRow:
    name, made = f"{number:06d}", list[Reference]()
    for store, size in zip(stores, sizes.references, strict=True):
        place, compared = _geometry(size), (None,) * 5
        file = (store, f"{store} {name}", f"{name}.png", None, None, None)
        made.append(Reference(*file, place.bucket, place, "", [], *compared))
    place = _geometry(sizes.target)
    target = (name, "targets", f"target {name}", f"{name}.png", 0, 1, place, "")
    return PairRow(*target, made, [_PROMPT], _PROMPT, place.bucket, 0, None)


def _geometry(size: Size) -> Geometry:
    return Geometry(*size, *size, 0, 0)


def _write_latents(project: Project, rows: list[PairRow], sizes: Sizes) -> None:
    generator = np.random.default_rng(0)
    encoded = [(row.target_key(_KEYS.target), "targets", sizes.target) for row in rows]
    for row in rows:
        placed = zip(row.references, sizes.references, strict=True)
        encoded += [(one.key(_KEYS.reference), one.dataset_id, size) for one, size in placed]
    spec = project.family
    for key, dataset, (width, height) in encoded:
        shape = (spec.latent_channels.usual, height // spec.latent_scale, width // spec.latent_scale)
        store = project.latent_store(project.dataset(dataset)) / _KEYS.target / f"{width}x{height}"
        header = ShardHeader("LatentRow", _KEYS.target, {"latent": shape})
        write_shard(store, header, [latent_row(key, _normal(generator, *shape))])


def _write_text(project: Project, config: Mapping[str, Any]) -> None:
    generator, spec = np.random.default_rng(1), project.family
    embed = (project.text_tokens, int(config[spec.text_input]))
    pooled = (int(config[spec.pooled_input]),) if spec.pooled_width is not None else None
    header = ShardHeader("TextRow", _KEYS.text, {"embed": embed} | ({"pooled": pooled} if pooled else {}))
    rows = []
    for prompt in ("", _PROMPT):
        values = _normal(generator, *embed), _normal(generator, *pooled) if pooled else None
        rows.append(text_row(text_key(_KEYS.text, prompt), prompt, *values, project.text_tokens))
    write_shard(project.text_store / _KEYS.text, header, rows)


def _normal(generator: np.random.Generator, *shape: int) -> Array:
    """Draw bit patterns of bfloat16 numbers."""
    drawn = torch.from_numpy(generator.standard_normal(shape, dtype=np.float32) * np.float32(_SCALE))
    bits: Array = drawn.bfloat16().view(torch.uint16).numpy()
    return bits
