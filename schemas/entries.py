"""One entry of `multidatabackend.json` before it is checked: placeholders, second places of keys, defaults.

`filled`, `gathered` and `complete` are called in this order.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

from schemas.config_file import Findings, shown
from schemas.datasets import DatasetConfig, HuggingFace
from schemas.errors import Fault
from schemas.trainer import TrainerConfig

# Options of config.json that stand in for the same key of a dataset entry that does not give it.
_DEFAULTS = (
    "resolution", "resolution_type", "minimum_image_size", "maximum_image_size", "target_downsample_size",
    "caption_strategy",
)  # fmt: skip


def filled(value: Any, where: tuple[str, str], known: Mapping[str, str], found: Findings) -> Any:
    """Fill in the placeholders `{id}`, `{model_family}`, `{output_dir}` and `{env:NAME}` of every text."""
    file, place = where
    if isinstance(value, dict):
        return {key: filled(one, (file, f"{place}{key}."), known, found) for key, one in value.items()}
    if isinstance(value, list):
        return [
            filled(one, (file, f"{place.rstrip('.')}[{number}]."), known, found) for number, one in enumerate(value)
        ]
    if not isinstance(value, str):
        return value

    def fill(match: re.Match[str]) -> str:
        name = match.group(1)
        text = os.environ.get(name.removeprefix("env:")) if name.startswith("env:") else known[name]
        if text is None:
            problem = f"the environment has no {name.removeprefix('env:')}"
            found.faults.append(Fault(file, place.rstrip("."), problem, shown(value), "set it before the command"))
        return text or ""

    return re.sub(r"\{(id|model_family|output_dir|env:[A-Za-z_][A-Za-z0-9_]*)\}", fill, value)


def gathered(entry: dict[str, Any]) -> dict[str, Any]:
    """Put the options of a Hugging Face dataset that stand at the top of its entry where they belong, and back."""
    if entry.get("type") != "huggingface" or not isinstance(entry.get("huggingface", {}), dict):
        return entry
    inner = dict(entry.get("huggingface") or {})
    own = HuggingFace.model_fields.keys() - DatasetConfig.model_fields.keys()
    outer = {key: value for key, value in entry.items() if key not in own}
    inner |= {key: value for key, value in entry.items() if key in own and key not in inner}
    if "dataset_name" in inner:
        outer.setdefault("dataset_name", inner.pop("dataset_name"))
    return {**outer, "huggingface": inner}


def complete(values: dict[str, Any], trainer: TrainerConfig) -> None:
    """Put in what an entry leaves to its type, and to config.json."""
    if "dataset_type" not in values and "conditioning_type" in values:
        values["dataset_type"] = "conditioning"
    if values.get("dataset_type") == "conditioning":
        values.setdefault("caption_strategy", None)
    if values.get("type") == "csv" and values.get("csv_caption_column"):
        values.setdefault("caption_strategy", "csv")
    for key in ("huggingface", "caption_shuffle", "image_policy"):
        if values.get(key, ...) is None:
            del values[key]
    for key in _DEFAULTS:
        values.setdefault(key, getattr(trainer, key))
