"""`train plan`: the ways to train a project, how much memory and time each takes, and the fastest that fits.

Nothing is loaded: shapes alone are counted (costs.py), and turned into bytes and seconds (estimate.py). Another way to
train is a line in `_WAYS`; what this version does not have, or the options' rules refuse, is left out.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from families import open_project
from families.checkpoints import denoiser_config
from families.products import multiplies_float8
from families.runtime import default_device
from schemas.errors import ConfigError, UserError
from schemas.project import TINY, Project
from schemas.timed import ChoiceRow, TrainPlan, gib
from schemas.trainer import TrainerConfig
from train.costs import Costs, Shaped, Sizes, costs_of, shaped, tokens_of
from train.devices import DEVICES, H200, Device, device_named
from train.estimate import PRECISIONS, Choice, Weights, has_rates, peak_bytes, seconds, trained_bytes, weights_of
from train.memory import advice, room_of
from train.sizes import sizes_of, spelled, square

_GIB = 2**30
_SLACK = 1.03  # memory that lies between tensors
_WORTH = 0.01  # share of the memory that has to be saved to be told of

# Options that a choice is made of, as they are where nobody says anything.
_USUAL: Choice = {
    "base_model_precision": "no_change",
    "dynamo_backend": "no",
    "gradient_checkpointing": True,
    "gradient_checkpointing_interval": 1,
    "gradient_checkpointing_keep": "nothing",
    "gradient_checkpointing_backend": "torch",
    "enable_group_offload": False,
    "group_offload_use_stream": False,
    "group_offload_blocks_per_group": 1,
}
_KEEP: Choice = {"gradient_checkpointing_keep": "attention"}
_AWAY: Choice = {"gradient_checkpointing_backend": "unsloth"}
_OFFLOAD: Choice = {"enable_group_offload": True, "group_offload_use_stream": True}

# What choices are combined of: one of each line.
_PRECISIONS = ("no_change", "fp8-torchao", "int8-quanto", "int4-quanto")  # int8-torchao costs what int8-quanto does
_RECOMPUTED: tuple[Choice, ...] = ({}, _KEEP, _AWAY, {**_KEEP, **_AWAY}, _OFFLOAD)
_WAYS: tuple[tuple[Mapping[str, Any], ...], ...] = (
    tuple({"base_model_precision": one} for one in _PRECISIONS),
    ({"dynamo_backend": "inductor"}, {"dynamo_backend": "no"}),
    ({"gradient_checkpointing": False}, *_RECOMPUTED),
)


@dataclass(frozen=True, slots=True)
class Asked:
    """What is planned for, where it is not what is here."""

    pixels: int | None = None
    references: int | None = None
    device: str | None = None
    everything: bool = False  # tell of choices that gain nothing, too


@dataclass(frozen=True, slots=True)
class _Accelerator:
    """What a plan is for."""

    name: str
    device: Device | None  # what is known of it
    room: float | None  # GiB for tensors
    float8: bool  # whether it multiplies that; so does a card of which nothing is known, until it is there


@dataclass(frozen=True, slots=True)
class _Counted:
    """What estimates are made from."""

    shape: Shaped
    largest: Costs
    usual: Costs
    accelerator: _Accelerator


def plan(project: Project, asked: Asked) -> TrainPlan:
    """Estimate the ways to train a project; raises UserError if none fits."""
    notes: list[str] = []
    largest, usual = _sizes(project, asked, notes)
    accelerator = _accelerator(project, asked)
    device, room = accelerator.device, accelerator.room
    shape, config = shaped(project), project.trainer
    batch = config.train_batch_size
    costs = {sizes: costs_of(shape, sizes, batch) for sizes in dict.fromkeys((largest, usual))}
    counted = _Counted(shape, costs[largest], costs[usual], accelerator)
    if project.checkpoint != TINY and denoiser_config(project) is None:
        notes.append("the checkpoint's config.json is not on this machine: shapes are as published")
    notes += _notes(config, accelerator)
    rows = tuple(_ranked([_row(counted, one) for one in _choices(project, accelerator)], known=_times(counted)))
    notes += [f"what is set now cannot be: {one.refused}" for one in rows if one.refused is not None]
    summary = TrainPlan(
        family=config.model_family,
        flavour=project.flavour,
        largest=spelled(largest),
        usual=spelled(usual),
        tokens=(tokens_of(project, largest), tokens_of(project, usual)),
        batch=batch,
        trainable_parameters=shape.parameters,
        device=accelerator.name,
        rates=None if device is None else device.name,
        memory_gib=room,
        budget_gib=config.memory_budget_gib,
        choices=rows,
        notes=tuple(notes),
        everything=asked.everything,
    )
    if room is not None and summary.fastest is None:
        raise UserError(_too_little(shape, summary, room))
    return summary


def _sizes(project: Project, asked: Asked, notes: list[str]) -> tuple[Sizes, Sizes]:
    """Return the largest and the most common sample: as asked, as paired, or as assumed, which is noted."""
    if asked.pixels is not None or asked.references is not None:
        told = square(project, asked.pixels, asked.references)
        return told, told
    try:
        return sizes_of(project)
    except UserError as fault:
        assumed = square(project, None, None)
        notes.append(f"{fault}; until then {spelled(assumed)} is assumed: --pixels, --references")
        return assumed, assumed


def _accelerator(project: Project, asked: Asked) -> _Accelerator:
    """Return the accelerator that is asked for, else what is here."""
    here, budget = default_device(), project.trainer.memory_budget_gib
    room = None if budget is None else room_of(budget)
    if asked.device is not None:
        device = device_named(asked.device)
        if device is None:
            known = ", ".join(one.name for one in DEVICES)
            raise UserError(f"--device {asked.device}: nothing is known of it; there are {known}")
        free = room_of(device.gib)
        return _Accelerator(device.name, device, _least(free, room), device.products_fp8 is not None)
    if here.type != "cuda":
        return _Accelerator(str(here), None, room, float8=True)
    name, free = torch.cuda.get_device_name(here), torch.cuda.mem_get_info(here)[0] / _GIB
    return _Accelerator(name, device_named(name), _least(free, room), multiplies_float8(here))


def _least(free: float, room: float | None) -> float:
    return free if room is None else min(free, room)


def _notes(config: TrainerConfig, accelerator: _Accelerator) -> Iterator[str]:
    """Yield what a reader of the table should know."""
    name, device = accelerator.name, accelerator.device
    if device is None:
        yield f"no rates of {name} are known: no times, and the order is that of an {H200.name}; --device plans for one"
    elif not has_rates(config):
        yield "times are estimated for bfloat16 alone: none are told; in float32 most of this is twice as large"
    elif not device.measured:
        yield f"rates of the {device.name} are shares of its data sheet's: times are rough (train bench measures)"
    if config.tread_config is not None or config.scheduled_sampling_max_step_offset:
        yield "tread_config and scheduled_sampling are not counted"


def _choices(project: Project, accelerator: _Accelerator) -> list[Choice]:
    """Return the choices that the options allow; what the project has now among them, whatever it is."""
    given = project.trainer.model_dump()
    now = {name: given.get(name, usual) for name, usual in _USUAL.items()}
    made = [{**_USUAL, **{name: value for part in parts for name, value in part.items()}} for parts in product(*_WAYS)]
    every = [now, *(one for one in made if one != now)]
    possible = [one for one in every if one is now or _refusal(one, accelerator) is None]
    return [one for one in possible if one is now or _allowed(project, _changes(one, given))]


def _refusal(choice: Choice, accelerator: _Accelerator) -> str | None:
    """Say what of a choice an accelerator lacks, None if nothing."""
    precision = choice["base_model_precision"]
    if not PRECISIONS[precision].quick or accelerator.float8:
        return None
    return f"{precision} multiplies in float8, which the {accelerator.name} cannot"


def _changes(choice: Choice, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a choice is otherwise in a configuration."""
    return {name: value for name, value in choice.items() if given.get(name, _USUAL[name]) != value}


def _allowed(project: Project, changes: Mapping[str, Any]) -> bool:
    """Tell whether this version has the options, and their rules let them be set so."""
    if not changes.keys() <= TrainerConfig.model_fields.keys():
        return False
    try:
        _changed(project, changes)
    except ConfigError:
        return False
    return True


def _changed(project: Project, changes: Mapping[str, Any]) -> Project:
    """Open a project with other options, as `--set` gives them."""
    texts = [f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in changes.items()]
    overrides = (*project.overrides, *texts)
    return open_project(project.config_path, root=project.root, workspace=project.workspace, overrides=overrides)


def _times(counted: _Counted) -> bool:
    return counted.accelerator.device is not None and has_rates(counted.shape.project.trainer)


def _row(counted: _Counted, choice: Choice) -> ChoiceRow:
    config, accelerator = counted.shape.project.trainer, counted.accelerator
    device, room = accelerator.device or H200, accelerator.room
    weights: Weights = weights_of(counted.shape, choice["base_model_precision"])
    peak = peak_bytes(counted.largest, weights, trained_bytes(counted.shape), choice) / _GIB
    took = seconds(counted.usual, weights, choice, device) * config.gradient_accumulation_steps
    changes = _changes(choice, config.model_dump())
    return ChoiceRow(
        settings=choice,
        changes=changes,
        peak_gib=peak,
        seconds_per_step=took,
        relative=1.0,
        fits=None if room is None else peak * _SLACK <= room,
        exact=PRECISIONS[choice["base_model_precision"]].exact,
        now=not changes,
        worthwhile=True,
        refused=_refusal(choice, accelerator),
    )


def _ranked(rows: list[ChoiceRow], *, known: bool) -> Iterator[ChoiceRow]:
    """Yield rows by their time, marked where others as exact are as quick and as small; times only where known.

    What is refused comes last, and has no time.
    """
    ranked = sorted(rows, key=lambda row: (row.refused is not None, row.seconds_per_step or 0.0, row.peak_gib))
    least = ranked[0].seconds_per_step or 1.0
    for place, row in enumerate(ranked):
        better = any(one.peak_gib <= row.peak_gib and one.exact >= row.exact for one in ranked[:place])
        took, told = row.seconds_per_step or 0.0, known and row.refused is None
        worthwhile = not better and row.refused is None
        yield replace(row, relative=took / least, seconds_per_step=took if told else None, worthwhile=worthwhile)


def _too_little(shape: Shaped, summary: TrainPlan, room: float) -> str:
    """Say by how much the smallest choice misses the memory there is, and what else would save some."""
    smallest = min((one for one in summary.choices if one.refused is None), key=lambda one: one.peak_gib)
    needed = smallest.peak_gib * _SLACK
    tried = {name for name in _USUAL if len({one.settings[name] for one in summary.choices}) > 1}
    if trained_bytes(shape) < _WORTH * needed * _GIB:
        tried.add("lora_rank")
    saving = advice(_changed(shape.project, smallest.changes).trainer, without=tried)
    return (
        f"no way to train fits into {gib(room)} GiB: the smallest ({smallest.name}) takes about {gib(needed)} GiB, "
        f"{gib(needed - room)} more; {saving}"
    )
