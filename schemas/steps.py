"""The steps that a chain of degradations is made of: every parameter with its range, default and unit.

A new one is a class here, its place in `AnyStep`, a pure function in prep/degrade and a line in its `STEPS`. Lengths
are pixels of the picture that is degraded, angles degrees, `sigma` of noise levels of 255.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias, get_args

from pydantic import AfterValidator, Field, model_validator

from schemas.drawn import ONE_OR_MORE, Drawn, Range
from schemas.options import Options, option

_STAGES = "pairs cache"

Chance: TypeAlias = Annotated[float, Field(ge=0, le=1)]
Scaling = Literal["nearest", "bilinear", "bicubic", "area", "lanczos"]
BlurKernel = Literal[
    "gaussian", "box", "motion", "defocus", "anisotropic", "generalized_gaussian", "plateau", "sinc"
]  # fmt: skip
NoiseKind = Literal["gaussian", "poisson", "shot_read", "speckle", "salt_pepper"]
Subsampling = Literal["4:4:4", "4:2:2", "4:2:0"]


def param(default: Any, description: str, **limits: Any) -> Any:
    """Declare a parameter of a step."""
    return option(default, description, stages=_STAGES, **limits)


# Parameters that only some of a step's words use: step -> (its parameter of words, word -> what it uses).
USED_BY: Mapping[str, tuple[str, Mapping[str, tuple[str, ...]]]] = {
    "blur": (
        "kernel",
        {
            "gaussian": ("sigma", "size"),
            "box": ("radius",),
            "motion": ("length", "angle"),
            "defocus": ("radius",),
            "anisotropic": ("sigma", "sigma_y", "angle", "size"),
            "generalized_gaussian": ("sigma", "sigma_y", "angle", "beta", "size"),
            "plateau": ("sigma", "sigma_y", "angle", "beta", "size"),
            "sinc": ("cutoff", "size"),
        },
    ),
    "noise": (
        "kind",
        {
            "gaussian": ("sigma", "gray_probability"),
            "poisson": ("scale", "gray_probability"),
            "shot_read": ("shot", "read", "gray_probability"),
            "speckle": ("sigma", "gray_probability"),
            "salt_pepper": ("amount", "salt", "gray_probability"),
        },
    ),
    "haze": (
        "pattern",
        {"constant": ("transmission", "airlight"), "gradient": ("transmission", "airlight", "far", "angle")},
    ),
}


class StepOptions(Options):
    """What every step has."""

    probability: Chance = param(1.0, "how often a picture gets the step")

    def acting(self, stage: str) -> dict[str, Any]:
        """Return the parameters that its words use, as JSON values; so no other enters a key."""
        values = super().acting(stage)
        if values["step"] not in USED_BY:
            return values
        field, uses = USED_BY[values["step"]]
        used = {"step", "probability", field, *(name for word in values[field] for name in uses[word])}
        return {name: value for name, value in values.items() if name in used}


def _some(steps: "tuple[AnyStep, ...] | None") -> "tuple[AnyStep, ...] | None":
    if steps is not None and not steps:
        raise ValueError("must not be empty")
    return steps


class Resize(StepOptions):
    """Scale down or up and back to the size it was; `steps` are applied in between."""

    step: Literal["resize"] = param("resize", "which step")
    factor: Annotated[Range, Drawn(1 / 64, 4)] = param((0.25, 0.5), "size in between, as a share of the sides")
    kernel: Annotated[tuple[Scaling, ...], ONE_OR_MORE, Field(min_length=1)] = param(
        ("area", "bilinear", "bicubic"), "interpolation on the way there; only `area` averages what it leaves out"
    )
    kernel_back: Annotated[tuple[Scaling, ...], ONE_OR_MORE, Field(min_length=1)] = param(
        ("bilinear", "bicubic"), "interpolation on the way back"
    )
    steps: "tuple[Step, ...]" = param((), "what happens at the size in between")


class Blur(StepOptions):
    """Convolve with a kernel of sum 1."""

    step: Literal["blur"] = param("blur", "which step")
    kernel: Annotated[tuple[BlurKernel, ...], ONE_OR_MORE, Field(min_length=1)] = param(("gaussian",), "its shape")
    sigma: Annotated[Range, Drawn(0, 100)] = param(
        (0.5, 3.0), "standard deviation: gaussian; along the first axis: anisotropic, generalized_gaussian, plateau"
    )
    sigma_y: Annotated[Range | None, Drawn(0, 100)] = param(
        None, "the same across that axis; null is `sigma`: anisotropic, generalized_gaussian, plateau"
    )
    angle: Annotated[Range, Drawn(-360, 360)] = param(
        (0.0, 180.0), "of motion or of the first axis, anticlockwise from the horizontal"
    )
    length: Annotated[Range, Drawn(0, 200)] = param((5.0, 25.0), "of the path: motion")
    radius: Annotated[Range, Drawn(0, 100)] = param((1.0, 5.0), "of the square or disk: box, defocus")
    beta: Annotated[Range, Drawn(0.1, 20)] = param((0.5, 4.0), "shape: generalized_gaussian (1 is gaussian), plateau")
    cutoff: Annotated[Range, Drawn(0.1, 3.1416)] = param(
        (1.0472, 3.1416), "highest frequency kept, radians per pixel: sinc"
    )
    size: Annotated[Range | None, Drawn(1, 999, odd=True)] = param(
        None, "side of the kernel; null is wide enough for it (sinc: 21)"
    )


class Noise(StepOptions):
    """Add noise to every pixel."""

    step: Literal["noise"] = param("noise", "which step")
    kind: Annotated[tuple[NoiseKind, ...], ONE_OR_MORE, Field(min_length=1)] = param(("gaussian",), "its distribution")
    sigma: Annotated[Range, Drawn(0, 255)] = param(
        (1.0, 30.0), "standard deviation, levels of 255: gaussian; of a white pixel: speckle"
    )
    scale: Annotated[Range, Drawn(0, 10)] = param(
        (0.05, 3.0), "of the difference that counting 256 photons for white makes: poisson"
    )
    shot: Annotated[Range, Drawn(1e-5, 1, log=True)] = param(
        (0.0001, 0.012),
        "variance of a white pixel, white being 1, proportional to brightness, drawn log-uniformly: shot_read",
    )
    read: Annotated[Range, Drawn(0.01, 255, log=True)] = param(
        (0.5, 8.0), "standard deviation everywhere, levels of 255, drawn log-uniformly: shot_read"
    )
    amount: Annotated[Range, Drawn(0, 1)] = param((0.0, 0.01), "share of values replaced: salt_pepper")
    salt: Annotated[Range, Drawn(0, 1)] = param(0.5, "share of white among those: salt_pepper")
    gray_probability: Chance = param(0.0, "how often the three channels share their noise")


class BlockNoise(StepOptions):
    """Add gaussian noise to every eighth row and column, where JPEG blocks meet."""

    step: Literal["block_noise"] = param("block_noise", "which step")
    sigma: Annotated[Range, Drawn(0, 255)] = param(5.1, "standard deviation, levels of 255")


class Jpeg(StepOptions):
    """Compress as JPEG and decode."""

    step: Literal["jpeg"] = param("jpeg", "which step")
    quality: Annotated[Range, Drawn(1, 100, whole=True)] = param((30, 95), "of libjpeg's scale")
    subsampling: Annotated[tuple[Subsampling, ...], ONE_OR_MORE, Field(min_length=1)] = param(
        ("4:2:0",), "of the colours"
    )


class Webp(StepOptions):
    """Compress as lossy WebP and decode."""

    step: Literal["webp"] = param("webp", "which step")
    quality: Annotated[Range, Drawn(1, 100, whole=True)] = param((30, 95), "of libwebp's scale")


class Avif(StepOptions):
    """Compress as AVIF and decode; needs a Pillow that can."""

    step: Literal["avif"] = param("avif", "which step")
    quality: Annotated[Range, Drawn(1, 100, whole=True)] = param((30, 90), "of libavif's scale")


class ColorCast(StepOptions):
    """Multiply the channels."""

    step: Literal["color_cast"] = param("color_cast", "which step")
    red: Annotated[Range, Drawn(0, 4)] = param((0.8, 1.2), "factor")
    green: Annotated[Range, Drawn(0, 4)] = param((0.8, 1.2), "factor")
    blue: Annotated[Range, Drawn(0, 4)] = param((0.8, 1.2), "factor")


class Gamma(StepOptions):
    """Raise brightness, white being 1, to a power: above 1 darkens."""

    step: Literal["gamma"] = param("gamma", "which step")
    gamma: Annotated[Range, Drawn(0.1, 10, log=True)] = param((0.5, 2.0), "exponent, drawn log-uniformly")


class Banding(StepOptions):
    """Keep so many levels per channel, evenly spaced from black to white."""

    step: Literal["banding"] = param("banding", "which step")
    levels: Annotated[Range, Drawn(2, 256, whole=True)] = param((8, 32), "levels per channel")


class Haze(StepOptions):
    """Mix with the light of the air: I = J·t + A·(1 − t)."""

    step: Literal["haze"] = param("haze", "which step")
    pattern: Annotated[tuple[Literal["constant", "gradient"], ...], ONE_OR_MORE, Field(min_length=1)] = param(
        ("constant",), "the same everywhere, or more towards one side"
    )
    transmission: Annotated[Range, Drawn(0, 1)] = param((0.4, 0.9), "share of light that arrives, t; at the near side")
    far: Annotated[Range, Drawn(0, 1)] = param((0.1, 0.5), "the same at the far side: gradient")
    angle: Annotated[Range, Drawn(-360, 360)] = param(90.0, "where the far side is; 90 is the top: gradient")
    airlight: Annotated[Range, Drawn(0, 1)] = param((0.7, 1.0), "brightness of the air, A")


class ChromaticAberration(StepOptions):
    """Magnify red and reduce blue about the middle, as a lens does."""

    step: Literal["chromatic_aberration"] = param("chromatic_aberration", "which step")
    shift: Annotated[Range, Drawn(-50, 50)] = param((0.5, 3.0), "of red at the corners, outwards; blue goes inwards")


class Scanlines(StepOptions):
    """Darken rows in a sine wave, as a tube or a bad scanner does."""

    step: Literal["scanlines"] = param("scanlines", "which step")
    period: Annotated[Range, Drawn(2, 200)] = param((2.0, 6.0), "rows per wave")
    strength: Annotated[Range, Drawn(0, 1)] = param((0.1, 0.5), "share of light lost at the darkest")
    phase: Annotated[Range, Drawn(0, 1)] = param((0.0, 1.0), "where in the wave the first row is")


class Moire(StepOptions):
    """Add the coloured wave that a camera sees on a screen."""

    step: Literal["moire"] = param("moire", "which step")
    period: Annotated[Range, Drawn(2, 1000)] = param((6.0, 60.0), "length of the wave")
    angle: Annotated[Range, Drawn(-360, 360)] = param((0.0, 180.0), "direction of the wave")
    strength: Annotated[Range, Drawn(0, 127)] = param((5.0, 25.0), "amplitude, levels of 255")
    color: Annotated[Range, Drawn(0, 1)] = param(
        (0.0, 1.0), "distance of the channels' waves; 1 is a third of a period"
    )
    phase: Annotated[Range, Drawn(0, 1)] = param((0.0, 1.0), "where in the wave the middle is")


class Sharpen(StepOptions):
    """Sharpen with an unsharp mask, too much: halos."""

    step: Literal["sharpen"] = param("sharpen", "which step")
    sigma: Annotated[Range, Drawn(0, 100)] = param((0.8, 2.0), "of the mask's blur")
    amount: Annotated[Range, Drawn(0, 10)] = param((0.5, 2.0), "how much of what the blur takes is added")


class Grayscale(StepOptions):
    """Keep brightness alone."""

    step: Literal["grayscale"] = param("grayscale", "which step")


class Sepia(StepOptions):
    """Tone brown, as old prints are."""

    step: Literal["sepia"] = param("sepia", "which step")
    strength: Annotated[Range, Drawn(0, 1)] = param((0.3, 1.0), "0 is the picture, 1 all brown")


class Fade(StepOptions):
    """Lose contrast and lift black: v·contrast + lift."""

    step: Literal["fade"] = param("fade", "which step")
    contrast: Annotated[Range, Drawn(0, 1)] = param((0.5, 0.9), "factor")
    lift: Annotated[Range, Drawn(0, 255)] = param((0.0, 60.0), "level that black becomes")


class Scratches(StepOptions):
    """Draw light scratches from top to bottom, more or less."""

    step: Literal["scratches"] = param("scratches", "which step")
    count: Annotated[Range, Drawn(0, 200, whole=True)] = param((1, 8), "scratches")
    width: Annotated[Range, Drawn(1, 20, whole=True)] = param((1, 2), "of each")
    opacity: Annotated[Range, Drawn(0, 1)] = param((0.3, 0.9), "1 is white")


class Dust(StepOptions):
    """Scatter dark and light specks."""

    step: Literal["dust"] = param("dust", "which step")
    density: Annotated[Range, Drawn(0, 10_000)] = param((20.0, 200.0), "specks per megapixel")
    radius: Annotated[Range, Drawn(0.5, 50)] = param((0.8, 2.5), "largest; each speck draws its own")
    opacity: Annotated[Range, Drawn(0, 1)] = param((0.4, 0.9), "1 is black or white")


class Shuffle(StepOptions):
    """Do the steps in an order drawn for each picture."""

    step: Literal["shuffle"] = param("shuffle", "which step")
    steps: "Annotated[tuple[Step, ...], AfterValidator(_some)]" = param(..., "the steps")


class OneOf(StepOptions):
    """Do one of the steps."""

    step: Literal["one_of"] = param("one_of", "which step")
    steps: "Annotated[tuple[Step, ...], AfterValidator(_some)]" = param(..., "the steps")
    weights: tuple[Annotated[float, Field(ge=0)], ...] = param((), "how often each, in proportion; empty is alike")

    @model_validator(mode="after")
    def _weighed(self) -> "OneOf":
        if self.weights and len(self.weights) != len(self.steps):
            raise ValueError(f"{len(self.weights)} weights for {len(self.steps)} steps: give one for each, or none")
        if self.weights and not sum(self.weights):
            raise ValueError("some weight must be above 0")
        return self


class Sequence(StepOptions):
    """Do the steps one after the other, all or none."""

    step: Literal["sequence"] = param("sequence", "which step")
    steps: "Annotated[tuple[Step, ...], AfterValidator(_some)]" = param(..., "the steps")


AnyStep: TypeAlias = (
    Resize | Blur | Noise | BlockNoise | Jpeg | Webp | Avif | ColorCast | Gamma | Banding | Haze | ChromaticAberration
    | Scanlines | Moire | Sharpen | Grayscale | Sepia | Fade | Scratches | Dust | Shuffle | OneOf | Sequence
)  # fmt: skip
Step: TypeAlias = Annotated[AnyStep, Field(discriminator="step")]
Group: TypeAlias = Shuffle | OneOf | Sequence

STEP_MODELS: Mapping[str, type[StepOptions]] = {
    model.model_fields["step"].default: model for model in get_args(AnyStep)
}  # fmt: skip

for _model in (Resize, Shuffle, OneOf, Sequence):
    _model.model_rebuild()
