"""Checkpoints in the Hub layout: where they lie, whether they are whole, and which numbers they hold.

`fingerprint` hashes weights and configuration, never a path: the same VAE under two names, or split over other files,
is one encoder. No tensor library is loaded unless the tiny checkpoint has to be built, or tokens to be counted.
"""

import importlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from families.weights import combined, tensors_id
from schemas.errors import UserError
from schemas.family import Expected
from schemas.keys import CACHE_VERSION, FileIds, canonical, digest
from schemas.paths import resolved
from schemas.project import TINY, Project
from schemas.storage import write_aside
from schemas.trainer import Posterior

_INDEX_OF_PARTS = "model_index.json"
_LAYOUT = (_INDEX_OF_PARTS, "scheduler/*")
_VARIANT = re.compile(r"\.(fp16|bf16|non_ema)[.-]")  # weight files that are not loaded by default
_INDEX = ".safetensors.index.json"  # end of the name of a file that lists shards
_COUNTED = 10_000  # prompts whose tokens are counted at once
_ORIGIN = ("transformers_version", "dtype", "torch_dtype", "architectures")  # of a configuration: who saved it, and how


def locate(project: Project, components: Sequence[str]) -> Path:
    """Return a checkpoint's folder: built if `tiny`, a local one, or fetched from the Hub as far as needed.

    Raises UserError if it cannot be had, lacks one of `components`, or has one of another family.
    """
    name = project.checkpoint
    local = resolved(project.root, name)
    if name == TINY:
        folder = _tiny(project)
    elif local.is_dir():
        folder = local
    else:
        folder = _fetch(name, components)
    if missing := _missing(project, folder, components):
        raise UserError(f"{folder}: not a whole checkpoint, it lacks {', '.join(missing)}")
    check_configs(project, folder, components)
    return folder


def here(project: Project, components: Sequence[str]) -> Path | None:
    """Return a checkpoint's folder if it is on this machine and has `components`; builds and fetches nothing.

    Raises UserError if one of them is of another family.
    """
    folder = _local(project)
    if folder is None or _missing(project, folder, components):
        return None
    check_configs(project, folder, components)
    return folder


def _local(project: Project) -> Path | None:
    """Return the folder that a checkpoint has, or would have, on this machine; None for one of the Hub without."""
    name = project.checkpoint
    folder = _tiny_folder(project) if name == TINY else resolved(project.root, name)
    if name == TINY or folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError, OSError):
        return None


def denoiser_config(project: Project) -> dict[str, Any] | None:
    """Read the denoiser's config.json if it is on this machine, whether or not its weights are.

    Raises UserError if it is of another family or flavour.
    """
    folder, components = _local(project), project.family.denoiser
    if folder is None or not (folder / components[0] / "config.json").exists():
        return None
    check_configs(project, folder, components)
    return _config(folder / components[0] / "config.json")


def is_distilled(project: Project, folder: Path) -> bool:
    """Tell whether a checkpoint is distilled to few steps, as far as it says so."""
    mark, index = project.model.distilled, folder / _INDEX_OF_PARTS
    return mark is not None and index.exists() and _config(index).get(mark) is True


def check_trainable(project: Project, folder: Path) -> None:
    """Raise UserError for a checkpoint that is distilled, unless that is allowed: a LoRA of it learns greyness."""
    if is_distilled(project, folder) and not project.trainer.allow_distilled:
        raise UserError(
            f"{folder / _INDEX_OF_PARTS}: {project.model.distilled} is true. A model that is distilled to few steps "
            f"does not learn from single steps: train on its base ({project.model.checkpoint}) and load the LoRA into "
            "either; allow_distilled trains it anyway"
        )


def check_text_input(project: Project, folder: Path, width: int) -> None:
    """Raise UserError if the denoiser of a checkpoint takes text embeds of another width."""
    file, key = folder / project.family.denoiser[0] / "config.json", project.family.text_input
    takes = _config(file).get(key)
    if takes not in (None, width):
        raise UserError(
            f"{file}: {key} is {takes}, the cached text embeds are {width} wide: they are of another model; "
            f"run: {project.command('prep cache')}"
        )


def _missing(project: Project, folder: Path, components: Sequence[str]) -> list[str]:
    """Name what a checkpoint lacks. Weights must be safetensors: other files would not enter an encoder's key."""
    missing = []
    for part in components:
        if not (folder / part).is_dir():
            missing.append(part)
        elif part in _configs(project):
            missing += [f"{part}/{file}" for file in ("config.json",) if not (folder / part / file).exists()]
            missing += [f"{part}/{file}" for file in _missing_weights(folder / part)]
        elif not any((folder / part).iterdir()):
            missing.append(f"all of {part}")
    return missing


def check_configs(project: Project, folder: Path, components: Sequence[str]) -> None:
    """Raise UserError for a component that is not what the family loads, or is of another flavour."""
    for part in components:
        expected, file = _configs(project).get(part), folder / part / "config.json"
        if expected is None:
            continue
        config, model = _config(file), f"{project.trainer.model_family} {project.flavour}"
        for key, wanted, found in _differences(expected, config):
            raise UserError(
                f"{file}: {key} is {json.dumps(found)}, {model} needs {wanted}; is it the checkpoint of another model?"
            )
        for other in _flavours_of(project, part, config):
            raise UserError(f"{file}: of {other} by its width, not of {model}; set model_flavour to {other}")


def _flavours_of(project: Project, part: str, config: dict[str, Any]) -> list[str]:
    """Name the flavours whose text embeds are as wide as a component says, if that of the project is none of them."""
    family, width = project.family, project.model.text_width
    said: Any = config
    for key in (family.text_input if part in family.denoiser else width.key).split("."):
        said = said.get(key) if isinstance(said, dict) else None
    if not isinstance(said, int) or part not in (*family.denoiser, width.component):
        return []
    values = said if part in family.denoiser else said * width.times
    named = [name for name, one in family.flavours.items() if one.text_width.usual == values]
    return named if project.flavour not in named else []


def _configs(project: Project) -> dict[str, Expected]:
    """Return what the flavour's components must be."""
    return {**project.family.configs, **project.model.configs}


def _differences(expected: Expected, config: dict[str, Any]) -> Iterator[tuple[str, object, object]]:
    """Yield (key, what is needed, what is said) of each value of a configuration that is not as expected."""
    own = config.get("_class_name", expected.class_name)
    if own != expected.class_name and expected.class_name is not None:
        yield "_class_name", expected.class_name, own
    for key, value in expected.values.items():
        if (found := config.get(key, expected.unsaid.get(key))) != value:
            yield key, value, found
    for key in expected.numbers:
        said = config.get(key)
        if isinstance(said, bool) or not isinstance(said, int | float):
            yield key, "a number", said


def _missing_weights(folder: Path) -> list[str]:
    """Name the weight files that a component lacks: all, or shards that its index names."""
    if not _weights(folder):
        return ["*.safetensors"]
    named: set[str] = set()
    for index in folder.glob(f"*{_INDEX}"):
        try:
            named |= set(_json(index)["weight_map"].values())
        except (LookupError, TypeError, AttributeError) as fault:
            raise UserError(
                f"{index}: damaged, it names no weight files; fetch or build the checkpoint again"
            ) from fault
    return sorted(name for name in named if not (folder / name).exists())


def _weights(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.glob("*.safetensors")) if not _VARIANT.search(file.name)]


Description = dict[str, Any]  # what an encoder's numbers depend on, by name


def describe_image_encoder(
    project: Project, checkpoint: Path, posterior: Posterior, *, remember: bool = True
) -> Description:
    """Say what latents depend on besides the image: weights, how they are computed, what of the posterior is stored."""
    weights = fingerprint(project, checkpoint, project.family.image_encoder, remember=remember)
    return _described("image") | {"weights": weights, **_image_settings(project), "posterior": posterior}


def describe_text_encoder(project: Project, checkpoint: Path, *, remember: bool = True) -> Description:
    """Say what text embeds depend on besides the prompt: weights and tokenizers, lengths, dtypes."""
    weights = fingerprint(project, checkpoint, project.family.text_encoders, remember=remember)
    return _described("text") | {"weights": weights, **_text_settings(project)}


def _described(kind: str) -> Description:
    return {"encoder": kind, "cache_version": CACHE_VERSION}


def key_of(description: Description) -> str:
    """Key an encoder by its description."""
    return digest(description)[:16]


def image_encoder_key(project: Project, checkpoint: Path, posterior: Posterior, *, remember: bool = True) -> str:
    """Key the image encoder."""
    return key_of(describe_image_encoder(project, checkpoint, posterior, remember=remember))


def image_encoder_keys(project: Project, checkpoint: Path, *, remember: bool = True) -> tuple[str, str]:
    """Key the image encoder of targets and that of references, which is always the posterior's mode."""
    target = image_encoder_key(project, checkpoint, project.trainer.posterior, remember=remember)
    return target, image_encoder_key(project, checkpoint, "mode", remember=remember)


def text_encoder_key(project: Project, checkpoint: Path, *, remember: bool = True) -> str:
    """Key the text encoders."""
    return key_of(describe_text_encoder(project, checkpoint, remember=remember))


def _image_settings(project: Project) -> dict[str, object]:
    """Return the options that latents depend on; one that is at its default is left out but for the dtype."""
    trainer = project.trainer
    return {"dtype": trainer.vae_dtype} | ({"tiling": True} if trainer.vae_enable_tiling else {})


def _text_settings(project: Project) -> dict[str, object]:
    """Return the settings that text embeds depend on; of options, those that are not at their defaults."""
    trainer = project.trainer
    precisions = {name: value for name, value in text_precisions(project).items() if value != "no_change"}
    called = {"max_sequence_length": project.family.text_rows}
    settings = {"dtype": "bf16"} | {
        called.get(name, name): list(value) if isinstance(value, tuple) else value  # as JSON gives them back
        for name, value in project.text_settings.items()
    }
    return (
        settings
        | ({"precision": precisions} if precisions else {})
        | ({"stored": trainer.text_cache_dtype} if trainer.text_cache_dtype != "bf16" else {})
    )


def text_precisions(project: Project) -> dict[str, str]:
    """Return the quantisation of each text encoder that the family has."""
    trainer = project.trainer
    options = (trainer.text_encoder_1_precision, trainer.text_encoder_2_precision)
    return dict(zip(project.family.numbered_text_encoders, options, strict=False))


def stored_rows(project: Project, checkpoint: Path, prompts: Sequence[str]) -> list[int]:
    """Return how many rows of each prompt's embed a shard holds: all, but of equal padding in front one alone.

    Only for flavours whose embeds begin so a tokenizer is loaded, and with it a tensor library.
    """
    most = project.text_tokens
    if not project.model.padding_first:
        return [most] * len(prompts)
    runtime = importlib.import_module("families.runtime")
    family = runtime.family_of(project)
    tokenizer, counted = family.load_tokenizer(checkpoint), list[int]()
    for first in range(0, len(prompts), _COUNTED):
        counted += family.count_tokens(tokenizer, prompts[first : first + _COUNTED], project.text_settings)
    return [min(count + 1, most) for count in counted]


def check_unchanged(checkpoint: Path, before: object, now: object) -> None:
    """Raise UserError if the key of an encoder, asked again once it is loaded, is not what it was."""
    if before != now:
        raise UserError(f"{checkpoint}: its weights or settings changed while they were loaded; run the command again")


@dataclass(frozen=True, slots=True)
class EncoderKeys:
    """Which stores belong to a project's checkpoint; those of both kinds of images are one under `posterior: mode`."""

    target: str
    reference: str
    text: str


def record_keys(project: Project, keys: EncoderKeys) -> None:
    """Note the keys in the workspace, for a machine that trains without the encoders."""
    known = _recorded(project)
    if known.get(_record_name(project)) != asdict(keys):
        with write_aside(_record(project)) as aside:
            aside.write_text(json.dumps(known | {_record_name(project): asdict(keys)}, indent=1, sort_keys=True))


def encoder_keys(project: Project, *, remember: bool = True) -> EncoderKeys:
    """Return the keys of the encoders on this machine, or those that prep cache noted; raises UserError."""
    folder = here(project, (*project.family.image_encoder, *project.family.text_encoders))
    if folder is not None:
        images = image_encoder_keys(project, folder, remember=remember)
        return EncoderKeys(*images, text_encoder_key(project, folder, remember=remember))
    recorded = _recorded(project)
    noted = recorded.get(_record_name(project))
    if noted is None:
        model = f"{project.trainer.model_family} {project.flavour}"
        others = sorted({name.partition(' [{"')[0] for name in recorded} - {f"{project.checkpoint} {model}"})
        raise UserError(
            f"nothing is cached for checkpoint {project.checkpoint}, {model}, with vae_dtype "
            f"{project.trainer.vae_dtype}, posterior {project.trainer.posterior} and the other options of its encoders"
            + (f" (there is a cache for {', '.join(others)})" if others else "")
            + f"; run: {project.command('prep cache')}"
        )
    return EncoderKeys(**noted)


def _record(project: Project) -> Path:
    return project.workspace / "cache" / "encoders.json"


def _record_name(project: Project) -> str:
    """Name a checkpoint and all options that its encoders' keys depend on."""
    trainer = project.trainer
    settings = canonical([_image_settings(project), trainer.posterior, _text_settings(project)])
    return f"{project.checkpoint} {trainer.model_family} {project.flavour} {settings}"


def _recorded(project: Project) -> dict[str, dict[str, str]]:
    try:
        noted = json.loads(_record(project).read_text())
    except (OSError, ValueError):
        return {}
    return noted if isinstance(noted, dict) else {}


def fingerprint(project: Project, checkpoint: Path, components: Sequence[str], *, remember: bool = True) -> str:
    """Hash the numbers and settings of some components of a checkpoint; raises UserError if a file is damaged.

    Weights count as tensors, however they are split over files.
    """
    weights = FileIds(project.models / "tensors.json", tensors_id, remember=remember)
    others = FileIds(project.models / "fingerprints.json", remember=remember)
    parts: list[list[str | object]] = []
    for component in components:
        folder = checkpoint / component
        for file in sorted(folder.iterdir()):
            if file.suffix == ".json" and not file.name.endswith(_INDEX):
                parts.append([component, file.name, _settings(file)])
            elif file.suffix in (".model", ".txt", ".jinja"):
                parts.append([component, file.name, others.of(file)])
        if stored := _weights(folder):
            parts.append([component, "weights", combined(map(weights.of, stored))])
    return digest(parts)


def _settings(file: Path) -> object:
    """Read a configuration without what only tells where it came from."""
    values = _json(file)
    if not isinstance(values, dict):
        return values
    return {name: value for name, value in values.items() if not name.startswith("_") and name not in _ORIGIN}


def _config(file: Path) -> dict[str, Any]:
    """Read a component's config.json."""
    values = _json(file)
    if not isinstance(values, dict):
        raise UserError(f"{file}: must be an object; fetch or build the checkpoint again")
    return values


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except ValueError as fault:
        raise UserError(f"{file}: damaged ({fault}); fetch or build the checkpoint again") from fault


def _tiny_folder(project: Project) -> Path:
    return project.models / f"{TINY}-{project.trainer.model_family}-{project.flavour}"


def _tiny(project: Project) -> Path:
    """Build the embedded checkpoint once; a folder that exists is whole."""
    folder = _tiny_folder(project)
    if not folder.exists():
        aside = folder.with_name(f"{folder.name}.tmp.{os.getpid()}")
        shutil.rmtree(aside, ignore_errors=True)
        runtime = importlib.import_module("families.runtime")  # late: it loads a tensor library
        runtime.family_of(project).build_tiny(aside, project.flavour)
        try:
            aside.rename(folder)
        except OSError:  # another process was first; both built the same
            shutil.rmtree(aside)
    return folder


def _fetch(name: str, components: Sequence[str]) -> Path:
    patterns = [*_LAYOUT, *(f"{part}/*" for part in components)]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except HFValidationError as fault:
        raise UserError(f"pretrained_model_name_or_path: {name!r} is neither a folder nor a hub id") from fault
    except LocalEntryNotFoundError as fault:
        raise UserError(
            f"pretrained_model_name_or_path: {name} is not on this machine and the hub cannot be reached; "
            f"fetch it once online, give a local folder, or use {TINY!r} to try things out"
        ) from fault
    except HfHubHTTPError as fault:
        raise UserError(
            f"pretrained_model_name_or_path: {name}: {str(fault).splitlines()[0]}; "
            "for a gated model accept its licence on the hub and run: hf auth login"
        ) from fault
