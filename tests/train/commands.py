"""What tests start in processes of their own; a module that such a process can import."""

import os
from pathlib import Path

from families import open_project
from train.cli import app
from train.loop import run


def command(arguments: list[str], environment: dict[str, str], out: Path, err: Path) -> None:
    """Be the `train` command, in a process whose libraries are loaded; what it says goes to files."""
    os.environ.update(environment)
    for number, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    app(arguments, prog_name="train")


def run_with(folder: Path, overrides: list[str]) -> None:
    """Train a project whose options are replaced."""
    run(open_project(folder, overrides=overrides))
