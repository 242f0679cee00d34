"""The `train` command: a thin wrapper over `train.loop.run`, imported late so that `--help` answers at once."""

import os
from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from schemas.console import report, reporting, warn

app = typer.Typer(
    name="train",
    help="Train a LoRA from cached pairs.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


ProjectPath: TypeAlias = Annotated[
    Path, typer.Argument(metavar="PROJECT", help="Folder that holds config.json, or the path of such a file.")
]
Workspace: TypeAlias = Annotated[Path | None, typer.Option(help="Folder of prep's products.  [default: PROJECT/work]")]
Root: TypeAlias = Annotated[
    Path | None, typer.Option(help="Folder that relative paths start from.  [default: the folder of config.json]")
]
Settings: TypeAlias = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Replace an option of config.json; repeatable."),
]
AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="Print one JSON summary on stdout.")]
Workers: TypeAlias = Annotated[int | None, typer.Option(min=1, metavar="N", help="Threads on a CPU.")]


@app.callback()
def _commands() -> None:
    """Train a LoRA from cached pairs, and look at what it does."""


@app.command(
    short_help="Train a LoRA; resumes by itself.",
    epilog="Example:  train run my-project --set learning_rate=2e-4 --set tracker_run_name=higher-rate;  on 2 GPUs:  "
    "torchrun --nproc-per-node 2 -m train.cli run my-project",
)
def run(
    project: ProjectPath,
    workspace: Workspace = None,
    root: Root = None,
    settings: Settings = None,
    json: AsJson = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and say what would be done.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="Stop after N steps of this run.")] = None,
    workers: Workers = None,
) -> None:
    """Train; the same command resumes a run that was stopped. Ctrl-C finishes the step and writes a checkpoint."""
    with reporting():
        from families import open_project
        from train.loop import run as train

        talks = os.environ.get("RANK", "0") == "0"  # of several processes the first
        opened = open_project(project, root=root, workspace=workspace, overrides=settings or ())
        warn(opened.warnings if talks else ())
        summary = train(opened, limit=limit, workers=workers, dry_run=dry_run)
        if talks:
            report(summary, json)


@app.command(
    short_help="Sample a picture with a trained LoRA.",
    epilog="Example:  train sample my-project --image blurred.jpg --prompt 'sharpen this photo' --without",
)
def sample(
    project: ProjectPath,
    prompt: Annotated[str, typer.Option(help="What the picture shows, or what is to be done to the image.")],
    images: Annotated[
        list[Path] | None, typer.Option("--image", metavar="FILE", help="Picture to edit, or to refer to; repeatable.")
    ] = None,
    lora: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH", help="LoRA or LoKr file, its folder, or a checkpoint.  [default: the run folder's]"
        ),
    ] = None,
    scale: Annotated[float, typer.Option(help="Strength of the LoRA.")] = 1.0,
    without: Annotated[
        bool, typer.Option("--without", help="Sample without the LoRA too, and set both side by side.")
    ] = False,
    negative: Annotated[
        str | None, typer.Option(help="Prompt to lead away from.  [default: validation_negative_prompt]")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**64 - 1, help="Seed of the noise.  [default: validation_seed]")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Denoising steps.  [default: validation_num_inference_steps]")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(min=0, help="Guidance of the picture.  [default: validation_guidance]")
    ] = None,
    guidance_real: Annotated[
        float | None,
        typer.Option(min=0, help="True guidance, twice the time; 1 is none.  [default: validation_guidance_real]"),
    ] = None,
    width: Annotated[
        int | None,
        typer.Option(min=1, help="Pixels.  [default: the first image's shape at the area of validation_resolution]"),
    ] = None,
    height: Annotated[int | None, typer.Option(min=1, help="Pixels.")] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="PNG to write; if it exists, a number is added.  [default: samples/ of the run folder]"
        ),
    ] = None,
    workspace: Workspace = None,
    root: Root = None,
    settings: Settings = None,
    json: AsJson = False,
    workers: Workers = None,
) -> None:
    """Sample one picture with a trained LoRA; without --image from the prompt alone."""
    with reporting():
        from families import open_project
        from train.sample import Request
        from train.sample import sample as sampled

        opened = open_project(project, root=root, workspace=workspace, overrides=settings or ())
        warn(opened.warnings)
        request = Request(
            prompt, tuple(images or ()), lora, scale, negative, seed, steps, guidance, guidance_real, width, height,
            output, without,
        )  # fmt: skip
        report(sampled(opened, request, workers=workers), json)


@app.command(
    short_help="Estimate memory and time of ways to train.",
    epilog="Example:  train plan my-project --memory-budget-gib 24;  before there is a card:  "
    "train plan my-project --device 'RTX 4090' --pixels 1024 --references 1",
)
def plan(
    project: ProjectPath,
    pixels: Annotated[
        int | None, typer.Option(min=16, help="Side of the pictures.  [default: what is paired, else 1024]")
    ] = None,
    references: Annotated[int | None, typer.Option(min=0, help="References of each.  [default: as is paired]")] = None,
    budget: Annotated[
        float | None,
        typer.Option("--memory-budget-gib", metavar="GIB", help="Plan for so much.  [default: memory_budget_gib]"),
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="Plan for another accelerator, as 'RTX 4090'.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Show choices that gain nothing, too.")] = False,
    workspace: Workspace = None,
    root: Root = None,
    settings: Settings = None,
    json: AsJson = False,
) -> None:
    """Estimate memory and time of the ways to train, and name the fastest that fits; no weights are loaded."""
    with reporting():
        from families import open_project
        from train.planner import Asked
        from train.planner import plan as planned

        overrides = [*(settings or ()), *([] if budget is None else [f"memory_budget_gib={budget}"])]
        opened = open_project(project, root=root, workspace=workspace, overrides=overrides)
        warn(opened.warnings)
        report(planned(opened, Asked(pixels, references, device, everything)), json)


@app.command(
    short_help="Measure steps on random weights and data.",
    epilog="Example:  train bench --family flux2 --flavour klein-9b --row 'bf16:' --row 'compiled: "
    "dynamo_backend=inductor,gradient_checkpointing=false'",
)
def bench(
    project: Annotated[
        Path | None, typer.Argument(metavar="[PROJECT]", help="Take the options and the model of a project.")
    ] = None,
    family: Annotated[str | None, typer.Option(help="Model family, without a project.  [default: flux]")] = None,
    flavour: Annotated[str | None, typer.Option(help="Flavour of the family.  [default: the family's own]")] = None,
    pixels: Annotated[
        int | None, typer.Option(min=16, help="Side of the pictures.  [default: most of the project's, or 1024]")
    ] = None,
    references: Annotated[
        int | None, typer.Option(min=0, help="References of each.  [default: as the project's, or 1]")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Samples a step.  [default: train_batch_size]")] = None,
    steps: Annotated[int, typer.Option(min=1, metavar="N", help="Steps that are measured.")] = 6,
    warmup: Annotated[int, typer.Option(min=1, metavar="N", help="Steps before these.")] = 2,
    tiny: Annotated[bool, typer.Option("--tiny", help="A small network of the model's kind.")] = False,
    rows: Annotated[
        list[str] | None,
        typer.Option("--row", metavar="NAME:KEY=VALUE,...", help="Measure a setting of its own; repeatable."),
    ] = None,
    workspace: Workspace = None,
    root: Root = None,
    settings: Settings = None,
    json: AsJson = False,
) -> None:
    """Take steps on random weights and random data, and tell time, memory and utilisation; nothing is downloaded."""
    with reporting():
        from schemas.errors import UserError
        from train.bench import Request, parse_row
        from train.bench import bench as measured

        if project is not None and (family or flavour):
            raise UserError("--family and --flavour are for a bench without a project, which has its own")
        request = Request(
            project, root, workspace, family, flavour, tiny, pixels, references, batch, steps, warmup,
            tuple(settings or ()), tuple(map(parse_row, rows or ())),
        )  # fmt: skip
        summary = measured(request)
        report(summary, json)
        if summary.failed:
            raise SystemExit(1)


def main() -> None:
    """Run the command line."""
    app(prog_name="train")


if __name__ == "__main__":
    main()
