"""From a recipe to steps in which every number is drawn: a function of recipe and seed, never of the picture.

Every draw is a hash of the seed, the step (its name, and how many of that name came before), and the parameter's name:
another step in between, or another parameter, changes no other draw.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

from prep.degrade.draws import chance
from schemas.drawn import Drawn, Range
from schemas.keys import seed_of
from schemas.recipes import Chain, JpegArtifacts, Recipe, Superresolution
from schemas.steps import USED_BY, AnyStep, OneOf, Sequence, Shuffle

Step: TypeAlias = dict[str, Any]  # `step`, and the keywords of its function; JSON values

_DIGITS = 9  # that count, of a drawn number: JSON gives back the very same


def realise(recipe: Recipe, seed: int) -> list[Step]:
    """Return the steps of one picture, with every number drawn; those that it does not get are left out."""
    return _RECIPES[recipe.type](recipe, seed)


def _chain(recipe: Chain, seed: int) -> list[Step]:
    return _in_order(recipe.all_steps, seed, shuffled=recipe.random_order)


def _superresolution(recipe: Superresolution, _: int) -> list[Step]:
    steps: list[Step] = []
    if recipe.downscale_factor is not None and recipe.downscale_factor > 1:
        share = _rounded(1 / recipe.downscale_factor)
        steps.append({"step": "resize", "factor": share, "kernel": "bilinear", "kernel_back": "bilinear", "steps": []})
    radius = recipe.blur_radius * (0.7 if recipe.blur_type == "both" else 1)
    if recipe.blur_type in ("box", "both"):
        steps.append({"step": "blur", "kernel": "box", "radius": _rounded(radius)})
    if recipe.blur_type in ("gaussian", "both"):
        steps.append(_gaussian_blur(radius))
    if recipe.add_noise:
        steps.append(_gaussian_noise(recipe.noise_level))
    if recipe.jpeg_quality is not None:
        steps.append({"step": "jpeg", "quality": recipe.jpeg_quality, "subsampling": "4:2:0"})
    return [step for step in steps if step.get("sigma") != 0 and step.get("radius") != 0]


def _jpeg_artifacts(recipe: JpegArtifacts, seed: int) -> list[Step]:
    steps: list[Step] = []
    if recipe.pre_blur and recipe.pre_blur_radius > 0:
        steps.append(_gaussian_blur(recipe.pre_blur_radius))
    if recipe.add_noise and recipe.noise_level > 0:
        steps.append(_gaussian_noise(recipe.noise_level))
    for number in range(recipe.compression_rounds):
        quality = _quality(recipe, seed_of(seed, "jpeg", number, "quality"))
        if number > 0:
            quality = min(95, max(1, int(quality * recipe.round_quality_decay**number)))
        steps.append({"step": "jpeg", "quality": quality, "subsampling": recipe.subsampling or "4:2:0"})
    if recipe.enhance_blocks and recipe.block_noise_level > 0:
        steps.append({"step": "block_noise", "sigma": _rounded(recipe.block_noise_level * 255)})
    return steps


def _gaussian_blur(sigma: float) -> Step:
    return {"step": "blur", "kernel": "gaussian", "sigma": _rounded(sigma)}


def _gaussian_noise(level: float) -> Step:
    return {"step": "noise", "kind": "gaussian", "sigma": _rounded(level * 255), "gray": False}


def _quality(recipe: JpegArtifacts, seed: int) -> int:
    if recipe.quality_mode == "range":
        low, high = recipe.quality_range
        return low + int(chance(seed) * (high - low + 1))
    if recipe.quality_mode == "random":
        return recipe.quality_list[int(chance(seed) * len(recipe.quality_list))]
    return recipe.quality


def _in_order(steps: Iterable[AnyStep], seed: int, *, shuffled: bool) -> list[Step]:
    """Realise steps with seeds of their own, in their order or in one that is drawn."""
    before: Counter[str] = Counter()
    seeded: list[tuple[AnyStep, int]] = []
    for step in steps:
        seeded.append((step, seed_of(seed, step.step, before[step.step])))
        before[step.step] += 1
    if shuffled:
        seeded.sort(key=lambda pair: chance(pair[1], "order"))
    return [one for step, own in seeded for one in _realised(step, own)]


def _realised(step: AnyStep, seed: int) -> list[Step]:
    if chance(seed, "probability") >= step.probability:
        return []
    if isinstance(step, OneOf):
        return _in_order([step.steps[_chosen(step, seed)]], seed, shuffled=False)
    if isinstance(step, Shuffle | Sequence):
        return _in_order(step.steps, seed, shuffled=isinstance(step, Shuffle))
    drawn = _parameters(step, seed)
    if step.step == "resize":
        inside = _in_order(step.steps, seed, shuffled=False)
        return [drawn | {"steps": inside}] if drawn["factor"] != 1 else inside
    return [drawn]


def _chosen(step: OneOf, seed: int) -> int:
    weights = step.weights or (1.0,) * len(step.steps)
    left = chance(seed, "choice") * sum(weights)
    for number, weight in enumerate(weights):
        if left < weight:
            return number
        left -= weight
    return max(number for number, weight in enumerate(weights) if weight)  # the sum was rounded


def _parameters(step: AnyStep, seed: int) -> Step:
    """Draw every parameter that the step, with the words drawn, uses."""
    drawn: Step = {"step": step.step}
    fields = type(step).model_fields
    names = [name for name in fields if name not in ("step", "probability", "steps")]
    if step.step in USED_BY:
        field, uses = USED_BY[step.step]
        drawn[field] = _word(getattr(step, field), seed_of(seed, field))
        names = [name for name in names if name in uses[drawn[field]]]
    for name in names:
        value, own = getattr(step, name), seed_of(seed, name)
        kind = next((one for one in fields[name].metadata if isinstance(one, Drawn)), None)
        if name == "gray_probability":
            drawn["gray"] = chance(own) < value
        elif kind is None:
            drawn[name] = _word(value, own)
        elif value is not None:
            drawn[name] = _number(kind, value, own)
    return drawn


def _word(words: tuple[str, ...], seed: int) -> str:
    return words[int(chance(seed) * len(words))]


def _number(kind: Drawn, value: Range, seed: int) -> float:
    if not isinstance(value, tuple):
        return value
    low, high = value
    share = chance(seed)
    if kind.odd:
        return int(low) + 2 * int(share * ((high - low) // 2 + 1))
    if kind.whole:
        return int(low) + int(share * (high - low + 1))
    drawn = low * math.exp(share * math.log(high / low)) if kind.log else low + share * (high - low)
    return min(high, max(low, _rounded(drawn)))


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


_RECIPES: Mapping[str, Callable[[Any, int], list[Step]]] = {
    "superresolution": _superresolution,
    "jpeg_artifacts": _jpeg_artifacts,
    "chain": _chain,
}
