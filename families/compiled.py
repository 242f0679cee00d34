"""Where compilers keep what they make: a second run finds it there."""

import os
from pathlib import Path

import torch
from torch._functorch import config as functorch
from torch._inductor import config as inductor
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from schemas.errors import UserError

# What `torch.nn.attention.sdpa_kernel` is in a graph -> what the key has of it besides its arguments.
_NAMING_KERNELS = {f"torch.nn.attention.{name}": torch.__version__ for name in ("_sdpa_kernel", "_backend_from_string")}
_KEPT_IN = "TORCHINDUCTOR_CACHE_DIR"


def keep_compiled(folder: Path) -> None:
    """Keep what compilers make, kernels of Triton too, in a folder, unless the environment names another.

    The compiler writes its usual place into the environment when it is imported; that counts as none. Graphs with
    autograd functions of our own are kept too: their bodies are part of the graph, and so of the key it is found by.
    So are those that name the kernel of attention, which is a constant in the graph. Raises UserError if there can be
    no such folder.
    """
    functorch.autograd_cache_allow_custom_autograd_functions = True
    marked = inductor.unsafe_marked_cacheable_functions
    inductor.unsafe_marked_cacheable_functions = {**marked, **_NAMING_KERNELS}
    if os.environ.get(_KEPT_IN, default_cache_dir()) == default_cache_dir():
        os.environ[_KEPT_IN] = str(folder)
    kept = Path(os.environ[_KEPT_IN])
    try:
        kept.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise UserError(
            f"{kept}: {fault.strerror}; what compilers make is kept there: name another folder by {_KEPT_IN}"
        ) from fault
