"""From a project folder to a checked `Project`: SimpleTuner's two files, unchanged.

`load_project` is the one way in; it tells every fault of both files at once.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from schemas.captions import filter_fault
from schemas.config_file import Findings, normalise, read_json, shown, split_generator, validate
from schemas.datasets import DatasetConfig
from schemas.entries import complete, filled, gathered
from schemas.errors import ConfigError, Fault, UserError
from schemas.family import FamilySpec
from schemas.lycoris import DEFAULT, LoKr, parse_lokr
from schemas.paths import resolved
from schemas.project import CONFIG_NAME, Project
from schemas.rules import RULES, missing_folders, root_hint
from schemas.simpletuner import DATASET_KEYS, TRAINER_KEYS
from schemas.trainer import TrainerConfig

_UNREADABLE = object()  # in place of a file's content, its fault being told

_ENABLED = (None, False, 0, "", "0", "false", "False", "no")  # values of `disabled` that leave a dataset in


def load_project(
    path: str | Path,
    families: Mapping[str, FamilySpec],
    *,
    root: str | Path | None = None,
    workspace: str | Path | None = None,
    overrides: Sequence[str] = (),
    need_images: bool = False,
) -> Project:
    """Read and check a project folder (or its config.json).

    `overrides` are `key=value` texts that replace options of config.json. `need_images` also checks that the
    datasets' folders exist and can be read. Raises ConfigError with every fault of both files.
    """
    config_path = _config_path(Path(path))
    base = (Path(root) if root is not None else config_path.parent).resolve()
    found = Findings()
    trainer, given = _trainer(config_path, overrides, found)
    products = (Path(workspace) if workspace is not None else config_path.parent / "work").resolve()
    family = _family(trainer, families, config_path, found)
    # Named, it starts from the root like every path; not named, it lies beside config.json.
    named = "data_backend_config" in trainer.model_fields_set
    datasets_path = resolved(base if named else config_path.parent, trainer.data_backend_config)
    runs = trainer.output_dir or str(products / "runs" / trainer.tracker_run_name)
    known = {"model_family": trainer.model_family, "output_dir": runs}
    datasets = _datasets(datasets_path, _Setting(config_path, base, trainer, known), found)
    library = _prompt_library(base, config_path.name, trainer, found)
    project = Project(
        config_path=config_path,
        root=base,
        workspace=products,
        trainer=trainer,
        datasets=tuple(datasets),
        prompt_library=library,
        lokr=_lokr(base, config_path.name, trainer, found),
        caption_filters=_caption_filters(base, datasets_path.name, datasets, found),
        family=family,
        overrides=tuple(overrides),
        warnings=(),
    )
    first = list(found.faults)
    for rule in RULES:
        rule(project, datasets_path.name, found)
    if need_images:
        found.faults += missing_folders(project, datasets_path.name)
    told = {_option(fault) for fault in first}  # what is faulty by itself need not be told again as missing
    found.faults = [*first, *(fault for fault in found.faults[len(first) :] if _option(fault) not in told)]
    if found.faults:
        raise ConfigError(config_path.parent, [_blamed(fault, config_path.name, given) for fault in found.faults])
    return replace(project, warnings=tuple(found.warnings))


def check_folders(project: Project) -> None:
    """Raise ConfigError if the images of a dataset cannot be reached."""
    faults = list(missing_folders(project, Path(project.trainer.data_backend_config).name))
    if faults:
        raise ConfigError(project.config_path.parent, faults)


def _config_path(path: Path) -> Path:
    config = path / CONFIG_NAME if path.is_dir() else path
    if not config.exists():
        raise UserError(f"{config}: no such file; a project is a folder that holds {CONFIG_NAME}, or the path of one")
    return config.resolve()


def _read(path: Path, found: Findings) -> Any:
    """Read a JSON file; one that cannot be parsed is a fault beside the others."""
    try:
        return read_json(path)
    except UserError as fault:
        found.faults.append(Fault(path.name, "", str(fault).removeprefix(f"{path}: ")))
        return _UNREADABLE


def _trainer(path: Path, overrides: Sequence[str], found: Findings) -> tuple[TrainerConfig, set[str]]:
    """Read the options of the trainer, and return the names of those that `overrides` gave."""
    raw = _read(path, found)
    if not isinstance(raw, dict):
        if raw is not _UNREADABLE:
            found.faults.append(Fault(path.name, "", f"must be an object of options, found {shown(raw)}"))
        raw = {}
    values = normalise(raw, TrainerConfig, TRAINER_KEYS, (path.name, ""), found)
    given: set[str] = set()
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--set {text}: must be key=value, for example --set learning_rate=2e-4")
        replaced = normalise({key: literal(key, value)}, TrainerConfig, TRAINER_KEYS, ("--set", ""), found)
        values |= replaced
        given |= replaced.keys()
    return validate(values, TrainerConfig, (path.name, ""), found) or TrainerConfig(), given


def _option(fault: Fault) -> tuple[str, str]:
    """Name the option that a fault is about, without the place of its dataset in the list and its own inner places."""
    named, quote, key = fault.key.rpartition("] ")[2].rpartition('" ')
    return fault.file, named + quote + re.split(r"[.\[]", key)[0]


def _blamed(fault: Fault, file: str, given: set[str]) -> Fault:
    """Lay a fault at the door of `--set` if its option was given there."""
    mine = fault.file == file and re.split(r"[.\[]", fault.key)[0] in given
    return replace(fault, file="--set") if mine else fault


def literal(key: str, text: str) -> Any:
    """Read a value as JSON where that makes sense; an option that is text stays text."""
    field = TrainerConfig.model_fields.get(key.lstrip("-").replace("-", "_"))
    kinds = {field.annotation, *get_args(field.annotation)} if field is not None else set()
    nothing = type(None) in kinds and text == "null"
    if str in kinds and not kinds & {int, float, bool} and not nothing:
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


def _family(trainer: TrainerConfig, families: Mapping[str, FamilySpec], path: Path, found: Findings) -> FamilySpec:
    """Look the family up and check the options whose choices it decides."""
    spec = families.get(trainer.model_family)
    if spec is None:
        known = ", ".join(families)
        found.faults.append(
            Fault(path.name, "model_family", "unknown family", shown(trainer.model_family), f"known: {known}")
        )
        return next(iter(families.values()))
    choices = {
        "model_flavour": (trainer.model_flavour, spec.flavours),
        "flux_lora_target": (trainer.flux_lora_target, spec.lora_targets),
    }
    for key, (value, known_values) in choices.items():
        if value is not None and value not in known_values:
            hint = f"{trainer.model_family} has {', '.join(known_values)}"
            found.faults.append(Fault(path.name, key, "unknown", shown(value), hint))
    alignment = trainer.aspect_bucket_alignment
    if alignment is not None and alignment % spec.smallest_alignment:
        problem = f"{trainer.model_family} needs a multiple of {spec.smallest_alignment}"
        found.faults.append(Fault(path.name, "aspect_bucket_alignment", problem, shown(alignment)))
    flavour = spec.flavours.get(trainer.model_flavour or spec.default_flavour)
    tokens, most = trainer.max_sequence_length, flavour.text_settings["max_sequence_length"] if flavour else None
    if tokens is not None and most is not None and tokens > most:
        problem = f"the model reads {most} tokens at most"
        found.faults.append(Fault(path.name, "max_sequence_length", problem, shown(tokens)))
    return spec


@dataclass(frozen=True, slots=True)
class _Setting:
    """What the entries of the dataset file are read with."""

    config_path: Path
    base: Path
    trainer: TrainerConfig
    known: Mapping[str, str]  # placeholder -> text


def _datasets(path: Path, setting: _Setting, found: Findings) -> list[DatasetConfig]:
    if not path.exists():
        named = setting.trainer.data_backend_config
        hint = root_hint(named, setting.base) or "data_backend_config names the file"
        found.faults.append(Fault(setting.config_path.name, "data_backend_config", f"no such file: {path}", hint=hint))
        return []
    raw = _read(path, found)
    if raw is _UNREADABLE:
        return []
    if not isinstance(raw, list) or not raw:
        found.faults.append(Fault(path.name, "", f"must be a list of at least one dataset, found {shown(raw)}"))
        return []
    datasets = [_dataset(path.name, index, entry, setting, found) for index, entry in enumerate(raw)]
    return [dataset for dataset in datasets if dataset is not None]


def _dataset(file: str, index: int, entry: Any, setting: _Setting, found: Findings) -> DatasetConfig | None:
    if not isinstance(entry, dict):
        found.faults.append(Fault(file, f"[{index}]", "must be an object", shown(entry)))
        return None
    switches = ("disabled", "disable", "--disabled", "--disable")
    if any(entry.get(key) not in _ENABLED for key in switches):
        found.disabled.add(str(entry.get("id")))
        return None
    name = filled(entry.get("id"), (file, f"[{index}] id"), setting.known, Findings())
    prefix = f"[{index}] {shown(name)} " if name is not None else f"[{index}] "
    entry = {key: value for key, value in entry.items() if key not in switches}
    entry = filled(entry, (file, prefix), {**setting.known, "id": str(name)}, found)
    values = normalise(gathered(entry, (file, prefix), found), DatasetConfig, DATASET_KEYS, (file, prefix), found)
    complete(values, setting.trainer)
    generators = values.pop("conditioning", [])
    generators = [generators] if isinstance(generators, dict) else generators or []
    if isinstance(generators, list):
        split = [
            split_generator(generator, (file, f"{prefix}conditioning[{place}]"), found)
            for place, generator in enumerate(generators)
        ]
        values["conditioning"] = [generator for generator in split if generator is not None]
    else:
        found.faults.append(Fault(file, f"{prefix}conditioning", "must be a list of generators", shown(generators)))
    dataset = validate(values, DatasetConfig, (file, prefix), found)
    if dataset is None and isinstance(name, str):
        found.dropped.add(name)
    return dataset


def _caption_filters(
    base: Path, file: str, datasets: Sequence[DatasetConfig], found: Findings
) -> dict[str, tuple[str, ...]]:
    """Read the caption filters of the `text_embeds` entries."""
    filters: dict[str, tuple[str, ...]] = {}
    for dataset in datasets:
        named = dataset.caption_filter_list
        if named is None:
            continue
        key = f'"{dataset.id}" caption_filter_list'
        entries = named if isinstance(named, tuple) else _filter_file(base, named, (file, key), found)
        for entry in entries:
            if fault := filter_fault(entry):
                found.faults.append(Fault(file, key, fault, shown(entry)))
        filters[dataset.id] = entries
    return filters


def _filter_file(base: Path, named: str, where: tuple[str, str], found: Findings) -> tuple[str, ...]:
    """Read a filter list: a JSON list of texts, or one entry per line."""
    path = resolved(base, named)
    if not named:
        return ()
    if not path.exists():
        hint = root_hint(named, base) or "a list of texts may stand here too"
        found.faults.append(Fault(*where, f"no such file: {path}", shown(named), hint))
        return ()
    if path.suffix == ".json":
        raw = _read(path, found)
        if isinstance(raw, list) and all(isinstance(one, str) for one in raw):
            return tuple(raw)
        if raw is not _UNREADABLE:
            found.faults.append(Fault(path.name, "", f"must be a list of texts, found {shown(raw)}"))
        return ()
    try:
        lines = path.read_bytes().decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as fault:
        found.faults.append(Fault(*where, f"{path} cannot be read: {fault}"))
        return ()
    return tuple(line for line in lines if line.strip())


def _lokr(base: Path, config_name: str, trainer: TrainerConfig, found: Findings) -> LoKr | None:
    if trainer.model_type == "full" or trainer.lora_type != "lycoris":
        return None
    if trainer.lycoris_config is None:
        return DEFAULT
    path = resolved(base, trainer.lycoris_config)
    if not path.exists():
        hint = root_hint(trainer.lycoris_config, base)
        found.faults.append(Fault(config_name, "lycoris_config", f"no such file: {path}", hint=hint))
        return DEFAULT
    raw = _read(path, found)
    return DEFAULT if raw is _UNREADABLE else parse_lokr(raw, path.name, found)


def _prompt_library(base: Path, config_name: str, trainer: TrainerConfig, found: Findings) -> dict[str, str]:
    if trainer.user_prompt_library is None:
        return {}
    path = resolved(base, trainer.user_prompt_library)
    if not path.exists():
        hint = root_hint(trainer.user_prompt_library, base)
        found.faults.append(Fault(config_name, "user_prompt_library", f"no such file: {path}", hint=hint))
        return {}
    raw = _read(path, found)
    return {} if raw is _UNREADABLE else parse_prompt_library(raw, path.name, found)


def parse_prompt_library(raw: Any, file: str, found: Findings) -> dict[str, str]:
    """Check a prompt library: an object of {name: prompt}."""
    if not isinstance(raw, dict):
        found.faults.append(Fault(file, "", f"must be an object of {{name: prompt}}, found {shown(raw)}"))
        return {}
    for name, prompt in raw.items():
        if not isinstance(prompt, str):
            found.faults.append(Fault(file, name, "a prompt must be text", shown(prompt)))
    return {name: prompt for name, prompt in raw.items() if isinstance(prompt, str)}
