"""A project: checked options of both files, and where everything lies.

Made by `schemas.loading.load_project`; a new file or folder of the workspace gets its path here.
"""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from schemas.datasets import DatasetConfig
from schemas.family import FamilySpec, Flavour
from schemas.fetch import url_options
from schemas.keys import digest
from schemas.lycoris import LoKr
from schemas.paths import is_url, resolved
from schemas.remote import store_behind
from schemas.stores import LocalStore, Store
from schemas.trainer import TrainerConfig

TINY = "tiny"
_DROPOUT = 0.1  # of captions, for models that are sampled with classifier-free guidance: it needs the empty prompt
CONFIG_NAME = "config.json"


@dataclass(frozen=True, slots=True)
class Project:
    """Checked options and resolved paths."""

    config_path: Path
    root: Path  # relative paths of both files start here
    workspace: Path
    trainer: TrainerConfig
    datasets: tuple[DatasetConfig, ...]
    prompt_library: Mapping[str, str]
    lokr: LoKr | None  # of lycoris_config, where lora_type is lycoris
    caption_filters: Mapping[str, tuple[str, ...]]  # id of a text_embeds entry -> its caption_filter_list
    family: FamilySpec
    overrides: tuple[str, ...]  # of --set
    warnings: tuple[str, ...]

    @property
    def flavour(self) -> str:
        """Name the flavour, the family's own where none is given."""
        return self.trainer.model_flavour or self.family.default_flavour

    @property
    def model(self) -> Flavour:
        """Return what the flavour has to itself."""
        return self.family.flavours[self.flavour]

    @property
    def text_settings(self) -> Mapping[str, Any]:
        """Return what text embeds depend on besides weights; `max_sequence_length` is the number of their rows."""
        asked = self.trainer.max_sequence_length
        return {**self.model.text_settings, **({"max_sequence_length": asked} if asked is not None else {})}

    @property
    def text_tokens(self) -> int:
        """Return the number of rows of a text embed."""
        return int(self.text_settings["max_sequence_length"])

    @property
    def caption_dropout(self) -> float:
        """Return the share of showings with the empty prompt, what the flavour needs where none is given."""
        given = self.trainer.caption_dropout_probability
        return given if given is not None else _DROPOUT if self.model.true_guidance == "usual" else 0.0

    @property
    def true_guidance(self) -> float:
        """Return the scale of classifier-free guidance that pictures are sampled with; 1 is none."""
        trainer, kind = self.trainer, self.model.true_guidance
        if kind == "usual" and "validation_guidance_real" not in trainer.model_fields_set:
            return trainer.validation_guidance
        return trainer.validation_guidance_real if kind != "none" else 1.0

    @property
    def alignment(self) -> int:
        """Return the pixels that target sides are multiples of."""
        return self.trainer.aspect_bucket_alignment or self.family.alignment

    @property
    def checkpoint(self) -> str:
        """Return the checkpoint's folder, hub id, or `tiny`."""
        return self.trainer.pretrained_model_name_or_path or self.model.checkpoint

    @property
    def targets(self) -> tuple[DatasetConfig, ...]:
        """Return the sets of targets, in the order of the file."""
        return tuple(dataset for dataset in self.datasets if dataset.is_target)

    @property
    def scanned(self) -> tuple[DatasetConfig, ...]:
        """Return the sets that have images of their own."""
        return tuple(dataset for dataset in self.datasets if dataset.dataset_type != "text_embeds")

    @property
    def sampled_prompts(self) -> Mapping[str, str]:
        """Return the prompts that pictures are sampled from, by name: those of the library, then the one more."""
        prompt = self.trainer.validation_prompt
        return {**self.prompt_library, **({"validation_prompt": prompt} if prompt is not None else {})}

    @property
    def further_prompts(self) -> tuple[str, ...]:
        """Return what is cached besides captions, each once: the empty prompt, and what pictures are sampled with."""
        return tuple(dict.fromkeys(["", self.trainer.validation_negative_prompt, *self.sampled_prompts.values()]))

    def command(self, name: str) -> str:
        """Spell a command for this project, as an error's advice."""
        folder = self.config_path.parent
        parts = [str(folder if self.config_path.name == CONFIG_NAME else self.config_path)]
        if self.root != folder:
            parts += ["--root", str(self.root)]
        if self.workspace != folder / "work":
            parts += ["--workspace", str(self.workspace)]
        for text in self.overrides:
            parts += ["--set", text]
        return f"{name} {shlex.join(parts)}"

    def dataset(self, dataset_id: str) -> DatasetConfig:
        """Find a dataset by its id; raises KeyError."""
        for dataset in self.datasets:
            if dataset.id == dataset_id:
                return dataset
        raise KeyError(dataset_id)

    def references_of(self, target: DatasetConfig) -> tuple[DatasetConfig, ...]:
        """Return the reference sets of a target set: those it lists, then those that name it as their source."""
        listed = [self.dataset(name) for name in target.conditioning_data if name not in target.generated_ids]
        linked = [other for other in self.datasets if other.source_dataset_id == target.id and other not in listed]
        return (*listed, *linked)

    def folder_of(self, dataset: DatasetConfig) -> Path:
        """Return the folder of a dataset's images."""
        assert dataset.instance_data_dir is not None, "checked when the project was loaded"
        return resolved(self.root, dataset.instance_data_dir)

    def url_of(self, dataset: DatasetConfig) -> str | None:
        """Return the URL below which a dataset's images lie, None for a local folder."""
        if dataset.type == "aws":
            parts = [dataset.aws_bucket_name, dataset.aws_data_prefix or dataset.instance_data_dir]
            return "s3://" + "/".join(part.strip("/") for part in parts if part)
        named = dataset.instance_data_dir
        return named.rstrip("/") if dataset.type == "local" and named is not None and is_url(named) else None

    def downloads(self, dataset: DatasetConfig) -> Path:
        """Return the folder that the images of a list of URLs are fetched into."""
        if dataset.csv_cache_dir is not None:
            return resolved(self.root, dataset.csv_cache_dir)
        return self.workspace / "downloads" / dataset.id

    def caption_filter(self, dataset: DatasetConfig) -> tuple[str, ...]:
        """Return what is taken out of a dataset's captions."""
        store = dataset.text_embeds or self.text_dataset
        return self.caption_filters.get(store, ()) if store is not None else ()

    def manifest(self, dataset_id: str) -> Path:
        """Return the path of a dataset's manifest."""
        return self.workspace / "manifests" / f"{dataset_id}.parquet"

    def pair_report(self, dataset_id: str) -> Path:
        """Return the path of the list of what was odd when a target set was paired."""
        return self.workspace / "pairs" / f"{dataset_id}.report.csv"

    def pair_table(self, dataset_id: str) -> Path:
        """Return the path of a target set's pair table."""
        return self.workspace / "pairs" / f"{dataset_id}.parquet"

    def noted(self, dataset_id: str) -> Path:
        """Return the path of what prep cache last made of a target set's pairs."""
        return self.workspace / "cache" / "noted" / f"{dataset_id}.parquet"

    def latent_store(self, dataset: DatasetConfig) -> Store:
        """Return the store of a dataset's latents, above the encoder keys."""
        return self._store(dataset.cache_dir_vae, dataset) or LocalStore(self.workspace / "cache" / "latents")

    def _store(self, place: str | None, dataset: DatasetConfig) -> Store | None:
        """Return the store at a place that a dataset names, None if it names none."""
        if place is not None and is_url(place):
            return store_behind(place, url_options(place, dataset), self.workspace / "mirror")
        return LocalStore(resolved(self.root, place)) if place is not None else None

    @property
    def text_dataset(self) -> str | None:
        """Return the id of the `text_embeds` entry that is used."""
        stores = [dataset for dataset in self.datasets if dataset.dataset_type == "text_embeds"]
        chosen = next((store for store in stores if store.default), stores[0] if stores else None)
        return chosen.id if chosen is not None else None

    @property
    def text_store(self) -> Store:
        """Return the store of text embeds, above the encoder keys."""
        chosen = self.dataset(self.text_dataset) if self.text_dataset is not None else None
        named = self._store(chosen.cache_dir, chosen) if chosen is not None else None
        return named or LocalStore(self.workspace / "cache" / "text")

    @property
    def pixel_store(self) -> Path:
        """Return the folder of generated reference pictures."""
        return self.workspace / "references"

    @property
    def models(self) -> Path:
        """Return the folder of built-in checkpoints."""
        return self.workspace / "models"

    @property
    def compiled(self) -> Path:
        """Return the folder of what compilers made."""
        return self.workspace / "compiled"

    @property
    def run_folder(self) -> Path:
        """Return the folder that train writes to."""
        if self.trainer.output_dir is not None:
            return resolved(self.root, self.trainer.output_dir)
        return self.workspace / "runs" / self.trainer.tracker_run_name

    def scan_settings(self, dataset: DatasetConfig) -> str:
        """Hash the settings that a dataset's manifest depends on."""
        trainer = self.trainer
        filters = self.caption_filter(dataset)
        ours = (self.alignment, trainer.aspect_bucket_rounding, trainer.prep_seed)
        return digest("scan", dataset.fingerprint("scan"), *ours, filters)

    def caption_settings(self, dataset: DatasetConfig) -> str:
        """Hash the settings that a dataset's captions depend on, besides the text they are read from."""
        options = {name: value for name, value in dataset.acting("scan").items() if "caption" in name}
        prompts = [dataset.instance_prompt, dataset.prepend_instance_prompt, dataset.only_instance_prompt]
        multiline = dataset.disable_multiline_split
        return digest(options, prompts, multiline, self.caption_filter(dataset), self.trainer.prep_seed)

    def pairs_settings(self, target: DatasetConfig) -> str:
        """Hash the settings that a target set's pair table depends on."""
        references = [other.fingerprint("pairs") for other in self.references_of(target)]
        scans = [self.scan_settings(dataset) for dataset in (target, *self.references_of(target))]
        return digest("pairs", target.fingerprint("pairs"), references, scans, self.trainer.fingerprint("pairs"))
