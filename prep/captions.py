"""An image's captions: found in a text file, a table, its name or the configuration, then prefixed, filtered, shuffled.

`read_text` reads a text file, `Captioner` makes of what was found the captions an image is trained with.
"""

import codecs
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from schemas.captions import Filter, parse_filter
from schemas.keys import seed_of

if TYPE_CHECKING:  # workers of the pool start in half the time without what checks options
    from schemas.datasets import CaptionShuffle, DatasetConfig

_MARKS = (  # byte-order marks, the longer of two that begin alike first
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_TAGS = {"comma": (",", ", "), "space": (" ", " "), "period": (".", ". ")}  # what separates them, what joins them


@dataclass(frozen=True, slots=True)
class Captions:
    """The captions of one image, or the reason why it has none."""

    texts: list[str]
    source: str | None
    reject: str | None = None


def read_text(content: bytes | OSError, path: str, encoding: str, *, multiline: bool) -> list[str] | str:
    """Read a text file: a caption per line, or one in all; or return the reason why it has none.

    A byte-order mark decides the encoding; blank lines and blanks at the ends do not count.
    """
    name = path.rpartition("/")[2]
    if isinstance(content, OSError):
        missing = isinstance(content, FileNotFoundError)
        return f"no caption: {name} is missing" if missing else f"no caption: {name}: {content.strerror or content}"
    marked = next((codec for mark, codec in _MARKS if content.startswith(mark)), None)
    hint = "" if marked else "; caption_encoding names another encoding"
    try:
        text = re.sub(r"\r\n?", "\n", content.decode(marked or encoding))
    except UnicodeError as fault:
        told = f" (byte {fault.start})" if isinstance(fault, UnicodeDecodeError) else ""
        return f"no caption: {name} is not {(marked or encoding).removesuffix('-sig').upper()}{told}{hint}"
    if "\0" in text:
        return f"no caption: {name} holds zero bytes, as UTF-16 without a byte-order mark does{hint}"
    lines = [line for line in map(str.strip, [text] if multiline else text.split("\n")) if line]
    return lines or f"no caption: {name} is empty"


def texts_of(value: object) -> list[str]:
    """Return the captions in a table's cell: a text, a list of texts, or nothing."""
    if isinstance(value, list | tuple):
        return [text for one in value for text in texts_of(one)]
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    text = "" if value is None or value != value else str(value).strip()
    return [text] if text else []


@dataclass(frozen=True, slots=True)
class Captioner:
    """What a dataset's options make of the captions that were found."""

    dataset: "DatasetConfig"
    filters: tuple[Filter, ...]
    seed: int

    @classmethod
    def of(cls, dataset: "DatasetConfig", filters: Iterable[str], seed: int) -> "Captioner":
        """Prepare for a dataset; `filters` are the entries of its caption_filter_list."""
        shuffled = dataset.caption_shuffle.seed
        return cls(dataset, tuple(map(parse_filter, filters)), seed if shuffled is None else shuffled)

    @property
    def reads_text(self) -> bool:
        """Tell whether captions lie in text files."""
        return self.dataset.caption_strategy == "textfile" and not self.dataset.only_instance_prompt

    def of_path(self, path: str) -> Captions:
        """Caption an image by its name or the configuration alone."""
        prompts = list(self.dataset.instance_prompt)
        if self.dataset.only_instance_prompt or self.dataset.caption_strategy == "instanceprompt":
            return self._finished(prompts, "instanceprompt")
        if self.dataset.caption_strategy == "filename":
            name = path.rpartition("/")[2]
            text = (name.rpartition(".")[0] or name).replace("_", " ").strip()
            return self.of_found([text] if text else f"no caption: {name} says nothing", "filename")
        return Captions([], None)

    def of_found(self, found: list[str] | str, source: str) -> Captions:
        """Caption an image by what was found for it, or by the reason why nothing was; references may go without."""
        if isinstance(found, str):
            return self._without(found)
        if not found:
            return self._without(f"no caption: {source} has none")
        if self.dataset.prepend_instance_prompt:
            found = [f"{prompt} {text}" for prompt in self.dataset.instance_prompt for text in found]
        return self._finished(found, source)

    def _finished(self, texts: list[str], source: str) -> Captions:
        if self.filters:
            texts = [text for text in map(self._filtered, texts) if text]
            if not texts:
                return self._without("no caption: caption_filter_list leaves nothing of it")
        if self.dataset.caption_shuffle.enable:
            texts = [variant for text in texts for variant in shuffled(text, self.dataset.caption_shuffle, self.seed)]
        return Captions(texts, source)

    def _without(self, reason: str) -> Captions:
        return Captions([], None, reason if self.dataset.is_target else None)

    def _filtered(self, text: str) -> str:
        for one in self.filters:
            text = one(text)
        return text.strip()


def shuffled(text: str, options: "CaptionShuffle", seed: int) -> list[str]:
    """Return a caption of tags and its variants, each once; the first tags keep their place."""
    separator, joiner = _TAGS[options.split_on]
    tags = [tag for tag in map(str.strip, text.split(separator)) if tag]
    kept = options.position_start
    if len(tags) < kept + 2:
        return [text]
    end = "." if options.split_on == "period" and text.rstrip().endswith(".") else ""
    written = joiner.join(tags) + end  # the caption itself, but for its blanks
    variants = {written: text} if options.include_original else {}
    for number in range(options.count):
        order = sorted(range(kept, len(tags)), key=lambda place: seed_of(seed, "tags", text, number, place))
        variant = joiner.join([*tags[:kept], *(tags[place] for place in order)]) + end
        variants.setdefault(variant, variant)
    return list(variants.values())


def beside(path: str) -> str:
    """Return the text file of an image; its name has an extension."""
    return path.rpartition(".")[0] + ".txt"
