"""Rules that span several options or both files: each a function that appends what it finds.

A new rule is a function here and a name in `RULES`.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

from schemas.config_file import Findings, shown
from schemas.errors import Fault
from schemas.project import Project


def root_hint(relative: str, base: Path) -> str | None:
    """Say so if `--root .` would find a path that is missing below `base`."""
    if (Path.cwd() / relative).exists() and base != Path.cwd():
        return "it exists below the current folder: add --root ."
    return None


def missing_folders(project: Project, file: str) -> Iterator[Fault]:
    """Yield a fault for every dataset whose images cannot be reached."""
    for dataset in project.scanned:
        key = f'"{dataset.id}" instance_data_dir'
        if dataset.type != "local":
            problem = f"datasets of type {dataset.type!r} cannot be read by this version"
            yield Fault(file, f'"{dataset.id}" type', problem, shown(dataset.type), 'set "disabled": true to go on')
        elif dataset.instance_data_dir is not None and not project.folder_of(dataset).is_dir():
            hint = root_hint(dataset.instance_data_dir, project.root)
            yield Fault(file, key, f"no such folder: {project.folder_of(dataset)}", hint=hint)


def _rule_ids(project: Project, file: str, found: Findings) -> None:
    seen: set[str] = set()
    for dataset in project.datasets:
        if dataset.id in seen:
            found.faults.append(Fault(file, f'"{dataset.id}" id', "given to two datasets", hint="ids are unique"))
        seen.add(dataset.id)


def _rule_folders(project: Project, file: str, found: Findings) -> None:
    for dataset in project.scanned:
        if dataset.type == "local" and dataset.instance_data_dir is None:
            found.faults.append(Fault(file, f'"{dataset.id}" instance_data_dir', "missing, but required"))
        if dataset.type == "huggingface" and dataset.dataset_name is None:
            found.faults.append(Fault(file, f'"{dataset.id}" dataset_name', "missing, but required"))


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
        if (dataset.caption_strategy == "huggingface") and dataset.type != "huggingface":
            found.faults.append(Fault(file, key, "is for datasets of type 'huggingface'", shown("huggingface")))
        if dataset.caption_strategy in ("csv", "parquet") and dataset.type == "local":
            found.faults.append(
                Fault(file, key, "cannot be read by this version", shown(dataset.caption_strategy), "use textfile")
            )
        own = dataset.dataset_type == "conditioning" and dataset.caption_strategy is not None
        if combined and (own or any(entry.captions for entry in dataset.conditioning)):
            problem = (
                "references shown together (conditioning_multidataset_sampling: combined) have no captions of theirs"
            )
            found.faults.append(Fault(file, f'"{dataset.id}" captions', problem, hint="use the target set's captions"))


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


RULES: tuple[Callable[[Project, str, Findings], None], ...] = (
    _rule_ids, _rule_roles, _rule_folders, _rule_links, _rule_captions, _rule_resolution, _rule_inactive,
)  # fmt: skip
