"""In which order samples are shown: a pure function of (seed, epoch), dealt out to steps and processes.

Shapes never mix in a batch. What decides how often a sample is shown is in `_of_epoch`, what one showing consists of in
`_show`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from schemas.keys import seed_of
from schemas.project import Project
from train.data import Sample, Shelf, Shown, training_sets


@dataclass(frozen=True, slots=True)
class Cursor:
    """A place in the stream of batches: those of earlier epochs, and `batch` of this one, were shown."""

    epoch: int = 0
    batch: int = 0


@dataclass(frozen=True, slots=True)
class Turn:
    """What one step shows."""

    epoch: int  # of its last batch
    batches: tuple[tuple[Shown, ...], ...]  # of this process
    samples: int  # of all processes
    after: Cursor  # where the next step goes on


def turns(project: Project, shelf: Shelf, start: Cursor, rank: int = 0, processes: int = 1) -> Iterator[Turn]:
    """Yield steps for ever from a place on; the same project gives the same stream.

    A step takes `gradient_accumulation_steps` batches for each process, and deals them out in turn: two processes that
    accumulate once do what one does that accumulates twice.
    """
    stream = _stream(project, shelf, start)
    count = project.trainer.gradient_accumulation_steps * processes
    while True:
        taken = [next(stream) for _ in range(count)]
        after, _ = taken[-1]
        epoch = after.epoch if after.batch else after.epoch - 1
        every = [tuple(showings) for _, showings in taken]
        yield Turn(epoch, tuple(every[rank::processes]), sum(map(len, every)), after)


def _stream(project: Project, shelf: Shelf, start: Cursor) -> Iterator[tuple[Cursor, list[Shown]]]:
    """Yield the batches from a place on, each with the place behind it."""
    epoch, first = start.epoch, start.batch
    while True:
        planned = epoch_batches(project, shelf, epoch)
        for number in range(first, len(planned)):
            last = number + 1 == len(planned)
            yield Cursor(epoch + 1) if last else Cursor(epoch, number + 1), planned[number]
        epoch, first = epoch + 1, 0


def epoch_batches(project: Project, shelf: Shelf, epoch: int) -> list[list[Shown]]:
    """Plan one epoch: its samples and their repeats, in batches of equal shapes, shuffled. None is dropped."""
    seed, size = project.trainer.seed, project.trainer.train_batch_size
    shown = _of_epoch(project, shelf.samples, epoch)
    turns = [(sample, turn) for sample in shown for turn in range(sample.repeats + 1)]
    turns.sort(key=lambda item: seed_of(seed, "order", epoch, item[0].sample_id, item[1]))
    alike: dict[tuple[tuple[int, ...], ...], list[Shown]] = {}
    for sample, turn in turns:
        showing = _show(project, sample, seed_of(seed, "show", epoch, sample.sample_id, turn))
        alike.setdefault(shelf.shapes(showing), []).append(showing)
    planned = [group[first : first + size] for group in alike.values() for first in range(0, len(group), size)]
    order = sorted(range(len(planned)), key=lambda number: seed_of(seed, "batch", epoch, number))
    return [planned[number] for number in order]


def _of_epoch(project: Project, samples: Sequence[Sample], epoch: int) -> list[Sample]:
    """Return the samples of one epoch: of several crops the one whose turn it is, of a set the share that is drawn."""
    shown: list[Sample] = []
    for dataset in training_sets(project):
        own = [one for one in samples if one.dataset_id == dataset.id and epoch % one.variants == one.variant]
        if dataset.probability < 1:
            own.sort(key=lambda one: seed_of(project.trainer.seed, "drawn", epoch, one.sample_id))
            own = own[: max(1, round(dataset.probability * len(own)))]
        shown += own
    return shown


def _show(project: Project, sample: Sample, seed: int) -> Shown:
    """Draw what one showing of a sample consists of: references, prompt, and whether they are dropped."""
    trainer, chosen = project.trainer, sample.references
    if len(chosen) > 1 and trainer.conditioning_multidataset_sampling == "random":
        chosen = (chosen[seed_of(seed, "reference") % len(chosen)],)
    prompts = sample.prompts_beside(chosen)
    prompt = prompts[seed_of(seed, "prompt") % len(prompts)]
    if _happens(project.caption_dropout, seed, "caption dropout"):
        prompt = ""
    if _happens(trainer.conditioning_dropout_probability, seed, "conditioning dropout"):
        chosen = ()
    return Shown(sample.sample_id, sample.target, tuple(image for image, _ in chosen), prompt, seed)


def _happens(probability: float, seed: int, what: str) -> bool:
    return seed_of(seed, what) / 2**63 < probability
