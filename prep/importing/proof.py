"""Whether what another trainer recorded of a latent is what its key here promises: pure functions, no file is read.

`disproved` is the way in. The rules are those of docs/import.md.
"""

import torch

from prep.images import looks
from prep.importing.found import FoundLatent, Wanted

_OWN_RESAMPLING = "vips-lanczos3"  # unless a view says otherwise


def disproved(wanted: Wanted, found: FoundLatent, channels: int, scale: int) -> str | None:
    """Return why a found latent is not proven to be the wanted one; None if it is, but for the encoder."""
    return _shape(wanted, found, channels, scale) or _geometry(wanted, found) or _values(found)


def _shape(wanted: Wanted, found: FoundLatent, channels: int, scale: int) -> str | None:
    geometry, shape = wanted.picture.geometry, tuple(found.values.shape)
    if len(shape) != 3 or shape[0] != channels:
        return f"another shape: {'×'.join(map(str, shape))}, latents here have {channels} channels"
    size = (shape[2] * scale, shape[1] * scale)
    target = (geometry.target_width, geometry.target_height)
    return None if size == target else f"another target size: {_spelled(size)}, here it is {_spelled(target)}"


def _geometry(wanted: Wanted, found: FoundLatent) -> str | None:
    geometry = wanted.picture.geometry
    resized = (geometry.intermediary_width, geometry.intermediary_height)
    target = (geometry.target_width, geometry.target_height)
    if found.original is not None and found.original != wanted.size:
        return f"another image: it had {_spelled(found.original)}, here it has {_spelled(wanted.size)}"
    if found.original is None and found.resized is None and wanted.size == resized == target:
        return None  # of a picture that has its target's size there is nothing to resize or to crop
    if found.resized is None:
        return "resize not recorded"
    if found.resized != resized:
        return f"another resize: to {_spelled(found.resized)}, here to {_spelled(resized)}"
    if resized != target:
        crop = (geometry.crop_top, geometry.crop_left)
        if found.crop is None:
            return "crop not recorded"
        if found.crop != crop:
            return f"another crop: top {found.crop[0]} left {found.crop[1]}, here top {crop[0]} left {crop[1]}"
    own = resampling_of(wanted)
    if wanted.size != resized and not own & found.resampling:
        theirs = " or ".join(sorted(found.resampling)) or "an unknown method"
        return f"resampled otherwise: by {theirs}, here by {min(own)}"
    return None


def _values(found: FoundLatent) -> str | None:
    return None if torch.isfinite(found.values.float()).all() else "not finite: it holds values that are no numbers"


def resampling_of(wanted: Wanted) -> frozenset[str]:
    """Name the methods that give the pixels of our resize: that of the view, and others' that are equal to it."""
    method = str(looks(wanted.picture.view).get("interpolation", _OWN_RESAMPLING))
    geometry = wanted.picture.geometry
    larger = geometry.intermediary_width >= wanted.size[0] and geometry.intermediary_height >= wanted.size[1]
    return frozenset({method, "pillow-lanczos"} if larger and method == _OWN_RESAMPLING else {method})


def _spelled(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
