"""Compiled blocks: the passes of all blocks of a kind are compiled once, and again for sizes that vary, then never.

What hooks into blocks (routes, group offload) runs outside of what is compiled; recomputation, where it is inside.
"""

import logging
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._dynamo.utils import counters

from families.compiled import keep_compiled
from families.protocol import Family
from schemas.console import log

_MOST_GRAPHS = 32  # of all kinds of blocks, of contiguous and of narrowed inputs, each for one size and for any


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
    torch._dynamo.config.recompile_limit = _MOST_GRAPHS
    for block in family.blocks(denoiser):
        block.module.forward = torch.compile(_dense(block.module.forward), backend=backend, options=options)


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
