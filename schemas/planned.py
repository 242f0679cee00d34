"""What `prep plan` found: the object that `prep.plan.plan` returns, and how it is told to a person.

Sizes are in bytes, counts of an epoch are those of one pass over all that is trained on.
"""

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

_BUCKETS = 8  # told to a person
_WIDTH = 100  # of lines


@dataclass(frozen=True, slots=True)
class DatasetPlan:
    """What would become of one dataset."""

    dataset_id: str
    role: str  # targets, held out, references
    looked_at: str | None  # why its images were looked at now; null if its manifest was read
    seen: int
    kept: int
    rejected: Mapping[str, int]  # kind of reason -> images
    absent: int  # images of a list that are not downloaded yet: nothing is known of them
    targets: int  # that have all their references
    variants: int  # random crops of each
    degradations: int  # draws of each, where references are made
    pairs: int  # rows of its pair table that are kept: targets × variants × degradations
    unpaired: Mapping[str, int]  # kind of reason -> targets
    file_references: int  # for each target
    made_references: int  # for each target
    showings: int  # in an epoch, if it is trained on


@dataclass(frozen=True, slots=True)
class StagePlan:
    """What one kind of product takes."""

    stage: str  # manifests, pair tables, reference pictures, latents, text embeds
    folder: str
    needed: int
    there: int
    to_make: int
    bytes: int  # of all that is needed
    bytes_to_write: int
    at_most: bool  # the numbers are upper bounds
    assumed: bool  # bytes rest on an assumption, which a note tells unless they are small


@dataclass(frozen=True, slots=True)
class Disk:
    """Room for what would be written."""

    folder: str
    free_bytes: int
    needed_bytes: int


@dataclass(frozen=True, slots=True)
class Bucket:
    """Showings of equal shapes, which are batched together."""

    target: str  # "WxH"
    references: tuple[str, ...]  # "WxH" of each that is shown at once
    showings: int  # of one epoch
    batches: int
    last: int  # showings in its last batch


@dataclass(frozen=True, slots=True)
class Epoch:
    """One pass over what is trained on, and what the whole run amounts to."""

    showings: int
    batches: int
    partial: int  # batches that are not full; they are trained on like any other
    fill: float  # share of the places in batches that showings take
    exact: bool  # false: a draw decides which bucket some showings fall into, or how often
    steps_per_epoch: float  # optimiser steps; an epoch may end inside one
    steps: int  # of the whole run
    epochs: float  # of the whole run
    set_by: str  # max_train_steps or num_train_epochs; default where neither is given
    buckets: tuple[Bucket, ...]  # most showings first


@dataclass(frozen=True, slots=True)
class PlanSummary:
    """What `prep plan` found."""

    datasets: tuple[DatasetPlan, ...]
    seen: int
    kept: int
    pairs: int
    stages: tuple[StagePlan, ...]
    bytes: int
    bytes_to_write: int
    disks: tuple[Disk, ...]
    smaller: Mapping[str, int]  # setting -> bytes that latents would about take
    train_batch_size: int
    gradient_accumulation_steps: int
    epoch: Epoch
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    blocked: str | None  # why there would be no batch, and what to change
    seconds: float
    command: str = "prep plan"

    def lines(self) -> Iterator[str]:
        """Yield the closing report."""
        for dataset in self.datasets:
            yield from _dataset_lines(dataset)
        if len(self.datasets) > 1:
            yield f"in all: {self.seen:,} images, {self.kept:,} kept, {self.pairs:,} pairs"
        yield ""
        yield f"{'':20}{'needed':>12}{'there':>12}{'to make':>12}{'size':>13}{'to write':>13}"
        for one in self.stages:
            yield from _stage_lines(one, alone=sum(one.stage == other.stage for other in self.stages) == 1)
        yield f"{'in all':56}{sized(self.bytes):>13}{sized(self.bytes_to_write):>13}"
        for disk in self.disks:
            lacking = disk.needed_bytes > disk.free_bytes
            enough = f": not enough for {sized(disk.needed_bytes)}" if lacking else ""
            yield f"free: {sized(disk.free_bytes)} at {disk.folder}{enough}"
        for setting, size in self.smaller.items():
            yield f"with {setting}, latents would take about {sized(size)}"
        yield ""
        yield from _epoch_lines(self)
        for note in self.notes:
            yield from textwrap.wrap(f"note: {note}", _WIDTH, subsequent_indent="  ")
        if self.blocked is not None:
            yield from textwrap.wrap(f"nothing would be trained on: {self.blocked}", _WIDTH, subsequent_indent="  ")


def many(number: int, noun: str) -> str:
    """Spell a number of things."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def sized(size: int) -> str:
    """Spell bytes for a person."""
    for unit, power in (("TiB", 40), ("GiB", 30), ("MiB", 20)):
        if size >= 1 << power:
            return f"{size / (1 << power):.1f} {unit}"
    return f"{size / 1024:.1f} KiB" if size else "0"


def _dataset_lines(plan: DatasetPlan) -> Iterator[str]:
    origin = (
        "from its manifest: files changed since are not seen"
        if plan.looked_at is None
        else f"{plan.looked_at}: looked at now"
    )
    yield f"{plan.dataset_id}: {plan.role}, {many(plan.seen, 'image')}, {plan.kept:,} kept ({origin})"
    for reason, count in plan.rejected.items():
        yield f"  rejected {count:,}: {reason}"
    if plan.role == "references":
        return
    crops = f" x {plan.variants} random crops" if plan.variants > 1 else ""
    crops += f" x {plan.degradations} degradations" if plan.degradations > 1 else ""
    kinds = [(plan.file_references, "from files"), (plan.made_references, "made of it")]
    each = ", ".join(f"{number} {kind}" for number, kind in kinds if number)
    references = f"; references of each: {each}" if each else "; no references"
    yield f"  {plan.pairs:,} pairs: {many(plan.targets, 'target')}{crops}{references}"
    for reason, count in plan.unpaired.items():
        yield f"  {many(count, 'target')} unpaired: {reason}"


def _stage_lines(stage: StagePlan, *, alone: bool) -> Iterator[str]:
    mark = "~" if stage.assumed else "≤" if stage.at_most else ""
    sizes = "".join(f"{mark + sized(size) if size else '0':>13}" for size in (stage.bytes, stage.bytes_to_write))
    yield f"{stage.stage:20}{stage.needed:>12,}{stage.there:>12,}{stage.to_make:>12,}{sizes}"
    if not alone:
        yield f"  in {stage.folder}"


def _epoch_lines(summary: PlanSummary) -> Iterator[str]:
    epoch, size, about = summary.epoch, summary.train_batch_size, "" if summary.epoch.exact else "about "
    if not epoch.batches:
        return
    partial = (
        f"; {epoch.partial:,} not full, trained on too, {epoch.fill:.1%} of places filled" if epoch.partial else ""
    )
    told = f"an epoch: {about}{many(epoch.showings, 'showing')} in {epoch.batches:,} batches of up to {size}{partial}"
    yield from textwrap.wrap(told, _WIDTH, subsequent_indent="  ")
    yield f"  {'size, + references':36}{'showings':>10}{'batches':>10}{'last batch':>14}"
    for bucket in epoch.buckets[:_BUCKETS]:
        note = "  fewer than a batch" if bucket.showings < size else ""
        yield f"  {_named(bucket):36}{bucket.showings:>10,}{bucket.batches:>10,}{f'{bucket.last} of {size}':>14}{note}"
    if len(epoch.buckets) > _BUCKETS:
        rest = epoch.buckets[_BUCKETS:]
        few = sum(one.showings < size for one in rest)
        yield (
            f"  and {len(rest)} more with {sum(one.showings for one in rest):,} showings"
            + (f", {few} of them with fewer than a batch" if few else "")
        )
    yield (
        f"steps: {epoch.steps_per_epoch:,} per epoch (gradient_accumulation_steps "
        f"{summary.gradient_accumulation_steps}); {epoch.steps:,} steps are {epoch.epochs:,} epochs ({epoch.set_by})"
    )


def _named(bucket: Bucket) -> str:
    return " + ".join((bucket.target, *bucket.references))
