"""Our side of an import: what the stores need, under which keys, and how rows get into them.

The only module of `prep.importing` that knows how latents and texts are keyed and written.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from families.checkpoints import image_encoder_key, text_encoder_key
from prep.importing.found import Wanted
from prep.pixels import Picture, reference_picture, target_picture
from prep.places import Folder
from schemas.errors import UserError
from schemas.freshness import read_manifest
from schemas.keys import text_key
from schemas.project import Project
from schemas.rows import PairRow
from schemas.shards import Array, ShardHeader, ShardIndex, latent_row, text_row, write_shard
from schemas.stores import Store

# A latent of a project is the mode of the posterior: `prep.importing.trial` takes nothing else.
LATENTS = frozenset({"mode"})

_FACTS = ("path", "size_bytes", "mtime_ns", "width", "height", "orientation", "alpha", "icc", "bits", "frames")


@dataclass(frozen=True, slots=True)
class Needed:
    """What a project needs of latents, and what of it is there."""

    encoder: str
    latents: tuple[Wanted, ...]  # each key once, those that are there included
    present: frozenset[str]  # keys that are in the stores, or known not to be encodable
    degraded: Mapping[str, str]  # references made by a degradation, by name -> the dataset that they lie with


def needed_latents(project: Project, rows: Sequence[PairRow], checkpoint: Path, *, remember: bool) -> Needed:
    """List the latents that pair tables need; raises UserError if a manifest is missing or stale."""
    encoder = image_encoder_key(project, checkpoint, "mode", remember=remember)
    if project.trainer.posterior != "mode":
        raise UserError(
            f"posterior {project.trainer.posterior!r}: other trainers' caches can be shown to hold the mode alone, "
            f"which such a project does not store; leave the option out, or run: {project.command('prep cache')}"
        )
    facts = _Facts(project)
    wanted: dict[str, Wanted] = {}
    degraded: dict[str, str] = {}
    for row in rows:
        picture, key = target_picture(project, row), row.target_key(encoder)
        target = _wanted(project, facts, encoder, (row.dataset_id, key, picture))
        wanted.setdefault(key, target)
        for place, reference in enumerate(row.references):
            picture, key = reference_picture(project, row, reference), reference.key(encoder)
            if picture.recipe is not None:
                degraded[f"{picture.name} (degraded, seed {reference.seed})"] = row.dataset_id
                continue
            one = _wanted(project, facts, encoder, (reference.dataset_id, key, picture))
            wanted.setdefault(key, replace(one, target=target, place=place))
    indices = [ShardIndex(folder) for folder in {one.folder for one in wanted.values()}]
    present = frozenset(key for key in wanted if any(key in index or key in index.rejects for index in indices))
    return Needed(encoder, tuple(wanted.values()), present, degraded)


class _Facts:
    """What the manifests say of images, each read once."""

    def __init__(self, project: Project) -> None:
        self._project = project
        self._known: dict[str, dict[str, Any]] = {}

    def of(self, dataset_id: str, path: str) -> Mapping[str, Any]:
        if dataset_id not in self._known:
            manifest = read_manifest(self._project, self._project.dataset(dataset_id), _FACTS)
            self._known[dataset_id] = {record["path"]: record for record in manifest.to_pylist()}
        facts: Mapping[str, Any] = self._known[dataset_id][path]
        return facts


def _wanted(project: Project, facts: _Facts, encoder: str, what: tuple[str, str, Picture]) -> Wanted:
    dataset_id, key, picture = what
    known = facts.of(dataset_id, picture.path)
    return Wanted(
        key=key,
        folder=project.latent_store(project.dataset(dataset_id)) / encoder,
        dataset_id=dataset_id,
        picture=picture,
        file=Path(picture.place.root) / picture.path if isinstance(picture.place, Folder) else None,
        size=(known["width"], known["height"]),
        mark=(known["size_bytes"], known["mtime_ns"]),
        odd=_odd(known),
    )


def _odd(facts: Mapping[str, Any]) -> str | None:
    """Name what trainers read in different ways: most ignore orientation and profiles, and drop transparency."""
    if facts["orientation"] != 1:
        return f"EXIF orientation {facts['orientation']}"
    if facts["alpha"]:
        return "transparency"
    if facts["icc"]:
        return "a colour profile"
    if facts["bits"] != 8:
        return f"{facts['bits']} bits per channel"
    return "several pictures in the file" if facts["frames"] != 1 else None


def store_latents(encoder: str, rows: Sequence[tuple[Wanted, Array]]) -> int:
    """Write latents of one dataset and bucket, bfloat16 bit patterns, as one shard; returns the bytes of payload."""
    wanted, first = rows[0]
    folder = wanted.folder / wanted.picture.geometry.bucket
    header = ShardHeader("LatentRow", encoder, {"latent": first.shape})
    write_shard(folder, header, [latent_row(one.key, latent) for one, latent in rows])
    return header.row_bytes * len(rows)


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """One prompt, as bfloat16 bit patterns."""

    prompt: str
    embed: Array
    pooled: Array | None
    num_tokens: int


@dataclass(frozen=True, slots=True)
class TextStore:
    """The store of text embeds of a project."""

    encoder: str
    folder: Store

    def missing(self, prompts: Iterable[str]) -> list[str]:
        """Return the prompts that are not there."""
        index = ShardIndex(self.folder)
        return [prompt for prompt in prompts if text_key(self.encoder, prompt) not in index]

    def store(self, rows: Sequence[EncodedPrompt]) -> int:
        """Write prompts as one shard; returns the bytes of payload."""
        shapes = {"embed": rows[0].embed.shape}
        if rows[0].pooled is not None:
            shapes["pooled"] = rows[0].pooled.shape
        made = [
            text_row(text_key(self.encoder, one.prompt), one.prompt, one.embed, one.pooled, one.num_tokens)
            for one in rows
        ]
        header = ShardHeader("TextRow", self.encoder, shapes)
        write_shard(self.folder, header, made)
        return header.row_bytes * len(made)


def text_store(project: Project, checkpoint: Path, *, remember: bool) -> TextStore:
    """Return the store of a project's prompts; raises UserError if it holds other numbers than the encoder's."""
    if project.trainer.text_cache_dtype != "bf16":
        raise UserError(f"text_cache_dtype {project.trainer.text_cache_dtype!r}: only bf16 is imported")
    encoder = text_encoder_key(project, checkpoint, remember=remember)
    return TextStore(encoder, project.text_store / encoder)
