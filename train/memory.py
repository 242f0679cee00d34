"""What saves memory: recomputed blocks, blocks that wait on the CPU, and what to change when it runs out.

Another way to save is a line in `_savings`, if it is an option of its own a function beside the others too.
"""

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from families.offloading import offload
from families.protocol import Family
from families.runtime import groups_of
from schemas.console import log
from schemas.errors import UserError
from schemas.trainer import PLAIN_TENSORS, TrainerConfig
from train.waiting import let_wait

_ATEN = torch.ops.aten
_ATTENTION = (  # what `gradient_checkpointing_keep: attention` keeps, whichever kernel runs
    _ATEN._scaled_dot_product_cudnn_attention.default,
    _ATEN._scaled_dot_product_flash_attention.default,
    _ATEN._scaled_dot_product_efficient_attention.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
)
CUDA_GIB = 0.6  # that CUDA takes of a process for itself, besides tensors
_GOES_ON = ", and the run can be resumed with it"


def check_memory(config: TrainerConfig, device: torch.device) -> None:
    """Raise UserError for blocks that are to wait without CUDA, and for a budget that CUDA itself takes."""
    if config.enable_group_offload and device.type != "cuda":
        raise UserError(f"enable_group_offload: needs a CUDA device, and this run is on {device}; turn it off")
    if config.memory_budget_gib is not None and device.type == "cuda":  # elsewhere it has no effect
        room_of(config.memory_budget_gib)


def checkpoint_blocks(family: Family, denoiser: nn.Module, config: TrainerConfig) -> None:
    """Have the activations of every Nth block recomputed in the backward pass, from the first on.

    Outputs of attention are kept if the options say so. Hooks of blocks run once, as recomputation is inside of them;
    but where weights wait on the CPU they run again, to bring the weights.
    """
    recomputed = [block.module for block in family.blocks(denoiser)[:: config.gradient_checkpointing_interval]]
    told: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": config.lora_dropout > 0}
    if config.enable_group_offload:

        def call(module: nn.Module, *args: Any) -> Any:
            return checkpoint(module, *args, **told) if module in recomputed else module(*args)

        denoiser.enable_gradient_checkpointing(gradient_checkpointing_func=call)  # type: ignore[operator]
        return
    if config.gradient_checkpointing_keep == "attention":
        told["context_fn"] = _keep_attention
    elif config.dynamo_backend != "no":  # or compilers would keep what autograd functions return
        told["context_fn"] = _keep_nothing
    for module in recomputed:
        module.forward = partial(checkpoint, module.forward, **told)


# The contexts that recomputation runs in; functions that have a name and a hash, for compilers' caches.


def _keep_attention() -> Any:
    return create_selective_checkpoint_contexts(list(_ATTENTION))  # type: ignore[no-untyped-call]


def _keep_nothing() -> Any:
    return create_selective_checkpoint_contexts([])  # type: ignore[no-untyped-call]


_keep_attention.cache_hash = str(_ATTENTION)  # type: ignore[attr-defined]
_keep_nothing.cache_hash = "nothing"  # type: ignore[attr-defined]


def keep_inputs_away(family: Family, denoiser: nn.Module, device: torch.device) -> None:
    """Have what blocks keep until they are recomputed wait in the CPU's memory; without CUDA it is there already."""
    if device.type != "cuda":
        log.info("gradient_checkpointing_backend: unsloth has no effect: there is no CUDA device")
        return
    weights = [*denoiser.parameters(), *denoiser.buffers()]
    let_wait([block.module for block in family.blocks(denoiser)], weights, device)


def offload_blocks(family: Family, denoiser: nn.Module, device: torch.device, config: TrainerConfig) -> None:
    """Move a denoiser to a CUDA device, but for the frozen weights of its blocks, which come when their turn does.

    To be called when its adapter is there: what is trained stays on the device, with its gradients.
    """
    offload(denoiser, [block.module for block in family.blocks(denoiser)], device, groups_of(config))


def room_of(budget: float) -> float:
    """Return the GiB that a budget leaves for tensors; raises UserError if it leaves none."""
    if budget <= CUDA_GIB:
        raise UserError(f"memory_budget_gib {budget:g}: CUDA itself takes about {CUDA_GIB} GiB; give more")
    return budget - CUDA_GIB


def limit_memory(config: TrainerConfig, device: torch.device) -> None:
    """Keep this process within `memory_budget_gib` of the accelerator's memory.

    What does not fit fails as on a card of that size.
    """
    budget = config.memory_budget_gib
    if budget is None:
        return
    if device.type != "cuda":
        log.info("memory_budget_gib has no effect on %s", device)
        return
    room, total = room_of(budget), torch.cuda.get_device_properties(device).total_memory / 2**30
    if budget > total:
        log.warning("memory_budget_gib %g: there are %.1f GiB, and all of them may be used", budget, total)
        return
    torch.cuda.set_per_process_memory_fraction(room / total, device)
    log.info("memory_budget_gib %g: %.1f of %.1f GiB may hold tensors", budget, room, total)


@contextmanager
def enough_memory(config: TrainerConfig, device: torch.device) -> Iterator[None]:
    """Turn the accelerator's running out of memory into a UserError that says what to change."""
    try:
        yield
    except torch.OutOfMemoryError as fault:
        used = ""
        if device.type == "cuda":
            peak, total = torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
            used = f": {peak / 2**30:.1f} of {total / 2**30:.1f} GiB were in use at most"
        raise UserError(
            f"the accelerator's memory is full{used}; {advice(config)}; train plan estimates what fits"
        ) from fault


def advice(config: TrainerConfig, without: Collection[str] = ()) -> str:
    """Say what of the configuration saves memory, what costs least first; `without` options that save none."""
    told = [one for one in _savings(config) if re.split(r"\W", one, maxsplit=1)[0] not in without]
    return f"what saves memory, what costs least first: {'; '.join(told)}"


def _savings(config: TrainerConfig) -> Iterator[str]:
    """Yield what saves memory, each beginning with its option."""
    lora, offloaded = config.model_type == "lora", config.enable_group_offload
    yield from _recomputing(config)
    if lora and not offloaded and config.base_model_precision == "no_change":
        yield "base_model_precision: int8-quanto or, quicker, fp8-torchao (half the bytes of the frozen weights)"
    if config.train_batch_size > 1:
        turns = config.gradient_accumulation_steps * config.train_batch_size
        yield f"train_batch_size: 1 with gradient_accumulation_steps: {turns} (as many samples a step)"
    if lora and config.optimizer != "adamw8bit":
        yield "optimizer: adamw8bit (pip install 'pairline[adamw8bit]')"
    if lora and not offloaded:
        undone = " and ".join(_against_offload(config))
        yield f"enable_group_offload: true{' with ' * bool(undone)}{undone} (frozen blocks wait on the CPU, slower)"
    if lora and config.lora_type == "standard" and config.lora_rank > 1:
        yield f"lora_rank below {config.lora_rank} (fewer numbers to train, which can learn less)"
    if config.tread_config is None:
        yield "tread_config (some tokens skip some blocks, other gradients)"
    yield f"resolution below {config.resolution:g} (prep has to run again)"


def _recomputing(config: TrainerConfig) -> Iterator[str]:
    """Say how to keep less of what blocks compute."""
    if not config.gradient_checkpointing:
        yield f"gradient_checkpointing: true (a third slower{_GOES_ON})"
        return
    if config.gradient_checkpointing_backend == "torch" and not config.enable_group_offload:
        yield f"gradient_checkpointing_backend: unsloth (hardly slower{_GOES_ON})"
    if config.gradient_checkpointing_keep != "nothing":
        yield f"gradient_checkpointing_keep: nothing (slower{_GOES_ON})"
    if config.gradient_checkpointing_interval > 1:
        yield f"gradient_checkpointing_interval: 1 (slower{_GOES_ON})"


def _against_offload(config: TrainerConfig) -> Iterator[str]:
    """Say what has to be otherwise for group offload."""
    if config.base_model_precision not in PLAIN_TENSORS:
        yield "base_model_precision: int8-quanto"
    if not config.gradient_checkpointing:
        yield "gradient_checkpointing: true"
    if config.gradient_checkpointing_interval > 1:
        yield "gradient_checkpointing_interval: 1"
    if config.gradient_checkpointing_keep != "nothing":
        yield "gradient_checkpointing_keep: nothing"
    if config.gradient_checkpointing_backend != "torch":
        yield "gradient_checkpointing_backend: torch"
