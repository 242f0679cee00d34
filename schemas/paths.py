"""Paths as configuration files spell them: of this machine, from a root, or URLs."""

import re
from pathlib import Path


def resolved(root: Path, path: str) -> Path:
    """Resolve a path of a configuration file: `~` is the home folder, a relative one starts from `root`."""
    try:
        return root / Path(path).expanduser()
    except RuntimeError:  # the home of a user that does not exist
        return root / path


def is_url(path: str) -> bool:
    """Tell a URL from a path of this machine."""
    return re.match(r"[a-z][a-z0-9+.-]+://", path) is not None
