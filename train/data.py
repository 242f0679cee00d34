"""Samples and their tensors: what can be shown, and how a showing is read from shards.

Opening a `Shelf` checks before the first step that every latent and embed is there. In which order samples are shown is
in order.py, how they are read ahead in loader.py.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

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
from train.prompts import Prompt, Prompts, embeds_of


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


class Room:
    """Host memory for one batch, used again for the next; pinned where an accelerator copies from it."""

    def __init__(self, *, pinned: bool = False) -> None:
        self.pinned = pinned
        self._flat: dict[str, Tensor] = {}

    def get(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return memory for a tensor; what bore this name before is gone."""
        size = int(np.prod(shape)) * dtype.itemsize
        flat = self._flat.get(name)
        if flat is None or flat.numel() < size:
            flat = self._flat[name] = torch.empty(size, dtype=torch.uint8, pin_memory=self.pinned)
        return flat[:size].view(dtype).view(*shape)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A batch as it is stored; all but its prompts lies in a Room on the host."""

    showings: tuple[Shown, ...]
    target: Tensor  # B × C × H × W, bfloat16; of moments 2C, mean, then deviation
    drawn: Tensor | None  # B × C × H × W, standard normal: what the draw of moments takes
    noise: Tensor  # B × C × H × W, standard normal
    references: tuple[Tensor, ...]  # each B × C × h × w, bfloat16
    prompts: tuple[Prompt, ...]

    def to(self, device: torch.device) -> "Batch":
        """Copy to where the model is, in float32; on an accelerator the copy may be still under way."""
        target = _there(self.target, device)
        if self.drawn is not None:
            mean, deviation = target.chunk(2, dim=1)
            target = mean + deviation * _there(self.drawn, device)
        return Batch(
            sample_ids=tuple(one.sample_id for one in self.showings),
            seeds=tuple(one.seed for one in self.showings),
            latents=target,
            noise=_there(self.noise, device),
            references=tuple(_there(one, device) for one in self.references),
            text=embeds_of(self.prompts, device),
        )


@dataclass(frozen=True, slots=True)
class Batch:
    """Tensors of one forward pass; every sample has the same shapes."""

    sample_ids: tuple[str, ...]
    seeds: tuple[int, ...]  # of each showing
    latents: Tensor  # B × C × H × W, float32
    noise: Tensor  # of the same shape
    references: tuple[Tensor, ...]  # each B × C × h × w
    text: TextEmbeds

    @property
    def suspects(self) -> tuple[str, ...]:
        """Name the samples with numbers that are not finite, or all if every number is."""
        tensors = (self.latents, *self.references, self.text.embed)
        odd = [not all(bool(torch.isfinite(one[place]).all()) for one in tensors) for place in range(len(self.seeds))]
        return tuple(one for one, wrong in zip(self.sample_ids, odd, strict=True) if wrong) or self.sample_ids


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

    def prompts_beside(self, shown: Sequence[tuple[Image, tuple[str, ...]]]) -> tuple[str, ...]:
        """Return the prompts that go with some of its references: of one alone its own, if it has any."""
        return shown[0][1] if len(shown) == 1 and shown[0][1] else self.prompts


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
                if row.reject is None and (sample := self.place(row, missing)) is not None:
                    self.samples.append(sample)
                else:
                    self.skipped += row.reject is None
        check_cached(project, missing)
        if not self.samples:
            raise UserError("no sample is left to train on; prep pairs and prep cache say why each was rejected")

    def place(self, row: PairRow, missing: set[str]) -> Sample | None:
        """Make a sample of a row and note what of it is not cached; None if a picture of it could not be encoded."""
        ours, theirs = self._keys.target, self._keys.reference
        target = Image(row.dataset_id, ours, row.target_key(ours))
        references = tuple(
            (Image(row.store_of(one), theirs, one.key(theirs)), tuple(one.prompts)) for one in row.references
        )
        images = [target, *(image for image, _ in references)]
        if any(image.key in self._of(image).rejects for image in images):
            return None
        prompts = tuple(row.prompts) or ("",)
        missing |= {
            f"image {image.key} of {row.dataset_id}/{row.target_path}"
            for image in images
            if image.key not in self._of(image)
        }
        missing |= self.uncached({*prompts, *(text for _, texts in references for text in texts), ""})
        return Sample(
            row.sample_id, target, references, prompts, row.repeats, row.dataset_id, row.variant, row.variants
        )

    def uncached(self, prompts: Iterable[str]) -> set[str]:
        """Name the prompts whose embeds are not there."""
        return {f"prompt {text!r}" for text in prompts if text_key(self._text_encoder, text) not in self._text}

    @property
    def text_width(self) -> int:
        """Return the width of the text embeds."""
        return self._text.header_of(text_key(self._text_encoder, "")).shapes["embed"][1]

    def fingerprint(self) -> str:
        """Hash what is trained on, so that a resumed run notices another set of pairs, prompts or encoders."""
        samples = [
            [one.sample_id, one.target.key, [[image.key, texts] for image, texts in one.references], one.prompts]
            for one in self.samples
        ]
        return digest(self._text_encoder, samples, [[one.repeats, one.variant, one.variants] for one in self.samples])

    def shapes(self, showing: Shown) -> tuple[tuple[int, ...], ...]:
        """Return the shapes of a showing's tensors: target, text, references; a batch has one of each."""
        text = self._text.header_of(text_key(self._text_encoder, showing.prompt)).shapes["embed"]
        return (self._stored(showing.target), text, *map(self._stored, showing.references))

    def load(self, showings: Sequence[Shown], device: torch.device) -> Batch:
        """Read one batch of equal shapes; raises UserError if a shard is damaged."""
        return self.read(showings, Room()).to(device)

    def read(self, showings: Sequence[Shown], room: Room, kept: Prompts | None = None) -> Loaded:
        """Read a batch into a room, prompts that are not kept; several threads may, each into a room of its own.

        Raises UserError as `load` does.
        """
        target = self._images("target", [one.target for one in showings], room)
        places = zip(*(one.references for one in showings), strict=True)
        references = [self._images(f"reference {number}", images, room) for number, images in enumerate(places)]
        moments = showings[0].target.encoder == self._moments
        shape = [target.shape[1] // 2 if moments else target.shape[1], *target.shape[2:]]
        return Loaded(
            showings=tuple(showings),
            target=target,
            drawn=_normal("posterior", showings, shape, room) if moments else None,
            noise=_normal("noise", showings, shape, room),
            references=tuple(references),
            prompts=self._prompts([one.prompt for one in showings], kept or Prompts(), pinned=room.pinned),
        )

    def text(self, prompts: Sequence[str], device: torch.device) -> TextEmbeds:
        """Read the embeds of prompts; raises UserError if a shard is damaged."""
        return embeds_of(self._prompts(prompts, Prompts(), pinned=False), device)

    def _images(self, name: str, images: Sequence[Image], room: Room) -> Tensor:
        tensor = room.get(name, (len(images), *self._stored(images[0])), torch.bfloat16)
        for bits, image in zip(_bits(tensor), images, strict=True):
            self._of(image).fill([image.key], {"latent": bits[None]})
        return tensor

    def _prompts(self, prompts: Sequence[str], kept: Prompts, *, pinned: bool) -> tuple[Prompt, ...]:
        keys = [text_key(self._text_encoder, prompt) for prompt in prompts]
        return kept.of(keys, partial(self._embeds, pinned=pinned))

    def _embeds(self, keys: Sequence[str], *, pinned: bool) -> list[Prompt]:
        header = self._text.header_of(keys[0])
        parts = {
            column: torch.empty(
                (len(keys), *shape),
                dtype=getattr(torch, header.dtypes.get(column, "bfloat16")),
                pin_memory=pinned,
            )
            for column, shape in header.shapes.items()
        }
        rest = self._text.fill(keys, {column: _bits(tensor) for column, tensor in parts.items()})
        pooled: Iterable[Tensor | None] = parts.get("pooled", [None] * len(keys))
        return [
            Prompt(embed, row["scale"], one, row["num_tokens"])
            for embed, one, row in zip(parts["embed"], pooled, rest, strict=True)
        ]

    def _stored(self, image: Image) -> tuple[int, ...]:
        return tuple(self._of(image).header_of(image.key).shapes["latent"])

    def _of(self, image: Image) -> ShardIndex:
        return self._latents[image.store, image.encoder]


def check_cached(project: Project, missing: Collection[str]) -> None:
    """Raise UserError if latents or embeds are missing."""
    if missing:
        raise UserError(
            f"{len(missing)} latents or text embeds are not cached for this checkpoint, {project.trainer.model_family} "
            f"{project.flavour} and these settings, first {min(missing)}; run: {project.command('prep cache')}"
        )


def training_sets(project: Project) -> tuple[DatasetConfig, ...]:
    """Return the sets of targets that are trained on: all but those held out for evaluation."""
    held_out = project.trainer.eval_dataset_id
    sets = tuple(one for one in project.targets if one.dataset_type != "eval" and one.id != held_out)
    if not sets:
        raise UserError("no dataset is left to train on: every one is held out for evaluation")
    return sets


def _there(one: Tensor, device: torch.device) -> Tensor:
    return one.to(device, non_blocking=True).to(torch.float32, copy=device.type == "cpu")


def _normal(name: str, showings: Sequence[Shown], shape: Sequence[int], room: Room) -> Tensor:
    """Draw standard normal numbers for each showing, from its own seed."""
    tensor = room.get(name, (len(showings), *shape), torch.float32)
    for one, showing in zip(tensor, showings, strict=True):
        generator = torch.Generator().manual_seed(seed_of(showing.seed, name))
        torch.randn(*shape, generator=generator, out=one)
    return tensor


def _bits(tensor: Tensor) -> Array:
    """View a tensor's memory as bit patterns, which shards hold."""
    return tensor.view(torch.uint16 if tensor.itemsize == 2 else torch.uint8).numpy()
