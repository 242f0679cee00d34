"""The `train` command: a thin wrapper over `train.loop.run`, imported late so that `--help` answers at once."""

import os
from pathlib import Path
from typing import Annotated

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


@app.callback()
def _commands() -> None:
    """Train a LoRA from cached pairs."""


@app.command(
    short_help="Train a LoRA; resumes by itself.",
    epilog="Examples:  train run my-project --set learning_rate=2e-4 --set tracker_run_name=higher-rate;  "
    "torchrun --nproc-per-node 2 -m train.cli run my-project",
)
def run(
    project: Annotated[
        Path, typer.Argument(metavar="PROJECT", help="Folder that holds config.json, or the path of such a file.")
    ],
    workspace: Annotated[Path | None, typer.Option(help="Folder of prep's products.  [default: PROJECT/work]")] = None,
    root: Annotated[
        Path | None, typer.Option(help="Folder that relative paths start from.  [default: the folder of config.json]")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Replace an option of config.json; repeatable."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON summary on stdout.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and say what would be done.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="Stop after N steps of this run.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, metavar="N", help="Threads on a CPU.")] = None,
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


def main() -> None:
    """Run the command line."""
    app(prog_name="train")


if __name__ == "__main__":
    main()
