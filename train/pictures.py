"""Pictures sampled while training: what the adapter makes of prompts and of held-out pairs, and how like it is.

A further picture is an `_Order` in `_orders`. A pair's own pictures, reference and target, are the VAE's decoding of
their cached latents: training runs from shards alone, and what the VAE loses is the same in all that is compared.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn

from families.checkpoints import locate
from families.protocol import Sampling, TextEmbeds
from families.runtime import dtype_of, evaluating, family_of, release_memory
from schemas.console import log, progress
from schemas.keys import seed_of
from schemas.project import Project
from train.data import Shelf, Shown, check_cached
from train.grid import Cell, Pixels, drawn, save_picture
from train.held_out import held_out_pairs
from train.likeness import psnr, ssim
from train.step import autocast

_GRID = "grid"  # name of the sheet
_OUTPUT = "output"  # label of what was sampled
_DRAWN = 32  # cells of it at most
_LONGEST = 100  # letters of a file's name


@dataclass(frozen=True, slots=True)
class Score:
    """How like one sampled pair is to its target."""

    name: str  # of its file
    sample_id: str
    psnr: float  # dB
    ssim: float
    reference_psnr: float | None  # of the first reference that has the target's size; null if there is none
    reference_ssim: float | None


@dataclass(frozen=True, slots=True)
class SampleReport:
    """One event of sampling."""

    step: int
    folder: Path
    names: tuple[str, ...]  # of the pictures, as their files are called
    scores: tuple[Score, ...]  # of the pairs
    grid: Path
    pixels: Pixels  # of the grid, for a tracker

    @property
    def psnr(self) -> float | None:
        """Return the mean over the pairs, in dB; None without pairs."""
        return _mean(one.psnr for one in self.scores)

    @property
    def ssim(self) -> float | None:
        """Return the mean over the pairs; None without pairs."""
        return _mean(one.ssim for one in self.scores)

    @property
    def reference_psnr(self) -> float | None:
        """Return the references' mean, in dB: what doing nothing would score; None where none can be compared."""
        return _mean(one.reference_psnr for one in self.scores)

    @property
    def reference_ssim(self) -> float | None:
        """Return the references' mean; None where none can be compared."""
        return _mean(one.reference_ssim for one in self.scores)

    def values(self) -> dict[str, float]:
        """Return the means by the names that they have among the metrics."""
        means = {
            "samples/psnr": self.psnr,
            "samples/ssim": self.ssim,
            "samples/reference_psnr": self.reference_psnr,
            "samples/reference_ssim": self.reference_ssim,
        }
        return {name: value for name, value in means.items() if value is not None}


@dataclass(frozen=True, slots=True)
class _Order:
    """A picture to sample."""

    name: str  # of its file
    prompt: str
    shown: Shown | None  # of a pair
    size: tuple[int, int]  # width and height of a picture from a prompt
    seed: int


@dataclass(frozen=True, slots=True)
class _Sampled:
    """One that was sampled; all latents are on the CPU."""

    output: Tensor
    references: tuple[Tensor, ...] = ()
    target: Tensor | None = None


def check_pictures(project: Project, shelf: Shelf) -> None:
    """Raise UserError if something that is to be sampled is not cached; loads and fetches nothing."""
    if not project.trainer.validation_disable:
        _orders(project, shelf)


def pictures_of(project: Project, shelf: Shelf, device: torch.device) -> "Pictures | None":
    """Return what samples a run's pictures, or None if there are none to sample.

    Raises UserError if something that sampling needs is not there.
    """
    if project.trainer.validation_disable:
        return None
    orders = _orders(project, shelf)
    return Pictures(project, shelf, device, orders) if orders else None


class Pictures:
    """Samples the same pictures from the same noise at every event. The VAE waits on the CPU between them."""

    def __init__(self, project: Project, shelf: Shelf, device: torch.device, orders: Sequence[_Order]) -> None:
        self._project, self._shelf, self._device, self._orders = project, shelf, device, orders
        self._family, config = family_of(project), project.trainer
        folder = locate(project, (*project.family.denoiser, *project.family.image_encoder))
        self._pipeline = self._family.load_pipeline(folder)
        self._encoder = self._family.load_image_encoder(
            folder,
            dtype_of(config.vae_dtype),
            torch.device("cpu"),
            tiling=config.vae_enable_tiling,
            slicing=config.vae_enable_slicing,
        )

    def sample(self, denoiser: nn.Module, step: int) -> SampleReport:
        """Sample with the denoiser as it is after `step` steps, and write the pictures to the run folder.

        Its mode, its gradients and torch's generators are left as they were. Raises UserError if a shard is damaged
        or a file cannot be written.
        """
        folder = self._project.run_folder / "samples" / f"step-{step}"
        with (
            torch.no_grad(),
            evaluating(denoiser),
            progress(f"samples after step {step}", len(self._orders), "picture") as bar,
        ):
            sampled: list[_Sampled] = []
            for order in self._orders:
                sampled.append(self._sampled(denoiser, order))
                bar.update()
        cells: list[Cell] = []
        scores: list[Score] = []
        with torch.no_grad(), self._decoding():
            for order, one in zip(self._orders, sampled, strict=True):
                cell, score = self._judged(order, one)
                save_picture(dict(cell.pictures)[_OUTPUT], folder / f"{order.name}.png")
                cells += [cell] if len(cells) < _DRAWN else []
                scores += [score] if score is not None else []
        grid = folder / f"{_GRID}.png"
        pixels = drawn(cells)
        save_picture(pixels, grid)
        names = tuple(order.name for order in self._orders)
        return SampleReport(step, folder, names, tuple(scores), grid, pixels)

    def _sampled(self, denoiser: nn.Module, order: _Order) -> _Sampled:
        if order.shown is None:
            text = self._shelf.text([order.prompt], self._device)
            return _Sampled(self._latents(denoiser, text, (), order.size, order.seed).cpu())
        batch, scale = self._shelf.load([order.shown], self._device), self._project.family.latent_scale
        height, width = (scale * side for side in batch.latents.shape[-2:])
        output = self._latents(denoiser, batch.text, batch.references, (width, height), order.seed)
        return _Sampled(output.cpu(), tuple(one.cpu() for one in batch.references), batch.latents.cpu())

    def _latents(
        self, denoiser: nn.Module, text: TextEmbeds, references: Sequence[Tensor], size: tuple[int, int], seed: int
    ) -> Tensor:
        config = self._project.trainer
        negative = None
        if self._project.true_guidance > 1:
            negative = self._shelf.text([config.validation_negative_prompt], self._device)
        with autocast(config, self._device):
            return self._family.sample(
                self._pipeline, denoiser, text, negative, references, sampling(self._project, size, seed)
            )

    def _judged(self, order: _Order, one: _Sampled) -> tuple[Cell, Score | None]:
        """Decode a sampled picture and what it is compared with: references, output, target, in this order."""
        output = self._decoded(one.output)
        if one.target is None or order.shown is None:
            return Cell(((_OUTPUT, output.numpy()),), (order.name, order.prompt)), None
        target, references = self._decoded(one.target), [self._decoded(reference) for reference in one.references]
        alike = next((reference for reference in references if reference.shape == target.shape), None)
        score = Score(
            order.name,
            order.shown.sample_id,
            psnr(output, target),
            ssim(output, target),
            psnr(alike, target) if alike is not None else None,
            ssim(alike, target) if alike is not None else None,
        )
        labels = ["reference"] if len(references) == 1 else [f"reference {n + 1}" for n in range(len(references))]
        labelled = zip([*labels, _OUTPUT, "target"], [*references, output, target], strict=True)
        pictures = tuple((label, pixels.numpy()) for label, pixels in labelled)
        return Cell(pictures, (f"{order.name}: {_told(score)}", order.prompt)), score

    def _decoded(self, latents: Tensor) -> Tensor:
        try:
            return self._family.decode_latents(self._encoder, latents)[0].cpu()
        except torch.OutOfMemoryError:
            log.warning("samples: decoded in tiles from now on, for the accelerator's memory is full")
        release_memory()
        self._encoder.enable_tiling()
        return self._family.decode_latents(self._encoder, latents)[0].cpu()

    @contextmanager
    def _decoding(self) -> Iterator[None]:
        """Have the VAE on the accelerator for a while."""
        self._encoder.to(self._device)
        try:
            yield
        finally:
            self._encoder.to("cpu")
            release_memory()


def sampling(project: Project, size: tuple[int, int], seed: int) -> Sampling:
    """Say how the options have a picture of a size sampled."""
    config = project.trainer
    return Sampling(
        width=size[0],
        height=size[1],
        steps=config.validation_num_inference_steps,
        guidance=config.validation_guidance,
        guidance_real=project.true_guidance,
        seed=seed,
    )


def runnable(width: float, height: float, alignment: int) -> tuple[int, int]:
    """Return the nearest size whose sides are multiples of `alignment`."""
    return max(1, round(width / alignment)) * alignment, max(1, round(height / alignment)) * alignment


def _orders(project: Project, shelf: Shelf) -> list[_Order]:
    """List what is sampled: pairs first, then each prompt at each size; raises UserError if it is not cached."""
    config = project.trainer
    sizes = [runnable(*size, project.family.smallest_alignment) for size in config.validation_sizes]
    prompts = project.sampled_prompts
    used = [*prompts.values(), *([config.validation_negative_prompt] if project.true_guidance > 1 else [])]
    pairs = held_out_pairs(project, shelf)
    check_cached(project, shelf.uncached(used))
    orders = [_Order(one.name, one.shown.prompt, one.shown, (0, 0), one.shown.seed) for one in pairs]
    for name, prompt in prompts.items():
        seed = seed_of(config.validation_seed, "prompt", name)
        for width, height in sizes:
            called = f"{name}-{width}x{height}" if len(sizes) > 1 else name
            orders.append(_Order(called, prompt, None, (width, height), seed))
    files = _file_names([one.name for one in orders])
    return [replace(one, name=file) for file, one in zip(files, orders, strict=True)]


def _file_names(names: Iterable[str]) -> Iterator[str]:
    """Yield names that files can have anywhere, each once."""
    taken = {_GRID}
    for name in names:
        plain = re.sub(r"[^\w .-]", "_", name)[:_LONGEST].strip(" .") or "picture"
        chosen, number = plain, 1
        while chosen.casefold() in taken:
            number += 1
            chosen = f"{plain}-{number}"
        taken.add(chosen.casefold())
        yield chosen


def _told(score: Score) -> str:
    if score.reference_psnr is None or score.reference_ssim is None:
        return f"PSNR {score.psnr:.1f} dB, SSIM {score.ssim:.3f}"
    return (
        f"PSNR {score.psnr:.1f} dB (reference {score.reference_psnr:.1f}), "
        f"SSIM {score.ssim:.3f} ({score.reference_ssim:.3f})"
    )


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
