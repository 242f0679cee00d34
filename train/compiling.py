"""Compiled blocks: the passes of all blocks of a kind are compiled once for each way they differ in, then never.

They differ in sizes, the first or any, in batches of one or more, and in whether gradients are asked for.

What hooks into blocks (routes, group offload) runs outside of what is compiled; recomputation, where it is inside.
Whether there is a compiler that works is tried before anything is loaded, by `check_compiler`.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters

from families.compiled import keep_compiled
from families.protocol import Family
from schemas.console import log
from schemas.errors import UserError, first_line
from schemas.trainer import TrainerConfig

# Of all kinds of blocks, which count as one: three of them, one size or any, batches of one or more, training or
# evaluation, contiguous or narrowed inputs are 48; past the limit PyTorch computes as if nothing had been compiled.
_MOST_GRAPHS = 64
# What compilers of devices ask for, and what installs it.
_NEEDS = {"cuda": "gcc and Python's headers (apt install gcc python3-dev)", "cpu": "g++ (apt install g++)"}


def check_compiler(config: TrainerConfig, kept: Path, device: torch.device) -> None:
    """Raise UserError if what the options ask to compile with does not work here: something tiny is compiled.

    It is kept in a folder like all else that compilers make, which the first time includes what they ask the machine.
    """
    if config.dynamo_backend == "no":
        return
    keep_compiled(kept)
    before = counters["stats"]["unique_graphs"]
    try:
        with torch.no_grad():
            torch.compile(_tiny, backend=config.dynamo_backend)(torch.ones(16, device=device))
    except torch.OutOfMemoryError:
        raise
    except Exception as fault:
        raise UserError(
            f"dynamo_backend: {config.dynamo_backend} cannot compile here ({_said(fault)}); install "
            f"{_NEEDS.get(device.type, _NEEDS['cpu'])}, or set dynamo_backend: no, which does without"
        ) from fault
    finally:
        counters["stats"]["unique_graphs"] = before  # it is no block


def _tiny(values: Tensor) -> Tensor:
    return values.sin() + 1


@contextmanager
def able_to_compile(config: TrainerConfig) -> Iterator[None]:
    """Turn a compiler's fault into a UserError that names the option; memory that is full stays what it is."""
    try:
        yield
    except BackendCompilerFailed as fault:
        if isinstance(fault.inner_exception, torch.OutOfMemoryError):
            raise fault.inner_exception from fault
        raise UserError(
            f"dynamo_backend: {config.dynamo_backend} cannot compile the blocks ({_said(fault)}); dynamo_backend: no "
            "does without, and the run can be resumed with it"
        ) from fault


def _said(fault: Exception) -> str:
    """Return one line of what a compiler said: of one that ran, the first that tells of an error."""
    own = getattr(fault, "inner_exception", fault)
    output = getattr(own, "output", None)
    errors = (line.strip() for line in str(output).splitlines() if "error" in line)
    return next(errors, first_line(own, 200))[:200]


def compile_blocks(
    family: Family, denoiser: nn.Module, kept: Path, backend: str = "inductor", mode: str = "default"
) -> None:
    """Have every block compiled when it first runs; what compilers make is kept in a folder for the next run.

    Under `max-autotune` kernels are tuned one coordinate at a time; products stay those of the libraries.
    """
    options: Any = {"coordinate_descent_tuning": True} if mode == "max-autotune" else None
    keep_compiled(kept)
    log.info("blocks are compiled when a step first needs them, which takes a minute or more; kept in %s", kept)
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)  # what it advises of checkpoints is so
    logging.getLogger("torch._dynamo.convert_frame").addFilter(_tell_limit)
    torch._dynamo.config.recompile_limit = _MOST_GRAPHS
    for block in family.blocks(denoiser):
        block.module.forward = torch.compile(_dense(block.module.forward), backend=backend, options=options)


def _tell_limit(record: logging.LogRecord) -> bool:
    """Say in one line what PyTorch says in five when it stops compiling; all else that it says passes."""
    if "hit config." not in str(record.msg):
        return True
    log.warning(
        "blocks differ in more ways than the %d that are compiled: what is new runs as it is, slower; fewer sizes of "
        "pictures help, or dynamo_backend: no", _MOST_GRAPHS
    )  # fmt: skip
    return False


def _dense(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a pass whose outputs are tensors of their own.

    Text and images that are parts of one tensor would leave what is compiled as views, and their gradients be put
    together outside of it: filled with zeros, copied and added.
    """

    @wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        return tuple(one.clone() for one in output) if isinstance(output, tuple) else output

    return call


def compiled_graphs() -> int:
    """Count what was compiled in this process: a number that goes on growing says that something recompiles."""
    return int(counters["stats"]["unique_graphs"])
