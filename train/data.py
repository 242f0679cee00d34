"""From pair tables and shards to batches: what is shown when, and the tensors of it.

The order is a function of (seed, epoch) alone. Opening a `Shelf` checks before the first step that every latent and
embed is there; `batches` plans; `Shelf.load` reads.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from families.checkpoints import EncoderKeys
from families.protocol import TextEmbeds
from schemas.datasets import DatasetConfig
from schemas.errors import UserError
from schemas.freshness import read_pairs
from schemas.keys import digest, seed_of, text_key
from schemas.project import Project
from schemas.rows import PairRow
from schemas.shards import Array, ShardIndex


@dataclass(frozen=True, slots=True)
class Image:
    """A latent's key and the store that holds it."""

    store: str  # dataset whose store it is
    encoder: str  # key: targets and references may have been encoded otherwise
    key: str


@dataclass(frozen=True, slots=True)
class Shown:
    """One showing of a sample: what the model gets to see."""

    sample_id: str
    target: Image
    references: tuple[Image, ...]
    prompt: str
    seed: int  # of all that is drawn for it: noise, time, guidance, and the latent where moments are stored


@dataclass(frozen=True, slots=True)
class Batch:
    """Tensors of one forward pass; every sample has the same shapes."""

    sample_ids: tuple[str, ...]
    seeds: tuple[int, ...]  # of each showing
    latents: Tensor  # B × C × H × W, float32
    noise: Tensor  # of the same shape
    references: tuple[Tensor, ...]  # each B × C × h × w
    text: TextEmbeds


@dataclass(frozen=True, slots=True)
class Sample:
    """One row of a pair table, ready to be shown."""

    sample_id: str
    target: Image
    references: tuple[tuple[Image, tuple[str, ...]], ...]  # with the prompts that go with each
    prompts: tuple[str, ...]
    repeats: int
    dataset_id: str = ""
    variant: int = 0  # the epochs that show it: those whose number modulo `variants` is this
    variants: int = 1


class Shelf:
    """The stores of a project, opened, and the samples that can be read from them."""

    def __init__(self, project: Project, keys: EncoderKeys) -> None:
        self._keys, self._text_encoder = keys, keys.text
        folders = {
            (dataset.id, key): project.latent_store(dataset) / key
            for dataset in project.datasets
            for key in {keys.target, keys.reference}
        }
        opened = {folder: ShardIndex(folder) for folder in set(folders.values())}
        self._latents = {place: opened[folder] for place, folder in folders.items()}  # by dataset and encoder
        self._moments = keys.target if project.trainer.posterior == "moments" else None  # their encoder
        self._text = ShardIndex(project.text_store / keys.text)
        self.samples: list[Sample] = []
        self.skipped = 0  # samples whose image could not be encoded
        missing: set[str] = set()
        for target in training_sets(project):
            for row in read_pairs(project, target):
                if row.reject is None:
                    self._place(row, missing)
        if missing:
            raise UserError(
                f"{len(missing)} latents or text embeds are not cached for this checkpoint and these settings, "
                f"first {min(missing)}; run: {project.command('prep cache')}"
            )
        if not self.samples:
            raise UserError("no sample is left to train on; prep pairs and prep cache say why each was rejected")

    def _place(self, row: PairRow, missing: set[str]) -> None:
        """Take a row in, or note what it lacks."""
        ours, theirs = self._keys.target, self._keys.reference
        target = Image(row.dataset_id, ours, row.target_key(ours))
        references = tuple(
            (Image(row.store_of(one), theirs, one.key(theirs)), tuple(one.prompts)) for one in row.references
        )
        images = [target, *(image for image, _ in references)]
        if any(image.key in self._of(image).rejects for image in images):
            self.skipped += 1
            return
        prompts = tuple(row.prompts) or ("",)
        every = {*prompts, *(text for _, texts in references for text in texts), ""}
        missing |= {
            f"image {image.key} of {row.dataset_id}/{row.target_path}"
            for image in images
            if image.key not in self._of(image)
        }
        missing |= {f"prompt {text!r}" for text in every if text_key(self._text_encoder, text) not in self._text}
        self.samples.append(
            Sample(row.sample_id, target, references, prompts, row.repeats, row.dataset_id, row.variant, row.variants)
        )

    def fingerprint(self) -> str:
        """Hash what is trained on, so that a resumed run notices another set of pairs, prompts or encoders."""
        samples = [
            [one.sample_id, one.target.key, [[image.key, texts] for image, texts in one.references], one.prompts]
            for one in self.samples
        ]
        return digest(self._text_encoder, samples, [[one.repeats, one.variant, one.variants] for one in self.samples])

    def shape(self, image: Image) -> tuple[int, ...]:
        """Return the shape C × H × W of a latent."""
        stored = self._of(image).header_of(image.key).shapes["latent"]
        return (stored[0] // 2, *stored[1:]) if image.encoder == self._moments else stored

    def load(self, showings: Sequence[Shown], device: torch.device) -> Batch:
        """Read one batch; raises UserError if a shard is damaged."""
        texts = [self._text.read(text_key(self._text_encoder, one.prompt)) for one in showings]
        pooled = [_tensor([text["pooled"]]) for text in texts if text["pooled"] is not None]
        places = zip(*(one.references for one in showings), strict=True)
        latents = self._targets(showings)
        noise = torch.stack([_noise(seed_of(one.seed, "noise"), latents.shape[1:]) for one in showings])
        return Batch(
            sample_ids=tuple(one.sample_id for one in showings),
            seeds=tuple(one.seed for one in showings),
            latents=latents.to(device),
            noise=noise.to(device),
            references=tuple(self._images(images).to(device) for images in places),
            text=TextEmbeds(
                embed=torch.stack([_embed(text) for text in texts]).to(device),
                pooled=torch.cat(pooled).to(device) if pooled else None,
                num_tokens=tuple(text["num_tokens"] for text in texts),
            ),
        )

    def _targets(self, showings: Sequence[Shown]) -> Tensor:
        """Read the targets' latents; of moments draw them, by the seeds of the showings alone."""
        stored = self._images([one.target for one in showings])
        if self._moments is None:
            return stored
        means, deviations = stored.chunk(2, dim=1)
        noise = [_noise(seed_of(one.seed, "posterior"), means.shape[1:]) for one in showings]
        return means + deviations * torch.stack(noise)

    def _of(self, image: Image) -> ShardIndex:
        return self._latents[image.store, image.encoder]

    def _images(self, images: Sequence[Image]) -> Tensor:
        return _tensor([self._of(image).read(image.key)["latent"] for image in images])


def training_sets(project: Project) -> tuple[DatasetConfig, ...]:
    """Return the sets of targets that are trained on: all but those held out for evaluation."""
    held_out = project.trainer.eval_dataset_id
    sets = tuple(one for one in project.targets if one.dataset_type != "eval" and one.id != held_out)
    if not sets:
        raise UserError("no dataset is left to train on: every one is held out for evaluation")
    return sets


def batches(project: Project, shelf: Shelf) -> Iterator[tuple[int, list[Shown]]]:
    """Yield (epoch, showings of one batch) for ever; the same project gives the same stream."""
    epoch = 0
    while True:
        for showings in epoch_batches(project, shelf, epoch):
            yield epoch, showings
        epoch += 1


def epoch_batches(project: Project, shelf: Shelf, epoch: int) -> list[list[Shown]]:
    """Plan one epoch: its samples and their repeats, in batches of equal shapes, shuffled. None is dropped."""
    seed, size = project.trainer.seed, project.trainer.train_batch_size
    shown = _of_epoch(project, shelf.samples, epoch)
    turns = [(sample, turn) for sample in shown for turn in range(sample.repeats + 1)]
    turns.sort(key=lambda item: seed_of(seed, "order", epoch, item[0].sample_id, item[1]))
    alike: dict[tuple[tuple[int, ...], ...], list[Shown]] = {}
    for sample, turn in turns:
        drawn = seed_of(seed, "drawn", sample.sample_id, epoch, turn)
        showing = _show(project, sample, (seed, "show", epoch, sample.sample_id, turn), drawn)
        shapes = tuple(shelf.shape(image) for image in (showing.target, *showing.references))
        alike.setdefault(shapes, []).append(showing)
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


def _show(project: Project, sample: Sample, name: tuple[object, ...], seed: int) -> Shown:
    """Draw what one showing of a sample consists of: reference, prompt, dropout; `seed` is of its latent's draw."""
    chosen = sample.references
    if len(chosen) > 1 and project.trainer.conditioning_multidataset_sampling == "random":
        chosen = (chosen[seed_of(*name, "reference") % len(chosen)],)
    prompts = chosen[0][1] if len(chosen) == 1 and chosen[0][1] else sample.prompts
    prompt = prompts[seed_of(*name, "prompt") % len(prompts)]
    if seed_of(*name, "dropout") / 2**63 < project.trainer.caption_dropout_probability:
        prompt = ""
    return Shown(sample.sample_id, sample.target, tuple(image for image, _ in chosen), prompt, seed)


def _noise(seed: int, shape: Sequence[int]) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def _embed(text: Mapping[str, Any]) -> Tensor:
    """Return a prompt's embed in float32, from bfloat16 or from float8 and its scale."""
    if text["scale"] is None:
        return _tensor([text["embed"]])[0]
    exact: Tensor = torch.from_numpy(text["embed"]).view(torch.float8_e4m3fn).float() * text["scale"]
    return exact


def _tensor(rows: Sequence[Array]) -> Tensor:
    """Stack bfloat16 bit patterns into a float32 tensor."""
    return torch.from_numpy(np.stack(rows)).view(torch.bfloat16).float()
