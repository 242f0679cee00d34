"""Degradations: a recipe and a seed give steps in which every number is fixed, the steps change the pixels.

A new step is a class in schemas/steps.py, a pure function here or in a module beside, and a line in `STEPS`: it takes
the pixels, its draws and its realised parameters, and returns new pixels of the same size.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

import cv2

from prep.degrade import codecs, colour, optics, patterns, sensor
from prep.degrade.codecs import decode_stored, missing_codec, png_file
from prep.degrade.draws import Draws
from prep.degrade.realise import Step, realise
from prep.images import Pixels
from schemas.keys import seed_of
from schemas.recipes import Chain, Recipe
from schemas.steps import AnyStep

__all__ = [
    "STEPS", "Step", "TooLarge", "apply", "decode_stored", "degrade", "encode", "png_file", "realise", "suffix_of",
    "why_impossible",
]  # fmt: skip

# Steps that cannot have longer sides than so many pixels, for their formats or for OpenCV's 16-bit coordinates.
_LONGEST = {"jpeg": 65_500, "webp": 16_383, "avif": 32_768, "chromatic_aberration": 32_766}

_SCALING = {
    "nearest": cv2.INTER_NEAREST,
    "bilinear": cv2.INTER_LINEAR,
    "bicubic": cv2.INTER_CUBIC,
    "area": cv2.INTER_AREA,
    "lanczos": cv2.INTER_LANCZOS4,
}


class TooLarge(ValueError):
    """A picture that a step cannot have."""


def degrade(pixels: Pixels, recipe: Recipe, seed: int) -> Pixels:
    """Apply a recipe to a picture of any size; the same arguments give the same bytes."""
    return apply(pixels, realise(recipe, seed), seed)


def apply(pixels: Pixels, steps: Sequence[Step], seed: int) -> Pixels:
    """Do the steps one after the other; each draws its own noise, whatever comes before or after it.

    Raises TooLarge.
    """
    changed = pixels
    for step, own in zip(steps, _seeds(steps, seed), strict=True):
        changed = _applied(changed, step, own)
    return pixels.copy() if changed is pixels else changed


def encode(pixels: Pixels, steps: Sequence[Step], seed: int) -> tuple[bytes, str]:
    """Return the degraded picture as a file, and its suffix: the last step's own bitstream, or a lossless one.

    Raises TooLarge.
    """
    if not steps or steps[-1]["step"] not in codecs.STORED_AS:
        return codecs.quick_png_file(apply(pixels, steps, seed)), ".png"
    _must_fit(pixels, steps[-1])
    suffix, written = codecs.STORED_AS[steps[-1]["step"]]
    return written(apply(pixels, steps[:-1], seed), **_parameters(steps[-1])), suffix


def suffix_of(steps: Sequence[Step]) -> str:
    """Tell the suffix of the file that `encode` would make."""
    last = steps[-1]["step"] if steps else ""
    return codecs.STORED_AS[last][0] if last in codecs.STORED_AS else ".png"


def why_impossible(recipe: Recipe) -> str | None:
    """Say which of a recipe's steps the installed libraries cannot do; None if they can do all."""
    names = _names(recipe.all_steps) if isinstance(recipe, Chain) else ()
    return next(filter(None, map(missing_codec, names)), None)


def resize(
    pixels: Pixels, draws: Draws, *, factor: float, kernel: str, kernel_back: str, steps: Sequence[Step]
) -> Pixels:
    """Scale, do steps at that size, and scale back."""
    height, width = pixels.shape[:2]
    # The factor has nine digits: what is a whole number of pixels but for its last is one.
    between = max(1, int(width * factor + 1e-4)), max(1, int(height * factor + 1e-4))
    scaled: Pixels = cv2.resize(pixels, between, interpolation=_SCALING[kernel])
    back: Pixels = cv2.resize(apply(scaled, steps, draws.seed), (width, height), interpolation=_SCALING[kernel_back])
    return back


STEPS: Mapping[str, Callable[..., Pixels]] = {
    "resize": resize,
    "blur": optics.blur,
    "noise": sensor.noise,
    "block_noise": sensor.block_noise,
    "jpeg": codecs.jpeg,
    "webp": codecs.webp,
    "avif": codecs.avif,
    "color_cast": colour.color_cast,
    "gamma": colour.gamma,
    "banding": colour.banding,
    "haze": optics.haze,
    "chromatic_aberration": optics.chromatic_aberration,
    "scanlines": patterns.scanlines,
    "moire": patterns.moire,
    "sharpen": optics.sharpen,
    "grayscale": colour.grayscale,
    "sepia": colour.sepia,
    "fade": colour.fade,
    "scratches": patterns.scratches,
    "dust": patterns.dust,
}


def _applied(pixels: Pixels, step: Step, seed: int) -> Pixels:
    _must_fit(pixels, step)
    return STEPS[step["step"]](pixels, Draws(seed), **_parameters(step))


def _must_fit(pixels: Pixels, step: Step) -> None:
    height, width = pixels.shape[:2]
    longest = _LONGEST.get(step["step"])
    if longest is not None and max(width, height) > longest:
        raise TooLarge(f"not degradable: {step['step']} takes sides of {longest} pixels at most, here {width}x{height}")


def _parameters(step: Step) -> dict[str, object]:
    return {name: value for name, value in step.items() if name != "step"}


def _seeds(steps: Sequence[Step], seed: int) -> Iterator[int]:
    """Seed each step by its name and how many of that name came before."""
    before: Counter[str] = Counter()
    for step in steps:
        yield seed_of(seed, "apply", step["step"], before[step["step"]])
        before[step["step"]] += 1


def _names(steps: Sequence[AnyStep]) -> Iterator[str]:
    for step in steps:
        yield step.step
        yield from _names(getattr(step, "steps", ()))
