"""LoRA on a frozen network: add, collect, load. The adapters are peft's."""

from typing import Any

import torch
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from schemas.errors import UserError
from schemas.keys import seed_of
from schemas.project import Project


def add_lora(denoiser: nn.Module, project: Project) -> list[nn.Parameter]:
    """Wrap the preset's layers and return the trainable parameters, float32; raises UserError if none matches.

    Initial weights depend on the training seed alone.
    """
    trainer = project.trainer
    preset = trainer.flux_lora_target or project.family.default_lora_target
    pattern = project.family.lora_targets[preset]
    config = LoraConfig(
        r=trainer.lora_rank,
        lora_alpha=trainer.strength,
        lora_dropout=trainer.lora_dropout,
        target_modules=pattern,
        init_lora_weights="gaussian",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed_of(trainer.seed, "lora"))
        try:
            denoiser.add_adapter(config)  # type: ignore[operator]
        except ValueError as fault:
            raise UserError(f"flux_lora_target {preset!r} wraps no layer of this model: {fault}") from fault
    parameters = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    return parameters


def lora_layers(denoiser: nn.Module) -> dict[str, Tensor]:
    """Return the adapter's weights by peft's names."""
    layers: dict[str, Tensor] = get_peft_model_state_dict(denoiser)
    return layers


def lora_metadata(denoiser: nn.Module) -> dict[str, Any]:
    """Return the adapter's configuration, alpha included, as diffusers reads it from a file."""
    metadata: dict[str, Any] = _collate_lora_metadata({"transformer": denoiser})["transformer_lora_adapter_metadata"]
    return metadata


def load_lora(denoiser: nn.Module, layers: dict[str, Tensor]) -> None:
    """Put weights back into the adapter; raises UserError if they are of another rank or preset."""
    own = lora_layers(denoiser)
    if own.keys() != layers.keys() or any(own[name].shape != layers[name].shape for name in own):
        raise UserError("the checkpoint's LoRA has another rank or other layers than this configuration")
    set_peft_model_state_dict(denoiser, layers)
