"""Rules about what is trained and how: kind of adapter, precision, optimiser, schedule.

A new rule is a function here and a name in `TRAINING_RULES`; `schemas.rules` runs them with its own.
"""

import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from schemas.config_file import Findings, shown
from schemas.errors import Fault
from schemas.project import Project
from schemas.trainer import TrainerConfig

_ENCODER_PRECISIONS = ("text_encoder_1_precision", "text_encoder_2_precision")  # in the order of the encoders
_OF_LORA = ("lora_rank", "lora_alpha", "lora_dropout")
_OF_ADAPTERS = (*_OF_LORA, "lycoris_config", "flux_lora_target")
_PRODIGY_RATE = 0.1  # below it prodigy, which multiplies the rate it finds, hardly moves


def _rule_full(project: Project, _: str, found: Findings) -> None:
    trainer = project.trainer
    if trainer.model_type != "full":
        return
    for key, problem, hint in _against_full(trainer):
        found.faults.append(Fault(project.config_path.name, key, problem, shown(getattr(trainer, key)), hint))


def _against_full(trainer: TrainerConfig) -> Iterator[tuple[str, str, str]]:
    """Yield (option, problem, hint) of what cannot go with training all weights."""
    if trainer.base_model_precision != "no_change":
        yield "base_model_precision", "quantised weights cannot be trained", 'model_type full needs "no_change"'
    for key, usual in (("lora_type", "standard"), ("init_lora", None)):
        if getattr(trainer, key) != usual:
            yield key, "is for adapters; model_type full has none", "leave it out, or train model_type lora"
    if trainer.fuse_qkv_projections:
        yield "fuse_qkv_projections", "is for adapters", "a model that is trained in full keeps its layers"
    half = trainer.mixed_precision == "bf16" and trainer.base_model_default_dtype == "bf16"
    if half and not _compensates(trainer):
        hint = "optimi-adamw and optimi-lion keep what rounding loses; or set base_model_default_dtype to fp32"
        yield "optimizer", "small updates of bfloat16 weights would be rounded away", hint


def _compensates(trainer: TrainerConfig) -> bool:
    """Tell whether the optimiser remembers what the rounding of weights lost (Kahan summation)."""
    arguments = trainer.optimizer_arguments
    return trainer.optimizer.startswith("optimi-") and arguments.get("kahan_sum") is not False


def _rule_fused(project: Project, _: str, found: Findings) -> None:
    trainer = project.trainer
    if trainer.fuse_qkv_projections and trainer.model_type == "lora" and trainer.lora_type == "lycoris":
        problem = "LoKr of fused layers cannot be taken apart into q, k and v"
        hint = "leave it out, or set lora_type to standard"
        found.faults.append(Fault(project.config_path.name, "fuse_qkv_projections", problem, "true", hint))


def _rule_inactive(project: Project, _: str, found: Findings) -> None:
    told = [*_inactive(project.trainer), *_inactive_guidance(project), *_inactive_encoders(project)]
    found.warnings += [f"{project.config_path.name}: {one}" for one in told]


def _inactive(trainer: TrainerConfig) -> Iterator[str]:
    """Yield what has no effect, or hardly any, beside the other options."""
    given = trainer.model_fields_set
    if trainer.model_type == "full":
        for key in (one for one in _OF_ADAPTERS if one in given):
            yield f"{key} has no effect: model_type full trains all weights"
    elif trainer.lora_type == "lycoris":
        for key in (one for one in _OF_LORA if one in given):
            yield f"{key} has no effect: lycoris_config says what LoKr is like"
    elif trainer.lycoris_config is not None:
        yield "lycoris_config has no effect without lora_type: lycoris"
    for key, (needed, acts, told) in _NEEDS.items():
        if key in given and _changed(trainer, key) and not acts(getattr(trainer, needed)):
            yield f"{key} has no effect {told}"
    if trainer.optimizer == "prodigy" and trainer.learning_rate < _PRODIGY_RATE:
        yield f"learning_rate {trainer.learning_rate:g}: prodigy finds the rate and multiplies it by this, usually by 1"


_GUIDANCE = ("flux_guidance_mode", "flux_guidance_value", "flux_guidance_min", "flux_guidance_max")


def _inactive_guidance(project: Project) -> Iterator[str]:
    """Yield, once whatever is given, that a flavour does not take guidance; and what its mode does not read."""
    flavour, given = project.family.flavours.get(project.flavour), project.trainer.model_fields_set
    if flavour is None:
        return
    model = f"{project.trainer.model_family} {project.flavour}"
    named = [key for key in _GUIDANCE if key in given]
    if named and not flavour.told_guidance:
        yield f"{', '.join(named)} {'has' if len(named) == 1 else 'have'} no effect: {model} is told no guidance"
    elif project.trainer.flux_guidance_mode != "random-range":
        for key in (one for one in _GUIDANCE[2:] if one in given and _changed(project.trainer, one)):
            yield f"{key} has no effect without flux_guidance_mode: random-range"
    if flavour.true_guidance == "none" and project.trainer.validation_guidance_real > 1:
        yield f"validation_guidance_real has no effect: {model} is sampled with the guidance it is told alone"


def _inactive_encoders(project: Project) -> Iterator[str]:
    """Yield the precisions of text encoders that a family does not have."""
    for key in _ENCODER_PRECISIONS[len(project.family.numbered_text_encoders) :]:
        if _changed(project.trainer, key):
            family = project.trainer.model_family
            yield f"{key} has no effect: {family} has no second text encoder; {_ENCODER_PRECISIONS[0]} is for the one"


def _rule_encoders_offload(project: Project, _: str, found: Findings) -> None:
    """Refuse to move quantised layers: of several encoders, the largest alone waits on the CPU."""
    trainer, key = project.trainer, project.family.text_precision
    if trainer.group_offload_text_encoder and getattr(trainer, key) != "no_change":
        problem, value = "contradicts group_offload_text_encoder", shown(getattr(trainer, key))
        hint = "quantised weights cannot be moved; keep one of the two"
        found.faults.append(Fault(project.config_path.name, key, problem, value, hint))


def _changed(trainer: TrainerConfig, key: str) -> bool:
    """Tell whether an option is not at its default."""
    return bool(getattr(trainer, key) != type(trainer).model_fields[key].default)


_OFFSET = "scheduled_sampling_max_step_offset"

# Option -> the option that it needs, the values of that with which it acts, and how to say so.
_NEEDS: Mapping[str, tuple[str, Callable[[Any], bool], str]] = {
    "lr_num_cycles": ("lr_scheduler", "cosine_with_restarts".__eq__, "without lr_scheduler: cosine_with_restarts"),
    "lr_power": ("lr_scheduler", "polynomial".__eq__, "without lr_scheduler: polynomial"),
    "lr_warmup_steps": ("lr_scheduler", "constant".__ne__, "under lr_scheduler: constant"),
    "flow_schedule_shift": ("flow_schedule_auto_shift", operator.not_, "beside flow_schedule_auto_shift"),
    "flow_beta_schedule_alpha": ("flow_use_beta_schedule", bool, "without flow_use_beta_schedule"),
    "flow_beta_schedule_beta": ("flow_use_beta_schedule", bool, "without flow_use_beta_schedule"),
    "huber_c": ("loss_type", "l2".__ne__, "under loss_type: l2"),
    "ema_decay": ("use_ema", bool, "without use_ema"),
    "ema_update_interval": ("use_ema", bool, "without use_ema"),
    "gradient_checkpointing_interval": ("gradient_checkpointing", bool, "without gradient_checkpointing"),
    "gradient_checkpointing_keep": ("gradient_checkpointing", bool, "without gradient_checkpointing"),
    "gradient_checkpointing_backend": ("gradient_checkpointing", bool, "without gradient_checkpointing"),
    "dynamo_mode": ("dynamo_backend", "no".__ne__, "without dynamo_backend: inductor"),
    "scheduled_sampling_probability": (_OFFSET, bool, f"without {_OFFSET}"),
    "scheduled_sampling_ramp_steps": (_OFFSET, bool, f"without {_OFFSET}"),
}


TRAINING_RULES: tuple[Callable[[Project, str, Findings], None], ...] = (
    _rule_full, _rule_fused, _rule_encoders_offload, _rule_inactive,
)  # fmt: skip
