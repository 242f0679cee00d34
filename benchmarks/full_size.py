"""A task of the pool that benchmarks/pairs.py times: degrade a photograph at its own size, and send nothing back.

It has a module of its own, for workers import the module of their task, and should have no more than a command's have.
"""

from prep.degrade import apply
from prep.pixels import Refusal, upright


def degraded(picture):
    """Return the shape of a picture degraded before resize and crop."""
    decoded = upright(picture)
    if isinstance(decoded, Refusal):
        return decoded
    return apply(decoded, picture.steps, picture.seed).shape
