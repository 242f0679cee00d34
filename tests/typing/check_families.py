"""Read by mypy, never run: every family's module offers what the protocol asks for."""

from families import flux
from families.protocol import Family

FAMILIES: tuple[Family, ...] = (flux,)
