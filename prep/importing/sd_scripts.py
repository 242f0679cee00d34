"""sd-scripts' caches: one `.npz`, in newer versions `.safetensors`, beside each image.

Facts: `<name>_<W>x<H>_<family>.npz` with the size of the image; `latents_<h>x<w>`, `original_size_<h>x<w>` for each
resolution. `crop_ltrb` is a condition for SDXL that follows from the sizes, not the crop that was taken, which may have
been drawn; the size before the crop depends on options that are not recorded. Caches of captions do not record theirs.
"""

import re
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from prep.geometry import Size
from prep.importing.found import ABSENT, FoundLatent, FoundText, Slot, Wanted, unreadable

_FAULTS = (OSError, ValueError, KeyError, EOFError, SafetensorError, zipfile.BadZipFile, zlib.error)


class SdScripts:
    """A folder of images with sd-scripts' caches beside them."""

    def __init__(self, folder: Path, family: str, scale: int) -> None:
        self._folder, self._scale = folder, scale
        latent = re.compile(rf"(.+)_(\d{{4,}})x(\d{{4,}})_{re.escape(family)}\.(npz|safetensors)")
        self._latents: dict[tuple[str, Size], list[Path]] = defaultdict(list)
        for path in sorted(folder.rglob(f"*_{family}.*")):
            if named := latent.fullmatch(path.name):
                self._latents[named[1], (int(named[2]), int(named[3]))].append(path)
        self._texts = sorted(
            path for path in folder.rglob(f"*_{family}_te.*") if path.suffix in (".npz", ".safetensors")
        )

    def files(self) -> Sequence[Path]:
        """List the files of latents and of captions."""
        return [*(path for paths in self._latents.values() for path in paths), *self._texts]

    def slot(self, wanted: Wanted) -> Slot | str:
        """Find the file of an image's name and size, in the folder that the image has below its root."""
        path = PurePosixPath(wanted.picture.path)
        found = self._latents.get((path.stem, wanted.size), [])
        beside = [one for one in found if one.parent == self._folder / path.parent]
        if not beside and len(found) > 1:
            return f"ambiguous: {len(found)} files of that name; name the folder of one dataset, and --dataset"
        found = sorted(beside or found)
        return Slot(found[0]) if found else ABSENT

    def latent(self, wanted: Wanted, slot: Slot) -> FoundLatent | str:
        """Read the latent of the wanted resolution."""
        geometry = wanted.picture.geometry
        shape = f"{geometry.target_height // self._scale}x{geometry.target_width // self._scale}"
        try:
            read = _npz if slot.file.suffix == ".npz" else _safetensors
            values, original = read(slot.file, shape)
        except _FAULTS as fault:
            return unreadable(fault)
        if values is None:
            return f"another target size: no latent of {geometry.bucket}"
        same = original == wanted.size == (geometry.target_width, geometry.target_height)
        return FoundLatent(values, original, original if same else None, None, frozenset())

    def text(self, prompt: str) -> FoundText | str:
        """Say that there is none: a file does not tell its caption."""
        return "caption not recorded" if self._texts else ABSENT


def _npz(path: Path, shape: str) -> tuple[Tensor | None, Size | None]:
    with np.load(path, allow_pickle=False) as file:
        if f"latents_{shape}" not in file:
            return None, None
        size = file[f"original_size_{shape}"].tolist()
        return torch.from_numpy(file[f"latents_{shape}"]), (int(size[0]), int(size[1]))


def _safetensors(path: Path, shape: str) -> tuple[Tensor | None, Size | None]:
    with safe_open(path, framework="pt") as file:
        said = file.metadata() or {}
        keys = [key for key in file.keys() if re.fullmatch(rf"latents_{shape}_[a-z0-9_]+", key)]  # noqa: SIM118
        if len(keys) != 1:
            return None, None
        return file.get_tensor(keys[0]), (int(said["width"]), int(said["height"]))
