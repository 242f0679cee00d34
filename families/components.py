"""Parts that families of diffusers have in common: VAEs, schedulers, and pixels as VAEs take and give them."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ModelMixin
from torch import Tensor

from families.offloading import Groups, offload
from families.runtime import check_whole, sent
from schemas.errors import UserError

CPU = torch.device("cpu")
_MOVERS = 8  # threads; each holds a tensor in locked memory


def load_whole(
    kind: type[ModelMixin], checkpoint: Path, part: str, dtype: torch.dtype, device: torch.device = CPU
) -> ModelMixin:
    """Load a part of a checkpoint; raises UserError if its weights are not what its config.json tells.

    On the CPU weights of that dtype stay in their files until they are used.
    """
    try:
        model, told = kind.from_pretrained(
            checkpoint, subfolder=part, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    except ValueError as fault:
        raise UserError(f"{checkpoint / part}: config.json and weights do not fit: {fault}") from fault
    check_whole(checkpoint / part, model, told["missing_keys"])
    if device.type != "cpu":
        _move(model, device)
    return model


def _move(model: ModelMixin, device: torch.device) -> None:
    """Move a model to an accelerator; threads read its files meanwhile, which one alone does slower than it copies."""

    def move(tensor: Tensor) -> None:
        with torch.accelerator.device_index(device.index):
            tensor.data = sent(tensor.data, device)

    with ThreadPoolExecutor(_MOVERS, thread_name_prefix="mover") as pool:
        for _ in pool.map(move, (*model.parameters(), *model.buffers())):
            pass


def load_vae(kind: type[ModelMixin], checkpoint: Path, dtype: torch.dtype, *, tiling: bool, slicing: bool) -> Any:
    """Load a VAE on the CPU; raises UserError if its weights are not those that its config.json tells of."""
    vae: Any = load_whole(kind, checkpoint, "vae", dtype)
    if tiling:
        vae.enable_tiling()
    if slicing:
        vae.enable_slicing()
    return vae.eval().requires_grad_(False)


def place_vae(vae: Any, device: torch.device, groups: Groups | None) -> Any:
    """Move a VAE to where it runs; with `groups`, what encodes waits on the CPU block by block."""
    if groups is None:
        return vae.to(device)
    offload(vae, [*vae.encoder.down_blocks, vae.encoder.mid_block], device, groups)
    return vae


def values_of(pixels: Tensor) -> Tensor:
    """Turn uint8 pixels, batch × height × width × 3, into values from -1 to 1, batch × 3 × height × width."""
    return 2.0 * (pixels.permute(0, 3, 1, 2).to(torch.float32) / 255.0) - 1.0


def pixels_of(values: Tensor) -> Tensor:
    """Undo `values_of`, what is beyond white and black cut off."""
    shares = (values.to(torch.float32) / 2 + 0.5).clamp(0, 1)
    return (shares * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


def load_scheduler(checkpoint: Path) -> FlowMatchEulerDiscreteScheduler:
    """Load the scheduler that pictures are sampled by; raises UserError if it is missing or damaged."""
    try:
        return FlowMatchEulerDiscreteScheduler.from_pretrained(checkpoint, subfolder="scheduler")
    except (OSError, ValueError) as fault:
        raise UserError(
            f"{checkpoint / 'scheduler'}: missing or damaged, and pictures are sampled by it; fetch the checkpoint "
            "again, or set validation_disable"
        ) from fault
