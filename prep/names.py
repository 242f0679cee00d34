"""Names of files that every file system takes, and no two of which are one where case does not count.

`names_of` is the way in.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

from schemas.rows import PairRow

_LONGEST = 100  # bytes of a name: trainers append to it what their caches are named by
_UNSAFE = re.compile(r'[\x00-\x1f\x7f\\:*?"<>|]')  # in names, on some file system
_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)")  # names that Windows keeps for itself
_LIKE_OURS = re.compile(r"-[0-9a-f]{16}$")  # what makes a name its own


def names_of(rows: Sequence[PairRow]) -> list[str]:
    """Name the files of pairs: after their targets, with the sample's id where that is not safe or not unique."""
    spelled = [_spelled(row) for row in rows]
    folded = Counter(_folded(name) for name, _ in spelled)
    return [
        f"{name}-{row.sample_id}" if altered or folded[_folded(name)] > 1 or _numbers(name, folded) else name
        for row, (name, altered) in zip(rows, spelled, strict=True)
    ]


def _spelled(row: PairRow) -> tuple[str, bool]:
    """Return a target's path as one name that every file system takes, and whether that changed more than folders."""
    path = PurePosixPath(unicodedata.normalize("NFC", row.target_path))
    plain = str(path.with_suffix("")).replace("/", "-")
    name = _UNSAFE.sub("-", plain).strip(" .")
    while len(name.encode()) > _LONGEST:
        name = name[:-1]
    altered = name != plain or _DEVICES.match(name.casefold()) is not None or _LIKE_OURS.search(name) is not None
    name = name.rstrip(" .") or "picture"
    return (f"{name}-v{row.variant}" if row.variants > 1 else name), altered


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _numbers(name: str, folded: Mapping[str, int]) -> bool:
    """Tell a name that reads as a numbered reference of another: musubi-tuner would give it to both."""
    stem, _, number = _folded(name).rpartition("_")
    return number.isdigit() and stem in folded
