"""A moving average of what is trained, by diffusers' EMAModel; evaluation and samples look at it through `averaged`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from diffusers.training_utils import EMAModel
from torch import nn

from schemas.trainer import TrainerConfig


def make_average(parameters: Sequence[nn.Parameter], config: TrainerConfig) -> EMAModel | None:
    """Start an average at the present weights, where `use_ema` asks for one.

    The first update takes the weights as they are; after n its decay is (1 + n) / (10 + n), at most `ema_decay`, so
    that a short run has an average too.
    """
    if not config.use_ema:
        return None
    together = all(parameter.is_cuda for parameter in parameters)  # a few kernels for all of them
    return EMAModel(parameters, decay=config.ema_decay, foreach=together)


def update(average: EMAModel | None, parameters: Sequence[nn.Parameter], step: int, config: TrainerConfig) -> None:
    """Take the weights after a step into the average, every `ema_update_interval` steps."""
    if average is not None and step % config.ema_update_interval == 0:
        average.step(parameters)


@contextmanager
def averaged(average: EMAModel | None, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Have the average in place of the trained weights for a while; without one, the weights themselves."""
    if average is None:
        yield
        return
    average.store(parameters)
    average.copy_to(parameters)
    try:
        yield
    finally:
        average.restore(parameters)
