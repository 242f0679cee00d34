"""Where an image's captions come from: a text file beside it, its name, or the configuration."""

import re
from dataclasses import dataclass
from pathlib import Path

from schemas.datasets import DatasetConfig


@dataclass(frozen=True, slots=True)
class Captions:
    """The captions of one image, or the reason why it has none."""

    texts: list[str]
    source: str | None
    reject: str | None = None


def captions_of(image: Path, dataset: DatasetConfig) -> Captions:
    """Find the captions of one image as its dataset's options say."""
    prompts = list(dataset.instance_prompt)
    if dataset.only_instance_prompt or dataset.caption_strategy == "instanceprompt":
        return Captions(prompts, "instanceprompt")
    found = _found(image, dataset)
    if dataset.prepend_instance_prompt and found.source is not None:
        together = [f"{prompt} {text}" for prompt in prompts for text in found.texts]
        return Captions(together, found.source, found.reject)
    return found


def _found(image: Path, dataset: DatasetConfig) -> Captions:
    if dataset.caption_strategy == "filename":
        return Captions([image.stem.replace("_", " ")], "filename")
    if dataset.caption_strategy == "textfile":
        found = _textfile(image.with_suffix(".txt"))
        # References may go without: their pairs then keep the targets' captions.
        return Captions([], None) if found.reject and not dataset.is_target else found
    return Captions([], None)


def _textfile(path: Path) -> Captions:
    """Read one caption per line; blank lines, a byte-order mark and CRLF do not count."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        return Captions([], None, f"no caption: {path.name} is missing")
    except OSError as fault:
        return Captions([], None, f"no caption: {path.name}: {fault.strerror}")
    except UnicodeDecodeError as fault:
        return Captions([], None, f"no caption: {path.name} is not UTF-8 (byte {fault.start})")
    lines = [line.strip() for line in re.split(r"\r\n|\r|\n", text) if line.strip()]
    return Captions(lines, "textfile") if lines else Captions([], None, f"no caption: {path.name} is empty")
