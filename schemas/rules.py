"""Rules that span several options or both files: each a function that appends what it finds.

A new rule is a function here and a name in `RULES`.
"""

import codecs
from collections.abc import Callable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from schemas.config_file import Findings, shown
from schemas.datasets import DatasetConfig
from schemas.errors import Fault
from schemas.project import Project, resolved

_MOST_MEGAPIXELS = 20  # of a size limit; more is an edge in pixels by mistake


def root_hint(relative: str, base: Path) -> str | None:
    """Say so if `--root .` would find a path that is missing below `base`."""
    if (Path.cwd() / relative).exists() and base != Path.cwd():
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


def _rule_ids(project: Project, file: str, found: Findings) -> None:
    seen: set[str] = set()
    for dataset in project.datasets:
        if dataset.id in seen:
            found.faults.append(Fault(file, f'"{dataset.id}" id', "given to two datasets", hint="ids are unique"))
        seen.add(dataset.id)


# What a dataset of each type must say.
_NEEDED = {
    "local": "instance_data_dir", "huggingface": "dataset_name", "csv": "csv_file", "aws": "aws_bucket_name",
}  # fmt: skip


def _rule_sources(project: Project, file: str, found: Findings) -> None:
    for dataset in project.scanned:
        needed = _NEEDED[dataset.type]
        if getattr(dataset, needed) is None:
            found.faults.append(Fault(file, f'"{dataset.id}" {needed}', "missing, but required"))
        backend = dataset.metadata_backend if "metadata_backend" in dataset.model_fields_set else None
        key, table = f'"{dataset.id}" metadata_backend', dataset.parquet
        if backend is not None and (backend == "huggingface") != (dataset.type == "huggingface"):
            problem = "goes with type 'huggingface', and that with no other"
            found.faults.append(Fault(file, key, problem, shown(backend)))
        if backend == "parquet" and (table is None or not (table.width_column and table.height_column)):
            hint = '"parquet": {"path": ..., "filename_column": ..., "width_column": ..., "height_column": ...}'
            found.faults.append(Fault(file, key, "needs columns of widths and heights", shown(backend), hint))
        for name in sorted(dataset.model_fields_set):
            wanted = _type_of(name)
            remote = (project.url_of(dataset) or "").startswith("s3")
            if wanted is not None and wanted != dataset.type and not (wanted == "aws" and remote):
                found.warnings.append(f'{file}: "{dataset.id}" {name} has no effect: it is for type {wanted!r}')


def _type_of(name: str) -> str | None:
    """Return the type of dataset that an option is for, None if it is for all."""
    known = {"dataset_name": "huggingface", "huggingface": "huggingface"}
    return known.get(name) or next((kind for kind in ("csv", "aws") if name.startswith(f"{kind}_")), None)


def _rule_roles(project: Project, file: str, found: Findings) -> None:
    for dataset in project.scanned:
        key = f'"{dataset.id}" conditioning_type'
        if dataset.dataset_type == "conditioning" and dataset.conditioning_type is None:
            hint = "reference_strict takes the target's crop, reference_loose its own"
            found.faults.append(Fault(file, key, "missing, but required of references", hint=hint))
        elif dataset.is_target and dataset.conditioning_type is not None:
            hint = 'references have "dataset_type": "conditioning"'
            found.faults.append(Fault(file, key, "is for references", shown(dataset.conditioning_type), hint))
        if dataset.is_target and dataset.source_dataset_id is not None:
            key = f'"{dataset.id}" source_dataset_id'
            found.faults.append(Fault(file, key, "is for references", shown(dataset.source_dataset_id)))
    if not project.targets and not found.faults:
        found.faults.append(Fault(file, "", "no dataset of targets is enabled; nothing to prepare or train on"))
    held_out = project.trainer.eval_dataset_id
    targets = [target.id for target in project.targets]
    if held_out is not None and held_out not in targets:
        hint = f"sets of targets: {', '.join(targets)}"
        found.faults.append(
            Fault(project.config_path.name, "eval_dataset_id", "no such set of targets", shown(held_out), hint)
        )


def _rule_links(project: Project, file: str, found: Findings) -> None:
    by_id = {dataset.id: dataset for dataset in project.datasets}
    listed = {name for target in project.targets for name in target.conditioning_data}
    for dataset in project.datasets:
        for name in sorted({one for one in dataset.conditioning_data if dataset.conditioning_data.count(one) > 1}):
            found.faults.append(Fault(file, f'"{dataset.id}" conditioning_data', "names a set twice", shown(name)))
        named = [("conditioning_data", name) for name in dataset.conditioning_data if name not in dataset.generated_ids]
        named += [("source_dataset_id", name) for name in [dataset.source_dataset_id] if name is not None]
        for key, name in named:
            if name in found.dropped:
                continue
            if name not in by_id:
                hint = f"datasets: {', '.join(by_id)}"
                found.faults.append(Fault(file, f'"{dataset.id}" {key}', "no such dataset", shown(name), hint))
            elif by_id[name].dataset_type not in (
                ("conditioning",) if key == "conditioning_data" else ("image", "eval")
            ):
                kind = "a set of references" if key == "conditioning_data" else "a set of targets"
                hint = 'references have "dataset_type": "conditioning"'
                found.faults.append(Fault(file, f'"{dataset.id}" {key}', f"must name {kind}", shown(name), hint))
        if dataset.dataset_type == "conditioning" and not (dataset.id in listed or dataset.source_dataset_id):
            found.warnings.append(
                f'{file}: "{dataset.id}" is no target set\'s conditioning_data: it is scanned, not used'
            )
        for generated in dataset.generated_ids:
            if generated in by_id or dataset.generated_ids.count(generated) > 1:
                problem = f"two reference sets would have the id '{generated}'"
                found.faults.append(Fault(file, f'"{dataset.id}" conditioning', problem))


def _rule_captions(project: Project, file: str, found: Findings) -> None:
    combined = project.trainer.conditioning_multidataset_sampling == "combined"
    for dataset in project.scanned:
        key = f'"{dataset.id}" caption_strategy'
        prompted = dataset.caption_strategy == "instanceprompt" or dataset.prepend_instance_prompt
        if (prompted or dataset.only_instance_prompt) and not dataset.instance_prompt:
            found.faults.append(Fault(file, f'"{dataset.id}" instance_prompt', "missing, but required"))
        if wrong := _strategy_fault(dataset):
            found.faults.append(Fault(file, key, *wrong))
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


# Where captions of a dataset of each type may come from, besides nowhere and instanceprompt.
_STRATEGIES = {
    "local": ("textfile", "filename", "parquet"),
    "aws": ("textfile", "filename", "parquet"),
    "csv": ("csv", "filename"),
    "huggingface": ("huggingface",),
}


def _strategy_fault(dataset: DatasetConfig) -> tuple[str, str | None, str | None] | None:
    """Return (problem, value, hint) of a caption strategy that its dataset cannot have."""
    strategy = dataset.caption_strategy
    if dataset.only_instance_prompt:
        return None
    if strategy is not None and strategy not in (*_STRATEGIES[dataset.type], "instanceprompt"):
        hint = f"such datasets have {', '.join(_STRATEGIES[dataset.type])}, instanceprompt or null"
        return f"not for datasets of type {dataset.type!r}", shown(strategy), hint
    if strategy == "parquet" and (dataset.parquet is None or not dataset.parquet.caption_column):
        return "needs a table", shown(strategy), 'give "parquet" with path, filename_column and caption_column'
    if strategy == "csv" and dataset.csv_caption_column is None:
        return "needs csv_caption_column", shown(strategy), None
    try:
        codecs.lookup(dataset.caption_encoding)
    except LookupError:
        return "with an unknown caption_encoding", shown(dataset.caption_encoding), "for example utf-8 or cp1252"
    return None


def _rule_crops(project: Project, file: str, found: Findings) -> None:
    for dataset in project.scanned:
        prefix = f'"{dataset.id}" '
        chosen = dataset.crop and dataset.crop_aspect in ("closest", "random")
        if chosen and not dataset.crop_aspect_buckets:
            hint = '"crop_aspect_buckets": [1.0, 0.75, 1.5]'
            found.faults.append(Fault(file, f"{prefix}crop_aspect_buckets", "missing, but required", hint=hint))
        least, most = dataset.minimum_aspect_ratio, dataset.maximum_aspect_ratio
        if least is not None and most is not None and least > most:
            problem = f"is above maximum_aspect_ratio {most:g}"
            found.faults.append(Fault(file, f"{prefix}minimum_aspect_ratio", problem, shown(least)))
        for name in ("minimum_image_size", "maximum_image_size", "target_downsample_size"):
            value = getattr(dataset, name)
            if dataset.resolution_type == "area" and value is not None and value > _MOST_MEGAPIXELS:
                hint = 'resolution_type is "area"; "pixel_area" takes an edge in pixels'
                problem = f"must be megapixels, at most {_MOST_MEGAPIXELS}"
                found.faults.append(Fault(file, prefix + name, problem, shown(value), hint))


def _rule_cycles(project: Project, file: str, found: Findings) -> None:
    after = {dataset.id: set(dataset.conditioning_data) for dataset in project.datasets}
    for dataset in project.datasets:
        if dataset.source_dataset_id in after:
            after[dataset.source_dataset_id].add(dataset.id)
    try:
        TopologicalSorter(after).prepare()
    except CycleError as fault:
        circle = " -> ".join(reversed(fault.args[1]))
        found.faults.append(Fault(file, f'"{fault.args[1][0]}" conditioning_data', f"goes in a circle: {circle}"))


def _rule_resolution(project: Project, file: str, found: Findings) -> None:
    for dataset in project.scanned:
        area = dataset.resolution_type == "area"
        least, most = (0.004, 100.0) if area else (64, 10_000)
        if not least <= dataset.resolution <= most:
            unit = "megapixels" if area else "pixels"
            hint = f'resolution_type is "{dataset.resolution_type}"'
            problem = f"must be {least:g} to {most:g} {unit}"
            found.faults.append(Fault(file, f'"{dataset.id}" resolution', problem, shown(dataset.resolution), hint))


def _rule_inactive(project: Project, file: str, found: Findings) -> None:
    for dataset in project.scanned:
        if dataset.conditioning and not dataset.is_target:
            found.warnings.append(f'{file}: "{dataset.id}" conditioning has no effect: it is not a set of targets')
        sizes = [dataset.maximum_image_size, dataset.target_downsample_size]
        if any(sizes) and not dataset.crop:
            found.warnings.append(
                f'{file}: "{dataset.id}" maximum_image_size and target_downsample_size have no effect without '
                '"crop": true'
            )
        elif dataset.crop and sizes[0] and not sizes[1]:
            found.warnings.append(
                f'{file}: "{dataset.id}" maximum_image_size has no effect without target_downsample_size: images are '
                "scaled to their bucket at once"
            )
        found.warnings += [f'{file}: "{dataset.id}" {told}' for told in _inactive(dataset)]


def _inactive(dataset: DatasetConfig) -> Iterator[str]:
    """Yield what has no effect, or not the one that may be expected."""
    given = dataset.model_fields_set
    if dataset.crop_aspect_buckets and not (dataset.crop and dataset.crop_aspect in ("closest", "random")):
        yield 'crop_aspect_buckets has no effect without "crop": true and "crop_aspect": "closest" or "random"'
    if not dataset.crop and "crop_aspect" in given:
        yield 'crop_aspect has no effect without "crop": true'
    if not dataset.crop and dataset.crop_style == "face":
        yield 'crop_style face has no effect without "crop": true: what is cut to the alignment is cut in the middle'
    if dataset.vae_cache_clear_each_epoch and not dataset.random_crops:
        yield "vae_cache_clear_each_epoch has no effect: its crops are the same in every epoch"
    elif dataset.vae_cache_clear_each_epoch and dataset.crop_variants is None:
        yield f"vae_cache_clear_each_epoch: {dataset.variants} random crops are cached (crop_variants), shown in turn"
    if dataset.crop_variants is not None and not dataset.random_crops:
        yield "crop_variants has no effect: only random crops differ"
    if "near_duplicate_distance" in given and dataset.near_duplicates == "ignore":
        yield 'near_duplicate_distance has no effect without "near_duplicates"'
    if dataset.disable_multiline_split and dataset.caption_strategy != "textfile":
        yield 'disable_multiline_split has no effect without "caption_strategy": "textfile"'
    if dataset.prepend_instance_prompt and dataset.caption_strategy == "instanceprompt":
        yield "prepend_instance_prompt has no effect: instance_prompt is the caption already"


RULES: tuple[Callable[[Project, str, Findings], None], ...] = (
    _rule_ids, _rule_roles, _rule_sources, _rule_links, _rule_cycles, _rule_captions, _rule_resolution, _rule_crops,
    _rule_inactive,
)  # fmt: skip
