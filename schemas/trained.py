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
    found.warnings += [f"{project.config_path.name}: {one}" for one in _inactive(project.trainer)]


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
        changed = key in given and getattr(trainer, key) != type(trainer).model_fields[key].default
        if changed and not acts(getattr(trainer, needed)):
            yield f"{key} has no effect {told}"
    if trainer.optimizer == "prodigy" and trainer.learning_rate < _PRODIGY_RATE:
        yield f"learning_rate {trainer.learning_rate:g}: prodigy finds the rate and multiplies it by this, usually by 1"


_GUIDANCE = ("flux_guidance_mode", "flux_guidance_value", "flux_guidance_min", "flux_guidance_max")


def _rule_guidance(project: Project, _: str, found: Findings) -> None:
    """Tell once, whatever is given, of guidance that a flavour does not take."""
    flavour, given = project.family.flavours.get(project.flavour), project.trainer.model_fields_set
    if flavour is None:
        return
    said = f"no effect: {project.trainer.model_family} {project.flavour}"
    ignored = [key for key in _GUIDANCE if key in given and not flavour.told_guidance]
    if ignored:
        have = "has" if len(ignored) == 1 else "have"
        found.warnings.append(f"{project.config_path.name}: {', '.join(ignored)} {have} {said} is told no guidance")
    if flavour.true_guidance == "none" and project.trainer.validation_guidance_real > 1:
        problem = f"validation_guidance_real has {said} is sampled with the guidance it is told alone"
        found.warnings.append(f"{project.config_path.name}: {problem}")


def _rule_encoders_offload(project: Project, _: str, found: Findings) -> None:
    trainer = project.trainer
    for number, _component in enumerate(project.family.numbered_text_encoders, 1):
        key = f"text_encoder_{number}_precision"
        if trainer.group_offload_text_encoder and getattr(trainer, key) != "no_change":
            problem, hint = (
                "contradicts group_offload_text_encoder",
                "quantised weights cannot be moved; keep one of the two",
            )
            found.faults.append(Fault(project.config_path.name, key, problem, shown(getattr(trainer, key)), hint))


_OFFSET = "scheduled_sampling_max_step_offset"

# Option -> the option that it needs, the values of that with which it acts, and how to say so.
_NEEDS: Mapping[str, tuple[str, Callable[[Any], bool], str]] = {
    "lr_num_cycles": ("lr_scheduler", "cosine_with_restarts".__eq__, "without lr_scheduler: cosine_with_restarts"),
    "lr_power": ("lr_scheduler", "polynomial".__eq__, "without lr_scheduler: polynomial"),
    "lr_warmup_steps": ("lr_scheduler", "constant".__ne__, "under lr_scheduler: constant"),
    "flow_schedule_shift": ("flow_schedule_auto_shift", operator.not_, "beside flow_schedule_auto_shift"),
    "flow_beta_schedule_alpha": ("flow_use_beta_schedule", bool, "without flow_use_beta_schedule"),
    "flow_beta_schedule_beta": ("flow_use_beta_schedule", bool, "without flow_use_beta_schedule"),
    "flux_guidance_min": ("flux_guidance_mode", "random-range".__eq__, "without flux_guidance_mode: random-range"),
    "flux_guidance_max": ("flux_guidance_mode", "random-range".__eq__, "without flux_guidance_mode: random-range"),
    "huber_c": ("loss_type", "l2".__ne__, "under loss_type: l2"),
    "ema_decay": ("use_ema", bool, "without use_ema"),
    "ema_update_interval": ("use_ema", bool, "without use_ema"),
    "gradient_checkpointing_interval": ("gradient_checkpointing", bool, "without gradient_checkpointing"),
    "scheduled_sampling_probability": (_OFFSET, bool, f"without {_OFFSET}"),
    "scheduled_sampling_ramp_steps": (_OFFSET, bool, f"without {_OFFSET}"),
}


TRAINING_RULES: tuple[Callable[[Project, str, Findings], None], ...] = (
    _rule_full, _rule_fused, _rule_encoders_offload, _rule_guidance, _rule_inactive,
)  # fmt: skip
