"""Checkpoints in the Hub layout: where they lie, whether they are whole, and which numbers they hold.

`fingerprint` hashes weights and configuration, never a path: the same VAE under two names is one encoder. No tensor
library is loaded unless the tiny checkpoint has to be built.
"""

import importlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from schemas.errors import UserError
from schemas.keys import CACHE_VERSION, FileIds, digest
from schemas.paths import resolved
from schemas.project import TINY, Project
from schemas.storage import write_aside

_LAYOUT = ("model_index.json", "scheduler/*")
_VARIANT = re.compile(r"\.(fp16|bf16|non_ema)[.-]")  # weight files that are not loaded by default
_ORIGIN = ("transformers_version", "dtype", "torch_dtype", "architectures")  # of a configuration: who saved it, and how


def locate(project: Project, components: Sequence[str]) -> Path:
    """Return a checkpoint's folder: built if `tiny`, a local one, or fetched from the Hub as far as needed.

    Raises UserError if it cannot be had or lacks one of `components`.
    """
    name = project.checkpoint
    local = resolved(project.root, name)
    if name == TINY:
        folder = _tiny(project)
    elif local.is_dir():
        folder = local
    else:
        folder = _fetch(name, components)
    if missing := _missing(folder, components):
        raise UserError(f"{folder}: not a whole checkpoint, it lacks {', '.join(missing)}")
    return folder


def here(project: Project, components: Sequence[str]) -> Path | None:
    """Return a checkpoint's folder if it is on this machine and has `components`; builds and fetches nothing."""
    name = project.checkpoint
    folder = _tiny_folder(project) if name == TINY else resolved(project.root, name)
    if name != TINY and not folder.is_dir():
        try:
            folder = Path(snapshot_download(name, local_files_only=True))
        except (HFValidationError, LocalEntryNotFoundError, OSError):
            return None
    return None if _missing(folder, components) else folder


def _missing(folder: Path, components: Sequence[str]) -> list[str]:
    """Name what a checkpoint lacks. Weights must be safetensors: other files would not enter an encoder's key."""
    missing = []
    for part in components:
        if not (folder / part).is_dir():
            missing.append(part)
        elif (folder / part / "config.json").exists():
            missing += [f"{part}/{file}" for file in _missing_weights(folder / part)]
    return missing


def _missing_weights(folder: Path) -> list[str]:
    """Name the weight files that a component lacks: all, or shards that its index names."""
    if not _weights(folder):
        return ["*.safetensors"]
    named: set[str] = set()
    for index in folder.glob("*.safetensors.index.json"):
        named |= set(json.loads(index.read_text())["weight_map"].values())
    return sorted(name for name in named if not (folder / name).exists())


def _weights(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.glob("*.safetensors")) if not _VARIANT.search(file.name)]


Description = dict[str, Any]  # what an encoder's numbers depend on, by name


def describe_image_encoder(project: Project, checkpoint: Path, *, remember: bool = True) -> Description:
    """Say what latents depend on besides the image: weights, dtype, and that the posterior's mode is stored."""
    weights = fingerprint(project, checkpoint, project.family.image_encoder, remember=remember)
    return _described("image") | {"weights": weights, "dtype": project.trainer.vae_dtype, "posterior": "mode"}


def describe_text_encoder(project: Project, checkpoint: Path, *, remember: bool = True) -> Description:
    """Say what text embeds depend on besides the prompt: weights and tokenizers, lengths, dtype."""
    weights = fingerprint(project, checkpoint, project.family.text_encoders, remember=remember)
    settings = project.family.text_settings[project.flavour]
    return _described("text") | {"weights": weights, "dtype": "bf16", **settings}


def _described(kind: str) -> Description:
    return {"encoder": kind, "cache_version": CACHE_VERSION}


def key_of(description: Description) -> str:
    """Key an encoder by its description."""
    return digest(description)[:16]


def image_encoder_key(project: Project, checkpoint: Path, *, remember: bool = True) -> str:
    """Key the image encoder."""
    return key_of(describe_image_encoder(project, checkpoint, remember=remember))


def text_encoder_key(project: Project, checkpoint: Path, *, remember: bool = True) -> str:
    """Key the text encoders."""
    return key_of(describe_text_encoder(project, checkpoint, remember=remember))


@dataclass(frozen=True, slots=True)
class EncoderKeys:
    """Which stores belong to a project's checkpoint."""

    image: str
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
        image = image_encoder_key(project, folder, remember=remember)
        return EncoderKeys(image, text_encoder_key(project, folder, remember=remember))
    noted = _recorded(project).get(_record_name(project))
    if noted is None:
        raise UserError(
            f"nothing is cached for checkpoint {project.checkpoint} with vae_dtype {project.trainer.vae_dtype}; "
            f"run: {project.command('prep cache')}"
        )
    return EncoderKeys(**noted)


def _record(project: Project) -> Path:
    return project.workspace / "cache" / "encoders.json"


def _record_name(project: Project) -> str:
    trainer = project.trainer
    return f"{project.checkpoint} {trainer.model_family} {project.flavour} {trainer.vae_dtype}"


def _recorded(project: Project) -> dict[str, dict[str, str]]:
    try:
        noted = json.loads(_record(project).read_text())
    except (OSError, ValueError):
        return {}
    return noted if isinstance(noted, dict) else {}


def fingerprint(project: Project, checkpoint: Path, components: Sequence[str], *, remember: bool = True) -> str:
    """Hash the numbers and settings of some components of a checkpoint."""
    ids = FileIds(project.models / "fingerprints.json", remember=remember)
    parts = []
    for component in components:
        for file in sorted((checkpoint / component).iterdir()):
            if file.suffix == ".json":
                parts.append([component, file.name, _settings(file)])
            elif file.suffix in (".safetensors", ".model", ".txt") and not _VARIANT.search(file.name):
                parts.append([component, file.name, ids.of(file)])
    return digest(parts)


def _settings(file: Path) -> object:
    """Read a configuration without what only tells where it came from."""
    try:
        values = json.loads(file.read_text())
    except ValueError as fault:
        raise UserError(f"{file}: damaged ({fault}); fetch or build the checkpoint again") from fault
    if not isinstance(values, dict):
        return values
    return {name: value for name, value in values.items() if not name.startswith("_") and name not in _ORIGIN}


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
