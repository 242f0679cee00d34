"""Checkpoints in the Hub layout: where they lie, whether they are whole, and which numbers they hold.

`fingerprint` hashes weights and configuration, never a path: the same VAE under two names is one encoder. No tensor
library is loaded unless the tiny checkpoint has to be built.
"""

import importlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from schemas.errors import UserError
from schemas.keys import CACHE_VERSION, FileIds, digest
from schemas.project import TINY, Project

_LAYOUT = ("model_index.json", "scheduler/*")
_VARIANTS = (".fp16.", ".bf16.", ".non_ema.")  # of weight files, not loaded by default


def locate(project: Project, components: Sequence[str]) -> Path:
    """Return a checkpoint's folder: built if `tiny`, a local one, or fetched from the Hub as far as needed.

    Raises UserError if it cannot be had or lacks one of `components`.
    """
    name = project.checkpoint
    local = project.root / Path(name).expanduser()
    if name == TINY:
        folder = _tiny(project)
    elif local.is_dir():
        folder = local
    else:
        folder = _fetch(name, components)
    missing = [part for part in components if not (folder / part).is_dir()]
    if missing:
        raise UserError(f"{folder}: not a whole checkpoint, it has no {', '.join(missing)}")
    return folder


def image_encoder_key(project: Project, checkpoint: Path) -> str:
    """Key the image encoder: its weights, the dtype it computes in, and that it stores the posterior's mode."""
    weights = fingerprint(project, checkpoint, project.family.image_encoder)
    return digest("image encoder", CACHE_VERSION, weights, project.trainer.vae_dtype, "mode")[:16]


def text_encoder_key(project: Project, checkpoint: Path) -> str:
    """Key the text encoders: weights, tokenizers, lengths, and the dtype they compute in."""
    weights = fingerprint(project, checkpoint, project.family.text_encoders)
    settings = project.family.text_settings[project.flavour]
    return digest("text encoder", CACHE_VERSION, weights, settings, "bf16")[:16]


def fingerprint(project: Project, checkpoint: Path, components: Sequence[str]) -> str:
    """Hash the numbers and settings of some components of a checkpoint."""
    ids = FileIds(project.models / "fingerprints.json")
    parts = []
    for component in components:
        for file in sorted((checkpoint / component).iterdir()):
            if file.suffix == ".json":
                parts.append([component, file.name, _settings(file)])
            elif file.suffix in (".safetensors", ".model", ".txt") and not any(part in file.name for part in _VARIANTS):
                parts.append([component, file.name, ids.of(file)])
    return digest(parts)


def _settings(file: Path) -> object:
    """Read a configuration without what only tells where it came from."""
    values = json.loads(file.read_text())
    return {k: v for k, v in values.items() if not k.startswith("_")} if isinstance(values, dict) else values


def _tiny(project: Project) -> Path:
    """Build the embedded checkpoint once; a folder that exists is whole."""
    folder = project.models / f"{TINY}-{project.trainer.model_family}-{project.flavour}"
    if not folder.exists():
        aside = folder.with_name(f"{folder.name}.tmp.{os.getpid()}")
        shutil.rmtree(aside, ignore_errors=True)
        importlib.import_module("families.runtime").quiet()
        importlib.import_module(project.family.module).build_tiny(aside, project.flavour)
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
