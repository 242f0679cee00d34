"""SimpleTuner's caches: a `.pt` for each latent and each prompt, geometry in JSON files beside the images.

Facts of version 4.10: a latent is `<folders of the image>/<SHA-256 of its name without extension>.pt`, a bare tensor,
an embed `<MD5 of the prompt>-<family>.pt`, a dictionary; either may be gzipped. A crop at random is drawn anew when the
latent is made, and the recorded place is another's. Files are read without running what a pickle may ask for.
"""

import gzip
import io
import json
import pickle
import re
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from hashlib import md5, sha256
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from prep.geometry import Size
from prep.importing.found import ABSENT, FoundLatent, FoundText, Slot, Wanted, unreadable

_METADATA = "aspect_ratio_bucket_metadata_{}.json"  # of a dataset: path -> sizes and crop of an image
_INDICES = "aspect_ratio_bucket_indices_{}.json"  # of a dataset: its configuration, among others
_RESAMPLING = frozenset({"opencv-linear", "pillow-lanczos"})  # by whether sizes came from memory or from the JSON file
_FAULTS = (
    *(OSError, EOFError, RuntimeError, ValueError, LookupError, TypeError, AttributeError),
    *(pickle.UnpicklingError, zlib.error, zipfile.BadZipFile),
)
_SETTLED = ("center", "centre", "corner")  # styles of crops that are where the metadata says


class SimpleTuner:
    """A folder of SimpleTuner's caches."""

    def __init__(self, folder: Path, family: str) -> None:
        self._folder, self._family = folder, family
        self._named: dict[str, list[Path]] = defaultdict(list)
        for path in sorted(folder.rglob("*.pt")):
            self._named[path.name].append(path)
        self._records: dict[tuple[str, Path], _Records] = {}

    def files(self) -> Sequence[Path]:
        """List every `.pt`."""
        return [path for paths in self._named.values() for path in paths]

    def slot(self, wanted: Wanted) -> Slot | str:
        """Find the file of an image's name, in the folder that the image has below its root."""
        if wanted.file is None:
            return "not local: its images are not files of a folder"
        path = PurePosixPath(wanted.picture.path)
        name = sha256(path.stem.encode()).hexdigest() + ".pt"
        if (self._folder / path.parent / name).is_file():
            return Slot(self._folder / path.parent / name)
        below = tuple(part for part in path.parent.parts)
        found = [
            one for one in self._named.get(name, ()) if one.parent.parts[len(one.parent.parts) - len(below) :] == below
        ]
        if len(found) > 1:
            return f"ambiguous: {len(found)} files of that name; name the folder of one dataset, and --dataset"
        return Slot(found[0]) if found else ABSENT

    def latent(self, wanted: Wanted, slot: Slot) -> FoundLatent | str:
        """Read a latent, its geometry from the metadata of its dataset, or of its target's for a strict reference."""
        values = _load(slot.file)
        if isinstance(values, str):
            return values
        if not isinstance(values, Tensor):
            return f"unknown content: {type(values).__name__} in place of a tensor"
        own = self._recorded(wanted)
        if own is not None:
            return FoundLatent(values, *own, _RESAMPLING)
        shared = self._recorded(wanted.target) if wanted.target is not None else None
        if shared is None:
            return f"geometry unknown: {_METADATA.format(wanted.dataset_id)} is not there or says nothing of it"
        return FoundLatent(values, None, *shared[1:], _RESAMPLING)

    def _recorded(self, wanted: Wanted) -> tuple[Size, Size | None, tuple[int, int] | None] | None:
        """Return size, intermediary size and crop of an image as its dataset's metadata has them."""
        assert wanted.file is not None, "slot() refuses others"
        root = wanted.file.parents[len(PurePosixPath(wanted.picture.path).parts) - 1]
        place = (wanted.dataset_id, root)
        records = self._records.get(place)
        if records is None:
            records = self._records[place] = _Records(wanted.dataset_id, (root, self._folder, self._folder.parent))
        return records.of(wanted.file, wanted.picture.path)

    def text(self, prompt: str) -> FoundText | str:
        """Find a prompt by its hash."""
        found = self._named.get(f"{md5(prompt.encode()).hexdigest()}-{self._family}.pt")
        if not found:
            return ABSENT
        content = _load(found[0])
        if isinstance(content, str):
            return content
        embed = content.get("prompt_embeds") if isinstance(content, dict) else None
        pooled = content.get("pooled_prompt_embeds") if isinstance(content, dict) else None
        if not isinstance(embed, Tensor) or not (pooled is None or isinstance(pooled, Tensor)):
            return "unknown content: no prompt_embeds"
        if embed.ndim != 3 or len(embed) != 1:
            return f"another shape: {tuple(embed.shape)} in place of one prompt's"
        return FoundText(tuple(found), embed[0], None if pooled is None else pooled.flatten())


class _Records:
    """The two JSON files of one dataset."""

    def __init__(self, dataset_id: str, folders: Sequence[Path]) -> None:
        self._known = _json(_METADATA.format(dataset_id), folders)
        config = _json(_INDICES.format(dataset_id), folders).get("config")
        self._config: Mapping[str, Any] = config if isinstance(config, dict) else {}
        self._named: dict[str, list[str]] = defaultdict(list)
        for path in self._known:
            self._named[Path(path).name].append(path)

    def of(self, file: Path, path: str) -> tuple[Size, Size | None, tuple[int, int] | None] | None:
        spelled = [one for one in self._named.get(file.name, ()) if f"/{one}".endswith(f"/{path}")]
        if len(spelled) != 1:
            return None
        record = self._known[spelled[0]]
        try:
            original, resized = _pair(record["original_size"]), _pair(record["intermediary_size"])
            crop = _pair(record["crop_coordinates"])
        except (TypeError, KeyError, ValueError):
            return None
        style = self._config.get("crop_style") or "random"
        scaled_before = bool(
            self._config.get("crop")
            and self._config.get("maximum_image_size")
            and self._config.get("target_downsample_size")
        )
        return original, None if scaled_before else resized, crop if self._config and style in _SETTLED else None


def _pair(value: Any) -> tuple[int, int]:
    first, second = value
    return int(first), int(second)


def _json(name: str, folders: Sequence[Path]) -> dict[str, Any]:
    """Read the first of some places where a file is; without one, or if it is damaged, there is nothing."""
    for folder in folders:
        if (folder / name).is_file():
            try:
                content = json.loads((folder / name).read_text())
            except (OSError, ValueError):
                return {}
            return content if isinstance(content, dict) else {}
    return {}


def _load(path: Path) -> Any:
    """Load a file of tensors, or say why not in a text; nothing that a pickle names is run."""
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            return f"unreadable: {damaged} in it is damaged"
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as fault:
        if re.search("weights_only|Unsupported|global", str(fault), re.IGNORECASE):
            return "unsafe: it holds more than tensors, and is not loaded"
        return unreadable(fault)
    except _FAULTS as fault:
        return unreadable(fault)
    return "unknown content: a text" if isinstance(content, str) else content
