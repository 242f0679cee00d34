"""Files of LoRA and LoKr weights, put on a denoiser."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from torch import Tensor, nn

from families.runtime import library_silenced
from schemas.console import log
from schemas.errors import UserError

_TOLD = 300  # most characters of a library's message


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """What a family's pipeline reads of a file, whatever layout it has."""

    weights: dict[str, Tensor]  # by names of diffusers
    alphas: Mapping[str, float] | None
    metadata: Mapping[str, Any] | None


def put_adapter(denoiser: nn.Module, file: Path, strength: float, read: Callable[[], AdapterFile]) -> int:
    """Load what `read` reads of a file into the denoiser itself, and return the number of layers it changes.

    That takes LoKr where a pipeline takes it for no LoRA, and quantised layers, whose shapes a pipeline asks for.
    Raises UserError if the file cannot be read or does not fit.
    """
    try:
        with library_silenced():
            found = read()
            denoiser.load_lora_adapter(  # type: ignore[operator]
                found.weights, network_alphas=found.alphas, metadata=found.metadata, prefix="transformer"
            )
    except (OSError, SafetensorError) as fault:
        raise UserError(f"{file}: cannot be read: {fault}; give a file of safetensors that is whole") from fault
    except (ValueError, RuntimeError, LookupError, TypeError, AssertionError) as fault:
        told = " ".join(str(fault).split())[:_TOLD]
        raise UserError(f"{file}: does not fit this model ({told}); is it the LoRA of another one?") from fault
    layers = sum(isinstance(module, BaseTunerLayer) for module in denoiser.modules())
    named = len({name.rpartition(".lo")[0] for name in found.weights})
    if not named:
        raise UserError(f"{file}: no layers of a LoRA or LoKr by names that diffusers reads; is it in another layout?")
    if not layers:
        raise UserError(f"{file}: none of its {named} layers is one of this model; is it the LoRA of another one?")
    if layers < named:
        log.warning("%s: %d of its %d layers are none of this model; they are left out", file, named - layers, named)
    names = list(denoiser.peft_config)  # type: ignore[arg-type]
    denoiser.set_adapters(names, [strength] * len(names))  # type: ignore[operator]
    return layers
