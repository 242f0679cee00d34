"""Rules about what is trained and how: kind of adapter, precision, optimiser, schedule.

A new rule is a function here and a name in `TRAINING_RULES`; `schemas.rules` runs them with its own.
"""

from collections.abc import Callable, Iterator

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
    found.warnings += [
        f"{project.config_path.name}: {one}" for one in (*_inactive(project.trainer), *_unused(project.trainer))
    ]


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
    if "lr_num_cycles" in given and trainer.lr_scheduler != "cosine_with_restarts":
        yield "lr_num_cycles has no effect without lr_scheduler: cosine_with_restarts"
    if "lr_power" in given and trainer.lr_scheduler != "polynomial":
        yield "lr_power has no effect without lr_scheduler: polynomial"
    if trainer.optimizer == "prodigy" and trainer.learning_rate < _PRODIGY_RATE:
        yield f"learning_rate {trainer.learning_rate:g}: prodigy finds the rate and multiplies it by this, usually by 1"


def _unused(trainer: TrainerConfig) -> Iterator[str]:
    """Yield what another option, usually one left at its default, keeps from having an effect."""
    if trainer.lr_warmup_steps and trainer.lr_scheduler == "constant":
        yield "lr_warmup_steps has no effect: lr_scheduler constant has no warm-up, constant_with_warmup has"
    rolled = trainer.scheduled_sampling_probability or trainer.scheduled_sampling_ramp_steps
    if rolled and not trainer.scheduled_sampling_max_step_offset:
        yield "scheduled sampling is off: scheduled_sampling_max_step_offset is 0"
    if "flow_schedule_shift" in trainer.model_fields_set and trainer.flow_schedule_auto_shift:
        yield "flow_schedule_shift has no effect: flow_schedule_auto_shift is on; set that to false"


TRAINING_RULES: tuple[Callable[[Project, str, Findings], None], ...] = (_rule_full, _rule_fused, _rule_inactive)
