"""The encoders at work for `prep cache`: pixels from the pool to latent shards, prompts to text shards.

Apart from prep/cache.py because it loads a tensor library, which a run with nothing to encode does without.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch

from families.checkpoints import check_unchanged, image_encoder_keys, text_encoder_key
from families.fast_vae import speed_up
from families.protocol import Family, TextEmbeds
from families.runtime import default_device, dtype_of, family_of, groups_of, placement, release_memory
from prep.images import Pixels
from prep.launching import Flight, Launcher
from prep.pixels import Picture, Refusal
from prep.pool import Crash
from prep.posterior import chosen
from prep.units import Unit
from prep.writing import Part, Writer
from schemas.console import log
from schemas.errors import UserError
from schemas.project import Project
from schemas.rows import TextRow
from schemas.shards import Array, ShardHeader, is_finite, latent_row, text_row
from schemas.summaries import AcceleratorUse
from schemas.trainer import Posterior as Choice

ItemT = TypeVar("ItemT")

_FLOAT8_MOST = 448.0  # of float8_e4m3fn


@dataclass(frozen=True, slots=True)
class _Begun:
    """A unit of latents, and what became of those of its pictures that give no row."""

    unit: Unit
    rejected: dict[str, str] = field(default_factory=dict)  # key -> reason
    unsettled: dict[str, str] = field(default_factory=dict)  # name -> reason


@dataclass(frozen=True, slots=True)
class _Launched:
    """Pictures of a batch that are being encoded, or that memory does not hold."""

    of: _Begun
    pictures: Sequence[tuple[str, str]]  # key and name of each
    flight: Flight | None


class Latents:
    """The image encoder at work: pixels in, latent shards out."""

    def __init__(self, project: Project, checkpoint: Path) -> None:
        family, trainer = family_of(project), project.trainer
        self._checkpoint, device = checkpoint, default_device()
        groups = groups_of(trainer) if trainer.group_offload_vae and device.type == "cuda" else None
        encoder = family.load_image_encoder(
            checkpoint,
            dtype_of(trainer.vae_dtype),
            device,
            tiling=trainer.vae_enable_tiling,
            slicing=trainer.vae_enable_slicing,
            groups=groups,
        )
        if trainer.group_offload_vae and groups is None:
            log.info("group_offload_vae has no effect: there is no CUDA device")
        targets, references = image_encoder_keys(project, checkpoint)  # of what was loaded
        self._choices: dict[str, Choice] = {references: "mode", targets: trainer.posterior}
        self._size = _batch_size(trainer.vae_batch_size)
        fast = speed_up(encoder, project.compiled) if groups is None else None
        self._launcher: Launcher | None = Launcher(family, encoder, device, fast)
        self._under_way: deque[_Launched | _Begun] = deque()  # a unit after its last batch
        self._writer = Writer()

    def close(self) -> None:
        """Let its memory go; rows of a unit that was interrupted are written."""
        self._launcher = None
        self._under_way.clear()
        release_memory()
        self._writer.close()

    def used(self) -> AcceleratorUse | None:
        """Say how well the GPU was used so far; None if there is none."""
        return self._launcher.used() if self._launcher is not None else None

    def work(self, unit: Unit, pixels: Iterable[Pixels | Refusal | Crash]) -> Iterator[Part]:
        """Encode a unit whose pixels arrive in its order; yields what reached the disk, of units before it too.

        Its last batches may be under way still when it ends, so that the GPU has work until the next unit's first.
        Raises UserError if the unit is not for the encoder that was loaded: its weights were replaced meanwhile.
        """
        check_unchanged(self._checkpoint, unit.encoder in self._choices, True)
        assert self._launcher is not None, "not closed"
        begun = _Begun(unit)
        for batch in _batches(_usable(begun, self._awaited(pixels)), lambda: self._size):
            self._under_way += self._launch(batch, begun)
            yield from self._landed(self._launcher.behind)
        self._under_way.append(begun)
        yield from self._landed(self._launcher.behind)

    def settle(self) -> Iterator[Part]:
        """Yield what else reaches the disk of the units that were worked on, and wait for it."""
        yield from self._landed(0)
        yield from self._writer.settle()

    def _awaited(self, pixels: Iterable[ItemT]) -> Iterator[ItemT]:
        """Yield pixels, the time that they take noted."""
        assert self._launcher is not None, "not closed"
        stream = iter(pixels)
        while True:
            with self._launcher.waiting("pixels"):
                made = list(islice(stream, 1))
            if not made:
                return
            yield made[0]

    def _launch(self, batch: Sequence[tuple[str, str, Pixels]], begun: _Begun) -> list[_Launched]:
        """Have a batch encoded, in halves if memory does not hold it."""
        assert self._launcher is not None, "not closed"
        try:
            flight = self._launcher.launch([one for *_, one in batch], self._size, begun.unit.alike)
            return [_Launched(begun, [(key, name) for key, name, _ in batch], flight)]
        except torch.OutOfMemoryError:
            pass  # gone on with below: here, the fault still holds what filled the memory
        release_memory()
        if len(batch) == 1:
            return [_Launched(begun, [batch[0][:2]], None)]
        half = (len(batch) + 1) // 2
        self._size = min(self._size, half)
        height, width = batch[0][2].shape[:2]
        log.warning("out of memory with %d images of %dx%d; going on with %d", len(batch), width, height, half)
        return [*self._launch(batch[:half], begun), *self._launch(batch[half:], begun)]

    def _landed(self, most: int) -> Iterator[Part]:
        """Write batches, the oldest first, until no more than so many are under way; finish units on the way."""
        batches = sum(isinstance(one, _Launched) for one in self._under_way)
        while self._under_way and (batches > most or isinstance(self._under_way[0], _Begun)):
            one = self._under_way.popleft()
            if isinstance(one, _Begun):
                yield from self._finish(one)
            else:
                batches -= 1
                yield from self._land(one)

    def _land(self, launched: _Launched) -> Iterator[Part]:
        """Write a batch once it is encoded; note what cannot be, and what memory does not hold.

        Values are looked through by NumPy: PyTorch would wait for all its threads, beside busy workers, for each row.
        """
        begun = launched.of
        if launched.flight is None:
            told = "the accelerator's memory does not hold it; vae_enable_tiling needs less"
            begun.unsettled.update((name, told) for _, name in launched.pictures)
            return
        assert self._launcher is not None, "not closed"
        keys = [key for key, _ in launched.pictures]
        latents = chosen(self._launcher.land(launched.flight), keys, self._choices[begun.unit.encoder])
        rows = []
        for key, bits in zip(keys, _bits(latents), strict=True):
            if is_finite(bits):
                rows.append(latent_row(key, bits))
            else:
                begun.rejected[key] = "not encodable: the VAE gave a value that is not finite"
        if rows:
            header = ShardHeader("LatentRow", begun.unit.encoder, {"latent": tuple(latents.shape[1:])})
            with self._launcher.waiting("disk"):
                written = self._writer.put(begun.unit, header, rows)
            yield from written

    def _finish(self, begun: _Begun) -> Iterator[Part]:
        """Have the rest of a unit written."""
        assert self._launcher is not None, "not closed"
        with self._launcher.waiting("disk"):
            written = self._writer.finish(begun.unit, begun.rejected, begun.unsettled)
        yield from written


def _usable(begun: _Begun, pixels: Iterable[Pixels | Refusal | Crash]) -> Iterator[tuple[str, str, Pixels]]:
    """Yield (key, name, pixels) of pictures that have pixels; note why others have none."""
    for key, picture, made in zip(begun.unit.keys, begun.unit.items, pixels, strict=True):
        assert isinstance(picture, Picture), "a unit of latents"
        if isinstance(made, Refusal) and made.lasting:
            begun.rejected[key] = made.reason
        elif isinstance(made, Refusal | Crash):
            begun.unsettled[picture.name] = made.reason
        else:
            yield key, picture.name, made


class Texts:
    """The text encoders at work: prompts in, text shards out."""

    def __init__(self, project: Project, checkpoint: Path) -> None:
        self._family, self._settings = family_of(project), project.text_settings
        self._checkpoint = checkpoint
        how = placement(project, default_device())
        if project.trainer.group_offload_text_encoder and how.groups is None:
            log.info("group_offload_text_encoder has no effect: there is no CUDA device")
        self._encoders = self._family.load_text_encoders(checkpoint, torch.bfloat16, how, self._settings)
        self._key = text_encoder_key(project, checkpoint)  # of what was loaded
        _check_length(self._family, checkpoint, self._settings)
        self._size = _batch_size(project.trainer.text_encoder_batch_size)
        self._precision = project.family.text_precision
        self._padding_first = project.model.padding_first
        self._float8 = project.trainer.text_cache_dtype == "float8"
        self._writer = Writer()

    def close(self) -> None:
        """Let their memory go; rows of a unit that was interrupted are written."""
        self._encoders = None
        release_memory()
        self._writer.close()

    def work(self, unit: Unit) -> Iterator[Part]:
        """Encode a unit's prompts; yields what reached the disk. Raises as `Latents.work` does."""
        check_unchanged(self._checkpoint, unit.encoder, self._key)
        for batch, embeds in self._encoded(list(zip(unit.keys, map(str, unit.items), strict=True))):
            kept = embeds.embed.shape[1]
            shapes = {"embed": tuple(embeds.embed.shape[1:])}
            if embeds.pooled is not None:
                shapes["pooled"] = tuple(embeds.pooled.shape[1:])
            dtypes = {"embed": "float8_e4m3fn"} if self._float8 else {}
            cut = []
            for number, (key, prompt) in enumerate(batch):
                pooled = _bits(embeds.pooled[number]) if embeds.pooled is not None else None
                tokens, embed = embeds.num_tokens[number], embeds.embed[number]
                pad_rows = self._pad_rows(embed, kept - tokens - 1)
                row = self._row(key, str(prompt), embed[pad_rows:], pooled, min(tokens, kept))
                header = ShardHeader("TextRow", unit.encoder, shapes, dtypes, pad_rows=pad_rows)
                yield from self._writer.put(unit, header, [row])
                if tokens > kept:
                    cut.append(f"{str(prompt)[:60]!r}: {tokens} tokens, the encoder takes {kept}")
            if cut:
                yield Part(unit.name, cut=tuple(cut))
        yield from self._writer.finish(unit, {}, {})

    def settle(self) -> Iterator[Part]:
        """Yield what else reaches the disk of the units that were worked on, and wait for it."""
        yield from self._writer.settle()

    def _encoded(self, prompts: Sequence[tuple[str, str]]) -> Iterator[tuple[Sequence[tuple[str, str]], TextEmbeds]]:
        """Encode prompts batch by batch, in halves if memory does not hold one; raises UserError if it holds none."""
        while prompts:
            batch, embeds = prompts[: self._size], None
            with suppress(torch.OutOfMemoryError):  # gone on with below: here, the fault holds what filled the memory
                embeds = self._family.encode_prompts(self._encoders, [prompt for _, prompt in batch], self._settings)
            if embeds is not None:
                yield batch, embeds
                prompts = prompts[len(batch) :]
                continue
            release_memory()
            if len(batch) == 1:
                raise UserError(
                    "the accelerator's memory does not hold the text encoders and one prompt; "
                    f"group_offload_text_encoder, or {self._precision}: int8-quanto, needs less"
                )
            self._size = (len(batch) + 1) // 2
            log.warning("out of memory with %d prompts; going on with %d", len(batch), self._size)

    def _pad_rows(self, embed: torch.Tensor, count: int) -> int:
        """Return how many rows in front of an embed need not be stored, being equal to the one that follows them."""
        if not self._padding_first or count <= 0:
            return 0
        if bool((embed[:count] == embed[count]).all()):
            return count
        log.warning("rows of padding differ on this device: embeds are stored whole")
        self._padding_first = False
        return 0

    def _row(self, key: str, prompt: str, embed: torch.Tensor, pooled: Array | None, tokens: int) -> TextRow:
        if not torch.isfinite(embed).all():
            raise UserError(
                f"{self._checkpoint}: its text encoders give values that are not finite for {prompt[:60]!r}; fetch the "
                f"checkpoint again, or try another {self._precision}"
            )
        if not self._float8:
            return text_row(key, prompt, _bits(embed), pooled, tokens)
        exact = embed.detach().to("cpu", torch.float32)
        scale = max(float(exact.abs().max()) / _FLOAT8_MOST, torch.finfo(torch.float32).tiny)
        stored = (exact / scale).to(torch.float8_e4m3fn)
        lost = (stored.to(torch.float32) * scale - exact).square().mean().sqrt() / exact.square().mean().sqrt()
        bits: Array = stored.contiguous().view(torch.uint8).numpy()
        return text_row(key, prompt, bits, pooled, tokens, (scale, float(lost)))


def _check_length(family: Family, checkpoint: Path, settings: Mapping[str, Any]) -> None:
    """Raise UserError if no prompt has room within the length that all are cut to: they would all be one embed."""
    [around] = family.count_tokens(family.load_tokenizer(checkpoint), [""], settings)
    if around > settings["max_sequence_length"]:
        raise UserError(
            f"max_sequence_length {settings['max_sequence_length']}: what stands around every prompt takes {around} "
            "tokens already; give more, or leave it out"
        )


def _batches(items: Iterable[ItemT], size: Callable[[], int]) -> Iterator[list[ItemT]]:
    """Cut a stream into lists of `size()`, which may shrink on the way."""
    stream = iter(items)
    while batch := list(islice(stream, size())):
        yield batch


def _batch_size(wanted: int) -> int:
    """Return how many go in at once. On a CPU batches gain nothing, and neighbours would change a row's last bits."""
    return wanted if default_device().type != "cpu" else 1


def _bits(values: torch.Tensor) -> Array:
    """Return a tensor's bfloat16 bit patterns."""
    bits: Array = values.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint16).numpy()
    return bits
