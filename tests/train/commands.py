"""What tests of commands start in processes of their own; a module that such a process can import."""

import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

import prep.units
from families import open_project
from prep import encode
from prep.cli import app as prep_app
from train.cli import app as train_app
from train.loop import run

# What the server of forks imports, once for all tests: it finds what is installed, and not this module.
_LOADED = ("train.cli", "train.loop", "prep.cli", "prep.cache", "prep.encode", "families.flux")


def forked(target: Callable[..., object], *arguments: object) -> BaseProcess:
    """Return a process that will run a function of this module or of the product, its libraries loaded already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_LOADED))
    return context.Process(target=target, args=arguments)


def command(
    arguments: list[str],
    environment: dict[str, str],
    out: Path,
    err: Path,
    prepare: Callable[[], None] | None = None,
) -> None:
    """Be `train` or `prep`, whichever comes first, in a process whose libraries are loaded; it writes to files.

    `prepare` is called before.
    """
    os.environ.update(environment)
    for number, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    if prepare is not None:
        prepare()
    name, *others = arguments
    {"train": train_app, "prep": prep_app}[name](others, prog_name=name)


def run_with(folder: Path, overrides: list[str]) -> None:
    """Train a project whose options are replaced."""
    run(open_project(folder, overrides=overrides))


def single_rows() -> None:
    """Have units of work be single rows, encoded by one thread."""
    torch.set_num_threads(1)
    prep.units._MOST_ROWS = 1


def slow_single_rows() -> None:
    """Have units of work be single rows, each of which takes its time."""
    single_rows()
    launch = encode.Latents._launch

    def launched(*given: object) -> object:
        time.sleep(0.3)
        return launch(*given)

    encode.Latents._launch = launched


def small_files() -> None:
    """Have files of more than 60 kB refused, as by a disk that is full."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
