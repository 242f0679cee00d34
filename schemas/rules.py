"""Rules that span several options or both files: each a function that appends what it finds.

A new rule is a function here and a name in `RULES`; what merely has no effect is a line in one of the `_inactive_...`.
"""

from collections.abc import Callable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from schemas.config_file import Findings, shown
from schemas.datasets import DatasetConfig
from schemas.errors import Fault
from schemas.options import Options, facts_of
from schemas.paths import resolved
from schemas.project import Project
from schemas.recipes import does_nothing
from schemas.trained import TRAINING_RULES
from schemas.trainer import PLAIN_TENSORS

# Limits of the three image sizes, beyond which the unit is mistaken.
_MOST_MEGAPIXELS = 20
_FEWEST_PIXELS = 10  # of an edge
_FEWEST_SCALED_PIXELS = 512  # of an edge that images are scaled to, under `pixel`

_SIZES = ("minimum_image_size", "maximum_image_size", "target_downsample_size")
_CROPS = ("resolution", "resolution_type", "crop", "crop_aspect", "crop_aspect_buckets", "crop_style")
_OF_TARGETS = (
    "conditioning", "conditioning_data", "crop_variants", "vae_cache_clear_each_epoch", "ignore_extension",
    "on_unpaired", "identical_references", "alignment_check",
)  # fmt: skip
_CHOSEN = ("closest", "random")  # values of crop_aspect that need aspects


def root_hint(relative: str, base: Path) -> str | None:
    """Say so if `--root .` would find a path that is missing below `base`."""
    if not Path(relative).is_absolute() and (Path.cwd() / relative).exists() and base != Path.cwd():
        return "it exists below the current folder: add --root ."
    return None


def missing_folders(project: Project, file: str) -> Iterator[Fault]:
    """Yield a fault for every dataset whose images cannot be reached."""
    for dataset in project.scanned:
        if dataset.type == "csv" and dataset.csv_file is not None:
            table = resolved(project.root, dataset.csv_file)
            if not table.is_file():
                hint = root_hint(dataset.csv_file, project.root)
                yield Fault(file, f'"{dataset.id}" csv_file', f"no such file: {table}", hint=hint)
        named = dataset.instance_data_dir
        if dataset.type != "local" or named is None or project.url_of(dataset) is not None:
            continue
        if not project.folder_of(dataset).is_dir():
            key, hint = f'"{dataset.id}" instance_data_dir', root_hint(named, project.root)
            yield Fault(file, key, f"no such folder: {project.folder_of(dataset)}", hint=hint)


# Faults


def _rule_ids(project: Project, file: str, found: Findings) -> None:
    seen: set[str] = set()
    for dataset in project.datasets:
        if dataset.id in seen:
            found.faults.append(Fault(file, f'"{dataset.id}" id', "given to two datasets", hint="ids are unique"))
        seen.add(dataset.id)
    first, *others = [one.id for one in project.datasets if one.dataset_type == "text_embeds" and one.default] or [""]
    for name in others:
        problem = "two text_embeds entries are the default"
        found.faults.append(Fault(file, f'"{name}" default', problem, "true", f'"{first}" is one already'))


# What a dataset of each type must say.
_NEEDED = {
    "local": "instance_data_dir", "huggingface": "dataset_name", "csv": "csv_file", "aws": "aws_bucket_name",
}  # fmt: skip


def _rule_sources(project: Project, file: str, found: Findings) -> None:
    for dataset in project.scanned:
        needed = _NEEDED[dataset.type]
        if getattr(dataset, needed) is None:
            hint = f'a dataset of type "{dataset.type}" lies there'
            found.faults.append(Fault(file, f'"{dataset.id}" {needed}', "missing, but required", hint=hint))
        backend = dataset.metadata_backend if "metadata_backend" in dataset.model_fields_set else None
        key, table = f'"{dataset.id}" metadata_backend', dataset.parquet
        if backend is not None and (backend == "huggingface") != (dataset.type == "huggingface"):
            problem, hint = "goes with type 'huggingface', and that with no other", "leave it out"
            found.faults.append(Fault(file, key, problem, shown(backend), hint))
        if backend == "parquet" and (table is None or not (table.width_column and table.height_column)):
            hint = '"parquet": {"path": ..., "filename_column": ..., "width_column": ..., "height_column": ...}'
            found.faults.append(Fault(file, key, "needs a table of widths and heights", shown(backend), hint))


def _rule_roles(project: Project, file: str, found: Findings) -> None:
    for dataset in project.scanned:
        key = f'"{dataset.id}" conditioning_type'
        if dataset.dataset_type == "conditioning" and dataset.conditioning_type is None:
            hint = "reference_strict takes the target's crop, reference_loose its own"
            found.faults.append(Fault(file, key, "missing, but required of references", hint=hint))
        hint = 'references have "dataset_type": "conditioning"'
        for name in ("conditioning_type", "source_dataset_id"):
            value = getattr(dataset, name)
            if dataset.is_target and value is not None:
                found.faults.append(Fault(file, f'"{dataset.id}" {name}', "is for references", shown(value), hint))
    if not project.targets and not found.faults:
        found.faults.append(Fault(file, "", "no dataset of targets is enabled; nothing to prepare or train on"))
    held_out = project.trainer.eval_dataset_id
    targets = [target.id for target in project.targets]
    if held_out is not None and held_out not in targets:
        hint = f"sets of targets: {', '.join(targets)}"
        config = project.config_path.name
        found.faults.append(Fault(config, "eval_dataset_id", "no such set of targets", shown(held_out), hint))


def _rule_links(project: Project, file: str, found: Findings) -> None:
    by_id = {dataset.id: dataset for dataset in project.datasets}
    for dataset in project.datasets:
        for name in sorted({one for one in dataset.conditioning_data if dataset.conditioning_data.count(one) > 1}):
            key = f'"{dataset.id}" conditioning_data'
            found.faults.append(Fault(file, key, "names a set twice", shown(name), "keep one"))
        named = [("conditioning_data", name) for name in dict.fromkeys(dataset.conditioning_data)]
        named += [("source_dataset_id", name) for name in [dataset.source_dataset_id] if name is not None]
        for key, name in named:
            if name in found.dropped or name in dataset.generated_ids:
                continue
            if wrong := _wrong_link(dataset, key, by_id.get(name), name in found.disabled):
                known = f"datasets: {', '.join(by_id)}"
                found.faults.append(Fault(file, f'"{dataset.id}" {key}', wrong[0], shown(name), wrong[1] or known))
        for generated in dataset.generated_ids:
            if generated in by_id:
                problem = f"two reference sets would have the id '{generated}'"
                found.faults.append(Fault(file, f'"{dataset.id}" conditioning', problem))


def _wrong_link(
    dataset: DatasetConfig, key: str, other: DatasetConfig | None, disabled: bool
) -> tuple[str, str | None] | None:
    """Return (problem, hint) of a link to another dataset, None if it is sound."""
    if other is None:
        return "no such dataset", "it is disabled" if disabled else None
    if other.id == dataset.id:
        return "names the dataset itself", "name another"
    if key == "conditioning_data" and other.dataset_type != "conditioning":
        return "must name a set of references", 'references have "dataset_type": "conditioning"'
    if key == "source_dataset_id" and not other.is_target:
        return "must name a set of targets", 'references have "dataset_type": "conditioning"'
    return None


def _rule_circles(project: Project, file: str, found: Findings) -> None:
    after = {dataset.id: set(dataset.conditioning_data) - {dataset.id} for dataset in project.datasets}
    for dataset in project.datasets:
        if dataset.source_dataset_id in after and dataset.source_dataset_id != dataset.id:
            after[dataset.source_dataset_id].add(dataset.id)
    while circle := _circle(after):
        told, hint = " -> ".join(circle), "targets name their references, or references their targets"
        found.faults.append(Fault(file, f'"{circle[0]}" conditioning_data', f"goes in a circle: {told}", hint=hint))
        for name in circle[1:]:
            after.pop(name, None)


def _circle(after: dict[str, set[str]]) -> list[str]:
    """Return the ids of one circle, the first again at the end; none if there is none."""
    try:
        TopologicalSorter(after).prepare()
    except CycleError as fault:
        return list(reversed(fault.args[1]))
    return []


def _rule_captions(project: Project, file: str, found: Findings) -> None:
    combined = project.trainer.conditioning_multidataset_sampling == "combined"
    for dataset in project.scanned:
        prompted = dataset.caption_strategy == "instanceprompt" or dataset.prepend_instance_prompt
        if (prompted or dataset.only_instance_prompt) and not dataset.instance_prompt:
            key, hint = f'"{dataset.id}" instance_prompt', "a text, or a list of texts"
            found.faults.append(Fault(file, key, "missing, but required", hint=hint))
        if wrong := _strategy_fault(dataset):
            found.faults.append(Fault(file, f'"{dataset.id}" caption_strategy', *wrong))
        if not _is_encoding(dataset.caption_encoding):
            key, hint = f'"{dataset.id}" caption_encoding', "for example utf-8, utf-16, cp1252"
            found.faults.append(Fault(file, key, "unknown encoding", shown(dataset.caption_encoding), hint))
        if dataset.text_embeds is not None and dataset.text_embeds not in _stores(project):
            known = f"text_embeds entries: {', '.join(_stores(project)) or 'none'}"
            key = f'"{dataset.id}" text_embeds'
            found.faults.append(Fault(file, key, "no such entry", shown(dataset.text_embeds), known))
        if dataset.caption_filter_list is not None:
            key, hint = f'"{dataset.id}" caption_filter_list', "it holds for all datasets that use the entry"
            found.faults.append(Fault(file, key, "belongs to the text_embeds entry", hint=hint))
        own = dataset.dataset_type == "conditioning" and dataset.caption_strategy is not None
        if combined and (own or any(entry.captions for entry in dataset.conditioning)):
            problem = (
                "references shown together (conditioning_multidataset_sampling: combined) have no captions of theirs"
            )
            found.faults.append(Fault(file, f'"{dataset.id}" captions', problem, hint="use the target set's captions"))


def _stores(project: Project) -> list[str]:
    return [dataset.id for dataset in project.datasets if dataset.dataset_type == "text_embeds"]


def _is_encoding(name: str) -> bool:
    """Tell an encoding of text, as Python knows them, from other words."""
    try:
        return "a".encode(name).decode(name) == "a"
    except (LookupError, ValueError):
        return False


# Where captions of a dataset of each type may come from, besides nowhere and instanceprompt.
_STRATEGIES = {
    "local": ("textfile", "filename", "parquet"),
    "aws": ("textfile", "filename", "parquet"),
    "csv": ("csv", "filename"),
    "huggingface": ("huggingface",),
}


def _strategy_fault(dataset: DatasetConfig) -> tuple[str, str, str] | None:
    """Return (problem, value, hint) of a caption strategy that its dataset cannot have."""
    strategy = dataset.caption_strategy
    if dataset.only_instance_prompt:
        return None
    if strategy is not None and strategy not in (*_STRATEGIES[dataset.type], "instanceprompt"):
        hint = f"such datasets have {', '.join(_STRATEGIES[dataset.type])}, instanceprompt or null"
        return f"not for datasets of type '{dataset.type}'", shown(strategy), hint
    if strategy == "parquet" and (dataset.parquet is None or not dataset.parquet.caption_column):
        return "needs a table", shown(strategy), 'give "parquet" with path, filename_column and caption_column'
    if strategy == "csv" and dataset.csv_caption_column is None:
        return "needs csv_caption_column", shown(strategy), "the column of csv_file that holds captions"
    return None


def _rule_crops(project: Project, file: str, found: Findings) -> None:
    for dataset in project.scanned:
        prefix = f'"{dataset.id}" '
        if dataset.crop_aspect in _CHOSEN and not dataset.crop_aspect_buckets:
            problem = f"missing, but required by crop_aspect {dataset.crop_aspect}"
            hint = '"crop_aspect_buckets": [1.0, 0.75, 1.5]'
            found.faults.append(Fault(file, f"{prefix}crop_aspect_buckets", problem, hint=hint))
        least, most = dataset.minimum_aspect_ratio, dataset.maximum_aspect_ratio
        if least is not None and most is not None and least > most:
            problem, hint = f"is above maximum_aspect_ratio {most:g}", "no image would be left"
            found.faults.append(Fault(file, f"{prefix}minimum_aspect_ratio", problem, shown(least), hint))
        for name in _SIZES:
            value = getattr(dataset, name)
            if value is not None and (wrong := _size_fault(name, value, dataset.resolution_type)):
                hint = f'resolution_type is "{dataset.resolution_type}"'
                found.faults.append(Fault(file, prefix + name, wrong, shown(value), hint))


def _size_fault(name: str, value: float, kind: str) -> str | None:
    """Return the reason why an image size cannot be of its unit, None if it can."""
    if kind == "area":
        return f"must be megapixels, below {_MOST_MEGAPIXELS}" if value >= _MOST_MEGAPIXELS else None
    scaled = name != "minimum_image_size"
    if value <= _FEWEST_PIXELS:
        return f"must be an edge in pixels, above {_FEWEST_PIXELS}"
    if scaled and kind == "pixel" and value < _FEWEST_SCALED_PIXELS:
        return f"must be an edge in pixels, at least {_FEWEST_SCALED_PIXELS}"
    if scaled and kind == "pixel_area" and value**2 >= _MOST_MEGAPIXELS * 1e6:
        return f"must be the edge of a square below {_MOST_MEGAPIXELS} megapixels"
    return None


def _rule_resolution(project: Project, file: str, found: Findings) -> None:
    for dataset in project.scanned:
        area = dataset.resolution_type == "area"
        least, most = (0.004, 100.0) if area else (64, 10_000)
        if not least <= dataset.resolution <= most:
            unit = "megapixels" if area else "pixels"
            hint = f'resolution_type is "{dataset.resolution_type}"'
            problem = f"must be {least:g} to {most:g} {unit}"
            found.faults.append(Fault(file, f'"{dataset.id}" resolution', problem, shown(dataset.resolution), hint))


_SCHEDULES = ("flow_use_uniform_schedule", "flow_use_beta_schedule", "flux_fast_schedule")


def _rule_schedules(project: Project, file: str, found: Findings) -> None:
    chosen = [name for name in _SCHEDULES if getattr(project.trainer, name)]
    for name in chosen[1:]:
        hint = "times are drawn in one way; keep one"
        found.faults.append(Fault(project.config_path.name, name, f"contradicts {chosen[0]}", "true", hint))


def _rule_offload(project: Project, file: str, found: Findings) -> None:
    config = project.trainer
    if not config.enable_group_offload:
        return
    quantised = config.base_model_precision not in PLAIN_TENSORS
    wrong = (
        (not config.gradient_checkpointing, "gradient_checkpointing", "without it all weights are kept for gradients"),
        (config.gradient_checkpointing_interval > 1, "gradient_checkpointing_interval", "every block is recomputed: 1"),
        (config.gradient_checkpointing_keep != "nothing", "gradient_checkpointing_keep", "set it to nothing"),
        (config.gradient_checkpointing_backend != "torch", "gradient_checkpointing_backend", "set it to torch"),
        (quantised, "base_model_precision", f"weights that move are of {', '.join(PLAIN_TENSORS)}"),
        (config.model_type == "full", "model_type", "no weight is frozen"),
    )
    for contradicts, name, hint in wrong:
        if contradicts:
            problem, value = "contradicts enable_group_offload", shown(getattr(config, name))
            found.faults.append(Fault(project.config_path.name, name, problem, value, hint))


def _rule_compiled(project: Project, file: str, found: Findings) -> None:
    config = project.trainer
    if config.dynamo_backend != "no" and config.base_model_precision not in PLAIN_TENSORS:
        hint = f"compiled blocks take {', '.join(PLAIN_TENSORS)}"
        value = shown(config.base_model_precision)
        problem = "contradicts dynamo_backend"
        found.faults.append(Fault(project.config_path.name, "base_model_precision", problem, value, hint))


# Warnings


def _rule_inactive(project: Project, file: str, found: Findings) -> None:
    for dataset in project.scanned:
        told = [
            *_inactive_inside(dataset),
            *_inactive_sources(project, dataset),
            *_inactive_sizes(dataset),
            *_inactive_crops(dataset),
            *_inactive_captions(dataset),
            *_inactive_roles(project, dataset),
        ]
        found.warnings += [f'{file}: "{dataset.id}" {one}' for one in told]


def _inactive_inside(dataset: DatasetConfig) -> Iterator[str]:
    """Yield the options inside others that are checked and never acted on."""
    for name in sorted(dataset.model_fields_set):
        group = getattr(dataset, name)
        for inner, facts in facts_of(type(group)) if isinstance(group, Options) else ():
            if facts["no_effect"] and getattr(group, inner) is not None:
                yield f"{name}.{inner} has no effect: {facts['no_effect']}"
    for number, entry in enumerate(dataset.conditioning):
        if does_nothing(entry.recipe):
            yield f"conditioning[{number}] has no effect: no picture is changed, references are the targets themselves"


def _inactive_sources(project: Project, dataset: DatasetConfig) -> Iterator[str]:
    given = dataset.model_fields_set
    remote, cached = ((url or "").startswith("s3") for url in (project.url_of(dataset), dataset.cache_dir_vae))
    for name in sorted(one for one in given if getattr(dataset, one) is not None):
        wanted = name.partition("_")[0]
        reached = wanted == "aws" and (remote or (cached and name not in ("aws_bucket_name", "aws_data_prefix")))
        if wanted in ("csv", "aws") and wanted != dataset.type and not reached:
            yield f"{name} has no effect: it is for type '{wanted}'"
    if dataset.type != "huggingface":
        inner = dataset.huggingface.model_fields_set if "huggingface" in given else set()
        for name in sorted(inner | ({"dataset_name"} if dataset.dataset_name is not None else set())):
            yield f"{name} has no effect: it is for type 'huggingface'"
    if dataset.instance_data_dir is not None and (dataset.type in ("csv", "huggingface") or dataset.aws_data_prefix):
        yield f"instance_data_dir has no effect: images of type '{dataset.type}' lie elsewhere"
    if dataset.parquet is not None and "parquet" not in (dataset.caption_strategy, dataset.metadata_backend):
        yield 'parquet has no effect without "caption_strategy": "parquet" or "metadata_backend": "parquet"'
    for name in ("cache_dir", "default"):
        if getattr(dataset, name):
            yield f"{name} has no effect: it is for text_embeds"
    if unread := set(dataset.skip_file_discovery) - {"metadata", "aspect"}:
        yield f"skip_file_discovery: {', '.join(sorted(unread))} has no effect, metadata and aspect have"


def _inactive_sizes(dataset: DatasetConfig) -> Iterator[str]:
    most, scaled = dataset.maximum_image_size, dataset.target_downsample_size
    if (most or scaled) and not dataset.crop:
        yield 'maximum_image_size and target_downsample_size have no effect without "crop": true'
    elif most and not scaled:
        yield (
            "maximum_image_size has no effect without target_downsample_size: images are scaled to their bucket at once"
        )
    elif scaled and not most:
        yield (
            "target_downsample_size has no effect without maximum_image_size: images are scaled to their bucket at once"
        )
    if dataset.minimum_image_size and not dataset.is_target:
        yield "minimum_image_size has no effect: a reference may be smaller than its target"


def _inactive_crops(dataset: DatasetConfig) -> Iterator[str]:
    given = dataset.model_fields_set
    chosen = dataset.crop_aspect in _CHOSEN
    if dataset.crop_aspect_buckets and not (dataset.crop and chosen):
        yield 'crop_aspect_buckets has no effect without "crop": true and "crop_aspect": "closest" or "random"'
    if not dataset.crop and "crop_aspect" in given:
        yield 'crop_aspect has no effect without "crop": true'
    if not dataset.crop and dataset.crop_style == "face":
        yield 'crop_style face has no effect without "crop": true: what is cut to the alignment is cut in the middle'
    if dataset.vae_cache_clear_each_epoch and not dataset.random_crops:
        yield "vae_cache_clear_each_epoch has no effect: its crops are the same in every epoch"
    elif dataset.vae_cache_clear_each_epoch and dataset.crop_variants is None and dataset.is_target:
        yield f"vae_cache_clear_each_epoch: {dataset.crops} random crops are cached (crop_variants), shown in turn"
    if dataset.crop_variants is not None and not dataset.random_crops:
        yield "crop_variants has no effect: only random crops differ"
    if "near_duplicate_distance" in given and dataset.near_duplicates == "ignore":
        yield 'near_duplicate_distance has no effect without "near_duplicates"'


def _inactive_captions(dataset: DatasetConfig) -> Iterator[str]:
    given, strategy, only = dataset.model_fields_set, dataset.caption_strategy, dataset.only_instance_prompt
    for name in ("disable_multiline_split", "caption_encoding"):
        if getattr(dataset, name) and name in given and (strategy != "textfile" or only):
            yield f'{name} has no effect without "caption_strategy": "textfile"'
    if dataset.prepend_instance_prompt and (strategy == "instanceprompt" or only):
        yield "prepend_instance_prompt has no effect: instance_prompt is the caption already"
    prompted = strategy == "instanceprompt" or only or dataset.prepend_instance_prompt
    if dataset.instance_prompt and not prompted:
        yield 'instance_prompt has no effect without "caption_strategy": "instanceprompt" or "prepend_instance_prompt"'
    if dataset.caption_shuffle.enable and strategy is None and not only:
        yield "caption_shuffle has no effect: the set has no captions"
    elif not dataset.caption_shuffle.enable and dataset.caption_shuffle.model_fields_set - {"enable"}:
        yield 'caption_shuffle has no effect without "enable": true'


def _inactive_roles(project: Project, dataset: DatasetConfig) -> Iterator[str]:
    if dataset.is_target:
        return
    for name in _OF_TARGETS:
        if name in dataset.model_fields_set and getattr(dataset, name):
            yield f"{name} has no effect: it is not a set of targets"
    for name, usual in (("repeats", 0), ("probability", 1.0)):
        if getattr(dataset, name) != usual:
            yield f"{name} has no effect: references are shown with their targets"
    targets = [
        one for one in project.targets if dataset.id in one.conditioning_data or one.id == dataset.source_dataset_id
    ]
    if not (targets or dataset.source_dataset_id):
        yield "is no target set's conditioning_data: it is scanned, not used"
    elif targets and dataset.conditioning_type == "reference_strict":
        said: list[Options] = [targets[0], project.trainer]  # what config.json says was not said of this dataset
        odd = [name for name in _CROPS if name in dataset.model_fields_set
               and getattr(dataset, name) not in [getattr(one, name, None) for one in said]]  # fmt: skip
        if odd:
            yield f'{", ".join(odd)} has no effect: strict references take the crops of "{targets[0].id}"'


RULES: tuple[Callable[[Project, str, Findings], None], ...] = (
    _rule_ids, _rule_roles, _rule_sources, _rule_links, _rule_circles, _rule_captions, _rule_resolution, _rule_crops,
    _rule_schedules, _rule_offload, _rule_compiled, _rule_inactive, *TRAINING_RULES,
)  # fmt: skip
