"""Where other trainers look for pairs, and the configuration that makes them take every pixel as it is.

A new layout is a few pure functions here and an entry in `LAYOUTS`.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from prep.geometry import Policy, Size, Targets, fit
from schemas.datasets import DatasetConfig
from schemas.paths import is_url, resolved
from schemas.project import TINY, Project

Options: TypeAlias = dict[str, Any]

# SimpleTuner finds a bucket by its aspect ratio, rounded: with two decimals some sizes are not their own bucket.
_ROUNDING = 9

_VAE_AND_PATCH = 16  # what musubi-tuner and ai-toolkit cut the sides of FLUX pictures to multiples of


@dataclass(frozen=True, slots=True)
class Sample:
    """One pair as it lies in the folder."""

    name: str  # of its files, without extension: no other's, even where case does not count
    prompt: str
    sizes: tuple[Size, ...]  # of the target, then of the references

    @property
    def group(self) -> str:
        """Name the pairs that one set of datasets can take as they are: by the shorter sides of their pictures."""
        edges = [min(size) for size in self.sizes]
        return "-".join(map(str, edges if len(set(edges)) > 1 else edges[:1]))


@dataclass(frozen=True, slots=True)
class Export:
    """What a configuration speaks of."""

    project: Project
    target: DatasetConfig
    folder: Path
    samples: tuple[Sample, ...]

    @property
    def references(self) -> int:
        """Return how many references a pair has."""
        return max((len(sample.sizes) - 1 for sample in self.samples), default=0)

    @property
    def groups(self) -> dict[str, list[Sample]]:
        """Return the samples by group, in the order of the shorter side."""
        found: dict[str, list[Sample]] = {}
        for sample in sorted(self.samples, key=lambda one: [min(size) for size in one.sizes]):
            found.setdefault(sample.group, []).append(sample)
        return found

    @property
    def largest(self) -> Size:
        """Return the size of the target that has the most pixels."""
        return max((sample.sizes[0] for sample in self.samples), key=lambda size: (size[0] * size[1], size))


@dataclass(frozen=True, slots=True)
class Layout:
    """One trainer's way to keep pairs."""

    target: Callable[[Sample], str]  # path of its target, below the folder
    reference: Callable[[Sample, int], str]  # path of a reference, the first is 0
    captions: bool  # text files beside the targets
    files: Callable[[Export], Mapping[str, str]]  # configuration: path below the folder -> text
    start: Callable[[Export], str]  # how to train on it
    altered: Callable[[Export], int]  # pairs of which the trainer would resize or crop a picture again
    caches: str | None  # what the trainer keeps of pictures by their names alone, stale when they change
    least_edge: int = 1  # pixels of a shorter side that its configuration can name


def _numbered(folder: str, number: int) -> str:
    return folder if number == 0 else f"{folder}-{number + 1}"


# pairline and SimpleTuner: a dataset for each shorter side, whose pictures are their own buckets


def _grouped_target(sample: Sample) -> str:
    return f"target/{sample.group}/{sample.name}.png"


def _grouped_reference(sample: Sample, number: int) -> str:
    return f"{_numbered('reference', number)}/{sample.group}/{sample.name}.png"


def _keeping(edge: int) -> Options:
    """Return the options under which a picture of this shorter side is neither resized nor cropped."""
    return {"resolution": edge, "resolution_type": "pixel", "crop": False, "crop_style": "center"}


def _keeps(size: Size, alignment: int) -> bool:
    """Tell whether a picture is its own bucket under `_keeping`."""
    policy = Policy(min(size), "pixel", alignment, _ROUNDING, crop_style="center")
    fitted = fit(size, policy, Targets(), ())
    return not isinstance(fitted, str) and fitted.as_key() == (*size, *size, 0, 0)


def _datasets(export: Export, root: str) -> Iterator[Options]:
    """Yield the datasets of all groups, each set of targets followed by its references."""
    target = export.target
    for group, samples in export.groups.items():
        name = f"{target.id[:100]}-{group}"
        references = range(len(samples[0].sizes) - 1)
        ids = [f"{name}-{_numbered('reference', number)}" for number in references]
        entry: Options = {"id": name, "type": "local", "dataset_type": target.dataset_type}
        entry |= {"instance_data_dir": f"{root}target/{group}", **_keeping(min(samples[0].sizes[0]))}
        entry |= {"caption_strategy": "textfile", "disable_multiline_split": True}
        entry |= {"repeats": target.repeats, "probability": target.probability}
        yield entry | ({"conditioning_data": ids} if ids else {})
        for number, reference_id in zip(references, ids, strict=True):
            strict = all(sample.sizes[0] == sample.sizes[number + 1] for sample in samples)
            yield {
                "id": reference_id,
                "type": "local",
                "dataset_type": "conditioning",
                "instance_data_dir": f"{root}{_numbered('reference', number)}/{group}",
                "conditioning_type": "reference_strict" if strict else "reference_loose",
                **_keeping(min(samples[0].sizes[number + 1])),
                "caption_strategy": None,
            }


def _written(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2) + "\n"


# Options of config.json that say where a project's own files are, or what its datasets are.
_OF_THE_PROJECT = {
    *("data_backend_config", "output_dir", "resume_from_checkpoint", "eval_dataset_id", "caption_strategy"),
    *("resolution", "resolution_type", "minimum_image_size", "maximum_image_size", "target_downsample_size"),
    *("aspect_bucket_alignment", "aspect_bucket_rounding"),
}


def _pairline_files(export: Export) -> Mapping[str, str]:
    project, trainer = export.project, export.project.trainer
    given = trainer.model_dump(mode="json", exclude_unset=True, exclude=_OF_THE_PROJECT)
    for name in ("pretrained_model_name_or_path", "user_prompt_library"):
        path = given.get(name)
        if path and path != TINY and not is_url(path) and resolved(project.root, path).exists():
            given[name] = str(resolved(project.root, path).absolute())
    given |= {"aspect_bucket_alignment": project.alignment, "aspect_bucket_rounding": _ROUNDING}
    datasets = list(_datasets(export, ""))
    if not any(sample.prompt for sample in export.samples):
        datasets = [{**one, "caption_strategy": None} for one in datasets]
    return {"config.json": _written(given), "multidatabackend.json": _written(datasets)}


def _pairline_start(export: Export) -> str:
    return f"prep scan {_quoted(export.folder)}, then pairs, cache and train run as with any project"


def _simpletuner_files(export: Export) -> Mapping[str, str]:
    cache = export.folder / "cache"
    datasets = list(_datasets(export, f"{export.folder}/"))
    datasets = [{**one, "cache_dir_vae": str(cache / "vae" / one["id"])} for one in datasets]
    text = {"id": f"{export.target.id[:100]}-text", "type": "local", "dataset_type": "text_embeds", "default": True}
    return {"multidatabackend.json": _written([*datasets, {**text, "cache_dir": str(cache / "text")}])}


def _simpletuner_start(export: Export) -> str:
    options = {
        "data_backend_config": str(export.folder / "multidatabackend.json"),
        "aspect_bucket_alignment": export.project.family.alignment,
        "aspect_bucket_rounding": _ROUNDING,
    }
    if export.references > 1:
        options["conditioning_multidataset_sampling"] = export.project.trainer.conditioning_multidataset_sampling
    listed = ", ".join(f'"{name}": {json.dumps(value, ensure_ascii=False)}' for name, value in options.items())
    return f"put {listed} into SimpleTuner's config.json, then simpletuner train"


def _altered_by_simpletuner(export: Export) -> int:
    alignment = export.project.family.alignment
    return sum(not all(_keeps(size, alignment) for size in sample.sizes) for sample in export.samples)


# musubi-tuner: one folder each of targets and references, none below; several references are numbered


def _flat_target(sample: Sample) -> str:
    return f"target/{sample.name}.png"


def _musubi_reference(sample: Sample, number: int) -> str:
    return f"reference/{sample.name}{f'_{number}' if len(sample.sizes) > 2 else ''}.png"


def _musubi_files(export: Export) -> Mapping[str, str]:
    lines = [
        "[general]",
        f"resolution = {json.dumps(export.largest)} # of the largest: without upscaling, no picture is resized",
        'caption_extension = ".txt"',
        f"batch_size = {export.project.trainer.train_batch_size}",
        "enable_bucket = true",
        "bucket_no_upscale = true",
        "",
        "[[datasets]]",
        f"image_directory = {_quote(export.folder / 'target')}",
        f"cache_directory = {_quote(export.folder / 'cache')}",
        f"num_repeats = {export.target.repeats + 1}",
    ]
    if export.references:
        lines += [f"control_directory = {_quote(export.folder / 'reference')}", "no_resize_control = true"]
    return {"dataset.toml": "\n".join(lines) + "\n"}


def _musubi_start(export: Export) -> str:
    config = _quoted(export.folder / "dataset.toml")
    scripts = export.project.model.scripts
    one = "; it takes the first reference of several" if scripts.one_reference and export.references > 1 else ""
    return (
        f"python src/musubi_tuner/{scripts.musubi}_cache_latents.py --dataset_config {config} --vae ae.safetensors, "
        f"then …_cache_text_encoder_outputs.py and …_train_network.py with the same --dataset_config{one}"
    )


def _altered_by_cutting(export: Export) -> int:
    return sum(any(side % _VAE_AND_PATCH for size in sample.sizes for side in size) for sample in export.samples)


# ai-toolkit: a folder of targets, and one for each reference


def _flat_reference(sample: Sample, number: int) -> str:
    return f"{_numbered('reference', number)}/{sample.name}.png"


def _ai_toolkit_files(export: Export) -> Mapping[str, str]:
    width, height = export.largest
    folders = [_quote(export.folder / _numbered("reference", number)) for number in range(export.references)]
    control = [f"  control_path: {folders[0]}"] if len(folders) == 1 else ["  control_path:"]
    control += [f"    - {folder}" for folder in folders if len(folders) > 1]
    lines = [
        "# Goes into config.process[0] of an ai-toolkit job.",
        "datasets:",
        f"- folder_path: {_quote(export.folder / 'target')}",
        *(control if folders else []),
        '  caption_ext: "txt"',
        f"  caption_dropout_rate: {export.project.caption_dropout}",
        "  cache_latents_to_disk: true",
        f"  num_repeats: {export.target.repeats + 1}",
        f"  resolution: [{math.isqrt(width * height - 1) + 1}] # whose square holds the largest: no picture is resized",
    ]
    return {"datasets.yaml": "\n".join(lines) + "\n"}


def _ai_toolkit_start(export: Export) -> str:
    config, job = _quoted(export.folder / "datasets.yaml"), export.project.model.scripts.ai_toolkit
    return f"put {config} in place of `datasets` in {job}, then python run.py on it"


def _altered_by_ai_toolkit(export: Export) -> int:
    def fits(sample: Sample) -> bool:
        return all(size == sample.sizes[0] and not any(side % _VAE_AND_PATCH for side in size) for size in sample.sizes)

    return sum(not fits(sample) for sample in export.samples)


# diffusers: an imagefolder. Below `train`, because `datasets` would take a name such as `cat-test.png` for a split


def _diffusers_target(sample: Sample) -> str:
    return f"train/target/{sample.name}.png"


def _diffusers_reference(sample: Sample, number: int) -> str:
    return f"train/{_numbered('reference', number)}/{sample.name}.png"


def _diffusers_files(export: Export) -> Mapping[str, str]:
    return {"train/metadata.jsonl": "".join(map(_diffusers_line, export.samples))}


def _diffusers_line(sample: Sample) -> str:
    said = {"file_name": _diffusers_target(sample).removeprefix("train/")}
    for number in range(len(sample.sizes) - 1):
        column = "cond_image" + ("" if number == 0 else f"_{number + 1}")
        said[f"{column}_file_name"] = _diffusers_reference(sample, number).removeprefix("train/")
    return json.dumps({**said, "text": sample.prompt}, ensure_ascii=False) + "\n"


def _diffusers_start(export: Export) -> str:
    buckets = ";".join(f"{height},{width}" for width, height in _sizes(export))
    columns = "--image_column image --caption_column text" + (
        " --cond_image_column cond_image" if export.references else ""
    )
    return (
        f"accelerate launch {export.project.model.scripts.diffusers} --dataset_name {_quoted(export.folder)} {columns} "
        f"--aspect_ratio_buckets '{buckets}' --repeats {export.target.repeats + 1} --center_crop"
    )


def _sizes(export: Export) -> list[Size]:
    return sorted({sample.sizes[0] for sample in export.samples})


def _altered_by_diffusers(export: Export) -> int:
    """Count the pairs that land in another's bucket: the last one of equal aspect is taken, whatever its size."""
    taken = {width / height: (width, height) for width, height in _sizes(export)}

    def fits(sample: Sample) -> bool:
        width, height = sample.sizes[0]
        return all(size == taken[width / height] for size in sample.sizes[:2])

    return sum(not fits(sample) for sample in export.samples)


def _none(_export: Export) -> int:
    return 0


def _quote(path: Path) -> str:
    """Spell a path as JSON does, which TOML and YAML read alike."""
    return json.dumps(str(path), ensure_ascii=False)


def _quoted(path: Path) -> str:
    """Spell a path for a shell, if it needs that."""
    return str(path) if re.fullmatch(r"[\w@%+=:,./-]+", str(path)) else "'" + str(path).replace("'", "'\\''") + "'"


LAYOUTS: Mapping[str, Layout] = {
    "pairline": Layout(
        *(_grouped_target, _grouped_reference, True, _pairline_files, _pairline_start, _none),
        caches=None,
        least_edge=64,
    ),
    "simpletuner": Layout(
        *(_grouped_target, _grouped_reference, True, _simpletuner_files, _simpletuner_start, _altered_by_simpletuner),
        caches="cache/vae and target/*/aspect_ratio_bucket_*.json",
    ),
    "musubi": Layout(
        *(_flat_target, _musubi_reference, True, _musubi_files, _musubi_start, _altered_by_cutting),
        caches="cache",
    ),
    "ai-toolkit": Layout(
        *(_flat_target, _flat_reference, True, _ai_toolkit_files, _ai_toolkit_start, _altered_by_ai_toolkit),
        caches="target/_latent_cache and target/.aitk_size.json",
    ),
    "diffusers": Layout(
        *(_diffusers_target, _diffusers_reference, False, _diffusers_files, _diffusers_start, _altered_by_diffusers),
        caches=None,
    ),
}
