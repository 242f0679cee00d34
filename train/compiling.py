"""Compiled blocks: the passes of all blocks of a kind are compiled once, and again for sizes that vary, then never.

What hooks into blocks (routes, group offload) runs outside of what is compiled; recomputation, where it is inside.
"""

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._functorch import config as functorch
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from families.protocol import Family

_KEPT_IN = "TORCHINDUCTOR_CACHE_DIR"
_MOST_GRAPHS = 32  # of all kinds of blocks, of contiguous and of narrowed inputs, each for one size and for any


def compile_blocks(
    family: Family, denoiser: nn.Module, kept: Path, backend: str = "inductor", mode: str = "default"
) -> None:
    """Have every block compiled when it first runs; what compilers make is kept in a folder for the next run.

    Under `max-autotune` kernels are tuned one coordinate at a time; products stay those of the libraries.
    """
    options: Any = {"coordinate_descent_tuning": True} if mode == "max-autotune" else None
    keep_compiled(kept)
    torch._dynamo.config.recompile_limit = _MOST_GRAPHS
    for block in family.blocks(denoiser):
        block.module.forward = torch.compile(block.module.forward, backend=backend, options=options)


def keep_compiled(folder: Path) -> None:
    """Keep what compilers make, kernels of Triton too, in a folder, unless the environment names another.

    The compiler writes its usual place into the environment when it is imported; that counts as none. Graphs with
    autograd functions of our own are kept too: their bodies are part of the graph, and so of the key it is found by.
    """
    functorch.autograd_cache_allow_custom_autograd_functions = True
    if os.environ.get(_KEPT_IN, default_cache_dir()) == default_cache_dir():
        os.environ[_KEPT_IN] = str(folder)


def compiled_graphs() -> int:
    """Count what was compiled in this process: a number that goes on growing says that something recompiles."""
    return int(counters["stats"]["unique_graphs"])
