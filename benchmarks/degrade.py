"""Measure every step of a degradation, the guide's two recipes and the presets: milliseconds at 1.0 and 3.4 megapixels.

Run `python benchmarks/degrade.py`; one thread, its processor time (what others do on the machine counts little), least
of several; the picture is a demo photograph enlarged.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from prep.degrade import STEPS, apply, decode_stored, encode, realise
from prep.images import Pixels
from schemas.presets import PRESETS
from schemas.recipes import Chain, JpegArtifacts, Recipe, Superresolution
from schemas.steps import USED_BY

SIZES = ((1024, 1024), (2048, 1664))
PHOTO = sorted((Path(__file__).parent.parent / "datasets_demo" / "photos").glob("*.jpg"))[0]
GUIDES: dict[str, Recipe] = {
    "superresolution, blur 3, noise 0.02": Superresolution(blur_radius=3.0),
    "jpeg_artifacts, 2 rounds of 10-30": JpegArtifacts(
        quality_mode="range", quality_range=(10, 30), compression_rounds=2
    ),
}


def least_ms(work: Callable[[], object], times: int) -> float:
    """Return the least processor time of several runs."""
    taken = []
    for _ in range(times):
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return min(taken) * 1000


def picture(width: int, height: int) -> Pixels:
    """Enlarge a photograph."""
    enlarged = cv2.resize(cv2.imread(str(PHOTO)), (width, height), interpolation=cv2.INTER_CUBIC)
    return np.ascontiguousarray(cv2.cvtColor(enlarged, cv2.COLOR_BGR2RGB))


def whole(name: str, recipe: Recipe, times: int) -> None:
    """Print what degrading, storing and reading back take."""
    cells = []
    for size in SIZES:
        pixels, steps = picture(*size), realise(recipe, 1)
        data, suffix = encode(pixels, steps, 1)
        cells.append(f"{least_ms(lambda p=pixels, s=steps: apply(p, s, 1), times):.1f}")
        cells.append(f"{least_ms(lambda p=pixels, s=steps: encode(p, s, 1), times):.1f}")
        cells.append(f"{least_ms(lambda d=data: decode_stored(d), times):.1f}")
        cells.append(f"{len(data) / 1e6:.2f} {suffix}")
    print(f"| {name} | {' | '.join(cells)} |")


def step(name: str, word: str, times: int) -> None:
    """Print what one step takes, with the parameters that it has by default."""
    options = {"step": name, **({USED_BY[name][0]: word} if word else {})}
    steps = realise(Chain(steps=[options]), 1)
    pictures = [picture(*size) for size in SIZES]
    cells = [f"{least_ms(lambda p=pixels: apply(p, steps, 1), times):.1f}" for pixels in pictures]
    said = ", ".join(f"{key} {value:.3g}" for key, value in steps[0].items() if isinstance(value, float | int))
    print(f"| {name} {word} | {said} | {' | '.join(cells)} |")


def preset(name: str, seeds: int) -> None:
    """Print the mean over seeds, with drawing the numbers apart."""
    recipe, pixels = Chain(preset=name), picture(*SIZES[0])
    drawn = [realise(recipe, seed) for seed in range(seeds)]
    start = time.process_time()
    for seed in range(seeds):
        realise(recipe, seed)
    drawing = (time.process_time() - start) / seeds * 1000
    mean = np.mean([least_ms(lambda s=steps, i=i: apply(pixels, s, i), 1) for i, steps in enumerate(drawn)])
    print(f"| {name} | {mean:.0f} | {drawing:.2f} |")


if __name__ == "__main__":
    cv2.setNumThreads(1)
    for label, chosen in GUIDES.items():
        whole(label, chosen, 15)
    for one in STEPS:
        for kind in USED_BY[one][1] if one in USED_BY else [""]:
            step(one, kind, 7)
    for one in PRESETS:
        preset(one, 40)
