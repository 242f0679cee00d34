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
from schemas.simpletuner import DATASET_KEYS
from schemas.trainer import TrainerConfig

# Options of config.json that stand in for the same key of a dataset entry that does not give it.
_DEFAULTS = (
    "resolution", "resolution_type", "minimum_image_size", "maximum_image_size", "target_downsample_size",
    "caption_strategy", "interpolation", "write_batch_size",
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
        if not name.startswith("env:"):
            return known.get(name, match.group(0))
        text = os.environ.get(name.removeprefix("env:"))
        if text is None:
            problem = f"the environment has no {name.removeprefix('env:')}"
            found.faults.append(Fault(file, place.rstrip("."), problem, shown(value), "set it before the command"))
        return text or ""

    return re.sub(r"\{(id|model_family|output_dir|env:[A-Za-z_][A-Za-z0-9_]*)\}", fill, value)


def gathered(entry: dict[str, Any], where: tuple[str, str], found: Findings) -> dict[str, Any]:
    """Put the options of a Hugging Face dataset that stand at the top of its entry where they belong, and back."""
    given = entry.get("huggingface") or {}
    if not isinstance(given, dict):
        return entry
    shared = {"cache_dir"} if entry.get("type") == "huggingface" else set()
    inside = HuggingFace.model_fields.keys() - DatasetConfig.model_fields.keys() | shared
    outside = {"dataset_name", *DATASET_KEYS} - inside
    keys = {name: name.lstrip("-").replace("-", "_") for name in entry}
    tops = {key: entry[name] for name, key in keys.items()}
    moved = {key: one for key, one in tops.items() if key in inside}
    back = {key: one for key, one in given.items() if key in outside}
    for key, value in {**moved, **{key: tops[key] for key in back if key in tops}}.items():
        if key in given and given[key] != value:
            problem = f"is {shown(given[key])} inside huggingface"
            found.faults.append(Fault(where[0], where[1] + key, problem, shown(value), "keep one"))
    outer = {name: one for name, one in entry.items() if keys[name] not in {*inside, "huggingface"}}
    outer |= {key: one for key, one in back.items() if key not in tops}
    inner = {**moved, **{key: one for key, one in given.items() if key not in back}}
    return {**outer, "huggingface": inner} if inner else outer


def complete(values: dict[str, Any], trainer: TrainerConfig) -> None:
    """Put in what an entry leaves to its type, and to config.json."""
    for key in ("dataset_type", "resolution", "resolution_type"):
        if values.get(key, ...) is None:
            del values[key]
    if "dataset_type" not in values and values.get("conditioning_type") is not None:
        values["dataset_type"] = "conditioning"
    if values.get("dataset_type") == "conditioning":
        values.setdefault("caption_strategy", None)
    if values.get("type") == "huggingface":
        values.setdefault("caption_strategy", "huggingface")
    if values.get("type") == "csv" and values.get("csv_caption_column"):
        values.setdefault("caption_strategy", "csv")
    table = values.get("parquet")
    if values.get("metadata_backend") == "parquet" and isinstance(table, dict):
        values["parquet"] = {"width_column": "width", "height_column": "height", **table}
    for key in _DEFAULTS:
        values.setdefault(key, getattr(trainer, key))
