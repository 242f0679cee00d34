"""`train sample`: one picture of a prompt and any number of images, with what was trained.

Read `sample` top to bottom: text encoders, which go before the rest comes; VAE; denoiser and adapter; the picture. What
it is asked for is a `Request`; what may be sampled with is in `_trained`.
"""

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image, ImageOps
from torch import Tensor, nn

from families import Source, open_project
from families.checkpoints import check_configs, is_distilled, locate
from families.protocol import Family, TextEmbeds
from families.quantize import check_precision, quantize_and_place
from families.runtime import default_device, dtype_of, family_of, placement, release_memory
from schemas.errors import UserError
from schemas.project import Project
from schemas.summaries import SampleSummary
from train import checkpoint
from train.adapter import LORA_NAME, add_adapter, load_adapter
from train.grid import Cell, Pixels, drawn, save_picture
from train.memory import check_memory, offload_blocks
from train.pictures import runnable, sampling
from train.plan import result_of
from train.step import autocast, base_dtype

CPU = torch.device("cpu")
_ADAPTER = ("lora_rank", "lora_alpha", "flux_lora_target")  # options that say what a checkpoint's tensors are
_MOST = 8192  # pixels of a side
_LONGEST = 60  # letters of a prompt in a file's name
_ON_WHITE = (255, 255, 255, 255)


@dataclass(frozen=True, slots=True)
class Request:
    """What to sample; null is what the project says."""

    prompt: str
    images: tuple[Path, ...] = ()  # references, in their order
    lora: Path | None = None  # file, or folder of one, or a checkpoint; null is what the project trained
    scale: float = 1.0  # strength of the adapter
    negative: str | None = None
    seed: int | None = None
    steps: int | None = None
    guidance: float | None = None  # that the model is told
    guidance_real: float | None = None  # true classifier-free guidance
    width: int | None = None  # pixels; null follows from the first image
    height: int | None = None
    output: Path | None = None  # PNG; null is a file in the run folder
    without: bool = False  # sample without what was trained too, to compare


def sample(project: Source, request: Request, *, workers: int | None = None) -> SampleSummary:
    """Sample a picture and write it; nothing is overwritten, a name that is taken gets a number.

    `workers` is the number of CPU threads. Raises UserError if an image, the adapter or the checkpoint is missing,
    damaged or does not fit, before anything large is loaded where that can be told.
    """
    project = open_project(project)
    with _enough_memory(project):
        return _sample(_asked(project, request), request, workers)


def _sample(project: Project, request: Request, workers: int | None) -> SampleSummary:
    start = time.monotonic()
    config, device, spec = project.trainer, default_device(), project.family
    check_precision(config.base_model_precision, device)
    check_memory(config, device)
    trained, wanted = _trained(project, request.lora, request.scale), _wanted_path(project, request)
    images = [_opened(path) for path in request.images]
    size = _size(project, request, images[0].size if images else None)
    area, alignment = size[0] * size[1], spec.smallest_alignment
    pictures = [_fitted(image, runnable(*_of_area(image.size, area), alignment)) for image in images]
    torch.set_num_threads(workers or torch.get_num_threads())

    family = family_of(project)
    folder = locate(project, (*spec.text_encoders, *spec.image_encoder, *spec.denoiser))
    pipeline = family.load_pipeline(folder)
    how = sampling(project, size, config.validation_seed)
    how = replace(how, guidance_real=1.0) if is_distilled(project, folder) else how  # it takes no true guidance
    prompts = [request.prompt, *([config.validation_negative_prompt] if how.guidance_real > 1 else [])]
    text, *negative = _encoded_prompts(project, family, folder, prompts, device)

    tiling, slicing = config.vae_enable_tiling, config.vae_enable_slicing
    encoder = family.load_image_encoder(folder, dtype_of(config.vae_dtype), device, tiling=tiling, slicing=slicing)
    references = [_encoded_image(family, encoder, one) for one in pictures]

    def made(denoiser: nn.Module) -> Pixels:
        with torch.no_grad(), autocast(config, device):
            latents = family.sample(pipeline, denoiser, text, negative[0] if negative else None, references, how)
        if not torch.isfinite(latents).all():
            raise UserError(
                f"{trained}: what is sampled with it is not finite; try another checkpoint, or a lower --scale"
            )
        pixels: Pixels = family.decode_latents(encoder, latents)[0].cpu().numpy()
        return pixels

    denoiser = _loaded(project, family, folder, trained, request.scale)
    picture, layers = made(denoiser), sum(isinstance(module, BaseTunerLayer) for module in denoiser.modules())
    guided = family.takes_guidance(denoiser)
    path = _free(wanted)
    save_picture(picture, path)
    compared = None
    if request.without:
        del denoiser
        release_memory()
        base = made(_loaded(project, family, folder, None, 1.0))
        compared = _compared(path, request.prompt, [*pictures, base, picture])
    return SampleSummary(
        path=str(path),
        compared=str(compared) if compared is not None else None,
        lora=str(trained),
        layers=layers,
        scale=request.scale,
        prompt=request.prompt,
        width=size[0],
        height=size[1],
        seed=how.seed,
        steps=how.steps,
        guidance=how.guidance if guided else None,
        guidance_real=how.guidance_real,
        device=str(device),
        warnings=project.warnings,
        seconds=time.monotonic() - start,
    )


@contextmanager
def _enough_memory(project: Project) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as fault:
        raise UserError(
            "the accelerator's memory is full; a smaller --width and --height, base_model_precision: int8-quanto, "
            f"vae_enable_tiling: true, or {project.family.text_precision}: int8-quanto take less"
        ) from fault


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


def _trained(project: Project, named: Path | None, scale: float) -> Path:
    """Find a file of an adapter, a checkpoint's folder, or one of whole weights; raises UserError if there is none."""
    if project.trainer.model_type == "full" and scale != 1:
        raise UserError("--scale: whole weights were trained, which have no strength; leave it out")
    place = named or project.run_folder
    component = project.family.denoiser[0]
    weights = place if place.name == component else place / component
    if place.is_file() or checkpoint.is_one(place):
        return place
    if (place / LORA_NAME).is_file():
        return place / LORA_NAME
    if (weights / "config.json").is_file():
        return weights
    found = sorted(place.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{place}: several LoRA files ({', '.join(one.name for one in found)}); name one with --lora")
    if named:
        raise UserError(f"{place}: no LoRA there; name a .safetensors file, its folder, or a checkpoint's")
    raise UserError(f"{result_of(project)}: nothing is trained yet; run: {project.command('train run')}")


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
    width, height = _asked_size(request, image or usual, usual[0] * usual[1], alignment)
    if max(width, height) > _MOST:
        raise UserError(f"the picture would be {width}x{height}: its sides are {_MOST} pixels at most; set both of "
                        "--width and --height, or crop the image")  # fmt: skip
    return width, height


def _asked_size(request: Request, shape: tuple[int, int], area: int, alignment: int) -> tuple[int, int]:
    across, down = shape
    if request.width is not None and request.height is not None:
        return request.width, request.height
    if request.width is not None:
        return request.width, runnable(1, request.width * down / across, alignment)[1]
    if request.height is not None:
        return runnable(request.height * across / down, 1, alignment)[0], request.height
    return runnable(*_of_area(shape, area), alignment)


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
    settings = project.text_settings
    encoders = family.load_text_encoders(folder, torch.bfloat16, placement(project, device), settings)
    encoded = [family.encode_prompts(encoders, [prompt], settings) for prompt in prompts]
    del encoders
    release_memory()
    return [
        TextEmbeds(one.embed.to(device), one.pooled.to(device) if one.pooled is not None else None, one.num_tokens)
        for one in encoded
    ]


def _encoded_image(family: Family, encoder: object, picture: Pixels) -> Tensor:
    """Encode a reference as prep cache does, the rounding of shards aside."""
    return family.encode_images(encoder, torch.from_numpy(picture)[None]).mean.float()


def _loaded(project: Project, family: Family, folder: Path, trained: Path | None, scale: float) -> nn.Module:
    """Load the denoiser as training does, then what was trained; raises UserError if that does not fit."""
    config, device, spec = project.trainer, default_device(), project.family
    whole = trained is not None and trained.name == spec.denoiser[0]
    source = trained.parent if trained is not None and whole else folder
    check_configs(project, source, spec.denoiser)
    denoiser = family.load_denoiser(source, base_dtype(config)).requires_grad_(False)
    waiting = config.enable_group_offload
    denoiser = quantize_and_place(
        denoiser,
        config.base_model_precision,
        spec.unquantised,
        CPU if waiting else device,
        config.quantize_via,
        spec.conditioning,
    )
    if trained is not None and trained.is_file():
        family.load_adapter(denoiser, trained, scale)
    elif trained is not None and not whole:
        _load_checkpoint(denoiser, project, trained, scale)
    if waiting:
        offload_blocks(family, denoiser, device, config)
    return denoiser.eval()


def _load_checkpoint(denoiser: nn.Module, project: Project, folder: Path, scale: float) -> None:
    """Load what a checkpoint of the project trained, whatever rank and alpha the project has by now."""
    layers, settings = checkpoint.layers_of(folder)
    then = {name: settings[name] for name in _ADAPTER if name in settings}
    add_adapter(denoiser, replace(project, trainer=project.trainer.model_copy(update=then)))
    try:
        load_adapter(denoiser, layers)
    except UserError as fault:
        raise UserError(f"{folder}: {fault}") from fault
    if project.trainer.model_type == "lora":
        denoiser.set_adapters(["default"], [scale])  # type: ignore[operator]


def _compared(path: Path, prompt: str, pictures: Sequence[Pixels]) -> Path:
    """Set images and both pictures side by side."""
    count = len(pictures) - 2
    labels = ["image"] if count == 1 else [f"image {number + 1}" for number in range(count)]
    cell = Cell(tuple(zip([*labels, "before training", "trained"], pictures, strict=True)), (prompt,))
    sheet = _free(path.with_name(f"{path.stem}-compared.png"))
    save_picture(drawn([cell]), sheet)
    return sheet


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
