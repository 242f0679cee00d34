"""Pairs held out of training: those whose loss is measured and that are sampled, the same showings every time.

Which sets they come from is said in `held_out_sets`, which of a set's pairs in `_of_set`.
"""

from dataclasses import dataclass
from pathlib import PurePosixPath

from schemas.datasets import DatasetConfig
from schemas.errors import UserError
from schemas.freshness import read_pairs
from schemas.keys import seed_of
from schemas.project import Project
from train.data import Sample, Shelf, Shown, check_cached


@dataclass(frozen=True, slots=True)
class HeldOut:
    """One of them."""

    name: str  # of the target's file, without its ending
    shown: Shown


def held_out(project: Project, shelf: Shelf) -> list[Shown]:
    """Return the showings of `held_out_pairs`."""
    return [one.shown for one in held_out_pairs(project, shelf)]


def held_out_pairs(project: Project, shelf: Shelf) -> list[HeldOut]:
    """Return the first `num_eval_images` pairs of each held-out set; none if there is no such set.

    A pair shows its first prompt, and of several references those that a showing has: all, or the first. Raises
    UserError if a set has no pair that can be shown, or something of one is not cached.
    """
    missing: set[str] = set()
    pairs = [one for dataset in held_out_sets(project) for one in _of_set(project, shelf, dataset, missing)]
    check_cached(project, missing)
    return pairs


def held_out_sets(project: Project) -> tuple[DatasetConfig, ...]:
    """Return the set of `eval_dataset_id`; where none is named, those of `dataset_type` eval."""
    named = project.trainer.eval_dataset_id
    if named is not None:
        return (project.dataset(named),)
    return tuple(dataset for dataset in project.targets if dataset.dataset_type == "eval")


def _of_set(project: Project, shelf: Shelf, dataset: DatasetConfig, missing: set[str]) -> list[HeldOut]:
    most, found = project.trainer.num_eval_images, list[HeldOut]()
    for row in read_pairs(project, dataset):
        if row.reject is not None or row.variant:  # other crops and degradations of a picture that is there already
            continue
        sample = shelf.place(row, missing)
        if sample is not None:
            found.append(HeldOut(PurePosixPath(row.target_path).stem, _shown(project, sample)))
        if most and len(found) == most:
            break
    if not found:
        raise UserError(
            f"{dataset.id}: held out for evaluation, but no pair of it can be shown; "
            f"see column `reject` of {project.pair_table(dataset.id)}, and: {project.command('prep cache')}"
        )
    return found


def _shown(project: Project, sample: Sample) -> Shown:
    chosen = sample.references
    if project.trainer.conditioning_multidataset_sampling == "random":
        chosen = chosen[:1]
    seed = seed_of(project.trainer.validation_seed, "held out", sample.sample_id)
    return Shown(
        sample.sample_id, sample.target, tuple(image for image, _ in chosen), sample.prompts_beside(chosen)[0], seed
    )
