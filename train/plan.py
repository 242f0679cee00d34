"""What a run does, known before any model is loaded: what is trained on, and where to go on.

All that can be refused is refused here, but for a compiler that does not work; nothing is written. A further thing to
check goes into `supply_of`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from families.checkpoints import check_text_input, check_trainable, encoder_keys, here, locate
from families.quantize import check_precision
from schemas.freshness import check_pairs
from schemas.keys import digest
from schemas.project import Project
from schemas.trainer import DEFAULT_STEPS
from train import checkpoint
from train.adapter import LORA_NAME, check_start
from train.data import Shelf, Shown, training_sets
from train.held_out import held_out, held_out_sets
from train.memory import check_memory
from train.metrics import check_tracker
from train.optimizer import check_optimizer
from train.order import epoch_batches
from train.pictures import check_pictures
from train.processes import Processes

FINISHED = "finished.json"  # of a run folder: after how many steps all that it was to write was there


@dataclass(frozen=True, slots=True)
class Supply:
    """What a run is made from."""

    shelf: Shelf
    weights: Path | None  # the checkpoint of the model; null if it is not on this machine, in a dry run
    held: Sequence[Shown]  # pairs that are evaluated, and not trained on
    settings: Mapping[str, Any]  # that its numbers depend on


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run does, known before any model is loaded."""

    supply: Supply
    resumed: checkpoint.Stored | None
    steps: int  # of the whole training
    last: int  # that this run takes

    @property
    def first(self) -> int:
        """Return the number of steps that were taken before."""
        return self.resumed.mark.step if self.resumed is not None else 0


def supply_of(project: Project, ranks: Processes, dry_run: bool) -> Supply:
    """Check all that can be checked before anything is written; raises UserError for what is missing or damaged."""
    check_tracker(project)
    check_optimizer(project.trainer)
    check_precision(project.trainer.base_model_precision, ranks.device)
    check_memory(project.trainer, ranks.device)
    denoiser = project.family.denoiser
    with ranks.first_alone():  # one process builds or fetches the checkpoint
        shelf = Shelf(project, encoder_keys(project, remember=not dry_run))
        weights = here(project, denoiser) if dry_run else locate(project, denoiser)
        if weights is not None:
            check_trainable(project, weights)
            check_text_input(project, weights, shelf.text_width)
        check_start(project)
        held = held_out(project, shelf)
        check_pictures(project, shelf)
        settings = checkpoint.settings_of(project, shelf, weights, ranks.count, remember=not dry_run)
    return Supply(shelf, weights, held, settings)


def plan_of(project: Project, supply: Supply, ranks: Processes, limit: int | None) -> Plan:
    """Find where to go on, and how far; raises UserError for a checkpoint of other settings."""
    resumed = checkpoint.find(project.run_folder, project.trainer.resume_from_checkpoint, project.root)
    if resumed is not None:
        checkpoint.check(resumed, supply.settings)
    steps, first = _steps(project, supply.shelf, ranks.count), resumed.mark.step if resumed is not None else 0
    last = max(first, min(steps, first + limit) if limit is not None else steps)
    return Plan(supply, resumed, steps, last)


def result_of(project: Project) -> Path:
    """Return the path of what training makes."""
    adapter = project.trainer.model_type == "lora"
    return project.run_folder / (LORA_NAME if adapter else project.family.denoiser[0])


def is_done(project: Project, plan: Plan) -> bool:
    """Tell whether every step is taken and what it made is there as it should be."""
    if plan.resumed is None or plan.first < plan.last:
        return False
    folder, result = project.run_folder, result_of(project)
    try:
        finished = json.loads((folder / FINISHED).read_text())["step"]
    except (OSError, ValueError, LookupError, TypeError):
        return False
    average = not project.trainer.use_ema or (folder / "ema" / result.name).exists()
    whole = result.is_dir() or checkpoint.holds(plan.resumed.folder, result)
    return finished == plan.first and average and whole


def _steps(project: Project, shelf: Shelf, count: int) -> int:
    config = project.trainer
    if config.max_train_steps or not config.num_train_epochs:
        return config.max_train_steps or DEFAULT_STEPS
    batches = sum(len(epoch_batches(project, shelf, epoch)) for epoch in range(config.num_train_epochs))
    return max(1, batches // (config.gradient_accumulation_steps * count))


def record_of(project: Project) -> dict[str, Any]:
    """Return what a run is made from: options, versions, and the pair tables, by what made them."""
    sets = (*training_sets(project), *held_out_sets(project))
    return {
        "config": project.trainer.model_dump(mode="json") | {"model_flavour": project.flavour},
        "versions": {name: version(name) for name in ("pairline", "torch", "diffusers", "transformers", "peft")},
        "datasets": {one.id: digest(_provenance(project, one.id)) for one in sets},
    }


def _provenance(project: Project, dataset_id: str) -> list[str | None]:
    table = check_pairs(project, project.dataset(dataset_id))
    return [table.config, table.inputs]
