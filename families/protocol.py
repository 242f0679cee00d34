"""What a model family must offer: the functions of a module, checked by mypy against `Family`.

prep calls the encoders, train the denoiser; neither asks which family it has.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from families.offloading import Groups


@dataclass(frozen=True, slots=True)
class TextEmbeds:
    """Prompts as the denoiser reads them."""

    embed: Tensor  # batch × tokens × width
    pooled: Tensor | None  # batch × width
    num_tokens: tuple[int, ...]  # of each prompt before padding and before the cut: more than rows if it was cut


@dataclass(frozen=True, slots=True)
class Posterior:
    """What an image encoder says of a batch of images: normalised, batch × C × H × W, in the dtype it computes in."""

    mean: Tensor
    std: Tensor


@dataclass(frozen=True, slots=True)
class Placement:
    """Where text encoders run, and in how many bits."""

    device: torch.device
    precisions: Mapping[str, str] = field(default_factory=dict)  # component -> quantisation
    quantize_via: str = "cpu"  # or accelerator
    turns: bool = False  # encoders take turns on the accelerator
    groups: Groups | None = None  # their layers wait on the CPU instead


@dataclass(frozen=True, slots=True)
class Block:
    """One block of a denoiser: where its tokens come in and go out.

    Of image tokens the target's come first, then the references' in their order.
    """

    module: nn.Module
    images: str  # argument of its forward with image tokens, batch × tokens × width
    rotary: str  # argument with rotary embeddings (cos, sin), one row a token of text, then of images
    joined: bool  # whether text tokens stand before the image tokens in the same tensor, coming in and going out
    output: int | None  # place of that tensor in what it returns; None if it returns no tuple


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a picture is sampled."""

    width: int  # pixels, a multiple of the family's smallest alignment
    height: int
    steps: int  # of denoising
    guidance: float  # that the model is told, if it takes one
    guidance_real: float  # true classifier-free guidance, away from the negative prompt; 1 is none
    seed: int  # of the noise, drawn on the CPU


class Family(Protocol):
    """A module of this package. `checkpoint` is a folder in the Hub layout throughout."""

    def build_tiny(self, folder: Path, flavour: str) -> None:
        """Write a small random checkpoint, the same on every machine."""

    def load_image_encoder(
        self,
        checkpoint: Path,
        dtype: torch.dtype,
        device: torch.device,
        *,
        tiling: bool,
        slicing: bool,
        groups: Groups | None = None,
    ) -> Any:
        """Load the encoder that `encode_images` and `decode_latents` take.

        `tiling` encodes large pictures in tiles, `slicing` the pictures of a batch one after the other; with `groups`
        its blocks wait on the CPU.
        """

    def encode_images(self, encoder: Any, pixels: Tensor) -> Posterior:
        """Encode uint8 pixels, batch × height × width × 3."""

    def decode_latents(self, encoder: Any, latents: Tensor) -> Tensor:
        """Decode normalised latents to uint8 pixels, batch × height × width × 3."""

    def load_text_encoders(
        self, checkpoint: Path, dtype: torch.dtype, how: Placement, settings: Mapping[str, Any]
    ) -> Any:
        """Load the encoders that `encode_prompts` takes, no more of them than it needs."""

    def encode_prompts(self, encoders: Any, prompts: Sequence[str], settings: Mapping[str, Any]) -> TextEmbeds:
        """Encode prompts exactly as the family's pipeline does; `settings` are the project's `text_settings`."""

    def load_tokenizer(self, checkpoint: Path) -> Any:
        """Load what `count_tokens` takes."""

    def count_tokens(self, tokenizer: Any, prompts: Sequence[str], settings: Mapping[str, Any]) -> tuple[int, ...]:
        """Count the tokens of prompts before padding and before the cut."""

    def denoiser_config(self, flavour: str, *, tiny: bool) -> Mapping[str, Any]:
        """Return the configuration of a flavour's network as published, or of its tiny checkpoint."""

    def build_denoiser(self, config: Mapping[str, Any]) -> nn.Module:
        """Make a network of a configuration, on the default device, its weights not loaded."""

    def load_denoiser(self, checkpoint: Path, dtype: torch.dtype, device: torch.device = ...) -> nn.Module:
        """Load the network that training adapts; on the CPU, where not told else: `quantize_and_place` moves it."""

    def blocks(self, denoiser: nn.Module) -> Sequence[Block]:
        """Return the network's blocks in the order they run in."""

    def rotary_processors(self, denoiser: nn.Module) -> Sequence[tuple[nn.Module, Any]]:
        """Return attentions, and for each a processor as its own that calls `families.rotary.turned`."""

    def takes_guidance(self, denoiser: nn.Module) -> bool:
        """Tell whether the network is told a guidance scale."""

    def num_tokens(self, latent_shape: Sequence[int]) -> int:
        """Count the tokens of one latent, C × H × W."""

    def velocity(
        self,
        denoiser: nn.Module,
        noisy: Tensor,
        references: Sequence[Tensor],
        text: TextEmbeds,
        sigma: Tensor,
        guidance: Tensor | None,
    ) -> Tensor:
        """Predict the velocity of noisy latents, batch × C × H × W, at times `sigma`, one per sample, 1 pure noise.

        References are batches of latents in their order; their sizes may differ from the target's.
        """

    def save_lora(self, path: Path, layers: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        """Write an adapter's weights as the family's pipeline loads them, with the adapter's metadata."""

    def load_pipeline(self, checkpoint: Path) -> Any:
        """Load what `sample` needs besides encoders and denoiser; raises UserError if it is not there."""

    def sample(
        self,
        pipeline: Any,
        denoiser: nn.Module,
        text: TextEmbeds,
        negative: TextEmbeds | None,
        references: Sequence[Tensor],
        how: Sampling,
    ) -> Tensor:
        """Sample the normalised latents of one picture, 1 × C × H × W, with the family's own pipeline.

        References are as `velocity` takes them. All is computed on the device of `text`.
        """

    def load_adapter(self, denoiser: nn.Module, file: Path, strength: float) -> int:
        """Put a file of LoRA or LoKr weights, in any layout that the family's pipeline reads, on the denoiser.

        Returns the number of layers it changes; raises UserError if there are none, or it cannot be read.
        """
