"""Projections q, k and v as one product, and the adapters of such layers by the names of the three.

A network whose attention fuses other layers needs a line in `FUSED`.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from schemas.errors import UserError

# Layer as diffusers' attention fuses it -> the layers it stands for, in the order of its output's rows.
FUSED = {"to_qkv": ("to_q", "to_k", "to_v"), "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj")}
_LAYER = re.compile(rf"(.+)\.({'|'.join(FUSED)})\.(lora_A|lora_B)\.weight")


def fuse(denoiser: nn.Module) -> None:
    """Fuse the projections and delete the single ones; before weights are frozen and quantised."""
    denoiser.fuse_qkv_projections()  # type: ignore[operator]
    for module in denoiser.modules():
        if getattr(module, "fused_projections", False):
            for name in [part for fused, parts in FUSED.items() if hasattr(module, fused) for part in parts]:
                delattr(module, name)


def apart(denoiser: nn.Module, layers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give LoRA of fused layers the names of the layers they stand for: the same A for each, its own rows of B."""
    single: dict[str, Tensor] = {}
    for name, tensor in layers.items():
        if (split := _split(denoiser, name)) is None:
            single[name] = tensor
            continue
        pieces = tensor.chunk(len(split), dim=0) if ".lora_B." in name else [tensor] * len(split)
        single |= {part: piece.clone() for part, piece in zip(split, pieces, strict=True)}
    return single


def together(denoiser: nn.Module, own: Mapping[str, Tensor], layers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo `apart` for a network's `own` layers; raises UserError unless the parts of each share their A."""
    fused: dict[str, Tensor] = {}
    for name in own:
        split = _split(denoiser, name)
        pieces = [layers[part] for part in split or (name,)]
        if ".lora_B." in name:
            fused[name] = torch.cat(pieces)
        elif all(torch.equal(piece, pieces[0]) for piece in pieces):
            fused[name] = pieces[0]
        else:
            raise UserError(
                f"{(split or (name,))[0]} and its neighbours were trained apart, each with a down-projection of its "
                "own; with fuse_qkv_projections they would have to be one: leave that out"
            )
    return fused


def _split(denoiser: nn.Module, name: str) -> list[str] | None:
    """Return the names that a fused layer's tensor has when they are apart, None for any other tensor."""
    match = _LAYER.fullmatch(name)
    if match is None or not getattr(denoiser.get_submodule(match[1]), "fused_projections", False):
        return None
    return [f"{match[1]}.{part}.{match[3]}.weight" for part in FUSED[match[2]]]
