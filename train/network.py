"""The network that is trained: frozen, quantised, adapted, then made fast and small. Every way to do so is chosen here.

Each is a module of its own that knows nothing of the others; without any, what is left is the plain network.
"""

from dataclasses import dataclass

import torch
from torch import nn

from families.activations import use_sigmoid
from families.attention import choose_attention
from families.quantize import quantize_and_place
from families.rotary import fuse_rotary
from families.runtime import family_of
from schemas.project import Project
from schemas.trainer import TrainerConfig
from train.adapter import add_adapter
from train.compiling import compile_blocks
from train.fusing import fuse
from train.lora import make_lean
from train.memory import checkpoint_blocks, keep_inputs_away, offload_blocks
from train.step import in_half

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Network:
    """A denoiser ready to train, and what of it is trained."""

    denoiser: nn.Module
    parameters: list[nn.Parameter]


def loaded_to(config: TrainerConfig, device: torch.device) -> torch.device:
    """Say where weights are to be loaded: straight to the accelerator, unless they get smaller or wait on the way."""
    return CPU if config.base_model_precision != "no_change" or config.enable_group_offload else device


def make_network(project: Project, denoiser: nn.Module, device: torch.device) -> Network:
    """Freeze, quantise, then adapt: in this order, or the adapter would be quantised as well; then make it fast."""
    config, family = project.trainer, family_of(project)
    if config.fuse_qkv_projections:
        fuse(denoiser)
    denoiser.requires_grad_(False)
    place = CPU if config.enable_group_offload else device  # there blocks wait until their turn
    spared, finer = project.family.unquantised, project.family.conditioning
    denoiser = quantize_and_place(denoiser, config.base_model_precision, spared, place, config.quantize_via, finer)
    choose_attention(denoiser, device, half=in_half(config))
    fuse_rotary(family, denoiser, device, half=in_half(config))
    parameters = add_adapter(denoiser, project)
    make_lean(denoiser, join=not config.enable_group_offload)
    if config.gradient_checkpointing:
        checkpoint_blocks(family, denoiser, config)
    if config.dynamo_backend != "no":
        use_sigmoid(denoiser)
        compile_blocks(family, denoiser, project.compiled, config.dynamo_backend, config.dynamo_mode)
    if config.gradient_checkpointing and config.gradient_checkpointing_backend == "unsloth":
        keep_inputs_away(family, denoiser, device)
    if config.enable_group_offload:
        offload_blocks(family, denoiser, device, config)
    return Network(denoiser.train(), parameters)
