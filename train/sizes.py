"""Of which sizes a project's samples are: the largest decides memory, the most common one time.

Read from the pair tables; before there are any, told or assumed.
"""

from collections import Counter
from collections.abc import Sequence

from schemas.datasets import DatasetConfig
from schemas.errors import UserError
from schemas.freshness import read_pairs
from schemas.project import Project
from schemas.rows import PairRow
from train.costs import Size, Sizes
from train.data import training_sets

PIXELS = 1024  # of a side, where nothing says otherwise


def sizes_of(project: Project) -> tuple[Sizes, Sizes]:
    """Return the sizes of the largest and of the most common sample; raises UserError if nothing is paired."""
    shown: Counter[Sizes] = Counter()
    for dataset in training_sets(project):
        for row in read_pairs(project, dataset):
            if row.reject is None:
                shown[_of_row(row, combined=project.trainer.conditioning_multidataset_sampling == "combined")] += (
                    1 + row.repeats
                )
    if not shown:
        raise UserError("no sample is left to train on; prep pairs says why each was rejected")
    return max(shown, key=pixels_of), shown.most_common(1)[0][0]


def square(project: Project, pixels: int | None, references: int | None) -> Sizes:
    """Return square pictures of one size; raises UserError if the model cannot take it."""
    side, step = pixels or PIXELS, project.family.smallest_alignment
    if side % step:
        raise UserError(f"--pixels {side}: must be a multiple of {step} for {project.trainer.model_family}")
    return Sizes((side, side), ((side, side),) * _references(project, references))


def pixels_of(sizes: Sizes) -> int:
    """Count the pixels of a sample."""
    return sum(width * height for width, height in (sizes.target, *sizes.references))


def spelled(sizes: Sizes) -> str:
    """Spell a sample's sizes."""
    target, references = _name(sizes.target), [_name(one) for one in sizes.references]
    return f"{target} with {' and '.join(references)}" if references else f"{target} without a reference"


def names(sizes: Sequence[Size]) -> tuple[str, ...]:
    """Spell sizes, each WIDTHxHEIGHT."""
    return tuple(_name(one) for one in sizes)


def _references(project: Project, asked: int | None) -> int:
    """Return how many references are shown at once: as asked, or as the sets of targets have them."""
    if asked is not None:
        return asked
    found = [_count(project, one) for one in project.targets]
    most = max(found, default=0)
    return most if project.trainer.conditioning_multidataset_sampling == "combined" else min(most, 1)


def _count(project: Project, target: DatasetConfig) -> int:
    return len(project.references_of(target)) + len(target.generated_ids)


def _of_row(row: PairRow, *, combined: bool) -> Sizes:
    references = sorted((_size(one.bucket) for one in row.references), key=lambda size: size[0] * size[1], reverse=True)
    return Sizes(_size(row.bucket), tuple(references if combined else references[:1]))


def _size(bucket: str) -> Size:
    width, height = bucket.split("x")
    return int(width), int(height)


def _name(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
