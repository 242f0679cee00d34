"""`train sample`: one picture of a prompt and any number of images, with a trained adapter.

Read `sample` top to bottom: text encoders, which go before the rest comes; VAE; denoiser and adapter; the picture. What
it is asked for is a `Request`.
"""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import nn

from families import Source, open_project
from families.checkpoints import locate, text_precisions
from families.protocol import Family, TextEmbeds
from families.quantize import quantize_weights
from families.runtime import default_device, dtype_of, family_of, release_memory
from schemas.errors import UserError
from schemas.project import Project
from schemas.summaries import SampleSummary
from train.grid import Cell, Pixels, drawn, save_picture
from train.loop import LORA_NAME
from train.pictures import runnable, sampling
from train.step import autocast, base_dtype

_LONGEST = 60  # letters of a prompt in a file's name
_ON_WHITE = (255, 255, 255, 255)


@dataclass(frozen=True, slots=True)
class Request:
    """What to sample; null is what the project says."""

    prompt: str
    images: tuple[Path, ...] = ()  # references, in their order
    lora: Path | None = None  # file, or folder of one; null is the project's own
    scale: float = 1.0  # strength of the adapter
    negative: str | None = None
    seed: int | None = None
    steps: int | None = None
    guidance: float | None = None  # that the model is told
    guidance_real: float | None = None  # true classifier-free guidance
    width: int | None = None  # pixels; null follows from the first image
    height: int | None = None
    output: Path | None = None  # PNG; null is a file in the run folder
    without: bool = False  # sample without the adapter too, to compare


def sample(project: Source, request: Request, *, workers: int | None = None) -> SampleSummary:
    """Sample a picture and write it; nothing is overwritten, a name that is taken gets a number.

    `workers` is the number of CPU threads. Raises UserError if an image, the adapter or the checkpoint is missing,
    damaged or does not fit, before anything large is loaded where that can be told.
    """
    start = time.monotonic()
    project = _asked(open_project(project), request)
    config, device = project.trainer, default_device()
    lora, wanted = _adapter_file(project, request.lora), _wanted_path(project, request)
    images = [_opened(path) for path in request.images]
    alignment = project.family.smallest_alignment
    size = _size(project, request, images[0].size if images else None)
    pictures = [_fitted(image, runnable(*_of_area(image.size, size[0] * size[1]), alignment)) for image in images]
    torch.set_num_threads(workers or torch.get_num_threads())

    family, spec = family_of(project), project.family
    folder = locate(project, (*spec.text_encoders, *spec.image_encoder, *spec.denoiser))
    pipeline = family.load_pipeline(folder)
    prompts = [request.prompt, *([config.validation_negative_prompt] if config.validation_guidance_real > 1 else [])]
    text, *negative = _encoded_prompts(project, family, folder, prompts, device)

    encoder = family.load_image_encoder(
        folder,
        dtype_of(config.vae_dtype),
        device,
        tiling=config.vae_enable_tiling,
        slicing=config.vae_enable_slicing,
    )
    references = [family.encode_images(encoder, torch.from_numpy(one)[None]).mean.float() for one in pictures]

    denoiser = _loaded_denoiser(project, family, folder, device)
    layers = family.load_adapter(denoiser, lora, request.scale)
    how = sampling(config, size, config.validation_seed)

    def made() -> Pixels:
        with torch.no_grad(), autocast(config, device):
            latents = family.sample(pipeline, denoiser, text, negative[0] if negative else None, references, how)
        pixels: Pixels = family.decode_latents(encoder, latents)[0].cpu().numpy()
        return pixels

    picture = made()
    path = _free(wanted)
    save_picture(picture, path)
    compared = None
    if request.without:
        denoiser.disable_adapters()  # type: ignore[operator]
        labels = ["image"] if len(pictures) == 1 else [f"image {number + 1}" for number in range(len(pictures))]
        shown = [*zip(labels, pictures, strict=True), ("without LoRA", made()), ("with LoRA", picture)]
        compared = _free(path.with_name(f"{path.stem}-compared.png"))
        save_picture(drawn([Cell(tuple(shown), (request.prompt,))]), compared)
    return SampleSummary(
        path=str(path),
        compared=str(compared) if compared is not None else None,
        lora=str(lora),
        layers=layers,
        scale=request.scale,
        prompt=request.prompt,
        width=size[0],
        height=size[1],
        seed=how.seed,
        steps=how.steps,
        guidance=how.guidance if family.takes_guidance(denoiser) else None,
        guidance_real=how.guidance_real,
        device=str(device),
        warnings=project.warnings,
        seconds=time.monotonic() - start,
    )


def _asked(project: Project, request: Request) -> Project:
    """Put what is asked for in place of the project's own."""
    asked = {
        "validation_negative_prompt": request.negative,
        "validation_seed": request.seed,
        "validation_num_inference_steps": request.steps,
        "validation_guidance": request.guidance,
        "validation_guidance_real": request.guidance_real,
    }
    changed = {name: value for name, value in asked.items() if value is not None}
    return replace(project, trainer=project.trainer.model_copy(update=changed))


def _adapter_file(project: Project, named: Path | None) -> Path:
    """Find the file of an adapter; raises UserError if there is none, or several."""
    place = named or project.run_folder
    if place.is_file():
        return place
    if (place / LORA_NAME).is_file():
        return place / LORA_NAME
    found = sorted(place.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{place}: several LoRA files ({', '.join(one.name for one in found)}); name one with --lora")
    advice = "name a .safetensors file, or its folder" if named else f"run: {project.command('train run')}"
    raise UserError(f"{place}: no LoRA there; {advice}")


def _opened(path: Path) -> Image.Image:
    """Read an image upright, transparency on white; raises UserError if it is none."""
    try:
        with Image.open(path) as file:
            upright = ImageOps.exif_transpose(file)
            if not upright.has_transparency_data:
                return upright.convert("RGB")
            seen = upright.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", seen.size, _ON_WHITE), seen).convert("RGB")
    except FileNotFoundError as fault:
        raise UserError(f"{path}: no such file; --image takes the path of a picture") from fault
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as fault:
        raise UserError(f"{path}: cannot be read as a picture ({fault}); --image takes PNG, JPEG, WebP") from fault


def _size(project: Project, request: Request, image: tuple[int, int] | None) -> tuple[int, int]:
    """Return the size of the picture: as asked for, else the image's shape at the area of `validation_resolution`.

    Raises UserError if the model does not run at what was asked for.
    """
    alignment, usual = project.family.smallest_alignment, project.trainer.validation_sizes[0]
    for name, asked in (("--width", request.width), ("--height", request.height)):
        if asked is not None and (asked < alignment or asked % alignment):
            nearest = runnable(asked, asked, alignment)[0]
            raise UserError(f"{name} {asked}: must be a multiple of {alignment} pixels; {nearest} is the nearest")
    across, down = image or usual
    if request.width is not None and request.height is not None:
        return request.width, request.height
    if request.width is not None:
        return request.width, runnable(1, request.width * down / across, alignment)[1]
    if request.height is not None:
        return runnable(request.height * across / down, 1, alignment)[0], request.height
    return runnable(*_of_area((across, down), usual[0] * usual[1]), alignment)


def _of_area(size: tuple[int, int], area: int) -> tuple[float, float]:
    scale = (area / (size[0] * size[1])) ** 0.5
    return size[0] * scale, size[1] * scale


def _fitted(image: Image.Image, size: tuple[int, int]) -> Pixels:
    """Scale an image until it covers a size, and cut what is beyond."""
    return np.array(ImageOps.fit(image, size, Image.Resampling.LANCZOS))


def _encoded_prompts(
    project: Project, family: Family, folder: Path, prompts: Sequence[str], device: torch.device
) -> list[TextEmbeds]:
    """Encode prompts as prep cache does, and let the encoders go."""
    encoders = family.load_text_encoders(
        folder,
        torch.bfloat16,
        device,
        precisions=text_precisions(project),
        offload=project.trainer.offload_during_startup,
    )
    settings = project.family.text_settings[project.flavour]
    encoded = [family.encode_prompts(encoders, [prompt], settings) for prompt in prompts]
    del encoders
    release_memory()
    return [
        TextEmbeds(one.embed.to(device), one.pooled.to(device) if one.pooled is not None else None, one.num_tokens)
        for one in encoded
    ]


def _loaded_denoiser(project: Project, family: Family, folder: Path, device: torch.device) -> nn.Module:
    config = project.trainer
    denoiser = family.load_denoiser(folder, base_dtype(config), device).requires_grad_(False).eval()
    quantize_weights(denoiser, config.base_model_precision, project.family.unquantised)
    return denoiser


def _wanted_path(project: Project, request: Request) -> Path:
    """Say where the picture goes, by default named by its first image, or by its prompt, and its seed."""
    named = request.images[0].stem if request.images else request.prompt[:_LONGEST]
    stem = re.sub(r"[^\w.-]+", "-", named).strip("-.") or "picture"
    usual = f"{stem}-{project.trainer.validation_seed}.png"
    if request.output is None:
        return project.run_folder / "samples" / usual
    if request.output.is_dir():
        return request.output / usual
    if request.output.suffix.lower() != ".png":
        raise UserError(f"--output {request.output}: pictures are written as PNG; end its name in .png")
    return request.output


def _free(path: Path) -> Path:
    """Return the path, with a number if it is taken."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return free
