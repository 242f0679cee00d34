"""musubi-tuner's caches: one safetensors for each target, its controls included, and one for each caption.

Facts: `<name>_<W>x<H>_<architecture>.safetensors` has the size of the image in its name, `latents_[1x]<h>x<w>_<dtype>`
in it is the target, `latents_control_[<n>_][1x]<h>x<w>_<dtype>` a control, whose geometry is not recorded. A target is
scaled to cover its bucket, averaged when it gets smaller and by Pillow's Lanczos when larger, and cropped in the
middle; there is no option. `<name>_<architecture>_te.safetensors` has its caption in the metadata.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from safetensors import SafetensorError, safe_open
from torch import Tensor

from prep.geometry import Size
from prep.importing.found import ABSENT, FoundLatent, FoundText, Slot, Wanted, unreadable

_TARGET = re.compile(r"latents_(?:1x)?(\d+)x(\d+)_[a-z0-9]+")
_CONTROL = re.compile(r"latents_control_(?:(?P<number>\d+)_)?(?:1x)?(?P<height>\d+)x(?P<width>\d+)_[a-z0-9]+")
_FAULTS = (OSError, ValueError, SafetensorError)


class Musubi:
    """A folder of musubi-tuner's caches."""

    def __init__(self, folder: Path, architecture: str, scale: int) -> None:
        self._scale = scale
        latent = re.compile(rf"(.+)_(\d{{4,}})x(\d{{4,}})_{re.escape(architecture)}\.safetensors")
        self._latents: dict[tuple[str, Size], list[Path]] = defaultdict(list)
        self._texts: list[Path] = sorted(folder.rglob(f"*_{architecture}_te.safetensors"))
        for path in sorted(folder.rglob(f"*_{architecture}.safetensors")):
            if named := latent.fullmatch(path.name):
                self._latents[named[1], (int(named[2]), int(named[3]))].append(path)
        self._captions: Mapping[str, list[Path]] | None = None

    def files(self) -> Sequence[Path]:
        """List the files of latents and of captions."""
        return [*(path for paths in self._latents.values() for path in paths), *self._texts]

    def slot(self, wanted: Wanted) -> Slot | str:
        """Find the file of a target's name and size; a reference is an entry of its target's file."""
        owner = wanted.target or wanted
        name = PurePosixPath(owner.picture.path).stem
        found = self._latents.get((name, owner.size), ())
        if len(found) > 1:
            return f"ambiguous: {len(found)} files of that name; name the folder of one dataset, and --dataset"
        if not found:
            return ABSENT
        if wanted.target is None:
            return Slot(found[0])
        own = PurePosixPath(wanted.picture.path).stem
        if not re.fullmatch(rf"{re.escape(name)}(_\d+)?", own):
            return "not its control: the name of the reference is not that of its target"
        return Slot(found[0], f"control {wanted.place}")

    def latent(self, wanted: Wanted, slot: Slot) -> FoundLatent | str:
        """Read a target or a control."""
        try:
            with safe_open(slot.file, framework="pt") as file:
                keys = list(file.keys())
                key = _control(keys, wanted.place) if slot.entry else _only(keys)
                values = file.get_tensor(key) if key is not None else None
        except _FAULTS as fault:
            return unreadable(fault)
        if values is None:
            return f"unknown content: {', '.join(sorted(keys))}"
        if slot.entry:
            return FoundLatent(values, None, None, None, frozenset())
        return self._target(wanted.size, values)

    def _target(self, original: Size, values: Tensor) -> FoundLatent:
        """Derive what was done to a target from its size and that of its latent."""
        bucket = (values.shape[-1] * self._scale, values.shape[-2] * self._scale)
        factor = max(bucket[0] / original[0], bucket[1] / original[1])
        resized = int(original[0] * factor + 0.5), int(original[1] * factor + 0.5)
        crop = (resized[1] - bucket[1]) // 2, (resized[0] - bucket[0]) // 2
        method = "pillow-lanczos" if factor > 1 else "opencv-area"
        return FoundLatent(values, original, resized, crop, frozenset({method}))

    def text(self, prompt: str) -> FoundText | str:
        """Find a prompt among the captions that the files record."""
        if self._captions is None:
            self._captions = _captions(self._texts)
        paths = self._captions.get(prompt)
        if paths is None:
            return ABSENT
        try:
            with safe_open(paths[0], framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dictionary
        except _FAULTS as fault:
            return unreadable(fault)
        return _embeds(paths, tensors)


def _only(keys: Sequence[str]) -> str | None:
    found = [key for key in keys if _TARGET.fullmatch(key)]
    return found[0] if len(found) == 1 else None


def _control(keys: Sequence[str], place: int) -> str | None:
    """Find the n-th control; one without a number is the only one."""
    found = {int(named["number"] or 0): key for key in keys if (named := _CONTROL.fullmatch(key))}
    return found.get(place)


def _captions(paths: Sequence[Path]) -> Mapping[str, list[Path]]:
    """Read the captions of files; one that cannot be read has none."""
    captions: dict[str, list[Path]] = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                caption = (file.metadata() or {}).get("caption1")
        except _FAULTS:
            continue
        if caption is not None:
            captions.setdefault(caption, []).append(path)
    return captions


def _embeds(paths: Sequence[Path], tensors: Mapping[str, Tensor]) -> FoundText | str:
    """Tell the rows of tokens from the pooled embed by their dimensions."""
    floats = [tensor for tensor in tensors.values() if tensor.is_floating_point()]
    rows, pooled = [one for one in floats if one.ndim == 2], [one for one in floats if one.ndim == 1]
    if len(rows) != 1 or len(pooled) > 1:
        return f"unknown content: {', '.join(sorted(tensors))}"
    return FoundText(tuple(paths), rows[0], pooled[0] if pooled else None)
