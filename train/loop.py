"""`train run`, read top to bottom: what is trained on, where to go on, the model, then one step after the other.

`run` is the whole, `_train` the loop. What may not be is refused in plan.py, before anything is loaded. What is shown
when is in order.py, reading ahead in loader.py; time, noise and loss of one forward pass in step.py, with flow.py and
rollout.py; when its numbers are known in pending.py; what is trained in adapter.py; evaluation and samples in watch.py;
checkpoints in checkpoint.py, several processes in processes.py; how the network is made, and made fast, in network.py.
"""

import json
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from families import Source, open_project
from families.routing import Routing
from families.runtime import default_device, family_of
from schemas.console import Progress, log, progress
from schemas.errors import UserError
from schemas.keys import seed_of
from schemas.lock import only_one
from schemas.project import Project
from schemas.storage import write_aside
from schemas.summaries import TrainSummary
from schemas.trainer import TrainerConfig
from train import checkpoint
from train.adapter import LORA_NAME, adapter_layers, check_gradients, save_adapter, start_from_file
from train.compiling import able_to_compile, check_compiler, compiled_graphs
from train.data import Shelf
from train.ema import averaged, make_average, update
from train.interrupt import stops
from train.loader import Loader
from train.memory import enough_memory, limit_memory
from train.metrics import Metrics, Pace
from train.network import loaded_to, make_network
from train.optimizer import make_optimizer, make_schedule
from train.order import Cursor, turns
from train.pending import Arrived, Pending, Taken, lateness
from train.pictures import pictures_of
from train.plan import FINISHED, Plan, is_done, plan_of, record_of, result_of, supply_of
from train.processes import Processes, processes
from train.step import base_dtype, step_loss
from train.watch import Watch

CPU = torch.device("cpu")
Load = Callable[[Path, torch.dtype, torch.device], nn.Module]  # as the family's `load_denoiser`


@dataclass(slots=True)
class _Done:
    """What a run did so far, as far as it is known."""

    step: int  # the last one
    losses: list[float] = field(default_factory=list)
    pace: Pace = field(default_factory=Pace)  # evaluations and checkpoints not counted
    first: float | None = None  # when the first step had been taken


@dataclass(frozen=True, slots=True)
class _Around:
    """What goes on around the steps."""

    metrics: Metrics
    watch: Watch
    asked_to_stop: Callable[[], bool]


def run(
    project: Source,
    *,
    limit: int | None = None,
    workers: int | None = None,
    dry_run: bool = False,
    load: Load | None = None,
) -> TrainSummary:
    """Train on the cached pairs of a project and write the adapter to the run folder.

    Resumes where an earlier run stopped. `limit` stops after N steps of this run, `workers` is the number of CPU
    threads; `load` makes the network in place of the family's `load_denoiser`. Raises UserError before the first step
    if anything is missing, stale or damaged, and at the step where a loss or gradient is not finite.
    """
    start = time.monotonic()
    project, device = open_project(project), default_device()
    folder = project.run_folder
    with processes(device) as ranks, ExitStack() as held:
        supply = supply_of(project, ranks, dry_run)
        if ranks.first and not dry_run:
            held.enter_context(only_one(folder, "train run"))
            checkpoint.sweep(folder)
        plan = plan_of(project, supply, ranks, limit)
        if not ranks.agree((plan.first, plan.last, plan.supply.settings)):
            raise UserError("the processes do not go on from the same checkpoint; give them one run folder, shared")
        summary = TrainSummary(
            run_folder=str(folder),
            lora=None if dry_run else str(result_of(project)),
            samples=len(supply.shelf.samples),
            skipped=supply.shelf.skipped,
            first_step=plan.first,
            last_step=plan.last,
            device=str(device),
            dry_run=dry_run,
            warnings=project.warnings,
        )
        if dry_run or supply.weights is None or is_done(project, plan):
            return replace(summary, seconds=time.monotonic() - start)

        with ranks.first_alone():  # what one process compiles the others find
            check_compiler(project.trainer, project.compiled, device)
        torch.set_num_threads(workers or torch.get_num_threads())
        asked_to_stop = held.enter_context(stops())
        limit_memory(project.trainer, device)
        held.enter_context(enough_memory(project.trainer, device))
        held.enter_context(able_to_compile(project.trainer))
        pictures = pictures_of(project, supply.shelf, device) if ranks.first else None
        watch = Watch(project, supply.shelf, supply.held if ranks.first else (), pictures, device)
        begin = time.monotonic()
        state = _load(project, plan, partial(load or family_of(project).load_denoiser, supply.weights), device)
        if ranks.first:
            log.info("loaded and made ready to train in %.0f s", time.monotonic() - begin)
        record = record_of(project)
        if ranks.first:
            _write_record(folder, record)
        with Metrics(project, plan.first, record, quiet=not ranks.first) as metrics:
            if plan.first == 0 and not asked_to_stop():
                watch.look(state, 0, plan.steps, metrics)
            done = _train(project, plan, state, ranks, _Around(metrics, watch, asked_to_stop))
        if ranks.first:
            _finish(project, state, record, done.step)

    tenth = max(1, len(done.losses) // 10)
    return replace(
        summary,
        last_step=done.step,
        stopped=done.step < plan.last,
        first_loss=fmean(done.losses[:tenth]) if done.losses else None,
        loss=fmean(done.losses[-tenth:]) if done.losses else None,
        trainable_parameters=sum(parameter.numel() for parameter in state.parameters),
        seconds_per_step=done.pace.seconds_per_step,
        data_wait=done.pace.data_wait,
        peak_memory_gib=_peak_gib(),
        seconds_to_first_step=done.first - start if done.first is not None else None,
        compiled_graphs=compiled_graphs() if project.trainer.dynamo_backend != "no" else None,
        **watch.numbers(),
        seconds=time.monotonic() - start,
    )


def _train(project: Project, plan: Plan, state: checkpoint.State, ranks: Processes, around: _Around) -> _Done:
    """Take the steps of a run, one after the other; evaluate, sample and write checkpoints when it is time."""
    config, family, done = project.trainer, family_of(project), _Done(plan.first)
    cursor = plan.resumed.mark.cursor if plan.resumed is not None else Cursor()
    routes = config.tread_config.routes if config.tread_config is not None else ()
    routing = Routing(family.blocks(state.denoiser), routes) if routes else None
    planned = turns(project, plan.supply.shelf, cursor, ranks.rank, ranks.count)
    with (
        Loader(plan.supply.shelf, planned, ranks.device) as loader,
        progress("train", plan.last, "step", done=plan.first, quiet=not ranks.first) as bar,
        Pending(partial(_tell, done, plan.supply.shelf, around.metrics, bar), lateness(ranks.device)) as pending,
    ):
        stream = iter(loader)
        for step in range(plan.first + 1, plan.last + 1):
            before, parts = loader.waited, list[Tensor]()
            turn, batches = next(stream)

            # Forward and backward, a batch at a time; each weighs as many samples as it has.
            for batch in batches:
                torch.manual_seed(seed_of(batch.seeds[0], "dropout"))
                weight = len(batch.seeds) / turn.samples
                part = step_loss(family, state.denoiser, batch, step, config, routing) * weight
                part.backward()  # type: ignore[no-untyped-call]
                parts.append(part.detach().double())

            # The gradients of all processes, scaled down to the norm that is allowed; then the update.
            if step == plan.first + 1:
                check_gradients(state.denoiser.named_parameters(), project)
            ranks.sum_gradients(state.parameters)
            norm = nn.utils.clip_grad_norm_(state.parameters, config.max_grad_norm or float("inf"))
            rate = state.schedule.get_last_lr()[0]
            state.optimizer.step()
            state.schedule.step()
            state.optimizer.zero_grad(set_to_none=True)
            update(state.average, state.parameters, step, config)

            # What there is to tell, when it is there to be told; numbers that are not finite end the run.
            loss = sum(parts, torch.zeros_like(parts[0]))
            sums = ranks.sum(torch.stack([loss, torch.full_like(loss, around.asked_to_stop())]))
            pending.push(
                Taken(step, turn, rate, loader.waited - before, tuple(parts)), torch.cat([sums, norm.double()[None]])
            )
            stop = pending.settle(wholly=step == plan.first + 1)

            # Now and then: save, then look; a run that was asked to stop looks no more. What is written is finite.
            ends = stop or step == plan.last
            if ends or _saves(config, step) or around.watch.looks(step, plan.steps):
                stop = pending.settle(wholly=True) or stop
                if ranks.first:
                    _save(project, plan, state, (step, turn.after), ends=step == plan.last or stop)
                if stop:
                    break
                around.watch.look(state, step, plan.steps, around.metrics)
                pending.set_clock()
    return done


def _tell(done: _Done, shelf: Shelf, metrics: Metrics, bar: Progress, taken: Taken, numbers: Arrived) -> None:
    """Take in and tell what a step came to; raises UserError if it is not finite."""
    _check_finite(shelf, taken, numbers)
    done.step = taken.step
    done.losses.append(numbers.loss)
    done.pace.add(numbers.seconds, taken.turn.samples, taken.waited, compiled=numbers.compiled)
    done.first = done.first or time.monotonic()
    metrics.write(
        taken.step,
        epoch=taken.turn.epoch,
        loss=numbers.loss,
        lr=taken.rate,
        grad_norm=numbers.norm,
        seconds=numbers.seconds,
        data_wait=taken.waited,
    )
    _show(bar, done, taken.rate)


def _check_finite(shelf: Shelf, taken: Taken, numbers: Arrived) -> None:
    """Raise UserError if the loss of a step or its gradient is not finite."""
    if not math.isfinite(numbers.loss):
        odd = [
            name
            for showings, part in zip(taken.turn.batches, taken.parts, strict=True)
            if not torch.isfinite(part)
            for name in shelf.load(showings, CPU).suspects
        ]
        raise UserError(
            f"step {taken.step}: the loss is {numbers.loss}; samples: {', '.join(odd) or 'of another process'}; a "
            "lower learning_rate may help, in a run of another name, and prep cache --verify finds damaged latents"
        )
    if not math.isfinite(numbers.norm):
        raise UserError(
            f"step {taken.step}: the gradient is {numbers.norm}; a lower learning_rate or mixed_precision: no may help"
        )


def _save(project: Project, plan: Plan, state: checkpoint.State, at: tuple[int, Cursor], *, ends: bool) -> None:
    """Write the checkpoint that is due after a step, if one is."""
    config, folder, mark = project.trainer, project.run_folder, checkpoint.Mark(*at, plan.supply.settings)
    if ends or _due(mark.step, config.checkpointing_steps):
        checkpoint.save(folder, state, mark, keep=config.checkpoints_total_limit)
    elif _due(mark.step, config.checkpointing_rolling_steps):
        checkpoint.save(folder, state, mark, keep=config.checkpoints_rolling_total_limit, rolling=True)


def _saves(config: TrainerConfig, step: int) -> bool:
    """Tell whether a checkpoint is due after a step."""
    return _due(step, config.checkpointing_steps) or _due(step, config.checkpointing_rolling_steps)


def _due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0


def _show(bar: Progress, done: _Done, rate: float) -> None:
    parts = [f"loss {done.losses[-1]:.4f}", f"lr {rate:.2e}", *done.pace.recent()]
    if (peak := _peak_gib()) is not None:
        parts.append(f"{peak:.1f} GiB")
    if graphs := compiled_graphs():
        parts.append(f"{graphs} graphs")
    bar.set_postfix_str(", ".join(parts))
    bar.update()


def _peak_gib() -> float | None:
    device = default_device()
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None


def _load(
    project: Project, plan: Plan, load: Callable[[torch.dtype, torch.device], nn.Module], device: torch.device
) -> checkpoint.State:
    """Load the network, then what steps change; all of it from the checkpoint that the run resumes, if it does."""
    config = project.trainer
    network = make_network(project, load(base_dtype(config), loaded_to(config, device)), device)
    optimizer = make_optimizer(network.parameters, config)
    schedule = make_schedule(optimizer, config, plan.steps)
    if plan.resumed is None:
        start_from_file(network.denoiser, project)
    average = make_average(network.parameters, config)
    state = checkpoint.State(network.denoiser, network.parameters, optimizer, schedule, average)
    if plan.resumed is not None:
        checkpoint.load(plan.resumed, state)
    return state


def _write_record(folder: Path, record: dict[str, Any]) -> None:
    """Say in the run folder what is trained with what, unless it is said there."""
    text, settings = json.dumps(record, indent=2).encode(), folder / "settings.json"
    if not settings.exists() or settings.read_bytes() != text:
        with write_aside(settings) as aside:
            aside.write_bytes(text)


def _finish(project: Project, state: checkpoint.State, record: dict[str, Any], step: int) -> None:
    """Write what was trained, as pipelines load it, unless it is there as it should be; last, that it is whole."""
    folder, layers = project.run_folder, adapter_layers(state.denoiser)
    if not checkpoint.same_layers(folder / LORA_NAME, layers):
        save_adapter(folder, project, state.denoiser, layers, record)
    if state.average is not None:
        with averaged(state.average, state.parameters):
            save_adapter(folder / "ema", project, state.denoiser, adapter_layers(state.denoiser), record)
    with write_aside(folder / FINISHED) as aside:
        aside.write_text(json.dumps({"step": step}))
