"""The batches of one epoch, counted from matched pairs: the arithmetic of train/data.py, which prep does not import.

`plan_epoch` is the way in; a test holds it to `train.data.epoch_batches`.
"""

from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction

import pyarrow as pa

from prep.matching import Numbers
from prep.planning.sides import Match
from schemas.planned import Bucket, Epoch
from schemas.project import Project
from schemas.trainer import DEFAULT_STEPS

_SIDE = 1 << 20  # more than any picture's: two sides make one number

Group = tuple[str, ...]  # sizes of a target and of the references shown with it


def plan_epoch(project: Project, trained: Sequence[Match]) -> Epoch:
    """Count the batches of an epoch of these sets."""
    groups: dict[Group, Fraction] = {}
    exact, showings = True, 0
    for pairs in trained:
        counts, drawn = _groups(project, pairs), shown_of(pairs)
        times = Fraction(drawn * (pairs.target.repeats + 1), max(1, pairs.count))
        exact &= len(counts) == 1 or (drawn == pairs.count and not _drawn_references(project, pairs))
        showings += drawn * (pairs.target.repeats + 1)
        for group, count in counts.items():
            groups[group] = groups.get(group, Fraction(0)) + count * times
    size = project.trainer.train_batch_size
    buckets = [_bucket(group, count, size) for group, count in _apportioned(groups, showings).items()]
    buckets.sort(key=lambda one: (-one.showings, one.target, one.references))
    batches = sum(one.batches for one in buckets)
    steps, epochs, set_by = _run(project, batches)
    return Epoch(
        showings=showings,
        batches=batches,
        partial=sum(one.last < size for one in buckets),
        fill=round(showings / (batches * size), 4) if batches else 0.0,
        exact=exact,
        steps_per_epoch=round(batches / project.trainer.gradient_accumulation_steps, 2),
        steps=steps,
        epochs=epochs,
        set_by=set_by,
        buckets=tuple(buckets),
    )


def _apportioned(groups: Mapping[Group, Fraction], total: int) -> dict[Group, int]:
    """Round expected showings so that they add up to all of them, by largest remainders; those without any go."""
    whole = {group: int(count) for group, count in groups.items()}
    by_remainder = sorted(groups, key=lambda group: whole[group] - groups[group])
    for group in by_remainder[: total - sum(whole.values())]:
        whole[group] += 1
    return {group: count for group, count in whole.items() if count}


def shown_of(pairs: Match) -> int:
    """Return how many pairs of a set an epoch draws; of several random crops it shows one."""
    share = pairs.target.probability
    return min(pairs.count, max(1, round(share * pairs.count))) if share < 1 else pairs.count


def _run(project: Project, batches: int) -> tuple[int, float, str]:
    """Return (steps, epochs, the option that decides)."""
    trainer = project.trainer
    if trainer.max_train_steps or not trainer.num_train_epochs:
        steps = trainer.max_train_steps or DEFAULT_STEPS
        epochs = steps * trainer.gradient_accumulation_steps / batches if batches else 0.0
        return steps, round(epochs, 2), "max_train_steps" if trainer.max_train_steps else "default"
    steps = max(1, batches * trainer.num_train_epochs // trainer.gradient_accumulation_steps) if batches else 0
    return steps, float(trainer.num_train_epochs), "num_train_epochs"


def _bucket(group: Group, showings: int, size: int) -> Bucket:
    batches = -(-showings // size)
    return Bucket(group[0], group[1:], showings, batches, showings - (batches - 1) * size if batches else 0)


def _drawn_references(project: Project, pairs: Match) -> bool:
    """Tell whether each showing draws one of several references."""
    return len(pairs.shown) > 2 and project.trainer.conditioning_multidataset_sampling == "random"


def _groups(project: Project, pairs: Match) -> dict[Group, Fraction]:
    """Count pairs by the shapes they are shown with; of references that are drawn each counts for its share."""
    target, *references = (_sizes(side.boxes) for side in pairs.shown)
    if not pairs.count:
        return {}
    if not _drawn_references(project, pairs):
        return {group: Fraction(count) for group, count in _counted([target, *references])}
    counts: dict[Group, Fraction] = {}
    for reference in references:
        for group, count in _counted([target, reference]):
            counts[group] = counts.get(group, Fraction(0)) + Fraction(count, len(references))
    return counts


def _sizes(boxes: Numbers) -> Numbers:
    return boxes[:, 0] * _SIDE + boxes[:, 1]


def _counted(sizes: Sequence[Numbers]) -> Iterator[tuple[Group, int]]:
    """Yield every combination of sizes and how often it occurs."""
    table = pa.table({str(place): pa.array(column) for place, column in enumerate(sizes)})
    names = table.column_names
    for row in table.group_by(names).aggregate([([], "count_all")]).to_pylist():
        yield tuple("{}x{}".format(*divmod(row[name], _SIDE)) for name in names), row["count_all"]
