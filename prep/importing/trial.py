"""A sample of what was found is encoded again here, with the project's own encoders, and compared.

`LatentTrial.judge` and `TextTrial.judge` tell how far off another trainer's numbers are, and `compared` what they are.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from families.runtime import default_device, dtype_of, family_of, placement
from prep.importing.found import FoundText, Wanted
from prep.importing.storing import EncodedPrompt
from prep.pixels import Refusal, pixels_of
from schemas.project import Project
from schemas.shards import Array

# Relative root mean square error that counts as equal, by the dtype that the encoder computes in: what rounding
# explains, as docs/import.md measures it. Text encoders compute in bfloat16.
LATENT_TOLERANCE = {"fp32": 2**-7, "bf16": 2**-5}
TEXT_TOLERANCE = 2**-6

_ROUNDING = 2**-9  # of a bfloat16, relative, as a standard deviation: more than it is
_DRAWN = (0.9, 1.1)  # root mean square of draws, in standard deviations: latents have thousands of values

Kind = Literal["mode", "draw", "other"]


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a found latent or embed is, next to what the encoder gives now."""

    kind: Kind  # of a latent: the mode of the posterior, a draw from it, or neither
    error: float  # relative, root mean square


def compared(found: Tensor, mode: Tensor, deviation: Tensor | None, tolerance: float) -> Judgement:
    """Compare found values with the mode and, beyond the tolerance, with the spread of the posterior."""
    found, mode = found.to("cpu", torch.float64), mode.to("cpu", torch.float64)
    error = float((found - mode).norm() / mode.norm())
    if error <= tolerance:
        return Judgement("mode", error)
    if deviation is None:
        return Judgement("other", error)
    spread = (deviation.to("cpu", torch.float64).square() + (mode * _ROUNDING).square()).sqrt()
    scores = (found - mode) / spread
    drawn = _DRAWN[0] < float(scores.square().mean().sqrt()) < _DRAWN[1] and abs(float(scores.mean())) < 0.1
    return Judgement("draw" if drawn else "other", error)


class LatentTrial:
    """The image encoder of a project, for comparisons."""

    def __init__(self, project: Project, checkpoint: Path) -> None:
        self._family = family_of(project)
        dtype = dtype_of(project.trainer.vae_dtype)
        self.tolerance = LATENT_TOLERANCE[project.trainer.vae_dtype]
        trainer = project.trainer
        self._encoder = self._family.load_image_encoder(
            checkpoint, dtype, default_device(), tiling=trainer.vae_enable_tiling, slicing=trainer.vae_enable_slicing
        )

    def judge(self, wanted: Wanted, values: Tensor) -> Judgement | str:
        """Compare a found latent with that of its image; a text says why there are no pixels."""
        pixels = pixels_of(wanted.picture)
        if isinstance(pixels, Refusal):
            return f"not encodable here: {pixels.reason}"
        posterior = self._family.encode_images(self._encoder, torch.from_numpy(pixels.copy())[None])
        return compared(values, posterior.mean[0], posterior.std[0], self.tolerance)


class TextTrial:
    """The text encoders of a project, for comparisons and for counting tokens."""

    def __init__(self, project: Project, checkpoint: Path) -> None:
        self._family, self._settings = family_of(project), project.text_settings
        self._tokenizer = self._family.load_tokenizer(checkpoint)
        how = placement(project, default_device())
        self._encoders = self._family.load_text_encoders(checkpoint, torch.bfloat16, how, self._settings)

    def judge(self, prompt: str, found: FoundText) -> Judgement | str:
        """Compare a found embed with that of its prompt; a text says how their shapes differ."""
        embeds = self._family.encode_prompts(self._encoders, [prompt], self._settings)
        pairs = [(found.embed, embeds.embed[0])]
        if (embeds.pooled is None) != (found.pooled is None):
            return "another shape: a pooled embed on one side alone"
        if embeds.pooled is not None and found.pooled is not None:
            pairs.append((found.pooled, embeds.pooled[0]))
        for theirs, ours in pairs:
            if theirs.shape != ours.shape:
                return f"another shape: {tuple(theirs.shape)}, here {tuple(ours.shape)}"
        judged = [compared(theirs, ours, None, TEXT_TOLERANCE) for theirs, ours in pairs]
        return max(judged, key=lambda one: one.error)

    def encoded(self, prompt: str, found: FoundText, length: int) -> EncodedPrompt:
        """Make of a found embed what the store holds."""
        [tokens] = self._family.count_tokens(self._tokenizer, [prompt], self._settings)
        pooled = None if found.pooled is None else bits(found.pooled)
        return EncodedPrompt(prompt, bits(found.embed), pooled, min(tokens, length))


def bits(values: Tensor) -> Array:
    """Return a tensor's bfloat16 bit patterns."""
    patterns: Array = values.to("cpu", torch.bfloat16).contiguous().view(torch.uint16).numpy()
    return patterns
