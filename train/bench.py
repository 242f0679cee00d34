"""`train bench`: steps of real runs on random weights and random shards, of any model, size and options.

Each row is a run of `train.loop` in a process of its own, for a kernel that fails spoils its process. What a row tells
is read from what the run itself writes.
"""

import json
import multiprocessing
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from families import open_project
from families.runtime import default_device, family_of
from families.shapes import config_of, random_denoiser
from schemas.console import log
from schemas.errors import ConfigError, UserError
from schemas.loading import literal
from schemas.project import TINY, Project
from schemas.timed import BenchRow, BenchSummary
from train.costs import Costs, Sizes, costs_of, shaped, tokens_of
from train.devices import device_named
from train.loop import run
from train.sizes import names, sizes_of, square
from train.step import in_half
from train.synthetic import synthetic_project

CPU = torch.device("cpu")
_ROW = re.compile(r",\s*(?=\w+=)")  # between settings of a row: values may have commas
_LONGEST = 300  # signs of a reason
_VERSIONS = ("pairline", "torch", "diffusers", "peft", "optimum-quanto")


@dataclass(frozen=True, slots=True)
class Row:
    """One setting that is measured."""

    name: str
    settings: tuple[str, ...]  # key=value


@dataclass(frozen=True, slots=True)
class Request:
    """What is measured."""

    project: Path | None = None  # whose options and checkpoint's configuration are taken
    root: Path | None = None
    workspace: Path | None = None
    family: str | None = None  # or that of a model
    flavour: str | None = None
    tiny: bool = False  # its tiny checkpoint's configuration
    pixels: int | None = None  # side of squares; null is what a project's samples are mostly
    references: int | None = None
    batch: int | None = None
    steps: int = 6
    warmup: int = 2  # steps before those that count
    settings: tuple[str, ...] = ()  # key=value, of all rows
    rows: tuple[Row, ...] = ()


@dataclass(frozen=True, slots=True)
class _Measured:
    """What a row's process gives back."""

    row: BenchRow
    device: str


def parse_row(text: str) -> Row:
    """Read `name: key=value,key=value`; raises UserError if it is something else."""
    name, colon, rest = text.partition(":")
    settings = tuple(one.strip() for one in _ROW.split(rest) if one.strip())
    if not colon or not name.strip() or not all("=" in one for one in settings):
        raise UserError(f"--row {text}: must be 'name: key=value,key=value', for example 'int8: base_model_precision="
                        "int8-quanto'")  # fmt: skip
    return Row(name.strip(), settings)


def bench(request: Request) -> BenchSummary:
    """Measure every row in a process of its own; one that fails is a row with the reason.

    Raises UserError if the request itself cannot be met.
    """
    rows = request.rows or (Row("as set", ()),)
    if twice := [row.name for number, row in enumerate(rows) if row.name in {one.name for one in rows[:number]}]:
        raise UserError(f"--row: two rows are called {twice[0]!r}; give each a name of its own")
    with TemporaryDirectory() as folder:
        project = _project(request, Path(folder), ())
        sizes, config = _sizes(request, project), project.trainer
        summary = BenchSummary(
            family=config.model_family,
            flavour=project.flavour,
            width=sizes.target[0],
            height=sizes.target[1],
            references=names(sizes.references),
            tokens=tokens_of(project, sizes),
            batch=config.train_batch_size,
            steps=request.steps,
            warmup=request.warmup,
            device="",
            versions={name: version(name) for name in _VERSIONS},
            options=config.acting("train") | {"model_flavour": project.flavour},
            rows=(),
        )
    measured = []
    for row in rows:
        measured.append(_alone(request, sizes, row))
        log.info("%s: %s", row.name, _told(measured[-1].row))
    device = next((one.device for one in measured if one.device), "")
    return replace(summary, device=device, rows=tuple(one.row for one in measured))


def _project(request: Request, folder: Path, settings: Sequence[str]) -> Project:
    """Open the project that is measured, or one of a model's own options, in a folder."""
    overrides = [*request.settings, *settings]
    if request.tiny:
        overrides.append(f"pretrained_model_name_or_path={TINY}")
    if request.batch is not None:
        overrides.append(f"train_batch_size={request.batch}")
    if request.project is not None:
        return open_project(request.project, root=request.root, workspace=request.workspace, overrides=overrides)
    options = {"model_family": request.family, "model_flavour": request.flavour}
    named = {name: value for name, value in options.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(named))
    (folder / "multidatabackend.json").write_text(json.dumps([{"id": "none", "instance_data_dir": "."}]))
    try:
        return open_project(folder, overrides=overrides)
    except ConfigError as fault:  # which names that folder, and nobody knows it
        raise UserError("; ".join(str(replace(one, file="options")) for one in fault.faults)) from fault


def _sizes(request: Request, project: Project) -> Sizes:
    """Return the sizes of samples: as asked, else what the project's are mostly, else of one reference."""
    asked = request.pixels is not None or request.references is not None
    if request.project is None or asked:
        own = request.project is not None
        return square(project, request.pixels, request.references if own or request.references is not None else 1)
    try:
        return sizes_of(project)[1]
    except UserError as fault:
        log.warning("%s; squares are measured", fault)
        return square(project, None, None)


def _alone(request: Request, sizes: Sizes, row: Row) -> _Measured:
    """Measure a row in a new process."""
    spawning = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawning) as pool:
        try:
            return pool.submit(_measured, request, sizes, row).result()
        except BrokenProcessPool:
            said = "its process died before it could say why: the reason is above, or the machine's memory was full"
            return _Measured(BenchRow(row.name, _given(row), said), "")


def _measured(request: Request, sizes: Sizes, row: Row) -> _Measured:
    """Run a row's steps in this process; whatever goes wrong is its reason."""
    device = default_device()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    try:
        with TemporaryDirectory() as folder, TemporaryDirectory() as made:
            project = _project(request, Path(folder), row.settings)
            return _Measured(_taken(request, synthesised(project, Path(made), sizes, request), sizes, row), name)
    except Exception as fault:  # noqa: BLE001 - libraries raise what they like; a row tells it, and others go on
        kind = "" if isinstance(fault, UserError) else f"{type(fault).__name__}: "
        lines = str(fault).strip().splitlines()
        if isinstance(fault, ConfigError):  # the first line names a folder that is gone by now
            lines = ["; ".join(str(replace(one, file="options")) for one in fault.faults)]
        said = kind + next(iter(lines), "")
        return _Measured(BenchRow(row.name, _given(row), said[:_LONGEST]), name)


def synthesised(project: Project, folder: Path, sizes: Sizes, request: Request) -> Project:
    """Make the project that is run: enough samples for two steps, shown again and again."""
    a_step = project.trainer.train_batch_size * project.trainer.gradient_accumulation_steps
    return synthetic_project(project, folder, sizes, 2 * a_step, request.warmup + request.steps)


def _taken(request: Request, project: Project, sizes: Sizes, row: Row) -> BenchRow:
    """Run a project's steps and make a row of what the run wrote down."""
    config, device, shapes = project.trainer, default_device(), config_of(project)

    def load(_: Path, dtype: torch.dtype, place: torch.device) -> nn.Module:
        return random_denoiser(family_of(project), shapes, dtype, place)

    told = run(project, load=load)
    lines = (project.run_folder / "metrics.jsonl").read_text().splitlines()
    steps = [one for one in map(json.loads, lines) if "seconds" in one and "loss" in one]
    counted = steps[request.warmup :]
    seconds, waited = [one["seconds"] for one in counted], sum(one["data_wait"] for one in counted)
    usual = median(seconds)
    costs = costs_of(shaped(project), sizes, config.train_batch_size)
    accumulated = config.gradient_accumulation_steps
    return BenchRow(
        name=row.name,
        settings=_given(row),
        seconds_per_step=usual,
        tokens_per_second=costs.tokens * accumulated / usual,
        utilisation=_utilisation(project, costs, usual / accumulated, device),
        peak_gib=told.peak_memory_gib,
        data_wait=waited / max(sum(seconds), 1e-9),
        compile_seconds=max(0.0, steps[0]["seconds"] - usual),
        loss=told.loss,
        trainable_parameters=told.trainable_parameters,
    )


def _utilisation(project: Project, costs: Costs, seconds: float, device: torch.device) -> float | None:
    """Return the share of a pass's time that the accelerator would take at its peak, None if that is not known.

    What has to be computed is counted, not what is computed twice; frozen products of fp8-torchao at the peak of fp8.
    """
    known = device_named(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if known is None or not in_half(project.trainer):
        return None
    quick = project.trainer.base_model_precision == "fp8-torchao" and known.peak_fp8 is not None
    frozen = costs.forward_frozen + costs.backward_frozen
    peak = known.peak_fp8 if quick and known.peak_fp8 is not None else known.peak
    return (frozen / peak + (costs.operations - frozen) / known.peak) / seconds


def _given(row: Row) -> Mapping[str, Any]:
    """Return the values that a row sets, as config.json would have them."""
    pairs = (one.split("=", 1) for one in row.settings)
    return {name: literal(name, text) for name, text in pairs}


def _told(row: BenchRow) -> str:
    if row.seconds_per_step is None:
        return f"failed: {row.error}"
    peak = "" if row.peak_gib is None else f", {row.peak_gib:.1f} GiB"
    return f"{row.seconds_per_step:.3f} s/step{peak}"
