"""The options of `multidatabackend.json`: one entry per dataset, and the generators of its references.

Names are SimpleTuner's. An option is declared here and nowhere else; docs/options.md and the JSON Schema follow.
"""

from typing import Annotated, Literal, TypeAlias

from pydantic import BeforeValidator, Field, StringConstraints, WithJsonSchema
from pydantic.json_schema import JsonSchemaValue

from schemas.options import Options, option
from schemas.recipes import JpegArtifacts, Superresolution
from schemas.trainer import CaptionStrategy, ImageSize, ResolutionType

Text: TypeAlias = Annotated[str, StringConstraints(min_length=1)]
DatasetId: TypeAlias = Annotated[
    str, StringConstraints(max_length=200, pattern=r'^[^/\\:*?"<>|\x00-\x1f.][^/\\:*?"<>|\x00-\x1f]*$')
]


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _no_repeats(value: object) -> object:
    return 0 if value is None or value == "" else value


def _no_captions(value: object) -> object:
    return [] if value is None or value is False else _as_list(value)


_TEXT_OR_LIST: JsonSchemaValue = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
_NO_TEXT: JsonSchemaValue = {"anyOf": [*_TEXT_OR_LIST["anyOf"], {"const": False}, {"type": "null"}]}

Texts: TypeAlias = Annotated[tuple[Text, ...], BeforeValidator(_as_list), WithJsonSchema(_TEXT_OR_LIST)]


class Generator(Options):
    """One entry of a dataset's `conditioning`: references made from its own images."""

    recipe: Annotated[Superresolution | JpegArtifacts, Field(discriminator="type")] = option(
        ..., "the degradation; its parameters stand flat in the entry", stages="pairs cache"
    )
    captions: Annotated[tuple[Text, ...], BeforeValidator(_no_captions), WithJsonSchema(_NO_TEXT)] = option(
        (), "prompts instead of the images' captions; false or null keeps those", stages="pairs"
    )
    conditioning_type: Literal["reference_strict"] = option(
        "reference_strict", "generated references share their target's crop", stages="pairs"
    )
    storage: Literal["files", "ondemand"] = option(
        "files",
        "`files`: prep pairs writes lossless pictures that prep cache reads; `ondemand`: nothing is written, prep "
        "cache makes the same pixels while encoding",
        stages="pairs",
    )
    instance_data_dir: str | None = option(
        None,
        "folder for the generated files",
        stages="",
        no_effect="generated pictures live in the workspace, named by their content",
    )
    cache_dir_vae: str | None = option(
        None, "folder for their latents", stages="", no_effect="latents lie with those of the source dataset"
    )


class CompositeImage(Options):
    """How one picture that shows several side by side is cut."""

    enabled: bool = option(True, "cut at all", stages="scan")
    image_count: int = option(2, "pictures side by side", stages="scan", ge=1)
    select_index: int = option(0, "which of them, from the left, 0 first", stages="scan", ge=0)


class HuggingFace(Options):
    """Columns of a dataset of `type: huggingface`."""

    caption_column: Texts = option(("caption",), "caption column or columns; dots reach into structs", stages="scan")
    image_column: Text = option("image", "image column", stages="scan")
    composite_image_config: CompositeImage | None = option(None, "cut composite pictures", stages="scan")


class DatasetConfig(Options):
    """One dataset."""

    id: DatasetId = option(..., "unique name; also the name of its files in the workspace", stages="scan pairs")
    type: Literal["local", "huggingface", "csv", "parquet"] = option(
        "local", "where its images come from", stages="scan"
    )
    dataset_type: Literal["image", "conditioning", "eval", "text_embeds"] = option(
        "image",
        "what it is for: targets, references, held-out targets, or the place of the text cache",
        stages="scan pairs",
    )
    disabled: bool = option(False, "leave this entry out", stages="", alias="disable")
    default: bool = option(False, "of several `text_embeds` entries, the one that is used", stages="cache train")

    # Files and caches
    instance_data_dir: Text | None = option(
        None, "folder of images, sub-folders included", stages="scan", alias="instance_data_root"
    )
    cache_dir: str | None = option(None, "text_embeds: where text shards lie", stages="cache train")
    cache_dir_vae: str | None = option(
        None, "where its latent shards lie; several datasets may share one", stages="cache train"
    )
    dataset_name: str | None = option(None, "hub name or path, for `type: huggingface`", stages="scan")
    huggingface: HuggingFace | None = option(None, "columns, for `type: huggingface`", stages="scan")
    metadata_backend: Literal["discovery", "json", "filesystem", "parquet", "huggingface"] = option(
        "discovery", "where sizes come from", stages="", no_effect="sizes are always read from the images' headers"
    )
    vae_cache_clear_each_epoch: bool = option(
        False, "encode anew each epoch", stages="", no_effect="latents are kept: their keys cannot go stale"
    )
    write_batch_size: int = option(
        128, "files per write", stages="", ge=1, no_effect="shards are filled to a fixed size in bytes"
    )

    # Pairing
    conditioning_data: Texts = option((), "id or ids of the reference sets", stages="pairs")
    conditioning_type: Literal["reference_strict", "reference_loose"] | None = option(
        None, "references take their target's resize and crop, or have their own", stages="scan pairs"
    )
    source_dataset_id: str | None = option(None, "the target set this reference set belongs to", stages="pairs")
    conditioning: tuple[Generator, ...] = option((), "generators of references", stages="pairs")
    repeats: Annotated[int, BeforeValidator(_no_repeats)] = option(
        0, "extra showings of each image per epoch; 0 is shown once", stages="pairs", ge=0, le=1_000_000
    )

    # Sizes and crops
    resolution: float = option(
        1024, "edge in pixels (`pixel`, `pixel_area`) or megapixels (`area`)", stages="scan", gt=0
    )
    resolution_type: ResolutionType = option(
        "pixel_area",
        "`pixel`: shorter edge; `area`: megapixels; `pixel_area`: edge of the square of equal area",
        stages="scan",
    )
    crop: bool = option(False, "crop to `crop_aspect`; without, only to the bucket's alignment", stages="scan")
    crop_aspect: Literal["square", "preserve"] = option("square", "aspect under `crop: true`", stages="scan")
    crop_style: Literal["random", "center", "centre", "corner"] = option(
        "random",
        "where the crop lies; random ones are drawn once per image, by seed, and shared by its references",
        stages="scan",
    )
    minimum_image_size: ImageSize = option(
        None, "smaller images are rejected, by edge (`pixel`) or area, before any resize", stages="scan", gt=0
    )
    maximum_image_size: ImageSize = option(
        None, "under `crop: true`, images are scaled to `target_downsample_size` before the crop", stages="scan", gt=0
    )
    target_downsample_size: ImageSize = option(None, "see `maximum_image_size`", stages="scan", gt=0)

    # Captions
    caption_strategy: CaptionStrategy | None = option(
        "filename", "where captions come from; null is none", stages="scan"
    )
    instance_prompt: Texts = option((), "caption or captions under `instanceprompt`", stages="scan")
    prepend_instance_prompt: bool = option(False, "put `instance_prompt` before every caption", stages="scan")
    only_instance_prompt: bool = option(False, "use `instance_prompt` instead of captions", stages="scan")

    @property
    def is_target(self) -> bool:
        """Tell a set of targets from references and text stores."""
        return self.dataset_type in ("image", "eval")

    def generated_id(self, generator: Generator) -> str:
        """Name the reference set that a generator makes, as SimpleTuner names it."""
        return f"{self.id}_conditioning_{generator.recipe.type}"

    @property
    def generated_ids(self) -> tuple[str, ...]:
        """Name the reference sets that `conditioning` makes."""
        return tuple(self.generated_id(entry) for entry in self.conditioning)
