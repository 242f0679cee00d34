"""Degradations as data: what a generator of references does to an image, with every number's range and default.

A new one is a class here, an entry in `RECIPES`, and a function in prep/degrade/realise.py that spells it as steps;
most need neither, since `chain` takes any list of steps. Meaning, defaults and order of operations of the others are
those of SimpleTuner's generators.
"""

import json
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Literal, TypeAlias

from pydantic import AfterValidator, Field, TypeAdapter, model_validator

from schemas.keys import canonical, digest
from schemas.options import Options, option
from schemas.presets import PRESETS, PresetName
from schemas.steps import AnyStep, OneOf, Resize, Sequence, Shuffle, Step


def _rising(value: tuple[int, int]) -> tuple[int, int]:
    if value[0] > value[1]:
        raise ValueError(f"the lower end comes first: [{value[1]}, {value[0]}]")
    return value


_HASH_DIGITS = 16

Quality = Annotated[int, Field(ge=1, le=100)]


class RecipeOptions(Options):
    """What every recipe has."""

    degrade_at: Literal["target", "source"] = option(
        "target",
        "degrade the picture after its resize and crop, or the full-size picture before them",
        stages="pairs cache",
    )


class Superresolution(RecipeOptions):
    """Downscale and upscale, blur, add noise, compress: a sharp photo becomes a soft one."""

    type: Literal["superresolution"] = option("superresolution", "which degradation", stages="pairs cache")
    blur_radius: float = option(
        2.0, "standard deviation of the blur, in pixels of the training picture", stages="pairs cache", ge=0, le=100
    )
    blur_type: Literal["gaussian", "box", "both", "none"] = option(
        "gaussian", "shape of the blur; `both`: box, then gaussian, each of 0.7 × radius", stages="pairs cache"
    )
    add_noise: bool = option(True, "add gaussian noise after the blur", stages="pairs cache")
    noise_level: float = option(
        0.02, "standard deviation of the noise on a scale of 0 to 1", stages="pairs cache", ge=0, le=1
    )
    jpeg_quality: Quality | None = option(None, "last, a JPEG round trip of this quality", stages="pairs cache")
    downscale_factor: float | None = option(
        None, "first, scale down by this factor and up again, bilinear", stages="pairs cache", ge=1, le=64
    )


class JpegArtifacts(RecipeOptions):
    """Compress as JPEG, once or several times."""

    type: Literal["jpeg_artifacts"] = option("jpeg_artifacts", "which degradation", stages="pairs cache")
    quality_mode: Literal["fixed", "range", "random"] = option(
        "fixed",
        "where a round's quality comes from: `quality`, `quality_range` or `quality_list`",
        stages="pairs cache",
    )
    quality: Quality = option(25, "JPEG quality under `fixed`", stages="pairs cache")
    quality_range: Annotated[tuple[Quality, Quality], AfterValidator(_rising)] = option(
        (10, 50), "ends of the draw under `range`, both included", stages="pairs cache"
    )
    quality_list: Annotated[tuple[Quality, ...], Field(min_length=1)] = option(
        (10, 20, 30, 40), "choices of the draw under `random`", stages="pairs cache"
    )
    compression_rounds: int = option(1, "how often the picture is compressed", stages="pairs cache", ge=1, le=50)
    round_quality_decay: float = option(
        0.9, "round i compresses at quality × decay^i", stages="pairs cache", gt=0, le=1
    )
    subsampling: Literal["4:4:4", "4:2:2", "4:2:0"] | None = option(
        None, "chroma subsampling; null is the encoder's own, 4:2:0", stages="pairs cache"
    )
    pre_blur: bool = option(False, "blur before the first round", stages="pairs cache")
    pre_blur_radius: float = option(
        0.5, "standard deviation of that blur, in pixels", stages="pairs cache", ge=0, le=100
    )
    add_noise: bool = option(False, "add gaussian noise before the first round", stages="pairs cache")
    noise_level: float = option(0.01, "its standard deviation, 0 to 1", stages="pairs cache", ge=0, le=1)
    enhance_blocks: bool = option(
        False, "after the last round, add noise along the edges of the 8×8 blocks", stages="pairs cache"
    )
    block_noise_level: float = option(0.02, "its standard deviation, 0 to 1", stages="pairs cache", ge=0, le=1)
    optimize: bool = option(False, "smaller files", stages="", no_effect="pixels are the same with and without")
    progressive: bool = option(
        False,
        "progressive files",
        stages="",
        no_effect="pixels are the same with and without",
    )


def _some(steps: tuple[AnyStep, ...] | None) -> tuple[AnyStep, ...] | None:
    if steps == ():
        raise ValueError("must not be empty")
    return steps


class Chain(RecipeOptions):
    """Do steps one after the other; their parameters are numbers, or ranges from which each picture draws."""

    type: Literal["chain"] = option("chain", "which degradation", stages="pairs cache")
    steps: Annotated[tuple[Step, ...] | None, AfterValidator(_some)] = option(
        None, "the steps, in order, each an object with its `step` and its parameters", stages="pairs cache"
    )
    preset: PresetName | None = option(None, "instead of `steps`, a chain that has a name", stages="pairs cache")
    random_order: bool = option(False, "each picture draws the order of the steps", stages="pairs cache")

    @model_validator(mode="after")
    def _one_of_both(self) -> "Chain":
        if (self.steps is None) == (self.preset is None):
            raise ValueError("give either `steps` or a `preset`")
        return self

    @property
    def all_steps(self) -> tuple[AnyStep, ...]:
        """Return the steps, a preset's own if it has a name."""
        if self.preset is not None:
            return _preset_steps(self.preset)
        assert self.steps is not None, "a chain has steps or a preset"
        return self.steps


@cache
def _preset_steps(name: str) -> tuple[AnyStep, ...]:
    steps: tuple[AnyStep, ...] = TypeAdapter(tuple[Step, ...]).validate_python(PRESETS[name])
    return steps


Recipe: TypeAlias = Superresolution | JpegArtifacts | Chain

RECIPES: Mapping[str, type[Superresolution] | type[JpegArtifacts] | type[Chain]] = {
    "superresolution": Superresolution,
    "jpeg_artifacts": JpegArtifacts,
    "chain": Chain,
}
RECIPE_ALIASES = {
    "super_resolution": "superresolution",
    "lowres": "superresolution",
    "jpeg": "jpeg_artifacts",
    "compression": "jpeg_artifacts",
}


def recipe_text(recipe: Recipe) -> str:
    """Spell a recipe as the canonical JSON that rows carry and keys hash.

    What has no effect is left out. Of a preset's steps only their hash is told, which is shorter by kilobytes a row:
    keys follow when the preset changes, and rows have the steps as they were realised.
    """
    values = recipe.acting("pairs")
    if isinstance(recipe, Chain) and recipe.preset is not None:
        values["steps"] = digest([step.acting("pairs") for step in recipe.all_steps])[:_HASH_DIGITS]
    unsaid = {"degrade_at": "target", "preset": None}
    return canonical({name: value for name, value in values.items() if name not in unsaid or value != unsaid[name]})


def does_nothing(recipe: Recipe) -> bool:
    """Tell a recipe under which no picture is changed."""
    if isinstance(recipe, Superresolution):
        blurs = recipe.blur_type != "none" and recipe.blur_radius > 0
        scales = recipe.downscale_factor is not None and recipe.downscale_factor > 1
        noisy = recipe.add_noise and recipe.noise_level > 0
        return not (blurs or scales or noisy or recipe.jpeg_quality is not None)
    return isinstance(recipe, Chain) and not any(map(_may_act, recipe.all_steps))


def _may_act(step: AnyStep) -> bool:
    """Tell a step that some picture may get."""
    if step.probability == 0:
        return False
    if isinstance(step, Shuffle | OneOf | Sequence) or (isinstance(step, Resize) and step.factor in (1, (1, 1))):
        return any(map(_may_act, step.steps))
    return True


@cache
def degraded_at_source(text: str) -> bool:
    """Tell a recipe, as a row spells it, that acts on the full-size picture."""
    return bool(json.loads(text).get("degrade_at") == "source")
