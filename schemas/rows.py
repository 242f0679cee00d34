"""The rows the stages hand on: one frozen dataclass per table, its Arrow schema derived from the annotations.

A new column is a field here, with a comment that says its unit; `X | None` makes it nullable.
"""

import types
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Any, NewType, TypeVar, Union, get_args, get_origin, get_type_hints

import pyarrow as pa

from schemas.geometry import Geometry as Geometry
from schemas.keys import latent_key

RowT = TypeVar("RowT")
UInt64 = NewType("UInt64", int)
Int32 = NewType("Int32", int)  # pixels and other small numbers


@dataclass(frozen=True, slots=True)
class ImageRow:
    """One image that `prep scan` saw; a rejected one keeps its row and says why."""

    dataset_id: str
    path: str  # relative to the dataset's folder, POSIX; of a table's row, its number
    image_id: str | None  # hash of the file's bytes; null if it was not read
    size_bytes: int
    mtime_ns: int
    width: Int32 | None  # pixels, after EXIF orientation
    height: Int32 | None
    orientation: Int32 | None  # EXIF, 1 to 8; 1 is upright
    format: str | None  # as Pillow names it
    mode: str | None  # as Pillow names it
    bits: Int32 | None  # per channel, in the file
    frames: Int32 | None  # pictures in the file; more than 1 is an animation, of which the first counts
    alpha: bool | None  # transparency of any kind
    icc: bool | None  # carries a colour profile
    phash: str | None  # perceptual hash, 16 hexadecimal digits; null unless near duplicates are looked for
    face: list[float]  # centre of the largest face, x and y as shares of the sides; empty unless looked for and found
    examined: str | None  # what was done with its decoded pixels: verify, phash, face; null if it was not decoded
    fault: str | None  # why the file itself cannot be used, whatever the settings; true of these bytes
    captions: list[str]
    caption_source: str | None  # textfile, filename, instanceprompt, parquet, csv, huggingface
    caption_size_bytes: int | None  # of the text file
    caption_mtime_ns: int | None
    bucket: str | None  # "WxH"
    target_width: Int32 | None
    target_height: Int32 | None
    intermediary_width: Int32 | None
    intermediary_height: Int32 | None
    crop_top: Int32 | None
    crop_left: Int32 | None
    reject: str | None  # a sentence; null means kept

    @property
    def geometry(self) -> Geometry:
        """Return the geometry of a kept row; a rejected row has none and raises ValueError."""
        numbers = (
            self.target_width,
            self.target_height,
            self.intermediary_width,
            self.intermediary_height,
            self.crop_top,
            self.crop_left,
        )
        whole = [number for number in numbers if number is not None]
        if len(whole) != len(numbers):
            raise ValueError(f"{self.dataset_id}/{self.path} was rejected and has no geometry")
        return Geometry(*whole)


@dataclass(frozen=True, slots=True)
class Reference:
    """One reference image of a pair: a file of its own, or the target's file degraded by a recipe."""

    dataset_id: str
    image_id: str
    path: str  # relative to the folder of its dataset; of the target's dataset if degraded
    recipe: str | None  # canonical JSON of the degradation; null for a file of its own
    seed: int | None  # of the degradation's draws
    realised: str | None  # JSON of the steps of the degradation with every number as it was drawn
    bucket: str
    geometry: Geometry
    view: str  # how the file is decoded and scaled, where that is not the default: canonical JSON, or empty
    prompts: list[str]  # instead of the sample's, while this one of several references is shown; often empty
    shift_x: float | None  # pixels of the training picture by which it lies right of its target; null if not compared
    shift_y: float | None  # pixels by which it lies below
    scale: float | None  # relative to its target; 1.01 is one per cent larger
    similarity: float | None  # structural similarity to its target (SSIM), 0 to 1
    confidence: float | None  # how far shift and scale can be trusted, 0 to 1

    def key(self, encoder: str) -> str:
        """Key its latent under an encoder."""
        return latent_key(encoder, self.image_id, self.geometry.as_key(), self.view, self.recipe, self.seed)


@dataclass(frozen=True, slots=True)
class PairRow:
    """One training sample: a target, its references (none: plain text-to-image) and the prompts it may be shown."""

    sample_id: str
    dataset_id: str
    target_image_id: str
    target_path: str  # relative to the dataset's folder
    variant: int  # of its random crops and degradations: in epoch e, the variant e modulo `variants` is shown
    variants: int  # of this target; 1 unless crops or degradations differ by epoch
    geometry: Geometry  # of the target
    view: str  # of the target: see Reference
    references: list[Reference]  # of a rejected row the files that are in order: how they lie is known
    prompts: list[str]
    prompt: str  # the one of them that is drawn by seed, for previews and other trainers; training shows all in turn
    bucket: str
    repeats: int  # extra showings per epoch; 0 is shown once
    reject: str | None  # a sentence; null means kept

    def target_key(self, encoder: str) -> str:
        """Key the target's latent under an encoder."""
        return latent_key(encoder, self.target_image_id, self.geometry.as_key(), self.view)

    def store_of(self, reference: Reference) -> str:
        """Name the dataset whose store holds a reference's latent: a degraded one lies with its target."""
        return reference.dataset_id if reference.recipe is None else self.dataset_id


@dataclass(frozen=True, slots=True)
class LatentRow:
    """One encoded image of a latent shard; every row of a shard has the same shape."""

    key: str
    latent: bytes  # bfloat16, C×H×W, little-endian, already normalised; `moments`: 2C×H×W, mean, then deviation
    checksum: UInt64  # xxh3-64 of the latent's bytes, then of [key] as JSON


@dataclass(frozen=True, slots=True)
class TextRow:
    """One encoded prompt of a text shard; every row of a shard has the same shape."""

    key: str
    prompt: str
    embed: bytes  # bfloat16, tokens×width, little-endian; float8 under `text_cache_dtype: float8`; see `pad_rows`
    pooled: bytes | None  # bfloat16, width; null for families without one
    num_tokens: int  # real tokens before padding, as many as are kept
    scale: float | None  # of float8: what its values are multiplied by
    error: float | None  # of float8: root mean square of what it lost, relative to that of the embed
    checksum: UInt64  # xxh3-64 of embed, pooled, then [key, prompt, num_tokens, scale, error] as JSON


@dataclass(frozen=True, slots=True)
class RejectRow:
    """One image that could not be encoded; found again by its key, so that it is not tried twice."""

    key: str
    reject: str


@dataclass(frozen=True, slots=True)
class NotedReference:
    """What the latent of a reference was made from, besides the encoder: columns of a Reference."""

    dataset_id: str
    path: str
    image_id: str
    view: str
    geometry: Geometry
    recipe: str | None
    seed: int | None
    prompts: list[str]  # instead of the sample's


@dataclass(frozen=True, slots=True)
class NotedRow:
    """What the latents and embeds of one sample were last made from, besides the encoders: columns of a PairRow."""

    sample_id: str
    target_path: str
    target_image_id: str
    view: str
    geometry: Geometry
    references: list[NotedReference]
    prompts: list[str]


_SCALARS: dict[object, pa.DataType] = {
    str: pa.string(),
    int: pa.int64(),
    UInt64: pa.uint64(),
    Int32: pa.int32(),
    float: pa.float64(),
    bool: pa.bool_(),
    bytes: pa.binary(),
}


@cache
def arrow_schema(row_type: type) -> pa.Schema:
    """Derive the Arrow schema of a row type from its annotations."""
    return pa.schema(_arrow_fields(row_type))


def _arrow_fields(row_type: type) -> list[pa.Field]:
    hints = get_type_hints(row_type)
    return [pa.field(field.name, *_arrow_type(hints[field.name])) for field in fields(row_type)]


def _arrow_type(hint: Any) -> tuple[pa.DataType, bool]:
    """Return (Arrow type, nullable) of one annotation."""
    if get_origin(hint) in (Union, types.UnionType):
        [inner] = [part for part in get_args(hint) if part is not types.NoneType]
        return _arrow_type(inner)[0], True
    if get_origin(hint) is list:
        inner, nullable = _arrow_type(get_args(hint)[0])
        return pa.list_(pa.field("item", inner, nullable)), False
    if is_dataclass(hint):
        return pa.struct(_arrow_fields(hint)), False  # type: ignore[arg-type]
    return _SCALARS[hint], False


def as_columns(rows: list[Any], row_type: type) -> pa.Table:
    """Turn rows into an Arrow table of their schema."""
    schema = arrow_schema(row_type)
    columns = {field.name: [_plain(getattr(row, field.name)) for row in rows] for field in fields(row_type)}
    return pa.table({name: pa.array(columns[name], schema.field(name).type) for name in columns}, schema=schema)


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def from_columns(table: pa.Table, row_type: type[RowT]) -> list[RowT]:
    """Turn an Arrow table back into rows."""
    return [_build(record, row_type) for record in table.to_pylist()]


def _build(record: dict[str, Any], row_type: type[RowT]) -> RowT:
    values = {name: _value(record[name], hint) for name, hint in get_type_hints(row_type).items()}
    return row_type(**values)


def _value(value: Any, hint: Any) -> Any:
    if get_origin(hint) is list:
        return [_value(item, get_args(hint)[0]) for item in value]
    return _build(value, hint) if isinstance(hint, type) and is_dataclass(hint) else value
